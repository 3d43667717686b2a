// The product for many rows, with mma.sync: every GPU from sm_80 on. Tiles travel to shared memory through cp.async in
// kStages stages, swizzled so that ldmatrix has no bank conflicts.
//
// The high parts of the outliers go first, over the few columns that have any (gathered before), the sums are shifted
// left by 7, and the low parts of all columns are added: exact for any number of outliers.
#ifndef JAXINT8_FFI_CUDA_TILED_H_
#define JAXINT8_FFI_CUDA_TILED_H_

#include "device.h"
#include "epilogue.h"
#include "quantize.h"

namespace jaxint8::cuda {

// a . b^T over k; rows are K-major with strides that are multiples of 16, and so is k.
struct Operands {
  Ptr<const int8_t> a;  // [m][stride_a]
  Ptr<const int8_t> b;  // [n][stride_b]
  int64_t stride_a, stride_b, k;
};

struct TiledParams {
  int64_t m, n;
  Operands lo;
  // The high parts: absent if count is null. Gathered columns if they fit, else all of them.
  Ptr<const uint32_t> count;
  int64_t capacity;
  Operands gathered, all;
  Epilogue epilogue;
};

template <int kTileM, int kTileN, int kWarpM, int kWarpN, int kStages>
class TiledKernel {
 public:
  using Params = TiledParams;
  static constexpr int kTileK = 64;
  static constexpr int kWarpsM = kTileM / kWarpM, kWarpsN = kTileN / kWarpN;
  static constexpr int kMaxThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kMinBlocks = 2;
  static constexpr int kBytesA = kTileM * kTileK, kBytesB = kTileN * kTileK;
  static constexpr int64_t kShared = int64_t{kStages} * (kBytesA + kBytesB);

  static JAXINT8_DEVICE void Run(const Params& p) {
    TiledKernel kernel(p);
    kernel.Tile();
  }

 private:
  static constexpr int kRows = kWarpM / 16, kColumns = kWarpN / 8;  // instruction tiles of a warp
  static constexpr int kSteps = kTileK / 32;

  // Tiles are numbered in bands of kBand tiles of m, so that blocks that run together share weights and activations.
  static constexpr int64_t kBand = 8;

  JAXINT8_DEVICE explicit TiledKernel(const Params& p) : p_(p), lane_(ThreadIndex() % 32), warp_(ThreadIndex() / 32) {
    const int64_t tiles_m = (p.m + kTileM - 1) / kTileM, tiles_n = (p.n + kTileN - 1) / kTileN;
    const int64_t band = BlockIndex() / (kBand * tiles_n);
    const int64_t height = tiles_m - band * kBand < kBand ? tiles_m - band * kBand : kBand;
    const int64_t in_band = BlockIndex() - band * kBand * tiles_n;
    m0_ = (band * kBand + in_band % height) * kTileM;
    n0_ = in_band / height * kTileN;
  }

  JAXINT8_DEVICE void Tile() {
    WaitForPreviousKernel();
    AllowNextKernel();
    Operands high{};
    int64_t count = 0;
    if (p_.count) {
      count = Load(p_.count);
      const bool fits = count <= p_.capacity;
      high.a = fits ? p_.gathered.a : p_.all.a;
      high.b = fits ? p_.gathered.b : p_.all.b;
      high.stride_a = fits ? p_.gathered.stride_a : p_.all.stride_a;
      high.stride_b = fits ? p_.gathered.stride_b : p_.all.stride_b;
      high.k = fits ? (count + kGatherStep - 1) / kGatherStep * kGatherStep : p_.all.k;
    }
#pragma unroll 1  // one copy of the code
    for (int part = count > 0 ? 0 : 1; part < 2; ++part) {
      const bool is_high = part == 0;
      Operands o;  // chosen member by member: a reference to one of two would put them into local memory
      o.a = is_high ? high.a : p_.lo.a;
      o.b = is_high ? high.b : p_.lo.b;
      o.stride_a = is_high ? high.stride_a : p_.lo.stride_a;
      o.stride_b = is_high ? high.stride_b : p_.lo.stride_b;
      o.k = is_high ? high.k : p_.lo.k;
      Accumulate(o);
      if (is_high) Shift();
    }
    Finish();
  }

  // From the sums of the high parts to those of 128 * hi.
  JAXINT8_DEVICE void Shift() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c_[i][j][e] = Combine(0, c_[i][j][e]);
      }
    }
  }

  JAXINT8_DEVICE void Accumulate(const Operands& o) {
    const int64_t steps = (o.k + kTileK - 1) / kTileK;
    for (int s = 0; s < kStages - 1; ++s) Fetch(o, s, steps);
    for (int64_t step = 0; step < steps; ++step) {
      CopyAsyncWait<kStages - 2>();
      Barrier();  // the copies of all threads have arrived, and all have finished with the stage that is fetched next
      Fetch(o, step + kStages - 1, steps);
      MultiplyStage(static_cast<int>(step % kStages));
    }
    CopyAsyncWait<0>();
    Barrier();
  }

  // Pieces of 16 bytes, four to a row of a stage; the place of a piece within its row depends on the row.
  static JAXINT8_DEVICE int Place(int row, int piece) { return row * kTileK + ((piece ^ (row >> 1 & 3)) << 4); }

  JAXINT8_DEVICE void Fetch(const Operands& o, int64_t step, int64_t steps) const {
    if (step < steps) {
      const Ptr<uint8_t> stage = SharedMemory() + step % kStages * (kBytesA + kBytesB);
      FetchRows<kTileM>(stage, o.a, o.stride_a, m0_, p_.m, step, o.k);
      FetchRows<kTileN>(stage + kBytesA, o.b, o.stride_b, n0_, p_.n, step, o.k);
    }
    CopyAsyncCommit();  // also when there is nothing, so that the groups can be counted
  }

  template <int kTile>
  static JAXINT8_DEVICE void FetchRows(Ptr<uint8_t> to, Ptr<const int8_t> from, int64_t stride, int64_t first,
                                       int64_t rows, int64_t step, int64_t k) {
    constexpr int kPieces = kTile * kTileK / 16;
#pragma unroll
    for (int i = 0; i < (kPieces + kMaxThreads - 1) / kMaxThreads; ++i) {
      const int at = i * kMaxThreads + ThreadIndex();
      if (kPieces % kMaxThreads != 0 && at >= kPieces) break;
      const int row = at / 4, piece = at % 4;
      const int64_t column = step * kTileK + 16 * piece;
      const bool valid = first + row < rows && column < k;
      CopyAsync16(to + Place(row, piece), valid ? from + (first + row) * stride + column : from, valid);
    }
  }

  JAXINT8_DEVICE void MultiplyStage(int stage) {
    const Ptr<uint8_t> a = SharedMemory() + stage * (kBytesA + kBytesB);
    const Ptr<uint8_t> b = a + kBytesA;
    const int q = lane_ / 8, r = lane_ % 8;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t fa[kRows][4], fb[kColumns / 2][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = warp_ / kWarpsN * kWarpM + 16 * i + 8 * (q & 1) + r;
        LoadMatrix4(a + Place(row, 2 * s + (q >> 1)), fa[i]);
      }
#pragma unroll
      for (int j = 0; j < kColumns / 2; ++j) {
        const int row = warp_ % kWarpsN * kWarpN + 16 * j + 8 * (q >> 1) + r;
        LoadMatrix4(b + Place(row, 2 * s + (q & 1)), fb[j]);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          Mma(c_[i][j], fa[i][0], fa[i][1], fa[i][2], fa[i][3], fb[j / 2][2 * (j % 2)], fb[j / 2][2 * (j % 2) + 1]);
        }
      }
    }
  }

  JAXINT8_DEVICE void Finish() {
    const Epilogue& e = p_.epilogue;
    const bool scaled = e.type != Type::kS32;
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t n = n0_ + warp_ % kWarpsN * kWarpN + 8 * j + 2 * t;
      float w_scale[2] = {}, bias[2] = {kNoBias, kNoBias};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (scaled && n + h < p_.n) {
          w_scale[h] = Load(e.w_scale + n + h);
          if (e.bias) bias[h] = Load(e.bias + n + h);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t m = m0_ + warp_ / kWarpsN * kWarpM + 16 * i + 8 * half + g;
          if (m >= p_.m || n >= p_.n) continue;
          const float row_scale = scaled ? Load(e.row_scale + m) : 0;
          const uint32_t y0 = Output(e, c_[i][j][2 * half], row_scale, w_scale[0], bias[0]);
          const uint32_t y1 = Output(e, c_[i][j][2 * half + 1], row_scale, w_scale[1], bias[1]);
          if (p_.n % 2 == 0) {
            StoreOutputs(e, m, n, y0, y1);
          } else {
            StoreOutput(e, m, n, y0);
            if (n + 1 < p_.n) StoreOutput(e, m, n + 1, y1);
          }
        }
      }
    }
  }

  const Params& p_;
  const int lane_, warp_;
  int64_t m0_, n0_;
  int32_t c_[kRows][kColumns][4] = {};
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_TILED_H_
