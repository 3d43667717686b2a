// Queues the product of wgmma.h.
#include <iterator>

#include "dispatch.h"
#include "wgmma.h"

namespace jaxint8::cuda {

template <typename Kernel>
const char* Call::WgmmaWith(const TiledParams& t, const WgmmaShape& shape) {
  WgmmaParams w{};
  w.m = t.m;
  w.n = t.n;
  w.k = p_.k;
  w.count = t.count;
  w.capacity = t.capacity;
  w.epilogue = t.epilogue;
  const int box_n = static_cast<int>(shape.n / shape.cluster);
  const auto maps = [&](OperandMaps* to, const Operands& o, int64_t rows, int64_t k) {
    const char* error = MakeTileMap(&to->a, o.a, rows, k, o.stride_a, Kernel::kTileM);
    return error != nullptr ? error : MakeTileMap(&to->b, o.b, t.n, k, o.stride_b, box_n);
  };
  JAXINT8_TRY(maps(&w.lo, t.lo, plan_.code_rows, p_.k));
  if (t.count) {
    JAXINT8_TRY(maps(&w.gathered, t.gathered, p_.m, t.capacity));
    JAXINT8_TRY(maps(&w.all, t.all, plan_.code_rows, p_.k));
  }
  return LaunchTiles<Kernel>(shape, w);
}

template <int kShape>
const char* Call::WgmmaShaped(const TiledParams& t, int chosen) {
  constexpr const WgmmaShape& shape = kWgmmaShapes[kShape];
  if (chosen == kShape) return WgmmaWith<WgmmaKernel<shape.n, shape.cluster, shape.turns>>(t, shape);
  if constexpr (kShape + 1 < std::size(kWgmmaShapes)) return WgmmaShaped<kShape + 1>(t, chosen);
  return nullptr;
}

const char* Call::Wgmma(const TiledParams& t) {
  return WgmmaShaped<0>(t, ChooseWgmma(kWgmmaShapes, p_.m, p_.n, p_.k, multiprocessors_));
}

}  // namespace jaxint8::cuda
