// The product for many rows on Hopper (sm_90a): tiles through the tensor memory accelerator, products by warpgroups.
//
// Persistent blocks of three warpgroups: one thread of the first keeps kStages stages of shared memory filled, across
// the boundaries of output tiles; the other two multiply, 64 rows each. In a cluster of two, blocks have the same
// columns of the output, and each copies one half of the weights' tile to both: an int8 product would otherwise need
// more from the second-level cache than that can give.
//
// High parts go first, as in tiled.h, shifted left by 7 before the low parts are added.
#ifndef JAXINT8_FFI_CUDA_WGMMA_H_
#define JAXINT8_FFI_CUDA_WGMMA_H_

#include "epilogue.h"
#include "hopper.h"
#include "quantize.h"
#include "tile_output.h"

namespace jaxint8::cuda {

// Two matrices as the accelerator sees them.
struct OperandMaps {
  TileMap a, b;  // boxes: [128 rows][128], [columns / blocks of the cluster][128]
};

struct WgmmaParams {
  OperandMaps lo, gathered, all;
  int64_t m, n, k;
  Ptr<const uint32_t> count;  // as in TiledParams
  int64_t capacity;
  Epilogue epilogue;
};

template <int kTileN, int kBlocks>
class WgmmaKernel {
 public:
  using Params = WgmmaParams;
  static constexpr int kCluster = kBlocks;
  static constexpr int kTileM = 128, kTileK = 128;
  static constexpr int kMaxThreads = 3 * 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBytesA = kTileM * kTileK, kBytesB = kTileN * kTileK;
  static constexpr int kStages = 196608 / (kBytesA + kBytesB);
  // Stages first, in 1024-byte units; then two barriers per stage, and what the outputs need.
  static constexpr int64_t kShared = 1024 + kStages * (kBytesA + kBytesB + 16) + TileOutputBytes(kTileN);

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    WgmmaKernel kernel(p);
    kernel.Work();
#endif
  }

#ifdef JAXINT8_HOPPER

 private:
  static constexpr int kSums = kTileN / 2;  // of a thread: 64 x kTileN in 128 threads

  JAXINT8_DEVICE explicit WgmmaKernel(const Params& p)
      : p_(p),
        rank_(kBlocks > 1 ? ClusterRank() : 0),
        stages_((SharedAddress(SharedMemory()) + 1023) & ~1023u),
        full_(stages_ + kStages * (kBytesA + kBytesB)),
        empty_(full_ + 8 * kStages),
        order_(p.m, p.n, rank_),
        output_(p.epilogue, p.m, p.n, empty_ + 8 * kStages - SharedAddress(SharedMemory())) {}

  JAXINT8_DEVICE void Work() {
    if (ThreadIndex() == 0) {
      FetchMap(&p_.lo.a);
      FetchMap(&p_.lo.b);
      for (int s = 0; s < kStages; ++s) {
        InitBarrier(full_ + 8 * s, 1);
        InitBarrier(empty_ + 8 * s, 8 * kBlocks);  // one arrival of each multiplying warp of the cluster
      }
      output_.InitBarriers();
      FenceBarrierInit();
    }
    if constexpr (kBlocks > 1) {
      ClusterArrive();
      ClusterWait();
    } else {
      Barrier();
    }
    WaitForPreviousKernel();
    AllowNextKernel();
    const int64_t count = p_.count ? Load(p_.count) : 0;
    fits_ = count <= p_.capacity;
    high_ = count == 0 ? 0 : static_cast<int>(((fits_ ? count : p_.k) + kTileK - 1) / kTileK);
    low_ = static_cast<int>((p_.k + kTileK - 1) / kTileK);
    if (ThreadIndex() < 128) {
      GiveRegisters<40>();
      if (ThreadIndex() == 0) Produce();
      if (ThreadIndex() / 32 == 1) Provide();
    } else {
      TakeRegisters<232>();
      Consume();
    }
    // No block may end while another can still write to its memory or arrive at its barriers: the last arrivals have to
    // be known to it.
    if constexpr (kBlocks > 1) ClusterBarrier();
  }

  JAXINT8_DEVICE void Produce() {
    FenceAccelerator();
    const OperandMaps* high = fits_ ? &p_.gathered : &p_.all;
    int stage = 0;
    uint32_t parity = 1;  // the first round finds all stages empty
    order_.ForEach([&](TilePlace place) {
      for (int step = 0; step < high_ + low_; ++step) {
        const OperandMaps* maps = step < high_ ? high : &p_.lo;
        const int32_t k = (step < high_ ? step : step - high_) * kTileK;
        WaitBarrier(empty_ + 8 * stage, parity);
        const uint32_t barrier = full_ + 8 * stage;
        const uint32_t a = stages_ + stage * (kBytesA + kBytesB), b = a + kBytesA;
        ArriveExpecting(barrier, kBytesA + kBytesB);
        CopyTile(&maps->a, a, barrier, k, place.m);
        if constexpr (kBlocks > 1) {
          constexpr int kRows = kTileN / kBlocks;
          const int first = static_cast<int>(rank_) * kRows;
          CopyTileToAll(&maps->b, b + first * kTileK, barrier, k, place.n + first, (1 << kBlocks) - 1);
        } else {
          CopyTile(&maps->b, b, barrier, k, place.n);
        }
        if (++stage == kStages) {
          stage = 0;
          parity ^= 1;
        }
      }
    });
  }

  JAXINT8_DEVICE void Provide() const {
    TileOutput<kTileN> output = output_;
    order_.ForEach([&](TilePlace place) { output.Provide(place); });
  }

  JAXINT8_DEVICE void Consume() {
    int stage = 0;
    uint32_t parity = 0;
    int32_t c[kSums];
    TileOutput<kTileN> output = output_;
    order_.ForEach([&](TilePlace place) {
      const typename TileOutput<kTileN>::Rows rows = output.RowsOf(place);
      if (high_ > 0) {
        Accumulate(c, high_, 0, stage, parity);
#pragma unroll
        for (int i = 0; i < kSums; ++i) c[i] = Combine(0, c[i]);
      }
      Accumulate(c, low_, high_ > 0, stage, parity);
      output.Finish(c, place, rows);
    });
  }

  // c = (add ? c : 0) + the products of the next `steps` stages. One stage's products run while the next are issued.
  JAXINT8_DEVICE void Accumulate(int32_t (&c)[kSums], int steps, uint32_t add, int& stage, uint32_t& parity) const {
    const uint32_t rows = static_cast<uint32_t>(ThreadIndex() / 128 - 1) * 64 * kTileK;
    int last = 0;
    Pin(c);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      WaitBarrier(full_ + 8 * stage, parity);
      const uint32_t at = stages_ + stage * (kBytesA + kBytesB);
      const uint64_t a = TileDescriptor<128>(at + rows), b = TileDescriptor<128>(at + kBytesA);
      ProductFence();
#pragma unroll
      for (int j = 0; j < kTileK / 32; ++j) {
        Product(c, a + 2 * j, b + 2 * j, add);  // 32 bytes further, in units of 16
        add = 1;
      }
      ProductCommit();
      if (step > 0) {
        ProductWait<1>();
        Release(last);
      }
      last = stage;
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    ProductWait<0>();
    Pin(c);
    Release(last);
  }

  // Tells the producers of the cluster that this warp has read the stage.
  JAXINT8_DEVICE void Release(int stage) const {
    const int lane = ThreadIndex() % 32;
    if (lane < kBlocks) ArriveAt(empty_ + 8 * stage, static_cast<uint32_t>(lane));
  }

  const Params& p_;
  const uint32_t rank_, stages_, full_, empty_;
  const TileOrder<kTileM, kTileN, kBlocks> order_;
  const TileOutput<kTileN> output_;
  bool fits_ = true;
  int high_ = 0, low_ = 0;
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_WGMMA_H_
