// Large products with AVX512-VNNI: weights packed into panels on the fly, 6 rows by 64 outputs per tile.
//
// The surprising fact is where the packing of the next panel takes place: inside the multiplication of this one. That
// loop keeps one or two ports of the processor busy and leaves the rest idle, so shuffles, loads and stores of the
// packing are nearly free there, and weights need no format of their own although every call packs them anew.
#ifndef JAXINT8_FFI_CPU_TILES_AVX512_H_
#define JAXINT8_FFI_CPU_TILES_AVX512_H_

#include <immintrin.h>

#include "int8.h"
#include "rows_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

// Columns of one packed panel: 1024 * 64 outputs = 64 KiB, read from the L2 cache at 64 bytes per 6 multiplications
// (11 bytes per cycle with one multiplier, 21 with two), so that a tile of 6 rows is 6144 multiplications for the 48
// loads and stores of its accumulators. Two panels, one in use and one in the making.
constexpr int64_t kPanelK = 1024;
constexpr int64_t kPanelBytes = kPanelK * kBlockN;
constexpr int kTileM = 6;  // 6 x 4 accumulators + 4 weights + 1 broadcast = 29 of 32 registers
constexpr int64_t kChunkM = 512;

// What a thread keeps between blocks, at the start of its scratch memory.
struct alignas(64) TileScratch {
  // The panel that was packed ahead: for which job, from where, how wide, in which buffer.
  uint64_t job;
  const int8_t* w;
  int64_t columns;
  int buffer;
  alignas(64) uint8_t panels[2][kPanelBytes];
  alignas(64) uint8_t lines[kPanelBytes];  // see SplitGroups
  int32_t next_hi[kChunkM];                // per row: the first of its words that is not yet added
};

// Four rows of words as four registers of [lane][4 rows].
ALWAYS_INLINE inline void TransposeLanes(const __m512i (&row)[4], __m512i (&out)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi32(row[0], row[1]), high01 = _mm512_unpackhi_epi32(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(row[2], row[3]), high23 = _mm512_unpackhi_epi32(row[2], row[3]);
  out[0] = _mm512_unpacklo_epi64(low01, low23);
  out[1] = _mm512_unpackhi_epi64(low01, low23);
  out[2] = _mm512_unpacklo_epi64(high01, high23);
  out[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Writes 64 bytes of each of 16 weight rows as 16 registers of [16 outputs][4 columns]: a transposition of 16 x 16
// words of four bytes, 64 shuffles for 1 KiB. Rows and columns beyond the matrix become zero weights.
template <bool kWhole>
inline void PackSquare(const int8_t* w, int64_t stride, int64_t rows, int64_t bytes, uint8_t* panel,
                       int64_t panel_stride) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const __mmask64 mask = kWhole ? ~__mmask64{0} : FirstBytes(bytes);
  __m512i a[16], b[16];
  Unroll<16>([&](auto i) ALWAYS_INLINE {
    if constexpr (kWhole) {
      a[i] = _mm512_xor_si512(_mm512_loadu_si512(w + i * stride), flip);
    } else {
      a[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(i < rows ? mask : 0, w + (i < rows ? i * stride : 0)), flip);
    }
  });
  UnpackFours(a, b);
  // a[4 * r + q]: lane l holds columns 4 * (4 * l + q).. of rows 4 * r..4 * r + 3.
  Unroll<4>([&](auto q) ALWAYS_INLINE {
    const __m512i even01 = _mm512_shuffle_i32x4(a[q], a[4 + q], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(a[q], a[4 + q], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0xdd);
    _mm512_store_si512(panel + q * panel_stride, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_store_si512(panel + (4 + q) * panel_stride, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_store_si512(panel + (8 + q) * panel_stride, _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_store_si512(panel + (12 + q) * panel_stride, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  });
}

// [n][columns] -> [columns / 4][16 * registers][4], columns rounded up to a multiple of 64.
void Pack(const int8_t* w, int64_t stride, int64_t n, int64_t columns, int registers, uint8_t* panel) {
  // Sixteen rows at a time: 64 rows would touch 64 pages at every step, more than the first-level TLB holds.
  for (int z = 0; z < registers; ++z) {
    for (int64_t t = 0; t < columns; t += 64) {
      const int64_t rows = n - z * 16, bytes = columns - t;
      uint8_t* out = panel + t / 4 * registers * 64 + z * 64;
      const int8_t* in = w + z * 16 * stride + t;
      if (rows >= 16 && bytes >= 64) {
        PackSquare<true>(in, stride, rows, bytes, out, registers * 64);
      } else {
        PackSquare<false>(in, stride, rows, bytes, out, registers * 64);
      }
    }
  }
}

// Lane l: the sum of the lanes of the l-th register.
ALWAYS_INLINE inline __m512i SumLanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  const __m512i cd = _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x44), _mm512_shuffle_i32x4(c, d, 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
}

// Row R of a matrix, from its first and fifth row, the bytes of one row and of three: registers that no step of a loop
// has to fetch.
template <int R>
ALWAYS_INLINE inline const int8_t* RowAt(const int8_t* first, const int8_t* fifth, int64_t one, int64_t three) {
  const int8_t* base = R < 4 ? first : fifth;
  return R % 4 == 3 ? base + three : base + R % 4 * one;
}

// Three times the bytes of a row, so that for all the compiler knows it cannot be told from one.
ALWAYS_INLINE inline int64_t Thrice(int64_t bytes) {
  bytes *= 3;
  asm("" : "+r"(bytes));
  return bytes;
}

// A piece of so many columns, in whole lines: about as long as the others, and no longer than `most` if that is a line.
inline int64_t PieceOf(int64_t columns, int64_t most) {
  const int64_t pieces = (columns + most - 1) / most;
  return ((columns + pieces - 1) / pieces + 63) / 64 * 64;
}

// Nothing lives in a vector register here. Else the compiler keeps addresses there, and they come back only after the
// multiplications that wait in the same queue.
ALWAYS_INLINE inline void ForgetVectors() {
  asm volatile("" ::
                   : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                     "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",
                     "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
}

// sum += the products of four bytes each, in the register that sum is in. GCC 12 often takes a second one for the
// result and moves sums back from it in every turn of a loop, or spills them. Processors of AMD do such moves for free,
// those of Intel do not, and a loop took up to four times as long.
ALWAYS_INLINE inline void MulAddInPlace(__m512i& sum, __m512i weights, __m512i codes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(codes));
}

inline __m512i Broadcast(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

// -128 * the sum of the codes: cancels the offset of the unsigned weights.
inline int32_t Correction(const Row& row) { return static_cast<int32_t>(0u - (static_cast<uint32_t>(row.sum) << 7)); }

// The columns of one packed panel, [begin, end) of k.
struct Panel {
  const uint8_t* data;
  int64_t begin, end;
};

// (hi . W) << 7 for the high parts of one row that lie in the panel: one multiplication per 16 outputs and group of
// four columns. `next` is the first word that is not yet added. Two words at a time, a missing one with zero codes: how
// many there are is hard to guess, and a wrong guess costs the processor as much as four words.
template <int Z>
ALWAYS_INLINE inline void AddHi(const Row& row, const Panel& panel, int32_t* next, __m512i (&acc)[Z]) {
  int32_t word = *next, stop = word;
  while (stop < row.words && row.hi[stop].group * 4 < panel.end) ++stop;
  if (word == stop) return;
  *next = stop;
  __m512i sum[Z];
  Unroll<Z>([&](auto z) ALWAYS_INLINE { sum[z] = _mm512_setzero_si512(); });
  for (; word < stop; word += 2) {
    Unroll<2>([&](auto i) ALWAYS_INLINE {
      const bool real = i == 0 || word + 1 < stop;
      const HiWord hi = row.hi[real ? word + i : word];
      const __m512i four = _mm512_set1_epi32(static_cast<int32_t>(real ? hi.four : 0));
      const uint8_t* w = panel.data + (hi.group - panel.begin / 4) * Z * 64;
      Unroll<Z>([&](auto z)
                    ALWAYS_INLINE { sum[z] = _mm512_dpbusd_epi32(sum[z], _mm512_load_si512(w + z * 64), four); });
    });
  }
  Unroll<Z>([&](auto z) ALWAYS_INLINE { acc[z] = _mm512_add_epi32(acc[z], _mm512_slli_epi32(sum[z], 7)); });
}

}  // namespace

// The product of a block with its epilogue, by tiles; k is not 0.
void MultiplyTiled(const Block& block);

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_TILES_AVX512_H_
