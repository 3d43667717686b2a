// Queues the product of stream.h.
#include "dispatch.h"
#include "stream.h"

namespace jaxint8::cuda {

template <Type kType, bool kFused, int kTiles, bool kAligned>
const char* Call::StreamWith(const StreamParams& s) {
  using Kernel = StreamKernel<kType, kFused, kTiles, kAligned>;
  const bool with_hi = plan_.has_rule;
  const StreamLayout layout = MakeStreamLayout<kTiles, kFused>(s.m, s.k, with_hi, plan_.by_column);
  const int64_t outputs = kStreamOutputs * (kStreamWarps / s.split);
  const int64_t blocks = (s.n + outputs - 1) / outputs;
  const int64_t most = Kernel::kMinBlocks * multiprocessors_;
  return queue_.Launch<Kernel>(blocks < most ? blocks : most, kStreamThreads, layout.bytes, s);
}

const char* Call::Stream(const QuantizeParams& q) {
  StreamParams s{};
  s.rows = q;
  s.w = Weights();
  s.m = p_.m;
  s.k = p_.k;
  s.n = p_.n;
  s.split = ChooseSplit(p_.k);
  s.epilogue = MakeEpilogue();
  if (plan_.fused) {
    static_assert(kFusedM <= 8, "one tile of rows");
    return WithType(p_.type, [&](auto type) { return StreamWith<decltype(type)::kType, true, 1, true>(s); });
  }
  if (p_.k % 16 == 0)
    return p_.m <= 8 ? StreamWith<Type::kF32, false, 1, true>(s) : StreamWith<Type::kF32, false, 2, true>(s);
  return p_.m <= 8 ? StreamWith<Type::kF32, false, 1, false>(s) : StreamWith<Type::kF32, false, 2, false>(s);
}

}  // namespace jaxint8::cuda
