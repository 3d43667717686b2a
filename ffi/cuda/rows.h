// Quantises one row of activations with a block, a part of one or a cluster of them: statistics, outlier rule, codes.
// The row is looked at two to four times where its groups are (groups.h): registers, or memory, which had better be
// shared.
//
// Every statistic is a maximum, a count or an integer sum, so the codes do not depend on the number of threads. What
// takes the time is the instructions, and where blocks are few, fetching them: loops are not unrolled.
#ifndef JAXINT8_FFI_CUDA_ROWS_H_
#define JAXINT8_FFI_CUDA_ROWS_H_

#include <type_traits>

#include "device.h"
#include "groups.h"
#include "int8.h"
#include "marks.h"
#include "reader.h"
#include "sparse_codes.h"
#include "team.h"

namespace jaxint8::cuda {

inline constexpr int32_t kCodeMax = 127;
inline constexpr int32_t kOutlierCodeMax = 127 * 128;
// 127 * sum(|codes of a row|) must stay below 2^31 for the int32 sum to be exact.
inline constexpr int64_t kSumOfCodesMax = ((int64_t{1} << 31) - 1) / 127;
// Below this a row counts as zero, so that nothing that flushes subnormals can see another row.
inline constexpr float kSmallestScale = 0x1p-125f;
inline constexpr int32_t kRmsLevels = 4095;
inline constexpr uint32_t kNothing = 0x7fffffff;  // a threshold above every finite magnitude
// High parts are looked up by pieces of this many columns: pieces without any are skipped.
inline constexpr int64_t kPiece = 256;
inline constexpr int kPieceWords = static_cast<int>((kMaxK / kPiece + 32) / 32);

// Up to this many largest values are found among the candidates above a bound; more, or too many ties, digit by digit.
inline constexpr int64_t kQuickTopK = 24;
inline constexpr int kCandidates = 32;
inline constexpr int kBins = 128;

// Where things lie in the shared memory of a team that quantises rows, in words.
struct RowScratch {
  static constexpr int kMaxima = kTeamWords;  // one a thread
  static constexpr int kBinsAt = kMaxima + 32 * kTeamMostWarps;
  static constexpr int kCount = kBinsAt + kBins;
  static constexpr int kList = kCount + 4;
  static constexpr int kOnce = kList + 2 * kCandidates;
  static constexpr int kPieces = kOnce + 4;
  static constexpr int kWords = (kPieces + kPieceWords + 31) / 32 * 32;
};
inline constexpr int kScratchWords = RowScratch::kWords;

// Where a row goes. Pointers to shared or device memory.
struct RowOutput {
  Ptr<int8_t> lo;  // [stride], columns from k on are set to 0
  Ptr<int8_t> hi;  // likewise, or null if the rule selects nothing
  int64_t stride;
  Ptr<const uint32_t> marks;  // column scope: see marks.h
  Ptr<uint32_t> used;         // bit per column, set where a high part is not 0; or null
  Ptr<uint32_t> pieces;       // [kPieceWords], zeroed: bits are set where a piece of columns has high parts; or null
  bool whole = false;         // a code that fits into a byte has no high part, as most of a marked column have
  static constexpr bool kSparse = false;
  // Or codes go where Send puts them, in the place of lo and hi, and high parts only where they are not 0.
  static constexpr bool kSent = false;
};
// The same with compressed high parts beside hi: a type of its own, as the others have less code without them.
struct SparseRowOutput : RowOutput {
  SparseRow sparse;
  static constexpr bool kSparse = true;
};

// Which magnitudes of a row are outliers: those above the threshold, and those equal to it up to a column.
struct Selection {
  uint32_t threshold;
  int last;
};

// In the place of a rule: the outliers are marked columns.
inline constexpr int kMarked = 4;

// All threads of the team call every function, with the same arguments. Between two rows with the same scratch there
// must be a barrier. kRule: the rule, of token scope; or kMarked; or -1, if it is not known to the compiler: a kernel
// of one rule is smaller.
template <typename Groups, int kRule = -1, typename AnyTeam = Team<>>
class Row {
 public:
  JAXINT8_DEVICE Row(const Groups& groups, const Options& options, Ptr<uint32_t> scratch, AnyTeam& team)
      : row_(groups), options_(options), scratch_(scratch), team_(team) {}

  // Sets the bits of this row's outliers in the marks; rows that are not finite have no say.
  JAXINT8_DEVICE void Mark(Ptr<uint32_t> marks) {
    const uint32_t absmax = team_.Max(OwnLargest());
    if (absmax >= kInfinity) return;
    const Selection selection = rule() == Rule::kRelative ? SelectRelative(absmax) : Fixed();
    if (absmax < selection.threshold) return;
    row_.ForEach([&](int i, const Group& group) {
      if (group.Largest() >= selection.threshold) SetBits(marks, i, BitsOf(Outliers(selection, i, group)));
    });
  }

  // Writes codes and returns the row scale, NaN if the row is not finite.
  template <typename Output>
  JAXINT8_DEVICE float Quantize(const Output& out) {
    Selection selection{kNothing, 0};
    const Tally tally = Measure(out, &selection);
    const bool finite = tally.absmax < kInfinity;
    const float rest = FloatFromBits(tally.rest);
    float scale = DivideBy<kCodeMax>(rest), middle = Multiply(rest, 0.5f);  // see CodeQuotients
    if (tally.count > 0) {
      const auto count = static_cast<int32_t>(tally.count);  // below k, and 127 * kMaxK fits
      const int32_t room = static_cast<int32_t>(kSumOfCodesMax) - 127 * (row_.k() - count);
      const float outlier = FloatFromBits(tally.outlier);
      const bool rooms = room >= int64_t{kOutlierCodeMax} * count;
      const float least = rooms ? DivideBy<kOutlierCodeMax>(outlier) : Divide(outlier, IntToFloat(room / count));
      if (least > scale) {
        scale = least;
        middle = rooms ? Multiply(outlier, 0x1p-8f) : 0;
      }
    }
    const bool usable = finite && scale >= kSmallestScale;
    if (usable) {
      WriteCodes(out, selection, tally.count > 0, scale, middle);
    } else {
      WriteAllZeros(out, 0);
      scale = 1;
    }
    return finite ? scale : FloatFromBits(0x7fc00000);
  }

 private:
  using Group = typename Groups::Group;
  using Scratch = RowScratch;
  struct Values {
    float v[8];
  };
  // Of a row: the largest magnitude of all, of the rest and of the outliers, and how many outliers there are. Of a row
  // that is not finite only the first means anything.
  struct Tally {
    uint32_t absmax, rest, outlier, count;
  };

  JAXINT8_DEVICE Rule rule() const { return kRule < 0 ? options_.rule : static_cast<Rule>(kRule); }
  JAXINT8_DEVICE bool ByColumn() const { return kRule == kMarked || (kRule < 0 && options_.column_scope); }

  static JAXINT8_DEVICE Values Widen(const Group& group) {
    Values values;
    group.Widen(values.v);
    return values;
  }
  static JAXINT8_DEVICE uint32_t Max(uint32_t a, uint32_t b) { return a > b ? a : b; }

  // A byte for each of a group: 0xff or 0.
  JAXINT8_DEVICE Word2 Outliers(const Selection& selection, int i, const Group& group) const {
    const auto all = group.All();
    Word2 mask = all.Reaching(Groups::Reader::Bound(selection.threshold));
    if constexpr (kRule < 0 || kRule == static_cast<int>(Rule::kTopK)) {
      if (i + 7 > selection.last) {
        const Word2 above = all.Reaching(Groups::Reader::Bound(selection.threshold + 1));
        const int count = selection.last + 1 - i;
        mask.x = above.x | (mask.x & FirstBytes(count));
        mask.y = above.y | (mask.y & FirstBytes(count - 4));
      }
    }
    if constexpr (!Groups::kVectors) {
      const Word2 valid = BytesOf(row_.Valid(i));
      mask.x &= valid.x;
      mask.y &= valid.y;
    }
    return mask;
  }
  static JAXINT8_DEVICE uint32_t FirstBytes(int count) {
    return count <= 0 ? 0 : count >= 4 ? ~0u : (1u << 8 * count) - 1;
  }

  static JAXINT8_DEVICE Word2 Marked(Ptr<const uint32_t> marks, int i) {
    return BytesOf(Load(marks + (i >> 5)) >> (i & 31) & 0xff);  // i is a multiple of 8
  }

  static JAXINT8_DEVICE void SetBits(Ptr<uint32_t> bits, int i, uint32_t mask) {
    SetMarks(bits + (i >> 5), mask << (i & 31));
  }

  JAXINT8_DEVICE Tally Measure(const RowOutput& out, Selection* selection) {
    if (ByColumn()) return Count(*selection, out.marks);
    switch (rule()) {
      case Rule::kThreshold:
        *selection = Fixed();
        return Count(*selection, {});
      case Rule::kTopK:
        return SelectTopK(selection);
      default:
        break;
    }
    const uint32_t own = OwnLargest(), absmax = team_.Max(own);
    if (rule() == Rule::kRelative && absmax < kInfinity) {
      *selection = SelectRelative(absmax);
      if (absmax >= selection->threshold) {  // then it is the largest of the outliers
        uint32_t t[3] = {own, 0, 0};
        if (own >= selection->threshold) CountOwn(*selection, {}, t);
        uint32_t v[2] = {t[0], t[2]};
        team_.template Reduce<1, 1>(v);
        return {absmax, v[0], absmax, v[1]};
      }
    }
    return {absmax, absmax, 0, 0};
  }

  // Of this thread's elements.
  JAXINT8_DEVICE uint32_t OwnLargest() const {
    uint32_t own = 0;
    row_.ForEachAndZeros([&](int, const Group& group) { own = Max(own, group.Largest()); });
    return own;
  }

  // By the marks, where the scope is the column, else by the selection: then the largest of all is an outlier, if any
  // is.
  JAXINT8_DEVICE Tally Count(const Selection& selection, Ptr<const uint32_t> marks) {
    uint32_t t[3];
    CountOwn(selection, marks, t);
    team_.template Reduce<2, 1>(t);
    return {Max(t[0], t[1]), t[0], t[1], t[2]};
  }

  // The largest of the rest, of the outliers or of all, and their number.
  JAXINT8_DEVICE void CountOwn(const Selection& selection, Ptr<const uint32_t> marks, uint32_t (&t)[3]) const {
    t[0] = t[1] = t[2] = 0;
    row_.ForEach([&](int i, const Group& group) {
      const uint32_t largest = group.Largest();
      Word2 mask{0, 0};
      if (ByColumn()) {
        mask = Marked(marks, i);
      } else {
        t[1] = Max(t[1], largest);
      }
      if (ByColumn() ? (mask.x | mask.y) == 0 : largest < selection.threshold) {  // nearly always
        t[0] = Max(t[0], largest);
        return;
      }
      if (!ByColumn()) mask = Outliers(selection, i, group);
      t[2] += static_cast<uint32_t>(PopulationCount(Nibbles(mask))) / 4;
      const auto all = group.All();
      t[0] = Max(t[0], Groups::Reader::LargerOf(all.LargestBut(mask)));
      if (ByColumn()) t[1] = Max(t[1], Groups::Reader::LargerOf(all.LargestBut({~mask.x, ~mask.y})));
    });
  }

  JAXINT8_DEVICE Selection Fixed() const { return {ThresholdBits(options_), row_.k()}; }

  // By the rms of magnitudes rounded to units of absmax / 4095, less up to 4096 of the sum of squares.
  JAXINT8_DEVICE Selection SelectRelative(uint32_t absmax) {
    const float unit = DivideBy<kRmsLevels>(FloatFromBits(absmax));
    if (!(unit >= kSmallestScale)) return {kNothing, 0};
    const auto quotients = Quotients<Groups::kType>::ForSquares(unit);
    const IntegerDivisor columns(row_.k());
    std::conditional_t<(Groups::kHeld > 0), uint32_t, uint64_t> own = 0;
    row_.ForEachAndZeros([&](int, const Group& group) {
      own += quotients.SumOfSquares(Widen(group).v);  // no quotient is above 4095 but for its rounding
    });
    // In units of 4096 squares, and 64 = sqrt(4096).
    static_assert(int64_t{kRmsLevels} * kRmsLevels / 4096 * kMaxK < int64_t{1} << 31);
    uint32_t sum[2] = {static_cast<uint32_t>(own) & 0xffff, static_cast<uint32_t>(own >> 16)};
    team_.Sums(sum);
    const float mean = columns.Divide(IntToFloat(static_cast<int32_t>(16 * sum[1] + (sum[0] >> 12))));
    const float threshold = Multiply(options_.value, Multiply(unit, Multiply(64.0f, SquareRoot(mean))));
    return {threshold > 0 ? Bits(threshold) : 0, row_.k()};
  }

  // The count largest are among the candidates that reach the (count + 1)-th largest maximum of 32 parts of the row;
  // and so is the largest of the rest.
  JAXINT8_DEVICE Tally SelectTopK(Selection* selection) {
    const int count = options_.topk < row_.k() ? static_cast<int>(options_.topk) : row_.k();
    const int lane = team_.Lane();
    const Ptr<uint32_t> candidates = scratch_ + Scratch::kCount, list = scratch_ + Scratch::kList;
    if (team_.IndexHere() == 0) Store(candidates, 0u);
    const bool quick = count < row_.k() && count <= kQuickTopK;
    const Ptr<uint32_t> maxima = scratch_ + Scratch::kMaxima;
    uint32_t own = OwnLargest();
    if constexpr (kOnce) {
      team_.Share(own, maxima);
    } else {
      own = team_.MaxOfParts(own, maxima);
    }
    const Word4 first = Once([&] {
      if constexpr (kOnce) own = team_.MaxOfShared(own, maxima);
      return Word4{WarpMax(own), quick ? RankedLane(own, static_cast<uint32_t>(count)) : 0, 0, 0};
    });
    const uint32_t absmax = first.x;
    if (absmax >= kInfinity || absmax == 0) return {absmax, absmax, 0, 0};
    if (quick) {
      const uint32_t bound = first.y;
      row_.ForEach([&](int i, const Group& group) {
        if (group.Largest() < bound) return;
        const Values e = Widen(group);
        const uint32_t mask = BitsOf(Outliers({bound, row_.k() + 8}, i, group));
        uint32_t at = AtomicAdd(candidates, static_cast<uint32_t>(PopulationCount(mask)));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (!(mask >> j & 1)) continue;
          if (at < kCandidates) StoreAs<Word2>(list + 2 * at, Word2{Magnitude(e.v[j]), static_cast<uint32_t>(i + j)});
          ++at;
        }
      });
      team_.Sync();
      const auto here = static_cast<int>(Load(candidates));
      Word2 mine{0, kNothing};
      if (!kOnce && lane < here) mine = LoadAs<Word2>(list + 2 * lane);
      const int found = team_.Collect(here, &mine);
      if (found <= kCandidates) {
        const Word4 last = Once([&] {
          if (kOnce && lane < here) mine = LoadAs<Word2>(list + 2 * lane);
          int rank = 0;
#pragma unroll 4
          for (int other = 0; other < found; ++other) {
            Word2 a;
            if constexpr (AnyTeam::kSpread) {
              a = {Shuffle(mine.x, other), Shuffle(mine.y, other)};
            } else {
              a = LoadAs<Word2>(list + 2 * other);
            }
            rank += a.x > mine.x || (a.x == mine.x && a.y < mine.y);
          }
          const bool last = lane < found && rank == count - 1, next = lane < found && rank == count;
          return Word4{WarpMax(last ? mine.x : 0), WarpMax(last ? mine.y : 0), WarpMax(next ? mine.x : 0), 0};
        });
        *selection = {last.x, static_cast<int>(last.y)};
        return {absmax, last.z, absmax, static_cast<uint32_t>(count)};
      }
    }
    *selection = {0, row_.k()};
    if (count < row_.k()) *selection = SelectByDigits(count);
    return Count(*selection, {});
  }

  // What every warp would find for itself: where many rows are under way, one warp does and tells the others. Has a
  // barrier then; there must be one between two calls.
  static constexpr bool kOnce = Groups::kHeld > 1;
  template <typename Find>
  JAXINT8_DEVICE Word4 Once(Find find) {
    if constexpr (!kOnce) return find();
    const Ptr<uint32_t> words = scratch_ + Scratch::kOnce;
    if (team_.Warp() == 0) {
      const Word4 found = find();
      if (team_.Lane() == 0) StoreAs<Word4>(words, found);
    }
    team_.Sync();
    return LoadAs<Word4>(words);
  }

  // A bound that the values of more than `rank` lanes reach, as high as values without their last five bits allow.
  static JAXINT8_DEVICE uint32_t RankedLane(uint32_t v, uint32_t rank) {
    const uint32_t key = (v & ~31u) | static_cast<uint32_t>(ThreadIndex() % 32);  // all different
    uint32_t mine = 0;
#pragma unroll 8
    for (int j = 0; j < 32; ++j) mine += Shuffle(key, j) > key;
    return WarpMax(mine == rank ? key & ~31u : 0);
  }

  // Finds the count-th largest of the keys (magnitude, lower column first), which are all different, 7 bits at a time.
  JAXINT8_DEVICE Selection SelectByDigits(int count) {
    constexpr int kColumnBits = 18;
    constexpr uint32_t kColumnMask = (1u << kColumnBits) - 1;
    const int lane = team_.Lane();
    const Ptr<uint32_t> bins = scratch_ + Scratch::kBinsAt;
    uint64_t prefix = 0;
    uint32_t remaining = static_cast<uint32_t>(count);
    for (int shift = 42; shift >= 0; shift -= 7) {
      for (int b = team_.IndexHere(); b < kBins; b += team_.SizeHere()) Store(bins + b, 0u);
      team_.Sync();
      row_.ForEach([&](int i, const Group& group) {
        const Values e = Widen(group);
        const uint32_t valid = row_.Valid(i);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint64_t key = static_cast<uint64_t>(Magnitude(e.v[j])) << kColumnBits | (kColumnMask - (i + j));
          if ((valid >> j & 1) && key >> (shift + 7) == prefix) AtomicAdd(bins + (key >> shift & (kBins - 1)), 1);
        }
      });
      team_.Sync();
      uint32_t h[4], sum = 0;
      for (int j = 0; j < 4; ++j) h[j] = Load(bins + 4 * lane + j);
      team_.SumOfLanes(h);
      for (int j = 0; j < 4; ++j) sum += h[j];
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
      team_.Sync();
    }
    return {static_cast<uint32_t>(prefix >> kColumnBits), static_cast<int>(kColumnMask - (prefix & kColumnMask))};
  }

  // No code needs clipping: the scale is at least absmax / limit rounded, so no rounded quotient passes limit + 1/2.
  template <typename Output>
  JAXINT8_DEVICE void WriteCodes(const Output& out, const Selection& selection, bool split, float scale, float middle) {
    const CodeQuotients<Groups::kType> quotients(scale, middle);
    const bool exact = !(kRule == 0 && quotients.kPlainByAll) && !quotients.Plain();
    // Of several groups a thread, which have no pieces, used columns are told at the end.
    constexpr bool kLate = Groups::kHeld > 1 && !Output::kSent;
    static_assert(!kLate || Groups::kHeld <= 4);
    uint32_t late = 0;  // columns with high parts, eight bits a group
    row_.ForEach([&](int i, const Group& group) {
      const Values e = Widen(group);
      uint32_t codes[8];
      Word2 mask{0, 0};
      if (kRule != 0 && split) {
        if (ByColumn()) {
          mask = Marked(out.marks, i);
        } else if (group.Largest() >= selection.threshold) {
          mask = Outliers(selection, i, group);
        }
      }
      Word2 lo;
      const bool some = (mask.x | mask.y) != 0;
      if (Groups::kHeld > 1 ? SomeLane(exact | some) : exact | some) {  // a warp goes one way: both would take the sum
        quotients.Round(e.v, codes);
        lo = LowBytes(codes);
        if (kRule == 0 || (kRule < 0 && !some)) {
          WriteNoHigh(out, i);
        } else {
          const uint32_t high = Split(out, i, mask, codes, &lo);
          if constexpr (kLate) {
            late |= high << 8 * ((i - row_.Column(0)) / Groups::kApart);
          } else {
            Tell(out, i, high);
          }
        }
      } else {
        quotients.RoundSmall(e.v, codes);
        lo = LowBytes(codes);
        WriteNoHigh(out, i);
      }
      WriteLow(out, i, lo);
    });
    if constexpr (kLate) {
      if (late && out.used) {  // not in the loop, where each load would be waited for
        uint32_t now[Groups::kHeld];
#pragma unroll
        for (int j = 0; j < Groups::kHeld; ++j) {
          if (late >> 8 * j & 0xff) now[j] = LoadRelaxed(out.used + (row_.Column(j) >> 5));
        }
#pragma unroll
        for (int j = 0; j < Groups::kHeld; ++j) {
          const int i = row_.Column(j);
          const uint32_t bits = (late >> 8 * j & 0xff) << (i & 31);
          if (bits && (bits & ~now[j])) AtomicOr(out.used + (i >> 5), bits);
        }
      }
    }
    WriteAllZeros(out, (row_.k() + 7) / 8 * 8);
  }

  template <typename Output>
  static JAXINT8_DEVICE void Tell(const Output& out, int i, uint32_t high) {
    if (!high) return;
    if (out.used) SetBits(out.used, i, high);
    const int piece = i / static_cast<int>(kPiece);
    if (out.pieces) AtomicOr(out.pieces + piece / 32, 1u << piece % 32);
  }

  // Of the outliers in a group: writes the high parts, and takes them from the codes. Returns which are not 0.
  template <typename Output>
  JAXINT8_DEVICE uint32_t Split(const Output& out, int i, Word2 mask, const uint32_t (&codes)[8], Word2* lo) {
    if (ByColumn() && out.whole) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int32_t code = Quotients<Groups::kType>::Integer(codes[j]);
        if (code >= -127 && code <= 127) (j < 4 ? mask.x : mask.y) &= ~(255u << 8 * (j % 4));
      }
    }
    uint32_t parts[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) parts[j] = (codes[j] + 64) >> 7;
    Word2 hi = LowBytes(parts);
    hi.x &= mask.x;
    hi.y &= mask.y;
    // Of a code without 128 times its high part, the last byte differs at most in its first bit.
    lo->x ^= (hi.x & 0x01010101) << 7;
    lo->y ^= (hi.y & 0x01010101) << 7;
    WriteHigh(out, i, hi);
    const uint32_t high = BitsOfBytes(hi.x) | BitsOfBytes(hi.y) << 4;
    if constexpr (Output::kSparse) out.sparse.Put(i, hi, high);
    return high;
  }

  // Zeros from a multiple of 8 on, each thread in its own columns.
  template <typename Output>
  JAXINT8_DEVICE void WriteAllZeros(const Output& out, int from) {
    const int stride = static_cast<int>(out.stride);
    if (from >= stride) return;
#pragma unroll 1
    for (int i = 8 * team_.Index(); i < stride; i += 8 * team_.Size()) {
      if (i < from) continue;
      WriteLow(out, i, Word2{0, 0});
      WriteNoHigh(out, i);
    }
  }
  template <typename Output>
  static JAXINT8_DEVICE void WriteNoHigh(const Output& out, int i) {
    if constexpr (Output::kSent) return;
    if (kRule > 0 || out.hi) WriteHigh(out, i, Word2{0, 0});  // a rule has high parts
    if constexpr (Output::kSparse) out.sparse.PutZeros(i);
  }

  static JAXINT8_DEVICE Word2 LowBytes(const uint32_t (&v)[8]) {
    return {PackBytes(v[0], v[1], v[2], v[3]), PackBytes(v[4], v[5], v[6], v[7])};
  }
  // A byte of 0xff or 0 for each of eight bits, and a bit of each such byte.
  static JAXINT8_DEVICE Word2 BytesOf(uint32_t bits) {
    return {255 * ((bits & 0xf) * 0x204081 & 0x01010101), 255 * ((bits >> 4) * 0x204081 & 0x01010101)};
  }
  static JAXINT8_DEVICE uint32_t Nibbles(const Word2& bytes) { return (bytes.x & 0x0f0f0f0f) | (bytes.y & 0xf0f0f0f0); }
  static JAXINT8_DEVICE uint32_t BitsOf(const Word2& bytes) {
    const uint32_t one = (bytes.x & 0x01010101) | (bytes.y & 0x10101010);
    return one * 0x01020408 >> 24;
  }
  // A bit for each byte that is not 0.
  static JAXINT8_DEVICE uint32_t BitsOfBytes(uint32_t bytes) {
    const uint32_t set = (((bytes & 0x7f7f7f7f) + 0x7f7f7f7f) | bytes) & 0x80808080;
    return (set >> 7) * 0x01020408 >> 24;
  }

  template <typename Output>
  static JAXINT8_DEVICE void WriteLow(const Output& out, int i, const Word2& bytes) {
    if constexpr (Output::kSent) {
      out.Send(i, 0, bytes);
    } else {
      Write(out.lo, static_cast<int>(out.stride), i, bytes);
    }
  }
  template <typename Output>
  static JAXINT8_DEVICE void WriteHigh(const Output& out, int i, const Word2& bytes) {
    if constexpr (Output::kSent) {
      if ((bytes.x | bytes.y) != 0) out.Send(i, 1, bytes);
    } else {
      Write(out.hi, static_cast<int>(out.stride), i, bytes);
    }
  }

  static JAXINT8_DEVICE void Write(Ptr<int8_t> to, int stride, int i, const Word2& bytes) {
    if constexpr (Groups::kVectors) {  // stride is a multiple of 8 as well
      StoreAs<Word2>(to + i, bytes);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (i + j < stride) Store(to + i + j, static_cast<int8_t>((j < 4 ? bytes.x : bytes.y) >> 8 * (j % 4)));
      }
    }
  }

  const Groups& row_;
  const Options& options_;
  const Ptr<uint32_t> scratch_;
  AnyTeam& team_;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_ROWS_H_
