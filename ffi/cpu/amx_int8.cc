// The AMX rung (Sapphire Rapids and later): large products in tile registers, 16 x 16 sums of 64 products at once.
//
// Rows of codes are tiles as they lie; weights are packed as for AVX512-VNNI, [columns / 4][outputs][4], which is
// what a tile of weights wants. They are the unsigned operand there, so tdpbsud (signed codes, unsigned weights) takes
// the same panels, and the same correction applies. Products of few rows are those of the AVX512-VNNI rung.
#include <immintrin.h>

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

constexpr int64_t kTileRows = 16;
// Below this many rows most of a tile would be empty.
constexpr int64_t kFewRows = 8;

// What ldtilecfg reads. Tiles 0 to 3 hold sums, 4 and 5 codes, 6 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // For `rows_of_codes` of 1 to 32.
  explicit TileConfig(int64_t rows_of_codes) {
    const auto upper = static_cast<uint8_t>(rows_of_codes < kTileRows ? rows_of_codes : kTileRows);
    const auto lower = static_cast<uint8_t>(rows_of_codes - upper);
    const uint8_t heights[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
    for (int tile = 0; tile < 8; ++tile) {
      rows[tile] = heights[tile];
      row_bytes[tile] = heights[tile] ? 64 : 0;
    }
  }
};

// The tile intrinsics of GCC 12 do not say that they read memory.
inline void MemoryIsRead() { asm volatile("" ::: "memory"); }

// c[rows][32] += codes[rows] . two tiles of weights, of `blocks` times 64 columns; one row of tiles, or one column of
// them, if the block is not higher or wider.
template <bool kTwoRows, bool kTwoColumns>
void Tiles(const int8_t* x, int64_t stride, const uint8_t* w, int64_t w_stride, int64_t blocks, int32_t* c) {
  constexpr int64_t kStride = kBlockN * sizeof(int32_t);
  int32_t* lower = c + kTileRows * kBlockN;
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
      _tile_loadd(5, x + kTileRows * stride, stride);
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
    for (int64_t first = 0; first < b.m; first += 2 * kTileRows) {
      const int64_t rows = b.m - first < 2 * kTileRows ? b.m - first : 2 * kTileRows;
      int32_t* c = b.c + first * kBlockN;
      for (int64_t i = 0; i < rows; ++i) {
        int32_t* next_hi = b.with_hi ? scratch->next_hi + first + i : nullptr;
        kBegin[registers - 1](b.rows[first + i], panel, next_hi, c + i * kBlockN);
      }
      Configure(rows, &configured);
      const int8_t* x = b.lo + first * b.stride + t;
      for (int z = 0; z < registers; z += 2) {
        const bool two_rows = rows > kTileRows, two_columns = z + 1 < registers;
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
  if (b.m < kFewRows || b.k == 0) return kAvx512Vnni.block(b);
  MultiplyTiles(b);
}

#if defined(JAXINT8_EMULATED_TILES)
bool Supported() { return kAvx512Vnni.supported(); }
#else
bool Supported() { return HasAmxInt8() && kAvx512Vnni.supported(); }
#endif

}  // namespace

#if defined(JAXINT8_EMULATED_TILES)
extern const Rung kAmxInt8Emulated;
const Rung kAmxInt8Emulated = {"amx_int8 emulated", Supported,   EnterRowWide, MarkRow,
                               QuantizeRow,         MultiplyAmx, kChunkM,      sizeof(TileScratch)};
#else
extern const Rung kAmxInt8;
const Rung kAmxInt8 = {"amx_int8",  Supported,   EnterRowWide, MarkRow,
                       QuantizeRow, MultiplyAmx, kChunkM,      sizeof(TileScratch)};
#endif

}  // namespace jaxint8::cpu
