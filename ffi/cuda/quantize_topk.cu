// Quantises rows by the largest values of each row.
#include "quantizers.h"

namespace jaxint8::cuda {

const char* QueueTopK(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged) {
  return QueueStagedQuantizer<static_cast<int>(Rule::kTopK)>(queue, type, q, staged);
}

}  // namespace jaxint8::cuda
