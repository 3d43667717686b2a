// Quantises one row of activations with one block: statistics, outlier rule, codes. The row is looked at two to four
// times and read from device memory once: it stays in registers, or, if it is too long, in the first-level cache.
//
// Every statistic is a maximum, a count or an integer sum, so the codes do not depend on the number of threads.
#ifndef JAXINT8_FFI_CUDA_ROWS_H_
#define JAXINT8_FFI_CUDA_ROWS_H_

#include "device.h"
#include "int8.h"
#include "reader.h"

namespace jaxint8::cuda {

inline constexpr float kCodeMax = 127;
inline constexpr int32_t kOutlierCodeMax = 127 * 128;
// 127 * sum(|codes of a row|) must stay below 2^31 for the int32 sum to be exact.
inline constexpr int64_t kSumOfCodesMax = ((int64_t{1} << 31) - 1) / 127;
// Below this a row counts as zero, so that nothing that flushes subnormals can see another row.
inline constexpr float kSmallestScale = 0x1p-125f;
inline constexpr float kRmsLevels = 4095;
inline constexpr uint32_t kInfinity = 0x7f800000;
inline constexpr uint32_t kNothing = 0x7fffffff;  // a threshold above every finite magnitude
// High parts are looked up by pieces of this many columns: pieces without any are skipped.
inline constexpr int64_t kPiece = 256;

// Shared memory of the row functions, in words.
inline constexpr int kReduceWords = 2 * 3 * 32;  // two buffers in turn, three values, one word per warp
inline constexpr int kGroups = 32;               // of threads, whose maxima bound the largest magnitudes
inline constexpr int kCandidates = 256;
inline constexpr int kBins = 128;
inline constexpr int kGroupsAt = kReduceWords;
inline constexpr int kResultAt = kGroupsAt + kGroups;  // number of candidates, magnitude, column
inline constexpr int kBinsAt = kResultAt + 4;
inline constexpr int kCandidatesAt = kBinsAt + kBins;
inline constexpr int kPiecesAt = kCandidatesAt + 2 * kCandidates;
inline constexpr int kPieceWords = static_cast<int>((kMaxK / kPiece + 32) / 32);
inline constexpr int kScratchWords = (kPiecesAt + kPieceWords + 31) / 32 * 32;
// Up to this many largest values are found among the candidates above a bound; more, or too many ties, digit by digit.
inline constexpr int64_t kQuickTopK = 24;

// Where a row goes. Pointers to shared or device memory.
struct RowOutput {
  Ptr<int8_t> lo;  // [stride], columns from k on are set to 0
  Ptr<int8_t> hi;  // likewise, or null if the rule selects nothing
  int64_t stride;
  Ptr<const uint32_t> marks;  // column scope: bit per column, set where the column is out
  Ptr<uint32_t> used;         // bit per column, set where a high part is not 0; or null
};

// Which magnitudes of a row are outliers: those above the threshold, and those equal to it up to a column.
struct Selection {
  uint32_t threshold;
  int64_t last;
  JAXINT8_DEVICE bool Has(uint32_t magnitude, int64_t column) const {
    return magnitude > threshold || (magnitude == threshold && column <= last);
  }
};

// All threads of the block call every function, with the same arguments. kHeld: how many times eight elements every
// thread holds in registers, enough for the padded row; 0: none, the row is read again each time.
template <Type kType, bool kVector, int kHeld = 0>
class RowBlock {
 public:
  JAXINT8_DEVICE RowBlock(Ptr<const uint8_t> data, int64_t k, const Options& options, Ptr<uint32_t> scratch, int* turn)
      : row_{data, k}, options_(options), scratch_(scratch), turn_(turn) {
    static_assert(kVector || kHeld == 0);
#pragma unroll
    for (int c = 0; c < kHeld; ++c) {
      held_[c] = {};
      if (At(c) < k) held_[c] = row_.ReadRaw(At(c));
    }
  }

  // Sets the bits of this row's outliers in the marks; rows that are not finite have no say.
  JAXINT8_DEVICE void Mark(Ptr<uint32_t> marks) {
    const uint32_t absmax = AbsMax();
    if (absmax >= kInfinity) return;
    const Selection selection = Select(absmax);
    if (absmax < selection.threshold) return;
    ForEach(row_.k, [&](int64_t i, const float (&v)[8]) { SetBits(marks, i, Outliers(selection, i, v)); });
  }

  // Writes codes and returns the row scale, NaN if the row is not finite. Bits of `pieces` (in the scratch, zeroed by
  // the caller) are set where a piece of columns has high parts.
  JAXINT8_DEVICE float Quantize(const RowOutput& out) {
    const uint32_t absmax = AbsMax();
    const bool finite = absmax < kInfinity;
    Selection selection{kNothing, 0};
    uint32_t count = 0, rest = finite ? absmax : 0, outlier = 0;
    const bool by_column = options_.column_scope;
    if (finite && options_.rule != Rule::kNone) {
      if (!by_column) selection = Select(absmax);
      if (by_column || absmax >= selection.threshold) {
        rest = 0;
        ForEach(row_.k, [&](int64_t i, const float (&v)[8]) {
          const uint32_t mask = by_column ? Marked(out.marks, i) : Outliers(selection, i, v);
          if (mask == 0) {
            const uint32_t a = LargestOf(v);
            rest = a > rest ? a : rest;
            return;
          }
          count += static_cast<uint32_t>(PopulationCount(mask));
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const uint32_t a = Magnitude(v[j]);
            if (mask >> j & 1) {
              outlier = a > outlier ? a : outlier;
            } else {
              rest = a > rest ? a : rest;
            }
          }
        });
        ReduceCounts(count, rest, outlier);
      }
    }
    float scale = Divide(FloatFromBits(rest), kCodeMax);
    int32_t limit = kOutlierCodeMax;
    if (count > 0) {
      const int64_t room = (kSumOfCodesMax - 127 * (row_.k - count)) / count;
      limit = room < limit ? static_cast<int32_t>(room) : limit;
      const float least = Divide(FloatFromBits(outlier), IntToFloat(limit));
      scale = least > scale ? least : scale;
    }
    const bool usable = finite && scale >= kSmallestScale;
    scale = usable ? scale : 1.0f;
    WriteCodes(out, selection, usable && count > 0, usable, scale);
    return finite ? scale : FloatFromBits(0x7fc00000);
  }

  JAXINT8_DEVICE Ptr<uint32_t> pieces() const { return scratch_ + kPiecesAt; }

 private:
  static JAXINT8_DEVICE int64_t At(int c) { return 8 * (ThreadIndex() + c * BlockThreads()); }

  // Calls body(i, v) for this thread's groups of eight elements before `end`; v is 0 from k on. kAgain: reads them
  // again, for rare work that is better small than fast.
  template <bool kAgain = false, typename Body>
  JAXINT8_DEVICE void ForEach(int64_t end, Body body) {
    float v[8];
    if constexpr (kHeld > 0 && !kAgain) {
#pragma unroll
      for (int c = 0; c < kHeld; ++c) {
        if (At(c) >= end) continue;
        row_.Widen(held_[c], v);
        body(At(c), v);
      }
    } else {
#pragma unroll 1
      for (int64_t i = 8 * ThreadIndex(); i < end; i += 8 * BlockThreads()) {
        if (i < row_.k) {
          row_.Read(i, v);
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) v[j] = 0;
        }
        body(i, v);
      }
    }
  }

  static JAXINT8_DEVICE uint32_t LargestOf(const float (&v)[8]) {
    uint32_t a = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) a = Magnitude(v[j]) > a ? Magnitude(v[j]) : a;
    return a;
  }

  JAXINT8_DEVICE uint32_t Outliers(const Selection& selection, int64_t i, const float (&v)[8]) const {
    if (LargestOf(v) < selection.threshold) return 0;  // nearly always
    uint32_t mask = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) mask |= static_cast<uint32_t>(selection.Has(Magnitude(v[j]), i + j)) << j;
    return mask & row_.Valid(i);
  }

  static JAXINT8_DEVICE uint32_t Marked(Ptr<const uint32_t> marks, int64_t i) {
    return Load(marks + (i >> 5)) >> (i & 31) & 0xff;  // i is a multiple of 8
  }

  static JAXINT8_DEVICE void SetBits(Ptr<uint32_t> bits, int64_t i, uint32_t mask) {
    const uint32_t shifted = mask << (i & 31);
    // Most outliers stand in a few columns that others have marked before: look before taking the line.
    if (shifted & ~LoadRelaxed(bits + (i >> 5))) AtomicOr(bits + (i >> 5), shifted);
  }

  JAXINT8_DEVICE Ptr<uint32_t> NextBuffer() {
    *turn_ ^= 1;
    return scratch_ + *turn_ * (kReduceWords / 2);
  }

  // The largest magnitude of the row; own_ is that of this thread.
  JAXINT8_DEVICE uint32_t AbsMax() {
    own_ = 0;
    ForEach(row_.k, [&](int64_t, const float (&v)[8]) {
      const uint32_t largest = LargestOf(v);
      own_ = largest > own_ ? largest : own_;
    });
    const int lane = ThreadIndex() % 32, warp = ThreadIndex() / 32, warps = BlockThreads() / 32;
    const Ptr<uint32_t> buffer = NextBuffer();
    const uint32_t mine = WarpMax(own_);
    if (lane == 0) Store(buffer + warp, mine);
    Barrier();
    return WarpMax(lane < warps ? Load(buffer + lane) : 0);
  }

  JAXINT8_DEVICE void ReduceCounts(uint32_t& count, uint32_t& rest, uint32_t& outlier) {
    const int lane = ThreadIndex() % 32, warp = ThreadIndex() / 32, warps = BlockThreads() / 32;
    const Ptr<uint32_t> buffer = NextBuffer();
    count = WarpSum(count);
    rest = WarpMax(rest);
    outlier = WarpMax(outlier);
    if (lane == 0) {
      Store(buffer + warp, count);
      Store(buffer + 32 + warp, rest);
      Store(buffer + 64 + warp, outlier);
    }
    Barrier();
    count = WarpSum(lane < warps ? Load(buffer + lane) : 0);
    rest = WarpMax(lane < warps ? Load(buffer + 32 + lane) : 0);
    outlier = WarpMax(lane < warps ? Load(buffer + 64 + lane) : 0);
  }

  // Sum over the block; each value must be below 2^51.
  JAXINT8_DEVICE uint64_t SumWide(uint64_t v) {
    const int lane = ThreadIndex() % 32, warp = ThreadIndex() / 32, warps = BlockThreads() / 32;
    const Ptr<uint32_t> buffer = NextBuffer();
    v = WarpSumWide(v);
    if (lane == 0) {
      Store(buffer + warp, static_cast<uint32_t>(v));
      Store(buffer + 32 + warp, static_cast<uint32_t>(v >> 32));
    }
    Barrier();
    v = 0;
    if (lane < warps) v = Load(buffer + lane) | static_cast<uint64_t>(Load(buffer + 32 + lane)) << 32;
    return WarpSumWide(v);
  }

  static JAXINT8_DEVICE uint64_t WarpSumWide(uint64_t v) {
    const uint64_t low = WarpSum(static_cast<uint32_t>(v & 0xffffff));
    return (static_cast<uint64_t>(WarpSum(static_cast<uint32_t>(v >> 24))) << 24) + low;
  }

  JAXINT8_DEVICE Selection Select(uint32_t absmax) {
    if (options_.rule == Rule::kTopK) return SelectTopK();
    float threshold = options_.value;
    if (options_.rule == Rule::kRelative) {
      const float unit = Divide(FloatFromBits(absmax), kRmsLevels);
      if (!(unit >= kSmallestScale)) return {kNothing, 0};
      // In units of 4096 squares, and 64 = sqrt(4096).
      const float mean = Divide(WideToFloat(static_cast<int64_t>(SumOfSquares(unit) >> 12)), WideToFloat(row_.k));
      threshold = Multiply(threshold, Multiply(unit, Multiply(64.0f, SquareRoot(mean))));
    }
    return {threshold > 0 ? Bits(threshold) : 0, row_.k};
  }

  JAXINT8_DEVICE uint64_t SumOfSquares(float unit) {
    uint64_t sum = 0;
    const float reciprocal = Divide(1.0f, unit);
    ForEach(row_.k, [&](int64_t, const float (&v)[8]) {
      int32_t codes[8];
      RoundedQuotients(v, unit, reciprocal, codes);
      uint32_t part = 0;  // eight squares of 24 bits
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        part += static_cast<uint32_t>(codes[j] * codes[j]);  // at most 4095: the quotient is, but for its rounding
      }
      sum += part;
    });
    return SumWide(sum);
  }

  JAXINT8_DEVICE Selection SelectTopK() {
    const int64_t count = options_.topk;
    if (count >= row_.k) return {0, row_.k};
    if (count > kQuickTopK) return SelectByDigits(count);
    // The count-th largest of the maxima of 32 groups of threads bounds the count-th largest of the row from below.
    const int lane = ThreadIndex() % 32;
    const int width = BlockThreads() / kGroups;
    const Ptr<uint32_t> result = scratch_ + kResultAt;
    uint32_t largest = own_;
    for (int d = 1; d < width; d *= 2) {
      const uint32_t other = ShuffleXor(largest, d);
      largest = other > largest ? other : largest;
    }
    if (ThreadIndex() % width == 0) Store(scratch_ + kGroupsAt + ThreadIndex() / width, largest);
    if (ThreadIndex() == 0) Store(result, 0u);
    Barrier();
    const uint32_t bound = RankedLane(Load(scratch_ + kGroupsAt + lane), count - 1);
    const Ptr<uint32_t> list = scratch_ + kCandidatesAt;
    ForEach(row_.k, [&](int64_t i, const float (&v)[8]) {
      for (uint32_t mask = Outliers({bound, row_.k}, i, v); mask; mask &= mask - 1) {
        const int j = LowestBit(mask);
        const uint32_t at = AtomicAdd(result, 1);
        if (at < kCandidates) {
          Store(list + 2 * at, Pick(v, j));
          Store(list + 2 * at + 1, static_cast<uint32_t>(i + j));
        }
      }
    });
    Barrier();
    const uint32_t candidates = Load(result);
    if (candidates > kCandidates) return SelectByDigits(count);
    for (uint32_t e = static_cast<uint32_t>(ThreadIndex()); e < candidates; e += BlockThreads()) {
      const uint32_t magnitude = Load(list + 2 * e), column = Load(list + 2 * e + 1);
      uint32_t rank = 0;
      for (uint32_t other = 0; other < candidates; ++other) {
        const uint32_t a = Load(list + 2 * other);
        rank += a > magnitude || (a == magnitude && Load(list + 2 * other + 1) < column);
      }
      if (rank == count - 1) {
        Store(result + 1, magnitude);
        Store(result + 2, column);
      }
    }
    Barrier();
    return {Load(result + 1), static_cast<int64_t>(Load(result + 2))};
  }

  // v[j] without an indexed register array.
  static JAXINT8_DEVICE uint32_t Pick(const float (&v)[8], int j) {
    uint32_t a = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) a = i == j ? Magnitude(v[i]) : a;
    return a;
  }

  // The value whose rank among the 32 lanes, largest first, is the given one.
  static JAXINT8_DEVICE uint32_t RankedLane(uint32_t v, int64_t rank) {
    const int lane = ThreadIndex() % 32;
    int mine = 0;
    for (int j = 0; j < 32; ++j) {
      const uint32_t other = Shuffle(v, j);
      mine += other > v || (other == v && j < lane);
    }
    return WarpMax(mine == rank ? v : 0);
  }

  // Finds the count-th largest of the keys (magnitude, lower column first), which are all different, 7 bits at a time.
  JAXINT8_DEVICE Selection SelectByDigits(int64_t count) {
    constexpr int kColumnBits = 18;
    constexpr uint32_t kColumnMask = (1u << kColumnBits) - 1;
    const int lane = ThreadIndex() % 32;
    const Ptr<uint32_t> bins = scratch_ + kBinsAt;
    uint64_t prefix = 0;
    uint32_t remaining = static_cast<uint32_t>(count);
    for (int shift = 42; shift >= 0; shift -= 7) {
      for (int b = ThreadIndex(); b < kBins; b += BlockThreads()) Store(bins + b, 0u);
      Barrier();
      ForEach<true>(row_.k, [&](int64_t i, const float (&v)[8]) {
        const uint32_t valid = row_.Valid(i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint64_t key = static_cast<uint64_t>(Magnitude(v[j])) << kColumnBits | (kColumnMask - (i + j));
          if ((valid >> j & 1) && key >> (shift + 7) == prefix) AtomicAdd(bins + (key >> shift & (kBins - 1)), 1);
        }
      });
      Barrier();
      uint32_t h[4], sum = 0;
      for (int j = 0; j < 4; ++j) {
        h[j] = Load(bins + 4 * lane + j);
        sum += h[j];
      }
      uint32_t above = sum;  // of this lane's bins and all higher ones
      for (int d = 1; d < 32; d *= 2) {
        const uint32_t other = Shuffle(above, lane + d < 32 ? lane + d : lane);
        above += lane + d < 32 ? other : 0;
      }
      above -= sum;
      uint32_t digit = 0, before = 0;
#pragma unroll
      for (int j = 3; j >= 0; --j) {
        if (above < remaining && remaining <= above + h[j]) {
          digit = static_cast<uint32_t>(4 * lane + j);
          before = above;
        }
        above += h[j];
      }
      remaining -= WarpMax(before);
      prefix = prefix << 7 | WarpMax(digit);
      Barrier();
    }
    return {static_cast<uint32_t>(prefix >> kColumnBits), static_cast<int64_t>(kColumnMask - (prefix & kColumnMask))};
  }

  // No code needs clipping: the scale is at least absmax / limit rounded, so no rounded quotient passes limit + 1/2.
  JAXINT8_DEVICE void WriteCodes(const RowOutput& out, const Selection& selection, bool split, bool usable,
                                 float scale) {
    const float reciprocal = Divide(1.0f, scale);
    ForEach(out.stride, [&](int64_t i, const float (&v)[8]) {
      int32_t lo[8] = {}, hi[8] = {};
      uint32_t high = 0;
      if (usable && i < row_.k) {
        RoundedQuotients(v, scale, reciprocal, lo);
        uint32_t mask = 0;
        if (split) mask = options_.column_scope ? Marked(out.marks, i) : Outliers(selection, i, v);
        if (mask) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            hi[j] = mask >> j & 1 ? (lo[j] + 64) >> 7 : 0;
            high |= static_cast<uint32_t>(hi[j] != 0) << j;
            lo[j] -= 128 * hi[j];
          }
        }
      }
      Write(out.lo, out.stride, i, lo);
      if (out.hi) Write(out.hi, out.stride, i, hi);
      if (high) {
        if (out.used) SetBits(out.used, i, high);
        AtomicOr(pieces() + i / (32 * kPiece), 1u << (i / kPiece % 32));
      }
    });
  }

  static JAXINT8_DEVICE void Write(Ptr<int8_t> to, int64_t stride, int64_t i, const int32_t (&v)[8]) {
    if constexpr (kVector) {  // stride is a multiple of 8 as well
      const Word2 w{PackBytes(v[0], v[1], v[2], v[3]), PackBytes(v[4], v[5], v[6], v[7])};
      StoreAs<Word2>(to + i, w);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (i + j < stride) Store(to + i + j, static_cast<int8_t>(v[j]));
      }
    }
  }

  using Reader = RowReader<kType, kVector>;
  const Reader row_;
  typename Reader::Raw held_[kHeld > 0 ? kHeld : 1];
  const Options& options_;
  const Ptr<uint32_t> scratch_;
  int* const turn_;
  uint32_t own_ = 0;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_ROWS_H_
