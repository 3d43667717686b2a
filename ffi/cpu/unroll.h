// Loops over arrays of registers.
#ifndef JAXINT8_FFI_CPU_UNROLL_H_
#define JAXINT8_FFI_CPU_UNROLL_H_

#include <type_traits>

namespace jaxint8::cpu {
namespace {

#define ALWAYS_INLINE __attribute__((always_inline))

// Calls f(0), ..., f(N - 1) with compile-time arguments. Loops over arrays of registers must be unrolled this early,
// and every function that refers to the array inlined this early (so f is declared ALWAYS_INLINE): GCC otherwise
// decides to keep the array in memory, and then loads and stores it in every step of a loop.
template <int N, typename F>
[[gnu::always_inline]] inline void Unroll(const F& f) {
  if constexpr (N > 0) {
    Unroll<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_UNROLL_H_
