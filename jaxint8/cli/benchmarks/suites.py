"""The suites of jaxint8-bench: what each measures, in full and in a hurry.

The surprising fact: the sizes of the full run are those of published measurements, the paper's
speed table and the layers of 125M to 175B models, and not chosen to please.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from jaxint8.cli.benchmarks import growth
from jaxint8.cli.benchmarks.engines import INT8_CACHE, OURS, Engine, Ours, load_ours
from jaxint8.cli.benchmarks.generation import generation_groups
from jaxint8.cli.benchmarks.load import load_group
from jaxint8.cli.benchmarks.peers import peer_engines
from jaxint8.cli.benchmarks.scale import scale_groups
from jaxint8.evaluation.benchmark import machine
from jaxint8.evaluation.benchmark.growth import rows_axis, rows_group
from jaxint8.evaluation.benchmark.layers import Effort, Shape, layer_groups
from jaxint8.evaluation.benchmark.results import Group
from jaxint8.models.loading import describe

GROWING = ("relative", INT8_CACHE)
"""Our engines of the suite growth; the second only where the context grows, which is what it is for."""
SUITES = ("layer", "decode", "prefill", "load", "growth", "scale")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, and how thoroughly.

    Attributes:
      effort: rounds, and seconds at a time, of layers.
      rounds: of whole models.
      shapes: (k, n) of the layers.
      ms: rows of the layers.
      growth_shape: of the layer that m grows for.
      most_rows: to which m grows.
      prompt: tokens of the prompt of decode and prefill.
      new: tokens made after it.
      contexts: of the growth of decoding.
      batches: of the growth of decoding.
      checkpoint_bytes: of the random checkpoint that is loaded.
      layers: of the growth of compiling.
      peers: whether to measure other engines.
    """

    effort: Effort = dataclasses.field(default=Effort(rounds=7, seconds=0.1))
    rounds: int = 7
    shapes: Sequence[Shape] = ((768, 3072), (4096, 4096), (4096, 11008), (12288, 12288))
    ms: Sequence[int] = (1, 8, 32, 128, 512, 2048)
    growth_shape: Shape = (4096, 4096)
    most_rows: int = 4096
    prompt: int = 512
    new: int = 129
    contexts: Sequence[int] = (16, 64, 128, 256, 512, 1024, 2048)
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32)
    checkpoint_bytes: float = 3e9
    layers: Sequence[int] = (2, 4, 8, 16, 32)
    peers: bool = True


QUICK = Plan(
    effort=Effort(rounds=3, seconds=0.005),
    rounds=3,
    shapes=((768, 3072), (4096, 4096)),
    ms=(1, 8, 128),
    growth_shape=(768, 3072),
    most_rows=256,
    prompt=128,
    new=33,
    contexts=(16, 64, 256),
    batches=(1, 4),
    checkpoint_bytes=3e8,
    layers=(2, 4, 8),
)


def run(suites: Sequence[str], source: str, plan: Plan) -> Iterator[Group]:
    """Measures the suites in the order given, decode and prefill together.

    Yields:
      Groups, each as soon as it is measured.

    Raises:
      ValueError, OSError: the model cannot be loaded; before anything is measured.
    """
    generation = [suite for suite in suites if suite in ("decode", "prefill")]
    with contextlib.ExitStack() as stack:
        engines, others = {}, {}
        if generation or "growth" in suites:
            engines = load_ours(source, OURS if generation else GROWING)
        if generation and plan.peers:
            others = stack.enter_context(_peers(source, engines, plan))
        elif "load" in suites:
            describe(source).reader.close()
        done: set[str] = set()
        for suite in suites:
            if suite in done:
                continue
            done |= {suite}
            if suite == "layer":
                for shape in plan.shapes:
                    yield from layer_groups(shape, plan.ms, plan.effort, with_peers=plan.peers)
            elif suite in generation:
                done |= set(generation)
                both: dict[str, Engine] = {**engines, **others}
                lengths = {"prompt": plan.prompt, "new": plan.new}
                yield from generation_groups(generation, both, rounds=plan.rounds, **lengths)
            elif suite == "load":
                yield load_group(source, plan.rounds)
            elif suite == "scale":
                yield from scale_groups(plan.checkpoint_bytes, plan.layers, min(plan.rounds, 3))
            else:
                yield from _growth(source, engines, plan)


def _peers(
    source: str, engines: Mapping[str, Ours], plan: Plan
) -> contextlib.AbstractContextManager[dict[str, Engine]]:
    checkpoint = describe(source)
    checkpoint.reader.close()
    path = checkpoint.reader.path
    gguf = path if path.suffix == ".gguf" else None
    tokens = plan.prompt + plan.new
    return peer_engines(engines["float32"].model, gguf, machine.cores(), tokens)


def _growth(source: str, engines: Mapping[str, Ours], plan: Plan) -> Iterator[Group]:
    growing = {name: engines[name] for name in GROWING}
    ours = {"relative": engines["relative"]}
    positions = ours["relative"].model.config.max_positions
    rows = rows_axis(plan.most_rows)
    yield rows_group(plan.growth_shape, rows, plan.effort, with_peers=plan.peers)
    contexts = [context for context in plan.contexts if context + growth.NEW <= positions]
    yield growth.context_group(growing, contexts, plan.rounds)
    yield growth.batch_group(growing, plan.batches, plan.rounds)
    threads = [count for count in (1, 2, 4, 8, 16, 32) if count < machine.cores()]
    threads.append(machine.cores())
    if growth.CAN_LIMIT and len(threads) > 1:
        ms = [m for m in plan.ms if m in (1, 8, 128, 512)]
        effort = dataclasses.replace(plan.effort, rounds=plan.rounds)
        yield growth.threads_group(
            source, plan.growth_shape, ms, threads, effort, prompt=min(plan.prompt, positions // 2)
        )
