// How the codes of rows are turned (Rung::turn) for AVX2's product of bytes: see turned_avx2.h.
#ifndef JAXINT8_FFI_CPU_TURNING_AVX2_H_
#define JAXINT8_FFI_CPU_TURNING_AVX2_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "avx256.h"
#include "int8.h"
#include "rows.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

constexpr int kMostTurned = 128;  // that codes of one sign may add up to: 255 * 128 is within 16 bits

struct Turned : Avx256 {
  struct Two {  // the bytes of 32 columns and of the next 32, or words of four of each
    __m256i first, second;
  };
  static constexpr int kTileN = 16, kRegisters = kTileN / kLanes32;

  static __m256i Flip(__m256i w) { return _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80))); }
  static __m256i Word(const void* p) { return LoadTileCodes(static_cast<const uint8_t*>(p)); }
  static __m256i Code(uint32_t four) { return _mm256_set1_epi32(static_cast<int32_t>(four)); }

  // In place, one sum after the other: the compiler would rather finish all products first, and move sums about.
  ALWAYS_INLINE static void AddTo(Sums& sum, __m256i a) { asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(a)); }
  static __m256i Widen16(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
  ALWAYS_INLINE static void MulAddPairs(Sums& sum, __m256i w, __m256i x) {
    AddTo(sum, Widen16(_mm256_maddubs_epi16(w, x)));
  }
  ALWAYS_INLINE static void MulAddFours(Sums& sum, const Two& w, const Two& x) {
    const __m256i first = _mm256_maddubs_epi16(w.first, x.first), second = _mm256_maddubs_epi16(w.second, x.second);
    AddTo(sum, Widen16(_mm256_add_epi16(first, second)));
  }
  // Lane j of the result adds up all lanes of a[j], which are overwritten.
  ALWAYS_INLINE static Sums Sum8(Sums (&a)[8]) {
    Unroll<4>([&](auto q) ALWAYS_INLINE {
      const Sums x = a[2 * q], y = a[2 * q + 1];
      a[q] = Add(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
    });
    Unroll<2>([&](auto q) ALWAYS_INLINE {
      const Sums x = a[2 * q], y = a[2 * q + 1];
      a[q] = Add(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y));
    });
    return Add(_mm256_permute2x128_si256(a[0], a[1], 0x20), _mm256_permute2x128_si256(a[0], a[1], 0x31));
  }
};

// Sums and differences of the codes in columns 2t and 2t + 1, and the sums of their magnitudes.
struct PairSums {
  __m256i sum, difference, all;

  static PairSums Of(__m256i x) {
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
    const __m256i sum = _mm256_add_epi16(even, odd), difference = _mm256_sub_epi16(even, odd);
    return {sum, difference, _mm256_max_epi16(_mm256_abs_epi16(sum), _mm256_abs_epi16(difference))};
  }
};

// How two times 32 columns of a team are turned.
struct Turning {
  int32_t order;          // word q of the second columns is put beside word q ^ order of the first
  __m256i first, second;  // 0xff where codes are negated; the second in this order
};

__m256i Order(int32_t order) {
  return _mm256_xor_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(order));
}
__m256i InOrder(__m256i words, __m256i order) { return _mm256_permutevar8x32_epi32(words, order); }

// Such that of all rows together fewest pairs of codes do not fit, or fours: of P and N, what positive and negative
// codes add up to, the larger is (P + N + |P - N|) / 2. The first code keeps its sign, so that fours have eight
// choices.
Turning TurnPairs(const int8_t* first, const int8_t* second, int64_t stride, int64_t m) {
  const __m256i most = _mm256_set1_epi16(kMostTurned), seconds = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
  __m256i flips[2];
  Unroll<2>([&](auto half) ALWAYS_INLINE {
    const int8_t* lo = half == 0 ? first : second;
    __m256i rows = Avx256::Zero();  // of which the sum does not fit, less those of which the difference does not
    for (int64_t i = 0; i < m; ++i) {
      const PairSums x = PairSums::Of(Avx256::Load(lo + i * stride));
      rows = _mm256_sub_epi16(rows, _mm256_cmpgt_epi16(_mm256_abs_epi16(x.sum), most));
      rows = _mm256_add_epi16(rows, _mm256_cmpgt_epi16(_mm256_abs_epi16(x.difference), most));
    }
    flips[half] = _mm256_and_si256(_mm256_cmpgt_epi16(rows, Avx256::Zero()), seconds);
  });
  return {0, flips[0], flips[1]};
}

// Of each four of x and y, of m rows, the best choice, less 8 for each row that does not fit.
template <bool kOrdered>
ALWAYS_INLINE inline __m256i ChooseFours(const PairSums* x, const PairSums* y, int64_t m, int32_t order) {
  __m256i beyond[8];  // by choice, how many rows, negated
  Unroll<8>([&](auto i) ALWAYS_INLINE { beyond[i] = Avx256::Zero(); });
  for (int64_t i = 0; i < m; ++i) {
    const auto in_order = [&](__m256i of) ALWAYS_INLINE { return kOrdered ? InOrder(of, Order(order)) : of; };
    const __m256i sum = in_order(y[i].sum), difference = in_order(y[i].difference);
    const __m256i all = _mm256_add_epi16(x[i].all, in_order(y[i].all));
    const __m256i room = _mm256_sub_epi16(_mm256_set1_epi16(2 * kMostTurned), all);
    Unroll<4>([&](auto j) ALWAYS_INLINE {
      const __m256i a = j < 2 ? x[i].sum : x[i].difference, b = j % 2 == 0 ? sum : difference;
      const auto count = [&](__m256i& to, __m256i of) ALWAYS_INLINE {
        to = _mm256_add_epi16(to, _mm256_cmpgt_epi16(_mm256_abs_epi16(of), room));
      };
      count(beyond[2 * j], _mm256_add_epi16(a, b));
      count(beyond[2 * j + 1], _mm256_sub_epi16(a, b));
    });
  }
  __m256i best = _mm256_slli_epi16(beyond[0], 3);
  Unroll<7>([&](auto i) ALWAYS_INLINE {
    const __m256i key = _mm256_add_epi16(_mm256_slli_epi16(beyond[i + 1], 3), _mm256_set1_epi16(i + 1));
    best = _mm256_max_epi16(best, key);
  });
  return best;
}

Turning TurningOf(__m256i best, int32_t order) {
  // In each byte the choice, and 8 for the second of two columns.
  __m256i choice = _mm256_and_si256(best, _mm256_set1_epi16(7));
  choice = _mm256_or_si256(_mm256_or_si256(choice, _mm256_slli_epi16(choice, 8)), _mm256_set1_epi16(0x0800));
  const auto look_up = [&](__m128i table) { return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), choice); };
  return {order, look_up(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1)),
          look_up(_mm_setr_epi8(0, -1, 0, -1, 0, -1, 0, -1, 0, -1, -1, 0, 0, -1, -1, 0))};
}

Turning TurnFours(const int8_t* lo, int64_t stride, int64_t m) {
  PairSums x[kTurnedRows], y[kTurnedRows];
  for (int64_t i = 0; i < m; ++i) {
    x[i] = PairSums::Of(Avx256::Load(lo + i * stride));
    y[i] = PairSums::Of(Avx256::Load(lo + i * stride + 32));
  }
  __m256i best = Avx256::Zero();
  int32_t fewest = 0, best_order = 0;
  for (int32_t order = 0; order < 8 && (order == 0 || fewest > 0); ++order) {
    const __m256i least = ChooseFours<true>(x, y, m, order);
    const int32_t rows = -Avx256::Sum(Turned::Widen16(_mm256_srai_epi16(least, 3)));
    if (order > 0 && rows >= fewest) continue;
    best = least;
    fewest = rows;
    best_order = order;
  }
  return TurningOf(best, best_order);
}

// Takes 64 from the largest of these turned codes, or adds it to the smallest, until they fit: of a sum beyond
// kMostTurned one is beyond 32 and becomes smaller by that. Says how often, of each.
template <int kCodes>
void MoveCodes(int8_t* turned, const int64_t* columns, int* moved) {
  for (;;) {
    int positive = 0, negative = 0, high = 0, low = 0;
    for (int i = 0; i < kCodes; ++i) {
      const int code = turned[columns[i]];
      (code > 0 ? positive : negative) += code;
      if (code > turned[columns[high]]) high = i;
      if (code < turned[columns[low]]) low = i;
    }
    if (positive <= kMostTurned && negative >= -kMostTurned) return;
    const int sign = positive > -negative ? 1 : -1, at = sign > 0 ? high : low;
    turned[columns[at]] = static_cast<int8_t>(turned[columns[at]] - 64 * sign);
    moved[at] += sign;
  }
}

// Of every 64 columns so many lines of 64 bytes lie one behind the other: those of each row, then the bytes that
// weights are flipped with. Behind them all, of every 64 columns a step. Only what is read beside weights that come
// from memory has a line for all columns of a row: then codes and weights of a column are half a page apart.
constexpr int64_t kTurnedWidth = kTurnedRows + 1;
static_assert(kTurnedWidth + 1 == kTurnedLines);

struct Step {
  int64_t from[2];  // which columns each half is, of weights as they lie
  int64_t order;    // as in a Turning
  int64_t fours;    // how many columns are in fours, of dot products; only the first step says
};

Step* StepAt(int8_t* steps, int64_t t) { return reinterpret_cast<Step*>(steps) + t / 64; }
const Step* StepAt(const int8_t* steps, int64_t t) { return reinterpret_cast<const Step*>(steps) + t / 64; }

// The codes of a team while they are turned; see Rung::turn for what is written where.
struct Turner {
  const int8_t* lo;
  int64_t stride, m, k, most;
  int8_t* turned;
  HiWord* moved;
  int32_t* count;
  bool apart;
  int64_t done = 0;                   // columns
  __m256i negated[kTurnedRows] = {};  // sums of the codes that are

  int8_t* steps() const { return turned + kTurnedWidth * stride; }
  int8_t* line(int64_t i, int64_t t) const {
    return apart ? turned + i * stride + t : turned + t * kTurnedWidth + i * 64;
  }

  // Puts two times 32 columns, from these on, side by side at t, and moves what does not fit in twos or fours, that is
  // kCodes; 0 of codes that do fit. False if too much would have to be moved.
  template <int kCodes>
  bool Put(int64_t t, int64_t first_column, int64_t second_column, const Turning& turning) {
    const Step step{{first_column, second_column}, turning.order, 0};
    if (!apart) *StepAt(steps(), t) = step;
    int8_t* const flips = line(kTurnedRows, t);
    Avx256::StoreBytes(flips, Turned::Flip(turning.first));
    Avx256::StoreBytes(flips + 32, Turned::Flip(turning.second));
    done += 64;
    for (int64_t i = 0; i < m; ++i) {
      int8_t* out = line(i, t);
      const int8_t* in = lo + i * stride;
      const auto turn = [](__m256i x, __m256i flip) { return _mm256_sub_epi8(_mm256_xor_si256(x, flip), flip); };
      const __m256i second = InOrder(Avx256::Load(in + second_column), Order(turning.order));
      Avx256::StoreBytes(out, turn(Avx256::Load(in + first_column), turning.first));
      Avx256::StoreBytes(out + 32, turn(second, turning.second));
      if constexpr (kCodes > 0) {
        if (!Move<kCodes>(i, out, flips, step)) return false;
      }
      const __m256i ones = _mm256_set1_epi8(1);
      const __m256i these = _mm256_and_si256(Avx256::Load(out), turning.first);
      const __m256i those = _mm256_and_si256(Avx256::Load(out + 32), turning.second);
      const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(ones, these), _mm256_maddubs_epi16(ones, those));
      negated[i] = Avx256::Add(negated[i], Turned::Widen16(sums));
    }
    return true;
  }

  // Moves what does not fit of 64 columns of row i.
  template <int kCodes>
  bool Move(int64_t i, int8_t* out, const int8_t* flips, const Step& step) {
    const auto beyond = [](__m256i all, __m256i sum) {  // bits of the columns 2t that do not fit
      const __m256i twice = _mm256_add_epi16(all, _mm256_abs_epi16(sum));
      const __m256i lanes = _mm256_cmpgt_epi16(twice, _mm256_set1_epi16(2 * kMostTurned));
      return static_cast<uint32_t>(_mm256_movemask_epi8(lanes)) & 0x55555555;
    };
    const PairSums x = PairSums::Of(Avx256::Load(out)), y = PairSums::Of(Avx256::Load(out + 32));
    uint64_t left = 0;
    if constexpr (kCodes == 4) {
      left = beyond(_mm256_add_epi16(x.all, y.all), _mm256_add_epi16(x.sum, y.sum));
    } else {
      left = beyond(x.all, x.sum) | uint64_t{beyond(y.all, y.sum)} << 32;
    }
    // Beyond its share up to here: the rest will hardly be better.
    if (left != 0 && count[i] > 8 + most * done / k) return false;
    for (; left != 0; left &= left - 1) {
      if (count[i] + 2 > most) return false;
      const int64_t column = __builtin_ctzll(left), columns[4] = {column, column + 1, column + 32, column + 33};
      int parts[kCodes] = {};
      MoveCodes<kCodes>(out, columns, parts);
      for (int pair = 0; pair < kCodes; pair += 2) {
        const auto part = [&](int at) {
          const bool flipped = flips[columns[at]] == 127;
          return static_cast<uint32_t>((flipped ? -parts[at] : parts[at]) & 0xff) << (columns[at] % 4 * 8);
        };
        const uint32_t four = part(pair) | part(pair + 1);
        const auto word = static_cast<int32_t>(columns[pair] / 4);
        const int64_t group = word < 8 ? step.from[0] / 4 + word : step.from[1] / 4 + ((word - 8) ^ step.order);
        if (four != 0) moved[i * most + count[i]++] = {TurnedPlace(static_cast<int32_t>(group)), four};
      }
    }
    return true;
  }
};

// For tiles, whose weights are packed.
bool TurnForTiles(Turner& team) {
  for (int64_t t = 0; t < team.k; t += 64) {
    const Turning turning = TurnFours(team.lo + t, team.stride, team.m);
    if (!team.Put<4>(t, t, t + 32, turning)) return false;
  }
  return true;
}

constexpr int64_t kPaired = 32;     // times 32 columns, in a stretch of a row, among which partners are looked for
constexpr int64_t kPairedRows = 3;  // fewer rows are bound by loading weights, and gain nothing by fours

// Of n times 32 columns, from `column` on, puts pairs that fit in fours, for all rows and without moving anything, from
// `front` on, and the others in twos, down to `back`.
bool TurnPaired(Turner& team, int64_t column, int64_t n, int64_t* front, int64_t* back) {
  PairSums sums[kPaired][kTurnedRows];
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t i = 0; i < team.m; ++i) {
      sums[r][i] = PairSums::Of(Avx256::Load(team.lo + i * team.stride + column + r * 32));
    }
  }
  uint32_t left = static_cast<uint32_t>((uint64_t{1} << n) - 1);
  int64_t single = -1;
  int64_t patience = 2 * n;  // pairs to be tried, 12 more for each that fits: of uniform rows none will
  while (left != 0) {
    const int64_t a = __builtin_ctz(left), first = column + a * 32;
    left &= left - 1;
    bool paired = false;
    for (uint32_t others = left; others != 0 && patience > 0 && !paired; others &= others - 1) {
      const int64_t b = __builtin_ctz(others);
      const __m256i best = ChooseFours<false>(sums[a], sums[b], team.m, 0);
      --patience;
      if (_mm256_movemask_epi8(_mm256_srai_epi16(best, 15)) != 0) continue;
      if (!team.Put<0>(*front, first, column + b * 32, TurningOf(best, 0))) return false;
      *front += 64;
      left ^= uint32_t{1} << b;
      patience += 12;
      paired = true;
    }
    if (paired) continue;
    if (single >= 0) {
      *back -= 64;
      const Turning turning = TurnPairs(team.lo + single, team.lo + first, team.stride, team.m);
      if (!team.Put<2>(*back, single, first, turning)) return false;
    }
    single = single >= 0 ? -1 : first;
  }
  return true;
}

// For dot products, whose weights are read as they lie.
bool TurnForDots(Turner& team) {
  const int64_t whole = team.m < kPairedRows ? 0 : team.k / 64 * 64;
  int64_t front = 0, back = whole;
  for (int64_t column = 0; column < whole; column += 32 * kPaired) {
    const int64_t n = (whole - column) / 32 < kPaired ? (whole - column) / 32 : kPaired;
    if (!TurnPaired(team, column, n, &front, &back)) return false;
  }
  for (int64_t t = whole; t < team.k; t += 64) {
    if (!team.Put<2>(t, t, t + 32, TurnPairs(team.lo + t, team.lo + t + 32, team.stride, team.m))) return false;
  }
  if (!team.apart) StepAt(team.steps(), 0)->fours = front;
  return true;
}

bool TurnRows(const int8_t* lo, int64_t stride, int64_t m, int64_t k, bool fours, int64_t most, int8_t* turned,
              HiWord* moved, int32_t* count, Row* rows) {
  Turner team{lo, stride, m, k, most, turned, moved, count, !fours && m < kPairedRows};
  for (int64_t i = 0; i < m; ++i) count[i] = 0;
  if (!(fours ? TurnForTiles : TurnForDots)(team)) return false;
  // With u = w + 128, and 127 - w where a code is negated: sum(w * lo) = sum(u * turned) - 128 * sum(lo) - 255 *
  // sum(those negated), and high parts are multiplied by w + 128.
  for (int64_t i = 0; i < m; ++i) {
    const auto sum = static_cast<uint32_t>(rows[i].sum), part = static_cast<uint32_t>(Avx256::Sum(team.negated[i]));
    rows[i].turned = static_cast<int32_t>(0u - (sum << 7) - 255 * part);
  }
  return true;
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_TURNING_AVX2_H_
