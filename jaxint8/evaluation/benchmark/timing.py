"""Interleaved rounds: everything that will be compared is measured once in every round.

The surprising fact is the pause before each measurement: thread pools (of ONNX Runtime, of OpenMP)
keep spinning for up to 50 ms after their work, and would be paid for by whoever comes next, with
half a core. And the operating system counts the time of a thread that runs on another core only at
its own ticks, so a pause must be longer than a few of them to see it spin.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

# A process that uses less than this share of a core, over a pause this long, does not spin.
IDLE_SHARE = 0.2
PAUSE = 0.025  # two ticks of a system that has a hundred in a second
# Longer than any known pool spins; a pool that never stops must not stop us.
LONGEST_WAIT = 0.3
# Of the calls, so many are made beforehand and not counted.
WARM_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Statistic:
    """The median of some values, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistic":
        """The statistic of one value or more; quartiles are interpolated between values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Statistic:
    """The statistic of the ratios of each round."""
    return Statistic.of([a / b for a, b in zip(numerators, denominators, strict=True)])


class Timed:
    """Times calls of a function: as many at a time as fill a stretch; the first are not counted."""

    def __init__(
        self,
        run: Callable[[int], object],
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Takes what to time.

        Args:
          run: makes so many calls, one after the other, and returns when all are done.
          seconds: how long to measure at a time; one call may take longer.
          clock: seconds.
        """
        self._run, self._seconds, self._clock = run, seconds, clock
        self._calls = 0

    def __call__(self) -> float:
        """Returns seconds per call."""
        if not self._calls:
            self._calls = self._calibrate()
        elif self._calls > 1:  # wakes threads, puts weights back into caches that others have used
            self._run(math.ceil(WARM_SHARE * self._calls))
        return self._time(self._calls) / self._calls

    def _calibrate(self) -> int:
        self._run(1)  # compiles
        calls = 1
        while True:
            elapsed = self._time(calls)
            if 2 * elapsed >= self._seconds:  # long enough to tell how long a call takes
                return max(1, math.ceil(self._seconds * calls / elapsed))
            calls *= 2 if elapsed > 0 else 16

    def _time(self, calls: int) -> float:
        start = self._clock()
        self._run(calls)
        return self._clock() - start


def interleave[K, T](
    samples: Mapping[K, Callable[[], T]],
    rounds: int,
    *,
    before: Callable[[], object] | None = None,
) -> dict[K, list[T]]:
    """Takes one sample of everything in every round.

    A round before the first is thrown away: it compiles, and learns how long a call takes. Each
    round begins one place later, so that nobody always follows the same neighbour.

    Args:
      samples: name -> takes one sample.
      rounds: how many samples of each.
      before: called before each sample; None waits until this process is idle.

    Returns:
      name -> samples, in the order of the rounds.
    """
    before = before or settle
    names = list(samples)
    taken: dict[K, list[T]] = {name: [] for name in names}
    for sample in samples.values():
        sample()
    for turn in range(rounds):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            before()
            taken[name].append(samples[name]())
    return taken


def settle(
    sleep: Callable[[float], object] = time.sleep,
    used: Callable[[], float] = time.process_time,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Waits until the threads of this process have stopped spinning, or LONGEST_WAIT is over."""
    end = clock() + LONGEST_WAIT
    while clock() < end:
        start, before = clock(), used()
        sleep(PAUSE)
        if used() - before < IDLE_SHARE * (clock() - start):
            return
