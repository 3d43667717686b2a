// Runs a token's attention to an int8 cache. Compiled as launch.cu is.
#include <cstdint>

#include "attend.h"
#include "host.h"
#include "quantize.h"

namespace jaxint8::cuda {

template <typename T>
struct Tag {
  using Kernel = T;
};

const char* RunAttention(const Attention& a, CUstream_st* stream) {
  if (a.d != 64 && a.d != 128) return "d: expected 64 or 128";
  if (a.queries < 1 || a.queries > kAttendQueries) return "queries: expected 1 to 8 for each key-value head";
  if (a.slots < 1 || a.slots % kAttendSlots != 0) return "slots: expected a multiple of 32";
  if (a.rows == 0 || a.kv_heads == 0) return nullptr;
  const int64_t heads = a.rows * a.kv_heads, vectors = heads * (a.queries + 2), cached = heads * a.slots;
  AttendParams p{};
  p.qkv = Memory<const uint8_t>(a.qkv, vectors * a.d * TypeBytes(a.type));
  if (a.cosine != nullptr) {
    p.cosine = Memory<const float>(a.cosine, 2 * a.rows * a.d);
    p.sine = Memory<const float>(a.sine, 2 * a.rows * a.d);
  }
  p.start = Memory<const int32_t>(a.start, 4 * a.rows);
  p.slot = Memory<const int32_t>(a.slot, 4);
  p.keys = Memory<int8_t>(a.keys, cached * a.d);
  p.key_scale = Memory<float>(a.key_scale, 4 * cached);
  p.values = Memory<int8_t>(a.values, cached * a.d);
  p.value_scale = Memory<float>(a.value_scale, 4 * cached);
  p.y = Memory<uint8_t>(a.y, heads * a.queries * a.d * TypeBytes(a.type));
  p.type = a.type;
  p.kv_heads = static_cast<int>(a.kv_heads);
  p.queries = static_cast<int>(a.queries);
  p.slots = static_cast<int>(a.slots);
  p.scale = 1.4426950408889634f * (a.d == 64 ? 0.125f : 0.08838834764831845f) / static_cast<float>(a.d);
  int64_t multiprocessors = 0;
  if (const char* error = Multiprocessors(&multiprocessors)) return error;
  bool hopper = false;
  if (const char* error = HasWgmma(&hopper)) return error;
  p.blocks = hopper ? ChooseAttendBlocks(a, multiprocessors) : 1;
  // Of more no cluster finds room beside the others.
  const bool few = 2 * heads * p.blocks <= multiprocessors;
  const int64_t apart = hopper && few ? SpreadBytes(heads * p.blocks, true, multiprocessors) : 0;
  const auto launch = [&](auto tag) {
    using Kernel = typename decltype(tag)::Kernel;
    const int64_t needed = Kernel::SharedBytes(p.queries, p.blocks), shared = apart > needed ? apart : needed;
    return Launch<Kernel>(stream, heads * p.blocks, Kernel::kMaxThreads, shared, p, true, p.blocks);
  };
#ifdef JAXINT8_HAS_WGMMA
  if (p.blocks > 1) return a.d == 64 ? launch(Tag<AttendKernel<64, true>>()) : launch(Tag<AttendKernel<128, true>>());
#endif
  return a.d == 64 ? launch(Tag<AttendKernel<64, false>>()) : launch(Tag<AttendKernel<128, false>>());
}

}  // namespace jaxint8::cuda
