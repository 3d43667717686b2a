// Maxima and exact sums over a block.
#ifndef JAXINT8_FFI_CUDA_REDUCE_H_
#define JAXINT8_FFI_CUDA_REDUCE_H_

#include "device.h"

namespace jaxint8::cuda {

// Shared memory, in words: two buffers in turn, three values, one word per warp.
inline constexpr int kReduceWords = 2 * 3 * 32;

// All threads of the block call every function. One barrier each: a buffer is written again after the next one.
class BlockReducer {
 public:
  JAXINT8_DEVICE explicit BlockReducer(Ptr<uint32_t> words) : words_(words) {}

  JAXINT8_DEVICE Ptr<uint32_t> Next() {
    turn_ ^= 1;
    return words_ + turn_ * (kReduceWords / 2);
  }

  JAXINT8_DEVICE uint32_t Max(uint32_t v) {
    const Ptr<uint32_t> buffer = Next();
    v = WarpMax(v);
    if (Lane() == 0) Store(buffer + Warp(), v);
    Barrier();
    return WarpMax(HasWord() ? Load(buffer + Lane()) : 0);
  }

  JAXINT8_DEVICE uint64_t Sum(uint64_t v) {
    const Ptr<uint32_t> buffer = Next();
    v = WarpSumWide(v);
    if (Lane() == 0) {
      Store(buffer + Warp(), static_cast<uint32_t>(v));
      Store(buffer + 32 + Warp(), static_cast<uint32_t>(v >> 32));
    }
    Barrier();
    v = 0;
    if (HasWord()) v = Load(buffer + Lane()) | static_cast<uint64_t>(Load(buffer + 32 + Lane())) << 32;
    return WarpSumWide(v);
  }

  static JAXINT8_DEVICE int Lane() { return ThreadIndex() % 32; }
  static JAXINT8_DEVICE int Warp() { return ThreadIndex() / 32; }
  // Whether there is a warp of this lane's number.
  static JAXINT8_DEVICE bool HasWord() { return Lane() < BlockThreads() / 32; }

 private:
  // In three parts, whose sums over 32 lanes fit.
  static JAXINT8_DEVICE uint64_t WarpSumWide(uint64_t v) {
    constexpr uint32_t kMask = (1u << 27) - 1;
    const uint64_t low = WarpSum(static_cast<uint32_t>(v) & kMask);
    const uint64_t middle = WarpSum(static_cast<uint32_t>(v >> 27) & kMask);
    const uint64_t high = WarpSum(static_cast<uint32_t>(v >> 54));
    return (high << 54) + (middle << 27) + low;
  }

  const Ptr<uint32_t> words_;
  int turn_ = 0;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_REDUCE_H_
