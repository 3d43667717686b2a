// The AVX-VNNI rung (Alder Lake, Zen 5 and later): vpdpbusd on 256 bits, for processors without AVX-512.
//
// As in avx512_vnni.cc the weight is the unsigned operand, w + 128, and the correction comes from the quantiser.
#include <immintrin.h>

#include "attend_avx256.h"
#include "avx256.h"
#include "int8.h"
#include "processor.h"
#include "rows.h"
#include "tiles.h"

namespace jaxint8::cpu {
namespace {

struct AvxVnni : Bytes256<AvxVnni> {
  using Weights = __m256i;
  using Codes = __m256i;
  static constexpr int kDotsMost = kSmallM, kDenseN = 4;
  static constexpr int kDotsN[kDotsM] = {8, 4, 2, 2};

  // One sum after the other: the compiler would rather load all codes of a tile first, and has no registers for them.
  ALWAYS_INLINE static Sums MulAdd(Sums sum, __m256i w, __m256i x) {
#if defined(JAXINT8_EVEX)  // the same instruction as AVX-512 encodes it: test only, for machines that have no other
    sum = _mm256_dpbusd_epi32(sum, w, x);
#else
    sum = _mm256_dpbusd_avx_epi32(sum, w, x);
#endif
    asm volatile("" : "+x"(sum));
    return sum;
  }
  // Of 16-bit integers, without the offset.
  ALWAYS_INLINE static Sums MulAddPairs(Sums sum, __m256i w, __m256i x) {
#if defined(JAXINT8_EVEX)
    sum = _mm256_dpwssd_epi32(sum, w, x);
#else
    sum = _mm256_dpwssd_avx_epi32(sum, w, x);
#endif
    asm volatile("" : "+x"(sum));
    return sum;
  }
  static __m256i LoadWeights(const int8_t* w) { return Flip(Load(w)); }
  static __m256i LoadCodes(const int8_t* x) { return Load(x); }

  static Sums MulAddWords(Sums sum, const uint8_t* words, uint32_t four) {
    return MulAdd(sum, Flip(Load(words)), _mm256_set1_epi32(static_cast<int32_t>(four)));
  }
};

#if defined(JAXINT8_EVEX)
bool HasAvx512VlVnni() { return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"); }
#endif

// The same for the rung and for what stands in for it in tests.
constexpr Rung RungOf(const char* name, bool (*supported)()) {
  return {name,
          supported,
          EnterRow,
          MarkRow,
          QuantizeRow,
          Multiply<AvxVnni>,
          &AttendVectors<Attend256<AvxVnni>>::kFunctions,
          /*chunk_m=*/kChunkM,
          sizeof(TileScratch<AvxVnni>)};
}

}  // namespace

#if defined(JAXINT8_EVEX)
extern const Rung kAvxVnniEvex;
const Rung kAvxVnniEvex = RungOf("avx_vnni as EVEX", HasAvx512VlVnni);
#else
extern const Rung kAvxVnni;
const Rung kAvxVnni = RungOf("avx_vnni", HasAvxVnni);
#endif

}  // namespace jaxint8::cpu
