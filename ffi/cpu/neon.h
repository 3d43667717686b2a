// What the NEON rungs share: four int32 in a register, dot products of signed bytes. No operand is unsigned here, so
// nothing is flipped and nothing corrected.
#ifndef JAXINT8_FFI_CPU_NEON_H_
#define JAXINT8_FFI_CPU_NEON_H_

#include <arm_neon.h>

#include <cstdint>

#include "int8.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

struct Neon {
  using Sums = int32x4_t;
  using Weights = int8x16_t;
  using Codes = int8x16_t;
  using Packed = int8x16_t;
  static constexpr bool kOffset = false;
  static constexpr int kLanes32 = 4, kBytes = 16, kDot = 16, kDotsMost = kSmallM, kDenseN = 8, kCodeBytes = 16;
  static constexpr int kDotsTeam = 4, kDotsN[4] = {8, 8, 4, 4};
  static constexpr int64_t kPanelK = 1024;

  static Sums Zero() { return vdupq_n_s32(0); }
  static Sums Add(Sums a, Sums b) { return vaddq_s32(a, b); }
  static Sums Shift7(Sums a) { return vshlq_n_s32(a, 7); }
  static Sums LoadSums(const int32_t* c) { return vld1q_s32(c); }
  static void StoreSums(int32_t* c, Sums a) { vst1q_s32(c, a); }
  static void AddTo(int32_t* c, Sums a) { StoreSums(c, Add(LoadSums(c), a)); }
  static int8x16_t LoadWeights(const int8_t* w) { return vld1q_s8(w); }
  static int8x16_t LoadCodes(const int8_t* x) { return vld1q_s8(x); }
  static int8x16_t LoadRow(const int8_t* w) { return vld1q_s8(w); }
  static int8x16_t LoadPacked(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
  static int8x16_t LoadTileCodes(const uint8_t* p) { return LoadPacked(p); }
  static void StorePacked(uint8_t* p, int8x16_t a) { vst1q_u8(p, vreinterpretq_u8_s8(a)); }
  static Sums MulAdd(Sums sum, int8x16_t w, int8x16_t x) { return vdotq_s32(sum, w, x); }
  static Sums MulAddWords(Sums sum, const uint8_t* words, uint32_t four) {
    return vdotq_s32(sum, LoadPacked(words), vreinterpretq_s8_u32(vdupq_n_u32(four)));
  }
  static void Sum4(Sums a, Sums b, Sums c, Sums d, int32_t* out) {
    AddTo(out, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
  }
  static int32_t Sum(Sums a) { return vaddvq_s32(a); }
};

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_NEON_H_
