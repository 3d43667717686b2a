// What a Job works in: buffers of a call, taken from a free list, and those of a thread.
//
// They only grow, so a steady state allocates nothing.
#ifndef JAXINT8_FFI_CPU_WORKSPACE_H_
#define JAXINT8_FFI_CPU_WORKSPACE_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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

// Buffers of one thread; used within one item, never across.
struct ThreadScratch {
  Buffer values, index, codes, outliers, magnitude, columns, mask, entered;
  Buffer rung, c, extra, gathered, halves, groups;
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

struct Workspace {
  Buffer lo, marks, entered;
  std::vector<Row> rows;
  // Per item of the quantising phase: the outliers of its rows, one after the other.
  struct Lists {
    std::vector<Outlier> outliers;
    std::vector<HiWord> words;
    std::vector<HiQuad> quads;
    std::vector<uint64_t> groups;  // with quads: of every four columns a bit, whether there is any

    // Adds a high part to the words of a row, which begin at `first`.
    void AddWord(int32_t column, int32_t hi, size_t first) {
      if (words.size() == first || words.back().group != column / 4) words.push_back({column / 4, 0});
      words.back().four |= static_cast<uint32_t>(hi & 0xff) << (column % 4 * 8);
    }

    // Adds a high part to the quads of a row, of which it is the number-th.
    void AddQuad(int32_t column, int32_t hi, int32_t number) {
      groups[column / 256] |= uint64_t{1} << (column / 4 % 64);
      const int32_t place = number % 4;
      if (place == 0) quads.push_back({});
      std::fill(quads.back().column + place, quads.back().column + 4, column);
      quads.back().four |= static_cast<uint32_t>(hi & 0xff) << (place * 8);
    }
  };
  std::vector<Lists> lists;
  int64_t stride = 0;
  // The plan of a small product; see HiPlan.
  HiPlan plan;
  Buffer hi;
  std::vector<uint64_t> used;
  std::vector<int32_t> rank, groups, slots;

  size_t bytes() const {
    size_t total = lo.size() + marks.size() + entered.size() + rows.capacity() * sizeof(Row);
    for (const Lists& list : lists) {
      total += list.outliers.capacity() * sizeof(Outlier) + list.words.capacity() * sizeof(HiWord) +
               list.quads.capacity() * sizeof(HiQuad);
    }
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

inline Workspace* Acquire() {
  std::lock_guard<std::mutex> lock(Free().mutex);
  if (Free().list.empty()) return new Workspace;
  Workspace* workspace = Free().list.back().release();
  Free().list.pop_back();
  return workspace;
}

inline void Release(Workspace* workspace) {
  std::unique_ptr<Workspace> owned(workspace);
  if (owned->bytes() > kKeepBytes) return;
  std::lock_guard<std::mutex> lock(Free().mutex);
  Free().list.push_back(std::move(owned));
}

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_WORKSPACE_H_
