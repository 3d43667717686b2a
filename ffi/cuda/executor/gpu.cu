// The same C interface as module.cc on a real GPU, without XLA: the arrays of a call are copied to buffers of exactly
// their size, so that a memory checker sees every access beyond them, and back.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <string>
#include <type_traits>
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

// The three layers of a block, a pointer in several of them being one buffer.
struct Layers {
  jaxint8::cuda::Problem problems[3];
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

Layers OnDevice(const ExecutorCall* calls, Memory& memory) {
  using namespace jaxint8::cuda;
  ExecutorCall d[3] = {calls[0], calls[1], calls[2]};
  std::map<const void*, const void*> known;  // host to device
  for (int i = 0; i < 3; ++i) {
    for (const void** shared : {&d[i].x, &d[i].residual}) {
      const auto found = known.find(*shared);
      const int64_t bytes = shared == &d[i].x ? InputBytes(calls[i]) : OutputBytes(calls[i]);
      *shared = found != known.end() ? found->second : memory.Copy(static_cast<const char*>(*shared), bytes);
    }
    d[i].w = memory.Copy(calls[i].w, d[i].n * d[i].k);
    d[i].w_scale = memory.Copy(calls[i].w_scale, 4 * d[i].n);
    d[i].bias = memory.Copy(calls[i].bias, 4 * d[i].n);
    d[i].norm = memory.Copy(calls[i].norm, 4 * d[i].k);
    d[i].y = memory.Poisoned<char>(OutputBytes(calls[i]));
    known[calls[i].y] = d[i].y;
  }
  Layers layers{{ProblemOf(d[0]), ProblemOf(d[1]), ProblemOf(d[2])}};
  int64_t bytes = 0;
  for (const Problem& p : layers.problems) bytes = std::max(bytes, WorkspaceBytes(p));
  auto* workspace = memory.Poisoned<uint8_t>(bytes);
  for (Problem& p : layers.problems) p.workspace = workspace;
  return layers;
}

void Back(void* host, const void* device, int64_t bytes) {
  if (host != nullptr && bytes > 0) {
    Must(cudaMemcpy(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost), "copy back");
  }
}

// Captures `calls` runs in a CUDA graph, each with the next of `copies` sets of weights, and replays it `repeats`
// times; returns the microseconds of one run, the median over the replays. run(i, stream) queues one with set i.
template <typename Run>
double Time(int32_t copies, int32_t calls, int32_t repeats, Run run) {
  cudaStream_t stream;
  Must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  Must(cudaDeviceSynchronize(), "preparation");
  if (const char* error = run(0, stream)) throw Failure{error};  // raises shared memory limits before the capture
  Must(cudaStreamSynchronize(stream), "first run");
  Must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int32_t i = 0; i < calls; ++i) {
    if (const char* error = run(i % copies, stream)) throw Failure{error};
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

// The weights of a problem and copies of them, so many in all.
std::vector<const int8_t*> CopiesOfWeights(const jaxint8::cuda::Problem& p, int32_t copies, Memory& memory) {
  std::vector<const int8_t*> weights = {p.w};
  while (static_cast<int32_t>(weights.size()) < copies) {
    const int64_t bytes = p.w == nullptr ? 0 : p.n * p.k;
    auto* w = memory.Poisoned<int8_t>(bytes);
    if (bytes > 0) Must(cudaMemcpy(w, p.w, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice), "copy");
    weights.push_back(w);
  }
  return weights;
}

// The call with its buffers on the device, and the host's in `host`, in the order of ForEachBuffer.
ExecutorAttendCall OnDevice(const ExecutorAttendCall& c, Memory& memory, std::vector<const void*>* host = nullptr) {
  ExecutorAttendCall d = c;
  jaxint8::cuda::ForEachBuffer(d, [&](auto& p, int64_t bytes, bool read, bool) {
    using Element = std::remove_const_t<std::remove_pointer_t<std::decay_t<decltype(p)>>>;
    if (host != nullptr) host->push_back(p);
    if (p != nullptr) p = read ? memory.Copy<Element>(p, bytes) : memory.Poisoned<Element>(bytes);
  });
  return d;
}

double TimeOne(const ExecutorCall& c, int32_t copies, int32_t calls, int32_t repeats) {
  using namespace jaxint8::cuda;
  Memory memory;
  Problem p = OnDevice(c, memory);
  const std::vector<const int8_t*> weights = CopiesOfWeights(p, copies, memory);
  return Time(copies, calls, repeats, [&](int32_t i, cudaStream_t stream) {
    p.w = weights[static_cast<size_t>(i)];
    return Run(p, stream);
  });
}

// joined: as one call of RunBlock, else of RunAll.
double TimeBlock(const ExecutorCall* c, bool joined, int32_t copies, int32_t calls, int32_t repeats) {
  using namespace jaxint8::cuda;
  Memory memory;
  Layers layers = OnDevice(c, memory);
  std::vector<const int8_t*> weights[3];
  for (int i = 0; i < 3; ++i) weights[i] = CopiesOfWeights(layers.problems[i], copies, memory);
  return Time(copies, calls, repeats, [&](int32_t set, cudaStream_t stream) {
    for (int i = 0; i < 3; ++i) layers.problems[i].w = weights[i][static_cast<size_t>(set)];
    return joined ? RunBlock(layers.problems, stream) : RunAll(layers.problems, 3, stream);
  });
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

const char* executor_run_block(const ExecutorCall* calls) {
  using namespace jaxint8::cuda;
  try {
    Memory memory;
    const Layers layers = OnDevice(calls, memory);
    if (const char* error = RunBlock(layers.problems, nullptr)) throw Failure{error};
    Must(cudaDeviceSynchronize(), "kernels");
    Back(calls[2].y, layers.problems[2].y, OutputBytes(calls[2]));
    return nullptr;
  } catch (const Failure& failure) {
    text = failure.what;
    return text.c_str();
  }
}

const char* executor_attend(const ExecutorAttendCall* c) {
  using namespace jaxint8::cuda;
  try {
    Memory memory;
    std::vector<const void*> host;
    ExecutorAttendCall d = OnDevice(*c, memory, &host);
    if (const char* error = RunAttention(AttentionOf(d), nullptr)) throw Failure{error};
    Must(cudaDeviceSynchronize(), "kernels");
    size_t i = 0;
    ForEachBuffer(d, [&](auto& p, int64_t bytes, bool, bool written) {
      if (written) Back(const_cast<void*>(host[i]), p, bytes);
      ++i;
    });
    return nullptr;
  } catch (const Failure& failure) {
    text = failure.what;
    return text.c_str();
  }
}

// Microseconds of a token's attention, each time to the next of `copies` caches; negative if something went wrong.
double executor_time_attend(const ExecutorAttendCall* c, int32_t copies, int32_t calls, int32_t repeats) {
  try {
    Memory memory;
    std::vector<ExecutorAttendCall> sets;
    for (int32_t i = 0; i < copies; ++i) sets.push_back(OnDevice(*c, memory));
    return Time(copies, calls, repeats, [&](int32_t i, cudaStream_t stream) {
      return jaxint8::cuda::RunAttention(jaxint8::cuda::AttentionOf(sets[static_cast<size_t>(i)]), stream);
    });
  } catch (const Failure& failure) {
    text = failure.what;
    return -1;
  }
}

const char* executor_sites() { return ""; }

// Microseconds of one run; negative if something went wrong (executor_error says what).
double executor_time(const ExecutorCall* c, int32_t copies, int32_t calls, int32_t repeats) {
  try {
    return TimeOne(*c, copies, calls, repeats);
  } catch (const Failure& failure) {
    text = failure.what;
    return -1;
  }
}

double executor_time_block(const ExecutorCall* calls, int32_t joined, int32_t copies, int32_t count, int32_t repeats) {
  try {
    return TimeBlock(calls, joined != 0, copies, count, repeats);
  } catch (const Failure& failure) {
    text = failure.what;
    return -1;
  }
}

const char* executor_error() { return text.c_str(); }
}
