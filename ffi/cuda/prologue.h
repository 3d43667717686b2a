// What stands before a layer, done to a row by the block that quantises it: RMSNorm, or the gate of an MLP.
//
// The result is rounded to the type of the row, so that what follows sees the row that an operation of its own would
// have left. The sum of squares is one of integers, and exp a polynomial: the bits are those of jaxint8/reference.py.
#ifndef JAXINT8_FFI_CUDA_PROLOGUE_H_
#define JAXINT8_FFI_CUDA_PROLOGUE_H_

#include "device.h"
#include "groups.h"
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

// Does the prologue, which is not kNone, to a row; `up` is the row beside it that its gate is for. All threads of the
// team call it, and each touches its own elements only.
template <typename Groups, typename AnyTeam>
JAXINT8_DEVICE void ApplyPrologue(Groups& groups, Ptr<const uint8_t> up, const PrologueParams& p, AnyTeam& team) {
  using Group = typename Groups::Group;
  if (p.kind == Prologue::kSiluGate) {
    groups.Update(groups.template Beside<Groups::kType>(up),
                  [](float (&v)[8], const float (&u)[8]) { SiluGate(v, u); });
    return;
  }
  const auto weights = groups.template Beside<Type::kF32>(Cast<const uint8_t>(p.norm));
  groups.FindLargest();
  uint32_t absmax = 0;
  groups.ForEach([&](int, const Group& group) {
    const uint32_t largest = group.Largest();
    absmax = largest > absmax ? largest : absmax;
  });
  absmax = team.Max(absmax);
  const bool finite = absmax < kInfinity, usable = finite && absmax >= Bits(kSmallestNorm);
  const uint32_t exponent = usable ? absmax >> 23 : 127;
  const float unit = FloatFromBits((exponent - kNormExponent) << 23);
  const float inverse = FloatFromBits((2 * 127 + kNormExponent - exponent) << 23);
  const IntegerDivisor columns(groups.k());
  uint64_t sum = 0;
  if (usable) {
    groups.ForEach([&](int, const Group& group) {
      float v[8];
      group.Widen(v);
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
  groups.Update(weights, [&](float (&v)[8], const float (&w)[8]) {
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
    MemoryGroups<kType, kVector> row(x, static_cast<int>(p.k), p.y + i * bytes);
    ApplyPrologue(row, x + bytes, p.prologue, team);
  }
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_PROLOGUE_H_
