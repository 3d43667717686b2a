// The kernels around a large product: quantise rows, find the columns that hold outliers, gather them, align weights.
#ifndef JAXINT8_FFI_CUDA_QUANTIZE_H_
#define JAXINT8_FFI_CUDA_QUANTIZE_H_

#include "device.h"
#include "hopper.h"
#include "int8.h"
#include "rows.h"

namespace jaxint8::cuda {

struct QuantizeParams {
  Ptr<const uint8_t> x;  // [m][k]
  int64_t m, k;
  Options options;
  bool marking;         // set bits of `marks` instead of writing codes
  Ptr<uint32_t> marks;  // column scope: bit per column
  Ptr<int8_t> lo, hi;   // [m][stride]; hi may be null if the rule selects nothing
  int64_t stride;
  Ptr<float> row_scale;  // [m]
  Ptr<uint32_t> used;    // bit per column with a high part in some row; or null
  Ptr<uint8_t> pieces;   // [m][piece_stride]: 1 where a piece of the row has high parts; or null
  int64_t piece_stride;
  SparseCodes<uint8_t> sparse;  // beside hi; or null
};

// Rows of 16-bit elements are held in registers if this many times eight per thread suffice; more would not fit beside
// the rest.
inline constexpr int kHeldGroups = 2;
// In the place of that number: Hopper's copy engine brings the row to shared memory, as much as needs no permission.
inline constexpr int kStaged = -1;
inline constexpr int64_t kStagedMost = 48 * 1024;

// One block per row.
template <Type kType, bool kVector, int kHeld, int kRule>
struct QuantizeKernel {
  using Params = QuantizeParams;
  static constexpr int kMaxThreads = kHeld > 0 ? 256 : 512;
  static constexpr int kMinBlocks = kHeld > 0 ? 3 : 2;
  static constexpr int kWords = kScratchWords + (kSparseWords + 31) / 32 * 32;
  // Without a staged row, which lies behind this.
  static constexpr int64_t kShared = 4 * kWords + (kHeld == kStaged ? 128 : 0);

  static JAXINT8_DEVICE void Run(const Params& p) {
    WaitForPreviousKernel();
    AllowNextKernel();
    const int64_t i = BlockIndex();
    const Ptr<uint32_t> scratch = Cast<uint32_t>(SharedMemory());
    int turn = 0;
    Ptr<const uint8_t> x = p.x + i * p.k * RowReader<kType, kVector>::kBytes;
    if constexpr (kHeld == kStaged) {
#ifdef JAXINT8_HOPPER
      const auto bytes = static_cast<uint32_t>(p.k) * RowReader<kType, kVector>::kBytes;
      const uint32_t barrier = SharedAddress(SharedMemory() + 4 * kWords);
      if (ThreadIndex() == 0) {
        InitBarrier(barrier, 1);
        FenceBarrierInit();
        ArriveExpecting(barrier, bytes);
        CopyBytes(SharedAddress(SharedMemory() + kShared), Cast<const int8_t>(x), bytes, barrier);
      }
      Barrier();
      WaitBarrier(barrier, 0);
      x = SharedMemory() + kShared;
#else
      return;
#endif
    }
    RowBlock<kType, kVector, (kHeld > 0 ? kHeld : 0), kRule> row(x, p.k, p.options, scratch, &turn);
    if (p.marking) {
      row.Mark(p.marks);
      return;
    }
    for (int j = ThreadIndex(); j < kPieceWords; j += BlockThreads()) Store(row.pieces() + j, 0u);
    for (int j = ThreadIndex(); p.sparse.codes && j < kSparseWords; j += BlockThreads()) {
      Store(row.sparse_bits() + j, 0u);
    }
    RowOutput out{p.lo + i * p.stride, p.hi, p.stride, p.marks, p.used, p.sparse, i};
    if (p.hi) out.hi = p.hi + i * p.stride;
    const float scale = row.Quantize(out);  // has a barrier between the zeros above and its first use of the pieces
    if (ThreadIndex() == 0) Store(p.row_scale + i, scale);
    if (p.sparse.codes) {
      Barrier();
      SparseRow(p.sparse, i).WriteFlags(row.sparse_bits());
      for (int64_t r = p.m + i; r < (p.m + 63) / 64 * 64; r += p.m) SparseRow(p.sparse, r).WriteZeros();
    }
    if (!p.pieces) return;
    Barrier();
    for (int64_t j = ThreadIndex(); j < p.piece_stride; j += BlockThreads()) {
      Store(p.pieces + i * p.piece_stride + j, static_cast<uint8_t>(Load(row.pieces() + j / 32) >> (j % 32) & 1));
    }
  }
};

// Gathered columns are read in steps of this many bytes: the list is padded with zeros to a multiple.
inline constexpr int64_t kGatherStep = 128;
// The list of columns is kept in shared memory.
inline constexpr int64_t kGatherMost = 8192;

struct GatherParams {
  Ptr<const int8_t> a, b;  // [rows_a][stride_a], [rows_b][stride_b]
  int64_t rows_a, rows_b, stride_a, stride_b;
  Ptr<const uint32_t> used;  // [words]: bit per column
  int64_t words;
  int64_t capacity;          // a multiple of kGatherStep, at most kGatherMost
  Ptr<int8_t> out_a, out_b;  // [rows][capacity]
  Ptr<uint32_t> count;       // of all columns, also those beyond the capacity
};

// With `columns` the places of the bits, ascending: out[r][j] = in[r][columns[j]] for two matrices, one warp per row.
// Writes the count alone if there are more than fit. Every block makes the list for itself: that is sooner done than
// another kernel launched.
struct GatherKernel {
  using Params = GatherParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int64_t Shared(int64_t capacity) { return 4 * (32 + capacity); }

  static JAXINT8_DEVICE void Run(const Params& p) {
    WaitForPreviousKernel();
    AllowNextKernel();
    const int64_t count = List(p);
    if (BlockIndex() == 0 && ThreadIndex() == 0) Store(p.count, static_cast<uint32_t>(count));
    if (count > p.capacity) return;
    const int64_t width = (count + kGatherStep - 1) / kGatherStep * kGatherStep;
    const int lane = ThreadIndex() % 32, warps = BlockThreads() / 32;
    const Ptr<const int32_t> columns = Columns();
    for (int64_t r = BlockIndex() * warps + ThreadIndex() / 32; r < p.rows_a + p.rows_b; r += BlockCount() * warps) {
      const bool first = r < p.rows_a;
      const int64_t row = first ? r : r - p.rows_a;
      const Ptr<const int8_t> in = first ? p.a + row * p.stride_a : p.b + row * p.stride_b;
      const Ptr<int8_t> out = (first ? p.out_a : p.out_b) + row * p.capacity;
      for (int64_t j = 4 * lane; j < width; j += 4 * 32) {
        uint32_t word = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (j + e < count) {
            word |= static_cast<uint32_t>(static_cast<uint8_t>(Load(in + Load(columns + j + e)))) << (8 * e);
          }
        }
        StoreAs<uint32_t>(out + j, word);
      }
    }
  }

 private:
  static JAXINT8_DEVICE Ptr<int32_t> Columns() { return Cast<int32_t>(SharedMemory() + 4 * 32); }

  // Lists the columns in shared memory, as many as fit, and returns how many there are.
  static JAXINT8_DEVICE int64_t List(const Params& p) {
    const int lane = ThreadIndex() % 32, warp = ThreadIndex() / 32, warps = BlockThreads() / 32;
    const Ptr<uint32_t> sums = Cast<uint32_t>(SharedMemory());
    const int64_t share = (p.words + BlockThreads() - 1) / BlockThreads();
    const int64_t begin = share * ThreadIndex();
    const int64_t end = begin + share < p.words ? begin + share : p.words;
    uint32_t own = 0;
    for (int64_t i = begin; i < end; ++i) own += static_cast<uint32_t>(PopulationCount(Load(p.used + i)));
    const uint32_t scan = InclusiveScan(own);
    if (lane == 31) Store(sums + warp, scan);
    Barrier();
    const uint32_t others = InclusiveScan(lane < warps ? Load(sums + lane) : 0);
    const uint32_t before = Shuffle(others, warp > 0 ? warp - 1 : 0), all = Shuffle(others, warps - 1);
    int64_t at = scan - own + (warp > 0 ? before : 0);
    for (int64_t i = begin; i < end; ++i) {
      for (uint32_t bits = Load(p.used + i); bits; bits &= bits - 1, ++at) {
        if (at < p.capacity) Store(Columns() + at, static_cast<int32_t>(32 * i + LowestBit(bits)));
      }
    }
    Barrier();
    return all;
  }

  static JAXINT8_DEVICE uint32_t InclusiveScan(uint32_t v) {
    const int lane = ThreadIndex() % 32;
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t other = Shuffle(v, lane >= d ? lane - d : lane);
      v += lane >= d ? other : 0;
    }
    return v;
  }
};

// 16 bytes of a row from a place of any alignment, 0 from `valid` bytes on. If k is a multiple of 4, so is the address.
JAXINT8_DEVICE Word4 LoadUnaligned(Ptr<const int8_t> p, int64_t valid, bool by_words) {
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (by_words) {
      if (4 * j < valid) words[j] = LoadAs<uint32_t>(p + 4 * j);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (4 * j + e < valid) words[j] |= static_cast<uint32_t>(static_cast<uint8_t>(Load(p + 4 * j + e))) << (8 * e);
      }
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

struct AlignParams {
  Ptr<const int8_t> in;  // [rows][k]
  int64_t rows, k, stride;
  Ptr<int8_t> out;  // [rows][stride], stride a multiple of 16; 0 from k on
};

// Copies rows to an aligned stride, for products whose k is not a multiple of 16.
struct AlignKernel {
  using Params = AlignParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int64_t kShared = 0;

  static JAXINT8_DEVICE void Run(const Params& p) {
    WaitForPreviousKernel();
    AllowNextKernel();
    const int64_t per_row = p.stride / 16;
    const int64_t all = p.rows * per_row;
    for (int64_t i = BlockIndex() * BlockThreads() + ThreadIndex(); i < all; i += BlockCount() * BlockThreads()) {
      const int64_t row = i / per_row, at = i % per_row * 16;
      StoreAs<Word4>(p.out + row * p.stride + at, LoadUnaligned(p.in + row * p.k + at, p.k - at, p.k % 4 == 0));
    }
  }
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_QUANTIZE_H_
