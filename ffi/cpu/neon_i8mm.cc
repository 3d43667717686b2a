// The NEON rung with matrix products of bytes (smmla: Neoverse V1 and N2, Apple M2 and later): two rows by two outputs,
// eight columns, in one instruction.
#include "attend_neon.h"
#include "int8.h"
#include "neon.h"
#include "processor.h"
#include "rows.h"
#include "tiles.h"

namespace jaxint8::cpu {
namespace {

struct NeonI8mm : Neon {
  static constexpr bool kArranged = true;
  static constexpr int kDotsMost = 8;  // dot products are half as fast
  static constexpr int kLanes = 2, kWord = 8, kRows = 2, kWords = 1;
  static constexpr int kTileM = 5, kTileZ = 4;  // 20 sums, 4 weights, 5 pairs of rows: 29 of 32 registers
  static constexpr int kHiRegisters = kTileZ, kHiPanels = 4;

  template <int>
  static Sums MulAddTile(Sums sum, Packed w, int8x16_t pair) {
    return vmmlaq_s32(sum, pair, w);
  }

  static int32x4_t Zip1(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
  }
  static int32x4_t Zip2(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
  }

  // A register of sums is [2 rows][2 outputs]; the last pair may be a single row.
  static void AddTile(const Sums (&acc)[kTileZ], int32_t* c, int64_t rows) {
    Unroll<kTileZ / 2>([&](auto q) ALWAYS_INLINE {
      AddTo(c + q * 4, Zip1(acc[2 * q], acc[2 * q + 1]));
      if (rows > 1) AddTo(c + kBlockN + q * 4, Zip2(acc[2 * q], acc[2 * q + 1]));
    });
  }

  // [pair of rows][8 columns][2 rows][8]; a missing row is zero.
  static void Arrange(const int8_t* x, int64_t stride, int64_t rows, int64_t columns, uint8_t* out,
                      int64_t out_stride) {
    for (int64_t i = 0; i < rows; i += 2, out += out_stride) {
      const int8_t* first = x + i * stride;
      for (int64_t t = 0; t < columns; t += 16) {
        const int32x4_t a = vreinterpretq_s32_s8(vld1q_s8(first + t));
        const int32x4_t b = i + 1 < rows ? vreinterpretq_s32_s8(vld1q_s8(first + stride + t)) : Zero();
        StorePacked(out + 2 * t, vreinterpretq_s8_s32(Zip1(a, b)));
        StorePacked(out + 2 * t + 16, vreinterpretq_s8_s32(Zip2(a, b)));
      }
    }
  }

  // Of eight packed columns the high parts are the first or the last four; two partial sums for each output.
  ALWAYS_INLINE static void MulAddHi(Sums (&sum)[kHiRegisters], const uint8_t* panel, int64_t group, uint32_t four) {
    const uint64_t eight = static_cast<uint64_t>(four) << (group % 2 * 32);
    const int8x16_t codes = vreinterpretq_s8_u64(vdupq_n_u64(eight));
    const uint8_t* w = panel + group / 2 * kTileZ * kBytes;
    Unroll<kTileZ>([&](auto z) ALWAYS_INLINE { sum[z] = vdotq_s32(sum[z], LoadPacked(w + z * kBytes), codes); });
  }

  ALWAYS_INLINE static void AddHi(const Sums (&sum)[kHiRegisters], int32_t* c) {
    Unroll<kTileZ / 2>([&](auto q) ALWAYS_INLINE { AddTo(c + q * 4, Shift7(vpaddq_s32(sum[2 * q], sum[2 * q + 1]))); });
  }

  ALWAYS_INLINE static void Transpose(int8x16_t (&r)[2]) {
    const int32x4_t a = vreinterpretq_s32_s8(r[0]), b = vreinterpretq_s32_s8(r[1]);
    r[0] = vreinterpretq_s8_s32(Zip1(a, b));
    r[1] = vreinterpretq_s8_s32(Zip2(a, b));
  }
};

}  // namespace

extern const Rung kNeonI8mm;
const Rung kNeonI8mm = {"neon_i8mm",
                        HasI8mm,
                        EnterRow,
                        MarkRow,
                        QuantizeRow,
                        Multiply<NeonI8mm>,
                        &AttendVectors<AttendNeon>::kFunctions,
                        /*chunk_m=*/kChunkM,
                        sizeof(TileScratch<NeonI8mm>)};

}  // namespace jaxint8::cpu
