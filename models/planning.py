"""What a model takes of each device, from shapes alone: no weight is read and nothing is compiled.

Weights and cache are exact, for they are what `load` and `generate` make. Activations and workspace
are those of the prompt, the largest step of all, counted by the arrays that are alive together at
the worst place of a layer; what a compiler fuses away makes the truth smaller. The surprising fact
is how little they are: a layer's arrays are gone when the next one starts, so they do not grow with
depth.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.typing import DTypeLike

from jaxint8 import QuantizedMatrix
from jaxint8.models.attention import MOST_BLOCKS, SMALLEST_BLOCK
from jaxint8.models.cache import capacity_for, is_coded
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.families import FAMILIES, Path
from jaxint8.models.generate import padded_length
from jaxint8.models.placement import DATA, MODEL, Placement
from jaxint8.outliers import as_rule, is_token_scope

# Left of each device for what no plan sees: the runtime's own memory, compiled programs, fragmentation.
RESERVE = 512 * 2**20
# As in ffi/cuda/plan.h: rows of codes are padded to a multiple, and up to so many outlier columns gathered.
_CODE_ALIGN, _GATHER_MOST = 256, 8192


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on the device that holds most.

    Attributes:
        weights: parameters.
        cache: keys and values of all sequences, at the capacity that the context needs.
        activations: arrays between the layers' products while a prompt is run.
        workspace: what int8 products need beside their operands.
        reserve: left for the runtime.

    """

    weights: int
    cache: int
    activations: int
    workspace: int
    reserve: int = RESERVE

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations + self.workspace + self.reserve


def plan(
    config: DecoderConfig,
    *,
    quantization: QuantizationConfig | None,
    dtype: DTypeLike = "bfloat16",
    mesh: tuple[int, int] = (1, 1),
    batch: int = 1,
    context: int | None = None,
    portable: bool = False,
    reserve: int = RESERVE,
) -> Plan:
    """Returns what a decoder takes of each device.

    Args:
        config: the decoder.
        quantization: how linear layers are int8; None for float.
        dtype: of float weights and activations.
        mesh: devices along "data" and along "model".
        batch: sequences in all.
        context: tokens of a sequence, prompt and continuation; the worst case is a prompt of all of
            them. None is what the positions are defined for, but at most 2,048.
        portable: whether int8 products are pure JAX ("xla") instead of a kernel.
        reserve: bytes for what no plan sees.

    Raises:
        ValueError: an argument cannot be.

    """
    context = default_context(config) if context is None else context
    for name, value in (("batch", batch), ("context", context), ("devices", min(mesh))):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not is_planned(quantization):
        raise ValueError("quantization: only symmetric codes without float copies are planned for")
    if context > config.max_positions:
        raise ValueError(f"context: {context} exceeds the model's {config.max_positions} positions")
    placement = place(config, mesh, quantization)
    # All layers are alike.
    one_layer = dataclasses.replace(config, layers=1)
    params = abstract_params(one_layer, quantization, dtype, place(one_layer, mesh, quantization))
    layer, rest = params["layers"], {**params, "layers": []}
    size = jnp.dtype(dtype).itemsize
    rows, tokens = -(-batch // placement.data), padded_length(context)
    capacity = capacity_for(context)
    per_token = 2 * config.layers * placement.local.key_value_size * size
    if is_coded(quantization):  # a byte each, and a scale for each vector
        local = placement.local
        per_token = 2 * config.layers * (local.key_value_size + 4 * local.kv_heads)
    activations = _activations(placement, rows, tokens, size)
    if tokens < capacity:  # the prompt has a cache of its own, which is copied into the larger one
        activations += rows * tokens * per_token
    return Plan(
        weights=config.layers * _nbytes(layer) + _nbytes(rest),
        cache=rows * capacity * per_token,
        activations=activations,
        workspace=_workspace(
            params, rows * tokens, portable or _asks_others(placement, quantization)
        ),
        reserve=reserve,
    )


def is_planned(quantization: QuantizationConfig | None) -> bool:
    """Returns whether there are plans for a method: for float, and symmetric codes without float copies."""
    return quantization is None or (quantization.numbers, quantization.outlier_weights) == (
        "absmax",
        "int8",
    )


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def default_context(config: DecoderConfig) -> int:
    """Returns the tokens of a sequence that is planned for where nothing else is said."""
    return min(config.max_positions, 2048)


def place(
    config: DecoderConfig, mesh: tuple[int, int], quantization: QuantizationConfig | None
) -> Placement:
    """Returns where a decoder would lie on so many devices along "data" and along "model"."""
    kinds = (AxisType.Auto, AxisType.Auto)
    return Placement.of(config, AbstractMesh(mesh, (DATA, MODEL), axis_types=kinds), quantization)


def abstract_params(
    config: DecoderConfig,
    quantization: QuantizationConfig | None,
    dtype: DTypeLike,
    placement: Placement | None = None,
) -> dict[str, Any]:
    """Returns the tree of parameters as shapes and dtypes: of one device with a placement, else whole."""
    family = next(f for f in FAMILIES if f.name == config.family)
    sources = family.weight_map(config)
    if quantization is not None and quantization.lm_head == "int8":
        head = sources["embedding",] if config.tied_embeddings else sources["lm_head", "weight"]
        sources |= {("int8_head", "weight"): dataclasses.replace(head, kind="linear")}

    def leaf(path: Path, shape: tuple[int, ...], kind: DTypeLike) -> jax.ShapeDtypeStruct:
        held = shape if placement is None else placement.size(path, shape)
        return jax.ShapeDtypeStruct(held, kind)

    params: dict[str, Any] = {"layers": [{} for _ in range(config.layers)]}
    for path, source in sources.items():
        if quantization is not None and source.kind == "linear":
            codes = leaf(path, source.shape, jnp.int8)
            scale = leaf((*path, "scale"), source.shape[:1], jnp.float32)
            value: Any = QuantizedMatrix(codes, scale)  # pyright: ignore[reportArgumentType]
        else:
            value = leaf(path, source.shape, jnp.float32 if source.kind == "vector" else dtype)
        node: Any = params
        for key in path[:-1]:
            node = node[key] if isinstance(key, int) else node.setdefault(key, {})
        node[path[-1]] = value
    return params


def _activations(placement: Placement, rows: int, tokens: int, size: int) -> int:
    """The arrays of one layer, or of the head, that are alive together."""
    local, m, hidden = placement.local, rows * tokens, placement.config.hidden_size
    block = min(tokens, max(SMALLEST_BLOCK, -(-tokens // MOST_BLOCKS)))
    turned = local.query_size + local.key_value_size
    # q, k, v as they come and as they are turned, keys and values as a block takes them (or as they are
    # read from codes), and what attention gives; scores and shares of a block in float32.
    attention = m * (2 * turned + 3 * local.key_value_size + local.query_size) * size
    attention += 2 * rows * local.heads * block * tokens * 4 + m * local.head_dim * 4
    mlp = m * local.mlp_size * (2 + local.gated) * size
    sums = 0
    if placement.model > 1 and placement.gathered:
        # Whole rows as they are gathered and side by side.
        attention += 2 * m * placement.config.query_size * size
        mlp += 2 * m * placement.config.mlp_size * size
    elif placement.model > 1:
        # Sums over a layer's inputs that several devices hold, before and after they are added up.
        sums = 2 * m * hidden * 4 * (1 if placement.config.norm_first else 2)
    head = 2 * rows * placement.config.vocab_size * 4
    masks = rows * tokens * tokens
    # The residual, its norm, and what is added to it.
    return 3 * m * hidden * size + max(attention, mlp, head, sums) + masks


def _asks_others(placement: Placement, quantization: QuantizationConfig | None) -> bool:
    """Whether rows on other devices have a say in outliers, which no kernel but pure JAX asks for."""
    return (
        placement.data > 1
        and quantization is not None
        and not is_token_scope(as_rule(quantization.outliers))
    )


def _workspace(params: dict[str, Any], m: int, portable: bool) -> int:
    """The most that one int8 product of m rows needs."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    shapes = {leaf.shape for leaf in leaves if isinstance(leaf, QuantizedMatrix)}
    if portable:
        # Rows in float32, two stacked rows of codes, their sums in int32, and those put together, in float32.
        return max((m * (4 * k + 2 * k + 3 * n * 4) for k, n in shapes), default=0)
    aligned = {(-(-k // _CODE_ALIGN) * _CODE_ALIGN, n) for k, n in shapes}
    return max((2 * m * k + (m + n) * min(-(-k // 4), _GATHER_MOST) for k, n in aligned), default=0)
