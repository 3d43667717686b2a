// What the products of warpgroups (wgmma.h, sparse.h) have in common: the order of output tiles, and how a tile's sums
// become outputs.
//
// The scales and biases of a tile's columns wait in shared memory, fetched by a warp of their own while the tile is
// multiplied: asked for at its end, they took longer than all the rest of the outputs.
#ifndef JAXINT8_FFI_CUDA_TILE_OUTPUT_H_
#define JAXINT8_FFI_CUDA_TILE_OUTPUT_H_

#include "epilogue.h"
#include "hopper.h"

namespace jaxint8::cuda {

// Shared memory of TileOutput: scale and bias of each column, then two barriers: they are there, they are not needed
// any more.
constexpr int TileOutputBytes(int columns) { return 8 * columns + 16; }

#ifdef JAXINT8_HOPPER

struct TilePlace {
  int32_t m, n;
};

// Tiles of kTileM x kTileN, those of kBlocks neighbouring rows of tiles to one cluster, which takes every so manyth
// turn; bands of m share weights and activations.
template <int kTileM, int kTileN, int kBlocks>
class TileOrder {
 public:
  JAXINT8_DEVICE TileOrder(int64_t m, int64_t n, uint32_t rank)
      : rank_(rank),
        tiles_m_(static_cast<uint32_t>((m + kTileM * kBlocks - 1) / (kTileM * kBlocks))),
        tiles_n_(static_cast<uint32_t>((n + kTileN - 1) / kTileN)) {}

  // Calls body(place) for each tile of this block.
  template <typename Body>
  JAXINT8_DEVICE void ForEach(Body body) const {
    const auto first = static_cast<uint32_t>(BlockIndex()), step = static_cast<uint32_t>(BlockCount());
#pragma unroll 1
    for (uint32_t at = first / kBlocks; at < tiles_m_ * tiles_n_; at += step / kBlocks) body(At(at));
  }

 private:
  static constexpr uint32_t kBand = 16 / kBlocks;

  JAXINT8_DEVICE TilePlace At(uint32_t at) const {
    const uint32_t band = at / (kBand * tiles_n_), in_band = at % (kBand * tiles_n_);
    const uint32_t height = tiles_m_ - band * kBand < kBand ? tiles_m_ - band * kBand : kBand;
    const uint32_t m = (band * kBand + in_band % height) * kBlocks + rank_;
    return {static_cast<int32_t>(m * kTileM), static_cast<int32_t>(in_band / height * kTileN)};
  }

  const uint32_t rank_, tiles_m_, tiles_n_;  // of tiles fewer than 2^32, since outputs fit in memory
};

// Outputs of tiles of 128 rows and kTileN columns, of which two warpgroups have 64 rows each. Threads 128 and up are
// theirs.
template <int kTileN, int kGroups = 2>
class TileOutput {
 public:
  static constexpr int kSums = kTileN / 2;  // of a thread: 64 x kTileN in 128 threads

  // at: where its bytes are in the block's shared memory, a multiple of 16.
  JAXINT8_DEVICE TileOutput(const Epilogue& epilogue, int64_t m, int64_t n, uint32_t at)
      : e_(epilogue),
        m_(m),
        n_(n),
        columns_(SharedMemory() + at),
        full_(SharedAddress(SharedMemory()) + at + 8 * kTileN),
        empty_(full_ + 8) {}

  JAXINT8_DEVICE void InitBarriers() const {
    InitBarrier(full_, 32);            // one arrival of each lane that fetches
    InitBarrier(empty_, 4 * kGroups);  // one arrival of each multiplying warp
  }

  // By one warp, for each tile in turn.
  JAXINT8_DEVICE void Provide(TilePlace place) {
    const int lane = ThreadIndex() % 32;
    WaitBarrier(empty_, parity_ ^ 1);
#pragma unroll
    for (int i = lane; i < kTileN; i += 32) {
      const int64_t n = place.n + i;
      const bool valid = n < n_ && e_.type != Type::kS32;
      const float scale = valid ? Load(e_.w_scale + n) : 0, bias = valid && e_.bias ? Load(e_.bias + n) : kNoBias;
      StoreAs<Word2>(columns_ + 8 * i, Word2{Bits(scale), Bits(bias)});
    }
    Arrive(full_);
    parity_ ^= 1;
  }

  // The scales of this thread's two rows, early, as they take a while to come.
  struct Rows {
    float scale[2];
  };
  JAXINT8_DEVICE Rows RowsOf(TilePlace place) const {
    Rows rows{{0, 0}};
    if (e_.type == Type::kS32) return rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (Row(place) + 8 * h < m_) rows.scale[h] = Load(e_.row_scale + Row(place) + 8 * h);
    }
    return rows;
  }

  // By all threads of the warpgroups, for each tile in turn; the sums are those of 64 rows of each.
  template <int kHalves>
  JAXINT8_DEVICE void Finish(const int32_t (&c)[kHalves][kSums], TilePlace place, const Rows (&rows)[kHalves]) {
    WaitBarrier(full_, parity_);
    WithTypeOf(e_, [&](auto type) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        FinishAs<decltype(type)::kType>(c[h], TilePlace{place.m + 64 * h, place.n}, rows[h]);
      }
    });
    WarpBarrier();
    if (ThreadIndex() % 32 == 0) Arrive(empty_);
    parity_ ^= 1;
  }

 private:
  static JAXINT8_DEVICE int64_t Row(TilePlace place) {  // and Row + 8
    const int thread = (ThreadIndex() - 128) % (128 * kGroups);
    return place.m + thread / 32 * 16 + thread % 32 / 4;
  }

  // Words of outputs of a thread in a chunk, 32 columns of 16 rows of a warp: of the upper and of the lower rows.
  template <Type kType>
  static constexpr int kWords = kType == Type::kF32 || kType == Type::kS32 ? 8 : 4;
  static constexpr int kChunks = (kTileN + 31) / 32;

  // The code that runs for a tile is one piece: only that of its type, with what is added or without.
  template <Type kType>
  JAXINT8_DEVICE void FinishAs(const int32_t (&c)[kSums], TilePlace place, const Rows& rows) const {
    Epilogue e = e_;
    e.type = kType;
    if (n_ % 8 != 0) {
      FinishSingly(e, c, place, rows);
    } else if (kType != Type::kS32 && e.residual) {
      FinishWords<kType, true>(e, c, place, rows);
    } else {
      FinishWords<kType, false>(e, c, place, rows);
    }
  }

  JAXINT8_DEVICE void FinishSingly(const Epilogue& e, const int32_t (&c)[kSums], TilePlace place,
                                   const Rows& rows) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (place.n + 32 * j >= n_) break;
      uint32_t y[2][8] = {};
      MakeOutputs(e, c, j, rows, y);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = Row(place) + 8 * half;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int64_t n = place.n + 32 * j + 8 * (i / 2) + 2 * (ThreadIndex() % 4) + i % 2;
          if (32 * j + 8 * (i / 2) < kTileN && m < m_ && n < n_) StoreOutput(e, m, n, y[half][i]);
        }
      }
    }
  }

  // n is a multiple of 8. What is added to the layer is asked for some chunks before it is needed.
  template <Type kType, bool kAdds>
  JAXINT8_DEVICE void FinishWords(const Epilogue& e, const int32_t (&c)[kSums], TilePlace place,
                                  const Rows& rows) const {
    constexpr int kAhead = kAdds && kGroups > 1 ? 16 / kWords<kType> : 1;
    uint32_t added[kAhead][2][kWords<kType>] = {};
#pragma unroll
    for (int j = 0; kAdds && j < kAhead && j < kChunks; ++j) LoadWords<kType>(e.residual, place, j, added[j]);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (place.n + 32 * j >= n_) break;
      uint32_t y[2][8] = {}, words[2][kWords<kType>];
      MakeOutputs(e, c, j, rows, y);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pack<kType>(y[half], j, words[half]);
#pragma unroll
        for (int i = 0; kAdds && i < kWords<kType>; ++i) {
          words[half][i] = AddResiduals(e, words[half][i], added[j % kAhead][half][i]);
        }
      }
      if (kAdds && j + kAhead < kChunks) LoadWords<kType>(e.residual, place, j + kAhead, added[j % kAhead]);
      StoreWords<kType>(e.y, place, j, words);
    }
  }

  // Outputs of a chunk, two neighbours in each eight columns.
  JAXINT8_DEVICE void MakeOutputs(const Epilogue& e, const int32_t (&c)[kSums], int j, const Rows& rows,
                                  uint32_t (&y)[2][8]) const {
#pragma unroll
    for (int q = 0; q < 4 && 32 * j + 8 * q < kTileN; ++q) {
      const Word4 columns = LoadAs<Word4>(columns_ + 8 * (32 * j + 8 * q + 2 * (ThreadIndex() % 4)));
      const float w_scale[2] = {FloatFromBits(columns.x), FloatFromBits(columns.z)};
      const float bias[2] = {FloatFromBits(columns.y), FloatFromBits(columns.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[i / 2][2 * q + i % 2] = Output(e, c[16 * j + 4 * q + i], rows.scale[i / 2], w_scale[i % 2], bias[i % 2]);
      }
    }
  }

  // Whether a thread of a chunk has eight neighbours of 16 bits, not two in each eight columns.
  template <Type kType>
  static JAXINT8_DEVICE constexpr bool InOne(int j) {
    return kWords<kType> == 4 && 32 * j + 32 <= kTileN;
  }

  template <Type kType>
  static JAXINT8_DEVICE void Pack(const uint32_t (&y)[8], int j, uint32_t (&words)[kWords<kType>]) {
    if constexpr (kWords<kType> == 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i) words[i] = y[i];
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) words[q] = y[2 * q] | y[2 * q + 1] << 16;
      if (InOne<kType>(j)) TransposeQuad(words, ThreadIndex() % 4);
    }
  }

  // Calls body(half, i, byte) for each piece of a thread's outputs in a chunk: the words from i on are those at `byte`.
  template <Type kType, typename Body>
  JAXINT8_DEVICE void ForPieces(TilePlace place, int j, Body body) const {
    constexpr int64_t kBytes = kWords<kType> / 2;  // of an output
    const int t = ThreadIndex() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = Row(place) + 8 * half, first = place.n + 32 * j;
      if (m >= m_) continue;
      if (InOne<kType>(j)) {
        if (first + 8 * t < n_) body(half, 0, kBytes * (m * n_ + first + 8 * t));
        continue;
      }
#pragma unroll
      for (int q = 0; q < 4 && 32 * j + 8 * q < kTileN; ++q) {
        if (first + 8 * q < n_) body(half, q * kWords<kType> / 4, kBytes * (m * n_ + first + 8 * q + 2 * t));
      }
    }
  }

  template <Type kType>
  JAXINT8_DEVICE void LoadWords(Ptr<const uint8_t> from, TilePlace place, int j,
                                uint32_t (&words)[2][kWords<kType>]) const {
    ForPieces<kType>(place, j, [&](int half, int i, int64_t at) {
      uint32_t (&to)[kWords<kType>] = words[half];
      if constexpr (kWords<kType> == 8) {
        const Word2 two = LoadAs<Word2>(from + at);
        to[i] = two.x;
        to[i + 1] = two.y;
      } else if (InOne<kType>(j)) {
        const Word4 four = LoadAs<Word4>(from + at);
        to[0] = four.x;
        to[1] = four.y;
        to[2] = four.z;
        to[3] = four.w;
      } else {
        to[i] = LoadAs<uint32_t>(from + at);
      }
    });
  }

  template <Type kType>
  JAXINT8_DEVICE void StoreWords(Ptr<uint8_t> to, TilePlace place, int j,
                                 const uint32_t (&words)[2][kWords<kType>]) const {
    ForPieces<kType>(place, j, [&](int half, int i, int64_t at) {
      const uint32_t (&from)[kWords<kType>] = words[half];
      if constexpr (kWords<kType> == 8) {
        StoreAs<Word2>(to + at, Word2{from[i], from[i + 1]});
      } else if (InOne<kType>(j)) {
        StoreAs<Word4>(to + at, Word4{from[0], from[1], from[2], from[3]});
      } else {
        StoreAs<uint32_t>(to + at, from[i]);
      }
    });
  }

  const Epilogue& e_;
  const int64_t m_, n_;
  const Ptr<uint8_t> columns_;
  const uint32_t full_, empty_;
  uint32_t parity_ = 0;  // of the tile in turn
};

#endif

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_TILE_OUTPUT_H_
