// The products of attend_vectors.h with NEON's dot products of signed bytes.
//
// A query is its high and low bytes, and so is a weight, each less 128: what that takes off is 128 * 257 times the sum
// of a dimension's values, which serves all queries.
#ifndef JAXINT8_FFI_CPU_ATTEND_NEON_H_
#define JAXINT8_FFI_CPU_ATTEND_NEON_H_

#include <arm_neon.h>

#include "attend_vectors.h"
#include "neon.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

struct AttendNeon {
  using Floats = float32x4_t;
  using Words = int32x4_t;
  static constexpr int kLanes = 4;

  struct Weights {
    int8_t lo[kChunkSlots], hi[kChunkSlots];  // less 128
    float unit;
  };

  template <int64_t kD>
  static void Score(const AttendChunk& c, int64_t slot, Words* sums) {
    int32x4_t part[kMostQueries][4];
    for (int i = 0; i < 4; ++i) {
      const int8_t* from = c.keys + (slot + i) * kD;
      int8x16_t key[kD / 16];
      Unroll<kD / 16>([&](auto j) ALWAYS_INLINE { key[j] = vld1q_s8(from + 16 * j); });
      for (int64_t h = 0; h < c.heads; ++h) {
        const Query& query = c.queries[h];
        int32x4_t hi = Neon::Zero(), lo = Neon::Zero();
        Unroll<kD / 16>([&](auto j) ALWAYS_INLINE {
          hi = vdotq_s32(hi, key[j], vld1q_s8(query.hi + 16 * j));
          lo = vdotq_s32(lo, key[j], vld1q_s8(query.lo + 16 * j));
        });
        part[h][i] = vaddq_s32(Neon::Shift7(hi), lo);
      }
    }
    for (int64_t h = 0; h < c.heads; ++h) sums[h] = SumsOf(part[h]);
  }

  static void Store(const Words (&code)[4], int64_t slot, Weights* to) {
    const auto halves = [](int32x4_t a, int32x4_t b)
                            ALWAYS_INLINE { return vreinterpretq_s8_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))); };
    const int8x16_t first = halves(code[0], code[1]), second = halves(code[2], code[3]), less = vdupq_n_s8(-128);
    vst1q_s8(to->lo + slot, veorq_s8(vuzp1q_s8(first, second), less));
    vst1q_s8(to->hi + slot, veorq_s8(vuzp2q_s8(first, second), less));
  }

  template <int64_t kD>
  static void Sum(const AttendChunk& c, int64_t begin, int64_t end, int32_t* sums) {
    for (int64_t i = 0; i < kD; i += 4) {
      int32x4_t sum[4];
      Unroll<4>([&](auto r) ALWAYS_INLINE { sum[r] = Neon::Zero(); });
      for (int64_t slot = begin; slot < end; slot += 16) {
        Unroll<4>([&](auto r) ALWAYS_INLINE {
          sum[r] = vdotq_s32(sum[r], vld1q_s8(c.values + (i + r) * c.stride + slot), vdupq_n_s8(1));
        });
      }
      Neon::StoreSums(sums + i, SumsOf(sum));
    }
  }

  template <int64_t kD>
  static void Add(const AttendChunk& c, int64_t begin, int64_t end, const Weights& w, const int32_t* sums, float* y) {
    for (int64_t i = 0; i < kD; i += 8) {
      int32x4_t hi[8], lo[8];
      Unroll<8>([&](auto r) ALWAYS_INLINE { hi[r] = lo[r] = Neon::Zero(); });
      const int8_t* values = c.values + i * c.stride;
      for (int64_t slot = begin; slot < end; slot += 16) {
        const int8x16_t high = vld1q_s8(w.hi + slot), low = vld1q_s8(w.lo + slot);
        Unroll<8>([&](auto r) ALWAYS_INLINE {
          const int8x16_t v = vld1q_s8(values + r * c.stride + slot);
          hi[r] = vdotq_s32(hi[r], v, high);
          lo[r] = vdotq_s32(lo[r], v, low);
        });
      }
      Unroll<2>([&](auto half) ALWAYS_INLINE {
        int32x4_t sum[4];
        Unroll<4>([&](auto r)
                      ALWAYS_INLINE { sum[r] = vaddq_s32(vshlq_n_s32(hi[4 * half + r], 8), lo[4 * half + r]); });
        const int32x4_t whole = vmlaq_n_s32(SumsOf(sum), Neon::LoadSums(sums + i + 4 * half), 128 * 257);
        vst1q_f32(y + i + 4 * half, vmulq_n_f32(vcvtq_f32_s32(whole), w.unit));
      });
    }
  }

 private:
  // Word i of the result is the sum of the words of register i.
  static int32x4_t SumsOf(const int32x4_t (&r)[4]) {
    return vpaddq_s32(vpaddq_s32(r[0], r[1]), vpaddq_s32(r[2], r[3]));
  }
};

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ATTEND_NEON_H_
