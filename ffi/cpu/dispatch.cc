// The table of rungs, best first, and the choice at run time. Nothing here is compiled for more than the base machine.
#include "int8.h"

namespace jaxint8::cpu {

extern const Rung kScalar;
#if defined(__x86_64__)
extern const Rung kAvx512Vnni;
#endif

namespace {

const Rung* const kRungs[] = {
#if defined(__x86_64__)
    &kAvx512Vnni,
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
