// One problem as a plain C struct, for callers without XLA: the tests of the block executor, and checks on a GPU.
#ifndef JAXINT8_FFI_CUDA_EXECUTOR_CALL_H_
#define JAXINT8_FFI_CUDA_EXECUTOR_CALL_H_

#include <cstdint>

#include "../int8.h"

// Mirrored by Call in tests/cuda_executor.py.
struct ExecutorCall {
  int32_t kind, rule, column_scope, path, type, planted_fault;
  float value;
  int32_t order, prologue;
  float epsilon;
  int64_t topk, m, k, n, multiprocessors;
  const void* x;
  const int8_t* w;
  const float* w_scale;
  const float* bias;
  const float* norm;
  const void* residual;
  void* y;
  int8_t* lo;
  int8_t* hi;
  float* row_scale;
  uint8_t* workspace;
  int64_t workspace_bytes;
  const char* planted_site;
};

// A token's attention: mirrored by AttendCall in tests/cuda_executor.py.
struct ExecutorAttendCall {
  int32_t type, planted_fault, order;
  int64_t rows, kv_heads, queries, d, slots, multiprocessors;
  const void* qkv;
  const float* cosine;
  const float* sine;
  const int32_t* start;
  const int32_t* slot;
  int8_t* keys;
  float* key_scale;
  int8_t* values;
  float* value_scale;
  void* y;
  const char* planted_site;
};

namespace jaxint8::cuda {

inline Attention AttentionOf(const ExecutorAttendCall& c) {
  Attention a{};
  a.type = static_cast<Type>(c.type);
  a.rows = c.rows;
  a.kv_heads = c.kv_heads;
  a.queries = c.queries;
  a.d = c.d;
  a.slots = c.slots;
  a.qkv = c.qkv;
  a.cosine = c.cosine;
  a.sine = c.sine;
  a.start = c.start;
  a.slot = c.slot;
  a.keys = c.keys;
  a.key_scale = c.key_scale;
  a.values = c.values;
  a.value_scale = c.value_scale;
  a.y = c.y;
  return a;
}

// Calls f(pointer, bytes, whether it is read, whether it is written) for each buffer.
template <typename F>
void ForEachBuffer(ExecutorAttendCall& c, F f) {
  const int64_t item = c.type == 0 ? 4 : 2, heads = c.rows * c.kv_heads, cached = heads * c.slots;
  f(c.qkv, heads * (c.queries + 2) * c.d * item, true, false);
  f(c.cosine, 2 * c.rows * c.d, true, false);
  f(c.sine, 2 * c.rows * c.d, true, false);
  f(c.start, 4 * c.rows, true, false);
  f(c.slot, 4, true, false);
  f(c.keys, cached * c.d, true, true);
  f(c.key_scale, 4 * cached, true, true);
  f(c.values, cached * c.d, true, true);
  f(c.value_scale, 4 * cached, true, true);
  f(c.y, heads * c.queries * c.d * item, false, true);
}

inline Problem ProblemOf(const ExecutorCall& c) {
  Problem p{};
  p.kind = static_cast<Problem::Kind>(c.kind);
  p.options = {static_cast<Rule>(c.rule), c.column_scope != 0, c.value, c.topk};
  p.prologue = static_cast<Prologue>(c.prologue);
  p.epsilon = c.epsilon;
  p.norm = c.norm;
  p.residual = c.residual;
  p.path = static_cast<Path>(c.path);
  p.type = static_cast<Type>(c.type);
  p.m = c.m;
  p.k = c.k;
  p.n = c.n;
  p.x = c.x;
  p.w = c.w;
  p.w_scale = c.w_scale;
  p.bias = c.bias;
  p.y = c.y;
  p.lo = c.lo;
  p.hi = c.hi;
  p.row_scale = c.row_scale;
  p.workspace = c.workspace;
  return p;
}

// Bytes of each buffer of a call.
inline int64_t ElementBytes(int32_t type) { return type == 0 || type == 3 ? 4 : 2; }
inline int64_t InputBytes(const ExecutorCall& c) {
  return c.m * c.k * (c.kind == 1 ? 1 : ElementBytes(c.type) * (c.prologue == 2 ? 2 : 1));
}
inline int64_t OutputBytes(const ExecutorCall& c) {
  return c.m * (c.kind == 3 ? c.k : c.n) * (c.kind == 1 || c.kind == 4 ? 4 : ElementBytes(c.type));
}

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_EXECUTOR_CALL_H_
