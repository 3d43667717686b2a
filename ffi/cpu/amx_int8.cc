// The AMX rung (Sapphire Rapids and later): products in tile registers, 16 x 16 sums of 64 products at once.
//
// A tile product takes 16 rows of 64 bytes by 64 rows of 16, four of them interleaved. Rows of weights are the first as
// they lie, and so need no packing; codes are rewritten to be the second, once for all weights (Arrange). Both are
// signed. Rows of sums are outputs then, and are transposed on their way to the epilogue. High parts are tiles as well.
//
// Of many rows with high parts too many tiles would hold one. There codes are the first as they lie, and weights,
// packed as for AVX512-VNNI and unsigned, the second: tdpbsud, and the same correction. Products of few rows are those
// of the AVX512-VNNI rung.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "attend_avx512.h"
#include "int8.h"
#include "processor.h"
#include "prologue_avx512.h"
#include "tiles_avx512.h"
#if defined(JAXINT8_EMULATED_TILES)
#include "emulated_tiles.h"
#endif

namespace jaxint8::cpu {

extern const Rung kAvx512VnniStrips, kAvx512Vnni;

namespace {

constexpr int64_t kTile = 16, kTileBytes = 1024, kTileSums = 256;
constexpr int64_t kTilesN = kBlockN / kTile;
// Below so many rows weights are read as fast without tiles, which would be mostly empty.
constexpr int64_t kFewRows = 8;
// Up to so many rows with high parts codes are arranged.
constexpr int64_t kMostHighRows = kSmallM;
// Columns multiplied in one go, which keep weights and codes in the L2 cache; fewer where weights are copied.
constexpr int64_t kPieceK = 4096, kCopiedK = 1024;

struct AmxScratch {
  TileScratch packed;  // first: also of the AVX512-VNNI rung
  alignas(64) int8_t copy[kBlockN * (kCopiedK + 64)];
  // Of every 16 rows of codes, four tiles: [16 outputs][16 rows].
  alignas(64) int32_t sums[kChunkM * kBlockN];
  union {
    alignas(64) int32_t high[kTile * kBlockN];
    alignas(64) uint8_t groups[HiPlan::kMaxArranged * kBlockN * 4];
  };
};

// The tile intrinsics of GCC 12 do not say that they read memory.
inline void MemoryIsRead() { asm volatile("" ::: "memory"); }

// What ldtilecfg reads. Where weights are packed tiles 0 to 3 hold sums, 4 and 5 codes, 6 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // For `rows_of_codes` of 1 to 32.
  explicit TileConfig(int64_t rows_of_codes) {
    const auto upper = static_cast<uint8_t>(rows_of_codes < kTile ? rows_of_codes : kTile);
    const auto lower = static_cast<uint8_t>(rows_of_codes - upper);
    const uint8_t heights[8] = {upper, upper, lower, lower, upper, lower, kTile, kTile};
    for (int tile = 0; tile < 8; ++tile) {
      rows[tile] = heights[tile];
      row_bytes[tile] = heights[tile] ? 64 : 0;
    }
  }
};

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

// Moves the groups of four columns of a plan into [group][kBlockN][4] unsigned weights, 16 outputs after 16: groups are
// ascending, so that some find their lines in the L1 cache.
void GatherGroups(const Block& b, uint8_t* groups) {
  const HiPlan& plan = *b.plan;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i rows = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(b.k)));
  int64_t whole = plan.groups;  // the last group may be cut off by the end of the row
  if (plan.group[whole - 1] * 4 + 4 > b.k) --whole;
  for (int64_t j = 0; j < b.n; j += kTile) {
    const __mmask16 exist = FirstWords(b.n - j);
    const int8_t* w = b.w + j * b.k;
    for (int64_t g = 0; g < whole; ++g) {
      const __m512i four = _mm512_mask_i32gather_epi32(flip, exist, rows, w + int64_t{plan.group[g]} * 4, 1);
      _mm512_store_si512(groups + (g * kBlockN + j) * 4, _mm512_xor_si512(four, flip));
    }
    for (int64_t i = j; whole < plan.groups && i < j + kTile && i < b.n; ++i) {
      const int64_t column = int64_t{plan.group[whole]} * 4;
      uint32_t four = 0;
      std::memcpy(&four, b.w + i * b.k + column, static_cast<size_t>(b.k - column));
      four ^= 0x80808080;
      std::memcpy(groups + (whole * kBlockN + i) * 4, &four, sizeof four);
    }
  }
}

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
  Unroll<4>([&](auto z) ALWAYS_INLINE {
    __m512i rows[4];
    FourWords([&](auto q, auto r) ALWAYS_INLINE -> const void* { return tiles + z * kTileSums + (4 * q + r) * kTile; },
              rows);
    Unroll<4>([&](auto r) ALWAYS_INLINE { acc[r][z] = rows[r]; });
  });
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

// Two tiles of weights by two of codes: c (+)= their sums.
void Square(const int8_t* w, int64_t stride, const int8_t* x, int64_t x_tile, int64_t steps, int32_t* c, bool adds) {
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
    _tile_loadd(6, x, 64);
    _tile_loadd(4, w, stride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, x + x_tile, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, w + kTile * stride, stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, other, 64);
  _tile_stored(2, c + kTileSums, 64);
  _tile_stored(3, other + kTileSums, 64);
}

// Four tiles of weights by one of codes, or of high parts, which are of the 64 columns step_of(t).
template <typename F>
void Column(const int8_t* w, int64_t stride, const int8_t* x, int64_t steps, const F& step_of, int32_t* c, bool adds) {
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
    _tile_loadd(6, x, 64);
    _tile_loadd(4, at, stride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, at + kTile * stride, stride);
    _tile_dpbssd(1, 5, 6);
    _tile_loadd(4, at + 2 * kTile * stride, stride);
    _tile_dpbssd(2, 4, 6);
    _tile_loadd(5, at + 3 * kTile * stride, stride);
    _tile_dpbssd(3, 5, 6);
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
  Column(w, stride, high.data + (first - high.step) * kTileBytes, last - first, step_of, sums, false);
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
  TileConfig whole(2 * kTile);
  asm volatile("" : : "r"(&whole) : "memory");
  _tile_loadconfig(&whole);
  const bool copies = b.n < kBlockN || b.k % 64 != 0;
  const int64_t width = PieceOf(b.k, copies ? kCopiedK : kPieceK);
  const int64_t tiles = (b.m + kTile - 1) / kTile, x_tile = kTile * b.stride;
  const auto sums_of = [&](int64_t tile) { return scratch->sums + tile * kTilesN * kTileSums; };
  const uint8_t* groups = nullptr;
  const int32_t* slot = b.plan ? b.plan->slot : nullptr;
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
      if (last && b.plan && b.plan->groups > 0 && !groups) {
        GatherGroups(b, scratch->groups);
        groups = scratch->groups;
      }
      for (int64_t i = begin; last && i < end && i < b.m; i += 4) slot = FinishFour(b, scratch->sums, i, groups, slot);
    };
    const int8_t* const x = b.lo + k * kTile;
    for (int64_t z = 0; z < kTilesN; z += 2) {
      for (int64_t i = 0; i + 1 < tiles; i += 2) {
        Square(w + z * kTile * stride, stride, x + i * x_tile, x_tile, steps, sums_of(i) + z * kTileSums, adds);
        if (z + 2 == kTilesN) finish(i * kTile, (i + 2) * kTile);
      }
    }
    if (tiles % 2 != 0) {
      const auto step_of = [](int64_t t) { return t; };
      Column(w, stride, x + (tiles - 1) * x_tile, steps, step_of, sums_of(tiles - 1), adds);
      finish((tiles - 1) * kTile, b.m);
    }
  }
  _tile_release();
}

// c[rows][32] += codes[rows] . two tiles of weights, of `blocks` times 64 columns; one row of tiles, or one column of
// them, if the block is not higher or wider.
template <bool kTwoRows, bool kTwoColumns>
void Tiles(const int8_t* x, int64_t stride, const uint8_t* w, int64_t w_stride, int64_t blocks, int32_t* c) {
  constexpr int64_t kStride = kBlockN * sizeof(int32_t);
  int32_t* lower = c + kTile * kBlockN;
  MemoryIsRead();
  _tile_loadd(0, c, kStride);
  if constexpr (kTwoColumns) _tile_loadd(1, c + 16, kStride);
  if constexpr (kTwoRows) _tile_loadd(2, lower, kStride);
  if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, lower + 16, kStride);
  for (int64_t block = 0; block < blocks; ++block, x += 64, w += 16 * w_stride) {
    _tile_loadd(4, x, stride);
    _tile_loadd(6, w, w_stride);
    _tile_dpbsud(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, w + 64, w_stride);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, x + kTile * stride, stride);
      _tile_dpbsud(2, 5, 6);
      if constexpr (kTwoColumns) _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, c, kStride);
  if constexpr (kTwoColumns) _tile_stored(1, c + 16, kStride);
  if constexpr (kTwoRows) _tile_stored(2, lower, kStride);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, lower + 16, kStride);
}

// The first value of the sums of one row: in the first panel the correction; then its high parts that lie in the panel.
template <int Z>
void Begin(const Row& row, const Panel& panel, int32_t* next_hi, int32_t* c) {
  __m512i acc[Z];
  const __m512i correction = _mm512_set1_epi32(Correction(row));
  Unroll<Z>([&](auto z) ALWAYS_INLINE { acc[z] = panel.begin == 0 ? correction : _mm512_load_si512(c + z * 16); });
  if (next_hi) AddHi<Z>(row, panel, next_hi, acc);
  Unroll<Z>([&](auto z) ALWAYS_INLINE { _mm512_store_si512(c + z * 16, acc[z]); });
}
constexpr void (*kBegin[4])(const Row&, const Panel&, int32_t*, int32_t*) = {Begin<1>, Begin<2>, Begin<3>, Begin<4>};

// Configures the tiles for this many rows of codes, unless they are.
void Configure(int64_t rows, int64_t* configured) {
  if (*configured == rows) return;
  const TileConfig config(rows);
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  *configured = rows;
}

void MultiplyTiles(const Block& b) {
  auto* scratch = reinterpret_cast<TileScratch*>(b.scratch);
  scratch->job = 0;  // nothing is packed ahead here
  const int registers = static_cast<int>((b.n + 15) / 16);
  const int64_t w_stride = registers * 64;
  if (b.with_hi) std::memset(scratch->next_hi, 0, static_cast<size_t>(b.m) * sizeof *scratch->next_hi);
  const int64_t panels = (b.k + kPanelK - 1) / kPanelK;
  const int64_t width = ((b.k + panels - 1) / panels + 63) / 64 * 64;
  int64_t configured = 0;
  for (int64_t t = 0; t < b.k; t += width) {
    const int64_t end = t + width < b.k ? t + width : b.k, blocks = (end - t + 63) / 64;
    const Panel panel{scratch->panels[0], t, end};
    Pack(b.w + t, b.k, b.n, end - t, registers, scratch->panels[0]);
    for (int64_t first = 0; first < b.m; first += 2 * kTile) {
      const int64_t rows = b.m - first < 2 * kTile ? b.m - first : 2 * kTile;
      int32_t* c = b.c + first * kBlockN;
      for (int64_t i = 0; i < rows; ++i) {
        int32_t* next_hi = b.with_hi ? scratch->next_hi + first + i : nullptr;
        kBegin[registers - 1](b.rows[first + i], panel, next_hi, c + i * kBlockN);
      }
      Configure(rows, &configured);
      const int8_t* x = b.lo + first * b.stride + t;
      for (int z = 0; z < registers; z += 2) {
        const bool two_rows = rows > kTile, two_columns = z + 1 < registers;
        const auto tiles = two_rows ? (two_columns ? Tiles<true, true> : Tiles<true, false>)
                                    : (two_columns ? Tiles<false, true> : Tiles<false, false>);
        tiles(x, b.stride, panel.data + z * 64, w_stride, blocks, c + z * 16);
      }
      if (b.epilogue && end == b.k) Finish(*b.epilogue, first, first + rows);
    }
  }
  _tile_release();
}

void MultiplyAmx(const Block& b) {
  if (b.arranged) return MultiplyArranged(b);
  if (b.m < kFewRows || b.k == 0) return kAvx512VnniStrips.block(b);
  MultiplyTiles(b);
}

#if defined(JAXINT8_EMULATED_TILES)
bool Supported() { return kAvx512Vnni.supported(); }
#else
bool Supported() { return HasAmxInt8() && kAvx512Vnni.supported(); }
#endif

// The same for the rung and for what stands in for it in tests.
constexpr Rung RungOf(const char* name) {
  return {name,         Supported, EnterRowWide,       MarkRow, QuantizeRow, MultiplyAmx,
          &kAttendWide, kChunkM,   sizeof(AmxScratch), 0,       Arrange,     kFewRows,
          kMostHighRows};
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
