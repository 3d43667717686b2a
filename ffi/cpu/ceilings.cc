// See ceilings.h. One loop per instruction, compiled for that instruction only and chosen at run time.
#include "ceilings.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "processor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jaxint8::cpu {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Rates (of anything per second) of all threads, added up. `rate(thread)` starts on all of them at once.
template <typename Rate>
double Together(int threads, Rate&& rate) {
  std::atomic<int> waiting{threads};
  std::vector<double> rates(threads);
  auto body = [&](int thread) {
    waiting.fetch_sub(1);
    while (waiting.load() > 0) std::this_thread::yield();
    rates[thread] = rate(thread);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
  body(0);
  for (std::thread& other : others) other.join();
  double sum = 0;
  for (double r : rates) sum += r;
  return sum;
}

// A loop returns how many multiplications it has done; each takes some ten microseconds. Twelve independent chains hide
// the latency of five cycles at two instructions a cycle. The empty assembly before a loop keeps the compiler from
// seeing that all chains compute the same; that within a loop, from seeing that every step does.
using Loop = int64_t (*)();
constexpr int kChains = 12;
constexpr int kSteps = 2000;

struct Instruction {
  const char* name;
  bool (*supported)();
  Loop loop;
};

#if defined(__x86_64__)

#define JAXINT8_TARGET(isa) __attribute__((target(isa)))

JAXINT8_TARGET("avx512f,avx512vnni") int64_t Avx512Vnni() {
  __m512i sum[kChains] = {}, a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
#pragma GCC unroll 16
  for (auto& s : sum) asm volatile("" : "+v"(s));
  for (int step = 0; step < kSteps; ++step) {
    asm volatile("" : "+v"(a));
#pragma GCC unroll 16
    for (auto& s : sum) {
      s = _mm512_dpbusd_epi32(s, a, b);
      asm("" : "+v"(s));
    }
  }
#pragma GCC unroll 16
  for (auto& s : sum) asm volatile("" : "+v"(s));
  return int64_t{64} * kChains * kSteps;
}

#if defined(JAXINT8_AVX_VNNI)
JAXINT8_TARGET("avx2,avxvnni") int64_t AvxVnni() {
  __m256i sum[kChains] = {}, a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
#pragma GCC unroll 16
  for (auto& s : sum) asm volatile("" : "+x"(s));
  for (int step = 0; step < kSteps; ++step) {
    asm volatile("" : "+x"(a));
#pragma GCC unroll 16
    for (auto& s : sum) {
      s = _mm256_dpbusd_avx_epi32(s, a, b);
      asm("" : "+x"(s));
    }
  }
#pragma GCC unroll 16
  for (auto& s : sum) asm volatile("" : "+x"(s));
  return int64_t{32} * kChains * kSteps;
}
#endif

// Of bytes widened to 16 bits, as in avx2.cc, and widening is not counted: the product of bytes itself, vpmaddubsw,
// saturates. Fewer chains: they and three operands must fit into 16 registers.
JAXINT8_TARGET("avx2") int64_t Avx2() {
  constexpr int kFewerChains = 10;
  __m256i sum[kFewerChains] = {}, a = _mm256_set1_epi16(1), b = _mm256_set1_epi16(2), product;
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
    for (auto& s : sum) {
      asm volatile("vpmaddwd %1, %2, %0" : "=x"(product) : "x"(a), "x"(b));
      s = _mm256_add_epi32(s, product);
      asm volatile("" : "+x"(s));
    }
  }
  return int64_t{16} * kFewerChains * kSteps;
}

// The same on 128 bits, which every x86-64 has.
int64_t Sse2() {
  __m128i sum[kChains] = {}, a = _mm_set1_epi16(1), b = _mm_set1_epi16(2);
#pragma GCC unroll 16
  for (auto& s : sum) asm volatile("" : "+x"(s));
  for (int step = 0; step < kSteps; ++step) {
    for (auto& s : sum) {
      asm volatile("" : "+x"(a));
      s = _mm_add_epi32(s, _mm_madd_epi16(a, b));
    }
  }
#pragma GCC unroll 16
  for (auto& s : sum) asm volatile("" : "+x"(s));
  return int64_t{8} * kChains * kSteps;
}

#if defined(JAXINT8_AMX_INT8)
// Four accumulators of 16 by 16 sums; one instruction adds 64 products to each sum. A thread's configuration dies with
// it, except the caller's, which is released.
JAXINT8_TARGET("amx-tile,amx-int8") int64_t AmxInt8() {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12 does not know that all of it is read
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int step = 0; step < kSteps / 8; ++step) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return int64_t{4} * 16 * 16 * 64 * (kSteps / 8);
}
#endif

const Instruction kInstructions[] = {
#if defined(JAXINT8_AMX_INT8)
    {"amx_int8", HasAmxInt8, AmxInt8},
#endif
    {"avx512_vnni", [] { return __builtin_cpu_supports("avx512vnni") != 0; }, Avx512Vnni},
#if defined(JAXINT8_AVX_VNNI)
    {"avx_vnni", HasAvxVnni, AvxVnni},
#endif
    {"avx2", HasAvx2, Avx2},
    {"sse2", [] { return true; }, Sse2},
};

#elif defined(__aarch64__)

__attribute__((target("arch=armv8.2-a+i8mm"))) int64_t I8mm() {
  int32x4_t sum[kChains] = {};
  int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(2);
  for (auto& s : sum) asm volatile("" : "+w"(s));
  for (int step = 0; step < kSteps; ++step) {
    asm volatile("" : "+w"(a));
    for (auto& s : sum) s = vmmlaq_s32(s, a, b);
  }
  for (auto& s : sum) asm volatile("" : "+w"(s));
  return int64_t{32} * kChains * kSteps;
}

__attribute__((target("arch=armv8.2-a+dotprod"))) int64_t Dotprod() {
  int32x4_t sum[kChains] = {};
  int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(2);
  for (auto& s : sum) asm volatile("" : "+w"(s));
  for (int step = 0; step < kSteps; ++step) {
    asm volatile("" : "+w"(a));
    for (auto& s : sum) s = vdotq_s32(s, a, b);
  }
  for (auto& s : sum) asm volatile("" : "+w"(s));
  return int64_t{16} * kChains * kSteps;
}

int64_t Neon() {
  int32x4_t sum[kChains] = {};
  int8x8_t a = vdup_n_s8(1), b = vdup_n_s8(2);
  for (auto& s : sum) asm volatile("" : "+w"(s));
  for (int step = 0; step < kSteps; ++step) {
    for (auto& s : sum) {
      asm volatile("" : "+w"(a));
      s = vpadalq_s16(s, vmull_s8(a, b));
    }
  }
  for (auto& s : sum) asm volatile("" : "+w"(s));
  return int64_t{8} * kChains * kSteps;
}

const Instruction kInstructions[] = {
    {"neon_i8mm", HasI8mm, I8mm},
    {"neon_dotprod", HasDotprod, Dotprod},
    {"neon", [] { return true; }, Neon},
};

#else

int64_t Scalar() {
  int32_t sum[kChains] = {}, a = 1, b = 2;
  for (auto& s : sum) asm volatile("" : "+r"(s));
  for (int step = 0; step < kSteps; ++step) {
    asm volatile("" : "+r"(a));
    for (auto& s : sum) s += a * b;
  }
  for (auto& s : sum) asm volatile("" : "+r"(s));
  return int64_t{kChains} * kSteps;
}

const Instruction kInstructions[] = {{"scalar", [] { return true; }, Scalar}};

#endif

// The instruction of that name, if there is one here, else the best.
const Instruction& Find(const char* name) {
  const Instruction* best = nullptr;
  for (const Instruction& instruction : kInstructions) {
    if (!instruction.supported()) continue;
    if (best == nullptr) best = &instruction;
    if (name != nullptr && std::strcmp(instruction.name, name) == 0) return instruction;
  }
  return *best;
}

// Reads whole blocks of 512 bytes; the rest, at most 511 bytes of millions, is left out.
constexpr int64_t kBlock = 512;

using Reader = void (*)(const char*, int64_t bytes);

#if defined(__x86_64__)
JAXINT8_TARGET("avx2") void ReadAvx2(const char* data, int64_t bytes) {
  __m256i sum[8] = {};
  for (int64_t i = 0; i + kBlock <= bytes; i += kBlock) {
    for (int j = 0; j < kBlock / 32; ++j) {
      const auto* here = reinterpret_cast<const __m256i*>(data + i + j * 32);
      sum[j % 8] = _mm256_xor_si256(sum[j % 8], _mm256_loadu_si256(here));
    }
  }
#pragma GCC unroll 16
  for (auto& s : sum) asm volatile("" : "+x"(s));
}

template <bool kFetch>
JAXINT8_TARGET("avx512f")
void ReadAvx512(const char* data, int64_t bytes) {
  __m512i sum[8] = {};
  for (int64_t i = 0; i + kBlock <= bytes; i += kBlock) {
#pragma GCC unroll 16
    for (int j = 0; j < 8; ++j) {
      if (kFetch) __builtin_prefetch(data + i + j * 64 + (8 << 10));  // beyond the end it asks for nothing that counts
      sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(data + i + j * 64));
    }
  }
#pragma GCC unroll 16
  for (auto& s : sum) asm volatile("" : "+v"(s));
}
#endif

void ReadWords(const char* data, int64_t bytes) {
  uint64_t sum[kBlock / 8] = {};
  for (int64_t i = 0; i + kBlock <= bytes; i += kBlock) {
    uint64_t words[kBlock / 8];
    std::memcpy(words, data + i, sizeof words);
    for (size_t j = 0; j < kBlock / 8; ++j) sum[j] ^= words[j];
  }
  for (auto& s : sum) asm volatile("" : "+r"(s));
}

// The two that may be best: some processors fetch by themselves as fast as they can, others do not.
std::array<Reader, 2> Readers() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {ReadAvx512<false>, ReadAvx512<true>};
  if (__builtin_cpu_supports("avx2")) return {ReadAvx2, ReadAvx2};
#endif
  return {ReadWords, ReadWords};
}

}  // namespace

Peak MeasurePeak(int threads, double seconds, const char* instruction) {
  const Instruction& best = Find(instruction);
  const double rate = Together(threads, [&](int) {
    const double start = Now();
    double elapsed = 0;
    int64_t done = 0;
    do {
      done += best.loop();
      elapsed = Now() - start;
    } while (elapsed < seconds);
    return static_cast<double>(done) / elapsed;
  });
  return {best.name, rate};
}

double MeasureBandwidth(const void* data, int64_t bytes, int threads, double seconds) {
  const int64_t part = bytes / threads / kBlock * kBlock;
  double best = 0;
  for (const Reader read : Readers()) {
    const double rate = Together(threads, [=](int thread) {
      const char* mine = static_cast<const char*>(data) + thread * part;
      read(mine, part);
      const double start = Now();
      double elapsed = 0;
      int64_t done = 0;
      do {
        read(mine, part);
        done += part;
        elapsed = Now() - start;
      } while (elapsed < seconds / 2);
      return static_cast<double>(done) / elapsed;
    });
    best = std::max(best, rate);
  }
  return best;
}

}  // namespace jaxint8::cpu
