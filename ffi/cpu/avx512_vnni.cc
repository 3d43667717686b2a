// The AVX512-VNNI rung (Ice Lake, Zen 4 and later; also Cascade Lake).
//
// vpdpbusd multiplies unsigned by signed bytes. Here the weight is the unsigned operand, w + 128 (one xor), and the
// activation code the signed one, so the correction, 128 * sum(codes of the row), is known from the quantiser and the
// weights need no sums, no copy and no format. All sums are modulo 2^32 and the final value fits, so they are exact.
#include <immintrin.h>

#include "int8.h"
#include "rows.h"

namespace jaxint8::cpu {
namespace {

bool Supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

// Columns of one packed panel: 384 * 64 outputs = 24 KiB, which leaves the L1 cache (32 KiB and more) room for the
// activations of a tile.
constexpr int64_t kPanelK = 384;
constexpr int kTileM = 6;  // 6 x 4 accumulators + 4 weights + 1 broadcast = 29 of 32 registers

inline __mmask64 FirstBytes(int64_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

// Writes 64 bytes of each of 16 weight rows as 16 registers of [16 outputs][4 columns].
inline void PackSquare(const int8_t* w, int64_t stride, int64_t rows, int64_t bytes, uint8_t* panel,
                       int64_t panel_stride) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const __mmask64 mask = FirstBytes(bytes);
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) {
    a[i] = i < rows ? _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w + i * stride), flip) : flip;
  }
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 * r + q]: lane l holds columns 4 * (4 * l + q).. of rows 4 * r..4 * r + 3.
  for (int q = 0; q < 4; ++q) {
    b[q] = _mm512_shuffle_i32x4(a[q], a[4 + q], 0x88);
    b[4 + q] = _mm512_shuffle_i32x4(a[q], a[4 + q], 0xdd);
    b[8 + q] = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0x88);
    b[12 + q] = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0xdd);
  }
  for (int q = 0; q < 4; ++q) {
    _mm512_store_si512(panel + q * panel_stride, _mm512_shuffle_i32x4(b[q], b[8 + q], 0x88));
    _mm512_store_si512(panel + (8 + q) * panel_stride, _mm512_shuffle_i32x4(b[q], b[8 + q], 0xdd));
    _mm512_store_si512(panel + (4 + q) * panel_stride, _mm512_shuffle_i32x4(b[4 + q], b[12 + q], 0x88));
    _mm512_store_si512(panel + (12 + q) * panel_stride, _mm512_shuffle_i32x4(b[4 + q], b[12 + q], 0xdd));
  }
}

// [n][columns] -> [columns / 4][16 * registers][4], columns rounded up to a multiple of 64.
void Pack(const int8_t* w, int64_t stride, int64_t n, int64_t columns, int registers, uint8_t* panel) {
  for (int64_t t = 0; t < columns; t += 64) {
    for (int z = 0; z < registers; ++z) {
      PackSquare(w + z * 16 * stride + t, stride, n - z * 16, columns - t, panel + t / 4 * registers * 64 + z * 64,
                 registers * 64);
    }
  }
}

inline __m512i Broadcast(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

template <int M, int Z>
void Tile(const uint8_t* panel, const int8_t* x, int64_t stride, int64_t groups, int32_t* c) {
  __m512i acc[M][Z];
  for (int i = 0; i < M; ++i) {
    for (int z = 0; z < Z; ++z) acc[i][z] = _mm512_load_si512(c + i * kBlockN + z * 16);
  }
  for (int64_t g = 0; g < groups; ++g) {
    __m512i w[Z];
    for (int z = 0; z < Z; ++z) w[z] = _mm512_load_si512(panel + (g * Z + z) * 64);
    for (int i = 0; i < M; ++i) {
      const __m512i four = Broadcast(x + i * stride + g * 4);
      for (int z = 0; z < Z; ++z) acc[i][z] = _mm512_dpbusd_epi32(acc[i][z], w[z], four);
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int z = 0; z < Z; ++z) _mm512_store_si512(c + i * kBlockN + z * 16, acc[i][z]);
  }
}

using TileFunction = void (*)(const uint8_t*, const int8_t*, int64_t, int64_t, int32_t*);
constexpr TileFunction kTiles[4][kTileM] = {
    {Tile<1, 1>, Tile<2, 1>, Tile<3, 1>, Tile<4, 1>, Tile<5, 1>, Tile<6, 1>},
    {Tile<1, 2>, Tile<2, 2>, Tile<3, 2>, Tile<4, 2>, Tile<5, 2>, Tile<6, 2>},
    {Tile<1, 3>, Tile<2, 3>, Tile<3, 3>, Tile<4, 3>, Tile<5, 3>, Tile<6, 3>},
    {Tile<1, 4>, Tile<2, 4>, Tile<3, 4>, Tile<4, 4>, Tile<5, 4>, Tile<6, 4>},
};

// c += (hi . W) << 7 for the outliers of one row that lie in the panel, four columns at a time; returns the next one.
int32_t AddHi(const Row& row, int32_t next, int64_t begin, int64_t end, const uint8_t* panel, int registers,
              int32_t* c) {
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  while (next < row.count && row.outliers[next].column < end) {
    const int32_t group = row.outliers[next].column / 4;
    uint32_t four = 0;
    for (; next < row.count && row.outliers[next].column / 4 == group; ++next) {
      const Outlier& outlier = row.outliers[next];
      four |= static_cast<uint32_t>(outlier.hi & 0xff) << (outlier.column % 4 * 8);
    }
    const __m512i x = _mm512_set1_epi32(static_cast<int32_t>(four));
    const uint8_t* w = panel + (group - begin / 4) * registers * 64;
    for (int z = 0; z < registers; ++z) {
      sum[z] = _mm512_dpbusd_epi32(sum[z], _mm512_load_si512(w + z * 64), x);
    }
  }
  for (int z = 0; z < registers; ++z) {
    const __m512i old = _mm512_load_si512(c + z * 16);
    _mm512_store_si512(c + z * 16, _mm512_add_epi32(old, _mm512_slli_epi32(sum[z], 7)));
  }
  return next;
}

constexpr int64_t kChunkM = 512;

void MultiplyTiled(const Block& b) {
  const int registers = static_cast<int>((b.n + 15) / 16);
  uint8_t* panel = b.scratch;
  auto* next = reinterpret_cast<int32_t*>(b.scratch + kPanelK * kBlockN);
  for (int64_t i = 0; i < b.m; ++i) {
    next[i] = 0;
    const __m512i start = _mm512_set1_epi32(static_cast<int32_t>(0u - (static_cast<uint32_t>(b.rows[i].sum) << 7)));
    for (int z = 0; z < registers; ++z) _mm512_store_si512(b.c + i * kBlockN + z * 16, start);
  }
  const int64_t tiles = (b.m + kTileM - 1) / kTileM;
  const int64_t panels = (b.k + kPanelK - 1) / kPanelK;
  const int64_t width = panels ? ((b.k + panels - 1) / panels + 63) / 64 * 64 : 0;
  for (int64_t t = 0; t < b.k; t += width) {
    const int64_t end = t + width < b.k ? t + width : b.k;
    Pack(b.w + t, b.k, b.n, end - t, registers, panel);
    if (b.with_hi) {
      for (int64_t i = 0; i < b.m; ++i) {
        const Row& row = b.rows[i];
        if (next[i] < row.count && row.outliers[next[i]].column < end) {
          next[i] = AddHi(row, next[i], t, end, panel, registers, b.c + i * kBlockN);
        }
      }
    }
    int64_t i = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {  // heights differ by one at most, so that no tile is thin
      const int64_t rows = b.m / tiles + (tile < b.m % tiles);
      kTiles[registers - 1][rows - 1](panel, b.lo + i * b.stride + t, b.stride, (end - t + 3) / 4, b.c + i * kBlockN);
      i += rows;
    }
  }
}

}  // namespace

extern const Rung kAvx512Vnni;
const Rung kAvx512Vnni = {"avx512_vnni", Supported, MarkRow, QuantizeRow,
                          MultiplyTiled, Finish,    kChunkM, kPanelK * kBlockN + kChunkM * 4};

}  // namespace jaxint8::cpu
