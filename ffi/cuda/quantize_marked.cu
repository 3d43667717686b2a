// Quantises rows with marked columns.
#include "quantizers.h"

namespace jaxint8::cuda {

const char* QueueMarked(LaunchQueue& queue, Type type, const QuantizeParams& q, int64_t staged) {
  return QueueStagedQuantizer<kMarked>(queue, type, q, staged);
}

}  // namespace jaxint8::cuda
