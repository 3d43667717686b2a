// Small products with AVX512-VNNI that read weights as one stream, in the order in which they lie: dot products whose
// sums are added up over the lanes of a register.
//
// Up to four rows of activations take one row of weights at a time, four to ten a pair. The surprising fact is how many
// loads there are: two a cycle, as many as multiplications. So one row of weights is too few for four rows of
// activations (six loads, with the prefetch, for four multiplications), and a pair needs every code once only.
#ifndef JAXINT8_FFI_CPU_STREAMS_AVX512_H_
#define JAXINT8_FFI_CPU_STREAMS_AVX512_H_

#include <immintrin.h>

#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "int8.h"
#include "rows_avx512.h"
#include "tiles_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

// The sums of the lanes of four registers.
inline __m128i Sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// How far ahead weights are fetched, in bytes.
constexpr int64_t kFetchAhead = 8 << 10;

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

// c[M] = dot products of up to four rows of activations with all rows of weights, whole ones. With one chain of sums a
// row of weights is so few instructions that the processor works on several at once, and weights are asked for at a
// steady pace: with more chains each arrival lets a burst of requests go, and a processor drops what its queues cannot
// take (16384 rows of 4096 from memory: 640 us with four chains, 560 with two as here). In long rows one chain is too
// slow for what the caches give, so there the last line of every kGroup goes to a second one (1: there is no second).
// kRest: k is no multiple of 64.
template <int M, int kGroup, bool kRest, bool kDense>
void DotsOfWholeRows(const Block& b) {
  static_assert(M == 1 || !kDense, "only a single row keeps its high parts for all columns");
  constexpr int U = kGroup == 1 ? 1 : 2;  // chains
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t k = b.k, whole = k / 64 * 64, before_groups = whole % (64 * kGroup);
  const __mmask64 rest = FirstBytes(k - whole);
  const int8_t* hi = kDense ? b.plan->hi : nullptr;
  for (int64_t first = 0; first < b.n; first += 4) {
    const int8_t* w[4];  // beyond the last row: that one again
    Unroll<4>([&](auto r) ALWAYS_INLINE { w[r] = b.w + (first + r < b.n ? first + r : b.n - 1) * k; });
    __m512i sums[M][4];
    Unroll<4>([&](auto r) ALWAYS_INLINE {
      __m512i acc[U][M], high[U];
      Unroll<U * M>([&](auto i) ALWAYS_INLINE { acc[i / M][i % M] = _mm512_setzero_si512(); });
      if constexpr (kDense) Unroll<U>([&](auto u) ALWAYS_INLINE { high[u] = _mm512_setzero_si512(); });
      const auto step = [&](auto u, int64_t t, __m512i line) ALWAYS_INLINE {
        _mm_prefetch(w[r] + t + kFetchAhead, _MM_HINT_T0);
        const __m512i weights = _mm512_xor_si512(line, flip);
        Unroll<M>([&](auto i) ALWAYS_INLINE {
          acc[u][i] = _mm512_dpbusd_epi32(acc[u][i], weights, _mm512_load_si512(b.lo + i * b.stride + t));
          asm("" : "+v"(acc[u][i]));  // see below
        });
        if constexpr (kDense) high[u] = _mm512_dpbusd_epi32(high[u], weights, _mm512_load_si512(hi + t));
      };
      constexpr std::integral_constant<int, 0> kFirst{};
      constexpr std::integral_constant<int, U - 1> kLast{};
      if constexpr (kRest) step(kFirst, whole, _mm512_maskz_loadu_epi8(rest, w[r] + whole));
      int64_t t = 0;
      for (; t < before_groups; t += 64) step(kFirst, t, _mm512_loadu_si512(w[r] + t));
      for (; t < whole; t += 64 * kGroup) {
        const auto line = [&](int i) ALWAYS_INLINE { return _mm512_loadu_si512(w[r] + t + i * 64); };
        Unroll<kGroup - 1>([&](auto i) ALWAYS_INLINE { step(kFirst, t + i * 64, line(i)); });
        step(kLast, t + (kGroup - 1) * 64, line(kGroup - 1));
      }
      // Without these two GCC moves a chain to another register and back in every turn of the loop.
      Unroll<U * M>([&](auto i) ALWAYS_INLINE { asm volatile("" : "+v"(acc[i / M][i % M])); });
      Unroll<M>([&](auto i)
                    ALWAYS_INLINE { sums[i][r] = U == 1 ? acc[0][i] : _mm512_add_epi32(acc[0][i], acc[U - 1][i]); });
      if constexpr (kDense) {
        if constexpr (U > 1) high[0] = _mm512_add_epi32(high[0], high[U - 1]);
        sums[0][r] = _mm512_add_epi32(sums[0][r], _mm512_slli_epi32(high[0], 7));
      }
    });
    Unroll<M>([&](auto i) ALWAYS_INLINE {
      const Row& row = b.rows[i];
      __m128i four = Sum4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
      if (!kDense && b.with_hi) four = _mm_add_epi32(four, HiOfRow(row, w, k));
      four = _mm_add_epi32(four, _mm_set1_epi32(Correction(row)));
      _mm_store_si128(reinterpret_cast<__m128i*>(b.c + i * kBlockN + first), four);
    });
  }
}

// Rows of activations for which weights are read as one stream. Columns up to which one chain of sums keeps up with the
// caches, for each number of them.
constexpr int kFewM = 4;
constexpr int64_t kShortRow[kFewM] = {1536, 1024, 1024, 1024};
// Lines of weights from one that goes to the second chain to the next, in longer rows.
constexpr int kGroups[kFewM] = {8, 2, 2, 2};

template <int M, bool kDense = false>
void DotsOfFewRows(const Block& b) {
  constexpr int kGroup = kGroups[M - 1];
  const bool few = b.k <= kShortRow[M - 1];
  if (b.k % 64 == 0) {
    return (few ? DotsOfWholeRows<M, 1, false, kDense> : DotsOfWholeRows<M, kGroup, false, kDense>)(b);
  }
  return (few ? DotsOfWholeRows<M, 1, true, kDense> : DotsOfWholeRows<M, kGroup, true, kDense>)(b);
}

// A part of a block for pairs of rows of weights: rows of weights, an even one first; columns, begin a multiple of 64,
// end too or the last; and what is fetched in each step: two lines from `fetch` on, `gap` bytes apart, then `advance`
// bytes further, all counted from the first of the two rows.
struct PairsPart {
  int64_t j, j_end;
  int64_t begin, end;
  int64_t fetch, gap, advance;
};

// Lane l: the sums over all lanes of rows 2 * l and 2 * l + 1, of both outputs each; rows from kFirst on, up to eight.
template <int M, int kFirst>
ALWAYS_INLINE inline __m512i SumPairs(const __m512i (&acc)[M][2]) {
  constexpr int kRows = M - kFirst < 8 ? M - kFirst : 8;
  const auto two = [&](auto i) ALWAYS_INLINE {  // in all lanes, of outputs 0 and 1 twice
    const __m512i(&a)[2] = acc[kFirst + (i < kRows ? i : kRows - 1)];
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  };
  __m512i four[4];
  Unroll<4>([&](auto p) ALWAYS_INLINE {
    constexpr int kPair = kRows <= 4 ? p % 2 : p;
    const __m512i even = two(std::integral_constant<int, kPair * 2>{});
    const __m512i odd = two(std::integral_constant<int, kPair * 2 + 1>{});
    four[p] = _mm512_add_epi32(_mm512_unpacklo_epi64(even, odd), _mm512_unpackhi_epi64(even, odd));
  });
  return SumLanes(four[0], four[1], four[2], four[3]);
}

// c[M] (+)= dot products of rows of activations with all rows of weights, two at a time; the first part of the columns
// sets c.
template <int M, bool kRest>
void PairsOf(const Block& b, const PairsPart& part) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t k = b.k, stride = b.stride, stride3 = Thrice(stride), lines = (part.end - part.begin) / 64 * 64;
  const __mmask64 rest = FirstBytes(part.end - part.begin - lines);
  const int8_t* codes = b.lo + part.begin;
  const int8_t* first = b.w + part.j * k + part.begin;
  int32_t* c = b.c + part.j;
  const int64_t gap = part.gap, advance = part.advance;
  const bool adds = part.begin > 0;
  for (int64_t j = part.j; j < part.j_end; j += 2, first += 2 * k, c += 2) {
    const int64_t other = j + 1 < b.n ? k : 0;  // beyond the last row: that one again
    const int8_t *w = first, *x = codes, *x4 = codes + 4 * stride, *x8 = codes + 8 * stride,
                 *fetch = first + part.fetch;
    ForgetVectors();
    __m512i acc[M][2];
    Unroll<M * 2>([&](auto i) ALWAYS_INLINE { acc[i / 2][i % 2] = _mm512_setzero_si512(); });
    const auto step = [&](auto load) ALWAYS_INLINE {
      __m512i weights[2] = {_mm512_xor_si512(load(w), flip), _mm512_xor_si512(load(w + other), flip)};
      asm("" : "+v"(weights[0]), "+v"(weights[1]));
      Unroll<M>([&](auto i) ALWAYS_INLINE {
        __m512i own = _mm512_load_si512(RowAt<i % 8>(i < 8 ? x : x8, x4, stride, stride3));
        asm("" : "+v"(own));  // once into a register: each multiplication would load it by itself
        Unroll<2>([&](auto r) ALWAYS_INLINE { acc[i][r] = _mm512_dpbusd_epi32(acc[i][r], weights[r], own); });
      });
    };
    if constexpr (kRest) {
      w += lines, x += lines, x4 += lines, x8 += lines;
      step([&](const int8_t* from) ALWAYS_INLINE { return _mm512_maskz_loadu_epi8(rest, from); });
      w -= lines, x -= lines, x4 -= lines, x8 -= lines;
    }
    for (const int8_t* end = first + lines; w != end;) {
      _mm_prefetch(fetch, _MM_HINT_T0);
      _mm_prefetch(fetch + gap, _MM_HINT_T0);
      step([](const int8_t* from) ALWAYS_INLINE { return _mm512_loadu_si512(from); });
      w += 64, x += 64, x4 += 64, x8 += 64, fetch += advance;
    }
    // What comes after the loop is no reason to move sums about in it.
    Unroll<M * 2>([&](auto i) ALWAYS_INLINE { asm("" : "+v"(acc[i / 2][i % 2])); });
    Unroll<(M + 7) / 8>([&](auto eight) ALWAYS_INLINE {
      const __m512i sums = SumPairs<M, eight * 8>(acc);
      Unroll<4>([&](auto p) ALWAYS_INLINE {
        const __m128i two = _mm512_extracti32x4_epi32(sums, p);
        Unroll<2>([&](auto odd) ALWAYS_INLINE {
          constexpr int i = eight * 8 + p * 2 + odd;
          if constexpr (i < M) {
            auto* out = reinterpret_cast<__m128i*>(c + i * kBlockN);
            const __m128i before = adds ? _mm_loadl_epi64(out) : _mm_set1_epi32(Correction(b.rows[i]));
            _mm_storel_epi64(out, _mm_add_epi32(before, odd ? _mm_unpackhi_epi64(two, two) : two));
          }
        });
      });
    });
  }
}

// Rows of activations that take pairs; more sums do not fit into registers.
constexpr int kPairsLeastM = 4, kPairsM = 10;
// Codes that stay in the L1 cache while weights stream by. Rows of up to so many columns are fetched as one stream,
// longer ones as two, those of the next pair.
constexpr int64_t kPairsBytes = 40 << 10, kOneStream = 1536;
// Weights that stay there while teams take turns.
constexpr int64_t kTurnBytes = 8 << 10;

template <int M>
void Pairs(const Block& b, const PairsPart& part) {
  (part.end % 64 != 0 ? PairsOf<M, true> : PairsOf<M, false>)(b, part);
}
template <int... kMore>
constexpr std::array<void (*)(const Block&, const PairsPart&), sizeof...(kMore)> PairsFrom(
    std::integer_sequence<int, kMore...>) {
  return {Pairs<kPairsLeastM + kMore>...};
}
constexpr auto kPairs = PairsFrom(std::make_integer_sequence<int, kPairsM - kPairsLeastM + 1>{});

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
        kPairs[rows - kPairsLeastM](TeamOf(b, i, rows), part);
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
