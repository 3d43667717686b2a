// Which kernels a problem takes, and where their scratch lies in the workspace. Depends on shapes and options only, so
// that the caller can ask for the size without a device.
#ifndef JAXINT8_FFI_CUDA_PLAN_H_
#define JAXINT8_FFI_CUDA_PLAN_H_

#include <cstdint>

#include "gather.h"
#include "gemv.h"
#include "int8.h"
#include "largest.h"
#include "marks.h"
#include "paired.h"
#include "quantize.h"
#include "skinny.h"
#include "sparse_codes.h"
#include "stream.h"

namespace jaxint8::cuda {

// Up to this many rows the product streams the weights; above, it is tiled.
inline constexpr int64_t kStreamM = 16;
// Up to this many rows and activations every block of the streaming kernel quantises all of them itself; it takes one
// row after the other, so that more rows are sooner done by a kernel of their own.
inline constexpr int64_t kFusedM = 2;
inline constexpr int64_t kFusedActivations = 16384;
// The same on Hopper (gemv.h), if the activations leave shared memory for two pieces of weights for each warp. With a
// rule one row: to quantise two of them takes a block as long as a kernel of their own.
inline constexpr int64_t kGemvM = 2;
// Codes in the workspace: rows padded with zeros to a multiple of this.
inline constexpr int64_t kCodeAlign = 256;

// One tile shape of the tiled kernel: outputs per block and the relative time of a block per column of k.
struct TileShape {
  int64_t m, n;
  double cost;
};
// Time of a block per k, in units of a 128 x 128 tile alone on its multiprocessor; smaller tiles use it less well.
inline constexpr TileShape kTileShapes[] = {{128, 128, 1.0}, {64, 64, 0.32}, {32, 64, 0.22}};
inline constexpr int kTileShapeCount = 3;

// The tile shape with the least time: waves of blocks times the cost of one.
inline int ChooseTile(int64_t m, int64_t n, int64_t multiprocessors) {
  int best = 0;
  double least = 0;
  for (int i = 0; i < kTileShapeCount; ++i) {
    const TileShape& s = kTileShapes[i];
    const int64_t blocks = ((m + s.m - 1) / s.m) * ((n + s.n - 1) / s.n);
    const int64_t waves = (blocks + multiprocessors - 1) / multiprocessors;
    const double cost = static_cast<double>(waves) * s.cost;
    if (i == 0 || cost < least) {
      best = i;
      least = cost;
    }
  }
  return best;
}

// The same for the wgmma kernels: columns of a tile of 128 rows, blocks of a cluster, whether warpgroups take turns
// (wgmma.h); nanoseconds of 128 columns of k, of what else a tile takes, and of what comes once. Fitted to times of an
// H200: where shapes are within a percent of each other they decide nothing, so what is measured goes before.
struct WgmmaShape {
  int64_t n, cluster;
  bool turns;
  int64_t step, tile, end;
};
inline constexpr WgmmaShape kWgmmaShapes[] = {{256, 2, false, 600, 5000, 0}, {128, 2, false, 330, 1800, 0},
                                              {192, 1, false, 480, 1640, 0}, {128, 1, false, 358, 1550, 0},
                                              {64, 1, false, 300, 900, 0},   {128, 2, true, 325, 0, 3500},
                                              {128, 1, true, 325, 0, 3200},  {160, 2, true, 405, 0, 5000}};
// Of longer rows outputs are a small part, and taking turns reads them more often from the second-level cache.
inline constexpr int64_t kTurnsK = 8192;
// And for the one with sparse high parts, by the ratios of their steps.
inline constexpr WgmmaShape kSparseShapes[] = {{192, 1, false, 1000, 0, 0}, {160, 1, false, 855, 0, 0},
                                               {128, 1, false, 755, 0, 0},  {112, 1, false, 700, 0, 0},
                                               {96, 1, false, 620, 0, 0},   {64, 1, false, 540, 0, 0}};

template <int kCount>
int ChooseWgmma(const WgmmaShape (&shapes)[kCount], int64_t m, int64_t n, int64_t k, int64_t multiprocessors) {
  int best = -1;
  int64_t least = 0;
  const int64_t tiles_m = (m + 127) / 128, steps = (k + 127) / 128;
  for (int i = 0; i < kCount; ++i) {
    const WgmmaShape& s = shapes[i];
    if (s.cluster > tiles_m || (s.turns && k > kTurnsK)) continue;
    const int64_t tiles = (tiles_m + s.cluster - 1) / s.cluster * ((n + s.n - 1) / s.n);
    const int64_t at_once = multiprocessors / s.cluster > 0 ? multiprocessors / s.cluster : 1;
    const int64_t cost = (tiles + at_once - 1) / at_once * (steps * s.step + s.tile) + s.end;
    if (best < 0 || cost < least) {
      best = i;
      least = cost;
    }
  }
  return best;
}

// Whether high parts are multiplied as sparse operands, at two thirds of the cost of low parts, or gathered by columns,
// which costs another reading of all weights and fewer products: measured on an H200. The largest values of each row
// stand in more columns than values above a threshold do.
inline bool PrefersSparse(const Problem& p, bool by_column) {
  const double products = static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
  if (p.options.rule == Rule::kTopK) return products <= 5e11;
  return by_column ? p.m <= 640 || products <= 2.5e9 : p.m <= 768 || products <= 8e9;
}

// Up to this many rows Hopper's product has the weights in the place of the rows (swapped.h): measured on an H200.
inline constexpr int64_t kSwappedM = 64;

// And of long rows, where all tiles have a multiprocessor: with high parts tiles of 64 rows of activations, so that
// the codes that a tile reads are no more than its weights; without, half tiles of up to 128 rows.
inline constexpr int64_t kSwappedMost = 128, kSwappedMostHigh = 256, kSwappedK = 4096;
inline bool PrefersSwapped(const Problem& p, bool has_rule) {
  if (p.path != Path::kAuto || p.m <= kSwappedM) return p.m <= kSwappedM;
  if (p.k < kSwappedK) return false;
  return has_rule ? p.m <= kSwappedMostHigh && (p.m + 63) / 64 * ((p.n + 127) / 128) <= 128
                  : p.m <= kSwappedMost && p.n <= 4096;
}

// Rows of activations of a tile there.
inline int SwappedRows(int64_t m, bool has_rule) { return m <= 32 ? 32 : m <= 64 || has_rule ? 64 : 128; }

// Rows of weights of a tile there, and blocks that share its k: a power of two, and enough for all multiprocessors,
// with two steps of k for each. Larger clusters than pairs do not fill the chip, whose multiprocessors come in groups
// that are no multiple of four.
struct SwappedShape {
  int rows, cluster;
};
inline int ChooseCluster(int64_t tiles, int64_t k, int64_t multiprocessors) {
  const int64_t steps = (k + 127) / 128;
  int cluster = 1;
  while (cluster < 8 && 2 * cluster * tiles * (cluster > 1 ? 3 : 2) <= 2 * multiprocessors && 4 * cluster <= steps) {
    cluster *= 2;
  }
  return cluster;
}
// rows: of activations of a tile; n: of outputs, of which a tile with a gate has half as many as rows of weights. A
// multiprocessor takes in no more than some 42 bytes a cycle, so half tiles pay where twice as many of them have each a
// multiprocessor, although all read the codes.
inline SwappedShape ChooseSwapped(int64_t m, int64_t n, int64_t k, int rows, bool high, bool gated,
                                  int64_t multiprocessors) {
  const int64_t outputs = gated ? 64 : 128, tiles_m = (m + rows - 1) / rows,
                tiles = tiles_m * ((n + outputs - 1) / outputs), halves = tiles_m * ((n + 63) / 64);
  const SwappedShape whole{128, ChooseCluster(tiles, k, multiprocessors)};
  if (gated || tiles_m > 1) return whole;
  const SwappedShape half{64, ChooseCluster(halves, k, multiprocessors)};
  const auto cost = [&](const SwappedShape& s, int64_t count) {
    return (count * s.cluster + multiprocessors - 1) / multiprocessors * (s.rows + (high ? 2 * rows : rows)) * 8 /
           s.cluster;
  };
  return rows > kSwappedM || cost(half, halves) < cost(whole, tiles) ? half : whole;
}

// And the stages that they keep in shared memory: half of it if there are tiles for two blocks on a multiprocessor.
inline int ChooseStages(int64_t blocks, int64_t multiprocessors, int fit, int stage_bytes) {
  const bool two = fit > 1 && blocks > multiprocessors;
  const int stages = (two ? 104 : 192) * 1024 / stage_bytes;
  return stages < 8 ? stages : 8;
}

// Whether tiles of few columns (narrow.h) are sooner done, by measurement on an H200: of short rows, or where 33 to 64
// rows are no more than weights, or with high parts where there are few tiles of sparse.h. kNarrowK: columns of a layer
// up to which they are sooner done with a gate behind them, too.
inline constexpr int64_t kNarrowK = 2560;
inline bool PrefersNarrow(const Problem& p, bool has_rule) {
  if (p.m > kSwappedM) return has_rule && p.m <= 256 && p.n <= 4096 && !PrefersSwapped(p, true);
  if (p.m <= 32) return p.k < 1024;
  return p.n >= 3 * p.k && (!has_rule || p.k < 2048);
}

// The width of its tiles: that with which a block reads least. More than 97 blocks that read the same codes slow each
// other down.
inline constexpr int kNarrowTiles[] = {32, 48, 64, 96, 128};
inline constexpr int kNarrowStages = 8;  // at most
inline int ChooseNarrow(int64_t m, int64_t n, bool high, int64_t multiprocessors) {
  int best = 0;
  int64_t least = 0;
  for (int i = 0; i < static_cast<int>(sizeof kNarrowTiles / sizeof *kNarrowTiles); ++i) {
    const int64_t width = kNarrowTiles[i], tiles_n = (n + width - 1) / width, tiles = (m + 63) / 64 * tiles_n;
    const int64_t turns = (tiles + multiprocessors - 1) / multiprocessors;
    const int64_t same = tiles_n < multiprocessors ? tiles_n : multiprocessors;
    const int64_t cost = turns * (width + (high ? 128 : 64)) * (same > 97 ? same : 97);
    if (i == 0 || cost < least) {
      best = i;
      least = cost;
    }
  }
  return best;
}

// Shared memory that a block may have.
inline constexpr int64_t kSharedMost = 227 * 1024;

// How paired.h cuts a layer: outputs of a block, groups of values that a thread holds, stages of weights. One block
// fits on a multiprocessor, so that they are spread.
struct PairedShape {
  int outputs = 0, held = 0, stages = 0;  // outputs: 0 if it does not fit
  int64_t shared = 0;
};
// Those that there are: the first of wide enough rows that needs no more blocks than an H200 has at once, or the last.
inline constexpr PairedShape kPairedShapes[] = {{64, 2}, {128, 2}, {64, 4}, {128, 3}};
inline constexpr int64_t kPairedMost = 132;
inline int64_t PairedBlocks(int64_t m, int64_t n, int outputs) {
  return (m + kPairedRows - 1) / kPairedRows * ((n + 2 * outputs - 1) / (2 * outputs)) * 2;
}
inline PairedShape ChoosePaired(const Problem& p, bool high) {
  PairedShape s;
  for (const PairedShape& shape : kPairedShapes) {
    if (p.k > PairedColumns(shape.held)) continue;
    s = shape;
    if (PairedBlocks(p.m, p.n, s.outputs) <= kPairedMost) break;
  }
  if (s.outputs == 0) return s;
  const int steps = static_cast<int>((p.k + 127) / 128);
  s.stages = steps > kPairedGroups ? steps : kPairedGroups;
  const auto bytes = [&] { return MakePairedLayout(high, p.k, s.outputs, s.stages).bytes; };
  while (s.stages > kPairedGroups && bytes() > kSharedMost) --s.stages;
  constexpr int64_t kAlone = 116 * 1024;
  s.shared = bytes() > kAlone ? bytes() : kAlone;
  return s;
}

// Where that is sooner done than by two kernels, by measurement on an H200. All blocks with the same rows quantise
// these, so a rule must be worth it, and what stands before a layer is not.
inline bool PrefersPaired(const Problem& p, bool has_rule) {
  const PairedShape shape = ChoosePaired(p, has_rule);
  if (shape.outputs == 0 || PairedBlocks(p.m, p.n, shape.outputs) > kPairedMost) return false;
  if (p.prologue != Prologue::kNone) return false;
  const int64_t weights = p.n * p.k;
  // Of large weights wide tiles of such rows read too much: without a rule two kernels are sooner done.
  if (!has_rule && shape.held == 3 && weights > int64_t{8} << 20) return false;
  if (!has_rule) return p.m >= 16 || (p.n >= p.k && weights >= int64_t{1} << 20);
  if (p.k < 512) return false;
  if (p.m > 32) return p.n >= 768;
  if (p.m > 16) return p.k <= 1536 && p.n >= 2 * p.k;
  return p.k <= 1536 && weights >= (p.m > 8 ? int64_t{4} << 20 : int64_t{8} << 20);
}

// How gemv.h copies weights: equal pieces of a row, such that the most bytes are on their way, but no more pieces than
// a warp has in all its rows.
struct GemvShape {
  int piece, depth;  // depth 0: it does not fit
  int64_t shared;
};
inline GemvShape ChooseGemv(int rows, bool high, int64_t k, int64_t row_bytes, int64_t rows_of_warp, int64_t beside) {
  GemvShape best{};
  int64_t most = 0;
  for (int64_t pieces = (k + kGemvPiece - 1) / kGemvPiece; pieces <= 4 * k / kGemvPiece + 1; ++pieces) {
    const int piece = static_cast<int>(RoundUp((k + pieces - 1) / pieces, 512));
    if (pieces > 1 && piece < kGemvLeast && best.depth > 0) break;
    for (int depth = 2; depth <= kGemvDepth; ++depth) {
      const int64_t shared = MakeGemvLayout(rows, high, row_bytes, k, piece, depth, beside).bytes;
      if (shared > kSharedMost) break;
      const int64_t ahead = int64_t{piece} * depth < rows_of_warp * k ? int64_t{piece} * depth : rows_of_warp * k;
      if (ahead > most) {
        best = {piece, depth, shared};
        most = ahead;
      }
    }
  }
  return best;
}

// How skinny.h cuts a product: the groups of 16 outputs of a block at once, all alike, and as many steps of a warp as
// fit. unit: groups that stay together, 2 with gates; then n is half of what it is without.
struct SkinnyShape {
  int groups, depth;
  int64_t shared;
};
inline SkinnyShape ChooseSkinny(int tiles, bool high, int64_t n, int unit, int64_t k, int64_t blocks) {
  const int64_t most = ((n + kStreamOutputs - 1) / kStreamOutputs + blocks - 1) / blocks;  // units of a block
  const int64_t boxes = ((k + kBoxK - 1) / kBoxK + kSkinnyWarps - 1) / kSkinnyWarps;
  SkinnyShape best{};
  for (int64_t turns = (unit * most + kSkinnyGroups - 1) / kSkinnyGroups; turns <= most; ++turns) {
    SkinnyShape s{unit * static_cast<int>((most + turns - 1) / turns), 0, 0};
    for (int depth = 1; depth <= kSkinnyDepth && depth <= turns * boxes; ++depth) {
      const int64_t bytes = MakeSkinnyLayout(tiles, high, s.groups, depth).bytes;
      if (bytes > kSharedMost) break;
      s.depth = depth;
      s.shared = bytes;
    }
    // With more groups at once codes are read less often, but half as many weights again on their way gain more.
    if (best.groups == 0 || 2 * s.depth * s.groups >= 3 * best.depth * best.groups) best = s;
  }
  return best;
}

// Steps whose weights are asked for before the rows are quantised, by measurement on an H200: no more than arrives
// meanwhile, since a kernel learns that the one before it has ended only when memory has given what it was asked for
// (3.3 us late with a whole ring on its way, 0.6 with these). By a rule rows take longer; 16 rows of codes with high
// parts are many themselves. base, step: bytes of a block.
inline constexpr int64_t kSkinnyEarly = 60 * 1024, kSkinnyEarlyHigh = 45 * 1024;
inline constexpr int64_t kSwappedEarly = 20 * 1024, kSwappedEarlyHigh = 40 * 1024;
inline int EarlySteps(int64_t base, int64_t k, int64_t step, int most) {
  const int64_t steps = (base + 3 * k + step / 2) / step;  // long rows take longer
  return steps < most ? static_cast<int>(steps) : most;
}

// How many warps share the k of 16 outputs in the streaming kernel.
inline int ChooseSplit(int64_t k) {
  int split = 1;
  while (split < kStreamWarps && split * kPiece < k) split *= 2;
  return split;
}

// How the marks of a column-scope rule are found: see QuantizeParams.
struct Marking {
  int64_t parts;
  int blocks;
};
inline Marking ChooseMarking(const Problem& p, int64_t stride, bool hopper, bool gather, bool prologue) {
  if (gather) return {1, 1};
  const int64_t staged = StagedBytes(p.type, p.k, stride, Prologue::kNone), bytes = p.m * staged;
  if (p.options.rule == Rule::kThreshold && !prologue && staged > 0 && p.m <= kMarkedRows) {
    if (bytes <= kMarkedAlone) return {0, 1};
    // 32 and 64 rows of 768 columns: 7.1 and 7.7 us, with a kernel before them 7.7 and 8.4; 16 x 4096 25.8 and 25.5,
    // and 256 x 1024 17.2 and 12.8 (all of the layer, on an H200).
    if (hopper && p.m > 16 && p.m <= 64 && bytes <= kMarkedBytes) return {0, kMarkBlocks};
  }
  return {p.m * p.m * MarkWords(p.k) <= kMarkedWords ? p.m : 1, 1};
}

struct Plan {
  const char* error = nullptr;
  bool stream = false, fused = false;
  bool gemv = false;     // Hopper's fused kernel; then `fused` as well
  bool skinny = false;   // Hopper's kernel for few rows; then not `stream`
  bool narrow = false;   // Hopper's kernel for some tens of rows
  bool paired = false;   // Hopper's fused kernel for these; then `fused` as well
  bool sparse = false;   // high parts are compressed, and multiplied by sparse.h
  bool swapped = false;  // Hopper's kernel for some tens of rows of wide weights
  bool gather = false;   // the columns that hold high parts are gathered
  bool wide = false;     // a cluster quantises each row
  bool has_rule = false, by_column = false;
  bool apart = false;                     // what stands before the layer is done by a kernel of its own
  bool align_a = false, align_w = false;  // copy to a stride that is a multiple of 16
  int64_t stride = 0;                     // of codes (and aligned copies)
  int64_t code_rows = 0;                  // rows of codes with those beyond m, which are zeros
  int64_t piece_stride = 0;
  int64_t capacity = 0;  // gathered columns
  Marking marking{};     // see QuantizeParams
  bool clear = false;    // the bits before each call
  // Offsets in the workspace; 0 where unused. The bits come first.
  int64_t bits = 0, bits_bytes = 0;
  int64_t sparse_codes = 0, sparse_codes_bytes = 0, sparse_flags = 0, sparse_flags_bytes = 0;
  int64_t rows = 0, lo = 0, hi = 0, row_scale = 0, pieces = 0, count = 0, gathered_a = 0, gathered_w = 0;
  int64_t aligned_w = 0;
  int64_t bytes = 0;
};

// Rows of codes in a box of the copy engine, which takes longer for one that reaches beyond a matrix: 65 rows of 4096
// square took 14.5 us, with zeros up to 128 rows 12.2 (an H200).
inline int64_t TileRows(const Problem& p, const Plan& plan) {
  if (plan.stream || plan.skinny || p.path == Path::kTiled || p.k == 0) return 1;
  return plan.narrow ? 64 : plan.swapped ? SwappedRows(p.m, plan.has_rule) : 128;
}

inline Plan MakePlan(const Problem& p, bool hopper) {
  Plan plan;
  if (p.kind == Problem::Kind::kLargest) {
    if (p.k > int64_t{1} << 30) plan.error = "x: expected rows of at most 2^30 values";
    if (p.n < 1 || p.n > kLargestMost || p.n > p.k) plan.error = "count: expected 1 to 64 of each row";
    const int64_t parts = ChooseLargest(p.m, p.k).parts;
    plan.bytes = parts > 1 ? 8 * p.m * parts * kLargestKept : 0;
    return plan;
  }
  const bool linear = p.kind == Problem::Kind::kLinear, quantize = p.kind == Problem::Kind::kQuantize;
  if (p.k > kMaxK) {
    plan.error = "k: int32 sums are exact up to k = 133144";
    return plan;
  }
  if (p.path == Path::kStream && !quantize && p.m > kStreamM) {
    plan.error = "the streaming kernel takes at most 16 rows";
    return plan;
  }
  if (p.kind == Problem::Kind::kPrologue) return plan;
  plan.has_rule = !(p.kind == Problem::Kind::kProduct) && p.options.rule != Rule::kNone;
  const bool scoped = p.options.rule == Rule::kThreshold || p.options.rule == Rule::kRelative;
  plan.by_column = plan.has_rule && scoped && p.options.column_scope && p.m > 1;
  const bool few = p.m <= kStreamM;
  plan.stream = !quantize && few && (p.path == Path::kAuto || p.path == Path::kStream);
  plan.stride = quantize ? p.k : RoundUp(p.k, kCodeAlign);
  const int rows = static_cast<int>(p.m < kGemvM ? p.m : kGemvM);
  const int64_t row_bytes = p.k * TypeBytes(p.type);
  plan.gemv =
      hopper && linear && (p.path == Path::kAuto || p.path == Path::kWgmma) && p.k % 16 == 0 && p.k > 0 &&
      p.m <= (plan.has_rule ? 1 : kGemvM) &&
      ChooseGemv(rows, plan.has_rule, p.k, row_bytes, 2, GemvBeside(p.prologue, rows, row_bytes, p.k)).depth > 0;
  plan.skinny = hopper && !quantize && !plan.gemv && (p.path == Path::kAuto || p.path == Path::kWgmma) &&
                p.k % 16 == 0 && p.k > 0 && p.m <= kStreamM;
  plan.stream = (plan.stream && !plan.skinny) || plan.gemv;
  plan.narrow = hopper && !quantize && !plan.stream && !plan.skinny && !p.gated && p.k > 0 &&
                (p.path == Path::kNarrow || (p.path == Path::kAuto && PrefersNarrow(p, plan.has_rule)));
  plan.paired = hopper && linear && !plan.gemv && !plan.by_column && !p.gated && p.k > 0 && p.k % 16 == 0 &&
                p.options.rule != Rule::kTopK && ChoosePaired(p, plan.has_rule).outputs > 0 &&
                (p.path == Path::kPaired || (p.path == Path::kAuto && PrefersPaired(p, plan.has_rule)));
  plan.fused = plan.gemv || plan.paired ||
               (plan.stream && linear && p.k % 16 == 0 && p.m <= kFusedM && p.m * p.k <= kFusedActivations);
  plan.apart = linear && p.prologue != Prologue::kNone && !plan.gemv && !plan.paired &&
               (plan.fused || StagedBytes(p.type, p.k, plan.stride, p.prologue) == 0);
  plan.sparse = hopper && linear && plan.has_rule && !plan.stream && !plan.skinny && !plan.narrow && p.k > 0 &&
                (p.path == Path::kSparse ||
                 (p.path == Path::kAuto && !PrefersSwapped(p, true) && PrefersSparse(p, plan.by_column)));
  plan.swapped = hopper && !quantize && p.path != Path::kTiled && p.k > 0 && PrefersSwapped(p, plan.has_rule) &&
                 !plan.stream && !plan.skinny && !plan.narrow && !plan.sparse;
  plan.code_rows = RoundUp(p.m, hopper && linear ? TileRows(p, plan) : 1);
  plan.align_w = !quantize && !plan.stream && p.k % 16 != 0;
  plan.align_a = p.kind == Problem::Kind::kProduct && (plan.stream || plan.align_w);

  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const int64_t at = end;
    end += RoundUp(bytes, 128);
    return at;
  };
  const bool prepared = linear && !plan.fused;
  plan.gather =
      prepared && plan.has_rule && !plan.stream && !plan.skinny && !plan.sparse && !plan.narrow && !plan.swapped;
  const bool marks = plan.by_column && !plan.fused;
  if (marks) {
    const bool prologue = linear && p.prologue != Prologue::kNone && !plan.apart;  // of the quantiser
    plan.marking = ChooseMarking(p, plan.stride, hopper, plan.gather, prologue);
  }
  plan.wide = hopper && (quantize || prepared) && !plan.stream && !plan.by_column && !plan.sparse &&
              p.path != Path::kTiled && p.k % 8 == 0 && p.k > kWideColumns && p.k <= kWideMost &&
              p.m <= WideRows(plan.has_rule);
  plan.clear = marks ? plan.marking.parts == 1 : plan.gather;
  plan.bits_bytes = (marks ? plan.marking.parts : plan.gather ? 1 : 0) * 4 * MarkWords(p.k);
  if (plan.bits_bytes > 0) plan.bits = take(plan.bits_bytes);
  if (plan.apart) plan.rows = take(p.m * row_bytes);
  if (prepared || plan.align_a) plan.lo = take(plan.code_rows * plan.stride);
  if (prepared) {
    plan.row_scale = take(4 * p.m);
    if (plan.has_rule) plan.hi = take(plan.code_rows * plan.stride);
    if (plan.has_rule && plan.stream) {
      plan.piece_stride = (p.k + kPiece - 1) / kPiece;
      plan.pieces = take(p.m * plan.piece_stride);
    }
  }
  if (plan.sparse) {
    const int64_t blocks = (p.m + 63) / 64 * (plan.stride / 128);
    plan.sparse_codes_bytes = blocks * kSparseBytes;
    plan.sparse_flags_bytes = blocks * 64;
    plan.sparse_codes = take(plan.sparse_codes_bytes);
    plan.sparse_flags = take(plan.sparse_flags_bytes);
  }
  if (plan.gather) {
    const int64_t quarter = RoundUp((p.k + 3) / 4, kGatherStep);
    plan.capacity = quarter < kGatherMost ? quarter : kGatherMost;
    plan.count = take(4);
    plan.gathered_a = take(p.m * plan.capacity);
    plan.gathered_w = take(p.n * plan.capacity);
  }
  if (plan.align_w) plan.aligned_w = take(p.n * plan.stride);
  plan.bytes = end;
  return plan;
}

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_PLAN_H_
