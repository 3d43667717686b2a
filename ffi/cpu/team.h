// Runs computations (phased.h) one after the other on the calling thread and on helpers of a thread pool, without ever
// waiting for the pool.
//
// All helpers are scheduled up front and the caller works like any of them: items are claimed from one counter per
// phase, in the last phase of a job from one per lane: a thread takes those of its own lane, then what the others have
// left. At the end of a phase a thread waits only for items that other threads have claimed, which are therefore
// running; nobody waits for a task that is still in a queue. So a pool of one thread, a caller that is itself a thread
// of that pool, and helpers that start when all is done are all harmless. Scheduling later, from the last item of a
// phase, is not an option: the context of an FFI call lives on the caller's stack and is gone once the handler returns.
//
// A helper that has nothing to do waits a little for the next call (Standby). A thread that waits in a call fetches the
// weights that it will multiply next, so memory is read while rows are quantised.
#ifndef JAXINT8_FFI_CPU_TEAM_H_
#define JAXINT8_FFI_CPU_TEAM_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "float_state.h"
#include "phased.h"

namespace jaxint8::cpu {

// Waking a helper takes 5 to 10 microseconds until it does work; a phase must give each thread more than that.
inline constexpr double kNanosecondsPerThread = 6000;

class Team {
 public:
  Team(Phased* const* jobs, int count, int64_t threads) {
    size_t phases = 0, lanes = 0;
    for (int j = 0; j < count; ++j) {
      for (int phase = 0; phase < Phased::kPhases; ++phase) {
        phases += jobs[j]->items(phase) > 0;
        if (jobs[j]->items(phase) > 0) cost_ += jobs[j]->cost(phase) / static_cast<double>(threads);
        lanes += phase < kLast ? 1 : static_cast<size_t>(threads);
      }
    }
    phases_ = std::vector<Phase>(phases);
    lanes_ = std::vector<Lane>(lanes);
    Phase* next = phases_.data();
    Lane* lane = lanes_.data();
    for (int j = 0; j < count; ++j) {
      for (int phase = 0; phase < Phased::kPhases; ++phase) {
        if (jobs[j]->items(phase) == 0) continue;
        *next = {jobs[j], phase, jobs[j]->items(phase), lane, phase < kLast ? 1 : threads};
        if (phase < kLast) {
          lane->end = next->items;
        } else {
          for (int64_t i = 0; i < threads; ++i) {
            lane[i].next = jobs[j]->lane(i);
            lane[i].end = jobs[j]->lane(i + 1);
            lane[i].weights = jobs[j]->WeightsOf(i, &lane[i].bytes);
          }
        }
        lane += next->count;
        ++next;
      }
    }
  }

  // Claims items until none is left, phase after phase. A job is touched only while holding an item of it.
  void Work(int64_t own) {
    const ScopedFloatState state;
    for (size_t at = 0; at < phases_.size(); ++at) {
      Phase& phase = phases_[at];
      for (int64_t i = 0; i < phase.count; ++i) WorkIn(phase, phase.lanes[(own + i) % phase.count]);
      Fetch fetch = NextWeights(at, own);
      for (int spins = 0; phase.done.load(std::memory_order_acquire) < phase.items; ++spins) {
        if (fetch.bytes > 0) {
          fetch.Line();
        } else if (spins < 4096) {
          Pause();
        } else {
          std::this_thread::yield();  // whoever holds the item needs this core
        }
      }
    }
  }

  bool failed() const { return failed_.load(std::memory_order_relaxed); }

  // Whether all of it takes each thread less than this by estimate.
  bool ShorterThan(double nanoseconds) const { return cost_ < nanoseconds; }

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
    const int8_t* weights = nullptr;  // what its first items read, and how much of it is worth fetching
    int64_t bytes = 0;
  };

  struct Phase {
    Phased* job = nullptr;
    int phase = 0;
    int64_t items = 0;
    Lane* lanes = nullptr;  // one, in the last phase of a job one for each thread
    int64_t count = 0;
    alignas(64) std::atomic<int64_t> done{0};

    Phase& operator=(const Phase& other) {
      job = other.job, phase = other.phase, items = other.items, lanes = other.lanes, count = other.count;
      return *this;
    }
  };

  struct Fetch {
    const int8_t* weights;
    int64_t bytes;
    void Line() {
      __builtin_prefetch(weights, 0, 2);
      weights += 64;
      bytes -= 64;
    }
  };

  // Of the multiplication that follows a phase; nothing if it is one itself, unless another job follows.
  Fetch NextWeights(size_t at, int64_t own) const {
    for (size_t next = at + 1; next < phases_.size(); ++next) {
      if (phases_[next].phase == kLast) return {phases_[next].lanes[own].weights, phases_[next].lanes[own].bytes};
    }
    return {nullptr, 0};
  }

  // Says at the end of a lane how many of its items are done: all threads write there.
  void WorkIn(Phase& phase, Lane& lane) {
    int64_t done = 0;
    for (;;) {
      const int64_t item = lane.next.fetch_add(1, std::memory_order_relaxed);
      if (item >= lane.end) break;
      if (done == 0) phase.job->Begin(phase.phase);
      try {  // behind one that has failed, items would read what a call before has left
        if (!failed()) phase.job->Run(phase.phase, item);
      } catch (const std::bad_alloc&) {
        failed_.store(true, std::memory_order_relaxed);
      }
      ++done;
    }
    if (done == 0) return;
    phase.job->End(phase.phase);
    phase.done.fetch_add(done, std::memory_order_release);
  }

  static constexpr int kLast = Phased::kLast;
  std::vector<Phase> phases_;  // those that have items
  std::vector<Lane> lanes_;
  std::atomic<bool> failed_{false};
  double cost_ = 0;
};

// Threads that the costliest phase of a job deserves, the caller included.
inline int64_t ThreadsFor(const Phased& job, int64_t available) {
  static const int64_t cores = std::thread::hardware_concurrency();
  int64_t threads = 1;
  for (int phase = 0; phase < Phased::kPhases; ++phase) {
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

// Helpers that have just worked and wait for the next call. A decoder's calls follow each other within a tenth of a
// millisecond, and a thread that sleeps takes 20 us to wake in a virtual machine: as long as a small layer. While they
// wait they yield, so that whoever else wants their processor has it.
class Standby {
 public:
  static Standby& Get() {
    static auto* const standby = new Standby;  // never destroyed: helpers may outlive static objects
    return *standby;
  }

  // Gives the work to a helper that waits; false if none does.
  bool Offer(const std::shared_ptr<Team>& team, int64_t lane) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_.empty()) return false;
    Helper* const helper = waiting_.back();
    waiting_.pop_back();
    helper->team = team;
    helper->lane = lane;
    helper->called.store(true, std::memory_order_release);
    return true;
  }

  // Works, and goes on with what is offered until nothing has been for a while, or for so long that what others have
  // queued in the pool must have its turn.
  void Serve(std::shared_ptr<Team> team, int64_t lane) {
    const auto leave = std::chrono::steady_clock::now() + kShift;
    for (;;) {
      team->Work(lane);
      // Behind a long call the next is no nearer, and what comes between them wants this thread.
      const bool brief = team->ShorterThan(kBrief);
      team.reset();
      if (!brief) return;
      if (std::chrono::steady_clock::now() > leave) return;
      Helper self;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        waiting_.push_back(&self);
      }
      const auto end = std::chrono::steady_clock::now() + kPatience;
      while (!self.called.load(std::memory_order_acquire)) {
        std::this_thread::yield();
        if (std::chrono::steady_clock::now() > end && Withdraw(&self)) return;
      }
      team = std::move(self.team);
      lane = self.lane;
    }
  }

 private:
  // 30 us are too short for the attention between two layers' products; with 200 or more, helpers are in the way of the
  // float products of a long prompt.
  static constexpr auto kPatience = std::chrono::microseconds(100);
  static constexpr auto kShift = std::chrono::milliseconds(10);
  static constexpr double kBrief = 5e5;  // nanoseconds

  struct Helper {
    std::atomic<bool> called{false};
    std::shared_ptr<Team> team;
    int64_t lane = 0;
  };

  // False if work has been given to it meanwhile.
  bool Withdraw(Helper* helper) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto at = std::find(waiting_.begin(), waiting_.end(), helper);
    if (at == waiting_.end()) return false;
    waiting_.erase(at);
    return true;
  }

  std::mutex mutex_;
  std::vector<Helper*> waiting_;
};

// Runs jobs, each of which may read what those before it write. `schedule(task)` hands a nullary function to the pool.
// Returns false if memory ran out.
template <typename Schedule>
bool RunJobs(Phased* const* jobs, int count, int64_t available, Schedule&& schedule) {
  int64_t threads = 1;
  for (int j = 0; j < count; ++j) threads = std::max(threads, ThreadsFor(*jobs[j], available));
  for (int j = 0; j < count; ++j) jobs[j]->set_threads(threads);
  if (threads == 1) {
    Team team(jobs, count, 1);
    team.Work(0);
    return !team.failed();
  }
  const auto team = std::make_shared<Team>(jobs, count, threads);
  for (int64_t lane = 1; lane < threads; ++lane) {
    if (Standby::Get().Offer(team, lane)) continue;
    try {
      schedule([team, lane, caller = CurrentProcessor()]() mutable {
        Leave(caller);
        Standby::Get().Serve(std::move(team), lane);
      });
    } catch (const std::bad_alloc&) {
      break;  // the caller works through all lanes, and may not leave while a helper works
    }
  }
  team->Work(0);
  return !team->failed();
}

template <typename Schedule>
bool RunJob(Phased& job, int64_t available, Schedule&& schedule) {
  Phased* const jobs[] = {&job};
  return RunJobs(jobs, 1, available, std::forward<Schedule>(schedule));
}

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_TEAM_H_
