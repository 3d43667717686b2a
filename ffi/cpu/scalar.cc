// The reference rung: what every other rung must equal to the bit, for any machine that has a C++ compiler.
#include "attend_rows.h"
#include "int8.h"
#include "rows.h"

namespace jaxint8::cpu {
namespace {

bool Supported() { return true; }

void MultiplyBlock(const Block& b) {
  for (int64_t i = 0; i < b.m; ++i) {
    const int8_t* lo = b.lo + i * b.stride;
    const Row& row = b.rows[i];
    for (int64_t j = 0; j < b.n; ++j) {
      const int8_t* w = b.w + j * b.k;
      uint32_t sum = 0;  // unsigned: partial sums may wrap around
      if (b.with_hi) {
        for (int32_t o = 0; o < row.count; ++o) {
          const Outlier& outlier = row.outliers[o];
          sum += static_cast<uint32_t>(outlier.hi * w[outlier.column]);
        }
        sum <<= 7;
      }
      for (int64_t t = 0; t < b.k; ++t) sum += static_cast<uint32_t>(lo[t] * w[t]);
      b.c[i * kBlockN + j] = static_cast<int32_t>(sum);
    }
  }
  if (b.epilogue) Finish(*b.epilogue, 0, b.m);
}

}  // namespace

extern const Rung kScalar;
const Rung kScalar = {"scalar",      Supported,       EnterRow,           MarkRow, QuantizeRow, MultiplyBlock,
                      &kAttendPlain, /*chunk_m=*/256, /*scratch_bytes=*/0};

}  // namespace jaxint8::cpu
