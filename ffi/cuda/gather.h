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

  // Lists as many as fit, by all threads of a block of kWarps warps, half a word of bits each in a turn, and returns
  // how many there are. No loop is longer than the bits need: a warp takes some four cycles for an instruction.
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

// 128 of these columns, four a lane of a warp, and what stands there in rows.
template <typename List>
class PickedColumns {
 public:
  static constexpr int kGroup = static_cast<int>(kGatherStep);
  static constexpr int kRows = 4;  // at once

  JAXINT8_DEVICE void Take(const List& list, int group, int count) {
    const int lane = ThreadIndex() % 32;
    keep_ = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool valid = List::At(group, lane, e) < count;
      columns_[e] = valid ? Load(list.Columns() + (group * kGroup + 4 * lane + e)) : 0;
      keep_ |= valid ? 0xffu << 8 * e : 0;  // beyond the last column stand zeros
    }
  }

  // Of the rows from `row` on, each so many further, up to kRows: in has so many bytes a row, out too.
  template <typename Byte>
  JAXINT8_DEVICE void Pick(Ptr<const Byte> in, int stride, Ptr<int8_t> out, int out_stride, int row, int rows,
                           int step) const {
    uint32_t words[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = row + i * step < rows ? row + i * step : row;
      words[i] = Word(in + r * stride);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i * step < rows) StoreAs<uint32_t>(out + (row + i * step) * out_stride, words[i]);
    }
  }

 private:
  template <typename Byte>
  JAXINT8_DEVICE uint32_t Word(Ptr<const Byte> from) const {
    const auto byte = [&](int e) { return static_cast<uint32_t>(static_cast<uint8_t>(Load(from + columns_[e]))); };
    return PackBytes(byte(0), byte(1), byte(2), byte(3)) & keep_;
  }

  int columns_[4];
  uint32_t keep_;
};

// Picks the columns of two matrices. Writes the count alone if there are more than fit. Every block makes the list for
// itself: that is sooner done than another kernel launched. A warp takes some rows at once, of the first or of the
// second matrix.
struct GatherKernel {
  using Params = GatherParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocks = 4;
  using List = GatherList<kMaxThreads / 32>;
  using Columns = PickedColumns<List>;
  static constexpr int64_t Shared(int64_t capacity) { return List::Bytes(capacity); }
  static constexpr int64_t Blocks(int64_t rows_a, int64_t rows_b) {
    constexpr int64_t kRows = Columns::kRows, kWarps = kMaxThreads / 32;
    return ((rows_a + kRows - 1) / kRows + (rows_b + kRows - 1) / kRows + kWarps - 1) / kWarps;
  }

  static JAXINT8_DEVICE void Run(const Params& p) {
    WaitForPreviousKernel();
    AllowNextKernel();
    const List list(SharedMemory());
    const int count = list.Make(p);
    if (BlockIndex() == 0 && ThreadIndex() == 0) Store(p.count, static_cast<uint32_t>(count));
    if (count > p.capacity) return;
    const int64_t warps = BlockThreads() / 32, fours_a = (p.rows_a + Columns::kRows - 1) / Columns::kRows,
                  fours = fours_a + (p.rows_b + Columns::kRows - 1) / Columns::kRows;
#pragma unroll 1
    for (int64_t four = BlockIndex() * warps + ThreadIndex() / 32; four < fours; four += BlockCount() * warps) {
      if (four < fours_a) {
        PickRows(p.a, p.stride_a, p.out_a, p.rows_a, four, p, list, count);
      } else {
        PickRows(p.b, p.stride_b, p.out_b, p.rows_b, four - fours_a, p, list, count);
      }
    }
  }

 private:
  static JAXINT8_DEVICE void PickRows(Ptr<const int8_t> in, int64_t stride, Ptr<int8_t> out, int64_t rows, int64_t four,
                                      const Params& p, const List& list, int count) {
    const int64_t first = four * Columns::kRows, left = rows - first;
    in = in + first * stride;
    out = out + (first * p.capacity + 4 * (ThreadIndex() % 32));
#pragma unroll 1
    for (int group = 0; group * Columns::kGroup < count; ++group) {
      Columns columns;
      columns.Take(list, group, count);
      columns.Pick(in, static_cast<int>(stride), out + group * Columns::kGroup, static_cast<int>(p.capacity), 0,
                   left < Columns::kRows ? static_cast<int>(left) : Columns::kRows, 1);
    }
  }
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
  using Columns = PickedColumns<List>;
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

  // Which columns a warp picks, and of which rows: 128 columns, or several times as many; where there are more warps
  // than that they share the rows.
  class Picker {
   public:
    JAXINT8_DEVICE Picker(const List& list, int count, int capacity)
        : list_(list), count_(count), capacity_(capacity), groups_((count + Columns::kGroup - 1) / Columns::kGroup) {
      const int warp = ThreadIndex() / 32;
      if (groups_ > 0 && groups_ < kWarps) {
        parts_ = kWarps / groups_;
        part_ = warp / groups_;
      }
      group_ = warp - part_ * groups_;
      columns_.Take(list_, group_, count_);
    }

    // in: [rows] of so many bytes; out: [rows][capacity].
    JAXINT8_DEVICE void Pick(Ptr<const uint8_t> in, int stride, Ptr<int8_t> out, int rows) {
      if (part_ >= parts_) return;
#pragma unroll 1
      for (int group = group_; group < groups_; group += kWarps) {
        if (groups_ > kWarps) columns_.Take(list_, group, count_);
        const Ptr<int8_t> to = out + (group * Columns::kGroup + 4 * (ThreadIndex() % 32));
#pragma unroll 1
        for (int row = part_; row < rows; row += Columns::kRows * parts_) {
          columns_.Pick(in, stride, to, capacity_, row, rows, parts_);
        }
      }
    }

   private:
    static constexpr int kWarps = kMaxThreads / 32;

    const List& list_;
    const int count_, capacity_, groups_;
    int parts_ = 1, part_ = 0, group_;
    Columns columns_;
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
    const bool fits = count <= p_.capacity;  // else nothing is picked, but what has been asked for is waited for
    Picker picker(list, fits ? count : 0, static_cast<int>(p_.capacity));
    const int end = fits ? all_ : first;
    PickAll(b_, 0, end, picker);
    PickAll(a_, b_.Chunks(), end, picker);
  }

  // The chunks of a matrix, from that number on, up to another.
  JAXINT8_DEVICE void PickAll(const Share& share, int c, int end, Picker& picker) const {
#pragma unroll 1
    for (int row = 0; row < share.rows && c < end; row += share.each, ++c) {
      WaitBarrier(Copied(c), static_cast<uint32_t>(c / kChunks & 1));
      const int left = share.rows - row;
      picker.Pick(SharedMemory() + c % kChunks * kChunk, share.stride,
                  share.out + int64_t{share.row + row} * p_.capacity, left < share.each ? left : share.each);
      if (c + kChunks >= end) continue;
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
