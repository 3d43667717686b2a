// Runs the choice of the largest of each row. Compiled as launch.cu is.
#include <cstdint>

#include "host.h"
#include "int8.h"
#include "largest.h"
#include "quantize.h"

namespace jaxint8::cuda {

int64_t WorkspaceBytes(const Largest& p) {
  const int64_t parts = ChooseLargest(p.m, p.n).parts;
  return parts > 1 ? 8 * p.m * parts * kLargestKept : 0;
}

const char* Run(const Largest& p, CUstream_st* stream) {
  if (p.count < 1 || p.count > kLargestMost) return "count: expected 1 to 64";
  if (p.n < p.count || p.n > int64_t{1} << 30) return "x: expected rows of at least count values, at most 2^30";
  if (p.m == 0) return nullptr;
  if (!Aligned(p.x, 16) || !Aligned(p.y, 16)) return "buffers: expected an alignment of 16 bytes";
  const LargestShape shape = ChooseLargest(p.m, p.n);
  const int64_t bytes = WorkspaceBytes(p);
  if (bytes > 0 && (p.workspace == nullptr || !Aligned(p.workspace, 128))) {
    return "workspace: expected an alignment of 128 bytes";
  }
  LargestParams params{};
  params.x = Memory<const float>(p.x, 4 * p.m * p.n);
  params.pairs = Memory<uint32_t>(p.workspace, bytes);
  params.y = Memory<int32_t>(p.y, 4 * p.m * p.count);
  params.n = p.n;
  params.count = static_cast<int>(p.count);
  params.parts = static_cast<int>(shape.parts);
  params.vectors = static_cast<int>(shape.vectors);
  int64_t multiprocessors = 0;
  bool hopper = false;
  if (const char* error = Multiprocessors(&multiprocessors)) return error;
  if (const char* error = HasWgmma(&hopper)) return error;
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
