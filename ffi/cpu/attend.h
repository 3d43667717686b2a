// A decoder step's attention to an int8 cache of keys and values; the law is jaxint8/reference.py: spread,
// quantize_rows and attend.
//
// The query is an integer of 15 bits, 128 * hi + lo, and so its products with the keys' codes are exact. Slots are cut
// into chunks of kChunkSlots, wherever a row begins, each with a softmax of its own: its largest score, and the sum of
// its exponentials and of its values relative to that; these shares are joined at the end, in order. What an
// exponential and a value's scale give is an integer of 16 bits without a sign, in units of the chunk's largest, and
// its products with the values' codes are exact too. So a row's result depends on that row alone and on no number of
// threads, and every rung gives the same bits: float32 operations are rounded on their own, and sums of them have a
// fixed order.
#ifndef JAXINT8_FFI_CPU_ATTEND_H_
#define JAXINT8_FFI_CPU_ATTEND_H_

#include <cstdint>

#include "int8.h"
#include "phased.h"

namespace jaxint8::cpu {

inline constexpr int64_t kMostHeadDim = 128, kMostQueries = 8;  // queries that share keys
inline constexpr int64_t kChunkSlots = 256, kMostShare = 65535;
static_assert(kMostShare * 128 * kChunkSlots < int64_t{1} << 31, "sums of values must be exact");

// A query as codes; its products with keys' codes, times the factor and the key's scale, are its scores.
struct alignas(64) Query {
  int8_t hi[kMostHeadDim], lo[kMostHeadDim];
  int16_t code[kMostHeadDim];  // 128 * hi + lo
  int32_t sum;                 // of the codes
  float factor;                // NaN if the query holds a non-finite value
};

// What a query takes from a chunk.
struct alignas(64) ValueShare {
  float most;             // the largest score
  float sum;              // of exp(score - most); NaN if a score or a value is not finite
  float y[kMostHeadDim];  // sum of exp(score - most) * value
};

// A token in one key-value head: its queries, key and value, and where they go.
struct AttendToken {
  Type type;
  int64_t d;
  const void* queries;  // [heads][d]
  int64_t heads;
  const void *key, *value;     // [d]
  const float *cosine, *sine;  // [d / 2] or null
  Query* to;                   // [heads]
  int8_t* key_codes;           // [d]
  float* key_scale;
  int8_t* value_codes;  // every stride bytes one
  int64_t stride;
  float* value_scale;
};

// A chunk of the slots of one key-value head.
struct AttendChunk {
  int64_t d;
  const Query* queries;
  int64_t heads;
  const int8_t* keys;        // [count][d]
  const float* key_scale;    // [count]
  const int8_t* values;      // [d][stride], of which count are the chunk's
  const float* value_scale;  // [count]
  int64_t stride;
  int64_t count;       // up to kChunkSlots, a multiple of 32
  int64_t begin, end;  // the slots that are seen, at least one: others may hold anything
  ValueShare* shares;  // [heads]
};

// What a rung does of it.
struct AttendFunctions {
  // Rotates, spreads, quantises and stores.
  void (*enter)(const AttendToken&);
  void (*chunk)(const AttendChunk&);
  // y[heads][d] of the shares [count][heads].
  void (*join)(const ValueShare* shares, int64_t count, int64_t heads, int64_t d, Type type, void* y);
};

struct AttendProblem {
  const Rung* rung;
  Type type;  // of qkv and y
  int64_t b, heads, kv_heads, d, slots;
  const void* qkv;             // [b][heads + 2 * kv_heads][d]
  const float *cosine, *sine;  // [b][d / 2] or null
  const int32_t* start;        // [b], the first slot that is seen; a token sees at least itself
  int64_t slot;                // the token's own, the last that is seen
  int8_t* key_codes;           // [b][kv_heads][slots][d]
  float* key_scale;            // [b][kv_heads][slots]
  int8_t* value_codes;         // [b][kv_heads][d][slots]
  float* value_scale;          // [b][kv_heads][slots]
  void* y;                     // [b][heads][d]
};

class AttendJob : public Phased {
 public:
  explicit AttendJob(const AttendProblem& problem);

  const int8_t* WeightsOf(int64_t thread, int64_t* bytes) const override;
  void Run(int phase, int64_t item) override;

 private:
  // A chunk of a key-value head, one of an item of the last phase.
  struct Place {
    int64_t row, unit, chunk;  // units are the key-value heads of all rows
  };
  Place PlaceOf(int64_t item) const;
  int64_t StartOf(int64_t row) const;
  int64_t ChunksOf(int64_t row) const;
  void Enter(int64_t unit);
  void Attend(int64_t item);
  void Join(int64_t row, int64_t unit);

  AttendProblem p_;
  BorrowedWorkspace ws_;
  int64_t group_;           // queries that share keys
  Query* queries_;          // [units][group]
  ValueShare* shares_;      // [items][group]
  int64_t *first_, *left_;  // [b + 1], a row's first item; [units], chunks that are not done
};

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ATTEND_H_
