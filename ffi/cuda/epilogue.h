// From int32 sums to outputs: the two scales, the bias, one rounding; then what is added to the layer, and another
// rounding, as if that were an operation of its own. Every float32 operation is rounded on its own.
#ifndef JAXINT8_FFI_CUDA_EPILOGUE_H_
#define JAXINT8_FFI_CUDA_EPILOGUE_H_

#include "device.h"
#include "int8.h"

namespace jaxint8::cuda {

struct Epilogue {
  Type type;                    // of y; kS32 stores the sums themselves
  Ptr<const float> row_scale;   // [m]
  Ptr<const float> w_scale;     // [n]
  Ptr<const float> bias;        // [n] or null
  Ptr<const uint8_t> residual;  // [m][n] of the same type, or null; may be y
  Ptr<uint8_t> y;               // [m][n]
  int64_t n;
};

// Calls f with the type as a constant: code that runs once takes the time of fetching it, and branches.
template <typename F>
JAXINT8_DEVICE void WithTypeOf(const Epilogue& e, F f) {
  switch (e.type) {
    case Type::kF32:
      return f(TypeConstant<Type::kF32>());
    case Type::kBF16:
      return f(TypeConstant<Type::kBF16>());
    case Type::kF16:
      return f(TypeConstant<Type::kF16>());
    case Type::kS32:
      return f(TypeConstant<Type::kS32>());
  }
}

// In the place of a bias where there is none: added to any number, zeros of either sign included, it changes nothing,
// and no output has to ask.
inline constexpr float kNoBias = -0.0f;

JAXINT8_DEVICE float Finish(int32_t sum, float row_scale, float w_scale, float bias) {
  return Add(Multiply(Multiply(IntToFloat(sum), row_scale), w_scale), bias);
}

JAXINT8_DEVICE uint32_t Round(const Epilogue& e, float y) {
  return e.type == Type::kF32 ? Bits(y) : e.type == Type::kBF16 ? FloatToBFloat(y) : FloatToHalf(y);
}

// The output of one sum without the residual, in the low bits for 16-bit types.
JAXINT8_DEVICE uint32_t Output(const Epilogue& e, int32_t sum, float row_scale, float w_scale, float bias) {
  if (e.type == Type::kS32) return static_cast<uint32_t>(sum);
  return Round(e, Finish(sum, row_scale, w_scale, bias));
}

JAXINT8_DEVICE bool IsWide(const Epilogue& e) { return e.type == Type::kF32 || e.type == Type::kS32; }

// What is to be added to an output, in the low bits; to be asked for before the sum is there.
JAXINT8_DEVICE uint32_t LoadResidual(const Epilogue& e, int64_t row, int64_t column) {
  if (!e.residual) return 0;
  const int64_t at = row * e.n + column;
  return IsWide(e) ? LoadAs<uint32_t>(e.residual + 4 * at) : LoadAs<uint16_t>(e.residual + 2 * at);
}

// The sums of a word of outputs and their residual: one, or two of 16 bits.
JAXINT8_DEVICE uint32_t AddResiduals(const Epilogue& e, uint32_t y, uint32_t residual) {
  constexpr uint32_t kHigh = 0xffff0000;
  if (e.type == Type::kF32) return Bits(Add(FloatFromBits(residual), FloatFromBits(y)));
  if (e.type == Type::kBF16) {
    return FloatsToBFloats(Add(FloatFromBits(residual << 16), FloatFromBits(y << 16)),
                           Add(FloatFromBits(residual & kHigh), FloatFromBits(y & kHigh)));
  }
  const auto add = [&](int shift) {
    return Add(HalfToFloat(static_cast<uint16_t>(residual >> shift)), HalfToFloat(static_cast<uint16_t>(y >> shift)));
  };
  return FloatsToHalves(add(0), add(16));
}

JAXINT8_DEVICE void StoreOutput(const Epilogue& e, int64_t row, int64_t column, uint32_t y, uint32_t residual) {
  const int64_t at = row * e.n + column;
  if (e.residual) y = AddResiduals(e, y, residual);
  if (IsWide(e)) {
    StoreAs<uint32_t>(e.y + 4 * at, y);
  } else {
    StoreAs<uint16_t>(e.y + 2 * at, static_cast<uint16_t>(y));
  }
}

JAXINT8_DEVICE void StoreOutput(const Epilogue& e, int64_t row, int64_t column, uint32_t y) {
  StoreOutput(e, row, column, y, LoadResidual(e, row, column));
}

// Words of neighbouring outputs from `at` bytes on.
JAXINT8_DEVICE void StoreWord(const Epilogue& e, int64_t at, uint32_t y) {
  if (e.residual) y = AddResiduals(e, y, LoadAs<uint32_t>(e.residual + at));
  StoreAs<uint32_t>(e.y + at, y);
}
JAXINT8_DEVICE void StoreWords(const Epilogue& e, int64_t at, Word2 y) {
  if (e.residual) {
    const Word2 r = LoadAs<Word2>(e.residual + at);
    y = {AddResiduals(e, y.x, r.x), AddResiduals(e, y.y, r.y)};
  }
  StoreAs<Word2>(e.y + at, y);
}
JAXINT8_DEVICE void StoreWords(const Epilogue& e, int64_t at, Word4 y) {
  if (e.residual) {
    const Word4 r = LoadAs<Word4>(e.residual + at);
    y = {AddResiduals(e, y.x, r.x), AddResiduals(e, y.y, r.y), AddResiduals(e, y.z, r.z), AddResiduals(e, y.w, r.w)};
  }
  StoreAs<Word4>(e.y + at, y);
}

// Two neighbours; n and the column are even.
JAXINT8_DEVICE void StoreOutputs(const Epilogue& e, int64_t row, int64_t column, uint32_t y0, uint32_t y1) {
  const int64_t at = row * e.n + column;
  if (IsWide(e)) {
    StoreWords(e, 4 * at, Word2{y0, y1});
  } else {
    StoreWord(e, 2 * at, y0 | y1 << 16);
  }
}

// Among the four lanes of a quad: afterwards words[i] is what lane i had in words[t].
JAXINT8_DEVICE void TransposeQuad(uint32_t (&words)[4], int t) {
  const bool odd = t & 1, upper = t & 2;
  uint32_t a = ShuffleXor(odd ? words[0] : words[1], 1), b = ShuffleXor(odd ? words[2] : words[3], 1);
  words[0] = odd ? a : words[0];
  words[1] = odd ? words[1] : a;
  words[2] = odd ? b : words[2];
  words[3] = odd ? words[3] : b;
  a = ShuffleXor(upper ? words[0] : words[2], 2);
  b = ShuffleXor(upper ? words[1] : words[3], 2);
  words[0] = upper ? a : words[0];
  words[2] = upper ? words[2] : a;
  words[1] = upper ? b : words[1];
  words[3] = upper ? words[3] : b;
}

// (128 * hi + lo) . w, from the two sums; wraps on the way, the result fits.
JAXINT8_DEVICE int32_t Combine(int32_t lo, int32_t hi) {
  return static_cast<int32_t>(static_cast<uint32_t>(lo) + (static_cast<uint32_t>(hi) << 7));
}

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_EPILOGUE_H_
