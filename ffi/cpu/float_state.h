// How a thread's floating point behaves while it runs our arithmetic.
#ifndef JAXINT8_FFI_CPU_FLOAT_STATE_H_
#define JAXINT8_FFI_CPU_FLOAT_STATE_H_

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace jaxint8::cpu {

// Standard rounding, subnormals kept: XLA may run its threads otherwise. Restored on leaving.
class ScopedFloatState {
 public:
#if defined(__SSE__)
  ScopedFloatState() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~ScopedFloatState() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  ScopedFloatState() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~ScopedFloatState() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_FLOAT_STATE_H_
