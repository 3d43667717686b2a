// The functions of attend.h with registers of 256 bits (AVX2, AVX-VNNI): products of pairs of 16-bit integers.
//
// Keys and values are widened as they are read, and the query's codes have 16 bits already. So have weights of slots,
// less 2^15: what that takes off is 2^15 times the sum of a dimension's values, which serves all queries.
#ifndef JAXINT8_FFI_CPU_ATTEND_AVX256_H_
#define JAXINT8_FFI_CPU_ATTEND_AVX256_H_

#include <immintrin.h>

#include "attend_rows.h"
#include "avx256.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

// Word i of the result is the sum of the words of register i.
ALWAYS_INLINE inline __m256i SumsOf8(const __m256i (&r)[8]) {
  const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(r[0], r[1]), _mm256_hadd_epi32(r[2], r[3]));
  const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(r[4], r[5]), _mm256_hadd_epi32(r[6], r[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

ALWAYS_INLINE inline __m256i MagnitudesOf8(__m256 x) {
  return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(static_cast<int32_t>(kMagnitude)));
}

inline uint32_t LargestOf8(__m256i words) {
  alignas(32) uint32_t word[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(word), words);
  for (int i = 1; i < 8; ++i) word[0] = word[i] > word[0] ? word[i] : word[0];
  return word[0];
}

// Of eight slots from this one those that are seen.
ALWAYS_INLINE inline __m256 SeenOf8(const AttendChunk& c, int64_t slot) {
  const __m256i at =
      _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(slot)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(c.begin)), at);
  const __m256i not_after = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(c.end)), at);
  return _mm256_castsi256_ps(_mm256_andnot_si256(before, not_after));
}

// As Exp of prologue.h, operation by operation.
ALWAYS_INLINE inline __m256 Exp8(__m256 x) {
  const auto all = [](float v) ALWAYS_INLINE { return _mm256_set1_ps(v); };
  const __m256 power = _mm256_sub_ps(_mm256_add_ps(_mm256_mul_ps(x, all(kExpLog2e)), all(12582912.0f)),
                                     all(12582912.0f));  // as Round
  const __m256 r =
      _mm256_sub_ps(_mm256_sub_ps(x, _mm256_mul_ps(power, all(kExpLn2[0]))), _mm256_mul_ps(power, all(kExpLn2[1])));
  __m256 p = all(kExpPolynomial[0]);
  for (int i = 1; i < 6; ++i) p = _mm256_add_ps(_mm256_mul_ps(p, r), all(kExpPolynomial[i]));
  const __m256 y = _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), r), all(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(power), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
}

// The scores of all queries, of slots that are not seen anything, and of each query the largest, and the largest
// magnitude, which tells whether all are finite.
struct Scores8 {
  alignas(32) float score[kMostQueries][kChunkSlots];
  __m256 most[kMostQueries];
  __m256i largest[kMostQueries];
};

template <class Isa, int64_t kD>
inline void ScoreSlots8(const AttendChunk& c, int64_t slot, Scores8* to) {
  __m256i part[kMostQueries][8];
  for (int i = 0; i < 8; ++i) {
    const int8_t* key = c.keys + (slot + i) * kD;
    __m256i wide[kD / 16];
    Unroll<kD / 16>([&](auto j) ALWAYS_INLINE { wide[j] = Isa::Widen(key + 16 * j); });
    for (int64_t h = 0; h < c.heads; ++h) {
      __m256i sum = _mm256_setzero_si256();
      Unroll<kD / 16>(
          [&](auto j) ALWAYS_INLINE { sum = Isa::MulAddPairs(sum, wide[j], Isa::Load(c.queries[h].code + 16 * j)); });
      part[h][i] = sum;
    }
  }
  const __m256 seen = SeenOf8(c, slot), key_scale = _mm256_loadu_ps(c.key_scale + slot);
  for (int64_t h = 0; h < c.heads; ++h) {
    const __m256 sum = _mm256_cvtepi32_ps(SumsOf8(part[h]));
    const __m256 score = _mm256_mul_ps(_mm256_mul_ps(sum, _mm256_set1_ps(c.queries[h].factor)), key_scale);
    to->largest[h] = _mm256_max_epi32(to->largest[h], MagnitudesOf8(_mm256_and_ps(score, seen)));
    const __m256 among = _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), score, seen);
    to->most[h] = _mm256_max_ps(among, to->most[h]);
    _mm256_store_ps(to->score[h] + slot, score);
  }
}

// What scores become: integers less 2^15, and so -2^15 where they are not seen.
struct Weights16 {
  alignas(32) int16_t code[kChunkSlots];
  float unit;
};

// Replaces the scores of a query by exponentials times scales; false if one is not finite. Slots in steps of 32.
inline bool WeighSlots8(const AttendChunk& c, int64_t begin, int64_t end, float most, float* score, Weights16* to,
                        float* total) {
  __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  __m256i largest = _mm256_setzero_si256();
  for (int64_t step = begin; step < end; step += 16) {
    Unroll<2>([&](auto i) ALWAYS_INLINE {
      const int64_t slot = step + 8 * i;
      const __m256 seen = SeenOf8(c, slot), least = _mm256_set1_ps(kExpLeast);
      const __m256 x = _mm256_sub_ps(_mm256_load_ps(score + slot), _mm256_set1_ps(most));
      const __m256 kept = _mm256_and_ps(seen, _mm256_cmp_ps(x, least, _CMP_GE_OQ));
      const __m256 e = _mm256_and_ps(kept, Exp8(_mm256_max_ps(_mm256_and_ps(x, seen), least)));
      sum[i] = _mm256_add_ps(sum[i], e);
      const __m256 v = _mm256_mul_ps(e, _mm256_and_ps(seen, _mm256_loadu_ps(c.value_scale + slot)));
      largest = _mm256_max_epi32(largest, MagnitudesOf8(v));
      _mm256_store_ps(score + slot, v);
    });
  }
  alignas(32) float lane[kSumLanes];
  Unroll<2>([&](auto i) ALWAYS_INLINE { _mm256_store_ps(lane + 8 * i, sum[i]); });
  *total = SumOf(lane);
  const uint32_t bits = LargestOf8(largest);
  if (bits >= kInfinity) return false;
  const ShareUnit u = ShareUnitOf(FromBits(bits));
  to->unit = u.unit;
  for (int64_t step = begin; step < end; step += 16) {
    __m256i code[2];
    Unroll<2>([&](auto i) ALWAYS_INLINE {
      const __m256 w = _mm256_mul_ps(_mm256_load_ps(score + step + 8 * i), _mm256_set1_ps(u.inverse));
      const __m256i v = _mm256_max_epi32(_mm256_cvtps_epi32(w), _mm256_setzero_si256());
      code[i] = _mm256_sub_epi32(v, _mm256_set1_epi32(1 << 15));
    });
    // Saturated to 2^15 - 1, which is the largest weight; each half has four of either.
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(code[0], code[1]), 0xd8);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to->code + step), both);
  }
  return true;
}

// Sums of dimensions over slots, in steps of 32.
template <int64_t kD>
inline void SumValues(const AttendChunk& c, int64_t begin, int64_t end, int32_t* sums) {
  const __m256i above = _mm256_set1_epi32(static_cast<int32_t>(128 * (end - begin)));
  for (int64_t i = 0; i < kD; i += 8) {
    __m256i sum[8];
    Unroll<8>([&](auto r) ALWAYS_INLINE { sum[r] = _mm256_setzero_si256(); });
    for (int64_t slot = begin; slot < end; slot += 32) {
      Unroll<8>([&](auto r) ALWAYS_INLINE {
        const __m256i v = Avx256::Load(c.values + (i + r) * c.stride + slot);
        const __m256i raised = _mm256_xor_si256(v, _mm256_set1_epi8(-128));
        sum[r] = _mm256_add_epi32(sum[r], _mm256_sad_epu8(raised, _mm256_setzero_si256()));
      });
    }
    Avx256::StoreSums(sums + i, _mm256_sub_epi32(SumsOf8(sum), above));
  }
}

// y of all dimensions.
template <class Isa, int64_t kD>
inline void AddValues16(const AttendChunk& c, int64_t begin, int64_t end, const Weights16& w, const int32_t* sums,
                        float* y) {
  for (int64_t i = 0; i < kD; i += 8) {
    __m256i sum[8];
    Unroll<8>([&](auto r) ALWAYS_INLINE { sum[r] = _mm256_setzero_si256(); });
    const int8_t* values = c.values + i * c.stride;
    for (int64_t slot = begin; slot < end; slot += 16) {
      const __m256i code = Isa::Load(w.code + slot);
      Unroll<8>([&](auto r) ALWAYS_INLINE {
        sum[r] = Isa::MulAddPairs(sum[r], Isa::Widen(values + r * c.stride + slot), code);
      });
    }
    const __m256i whole = _mm256_add_epi32(SumsOf8(sum), _mm256_slli_epi32(Isa::LoadSums(sums + i), 15));
    _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(w.unit)));
  }
}

template <class Isa, int64_t kD>
inline void AttendToChunk256(const AttendChunk& c) {
  Scores8 scores;
  for (int64_t h = 0; h < c.heads; ++h) {
    scores.most[h] = _mm256_set1_ps(-__builtin_inff());
    scores.largest[h] = _mm256_setzero_si256();
  }
  const int64_t begin = c.begin / 32 * 32, end = (c.end + 31) / 32 * 32;
  // Values are asked for while keys are multiplied: lines of many rows, which no processor would guess.
  int64_t row = 0;
  for (int64_t slot = c.begin / 8 * 8; slot < c.end; slot += 8) {
    for (const int64_t last = row + kD / 32; row < last && row < kD; ++row) {
      for (int64_t line = begin; line < c.end; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(c.values + row * c.stride + line), _MM_HINT_T0);
      }
    }
    ScoreSlots8<Isa, kD>(c, slot, &scores);
  }
  alignas(32) int32_t sums[kD];
  SumValues<kD>(c, begin, end, sums);
  Weights16 weights;
  for (int64_t h = 0; h < c.heads; ++h) {
    ValueShare& share = c.shares[h];
    alignas(32) float most[8];
    _mm256_store_ps(most, scores.most[h]);
    share.most = most[0];
    for (int i = 1; i < 8; ++i) share.most = most[i] > share.most ? most[i] : share.most;
    if (LargestOf8(scores.largest[h]) >= kInfinity ||
        !WeighSlots8(c, begin, end, share.most, scores.score[h], &weights, &share.sum)) {
      Lose(kD, &share);
      continue;
    }
    AddValues16<Isa, kD>(c, begin, end, weights, sums, share.y);
  }
}

template <class Isa>
void AttendToChunk256(const AttendChunk& c) {
  if (c.d == 64) return AttendToChunk256<Isa, 64>(c);
  AttendToChunk256<Isa, 128>(c);
}

template <class Isa>
constexpr AttendFunctions kAttend256 = {EnterToken<PlainRows>, AttendToChunk256<Isa>, JoinShares};

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ATTEND_AVX256_H_
