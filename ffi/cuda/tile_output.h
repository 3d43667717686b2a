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
        tiles_m_((m + kTileM * kBlocks - 1) / (kTileM * kBlocks)),
        tiles_n_((n + kTileN - 1) / kTileN),
        turns_(tiles_m_ * tiles_n_) {}

  // Calls body(place) for each tile of this block.
  template <typename Body>
  JAXINT8_DEVICE void ForEach(Body body) const {
#pragma unroll 1
    for (int64_t at = BlockIndex() / kBlocks; at < turns_; at += BlockCount() / kBlocks) body(At(at));
  }

 private:
  static constexpr int64_t kBand = 16 / kBlocks;

  JAXINT8_DEVICE TilePlace At(int64_t at) const {
    const int64_t band = at / (kBand * tiles_n_);
    const int64_t height = tiles_m_ - band * kBand < kBand ? tiles_m_ - band * kBand : kBand;
    const int64_t in_band = at - band * kBand * tiles_n_;
    const int64_t m = (band * kBand + in_band % height) * kBlocks + rank_;
    return {static_cast<int32_t>(m * kTileM), static_cast<int32_t>(in_band / height * kTileN)};
  }

  const uint32_t rank_;
  const int64_t tiles_m_, tiles_n_, turns_;
};

// Outputs of tiles of 128 rows and kTileN columns, of which two warpgroups have 64 rows each. Threads 128 and up are
// theirs.
template <int kTileN>
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
    InitBarrier(full_, 32);  // one arrival of each lane that fetches
    InitBarrier(empty_, 8);  // one arrival of each multiplying warp
  }

  // By one warp, for each tile in turn.
  JAXINT8_DEVICE void Provide(TilePlace place) {
    const int lane = ThreadIndex() % 32;
    WaitBarrier(empty_, parity_ ^ 1);
#pragma unroll
    for (int i = lane; i < kTileN; i += 32) {
      const int64_t n = place.n + i;
      const bool valid = n < n_ && e_.type != Type::kS32;
      const float scale = valid ? Load(e_.w_scale + n) : 0, bias = valid && e_.bias ? Load(e_.bias + n) : 0;
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

  // By all threads of both warpgroups, for each tile in turn.
  JAXINT8_DEVICE void Finish(const int32_t (&c)[kSums], TilePlace place, const Rows& rows) {
    WaitBarrier(full_, parity_);
    switch (e_.type) {
      case Type::kF32:
        FinishAs<Type::kF32>(c, place, rows);
        break;
      case Type::kBF16:
        FinishAs<Type::kBF16>(c, place, rows);
        break;
      case Type::kF16:
        FinishAs<Type::kF16>(c, place, rows);
        break;
      case Type::kS32:
        FinishAs<Type::kS32>(c, place, rows);
        break;
    }
    WarpBarrier();
    if (ThreadIndex() % 32 == 0) Arrive(empty_);
    parity_ ^= 1;
  }

 private:
  static JAXINT8_DEVICE int64_t Row(TilePlace place) {  // and Row + 8
    const int thread = ThreadIndex() - 128;
    return place.m + thread / 32 * 16 + thread % 32 / 4;
  }

  // 32 columns of 16 rows per warp at a time.
  template <Type kType>
  JAXINT8_DEVICE void FinishAs(const int32_t (&c)[kSums], TilePlace place, const Rows& rows) const {
    constexpr bool kWide = kType == Type::kF32 || kType == Type::kS32;
    Epilogue e = e_;
    e.type = kType;
    const int t = ThreadIndex() % 4;
    const int64_t row = Row(place);
    const bool whole = n_ % 8 == 0;
#pragma unroll
    for (int j = 0; j < (kTileN + 31) / 32; ++j) {
      const int64_t first = place.n + 32 * j;
      if (first >= n_) break;
      uint32_t y[2][4][2] = {};
#pragma unroll
      for (int q = 0; q < 4 && 32 * j + 8 * q < kTileN; ++q) {
        const Word4 columns = LoadAs<Word4>(columns_ + 8 * (32 * j + 8 * q + 2 * t));
        const float w_scale[2] = {FloatFromBits(columns.x), FloatFromBits(columns.z)};
        const float bias[2] = {FloatFromBits(columns.y), FloatFromBits(columns.w)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[i / 2][q][i % 2] = Output(e, c[16 * j + 4 * q + i], rows.scale[i / 2], w_scale[i % 2], bias[i % 2]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = row + 8 * half;
        if (!whole) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int64_t n = first + 8 * (i / 2) + 2 * t + i % 2;
            if (32 * j + 8 * (i / 2) < kTileN && m < m_ && n < n_) StoreOutput(e, m, n, y[half][i / 2][i % 2]);
          }
        } else if (kWide || 32 * j + 32 > kTileN) {
#pragma unroll
          for (int q = 0; q < 4 && 32 * j + 8 * q < kTileN; ++q) {
            const int64_t n = first + 8 * q + 2 * t;
            if (m < m_ && n < n_) StoreOutputs(e, m, n, y[half][q][0], y[half][q][1]);
          }
        } else {
          uint32_t words[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) words[q] = y[half][q][0] | y[half][q][1] << 16;
          Transpose(words, t);
          const int64_t n = first + 8 * t;
          if (m < m_ && n < n_) {
            StoreAs<Word4>(e.y + 2 * (m * n_ + n), Word4{words[0], words[1], words[2], words[3]});
          }
        }
      }
    }
  }

  // Among the four lanes of a quad: afterwards words[i] is what lane i had in words[t].
  static JAXINT8_DEVICE void Transpose(uint32_t (&words)[4], int t) {
    const bool odd = t & 1, upper = t & 2;
    uint32_t a = ShuffleXor(odd ? words[0] : words[1], 1), b = ShuffleXor(odd ? words[2] : words[3], 1);
    words[0] = odd ? a : words[0];
    words[1] = odd ? words[1] : a;
    words[2] = odd ? b : words[2];
    words[3] = odd ? words[3] : b;
    a = ShuffleXor(upper ? words[0] : words[2], 2);
    b = ShuffleXor(upper ? words[1] : words[3], 2);
    words[0] = upper ? a : words[0];
    words[2] = upper ? words[2] : a;
    words[1] = upper ? b : words[1];
    words[3] = upper ? words[3] : b;
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
