// The product for many rows with outliers on Hopper (sm_90a): as wgmma.h, with the high parts multiplied from the same
// tile of weights as 2:4-sparse operands (wgmma.mma_async.sp), at two thirds of the cost of the low parts.
//
// High parts are so few that hardly any four neighbours in a row hold more than two. Flags of the quantiser say where
// that is so: such a block of 64 rows and 128 columns is multiplied in full, in a step of its own at the end of a tile.
// They also say where 64 rows and 64 columns hold no high part at all: what does not is neither copied nor multiplied.
//
// Low and high parts have sums of their own, so tiles have 192 columns at most. Pairs of blocks that share weights were
// no faster than single ones here.
#ifndef JAXINT8_FFI_CUDA_SPARSE_H_
#define JAXINT8_FFI_CUDA_SPARSE_H_

#include "epilogue.h"
#include "hopper.h"
#include "sparse_codes.h"
#include "tile_output.h"

namespace jaxint8::cuda {

struct SparseParams {
  TileMap lo, hi, w;  // boxes: [128 rows][128] twice, [columns][128]
  SparseCodes<const uint8_t> sparse;
  int64_t m, n, k;
  Epilogue epilogue;
};

template <int kTileN>
class SparseKernel {
 public:
  using Params = SparseParams;
  static constexpr int kTileM = 128, kTileK = 128;
  static constexpr int kMaxThreads = 3 * 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBytesA = kTileM * kTileK, kBytesB = kTileN * kTileK;
  static constexpr int kStageBytes = kBytesA + kBytesB + 2 * static_cast<int>(kSparseBytes);
  static constexpr int kStages = 208 * 1024 / kStageBytes < 6 ? 208 * 1024 / kStageBytes : 6;
  static constexpr int kFlagBytes = static_cast<int>(kMaxK / kTileK / 16 + 1) * 16;  // of a tile: one for each step
  // Stages first, in 1024-byte units; then two barriers per stage, two barriers and bytes for the flags, and what the
  // outputs need.
  static constexpr int kFlagsAt = kStages * (kStageBytes + 16), kOutputAt = kFlagsAt + 16 + kFlagBytes;
  static constexpr int64_t kShared = 1024 + kOutputAt + TileOutputBytes(kTileN);
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
  // The flags of a step are those of the upper 64 rows, and of the lower ones so many bits further.
  static constexpr int kLower = 4;
  static constexpr uint32_t kAnyFull = kSparseFull | kSparseFull << kLower;

  JAXINT8_DEVICE explicit SparseKernel(const Params& p)
      : p_(p),
        steps_(static_cast<int>((p.k + kTileK - 1) / kTileK)),
        stages_((SharedAddress(SharedMemory()) + 1023) & ~1023u),
        full_(stages_ + kStages * kStageBytes),
        empty_(full_ + 8 * kStages),
        flags_ready_(stages_ + kFlagsAt),
        flags_read_(flags_ready_ + 8),
        shared_(SharedMemory() + (stages_ - SharedAddress(SharedMemory()))),
        flags_(shared_ + kFlagsAt + 16),
        order_(p.m, p.n, 0),
        output_(p.epilogue, p.m, p.n, stages_ + kOutputAt - SharedAddress(SharedMemory())) {}

  JAXINT8_DEVICE uint32_t Stage(int stage) const { return stages_ + static_cast<uint32_t>(stage) * kStageBytes; }

  JAXINT8_DEVICE void Work() const {
    if (ThreadIndex() == 0) {
      for (int s = 0; s < kStages; ++s) {
        InitBarrier(full_ + 8 * s, 1);
        InitBarrier(empty_ + 8 * s, 256);  // one arrival of each multiplying thread
      }
      InitBarrier(flags_ready_, 32);  // one arrival of each lane that collects
      InitBarrier(flags_read_, 257);  // of each multiplying thread and the producer
      output_.InitBarriers();
      FenceBarrierInit();
    }
    Barrier();
    WaitForPreviousKernel();
    AllowNextKernel();
    if (ThreadIndex() < 128) {
      GiveRegisters<56>();
      if (ThreadIndex() == 0) Produce();
      if (ThreadIndex() / 32 == 1) Provide();
      if (ThreadIndex() / 32 == 2) CollectFlags();
    } else {
      TakeRegisters<224>();
      Consume();
    }
  }

  JAXINT8_DEVICE void Provide() const {
    TileOutput<kTileN> output = output_;
    order_.ForEach([&](TilePlace place) { output.Provide(place); });
  }

  // By one warp: a byte of flags for each step of each tile in turn.
  JAXINT8_DEVICE void CollectFlags() const {
    const int lane = ThreadIndex() % 32;
    uint32_t parity = 1;
    order_.ForEach([&](TilePlace place) {
      WaitBarrier(flags_read_, parity);
#pragma unroll 1
      for (int step = lane; step < steps_; step += 32) {
        const uint32_t upper = FlagsOf(place.m, step), lower = FlagsOf(place.m + 64, step);
        Store(flags_ + step, static_cast<uint8_t>(upper | lower << kLower));
      }
      Arrive(flags_ready_);
      parity ^= 1;
    });
  }

  // Of 64 rows.
  JAXINT8_DEVICE uint32_t FlagsOf(int64_t m, int step) const {
    if (m >= p_.m) return 0;
    const Ptr<const uint8_t> rows = p_.sparse.flags + (m / 64 * p_.sparse.blocks + step) * 64;
    uint32_t flags = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Word4 words = LoadAs<Word4>(rows + 16 * i);
      flags |= words.x | words.y | words.z | words.w;
    }
    flags |= flags >> 16;
    return (flags | flags >> 8) & 0xff;
  }

  // Which halves of a block of columns 64 rows have, of those to be multiplied as sparse ones.
  static JAXINT8_DEVICE uint32_t SparseHalves(uint32_t flags) {
    return flags & kSparseFull ? 0 : flags & kSparseHalves;
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

  // The first stages are filled before the flags are there, with all compressed high parts.
  JAXINT8_DEVICE void Produce() const {
    FenceAccelerator();
    Turn turn{0, 1};  // the first round finds all stages empty
    uint32_t parity = 0;
    bool first = true;
    order_.ForEach([&](TilePlace place) {
      int step = 0;
      const bool lower = place.m + 64 < p_.m;
      for (; first && step < steps_ && step < kStages; ++step) Fill(turn, place, step, true, lower);
      first = false;
      WaitBarrier(flags_ready_, parity);
#pragma unroll 1
      for (; step < steps_; ++step) {
        const uint32_t flags = Load(flags_ + step);
        Fill(turn, place, step, SparseHalves(flags) != 0, SparseHalves(flags >> kLower) != 0);
      }
#pragma unroll 1
      for (step = 0; step < steps_; ++step) {
        if (Load(flags_ + step) & kAnyFull) FillWith(&p_.hi, turn, place, step, 0);
      }
      Arrive(flags_read_);
      parity ^= 1;
    });
  }

  // Fills the next stage with a tile of weights and the low parts, and with the compressed high parts of the upper and
  // lower 64 rows.
  JAXINT8_DEVICE void Fill(Turn& turn, TilePlace place, int step, bool upper, bool lower) const {
    const uint32_t barrier = full_ + 8 * turn.stage, to = Stage(turn.stage) + kBytesA + kBytesB;
    const Ptr<const int8_t> from = Cast<const int8_t>(p_.sparse.codes) + p_.sparse.Block(place.m / 64, step);
    FillWith(&p_.lo, turn, place, step, (upper ? kSparseBytes : 0) + (lower ? kSparseBytes : 0));
    if (upper) CopyBytes(to, from, kSparseBytes, barrier);
    if (lower) CopyBytes(to + kSparseBytes, from + p_.sparse.Block(1, 0), kSparseBytes, barrier);
  }

  JAXINT8_DEVICE void FillWith(const TileMap* map, Turn& turn, TilePlace place, int step, int64_t more_bytes) const {
    const uint32_t barrier = full_ + 8 * turn.stage, a = Stage(turn.stage);
    WaitBarrier(empty_ + 8 * turn.stage, turn.parity);
    ArriveExpecting(barrier, kBytesA + kBytesB + static_cast<uint32_t>(more_bytes));
    CopyTile(map, a, barrier, step * kTileK, place.m);
    CopyTile(&p_.w, a + kBytesA, barrier, step * kTileK, place.n);
    turn.Next();
  }

  JAXINT8_DEVICE void Consume() const {
    Turn turn{0, 0};
    uint32_t parity = 0;
    int32_t sums[1][kSums], high[kSums];
    int32_t (&c)[kSums] = sums[0];
    TileOutput<kTileN> output = output_;
    order_.ForEach([&](TilePlace place) {
      const typename TileOutput<kTileN>::Rows rows[1] = {output.RowsOf(place)};
      WaitBarrier(flags_ready_, parity);
      Accumulate(c, high, turn);
      Arrive(flags_read_);
      parity ^= 1;
#pragma unroll
      for (int i = 0; i < kSums; ++i) c[i] = Combine(c[i], high[i]);
      output.Finish(sums, place, rows);
    });
  }

  // c, high = the sums of a tile. One stage's products run while the next are issued: those of low parts, which take
  // longest, stand last.
  JAXINT8_DEVICE void Accumulate(int32_t (&c)[kSums], int32_t (&high)[kSums], Turn& turn) const {
    const int thread = ThreadIndex(), lane = thread % 32;
    // From another lane, so that the compiler sees that all lanes have the same.
    const auto group = static_cast<uint32_t>(Shuffle(static_cast<uint32_t>(thread / 128), 0)) - 1;
    const uint32_t rows = group * 64 * kTileK, codes = kBytesA + kBytesB + group * kSparseBytes;
    // Of this thread's row and columns in a block of codes: see SparseProduct.
    const int places = static_cast<int>(codes) + static_cast<int>(kSparsePlaces) +
                       16 * (thread / 32 % 4 * 16 + lane / 4 + 8 * (lane % 2)) + 8 * (lane % 4 / 2);
    int last = -1;
    uint32_t add = 0, any = 0;
#pragma unroll
    for (int i = 0; i < kSums; ++i) high[i] = 0;
    Pin(c);
    Pin(high);
    // What products read from registers stays there until they have been waited for, a step later.
    uint32_t even[2] = {}, odd[2] = {};
    const auto multiply = [&](int step, uint32_t (&where)[2], const uint32_t (&before)[2]) {
      const uint32_t flags = Load(flags_ + step), halves = SparseHalves(flags >> kLower * group);
      any |= flags;
      WaitBarrier(full_ + 8 * turn.stage, turn.parity);
      const uint32_t at = Stage(turn.stage);
      const uint64_t a = TileDescriptor<128>(at + rows), b = TileDescriptor<128>(at + kBytesA);
      const uint64_t h = TileDescriptor<64>(at + codes);
      if (halves) {
        const Word2 words = LoadAs<Word2>(shared_ + (turn.stage * kStageBytes + places));
        where[0] = words.x ^ kSparseEmpty;
        where[1] = words.y ^ kSparseEmpty;
      }
      ProductFence();
      if (halves & 1) SparseProduct(high, h, b, where[0]);
      if (halves & 2) SparseProduct(high, h + 2, b + 4, where[1]);
#pragma unroll
      for (int j = 0; j < kTileK / 32; ++j) {
        Product(c, a + 2 * j, b + 2 * j, add);  // 32 bytes further, in units of 16
        add = 1;
      }
      Pass(turn, last);
      Hold(before);
    };
#pragma unroll 1
    for (int step = 0; step < steps_; step += 2) {
      multiply(step, even, odd);
      if (step + 1 < steps_) multiply(step + 1, odd, even);
    }
    if (any & kAnyFull) {
      ProductWait<0>();  // products with the same sums are in order only if they have the same shape
      AccumulateFull(high, rows, turn, last);
    }
    ProductWait<0>();
    Hold(even);
    Hold(odd);
    Pin(c);
    Pin(high);
    Release(last);
  }

  // The steps of blocks that are multiplied in full.
  JAXINT8_DEVICE void AccumulateFull(int32_t (&high)[kSums], uint32_t rows, Turn& turn, int& last) const {
#pragma unroll 1
    for (int step = 0; step < steps_; ++step) {
      const uint32_t flags = Load(flags_ + step);
      if (!(flags & kAnyFull)) continue;
      WaitBarrier(full_ + 8 * turn.stage, turn.parity);
      const uint32_t at = Stage(turn.stage);
      const uint64_t a = TileDescriptor<128>(at + rows), b = TileDescriptor<128>(at + kBytesA);
      ProductFence();
      if (flags & (rows == 0 ? kSparseFull : kSparseFull << kLower)) {
#pragma unroll
        for (int j = 0; j < kTileK / 32; ++j) Product(high, a + 2 * j, b + 2 * j, 1);
      }
      Pass(turn, last);
    }
  }

  // Ends the products of a stage and gives back the stage before.
  JAXINT8_DEVICE void Pass(Turn& turn, int& last) const {
    ProductCommit();
    if (last >= 0) {
      ProductWait<1>();
      Release(last);
    }
    last = turn.stage;
    turn.Next();
  }

  // Tells the producer that this thread and its warp have read the stage.
  JAXINT8_DEVICE void Release(int stage) const { Arrive(empty_ + 8 * stage); }

  const Params& p_;
  const int steps_;  // of kTileK columns
  const uint32_t stages_, full_, empty_, flags_ready_, flags_read_;
  const Ptr<uint8_t> shared_;  // the stages as a pointer
  const Ptr<uint8_t> flags_;   // of each step of a tile
  const TileOrder<kTileM, kTileN, 1> order_;
  const TileOutput<kTileN> output_;
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_SPARSE_H_
