// The CUDA kernels of LLM.int8(), behind one plain header: no XLA, no Python, no CUDA.
//
// Outliers are carried as 15-bit integers (128 * hi + lo), so every sum is exact in int32 and every path below gives
// the bits of jaxint8/reference.py. No call allocates, waits for the device or launches what depends on data: all of
// them can be captured in a CUDA graph. Scratch memory is the caller's, WorkspaceBytes of it.
//
// Letters: m rows, k in, n out. Weights are int8 [n, k], k contiguous.
#ifndef JAXINT8_FFI_CUDA_INT8_H_
#define JAXINT8_FFI_CUDA_INT8_H_

#include <cstdint>

struct CUstream_st;

namespace jaxint8::cuda {

// 127^2 * k must stay below 2^31 for a row of codes to have an exact int32 product.
inline constexpr int64_t kMaxK = ((int64_t{1} << 31) - 1) / (127 * 127);

enum class Type : int32_t { kF32, kBF16, kF16, kS32 };
enum class Rule : int32_t { kNone, kThreshold, kRelative, kTopK };

// A type as a constant, for functions that are made for each.
template <Type kValue>
struct TypeConstant {
  static constexpr Type kType = kValue;
};

// The outlier rule; see jaxint8/outliers.py and jaxint8/reference.py for the law.
struct Options {
  Rule rule = Rule::kNone;
  bool column_scope = false;  // a column with an outlier in any finite row is out for every finite row
  float value = 0;            // of kThreshold and kRelative, not NaN, >= 0
  int64_t topk = 0;           // of kTopK, >= 1
};

// What is done to a row before it is quantised; its result is rounded to the type of x. See jaxint8/reference.py.
enum class Prologue : int32_t { kNone, kRmsNorm, kSiluGate };

// How the product is computed. kAuto chooses from the table in plan.h. kSparse: as kWgmma, but for the high parts.
// kNarrow: by narrow.h, and kPaired: by paired.h, whatever the number of rows.
enum class Path : int32_t { kAuto = -1, kStream = 0, kTiled = 1, kWgmma = 2, kSparse = 3, kNarrow = 4, kPaired = 5 };

// kLargest: the columns of the n largest values of each row of float32, n from 1 to k and kLargestMost, in falling
// order, of equal ones the lower first. Zeros are equal, whatever their signs; NaNs are equal, and above all numbers.
inline constexpr int kLargestMost = 64;

struct Problem {
  enum class Kind { kQuantize, kProduct, kLinear, kPrologue, kLargest } kind;
  Options options;
  Prologue prologue = Prologue::kNone;  // not in kProduct
  Path path = Path::kAuto;
  Type type = Type::kF32;  // of x, and of y in kLinear
  int64_t m = 0, k = 0, n = 0;
  float epsilon = 0;               // of kRmsNorm
  const void* x = nullptr;         // [m][k]; int8 in kProduct; [m][2 * k] with kSiluGate, the gate first
  const float* norm = nullptr;     // [k]; kRmsNorm
  const int8_t* w = nullptr;       // [n][k]; kProduct and kLinear
  const float* w_scale = nullptr;  // [n]; kLinear
  const float* bias = nullptr;     // [n] or null; kLinear
  // kLinear: the first n / 2 outputs are gates for the others, and y is [m][n / 2]. Only RunBlock sets it.
  bool gated = false;
  // [m][n] of the type of x, or null; kLinear. Added to y once that is rounded; may be y itself.
  const void* residual = nullptr;
  void* y = nullptr;             // [m][n]; int32 in kProduct and kLargest; [m][k] in kPrologue
  int8_t* lo = nullptr;          // [m][k]; kQuantize
  int8_t* hi = nullptr;          // [m][k]; kQuantize
  float* row_scale = nullptr;    // [m]; kQuantize
  uint8_t* workspace = nullptr;  // WorkspaceBytes, aligned to 128
};

// Bytes of scratch that Run needs for a problem of this shape and these options, on any device. Pointers are not read.
int64_t WorkspaceBytes(const Problem& problem);

// Queues the computation on the stream. Returns null, or what went wrong (a static text or one kept per thread).
const char* Run(const Problem& problem, CUstream_st* stream);

// The same for some computations, each of which may read what those before it write. They share one workspace, of the
// size that the most demanding one needs.
const char* RunAll(const Problem* problems, int count, CUstream_st* stream);

// What a decoder layer does behind its attention: three layers, of which each reads what the one before it writes, the
// third behind a gate. As RunAll, but what is left in the y of the second is not said.
const char* RunBlock(const Problem (&layers)[3], CUstream_st* stream);

// One token's attention to an int8 cache, for each sequence (attend.h); see jaxint8/attend.py for the function.
inline constexpr int kAttendQueries = 8;  // query heads that share keys, at most
struct Attention {
  Type type = Type::kF32;                                         // of qkv and y
  int64_t rows = 0, kv_heads = 0, queries = 0, d = 0, slots = 0;  // queries: of a key-value head
  const void* qkv = nullptr;                                      // [rows][(queries + 2) * kv_heads][d]
  const float* cosine = nullptr;                                  // [rows][d / 2], or null
  const float* sine = nullptr;
  const int32_t* start = nullptr;  // [rows]
  const int32_t* slot = nullptr;   // [1]
  int8_t* keys = nullptr;          // [rows][kv_heads][slots][d]
  float* key_scale = nullptr;      // [rows][kv_heads][slots]
  int8_t* values = nullptr;        // [rows][kv_heads][d][slots]
  float* value_scale = nullptr;    // [rows][kv_heads][slots]
  void* y = nullptr;               // [rows][queries * kv_heads][d]
};
const char* RunAttention(const Attention& attention, CUstream_st* stream);

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_INT8_H_
