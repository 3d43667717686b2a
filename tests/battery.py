"""One set of cases, run over every implementation: shapes, dtypes, rules and inputs where int8 layers go wrong.

Inputs are small integers of seeds, so a failing case is its own reproduction.
"""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxint8 import RelativeThreshold, Threshold, TopK
from jaxint8.outliers import OutlierRule

# m, k, n: empty axes, single elements, nothing a multiple of anything, and the edges of 4, 16 and 64.
SHAPES = [
    (0, 5, 3),
    (3, 0, 4),
    (3, 4, 0),
    (1, 1, 1),
    (1, 3, 2),
    (2, 64, 16),
    (1, 499, 33),
    (3, 499, 65),
    (5, 577, 17),
    (16, 128, 48),
    (17, 130, 31),
    (1, 1500, 100),
    (64, 1029, 70),
]
FEW_SHAPES = [(0, 5, 3), (3, 0, 4), (1, 1, 1), (1, 499, 33), (5, 577, 17)]
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
RULES: list[OutlierRule | None] = [
    None,
    Threshold(6.0, "column"),
    Threshold(6.0, "token"),
    Threshold(0.0, "token"),
    Threshold(float("inf"), "column"),
    RelativeThreshold(6.0, "token"),
    RelativeThreshold(2.0, "column"),
    TopK(1),
    TopK(8),
    TopK(10_000),
]
# One of each kind, for tests whose time goes into compiling.
FEW_RULES = [None, Threshold(6.0, "column"), RelativeThreshold(6.0, "token"), TopK(8)]
TOKEN_RULES = [
    rule for rule in RULES if rule is None or isinstance(rule, TopK) or rule.scope == "token"
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of int8_linear: activations, codes and scales, bias or None."""

    x: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None


def make(shape: tuple[int, int, int], dtype: type = np.float32, kind: str = "outliers") -> Case:
    """Makes a case; ``kind`` names what is special about x (see `KINDS`)."""
    m, k, n = shape
    rng = np.random.default_rng([m, k, n, *kind.encode()])
    x = rng.normal(size=(m, k)).astype(np.float32)
    KINDS[kind](x, rng)
    codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    if kind == "minus_128":
        codes[:, ::3] = -128
    if kind == "extreme":
        codes[:] = 127
    scale = np.exp(rng.normal(size=n)).astype(np.float32) / 127
    bias = rng.normal(size=n).astype(np.float32) if kind != "no_bias" else None
    with np.errstate(over="ignore"):
        return Case(x.astype(dtype), codes, scale, bias)


def _outliers(x: np.ndarray, rng: np.random.Generator) -> None:
    if x.size:
        x[:, rng.integers(0, x.shape[1], 3)] *= 25
        x[0, 0] = 6.0  # exactly at the threshold


def _nan(x: np.ndarray, rng: np.random.Generator) -> None:
    _outliers(x, rng)
    if x.size:
        x[0, -1] = np.nan
        x[-1, 0] = -np.inf if len(x) > 2 else x[-1, 0]


def _zero_rows(x: np.ndarray, rng: np.random.Generator) -> None:
    _outliers(x, rng)
    x[::2] = 0


def _signed_zeros(x: np.ndarray, rng: np.random.Generator) -> None:
    x[:] = np.where(rng.random(x.shape) < 0.9, -0.0, x)


def _ties(x: np.ndarray, rng: np.random.Generator) -> None:
    x[:] = rng.integers(-3, 4, x.shape)  # absmax ties, and quotients on exact halves


def _extreme(x: np.ndarray, rng: np.random.Generator) -> None:
    x[:] = np.where(rng.random(x.shape) < 0.01, 1e4, 1e2)


def _tiny(x: np.ndarray, rng: np.random.Generator) -> None:
    x *= 10.0 ** rng.integers(-45, -30, (len(x), 1)).astype(np.float32)


def _huge(x: np.ndarray, rng: np.random.Generator) -> None:
    x *= np.float32(1e37)


def _one_spike(x: np.ndarray, rng: np.random.Generator) -> None:
    x *= np.float32(1e-3)
    if x.size:
        x[:, x.shape[1] // 2] = 1000


KINDS = {
    "outliers": _outliers,
    "no_bias": _outliers,
    "nan": _nan,
    "zero_rows": _zero_rows,
    "signed_zeros": _signed_zeros,
    "ties": _ties,
    "extreme": _extreme,
    "tiny": _tiny,
    "huge": _huge,
    "one_spike": _one_spike,
    "minus_128": _outliers,
}
# huge overflows float16 and one row of tiny is below its range: both are for float32 alone.
FLOAT32_ONLY = {"huge", "tiny"}


def float_bound(case: Case, y: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Bounds the difference of two float32 evaluations of the layer with "float" outliers, then rounded to y.dtype.

    Each of the c + 4 operations of an output (c products added one by one, two scalings, the bias, the conversion of
    the sum) errs by at most eps/2 of the magnitudes that flow through it; two evaluations may err both ways. The last
    rounding adds one unit in the last place of y.
    """
    weights = np.abs(case.codes.astype(np.float64)) * case.scale[:, None]
    flow = np.abs(case.x.astype(np.float64)) @ weights.T
    if case.bias is not None:
        flow = flow + np.abs(case.bias)
    count = mask.sum(axis=1, keepdims=True)
    eps = float(np.finfo(np.float32).eps)
    return (count + 4) * eps * flow + float(jnp.finfo(y.dtype).eps) * np.abs(y.astype(np.float64))
