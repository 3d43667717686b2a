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

// What a row is multiplied with; NaN if it holds a non-finite value.
template <class E>
float NormScale(const typename E::Element* x, int64_t k, float epsilon) {
  int32_t largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    const auto a = static_cast<int32_t>(Magnitude(E::Get(x[i])));
    largest = a > largest ? a : largest;
  }
  if (static_cast<uint32_t>(largest) >= kInfinity) return __builtin_nanf("");
  float mean_square = 0;
  if (FromBits(static_cast<uint32_t>(largest)) >= kSmallestNorm) {
    const int exponent = (largest >> 23) - 127;
    const float inverse = PowerOfTwo(kNormExponent - exponent), unit = PowerOfTwo(exponent - kNormExponent);
    int64_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      const auto q = static_cast<int32_t>(Round(E::Get(x[i]) * inverse));
      sum += int64_t{q} * q;
    }
    mean_square = (static_cast<float>(sum) / static_cast<float>(k)) * unit * unit;
  }
  return 1.0f / __builtin_sqrtf(mean_square + epsilon);
}

template <class E>
void RmsNorm(const typename E::Element* x, int64_t k, float epsilon, const float* weight, typename E::Element* row) {
  const float scale = NormScale<E>(x, k, epsilon);
  for (int64_t i = 0; i < k; ++i) row[i] = E::Put((E::Get(x[i]) * scale) * weight[i]);
}

// For x in [-87, 88].
inline float Exp(float x) {
  const float power = Round(x * 1.44269504088896341f);
  const float r = (x - power * 0.693359375f) - power * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = (p * (r * r) + r) + 1.0f;
  return FromBits(Bits(y) + (static_cast<uint32_t>(static_cast<int32_t>(power)) << 23));
}

template <class E>
void SiluGate(const typename E::Element* x, int64_t k, typename E::Element* row) {
  for (int64_t i = 0; i < k; ++i) {
    const float gate = E::Get(x[i]);
    float z = -gate;
    z = z > -87.0f ? z : -87.0f;  // also of NaN, which the gate itself carries on
    z = z < 88.0f ? z : 88.0f;
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
void EnterRow(const Prologue& p, Type type, const void* x, int64_t k, void* row) {
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
