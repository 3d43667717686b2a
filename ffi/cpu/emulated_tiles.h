// Test only: the tile intrinsics that amx_int8.cc uses, in plain C++, for machines without AMX. Whatever the processor
// would refuse (an unconfigured tile, shapes that do not fit) ends the program. With JAXINT8_PLANTED_FAULT in the
// environment the last product of a sum is left out: a battery that does not notice is worth nothing.
#ifndef JAXINT8_FFI_CPU_EMULATED_TILES_H_
#define JAXINT8_FFI_CPU_EMULATED_TILES_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace jaxint8::cpu {
namespace {

struct EmulatedTile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64] = {};
};
thread_local EmulatedTile emulated_tiles[8];

inline void RequireTiles(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline EmulatedTile& ConfiguredTile(int tile) {
  RequireTiles(emulated_tiles[tile].rows > 0 && emulated_tiles[tile].bytes > 0, "a tile is not configured");
  return emulated_tiles[tile];
}

inline void EmulatedLoadConfig(const void* memory) {
  uint8_t config[64];
  std::memcpy(config, memory, sizeof config);
  RequireTiles(config[0] == 1 && config[1] == 0, "palette: expected 1, start row: expected 0");
  for (int i = 2; i < 16; ++i) RequireTiles(config[i] == 0, "a reserved byte is set");
  for (int tile = 0; tile < 16; ++tile) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * tile, 2);
    const int rows = config[48 + tile];
    RequireTiles(tile < 8 ? bytes <= 64 && rows <= 16 && (rows > 0) == (bytes > 0) : bytes == 0 && rows == 0,
                 "a tile is too large, or has rows or columns alone");
    if (tile < 8) {
      emulated_tiles[tile] = EmulatedTile{};
      emulated_tiles[tile].rows = rows;
      emulated_tiles[tile].bytes = bytes;
    }
  }
}

inline void EmulatedRelease() {
  for (EmulatedTile& tile : emulated_tiles) tile = EmulatedTile{};
}

inline void EmulatedLoad(int tile, const void* base, int64_t stride) {
  EmulatedTile& t = ConfiguredTile(tile);
  std::memset(t.data, 0, sizeof t.data);
  for (int i = 0; i < t.rows; ++i) {
    std::memcpy(t.data[i], static_cast<const char*>(base) + i * stride, static_cast<size_t>(t.bytes));
  }
}

inline void EmulatedStore(int tile, void* base, int64_t stride) {
  const EmulatedTile& t = ConfiguredTile(tile);
  for (int i = 0; i < t.rows; ++i) {
    std::memcpy(static_cast<char*>(base) + i * stride, t.data[i], static_cast<size_t>(t.bytes));
  }
}

inline void EmulatedZero(int tile) {
  EmulatedTile& t = ConfiguredTile(tile);
  std::memset(t.data, 0, sizeof t.data);
}

// Signed bytes by signed ones.
inline void EmulatedProduct(int sums, int rows, int columns) {
  EmulatedTile& c = ConfiguredTile(sums);
  const EmulatedTile &a = ConfiguredTile(rows), &b = ConfiguredTile(columns);
  RequireTiles(a.rows == c.rows && a.bytes == 4 * b.rows && b.bytes == c.bytes, "shapes of a product do not fit");
  static const int left_out = std::getenv("JAXINT8_PLANTED_FAULT") ? 1 : 0;
  for (int i = 0; i < c.rows; ++i) {
    for (int j = 0; j < c.bytes / 4; ++j) {
      uint32_t sum;
      std::memcpy(&sum, c.data[i] + 4 * j, 4);
      for (int t = 0; t < a.bytes - left_out; ++t) {
        sum += static_cast<uint32_t>(static_cast<int8_t>(a.data[i][t]) *
                                     static_cast<int8_t>(b.data[t / 4][4 * j + t % 4]));
      }
      std::memcpy(c.data[i] + 4 * j, &sum, 4);
    }
  }
}

}  // namespace
}  // namespace jaxint8::cpu

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#define _tile_loadconfig ::jaxint8::cpu::EmulatedLoadConfig
#define _tile_release ::jaxint8::cpu::EmulatedRelease
#define _tile_loadd ::jaxint8::cpu::EmulatedLoad
#define _tile_stored ::jaxint8::cpu::EmulatedStore
#define _tile_zero ::jaxint8::cpu::EmulatedZero
#define _tile_dpbssd ::jaxint8::cpu::EmulatedProduct

#endif  // JAXINT8_FFI_CPU_EMULATED_TILES_H_
