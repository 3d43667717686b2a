"""The methods by name: two in floating point, and every int8 scheme that the library knows.

A method is a quantisation and a dtype of everything else. The surprising fact: most int8 methods
share their weights and differ in how activations are treated, so a whole table needs few loads.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from absl import flags
from jax.typing import DTypeLike

from jaxint8.models.config import QUANTIZATIONS, QuantizationConfig, as_quantization


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
        return *self.quantization.stored, self.quantization.lm_head, self.quantization.reduction


METHODS: dict[str, Method] = {
    "float32": Method(None, jnp.float32),
    "bfloat16": Method(None, jnp.bfloat16),
    **{name: Method(quantization) for name, quantization in QUANTIZATIONS.items()},
}


# What `--methods=sweep` adds: each kind of rule over its range, and the choices that the paper left open.
SWEEP = (
    "weights_only",
    "vectorwise",
    *(f"llm_int8:{value}" for value in (2, 3, 4, 5, 6, 8, 12, 20)),
    *(f"llm_int8:{value}:token" for value in (2, 3, 4, 5, 6, 8, 12, 20)),
    *(f"relative:{value}" for value in (3, 4, 5, 6, 7, 8, 10, 14)),
    *(f"topk:{k}" for k in (1, 2, 4, 8, 16, 32)),
)
GROUPS = {"all": tuple(METHODS), "sweep": SWEEP}
_NAMES = (
    f"of {', '.join(METHODS)}, with options as in llm_int8:4:token, relative:8:column:float, "
    "topk:16, llm_int8:float_weights, topk:kv_int8 (see --kv_cache), topk:fast (on a mesh, rows scaled in parts)"
)
# Of a flag for several methods, and of one for a single method.
HELP = f"Any {_NAMES}; or all; or sweep (thresholds of each rule)."
HELP_ONE = f"One {_NAMES}."


def method(name: str, expected: str = f"one of {', '.join(METHODS)}") -> Method:
    """Returns what a name means; int8 methods may carry options (see `as_quantization`).

    Args:
      name: the name, of one method.
      expected: what could be there, for the message.

    Raises:
      ValueError: a name or an option that is not known.
    """
    if name in METHODS:
        return METHODS[name]
    if name.partition(":")[0] not in QUANTIZATIONS:
        raise ValueError(f"expected {expected}, got {name!r}")
    return Method(as_quantization(name))


def parse_methods(names: Iterable[str]) -> list[str]:
    """Expands "all" and "sweep" and drops repetitions, keeping the order.

    Raises:
      ValueError: a name that is not known, or no name at all.
    """
    expected = f"any of {', '.join(METHODS)}, sweep or all"
    expanded: dict[str, None] = {}
    for name in names:
        expanded.update(dict.fromkeys(GROUPS.get(name, (name,))))
    if not expanded:
        raise ValueError(f"methods: expected {expected}, got nothing")
    for name in expanded:
        try:
            method(name, expected)
        except ValueError as error:
            raise ValueError(f"methods: {error}") from None
    return list(expanded)


def define_kv_cache(values: flags.FlagValues) -> None:
    """Adds the flag kv_cache to `values`."""
    flags.DEFINE_enum(
        "kv_cache",
        "float",
        ["float", "int8"],
        "Keys and values that attention sees, for int8 methods: as activations are, or int8 vectors, for a small loss, "
        "which take about a quarter of the memory of float32, half of bfloat16's. For one method alone: its name with "
        ":kv_int8.",
        flag_values=values,
    )


def with_kv_cache(names: Sequence[str], kv_cache: str) -> list[str]:
    """The names of the same methods, of those in int8 with an int8 cache if the flag kv_cache says so.

    So that it is in the name under which a method is reported, and under which its results are kept.

    Raises:
      ValueError: it is to be int8, and no method is.
    """
    if kv_cache == "float":
        return list(names)
    found = {name: method(name).quantization for name in names}
    if not any(found.values()):
        raise ValueError("kv_cache: int8 goes with the int8 methods only")
    return list(
        dict.fromkeys(
            name if how is None or how.kv_cache == "int8" else f"{name}:kv_int8"
            for name, how in found.items()
        )
    )


def by_weights(names: Iterable[str]) -> list[list[str]]:
    """Groups of methods that share their parameters, in order of first appearance."""
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(method(name).weights, []).append(name)
    return list(groups.values())
