// One token's attention to an int8 cache, for each sequence: its key and value are rotated, spread and stored as codes,
// and its query heads attend to all that they see.
//
// A key-value head of a sequence is a block's, or a cluster's where there are few; a warp takes 32 slots at a time,
// with a maximum and sums of its own, so nobody waits for anybody until the end. Both products are those of bytes: a
// query is an integer of 15 bits, 128 * hi + lo, as outliers are, and so are the shares of 32 slots. Of the 16 rows of
// an Mma eight are high parts, and eight low ones of the same heads. Slots and dimensions are in an order in which each
// thread loads bytes that lie side by side and has the shares of just the slots whose values it loads.
#ifndef JAXINT8_FFI_CUDA_ATTEND_H_
#define JAXINT8_FFI_CUDA_ATTEND_H_

#include <cstdint>

#include "device.h"
#include "hopper.h"
#include "int8.h"
#include "prologue.h"
#include "reader.h"
#include "rows.h"

namespace jaxint8::cuda {

inline constexpr int kAttendWarps = 4, kAttendThreads = 32 * kAttendWarps;
inline constexpr int kAttendSlots = 32;      // of a warp at a time
inline constexpr int kAttendMostBlocks = 8;  // of a cluster
inline constexpr float kAttendLevels = 127 * 128;

// How many blocks share a key-value head of a sequence: as many as run at once, two on a multiprocessor, if each has
// something to do.
inline int ChooseAttendBlocks(const Attention& a, int64_t multiprocessors) {
  const int64_t heads = a.rows * a.kv_heads;
  int blocks = 1;
  while (blocks < kAttendMostBlocks && 2 * blocks * heads <= 2 * multiprocessors && a.slots >= 2 * blocks * 64) {
    blocks *= 2;
  }
  return blocks;
}

struct AttendParams {
  Ptr<const uint8_t> qkv;          // [rows][(queries + 2) * kv_heads][d], of the type
  Ptr<const float> cosine, sine;   // [rows][d / 2], or null
  Ptr<const int32_t> start, slot;  // [rows], [1]
  Ptr<int8_t> keys;                // [rows][kv_heads][slots][d]
  Ptr<float> key_scale;            // [rows][kv_heads][slots]
  Ptr<int8_t> values;              // [rows][kv_heads][d][slots]
  Ptr<float> value_scale;          // [rows][kv_heads][slots]
  Ptr<uint8_t> y;                  // [rows][queries * kv_heads][d], of the type
  Type type;
  int kv_heads, queries, slots, blocks;
  float scale;  // of scores, for a query and keys that have been spread
};

// kClustered: several blocks share a head, which are neighbours in the grid.
template <int kDim, bool kClustered>
class AttendKernel {
 public:
  using Params = AttendParams;
  static constexpr int kMaxThreads = kAttendThreads;
  static constexpr int kMinBlocks = 2;

 private:
  static constexpr int kPieces = kDim / 64;  // 16 bytes of a key for each of four threads
  static constexpr int kElements = kDim / 32;
  static constexpr int kFours = kDim / 4;  // of the outputs of a head
  static_assert(kDim == 64 || kDim == 128);

  // Shared memory: codes of the queries, their scales, and of each warp (later of each block) the sums of each head,
  // and its maximum and sum of exponentials.
  static constexpr int kCodes = 0, kScales = 16 * kDim, kStats = kScales + 4 * kAttendQueries;
  static constexpr int kSums = kStats + 8 * kAttendWarps * kAttendQueries;
  static constexpr int kSumBytes = 4 * kAttendQueries * kDim;
  static constexpr int kBarrier = kSums + kAttendWarps * kSumBytes;
  static constexpr int kOfBlocks = kBarrier + 16;
  // Of another block: the sums of its heads by fours, then for each head its maximum and sum.
  static constexpr int kOfBlock = kSumBytes + 16 * kAttendQueries;

 public:
  static constexpr int64_t kShared = kOfBlocks + (kClustered ? (kAttendMostBlocks - 1) * kOfBlock : 0);

  static JAXINT8_DEVICE void Run(const Params& p) {
    AskForParameters(p);
    AttendKernel(p).Attend();
  }

 private:
  JAXINT8_DEVICE explicit AttendKernel(const Params& p)
      : p_(p),
        shared_(SharedMemory()),
        warp_(static_cast<int>(static_cast<unsigned>(ThreadIndex()) / 32)),
        lane_(static_cast<int>(static_cast<unsigned>(ThreadIndex()) % 32)) {
    const auto block = static_cast<unsigned>(BlockIndex());
    const unsigned unit = kClustered ? block / static_cast<unsigned>(p.blocks) : block;
    rank_ = kClustered ? static_cast<int>(block - unit * static_cast<unsigned>(p.blocks)) : 0;
    row_ = static_cast<int>(unit / static_cast<unsigned>(p.kv_heads));
    head_ = static_cast<int>(unit) - row_ * p.kv_heads;
    const int64_t first = static_cast<int64_t>(unit) * p.slots;
    keys_ = p.keys + first * kDim;
    values_ = p.values + first * kDim;
    key_scale_ = p.key_scale + first;
    value_scale_ = p.value_scale + first;
  }

  struct Loaded {
    Word4 keys[4][kPieces];
    Word2 values[kDim / 8];
    Word4 key_scale[2], value_scale[2];
  };

  // What of 32 slots is this thread's: of the keys of four, 16 bytes a piece, and of the values of eight those of a
  // dimension in eight.
  JAXINT8_DEVICE void Load32(int first, Loaded& loaded) const {
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = first + 8 * (g / 2) + 2 * i + g % 2;
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        loaded.keys[i][j] = LoadAs<Word4>(keys_ + (static_cast<int64_t>(slot) * kDim + 64 * j + 16 * t));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      loaded.key_scale[i] = LoadAs<Word4>(key_scale_ + (first + 8 * t + 4 * i));
      loaded.value_scale[i] = LoadAs<Word4>(value_scale_ + (first + 8 * t + 4 * i));
    }
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      loaded.values[i] = LoadAs<Word2>(values_ + (static_cast<int64_t>(8 * i + g) * p_.slots + first + 8 * t));
    }
  }

  JAXINT8_DEVICE void Attend() {
    if constexpr (kClustered) {
#ifdef JAXINT8_HOPPER
      if (ThreadIndex() == 0) {
        InitBarrier(Address(kBarrier), 1);
        FenceBarrierInit();
      }
      ClusterArrive();
#endif
    }
    WaitForPreviousKernel();
    AllowNextKernel();
    start_ = Load(p_.start + row_);
    slot_ = Load(p_.slot);
    if (slot_ >= p_.slots) slot_ = p_.slots - 1;  // as XLA's own updates do where there is no room
    const int first = start_ / kAttendSlots, last = slot_ / kAttendSlots;
    const int step = kAttendWarps * (kClustered ? p_.blocks : 1);
    int group = first + kAttendWarps * rank_ + warp_;
    // What is there already is asked for before anything else is done.
    Loaded loaded;
    const bool early = group < last;
    if (early) Load32(kAttendSlots * group, loaded);
    const bool owner = !kClustered || (last - first) / kAttendWarps % p_.blocks == rank_;
    Enter(owner);
    Barrier();
    if (!early && group <= last) Load32(kAttendSlots * group, loaded);
    Word4 query[2][kPieces];  // high parts of a head, and low ones
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        query[i][j] = LoadAs<Word4>(shared_ + (kCodes + (8 * i + lane_ / 4) * kDim + 64 * j + 16 * (lane_ % 4)));
      }
    }
    query_scale_ = FloatFromBits(LoadAs<uint32_t>(shared_ + (kScales + 4 * (lane_ / 4))));
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) sums_[i][0] = sums_[i][1] = 0;
#pragma unroll 1
    for (; group <= last; group += step) {
      float shares[8];
      Score(kAttendSlots * group, query, loaded, shares);
      AddValues(shares, loaded);
      if (group + step <= last) Load32(kAttendSlots * (group + step), loaded);
    }
    Finish();
  }

  // Rotates, spreads and quantises: a warp a vector, of which a lane has every 32nd element. The query heads first.
  JAXINT8_DEVICE void Enter(bool owner) const {
    for (int i = p_.queries + warp_; i < kAttendQueries; i += kAttendWarps) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Ptr<uint8_t> row = shared_ + (kCodes + (8 * j + i) * kDim);
        if (lane_ < kDim / 16) StoreAs<Word4>(row + 16 * lane_, Word4{0, 0, 0, 0});
      }
      if (lane_ == 0) StoreAs<uint32_t>(shared_ + (kScales + 4 * i), 0);
    }
#pragma unroll 1
    for (int i = warp_; i < p_.queries + 2; i += kAttendWarps) {
      const int heads = p_.queries * p_.kv_heads;
      const bool is_value = i == p_.queries + 1, is_key = i == p_.queries;
      if ((is_value || is_key) && !owner) continue;
      const int vector = is_value ? heads + p_.kv_heads + head_ : is_key ? heads + head_ : p_.queries * head_ + i;
      float v[kElements];
      Read(vector, v);
      if (!is_value) {
        if (p_.cosine) Rotate(v);
        Spread(v);
      }
      uint32_t magnitude = 0;
#pragma unroll
      for (int j = 0; j < kElements; ++j) magnitude = Magnitude(v[j]) > magnitude ? Magnitude(v[j]) : magnitude;
      magnitude = WarpMax(magnitude);
      const bool finite = magnitude < kInfinity;
      const float raw = Divide(FloatFromBits(magnitude), is_key || is_value ? 127.0f : kAttendLevels);
      const bool usable = finite && raw >= kSmallestScale;
      const float scale = usable ? raw : 1.0f;
      int32_t codes[kElements];
#pragma unroll
      for (int j = 0; j < kElements; ++j) codes[j] = usable ? RoundToInt(Divide(v[j], scale)) : 0;
      const float said = finite ? scale : FloatFromBits(0x7fc00000);
      if (is_key || is_value) {
        StoreCodes(codes, said, is_value);
      } else {
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          const int32_t high = (codes[j] + 64) >> 7;
          const int at = i * kDim + lane_ + 32 * j;
          StoreAs<uint8_t>(shared_ + (kCodes + at), static_cast<uint8_t>(high));
          StoreAs<uint8_t>(shared_ + (kCodes + 8 * kDim + at), static_cast<uint8_t>(codes[j] - 128 * high));
        }
        if (lane_ == 0) StoreAs<uint32_t>(shared_ + (kScales + 4 * i), Bits(Multiply(said, p_.scale)));
      }
    }
  }

  JAXINT8_DEVICE void StoreCodes(const int32_t (&codes)[kElements], float scale, bool is_value) const {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int at = lane_ + 32 * j;
      if (is_value) {
        Store(values_ + (static_cast<int64_t>(at) * p_.slots + slot_), static_cast<int8_t>(codes[j]));
      } else {
        Store(keys_ + (static_cast<int64_t>(slot_) * kDim + at), static_cast<int8_t>(codes[j]));
      }
    }
    if (lane_ == 0) Store((is_value ? value_scale_ : key_scale_) + slot_, scale);
  }

  JAXINT8_DEVICE void Read(int vector, float (&v)[kElements]) const {
    const int heads = (p_.queries + 2) * p_.kv_heads;
    const int64_t first = (static_cast<int64_t>(row_) * heads + vector) * kDim;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int64_t at = first + lane_ + 32 * j;
      if (p_.type == Type::kF32) {
        v[j] = FloatFromBits(LoadAs<uint32_t>(p_.qkv + 4 * at));
      } else {
        const uint32_t bits = LoadAs<uint16_t>(p_.qkv + 2 * at);
        v[j] = p_.type == Type::kBF16 ? FloatFromBits(bits << 16) : HalfToFloat(static_cast<uint16_t>(bits));
      }
    }
  }

  JAXINT8_DEVICE float Rounded(float x) const {
    if (p_.type == Type::kBF16) return FloatFromBits(static_cast<uint32_t>(FloatToBFloat(x)) << 16);
    return p_.type == Type::kF16 ? HalfToFloat(FloatToHalf(x)) : x;
  }

  JAXINT8_DEVICE void Rotate(float (&v)[kElements]) const {
    constexpr int kHalf = kElements / 2;
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      const int64_t at = static_cast<int64_t>(row_) * (kDim / 2) + lane_ + 32 * j;
      const float c = Load(p_.cosine + at), s = Load(p_.sine + at), first = v[j], second = v[j + kHalf];
      v[j] = Rounded(Add(Multiply(first, c), -Multiply(second, s)));
      v[j + kHalf] = Rounded(Add(Multiply(second, c), Multiply(first, s)));
    }
  }

  // See jaxint8/vectors.py: neighbours first.
  JAXINT8_DEVICE void Spread(float (&v)[kElements]) const {
#pragma unroll
    for (int span = 1; span < 32; span *= 2) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const float other = FloatFromBits(ShuffleXor(Bits(v[j]), span));
        v[j] = (lane_ & span) != 0 ? Add(other, -v[j]) : Add(v[j], other);
      }
    }
#pragma unroll
    for (int span = 1; span < kElements; span *= 2) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        if ((j & span) != 0) continue;
        const float first = v[j], second = v[j + span];
        v[j] = Add(first, second);
        v[j + span] = Add(first, -second);
      }
    }
  }

  static JAXINT8_DEVICE float LargestOfFour(float x) {
    x = Larger(x, FloatFromBits(ShuffleXor(Bits(x), 1)));
    return Larger(x, FloatFromBits(ShuffleXor(Bits(x), 2)));
  }

  static JAXINT8_DEVICE float Exp(float x) { return Exponential(Larger(x, -87.0f)); }

  // The shares of eight slots, from first + 8 * (lane % 4) on, of head lane / 4: exponentials times scales of values.
  // What is summed up so far is made to fit a larger maximum.
  JAXINT8_DEVICE void Score(int first, const Word4 (&query)[2][kPieces], const Loaded& loaded, float (&shares)[8]) {
    int32_t scores[4][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const Word4 &high = query[0][j], &low = query[1][j], &key = loaded.keys[i][j];
        Mma(scores[i], high.x, low.x, high.y, low.y, key.x, key.y);
        Mma(scores[i], high.z, low.z, high.w, low.w, key.z, key.w);
      }
    }
    const uint32_t key_scale[8] = {loaded.key_scale[0].x, loaded.key_scale[0].y, loaded.key_scale[0].z,
                                   loaded.key_scale[0].w, loaded.key_scale[1].x, loaded.key_scale[1].y,
                                   loaded.key_scale[1].z, loaded.key_scale[1].w};
    const uint32_t value_scale[8] = {loaded.value_scale[0].x, loaded.value_scale[0].y, loaded.value_scale[0].z,
                                     loaded.value_scale[0].w, loaded.value_scale[1].x, loaded.value_scale[1].y,
                                     loaded.value_scale[1].z, loaded.value_scale[1].w};
    const int mine = first + 8 * (lane_ % 4);
    float largest = kLowest;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int32_t sum = 128 * scores[i / 2][i % 2] + scores[i / 2][2 + i % 2];
      shares[i] = Multiply(Multiply(IntToFloat(sum), query_scale_), FloatFromBits(key_scale[i]));
      if (Seen(mine + i)) largest = Larger(largest, shares[i]);
    }
    const float before = maximum_;
    maximum_ = Larger(maximum_, LargestOfFour(largest));
    const float fit = Exp(Add(before, -maximum_));
    float exponentials = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float score = shares[i];
      shares[i] = 0;
      if (!Seen(mine + i)) continue;
      const float e = Exp(Add(score, -maximum_));
      shares[i] = Multiply(e, FloatFromBits(value_scale[i]));
      // What is no number must not get lost on the way.
      exponentials = Add(exponentials, Add(e, Add(Add(score, -score), Add(shares[i], -shares[i]))));
    }
    exponentials_ = MultiplyAdd(exponentials_, fit, exponentials);
    fit_ = fit;
  }

  JAXINT8_DEVICE bool Seen(int slot) const { return slot >= start_ && slot <= slot_; }

  JAXINT8_DEVICE void AddValues(const float (&shares)[8], const Loaded& loaded) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = Larger(largest, shares[i]);
    largest = LargestOfFour(largest);
    const bool usable = largest >= 0x1p-100f && largest < 0x1p126f;
    const float levels = usable ? Divide(kAttendLevels, largest) : 0.0f;
    const float unit = usable ? Multiply(largest, 1.0f / kAttendLevels) : 0.0f;
    uint32_t high[8], low[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int32_t code = shares[i] > 0 ? RoundToInt(Multiply(shares[i], levels)) : 0;
      const int32_t upper = (code + 64) >> 7;
      high[i] = static_cast<uint32_t>(upper);
      low[i] = static_cast<uint32_t>(code - 128 * upper);
    }
    const uint32_t a0 = PackBytes(high[0], high[1], high[2], high[3]);
    const uint32_t a1 = PackBytes(low[0], low[1], low[2], low[3]);
    const uint32_t a2 = PackBytes(high[4], high[5], high[6], high[7]);
    const uint32_t a3 = PackBytes(low[4], low[5], low[6], low[7]);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      int32_t c[4] = {};
      Mma(c, a0, a1, a2, a3, loaded.values[i].x, loaded.values[i].y);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float added = Multiply(IntToFloat(128 * c[j] + c[2 + j]), unit);
        sums_[i][j] = MultiplyAdd(sums_[i][j], fit_, added);
      }
    }
  }

  // --- The end: warps, then blocks.

  struct Stats {
    float maximum, exponentials;
  };

  JAXINT8_DEVICE void Finish() {
    const int g = lane_ / 4, t = lane_ % 4;
    exponentials_ = Add(exponentials_, FloatFromBits(ShuffleXor(Bits(exponentials_), 1)));
    exponentials_ = Add(exponentials_, FloatFromBits(ShuffleXor(Bits(exponentials_), 2)));
    if (g < p_.queries) {
      const Ptr<uint8_t> mine = shared_ + (kSums + warp_ * kSumBytes + 4 * (g * kDim + 2 * t));
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) StoreAs<Word2>(mine + 32 * i, Word2{Bits(sums_[i][0]), Bits(sums_[i][1])});
      if (t == 0) {
        const Word2 stats{Bits(maximum_), Bits(exponentials_)};
        StoreAs<Word2>(shared_ + (kStats + 8 * (warp_ * kAttendQueries + g)), stats);
      }
    }
    Barrier();
    if constexpr (kClustered) {
#ifdef JAXINT8_HOPPER
      ClusterWait();
      if (rank_ > 0) {
        ForEachFour([&](int head, int at) {
          float sums[4];
          const Stats stats = SumsOfWarps(head, at, sums);
          const uint32_t to = Address(kOfBlocks + (rank_ - 1) * kOfBlock);
          Send(to + static_cast<uint32_t>(4 * (head * kDim + 4 * at)), sums);
          if (at == 0) {
            const float both[4] = {stats.maximum, stats.exponentials, 0, 0};
            Send(to + static_cast<uint32_t>(kSumBytes + 16 * head), both);
          }
        });
        return;
      }
      if (ThreadIndex() == 0) {
        const int words = p_.queries * (kFours + 1);
        ArriveExpecting(Address(kBarrier), static_cast<uint32_t>(16 * words * (p_.blocks - 1)));
      }
      WaitBarrier(Address(kBarrier), 0);
#endif
    }
    ForEachFour([&](int head, int at) {
      float sums[4];
      Stats all = SumsOfWarps(head, at, sums);
      if constexpr (kClustered) AddBlocks(head, at, all, sums);
      const float inverse = Divide(1.0f, all.exponentials);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] = Multiply(sums[i], inverse);
      StoreOutputs(head, at, sums);
    });
  }

  // Each four outputs of each head are a thread's.
  template <typename F>
  JAXINT8_DEVICE void ForEachFour(F f) const {
#pragma unroll 1
    for (int i = ThreadIndex(); i < p_.queries * kFours; i += kAttendThreads) f(i / kFours, i % kFours);
  }

  // Adds what has another maximum; who has seen nothing has no exponentials.
  static JAXINT8_DEVICE void Join(Stats& all, float (&sums)[4], const Stats& other, const Word4& more) {
    const float maximum = Larger(all.maximum, other.maximum);
    const float mine = Exp(Add(all.maximum, -maximum)), theirs = Exp(Add(other.maximum, -maximum));
    const uint32_t words[4] = {more.x, more.y, more.z, more.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i] = MultiplyAdd(sums[i], mine, Multiply(FloatFromBits(words[i]), theirs));
    }
    all = {maximum, MultiplyAdd(all.exponentials, mine, Multiply(other.exponentials, theirs))};
  }

  JAXINT8_DEVICE Stats SumsOfWarps(int head, int at, float (&sums)[4]) const {
    Stats all{kLowest, 0};
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) {
      const auto stats = LoadAs<Word2>(shared_ + (kStats + 8 * (w * kAttendQueries + head)));
      const auto more = LoadAs<Word4>(shared_ + (kSums + w * kSumBytes + 4 * (head * kDim + 4 * at)));
      Join(all, sums, {FloatFromBits(stats.x), FloatFromBits(stats.y)}, more);
    }
    return all;
  }

  JAXINT8_DEVICE void StoreOutputs(int head, int at, const float (&v)[4]) const {
    const int64_t first = (static_cast<int64_t>(row_ * p_.kv_heads + head_) * p_.queries + head) * kDim + 4 * at;
    if (p_.type == Type::kF32) {
      StoreAs<Word4>(p_.y + 4 * first, Word4{Bits(v[0]), Bits(v[1]), Bits(v[2]), Bits(v[3])});
    } else if (p_.type == Type::kBF16) {
      StoreAs<Word2>(p_.y + 2 * first, Word2{FloatsToBFloats(v[0], v[1]), FloatsToBFloats(v[2], v[3])});
    } else {
      StoreAs<Word2>(p_.y + 2 * first, Word2{FloatsToHalves(v[0], v[1]), FloatsToHalves(v[2], v[3])});
    }
  }

#ifdef JAXINT8_HOPPER
  JAXINT8_DEVICE uint32_t Address(int at) const { return SharedAddress(shared_ + at); }

  JAXINT8_DEVICE void Send(uint32_t to, const float (&v)[4]) const {
    SendToBlock(0, to, Word4{Bits(v[0]), Bits(v[1]), Bits(v[2]), Bits(v[3])}, Address(kBarrier));
  }
#endif

  JAXINT8_DEVICE void AddBlocks(int head, int at, Stats& all, float (&sums)[4]) const {
#pragma unroll 1
    for (int block = 0; block < p_.blocks - 1; ++block) {
      const Ptr<uint8_t> from = shared_ + (kOfBlocks + block * kOfBlock);
      const auto stats = LoadAs<Word2>(from + (kSumBytes + 16 * head));
      const auto more = LoadAs<Word4>(from + 4 * (head * kDim + 4 * at));
      Join(all, sums, {FloatFromBits(stats.x), FloatFromBits(stats.y)}, more);
    }
  }

  // Below any score, and far enough from the lowest float for differences.
  static constexpr float kLowest = -0x1p120f;

  const Params& p_;
  const Ptr<uint8_t> shared_;
  const int warp_, lane_;
  int rank_, row_, head_, start_ = 0, slot_ = 0;
  Ptr<int8_t> keys_, values_;
  Ptr<float> key_scale_, value_scale_;
  float query_scale_ = 0, maximum_ = kLowest, exponentials_ = 0, fit_ = 0;
  // Of head lane / 4: dimensions 8 * i + 2 * (lane % 4) and the next.
  float sums_[kDim / 8][2];
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_ATTEND_H_
