// Small products with AVX512-VNNI where shuffles within 128-bit lanes cost nothing beside multiplications: dot products
// whose sums need no adding up.
//
// Four rows of weights, 64 columns of each, are transposed within the lanes: lane l of register q then holds columns
// [16 * l + 4 * q, + 4) of all four rows, and a sum is one of an output in each lane, so that 16 sums over lanes (of
// four outputs, where a plain dot product has four times as many) are six additions. Codes are brought into the same
// order as they are loaded: word q of each lane, four times. The surprising fact is what is not here, a panel of packed
// weights: on Zen 5, which shuffles four registers a cycle, a store costs as much as two multiplications, so that
// transposing the same weights anew for every eight to ten rows of codes is cheaper than to keep them, up to some 50 or
// 70 rows.
#ifndef JAXINT8_FFI_CPU_LANES_AVX512_H_
#define JAXINT8_FFI_CPU_LANES_AVX512_H_

#include <immintrin.h>

#include <array>
#include <utility>

#include "int8.h"
#include "picks_avx512.h"
#include "rows_avx512.h"
#include "tiles_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {

// A piece of a block: a team of rows of codes and a slice of the columns.
struct LanesPart {
  int64_t i;           // the first row of codes
  int64_t begin, end;  // columns; begin is a multiple of 64, end too or the last
  // kGathered. Where to keep transposed weights, [64 columns][2][4] registers; for each group of four columns a bit
  // that says whether it is needed; where those that are lie in what is kept; and the panel into which they are copied.
  uint8_t* kept;
  const uint16_t* needed;
  const int32_t* at;
  int64_t groups;
  uint8_t* panel;
  // kPicked: of this team and slice.
  const PickRound* high;
  int64_t rounds;
  const LinePair* pairs;
};

namespace {

constexpr int kLanesN = 8;  // outputs at once: two transpositions
// Bytes of a team's codes in a slice of columns, which stay in the L1 cache (48 KiB); and the columns of a slice where
// what is stored to gather from has to stay there too.
constexpr int64_t kLanesBytes = 44 << 10;
constexpr int64_t kGatherColumns = 2048;

// How high parts come about: not here; the weights of their groups are gathered, for all rows; or each team picks its
// own.
enum class HighParts { kNone, kGathered, kPicked };

// Rows of codes of a team at most: 10 x 2 sums + 8 weights + 1 of codes.
constexpr int LanesM(HighParts high) { return high == HighParts::kPicked ? kPickRows : 10; }

// Where Lanes keeps four columns of four rows of weights, in bytes; the columns by their distance from the slice.
inline int32_t KeptAt(int64_t column) {
  const auto g = static_cast<uint32_t>(column / 4), word = g % 16;
  return static_cast<int32_t>(g / 16 * 64 * kLanesN + word % 4 * 64 + word / 4 * 16);
}

// Moves groups of four columns of kLanesN outputs from where they were kept into a panel [group][kBlockN][4].
inline void CopyGroups(const uint8_t* kept, const int32_t* at, int64_t groups, uint8_t* panel) {
  for (int64_t g = 0; g < groups; ++g, panel += kBlockN * 4) {
    const auto* low = reinterpret_cast<const __m128i*>(kept + at[g]);
    const __m256i four = _mm256_castsi128_si256(_mm_load_si128(low));
    _mm256_store_si256(reinterpret_cast<__m256i*>(panel), _mm256_inserti128_si256(four, _mm_load_si128(low + 16), 1));
  }
}

// high[q] += the products of one round of high parts, rows 2 * q and 2 * q + 1, with eight rows of weights of which so
// many bytes are left: all eight outputs of the one row, then of the other. kRest: the last line is not whole.
template <int M, bool kRest>
ALWAYS_INLINE inline void AddRound(const PickRound& round, const LinePair* pairs, const int8_t* w, int64_t k,
                                   int64_t three, int64_t left, __m512i (&high)[(M + 1) / 2]) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80)), from = _mm512_load_si512(round.from);
  const LinePair *pair = pairs + round.first, *const end = pairs + round.stop;
  const int8_t* w4 = w + 4 * k;
  __m512i picked[kLanesN];
  Unroll<kLanesN>([&](auto r) ALWAYS_INLINE { picked[r] = from; });
  for (; pair != end; ++pair) {
    const __mmask64 places = pair->places;
    const int64_t one = pair->line[0], other = pair->line[1];
    __mmask64 in_one = ~__mmask64{0}, in_other = in_one;
    if constexpr (kRest) in_one = FirstBytes(left - one), in_other = FirstBytes(left - other);
    const auto load = [](const int8_t* line, __mmask64 in) ALWAYS_INLINE {
      return kRest ? _mm512_maskz_loadu_epi8(in, line) : _mm512_loadu_si512(line);
    };
    Unroll<kLanesN>([&](auto r) ALWAYS_INLINE {
      const __m512i a = load(RowAt<r>(w + one, w4 + one, k, three), in_one);
      const __m512i b = load(RowAt<r>(w + other, w4 + other, k, three), in_other);
      picked[r] = PickBytes(a, b, places, picked[r]);
    });
  }
  __m512i weights[2][4];
  Unroll<2>([&](auto g) ALWAYS_INLINE {
    __m512i row[4];
    Unroll<4>([&](auto r) ALWAYS_INLINE { row[r] = _mm512_xor_si512(picked[g * 4 + r], flip); });
    TransposeLanes(row, weights[g]);
  });
  const __m512i codes = _mm512_load_si512(round.codes), zero = _mm512_setzero_si512();
  Unroll<(M + 1) / 2>([&](auto q) ALWAYS_INLINE {
    const __m512i own = _mm512_shuffle_epi32(codes, static_cast<_MM_PERM_ENUM>(q * 0x55));
    const __m512i x = _mm512_dpbusd_epi32(zero, weights[0][q], own), y = _mm512_dpbusd_epi32(zero, weights[1][q], own);
    const __m512i four = _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
    high[q] = _mm512_add_epi32(high[q], _mm512_shuffle_i32x4(four, four, 0xd8));
  });
}

// c[M][n] (+)= dot products of rows of codes with rows of weights, n a multiple of kLanesN; the first part of the
// columns sets c.
template <int M, HighParts kHigh, bool kRest>
void LanesOf(const Block& b, const LanesPart& part) {
  constexpr int G = kLanesN / 4;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t k = b.k, stride = b.stride, lines = (part.end - part.begin) / 64 * 64, left = part.end - part.begin;
  [[maybe_unused]] const __mmask64 rest = FirstBytes(left - lines);
  const int8_t* first = b.w + part.begin;
  const int8_t* codes = b.lo + part.i * stride + part.begin;
  // In locals, because a store to c might change *b or part for all the compiler knows.
  int32_t* c = b.c + part.i * kBlockN;
  const Row* rows = b.rows + part.i;
  const bool adds = part.begin > 0;
  [[maybe_unused]] uint8_t* const kept = part.kept;
  [[maybe_unused]] const uint16_t* const needed = part.needed + part.begin / 64;
  [[maybe_unused]] uint8_t* panel = part.panel;
  const int64_t k3 = Thrice(k), stride3 = Thrice(stride);
  for (int64_t octets = b.n / kLanesN; octets > 0; --octets, first += kLanesN * k, c += kLanesN) {
    const int8_t *w = first, *w4 = first + 4 * k, *x = codes, *x4 = codes + 4 * stride, *x8 = codes + 8 * stride;
    ForgetVectors();
    __m512i acc[M][G];
    Unroll<M * G>([&](auto i) ALWAYS_INLINE { acc[i / G][i % G] = _mm512_setzero_si512(); });
    const auto step = [&](auto load) ALWAYS_INLINE {
      __m512i weights[G][4];
      Unroll<G>([&](auto g) ALWAYS_INLINE {
        __m512i row[4];
        Unroll<4>([&](auto r) ALWAYS_INLINE { row[r] = _mm512_xor_si512(load(RowAt<g * 4 + r>(w, w4, k, k3)), flip); });
        TransposeLanes(row, weights[g]);
      });
      if constexpr (kHigh == HighParts::kGathered) {
        const auto t = static_cast<uint64_t>(w - first);
        const unsigned words = needed[t / 64];
        Unroll<4>([&](auto q) ALWAYS_INLINE {
          if (words & 0x1111 << q) {
            Unroll<G>([&](auto g)
                          ALWAYS_INLINE { _mm512_store_si512(kept + t * 4 * G + (g * 4 + q) * 64, weights[g][q]); });
          }
        });
      }
      Unroll<4>([&](auto q) ALWAYS_INLINE {
        Unroll<M>([&](auto i) ALWAYS_INLINE {
          constexpr auto kOrder = static_cast<_MM_PERM_ENUM>(q * 0x55);
          const int8_t* from = RowAt<i % 8>(i < 8 ? x : x8, x4, stride, stride3);
          const __m512i own = _mm512_shuffle_epi32(_mm512_load_si512(from), kOrder);
          Unroll<G>([&](auto g) ALWAYS_INLINE { acc[i][g] = _mm512_dpbusd_epi32(acc[i][g], weights[g][q], own); });
        });
      });
    };
    // The rest comes first: after the loop it would make the compiler hold every sum twice.
    if constexpr (kRest) {
      w += lines, w4 += lines, x += lines, x4 += lines, x8 += lines;
      step([&](const int8_t* from) ALWAYS_INLINE { return _mm512_maskz_loadu_epi8(rest, from); });
      w -= lines, w4 -= lines, x -= lines, x4 -= lines, x8 -= lines;
    }
    for (const int8_t* end = first + lines; w != end;) {
      step([](const int8_t* from) ALWAYS_INLINE { return _mm512_loadu_si512(from); });
      w += 64, w4 += 64, x += 64, x4 += 64, x8 += 64;
    }
    // What comes after the loop is no reason to move sums about in it.
    Unroll<M * G>([&](auto i) ALWAYS_INLINE { asm("" : "+v"(acc[i / G][i % G])); });
    [[maybe_unused]] __m512i high[(M + 1) / 2];
    if constexpr (kHigh == HighParts::kPicked) {
      Unroll<(M + 1) / 2>([&](auto q) ALWAYS_INLINE { high[q] = _mm512_setzero_si512(); });
      for (const PickRound *round = part.high, *end = round + part.rounds; round != end; ++round) {
        AddRound<M, kRest>(*round, part.pairs, first, k, k3, left, high);
      }
    }
    Unroll<(M + 1) / 2>([&](auto pair) ALWAYS_INLINE {
      constexpr int kLow = pair * 2, kUp = kLow + 1 < M ? kLow + 1 : kLow;
      auto* low = reinterpret_cast<__m256i*>(c + kLow * kBlockN);
      auto* up = reinterpret_cast<__m256i*>(c + kUp * kBlockN);
      const __m256i before[2] = {adds ? _mm256_load_si256(low) : _mm256_set1_epi32(Correction(rows[kLow])),
                                 adds ? _mm256_load_si256(up) : _mm256_set1_epi32(Correction(rows[kUp]))};
      __m512i sums = SumLanes(acc[kLow][0], acc[kLow][1], acc[kUp][0], acc[kUp][1]);
      if constexpr (kHigh == HighParts::kPicked) sums = _mm512_add_epi32(sums, _mm512_slli_epi32(high[pair], 7));
      _mm256_store_si256(low, _mm256_add_epi32(before[0], _mm512_castsi512_si256(sums)));
      if constexpr (kUp != kLow) {
        _mm256_store_si256(up, _mm256_add_epi32(before[1], _mm512_extracti64x4_epi64(sums, 1)));
      }
    });
    // While these weights are in the L1 cache.
    if constexpr (kHigh == HighParts::kGathered) {
      CopyGroups(kept, part.at, part.groups, panel);
      panel += kLanesN * 4;
    }
  }
}

template <int M, HighParts kHigh>
void Lanes(const Block& b, const LanesPart& part) {
  (part.end % 64 != 0 ? LanesOf<M, kHigh, true> : LanesOf<M, kHigh, false>)(b, part);
}

using LanesFunction = void (*)(const Block&, const LanesPart&);
template <HighParts kHigh, int... kBefore>
constexpr std::array<LanesFunction, sizeof...(kBefore)> LanesUpTo(std::integer_sequence<int, kBefore...>) {
  return {Lanes<kBefore + 1, kHigh>...};
}
template <HighParts kHigh>
constexpr auto kLanesOf = LanesUpTo<kHigh>(std::make_integer_sequence<int, LanesM(kHigh)>{});

}  // namespace

// Lanes for so many rows of codes, by how high parts come about.
void LanesAlone(const Block& b, const LanesPart& part, int64_t rows);
void GatheringLanes(const Block& b, const LanesPart& part, int64_t rows);
void PickingLanes(const Block& b, const LanesPart& part, int64_t rows);

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_LANES_AVX512_H_
