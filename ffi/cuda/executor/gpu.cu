// The same C interface as module.cc on a real GPU, without XLA: the arrays of a call are copied to buffers of exactly
// their size, so that a memory checker sees every access beyond them, and back.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <vector>

#include "call.h"

namespace {

std::string text;  // what the last call returned

struct Failure {
  std::string what;
};

void Must(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Failure{std::string(what) + ": " + cudaGetErrorString(status)};
}

// Device memory that is freed at the end of the call.
class Memory {
 public:
  ~Memory() {
    for (void* p : all_) cudaFree(p);
  }
  template <typename T>
  T* Poisoned(int64_t bytes) {
    if (bytes == 0) return nullptr;
    void* p = nullptr;
    Must(cudaMalloc(&p, static_cast<size_t>(bytes)), "cudaMalloc");
    all_.push_back(p);
    Must(cudaMemset(p, 0xa5, static_cast<size_t>(bytes)), "memset");
    return static_cast<T*>(p);
  }
  template <typename T>
  T* Copy(const T* host, int64_t bytes) {
    if (host == nullptr || bytes == 0) return nullptr;
    void* p = nullptr;
    Must(cudaMalloc(&p, static_cast<size_t>(bytes)), "cudaMalloc");
    all_.push_back(p);
    Must(cudaMemcpy(p, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice), "copy");
    return static_cast<T*>(p);
  }

 private:
  std::vector<void*> all_;
};

jaxint8::cuda::Problem OnDevice(const ExecutorCall& c, Memory& memory) {
  using namespace jaxint8::cuda;
  ExecutorCall d = c;
  d.x = memory.Copy(static_cast<const char*>(c.x), InputBytes(c));
  d.w = memory.Copy(c.w, c.n * c.k);
  d.w_scale = memory.Copy(c.w_scale, 4 * c.n);
  d.bias = memory.Copy(c.bias, 4 * c.n);
  d.norm = memory.Copy(c.norm, 4 * c.k);
  d.residual = memory.Copy(static_cast<const char*>(c.residual), OutputBytes(c));
  if (c.residual != nullptr && c.residual == c.y) {  // added in place
    d.y = const_cast<void*>(d.residual);
  } else if (c.y)
    d.y = memory.Poisoned<char>(OutputBytes(c));
  if (c.lo) d.lo = memory.Poisoned<int8_t>(c.m * c.k);
  if (c.hi) d.hi = memory.Poisoned<int8_t>(c.m * c.k);
  if (c.row_scale) d.row_scale = memory.Poisoned<float>(4 * c.m);
  d.workspace = memory.Poisoned<uint8_t>(WorkspaceBytes(ProblemOf(c)));
  return ProblemOf(d);
}

void Back(void* host, const void* device, int64_t bytes) {
  if (host != nullptr && bytes > 0) {
    Must(cudaMemcpy(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost), "copy back");
  }
}

// Captures `calls` runs in a CUDA graph, each with the next of `copies` sets of weights, and replays it `repeats`
// times; returns the microseconds of one run, the median over the replays.
double Time(const ExecutorCall& c, int32_t copies, int32_t calls, int32_t repeats) {
  using namespace jaxint8::cuda;
  Memory memory;
  Problem p = OnDevice(c, memory);
  std::vector<const int8_t*> weights = {p.w};
  while (p.w != nullptr && static_cast<int32_t>(weights.size()) < copies) {
    auto* w = memory.Poisoned<int8_t>(c.n * c.k);
    Must(cudaMemcpy(w, p.w, static_cast<size_t>(c.n * c.k), cudaMemcpyDeviceToDevice), "copy");
    weights.push_back(w);
  }
  cudaStream_t stream;
  Must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  Must(cudaDeviceSynchronize(), "preparation");
  if (const char* error = Run(p, stream)) throw Failure{error};  // raises shared memory limits before the capture
  Must(cudaStreamSynchronize(stream), "first run");
  Must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int32_t i = 0; i < calls; ++i) {
    p.w = weights[static_cast<size_t>(i) % weights.size()];
    if (const char* error = Run(p, stream)) throw Failure{error};
  }
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  Must(cudaStreamEndCapture(stream, &graph), "capture");
  Must(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  std::vector<cudaEvent_t> events(static_cast<size_t>(repeats) + 1);
  for (cudaEvent_t& event : events) Must(cudaEventCreate(&event), "event");
  for (int i = 0; i < 2; ++i) Must(cudaGraphLaunch(executable, stream), "graph");
  Must(cudaEventRecord(events[0], stream), "event");
  for (size_t i = 1; i < events.size(); ++i) {
    Must(cudaGraphLaunch(executable, stream), "graph");
    Must(cudaEventRecord(events[i], stream), "event");
  }
  Must(cudaStreamSynchronize(stream), "timed runs");
  std::vector<float> milliseconds(static_cast<size_t>(repeats));
  for (size_t i = 0; i < milliseconds.size(); ++i) {
    Must(cudaEventElapsedTime(&milliseconds[i], events[i], events[i + 1]), "event");
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  cudaStreamDestroy(stream);
  std::sort(milliseconds.begin(), milliseconds.end());
  return 1e3 * milliseconds[milliseconds.size() / 2] / calls;
}

}  // namespace

extern "C" {

int64_t executor_workspace_bytes(const ExecutorCall* c) {
  return jaxint8::cuda::WorkspaceBytes(jaxint8::cuda::ProblemOf(*c));
}

const char* executor_run(const ExecutorCall* c) {
  using namespace jaxint8::cuda;
  try {
    Memory memory;
    const Problem p = OnDevice(*c, memory);
    if (const char* error = Run(p, nullptr)) throw Failure{error};
    Must(cudaDeviceSynchronize(), "kernels");
    Back(c->y, p.y, OutputBytes(*c));
    Back(c->lo, p.lo, c->m * c->k);
    Back(c->hi, p.hi, c->m * c->k);
    Back(c->row_scale, p.row_scale, 4 * c->m);
    return nullptr;
  } catch (const Failure& failure) {
    text = failure.what;
    return text.c_str();
  }
}

const char* executor_sites() { return ""; }

// Microseconds of one run; negative if something went wrong (executor_error says what).
double executor_time(const ExecutorCall* c, int32_t copies, int32_t calls, int32_t repeats) {
  try {
    return Time(*c, copies, calls, repeats);
  } catch (const Failure& failure) {
    text = failure.what;
    return -1;
  }
}

const char* executor_error() { return text.c_str(); }
}
