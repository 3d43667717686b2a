// The dot products of streams_avx512.h.
#include "streams_avx512.h"

#include <immintrin.h>

#include <array>
#include <type_traits>
#include <utility>

#include "int8.h"
#include "rows_avx512.h"
#include "tiles_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

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

// Columns up to which one chain of sums keeps up with the caches, for each number of rows of activations.
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

template <int M>
void PairsOfRows(const Block& b, const PairsPart& part) {
  (part.end % 64 != 0 ? PairsOf<M, true> : PairsOf<M, false>)(b, part);
}
template <int... kMore>
constexpr std::array<void (*)(const Block&, const PairsPart&), sizeof...(kMore)> PairsFrom(
    std::integer_sequence<int, kMore...>) {
  return {PairsOfRows<kPairsLeastM + kMore>...};
}
constexpr auto kPairs = PairsFrom(std::make_integer_sequence<int, kPairsM - kPairsLeastM + 1>{});

// c[M] = dot products of rows of activations with all rows of weights, whole ones, four at a time.
template <int M, bool kRest, bool kDense = false>
void QuadsOf(const Block& b) {
  static_assert(M == 1 || !kDense, "only a single row keeps its high parts for all columns");
  constexpr int kCodes = kDense ? 2 : M;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t k = b.k, stride = b.stride, stride3 = Thrice(stride), lines = k / 64 * 64;
  const __mmask64 rest = FirstBytes(k - lines);
  for (int64_t first = 0; first < b.n; first += 4) {
    const int8_t* w[4];  // beyond the last row: that one again
    Unroll<4>([&](auto r) ALWAYS_INLINE { w[r] = b.w + (first + r < b.n ? first + r : b.n - 1) * k; });
    const int8_t *at[4] = {w[0], w[1], w[2], w[3]}, *x = b.lo, *x4 = x + 4 * stride, *fetch = w[0] + kFetchAhead;
    const int8_t* hi = kDense ? b.plan->hi : nullptr;
    ForgetVectors();
    __m512i acc[kCodes][4];
    Unroll<kCodes * 4>([&](auto i) ALWAYS_INLINE { acc[i / 4][i % 4] = _mm512_setzero_si512(); });
    const auto step = [&](auto load) ALWAYS_INLINE {
      __m512i weights[4];
      Unroll<4>([&](auto r) ALWAYS_INLINE { weights[r] = _mm512_xor_si512(load(at[r]), flip); });
      asm("" : "+v"(weights[0]), "+v"(weights[1]), "+v"(weights[2]), "+v"(weights[3]));
      Unroll<kCodes>([&](auto i) ALWAYS_INLINE {
        __m512i own = _mm512_load_si512(kDense && i == 1 ? hi : RowAt<i>(x, x4, stride, stride3));
        asm("" : "+v"(own));  // once into a register: each multiplication would load it by itself
        Unroll<4>([&](auto r) ALWAYS_INLINE { MulAddInPlace(acc[i][r], weights[r], own); });
      });
    };
    const auto advance = [&](int64_t bytes) ALWAYS_INLINE {
      Unroll<4>([&](auto r) ALWAYS_INLINE { at[r] += bytes; });
      x += bytes, x4 += bytes;
      if constexpr (kDense) hi += bytes;
    };
    if constexpr (kRest) {
      advance(lines);
      step([&](const int8_t* from) ALWAYS_INLINE { return _mm512_maskz_loadu_epi8(rest, from); });
      advance(-lines);
    }
    for (const int8_t* end = w[0] + lines; at[0] != end; advance(64)) {
      Unroll<4>([&](auto i) ALWAYS_INLINE { _mm_prefetch(fetch + i * 64, _MM_HINT_T0); });
      fetch += 256;
      step([](const int8_t* from) ALWAYS_INLINE { return _mm512_loadu_si512(from); });
    }
    Unroll<M>([&](auto i) ALWAYS_INLINE {
      const Row& row = b.rows[i];
      __m128i four = Sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
      if constexpr (kDense) {
        four = _mm_add_epi32(four, _mm_slli_epi32(Sum4(acc[1][0], acc[1][1], acc[1][2], acc[1][3]), 7));
      } else if (b.with_hi) {
        four = _mm_add_epi32(four, HiOfRow(row, w, k));
      }
      four = _mm_add_epi32(four, _mm_set1_epi32(Correction(row)));
      _mm_store_si128(reinterpret_cast<__m128i*>(b.c + i * kBlockN + first), four);
    });
  }
}

template <bool kRest>
void QuadsOfRows(const Block& b) {
  constexpr void (*kQuads[kQuadsM])(const Block&) = {QuadsOf<1, kRest>, QuadsOf<2, kRest>, QuadsOf<3, kRest>,
                                                     QuadsOf<4, kRest>};
  const bool dense = b.plan && b.plan->dense;
  (dense ? QuadsOf<1, kRest, true> : kQuads[b.m - 1])(b);
}

}  // namespace

void MultiplyQuads(const Block& b) {
  (b.k % 64 != 0 ? QuadsOfRows<true> : QuadsOfRows<false>)(b);
  if (b.epilogue) Finish(*b.epilogue, 0, b.m);
}

void MultiplyFewRows(const Block& b) {
  constexpr void (*kStreams[kFewM])(const Block&) = {DotsOfFewRows<1>, DotsOfFewRows<2>, DotsOfFewRows<3>,
                                                     DotsOfFewRows<4>};
  const bool dense = b.plan && b.plan->dense;
  (dense ? DotsOfFewRows<1, true> : kStreams[b.m - 1])(b);
  if (b.epilogue) Finish(*b.epilogue, 0, b.m);
}

void Pairs(const Block& team, const PairsPart& part) { kPairs[team.m - kPairsLeastM](team, part); }

}  // namespace jaxint8::cpu
