// Quantises rows by a threshold.
#include "quantizers.h"

namespace jaxint8::cuda {

const char* QueueThreshold(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged) {
  return QueueStagedQuantizer<static_cast<int>(Rule::kThreshold)>(queue, type, q, staged);
}

}  // namespace jaxint8::cuda
