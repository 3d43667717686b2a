// A computation cut into phases: what every rung shares. The items of a phase may run on any threads.
//
// Here a job is planned: which phases it has, in how many items, and how rows meet weights. What an item does is in
// job_rows.cc (marking columns, quantising), job_high.cc (planning high parts) and job_products.cc. They meet in a
// Workspace, taken from a free list for the life of the job: buffers only grow, so a steady state allocates nothing.
// The surprising fact is the size of an item: a block of 64 outputs is tall enough (up to chunk_m rows) that packing
// its weights costs 64 / (16 * m) of the multiplications at worst.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

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
// Of fewer outputs turning many rows takes longer than it saves.
constexpr int64_t kTurnedOutputs = 512;

uint64_t NextId() {
  static std::atomic<uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

}  // namespace

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
  const int64_t bytes = p_.n * p_.k * (p_.gated ? 2 : 1);
  const bool guessed = p_.source == Problem::Source::kGuessed;
  const int64_t since = guessed ? BytesSince(p_.w, bytes) : p_.source == Problem::Source::kMemory ? INT64_MAX : bytes;
  static const int64_t caches = std::max(1u, std::thread::hardware_concurrency());  // a call of the system
  const bool near = since / kOwnCacheBytes < caches;
  from_ = since > CacheBytes() ? From::kMemory : near ? From::kOwnCache : From::kCache;
  arranged_ = p_.rung->arranges != nullptr && p_.k > 0 && p_.rung->arranges(p_.m, p_.k, from_);
  const int64_t room = arranged_ ? RoundUp(p_.m, kArrangedRows) : p_.m;
  ws_->codes = HalfAPageFrom(p_.w, ws_->lo.Get<int8_t>(room * ws_->stride + kPage), p_.m);
  for (int64_t i = 0; arranged_ && i < p_.m; i += kArrangedRows) {
    if (static_cast<int64_t>(ws_->row_tiles.size()) == i / kArrangedRows) ws_->row_tiles.emplace_back();
    ws_->row_tiles[i / kArrangedRows].left = std::min(kArrangedRows, p_.m - i);
  }
  if (turns_) {
    const int64_t fours = CeilDiv(p_.m, kTurnedRows), lines = fours * TurnedLines(p_.m <= p_.rung->turned_m);
    ws_->fours.assign(fours, FourRows{});
    ws_->turned_codes = HalfAPageFrom(p_.w, ws_->turned.Get<int8_t>(lines * ws_->stride + kPage), kTurnedLines);
  }
  beside_ = arranged_ && high && p_.m <= kArrangedRows / 2;
  plans_ = p_.rung->turn ? turns_ && p_.m <= p_.rung->turned_m : high && !beside_ && (arranged_ || p_.m <= kSmallM);
  quads_ = high && p_.m >= kLeastQuadRows && p_.k <= p_.rung->quads_k;
  // Both halves of a gate and its sums are to stay in the second-level cache.
  int64_t most = p_.rung->chunk_m / (p_.gated ? 2 : 1);
  if (arranged_) most = std::clamp(p_.rung->arranged_bytes / p_.k, std::min(kLeastChunk, most), most);
  set_chunks(CeilDiv(p_.m, most));
  // Weights at 15 bytes, products at 250 per nanosecond and thread.
  const auto weights = static_cast<double>(bytes);
  cost_[kLast] = std::max(weights / 15, weights * static_cast<double>(p_.m) / 250);
}

void GiveBack::operator()(Workspace* workspace) const {
  std::unique_ptr<Workspace> owned(workspace);
  if (owned->bytes() > kKeepBytes) return;
  std::lock_guard<std::mutex> lock(Free().mutex);
  try {
    Free().list.push_back(std::move(owned));
  } catch (const std::bad_alloc&) {  // then it is freed
  }
}

void Job::set_threads(int64_t threads) {
  threads_ = threads;
  if (chunks_ == 0) return;
  const int64_t blocks = items_[kLast] / chunks_, most = std::max(chunks_, p_.m / kLeastChunk);
  const auto idle = [&](int64_t chunks) {  // of the time of all threads
    const int64_t items = blocks * CeilDiv(p_.m, RowsOfChunk(chunks));
    return 1 - static_cast<double>(items) / static_cast<double>(CeilDiv(items, threads) * threads);
  };
  int64_t best = chunks_;
  for (int64_t chunks = chunks_; chunks <= most && idle(best) > kLeastIdle; ++chunks) {
    if (idle(chunks) < idle(best)) best = chunks;
  }
  set_chunks(best);
}

// Of so many chunks, or fewer.
int64_t Job::RowsOfChunk(int64_t chunks) const {
  const int64_t rows = CeilDiv(p_.m, chunks);
  return arranged_ ? RoundUp(rows, kArrangedRows) : turns_ ? RoundUp(rows, kTurnedRows) : rows;
}

void Job::set_chunks(int64_t chunks) {
  chunk_m_ = RowsOfChunk(chunks);
  chunks_ = CeilDiv(p_.m, chunk_m_);
  items_[kLast] = CeilDiv(p_.n, kBlockN) * chunks_;
  if (!plans_) return;
  // Whoever quantises the last row of a chunk plans its high parts.
  for (int64_t i = 0; i < chunks_; ++i) {
    if (static_cast<int64_t>(ws_->planned.size()) == i) ws_->planned.emplace_back();
    ws_->planned[i].left = std::min(chunk_m_, p_.m - i * chunk_m_);
  }
}

const int8_t* Job::WeightsOf(int64_t thread, int64_t* bytes) const {
  *bytes = 0;
  if (p_.m > kFetchM || items_[kLast] == 0) return nullptr;
  const int64_t begin = lane(thread) * kBlockN, end = std::min(p_.n, lane(thread + 1) * kBlockN);
  *bytes = std::min(kFetchBytes, std::max<int64_t>(0, end - begin) * p_.k);
  return p_.w + begin * p_.k;
}

void Job::Begin(int phase) {
  if (phase == kLast && arranged_) p_.rung->begin_blocks();
}

void Job::End(int phase) {
  if (phase == kLast && arranged_) p_.rung->end_blocks();
}

void Job::Run(int phase, int64_t item) {
  switch (phase) {
    case 0:
      return MarkColumns(item);
    case 1:
      if (p_.kind == Problem::Kind::kPrologue) return EnterRows(item);
      return p_.kind == Problem::Kind::kProduct ? CopyRows(item) : QuantizeRows(item);
    default:
      return Multiply(item);
  }
}

}  // namespace jaxint8::cpu
