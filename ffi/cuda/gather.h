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

// The columns with bits, in shared memory, listed by a block that is alone on its multiprocessor: every warp works at
// all of them, which is sooner done than what GatherKernel does, and would take more where blocks share the processor.
// Their order does not matter: of 128 columns, ascending, those of a place and 32, 64 and 96 places further stand
// together, so that the bytes that the lanes of a warp pick at once lie near each other and in different banks.
class GatherList {
 public:
  static constexpr int64_t Bytes(int64_t capacity) { return 4 * capacity; }

  explicit JAXINT8_DEVICE GatherList(Ptr<uint8_t> at) : at_(at) {}

  JAXINT8_DEVICE Ptr<int32_t> Columns() const { return Cast<int32_t>(at_); }
  static JAXINT8_DEVICE int PlaceOf(int i) { return (i & ~127) | (i & 31) << 2 | (i >> 5 & 3); }
  // Which of them, ascending, a lane has in byte e of the word of a group of 128.
  static JAXINT8_DEVICE int At(int group, int lane, int e) { return 128 * group + 32 * e + lane; }

  // Lists as many as fit, by all threads of a block of kWarps warps, and returns how many there are. Every warp counts
  // all bits, 4,096 at a time, four words a lane, and lists the columns of every so manyth word.
  template <int kWarps>
  JAXINT8_DEVICE int Make(const GatherParams& p) const {
    static_assert(kWarps % 4 == 0 && 32 % (kWarps / 4) == 0);
    const int lane = ThreadIndex() % 32, warp = ThreadIndex() / 32, own = warp % 4;
    const int words = static_cast<int>(p.words), capacity = static_cast<int>(p.capacity);
    int count = 0;
#pragma unroll 1
    for (int first = 0; first < words; first += 4 * 32) {
      const int at_word = first + 4 * lane;  // there are whole fours
      const Word4 four = at_word < words ? LoadAs<Word4>(p.used + at_word) : Word4{0, 0, 0, 0};
      const uint32_t bits[4] = {four.x, four.y, four.z, four.w};
      uint32_t mine = 0, before = 0, all = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e == own) {
          mine = bits[e];
          before = all;
        }
        all += static_cast<uint32_t>(PopulationCount(bits[e]));
      }
      const uint32_t scan = InclusiveScan(all);
      before += scan - all;
#pragma unroll 4
      for (int from = warp / 4; from < 32; from += kWarps / 4) {
        const uint32_t word = Shuffle(mine, from);
        const int at = count + static_cast<int>(Shuffle(before, from)) + PopulationCount(word & ((1u << lane) - 1));
        if ((word >> lane & 1) && at < capacity) Store(Columns() + PlaceOf(at), 32 * (first + 4 * from + own) + lane);
      }
      count += static_cast<int>(Shuffle(scan, 31));
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
  static constexpr int kListAt = kChunk * kChunks + 8 * kChunks;
  static constexpr int64_t Shared(int64_t capacity) { return kListAt + GatherList::Bytes(capacity); }
  static_assert(kListAt + GatherList::Bytes(kGatherMost) <= 227 * 1024);
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
    const GatherList list(SharedMemory() + kListAt);
    const int count = list.Make<kMaxThreads / 32>(p_);
    if (BlockIndex() == 0 && ThreadIndex() == 0) Store(p_.count, static_cast<uint32_t>(count));
    const bool fits = count <= p_.capacity;
#pragma unroll 1
    for (int c = 0; c < (fits ? all_ : first); ++c) {
      WaitBarrier(Copied(c), static_cast<uint32_t>(c / kChunks & 1));
      if (!fits) continue;
      const bool in_b = c < b_.Chunks();
      Pick(Of(in_b), in_b ? c : c - b_.Chunks(), c % kChunks * kChunk, list, count);
      Barrier();
      if (ThreadIndex() == 0 && c + kChunks < all_) CopyChunk(c + kChunks);
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

  // The columns of a chunk's rows. A warp has 128 of them, four neighbours a lane, of all rows, or shares these where
  // there are more warps.
  JAXINT8_DEVICE void Pick(const Share& share, int chunk, int at, const GatherList& list, int count) const {
    constexpr int kRows = 4, kGroup = static_cast<int>(kGatherStep), kWarps = kMaxThreads / 32;
    const int lane = ThreadIndex() % 32, warp = ThreadIndex() / 32, groups = (count + kGroup - 1) / kGroup;
    const int parts = groups > 0 && groups < kWarps ? kWarps / groups : 1, part = groups > 0 ? warp / groups : 0;
    const int rows = share.RowsOf(chunk), capacity = static_cast<int>(p_.capacity);
    if (parts > 1 && part >= parts) return;
#pragma unroll 1
    for (int group = parts > 1 ? warp - part * groups : warp; group < groups; group += kWarps) {
      const int j = group * kGroup + 4 * lane;
      int columns[4];
      uint32_t keep = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool valid = GatherList::At(group, lane, e) < count;
        columns[e] = valid ? Load(list.Columns() + j + e) : 0;
        keep |= valid ? 0xffu << 8 * e : 0;  // beyond the last column stand zeros
      }
      const Ptr<int8_t> out = share.out + (int64_t{share.row + chunk * share.each} * capacity + j);
#pragma unroll 1
      for (int row = parts > 1 ? part : 0; row < rows; row += kRows * parts) {
        uint32_t words[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int r = row + i * parts < rows ? row + i * parts : row;
          const Ptr<uint8_t> in = SharedMemory() + (at + r * share.stride);
          words[i] =
              PackBytes(Load(in + columns[0]), Load(in + columns[1]), Load(in + columns[2]), Load(in + columns[3])) &
              keep;
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (row + i * parts < rows) StoreAs<uint32_t>(out + (row + i * parts) * capacity, words[i]);
        }
      }
    }
  }

  const Params& p_;
  const uint32_t chunks_;
  const Share b_, a_;
  const int all_;
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_GATHER_H_
