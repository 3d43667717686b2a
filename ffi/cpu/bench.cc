// Times the kernels without JAX, beside what the machine can do: multiply rate, read bandwidth.
//
//   bench [threads] [rung=NAME] [m,k,n ...] [attend,b,heads,kv_heads,d,slots ...]
//
// One line per product: nanoseconds of the fastest call without and with outliers, the ratio of the two, the rate as a
// share of the peak multiply rate and the weights' bytes per second as a share of the read bandwidth at their size.
// Of attention to an int8 cache, all of whose slots are seen, the fastest and the median call and the cache's bytes per
// second of the fastest. Fastest rather than median: on a shared machine the fastest call is the one that nothing
// disturbed.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "attend.h"
#include "ceilings.h"
#include "int8.h"
#include "team.h"

namespace jaxint8::cpu {
namespace {

const Rung* rung = nullptr;

double Now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e9 * static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec);
}

// Threads that wait for tasks, spinning a while first, as XLA's pool does.
class Pool {
 public:
  explicit Pool(int helpers) {
    for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { Loop(); });
  }
  ~Pool() {
    stop_ = true;
    ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    pending_.fetch_add(1);
    ready_.notify_one();
  }

 private:
  void Loop() {
    while (!stop_) {
      for (int spin = 0; spin < 20000 && pending_.load(std::memory_order_relaxed) == 0; ++spin)
        std::this_thread::yield();
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
        if (stop_) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      pending_.fetch_sub(1);
      task();
    }
  }
  std::atomic<bool> stop_{false};
  std::atomic<int> pending_{0};
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
};

const Rung* NamedRung(const char* name) {
  int count = 0;
  const Rung* const* rungs = Rungs(&count);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(rungs[i]->name, name) == 0) return FindRung(i);
  }
  return nullptr;
}

struct Shape {
  int64_t m, k, n;
};

// Outliers as in real activations (jaxint8/evaluation/benchmark/layers.py has the same): one column in two thousand is
// large in most rows, and a tenth of the columns in a few. The largest eight values of a row are mostly others, in
// columns that differ from row to row.
std::vector<float> Activations(const Shape& s) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<float> x(s.m * s.k);
  for (float& v : x) v = normal(random);
  std::vector<int64_t> columns(s.k);
  std::iota(columns.begin(), columns.end(), 0);
  std::shuffle(columns.begin(), columns.end(), random);
  const auto enlarge = [&](int64_t count, float share, float low, float high) {
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = 0; j < std::max<int64_t>(1, count); ++j) {
        const float large = low + (high - low) * uniform(random), sign = uniform(random) < 0.5f ? -1.0f : 1.0f;
        if (uniform(random) < share) x[i * s.k + columns[j]] = sign * large;
      }
    }
  };
  enlarge(s.k / 2048, 7.0f / 8, 20, 60);
  enlarge(s.k / 10, 0.003f, 10, 30);
  return x;
}

void Run(const Shape& s, int threads, Pool* pool, double peak, const int8_t* weights) {
  const std::vector<float> x = Activations(s), scale(s.n, 0.01f);
  std::vector<float> y(s.m * s.n);
  std::vector<Options> options(5);
  options[1].rule = Rule::kThreshold, options[1].value = 6, options[1].column_scope = true;
  options[2].rule = Rule::kRelative, options[2].value = 6;
  options[3].rule = Rule::kTopK, options[3].topk = 8;
  options[4].rule = Rule::kThreshold, options[4].value = 6, options[4].column_scope = true;
  options[4].float_outliers = true;
  std::vector<double> best(options.size(), 1e30);
  const double budget = 4e8;
  const double start = Now();
  for (int round = 0; round < 5000 && (round < 5 || Now() - start < budget * options.size()); ++round) {
    for (size_t o = 0; o < options.size(); ++o) {
      Problem p{};
      p.kind = Problem::Kind::kLinear;
      p.rung = rung;
      p.options = options[o];
      p.m = s.m, p.k = s.k, p.n = s.n;
      p.x = x.data(), p.w = weights, p.w_scale = scale.data(), p.y = y.data();
      const double begin = Now();
      Job job(p);
      RunJob(job, threads, [&](auto task) { pool->Schedule(task); });
      best[o] = std::min(best[o], Now() - begin);
    }
  }
  const double read = MeasureBandwidth(weights, s.n * s.k, threads, 0.1) * 1e-9;
  const auto [m, k, n] = s;
  const double multiplies = static_cast<double>(m) * static_cast<double>(k) * static_cast<double>(n);
  std::printf("%5ld %6ld %6ld %11.0f ns | column %.2f relative %.2f top8 %.2f float %.2f | ", static_cast<long>(m),
              static_cast<long>(k), static_cast<long>(n), best[0], best[1] / best[0], best[2] / best[0],
              best[3] / best[0], best[4] / best[0]);
  std::printf("%5.1f%% of peak, %5.1f%% of %.1f GB/s\n", 100 * multiplies / best[0] / peak,
              100 * static_cast<double>(n * k) / best[0] / read, read);
  std::fflush(stdout);
}

struct Attention {
  int64_t b, heads, kv_heads, d, slots;
};

void Run(const Attention& a, int threads, Pool* pool) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const int64_t units = a.b * a.kv_heads;
  std::vector<float> qkv(a.b * (a.heads + 2 * a.kv_heads) * a.d), y(a.b * a.heads * a.d);
  std::vector<float> cosine(a.b * a.d / 2, 0.8f), sine(a.b * a.d / 2, 0.6f);
  std::vector<float> key_scale(units * a.slots, 0.01f), value_scale(units * a.slots, 0.02f);
  std::vector<int8_t> keys(units * a.slots * a.d), values(keys.size());
  std::vector<int32_t> start(a.b, 0);
  for (float& v : qkv) v = normal(random);
  for (std::vector<int8_t>* codes : {&keys, &values}) {
    for (int8_t& code : *codes) code = static_cast<int8_t>(random());
  }
  AttendProblem p{};
  p.rung = rung;
  p.type = Type::kF32;
  p.b = a.b, p.heads = a.heads, p.kv_heads = a.kv_heads, p.d = a.d, p.slots = a.slots, p.slot = a.slots - 1;
  p.qkv = qkv.data(), p.cosine = cosine.data(), p.sine = sine.data(), p.start = start.data();
  p.key_codes = keys.data(), p.key_scale = key_scale.data();
  p.value_codes = values.data(), p.value_scale = value_scale.data(), p.y = y.data();
  std::vector<double> taken;
  for (const double begin = Now(); taken.size() < 5 || Now() - begin < 2e9;) {
    const double before = Now();
    AttendJob job(p);
    RunJob(job, threads, [&](auto task) { pool->Schedule(task); });
    taken.push_back(Now() - before);
  }
  std::sort(taken.begin(), taken.end());
  std::printf("attend %ld,%ld,%ld,%ld,%ld %9.0f ns, median %9.0f, %.1f GB/s\n", static_cast<long>(a.b),
              static_cast<long>(a.heads), static_cast<long>(a.kv_heads), static_cast<long>(a.d),
              static_cast<long>(a.slots), taken[0], taken[taken.size() / 2],
              2 * static_cast<double>(keys.size()) / taken[0]);
  std::fflush(stdout);
}

}  // namespace
}  // namespace jaxint8::cpu

int main(int argc, char** argv) {
  using namespace jaxint8::cpu;
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::vector<Shape> shapes;
  std::vector<Attention> attentions;
  rung = FindRung(-1);
  for (int i = 2; i < argc; ++i) {
    if (std::strncmp(argv[i], "rung=", 5) == 0) rung = NamedRung(argv[i] + 5);
    if (rung == nullptr) return std::fprintf(stderr, "%s: no such rung here\n", argv[i]), 2;
    long b, heads, kv_heads, d, slots;
    if (std::sscanf(argv[i], "attend,%ld,%ld,%ld,%ld,%ld", &b, &heads, &kv_heads, &d, &slots) == 5) {
      attentions.push_back({b, heads, kv_heads, d, slots});
    }
    long m, k, n;
    if (std::sscanf(argv[i], "%ld,%ld,%ld", &m, &k, &n) == 3) shapes.push_back({m, k, n});
  }
  size_t largest = 0;
  for (const Shape& s : shapes) largest = std::max<size_t>(largest, s.k * s.n);
  // As XLA has them, at the beginning of a line.
  const size_t total = (largest + 4096) / 4096 * 4096;
  auto* const weights = static_cast<int8_t*>(std::aligned_alloc(4096, total));
  if (weights == nullptr) return std::fprintf(stderr, "out of memory\n"), 1;
  for (size_t i = 0; i < total; ++i) weights[i] = static_cast<int8_t>((i * 2654435761u) >> 24);
  const double peak = MeasurePeak(threads, 0.2, rung->name).multiplies_per_second * 1e-9;
  std::printf("%s, %d threads, peak %.0f multiplies per ns\n", rung->name, threads, peak);
  Pool pool(threads - 1);
  for (const Shape& s : shapes) Run(s, threads, &pool, peak, weights);
  for (const Attention& a : attentions) Run(a, threads, &pool);
  std::free(weights);
}
