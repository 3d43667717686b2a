"""What a benchmark has measured, as data: lines, pairs and the groups that hold them.

A group is what was interleaved: one layer shape and m, one model, one axis of growth. Within it
samples of the same index belong to the same round. The surprising fact: the ratio of a pair is taken
round by round, so it cannot be computed from the medians; a bound is the best of all rounds, so that
a neighbour who disturbs its measurement does not make us look better.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxint8.evaluation.benchmark.machine import Ceiling, Work
from jaxint8.evaluation.benchmark.timing import Statistic, ratios


@dataclasses.dataclass(frozen=True)
class Line:
    """One engine at one place.

    Attributes:
      name: the engine.
      at: where on the group's axis, e.g. {"m": 8}; empty when the group has none.
      samples: seconds of each round, per call, token or step (`unit` of the suite).
      rate: per second, of what `unit` says, from the median; None when there is no such figure.
      unit: of the rate.
      bound: the least seconds possible, by the best that the machine did in the same rounds.
      share: bound / seconds.
      extra: more figures, e.g. peak memory.
    """

    name: str
    samples: tuple[float, ...]
    at: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rate: float | None = None
    unit: str = ""
    bound: float | None = None
    share: Statistic | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> Statistic:
        """Of the samples."""
        return Statistic.of(self.samples)


@dataclasses.dataclass(frozen=True)
class Pair:
    """How many times faster `name` is than `against`, round by round."""

    name: str
    against: str
    times: Statistic


# Ratios nearer to 1 than this are not told apart from noise on a shared machine.
NOISE = 1.25


@dataclasses.dataclass(frozen=True)
class Step:
    """How the time of an engine grows between neighbours on an axis: time after / time before."""

    name: str
    before: int
    after: int
    growth: Statistic

    @property
    def cliff(self) -> bool:
        """Whether time grows faster than the axis does, or falls; by more than noise.

        Not only in the median: in three rounds of four.
        """
        most = self.after / self.before
        return self.growth.low > NOISE * most or self.growth.high < 1 / NOISE


@dataclasses.dataclass(frozen=True)
class Group:
    """What was measured in the same rounds.

    Attributes:
      suite: "layer", "decode", "prefill", "load" or "growth".
      what: the parameters, e.g. {"k": 768, "n": 3072, "m": 1}.
      lines: one for each engine and place.
      pairs: comparisons between lines of the same place.
      steps: from place to place along an axis.
      bound: what bounds the lines: "read", "multiply" or None.
      machine: the ceilings in the rounds; empty when not measured.
      others: cores that other processes used meanwhile; None if unknown.
    """

    suite: str
    what: Mapping[str, Any]
    lines: Sequence[Line]
    pairs: Sequence[Pair] = ()
    steps: Sequence[Step] = ()
    bound: str | None = None
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    others: float | None = None

    def line(self, name: str, **at: int) -> Line | None:
        """The line of an engine at a place, if there is one."""
        found = (line for line in self.lines if line.name == name and line.at == at)
        return next(found, None)

    def times(self, name: str, against: str) -> Statistic | None:
        """How many times faster an engine is than another, if they were compared."""
        found = (p.times for p in self.pairs if (p.name, p.against) == (name, against))
        return next(found, None)

    def engines(self) -> list[str]:
        """Names of the engines, in order."""
        return list(dict.fromkeys(line.name for line in self.lines))


def line(
    name: str,
    samples: Sequence[float],
    *,
    per_call: float | None = None,
    unit: str = "",
    work: Work | None = None,
    ceilings: Sequence[Ceiling] = (),
    **fields: Any,
) -> Line:
    """A line from its samples.

    Args:
      name: the engine.
      samples: seconds, a value for each round.
      per_call: what a call does, in units; gives the rate.
      unit: of that, per second.
      work: what a call cannot avoid; with `ceilings` it gives bound and share.
      ceilings: of the same rounds, or empty.
      **fields: other fields of the line.
    """
    rate = None if per_call is None else per_call / Statistic.of(samples).median
    bound = share = None
    if work is not None and ceilings:
        bound = best(ceilings).seconds(work)
        share = Statistic.of([bound / seconds for seconds in samples])
    return Line(name, tuple(samples), rate=rate, unit=unit, bound=bound, share=share, **fields)


def pairs(samples: Mapping[str, Sequence[float]], wanted: Iterable[tuple[str, str]]) -> list[Pair]:
    """The comparisons (engine, against) of which both sides were measured."""
    return [
        Pair(name, against, ratios(samples[against], samples[name]))
        for name, against in wanted
        if name in samples and against in samples
    ]


def best(ceilings: Sequence[Ceiling]) -> Ceiling:
    """The highest of each: what the machine can do when nobody disturbs it."""
    return Ceiling(
        max(ceiling.bytes_per_s for ceiling in ceilings),
        max(ceiling.multiplies_per_s for ceiling in ceilings),
    )


def steps(name: str, samples: Mapping[int, Sequence[float]]) -> list[Step]:
    """The steps of an engine from each place to the next, in the order of the axis."""
    places = sorted(samples)
    return [
        Step(name, before, after, ratios(samples[after], samples[before]))
        for before, after in itertools.pairwise(places)
    ]


def machine(ceilings: Sequence[Ceiling], instruction: str | None) -> dict[str, Any]:
    """The ceilings of a group's rounds, for its report."""
    if not ceilings:
        return {}
    return {
        "read_bytes_per_s": dataclasses.asdict(Statistic.of([c.bytes_per_s for c in ceilings])),
        "multiplies_per_s": dataclasses.asdict(
            Statistic.of([c.multiplies_per_s for c in ceilings])
        ),
        "instruction": instruction,
    }


def to_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups as plain data."""
    content = []
    for group in groups:
        plain = dataclasses.asdict(group)
        for data, source in zip(plain["lines"], group.lines, strict=True):
            data["seconds"] = dataclasses.asdict(source.seconds)
        content.append(plain)
    return content
