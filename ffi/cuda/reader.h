// Elements of an activation row as float32, and their quotients by a scale as integers.
#ifndef JAXINT8_FFI_CUDA_READER_H_
#define JAXINT8_FFI_CUDA_READER_H_

#include <type_traits>

#include "device.h"
#include "int8.h"

namespace jaxint8::cuda {

// The magnitude of a float, as its bits: they are in order, infinity and NaN last.
JAXINT8_DEVICE uint32_t Magnitude(float x) { return Bits(x) & 0x7fffffff; }
inline constexpr uint32_t kInfinity = 0x7f800000;

// Eight magnitudes, as words of two halves each or of one float: signs are none of them. Groups of bytes, 0xff or 0,
// say which of them are meant.
template <bool kHalves>
struct Magnitudes {
  static constexpr int kWords = kHalves ? 4 : 8;
  uint32_t words[kWords];

  // Those that are no less than a threshold: to all, a bound is added by which their sign says so.
  JAXINT8_DEVICE Word2 Reaching(uint32_t bound) const {
    uint32_t t[kWords];
#pragma unroll
    for (int j = 0; j < kWords; ++j) t[j] = words[j] + bound;
    if constexpr (kHalves) {
      return {Permute<0xfdb9>(t[0], t[1]), Permute<0xfdb9>(t[2], t[3])};
    } else {
      return {Permute<0x5410>(Permute<0xfb>(t[0], t[1]), Permute<0xfb>(t[2], t[3])),
              Permute<0x5410>(Permute<0xfb>(t[4], t[5]), Permute<0xfb>(t[6], t[7]))};
    }
  }

  // The largest of those that are not meant: of the halves of a word, or of words.
  JAXINT8_DEVICE uint32_t LargestBut(const Word2& bytes) const {
    const auto larger = [](uint32_t a, uint32_t b) {
      if constexpr (kHalves) return LargerHalves(a, b);
      return a > b ? a : b;
    };
    if constexpr (kHalves) {
      return larger(larger(words[0] & ~Permute<0x1100>(bytes.x, 0), words[1] & ~Permute<0x3322>(bytes.x, 0)),
                    larger(words[2] & ~Permute<0x1100>(bytes.y, 0), words[3] & ~Permute<0x3322>(bytes.y, 0)));
    } else {
      const uint32_t x =
          larger(larger(words[0] & ~Permute<0x0000>(bytes.x, 0), words[1] & ~Permute<0x1111>(bytes.x, 0)),
                 larger(words[2] & ~Permute<0x2222>(bytes.x, 0), words[3] & ~Permute<0x3333>(bytes.x, 0)));
      const uint32_t y =
          larger(larger(words[4] & ~Permute<0x0000>(bytes.y, 0), words[5] & ~Permute<0x1111>(bytes.y, 0)),
                 larger(words[6] & ~Permute<0x2222>(bytes.y, 0), words[7] & ~Permute<0x3333>(bytes.y, 0)));
      return larger(x, y);
    }
  }
};

// Elements of an activation row, eight at a time. kVector: k is a multiple of 8, so every row is aligned to 16 bytes.
template <Type kType, bool kVector>
struct RowReader {
  static constexpr int kBytes = kType == Type::kF32 ? 4 : 2;
  Ptr<const uint8_t> data;
  int k;

  static JAXINT8_DEVICE float Widen(uint32_t half) {
    return kType == Type::kBF16 ? FloatFromBits(half << 16) : HalfToFloat(static_cast<uint16_t>(half));
  }

  // Eight elements as they lie in memory, if they can be read in one go.
  static constexpr int kWords = kBytes / 2;
  struct Raw {
    Word4 words[kWords];
  };
  JAXINT8_DEVICE Raw ReadRaw(int i) const {
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

  // Eight values rounded to the type, as they lie in memory.
  static JAXINT8_DEVICE Raw Narrow(const float (&v)[8]) {
    Raw raw;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      uint32_t words[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (kType == Type::kF32) {
          words[e] = Bits(v[4 * j + e]);
        } else if constexpr (kType == Type::kBF16) {
          words[e] = FloatsToBFloats(v[2 * e], v[2 * e + 1]);
        } else {
          words[e] = FloatsToHalves(v[2 * e], v[2 * e + 1]);
        }
      }
      raw.words[j] = {words[0], words[1], words[2], words[3]};
    }
    return raw;
  }

  // The largest magnitude of eight elements, as the bits of a float; at least kInfinity if one is not finite.
  static JAXINT8_DEVICE uint32_t LargestOf(const Raw& raw) {
    uint32_t a = 0;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const uint32_t words[4] = {raw.words[j].x, raw.words[j].y, raw.words[j].z, raw.words[j].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (kType == Type::kF32) {
          a = (words[e] & 0x7fffffff) > a ? words[e] & 0x7fffffff : a;
        } else {
          a = LargerHalves(a, words[e] & 0x7fff7fff);
        }
      }
    }
    return LargerOf(a);
  }

  static constexpr bool kHalves = kType != Type::kF32 && kVector;
  static JAXINT8_DEVICE Magnitudes<kHalves> MagnitudesOf(const Raw& raw) {
    constexpr uint32_t kMask = kHalves ? 0x7fff7fff : 0x7fffffff;
    Magnitudes<kHalves> all;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      all.words[4 * j] = raw.words[j].x & kMask;
      all.words[4 * j + 1] = raw.words[j].y & kMask;
      all.words[4 * j + 2] = raw.words[j].z & kMask;
      all.words[4 * j + 3] = raw.words[j].w & kMask;
    }
    return all;
  }
  // For Reaching, of the bits of a float. A threshold between two elements stands for the larger one.
  static JAXINT8_DEVICE uint32_t Bound(uint32_t threshold) {
    if constexpr (!kHalves) {
      return 0x80000000 - threshold;
    } else if constexpr (kType == Type::kBF16) {
      return (0x8000 - ((threshold + 0xffff) >> 16)) * 0x10001;
    } else {
      if (threshold > kInfinity) return 0;
      uint32_t half = FloatToHalf(FloatFromBits(threshold));
      half += Bits(HalfToFloat(static_cast<uint16_t>(half))) < threshold;
      return (0x8000 - half) * 0x10001;
    }
  }
  // The bits of a float, of what LargestBut gives.
  static JAXINT8_DEVICE uint32_t LargerOf(uint32_t word) {
    if constexpr (!kHalves) return word;
    const uint32_t half = (word & 0xffff) > word >> 16 ? word & 0xffff : word >> 16;
    return Bits(Widen(half));  // Widen keeps the order of magnitudes, also of NaN
  }

  // The larger magnitude of each two elements.
  static JAXINT8_DEVICE Raw LargerMagnitudes(const Raw& a, const Raw& b) {
    const auto larger = [](uint32_t v, uint32_t w) {
      if constexpr (kType != Type::kF32) return LargerHalves(v & 0x7fff7fff, w & 0x7fff7fff);
      return (v & 0x7fffffff) > (w & 0x7fffffff) ? v & 0x7fffffff : w & 0x7fffffff;
    };
    Raw raw;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      raw.words[j] = {larger(a.words[j].x, b.words[j].x), larger(a.words[j].y, b.words[j].y),
                      larger(a.words[j].z, b.words[j].z), larger(a.words[j].w, b.words[j].w)};
    }
    return raw;
  }

  // Eight elements as they were read.
  struct VectorGroup {
    Raw raw;
    JAXINT8_DEVICE uint32_t Largest() const { return LargestOf(raw); }
    JAXINT8_DEVICE Magnitudes<kHalves> All() const { return MagnitudesOf(raw); }
    JAXINT8_DEVICE void Widen(float (&v)[8]) const { RowReader::Widen(raw, v); }
  };
  struct ScalarGroup {
    float values[8];
    JAXINT8_DEVICE uint32_t Largest() const {
      uint32_t largest = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = Magnitude(values[j]) > largest ? Magnitude(values[j]) : largest;
      return largest;
    }
    JAXINT8_DEVICE Magnitudes<false> All() const {
      Magnitudes<false> all;
#pragma unroll
      for (int j = 0; j < 8; ++j) all.words[j] = Magnitude(values[j]);
      return all;
    }
    JAXINT8_DEVICE void Widen(float (&v)[8]) const {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = values[j];
    }
  };
  using Group = std::conditional_t<kVector, VectorGroup, ScalarGroup>;
  JAXINT8_DEVICE Group ReadGroup(int i) const {
    Group group;
    if constexpr (kVector) {
      group.raw = ReadRaw(i);
    } else {
      Read(i, group.values);
    }
    return group;
  }

  JAXINT8_DEVICE float Element(int i) const {
    if constexpr (kType == Type::kF32) return FloatFromBits(LoadAs<uint32_t>(data + 4 * i));
    return Widen(LoadAs<uint16_t>(data + 2 * i));
  }

  // v[j] = row[i + j], 0 beyond the end.
  JAXINT8_DEVICE void Read(int i, float (&v)[8]) const {
    if constexpr (kVector) {
      Widen(ReadRaw(i), v);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v[j] = 0;
        if (i + j < k) v[j] = Element(i + j);
      }
    }
  }

  // to[i + j] = v[j] rounded to the type, as far as there are elements.
  JAXINT8_DEVICE void Write(Ptr<uint8_t> to, int i, const float (&v)[8]) const {
    const Raw raw = Narrow(v);
    if constexpr (kVector) {
#pragma unroll
      for (int j = 0; j < kWords; ++j) StoreAs<Word4>(to + (kBytes * i + 16 * j), raw.words[j]);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (i + j >= k) break;
        const Word4& w = raw.words[kBytes * j / 16];
        const int at = kBytes * j / 4 % 4;
        const uint32_t word = at == 0 ? w.x : at == 1 ? w.y : at == 2 ? w.z : w.w;
        if constexpr (kType == Type::kF32) {
          StoreAs<uint32_t>(to + 4 * (i + j), word);
        } else {
          StoreAs<uint16_t>(to + 2 * (i + j), static_cast<uint16_t>(word >> (j % 2 * 16)));
        }
      }
    }
  }

  // Bit j is set where i + j is an element.
  JAXINT8_DEVICE uint32_t Valid(int i) const { return kVector || i + 8 <= k ? 0xff : (1u << (k - i)) - 1; }
};

// Added to a float below 2^22 in magnitude, this leaves the nearest integer (ties to even) in the low bits.
inline constexpr float kMagic = 0x1.8p23f;
inline constexpr uint32_t kMagicBits = 0x4b400000;

// x / kDivisor as Divide gives it, in a sixth of its time, where that is no less than 2^-125 and finite: a quotient and
// one correction (Markstein). Tests try every mantissa.
template <int kDivisor>
JAXINT8_DEVICE float DivideBy(float x) {
  constexpr float kReciprocal = 1.0f / kDivisor;
  const float q = Multiply(x, kReciprocal);
  return MultiplyAdd(MultiplyAdd(-q, kDivisor, x), kReciprocal, q);
}

// Integers divided by one from 1 to below 2^31 that is known some time before them, as Divide does: two corrections,
// of which the second rounds correctly (see Quotients).
class IntegerDivisor {
 public:
  JAXINT8_DEVICE explicit IntegerDivisor(int32_t divisor)
      : divisor_(IntToFloat(divisor)), reciprocal_(PlainReciprocal(divisor_)) {}
  JAXINT8_DEVICE float Divide(float x) const {
    float q = Multiply(x, reciprocal_);
    q = MultiplyAdd(MultiplyAdd(-q, divisor_, x), reciprocal_, q);
    return MultiplyAdd(MultiplyAdd(-q, divisor_, x), reciprocal_, q);
  }

 private:
  const float divisor_, reciprocal_;
};

// Divides values of a type by a float from 2^-125 on and rounds to integers, half to even, what is rounded to a float
// below 2^21: without divisions.
//
// Of float32, quotients are corrected (Markstein): after two corrections any is rounded as Divide would, as the first
// leaves it within one unit in the last place. Values with 11 bits or fewer are multiplied by a reciprocal in two
// parts: that errs by less than 2^-22 units, and none of their quotients is so near to a number where rounding to
// integers turns, by whatever divisor. tests/test_cuda_quotients.py tries all that come near.
template <Type kType>
class Quotients {
 public:
  JAXINT8_DEVICE explicit Quotients(float divisor) : Quotients(divisor, 1.0f) {}
  // For SumOfSquares.
  static JAXINT8_DEVICE Quotients ForSquares(float divisor) { return {divisor, 0x1p-6f}; }

  // The low 22 bits of shifted[j] are those of the integer of v[j].
  JAXINT8_DEVICE void Round(const float (&v)[8], uint32_t (&shifted)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) shifted[j] = Bits(Add(Of(v[j]), magic_));
  }
  static JAXINT8_DEVICE int32_t Integer(uint32_t shifted) { return static_cast<int32_t>(shifted << 10) >> 10; }

  // Of eight integers of 4096 at most in magnitude. Added to 2^17 or 2^49, these are in the low bits of numbers whose
  // other bits, and twice these, are 0 modulo 2^28: and so are the differences of their squares.
  JAXINT8_DEVICE uint32_t SumOfSquares(const float (&v)[8]) const {
    uint32_t sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t shifted = Bits(Add(Absolute(Of(v[j])), square_magic_));
      sum += shifted * shifted;
    }
    return sum & ((1u << 28) - 1);
  }

 protected:
  // The quotients are multiplied by a power of two, `times` and another one by large divisors, as the second part of
  // their reciprocals would be too small for a float.
  JAXINT8_DEVICE Quotients(float divisor, float times) {
    const float fold = divisor > 1.0f ? 0x1p32f : 1.0f;
    magic_ = Multiply(kMagic, fold);
    square_magic_ = Multiply(0x1p17f, fold);
    // Scaled so that no remainder of a quotient of float32 from 1/2 on is too small.
    up_ = kType == Type::kF32 && divisor < 0x1p-60f ? 0x1p60f : 1.0f;
    divisor_ = Multiply(Multiply(divisor, divisor > 1.0f ? 0x1p-32f : 1.0f), up_ / times);
    reciprocal_ = PlainReciprocal(divisor_);
    const float error = MultiplyAdd(-divisor_, reciprocal_, 1.0f);
    rest_ = Multiply(reciprocal_, MultiplyAdd(error, error, error));
  }

  JAXINT8_DEVICE float Of(float v) const {
    if constexpr (kType == Type::kF32) {
      const float a = Multiply(v, up_);
      return Correct(Correct(Multiply(a, reciprocal_), a), a);
    }
    return MultiplyAdd(v, reciprocal_, Multiply(v, rest_));
  }
  JAXINT8_DEVICE float Correct(float q, float a) const {
    return MultiplyAdd(MultiplyAdd(-q, divisor_, a), reciprocal_, q);
  }

  float magic_, square_magic_, up_, divisor_, reciprocal_, rest_;
};

// The same for the codes of a row. Divisors are scales: a magnitude N of the type over 127, or over 127 * 128, rounded.
//
// Of values with 11 bits or fewer, other quotients up to 127 than halves of integers are so far from these that a
// reciprocal with an error of a few units does for them: one operation. The only half is that of N / 2 or N / 256,
// which is 63.5 or as near as the scale is to what it was rounded from: the reciprocal is made to err to the side to
// which that is rounded. If 127 divides N there are others, of which none may err: then the scale must be a power of
// two, which has an exact reciprocal. tests/test_cuda_quotients.py tries all.
template <Type kType>
class CodeQuotients : public Quotients<kType> {
 public:
  // Of bfloat16 127 divides none but 127 times powers of two.
  static constexpr bool kPlainByAll = kType != Type::kF16;

  // middle: N / 2 or N / 256, or 0 for any other scale.
  JAXINT8_DEVICE CodeQuotients(float scale, float middle) : Quotients<kType>(scale) {
    if constexpr (kType != Type::kF32) {
      const float beyond = MultiplyAdd(-63.5f, scale, middle);  // exact
      // A quotient is rounded to a float first, in whose steps of 2^-18 half a step below 63.5 is where 63 begins.
      const uint32_t steps = Multiply(beyond, 0x1p19f) < -scale ? ~1u : 2;
      near_ = FloatFromBits(beyond == 0 ? 0x7f000000 - Bits(this->divisor_) : Bits(this->reciprocal_) + steps);
      plain_ = middle > 0 && (kPlainByAll || beyond != 0 || (Bits(scale) & 0x7fffff) == 0);
    }
  }

  // Whether RoundSmall may be called, for quotients up to 127. If kPlainByAll, it may by all scales with a middle.
  JAXINT8_DEVICE bool Plain() const { return plain_; }
  JAXINT8_DEVICE void RoundSmall(const float (&v)[8], uint32_t (&shifted)[8]) const {
    if constexpr (kType == Type::kF32) {
      this->Round(v, shifted);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) shifted[j] = Bits(MultiplyAdd(v[j], near_, this->magic_));
    }
  }

 private:
  float near_ = 0;
  bool plain_ = true;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_READER_H_
