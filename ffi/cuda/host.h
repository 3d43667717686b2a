// Launching kernels and asking the device, for CUDA; executor/device.h has the same names for the CPU.
#ifndef JAXINT8_FFI_CUDA_HOST_H_
#define JAXINT8_FFI_CUDA_HOST_H_

#ifdef __CUDACC__

#include <atomic>
#include <cstdint>
#include <cstdio>

#include "device.h"

namespace jaxint8::cuda {

// Null, or what went wrong. The launch may report an earlier failure of the device.
inline const char* Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return nullptr;
  thread_local char message[256];
  std::snprintf(message, sizeof message, "%s: %s (perhaps of an earlier kernel)", what, cudaGetErrorString(status));
  return message;
}

struct Device {
  int multiprocessors = 0, major = 0;
};

inline const char* FindDevice(Device* device, int* index) {
  static std::atomic<int> known[64][2];  // zero until known
  if (const char* e = Check(cudaGetDevice(index), "cudaGetDevice")) return e;
  if (*index < 0 || *index >= 64) return "more than 64 devices";
  auto& entry = known[*index];
  if (entry[1].load(std::memory_order_acquire) == 0) {
    int count = 0, major = 0;
    if (const char* e = Check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, *index), "device"))
      return e;
    if (const char* e = Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, *index), "device")) {
      return e;
    }
    entry[0].store(count, std::memory_order_relaxed);
    entry[1].store(major, std::memory_order_release);
  }
  *device = {entry[0].load(std::memory_order_relaxed), entry[1].load(std::memory_order_relaxed)};
  return nullptr;
}

// Queues a kernel. overlapped: it may start before its predecessor in the stream ends (see WaitForPreviousKernel).
template <typename Kernel>
const char* Launch(CUstream_st* stream, int64_t blocks, int threads, int64_t shared,
                   const typename Kernel::Params& params, bool overlapped) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "too many blocks for one launch";
  Device device;
  int index = 0;
  if (const char* e = FindDevice(&device, &index)) return e;
  if (shared > 48 * 1024) {
    static std::atomic<int64_t> allowed[64];  // the limit is set once per kernel and device, and raised if need be
    if (allowed[index].load(std::memory_order_acquire) < shared) {
      const cudaError_t status =
          cudaFuncSetAttribute(Entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      if (const char* e = Check(status, "shared memory")) return e;
      allowed[index].store(shared, std::memory_order_release);
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlapped && device.major >= 9 ? 1 : 0;
  return Check(cudaLaunchKernelEx(&config, Entry<Kernel>, params), "kernel launch");
}

inline const char* Clear(CUstream_st* stream, void* p, int64_t bytes) {
  return Check(cudaMemsetAsync(p, 0, static_cast<size_t>(bytes), stream), "memset");
}

inline const char* Multiprocessors(int64_t* count) {
  Device device;
  int index = 0;
  if (const char* e = FindDevice(&device, &index)) return e;
  *count = device.multiprocessors;
  return nullptr;
}

// A pointer to `bytes` of device memory, for kernels.
template <typename T>
Ptr<T> Memory(const void* p, int64_t /*bytes*/) {
  return static_cast<T*>(const_cast<void*>(p));
}

}  // namespace jaxint8::cuda

#endif  // __CUDACC__
#endif  // JAXINT8_FFI_CUDA_HOST_H_
