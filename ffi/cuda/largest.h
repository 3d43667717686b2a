// The largest values of each row, in falling order, those of equal value by their columns: the logits that an int8 head
// computes once more.
//
// A row is cut into parts. Blocks of a first kernel leave up to kLargestKept values of each, among which are the
// largest that are asked for, and one block a row of a second kernel does the same with what the first has left. What
// is left is found by a bound: as many groups of threads as values are asked for have a value that reaches it, and few
// others do. Where too many reach it, as in a row of equal values, a histogram of digits after the other raises the
// bound.
#ifndef JAXINT8_FFI_CUDA_LARGEST_H_
#define JAXINT8_FFI_CUDA_LARGEST_H_

#include <cstdint>

#include "device.h"
#include "int8.h"

namespace jaxint8::cuda {

// Of 128 groups of values in no order the 64th largest maximum is reached by some 90 values, seldom by more than 110.
inline constexpr int kLargestThreads = 512, kLargestGroups = 128, kLargestKept = 128, kLargestBins = 256;
static_assert(kLargestThreads == 4 * kLargestGroups && kLargestThreads >= kLargestBins);
static_assert(kLargestMost <= kLargestGroups && kLargestMost <= kLargestKept);

// How rows are cut: into so many parts of so many vectors of four values. Of many rows into longer ones, that all
// blocks run at once; and into not too many, for one block reads what is left of all.
struct LargestShape {
  int64_t parts, vectors;
};
inline LargestShape ChooseLargest(int64_t m, int64_t n) {
  constexpr int64_t kShort = 1024, kLong = 4096, kBlocks = 3 * 128, kMostParts = 256;
  const int64_t vectors = n % 4 == 0 ? n / 4 : (n + 6) / 4;  // a row may begin and end within one
  const int64_t least = (vectors + kLong - 1) / kLong, most = (vectors + kShort - 1) / kShort;
  int64_t parts = m > 0 ? kBlocks / m : 1;
  if (parts < least) parts = least;
  if (parts > most) parts = most;
  if (parts > kMostParts) parts = kMostParts;
  if (parts < 1) parts = 1;
  return {parts, (vectors + parts - 1) / parts};
}
// A value as an integer of its place among values: zeros are equal; NaNs are equal, and above all numbers, as they are
// sorted by NumPy and JAX (jax.lax.top_k goes by the signs of both). 0 is no value's.
JAXINT8_DEVICE uint32_t OrderOf(float x) {
  const uint32_t bits = Bits(Add(x, 0.0f));  // not -0
  const uint32_t order = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return x != x ? ~0u : order;
}

// A value with its column, so that all differ: the order above, and the lower the column the larger.
JAXINT8_DEVICE uint64_t Ranked(uint32_t order, uint32_t column) { return uint64_t{order} << 32 | column; }

// Which of what all threads look at in turn is this thread's: the number of its group is the rest by kLargestGroups, so
// that neighbours belong to different ones (they may be the largest of all), and the four threads of a group are lanes
// of one warp.
JAXINT8_DEVICE int LargestPlace() {
  const auto t = static_cast<unsigned>(ThreadIndex());
  return static_cast<int>(t / 8 % 4 * kLargestGroups + t / 32 * 8 + t % 8);
}

// The values of one part of a row. A row may begin at any float: positions are counted from the vector that it begins
// in.
class LargestOfRow {
 public:
  // skip: floats of the first vector that are not of the row.
  JAXINT8_DEVICE LargestOfRow(Ptr<const float> vectors, int skip, int begin, int end)
      : from_(vectors), skip_(skip), begin_(begin), end_(end) {}

  // Calls f(order, flipped column) for each value of this thread, and asks for so many vectors at once.
  static constexpr int kMostAhead = 4;
  template <int kAhead, typename F>
  JAXINT8_DEVICE void ForEach(F f) const {
    const int first = (begin_ + 3) / 4, last = end_ / 4;
#pragma unroll 1
    for (int v = first + LargestPlace(); v < last; v += kAhead * kLargestThreads) {
      Word4 words[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int at = v + j * kLargestThreads;
        words[j] = Word4{0, 0, 0, 0};
        if (at < last) words[j] = LoadAs<Word4>(from_ + 4 * at);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int at = v + j * kLargestThreads;
        if (at >= last) break;
        const uint32_t bits[4] = {words[j].x, words[j].y, words[j].z, words[j].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) f(OrderOf(FloatFromBits(bits[i])), Column(4 * at + i));
      }
    }
    // What stands before and behind whole vectors: up to three values each.
    const int t = ThreadIndex(), whole = 4 * (first < last ? last : first);
    if (t >= 8) return;
    const int at = t < 4 ? begin_ + t : whole + t - 4;
    const int before = 4 * first < end_ ? 4 * first : end_;
    if (at < (t < 4 ? before : end_)) f(OrderOf(Load(from_ + at)), Column(at));
  }

 private:
  JAXINT8_DEVICE uint32_t Column(int at) const { return ~static_cast<uint32_t>(at - skip_); }

  Ptr<const float> from_;
  int skip_, begin_, end_;
};

// What is left of a row's parts: pairs of words, the flipped column and the order; zeros for nothing.
class LargestOfParts {
 public:
  JAXINT8_DEVICE LargestOfParts(Ptr<const uint32_t> pairs, int count) : from_(pairs), count_(count) {}

  static constexpr int kMostAhead = 8;
  template <int kAhead, typename F>
  JAXINT8_DEVICE void ForEach(F f) const {
#pragma unroll 1
    for (int first = LargestPlace(); first < count_; first += kAhead * kLargestThreads) {
      Word2 pairs[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int at = first + j * kLargestThreads;
        pairs[j] = Word2{0, 0};
        if (at < count_) pairs[j] = LoadAs<Word2>(from_ + 2 * at);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) f(pairs[j].y, pairs[j].x);
    }
  }

 private:
  Ptr<const uint32_t> from_;
  int count_;
};

// Finds the `count` largest values of a source with all threads of a block, and a few more.
template <typename Source>
class LargestChooser {
 public:
  static constexpr int64_t kShared = 4 * (kLargestBins + 2 * kLargestKept + 8);

  JAXINT8_DEVICE LargestChooser(const Source& source, int count, Ptr<uint32_t> shared)
      : source_(source),
        count_(count),
        groups_(shared),
        bins_(shared),
        kept_(shared + kLargestBins),
        found_(kept_ + 2 * kLargestKept),
        bound_(found_ + 1),
        chosen_(bound_ + 1) {}

  // Puts them into kept(), in no order, zeros behind them. Returns how many there are: all if they are fewer than
  // count.
  JAXINT8_DEVICE int Choose() const {
    const int t = ThreadIndex();
    uint32_t largest = 0;
    source_.template ForEach<Source::kMostAhead>(
        [&](uint32_t order, uint32_t) { largest = order > largest ? order : largest; });
    uint32_t of_group = largest;
#pragma unroll
    for (int lanes = 8; lanes < 32; lanes *= 2) {
      const uint32_t other = ShuffleXor(of_group, lanes);
      of_group = other > of_group ? other : of_group;
    }
    // The lowest bits make way for the group's number, so that no two are equal.
    const int group = LargestPlace() % kLargestGroups;
    if (t % 32 < 8) Store(groups_ + group, (of_group & ~(kLargestGroups - 1u)) | static_cast<uint32_t>(group));
    Forget();
    Barrier();
    if (t < kLargestGroups) FindBound();
    Barrier();
    const uint32_t bound = Load(bound_);
    if (largest >= bound) Keep(Ranked(bound, 0));
    Barrier();
    const auto found = static_cast<int>(Load(found_));
    return found <= kLargestKept ? found : Refine(bound);
  }

  JAXINT8_DEVICE Ptr<uint32_t> kept() const { return kept_; }

 private:
  JAXINT8_DEVICE void Forget() const {
    if (ThreadIndex() < kLargestKept) StoreAs<Word2>(kept_ + 2 * ThreadIndex(), Word2{0, 0});
    if (ThreadIndex() == 0) Store(found_, 0u);
  }

  // By a thread for each group.
  JAXINT8_DEVICE void FindBound() const {
    const uint32_t mine = Load(groups_ + ThreadIndex()), rounded = mine & ~(kLargestGroups - 1u);
    int above = 0;
#pragma unroll 8
    for (int i = 0; i < kLargestGroups; i += 4) {
      const Word4 g = LoadAs<Word4>(groups_ + i);
      above += (g.x > mine) + (g.y > mine) + (g.z > mine) + (g.w > mine);
    }
    if (above == count_ - 1) Store(bound_, rounded > 0 ? rounded : 1u);
  }

  // Adds this thread's values from `least` on to those kept, as far as there is room, and counts all.
  JAXINT8_DEVICE void Keep(uint64_t least) const {
    source_.template ForEach<2>([&](uint32_t order, uint32_t column) {
      if (Ranked(order, column) < least) return;
      const uint32_t at = AtomicAdd(found_, 1);
      if (at < kLargestKept) StoreAs<Word2>(kept_ + 2 * static_cast<int>(at), Word2{column, order});
    });
  }

  // Of more values than there is room for: finds the digits of a higher bound, the first first, until few enough reach
  // it. No two are equal, so there will be few enough by the last.
  JAXINT8_DEVICE int Refine(uint32_t bound) const {
    const int t = ThreadIndex();
    uint64_t least = 0;
    int above = 0, reach = 0;
    int shift = 64;
    do {
      shift -= 8;
      if (t < kLargestBins) Store(bins_ + t, 0u);
      Barrier();
      source_.template ForEach<1>([&](uint32_t order, uint32_t column) {
        const uint64_t ranked = Ranked(order, column);
        if (order < bound || ranked < least) return;
        const uint64_t bin = (ranked - least) >> shift;
        if (bin < kLargestBins) AtomicAdd(bins_ + static_cast<int>(bin), 1);
      });
      Barrier();
      if (t < kLargestBins) ChooseDigit(above);
      Forget();
      Barrier();
      least += uint64_t{Load(chosen_)} << shift;
      above = static_cast<int>(Load(chosen_ + 1));
      reach = static_cast<int>(Load(chosen_ + 2));
    } while (shift > 0 && reach > kLargestKept);
    Keep(least);
    Barrier();
    return reach;
  }

  // Of each bin a thread: that of the last value asked for says which it is, how many values are above it, and how many
  // with those in it.
  JAXINT8_DEVICE void ChooseDigit(int above) const {
    const int t = ThreadIndex();
#pragma unroll 4
    for (int i = 0; i < kLargestBins; i += 4) {
      const Word4 b = LoadAs<Word4>(bins_ + i);
      const uint32_t four[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) above += i + j > t ? static_cast<int>(four[j]) : 0;
    }
    const int reach = above + static_cast<int>(Load(bins_ + t));
    if (above >= count_ || reach < count_) return;
    Store(chosen_, static_cast<uint32_t>(t));
    Store(chosen_ + 1, static_cast<uint32_t>(above));
    Store(chosen_ + 2, static_cast<uint32_t>(reach));
  }

  Source source_;
  int count_;
  // In shared memory; the bins are counted where the groups were.
  Ptr<uint32_t> groups_, bins_, kept_, found_, bound_, chosen_;
};

struct LargestParams {
  Ptr<const float> x;   // [m][k]
  Ptr<uint32_t> pairs;  // [m][parts][kLargestKept][2], what the first kernel leaves
  Ptr<int32_t> y;       // [m][count]
  int64_t k;
  int count, parts, vectors;
};

// The first kernel, the second, or both in one where a row is one part.
template <bool kFirst, bool kLast>
struct LargestKernel {
  using Params = LargestParams;
  static constexpr int kMaxThreads = kLargestThreads;
  static constexpr int kMinBlocks = kFirst ? 3 : 1;
  static constexpr int64_t kShared = LargestChooser<LargestOfParts>::kShared;

  static JAXINT8_DEVICE void Run(const Params& p) {
    const auto block = static_cast<unsigned>(BlockIndex());
    WaitForPreviousKernel();
    AllowNextKernel();
    if constexpr (kFirst) {
      const unsigned row = block / static_cast<unsigned>(p.parts);
      const int part = static_cast<int>(block - row * static_cast<unsigned>(p.parts));
      const int64_t start = row * p.k;
      const int skip = static_cast<int>(start % 4), all = skip + static_cast<int>(p.k);
      const int from = 4 * part * p.vectors, to = from + 4 * p.vectors;
      const LargestOfRow values(p.x + (start - skip), skip, from > skip ? from : skip, to < all ? to : all);
      Finish(p, block, values);
    } else {
      const int count = p.parts * kLargestKept;
      Finish(p, block, LargestOfParts(p.pairs + int64_t{2} * block * count, count));
    }
  }

 private:
  template <typename Source>
  static JAXINT8_DEVICE void Finish(const Params& p, unsigned block, const Source& source) {
    const LargestChooser<Source> chooser(source, p.count, Cast<uint32_t>(SharedMemory()));
    const int found = chooser.Choose(), t = ThreadIndex();
    if (t >= kLargestKept) return;
    const Ptr<uint32_t> kept = chooser.kept();
    const auto mine = LoadAs<Word2>(kept + 2 * t);
    if constexpr (!kLast) {
      StoreAs<Word2>(p.pairs + 2 * (int64_t{block} * kLargestKept + t), mine);
    } else {
      if (t >= found) return;
      const uint64_t ranked = Ranked(mine.y, mine.x);
      int above = 0;
#pragma unroll 4
      for (int i = 0; i < found; i += 2) {  // behind an odd number there is a pair of zeros
        const Word4 two = LoadAs<Word4>(kept + 2 * i);
        above += (Ranked(two.y, two.x) > ranked) + (Ranked(two.w, two.z) > ranked);
      }
      if (above < p.count) Store(p.y + (int64_t{block} * p.count + above), static_cast<int32_t>(~mine.x));
    }
  }
};

// Queues what a plan has found to be right; in largest.cu.
const char* RunLargest(const Problem& p, bool hopper, CUstream_st* stream);

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_LARGEST_H_
