"""One layer on one device: which implementation carries it out, and how vmap sees it.

The surprising fact is that nothing here chooses when it is called: a computation may be traced on one machine and
compiled for another, so the choice between kernels and pure JAX is left to the platform that it is compiled for.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8 import kernels, reference
from jaxint8.outliers import OutlierRule, is_token_scope
from jaxint8.partition import mapped_names, on_parts
from jaxint8.portable import Multiply, xla_linear, xla_product
from jaxint8.prologue import Prologue, RMSNorm, SiluGate, enter, width
from jaxint8.quantize import Arithmetic, QuantizedRows, quantize_rows
from jaxint8.shards import vary_like

Implementation = Literal["cuda", "cpu", "xla", "reference"]


class Operands(NamedTuple):
    """The arrays of a layer; those it does without are None.

    Attributes:
      x: float[m, k], or [m, 2 * k] in front of a `SiluGate`.
      codes: int8[n, k].
      scale: float32[n].
      bias: float32[n].
      norm: float32[k], the weight of an `RMSNorm`.
      residual: x.dtype[m, n], what the result is added to.
    """

    x: jax.Array
    codes: jax.Array
    scale: jax.Array
    bias: jax.Array | None = None
    norm: jax.Array | None = None
    residual: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a layer computes from its operands, and with what; static under jit.

    Attributes:
      rule: the outlier rule, or None.
      arithmetic: how outliers are carried out.
      implementation: see `jaxint8.int8_linear`.
      prologue: what x goes through first, or None.
    """

    rule: OutlierRule | None
    arithmetic: Arithmetic
    implementation: Implementation | None
    prologue: Prologue | None = None


def check_available(implementation: Implementation | None) -> None:
    """Raises ValueError if kernels are asked for that this installation or machine does not have."""
    if implementation in ("cuda", "cpu") and implementation not in kernels.available():
        raise ValueError(
            f"implementation: {implementation!r} is not available: {kernels.why_not(implementation)}"
        )


def has_kernel(layer: Layer, platform: str) -> bool:
    """Whether a platform's kernels carry a layer out: CUDA's know no "float" arithmetic."""
    return not (platform == "cuda" and layer.arithmetic == "float")


def one_device(operands: Operands, layer: Layer) -> jax.Array:
    """Returns x.dtype[m, n]: ``residual + linear(prologue(x))``, each rounded to the dtype of x."""
    portable = functools.partial(_portable, layer=layer)
    implementation = layer.implementation
    if implementation == "reference":
        return _reference(operands, layer)
    if implementation == "xla" or (implementation and not has_kernel(layer, implementation)):
        return portable(operands)
    if implementation is not None:
        return _compiled(layer, implementation)(operands)
    platforms = {
        platform: _compiled(layer, platform)
        for platform in kernels.platforms()
        if has_kernel(layer, platform)
    }
    return jax.lax.platform_dependent(operands, default=portable, **platforms)


def entered(operands: Operands, layer: Layer) -> jax.Array:
    """Returns the rows x.dtype[m, k] behind the prologue, with the bits that `one_device` quantises."""
    x, norm, prologue = operands.x, operands.norm, layer.prologue
    if prologue is None:
        return x
    if layer.implementation == "reference":
        return _reference_rows(operands, layer)
    portable = functools.partial(enter, prologue=prologue)
    implementation = layer.implementation
    if implementation == "xla" or (implementation and not has_kernel(layer, implementation)):
        return portable(x, norm)

    def compiled(
        platform: kernels.Platform,
    ) -> Callable[[jax.Array, jax.Array | None], jax.Array]:
        def call(x: jax.Array, norm: jax.Array | None) -> jax.Array:
            y = kernels.enter(x, norm, prologue, platform=platform)
            return vary_like(y, *jax.tree.leaves((x, norm)))

        return call

    if implementation is not None:
        return compiled(implementation)(x, norm)
    platforms = {
        platform: compiled(platform)
        for platform in kernels.platforms()
        if has_kernel(layer, platform)
    }
    return jax.lax.platform_dependent(x, norm, default=portable, **platforms)


def _portable(operands: Operands, layer: Layer) -> jax.Array:
    x, codes, scale, bias, norm, residual = operands
    rows = enter(x, norm, layer.prologue)
    y = xla_linear(rows, codes, scale, bias, rule=layer.rule, arithmetic=layer.arithmetic)
    return y if residual is None else residual + y


@functools.cache
def _compiled(layer: Layer, platform: kernels.Platform) -> Callable[[Operands], jax.Array]:
    """The kernel as a function that vmap folds into rows, where a row's result does not depend on the others."""

    @jax.custom_batching.custom_vmap
    def call(operands: Operands) -> jax.Array:
        how = {"prologue": layer.prologue, "rule": layer.rule, "arithmetic": layer.arithmetic}
        y = kernels.linear(*operands, **how, platform=platform)
        return vary_like(y, *jax.tree.leaves(operands))

    @call.def_vmap
    def _(size: int, batched: list[Operands], operands: Operands) -> tuple[jax.Array, bool]:
        flags = batched[0]
        if names := mapped_names(flags, operands):
            return on_parts(call, flags, operands, names), True
        alone = flags._replace(x=False, residual=False)
        if is_token_scope(layer.rule) and flags.x and not any(jax.tree.leaves(alone)):
            m, residual = operands.x.shape[1], operands.residual
            if residual is not None:
                if not flags.residual:
                    residual = jnp.broadcast_to(residual[None], (size, *residual.shape))
                residual = residual.reshape(size * m, residual.shape[-1])
            x = operands.x.reshape(size * m, operands.x.shape[-1])
            y = call(operands._replace(x=x, residual=residual))
            return y.reshape(size, m, y.shape[-1]), True
        leaves, tree = jax.tree.flatten(operands)
        mapped = jax.tree.leaves(flags)

        def one(part: list[jax.Array]) -> jax.Array:
            parts = iter(part)
            whole = [next(parts) if b else a for a, b in zip(leaves, mapped, strict=True)]
            return call(jax.tree.unflatten(tree, whole))

        return jax.lax.map(one, [a for a, b in zip(leaves, mapped, strict=True) if b]), True

    return call


def row_codes(x: jax.Array, layer: Layer) -> QuantizedRows:
    """Returns the codes of whole rows x[m, k] that `one_device` multiplies; outliers as integers."""
    assert layer.arithmetic == "int15"
    portable = functools.partial(quantize_rows, rule=layer.rule)
    if layer.implementation in ("xla", "reference"):
        return portable(x)

    if layer.implementation is not None:
        return _compiled_rows(layer.rule, layer.implementation)(x)
    platforms = {platform: _compiled_rows(layer.rule, platform) for platform in kernels.platforms()}
    return jax.lax.platform_dependent(x, default=portable, **platforms)


@functools.cache
def _compiled_rows(
    rule: OutlierRule | None, platform: kernels.Platform
) -> Callable[[jax.Array], QuantizedRows]:
    """The kernel as a function that vmap folds into rows, where a row's result does not depend on the others."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array) -> QuantizedRows:
        lo, hi, scale = kernels.quantize_rows(x, rule, platform=platform)
        made = QuantizedRows(lo, None if rule is None else hi, scale[:, None])
        return jax.tree.map(lambda array: vary_like(array, x), made)

    @call.def_vmap
    def _(size: int, batched: list[bool], x: jax.Array) -> tuple[QuantizedRows, QuantizedRows]:
        if names := mapped_names(tuple(batched), (x,)):
            made = on_parts(call, True, x, names)
        elif is_token_scope(rule):
            _, m, k = x.shape
            made = call(x.reshape(size * m, k))
            made = jax.tree.map(lambda array: array.reshape(size, m, array.shape[-1]), made)
        else:
            made = jax.lax.map(call, x)
        return made, jax.tree.map(lambda _: True, made)

    return call


def integer_product(
    a: jax.Array, codes: jax.Array, *, implementation: Implementation | None
) -> jax.Array:
    """A `Multiply` by the kernels."""
    if implementation == "xla":
        return xla_product(a, codes)
    if implementation is not None:
        return _compiled_product(implementation)(a, codes)
    platforms = {platform: _compiled_product(platform) for platform in kernels.platforms()}
    return jax.lax.platform_dependent(a, codes, default=xla_product, **platforms)


@functools.cache
def _compiled_product(platform: kernels.Platform) -> Multiply:
    """The kernel as a function that vmap folds into rows."""

    @jax.custom_batching.custom_vmap
    def call(a: jax.Array, codes: jax.Array) -> jax.Array:
        return vary_like(kernels.product(a, codes, platform=platform), a, codes)

    @call.def_vmap
    def _(size: int, batched: list[bool], a: jax.Array, codes: jax.Array) -> tuple[jax.Array, bool]:
        if names := mapped_names(tuple(batched), (a, codes)):
            return on_parts(lambda both: call(*both), tuple(batched), (a, codes), names), True
        if not batched[1]:
            _, m, k = a.shape
            return call(a.reshape(size * m, k), codes).reshape(size, m, codes.shape[0]), True
        if batched[0]:
            return jax.lax.map(lambda both: call(*both), (a, codes)), True
        return jax.lax.map(lambda one: call(a, one), codes), True

    return call


def _reference(operands: Operands, layer: Layer) -> jax.Array:
    rows = _reference_rows(operands, layer)

    def call(operands: Operands) -> np.ndarray:
        x, codes, scale, bias, _, residual = jax.tree.map(np.asarray, operands)
        y = reference.int8_linear(x, codes, scale, bias, layer.rule, layer.arithmetic)
        return y if residual is None else residual + y

    shape = jax.ShapeDtypeStruct((rows.shape[0], operands.codes.shape[0]), rows.dtype)
    return jax.pure_callback(call, shape, operands._replace(x=rows), vmap_method="sequential")


def _reference_rows(operands: Operands, layer: Layer) -> jax.Array:
    x, prologue = operands.x, layer.prologue
    if prologue is None:
        return x

    def call(x: jax.Array, norm: jax.Array | None) -> np.ndarray:
        if isinstance(prologue, SiluGate):
            return reference.silu_gate(np.asarray(x))
        assert isinstance(prologue, RMSNorm)
        return reference.rms_norm(np.asarray(x), np.asarray(norm), prologue.epsilon)

    shape = jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // width(1, prologue)), x.dtype)
    return jax.pure_callback(call, shape, x, operands.norm, vmap_method="sequential")
