// Products of turned codes (Rung::turn) by AVX2's product of bytes.
//
// vpmaddubsw adds two products in 16 bits and saturates, and two of its results may be beyond 16 bits. Of codes turned
// in fours all four products fit: one vpmaddwd, which widens sums to 32 bits, serves two vpmaddubsw, and the two units
// that multiply have three instructions for 64 products in the place of four. For many rows weights are packed into a
// panel of kTileN outputs, [place][kTileN][4] (see TurnedPlace), where moving what does not fit to high parts is cheap.
// Few rows take weights as they lie, and high parts would have to gather theirs: so columns are put together such that
// fours fit, 32 beside any other 32, and those that find no partner are turned in twos, of which next to none is moved.
// Four rows share the bytes that weights are flipped with, so that these cost next to nothing.
#ifndef JAXINT8_FFI_CPU_TURNED_AVX2_H_
#define JAXINT8_FFI_CPU_TURNED_AVX2_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "avx256.h"
#include "dots.h"
#include "int8.h"
#include "rows.h"
#include "turning_avx2.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

// sum += the high parts of M rows times kTileN outputs; the weights of a place, or of a group of the plan, lie
// kWordBytes after those of the one before.
template <int M, int64_t kWordBytes>
ALWAYS_INLINE inline void AddHighParts(const FourRows& four, const uint8_t* panel,
                                       Turned::Sums (&sum)[M][Turned::kRegisters]) {
  static constexpr int16_t kUnits[2] = {64, 128};
  const HiWord *word = four.words, *outliers = word + four.moved * kTurnedRows;
  for (const HiWord* end = outliers + four.outliers * kTurnedRows; word < end; word += kTurnedRows) {
    int64_t which = word >= outliers;
    asm("" : "+r"(which));  // one loop, whose end is mispredicted, and not two
    const __m256i unit = _mm256_set1_epi16(kUnits[which]);
    Unroll<M>([&](auto i) ALWAYS_INLINE {
      const uint8_t* w = panel + word[i].group * kWordBytes;
      const __m256i codes = Turned::Code(word[i].four);
      Unroll<Turned::kRegisters>([&](auto z) ALWAYS_INLINE {
        const __m256i pairs = _mm256_maddubs_epi16(Turned::Flip(Turned::Load(w + z * Turned::kBytes)), codes);
        Turned::AddTo(sum[i][z], _mm256_madd_epi16(pairs, unit));
      });
    });
  }
}

// Packs n rows of k weights, up to kTileN, eight rows of 64 columns at a time; k weights of 0 up to a multiple of 64.
void PackTurned(const int8_t* w, int64_t k, int64_t n, uint8_t* panel) {
  constexpr int64_t kPlaceBytes = Turned::kTileN * 4;
  for (int64_t t = 0; t < k; t += 64, panel += 16 * kPlaceBytes) {
    for (int64_t j = 0; j < Turned::kTileN; j += 8) {
      const int8_t* in = w + j * k + t;
      int64_t stride = k;
      int8_t padded[8][64];
      if (j + 8 > n || t + 64 > k) {
        std::memset(padded, 0, sizeof padded);
        for (int64_t i = 0; i < 8 && j + i < n; ++i) {
          std::memcpy(padded[i], in + i * k, static_cast<size_t>(k - t < 64 ? k - t : 64));
        }
        in = padded[0];
        stride = 64;
      }
      Unroll<2>([&](auto half) ALWAYS_INLINE {
        __m256i r[8];
        Unroll<8>([&](auto i) ALWAYS_INLINE { r[i] = Turned::Load(in + i * stride + half * 32); });
        Turned::Transpose(r);
        Unroll<8>([&](auto q)
                      ALWAYS_INLINE { Turned::StorePacked(panel + (2 * q + half) * kPlaceBytes + j * 4, r[q]); });
      });
    }
  }
}

// The turned codes of rows from i on, in fours.
const int8_t* TeamOf(const Block& b, int64_t i) { return b.turned + i / kTurnedRows * kTurnedLines * b.stride; }

// Outputs j to j + kTileN of M rows from i on: finished, if `direct`, or else sums in c.
template <int M>
void TurnedTile(const Block& b, int64_t i0, int64_t j, const uint8_t* panel, bool direct) {
  constexpr int R = Turned::kRegisters;
  const Row* rows = b.rows + i0;
  Turned::Sums sum[M][R];
  Unroll<M * R>([&](auto i) ALWAYS_INLINE { sum[i / R][i % R] = _mm256_set1_epi32(rows[i / R].turned); });
  AddHighParts<M, Turned::kTileN * 4>(b.fours[i0 / kTurnedRows], panel, sum);
  // What is packed next is fetched meanwhile, by each team its share.
  const int64_t teams = (b.m + kTurnedRows - 1) / kTurnedRows, team = i0 / kTurnedRows;
  const int64_t fetched = Turned::kTileN * team / teams, fetched_end = Turned::kTileN * (team + 1) / teams;
  const int8_t* const next = b.w + (j + Turned::kTileN) * b.k;
  const int8_t *codes = TeamOf(b, i0), *steps = codes + kTurnedWidth * b.stride;
  for (int64_t t = 0; t < b.k; t += 64, codes += 64 * kTurnedWidth, panel += 64 * Turned::kTileN) {
    for (int64_t r = fetched; r < fetched_end; ++r) __builtin_prefetch(next + r * b.k + t, 0, 2);
    constexpr int64_t kWord = R * Turned::kBytes;  // of weights
    const int64_t swap = StepAt(steps, t)->order * 2 * kWord;
    Unroll<8>([&](auto s) ALWAYS_INLINE {  // of eight columns: four of the first half and four of the second
      const auto words = [&](int row) ALWAYS_INLINE {
        const int8_t* at = codes + row * 64 + s * 4;
        return Turned::Two{Turned::Word(at), Turned::Word(at + 32)};
      };
      const Turned::Two flips = words(kTurnedRows);
      const uint8_t *first = panel + 2 * s * kWord, *second = panel + (2 * s * kWord ^ swap) + kWord;
      Turned::Two w[R];
      Unroll<R>([&](auto z) ALWAYS_INLINE {
        w[z].first = _mm256_xor_si256(flips.first, Turned::Load(first + z * Turned::kBytes));
        w[z].second = _mm256_xor_si256(flips.second, Turned::Load(second + z * Turned::kBytes));
      });
      Unroll<M>([&](auto i) ALWAYS_INLINE {
        const Turned::Two x = words(i);
        Unroll<R>([&](auto z) ALWAYS_INLINE { Turned::MulAddFours(sum[i][z], w[z], x); });
      });
    });
  }
  if (!direct) {
    int32_t* c = b.c + i0 * kBlockN + j;
    Unroll<M * R>([&](auto i) ALWAYS_INLINE {
      Turned::StoreSums(c + i / R * kBlockN + i % R * Turned::kLanes32, sum[i / R][i % R]);
    });
    return;
  }
  const Epilogue& e = *b.epilogue;
  const float *w_scale = e.w_scale + j, *bias = e.bias ? e.bias + j : nullptr;
  const int64_t y_stride = e.stride;
  float* y = static_cast<float*>(e.y) + i0 * y_stride + j;
  Unroll<M * R>([&](auto i) ALWAYS_INLINE {
    constexpr int row = i / R, at = i % R * Turned::kLanes32;
    __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[row][i % R]), _mm256_set1_ps(rows[row].scale));
    value = _mm256_mul_ps(value, _mm256_loadu_ps(w_scale + at));
    if (bias) value = _mm256_add_ps(value, _mm256_loadu_ps(bias + at));
    _mm256_storeu_ps(y + row * y_stride + at, value);
  });
}

void MultiplyTurnedTiles(const Block& b, uint8_t* panel) {
  using Function = void (*)(const Block&, int64_t, int64_t, const uint8_t*, bool);
  static constexpr Function kTile[kTurnedRows] = {TurnedTile<1>, TurnedTile<2>, TurnedTile<3>, TurnedTile<4>};
  const Epilogue& e = *b.epilogue;
  const bool direct = e.type == Type::kF32 && !e.extra && !e.residual && b.n == kBlockN;
  for (int64_t j = 0; j < b.n; j += Turned::kTileN) {
    PackTurned(b.w + j * b.k, b.k, b.n - j, panel);
    for (int64_t i = 0; i < b.m; i += kTurnedRows) {
      const int64_t m = b.m - i < kTurnedRows ? b.m - i : kTurnedRows;
      kTile[m - 1](b, i, j, panel, direct);
    }
  }
  if (!direct) Finish(e, 0, b.m);
}

// How far ahead a weight is fetched, in what is read one after the other: rows of 4096 columns by whole rows would be
// more lines of one set of the L1 cache than it holds, and a Zen 3's own fetching ends with a page.
constexpr int64_t kAhead = 1024;

// Up to kDotsRows rows of weights of a block that are multiplied one after the other, N at a time.
//
// Weights in a cache are read in the order of their rows. Those in memory are four streams, each a quarter of a block:
// a Zen 3 reads rows of 576 columns 1.7 times as fast that way as side by side (docs/results/cpu.md).
struct WeightRows {
  static constexpr int kStreams = 4, kStreamRows = static_cast<int>(kBlockN) / kStreams;
  int64_t first;
  int count;
  int64_t apart, after;  // of rows that are multiplied at a time, and of the first of four and of the next four
  int64_t left, less;    // how many are read without a gap from the first on, and how many fewer from the next four on

  static WeightRows SideBySide(int64_t first, int count) { return {first, count, 1, kStreams, 1, 0}; }
  static WeightRows Streams(int64_t first) { return {first, kDotsRows, kStreamRows, 1, kStreamRows - first, 1}; }
  int64_t at(int q) const { return first + q % kStreams * apart + q / kStreams * after; }
  int64_t left_at(int q) const { return left - q / kStreams * less; }
  // How many are left out behind those, where n are multiplied at a time.
  int64_t gap(int n) const { return apart == 1 ? n - 1 : kBlockN - kStreamRows; }
};

// c[M][N] of rows from i0 on, whose turned codes are x, = their products with N rows of weights after N, all of them in
// twos.
template <int M, int N>
void TurnedTwos(const Block& b, const int8_t* x, int64_t i0, const WeightRows& rows) {
  const int64_t k = b.k, stride = b.stride, whole = k / 64 * 64, apart = rows.apart * k;
  const int8_t* flips = x + kTurnedRows * stride;
  const int64_t gap = rows.gap(N) * k;
  for (int q = 0; q < rows.count; q += N) {
    const int64_t left = rows.left_at(q) * k;
    const int8_t* w = b.w + rows.at(q) * k;
    Turned::Sums sum[M][N];
    Unroll<M * N>([&](auto i) ALWAYS_INLINE { sum[i / N][i % N] = Turned::Zero(); });
    const auto multiply = [&](const int8_t* from, int64_t from_stride, int64_t t) ALWAYS_INLINE {
      if (i0 == 0) {
        const int64_t ahead = t + kAhead < left ? t + kAhead : t + kAhead + gap;
        Unroll<N>([&](auto n) ALWAYS_INLINE { __builtin_prefetch(w + n * apart + ahead, 0, 3); });
      }
      Unroll<2>([&](auto half) ALWAYS_INLINE {
        const int64_t at = t + half * 32;
        __m256i weights[N];
        Unroll<N>([&](auto n) ALWAYS_INLINE {
          weights[n] = _mm256_xor_si256(Turned::Load(from + n * from_stride + half * 32), Turned::Load(flips + at));
        });
        Unroll<M>([&](auto i) ALWAYS_INLINE {
          const __m256i codes = Turned::Load(x + i * stride + at);
          Unroll<N>([&](auto n) ALWAYS_INLINE { Turned::MulAddPairs(sum[i][n], weights[n], codes); });
        });
      });
    };
    for (int64_t t = 0; t < whole; t += 64) multiply(w + t, apart, t);
    if (whole != k) {
      int8_t padded[N][64] = {};
      for (int n = 0; n < N; ++n) std::memcpy(padded[n], w + n * apart + whole, static_cast<size_t>(k - whole));
      multiply(padded[0], 64, whole);
    }
    int32_t out[(M * N + 3) / 4 * 4] = {};
    Unroll<(M * N) / 4>([&](auto q) ALWAYS_INLINE {
      const auto of = [&](int i) ALWAYS_INLINE { return sum[(4 * q + i) / N][(4 * q + i) % N]; };
      Turned::Sum4(of(0), of(1), of(2), of(3), out + 4 * q);
    });
    Unroll<M * N>([&](auto i) ALWAYS_INLINE {
      if constexpr (i >= M * N / 4 * 4) out[i] = Turned::Sum(sum[i / N][i % N]);
      const auto all = static_cast<uint32_t>(out[i]) + static_cast<uint32_t>(b.rows[i0 + i / N].turned);
      b.c[(i0 + i / N) * kBlockN + rows.at(q) + i % N * rows.apart] = static_cast<int32_t>(all);
    });
  }
}

// The same of kPairedRows rows or more, in fours where they fit.
template <int M, int N>
void TurnedDots(const Block& b, const int8_t* x, int64_t i0, const WeightRows& rows) {
  static_assert(M >= kPairedRows && M * N <= 8);
  constexpr int64_t kWidth = kTurnedWidth * 64;
  const int64_t k = b.k, whole = k / 64 * 64, apart = rows.apart, gap = rows.gap(N) * k;
  const Step *const steps = StepAt(x + kTurnedWidth * b.stride, 0), *const steps_end = steps + whole / 64;
  const int64_t in_fours = steps->fours;
  alignas(32) int32_t first[8] = {};
  for (int i = 0; i < M * N; ++i) first[i] = b.rows[i0 + i / N].turned;
  for (int q = 0; q < rows.count; q += N) {
    const int64_t row = rows.at(q), left = rows.left_at(q) * k;
    Turned::Sums sum[8];
    Unroll<8>([&](auto i) ALWAYS_INLINE { sum[i] = Turned::Zero(); });
    const int8_t* w[N];
    Unroll<N>([&](auto n) ALWAYS_INLINE {
      w[n] = b.w + (row + n * apart) * k;
      asm("" : "+r"(w[n]));  // in a register, and not as a sum
    });
    const auto multiply = [&](auto fours, const int8_t* codes, const int8_t* const(&lines)[N],
                              const int64_t (&from)[2]) ALWAYS_INLINE {
      const int8_t* flips = codes + kTurnedRows * 64;
      Turned::Two weights[N];
      Unroll<N>([&](auto n) ALWAYS_INLINE {
        weights[n].first = _mm256_xor_si256(Turned::Load(lines[n] + from[0]), Turned::Load(flips));
        weights[n].second = _mm256_xor_si256(Turned::Load(lines[n] + from[1]), Turned::Load(flips + 32));
      });
      Unroll<M * N>([&](auto i) ALWAYS_INLINE {
        const int8_t* at = codes + i / N * 64;
        if constexpr (fours) {
          Turned::MulAddFours(sum[i], weights[i % N], {Turned::Load(at), Turned::Load(at + 32)});
        } else {
          Turned::MulAddPairs(sum[i], weights[i % N].first, Turned::Load(at));
          Turned::MulAddPairs(sum[i], weights[i % N].second, Turned::Load(at + 32));
        }
      });
    };
    const auto fetch = [&](int64_t t) ALWAYS_INLINE {
      if (i0 > 0) return;
      const int64_t ahead = t + kAhead < left ? t + kAhead : t + kAhead + gap;
      Unroll<N>([&](auto n) ALWAYS_INLINE { __builtin_prefetch(w[n] + ahead, 0, 3); });
    };
    const int8_t* codes = x;
    const Step* step = steps;
    int64_t t = 0;
    for (; t < in_fours; t += 64, codes += kWidth, ++step) {
      fetch(t);
      multiply(std::true_type(), codes, w, step->from);
    }
    codes = x + whole * kTurnedWidth;
    for (step = steps_end; t < whole; t += 64) {  // twos stand in the order of their columns from the end on
      codes -= kWidth;
      --step;
      fetch(t);
      multiply(std::false_type(), codes, w, step->from);
    }
    if (whole != k) {
      int8_t padded[N][64] = {};
      const int8_t* rest[N];
      for (int n = 0; n < N; ++n) {
        rest[n] = padded[n];
        std::memcpy(padded[n], w[n] + whole, static_cast<size_t>(k - whole));
      }
      multiply(std::false_type(), x + whole * kTurnedWidth, rest, {0, 32});
    }
    int32_t out[8];
    Turned::StoreSums(out, Turned::Add(Turned::Sum8(sum), Turned::LoadSums(first)));
    int32_t* const c = b.c + i0 * kBlockN + row;
    Unroll<M * N>([&](auto i) ALWAYS_INLINE { c[i / N * kBlockN + i % N * apart] = out[i]; });
  }
}

// c[M] += high parts of these rows times the groups of the plan.
template <int M>
void AddPlanned(const FourRows& four, const uint8_t* panel, int32_t* c) {
  constexpr int R = Turned::kRegisters;
  for (const int32_t* end = c + kBlockN; c < end; c += Turned::kTileN, panel += Turned::kTileN * 4) {
    Turned::Sums sum[M][R];
    const auto at = [&](int i) ALWAYS_INLINE { return c + i / R * kBlockN + i % R * Turned::kLanes32; };
    Unroll<M * R>([&](auto i) ALWAYS_INLINE { sum[i / R][i % R] = Turned::LoadSums(at(i)); });
    AddHighParts<M, kBlockN * 4>(four, panel, sum);
    Unroll<M * R>([&](auto i) ALWAYS_INLINE { Turned::StoreSums(at(i), sum[i / R][i % R]); });
  }
}

// For few rows. The plan lists the groups that hold a high part; words name their places in it.
void MultiplyTurnedDots(const Block& b, uint8_t* panel) {
  using Function = void (*)(const Block&, const int8_t*, int64_t, const WeightRows&);
  static constexpr Function kWhole[kTurnedRows] = {TurnedTwos<1, 4>, TurnedTwos<2, 4>, TurnedDots<3, 2>,
                                                   TurnedDots<4, 2>};
  static constexpr Function kSingle[kTurnedRows] = {TurnedTwos<1, 1>, TurnedTwos<2, 1>, TurnedDots<3, 1>,
                                                    TurnedDots<4, 1>};
  static constexpr void (*kHigh[kTurnedRows])(const FourRows&, const uint8_t*, int32_t*) = {
      AddPlanned<1>, AddPlanned<2>, AddPlanned<3>, AddPlanned<4>};
  const HiGroups groups(*b.plan);
  const auto multiply = [&](const WeightRows& rows) {
    const Function* function = rows.count == kDotsRows ? kWhole : kSingle;
    for (int64_t i = 0; i < b.m; i += kTurnedRows) {
      const int64_t m = b.m - i < kTurnedRows ? b.m - i : kTurnedRows;
      const int8_t* x = b.turned + i * kTurnedLines * b.stride;
      if (b.fours[i / kTurnedRows].alone) {
        for (int64_t r = 0; r < m; ++r, x += kTurnedLines * b.stride) function[0](b, x, i + r, rows);
      } else {
        function[m - 1](b, x, i, rows);
      }
    }
  };
  if (b.from == From::kMemory && b.n == kBlockN) {
    constexpr int64_t kRows = kDotsRows / WeightRows::kStreams;  // of each stream
    for (int64_t first = 0; first < WeightRows::kStreamRows; first += kRows) {
      multiply(WeightRows::Streams(first));
      if (groups.count > 0) {
        GatherGroups<WeightRows::kStreams>(b, groups, first, kDotsRows, panel, WeightRows::kStreamRows);
      }
    }
  } else {
    for (int64_t j = 0; j < b.n;) {
      const int count = j + kDotsRows <= b.n ? kDotsRows : 1;
      multiply(WeightRows::SideBySide(j, count));
      if (groups.count > 0) GatherGroups(b, groups, j, count, panel);
      j += count;
    }
  }
  for (int64_t i = 0; groups.count > 0 && i < b.m; i += kTurnedRows) {
    const int64_t m = b.m - i < kTurnedRows ? b.m - i : kTurnedRows;
    kHigh[m - 1](b.fours[i / kTurnedRows], panel, b.c + i * kBlockN);
  }
  Finish(*b.epilogue, 0, b.m);
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_TURNED_AVX2_H_
