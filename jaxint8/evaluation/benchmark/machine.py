"""What the machine can do at most, and what others do to it meanwhile.

The ceilings are measured by the compiled extension: bytes read per second from a given buffer and
int8 multiplications per second. The surprising fact: they are measured in every round beside what
they bound and not once, for on a virtual machine they drift by a third within an hour.
"""

import dataclasses
import importlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("jaxint8._cpu")
    except ImportError:  # no compiled kernels in this installation
        return None


_EXTENSION = _load()
# Long enough for the clock's resolution and for a core to reach its speed, short beside a round.
STRETCH = 0.01
# Cores of others from which on times are doubtful, and how long to look (the kernel counts in
# hundredths of a second).
BUSY = 0.1
QUIET_STRETCH = 0.5


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Work:
    """What a computation cannot avoid.

    Attributes:
      read_bytes: of weights, each read once.
      multiplies: of int8 numbers.
    """

    read_bytes: int
    multiplies: int


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """One measurement of the machine: bytes and int8 multiplications per second, all cores."""

    bytes_per_s: float
    multiplies_per_s: float

    def seconds(self, work: Work) -> float:
        """The least time the work takes: reading and multiplying can overlap."""
        return max(work.read_bytes / self.bytes_per_s, work.multiplies / self.multiplies_per_s)

    def reading(self, work: Work) -> bool:
        """Whether reading is what takes longer."""
        reading = work.read_bytes / self.bytes_per_s
        return reading >= work.multiplies / self.multiplies_per_s


def has_ceilings() -> bool:
    """Whether this installation can measure ceilings."""
    return _EXTENSION is not None


def instruction() -> str | None:
    """The name of the fastest int8 instruction of this machine; None without the extension."""
    return None if _EXTENSION is None else _EXTENSION.measure_peak(1, 0.0)[0]


def ceiling(data: np.ndarray, threads: int | None = None, seconds: float = STRETCH) -> Ceiling:
    """Measures the ceilings.

    Args:
      data: contiguous; the reading is done on it, so that size and place of the weights count.
      threads: None for all cores of this process.
      seconds: how long to measure each.

    Raises:
      RuntimeError: there are no compiled kernels here.
    """
    if _EXTENSION is None:
        raise RuntimeError("ceilings are measured by the compiled kernels, and there are none here")
    threads = threads or cores()
    read = _EXTENSION.measure_bandwidth(data, threads, seconds)
    return Ceiling(read, _EXTENSION.measure_peak(threads, seconds)[1])


class Others:
    """How many cores everyone else used since this was made; None where nobody says (Linux does).

    A virtual machine's neighbours count as well, as far as the host shows them (steal).
    """

    def __init__(self, ours: Iterable[int] = ()) -> None:
        """Starts to watch; `ours` are the ids of other processes that belong to us."""
        self._ours = tuple(ours)
        self._start = self._read()

    def cores(self) -> float | None:
        """Cores in use by others, on average since the start."""
        now = self._read()
        if now is None or self._start is None:
            return None
        elapsed, busy, own = (a - b for a, b in zip(now, self._start, strict=True))
        return max(0.0, (busy - own) / elapsed) if elapsed > 0 else 0.0

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds: on the clock, of all cores in use, of ours in use."""
        try:
            ticks = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
            own = sum(map(_process_ticks, (os.getpid(), *self._ours)))
        except (OSError, ValueError):
            return None
        user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, ticks)
        busy = user + nice + system + irq + softirq + steal
        rate = os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy / rate, own / rate


def wait_until_quiet(seconds: float) -> bool:
    """Waits, at most so long, until others leave this machine alone; returns whether they do."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        others = Others()
        time.sleep(QUIET_STRETCH)
        if (others.cores() or 0.0) < BUSY:
            return True
    return False


def _process_ticks(process: int) -> int:
    """Ticks used by a process and by its children that have ended."""
    # The name, in parentheses, may hold anything; fields 14 to 17 are utime, stime, cutime, cstime.
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15]))
