// Small products with AVX512-VNNI that read weights as one stream, in the order in which they lie: dot products whose
// sums are added up over the lanes of a register.
//
// Up to four rows of activations take one row of weights at a time, four to ten a pair. The surprising fact is how many
// loads there are: two a cycle, as many as multiplications. So one row of weights is too few for four rows of
// activations (six loads, with the prefetch, for four multiplications), and a pair needs every code once only.
#ifndef JAXINT8_FFI_CPU_STREAMS_AVX512_H_
#define JAXINT8_FFI_CPU_STREAMS_AVX512_H_

#include <immintrin.h>

#include <cstring>

#include "int8.h"
#include "rows_avx512.h"
#include "tiles_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {

// Up to kFewM rows of activations: the weights are read once, in the order in which they lie. With the epilogue.
constexpr int kFewM = 4;
void MultiplyFewRows(const Block& block);

// The same with four rows of weights side by side: fewer loads, for weights in a second-level cache of Intel's (on a
// Xeon with AMX 768 columns take 0.7 of the time). From further away one stream is faster, or as fast.
constexpr int kQuadsM = 4;
void MultiplyQuads(const Block& block);

// A part of a block for pairs of rows of weights: rows of weights, an even one first; columns, begin a multiple of 64,
// end too or the last; and what is fetched in each step: two lines from `fetch` on, `gap` bytes apart, then `advance`
// bytes further, all counted from the first of the two rows.
struct PairsPart {
  int64_t j, j_end;
  int64_t begin, end;
  int64_t fetch, gap, advance;
};

// Rows of activations that take pairs; more sums do not fit into registers.
constexpr int kPairsLeastM = 4, kPairsM = 10;

// c (+)= dot products of so many rows of activations with rows of weights, two at a time; the first part of the columns
// sets c.
void Pairs(const Block& team, const PairsPart& part);

namespace {

// How far ahead weights are fetched, in bytes.
constexpr int64_t kFetchAhead = 8 << 10;

// The sums of the lanes of four registers.
inline __m128i Sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// (hi . W) << 7 of a row of activations and four rows of weights, group by group of four columns. To be called while
// these rows are in the L1 cache.
ALWAYS_INLINE inline __m128i HiOfRow(const Row& row, const int8_t* const (&w)[4], int64_t k) {
  const __m128i flip = _mm_set1_epi8(static_cast<char>(0x80));
  __m128i sum = _mm_setzero_si128();
  if (row.words == 0) return sum;
  const auto add = [&](const HiWord& word, size_t bytes) ALWAYS_INLINE {
    int32_t four[4] = {};
    Unroll<4>([&](auto r) ALWAYS_INLINE { std::memcpy(&four[r], w[r] + int64_t{word.group} * 4, bytes); });
    const __m128i weights = _mm_xor_si128(_mm_setr_epi32(four[0], four[1], four[2], four[3]), flip);
    sum = _mm_dpbusd_epi32(sum, weights, _mm_set1_epi32(static_cast<int32_t>(word.four)));
  };
  int32_t whole = row.words;  // the last group may be cut off by the end of the row
  const int64_t last = int64_t{row.hi[whole - 1].group} * 4;
  if (last + 4 > k) --whole;
  for (int32_t word = 0; word < whole; ++word) add(row.hi[word], 4);
  if (whole < row.words) add(row.hi[whole], static_cast<size_t>(k - last));
  return _mm_slli_epi32(sum, 7);
}

// c[i][j..j + 4] += the high parts of all rows. Sums are read as they may just have been stored, two at a time: a load
// of more bytes than one store would wait until that has left the queue.
inline void AddHiOfRows(const Block& b, int64_t j) {
  const int8_t* w[4];  // beyond the last row: that one again
  Unroll<4>([&](auto r) ALWAYS_INLINE { w[r] = b.w + (j + r < b.n ? j + r : b.n - 1) * b.k; });
  for (int64_t i = 0; i < b.m; ++i) {
    if (b.rows[i].words == 0) continue;
    int32_t* const c = b.c + i * kBlockN + j;
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(c));
    const __m128i four = _mm_unpacklo_epi64(low, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(c + 2)));
    _mm_store_si128(reinterpret_cast<__m128i*>(c), _mm_add_epi32(four, HiOfRow(b.rows[i], w, b.k)));
  }
}

// Codes that stay in the L1 cache while weights stream by. Rows of up to so many columns are fetched as one stream,
// longer ones as two, those of the next pair.
constexpr int64_t kPairsBytes = 40 << 10, kOneStream = 1536;
// Weights that stay there while teams take turns.
constexpr int64_t kTurnBytes = 8 << 10;

// Where high parts are added row by row.
struct NoGather {
  void operator()(int64_t, int64_t, int64_t, int64_t) const {}
};

// So many rows of a block, from i on.
inline Block TeamOf(const Block& b, int64_t i, int64_t rows) {
  Block team = b;
  team.m = rows;
  team.lo += i * b.stride;
  team.rows += i;
  team.c += i * kBlockN;
  return team;
}

// From kPairsLeastM rows of activations on, in teams of up to kPairsM that take turns over a few rows of weights, which
// stay in the L1 cache. `bytes` is what the codes of a team may take of it. `gather(j, j_end, begin, end)` is to move
// what high parts need of these rows and columns while they are there; without one high parts are added here.
template <typename Gather>
void MultiplyPairs(const Block& b, int64_t bytes, const Gather* gather) {
  const int64_t teams = (b.m + kPairsM - 1) / kPairsM, most = (b.m + teams - 1) / teams;
  const int64_t width = PieceOf(b.k, bytes / most);
  // High parts are added after so many rows of weights: short rows are still in the L1 cache then; of long ones only a
  // few would be, and interrupting the stream for them costs more (4 x 4096 x 4096 by the relative rule: 4 %).
  const bool several = teams > 1 || gather != nullptr;
  const int64_t turn = several ? (kTurnBytes / (width + 1) / 8 + 1) * 8 : b.k <= kOneStream ? 8 : kBlockN;
  for (int64_t begin = 0; begin < b.k; begin += width) {
    PairsPart part{0, 0, begin, begin + width < b.k ? begin + width : b.k, 12 << 10, 64, 128};
    if (b.k > kOneStream) part.fetch = 2 * b.k, part.gap = b.k, part.advance = 64;
    for (; part.j < b.n; part.j = part.j_end) {
      part.j_end = part.j + turn < b.n ? part.j + turn : b.n;
      for (int64_t team = 0, i = 0; team < teams; ++team) {
        const int64_t rows = b.m / teams + (team < b.m % teams);
        Pairs(TeamOf(b, i, rows), part);
        i += rows;
      }
      if (gather != nullptr) {
        (*gather)(part.j, part.j_end, begin, part.end);
      } else if (b.with_hi && part.end == b.k) {
        for (int64_t j = part.j; j < part.j_end; j += 4) AddHiOfRows(b, j);
      }
    }
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_STREAMS_AVX512_H_
