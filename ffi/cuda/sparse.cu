// Queues the product of sparse.h.
#include <iterator>

#include "dispatch.h"
#include "sparse.h"

namespace jaxint8::cuda {

template <int kShape>
const char* Call::SparseShaped(const SparseParams& s, int chosen) {
  constexpr const WgmmaShape& shape = kSparseShapes[kShape];
  if (chosen == kShape) return LaunchTiles<SparseKernel<shape.n>>(shape, s);
  if constexpr (kShape + 1 < std::size(kSparseShapes)) return SparseShaped<kShape + 1>(s, chosen);
  return nullptr;
}

const char* Call::SparseProduct(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w,
                                int64_t w_stride) {
  const int chosen = ChooseWgmma(kSparseShapes, p_.m, p_.n, p_.k, multiprocessors_);
  SparseParams s{};
  s.sparse = Sparse<const uint8_t>();
  s.m = p_.m;
  s.n = p_.n;
  s.k = p_.k;
  s.epilogue = MakeEpilogue();
  JAXINT8_TRY(MakeTileMap(&s.lo, lo, plan_.code_rows, p_.k, stride, 128));
  JAXINT8_TRY(MakeTileMap(&s.hi, hi, plan_.code_rows, p_.k, stride, 128));
  JAXINT8_TRY(MakeTileMap(&s.w, w, p_.n, p_.k, w_stride, static_cast<int>(kSparseShapes[chosen].n)));
  return SparseShaped<0>(s, chosen);
}

}  // namespace jaxint8::cuda
