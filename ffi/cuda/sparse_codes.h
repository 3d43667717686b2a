// High parts of rows as sparse.h multiplies them: two 2:4-sparse matrices whose sum they are, compressed, in blocks of
// 64 rows and 128 columns, in the order and with the swizzle in which the tensor cores read them from shared memory.
//
// All of it starts as zeros, which stand for no high parts: rows store only what they have.
#ifndef JAXINT8_FFI_CUDA_SPARSE_CODES_H_
#define JAXINT8_FFI_CUDA_SPARSE_CODES_H_

#include "device.h"

namespace jaxint8::cuda {

// A block: 64 bytes of values for each row, two for each four columns; then 16 bytes that say where they belong.
inline constexpr int64_t kSparsePlaces = 64 * 64, kSparseBytes = kSparsePlaces + 64 * 16;
// Places are stored as their difference from those of a group without high parts, columns 0 and 1.
inline constexpr uint32_t kSparseEmpty = 0x44444444;
// Flags of 128 rows and 128 columns: bit 4 * g + 2 * s + h is set if rows from 64 * g on and columns from 64 * h on
// have high parts in the first (s = 0) or second matrix.
inline constexpr uint32_t kSparseGroup = 0x3, kSparseFirst = 0x33, kSparseSecond = 0xcc;

template <typename Byte, typename Word>
struct SparseCodes {
  Ptr<Byte> first, second;  // [rows / 64][blocks] blocks; null if high parts are stored otherwise
  Ptr<Word> flags;          // [rows / 128][blocks]
  int64_t blocks;           // of 128 columns

  JAXINT8_HOST_DEVICE int64_t Block(int64_t group, int64_t column_block) const {
    return (group * blocks + column_block) * kSparseBytes;
  }
};

// One row of them. high: bit j says whether hi[j], of column i + j, is not 0; i is a multiple of 8.
class SparseRow {
 public:
  JAXINT8_DEVICE SparseRow(const SparseCodes<uint8_t, uint32_t>& codes, int64_t row)
      : codes_(codes),
        row_(static_cast<int>(row % 64)),
        block_(codes.Block(row / 64, 0)),
        flags_(codes.flags + row / 128 * codes.blocks),
        flag_(row / 64 % 2 * 4) {}

  JAXINT8_DEVICE void Put(int i, const uint32_t (&hi)[8], uint32_t high) const {
    const uint32_t words[2] = {PackBytes(hi[0], hi[1], hi[2], hi[3]), PackBytes(hi[4], hi[5], hi[6], hi[7])};
    uint32_t rest[2];
#pragma unroll
    for (int g = 0; g < 2; ++g) rest[g] = WithoutTwo(high >> 4 * g & 0xf);
    Store8(codes_.first, 0, i, words, high & 0xf & ~rest[0], high >> 4 & ~rest[1]);
    if (rest[0] | rest[1]) Store8(codes_.second, 2, i, words, rest[0], rest[1]);
  }

 private:
  static JAXINT8_DEVICE uint32_t WithoutTwo(uint32_t mask) {
    mask &= mask - (mask != 0);
    return mask & (mask - (mask != 0));
  }

  // Two groups of four columns, of which the masks say which are stored, two at most.
  JAXINT8_DEVICE void Store8(Ptr<uint8_t> to, int flag, int i, const uint32_t (&words)[2], uint32_t mask0,
                             uint32_t mask1) const {
    const uint32_t masks[2] = {mask0, mask1};
    uint32_t values = 0, places = 0;
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      if (masks[g] == 0) continue;
      const int first = masks[g] == 8 ? 2 : LowestBit(masks[g]);
      const uint32_t others = masks[g] & ~(1u << first);
      const int second = others ? LowestBit(others) : 3;
      values |= (Value(words[g], masks[g], first) | Value(words[g], masks[g], second) << 8) << 16 * g;
      places |= ((static_cast<uint32_t>(first) | static_cast<uint32_t>(second) << 2) ^ 4) << 4 * g;
    }
    const int64_t block = block_ + int64_t{i / 128} * kSparseBytes;
    const int column = i % 128;
    // Swizzled: bits 4 and 5 of the place are combined with bits 7 and 8.
    const int value_at = (row_ * 64 + column / 2) ^ (row_ / 2 % 4 * 16);
    // The words of columns 0 to 31 and 64 to 95 stand together, as do those of the others: a thread needs both.
    const int place_at = row_ * 16 + column / 32 % 2 * 8 + column / 64 * 4 + column % 32 / 8;
    StoreAs<uint32_t>(to + block + value_at, values);
    Store(to + block + kSparsePlaces + place_at, static_cast<uint8_t>(places));
    const uint32_t bit = 1u << (flag_ + flag + column / 64);
    if (!(LoadRelaxed(flags_ + i / 128) & bit)) AtomicOr(flags_ + i / 128, bit);
  }

  static JAXINT8_DEVICE uint32_t Value(uint32_t word, uint32_t mask, int j) {
    return mask >> j & 1 ? word >> 8 * j & 0xff : 0;
  }

  const SparseCodes<uint8_t, uint32_t>& codes_;
  const int row_;
  const int64_t block_;
  const Ptr<uint32_t> flags_;
  const int flag_;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_SPARSE_CODES_H_
