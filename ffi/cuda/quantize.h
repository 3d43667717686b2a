// The kernels around a large product: quantise rows, find the columns that hold outliers, align weights.
#ifndef JAXINT8_FFI_CUDA_QUANTIZE_H_
#define JAXINT8_FFI_CUDA_QUANTIZE_H_

#include <type_traits>

#include "cluster.h"
#include "device.h"
#include "hopper.h"
#include "int8.h"
#include "marks.h"
#include "prologue.h"
#include "rows.h"

namespace jaxint8::cuda {

struct QuantizeParams {
  Ptr<const uint8_t> x;  // [m][k], or [m][2 * k] with a gate
  int64_t m, k;
  PrologueParams prologue;  // only in kernels that stage the row or hold it
  Options options;
  bool marking;         // find the marks of rows (marks.h) instead of writing codes
  Ptr<uint32_t> marks;  // column scope: [parts][MarkWords(k)]
  int64_t parts;        // m, one a row; 1, which are zeros before they are marked; or 0 if blocks are to find them
  int mark_blocks;      // which do so together: 1 or kMarkBlocks, a cluster
  int marks_at;         // where in shared memory they are put together, MarkBytes(k)
  Ptr<int8_t> lo, hi;   // [code_rows][stride], zeros from m on; hi may be null if the rule selects nothing
  int64_t stride, code_rows;
  Ptr<float> row_scale;  // [m]
  Ptr<uint32_t> used;    // bit per column with a high part in some row; or null
  Ptr<uint8_t> pieces;   // [m][piece_stride]: 1 where a piece of the row has high parts; or null
  int64_t piece_stride;
  SparseCodes<uint8_t> sparse;  // beside hi; or null
  int sparse_at;                // where in shared memory the bits of its flags are, kSparseWords; or 0
  bool whole;                   // see RowOutput
  bool wide;                    // a cluster for each row
  int spread;                   // over so many multiprocessors, see SpreadBytes; or 0
};

// A row is copied to shared memory, which suits most: no more than this, and with what stands before the layer no more
// than every GPU has for a block.
inline constexpr int64_t kStagedMost = 64 * 1024, kStagedAllMost = 90 * 1024;
inline constexpr int kSpreadMost = 4;  // blocks to a multiprocessor
inline constexpr int kQuantizeThreads = 32 * kTeamMostWarps;

inline int64_t TypeBytes(Type type) { return type == Type::kF32 || type == Type::kS32 ? 4 : 2; }
// Bytes of a row and of what its prologue takes; 0 if it is not staged.
inline int64_t StagedBytes(Type type, int64_t k, int64_t stride, Prologue prologue) {
  const int64_t row = k * TypeBytes(type);
  const int64_t all = row * RowsOf(prologue) + (prologue == Prologue::kRmsNorm ? 4 * k : 0);
  return k % 8 == 0 && stride % 8 == 0 && row <= kStagedMost && all <= kStagedAllMost ? all : 0;
}
// Few rows are done soonest by many threads, many rows by few: what is done once for a row is done by each warp. With a
// multiprocessor of its own a row has as many as a block may have.
inline int RowThreads(int64_t rows, int64_t columns, bool alone = false) {
  const int64_t groups = (columns + 7) / 8, most = groups < 256 ? groups : 256;
  const int64_t few = groups / 4 < 128 ? groups / 4 : 128;
  const int64_t some = rows > 512 ? (groups / 8 > few ? groups / 8 : few) : groups / 4 > most ? groups / 4 : most;
  const int64_t wanted = alone ? groups : some;
  const int64_t threads = (wanted + 31) / 32 * 32;
  return threads < 32 ? 32 : threads < kQuantizeThreads ? static_cast<int>(threads) : kQuantizeThreads;
}

// Blocks that start while a product runs, as its multiprocessors come free, would all go to the first of these: three
// layers of eight rows took 70 us in the place of 62. With so much shared memory no more of them fit on a
// multiprocessor than it takes, or two where they do little; 0 where each has many anyway.
inline int64_t SpreadBytes(int64_t rows, bool rule, int64_t multiprocessors) {
#ifdef __CUDACC__
  int64_t each = (rows + multiprocessors - 1) / multiprocessors;
  if (!rule && rows > 32 && each < 2) each = 2;
  return each <= kSpreadMost ? (228 * 1024 / (each + 1) / 128 + 1) * 128 : 0;
#else
  return (void)rows, (void)rule, (void)multiprocessors, 0;  // the executor sees who goes beyond what he needs
#endif
}

// And where each block looks at all rows.
inline int MarkThreads(int64_t rows, int64_t columns) {
  const int64_t wanted = (columns / 2 + 31) / 32 * 32, least = RowThreads(rows, columns);
  return static_cast<int>(wanted < least ? least : wanted < kQuantizeThreads ? wanted : kQuantizeThreads);
}

// A longer row is sooner quantised by a cluster of blocks, in registers, while there are few rows: their blocks stand
// where those of the product would ask for weights, and without a rule they have little to do.
inline constexpr int kWideBlocks = 4;
inline constexpr int64_t kWideColumns = 8192, kWideMost = kWideBlocks * 8 * kQuantizeThreads;
inline int64_t WideRows(bool has_rule) { return has_rule ? 32 : 16; }
inline int WideThreads(int64_t columns) {
  return static_cast<int>((columns + 256 * kWideBlocks - 1) / (256 * kWideBlocks) * 32);
}
// Where these are spread: their multiprocessors come in groups, of which clusters leave some over.
inline int64_t WideSpread(int64_t multiprocessors) { return multiprocessors * 7 / 8; }

// Where a row lies while a kernel looks at it: where it is, in shared memory, or in registers, with one group of eight
// values a thread of a block (kRegisters) or of a cluster, or with kHeldGroups of them.
enum class RowPlace { kMemory, kShared, kRegisters, kManyRegisters, kCluster };
inline constexpr int kHeldGroups = 4;
inline constexpr int kHeldMostThreads = 256;
// The rules whose rows may be held so. Not the largest of float32, for which registers do not suffice, nor those above
// a threshold, which was not tried.
constexpr bool HoldsMany(Type type, Rule rule) {
  return rule == Rule::kNone || rule == Rule::kRelative || (rule == Rule::kTopK && type != Type::kF32);
}
// Threads that hold a row so.
inline int HoldingThreads(int64_t columns, RowPlace place) {
  const int64_t each = 256 * (place == RowPlace::kManyRegisters ? kHeldGroups : 1);
  return static_cast<int>((columns + each - 1) / each * 32);
}
// Of rows that suit shared memory, by measurement on an H200. A row is soonest done with a group a thread, while there
// are not so many values that what every thread does once takes longer (or for the largest values, where more threads
// wait). Beyond that it is in registers too, but by fewer threads: by the relative rule in two thirds of the time that
// shared memory takes. At 2^20 values that pays where a row would have all threads of a block. What stands before a
// layer, and lists of pieces, have their place in shared memory.
inline RowPlace PlaceOfRows(Type type, const QuantizeParams& q) {
  if (q.wide) return RowPlace::kCluster;
  if (q.options.column_scope && q.parts == 0) return RowPlace::kShared;  // more threads look for marks
  const Rule rule = q.options.rule;
  const int64_t values = q.m * q.k;
  constexpr int64_t kMany = 1 << 20;
  const bool holds = HoldsMany(type, rule) && !q.options.column_scope && q.prologue.kind == Prologue::kNone &&
                     !q.pieces && q.k <= 8 * kHeldGroups * kHeldMostThreads;
  if (holds && (values > kMany || (values == kMany && q.k >= 8 * kQuantizeThreads))) return RowPlace::kManyRegisters;
  const bool few = values <= (rule == Rule::kTopK ? kMany / 2 : kMany);
  return few && q.k <= 8 * kQuantizeThreads ? RowPlace::kRegisters : RowPlace::kShared;
}

// One block per row, or a cluster. Short rows have blocks of one warp. kSparse: with compressed high parts.
template <Type kType, bool kVector, RowPlace kPlace, int kRule, bool kSparse = false>
struct QuantizeKernel {
  using Params = QuantizeParams;
  static_assert(kPlace == RowPlace::kMemory || kVector);
  static constexpr bool kMany = kPlace == RowPlace::kManyRegisters;
  static constexpr int kMaxThreads = kMany ? kHeldMostThreads : kQuantizeThreads;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kMinBlocks = kRule == kMarked ? 1 : 2;  // or registers are spilled there
#else
  static constexpr int kMinBlocks = !kMany ? 2 : kType == Type::kF32 ? 3 : 4;
#endif
  static constexpr bool kWide = kPlace == RowPlace::kCluster;
  static_assert(!kWide || (kRule >= 0 && kRule != kMarked && !kSparse));
  using RowTeam = std::conditional_t<kWide, ClusterTeam<kWideBlocks>, Team<>>;
  // Without a staged row, which lies behind this: x, and the row beside it or the weights of a norm.
  static constexpr int64_t kShared = 4 * (kScratchWords + (kWide ? ClusterTeam<kWideBlocks>::kWords : 0));

  static JAXINT8_DEVICE void Run(const Params& p) {
    if constexpr (kWide) {
#ifdef JAXINT8_HOPPER
      RunWide(p);
#endif
    } else {
      RunAlone(p);
    }
  }

 private:
  static constexpr int kBytes = RowReader<kType, kVector>::kBytes;
  static constexpr bool kStaged = kPlace == RowPlace::kShared;

#ifdef JAXINT8_HOPPER
  static JAXINT8_DEVICE void RunWide(const Params& p) {
    AskForParameters(p);
    const Ptr<uint32_t> scratch = Cast<uint32_t>(SharedMemory());
    RowTeam team(scratch + kScratchWords);
    const int64_t i = BlockIndex() / kWideBlocks;
    const Ptr<const uint8_t> x = p.x + i * RowsOf(p.prologue.kind) * p.k * kBytes;
    const int k = static_cast<int>(p.k);
    WaitForPreviousKernel();
    AllowNextKernel();
    HeldGroups<kType, RowTeam> row(x, k);
    Before(p, i);
    team.Meet();
    Prepare(p, row, x + k * kBytes, team);
    Write(p, i, row, scratch, team);
  }
#endif

  static JAXINT8_DEVICE void RunAlone(const Params& p) {
    AskForParameters(p);
    WaitForPreviousKernel();
    AllowNextKernel();
    const int64_t i = BlockIndex();
    const Ptr<uint32_t> scratch = Cast<uint32_t>(SharedMemory());
    Team<> team(scratch);
    Ptr<const uint8_t> x = p.x + i * (kMany ? 1 : RowsOf(p.prologue.kind)) * p.k * kBytes;
    const bool has_row = kRule != kMarked || i < p.m;  // the last cluster may have blocks without
    const int k = static_cast<int>(p.k);
    if constexpr (kPlace == RowPlace::kRegisters || kMany) {
      HeldGroups<kType, Team<>, kMany ? kHeldGroups : 1> row(x, k);
      Before(p, i);
      Prepare(p, row, x + k * kBytes, team);
      Write(p, i, row, scratch, team);
    } else {
      const Ptr<uint8_t> staged = SharedMemory() + kShared;
      if (kStaged && has_row) StartCopies(p, x, staged);
      Before(p, i);
      if (!has_row) return;
      if constexpr (kStaged) {
        EndCopies(p, staged, team);
        x = staged;
      }
      Write(p, i, MemoryGroups<kType, kVector>(x, k), scratch, team);
    }
  }

  // Does what stands before the layer to a row in registers.
  template <typename Groups>
  static JAXINT8_DEVICE void Prepare(const Params& p, Groups& row, Ptr<const uint8_t> beside, RowTeam& team) {
    if (kMany || p.prologue.kind == Prologue::kNone) return row.FindLargest();
    ApplyPrologue(row, beside, p.prologue, team);
  }

  static JAXINT8_DEVICE bool OnlyMarks(const Params& p) { return kRule < 0 && (kStaged || p.marking); }
  static JAXINT8_DEVICE Ptr<uint32_t> Marks(const Params& p) { return Cast<uint32_t>(SharedMemory() + p.marks_at); }

  // What does not need the row.
  static JAXINT8_DEVICE void Before(const Params& p, int64_t i) {
    if (kRule >= 0 || !p.marking) WriteRowsBeyond(p, i);
    if (!OnlyMarks(p) && (kRule == kMarked || (kRule < 0 && p.options.column_scope))) FindMarks(p, Marks(p));
  }

  // Writes the codes of a row, or its marks.
  template <typename Groups>
  static JAXINT8_DEVICE void Write(const Params& p, int64_t i, const Groups& groups, Ptr<uint32_t> scratch,
                                   RowTeam& team) {
    Row<Groups, kRule, RowTeam> row(groups, p.options, scratch, team);
    const Ptr<uint32_t> marks = Marks(p);
    if constexpr (kRule < 0) {
      if (OnlyMarks(p)) return Mark(p, i, row, marks);
    }
    RowOutput out{Keep(p.lo + i * p.stride), p.hi, p.stride, p.parts == 1 ? p.marks : marks, p.used, {}, p.whole};
    if (kRule > 0 || p.hi) out.hi = Keep(p.hi + i * p.stride);  // a rule has high parts
    float scale;
    if constexpr (kWide) {
      scale = row.Quantize(out);
    } else if constexpr (kSparse) {
      scale = QuantizeSparse(p, i, row, out);
    } else {
      scale = Quantize(p, i, row, out, scratch + RowScratch::kPieces);
    }
    if (RowTeam::Index() == 0) Store(p.row_scale + i, scale);
  }

  // Leaves the marks of one row.
  template <typename AnyRow>
  static JAXINT8_DEVICE void Mark(const Params& p, int64_t i, AnyRow& row, Ptr<uint32_t> marks) {
    if (p.parts == 1) return row.Mark(p.marks);
    const int words = static_cast<int>(MarkWords(p.k));
    ClearMarks(marks, words);
    row.Mark(marks);
    Barrier();
    for (int j = ThreadIndex(); j < words; j += BlockThreads()) Store(p.marks + (i * words + j), Load(marks + j));
  }

  // Puts the marks of all rows into shared memory, unless they are together already.
  static JAXINT8_DEVICE void FindMarks(const Params& p, Ptr<uint32_t> marks) {
    const int words = static_cast<int>(MarkWords(p.k)), rows = static_cast<int>(p.m), k = static_cast<int>(p.k);
    if constexpr (kStaged) {
      if (p.parts == 0) return Marker<kType>(p.x, rows, k, ThresholdBits(p.options), marks).Mark(p.mark_blocks);
    }
    if (p.parts == 1) return;
    ClearMarks(marks, words);
    CombineMarks(p.marks, rows, words, marks);
    Barrier();
  }

  template <typename AnyRow>
  static JAXINT8_DEVICE float Quantize(const Params& p, int64_t i, AnyRow& row, RowOutput& out, Ptr<uint32_t> pieces) {
    if constexpr (kMany) return row.Quantize(out);
    if (p.pieces) {
      out.pieces = pieces;
      for (int j = ThreadIndex(); j < kPieceWords; j += BlockThreads()) Store(pieces + j, 0u);
      Barrier();
    }
    const float scale = row.Quantize(out);
    if (!p.pieces) return scale;
    Barrier();
    for (int64_t j = ThreadIndex(); j < p.piece_stride; j += BlockThreads()) {
      Store(p.pieces + i * p.piece_stride + j, static_cast<uint8_t>(Load(pieces + j / 32) >> (j % 32) & 1));
    }
    return scale;
  }

  // The last block of compressed high parts may have places for rows beyond the last: these are zeros.
  template <typename AnyRow>
  static JAXINT8_DEVICE float QuantizeSparse(const Params& p, int64_t i, AnyRow& row, const RowOutput& out) {
    const Ptr<uint32_t> bits = Cast<uint32_t>(SharedMemory() + p.sparse_at);
    for (int j = ThreadIndex(); j < kSparseWords; j += BlockThreads()) Store(bits + j, 0u);
    Barrier();
    const SparseRow sparse(p.sparse, i, bits);
    const float scale = row.Quantize(SparseRowOutput{out, sparse});
    Barrier();
    sparse.WriteFlags();
    for (int64_t r = p.m + i; r < (p.m + 63) / 64 * 64; r += p.m) SparseRow(p.sparse, r, {}).WriteZeros();
    return scale;
  }

  // Zeros for this row's share of the rows of codes that are none of x.
  static JAXINT8_DEVICE void WriteRowsBeyond(const Params& p, int64_t i) {
    if (kRule == kMarked && i >= p.m) return;
    for (int64_t row = p.m + i; row < p.code_rows; row += p.m) {
      for (int64_t j = 16 * RowTeam::Index(); j < p.stride; j += 16 * RowTeam::Size()) {
        StoreAs<Word4>(p.lo + (row * p.stride + j), Word4{});
        if (p.hi) StoreAs<Word4>(p.hi + (row * p.stride + j), Word4{});
      }
    }
  }

  // Copies the row to shared memory. Each thread copies, and then reads, its own elements.
  static JAXINT8_DEVICE void StartCopies(const Params& p, Ptr<const uint8_t> x, Ptr<uint8_t> to) {
    const int k = static_cast<int>(p.k), row_bytes = k * kBytes;
    const Prologue prologue = p.prologue.kind;
    Copy<kBytes>(x, to, k);
    if (prologue == Prologue::kSiluGate) Copy<kBytes>(x + row_bytes, to + row_bytes, k);
    if (prologue == Prologue::kRmsNorm) Copy<4>(Cast<const uint8_t>(p.prologue.norm), to + row_bytes, k);
    CopyAsyncCommit();
  }
  // Does what stands before the layer to it.
  static JAXINT8_DEVICE void EndCopies(const Params& p, Ptr<uint8_t> to, Team<>& team) {
    const int k = static_cast<int>(p.k), row_bytes = k * kBytes;
    CopyAsyncWait<0>();
    if (p.prologue.kind == Prologue::kNone) return;
    PrologueParams staged = p.prologue;
    staged.norm = Cast<const float>(to + row_bytes);
    MemoryGroups<kType, kVector> in_place(to, k, to);
    ApplyPrologue(in_place, to + row_bytes, staged, team);
  }

  template <int kElementBytes>
  static JAXINT8_DEVICE void Copy(Ptr<const uint8_t> from, Ptr<uint8_t> to, int k) {
#pragma unroll 1
    for (int i = 8 * ThreadIndex(); i < k; i += 8 * BlockThreads()) {
#pragma unroll
      for (int j = 0; j < 8 * kElementBytes; j += 16) {
        const int at = i * kElementBytes + j;
        CopyAsync16(to + at, Cast<const int8_t>(from + at), true);
      }
    }
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
