// The table of rungs, best first, and the choice at run time. Nothing here is compiled for more than the base machine.
#include "int8.h"

namespace jaxint8::cpu {

// Which rungs the compiler could build is told by CMakeLists.txt.
extern const Rung kAmxInt8, kAvx512VnniLanes, kAvx512VnniStrips, kAvx512Vnni, kAvxVnni, kAvx2, kNeonI8mm, kNeonDotprod,
    kScalar;

namespace {

const Rung* const kRungs[] = {
#if defined(JAXINT8_AMX_INT8)
    &kAmxInt8,
#endif
#if defined(JAXINT8_AVX512_VNNI)
    &kAvx512VnniLanes,
    &kAvx512VnniStrips,
    &kAvx512Vnni,
#endif
#if defined(JAXINT8_AVX_VNNI)
    &kAvxVnni,
#endif
#if defined(JAXINT8_AVX2)
    &kAvx2,
#endif
#if defined(JAXINT8_NEON_I8MM)
    &kNeonI8mm,
#endif
#if defined(JAXINT8_NEON_DOTPROD)
    &kNeonDotprod,
#endif
    &kScalar,
};
constexpr int kCount = sizeof kRungs / sizeof kRungs[0];

}  // namespace

const Rung* const* Rungs(int* count) {
  *count = kCount;
  return kRungs;
}

const Rung* FindRung(int64_t index) {
  if (index == -1) {
    static const Rung* const best = [] {
      int i = 0;
      while (!kRungs[i]->supported()) ++i;
      return kRungs[i];
    }();
    return best;
  }
  if (index < 0 || index >= kCount || !kRungs[index]->supported()) return nullptr;
  return kRungs[index];
}

}  // namespace jaxint8::cpu
