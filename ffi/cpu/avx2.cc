// The AVX2 rung (Haswell, Zen and later).
//
// AVX2 has a product of bytes, vpmaddubsw, but it adds two products in 16 bits and saturates: 255 * 127 * 2 does not
// fit. With weights as the unsigned bytes it is exact all the same where codes that are added have different signs, or
// are small: no more than 128 together, for 255 * 128 fits. Codes that are not are negated, and their weights flipped,
// for four rows together; what does not fit even so, next to nothing of most rows, is split like an outlier
// (turned_avx2.h).
//
// Few rows of which too much would have to be split, as of uniform ones, are turned each by itself; more of them, and
// bare products, whose codes are any bytes, are widened to 16 bits. A single row with many outliers gives codes the
// sign of w and multiplies by |w|, which fits if no code is -128, as the quantiser guarantees.
#include <immintrin.h>

#include "attend_avx256.h"
#include "avx256.h"
#include "int8.h"
#include "processor.h"
#include "rows.h"
#include "tiles.h"
#include "turned_avx2.h"

namespace jaxint8::cpu {
namespace {

struct Avx2 : Avx256 {
  using Weights = __m256i;
  using Codes = __m256i;
  static constexpr bool kOffset = false, kArranged = true;
  static constexpr int kDot = 16, kWord = 2, kDotsMost = kSmallM, kDenseN = 4;
  static constexpr int kDotsN[kDotsM] = {8, 4, 2, 2};
  static constexpr int64_t kPanelK = 512;

  // One sum after the other: the compiler would rather finish all products first, and keep most sums in memory.
  ALWAYS_INLINE static Sums MulAdd(Sums sum, __m256i w, __m256i x) {
    sum = Add(sum, _mm256_madd_epi16(w, x));
    asm volatile("" : "+x"(sum));
    return sum;
  }
  static Sums MulAddPairs(Sums sum, __m256i w, __m256i x) { return MulAdd(sum, w, x); }
  static __m256i LoadWeights(const int8_t* w) { return Widen(w); }
  static __m256i LoadCodes(const int8_t* x) { return Widen(x); }
  static __m256i LoadRow(const int8_t* w) { return Widen(w); }

  template <int>
  ALWAYS_INLINE static Sums MulAddTile(Sums sum, Packed w, __m256i two) {
    return MulAdd(sum, w, two);
  }

  static void Arrange(const int8_t* x, int64_t stride, int64_t rows, int64_t columns, uint8_t* out,
                      int64_t out_stride) {
    for (int64_t i = 0; i < rows; ++i, x += stride, out += out_stride) {
      for (int64_t t = 0; t < columns; t += 16) StorePacked(out + 2 * t, Widen(x + t));
    }
  }

  // For codes from -127 to 127: two products reach 2 * 128 * 127 < 2^15.
  ALWAYS_INLINE static Sums MulAddBytes(Sums sum, __m256i magnitude, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w));
    return MulAdd(sum, pairs, _mm256_set1_epi16(1));
  }

  static Sums MulAddWords(Sums sum, const uint8_t* words, uint32_t four) {  // high parts are never -128
    const __m256i w = Load(words);
    return MulAddBytes(sum, _mm256_abs_epi8(w), w, _mm256_set1_epi32(static_cast<int32_t>(four)));
  }

  ALWAYS_INLINE static void MulAddHi(Sums (&sum)[kHiRegisters], const uint8_t* panel, int64_t group, uint32_t four) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(static_cast<int32_t>(four)));
    const __m256i low = _mm256_broadcastd_epi32(wide), high = _mm256_broadcastd_epi32(_mm_srli_si128(wide, 4));
    const uint8_t* w = panel + group * 2 * kTileZ * kBytes;
    Unroll<kTileZ>([&](auto z) ALWAYS_INLINE {
      sum[z] = MulAdd(sum[z], LoadPacked(w + z * kBytes), low);
      sum[z] = MulAdd(sum[z], LoadPacked(w + (kTileZ + z) * kBytes), high);
    });
  }
};

// Dot products with codes of the quantiser, of a single row.
struct Avx2Bytes : Avx2 {
  struct Weights {
    __m256i w, magnitude;
  };
  static constexpr int kDot = 32, kDotsTeam = 1;

  static Weights LoadWeights(const int8_t* w) { return {Load(w), _mm256_abs_epi8(Load(w))}; }
  static __m256i LoadCodes(const int8_t* x) { return Load(x); }
  ALWAYS_INLINE static Sums MulAdd(Sums sum, const Weights& w, __m256i x) {
    return MulAddBytes(sum, w.magnitude, w.w, x);
  }
};

constexpr int64_t kTurnedMost = 11;  // rows that take weights as they lie: packing them takes longer

bool AllTurned(const Block& b) {
  if (b.turned == nullptr) return false;
  for (int64_t i = 0; i < b.m; i += kTurnedRows) {
    if (!b.fours[i / kTurnedRows].turned) return false;
  }
  return true;
}

void MultiplyAvx2(const Block& b) {
  if (AllTurned(b)) return b.plan && b.plan->turned ? MultiplyTurnedDots(b, b.panel) : MultiplyTurnedTiles(b, b.panel);
  if (b.epilogue && b.k > 0 && b.m > kTurnedMost) return MultiplyTiled<Avx2>(b);
  if (b.epilogue) return Multiply<Avx2, Avx2Bytes>(b);
  Multiply<Avx2, Avx2>(b);  // the codes of a bare product are any bytes
}

}  // namespace

extern const Rung kAvx2;
const Rung kAvx2 = {"avx2",
                    HasAvx2,
                    EnterRow,
                    MarkRow,
                    QuantizeRow,
                    MultiplyAvx2,
                    &AttendVectors<Attend256<Avx2>>::kFunctions,
                    /*chunk_m=*/kChunkM,
                    sizeof(TileScratch<Avx2>),
                    /*quads_k=*/0,
                    /*arranges=*/nullptr,
                    /*arrange=*/nullptr,
                    /*arranged_bytes=*/0,
                    /*begin_blocks=*/nullptr,
                    /*end_blocks=*/nullptr,
                    TurnRows,
                    /*turned_m=*/kTurnedMost,
                    /*turned_n=*/Turned::kTileN};

}  // namespace jaxint8::cpu
