// Runs a Job on the calling thread and on helpers of a thread pool, without ever waiting for the pool.
//
// All helpers are scheduled up front and the caller works like any of them: items are claimed from one counter per
// phase. At the end of a phase a thread waits only for items that other threads have claimed, which are therefore
// running; nobody waits for a task that is still in a queue. So a pool of one thread, a caller that is itself a thread
// of that pool, and helpers that start when all is done are all harmless. Scheduling later, from the last item of a
// phase, is not an option: the context of an FFI call lives on the caller's stack and is gone once the handler returns.
#ifndef JAXINT8_FFI_CPU_TEAM_H_
#define JAXINT8_FFI_CPU_TEAM_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

#include "int8.h"

namespace jaxint8::cpu {

// Waking a helper takes 5 to 10 microseconds until it does work; a phase must give each thread more than that.
inline constexpr double kNanosecondsPerThread = 6000;

class Team {
 public:
  explicit Team(Job* job) : job_(job) {
    for (int phase = 0; phase < Job::kPhases; ++phase) phases_[phase].items = job->items(phase);
  }

  // Claims items until none is left, phase after phase. The job is touched only while holding an item of it.
  void Work() {
    for (Phase& phase : phases_) {
      for (;;) {
        const int64_t item = phase.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= phase.items) break;
        try {
          job_->Run(static_cast<int>(&phase - phases_), item);
        } catch (const std::bad_alloc&) {
          failed_.store(true, std::memory_order_relaxed);
        }
        phase.done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; phase.done.load(std::memory_order_acquire) < phase.items; ++spins) {
        if (spins < 4096) {
          Pause();
        } else {
          std::this_thread::yield();  // whoever holds the item needs this core
        }
      }
    }
  }

  bool failed() const { return failed_.load(std::memory_order_relaxed); }

 private:
  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  struct alignas(64) Phase {
    int64_t items = 0;
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  Job* job_;
  Phase phases_[Job::kPhases];
  std::atomic<bool> failed_{false};
};

// Threads that the costliest phase deserves, the caller included.
inline int64_t ThreadsFor(const Job& job, int64_t available) {
  static const int64_t cores = std::thread::hardware_concurrency();
  int64_t threads = 1;
  for (int phase = 0; phase < Job::kPhases; ++phase) {
    const auto worth = static_cast<int64_t>(job.cost(phase) / kNanosecondsPerThread);
    const int64_t useful = worth < job.items(phase) ? worth : job.items(phase);
    threads = threads < useful ? useful : threads;
  }
  threads = threads < available ? threads : available;
  return cores > 0 && cores < threads ? cores : threads;
}

// The processor that this thread runs on, or -1 if nobody says.
inline int CurrentProcessor() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves this thread to another processor if it woke up on that of its caller, whose time it would take. The kernel of a
// virtual machine does that to every wake-up for milliseconds on end, since its other processors, while halted, count
// as taken away by the host. It may return: what it is allowed does not change.
inline void Leave(int processor) {
#if defined(__linux__)
  if (processor < 0 || sched_getcpu() != processor) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
  cpu_set_t others = allowed;
  CPU_CLR(processor, &others);
  if (CPU_EQUAL(&others, &allowed) || sched_setaffinity(0, sizeof others, &others) != 0) return;
  sched_setaffinity(0, sizeof allowed, &allowed);
#else
  static_cast<void>(processor);
#endif
}

// `schedule(task)` hands a nullary function to the pool. Returns false if memory ran out.
template <typename Schedule>
bool RunJob(Job& job, int64_t available, Schedule&& schedule) {
  const int64_t threads = ThreadsFor(job, available);
  job.set_threads(threads < 1 ? 1 : threads);
  if (threads <= 1) {
    Team team(&job);
    team.Work();
    return !team.failed();
  }
  const auto team = std::make_shared<Team>(&job);
  for (int64_t i = 1; i < threads; ++i) {
    schedule([team, caller = CurrentProcessor()] {
      Leave(caller);
      team->Work();
    });
  }
  team->Work();
  return !team->failed();
}

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_TEAM_H_
