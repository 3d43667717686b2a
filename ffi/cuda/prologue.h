// What stands before a layer, done to a row by the block that quantises it: RMSNorm, or the gate of an MLP.
//
// The result is rounded to the type of the row, so that what follows sees the row that an operation of its own would
// have left. The sum of squares is one of integers, and exp a polynomial: the bits are those of jaxint8/reference.py.
#ifndef JAXINT8_FFI_CUDA_PROLOGUE_H_
#define JAXINT8_FFI_CUDA_PROLOGUE_H_

#include "device.h"
#include "int8.h"
#include "reader.h"
#include "team.h"

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

// gate[j] = silu(gate[j]) * up[j]. Reciprocals of all but the largest numbers need no care for what is too small.
template <int kCount>
JAXINT8_DEVICE void SiluGate(float (&gate)[kCount], const float (&up)[kCount]) {
  float divisors[kCount], largest = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    divisors[j] = Add(1.0f, Exponential(Smaller(Larger(-gate[j], -87.0f), 88.0f)));
    largest = Larger(largest, divisors[j]);
  }
  if (__builtin_expect(largest < 0x1p126f, 1)) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) divisors[j] = PlainReciprocal(divisors[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) divisors[j] = Reciprocal(divisors[j]);
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) gate[j] = Multiply(Multiply(gate[j], divisors[j]), up[j]);
}

// A row in memory, which is written to another place or the same.
template <Type kType, bool kVector, int kTeams = 1>
struct MemoryRow {
  RowReader<kType, kVector> reader;
  Ptr<uint8_t> to;

  // Calls body(i, values) for each of this thread's groups of eight, which may change the values.
  template <bool kWrite, typename Body>
  JAXINT8_DEVICE void ForEach(Body body) const {
#pragma unroll 1
    for (int i = 8 * Team<kTeams>::Index(); i < reader.k; i += 8 * Team<kTeams>::Size()) {
      float v[8];
      reader.Read(i, v);
      body(i, v);
      if constexpr (kWrite) reader.Write(to, i, v);
    }
  }
};

// Does the prologue, which is not kNone, to a row; `up` is the row beside it that its gate is for. All threads of the
// team call it, and each touches its own elements only.
template <Type kType, bool kVector, int kTeams = 1>
JAXINT8_DEVICE void ApplyPrologue(const MemoryRow<kType, kVector, kTeams>& row, Ptr<const uint8_t> up,
                                  const PrologueParams& p, Team<kTeams>& team) {
  const int k = row.reader.k;
  if (p.kind == Prologue::kSiluGate) {
    const RowReader<kType, kVector> reader{up, k};
    row.template ForEach<true>([&](int i, float (&v)[8]) {
      float u[8];
      reader.Read(i, u);
      SiluGate(v, u);
    });
    return;
  }
  uint32_t absmax = 0;
  row.template ForEach<false>([&](int, const float (&v)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) absmax = Magnitude(v[j]) > absmax ? Magnitude(v[j]) : absmax;
  });
  absmax = team.Max(absmax);
  const bool finite = absmax < kInfinity, usable = finite && absmax >= Bits(kSmallestNorm);
  const uint32_t exponent = usable ? absmax >> 23 : 127;
  const float unit = FloatFromBits((exponent - kNormExponent) << 23);
  const float inverse = FloatFromBits((2 * 127 + kNormExponent - exponent) << 23);
  const IntegerDivisor columns(k);
  uint64_t sum = 0;
  if (usable) {
    row.template ForEach<false>([&](int, const float (&v)[8]) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto steps = static_cast<int32_t>(Bits(MultiplyAdd(v[j], inverse, kMagic)) - kMagicBits);
        sum += static_cast<uint64_t>(int64_t{steps} * steps);
      }
    });
  }
  sum = team.template Sum<64>(sum);
  const float mean = columns.Divide(WideToFloat(static_cast<int64_t>(sum)));
  const float root = SquareRoot(Add(Multiply(Multiply(mean, unit), unit), p.epsilon));
  const float scale = finite ? Reciprocal(root) : FloatFromBits(0x7fc00000);
  const RowReader<Type::kF32, kVector> weights{Cast<const uint8_t>(p.norm), k};
  row.template ForEach<true>([&](int i, float (&v)[8]) {
    float w[8];
    weights.Read(i, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = Multiply(Multiply(v[j], scale), w[j]);
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
  static constexpr int64_t kShared = 4 * kTeamWords;

  static JAXINT8_DEVICE void Run(const Params& p) {
    WaitForPreviousKernel();
    AllowNextKernel();
    const int64_t bytes = p.k * RowReader<kType, kVector>::kBytes, i = BlockIndex();
    const Ptr<const uint8_t> x = p.x + i * bytes * RowsOf(p.prologue.kind);
    Team<> team(Cast<uint32_t>(SharedMemory()));
    const MemoryRow<kType, kVector> row{{x, static_cast<int>(p.k)}, p.y + i * bytes};
    ApplyPrologue(row, x + bytes, p.prologue, team);
  }
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_PROLOGUE_H_
