// What kernels may do, as a small set of functions with two implementations: CUDA here, and one block at a time on the
// CPU in executor/device.h. Kernels are written against these names only, so the same source runs in both.
//
// A kernel is a struct with Params, kMaxThreads, kMinBlocks and a static Run(const Params&). All memory goes through
// Load and Store on Ptr<T>, which is a bare pointer here and a bounds-checked one there. Warp functions must be reached
// by all 32 lanes, barriers by all threads of the block.
#ifndef JAXINT8_FFI_CUDA_DEVICE_H_
#define JAXINT8_FFI_CUDA_DEVICE_H_

#include <cstdint>

namespace jaxint8::cuda {

// Vectors for wide accesses; their alignment is that which the hardware demands.
struct alignas(8) Word2 {
  uint32_t x, y;
};
struct alignas(16) Word4 {
  uint32_t x, y, z, w;
};

}  // namespace jaxint8::cuda

#ifndef __CUDACC__
#include "executor/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define JAXINT8_DEVICE __device__ __forceinline__
#define JAXINT8_HOST_DEVICE __host__ __device__

namespace jaxint8::cuda {

template <typename T>
using Ptr = T*;

template <typename U, typename T>
JAXINT8_DEVICE U* Cast(T* p) {
  return reinterpret_cast<U*>(p);
}

JAXINT8_DEVICE int ThreadIndex() { return static_cast<int>(threadIdx.x); }
JAXINT8_DEVICE int BlockThreads() { return static_cast<int>(blockDim.x); }
JAXINT8_DEVICE int64_t BlockIndex() { return blockIdx.x; }
JAXINT8_DEVICE int64_t BlockCount() { return gridDim.x; }

JAXINT8_DEVICE uint8_t* SharedMemory() {
  extern __shared__ __align__(1024) uint8_t shared[];
  return shared;
}

JAXINT8_DEVICE void Barrier() { __syncthreads(); }
JAXINT8_DEVICE void WarpBarrier() { __syncwarp(); }
// Of so many threads, whole warps, of the block: those that name the same number, from 1 to 15.
JAXINT8_DEVICE void PartBarrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

template <typename T>
JAXINT8_DEVICE T Load(const T* p) {
  return *p;
}
// A wide access through a pointer to narrower elements.
template <typename V, typename T>
JAXINT8_DEVICE V LoadAs(const T* p) {
  return *reinterpret_cast<const V*>(p);
}
// Read-only data that is read once: do not keep it in the first-level cache.
JAXINT8_DEVICE Word4 LoadStreaming(const int8_t* p) {
  Word4 v;
  asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}
// The same pointer, as a value that is kept and not computed again.
template <typename T>
JAXINT8_DEVICE T* Keep(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}
template <typename T>
JAXINT8_DEVICE void Store(T* p, T value) {
  *p = value;
}
// Words of shared memory whose address is kept: the compiler makes it anew for each access otherwise, and waits for it.
struct SharedWords {
  uint32_t address;
};
JAXINT8_DEVICE SharedWords KeepShared(uint32_t* p) {
  SharedWords words{static_cast<uint32_t>(__cvta_generic_to_shared(p))};
  asm volatile("" : "+r"(words.address));
  return words;
}
JAXINT8_DEVICE SharedWords operator+(SharedWords words, int count) {
  return {words.address + static_cast<uint32_t>(4 * count)};
}
// Four of them from kAt on.
template <int kAt>
JAXINT8_DEVICE Word4 LoadShared(SharedWords words) {
  Word4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(words.address), "n"(4 * kAt)
               : "memory");
  return v;
}
template <int kAt>
JAXINT8_DEVICE void StoreShared(SharedWords words, const Word4& v) {
  asm volatile("st.shared.v4.u32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(words.address), "n"(4 * kAt), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
template <typename V, typename T>
JAXINT8_DEVICE void StoreAs(T* p, V value) {
  *reinterpret_cast<V*>(p) = value;
}
// A read that may race with AtomicOr and may be stale.
JAXINT8_DEVICE uint32_t LoadRelaxed(const uint32_t* p) { return *reinterpret_cast<const volatile uint32_t*>(p); }
JAXINT8_DEVICE void AtomicOr(uint32_t* p, uint32_t bits) { atomicOr(p, bits); }
JAXINT8_DEVICE uint32_t AtomicAdd(uint32_t* p, uint32_t value) { return atomicAdd(p, value); }

JAXINT8_DEVICE uint32_t WarpMax(uint32_t v) { return __reduce_max_sync(~0u, v); }
JAXINT8_DEVICE uint32_t WarpSum(uint32_t v) { return __reduce_add_sync(~0u, v); }
JAXINT8_DEVICE uint32_t WarpOr(uint32_t v) { return __reduce_or_sync(~0u, v); }
// Whether some lane of those that are here has it: a hint, as to others it may seem otherwise.
JAXINT8_DEVICE bool SomeLane(bool v) { return __any_sync(__activemask(), v); }
JAXINT8_DEVICE uint32_t ShuffleXor(uint32_t v, int lanes) { return __shfl_xor_sync(~0u, v, lanes); }
JAXINT8_DEVICE uint32_t Shuffle(uint32_t v, int lane) { return __shfl_sync(~0u, v, lane); }

// Copies 16 bytes to shared memory asynchronously, or zeros if not valid.
JAXINT8_DEVICE void CopyAsync16(uint8_t* shared, const int8_t* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
JAXINT8_DEVICE void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
JAXINT8_DEVICE void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 16-byte matrices; lane i gives the address of row i % 8 of matrix i / 8. Afterwards v[j] of lane i holds
// bytes 4 * (i % 4) .. + 3 of row i / 4 of matrix j.
JAXINT8_DEVICE void LoadMatrix4(const uint8_t* row, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c[16 x 8] += a[16 x 32] * b[8 x 32]^T, int8 with int32 sums that wrap. With g = lane / 4 and t = lane % 4: a[0] is
// row g, k 4t..4t+3; a[1] row g + 8; a[2] row g, k 16+4t..; a[3] row g + 8, k 16+4t..; b0 is row g, k 4t..; b1 k
// 16+4t..; c[0], c[1] are row g, columns 2t, 2t + 1; c[2], c[3] row g + 8.
JAXINT8_DEVICE void Mma(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Programmatic dependent launch: a kernel launched as `overlapped` may start before the one before it in the stream
// ends. It must wait here before it reads what that one writes. A kernel that allows the next one before it has waited
// itself leaves the next no memory to read before it waits; only behind one that has waited first is what older kernels
// wrote there (the weights that skinny.h, swapped.h, narrow.h and gather.h ask for early, always behind a quantiser).
JAXINT8_DEVICE void WaitForPreviousKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
JAXINT8_DEVICE void AllowNextKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

JAXINT8_DEVICE float FloatFromBits(uint32_t bits) { return __uint_as_float(bits); }
JAXINT8_DEVICE uint32_t Bits(float x) { return __float_as_uint(x); }
JAXINT8_DEVICE float HalfToFloat(uint16_t h) { return __half2float(__ushort_as_half(h)); }
JAXINT8_DEVICE uint16_t FloatToHalf(float x) { return __half_as_ushort(__float2half_rn(x)); }
JAXINT8_DEVICE uint16_t FloatToBFloat(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
// Two of them in a word, the first in the low half.
JAXINT8_DEVICE uint32_t FloatsToHalves(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return __half_as_ushort(h.x) | static_cast<uint32_t>(__half_as_ushort(h.y)) << 16;
}
JAXINT8_DEVICE uint32_t FloatsToBFloats(float a, float b) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
  return v;
}
// Correctly rounded whatever the compiler's flags.
JAXINT8_DEVICE float Divide(float x, float y) { return __fdiv_rn(x, y); }
JAXINT8_DEVICE float Reciprocal(float x) { return __frcp_rn(x); }
// The same of a number from 2^-125 to below 2^126: the quick half of the above, without its question for the range.
JAXINT8_DEVICE float PlainReciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return __fmaf_rn(__fmaf_rn(-x, r, 1.0f), r, r);
}
// Nearly: within some 2^-22 of it, 0 for what is smaller than any normal number.
JAXINT8_DEVICE float PowerOfTwo(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
JAXINT8_DEVICE float SquareRoot(float x) { return __fsqrt_rn(x); }
JAXINT8_DEVICE float Multiply(float x, float y) { return __fmul_rn(x, y); }
JAXINT8_DEVICE float Add(float x, float y) { return __fadd_rn(x, y); }
JAXINT8_DEVICE float MultiplyAdd(float x, float y, float z) { return __fmaf_rn(x, y, z); }  // rounded once
JAXINT8_DEVICE float Smaller(float x, float y) { return fminf(x, y); }                      // the other, if one is NaN
JAXINT8_DEVICE float Larger(float x, float y) { return fmaxf(x, y); }
JAXINT8_DEVICE float Absolute(float x) { return fabsf(x); }
// The larger of each half of two words, as unsigned integers.
JAXINT8_DEVICE uint32_t LargerHalves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
JAXINT8_DEVICE float IntToFloat(int32_t v) { return __int2float_rn(v); }
JAXINT8_DEVICE float WideToFloat(int64_t v) { return __ll2float_rn(v); }
JAXINT8_DEVICE int32_t RoundToInt(float x) { return __float2int_rn(x); }  // half to even
// The low bytes of four integers, the first lowest.
JAXINT8_DEVICE uint32_t PackBytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
// Bytes of two words, of which a is bytes 0 to 3, by four digits of the selector, the first byte by the last digit; 8
// more stand for 0xff or 0, by the sign of the byte.
template <uint32_t kSelector>
JAXINT8_DEVICE uint32_t Permute(uint32_t a, uint32_t b) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "n"(kSelector));
  return v;
}
// c + the products of four signed bytes each, which wraps.
JAXINT8_DEVICE int32_t DotBytes(uint32_t a, uint32_t b, int32_t c) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), c);
}
JAXINT8_DEVICE int PopulationCount(uint32_t v) { return __popc(v); }
JAXINT8_DEVICE int LowestBit(uint32_t v) { return __ffs(static_cast<int>(v)) - 1; }

// Asks for the parameters of a launch, which no cache has yet, in one go, and does not wait for them: otherwise the
// first look at each 64 bytes takes a hundred cycles or two, one after the other and behind the kernel before.
template <typename Params>
JAXINT8_DEVICE void AskForParameters(const Params& params) {
  constexpr unsigned kLines = (sizeof(Params) + 63) / 64;
  static_assert(kLines <= 32);
  if (threadIdx.x >= kLines) return;
  asm volatile("" ::"r"(reinterpret_cast<const uint32_t*>(&params)[16 * threadIdx.x]));
}

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kMaxThreads, Kernel::kMinBlocks)
    Entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::Run(params);
}

}  // namespace jaxint8::cuda

#endif  // __CUDACC__
#endif  // JAXINT8_FFI_CUDA_DEVICE_H_
