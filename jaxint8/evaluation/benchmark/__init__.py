"""Speed, measured so that it can be believed: interleaved rounds, medians, ratios and upper bounds.

Layers and the machine's ceilings are timed here; whole models are timed in cli/benchmarks. The
surprising fact: a ratio is the median of the ratios of each round and not the ratio of two medians,
for a shared machine slows down for seconds at a time, and the two sides of a round share that.
"""
