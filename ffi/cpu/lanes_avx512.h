// Small products with AVX512-VNNI where shuffles within 128-bit lanes cost nothing beside multiplications: dot products
// whose sums need no adding up.
//
// Four rows of weights, 64 columns of each, are transposed within the lanes: lane l of register q then holds columns
// [16 * l + 4 * q, + 4) of all four rows, and a sum is one of an output in each lane, so that 16 sums over lanes (of
// four outputs, where a plain dot product has four times as many) are six additions. Codes are brought into the same
// order as they are loaded: word q of each lane, four times. The surprising fact is what is not here, a panel of packed
// weights: on Zen 5, which shuffles four registers a cycle, a store costs as much as two multiplications, so that
// transposing the same weights anew for every eight rows of codes is cheaper than to keep them, up to 60 rows.
#ifndef JAXINT8_FFI_CPU_LANES_AVX512_H_
#define JAXINT8_FFI_CPU_LANES_AVX512_H_

#include <immintrin.h>

#include "int8.h"
#include "rows_avx512.h"
#include "tiles_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

constexpr int kLanesN = 8;  // outputs at once: two transpositions
constexpr int64_t kLanesBytes = 36 << 10;
constexpr int kLanesM = 8;  // rows of codes at once: 8 x 2 sums + 8 weights + 1 of codes

// Four rows of weights as four registers of [lane][4 rows][4 columns].
ALWAYS_INLINE inline void TransposeLanes(const __m512i (&row)[4], __m512i (&out)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi32(row[0], row[1]), high01 = _mm512_unpackhi_epi32(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(row[2], row[3]), high23 = _mm512_unpackhi_epi32(row[2], row[3]);
  out[0] = _mm512_unpacklo_epi64(low01, low23);
  out[1] = _mm512_unpackhi_epi64(low01, low23);
  out[2] = _mm512_unpacklo_epi64(high01, high23);
  out[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Lane l: the sum of the lanes of the l-th register.
ALWAYS_INLINE inline __m512i SumLanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  const __m512i cd = _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x44), _mm512_shuffle_i32x4(c, d, 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
}

// A piece of a block.
struct LanesPart {
  int64_t i;           // the first row of codes
  int64_t j;           // the first of kLanesN outputs
  int64_t begin, end;  // columns; begin is a multiple of 64, end too or the last
  // Where to keep transposed weights, [64 columns][2][4] registers, and for each group of four columns a bit that says
  // whether it will be needed.
  uint8_t* kept;
  const uint16_t* needed;
};

// c[M][kLanesN] (+)= dot products of rows of codes with rows of weights; the first part of the columns sets c.
template <int M, bool kKeeps>
void Lanes(const Block& b, const LanesPart& part) {
  constexpr int G = kLanesN / 4;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t k = b.k, stride = b.stride, whole = part.end / 64 * 64;
  const int8_t* x = b.lo + part.i * stride;
  const int8_t* w = b.w + part.j * k;
  const uint16_t* needed = part.needed;
  uint8_t* kept = part.kept;
  __m512i acc[M][G];
  Unroll<M * G>([&](auto i) ALWAYS_INLINE { acc[i / G][i % G] = _mm512_setzero_si512(); });
  const auto step = [&](int64_t t, auto load) ALWAYS_INLINE {
    __m512i weights[G][4];
    Unroll<G>([&](auto g) ALWAYS_INLINE {
      __m512i row[4];
      Unroll<4>([&](auto r) ALWAYS_INLINE { row[r] = _mm512_xor_si512(load(w + (g * 4 + r) * k + t), flip); });
      TransposeLanes(row, weights[g]);
    });
    if constexpr (kKeeps) {
      const unsigned words = needed[t / 64];
      Unroll<4>([&](auto q) ALWAYS_INLINE {
        if (words & 0x1111 << q) {
          Unroll<G>([&](auto g)
                        ALWAYS_INLINE { _mm512_store_si512(kept + t * 4 * G + (g * 4 + q) * 64, weights[g][q]); });
        }
      });
    }
    Unroll<4>([&](auto q) ALWAYS_INLINE {
      Unroll<M>([&](auto i) ALWAYS_INLINE {
        constexpr auto kOrder = static_cast<_MM_PERM_ENUM>(q * 0x55);
        const __m512i codes = _mm512_shuffle_epi32(_mm512_load_si512(x + i * stride + t), kOrder);
        Unroll<G>([&](auto g) ALWAYS_INLINE { acc[i][g] = _mm512_dpbusd_epi32(acc[i][g], weights[g][q], codes); });
      });
    });
  };
  if (whole < part.end) {
    const __mmask64 rest = FirstBytes(part.end - whole);
    step(whole, [&](const int8_t* from) ALWAYS_INLINE { return _mm512_maskz_loadu_epi8(rest, from); });
  }
  for (int64_t t = part.begin; t < whole; t += 64) {
    step(t, [](const int8_t* from) ALWAYS_INLINE { return _mm512_loadu_si512(from); });
  }
  // What comes after the loop is no reason to move sums about in it.
  Unroll<M * G>([&](auto i) ALWAYS_INLINE { asm("" : "+v"(acc[i / G][i % G])); });
  // In locals, because a store to c might change *b or part for all the compiler knows.
  int32_t* c = b.c + part.i * kBlockN + part.j;
  const Row* rows = b.rows + part.i;
  const bool adds = part.begin > 0;
  Unroll<(M + 1) / 2>([&](auto pair) ALWAYS_INLINE {
    constexpr int kLow = pair * 2, kHigh = kLow + 1 < M ? kLow + 1 : kLow;
    auto* low = reinterpret_cast<__m256i*>(c + kLow * kBlockN);
    auto* high = reinterpret_cast<__m256i*>(c + kHigh * kBlockN);
    const __m256i before[2] = {adds ? _mm256_load_si256(low) : _mm256_set1_epi32(Correction(rows[kLow])),
                               adds ? _mm256_load_si256(high) : _mm256_set1_epi32(Correction(rows[kHigh]))};
    const __m512i sums = SumLanes(acc[kLow][0], acc[kLow][1], acc[kHigh][0], acc[kHigh][1]);
    _mm256_store_si256(low, _mm256_add_epi32(before[0], _mm512_castsi512_si256(sums)));
    if constexpr (kHigh != kLow) {
      _mm256_store_si256(high, _mm256_add_epi32(before[1], _mm512_extracti64x4_epi64(sums, 1)));
    }
  });
}

using LanesFunction = void (*)(const Block&, const LanesPart&);
constexpr LanesFunction kLanes[2][kLanesM] = {
    {Lanes<1, false>, Lanes<2, false>, Lanes<3, false>, Lanes<4, false>, Lanes<5, false>, Lanes<6, false>,
     Lanes<7, false>, Lanes<8, false>},
    {Lanes<1, true>, Lanes<2, true>, Lanes<3, true>, Lanes<4, true>, Lanes<5, true>, Lanes<6, true>, Lanes<7, true>,
     Lanes<8, true>},
};

// Where Lanes keeps four columns of four rows of weights, in bytes.
inline int32_t KeptAt(int32_t group) {
  const auto g = static_cast<uint32_t>(group), word = g % 16;
  return static_cast<int32_t>(g / 16 * 64 * kLanesN + word % 4 * 64 + word / 4 * 16);
}

// Moves groups of four columns of kLanesN outputs from where they were kept into a panel [group][kBlockN][4].
inline void CopyGroups(const uint8_t* kept, const int32_t* at, int64_t groups, uint8_t* panel) {
  for (int64_t g = 0; g < groups; ++g, panel += kBlockN * 4) {
    const auto* low = reinterpret_cast<const __m128i*>(kept + at[g]);
    const __m256i four = _mm256_castsi128_si256(_mm_load_si128(low));
    _mm256_store_si256(reinterpret_cast<__m256i*>(panel), _mm256_inserti128_si256(four, _mm_load_si128(low + 16), 1));
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_LANES_AVX512_H_
