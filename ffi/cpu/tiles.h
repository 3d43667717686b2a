// Large products of the rungs with registers of 128 and 256 bits: weights packed into panels, tiles of sums in
// registers.
//
// One panel of weights, [sub-panel of kTileN outputs][kWord columns after kWord][kTileN][kWord], serves all rows of a
// block; a tile is kTileM * kRows rows by kTileN outputs. Packing takes a few percent of the time at m = 128, so it is
// not hidden behind the multiplication as in tiles_avx512.h. The surprising fact is that rows may be rewritten too
// (kArranged): once per tile into the L1 cache, where all its outputs use them, instead of once per multiplication.
//
// V, the traits of an instruction set, says here beside what dots.h lists:
//   Packed                  a register of packed weights: kLanes words of kWord columns
//   kLanes, kWord, kBytes   kBytes: of a register
//   kRows                   rows of activations in a register of sums: 1, or 2 for a matrix product
//   kTileM, kTileZ          registers of sums in a tile, along rows and along outputs; kTileN = kTileZ * kLanes
//   kWords                  words per step of a tile
//   kPanelK                 columns of a panel
//   LoadRow(w)              kLanes words of one row of weights
//   Transpose(r)            of kLanes registers of kLanes words
//   LoadPacked, StorePacked
//   kArranged               whether rows are rewritten; then Arrange(x, stride, rows, columns, out)
//   kCodeBytes              bytes of one step of codes (of kRows rows), and LoadTileCodes(p)
//   MulAddTile<s>(sums, packed, codes): adds the products of word s of the step
//   AddTile(acc[kTileZ], c, rows)       adds sums to c of at most kRows rows
//   kHiRegisters, MulAddHi(sums[], sub_panel, group, four), AddHi(sums[], c): c += 128 * sums
//   kHiPanels               sub-panels whose high parts are added together; they divide a block
#ifndef JAXINT8_FFI_CPU_TILES_H_
#define JAXINT8_FFI_CPU_TILES_H_

#include <cstdint>
#include <cstring>

#include "dots.h"
#include "int8.h"
#include "rows.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

constexpr int64_t kChunkM = 256;

template <class V>
struct alignas(64) TileScratch {
  static constexpr int64_t kWeightBytes = V::kBytes / (V::kLanes * V::kWord);  // of one packed weight
  static constexpr int64_t kTileN = V::kTileZ * V::kLanes;
  static constexpr int64_t kPanelBytes = kBlockN * V::kPanelK * kWeightBytes;
  static_assert(kPanelBytes >= HiPlan::kMaxGroups * kBlockN * 4);
  static_assert(kBlockN % kTileN == 0 && V::kPanelK % 64 == 0 && 64 % (V::kLanes * V::kWord) == 0);
  // Arranged codes of a register of rows; a line more, so that the rows of a tile fall into different sets.
  static constexpr int64_t kCodesStride = V::kPanelK / (V::kWords * V::kWord) * V::kCodeBytes + 64;

  alignas(64) uint8_t panel[kPanelBytes];
  alignas(64) uint8_t codes[V::kArranged ? V::kTileM * kCodesStride : 1];
  int32_t next_hi[kChunkM];  // per row: the first of its words that is not yet added
};

// The columns of the packed panel, [begin, end) of k, and what a sub-panel occupies.
struct PanelColumns {
  int64_t begin, end, sub_bytes;
};

// Packs kLanes rows of weights, of which n exist, kLanes words of columns from t on; zeros where the matrix ends.
template <class V>
ALWAYS_INLINE inline void PackSquare(const int8_t* w, int64_t stride, int64_t n, int64_t columns, uint8_t* out) {
  constexpr int L = V::kLanes;
  constexpr int64_t kSquare = L * V::kWord;
  typename V::Packed r[L];
  if (n >= L && columns >= kSquare) {
    Unroll<L>([&](auto i) ALWAYS_INLINE { r[i] = V::LoadRow(w + i * stride); });
  } else {
    int8_t padded[L][kSquare] = {};
    for (int i = 0; i < L && i < n && columns > 0; ++i) {
      std::memcpy(padded[i], w + i * stride, static_cast<size_t>(columns < kSquare ? columns : kSquare));
    }
    Unroll<L>([&](auto i) ALWAYS_INLINE { r[i] = V::LoadRow(padded[i]); });
  }
  V::Transpose(r);
  Unroll<L>([&](auto i) ALWAYS_INLINE { V::StorePacked(out + i * V::kTileZ * V::kBytes, r[i]); });
}

// Packs n rows of weights; outputs up to a multiple of kTileN and columns up to one of 64 become zero weights. A line
// of weights at a time: rows at a stride of 4096 fall into the same few lines of the L1 cache and would not stay there.
template <class V>
void Pack(const int8_t* w, int64_t stride, int64_t n, const PanelColumns& columns, uint8_t* panel) {
  constexpr int64_t kSquare = V::kLanes * V::kWord, kTileN = TileScratch<V>::kTileN;
  constexpr int64_t kWordBytes = V::kTileZ * V::kBytes;  // of kWord columns of a sub-panel
  const int64_t width = columns.end - columns.begin;
  for (int64_t j = 0; j < n; j += kTileN, panel += columns.sub_bytes) {
    const int8_t* in = w + j * stride + columns.begin;
    for (int64_t t = 0; t < width; t += 64) {
      for (int64_t i = kTileN; i < 2 * kTileN; ++i) __builtin_prefetch(in + i * stride + t, 0, 2);
      for (int64_t z = 0; z < V::kTileZ; ++z) {
        const int64_t first = z * V::kLanes;
        for (int64_t s = t; s < t + 64; s += kSquare) {
          uint8_t* out = panel + s / V::kWord * kWordBytes + z * V::kBytes;
          PackSquare<V>(in + first * stride + s, stride, n - j - first, width - s, out);
        }
      }
    }
  }
}

// c[M * kRows][kTileN] += codes . sub-panel, of which only `rows` rows exist.
template <class V, int M>
void Tile(const uint8_t* codes, int64_t stride, const uint8_t* panel, int64_t steps, int32_t* c, int64_t rows) {
  constexpr int Z = V::kTileZ;
  typename V::Sums acc[M][Z];
  Unroll<M * Z>([&](auto i) ALWAYS_INLINE { acc[i / Z][i % Z] = V::Zero(); });
  for (int64_t step = 0; step < steps; ++step) {
    Unroll<V::kWords>([&](auto s) ALWAYS_INLINE {
      typename V::Packed w[Z];
      Unroll<Z>([&](auto z) ALWAYS_INLINE { w[z] = V::LoadPacked(panel + (s * Z + z) * V::kBytes); });
      Unroll<M>([&](auto i) ALWAYS_INLINE {
        const auto four = V::LoadTileCodes(codes + i * stride);
        Unroll<Z>([&](auto z)
                      ALWAYS_INLINE { acc[i][z] = V::template MulAddTile<decltype(s)::value>(acc[i][z], w[z], four); });
      });
    });
    panel += V::kWords * Z * V::kBytes;
    codes += V::kCodeBytes;
  }
  Unroll<M>([&](auto i) ALWAYS_INLINE { V::AddTile(acc[i], c + i * V::kRows * kBlockN, rows - i * V::kRows); });
}

template <class V, int M = V::kTileM>
ALWAYS_INLINE inline void TileOf(int64_t registers, const uint8_t* codes, int64_t stride, const uint8_t* panel,
                                 int64_t steps, int32_t* c, int64_t rows) {
  if constexpr (M > 1) {
    if (registers < M) return TileOf<V, M - 1>(registers, codes, stride, panel, steps, c, rows);
  }
  Tile<V, M>(codes, stride, panel, steps, c, rows);
}

// c += (hi . W) << 7 for the high parts of one row that lie in the panel. `next` is the first word not yet added.
template <class V>
void AddHiWords(const Row& row, const PanelColumns& columns, int64_t n, const uint8_t* panel, int32_t* next,
                int32_t* c) {
  const int32_t begin = *next;
  int32_t stop = begin;
  while (stop < row.words && row.hi[stop].group * 4 < columns.end) ++stop;
  *next = stop;
  if (begin == stop) return;
  // So many sub-panels at once, as the end of the list is mispredicted for each of them. Those beyond n hold anything,
  // and so do their outputs.
  constexpr int P = V::kHiPanels, R = V::kHiRegisters;
  for (int64_t j = 0; j < n; j += P * TileScratch<V>::kTileN, panel += P * columns.sub_bytes) {
    typename V::Sums sum[P][R];
    Unroll<P * R>([&](auto z) ALWAYS_INLINE { sum[z / R][z % R] = V::Zero(); });
    for (int32_t word = begin; word < stop; ++word) {
      Unroll<P>([&](auto p) ALWAYS_INLINE {
        V::MulAddHi(sum[p], panel + p * columns.sub_bytes, row.hi[word].group - columns.begin / 4, row.hi[word].four);
      });
    }
    Unroll<P>([&](auto p) ALWAYS_INLINE { V::AddHi(sum[p], c + j + p * TileScratch<V>::kTileN); });
  }
}

template <class V>
void MultiplyTiled(const Block& b) {
  using S = TileScratch<V>;
  auto* scratch = reinterpret_cast<S*>(b.scratch);
  constexpr int64_t kHeight = V::kTileM * V::kRows, kStep = V::kWords * V::kWord;
  const int64_t tiles = (b.m + kHeight - 1) / kHeight, panels = (b.k + V::kPanelK - 1) / V::kPanelK;
  const int64_t width = ((b.k + panels - 1) / panels + 63) / 64 * 64;
  if (b.with_hi) std::memset(scratch->next_hi, 0, static_cast<size_t>(b.m) * sizeof *scratch->next_hi);
  for (int64_t t = 0; t < b.k; t += width) {
    const int64_t end = t + width < b.k ? t + width : b.k, padded = (end - t + 63) / 64 * 64;
    const PanelColumns columns{t, end, padded * S::kTileN * S::kWeightBytes};
    Pack<V>(b.w, b.k, b.n, columns, scratch->panel);
    int64_t first = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {  // heights differ by one at most, so that no tile is thin
      const int64_t rows = b.m / tiles + (tile < b.m % tiles);
      int32_t* c = b.c + first * kBlockN;
      for (int64_t i = 0; i < rows; ++i) {
        const Row& row = b.rows[first + i];
        if (t == 0) {
          const int32_t correction = Correction<V>(row);
          for (int64_t j = 0; j < kBlockN; ++j) c[i * kBlockN + j] = correction;
        }
        if (b.with_hi) {
          AddHiWords<V>(row, columns, b.n, scratch->panel, scratch->next_hi + first + i, c + i * kBlockN);
        }
      }
      const int8_t* x = b.lo + first * b.stride + t;
      const auto* codes = reinterpret_cast<const uint8_t*>(x);
      int64_t stride = b.stride;
      if constexpr (V::kArranged) {
        V::Arrange(x, b.stride, rows, padded, scratch->codes, S::kCodesStride);
        codes = scratch->codes;
        stride = S::kCodesStride;
      }
      const uint8_t* panel = scratch->panel;
      for (int64_t j = 0; j < b.n; j += S::kTileN, panel += columns.sub_bytes) {
        TileOf<V>((rows + V::kRows - 1) / V::kRows, codes, stride, panel, padded / kStep, c + j, rows);
      }
      if (b.epilogue && end == b.k) Finish(*b.epilogue, first, first + rows);
      first += rows;
    }
  }
}

// Dot products, by the traits D, where the weights are read more slowly than multiplied.
template <class V, class D = V>
void Multiply(const Block& b) {
  const bool planned = b.plan || !b.with_hi;
  if (b.k == 0 || (b.m <= D::kDotsMost && planned)) {
    return MultiplyDots<D>(b, reinterpret_cast<TileScratch<V>*>(b.scratch)->panel);
  }
  MultiplyTiled<V>(b);
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_TILES_H_
