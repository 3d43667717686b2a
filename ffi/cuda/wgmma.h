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
  // Stages first, in 1024-byte units; then two barriers per stage.
  static constexpr int64_t kShared = 1024 + kStages * (kBytesA + kBytesB + 16);

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    WgmmaKernel kernel(p);
    kernel.Work();
#endif
  }

#ifdef JAXINT8_HOPPER

 private:
  static constexpr int kSums = kTileN / 2;  // of a thread: 64 x kTileN in 128 threads
  static constexpr int64_t kBand = 16 / kBlocks;

  JAXINT8_DEVICE explicit WgmmaKernel(const Params& p)
      : p_(p),
        rank_(kBlocks > 1 ? ClusterRank() : 0),
        stages_((SharedAddress(SharedMemory()) + 1023) & ~1023u),
        full_(stages_ + kStages * (kBytesA + kBytesB)),
        empty_(full_ + 8 * kStages) {}

  JAXINT8_DEVICE void Work() {
    if (ThreadIndex() == 0) {
      for (int s = 0; s < kStages; ++s) {
        InitBarrier(full_ + 8 * s, 1);
        InitBarrier(empty_ + 8 * s, 8 * kBlocks);  // one arrival of each multiplying warp of the cluster
      }
      FenceBarrierInit();
    }
    if constexpr (kBlocks > 1) {
      ClusterBarrier();
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
    } else {
      TakeRegisters<232>();
      Consume();
    }
    // No block may end while another can still write to its memory or arrive at its barriers.
    if constexpr (kBlocks > 1) ClusterBarrier();
  }

  // The tile of the output that is this block's in turn `at` of its cluster; bands of m share weights and activations.
  struct Place {
    int32_t m, n;
  };
  JAXINT8_DEVICE int64_t Turns() const { return tiles_m_ * tiles_n_; }
  JAXINT8_DEVICE Place Tile(int64_t at) const {
    const int64_t band = at / (kBand * tiles_n_);
    const int64_t height = tiles_m_ - band * kBand < kBand ? tiles_m_ - band * kBand : kBand;
    const int64_t in_band = at - band * kBand * tiles_n_;
    const int64_t m = (band * kBand + in_band % height) * kBlocks + rank_;
    return {static_cast<int32_t>(m * kTileM), static_cast<int32_t>(in_band / height * kTileN)};
  }

  JAXINT8_DEVICE void Produce() {
    FenceAccelerator();
    const OperandMaps* high = fits_ ? &p_.gathered : &p_.all;
    int stage = 0;
    uint32_t parity = 1;  // the first round finds all stages empty
    for (int64_t at = BlockIndex() / kBlocks; at < Turns(); at += BlockCount() / kBlocks) {
      const Place place = Tile(at);
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
    }
  }

  JAXINT8_DEVICE void Consume() {
    int stage = 0;
    uint32_t parity = 0;
    int32_t c[kSums];
    for (int64_t at = BlockIndex() / kBlocks; at < Turns(); at += BlockCount() / kBlocks) {
      if (high_ > 0) {
        Accumulate(c, high_, 0, stage, parity);
#pragma unroll
        for (int i = 0; i < kSums; ++i) c[i] = Combine(0, c[i]);
      }
      Accumulate(c, low_, high_ > 0, stage, parity);
      const Place place = Tile(at);
      switch (p_.epilogue.type) {
        case Type::kF32:
          Finish<Type::kF32>(c, place);
          break;
        case Type::kBF16:
          Finish<Type::kBF16>(c, place);
          break;
        case Type::kF16:
          Finish<Type::kF16>(c, place);
          break;
        case Type::kS32:
          Finish<Type::kS32>(c, place);
          break;
      }
    }
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

  // Sums to outputs, 32 columns of 16 rows per warp at a time.
  template <Type kType>
  JAXINT8_DEVICE void Finish(const int32_t (&c)[kSums], Place place) const {
    constexpr bool kWide = kType == Type::kF32 || kType == Type::kS32;
    Epilogue e = p_.epilogue;
    e.type = kType;
    const int thread = ThreadIndex() - 128, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int64_t row = place.m + thread / 32 * 16 + g;  // and row + 8
    const bool whole = p_.n % 8 == 0;
    float row_scale[2] = {0, 0};
    if constexpr (kType != Type::kS32) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (row + 8 * h < p_.m) row_scale[h] = Load(e.row_scale + row + 8 * h);
      }
    }
#pragma unroll
    for (int j = 0; j < kTileN / 32; ++j) {
      const int64_t first = place.n + 32 * j;
      if (first >= p_.n) break;
      uint32_t y[2][4][2];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int64_t n = first + 8 * q + 2 * t;
        float w_scale[2] = {0, 0}, bias[2] = {0, 0};
        if constexpr (kType != Type::kS32) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (n + h < p_.n) {
              w_scale[h] = Load(e.w_scale + n + h);
              if (e.bias) bias[h] = Load(e.bias + n + h);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[i / 2][q][i % 2] = Output(e, c[16 * j + 4 * q + i], row_scale[i / 2], w_scale[i % 2], bias[i % 2]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = row + 8 * half;
        if (!whole) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int64_t n = first + 8 * (i / 2) + 2 * t + i % 2;
            if (m < p_.m && n < p_.n) StoreOutput(e, m, n, y[half][i / 2][i % 2]);
          }
        } else if constexpr (kWide) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const int64_t n = first + 8 * q + 2 * t;
            if (m < p_.m && n < p_.n) StoreOutputs(e, m, n, y[half][q][0], y[half][q][1]);
          }
        } else {
          uint32_t words[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) words[q] = y[half][q][0] | y[half][q][1] << 16;
          Transpose(words, t);
          const int64_t n = first + 8 * t;
          if (m < p_.m && n < p_.n) {
            StoreWords(e, 2 * (m * p_.n + n), Word4{words[0], words[1], words[2], words[3]});
          }
        }
      }
    }
  }

  // Among the four lanes of a quad: afterwards words[i] is what lane i had in words[t].
  static JAXINT8_DEVICE void Transpose(uint32_t (&words)[4], int t) {
    const bool odd = t & 1, upper = t & 2;
    uint32_t a = ShuffleXor(odd ? words[0] : words[1], 1), b = ShuffleXor(odd ? words[2] : words[3], 1);
    words[0] = odd ? a : words[0];
    words[1] = odd ? words[1] : a;
    words[2] = odd ? b : words[2];
    words[3] = odd ? words[3] : b;
    a = ShuffleXor(upper ? words[0] : words[2], 2);
    b = ShuffleXor(upper ? words[1] : words[3], 2);
    words[0] = upper ? a : words[0];
    words[2] = upper ? words[2] : a;
    words[1] = upper ? b : words[1];
    words[3] = upper ? words[3] : b;
  }

  const Params& p_;
  const uint32_t rank_, stages_, full_, empty_;
  const int64_t tiles_m_ = (p_.m + kTileM * kBlocks - 1) / (kTileM * kBlocks), tiles_n_ = (p_.n + kTileN - 1) / kTileN;
  bool fits_ = true;
  int high_ = 0, low_ = 0;
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_WGMMA_H_
