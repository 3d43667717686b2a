// Row functions of every rung: quantise one row of activations, finish one row of outputs.
//
// Plain loops that the compiler vectorises: a rung without row functions of its own includes this file once, in its
// translation unit with its instruction set (see row_math.h for the rules of such files).
#ifndef JAXINT8_FFI_CPU_ROWS_H_
#define JAXINT8_FFI_CPU_ROWS_H_

#include <cstdint>
#include <cstring>

#include "int8.h"
#include "prologue.h"
#include "row_math.h"
#include "unroll.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jaxint8::cpu {
namespace {

// Elements per step of the vectorised loops: four registers of sixteen. Also the grain at which a quotient that is too
// close to a tie is divided again.
constexpr int64_t kStep = 64;

// x as float32[k]: x itself, or widened into the buffer.
const float* Widen(Type type, const void* x, int64_t k, float* buffer) {
  const auto* h = static_cast<const uint16_t*>(x);
  if (type == Type::kBF16) {
    for (int64_t i = 0; i < k; ++i) buffer[i] = FromBits(static_cast<uint32_t>(h[i]) << 16);
    return buffer;
  }
  if (type == Type::kF16) {
    for (int64_t i = 0; i < k; ++i) buffer[i] = HalfToFloat(h[i]);
    return buffer;
  }
  return static_cast<const float*>(x);
}

// Bit j is set where |x[j]| >= threshold (bit patterns), j < 16.
inline uint32_t AtLeast16(const float* x, uint32_t threshold) {
#if defined(__AVX2__)
  const __m256i below = _mm256_set1_epi32(static_cast<int32_t>(threshold) - 1);
  const __m256i bits = _mm256_set1_epi32(kMagnitude);
  const auto* v = reinterpret_cast<const __m256i*>(x);
  const __m256i a = _mm256_cmpgt_epi32(_mm256_and_si256(_mm256_loadu_si256(v), bits), below);
  const __m256i b = _mm256_cmpgt_epi32(_mm256_and_si256(_mm256_loadu_si256(v + 1), bits), below);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(b))) << 8;
#elif defined(__aarch64__)
  const auto narrow = [&](int64_t j) {  // of eight values: all ones where it holds
    const uint32x4_t bits = vdupq_n_u32(kMagnitude), limit = vdupq_n_u32(threshold);
    const uint32x4_t low = vcgeq_u32(vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + j)), bits), limit);
    const uint32x4_t high = vcgeq_u32(vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + j + 4)), bits), limit);
    return vmovn_u16(vcombine_u16(vmovn_u32(low), vmovn_u32(high)));
  };
  const uint8x8_t place = vcreate_u8(0x8040201008040201);
  return static_cast<uint32_t>(vaddv_u8(vand_u8(narrow(0), place))) |
         static_cast<uint32_t>(vaddv_u8(vand_u8(narrow(8), place))) << 8;
#else
  uint32_t mask = 0;
  for (int j = 0; j < 16; ++j) mask |= static_cast<uint32_t>(Magnitude(x[j]) >= threshold) << j;
  return mask;
#endif
}

// Writes the columns with |x| >= threshold, ascending; returns how many.
int64_t Collect(const float* x, int64_t k, uint32_t threshold, int32_t* index) {
  int64_t count = 0;
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    for (uint32_t mask = AtLeast16(x + i, threshold); mask; mask &= mask - 1) {
      index[count++] = static_cast<int32_t>(i + __builtin_ctz(mask));
    }
  }
  for (; i < k; ++i) {
    if (Magnitude(x[i]) >= threshold) index[count++] = static_cast<int32_t>(i);
  }
  return count;
}

// lo[i] = clip(round(x[i] / scale), -127, 127) with a true division's result; returns the sum of the codes.
int32_t QuantizeCodes(const float* x, int64_t k, float scale, int8_t* lo) {
  const float inverse = 1.0f / scale;  // scale >= 2^-125 is normal and so is its inverse
  const float near = 0.5f - TieMargin(128);
  int32_t sum = 0;
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    int32_t redo = 0, part = 0;
    for (int64_t j = i; j < i + kStep; ++j) {
      const float q = x[j] * inverse;
      const float r = Round(q);
      redo |= __builtin_fabsf(q - r) >= near;
      const int32_t v = static_cast<int32_t>(r);
      lo[j] = static_cast<int8_t>(v > 127 ? 127 : v < -127 ? -127 : v);
      part += lo[j];
    }
    if (__builtin_expect(redo, 0)) {
      part = 0;
      for (int64_t j = i; j < i + kStep; ++j) {
        const int32_t v = static_cast<int32_t>(Round(x[j] / scale));
        lo[j] = static_cast<int8_t>(v > 127 ? 127 : v < -127 ? -127 : v);
        part += lo[j];
      }
    }
    sum += part;
  }
  for (; i < k; ++i) {
    const int32_t v = static_cast<int32_t>(Round(x[i] / scale));
    lo[i] = static_cast<int8_t>(v > 127 ? 127 : v < -127 ? -127 : v);
    sum += lo[i];
  }
  return sum;
}

// Sum over the row of u^2, u = min(4095, round(|x| / unit)): integers, so that no order of summation can differ.
int64_t SumOfSquares(const float* x, int64_t k, float unit) {
  const float inverse = 1.0f / unit;
  const float near = 0.5f - TieMargin(4096);
  int64_t sum = 0;
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    int32_t redo = 0, part = 0;  // 64 squares of 24 bits fit
    for (int64_t j = i; j < i + kStep; ++j) {
      const float q = __builtin_fabsf(x[j]) * inverse;
      const float r = Round(q);
      redo |= __builtin_fabsf(q - r) >= near;
      const int32_t u = static_cast<int32_t>(r < kRmsLevels ? r : kRmsLevels);
      part += u * u;
    }
    if (__builtin_expect(redo, 0)) {
      part = 0;
      for (int64_t j = i; j < i + kStep; ++j) {
        const float r = Round(__builtin_fabsf(x[j]) / unit);
        const int32_t u = static_cast<int32_t>(r < kRmsLevels ? r : kRmsLevels);
        part += u * u;
      }
    }
    sum += part;
  }
  for (; i < k; ++i) {
    const float r = Round(__builtin_fabsf(x[i]) / unit);
    const int32_t u = static_cast<int32_t>(r < kRmsLevels ? r : kRmsLevels);
    sum += u * u;
  }
  return sum;
}

// Magnitudes from this bit pattern on are outliers of the row; above kInfinity when there are none.
uint32_t RowThreshold(const Options& options, const float* x, int64_t k, uint32_t absmax) {
  if (options.rule != Rule::kRelative) return ThresholdBits(options.value);
  const float unit = FromBits(absmax) / kRmsLevels;
  if (!(unit >= kSmallestScale)) return kMagnitude;
  return ThresholdBits(RelativeThreshold(options.value, unit, SumOfSquares(x, k, unit), k));
}

// The columns of the count largest magnitudes, ties to the lower column, ascending.
int64_t CollectLargest(const float* x, int64_t k, int64_t count, const RowScratch& scratch) {
  if (count >= k) {
    for (int64_t i = 0; i < k; ++i) scratch.index[i] = static_cast<int32_t>(i);
    return k;
  }
  // The count-th largest of the maxima of 64 interleaved parts bounds the count-th largest of the row from below.
  uint32_t bound = 0;
  if (count <= kStep) {
    int32_t top[kStep] = {};
    int64_t i = 0;
    for (; i + kStep <= k; i += kStep) {
      for (int64_t j = 0; j < kStep; ++j) {
        const int32_t a = static_cast<int32_t>(Magnitude(x[i + j]));
        top[j] = a > top[j] ? a : top[j];
      }
    }
    for (int64_t j = 0; i < k; ++i, ++j) {
      const int32_t a = static_cast<int32_t>(Magnitude(x[i]));
      top[j] = a > top[j] ? a : top[j];
    }
    bound = SelectLargest(reinterpret_cast<uint32_t*>(top), kStep, count);
  }
  const int64_t candidates = Collect(x, k, bound, scratch.index);
  if (candidates == count) return count;
  for (int64_t j = 0; j < candidates; ++j) scratch.magnitude[j] = Magnitude(x[scratch.index[j]]);
  const uint32_t last = SelectLargest(scratch.magnitude, candidates, count);
  int64_t ties = count;
  for (int64_t j = 0; j < candidates; ++j) ties -= Magnitude(x[scratch.index[j]]) > last;
  int64_t kept = 0;
  for (int64_t j = 0; j < candidates; ++j) {
    const uint32_t a = Magnitude(x[scratch.index[j]]);
    if (a > last || (a == last && ties-- > 0)) scratch.index[kept++] = scratch.index[j];
  }
  return kept;
}

void MarkRow(const Options& options, Type type, const void* data, int64_t k, const RowScratch& scratch,
             uint8_t* marks) {
  const float* x = Widen(type, data, k, scratch.values);
  const uint32_t absmax = AbsMax(x, k);
  if (absmax >= kInfinity) return;
  const uint32_t threshold = RowThreshold(options, x, k, absmax);
  if (absmax < threshold) return;
  const int64_t count = Collect(x, k, threshold, scratch.index);
  MarkColumns(scratch.index, count, marks);
}

// Finds the outliers of a finite row; returns how many stand in scratch.index.
int64_t FindOutliers(const Options& options, const float* x, int64_t k, uint32_t absmax, const Columns& columns,
                     const RowScratch& scratch) {
  if (options.rule == Rule::kNone || k == 0) return 0;
  if (options.rule == Rule::kTopK) return CollectLargest(x, k, options.topk, scratch);
  if (options.column_scope) {
    std::memcpy(scratch.index, columns.list, static_cast<size_t>(columns.count) * sizeof *columns.list);
    return columns.count;
  }
  const uint32_t threshold = RowThreshold(options, x, k, absmax);
  return absmax < threshold ? 0 : Collect(x, k, threshold, scratch.index);
}

// Codes of the outliers; what stands in the row is replaced by the code, if it fits into a byte, else by its low part.
// Returns by how much the sum of codes grows.
inline int32_t QuantizeOutliers(int64_t count, const RowScale& s, const RowScratch& scratch, int8_t* lo) {
  int32_t sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    int32_t v = static_cast<int32_t>(Round(scratch.outliers[j] / s.scale));
    v = v > s.limit ? s.limit : v < -s.limit ? -s.limit : v;
    scratch.codes[j] = v;
    int8_t* place = lo + scratch.index[j];
    sum += v - *place;
    *place = static_cast<int8_t>(v >= -127 && v <= 127 ? v : v - ((v + 64) >> 7) * 128);
  }
  return sum;
}

Row QuantizeRow(const Options& options, Type type, const void* data, int64_t k, const Columns& columns,
                const RowScratch& scratch, int8_t* lo) {
  const float* x = Widen(type, data, k, scratch.values);
  uint32_t absmax = AbsMax(x, k);
  if (absmax >= kInfinity) return NonFiniteRow(k, lo);
  const int64_t count = FindOutliers(options, x, k, absmax, columns, scratch);
  float outlier_max = 0;
  if (count > 0) {  // the rest is the row with zeros in their place
    if (x != scratch.values) std::memcpy(scratch.values, x, static_cast<size_t>(k) * sizeof *x);
    for (int64_t j = 0; j < count; ++j) {
      float* value = scratch.values + scratch.index[j];
      scratch.outliers[j] = *value;
      const float a = __builtin_fabsf(*value);
      outlier_max = a > outlier_max ? a : outlier_max;
      *value = 0;
    }
    x = scratch.values;
    absmax = AbsMax(x, k);
  }
  const RowScale s = ScaleOf(FromBits(absmax), outlier_max, options.float_outliers ? 0 : count, k);
  if (s.zero) return ZeroRow(k, count, scratch, lo);
  Row row;
  row.scale = s.scale;
  row.count = static_cast<int32_t>(count);
  row.sum = QuantizeCodes(x, k, s.scale, lo);
  if (!options.float_outliers) row.sum += QuantizeOutliers(count, s, scratch, lo);
  return row;
}

// The epilogue; the compiler makes one loop of each combination of the null pointers.
template <class E>
void FinishAs(const Epilogue& e, int64_t begin, int64_t end) {
  const auto* residual = static_cast<const typename E::Element*>(e.residual);
  for (int64_t i = begin; i < end; ++i) {
    const int32_t* c = e.c + i * kBlockN;
    const float* extra = e.extra ? e.extra + i * kBlockN : nullptr;
    const float* w_scale = e.w_scale;
    const float* bias = e.bias;
    const float scale = e.rows[i].scale;
    auto* out = static_cast<typename E::Element*>(e.y) + i * e.stride;
    const int64_t n = e.n;
    const auto value = [=](int64_t j) ALWAYS_INLINE {
      float y = (static_cast<float>(c[j]) * scale) * w_scale[j];
      if (extra) y += extra[j];
      if (bias) y += bias[j];
      return y;
    };
    if (residual == nullptr) {
      for (int64_t j = 0; j < n; ++j) out[j] = E::Put(value(j));
    } else {
      const auto* before = residual + i * e.stride;
      for (int64_t j = 0; j < n; ++j) out[j] = E::Put(E::Get(before[j]) + E::Get(E::Put(value(j))));
    }
  }
}

void Finish(const Epilogue& e, int64_t begin, int64_t end) {
  switch (e.type) {
    case Type::kBF16:
      return FinishAs<BFloats>(e, begin, end);
    case Type::kF16:
      return FinishAs<Halves>(e, begin, end);
    default:
      return FinishAs<Floats>(e, begin, end);
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ROWS_H_
