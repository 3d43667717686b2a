// The elements of a row that each thread of a team has, by groups of eight, in two forms with one interface: read anew
// wherever they are looked at (the thread of index t has those from 8 t on, then 8 * team further, and so on), or held
// in registers.
#ifndef JAXINT8_FFI_CUDA_GROUPS_H_
#define JAXINT8_FFI_CUDA_GROUPS_H_

#include "device.h"
#include "int8.h"
#include "reader.h"
#include "team.h"

namespace jaxint8::cuda {

// In memory. Loops are not unrolled: of code that is run once, fetching it takes as long as running it.
template <Type kElements, bool kVector, int kTeams = 1>
class MemoryGroups {
 public:
  static constexpr Type kType = kElements;
  static constexpr bool kVectors = kVector;
  static constexpr int kHeld = 0;
  using Reader = RowReader<kElements, kVector>;
  using Group = typename Reader::Group;

  // to: where what Update makes is written.
  JAXINT8_DEVICE MemoryGroups(Ptr<const uint8_t> data, int k, Ptr<uint8_t> to = {}) : reader_{data, k}, to_(to) {}

  JAXINT8_DEVICE void FindLargest() {}
  JAXINT8_DEVICE int k() const { return reader_.k; }
  // Bit j is set where i + j is an element.
  JAXINT8_DEVICE uint32_t Valid(int i) const { return reader_.Valid(i); }
  // What stands beside the row, in the same form.
  template <Type kOther>
  JAXINT8_DEVICE MemoryGroups<kOther, kVector, kTeams> Beside(Ptr<const uint8_t> data) const {
    return {data, reader_.k};
  }

  // Calls body(column of its first element, group): elements are 0 from k on.
  template <typename Body>
  JAXINT8_DEVICE void ForEach(Body body) const {
    ForEachColumn([&](int i) { body(i, reader_.ReadGroup(i)); });
  }

  // The same, and perhaps for groups of zeros beyond the row.
  template <typename Body>
  JAXINT8_DEVICE void ForEachAndZeros(Body body) const {
    ForEach(body);
  }

  // body(values, others) changes eight values by those beside them.
  template <typename Other, typename Body>
  JAXINT8_DEVICE void Update(const Other& other, Body body) {
    ForEachColumn([&](int i) {
      float v[8], w[8];
      reader_.Read(i, v);
      other.Read(i, w);
      body(v, w);
      reader_.Write(to_, i, v);
    });
  }

  JAXINT8_DEVICE void Read(int i, float (&v)[8]) const { reader_.Read(i, v); }

 private:
  template <typename Body>
  JAXINT8_DEVICE void ForEachColumn(Body body) const {
#pragma unroll 1
    for (int i = 8 * Team<kTeams>::Index(); i < reader_.k; i += 8 * Team<kTeams>::Size()) body(i);
  }

  const Reader reader_;
  const Ptr<uint8_t> to_;
};

// In registers: up to kCount groups a thread, of a row whose k is a multiple of 8 and no more than that, of a team that
// is not half a block.
template <Type kElements, typename AnyTeam = Team<>, int kCount = 1>
class HeldGroups {
 public:
  static constexpr Type kType = kElements;
  static constexpr bool kVectors = true;
  static constexpr int kHeld = kCount;  // groups a thread
  using Reader = RowReader<kElements, true>;
  // With its largest magnitude, which is asked for several times.
  struct Group {
    typename Reader::Raw raw;
    uint32_t largest;
    JAXINT8_DEVICE uint32_t Largest() const { return largest; }
    JAXINT8_DEVICE Magnitudes<Reader::kHalves> All() const { return Reader::MagnitudesOf(raw); }
    JAXINT8_DEVICE void Widen(float (&v)[8]) const { Reader::Widen(raw, v); }
  };

  JAXINT8_DEVICE HeldGroups(Ptr<const uint8_t> data, int k)
      : k_(k), first_(8 * (32 * (AnyTeam::kTurn > 1 ? 1 : kCount) * AnyTeam::Warp() + AnyTeam::Lane())), groups_{} {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (Column(j) < k) groups_[j].raw = Reader{data, k}.ReadRaw(Column(j));
    }
  }

  // Waits for the elements. To be called before they are asked for their largest, and behind all that needs no element.
  JAXINT8_DEVICE void FindLargest() {
#pragma unroll
    for (int j = 0; j < kCount; ++j) groups_[j].largest = Reader::LargestOf(groups_[j].raw);
  }

  JAXINT8_DEVICE int k() const { return k_; }
  JAXINT8_DEVICE uint32_t Valid(int) const { return 0xff; }
  template <Type kOther>
  JAXINT8_DEVICE HeldGroups<kOther, AnyTeam, kCount> Beside(Ptr<const uint8_t> data) const {
    return {data, k_};
  }

  template <typename Body>
  JAXINT8_DEVICE void ForEach(Body body) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (Column(j) < k_) body(Column(j), groups_[j]);
    }
  }

  template <typename Body>
  JAXINT8_DEVICE void ForEachAndZeros(Body body) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (!AnyTeam::kOfWarps || Column(j) < k_) body(Column(j), groups_[j]);  // these may have many that are
    }
  }

  template <typename Other, typename Body>
  JAXINT8_DEVICE void Update(const Other& other, Body body) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float v[8], w[8];
      groups_[j].Widen(v);
      other.Read(j, w);
      body(v, w);
      groups_[j].raw = Reader::Narrow(v);
      groups_[j].largest = Reader::LargestOf(groups_[j].raw);
    }
  }

  JAXINT8_DEVICE void Read(int j, float (&v)[8]) const { groups_[j].Widen(v); }

  // Those of a warp stand side by side, or in turn with those of other warps if the compiler knows how many these are:
  // so that addresses differ by numbers that it knows.
  static constexpr int kApart = 256 * AnyTeam::kTurn;
  JAXINT8_DEVICE int Column(int j) const { return first_ + kApart * j; }

 private:
  const int k_, first_;
  Group groups_[kCount];
};

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_GROUPS_H_
