// Row functions with AVX-512 (F, BW, DQ, VL, VNNI): about a third of the cycles of the loops in rows.h.
//
// A row is walked in steps of 64 values, padded with zeros. What a step must not do is scatter: outliers are listed
// from compare masks and put right after the fact, because a row has few of them.
#ifndef JAXINT8_FFI_CPU_ROWS_AVX512_H_
#define JAXINT8_FFI_CPU_ROWS_AVX512_H_

#include <immintrin.h>

#include "int8.h"
#include "row_math.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

inline __mmask64 FirstBytes(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : count <= 0 ? 0 : (__mmask64{1} << count) - 1;
}

inline __mmask16 FirstWords(int64_t count) { return static_cast<__mmask16>(FirstBytes(count)); }

inline int64_t Padded(int64_t k) { return (k + 63) / 64 * 64; }

// Of words, by fours of registers, as far as they go without crossing lanes: afterwards lane l of r[4 * g + q] has word
// 4 * l + q of each of the registers 4 * g to 4 * g + 3. t: for what lies between.
ALWAYS_INLINE inline void UnpackFours(__m512i (&r)[16], __m512i (&t)[16]) {
  Unroll<8>([&](auto i) ALWAYS_INLINE {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  });
  Unroll<4>([&](auto g) ALWAYS_INLINE {
    r[4 * g] = _mm512_unpacklo_epi64(t[4 * g], t[4 * g + 2]);
    r[4 * g + 1] = _mm512_unpackhi_epi64(t[4 * g], t[4 * g + 2]);
    r[4 * g + 2] = _mm512_unpacklo_epi64(t[4 * g + 1], t[4 * g + 3]);
    r[4 * g + 3] = _mm512_unpackhi_epi64(t[4 * g + 1], t[4 * g + 3]);
  });
}

template <Type kType>
inline __m512 LoadFloats(const void* x, int64_t i, __mmask16 mask) {
  if constexpr (kType == Type::kF32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i);
    if constexpr (kType == Type::kF16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

inline __m512i Magnitudes(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(kMagnitude)); }

inline uint32_t Largest(const __m512i (&v)[4]) {
  const __m512i all = _mm512_max_epi32(_mm512_max_epi32(v[0], v[1]), _mm512_max_epi32(v[2], v[3]));
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(all));
}

// A row as float32, padded with zeros, and the largest magnitudes of its 64 interleaved parts.
struct WideRow {
  const float* x;
  __m512i maxima[4];
};

template <Type kType, bool kCopy>
inline void WidenAs(const void* data, int64_t k, float* buffer, WideRow* row) {
  __m512i maxima[4];
  Unroll<4>([&](auto i) ALWAYS_INLINE { maxima[i] = _mm512_setzero_si512(); });
  const auto step = [&](int64_t t, int64_t left) ALWAYS_INLINE {
    Unroll<4>([&](auto i) ALWAYS_INLINE {
      const __mmask16 mask = FirstWords(left - i * 16);
      const __m512 x = LoadFloats<kType>(data, mask ? t + i * 16 : 0, mask);
      if constexpr (kCopy) _mm512_storeu_ps(buffer + t + i * 16, x);
      maxima[i] = _mm512_max_epi32(maxima[i], Magnitudes(x));
    });
  };
  int64_t t = 0;
  for (; t + 64 <= k; t += 64) step(t, 64);
  if (t < k) step(t, k - t);
  Unroll<4>([&](auto i) ALWAYS_INLINE { row->maxima[i] = maxima[i]; });
  row->x = kCopy ? buffer : static_cast<const float*>(data);
}

inline WideRow Widen(Type type, const void* data, int64_t k, float* buffer) {
  WideRow row;
  switch (type) {
    case Type::kBF16:
      WidenAs<Type::kBF16, true>(data, k, buffer, &row);
      break;
    case Type::kF16:
      WidenAs<Type::kF16, true>(data, k, buffer, &row);
      break;
    default:
      if (k % 64 == 0) {
        WidenAs<Type::kF32, false>(data, k, buffer, &row);
      } else {
        WidenAs<Type::kF32, true>(data, k, buffer, &row);
      }
  }
  return row;
}

// Round(x / divisor) of 64 values: reciprocal products, or quotients if one of them comes too close to a tie.
inline void DivideAndRound(const float* x, __m512 divisor, __m512 inverse, __m512 near, __m512i (&v)[4]) {
  constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  constexpr int kAbsMax = 0x0b;  // of vrangeps: the operand of larger magnitude, sign cleared
  __m512 rest[4];
  Unroll<4>([&](auto i) ALWAYS_INLINE {
    const __m512 q = _mm512_mul_ps(_mm512_loadu_ps(x + i * 16), inverse);
    v[i] = _mm512_cvtps_epi32(q);
    rest[i] = _mm512_reduce_ps(q, kRound);  // q - Round(q)
  });
  const __m512 most =
      _mm512_range_ps(_mm512_range_ps(rest[0], rest[1], kAbsMax), _mm512_range_ps(rest[2], rest[3], kAbsMax), kAbsMax);
  if (__builtin_expect(_mm512_cmp_ps_mask(most, near, _CMP_GE_OQ) != 0, 0)) {
    Unroll<4>([&](auto i)
                  ALWAYS_INLINE { v[i] = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + i * 16), divisor)); });
  }
}

// Sum over the row of u^2, u = round(|x| / unit): 4095 at most, because the row's largest magnitude is 4095 units but
// for three roundings. The signs of u do not matter.
inline int64_t SumOfSquares(const float* x, int64_t padded, float unit) {
  const __m512 divisor = _mm512_set1_ps(unit), inverse = _mm512_set1_ps(1.0f / unit);
  const __m512 near = _mm512_set1_ps(0.5f - TieMargin(4096));
  int64_t total = 0;
  for (int64_t t = 0; t < padded;) {
    // A step adds 2 * 4095^2 < 2^25 to a lane; 60 steps stay below 2^31.
    const int64_t stop = t + 60 * 64 < padded ? t + 60 * 64 : padded;
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (; t < stop; t += 64) {
      __m512i u[4];
      DivideAndRound(x + t, divisor, inverse, near, u);
      Unroll<2>([&](auto i) ALWAYS_INLINE {
        const __m512i pair = _mm512_packs_epi32(u[2 * i], u[2 * i + 1]);
        sum[i] = _mm512_dpwssd_epi32(sum[i], pair, pair);
      });
    }
    Unroll<2>([&](auto i) ALWAYS_INLINE {
      total += _mm512_reduce_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum[i])));
      total += _mm512_reduce_add_epi64(_mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum[i], 1)));
    });
  }
  return total;
}

// lo[i] = clip(Round(x[i] / scale)); returns the sum of the codes. Values out of range (outliers) give some code.
inline int32_t QuantizeCodes(const float* x, int64_t k, float scale, int8_t* lo) {
  const __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1.0f / scale);
  const __m512 near = _mm512_set1_ps(0.5f - TieMargin(128));
  const __m512i least = _mm512_set1_epi8(-127), ones = _mm512_set1_epi8(1);
  // The packs interleave 128-bit lanes: word 4 * l + i of the result stems from lane l of register i.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i sum = _mm512_setzero_si512();
  const auto step = [&](int64_t t) ALWAYS_INLINE {
    __m512i v[4];
    DivideAndRound(x + t, divisor, inverse, near, v);
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    const __m512i codes = _mm512_max_epi8(_mm512_permutexvar_epi32(order, bytes), least);
    sum = _mm512_dpbusd_epi32(sum, ones, codes);
    return codes;
  };
  int64_t t = 0;
  for (; t + 64 <= k; t += 64) _mm512_storeu_si512(lo + t, step(t));
  if (t < k) _mm512_mask_storeu_epi8(lo + t, FirstBytes(k - t), step(t));
  return _mm512_reduce_add_epi32(sum);
}

struct Outliers {
  int64_t count;
  uint32_t rest_max;  // the largest magnitude that is not among them
};

// Lists the columns whose magnitude reaches the threshold, ascending.
inline Outliers Collect(const float* x, int64_t k, uint32_t threshold, int32_t* index) {
  const __m512i limit = _mm512_set1_epi32(static_cast<int32_t>(threshold));
  __m512i rest[4];
  Unroll<4>([&](auto i) ALWAYS_INLINE { rest[i] = _mm512_setzero_si512(); });
  int64_t count = 0;
  for (int64_t t = 0; t < k; t += 64) {
    __m512i a[4];
    Unroll<4>([&](auto i) ALWAYS_INLINE { a[i] = Magnitudes(_mm512_loadu_ps(x + t + i * 16)); });
    const __m512i most = _mm512_max_epi32(_mm512_max_epi32(a[0], a[1]), _mm512_max_epi32(a[2], a[3]));
    if (_mm512_cmpge_epi32_mask(most, limit) == 0) {
      rest[0] = _mm512_max_epi32(rest[0], most);
      continue;
    }
    uint64_t bits = 0;
    Unroll<4>([&](auto i) ALWAYS_INLINE {
      const __mmask16 in = _mm512_cmplt_epi32_mask(a[i], limit);
      rest[i] = _mm512_mask_max_epi32(rest[i], in, rest[i], a[i]);
      bits |= static_cast<uint64_t>(static_cast<__mmask16>(~in)) << (i * 16);
    });
    if (k - t < 64) bits &= FirstBytes(k - t);
    for (; bits; bits &= bits - 1) index[count++] = static_cast<int32_t>(t + __builtin_ctzll(bits));
  }
  return {count, Largest(rest)};
}

// A magnitude that at least `count` of the given ones reach, and few more: the count-th largest of 16 maxima.
inline uint32_t LowerBound(const __m512i (&maxima)[4], int64_t count) {
  if (count > 16) {
    if (count > 64) return 0;
    alignas(64) uint32_t all[64];
    Unroll<4>([&](auto i) ALWAYS_INLINE { _mm512_store_si512(all + i * 16, maxima[i]); });
    return SelectLargest(all, 64, count);
  }
  const __m512i v = _mm512_max_epi32(_mm512_max_epi32(maxima[0], maxima[1]), _mm512_max_epi32(maxima[2], maxima[3]));
  const __m512i one = _mm512_set1_epi32(1);
  __m512i rank = _mm512_setzero_si512();  // how many of the others are larger
  Unroll<15>([&](auto r) ALWAYS_INLINE {
    const __m512i other = _mm512_alignr_epi32(v, v, r + 1);
    rank = _mm512_mask_add_epi32(rank, _mm512_cmpgt_epi32_mask(other, v), rank, one);
  });
  const __mmask16 top = _mm512_cmplt_epi32_mask(rank, _mm512_set1_epi32(static_cast<int32_t>(count)));
  return static_cast<uint32_t>(_mm512_mask_reduce_min_epi32(top, v));
}

// Bit j is set if candidate j is among the `count` largest magnitudes, ties to the lower j; at most 32 candidates.
inline uint32_t KeepLargest(const uint32_t* magnitude, int64_t candidates, int64_t count) {
  const auto low = static_cast<uint32_t>((uint64_t{1} << candidates) - 1);
  const __m512i one = _mm512_set1_epi32(1), limit = _mm512_set1_epi32(static_cast<int32_t>(count));
  uint32_t keep = 0;
  for (int32_t i = 0; i < candidates; i += 16) {
    const auto in = static_cast<__mmask16>(low >> i);
    const __m512i own = _mm512_maskz_loadu_epi32(in, magnitude + i);
    __m512i rank = _mm512_setzero_si512();  // how many are ahead
    for (int64_t j = 0; j < candidates; ++j) {
      const auto behind = static_cast<__mmask16>((~uint64_t{1} << j) >> i);  // of equals it is ahead of these
      __m512i other = _mm512_set1_epi32(static_cast<int32_t>(magnitude[j]));
      other = _mm512_mask_add_epi32(other, behind, other, one);
      rank = _mm512_mask_add_epi32(rank, _mm512_cmpgt_epi32_mask(other, own), rank, one);
    }
    keep |= static_cast<uint32_t>(_mm512_mask_cmplt_epi32_mask(in, rank, limit)) << i;
  }
  return keep;
}

// The columns of the count largest magnitudes, ties to the lower column, ascending.
inline Outliers CollectLargest(const WideRow& row, int64_t k, int64_t count, const RowScratch& scratch) {
  int32_t* index = scratch.index;
  if (count >= k) return Collect(row.x, k, 0, index);
  Outliers found = Collect(row.x, k, LowerBound(row.maxima, count), index);
  if (found.count == count) return found;
  uint32_t* magnitude = scratch.magnitude;
  for (int64_t j = 0; j < found.count; ++j) magnitude[j] = Magnitude(row.x[index[j]]);
  int64_t kept = 0;
  const auto place = [&](int64_t j, bool keep) {
    if (keep) {
      index[kept++] = index[j];
    } else if (magnitude[j] > found.rest_max) {
      found.rest_max = magnitude[j];
    }
  };
  if (found.count <= 32) {
    const uint32_t keep = KeepLargest(magnitude, found.count, count);
    for (int64_t j = 0; j < found.count; ++j) place(j, keep >> j & 1);
  } else {
    const uint32_t last = SelectLargest(magnitude, found.count, count);
    for (int64_t j = 0; j < found.count; ++j) magnitude[j] = Magnitude(row.x[index[j]]);
    int64_t ties = count;
    for (int64_t j = 0; j < found.count; ++j) ties -= magnitude[j] > last;
    for (int64_t j = 0; j < found.count; ++j) {
      place(j, magnitude[j] > last || (magnitude[j] == last && ties-- > 0));
    }
  }
  found.count = kept;
  return found;
}

inline uint32_t RestMax(const float* x, int64_t k, const uint64_t* outliers) {
  __m512i rest[4];
  Unroll<4>([&](auto i) ALWAYS_INLINE { rest[i] = _mm512_setzero_si512(); });
  for (int64_t t = 0; t < k; t += 64) {
    const uint64_t in = ~outliers[t / 64];
    Unroll<4>([&](auto i) ALWAYS_INLINE {
      const __m512i a = Magnitudes(_mm512_loadu_ps(x + t + i * 16));
      rest[i] = _mm512_mask_max_epi32(rest[i], static_cast<__mmask16>(in >> (i * 16)), rest[i], a);
    });
  }
  return Largest(rest);
}

// Magnitudes from this bit pattern on are outliers of the row; above every finite one when there are none.
inline uint32_t RowThreshold(const Options& options, const float* x, int64_t k, uint32_t absmax) {
  if (options.rule != Rule::kRelative) return ThresholdBits(options.value);
  const float unit = FromBits(absmax) / kRmsLevels;
  if (!(unit >= kSmallestScale)) return kMagnitude;
  return ThresholdBits(RelativeThreshold(options.value, unit, SumOfSquares(x, Padded(k), unit), k));
}

inline Outliers FindOutliers(const Options& options, const WideRow& row, int64_t k, uint32_t absmax,
                             const Columns& columns, const RowScratch& scratch) {
  if (options.rule == Rule::kNone || k == 0) return {0, absmax};
  if (options.rule == Rule::kTopK) return CollectLargest(row, k, options.topk, scratch);
  if (options.column_scope) {
    if (columns.count == 0) return {0, absmax};
    std::memcpy(scratch.index, columns.list, static_cast<size_t>(columns.count) * sizeof *columns.list);
    return {columns.count, RestMax(row.x, k, columns.mask)};
  }
  const uint32_t threshold = RowThreshold(options, row.x, k, absmax);
  return absmax < threshold ? Outliers{0, absmax} : Collect(row.x, k, threshold, scratch.index);
}

// Codes of the outliers; what stands in the row is replaced by the code, if it fits into a byte, else by its low part.
// Returns by how much the sum of codes grows.
inline int32_t QuantizeOutliers(int64_t count, const RowScale& s, const RowScratch& scratch, int8_t* lo) {
  const __m512i limit = _mm512_set1_epi32(s.limit), least = _mm512_set1_epi32(-s.limit);
  const __m512 divisor = _mm512_set1_ps(s.scale);
  int32_t sum = 0;
  for (int64_t j = 0; j < count; j += 16) {
    const __mmask16 mask = FirstWords(count - j);
    const __m512 q = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, scratch.outliers + j), divisor);
    const __m512i v = _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(q), limit), least);
    const __m512i hi = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(64)), 7);
    _mm512_mask_storeu_epi32(scratch.codes + j, mask, v);
    sum += _mm512_reduce_add_epi32(v);
    alignas(16) int8_t low[16];
    const __mmask16 large = _mm512_cmpgt_epi32_mask(_mm512_abs_epi32(v), _mm512_set1_epi32(127));
    const __m512i rest = _mm512_mask_sub_epi32(v, large, v, _mm512_slli_epi32(hi, 7));
    _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(rest));
    const int64_t n = count - j < 16 ? count - j : 16;
    for (int64_t i = 0; i < n; ++i) {
      int8_t* place = lo + scratch.index[j + i];
      sum -= *place;
      *place = low[i];
    }
  }
  return sum;
}

void MarkRow(const Options& options, Type type, const void* data, int64_t k, const RowScratch& scratch,
             uint8_t* marks) {
  const WideRow row = Widen(type, data, k, scratch.values);
  const uint32_t absmax = Largest(row.maxima);
  if (absmax >= kInfinity) return;
  const uint32_t threshold = RowThreshold(options, row.x, k, absmax);
  if (absmax < threshold) return;
  MarkColumns(scratch.index, Collect(row.x, k, threshold, scratch.index).count, marks);
}

Row QuantizeRow(const Options& options, Type type, const void* data, int64_t k, const Columns& columns,
                const RowScratch& scratch, int8_t* lo) {
  const WideRow wide = Widen(type, data, k, scratch.values);
  const uint32_t absmax = Largest(wide.maxima);
  if (absmax >= kInfinity) return NonFiniteRow(k, lo);
  const Outliers out = FindOutliers(options, wide, k, absmax, columns, scratch);
  float outlier_max = 0;
  for (int64_t j = 0; j < out.count; ++j) {
    const float value = wide.x[scratch.index[j]];
    scratch.outliers[j] = value;
    outlier_max = __builtin_fabsf(value) > outlier_max ? __builtin_fabsf(value) : outlier_max;
  }
  const RowScale s = ScaleOf(FromBits(out.rest_max), outlier_max, options.float_outliers ? 0 : out.count, k);
  if (s.zero) return ZeroRow(k, out.count, scratch, lo);
  Row row;
  row.scale = s.scale;
  row.count = static_cast<int32_t>(out.count);
  row.sum = QuantizeCodes(wide.x, k, s.scale, lo);
  if (!options.float_outliers) {
    row.sum += QuantizeOutliers(out.count, s, scratch, lo);
    return row;
  }
  for (int64_t j = 0; j < out.count; ++j) {
    row.sum -= lo[scratch.index[j]];
    lo[scratch.index[j]] = 0;
  }
  return row;
}

// To nearest even, in the upper half of each word; vcvtneps2bf16 would flush subnormals.
inline __m512i RoundToBF16(__m512 y, __mmask16 nan) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}

template <Type kType>
inline void StoreFloats(__m512 y, void* out, int64_t i, __mmask16 mask) {
  if constexpr (kType == Type::kF32) {
    _mm512_mask_storeu_ps(static_cast<float*>(out) + i, mask, y);
  } else {
    __m256i half;
    if constexpr (kType == Type::kF16) {
      half = _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m512i rounded = RoundToBF16(y, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q));
      half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + i, mask, half);
  }
}

// Two registers at once, half of the instructions.
inline void StorePairOfBF16(__m512 low, __m512 high, uint16_t* out) {
  const __m512i upper =
      _mm512_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019, 0x001f001d,
                        0x00230021, 0x00270025, 0x002b0029, 0x002f002d, 0x00330031, 0x00370035, 0x003b0039, 0x003f003d);
  __m512i a = RoundToBF16(low, 0), b = RoundToBF16(high, 0);
  if (__builtin_expect(_mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q) != 0, 0)) {
    a = RoundToBF16(low, _mm512_cmp_ps_mask(low, low, _CMP_UNORD_Q));
    b = RoundToBF16(high, _mm512_cmp_ps_mask(high, high, _CMP_UNORD_Q));
  }
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, upper, b));
}

// The value that StoreFloats would store.
template <Type kType>
inline __m512 RoundFloats(__m512 y) {
  if constexpr (kType == Type::kF32) return y;
  alignas(32) uint16_t half[16];
  StoreFloats<kType>(y, half, 0, 0xffff);
  return LoadFloats<kType>(half, 0, 0xffff);
}

// Registers of 16 outputs each keep their scales and biases over all rows. By itself: inlined, where a file calls it
// only once, it would share them with what is around it.
template <Type kType>
[[gnu::noinline]] inline void FinishAs(const Epilogue& e, int64_t begin, int64_t end) {
  __m512 w_scale[4], bias[4];
  __mmask16 mask[4];
  Unroll<4>([&](auto z) ALWAYS_INLINE {
    mask[z] = FirstWords(e.n - z * 16);
    w_scale[z] = _mm512_maskz_loadu_ps(mask[z], e.w_scale + (mask[z] ? z * 16 : 0));
    bias[z] = e.bias ? _mm512_maskz_loadu_ps(mask[z], e.bias + (mask[z] ? z * 16 : 0)) : _mm512_setzero_ps();
  });
  // In locals, because a store to y might change *e for all the compiler knows.
  const int64_t step = e.stride * SizeOf(kType);
  const int32_t* c = e.c + begin * kBlockN;
  const float* extra = e.extra;
  const Row* rows = e.rows;
  const bool add_bias = e.bias != nullptr;
  char* y = static_cast<char*>(e.y) + begin * step;
  const char* residual = e.residual ? static_cast<const char*>(e.residual) + begin * step : nullptr;
  for (int64_t i = begin; i < end; ++i, y += step, residual += residual ? step : 0, c += kBlockN) {
    const __m512 scale = _mm512_set1_ps(rows[i].scale);
    Unroll<4>([&](auto z) ALWAYS_INLINE {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(c + z * 16));
      __m512 v = _mm512_mul_ps(_mm512_mul_ps(sum, scale), w_scale[z]);
      if (extra) v = _mm512_add_ps(v, _mm512_loadu_ps(extra + i * kBlockN + z * 16));
      if (add_bias) v = _mm512_add_ps(v, bias[z]);
      if (residual)
        v = _mm512_add_ps(LoadFloats<kType>(residual, mask[z] ? z * 16 : 0, mask[z]), RoundFloats<kType>(v));
      StoreFloats<kType>(v, y, z * 16, mask[z]);
    });
  }
}

// Whether FinishSums does this one.
inline bool FinishesSums(const Epilogue& e) { return e.n == kBlockN && !e.extra && !e.residual; }

// The epilogue of rows first.. from registers; their sums need not be in c.
template <int M, Type kType>
ALWAYS_INLINE inline void FinishSumsAs(const Epilogue& e, int64_t first, const __m512i (&acc)[M][4]) {
  const int64_t step = e.stride * SizeOf(kType);
  const float *w_scale = e.w_scale, *bias = e.bias;
  const Row* rows = e.rows + first;
  char* y = static_cast<char*>(e.y) + first * step;
  Unroll<M>([&](auto i) ALWAYS_INLINE {
    const __m512 scale = _mm512_set1_ps(rows[i].scale);
    __m512 v[4];
    Unroll<4>([&](auto z) ALWAYS_INLINE {
      v[z] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[i][z]), scale), _mm512_loadu_ps(w_scale + z * 16));
      if (bias) v[z] = _mm512_add_ps(v[z], _mm512_loadu_ps(bias + z * 16));
      if constexpr (kType != Type::kBF16) StoreFloats<kType>(v[z], y, z * 16, 0xffff);
    });
    if constexpr (kType == Type::kBF16) {
      StorePairOfBF16(v[0], v[1], reinterpret_cast<uint16_t*>(y));
      StorePairOfBF16(v[2], v[3], reinterpret_cast<uint16_t*>(y) + 32);
    }
    y += step;
  });
}

template <int M>
ALWAYS_INLINE inline void FinishSums(const Epilogue& e, int64_t first, const __m512i (&acc)[M][4]) {
  switch (e.type) {
    case Type::kBF16:
      return FinishSumsAs<M, Type::kBF16>(e, first, acc);
    case Type::kF16:
      return FinishSumsAs<M, Type::kF16>(e, first, acc);
    default:
      return FinishSumsAs<M, Type::kF32>(e, first, acc);
  }
}

// Asks for the lines of y and of the residual that Finish will need: they come while the tile is multiplied.
inline void FetchOutputs(const Epilogue& e, int64_t begin, int64_t end) {
  const int64_t size = SizeOf(e.type);
  for (int64_t i = begin; i < end; ++i) {
    const char* y = static_cast<const char*>(e.y) + i * e.stride * size;
    for (int64_t j = 0; j < e.n * size; j += 64) __builtin_prefetch(y + j, 1);
    if (e.residual == nullptr || e.residual == e.y) continue;
    const char* residual = static_cast<const char*>(e.residual) + i * e.stride * size;
    for (int64_t j = 0; j < e.n * size; j += 64) __builtin_prefetch(residual + j);
  }
}

void Finish(const Epilogue& e, int64_t begin, int64_t end) {
  switch (e.type) {
    case Type::kBF16:
      return FinishAs<Type::kBF16>(e, begin, end);
    case Type::kF16:
      return FinishAs<Type::kF16>(e, begin, end);
    default:
      return FinishAs<Type::kF32>(e, begin, end);
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ROWS_AVX512_H_
