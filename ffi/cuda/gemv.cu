// Queues the layers of gemv.h.
#include "dispatch.h"
#include "gemv.h"

namespace jaxint8::cuda {

template <typename Kernel>
const char* Call::GemvWith(int rows) {
  const int64_t n = Outputs(), blocks = n < multiprocessors_ ? n : multiprocessors_, warps = blocks * kGemvWarps;
  GemvParams g{};
  g.rows = Rows();
  g.w = Weights();
  g.k = static_cast<int>(p_.k);
  g.base = n / warps;
  g.more = n % warps;
  g.up = n;
  const int64_t row_bytes = p_.k * TypeBytes(p_.type);
  g.beside = GemvBeside(p_.prologue, rows, row_bytes, p_.k);
  const int64_t rows_of_warp = (g.base + (g.more > 0)) * (p_.gated ? 2 : 1);
  const GemvShape shape = ChooseGemv(rows, plan_.has_rule, p_.k, row_bytes, rows_of_warp, g.beside);
  g.piece = shape.piece;
  g.depth = shape.depth;
  g.epilogue = MakeEpilogue();
  return queue_.Launch<Kernel>(blocks, Kernel::kMaxThreads, shape.shared, g);
}

template <Type kType, Rule kRule, int kRows>
const char* Call::GemvGated() {
  constexpr int kNumber = static_cast<int>(kRule);
  return p_.gated ? GemvWith<GemvKernel<kType, kNumber, kRows, true>>(kRows)
                  : GemvWith<GemvKernel<kType, kNumber, kRows, false>>(kRows);
}

template <Type kType>
const char* Call::GemvRule() {
  switch (p_.options.rule) {
    case Rule::kNone:
      return p_.m == 1 ? GemvGated<kType, Rule::kNone, 1>() : GemvGated<kType, Rule::kNone, 2>();
    case Rule::kThreshold:
      return GemvGated<kType, Rule::kThreshold, 1>();
    case Rule::kRelative:
      return GemvGated<kType, Rule::kRelative, 1>();
    default:
      return GemvGated<kType, Rule::kTopK, 1>();
  }
}

const char* Call::Gemv() {
  return WithType(p_.type, [&](auto type) { return GemvRule<decltype(type)::kType>(); });
}

}  // namespace jaxint8::cuda
