// What a Job works in: buffers of a call, taken from a free list, and those of a thread.
//
// They only grow, so a steady state allocates nothing.
#ifndef JAXINT8_FFI_CPU_WORKSPACE_H_
#define JAXINT8_FFI_CPU_WORKSPACE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "int8.h"

namespace jaxint8::cpu {

inline constexpr int64_t kAlign = 64;
// Workspaces above this are given back to the system after use.
inline constexpr size_t kKeepBytes = size_t{64} << 20;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Aligned memory that only grows; its content does not survive growth.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  template <typename T>
  T* Get(int64_t count) {
    const size_t bytes = RoundUp(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), kAlign);
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(kAlign, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      std::memset(data_, 0, bytes);  // touched here, once, rather than page by page in the middle of the work
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Where m rows of codes, a line further from row to row, lie in a buffer that has a page more than they take: half a
// page away from the weights of the same columns. Rows of 4096 weights all fall into one set of the L1 cache, column by
// column, and eight of them at once with as many codes of the same set are more than it holds (4096 x 4096, Zen 5: a
// twentieth of the time).
inline constexpr int64_t kPage = 4096;
inline int8_t* HalfAPageFrom(const int8_t* w, int8_t* buffer, int64_t m) {
  const auto wanted =
      reinterpret_cast<uintptr_t>(w) + kPage / 2 - static_cast<uintptr_t>(m) * 32;  // for rows in the middle
  return buffer + (wanted - reinterpret_cast<uintptr_t>(buffer)) % kPage / 64 * 64;
}

// Buffers of one thread; used within one item, never across.
struct ThreadScratch {
  Buffer values, index, codes, outliers, magnitude, columns, mask, entered;
  Buffer rung, c, extra, gathered, halves, groups, rows, moved, panel;
  std::vector<int32_t> slots;
  uint64_t columns_job = 0;  // whose columns and mask these are
  int64_t columns_count = 0;

  RowScratch Rows(int64_t k) {
    k = RoundUp(k, 64);
    return {values.Get<float>(k), index.Get<int32_t>(k), codes.Get<int32_t>(k), outliers.Get<float>(k),
            magnitude.Get<uint32_t>(k)};
  }
};

inline ThreadScratch& Scratch() {
  thread_local ThreadScratch scratch;
  return scratch;
}

// A list that is added to in stretches: how long one will be at most is known, so that room is asked for once.
template <typename T>
class List {
 public:
  void clear() { size_ = 0; }
  const T* data() const { return all_.data(); }
  size_t bytes() const { return all_.capacity() * sizeof(T); }

  // Room for so many more elements behind the last, which hold anything.
  T* Room(int32_t count) {
    if (all_.size() < size_ + static_cast<size_t>(count)) all_.resize(2 * size_ + static_cast<size_t>(count));
    return all_.data() + size_;
  }
  // So many of them are elements now.
  void Add(int32_t count) { size_ += static_cast<size_t>(count); }

 private:
  std::vector<T> all_;
  size_t size_ = 0;
};

// A HiPlan and what it points to.
struct HighPlan {
  HiPlan plan;
  Buffer hi;
  std::vector<uint64_t> used;
  std::vector<int32_t> rank, groups, slots;
  std::vector<HighTiles> tiles;  // if plan.tiles
  std::atomic<int64_t> left{0};  // rows that are not quantised yet

  template <class ForEach>
  void UnionOfGroups(int64_t k, const ForEach& for_each);
  int32_t SlotOf(int32_t group) const;
};

struct Workspace {
  Buffer lo, turned, marks, entered;
  std::vector<Row> rows;
  // Per item of the quantising phase: the outliers of its rows, one after the other.
  struct Lists {
    List<Outlier> outliers;
    List<HiWord> words, turned;
    List<HiQuad> quads;
    std::vector<uint64_t> groups;  // with quads: of every four columns a bit, whether there is any

    // Each takes the high parts of one row and returns how many elements they are. If codes are turned, of columns 2t
    // and 2t + 1 those of one word add up to no less than -128 and no more than 128.
    int32_t AddWords(const Outlier* high, int32_t count, bool turns) {
      HiWord* const first = words.Room(count);
      int32_t number = 0;
      for (int32_t j = 0; j < count; ++j) {
        const int32_t column = high[j].column;
        const bool apart = turns && column % 2 == 1 && j > 0 && high[j - 1].column == column - 1 &&
                           std::abs(high[j - 1].hi + high[j].hi) > 128;
        if (number == 0 || first[number - 1].group != column / 4 || apart) first[number++] = {column / 4, 0};
        first[number - 1].four |= static_cast<uint32_t>(high[j].hi & 0xff) << (column % 4 * 8);
      }
      words.Add(number);
      return number;
    }

    int32_t AddQuads(const Outlier* high, int32_t count) {
      const int32_t number = (count + 3) / 4;
      HiQuad* const first = quads.Room(number);
      for (int32_t j = 0; j < count; ++j) {
        const int32_t column = high[j].column;
        HiQuad& quad = first[j / 4];
        if (j % 4 == 0) quad.four = 0;
        groups[column / 256] |= uint64_t{1} << (column / 4 % 64);
        std::fill(quad.column + j % 4, quad.column + 4, column);
        quad.four |= static_cast<uint32_t>(high[j].hi & 0xff) << (j % 4 * 8);
      }
      quads.Add(number);
      return number;
    }
  };
  std::vector<Lists> lists;
  int8_t* codes = nullptr;  // low ones, in lo, so many bytes from one row to the next
  int64_t stride = 0;
  int8_t* turned_codes = nullptr;  // in turned
  std::vector<FourRows> fours;
  // Where codes are arranged: of every 16 rows how many are not quantised yet, and their high parts.
  struct RowTile {
    std::atomic<int64_t> left{0};
    std::vector<int32_t> steps;
    Buffer high;
    // Of every 64 columns a 1 in `steps` if some row has a high part there; returns how many.
    int64_t MarkSteps(const Row* first, int64_t m, int64_t k);
    // Of marked steps; rewrites `steps`.
    HighTiles ArrangeHigh(const Row* first, int64_t m);
  };
  std::deque<RowTile> row_tiles;
  std::deque<HighPlan> planned;  // of each chunk of rows

  // Of attention: see AttendJob.
  Buffer queries, shares, first, left;

  size_t bytes() const {
    size_t total = lo.size() + turned.size() + marks.size() + entered.size() + rows.capacity() * sizeof(Row) +
                   queries.size() + shares.size() + first.size() + left.size();
    for (const Lists& list : lists) {
      total += list.outliers.bytes() + list.words.bytes() + list.turned.bytes() + list.quads.bytes();
    }
    for (const RowTile& tile : row_tiles) total += tile.high.size();
    return total;
  }
};

struct FreeList {
  std::mutex mutex;
  std::vector<std::unique_ptr<Workspace>> list;
};

inline FreeList& Free() {
  static auto* free_list = new FreeList;  // never destroyed: worker threads may outlive static objects
  return *free_list;
}

inline BorrowedWorkspace Acquire() {
  std::lock_guard<std::mutex> lock(Free().mutex);
  if (Free().list.empty()) return BorrowedWorkspace(new Workspace);
  BorrowedWorkspace workspace(Free().list.back().release());
  Free().list.pop_back();
  return workspace;
}

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_WORKSPACE_H_
