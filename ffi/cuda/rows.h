// Quantises one row of activations with one block: statistics, outlier rule, codes. The row is looked at two to four
// times and read from device memory once: it stays in registers, or, if it is too long, in the first-level cache.
//
// Every statistic is a maximum, a count or an integer sum, so the codes do not depend on the number of threads.
#ifndef JAXINT8_FFI_CUDA_ROWS_H_
#define JAXINT8_FFI_CUDA_ROWS_H_

#include "device.h"
#include "int8.h"
#include "reader.h"
#include "sparse_codes.h"

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
inline constexpr int kResultAt = kGroupsAt + kGroups;  // number of candidates, their bound, magnitude, column
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
  // Beside hi: compressed high parts, and which row of them this is; or null.
  SparseCodes<uint8_t> sparse = {};
  int64_t row = 0;
};

// Which magnitudes of a row are outliers: those above the threshold, and those equal to it up to a column. Whether one
// below `sure` is an outlier is not certain, and has to be decided by a better threshold.
struct Selection {
  uint32_t threshold;
  int last;
  uint32_t sure = 0;
  JAXINT8_DEVICE bool Has(uint32_t magnitude, int column) const {
    return (magnitude > threshold) | ((magnitude == threshold) & (column <= last));
  }
};

// All threads of the block call every function, with the same arguments. kHeld: how many times eight elements every
// thread holds in registers, enough for the padded row; 0: none, the row is read again each time. kRule: the rule, -1
// if it is not known to the compiler: a kernel of one rule is smaller, and short ones wait for their instructions.
// kTokens: the rule is known not to be of column scope.
template <Type kType, bool kVector, int kHeld = 0, int kRule = -1, bool kTokens = false>
class RowBlock {
 public:
  JAXINT8_DEVICE RowBlock(Ptr<const uint8_t> data, int64_t k, const Options& options, Ptr<uint32_t> scratch, int* turn)
      : row_{data, static_cast<int>(k)}, options_(options), scratch_(scratch), turn_(turn) {
    static_assert(kVector || kHeld == 0);
#pragma unroll
    for (int c = 0; c < kHeld; ++c) {
      held_[c] = {};
      if (At(c) < k) held_[c] = row_.ReadRaw(At(c));
    }
  }

  // Sets the bits of this row's outliers in the marks; rows that are not finite have no say.
  JAXINT8_DEVICE void Mark(Ptr<uint32_t> marks) {
    const uint32_t absmax = Measure();
    if (absmax >= kInfinity) return;
    const Selection selection = Select(absmax, true);
    if (absmax < selection.threshold) return;
    ForEach(row_.k, [&](int i, uint32_t largest, auto values) {
      if (largest >= selection.threshold) SetBits(marks, i, Outliers(selection, i, values()));
    });
  }

  // Writes codes and returns the row scale, NaN if the row is not finite. Bits of `pieces` (in the scratch, zeroed by
  // the caller) are set where a piece of columns has high parts.
  JAXINT8_DEVICE float Quantize(const RowOutput& out) {
    const uint32_t absmax = Measure();
    const bool finite = absmax < kInfinity;
    Selection selection{kNothing, 0};
    Tally tally{0, finite ? absmax : 0, 0};
    if (finite && rule() != Rule::kNone) {
      const bool by_column = ByColumn();
#pragma unroll 1
      for (bool exact = false;; exact = true) {  // twice at most
        if (!by_column) selection = Select(absmax, exact);
        tally = {0, absmax, 0};
        if (!by_column && absmax < selection.threshold) break;
        tally = Count(selection, out.marks);
        if (tally.count < kUnsure) break;
      }
    }
    float scale = Divide(FloatFromBits(tally.rest), kCodeMax);
    int32_t limit = kOutlierCodeMax;
    if (tally.count > 0) {
      const auto count = static_cast<int32_t>(tally.count);  // below k, and 127 * kMaxK fits
      const int32_t room = static_cast<int32_t>(kSumOfCodesMax) - 127 * (row_.k - count);
      if (room < int64_t{limit} * count) limit = room / count;
      const float least = Divide(FloatFromBits(tally.outlier), IntToFloat(limit));
      scale = least > scale ? least : scale;
    }
    const bool usable = finite && scale >= kSmallestScale;
    scale = usable ? scale : 1.0f;
    WriteCodes(out, selection, usable && tally.count > 0, usable, scale);
    return finite ? scale : FloatFromBits(0x7fc00000);
  }

  JAXINT8_DEVICE Ptr<uint32_t> pieces() const { return scratch_ + kPiecesAt; }
  // Behind the scratch, if compressed high parts are wanted; likewise zeroed by the caller.
  JAXINT8_DEVICE Ptr<uint32_t> sparse_bits() const { return scratch_ + kScratchWords; }

 private:
  using Reader = RowReader<kType, kVector>;
  JAXINT8_DEVICE Rule rule() const { return kRule < 0 ? options_.rule : static_cast<Rule>(kRule); }
  JAXINT8_DEVICE bool ByColumn() const { return !kTokens && options_.column_scope; }
  struct Values {
    float v[8];
  };
  // Of a row: how many outliers, the largest magnitude of the rest and of the outliers.
  struct Tally {
    uint32_t count, rest, outlier;
  };
  static constexpr uint32_t kUnsure = 1 << 20;  // added to the count, which is smaller, where a value is not certain
  static_assert(kMaxK < kUnsure);

  static JAXINT8_DEVICE int At(int c) { return 8 * (ThreadIndex() + c * BlockThreads()); }

  // Calls body(i, largest, values) for this thread's groups of eight elements before `end`: values() are the elements,
  // 0 from k on, `largest` is their largest magnitude. kAgain: reads them again, for rare work that is better small
  // than fast.
  template <bool kAgain = false, typename Body>
  JAXINT8_DEVICE void ForEach(int end, Body body) {
    if constexpr (kHeld > 0 && !kAgain) {
#pragma unroll
      for (int c = 0; c < kHeld; ++c) {
        if (At(c) >= end) continue;
        body(At(c), Reader::LargestOf(held_[c]), [&, c] {
          Values values;
          Reader::Widen(held_[c], values.v);
          return values;
        });
      }
    } else {
#pragma unroll 1
      for (int i = 8 * ThreadIndex(); i < end; i += 8 * BlockThreads()) {
        if constexpr (kVector && !kAgain) {
          typename Reader::Raw raw{};
          if (i < row_.k) raw = row_.ReadRaw(i);
          body(i, Reader::LargestOf(raw), [&raw] {
            Values values;
            Reader::Widen(raw, values.v);
            return values;
          });
          continue;
        }
        Values values{};
        if (i < row_.k) row_.Read(i, values.v);
        uint32_t largest = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) largest = Magnitude(values.v[j]) > largest ? Magnitude(values.v[j]) : largest;
        body(i, largest, [&] { return values; });
      }
    }
  }

  JAXINT8_DEVICE uint32_t Outliers(const Selection& selection, int i, const Values& values) const {
    uint32_t mask = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) mask |= static_cast<uint32_t>(selection.Has(Magnitude(values.v[j]), i + j)) << j;
    return mask & row_.Valid(i);
  }

  static JAXINT8_DEVICE uint32_t Marked(Ptr<const uint32_t> marks, int i) {
    return Load(marks + (i >> 5)) >> (i & 31) & 0xff;  // i is a multiple of 8
  }

  static JAXINT8_DEVICE void SetBits(Ptr<uint32_t> bits, int i, uint32_t mask) {
    const uint32_t shifted = mask << (i & 31);
    // Most outliers stand in a few columns that others have marked before: look before taking the line.
    if (shifted & ~LoadRelaxed(bits + (i >> 5))) AtomicOr(bits + (i >> 5), shifted);
  }

  JAXINT8_DEVICE Ptr<uint32_t> NextBuffer() {
    *turn_ ^= 1;
    return scratch_ + *turn_ * (kReduceWords / 2);
  }

  // Returns the largest magnitude of the row. Leaves that of this thread in own_ and, for a relative rule, the sum of
  // the row's squares in squares_.
  JAXINT8_DEVICE uint32_t Measure() {
    const bool relative = rule() == Rule::kRelative;
    own_ = 0;
    float even = 0, odd = 0;
    ForEach(row_.k, [&](int, uint32_t largest, auto values) {
      own_ = largest > own_ ? largest : own_;
      if (!relative) return;
      const Values e = values();
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        even = MultiplyAdd(e.v[j], e.v[j], even);
        odd = MultiplyAdd(e.v[j + 1], e.v[j + 1], odd);
      }
    });
    const int lane = ThreadIndex() % 32, warp = ThreadIndex() / 32, warps = BlockThreads() / 32;
    const Ptr<uint32_t> buffer = NextBuffer();
    const uint32_t largest = WarpMax(own_);
    if (relative) {
      squares_ = WarpSumFloat(Add(even, odd));
      if (lane == 0) Store(buffer + 32 + warp, Bits(squares_));
    }
    if (lane == 0) Store(buffer + warp, largest);
    Barrier();
    if (relative) squares_ = WarpSumFloat(lane < warps ? FloatFromBits(Load(buffer + 32 + lane)) : 0);
    return WarpMax(lane < warps ? Load(buffer + lane) : 0);
  }

  static JAXINT8_DEVICE float WarpSumFloat(float v) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) v = Add(v, FloatFromBits(ShuffleXor(Bits(v), lanes)));
    return v;
  }

  JAXINT8_DEVICE Tally Count(const Selection& selection, Ptr<const uint32_t> marks) {
    const bool by_column = ByColumn();
    Tally t{0, 0, 0};
    ForEach(row_.k, [&](int i, uint32_t largest, auto values) {
      uint32_t mask = by_column ? Marked(marks, i) : 0;
      if (by_column ? mask == 0 : largest < selection.threshold) {  // nearly always
        t.rest = largest > t.rest ? largest : t.rest;
        return;
      }
      const Values e = values();
      if (!by_column) mask = Outliers(selection, i, e);
      t.count += static_cast<uint32_t>(PopulationCount(mask));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t a = Magnitude(e.v[j]);
        if (mask >> j & 1) {
          t.outlier = a > t.outlier ? a : t.outlier;
          if (a < selection.sure) t.count |= kUnsure;
        } else {
          t.rest = a > t.rest ? a : t.rest;
        }
      }
    });
    const int lane = ThreadIndex() % 32, warp = ThreadIndex() / 32, warps = BlockThreads() / 32;
    const Ptr<uint32_t> buffer = NextBuffer();
    t = {WarpSum(t.count), WarpMax(t.rest), WarpMax(t.outlier)};
    if (lane == 0) {
      Store(buffer + warp, t.count);
      Store(buffer + 32 + warp, t.rest);
      Store(buffer + 64 + warp, t.outlier);
    }
    Barrier();
    const bool has = lane < warps;
    return {WarpSum(has ? Load(buffer + lane) : 0), WarpMax(has ? Load(buffer + 32 + lane) : 0),
            WarpMax(has ? Load(buffer + 64 + lane) : 0)};
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

  // exact: with no magnitudes whose selection is not certain.
  JAXINT8_DEVICE Selection Select(uint32_t absmax, bool exact) {
    if (rule() == Rule::kTopK) return SelectTopK();
    if (rule() == Rule::kRelative) return SelectRelative(absmax, exact);
    return {options_.value > 0 ? Bits(options_.value) : 0, row_.k};
  }

  // The law computes the rms r of magnitudes rounded to units of absmax / 4095, less up to 4096 of the sum of squares.
  // With R the rms in such units from a plain sum of squares, R - 1/2 <= sqrt(r^2 + 4096 / k) and r <= R + 1/2: bounds
  // that decide for nearly all rows. All roundings together are far below the 2^-12 allowed for them here: those of
  // the sum, of at most 300 operations in a row, are the largest.
  JAXINT8_DEVICE Selection SelectRelative(uint32_t absmax, bool exact) {
    const float unit = Divide(FloatFromBits(absmax), kRmsLevels), k = IntToFloat(row_.k);
    if (!(unit >= kSmallestScale)) return {kNothing, 0};
    if (!exact && squares_ > 0x1p-80f && squares_ < 0x1p120f) {
      const float rms = Divide(SquareRoot(Divide(squares_, k)), unit);
      const float low = Add(rms, -0.51f), square = Add(Multiply(low, low), -Divide(4096.0f, k));
      const float scaled = Multiply(options_.value, unit);
      const float lower = low > 0 && square > 0 ? Multiply(Multiply(scaled, 1 - 0x1p-12f), SquareRoot(square)) : 0;
      const float upper = Multiply(Multiply(scaled, 1 + 0x1p-12f), Add(rms, 0.51f));
      return {lower > 0 ? Bits(lower) : 0, row_.k, upper > 0 ? Bits(upper) : 0};
    }
    // In units of 4096 squares, and 64 = sqrt(4096).
    const float mean = Divide(WideToFloat(static_cast<int64_t>(SumOfSquares(unit) >> 12)), k);
    const float threshold = Multiply(options_.value, Multiply(unit, Multiply(64.0f, SquareRoot(mean))));
    return {threshold > 0 ? Bits(threshold) : 0, row_.k};
  }

  JAXINT8_DEVICE uint64_t SumOfSquares(float unit) {
    uint64_t sum = 0;
    const float reciprocal = Divide(1.0f, unit);
    ForEach<true>(row_.k, [&](int, uint32_t, auto values) {
      uint32_t shifted[8];
      RoundedQuotients(values().v, unit, reciprocal, shifted);
      uint32_t part = 0;  // eight squares of 24 bits: no quotient is above 4095, but for its rounding
#pragma unroll
      for (int j = 0; j < 8; ++j) part += (shifted[j] - kMagicBits) * (shifted[j] - kMagicBits);
      sum += part;
    });
    return SumWide(sum);
  }

  JAXINT8_DEVICE Selection SelectTopK() {
    if (options_.topk >= row_.k) return {0, row_.k};
    const int count = static_cast<int>(options_.topk);
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
    Barrier();
    if (ThreadIndex() < 32) {
      const uint32_t bound = RankedLane(Load(scratch_ + kGroupsAt + lane), count - 1);
      if (lane == 0) {
        Store(result, 0u);
        Store(result + 1, bound);
      }
    }
    Barrier();
    const uint32_t bound = Load(result + 1);
    const Ptr<uint32_t> list = scratch_ + kCandidatesAt;
    ForEach(row_.k, [&](int i, uint32_t largest_here, auto values) {
      if (largest_here < bound) return;
      const Values e = values();
      for (uint32_t mask = Outliers({bound, row_.k}, i, e); mask; mask &= mask - 1) {
        const int j = LowestBit(mask);
        const uint32_t at = AtomicAdd(result, 1);
        if (at < kCandidates) StoreAs<Word2>(list + 2 * at, Word2{Pick(e.v, j), static_cast<uint32_t>(i + j)});
      }
    });
    Barrier();
    const uint32_t candidates = Load(result);
    if (candidates > kCandidates) return SelectByDigits(count);
    for (uint32_t e = static_cast<uint32_t>(ThreadIndex()); e < candidates; e += BlockThreads()) {
      const Word2 mine = LoadAs<Word2>(list + 2 * e);
      uint32_t rank = 0;
#pragma unroll 4
      for (uint32_t other = 0; other < candidates; ++other) {
        const Word2 a = LoadAs<Word2>(list + 2 * other);
        rank += a.x > mine.x || (a.x == mine.x && a.y < mine.y);
      }
      if (rank == static_cast<uint32_t>(count - 1)) {
        Store(result + 2, mine.x);
        Store(result + 3, mine.y);
      }
    }
    Barrier();
    return {Load(result + 2), static_cast<int>(Load(result + 3))};
  }

  // v[j] without an indexed register array.
  static JAXINT8_DEVICE uint32_t Pick(const float (&v)[8], int j) {
    uint32_t a = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) a = i == j ? Magnitude(v[i]) : a;
    return a;
  }

  // The value whose rank among the 32 lanes, largest first, is the given one.
  static JAXINT8_DEVICE uint32_t RankedLane(uint32_t v, int rank) {
    const int lane = ThreadIndex() % 32;
    int mine = 0;
    for (int j = 0; j < 32; ++j) {
      const uint32_t other = Shuffle(v, j);
      mine += other > v || (other == v && j < lane);
    }
    return WarpMax(mine == rank ? v : 0);
  }

  // Finds the count-th largest of the keys (magnitude, lower column first), which are all different, 7 bits at a time.
  JAXINT8_DEVICE Selection SelectByDigits(int count) {
    constexpr int kColumnBits = 18;
    constexpr uint32_t kColumnMask = (1u << kColumnBits) - 1;
    const int lane = ThreadIndex() % 32;
    const Ptr<uint32_t> bins = scratch_ + kBinsAt;
    uint64_t prefix = 0;
    uint32_t remaining = static_cast<uint32_t>(count);
    for (int shift = 42; shift >= 0; shift -= 7) {
      for (int b = ThreadIndex(); b < kBins; b += BlockThreads()) Store(bins + b, 0u);
      Barrier();
      ForEach<true>(row_.k, [&](int i, uint32_t, auto values) {
        const Values e = values();
        const uint32_t valid = row_.Valid(i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint64_t key = static_cast<uint64_t>(Magnitude(e.v[j])) << kColumnBits | (kColumnMask - (i + j));
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
    return {static_cast<uint32_t>(prefix >> kColumnBits), static_cast<int>(kColumnMask - (prefix & kColumnMask))};
  }

  // No code needs clipping: the scale is at least absmax / limit rounded, so no rounded quotient passes limit + 1/2.
  JAXINT8_DEVICE void WriteCodes(const RowOutput& out, const Selection& selection, bool split, bool usable,
                                 float scale) {
    const float reciprocal = Divide(1.0f, scale);
    ForEach(static_cast<int>(out.stride), [&](int i, uint32_t largest, auto values) {
      uint32_t lo[8] = {}, hi[8] = {};
      uint32_t high = 0;
      if (usable && i < row_.k) {
        const Values e = values();
        RoundedQuotients(e.v, scale, reciprocal, lo);
        uint32_t mask = 0;
        if (split) {
          if (ByColumn()) {
            mask = Marked(out.marks, i);
          } else if (largest >= selection.threshold) {
            mask = Outliers(selection, i, e);
          }
        }
        if (mask) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const auto code = static_cast<int32_t>(lo[j] - kMagicBits);
            hi[j] = static_cast<uint32_t>((code + 64) >> 7) & (0u - (mask >> j & 1));
            high |= static_cast<uint32_t>(hi[j] != 0) << j;
            lo[j] -= hi[j] << 7;
          }
        }
      }
      Write(out.lo, static_cast<int>(out.stride), i, lo);
      if (out.hi) Write(out.hi, static_cast<int>(out.stride), i, hi);
      if (out.sparse.codes) SparseRow(out.sparse, out.row).Put(i, hi, high, sparse_bits());
      if (high) {
        if (out.used) SetBits(out.used, i, high);
        AtomicOr(pieces() + i / (32 * static_cast<int>(kPiece)), 1u << (i / static_cast<int>(kPiece) % 32));
      }
    });
  }

  // Writes the low bytes.
  static JAXINT8_DEVICE void Write(Ptr<int8_t> to, int stride, int i, const uint32_t (&v)[8]) {
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

  const Reader row_;
  typename Reader::Raw held_[kHeld > 0 ? kHeld : 1];
  const Options& options_;
  const Ptr<uint32_t> scratch_;
  int* const turn_;
  uint32_t own_ = 0;
  float squares_ = 0;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_ROWS_H_
