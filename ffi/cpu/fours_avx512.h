// Products of five to twenty rows with AVX512-VNNI where shuffles take the place of multiplications (Intel): weights as
// registers of four outputs by 16 columns, packed as the first rows are multiplied with them.
//
// Between dot products, whose sums are spread over 16 lanes, and strips, whose sums need no adding up but whose weights
// take four shuffles a register: here one shuffle brings 16 columns of four rows of weights together, codes of 16
// columns are repeated by the load itself, and sums are spread over four lanes. The surprising fact is that a fetch
// into the L1 cache gains a tenth over one into the L2 cache, though weights wait there for a whole turn.
#ifndef JAXINT8_FFI_CPU_FOURS_AVX512_H_
#define JAXINT8_FFI_CPU_FOURS_AVX512_H_

#include <immintrin.h>

#include <array>
#include <utility>

#include "int8.h"
#include "rows_avx512.h"
#include "tiles_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

constexpr int64_t kFoursN = 8;          // outputs at once: two registers
constexpr int kFoursM = 8;              // rows at once: 8 x 2 sums, 8 weights
constexpr int64_t kFoursBytes = 16384;  // of codes, half of the smallest L1 cache; the weights are up to as many
constexpr int64_t kFoursK[2] = {512, 2048};

// Eight rows of weights, some of their columns.
struct FoursPart {
  const int8_t* w;
  uint8_t* panel;  // [columns / 16][2][4 outputs][16 columns], unsigned
  int64_t begin, end;
  int64_t j;
};

// What is fetched meanwhile: so many bytes at each step of 64 columns.
struct FoursAhead {
  const int8_t* at;
  int64_t advance;
};

// 64 columns of four rows as four registers of [4 outputs][16 columns].
template <bool kWhole>
ALWAYS_INLINE inline void PackFour(const int8_t* const (&w)[4], __mmask64 mask, __m512i flip, __m512i (&out)[4]) {
  __m512i low[2], high[2];  // 32 columns of two rows each
  Unroll<2>([&](auto p) ALWAYS_INLINE {
    const int8_t *even = w[p * 2], *odd = w[p * 2 + 1];
    if constexpr (kWhole) {  // half a line from memory takes the place of a shuffle
      const auto half = [](const int8_t* at)
                            ALWAYS_INLINE { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); };
      low[p] = _mm512_inserti64x4(_mm512_loadu_si512(even), half(odd), 1);
      high[p] = _mm512_inserti64x4(_mm512_loadu_si512(odd), half(even + 32), 0);
    } else {
      const __m512i first = _mm512_maskz_loadu_epi8(mask, even), second = _mm512_maskz_loadu_epi8(mask, odd);
      low[p] = _mm512_shuffle_i64x2(first, second, 0x44);
      high[p] = _mm512_shuffle_i64x2(first, second, 0xee);
    }
  });
  out[0] = _mm512_xor_si512(_mm512_shuffle_i32x4(low[0], low[1], 0x88), flip);
  out[1] = _mm512_xor_si512(_mm512_shuffle_i32x4(low[0], low[1], 0xdd), flip);
  out[2] = _mm512_xor_si512(_mm512_shuffle_i32x4(high[0], high[1], 0x88), flip);
  out[3] = _mm512_xor_si512(_mm512_shuffle_i32x4(high[0], high[1], 0xdd), flip);
}

// Packs the columns of a part of n rows of weights; beyond the last row: that one again.
void PackFours(const FoursPart& part, int64_t k, int64_t n) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t z = 0; z < 2; ++z) {
    const int8_t* row[4];
    Unroll<4>([&](auto r) ALWAYS_INLINE { row[r] = part.w + (z * 4 + r < n ? z * 4 + r : n - 1) * k; });
    uint8_t* out = part.panel + z * 64;
    for (int64_t left = part.end - part.begin; left > 0; left -= 64, out += 8 * 64) {
      __m512i four[4];
      PackFour<false>(row, FirstBytes(left), flip, four);
      Unroll<4>([&](auto q) ALWAYS_INLINE { _mm512_store_si512(out + q * 128, four[q]); });
      Unroll<4>([&](auto r) ALWAYS_INLINE { row[r] += 64; });
    }
  }
}

// c[M][8] (+)= x[M] . w for rows first.. of a block and the outputs of a part, low parts only; the first columns set c.
// kPacks: the panel is written as well. kFetches: lines fetched for every 16 columns.
template <int kFetches, bool kPacks, int M>
void Fours(const Block& b, int64_t first, const FoursPart& part, FoursAhead* ahead) {
  const int8_t* x = b.lo + first * b.stride + part.begin;
  uint8_t* panel = part.panel;
  const uint8_t* const end = panel + (part.end - part.begin + 63) / 64 * (8 * 64);
  ForgetVectors();
  __m512i acc[M][2];
  Unroll<M>([&](auto i) ALWAYS_INLINE {
    const __m512i correction = _mm512_maskz_set1_epi32(0x1111, part.begin == 0 ? Correction(b.rows[first + i]) : 0);
    Unroll<2>([&](auto z) ALWAYS_INLINE { acc[i][z] = correction; });
  });
  const int64_t stride = b.stride, stride3 = Thrice(stride), k = b.k, k3 = Thrice(k);
  const int8_t *x4 = x + 4 * stride, *w0 = part.w, *w4 = part.w + 4 * k, *fetch = ahead->at;
  const int64_t advance = ahead->advance;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  do {
    __m512i packed[2][4];
    if constexpr (kPacks) {
      Unroll<2>([&](auto z) ALWAYS_INLINE {
        const int8_t* const base = z == 0 ? w0 : w4;
        const int8_t* const four[4] = {base, base + k, base + 2 * k, base + k3};
        PackFour<true>(four, 0, flip, packed[z]);
        Unroll<4>([&](auto q) ALWAYS_INLINE { _mm512_store_si512(panel + (q * 2 + z) * 64, packed[z][q]); });
      });
      w0 += 64, w4 += 64;
    }
    Unroll<4>([&](auto q) ALWAYS_INLINE {
      __m512i w[2];
      Unroll<2>([&](auto z)
                    ALWAYS_INLINE { w[z] = kPacks ? packed[z][q] : _mm512_load_si512(panel + (q * 2 + z) * 64); });
      Unroll<kFetches>([&](auto f) ALWAYS_INLINE { _mm_prefetch(fetch + (q * kFetches + f) * 64, _MM_HINT_T0); });
      Unroll<M>([&](auto i) ALWAYS_INLINE {
        __m512i codes = _mm512_broadcast_i32x4(
            _mm_load_si128(reinterpret_cast<const __m128i*>(RowAt<i>(x, x4, stride, stride3) + q * 16)));
        asm("" : "+v"(codes));  // once into a register: each multiplication would load it by itself
        Unroll<2>([&](auto z) ALWAYS_INLINE { MulAddInPlace(acc[i][z], w[z], codes); });
      });
    });
    panel += 8 * 64, x += 64, x4 += 64, fetch += advance;
  } while (panel != end);
  ahead->at = fetch;
  // What comes after the loop is no reason to move sums about in it.
  __m512i sums[M][2];
  Unroll<M * 2>([&](auto i) ALWAYS_INLINE {
    asm("" : "+v"(acc[i / 2][i % 2]));
    sums[i / 2][i % 2] = acc[i / 2][i % 2];
  });
  int32_t* const c = b.c + first * kBlockN + part.j;
  const __mmask8 adds = part.begin > 0 ? 0xff : 0;  // a branch would keep sums in memory
  const auto store = [&](int64_t i, __m256i eight) ALWAYS_INLINE {
    int32_t* const out = c + i * kBlockN;
    const __m256i before = _mm256_maskz_load_epi32(adds, out);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm256_add_epi32(eight, before));
  };
  // Of rows 0 and 1 of four, and with 2 more of rows 2 and 3.
  const __m512i two = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  Unroll<(M + 3) / 4>([&](auto four) ALWAYS_INLINE {
    constexpr int i = four * 4;
    __m512i sum[2];  // a lane for each output, in it four rows
    Unroll<2>([&](auto z) ALWAYS_INLINE {
      const auto of = [&](auto r) ALWAYS_INLINE { return sums[i + r < M ? i + r : M - 1][z]; };
      const __m512i s0 = of(std::integral_constant<int, 0>{}), s1 = of(std::integral_constant<int, 1>{}),
                    s2 = of(std::integral_constant<int, 2>{}), s3 = of(std::integral_constant<int, 3>{});
      const __m512i s01 = _mm512_add_epi32(_mm512_unpacklo_epi32(s0, s1), _mm512_unpackhi_epi32(s0, s1));
      const __m512i s23 = _mm512_add_epi32(_mm512_unpacklo_epi32(s2, s3), _mm512_unpackhi_epi32(s2, s3));
      sum[z] = _mm512_add_epi32(_mm512_unpacklo_epi64(s01, s23), _mm512_unpackhi_epi64(s01, s23));
    });
    const auto store_two = [&](auto r) ALWAYS_INLINE {
      if constexpr (i + r < M) {
        const __m512i rows = _mm512_add_epi32(two, _mm512_set1_epi32(r));
        const __m512i both = _mm512_permutex2var_epi32(sum[0], rows, sum[1]);
        store(i + r, _mm512_castsi512_si256(both));
        if constexpr (i + r + 1 < M) store(i + r + 1, _mm512_extracti64x4_epi64(both, 1));
      }
    };
    store_two(std::integral_constant<int, 0>{});
    store_two(std::integral_constant<int, 2>{});
  });
}

using FoursFunction = void (*)(const Block&, int64_t, const FoursPart&, FoursAhead*);
using FoursByRows = std::array<FoursFunction, kFoursM>;
template <int kFetches, bool kPacks, int... kLess>
constexpr FoursByRows FoursFrom(std::integer_sequence<int, kLess...>) {
  return {Fours<kFetches, kPacks, kLess + 1>...};
}
// A team alone fetches all of what comes next, else the first two do.
template <int kFetches, bool kPacks>
constexpr FoursByRows kFours = FoursFrom<kFetches, kPacks>(std::make_integer_sequence<int, kFoursM>{});

// Copies the weights of the groups of a plan from a part: a word for each output.
inline void CopyGroups(const HiPlan& plan, const FoursPart& part, int64_t* next, uint8_t* groups) {
  alignas(64) static constexpr int32_t kOutputs[4][16] = {{0, 4, 8, 12, 16, 20, 24, 28},
                                                          {1, 5, 9, 13, 17, 21, 25, 29},
                                                          {2, 6, 10, 14, 18, 22, 26, 30},
                                                          {3, 7, 11, 15, 19, 23, 27, 31}};
  for (; *next < plan.groups && plan.group[*next] * 4 < part.end; ++*next) {
    const int64_t group = plan.group[*next] - part.begin / 4;
    const uint8_t* from = part.panel + (group >> 2) * 128;
    const __m512i eight = _mm512_permutex2var_epi32(_mm512_load_si512(from), _mm512_load_si512(kOutputs[group & 3]),
                                                    _mm512_load_si512(from + 64));
    auto* const to = reinterpret_cast<__m256i*>(groups + (*next * kBlockN + part.j) * 4);
    _mm256_store_si256(to, _mm512_castsi512_si256(eight));
  }
}

// c = x . w for all rows of a block, low parts only; with a plan the weights of its groups are written to `groups`,
// [group][kBlockN][4]. k is not 0.
void MultiplyFours(const Block& b, uint8_t* groups) {
  auto* scratch = reinterpret_cast<TileScratch*>(b.scratch);
  scratch->job = 0;  // nothing is packed ahead here
  const int64_t tiles = (b.m + kFoursM - 1) / kFoursM, fits = kFoursBytes / b.m;
  const int64_t width = PieceOf(b.k, fits < kFoursK[0] ? kFoursK[0] : fits > kFoursK[1] ? kFoursK[1] : fits);
  int64_t begin_group = 0, end_group = 0;
  for (int64_t t = 0; t < b.k; t += width, begin_group = end_group) {
    const int64_t end = t + width < b.k ? t + width : b.k;
    for (int64_t j = 0; j < b.n; j += kFoursN) {
      const bool last = j + kFoursN >= b.n;
      const FoursPart part{b.w + j * b.k + t, scratch->panels[0], t, end, j};
      // All of the next rows are fetched as they lie, a share of them with each piece of these.
      const int8_t* const next = last ? b.ahead : b.w + (j + kFoursN) * b.k;
      FoursAhead ahead{next ? next + t * kFoursN : part.w, next ? (tiles == 1 ? 512 : 256) : 0};
      const bool packs = j + kFoursN <= b.n && (end - t) % 64 == 0;
      if (!packs) PackFours(part, b.k, b.n - j);
      const FoursByRows& first = packs        ? tiles == 1 ? kFours<2, true> : kFours<1, true>
                                 : tiles == 1 ? kFours<2, false>
                                              : kFours<1, false>;
      int64_t i = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t rows = b.m / tiles + (tile < b.m % tiles);
        (tile == 0 ? first : kFours<1, false>)[rows - 1](b, i, part, & ahead);
        if (tile == 1) ahead.advance = 0;
        i += rows;
      }
      if (!b.plan) continue;
      end_group = begin_group;
      CopyGroups(*b.plan, part, &end_group, groups);
    }
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_FOURS_AVX512_H_
