// Which weights are likely to be in a cache: those that were multiplied a short while ago.
//
// Weights from memory are best read as one stream, those in a cache in whatever order multiplies fastest. A size does
// not tell them apart: a decoder's layers may be small, but between two uses of one all others are read.
#ifndef JAXINT8_FFI_CPU_RECENT_H_
#define JAXINT8_FFI_CPU_RECENT_H_

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace jaxint8::cpu {

// What the second-level caches of so many threads are taken to hold of weights, where these are large.
inline constexpr int64_t kOwnCacheBytes = 2 << 20;

// And a third-level cache: most of 32 MB, or a quarter of a very large one, of which processors may be given a part (of
// 480 MB two cores had 150).
inline int64_t CacheBytes() {
  constexpr int64_t kLeast = 24 << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t bytes = std::max<int64_t>(kLeast, sysconf(_SC_LEVEL3_CACHE_SIZE) / 4);
  return bytes;
#else
  return kLeast;
#endif
}

// Says that these weights are multiplied now, and returns how many bytes of weights, these included, have been since
// they were last, or the largest number if they never were. A guess: threads that say so at once may undo each other's
// notes, and other weights may have been at this address.
inline int64_t BytesSince(const int8_t* weights, int64_t bytes) {
  struct Note {
    std::atomic<const int8_t*> weights{nullptr};
    std::atomic<int64_t> bytes{0};  // of all weights up to then
  };
  constexpr int kBits = 10;
  static Note notes[1 << kBits];
  static std::atomic<int64_t> total{0};
  const int64_t now = total.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  Note& note = notes[(reinterpret_cast<uintptr_t>(weights) >> 6) * 0x9e3779b97f4a7c15 >> (64 - kBits)];
  const bool known = note.weights.load(std::memory_order_relaxed) == weights;
  const int64_t since = now - note.bytes.load(std::memory_order_relaxed);
  note.weights.store(weights, std::memory_order_relaxed);
  note.bytes.store(now, std::memory_order_relaxed);
  return known ? since : INT64_MAX;
}

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_RECENT_H_
