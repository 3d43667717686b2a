// Every rung that this machine supports against the scalar one, to the bit: for machines without Python (cross-compiled
// rungs under an emulator) and for sanitizers. tests/test_kernels.py compares the same kernels with the NumPy oracle.
// With AVX512-VNNI there are two more: AVX-VNNI in the encoding of AVX-512, and AMX with emulated tiles.
//
//   battery            prints one line per rung and a checksum of the scalar results, which must be the same everywhere
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "attend.h"
#include "int8.h"
#include "team.h"

namespace jaxint8::cpu {

extern const Rung kAmxInt8Emulated, kAvxVnniEvex, kAvx512VnniStrips, kAvx512Vnni;

namespace {

std::vector<const Rung*> AllRungs() {
  int count = 0;
  const Rung* const* rungs = Rungs(&count);
  std::vector<const Rung*> all(rungs, rungs + count);
#if defined(JAXINT8_STAND_INS)
  // Chosen on Intel's processors only; all that have the instructions can run it.
  static const Rung strips = [] {
    Rung rung = kAvx512VnniStrips;
    rung.name = "strips anywhere";
    rung.supported = kAvx512Vnni.supported;
    return rung;
  }();
  all.insert(all.begin(), {&kAmxInt8Emulated, &kAvxVnniEvex, &strips});
#endif
  return all;
}

// Exactly as long as it must be, so that a sanitizer sees every byte read beyond the end.
using Bytes = std::vector<uint8_t>;

struct Case {
  int64_t m, k, n;
  Type type;
  Options options;
  bool bias, residual;
  Prologue::Kind prologue;

  int64_t columns() const { return prologue == Prologue::Kind::kSiluGate ? 2 * k : k; }
};

struct Inputs {
  Bytes x, w, w_scale, bias, norm, residual, a;
};

struct Outputs {
  Bytes y, streamed, gated, product, rows, lo, hi, row_scale;
};

uint16_t ToHalf(float x) {  // truncates; inputs only
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 15;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (std::isnan(x)) return sign | 0x7e00;
  if (exponent >= 31) return sign | 0x7c00;
  if (exponent <= 0) return sign | (exponent > -11 ? (bits >> 13 & 0x3ff) >> -exponent : 0);
  return static_cast<uint16_t>(sign | exponent << 10 | (bits >> 13 & 0x3ff));
}

template <typename T>
void Put(Bytes& bytes, int64_t index, T value) {
  std::memcpy(bytes.data() + index * static_cast<int64_t>(sizeof value), &value, sizeof value);
}

void PutActivation(Bytes& x, Type type, int64_t index, float value) {
  if (type == Type::kF32) return Put(x, index, value);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  Put(x, index, type == Type::kF16 ? ToHalf(value) : static_cast<uint16_t>(bits >> 16));
}

// No <random> distributions: their results differ between C++ libraries.
float Uniform(std::mt19937& random) { return static_cast<float>(random() >> 8) * 0x1p-23f - 1; }

Inputs Make(const Case& c, uint32_t seed) {
  std::mt19937 random(seed);
  Inputs in;
  const int64_t size = SizeOf(c.type);
  in.x.resize(c.m * c.columns() * size);
  in.norm.resize(c.k * 4);
  in.residual.resize(c.m * c.n * size);
  in.w.resize(c.n * c.k);
  in.a.resize(c.m * c.k);
  in.w_scale.resize(c.n * 4);
  in.bias.resize(c.n * 4);
  for (uint8_t& w : in.w) w = static_cast<uint8_t>(random());
  for (int64_t j = 6; j < c.n; j += 8) std::fill_n(in.w.begin() + j * c.k, c.k, j % 16 < 8 ? 0x80 : 0x7f);  // extremes
  for (uint8_t& a : in.a) a = static_cast<uint8_t>(random());
  for (int64_t j = 0; j < c.n; ++j) {
    Put(in.w_scale, j, 0.01f * (Uniform(random) + 1.5f));
    Put(in.bias, j, Uniform(random));
  }
  for (int64_t j = 0; j < c.k; ++j) Put(in.norm, j, Uniform(random));
  for (int64_t j = 0; j < c.m * c.n; ++j) PutActivation(in.residual, c.type, j, 8 * Uniform(random));
  // Every second case has rows that can be turned (Rung::turn): few values near the largest. There neighbours far out
  // have high parts that add up to more than a byte, and without a rule four of them move twice.
  const bool turns = seed % 2 == 1;
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < c.m; ++i) {
    const float scale = std::ldexp(1.0f, static_cast<int>(random() % 9) - 4);
    for (int64_t j = 0; j < c.columns(); ++j) {
      float value = Uniform(random);
      for (int other = 0; turns && other < 3; ++other) value += Uniform(random);
      value *= scale * (random() % 64 == 0 ? 12 : 1);
      if (turns && i % 8 == 1 && j % 32 / 2 == 5) value = 300 * scale;
      if (i % 16 == 3) value = j % 2 ? 0.0f : -0.0f;
      if (i % 16 == 5) value = (j % 3 ? 2.0f : -2.0f) * (turns && j % 8 > 1 ? 0.25f : 1.0f);  // ties everywhere
      if (i % 16 == 7 && j == c.k / 2) value = nan;
      if (i % 16 == 9 && j == c.k - 1) value = -inf;
      if (i % 16 == 1 && j == c.k - 1) value = -40 * scale;  // whose group of four the end of the row may cut off
      if (i % 16 == 11) value *= 0x1p-123f;
      PutActivation(in.x, c.type, i * c.columns() + j, value);
    }
  }
  return in;
}

// Runs on threads made for the occasion; the calling thread takes part.
void RunOn(int threads, Phased& job) {
  std::vector<std::thread> helpers;
  RunJob(job, threads, [&](auto task) { helpers.emplace_back(std::move(task)); });
  for (std::thread& helper : helpers) helper.join();
}

void RunOn(int threads, const Problem& problem) {
  Job job(problem);
  RunOn(threads, job);
}

Outputs Run(const Case& c, const Inputs& in, const Rung* rung, int threads) {
  Outputs out;
  const int64_t size = SizeOf(c.type);
  out.y.resize(c.m * c.n * size);
  out.rows.resize(c.m * c.k * size);
  out.product.resize(c.m * c.n * 4);
  out.lo.resize(c.m * c.k);
  out.hi.resize(c.m * c.k);
  out.row_scale.resize(c.m * 4);
  Problem p{};
  p.rung = rung;
  p.options = c.options;
  p.type = c.type;
  p.m = c.m, p.k = c.k, p.n = c.n;
  p.x = in.x.data();
  p.w = reinterpret_cast<const int8_t*>(in.w.data());
  p.w_scale = reinterpret_cast<const float*>(in.w_scale.data());
  p.bias = c.bias ? reinterpret_cast<const float*>(in.bias.data()) : nullptr;
  p.lo = reinterpret_cast<int8_t*>(out.lo.data());
  p.hi = reinterpret_cast<int8_t*>(out.hi.data());
  p.row_scale = reinterpret_cast<float*>(out.row_scale.data());
  p.kind = Problem::Kind::kQuantize;
  RunOn(threads, p);
  p.prologue = {c.prologue, 0x1p-17f, reinterpret_cast<const float*>(in.norm.data())};
  if (c.prologue != Prologue::Kind::kNone) {
    p.kind = Problem::Kind::kPrologue;
    p.y = out.rows.data();
    RunOn(threads, p);
  }
  p.kind = Problem::Kind::kLinear;
  p.residual = c.residual ? in.residual.data() : nullptr;
  p.y = out.y.data();
  p.source = Problem::Source::kCache;
  RunOn(threads, p);
  out.streamed.resize(out.y.size());
  p.y = out.streamed.data();
  p.source = Problem::Source::kMemory;
  RunOn(threads, p);
  // The first half of the outputs as the gate of the second. From here on one source each, by the case.
  p.source = c.n % 2 ? Problem::Source::kCache : Problem::Source::kMemory;
  out.gated.resize(c.m * (c.n / 2) * size);
  p.gated = true;
  p.n = c.n / 2;
  p.residual = nullptr;
  p.y = out.gated.data();
  RunOn(threads, p);
  p.gated = false;
  p.n = c.n;
  p.kind = Problem::Kind::kProduct;
  p.type = Type::kS32;
  p.x = in.a.data();
  p.y = out.product.data();
  p.source = c.n % 2 ? Problem::Source::kMemory : Problem::Source::kCache;
  RunOn(threads, p);
  return out;
}

// One NaN for all, because processors differ in the sign and payload of the NaN that they make.
void UnifyNans(Bytes& bytes, Type type) {
  const auto size = static_cast<size_t>(SizeOf(type));
  const uint32_t infinity = type == Type::kF32 ? 0x7f800000 : type == Type::kBF16 ? 0x7f80 : 0x7c00;
  const uint32_t magnitude = type == Type::kF32 ? 0x7fffffff : 0x7fff;
  for (size_t i = 0; i < bytes.size(); i += size) {
    uint32_t value = 0;
    std::memcpy(&value, bytes.data() + i, size);
    if ((value & magnitude) > infinity) std::memcpy(bytes.data() + i, &magnitude, size);
  }
}

uint64_t Checksum(uint64_t sum, const Bytes& bytes) {  // FNV-1a
  for (uint8_t byte : bytes) sum = (sum ^ byte) * 1099511628211u;
  return sum;
}

// Attention to a cache, of which rows see the slots from start to slot.
struct AttendCase {
  int64_t b, heads, kv_heads, d, slots, slot;
  Type type;
  bool turns;
};

struct Cache {
  Bytes key_codes, key_scale, value_codes, value_scale;
};

// Starts of rows: zero, in the last chunk and before, the slot itself.
int64_t StartOf(const AttendCase& c, int64_t row) {
  const int64_t starts[] = {0, c.slot / 2, c.slot, c.slot - c.slot % kChunkSlots, std::max<int64_t>(0, c.slot - 17)};
  return starts[row % 5];
}

Cache MakeCache(const AttendCase& c, std::mt19937& random) {
  Cache cache;
  const int64_t units = c.b * c.kv_heads;
  for (Bytes* codes : {&cache.key_codes, &cache.value_codes}) {
    codes->resize(units * c.d * c.slots);
    for (uint8_t& code : *codes) code = static_cast<uint8_t>(random());
  }
  for (Bytes* scales : {&cache.key_scale, &cache.value_scale}) {
    scales->resize(units * c.slots * 4);
    for (int64_t i = 0; i < units * c.slots; ++i) {
      const int64_t row = i / c.slots / c.kv_heads, slot = i % c.slots;
      const bool seen = slot >= StartOf(c, row) && slot <= c.slot;
      float scale = 0.02f * (Uniform(random) + 1.0f);
      if (row == 3) scale *= 20;  // exponentials of everything but the largest vanish
      if (row == 4) scale *= 0x1p-110f;
      if (row == 6 && scales == &cache.value_scale && slot == c.slot / 3)
        scale = std::numeric_limits<float>::infinity();
      Put(*scales, i, seen ? scale : std::numeric_limits<float>::quiet_NaN());
    }
  }
  return cache;
}

// y, and the cache as it is afterwards.
Bytes RunAttend(const AttendCase& c, const Bytes& qkv, const Bytes& angles, Cache* cache, const Rung* rung,
                int threads) {
  std::vector<int32_t> start;
  for (int64_t row = 0; row < c.b; ++row) start.push_back(static_cast<int32_t>(StartOf(c, row)));
  const auto* turns = reinterpret_cast<const float*>(angles.data());
  Bytes y(c.b * c.heads * c.d * SizeOf(c.type));
  AttendProblem p{};
  p.rung = rung, p.type = c.type;
  p.b = c.b, p.heads = c.heads, p.kv_heads = c.kv_heads, p.d = c.d, p.slots = c.slots, p.slot = c.slot;
  p.qkv = qkv.data(), p.y = y.data(), p.start = start.data();
  if (c.turns) p.cosine = turns, p.sine = turns + c.b * c.d / 2;
  p.key_codes = reinterpret_cast<int8_t*>(cache->key_codes.data());
  p.value_codes = reinterpret_cast<int8_t*>(cache->value_codes.data());
  p.key_scale = reinterpret_cast<float*>(cache->key_scale.data());
  p.value_scale = reinterpret_cast<float*>(cache->value_scale.data());
  AttendJob job(p);
  RunOn(threads, job);
  UnifyNans(y, c.type);
  UnifyNans(cache->key_scale, Type::kF32);
  UnifyNans(cache->value_scale, Type::kF32);
  return y;
}

// Attention of every rung against the scalar one; adds to the checksum, and says which failed.
void CheckAttention(const std::vector<const Rung*>& rungs, std::vector<int>* failures, uint64_t* sum) {
  const AttendCase cases[] = {{1, 9, 3, 64, 32, 0, Type::kF32, true},       {1, 9, 3, 64, 544, 527, Type::kF32, true},
                              {7, 3, 1, 64, 288, 287, Type::kBF16, false},  {5, 8, 1, 128, 96, 95, Type::kF16, true},
                              {7, 8, 2, 128, 800, 511, Type::kF32, true},   {7, 2, 2, 64, 1056, 1040, Type::kF16, true},
                              {7, 16, 4, 128, 608, 600, Type::kBF16, true}, {7, 3, 3, 128, 352, 256, Type::kF32, false},
                              {6, 4, 1, 64, 160, 63, Type::kF32, true},     {7, 8, 1, 64, 608, 575, Type::kF32, true}};
  uint32_t seed = 0;
  for (const AttendCase& c : cases) {
    std::mt19937 random(++seed);
    const int64_t heads = c.heads + 2 * c.kv_heads, size = SizeOf(c.type);
    Bytes qkv(c.b * heads * c.d * size), angles(c.b * c.d * 4);
    for (int64_t i = 0; i < c.b * heads * c.d; ++i) {
      const int64_t row = i / (heads * c.d), head = i / c.d % heads;
      float value = 2 * Uniform(random) * (i % c.d == 5 ? 16 : 1);
      if (row == 1 && head == heads - 1) value *= 0x1p-130f;
      if (row == 2 && head == 0) value = 0;
      if (row == 5 && i % c.d == 7 && head % 3 == 0) value = std::numeric_limits<float>::quiet_NaN();
      if (row == 5 && i % c.d == 9 && head == heads - 1) value = -std::numeric_limits<float>::infinity();
      PutActivation(qkv, c.type, i, value);
    }
    for (int64_t i = 0; i < c.b * c.d; ++i) Put(angles, i, Uniform(random));
    const Cache before = MakeCache(c, random);
    Cache cache = before;
    const Bytes expected = RunAttend(c, qkv, angles, &cache, rungs.back(), 1);
    const Bytes* const parts[] = {&expected, &cache.key_codes, &cache.key_scale, &cache.value_codes,
                                  &cache.value_scale};
    for (const Bytes* part : parts) {
      *sum = Checksum(*sum, *part);
    }
    for (size_t r = 0; r < rungs.size(); ++r) {
      if (!rungs[r]->supported()) continue;
      Cache own = before;
      const Bytes y = RunAttend(c, qkv, angles, &own, rungs[r], 1 + static_cast<int>(seed % 3));
      if (y == expected && own.key_codes == cache.key_codes && own.key_scale == cache.key_scale &&
          own.value_codes == cache.value_codes && own.value_scale == cache.value_scale) {
        continue;
      }
      ++(*failures)[r];
      std::printf("%s differs: attention %ld of d %ld, slot %ld\n", rungs[r]->name, static_cast<long>(seed),
                  static_cast<long>(c.d), static_cast<long>(c.slot));
    }
  }
}

std::vector<Options> Rules() {
  std::vector<Options> rules(11);
  rules[1].rule = Rule::kThreshold, rules[1].value = 2;
  rules[2] = rules[1], rules[2].column_scope = true;
  rules[3].rule = Rule::kRelative, rules[3].value = 3;
  rules[4] = rules[3], rules[4].column_scope = true, rules[4].value = 4;
  rules[5].rule = Rule::kTopK, rules[5].topk = 8;
  rules[6] = rules[5], rules[6].topk = 100;
  rules[7] = rules[1], rules[7].value = 0;
  rules[8] = rules[5], rules[8].float_outliers = true;
  rules[9] = rules[5], rules[9].topk = 2;  // few high parts in long rows
  rules[10] = rules[5], rules[10].topk = 40, rules[10].column_scope = true;
  return rules;
}

// Whether a thread that leaves a processor is allowed the same ones as before, one or many.
bool LeavesAsAllowed() {
#if defined(__linux__)
  cpu_set_t before, after;
  bool same = true;
  const auto leave = [&] {
    same = same && sched_getaffinity(0, sizeof before, &before) == 0;
    Leave(CurrentProcessor());
    same = same && sched_getaffinity(0, sizeof after, &after) == 0 && CPU_EQUAL(&before, &after);
  };
  std::thread([&] {
    leave();
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(CurrentProcessor(), &one);
    same = same && sched_setaffinity(0, sizeof one, &one) == 0;
    leave();
  }).join();
  return same;
#else
  return true;
#endif
}

// Whether a helper that has worked takes on the next call, with the results of one thread.
bool HelpersStandBy() {
  const Case c{64, 1024, 640, Type::kF32, {}, true, true, Prologue::Kind::kNone};
  const Inputs in = Make(c, 1);
  const Rung* rung = FindRung(-1);
  Outputs expected = Run(c, in, rung, 1);
  Bytes y(c.m * c.n * 4);
  Problem p{};
  p.kind = Problem::Kind::kLinear;
  p.rung = rung;
  p.m = c.m, p.k = c.k, p.n = c.n;
  p.x = in.x.data();
  p.w = reinterpret_cast<const int8_t*>(in.w.data());
  p.w_scale = reinterpret_cast<const float*>(in.w_scale.data());
  p.bias = reinterpret_cast<const float*>(in.bias.data());
  p.residual = in.residual.data();
  p.y = y.data();
  Job job(p);
  Phased* const jobs[] = {&job};
  job.set_threads(2);
  const auto nothing = std::make_shared<Team>(nullptr, 0, 2), team = std::make_shared<Team>(jobs, 1, 2);
  bool taken = false;
  for (int attempt = 0; attempt < 1000 && !taken; ++attempt) {  // on a busy machine a helper's patience may end first
    std::atomic<bool> left{false};
    std::thread helper([&] {
      Standby::Get().Serve(nothing, 1);
      left = true;
    });
    while (!taken && !left) taken = Standby::Get().Offer(team, 1);
    if (taken) team->Work(0);
    helper.join();
  }
  UnifyNans(y, c.type);
  UnifyNans(expected.y, c.type);
  return taken && y == expected.y;
}

// Layers cut for so many threads that the last rows are few, which are multiplied another way but have high parts
// listed as the others have them; worked by one thread.
void CheckLastRows(const std::vector<const Rung*>& rungs, std::vector<int>* failures, uint64_t* sum) {
  constexpr int64_t kThreads = 128;
  Case c{12545, 8, 64, Type::kF32, {}, false, false, Prologue::Kind::kNone};
  c.options.rule = Rule::kTopK, c.options.topk = 2;
  const Inputs in = Make(c, 1);
  const auto run = [&](const Rung* rung) {
    Bytes y(c.m * c.n * 4);
    Problem p{};
    p.kind = Problem::Kind::kLinear;
    p.rung = rung;
    p.options = c.options;
    p.m = c.m, p.k = c.k, p.n = c.n;
    p.x = in.x.data();
    p.w = reinterpret_cast<const int8_t*>(in.w.data());
    p.w_scale = reinterpret_cast<const float*>(in.w_scale.data());
    p.y = y.data();
    Job job(p);
    Phased* const jobs[] = {&job};
    job.set_threads(kThreads);
    Team(jobs, 1, kThreads).Work(0);
    UnifyNans(y, c.type);
    return y;
  };
  const Bytes expected = run(rungs.back());
  *sum = Checksum(*sum, expected);
  for (size_t r = 0; r < rungs.size(); ++r) {
    if (!rungs[r]->supported() || run(rungs[r]) == expected) continue;
    ++(*failures)[r];
    std::printf("%s differs: the last rows of many\n", rungs[r]->name);
  }
}

// Whether nothing more is computed where an item has run out of memory: what it should have written is what a call
// before has left.
bool StopsWithoutMemory() {
  struct : Phased {
    const int8_t* WeightsOf(int64_t, int64_t* bytes) const override { return *bytes = 0, nullptr; }
    void Run(int phase, int64_t) override {
      if (phase < kLast) throw std::bad_alloc();
      went_on = true;
    }
    void Cut() { items_[1] = items_[kLast] = 1; }
    bool went_on = false;
  } job;
  job.Cut();
  return !RunJob(job, 1, [](auto) {}) && !job.went_on;
}

int Main() {
  const int64_t shapes[][3] = {
      {1, 1, 1},      {1, 3, 17},      {1, 576, 70},    {1, 1700, 66},  {1, 2240, 66},  {2, 499, 65},    {3, 130, 64},
      {4, 64, 16},    {6, 65, 15},     {7, 768, 72},    {8, 1027, 40},  {13, 300, 128}, {16, 2100, 66},  {17, 256, 130},
      {33, 1100, 64}, {64, 1088, 200}, {9, 5000, 77},   {12, 9000, 66}, {40, 769, 74},  {523, 70, 64},   {0, 5, 5},
      {5, 0, 5},      {5, 5, 0},       {1040, 129, 33}, {100, 0, 5},    {64, 576, 200}, {130, 768, 200}, {10, 1090, 72},
      {19, 1000, 66}, {5, 2111, 67},   {4, 4096, 24},   {9, 1536, 16},  {6, 8200, 19},  {5, 4100, 19},   {4, 10300, 18},
      {4, 2111, 67},  {6, 128, 24},    {12, 128, 66},   {18, 150, 90},  {13, 300, 600}, {38, 107, 576},  {23, 170, 530},
      {15, 75, 1090}, {20, 4104, 20},  {18, 4160, 64},  {9, 8320, 64}};
  const std::vector<const Rung*> rungs = AllRungs();
  const size_t count = rungs.size();
  const Rung* scalar = rungs.back();
  std::vector<int> failures(count, 0);
  uint64_t sum = 14695981039346656037u;
  uint32_t seed = 0;
  for (const auto& shape : shapes) {
    for (const Options& rule : Rules()) {
      const auto prologue = static_cast<Prologue::Kind>(seed % 5 % 3);
      Case c{shape[0], shape[1], shape[2], static_cast<Type>(seed % 3), rule, seed % 2 == 0, seed % 4 < 2, prologue};
      const Inputs in = Make(c, ++seed);
      Outputs expected = Run(c, in, scalar, 1);
      UnifyNans(expected.y, c.type);
      UnifyNans(expected.gated, c.type);
      UnifyNans(expected.rows, c.type);
      UnifyNans(expected.row_scale, Type::kF32);
      for (const Bytes* part : {&expected.y, &expected.gated, &expected.product, &expected.rows, &expected.lo,
                                &expected.hi, &expected.row_scale}) {
        sum = Checksum(sum, *part);
      }
      for (size_t r = 0; r < count; ++r) {
        if (!rungs[r]->supported()) continue;
        Outputs actual = Run(c, in, rungs[r], 1 + static_cast<int>(seed % 3));
        UnifyNans(actual.y, c.type);
        UnifyNans(actual.streamed, c.type);
        UnifyNans(actual.gated, c.type);
        UnifyNans(actual.rows, c.type);
        UnifyNans(actual.row_scale, Type::kF32);
        const bool same = actual.y == expected.y && actual.streamed == expected.y && actual.gated == expected.gated &&
                          actual.rows == expected.rows && actual.product == expected.product &&
                          actual.lo == expected.lo && actual.hi == expected.hi &&
                          actual.row_scale == expected.row_scale;
        if (same) continue;
        ++failures[r];
        std::printf("%s differs: m %ld k %ld n %ld type %d rule %d\n", rungs[r]->name, static_cast<long>(c.m),
                    static_cast<long>(c.k), static_cast<long>(c.n), static_cast<int>(c.type),
                    static_cast<int>(rule.rule));
      }
    }
  }
  CheckLastRows(rungs, &failures, &sum);
  CheckAttention(rungs, &failures, &sum);
  int failed = 0;
  const auto expect = [&failed](bool holds, const char* otherwise) {
    failed += !holds;
    if (!holds) std::printf("%s\n", otherwise);
  };
  expect(LeavesAsAllowed(), "leaving a processor changes what a thread is allowed");
  expect(HelpersStandBy(), "helpers that have worked are not given the next call, or fail in it");
  expect(StopsWithoutMemory(), "items are run behind one that has run out of memory");
  for (size_t r = 0; r < count; ++r) {
    const bool supported = rungs[r]->supported();
    std::printf("%-18s %s\n", rungs[r]->name, !supported ? "not supported here" : failures[r] ? "FAILED" : "ok");
    failed += failures[r];
  }
  std::printf("%u cases, checksum %016lx\n", seed, static_cast<unsigned long>(sum));
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace jaxint8::cpu

int main() { return jaxint8::cpu::Main(); }
