// The product for few rows (m <= 16) on Hopper, with mma.sync: at the speed of memory, whatever the number of outputs.
//
// A block takes consecutive groups of 16 outputs, as many as any other, some at a time. Its warps share k in boxes of
// 128 columns; each has a ring of shared memory of its own, into which the tensor memory accelerator copies boxes of
// weights, and the threads those of codes. It begins while the activations are still being quantised, with as many
// weights as will be there when the codes are. The weights take the place of A in the matrix instruction and the codes
// that of B.
//
// High parts are multiplied in full: reading the weights takes longer than both products.
#ifndef JAXINT8_FFI_CUDA_SKINNY_H_
#define JAXINT8_FFI_CUDA_SKINNY_H_

#include "epilogue.h"
#include "gate.h"
#include "hopper.h"
#include "stream.h"

namespace jaxint8::cuda {

inline constexpr int kSkinnyWarps = 8;
inline constexpr int kSkinnyGroups = 4;  // of 16 outputs, at once
inline constexpr int kSkinnyDepth = 8;
inline constexpr int kBoxK = 128;
inline constexpr int kGroupBytes = kStreamOutputs * kBoxK;

struct SkinnyParams {
  TileMap w;                 // boxes of [16][128]
  Ptr<const int8_t> lo, hi;  // [m][stride], to k; hi only with high parts
  int64_t m, n, k, stride;
  int64_t up;         // with gates: the row of weights from which on are those that these are for
  int groups, depth;  // groups at once, and steps of a warp on their way
  int early;          // of these, whose weights are asked for before the codes are there: the kernel before this one
                      // does not write them
  Epilogue epilogue;
};

// Shared memory, from a multiple of 1024 on: rings, sums, barriers.
struct SkinnyLayout {
  int64_t step, sums, barriers, bytes;
};
JAXINT8_HOST_DEVICE constexpr SkinnyLayout MakeSkinnyLayout(int tiles, bool high, int groups, int depth) {
  SkinnyLayout s{};
  s.step = groups * kGroupBytes + (high ? 2 : 1) * tiles * 8 * kBoxK;
  s.sums = s.step * depth * kSkinnyWarps;
  s.barriers = s.sums + int64_t{kSkinnyWarps} * groups * 8 * tiles * kSumStride * 4;
  s.bytes = 1024 + s.barriers + kSkinnyWarps * kSkinnyDepth * 8;
  return s;
}

// kTiles: of 8 rows of activations each. kGated: of two groups, of gates and of what they are for, come 16 outputs.
template <int kTiles, bool kHigh, bool kGated>
class SkinnyKernel {
 public:
  using Params = SkinnyParams;
  static constexpr int kMaxThreads = 32 * kSkinnyWarps;
  static constexpr int kMinBlocks = 1;

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    SkinnyKernel kernel(p);
    kernel.Work();
#endif
  }

#ifdef JAXINT8_HOPPER

 private:
  static constexpr int kParts = kTiles * (kHigh ? 2 : 1);  // of 8 rows of codes: low, then high
  static constexpr int kUnit = kGated ? 2 : 1;             // groups for 16 outputs
  // Of the outputs of a turn a thread stores one column, and every so many rows from one on.
  static constexpr int kColumns = kStreamOutputs * kSkinnyGroups / kUnit, kEvery = kMaxThreads / kColumns;
  static constexpr int kRows = 8 * kTiles / kEvery;

  // What a warp multiplies in one step: some groups by one box of k.
  struct Step {
    int group, box;
  };

  JAXINT8_DEVICE explicit SkinnyKernel(const Params& p)
      : p_(p),
        layout_(MakeSkinnyLayout(kTiles, kHigh, p.groups, p.depth)),
        lane_(ThreadIndex() % 32),
        warp_(ThreadIndex() / 32),
        boxes_(static_cast<int>((p.k + kBoxK - 1) / kBoxK)) {
    const uint32_t start = SharedAddress(SharedMemory()), aligned = (start + 1023) & ~1023u;
    shared_ = SharedMemory() + (aligned - start);
    ring_ = aligned + static_cast<uint32_t>(warp_ * p.depth * layout_.step);
    full_ = aligned + static_cast<uint32_t>(layout_.barriers) + static_cast<uint32_t>(warp_) * kSkinnyDepth * 8;
    const int all = static_cast<int>((p.n + kStreamOutputs - 1) / kStreamOutputs);
    const int blocks = static_cast<int>(BlockCount()), block = static_cast<int>(BlockIndex());
    const int each = all / blocks, more = all % blocks;
    first_ = kUnit * (each * block + (block < more ? block : more));
    last_ = first_ + kUnit * (each + (block < more ? 1 : 0));
  }

  JAXINT8_DEVICE void Work() {
    if (lane_ == 0) {
#pragma unroll 1
      for (int slot = 0; slot < p_.depth; ++slot) InitBarrier(full_ + 8 * slot, 1 + 32);
      FenceBarrierInit();
      Step step = First();
      for (int slot = 0; slot < p_.early && step.group < last_; ++slot, Advance(step)) CopyWeights(step, slot);
    }
    AllowNextKernel();  // once all blocks run
    WarpBarrier();      // the other lanes see the barriers
    WaitForPreviousKernel();
    const int row = ThreadIndex() / kColumns, column = ThreadIndex() % kColumns;
    const int mine = column / kStreamOutputs * kUnit;  // the group
    float row_scale[kRows] = {};
    if (p_.epilogue.type != Type::kS32) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (row + kEvery * i < p_.m) row_scale[i] = Load(p_.epilogue.row_scale + (row + kEvery * i));
      }
    }
    Step next = First();  // to be copied
    for (int slot = 0; slot < p_.depth; ++slot) {
      if (slot >= p_.early) CopyWeights(next, slot);
      CopyCodes(next, slot);
      Advance(next);
    }
    int slot = 0;
    uint32_t parity = 0;
    for (int group = first_; group < last_; group += p_.groups) {
      const int count = last_ - group < p_.groups ? last_ - group : p_.groups;
      const int64_t n = int64_t{group} / kUnit * kStreamOutputs + column;
      const bool stores = mine < count && n < p_.n;
      float w_scale = 0, bias = kNoBias, up_scale = 0, up_bias = kNoBias;
      uint32_t residual[kRows] = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (stores && row + kEvery * i < p_.m) residual[i] = LoadResidual(p_.epilogue, row + kEvery * i, n);
      }
      if (stores && p_.epilogue.type != Type::kS32) {
        w_scale = Load(p_.epilogue.w_scale + n);
        if (p_.epilogue.bias) bias = Load(p_.epilogue.bias + n);
        if constexpr (kGated) {
          up_scale = Load(p_.epilogue.w_scale + p_.up + n);
          if (p_.epilogue.bias) up_bias = Load(p_.epilogue.bias + p_.up + n);
        }
      }
      int32_t c[kSkinnyGroups][kParts][4] = {};
#pragma unroll 1
      for (int box = warp_; box < boxes_; box += kSkinnyWarps) {
        WaitBarrier(full_ + 8 * slot, parity);
        Multiply(Slot(slot), count, c);
        WarpBarrier();  // all lanes have read the step
        CopyWeights(next, slot);
        CopyCodes(next, slot);
        Advance(next);
        if (++slot == p_.depth) {
          slot = 0;
          parity ^= 1;
        }
      }
      Barrier();  // the sums before have been read
      WriteSums(count, c);
      Barrier();
      if (!stores) continue;
      const auto finish = [&](auto type) {
        Epilogue e = p_.epilogue;
        e.type = decltype(type)::kType;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (row + kEvery * i >= p_.m) break;
          const int at = (row + kEvery * i) * kSumStride + column % kStreamOutputs;
          uint32_t y = Output(e, SumOf(mine, at), row_scale[i], w_scale, bias);
          if constexpr (kGated) {
            y = Gated(e, y, Output(e, SumOf(mine + 1, at), row_scale[i], up_scale, up_bias));
          }
          StoreOutput(e, row + kEvery * i, n, y, residual[i]);
        }
      };
      WithTypeOf(p_.epilogue, finish);
    }
  }

  JAXINT8_DEVICE Step First() const { return {warp_ < boxes_ ? first_ : last_, warp_}; }
  JAXINT8_DEVICE void Advance(Step& step) const {
    step.box += kSkinnyWarps;
    if (step.box < boxes_) return;
    step.box = warp_;
    step.group += p_.groups;
  }

  // Start the copies of a step, if there is one. They arrive together.
  JAXINT8_DEVICE void CopyWeights(const Step& step, int slot) const {
    if (lane_ != 0 || step.group >= last_) return;
    const uint32_t to = ring_ + static_cast<uint32_t>(slot * layout_.step), full = full_ + 8 * slot;
    const int count = last_ - step.group < p_.groups ? last_ - step.group : p_.groups;
    ArriveExpecting(full, static_cast<uint32_t>(count * kGroupBytes));
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      CopyTile(&p_.w, to + i * kGroupBytes, full, step.box * kBoxK, RowOf(step.group + i));
    }
  }
  // The first row of weights of a group: one of gates comes before the one that they are for.
  JAXINT8_DEVICE int32_t RowOf(int group) const {
    return kGated ? group / 2 * kStreamOutputs + group % 2 * static_cast<int32_t>(p_.up) : group * kStreamOutputs;
  }
  // By the threads: the accelerator would bring them behind all the weights that it has been asked for.
  JAXINT8_DEVICE void CopyCodes(const Step& step, int slot) const {
    if (step.group >= last_) return;
    const Ptr<uint8_t> to = Slot(slot) + p_.groups * kGroupBytes;
    const int chunk = lane_ % 8, k = step.box * kBoxK + 16 * chunk;
#pragma unroll
    for (int i = 0; i < 2 * kParts; ++i) {
      const int row = 4 * (i % 2) + lane_ / 8, part = i / 2, m = 8 * (part % kTiles) + row;
      const bool valid = m < p_.m && k < p_.k;
      const Ptr<const int8_t> from = part < kTiles ? p_.lo : p_.hi;
      CopyAsync16(to + ((8 * part + row) * kBoxK + 16 * (chunk ^ row)), from + (valid ? m * p_.stride + k : 0), valid);
    }
    CopyAsyncArrive(full_ + 8 * slot);
  }
  JAXINT8_DEVICE Ptr<uint8_t> Slot(int slot) const {
    return shared_ + static_cast<int>((warp_ * p_.depth + slot) * layout_.step);
  }

  // Adds the products of a step's groups. Within a box chunk j of 16 bytes of row r lies at j ^ r % 8.
  JAXINT8_DEVICE void Multiply(Ptr<uint8_t> box, int count, int32_t (&c)[kSkinnyGroups][kParts][4]) const {
    const int eighth = lane_ % 8, matrix = lane_ / 8;
    const Ptr<uint8_t> codes = box + (p_.groups * kGroupBytes + eighth * kBoxK);
    uint32_t x[kParts][2][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        LoadMatrix4(codes + (part * 8 * kBoxK + 16 * ((4 * half + matrix) ^ eighth)), x[part][half]);
      }
    }
    const Ptr<uint8_t> weights = box + (eighth + matrix % 2 * 8) * kBoxK;
#pragma unroll
    for (int i = 0; i < kSkinnyGroups; ++i) {
      if (i >= count) break;
#pragma unroll
      for (int j = 0; j < kBoxK / 32; ++j) {
        uint32_t w[4];
        LoadMatrix4(weights + (i * kGroupBytes + 16 * ((2 * j + matrix / 2) ^ eighth)), w);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          Mma(c[i][part], w[0], w[1], w[2], w[3], x[part][j / 2][j % 2 * 2], x[part][j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // Of one warp and group: [8 * kTiles rows of x][kSumStride].
  JAXINT8_DEVICE Ptr<int32_t> Sums(int warp, int group) const {
    return Cast<int32_t>(shared_ + layout_.sums) + (warp * p_.groups + group) * (8 * kTiles * kSumStride);
  }

  // Of all warps, at one place.
  JAXINT8_DEVICE int32_t SumOf(int group, int at) const {
    uint32_t sum = 0;
#pragma unroll
    for (int warp = 0; warp < kSkinnyWarps; ++warp) sum += static_cast<uint32_t>(Load(Sums(warp, group) + at));
    return static_cast<int32_t>(sum);
  }

  JAXINT8_DEVICE void WriteSums(int count, const int32_t (&c)[kSkinnyGroups][kParts][4]) const {
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int i = 0; i < kSkinnyGroups; ++i) {
      if (i >= count) break;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int32_t sum = kHigh ? Combine(c[i][tile][e], c[i][kParts - kTiles + tile][e]) : c[i][tile][e];
          Store(Sums(warp_, i) + (8 * tile + 2 * t + e % 2) * kSumStride + g + 8 * (e / 2), sum);
        }
      }
    }
  }

  const Params& p_;
  const SkinnyLayout layout_;
  const int lane_, warp_, boxes_;
  Ptr<uint8_t> shared_;  // from a multiple of 1024 on
  uint32_t ring_, full_;
  int first_, last_;  // groups of this block
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_SKINNY_H_
