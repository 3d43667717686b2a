// One call: the kernels that its plan names, with their parameters, queued.
#ifndef JAXINT8_FFI_CUDA_DISPATCH_H_
#define JAXINT8_FFI_CUDA_DISPATCH_H_

#include <cstdint>
#include <iterator>

#include "host.h"
#include "int8.h"
#include "plan.h"
#include "quantize.h"
#include "queue.h"
#include "stream.h"
#include "tiled.h"
#if !defined(__CUDACC__) || defined(JAXINT8_WGMMA)
#include "gemv.h"
#include "narrow.h"
#include "skinny.h"
#include "sparse.h"
#include "swapped.h"
#include "wgmma.h"
#define JAXINT8_HAS_WGMMA
#endif

namespace jaxint8::cuda {
namespace {

// Where the things of a call lie.
class Call {
 public:
  Call(const Problem& p, const Plan& plan, CUstream_st* stream, bool follows)
      : p_(p), plan_(plan), queue_(stream, follows) {}

  const char* Run() {
    JAXINT8_TRY(Multiprocessors(&multiprocessors_));
    JAXINT8_TRY(HasWgmma(&wgmma_));
    if ((p_.path == Path::kWgmma || p_.path == Path::kSparse || p_.path == Path::kNarrow) && !wgmma_)
      return "the wgmma kernels need compute capability 9.0";
    wgmma_ = wgmma_ && p_.path != Path::kTiled && p_.k > 0;
    // Where it pays, and the first kernel reads nothing before it waits: the stream does.
    const bool few = p_.m <= kSpreadMost * multiprocessors_ || (!plan_.has_rule && p_.k <= 2048);
    if (plan_.gemv || (wgmma_ && !plan_.stream && few)) queue_.StartEarly();
    if (plan_.clear && plan_.bits_bytes > 0) JAXINT8_TRY(queue_.Clear(p_.workspace + plan_.bits, plan_.bits_bytes));
    switch (p_.kind) {
      case Problem::Kind::kQuantize:
        return Quantize();
      case Problem::Kind::kProduct:
        return Product();
      case Problem::Kind::kLinear:
        return Linear();
      case Problem::Kind::kPrologue:
        return QueuePrologue(queue_, p_.type, Rows(), Memory<uint8_t>(p_.y, p_.m * p_.k * TypeBytes(p_.type)));
      case Problem::Kind::kLargest:
        break;  // queued by RunLargest
    }
    return "unknown kind";
  }

 private:
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

  const char* Quantize() {
    QuantizeParams q = Rows();
    q.lo = Memory<int8_t>(p_.lo, p_.m * p_.k);
    q.hi = Memory<int8_t>(p_.hi, p_.m * p_.k);
    q.stride = p_.k;
    q.code_rows = p_.m;
    q.row_scale = Memory<float>(p_.row_scale, 4 * p_.m);
    return QueueQuantizers(queue_, p_.type, q);
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

  const char* Align(Ptr<const int8_t> in, int64_t rows, int64_t offset) {
    const AlignParams a{in, rows, p_.k, plan_.stride, Scratch<int8_t>(offset, rows * plan_.stride)};
    const int64_t blocks = (rows * plan_.stride / 16 + AlignKernel::kMaxThreads - 1) / AlignKernel::kMaxThreads;
    const int64_t most = 8 * multiprocessors_;
    return queue_.Launch<AlignKernel>(blocks < most ? blocks : most, AlignKernel::kMaxThreads, AlignKernel::kShared, a);
  }

  const char* Product() {
    Ptr<const int8_t> a = Memory<const int8_t>(p_.x, p_.m * p_.k);
    int64_t stride = p_.k;
    if (plan_.align_a) {
      JAXINT8_TRY(Align(a, p_.m, plan_.lo));
      a = Scratch<const int8_t>(plan_.lo, p_.m * plan_.stride);
      stride = plan_.stride;
    }
    if (plan_.stream) {
      QuantizeParams q{};
      q.lo = Scratch<int8_t>(plan_.lo, p_.m * plan_.stride);
      q.stride = stride;
      return StreamWeights(q);
    }
    return Tiled(a, stride, Ptr<const int8_t>{});
  }

  const char* Linear() {
#ifdef JAXINT8_HAS_WGMMA
    if (plan_.gemv) return Gemv();
#endif
    QuantizeParams q = Rows();
    if (plan_.apart) {
      const Ptr<uint8_t> rows = Scratch<uint8_t>(plan_.rows, p_.m * p_.k * TypeBytes(p_.type));
      JAXINT8_TRY(QueuePrologue(queue_, p_.type, q, rows));
      q.x = rows;
      q.prologue.kind = Prologue::kNone;
    }
    if (plan_.fused) return StreamWeights(q);
    q.lo = Scratch<int8_t>(plan_.lo, plan_.code_rows * plan_.stride);
    q.row_scale = Scratch<float>(plan_.row_scale, 4 * p_.m);
    q.stride = plan_.stride;
    q.code_rows = plan_.code_rows;
    if (plan_.has_rule) {
      q.hi = Scratch<int8_t>(plan_.hi, plan_.code_rows * plan_.stride);
      if (plan_.sparse) {
        q.sparse = Sparse<uint8_t>();
      } else if (plan_.stream) {
        q.pieces = Scratch<uint8_t>(plan_.pieces, p_.m * plan_.piece_stride);
        q.piece_stride = plan_.piece_stride;
      } else if (plan_.gather && !plan_.by_column) {
        q.used = Scratch<uint32_t>(plan_.bits, plan_.bits_bytes);
      }
    }
    JAXINT8_TRY(QueueQuantizers(queue_, p_.type, q));
    if (plan_.stream) return StreamWeights(q);
    return Tiled(q.lo, plan_.stride, q.hi);
  }

  const char* StreamWeights(const QuantizeParams& q) {
    StreamParams s{};
    s.rows = q;
    s.w = Weights();
    s.m = p_.m;
    s.k = p_.k;
    s.n = p_.n;
    s.split = ChooseSplit(p_.k);
    s.epilogue = MakeEpilogue();
    if (plan_.fused) {
      static_assert(kFusedM <= 8, "one tile of rows");
      return WithType(p_.type, [&](auto type) { return StreamWith<decltype(type)::kType, true, 1, true>(s); });
    }
    if (p_.k % 16 == 0)
      return p_.m <= 8 ? StreamWith<Type::kF32, false, 1, true>(s) : StreamWith<Type::kF32, false, 2, true>(s);
    return p_.m <= 8 ? StreamWith<Type::kF32, false, 1, false>(s) : StreamWith<Type::kF32, false, 2, false>(s);
  }

  template <Type kType, bool kFused, int kTiles, bool kAligned>
  const char* StreamWith(const StreamParams& s) {
    using Kernel = StreamKernel<kType, kFused, kTiles, kAligned>;
    const bool with_hi = plan_.has_rule;
    const StreamLayout layout = MakeStreamLayout<kTiles, kFused>(s.m, s.k, with_hi, plan_.by_column);
    const int64_t outputs = kStreamOutputs * (kStreamWarps / s.split);
    const int64_t blocks = (s.n + outputs - 1) / outputs;
    const int64_t most = Kernel::kMinBlocks * multiprocessors_;
    return queue_.Launch<Kernel>(blocks < most ? blocks : most, kStreamThreads, layout.bytes, s);
  }

  const char* Tiled(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi) {
    TiledParams t{};
    t.m = p_.m;
    t.n = p_.n;
    t.epilogue = MakeEpilogue();
    Ptr<const int8_t> w = Weights();
    int64_t w_stride = p_.k;
    if (plan_.align_w) {
      JAXINT8_TRY(Align(w, p_.n, plan_.aligned_w));
      w = Scratch<const int8_t>(plan_.aligned_w, p_.n * plan_.stride);
      w_stride = plan_.stride;
    }
#ifdef JAXINT8_HAS_WGMMA
    if (plan_.skinny) return Skinny(lo, stride, hi, w);
    if (plan_.narrow) return Narrow(lo, stride, hi, w, w_stride);
    if (plan_.sparse) return SparseProduct(lo, stride, hi, w, w_stride);
    if (plan_.swapped) return Swapped(lo, stride, hi, w, w_stride);
#endif
    // Columns beyond k are zeros in padded codes and aligned copies, and are not read elsewhere.
    const int64_t k = RoundUp(p_.k, 16);
    t.lo = {lo, w, stride, w_stride, k};
    if (hi) {
      JAXINT8_TRY(GatherOutliers(hi, w, w_stride, &t));
      t.all = {hi, w, stride, w_stride, k};
    }
#ifdef JAXINT8_HAS_WGMMA
    if (wgmma_) return Wgmma(t);
#endif
    switch (ChooseTile(p_.m, p_.n, multiprocessors_)) {
      case 0:
        return TiledWith<TiledKernel<128, 128, 64, 64, 4>>(t, kTileShapes[0]);
      case 1:
        return TiledWith<TiledKernel<64, 64, 32, 32, 4>>(t, kTileShapes[1]);
      default:
        return TiledWith<TiledKernel<32, 64, 16, 32, 4>>(t, kTileShapes[2]);
    }
  }

  const char* GatherOutliers(Ptr<const int8_t> hi, Ptr<const int8_t> w, int64_t w_stride, TiledParams* t) {
    GatherParams g{};
    g.a = hi;
    g.b = w;
    g.rows_a = p_.m;
    g.rows_b = p_.n;
    g.stride_a = plan_.stride;
    g.stride_b = w_stride;
    g.used = Scratch<const uint32_t>(plan_.bits, plan_.bits_bytes);
    g.words = plan_.bits_bytes / 4;
    g.capacity = plan_.capacity;
    g.out_a = Scratch<int8_t>(plan_.gathered_a, p_.m * plan_.capacity);
    g.out_b = Scratch<int8_t>(plan_.gathered_w, p_.n * plan_.capacity);
    g.count = Scratch<uint32_t>(plan_.count, 4);
    const int64_t blocks = (p_.m + p_.n + GatherKernel::kMaxThreads / 32 - 1) / (GatherKernel::kMaxThreads / 32);
    const int64_t most = 8 * multiprocessors_;
    JAXINT8_TRY(queue_.Launch<GatherKernel>(blocks < most ? blocks : most, GatherKernel::kMaxThreads,
                                            GatherKernel::Shared(plan_.capacity), g));
    t->count = g.count;
    t->capacity = plan_.capacity;
    t->gathered = {g.out_a, g.out_b, plan_.capacity, plan_.capacity, 0};
    return nullptr;
  }

  template <typename Kernel>
  const char* TiledWith(const TiledParams& t, const TileShape& shape) {
    const int64_t blocks = ((t.m + shape.m - 1) / shape.m) * ((t.n + shape.n - 1) / shape.n);
    return queue_.Launch<Kernel>(blocks, Kernel::kMaxThreads, Kernel::kShared, t);
  }

#ifdef JAXINT8_HAS_WGMMA
  const char* Gemv() {
    return WithType(p_.type, [&](auto type) { return GemvRule<decltype(type)::kType>(); });
  }

  template <Type kType>
  const char* GemvRule() {
    switch (p_.options.rule) {
      case Rule::kNone:
        return p_.m == 1 ? GemvGated<kType, Rule::kNone, 1>() : GemvGated<kType, Rule::kNone, 2>();
      case Rule::kThreshold:
        return GemvGated<kType, Rule::kThreshold, 1>();
      case Rule::kRelative:
        return GemvGated<kType, Rule::kRelative, 1>();
      default:
        return GemvGated<kType, Rule::kTopK, 1>();
    }
  }

  template <Type kType, Rule kRule, int kRows>
  const char* GemvGated() {
    constexpr int kNumber = static_cast<int>(kRule);
    return p_.gated ? GemvWith<GemvKernel<kType, kNumber, kRows, true>>(kRows)
                    : GemvWith<GemvKernel<kType, kNumber, kRows, false>>(kRows);
  }

  template <typename Kernel>
  const char* GemvWith(int rows) {
    const int64_t n = Outputs(), blocks = n < multiprocessors_ ? n : multiprocessors_, warps = blocks * kGemvWarps;
    GemvParams g{};
    g.rows = Rows();
    g.w = Weights();
    g.k = static_cast<int>(p_.k);
    g.base = n / warps;
    g.more = n % warps;
    g.up = n;
    const int64_t row_bytes = p_.k * TypeBytes(p_.type);
    g.beside = GemvBeside(p_.prologue, rows, row_bytes, p_.k);
    const int64_t rows_of_warp = (g.base + (g.more > 0)) * (p_.gated ? 2 : 1);
    const GemvShape shape = ChooseGemv(rows, plan_.has_rule, p_.k, row_bytes, rows_of_warp, g.beside);
    g.piece = shape.piece;
    g.depth = shape.depth;
    g.epilogue = MakeEpilogue();
    return queue_.Launch<Kernel>(blocks, Kernel::kMaxThreads, shape.shared, g);
  }

  const char* Skinny(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w) {
    if (p_.m <= 8) return hi ? SkinnyWith<1, true>(lo, stride, hi, w) : SkinnyWith<1, false>(lo, stride, hi, w);
    return hi ? SkinnyWith<2, true>(lo, stride, hi, w) : SkinnyWith<2, false>(lo, stride, hi, w);
  }

  template <int kTiles, bool kHigh>
  const char* SkinnyWith(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w) {
    if (p_.gated) {
      if constexpr (kTiles == 1 || !kHigh) return SkinnyGated<kTiles, kHigh, true>(lo, stride, hi, w);
      return "gate: no kernel for 9 to 16 rows with high parts";  // RunBlock does not ask for it
    }
    return SkinnyGated<kTiles, kHigh, false>(lo, stride, hi, w);
  }

  template <int kTiles, bool kHigh, bool kGated>
  const char* SkinnyGated(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w) {
    using Kernel = SkinnyKernel<kTiles, kHigh, kGated>;
    constexpr int kUnit = kGated ? 2 : 1;
    const int64_t groups = (Outputs() + kStreamOutputs - 1) / kStreamOutputs;
    const int64_t blocks = groups < multiprocessors_ ? groups : multiprocessors_;
    const SkinnyShape shape = ChooseSkinny(kTiles, kHigh, Outputs(), kUnit, p_.k, blocks);
    SkinnyParams s{};
    s.m = p_.m;
    s.n = s.up = Outputs();
    s.k = p_.k;
    s.groups = shape.groups;
    s.depth = shape.depth;
    const int64_t early = kHigh && kTiles > 1 ? kSkinnyEarlyHigh : kSkinnyEarly;
    s.early = queue_.follows() ? EarlySteps(early, p_.k, shape.groups * kGroupBytes * kSkinnyWarps, shape.depth) : 0;
    s.epilogue = MakeEpilogue();
    JAXINT8_TRY(MakeTileMap(&s.w, w, p_.n, p_.k, p_.k, kStreamOutputs));
    s.lo = lo;
    s.hi = hi;
    s.stride = stride;
    return queue_.Launch<Kernel>(blocks, Kernel::kMaxThreads, shape.shared, s);
  }

  const char* Narrow(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w,
                     int64_t w_stride) {
    const int chosen = ChooseNarrow(p_.m, p_.n, static_cast<bool>(hi), multiprocessors_);
    NarrowParams s{};
    s.m = p_.m;
    s.n = p_.n;
    s.k = p_.k;
    s.epilogue = MakeEpilogue();
    JAXINT8_TRY(MakeTileMap(&s.w, w, p_.n, p_.k, w_stride, kNarrowTiles[chosen]));
    JAXINT8_TRY(MakeTileMap(&s.lo, lo, plan_.code_rows, p_.k, stride, 64));
    if (hi) JAXINT8_TRY(MakeTileMap(&s.hi, hi, plan_.code_rows, p_.k, stride, 64));
    return hi ? NarrowShaped<true, 0>(s, chosen) : NarrowShaped<false, 0>(s, chosen);
  }

  template <bool kHigh, int kShape>
  const char* NarrowShaped(NarrowParams& s, int chosen) {
    if constexpr (kShape + 1 < std::size(kNarrowTiles)) {
      if (chosen != kShape) return NarrowShaped<kHigh, kShape + 1>(s, chosen);
    }
    using Kernel = NarrowKernel<kNarrowTiles[kShape], kHigh>;
    constexpr int64_t kFit = (kSharedMost - Kernel::kFixedBytes) / (Kernel::kStageBytes + 16);
    s.stages = static_cast<int>(kFit < kNarrowStages ? kFit : kNarrowStages);
    // Without high parts two warpgroups take turns: a stage must always be the same one's.
    static_assert(kHigh || (kFit < kNarrowStages ? kFit : kNarrowStages) % 2 == 0, "an even ring");
    s.early = queue_.follows() && !plan_.align_w ? EarlySteps(kSwappedEarly, p_.k, Kernel::kBytesW, s.stages) : 0;
    const int64_t tiles = (p_.m + 63) / 64 * ((p_.n + kNarrowTiles[kShape] - 1) / kNarrowTiles[kShape]);
    return queue_.Launch<Kernel>(tiles < multiprocessors_ ? tiles : multiprocessors_, Kernel::kMaxThreads,
                                 Kernel::Shared(s.stages), s);
  }

  const char* Swapped(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w,
                      int64_t w_stride) {
    SwappedParams s{};
    s.m = p_.m;
    s.n = s.up = Outputs();
    s.k = p_.k;
    s.epilogue = MakeEpilogue();
    const int rows = SwappedRows(p_.m, plan_.has_rule);
    const SwappedShape shape = ChooseSwapped(p_.m, s.n, p_.k, rows, plan_.has_rule, p_.gated, multiprocessors_);
    s.cluster = shape.cluster;
    JAXINT8_TRY(MakeTileMap(&s.w, w, p_.n, p_.k, w_stride, p_.gated ? 64 : shape.rows));
    JAXINT8_TRY(MakeTileMap(&s.lo, lo, plan_.code_rows, p_.k, stride, rows));
    if (hi) JAXINT8_TRY(MakeTileMap(&s.hi, hi, plan_.code_rows, p_.k, stride, rows));
    if (rows == 128) return SwappedWith<SwappedKernel<64, 128, false, false>>(s);
    if (rows == 32) return hi ? SwappedShaped<32, true>(s, shape) : SwappedShaped<32, false>(s, shape);
    return hi ? SwappedShaped<64, true>(s, shape) : SwappedShaped<64, false>(s, shape);
  }

  template <int kTileN, bool kHigh>
  const char* SwappedShaped(SwappedParams& s, const SwappedShape& shape) {
    if (p_.gated) return SwappedWith<SwappedKernel<128, kTileN, kHigh, true>>(s);
    return shape.rows == 64 ? SwappedWith<SwappedKernel<64, kTileN, kHigh, false>>(s)
                            : SwappedWith<SwappedKernel<128, kTileN, kHigh, false>>(s);
  }

  template <typename Kernel>
  const char* SwappedWith(SwappedParams& s) {
    const int64_t tiles_m = (s.m + Kernel::kRows - 1) / Kernel::kRows,
                  tiles_n = (s.n + Kernel::kOutputs - 1) / Kernel::kOutputs;
    const int64_t blocks = tiles_m * tiles_n * s.cluster;
    s.stages = ChooseStages(blocks, multiprocessors_, Kernel::kMinBlocks, Kernel::kStageBytes);
    const bool longer = plan_.has_rule && p_.m <= kSwappedM && blocks <= multiprocessors_;
    const int64_t early = longer ? kSwappedEarlyHigh : kSwappedEarly;
    s.early = queue_.follows() && !plan_.align_w ? EarlySteps(early, p_.k, Kernel::kBytesW, s.stages) : 0;
    return queue_.Launch<Kernel>(blocks, Kernel::kMaxThreads, Kernel::Shared(s.stages, s.cluster), s, s.cluster);
  }

  const char* Wgmma(const TiledParams& t) {
    return WgmmaShaped<0>(t, ChooseWgmma(kWgmmaShapes, p_.m, p_.n, multiprocessors_));
  }

  template <int kShape>
  const char* WgmmaShaped(const TiledParams& t, int chosen) {
    constexpr const WgmmaShape& shape = kWgmmaShapes[kShape];
    if (chosen == kShape) return WgmmaWith<WgmmaKernel<shape.n, shape.cluster>>(t, shape);
    if constexpr (kShape + 1 < std::size(kWgmmaShapes)) return WgmmaShaped<kShape + 1>(t, chosen);
    return nullptr;
  }

  template <typename Kernel>
  const char* WgmmaWith(const TiledParams& t, const WgmmaShape& shape) {
    WgmmaParams w{};
    w.m = t.m;
    w.n = t.n;
    w.k = p_.k;
    w.count = t.count;
    w.capacity = t.capacity;
    w.epilogue = t.epilogue;
    const int box_n = static_cast<int>(shape.n / shape.cluster);
    const auto maps = [&](OperandMaps* to, const Operands& o, int64_t rows, int64_t k) {
      const char* error = MakeTileMap(&to->a, o.a, rows, k, o.stride_a, Kernel::kTileM);
      return error != nullptr ? error : MakeTileMap(&to->b, o.b, t.n, k, o.stride_b, box_n);
    };
    JAXINT8_TRY(maps(&w.lo, t.lo, plan_.code_rows, p_.k));
    if (t.count) {
      JAXINT8_TRY(maps(&w.gathered, t.gathered, p_.m, t.capacity));
      JAXINT8_TRY(maps(&w.all, t.all, plan_.code_rows, p_.k));
    }
    return LaunchTiles<Kernel>(shape, w);
  }

  // Blocks of the tiled kernels take turns if there are more tiles than multiprocessors.
  template <typename Kernel>
  const char* LaunchTiles(const WgmmaShape& shape, const typename Kernel::Params& params) {
    const int64_t tiles_m = (p_.m + Kernel::kTileM - 1) / Kernel::kTileM;
    const int64_t clusters = (tiles_m + shape.cluster - 1) / shape.cluster * ((p_.n + shape.n - 1) / shape.n);
    const int64_t most = multiprocessors_ / shape.cluster > 0 ? multiprocessors_ / shape.cluster : 1;
    return queue_.Launch<Kernel>(shape.cluster * (clusters < most ? clusters : most), Kernel::kMaxThreads,
                                 Kernel::kShared, params, static_cast<int>(shape.cluster));
  }

  const char* SparseProduct(Ptr<const int8_t> lo, int64_t stride, Ptr<const int8_t> hi, Ptr<const int8_t> w,
                            int64_t w_stride) {
    const int chosen = ChooseWgmma(kSparseShapes, p_.m, p_.n, multiprocessors_);
    SparseParams s{};
    s.sparse = Sparse<const uint8_t>();
    s.m = p_.m;
    s.n = p_.n;
    s.k = p_.k;
    s.epilogue = MakeEpilogue();
    JAXINT8_TRY(MakeTileMap(&s.lo, lo, plan_.code_rows, p_.k, stride, 128));
    JAXINT8_TRY(MakeTileMap(&s.hi, hi, plan_.code_rows, p_.k, stride, 128));
    JAXINT8_TRY(MakeTileMap(&s.w, w, p_.n, p_.k, w_stride, static_cast<int>(kSparseShapes[chosen].n)));
    return SparseShaped<0>(s, chosen);
  }

  template <int kShape>
  const char* SparseShaped(const SparseParams& s, int chosen) {
    constexpr const WgmmaShape& shape = kSparseShapes[kShape];
    if (chosen == kShape) return LaunchTiles<SparseKernel<shape.n>>(shape, s);
    if constexpr (kShape + 1 < std::size(kSparseShapes)) return SparseShaped<kShape + 1>(s, chosen);
    return nullptr;
  }
#endif

  const Problem& p_;
  const Plan& plan_;
  LaunchQueue queue_;
  int64_t multiprocessors_ = 1;
  bool wgmma_ = false;
};

}  // namespace
}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_DISPATCH_H_
