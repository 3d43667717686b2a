// The product for many rows with outliers on Hopper (sm_90a): as wgmma.h, with the high parts multiplied from the same
// tile of weights as 2:4-sparse operands (wgmma.mma_async.sp), at half the cost of the low parts.
//
// High parts are so few that hardly any four neighbours in a row hold more than two. For those that do, the third and
// fourth stand in a second compressed matrix, which is multiplied in steps of its own. Flags of the quantiser say where
// either matrix holds anything at all, for 64 rows and 64 columns: what does not is neither copied nor multiplied.
//
// Low and high parts have sums of their own, so tiles have 192 columns at most.
#ifndef JAXINT8_FFI_CUDA_SPARSE_H_
#define JAXINT8_FFI_CUDA_SPARSE_H_

#include "epilogue.h"
#include "hopper.h"
#include "sparse_codes.h"
#include "tile_output.h"

namespace jaxint8::cuda {

struct SparseParams {
  TileMap lo, w;  // boxes: [128 rows][128], [columns / blocks of the cluster][128]
  SparseCodes<const uint8_t, const uint32_t> hi;
  int64_t m, n, k;
  Epilogue epilogue;
};

template <int kTileN, int kBlocks>
class SparseKernel {
 public:
  using Params = SparseParams;
  static constexpr int kTileM = 128, kTileK = 128;
  static constexpr int kMaxThreads = 3 * 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBytesA = kTileM * kTileK, kBytesB = kTileN * kTileK;
  static constexpr int kStageBytes = kBytesA + kBytesB + 2 * static_cast<int>(kSparseBytes);
  static constexpr int kStages = 208 * 1024 / kStageBytes < 6 ? 208 * 1024 / kStageBytes : 6;
  // Stages first, in 1024-byte units; then two barriers and a word per stage, and what the outputs need.
  static constexpr int64_t kShared = 1024 + kStages * (kStageBytes + 32) + TileOutputBytes(kTileN);
  static_assert(kStageBytes % 1024 == 0 && kShared <= 227 * 1024);

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    SparseKernel kernel(p);
    kernel.Work();
#endif
  }

#ifdef JAXINT8_HOPPER

 private:
  static constexpr int kSums = kTileN / 2;  // of a thread: 64 x kTileN in 128 threads
  // The word of a stage: as the flags of a block of codes, but one matrix at a time; and these.
  static constexpr uint32_t kNoLow = 1u << 8, kLast = 1u << 9;  // of the tile

  JAXINT8_DEVICE explicit SparseKernel(const Params& p)
      : p_(p),
        rank_(kBlocks > 1 ? ClusterRank() : 0),
        stages_((SharedAddress(SharedMemory()) + 1023) & ~1023u),
        full_(stages_ + kStages * kStageBytes),
        empty_(full_ + 8 * kStages),
        shared_(SharedMemory() + (stages_ - SharedAddress(SharedMemory()))),
        words_(Cast<uint32_t>(shared_ + kStages * (kStageBytes + 16))),
        order_(p.m, p.n, rank_),
        output_(p.epilogue, p.m, p.n, stages_ + kStages * (kStageBytes + 32) - SharedAddress(SharedMemory())) {}

  JAXINT8_DEVICE uint32_t Stage(int stage) const { return stages_ + static_cast<uint32_t>(stage) * kStageBytes; }

  JAXINT8_DEVICE void Work() {
    if (ThreadIndex() == 0) {
      for (int s = 0; s < kStages; ++s) {
        InitBarrier(full_ + 8 * s, 1);
        InitBarrier(empty_ + 8 * s, 8 * kBlocks);  // one arrival of each multiplying warp of the cluster
      }
      output_.InitBarriers();
      FenceBarrierInit();
    }
    if constexpr (kBlocks > 1) {
      ClusterBarrier();
    } else {
      Barrier();
    }
    WaitForPreviousKernel();
    AllowNextKernel();
    if (ThreadIndex() < 128) {
      GiveRegisters<56>();
      if (ThreadIndex() == 0) Produce();
      if (ThreadIndex() / 32 == 1) Provide();
    } else {
      TakeRegisters<224>();
      Consume();
    }
    // No block may end while another can still write to its memory or arrive at its barriers.
    if constexpr (kBlocks > 1) ClusterBarrier();
  }

  JAXINT8_DEVICE void Provide() const {
    TileOutput<kTileN> output = output_;
    order_.ForEach([&](TilePlace place) { output.Provide(place); });
  }

  // The flags of this block's rows and, beside them, those of all rows of the cluster.
  struct Flags {
    uint32_t own, all;
  };
  JAXINT8_DEVICE Flags FlagsOf(TilePlace place, int step) const {
    Flags flags{0, 0};
    const int64_t first = place.m / kTileM - rank_;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if ((first + block) * kTileM >= p_.m) continue;
      const uint32_t word = Load(p_.hi.flags + (first + block) * p_.hi.blocks + step);
      flags.all |= word;
      if (block == static_cast<int>(rank_)) flags.own = word;
    }
    return flags;
  }

  // Where the producer and the multiplying warps are in the ring of stages.
  struct Turn {
    int stage = 0;
    uint32_t parity;
    JAXINT8_DEVICE void Next() {
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  };

  JAXINT8_DEVICE void Produce() const {
    FenceAccelerator();
    Turn turn{0, 1};  // the first round finds all stages empty
    const int steps = static_cast<int>(p_.hi.blocks);
    order_.ForEach([&](TilePlace place) {
      Flags next = FlagsOf(place, 0);
      for (int step = 0; step < steps; ++step) {
        const Flags flags = next;
        if (step + 1 < steps) next = FlagsOf(place, step + 1);  // on their way meanwhile
        const bool second = flags.all & kSparseSecond;
        const uint32_t last = step + 1 < steps ? 0 : kLast;
        Fill(turn, place, step, p_.hi.first, (flags.own & kSparseFirst) | (second ? 0 : last));
        if (second) Fill(turn, place, step, p_.hi.second, (flags.own & kSparseSecond) >> 2 | kNoLow | last);
      }
    });
  }

  // Fills the next stage with a tile of weights and, of this block's rows, the low parts and what the word has of the
  // high parts.
  JAXINT8_DEVICE void Fill(Turn& turn, TilePlace place, int step, Ptr<const uint8_t> hi, uint32_t word) const {
    const uint32_t barrier = full_ + 8 * turn.stage, a = Stage(turn.stage), b = a + kBytesA, h = b + kBytesB;
    WaitBarrier(empty_ + 8 * turn.stage, turn.parity);
    Store(words_ + turn.stage, word);
    const bool upper = word & kSparseGroup, lower = word & kSparseGroup << 4;
    const auto count = static_cast<uint32_t>(upper) + static_cast<uint32_t>(lower);
    ArriveExpecting(barrier, kBytesB + (word & kNoLow ? 0 : kBytesA) + count * static_cast<uint32_t>(kSparseBytes));
    const int32_t k = step * kTileK;
    if (!(word & kNoLow)) CopyTile(&p_.lo, a, barrier, k, place.m);
    if constexpr (kBlocks > 1) {
      constexpr int kRows = kTileN / kBlocks;
      const int first = static_cast<int>(rank_) * kRows;
      CopyTileToAll(&p_.w, b + first * kTileK, barrier, k, place.n + first, (1 << kBlocks) - 1);
    } else {
      CopyTile(&p_.w, b, barrier, k, place.n);
    }
    const Ptr<const int8_t> from = Cast<const int8_t>(hi) + p_.hi.Block(place.m / 64, step);
    if (upper) CopyBytes(h, from, kSparseBytes, barrier);
    if (lower) CopyBytes(h + kSparseBytes, from + p_.hi.blocks * kSparseBytes, kSparseBytes, barrier);
    turn.Next();
  }

  JAXINT8_DEVICE void Consume() const {
    Turn turn{0, 0};
    int32_t c[kSums], high[kSums];
    TileOutput<kTileN> output = output_;
    order_.ForEach([&](TilePlace place) {
      const typename TileOutput<kTileN>::Rows rows = output.RowsOf(place);
      Accumulate(c, high, turn);
#pragma unroll
      for (int i = 0; i < kSums; ++i) c[i] = Combine(c[i], high[i]);
      output.Finish(c, place, rows);
    });
  }

  // c, high = the sums of a tile. One stage's products run while the next are issued: those of low parts, which take
  // longest, stand last.
  JAXINT8_DEVICE void Accumulate(int32_t (&c)[kSums], int32_t (&high)[kSums], Turn& turn) const {
    const int thread = ThreadIndex(), lane = thread % 32;
    // From another lane, so that the compiler sees that all lanes have the same.
    const int group = static_cast<int>(Shuffle(static_cast<uint32_t>(thread / 128), 0)) - 1;
    // Of this thread's row and columns in a block of codes: see SparseProduct.
    const int places =
        static_cast<int>(kSparsePlaces) + 16 * (thread / 32 % 4 * 16 + lane / 4 + 8 * (lane % 2)) + 8 * (lane % 4 / 2);
    int last = -1;
    uint32_t add = 0, word;
#pragma unroll
    for (int i = 0; i < kSums; ++i) high[i] = 0;
    Pin(c);
    Pin(high);
#pragma unroll 1
    do {
      WaitBarrier(full_ + 8 * turn.stage, turn.parity);
      word = Load(words_ + turn.stage);
      const uint32_t at = Stage(turn.stage);
      const uint32_t hi = kBytesA + kBytesB + static_cast<uint32_t>(group) * kSparseBytes;
      const uint64_t a = TileDescriptor<128>(at + static_cast<uint32_t>(group) * 64 * kTileK);
      const uint64_t b = TileDescriptor<128>(at + kBytesA), h = TileDescriptor<64>(at + hi);
      const uint32_t mine = word >> 4 * group & kSparseGroup;
      Word2 where{};
      if (mine) where = LoadAs<Word2>(shared_ + turn.stage * kStageBytes + static_cast<int>(hi) + places);
      ProductFence();
      if (mine & 1) SparseProduct(high, h, b, where.x ^ kSparseEmpty);
      if (mine & 2) SparseProduct(high, h + 2, b + 4, where.y ^ kSparseEmpty);
      if (!(word & kNoLow)) {
#pragma unroll
        for (int j = 0; j < kTileK / 32; ++j) {
          Product(c, a + 2 * j, b + 2 * j, add);  // 32 bytes further, in units of 16
          add = 1;
        }
      }
      ProductCommit();
      if (last >= 0) {
        ProductWait<1>();
        Release(last);
      }
      last = turn.stage;
      turn.Next();
    } while (!(word & kLast));
    ProductWait<0>();
    Pin(c);
    Pin(high);
    Release(last);
  }

  // Tells the producers of the cluster that this warp has read the stage.
  JAXINT8_DEVICE void Release(int stage) const {
    const int lane = ThreadIndex() % 32;
    if (lane < kBlocks) ArriveAt(empty_ + 8 * stage, static_cast<uint32_t>(lane));
  }

  const Params& p_;
  const uint32_t rank_, stages_, full_, empty_;
  const Ptr<uint8_t> shared_;  // the stages as a pointer
  const Ptr<uint32_t> words_;  // of each stage
  const TileOrder<kTileM, kTileN, kBlocks> order_;
  const TileOutput<kTileN> output_;
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_SPARSE_H_
