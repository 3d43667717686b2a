"""How decoding grows with the context and the batch, and everything with the threads.

The surprising fact: how many threads XLA has is settled when it starts, so each number of threads
is a process of its own, which may use that many cores only; they are asked in turn.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxint8.cli.benchmarks.engines import Ours, Times, load_ours, prompt_tokens
from jaxint8.cli.benchmarks.generation import CEILING, ceiling_sampler, decode_work
from jaxint8.evaluation.benchmark import layers, machine, results
from jaxint8.evaluation.benchmark.layers import RULES, Effort, Shape, Weights
from jaxint8.evaluation.benchmark.results import Group, Line
from jaxint8.evaluation.benchmark.timing import Timed, interleave

# Tokens made at each place; the first comes from the prompt.
NEW = 17
# Context of the axis of batches, and of the axis of threads.
CONTEXT = 64


def context_group(engines: Mapping[str, Ours], contexts: Sequence[int], rounds: int) -> Group:
    """Measures a step of decoding, one sequence, after prompts of these lengths."""
    return _decode_axis(engines, "context", {c: (c, 1) for c in contexts}, rounds)


def batch_group(engines: Mapping[str, Ours], batches: Sequence[int], rounds: int) -> Group:
    """Measures a step of decoding so many sequences at once."""
    return _decode_axis(engines, "batch", {b: (CONTEXT, b) for b in batches}, rounds)


def _decode_axis(
    engines: Mapping[str, Ours], axis: str, places: Mapping[int, tuple[int, int]], rounds: int
) -> Group:
    """Measures each engine at each place: place -> (context, rows)."""
    samples: dict[Any, Callable[[], Any]] = {}
    for name, engine in engines.items():
        for place, (context, rows) in places.items():
            prompts = prompt_tokens(engine.model, context, rows)
            samples[name, place] = functools.partial(engine, prompts, NEW)
    others = machine.Others()
    if machine.has_ceilings():
        samples[CEILING] = ceiling_sampler(max(e.step_bytes for e in engines.values()))
    taken = interleave(samples, rounds)
    ceilings = taken.pop(CEILING, [])
    seconds = {key: [t.rest / (NEW - 1) for t in times] for key, times in taken.items()}
    lines, steps = [], []
    for (name, place), sampled in seconds.items():
        context, rows = places[place]
        work = decode_work(engines[name], context + NEW // 2, rows)
        at = {axis: place}
        lines.append(
            results.line(
                name,
                sampled,
                at=at,
                per_call=rows,
                unit="tokens/s",
                work=work,
                ceilings=ceilings,
            )
        )
    for name in engines:
        steps += results.steps(name, {p: seconds[name, p] for p in places})
    return Group(
        suite="growth",
        what={"axis": axis, "new": NEW, **({"context": CONTEXT} if axis == "batch" else {})},
        lines=lines,
        steps=steps,
        bound="read" if ceilings else None,
        machine=results.machine(ceilings, machine.instruction()),
        others=others.cores(),
    )


# Threads


def threads_group(
    source: str | None,
    shape: Shape,
    ms: Sequence[int],
    threads: Sequence[int],
    effort: Effort,
    *,
    prompt: int,
) -> Group:
    """Measures a layer at each m, and a model unless `source` is None, with so many threads.

    Args:
      source: the model.
      shape: of the layer.
      ms: rows of the layer.
      threads: numbers of threads, each at most the cores of this process.
      effort: how much to measure.
      prompt: tokens of the model's prompt.
    """
    with contextlib.ExitStack() as stack:
        workers = {count: stack.enter_context(_Worker(count)) for count in threads}
        for worker in workers.values():
            worker.ask(_prepare, source, shape, tuple(ms), effort.seconds, prompt)
        others = machine.Others([worker.ask(os.getpid) for worker in workers.values()])
        samples = {
            count: functools.partial(worker.ask, _sample) for count, worker in workers.items()
        }
        taken = interleave(samples, effort.rounds)
        used = others.cores()
    lines: list[Line] = []
    steps = []
    for name in next(iter(taken.values()))[0]:
        seconds = {count: [sampled[name] for sampled in taken[count]] for count in threads}
        lines += [results.line(name, seconds[c], at={"threads": c}) for c in threads]
        steps += results.steps(name, seconds)
    what = {"axis": "threads", "k": shape[0], "n": shape[1], "prompt": prompt}
    return Group(suite="growth", what=what, lines=lines, steps=steps, others=used)


class _Worker:
    """A process that may use so many cores, and answers one question at a time."""

    def __init__(self, cores: int) -> None:
        self._pool = concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_use, initargs=(cores,)
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def ask[T](self, function: Callable[..., T], *arguments: Any) -> T:
        return self._pool.submit(function, *arguments).result()


CAN_LIMIT = hasattr(os, "sched_setaffinity")
"""Whether a process can be kept to some cores here."""

_samples: dict[str, Callable[[], Any]] = {}
"""What a worker measures; set in the worker."""


def _use(cores: int) -> None:
    """Lets this process use the first so many of its cores; before JAX starts."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def _prepare(
    source: str | None, shape: Shape, ms: tuple[int, ...], seconds: float, prompt: int
) -> None:
    weights = Weights(shape)
    for m in ms:
        x = layers.activations(m, weights.k)
        run = layers.ours(weights, x, RULES["relative"])
        _samples[f"layer, m = {m}"] = Timed(run, seconds)
    if source is not None:
        engine = load_ours(source, ["relative"])["relative"]
        tokens = prompt_tokens(engine.model, prompt)
        _samples["model"] = functools.partial(engine, tokens, NEW)
    _sample()


def _sample() -> dict[str, float]:
    """Seconds of everything, once."""
    seconds = {}
    for name, sample in _samples.items():
        value = sample()
        if isinstance(value, Times):
            seconds["prefill"], seconds["decode"] = value.first, value.rest / (NEW - 1)
        else:
            seconds[name] = value
    return seconds
