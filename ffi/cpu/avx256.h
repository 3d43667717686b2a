// What the rungs with registers of 256 bits share: eight int32 in a register.
#ifndef JAXINT8_FFI_CPU_AVX256_H_
#define JAXINT8_FFI_CPU_AVX256_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "int8.h"
#include "unroll.h"

namespace jaxint8::cpu {
namespace {

struct Avx256 {
  using Sums = __m256i;
  using Packed = __m256i;
  static constexpr int kDotsTeam = 4;
  static constexpr int kLanes32 = 8, kLanes = 8, kBytes = 32, kRows = 1;
  static constexpr int kTileM = 6, kTileZ = 2;  // 12 sums, 2 weights, 1 word of codes: 15 of 16 registers
  static constexpr int kHiRegisters = kTileZ, kHiPanels = 4, kWords = 1, kCodeBytes = 4;

  static Sums Zero() { return _mm256_setzero_si256(); }
  static Sums Add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
  static Sums Shift7(Sums a) { return _mm256_slli_epi32(a, 7); }
  static Sums LoadSums(const int32_t* c) { return Load(c); }
  static void StoreSums(int32_t* c, Sums a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), a); }
  static void StoreBytes(int8_t* p, __m256i a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static __m256i Load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m256i Widen(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Packed LoadPacked(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static void StorePacked(uint8_t* p, Packed a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }

  static __m256i LoadTileCodes(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm256_set1_epi32(word);
  }

  static void Sum4(Sums a, Sums b, Sums c, Sums d, int32_t* out) {
    const __m256i abcd = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
    auto* place = reinterpret_cast<__m128i*>(out);
    _mm_storeu_si128(place, _mm_add_epi32(_mm_loadu_si128(place), sums));
  }

  static int32_t Sum(Sums a) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
  }

  static void AddTile(const Sums (&acc)[kTileZ], int32_t* c, int64_t) {
    Unroll<kTileZ>([&](auto z) ALWAYS_INLINE { StoreSums(c + z * 8, Add(LoadSums(c + z * 8), acc[z])); });
  }

  ALWAYS_INLINE static void AddHi(const Sums (&sum)[kHiRegisters], int32_t* c) {
    Unroll<kTileZ>([&](auto z) ALWAYS_INLINE { StoreSums(c + z * 8, Add(LoadSums(c + z * 8), Shift7(sum[z]))); });
  }

  ALWAYS_INLINE static void Transpose(__m256i (&r)[8]) {
    __m256i a[8];
    Unroll<4>([&](auto i) ALWAYS_INLINE {
      a[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      a[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    });
    __m256i b[8];  // b[4 * i + q]: in half h, word 4 * h + q of rows 4 * i to 4 * i + 3
    Unroll<2>([&](auto i) ALWAYS_INLINE {
      b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
      b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
      b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
      b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    });
    Unroll<4>([&](auto q) ALWAYS_INLINE {
      r[q] = _mm256_permute2x128_si256(b[q], b[4 + q], 0x20);
      r[4 + q] = _mm256_permute2x128_si256(b[q], b[4 + q], 0x31);
    });
  }
};

// Weights as unsigned bytes, w + 128, packed four columns to a word; P, the instruction set, has MulAdd of 32 bytes.
template <class P>
struct Bytes256 : Avx256 {
  static constexpr bool kOffset = true, kArranged = false;
  static constexpr int kDot = 32, kWord = 4;
  static constexpr int64_t kPanelK = 1024;

  static __m256i Flip(__m256i w) { return _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80))); }
  static __m256i LoadRow(const int8_t* w) { return Flip(Load(w)); }

  template <int>
  ALWAYS_INLINE static Sums MulAddTile(Sums sum, Packed w, __m256i four) {
    return P::MulAdd(sum, w, four);
  }

  ALWAYS_INLINE static void MulAddHi(Sums (&sum)[kHiRegisters], const uint8_t* panel, int64_t group, uint32_t four) {
    const __m256i codes = _mm256_set1_epi32(static_cast<int32_t>(four));
    const uint8_t* w = panel + group * kTileZ * kBytes;
    Unroll<kTileZ>([&](auto z) ALWAYS_INLINE { sum[z] = P::MulAdd(sum[z], LoadPacked(w + z * kBytes), codes); });
  }
};

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_AVX256_H_
