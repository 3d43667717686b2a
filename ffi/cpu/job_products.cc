// The last phase of a job: one block of outputs after the other is multiplied, with what comes in and goes out.
//
// A rung knows one block; here is where it lies, whose high parts it has and what is asked for next.
#include <algorithm>
#include <cstring>
#include <vector>

#include "int8.h"
#include "workspace.h"

namespace jaxint8::cpu {

// Whether a lane begins at this item, or all of them end. In 32 bits, of which there are never more items: a division
// of 64 takes some processors longer than the rest of this file takes a block.
bool Job::BeginsLane(int64_t item) const {
  const auto items = static_cast<uint32_t>(items_[kLast]), threads = static_cast<uint32_t>(threads_);
  const uint32_t each = items / threads, in_longer = items % threads * (each + 1), at = static_cast<uint32_t>(item);
  if (at < in_longer) return at % (each + 1) == 0;
  return each == 0 || (at - in_longer) % each == 0;
}

// Of every four columns a bit that says whether one of the rows [begin, end), or of those quantised with them, has a
// high part there.
const uint64_t* Job::GroupsOf(int64_t begin, int64_t end) const {
  const int64_t words = CeilDiv(p_.k, 256);
  uint64_t* groups = Scratch().groups.Get<uint64_t>(words);
  std::fill_n(groups, words, uint64_t{0});
  for (int64_t item = begin / rows_per_item_; item * rows_per_item_ < end; ++item) {
    const uint64_t* own = ws_->lists[item].groups.data();
    for (int64_t word = 0; word < words; ++word) groups[word] |= own[word];
  }
  return groups;
}

Job::Place Job::PlaceOf(int64_t item) const {
  if (chunks_ == 1) return {0, item * kBlockN};
  // Arranged codes of one chunk are to stay in the second-level cache, and weights are read again for the next.
  const int64_t blocks = items_[kLast] / chunks_;
  if (arranged_) return {item / blocks * chunk_m_, item % blocks * kBlockN};
  return {item % chunks_ * chunk_m_, item / chunks_ * kBlockN};
}

// The product of an item, of the gate if there is one: all but its epilogue.
Block Job::BlockOf(int64_t item, const Place& at) const {
  const auto [i0, j0] = at;
  ThreadScratch& scratch = Scratch();
  Block b{};
  b.m = std::min(chunk_m_, p_.m - i0);
  b.n = std::min(kBlockN, p_.n - j0);
  if (b.m <= 0) return b;
  b.k = p_.k;
  b.stride = ws_->stride;
  b.lo = ws_->codes + i0 * ws_->stride;
  b.rows = ws_->rows.data() + i0;
  b.with_hi = p_.kind == Problem::Kind::kLinear && p_.options.rule != Rule::kNone && !p_.options.float_outliers;
  const HighPlan* const planned = plans_ ? &ws_->planned[i0 / chunk_m_] : nullptr;
  const HiPlan* const plan = planned ? &planned->plan : nullptr;
  if (arranged_) {
    b.plan = plan && !plan->tiles ? plan : nullptr;
    b.high = plan && plan->tiles ? planned->tiles.data() : nullptr;
  } else {
    b.plan = plan && (plan->turned || plan->groups <= HiPlan::kMaxGroups) ? plan : nullptr;
  }
  b.groups = quads_ ? GroupsOf(i0, i0 + b.m) : nullptr;
  if (turns_ && (!plan || plan->turned)) {
    b.fours = ws_->fours.data() + i0 / kTurnedRows;
    b.turned = ws_->turned_codes + i0 / kTurnedRows * TurnedLines(plans_) * ws_->stride;
    b.panel = scratch.panel.Get<uint8_t>(
        std::max(p_.rung->turned_n * RoundUp(p_.k, 64), b.plan ? b.plan->groups * kBlockN * 4 : 0));
  }
  b.arranged = arranged_;
  b.beside = beside_;
  b.w = p_.w + j0 * p_.k;
  b.job = id_;
  b.from = from_;
  const int64_t j_next = PlaceOf(item + 1).j;
  b.ahead = BeginsLane(item + 1) ? nullptr : p_.w + j_next * p_.k;
  b.ahead_n = std::min(kBlockN, p_.n - j_next);
  b.c = scratch.c.Get<int32_t>(b.m * kBlockN);
  b.scratch = scratch.rung.Get<uint8_t>(p_.rung->scratch_bytes);
  return b;
}

// What makes outputs of a block of sums; where to, is not said. Its first output is one of 2 * n behind a gate.
Epilogue Job::EpilogueOf(const Block& b, int64_t first_output) {
  Epilogue e{};
  e.type = p_.type;
  e.c = b.c;
  e.rows = b.rows;
  e.n = b.n;
  e.w_scale = p_.w_scale + first_output;
  e.extra = p_.options.float_outliers ? FloatOutliers(b, e.w_scale) : nullptr;
  e.bias = p_.bias ? p_.bias + first_output : nullptr;
  return e;
}

void Job::Multiply(int64_t item) {
  const Place place = PlaceOf(item);
  Block b = BlockOf(item, place);
  if (b.m <= 0) return;
  if (p_.gated) return MultiplyGated(b, place);
  const auto [i0, j0] = place;
  if (p_.kind == Problem::Kind::kLinear) {
    Epilogue e = EpilogueOf(b, j0);
    const int64_t at = (i0 * p_.n + j0) * SizeOf(p_.type);
    e.residual = p_.residual ? static_cast<const char*>(p_.residual) + at : nullptr;
    e.y = static_cast<char*>(p_.y) + at;
    e.stride = p_.n;
    b.epilogue = &e;
    return p_.rung->block(b);
  }
  b.epilogue = nullptr;
  p_.rung->block(b);
  for (int64_t i = 0; i < b.m; ++i) {
    auto* y = static_cast<int32_t*>(p_.y) + (i0 + i) * p_.n + j0;
    std::memcpy(y, b.c + i * kBlockN, static_cast<size_t>(b.n) * sizeof *y);
  }
}

// Both halves into a buffer in the second-level cache, row by row one behind the other, then the gate.
void Job::MultiplyGated(const Block& gate, const Place& place) {
  const auto [i0, j0] = place;
  const int64_t size = SizeOf(p_.type);
  char* halves = Scratch().halves.Get<char>(gate.m * 2 * gate.n * size);
  const auto half = [&](Block b, int64_t which) {
    b.w += which * p_.n * p_.k;
    Epilogue e = EpilogueOf(b, which * p_.n + j0);
    e.y = halves + which * b.n * size;
    e.stride = 2 * b.n;
    b.epilogue = &e;
    p_.rung->block(b);
  };
  Block first = gate;
  first.ahead = gate.w + p_.n * p_.k;
  first.ahead_n = gate.n;
  half(first, 0);
  half(gate, 1);
  for (int64_t i = 0; i < gate.m; ++i) {
    char* y = static_cast<char*>(p_.y) + ((i0 + i) * p_.n + j0) * size;
    p_.rung->enter({Prologue::Kind::kSiluGate}, p_.type, halves + i * 2 * gate.n * size, gate.n, y);
  }
}

// The outlier part of "float" arithmetic for a block: x[i][o] * (w_scale[j] * w[j][o]) summed over the outliers o of
// row i in ascending order, whatever the block, so that a row's bits depend on that row alone. A column of weights is
// gathered and dequantised once for all rows that need it.
const float* Job::FloatOutliers(const Block& b, const float* w_scale) {
  constexpr int32_t kColumns = 1024;  // of 256 bytes: a quarter of the L2 cache
  ThreadScratch& scratch = Scratch();
  float* extra = scratch.extra.Get<float>(b.m * kBlockN);
  std::fill_n(extra, b.m * kBlockN, 0.0f);
  float* gathered = scratch.gathered.Get<float>(kColumns * kBlockN);
  std::vector<int32_t>& slots = scratch.slots;  // column -> slot + 1, all 0 between calls
  if (static_cast<int64_t>(slots.size()) < b.k) slots.resize(b.k, 0);
  int32_t used[kColumns];
  int32_t count = 0;
  const auto forget = [&] {
    while (count > 0) slots[used[--count]] = 0;
  };
  for (int64_t i = 0; i < b.m; ++i) {
    float* sum = extra + i * kBlockN;
    for (int32_t o = 0; o < b.rows[i].count; ++o) {
      const Outlier& outlier = b.rows[i].outliers[o];
      if (slots[outlier.column] == 0) {
        if (count == kColumns) forget();
        used[count] = outlier.column;
        slots[outlier.column] = ++count;
        float* column = gathered + (count - 1) * kBlockN;
        for (int64_t j = 0; j < b.n; ++j) {
          column[j] = w_scale[j] * static_cast<float>(b.w[j * b.k + outlier.column]);
        }
        std::fill(column + b.n, column + kBlockN, 0.0f);
      }
      const float* column = gathered + (slots[outlier.column] - 1) * kBlockN;
      for (int64_t j = 0; j < kBlockN; ++j) sum[j] += outlier.value * column[j];
    }
  }
  forget();
  return extra;
}

}  // namespace jaxint8::cpu
