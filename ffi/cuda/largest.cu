// Runs the choice of the largest of each row. Compiled as launch.cu is.
#include <cstdint>

#include "host.h"
#include "largest.h"
#include "quantize.h"

namespace jaxint8::cuda {

const char* RunLargest(const Problem& p, bool hopper, CUstream_st* stream) {
  const LargestShape shape = ChooseLargest(p.m, p.k);
  LargestParams params{};
  params.x = Memory<const float>(p.x, 4 * p.m * p.k);
  params.y = Memory<int32_t>(p.y, 4 * p.m * p.n);
  if (shape.parts > 1) params.pairs = Memory<uint32_t>(p.workspace, 8 * p.m * shape.parts * kLargestKept);
  params.k = p.k;
  params.count = static_cast<int>(p.n);
  params.parts = static_cast<int>(shape.parts);
  params.vectors = static_cast<int>(shape.vectors);
  int64_t multiprocessors = 0;
  if (const char* error = Multiprocessors(&multiprocessors)) return error;
  const auto launch = [&](auto kernel, int64_t blocks) {
    using Kernel = decltype(kernel);
    const int64_t apart = hopper ? SpreadBytes(blocks, true, multiprocessors) : 0;
    const int64_t shared = apart > Kernel::kShared ? apart : Kernel::kShared;
    return Launch<Kernel>(stream, blocks, Kernel::kMaxThreads, shared, params, true);
  };
  if (shape.parts == 1) return launch(LargestKernel<true, true>(), p.m);
  if (const char* error = launch(LargestKernel<true, false>(), p.m * shape.parts)) return error;
  return launch(LargestKernel<false, true>(), p.m);
}

}  // namespace jaxint8::cuda
