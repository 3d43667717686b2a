// What stands before a layer (prologue.h), with AVX-512 (F, DQ): about half of the cycles of the compiled loops.
//
// An exponential is a chain of some 30 dependent operations. A loop over registers of 16 fills the processor's queues
// with waiting ones before it has work for all units, so four registers go through each step side by side.
#ifndef JAXINT8_FFI_CPU_PROLOGUE_AVX512_H_
#define JAXINT8_FFI_CPU_PROLOGUE_AVX512_H_

#include <immintrin.h>

#include "prologue.h"
#include "rows_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

// Calls f(first column, masks of four registers) for all k columns.
template <typename F>
[[gnu::always_inline]] inline void ForEach64(int64_t k, const F& f) {
  __mmask16 mask[4];
  Unroll<4>([&](auto i) ALWAYS_INLINE { mask[i] = 0xffff; });
  int64_t t = 0;
  for (; t + 64 <= k; t += 64) f(t, mask);
  if (t == k) return;
  Unroll<4>([&](auto i) ALWAYS_INLINE { mask[i] = FirstWords(k - t - i * 16); });
  f(t, mask);
}

// Four registers of a row; zeros beyond its end.
template <Type kType>
[[gnu::always_inline]] inline void Load64(const void* x, int64_t t, const __mmask16 (&mask)[4], __m512 (&v)[4]) {
  Unroll<4>([&](auto i) ALWAYS_INLINE { v[i] = LoadFloats<kType>(x, mask[i] ? t + i * 16 : 0, mask[i]); });
}

// Sum over the row of Round(x * inverse)^2. Squares stay below 2^44, so 256 of them are exact in a double.
template <Type kType>
inline int64_t SumOfRoundedSquares(const void* x, int64_t k, float inverse) {
  const __m512 scale = _mm512_set1_ps(inverse);
  __m512i total = _mm512_setzero_si512();
  for (int64_t begin = 0; begin < k; begin += 256 * 64) {
    const int64_t end = begin + 256 * 64 < k ? begin + 256 * 64 : k;
    __m512d sum[8];
    Unroll<8>([&](auto i) ALWAYS_INLINE { sum[i] = _mm512_setzero_pd(); });
    ForEach64(end - begin, [&](int64_t t, const __mmask16(&mask)[4]) ALWAYS_INLINE {
      __m512 v[4];
      Load64<kType>(x, begin + t, mask, v);
      Unroll<4>([&](auto i) ALWAYS_INLINE {
        const __m512 q =
            _mm512_roundscale_ps(_mm512_mul_ps(v[i], scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(q));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(q, 1));
        sum[2 * i] = _mm512_fmadd_pd(low, low, sum[2 * i]);
        sum[2 * i + 1] = _mm512_fmadd_pd(high, high, sum[2 * i + 1]);
      });
    });
    Unroll<8>([&](auto i) ALWAYS_INLINE { total = _mm512_add_epi64(total, _mm512_cvtpd_epi64(sum[i])); });
  }
  return _mm512_reduce_add_epi64(total);
}

template <Type kType>
inline float NormScaleWide(const void* x, int64_t k, float epsilon) {
  __m512i maxima[4];
  Unroll<4>([&](auto i) ALWAYS_INLINE { maxima[i] = _mm512_setzero_si512(); });
  ForEach64(k, [&](int64_t t, const __mmask16(&mask)[4]) ALWAYS_INLINE {
    __m512 v[4];
    Load64<kType>(x, t, mask, v);
    Unroll<4>([&](auto i) ALWAYS_INLINE { maxima[i] = _mm512_max_epi32(maxima[i], Magnitudes(v[i])); });
  });
  const uint32_t largest = Largest(maxima);
  if (largest >= kInfinity) return __builtin_nanf("");
  if (FromBits(largest) < kSmallestNorm) return NormScaleOf(0, k, 1.0f, epsilon);
  const NormUnit u = NormUnitOf(largest);
  return NormScaleOf(SumOfRoundedSquares<kType>(x, k, u.inverse), k, u.unit, epsilon);
}

template <Type kType>
inline void RmsNormWide(const void* x, int64_t k, float epsilon, const float* weight, void* row) {
  const __m512 scale = _mm512_set1_ps(NormScaleWide<kType>(x, k, epsilon));
  ForEach64(k, [&](int64_t t, const __mmask16(&mask)[4]) ALWAYS_INLINE {
    __m512 v[4];
    Load64<kType>(x, t, mask, v);
    Unroll<4>([&](auto i) ALWAYS_INLINE {
      const int64_t at = mask[i] ? t + i * 16 : 0;
      const __m512 w = _mm512_maskz_loadu_ps(mask[i], weight + at);
      StoreFloats<kType>(_mm512_mul_ps(_mm512_mul_ps(v[i], scale), w), row, at, mask[i]);
    });
  });
}

// v = Exp(v) of four registers within the bounds.
[[gnu::always_inline]] inline void ExpWide(__m512 (&v)[4]) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const auto times = [](__m512 a, float b) ALWAYS_INLINE { return _mm512_mul_ps(a, _mm512_set1_ps(b)); };
  __m512 power[4], r[4], p[4];
  Unroll<4>([&](auto i) ALWAYS_INLINE { power[i] = _mm512_roundscale_ps(times(v[i], kExpLog2e), kNearest); });
  Unroll<4>([&](auto i) ALWAYS_INLINE { r[i] = _mm512_sub_ps(v[i], times(power[i], kExpLn2[0])); });
  Unroll<4>([&](auto i) ALWAYS_INLINE { r[i] = _mm512_sub_ps(r[i], times(power[i], kExpLn2[1])); });
  Unroll<4>([&](auto i) ALWAYS_INLINE { p[i] = _mm512_set1_ps(kExpPolynomial[0]); });
  Unroll<5>([&](auto step) ALWAYS_INLINE {
    const __m512 next = _mm512_set1_ps(kExpPolynomial[step + 1]);
    Unroll<4>([&](auto i) ALWAYS_INLINE { p[i] = _mm512_add_ps(_mm512_mul_ps(p[i], r[i]), next); });
  });
  Unroll<4>([&](auto i) ALWAYS_INLINE { p[i] = _mm512_add_ps(_mm512_mul_ps(p[i], _mm512_mul_ps(r[i], r[i])), r[i]); });
  Unroll<4>([&](auto i) ALWAYS_INLINE {
    const __m512i y = _mm512_castps_si512(_mm512_add_ps(p[i], _mm512_set1_ps(1.0f)));
    v[i] = _mm512_castsi512_ps(_mm512_add_epi32(y, _mm512_slli_epi32(_mm512_cvtps_epi32(power[i]), 23)));
  });
}

template <Type kType>
inline void SiluGateWide(const void* x, int64_t k, void* row) {
  const __m512 one = _mm512_set1_ps(1.0f), least = _mm512_set1_ps(kExpLeast), most = _mm512_set1_ps(kExpMost);
  const __m512 sign = _mm512_set1_ps(-0.0f);
  ForEach64(k, [&](int64_t t, const __mmask16(&mask)[4]) ALWAYS_INLINE {
    __m512 gate[4], v[4];
    Load64<kType>(x, t, mask, gate);
    // Of a NaN these take the bound, the second operand; the gate itself carries it on.
    Unroll<4>([&](auto i)
                  ALWAYS_INLINE { v[i] = _mm512_min_ps(_mm512_max_ps(_mm512_xor_ps(gate[i], sign), least), most); });
    ExpWide(v);
    Unroll<4>([&](auto i) ALWAYS_INLINE { v[i] = _mm512_div_ps(one, _mm512_add_ps(one, v[i])); });
    Load64<kType>(x, t, mask, gate);  // again, for they do not stay in registers
    __m512 up[4];
    Load64<kType>(x, k + t, mask, up);
    Unroll<4>([&](auto i) ALWAYS_INLINE {
      const __m512 y = _mm512_mul_ps(_mm512_mul_ps(gate[i], v[i]), up[i]);
      StoreFloats<kType>(y, row, mask[i] ? t + i * 16 : 0, mask[i]);
    });
  });
}

template <Type kType>
inline void EnterWideAs(const Prologue& p, const void* x, int64_t k, void* row) {
  if (p.kind == Prologue::Kind::kSiluGate) return SiluGateWide<kType>(x, k, row);
  RmsNormWide<kType>(x, k, p.epsilon, p.norm, row);
}

// EnterRow of prologue.h, but for what bits a NaN has.
void EnterRowWide(const Prologue& p, Type type, const void* x, int64_t k, void* row) {
  switch (type) {
    case Type::kBF16:
      return EnterWideAs<Type::kBF16>(p, x, k, row);
    case Type::kF16:
      return EnterWideAs<Type::kF16>(p, x, k, row);
    default:
      return EnterWideAs<Type::kF32>(p, x, k, row);
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_PROLOGUE_AVX512_H_
