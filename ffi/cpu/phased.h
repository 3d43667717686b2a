// A computation cut into phases, as a team of threads runs it (team.h).
#ifndef JAXINT8_FFI_CPU_PHASED_H_
#define JAXINT8_FFI_CPU_PHASED_H_

#include <algorithm>
#include <cstdint>

namespace jaxint8::cpu {

// Items of one phase are independent and may run on any threads at once; a phase may start when every item of the one
// before has finished.
class Phased {
 public:
  Phased() = default;
  virtual ~Phased() = default;
  Phased(const Phased&) = delete;
  Phased& operator=(const Phased&) = delete;

  static constexpr int kPhases = 3, kLast = kPhases - 1;
  int64_t items(int phase) const { return items_[phase]; }
  // Rough nanoseconds of the whole phase on one thread: decides whether waking another thread pays.
  double cost(int phase) const { return cost_[phase]; }
  // How many threads share the items of the last phase, which are cut such that all of them end together.
  virtual void set_threads(int64_t threads) { threads_ = threads; }
  // The first item of a thread's share, its lane: a stretch of adjacent items, so that it reads memory as one stream,
  // and in the next call the same ones.
  int64_t lane(int64_t thread) const {
    return items_[kLast] / threads_ * thread + std::min(thread, items_[kLast] % threads_);
  }
  // What a thread reads first in the last phase, and how many bytes of it are worth fetching ahead.
  virtual const int8_t* WeightsOf(int64_t thread, int64_t* bytes) const = 0;
  virtual void Run(int phase, int64_t item) = 0;
  // What a thread does before its first item of a phase, or of one more lane, and behind the last.
  virtual void Begin(int /*phase*/) {}
  virtual void End(int /*phase*/) {}

 protected:
  int64_t items_[kPhases] = {};
  double cost_[kPhases] = {};
  int64_t threads_ = 1;
};

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_PHASED_H_
