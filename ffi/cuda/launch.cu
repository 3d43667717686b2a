// What is run: one layer, some behind each other, or a decoder layer's block. Compiled by nvcc, and by the C++ compiler
// for the block executor.
#include <cstdint>

#include "dispatch.h"
#include "host.h"
#include "int8.h"
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
  return p.kind == Problem::Kind::kLargest ? RunLargest(p, hopper, stream) : Call(p, plan, stream, follows).Run();
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

#undef JAXINT8_TRY

}  // namespace jaxint8::cuda
