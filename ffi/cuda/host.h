// Launching kernels and asking the device, for CUDA; executor/device.h has the same names for the CPU.
#ifndef JAXINT8_FFI_CUDA_HOST_H_
#define JAXINT8_FFI_CUDA_HOST_H_

// Whether the kernels for sm_90a are there; the executor has all.
#if !defined(__CUDACC__) || defined(JAXINT8_WGMMA)
#define JAXINT8_HAS_WGMMA
#endif

#ifdef __CUDACC__

#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <mutex>

#include "device.h"
#include "hopper.h"

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

// Queues a kernel, in clusters of that many blocks. overlapped: it may start before its predecessor in the stream ends
// (see WaitForPreviousKernel).
template <typename Kernel>
const char* Launch(CUstream_st* stream, int64_t blocks, int threads, int64_t shared,
                   const typename Kernel::Params& params, bool overlapped, int cluster = 1) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "too many blocks for one launch";
  Device device;
  int index = 0;
  if (const char* e = FindDevice(&device, &index)) return e;
  if (shared > 48 * 1024) {
    static std::atomic<int64_t> allowed[64];  // the limit is set once per kernel and device, and raised if need be
    static std::mutex raising;                // or a thread that asks for less could lower it again
    if (allowed[index].load(std::memory_order_acquire) < shared) {
      const std::lock_guard<std::mutex> lock(raising);
      if (allowed[index].load(std::memory_order_relaxed) < shared) {
        const cudaError_t status =
            cudaFuncSetAttribute(Entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (const char* e = Check(status, "shared memory")) return e;
        allowed[index].store(shared, std::memory_order_release);
      }
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (overlapped && device.major >= 9) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  return Check(cudaLaunchKernelEx(&config, Entry<Kernel>, params), "kernel launch");
}

inline const char* Multiprocessors(int64_t* count) {
  Device device;
  int index = 0;
  if (const char* e = FindDevice(&device, &index)) return e;
  *count = device.multiprocessors;
  return nullptr;
}

// Whether the kernels of wgmma.h were compiled in and are for this device.
inline const char* HasWgmma(bool* has) {
  Device device;
  int index = 0;
  if (const char* e = FindDevice(&device, &index)) return e;
#ifdef JAXINT8_WGMMA
  *has = device.major == 9;
#else
  *has = false;
#endif
  return nullptr;
}

// Describes int8 [rows][k], rows `stride` bytes apart, to the tensor memory accelerator: boxes of [box_rows][128],
// swizzled, zeros beyond the matrix. The pointer and the stride are multiples of 16.
inline const char* MakeTileMap(TileMap* map, const int8_t* data, int64_t rows, int64_t k, int64_t stride,
                               int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static std::atomic<Encode> known;  // from the driver, so that it need not be linked
  Encode encode = known.load(std::memory_order_acquire);
  if (encode == nullptr) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (const char* e = Check(status, "cuTensorMapEncodeTiled")) return e;
    if (found == nullptr || result != cudaDriverEntryPointSuccess) return "the driver has no cuTensorMapEncodeTiled";
    encode = reinterpret_cast<Encode>(found);
    known.store(encode, std::memory_order_release);
  }
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult status = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(data), sizes, strides, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled: refused the shape";
}

// A pointer to `bytes` of device memory, for kernels.
template <typename T>
Ptr<T> Memory(const void* p, int64_t /*bytes*/) {
  return static_cast<T*>(const_cast<void*>(p));
}

}  // namespace jaxint8::cuda

#endif  // __CUDACC__
#endif  // JAXINT8_FFI_CUDA_HOST_H_
