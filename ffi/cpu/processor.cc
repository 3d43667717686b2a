// See processor.h. The compiler's own tests look at cpuid and, through xgetbv, at what the operating system saves.
#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

namespace jaxint8::cpu {

#if defined(__x86_64__)

bool HasAvx2() { return __builtin_cpu_supports("avx2"); }

#if defined(JAXINT8_AVX_VNNI)
bool HasAvxVnni() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni"); }
#else
bool HasAvxVnni() { return false; }
#endif

bool HasFreeShuffles() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__builtin_cpu_is("amd") || __get_cpuid(1, &a, &b, &c, &d) == 0) return false;
    return (a >> 8 & 15) + (a >> 20 & 255) >= 0x1a;  // the family
  }();
  return has;
}

bool HasDearShuffles() { return __builtin_cpu_is("intel") != 0; }

#if defined(JAXINT8_AMX_INT8) && defined(__linux__)
bool HasAmxInt8() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool has = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
                          syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return has;
}
#else
bool HasAmxInt8() { return false; }
#endif

#elif defined(__aarch64__)

#if defined(__linux__)
bool HasDotprod() { return getauxval(AT_HWCAP) & (1ul << 20); }
bool HasI8mm() { return HasDotprod() && (getauxval(AT_HWCAP2) & (1ul << 13)) != 0; }
#else  // every Mac with this instruction set has the product; not every one has the matrix form
bool HasDotprod() { return true; }
bool HasI8mm() { return false; }
#endif

#endif

}  // namespace jaxint8::cpu
