// The NEON rung with dot products (sdot: Cortex-A76, Neoverse N1, Apple M1 and later).
#include "attend_neon.h"
#include "int8.h"
#include "neon.h"
#include "processor.h"
#include "rows.h"
#include "tiles.h"

namespace jaxint8::cpu {
namespace {

// A word of codes is picked by lane from a register of four, so a step is four words: a quarter of a load per product.
struct NeonDotprod : Neon {
  static constexpr bool kArranged = false;
  static constexpr int kLanes = 4, kWord = 4, kRows = 1, kWords = 4;
  static constexpr int kTileM = 8, kTileZ = 2;  // 16 sums, 8 registers of codes, 2 weights: 26 of 32 registers
  static constexpr int kHiRegisters = kTileZ, kHiPanels = 8;

  template <int kWordOfStep>
  static Sums MulAddTile(Sums sum, Packed w, int8x16_t x) {
    return vdotq_laneq_s32(sum, w, x, kWordOfStep);
  }

  static void AddTile(const Sums (&acc)[kTileZ], int32_t* c, int64_t) {
    Unroll<kTileZ>([&](auto z) ALWAYS_INLINE { AddTo(c + z * 4, acc[z]); });
  }

  ALWAYS_INLINE static void MulAddHi(Sums (&sum)[kHiRegisters], const uint8_t* panel, int64_t group, uint32_t four) {
    const uint8_t* w = panel + group * kTileZ * kBytes;
    Unroll<kTileZ>([&](auto z) ALWAYS_INLINE { sum[z] = MulAddWords(sum[z], w + z * kBytes, four); });
  }

  ALWAYS_INLINE static void AddHi(const Sums (&sum)[kHiRegisters], int32_t* c) {
    Unroll<kTileZ>([&](auto z) ALWAYS_INLINE { AddTo(c + z * 4, Shift7(sum[z])); });
  }

  ALWAYS_INLINE static void Transpose(int8x16_t (&r)[4]) {
    int32x4_t a[4];
    Unroll<2>([&](auto i) ALWAYS_INLINE {
      const int32x4_t first = vreinterpretq_s32_s8(r[2 * i]), second = vreinterpretq_s32_s8(r[2 * i + 1]);
      a[2 * i] = vtrn1q_s32(first, second);
      a[2 * i + 1] = vtrn2q_s32(first, second);
    });
    Unroll<2>([&](auto q) ALWAYS_INLINE {
      const int64x2_t low = vreinterpretq_s64_s32(a[q]), high = vreinterpretq_s64_s32(a[2 + q]);
      r[q] = vreinterpretq_s8_s64(vtrn1q_s64(low, high));
      r[2 + q] = vreinterpretq_s8_s64(vtrn2q_s64(low, high));
    });
  }
};

}  // namespace

extern const Rung kNeonDotprod;
const Rung kNeonDotprod = {"neon_dotprod",
                           HasDotprod,
                           EnterRow,
                           MarkRow,
                           QuantizeRow,
                           Multiply<NeonDotprod>,
                           &AttendVectors<AttendNeon>::kFunctions,
                           /*chunk_m=*/kChunkM,
                           sizeof(TileScratch<NeonDotprod>)};

}  // namespace jaxint8::cpu
