"""How the time of a layer grows with the rows m: every neighbour is measured in the same rounds.

What is looked for are cliffs: one row more must not cost more than in proportion, and must not make
a call faster. The surprising fact: places just above a multiple of a tile are where they hide, so
the axis is dense there and not only at powers of two.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxint8.evaluation.benchmark import layers, machine, results
from jaxint8.evaluation.benchmark.layers import OFF, OTHERS, OURS, RULES, Effort, Shape, Weights
from jaxint8.evaluation.benchmark.results import Group

ORT = OTHERS[0]


def rows_axis(most: int) -> list[int]:
    """Numbers of rows from 1 to `most`: all up to 20, then powers of two and their neighbours."""
    around = [p + d for p in (24, 32, 48, 64, 96, 128, 192, 256, 512) for d in (-1, 0, 1)]
    axis = {*range(1, 21), *around, 384, 768, 1024, 1025, 1536, 2048, 3072, 4096}
    return sorted(m for m in axis if m <= most)


def rows_group(
    shape: Shape, ms: Sequence[int], effort: Effort, *, with_peers: bool = True
) -> Group:
    """Measures a layer of one shape, with outliers and without, at all numbers of rows at once."""
    weights = Weights(shape)
    runs: dict[tuple[str, int], Callable[[int], object]] = {}
    for m in ms:
        x = layers.activations(m, weights.k)
        runs[OURS, m] = layers.ours(weights, x, RULES["relative"])
        runs[OFF, m] = layers.ours(weights, x, None)
        if with_peers and ORT in weights.peers:
            runs[ORT, m] = layers.repeat(weights.peers[ORT](x))
    others = machine.Others()
    taken, ceilings = layers.sample(runs, effort, weights.codes)
    lines = [
        results.line(
            name,
            seconds,
            at={"m": m},
            per_call=2e-9 * weights.work(m).multiplies,
            unit="GOP/s",
            work=weights.work(m),
            ceilings=ceilings,
        )
        for (name, m), seconds in taken.items()
    ]
    steps = []
    for name in dict.fromkeys(name for name, _ in taken):
        steps += results.steps(name, {m: s for (engine, m), s in taken.items() if engine == name})
    what: dict[str, Any] = {"axis": "m", "k": weights.k, "n": weights.n}
    return Group(
        suite="growth",
        what=what,
        lines=lines,
        steps=steps,
        machine=results.machine(ceilings, machine.instruction()),
        others=others.cores(),
    )
