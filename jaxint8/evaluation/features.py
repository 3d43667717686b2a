"""Outlier features: hidden dimensions that are large in many layers and at many positions (paper, section 4, Table 4).

A dimension is an outlier feature if a value of magnitude 6 or more stands in it in at least 25 % of the hidden states
and at least 6 % of all positions. A hidden state here is what enters a linear layer; the paper takes those of the
attention projections and of the MLP's first product, and leaves out its second. The surprising fact: which "layer" the
25 % count is not said in the paper, and its own figures fit only if every linear layer counts by itself, as here.

The text is read twice, a window at a time: counts first, then the values of the dimensions found, a fixed number of
positions at most. So memory depends on the window and not on the text.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8.evaluation.outliers import Activations
from jaxint8.evaluation.perplexity import Progress

LAYER_SHARE, POSITION_SHARE = 0.25, 0.06
# Values of a dimension that are kept per hidden state, and dimensions of which they are kept.
SAMPLED_POSITIONS = 4096
MOST_FEATURES = 64

_NAME = re.compile(r"layers\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class State:
    """What a pass over the text counts of one hidden state X, float[positions, k]."""

    layer: int
    site: str
    positions: int
    above: np.ndarray
    """int64[k]: positions where abs(x) >= threshold."""
    positive: np.ndarray
    """int64[k]: those of them where x > 0."""
    absmax: np.ndarray
    """float32[k]."""
    affected: int
    """Positions with an outlier in any dimension."""


@dataclass(frozen=True)
class Feature:
    """One dimension over all hidden states that are looked at."""

    dimension: int
    layers: float
    """Share of the hidden states in which it is an outlier somewhere."""
    positions: float
    """Share of the positions of all hidden states at which it is an outlier."""
    one_sided: bool
    """Whether all of its outliers have one sign."""


def name_of(name: str) -> tuple[int, str] | None:
    """(layer, site) of a name like "layers.3.qkv", None for others."""
    found = _NAME.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def count(
    activations: Activations,
    calls: Sequence[np.ndarray],
    threshold: float = 6.0,
    progress: Progress | None = None,
) -> dict[str, State]:
    """Counts outliers by dimension in every hidden state of a text.

    Args:
      activations: what enters the layers, by names like "layers.3.qkv"; other names are not looked at.
      calls: token ids int[b, t], one window after the other.
      threshold: magnitude of an outlier.
      progress: told how many tokens are done.

    Returns:
      Name -> State.

    Raises:
      ValueError: no layer has such a name.
    """
    states: dict[str, State] = {}
    total, done = sum(call.size for call in calls), 0
    for call in calls:
        for name, x in activations(jnp.asarray(call, jnp.int32)).items():
            place = name_of(name)
            if place is None:
                continue
            found = [np.asarray(part) for part in _count(x, jnp.float32(threshold))]
            above, positive, absmax, affected = found
            old = states.get(name)
            states[name] = State(
                *place,
                positions=x.size // x.shape[-1] + (old.positions if old else 0),
                above=above + (old.above if old else np.int64(0)),
                positive=positive + (old.positive if old else np.int64(0)),
                absmax=np.maximum(absmax, old.absmax) if old else absmax,
                affected=int(affected) + (old.affected if old else 0),
            )
        done += call.size
        if progress is not None:
            progress(done, total)
    if not states:
        raise ValueError("activations: expected names like layers.0.qkv, got none")
    return states


@jax.jit
def _count(x: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    above = jnp.abs(x) >= threshold
    return (
        jnp.sum(above, axis=0, dtype=jnp.int32),
        jnp.sum(above & (x > 0), axis=0, dtype=jnp.int32),
        jnp.max(jnp.abs(x), axis=0),
        jnp.sum(jnp.any(above, axis=1), dtype=jnp.int32),
    )


def select(states: Mapping[str, State], sites: Sequence[str]) -> list[State]:
    """The hidden states of some sites, in order of layers; those of another width than the first site's are left out.

    Raises:
      ValueError: there is none.
    """
    chosen = [state for state in states.values() if state.site in sites]
    if not chosen:
        known = ", ".join(sorted({state.site for state in states.values()}))
        raise ValueError(f"sites: expected any of {known}, got {', '.join(sites) or 'none'}")
    width = next(s.above.size for site in sites for s in chosen if s.site == site)
    # A dimension is the same in two hidden states only if they are as wide.
    kept = [state for state in chosen if state.above.size == width]
    return sorted(kept, key=lambda state: (state.layer, sites.index(state.site)))


def features(states: Sequence[State]) -> list[Feature]:
    """Every dimension that is an outlier anywhere, the most common first; `is_feature` picks those of the paper."""
    above = np.stack([state.above for state in states])
    positive = np.stack([state.positive for state in states]).sum(axis=0)
    positions = sum(state.positions for state in states)
    total = above.sum(axis=0)
    found = [
        Feature(
            dimension=int(i),
            layers=float(np.mean(above[:, i] > 0)),
            positions=float(total[i] / positions),
            one_sided=bool(positive[i] in (0, total[i])),
        )
        for i in np.flatnonzero(total)
    ]
    return sorted(found, key=lambda f: (-f.positions, -f.layers, f.dimension))


def is_feature(feature: Feature) -> bool:
    """Whether a dimension passes both thresholds of the paper (Appendix C)."""
    return feature.layers >= LAYER_SHARE and feature.positions >= POSITION_SHARE


def values(
    activations: Activations,
    calls: Sequence[np.ndarray],
    names: Sequence[str],
    dimensions: Sequence[int],
) -> dict[str, np.ndarray]:
    """Values of some dimensions, float32[sample, dimensions], at positions spread evenly over the text.

    Args:
      activations: as for `count`.
      calls: as for `count`.
      names: the hidden states wanted.
      dimensions: at most MOST_FEATURES are kept.

    Returns:
      Name -> values; at most SAMPLED_POSITIONS rows.
    """
    kept = np.asarray(list(dimensions)[:MOST_FEATURES], np.int32)
    step = max(1, -(-sum(call.size for call in calls) // SAMPLED_POSITIONS))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for call in calls:
        inputs = activations(jnp.asarray(call, jnp.int32))
        for name, found in parts.items():
            found.append(np.asarray(_sample(inputs[name], kept, step)))
    return {name: np.concatenate(found)[:SAMPLED_POSITIONS] for name, found in parts.items()}


@functools.partial(jax.jit, static_argnums=2)
def _sample(x: jax.Array, dimensions: jax.Array, step: int) -> jax.Array:
    return x.reshape(-1, x.shape[-1])[::step, dimensions].astype(jnp.float32)


def quartiles(sample: np.ndarray, threshold: float) -> tuple[float, float, float] | None:
    """The quartiles of the values that are outliers; None if there is none."""
    outliers = sample[np.abs(sample) >= threshold]
    if not outliers.size:
        return None
    low, middle, high = np.quantile(outliers.astype(np.float64), (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)
