// Runs kernels on the CPU, one block at a time: every thread is a fiber, warps and barriers work as on a GPU, and
// memory is watched. Found and reported with the source line: accesses out of bounds or misaligned, reads of memory
// that nothing wrote, races (two accesses to a byte, one of them a write, with no barrier between them), barriers and
// warp functions that some threads do not reach, copies read before they were waited for.
//
// A fault can be planted at any call in a kernel (see Plant), to show that the tests would notice it.
#ifndef JAXINT8_FFI_CUDA_EXECUTOR_BLOCK_H_
#define JAXINT8_FFI_CUDA_EXECUTOR_BLOCK_H_

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace jaxint8::cuda {

// A place in a kernel's source.
struct Site {
  const char* file;
  int line;
  static constexpr Site Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  std::string Name() const {
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};

// The faults that can be planted at a site.
enum class Fault : int { kNone, kSkipBarrier, kShiftIndex, kSwapFragment, kSkipWait };

struct Plant {
  Fault fault = Fault::kNone;
  std::string site;
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Who touched a byte and when. Two touches are ordered if a barrier of the block, or one of their warp, lies between,
// or a phase of a barrier in memory (or a cluster's barrier) that ended after the one and was waited for by the other.
struct Touch {
  // Of those that are not certain to come before one another, as reads may be: the first and the last of the threads
  // and of the blocks, and the latest touch. -1: never.
  int32_t first_thread = -1, last_thread = -1;
  bool atomic = false;
  uint32_t launch = 0, first_block = 0, last_block = 0, block_epoch = 0, warp_epoch = 0, time = 0;
};

struct Shadow {
  Touch write, read;
  bool defined = false;
  bool fenced = true;  // may be read by products of a warpgroup
};

// A range of memory that kernels may use.
struct Buffer {
  uint8_t* data;
  int64_t bytes;
  bool shared;
  std::vector<Shadow> shadow;
};

class Machine;
Machine& TheMachine();

class Machine {
 public:
  static constexpr int64_t kStack = 128 * 1024;

  Plant plant;
  unsigned order = 0;  // the order in which threads run between barriers: forwards, backwards, mixed
  int64_t multiprocessors = 2;
  std::map<std::string, int> sites;  // every site seen, with the fault that can be planted there
  int worst_bank_conflict = 0;       // of LoadMatrix4: accesses to one bank in one phase

  void Reset() {
    buffers_.clear();
    sites.clear();
    worst_bank_conflict = 0;
    launch_ = 0;
  }

  // Registers memory; `defined` is whether a kernel may read it before one has written it.
  Buffer* Add(void* data, int64_t bytes, bool defined, bool shared = false) {
    auto* p = static_cast<uint8_t*>(data);
    for (auto& b : buffers_) {
      if (!shared && b->data == p && b->bytes == bytes) return b.get();
    }
    buffers_.push_back(std::make_unique<Buffer>(Buffer{p, bytes, shared, std::vector<Shadow>(bytes)}));
    for (auto& s : buffers_.back()->shadow) s.defined = defined;
    return buffers_.back().get();
  }

  void Define(Buffer* buffer, int64_t offset, int64_t bytes) {
    for (int64_t i = offset; i < offset + bytes; ++i) buffer->shadow[i].defined = true;
  }

  // The buffer that holds [data, data + bytes), in which kernels may use that range only; null if there is none.
  Buffer* Find(const void* data) {
    const auto* p = static_cast<const uint8_t*>(data);
    for (auto& b : buffers_) {
      if (p >= b->data && p < b->data + b->bytes) return b.get();
    }
    return nullptr;
  }

  // The blocks of a cluster run together, clusters one after the other.
  void Launch(int64_t blocks_count, int threads, int64_t shared_bytes, int cluster, const std::function<void()>& body) {
    if (threads % 32 != 0 || threads < 32 || threads > 1024) throw Failure("launch: bad number of threads");
    if (cluster < 1 || cluster > 8 || blocks_count % cluster != 0) throw Failure("launch: bad size of clusters");
    if (shared_bytes > 227 * 1024) throw Failure("launch: more shared memory than a block may have");
    ++launch_;
    Prepare(threads, cluster);
    body_ = &body;
    block_count_ = blocks_count;
    for (first_block_ = 0; first_block_ < blocks_count; first_block_ += cluster) {
      shared_.clear();
      for (int rank = 0; rank < cluster; ++rank) shared_.push_back(std::make_unique<SharedBlock>(shared_bytes));
      RunCluster();
    }
  }

  int thread() const { return current_ % threads_; }
  int threads() const { return threads_; }
  int rank() const { return current_ / threads_; }
  int cluster() const { return static_cast<int>(shared_.size()); }
  int64_t block() const { return first_block_ + rank(); }
  int64_t block_count() const { return block_count_; }
  Buffer* shared_buffer() { return shared_buffer(rank()); }
  Buffer* shared_buffer(int rank) { return &shared_[static_cast<size_t>(rank)]->buffer; }

  void Note(const Site& site, Fault fault) { sites[site.Name() + " " + std::to_string(static_cast<int>(fault))]++; }
  bool Planted(const Site& site, Fault fault) {
    Note(site, fault);
    return plant.fault == fault && site.Name() == plant.site;
  }

  // Checks an access; returns its address.
  uint8_t* Access(Buffer* buffer, int64_t low, int64_t high, int64_t offset, int64_t bytes, int64_t align, bool write,
                  bool atomic, const Site& site) {
    if (Planted(site, Fault::kShiftIndex)) offset += bytes;
    if (buffer == nullptr) Fail(site, "null pointer");
    if (offset < low || offset + bytes > high) {
      Fail(site, (buffer->shared ? "shared" : "device") + std::string(" memory out of bounds: offset ") +
                     std::to_string(offset - low) + " + " + std::to_string(bytes) + " of " +
                     std::to_string(high - low));
    }
    if (reinterpret_cast<uintptr_t>(buffer->data + offset) % align != 0) Fail(site, "misaligned access");
    for (int64_t i = offset; i < offset + bytes; ++i) Touched(buffer->shadow[i], write, atomic, site);
    if (write && buffer->shared) {
      for (int64_t i = offset; i < offset + bytes; ++i) buffer->shadow[i].fenced = false;
      fibers_[current_].unfenced.push_back({offset, bytes});
    }
    return buffer->data + offset;
  }

  // From now on products may read what this thread stored in the shared memory of its block, and what others sent
  // there.
  void FenceShared(const Site& site) {
    for (auto* stored : {&fibers_[current_].unfenced, &received_[rank()]}) {
      if (!Planted(site, Fault::kSkipBarrier)) {
        for (const auto& [offset, bytes] : *stored) {
          for (int64_t i = offset; i < offset + bytes; ++i) shared_buffer()->shadow[i].fenced = true;
        }
      }
      stored->clear();
    }
  }
  // Bytes that a thread sent to a block have arrived.
  void Receive(int rank, int64_t offset, int64_t bytes) {
    for (int64_t i = offset; i < offset + bytes; ++i) shared_buffer(rank)->shadow[i].fenced = false;
    received_[rank].push_back({offset, bytes});
  }

  void Barrier(const Site& site) {
    if (Planted(site, Fault::kSkipBarrier)) return;
    Fiber& f = fibers_[current_];
    f.at = site;
    f.state = State::kBlock;
    const auto r = static_cast<size_t>(rank());
    if (++waiting_block_[r] == threads()) {
      for (int i = rank() * threads_; i < (rank() + 1) * threads_; ++i) {
        Fiber& other = fibers_[i];
        if (other.state != State::kBlock || other.at.line != site.line)
          Fail(site, "barrier not reached by all threads");
        other.state = State::kReady;
      }
      waiting_block_[r] = 0;
      ++block_epoch_[r];
    } else {
      Yield();
    }
  }

  // Of some threads of the block, wherever in the source they wait. What these did before is known to them afterwards.
  void PartBarrier(int number, int threads, const Site& site) {
    if (number < 1 || number > 15 || threads % 32 != 0) Fail(site, "bad barrier");
    if (Planted(site, Fault::kSkipBarrier)) return;
    Fiber& f = fibers_[current_];
    f.at = site;
    f.state = State::kPart;
    std::vector<int>& waiting = waiting_part_[{rank(), number}];
    waiting.push_back(current_);
    if (static_cast<int>(waiting.size()) < threads) return Yield();
    ++time_;
    std::sort(waiting.begin(), waiting.end());
    const auto part = std::make_shared<const std::vector<int>>(std::move(waiting));
    waiting.clear();
    for (const int other : *part) {
      fibers_[other].state = State::kReady;
      fibers_[other].synced_part = time_;
      fibers_[other].part = part;
    }
  }

  // Of all threads of the cluster, wherever in the source they wait.
  void ClusterBarrier(const Site& site) {
    if (Planted(site, Fault::kSkipBarrier)) return;
    Fiber& f = fibers_[current_];
    f.at = site;
    f.state = State::kCluster;
    if (++waiting_cluster_ == static_cast<int>(fibers_.size())) {
      ++time_;
      for (Fiber& other : fibers_) {
        other.state = State::kReady;
        other.synced = time_;
      }
      waiting_cluster_ = 0;
    } else {
      Yield();
    }
  }

  // The same without knowledge of what the others did.
  void ClusterArrive(const Site& site) {
    if (Planted(site, Fault::kSkipBarrier)) return;
    Fiber& f = fibers_[current_];
    f.meeting = met_cluster_++ / fibers_.size() + 1;
  }
  void ClusterWait(const Site& site) {
    Fiber& f = fibers_[current_];
    if (f.meeting == f.met) Fail(site, "waits for its cluster without having arrived");
    f.met = f.meeting;
    const uint32_t synced = f.synced;
    WaitUntil(site, [this, &f] { return met_cluster_ / fibers_.size() >= f.meeting ? 1u : 0u; });
    f.synced = synced;
  }

  // Waits until `done` returns the time since when it holds; 0: not yet.
  void WaitUntil(const Site& site, std::function<uint32_t()> done) {
    Fiber& f = fibers_[current_];
    f.at = site;
    uint32_t since = done();
    while (since == 0) {
      f.state = State::kPoll;
      f.done = &done;
      Yield();
      since = done();
    }
    if (since > f.synced) f.synced = since;
  }
  uint32_t Tick() { return ++time_; }
  // Whether all threads of a block of the cluster have ended.
  bool Ended(int rank) const {
    const auto first = fibers_.begin() + int64_t{rank} * threads_;
    return std::all_of(first, first + threads_, [](const Fiber& f) { return f.state == State::kDone; });
  }
  // What the copy engine does later: as late as possible, when no thread can go on.
  void Postpone(std::function<void()> delivery) { deliveries_.push_back(std::move(delivery)); }
  // What belongs to the cluster that runs.
  std::map<std::pair<int, uint32_t>, std::shared_ptr<void>>& barriers() { return barriers_; }
  std::map<int, std::shared_ptr<void>>& warp_state() { return warp_state_; }
  int warp() const { return current_ / 32; }

  // Runs `operation` once all lanes of the warp have arrived with their `argument`; the operation sees all of them.
  void Collective(const Site& site, void* argument, const std::function<void(void* const*)>& operation) {
    Warp& warp = warps_[current_ / 32];
    Fiber& f = fibers_[current_];
    f.at = site;
    warp.arguments[current_ % 32] = argument;
    f.state = State::kWarp;
    if (++warp.waiting == 32) {
      for (int lane = 0; lane < 32; ++lane) {
        Fiber& other = fibers_[current_ / 32 * 32 + lane];
        if (other.state != State::kWarp || other.at.line != site.line)
          Fail(site, "lanes of a warp are at different calls");
      }
      operation(warp.arguments);
      for (int lane = 0; lane < 32; ++lane) fibers_[current_ / 32 * 32 + lane].state = State::kReady;
      warp.waiting = 0;
    } else {
      Yield();
    }
  }

  void WarpBarrier(const Site& site) {
    if (Planted(site, Fault::kSkipBarrier)) return;
    Collective(site, nullptr, [this](void* const*) { ++warps_[current_ / 32].epoch; });
  }

  struct Copy {
    uint8_t* to;
    const uint8_t* from;  // null: zeros
  };
  std::vector<Copy>& open_copies() { return fibers_[current_].open; }
  std::vector<std::vector<Copy>>& groups() { return fibers_[current_].groups; }

  [[noreturn]] void Fail(const Site& site, const std::string& what) const {
    throw Failure(site.Name() + ": " + what + " (block " + std::to_string(block()) + ", thread " +
                  std::to_string(thread()) + ")");
  }

 private:
  enum class State { kReady, kBlock, kPart, kWarp, kCluster, kPoll, kDone };
  struct Fiber {
    State state = State::kReady;
    Site at{"", 0};
    ucontext_t start;
    jmp_buf resume;
    bool started = false;
    std::unique_ptr<uint8_t[]> stack;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    std::vector<std::pair<int64_t, int64_t>> unfenced;  // stores to shared memory: offset, bytes
    uint32_t synced = 0;                                // what happened before this time is known to this thread
    uint32_t synced_part = 0;                           // the same of what the threads of its part have done
    std::shared_ptr<const std::vector<int>> part;       // in order
    std::function<uint32_t()>* done = nullptr;
    size_t meeting = 0, met = 0;  // meetings of the cluster that it has arrived at, and waited for
  };
  // The shared memory of a block.
  struct SharedBlock {
    explicit SharedBlock(int64_t bytes) : memory(static_cast<size_t>(bytes + 1024), 0xcd) {
      auto* base = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
      buffer = {base, bytes, true, std::vector<Shadow>(static_cast<size_t>(bytes))};
    }
    std::vector<uint8_t> memory;
    Buffer buffer;
  };
  struct Warp {
    int waiting = 0;
    uint32_t epoch = 0;
    void* arguments[32] = {};
  };

  void Prepare(int threads, int cluster) {
    threads_ = threads;
    threads *= cluster;
    if (static_cast<int>(fibers_.size()) != threads) fibers_ = std::vector<Fiber>(static_cast<size_t>(threads));
    for (Fiber& f : fibers_) {
      if (!f.stack) f.stack.reset(new uint8_t[kStack]);
    }
    warps_.assign(static_cast<size_t>(threads / 32), Warp());
  }

  static void Entry() {
    Machine& m = TheMachine();
    try {
      (*m.body_)();
    } catch (...) {
      m.error_ = std::current_exception();
    }
    m.fibers_[m.current_].state = State::kDone;
    _longjmp(m.scheduler_, 1);
  }

  void RunCluster() {
    waiting_block_.assign(shared_.size(), 0);
    block_epoch_.assign(shared_.size(), 0);
    waiting_part_.clear();
    waiting_cluster_ = 0;
    met_cluster_ = 0;
    time_ = 1;
    barriers_.clear();
    warp_state_.clear();
    deliveries_.clear();
    received_.clear();
    for (Warp& w : warps_) w = Warp();
    for (Fiber& f : fibers_) {
      f.state = State::kReady;
      f.started = false;
      f.open.clear();
      f.groups.clear();
      f.unfenced.clear();
      f.synced = f.synced_part = 0;
      f.part.reset();
      f.meeting = f.met = 0;
    }
    error_ = nullptr;
    const int n = static_cast<int>(fibers_.size());
    bool progress = true;
    while (progress) {
      progress = false;
      for (int i = 0; i < n; ++i) {
        const int at = order == 0 ? i : order == 1 ? n - 1 - i : static_cast<int>((i * 37LL + 11) % n);
        if (fibers_[at].state == State::kPoll && (*fibers_[at].done)() != 0) fibers_[at].state = State::kReady;
        if (fibers_[at].state != State::kReady) continue;
        progress = true;
        Resume(at);
        if (error_) {
          // The other fibers are abandoned where they stand; what they hold is trivially destructible.
          std::rethrow_exception(error_);
        }
      }
      if (!progress && !deliveries_.empty()) {
        const auto at = deliveries_.begin() + (order == 1 ? static_cast<int64_t>(deliveries_.size()) - 1 : 0);
        const std::function<void()> delivery = std::move(*at);
        deliveries_.erase(at);
        delivery();
        progress = true;
      }
    }
    for (int i = 0; i < n; ++i) {
      if (fibers_[i].state != State::kDone) {
        current_ = i;
        Fail(fibers_[i].at, "waits for threads that never come");
      }
      if (!fibers_[i].open.empty() || !fibers_[i].groups.empty()) {
        current_ = i;
        Fail(fibers_[i].at, "kernel ends with copies under way");
      }
    }
  }

  void Resume(int at) {
    current_ = at;
    Fiber& f = fibers_[at];
    if (_setjmp(scheduler_) == 0) {
      if (f.started) _longjmp(f.resume, 1);
      f.started = true;
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = kStack;
      f.start.uc_link = nullptr;
      makecontext(&f.start, reinterpret_cast<void (*)()>(&Machine::Entry), 0);
      setcontext(&f.start);
    }
  }

  void Yield() {
    if (_setjmp(fibers_[current_].resume) == 0) _longjmp(scheduler_, 1);
  }

  Touch Now(bool atomic) const {
    const auto here = static_cast<uint32_t>(block());
    const uint32_t block_epoch = block_epoch_[static_cast<size_t>(rank())], warp_epoch = warps_[current_ / 32].epoch;
    return {current_, current_, atomic, launch_, here, here, block_epoch, warp_epoch, time_};
  }

  // Whether touches a are certain to come before one that happens now.
  bool Before(const Touch& a) const {
    if (a.first_thread < 0 || a.launch != launch_) return true;
    const Fiber& f = fibers_[current_];
    const int64_t next_cluster = first_block_ + static_cast<int64_t>(shared_.size());
    if (a.first_block >= first_block_ && a.last_block < next_cluster && a.time < f.synced) return true;
    const auto here = static_cast<uint32_t>(block());
    if (a.first_block != here || a.last_block != here) return false;
    if (a.block_epoch < block_epoch_[static_cast<size_t>(rank())]) return true;
    if (a.time < f.synced_part && InPart(*f.part, a)) return true;
    if (a.first_thread == current_ && a.last_thread == current_) return true;
    const int warp = current_ / 32;
    return a.first_thread / 32 == warp && a.last_thread / 32 == warp && a.warp_epoch < warps_[warp].epoch;
  }

  // Whether all threads between the first and the last, any of which may have touched, are in the part.
  static bool InPart(const std::vector<int>& part, const Touch& a) {
    const auto first = std::lower_bound(part.begin(), part.end(), a.first_thread);
    const int64_t after = a.last_thread - a.first_thread;
    return part.end() - first > after && *first == a.first_thread && first[after] == a.last_thread;
  }

  void Touched(Shadow& s, bool write, bool atomic, const Site& site) {
    if (!(s.write.atomic && atomic) && !Before(s.write)) {
      Fail(site, std::string(write ? "write" : "read") + " races with a write of thread " +
                     std::to_string(s.write.last_thread));
    }
    if (write) {
      if (!(s.read.atomic && atomic) && !Before(s.read)) {
        Fail(site, "write races with a read of thread " + std::to_string(s.read.last_thread));
      }
      s.write = Now(atomic);
      s.defined = true;
      return;
    }
    if (!s.defined) Fail(site, "reads memory that nothing has written");
    Touch now = Now(atomic);
    if (!Before(s.read)) {
      now.first_thread = std::min(now.first_thread, s.read.first_thread);
      now.last_thread = std::max(now.last_thread, s.read.last_thread);
      now.first_block = std::min(now.first_block, s.read.first_block);
      now.last_block = std::max(now.last_block, s.read.last_block);
      now.atomic = atomic && s.read.atomic;
    }
    s.read = now;
  }

  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<Fiber> fibers_;
  std::map<int, std::vector<std::pair<int64_t, int64_t>>> received_;  // by block, not fenced yet: offset, bytes
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<SharedBlock>> shared_;  // of the blocks of the cluster that runs
  std::map<std::pair<int, uint32_t>, std::shared_ptr<void>> barriers_;
  std::map<int, std::shared_ptr<void>> warp_state_;
  std::deque<std::function<void()>> deliveries_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  jmp_buf scheduler_;
  int current_ = 0, threads_ = 0;
  std::vector<int> waiting_block_;                                // by rank
  std::vector<uint32_t> block_epoch_;                             // by rank
  std::map<std::pair<int, int>, std::vector<int>> waiting_part_;  // by rank and number
  int waiting_cluster_ = 0;
  size_t met_cluster_ = 0;  // arrivals of all threads
  uint32_t launch_ = 0, time_ = 1;
  int64_t first_block_ = 0, block_count_ = 0;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_EXECUTOR_BLOCK_H_
