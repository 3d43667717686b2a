// The phases of a job that take rows of activations: columns are marked, then rows are quantised (or copied, or only
// entered), and what products need of them is listed.
//
// The surprising fact is that neither arranging codes nor planning high parts takes a phase: whichever item quantises
// the last of 16 rows, or of those that are planned together, does it.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "int8.h"
#include "workspace.h"

namespace jaxint8::cpu {
namespace {

// Of a row's columns the share of which turning may move words: in fours, where a word of high parts costs a third of
// the low products of its four columns, and in twos, where weights must be gathered for it. Rows of which the largest
// values are outliers move a tenth of their words in fours (of which this allows four tenths); uniform ones half.
constexpr int64_t kMovedShare = 10, kMovedShareTwos = 64;

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

}  // namespace

uint32_t SelectLargest(uint32_t* magnitudes, int64_t n, int64_t count) {
  std::nth_element(magnitudes, magnitudes + (count - 1), magnitudes + n, std::greater<uint32_t>());
  return magnitudes[count - 1];
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
  if (plans_) PlanHi(begin, end);
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
    for (int64_t i = 0; beside_ && i < m; ++i) {
      int8_t* const high = rows + (kArrangedRows / 2 + i) * ws_->stride;
      const Row& row = ws_->rows[i];
      for (int32_t j = 0; j < row.words; ++j) std::memcpy(high + row.hi[j].group * 4, &row.hi[j].four, 4);
    }
    p_.rung->arrange(rows, ws_->stride, RoundUp(p_.k, 64), codes);
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

}  // namespace jaxint8::cpu
