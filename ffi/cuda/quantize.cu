// Queues what is done to rows: by the file of their rule, if they suit shared memory, else here.
#include "prologue.h"
#include "quantize.h"
#include "quantizers.h"
#include "queue.h"

namespace jaxint8::cuda {

const char* QueuePrologue(LaunchQueue& queue, Type type, const QuantizeParams& q, Ptr<uint8_t> y) {
  const PrologueKernelParams params{q.x, y, q.k, q.prologue};
  return WithType(type, [&](auto constant) {
    constexpr Type kType = decltype(constant)::kType;
    const int threads = RowThreads(q.m, q.k);
    return q.k % 8 == 0 ? queue.Launch<PrologueKernel<kType, true>>(q.m, threads, 4 * kTeamWords, params)
                        : queue.Launch<PrologueKernel<kType, false>>(q.m, threads, 4 * kTeamWords, params);
  });
}

namespace {

template <Type kType>
const char* QueueStaged(LaunchQueue& queue, const QuantizeParams& q, int64_t staged) {
  if (q.marking) return QueueQuantizer<kType, true, RowPlace::kShared, -1>(queue, q, staged);
  if (q.options.column_scope) return QueueMarked(queue, kType, q, staged);
  switch (q.options.rule) {
    case Rule::kNone:
      return QueueWithoutRule(queue, kType, q, staged);
    case Rule::kThreshold:
      return QueueThreshold(queue, kType, q, staged);
    case Rule::kRelative:
      return QueueRelative(queue, kType, q, staged);
    default:
      return QueueTopK(queue, kType, q, staged);
  }
}

}  // namespace

const char* QueueQuantizers(LaunchQueue& queue, Type type, QuantizeParams q) {
  return WithType(type, [&](auto constant) -> const char* {
    constexpr Type kType = decltype(constant)::kType;
    const int64_t staged = StagedBytes(kType, q.k, q.stride, q.prologue.kind);
    for (const bool marking : {true, false}) {
      if (marking && (!q.options.column_scope || q.parts == 0)) continue;
      q.marking = marking;
      if (staged > 0) {
        JAXINT8_TRY(QueueStaged<kType>(queue, q, staged));
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
