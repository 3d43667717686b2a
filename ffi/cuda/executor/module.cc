// The executor as a plain C library for the tests: one call runs one problem on the CPU with all checks on.
#include <cstdio>
#include <exception>
#include <string>

#include "../device.h"
#include "../launch.cu"
#include "call.h"

namespace jaxint8::cuda {

Machine& TheMachine() {
  static Machine machine;
  return machine;
}

}  // namespace jaxint8::cuda

static std::string text;  // what the last call returned

// Makes the buffers of some calls known, then runs. Whatever is written by one call may be read by those behind it.
template <typename Body>
static const char* RunChecked(const ExecutorCall* calls, int count, Body run) {
  using namespace jaxint8::cuda;
  Machine& machine = TheMachine();
  machine.Reset();
  machine.order = static_cast<unsigned>(calls->order);
  machine.multiprocessors = calls->multiprocessors;
  machine.plant = {static_cast<Fault>(calls->planted_fault), calls->planted_site ? calls->planted_site : ""};
  const auto add = [&machine](const void* p, int64_t bytes, bool defined) {
    if (p != nullptr && bytes > 0 && machine.Find(p) == nullptr) machine.Add(const_cast<void*>(p), bytes, defined);
  };
  for (int i = 0; i < count; ++i) {
    const ExecutorCall& c = calls[i];
    add(c.x, InputBytes(c), true);
    add(c.w, c.n * c.k, true);
    add(c.w_scale, 4 * c.n, true);
    add(c.bias, 4 * c.n, true);
    add(c.norm, 4 * c.k, true);
    add(c.residual, OutputBytes(c), true);
    add(c.y, OutputBytes(c), false);
    add(c.lo, c.m * c.k, false);
    add(c.hi, c.m * c.k, false);
    add(c.row_scale, 4 * c.m, false);
    add(c.workspace, c.workspace_bytes, false);
  }
  try {
    const char* error = run();
    if (error == nullptr) return nullptr;
    text = error;
  } catch (const std::exception& e) {
    text = e.what();
  }
  return text.c_str();
}

extern "C" {

int64_t executor_workspace_bytes(const ExecutorCall* c) {
  return jaxint8::cuda::WorkspaceBytes(jaxint8::cuda::ProblemOf(*c));
}

// Returns null or what was found wrong.
const char* executor_run(const ExecutorCall* c) {
  return RunChecked(c, 1, [&] { return jaxint8::cuda::Run(jaxint8::cuda::ProblemOf(*c), nullptr); });
}

// The same for the three layers of a block, a pointer in several of them being one buffer.
const char* executor_run_block(const ExecutorCall* calls) {
  using jaxint8::cuda::ProblemOf;
  return RunChecked(calls, 3, [&] {
    return jaxint8::cuda::RunBlock({ProblemOf(calls[0]), ProblemOf(calls[1]), ProblemOf(calls[2])}, nullptr);
  });
}

// "file:line fault" of every place of the last run where a fault can be planted, one a line.
const char* executor_sites() {
  text.clear();
  for (const auto& site : jaxint8::cuda::TheMachine().sites) text += site.first + "\n";
  return text.c_str();
}

int32_t executor_worst_bank_conflict() { return jaxint8::cuda::TheMachine().worst_bank_conflict; }
}
