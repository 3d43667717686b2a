// What this machine can do at most: int8 multiplications and bytes read per second, the denominators of a benchmark.
//
// Both are measured, not looked up: clocks, hypervisors and neighbours make a data sheet the wrong denominator.
#ifndef JAXINT8_FFI_CPU_CEILINGS_H_
#define JAXINT8_FFI_CPU_CEILINGS_H_

#include <cstdint>

namespace jaxint8::cpu {

struct Peak {
  const char* instruction;       // the fastest int8 multiply-add of this machine
  double multiplies_per_second;  // of 8-bit numbers, each with its addition, all threads together
};

// Runs nothing but that instruction, on registers, for about so many seconds.
Peak MeasurePeak(int threads, double seconds, const char* instruction = nullptr);

// Bytes per second that all threads together read from `data`, over and over, each its own part; at least one pass,
// however short `seconds`, in the faster of two ways. A set that fits a cache is read from there after the first pass,
// which is not counted.
double MeasureBandwidth(const void* data, int64_t bytes, int threads, double seconds);

}  // namespace jaxint8::cpu

#endif  // JAXINT8_FFI_CPU_CEILINGS_H_
