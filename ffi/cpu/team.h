// Runs a Job on the calling thread and on helpers of a thread pool, without ever waiting for the pool.
//
// All helpers are scheduled up front and the caller works like any of them: items are claimed from one counter per
// phase, in the last phase from one per lane: a thread takes those of its own lane, then what the others have left. At
// the end of a phase a thread waits only for items that other threads have claimed, which are therefore running; nobody
// waits for a task that is still in a queue. So a pool of one thread, a caller that is itself a thread of that pool,
// and helpers that start when all is done are all harmless. Scheduling later, from the last item of a phase, is not an
// option: the context of an FFI call lives on the caller's stack and is gone once the handler returns.
#ifndef JAXINT8_FFI_CPU_TEAM_H_
#define JAXINT8_FFI_CPU_TEAM_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "int8.h"

namespace jaxint8::cpu {

// Waking a helper takes 5 to 10 microseconds until it does work; a phase must give each thread more than that.
inline constexpr double kNanosecondsPerThread = 6000;

class Team {
 public:
  Team(Job* job, int64_t threads) : job_(job), lanes_(Job::kPhases - 1 + threads) {
    for (int phase = 0; phase < Job::kPhases; ++phase) items_[phase] = job->items(phase);
    for (int phase = 0; phase < kLast; ++phase) lanes_[phase].end = items_[phase];
    for (int64_t lane = 0; lane < threads; ++lane) {
      lanes_[kLast + lane].next = job->lane(lane);
      lanes_[kLast + lane].end = job->lane(lane + 1);
    }
  }

  // Claims items until none is left, phase after phase. The job is touched only while holding an item of it.
  void Work(int64_t own) {
    for (int phase = 0; phase < Job::kPhases; ++phase) {
      const int64_t count = phase < kLast ? 1 : static_cast<int64_t>(lanes_.size()) - kLast;
      for (int64_t i = 0; i < count; ++i) WorkIn(phase, &lanes_[phase + (own + i) % count]);
      for (int spins = 0; done_[phase].load(std::memory_order_acquire) < items_[phase]; ++spins) {
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

  struct alignas(64) Lane {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void WorkIn(int phase, Lane* lane) {
    for (;;) {
      const int64_t item = lane->next.fetch_add(1, std::memory_order_relaxed);
      if (item >= lane->end) return;
      try {
        job_->Run(phase, item);
      } catch (const std::bad_alloc&) {
        failed_.store(true, std::memory_order_relaxed);
      }
      done_[phase].fetch_add(1, std::memory_order_release);
    }
  }

  static constexpr int kLast = Job::kPhases - 1;
  Job* job_;
  int64_t items_[Job::kPhases];
  alignas(64) std::atomic<int64_t> done_[Job::kPhases] = {};
  std::vector<Lane> lanes_;  // one for each phase but the last, which has one for each thread
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
  const int64_t threads = std::max<int64_t>(1, ThreadsFor(job, available));
  job.set_threads(threads);
  if (threads == 1) {
    Team team(&job, 1);
    team.Work(0);
    return !team.failed();
  }
  const auto team = std::make_shared<Team>(&job, threads);
  for (int64_t lane = 1; lane < threads; ++lane) {
    schedule([team, lane, caller = CurrentProcessor()] {
      Leave(caller);
      team->Work(lane);
    });
  }
  team->Work(0);
  return !team->failed();
}

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_TEAM_H_
