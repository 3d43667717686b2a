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
Path = tuple[Any, ...]
# Every Dense layer; the head that makes the logits stays float, as in the paper's code.
DEFAULT_RULES: tuple[Rule, ...] = (
    (r"(^|/)(lm_head|embed[^/]*|logits)(/|$)", "keep"),
    (r".*", "int8"),
)


def convert_params(
    variables: Mapping[str, Any], rules: Sequence[Rule] = DEFAULT_RULES
) -> dict[str, Any]:
    """Converts the variables of a Flax Linen model whose `nn.Dense` layers become `Dense8bit`.

    A leaf is a candidate if it is named "kernel" and is [k, n], or [layers, k, n], stacked by `nn.scan` or `nn.vmap`
    along axis 0, and the bias beside it, if there is one, is [n] or [layers, n]: by their biases, kernels of `nn.Conv`,
    `nn.DenseGeneral` and attention, and those stacked along another axis, are none. Without a bias a 3-D kernel is
    taken as a stack, so that such a layer must be kept by a rule, as one whose shapes are a stack's by chance
    (`nn.ConvLocal`)::

        convert_params(variables, [(r"(^|/)(conv|attention)(/|$)", "keep"), *DEFAULT_RULES])

    Candidates whose rule says "int8" leave "params" as codes int8[n, k] and scale float32[n] under the same path in
    the collection "quant"; everything else (biases, norms, embeddings) is passed on as it is. Metadata of
    `nn.with_partitioning` and `nn.with_logical_partitioning` is carried over, the two names exchanged since codes are
    stored [n, k].

    Layers keep their names. Flax calls those without one by their class, and after the exchange would look for
    `Dense8bit_0` what is here as `Dense_0`: see `Dense8bit` for what to do.

    Args:
      variables: {"params": tree, ...}, as `module.init` returns it and a training loop left it.
      rules: (regular expression, "int8" or "keep") pairs, searched in "/"-joined paths such as "layers_0/mlp/up";
        the first that matches decides, no match means "keep".

    Returns:
      A new dict with the collections of `variables` and "quant". Arrays that are kept are not copied.

    Raises:
      TypeError: `variables`, its "params" or its "quant" is no mapping, `rules` no sequence, or a kernel no float
        array.
      ValueError: it has no "params", a rule is malformed, no kernel was converted, or a kernel cannot be: the message
        names its path.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables: expected a mapping of collections, got {type(variables).__name__}"
        )
    if "params" not in variables:
        raise ValueError(f"variables: no 'params' collection, only {list(variables)}")
    compiled = _compile(rules)
    flat = _flatten(variables, "params")
    kept, quantized = {}, {}
    for path, leaf in flat.items():
        value = nn.unbox(leaf)
        if not _is_dense(path, value, flat) or _action(_joined(path[:-1]), compiled) == "keep":
            kept[path] = leaf
            continue
        codes, scale = _convert(path, value)
        quantized[(*path[:-1], "codes")] = _rebox(leaf, codes, drop_input=False)
        quantized[(*path[:-1], "scale")] = _rebox(leaf, scale, drop_input=True)
    if not quantized:
        raise ValueError(
            "rules: no kernel was converted: none is [k, n], or [layers, k, n] with any bias [layers, n], and by its "
            "rule int8; paths are " + ", ".join(_layers(flat)[:8])
        )
    converted = {**variables, "params": traverse_util.unflatten_dict(kept)}
    earlier = _flatten(variables, COLLECTION)
    converted[COLLECTION] = traverse_util.unflatten_dict({**earlier, **quantized})
    return converted


def _flatten(variables: Mapping[str, Any], collection: str) -> dict[Path, Any]:
    tree = variables.get(collection, {})
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"variables[{collection!r}]: expected a mapping of layers, got {type(tree).__name__}"
        )
    return traverse_util.flatten_dict(dict(tree), keep_empty_nodes=True)


def _is_dense(path: Path, value: Any, flat: Mapping[Path, Any]) -> bool:
    """Whether a leaf is the kernel of an `nn.Dense`, or of a stack of them, by all that its shapes tell."""
    if path[-1] != "kernel" or getattr(value, "ndim", None) not in (2, 3):
        return False
    bias = nn.unbox(flat.get((*path[:-1], "bias")))
    return bias is None or getattr(bias, "shape", None) == (*value.shape[:-2], value.shape[-1])


def _compile(rules: Sequence[Rule]) -> list[tuple[re.Pattern[str], Action]]:
    compiled = []
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise TypeError(f"rules: expected (regex, action) pairs, got {type(rules).__name__}")
    for position, rule in enumerate(rules):
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and rule[1] in ("int8", "keep")):
            raise ValueError(f"rules[{position}]: expected (regex, 'int8' or 'keep'), got {rule!r}")
        if not isinstance(rule[0], str | re.Pattern):
            raise ValueError(f"rules[{position}]: expected a regular expression, got {rule[0]!r}")
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


def _convert(path: Path, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    try:
        if kernel.ndim == 2:
            matrix = quantize(kernel)
            return matrix.codes, matrix.scale
        if kernel.shape[0] == 0:
            raise ValueError(f"kernel: expected at least one layer, got {list(kernel.shape)}")
        matrices = [quantize(part) for part in kernel]
    except (TypeError, ValueError) as error:
        raise type(error)(_joined((*path[:-1], str(error)))) from error
    return jnp.stack([m.codes for m in matrices]), jnp.stack([m.scale for m in matrices])


def _rebox(leaf: Any, value: jax.Array, *, drop_input: bool) -> Any:
    """Gives ``value`` the partition metadata of the float kernel, names in the order of the codes."""
    if not isinstance(leaf, nn.Partitioned):
        return value
    missing = value.ndim + drop_input - len(leaf.names)  # names at the end may be left out
    *stack, k_name, n_name = *leaf.names, *[None] * missing
    names = (*stack, n_name) if drop_input else (*stack, n_name, k_name)
    return leaf.replace(value=value, names=names)  # logical names stay logical, with their rules


def _joined(path: Path) -> str:
    return "/".join(map(str, path))  # trees of other origin have integer names


def _layers(flat: Mapping[Path, Any]) -> list[str]:
    return sorted({_joined(path[:-1]) for path in flat})
