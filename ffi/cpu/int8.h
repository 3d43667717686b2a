// The CPU kernels of LLM.int8(), behind one plain header: no XLA, no Python, no instruction sets.
//
// Everything a caller needs is a Job (what to compute, cut into phases of independent items) and the table of rungs
// (one per instruction set). Every rung gives the same bits: sums are exact in int32 and every float32 operation is
// rounded on its own (these files are compiled with -ffp-contract=off).
//
// Letters: m rows, k in, n out. Weights are int8 [n, k], k contiguous, and are never kept in another format.
#ifndef JAXINT8_FFI_CPU_INT8_H_
#define JAXINT8_FFI_CPU_INT8_H_

#include <cstdint>
#include <memory>

#include "phased.h"

namespace jaxint8::cpu {

// 127^2 * k must stay below 2^31 for a row of codes to have an exact int32 product.
inline constexpr int64_t kMaxK = ((int64_t{1} << 31) - 1) / (127 * 127);
// Outputs per block of work: four 512-bit registers of int32. Every rung computes blocks of at most this width.
inline constexpr int64_t kBlockN = 64;
// Up to this many rows a product may be a bundle of dot products that streams the weights; above, it is tiled.
inline constexpr int64_t kSmallM = 72;
// Weights that a waiting thread fetches at most, for so many rows: a part of any second-level cache, and what comes in
// some microseconds.
inline constexpr int64_t kFetchBytes = 96 << 10, kFetchM = 24;

enum class Type : int32_t { kF32, kBF16, kF16, kS32 };
constexpr int64_t SizeOf(Type type) { return type == Type::kF32 || type == Type::kS32 ? 4 : 2; }
enum class Rule : int32_t { kNone, kThreshold, kRelative, kTopK };

// The outlier rule and how outliers are carried; see jaxint8/outliers.py and jaxint8/reference.py for the law.
struct Options {
  Rule rule = Rule::kNone;
  bool column_scope = false;    // a column with an outlier in any finite row is out for every finite row
  bool float_outliers = false;  // "float" arithmetic: outliers are added in float32; otherwise 128 * hi + lo
  float value = 0;              // of kThreshold and kRelative, not NaN, >= 0
  int64_t topk = 0;             // of kTopK, >= 1
};

// What a row goes through before it is quantised; see jaxint8/prologue.py.
struct Prologue {
  enum class Kind : int32_t { kNone, kRmsNorm, kSiluGate } kind = Kind::kNone;
  float epsilon = 0;            // of kRmsNorm
  const float* norm = nullptr;  // of kRmsNorm: [k]
};

struct Outlier {
  int32_t column;
  int32_t hi;   // high part of the code; 0 with float_outliers
  float value;  // the activation itself
};

// The high parts of four adjacent columns of a row, as the bytes of one word.
struct HiWord {
  int32_t group;  // columns [4 * group, 4 * group + 4)
  uint32_t four;
};

// Up to four high parts of a row.
struct HiQuad {
  int32_t column[4];  // ascending; what is left over repeats the last
  uint32_t four;      // their bytes, zero where left over
};

// What the quantiser knows of one row of activations. Its low codes lie elsewhere, zero-padded to a multiple of 64.
struct Row {
  float scale = 1;               // NaN: the row holds a non-finite value, its codes are 0
  int32_t sum = 0;               // of the full codes 128 * hi + lo: cancels the offset of unsigned weights
  int32_t count = 0;             // codes with a high part; all outliers with float_outliers
  int32_t words = 0;             // groups of four columns with an outlier that has a high part; if turned, some thrice
  int32_t quads = 0;             // in the place of words, if the rung asks for them (Rung::quads_k)
  int32_t turned = 0;            // what is to be added to sums of turned codes; see Rung::turn
  const Outlier* outliers = {};  // those counted, ascending columns
  const HiWord* hi = {};         // ascending groups, turned not strictly
  const HiQuad* quad = {};       // ascending columns
};

// So many rows are arranged together (Rung::arrange), and so many turned (Rung::turn).
inline constexpr int64_t kArrangedRows = 16;
inline constexpr int64_t kTurnedRows = 4;
inline constexpr int64_t kTurnedLines = kTurnedRows + 2;  // lines of bytes that are written for them
// And the room that they have: in twos that of each of them alone.
constexpr int64_t TurnedLines(bool twos) { return twos ? kTurnedRows * kTurnedLines : kTurnedLines; }

// Of every 64 columns words of four columns have places in this order, where codes are turned: each beside the one 32
// columns on.
static inline int32_t TurnedPlace(int32_t group) { return (group & ~15) | (group & 7) << 1 | (group >> 3 & 1); }
static inline int32_t GroupOfTurned(int32_t place) { return (place & ~15) | (place & 1) << 3 | (place >> 1 & 7); }

// The high parts of so many rows whose codes are turned, or fewer at the end: what was moved, in units of 64, then
// those of outliers, in units of 128. In each step one word of every row, or 0; a group is a place, or, in a plan, a
// number.
struct FourRows {
  bool turned = false;              // or else too much would have to be moved
  bool alone = false;               // each row by itself, in twos: then nothing has to be, but none share flips
  int32_t moved = 0, outliers = 0;  // steps
  const HiWord* words = {};         // [moved + outliers][kTurnedRows]
};

// The high parts of a small product (m <= kSmallM), or of a chunk of arranged codes: which groups of four columns hold
// any, in some row. The weights of these groups are gathered once per block and serve all rows. Rows whose weights are
// read as a stream use their own lists instead; a single one with many outliers keeps its high parts for all columns
// (dense), for weights are read more slowly than multiplied.
struct HiPlan {
  // With more, a tiled product is better; where codes are arranged, tiles of high parts are.
  static constexpr int64_t kMaxGroups = 256, kMaxTurned = 384, kMaxArranged = 1024;

  bool dense = false;
  bool turned = false;  // all rows are, and FourRows::words name these groups
  bool tiles = false;   // codes are arranged, and so are high parts (HighTiles): there is nothing to gather
  int64_t groups = 0;
  const int32_t* group = {};    // [groups], ascending
  const uint16_t* needed = {};  // for every 16 groups, that is 64 columns: which of them are listed
  const int32_t* slot = {};     // of every word of every row, one row after the other: which of the groups it is
  const int8_t* hi = {};        // dense: [k rounded up to 64], zero where not an outlier
};

// The high parts of 16 rows of activations whose codes are arranged (Rung::arrange), where they are many: of every 64
// columns that hold any, all of the rows' high parts there, arranged like the codes.
struct HighTiles {
  int64_t count = 0;
  const int32_t* step = {};  // [count], ascending: which 64 columns
  const int8_t* data = {};   // [count][1024]
};

// Where weights are likely to come from: the second-level cache of the thread that multiplies them, one that all share,
// memory (recent.h).
enum class From { kOwnCache, kCache, kMemory };

// y[i][j] = round((float(c[i][j]) * rows[i].scale) * w_scale[j] (+ extra[i][j]) (+ bias[j])) for j < n; with a residual
// round(residual[i][j] + that).
struct Epilogue {
  Type type;
  const int32_t* c;  // [m][kBlockN]
  const Row* rows;   // [m]
  int64_t n;         // at most kBlockN
  const float* w_scale;
  const float* extra;    // [m][kBlockN] or null
  const float* bias;     // [n] or null
  const void* residual;  // of the type and stride of y, or null; may be y itself
  void* y;
  int64_t stride;  // elements between rows of y
};

// One block of integer product: c[i][j] = sum over k of (128 * hi + lo)[i] * w[j], for m rows and at most 64 outputs;
// then its epilogue, behind which c holds anything.
struct Block {
  const int8_t* lo;  // [m][stride]; arranged, 16 rows after 16
  int64_t stride;    // bytes, a multiple of 64, at least k rounded up to 64
  const Row* rows;   // [m]
  bool with_hi;      // some row may hold outliers that are carried as 128 * hi + lo
  From from;
  // Set when with_hi and m <= kSmallM or codes are arranged, unless there are too many groups. Where codes are turned:
  // up to the rung's turned_m, and without outliers too.
  const HiPlan* plan;
  // Set where high parts are quads: of every four columns a bit that says whether some row may have one there.
  const uint64_t* groups;
  const int8_t* turned;   // [m / kTurnedRows, rounded up][TurnedLines][stride], by Rung::turn; or null
  const FourRows* fours;  // with turned codes: [m / kTurnedRows, rounded up]
  uint8_t* panel;  // with turned codes, of this thread: turned_n outputs of k weights, or the plan's groups of all
  bool arranged;   // codes are, by Rung::arrange
  bool beside;     // and in the place of the ninth row and the next stand high parts of the first and the next
  const HighTiles* high;  // set when with_hi and codes are arranged, but no plan: [m / 16, rounded up]
  int64_t m;
  const int8_t* w;  // [n][k]
  int64_t n;        // 1..kBlockN
  int64_t k;
  uint64_t job;              // not 0; tells blocks of one call from those of another
  const int8_t* ahead;       // rows of weights that this thread is likely to need after these, or null
  int64_t ahead_n;           // how many
  int32_t* c;                // [m][kBlockN]
  const Epilogue* epilogue;  // of all m rows, or null
  uint8_t* scratch;          // of this thread: 64-byte aligned, scratch_bytes of the rung, zero at first
};

// Buffers of k elements, rounded up to 64, for the row functions; alive during one call only.
struct RowScratch {
  float* values;        // the row as float32
  int32_t* index;       // columns of its outliers, ascending
  int32_t* codes;       // their codes 128 * hi + lo; not written with float_outliers
  float* outliers;      // their values
  uint32_t* magnitude;  // bit patterns, for the selection of the largest
};

// The columns that are out for every row of a call (column scope).
struct Columns {
  const int32_t* list;  // ascending
  int64_t count;
  const uint64_t* mask;  // one bit per column, zero-padded to a multiple of 64
};

struct AttendFunctions;  // attend.h

// The function table of one instruction set.
struct Rung {
  const char* name;
  bool (*supported)();
  // Writes the row [k] of the same type that stands behind a prologue (not kNone; of kSiluGate, x is [2 * k]).
  void (*enter)(const Prologue&, Type, const void* x, int64_t k, void* row);
  // Sets marks[j] = 1 for each outlier of one row (column scope; relaxed atomic stores of the same value).
  void (*mark)(const Options&, Type, const void* x, int64_t k, const RowScratch&, uint8_t* marks);
  // Quantises one row into lo[k] and returns scale, sum and the count of all outliers, which stand in the scratch. With
  // column scope they are the given columns. An outlier whose code fits into a byte is that byte of lo, as if it were
  // none: the split of a code does not change the sum.
  Row (*quantize)(const Options&, Type, const void* x, int64_t k, const Columns&, const RowScratch&, int8_t* lo);
  void (*block)(const Block&);
  const AttendFunctions* attend;
  int64_t chunk_m;        // rows per block of a large product
  int64_t scratch_bytes;  // per thread
  // Up to this k the high parts of large products are to be listed as quads, in the place of words.
  int64_t quads_k = 0;
  // Whether products of m rows take codes arranged: every 16 rows [16][stride] are rewritten, [columns / 4][16][4] in
  // the same place, columns rounded up to 64. Chunks of them, multiples of 16 rows, stay in the second-level cache
  // while all weights go by, if they are of arranged_bytes. Null: never.
  bool (*arranges)(int64_t m, int64_t k, From from) = nullptr;
  void (*arrange)(const int8_t* rows, int64_t stride, int64_t columns, int8_t* arranged) = nullptr;
  int64_t arranged_bytes = 0;
  // What a thread does before and behind any number of blocks with arranged codes.
  void (*begin_blocks)() = nullptr;
  void (*end_blocks)() = nullptr;
  // Turns the codes of a layer, m rows of them up to kTurnedRows, for products of unsigned bytes u = w ^ byte and
  // signed codes that add up within 16 bits: with `fours` all of them in fours, for tiles, or else in twos, or in fours
  // where they fit as they are. Writes kTurnedLines lines, for columns rounded up to 64: codes; bytes, of which u is w
  // + 128, or 127 - w where all rows' codes are negated; and which columns stand side by side. Where and how only the
  // rung's products know. Of the columns that are added neither positive codes nor negative ones add up to more than
  // 128: what flipping does not bring about, moving 64 or 128 of a code to high parts does. Lists what was moved,
  // count[i] words of places for row i at moved + i * most, and sets Row::turned; high parts are multiplied by w + 128.
  // False if they would be `most` or more, or are likely to be; never of one row without `fours`, of which nothing is
  // moved. Null: never.
  bool (*turn)(const int8_t* lo, int64_t stride, int64_t m, int64_t k, bool fours, int64_t most, int8_t* turned,
               HiWord* moved, int32_t* count, Row* rows) = nullptr;
  int64_t turned_m = 0;  // up to so many rows codes are turned for dot products, and their high parts planned
  int64_t turned_n = 0;  // outputs whose weights are packed together
};

// Bit pattern of the count-th largest of n magnitudes (reorders them); 1 <= count <= n.
uint32_t SelectLargest(uint32_t* magnitudes, int64_t n, int64_t count);

// All rungs compiled in, best first; the last is "scalar" and runs anywhere.
const Rung* const* Rungs(int* count);
// The rung of that index, or with -1 the best that this machine supports; null if unknown or not supported here.
const Rung* FindRung(int64_t index);

// What to compute. Pointers may be null where a size is 0; buffers need no alignment.
struct Problem {
  enum class Kind { kQuantize, kProduct, kLinear, kPrologue } kind;
  const Rung* rung;
  Options options;
  Prologue prologue;  // kLinear, kPrologue
  Type type;          // of x, and of y in kLinear and kPrologue
  int64_t m, k, n;
  const void* x;         // [m][k]; int8 in kProduct; with kSiluGate [m][2 * k]
  const int8_t* w;       // [n][k]; not in kQuantize
  const float* w_scale;  // [n]; kLinear
  const float* bias;     // [n] or null; kLinear
  const void* residual;  // [m][n] or null; kLinear
  // kLinear: y is the gate of two layers of n outputs each (silu of the first times the second), whose weights, scales
  // and biases stand one below the other; no residual.
  bool gated = false;
  // Where weights come from, which decides how they are read and changes no bit: guessed by what was multiplied before.
  enum class Source { kGuessed, kCache, kMemory } source = Source::kGuessed;
  void* y;           // [m][n]; int32 in kProduct; [m][k] in kPrologue
  int8_t* lo;        // kQuantize: [m][k]
  int8_t* hi;        // kQuantize: [m][k]
  float* row_scale;  // kQuantize: [m]
};

struct Workspace;
struct HighPlan;

// A workspace of one job, which goes back to the free list with it.
struct GiveBack {
  void operator()(Workspace* workspace) const;
};
using BorrowedWorkspace = std::unique_ptr<Workspace, GiveBack>;

// A quantisation, a product or a layer.
class Job : public Phased {
 public:
  explicit Job(const Problem& problem);

  // Phases: mark columns, quantise rows, multiply.
  void set_threads(int64_t threads) override;
  // None of a large product, which takes longer to multiply than to read.
  const int8_t* WeightsOf(int64_t thread, int64_t* bytes) const override;
  void Begin(int phase) override;
  void Run(int phase, int64_t item) override;
  void End(int phase) override;

 private:
  const void* RowOf(int64_t i, bool keeps);
  void MarkColumns(int64_t item);
  void QuantizeRows(int64_t item);
  void TurnRows(int64_t item, int64_t begin, int64_t end);
  void EnterRows(int64_t item);
  void CopyRows(int64_t item);
  void PlanHi(int64_t begin, int64_t end);
  void PlanChunk(int64_t chunk);
  bool PlanTurned(HighPlan* planned);
  bool PlanHighTiles(int64_t begin, int64_t end, HighPlan* planned);
  Columns ListColumns() const;
  const float* FloatOutliers(const Block& block, const float* w_scale);
  void Arrange(int64_t begin, int64_t end);
  int64_t RowsOfChunk(int64_t chunks) const;
  void set_chunks(int64_t chunks);
  bool BeginsLane(int64_t item) const;
  const uint64_t* GroupsOf(int64_t begin, int64_t end) const;
  // The first row and the first output of an item of the last phase.
  struct Place {
    int64_t i, j;
  };
  Place PlaceOf(int64_t item) const;
  Block BlockOf(int64_t item, const Place& at) const;
  Epilogue EpilogueOf(const Block& block, int64_t first_output);
  void Multiply(int64_t item);
  void MultiplyGated(const Block& gate, const Place& place);

  Problem p_;
  BorrowedWorkspace ws_;
  int64_t rows_per_item_ = 1;
  bool plans_ = false;                // whether high parts are planned, by whoever quantises the last row of a chunk
  bool quads_ = false;                // whether high parts are listed as quads, not as words
  bool turns_ = false;                // whether codes are turned (Rung::turn)
  bool arranged_ = false;             // whether codes are arranged, by whoever quantises the last of 16 rows
  bool beside_ = false;               // and high parts with them, of so few rows that there is room
  int64_t chunk_m_ = 0, chunks_ = 0;  // rows of an item of the last phase, items of a block; 0 if there are none
  From from_ = From::kMemory;
  uint64_t id_;
};

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_INT8_H_
