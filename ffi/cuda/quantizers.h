// Queues the kernels of quantize.h: what its files share, one for each rule and quantize.cu for the rest.
#ifndef JAXINT8_FFI_CUDA_QUANTIZERS_H_
#define JAXINT8_FFI_CUDA_QUANTIZERS_H_

#include <cstdint>

#include "int8.h"
#include "quantize.h"
#include "queue.h"

namespace jaxint8::cuda {

// Rows that suit shared memory, with so many bytes of it for each: by a rule, or with marked columns.
const char* QueueWithoutRule(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged);
const char* QueueThreshold(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged);
const char* QueueRelative(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged);
const char* QueueTopK(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged);
const char* QueueMarked(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged);

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
  constexpr bool kHeld = kPlace == RowPlace::kRegisters || kPlace == RowPlace::kManyRegisters;
  const int threads = kWide   ? WideThreads(q.k)
                      : kHeld ? HoldingThreads(q.k, kPlace)
                      : finds ? MarkThreads(q.m, q.stride)
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

// What those functions do.
template <int kRule>
const char* QueueStagedQuantizer(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged) {
  return WithType(type, [&](auto constant) {
    constexpr Type kType = decltype(constant)::kType;
    const RowPlace place = PlaceOfRows(type, q);
#if !defined(__CUDACC__) || defined(JAXINT8_WGMMA)
    if constexpr (kRule != kMarked) {
      if (place == RowPlace::kCluster) return QueueQuantizer<kType, true, RowPlace::kCluster, kRule>(queue, q, 0);
    }
#endif
    if constexpr (kRule != kMarked && HoldsMany(kType, static_cast<Rule>(kRule))) {
      if (place == RowPlace::kManyRegisters) {
        return QueueQuantizer<kType, true, RowPlace::kManyRegisters, kRule>(queue, q, 0);
      }
    }
    return place == RowPlace::kRegisters ? QueueQuantizer<kType, true, RowPlace::kRegisters, kRule>(queue, q, 0)
                                         : QueueQuantizer<kType, true, RowPlace::kShared, kRule>(queue, q, staged);
  });
}

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_QUANTIZERS_H_
