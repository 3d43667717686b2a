// The product for one row on Hopper, or two without outliers: one launch for the layer, at the speed of memory.
//
// Every warp has rows of the weights of its own, which the copy engine brings to shared memory in pieces, several
// ahead: together nearly all of a multiprocessor's shared memory is on its way before the block quantises x, so that
// the weights arrive while it does; of two rows each is done by half of the block. No warp waits for another after
// that. What is asked for first comes first: x goes ahead of the weights, and is kept in shared memory as well.
//
// High parts are multiplied in full: reading the weights takes longer than both products.
#ifndef JAXINT8_FFI_CUDA_GEMV_H_
#define JAXINT8_FFI_CUDA_GEMV_H_

#include "epilogue.h"
#include "gate.h"
#include "hopper.h"
#include "quantize.h"
#include "rows.h"

namespace jaxint8::cuda {

struct GemvParams {
  QuantizeParams rows;  // x, what is done to it, and the rule
  Ptr<const int8_t> w;  // [n][k], k a multiple of 16
  int k;
  int piece, depth;    // bytes of a row of weights that are copied at once, and how many of these are on their way
  int64_t base, more;  // outputs of a warp, and how many warps have one more
  int64_t up;          // with gates: the row of weights from which on are those that these are for
  int64_t beside;      // see MakeGemvLayout
  Epilogue epilogue;
};

inline constexpr int kGemvWarps = 16;
inline constexpr int kGemvPiece = 4096;  // at most
inline constexpr int kGemvLeast = 2048;  // of longer rows: shorter pieces took 3 to 7 % more
inline constexpr int kGemvDepth = 8;     // at most

// Shared memory of a block: pieces of weights, barriers (the last of them that of x), scales of the rows, scratch of
// each, x, codes. Where the codes will be, there are first as many bytes `beside` the rows as the prologue needs.
struct GemvLayout {
  int64_t barriers, scales, scratch, x, lo, hi, bytes;
};
JAXINT8_HOST_DEVICE constexpr GemvLayout MakeGemvLayout(int rows, bool high, int64_t row_bytes, int64_t k, int piece,
                                                        int depth, int64_t beside) {
  GemvLayout s{};
  s.barriers = int64_t{kGemvWarps} * depth * piece;
  s.scales = s.barriers + (kGemvWarps * kGemvDepth + 1) * 8;
  s.scratch = (s.scales + 4 * rows + 127) / 128 * 128;
  s.x = s.scratch + rows * 4 * kScratchWords;
  s.lo = s.x + rows * row_bytes;
  s.hi = s.lo + rows * k;
  const int64_t codes = (high ? 2 : 1) * rows * k;
  s.bytes = s.lo + (beside > codes ? beside : codes);
  return s;
}

JAXINT8_HOST_DEVICE constexpr int64_t GemvBeside(Prologue prologue, int rows, int64_t row_bytes, int64_t k) {
  return prologue == Prologue::kRmsNorm ? 4 * k : prologue == Prologue::kSiluGate ? rows * row_bytes : 0;
}

// kGated: of two rows of weights, that of a gate and that of what it is for, comes one output.
template <Type kType, int kRule, int kRows, bool kGated>
class GemvKernel {
 public:
  using Params = GemvParams;
  static constexpr int kMaxThreads = 32 * kGemvWarps;
  static constexpr int kMinBlocks = 1;

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    GemvKernel kernel(p);
    kernel.Work();
#endif
  }

#ifdef JAXINT8_HOPPER

 private:
  static_assert(kRows == 1 || kRule == 0, "several rows with a rule are sooner quantised by blocks of their own");
  static constexpr bool kHigh = kRule != static_cast<int>(Rule::kNone);
  static constexpr int kBytes = RowReader<kType, true>::kBytes;
  static constexpr int kUnit = kGated ? 2 : 1;  // rows of weights for an output

  JAXINT8_DEVICE explicit GemvKernel(const Params& p)
      : p_(p),
        layout_(MakeGemvLayout(kRows, kHigh, int64_t{kBytes} * p.k, p.k, p.piece, p.depth, p.beside)),
        lane_(ThreadIndex() % 32),
        warp_(ThreadIndex() / 32),
        pieces_(SharedMemory() + warp_ * p.depth * p.piece),
        barriers_(SharedAddress(SharedMemory() + layout_.barriers)),
        full_(barriers_ + warp_ * kGemvDepth * 8) {
    // Warps of one number first, so that those with a row more are spread over the blocks.
    const int64_t turn = warp_ * BlockCount() + BlockIndex();
    rows_ = static_cast<int>(p.base + (turn < p.more ? 1 : 0)) * kUnit;
    first_ = p.base * turn + (turn < p.more ? turn : p.more);
    to_copy_ = int64_t{rows_} * p.k;
    from_ = p.w + first_ * p.k;
  }

  JAXINT8_DEVICE void Work() {
    if (lane_ == 0) {
#pragma unroll 1
      for (int slot = 0; slot < p_.depth; ++slot) InitBarrier(full_ + 8 * slot, 1);
      FenceBarrierInit();
    }
    WaitForPreviousKernel();
    AllowNextKernel();
    if (ThreadIndex() == 0) CopyX();
    Scales scales = LoadScales(0);
#pragma unroll 1
    for (int slot = 0; slot < p_.depth; ++slot) Copy(slot);
    Quantize();
    int slot = 0;
    uint32_t parity = 0;
    for (int row = 0; row < rows_; row += 32) {
      const int count = rows_ - row < 32 ? rows_ - row : 32;
      int32_t sums[kRows] = {};  // of the lane's own row of these
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        int32_t lo[kRows] = {}, hi[kRows] = {};
#pragma unroll 1
        for (int at = 0; at < p_.k; at += p_.piece) {
          WaitBarrier(full_ + 8 * slot, parity);
          Multiply(slot, at, lo, hi);
          WarpBarrier();  // before the piece is overwritten
          Copy(slot);
          if (++slot == p_.depth) {
            slot = 0;
            parity ^= 1;
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint32_t sum = WarpSum(static_cast<uint32_t>(Combine(lo[r], hi[r])));
          if (lane_ == i) sums[r] = static_cast<int32_t>(sum);
        }
      }
      if (row > 0) scales = LoadScales(row);
      const Epilogue e = MyEpilogue();
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        uint32_t y = Output(e, sums[r], row_scale_[r], scales.w_scale, scales.bias);
        if constexpr (kGated) y = Gated(e, y, Shuffle(y, lane_ | 1));
        if (lane_ < count && lane_ % kUnit == 0) {
          StoreOutput(e, r, first_ + (row + lane_) / kUnit, y, scales.residual[r]);
        }
      }
    }
  }

  // Starts the copy of x, by one thread.
  JAXINT8_DEVICE uint32_t XBarrier() const { return barriers_ + 8 * kGemvWarps * kGemvDepth; }
  JAXINT8_DEVICE void CopyX() const {
    const auto row_bytes = static_cast<uint32_t>(kBytes * p_.k), bytes = kRows * row_bytes;
    const auto beside = static_cast<uint32_t>(p_.beside);
    const uint32_t x = SharedAddress(SharedMemory() + layout_.x), others = SharedAddress(SharedMemory() + layout_.lo);
    const Ptr<const int8_t> from = Cast<const int8_t>(p_.rows.x);
    InitBarrier(XBarrier(), 1);
    FenceBarrierInit();
    ArriveExpecting(XBarrier(), bytes + beside);
    if (p_.rows.prologue.kind == Prologue::kSiluGate) {
#pragma unroll
      for (uint32_t r = 0; r < kRows; ++r) {
        CopyBytes(x + r * row_bytes, from + 2 * r * row_bytes, row_bytes, XBarrier());
        CopyBytes(others + r * row_bytes, from + (2 * r + 1) * row_bytes, row_bytes, XBarrier());
      }
      return;
    }
    CopyBytes(x, from, bytes, XBarrier());
    if (beside > 0) CopyBytes(others, Cast<const int8_t>(p_.rows.prologue.norm), beside, XBarrier());
  }

  // Starts the copy of the next piece of this warp's weights, if there is one.
  JAXINT8_DEVICE void Copy(int slot) {
    if (to_copy_ == 0) return;
    const int left = p_.k - copied_;
    const int bytes = left < p_.piece ? left : p_.piece;
    if (lane_ == 0) {
      ArriveExpecting(full_ + 8 * slot, static_cast<uint32_t>(bytes));
      CopyBytes(SharedAddress(pieces_) + slot * p_.piece, from_, static_cast<uint32_t>(bytes), full_ + 8 * slot);
    }
    from_ = from_ + bytes;
    to_copy_ -= bytes;
    copied_ = left > bytes ? copied_ + bytes : 0;
    if (kGated && copied_ == 0) {
      from_ = from_ + (is_up_ ? -p_.up : p_.up - 1) * p_.k;
      is_up_ = !is_up_;
    }
  }
  // The row of weights of one of this warp's: a gate comes before what it is for.
  JAXINT8_DEVICE int64_t RowOf(int row) const { return first_ + (kGated ? row / 2 + row % 2 * p_.up : row); }

  JAXINT8_DEVICE Epilogue MyEpilogue() const {
    Epilogue e = p_.epilogue;
    e.type = kType;
    return e;
  }

  // What the lane's output is made with, beside its sum.
  struct Scales {
    float w_scale = 0, bias = kNoBias;
    uint32_t residual[kRows] = {};
  };
  JAXINT8_DEVICE Scales LoadScales(int row) const {
    Scales s;
    if (row + lane_ >= rows_) return s;
    const Epilogue e = MyEpilogue();
    const int64_t n = RowOf(row + lane_);
#pragma unroll
    for (int r = 0; r < kRows; ++r) s.residual[r] = LoadResidual(e, r, n);
    s.w_scale = Load(p_.epilogue.w_scale + n);
    if (p_.epilogue.bias) s.bias = Load(p_.epilogue.bias + n);
    return s;
  }

  JAXINT8_DEVICE void Quantize() {
    const int mine = Team<kRows>::Number(), at = mine * kBytes * p_.k;
    const Ptr<uint8_t> shared = SharedMemory(), x = shared + (layout_.x + at);
    const Ptr<uint32_t> scratch = Cast<uint32_t>(shared + layout_.scratch) + mine * kScratchWords;
    Barrier();
    WaitBarrier(XBarrier(), 0);
    Team<kRows> team(scratch);
    if (p_.rows.prologue.kind != Prologue::kNone) {
      PrologueParams prologue = p_.rows.prologue;
      prologue.norm = Cast<const float>(shared + layout_.lo);
      MemoryGroups<kType, true, kRows> in_place(x, p_.k, x);
      ApplyPrologue(in_place, shared + (layout_.lo + at), prologue, team);
      if constexpr (kRows > 1) Barrier();  // one row's codes take the place of what the other is made with
    }
    const MemoryGroups<kType, true, kRows> groups(x, p_.k);
    Row<MemoryGroups<kType, true, kRows>, kRule, Team<kRows>> row(groups, p_.rows.options, scratch, team);
    RowOutput out{Cast<int8_t>(shared + layout_.lo) + mine * p_.k, {}, p_.k, {}, {}, {}};
    if constexpr (kHigh) out.hi = Cast<int8_t>(shared + layout_.hi) + mine * p_.k;
    row_scale_[0] = row.Quantize(out);
    const Ptr<float> scales = Cast<float>(shared + layout_.scales);
    if (kRows > 1 && team.Index() == 0) Store(scales + mine, row_scale_[0]);
    Barrier();
    if constexpr (kRows > 1) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) row_scale_[r] = Load(scales + r);
    }
  }

  // Adds the products of the piece in the slot, at `at` of its row.
  JAXINT8_DEVICE void Multiply(int slot, int at, int32_t (&lo)[kRows], int32_t (&hi)[kRows]) const {
    const int left = p_.k - at, bytes = left < p_.piece ? left : p_.piece;
    Ptr<const int8_t> w = Cast<const int8_t>(pieces_ + (slot * p_.piece + 16 * lane_));
    Ptr<const int8_t> x = Cast<const int8_t>(SharedMemory() + layout_.lo) + (at + 16 * lane_);
    const int whole = bytes / 512;
#pragma unroll 4
    for (int i = 0; i < whole; ++i) {
      MultiplyVector(w, x, lo, hi);
      w = w + 512;
      x = x + 512;
    }
    if (whole * 512 + 16 * lane_ < bytes) MultiplyVector(w, x, lo, hi);
  }

  JAXINT8_DEVICE void MultiplyVector(Ptr<const int8_t> w, Ptr<const int8_t> x, int32_t (&lo)[kRows],
                                     int32_t (&hi)[kRows]) const {
    const Word4 weights = LoadAs<Word4>(w);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      lo[r] = Dot(weights, LoadAs<Word4>(x + r * p_.k), lo[r]);
      if constexpr (kHigh) hi[r] = Dot(weights, LoadAs<Word4>(x + (kRows + r) * p_.k), hi[r]);
    }
  }

  static JAXINT8_DEVICE int32_t Dot(const Word4& a, const Word4& b, int32_t c) {
    return DotBytes(a.w, b.w, DotBytes(a.z, b.z, DotBytes(a.y, b.y, DotBytes(a.x, b.x, c))));
  }

  const Params& p_;
  const GemvLayout layout_;
  const int lane_, warp_;
  const Ptr<uint8_t> pieces_;
  const uint32_t barriers_, full_;
  int64_t first_;  // output
  int rows_;       // of weights
  int64_t to_copy_;
  int copied_ = 0;      // of the row that is being copied
  bool is_up_ = false;  // which belongs to a gate
  Ptr<const int8_t> from_;
  float row_scale_[kRows] = {};
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_GEMV_H_
