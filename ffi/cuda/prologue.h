// What stands before a layer, done to a row by the block that quantises it: RMSNorm, or the gate of an MLP.
//
// The result is rounded to the type of the row, so that what follows sees the row that an operation of its own would
// have left. The sum of squares is one of integers, and exp a polynomial: the bits are those of jaxint8/reference.py.
#ifndef JAXINT8_FFI_CUDA_PROLOGUE_H_
#define JAXINT8_FFI_CUDA_PROLOGUE_H_

#include "device.h"
#include "int8.h"
#include "reader.h"
#include "reduce.h"

namespace jaxint8::cuda {

// Values of a row are rounded to 2^-21 of the power of two at or below its absmax, and below 2^-40 they count as zero.
inline constexpr uint32_t kNormExponent = 21;
inline constexpr float kSmallestNorm = 0x1p-40f;

struct PrologueParams {
  Prologue kind;
  float epsilon;
  Ptr<const float> norm;  // [k]; of kRmsNorm
};

// Rows of x that make one row of the layer's.
JAXINT8_HOST_DEVICE constexpr int64_t RowsOf(Prologue prologue) { return prologue == Prologue::kSiluGate ? 2 : 1; }

// exp of a number from -87 to 88, each operation rounded on its own (Cephes, expf).
JAXINT8_DEVICE float Exponential(float x) {
  const float shifted = Add(Multiply(x, 1.44269504088896341f), kMagic), power = Add(shifted, -kMagic);
  const float near = MultiplyAdd(power, -0.693359375f, x);  // that product is exact
  const float r = Add(near, -Multiply(power, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = Add(Multiply(p, r), 1.3981999507e-3f);
  p = Add(Multiply(p, r), 8.3334519073e-3f);
  p = Add(Multiply(p, r), 4.1665795894e-2f);
  p = Add(Multiply(p, r), 1.6666665459e-1f);
  p = Add(Multiply(p, r), 5.0000001201e-1f);
  const float y = Add(Add(Multiply(p, Multiply(r, r)), r), 1.0f);
  return FloatFromBits(Bits(y) + ((Bits(shifted) - kMagicBits) << 23));
}

JAXINT8_DEVICE float SiluGate(float gate, float up) {
  const float bounded = Smaller(Larger(-gate, -87.0f), 88.0f);
  return Multiply(Multiply(gate, Reciprocal(Add(1.0f, Exponential(bounded)))), up);
}

// A row in memory, each thread's elements eight at a time, written to another place or the same.
template <Type kType, bool kVector>
struct MemoryRow {
  RowReader<kType, kVector> reader;
  Ptr<uint8_t> to;
  static constexpr int kAhead = 0;  // groups of eight weights in registers

  // Calls body(i, c, values) for each of this thread's groups, the c-th of them, which may change the values.
  template <bool kWrite, typename Body>
  JAXINT8_DEVICE void ForEach(Body body) {
#pragma unroll 1
    for (int i = 8 * ThreadIndex(); i < reader.k; i += 8 * BlockThreads()) {
      float v[8];
      reader.Read(i, v);
      body(i, 0, v);
      if constexpr (kWrite) reader.Write(to, i, v);
    }
  }
};

// A row in registers.
template <Type kType, int kHeld>
struct HeldRow {
  using Reader = RowReader<kType, true>;
  const Reader& reader;
  typename Reader::Raw (&held)[kHeld];
  static constexpr int kAhead = kHeld;

  template <bool kWrite, typename Body>
  JAXINT8_DEVICE void ForEach(Body body) {
#pragma unroll
    for (int c = 0; c < kHeld; ++c) {
      const int i = 8 * (ThreadIndex() + c * BlockThreads());
      if (i >= reader.k) continue;
      float v[8];
      Reader::Widen(held[c], v);
      body(i, c, v);
      if constexpr (kWrite) held[c] = Reader::Narrow(v);
    }
  }
};

template <bool kVector>
JAXINT8_DEVICE void LoadWeights(Ptr<const float> norm, int k, int i, float (&w)[8]) {
  if constexpr (kVector) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const Word4 word = LoadAs<Word4>(norm + (i + j));
      w[j] = FloatFromBits(word.x);
      w[j + 1] = FloatFromBits(word.y);
      w[j + 2] = FloatFromBits(word.z);
      w[j + 3] = FloatFromBits(word.w);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = i + j < k ? Load(norm + (i + j)) : 0;
  }
}

template <bool kVector, typename Row>
JAXINT8_DEVICE void Normalise(Row& row, const PrologueParams& p, BlockReducer& reduce) {
  const int k = row.reader.k;
  float ahead[Row::kAhead > 0 ? Row::kAhead : 1][8];  // on their way while the row is measured
  if constexpr (Row::kAhead > 0) {
    row.template ForEach<false>(
        [&](int i, int c, const float (&)[8]) { LoadWeights<kVector>(p.norm, k, i, ahead[c]); });
  }
  uint32_t absmax = 0;
  row.template ForEach<false>([&](int, int, const float (&v)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) absmax = Magnitude(v[j]) > absmax ? Magnitude(v[j]) : absmax;
  });
  absmax = reduce.Max(absmax);
  const bool finite = absmax < kInfinity, usable = finite && absmax >= Bits(kSmallestNorm);
  const uint32_t exponent = usable ? absmax >> 23 : 127;
  const float unit = FloatFromBits((exponent - kNormExponent) << 23);
  const float inverse = FloatFromBits((2 * 127 + kNormExponent - exponent) << 23);
  uint64_t sum = 0;
  if (usable) {
    row.template ForEach<false>([&](int, int, const float (&v)[8]) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto steps = static_cast<int32_t>(Bits(MultiplyAdd(v[j], inverse, kMagic)) - kMagicBits);
        sum += static_cast<uint64_t>(int64_t{steps} * steps);
      }
    });
  }
  sum = reduce.Sum(sum);
  const float mean = Divide(WideToFloat(static_cast<int64_t>(sum)), IntToFloat(k));
  const float root = SquareRoot(Add(Multiply(Multiply(mean, unit), unit), p.epsilon));
  const float scale = finite ? Reciprocal(root) : FloatFromBits(0x7fc00000);
  row.template ForEach<true>([&](int i, int c, float (&v)[8]) {
    float w[8];
    if constexpr (Row::kAhead > 0) {
#pragma unroll
      for (int j = 0; j < 8; ++j) w[j] = ahead[c][j];
    } else {
      LoadWeights<kVector>(p.norm, k, i, w);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = Multiply(Multiply(v[j], scale), w[j]);
  });
}

// Does the prologue, which is not kNone, to a row; `up` is the row beside it that its gate is for. All threads of the
// block call it, and each touches its own elements only.
template <Type kType, bool kVector, typename Row>
JAXINT8_DEVICE void ApplyPrologue(Row row, Ptr<const uint8_t> up, const PrologueParams& p, BlockReducer& reduce) {
  if (p.kind == Prologue::kRmsNorm) {
    Normalise<kVector>(row, p, reduce);
    return;
  }
  const RowReader<kType, kVector> reader{up, row.reader.k};
  row.template ForEach<true>([&](int i, int, float (&v)[8]) {
    float u[8];
    reader.Read(i, u);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = SiluGate(v[j], u[j]);
  });
}

struct PrologueKernelParams {
  Ptr<const uint8_t> x;  // [m][k], or [m][2 * k]
  Ptr<uint8_t> y;        // [m][k]
  int64_t k;
  PrologueParams prologue;
};

// The prologue alone, one block per row: where no kernel that quantises can do it, and for callers that want the rows.
template <Type kType, bool kVector>
struct PrologueKernel {
  using Params = PrologueKernelParams;
  static constexpr int kMaxThreads = 512;
  static constexpr int kMinBlocks = 2;
  static constexpr int64_t kShared = 4 * kReduceWords;

  static JAXINT8_DEVICE void Run(const Params& p) {
    WaitForPreviousKernel();
    AllowNextKernel();
    const int64_t bytes = p.k * RowReader<kType, kVector>::kBytes, i = BlockIndex();
    const Ptr<const uint8_t> x = p.x + i * bytes * RowsOf(p.prologue.kind);
    BlockReducer reduce(Cast<uint32_t>(SharedMemory()));
    const MemoryRow<kType, kVector> row{{x, static_cast<int>(p.k)}, p.y + i * bytes};
    ApplyPrologue<kType, kVector>(row, x + bytes, p.prologue, reduce);
  }
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_PROLOGUE_H_
