// The AVX512-VNNI rung (Ice Lake, Zen 4 and later; also Cascade Lake).
//
// vpdpbusd multiplies unsigned by signed bytes. Here the weight is the unsigned operand, w + 128 (one xor), and the
// activation code the signed one, so the correction, 128 * sum(codes of the row), is known from the quantiser and the
// weights need no sums, no copy and no format. All sums are modulo 2^32 and the final value fits, so they are exact.
#include <immintrin.h>

#include "int8.h"
#include "rows_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

bool Supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

// Columns of one packed panel: 1024 * 64 outputs = 64 KiB, read from the L2 cache at 64 bytes per 6 multiplications
// (11 bytes per cycle with one multiplier, 21 with two), so that a tile of 6 rows is 6144 multiplications for the 48
// loads and stores of its accumulators.
constexpr int64_t kPanelK = 1024;
constexpr int kTileM = 6;  // 6 x 4 accumulators + 4 weights + 1 broadcast = 29 of 32 registers
constexpr int64_t kChunkM = 512;

// Writes 64 bytes of each of 16 weight rows as 16 registers of [16 outputs][4 columns]: a transposition of 16 x 16
// words of four bytes, 64 shuffles for 1 KiB. Rows and columns beyond the matrix become zero weights.
template <bool kWhole>
inline void PackSquare(const int8_t* w, int64_t stride, int64_t rows, int64_t bytes, uint8_t* panel,
                       int64_t panel_stride) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const __mmask64 mask = kWhole ? ~__mmask64{0} : FirstBytes(bytes);
  __m512i a[16], b[16];
  Unroll<16>([&](auto i) ALWAYS_INLINE {
    if constexpr (kWhole) {
      a[i] = _mm512_xor_si512(_mm512_loadu_si512(w + i * stride), flip);
    } else {
      a[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(i < rows ? mask : 0, w + (i < rows ? i * stride : 0)), flip);
    }
  });
  Unroll<8>([&](auto i) ALWAYS_INLINE {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  });
  Unroll<4>([&](auto r) ALWAYS_INLINE {
    a[4 * r] = _mm512_unpacklo_epi64(b[4 * r], b[4 * r + 2]);
    a[4 * r + 1] = _mm512_unpackhi_epi64(b[4 * r], b[4 * r + 2]);
    a[4 * r + 2] = _mm512_unpacklo_epi64(b[4 * r + 1], b[4 * r + 3]);
    a[4 * r + 3] = _mm512_unpackhi_epi64(b[4 * r + 1], b[4 * r + 3]);
  });
  // a[4 * r + q]: lane l holds columns 4 * (4 * l + q).. of rows 4 * r..4 * r + 3.
  Unroll<4>([&](auto q) ALWAYS_INLINE {
    const __m512i even01 = _mm512_shuffle_i32x4(a[q], a[4 + q], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(a[q], a[4 + q], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0xdd);
    _mm512_store_si512(panel + q * panel_stride, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_store_si512(panel + (4 + q) * panel_stride, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_store_si512(panel + (8 + q) * panel_stride, _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_store_si512(panel + (12 + q) * panel_stride, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  });
}

// [n][columns] -> [columns / 4][16 * registers][4], columns rounded up to a multiple of 64.
void Pack(const int8_t* w, int64_t stride, int64_t n, int64_t columns, int registers, uint8_t* panel) {
  for (int64_t t = 0; t < columns; t += 64) {
    for (int z = 0; z < registers; ++z) {
      const int64_t rows = n - z * 16, bytes = columns - t;
      uint8_t* out = panel + t / 4 * registers * 64 + z * 64;
      const int8_t* in = w + z * 16 * stride + t;
      if (rows >= 16 && bytes >= 64) {
        PackSquare<true>(in, stride, rows, bytes, out, registers * 64);
      } else {
        PackSquare<false>(in, stride, rows, bytes, out, registers * 64);
      }
    }
  }
}

inline __m512i Broadcast(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

// c[M][16 * Z] += x[M] . panel over `blocks` times 64 columns. Meanwhile it fetches the same columns of `ahead_rows`
// rows of weights into the L2 cache: the rows of a panel lie k bytes apart, where no hardware prefetcher looks.
template <int M, int Z>
void Tile(const uint8_t* panel, const int8_t* x, int64_t stride, int64_t blocks, int32_t* c, const int8_t* ahead,
          int64_t ahead_stride, int64_t ahead_rows) {
  __m512i acc[M][Z];
  Unroll<M * Z>([&](auto i) ALWAYS_INLINE { acc[i / Z][i % Z] = _mm512_load_si512(c + i / Z * kBlockN + i % Z * 16); });
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < ahead_rows; ++i) _mm_prefetch(ahead + i * ahead_stride + block * 64, _MM_HINT_T1);
    for (int g = 0; g < 16; ++g) {
      __m512i w[Z];
      Unroll<Z>([&](auto z) ALWAYS_INLINE { w[z] = _mm512_load_si512(panel + z * 64); });
      Unroll<M>([&](auto i) ALWAYS_INLINE {
        const __m512i four = Broadcast(x + i * stride);
        Unroll<Z>([&](auto z) ALWAYS_INLINE { acc[i][z] = _mm512_dpbusd_epi32(acc[i][z], w[z], four); });
      });
      panel += Z * 64;
      x += 4;
    }
  }
  Unroll<M * Z>([&](auto i) ALWAYS_INLINE { _mm512_store_si512(c + i / Z * kBlockN + i % Z * 16, acc[i / Z][i % Z]); });
}

using TileFunction = void (*)(const uint8_t*, const int8_t*, int64_t, int64_t, int32_t*, const int8_t*, int64_t,
                              int64_t);
constexpr TileFunction kTiles[4][kTileM] = {
    {Tile<1, 1>, Tile<2, 1>, Tile<3, 1>, Tile<4, 1>, Tile<5, 1>, Tile<6, 1>},
    {Tile<1, 2>, Tile<2, 2>, Tile<3, 2>, Tile<4, 2>, Tile<5, 2>, Tile<6, 2>},
    {Tile<1, 3>, Tile<2, 3>, Tile<3, 3>, Tile<4, 3>, Tile<5, 3>, Tile<6, 3>},
    {Tile<1, 4>, Tile<2, 4>, Tile<3, 4>, Tile<4, 4>, Tile<5, 4>, Tile<6, 4>},
};

// -128 * the sum of the codes: cancels the offset of the unsigned weights.
inline int32_t Correction(const Row& row) { return static_cast<int32_t>(0u - (static_cast<uint32_t>(row.sum) << 7)); }

// c += (hi . W) << 7 for the high parts of one row that lie before column `end`: one multiplication per 16 outputs and
// group of four columns. Returns the first word that lies after. Four words at a time, missing ones with zero codes,
// because how many there are is anyone's guess, and a wrong guess costs the processor more than four words.
template <int Z>
inline int32_t AddHi(const Row& row, int32_t next, int64_t begin, int64_t end, const uint8_t* panel, __m512i (&c)[Z]) {
  int32_t stop = next;
  while (stop < row.words && row.hi[stop].group * 4 < end) ++stop;
  __m512i sum[Z];
  Unroll<Z>([&](auto z) ALWAYS_INLINE { sum[z] = _mm512_setzero_si512(); });
  for (; next < stop; next += 4) {
    Unroll<4>([&](auto i) ALWAYS_INLINE {
      const bool real = next + i < stop;
      const HiWord word = row.hi[real ? next + i : next];
      const __m512i four = _mm512_set1_epi32(static_cast<int32_t>(real ? word.four : 0));
      const uint8_t* w = panel + (word.group - begin / 4) * Z * 64;
      Unroll<Z>([&](auto z)
                    ALWAYS_INLINE { sum[z] = _mm512_dpbusd_epi32(sum[z], _mm512_load_si512(w + z * 64), four); });
    });
  }
  Unroll<Z>([&](auto z) ALWAYS_INLINE { c[z] = _mm512_add_epi32(c[z], _mm512_slli_epi32(sum[z], 7)); });
  return stop;
}

// Starts the sums of all rows for one panel: the correction (first panel) and the high parts.
template <int Z>
void StartRows(const Block& b, int64_t begin, int64_t end, const uint8_t* panel, int32_t* next) {
  for (int64_t i = 0; i < b.m; ++i) {
    const Row& row = b.rows[i];
    int32_t* c = b.c + i * kBlockN;
    if (begin == 0) next[i] = 0;
    const bool adds = b.with_hi && next[i] < row.words && row.hi[next[i]].group * 4 < end;
    if (begin > 0 && !adds) continue;
    __m512i sum[Z];
    Unroll<Z>(
        [&](auto z) { sum[z] = begin == 0 ? _mm512_set1_epi32(Correction(row)) : _mm512_load_si512(c + z * 16); });
    if (adds) next[i] = AddHi<Z>(row, next[i], begin, end, panel, sum);
    Unroll<Z>([&](auto z) ALWAYS_INLINE { _mm512_store_si512(c + z * 16, sum[z]); });
  }
}

using StartFunction = void (*)(const Block&, int64_t, int64_t, const uint8_t*, int32_t*);
constexpr StartFunction kStart[4] = {StartRows<1>, StartRows<2>, StartRows<3>, StartRows<4>};

// Large m: packs a panel of 64 outputs by at most kPanelK columns and runs all rows over it.
void MultiplyTiled(const Block& b) {
  const int registers = static_cast<int>((b.n + 15) / 16);
  uint8_t* panel = b.scratch;
  auto* next = reinterpret_cast<int32_t*>(b.scratch + kPanelK * kBlockN);
  const int64_t tiles = (b.m + kTileM - 1) / kTileM;
  const int64_t panels = (b.k + kPanelK - 1) / kPanelK;
  const int64_t width = panels ? ((b.k + panels - 1) / panels + 63) / 64 * 64 : 0;
  if (panels == 0) kStart[registers - 1](b, 0, 0, panel, next);
  for (int64_t t = 0; t < b.k; t += width) {
    const int64_t end = t + width < b.k ? t + width : b.k;
    Pack(b.w + t, b.k, b.n, end - t, registers, panel);
    kStart[registers - 1](b, t, end, panel, next);
    const int8_t* ahead = end < b.k ? b.w + end : b.ahead;
    int64_t i = 0, fetched = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {  // heights differ by one at most, so that no tile is thin
      const int64_t rows = b.m / tiles + (tile < b.m % tiles);
      const int64_t fetch = ahead ? (tile + 1) * b.n / tiles - fetched : 0;
      kTiles[registers - 1][rows - 1](panel, b.lo + i * b.stride + t, b.stride, (end - t + 63) / 64, b.c + i * kBlockN,
                                      ahead + fetched * b.k, b.k, fetch);
      i += rows;
      fetched += fetch;
    }
  }
}

// The sums of the lanes of four registers.
inline __m128i Sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Rows of weights that are read side by side; every shape of dot products divides it.
constexpr int kDotsN = 8;
using Gathered = __m512i[HiPlan::kMaxGroups][kDotsN];

// Gathers the weights of all groups of a HiPlan from N rows of weights, as unsigned bytes.
template <int N>
void Gather(const HiPlan& plan, const int8_t* w, int64_t k, Gathered& out) {
  for (int64_t group = 0; group < plan.groups; ++group) {
    for (int i = 0; i < N; ++i) {
      alignas(64) uint8_t slots[64] = {};
      for (int32_t s = plan.segment_start[group]; s < plan.segment_start[group + 1]; ++s) {
        const HiPlan::Segment& segment = plan.segments[s];
        for (uint64_t mask = segment.mask; mask; mask &= mask - 1) {
          const int slot = __builtin_ctzll(mask);
          slots[slot] = static_cast<uint8_t>(w[i * k + segment.column + segment.lane[slot]] ^ 0x80);
        }
      }
      out[group][i] = _mm512_load_si512(slots);
    }
  }
}

template <int N>
__attribute__((target("avx512vbmi"))) void GatherVbmi(const HiPlan& plan, const int8_t* w, int64_t k, Gathered& out) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t group = 0; group < plan.groups; ++group) {
    __m512i slots[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) slots[i] = _mm512_setzero_si512();
    for (int32_t s = plan.segment_start[group]; s < plan.segment_start[group + 1]; ++s) {
      const HiPlan::Segment& segment = plan.segments[s];
      const __m512i lane = _mm512_loadu_si512(segment.lane);
      const __mmask64 inside = FirstBytes(k - segment.column), mask = segment.mask;
      const int8_t* from = w + segment.column;
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const __m512i columns = _mm512_maskz_loadu_epi8(inside, from + i * k);
        slots[i] = _mm512_mask_permutexvar_epi8(slots[i], mask, lane, columns);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) out[group][i] = _mm512_xor_si512(slots[i], flip);
  }
}

// Which part of a block a group of dot products covers.
struct Part {
  int64_t i, j;             // the first row of activations, the first row of weights
  int64_t begin, end;       // columns; begin is a multiple of 64, end too or the last
  const __m512i* gathered;  // high parts: the group g of row j + r is gathered[g * kDotsN + r]
  int64_t hi_groups;        // 0 unless this part is to add them
  // Two rows of weights that this thread reads soon are fetched into the L2 cache at the pace of the reading, `pairs`
  // times (0, 1 or N / 2). Of two adjacent lines one is fetched, the other follows by itself: more would cost more
  // (measured: 62 against 46 GB/s from the L3 cache, 21 against 18 GB/s from memory, where no fetching gives 16).
  const int8_t* ahead;
  int pairs;
};

// c[M][N] (+)= M x N dot products, straight from the rows of weights. The first part of the columns sets c.
template <int M, int N, bool kDense>
void Dots(const Block& b, const Part& part) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t k = b.k, stride = b.stride;
  const int8_t* w = b.w + part.j * k;
  const int8_t* x = b.lo + part.i * stride;
  const int64_t width = b.plan ? b.plan->groups * 64 : 0;
  const int8_t* hi = width ? b.plan->hi + part.i * width : nullptr;
  const int pairs = part.pairs;
  const int8_t* const ahead[2] = {part.ahead, part.ahead + pairs * k - 64};
  __m512i acc[M][N], high[kDense ? M : 1][N];
  Unroll<M * N>([&](auto i) ALWAYS_INLINE { acc[i / N][i % N] = _mm512_setzero_si512(); });
  if constexpr (kDense) Unroll<M * N>([&](auto i) ALWAYS_INLINE { high[i / N][i % N] = _mm512_setzero_si512(); });
  if (!kDense && part.hi_groups > 0) {  // first, so that they are shifted once
    for (int64_t group = 0; group < part.hi_groups; ++group) {
      const __m512i* gathered = part.gathered + group * kDotsN;
      Unroll<M>([&](auto i) ALWAYS_INLINE {
        const __m512i codes = _mm512_load_si512(hi + i * width + group * 64);
        Unroll<N>([&](auto j) ALWAYS_INLINE {
          acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], _mm512_load_si512(gathered + j), codes);
        });
      });
    }
    Unroll<M * N>([&](auto i) ALWAYS_INLINE { acc[i / N][i % N] = _mm512_slli_epi32(acc[i / N][i % N], 7); });
  }
  // The last, partial 64 columns are copied and padded, so that there is one loop: with two, the compiler moves every
  // sum from register to register in each step.
  const int64_t rest = part.end % 64;
  int8_t padded[N][64];
  if (rest != 0) {
    Unroll<N>([&](auto j) ALWAYS_INLINE {
      _mm512_storeu_si512(padded[j], _mm512_maskz_loadu_epi8(FirstBytes(rest), w + j * k + part.end - rest));
    });
  }
  const int8_t* from = w + part.begin;
  int64_t from_stride = k, t = part.begin;
  for (int64_t end = part.end - rest;;) {
    for (; t < end; t += 64, from += 64) {
      const int8_t* fetch = ahead[t / 64 % 2] + t;
      if (pairs == N / 2) {
        Unroll<N / 2>([&](auto j) ALWAYS_INLINE { _mm_prefetch(fetch + j * k, _MM_HINT_T1); });
      } else if (pairs > 0) {
        _mm_prefetch(fetch, _MM_HINT_T1);
      }
      __m512i weights[N];
      Unroll<N>([&](auto j)
                    ALWAYS_INLINE { weights[j] = _mm512_xor_si512(_mm512_loadu_si512(from + j * from_stride), flip); });
      Unroll<M>([&](auto i) ALWAYS_INLINE {
        const __m512i codes = _mm512_load_si512(x + i * stride + t);
        Unroll<N>([&](auto j) ALWAYS_INLINE { acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], weights[j], codes); });
        if constexpr (kDense) {
          const __m512i codes_hi = _mm512_load_si512(hi + i * width + t);
          Unroll<N>([&](auto j) ALWAYS_INLINE { high[i][j] = _mm512_dpbusd_epi32(high[i][j], weights[j], codes_hi); });
        }
      });
    }
    if (t >= part.end) break;
    from = padded[0];
    from_stride = 64;
    end = part.end;
  }
  if constexpr (kDense) {
    Unroll<M * N>([&](auto i) ALWAYS_INLINE {
      acc[i / N][i % N] = _mm512_add_epi32(acc[i / N][i % N], _mm512_slli_epi32(high[i / N][i % N], 7));
    });
  }
  Unroll<M>([&](auto i) ALWAYS_INLINE {
    const __m128i correction = _mm_set1_epi32(Correction(b.rows[part.i + i]));
    int32_t* c = b.c + (part.i + i) * kBlockN + part.j;
    Unroll<(N + 3) / 4>([&](auto q) ALWAYS_INLINE {
      constexpr int kLast = N - 1, kFirst = 4 * q;  // sums beyond the last are not stored
      const __m128i sums =
          Sum4(acc[i][kFirst], acc[i][kFirst + 1 < N ? kFirst + 1 : kLast], acc[i][kFirst + 2 < N ? kFirst + 2 : kLast],
               acc[i][kFirst + 3 < N ? kFirst + 3 : kLast]);
      constexpr __mmask8 kMask = N % 4 == 0 ? 0xf : (1 << N % 4) - 1;
      const __m128i old = part.begin == 0 ? correction : _mm_maskz_loadu_epi32(kMask, c + 4 * q);
      _mm_mask_storeu_epi32(c + 4 * q, kMask, _mm_add_epi32(old, sums));
    });
  });
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
constexpr DotsShape kDenseDots[2] = {{8, Dots<1, 8, true>, Dots<1, 1, true>}, {4, Dots<2, 4, true>, Dots<2, 1, true>}};
// Activations of a group that should stay in the L1 cache (32 KiB at least) while weights stream by: 6 rows of 4096.
constexpr int64_t kDotsBytes = 24 << 10;
// How far ahead weights are fetched: 8 rows of 4096; at 10 bytes per cycle, a microsecond.
constexpr int64_t kAheadBytes = 32 << 10;

// Small m: the weights are read once, in the order in which they lie, or nearly.
void MultiplyDots(const Block& b) {
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  const bool dense = b.plan && b.plan->dense;
  const bool squeezed = b.plan && !dense && b.plan->groups > 0;
  const int64_t teams = dense ? 1 : (b.m + kDotsM - 1) / kDotsM;
  const int64_t most = (b.m + teams - 1) / teams;
  const int64_t width = kDotsBytes / (dense ? 2 * most : most) / 64 * 64;
  const int64_t lead = (kAheadBytes / (b.k + 1) / kDotsN + 1) * kDotsN;
  Gathered gathered;
  int64_t begin = 0;
  do {
    const int64_t end = begin + width < b.k ? begin + width : b.k;
    for (int64_t j = 0; j < b.n;) {
      const bool whole = j + kDotsN <= b.n;
      const int64_t next = j + lead - b.n;  // beyond the block: its next columns, or the next block
      const int8_t* ahead = next < 0                ? b.w + (j + lead) * b.k
                            : end < b.k             ? b.w + next * b.k + (end - begin)
                            : b.ahead && next < b.n ? b.ahead + next * b.k - begin
                                                    : nullptr;
      Part part{0, j, begin, end, gathered[0], squeezed && end == b.k ? b.plan->groups : 0, ahead, 0};
      if (part.hi_groups > 0) {
        if (whole) {
          (vbmi ? GatherVbmi<kDotsN> : Gather<kDotsN>)(*b.plan, b.w + j * b.k, b.k, gathered);
        } else {
          (vbmi ? GatherVbmi<1> : Gather<1>)(*b.plan, b.w + j * b.k, b.k, gathered);
        }
      }
      int fetched = ahead && whole ? 0 : kDotsN;
      for (int64_t team = 0; team < teams; ++team) {
        const int64_t rows = b.m / teams + (team < b.m % teams);
        const DotsShape& shape = (dense ? kDenseDots : kDots)[rows - 1];
        part.gathered = gathered[0];
        for (part.j = j; part.j < (whole ? j + kDotsN : j + 1); part.j += shape.n) {
          part.pairs = fetched == kDotsN ? 0 : teams == 1 ? shape.n / 2 : 1;
          (whole ? shape.whole : shape.single)(b, part);
          part.ahead += 2 * part.pairs * b.k;
          fetched += 2 * part.pairs;
          part.gathered += shape.n;
        }
        part.i += rows;
      }
      j += whole ? kDotsN : 1;
    }
    begin = end;
  } while (begin < b.k);
}

// Which way is cheaper, in cycles per 64 outputs. Dot products: the sums over lanes, about 3.3 instructions per output,
// and 3 more for each group of high parts. Tiles: packing, 64 shuffles per 1024 weights, and some 40 cycles for the
// high parts of a row. Two rows and less are a matter of reading the weights.
void Multiply(const Block& b) {
  if (b.m <= 2) return MultiplyDots(b);
  if (b.m <= kSmallM && (b.plan || !b.with_hi)) {
    const int64_t groups = b.plan ? b.plan->groups : 0;
    if (b.m * (170 + 190 * groups) <= 4 * b.k) return MultiplyDots(b);
  }
  MultiplyTiled(b);
}

}  // namespace

extern const Rung kAvx512Vnni;
const Rung kAvx512Vnni = {"avx512_vnni", Supported, MarkRow, QuantizeRow,
                          Multiply,      Finish,    kChunkM, kPanelK * kBlockN + kChunkM * 4};

}  // namespace jaxint8::cpu
