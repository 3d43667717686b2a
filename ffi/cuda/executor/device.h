// The functions of device.h and host.h for the block executor: same names, every access checked.
#ifndef JAXINT8_FFI_CUDA_EXECUTOR_DEVICE_H_
#define JAXINT8_FFI_CUDA_EXECUTOR_DEVICE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "block.h"

struct CUstream_st;

#define JAXINT8_DEVICE inline
#define JAXINT8_HOST_DEVICE

namespace jaxint8::cuda {

// A pointer that knows the range it may touch: [low, high) of a buffer, at offset.
template <typename T>
struct Ptr {
  Buffer* buffer = nullptr;
  int64_t low = 0, high = 0, offset = 0;

  Ptr() = default;
  Ptr(Buffer* b, int64_t l, int64_t h, int64_t o) : buffer(b), low(l), high(h), offset(o) {}
  template <typename U, typename = std::enable_if_t<std::is_same_v<const U, T> && !std::is_same_v<U, T>>>
  Ptr(const Ptr<U>& other)  // NOLINT: T* becomes const T*
      : buffer(other.buffer), low(other.low), high(other.high), offset(other.offset) {}

  Ptr operator+(int64_t n) const { return {buffer, low, high, offset + n * static_cast<int64_t>(sizeof(T))}; }
  explicit operator bool() const { return buffer != nullptr; }
};

template <typename T>
Ptr<T> Keep(Ptr<T> p) {
  return p;
}

template <typename U, typename T>
Ptr<U> Cast(Ptr<T> p) {
  return {p.buffer, p.low, p.high, p.offset};
}

inline int ThreadIndex() { return TheMachine().thread(); }
inline int BlockThreads() { return TheMachine().threads(); }
inline int64_t BlockIndex() { return TheMachine().block(); }
inline int64_t BlockCount() { return TheMachine().block_count(); }
inline Ptr<uint8_t> SharedMemory() {
  Buffer* shared = TheMachine().shared_buffer();
  return {shared, 0, shared->bytes, 0};
}

inline void Barrier(Site site = Site::Here()) { TheMachine().Barrier(site); }
inline void WarpBarrier(Site site = Site::Here()) { TheMachine().WarpBarrier(site); }
inline void PartBarrier(int number, int threads, Site site = Site::Here()) {
  TheMachine().PartBarrier(number, threads, site);
}

template <typename V, typename T>
V LoadAs(Ptr<T> p, Site site = Site::Here()) {
  V v;
  std::memcpy(static_cast<void*>(&v),
              TheMachine().Access(p.buffer, p.low, p.high, p.offset, sizeof(V), alignof(V), false, false, site),
              sizeof(V));
  return v;
}
template <typename T>
std::remove_const_t<T> Load(Ptr<T> p, Site site = Site::Here()) {
  return LoadAs<std::remove_const_t<T>>(p, site);
}
inline Word4 LoadStreaming(Ptr<const int8_t> p, Site site = Site::Here()) { return LoadAs<Word4>(p, site); }
template <typename V, typename T>
void StoreAs(Ptr<T> p, V value, Site site = Site::Here()) {
  static_assert(!std::is_const_v<T>);
  std::memcpy(TheMachine().Access(p.buffer, p.low, p.high, p.offset, sizeof(V), alignof(V), true, false, site), &value,
              sizeof(V));
}
template <typename T>
struct Identity {
  using Type = T;
};
template <typename T>
void Store(Ptr<T> p, typename Identity<T>::Type value, Site site = Site::Here()) {
  StoreAs<T>(p, value, site);
}

using SharedWords = Ptr<uint32_t>;
inline SharedWords KeepShared(Ptr<uint32_t> p) { return p; }
template <int kAt>
Word4 LoadShared(SharedWords words, Site site = Site::Here()) {
  return LoadAs<Word4>(words + kAt, site);
}
template <int kAt>
void StoreShared(SharedWords words, const Word4& v, Site site = Site::Here()) {
  StoreAs<Word4>(words + kAt, v, site);
}
template <typename Params>
void AskForParameters(const Params&) {}

inline uint32_t LoadRelaxed(Ptr<const uint32_t> p, Site site = Site::Here()) {
  uint32_t v;
  std::memcpy(&v, TheMachine().Access(p.buffer, p.low, p.high, p.offset, 4, 4, false, true, site), 4);
  return v;
}
template <typename Update>
uint32_t Atomic(Ptr<uint32_t> p, Site site, Update update) {
  uint8_t* at = TheMachine().Access(p.buffer, p.low, p.high, p.offset, 4, 4, false, true, site);
  TheMachine().Access(p.buffer, p.low, p.high, p.offset, 4, 4, true, true, site);
  uint32_t before;
  std::memcpy(&before, at, 4);
  const uint32_t after = update(before);
  std::memcpy(at, &after, 4);
  return before;
}
inline void AtomicOr(Ptr<uint32_t> p, uint32_t bits, Site site = Site::Here()) {
  Atomic(p, site, [=](uint32_t v) { return v | bits; });
}
inline uint32_t AtomicAdd(Ptr<uint32_t> p, uint32_t value, Site site = Site::Here()) {
  return Atomic(p, site, [=](uint32_t v) { return v + value; });
}

// A warp function on one word per lane.
template <typename Operation>
uint32_t Exchange(Site site, uint32_t v, Operation operation) {
  struct Argument {
    uint32_t in, out;
  } argument{v, 0};
  TheMachine().Collective(site, &argument, [&](void* const* all) {
    uint32_t in[32], out[32];
    for (int i = 0; i < 32; ++i) in[i] = static_cast<Argument*>(all[i])->in;
    operation(in, out);
    for (int i = 0; i < 32; ++i) static_cast<Argument*>(all[i])->out = out[i];
  });
  return argument.out;
}
template <typename Combine>
uint32_t Reduce(Site site, uint32_t v, Combine combine) {
  return Exchange(site, v, [&](const uint32_t* in, uint32_t* out) {
    uint32_t all = in[0];
    for (int i = 1; i < 32; ++i) all = combine(all, in[i]);
    for (int i = 0; i < 32; ++i) out[i] = all;
  });
}
inline uint32_t WarpMax(uint32_t v, Site site = Site::Here()) {
  return Reduce(site, v, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline uint32_t WarpSum(uint32_t v, Site site = Site::Here()) {
  return Reduce(site, v, [](uint32_t a, uint32_t b) { return a + b; });
}
inline uint32_t WarpOr(uint32_t v, Site site = Site::Here()) {
  return Reduce(site, v, [](uint32_t a, uint32_t b) { return a | b; });
}
inline bool SomeLane(bool v) { return v; }
// The source lane may differ from lane to lane, so it travels with the value.
inline uint32_t Shuffle(uint32_t v, int lane, Site site = Site::Here()) {
  struct Argument {
    uint32_t in;
    int from;
    uint32_t out;
  } argument{v, lane, 0};
  TheMachine().Collective(site, &argument, [](void* const* all) {
    for (int i = 0; i < 32; ++i) {
      auto* a = static_cast<Argument*>(all[i]);
      a->out = static_cast<Argument*>(all[a->from & 31])->in;
    }
  });
  return argument.out;
}
inline uint32_t ShuffleXor(uint32_t v, int lanes, Site site = Site::Here()) {
  return Shuffle(v, (ThreadIndex() % 32) ^ lanes, site);
}

// Until it is waited for, a copy leaves garbage where it will go, and its target counts as written.
inline void CopyAsync16(Ptr<uint8_t> shared, Ptr<const int8_t> global, bool valid, Site site = Site::Here()) {
  Machine& m = TheMachine();
  const uint8_t* from = nullptr;
  if (valid) from = m.Access(global.buffer, global.low, global.high, global.offset, 16, 16, false, false, site);
  uint8_t* to = m.Access(shared.buffer, shared.low, shared.high, shared.offset, 16, 16, true, false, site);
  std::memset(to, 0x5b, 16);
  m.open_copies().push_back({to, from});
}
inline void CopyAsyncCommit() {
  Machine& m = TheMachine();
  m.groups().push_back(std::move(m.open_copies()));
  m.open_copies().clear();
}
template <int kPending>
void CopyAsyncWait(Site site = Site::Here()) {
  Machine& m = TheMachine();
  if (m.Planted(site, Fault::kSkipWait)) {
    // As if one more group might be pending.
    if (m.groups().size() <= kPending + 1) return;
  }
  auto& groups = m.groups();
  const size_t keep = m.plant.fault == Fault::kSkipWait && site.Name() == m.plant.site ? kPending + 1 : kPending;
  while (groups.size() > keep) {
    for (const auto& copy : groups.front()) {
      if (copy.from) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

inline void LoadMatrix4(Ptr<uint8_t> row, uint32_t (&v)[4], Site site = Site::Here()) {
  Machine& m = TheMachine();
  struct Argument {
    const uint8_t* row;
    int64_t offset;
    uint32_t v[4];
  } argument{};
  argument.row = m.Access(row.buffer, row.low, row.high, row.offset, 16, 16, false, false, site);
  argument.offset = row.offset;
  m.Collective(site, &argument, [&](void* const* all) {
    for (int j = 0; j < 4; ++j) {
      int banks[8] = {};
      for (int r = 0; r < 8; ++r) {
        const int conflicts = ++banks[static_cast<Argument*>(all[8 * j + r])->offset / 16 % 8];
        if (conflicts > m.worst_bank_conflict) m.worst_bank_conflict = conflicts;
      }
      for (int lane = 0; lane < 32; ++lane) {
        const auto* source = static_cast<Argument*>(all[8 * j + lane / 4]);
        std::memcpy(&static_cast<Argument*>(all[lane])->v[j], source->row + 4 * (lane % 4), 4);
      }
    }
  });
  for (int j = 0; j < 4; ++j) v[j] = argument.v[j];
  if (m.Planted(site, Fault::kSwapFragment)) std::swap(v[1], v[2]);
}

inline void Mma(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                Site site = Site::Here()) {
  struct Argument {
    uint32_t a[4], b[2];
    int32_t* c;
  } argument{{a0, a1, a2, a3}, {b0, b1}, c};
  if (TheMachine().Planted(site, Fault::kSwapFragment)) std::swap(argument.a[1], argument.a[2]);
  TheMachine().Collective(site, &argument, [](void* const* all) {
    int8_t a[16][32], b[8][32];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* arg = static_cast<Argument*>(all[lane]);
      const int g = lane / 4, t = lane % 4;
      std::memcpy(&a[g][4 * t], &arg->a[0], 4);
      std::memcpy(&a[g + 8][4 * t], &arg->a[1], 4);
      std::memcpy(&a[g][16 + 4 * t], &arg->a[2], 4);
      std::memcpy(&a[g + 8][16 + 4 * t], &arg->a[3], 4);
      std::memcpy(&b[g][4 * t], &arg->b[0], 4);
      std::memcpy(&b[g][16 + 4 * t], &arg->b[1], 4);
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto* arg = static_cast<Argument*>(all[lane]);
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
        uint32_t sum = static_cast<uint32_t>(arg->c[e]);
        for (int i = 0; i < 32; ++i) sum += static_cast<uint32_t>(int32_t{a[row][i]} * b[column][i]);
        arg->c[e] = static_cast<int32_t>(sum);
      }
    }
  });
}

inline void WaitForPreviousKernel() {}
inline void AllowNextKernel() {}

inline float FloatFromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t Bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  if ((h & 0x7c00) == 0x7c00) return FloatFromBits(sign | rest | 0x7f800000);
  return FloatFromBits(sign | Bits(FloatFromBits(rest) * 0x1p112f));
}
// Rounds half to even: nearbyint in units of the result's last place.
inline uint16_t FloatToHalf(float x) {
  const auto sign = static_cast<uint16_t>(Bits(x) >> 16 & 0x8000);
  const float a = std::fabs(x);
  if (std::isnan(a)) return 0x7fff;
  if (a >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(a, &exponent);
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(a, -unit)), unit);
  return static_cast<uint16_t>(sign | Bits(rounded * 0x1p-112f) >> 13);
}
inline uint16_t FloatToBFloat(float x) {
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((Bits(x) + 0x7fff + (Bits(x) >> 16 & 1)) >> 16);
}
inline uint32_t FloatsToHalves(float a, float b) {
  return FloatToHalf(a) | static_cast<uint32_t>(FloatToHalf(b)) << 16;
}
inline uint32_t FloatsToBFloats(float a, float b) {
  return FloatToBFloat(a) | static_cast<uint32_t>(FloatToBFloat(b)) << 16;
}
inline float Reciprocal(float x) { return 1.0f / x; }
inline float PlainReciprocal(float x) { return 1.0f / x; }
inline float Divide(float x, float y) { return x / y; }
inline float PowerOfTwo(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float SquareRoot(float x) { return std::sqrt(x); }
inline float Multiply(float x, float y) { return x * y; }
inline float Add(float x, float y) { return x + y; }
inline float MultiplyAdd(float x, float y, float z) { return std::fma(x, y, z); }
inline float IntToFloat(int32_t v) { return static_cast<float>(v); }
inline float WideToFloat(int64_t v) { return static_cast<float>(v); }
inline int32_t RoundToInt(float x) { return static_cast<int32_t>(std::nearbyint(x)); }
inline float Smaller(float x, float y) { return std::fmin(x, y); }
inline float Larger(float x, float y) { return std::fmax(x, y); }
inline float Absolute(float x) { return std::fabs(x); }
inline uint32_t LargerHalves(uint32_t a, uint32_t b) {
  const uint32_t low = std::max(a & 0xffff, b & 0xffff), high = std::max(a >> 16, b >> 16);
  return low | high << 16;
}
inline uint32_t PackBytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const auto byte = [](uint32_t v) { return static_cast<uint32_t>(static_cast<uint8_t>(v)); };
  return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
}
template <uint32_t kSelector>
uint32_t Permute(uint32_t a, uint32_t b) {
  uint32_t v = 0;
  for (int j = 0; j < 4; ++j) {
    const uint32_t digit = kSelector >> 4 * j & 15;
    const auto byte = static_cast<uint32_t>((a | static_cast<uint64_t>(b) << 32) >> 8 * (digit & 7)) & 255;
    v |= (digit < 8 ? byte : byte >> 7 ? 255 : 0) << 8 * j;
  }
  return v;
}
inline int32_t DotBytes(uint32_t a, uint32_t b, int32_t c) {
  auto sum = static_cast<uint32_t>(c);
  for (int i = 0; i < 32; i += 8) {
    sum += static_cast<uint32_t>(int32_t{static_cast<int8_t>(a >> i)} * static_cast<int8_t>(b >> i));
  }
  return static_cast<int32_t>(sum);
}
inline int PopulationCount(uint32_t v) { return __builtin_popcount(v); }
inline int LowestBit(uint32_t v) { return __builtin_ctz(v); }

// The host side.
template <typename Kernel>
const char* Launch(CUstream_st*, int64_t blocks, int threads, int64_t shared, const typename Kernel::Params& params,
                   bool, int cluster = 1) {
  if (threads > Kernel::kMaxThreads) throw Failure("launch: more threads than the kernel allows");
  TheMachine().Launch(blocks, threads, shared, cluster, [&params] { Kernel::Run(params); });
  return nullptr;
}

// The range of a known buffer; kernels may touch this range only.
template <typename T>
Ptr<T> Memory(const void* p, int64_t bytes) {
  if (bytes == 0) return {};
  Buffer* buffer = TheMachine().Find(p);
  if (buffer == nullptr) throw Failure("pointer outside every buffer");
  const int64_t low = static_cast<const uint8_t*>(p) - buffer->data;
  if (low + bytes > buffer->bytes) throw Failure("range larger than its buffer");
  return {buffer, low, low + bytes, low};
}

inline const char* HasWgmma(bool* has) {
  *has = true;
  return nullptr;
}

inline const char* Multiprocessors(int64_t* count) {
  *count = TheMachine().multiprocessors;
  return nullptr;
}

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_EXECUTOR_DEVICE_H_
