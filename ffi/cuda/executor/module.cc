// The executor as a plain C library for the tests: one call runs one problem on the CPU with all checks on.
#include <cstdio>
#include <exception>
#include <string>

#include "../device.h"
#include "../host.h"
#include "../quantize.h"
#include "call.h"

namespace jaxint8::cuda {

Machine& TheMachine() {
  static Machine machine;
  return machine;
}

}  // namespace jaxint8::cuda

static std::string text;  // what the last call returned

// The machine as a call wants it, without buffers.
template <typename Call>
static jaxint8::cuda::Machine& FreshMachine(const Call& c) {
  jaxint8::cuda::Machine& machine = jaxint8::cuda::TheMachine();
  machine.Reset();
  machine.order = static_cast<unsigned>(c.order);
  machine.multiprocessors = c.multiprocessors;
  machine.plant = {static_cast<jaxint8::cuda::Fault>(c.planted_fault), c.planted_site ? c.planted_site : ""};
  return machine;
}

template <typename Body>
static const char* Checked(Body run) {
  try {
    const char* error = run();
    if (error == nullptr) return nullptr;
    text = error;
  } catch (const std::exception& e) {
    text = e.what();
  }
  return text.c_str();
}

// Makes the buffers of some calls known, then runs. Whatever is written by one call may be read by those behind it.
template <typename Body>
static const char* RunChecked(const ExecutorCall* calls, int count, Body run) {
  using namespace jaxint8::cuda;
  Machine& machine = FreshMachine(*calls);
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
  return Checked(run);
}

extern "C" {

int64_t executor_workspace_bytes(const ExecutorCall* c) {
  return jaxint8::cuda::WorkspaceBytes(jaxint8::cuda::ProblemOf(*c));
}

// Returns null or what was found wrong.
const char* executor_run(const ExecutorCall* c) {
  return RunChecked(c, 1, [&] { return jaxint8::cuda::Run(jaxint8::cuda::ProblemOf(*c), nullptr); });
}

// The same for a token's attention.
const char* executor_attend(const ExecutorAttendCall* c) {
  using namespace jaxint8::cuda;
  Machine& machine = FreshMachine(*c);
  ExecutorAttendCall call = *c;
  ForEachBuffer(call, [&machine](auto& p, int64_t bytes, bool read, bool) {
    const void* data = p;
    if (data != nullptr && bytes > 0) machine.Add(const_cast<void*>(data), bytes, read);
  });
  return Checked([&] { return RunAttention(AttentionOf(call), nullptr); });
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

// What is said of a byte that threads read without a barrier between them, and that then the last of them to read,
// behind a barrier, writes. readers: 0: in both halves of a block; 1: in one half of it, 2: in two blocks, 3: in a
// warp. barrier: 0: of its half, 1: of its block, 2: of its warp.
const char* executor_race(int32_t readers, int32_t barrier, int32_t order) {
  using namespace jaxint8::cuda;
  Machine& machine = TheMachine();
  machine.Reset();
  machine.plant = {};
  machine.order = static_cast<unsigned>(order);
  static uint8_t byte;
  machine.Add(&byte, 1, true);
  const Ptr<uint8_t> p = Memory<uint8_t>(&byte, 1);
  const auto body = [&] {
    const int half = ThreadIndex() / 64;
    const bool last_block = BlockIndex() + 1 == BlockCount();
    const bool reads = readers == 0 ? true : readers == 3 ? ThreadIndex() / 32 == 3 : half == 1;
    if (reads) Load(p);
    if (barrier == 0) PartBarrier(1 + half, 64);
    if (barrier == 1) Barrier();
    if (barrier == 2) WarpBarrier();
    if (ThreadIndex() == 127 && last_block) Store(p, uint8_t{1});
  };
  try {
    machine.Launch(readers == 2 ? 2 : 1, 128, 0, 1, body);
  } catch (const std::exception& e) {
    text = e.what();
    return text.c_str();
  }
  return nullptr;
}

// y = x / divisor by DivideBy, for the divisors that it is used with, or by IntegerDivisor.
void executor_divide(int32_t divisor, int32_t by_integer, const float* x, float* y, int64_t count) {
  using namespace jaxint8::cuda;
  const IntegerDivisor any(divisor);
  for (int64_t i = 0; i < count; ++i) {
    y[i] = by_integer                   ? any.Divide(x[i])
           : divisor == kCodeMax        ? DivideBy<kCodeMax>(x[i])
           : divisor == kRmsLevels      ? DivideBy<kRmsLevels>(x[i])
           : divisor == kOutlierCodeMax ? DivideBy<kOutlierCodeMax>(x[i])
                                        : 0;
  }
}

// y = the nearest integer to x / divisor, element by element, by Quotients: of values with so many bits, 8, 11 or 24.
void executor_round(int32_t bits, const float* divisor, const float* x, int32_t* y, int64_t count) {
  using namespace jaxint8::cuda;
  const auto round = [&](auto constant) {
    using TypeQuotients = Quotients<decltype(constant)::kType>;
    for (int64_t i = 0; i < count; ++i) {
      const float v[8] = {x[i]};
      uint32_t shifted[8];
      TypeQuotients(divisor[i]).Round(v, shifted);
      y[i] = TypeQuotients::Integer(shifted[0]);
    }
  };
  bits == 8    ? round(TypeConstant<Type::kBF16>())
  : bits == 11 ? round(TypeConstant<Type::kF16>())
               : round(TypeConstant<Type::kF32>());
}

int32_t executor_worst_bank_conflict() { return jaxint8::cuda::TheMachine().worst_bank_conflict; }
}
