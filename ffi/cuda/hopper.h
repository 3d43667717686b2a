// What only sm_90a can do, by the PTX ISA: barriers in shared memory that count bytes, tiles copied by the tensor
// memory accelerator (to all blocks of a cluster at once), and products of a warpgroup (wgmma).
#ifndef JAXINT8_FFI_CUDA_HOPPER_H_
#define JAXINT8_FFI_CUDA_HOPPER_H_

#include <cstdint>

#include "device.h"

#ifndef __CUDACC__
#include "executor/hopper.h"
#else

#include <cuda.h>

namespace jaxint8::cuda {

using TileMap = CUtensorMap;

// An address in shared memory, of this block and, with the same value, of its own place in the cluster's window.
JAXINT8_DEVICE uint32_t SharedAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
JAXINT8_DEVICE uint32_t SharedAddress(SharedWords words) { return words.address; }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define JAXINT8_HOPPER

// --- Barriers. A phase ends when `count` arrivals have come and every expected byte has arrived.

JAXINT8_DEVICE void InitBarrier(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
JAXINT8_DEVICE void FenceBarrierInit() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
JAXINT8_DEVICE void ArriveExpecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
JAXINT8_DEVICE void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives at the barrier in the same place of another block of the cluster (or of this one). Orders nothing beyond the
// block, which would take a fence of the whole device: what it announces are finished reads of wgmma.
JAXINT8_DEVICE void ArriveAt(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}
// The same, and makes that barrier expect so many more bytes, which may have arrived already.
JAXINT8_DEVICE void ArriveAtExpecting(uint32_t barrier, uint32_t block, uint32_t bytes) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [remote], %2;\n}" ::"r"(barrier),
      "r"(block), "r"(bytes)
      : "memory");
}
// Waits until the phase of that parity has ended; that before the first counts as ended.
JAXINT8_DEVICE void WaitBarrier(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// Arrives once this thread's asynchronous copies of 16 bytes so far have landed.
JAXINT8_DEVICE void CopyAsyncArrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

JAXINT8_DEVICE uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
JAXINT8_DEVICE void ClusterBarrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// What this thread and those that it has met stored comes before what the cluster does behind its next barrier.
JAXINT8_DEVICE void FenceCluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }

// The same in two steps and for control only: what threads did in memory before need not be known to the others. That
// is what a ClusterBarrier waits for, a microsecond where memory is busy.
JAXINT8_DEVICE void ClusterArrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
JAXINT8_DEVICE void ClusterWait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// Stores a word in the same place of another block of the cluster.
JAXINT8_DEVICE void StoreRemote(uint32_t address, int block, uint32_t value) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.u32 [remote], %2;\n}" ::"r"(address),
      "r"(block), "r"(value)
      : "memory");
}

// --- Copies of tiles.

// What kernels before this one stored is to be read by the accelerator.
JAXINT8_DEVICE void FenceAccelerator() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// What this thread stored in shared memory is to be read by products.
JAXINT8_DEVICE void FenceShared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Has a map fetched, which no cache has yet: the first copy by it would wait for that.
JAXINT8_DEVICE void FetchMap(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Copies the map's box at (k, row) to shared memory; its bytes arrive at the barrier. Beyond the matrix it is zeros.
JAXINT8_DEVICE void CopyTile(const CUtensorMap* map, uint32_t to, uint32_t barrier, int32_t k, int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(k), "r"(row)
      : "memory");
}
// The same to the same place of every block in the mask, arriving at each one's own barrier.
JAXINT8_DEVICE void CopyTileToAll(const CUtensorMap* map, uint32_t to, uint32_t barrier, int32_t k, int32_t row,
                                  uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(k), "r"(row), "h"(mask)
      : "memory");
}

// Copies a multiple of 16 bytes to shared memory; they arrive at the barrier.
JAXINT8_DEVICE void CopyBytes(uint32_t to, const int8_t* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Copies a multiple of 16 bytes of shared memory, which have been fenced, to another block of the cluster; they arrive
// at that one's barrier.
JAXINT8_DEVICE void CopyToBlock(int block, uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "{\n.reg .b32 there, arrival;\nmapa.shared::cluster.u32 there, %0, %4;\nmapa.shared::cluster.u32 arrival, %3, "
      "%4;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%1], %2, [arrival];\n}" ::"r"(
          to),
      "r"(from), "r"(bytes), "r"(barrier), "r"(block)
      : "memory");
}

// Stores four words, or two, in another block of the cluster, or in this one; they arrive at that one's barrier.
JAXINT8_DEVICE void SendToBlock(int block, uint32_t to, const Word4& words, uint32_t barrier) {
  asm volatile(
      "{\n.reg .b32 there, arrival;\nmapa.shared::cluster.u32 there, %0, %6;\nmapa.shared::cluster.u32 arrival, %5, "
      "%6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%1, %2, %3, %4}, [arrival];\n}" ::
          "r"(to),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(barrier), "r"(block)
      : "memory");
}

JAXINT8_DEVICE void SendToBlock(int block, uint32_t to, const Word2& words, uint32_t barrier) {
  asm volatile(
      "{\n.reg .b32 there, arrival;\nmapa.shared::cluster.u32 there, %0, %4;\nmapa.shared::cluster.u32 arrival, %3, "
      "%4;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [there], {%1, %2}, [arrival];\n}" ::"r"(to),
      "r"(words.x), "r"(words.y), "r"(barrier), "r"(block)
      : "memory");
}

// --- Products of a warpgroup.

// Describes a tile of rows of 128 or 64 bytes, K-major and swizzled by as many bytes. The address is a multiple of
// eight rows, or within the first row of such a group by a multiple of 32.
template <int kRowBytes>
JAXINT8_DEVICE uint64_t TileDescriptor(uint32_t address) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kSwizzle = uint64_t{kRowBytes == 128 ? 1 : 2} << 62;
  constexpr uint64_t kStride = uint64_t{8 * kRowBytes >> 4} << 32;
  constexpr uint64_t kLeading = uint64_t{1} << 16;  // not used with a swizzle
  return kSwizzle | kStride | kLeading | ((address & 0x3ffff) >> 4);
}

JAXINT8_DEVICE void ProductFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
JAXINT8_DEVICE void ProductCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
JAXINT8_DEVICE void ProductWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of the sums across a wait or a fence.
template <int kSize>
JAXINT8_DEVICE void Pin(int32_t (&c)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(c[i])::"memory");
}

// Keeps words in their registers up to here, where products that read them have been waited for.
template <int kSize>
JAXINT8_DEVICE void Hold(const uint32_t (&v)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" ::"r"(v[i]) : "memory");
}

// The sums of a product as operands, and their names in its text.
#define JAXINT8_R8(i)                                                                                         \
  "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3]), "+r"(c[i + 4]), "+r"(c[i + 5]), "+r"(c[i + 6]), \
      "+r"(c[i + 7])
#define JAXINT8_R16(i) JAXINT8_R8(i), JAXINT8_R8(i + 8)
#define JAXINT8_R32(i) JAXINT8_R16(i), JAXINT8_R16(i + 16)
#define JAXINT8_N8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JAXINT8_N16 JAXINT8_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define JAXINT8_N24 JAXINT8_N16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define JAXINT8_N32 JAXINT8_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define JAXINT8_N48 JAXINT8_N32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define JAXINT8_N56 JAXINT8_N48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define JAXINT8_N64 JAXINT8_N56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define JAXINT8_N80 JAXINT8_N64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define JAXINT8_N96 JAXINT8_N80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define JAXINT8_N128                                                                                           \
  JAXINT8_N96                                                                                                  \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// c[64 x n] = (add ? c : 0) + a[64 x 32] * b[n x 32]^T, int8 with int32 sums that wrap. With g = lane / 4 and
// t = lane % 4, c[4 * j + e] of warp w of the warpgroup is row 16 * w + g + 8 * (e / 2), column 8 * j + 2 * t + e % 2.
#define JAXINT8_PRODUCT(sums, shape, names, a_b, add_at, ...)                                           \
  JAXINT8_DEVICE void Product(int32_t (&c)[sums], uint64_t a, uint64_t b, uint32_t add) {               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_at ", 0;\nwgmma.mma_async.sync.aligned." shape \
                 ".s32.s8.s8 {" names "}, " a_b ", p;\n}"                                               \
                 : __VA_ARGS__                                                                          \
                 : "l"(a), "l"(b), "r"(add));                                                           \
  }
JAXINT8_PRODUCT(8, "m64n16k32", JAXINT8_N8, "%8, %9", "%10", JAXINT8_R8(0))
JAXINT8_PRODUCT(16, "m64n32k32", JAXINT8_N16, "%16, %17", "%18", JAXINT8_R16(0))
JAXINT8_PRODUCT(24, "m64n48k32", JAXINT8_N24, "%24, %25", "%26", JAXINT8_R16(0), JAXINT8_R8(16))
JAXINT8_PRODUCT(32, "m64n64k32", JAXINT8_N32, "%32, %33", "%34", JAXINT8_R32(0))
JAXINT8_PRODUCT(48, "m64n96k32", JAXINT8_N48, "%48, %49", "%50", JAXINT8_R32(0), JAXINT8_R16(32))
JAXINT8_PRODUCT(56, "m64n112k32", JAXINT8_N56, "%56, %57", "%58", JAXINT8_R32(0), JAXINT8_R16(32), JAXINT8_R8(48))
JAXINT8_PRODUCT(64, "m64n128k32", JAXINT8_N64, "%64, %65", "%66", JAXINT8_R32(0), JAXINT8_R32(32))
JAXINT8_PRODUCT(80, "m64n160k32", JAXINT8_N80, "%80, %81", "%82", JAXINT8_R32(0), JAXINT8_R32(32), JAXINT8_R16(64))
JAXINT8_PRODUCT(96, "m64n192k32", JAXINT8_N96, "%96, %97", "%98", JAXINT8_R32(0), JAXINT8_R32(32), JAXINT8_R32(64))
JAXINT8_PRODUCT(128, "m64n256k32", JAXINT8_N128, "%128, %129", "%130", JAXINT8_R32(0), JAXINT8_R32(32), JAXINT8_R32(64),
                JAXINT8_R32(96))
#undef JAXINT8_PRODUCT

// c[64 x n] += a[64 x 64] * b[n x 64]^T, where of every four neighbours in a row of a two at most are not 0, and a is
// stored as those two: 32 bytes a row. Bits 4i to 4i + 3 of `places` say where in group i of eight the two belong, the
// first one's lowest; the first stands before the second. The word of a lane is that of row 16 * w + g + 8 * (t % 2)
// and columns from 32 * (t / 2) on. The word is read until the product has been waited for: see Hold.
#define JAXINT8_SPARSE(sums, shape, names, operands, ...)                                               \
  JAXINT8_DEVICE void SparseProduct(int32_t (&c)[sums], uint64_t a, uint64_t b, uint32_t& places) {     \
    asm volatile("wgmma.mma_async.sp.sync.aligned." shape ".s32.s8.s8 {" names "}, " operands ", 0, 1;" \
                 : __VA_ARGS__                                                                          \
                 : "l"(a), "l"(b), "r"(places));                                                        \
  }
JAXINT8_SPARSE(32, "m64n64k64", JAXINT8_N32, "%32, %33, %34", JAXINT8_R32(0))
JAXINT8_SPARSE(48, "m64n96k64", JAXINT8_N48, "%48, %49, %50", JAXINT8_R32(0), JAXINT8_R16(32))
JAXINT8_SPARSE(56, "m64n112k64", JAXINT8_N56, "%56, %57, %58", JAXINT8_R32(0), JAXINT8_R16(32), JAXINT8_R8(48))
JAXINT8_SPARSE(64, "m64n128k64", JAXINT8_N64, "%64, %65, %66", JAXINT8_R32(0), JAXINT8_R32(32))
JAXINT8_SPARSE(80, "m64n160k64", JAXINT8_N80, "%80, %81, %82", JAXINT8_R32(0), JAXINT8_R32(32), JAXINT8_R16(64))
JAXINT8_SPARSE(96, "m64n192k64", JAXINT8_N96, "%96, %97, %98", JAXINT8_R32(0), JAXINT8_R32(32), JAXINT8_R32(64))
#undef JAXINT8_SPARSE
#undef JAXINT8_N128
#undef JAXINT8_N96
#undef JAXINT8_N80
#undef JAXINT8_N64
#undef JAXINT8_N56
#undef JAXINT8_N48
#undef JAXINT8_N32
#undef JAXINT8_N24
#undef JAXINT8_N16
#undef JAXINT8_N8
#undef JAXINT8_R32
#undef JAXINT8_R16
#undef JAXINT8_R8

template <int kRegisters>
JAXINT8_DEVICE void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
JAXINT8_DEVICE void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace jaxint8::cuda

#endif  // __CUDACC__
#endif  // JAXINT8_FFI_CUDA_HOPPER_H_
