// The product for some tens of rows on Hopper (sm_90a): as in wgmma.h, but with the weights in the place of the rows,
// 128 of them to a block, or 64, and up to 128 activations in that of the columns, so that few rows cost few products.
//
// Two warpgroups multiply, or one; one thread beside them keeps some stages of shared memory filled, beginning with
// some weights while the activations are still being quantised (see EarlySteps). The blocks of a cluster share the k of
// a tile, so that also a narrow layer keeps all multiprocessors reading, and send each other the sums of the rows that
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
  TileMap w, lo,
      hi;           // boxes of [kTileM][128], half of these rows with gates, and [kTileN][128]; hi only with high parts
  int64_t m, n, k;  // n: outputs
  int64_t up;       // with gates: the row of weights from which on are those that these are for
  int cluster;      // blocks that share the k of a tile: 1, 2, 4 or 8; there are as many steps at least
  int stages;       // in shared memory
  int early;  // of these, whose weights are asked for before the codes are there: the kernel before does not write them
  Epilogue epilogue;
};

// kGated: half of a tile's weights are those of gates, and the other half of what they are for.
template <int kWeights, int kTileN, bool kHigh, bool kGated>
class SwappedKernel {
 public:
  using Params = SwappedParams;
  static constexpr int kTileM = kWeights, kTileK = 128;
  static constexpr int kRows = kTileN;                           // of activations
  static constexpr int kMultiply = 2 * kTileM;                   // threads that multiply: 128 for 64 rows of weights
  static constexpr int kOutputs = kGated ? kTileM / 2 : kTileM;  // columns of a tile
  static constexpr int kMaxThreads = kMultiply + 32;
  static constexpr int kMinBlocks = 2;
  static constexpr int kBytesW = kTileM * kTileK, kBytesX = kTileN * kTileK;
  static constexpr int kStageBytes = kBytesW + kBytesX * (kHigh ? 2 : 1);
  // The sums of a tile, where the stages were: [kTileN][kSumStride], without bank conflicts.
  static constexpr int kSumStride = kTileM + 4;
  static constexpr int kSumBytes = 4 * kSumStride * kTileN;  // of which each block of a cluster adds a share
  static_assert(kSumBytes <= 2 * kStageBytes);               // there are two at least
  // Stages first, in 1024-byte units; then two barriers per stage, and, from a multiple of 128 on, a barrier and the
  // sums of the other blocks.
  static constexpr int64_t Shared(int stages, int cluster) {
    const int64_t alone = 1024 + stages * (kStageBytes + 16);
    return cluster == 1 ? alone : alone + 2 * 128 + (cluster - 1) * (kSumBytes / cluster);
  }

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    SwappedKernel kernel(p);
    kernel.Work();
#endif
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
        arrived_((empty_ + 8 * p.stages + 127) & ~127u),
        shift_(LowestBit(static_cast<uint32_t>(p.cluster))) {}

  JAXINT8_DEVICE uint32_t Stage(int stage) const { return stages_ + static_cast<uint32_t>(stage) * kStageBytes; }

  // The block's tile of the output, and its steps of kTileK columns of k.
  struct Tile {
    int32_t m, n;
    int first, steps;
  };
  JAXINT8_DEVICE Tile MyTile() const {
    const auto tile = static_cast<uint32_t>(BlockIndex()) >> shift_;  // a division of 64 bits would take longer
    const auto tiles_n = static_cast<uint32_t>((p_.n + kOutputs - 1) / kOutputs);
    const int all = static_cast<int>((p_.k + kTileK - 1) / kTileK), rank = static_cast<int>(rank_);
    const int first = all * rank >> shift_;
    return {static_cast<int32_t>(tile / tiles_n * kTileN), static_cast<int32_t>(tile % tiles_n * kOutputs), first,
            (all * (rank + 1) >> shift_) - first};
  }

  JAXINT8_DEVICE void Work() {
    if (ThreadIndex() == kMultiply) {
      FetchMap(&p_.w);
      FetchMap(&p_.lo);
      if constexpr (kHigh) FetchMap(&p_.hi);
    }
    if (ThreadIndex() == 0) {
      for (int s = 0; s < p_.stages; ++s) {
        InitBarrier(full_ + 8 * s, 1);
        InitBarrier(empty_ + 8 * s, kMultiply / 32);  // one arrival of each multiplying warp
      }
      if (p_.cluster > 1) {
        InitBarrier(arrived_, 1);
        ArriveExpecting(arrived_, static_cast<uint32_t>(p_.cluster - 1) * Share());
      }
      FenceBarrierInit();
    }
    Barrier();
    AllowNextKernel();  // once all blocks run
    if (p_.cluster > 1) ClusterArrive();
    if (ThreadIndex() >= kMultiply) {
      if (ThreadIndex() == kMultiply) Produce();
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
      WithTypeOf(p_.epilogue, [&](auto type) { AddRows<decltype(type)::kType>(tile, scales); });
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

  // c = the sums of this block's steps. One stage's products run while the next are issued. High parts lie behind the
  // low ones and are multiplied with them, so that the weights are read once for both.
  JAXINT8_DEVICE void Multiply(int32_t (&c)[kSums], int steps) const {
    const uint32_t rows = static_cast<uint32_t>(ThreadIndex() / 128) * 64 * kTileK;
    int32_t all[kHigh ? 2 * kSums : kSums];
    int stage = 0, last = 0;
    uint32_t parity = 0, add = 0;
    Pin(all);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      WaitBarrier(full_ + 8 * stage, parity);
      const uint64_t w = TileDescriptor<128>(Stage(stage) + rows), x = TileDescriptor<128>(Stage(stage) + kBytesW);
      ProductFence();
#pragma unroll
      for (int j = 0; j < kTileK / 32; ++j) {
        Product(all, w + 2 * j, x + 2 * j, add);  // 32 bytes further, in units of 16
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
    Pin(all);
    Release(last);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if constexpr (kHigh) {
        c[i] = Combine(all[i], all[kSums + i]);
      } else {
        c[i] = all[i];
      }
    }
  }

  // Tells the producer that this warp has read the stage.
  JAXINT8_DEVICE void Release(int stage) const {
    if (ThreadIndex() % 32 == 0) Arrive(empty_ + 8 * stage);
  }

  // So many lanes have a row, four neighbouring columns each: what these are scaled by, and the scale of one of the
  // rows of these lanes, that of the lane's number.
  static constexpr int kLanes = kTileM / 4;
  struct Scales {
    int first;  // within the tile
    int64_t n;
    float w_scale[4], bias[4], row_scale;
  };
  JAXINT8_DEVICE int Rows() const { return kTileN >> shift_; }                                  // of this block
  JAXINT8_DEVICE uint32_t Share() const { return static_cast<uint32_t>(kSumBytes) >> shift_; }  // bytes of their sums
  static JAXINT8_DEVICE int RowOf(int turn) { return ThreadIndex() / kLanes + 8 * turn; }
  JAXINT8_DEVICE int FirstRow() const { return static_cast<int>(rank_) * Rows(); }
  JAXINT8_DEVICE Scales LoadScales(const Tile& tile) const {
    const int lane = ThreadIndex() % kLanes;
    const Epilogue& e = p_.epilogue;
    Scales s{};
#pragma unroll
    for (float& bias : s.bias) bias = kNoBias;
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
    PartBarrier(kMultiplyBarrier, kMultiply);  // nothing reads the stages any more
    const Ptr<int32_t> sums = Cast<int32_t>(shared_);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int row = 8 * (i / 4) + 2 * t + i % 2, column = thread / 32 * 16 + g + 8 * (i / 2 % 2);
      Store(sums + row * kSumStride + column, c[i]);
    }
    if (p_.cluster > 1) FenceShared();
    PartBarrier(kMultiplyBarrier, kMultiply);
  }

  // Sends each other block of the cluster the sums of its rows, and waits for those of its own.
  JAXINT8_DEVICE void SendSums() const {
    ClusterWait();  // the barriers of all are there
    if (ThreadIndex() == 0) {
      const int rank = static_cast<int>(rank_);
      const uint32_t bytes = Share();
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
  // What is added to the layer is asked for a row ahead.
  template <Type kType>
  JAXINT8_DEVICE void AddRows(const Tile& tile, const Scales& scales) const {
    Epilogue e = p_.epilogue;
    e.type = kType;
    const int64_t first = tile.m + FirstRow(), left = p_.m - first, n = scales.n;
    const int rows = left < Rows() ? static_cast<int>(left) : Rows();
    const bool words = !kGated && p_.n % 4 == 0 && n < p_.n;
    const Ptr<int32_t> own = Cast<int32_t>(shared_) + (FirstRow() * kSumStride + scales.first);
    const Ptr<int32_t> others = Cast<int32_t>(shared_ + (Received() - stages_)) + scales.first;
    Word4 residual = words && RowOf(0) < rows ? LoadWords(e, first + RowOf(0), n) : Word4{};
#pragma unroll 1
    for (int turn = 0; ThreadIndex() / 32 * (32 / kLanes) + 8 * turn < rows; ++turn) {  // the same for all lanes
      const float row_scale =
          FloatFromBits(Shuffle(Bits(scales.row_scale), ThreadIndex() % 32 / kLanes * kLanes + turn));
      const int row = RowOf(turn), next = RowOf(turn + 1);
      if (32 > kLanes && row >= rows) continue;
      const Word4 mine = LoadAs<Word4>(own + row * kSumStride);
      uint32_t sum[4] = {mine.x, mine.y, mine.z, mine.w};
#pragma unroll 1
      for (int block = 1; block < p_.cluster; ++block) {
        const Word4 other = LoadAs<Word4>(others + ((block - 1) * Rows() + row) * kSumStride);
        sum[0] += other.x;
        sum[1] += other.y;
        sum[2] += other.z;
        sum[3] += other.w;
      }
      const Word4 added = residual;
      if (words && next < rows) residual = LoadWords(e, first + next, n);
      uint32_t y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        y[j] = Output(e, static_cast<int32_t>(sum[j]), row_scale, scales.w_scale[j], scales.bias[j]);
      }
      if constexpr (kGated) {
        WriteGated(e, first + row, n, y);
      } else if (words) {
        StoreRow(e, first + row, n, y, added);
      } else if (p_.n % 4 != 0) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (n + j < p_.n) StoreOutput(e, first + row, n + j, y[j]);
        }
      }
    }
  }

  // Four neighbours, and what is added to them: of 16 bits in the first two words.
  JAXINT8_DEVICE Word4 LoadWords(const Epilogue& e, int64_t m, int64_t n) const {
    if (!e.residual) return {};
    if (IsWide(e)) return LoadAs<Word4>(e.residual + 4 * (m * p_.n + n));
    const Word2 two = LoadAs<Word2>(e.residual + 2 * (m * p_.n + n));
    return {two.x, two.y, 0, 0};
  }
  JAXINT8_DEVICE void StoreRow(const Epilogue& e, int64_t m, int64_t n, const uint32_t (&y)[4],
                               const Word4& added) const {
    Word4 sums{y[0], y[1], y[2], y[3]};
    if (!IsWide(e)) sums = {y[0] | y[1] << 16, y[2] | y[3] << 16, 0, 0};
    if (e.residual) {
      sums.x = AddResiduals(e, sums.x, added.x);
      sums.y = AddResiduals(e, sums.y, added.y);
      if (IsWide(e)) {
        sums.z = AddResiduals(e, sums.z, added.z);
        sums.w = AddResiduals(e, sums.w, added.w);
      }
    }
    if (IsWide(e)) {
      StoreAs<Word4>(e.y + 4 * (m * p_.n + n), sums);
    } else {
      StoreAs<Word2>(e.y + 2 * (m * p_.n + n), Word2{sums.x, sums.y});
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
  const int shift_;  // of p_.cluster, which is 1, 2, 4 or 8
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_SWAPPED_H_
