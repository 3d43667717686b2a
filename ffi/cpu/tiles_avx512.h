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
  Unroll<8>([&](auto i) ALWAYS_INLINE {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  });
  Unroll<4>([&](auto r) ALWAYS_INLINE {
    a[4 * r] = _mm512_unpacklo_epi64(b[4 * r], b[4 * r + 2]);
    a[4 * r + 1] = _mm512_unpackhi_epi64(b[4 * r], b[4 * r + 2]);
    a[4 * r + 2] = _mm512_unpacklo_epi64(b[4 * r + 1], b[4 * r + 3]);
    a[4 * r + 3] = _mm512_unpackhi_epi64(b[4 * r + 1], b[4 * r + 3]);
  });
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

// The packing of a whole panel (64 outputs, a multiple of 64 columns) in steps of 8 outputs by 16 columns, small enough
// for the registers that a tile leaves. A tile takes a number of steps for every few groups of columns that it
// multiplies. It is used where it lies: a tile has registers for its own addresses only.
struct PackAhead {
  static constexpr int64_t kStepColumns = 16, kStepRows = 8;

  const int8_t* from = nullptr;
  uint8_t* to = nullptr;
  int64_t stride = 0;       // of the weights
  int64_t columns = 0;      // of the panel
  int64_t steps_left = 0;   // in these 8 outputs
  int64_t groups_left = 0;  // of 8 outputs; 0: nothing is left
  int64_t steps = 0;        // to be taken at once
  int64_t turn = 0;         // after so many groups of four columns, at most 16

  // Spreads the packing evenly over `slots` times 64 columns of multiplication.
  void Start(const int8_t* w, int64_t w_stride, int64_t width, uint8_t* panel, int64_t slots) {
    from = w;
    to = panel;
    stride = w_stride;
    columns = width;
    steps_left = columns / kStepColumns;
    groups_left = kBlockN / kStepRows;
    const int64_t quota = (steps_left * groups_left + slots - 1) / slots;  // for 16 groups
    turn = quota < 16 ? 16 / quota : 1;
    steps = quota < 16 ? 1 : (quota + 15) / 16;
  }

  ALWAYS_INLINE void Step() {
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
    const int64_t one = stride, three = one * 3;
    const int8_t *first = from, *fifth = first + 4 * one;
    const auto pair = [&](auto r) ALWAYS_INLINE {  // 16 columns of two rows
      const auto load = [&](auto row) ALWAYS_INLINE {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(RowAt<row>(first, fifth, one, three)));
      };
      // Not an insertion, whose first half GCC loads into one of the first registers, where sums are.
      const __m256i low = _mm256_broadcast_i64x2(load(r));
      const __m256i both = _mm256_mask_broadcast_i64x2(low, 0xc, load(std::integral_constant<int, r + 4>{}));
      return _mm256_xor_si256(both, flip);
    };
    __m256i a[4];
    Unroll<4>([&](auto r) ALWAYS_INLINE { a[r] = pair(r); });
    const __m256i low01 = _mm256_unpacklo_epi32(a[0], a[1]), high01 = _mm256_unpackhi_epi32(a[0], a[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(a[2], a[3]), high23 = _mm256_unpackhi_epi32(a[2], a[3]);
    constexpr int64_t kGroup = kBlockN * 4;  // bytes of four columns
    uint8_t* out = to;
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(low01, low23));
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + kGroup), _mm256_unpackhi_epi64(low01, low23));
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 2 * kGroup), _mm256_unpacklo_epi64(high01, high23));
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 3 * kGroup), _mm256_unpackhi_epi64(high01, high23));
    // Two of the next eight rows each time: in four steps, a line of all eight.
    const int8_t* fetch = first + (kStepRows + steps_left % 4 * 2) * one;
    _mm_prefetch(fetch, _MM_HINT_T1);
    _mm_prefetch(fetch + one, _MM_HINT_T1);
    from = first + kStepColumns;
    to = out + 4 * kGroup;
    if (--steps_left == 0) {
      steps_left = columns / kStepColumns;
      from += kStepRows * one - columns;
      to += kStepRows * 4 - columns / 4 * kGroup;
      --groups_left;
    }
  }
};

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

// Of a panel that holds all columns: writes those whose groups hold high parts, each as a line of its weights. Byte 16
// * l + 4 * z + i is that of output 16 * z + 4 * l + i.
inline void SplitGroups(const Block& b, const uint8_t* panel, int registers, uint8_t* columns) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t first = 0; first * 4 < b.k; first += 64) {
    for (uint64_t left = b.groups[first / 64]; left; left &= left - 1) {
      const int64_t group = first + __builtin_ctzll(left);
      __m512i words[4], lines[4];
      Unroll<4>([&](auto z) ALWAYS_INLINE {  // beyond the last output: some weights
        const uint8_t* from = panel + (group * registers + (z < registers ? z : 0)) * 64;
        words[z] = _mm512_shuffle_epi8(_mm512_load_si512(from), order);
      });
      TransposeLanes(words, lines);
      Unroll<4>([&](auto i) ALWAYS_INLINE { _mm512_store_si512(columns + (group * 4 + i) * 64, lines[i]); });
    }
  }
}

// As AddHi, of a panel with quads, from the lines that SplitGroups wrote. Four columns are interleaved to words: a
// quarter of the lines that the words of their groups would take, which come from the L2 cache.
template <int Z>
ALWAYS_INLINE inline void AddQuads(const Row& row, const uint8_t* lines, __m512i (&acc)[Z]) {
  const HiQuad *quad = row.quad, *const stop = quad + row.quads;
  if (quad == stop) return;
  __m512i sum[4];
  Unroll<4>([&](auto z) ALWAYS_INLINE { sum[z] = _mm512_setzero_si512(); });
  do {
    __m512i line[4];
    Unroll<4>([&](auto j) ALWAYS_INLINE { line[j] = _mm512_load_si512(lines + quad->column[j] * 64); });
    const __m512i low01 = _mm512_unpacklo_epi8(line[0], line[1]), high01 = _mm512_unpackhi_epi8(line[0], line[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(line[2], line[3]), high23 = _mm512_unpackhi_epi8(line[2], line[3]);
    const __m512i four = _mm512_set1_epi32(static_cast<int32_t>(quad->four));
    sum[0] = _mm512_dpbusd_epi32(sum[0], _mm512_unpacklo_epi16(low01, low23), four);
    sum[1] = _mm512_dpbusd_epi32(sum[1], _mm512_unpackhi_epi16(low01, low23), four);
    sum[2] = _mm512_dpbusd_epi32(sum[2], _mm512_unpacklo_epi16(high01, high23), four);
    sum[3] = _mm512_dpbusd_epi32(sum[3], _mm512_unpackhi_epi16(high01, high23), four);
  } while (++quad != stop);
  Unroll<Z>([&](auto z) ALWAYS_INLINE { acc[z] = _mm512_add_epi32(acc[z], _mm512_slli_epi32(sum[z], 7)); });
}

// How the rows of a tile hold high parts: not; as words (AddHi); as quads (AddQuads).
enum class TileHigh { kNone, kWords, kQuads };

// c[M][16 * Z] (+)= x[M] . panel for rows i.. of a block, high parts included; the first panel sets c. With `finish`
// the epilogue follows at once, and c is not written. It begins at a line, for where it lies moves the time of a layer
// by up to 2 %.
template <TileHigh kHigh, int M, int Z>
[[gnu::aligned(64)]] void Tile(const Block& b, int64_t first, const Panel& columns, bool finish, PackAhead* pack) {
  auto* scratch = reinterpret_cast<TileScratch*>(b.scratch);
  const Row* rows = b.rows + first;
  const int8_t* x = b.lo + first * b.stride + columns.begin;
  const uint8_t* panel = columns.data;
  int64_t left = (columns.end - columns.begin + 63) / 64 * 16;  // groups of four columns
  ForgetVectors();
  __m512i acc[M][Z];
  Unroll<M>([&](auto i) ALWAYS_INLINE {
    const __m512i correction = _mm512_set1_epi32(columns.begin == 0 ? Correction(rows[i]) : 0);
    Unroll<Z>([&](auto z) ALWAYS_INLINE { acc[i][z] = correction; });
    if constexpr (kHigh == TileHigh::kWords) AddHi<Z>(rows[i], columns, scratch->next_hi + first + i, acc[i]);
    if constexpr (kHigh == TileHigh::kQuads) AddQuads<Z>(rows[i], scratch->lines, acc[i]);
  });
  const auto multiply = [&](int64_t groups) ALWAYS_INLINE {
    const int64_t stride = b.stride, stride3 = Thrice(stride);
    const int8_t* x4 = x + 4 * stride;
    const uint8_t* end = panel + groups * (Z * 64);
    do {
      __m512i w[Z];
      Unroll<Z>([&](auto z) ALWAYS_INLINE { w[z] = _mm512_load_si512(panel + z * 64); });
      Unroll<M>([&](auto i) ALWAYS_INLINE {
        const __m512i four = Broadcast(RowAt<i>(x, x4, stride, stride3));
        Unroll<Z>([&](auto z) ALWAYS_INLINE { acc[i][z] = _mm512_dpbusd_epi32(acc[i][z], w[z], four); });
      });
      panel += Z * 64;
      x += 4, x4 += 4;
    } while (panel != end);
  };
  while (left > 0) {
    int64_t now = left;
    if (Z == 4 && pack->groups_left > 0) {
      now = pack->turn < left ? pack->turn : left;
      for (int64_t step = 0; step < pack->steps && pack->groups_left > 0; ++step) pack->Step();
    }
    multiply(now);
    left -= now;
  }
  int32_t* c = b.c + first * kBlockN;
  if (columns.begin > 0) {  // only now, so that no multiplication waits for it
    Unroll<M * Z>([&](auto i) ALWAYS_INLINE {
      const __m512i before = _mm512_load_si512(c + i / Z * kBlockN + i % Z * 16);
      acc[i / Z][i % Z] = _mm512_add_epi32(acc[i / Z][i % Z], before);
    });
  }
  if constexpr (Z == 4) {
    if (finish) return FinishSums<M>(*b.epilogue, first, acc);
  }
  Unroll<M * Z>([&](auto i) ALWAYS_INLINE { _mm512_store_si512(c + i / Z * kBlockN + i % Z * 16, acc[i / Z][i % Z]); });
}

using TileFunction = void (*)(const Block&, int64_t, const Panel&, bool, PackAhead*);
template <TileHigh kHigh>
constexpr TileFunction kTiles[4][kTileM] = {
    {Tile<kHigh, 1, 1>, Tile<kHigh, 2, 1>, Tile<kHigh, 3, 1>, Tile<kHigh, 4, 1>, Tile<kHigh, 5, 1>, Tile<kHigh, 6, 1>},
    {Tile<kHigh, 1, 2>, Tile<kHigh, 2, 2>, Tile<kHigh, 3, 2>, Tile<kHigh, 4, 2>, Tile<kHigh, 5, 2>, Tile<kHigh, 6, 2>},
    {Tile<kHigh, 1, 3>, Tile<kHigh, 2, 3>, Tile<kHigh, 3, 3>, Tile<kHigh, 4, 3>, Tile<kHigh, 5, 3>, Tile<kHigh, 6, 3>},
    {Tile<kHigh, 1, 4>, Tile<kHigh, 2, 4>, Tile<kHigh, 3, 4>, Tile<kHigh, 4, 4>, Tile<kHigh, 5, 4>, Tile<kHigh, 6, 4>}};

// By the number of rows less one.
inline const TileFunction* TilesOf(const Block& b, int registers) {
  if (b.groups) return kTiles<TileHigh::kQuads>[registers - 1];
  return (b.with_hi ? kTiles<TileHigh::kWords> : kTiles<TileHigh::kNone>)[registers - 1];
}

// k is not 0.
void MultiplyTiled(const Block& b) {
  auto* scratch = reinterpret_cast<TileScratch*>(b.scratch);
  const int registers = static_cast<int>((b.n + 15) / 16);
  if (b.with_hi) std::memset(scratch->next_hi, 0, static_cast<size_t>(b.m) * sizeof *scratch->next_hi);
  const TileFunction* const tile_of = TilesOf(b, registers);
  const int64_t tiles = (b.m + kTileM - 1) / kTileM;
  const int64_t panels = (b.k + kPanelK - 1) / kPanelK;
  const int64_t width = ((b.k + panels - 1) / panels + 63) / 64 * 64;
  for (int64_t t = 0; t < b.k; t += width) {
    const int64_t end = t + width < b.k ? t + width : b.k, blocks = (end - t + 63) / 64;
    const bool packed = scratch->job == b.job && scratch->w == b.w + t && scratch->columns == end - t;
    const int buffer = packed && b.n == kBlockN ? scratch->buffer : 0;
    const Panel panel{scratch->panels[buffer], t, end};
    scratch->job = 0;
    if (!packed || b.n != kBlockN) Pack(b.w + t, b.k, b.n, end - t, registers, scratch->panels[buffer]);

    // The panel that this thread needs next, if it is a whole one.
    const int8_t* next = end < b.k ? b.w + end : b.ahead;
    const int64_t next_end = end < b.k ? (end + width < b.k ? end + width : b.k) : (width < b.k ? width : b.k);
    const int64_t next_columns = end < b.k ? next_end - end : next_end;
    const bool whole = next && next_columns % 64 == 0 && (end < b.k ? b.n : b.ahead_n) == kBlockN;
    if (b.groups) SplitGroups(b, panel.data, registers, scratch->lines);
    PackAhead ahead;
    if (whole && next != b.w + t) ahead.Start(next, b.k, next_columns, scratch->panels[1 - buffer], tiles * blocks);
    const bool last = b.epilogue && end == b.k, finish = last && FinishesSums(*b.epilogue);
    int64_t i = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {  // heights differ by one at most, so that no tile is thin
      const int64_t rows = b.m / tiles + (tile < b.m % tiles);
      if (last) FetchOutputs(*b.epilogue, i, i + rows);
      tile_of[rows - 1](b, i, panel, finish, &ahead);
      // At once, so that it overlaps with the next tile.
      if (last && !finish) Finish(*b.epilogue, i, i + rows);
      i += rows;
    }
    if (whole && registers == 4) {
      const int kept = next == b.w + t ? buffer : 1 - buffer;  // the next rows of the same product: the same panel
      scratch->job = b.job, scratch->w = next, scratch->columns = next_columns, scratch->buffer = kept;
    }
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_TILES_AVX512_H_
