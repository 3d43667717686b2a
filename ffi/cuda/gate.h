// The gate of an MLP done to the outputs of the layer before it, both of whose halves have been rounded: what is stored
// are the rows that the next layer takes.
#ifndef JAXINT8_FFI_CUDA_GATE_H_
#define JAXINT8_FFI_CUDA_GATE_H_

#include "epilogue.h"
#include "prologue.h"

namespace jaxint8::cuda {

// Of outputs in the low bits, and so is the result.
JAXINT8_DEVICE uint32_t Gated(const Epilogue& e, uint32_t gate, uint32_t up) {
  const auto widen = [&](uint32_t y) {
    if (e.type == Type::kF32) return FloatFromBits(y);
    return e.type == Type::kBF16 ? FloatFromBits(y << 16) : HalfToFloat(static_cast<uint16_t>(y));
  };
  float y[1] = {widen(gate)};
  const float other[1] = {widen(up)};
  SiluGate(y, other);
  return Round(e, y[0]);
}

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_GATE_H_
