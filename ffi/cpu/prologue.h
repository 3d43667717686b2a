// What stands before a layer, as part of its call: a row of activations becomes the row that is quantised.
//
// Plain loops that the compiler vectorises, included by each rung in its own translation unit (see row_math.h for the
// rules of such files). The law is rms_norm and silu_gate of jaxint8/reference.py: a sum of squares is one of integers,
// so it does not depend on how a compiler splits it, and every float32 operation is rounded on its own.
#ifndef JAXINT8_FFI_CPU_PROLOGUE_H_
#define JAXINT8_FFI_CPU_PROLOGUE_H_

#include <cstdint>

#include "int8.h"
#include "row_math.h"

namespace jaxint8::cpu {
namespace {

// Squares are summed of integers below 2^22: 2^44 * kMaxK fits in an int64.
constexpr int kNormExponent = 21;
constexpr float kSmallestNorm = 0x1p-40f;

// The bits of 2^exponent, for a normal number.
inline float PowerOfTwo(int exponent) { return FromBits(static_cast<uint32_t>(exponent + 127) << 23); }

// Elements of one type, read and written as float32.
struct Floats {
  using Element = float;
  static float Get(float x) { return x; }
  static float Put(float x) { return x; }
};
struct BFloats {
  using Element = uint16_t;
  static float Get(uint16_t x) { return FromBits(static_cast<uint32_t>(x) << 16); }
  static uint16_t Put(float x) { return FloatToBFloat(x); }
};
struct Halves {
  using Element = uint16_t;
  static float Get(uint16_t x) { return HalfToFloat(x); }
  static uint16_t Put(float x) { return FloatToHalf(x); }
};

// Of Exp: log2(e); ln(2) in two parts; the polynomial, highest power first. Its argument is bounded by the last two.
constexpr float kExpLog2e = 1.44269504088896341f, kExpLn2[2] = {0.693359375f, -2.12194440e-4f};
constexpr float kExpPolynomial[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                     4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
constexpr float kExpLeast = -87.0f, kExpMost = 88.0f;

// What the squares of a row are summed of: its values in units of a power of two near its largest magnitude.
struct NormUnit {
  float inverse, unit;
};
inline NormUnit NormUnitOf(uint32_t largest) {
  const int exponent = static_cast<int>(largest >> 23) - 127;
  return {PowerOfTwo(kNormExponent - exponent), PowerOfTwo(exponent - kNormExponent)};
}

inline float NormScaleOf(int64_t sum, int64_t k, float unit, float epsilon) {
  const float mean_square = (static_cast<float>(sum) / static_cast<float>(k)) * unit * unit;
  return 1.0f / __builtin_sqrtf(mean_square + epsilon);
}

// What a row is multiplied with; NaN if it holds a non-finite value.
template <class E>
float NormScale(const typename E::Element* x, int64_t k, float epsilon) {
  int32_t largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    const auto a = static_cast<int32_t>(Magnitude(E::Get(x[i])));
    largest = a > largest ? a : largest;
  }
  if (static_cast<uint32_t>(largest) >= kInfinity) return __builtin_nanf("");
  if (FromBits(static_cast<uint32_t>(largest)) < kSmallestNorm) return NormScaleOf(0, k, 1.0f, epsilon);
  const NormUnit u = NormUnitOf(static_cast<uint32_t>(largest));
  int64_t sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    const auto q = static_cast<int32_t>(Round(E::Get(x[i]) * u.inverse));
    sum += int64_t{q} * q;
  }
  return NormScaleOf(sum, k, u.unit, epsilon);
}

template <class E>
void RmsNorm(const typename E::Element* x, int64_t k, float epsilon, const float* weight, typename E::Element* row) {
  const float scale = NormScale<E>(x, k, epsilon);
  for (int64_t i = 0; i < k; ++i) row[i] = E::Put((E::Get(x[i]) * scale) * weight[i]);
}

// For x in [kExpLeast, kExpMost].
inline float Exp(float x) {
  const float power = Round(x * kExpLog2e);
  const float r = (x - power * kExpLn2[0]) - power * kExpLn2[1];
  float p = kExpPolynomial[0];
  for (int i = 1; i < 6; ++i) p = p * r + kExpPolynomial[i];
  const float y = (p * (r * r) + r) + 1.0f;
  return FromBits(Bits(y) + (static_cast<uint32_t>(static_cast<int32_t>(power)) << 23));
}

template <class E>
void SiluGate(const typename E::Element* x, int64_t k, typename E::Element* row) {
  for (int64_t i = 0; i < k; ++i) {
    const float gate = E::Get(x[i]);
    // Bounded as integers: GCC vectorises no comparison of floats, for it might raise an exception. A NaN becomes a
    // bound, and the gate itself carries it on.
    const uint32_t sign = ~Bits(gate) & ~kMagnitude;
    const auto most = static_cast<int32_t>(sign != 0 ? Bits(-kExpLeast) : Bits(kExpMost));
    const auto magnitude = static_cast<int32_t>(Magnitude(gate));
    const float z = FromBits(static_cast<uint32_t>(magnitude < most ? magnitude : most) | sign);
    const float share = 1.0f / (1.0f + Exp(z));
    row[i] = E::Put((gate * share) * E::Get(x[k + i]));
  }
}

template <class E>
void EnterAs(const Prologue& p, const void* data, int64_t k, void* row) {
  const auto* x = static_cast<const typename E::Element*>(data);
  auto* out = static_cast<typename E::Element*>(row);
  if (p.kind == Prologue::Kind::kSiluGate) return SiluGate<E>(x, k, out);
  RmsNorm<E>(x, k, p.epsilon, p.norm, out);
}

// Writes the row of k elements that stands behind the prologue, in the type of x.
[[maybe_unused]] void EnterRow(const Prologue& p, Type type, const void* x, int64_t k, void* row) {
  switch (type) {
    case Type::kBF16:
      return EnterAs<BFloats>(p, x, k, row);
    case Type::kF16:
      return EnterAs<Halves>(p, x, k, row);
    default:
      return EnterAs<Floats>(p, x, k, row);
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_PROLOGUE_H_
