"""The methods by name: two in floating point, and every int8 method that models knows.

A method is a quantisation and a dtype of everything else. The surprising fact: most int8 methods
share their weights and differ in how activations are treated, so a whole table needs few loads.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxint8.models.config import QUANTIZATIONS, QuantizationConfig


@dataclass(frozen=True)
class Method:
    """What to load: int8 weights or (None) float ones; a dtype of None is the library's choice."""

    quantization: QuantizationConfig | None
    dtype: DTypeLike | None = None

    @property
    def weights(self) -> Hashable:
        """Equal for methods that can share one set of parameters."""
        if self.quantization is None:
            return jnp.dtype(self.dtype)
        return self.quantization.weights, self.quantization.lm_head


METHODS: dict[str, Method] = {
    "float32": Method(None, jnp.float32),
    "bfloat16": Method(None, jnp.bfloat16),
    **{name: Method(quantization) for name, quantization in QUANTIZATIONS.items()},
}


def parse_methods(names: Iterable[str]) -> list[str]:
    """Expands "all" and drops repetitions, keeping the order.

    Raises:
      ValueError: a name that is not known, or no name at all.
    """
    expanded: dict[str, None] = {}
    for name in names:
        expanded.update(dict.fromkeys(METHODS if name == "all" else [name]))
    if not expanded or any(name not in METHODS for name in expanded):
        unknown = [name for name in expanded if name not in METHODS]
        got = ", ".join(map(repr, unknown)) or "nothing"
        raise ValueError(f"methods: expected any of {', '.join(METHODS)} or all, got {got}")
    return list(expanded)


def by_weights(names: Iterable[str]) -> list[list[str]]:
    """Groups of methods that share their parameters, in order of first appearance."""
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(METHODS[name].weights, []).append(name)
    return list(groups.values())
