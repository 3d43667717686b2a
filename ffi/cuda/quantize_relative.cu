// Quantises rows by a threshold relative to each row.
#include "quantizers.h"

namespace jaxint8::cuda {

const char* QueueRelative(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged) {
  return QueueStagedQuantizer<static_cast<int>(Rule::kRelative)>(queue, type, q, staged);
}

}  // namespace jaxint8::cuda
