// Elements of an activation row as float32, and their quotients by a scale as integers.
#ifndef JAXINT8_FFI_CUDA_READER_H_
#define JAXINT8_FFI_CUDA_READER_H_

#include "device.h"
#include "int8.h"

namespace jaxint8::cuda {

// Elements of an activation row, eight at a time. kVector: k is a multiple of 8, so every row is aligned to 16 bytes.
template <Type kType, bool kVector>
struct RowReader {
  static constexpr int kBytes = kType == Type::kF32 ? 4 : 2;
  Ptr<const uint8_t> data;
  int64_t k;

  static JAXINT8_DEVICE float Widen(uint32_t half) {
    return kType == Type::kBF16 ? FloatFromBits(half << 16) : HalfToFloat(static_cast<uint16_t>(half));
  }

  // Eight elements as they lie in memory, if they can be read in one go.
  static constexpr int kWords = kBytes / 2;
  struct Raw {
    Word4 words[kWords];
  };
  JAXINT8_DEVICE Raw ReadRaw(int64_t i) const {
    Raw raw;
#pragma unroll
    for (int j = 0; j < kWords; ++j) raw.words[j] = LoadAs<Word4>(data + kBytes * i + 16 * j);
    return raw;
  }
  static JAXINT8_DEVICE void Widen(const Raw& raw, float (&v)[8]) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const uint32_t words[4] = {raw.words[j].x, raw.words[j].y, raw.words[j].z, raw.words[j].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (kType == Type::kF32) {
          v[4 * j + e] = FloatFromBits(words[e]);
        } else {
          v[2 * e] = Widen(words[e] & 0xffff);
          v[2 * e + 1] = Widen(words[e] >> 16);
        }
      }
    }
  }

  // v[j] = row[i + j], 0 beyond the end.
  JAXINT8_DEVICE void Read(int64_t i, float (&v)[8]) const {
    if constexpr (kVector) {
      Widen(ReadRaw(i), v);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v[j] = 0;
        if (i + j < k) {
          if constexpr (kType == Type::kF32) {
            v[j] = FloatFromBits(LoadAs<uint32_t>(data + 4 * (i + j)));
          } else {
            v[j] = Widen(LoadAs<uint16_t>(data + 2 * (i + j)));
          }
        }
      }
    }
  }

  // Bit j is set where i + j is an element.
  JAXINT8_DEVICE uint32_t Valid(int64_t i) const { return kVector || i + 8 <= k ? 0xff : (1u << (k - i)) - 1; }
};

JAXINT8_DEVICE uint32_t Magnitude(float x) { return Bits(x) & 0x7fffffff; }

// codes[j] = round_half_even(v[j] / divisor), for quotients of at most 16384 and a divisor of at least 2^-125.
//
// q = v * fl(1 / divisor) is within 3.01 * 2^-24 * |q| of the rounded quotient, so both round to the same integer
// unless q is that close to a half; then the division is done. Adding 1.5 * 2^23 leaves the nearest integer in the low
// bits.
JAXINT8_DEVICE void RoundedQuotients(const float (&v)[8], float divisor, float reciprocal, int32_t (&codes)[8]) {
  constexpr float kMagic = 0x1.8p23f;
  float farthest = 0, largest = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float q = Multiply(v[j], reciprocal), shifted = Add(q, kMagic);
    const float rest = Absolute(Add(q, -Add(shifted, -kMagic)));
    farthest = Larger(farthest, rest);
    largest = Larger(largest, Absolute(q));
    codes[j] = static_cast<int32_t>(Bits(shifted) - Bits(kMagic));
  }
  if (Add(farthest, Multiply(largest, 0x1p-22f)) < 0.5f - 0x1p-22f) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) codes[j] = RoundToInt(Divide(v[j], divisor));
}

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_READER_H_
