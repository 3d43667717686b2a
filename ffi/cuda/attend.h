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
#include "reader.h"
#include "rows.h"

namespace jaxint8::cuda {

inline constexpr int kAttendWarps = 4, kAttendThreads = 32 * kAttendWarps;
inline constexpr int kAttendSlots = 32;      // of a warp at a time
inline constexpr int kAttendMostBlocks = 8;  // of a cluster
inline constexpr float kAttendLevels = 127 * 128;

// How many blocks share a key-value head of a sequence: as many as run at once, if each has something to do. Of pairs
// there are two to a multiprocessor; of larger clusters fewer find room.
inline int ChooseAttendBlocks(const Attention& a, int64_t multiprocessors) {
  const int64_t heads = a.rows * a.kv_heads;
  int blocks = 1;
  while (blocks < kAttendMostBlocks && a.slots >= 2 * blocks * 64 &&
         2 * blocks * heads <= (blocks == 1 ? 2 : 1) * multiprocessors) {
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
  float scale;  // of scores, as powers of two, for a query and keys that have been spread
};

// kClustered: several blocks share a head, which are neighbours in the grid.
template <int kDim, bool kClustered>
class AttendKernel {
 public:
  using Params = AttendParams;
  static constexpr int kMaxThreads = kAttendThreads;
  static constexpr int kMinBlocks = 2;

 private:
  static constexpr int kPieces = kDim / 64;               // 16 bytes of a key for each of four threads
  static constexpr int kHalf = 16, kPart = kDim / kHalf;  // lanes of a vector, and its elements of each
  static constexpr int kFours = kDim / 4;                 // of the outputs of a head
  static_assert(kDim == 64 || kDim == 128);

  // Shared memory: codes of the queries and their scales, of the new key and value, and of each warp the sums of each
  // head, its maximum and its sum of exponentials.
  static constexpr int kCodes = 0, kScales = 16 * kDim, kNew = kScales + 4 * kAttendQueries;
  static constexpr int kNewScales = kNew + 2 * kDim, kStats = kNewScales + 16;
  static constexpr int kBarrier = kStats + 8 * kAttendWarps * kAttendQueries, kSums = kBarrier + 16;

 public:
  // Behind that of each warp and each other block the sums of as many heads as there are; of a block then the maximum
  // and the sum of exponentials of each head.
  static JAXINT8_HOST_DEVICE int SumBytes(int queries) { return 4 * queries * kDim; }
  static JAXINT8_HOST_DEVICE int BytesOfBlock(int queries) { return SumBytes(queries) + 16 * queries; }
  static int64_t SharedBytes(int queries, int blocks) {
    return kSums + kAttendWarps * SumBytes(queries) + (blocks - 1) * BytesOfBlock(queries);
  }

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

  // What of 32 slots is this thread's: of the keys of four, 16 bytes a piece.
  JAXINT8_DEVICE void LoadKeys(int first, Loaded& loaded) const {
    const int g = lane_ / 4, t = lane_ % 4;
    const Ptr<int8_t> keys = keys_ + ((first + 8 * (g / 2) + g % 2) * kDim + 16 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) loaded.keys[i][j] = LoadAs<Word4>(keys + (2 * i * kDim + 64 * j));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      loaded.key_scale[i] = LoadAs<Word4>(key_scale_ + (first + 8 * t + 4 * i));
      loaded.value_scale[i] = LoadAs<Word4>(value_scale_ + (first + 8 * t + 4 * i));
    }
  }
  // And of the values of eight those of a dimension in eight.
  JAXINT8_DEVICE void LoadValues(int first, Loaded& loaded) const {
    const int g = lane_ / 4, t = lane_ % 4;
    const Ptr<int8_t> values = values_ + (g * p_.slots + first + 8 * t);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) loaded.values[i] = LoadAs<Word2>(values + 8 * i * p_.slots);
  }

  // Puts the new key and value in the place of what was in their slot.
  JAXINT8_DEVICE void Replace(int first, Loaded& loaded) const {
    const int g = lane_ / 4, t = lane_ % 4, at = slot_ - first;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at != 8 * (g / 2) + 2 * i + g % 2) continue;
#pragma unroll
      for (int j = 0; j < kPieces; ++j) loaded.keys[i][j] = LoadAs<Word4>(shared_ + (kNew + 64 * j + 16 * t));
    }
    if (at / 8 != t) return;
    const auto scales = LoadAs<Word2>(shared_ + kNewScales);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Exchange(loaded.key_scale[i], at % 8 - 4 * i, scales.x);
      Exchange(loaded.value_scale[i], at % 8 - 4 * i, scales.y);
    }
    const uint32_t shift = static_cast<uint32_t>(at % 4 * 8), kept = ~(0xffu << shift);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const uint32_t byte = uint32_t{LoadAs<uint8_t>(shared_ + (kNew + kDim + 8 * i + g))} << shift;
      Word2& word = loaded.values[i];
      if (at % 8 < 4) {
        word.x = (word.x & kept) | byte;
      } else {
        word.y = (word.y & kept) | byte;
      }
    }
  }
  static JAXINT8_DEVICE void Exchange(Word4& words, int at, uint32_t word) {
    if (at == 0) words.x = word;
    if (at == 1) words.y = word;
    if (at == 2) words.z = word;
    if (at == 3) words.w = word;
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
    // What is there is asked for before anything else is done, the slot of the new key and value too.
    Loaded loaded;
    if (group <= last) {
      LoadKeys(kAttendSlots * group, loaded);
      LoadValues(kAttendSlots * group, loaded);
    }
    const bool owner = !kClustered || (last - first) / kAttendWarps % p_.blocks == rank_;
    Enter(owner);
    Barrier();
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
      if (group == last) Replace(kAttendSlots * group, loaded);
      float shares[8];
      Score(kAttendSlots * group, query, loaded, shares);
      // What comes next is on its way while this is multiplied.
      const int next = kAttendSlots * (group + step);
      if (group + step <= last) LoadKeys(next, loaded);
      AddValues(shares, loaded);
      if (group + step <= last) LoadValues(next, loaded);
    }
    SumUp();
    Barrier();
    if (owner) StoreNew();
    Finish();
  }

  // Rotates, spreads and quantises: half a warp a vector, of which a lane has neighbours. The query heads come first.
  JAXINT8_DEVICE void Enter(bool owner) const {
    const int half = ThreadIndex() / kHalf, l = ThreadIndex() % kHalf;
    for (int i = p_.queries + half; i < kAttendQueries; i += kAttendThreads / kHalf) {
      StorePart(kCodes + i * kDim, l, Word2{0, 0});
      StorePart(kCodes + (8 + i) * kDim, l, Word2{0, 0});
      if (l == 0) StoreAs<uint32_t>(shared_ + (kScales + 4 * i), 0);
    }
    const int all = owner ? p_.queries + 2 : p_.queries;
#pragma unroll 1
    for (int first = 0; first < all; first += kAttendThreads / kHalf) {
      // The other half of the warp may have none, but takes part.
      const int i = first + half, vector = i < all ? i : 0;
      const int heads = p_.queries * p_.kv_heads;
      const bool is_value = vector == p_.queries + 1, is_key = vector == p_.queries;
      const int64_t at = is_value ? heads + p_.kv_heads + head_ : is_key ? heads + head_ : p_.queries * head_ + vector;
      float v[kPart];
      Read((static_cast<int64_t>(row_) * (heads + 2 * p_.kv_heads) + at) * kDim + kPart * l, v);
      if (p_.cosine) Rotate(l, !is_value, v);
      Spread(l, !is_value, v);
      uint32_t magnitude = 0;
#pragma unroll
      for (int j = 0; j < kPart; ++j) magnitude = Magnitude(v[j]) > magnitude ? Magnitude(v[j]) : magnitude;
#pragma unroll
      for (int lanes = 1; lanes < kHalf; lanes *= 2) {
        const uint32_t other = ShuffleXor(magnitude, lanes);
        magnitude = other > magnitude ? other : magnitude;
      }
      const bool finite = magnitude < kInfinity;
      const float raw = Divide(FloatFromBits(magnitude), is_key || is_value ? 127.0f : kAttendLevels);
      const bool usable = finite && raw >= kSmallestScale;
      const float scale = usable ? raw : 1.0f;
      int32_t codes[kPart];
#pragma unroll
      for (int j = 0; j < kPart; ++j) codes[j] = usable ? RoundToInt(Divide(v[j], scale)) : 0;
      if (i >= all) continue;
      const float said = finite ? scale : FloatFromBits(0x7fc00000);
      if (is_key || is_value) {
        StorePart(is_value ? kNew + kDim : kNew, l, Packed(codes));
        if (l == 0) StoreAs<uint32_t>(shared_ + (is_value ? kNewScales + 4 : kNewScales), Bits(said));
      } else {
        int32_t high[kPart];
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          high[j] = (codes[j] + 64) >> 7;
          codes[j] -= 128 * high[j];
        }
        StorePart(kCodes + vector * kDim, l, Packed(high));
        StorePart(kCodes + (8 + vector) * kDim, l, Packed(codes));
        if (l == 0) StoreAs<uint32_t>(shared_ + (kScales + 4 * vector), Bits(Multiply(said, p_.scale)));
      }
    }
  }

  static JAXINT8_DEVICE Word2 Packed(const int32_t (&v)[kPart]) {
    const auto pack = [&v](int i) {
      return PackBytes(static_cast<uint32_t>(v[i]), static_cast<uint32_t>(v[i + 1]), static_cast<uint32_t>(v[i + 2]),
                       static_cast<uint32_t>(v[i + 3]));
    };
    return {pack(0), pack(kPart - 4)};
  }
  // A lane's part of a vector of bytes.
  JAXINT8_DEVICE void StorePart(int to, int l, Word2 part) const {
    if constexpr (kPart == 8) {
      StoreAs<Word2>(shared_ + (to + 8 * l), part);
    } else {
      StoreAs<uint32_t>(shared_ + (to + 4 * l), part.x);
    }
  }

  JAXINT8_DEVICE void Read(int64_t at, float (&v)[kPart]) const {
    if (p_.type == Type::kF32) {
#pragma unroll
      for (int j = 0; j < kPart; j += 4) {
        const auto w = LoadAs<Word4>(p_.qkv + 4 * (at + j));
        v[j] = FloatFromBits(w.x), v[j + 1] = FloatFromBits(w.y);
        v[j + 2] = FloatFromBits(w.z), v[j + 3] = FloatFromBits(w.w);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kPart; j += 4) {
      const auto w = LoadAs<Word2>(p_.qkv + 2 * (at + j));
      v[j] = Widened(w.x & 0xffff), v[j + 1] = Widened(w.x >> 16);
      v[j + 2] = Widened(w.y & 0xffff), v[j + 3] = Widened(w.y >> 16);
    }
  }

  JAXINT8_DEVICE float Widened(uint32_t bits) const {
    return p_.type == Type::kBF16 ? FloatFromBits(bits << 16) : HalfToFloat(static_cast<uint16_t>(bits));
  }

  JAXINT8_DEVICE float Rounded(float x) const {
    if (p_.type == Type::kBF16) return FloatFromBits(static_cast<uint32_t>(FloatToBFloat(x)) << 16);
    return p_.type == Type::kF16 ? HalfToFloat(FloatToHalf(x)) : x;
  }

  // Pairs (i, i + d / 2), of which the first stand in the first eight lanes.
  JAXINT8_DEVICE void Rotate(int l, bool rotates, float (&v)[kPart]) const {
    const int64_t at = static_cast<int64_t>(row_) * (kDim / 2) + kPart * (l % (kHalf / 2));
    const bool second = l >= kHalf / 2;
    float cosine[kPart], sine[kPart];
#pragma unroll
    for (int j = 0; j < kPart; j += 4) {
      const auto c = LoadAs<Word4>(p_.cosine + at + j), s = LoadAs<Word4>(p_.sine + at + j);
      cosine[j] = FloatFromBits(c.x), cosine[j + 1] = FloatFromBits(c.y);
      cosine[j + 2] = FloatFromBits(c.z), cosine[j + 3] = FloatFromBits(c.w);
      sine[j] = FloatFromBits(s.x), sine[j + 1] = FloatFromBits(s.y);
      sine[j + 2] = FloatFromBits(s.z), sine[j + 3] = FloatFromBits(s.w);
    }
#pragma unroll
    for (int j = 0; j < kPart; ++j) {
      const float other = FloatFromBits(ShuffleXor(Bits(v[j]), kHalf / 2)), turned = Multiply(other, sine[j]);
      const float rotated = Rounded(Add(Multiply(v[j], cosine[j]), second ? turned : -turned));
      v[j] = rotates ? rotated : v[j];
    }
  }

  // See jaxint8/vectors.py: neighbours first.
  JAXINT8_DEVICE void Spread(int l, bool spreads, float (&v)[kPart]) const {
    if (spreads) {
#pragma unroll
      for (int span = 1; span < kPart; span *= 2) {
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          if ((j & span) != 0) continue;
          const float first = v[j], second = v[j + span];
          v[j] = Add(first, second);
          v[j + span] = Add(first, -second);
        }
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < kHalf; lanes *= 2) {
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        const float other = FloatFromBits(ShuffleXor(Bits(v[j]), lanes));
        const float sum = (l & lanes) != 0 ? Add(other, -v[j]) : Add(v[j], other);
        v[j] = spreads ? sum : v[j];
      }
    }
  }

  static JAXINT8_DEVICE float LargestOfFour(float x) {
    x = Larger(x, FloatFromBits(ShuffleXor(Bits(x), 1)));
    return Larger(x, FloatFromBits(ShuffleXor(Bits(x), 2)));
  }

  static JAXINT8_DEVICE uint32_t LargestOfFour(uint32_t x) {
    uint32_t other = ShuffleXor(x, 1);
    x = other > x ? other : x;
    other = ShuffleXor(x, 2);
    return other > x ? other : x;
  }

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
    fit_ = PowerOfTwo(Add(before, -maximum_));
    float exponentials = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float e = Seen(mine + i) ? PowerOfTwo(Add(shares[i], -maximum_)) : 0.0f;
      exponentials = Add(exponentials, e);
      shares[i] = Seen(mine + i) ? Multiply(e, FloatFromBits(value_scale[i])) : 0.0f;
    }
    exponentials_ = MultiplyAdd(exponentials_, fit_, exponentials);
  }

  JAXINT8_DEVICE bool Seen(int slot) const { return slot >= start_ && slot <= slot_; }

  JAXINT8_DEVICE void AddValues(const float (&shares)[8], const Loaded& loaded) {
    uint32_t bits = 0;  // of the largest; those of what is no number are larger
#pragma unroll
    for (int i = 0; i < 8; ++i) bits = Magnitude(shares[i]) > bits ? Magnitude(shares[i]) : bits;
    bits = LargestOfFour(bits);
    const float largest = FloatFromBits(bits);
    const bool usable = largest >= 0x1p-100f && largest < 0x1p100f;
    const float levels = usable ? Multiply(PlainReciprocal(largest), kAttendLevels) : 0.0f;
    // What is no number must not get lost on the way.
    const float unit = usable               ? Multiply(largest, 1.0f / kAttendLevels)
                       : largest < 0x1p100f ? 0.0f
                                            : FloatFromBits(0x7fc00000);
    uint32_t high[8], low[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int32_t code = usable ? RoundToInt(Multiply(shares[i], levels)) : 0;
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

  JAXINT8_DEVICE void SumUp() {
    const int g = lane_ / 4, t = lane_ % 4;
    exponentials_ = Add(exponentials_, FloatFromBits(ShuffleXor(Bits(exponentials_), 1)));
    exponentials_ = Add(exponentials_, FloatFromBits(ShuffleXor(Bits(exponentials_), 2)));
    if (g < p_.queries) {
      const Ptr<uint8_t> mine = shared_ + (kSums + warp_ * SumBytes(p_.queries) + 4 * (g * kDim + 2 * t));
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) StoreAs<Word2>(mine + 32 * i, Word2{Bits(sums_[i][0]), Bits(sums_[i][1])});
      if (t == 0) {
        const Word2 stats{Bits(maximum_), Bits(exponentials_)};
        StoreAs<Word2>(shared_ + (kStats + 8 * (warp_ * kAttendQueries + g)), stats);
      }
    }
  }

  // To the cache, for later tokens: all have read what they need of it.
  JAXINT8_DEVICE void StoreNew() const {
    const int i = ThreadIndex();
    if (i < kDim / 16) {
      StoreAs<Word4>(keys_ + (slot_ * kDim + 16 * i), LoadAs<Word4>(shared_ + (kNew + 16 * i)));
    }
    if (i < kDim) StoreAs<uint8_t>(values_ + (i * p_.slots + slot_), LoadAs<uint8_t>(shared_ + (kNew + kDim + i)));
    if (i == 0) {
      const auto scales = LoadAs<Word2>(shared_ + kNewScales);
      Store(key_scale_ + slot_, FloatFromBits(scales.x));
      Store(value_scale_ + slot_, FloatFromBits(scales.y));
    }
  }

  JAXINT8_DEVICE void Finish() const {
    if constexpr (kClustered) {
#ifdef JAXINT8_HOPPER
      ClusterWait();
      if (rank_ > 0) {
        ForEachFour([&](int head, int at) {
          float sums[4];
          const Stats stats = SumsOfWarps(head, at, sums);
          const uint32_t to = Address(OfBlock(rank_));
          Send(to + static_cast<uint32_t>(4 * (head * kDim + 4 * at)), sums);
          if (at == 0) {
            const float both[4] = {stats.maximum, stats.exponentials, 0, 0};
            Send(to + static_cast<uint32_t>(SumBytes(p_.queries) + 16 * head), both);
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
      if constexpr (kClustered) all = SumsOfBlocks(head, at, all, sums);
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

  // The sums of some parts, of which stats and four sums are given; who has seen nothing has zeros.
  template <int kParts, typename F, typename G>
  static JAXINT8_DEVICE Stats Join(int parts, F stats_of, G sums_of, float (&sums)[4]) {
    Stats all{kLowest, 0};
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (i < parts) all.maximum = Larger(all.maximum, stats_of(i).maximum);
    }
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (i >= parts) break;
      const Stats stats = stats_of(i);
      const float fit = PowerOfTwo(Add(stats.maximum, -all.maximum));
      all.exponentials = MultiplyAdd(stats.exponentials, fit, all.exponentials);
      const Word4 more = sums_of(i);
      sums[0] = MultiplyAdd(FloatFromBits(more.x), fit, sums[0]);
      sums[1] = MultiplyAdd(FloatFromBits(more.y), fit, sums[1]);
      sums[2] = MultiplyAdd(FloatFromBits(more.z), fit, sums[2]);
      sums[3] = MultiplyAdd(FloatFromBits(more.w), fit, sums[3]);
    }
    return all;
  }

  // Where another block's sums come to lie.
  JAXINT8_DEVICE int OfBlock(int block) const {
    return kSums + kAttendWarps * SumBytes(p_.queries) + (block - 1) * BytesOfBlock(p_.queries);
  }

  JAXINT8_DEVICE Stats StatsAt(int at) const {
    const auto stats = LoadAs<Word2>(shared_ + at);
    return {FloatFromBits(stats.x), FloatFromBits(stats.y)};
  }

  JAXINT8_DEVICE Stats SumsOfWarps(int head, int at, float (&sums)[4]) const {
    return Join<kAttendWarps>(
        kAttendWarps, [&](int w) { return StatsAt(kStats + 8 * (w * kAttendQueries + head)); },
        [&](int w) { return LoadAs<Word4>(shared_ + (kSums + w * SumBytes(p_.queries) + 4 * (head * kDim + 4 * at))); },
        sums);
  }

  // The block's own, which stats and sums are, and those of the others.
  JAXINT8_DEVICE Stats SumsOfBlocks(int head, int at, const Stats& own, float (&sums)[4]) const {
    const Word4 mine{Bits(sums[0]), Bits(sums[1]), Bits(sums[2]), Bits(sums[3])};
    return Join<kAttendMostBlocks>(
        p_.blocks, [&](int i) { return i == 0 ? own : StatsAt(OfBlock(i) + SumBytes(p_.queries) + 16 * head); },
        [&](int i) { return i == 0 ? mine : LoadAs<Word4>(shared_ + (OfBlock(i) + 4 * (head * kDim + 4 * at))); },
        sums);
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
