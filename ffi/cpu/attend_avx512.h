// The functions of attend.h with AVX-512 (F, BW, DQ, VNNI).
//
// Keys lie slot by slot. Squares of 16 slots and 64 dimensions are transposed once for all queries, so that a register
// of sums is one of 16 slots and nothing has to be added up across. Of values the slots lie side by side; there sums go
// along registers, and 16 of those are added up together at the end of a chunk.
#ifndef JAXINT8_FFI_CPU_ATTEND_AVX512_H_
#define JAXINT8_FFI_CPU_ATTEND_AVX512_H_

#include <immintrin.h>

#include "attend_rows.h"
#include "prologue_avx512.h"
#include "rows_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

struct WideRows {
  static void Spread(float* x, int64_t d) {
    for (int64_t i = 0; i < d; i += 16) _mm512_storeu_ps(x + i, SpreadOf16(_mm512_loadu_ps(x + i)));
    for (int64_t span = 16; span < d; span *= 2) {
      for (int64_t i = 0; i < d; i += 2 * span) {
        for (int64_t j = i; j < i + span; j += 16) {
          const __m512 first = _mm512_loadu_ps(x + j), second = _mm512_loadu_ps(x + j + span);
          _mm512_storeu_ps(x + j, _mm512_add_ps(first, second));
          _mm512_storeu_ps(x + j + span, _mm512_sub_ps(first, second));
        }
      }
    }
  }

  static float Encode(const float* x, int64_t d, float limit, int32_t* codes) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < d; i += 16) largest = _mm512_max_epi32(largest, Magnitudes(_mm512_loadu_ps(x + i)));
    const auto absmax = static_cast<uint32_t>(_mm512_reduce_max_epi32(largest));
    const float scale = FromBits(absmax) / limit;
    if (absmax >= kInfinity || scale < kSmallestScale) {
      for (int64_t i = 0; i < d; i += 16) _mm512_storeu_si512(codes + i, _mm512_setzero_si512());
      return absmax < kInfinity ? 1.0f : __builtin_nanf("");
    }
    const __m512 divisor = _mm512_set1_ps(scale);
    const __m512i most = _mm512_set1_epi32(static_cast<int32_t>(limit));
    const __m512i least = _mm512_set1_epi32(-static_cast<int32_t>(limit));
    for (int64_t i = 0; i < d; i += 16) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + i), divisor));
      _mm512_storeu_si512(codes + i, _mm512_max_epi32(_mm512_min_epi32(v, most), least));
    }
    return scale;
  }

 private:
  // Where the other of two is the second, they are added; where it is the first, this one is taken from it.
  ALWAYS_INLINE static __m512 Butterfly(__m512 x, __m512 other, __mmask16 second) {
    return _mm512_add_ps(other, _mm512_mask_xor_ps(x, second, x, _mm512_set1_ps(-0.0f)));
  }
  ALWAYS_INLINE static __m512 SpreadOf16(__m512 x) {
    x = Butterfly(x, _mm512_permute_ps(x, 0xb1), 0xaaaa);
    x = Butterfly(x, _mm512_permute_ps(x, 0x4e), 0xcccc);
    x = Butterfly(x, _mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
    return Butterfly(x, _mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
  }
};

// 16 registers of 16 words.
ALWAYS_INLINE inline void TransposeWords(__m512i (&r)[16]) {
  __m512i t[16];
  UnpackFours(r, t);
  Unroll<4>([&](auto i) ALWAYS_INLINE {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  });
  Unroll<4>([&](auto i) ALWAYS_INLINE {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  });
}

// Word i of the result is the sum of the words of register i.
ALWAYS_INLINE inline __m512i SumsOf16(const __m512i (&r)[16]) {
  __m512i pair[8], four[4], half[2];
  Unroll<8>([&](auto i) ALWAYS_INLINE {
    pair[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]));
  });
  Unroll<4>([&](auto i) ALWAYS_INLINE {
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pair[2 * i], pair[2 * i + 1]),
                               _mm512_unpackhi_epi64(pair[2 * i], pair[2 * i + 1]));
  });
  Unroll<2>([&](auto i) ALWAYS_INLINE {
    half[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0x88),
                               _mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0xdd));
  });
  return _mm512_add_epi32(_mm512_shuffle_i32x4(half[0], half[1], 0x88), _mm512_shuffle_i32x4(half[0], half[1], 0xdd));
}

// Of 16 slots from this one those that are seen.
inline __mmask16 SeenOf(const AttendChunk& c, int64_t slot) {
  return static_cast<__mmask16>(FirstWords(c.end - slot) & ~FirstWords(c.begin - slot));
}

// The scores of all queries, [heads][kChunkSlots], of slots that are not seen anything, and of each query the largest
// and whether some are not finite.
struct Scores {
  alignas(64) float score[kMostQueries][kChunkSlots];
  __m512 most[kMostQueries];
  __mmask16 lost[kMostQueries];
};

template <int64_t kD>
[[gnu::always_inline]] inline void ScoreSlots(const AttendChunk& c, int64_t slot, Scores* to) {
  constexpr int kNotFinite = 0x99;
  __m512i hi[kMostQueries], lo[kMostQueries];
  for (int64_t part = 0; part < kD; part += 64) {
    __m512i key[16];
    // Unsigned, for the multiplication: 128 above the code.
    Unroll<16>([&](auto i) ALWAYS_INLINE {
      key[i] = _mm512_xor_si512(_mm512_loadu_si512(c.keys + (slot + i) * kD + part), _mm512_set1_epi8(-128));
    });
    TransposeWords(key);
    for (int64_t h = 0; h < c.heads; ++h) {
      const int8_t *const high = c.queries[h].hi + part, *const low = c.queries[h].lo + part;
      __m512i sum_hi = part > 0 ? hi[h] : _mm512_setzero_si512(), sum_lo = part > 0 ? lo[h] : _mm512_setzero_si512();
      const auto word = [](const int8_t* bytes) ALWAYS_INLINE {
        int32_t four;
        __builtin_memcpy(&four, bytes, sizeof four);
        return _mm512_set1_epi32(four);
      };
      Unroll<16>([&](auto i) ALWAYS_INLINE {
        sum_hi = _mm512_dpbusd_epi32(sum_hi, key[i], word(high + 4 * i));
        sum_lo = _mm512_dpbusd_epi32(sum_lo, key[i], word(low + 4 * i));
      });
      hi[h] = sum_hi;
      lo[h] = sum_lo;
    }
  }
  const __mmask16 seen = SeenOf(c, slot);
  const __m512 key_scale = _mm512_maskz_loadu_ps(seen, c.key_scale + slot);
  for (int64_t h = 0; h < c.heads; ++h) {
    const __m512i above = _mm512_set1_epi32(128 * c.queries[h].sum);
    const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(hi[h], 7), lo[h]), above);
    const __m512 factor = _mm512_set1_ps(c.queries[h].factor);
    const __m512 score = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor), key_scale);
    to->lost[h] |= _mm512_mask_fpclass_ps_mask(seen, score, kNotFinite);
    to->most[h] = _mm512_mask_max_ps(to->most[h], seen, to->most[h], score);
    _mm512_store_ps(to->score[h] + slot, score);
  }
}

// What scores become: integers, as low and high bytes of 64 slots after 64, zeros where they are not seen.
struct Weights {
  alignas(64) uint8_t lo[kChunkSlots], hi[kChunkSlots];
  float unit;
};

// Replaces the scores of a query by exponentials times scales; false if one is not finite. Slots in steps of 64.
inline bool WeighSlots(const AttendChunk& c, int64_t begin, int64_t end, float most, float* score, Weights* to,
                       float* total) {
  __m512 sum = _mm512_setzero_ps();
  __m512i largest = _mm512_setzero_si512();
  for (int64_t step = begin; step < end; step += 64) {
    __m512 v[4];
    __mmask16 seen[4], kept[4];
    Unroll<4>([&](auto i) ALWAYS_INLINE {
      seen[i] = SeenOf(c, step + 16 * i);
      v[i] = _mm512_sub_ps(_mm512_maskz_loadu_ps(seen[i], score + step + 16 * i), _mm512_set1_ps(most));
      kept[i] = _mm512_mask_cmp_ps_mask(seen[i], v[i], _mm512_set1_ps(kExpLeast), _CMP_GE_OQ);
      v[i] = _mm512_max_ps(v[i], _mm512_set1_ps(kExpLeast));
    });
    ExpWide(v);
    Unroll<4>([&](auto i) ALWAYS_INLINE {
      v[i] = _mm512_maskz_mov_ps(kept[i], v[i]);
      sum = _mm512_add_ps(sum, v[i]);
      const int64_t slot = seen[i] ? step + 16 * i : begin;  // elsewhere the cache may have ended
      v[i] = _mm512_mul_ps(v[i], _mm512_maskz_loadu_ps(seen[i], c.value_scale + slot));
      largest = _mm512_max_epi32(largest, Magnitudes(v[i]));
      _mm512_store_ps(score + step + 16 * i, v[i]);
    });
  }
  alignas(64) float lane[kSumLanes];
  _mm512_store_ps(lane, sum);
  *total = SumOf(lane);
  const auto bits = static_cast<uint32_t>(_mm512_reduce_max_epi32(largest));
  if (bits >= kInfinity) return false;
  const ShareUnit u = ShareUnitOf(FromBits(bits));
  to->unit = u.unit;
  for (int64_t slot = begin; slot < end; slot += 16) {
    const __m512 w = _mm512_mul_ps(_mm512_load_ps(score + slot), _mm512_set1_ps(u.inverse));
    __m512i code = _mm512_max_epi32(_mm512_cvtps_epi32(w), _mm512_setzero_si512());
    code = _mm512_min_epi32(code, _mm512_set1_epi32(static_cast<int32_t>(kMostShare)));
    _mm_store_si128(reinterpret_cast<__m128i*>(to->lo + slot), _mm512_cvtepi32_epi8(code));
    _mm_store_si128(reinterpret_cast<__m128i*>(to->hi + slot), _mm512_cvtepi32_epi8(_mm512_srli_epi32(code, 8)));
  }
  return true;
}

// y[16] of 16 dimensions of values.
[[gnu::always_inline]] inline void AddValues(const AttendChunk& c, int64_t begin, int64_t end, const Weights& w,
                                             const int8_t* values, float* y) {
  __m512i sum[16];
  Unroll<2>([&](auto half) ALWAYS_INLINE {
    __m512i hi[8], lo[8];
    Unroll<8>([&](auto i) ALWAYS_INLINE { hi[i] = lo[i] = _mm512_setzero_si512(); });
    const int8_t* const rows = values + half * 8 * c.stride;
    for (int64_t step = begin; step < end; step += 64) {
      const __mmask64 there = FirstBytes(c.count - step);  // of the last row the cache may end before
      const __m512i high = _mm512_load_si512(w.hi + step), low = _mm512_load_si512(w.lo + step);
      Unroll<8>([&](auto i) ALWAYS_INLINE {
        const __m512i v = _mm512_maskz_loadu_epi8(there, rows + i * c.stride + step);
        hi[i] = _mm512_dpbusd_epi32(hi[i], high, v);
        lo[i] = _mm512_dpbusd_epi32(lo[i], low, v);
      });
    }
    Unroll<8>([&](auto i) ALWAYS_INLINE { sum[half * 8 + i] = _mm512_add_epi32(_mm512_slli_epi32(hi[i], 8), lo[i]); });
  });
  _mm512_storeu_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(SumsOf16(sum)), _mm512_set1_ps(w.unit)));
}

template <int64_t kD>
inline void AttendToChunkOf(const AttendChunk& c) {
  Scores scores;
  for (int64_t h = 0; h < c.heads; ++h) {
    scores.most[h] = _mm512_set1_ps(-__builtin_inff());
    scores.lost[h] = 0;
  }
  const int64_t begin = c.begin / 64 * 64, end = Padded(c.end);
  // Values are asked for while keys are multiplied: lines of many rows, which no processor would guess.
  int64_t row = 0;
  for (int64_t slot = c.begin / 16 * 16; slot < c.end; slot += 16) {
    for (const int64_t last = row + kD / 16; row < last; ++row) {
      for (int64_t line = begin; line < c.end; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(c.values + row % kD * c.stride + line), _MM_HINT_T0);
      }
    }
    ScoreSlots<kD>(c, slot, &scores);
  }
  Weights weights;
  for (int64_t h = 0; h < c.heads; ++h) {
    ValueShare& share = c.shares[h];
    share.most = _mm512_reduce_max_ps(scores.most[h]);
    if (scores.lost[h] || !WeighSlots(c, begin, end, share.most, scores.score[h], &weights, &share.sum)) {
      Lose(kD, &share);
      continue;
    }
    for (int64_t i = 0; i < kD; i += 16) AddValues(c, begin, end, weights, c.values + i * c.stride, share.y + i);
  }
}

void AttendToChunkWide(const AttendChunk& c) {
  if (c.d == 64) return AttendToChunkOf<64>(c);
  AttendToChunkOf<128>(c);
}

constexpr AttendFunctions kAttendWide = {EnterToken<WideRows>, AttendToChunkWide, JoinShares};

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ATTEND_AVX512_H_
