// What is run: one layer, some behind each other, a decoder layer's block, or the choice of the largest of each row.
// Compiled by nvcc, and by the C++ compiler for the block executor.
#include <cstdint>

#include "dispatch.h"
#include "host.h"
#include "int8.h"
#include "largest.h"
#include "plan.h"
#include "queue.h"

namespace jaxint8::cuda {
namespace {

bool Aligned(const void* p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

const char* RunOne(const Problem& p, CUstream_st* stream, bool follows) {
  bool hopper = false;
  if (const char* error = HasWgmma(&hopper)) return error;
  const Plan plan = MakePlan(p, hopper);
  if (plan.error != nullptr) return plan.error;
  const bool has_n = p.kind == Problem::Kind::kProduct || p.kind == Problem::Kind::kLinear;
  if (p.m == 0 || (has_n && p.n == 0) || (p.kind == Problem::Kind::kPrologue && p.k == 0)) return nullptr;
  if (!Aligned(p.x, 16) || !Aligned(p.norm, 16) || !Aligned(p.residual, 16) || !Aligned(p.w, 16) || !Aligned(p.y, 16) ||
      !Aligned(p.lo, 16) || !Aligned(p.hi, 16)) {
    return "buffers: expected an alignment of 16 bytes";
  }
  if (plan.bytes > 0 && (p.workspace == nullptr || !Aligned(p.workspace, 128))) {
    return "workspace: expected an alignment of 128 bytes";
  }
  return Call(p, plan, stream, follows).Run();
}

}  // namespace

int64_t WorkspaceBytes(const Problem& problem) {
  const int64_t bytes = MakePlan(problem, false).bytes, hopper = MakePlan(problem, true).bytes;
  return bytes > hopper ? bytes : hopper;
}

const char* Run(const Problem& p, CUstream_st* stream) { return RunOne(p, stream, false); }

const char* RunAll(const Problem* problems, int count, CUstream_st* stream) {
  for (int i = 0; i < count; ++i) {
    if (const char* error = RunOne(problems[i], stream, i > 0)) return error;
  }
  return nullptr;
}

// A gate is sooner done to outputs than to rows: by all blocks, and not while the next weights wait for it. Without it
// the third layer needs no more of the workspace.
const char* RunBlock(const Problem (&layers)[3], CUstream_st* stream) {
  Problem p[3] = {layers[0], layers[1], layers[2]};
  Problem &up = p[1], &down = p[2];
  bool hopper = false;
  JAXINT8_TRY(HasWgmma(&hopper));
  const bool fits = up.kind == Problem::Kind::kLinear && up.residual == nullptr && up.n == 2 * down.k && down.k > 0 &&
                    down.x == up.y && down.prologue == Prologue::kSiluGate;
  // Where weights are narrow, the kernel for narrow ones and a gate of its own take less; up to 2,560 columns.
  bool takes = up.path == Path::kAuto && up.m <= kSwappedM && up.k > 0 && up.k % 16 == 0;
  // With high parts of 16 rows skinny.h has no room for the groups of a gate: 69.4 us, and with a gate of its own 67.5.
  if (up.m > 8 && up.m <= kStreamM && up.options.rule != Rule::kNone) takes = false;
  if (hopper && fits && takes && (up.k > kNarrowK || !MakePlan(up, hopper).narrow)) {
    up.gated = true;
    down.prologue = Prologue::kNone;
  }
  return RunAll(p, 3, stream);
}

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
  JAXINT8_TRY(Multiprocessors(&multiprocessors));
  JAXINT8_TRY(HasWgmma(&hopper));
  LaunchQueue queue(stream, false);
  queue.StartEarly();
  const auto launch = [&](auto kernel, int64_t blocks) {
    using Kernel = decltype(kernel);
#ifdef __CUDACC__
    const int64_t apart = hopper ? SpreadBytes(blocks, true, multiprocessors) : 0;
#else
    const int64_t apart = 0;  // the executor sees who goes beyond what he needs
#endif
    const int64_t shared = apart > Kernel::kShared ? apart : Kernel::kShared;
    return queue.Launch<Kernel>(blocks, Kernel::kMaxThreads, shared, params);
  };
  if (shape.parts == 1) return launch(LargestKernel<true, true>(), p.m);
  JAXINT8_TRY(launch(LargestKernel<true, false>(), p.m * shape.parts));
  return launch(LargestKernel<false, true>(), p.m);
}

#undef JAXINT8_TRY

}  // namespace jaxint8::cuda
