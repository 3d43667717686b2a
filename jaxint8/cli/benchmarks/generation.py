"""Prefill and decoding of whole models: our methods beside each other, beside peers and bounds.

One continuation gives both figures, so the two suites share their rounds. The surprising fact: the
bound of decoding is one reading of all weights for each token, and grows little with the context.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxint8.cli.benchmarks.engines import (
    INT8_CACHE,
    INT8_HEAD,
    Engine,
    Ours,
    Times,
    prompt_tokens,
)
from jaxint8.cli.benchmarks.peers import CTRANSLATE2, LLAMA
from jaxint8.evaluation.benchmark import machine, results
from jaxint8.evaluation.benchmark.machine import Ceiling, Work
from jaxint8.evaluation.benchmark.results import Group, Line
from jaxint8.evaluation.benchmark.timing import interleave

CEILING = "ceiling"
COMPARED = ("relative", INT8_HEAD, INT8_CACHE)
AGAINST = ("float32", "llm_int8", LLAMA, CTRANSLATE2)


def generation_groups(
    suites: Sequence[str],
    engines: Mapping[str, Engine],
    *,
    prompt: int,
    new: int,
    rounds: int,
) -> list[Group]:
    """Measures prefill of one prompt and decoding after it.

    Args:
      suites: "prefill", "decode" or both.
      engines: what to measure, ours and others.
      prompt: tokens of the prompt.
      new: tokens made, of which the first belongs to the prefill.
      rounds: how often.

    Returns:
      A group for each suite.
    """
    ours = [engine for engine in engines.values() if isinstance(engine, Ours)]
    tokens = prompt_tokens(ours[0].model, prompt)
    others = machine.Others()
    samples: dict[str, Callable[[], Any]] = {
        name: lambda engine=engine: engine(tokens, new) for name, engine in engines.items()
    }
    if machine.has_ceilings():
        # The smallest set is read fastest: then it is a bound for all.
        samples[CEILING] = ceiling_sampler(min(engine.step_bytes for engine in ours))
    taken = interleave(samples, rounds)
    ceilings = taken.pop(CEILING, [])
    used = others.cores()
    what = {"prompt": prompt, "new": new}
    measured = {"prefill": _prefill, "decode": _decode}
    return [
        _group(suite, what, *measured[suite](engines, taken, ceilings, **what), ceilings, used)
        for suite in suites
    ]


def ceiling_sampler(size: int) -> Callable[[], Ceiling]:
    """Measures the ceilings on a buffer of that many bytes."""
    data = np.ones(size, np.int8)  # zeros would all be the same page of memory
    return lambda: machine.ceiling(data)


def _prefill(
    engines: Mapping[str, Engine],
    taken: Mapping[str, Sequence[Times]],
    ceilings: Sequence[Ceiling],
    prompt: int,
    new: int,
) -> tuple[list[Line], dict[str, list[float]]]:
    """Seconds of the prompt and the first token; int8 products bound it."""
    del new
    seconds = {name: [times.first for times in sampled] for name, sampled in taken.items()}
    work = next(e.work(prompt) for e in engines.values() if isinstance(e, Ours))
    lines = [
        results.line(
            name,
            sampled,
            per_call=prompt,
            unit="tokens/s",
            work=Work(engines[name].step_bytes, work.multiplies),
            ceilings=ceilings,
        )
        for name, sampled in seconds.items()
    ]
    return lines, seconds


def _decode(
    engines: Mapping[str, Engine],
    taken: Mapping[str, Sequence[Times]],
    ceilings: Sequence[Ceiling],
    prompt: int,
    new: int,
) -> tuple[list[Line], dict[str, list[float]]]:
    """Seconds of each token after the first; reading the weights bounds it."""
    seconds = {
        name: [times.rest / (new - 1) for times in sampled] for name, sampled in taken.items()
    }
    lines = [
        results.line(
            name,
            sampled,
            per_call=1,
            unit="tokens/s",
            work=decode_work(engines[name], prompt + new // 2),
            ceilings=ceilings,
        )
        for name, sampled in seconds.items()
    ]
    return lines, seconds


def decode_work(engine: Engine, context: int, rows: int = 1) -> Work:
    """What one step cannot but read: weights, and of ours also the keys and values of each row."""
    cached = rows * engine.cache_bytes(context) if isinstance(engine, Ours) else 0
    return Work(engine.step_bytes + cached, 0)


def _group(
    suite: str,
    what: Mapping[str, Any],
    lines: Sequence[Line],
    seconds: Mapping[str, Sequence[float]],
    ceilings: Sequence[Ceiling],
    others: float | None,
) -> Group:
    pairs = [(name, against) for name in COMPARED for against in (*AGAINST, *COMPARED)]
    return Group(
        suite=suite,
        what=what,
        lines=lines,
        pairs=results.pairs(seconds, [pair for pair in pairs if pair[0] != pair[1]]),
        bound={"prefill": "multiply", "decode": "read"}[suite] if ceilings else None,
        machine=results.machine(ceilings, machine.instruction()),
        others=others,
    )
