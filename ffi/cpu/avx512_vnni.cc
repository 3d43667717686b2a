// The AVX512-VNNI rung (Ice Lake, Zen 4 and later; also Cascade Lake).
//
// vpdpbusd multiplies unsigned by signed bytes. Here the weight is the unsigned operand, w + 128 (one xor), and the
// activation code the signed one, so the correction, 128 * sum(codes of the row), is known from the quantiser and the
// weights need no sums, no copy and no format. All sums are modulo 2^32 and the final value fits, so they are exact.
#include <immintrin.h>

#include <type_traits>

#include "int8.h"
#include "rows.h"

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

// Calls f(0), ..., f(N - 1) with compile-time arguments. Loops over arrays of registers must be unrolled this early:
// GCC unrolls a plain loop only after it has decided to keep the array in memory, and then stores it in every step.
template <int N, typename F>
[[gnu::always_inline]] inline void Unroll(const F& f) {
  if constexpr (N > 0) {
    Unroll<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
  }
}

inline __mmask64 FirstBytes(int64_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

// Writes 64 bytes of each of 16 weight rows as 16 registers of [16 outputs][4 columns]: a transposition of 16 x 16
// words of four bytes, 64 shuffles for 1 KiB. Rows and columns beyond the matrix become zero weights.
template <bool kWhole>
inline void PackSquare(const int8_t* w, int64_t stride, int64_t rows, int64_t bytes, uint8_t* panel,
                       int64_t panel_stride) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const __mmask64 mask = kWhole ? ~__mmask64{0} : FirstBytes(bytes);
  __m512i a[16], b[16];
  Unroll<16>([&](auto i) {
    if constexpr (kWhole) {
      a[i] = _mm512_xor_si512(_mm512_loadu_si512(w + i * stride), flip);
    } else {
      a[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(i < rows ? mask : 0, w + (i < rows ? i * stride : 0)), flip);
    }
  });
  Unroll<8>([&](auto i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  });
  Unroll<4>([&](auto r) {
    a[4 * r] = _mm512_unpacklo_epi64(b[4 * r], b[4 * r + 2]);
    a[4 * r + 1] = _mm512_unpackhi_epi64(b[4 * r], b[4 * r + 2]);
    a[4 * r + 2] = _mm512_unpacklo_epi64(b[4 * r + 1], b[4 * r + 3]);
    a[4 * r + 3] = _mm512_unpackhi_epi64(b[4 * r + 1], b[4 * r + 3]);
  });
  // a[4 * r + q]: lane l holds columns 4 * (4 * l + q).. of rows 4 * r..4 * r + 3.
  Unroll<4>([&](auto q) {
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
  Unroll<M * Z>([&](auto i) { acc[i / Z][i % Z] = _mm512_load_si512(c + i / Z * kBlockN + i % Z * 16); });
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < ahead_rows; ++i) _mm_prefetch(ahead + i * ahead_stride + block * 64, _MM_HINT_T1);
    for (int g = 0; g < 16; ++g) {
      __m512i w[Z];
      Unroll<Z>([&](auto z) { w[z] = _mm512_load_si512(panel + z * 64); });
      Unroll<M>([&](auto i) {
        const __m512i four = Broadcast(x + i * stride);
        Unroll<Z>([&](auto z) { acc[i][z] = _mm512_dpbusd_epi32(acc[i][z], w[z], four); });
      });
      panel += Z * 64;
      x += 4;
    }
  }
  Unroll<M * Z>([&](auto i) { _mm512_store_si512(c + i / Z * kBlockN + i % Z * 16, acc[i / Z][i % Z]); });
}

using TileFunction = void (*)(const uint8_t*, const int8_t*, int64_t, int64_t, int32_t*, const int8_t*, int64_t,
                              int64_t);
constexpr TileFunction kTiles[4][kTileM] = {
    {Tile<1, 1>, Tile<2, 1>, Tile<3, 1>, Tile<4, 1>, Tile<5, 1>, Tile<6, 1>},
    {Tile<1, 2>, Tile<2, 2>, Tile<3, 2>, Tile<4, 2>, Tile<5, 2>, Tile<6, 2>},
    {Tile<1, 3>, Tile<2, 3>, Tile<3, 3>, Tile<4, 3>, Tile<5, 3>, Tile<6, 3>},
    {Tile<1, 4>, Tile<2, 4>, Tile<3, 4>, Tile<4, 4>, Tile<5, 4>, Tile<6, 4>},
};

// c += (hi . W) << 7 for the high parts of one row that lie before column `end`: one multiplication per 16 outputs and
// group of four columns. Returns the first word that lies after.
template <int Z>
int32_t AddHi(const Row& row, int32_t next, int64_t begin, int64_t end, const uint8_t* panel, int32_t* c) {
  __m512i sum[Z];
  Unroll<Z>([&](auto z) { sum[z] = _mm512_setzero_si512(); });
  for (; next < row.words && row.hi[next].group * 4 < end; ++next) {
    const __m512i four = _mm512_set1_epi32(static_cast<int32_t>(row.hi[next].four));
    const uint8_t* w = panel + (row.hi[next].group - begin / 4) * Z * 64;
    Unroll<Z>([&](auto z) { sum[z] = _mm512_dpbusd_epi32(sum[z], _mm512_load_si512(w + z * 64), four); });
  }
  Unroll<Z>([&](auto z) {
    const __m512i old = _mm512_load_si512(c + z * 16);
    _mm512_store_si512(c + z * 16, _mm512_add_epi32(old, _mm512_slli_epi32(sum[z], 7)));
  });
  return next;
}

using HiFunction = int32_t (*)(const Row&, int32_t, int64_t, int64_t, const uint8_t*, int32_t*);
constexpr HiFunction kHi[4] = {AddHi<1>, AddHi<2>, AddHi<3>, AddHi<4>};

// -128 * the sum of the codes: cancels the offset of the unsigned weights.
inline int32_t Correction(const Row& row) { return static_cast<int32_t>(0u - (static_cast<uint32_t>(row.sum) << 7)); }

// Large m: packs a panel of 64 outputs by at most kPanelK columns and runs all rows over it.
void MultiplyTiled(const Block& b) {
  const int registers = static_cast<int>((b.n + 15) / 16);
  uint8_t* panel = b.scratch;
  auto* next = reinterpret_cast<int32_t*>(b.scratch + kPanelK * kBlockN);
  for (int64_t i = 0; i < b.m; ++i) {
    next[i] = 0;
    const __m512i start = _mm512_set1_epi32(Correction(b.rows[i]));
    for (int z = 0; z < registers; ++z) _mm512_store_si512(b.c + i * kBlockN + z * 16, start);
  }
  const int64_t tiles = (b.m + kTileM - 1) / kTileM;
  const int64_t panels = (b.k + kPanelK - 1) / kPanelK;
  const int64_t width = panels ? ((b.k + panels - 1) / panels + 63) / 64 * 64 : 0;
  for (int64_t t = 0; t < b.k; t += width) {
    const int64_t end = t + width < b.k ? t + width : b.k;
    Pack(b.w + t, b.k, b.n, end - t, registers, panel);
    if (b.with_hi) {
      for (int64_t i = 0; i < b.m; ++i) {
        const Row& row = b.rows[i];
        if (next[i] < row.words && row.hi[next[i]].group * 4 < end) {
          next[i] = kHi[registers - 1](row, next[i], t, end, panel, b.c + i * kBlockN);
        }
      }
    }
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

// Gathers the weights of one group of a HiPlan from `rows` rows of weights.
using GatherFunction = void (*)(const HiPlan& plan, int64_t group, const int8_t* w, int64_t k, int rows, __m512i* out);

void Gather(const HiPlan& plan, int64_t group, const int8_t* w, int64_t k, int rows, __m512i* out) {
  for (int i = 0; i < rows; ++i) {
    alignas(64) int8_t slots[64] = {};
    for (int32_t s = plan.segment_start[group]; s < plan.segment_start[group + 1]; ++s) {
      const HiPlan::Segment& segment = plan.segments[s];
      for (uint64_t mask = segment.mask; mask; mask &= mask - 1) {
        const int slot = __builtin_ctzll(mask);
        slots[slot] = w[i * k + segment.column + segment.lane[slot]];
      }
    }
    out[i] = _mm512_load_si512(slots);
  }
}

__attribute__((target("avx512vbmi"))) void GatherVbmi(const HiPlan& plan, int64_t group, const int8_t* w, int64_t k,
                                                      int rows, __m512i* out) {
  for (int i = 0; i < rows; ++i) out[i] = _mm512_setzero_si512();
  for (int32_t s = plan.segment_start[group]; s < plan.segment_start[group + 1]; ++s) {
    const HiPlan::Segment& segment = plan.segments[s];
    const __m512i lane = _mm512_loadu_si512(segment.lane);
    const __mmask64 inside = FirstBytes(k - segment.column);
    for (int i = 0; i < rows; ++i) {
      const __m512i columns = _mm512_maskz_loadu_epi8(inside, w + i * k + segment.column);
      out[i] = _mm512_mask_permutexvar_epi8(out[i], segment.mask, lane, columns);
    }
  }
}

// c[M][N] at (i, j) of a block: M x N dot products over all columns, straight from the rows of weights. `ahead`, if not
// null, are the N rows that this thread reads next: they are fetched into the L2 cache at the pace of the reading.
template <int M, int N, bool kDense>
void Dots(const Block& b, GatherFunction gather, int64_t i0, int64_t j0, const int8_t* ahead) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int8_t* w = b.w + j0 * b.k;
  const int8_t* x = b.lo + i0 * b.stride;
  const int64_t width = kDense || b.plan ? b.plan->groups * 64 : 0;
  const int8_t* hi = width ? b.plan->hi + i0 * width : nullptr;
  __m512i acc[M][N], high[kDense ? M : 1][N];
  Unroll<M * N>([&](auto i) { acc[i / N][i % N] = _mm512_setzero_si512(); });
  if constexpr (kDense) Unroll<M * N>([&](auto i) { high[i / N][i % N] = _mm512_setzero_si512(); });
  const auto step = [&](int64_t t, const __m512i(&weights)[N]) __attribute__((always_inline)) {
    Unroll<M>([&](auto i) {
      const __m512i codes = _mm512_load_si512(x + i * b.stride + t);
      Unroll<N>([&](auto j) { acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], weights[j], codes); });
      if constexpr (kDense) {
        const __m512i high_codes = _mm512_load_si512(hi + i * width + t);
        Unroll<N>([&](auto j) { high[i][j] = _mm512_dpbusd_epi32(high[i][j], weights[j], high_codes); });
      }
    });
  };
  int64_t t = 0;
  for (; t + 64 <= b.k; t += 64) {
    __m512i weights[N];
    Unroll<N>([&](auto j) {
      if (ahead) _mm_prefetch(ahead + j * b.k + t, _MM_HINT_T1);
      weights[j] = _mm512_xor_si512(_mm512_loadu_si512(w + j * b.k + t), flip);
    });
    step(t, weights);
  }
  if (t < b.k) {
    __m512i weights[N];
    const __mmask64 mask = FirstBytes(b.k - t);
    Unroll<N>([&](auto j) { weights[j] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w + j * b.k + t), flip); });
    step(t, weights);
  }
  if constexpr (kDense) {
    Unroll<M * N>([&](auto i) {
      acc[i / N][i % N] = _mm512_add_epi32(acc[i / N][i % N], _mm512_slli_epi32(high[i / N][i % N], 7));
    });
  } else if (width) {
    for (int64_t group = 0; group < b.plan->groups; ++group) {
      __m512i weights[N];
      gather(*b.plan, group, w, b.k, N, weights);
      Unroll<M>([&](auto i) {
        const __m512i codes = _mm512_load_si512(hi + i * width + group * 64);
        Unroll<N>([&](auto j) {
          const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_xor_si512(weights[j], flip), codes);
          acc[i][j] = _mm512_add_epi32(acc[i][j], _mm512_slli_epi32(sum, 7));
        });
      });
    }
  }
  Unroll<M>([&](auto i) {
    const int32_t correction = Correction(b.rows[i0 + i]);
    int32_t* c = b.c + (i0 + i) * kBlockN + j0;
    if constexpr (N % 4 == 0) {
      Unroll<N / 4>([&](auto q) {
        const __m128i sums = Sum4(acc[i][4 * q], acc[i][4 * q + 1], acc[i][4 * q + 2], acc[i][4 * q + 3]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(c + 4 * q), _mm_add_epi32(sums, _mm_set1_epi32(correction)));
      });
    } else {
      Unroll<N>([&](auto j) {
        c[j] = static_cast<int32_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(acc[i][j])) +
                                    static_cast<uint32_t>(correction));
      });
    }
  });
}

// All outputs of a block for M rows, N rows of weights at a time.
template <int M, int N, bool kDense>
void DotsOfRows(const Block& b, GatherFunction gather, int64_t i) {
  int64_t j = 0;
  for (; j + N <= b.n; j += N) {
    const int8_t* ahead = i > 0 ? nullptr : j + 2 * N <= b.n ? b.w + (j + N) * b.k : b.ahead;
    Dots<M, N, kDense>(b, gather, i, j, ahead);
  }
  for (; j < b.n; ++j) Dots<M, 1, kDense>(b, gather, i, j, nullptr);
}

// Rows of weights at once: enough accumulators to hide the latency of a multiplication (5 cycles, two multipliers), at
// most 24, and a power of two so that 64 outputs leave no rest.
using DotsFunction = void (*)(const Block&, GatherFunction, int64_t);
constexpr DotsFunction kDots[kSmallM] = {DotsOfRows<1, 8, false>, DotsOfRows<2, 8, false>, DotsOfRows<3, 8, false>,
                                         DotsOfRows<4, 4, false>, DotsOfRows<5, 4, false>, DotsOfRows<6, 4, false>,
                                         DotsOfRows<7, 2, false>, DotsOfRows<8, 2, false>};
constexpr DotsFunction kDenseDots[2] = {DotsOfRows<1, 8, true>, DotsOfRows<2, 4, true>};

void Multiply(const Block& b) {
  if (b.m > kSmallM) return MultiplyTiled(b);
  static const GatherFunction gather = __builtin_cpu_supports("avx512vbmi") ? GatherVbmi : Gather;
  if (b.plan && b.plan->dense) return kDenseDots[b.m - 1](b, gather, 0);
  kDots[b.m - 1](b, gather, 0);
}

}  // namespace

extern const Rung kAvx512Vnni;
const Rung kAvx512Vnni = {"avx512_vnni", Supported, MarkRow, QuantizeRow,
                          Multiply,      Finish,    kChunkM, kPanelK * kBlockN + kChunkM * 4};

}  // namespace jaxint8::cpu
