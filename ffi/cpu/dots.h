// Small products of the rungs with registers of 128 and 256 bits: dot products along the rows of weights as they lie.
//
// V, the traits of an instruction set, says here:
//   Sums, Weights, Codes   registers: of int32, of kDot weights of one row, of kDot codes of one row
//   kLanes32               int32 in a register
//   kOffset                weights are flipped to unsigned, w + 128; 128 * sum(codes) is taken off again
//   kDotsTeam              rows of activations at once at most, up to kDotsM
//   Zero, Add, LoadSums, StoreSums, Shift7 (times 128)
//   LoadWeights, LoadCodes, MulAdd(sums, weights, codes): some sum of products per lane, exact modulo 2^32
//   Sum4(a, b, c, d, out)  out[0..3] += the sums over the lanes of each
//   Sum(a)
//   MulAddWords(sums, w, four)   lane j += the product of the j-th word of four weights, as they lie, and a word of
//   codes kDotsN[m - 1]          rows of weights at once for m = 1..4: one or a multiple of 2 that divides 8
// See row_math.h for what such a file must not do.
#ifndef JAXINT8_FFI_CPU_DOTS_H_
#define JAXINT8_FFI_CPU_DOTS_H_

#include <cstdint>
#include <cstring>

#include "int8.h"
#include "rows.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

constexpr int kDotsM = 4;
constexpr int kDotsRows = 8;  // of weights: as many as are read from a cache again; every number at once divides it
// How far ahead weights are fetched: a microsecond of reading.
constexpr int64_t kAheadBytes = 32 << 10;

// What a sum starts from: -128 * the sum of the codes where weights are flipped.
template <class V>
inline int32_t Correction(const Row& row) {
  return V::kOffset ? static_cast<int32_t>(0u - (static_cast<uint32_t>(row.sum) << 7)) : 0;
}

// c[M][N] = M x N dot products, N rows of weights after N from j to j_end. `ahead` is what to fetch meanwhile.
template <class V, int M, int N, bool kDense>
void Dots(const Block& b, int64_t i0, int64_t j0, int64_t j_end, const int8_t* ahead) {
  using Sums = typename V::Sums;
  const int64_t k = b.k, stride = b.stride, whole = k / 64 * 64;
  const int8_t* x = b.lo + i0 * stride;
  const int8_t* hi = kDense ? b.plan->hi : nullptr;
  for (int64_t first = j0; first < j_end; first += N, ahead += N * k) {
    const int8_t* w = b.w + first * k;
    Sums acc[M][N], high[kDense ? M : 1][N];
    Unroll<M * N>([&](auto i) ALWAYS_INLINE { acc[i / N][i % N] = V::Zero(); });
    if constexpr (kDense) Unroll<M * N>([&](auto i) ALWAYS_INLINE { high[i / N][i % N] = V::Zero(); });
    // The last, partial 64 columns are copied and padded, so that there is one loop: with two, the compiler moves every
    // sum from register to register in each step. The codes are padded with zeros as they come.
    int8_t padded[N][64];
    if (whole != k) {
      for (int j = 0; j < N; ++j) {
        std::memcpy(padded[j], w + j * k + whole, static_cast<size_t>(k - whole));
        std::memset(padded[j] + (k - whole), 0, static_cast<size_t>(64 - (k - whole)));
      }
    }
    const int8_t* from = w;
    int64_t from_stride = k, t = 0;
    for (int64_t stop = whole;;) {
      for (; t < stop; t += 64, from += 64) {
        // Of two adjacent lines one is fetched, the other follows by itself. Nothing is read, so any address will do.
        if constexpr (N > 1) {
          const int8_t* fetch = ahead + (t % 128 == 0 ? t : t - 64 + N / 2 * k);
          Unroll<N / 2>([&](auto j) ALWAYS_INLINE { __builtin_prefetch(fetch + j * k, 0, 2); });
        }
        Unroll<64 / V::kDot>([&](auto s) ALWAYS_INLINE {
          typename V::Codes codes[M], codes_hi{};
          Unroll<M>([&](auto i) ALWAYS_INLINE { codes[i] = V::LoadCodes(x + i * stride + t + s * V::kDot); });
          if constexpr (kDense) codes_hi = V::LoadCodes(hi + t + s * V::kDot);
          Unroll<N>([&](auto j) ALWAYS_INLINE {
            const typename V::Weights weights = V::LoadWeights(from + j * from_stride + s * V::kDot);
            Unroll<M>([&](auto i) ALWAYS_INLINE {
              acc[i][j] = V::MulAdd(acc[i][j], weights, codes[i]);
              if constexpr (kDense) high[i][j] = V::MulAdd(high[i][j], weights, codes_hi);
            });
          });
        });
      }
      if (t >= k) break;
      from = padded[0];
      from_stride = 64;
      stop = k;
    }
    if constexpr (kDense) {
      Unroll<M * N>(
          [&](auto i) ALWAYS_INLINE { acc[i / N][i % N] = V::Add(acc[i / N][i % N], V::Shift7(high[i / N][i % N])); });
    }
    Unroll<M>([&](auto i) ALWAYS_INLINE {
      int32_t* c = b.c + (i0 + i) * kBlockN + first;
      const int32_t correction = Correction<V>(b.rows[i0 + i]);
      Unroll<N>([&](auto j) ALWAYS_INLINE { c[j] = correction; });
      if constexpr (N % 4 == 0) {
        Unroll<N / 4>([&](auto q) ALWAYS_INLINE {
          V::Sum4(acc[i][4 * q], acc[i][4 * q + 1], acc[i][4 * q + 2], acc[i][4 * q + 3], c + 4 * q);
        });
      } else {
        Unroll<N>([&](auto j) ALWAYS_INLINE {
          c[j] = static_cast<int32_t>(static_cast<uint32_t>(c[j]) + static_cast<uint32_t>(V::Sum(acc[i][j])));
        });
      }
    });
  }
}

using DotsFunction = void (*)(const Block&, int64_t, int64_t, int64_t, const int8_t*);

template <class V, int M, int N>
constexpr DotsFunction DotsOf() {
  if constexpr (M <= V::kDotsTeam) return Dots<V, M, N, false>;
  return nullptr;
}

template <class V>
struct DotsTable {
  static constexpr DotsFunction kWhole[kDotsM] = {DotsOf<V, 1, V::kDotsN[0]>(), DotsOf<V, 2, V::kDotsN[1]>(),
                                                  DotsOf<V, 3, V::kDotsN[2]>(), DotsOf<V, 4, V::kDotsN[3]>()};
  static constexpr DotsFunction kSingle[kDotsM] = {DotsOf<V, 1, 1>(), DotsOf<V, 2, 1>(), DotsOf<V, 3, 1>(),
                                                   DotsOf<V, 4, 1>()};
};

// The groups of four columns whose weights are gathered for the high parts: those of the plan, or of a single row its
// own words (then a slot is the number of a word).
struct HiGroups {
  const Row* single;  // or null
  const HiPlan* plan;
  int64_t count;

  explicit HiGroups(const Block& b) : single(b.m == 1 ? b.rows : nullptr), plan(b.plan), count(0) {
    // Many rows have no plan, and come here only where there are no columns either.
    if (b.with_hi) count = single ? single->words : plan ? plan->groups : 0;
  }
  explicit HiGroups(const HiPlan& of) : single(nullptr), plan(&of), count(of.groups) {}
  int64_t column(int64_t g) const { return int64_t{single ? single->hi[g].group : plan->group[g]} * 4; }
};

// Moves these groups, rows j.. of weights, into a panel [group][kBlockN][4]. To be called while the rows are in a
// cache. In runs, of kDotsRows rows, these start so many rows apart.
template <int kRuns = 1>
void GatherGroups(const Block& b, const HiGroups& groups, int64_t j, int64_t rows, uint8_t* panel, int64_t apart = 0) {
  int64_t whole = groups.count;  // the last group may be cut off by the end of the row
  if (groups.column(whole - 1) + 4 > b.k) --whole;
  const int64_t k = b.k;  // read again after every store if it were not here
  const auto at = [&](int64_t i) ALWAYS_INLINE { return i / (kDotsRows / kRuns) * apart + i % (kDotsRows / kRuns); };
  for (int64_t g = 0; g < whole; ++g) {
    const int8_t* w = b.w + j * k + groups.column(g);
    uint8_t* out = panel + (g * kBlockN + j) * 4;
    if (rows == kDotsRows) {
      Unroll<kDotsRows>([&](auto i) ALWAYS_INLINE { std::memcpy(out + at(i) * 4, w + at(i) * k, 4); });
    } else {
      for (int64_t i = 0; i < rows; ++i) std::memcpy(out + at(i) * 4, w + at(i) * k, 4);
    }
  }
  if (whole == groups.count) return;
  const int64_t column = groups.column(whole);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = j + at(i);
    uint8_t* four = panel + (whole * kBlockN + row) * 4;
    std::memset(four, 0, 4);
    std::memcpy(four, b.w + row * b.k + column, static_cast<size_t>(b.k - column));
  }
}

// c += (hi . W) << 7 of all rows of a block.
template <class V>
void AddHiGroups(const Block& b, const HiGroups& groups, const uint8_t* panel) {
  constexpr int kRegisters = static_cast<int>(kBlockN) / V::kLanes32;
  const int32_t* slot = groups.single ? nullptr : groups.plan->slot;
  for (int64_t i = 0; i < b.m; ++i) {
    const Row& row = b.rows[i];
    typename V::Sums sum[kRegisters];
    Unroll<kRegisters>([&](auto z) ALWAYS_INLINE { sum[z] = V::Zero(); });
    for (int32_t word = 0; word < row.words; ++word) {
      const uint8_t* w = panel + (slot ? *slot++ : word) * kBlockN * 4;
      Unroll<kRegisters>(
          [&](auto z) ALWAYS_INLINE { sum[z] = V::MulAddWords(sum[z], w + z * V::kLanes32 * 4, row.hi[word].four); });
    }
    int32_t* c = b.c + i * kBlockN;
    Unroll<kRegisters>([&](auto z) ALWAYS_INLINE {
      int32_t* out = c + z * V::kLanes32;
      V::StoreSums(out, V::Add(V::LoadSums(out), V::Shift7(sum[z])));
    });
  }
}

// Of a single row: whether gathering the words of its high parts costs more than multiplying all columns once more (64
// loads and stores for each word, against half a cycle for 16 columns of 64 rows).
inline bool Dense(const Block& b) {
  if (!b.plan || !b.plan->dense) return false;
  return b.rows[0].words > HiPlan::kMaxGroups || int64_t{b.rows[0].words} * 22 > b.k;
}

// The weights are read once, in the order in which they lie. High parts need a plan. The panel of groups holds
// HiPlan::kMaxGroups * kBlockN * 4 bytes.
template <class V>
void MultiplyDots(const Block& b, uint8_t* panel) {
  const bool dense = Dense(b);
  const HiGroups groups(b);
  const bool gathers = !dense && groups.count > 0;
  const int64_t lead = (kAheadBytes / (b.k + 1) / 8 + 1) * 8;
  for (int64_t j = 0; j < b.n;) {
    const bool whole = j + kDotsRows <= b.n;
    const int64_t end = j + (whole ? kDotsRows : 1);
    const int64_t next = j + lead - b.n;  // beyond the block: the next block
    const int8_t* ahead = b.ahead && next >= 0 ? b.ahead + next * b.k : b.w + (j + lead) * b.k;
    constexpr int64_t kTeam = V::kDotsTeam;
    for (int64_t i = 0; i < b.m; i += kTeam) {
      const int64_t m = b.m - i < kTeam ? b.m - i : kTeam;
      DotsFunction function = (whole ? DotsTable<V>::kWhole : DotsTable<V>::kSingle)[m - 1];
      if (dense) function = whole ? Dots<V, 1, V::kDenseN, true> : Dots<V, 1, 1, true>;
      function(b, i, j, end, ahead);
    }
    if (gathers) GatherGroups(b, groups, j, end - j, panel);
    j = end;
  }
  if (gathers) AddHiGroups<V>(b, groups, panel);
  if (b.epilogue) Finish(*b.epilogue, 0, b.m);
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_DOTS_H_
