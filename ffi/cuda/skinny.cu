// Queues the product of skinny.h.
#include "dispatch.h"
#include "skinny.h"

namespace jaxint8::cuda {

template <int kTiles, bool kHigh, bool kGated>
const char* Call::SkinnyGated(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w) {
  using Kernel = SkinnyKernel<kTiles, kHigh, kGated>;
  constexpr int kUnit = kGated ? 2 : 1;
  const int64_t groups = (Outputs() + kStreamOutputs - 1) / kStreamOutputs;
  const int64_t blocks = groups < multiprocessors_ ? groups : multiprocessors_;
  const SkinnyShape shape = ChooseSkinny(kTiles, kHigh, Outputs(), kUnit, p_.k, blocks);
  SkinnyParams s{};
  s.m = p_.m;
  s.n = s.up = Outputs();
  s.k = p_.k;
  s.groups = shape.groups;
  s.depth = shape.depth;
  const int64_t early = kHigh && kTiles > 1 ? kSkinnyEarlyHigh : kSkinnyEarly;
  s.early = queue_.follows() ? EarlySteps(early, p_.k, shape.groups * kGroupBytes * kSkinnyWarps, shape.depth) : 0;
  s.epilogue = MakeEpilogue();
  JAXINT8_TRY(MakeTileMap(&s.w, w, p_.n, p_.k, p_.k, kStreamOutputs));
  s.lo = lo;
  s.hi = hi;
  s.stride = stride;
  return queue_.Launch<Kernel>(blocks, Kernel::kMaxThreads, shape.shared, s);
}

template <int kTiles, bool kHigh>
const char* Call::SkinnyWith(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w) {
  if (p_.gated) {
    if constexpr (kTiles == 1 || !kHigh) return SkinnyGated<kTiles, kHigh, true>(lo, stride, hi, w);
    return "gate: no kernel for 9 to 16 rows with high parts";  // RunBlock does not ask for it
  }
  return SkinnyGated<kTiles, kHigh, false>(lo, stride, hi, w);
}

const char* Call::Skinny(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w) {
  if (p_.m <= 8) return hi ? SkinnyWith<1, true>(lo, stride, hi, w) : SkinnyWith<1, false>(lo, stride, hi, w);
  return hi ? SkinnyWith<2, true>(lo, stride, hi, w) : SkinnyWith<2, false>(lo, stride, hi, w);
}

}  // namespace jaxint8::cuda
