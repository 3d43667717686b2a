// Quantises rows without a rule.
#include "quantizers.h"

namespace jaxint8::cuda {

const char* QueueWithoutRule(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged) {
  return QueueStagedQuantizer<static_cast<int>(Rule::kNone)>(queue, type, q, staged);
}

}  // namespace jaxint8::cuda
