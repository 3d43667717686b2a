// Row functions of every rung: quantise one row of activations, finish one row of outputs.
//
// Plain loops that the compiler vectorises: each rung includes this file once, in its own translation unit with its own
// instruction set. Everything is in an unnamed namespace and nothing from the C++ library is used, because a template
// instantiated here would be shared by the linker with code that must run on older machines.
#ifndef JAXINT8_FFI_CPU_ROWS_H_
#define JAXINT8_FFI_CPU_ROWS_H_

#include <cstdint>
#include <cstring>

#include "int8.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jaxint8::cpu {
namespace {

constexpr float kCodeMax = 127;
constexpr int32_t kOutlierCodeMax = 127 * 128;
// 127 * sum(|codes of a row|) must stay below 2^31.
constexpr int64_t kSumOfCodesMax = ((int64_t{1} << 31) - 1) / 127;
// Below this a row counts as zero. It is twice the smallest normal number, so that no backend that flushes subnormals
// can see another row.
constexpr float kSmallestScale = 0x1p-125f;
constexpr float kRmsLevels = 4095;
constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint32_t kMagnitude = 0x7fffffff;
// Elements per step of the vectorised loops: four registers of sixteen. Also the grain at which a quotient that is too
// close to a tie is divided again.
constexpr int64_t kStep = 64;

inline uint32_t Bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float FromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t Magnitude(float x) { return Bits(x) & kMagnitude; }

// Round half to even for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
inline float Round(float x) { return (x + 12582912.0f) - 12582912.0f; }

// Exact. The exponent is moved by a multiplication, which also normalises subnormals.
inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  const uint32_t scaled = Bits(FromBits(rest) * 0x1p112f);
  const uint32_t bits = (h & 0x7c00) == 0x7c00 ? (rest | kInfinity) : scaled;
  return FromBits(sign | bits);
}

// Rounds half to even. Subnormal results: adding 0.5 puts the unit of 2^-24 at the last place of the sum.
inline uint16_t FloatToHalf(float x) {
  const uint32_t sign = (Bits(x) >> 16) & 0x8000;
  const uint32_t a = Magnitude(x);
  const uint32_t subnormal = Bits(FromBits(a) + 0.5f) - Bits(0.5f);
  const uint32_t normal = (a - (uint32_t{112} << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  uint32_t h = a < (uint32_t{113} << 23) ? subnormal : normal;
  h = a >= (uint32_t{143} << 23) ? 0x7c00 : h;  // 2^16 and above; rounding up to 2^16 carries to infinity by itself
  h = a > kInfinity ? 0x7e00 : h;
  return static_cast<uint16_t>(sign | h);
}

inline uint16_t FloatToBFloat(float x) {
  const uint32_t bits = Bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & kMagnitude) > kInfinity ? (bits >> 16) | 0x40 : rounded);
}

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

// The largest magnitude, as a bit pattern (they order as integers); above kInfinity if any value is NaN.
uint32_t AbsMax(const float* x, int64_t k) {
  int32_t largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    const int32_t a = static_cast<int32_t>(Magnitude(x[i]));
    largest = a > largest ? a : largest;
  }
  return static_cast<uint32_t>(largest);
}

// Bit j is set where |x[j]| >= threshold (bit patterns), j < 16.
inline uint32_t AtLeast16(const float* x, uint32_t threshold) {
#if defined(__AVX512F__)
  const __m512i a = _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi32(kMagnitude));
  return _mm512_cmpge_epi32_mask(a, _mm512_set1_epi32(static_cast<int32_t>(threshold)));
#elif defined(__AVX2__)
  const __m256i below = _mm256_set1_epi32(static_cast<int32_t>(threshold) - 1);
  const __m256i bits = _mm256_set1_epi32(kMagnitude);
  const auto* v = reinterpret_cast<const __m256i*>(x);
  const __m256i a = _mm256_cmpgt_epi32(_mm256_and_si256(_mm256_loadu_si256(v), bits), below);
  const __m256i b = _mm256_cmpgt_epi32(_mm256_and_si256(_mm256_loadu_si256(v + 1), bits), below);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(b))) << 8;
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

// How close to a tie a reciprocal product may come before a step is divided again. Let t = x / d exactly, |t| <= limit,
// q = fl(x * fl(1 / d)) and f = fl(t). Each rounding is at most 2^-24 relative, so |q - t| < 2^-23 (1 + 2^-24) |t| and
// |f - t| <= 2^-24 |t|. Ties are representable and rounding is monotone, so Round(q) != Round(f) needs a tie h between
// q and f, or equal to one of them: |q - h| <= |q - f| < 1.5 * 2^-23 * (1 + small) * limit < 2^-22 * limit.
constexpr float TieMargin(float limit) { return limit * 0x1p-22f; }

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
  float threshold = options.value;
  if (options.rule == Rule::kRelative) {
    const float unit = FromBits(absmax) / kRmsLevels;
    if (!(unit >= kSmallestScale)) return kMagnitude;
    const auto mean = static_cast<float>(SumOfSquares(x, k, unit) >> 12);  // in 4096 units^2; 64 = sqrt(4096)
    threshold *= unit * (64.0f * __builtin_sqrtf(mean / static_cast<float>(k)));
  }
  return threshold > 0 ? Bits(threshold) : 0;
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
  for (int64_t j = 0; j < count; ++j) __atomic_store_n(&marks[scratch.index[j]], uint8_t{1}, __ATOMIC_RELAXED);
}

// Finds the outliers of a finite row; returns how many stand in scratch.index.
int64_t FindOutliers(const Options& options, const float* x, int64_t k, uint32_t absmax, const int32_t* columns,
                     int64_t columns_count, const RowScratch& scratch) {
  if (options.rule == Rule::kNone || k == 0) return 0;
  if (options.rule == Rule::kTopK) return CollectLargest(x, k, options.topk, scratch);
  if (options.column_scope) {
    std::memcpy(scratch.index, columns, static_cast<size_t>(columns_count) * sizeof *columns);
    return columns_count;
  }
  const uint32_t threshold = RowThreshold(options, x, k, absmax);
  return absmax < threshold ? 0 : Collect(x, k, threshold, scratch.index);
}

// Codes of the outliers, 128 * hi + lo; lo goes to its place in the row. Returns their sum.
int32_t QuantizeOutliers(int64_t count, float scale, int32_t limit, const RowScratch& scratch, int8_t* lo) {
  int32_t sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    int32_t v = static_cast<int32_t>(Round(scratch.outliers[j] / scale));
    v = v > limit ? limit : v < -limit ? -limit : v;
    const int32_t hi = (v + 64) >> 7;
    scratch.codes[j] = v;
    lo[scratch.index[j]] = static_cast<int8_t>(v - hi * 128);
    sum += v;
  }
  return sum;
}

Row QuantizeRow(const Options& options, Type type, const void* data, int64_t k, const int32_t* columns,
                int64_t columns_count, const RowScratch& scratch, int8_t* lo) {
  Row row;
  const float* x = Widen(type, data, k, scratch.values);
  uint32_t absmax = AbsMax(x, k);
  if (absmax >= kInfinity) {
    std::memset(lo, 0, static_cast<size_t>(k));
    row.scale = __builtin_nanf("");
    return row;
  }
  const int64_t count = FindOutliers(options, x, k, absmax, columns, columns_count, scratch);
  float outlier_max = 0;
  if (count > 0) {
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
  float scale = FromBits(absmax) / kCodeMax;
  const bool split = count > 0 && !options.float_outliers;
  int32_t limit = kOutlierCodeMax;
  if (split) {
    const int64_t room = (kSumOfCodesMax - 127 * (k - count)) / count;
    limit = room < limit ? static_cast<int32_t>(room) : limit;
    const float least = outlier_max / static_cast<float>(limit);
    scale = least > scale ? least : scale;
  }
  row.count = static_cast<int32_t>(count);
  if (scale < kSmallestScale) {  // counts as zero
    std::memset(lo, 0, static_cast<size_t>(k));
    for (int64_t j = 0; j < count; ++j) scratch.codes[j] = 0;
    return row;
  }
  row.scale = scale;
  row.sum = QuantizeCodes(x, k, scale, lo);
  if (split) row.sum += QuantizeOutliers(count, scale, limit, scratch, lo);
  return row;
}

// The epilogue; the compiler makes one loop of each combination of the null pointers.
template <typename Store>
void FinishRow(const int32_t* c, int64_t n, float scale, const float* w_scale, const float* extra, const float* bias,
               Store store) {
  for (int64_t j = 0; j < n; ++j) {
    float y = (static_cast<float>(c[j]) * scale) * w_scale[j];
    if (extra) y += extra[j];
    if (bias) y += bias[j];
    store(j, y);
  }
}

void Finish(Type type, const int32_t* c, int64_t n, float scale, const float* w_scale, const float* extra,
            const float* bias, void* y) {
  if (type == Type::kBF16) {
    auto* out = static_cast<uint16_t*>(y);
    FinishRow(c, n, scale, w_scale, extra, bias, [=](int64_t j, float v) { out[j] = FloatToBFloat(v); });
  } else if (type == Type::kF16) {
    auto* out = static_cast<uint16_t*>(y);
    FinishRow(c, n, scale, w_scale, extra, bias, [=](int64_t j, float v) { out[j] = FloatToHalf(v); });
  } else {
    auto* out = static_cast<float*>(y);
    FinishRow(c, n, scale, w_scale, extra, bias, [=](int64_t j, float v) { out[j] = v; });
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ROWS_H_
