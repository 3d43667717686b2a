// Queues the product of tiled.h.
#include "dispatch.h"
#include "tiled.h"

namespace jaxint8::cuda {

template <typename Kernel>
const char* Call::TiledWith(const TiledParams& t, const TileShape& shape) {
  const int64_t blocks = ((t.m + shape.m - 1) / shape.m) * ((t.n + shape.n - 1) / shape.n);
  return queue_.Launch<Kernel>(blocks, Kernel::kMaxThreads, Kernel::kShared, t);
}

const char* Call::Tiled(const TiledParams& t) {
  switch (ChooseTile(p_.m, p_.n, multiprocessors_)) {
    case 0:
      return TiledWith<TiledKernel<128, 128, 64, 64, 4>>(t, kTileShapes[0]);
    case 1:
      return TiledWith<TiledKernel<64, 64, 32, 32, 4>>(t, kTileShapes[1]);
    default:
      return TiledWith<TiledKernel<32, 64, 16, 32, 4>>(t, kTileShapes[2]);
  }
}

}  // namespace jaxint8::cuda
