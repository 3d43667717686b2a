// The product for some tens of rows on Hopper (sm_90a): as in wgmma.h, but for tiles of 64 rows and few columns, so
// that also a narrow layer has one for each multiprocessor.
//
// One thread keeps some stages of shared memory filled, beginning with weights while the activations are still being
// quantised (see EarlySteps); two warpgroups multiply. With high parts (kHigh) one of them takes the low parts and the
// other the high ones: both are multiplied in full. Without, each takes every other step of k. Then they give each
// other half of their sums, and each finishes half of the rows.
#ifndef JAXINT8_FFI_CUDA_NARROW_H_
#define JAXINT8_FFI_CUDA_NARROW_H_

#include "epilogue.h"
#include "hopper.h"

namespace jaxint8::cuda {

struct NarrowParams {
  TileMap w, lo, hi;  // boxes of [kTileN][128] and [64][128]; hi only with high parts
  int64_t m, n, k;
  int stages;  // in shared memory
  int early;  // of these, whose weights are asked for before the codes are there: the kernel before does not write them
  Epilogue epilogue;
};

template <int kTileN, bool kHigh>
class NarrowKernel {
 public:
  using Params = NarrowParams;
  static constexpr int kTileM = 64, kTileK = 128;
  static constexpr int kMaxThreads = 2 * 128 + 32;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBytesX = kTileM * kTileK, kBytesW = kTileN * kTileK;
  static constexpr int kStageBytes = kBytesW + kBytesX * (kHigh ? 2 : 1);
  // Stages first, in 1024-byte units; then what the warpgroups give each other, scale and bias of each column, and two
  // barriers per stage.
  static constexpr int kGivenBytes = kTileM / 2 * kTileN * 4;
  static constexpr int64_t kFixedBytes = 1024 + 2 * kGivenBytes + 8 * kTileN;
  static constexpr int64_t Shared(int stages) { return kFixedBytes + stages * (kStageBytes + 16); }

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    NarrowKernel kernel(p);
    kernel.Work();
#endif
  }

#ifdef JAXINT8_HOPPER

 private:
  static constexpr int kSums = kTileN / 2;  // of a thread: 64 x kTileN in 128 threads
  static constexpr int kEights = kTileN / 8;
  static constexpr int kFours = kEights / 4;  // whole ones: 32 columns
  static constexpr int kMultiplyBarrier = 1;

  JAXINT8_DEVICE explicit NarrowKernel(const Params& p)
      : p_(p),
        stages_((SharedAddress(SharedMemory()) + 1023) & ~1023u),
        given_(SharedMemory() +
               (stages_ - SharedAddress(SharedMemory()) + static_cast<uint32_t>(p.stages) * kStageBytes)),
        full_(stages_ + static_cast<uint32_t>(p.stages * kStageBytes + 2 * kGivenBytes + 8 * kTileN)),
        empty_(full_ + 8 * p.stages),
        tiles_n_(static_cast<int>((p.n + kTileN - 1) / kTileN)),
        tiles_(tiles_n_ * static_cast<int>((p.m + kTileM - 1) / kTileM)),
        steps_(static_cast<int>((p.k + kTileK - 1) / kTileK)) {}

  JAXINT8_DEVICE uint32_t Stage(int stage) const { return stages_ + static_cast<uint32_t>(stage) * kStageBytes; }
  // A block takes every so manyth tile.
  JAXINT8_DEVICE int First() const { return static_cast<int>(BlockIndex()); }
  JAXINT8_DEVICE int32_t RowOf(int tile) const { return tile / tiles_n_ * kTileM; }
  JAXINT8_DEVICE int32_t ColumnOf(int tile) const { return tile % tiles_n_ * kTileN; }

  // A stage of the ring, and the parity of its turn.
  struct Place {
    int stage = 0;
    uint32_t parity = 0;
  };
  JAXINT8_DEVICE void Advance(Place& place) const {
    if (++place.stage < p_.stages) return;
    place.stage = 0;
    place.parity ^= 1;
  }

  JAXINT8_DEVICE void Work() {
    if (ThreadIndex() == 2 * 128) {
      FetchMap(&p_.w);
      FetchMap(&p_.lo);
      if constexpr (kHigh) FetchMap(&p_.hi);
    }
    if (ThreadIndex() == 0) {
      for (int s = 0; s < p_.stages; ++s) {
        InitBarrier(full_ + 8 * s, 1);
        InitBarrier(empty_ + 8 * s, kHigh ? 8 : 4);  // one arrival of each warp that multiplies the stage
      }
      FenceBarrierInit();
    }
    Barrier();
    if (ThreadIndex() < 2 * 128) {
      Consume();
    } else if (ThreadIndex() == 2 * 128) {
      Produce();
    }
  }

  JAXINT8_DEVICE void CopyWeights(int tile, int step, int stage) const {
    ArriveExpecting(full_ + 8 * stage, kStageBytes);
    CopyTile(&p_.w, Stage(stage), full_ + 8 * stage, step * kTileK, ColumnOf(tile));
  }

  JAXINT8_DEVICE void Produce() const {
    int early = 0;  // steps whose weights are under way before the activations are there
    for (; early < p_.early && early < steps_; ++early) CopyWeights(First(), early, early);
    WaitForPreviousKernel();
    FenceAccelerator();
    Place place{0, 1};  // the first round finds all stages empty
    for (int tile = First(); tile < tiles_; tile += static_cast<int>(BlockCount())) {
      for (int step = 0; step < steps_; ++step, --early) {
        const uint32_t full = full_ + 8 * place.stage, codes = Stage(place.stage) + kBytesW;
        WaitBarrier(empty_ + 8 * place.stage, place.parity);
        if (early <= 0) CopyWeights(tile, step, place.stage);
        CopyTile(&p_.lo, codes, full, step * kTileK, RowOf(tile));
        if constexpr (kHigh) CopyTile(&p_.hi, codes + kBytesX, full, step * kTileK, RowOf(tile));
        Advance(place);
      }
    }
  }

  JAXINT8_DEVICE void Consume() const {
    const int group = ThreadIndex() / 128;
    WaitForPreviousKernel();
    AllowNextKernel();
    Place place;
    for (int tile = First(); tile < tiles_; tile += static_cast<int>(BlockCount())) {
      const Output output(*this, tile);
      int32_t c[kSums];
      Multiply(c, group, place);
      output.Give(c);
      WithTypeOf(p_.epilogue, [&](auto type) { output.template Finish<decltype(type)::kType>(c); });
    }
  }

  // c = this warpgroup's sums of a tile. One stage's products run while the next are issued.
  JAXINT8_DEVICE void Multiply(int32_t (&c)[kSums], int group, Place& place) const {
    int last = -1;
#pragma unroll
    for (int i = 0; i < kSums; ++i) c[i] = 0;
    Pin(c);
#pragma unroll 1
    for (int step = 0; step < steps_; ++step, Advance(place)) {
      if (!kHigh && step % 2 != group) continue;
      WaitBarrier(full_ + 8 * place.stage, place.parity);
      const uint32_t codes = Stage(place.stage) + kBytesW + (kHigh ? group * kBytesX : 0);
      const uint64_t x = TileDescriptor<128>(codes), w = TileDescriptor<128>(Stage(place.stage));
      ProductFence();
#pragma unroll
      for (int j = 0; j < kTileK / 32; ++j) Product(c, x + 2 * j, w + 2 * j, 1);  // 32 bytes further, in units of 16
      ProductCommit();
      if (last >= 0) {
        ProductWait<1>();
        Release(last);
      }
      last = place.stage;
    }
    ProductWait<0>();
    Pin(c);
    if (last >= 0) Release(last);
  }

  // Tells the producer that this warp has read the stage.
  JAXINT8_DEVICE void Release(int stage) const {
    if (ThreadIndex() % 32 == 0) Arrive(empty_ + 8 * stage);
  }

  // The outputs of a tile that a thread finishes: with g = lane / 4 and t = lane % 4 it has sums of rows g and g + 8 of
  // its warp's 16, columns 2t and 2t + 1 of every eight. Those of row g are for the first warpgroup, the others for the
  // second. Whatever else they are made with is asked for before the products.
  class Output {
   public:
    JAXINT8_DEVICE Output(const NarrowKernel& kernel, int tile)
        : p_(kernel.p_),
          given_(kernel.given_),
          group_(ThreadIndex() / 128),
          thread_(ThreadIndex() % 128),
          m_(kernel.RowOf(tile) + thread_ / 32 * 16 + thread_ % 32 / 4 + 8 * group_),
          n_(kernel.ColumnOf(tile)) {
      const Epilogue& e = p_.epilogue;
      column_ = group_ == 0 ? 0 : kNoBias;
      if (e.type == Type::kS32) return;
      if (m_ < p_.m) row_scale_ = Load(e.row_scale + m_);
      if (thread_ < kTileN && n_ + thread_ < p_.n) {
        if (group_ == 0) column_ = Load(e.w_scale + (n_ + thread_));
        if (group_ == 1 && e.bias) column_ = Load(e.bias + (n_ + thread_));
      }
      if (!e.residual || !InFours(e.type)) return;
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        if (Has(i)) residual_[i] = LoadAs<Word4>(e.residual + ByteOf(i));
      }
    }

    // Gives the other warpgroup its half of the sums, and adds what that gives.
    JAXINT8_DEVICE void Give(int32_t (&c)[kSums]) const {
      PartBarrier(kMultiplyBarrier, 2 * 128);  // what belongs to the tile before has been read
      if (thread_ < kTileN) StoreAs<uint32_t>(Columns() + 8 * thread_ + 4 * group_, Bits(column_));
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
        const int32_t a = group_ == 0 ? c[4 * j + 2] : c[4 * j], b = group_ == 0 ? c[4 * j + 3] : c[4 * j + 1];
        StoreAs<Word2>(Given(group_, j), Word2{static_cast<uint32_t>(a), static_cast<uint32_t>(b)});
      }
      PartBarrier(kMultiplyBarrier, 2 * 128);
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
        const Word2 other = LoadAs<Word2>(Given(1 - group_, j));
        c[4 * j] = Sum(group_ == 0 ? c[4 * j] : c[4 * j + 2], static_cast<int32_t>(other.x));
        c[4 * j + 1] = Sum(group_ == 0 ? c[4 * j + 1] : c[4 * j + 3], static_cast<int32_t>(other.y));
      }
    }

    // Stores the outputs of sums c[4 * j] and c[4 * j + 1]. What form they have is asked once: of so few warps each
    // instruction takes four cycles or more.
    template <Type kType>
    JAXINT8_DEVICE void Finish(const int32_t (&c)[kSums]) const {
      Epilogue e = p_.epilogue;
      e.type = kType;
      if (!InFours(kType)) {
        FinishPairs<0>(e, c);
      } else if (e.residual) {
        FinishFours<true>(e, c);
      } else {
        FinishFours<false>(e, c);
      }
    }

   private:
    // Whether four eights of outputs are handed around a quad, so that each thread stores one.
    JAXINT8_DEVICE bool InFours(Type type) const {
      return (type == Type::kBF16 || type == Type::kF16) && p_.n % 8 == 0;
    }
    JAXINT8_DEVICE bool Has(int four) const { return m_ < p_.m && n_ + 32 * four + 8 * (thread_ % 4) < p_.n; }
    JAXINT8_DEVICE int64_t ByteOf(int four) const { return 2 * (m_ * p_.n + n_ + 32 * four + 8 * (thread_ % 4)); }
    JAXINT8_DEVICE Ptr<uint8_t> Columns() const { return given_ + 2 * kGivenBytes; }
    JAXINT8_DEVICE Ptr<uint8_t> Given(int group, int eight) const {
      return given_ + (group * kGivenBytes + 8 * (eight * 128 + thread_));
    }
    // Of a sum of this warpgroup and one of the other.
    JAXINT8_DEVICE int32_t Sum(int32_t own, int32_t other) const {
      if constexpr (kHigh) return group_ == 0 ? Combine(own, other) : Combine(other, own);
      return static_cast<int32_t>(static_cast<uint32_t>(own) + static_cast<uint32_t>(other));
    }

    // y[i]: of sum c[4 * j + i].
    JAXINT8_DEVICE void MakePair(const Epilogue& e, const int32_t (&c)[kSums], int j, uint32_t (&y)[2]) const {
      const Word4 of = LoadAs<Word4>(Columns() + 8 * (8 * j + 2 * (thread_ % 4)));
      y[0] = cuda::Output(e, c[4 * j], row_scale_, FloatFromBits(of.x), FloatFromBits(of.y));
      y[1] = cuda::Output(e, c[4 * j + 1], row_scale_, FloatFromBits(of.z), FloatFromBits(of.w));
    }

    // From eight kFrom on.
    template <int kFrom>
    JAXINT8_DEVICE void FinishPairs(const Epilogue& e, const int32_t (&c)[kSums]) const {
#pragma unroll
      for (int j = kFrom; j < kEights; ++j) {
        uint32_t y[2];
        MakePair(e, c, j, y);
        StorePair(e, n_ + 8 * j + 2 * (thread_ % 4), y);
      }
    }

    template <bool kAdds>
    JAXINT8_DEVICE void FinishFours(const Epilogue& e, const int32_t (&c)[kSums]) const {
      const Ptr<uint8_t> to = e.y + ByteOf(0);
#pragma unroll
      for (int four = 0; four < kFours; ++four) {
        uint32_t words[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          uint32_t y[2];
          MakePair(e, c, 4 * four + q, y);
          words[q] = y[0] | y[1] << 16;
        }
        TransposeQuad(words, thread_ % 4);
        if (!Has(four)) continue;
        if constexpr (kAdds) {
          const uint32_t added[4] = {residual_[four].x, residual_[four].y, residual_[four].z, residual_[four].w};
#pragma unroll
          for (int q = 0; q < 4; ++q) words[q] = AddResiduals(e, words[q], added[q]);
        }
        StoreAs<Word4>(to + 64 * four, Word4{words[0], words[1], words[2], words[3]});
      }
      FinishPairs<4 * kFours>(e, c);
    }

    JAXINT8_DEVICE void StorePair(const Epilogue& e, int64_t n, const uint32_t (&y)[2]) const {
      if (m_ >= p_.m || n >= p_.n) return;
      if (p_.n % 2 == 0) return StoreOutputs(e, m_, n, y[0], y[1]);
      StoreOutput(e, m_, n, y[0]);
      if (n + 1 < p_.n) StoreOutput(e, m_, n + 1, y[1]);
    }

    const Params& p_;
    const Ptr<uint8_t> given_;
    const int group_, thread_;
    const int64_t m_, n_;
    float row_scale_ = 0, column_;
    Word4 residual_[kFours > 0 ? kFours : 1] = {};
  };

  const Params& p_;
  const uint32_t stages_;     // the address of the stages, a multiple of 1024
  const Ptr<uint8_t> given_;  // behind them: [2 warpgroups][eights of columns][128 threads][2], then columns
  const uint32_t full_, empty_;
  const int tiles_n_, tiles_, steps_;
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_NARROW_H_
