// One call: the kernels that its plan names, with their parameters, queued. What is queued for each family of kernels
// is compiled by itself, which takes a while: wgmma.cu for wgmma.h, and so on; launch.cu has the rest.
#ifndef JAXINT8_FFI_CUDA_DISPATCH_H_
#define JAXINT8_FFI_CUDA_DISPATCH_H_

#include <cstdint>

#include "epilogue.h"
#include "host.h"
#include "int8.h"
#include "plan.h"
#include "quantize.h"
#include "queue.h"
#include "sparse_codes.h"
#include "tiled.h"

namespace jaxint8::cuda {

struct NarrowParams;
struct SparseParams;
struct SwappedParams;

class Call {
 public:
  Call(const Problem& p, const Plan& plan, CUstream_st* stream, bool follows)
      : p_(p), plan_(plan), queue_(stream, follows) {}

  const char* Run();

 private:
  // Where the things of a call lie.
  template <typename T>
  Ptr<T> Scratch(int64_t offset, int64_t bytes) const {
    return Memory<T>(p_.workspace + offset, bytes);
  }

  QuantizeParams Rows() const {
    QuantizeParams q{};
    q.x = Memory<const uint8_t>(p_.x, p_.m * p_.k * TypeBytes(p_.type) * RowsOf(p_.prologue));
    q.m = p_.m;
    q.k = p_.k;
    q.prologue.kind = p_.kind == Problem::Kind::kQuantize ? Prologue::kNone : p_.prologue;
    q.prologue.epsilon = p_.epsilon;
    if (q.prologue.kind == Prologue::kRmsNorm) q.prologue.norm = Memory<const float>(p_.norm, 4 * p_.k);
    q.options = p_.options;
    q.options.column_scope = plan_.by_column;
    q.whole = p_.kind == Problem::Kind::kLinear;
    const bool narrow = plan_.narrow && p_.m <= kSwappedM;  // these blocks do little
    if (wgmma_ && !plan_.stream && !narrow) q.spread = static_cast<int>(multiprocessors_);
    q.wide = plan_.wide;
    q.parts = plan_.marking.parts;
    q.mark_blocks = plan_.marking.blocks;
    if (q.parts > 0) q.marks = Scratch<uint32_t>(plan_.bits, plan_.bits_bytes);
    return q;
  }

  template <typename Byte>
  SparseCodes<Byte> Sparse() const {
    return {Scratch<Byte>(plan_.sparse_codes, plan_.sparse_codes_bytes),
            Scratch<Byte>(plan_.sparse_flags, plan_.sparse_flags_bytes), plan_.stride / 128};
  }

  Epilogue MakeEpilogue() const {
    Epilogue e{};
    e.type = p_.kind == Problem::Kind::kProduct ? Type::kS32 : p_.type;
    e.y = Memory<uint8_t>(p_.y, p_.m * Outputs() * TypeBytes(e.type));
    e.n = Outputs();
    if (p_.kind == Problem::Kind::kLinear) {
      e.w_scale = Memory<const float>(p_.w_scale, 4 * p_.n);
      if (p_.bias != nullptr) e.bias = Memory<const float>(p_.bias, 4 * p_.n);
      if (p_.residual != nullptr) e.residual = Memory<const uint8_t>(p_.residual, p_.m * p_.n * TypeBytes(e.type));
      if (!plan_.fused) e.row_scale = Scratch<const float>(plan_.row_scale, 4 * p_.m);
    }
    return e;
  }

  int64_t Outputs() const { return p_.gated ? p_.n / 2 : p_.n; }

  Ptr<const int8_t> Weights() const { return Memory<const int8_t>(p_.w, p_.n * p_.k); }

  // launch.cu
  const char* Quantize();
  const char* Product();
  const char* Linear();
  const char* Multiply(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi);
  const char* Align(Ptr<const int8_t> in, int64_t rows, int64_t offset);
  const char* GatherOutliers(Ptr<const int8_t> hi, Ptr<const int8_t> w, int64_t w_stride, TiledParams* t);

  // stream.cu
  const char* Stream(const QuantizeParams& q);
  template <Type kType, bool kFused, int kTiles, bool kAligned>
  const char* StreamWith(const StreamParams& s);

  // tiled.cu
  const char* Tiled(const TiledParams& t);
  template <typename Kernel>
  const char* TiledWith(const TiledParams& t, const TileShape& shape);

  // gemv.cu
  const char* Gemv();
  template <Type kType>
  const char* GemvRule();
  template <Type kType, Rule kRule, int kRows>
  const char* GemvGated();
  template <typename Kernel>
  const char* GemvWith(int rows);

  // paired.cu
  const char* Paired();
  template <Type kType, Rule kRule, int kFirst>
  const char* PairedShaped(const PairedShape& shape);
  template <Type kType, Rule kRule, int kTileN, int kHeld>
  const char* PairedWith(const PairedShape& shape);

  // skinny.cu
  const char* Skinny(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w);
  template <int kTiles, bool kHigh>
  const char* SkinnyWith(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w);
  template <int kTiles, bool kHigh, bool kGated>
  const char* SkinnyGated(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w);

  // narrow.cu
  const char* Narrow(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w, int64_t w_stride);
  template <bool kHigh, int kShape>
  const char* NarrowShaped(NarrowParams& s, int chosen);

  // swapped.cu
  const char* Swapped(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w,
                      int64_t w_stride);
  template <int kTileN, bool kHigh>
  const char* SwappedShaped(SwappedParams& s, const SwappedShape& shape);
  template <typename Kernel>
  const char* SwappedWith(SwappedParams& s);

  // wgmma.cu
  const char* Wgmma(const TiledParams& t);
  template <int kShape>
  const char* WgmmaShaped(const TiledParams& t, int chosen);
  template <typename Kernel>
  const char* WgmmaWith(const TiledParams& t, const WgmmaShape& shape);

  // sparse.cu
  const char* SparseProduct(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w,
                            int64_t w_stride);
  template <int kShape>
  const char* SparseShaped(const SparseParams& s, int chosen);

  // Blocks of the tiled kernels take turns if there are more tiles than multiprocessors.
  template <typename Kernel>
  const char* LaunchTiles(const WgmmaShape& shape, const typename Kernel::Params& params) {
    const int64_t tiles_m = (p_.m + Kernel::kTileM - 1) / Kernel::kTileM;
    const int64_t clusters = (tiles_m + shape.cluster - 1) / shape.cluster * ((p_.n + shape.n - 1) / shape.n);
    const int64_t most = multiprocessors_ / shape.cluster > 0 ? multiprocessors_ / shape.cluster : 1;
    return queue_.Launch<Kernel>(shape.cluster * (clusters < most ? clusters : most), Kernel::kMaxThreads,
                                 Kernel::kShared, params, static_cast<int>(shape.cluster));
  }

  const Problem& p_;
  const Plan& plan_;
  LaunchQueue queue_;
  int64_t multiprocessors_ = 1;
  bool wgmma_ = false;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_DISPATCH_H_
