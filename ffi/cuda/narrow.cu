// Queues the product of narrow.h.
#include <iterator>

#include "dispatch.h"
#include "narrow.h"

namespace jaxint8::cuda {

template <bool kHigh, int kShape>
const char* Call::NarrowShaped(NarrowParams& s, int chosen) {
  if constexpr (kShape + 1 < std::size(kNarrowTiles)) {
    if (chosen != kShape) return NarrowShaped<kHigh, kShape + 1>(s, chosen);
  }
  using Kernel = NarrowKernel<kNarrowTiles[kShape], kHigh>;
  constexpr int64_t kFit = (kSharedMost - Kernel::kFixedBytes) / (Kernel::kStageBytes + 16);
  s.stages = static_cast<int>(kFit < kNarrowStages ? kFit : kNarrowStages);
  // Without high parts two warpgroups take turns: a stage must always be the same one's.
  static_assert(kHigh || (kFit < kNarrowStages ? kFit : kNarrowStages) % 2 == 0, "an even ring");
  s.early = queue_.follows() && !plan_.align_w ? EarlySteps(kSwappedEarly, p_.k, Kernel::kBytesW, s.stages) : 0;
  const int64_t tiles = (p_.m + 63) / 64 * ((p_.n + kNarrowTiles[kShape] - 1) / kNarrowTiles[kShape]);
  return queue_.Launch<Kernel>(tiles < multiprocessors_ ? tiles : multiprocessors_, Kernel::kMaxThreads,
                               Kernel::Shared(s.stages), s);
}

const char* Call::Narrow(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w,
                         int64_t w_stride) {
  const int chosen = ChooseNarrow(p_.m, p_.n, static_cast<bool>(hi), multiprocessors_);
  NarrowParams s{};
  s.m = p_.m;
  s.n = p_.n;
  s.k = p_.k;
  s.epilogue = MakeEpilogue();
  JAXINT8_TRY(MakeTileMap(&s.w, w, p_.n, p_.k, w_stride, kNarrowTiles[chosen]));
  JAXINT8_TRY(MakeTileMap(&s.lo, lo, plan_.code_rows, p_.k, stride, 64));
  if (hi) JAXINT8_TRY(MakeTileMap(&s.hi, hi, plan_.code_rows, p_.k, stride, 64));
  return hi ? NarrowShaped<true, 0>(s, chosen) : NarrowShaped<false, 0>(s, chosen);
}

}  // namespace jaxint8::cuda
