// What is run: one layer, some behind each other, or a decoder layer's block; and what is queued for a layer. This file
// and those of the kernels are compiled by nvcc, and by the C++ compiler for the block executor.
#include <cstdint>

#include "dispatch.h"
#include "gather.h"
#include "host.h"
#include "int8.h"
#include "plan.h"
#include "queue.h"

namespace jaxint8::cuda {

const char* Call::Run() {
  JAXINT8_TRY(Multiprocessors(&multiprocessors_));
  JAXINT8_TRY(HasWgmma(&wgmma_));
  if ((p_.path == Path::kWgmma || p_.path == Path::kSparse || p_.path == Path::kNarrow || p_.path == Path::kPaired) &&
      !wgmma_)
    return "the wgmma kernels need compute capability 9.0";
  wgmma_ = wgmma_ && p_.path != Path::kTiled && p_.k > 0;
  // Where it pays, and the first kernel reads nothing before it waits: the stream does.
  const bool few = p_.m <= kSpreadMost * multiprocessors_ || (!plan_.has_rule && p_.k <= 2048);
  if (plan_.gemv || plan_.paired || (wgmma_ && !plan_.stream && few)) queue_.StartEarly();
  if (plan_.clear && plan_.bits_bytes > 0) {
    JAXINT8_TRY(queue_.Launch<ClearKernel>(1, ClearKernel::kMaxThreads, 0,
                                           {Scratch<uint32_t>(plan_.bits, plan_.bits_bytes), plan_.bits_bytes / 4}));
  }
  switch (p_.kind) {
    case Problem::Kind::kQuantize:
      return Quantize();
    case Problem::Kind::kProduct:
      return Product();
    case Problem::Kind::kLinear:
      return Linear();
    case Problem::Kind::kPrologue:
      return QueuePrologue(queue_, p_.type, Rows(), Memory<uint8_t>(p_.y, p_.m * p_.k * TypeBytes(p_.type)));
    case Problem::Kind::kLargest:
      break;  // queued by RunLargest
  }
  return "unknown kind";
}

const char* Call::Quantize() {
  QuantizeParams q = Rows();
  q.lo = Memory<int8_t>(p_.lo, p_.m * p_.k);
  q.hi = Memory<int8_t>(p_.hi, p_.m * p_.k);
  q.stride = p_.k;
  q.code_rows = p_.m;
  q.row_scale = Memory<float>(p_.row_scale, 4 * p_.m);
  return QueueQuantizers(queue_, p_.type, q);
}

const char* Call::Align(Ptr<const int8_t> in, int64_t rows, int64_t offset) {
  const AlignParams a{in, rows, p_.k, plan_.stride, Scratch<int8_t>(offset, rows * plan_.stride)};
  const int64_t blocks = (rows * plan_.stride / 16 + AlignKernel::kMaxThreads - 1) / AlignKernel::kMaxThreads;
  const int64_t most = 8 * multiprocessors_;
  return queue_.Launch<AlignKernel>(blocks < most ? blocks : most, AlignKernel::kMaxThreads, AlignKernel::kShared, a);
}

const char* Call::Product() {
  Ptr<const int8_t> a = Memory<const int8_t>(p_.x, p_.m * p_.k);
  int64_t stride = p_.k;
  if (plan_.align_a) {
    JAXINT8_TRY(Align(a, p_.m, plan_.lo));
    a = Scratch<const int8_t>(plan_.lo, p_.m * plan_.stride);
    stride = plan_.stride;
  }
  if (plan_.stream) {
    QuantizeParams q{};
    q.lo = Scratch<int8_t>(plan_.lo, p_.m * plan_.stride);
    q.stride = stride;
    return Stream(q);
  }
  return Multiply(a, stride, Ptr<const int8_t>{});
}

const char* Call::Linear() {
#ifdef JAXINT8_HAS_WGMMA
  if (plan_.gemv) return Gemv();
  if (plan_.paired) return Paired();
#endif
  QuantizeParams q = Rows();
  if (plan_.apart) {
    const Ptr<uint8_t> rows = Scratch<uint8_t>(plan_.rows, p_.m * p_.k * TypeBytes(p_.type));
    JAXINT8_TRY(QueuePrologue(queue_, p_.type, q, rows));
    q.x = rows;
    q.prologue.kind = Prologue::kNone;
  }
  if (plan_.fused) return Stream(q);
  q.lo = Scratch<int8_t>(plan_.lo, plan_.code_rows * plan_.stride);
  q.row_scale = Scratch<float>(plan_.row_scale, 4 * p_.m);
  q.stride = plan_.stride;
  q.code_rows = plan_.code_rows;
  if (plan_.has_rule) {
    q.hi = Scratch<int8_t>(plan_.hi, plan_.code_rows * plan_.stride);
    if (plan_.sparse) {
      q.sparse = Sparse<uint8_t>();
    } else if (plan_.stream) {
      q.pieces = Scratch<uint8_t>(plan_.pieces, p_.m * plan_.piece_stride);
      q.piece_stride = plan_.piece_stride;
    } else if (plan_.gather && !plan_.by_column) {
      q.used = Scratch<uint32_t>(plan_.bits, plan_.bits_bytes);
    }
  }
  JAXINT8_TRY(QueueQuantizers(queue_, p_.type, q));
  if (plan_.stream) return Stream(q);
  return Multiply(q.lo, plan_.stride, q.hi);
}

const char* Call::GatherOutliers(Ptr<const int8_t> hi, Ptr<const int8_t> w, int64_t w_stride, TiledParams* t) {
  GatherParams g{};
  g.a = hi;
  g.b = w;
  g.rows_a = p_.m;
  g.rows_b = p_.n;
  g.stride_a = plan_.stride;
  g.stride_b = w_stride;
  g.used = Scratch<const uint32_t>(plan_.bits, plan_.bits_bytes);
  g.words = plan_.bits_bytes / 4;
  g.capacity = plan_.capacity;
  g.out_a = Scratch<int8_t>(plan_.gathered_a, p_.m * plan_.capacity);
  g.out_b = Scratch<int8_t>(plan_.gathered_w, p_.n * plan_.capacity);
  g.count = Scratch<uint32_t>(plan_.count, 4);
  g.k = p_.k;
  g.aligned = plan_.align_w;
  if (wgmma_ && ChunkGatherKernel::Takes(g, multiprocessors_)) {
    g.share_a = static_cast<int>((p_.m + multiprocessors_ - 1) / multiprocessors_);
    g.share_b = static_cast<int>((p_.n + multiprocessors_ - 1) / multiprocessors_);
    g.chunk_a = static_cast<int>(ChunkGatherKernel::kChunk / g.stride_a);
    g.chunk_b = static_cast<int>(ChunkGatherKernel::kChunk / g.stride_b);
    JAXINT8_TRY(queue_.Launch<ChunkGatherKernel>(multiprocessors_, ChunkGatherKernel::kMaxThreads,
                                                 ChunkGatherKernel::Shared(plan_.capacity), g));
  } else {
    const int64_t blocks = GatherKernel::Blocks(p_.m, p_.n);
    const int64_t most = 8 * multiprocessors_;
    JAXINT8_TRY(queue_.Launch<GatherKernel>(blocks < most ? blocks : most, GatherKernel::kMaxThreads,
                                            GatherKernel::Shared(plan_.capacity), g));
  }
  t->count = g.count;
  t->capacity = plan_.capacity;
  t->gathered = {g.out_a, g.out_b, plan_.capacity, plan_.capacity, 0};
  return nullptr;
}

const char* Call::Multiply(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi) {
  TiledParams t{};
  t.m = p_.m;
  t.n = p_.n;
  t.epilogue = MakeEpilogue();
  Ptr<const int8_t> w = Weights();
  int64_t w_stride = p_.k;
  if (plan_.align_w) {
    JAXINT8_TRY(Align(w, p_.n, plan_.aligned_w));
    w = Scratch<const int8_t>(plan_.aligned_w, p_.n * plan_.stride);
    w_stride = plan_.stride;
  }
#ifdef JAXINT8_HAS_WGMMA
  if (plan_.skinny) return Skinny(lo, stride, hi, w);
  if (plan_.narrow) return Narrow(lo, stride, hi, w, w_stride);
  if (plan_.sparse) return SparseProduct(lo, stride, hi, w, w_stride);
  if (plan_.swapped) return Swapped(lo, stride, hi, w, w_stride);
#endif
  // Columns beyond k are zeros in padded codes and aligned copies, and are not read elsewhere.
  const int64_t k = RoundUp(p_.k, 16);
  t.lo = {lo, w, stride, w_stride, k};
  if (hi) {
    JAXINT8_TRY(GatherOutliers(hi, w, w_stride, &t));
    t.all = {hi, w, stride, w_stride, k};
  }
#ifdef JAXINT8_HAS_WGMMA
  if (wgmma_) return Wgmma(t);
#endif
  return Tiled(t);
}

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

}  // namespace jaxint8::cuda
