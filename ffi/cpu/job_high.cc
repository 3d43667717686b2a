// The phase of a job that plans the high parts of a small product: which groups of four columns hold any in some row,
// so that their weights are gathered once for all rows (HiPlan).
#include <algorithm>
#include <cstring>

#include "int8.h"
#include "workspace.h"

namespace jaxint8::cpu {

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

void Job::PlanHi() {
  Workspace& ws = *ws_;
  ws.plan = HiPlan{};
  if (p_.m == 1) {
    // Dense: an instruction more per 64 columns, and some at the end of a row. Else: some ten per group and four
    // outputs. Turned codes have groups of a plan, which cost less.
    const int64_t words = ws.rows[0].words, count = ws.rows[0].count;
    const bool few = turns_ ? words * 22 <= p_.k : count * 200 <= p_.k + 200;
    if (words <= HiPlan::kMaxGroups && few) {
      if (turns_) PlanTurned();
      return;
    }
    const int64_t width = RoundUp(p_.k, 64);
    int8_t* hi = ws.hi.Get<int8_t>(width);
    std::memset(hi, 0, static_cast<size_t>(width));
    for (int32_t j = 0; j < ws.rows[0].count; ++j) {
      const Outlier& outlier = ws.rows[0].outliers[j];
      hi[outlier.column] = static_cast<int8_t>(outlier.hi);
    }
    ws.plan.dense = true;
    ws.plan.hi = hi;
    return;
  }
  if (turns_ && PlanTurned()) return;
  const auto for_each = [&](auto take) {
    for (int64_t i = 0; i < p_.m; ++i) {
      for (int32_t j = 0; j < ws.rows[i].words; ++j) take(ws.rows[i].hi[j].group);
    }
  };
  UnionOfGroups(for_each);
  if (arranged_ && PlanHighTiles()) return;
  ws.slots.clear();
  for_each([&](int32_t group) { ws.slots.push_back(SlotOf(group)); });
  ws.plan.slot = ws.slots.data();
}

// Of arranged codes; false where the weights of groups are better.
bool Job::PlanHighTiles() {
  Workspace& ws = *ws_;
  // Of 64 outputs, nanoseconds (measured on an Emerald Rapids, 768 to 11008 columns): a group is gathered in 11 to 25,
  // the more of them the faster, and a word of it multiplied in 1.5; 64 columns of a tile take 35.
  constexpr double kGroup = 15, kWord = 1.5, kStep = 35;
  int64_t words = 0, steps = 0;
  const auto tiles_of = [&](auto take) {
    for (int64_t i = 0; i < p_.m; i += kArrangedRows) {
      take(ws.row_tiles[i / kArrangedRows], ws.rows.data() + i, std::min(kArrangedRows, p_.m - i));
    }
  };
  tiles_of([&](Workspace::RowTile& tile, const Row* rows, int64_t m) {
    for (int64_t i = 0; i < m; ++i) words += rows[i].words;
    steps += tile.MarkSteps(rows, m, p_.k);
  });
  const auto in_groups = kGroup * static_cast<double>(ws.plan.groups) + kWord * static_cast<double>(words);
  if (ws.plan.groups <= HiPlan::kMaxArranged && in_groups <= kStep * static_cast<double>(steps)) return false;
  ws.high_tiles.clear();
  tiles_of([&](Workspace::RowTile& tile, const Row* rows, int64_t m) {
    ws.high_tiles.push_back(tile.ArrangeHigh(rows, m));
  });
  ws.plan.tiles = true;
  return true;
}

// Of rows that are all turned; false where products do better without a plan.
bool Job::PlanTurned() {
  Workspace& ws = *ws_;
  for (const FourRows& four : ws.fours) {
    if (!four.turned) return false;
  }
  const auto for_each = [&](auto take) {
    for (const FourRows& four : ws.fours) {
      auto* word = const_cast<HiWord*>(four.words);  // of a list of this job
      for (const HiWord* end = word + (four.moved + four.outliers) * kTurnedRows; word < end; ++word) {
        if (word->four != 0) take(word);
      }
    }
  };
  UnionOfGroups([&](auto take) { for_each([&](const HiWord* word) { take(GroupOfTurned(word->group)); }); });
  if (ws.plan.groups > HiPlan::kMaxTurned) return false;
  for_each([&](HiWord* word) { word->group = SlotOf(GroupOfTurned(word->group)); });
  ws.plan.turned = true;
  return true;
}

// Plans the groups of four columns that for_each(take) gives, once or more.
template <class ForEach>
void Job::UnionOfGroups(const ForEach& for_each) {
  Workspace& ws = *ws_;
  const int64_t blocks = CeilDiv(p_.k, 256);
  ws.used.assign(blocks, 0);
  ws.rank.resize(blocks);
  for_each([&](int32_t group) { ws.used[group / 64] |= uint64_t{1} << (group % 64); });
  ws.groups.clear();
  for (int64_t block = 0; block < blocks; ++block) {
    ws.rank[block] = static_cast<int32_t>(ws.groups.size());
    for (uint64_t left = ws.used[block]; left; left &= left - 1) {
      ws.groups.push_back(static_cast<int32_t>(block * 64 + __builtin_ctzll(left)));
    }
  }
  ws.plan.groups = static_cast<int64_t>(ws.groups.size());
  ws.plan.group = ws.groups.data();
  ws.plan.needed = reinterpret_cast<const uint16_t*>(ws.used.data());
}

// The number of a group among those of the plan.
int32_t Job::SlotOf(int32_t group) const {
  const uint64_t before = ws_->used[group / 64] & ((uint64_t{1} << (group % 64)) - 1);
  return ws_->rank[group / 64] + __builtin_popcountll(before);
}

}  // namespace jaxint8::cpu
