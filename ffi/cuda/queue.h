// What queues kernels, one after the other, and with it those for rows.
#ifndef JAXINT8_FFI_CUDA_QUEUE_H_
#define JAXINT8_FFI_CUDA_QUEUE_H_

#include <cstdint>

#include "host.h"
#include "int8.h"
#include "quantize.h"

namespace jaxint8::cuda {

// Return the error of a step, if any, to the caller.
#define JAXINT8_TRY(step) \
  if (const char* error = (step)) return error

// Calls f with the type of the activations as a constant.
template <typename F>
const char* WithType(Type type, F f) {
  switch (type) {
    case Type::kF32:
      return f(TypeConstant<Type::kF32>());
    case Type::kBF16:
      return f(TypeConstant<Type::kBF16>());
    case Type::kF16:
      return f(TypeConstant<Type::kF16>());
    default:
      return "x: expected float32, bfloat16 or float16";
  }
}

// A stream, and whether its next kernel follows one of ours.
class LaunchQueue {
 public:
  LaunchQueue(CUstream_st* stream, bool follows) : stream_(stream), follows_(follows) {}

  bool follows() const { return follows_; }
  // The next kernel may start before what stands before the call ends, of which nothing is known: it waits for that
  // before it reads or writes anything.
  void StartEarly() { early_ = true; }

  template <typename Kernel>
  const char* Launch(int64_t blocks, int threads, int64_t shared, const typename Kernel::Params& params,
                     int cluster = 1) {
    const bool overlapped = follows_ || early_;
    follows_ = true;
    return cuda::Launch<Kernel>(stream_, blocks, threads, shared, params, overlapped, cluster);
  }

 private:
  CUstream_st* const stream_;
  bool follows_, early_ = false;
};

// Does what stands before a layer with a kernel of its own (quantize.cu).
const char* QueuePrologue(LaunchQueue& queue, Type type, const QuantizeParams& q, Ptr<uint8_t> y);

// Columns are marked first, if they are taken out whole and not by each block for itself, then codes are written.
const char* QueueQuantizers(LaunchQueue& queue, Type type, QuantizeParams q);

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_QUEUE_H_
