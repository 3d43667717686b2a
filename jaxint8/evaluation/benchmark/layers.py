"""One linear layer in int8, timed beside XLA, beside other engines and beside what bounds it.

Engines of JAX run many times inside one compiled program, as layers of a model do; the others are
called from Python, and so is one line of ours, to be compared with them like for like. The
surprising fact is that a loop in a compiled program must change the weights it multiplies by (a
value that stays the same is enough) if they have to be converted: else the compiler does that once,
before the loop. What is changed may be copied, so it is the smallest part: of ours, a bias of zero.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8 import QuantizedMatrix, RelativeThreshold, Threshold, TopK, int8_linear
from jaxint8.evaluation.benchmark import machine, peers, results
from jaxint8.evaluation.benchmark.machine import Ceiling, Work
from jaxint8.evaluation.benchmark.results import Group
from jaxint8.evaluation.benchmark.timing import Timed, interleave
from jaxint8.outliers import OutlierRule, outlier_mask

RULES: dict[str, OutlierRule | None] = {
    "off": None,
    "relative": RelativeThreshold(6.0),
    "topk": TopK(8),
    "column": Threshold(6.0),  # the paper's
}
OURS = "jaxint8 relative"
OFF = "jaxint8 off"
CALLED = f"{OURS}, called"
XLA = ("xla float32", "xla bfloat16", "xla int8")
OTHERS = ("onnxruntime int8", "torch float32", "torch int8")
CEILING = "ceiling"

PAIRS = (
    *((f"jaxint8 {rule}", OFF) for rule in RULES if rule != "off"),
    *((OURS, name) for name in XLA),
    *((CALLED, name) for name in OTHERS),
    *((OURS, name) for name in OTHERS),
)
"""What is compared: the price of outliers, XLA in a program, others called, and in a program."""

Shape = tuple[int, int]
"""k in, n out."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to measure: rounds, and seconds at a time."""

    rounds: int
    seconds: float


class Weights:
    """Random weights of one shape: int8 codes, and what each engine makes of them."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        """Makes the codes; what others need is made when asked for."""
        self.k, self.n = shape
        random = np.random.default_rng(seed)
        # Both ends of the range, and a scale that makes outputs near 1.
        codes = random.integers(-127, 128, (self.n, self.k), np.int8)
        self.scale = float(np.float32(1 / (73 * np.sqrt(self.k))))
        scales = jnp.full((self.n,), self.scale, jnp.float32)
        self.quantized = QuantizedMatrix(jnp.asarray(codes), scales)

    @functools.cached_property
    def codes(self) -> np.ndarray:
        """int8[n, k], the very memory that our kernels read."""
        return np.asarray(self.quantized.codes)

    @functools.cached_property
    def peers(self) -> dict[str, peers.Layer]:
        """The layers of the engines that are installed."""
        return peers.layers(self.codes, self.scale, machine.cores())

    def floats(self, dtype: Any) -> jax.Array:
        """dtype[n, k], a new array."""
        return (self.quantized.codes.astype(jnp.float32) * jnp.float32(self.scale)).astype(dtype)

    def work(self, m: int) -> Work:
        """What m rows cannot avoid; their own bytes are few beside the weights."""
        return Work(self.n * self.k, m * self.n * self.k)


def activations(m: int, k: int, seed: int = 1) -> np.ndarray:
    """Activations float32[m, k] whose outliers are as those of real models.

    About 0.07 % of the values are outliers to the relative rule: one column in two thousand is
    large in most rows, and a tenth of the columns are large in a few (facts of SmolLM2: 12 % of the
    columns hold an outlier somewhere in 512 tokens).
    """
    random = np.random.default_rng(seed)
    x = random.standard_normal((m, k), np.float32)
    columns = random.permutation(k)
    always, sometimes = columns[: max(1, k // 2048)], columns[: max(1, k // 10)]
    for chosen, share, low, high in ((always, 7 / 8, 20, 60), (sometimes, 0.003, 10, 30)):
        large = random.uniform(low, high, (m, chosen.size)) * random.choice([-1, 1], chosen.size)
        hit = random.random((m, chosen.size)) < share
        x[:, chosen] = np.where(hit, large, x[:, chosen])
    return x


def outlier_shares(x: np.ndarray) -> dict[str, dict[str, float]]:
    """For each rule the share of values that are outliers, and of columns that hold one."""
    shares = {}
    for name, rule in RULES.items():
        mask = np.asarray(outlier_mask(jnp.asarray(x), rule))
        shares[name] = {"values": float(mask.mean()), "columns": float(mask.any(axis=0).mean())}
    return shares


def layer_groups(
    shape: Shape, ms: Sequence[int], effort: Effort, *, with_peers: bool = True
) -> Iterator[Group]:
    """Measures a layer of one shape for each number of rows m.

    Args:
      shape: (k, n).
      ms: numbers of rows.
      effort: how much to measure.
      with_peers: whether to measure the other engines that are installed.

    Yields:
      A group for each m.
    """
    weights = Weights(shape)
    for m in ms:
        yield _measure(weights, m, effort, with_peers)


def _measure(weights: Weights, m: int, effort: Effort, with_peers: bool) -> Group:
    x = activations(m, weights.k)
    runs = {f"jaxint8 {name}": ours(weights, x, rule) for name, rule in RULES.items()}
    runs |= {
        CALLED: called(weights, x, RULES["relative"]),
        "xla float32": xla_float(weights, x, jnp.float32),
        "xla bfloat16": xla_float(weights, x, jnp.bfloat16),
        "xla int8": xla_int8(weights, x, RULES["relative"]),
    }
    if with_peers:
        runs |= {name: repeat(layer(x)) for name, layer in weights.peers.items()}
    others = machine.Others()
    taken, ceilings = sample(runs, effort, weights.codes)
    work = weights.work(m)
    lines = [
        results.line(
            name,
            seconds,
            per_call=2e-9 * work.multiplies,
            unit="GOP/s",
            work=work,
            ceilings=ceilings,
        )
        for name, seconds in taken.items()
    ]
    bound = None
    if ceilings:
        bound = "read" if results.best(ceilings).reading(work) else "multiply"
    return Group(
        suite="layer",
        what={"k": weights.k, "n": weights.n, "m": m, "outliers": outlier_shares(x)},
        lines=lines,
        pairs=results.pairs(taken, PAIRS),
        bound=bound,
        machine=results.machine(ceilings, machine.instruction()),
        others=others.cores(),
    )


def sample[K](
    runs: Mapping[K, Callable[[int], object]], effort: Effort, data: np.ndarray
) -> tuple[dict[K, list[float]], list[Ceiling]]:
    """Takes the rounds: seconds per call of each, and the ceilings (none without the extension).

    Args:
      runs: name -> makes so many calls and returns when they are done.
      effort: how much to measure.
      data: the weights, to measure reading on.
    """
    samples: dict[K | str, Callable[[], Any]] = {
        name: Timed(run, effort.seconds) for name, run in runs.items()
    }
    if machine.has_ceilings():
        samples[CEILING] = lambda: machine.ceiling(data)
    taken = interleave(samples, effort.rounds)
    return {name: taken[name] for name in runs}, taken.get(CEILING, [])


# Engines: each gives a function that makes so many calls and returns when they are done


def ours(weights: Weights, x: np.ndarray, rule: OutlierRule | None) -> Callable[[int], None]:
    """Our layer, many times in one program."""

    def step(bias: jax.Array, given: tuple[jax.Array, QuantizedMatrix]) -> jax.Array:
        x, w = given
        return _disturb(bias, int8_linear(x, w, bias, outliers=rule))

    bias = jnp.zeros(weights.n, jnp.float32)
    return _Program(step, bias, (jnp.asarray(x), weights.quantized))


def called(weights: Weights, x: np.ndarray, rule: OutlierRule | None) -> Callable[[int], None]:
    """Our layer, a program of its own that is called from Python each time."""
    layer = jax.jit(functools.partial(int8_linear, outliers=rule))
    given = jnp.asarray(x)
    return repeat(lambda: layer(given, weights.quantized).block_until_ready())


def xla_float(weights: Weights, x: np.ndarray, dtype: Any) -> Callable[[int], None]:
    """XLA's own product in a float type, weights [n, k] as ours."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        dimensions = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)
        return y.astype(dtype)

    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        return _disturb(x, product(x, w))

    def converting(state: tuple[jax.Array, jax.Array], _: None) -> tuple[jax.Array, jax.Array]:
        x, w = state
        y = product(x, w)
        return _disturb(x, y), _disturb(w, y)

    given, w = jnp.array(x, dtype), weights.floats(dtype)
    if given.dtype == jnp.float32:  # nothing to convert
        return _Program(step, given, w)
    return _Program(converting, (given, w), None)


def xla_int8(weights: Weights, x: np.ndarray, rule: OutlierRule | None) -> Callable[[int], None]:
    """Our portable implementation: LLM.int8() in pure JAX, compiled by XLA."""

    def step(
        state: tuple[jax.Array, QuantizedMatrix], _: None
    ) -> tuple[jax.Array, QuantizedMatrix]:
        x, w = state
        y = int8_linear(x, w, outliers=rule, implementation="xla")
        # A code that stays as it is, unknown to the compiler.
        code = jnp.where(jnp.isnan(y[0, 0]), jnp.int8(0), w.codes[0, 0])
        return _disturb(x, y), dataclasses.replace(w, codes=w.codes.at[0, 0].set(code))

    return _Program(step, (jnp.array(x), jax.tree.map(jnp.array, weights.quantized)), None)


def _disturb(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x with an element that depends on y and keeps its value (unless that is tiny)."""
    return x.at[(0,) * x.ndim].add(y[0, 0].astype(x.dtype) * 1e-30)


def repeat(call: Callable[[], object]) -> Callable[[int], None]:
    """A function that is called from Python as often as asked."""

    def run(calls: int) -> None:
        for _ in range(calls):
            call()

    return run


class _Program:
    """A step repeated inside one compiled program: its state goes from step to step in place."""

    def __init__(self, step: Callable[[Any, Any], Any], state: Any, constants: Any) -> None:
        def many(state: Any, constants: Any, calls: jax.Array) -> Any:
            return jax.lax.fori_loop(0, calls, lambda _, s: step(s, constants), state)

        self._many = jax.jit(many, donate_argnums=0)
        self._state, self._constants = state, constants

    def __call__(self, calls: int) -> None:
        state = self._many(self._state, self._constants, jnp.int32(calls))
        self._state = jax.block_until_ready(state)
