// The high parts of a few rows of codes, for lanes (lanes_avx512.h): which bytes of the weights they multiply.
//
// A row has few high parts, in other columns than its neighbours, so whole registers of its codes would be zeros but
// for a byte or two. Each of eight rows has eight places of a line of 64 bytes instead; a line of weights is made of
// the bytes that the places ask for, picked out of the lines in which they lie, and multiplied as any other line, but
// every row has only its own places to multiply. The surprising fact is that one register says where to pick from all
// the time: a place that has been served no longer holds where from but the weight, the others still wait for their
// lines.
#ifndef JAXINT8_FFI_CPU_PICKS_AVX512_H_
#define JAXINT8_FFI_CPU_PICKS_AVX512_H_

#include <immintrin.h>

#include <cstring>

#include "int8.h"
#include "rows_avx512.h"

namespace jaxint8::cpu {

// Up to eight high parts of each of eight rows. Those of row i are in words i / 2 of two lanes: the first two, if i is
// even, else the last two.
struct alignas(64) PickRound {
  uint8_t from[64];     // of the two lines in which the place's column lies: which byte
  int8_t codes[64];     // zero where there is none
  int32_t first, stop;  // pairs of lines
};

// Two lines of columns, by their distance from the beginning of the slice, and the places that they serve.
struct LinePair {
  uint64_t places;
  int32_t line[2];
};

namespace {

constexpr int kPickRows = 8;    // of a team
constexpr int kPickPlaces = 8;  // of a row

inline int PlaceOf(int row, int32_t number) { return row % 2 * 32 + number / 4 % 2 * 16 + row / 2 * 4 + number % 4; }

// What `picked` waits for in `places`, from the 128 bytes of two registers. In assembly, as what is beside it must run
// on processors that lack VBMI.
ALWAYS_INLINE inline __m512i PickBytes(__m512i low, __m512i high, __mmask64 places, __m512i picked) {
  asm("vpermi2b %[high], %[low], %[picked]%{%[places]%}"
      : [picked] "+v"(picked)
      : [low] "v"(low), [high] "vm"(high), [places] "Yk"(places));
  return picked;
}

// A team of rows and a slice of the columns of a block.
struct PickPart {
  int64_t i, rows;
  int64_t begin, end;
};

// The rounds of all parts of a block, in the order in which they are added.
struct PickPlan {
  static constexpr int kRounds = 256, kPairs = 2048, kParts = 256;
  static constexpr int kLines = 128;  // of a slice, at most

  uint64_t job;  // whose it is, of which rows
  const Row* rows;
  bool fits;
  int32_t parts, last_round, last_pair;
  int32_t first[kParts + 1];  // of the rounds of a part
  PickRound rounds[kRounds];
  LinePair pairs[kPairs];
  int16_t slot[kLines];

  // Adds the high parts of a part, whose columns lie behind those of the part before it of the same rows; `next`: the
  // first outlier of each row that is not yet added. False if there is no room.
  bool Add(const Row* all, const PickPart& part, int32_t* next);

 private:
  // Calls f(outlier, its number) for those that the next round takes of a row.
  template <typename F>
  static void EachOf(const Row& row, int64_t end, int32_t* next, const F& f) {
    int32_t number = 0;
    for (; *next < row.count && row.outliers[*next].column < end && number < kPickPlaces; ++*next) {
      f(row.outliers[*next], number++);
    }
  }
};

inline bool PickPlan::Add(const Row* all, const PickPart& part, int32_t* next) {
  if (parts == kParts) return false;
  for (;; ++last_round) {
    uint64_t used[2] = {};  // of the lines; in registers, as each outlier sets a bit
    static_assert(kLines == 128);
    for (int64_t i = part.i; i < part.i + part.rows; ++i) {
      int32_t at = next[i];
      EachOf(all[i], part.end, &at, [&](const Outlier& o, int32_t) {
        const int64_t line = (o.column - part.begin) / 64;
        const uint64_t bit = uint64_t{1} << (line % 64);
        used[0] |= line < 64 ? bit : 0;
        used[1] |= line < 64 ? 0 : bit;
      });
    }
    if ((used[0] | used[1]) == 0) break;
    if (last_round == kRounds) return false;
    PickRound& round = rounds[last_round];
    std::memset(round.from, 0, sizeof round.from);
    std::memset(round.codes, 0, sizeof round.codes);
    round.first = last_pair;
    int16_t lines = 0;
    for (int64_t word = 0; word < 2; ++word) {
      for (uint64_t left = used[word]; left; left &= left - 1, ++lines) {
        if (last_pair + lines / 2 == kPairs) return false;
        const auto line = static_cast<int32_t>(word * 64 + __builtin_ctzll(left));
        slot[line] = lines;
        LinePair& pair = pairs[last_pair + lines / 2];
        if (lines % 2 == 0) pair.places = 0, pair.line[0] = line * 64;
        pair.line[1] = line * 64;
      }
    }
    for (int64_t i = part.i; i < part.i + part.rows; ++i) {
      EachOf(all[i], part.end, &next[i], [&](const Outlier& o, int32_t number) {
        const auto column = static_cast<int32_t>(o.column - part.begin);
        const int16_t at = slot[column / 64];
        const int place = PlaceOf(static_cast<int>(i - part.i), number);
        round.from[place] = static_cast<uint8_t>(at % 2 * 64 + column % 64);
        round.codes[place] = static_cast<int8_t>(o.hi);
        pairs[round.first + at / 2].places |= uint64_t{1} << place;
      });
    }
    last_pair += (lines + 1) / 2;
    round.stop = last_pair;
  }
  first[++parts] = last_round;
  return true;
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_PICKS_AVX512_H_
