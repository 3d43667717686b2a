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

namespace jaxint8::cuda {

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
