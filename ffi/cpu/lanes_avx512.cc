// Lanes without high parts of their own, which take a while to compile; picking_lanes_avx512.cc has the others.
#include "lanes_avx512.h"

namespace jaxint8::cpu {

void LanesAlone(const Block& b, const LanesPart& part, int64_t rows) { kLanesOf<HighParts::kNone>[rows - 1](b, part); }

void GatheringLanes(const Block& b, const LanesPart& part, int64_t rows) {
  kLanesOf<HighParts::kGathered>[rows - 1](b, part);
}

}  // namespace jaxint8::cpu
