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

// kTurns: each multiplying warpgroup takes every other tile for itself, and multiplies while the other writes outputs.
template <int kTileN, int kBlocks, bool kTurns>
class WgmmaKernel {
 public:
  using Params = WgmmaParams;
  static constexpr int kCluster = kBlocks;
  static constexpr int kTileM = 128, kTileK = 128;
  static constexpr int kMaxThreads = 3 * 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBytesA = kTileM * kTileK, kBytesB = kTileN * kTileK;
  static constexpr int kStages = 196608 / (kBytesA + kBytesB);
  static constexpr int kOutputBytes = TileOutputBytes(kTileN);
  // Stages first, in 1024-byte units; then two barriers per stage, and what the outputs need.
  static constexpr int64_t kShared = 1024 + kStages * (kBytesA + kBytesB + 16) + (kTurns ? 2 : 1) * kOutputBytes + 16;

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    WgmmaKernel kernel(p);
    kernel.Work();
#endif
  }

#ifdef JAXINT8_HOPPER

 private:
  static constexpr int kSums = kTileN / 2;        // of a thread: 64 x kTileN in 128 threads
  static constexpr int kGroups = kTurns ? 1 : 2;  // warpgroups that share a tile
  static constexpr int kHalves = kTurns ? 2 : 1;  // of its rows that one has
  using Output = TileOutput<kTileN, kGroups>;

  JAXINT8_DEVICE explicit WgmmaKernel(const Params& p)
      : p_(p),
        rank_(kBlocks > 1 ? ClusterRank() : 0),
        stages_((SharedAddress(SharedMemory()) + 1023) & ~1023u),
        full_(stages_ + kStages * (kBytesA + kBytesB)),
        empty_(full_ + 8 * kStages),
        order_(p.m, p.n, rank_),
        turns_(empty_ + 8 * kStages),
        outputs_(turns_ + 16 - SharedAddress(SharedMemory())) {}

  // Of a warpgroup, where they take turns.
  JAXINT8_DEVICE Output MakeOutput(int group) const {
    return Output(p_.epilogue, p_.m, p_.n, outputs_ + static_cast<uint32_t>(group * kOutputBytes));
  }

  JAXINT8_DEVICE void Work() {
    if (ThreadIndex() == 0) {
      FetchMap(&p_.lo.a);
      FetchMap(&p_.lo.b);
      for (int s = 0; s < kStages; ++s) {
        InitBarrier(full_ + 8 * s, 1);
        InitBarrier(empty_ + 8 * s, 4 * kGroups * kBlocks);  // one arrival of each warp of the cluster that reads it
      }
      for (int g = 0; g < kHalves; ++g) MakeOutput(g).InitBarriers();
      for (int g = 0; g < 2; ++g) InitBarrier(turns_ + 8 * g, 4);  // one arrival of each warp of the other warpgroup
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
    Output outputs[2] = {MakeOutput(0), MakeOutput(kTurns ? 1 : 0)};
    bool second = false;
    order_.ForEach([&](TilePlace place) {
      if (second) {
        outputs[1].Provide(place);
      } else {
        outputs[0].Provide(place);
      }
      second = kTurns && !second;
    });
  }

  JAXINT8_DEVICE void Consume() {
    // From another lane, so that the compiler sees that all lanes have the same.
    const int group = static_cast<int>(Shuffle(static_cast<uint32_t>(ThreadIndex() / 128), 0)) - 1;
    Ring ring;
    int32_t c[kHalves][kSums];
    Output output = MakeOutput(kTurns ? group : 0);
    bool others = kTurns && group > 0;
    uint32_t turn = group > 0 ? 0 : 1;  // the first one's first turn has come
    order_.ForEach([&](TilePlace place) {
      if (others) {
        others = false;
        return ring.Skip(high_ + low_);
      }
      others = kTurns;
      typename Output::Rows rows[kHalves];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) rows[h] = output.RowsOf({place.m + 64 * h, place.n});
      // No earlier, or a stage that is filled could not be told from one that was filled two rounds ago.
      if constexpr (kTurns) WaitBarrier(turns_ + 8 * group, turn);
      turn ^= 1;
      if (high_ > 0) {
        Accumulate(c, high_, 0, group, false, ring);
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) c[h][i] = Combine(0, c[h][i]);
        }
      }
      Accumulate(c, low_, high_ > 0, group, kTurns, ring);
      output.Finish(c, place, rows);
    });
  }

  // A place in the ring of stages.
  struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    JAXINT8_DEVICE void Skip(int steps) {
      const auto end = static_cast<unsigned>(stage + steps);
      stage = static_cast<int>(end % kStages);
      parity ^= end / kStages & 1;
    }
    JAXINT8_DEVICE void Next() {
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  };

  // c = (add ? c : 0) + the products of the next `steps` stages. One stage's products run while the next are issued.
  JAXINT8_DEVICE void Accumulate(int32_t (&c)[kHalves][kSums], int steps, uint32_t add, int group, bool ends,
                                 Ring& ring) const {
    const uint32_t rows = kTurns ? 0 : static_cast<uint32_t>(group) * 64 * kTileK;
    int last = 0;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) Pin(c[h]);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      WaitBarrier(full_ + 8 * ring.stage, ring.parity);
      const uint32_t at = stages_ + ring.stage * (kBytesA + kBytesB);
      const uint64_t a = TileDescriptor<128>(at + rows), b = TileDescriptor<128>(at + kBytesA);
      ProductFence();
#pragma unroll
      for (int j = 0; j < kTileK / 32; ++j) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          Product(c[h], a + 2 * j + h * (64 * kTileK / 16), b + 2 * j, add);  // 32 bytes further, in units of 16
        }
        add = 1;
      }
      ProductCommit();
      if (step > 0) {
        ProductWait<1>();
        Release(last);
      }
      last = ring.stage;
      ring.Next();
    }
    if (ends && ThreadIndex() % 32 == 0) Arrive(turns_ + 8 * (1 - group));
    ProductWait<0>();
#pragma unroll
    for (int h = 0; h < kHalves; ++h) Pin(c[h]);
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
  const uint32_t turns_, outputs_;  // two barriers; where bytes of outputs are
  bool fits_ = true;
  int high_ = 0, low_ = 0;
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_WGMMA_H_
