// The functions of attend.h as plain loops that the compiler vectorises, included by each rung in its own translation
// unit (see row_math.h for the rules of such files).
#ifndef JAXINT8_FFI_CPU_ATTEND_ROWS_H_
#define JAXINT8_FFI_CPU_ATTEND_ROWS_H_

#include <cstdint>

#include "attend.h"
#include "prologue.h"
#include "row_math.h"

namespace jaxint8::cpu {
namespace {

// Largest products of an exponential and a value's scale below this count as zero: their inverse would be infinite.
constexpr float kSmallestWeight = 0x1p-100f;
constexpr int64_t kSumLanes = 16;  // slots are added up in so many sums, by turns

// An exponential for x <= 0; zero, as for NaN, where Exp has no result.
inline float ExpOrZero(float x) { return x >= kExpLeast ? Exp(x) : 0.0f; }

// The sum of the lanes, halves of them first.
inline float SumOf(float (&lane)[kSumLanes]) {
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// What a rung may do in a better way.
struct PlainRows {
  static void Spread(float* x, int64_t d) {
    for (int64_t span = 1; span < d; span *= 2) {
      for (int64_t i = 0; i < d; i += 2 * span) {
        for (int64_t j = i; j < i + span; ++j) {
          const float first = x[j], second = x[j + span];
          x[j] = first + second;
          x[j + span] = first - second;
        }
      }
    }
  }

  // Codes up to a limit; returns the scale.
  static float Encode(const float* x, int64_t d, float limit, int32_t* codes) {
    const uint32_t largest = AbsMax(x, d);
    const float scale = FromBits(largest) / limit;
    const bool finite = largest < kInfinity;
    if (!finite || scale < kSmallestScale) {
      for (int64_t i = 0; i < d; ++i) codes[i] = 0;
      return finite ? 1.0f : __builtin_nanf("");
    }
    for (int64_t i = 0; i < d; ++i) {
      float v = Round(x[i] / scale);
      v = v > limit ? limit : v;
      codes[i] = static_cast<int32_t>(v < -limit ? -limit : v);
    }
    return scale;
  }
};

template <class E>
void Widened(const void* data, int64_t d, float* x) {
  const auto* from = static_cast<const typename E::Element*>(data);
  for (int64_t i = 0; i < d; ++i) x[i] = E::Get(from[i]);
}

// A head of a query or key: turned by its angles and rounded to its type, then spread.
template <class E, class Rows>
void Spreaded(const AttendToken& t, const void* data, float* x) {
  const auto* from = static_cast<const typename E::Element*>(data);
  const int64_t half = t.d / 2;
  if (t.cosine == nullptr) {
    Widened<E>(data, t.d, x);
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const float first = E::Get(from[i]), second = E::Get(from[i + half]);
      x[i] = E::Get(E::Put(first * t.cosine[i] - second * t.sine[i]));
      x[i + half] = E::Get(E::Put(second * t.cosine[i] + first * t.sine[i]));
    }
  }
  Rows::Spread(x, t.d);
}

template <class E, class Rows>
void EnterTokenAs(const AttendToken& t) {
  alignas(64) float x[kMostHeadDim];
  alignas(64) int32_t codes[kMostHeadDim];
  // Spread vectors are d times as long in products; a score is one of them by the square root of d.
  const float unit = t.d == 64 ? 0.125f / 64.0f : 0x1.6a09e667f3bcdp-4f / 128.0f;
  for (int64_t h = 0; h < t.heads; ++h) {
    Spreaded<E, Rows>(t, static_cast<const typename E::Element*>(t.queries) + h * t.d, x);
    Query& query = t.to[h];
    query.factor = Rows::Encode(x, t.d, kOutlierCodeMax, codes) * unit;
    query.sum = 0;
    for (int64_t i = 0; i < t.d; ++i) {
      const int32_t hi = (codes[i] + 64) >> 7;
      query.hi[i] = static_cast<int8_t>(hi);
      query.lo[i] = static_cast<int8_t>(codes[i] - 128 * hi);
      query.code[i] = static_cast<int16_t>(codes[i]);
      query.sum += codes[i];
    }
  }
  Spreaded<E, Rows>(t, t.key, x);
  *t.key_scale = Rows::Encode(x, t.d, kCodeMax, codes);
  for (int64_t i = 0; i < t.d; ++i) t.key_codes[i] = static_cast<int8_t>(codes[i]);
  Widened<E>(t.value, t.d, x);
  *t.value_scale = Rows::Encode(x, t.d, kCodeMax, codes);
  for (int64_t i = 0; i < t.d; ++i) t.value_codes[i * t.stride] = static_cast<int8_t>(codes[i]);
}

template <class Rows>
void EnterToken(const AttendToken& t) {
  switch (t.type) {
    case Type::kBF16:
      return EnterTokenAs<BFloats, Rows>(t);
    case Type::kF16:
      return EnterTokenAs<Halves, Rows>(t);
    default:
      return EnterTokenAs<Floats, Rows>(t);
  }
}

// The share of a chunk that holds something that is not finite.
inline void Lose(int64_t d, ValueShare* share) {
  share->most = -__builtin_inff();
  share->sum = __builtin_nanf("");
  for (int64_t i = 0; i < d; ++i) share->y[i] = 0;
}

// Integers in units of the largest weight, which is the result over kMostShare; the unit.
struct ShareUnit {
  float inverse, unit;
};
inline ShareUnit ShareUnitOf(float largest) {
  constexpr auto kMost = static_cast<float>(kMostShare);
  if (largest < kSmallestWeight) return {0, 0};
  return {kMost / largest, largest / kMost};
}

[[maybe_unused]] void AttendToChunk(const AttendChunk& c) {
  float score[kChunkSlots];
  int32_t code[kChunkSlots];
  for (int64_t h = 0; h < c.heads; ++h) {
    const Query& query = c.queries[h];
    ValueShare& share = c.shares[h];
    float most = -__builtin_inff();
    uint32_t largest = 0;
    for (int64_t s = c.begin; s < c.end; ++s) {
      const int8_t* key = c.keys + s * c.d;
      int32_t sum = 0;
      for (int64_t i = 0; i < c.d; ++i) sum += int32_t{query.code[i]} * key[i];
      score[s] = (static_cast<float>(sum) * query.factor) * c.key_scale[s];
      largest = Magnitude(score[s]) > largest ? Magnitude(score[s]) : largest;
      most = score[s] > most ? score[s] : most;
    }
    if (largest >= kInfinity) {
      Lose(c.d, &share);
      continue;
    }
    float lane[kSumLanes] = {};
    largest = 0;
    for (int64_t s = c.begin; s < c.end; ++s) {
      const float e = ExpOrZero(score[s] - most);
      lane[s % kSumLanes] += e;
      score[s] = e * c.value_scale[s];
      largest = Magnitude(score[s]) > largest ? Magnitude(score[s]) : largest;
    }
    if (largest >= kInfinity) {
      Lose(c.d, &share);
      continue;
    }
    const ShareUnit u = ShareUnitOf(FromBits(largest));
    for (int64_t s = c.begin; s < c.end; ++s) {
      const auto v = static_cast<int32_t>(Round(score[s] * u.inverse));
      code[s] = v < 0 ? 0 : v > kMostShare ? static_cast<int32_t>(kMostShare) : v;
    }
    share.most = most;
    share.sum = SumOf(lane);
    for (int64_t i = 0; i < c.d; ++i) {
      const int8_t* value = c.values + i * c.stride;
      int32_t sum = 0;
      for (int64_t s = c.begin; s < c.end; ++s) sum += code[s] * value[s];
      share.y[i] = static_cast<float>(sum) * u.unit;
    }
  }
}

template <class E>
void JoinSharesAs(const ValueShare* shares, int64_t count, int64_t heads, int64_t d, void* data) {
  alignas(64) float sum[kMostHeadDim];
  for (int64_t h = 0; h < heads; ++h) {
    float most = -__builtin_inff(), total = 0;
    for (int64_t c = 0; c < count; ++c) {
      const float own = shares[c * heads + h].most;
      most = own > most ? own : most;
    }
    for (int64_t i = 0; i < d; ++i) sum[i] = 0;
    for (int64_t c = 0; c < count; ++c) {
      const ValueShare& share = shares[c * heads + h];
      const float factor = ExpOrZero(share.most - most);
      total += factor * share.sum;
      for (int64_t i = 0; i < d; ++i) sum[i] += factor * share.y[i];
    }
    auto* y = static_cast<typename E::Element*>(data) + h * d;
    for (int64_t i = 0; i < d; ++i) y[i] = E::Put(sum[i] / total);
  }
}

void JoinShares(const ValueShare* shares, int64_t count, int64_t heads, int64_t d, Type type, void* y) {
  switch (type) {
    case Type::kBF16:
      return JoinSharesAs<BFloats>(shares, count, heads, d, y);
    case Type::kF16:
      return JoinSharesAs<Halves>(shares, count, heads, d, y);
    default:
      return JoinSharesAs<Floats>(shares, count, heads, d, y);
  }
}

[[maybe_unused]] constexpr AttendFunctions kAttendPlain = {EnterToken<PlainRows>, AttendToChunk, JoinShares};

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ATTEND_ROWS_H_
