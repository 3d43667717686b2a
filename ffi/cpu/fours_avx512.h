// Products of five to twenty rows with AVX512-VNNI where shuffles take the place of multiplications (Intel): weights as
// registers of four outputs by 16 columns, packed as the first rows are multiplied with them.
//
// Between dot products, whose sums are spread over 16 lanes, and strips, whose sums need no adding up but whose weights
// take four shuffles a register: here one shuffle brings 16 columns of four rows of weights together, codes of 16
// columns are repeated by the load itself, and sums are spread over four lanes. The surprising fact is that a fetch
// into the L1 cache gains a tenth over one into the L2 cache, though weights wait there for a whole turn.
#ifndef JAXINT8_FFI_CPU_FOURS_AVX512_H_
#define JAXINT8_FFI_CPU_FOURS_AVX512_H_

#include <cstdint>

#include "int8.h"

namespace jaxint8::cpu {

// c = x . w for all rows of a block, low parts only; with a plan the weights of its groups are written to `groups`,
// [group][kBlockN][4]. k is not 0.
void MultiplyFours(const Block& b, uint8_t* groups);

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_FOURS_AVX512_H_
