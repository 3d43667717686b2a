// High parts of small products, and of arranged codes, are planned: which groups of four columns hold any in some of
// the rows that are multiplied together, so that their weights are gathered once for all of these (HiPlan).
#include <algorithm>
#include <cstring>

#include "int8.h"
#include "workspace.h"

namespace jaxint8::cpu {

// Plans the groups of four columns that for_each(take) gives, once or more.
template <class ForEach>
void HighPlan::UnionOfGroups(int64_t k, const ForEach& for_each) {
  const int64_t blocks = CeilDiv(k, 256);
  used.assign(blocks, 0);
  rank.resize(blocks);
  for_each([&](int32_t group) { used[group / 64] |= uint64_t{1} << (group % 64); });
  groups.clear();
  for (int64_t block = 0; block < blocks; ++block) {
    rank[block] = static_cast<int32_t>(groups.size());
    for (uint64_t left = used[block]; left; left &= left - 1) {
      groups.push_back(static_cast<int32_t>(block * 64 + __builtin_ctzll(left)));
    }
  }
  plan.groups = static_cast<int64_t>(groups.size());
  plan.group = groups.data();
  plan.needed = reinterpret_cast<const uint16_t*>(used.data());
}

// The number of a group among those of the plan.
int32_t HighPlan::SlotOf(int32_t group) const {
  const uint64_t before = used[group / 64] & ((uint64_t{1} << (group % 64)) - 1);
  return rank[group / 64] + __builtin_popcountll(before);
}

int64_t Workspace::RowTile::MarkSteps(const Row* first, int64_t m, int64_t k) {
  steps.assign(CeilDiv(k, 64), 0);
  for (int64_t i = 0; i < m; ++i) {
    for (int32_t j = 0; j < first[i].words; ++j) steps[first[i].hi[j].group / 16] = 1;
  }
  return std::count(steps.begin(), steps.end(), 1);
}

HighTiles Workspace::RowTile::ArrangeHigh(const Row* first, int64_t m) {
  constexpr int64_t kTileBytes = 1024;
  int32_t* const place = Scratch().index.Get<int32_t>(static_cast<int64_t>(steps.size()));
  int32_t count = 0;
  for (size_t step = 0; step < steps.size(); ++step) {
    if (steps[step] == 0) continue;
    place[step] = count;
    steps[count++] = static_cast<int32_t>(step);
  }
  int8_t* const data = high.Get<int8_t>(count * kTileBytes);
  std::memset(data, 0, static_cast<size_t>(count * kTileBytes));
  for (int64_t i = 0; i < m; ++i) {
    for (int32_t j = 0; j < first[i].words; ++j) {
      const HiWord word = first[i].hi[j];
      const int64_t tile = place[word.group / 16];
      std::memcpy(data + tile * kTileBytes + word.group % 16 * 64 + i * 4, &word.four, sizeof word.four);
    }
  }
  return {count, steps.data(), data};
}

// Plans every chunk whose last rows are among these, just quantised.
void Job::PlanHi(int64_t begin, int64_t end) {
  for (int64_t chunk = begin / chunk_m_; chunk * chunk_m_ < end; ++chunk) {
    const int64_t now = std::min(end, (chunk + 1) * chunk_m_) - std::max(begin, chunk * chunk_m_);
    if (ws_->planned[chunk].left.fetch_sub(now, std::memory_order_acq_rel) == now) PlanChunk(chunk);
  }
}

void Job::PlanChunk(int64_t chunk) {
  Workspace& ws = *ws_;
  HighPlan& planned = ws.planned[chunk];
  planned.plan = HiPlan{};
  if (p_.m == 1) {
    // Dense: an instruction more per 64 columns, and some at the end of a row. Else: some ten per group and four
    // outputs. Turned codes have groups of a plan, which cost less.
    const int64_t words = ws.rows[0].words, count = ws.rows[0].count;
    const bool few = turns_ ? words * 22 <= p_.k : count * 200 <= p_.k + 200;
    if (words <= HiPlan::kMaxGroups && few) {
      if (turns_) PlanTurned(&planned);
      return;
    }
    const int64_t width = RoundUp(p_.k, 64);
    int8_t* hi = planned.hi.Get<int8_t>(width);
    std::memset(hi, 0, static_cast<size_t>(width));
    for (int32_t j = 0; j < ws.rows[0].count; ++j) {
      const Outlier& outlier = ws.rows[0].outliers[j];
      hi[outlier.column] = static_cast<int8_t>(outlier.hi);
    }
    planned.plan.dense = true;
    planned.plan.hi = hi;
    return;
  }
  if (turns_ && PlanTurned(&planned)) return;
  const int64_t begin = chunk * chunk_m_, end = std::min(p_.m, begin + chunk_m_);
  const auto for_each = [&](auto take) {
    for (int64_t i = begin; i < end; ++i) {
      for (int32_t j = 0; j < ws.rows[i].words; ++j) take(ws.rows[i].hi[j].group);
    }
  };
  planned.UnionOfGroups(p_.k, for_each);
  if (arranged_ && PlanHighTiles(begin, end, &planned)) return;
  planned.slots.clear();
  for_each([&](int32_t group) { planned.slots.push_back(planned.SlotOf(group)); });
  planned.plan.slot = planned.slots.data();
}

// Of arranged codes of rows [begin, end); false where the weights of groups are better.
bool Job::PlanHighTiles(int64_t begin, int64_t end, HighPlan* planned) {
  // Of 64 outputs, nanoseconds (measured on a Xeon with AMX, 768 to 11008 columns): a group is moved in 5 to 15, the
  // more of them the faster, and a word of it multiplied in 1.5; 64 columns of a tile take 35.
  constexpr double kGroup = 8, kWord = 1.5, kStep = 35;
  int64_t words = 0, steps = 0;
  const auto tiles_of = [&](auto take) {
    for (int64_t i = begin; i < end; i += kArrangedRows) {
      take(ws_->row_tiles[i / kArrangedRows], ws_->rows.data() + i, std::min(kArrangedRows, end - i));
    }
  };
  tiles_of([&](Workspace::RowTile& tile, const Row* rows, int64_t m) {
    for (int64_t i = 0; i < m; ++i) words += rows[i].words;
    steps += tile.MarkSteps(rows, m, p_.k);
  });
  HiPlan& plan = planned->plan;
  const auto in_groups = kGroup * static_cast<double>(plan.groups) + kWord * static_cast<double>(words);
  if (plan.groups <= HiPlan::kMaxArranged && in_groups <= kStep * static_cast<double>(steps)) return false;
  planned->tiles.clear();
  tiles_of([&](Workspace::RowTile& tile, const Row* rows, int64_t m) {
    planned->tiles.push_back(tile.ArrangeHigh(rows, m));
  });
  plan.tiles = true;
  return true;
}

// Of rows that are all turned; false where products do better without a plan.
bool Job::PlanTurned(HighPlan* planned) {
  for (const FourRows& four : ws_->fours) {
    if (!four.turned) return false;
  }
  const auto for_each = [&](auto take) {
    for (const FourRows& four : ws_->fours) {
      auto* word = const_cast<HiWord*>(four.words);  // of a list of this job
      for (const HiWord* end = word + (four.moved + four.outliers) * kTurnedRows; word < end; ++word) {
        if (word->four != 0) take(word);
      }
    }
  };
  planned->UnionOfGroups(p_.k,
                         [&](auto take) { for_each([&](const HiWord* word) { take(GroupOfTurned(word->group)); }); });
  if (planned->plan.groups > HiPlan::kMaxTurned) return false;
  for_each([&](HiWord* word) { word->group = planned->SlotOf(GroupOfTurned(word->group)); });
  planned->plan.turned = true;
  return true;
}

}  // namespace jaxint8::cpu
