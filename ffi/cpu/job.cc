// A computation cut into phases: what every rung shares. The items of a phase may run on any threads.
//
// Row quantisation and products meet in a Workspace, taken from a free list for the life of the job: buffers only grow,
// so a steady state allocates nothing. The surprising fact is the size of an item: a block of 64 outputs is tall
// enough (up to chunk_m rows) that packing its weights costs 64 / (16 * m) of the multiplications at worst.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "float_state.h"
#include "int8.h"
#include "recent.h"
#include "workspace.h"

namespace jaxint8::cpu {
namespace {

// Rows of a product are cut further while threads would be idle for more than this share of the time, but not into
// chunks of fewer rows than these, whose weights would be packed too often.
constexpr double kLeastIdle = 0.02;
constexpr int64_t kLeastChunk = 128;
// Quads take columns that are made ready once for each block, which pays from so many rows on.
constexpr int64_t kLeastQuadRows = 96;
static_assert(kLeastQuadRows > kSmallM);
constexpr int64_t kArrangedRows = 16;  // see Rung::arrange

// Of a row's columns the share of which turning may move words: in fours, where a word of high parts costs a third of
// the low products of its four columns, and in twos, where weights must be gathered for it. Rows of which the largest
// values are outliers move a tenth of their words in fours (of which this allows four tenths); uniform ones half.
constexpr int64_t kMovedShare = 10, kMovedShareTwos = 64;
// Of fewer outputs turning many rows takes longer than it saves.
constexpr int64_t kTurnedOutputs = 512;

// Adds to the lists what products need of the outliers of a row, of which few under column scope have a high part.
void ListOutliers(const RowScratch& scratch, bool float_outliers, bool quads, bool turns, Workspace::Lists* lists,
                  Row* row) {
  const int32_t all = row->count;
  if (all == 0) return;
  Outlier* const first = lists->outliers.Room(all);
  int32_t count = 0;
  if (float_outliers) {
    for (; count < all; ++count) first[count] = {scratch.index[count], 0, scratch.outliers[count]};
    return lists->outliers.Add(count);
  }
  for (int32_t j = 0; j < all; ++j) {
    const int32_t code = scratch.codes[j];
    if (std::abs(code) > 127) first[count++] = {scratch.index[j], (code + 64) >> 7, scratch.outliers[j]};
  }
  lists->outliers.Add(count);
  row->count = count;
  if (quads) {
    row->quads = lists->AddQuads(first, count);
  } else {
    row->words = lists->AddWords(first, count, turns);
  }
}

uint64_t NextId() {
  static std::atomic<uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

}  // namespace

uint32_t SelectLargest(uint32_t* magnitudes, int64_t n, int64_t count) {
  std::nth_element(magnitudes, magnitudes + (count - 1), magnitudes + n, std::greater<uint32_t>());
  return magnitudes[count - 1];
}

HighTiles Workspace::RowTile::ArrangeHigh(const Row* first, int64_t m, int64_t k) {
  constexpr int64_t kTileBytes = 1024;
  steps.assign(CeilDiv(k, 64), 0);
  for (int64_t i = 0; i < m; ++i) {
    for (int32_t j = 0; j < first[i].words; ++j) steps[first[i].hi[j].group / 16] = 1;
  }
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

Job::Job(const Problem& problem) : p_(problem), ws_(Acquire()), id_(NextId()) {
  const bool multiplies = p_.kind == Problem::Kind::kProduct || p_.kind == Problem::Kind::kLinear;
  const bool quantizes = p_.kind == Problem::Kind::kQuantize || p_.kind == Problem::Kind::kLinear;
  if (p_.m == 0 || (multiplies && p_.n == 0)) return;
  // One row has no neighbours to share columns with.
  if (p_.m == 1) p_.options.column_scope = false;
  // Rows quantised by one item: 4 Ki values, a microsecond, or a 64th of them all.
  rows_per_item_ = CeilDiv(p_.m, std::clamp<int64_t>(CeilDiv(p_.m * p_.k, 4096), 1, 64));
  turns_ = p_.kind == Problem::Kind::kLinear && p_.k > 0 && p_.rung->turn != nullptr &&
           (p_.m <= p_.rung->turned_m || p_.n >= kTurnedOutputs);
  if (turns_) rows_per_item_ = RoundUp(rows_per_item_, kTurnedRows);
  const int64_t row_items = CeilDiv(p_.m, rows_per_item_);
  const double values = static_cast<double>(p_.m) * static_cast<double>(p_.k);
  // What a prologue adds: a gate's exponentials and division, or a norm's passes.
  const double before = p_.prologue.kind == Prologue::Kind::kNone ? 0 : 0.5 * values;
  if (quantizes && p_.options.column_scope) {
    items_[0] = row_items;
    cost_[0] = values * 0.15 + before;
    if (before > 0) ws_->entered.Get<char>(p_.m * p_.k * SizeOf(p_.type));
    std::memset(ws_->marks.Get<uint8_t>(p_.k), 0, static_cast<size_t>(p_.k));
  }
  items_[1] = row_items;
  cost_[1] = values * (turns_ ? 0.7 : 0.25) + before;
  if (ws_->lists.size() < static_cast<size_t>(row_items)) ws_->lists.resize(row_items);
  if (!multiplies) return;

  ws_->rows.resize(p_.m);
  // One cache line more than needed: rows at a stride of 4096 would all fall into the same set of the L1 cache.
  ws_->stride = RoundUp(p_.k, 64) + 64;
  const bool high = quantizes && p_.options.rule != Rule::kNone && !p_.options.float_outliers;
  arranged_ = p_.rung->arrange != nullptr && p_.m >= p_.rung->arranged_m && p_.k > 0 &&
              (!high || p_.m <= p_.rung->arranged_high_m);
  const int64_t room = arranged_ ? RoundUp(p_.m, kArrangedRows) : p_.m;
  ws_->codes = HalfAPageFrom(p_.w, ws_->lo.Get<int8_t>(room * ws_->stride + kPage), p_.m);
  for (int64_t i = 0; arranged_ && i < p_.m; i += kArrangedRows) {
    if (static_cast<int64_t>(ws_->row_tiles.size()) == i / kArrangedRows) ws_->row_tiles.emplace_back();
    ws_->row_tiles[i / kArrangedRows].left = std::min(kArrangedRows, p_.m - i);
  }
  if (arranged_) ws_->high_tiles.assign(room / kArrangedRows, HighTiles{});
  if (turns_) {
    const int64_t fours = CeilDiv(p_.m, kTurnedRows), lines = fours * TurnedLines(p_.m <= p_.rung->turned_m);
    ws_->fours.assign(fours, FourRows{});
    ws_->turned_codes = HalfAPageFrom(p_.w, ws_->turned.Get<int8_t>(lines * ws_->stride + kPage), kTurnedLines);
  }
  plans_ = p_.rung->turn ? turns_ && p_.m <= p_.rung->turned_m : high && !arranged_ && p_.m <= kSmallM;
  items_[2] = plans_ && row_items > 1;
  quads_ = high && p_.m >= kLeastQuadRows && p_.k <= p_.rung->quads_k;
  // Both halves of a gate and its sums are to stay in the second-level cache, and so are arranged codes.
  set_chunks(CeilDiv(p_.m, p_.rung->chunk_m / (p_.gated ? 2 : 1) / (arranged_ ? 2 : 1)));
  // Weights at 15 bytes, products at 250 per nanosecond and thread.
  const int64_t bytes = p_.n * p_.k * (p_.gated ? 2 : 1);
  const bool guessed = p_.source == Problem::Source::kGuessed;
  from_memory_ = guessed ? ComeFromMemory(p_.w, bytes) : p_.source == Problem::Source::kMemory;
  const auto weights = static_cast<double>(bytes);
  cost_[3] = std::max(weights / 15, weights * static_cast<double>(p_.m) / 250);
}

Job::~Job() { Release(ws_); }

void Job::set_threads(int64_t threads) {
  threads_ = threads;
  if (chunks_ == 0) return;
  const int64_t blocks = items_[kPhases - 1] / chunks_, most = std::max(chunks_, p_.m / kLeastChunk);
  const auto idle = [&](int64_t chunks) {  // of the time of all threads
    const auto items = static_cast<double>(blocks * chunks);
    return 1 - items / static_cast<double>(CeilDiv(blocks * chunks, threads) * threads);
  };
  int64_t best = chunks_;
  for (int64_t chunks = chunks_; chunks <= most && idle(best) > kLeastIdle; ++chunks) {
    if (idle(chunks) < idle(best)) best = chunks;
  }
  set_chunks(best);
}

void Job::set_chunks(int64_t chunks) {
  chunk_m_ = CeilDiv(p_.m, chunks);
  if (arranged_) chunk_m_ = RoundUp(chunk_m_, kArrangedRows);
  if (turns_) chunk_m_ = RoundUp(chunk_m_, kTurnedRows);
  chunks_ = CeilDiv(p_.m, chunk_m_);
  items_[kPhases - 1] = CeilDiv(p_.n, kBlockN) * chunks_;
}

const int8_t* Job::WeightsOf(int64_t thread, int64_t* bytes) const {
  *bytes = 0;
  if (p_.m > kFetchM || items_[kPhases - 1] == 0) return nullptr;
  const int64_t begin = lane(thread) * kBlockN, end = std::min(p_.n, lane(thread + 1) * kBlockN);
  *bytes = std::min(kFetchBytes, std::max<int64_t>(0, end - begin) * p_.k);
  return p_.w + begin * p_.k;
}

void Job::Run(int phase, int64_t item) {
  const ScopedFloatState state;
  switch (phase) {
    case 0:
      return MarkColumns(item);
    case 1:
      if (p_.kind == Problem::Kind::kPrologue) return EnterRows(item);
      return p_.kind == Problem::Kind::kProduct ? CopyRows(item) : QuantizeRows(item);
    case 2:
      return PlanHi();
    default:
      return Multiply(item);
  }
}

// Row i as it is quantised. Behind a prologue it lies in a buffer of this thread, or, where columns are marked, in one
// of the job, written by the pass that marks them (keeps) and read by the next.
const void* Job::RowOf(int64_t i, bool keeps) {
  const int64_t bytes = p_.k * SizeOf(p_.type);
  const auto* x = static_cast<const char*>(p_.x);
  if (p_.prologue.kind == Prologue::Kind::kNone) return x + i * bytes;
  char* row = nullptr;
  if (p_.options.column_scope) {
    row = ws_->entered.Get<char>(0) + i * bytes;
    if (!keeps) return row;
  } else {
    row = Scratch().entered.Get<char>(bytes);
  }
  const int64_t wide = p_.prologue.kind == Prologue::Kind::kSiluGate ? 2 * bytes : bytes;
  p_.rung->enter(p_.prologue, p_.type, x + i * wide, p_.k, row);
  return row;
}

void Job::EnterRows(int64_t item) {
  const int64_t bytes = p_.k * SizeOf(p_.type);
  const int64_t wide = p_.prologue.kind == Prologue::Kind::kSiluGate ? 2 * bytes : bytes;
  const int64_t end = std::min(p_.m, (item + 1) * rows_per_item_);
  for (int64_t i = item * rows_per_item_; i < end; ++i) {
    const auto* x = static_cast<const char*>(p_.x) + i * wide;
    p_.rung->enter(p_.prologue, p_.type, x, p_.k, static_cast<char*>(p_.y) + i * bytes);
  }
}

void Job::MarkColumns(int64_t item) {
  const RowScratch scratch = Scratch().Rows(p_.k);
  const int64_t end = std::min(p_.m, (item + 1) * rows_per_item_);
  for (int64_t i = item * rows_per_item_; i < end; ++i) {
    p_.rung->mark(p_.options, p_.type, RowOf(i, true), p_.k, scratch, ws_->marks.Get<uint8_t>(p_.k));
  }
}

// The columns marked, listed once by each thread.
Columns Job::ListColumns() const {
  ThreadScratch& scratch = Scratch();
  int32_t* list = scratch.columns.Get<int32_t>(p_.k);
  uint64_t* mask = scratch.mask.Get<uint64_t>(CeilDiv(p_.k, 64));
  if (scratch.columns_job == id_) return {list, scratch.columns_count, mask};
  const uint8_t* marks = ws_->marks.Get<uint8_t>(p_.k);
  int64_t count = 0;
  for (int64_t t = 0; t < p_.k; t += 64) {
    const int64_t end = std::min(p_.k, t + 64);
    mask[t / 64] = 0;
    if (std::memchr(marks + t, 1, static_cast<size_t>(end - t)) == nullptr) continue;
    for (int64_t j = t; j < end; ++j) {
      if (marks[j] == 0) continue;
      list[count++] = static_cast<int32_t>(j);
      mask[t / 64] |= uint64_t{1} << (j - t);
    }
  }
  scratch.columns_job = id_;
  scratch.columns_count = count;
  return {list, count, mask};
}

void Job::QuantizeRows(int64_t item) {
  const RowScratch scratch = Scratch().Rows(p_.k);
  const bool rows_only = p_.kind == Problem::Kind::kQuantize;
  const Columns columns = p_.options.column_scope ? ListColumns() : Columns{};
  Workspace::Lists& lists = ws_->lists[item];
  lists.outliers.clear();
  lists.words.clear();
  lists.turned.clear();
  lists.quads.clear();
  if (quads_) lists.groups.assign(CeilDiv(p_.k, 256), 0);
  const int64_t begin = item * rows_per_item_, end = std::min(p_.m, begin + rows_per_item_);
  for (int64_t i = begin; i < end; ++i) {
    const void* x = RowOf(i, false);
    int8_t* lo = rows_only ? p_.lo + i * p_.k : ws_->codes + i * ws_->stride;
    const Row row = p_.rung->quantize(p_.options, p_.type, x, p_.k, columns, scratch, lo);
    if (rows_only) {
      p_.row_scale[i] = row.scale;
      int8_t* hi = p_.hi + i * p_.k;
      if (p_.k > 0) std::memset(hi, 0, static_cast<size_t>(p_.k));
      if (p_.options.float_outliers) continue;
      for (int32_t j = 0; j < row.count; ++j) {  // split as the law has it
        const int32_t column = scratch.index[j], code = scratch.codes[j], high = (code + 64) >> 7;
        hi[column] = static_cast<int8_t>(high);
        lo[column] = static_cast<int8_t>(code - high * 128);
      }
      continue;
    }
    std::memset(lo + p_.k, 0, static_cast<size_t>(ws_->stride - p_.k));
    ws_->rows[i] = row;
    ListOutliers(scratch, p_.options.float_outliers, quads_, turns_, &lists, &ws_->rows[i]);
  }
  if (rows_only) return;
  const Outlier* outlier = lists.outliers.data();  // set last: the lists move while they grow
  const HiWord* word = lists.words.data();
  const HiQuad* quad = lists.quads.data();
  for (int64_t i = begin; i < end; ++i) {
    Row& row = ws_->rows[i];
    row.outliers = outlier;
    row.hi = word;
    row.quad = quad;
    outlier += row.count;
    word += row.words;
    quad += row.quads;
  }
  if (turns_) TurnRows(item, begin, end);
  if (plans_ && items_[1] == 1) PlanHi();
  if (arranged_) Arrange(begin, end);
}

// Turns the codes of these rows, just quantised, and lists their high parts side by side.
void Job::TurnRows(int64_t item, int64_t begin, int64_t end) {
  List<HiWord>& list = ws_->lists[item].turned;
  const int64_t most = p_.k / (plans_ ? kMovedShareTwos : kMovedShare), lines = TurnedLines(plans_);
  HiWord* const moved = Scratch().moved.Get<HiWord>(kTurnedRows * most);
  for (int64_t first = begin; first < end; first += kTurnedRows) {
    const int64_t m = std::min(kTurnedRows, end - first);
    FourRows& four = ws_->fours[first / kTurnedRows];
    Row* const rows = ws_->rows.data() + first;
    int8_t* const turned = ws_->turned_codes + first / kTurnedRows * lines * ws_->stride;
    const int8_t* const codes = ws_->codes + first * ws_->stride;
    int32_t count[kTurnedRows] = {};
    four.turned = p_.rung->turn(codes, ws_->stride, m, p_.k, !plans_, most, turned, moved, count, rows);
    four.alone = !four.turned && plans_;
    for (int64_t i = 0; four.alone && i < m; ++i) {
      four.turned = p_.rung->turn(codes + i * ws_->stride, ws_->stride, 1, p_.k, false, most,
                                  turned + i * kTurnedLines * ws_->stride, moved + i * most, count + i, rows + i);
    }
    if (!four.turned) continue;
    four.moved = *std::max_element(count, count + m);
    for (int64_t i = 0; i < m; ++i) four.outliers = std::max(four.outliers, rows[i].words);
    const int32_t steps = four.moved + four.outliers;
    HiWord* const words = list.Room(steps * static_cast<int32_t>(kTurnedRows));
    std::fill_n(words, steps * kTurnedRows, HiWord{});
    for (int64_t i = 0; i < m; ++i) {
      HiWord* to = words + i;
      for (int32_t j = 0; j < count[i]; ++j, to += kTurnedRows) *to = moved[i * most + j];
      to = words + four.moved * kTurnedRows + i;
      for (int32_t j = 0; j < rows[i].words; ++j, to += kTurnedRows) {
        *to = {TurnedPlace(rows[i].hi[j].group), rows[i].hi[j].four};
      }
    }
    list.Add(steps * static_cast<int32_t>(kTurnedRows));
  }
  const HiWord* word = list.data();  // set last: the list moves while it grows
  for (int64_t first = begin; first < end; first += kTurnedRows) {
    FourRows& four = ws_->fours[first / kTurnedRows];
    four.words = word;
    word += (four.moved + four.outliers) * kTurnedRows;
  }
}

// Arranges the codes of every 16 rows whose last one is among these, just quantised.
void Job::Arrange(int64_t begin, int64_t end) {
  const auto bytes = static_cast<size_t>(ws_->stride * kArrangedRows);
  for (int64_t tile = begin / kArrangedRows; tile * kArrangedRows < end; ++tile) {
    const int64_t first = tile * kArrangedRows, m = std::min(kArrangedRows, p_.m - first);
    const int64_t now = std::min(end, first + m) - std::max(begin, first);
    if (ws_->row_tiles[tile].left.fetch_sub(now, std::memory_order_acq_rel) != now) continue;
    int8_t *const codes = ws_->codes + first * ws_->stride, *const rows = Scratch().rows.Get<int8_t>(bytes);
    std::memcpy(rows, codes, static_cast<size_t>(m * ws_->stride));
    std::memset(rows + m * ws_->stride, 0, static_cast<size_t>((kArrangedRows - m) * ws_->stride));
    p_.rung->arrange(rows, ws_->stride, RoundUp(p_.k, 64), codes);
    ws_->high_tiles[tile] = ws_->row_tiles[tile].ArrangeHigh(ws_->rows.data() + first, m, p_.k);
  }
}

void Job::CopyRows(int64_t item) {
  const int64_t begin = item * rows_per_item_, end = std::min(p_.m, begin + rows_per_item_);
  for (int64_t i = begin; i < end; ++i) {
    int8_t* lo = ws_->codes + i * ws_->stride;
    if (p_.k > 0) std::memcpy(lo, static_cast<const int8_t*>(p_.x) + i * p_.k, static_cast<size_t>(p_.k));
    std::memset(lo + p_.k, 0, static_cast<size_t>(ws_->stride - p_.k));
    Row row;
    for (int64_t j = 0; j < p_.k; ++j) row.sum += lo[j];
    ws_->rows[i] = row;
  }
  if (arranged_) Arrange(begin, end);
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
  ws.slots.clear();
  for_each([&](int32_t group) { ws.slots.push_back(SlotOf(group)); });
  ws.plan.slot = ws.slots.data();
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

// Whether a lane begins at this item, or all of them end.
bool Job::BeginsLane(int64_t item) const {
  const int64_t each = items_[3] / threads_, longer = items_[3] % threads_, in_longer = longer * (each + 1);
  if (item < in_longer) return item % (each + 1) == 0;
  return each == 0 || (item - in_longer) % each == 0;
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
  // Arranged codes of one chunk are to stay in the second-level cache, and weights are read again for the next.
  const int64_t blocks = items_[kPhases - 1] / chunks_;
  if (arranged_) return {item / blocks * chunk_m_, item % blocks * kBlockN};
  return {item % chunks_ * chunk_m_, item / chunks_ * kBlockN};
}

// The product of an item, of the gate if there is one: all but its epilogue.
Block Job::BlockOf(int64_t item) const {
  const auto [i0, j0] = PlaceOf(item);
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
  b.plan = plans_ && (ws_->plan.turned || ws_->plan.groups <= HiPlan::kMaxGroups) ? &ws_->plan : nullptr;
  b.groups = quads_ ? GroupsOf(i0, i0 + b.m) : nullptr;
  if (turns_ && (!plans_ || ws_->plan.turned)) {
    b.fours = ws_->fours.data() + i0 / kTurnedRows;
    b.turned = ws_->turned_codes + i0 / kTurnedRows * TurnedLines(plans_) * ws_->stride;
    b.panel = scratch.panel.Get<uint8_t>(
        std::max(p_.rung->turned_n * RoundUp(p_.k, 64), b.plan ? b.plan->groups * kBlockN * 4 : 0));
  }
  b.arranged = arranged_;
  b.high = arranged_ && b.with_hi ? ws_->high_tiles.data() + i0 / kArrangedRows : nullptr;
  b.w = p_.w + j0 * p_.k;
  b.job = id_;
  b.from_memory = from_memory_;
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
  Block b = BlockOf(item);
  if (b.m <= 0) return;
  if (p_.gated) return MultiplyGated(b, item);
  const auto [i0, j0] = PlaceOf(item);
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
void Job::MultiplyGated(const Block& gate, int64_t item) {
  const auto [i0, j0] = PlaceOf(item);
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
