// The AVX512-VNNI rung (Ice Lake, Zen 4 and later; also Cascade Lake).
//
// vpdpbusd multiplies unsigned by signed bytes. Here the weight is the unsigned operand, w + 128 (one xor), and the
// activation code the signed one, so the correction, 128 * sum(codes of the row), is known from the quantiser and the
// weights need no sums, no copy and no format. All sums are modulo 2^32 and the final value fits, so they are exact.
//
// Small products are in this file: dot products along the rows of weights as they lie. Large ones: tiles_avx512.h.
#include <immintrin.h>

#include "int8.h"
#include "rows_avx512.h"
#include "tiles_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

bool Supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

// The sums of the lanes of four registers.
inline __m128i Sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Moves the groups of four columns of a HiPlan into a panel, rows j.. of weights, one word after the other. To be
// called while these rows are in the L1 cache.
void GatherGroups(const Block& b, int64_t j, int64_t rows, uint8_t* panel) {
  const HiPlan& plan = *b.plan;
  int64_t whole = plan.groups;  // the last group may be cut off by the end of the row
  if (plan.group[whole - 1] * 4 + 4 > b.k) --whole;
  for (const int64_t end = j + rows; j < end; ++j) {
    const int8_t* w = b.w + j * b.k;
    uint8_t* out = panel + j * 4;
    for (int64_t g = 0; g < whole; ++g, out += kBlockN * 4) std::memcpy(out, w + int64_t{plan.group[g]} * 4, 4);
    if (whole < plan.groups) {
      for (int64_t t = int64_t{plan.group[whole]} * 4, i = 0; t + i < b.k; ++i) out[i] = static_cast<uint8_t>(w[t + i]);
    }
  }
}

// c += (hi . W) << 7 of all rows of a block, as in a tile but from a panel that holds only the groups of the plan.
void AddHiGroups(const Block& b, uint8_t* panel) {
  const HiPlan& plan = *b.plan;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t v = 0; v < plan.groups * 4; ++v) {
    _mm512_store_si512(panel + v * 64, _mm512_xor_si512(_mm512_load_si512(panel + v * 64), flip));
  }
  const int32_t* slot = plan.slot;
  for (int64_t i = 0; i < b.m; ++i) {
    const Row& row = b.rows[i];
    __m512i sum[4];
    Unroll<4>([&](auto z) ALWAYS_INLINE { sum[z] = _mm512_setzero_si512(); });
    for (int32_t word = 0; word < row.words; ++word, ++slot) {
      const __m512i four = _mm512_set1_epi32(static_cast<int32_t>(row.hi[word].four));
      const uint8_t* w = panel + *slot * kBlockN * 4;
      Unroll<4>([&](auto z)
                    ALWAYS_INLINE { sum[z] = _mm512_dpbusd_epi32(sum[z], _mm512_load_si512(w + z * 64), four); });
    }
    int32_t* c = b.c + i * kBlockN;
    Unroll<4>([&](auto z) ALWAYS_INLINE {
      const __m512i high = _mm512_slli_epi32(sum[z], 7);
      _mm512_store_si512(c + z * 16, _mm512_add_epi32(_mm512_load_si512(c + z * 16), high));
    });
  }
}

// Which part of a block a group of dot products covers.
struct Part {
  int64_t i;           // the first row of activations
  int64_t j, j_end;    // rows of weights, a multiple of the N of the function
  int64_t begin, end;  // columns; begin is a multiple of 64, end too or the last
  // For each N rows of weights, 2 * pairs (pairs: 0, 1 or N / 2) rows that this thread reads soon are fetched into the
  // L2 cache at the pace of the reading, advancing by N rows. Of two adjacent lines one is fetched, the other follows
  // by itself: fetching both costs more than it brings (measured: 46 against 62 GB/s from the L3 cache, 18 against 21
  // GB/s from memory; no fetching at all gives 16 from memory).
  const int8_t* ahead;
  int pairs;
};

// c[M][N] (+)= M x N dot products, N rows of weights after N. The first part of the columns sets c.
template <int M, int N, bool kDense>
void Dots(const Block& b, const Part& part) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t k = b.k, stride = b.stride, begin = part.begin, whole_end = part.end / 64 * 64, end = part.end;
  const int8_t* x = b.lo + part.i * stride;
  const int8_t* hi = kDense ? b.plan->hi : nullptr;
  const int pairs = part.pairs;
  const int8_t* ahead = part.ahead;
  for (int64_t first = part.j; first < part.j_end; first += N, ahead += N * k) {
    const int8_t* w = b.w + first * k;
    __m512i acc[M][N], high[kDense ? M : 1][N];
    Unroll<M * N>([&](auto i) ALWAYS_INLINE { acc[i / N][i % N] = _mm512_setzero_si512(); });
    if constexpr (kDense) Unroll<M * N>([&](auto i) ALWAYS_INLINE { high[i / N][i % N] = _mm512_setzero_si512(); });
    // The last, partial 64 columns are copied and padded, so that there is one loop: with two, the compiler moves every
    // sum from register to register in each step.
    int8_t padded[N][64];
    if (whole_end != end) {
      Unroll<N>([&](auto j) ALWAYS_INLINE {
        _mm512_storeu_si512(padded[j], _mm512_maskz_loadu_epi8(FirstBytes(end - whole_end), w + j * k + whole_end));
      });
    }
    const int8_t* from = w + begin;
    int64_t from_stride = k, t = begin;
    for (int64_t stop = whole_end;;) {
      for (; t < stop; t += 64, from += 64) {
        const int8_t* fetch = ahead + (t % 128 == 0 ? t : t - 64 + pairs * k);
        if (pairs == N / 2) {
          Unroll<N / 2>([&](auto j) ALWAYS_INLINE { _mm_prefetch(fetch + j * k, _MM_HINT_T1); });
        } else if (pairs > 0) {
          _mm_prefetch(fetch, _MM_HINT_T1);
        }
        __m512i weights[N];
        Unroll<N>([&](auto j) ALWAYS_INLINE {
          weights[j] = _mm512_xor_si512(_mm512_loadu_si512(from + j * from_stride), flip);
        });
        Unroll<M>([&](auto i) ALWAYS_INLINE {
          const __m512i codes = _mm512_load_si512(x + i * stride + t);
          Unroll<N>([&](auto j) ALWAYS_INLINE { acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], weights[j], codes); });
          if constexpr (kDense) {
            const __m512i codes_hi = _mm512_load_si512(hi + t);
            Unroll<N>([&](auto j)
                          ALWAYS_INLINE { high[i][j] = _mm512_dpbusd_epi32(high[i][j], weights[j], codes_hi); });
          }
        });
      }
      if (t >= end) break;
      from = padded[0];
      from_stride = 64;
      stop = end;
    }
    if constexpr (kDense) {
      Unroll<M * N>([&](auto i) ALWAYS_INLINE {
        acc[i / N][i % N] = _mm512_add_epi32(acc[i / N][i % N], _mm512_slli_epi32(high[i / N][i % N], 7));
      });
    }
    Unroll<M>([&](auto i) ALWAYS_INLINE {
      int32_t* c = b.c + (part.i + i) * kBlockN + first;
      const int32_t correction = Correction(b.rows[part.i + i]);
      if constexpr (N % 4 == 0) {
        Unroll<N / 4>([&](auto q) ALWAYS_INLINE {
          auto* out = reinterpret_cast<__m128i*>(c + 4 * q);
          const __m128i sums = Sum4(acc[i][4 * q], acc[i][4 * q + 1], acc[i][4 * q + 2], acc[i][4 * q + 3]);
          _mm_storeu_si128(out, _mm_add_epi32(begin > 0 ? _mm_loadu_si128(out) : _mm_set1_epi32(correction), sums));
        });
      } else {
        static_assert(N == 1);
        c[0] = static_cast<int32_t>(static_cast<uint32_t>(begin > 0 ? c[0] : correction) +
                                    static_cast<uint32_t>(_mm512_reduce_add_epi32(acc[i][0])));
      }
    });
  }
}

// Rows of weights at once: at least 8 accumulators to hide the latency of a multiplication, at most 24.
using DotsFunction = void (*)(const Block&, const Part&);
struct DotsShape {
  int n;
  DotsFunction whole, single;  // n rows of weights, one row
};
constexpr int kDotsM = 6;
constexpr DotsShape kDots[kDotsM] = {
    {8, Dots<1, 8, false>, Dots<1, 1, false>}, {8, Dots<2, 8, false>, Dots<2, 1, false>},
    {4, Dots<3, 4, false>, Dots<3, 1, false>}, {4, Dots<4, 4, false>, Dots<4, 1, false>},
    {4, Dots<5, 4, false>, Dots<5, 1, false>}, {4, Dots<6, 4, false>, Dots<6, 1, false>}};
constexpr DotsShape kDenseDots = {8, Dots<1, 8, true>, Dots<1, 1, true>};
// Activations of a team that should stay in the L1 cache (32 KiB at least) while weights stream by: 6 rows of 4096.
constexpr int64_t kDotsBytes = 24 << 10;
// How far ahead weights are fetched: 8 rows of 4096; at 10 bytes per cycle, a microsecond.
constexpr int64_t kAheadBytes = 32 << 10;

// Small m: the weights are read once, in the order in which they lie, or nearly. Teams of up to 6 rows of activations
// take turns over a few rows of weights, at most half of the L1 cache.
void MultiplyDots(const Block& b) {
  const bool dense = b.plan && b.plan->dense;
  const int64_t teams = (b.m + kDotsM - 1) / kDotsM;
  const int64_t most = (b.m + teams - 1) / teams;
  const int64_t width = kDotsBytes / (dense ? 2 * most : most) / 64 * 64;
  const int64_t lead = (kAheadBytes / (b.k + 1) / 8 + 1) * 8;
  const bool gathers = b.plan && b.plan->groups > 0;
  const int64_t turn = teams == 1 && !gathers ? kBlockN : ((16 << 10) / (b.k + 1) / 8 + 1) * 8;
  uint8_t* const panel = reinterpret_cast<TileScratch*>(b.scratch)->panels[0];
  int64_t begin = 0;
  do {
    const int64_t end = begin + width < b.k ? begin + width : b.k;
    for (int64_t j = 0; j < b.n;) {
      const bool whole = j + 8 <= b.n;  // all shapes divide 8
      const int64_t rest = (b.n - j) / 8 * 8, rows = whole ? (turn < rest ? turn : rest) : 1;
      const int64_t next = j + lead - b.n;  // beyond the block: its next columns, or the next block
      const int8_t* ahead = next < 0                      ? b.w + (j + lead) * b.k
                            : end < b.k                   ? b.w + next * b.k + (end - begin)
                            : b.ahead && next < b.ahead_n ? b.ahead + next * b.k - begin
                                                          : nullptr;
      Part part{0, j, j + rows, begin, end, ahead, 0};
      for (int64_t team = 0; team < teams; ++team) {
        const int64_t size = b.m / teams + (team < b.m % teams);
        const DotsShape& shape = dense ? kDenseDots : kDots[size - 1];
        part.pairs = !ahead || !whole ? 0 : teams == 1 ? shape.n / 2 : team < 2 ? 1 : 0;
        (whole ? shape.whole : shape.single)(b, part);
        part.i += size;
        if (part.pairs == 1) part.ahead += 2 * b.k;
      }
      if (gathers && end == b.k) GatherGroups(b, j, rows, panel);
      j += rows;
    }
    begin = end;
  } while (begin < b.k);
  if (gathers) AddHiGroups(b, panel);
  if (b.epilogue) Finish(*b.epilogue, 0, b.m);
}

// Which way is cheaper, in cycles per 64 outputs beside the multiplications themselves (measured on Zen 4). Dot
// products: 1.2 * k and 77 per row (sums over lanes), 64 for each group of high parts. Tiles: 5 * k, for 16 rows and
// less the packing does not hide behind them, else 3 * k. Two rows and less are a matter of reading the weights.
void Multiply(const Block& b) {
  if (b.k == 0 || (b.m <= 2 && (b.plan || !b.with_hi))) return MultiplyDots(b);
  if (b.m <= kSmallM && (b.plan || !b.with_hi)) {
    const int64_t groups = b.plan ? b.plan->groups : 0;
    if (b.m * 77 + 64 * groups <= (b.m <= 16 ? 38 : 18) * b.k / 10) return MultiplyDots(b);
  }
  MultiplyTiled(b);
}

}  // namespace

extern const Rung kAvx512Vnni;
const Rung kAvx512Vnni = {"avx512_vnni", Supported, MarkRow, QuantizeRow, Multiply, kChunkM, sizeof(TileScratch)};

}  // namespace jaxint8::cpu
