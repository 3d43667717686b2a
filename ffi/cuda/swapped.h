// The product for some tens of rows on Hopper (sm_90a): as in wgmma.h, but with the weights in the place of the rows,
// 128 of them to a block, and all activations in that of the columns, so that few rows cost few products.
//
// Two warpgroups multiply; one thread beside them keeps some stages of shared memory filled, beginning with some
// weights while the activations are still being quantised (see EarlySteps). The blocks of a cluster share the k of a
// tile, so that also a narrow layer keeps all multiprocessors reading, and send each other the sums of the rows that
// each is to add. Two blocks fit on a multiprocessor: a second tile is on its way while the first ends.
//
// High parts (kHigh) are multiplied in full, with sums of their own: reading the weights takes longer than both.
#ifndef JAXINT8_FFI_CUDA_SWAPPED_H_
#define JAXINT8_FFI_CUDA_SWAPPED_H_

#include "epilogue.h"
#include "gate.h"
#include "hopper.h"

namespace jaxint8::cuda {

struct SwappedParams {
  TileMap w, lo, hi;  // boxes of [128][128], or [64][128] with gates, and [kTileN][128]; hi only with high parts
  int64_t m, n, k;    // n: outputs
  int64_t up;         // with gates: the row of weights from which on are those that these are for
  int cluster;        // blocks that share the k of a tile: 1, 2, 4 or 8; there are as many steps at least
  int stages;         // in shared memory
  int early;  // of these, whose weights are asked for before the codes are there: the kernel before does not write them
  Epilogue epilogue;
};

// kGated: half of a tile's weights are those of gates, and the other half of what they are for.
template <int kTileN, bool kHigh, bool kGated>
class SwappedKernel {
 public:
  using Params = SwappedParams;
  static constexpr int kTileM = 128, kTileK = 128;
  static constexpr int kOutputs = kGated ? kTileM / 2 : kTileM;  // columns of a tile
  static constexpr int kMaxThreads = 2 * 128 + 32;
  static constexpr int kMinBlocks = 2;
  static constexpr int kBytesW = kTileM * kTileK, kBytesX = kTileN * kTileK;
  static constexpr int kStageBytes = kBytesW + kBytesX * (kHigh ? 2 : 1);
  // The sums of a tile, where the stages were: [kTileN][kSumStride], without bank conflicts.
  static constexpr int kSumStride = kTileM + 4;
  static_assert(kTileN * kSumStride * 4 <= 3 * kStageBytes);  // there are more
  // Stages first, in 1024-byte units; then two barriers per stage, and, from a multiple of 128 on, a barrier and the
  // sums of the other blocks.
  static constexpr int64_t Shared(int stages, int cluster) {
    const int64_t alone = 1024 + stages * (kStageBytes + 16);
    return cluster == 1 ? alone : alone + 2 * 128 + (cluster - 1) * SumBytes(cluster);
  }

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    SwappedKernel kernel(p);
    kernel.Work();
#endif
  }

  // Of the rows that one block of a cluster adds.
  static JAXINT8_HOST_DEVICE constexpr int64_t SumBytes(int cluster) {
    return int64_t{4} * kSumStride * kTileN / cluster;
  }

#ifdef JAXINT8_HOPPER

 private:
  static constexpr int kSums = kTileN / 2;  // of a thread: 64 x kTileN in 128 threads
  static constexpr int kMultiplyBarrier = 1;

  JAXINT8_DEVICE explicit SwappedKernel(const Params& p)
      : p_(p),
        rank_(ClusterRank()),
        stages_((SharedAddress(SharedMemory()) + 1023) & ~1023u),
        shared_(SharedMemory() + (stages_ - SharedAddress(SharedMemory()))),
        full_(stages_ + p.stages * kStageBytes),
        empty_(full_ + 8 * p.stages),
        arrived_((empty_ + 8 * p.stages + 127) & ~127u) {}

  JAXINT8_DEVICE uint32_t Stage(int stage) const { return stages_ + static_cast<uint32_t>(stage) * kStageBytes; }

  // The block's tile of the output, and its steps of kTileK columns of k.
  struct Tile {
    int32_t m, n;
    int first, steps;
  };
  JAXINT8_DEVICE Tile MyTile() const {
    const int64_t tile = BlockIndex() / p_.cluster, tiles_n = (p_.n + kOutputs - 1) / kOutputs;
    const int all = static_cast<int>((p_.k + kTileK - 1) / kTileK), rank = static_cast<int>(rank_);
    const int first = all * rank / p_.cluster;
    return {static_cast<int32_t>(tile / tiles_n * kTileN), static_cast<int32_t>(tile % tiles_n * kOutputs), first,
            all * (rank + 1) / p_.cluster - first};
  }

  JAXINT8_DEVICE void Work() {
    if (ThreadIndex() == 0) {
      for (int s = 0; s < p_.stages; ++s) {
        InitBarrier(full_ + 8 * s, 1);
        InitBarrier(empty_ + 8 * s, 8);  // one arrival of each multiplying warp
      }
      if (p_.cluster > 1) {
        InitBarrier(arrived_, 1);
        ArriveExpecting(arrived_, static_cast<uint32_t>((p_.cluster - 1) * SumBytes(p_.cluster)));
      }
      FenceBarrierInit();
    }
    Barrier();
    if (p_.cluster > 1) ClusterArrive();
    if (ThreadIndex() >= 2 * 128) {
      if (ThreadIndex() == 2 * 128) Produce();
      WarpBarrier();  // all lanes together again
      if (p_.cluster == 1) return;
      ClusterWait();
      ClusterArrive();
    } else {
      WaitForPreviousKernel();
      const Tile tile = MyTile();
      const Scales scales = LoadScales(tile);  // they arrive while the tile is multiplied
      int32_t c[kSums];
      Multiply(c, tile.steps);
      KeepSums(c);
      if (p_.cluster > 1) SendSums();
      AddBlocks(tile, scales);
      if (p_.cluster == 1) return;
    }
    ClusterWait();  // all sums have been received, so that none are still read here
  }

  JAXINT8_DEVICE void CopyWeights(const Tile& tile, int step, int stage) const {
    ArriveExpecting(full_ + 8 * stage, kStageBytes);
    const int32_t k = (tile.first + step) * kTileK;
    CopyTile(&p_.w, Stage(stage), full_ + 8 * stage, k, tile.n);
    if constexpr (kGated) {
      CopyTile(&p_.w, Stage(stage) + kBytesW / 2, full_ + 8 * stage, k, static_cast<int32_t>(p_.up) + tile.n);
    }
  }

  JAXINT8_DEVICE void Produce() {
    const Tile tile = MyTile();
    int early = 0;  // steps whose weights are under way before the activations are there
    for (; early < p_.early && early < tile.steps; ++early) CopyWeights(tile, early, early);
    WaitForPreviousKernel();
    FenceAccelerator();
    uint32_t parity = 1;  // the first round finds all stages empty
    for (int step = 0, stage = 0; step < tile.steps; ++step) {
      WaitBarrier(empty_ + 8 * stage, parity);
      if (step >= early) CopyWeights(tile, step, stage);
      const int32_t k = (tile.first + step) * kTileK;
      CopyTile(&p_.lo, Stage(stage) + kBytesW, full_ + 8 * stage, k, tile.m);
      if constexpr (kHigh) CopyTile(&p_.hi, Stage(stage) + kBytesW + kBytesX, full_ + 8 * stage, k, tile.m);
      if (++stage == p_.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }

  // c = the sums of this block's steps. One stage's products run while the next are issued.
  JAXINT8_DEVICE void Multiply(int32_t (&c)[kSums], int steps) const {
    const uint32_t rows = static_cast<uint32_t>(ThreadIndex() / 128) * 64 * kTileK;
    int32_t high[kHigh ? kSums : 1];
    int stage = 0, last = 0;
    uint32_t parity = 0, add = 0;
    Pin(c);
    Pin(high);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      WaitBarrier(full_ + 8 * stage, parity);
      const uint64_t w = TileDescriptor<128>(Stage(stage) + rows);
      const uint64_t lo = TileDescriptor<128>(Stage(stage) + kBytesW);
      const uint64_t hi = TileDescriptor<128>(Stage(stage) + kBytesW + kBytesX);
      ProductFence();
#pragma unroll
      for (int j = 0; j < kTileK / 32; ++j) {
        Product(c, w + 2 * j, lo + 2 * j, add);  // 32 bytes further, in units of 16
        if constexpr (kHigh) Product(high, w + 2 * j, hi + 2 * j, add);
        add = 1;
      }
      ProductCommit();
      if (step > 0) {
        ProductWait<1>();
        Release(last);
      }
      last = stage;
      if (++stage == p_.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    ProductWait<0>();
    Pin(c);
    Pin(high);
    Release(last);
    if constexpr (kHigh) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) c[i] = Combine(c[i], high[i]);
    }
  }

  // Tells the producer that this warp has read the stage.
  JAXINT8_DEVICE void Release(int stage) const {
    if (ThreadIndex() % 32 == 0) Arrive(empty_ + 8 * stage);
  }

  // Four neighbouring columns of the output and what they are scaled by; of the rows of this warp the scale of one,
  // that of the lane's number.
  struct Scales {
    int first;  // within the tile
    int64_t n;
    float w_scale[4], bias[4], row_scale;
  };
  JAXINT8_DEVICE int Rows() const { return kTileN / p_.cluster; }  // of this block
  JAXINT8_DEVICE int RowOf(int turn) const { return ThreadIndex() / 32 + 8 * turn; }
  JAXINT8_DEVICE int FirstRow() const { return static_cast<int>(rank_) * Rows(); }
  JAXINT8_DEVICE Scales LoadScales(const Tile& tile) const {
    const int lane = ThreadIndex() % 32;
    const Epilogue& e = p_.epilogue;
    Scales s{};
    s.first = 4 * lane;
    s.n = tile.n + s.first % kOutputs;
    if (e.type == Type::kS32) return s;
    const int64_t weight = s.n + (s.first < kOutputs ? 0 : p_.up);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (s.n + j >= p_.n) continue;
      s.w_scale[j] = Load(e.w_scale + weight + j);
      if (e.bias) s.bias[j] = Load(e.bias + weight + j);
    }
    const int64_t row = tile.m + FirstRow() + RowOf(lane);
    if (RowOf(lane) < Rows() && row < p_.m) s.row_scale = Load(e.row_scale + row);
    return s;
  }

  // Puts the sums of this block where the stages were.
  JAXINT8_DEVICE void KeepSums(const int32_t (&c)[kSums]) const {
    const int thread = ThreadIndex(), lane = thread % 32, g = lane / 4, t = lane % 4;
    PartBarrier(kMultiplyBarrier, 2 * 128);  // nothing reads the stages any more
    const Ptr<int32_t> sums = Cast<int32_t>(shared_);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int row = 8 * (i / 4) + 2 * t + i % 2, column = thread / 32 * 16 + g + 8 * (i / 2 % 2);
      Store(sums + row * kSumStride + column, c[i]);
    }
    if (p_.cluster > 1) FenceShared();
    PartBarrier(kMultiplyBarrier, 2 * 128);
  }

  // Sends each other block of the cluster the sums of its rows, and waits for those of its own.
  JAXINT8_DEVICE void SendSums() const {
    ClusterWait();  // the barriers of all are there
    if (ThreadIndex() == 0) {
      const int rank = static_cast<int>(rank_);
      const auto bytes = static_cast<uint32_t>(SumBytes(p_.cluster));
#pragma unroll 1
      for (int block = 0; block < p_.cluster; ++block) {
        const uint32_t place = static_cast<uint32_t>(rank < block ? rank : rank - 1);
        if (block != rank) CopyToBlock(block, Received() + place * bytes, stages_ + block * bytes, bytes, arrived_);
      }
    }
    WaitBarrier(arrived_, 0);
    ClusterArrive();
  }
  JAXINT8_DEVICE uint32_t Received() const { return arrived_ + 128; }

  // Adds the sums of the blocks of the cluster, each block those of its share of the rows of x, and stores the outputs.
  JAXINT8_DEVICE void AddBlocks(const Tile& tile, const Scales& scales) const {
    switch (p_.cluster) {
      case 1:
        return AddRows<1>(tile, scales);
      case 2:
        return AddRows<2>(tile, scales);
      case 4:
        return AddRows<4>(tile, scales);
      default:
        return AddRows<8>(tile, scales);
    }
  }

  // One warp a row. What is added to the layer is asked for a row ahead.
  template <int kBlocks>
  JAXINT8_DEVICE void AddRows(const Tile& tile, const Scales& scales) const {
    const Epilogue& e = p_.epilogue;
    const int64_t first = tile.m + FirstRow(), left = p_.m - first;
    const int rows = left < Rows() ? static_cast<int>(left) : Rows();
    const bool words = !kGated && p_.n % 4 == 0 && scales.n < p_.n;
    const Ptr<int32_t> own = Cast<int32_t>(shared_) + (FirstRow() * kSumStride + scales.first);
    const Ptr<int32_t> others = Cast<int32_t>(shared_ + (Received() - stages_)) + scales.first;
    Word4 residual = words && RowOf(0) < rows ? LoadWords(first + RowOf(0), scales.n) : Word4{};
#pragma unroll 1
    for (int turn = 0; RowOf(turn) < rows; ++turn) {
      const int row = RowOf(turn), next = RowOf(turn + 1);
      const int64_t m = first + row, n = scales.n;
      Word4 parts[kBlocks];
      parts[0] = LoadAs<Word4>(own + row * kSumStride);
#pragma unroll
      for (int block = 1; block < kBlocks; ++block) {
        parts[block] = LoadAs<Word4>(others + ((block - 1) * kTileN / kBlocks + row) * kSumStride);
      }
      const Word4 added = residual;
      if (words && next < rows) residual = LoadWords(first + next, n);
      uint32_t sum[4] = {0, 0, 0, 0};
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        sum[0] += parts[block].x;
        sum[1] += parts[block].y;
        sum[2] += parts[block].z;
        sum[3] += parts[block].w;
      }
      const float row_scale = FloatFromBits(Shuffle(Bits(scales.row_scale), turn));
      uint32_t y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        y[j] = Output(e, static_cast<int32_t>(sum[j]), row_scale, scales.w_scale[j], scales.bias[j]);
      }
      if constexpr (kGated) {
        WriteGated(e, m, n, y);
      } else if (words) {
        StoreRow(m, n, y, added);
      } else if (p_.n % 4 != 0) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (n + j < p_.n) StoreOutput(e, m, n + j, y[j]);
        }
      }
    }
  }

  // Four neighbours, and what is added to them: of 16 bits in the first two words.
  JAXINT8_DEVICE Word4 LoadWords(int64_t m, int64_t n) const {
    const Epilogue& e = p_.epilogue;
    if (!e.residual) return {};
    if (IsWide(e)) return LoadAs<Word4>(e.residual + 4 * (m * p_.n + n));
    const Word2 two = LoadAs<Word2>(e.residual + 2 * (m * p_.n + n));
    return {two.x, two.y, 0, 0};
  }
  JAXINT8_DEVICE void StoreRow(int64_t m, int64_t n, const uint32_t (&y)[4], const Word4& added) const {
    const Epilogue& e = p_.epilogue;
    const auto add = [&](uint32_t word, uint32_t other) { return e.residual ? AddResiduals(e, word, other) : word; };
    if (IsWide(e)) {
      const Word4 sums{add(y[0], added.x), add(y[1], added.y), add(y[2], added.z), add(y[3], added.w)};
      StoreAs<Word4>(e.y + 4 * (m * p_.n + n), sums);
    } else {
      const Word2 sums{add(y[0] | y[1] << 16, added.x), add(y[2] | y[3] << 16, added.y)};
      StoreAs<Word2>(e.y + 2 * (m * p_.n + n), sums);
    }
  }

  // Half a warp has four gates a lane, the other half what these are for: each does two of them.
  JAXINT8_DEVICE void WriteGated(const Epilogue& e, int64_t m, int64_t n, const uint32_t (&y)[4]) const {
    const bool up = ThreadIndex() % 32 >= 16;
    const uint32_t other[2] = {ShuffleXor(up ? y[0] : y[2], 16), ShuffleXor(up ? y[1] : y[3], 16)};
    uint32_t gated[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) gated[j] = Gated(e, up ? other[j] : y[j], up ? y[2 + j] : other[j]);
    n += up ? 2 : 0;
    if (p_.n % 2 == 0) {
      if (n < p_.n) StoreOutputs(e, m, n, gated[0], gated[1]);
      return;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (n + j < p_.n) StoreOutput(e, m, n + j, gated[j]);
    }
  }

  const Params& p_;
  const uint32_t rank_, stages_;  // the address of the stages, a multiple of 1024
  const Ptr<uint8_t> shared_;     // the same as a pointer
  const uint32_t full_, empty_, arrived_;
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_SWAPPED_H_
