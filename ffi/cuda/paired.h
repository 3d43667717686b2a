// A small layer for some rows on Hopper, in one launch: one kernel that quantises and another that multiplies take a
// microsecond more, a quarter of all.
//
// A pair of blocks has the same 16 rows of activations, and outputs of its own each. Each block quantises half of the
// rows, two warps a row, and sends the codes to both, to where they are multiplied: all of k stays in shared memory.
// Meanwhile the weights are on their way. They take the place of A in the products, 64 outputs a warpgroup, and the
// codes that of B, high parts behind the low ones, so that the weights are read once for both. Warpgroups without
// outputs of their own share k. Then all threads add what these have, and store.
//
// All pairs with the same rows quantise them anew; to hand them on to all would take longer.
#ifndef JAXINT8_FFI_CUDA_PAIRED_H_
#define JAXINT8_FFI_CUDA_PAIRED_H_

#include "epilogue.h"
#include "groups.h"
#include "hopper.h"
#include "prologue.h"
#include "quantize.h"
#include "rows.h"
#include "team.h"

namespace jaxint8::cuda {

inline constexpr int kPairedWarps = 16, kPairedGroups = kPairedWarps / 4;
inline constexpr int kPairedRows = 16;  // of a tile: each block of a pair quantises half of them
inline constexpr int kPairedTeamWarps = 2 * kPairedWarps / kPairedRows;  // for a row
// Of a row, by the groups of eight values that a thread holds of it.
JAXINT8_HOST_DEVICE constexpr int64_t PairedColumns(int held) { return 256 * held * kPairedTeamWarps; }

struct PairedParams {
  TileMap w;            // boxes of [kTileN][128]
  QuantizeParams rows;  // x, what is done to it, and the rule
  int64_t m, n;
  uint32_t tiles_n, inverse;  // a multiple of 2, and 2^32 over it rounded up
  int stages;                 // of 128 columns of weights, in shared memory: kPairedGroups at least
  bool early;                 // whether weights may be asked for before the kernel ahead has ended
  Epilogue epilogue;
};

// Shared memory, from a multiple of 1024 on: stages of weights, where later the sums are, codes by 128 columns, scales
// of the rows, scales and biases of the outputs, what teams of warps tell each other, barriers (two a stage, and that
// of the codes). outputs: of a block.
struct PairedLayout {
  int codes, scales, columns, teams, barriers, bytes;
};
JAXINT8_HOST_DEVICE constexpr PairedLayout MakePairedLayout(bool high, int64_t k, int outputs, int stages) {
  PairedLayout s{};
  s.codes = stages * outputs * 128;
  s.scales = s.codes + static_cast<int>((k + 127) / 128) * kPairedRows * (high ? 2 : 1) * 128;
  s.columns = s.scales + kPairedRows * 8;
  s.teams = s.columns + 2 * outputs * 4;
  s.barriers = s.teams + kPairedRows / 2 * 4 * kTeamWords;
  s.bytes = 1024 + s.barriers + 8 * (2 * stages + 1);
  return s;
}

#ifdef JAXINT8_HOPPER
// A row of codes that both blocks of a pair are given; high parts are zeros where nothing is sent.
struct SentRowOutput : RowOutput {
  static constexpr bool kSent = true;
  Ptr<uint8_t> codes;
  uint32_t address;     // of these
  int row, part, tile;  // of the row, from low to high parts, and bytes of 128 columns of all rows
  uint32_t other;       // block of the pair
  uint32_t barrier;
  mutable uint32_t sent = 0;  // bytes, by this thread

  JAXINT8_DEVICE void Send(int i, int number, const Word2& bytes) const {
    // Within 128 bytes of a row chunk j of 16 lies at j ^ row % 8.
    const int chunk = (i >> 4 & 7) ^ (row & 7);
    const int to = (i >> 7) * tile + number * part + row * 128 + 16 * chunk + (i & 8);
    StoreAs<Word2>(codes + to, bytes);
    SendToBlock(static_cast<int>(other), address + static_cast<uint32_t>(to), bytes, barrier);
    sent += 8;
  }
};
#endif

// kTileN: outputs of a block, 64 or 128. kHeld: groups of eight values of a thread: of more than there are, to step
// over each takes as long as to fetch code.
template <Type kType, int kRule, int kTileN, int kHeld>
class PairedKernel {
 public:
  using Params = PairedParams;
  static constexpr int kMaxThreads = 32 * kPairedWarps;
  static constexpr int kMinBlocks = 1;

  static JAXINT8_DEVICE void Run(const Params& p) {
#ifdef JAXINT8_HOPPER
    PairedKernel kernel(p);
    kernel.Work();
#endif
  }

#ifdef JAXINT8_HOPPER

 private:
  static constexpr bool kHigh = kRule != static_cast<int>(Rule::kNone);
  static constexpr int kTileM = kPairedRows, kTileK = 128, kOwn = kTileM / 2;  // kOwn: rows of a block
  static constexpr int kParts = kHigh ? 2 : 1;                                 // of a code
  static constexpr int kCodeBytes = kTileM * kTileK, kStepBytes = kParts * kCodeBytes, kStageBytes = kTileN * kTileK;
  static constexpr int kAcross = kTileN / 64, kShare = kPairedGroups / kAcross;  // warpgroups by outputs, and by k
  static constexpr int kSums = kTileM / 2;       // of a thread: 64 x kTileM in 128 threads
  static constexpr int kSumStride = kTileN + 4;  // of a row of sums, without bank conflicts
  static_assert(kShare * kTileM * kSumStride * 4 <= kPairedGroups * kStageBytes);
  using RowTeam = Team<1, kPairedTeamWarps>;
  // Of a team, at most. Those that have done with fewer go on to as many: racecheck takes barriers of the block for
  // none between threads that have passed different numbers of others.
  static constexpr int kSyncs = kRule == static_cast<int>(Rule::kRelative) ? 3 : 1;
  using Groups = HeldGroups<kType, RowTeam, kHeld>;

  JAXINT8_DEVICE explicit PairedKernel(const Params& p)
      : p_(p),
        layout_(MakePairedLayout(kHigh, p.rows.k, kTileN, p.stages)),
        start_((SharedAddress(SharedMemory()) + 1023) & ~1023u),
        shared_(SharedMemory() + (start_ - SharedAddress(SharedMemory()))),
        full_(start_ + static_cast<uint32_t>(layout_.barriers)),
        empty_(full_ + 8 * p.stages),
        codes_(empty_ + 8 * p.stages),
        rank_(static_cast<int>(ClusterRank())),
        warp_(ThreadIndex() / 32),
        lane_(ThreadIndex() % 32),
        steps_((static_cast<int>(p.rows.k) + kTileK - 1) / kTileK) {
    const auto block = static_cast<uint32_t>(BlockIndex());
    const auto tile = static_cast<uint32_t>(uint64_t{block} * p.inverse >> 32);  // block / p.tiles_n
    m_ = static_cast<int32_t>(tile * kTileM);
    n_ = static_cast<int32_t>((block - tile * p.tiles_n) * kTileN);
  }

  JAXINT8_DEVICE void Work() const {
    MakeBarriers();
    if constexpr (kHigh) ClearHighParts();
    Barrier();
    if (kHigh && ThreadIndex() == 0) FenceCluster();  // what comes from the other block comes behind the zeros
    WarpBarrier();                                    // all lanes together again
    ClusterArrive();
    if (p_.early) CopyFirst();
    WaitForPreviousKernel();
    AllowNextKernel();
    QuantizeRow();
    WaitBarrier(codes_, 0);
    if (n_ >= p_.n) return;  // this block is there for the other
    FenceShared();           // what that one sent is to be read by products
    const Word4 residual = LoadResiduals();
    int32_t sums[kSums];
    Multiply(sums);
    Barrier();  // nothing reads the stages any more
    KeepSums(sums);
    Barrier();
    Finish(residual);
  }

  JAXINT8_DEVICE void MakeBarriers() const {
    if (lane_ != 0) return;
    if (warp_ == 0) {
      FetchMap(&p_.w);
      InitBarrier(codes_, 2 * kPairedWarps);  // an arrival of each warp of both blocks
    }
#pragma unroll 1
    for (int s = warp_; s < p_.stages; s += kPairedWarps) {
      InitBarrier(full_ + 8 * s, 1);
      InitBarrier(empty_ + 8 * s, 4 * kAcross);  // of each warp that multiplies it
    }
    FenceBarrierInit();
  }

  JAXINT8_DEVICE Ptr<uint8_t> Codes() const { return shared_ + layout_.codes; }
  JAXINT8_DEVICE uint32_t CodesAddress() const { return start_ + static_cast<uint32_t>(layout_.codes); }

  JAXINT8_DEVICE void ClearHighParts() const {
    constexpr int kStride = 16 * kMaxThreads / kCodeBytes * kStepBytes;
    const int i = 16 * ThreadIndex();
#pragma unroll 1
    for (int at = i / kCodeBytes * kStepBytes + kCodeBytes + i % kCodeBytes; at < steps_ * kStepBytes; at += kStride) {
      StoreAs<Word4>(Codes() + at, Word4{});
    }
    FenceShared();
  }

  JAXINT8_DEVICE uint32_t Stage(int stage) const { return start_ + static_cast<uint32_t>(stage * kStageBytes); }

  JAXINT8_DEVICE void CopyWeights(int step, int stage) const {
    ArriveExpecting(full_ + 8 * stage, kStageBytes);
    CopyTile(&p_.w, Stage(stage), full_ + 8 * stage, step * kTileK, n_);
  }
  // Fills the stages, each warp one.
  JAXINT8_DEVICE void CopyFirst() const {
    if (lane_ == 0 && n_ < p_.n) {
#pragma unroll 1
      for (int step = warp_; step < p_.stages && step < steps_; step += kPairedWarps) CopyWeights(step, step);
    }
    WarpBarrier();  // all lanes together again
  }

  // Rows beyond the last are that one once more.
  JAXINT8_DEVICE void QuantizeRow() const {
    const QuantizeParams& r = p_.rows;
    const int row = rank_ * kOwn + RowTeam::Number(), k = static_cast<int>(r.k);
    const int64_t i = m_ + row < p_.m ? m_ + row : p_.m - 1;
    const Ptr<const uint8_t> x = r.x + i * RowsOf(r.prologue.kind) * k * Groups::Reader::kBytes;
    const Ptr<uint32_t> scratch = Cast<uint32_t>(shared_ + layout_.teams) + RowTeam::Number() * kTeamWords;
    RowTeam team(scratch);
    Groups groups(x, k);
    // The scale of a column, or its bias.
    const int column = ThreadIndex() % kTileN;
    float of_column = kNoBias;
    if (ThreadIndex() < 2 * kTileN && n_ + column < p_.n) {
      const Ptr<const float> from = ThreadIndex() < kTileN ? p_.epilogue.w_scale : p_.epilogue.bias;
      if (from) of_column = Load(from + n_ + column);
    }
    if (!p_.early) CopyFirst();
    if (r.prologue.kind == Prologue::kNone) {
      groups.FindLargest();
    } else {
      ApplyPrologue(groups, x + k * Groups::Reader::kBytes, r.prologue, team);
    }
    SentRowOutput out{};
    out.stride = steps_ * kTileK;
    out.codes = Codes();
    out.address = CodesAddress();
    out.row = row;
    out.part = kCodeBytes;
    out.tile = kStepBytes;
    out.other = static_cast<uint32_t>(1 - rank_);
    out.barrier = codes_;
    ClusterWait();  // the other block has its barriers
    const float scale = Row<Groups, kRule, RowTeam>(groups, r.options, scratch, team).Quantize(out);
    if (ThreadIndex() < 2 * kTileN) Store(Columns() + ThreadIndex(), of_column);
    team.SyncUpTo(kSyncs + (r.prologue.kind == Prologue::kRmsNorm ? 2 : 0));
    uint32_t bytes = WarpSum(out.sent);
    FenceShared();
    if (lane_ == 0) {
      if (RowTeam::Index() == 0) {
        const int to = layout_.scales + 8 * row;
        StoreAs<Word2>(shared_ + to, Word2{Bits(scale), 0});
        SendToBlock(1 - rank_, start_ + static_cast<uint32_t>(to), Word2{Bits(scale), 0}, codes_);
        bytes += 8;
      }
      ArriveAtExpecting(codes_, out.other, bytes);
    }
    WarpBarrier();  // for the order of their stores: its lanes have met in the sum
    if (lane_ == 0) Arrive(codes_);
  }

  // The sums of this warpgroup's outputs, of each so manyth step.
  JAXINT8_DEVICE void Multiply(int32_t (&sums)[kSums]) const {
    const int group = warp_ / 4, first = group / kAcross;
    const bool refills = p_.stages < steps_;
    const uint64_t w_first = TileDescriptor<128>(start_ + static_cast<uint32_t>(group % kAcross * 64 * kTileK));
    uint64_t x = TileDescriptor<128>(CodesAddress() + static_cast<uint32_t>(first * kStepBytes));
    int32_t all[kParts * kSums];
    int stage = first, last = -1;
    uint32_t parity = 0;
#pragma unroll
    for (int i = 0; i < kParts * kSums; ++i) all[i] = 0;
    Pin(all);
#pragma unroll 1
    for (int step = first; step < steps_; step += kShare) {
      WaitBarrier(full_ + 8 * stage, parity);
      const uint64_t w = w_first + static_cast<uint32_t>(stage * (kStageBytes >> 4));
      ProductFence();
#pragma unroll
      for (int j = 0; j < kTileK / 32; ++j) Product(all, w + 2 * j, x + 2 * j, 1);  // 32 bytes further, in units of 16
      ProductCommit();
      x += kShare * kStepBytes >> 4;
      if (refills) {
        ProductWait<1>();
        if (last >= 0) Refill(step - kShare, last);
        last = stage;
      }
      stage += kShare;
      if (stage >= p_.stages) {
        stage -= p_.stages;
        parity ^= 1;
      }
    }
    ProductWait<0>();
    Pin(all);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = kHigh ? Combine(all[i], all[(kParts - 1) * kSums + i]) : all[i];
  }

  // This warp has read the stage of a step: once all have, there is room for a later one.
  JAXINT8_DEVICE void Refill(int step, int stage) const {
    if (step + p_.stages >= steps_) return;
    if (lane_ == 0) Arrive(empty_ + 8 * stage);
    if (warp_ % (4 * kAcross) == 0 && lane_ == 0) {
      WaitBarrier(empty_ + 8 * stage, static_cast<uint32_t>(step / p_.stages % 2));
      CopyWeights(step + p_.stages, stage);
    }
    WarpBarrier();
  }

  // Puts the sums where the stages were.
  JAXINT8_DEVICE void KeepSums(const int32_t (&sums)[kSums]) const {
    const int group = warp_ / 4, g = lane_ / 4, t = lane_ % 4;
    const int column = group % kAcross * 64 + warp_ % 4 * 16 + g;
    const Ptr<int32_t> to = Cast<int32_t>(shared_) + ((group / kAcross * kTileM + 2 * t) * kSumStride + column);
#pragma unroll
    for (int i = 0; i < kSums; ++i) Store(to + ((8 * (i / 4) + i % 2) * kSumStride + 8 * (i / 2 % 2)), sums[i]);
  }

  // Scales, then biases.
  JAXINT8_DEVICE Ptr<float> Columns() const { return Cast<float>(shared_ + layout_.columns); }

  // A warp stores a row of outputs, four neighbours a lane.
  JAXINT8_DEVICE int64_t Place() const { return int64_t{m_ + warp_} * p_.n + n_ + 4 * lane_; }
  JAXINT8_DEVICE bool Stores() const { return m_ + warp_ < p_.m && 4 * lane_ < kTileN && n_ + 4 * lane_ < p_.n; }

  // Of 16 bits in the first two words.
  JAXINT8_DEVICE Word4 LoadResiduals() const {
    const Epilogue& e = p_.epilogue;
    if (!e.residual || p_.n % 4 != 0 || !Stores()) return {};
    if constexpr (kType == Type::kF32) return LoadAs<Word4>(e.residual + 4 * Place());
    const Word2 two = LoadAs<Word2>(e.residual + 2 * Place());
    return {two.x, two.y, 0, 0};
  }

  JAXINT8_DEVICE void Finish(const Word4& residual) const {
    if (!Stores()) return;
    const Ptr<const int32_t> sums = Cast<const int32_t>(shared_) + (warp_ * kSumStride + 4 * lane_);
    Word4 sum = LoadAs<Word4>(sums);
#pragma unroll
    for (int i = 1; i < kShare; ++i) {
      const Word4 other = LoadAs<Word4>(sums + i * kTileM * kSumStride);
      sum = {sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
    }
    const Word4 w = LoadAs<Word4>(Columns() + 4 * lane_), b = LoadAs<Word4>(Columns() + (kTileN + 4 * lane_));
    const float row_scale = Load(Cast<const float>(shared_ + (layout_.scales + 8 * warp_)));
    Epilogue e = p_.epilogue;
    e.type = kType;
    const auto finish = [&](uint32_t s, uint32_t scale, uint32_t bias) {
      return cuda::Finish(static_cast<int32_t>(s), row_scale, FloatFromBits(scale), FloatFromBits(bias));
    };
    const float y[4] = {finish(sum.x, w.x, b.x), finish(sum.y, w.y, b.y), finish(sum.z, w.z, b.z),
                        finish(sum.w, w.w, b.w)};
    if (p_.n % 4 != 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (n_ + 4 * lane_ + j < p_.n) StoreOutput(e, m_ + warp_, n_ + 4 * lane_ + j, Round(e, y[j]));
      }
    } else if constexpr (kType == Type::kF32) {
      Word4 words{Bits(y[0]), Bits(y[1]), Bits(y[2]), Bits(y[3])};
      if (e.residual) {
        words = {AddResiduals(e, words.x, residual.x), AddResiduals(e, words.y, residual.y),
                 AddResiduals(e, words.z, residual.z), AddResiduals(e, words.w, residual.w)};
      }
      StoreAs<Word4>(e.y + 4 * Place(), words);
    } else {
      Word2 words = kType == Type::kBF16 ? Word2{FloatsToBFloats(y[0], y[1]), FloatsToBFloats(y[2], y[3])}
                                         : Word2{FloatsToHalves(y[0], y[1]), FloatsToHalves(y[2], y[3])};
      if (e.residual) words = {AddResiduals(e, words.x, residual.x), AddResiduals(e, words.y, residual.y)};
      StoreAs<Word2>(e.y + 2 * Place(), words);
    }
  }

  const Params& p_;
  const PairedLayout layout_;
  const uint32_t start_;       // the address of the stages, a multiple of 1024
  const Ptr<uint8_t> shared_;  // the same as a pointer
  const uint32_t full_, empty_, codes_;
  const int rank_, warp_, lane_, steps_;
  int32_t m_, n_;
#endif
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_PAIRED_H_
