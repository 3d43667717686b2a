// Queues the product of swapped.h.
#include "dispatch.h"
#include "swapped.h"

namespace jaxint8::cuda {

template <typename Kernel>
const char* Call::SwappedWith(SwappedParams& s) {
  const int64_t tiles_m = (s.m + Kernel::kRows - 1) / Kernel::kRows,
                tiles_n = (s.n + Kernel::kOutputs - 1) / Kernel::kOutputs;
  const int64_t blocks = tiles_m * tiles_n * s.cluster;
  s.stages = ChooseStages(blocks, multiprocessors_, Kernel::kMinBlocks, Kernel::kStageBytes);
  const bool longer = plan_.has_rule && p_.m <= kSwappedM && blocks <= multiprocessors_;
  const int64_t early = longer ? kSwappedEarlyHigh : kSwappedEarly;
  s.early = queue_.follows() && !plan_.align_w ? EarlySteps(early, p_.k, Kernel::kBytesW, s.stages) : 0;
  return queue_.Launch<Kernel>(blocks, Kernel::kMaxThreads, Kernel::Shared(s.stages, s.cluster), s, s.cluster);
}

template <int kTileN, bool kHigh>
const char* Call::SwappedShaped(SwappedParams& s, const SwappedShape& shape) {
  if (p_.gated) return SwappedWith<SwappedKernel<128, kTileN, kHigh, true>>(s);
  return shape.rows == 64 ? SwappedWith<SwappedKernel<64, kTileN, kHigh, false>>(s)
                          : SwappedWith<SwappedKernel<128, kTileN, kHigh, false>>(s);
}

const char* Call::Swapped(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w,
                          int64_t w_stride) {
  SwappedParams s{};
  s.m = p_.m;
  s.n = s.up = Outputs();
  s.k = p_.k;
  s.epilogue = MakeEpilogue();
  const int rows = SwappedRows(p_.m, plan_.has_rule);
  const SwappedShape shape = ChooseSwapped(p_.m, s.n, p_.k, rows, plan_.has_rule, p_.gated, multiprocessors_);
  s.cluster = shape.cluster;
  JAXINT8_TRY(MakeTileMap(&s.w, w, p_.n, p_.k, w_stride, p_.gated ? 64 : shape.rows));
  JAXINT8_TRY(MakeTileMap(&s.lo, lo, plan_.code_rows, p_.k, stride, rows));
  if (hi) JAXINT8_TRY(MakeTileMap(&s.hi, hi, plan_.code_rows, p_.k, stride, rows));
  if (rows == 128) return SwappedWith<SwappedKernel<64, 128, false, false>>(s);
  if (rows == 32) return hi ? SwappedShaped<32, true>(s, shape) : SwappedShaped<32, false>(s, shape);
  return hi ? SwappedShaped<64, true>(s, shape) : SwappedShaped<64, false>(s, shape);
}

}  // namespace jaxint8::cuda
