// The strips of strips_avx512.h.
#include "strips_avx512.h"

#include <immintrin.h>

#include <array>
#include <cstring>
#include <utility>

#include "int8.h"
#include "rows_avx512.h"
#include "tiles_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

constexpr int64_t kStripN = 32, kStripK = 512;  // 16 KiB, half of the smallest L1 cache
constexpr int kStripM = 12;                     // 12 x 2 sums + 2 weights + 1 broadcast = 27 of 32 registers

// The weights of the next strip, as they lie: every kTurn steps of a tile fetch so many lines of them into the L2
// cache.
struct StripAhead {
  static constexpr int64_t kTurn = 4;  // divides the 16 steps of 64 columns

  const int8_t* at = nullptr;
  int64_t lines = 0;  // left
  int64_t each = 0;

  ALWAYS_INLINE void Fetch() {
    const int64_t now = each < lines ? each : lines;
    lines -= now;
    for (const int8_t* end = at + now * 64; at != end; at += 64) _mm_prefetch(at, _MM_HINT_T1);
  }
};

// c[M][16 * Z] (+)= x[M] . panel for rows first.. of a block and outputs from j on, high parts included; the first
// panel sets c.
template <bool kHigh, int Z, int M>
void Strip(const Block& b, int64_t first, int64_t j, const Panel& columns, StripAhead* ahead) {
  const Row* rows = b.rows + first;
  const int8_t* x = b.lo + first * b.stride + columns.begin;
  const uint8_t* panel = columns.data;
  const uint8_t* const end = panel + (columns.end - columns.begin + 63) / 64 * (16 * Z * 64);
  ForgetVectors();
  __m512i acc[M][Z];
  Unroll<M>([&](auto i) ALWAYS_INLINE {
    const __m512i correction = _mm512_set1_epi32(columns.begin == 0 ? Correction(rows[i]) : 0);
    Unroll<Z>([&](auto z) ALWAYS_INLINE { acc[i][z] = correction; });
    if constexpr (kHigh) {
      AddHi<Z>(rows[i], columns, reinterpret_cast<TileScratch*>(b.scratch)->next_hi + first + i, acc[i]);
    }
  });
  const int64_t stride = b.stride, stride3 = Thrice(stride);
  const int8_t *x4 = x + 4 * stride, *x8 = x + 8 * stride;
  do {
    ahead->Fetch();
    const uint8_t* const stop = panel + StripAhead::kTurn * Z * 64;
    do {
      __m512i w[Z];
      Unroll<Z>([&](auto z) ALWAYS_INLINE { w[z] = _mm512_load_si512(panel + z * 64); });
      Unroll<M>([&](auto i) ALWAYS_INLINE {
        const __m512i four = Broadcast(RowAt<i % 8>(i < 8 ? x : x8, x4, stride, stride3));
        Unroll<Z>([&](auto z) ALWAYS_INLINE { MulAddInPlace(acc[i][z], w[z], four); });
      });
      panel += Z * 64;
      x += 4, x4 += 4, x8 += 4;
    } while (panel != stop);
  } while (panel != end);
  // What comes after the loop is no reason to move sums about in it.
  Unroll<M * Z>([&](auto i) ALWAYS_INLINE { asm("" : "+v"(acc[i / Z][i % Z])); });
  int32_t* c = b.c + first * kBlockN + j;
  if (columns.begin > 0) {
    Unroll<M * Z>([&](auto i) ALWAYS_INLINE {
      const __m512i before = _mm512_load_si512(c + i / Z * kBlockN + i % Z * 16);
      acc[i / Z][i % Z] = _mm512_add_epi32(acc[i / Z][i % Z], before);
    });
  }
  Unroll<M * Z>([&](auto i) ALWAYS_INLINE { _mm512_store_si512(c + i / Z * kBlockN + i % Z * 16, acc[i / Z][i % Z]); });
}

using StripFunction = void (*)(const Block&, int64_t, int64_t, const Panel&, StripAhead*);
template <bool kHigh, int Z, int... kLess>
constexpr std::array<StripFunction, sizeof...(kLess)> StripsFrom(std::integer_sequence<int, kLess...>) {
  return {Strip<kHigh, Z, kLess + 1>...};
}
template <bool kHigh, int Z>
constexpr auto kStrips = StripsFrom<kHigh, Z>(std::make_integer_sequence<int, kStripM>{});

inline const StripFunction* StripsOf(bool with_hi, int registers) {
  if (registers == 1) return (with_hi ? kStrips<true, 1> : kStrips<false, 1>).data();
  return (with_hi ? kStrips<true, 2> : kStrips<false, 2>).data();
}

// Copies the weights of the groups of a plan from packed columns, of outputs from j on: a line for every 16 of them.
inline void CopyGroups(const HiPlan& plan, const Panel& columns, int64_t j, int registers, int64_t* next,
                       uint8_t* groups) {
  for (; *next < plan.groups && plan.group[*next] * 4 < columns.end; ++*next) {
    const uint8_t* from = columns.data + (plan.group[*next] - columns.begin / 4) * registers * 64;
    uint8_t* to = groups + (*next * kBlockN + j) * 4;
    for (int z = 0; z < registers; ++z) _mm512_store_si512(to + z * 64, _mm512_load_si512(from + z * 64));
  }
}

}  // namespace

void MultiplyStrips(const Block& b, uint8_t* groups) {
  auto* scratch = reinterpret_cast<TileScratch*>(b.scratch);
  scratch->job = 0;  // nothing is packed ahead here
  const int64_t tiles = (b.m + kStripM - 1) / kStripM;
  const int64_t width = PieceOf(b.k, kStripK);
  const bool adds_hi = b.with_hi && !b.plan;
  for (int64_t j = 0; j < b.n; j += kStripN) {
    const int64_t n = j + kStripN < b.n ? kStripN : b.n - j;
    const int registers = n > 16 ? 2 : 1;
    const StripFunction* const strip_of = StripsOf(adds_hi, registers);
    if (adds_hi) std::memset(scratch->next_hi, 0, static_cast<size_t>(b.m) * sizeof *scratch->next_hi);
    StripAhead ahead;
    if (j + kStripN < b.n || b.ahead) {
      const int64_t next = j + kStripN < b.n ? b.n - j - kStripN : b.ahead_n;
      ahead.at = j + kStripN < b.n ? b.w + (j + kStripN) * b.k : b.ahead;
      ahead.lines = (next < kStripN ? next : kStripN) * b.k / 64;
      const int64_t turns = tiles * ((b.k + 63) / 64) * (16 / StripAhead::kTurn);
      ahead.each = (ahead.lines + turns - 1) / turns;
    }
    int64_t next_group = 0;
    for (int64_t t = 0; t < b.k; t += width) {
      const int64_t end = t + width < b.k ? t + width : b.k;
      const Panel panel{scratch->panels[0], t, end};
      Pack(b.w + j * b.k + t, b.k, n, end - t, registers, scratch->panels[0]);
      if (b.plan) CopyGroups(*b.plan, panel, j, registers, &next_group, groups);
      int64_t i = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {  // heights differ by one at most, so that no tile is thin
        const int64_t rows = b.m / tiles + (tile < b.m % tiles);
        strip_of[rows - 1](b, i, j, panel, &ahead);
        i += rows;
      }
    }
  }
}

}  // namespace jaxint8::cpu
