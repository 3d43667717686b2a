// High parts of rows as sparse.h multiplies them: 2:4-sparse, of every four neighbours in a row two at most,
// compressed, in blocks of 64 rows and 128 columns, in the order and with the swizzle in which the tensor cores read
// them from shared memory. Nothing has to be cleared before.
#ifndef JAXINT8_FFI_CUDA_SPARSE_CODES_H_
#define JAXINT8_FFI_CUDA_SPARSE_CODES_H_

#include "device.h"
#include "int8.h"

namespace jaxint8::cuda {

// A block: 64 bytes of values for each row, two for each four columns; then 16 bytes that say where they belong.
inline constexpr int64_t kSparsePlaces = 64 * 64, kSparseBytes = kSparsePlaces + 64 * 16;
// Places are stored as their difference from those of a group without high parts, columns 0 and 1.
inline constexpr uint32_t kSparseEmpty = 0x44444444;
// Flags of a row in a block: its columns from 0 and from 64 on have high parts; four neighbours have more than two, so
// that the block has to be multiplied in full.
inline constexpr uint32_t kSparseHalves = 0x3, kSparseFull = 0x4;
// Words with two bits of columns with high parts for each block, then with a bit for those with too many.
inline constexpr int kSparseHalfWords = static_cast<int>(kMaxK / 64 / 32 + 2);
inline constexpr int kSparseWords = kSparseHalfWords + kSparseHalfWords / 2 + 1;

template <typename Byte>
struct SparseCodes {
  Ptr<Byte> codes;  // [rows / 64][blocks] blocks; null if there are none
  Ptr<Byte> flags;  // [rows / 64][blocks][64]
  int64_t blocks;   // of 128 columns, in the padded row

  JAXINT8_HOST_DEVICE int64_t Block(int64_t group, int64_t column_block) const {
    return (group * blocks + column_block) * kSparseBytes;
  }
};

// One row of them. Its flags are gathered in shared memory: kSparseWords, which are zeros at first. The block has whole
// warps, and what each thread writes is multiples of 128 columns from the eight of its index: always at one place of
// blocks.
class SparseRow {
 public:
  JAXINT8_DEVICE SparseRow(const SparseCodes<uint8_t>& codes, int64_t row, Ptr<uint32_t> bits)
      : flags_(codes.flags + row / 64 * codes.blocks * 64 + row % 64),
        blocks_(static_cast<int>(codes.blocks)),
        bits_(bits) {
    const int in_block = static_cast<int>(row % 64), column = 8 * ThreadIndex() % 128;
    const Ptr<uint8_t> block = codes.codes + codes.Block(row / 64, 0);
    // Swizzled: bits 4 and 5 of the place are combined with bits 7 and 8.
    values_ = Keep(block + ((in_block * 64 + column / 2) ^ (in_block / 2 % 4 * 16)));
    // The words of columns 0 to 31 and 64 to 95 stand together, as do those of the others: a thread needs both.
    places_ = Keep(block + kSparsePlaces + (in_block * 16 + column / 32 % 2 * 8 + column / 64 * 4 + column % 32 / 8));
  }

  // Eight columns from i on, a multiple of 8; bit j of high says whether byte j is not 0.
  JAXINT8_DEVICE void Put(int i, const Word2& hi, uint32_t high) const {
    uint32_t values = 0, places = 0;
    if (high) {
      const uint32_t words[2] = {hi.x, hi.y};
      uint32_t more = 0;
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const uint32_t mask = high >> 4 * g & 0xf;
        if (mask == 0) continue;
        const int first = mask == 8 ? 2 : LowestBit(mask);
        const uint32_t others = mask & ~(1u << first);
        const int second = others ? LowestBit(others) : 3;
        values |= ((words[g] >> 8 * first & 0xff) | (words[g] >> 8 * second & 0xff) << 8) << 16 * g;
        places |= ((static_cast<uint32_t>(first) | static_cast<uint32_t>(second) << 2) ^ 4) << 4 * g;
        more |= others & (others - 1);
      }
      AtomicOr(bits_ + i / 2048, 1u << i / 64 % 32);
      if (more) AtomicOr(bits_ + kSparseHalfWords + i / 4096, 1u << i / 128 % 32);
    }
    Write(i, values, places);
  }

  // The same without high parts.
  JAXINT8_DEVICE void PutZeros(int i) const { Write(i, 0, 0); }

  // By all threads, after a barrier.
  JAXINT8_DEVICE void WriteFlags() const {
    for (int b = ThreadIndex(); b < blocks_; b += BlockThreads()) {
      const uint32_t halves = Load(bits_ + b / 16) >> 2 * (b % 16) & kSparseHalves;
      const uint32_t full = Load(bits_ + kSparseHalfWords + b / 32) >> b % 32 & 1 ? kSparseFull : 0;
      Store(flags_ + int64_t{b} * 64, static_cast<uint8_t>(halves | full));
    }
  }

  // A row without high parts, by all threads.
  JAXINT8_DEVICE void WriteZeros() const {
    for (int i = 8 * ThreadIndex(); i < 128 * blocks_; i += 8 * BlockThreads()) Write(i, 0, 0);
    for (int b = ThreadIndex(); b < blocks_; b += BlockThreads()) Store(flags_ + int64_t{b} * 64, uint8_t{0});
  }

 private:
  JAXINT8_DEVICE void Write(int i, uint32_t values, uint32_t places) const {
    const auto at = static_cast<int64_t>(static_cast<unsigned>(i) / 128 * static_cast<unsigned>(kSparseBytes));
    StoreAs<uint32_t>(values_ + at, values);
    Store(places_ + at, static_cast<uint8_t>(places));
  }

  Ptr<uint8_t> values_, places_, flags_;
  int blocks_;
  Ptr<uint32_t> bits_;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_SPARSE_CODES_H_
