// The AVX512-VNNI rung (Ice Lake, Zen 4 and later; also Cascade Lake).
//
// vpdpbusd multiplies unsigned by signed bytes. Here the weight is the unsigned operand, w + 128 (one xor), and the
// activation code the signed one, so the correction, 128 * sum(codes of the row), is known from the quantiser and the
// weights need no sums, no copy and no format. All sums are modulo 2^32 and the final value fits, so they are exact.
//
// In this file: which way a product goes, and small ones for any processor, dot products along the rows of weights as
// they lie. Those that read weights as one stream: streams_avx512.h. Large ones: tiles_avx512.h. What is between is a
// rung of its own on processors that shuffle beside their multiplications (lanes_avx512.h), and on those that do not
// (fours_avx512.h, strips_avx512.h).
#include <immintrin.h>

#include "attend_avx512.h"
#include "fours_avx512.h"
#include "int8.h"
#include "lanes_avx512.h"
#include "processor.h"
#include "prologue_avx512.h"
#include "rows_avx512.h"
#include "streams_avx512.h"
#include "strips_avx512.h"
#include "tiles_avx512.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

bool Supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

bool SupportedStrips() { return Supported() && HasDearShuffles(); }

bool SupportedLanes() { return Supported() && __builtin_cpu_supports("avx512vbmi") && HasFreeShuffles(); }

// Moves the groups of four columns of a HiPlan into a panel [group][kBlockN][4], rows j.. of (unsigned) weights. To be
// called while these rows are in the L1 cache.
void GatherGroups(const Block& b, int64_t first, int64_t stop, int64_t j, int64_t rows, uint8_t* panel) {
  const HiPlan& plan = *b.plan;
  if (first == stop) return;
  const auto move = [](const int8_t* w, uint8_t* out, size_t bytes) ALWAYS_INLINE {
    uint32_t four = 0;
    std::memcpy(&four, w, bytes);
    four ^= 0x80808080;
    std::memcpy(out, &four, sizeof four);
  };
  int64_t whole = stop;  // the last group may be cut off by the end of the row
  if (plan.group[whole - 1] * 4 + 4 > b.k) --whole;
  for (int64_t g = first; g < whole; ++g) {
    const int8_t* w = b.w + j * b.k + int64_t{plan.group[g]} * 4;
    uint8_t* out = panel + (g * kBlockN + j) * 4;
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8, w += 8 * b.k) {
      Unroll<8>([&](auto r) ALWAYS_INLINE { move(w + r * b.k, out + (i + r) * 4, 4); });
    }
    for (; i < rows; ++i, w += b.k) move(w, out + i * 4, 4);
  }
  if (whole < stop) {
    const int64_t column = int64_t{plan.group[whole]} * 4;
    for (int64_t i = j; i < j + rows; ++i) {
      move(b.w + i * b.k + column, panel + (whole * kBlockN + i) * 4, static_cast<size_t>(b.k - column));
    }
  }
}

// c += (hi . W) << 7 of rows [begin, end) of a block, as in a tile but from a panel that holds only the groups of the
// plan. `slot` is that of their first word; returns that of the next rows.
const int32_t* AddHiGroups(const Block& b, const uint8_t* panel, int64_t begin, int64_t end, const int32_t* slot) {
  for (int64_t i = begin; i < end; ++i) {
    const Row& row = b.rows[i];
    if (row.words == 0) continue;
    __m512i sum[4];
    Unroll<4>([&](auto z) ALWAYS_INLINE { sum[z] = _mm512_setzero_si512(); });
    for (int32_t word = 0; word < row.words; ++word, ++slot) {
      const __m512i four = _mm512_set1_epi32(static_cast<int32_t>(row.hi[word].four));
      const uint8_t* w = panel + *slot * kBlockN * 4;
      Unroll<4>([&](auto z) ALWAYS_INLINE { MulAddInPlace(sum[z], _mm512_load_si512(w + z * 64), four); });
    }
    int32_t* c = b.c + i * kBlockN;
    Unroll<4>([&](auto z) ALWAYS_INLINE {
      const __m512i high = _mm512_slli_epi32(sum[z], 7);
      _mm512_store_si512(c + z * 16, _mm512_add_epi32(_mm512_load_si512(c + z * 16), high));
    });
  }
  return slot;
}

// Which part of a block a group of dot products covers.
struct Part {
  int64_t i;           // the first row of activations
  int64_t j, j_end;    // rows of weights
  int64_t begin, end;  // columns; begin is a multiple of 64, end too or the last
  bool fetches;        // whether to fetch weights ahead
};

// c[M][j..] (+)= dot products with rows of weights; the first part of the columns sets c. Four rows of weights at once,
// for fewer loads of codes (with five rows two: there are 32 registers), and what follows is fetched in the order in
// which it lies, as one stream: eight rows at once are read at half the speed from memory.
template <int M>
void Dots(const Block& b, const Part& part) {
  constexpr int N = M <= 4 ? 4 : 2;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t k = b.k, stride = b.stride, whole = part.end / 64 * 64;
  const __mmask64 rest = FirstBytes(part.end - whole);
  const int8_t* x = b.lo + part.i * stride;
  for (int64_t first = part.j; first < part.j_end; first += 4) {
    alignas(64) int32_t sums[4][M][16];
    for (int r = 0; r < 4; r += N) {
      const int8_t* w[N];  // beyond the last row: that one again
      Unroll<N>([&](auto j) ALWAYS_INLINE { w[j] = b.w + (first + r + j < b.n ? first + r + j : b.n - 1) * k; });
      const int8_t* fetch = w[0] + kFetchAhead;
      __m512i acc[N][M];
      Unroll<N * M>([&](auto i) ALWAYS_INLINE { acc[i / M][i % M] = _mm512_setzero_si512(); });
      const auto step = [&](int64_t t, auto load) ALWAYS_INLINE {
        __m512i weights[N];
        Unroll<N>([&](auto j) ALWAYS_INLINE { weights[j] = _mm512_xor_si512(load(w[j] + t), flip); });
        if (part.fetches) {
          Unroll<N>([&](auto j) ALWAYS_INLINE { _mm_prefetch(fetch + j * 64, _MM_HINT_T1); });
          fetch += N * 64;
        }
        Unroll<M>([&](auto i) ALWAYS_INLINE {
          const __m512i codes = _mm512_load_si512(x + i * stride + t);
          Unroll<N>([&](auto j) ALWAYS_INLINE { MulAddInPlace(acc[j][i], weights[j], codes); });
        });
      };
      const auto load = [](const int8_t* from) ALWAYS_INLINE { return _mm512_loadu_si512(from); };
      // The rest comes first: after the loop it would make the compiler hold every sum twice.
      if (rest) {
        step(whole, [&](const int8_t* from) ALWAYS_INLINE { return _mm512_maskz_loadu_epi8(rest, from); });
      }
      int64_t t = part.begin;
      if ((whole - t) % 128 != 0) {
        step(t, load);
        t += 64;
      }
      for (; t < whole; t += 128) {
        step(t, load);
        step(t + 64, load);
      }
      Unroll<N * M>([&](auto i) ALWAYS_INLINE { _mm512_store_si512(sums[r + i / M][i % M], acc[i / M][i % M]); });
    }
    Unroll<M>([&](auto i) ALWAYS_INLINE {
      auto* out = reinterpret_cast<__m128i*>(b.c + (part.i + i) * kBlockN + first);
      const __m128i four = Sum4(_mm512_load_si512(sums[0][i]), _mm512_load_si512(sums[1][i]),
                                _mm512_load_si512(sums[2][i]), _mm512_load_si512(sums[3][i]));
      const __m128i before = part.begin > 0 ? _mm_load_si128(out) : _mm_set1_epi32(Correction(b.rows[part.i + i]));
      _mm_store_si128(out, _mm_add_epi32(before, four));
    });
  }
}

using DotsFunction = void (*)(const Block&, const Part&);
constexpr int64_t kDotsMost = 24;  // rows; above, tiles are always better
constexpr int kDotsM = 5;          // alone; two teams of five are slower than three
constexpr DotsFunction kDots[kDotsM] = {Dots<1>, Dots<2>, Dots<3>, Dots<4>, Dots<5>};
// Activations of a team that should stay in the L1 cache (32 KiB at least) while weights stream by: 4 rows of 6144.
constexpr int64_t kDotsBytes = 24 << 10;

// Rows of weights that GatherGroups still finds in the L1 cache: half of it, a multiple of 8.
int64_t TurnOf(const Block& b) { return ((16 << 10) / (b.k + 1) / 8 + 1) * 8; }

// Small m: the weights are read once, in the order in which they lie, or nearly. Teams of up to 4 rows of activations
// (or 5) take turns over a few rows of weights, at most half of the L1 cache.
void MultiplyDots(const Block& b) {
  const int64_t teams = b.m <= kDotsM ? 1 : (b.m + 3) / 4;
  const int64_t most = (b.m + teams - 1) / teams;
  const int64_t width = kDotsBytes / most / 64 * 64;
  const bool gathers = b.plan && b.plan->groups > 0;
  const int64_t turn = teams == 1 && !gathers ? kBlockN : TurnOf(b);
  uint8_t* const panel = reinterpret_cast<TileScratch*>(b.scratch)->panels[0];
  int64_t begin = 0;
  do {
    const int64_t end = begin + width < b.k ? begin + width : b.k;
    for (int64_t j = 0; j < b.n; j += turn) {
      Part part{0, j, j + turn < b.n ? j + turn : b.n, begin, end, end - begin == b.k};
      for (int64_t team = 0; team < teams; ++team) {
        const int64_t size = b.m / teams + (team < b.m % teams);
        kDots[size - 1](b, part);
        part.i += size;
        part.fetches = false;  // the first team has
      }
      if (gathers && end == b.k) GatherGroups(b, 0, b.plan->groups, j, part.j_end - j, panel);
    }
    begin = end;
  } while (begin < b.k);
  if (gathers) AddHiGroups(b, panel, 0, b.m, b.plan->slot);
  if (b.epilogue) Finish(*b.epilogue, 0, b.m);
}

// Pairs, a team's codes so many bytes. High parts, if there are any, by the weights of their groups, which are gathered
// once for all rows.
void MultiplyPairsOf(const Block& b, int64_t bytes) {
  auto* const scratch = reinterpret_cast<TileScratch*>(b.scratch);
  int64_t first = 0, stop = 0, from = -1;  // the groups in these columns
  const auto gather = [&](int64_t j, int64_t j_end, int64_t begin, int64_t end) {
    if (from != begin) {
      from = begin;
      for (first = stop; stop < b.plan->groups && b.plan->group[stop] * 4 < end;) ++stop;
    }
    GatherGroups(b, first, stop, j, j_end - j, scratch->panels[0]);
  };
  const bool gathers = b.plan && b.plan->groups > 0;
  MultiplyPairs(b, bytes, gathers ? &gather : nullptr);
  if (gathers) {
    scratch->job = 0;  // other things are kept in its panels here
    AddHiGroups(b, scratch->panels[0], 0, b.m, b.plan->slot);
  }
  if (b.epilogue) Finish(*b.epilogue, 0, b.m);
}

static_assert(kPanelBytes / kLanesN <= PickPlan::kLines * 64);

// What a thread keeps between blocks.
struct alignas(64) LanesScratch {
  TileScratch tiles;
  PickPlan high;
};

// How lanes cut a block: teams of rows of codes take turns over all weights of a slice, whose columns are as many as
// keep the codes of a team in the L1 cache, and fewer for the team that gathers, to keep what it stores there as well.
struct LanesCut {
  int64_t teams, width, first_width;
  LanesCut(const Block& b, HighParts high) {
    // A team of ten is for ten rows alone: in two teams their codes are more than the L1 cache holds beside weights.
    const int64_t several = high == HighParts::kPicked ? kPickRows : 9;
    teams = b.m <= LanesM(high) ? 1 : (b.m + several - 1) / several;
    const int64_t most = (b.m + teams - 1) / teams;
    width = PieceOf(b.k, kLanesBytes / most);
    if (width > kPanelBytes / kLanesN) width = kPanelBytes / kLanesN;  // what can be kept
    first_width = high == HighParts::kGathered ? PieceOf(width, kGatherColumns) : width;
  }
  // Calls f(first row, rows, begin, end) part by part.
  template <typename F>
  void Each(const Block& b, const F& f) const {
    for (int64_t begin = 0; begin < b.k; begin += width) {
      const int64_t end = begin + width < b.k ? begin + width : b.k;
      for (int64_t team = 0, i = 0; team < teams; ++team) {
        const int64_t size = b.m / teams + (team < b.m % teams), piece = team == 0 ? first_width : width;
        for (int64_t at = begin; at < end; at += piece) f(i, size, at, at + piece < end ? at + piece : end);
        i += size;
      }
    }
  }
};

// The plan of the high parts of these rows, made once by each thread.
const PickPlan& PlanPicks(const Block& b) {
  PickPlan& plan = reinterpret_cast<LanesScratch*>(b.scratch)->high;
  if (plan.job == b.job && plan.rows == b.rows) return plan;
  plan.job = b.job, plan.rows = b.rows;
  plan.fits = true;
  plan.parts = plan.last_round = plan.last_pair = plan.first[0] = 0;
  int32_t next[kChunkM];
  std::memset(next, 0, static_cast<size_t>(b.m) * sizeof *next);
  LanesCut(b, HighParts::kPicked).Each(b, [&](int64_t i, int64_t rows, int64_t begin, int64_t end) {
    plan.fits = plan.fits && plan.Add(b.rows, {i, rows, begin, end}, next);
  });
  return plan;
}

// Outputs from j on, fewer than kLanesN, by dot products.
void MultiplyLastOutputs(const Block& b, int64_t j) {
  Part rest{0, j, b.n, 0, b.k, false};
  for (; rest.i < b.m; rest.i += kDotsM) {
    const int64_t left = b.m - rest.i;
    kDots[(left < kDotsM ? left : kDotsM) - 1](b, rest);
  }
}

// Medium m, where shuffles are free: lanes. High parts, if there are any, by the weights of their groups, which are
// gathered once for all rows.
void MultiplyLanes(const Block& b) {
  const int64_t octets = b.n / kLanesN, groups = b.plan ? b.plan->groups : 0;
  auto* const scratch = reinterpret_cast<TileScratch*>(b.scratch);
  scratch->job = 0;  // other things are kept in its panels here
  uint8_t* const panel = scratch->panels[0];
  if (octets * kLanesN < b.n) {
    MultiplyLastOutputs(b, octets * kLanesN);
    if (groups > 0) GatherGroups(b, 0, groups, octets * kLanesN, b.n % kLanesN, panel);
  }
  int32_t at[HiPlan::kMaxGroups];
  int64_t first = 0, stop = 0;  // the groups in these columns
  const int32_t* slot = groups > 0 ? b.plan->slot : nullptr;
  const LanesCut cut(b, groups > 0 ? HighParts::kGathered : HighParts::kNone);
  cut.Each(b, [&](int64_t i, int64_t rows, int64_t begin, int64_t end) {
    LanesPart part{};
    part.i = i, part.begin = begin, part.end = end;
    if (i == 0) {
      for (first = stop; stop < groups && b.plan->group[stop] * 4 < end; ++stop) {
        at[stop] = KeptAt(b.plan->group[stop] * 4 - begin);
      }
    }
    const bool last = end == b.k;
    if (b.epilogue && last) FetchOutputs(*b.epilogue, i, i + rows);
    if (i == 0 && stop > first) {
      part.kept = scratch->panels[1], part.needed = b.plan->needed;
      part.at = at + first, part.groups = stop - first, part.panel = panel + first * kBlockN * 4;
      GatheringLanes(b, part, rows);
    } else {
      LanesAlone(b, part, rows);
    }
    if (last && groups > 0) slot = AddHiGroups(b, panel, i, i + rows, slot);
    if (b.epilogue && last) Finish(*b.epilogue, i, i + rows);  // at once, so that it overlaps with the next team
  });
}

// The same with many high parts, which pick their weights team by team.
void MultiplyPickingLanes(const Block& b, const PickPlan& high) {
  const int64_t octets = b.n / kLanesN * kLanesN;
  const int32_t* first = high.first;
  if (octets < b.n) MultiplyLastOutputs(b, octets);
  for (int64_t j = octets; j < b.n; j += 4) AddHiOfRows(b, j);
  LanesCut(b, HighParts::kPicked).Each(b, [&](int64_t i, int64_t rows, int64_t begin, int64_t end) {
    LanesPart part{};
    part.i = i, part.begin = begin, part.end = end;
    part.high = high.rounds + first[0], part.rounds = first[1] - first[0], part.pairs = high.pairs;
    ++first;
    if (b.epilogue && end == b.k) FetchOutputs(*b.epilogue, i, i + rows);
    PickingLanes(b, part, rows);
    if (b.epilogue && end == b.k) Finish(*b.epilogue, i, i + rows);
  });
}

// Whether the high parts of a block, if it has any, come with a plan.
bool Planned(const Block& b) { return b.plan || !b.with_hi; }

// Which way is cheaper, in cycles per 64 outputs beside the multiplications themselves (measured on Zen 4). Dot
// products: 1.2 * k and 77 per row (sums over lanes), 64 for each group of high parts. Tiles: 5 * k, for 16 rows and
// less the packing does not hide behind them, else 3 * k. Two rows and less are a matter of reading the weights.
void Multiply(const Block& b) {
  if (Planned(b) && b.m <= 2) return MultiplyFewRows(b);
  if (b.k == 0) return MultiplyDots(b);
  if (b.m <= kDotsMost && Planned(b)) {
    const int64_t groups = b.plan ? b.plan->groups : 0;
    if (b.m * 77 + 94 * groups <= (b.m <= 16 ? 38 : 18) * b.k / 10) return MultiplyDots(b);
  }
  MultiplyTiled(b);
}

// Whether fours are faster than pairs and strips (measured on a Cascade Lake). Pairs of longer rows have fewer sums to
// add up, strips of more rows less to pack for each, and eight rows of 4096 columns fall into one set of the L1 cache.
// A group of high parts costs fours some 50 cycles.
bool TakesFours(const Block& b, int64_t groups) {
  if (b.m < 5 || b.m > 20 || groups > 40) return false;
  return b.k <= (b.m <= kPairsM ? 1023 : 3072);
}

// The same with pairs, fours and strips (measured on a Cascade Lake): pairs for up to ten rows, strips beyond and if
// there are many groups of high parts to gather (8 x 768 x 3072 by top 8: 0.78 of the time), and tiles where codes
// would be read too often from the L2 cache.
void MultiplyWithStrips(const Block& b) {
  if (Planned(b) && b.m <= 3) return MultiplyFewRows(b);
  if (b.k == 0) return MultiplyDots(b);
  const int64_t groups = b.plan ? b.plan->groups : 0;
  const bool fours = Planned(b) && TakesFours(b, groups);
  if (!fours && Planned(b) && b.m <= kPairsM && 94 * groups <= 3 * b.k) return MultiplyPairsOf(b, kDotsBytes);
  const int64_t most = b.k <= kPanelK ? kStripsMost : 2 * kStripsMost;
  // Whether high parts are listed as quads, which only tiles know, is decided for all rows: the last may be few.
  if (b.m > most || b.groups) return MultiplyTiled(b);
  uint8_t* const panel = reinterpret_cast<TileScratch*>(b.scratch)->panels[1];
  (fours ? MultiplyFours : MultiplyStrips)(b, panel);
  if (groups > 0) AddHiGroups(b, panel, 0, b.m, b.plan->slot);
  if (b.epilogue) Finish(*b.epilogue, 0, b.m);
}

// Whether tiles are faster than lanes for up to kSmallM rows: where packing hides behind the multiplications, below
// 1,024 columns. 64 rows take 0.95 of the time at 576 columns, 0.97 at 768, 0.7 to 0.8 from memory (64 x 576 x 65536).
bool PacksAhead(const Block& b) {
  constexpr int64_t kLanesMost = 59;
  if (b.m <= kLanesMost || b.k >= kPanelK || b.k % 64 != 0 || b.n != kBlockN) return false;
  const auto* scratch = reinterpret_cast<const TileScratch*>(b.scratch);
  return (b.ahead && b.ahead_n == kBlockN) || (scratch->job == b.job && scratch->w == b.w);
}

// Pairs whose high parts are added row by row.
void MultiplyPairsAlone(const Block& b) {
  MultiplyPairs<NoGather>(b, kPairsBytes, nullptr);
  if (b.epilogue) Finish(*b.epilogue, 0, b.m);
}

// Whether pairs of rows of weights are faster than lanes, or for four rows than single ones (measured on Zen 5). From
// memory they are, as lanes ask for eight rows at once (8 x 4096 x 11008: 0.82 of the time, 8 x 768 x 65536: 0.68), but
// for four rows whose codes are in the L1 cache. In caches four rows take 0.88 of the time, five and six of long rows
// 0.85 and 0.9 unless there are many high parts.
bool TakesPairs(const Block& b) {
  if (b.m < kPairsLeastM || b.m > kPairsM || b.k == 0) return false;
  const bool from_memory = b.from == From::kMemory;
  if (b.m == 4) return !from_memory || b.k <= kOneStream || b.k * 4 > kPairsBytes;
  return from_memory || (b.k >= 4096 && (b.m == 5 || (b.m == 6 && !b.with_hi)));
}

// The same with lanes (measured on Zen 5). Tiles: (5.6 - 0.075 * m) * k, and 6 for each word of high parts. Lanes: 30
// for each group of high parts and 4 for each word; or 360 for each round, and for each pair of lines 88, or 134 if
// they are no longer in the L1 cache when they are wanted. Lanes read eight rows of weights at once, from memory at
// half the speed of a stream (2 x 1536 x 65536 by the relative rule: 2.0 ms and 1.2), so few rows are one, though from
// the second-level cache high parts cost them more (3 x 768 x 3072: 15 us and 20).
void MultiplyWithLanes(const Block& b) {
  if (Planned(b) && TakesPairs(b)) return MultiplyPairsAlone(b);
  if (Planned(b) && b.m <= kFewM) return MultiplyFewRows(b);
  if (b.k == 0) return MultiplyDots(b);
  if (b.m > kSmallM || PacksAhead(b)) return MultiplyTiled(b);
  const int64_t groups = b.plan ? b.plan->groups : 0;
  int64_t words = 0;
  for (int64_t i = 0; b.with_hi && i < b.m; ++i) words += b.rows[i].words;
  const int64_t tiled = (5600 - 75 * b.m) * b.k / 1000 + 6 * words;
  const int64_t gathered = Planned(b) ? 30 * groups + 4 * words : tiled + 1;
  if (words > 0 && gathered > 360) {
    const PickPlan& high = PlanPicks(b);
    const int64_t picked = 360 * high.last_round + (b.k <= 2048 ? 88 : 134) * high.last_pair;
    if (high.fits && picked < gathered && picked <= tiled) return MultiplyPickingLanes(b, high);
  }
  if (gathered <= tiled) return MultiplyLanes(b);
  MultiplyTiled(b);
}

}  // namespace

extern const Rung kAvx512VnniLanes, kAvx512VnniStrips, kAvx512Vnni;
const Rung kAvx512VnniLanes = {
    "avx512_vnni_lanes", SupportedLanes, EnterRowWide,         MarkRow, QuantizeRow, MultiplyWithLanes,
    &kAttendWide,        kChunkM,        sizeof(LanesScratch), kPanelK};
const Rung kAvx512VnniStrips = {
    "avx512_vnni_strips", SupportedStrips, EnterRowWide,        MarkRow, QuantizeRow, MultiplyWithStrips,
    &kAttendWide,         kChunkM,         sizeof(TileScratch), kPanelK};
const Rung kAvx512Vnni = {"avx512_vnni", Supported, EnterRowWide,        MarkRow, QuantizeRow, Multiply,
                          &kAttendWide,  kChunkM,   sizeof(TileScratch), kPanelK};

}  // namespace jaxint8::cpu
