// The executor as a plain C library for the tests: one call runs one problem on the CPU with all checks on.
#include <cstdio>
#include <exception>
#include <string>

#include "../device.h"
#include "../launch.cu"

namespace jaxint8::cuda {

Machine& TheMachine() {
  static Machine machine;
  return machine;
}

}  // namespace jaxint8::cuda

static std::string text;  // what the last call returned

extern "C" {

// Mirrors of Problem and of the machine's settings; see tests/test_cuda_executor.py.
struct ExecutorCall {
  int32_t kind, rule, column_scope, path, type, planted_fault;
  float value;
  int32_t order;
  int64_t topk, m, k, n, multiprocessors;
  const void* x;
  const int8_t* w;
  const float* w_scale;
  const float* bias;
  void* y;
  int8_t* lo;
  int8_t* hi;
  float* row_scale;
  uint8_t* workspace;
  int64_t workspace_bytes;
  const char* planted_site;
};

static jaxint8::cuda::Problem ProblemOf(const ExecutorCall& c) {
  using namespace jaxint8::cuda;
  Problem p{};
  p.kind = static_cast<Problem::Kind>(c.kind);
  p.options = {static_cast<Rule>(c.rule), c.column_scope != 0, c.value, c.topk};
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

int64_t executor_workspace_bytes(const ExecutorCall* c) { return jaxint8::cuda::WorkspaceBytes(ProblemOf(*c)); }

// Returns null or what was found wrong.
const char* executor_run(const ExecutorCall* c) {
  using namespace jaxint8::cuda;
  Machine& machine = TheMachine();
  machine.Reset();
  machine.order = static_cast<unsigned>(c->order);
  machine.multiprocessors = c->multiprocessors;
  machine.plant = {static_cast<Fault>(c->planted_fault), c->planted_site ? c->planted_site : ""};
  const auto bytes_of = [](int32_t type) { return type == 0 || type == 3 ? 4 : 2; };
  const auto add = [&machine](const void* p, int64_t bytes, bool defined) {
    if (p != nullptr && bytes > 0) machine.Add(const_cast<void*>(p), bytes, defined);
  };
  const bool product = c->kind == 1;
  add(c->x, c->m * c->k * (product ? 1 : bytes_of(c->type)), true);
  add(c->w, c->n * c->k, true);
  add(c->w_scale, 4 * c->n, true);
  add(c->bias, 4 * c->n, true);
  add(c->y, c->m * c->n * (product ? 4 : bytes_of(c->type)), false);
  add(c->lo, c->m * c->k, false);
  add(c->hi, c->m * c->k, false);
  add(c->row_scale, 4 * c->m, false);
  add(c->workspace, c->workspace_bytes, false);
  try {
    const Problem p = ProblemOf(*c);
    const char* error = Run(p, nullptr);
    if (error == nullptr) return nullptr;
    text = error;
  } catch (const std::exception& e) {
    text = e.what();
  }
  return text.c_str();
}

// "file:line fault" of every place of the last run where a fault can be planted, one a line.
const char* executor_sites() {
  text.clear();
  for (const auto& site : jaxint8::cuda::TheMachine().sites) text += site.first + "\n";
  return text.c_str();
}

int32_t executor_worst_bank_conflict() { return jaxint8::cuda::TheMachine().worst_bank_conflict; }
int64_t executor_launches() { return jaxint8::cuda::TheMachine().launches; }
int64_t executor_blocks() { return jaxint8::cuda::TheMachine().blocks; }
}
