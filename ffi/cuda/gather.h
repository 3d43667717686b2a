// Gathers the columns that hold outliers, of codes and of weights, for a product of their own.
#ifndef JAXINT8_FFI_CUDA_GATHER_H_
#define JAXINT8_FFI_CUDA_GATHER_H_

#include "device.h"
#include "hopper.h"
#include "int8.h"

namespace jaxint8::cuda {

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
  int64_t k;                 // bytes of a row
  bool aligned;              // b is a copy that the kernel before has made
  int share_a, share_b;      // rows of a block, and of a chunk (ChunkGatherKernel)
  int chunk_a, chunk_b;
};

struct ClearParams {
  Ptr<uint32_t> words;
  int64_t count;
};

// Sets words to zero. A kernel behind a memset cannot start early, but behind this one it can.
struct ClearKernel {
  using Params = ClearParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocks = 1;

  static JAXINT8_DEVICE void Run(const Params& p) {
    AllowNextKernel();
    WaitForPreviousKernel();
    for (int64_t i = ThreadIndex(); i < p.count; i += BlockThreads()) Store(p.words + i, 0u);
  }
};

JAXINT8_DEVICE uint32_t InclusiveScan(uint32_t v) {
  const int lane = ThreadIndex() % 32;
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t other = Shuffle(v, lane >= d ? lane - d : lane);
    v += lane >= d ? other : 0;
  }
  return v;
}

// With `columns` the places of the bits: out[r][j] = in[r][columns[j]] for two matrices, one warp per row. Writes the
// count alone if there are more than fit. Every block makes the list for itself: that is sooner done than another
// kernel launched.
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
};

// The columns with bits, in shared memory. Their order does not matter: of 128 columns, ascending, those of a place and
// 32, 64 and 96 places further stand together, so that the bytes that the lanes of a warp pick at once lie near each
// other and in different banks.
template <int kWarps>
class GatherList {
 public:
  static constexpr int64_t Bytes(int64_t capacity) { return 4 * (2 * kWarps + capacity); }

  explicit JAXINT8_DEVICE GatherList(Ptr<uint8_t> at) : at_(at) {}

  JAXINT8_DEVICE Ptr<int32_t> Columns() const { return Cast<int32_t>(at_ + 4 * 2 * kWarps); }
  static JAXINT8_DEVICE int PlaceOf(int i) { return (i & ~127) | (i & 31) << 2 | (i >> 5 & 3); }
  // Which of them, ascending, a lane has in byte e of the word of a group of 128.
  static JAXINT8_DEVICE int At(int group, int lane, int e) { return 128 * group + 32 * e + lane; }

  // Lists as many as fit, by all threads of a block of kWarps warps, half a word of bits each in a turn, and returns how
  // many there are. No loop is longer than the bits need: a warp takes some four cycles for an instruction.
  JAXINT8_DEVICE int Make(const GatherParams& p) const {
    static_assert(kWarps % 4 == 0);
    constexpr int kHalves = 32 * kWarps;
    const int warp = ThreadIndex() / 32;
    const int words = static_cast<int>(p.words), capacity = static_cast<int>(p.capacity);
    int count = 0, turn = 0;
#pragma unroll 1
    for (int first = 0; first < 2 * words; first += kHalves, turn ^= 1) {
      const int half = first + ThreadIndex();
      uint32_t bits = half < 2 * words ? Load(p.used + half / 2) >> half % 2 * 16 & 0xffff : 0;
      const auto own = static_cast<uint32_t>(PopulationCount(bits));
      const uint32_t scan = InclusiveScan(own);
      const Ptr<uint32_t> sums = Cast<uint32_t>(at_) + turn * kWarps;
      if (ThreadIndex() % 32 == 31) Store(sums + warp, scan);
      Barrier();
      uint32_t all = 0, before = 0;
#pragma unroll
      for (int i = 0; i < kWarps; i += 4) {
        const Word4 four = LoadAs<Word4>(sums + i);
        const uint32_t of[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          before += i + e < warp ? of[e] : 0;
          all += of[e];
        }
      }
      int at = count + static_cast<int>(before + scan - own);
#pragma unroll 1
      for (; bits != 0; bits &= bits - 1, ++at) {
        if (at < capacity) Store(Columns() + PlaceOf(at), 16 * half + LowestBit(bits));
      }
      count += static_cast<int>(all);
    }
    Barrier();  // the list is complete: in the executor it is anyway before any copy arrives
    return count;
  }

 private:
  const Ptr<uint8_t> at_;
};

// The same on Hopper where all multiprocessors together can hold the weights: chunks of rows are copied to shared
// memory as they lie, those of weights before the rows are quantised, and the bytes are picked there. With more weights
// it would take longer than the above.
struct ChunkGatherKernel {
  using Params = GatherParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kChunk = 32 * 1024, kChunks = 4;  // bytes, and how many at once
  using List = GatherList<kMaxThreads / 32>;
  static constexpr int kListAt = kChunk * kChunks + 8 * kChunks;
  static constexpr int64_t Shared(int64_t capacity) { return kListAt + List::Bytes(capacity); }
  static_assert(kListAt + List::Bytes(kGatherMost) <= 227 * 1024);
  static bool Takes(const GatherParams& p, int64_t multiprocessors) {
    return p.stride_a <= kChunk && (p.rows_b + multiprocessors - 1) / multiprocessors * p.stride_b <= kChunk * kChunks;
  }

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    ChunkGatherKernel kernel(p);
    kernel.Work();
#endif
  }

#ifdef JAXINT8_HOPPER

 private:
  // A block's share of one matrix: its rows from `row` on, so many to a chunk.
  struct Share {
    Ptr<const int8_t> in;
    Ptr<int8_t> out;
    int stride, row, rows, each;
    JAXINT8_DEVICE int Chunks() const { return (rows + each - 1) / each; }
    JAXINT8_DEVICE int RowsOf(int chunk) const { return rows - chunk * each < each ? rows - chunk * each : each; }
  };
  static JAXINT8_DEVICE Share ShareOf(Ptr<const int8_t> in, Ptr<int8_t> out, int64_t stride, int64_t rows, int share,
                                      int chunk) {
    const int row = share * static_cast<int>(BlockIndex()), left = static_cast<int>(rows) - row;
    return {in, out, static_cast<int>(stride), row, left < 0 ? 0 : left < share ? left : share, chunk};
  }

  // Field by field: a choice between the two would be one of their addresses.
  JAXINT8_DEVICE Share Of(bool in_b) const {
    return {in_b ? b_.in : a_.in,   in_b ? b_.out : a_.out,   in_b ? b_.stride : a_.stride,
            in_b ? b_.row : a_.row, in_b ? b_.rows : a_.rows, in_b ? b_.each : a_.each};
  }

  // What a warp picks of rows: 128 columns, four neighbours a lane, or several times as many; where there are more
  // warps than that they share the rows.
  class Picker {
   public:
    JAXINT8_DEVICE Picker(const List& list, int count, int capacity)
        : list_(list), count_(count), capacity_(capacity), groups_((count + kGroup - 1) / kGroup) {
      const int warp = ThreadIndex() / 32;
      if (groups_ > 0 && groups_ < kWarps) {
        parts_ = kWarps / groups_;
        part_ = warp / groups_;
      }
      group_ = warp - part_ * groups_;
      Take(group_);
    }

    // in: [rows] of so many bytes; out: [rows][capacity].
    JAXINT8_DEVICE void Pick(Ptr<const uint8_t> in, int stride, Ptr<int8_t> out, int rows) {
      if (part_ >= parts_) return;
#pragma unroll 1
      for (int group = group_; group < groups_; group += kWarps) {
        if (groups_ > kWarps) Take(group);
        const Ptr<int8_t> to = out + (group * kGroup + 4 * (ThreadIndex() % 32));
#pragma unroll 1
        for (int row = part_; row < rows; row += kRows * parts_) {
          uint32_t words[kRows];
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const int r = row + i * parts_ < rows ? row + i * parts_ : row;
            const Ptr<const uint8_t> from = in + r * stride;
            words[i] = PackBytes(Load(from + columns_[0]), Load(from + columns_[1]), Load(from + columns_[2]),
                                 Load(from + columns_[3])) &
                       keep_;
          }
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            if (row + i * parts_ < rows) StoreAs<uint32_t>(to + (row + i * parts_) * capacity_, words[i]);
          }
        }
      }
    }

   private:
    static constexpr int kRows = 4, kGroup = static_cast<int>(kGatherStep), kWarps = kMaxThreads / 32;

    JAXINT8_DEVICE void Take(int group) {
      const int lane = ThreadIndex() % 32;
      keep_ = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool valid = List::At(group, lane, e) < count_;
        columns_[e] = valid ? Load(list_.Columns() + (group * kGroup + 4 * lane + e)) : 0;
        keep_ |= valid ? 0xffu << 8 * e : 0;  // beyond the last column stand zeros
      }
    }

    const List& list_;
    const int count_, capacity_, groups_;
    int parts_ = 1, part_ = 0, group_;
    int columns_[4];
    uint32_t keep_;
  };

  JAXINT8_DEVICE explicit ChunkGatherKernel(const Params& p)
      : p_(p),
        chunks_(SharedAddress(SharedMemory())),
        b_(ShareOf(p.b, p.out_b, p.stride_b, p.rows_b, p.share_b, p.chunk_b)),
        a_(ShareOf(p.a, p.out_a, p.stride_a, p.rows_a, p.share_a, p.chunk_a)),
        all_(b_.Chunks() + a_.Chunks()) {}

  JAXINT8_DEVICE uint32_t Copied(int chunk) const {
    return chunks_ + static_cast<uint32_t>(kChunk * kChunks + 8 * (chunk % kChunks));
  }

  JAXINT8_DEVICE void Work() const {
    if (ThreadIndex() == 0) {
      for (int c = 0; c < kChunks; ++c) InitBarrier(Copied(c), 1);
      FenceBarrierInit();
    }
    Barrier();  // for memory checkers: the end of the list is one as well
    const int early = p_.aligned ? 0 : b_.Chunks() < kChunks ? b_.Chunks() : kChunks;
    const int first = all_ < kChunks ? all_ : kChunks;
    if (ThreadIndex() == 0) {
#pragma unroll 1
      for (int c = 0; c < early; ++c) CopyChunk(c);
    }
    WaitForPreviousKernel();
    AllowNextKernel();
    if (ThreadIndex() == 0) {
      FenceAccelerator();
#pragma unroll 1
      for (int c = early; c < first; ++c) CopyChunk(c);
    }
    const List list(SharedMemory() + kListAt);
    const int count = list.Make(p_);
    if (BlockIndex() == 0 && ThreadIndex() == 0) Store(p_.count, static_cast<uint32_t>(count));
    if (count > p_.capacity) {
      for (int c = 0; c < first; ++c) WaitBarrier(Copied(c), 0);
      return;
    }
    Picker picker(list, count, static_cast<int>(p_.capacity));
    PickAll(b_, 0, picker);
    PickAll(a_, b_.Chunks(), picker);
  }

  // The chunks of a matrix, from that number on.
  JAXINT8_DEVICE void PickAll(const Share& share, int c, Picker& picker) const {
#pragma unroll 1
    for (int row = 0; row < share.rows; row += share.each, ++c) {
      WaitBarrier(Copied(c), static_cast<uint32_t>(c / kChunks & 1));
      const int left = share.rows - row;
      picker.Pick(SharedMemory() + c % kChunks * kChunk, share.stride,
                  share.out + int64_t{share.row + row} * p_.capacity, left < share.each ? left : share.each);
      if (c + kChunks >= all_) continue;
      Barrier();
      if (ThreadIndex() == 0) CopyChunk(c + kChunks);
    }
  }

  JAXINT8_DEVICE void CopyChunk(int c) const {
    const bool in_b = c < b_.Chunks();
    const Share share = Of(in_b);
    const int chunk = in_b ? c : c - b_.Chunks();
    const auto bytes =
        static_cast<uint32_t>((share.RowsOf(chunk) - 1) * share.stride + (static_cast<int>(p_.k) + 15) / 16 * 16);
    ArriveExpecting(Copied(c), bytes);
    CopyBytes(chunks_ + static_cast<uint32_t>(c % kChunks * kChunk),
              share.in + int64_t{share.row + chunk * share.each} * share.stride, bytes, Copied(c));
  }

  const Params& p_;
  const uint32_t chunks_;
  const Share b_, a_;
  const int all_;
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_GATHER_H_
