// What queues kernels, one after the other, and with it those that quantise rows.
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

  const char* Clear(uint8_t* at, int64_t bytes) {
    follows_ = early_ = false;  // a kernel behind a memset cannot start early
    return cuda::Clear(stream_, at, bytes);
  }

 private:
  CUstream_st* const stream_;
  bool follows_, early_ = false;
};

// Does what stands before a layer with a kernel of its own.
inline const char* QueuePrologue(LaunchQueue& queue, Type type, const QuantizeParams& q, Ptr<uint8_t> y) {
  const PrologueKernelParams params{q.x, y, q.k, q.prologue};
  return WithType(type, [&](auto constant) {
    constexpr Type kType = decltype(constant)::kType;
    const int threads = RowThreads(q.m, q.k);
    return q.k % 8 == 0 ? queue.Launch<PrologueKernel<kType, true>>(q.m, threads, 4 * kTeamWords, params)
                        : queue.Launch<PrologueKernel<kType, false>>(q.m, threads, 4 * kTeamWords, params);
  });
}

template <Type kType, bool kVector, RowPlace kPlace, int kRule>
const char* QueueQuantizer(LaunchQueue& queue, QuantizeParams q, int64_t staged) {
  constexpr bool kWide = kPlace == RowPlace::kCluster;
  const int64_t over = kWide ? WideSpread(q.spread) : q.spread;
  const int64_t apart =
      over > 0 ? SpreadBytes(kWide ? kWideBlocks * q.m : q.m, q.options.rule != Rule::kNone, over) : 0;
  const bool finds = q.options.column_scope && q.parts == 0;
  // With a multiprocessor for each row as many as a block may have; to choose the largest of them takes fewer less.
  constexpr bool kPicks = kRule == static_cast<int>(Rule::kTopK) || kRule == kMarked;
  const bool alone = q.spread > 0 && q.m <= q.spread && !kPicks;
  const int held = HoldingThreads(q.m, q.k, q.options.rule);
  const int threads = kWide                            ? WideThreads(q.k)
                      : kPlace == RowPlace::kRegisters ? held
                      : finds                          ? MarkThreads(q.m, q.stride)
                                                       : RowThreads(q.m, q.stride, alone);
  const int cluster = kWide ? kWideBlocks : finds ? q.mark_blocks : 1;
  const int64_t blocks = kWide ? kWideBlocks * q.m : (q.m + cluster - 1) / cluster * cluster;
  const int marks = q.options.column_scope && q.parts != 1 ? static_cast<int>(MarkBytes(q.k)) : 0;
  constexpr bool kMarks = kPlace == RowPlace::kShared && kRule < 0;
  if constexpr (kRule != 0 && !kMarks && !kWide) {
    if (q.sparse.codes && !q.marking) {
      using Kernel = QuantizeKernel<kType, kVector, kPlace, kRule, true>;
      q.marks_at = static_cast<int>(Kernel::kShared + staged);
      q.sparse_at = q.marks_at + marks;
      const int64_t shared = q.sparse_at + 4 * kSparseWords;
      return queue.Launch<Kernel>(blocks, threads, shared > apart ? shared : apart, q, cluster);
    }
  }
  using Kernel = QuantizeKernel<kType, kVector, kPlace, kRule>;
  q.marks_at = static_cast<int>(Kernel::kShared + staged);
  const int64_t shared = q.marks_at + marks;
  return queue.Launch<Kernel>(blocks, threads, shared > apart ? shared : apart, q, cluster);
}

// Of rows that suit shared memory. Where a block looks for marks first it has more threads than hold a row.
template <Type kType, int kRule>
const char* QueueQuantizerOfRule(LaunchQueue& queue, const QuantizeParams& q, int64_t staged) {
  const bool finds = q.options.column_scope && q.parts == 0;
#if !defined(__CUDACC__) || defined(JAXINT8_WGMMA)
  if constexpr (kRule != kMarked) {
    if (q.wide) return QueueQuantizer<kType, true, RowPlace::kCluster, kRule>(queue, q, 0);
  }
#endif
  return HoldingThreads(q.m, q.k, q.options.rule) > 0 && !finds
             ? QueueQuantizer<kType, true, RowPlace::kRegisters, kRule>(queue, q, 0)
             : QueueQuantizer<kType, true, RowPlace::kShared, kRule>(queue, q, staged);
}
template <Type kType>
const char* QueueStagedQuantizer(LaunchQueue& queue, const QuantizeParams& q, int64_t staged) {
  if (q.marking) return QueueQuantizer<kType, true, RowPlace::kShared, -1>(queue, q, staged);
  if (q.options.column_scope) return QueueQuantizerOfRule<kType, kMarked>(queue, q, staged);
  switch (q.options.rule) {
    case Rule::kNone:
      return QueueQuantizerOfRule<kType, static_cast<int>(Rule::kNone)>(queue, q, staged);
    case Rule::kThreshold:
      return QueueQuantizerOfRule<kType, static_cast<int>(Rule::kThreshold)>(queue, q, staged);
    case Rule::kRelative:
      return QueueQuantizerOfRule<kType, static_cast<int>(Rule::kRelative)>(queue, q, staged);
    default:
      return QueueQuantizerOfRule<kType, static_cast<int>(Rule::kTopK)>(queue, q, staged);
  }
}

// Columns are marked first, if they are taken out whole and not by each block for itself, then codes are written.
inline const char* QueueQuantizers(LaunchQueue& queue, Type type, QuantizeParams q) {
  return WithType(type, [&](auto constant) -> const char* {
    constexpr Type kType = decltype(constant)::kType;
    const int64_t staged = StagedBytes(kType, q.k, q.stride, q.prologue.kind);
    for (const bool marking : {true, false}) {
      if (marking && (!q.options.column_scope || q.parts == 0)) continue;
      q.marking = marking;
      if (staged > 0) {
        JAXINT8_TRY(QueueStagedQuantizer<kType>(queue, q, staged));
      } else if (q.k % 8 == 0 && q.stride % 8 == 0) {
        JAXINT8_TRY((QueueQuantizer<kType, true, RowPlace::kMemory, -1>(queue, q, 0)));
      } else {
        JAXINT8_TRY((QueueQuantizer<kType, false, RowPlace::kMemory, -1>(queue, q, 0)));
      }
    }
    return nullptr;
  });
}

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_QUEUE_H_
