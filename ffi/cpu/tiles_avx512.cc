// The tiles of tiles_avx512.h.
#include "tiles_avx512.h"

#include <immintrin.h>

#include <cstring>

#include "int8.h"
#include "rows_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

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

}  // namespace

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

}  // namespace jaxint8::cpu
