// What the processor can do and the operating system allows, for the choice of a rung and of a ceiling.
#ifndef JAXINT8_FFI_CPU_PROCESSOR_H_
#define JAXINT8_FFI_CPU_PROCESSOR_H_

namespace jaxint8::cpu {

#if defined(__x86_64__)
bool HasAvx2();
bool HasAvxVnni();
// Whether shuffles of 512 bits within 128-bit lanes run beside as many multiplications: AMD from Zen 5 on, which has
// twice as many units for them. Intel's share a port with multiplications, Zen 4's a half of the units.
bool HasFreeShuffles();
// Whether shuffles and moves of registers of 512 bits take the place of multiplications (Intel).
bool HasDearShuffles();
// Asks Linux, once, for permission to use the tile registers: it saves them only for processes that have asked.
bool HasAmxInt8();
#elif defined(__aarch64__)
bool HasDotprod();
bool HasI8mm();  // and dot products
#endif

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_PROCESSOR_H_
