// The products of attend_vectors.h with registers of 256 bits (AVX2, AVX-VNNI): pairs of 16-bit integers.
//
// Keys and values are widened as they are read, and the query's codes have 16 bits already. So have weights of slots,
// less 2^15: what that takes off is 2^15 times the sum of a dimension's values, which serves all queries.
#ifndef JAXINT8_FFI_CPU_ATTEND_AVX256_H_
#define JAXINT8_FFI_CPU_ATTEND_AVX256_H_

#include <immintrin.h>

#include "attend_vectors.h"
#include "avx256.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

template <class Isa>
struct Attend256 {
  using Floats = __m256;
  typedef int32_t Words __attribute__((vector_size(32)));
  static constexpr int kLanes = 8;

  struct Weights {
    alignas(32) int16_t code[kChunkSlots];  // less 2^15
    float unit;
  };

  template <int64_t kD>
  static void Score(const AttendChunk& c, int64_t slot, Words* sums) {
    __m256i part[kMostQueries][8];
    for (int i = 0; i < 8; ++i) {
      const int8_t* key = c.keys + (slot + i) * kD;
      __m256i wide[kD / 16];
      Unroll<kD / 16>([&](auto j) ALWAYS_INLINE { wide[j] = Isa::Widen(key + 16 * j); });
      for (int64_t h = 0; h < c.heads; ++h) {
        const int16_t* query = c.queries[h].code;
        __m256i sum = Isa::Zero();
        Unroll<kD / 16>([&](auto j) ALWAYS_INLINE { sum = Isa::MulAddPairs(sum, wide[j], Isa::Load(query + 16 * j)); });
        part[h][i] = sum;
      }
    }
    for (int64_t h = 0; h < c.heads; ++h) sums[h] = (Words)SumsOf(part[h]);
  }

  // Beyond 2^15 - 1, which is the largest weight, saturated. Each half of what is packed has four of either.
  static void Store(const Words (&code)[2], int64_t slot, Weights* to) {
    const __m256i least = _mm256_set1_epi32(1 << 15);
    const __m256i low = _mm256_sub_epi32((__m256i)code[0], least), high = _mm256_sub_epi32((__m256i)code[1], least);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to->code + slot), both);
  }

  template <int64_t kD>
  static void Sum(const AttendChunk& c, int64_t begin, int64_t end, int32_t* sums) {
    const __m256i above = _mm256_set1_epi32(static_cast<int32_t>(128 * (end - begin)));
    for (int64_t i = 0; i < kD; i += 8) {
      __m256i sum[8];
      Unroll<8>([&](auto r) ALWAYS_INLINE { sum[r] = Isa::Zero(); });
      for (int64_t slot = begin; slot < end; slot += 32) {
        Unroll<8>([&](auto r) ALWAYS_INLINE {
          const __m256i raised =
              _mm256_xor_si256(Isa::Load(c.values + (i + r) * c.stride + slot), _mm256_set1_epi8(-128));
          sum[r] = Isa::Add(sum[r], _mm256_sad_epu8(raised, Isa::Zero()));
        });
      }
      Isa::StoreSums(sums + i, _mm256_sub_epi32(SumsOf(sum), above));
    }
  }

  template <int64_t kD>
  static void Add(const AttendChunk& c, int64_t begin, int64_t end, const Weights& w, const int32_t* sums, float* y) {
    for (int64_t i = 0; i < kD; i += 8) {
      __m256i sum[8];
      Unroll<8>([&](auto r) ALWAYS_INLINE { sum[r] = Isa::Zero(); });
      const int8_t* values = c.values + i * c.stride;
      for (int64_t slot = begin; slot < end; slot += 16) {
        const __m256i code = Isa::Load(w.code + slot);
        Unroll<8>([&](auto r) ALWAYS_INLINE {
          sum[r] = Isa::MulAddPairs(sum[r], Isa::Widen(values + r * c.stride + slot), code);
        });
      }
      const __m256i whole = Isa::Add(SumsOf(sum), _mm256_slli_epi32(Isa::LoadSums(sums + i), 15));
      _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(w.unit)));
    }
  }

 private:
  // Word i of the result is the sum of the words of register i.
  ALWAYS_INLINE static __m256i SumsOf(const __m256i (&r)[8]) {
    const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(r[0], r[1]), _mm256_hadd_epi32(r[2], r[3]));
    const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(r[4], r[5]), _mm256_hadd_epi32(r[6], r[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
  }
};

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ATTEND_AVX256_H_
