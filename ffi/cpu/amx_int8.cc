// The AMX rung (Sapphire Rapids and later): products in tile registers, 16 x 16 sums of 64 products at once.
//
// A tile product takes 16 rows of 64 bytes by 64 rows of 16, four of them interleaved. Rows of weights are the first as
// they lie, and so need no packing; codes are rewritten to be the second, once for all weights (Arrange). Both are
// signed. Rows of sums are outputs then, and are transposed on their way to the epilogue.
//
// A tile of high parts is as dear as one of low ones, however few it holds. So they are multiplied by AVX512-VNNI
// instead, word by word, by weights of their columns that are gathered once for all rows of a block; tiles are for rows
// with many. Products of few rows are those of the AVX512-VNNI rung.
#include <immintrin.h>

#include <algorithm>

#include "attend_avx512.h"
#include "int8.h"
#include "processor.h"
#include "prologue_avx512.h"
#include "streams_avx512.h"
#include "tiles_avx512.h"
#if defined(JAXINT8_EMULATED_TILES)
#include "emulated_tiles.h"
#endif

namespace jaxint8::cpu {

extern const Rung kAvx512VnniStrips, kAvx512Vnni;

namespace {

constexpr int64_t kTile = 16, kTileBytes = 1024, kTileSums = 256;
constexpr int64_t kTilesN = kBlockN / kTile;
// Of codes that stay in the second-level cache: half of it.
constexpr int64_t kArrangedBytes = 1 << 20;
// Up to so many columns a tile of weights at a time is read fastest from any cache, more only from memory.
constexpr int64_t kSingleK = 2048;
// In rows of up to so many columns a last odd tile of codes is multiplied on its own, in longer ones with two others.
constexpr int64_t kAloneK = 1024;
// Columns multiplied in one go, which keep weights and codes in the L2 cache; fewer where weights are copied.
constexpr int64_t kPieceK = 4096, kCopiedK = 1024;

struct AmxScratch {
  TileScratch packed;  // first: also of the AVX512-VNNI rung
  alignas(64) int8_t copy[kBlockN * (kCopiedK + 64)];
  // Of every 16 rows of codes, four tiles: [16 outputs][16 rows].
  alignas(64) int32_t sums[kChunkM * kBlockN];
  union {
    alignas(64) int32_t high[kTile * kBlockN];
    alignas(64) uint8_t groups[(HiPlan::kMaxArranged + 1) * kBlockN * 4];
  };
};

// The tile intrinsics of GCC 12 do not say that they read memory.
inline void MemoryIsRead() { asm volatile("" ::: "memory"); }

// Eight tiles of 16 rows of 64 bytes.
void ConfigureTiles() {
  struct alignas(64) {  // what ldtilecfg reads
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  std::fill_n(config.row_bytes, 8, uint16_t{64});
  std::fill_n(config.rows, 8, uint8_t{kTile});
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// Four words of 16 rows as four registers, of one word of each row: at(q, r) is where they are in row 4 * q + r.
// Quarters of registers are put together while they are loaded, which leaves half of the shuffles of a transposition.
template <typename F>
ALWAYS_INLINE inline void FourWords(const F& at, __m512i (&out)[4]) {
  __m512i rows[4];
  Unroll<4>([&](auto r) ALWAYS_INLINE {
    const auto quarter = [&](auto q) ALWAYS_INLINE { return _mm_loadu_si128(static_cast<const __m128i*>(at(q, r))); };
    rows[r] = _mm512_broadcast_i32x4(quarter(std::integral_constant<int, 3>{}));
    rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x0f00, quarter(std::integral_constant<int, 2>{}));
    rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x00f0, quarter(std::integral_constant<int, 1>{}));
    rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x000f, quarter(std::integral_constant<int, 0>{}));
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

// Moves the groups of four columns of a plan into [group][kBlockN][4] unsigned weights, step by step of 64 columns of a
// product: right behind the load of each tile, which brings its lines. Where rows are multiples of 4096 bytes apart all
// of them fall into one set of the first-level cache, which the next tile would take.
struct GroupsAlong {
  const uint16_t* needed = nullptr;  // of every 64 columns, which groups are listed
  uint8_t* to = nullptr;             // where the next one goes
  __m512i rows = {};                 // where 16 rows of weights lie

  int64_t z = 0;  // the first tile of weights

  // Of a tile, 16 rows of weights.
  ALWAYS_INLINE void Move(const int8_t* w, int64_t stride, int64_t step, int64_t tile) const {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    uint8_t* out = to + (z + tile) * 64;
    for (uint32_t left = needed[step]; left != 0;) {
      const int64_t four = __builtin_ctz(left) / 4;
      const uint32_t listed = left >> four * 4 & 15;
      left &= ~(uint32_t{15} << four * 4);
      if ((listed & (listed - 1)) == 0) {
        const __m512i words = _mm512_i32gather_epi32(rows, w + four * 16 + __builtin_ctz(listed) * 4, 1);
        _mm512_store_si512(out, _mm512_xor_si512(words, flip));
        out += kBlockN * 4;
        continue;
      }
      // Several neighbours are moved together, which takes little more than gathering one.
      const int8_t* const at = w + four * 16;
      const int8_t* const from[4] = {at, at + 4 * stride, at + 8 * stride, at + 12 * stride};
      __m512i words[4];
      FourWords([&](auto q, auto r) ALWAYS_INLINE -> const void* { return from[q] + r * stride; }, words);
      Unroll<4>([&](auto i) ALWAYS_INLINE {  // what is not listed is written over
        _mm512_store_si512(out, _mm512_xor_si512(words[i], flip));
        out += (listed >> i & 1) * kBlockN * 4;
      });
    }
  }
  void Advance(int64_t step) { to += __builtin_popcount(needed[step]) * kBlockN * 4; }
};

// sums += (hi . W) << 7 of one row, from the weights of groups; `slot` is that of its first word. What weights that are
// unsigned add is taken off again, by the same products with 128.
ALWAYS_INLINE inline void AddGroups(const Row& row, const uint8_t* groups, const int32_t* slot, __m512i (&sums)[4]) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i high[4], added = _mm512_setzero_si512();
  Unroll<4>([&](auto z) ALWAYS_INLINE { high[z] = _mm512_setzero_si512(); });
  for (int32_t word = 0; word < row.words; ++word) {
    const __m512i four = _mm512_set1_epi32(static_cast<int32_t>(row.hi[word].four));
    const uint8_t* w = groups + int64_t{slot[word]} * kBlockN * 4;
    Unroll<4>([&](auto z) ALWAYS_INLINE { MulAddInPlace(high[z], _mm512_load_si512(w + z * 64), four); });
    MulAddInPlace(added, offset, four);
  }
  Unroll<4>([&](auto z) ALWAYS_INLINE {
    sums[z] = _mm512_add_epi32(sums[z], _mm512_slli_epi32(_mm512_sub_epi32(high[z], added), 7));
  });
}

// Rows [i, i + 4) of a block, or those that exist, from sums to outputs, or to c if there is no epilogue. High parts
// are added from the weights of groups, unless those are null; returns the slot of the next row's first word.
const int32_t* FinishFour(const Block& b, const int32_t* sums, int64_t i, const uint8_t* groups, const int32_t* slot) {
  const int32_t* tiles = sums + i / kTile * kTilesN * kTileSums + i % kTile;
  __m512i acc[4][4];
  const auto four = [&](auto z, int64_t first, __m512i(&rows)[4]) ALWAYS_INLINE {
    const int32_t* const tile = tiles + z * kTileSums + first;
    FourWords([&](auto q, auto r) ALWAYS_INLINE -> const void* { return tile + (4 * q + r) * kTile; }, rows);
  };
  Unroll<4>([&](auto z) ALWAYS_INLINE {
    __m512i rows[4];
    four(z, 0, rows);
    Unroll<4>([&](auto r) ALWAYS_INLINE { acc[r][z] = rows[r]; });
  });
  if (b.beside) {
    Unroll<4>([&](auto z) ALWAYS_INLINE {
      __m512i high[4];
      four(z, kTile / 2, high);
      Unroll<4>([&](auto r) ALWAYS_INLINE { acc[r][z] = _mm512_add_epi32(acc[r][z], _mm512_slli_epi32(high[r], 7)); });
    });
  }
  const int64_t end = i + 4 < b.m ? i + 4 : b.m;
  if (groups) {
    Unroll<4>([&](auto r) ALWAYS_INLINE {
      if (i + r >= end || b.rows[i + r].words == 0) return;
      AddGroups(b.rows[i + r], groups, slot, acc[r]);
      slot += b.rows[i + r].words;
    });
  }
  if (b.epilogue && FinishesSums(*b.epilogue) && i + 4 <= b.m) {
    FinishSums<4>(*b.epilogue, i, acc);
    return slot;
  }
  Unroll<4>([&](auto r) ALWAYS_INLINE {
    if (i + r >= end) return;
    int32_t* c = b.c + (i + r) * kBlockN;
    Unroll<4>([&](auto z) ALWAYS_INLINE { _mm512_store_si512(c + z * 16, acc[r][z]); });
  });
  if (b.epilogue) Finish(*b.epilogue, i, end);
  return slot;
}

// The weights of the next block, as they lie: every step of a product fetches some lines of them into the L2 cache.
struct BlockAhead {
  const int8_t *at = nullptr, *end = nullptr;
  int64_t lines = 0;

  ALWAYS_INLINE void Fetch() {
    const int8_t* const stop = at + lines * 64;
    if (stop > end) return;
    for (; at != stop; at += 64) _mm_prefetch(at, _MM_HINT_T1);
  }
};

// Two tiles of weights by two of codes: c (+)= their sums. With `groups` those in these columns, of which the first 64
// are step `first` of all, are moved.
template <bool kGroups>
void Square(const int8_t* w, int64_t stride, const int8_t* x, int64_t x_tile, int64_t steps, int32_t* c, bool adds,
            BlockAhead* ahead, int64_t first, GroupsAlong* groups) {
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
  for (int64_t t = 0; t < steps; ++t, w += 64, x += kTileBytes) {
    ahead->Fetch();
    _tile_loadd(6, x, 64);
    _tile_loadd(4, w, stride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, x + x_tile, 64);
    _tile_dpbssd(1, 4, 7);
    if constexpr (kGroups) groups->Move(w, stride, first + t, 0);
    _tile_loadd(5, w + kTile * stride, stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    if constexpr (kGroups) groups->Move(w + kTile * stride, stride, first + t, 1);
    if constexpr (kGroups) groups->Advance(first + t);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, other, 64);
  _tile_stored(2, c + kTileSums, 64);
  _tile_stored(3, other + kTileSums, 64);
}

// The same of two tiles of weights by three of codes, for which two registers are left: where rows are long, the third
// costs less so than on its own, which reads all weights again.
template <bool kGroups>
void TwoByThree(const int8_t* w, int64_t stride, const int8_t* x, int64_t x_tile, int64_t steps, int32_t* c, bool adds,
                BlockAhead* ahead, int64_t first, GroupsAlong* groups) {
  int32_t *const second = c + kTilesN * kTileSums, *const third = second + kTilesN * kTileSums;
  MemoryIsRead();
  if (adds) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, second, 64);
    _tile_loadd(2, third, 64);
    _tile_loadd(3, c + kTileSums, 64);
    _tile_loadd(4, second + kTileSums, 64);
    _tile_loadd(5, third + kTileSums, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  }
  for (int64_t t = 0; t < steps; ++t, w += 64, x += kTileBytes) {
    ahead->Fetch();
    _tile_loadd(6, w, stride);
    _tile_loadd(7, x, 64);
    _tile_dpbssd(0, 6, 7);
    _tile_loadd(7, x + x_tile, 64);
    _tile_dpbssd(1, 6, 7);
    _tile_loadd(7, x + 2 * x_tile, 64);
    _tile_dpbssd(2, 6, 7);
    if constexpr (kGroups) groups->Move(w, stride, first + t, 0);
    _tile_loadd(6, w + kTile * stride, stride);
    _tile_dpbssd(5, 6, 7);
    _tile_loadd(7, x + x_tile, 64);
    _tile_dpbssd(4, 6, 7);
    _tile_loadd(7, x, 64);
    _tile_dpbssd(3, 6, 7);
    if constexpr (kGroups) groups->Move(w + kTile * stride, stride, first + t, 1);
    if constexpr (kGroups) groups->Advance(first + t);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, second, 64);
  _tile_stored(2, third, 64);
  _tile_stored(3, c + kTileSums, 64);
  _tile_stored(4, second + kTileSums, 64);
  _tile_stored(5, third + kTileSums, 64);
}

// One tile of weights by one of codes. Where no other rows share weights this reads them fastest, line by line of 16
// rows. From memory `ahead`, what comes next, is asked for: half of it, which has the processor ask for the rest.
template <bool kGroups>
void Single(const int8_t* w, int64_t stride, const int8_t* x, int64_t steps, int32_t* c, bool adds, const int8_t* ahead,
            int64_t first, GroupsAlong* groups) {
  MemoryIsRead();
  if (adds) {
    _tile_loadd(0, c, 64);
  } else {
    _tile_zero(0);
  }
  for (int64_t t = 0; t < steps; ++t, w += 64, x += kTileBytes) {
    if (ahead) {
      Unroll<8>([&](auto line) ALWAYS_INLINE { _mm_prefetch(ahead + line * 64, _MM_HINT_T1); });
      ahead += kTileBytes;
    }
    _tile_loadd(6, x, 64);
    _tile_loadd(4, w, stride);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kGroups) groups->Move(w, stride, first + t, 0);
    if constexpr (kGroups) groups->Advance(first + t);
  }
  _tile_stored(0, c, 64);
}

// Four tiles of weights by one of codes, or of high parts, which are of the 64 columns step_of(t). With `groups` as
// above.
template <bool kGroups, typename F>
void Column(const int8_t* w, int64_t stride, const int8_t* x, int64_t steps, const F& step_of, int32_t* c, bool adds,
            BlockAhead* ahead, int64_t first, GroupsAlong* groups) {
  MemoryIsRead();
  if (adds) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + kTileSums, 64);
    _tile_loadd(2, c + 2 * kTileSums, 64);
    _tile_loadd(3, c + 3 * kTileSums, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t t = 0; t < steps; ++t, x += kTileBytes) {
    const int8_t* at = w + step_of(t) * 64;
    ahead->Fetch();
    _tile_loadd(6, x, 64);
    const auto move = [&](int64_t z) {
      if constexpr (kGroups) groups->Move(at + z * kTile * stride, stride, first + t, z);
    };
    _tile_loadd(4, at, stride);
    _tile_dpbssd(0, 4, 6);
    move(0);
    _tile_loadd(5, at + kTile * stride, stride);
    _tile_dpbssd(1, 5, 6);
    move(1);
    _tile_loadd(4, at + 2 * kTile * stride, stride);
    _tile_dpbssd(2, 4, 6);
    move(2);
    _tile_loadd(5, at + 3 * kTile * stride, stride);
    _tile_dpbssd(3, 5, 6);
    move(3);
    if constexpr (kGroups) groups->Advance(first + t);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTileSums, 64);
  _tile_stored(2, c + 2 * kTileSums, 64);
  _tile_stored(3, c + 3 * kTileSums, 64);
}

// c += (hi . W) << 7 for 16 rows of codes, of those 64 columns from step `begin` to `end` that hold any high part.
void AddHighTiles(const int8_t* w, int64_t stride, const HighTiles& high, int64_t begin, int64_t end, int32_t* sums,
                  int32_t* c) {
  const int32_t *const first = std::lower_bound(high.step, high.step + high.count, begin),
                       *const last = std::lower_bound(first, high.step + high.count, end);
  if (first == last) return;
  const auto step_of = [&](int64_t t) { return first[t] - begin; };
  BlockAhead none;
  Column<false>(w, stride, high.data + (first - high.step) * kTileBytes, last - first, step_of, sums, false, &none, 0,
                nullptr);
  for (int64_t j = 0; j < kTile * kBlockN; j += 16) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_load_si512(sums + j), 7);
    _mm512_store_si512(c + j, _mm512_add_epi32(_mm512_load_si512(c + j), shifted));
  }
}

// Weights in rows `stride` bytes apart, 64 of them and whole steps of 64 columns, filled with zeros.
void CopyPart(const int8_t* w, int64_t k, int64_t n, int64_t columns, int64_t stride, int8_t* copy) {
  for (int64_t j = 0; j < kBlockN; ++j) {
    for (int64_t t = 0; t < columns; t += 64) {
      const __mmask64 mask = j < n ? FirstBytes(columns - t) : 0;
      _mm512_store_si512(copy + j * stride + t, _mm512_maskz_loadu_epi8(mask, mask ? w + j * k + t : w));
    }
  }
}

void MultiplyArranged(const Block& b) {
  auto* const scratch = reinterpret_cast<AmxScratch*>(b.scratch);
  const bool copies = b.n < kBlockN || b.k % 64 != 0;
  const int64_t width = PieceOf(b.k, copies ? kCopiedK : kPieceK);
  const int64_t tiles = (b.m + kTile - 1) / kTile, x_tile = kTile * b.stride;
  const auto sums_of = [&](int64_t tile) { return scratch->sums + tile * kTilesN * kTileSums; };
  const bool singly = b.k <= kSingleK || (tiles == 1 && b.from == From::kMemory);
  const bool in_threes = b.k > kAloneK;
  BlockAhead ahead;
  if (b.ahead) {  // with more lines at once, loads wait
    const int64_t lines = tiles == 1 ? 8 : std::min<int64_t>(4, (kTile * kTilesN + tiles - 1) / tiles);
    ahead = {b.ahead, b.ahead + b.ahead_n * b.k, lines};
  }
  const uint8_t* const groups = b.plan && b.plan->groups > 0 ? scratch->groups : nullptr;
  const int32_t* slot = groups ? b.plan->slot : nullptr;
  GroupsAlong along;  // of the first rows of codes
  if (groups) along = {b.plan->needed, scratch->groups};
  for (int64_t k = 0; k < b.k; k += width) {
    const int64_t columns = k + width < b.k ? width : b.k - k, steps = (columns + 63) / 64;
    const bool adds = k > 0, last = k + width >= b.k;
    const int8_t* w = b.w + k;
    int64_t stride = b.k;
    if (copies) {
      stride = kCopiedK + 64;
      CopyPart(b.w + k, b.k, b.n, columns, stride, scratch->copy);
      w = scratch->copy;
    }
    // Of rows whose low parts are multiplied: all weights have just been read, so high parts find them in a cache.
    const auto finish = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin / kTile; b.high && i * kTile < end; ++i) {
        AddHighTiles(w, stride, b.high[i], k / 64, k / 64 + steps, scratch->high, sums_of(i));
      }
      for (int64_t i = begin; last && i < end && i < b.m; i += 4) slot = FinishFour(b, scratch->sums, i, groups, slot);
    };
    along.rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                    _mm512_set1_epi32(static_cast<int32_t>(stride)));
    const GroupsAlong before = along;
    const int8_t* const x = b.lo + k * kTile;
    for (int64_t z = 0; z < kTilesN; z += 2) {
      for (int64_t i = 0, count = 0; i + 1 < tiles; i += count) {
        count = in_threes && tiles - i == 3 ? 3 : 2;
        if (i == 0) along = before, along.z = z;
        const bool moves = groups && i == 0;
        const auto multiply = count == 3 ? moves ? TwoByThree<true> : TwoByThree<false>
                              : moves    ? Square<true>
                                         : Square<false>;
        multiply(w + z * kTile * stride, stride, x + i * x_tile, x_tile, steps, sums_of(i) + z * kTileSums, adds,
                 &ahead, k / 64, &along);
        if (z + 2 == kTilesN) finish(i * kTile, (i + count) * kTile);
      }
    }
    if (tiles % 2 != 0 && !(in_threes && tiles > 1)) {
      const bool gathers = groups && tiles == 1;
      const int8_t* const codes = x + (tiles - 1) * x_tile;
      int32_t* const c = sums_of(tiles - 1);
      for (int64_t z = 0; singly && z < kTilesN; ++z) {
        if (gathers) along = before, along.z = z;
        const int8_t* const next = b.from == From::kMemory && tiles == 1 ? b.w + (z + 1) * kTile * b.k + k : nullptr;
        (gathers ? Single<true> : Single<false>)(w + z * kTile * stride, stride, codes, steps, c + z * kTileSums, adds,
                                                 next, k / 64, &along);
      }
      if (!singly) {
        const auto step_of = [](int64_t t) { return t; };
        const auto column = gathers ? Column<true, decltype(step_of)> : Column<false, decltype(step_of)>;
        column(w, stride, codes, steps, step_of, c, adds, &ahead, k / 64, &along);
      }
      finish((tiles - 1) * kTile, b.m);
    }
  }
}

void ReleaseTiles() { _tile_release(); }

// Tiles of fewer rows are mostly empty. Beside them stand quads, whose sums over lanes take more of a short row; pairs;
// and single rows as a stream.
bool Arranges(int64_t m, int64_t k, From from) {
  const bool short_row = k <= 1024;
  switch (from) {
    case From::kOwnCache:
      return m >= (short_row ? 3 : 5);
    case From::kCache:
      return m >= (short_row ? 4 : 6);
    case From::kMemory:
      return m >= (k > kSingleK ? 1 : 2);
  }
  return false;
}

void MultiplyAmx(const Block& b) {
  if (b.arranged) return MultiplyArranged(b);
  if (b.from == From::kOwnCache && b.m <= kQuadsM && b.k > 0) return MultiplyQuads(b);
  kAvx512VnniStrips.block(b);
}

#if defined(JAXINT8_EMULATED_TILES)
bool Supported() { return kAvx512Vnni.supported(); }
#else
bool Supported() { return HasAmxInt8() && kAvx512Vnni.supported(); }
#endif

// The same for the rung and for what stands in for it in tests.
constexpr Rung RungOf(const char* name) {
  return {name,           Supported,      EnterRowWide,       MarkRow, QuantizeRow, MultiplyAmx,
          &kAttendWide,   kChunkM,        sizeof(AmxScratch), 0,       Arranges,    Arrange,
          kArrangedBytes, ConfigureTiles, ReleaseTiles};
}

}  // namespace

#if defined(JAXINT8_EMULATED_TILES)
extern const Rung kAmxInt8Emulated;
const Rung kAmxInt8Emulated = RungOf("amx_int8 emulated");
#else
extern const Rung kAmxInt8;
const Rung kAmxInt8 = RungOf("amx_int8");
#endif

}  // namespace jaxint8::cpu
