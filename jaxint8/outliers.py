"""Outlier rules: which activation values leave the 8-bit range and are carried at higher precision.

LLM.int8() (Dettmers et al. 2022, section 3.2) takes every column that holds a value of magnitude >= 6. The surprising
fact is that a criterion relative to the row's own root mean square, or simply the k largest values of each row, moves
log-probabilities about half as far with fewer values, because absolute thresholds assume hidden states of rms 1.

Every statistic here is a maximum, a count or an integer sum, so a rule selects the same values whatever the tiling,
the order of summation or the sharding of a row.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8.rounding import divide, sqrt
from jaxint8.shards import WHOLE, Shards

Scope = Literal["token", "column"]

# Row root mean squares are computed from magnitudes rounded to this many steps of the row's absmax: 12 bits, so that
# the squares (24 bits) of 2**17 values, the longest row allowed, can be summed exactly in two int32 halves.
RMS_LEVELS = 4095
SMALLEST_SCALE = np.float32(2.0**-125)
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def _check(rule: str, value: float, scope: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"{rule}: value must be a number, got {type(value).__name__}")
    # Before anything makes a float of it, for which an int may be too large.
    if value > LARGEST_FLOAT32 and value != math.inf:
        raise ValueError(f"{rule}: value must be at most {LARGEST_FLOAT32}, or inf, got {value}")
    if math.isnan(value) or value < 0:
        raise ValueError(f"{rule}: value must be >= 0 (inf means no outliers), got {value}")
    if scope not in ("token", "column"):
        raise ValueError(f"{rule}: scope must be 'token' or 'column', got {scope!r}")


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Outliers are the values with ``abs(x) >= value``: the rule of the paper (section 3.2).

    Attributes:
      value: the threshold, in units of x; 6.0 in the paper. ``inf`` means no outliers.
      scope: "column": a column that holds an outlier in any row is taken out whole, for every row of the call (the
        paper; a row's result then depends on its neighbours). "token": only the values themselves.
    """

    value: float = 6.0
    scope: Scope = "column"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check("Threshold", self.value, self.scope)


@dataclasses.dataclass(frozen=True)
class RelativeThreshold:
    """Outliers are the values with ``abs(x) >= value * rms(row)``, the rms taken over all k values of the row.

    Scale-free, so it also finds the outliers of rows whose values are small throughout. The rms is computed from
    magnitudes rounded to 12 bits, in integers: relative error below 2e-4, and the same bits in any order of summation.

    Attributes:
      value: the multiple of the row's rms. ``inf`` means no outliers.
      scope: "token" or "column", as in `Threshold`.
    """

    value: float = 6.0
    scope: Scope = "token"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check("RelativeThreshold", self.value, self.scope)


@dataclasses.dataclass(frozen=True)
class TopK:
    """Outliers are the k largest magnitudes of each row, ties to the lower index; all values if the row is shorter.

    Attributes:
      k: values per row, at least 1.
    """

    k: int = 8

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if isinstance(self.k, bool) or not isinstance(self.k, int | np.integer):
            raise TypeError(f"TopK: k must be an integer, got {type(self.k).__name__}")
        if self.k < 1:
            raise ValueError(f"TopK: k must be at least 1, got {self.k} (None means no outliers)")
        if self.k >= 2**31:
            raise ValueError("TopK: k must be less than 2**31")


OutlierRule = Threshold | RelativeThreshold | TopK


def as_rule(outliers: OutlierRule | float | None) -> OutlierRule | None:
    """Returns the rule that a user's argument means: a number is ``Threshold(number)``, None no decomposition."""
    if outliers is None or isinstance(outliers, OutlierRule):
        return outliers
    if isinstance(outliers, int | float | np.floating | np.integer) and not isinstance(
        outliers, bool
    ):
        checked = Threshold(outliers)  # a number may be too large for a float
        return Threshold(float(checked.value))
    raise TypeError(
        "outliers: expected Threshold, RelativeThreshold, TopK, a number or None, "
        f"got {type(outliers).__name__}"
    )


def is_token_scope(rule: OutlierRule | None) -> bool:
    """True if a row's outliers depend on that row alone."""
    return rule is None or isinstance(rule, TopK) or rule.scope == "token"


def outlier_mask(x: jax.Array, rule: OutlierRule | None, shards: Shards = WHOLE) -> jax.Array:
    """Selects the outliers of ``x``.

    Args:
      x: float[m, k] activations.
      rule: an outlier rule; None selects nothing.
      shards: what of the whole matrix x is.

    Returns:
      bool[m, k]. Rows that hold a non-finite value select nothing and cast no vote in a column-scope rule.
    """
    finite = finite_rows(x, shards)
    magnitude = jnp.abs(jnp.where(finite, x.astype(jnp.float32), jnp.float32(0)))
    match rule:
        case None:
            return jnp.zeros(x.shape, bool)
        case TopK(k=k):
            mask = _top_k_mask(magnitude, k, shards)
        case Threshold(value=value):
            mask = magnitude >= jnp.float32(value)
        case RelativeThreshold(value=value):
            threshold, usable = _relative_threshold(magnitude, value, shards)
            mask = (magnitude >= threshold) & usable
    mask &= finite
    if not is_token_scope(rule):
        voted = shards.any_of_columns(jnp.any(mask, axis=0, keepdims=True))
        mask = jnp.broadcast_to(voted, mask.shape)
        mask &= finite
    return mask


def finite_rows(x: jax.Array, shards: Shards = WHOLE) -> jax.Array:
    """Returns bool[m, 1]: True where every value of the row is finite."""
    return shards.all_of_rows(jnp.all(jnp.isfinite(x), axis=-1, keepdims=True))


def _top_k_mask(magnitude: jax.Array, k: int, shards: Shards) -> jax.Array:
    m, held = magnitude.shape
    if k >= shards.width(held):
        return jnp.ones(magnitude.shape, bool)
    # Ties to the lower index, as documented: also between devices, whose candidates stand in order.
    value, index = jax.lax.top_k(magnitude, min(k, held))
    if shards.columns:
        first = shards.first_column(held)
        _, chosen = jax.lax.top_k(shards.candidates(value), k)
        index = jnp.take_along_axis(shards.candidates(index + first), chosen, axis=1) - first
        index = jnp.where((index >= 0) & (index < held), index, held)  # held: out of range, dropped
    rows = jnp.arange(m)[:, None]
    return jnp.zeros(magnitude.shape, bool).at[rows, index].set(True, mode="drop")


def _relative_threshold(
    magnitude: jax.Array, value: float, shards: Shards
) -> tuple[jax.Array, jax.Array]:
    """Returns (threshold float32[m, 1], usable bool[m, 1]); see the class for why the sum is in integers."""
    m, held = magnitude.shape
    if held == 0:
        return jnp.zeros((m, 1), jnp.float32), jnp.zeros((m, 1), bool)
    absmax = shards.max_of_rows(jnp.max(magnitude, axis=-1, keepdims=True))
    unit = divide(absmax, RMS_LEVELS)
    usable = unit >= SMALLEST_SCALE
    steps = jnp.round(divide(magnitude, jnp.where(usable, unit, jnp.float32(1))))
    steps = jnp.minimum(steps, jnp.float32(RMS_LEVELS)).astype(jnp.int32)
    square = steps * steps
    high = shards.sum_of_rows(jnp.sum(square >> 12, axis=-1, keepdims=True))
    low = shards.sum_of_rows(jnp.sum(square & 4095, axis=-1, keepdims=True))
    # 64 = sqrt(4096), the weight of the high half; each operation is rounded on its own, so no backend can differ.
    mean = divide((high + (low >> 12)).astype(jnp.float32), shards.width(held))
    root = sqrt(mean)
    return jnp.float32(value) * (unit * (jnp.float32(64) * root)), usable
