// Arithmetic that every row function shares: constants of the law, conversions, the scale of a row.
//
// Included by each rung in its own translation unit with its own instruction set, so everything here is in an unnamed
// namespace and nothing from the C++ library is used: a template or inline function instantiated in such a unit would
// be shared by the linker with code that must run on older machines.
#ifndef JAXINT8_FFI_CPU_ROW_MATH_H_
#define JAXINT8_FFI_CPU_ROW_MATH_H_

#include <cstdint>
#include <cstring>

#include "int8.h"

namespace jaxint8::cpu {
namespace {

constexpr float kCodeMax = 127;
constexpr int32_t kOutlierCodeMax = 127 * 128;
// 127 * sum(|codes of a row|) must stay below 2^31.
constexpr int64_t kSumOfCodesMax = ((int64_t{1} << 31) - 1) / 127;
// Below this a row counts as zero. It is twice the smallest normal number, so that no backend that flushes subnormals
// can see another row.
constexpr float kSmallestScale = 0x1p-125f;
constexpr float kRmsLevels = 4095;
constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint32_t kMagnitude = 0x7fffffff;
inline uint32_t Bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float FromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t Magnitude(float x) { return Bits(x) & kMagnitude; }

// The largest magnitude, as a bit pattern (they order as integers); above kInfinity if any value is NaN.
inline uint32_t AbsMax(const float* x, int64_t k) {
  int32_t largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    const int32_t a = static_cast<int32_t>(Magnitude(x[i]));
    largest = a > largest ? a : largest;
  }
  return static_cast<uint32_t>(largest);
}

// Round half to even for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
inline float Round(float x) { return (x + 12582912.0f) - 12582912.0f; }

// Exact. The exponent is moved by a multiplication, which also normalises subnormals.
inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  const uint32_t scaled = Bits(FromBits(rest) * 0x1p112f);
  const uint32_t bits = (h & 0x7c00) == 0x7c00 ? (rest | kInfinity) : scaled;
  return FromBits(sign | bits);
}

// Rounds half to even. Subnormal results: adding 0.5 puts the unit of 2^-24 at the last place of the sum.
inline uint16_t FloatToHalf(float x) {
  const uint32_t sign = (Bits(x) >> 16) & 0x8000;
  const uint32_t a = Magnitude(x);
  const uint32_t subnormal = Bits(FromBits(a) + 0.5f) - Bits(0.5f);
  const uint32_t normal = (a - (uint32_t{112} << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  uint32_t h = a < (uint32_t{113} << 23) ? subnormal : normal;
  h = a >= (uint32_t{143} << 23) ? 0x7c00 : h;  // 2^16 and above; rounding up to 2^16 carries to infinity by itself
  h = a > kInfinity ? 0x7e00 : h;
  return static_cast<uint16_t>(sign | h);
}

inline uint16_t FloatToBFloat(float x) {
  const uint32_t bits = Bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & kMagnitude) > kInfinity ? (bits >> 16) | 0x40 : rounded);
}

// How close to a tie a reciprocal product may come before a step is divided again. Let t = x / d exactly, |t| <= limit,
// q = fl(x * fl(1 / d)) and f = fl(t). Each rounding is at most 2^-24 relative, so |q - t| < 2^-23 (1 + 2^-24) |t| and
// |f - t| <= 2^-24 |t|. Ties are representable and rounding is monotone, so Round(q) != Round(f) needs a tie h between
// q and f, or equal to one of them: |q - h| <= |q - f| < 1.5 * 2^-23 * (1 + small) * limit < 2^-22 * limit.
constexpr float TieMargin(float limit) { return limit * 0x1p-22f; }

// Outliers of a RelativeThreshold reach value * rms; the sum of squares is that of round(x / unit), exactly.
inline float RelativeThreshold(float value, float unit, int64_t sum_of_squares, int64_t k) {
  const auto mean = static_cast<float>(sum_of_squares >> 12);  // in 4096 units^2; 64 = sqrt(4096)
  return value * (unit * (64.0f * __builtin_sqrtf(mean / static_cast<float>(k))));
}

// A threshold as a bit pattern, to be compared with magnitudes.
inline uint32_t ThresholdBits(float threshold) { return threshold > 0 ? Bits(threshold) : 0; }

// The scale of a row from the largest magnitudes of its outliers and of the rest, and the largest code of an outlier.
struct RowScale {
  float scale;
  int32_t limit;
  bool zero;  // the row counts as zero: scale 1, codes 0
};

inline RowScale ScaleOf(float rest_max, float outlier_max, int64_t count, int64_t k) {
  RowScale s{rest_max / kCodeMax, kOutlierCodeMax, false};
  if (count > 0) {
    const int64_t room = (kSumOfCodesMax - 127 * (k - count)) / count;
    s.limit = room < s.limit ? static_cast<int32_t>(room) : s.limit;
    const float least = outlier_max / static_cast<float>(s.limit);
    s.scale = least > s.scale ? least : s.scale;
  }
  s.zero = s.scale < kSmallestScale;
  if (s.zero) s.scale = 1;
  return s;
}

inline void MarkColumns(const int32_t* index, int64_t count, uint8_t* marks) {
  for (int64_t j = 0; j < count; ++j) __atomic_store_n(&marks[index[j]], uint8_t{1}, __ATOMIC_RELAXED);
}

inline Row NonFiniteRow(int64_t k, int8_t* lo) {
  std::memset(lo, 0, static_cast<size_t>(k));
  Row row;
  row.scale = __builtin_nanf("");
  return row;
}

// A row of zeros whose outliers, if any, have codes 0.
inline Row ZeroRow(int64_t k, int64_t count, const RowScratch& scratch, int8_t* lo) {
  if (k > 0) std::memset(lo, 0, static_cast<size_t>(k));  // of no columns, lo may be null
  for (int64_t j = 0; j < count; ++j) scratch.codes[j] = 0;
  Row row;
  row.count = static_cast<int32_t>(count);
  return row;
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ROW_MATH_H_
