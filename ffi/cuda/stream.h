// The product for few rows (m <= 16): streams the weights once, at the speed of memory.
//
// The weights take the place of A in the matrix instruction (16 outputs) and the activations that of B (8 rows),
// straight from device memory to registers: both operands permute k in the same way, which an exact sum does not
// notice, so every thread can load 16 contiguous bytes. The first weights are under way before the activations are
// quantised.
//
// kFused: every block quantises all of x itself, into shared memory: one launch for the layer. Otherwise the codes are
// read from device memory, where a kernel before has left them.
#ifndef JAXINT8_FFI_CUDA_STREAM_H_
#define JAXINT8_FFI_CUDA_STREAM_H_

#include "device.h"
#include "epilogue.h"
#include "quantize.h"
#include "rows.h"

namespace jaxint8::cuda {

struct StreamParams {
  QuantizeParams rows;  // x and the rule if fused; lo, hi, stride, pieces otherwise
  Ptr<const int8_t> w;  // [n][k]
  int64_t m, k, n;
  int split;  // warps that share the k of one group of 16 outputs: 1, 2, 4 or 8
  Epilogue epilogue;
};

inline constexpr int kStreamThreads = 256;
inline constexpr int kStreamWarps = kStreamThreads / 32;
inline constexpr int kStreamOutputs = 16;  // per group
// Sums of one warp in shared memory: [8 * tiles rows of x][kSumStride], padded against bank conflicts.
inline constexpr int kSumStride = 20;

// Shared memory of a fused block: scratch, row scales, marks, sums, codes.
struct StreamLayout {
  int64_t scales, marks, sums, lo, hi, bytes;
};

JAXINT8_HOST_DEVICE inline constexpr int64_t RoundUp(int64_t v, int64_t to) { return (v + to - 1) / to * to; }
// Eight rows that are read at once start in different banks: 64 modulo 128.
JAXINT8_HOST_DEVICE inline constexpr int64_t FusedStride(int64_t k) { return RoundUp(k, kPiece) + 64; }

template <int kTiles, bool kFused>
JAXINT8_HOST_DEVICE constexpr StreamLayout MakeStreamLayout(int64_t m, int64_t k, bool with_hi, bool marks) {
  StreamLayout s{};
  s.sums = 0;
  s.scales = 2 * kStreamWarps * 8 * kTiles * kSumStride * 4;
  s.marks = s.scales + 4 * 8 * kTiles + (kFused ? 4 * kScratchWords : 0);
  s.lo = (s.marks + (kFused && marks ? (k + 31) / 32 * 4 : 0) + 127) / 128 * 128;
  s.hi = s.lo + (kFused ? m * FusedStride(k) : 0);
  s.bytes = s.hi + (kFused && with_hi ? m * FusedStride(k) : 0);
  return s;
}

// kTiles: of 8 rows of x each. kAligned: k is a multiple of 16.
template <Type kType, bool kFused, int kTiles, bool kAligned>
class StreamKernel {
 public:
  using Params = StreamParams;
  static constexpr int kMaxThreads = kStreamThreads;
  static constexpr int kMinBlocks = 2;

  static JAXINT8_DEVICE void Run(const Params& p) { StreamKernel(p).Stream(); }

 private:
  JAXINT8_DEVICE explicit StreamKernel(const Params& p)
      : p_(p),
        layout_(MakeStreamLayout<kTiles, kFused>(p.m, p.k, HasHi(p), p.rows.options.column_scope)),
        lane_(ThreadIndex() % 32),
        warp_(ThreadIndex() / 32),
        g_(lane_ / 4),
        t_(lane_ % 4),
        groups_((p.n + kStreamOutputs - 1) / kStreamOutputs),
        chunks_(static_cast<int>((p.k + kPiece - 1) / kPiece)) {}

  static JAXINT8_DEVICE bool HasHi(const Params& p) {
    return kFused ? p.rows.options.rule != Rule::kNone : static_cast<bool>(p.rows.hi);
  }

  JAXINT8_DEVICE void Stream() {
    const int per_block = kStreamWarps / p_.split;          // groups that a block works on at once
    const int turns = (chunks_ + p_.split - 1) / p_.split;  // chunks of a warp in a group
    const int first = warp_ % p_.split;
    const int64_t step = BlockCount() * per_block;
    int64_t group = BlockIndex() * per_block + warp_ / p_.split;
    Word4 w[8];  // see LoadWeights
#pragma unroll
    for (int j = 0; j < 4; ++j) LoadWeights(group, first, j, w);
    Prepare();
    int buffer = 0;
    // All warps of a block make the same number of rounds: groups from groups_ on are read as zeros.
    for (int64_t base = BlockIndex() * per_block; base < groups_; base += step, group += step) {
      int32_t lo[kTiles][4] = {}, hi[kTiles][4] = {};
      for (int turn = 0; turn < turns; ++turn) {
        const int chunk = first + turn * p_.split;
        const bool has_hi = chunk < chunks_ && HasHi(p_) && PieceHasHi(chunk);
        const bool last = turn + 1 == turns;
        const int64_t next_group = last ? group + step : group;
        const int next_chunk = last ? first : chunk + p_.split;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (chunk < chunks_) {  // the same for all lanes
            Multiply(lo_, chunk, j, w, lo);
            if (has_hi) Multiply(hi_, chunk, j, w, hi);
          }
          LoadWeights(next_group, next_chunk, j, w);
        }
      }
      WriteSums(buffer, lo, hi);
      Barrier();
      FinishGroups(buffer, base, per_block);
      buffer ^= 1;
    }
  }

  // Quantises the rows, or waits until they are there.
  JAXINT8_DEVICE void Prepare() {
    if constexpr (!kFused) {
      WaitForPreviousKernel();
      AllowNextKernel();
      lo_ = p_.rows.lo;
      hi_ = p_.rows.hi;
      stride_ = static_cast<int>(p_.rows.stride);
    } else {
      const Ptr<uint8_t> shared = SharedMemory();
      const Ptr<uint32_t> scratch = Cast<uint32_t>(shared + layout_.scales + 4 * 8 * kTiles);
      const Ptr<uint32_t> marks = Cast<uint32_t>(shared + layout_.marks);
      const Ptr<int8_t> lo = Cast<int8_t>(shared + layout_.lo);
      const Ptr<int8_t> hi = Cast<int8_t>(shared + layout_.hi);
      lo_ = lo;
      hi_ = hi;
      stride_ = static_cast<int>(FusedStride(p_.k));
      pieces_ = scratch + RowScratch::kPieces;
      WaitForPreviousKernel();
      AllowNextKernel();
      const bool by_column = p_.rows.options.column_scope;
      for (int j = ThreadIndex(); j < kPieceWords; j += BlockThreads()) Store(scratch + RowScratch::kPieces + j, 0u);
      if (by_column) {
        for (int64_t j = ThreadIndex(); j < (p_.k + 31) / 32; j += BlockThreads()) Store(marks + j, 0u);
      }
      Team<> team(scratch);
      for (int pass = by_column ? 0 : 1; pass < 2; ++pass) {
        for (int64_t i = 0; i < p_.m; ++i) {
          Barrier();  // the scratch is free, and the marks are there
          const MemoryGroups<kType, true> groups(p_.rows.x + i * p_.k * RowReader<kType, true>::kBytes, p_.k);
          Row<MemoryGroups<kType, true>> row(groups, p_.rows.options, scratch, team);
          if (pass == 0) {
            row.Mark(marks);
            continue;
          }
          const RowOutput out{lo + i * stride_, HasHi(p_) ? hi + i * stride_ : Ptr<int8_t>{},
                              stride_,          marks,
                              Ptr<uint32_t>{},  scratch + RowScratch::kPieces};
          const float scale = row.Quantize(out);
          if (ThreadIndex() == 0) Store(Cast<float>(shared + layout_.scales) + i, scale);
        }
      }
      Barrier();
    }
  }

  // w[j] and w[4 + j] are 16 bytes of outputs g and g + 8 of the group, k = 256 * chunk + 64 * j + 16 * t.
  JAXINT8_DEVICE void LoadWeights(int64_t group, int chunk, int j, Word4 (&w)[8]) const {
    const int k = static_cast<int>(p_.k), at = chunk * static_cast<int>(kPiece) + 64 * j + 16 * t_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = group * kStreamOutputs + g_ + 8 * half;
      Word4 word{0, 0, 0, 0};
      if (row < p_.n && at < k) {
        const Ptr<const int8_t> from = p_.w + (row * p_.k + at);
        if constexpr (kAligned) {
          word = LoadStreaming(from);
        } else {
          word = LoadUnaligned(from, k - at, k % 4 == 0);
        }
      }
      w[4 * half + j] = word;
    }
  }

  JAXINT8_DEVICE bool PieceHasHi(int chunk) const {
    if constexpr (kFused) {
      return Load(pieces_ + chunk / 32) >> (chunk % 32) & 1;
    } else {
      return WarpOr(lane_ < p_.m ? Load(p_.rows.pieces + lane_ * p_.rows.piece_stride + chunk) : 0) != 0;
    }
  }

  JAXINT8_DEVICE void Multiply(Ptr<const int8_t> codes, int chunk, int j, const Word4 (&w)[8],
                               int32_t (&c)[kTiles][4]) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = 8 * tile + g_;
      const int at = row * stride_ + chunk * static_cast<int>(kPiece) + 64 * j + 16 * t_;  // 16 * 133376 fits
      Word4 x{0, 0, 0, 0};
      if (row < p_.m) x = LoadAs<Word4>(codes + at);
      Mma(c[tile], w[j].x, w[4 + j].x, w[j].y, w[4 + j].y, x.x, x.y);
      Mma(c[tile], w[j].z, w[4 + j].z, w[j].w, w[4 + j].w, x.z, x.w);
    }
  }

  JAXINT8_DEVICE Ptr<int32_t> Sums(int buffer, int warp) const {
    return Cast<int32_t>(SharedMemory() + layout_.sums) + (buffer * kStreamWarps + warp) * (8 * kTiles * kSumStride);
  }

  JAXINT8_DEVICE void WriteSums(int buffer, const int32_t (&lo)[kTiles][4], const int32_t (&hi)[kTiles][4]) const {
    const Ptr<int32_t> sums = Sums(buffer, warp_);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * tile + 2 * t_ + e % 2;
        Store(sums + row * kSumStride + g_ + 8 * (e / 2), Combine(lo[tile][e], hi[tile][e]));
      }
    }
  }

  // Adds the sums of the warps that share a group and stores the outputs, neighbours in n by neighbouring threads.
  JAXINT8_DEVICE void FinishGroups(int buffer, int64_t base, int per_block) const {
    const int width = per_block * kStreamOutputs;
    for (int e = ThreadIndex(); e < width * p_.m; e += BlockThreads()) {
      const int row = e / width, column = e % width;
      const int64_t n = base * kStreamOutputs + column;
      if (n >= p_.n) continue;
      const int warp = column / kStreamOutputs * p_.split;
      uint32_t sum = 0;
      for (int s = 0; s < p_.split; ++s) {
        sum += static_cast<uint32_t>(Load(Sums(buffer, warp + s) + row * kSumStride + column % kStreamOutputs));
      }
      float scale = 0, w_scale = 0, bias = kNoBias;
      if (p_.epilogue.type != Type::kS32) {
        if constexpr (kFused) {
          scale = Load(Cast<float>(SharedMemory() + layout_.scales) + row);
        } else {
          scale = Load(p_.epilogue.row_scale + row);
        }
        w_scale = Load(p_.epilogue.w_scale + n);
        if (p_.epilogue.bias) bias = Load(p_.epilogue.bias + n);
      }
      StoreOutput(p_.epilogue, row, n, Output(p_.epilogue, static_cast<int32_t>(sum), scale, w_scale, bias));
    }
  }

  const Params& p_;
  const StreamLayout layout_;
  const int lane_, warp_, g_, t_;
  const int64_t groups_;
  const int chunks_;
  Ptr<const int8_t> lo_, hi_;
  int stride_ = 0;
  Ptr<const uint32_t> pieces_;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_STREAM_H_
