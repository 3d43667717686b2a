"""convert_params: a trained float Flax tree with `nn.Dense` layers becomes one for `Dense8bit`.

Which kernels are converted is a list of rules, each a regular expression on the path and "int8" or "keep"; the first
match decides. Kernels move from the "params" collection to "quant", leaf by leaf, so the peak is one float kernel.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jaxint8.dense import COLLECTION
from jaxint8.quantize import quantize

Action = Literal["int8", "keep"]
Rule = tuple[str, Action]
# Every Dense layer; the head that makes the logits stays float, as in the paper's code.
DEFAULT_RULES: tuple[Rule, ...] = (
    (r"(^|/)(lm_head|embed[^/]*|logits)(/|$)", "keep"),
    (r".*", "int8"),
)


def convert_params(
    variables: Mapping[str, Any], rules: Sequence[Rule] = DEFAULT_RULES
) -> dict[str, Any]:
    """Converts the variables of a Flax Linen model whose `nn.Dense` layers become `Dense8bit`.

    A leaf is a candidate if it is named "kernel" and 2-D (or 3-D, stacked by `nn.scan` over a leading axis of layers).
    Candidates whose rule says "int8" leave "params" as codes int8[n, k] and scale float32[n] under the same path in
    the collection "quant"; everything else (biases, norms, embeddings) is passed on as it is. Metadata of
    `nn.with_partitioning` is carried over, the two names exchanged since codes are stored [n, k].

    Args:
      variables: {"params": tree, ...}, as `module.init` returns it and a training loop left it.
      rules: (regular expression, "int8" or "keep") pairs, searched in "/"-joined paths such as "layers_0/mlp/up";
        the first that matches decides, no match means "keep".

    Returns:
      A new dict with the collections of `variables` and "quant". Arrays that are kept are not copied.

    Raises:
      TypeError: `variables` is no mapping.
      ValueError: it has no "params", a rule is malformed, no kernel was converted, or a kernel cannot be: the message
        names its path.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables: expected a mapping of collections, got {type(variables).__name__}"
        )
    if "params" not in variables:
        raise ValueError(f"variables: no 'params' collection, only {sorted(variables)}")
    compiled = _compile(rules)
    flat = traverse_util.flatten_dict(dict(variables["params"]))
    kept, quantized = {}, {}
    for path, leaf in flat.items():
        layer = "/".join(path[:-1])
        value = nn.unbox(leaf)
        candidate = path[-1] == "kernel" and jnp.ndim(value) in (2, 3)
        if not candidate or _action(layer, compiled) == "keep":
            kept[path] = leaf
            continue
        codes, scale = _convert(layer, value)
        quantized[(*path[:-1], "codes")] = _rebox(leaf, codes, drop_input=False)
        quantized[(*path[:-1], "scale")] = _rebox(leaf, scale, drop_input=True)
    if not quantized:
        raise ValueError(
            "rules: no kernel was converted; paths are " + ", ".join(_layers(flat)[:8])
        )
    converted = {**variables, "params": traverse_util.unflatten_dict(kept)}
    earlier = traverse_util.flatten_dict(dict(variables.get(COLLECTION, {})))
    converted[COLLECTION] = traverse_util.unflatten_dict({**earlier, **quantized})
    return converted


def _compile(rules: Sequence[Rule]) -> list[tuple[re.Pattern[str], Action]]:
    compiled = []
    for position, rule in enumerate(rules):
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and rule[1] in ("int8", "keep")):
            raise ValueError(f"rules[{position}]: expected (regex, 'int8' or 'keep'), got {rule!r}")
        try:
            compiled.append((re.compile(rule[0]), rule[1]))
        except re.error as error:
            raise ValueError(
                f"rules[{position}]: bad regular expression {rule[0]!r}: {error}"
            ) from error
    return compiled


def _action(layer: str, rules: list[tuple[re.Pattern[str], Action]]) -> Action:
    for pattern, action in rules:
        if pattern.search(layer):
            return action
    return "keep"


def _convert(layer: str, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    try:
        if kernel.ndim == 2:
            matrix = quantize(kernel)
            return matrix.codes, matrix.scale
        matrices = [quantize(part) for part in kernel]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{layer}/{error}") from error
    return jnp.stack([m.codes for m in matrices]), jnp.stack([m.scale for m in matrices])


def _rebox(leaf: Any, value: jax.Array, *, drop_input: bool) -> Any:
    """Gives ``value`` the partition metadata of the float kernel, names in the order of the codes."""
    if not isinstance(leaf, nn.Partitioned):
        return value
    *stack, k_name, n_name = leaf.names
    names = (*stack, n_name) if drop_input else (*stack, n_name, k_name)
    return nn.Partitioned(value, names, mesh=leaf.mesh)


def _layers(flat: Mapping[tuple[str, ...], Any]) -> list[str]:
    return sorted({"/".join(path[:-1]) for path in flat})
