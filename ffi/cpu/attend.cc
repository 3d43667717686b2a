// Attention to an int8 cache cut into phases: tokens enter, then chunks of slots, whose last of a head joins them.
#include "attend.h"

#include <algorithm>

#include "workspace.h"

namespace jaxint8::cpu {
namespace {

const void* Advance(const void* data, int64_t bytes) { return static_cast<const char*>(data) + bytes; }

}  // namespace

AttendJob::AttendJob(const AttendProblem& problem) : p_(problem), ws_(Acquire()), group_(p_.heads / p_.kv_heads) {
  p_.slot = std::clamp<int64_t>(p_.slot, 0, p_.slots - 1);  // as an update of a slice has it
  const int64_t units = p_.b * p_.kv_heads;
  first_ = ws_->first.Get<int64_t>(p_.b + 1);
  left_ = ws_->left.Get<int64_t>(units);
  int64_t items = 0, seen = 0;
  for (int64_t row = 0; row < p_.b; ++row) {
    first_[row] = items;
    items += ChunksOf(row) * p_.kv_heads;
    seen += p_.slot + 1 - StartOf(row);
    std::fill_n(left_ + row * p_.kv_heads, p_.kv_heads, ChunksOf(row));
  }
  first_[p_.b] = items;
  queries_ = ws_->queries.Get<Query>(units * group_);
  shares_ = ws_->shares.Get<ValueShare>(items * group_);
  items_[1] = units;
  cost_[1] = 100.0 * static_cast<double>(units * (group_ + 2));
  // Keys and values at 15 bytes per nanosecond, and what their products and exponentials take.
  const auto slots = static_cast<double>(seen * p_.kv_heads);
  items_[kLast] = items;
  cost_[kLast] = slots * static_cast<double>(2 * p_.d) / 15 + slots * static_cast<double>(group_ * p_.d) / 64;
}

int64_t AttendJob::StartOf(int64_t row) const { return std::clamp<int64_t>(p_.start[row], 0, p_.slot); }

int64_t AttendJob::ChunksOf(int64_t row) const { return p_.slot / kChunkSlots - StartOf(row) / kChunkSlots + 1; }

AttendJob::Place AttendJob::PlaceOf(int64_t item) const {
  const int64_t row = std::upper_bound(first_, first_ + p_.b, item) - first_ - 1;
  const int64_t chunks = ChunksOf(row), at = item - first_[row];
  return {row, row * p_.kv_heads + at / chunks, StartOf(row) / kChunkSlots + at % chunks};
}

const int8_t* AttendJob::WeightsOf(int64_t thread, int64_t* bytes) const {
  *bytes = 0;
  if (lane(thread) >= items_[kLast]) return nullptr;
  const Place place = PlaceOf(lane(thread));
  const int64_t begin = std::max(StartOf(place.row), place.chunk * kChunkSlots);
  *bytes = (std::min(p_.slot + 1, (place.chunk + 1) * kChunkSlots) - begin) * p_.d;
  return p_.key_codes + (place.unit * p_.slots + begin) * p_.d;
}

void AttendJob::Run(int phase, int64_t item) {
  if (phase == 1) return Enter(item);
  Attend(item);
}

void AttendJob::Enter(int64_t unit) {
  const int64_t row = unit / p_.kv_heads, kv_head = unit % p_.kv_heads, size = SizeOf(p_.type) * p_.d;
  const void* token = Advance(p_.qkv, row * (p_.heads + 2 * p_.kv_heads) * size);
  const int64_t at = unit * p_.slots + p_.slot;
  AttendToken t{};
  t.type = p_.type;
  t.d = p_.d;
  t.queries = Advance(token, kv_head * group_ * size);
  t.heads = group_;
  t.key = Advance(token, (p_.heads + kv_head) * size);
  t.value = Advance(token, (p_.heads + p_.kv_heads + kv_head) * size);
  if (p_.cosine != nullptr) {
    t.cosine = p_.cosine + row * p_.d / 2;
    t.sine = p_.sine + row * p_.d / 2;
  }
  t.to = queries_ + unit * group_;
  t.key_codes = p_.key_codes + at * p_.d;
  t.key_scale = p_.key_scale + at;
  t.value_codes = p_.value_codes + unit * p_.d * p_.slots + p_.slot;
  t.stride = p_.slots;
  t.value_scale = p_.value_scale + at;
  p_.rung->attend->enter(t);
}

void AttendJob::Attend(int64_t item) {
  const auto [row, unit, chunk] = PlaceOf(item);
  const int64_t first = chunk * kChunkSlots, at = unit * p_.slots + first;
  AttendChunk c{};
  c.d = p_.d;
  c.queries = queries_ + unit * group_;
  c.heads = group_;
  c.keys = p_.key_codes + at * p_.d;
  c.key_scale = p_.key_scale + at;
  c.values = p_.value_codes + unit * p_.d * p_.slots + first;
  c.value_scale = p_.value_scale + at;
  c.stride = p_.slots;
  c.count = std::min(kChunkSlots, p_.slots - first);
  c.begin = std::max<int64_t>(0, StartOf(row) - first);
  c.end = std::min(kChunkSlots, p_.slot + 1 - first);
  c.shares = shares_ + item * group_;
  p_.rung->attend->chunk(c);
  if (__atomic_sub_fetch(left_ + unit, 1, __ATOMIC_ACQ_REL) == 0) Join(row, unit);
}

void AttendJob::Join(int64_t row, int64_t unit) {
  const int64_t chunks = ChunksOf(row), item = first_[row] + unit % p_.kv_heads * chunks;
  void* y = static_cast<char*>(p_.y) + unit * group_ * p_.d * SizeOf(p_.type);
  p_.rung->attend->join(shares_ + item * group_, chunks, group_, p_.d, p_.type, y);
}

}  // namespace jaxint8::cpu
