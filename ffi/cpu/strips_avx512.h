// Products of more than a few rows with AVX512-VNNI where shuffles take the place of multiplications (Intel): strips of
// 32 outputs, packed first and then multiplied with all rows, 12 rows at a time.
//
// tiles_avx512.h packs weights beside its multiplications, in small steps. Where one of the two multipliers also
// shuffles that hides nothing, and costs four times what packing by itself does. The surprising fact is how short a
// strip must be: it stays in the L1 cache, since a tile takes in two lines for each step of a dozen cycles, and from
// the L2 cache comes hardly more.
#ifndef JAXINT8_FFI_CPU_STRIPS_AVX512_H_
#define JAXINT8_FFI_CPU_STRIPS_AVX512_H_

#include <cstdint>

#include "int8.h"

namespace jaxint8::cpu {

constexpr int64_t kStripsMost = 32;  // rows; above, tiles are faster (twice as many where k is cut anyway)

// c = x . w for all rows of a block. With a plan high parts are left to whoever calls, and the weights of its groups
// written to `groups`, [group][kBlockN][4]: one addition for all pieces of a row, where many rows would ask every piece
// for theirs in vain. k is not 0.
void MultiplyStrips(const Block& b, uint8_t* groups);

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_STRIPS_AVX512_H_
