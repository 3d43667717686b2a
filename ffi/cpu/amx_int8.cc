// The AMX rung (Sapphire Rapids and later): products in tile registers, 16 x 16 sums of 64 products at once.
//
// A tile product takes 16 rows of 64 bytes by 64 rows of 16, four of them interleaved. Rows of weights are the first as
// they lie, and so need no packing; codes are rewritten to be the second, once for all weights (Arrange). Both are
// signed. The surprising fact is what is left to do: 16 rows of sums are outputs, so sums are transposed on their way
// to the epilogue. That, and fetching or copying the weights that come next, is done between the products of tiles,
// which leave everything else in the processor idle. Products of few rows are those of the AVX512-VNNI rung.
#include <immintrin.h>

#include <cstdlib>

#include "int8.h"
#include "processor.h"
#include "prologue_avx512.h"
#include "rows_avx512.h"
#include "tiles_avx512.h"
#if defined(JAXINT8_EMULATED_TILES)
#include "emulated_tiles.h"
#endif

namespace jaxint8::cpu {

extern const Rung kAvx512Vnni;

namespace {

// TEMPORARY: choices that only a measurement can make.
int64_t Tuned(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoll(value) : otherwise;
}
const int64_t kLeastRows = Tuned("AMX_LEAST", 4);       // below, AVX-512
const int64_t kChunkRows = Tuned("AMX_CHUNK", 256);     // rows of a block
const int64_t kCopyRows = Tuned("AMX_COPY", 64);        // from so many on weights are copied, if k is cut for it
const int64_t kCopiedK = Tuned("AMX_COPIED_K", 1024);   // columns of a copied piece, at most 2048
const int64_t kDirectK = Tuned("AMX_DIRECT_K", 4096);   // columns of a piece that is not copied
const int64_t kColumnA = Tuned("AMX_COLUMN", 4);        // tiles of weights at once for up to 16 rows: 1, 2, 4
const int64_t kRowsOuter = Tuned("AMX_ROWS_OUTER", 0);  // whether rows of codes are the outer loop
const int64_t kFetch = Tuned("AMX_FETCH", 2);           // where weights are fetched to: 0 not, 1 the L1 cache, 2 the L2
const int64_t kFetchCodes = Tuned("AMX_FETCH_CODES", 0);  // tiles of codes ahead to the L1 cache
const int64_t kBetween = Tuned("AMX_BETWEEN", 1);         // whether sums are finished between products

constexpr int64_t kTile = 16, kTileBytes = 1024, kTileSums = 256;
constexpr int64_t kTilesN = kBlockN / kTile;
constexpr int64_t kMostCopiedK = 2048;

// What ldtilecfg reads: eight whole tiles.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
constexpr TileConfig kWholeTiles;

// What a thread keeps between blocks.
struct alignas(64) AmxScratch {
  TileScratch few;  // first: of the AVX512-VNNI rung
  // The piece of weights that was copied ahead: for which job, from where, how wide, in which buffer.
  uint64_t job;
  const int8_t* w;
  int64_t columns;
  int buffer;
  alignas(64) int8_t copies[2][kBlockN * kMostCopiedK];
  // Of every 16 rows of codes, four tiles: [16 outputs][16 rows].
  alignas(64) int32_t sums[kChunkM * kBlockN];
  alignas(64) int32_t high[kTile * kBlockN];
};

// The tile intrinsics of GCC 12 do not say that they read memory.
inline void MemoryIsRead() { asm volatile("" ::: "memory"); }

// Four words of 16 rows as four registers, of one word of each row: at(q, r) is where they are in row 4 * q + r.
// Quarters of registers are put together while they are loaded, which leaves half of the shuffles of a transposition.
template <typename F>
ALWAYS_INLINE inline void FourWords(const F& at, __m512i (&out)[4]) {
  __m512i rows[4];
  Unroll<4>([&](auto r) ALWAYS_INLINE {
    const auto quarter = [&](auto q) ALWAYS_INLINE { return _mm_loadu_si128(static_cast<const __m128i*>(at(q, r))); };
    rows[r] = _mm512_broadcast_i32x4(quarter(std::integral_constant<int, 0>{}));
    rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x00f0, quarter(std::integral_constant<int, 1>{}));
    rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x0f00, quarter(std::integral_constant<int, 2>{}));
    rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0xf000, quarter(std::integral_constant<int, 3>{}));
  });
  TransposeLanes(rows, out);
}

void Arrange(const int8_t* rows, int64_t stride, int64_t columns, int8_t* arranged) {
  const int8_t* from[4] = {rows, rows + 4 * stride, rows + 8 * stride, rows + 12 * stride};
  const int64_t stride3 = Thrice(stride);
  ForgetVectors();
  for (int8_t* const end = arranged + columns * kTile; arranged != end; arranged += 256) {
    __m512i lines[4];
    FourWords([&](auto q, auto r) ALWAYS_INLINE -> const void* { return RowAt<r>(from[q], from[q], stride, stride3); },
              lines);
    Unroll<4>([&](auto i) ALWAYS_INLINE { _mm512_store_si512(arranged + i * 64, lines[i]); });
    Unroll<4>([&](auto q) ALWAYS_INLINE { from[q] += 16; });
  }
}

// Rows [i, i + 4) of a block, or those that exist, from sums to outputs, or to c if there is no epilogue.
void FinishFour(const Block& b, const int32_t* sums, int64_t i) {
  const int32_t* tiles = sums + i / kTile * kTilesN * kTileSums + i % kTile;
  __m512i acc[4][4];
  Unroll<4>([&](auto z) ALWAYS_INLINE {
    __m512i rows[4];
    FourWords([&](auto q, auto r) ALWAYS_INLINE -> const void* { return tiles + z * kTileSums + (4 * q + r) * kTile; },
              rows);
    Unroll<4>([&](auto r) ALWAYS_INLINE { acc[r][z] = rows[r]; });
  });
  if (b.epilogue && FinishesSums(*b.epilogue) && i + 4 <= b.m) return FinishSums<4>(*b.epilogue, i, acc);
  const int64_t end = i + 4 < b.m ? i + 4 : b.m;
  Unroll<4>([&](auto r) ALWAYS_INLINE {
    if (i + r >= end) return;
    int32_t* c = b.c + (i + r) * kBlockN;
    Unroll<4>([&](auto z) ALWAYS_INLINE { _mm512_store_si512(c + z * 16, acc[r][z]); });
  });
  if (b.epilogue) Finish(*b.epilogue, i, end);
}

// A piece of a block's weights, in rows that lie `stride` bytes apart.
struct Piece {
  const int8_t* w = nullptr;
  int64_t stride = 0, rows = 0, columns = 0;
};

// Copies 16 rows of 64 bytes, or those that exist, to a tile of their own.
ALWAYS_INLINE inline void CopyWholeTile(const int8_t* w, int64_t stride, int8_t* tile) {
  Unroll<4>([&](auto q) ALWAYS_INLINE {
    Unroll<4>([&](auto r) ALWAYS_INLINE {
      _mm512_store_si512(tile + (q * 4 + r) * 64, _mm512_loadu_si512(w + (q * 4 + r) * stride));
    });
  });
}
void CopyPartOfTile(const int8_t* w, int64_t stride, int64_t rows, int64_t columns, int8_t* tile) {
  const __mmask64 mask = FirstBytes(columns);
  for (int64_t r = 0; r < kTile; ++r) {
    const __mmask64 in = r < rows ? mask : 0;
    _mm512_store_si512(tile + r * 64, _mm512_maskz_loadu_epi8(in, in ? w + r * stride : w));
  }
}

// What is done between the products of tiles. A step is taken for every 64 columns that four of these multiply.
class Between {
 public:
  explicit Between(const Block& b, const int32_t* sums) : b_(b), sums_(sums) {}

  // Fetches a piece in the order in which it lies, spread over so many steps.
  void Fetch(const Piece& piece, int64_t steps) {
    if (kFetch == 0 || piece.w == nullptr) return;
    fetch_ = piece.w;
    const bool one_run = piece.columns == piece.stride;
    run_ = one_run ? piece.rows * piece.columns : piece.columns;
    runs_ = one_run ? 1 : piece.rows;
    gap_ = piece.stride - piece.columns;
    left_in_run_ = run_;
    const int64_t lines = (piece.rows * piece.columns + 63) / 64;
    fetch_bytes_ = (lines + steps - 1) / steps * 64;
  }
  // Copies a whole piece to tiles, [16 rows][64 columns].
  void Copy(const Piece& piece, int8_t* to, int64_t steps) {
    copy_ = piece;
    to_ = to;
    copy_row_ = copy_column_ = 0;
    const int64_t tiles = piece.rows / kTile * (piece.columns / 64);
    copies_ = (tiles + steps - 1) / steps;
  }
  // The sums of all rows before this one are whole.
  void Whole(int64_t row) {
    whole_ = row < b_.m ? row : b_.m;
    if (kBetween == 0) FinishAll();
  }

  [[gnu::noinline]] void Step() {
    MemoryIsRead();
    if (runs_ > 0) FetchLines();
    for (int64_t i = 0; i < copies_ && copy_row_ < copy_.rows; ++i) CopyTile();
    if (finished_ < whole_) FinishNext();
  }
  void CopyAll() {
    while (copy_row_ < copy_.rows) CopyTile();
  }
  void FinishAll() {
    while (finished_ < whole_) FinishNext();
  }

 private:
  void FetchLines() {
    for (int64_t left = fetch_bytes_; left > 0 && runs_ > 0;) {
      const int64_t now = left < left_in_run_ ? left : left_in_run_;
      const int8_t* fetch = fetch_;
      const int8_t* const end = fetch + now;
      if (kFetch == 1) {
        for (; fetch < end; fetch += 64) _mm_prefetch(fetch, _MM_HINT_T0);
      } else {
        for (; fetch < end; fetch += 64) _mm_prefetch(fetch, _MM_HINT_T1);
      }
      fetch_ = fetch;
      left -= now;
      left_in_run_ -= now;
      if (left_in_run_ <= 0) {
        fetch_ += gap_;
        left_in_run_ = run_;
        --runs_;
      }
    }
  }
  void CopyTile() {
    CopyWholeTile(copy_.w + copy_row_ * copy_.stride + copy_column_, copy_.stride, to_);
    to_ += kTileBytes;
    copy_column_ += 64;
    if (copy_column_ < copy_.columns) return;
    copy_column_ = 0;
    copy_row_ += kTile;
  }
  void FinishNext() {
    FinishFour(b_, sums_, finished_);
    finished_ += 4;
  }

  const Block& b_;
  const int32_t* const sums_;
  const int8_t* fetch_ = nullptr;
  int64_t run_ = 0, runs_ = 0, gap_ = 0, left_in_run_ = 0, fetch_bytes_ = 0;
  Piece copy_;
  int8_t* to_ = nullptr;
  int64_t copy_row_ = 0, copy_column_ = 0, copies_ = 0;
  int64_t finished_ = 0, whole_ = 0;
};

// Weights as tiles: where the first lies, how far it is to the next row, the next tile of 16 rows, the next 64 columns.
struct Weights {
  const int8_t* w;
  int64_t stride, tile, step;
};

// Two tiles of weights by two of codes: c (+)= their sums.
[[gnu::noinline]] void Square(const Weights& weights, const int8_t* x, int64_t x_tile, int64_t steps, int32_t* c,
                              bool adds, Between& between) {
  const int8_t* w = weights.w;
  const int64_t stride = weights.stride, tile = weights.tile, step = weights.step;
  int32_t* const other = c + kTilesN * kTileSums;
  MemoryIsRead();
  if (adds) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, other, 64);
    _tile_loadd(2, c + kTileSums, 64);
    _tile_loadd(3, other + kTileSums, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t t = 0; t < steps; ++t, w += step, x += kTileBytes) {
    _tile_loadd(6, x, 64);
    _tile_loadd(4, w, stride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, x + x_tile, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, w + tile, stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    if (kFetchCodes) {
      Unroll<16>([&](auto i) ALWAYS_INLINE { _mm_prefetch(x + kFetchCodes * kTileBytes + i * 64, _MM_HINT_T0); });
      Unroll<16>([&](auto i)
                     ALWAYS_INLINE { _mm_prefetch(x + x_tile + kFetchCodes * kTileBytes + i * 64, _MM_HINT_T0); });
    }
    ForgetVectors();
    between.Step();
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, other, 64);
  _tile_stored(2, c + kTileSums, 64);
  _tile_stored(3, other + kTileSums, 64);
}

// kA tiles of weights by one of codes.
template <int kA>
void Column(const Weights& weights, const int8_t* x, int64_t steps, int32_t* c, bool adds, Between& between) {
  const int8_t* w = weights.w;
  const int64_t stride = weights.stride, tile = weights.tile, step = weights.step;
  MemoryIsRead();
  if (adds) {
    _tile_loadd(0, c, 64);
    if constexpr (kA > 1) _tile_loadd(1, c + kTileSums, 64);
    if constexpr (kA > 2) _tile_loadd(2, c + 2 * kTileSums, 64);
    if constexpr (kA > 2) _tile_loadd(3, c + 3 * kTileSums, 64);
  } else {
    _tile_zero(0);
    if constexpr (kA > 1) _tile_zero(1);
    if constexpr (kA > 2) _tile_zero(2);
    if constexpr (kA > 2) _tile_zero(3);
  }
  for (int64_t t = 0; t < steps; ++t, w += step, x += kTileBytes) {
    _tile_loadd(6, x, 64);
    _tile_loadd(4, w, stride);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kA > 1) {
      _tile_loadd(5, w + tile, stride);
      _tile_dpbssd(1, 5, 6);
    }
    if constexpr (kA > 2) {
      _tile_loadd(4, w + 2 * tile, stride);
      _tile_dpbssd(2, 4, 6);
      _tile_loadd(5, w + 3 * tile, stride);
      _tile_dpbssd(3, 5, 6);
    }
    ForgetVectors();
    between.Step();
  }
  _tile_stored(0, c, 64);
  if constexpr (kA > 1) _tile_stored(1, c + kTileSums, 64);
  if constexpr (kA > 2) _tile_stored(2, c + 2 * kTileSums, 64);
  if constexpr (kA > 2) _tile_stored(3, c + 3 * kTileSums, 64);
}

// c (+)= (hi . W) << 7 for 16 rows of codes, of those 64 columns from step `begin` to `end` that hold any high part.
void AddHighTiles(const Weights& weights, const HighTiles& high, int64_t begin, int64_t end, bool adds, int32_t* sums,
                  int32_t* c) {
  int64_t i = 0;
  while (i < high.count && high.step[i] < begin) ++i;
  if (i == high.count || high.step[i] >= end) {
    if (!adds) std::memset(c, 0, kTile * kBlockN * sizeof *c);
    return;
  }
  const int64_t stride = weights.stride, tile = weights.tile;
  MemoryIsRead();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (; i < high.count && high.step[i] < end; ++i) {
    const int8_t* w = weights.w + (high.step[i] - begin) * weights.step;
    _tile_loadd(6, high.data + i * kTileBytes, 64);
    _tile_loadd(4, w, stride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, w + tile, stride);
    _tile_dpbssd(1, 5, 6);
    _tile_loadd(4, w + 2 * tile, stride);
    _tile_dpbssd(2, 4, 6);
    _tile_loadd(5, w + 3 * tile, stride);
    _tile_dpbssd(3, 5, 6);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileSums, 64);
  _tile_stored(2, sums + 2 * kTileSums, 64);
  _tile_stored(3, sums + 3 * kTileSums, 64);
  for (int64_t j = 0; j < kTile * kBlockN; j += 16) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_load_si512(sums + j), 7);
    _mm512_store_si512(c + j, adds ? _mm512_add_epi32(_mm512_load_si512(c + j), shifted) : shifted);
  }
}

// The products of a block, piece by piece of k.
class Product {
 public:
  explicit Product(const Block& b)
      : b_(b), scratch_(reinterpret_cast<AmxScratch*>(b.scratch)), tiles_((b.m + kTile - 1) / kTile) {
    const bool whole = b.n == kBlockN && b.k % 64 == 0;
    copies_ = !whole || (b.m >= kCopyRows && b.k > kCopiedK);
    ahead_ = whole;
    width_ = PieceOf(b.k, copies_ ? kCopiedK : kDirectK);
    pieces_ = (b.k + width_ - 1) / width_;
  }

  void Multiply() {
    Between between(b_, scratch_->sums);
    for (int64_t p = 0; p < pieces_; ++p) {
      const Piece piece = PieceAt(p);
      const int64_t columns = (piece.columns + 63) / 64;
      const int64_t steps = columns * (tiles_ == 1 ? kTilesN / kColumnA : tiles_ / 2 * 2 + tiles_ % 2);
      Weights weights{piece.w, b_.k, kTile * b_.k, 64};
      if (copies_) {
        const int buffer = Copied(piece);
        weights = {scratch_->copies[buffer], 64, columns * kTileBytes, kTileBytes};
        const Piece next = PieceAt(p + 1);
        if (ahead_ && next.rows == kBlockN) {
          between.Copy(next, scratch_->copies[1 - buffer], steps);
          scratch_->job = b_.job, scratch_->w = next.w, scratch_->columns = next.columns, scratch_->buffer = 1 - buffer;
        }
      }
      between.Fetch(PieceAt(p + (copies_ && pieces_ > 1 ? 2 : 1)), steps);
      MultiplyPiece(weights, p * width_ / 64, columns, p == pieces_ - 1, between);
      between.CopyAll();
    }
    between.FinishAll();
  }

 private:
  // The pieces of this block and of the one that is likely to follow.
  Piece PieceAt(int64_t p) const {
    const bool own = p < pieces_;
    const int64_t begin = (own ? p : p - pieces_) * width_;
    const int8_t* w = own ? b_.w : b_.ahead;
    if (w == nullptr || begin >= b_.k) return {};
    return {w + begin, b_.k, own ? b_.n : b_.ahead_n, begin + width_ < b_.k ? width_ : b_.k - begin};
  }

  // In which buffer this piece lies as tiles.
  int Copied(const Piece& piece) {
    const bool there =
        ahead_ && scratch_->job == b_.job && scratch_->w == piece.w && scratch_->columns == piece.columns;
    scratch_->job = 0;
    if (there) return scratch_->buffer;
    int8_t* tile = scratch_->copies[0];
    for (int64_t j = 0; j < kBlockN; j += kTile) {
      for (int64_t t = 0; t < piece.columns; t += 64, tile += kTileBytes) {
        CopyPartOfTile(piece.w + j * piece.stride + t, piece.stride, piece.rows - j, piece.columns - t, tile);
      }
    }
    return 0;
  }

  void MultiplyPiece(const Weights& weights, int64_t begin, int64_t columns, bool last, Between& between) {
    const bool adds = begin > 0 || b_.high;
    for (int64_t i = 0; b_.high && i < tiles_; ++i) {
      AddHighTiles(weights, b_.high[i], begin, begin + columns, begin > 0, scratch_->high, SumsOf(i));
    }
    const int64_t pairs = tiles_ / 2, x_tile = kTile * b_.stride;
    const auto square = [&](int64_t z, int64_t pair) {
      Weights two = weights;
      two.w += z * 2 * weights.tile;
      const int8_t* x = b_.lo + pair * 2 * x_tile + begin * kTileBytes;
      Square(two, x, x_tile, columns, SumsOf(pair * 2) + z * 2 * kTileSums, adds, between);
      if (last && z == 1) between.Whole((pair + 1) * 2 * kTile);
    };
    if (kRowsOuter) {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        square(0, pair);
        square(1, pair);
      }
    } else {
      for (int64_t pair = 0; pair < pairs; ++pair) square(0, pair);
      for (int64_t pair = 0; pair < pairs; ++pair) square(1, pair);
    }
    if (tiles_ % 2 == 0) return;
    const int64_t i = tiles_ - 1, at_once = tiles_ == 1 ? kColumnA : kTilesN;
    for (int64_t z = 0; z < kTilesN; z += at_once) {
      const auto column = at_once == 1 ? Column<1> : at_once == 2 ? Column<2> : Column<4>;
      Weights some = weights;
      some.w += z * weights.tile;
      column(some, b_.lo + i * x_tile + begin * kTileBytes, columns, SumsOf(i) + z * kTileSums, adds, between);
    }
    if (last) between.Whole(b_.m);
  }

  int32_t* SumsOf(int64_t tile) const { return scratch_->sums + tile * kTilesN * kTileSums; }

  const Block& b_;
  AmxScratch* const scratch_;
  const int64_t tiles_;  // of 16 rows
  bool copies_, ahead_;
  int64_t width_, pieces_;
};

void MultiplyAmx(const Block& b) {
  if (!b.arranged) return kAvx512Vnni.block(b);
  asm volatile("" : : "r"(&kWholeTiles) : "memory");
  _tile_loadconfig(&kWholeTiles);
  Product(b).Multiply();
  _tile_release();
}

#if defined(JAXINT8_EMULATED_TILES)
bool Supported() { return kAvx512Vnni.supported(); }
#else
bool Supported() { return HasAmxInt8() && kAvx512Vnni.supported(); }
#endif

}  // namespace

#if defined(JAXINT8_EMULATED_TILES)
extern const Rung kAmxInt8Emulated;
const Rung kAmxInt8Emulated = {"amx_int8 emulated", Supported,  EnterRowWide,       MarkRow, QuantizeRow,
                               MultiplyAmx,         kChunkRows, sizeof(AmxScratch), 0,       Arrange,
                               kLeastRows};
#else
extern const Rung kAmxInt8;
const Rung kAmxInt8 = {"amx_int8",         Supported, EnterRowWide, MarkRow,   QuantizeRow, MultiplyAmx, kChunkRows,
                       sizeof(AmxScratch), 0,         Arrange,      kLeastRows};
#endif

}  // namespace jaxint8::cpu
