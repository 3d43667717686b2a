// From int32 sums to outputs: the two scales, the bias, one rounding. Every float32 operation is rounded on its own.
#ifndef JAXINT8_FFI_CUDA_EPILOGUE_H_
#define JAXINT8_FFI_CUDA_EPILOGUE_H_

#include "device.h"
#include "int8.h"

namespace jaxint8::cuda {

struct Epilogue {
  Type type;                   // of y; kS32 stores the sums themselves
  Ptr<const float> row_scale;  // [m]
  Ptr<const float> w_scale;    // [n]
  Ptr<const float> bias;       // [n] or null
  Ptr<uint8_t> y;              // [m][n]
  int64_t n;
};

JAXINT8_DEVICE float Finish(int32_t sum, float row_scale, float w_scale, bool has_bias, float bias) {
  const float y = Multiply(Multiply(IntToFloat(sum), row_scale), w_scale);
  return has_bias ? Add(y, bias) : y;
}

// The output of one sum, in the low bits for 16-bit types.
JAXINT8_DEVICE uint32_t Output(const Epilogue& e, int32_t sum, float row_scale, float w_scale, float bias) {
  if (e.type == Type::kS32) return static_cast<uint32_t>(sum);
  const float y = Finish(sum, row_scale, w_scale, static_cast<bool>(e.bias), bias);
  return e.type == Type::kF32 ? Bits(y) : e.type == Type::kBF16 ? FloatToBFloat(y) : FloatToHalf(y);
}

JAXINT8_DEVICE bool IsWide(const Epilogue& e) { return e.type == Type::kF32 || e.type == Type::kS32; }

JAXINT8_DEVICE void StoreOutput(const Epilogue& e, int64_t row, int64_t column, uint32_t y) {
  const int64_t at = row * e.n + column;
  if (IsWide(e)) {
    StoreAs<uint32_t>(e.y + 4 * at, y);
  } else {
    StoreAs<uint16_t>(e.y + 2 * at, static_cast<uint16_t>(y));
  }
}

// Two neighbours; n and the column are even.
JAXINT8_DEVICE void StoreOutputs(const Epilogue& e, int64_t row, int64_t column, uint32_t y0, uint32_t y1) {
  const int64_t at = row * e.n + column;
  if (IsWide(e)) {
    StoreAs<Word2>(e.y + 4 * at, Word2{y0, y1});
  } else {
    StoreAs<uint32_t>(e.y + 2 * at, y0 | y1 << 16);
  }
}

// (128 * hi + lo) . w, from the two sums; wraps on the way, the result fits.
JAXINT8_DEVICE int32_t Combine(int32_t lo, int32_t hi) {
  return static_cast<int32_t>(static_cast<uint32_t>(lo) + (static_cast<uint32_t>(hi) << 7));
}

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_EPILOGUE_H_
