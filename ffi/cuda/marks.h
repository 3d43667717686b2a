// Which columns are taken out whole, for all rows of a call (column scope): those where a finite row has an outlier.
//
// A bit per column, the marks. Every block that quantises a row must know all of them. Of few values it finds them
// itself, or together with the other blocks of a cluster. Else blocks of a kernel before it leave the marks of a row
// each, and it puts these together: nothing needs to be cleared beforehand. Of many rows they set bits of the same
// marks.
#ifndef JAXINT8_FFI_CUDA_MARKS_H_
#define JAXINT8_FFI_CUDA_MARKS_H_

#include "device.h"
#include "hopper.h"
#include "int8.h"
#include "reader.h"

namespace jaxint8::cuda {

// Of whole vectors.
JAXINT8_HOST_DEVICE constexpr int64_t MarkWords(int64_t k) { return (k + 127) / 128 * 4; }
// In shared memory behind them flags: of each block of a cluster, or for 32 rows a bit for each that is not finite.
inline constexpr int kMarkFlags = 8;
JAXINT8_HOST_DEVICE constexpr int64_t MarkBytes(int64_t k) { return 4 * (MarkWords(k) + kMarkFlags); }
// Blocks look for marks themselves in so many rows and bytes, alone and in clusters: a kernel more takes longer than
// reading these.
inline constexpr int kMarkBlocks = 8;
inline constexpr int64_t kMarkedRows = 32 * kMarkFlags, kMarkedAlone = 32 * 1024, kMarkedBytes = 512 * 1024;
// Marks of rows are put together, by each row for itself, up to so many words read by all (256 rows of 4096 columns).
inline constexpr int64_t kMarkedWords = 8 * 1024 * 1024;

// What the bits of an outlier's magnitude reach, by a threshold.
JAXINT8_DEVICE uint32_t ThresholdBits(const Options& options) { return options.value > 0 ? Bits(options.value) : 0; }

JAXINT8_DEVICE void ClearMarks(Ptr<uint32_t> marks, int words) {
  for (int j = ThreadIndex(); j < words; j += BlockThreads()) Store(marks + j, 0u);
  Barrier();
}

// Sets bits of a word that others set too. Most outliers stand in a few columns that are marked already: look before
// taking the line.
JAXINT8_DEVICE void SetMarks(Ptr<uint32_t> marks, uint32_t bits) {
  if (bits & ~LoadRelaxed(marks)) AtomicOr(marks, bits);
}

// How many threads of a block share one of so many things.
JAXINT8_DEVICE int Sharing(int things) {
  const int threads = BlockThreads();
  return things > 0 && things < threads ? threads / things : 1;
}

// Puts the marks of `parts` rows together.
JAXINT8_DEVICE void CombineMarks(Ptr<const uint32_t> from, int parts, int words, Ptr<uint32_t> marks) {
  const int vectors = words / 4, threads = BlockThreads(), sharing = Sharing(vectors);
#pragma unroll 1
  for (int j = ThreadIndex(); j < sharing * vectors; j += threads) {
    const int vector = j % vectors;
    Word4 all{0, 0, 0, 0};
#pragma unroll 8
    for (int part = j / vectors; part < parts; part += sharing) {
      const Word4 w = LoadAs<Word4>(from + (part * words + 4 * vector));
      all = {all.x | w.x, all.y | w.y, all.z | w.z, all.w | w.w};
    }
    const Ptr<uint32_t> to = marks + 4 * vector;
    if (all.x) SetMarks(to, all.x);
    if (all.y) SetMarks(to + 1, all.y);
    if (all.z) SetMarks(to + 2, all.z);
    if (all.w) SetMarks(to + 3, all.w);
  }
}

// Looks for outliers in a matrix of up to kMarkedRows rows, with all threads of a block, or of all blocks of a cluster.
template <Type kType>
class Marker {
 public:
  // k is a multiple of 8; threshold: as the bits of a float. marks: in shared memory, MarkBytes(k).
  JAXINT8_DEVICE Marker(Ptr<const uint8_t> x, int rows, int k, uint32_t threshold, Ptr<uint32_t> marks)
      : x_(x), rows_(rows), k_(k), words_(static_cast<int>(MarkWords(k))), threshold_(threshold), marks_(marks) {}

  // Each block looks at a share of the columns, and tells the others.
  JAXINT8_DEVICE void Mark(int blocks) const {
    ClearMarks(marks_, words_ + kMarkFlags);
    int rank = 0;
#ifdef JAXINT8_HOPPER
    if (blocks > 1) {
      rank = static_cast<int>(ClusterRank());
      ClusterBarrier();
    }
#else
    blocks = 1;
#endif
    const int begin = words_ * rank / blocks, end = words_ * (rank + 1) / blocks;
    if (MarkShare(begin, end)) AtomicOr(marks_ + (words_ + rank), 1);
    Barrier();
#ifdef JAXINT8_HOPPER
    if (blocks > 1) {
      for (int j = ThreadIndex(); j < (end - begin + 1) * blocks; j += BlockThreads()) {
        const int block = j % kMarkBlocks, word = begin + j / kMarkBlocks, at = word < end ? word : words_ + rank;
        if (block != rank) StoreRemote(SharedAddress(Cast<uint8_t>(marks_ + at)), block, Load(marks_ + at));
      }
      ClusterBarrier();
    }
#endif
    uint32_t flags = 0;
    for (int j = 0; j < blocks; ++j) flags |= Load(marks_ + (words_ + j));
    if (flags) MarkFinite();
  }

 private:
  using Reader = RowReader<kType, true>;
  using Raw = typename Reader::Raw;
  static constexpr int kAhead = 4;  // rows that are asked for at once

  // Of the columns of some words, by their largest magnitudes. Whether this thread saw any that is not finite.
  JAXINT8_DEVICE bool MarkShare(int begin, int end) const {
    const int last = 4 * end < k_ / 8 ? 4 * end : k_ / 8, groups = last - 4 * begin, sharing = Sharing(groups);
    uint32_t largest = 0;
#pragma unroll 1
    for (int j = ThreadIndex(); j < sharing * groups; j += BlockThreads()) {
      const int i = 8 * (4 * begin + j % groups);
      Raw all{};
#pragma unroll 1
      for (int first = j / groups; first < rows_; first += kAhead * sharing) {
        Raw raw[kAhead] = {};
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          if (first + a * sharing < rows_) raw[a] = RowOf(first + a * sharing).ReadRaw(i);
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) all = Reader::LargerMagnitudes(all, raw[a]);
      }
      const uint32_t of_group = Reader::LargestOf(all);
      largest = of_group > largest ? of_group : largest;
      if (of_group >= threshold_) SetOutliers(all, i);
    }
    return largest >= kInfinity;
  }

  // The whole, without rows that are not finite: which these are is asked for 32 rows at a time.
  JAXINT8_DEVICE void MarkFinite() const {
    Barrier();
    ClearMarks(marks_, words_ + kMarkFlags);
#pragma unroll 1
    for (int first = 0; first < rows_; first += 32) {
      const Ptr<uint32_t> not_finite = marks_ + (words_ + first / 32);
      uint32_t seen = 0;
      ForEach(first, [&](uint32_t bit, int, const Raw& raw) {
        if (Reader::LargestOf(raw) >= kInfinity) seen |= bit;
      });
      if (seen) AtomicOr(not_finite, seen);
      Barrier();
      const uint32_t without = Load(not_finite);
      ForEach(first, [&](uint32_t bit, int i, const Raw& raw) {
        if (!(without & bit) && Reader::LargestOf(raw) >= threshold_) SetOutliers(raw, i);
      });
    }
    Barrier();
  }

  // Calls body(bit of the row, column, eight values) for 32 rows from `first` on, as far as there are.
  template <typename Body>
  JAXINT8_DEVICE void ForEach(int first, Body body) const {
#pragma unroll 1
    for (int row = first; row < rows_ && row < first + 32; ++row) {
#pragma unroll 1
      for (int i = 8 * ThreadIndex(); i < k_; i += 8 * BlockThreads()) {
        body(1u << (row - first), i, RowOf(row).ReadRaw(i));
      }
    }
  }

  JAXINT8_DEVICE Reader RowOf(int row) const { return {x_ + row * Reader::kBytes * k_, k_}; }

  JAXINT8_DEVICE void SetOutliers(const Raw& raw, int i) const {
    float v[8];
    Reader::Widen(raw, v);
    uint32_t mask = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) mask |= static_cast<uint32_t>(Magnitude(v[e]) >= threshold_) << e;
    SetMarks(marks_ + i / 32, mask << i % 32);
  }

  const Ptr<const uint8_t> x_;
  const int rows_, k_, words_;
  const uint32_t threshold_;
  const Ptr<uint32_t> marks_;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_MARKS_H_
