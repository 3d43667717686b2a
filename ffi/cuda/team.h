// The threads that work on one row: a block, half of one or some of its warps (or a cluster of blocks: cluster.h).
// Maxima and exact sums over them.
#ifndef JAXINT8_FFI_CUDA_TEAM_H_
#define JAXINT8_FFI_CUDA_TEAM_H_

#include "device.h"

namespace jaxint8::cuda {

// Shared memory of a team, in words: two buffers of four words a warp.
inline constexpr int kTeamMostWarps = 16;
inline constexpr int kTeamWords = 2 * 4 * kTeamMostWarps;

// Over a warp: the first kMaxima values become maxima, the others sums.
template <int kMaxima, int kSize>
JAXINT8_DEVICE void ReduceWarp(uint32_t (&v)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) v[i] = i < kMaxima ? WarpMax(v[i]) : WarpSum(v[i]);
}

// The sum over a warp, which fits in so many bits, in parts whose sums fit a word.
template <int kBits>
JAXINT8_DEVICE uint64_t SumWarp(uint64_t v) {
  constexpr uint32_t kMask = (1u << 27) - 1;
  uint64_t sum = WarpSum(static_cast<uint32_t>(v) & kMask);
  sum += static_cast<uint64_t>(WarpSum(static_cast<uint32_t>(v >> 27) & kMask)) << 27;
  if constexpr (kBits > 54) sum += static_cast<uint64_t>(WarpSum(static_cast<uint32_t>(v >> 54))) << 54;
  return sum;
}

// All threads of the team call every function. Those that return something shared have at most one barrier. There is a
// buffer for Reduce and Max and one for Sum: between two calls that use the same one there must be one that uses the
// other, or a barrier. kTeams: of the block, one or two, which do not wait for each other; or teams are so many warps
// each, as many as there are, and a block may have others behind them.
template <int kTeams = 1, int kTeamWarps = 0>
class Team {
 public:
  static constexpr bool kSpread = false;  // over several blocks
  static constexpr bool kOfWarps = kTeamWarps > 0;
  // Of what warps take in turn, the next is so many further on; 1 where their number is not known here.
  static constexpr int kTurn = kTeamWarps > 0 ? kTeamWarps : 1;

  JAXINT8_DEVICE explicit Team(Ptr<uint32_t> words)
      : mine_(KeepShared(words + 4 * Warp())), others_(KeepShared(words + 4 * Lane())) {}

  static JAXINT8_DEVICE int Number() {
    if constexpr (kTeamWarps > 0) return static_cast<int>(static_cast<unsigned>(ThreadIndex()) / (32 * kTeamWarps));
    return kTeams > 1 && ThreadIndex() >= Size() ? 1 : 0;
  }
  static JAXINT8_DEVICE int Index() { return ThreadIndex() - Number() * Size(); }
  static JAXINT8_DEVICE int Size() {
    if constexpr (kTeamWarps > 0) return 32 * kTeamWarps;
    return static_cast<int>(static_cast<unsigned>(BlockThreads()) / kTeams);
  }
  // Among the threads of the team in this block, and how many these are: all.
  static JAXINT8_DEVICE int IndexHere() { return Index(); }
  static JAXINT8_DEVICE int SizeHere() { return Size(); }
  static JAXINT8_DEVICE int Warps() { return static_cast<int>(static_cast<unsigned>(Size()) / 32); }
  static JAXINT8_DEVICE int Warp() { return static_cast<int>(static_cast<unsigned>(Index()) / 32); }
  static JAXINT8_DEVICE int Lane() { return static_cast<int>(static_cast<unsigned>(ThreadIndex()) % 32); }
  JAXINT8_DEVICE void Sync() {
    if constexpr (kOfWarps) ++syncs_;
    if constexpr (kTeams == 1 && kTeamWarps == 0) {
      Barrier();
    } else {
      PartBarrier(1 + Number(), Size());
    }
  }

  // Of some warps of a block: until there have been so many.
  JAXINT8_DEVICE void SyncUpTo(int count) {
    static_assert(kOfWarps);
#pragma unroll 1
    while (syncs_ < count) Sync();
  }

  // The first kMaxima values become maxima over the team, the others sums.
  template <int kMaxima, int kSums, int kBuffer = 0>
  JAXINT8_DEVICE void Reduce(uint32_t (&v)[kMaxima + kSums]) {
    static_assert(kMaxima + kSums <= 4);
    ReduceWarp<kMaxima>(v);
    if (Warps() == 1) return;
    uint32_t all[4] = {};
#pragma unroll
    for (int i = 0; i < kMaxima + kSums; ++i) all[i] = v[i];
    Exchange<kBuffer * kTeamWords / 2>(all);
#pragma unroll
    for (int i = 0; i < kMaxima + kSums; ++i) v[i] = all[i];
    ReduceWarp<kMaxima>(v);
  }

  JAXINT8_DEVICE uint32_t Max(uint32_t v) {
    uint32_t values[1] = {v};
    Reduce<1, 0>(values);
    return values[0];
  }

  // Two sums, by the buffer of Sum.
  JAXINT8_DEVICE void Sums(uint32_t (&v)[2]) { Reduce<0, 2, 1>(v); }

  // kBits: what the sum fits in.
  template <int kBits>
  JAXINT8_DEVICE uint64_t Sum(uint64_t v) {
    v = SumWarp<kBits>(v);
    if (Warps() == 1) return v;
    uint32_t all[4] = {static_cast<uint32_t>(v), static_cast<uint32_t>(v >> 32)};
    Exchange<kTeamWords / 2>(all);
    return SumWarp<kBits>(all[0] | static_cast<uint64_t>(all[1]) << 32);
  }

  // Lane by lane, in all warps: the largest of one of 32 parts of the team, which are all of it. words: one a thread.
  // Has a barrier of the block.
  JAXINT8_DEVICE uint32_t MaxOfParts(uint32_t v, Ptr<uint32_t> words) {
    Share(v, words);
    return MaxOfShared(v, words);
  }
  // In two parts, of which the second need not be called by all warps.
  JAXINT8_DEVICE void Share(uint32_t v, Ptr<uint32_t> words) {
    Store(words + Index(), v);
    Sync();
  }
  static JAXINT8_DEVICE uint32_t MaxOfShared(uint32_t v, Ptr<uint32_t> words) {
#pragma unroll 1
    for (int w = 0; w < Warps(); ++w) {
      const uint32_t other = Load(words + (32 * w + Lane()));
      v = other > v ? other : v;
    }
    return v;
  }

  // The lanes of each warp have the first items of their block's list of `count`: puts the lists of all blocks
  // together, one behind the other, as far as lanes have them, and returns how many items there are.
  JAXINT8_DEVICE int Collect(int count, Word2*) { return count; }

  // Adds, lane by lane, what the warps of each block have, which is the same in all of them.
  JAXINT8_DEVICE void SumOfLanes(uint32_t (&)[4]) {}

 private:
  static_assert(kTeams == 1 || (kTeams == 2 && kTeamWarps == 0));

  // Afterwards each lane has the values of the warp of its number, 0 if there is none.
  template <int kBuffer>
  JAXINT8_DEVICE void Exchange(uint32_t (&v)[4]) {
    if (Lane() == 0) StoreShared<kBuffer>(mine_, Word4{v[0], v[1], v[2], v[3]});
    Sync();
    Word4 word{0, 0, 0, 0};
    if (Lane() < Warps()) word = LoadShared<kBuffer>(others_);
    v[0] = word.x;
    v[1] = word.y;
    v[2] = word.z;
    v[3] = word.w;
  }

  const SharedWords mine_, others_;
  int syncs_ = 0;
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_TEAM_H_
