// The functions of hopper.h for the block executor. What the hardware does by itself happens as late as it may: a copy
// arrives when no thread can go on without it, a product reads its operands when it is waited for. Until then the bytes
// of a copy count as never written and the sums of a product hold nonsense, so that whoever reads or overwrites too
// early is found out. Layouts are those of the PTX ISA: swizzles permute the address bits, fragments as in hopper.h.
#ifndef JAXINT8_FFI_CUDA_EXECUTOR_HOPPER_H_
#define JAXINT8_FFI_CUDA_EXECUTOR_HOPPER_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "device.h"

#define JAXINT8_HOPPER

namespace jaxint8::cuda {

inline uint32_t SharedAddress(Ptr<uint8_t> p) { return static_cast<uint32_t>(p.offset); }
inline uint32_t SharedAddress(SharedWords p) { return static_cast<uint32_t>(p.offset); }

// --- Barriers.

struct MemoryBarrier {
  int64_t count, arrivals, bytes = 0;  // bytes: expected and not there yet
  uint32_t phase = 0, ended = 1;       // phases ended, and when the last one did
  void Settle() {
    if (arrivals != count || bytes != 0) return;
    arrivals = 0;
    ++phase;
    ended = TheMachine().Tick();
  }
};

inline MemoryBarrier& BarrierAt(uint32_t address, int rank, const Site& site) {
  auto& all = TheMachine().barriers();
  const auto found = all.find({rank, address});
  if (found == all.end()) TheMachine().Fail(site, "no barrier was made here");
  return *static_cast<MemoryBarrier*>(found->second.get());
}

inline void InitBarrier(uint32_t barrier, uint32_t count, Site site = Site::Here()) {
  Machine& m = TheMachine();
  if (barrier % 8 != 0 || barrier + 8 > m.shared_buffer()->bytes) m.Fail(site, "bad place for a barrier");
  m.barriers()[{m.rank(), barrier}] = std::make_shared<MemoryBarrier>(MemoryBarrier{count, 0});
}
inline void FenceBarrierInit() {}

inline void ArriveAt(uint32_t barrier, uint32_t block, Site site = Site::Here()) {
  Machine& m = TheMachine();
  if (m.Planted(site, Fault::kSkipBarrier)) return;
  if (block >= static_cast<uint32_t>(m.cluster())) m.Fail(site, "no such block in the cluster");
  MemoryBarrier& b = BarrierAt(barrier, static_cast<int>(block), site);
  if (++b.arrivals > b.count) m.Fail(site, "more arrivals than the barrier expects");
  b.Settle();
}
inline void ArriveAtExpecting(uint32_t barrier, uint32_t block, uint32_t bytes, Site site = Site::Here()) {
  BarrierAt(barrier, static_cast<int>(block), site).bytes += bytes;
  ArriveAt(barrier, block, site);
}
inline void Arrive(uint32_t barrier, Site site = Site::Here()) {
  ArriveAt(barrier, static_cast<uint32_t>(TheMachine().rank()), site);
}
inline void ArriveExpecting(uint32_t barrier, uint32_t bytes, Site site = Site::Here()) {
  BarrierAt(barrier, TheMachine().rank(), site).bytes += bytes;
  Arrive(barrier, site);
}
inline void WaitBarrier(uint32_t barrier, uint32_t parity, Site site = Site::Here()) {
  Machine& m = TheMachine();
  if (m.Planted(site, Fault::kSkipWait)) return;
  const MemoryBarrier& b = BarrierAt(barrier, m.rank(), site);
  m.WaitUntil(site, [&b, parity] { return (b.phase & 1) != (parity & 1) ? b.ended : 0; });
}

inline void CopyAsyncArrive(uint32_t barrier, Site site = Site::Here()) {
  Machine& m = TheMachine();
  MemoryBarrier& b = BarrierAt(barrier, m.rank(), site);
  const bool early = m.Planted(site, Fault::kSkipWait);
  const auto arrive = [&b] {
    ++b.arrivals;
    b.Settle();
  };
  if (early) arrive();
  m.Postpone([=, copies = std::move(m.open_copies())] {
    for (const auto& copy : copies) {
      if (copy.from) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    if (!early) arrive();
  });
  m.open_copies().clear();
}

inline uint32_t ClusterRank() { return static_cast<uint32_t>(TheMachine().rank()); }
inline void ClusterBarrier(Site site = Site::Here()) { TheMachine().ClusterBarrier(site); }

inline void FenceCluster() {}

inline void ClusterArrive(Site site = Site::Here()) { TheMachine().ClusterArrive(site); }
inline void ClusterWait(Site site = Site::Here()) { TheMachine().ClusterWait(site); }

inline void StoreRemote(uint32_t address, int block, uint32_t value, Site site = Site::Here()) {
  Machine& m = TheMachine();
  if (block < 0 || block >= m.cluster()) m.Fail(site, "no such block in the cluster");
  Buffer* shared = m.shared_buffer(block);
  std::memcpy(m.Access(shared, 0, shared->bytes, address, 4, 4, true, false, site), &value, 4);
}

// --- Copies of tiles.

struct TileMap {
  Ptr<const int8_t> data;
  int64_t rows, k, stride;
  int box_rows;
};

inline const char* MakeTileMap(TileMap* map, Ptr<const int8_t> data, int64_t rows, int64_t k, int64_t stride,
                               int box_rows) {
  if (rows < 1 || k < 1 || stride < k || stride % 16 != 0 || box_rows < 1 || box_rows > 256) {
    return "MakeTileMap: refused the shape";
  }
  if (reinterpret_cast<uintptr_t>(data.buffer->data + data.offset) % 16 != 0) return "MakeTileMap: misaligned";
  *map = {data, rows, k, stride, box_rows};
  return nullptr;
}

inline void FetchMap(const TileMap*) {}
inline void FenceAccelerator() {}
inline void FenceShared(Site site = Site::Here()) { TheMachine().FenceShared(site); }

// Where byte `byte` of row `row` of a tile lies, for rows of 128 or 64 bytes swizzled by as many: bits 4 to 6 (5) of
// the address are combined with bits 7 to 9 (8).
inline uint32_t Swizzled(uint32_t base, int row_bytes, int row, int byte) {
  const uint32_t address = base + static_cast<uint32_t>(row * row_bytes + byte);
  return address ^ (address >> 3 & (row_bytes == 128 ? 0x70u : 0x30u));
}

// Until a copy arrives, where it goes counts as never written.
inline void Undefine(Buffer* shared, int64_t at) {
  Shadow& s = shared->shadow[at];
  s.defined = false;
  s.fenced = true;
  s.write = s.read = Touch();
  shared->data[at] = 0x5b;
}

inline void CopyTileTo(const TileMap* map, uint32_t to, uint32_t barrier, int32_t k, int32_t row, int rank,
                       const Site& site) {
  Machine& m = TheMachine();
  Buffer* shared = m.shared_buffer(rank);
  if (to % 128 != 0 || to + map->box_rows * 128 > shared->bytes) m.Fail(site, "bad place in shared memory for a tile");
  if (m.Planted(site, Fault::kShiftIndex)) row += 1;
  for (int64_t i = 0; i < int64_t{map->box_rows} * 128; ++i) Undefine(shared, to + i);
  MemoryBarrier& b = BarrierAt(barrier, rank, site);
  m.Postpone([=, &b] {
    for (int r = 0; r < map->box_rows; ++r) {
      for (int c = 0; c < 128; ++c) {
        const int64_t at_row = row + r, at_k = k + c;
        const bool inside = at_row >= 0 && at_row < map->rows && at_k >= 0 && at_k < map->k;
        uint8_t byte = 0;
        if (inside) {
          const int64_t offset = map->data.offset + at_row * map->stride + at_k;
          if (offset < map->data.low || offset >= map->data.high) throw Failure(site.Name() + ": tile out of bounds");
          const Shadow& s = map->data.buffer->shadow[offset];
          if (!s.defined) throw Failure(site.Name() + ": copies memory that nothing has written");
          byte = map->data.buffer->data[offset];
        }
        const uint32_t place = Swizzled(to, 128, r, c);
        shared->data[place] = byte;
        shared->shadow[place].defined = true;
      }
    }
    b.bytes -= int64_t{map->box_rows} * 128;
    b.Settle();
  });
}

inline void CopyTile(const TileMap* map, uint32_t to, uint32_t barrier, int32_t k, int32_t row,
                     Site site = Site::Here()) {
  CopyTileTo(map, to, barrier, k, row, TheMachine().rank(), site);
}
inline void CopyTileToAll(const TileMap* map, uint32_t to, uint32_t barrier, int32_t k, int32_t row, uint16_t mask,
                          Site site = Site::Here()) {
  for (int rank = 0; rank < 16; ++rank) {
    if (mask >> rank & 1) CopyTileTo(map, to, barrier, k, row, rank, site);
  }
}

inline void CopyBytes(uint32_t to, Ptr<const int8_t> from, uint32_t bytes, uint32_t barrier, Site site = Site::Here()) {
  Machine& m = TheMachine();
  const int rank = m.rank();
  Buffer* shared = m.shared_buffer();
  if (to % 16 != 0 || bytes % 16 != 0 || to + bytes > shared->bytes) m.Fail(site, "bad place or size of a copy");
  if (m.Planted(site, Fault::kShiftIndex)) from.offset += 16;
  if (reinterpret_cast<uintptr_t>(from.buffer->data + from.offset) % 16 != 0) m.Fail(site, "misaligned copy");
  if (from.offset < from.low || from.offset + bytes > from.high) m.Fail(site, "copy out of bounds");
  for (uint32_t i = 0; i < bytes; ++i) {
    Undefine(shared, to + i);
    if (!from.buffer->shadow[from.offset + i].defined) m.Fail(site, "copies memory that nothing has written");
  }
  MemoryBarrier& b = BarrierAt(barrier, rank, site);
  m.Postpone([=, &b] {
    for (uint32_t i = 0; i < bytes; ++i) {
      shared->data[to + i] = static_cast<uint8_t>(from.buffer->data[from.offset + i]);
      shared->shadow[to + i].defined = true;
    }
    b.bytes -= bytes;
    b.Settle();
  });
}

inline void CopyToBlock(int block, uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier,
                        Site site = Site::Here()) {
  Machine& m = TheMachine();
  if (block < 0 || block >= m.cluster()) m.Fail(site, "no such block in the cluster");
  Buffer *source = m.shared_buffer(), *shared = m.shared_buffer(block);
  if (to % 16 != 0 || from % 16 != 0 || bytes % 16 != 0 || to + bytes > shared->bytes) {
    m.Fail(site, "bad place or size of a copy");
  }
  if (m.Planted(site, Fault::kShiftIndex)) from += 16;
  if (from + bytes > source->bytes) m.Fail(site, "copy out of bounds");
  for (uint32_t i = 0; i < bytes; ++i) {
    Undefine(shared, to + i);
    const Shadow& s = source->shadow[from + i];
    if (!s.defined) m.Fail(site, "copies memory that nothing has written");
    if (!s.fenced) m.Fail(site, "copies a store that was not fenced");
  }
  MemoryBarrier& b = BarrierAt(barrier, block, site);
  m.Postpone([=, &b, &m, rank = m.rank()] {
    if (m.Ended(rank) || m.Ended(block)) throw Failure(site.Name() + ": a block ended before its copies");
    for (uint32_t i = 0; i < bytes; ++i) {
      shared->data[to + i] = source->data[from + i];
      shared->shadow[to + i].defined = true;
    }
    b.bytes -= bytes;
    b.Settle();
  });
}

template <typename Words>
void SendToBlock(int block, uint32_t to, const Words& words, uint32_t barrier, Site site = Site::Here()) {
  constexpr uint32_t kBytes = sizeof words;
  Machine& m = TheMachine();
  if (block < 0 || block >= m.cluster()) m.Fail(site, "no such block in the cluster");
  Buffer* shared = m.shared_buffer(block);
  if (m.Planted(site, Fault::kShiftIndex)) to += kBytes;
  if (to % kBytes != 0 || to + kBytes > shared->bytes) m.Fail(site, "bad place for words");
  for (uint32_t i = 0; i < kBytes; ++i) Undefine(shared, to + i);
  MemoryBarrier& b = BarrierAt(barrier, block, site);
  m.Postpone([=, &b, &m] {
    if (m.Ended(block)) throw Failure(site.Name() + ": a block ended before what was sent to it came");
    std::memcpy(shared->data + to, &words, kBytes);
    for (uint32_t i = 0; i < kBytes; ++i) shared->shadow[to + i].defined = true;
    m.Receive(block, to, kBytes);
    b.bytes -= kBytes;
    b.Settle();
  });
}

// --- Products of a warpgroup.

template <int kRowBytes>
uint64_t TileDescriptor(uint32_t address) {
  return uint64_t{kRowBytes == 128 ? 1 : 2} << 62 | uint64_t{8 * kRowBytes >> 4} << 32 | (address & 0x3ffff) >> 4;
}

// The products that a warp has queued: each is a quarter of its warpgroup's.
struct QueuedProduct {
  uint64_t a, b;
  bool add, swapped, sparse;
  int columns;
  uint32_t places[32];           // of sparse ones, by lane
  const uint32_t* place_of[32];  // where these are, and stay until the product is waited for
  int32_t* c[32];
  Site site;
};
struct ProductQueue {
  std::vector<QueuedProduct> open;
  std::vector<std::vector<QueuedProduct>> groups;
  // Sums that products under way will change: what they were, while the thread sees nonsense.
  std::map<int32_t*, std::vector<int32_t>> sums;
};
inline ProductQueue& QueueOfWarp() {
  auto& state = TheMachine().warp_state()[TheMachine().warp()];
  if (!state) state = std::make_shared<ProductQueue>();
  return *static_cast<ProductQueue*>(state.get());
}

// 32 bytes of a row of a tile in shared memory.
inline void ReadTileRow(uint64_t descriptor, int row, int8_t* to, const Site& site) {
  Machine& m = TheMachine();
  const int row_bytes = descriptor >> 62 == 1 ? 128 : 64;
  const auto base = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  Buffer* shared = m.shared_buffer();
  for (int i = 0; i < 32; ++i) {
    const uint32_t place = Swizzled(base, row_bytes, row, i);
    if (place >= shared->bytes) m.Fail(site, "product reads out of bounds");
    const Shadow& s = shared->shadow[place];
    if (!s.defined) m.Fail(site, "product reads shared memory that nothing has written or copied yet");
    if (!s.fenced) m.Fail(site, "product reads a store that was not fenced");
    to[i] = static_cast<int8_t>(shared->data[place]);
  }
}

// The warp's 16 rows of a in full: 32 columns, or 64 of which 32 are stored.
inline void ReadRowsOfA(const QueuedProduct& p, int8_t (&a)[16][64]) {
  for (int lane = 0; p.sparse && lane < 32; ++lane) {
    if (*p.place_of[lane] != p.places[lane]) TheMachine().Fail(p.site, "places changed before the product has ended");
  }
  const int first = TheMachine().thread() / 32 % 4 * 16;
  for (int r = 0; r < 16; ++r) {
    int8_t stored[32];
    ReadTileRow(p.a, first + (p.swapped ? r ^ 8 : r), stored, p.site);
    std::memset(a[r], 0, 64);
    if (!p.sparse) std::memcpy(a[r], stored, 32);
    for (int i = 0; p.sparse && i < 16; ++i) {
      const uint32_t places = p.places[4 * (r % 8) + i / 8 * 2 + r / 8] >> i % 8 * 4;
      const uint32_t one = places & 3, other = places >> 2 & 3;
      if (one >= other) TheMachine().Fail(p.site, "places of a sparse product that are not in order");
      a[r][4 * i + static_cast<int>(one)] = stored[2 * i];
      a[r][4 * i + static_cast<int>(other)] = stored[2 * i + 1];
    }
  }
}

inline void Multiply(const QueuedProduct& p, ProductQueue& queue) {
  int8_t a[16][64];
  ReadRowsOfA(p, a);
  const int depth = p.sparse ? 64 : 32;
  std::vector<int8_t> b(static_cast<size_t>(p.columns) * 64);
  for (int r = 0; r < p.columns; ++r) {
    int8_t* row = &b[static_cast<size_t>(r) * 64];
    ReadTileRow(p.b, r, row, p.site);
    if (p.sparse) ReadTileRow(p.b + 2, r, row + 32, p.site);  // 32 bytes further
  }
  for (int lane = 0; lane < 32; ++lane) {
    std::vector<int32_t>& c = queue.sums.at(p.c[lane]);
    for (int e = 0; e < p.columns / 2; ++e) {
      const int row = lane / 4 + 8 * (e / 2 % 2), column = 8 * (e / 4) + 2 * (lane % 4) + e % 2;
      const int8_t* of_b = &b[static_cast<size_t>(column) * 64];
      uint32_t sum = p.add ? static_cast<uint32_t>(c[static_cast<size_t>(e)]) : 0;
      for (int i = 0; i < depth; ++i) sum += static_cast<uint32_t>(int32_t{a[row][i]} * of_b[i]);
      c[static_cast<size_t>(e)] = static_cast<int32_t>(sum);
    }
  }
}

// Queues a product of the warp; places: null if a is dense.
template <int kSize>
void Queue(int32_t (&c)[kSize], uint64_t a, uint64_t b, uint32_t add, const uint32_t* places, Site site) {
  struct Argument {
    uint64_t a, b;
    uint32_t add;
    const uint32_t* places;
    int32_t* c;
  } argument{a, b, add, places, c};
  Machine& m = TheMachine();
  const bool swapped = m.Planted(site, Fault::kSwapFragment), sparse = places != nullptr;
  ProductQueue& queue = QueueOfWarp();
  m.Collective(site, &argument, [&](void* const* all) {
    const auto* first = static_cast<Argument*>(all[0]);
    QueuedProduct p{first->a, first->b, first->add != 0, swapped, sparse, 2 * kSize, {}, {}, {}, site};
    // Those of one shape are in order by themselves; no others are, but for a wait between.
    const auto differs = [&](const QueuedProduct& other) { return other.c[0] == first->c && other.sparse != sparse; };
    bool mixed = std::any_of(queue.open.begin(), queue.open.end(), differs);
    for (const auto& group : queue.groups) mixed = mixed || std::any_of(group.begin(), group.end(), differs);
    if (mixed) m.Fail(site, "products of different shapes with the same sums, and no wait between");
    for (int lane = 0; lane < 32; ++lane) {
      const auto* other = static_cast<Argument*>(all[lane]);
      if (other->a != p.a || other->b != p.b || (other->add != 0) != p.add) m.Fail(site, "lanes differ in a product");
      p.c[lane] = other->c;
      if (sparse) {
        p.places[lane] = *other->places;
        p.place_of[lane] = other->places;
      }
      if (queue.sums.count(other->c) == 0) {
        queue.sums[other->c].assign(other->c, other->c + kSize);
        for (int i = 0; i < kSize; ++i) other->c[i] = 0x5bad5bad;
      }
    }
    queue.open.push_back(p);
  });
}
template <int kSize>
void Product(int32_t (&c)[kSize], uint64_t a, uint64_t b, uint32_t add, Site site = Site::Here()) {
  Queue(c, a, b, add, nullptr, site);
}
template <int kSize>
void SparseProduct(int32_t (&c)[kSize], uint64_t a, uint64_t b, uint32_t& places, Site site = Site::Here()) {
  Queue(c, a, b, 1, &places, site);
}

inline void ProductFence() {}
inline void ProductCommit(Site site = Site::Here()) {
  TheMachine().Collective(site, nullptr, [](void* const*) {
    ProductQueue& queue = QueueOfWarp();
    queue.groups.push_back(std::move(queue.open));
    queue.open.clear();
  });
}
template <int kPending>
void ProductWait(Site site = Site::Here()) {
  const size_t keep = kPending + (TheMachine().Planted(site, Fault::kSkipWait) ? 1 : 0);
  TheMachine().Collective(site, nullptr, [keep](void* const*) {
    ProductQueue& queue = QueueOfWarp();
    while (queue.groups.size() > keep) {
      for (const QueuedProduct& p : queue.groups.front()) Multiply(p, queue);
      queue.groups.erase(queue.groups.begin());
    }
    if (!queue.groups.empty()) return;
    for (const auto& [to, sums] : queue.sums) std::memcpy(to, sums.data(), 4 * sums.size());
    queue.sums.clear();
  });
}
template <int kSize>
void Pin(int32_t (&)[kSize]) {}
template <int kSize>
void Hold(const uint32_t (&)[kSize]) {}

template <int kRegisters>
void GiveRegisters() {}
template <int kRegisters>
void TakeRegisters() {}

}  // namespace jaxint8::cuda

#endif  // JAXINT8_FFI_CUDA_EXECUTOR_HOPPER_H_
