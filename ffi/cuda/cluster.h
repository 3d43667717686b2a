// The threads of a cluster of blocks that work on one row, on sm_90a: a Team (team.h) whose blocks tell each other what
// they have found. Each has its own part of the row; only statistics go from one to the other.
//
// Words are sent to all blocks at once and arrive at a barrier in the memory of each, so no fence is waited for and
// nobody meets anybody: a block goes on when it has everyone's. What is sent next goes to another buffer, and what is
// sent then to the first again: who sends it has the words of all others, which had read that buffer when they sent.
#ifndef JAXINT8_FFI_CUDA_CLUSTER_H_
#define JAXINT8_FFI_CUDA_CLUSTER_H_

#include "device.h"
#include "hopper.h"
#include "team.h"

namespace jaxint8::cuda {

// The blocks of a cluster are neighbours in the grid. All threads call every function but those that say where a thread
// stands; see Team.
template <int kBlocks>
class ClusterTeam {
 public:
  static constexpr bool kSpread = true, kOfWarps = false;
  static constexpr int kTurn = 1;

  static JAXINT8_DEVICE int Block() { return static_cast<int>(static_cast<unsigned>(BlockIndex()) % kBlocks); }
  static JAXINT8_DEVICE int Index() { return Block() * BlockThreads() + ThreadIndex(); }
  static JAXINT8_DEVICE int Size() { return kBlocks * BlockThreads(); }
  static JAXINT8_DEVICE int IndexHere() { return ThreadIndex(); }
  static JAXINT8_DEVICE int SizeHere() { return BlockThreads(); }
  static JAXINT8_DEVICE int Warps() { return static_cast<int>(static_cast<unsigned>(Size()) / 32); }
  static JAXINT8_DEVICE int Warp() { return static_cast<int>(static_cast<unsigned>(Index()) / 32); }
  static JAXINT8_DEVICE int Lane() { return static_cast<int>(static_cast<unsigned>(ThreadIndex()) % 32); }
  static JAXINT8_DEVICE void Sync() { Barrier(); }

 private:
  // Of each of two buffers: four words for each lane of a warp of each block, or for each warp of all.
  static constexpr int kBuffer = 4 * 32 * kBlocks;
  static_assert(kTeamMostWarps <= 32 && kBlocks * kTeamMostWarps <= 64, "two warps for a lane");

 public:
  // Shared memory of a block, in words: the buffers, and a barrier for each.
  static constexpr int kWords = 2 * kBuffer + 4;

#ifdef JAXINT8_HOPPER

  // May be made before the kernel ahead has ended.
  JAXINT8_DEVICE explicit ClusterTeam(Ptr<uint32_t> words)
      : barriers_(KeepShared(words + 2 * kBuffer)),
        words_(KeepShared(words)),
        of_warp_(KeepShared(words + 4 * Warp())),
        of_lane_(KeepShared(words + 4 * Lane())) {
    if (ThreadIndex() == 0) {
      InitBarrier(SharedAddress(barriers_), 1);
      InitBarrier(SharedAddress(barriers_) + 8, 1);
      FenceBarrierInit();
    }
    ClusterArrive();
  }

  // To be called once, before the first words are sent: all blocks run, and have their barriers.
  static JAXINT8_DEVICE void Meet() { ClusterWait(); }

  template <int kMaxima, int kSums>
  JAXINT8_DEVICE void Reduce(uint32_t (&v)[kMaxima + kSums]) {
    static_assert(kMaxima + kSums <= 4);
    ReduceWarp<kMaxima>(v);
    uint32_t all[4] = {}, more[4];
#pragma unroll
    for (int i = 0; i < kMaxima + kSums; ++i) all[i] = v[i];
    Exchange(all, more);
#pragma unroll
    for (int i = 0; i < kMaxima + kSums; ++i) {
      v[i] = i >= kMaxima ? all[i] + more[i] : all[i] > more[i] ? all[i] : more[i];
    }
    ReduceWarp<kMaxima>(v);
  }

  JAXINT8_DEVICE uint32_t Max(uint32_t v) {
    uint32_t values[1] = {v};
    Reduce<1, 0>(values);
    return values[0];
  }

  JAXINT8_DEVICE void Sums(uint32_t (&v)[2]) { Reduce<0, 2>(v); }

  template <int kBits>
  JAXINT8_DEVICE uint64_t Sum(uint64_t v) {
    v = SumWarp<kBits>(v);
    uint32_t all[4] = {static_cast<uint32_t>(v), static_cast<uint32_t>(v >> 32)}, more[4];
    Exchange(all, more);
    return SumWarp<kBits>((all[0] | static_cast<uint64_t>(all[1]) << 32) +
                          (more[0] | static_cast<uint64_t>(more[1]) << 32));
  }

  // A part is a warp or two.
  JAXINT8_DEVICE uint32_t MaxOfParts(uint32_t v, Ptr<uint32_t>) {
    uint32_t all[4] = {WarpMax(v)}, more[4];
    Sync();
    Exchange(all, more);
    return all[0] > more[0] ? all[0] : more[0];
  }

  JAXINT8_DEVICE int Collect(int count, Word2* item) {
    const uint32_t first = Lane() == 0 ? static_cast<uint32_t>(count) : 0;  // which is said once
    const SharedWords all = Gather(Word4{item->x, item->y, first, 0});
    int sum = 0, at = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (Lane() >= sum) at = 32 * block + Lane() - sum;
      sum += static_cast<int>(LoadShared<0>(all + 4 * 32 * block).z);
    }
    const Word4 found = LoadShared<0>(all + 4 * at);
    if (Lane() < sum) *item = {found.x, found.y};
    return sum;
  }

  JAXINT8_DEVICE void SumOfLanes(uint32_t (&v)[4]) {
    const SharedWords all = Gather(Word4{v[0], v[1], v[2], v[3]});
    v[0] = v[1] = v[2] = v[3] = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const Word4 w = LoadShared<0>(all + 4 * (32 * block + Lane()));
      v[0] += w.x;
      v[1] += w.y;
      v[2] += w.z;
      v[3] += w.w;
    }
  }

 private:
  // Afterwards each lane has the values of the warp of its number, and of the one 32 further; 0 if there is none.
  JAXINT8_DEVICE void Exchange(uint32_t (&v)[4], uint32_t (&more)[4]) {
    const int at = Expect(16 * Warps()), lane = Lane();
    if (lane < kBlocks) Send(lane, of_warp_ + at, Word4{v[0], v[1], v[2], v[3]});
    Await();
    Word4 a{0, 0, 0, 0}, b = a;
    if (lane < Warps()) a = LoadShared<0>(of_lane_ + at);
    if (lane + 32 < Warps()) b = LoadShared<4 * 32>(of_lane_ + at);
    v[0] = a.x;
    v[1] = a.y;
    v[2] = a.z;
    v[3] = a.w;
    more[0] = b.x;
    more[1] = b.y;
    more[2] = b.z;
    more[3] = b.w;
  }

  // Four words of each lane of a warp, the same in all warps of a block, for all blocks: [kBlocks][32][4]. Since the
  // last words were waited for there has been a barrier of the block, as not all warps send.
  JAXINT8_DEVICE SharedWords Gather(const Word4& word) {
    const int at = Expect(4 * kBuffer);
    const int to = static_cast<int>(static_cast<unsigned>(ThreadIndex()) / 32);
    if (to < kBlocks) Send(to, of_lane_ + (at + 4 * 32 * Block()), word);
    Await();
    return words_ + at;
  }

  // Returns the buffer of this turn. bytes: what all blocks will send to this one.
  JAXINT8_DEVICE int Expect(int bytes) const {
    if (ThreadIndex() == 0) ArriveExpecting(BarrierOfTurn(), static_cast<uint32_t>(bytes));
    return turn_ % 2 * kBuffer;
  }
  JAXINT8_DEVICE void Send(int block, SharedWords to, const Word4& word) const {
    SendToBlock(block, SharedAddress(to), word, BarrierOfTurn());
  }
  JAXINT8_DEVICE void Await() {
    WaitBarrier(BarrierOfTurn(), static_cast<uint32_t>(turn_ / 2 % 2));
    ++turn_;
  }
  JAXINT8_DEVICE uint32_t BarrierOfTurn() const {
    return SharedAddress(barriers_) + static_cast<uint32_t>(turn_ % 2 * 8);
  }

  const SharedWords barriers_, words_, of_warp_, of_lane_;
  int turn_ = 0;
#endif  // JAXINT8_HOPPER
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_CLUSTER_H_
