// Lanes of teams that pick the weights of their high parts.
#include "lanes_avx512.h"

namespace jaxint8::cpu {

void PickingLanes(const Block& b, const LanesPart& part, int64_t rows) {
  kLanesOf<HighParts::kPicked>[rows - 1](b, part);
}

}  // namespace jaxint8::cpu
