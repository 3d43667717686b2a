// Queues the layers of paired.h.
#include "dispatch.h"
#include "paired.h"

namespace jaxint8::cuda {

template <Type kType, Rule kRule, int kTileN, int kHeld>
const char* Call::PairedWith(const PairedShape& shape) {
  using Kernel = PairedKernel<kType, static_cast<int>(kRule), kTileN, kHeld>;
  const int64_t tiles_n = (p_.n + 2 * kTileN - 1) / (2 * kTileN) * 2;
  PairedParams s{};
  s.rows = Rows();
  s.m = p_.m;
  s.n = p_.n;
  s.tiles_n = static_cast<uint32_t>(tiles_n);
  s.inverse = static_cast<uint32_t>(((int64_t{1} << 32) + tiles_n - 1) / tiles_n);
  s.stages = shape.stages;
  s.early = queue_.follows();
  s.epilogue = MakeEpilogue();
  JAXINT8_TRY(MakeTileMap(&s.w, Weights(), p_.n, p_.k, p_.k, kTileN));
  return queue_.Launch<Kernel>(PairedBlocks(p_.m, p_.n, kTileN), Kernel::kMaxThreads, shape.shared, s, 2);
}

// kFirst: of the shapes that are left to compare with.
template <Type kType, Rule kRule, int kFirst>
const char* Call::PairedShaped(const PairedShape& shape) {
  constexpr PairedShape kCut = kPairedShapes[kFirst];
  if constexpr (kFirst + 1 < static_cast<int>(sizeof kPairedShapes / sizeof *kPairedShapes)) {
    if (shape.outputs != kCut.outputs || shape.held != kCut.held) return PairedShaped<kType, kRule, kFirst + 1>(shape);
  }
  return PairedWith<kType, kRule, kCut.outputs, kCut.held>(shape);
}

const char* Call::Paired() {
  const PairedShape shape = ChoosePaired(p_, plan_.has_rule);
  return WithType(p_.type, [&](auto type) {
    constexpr Type kType = decltype(type)::kType;
    switch (p_.options.rule) {
      case Rule::kNone:
        return PairedShaped<kType, Rule::kNone, 0>(shape);
      case Rule::kThreshold:
        return PairedShaped<kType, Rule::kThreshold, 0>(shape);
      default:
        return PairedShaped<kType, Rule::kRelative, 0>(shape);
    }
  });
}

}  // namespace jaxint8::cuda
