// The functions of attend.h for rungs with registers of four or eight floats: scores, exponentials and weights of
// slots, by the compiler's own vectors, operation by operation as in attend_rows.h. Products of integers are the rung's
// (attend_avx256.h, attend_neon.h).
#ifndef JAXINT8_FFI_CPU_ATTEND_VECTORS_H_
#define JAXINT8_FFI_CPU_ATTEND_VECTORS_H_

#include <cstdint>

#include "attend_rows.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

// What a rung gives, as P:
//   Floats, Words             vectors of kLanes float and int32
//   Weights                   weights of slots as integers, and their unit
//   Score<kD>(c, slot, sums)  sums[h]: of kLanes slots the products of keys with the codes of query h
//   Store(code, slot, to)     the weights of 16 slots, 0 to kMostShare
//   Sum<kD>(c, begin, end, sums), Add<kD>(c, begin, end, weights, sums, y)
//                             y[kD] of one query, from the sums over all slots of each dimension; slots in steps of 32,
//                             of which those that are not seen have weight 0
template <class P>
struct AttendVectors {
  using Floats = typename P::Floats;
  using Words = typename P::Words;
  static constexpr int kLanes = P::kLanes;
  static constexpr int kParts = 16 / kLanes;  // vectors of 16 slots

  // Of all queries, of slots that are not seen anything; and of each query the largest score, and the largest
  // magnitude, which tells whether all are finite.
  struct Scores {
    alignas(64) float score[kMostQueries][kChunkSlots];
    Floats most[kMostQueries];
    Words largest[kMostQueries];
  };

  static Floats Load(const float* x) {
    Floats v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
  }
  static void Store(float* x, Floats v) { __builtin_memcpy(x, &v, sizeof v); }
  static Floats All(float x) { return x - Floats{}; }
  static Words All(int32_t x) { return x - Words{}; }
  static Floats Where(Words mask, Floats x) { return (Floats)(mask & (Words)x); }
  static Words LargerOf(Words a, Words b) { return a > b ? a : b; }
  static Words SmallerOf(Words a, Words b) { return a < b ? a : b; }
  static Words Magnitudes(Floats x) { return (Words)x & All(static_cast<int32_t>(kMagnitude)); }
  static Floats Rounded(Floats x) { return (x + All(12582912.0f)) - All(12582912.0f); }  // as Round

  static uint32_t Largest(Words words) {
    int32_t largest = 0;
    for (int i = 0; i < kLanes; ++i) largest = words[i] > largest ? words[i] : largest;
    return static_cast<uint32_t>(largest);
  }

  // Of the slots from this one those that are seen.
  static Words SeenOf(const AttendChunk& c, int64_t slot) {
    Words at;
    for (int i = 0; i < kLanes; ++i) at[i] = i;
    at += All(static_cast<int32_t>(slot));
    return (at >= All(static_cast<int32_t>(c.begin))) & (at < All(static_cast<int32_t>(c.end)));
  }

  // As Exp.
  static Floats Exps(Floats x) {
    const Floats power = Rounded(x * All(kExpLog2e));
    const Floats r = (x - power * All(kExpLn2[0])) - power * All(kExpLn2[1]);
    Floats p = All(kExpPolynomial[0]);
    for (int i = 1; i < 6; ++i) p = p * r + All(kExpPolynomial[i]);
    const Floats y = (p * (r * r) + r) + All(1.0f);
    return (Floats)((Words)y + (__builtin_convertvector(power, Words) << 23));
  }

  template <int64_t kD>
  static void Score(const AttendChunk& c, int64_t slot, Scores* to) {
    Words sums[kMostQueries];
    P::template Score<kD>(c, slot, sums);
    const Words seen = SeenOf(c, slot);
    const Floats key_scale = Load(c.key_scale + slot);
    for (int64_t h = 0; h < c.heads; ++h) {
      const Floats score = (__builtin_convertvector(sums[h], Floats) * All(c.queries[h].factor)) * key_scale;
      to->largest[h] = LargerOf(to->largest[h], Magnitudes(Where(seen, score)));
      const Floats among = seen ? score : All(-__builtin_inff());
      to->most[h] = among > to->most[h] ? among : to->most[h];
      Store(to->score[h] + slot, score);
    }
  }

  // Replaces the scores of a query by exponentials times scales, and makes them weights; false if one is not finite.
  static bool Weigh(const AttendChunk& c, int64_t begin, int64_t end, float most, float* score, typename P::Weights* to,
                    float* total) {
    Floats sum[kParts];
    Unroll<kParts>([&](auto i) ALWAYS_INLINE { sum[i] = All(0.0f); });
    Words largest = All(0);
    for (int64_t step = begin; step < end; step += 16) {
      Unroll<kParts>([&](auto i) ALWAYS_INLINE {
        const int64_t slot = step + kLanes * i;
        const Words seen = SeenOf(c, slot);
        const Floats x = Where(seen, Load(score + slot) - All(most));
        const Words kept = seen & (x >= All(kExpLeast));
        const Floats e = Where(kept, Exps(Where(kept, x)));
        sum[i] += e;
        const Floats v = e * Where(seen, Load(c.value_scale + slot));
        largest = LargerOf(largest, Magnitudes(v));
        Store(score + slot, v);
      });
    }
    float lane[kSumLanes];
    Unroll<kParts>([&](auto i) ALWAYS_INLINE { Store(lane + kLanes * i, sum[i]); });
    *total = SumOf(lane);
    if (Largest(largest) >= kInfinity) return false;
    const ShareUnit u = ShareUnitOf(FromBits(Largest(largest)));
    to->unit = u.unit;
    for (int64_t step = begin; step < end; step += 16) {
      Words code[kParts];
      Unroll<kParts>([&](auto i) ALWAYS_INLINE {
        const Floats w = Rounded(Load(score + step + kLanes * i) * All(u.inverse));
        const Words v = LargerOf(__builtin_convertvector(w, Words), All(0));
        code[i] = SmallerOf(v, All(static_cast<int32_t>(kMostShare)));
      });
      P::Store(code, step, to);
    }
    return true;
  }

  template <int64_t kD>
  static void AttendTo(const AttendChunk& c) {
    Scores scores;
    for (int64_t h = 0; h < c.heads; ++h) {
      scores.most[h] = All(-__builtin_inff());
      scores.largest[h] = All(0);
    }
    const int64_t begin = c.begin / 32 * 32, end = (c.end + 31) / 32 * 32;
    // Values are asked for while keys are multiplied: lines of many rows, which no processor would guess.
    constexpr int64_t kRows = kD * kLanes / kChunkSlots;
    int64_t row = 0;
    for (int64_t slot = c.begin / kLanes * kLanes; slot < c.end; slot += kLanes) {
      for (const int64_t last = row + kRows; row < last; ++row) {
        for (int64_t line = begin; line < c.end; line += 64) __builtin_prefetch(c.values + row * c.stride + line);
      }
      Score<kD>(c, slot, &scores);
    }
    int32_t sums[kD];
    P::template Sum<kD>(c, begin, end, sums);
    typename P::Weights weights;
    for (int64_t h = 0; h < c.heads; ++h) {
      ValueShare& share = c.shares[h];
      share.most = scores.most[h][0];
      for (int i = 1; i < kLanes; ++i) share.most = scores.most[h][i] > share.most ? scores.most[h][i] : share.most;
      if (Largest(scores.largest[h]) >= kInfinity ||
          !Weigh(c, begin, end, share.most, scores.score[h], &weights, &share.sum)) {
        Lose(kD, &share);
        continue;
      }
      P::template Add<kD>(c, begin, end, weights, sums, share.y);
    }
  }

  static void Attend(const AttendChunk& c) {
    if (c.d == 64) return AttendTo<64>(c);
    AttendTo<128>(c);
  }

  static constexpr AttendFunctions kFunctions = {EnterToken<PlainRows>, Attend, JoinShares};
};

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_ATTEND_VECTORS_H_
