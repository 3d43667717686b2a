"""The compiled kernels as functions on JAX arrays: the only place that makes an FFI call.

Each wrapper casts every attribute to exactly one type, because a call whose attribute once had the wrong type poisons
JAX's cache for the right one. The surprising fact is the version guard: a handler built against newer FFI headers than
the running jaxlib does not fail alone, it makes the whole CPU backend unusable, so it must never be registered.
"""

import functools
import importlib
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from jaxint8.outliers import OutlierRule, RelativeThreshold, Threshold, TopK
from jaxint8.prologue import Prologue, RMSNorm, SiluGate, width

Arithmetic = Literal["int15", "float"]
Platform = Literal["cpu", "cuda"]

_AUTOMATIC = -1
_RULES = {type(None): 0, Threshold: 1, RelativeThreshold: 2, TopK: 3}
_PROLOGUES = {type(None): 0, RMSNorm: 1, SiluGate: 2}
LARGEST_MOST = 64
"""As many of the largest values of a row can be asked for of `largest`."""
_BUILD_HINT = "build it with `make setup` or `pip install --no-build-isolation .`"


def _runtime_ffi_version() -> tuple[int, int]:
    """Returns (major, minor) of the FFI that the installed jaxlib speaks, from the headers that it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text(encoding="utf-8")
    found = re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text)
    version = {name: int(value) for name, value in found}
    return version["MAJOR"], version["MINOR"]


def check_version(module: ModuleType) -> None:
    """Raises ImportError if the extension was built against a newer FFI than the installed jaxlib's.

    Older is fine: XLA keeps its FFI compatible with handlers of the past year.
    """
    if module.jaxlib_version == jaxlib.version.__version__:
        return
    built, running = tuple(module.ffi_version), _runtime_ffi_version()
    if built[0] != running[0] or built[1] > running[1]:
        raise ImportError(
            f"{module.__name__} was built for jaxlib {module.jaxlib_version} (FFI {built[0]}.{built[1]}) and cannot be "
            f"loaded by jaxlib {jaxlib.version.__version__} (FFI {running[0]}.{running[1]}): {_BUILD_HINT} anew"
        )


def _load(name: str) -> ModuleType | None:
    try:
        module = importlib.import_module(f"jaxint8.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"jaxint8.{name}":
            raise
        return None
    check_version(module)
    return module


def _register(module: ModuleType | None, platform: str) -> None:
    if module is not None:
        for target, handler in module.registrations().items():
            jax.ffi.register_ffi_target(target, handler, platform=platform)


_cpu = _load("_cpu")
_cuda = _load("_cuda")
_register(_cpu, "cpu")
_register(_cuda, "CUDA")


def platforms(target: str | None = None) -> tuple[Platform, ...]:
    """Returns the JAX platforms that have compiled kernels, or that one of them, in this installation."""
    has: dict[Platform, ModuleType | None] = {"cpu": _cpu, "cuda": _cuda}
    return tuple(p for p, m in has.items() if m and (not target or target in m.registrations()))


def available() -> tuple[str, ...]:
    """Returns the compiled implementations that can run here: "cpu", and "cuda" if JAX has such a device."""
    return tuple(name for name in platforms() if not why_not(name))


def why_not(implementation: str) -> str:
    """Returns why an implementation cannot be used here, in one line; empty if it can."""
    if implementation not in platforms():
        return f"this installation has no compiled {implementation} kernels; {_BUILD_HINT}"
    if implementation == "cuda":
        return _no_cuda_device()
    return ""


@functools.cache
def _no_cuda_device() -> str:
    try:
        return "" if jax.devices("cuda") else "JAX found no CUDA device"
    except RuntimeError:
        return "JAX found no CUDA device"


def available_rungs() -> tuple[str, ...]:
    """Returns the instruction sets whose CPU kernels this machine can run, best first; the last is "scalar"."""
    return tuple(name for name, supported in _rungs() if supported)


def _rungs() -> Iterable[tuple[str, bool]]:
    return _cpu.rungs() if _cpu is not None else ()


def cpu_features() -> dict[str, bool]:
    """Returns the instruction sets that have a CPU kernel, and whether this machine supports each."""
    return dict(_rungs())


def paths() -> tuple[str, ...]:
    """Returns the ways in which the CUDA kernels compute a product, for `rung` where the platform is "cuda"."""
    return _cuda.paths() if _cuda is not None else ()


def _rung_index(rung: str | None, platform: Platform) -> int:
    if rung is None:
        return _AUTOMATIC
    if platform == "cuda":
        if rung not in paths():
            raise ValueError(f"rung: expected one of {', '.join(paths())}, got {rung!r}")
        return paths().index(rung)
    features = cpu_features()
    if not features.get(rung, False):
        raise ValueError(f"rung: expected one of {', '.join(available_rungs())}, got {rung!r}")
    return list(features).index(rung)


def _attributes(
    rule: OutlierRule | None, arithmetic: Arithmetic, rung: str | None, platform: Platform
) -> dict[str, np.generic | int]:
    """Returns the attributes of a call; each has one type, whatever the caller passed."""
    if type(rule) not in _RULES:
        raise TypeError(
            f"rule: expected Threshold, RelativeThreshold, TopK or None, got {type(rule).__name__}"
        )
    if arithmetic not in ("int15", "float"):
        raise ValueError(f"arithmetic: expected 'int15' or 'float', got {arithmetic!r}")
    return {
        "rule": int(_RULES[type(rule)]),
        "column_scope": int(getattr(rule, "scope", "token") == "column"),
        "value": np.float32(getattr(rule, "value", 0.0)),
        "topk": int(getattr(rule, "k", 0)),
        "float_outliers": int(arithmetic == "float"),
        "rung": int(_rung_index(rung, platform)),
    }


def _prologue_attributes(prologue: Prologue | None) -> dict[str, np.generic | int]:
    if type(prologue) not in _PROLOGUES:
        raise TypeError(
            f"prologue: expected RMSNorm, SiluGate or None, got {type(prologue).__name__}"
        )
    return {
        "prologue": int(_PROLOGUES[type(prologue)]),
        "epsilon": np.float32(getattr(prologue, "epsilon", 0.0)),
    }


def _workspace_bytes(
    target: str,
    shape: tuple[int, int, int],
    attributes: Mapping[str, np.generic | int],
    dtype: np.dtype,
) -> int:
    """Returns the size of the scratch memory that a CUDA call needs; 0 without CUDA kernels."""
    if _cuda is None:
        return 0
    options = {
        name: int(attributes[name])
        for name in ("rule", "column_scope", "rung", "prologue")
        if name in attributes
    }
    return _cuda.workspace_bytes(target, *shape, itemsize=dtype.itemsize, **options)


def _call(
    target: str,
    results: tuple[jax.ShapeDtypeStruct, ...],
    operands: tuple[jax.Array, ...],
    shape: tuple[int, int, int],
    attributes: Mapping[str, np.generic | int],
    platform: Platform,
) -> Sequence[jax.Array]:
    """Makes the FFI call for ``shape`` (m, k, n).

    On CUDA there is one result more, scratch memory: an allocation inside the call could not be part of a CUDA graph.
    """
    if platform == "cuda":
        size = _workspace_bytes(target, shape, attributes, operands[0].dtype)
        results = (*results, jax.ShapeDtypeStruct((size,), jnp.uint8))
    return call_target(target, results, operands, attributes)


def call_target(
    target: str,
    results: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[jax.Array],
    attributes: Mapping[str, np.generic | int],
    aliases: dict[int, int] | None = None,
) -> Sequence[jax.Array]:
    """Makes the FFI call; ``aliases`` gives operands by number the results that take their place."""
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential", input_output_aliases=aliases)
    return call(*operands, **attributes)


def quantize_rows(
    x: jax.Array,
    rule: OutlierRule | None,
    arithmetic: Arithmetic = "int15",
    *,
    rung: str | None = None,
    platform: Platform = "cpu",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantises activations row by row, as `reference.quantize_rows` does.

    Args:
      x: float32, bfloat16 or float16[m, k].
      rule: an outlier rule or None.
      arithmetic: "int15", or "float" (not on CUDA).
      rung: the instruction set to use, one of `available_rungs()`, or on CUDA one of `paths()`; None for the best.
      platform: whose kernel to call: the platform that the computation is compiled for.

    Returns:
      (lo int8[m, k], hi int8[m, k], row_scale float32[m]).
    """
    m, k = x.shape
    results = (
        jax.ShapeDtypeStruct((m, k), jnp.int8),
        jax.ShapeDtypeStruct((m, k), jnp.int8),
        jax.ShapeDtypeStruct((m,), jnp.float32),
    )
    attributes = _attributes(rule, arithmetic, rung, platform)
    lo, hi, row_scale, *_ = _call(
        "jaxint8_quantize", results, (x,), (m, k, 0), attributes, platform
    )
    return lo, hi, row_scale


def product(
    a: jax.Array, codes: jax.Array, *, rung: str | None = None, platform: Platform = "cpu"
) -> jax.Array:
    """Returns the int32[m, n] product of int8[m, k] and int8[n, k] (both K-major), exact modulo 2**32."""
    (m, k), n = a.shape, codes.shape[0]
    results = (jax.ShapeDtypeStruct((m, n), jnp.int32),)
    attributes = {"rung": int(_rung_index(rung, platform))}
    return _call("jaxint8_product", results, (a, codes), (m, k, n), attributes, platform)[0]


def enter(
    x: jax.Array,
    norm: jax.Array | None,
    prologue: Prologue,
    *,
    rung: str | None = None,
    platform: Platform = "cpu",
) -> jax.Array:
    """Returns x.dtype[m, k], the rows behind a prologue, to the bit as `reference` gives them.

    Args:
      x: float32, bfloat16 or float16[m, k], or [m, 2 * k] for a `SiluGate`.
      norm: float32[k] for an `RMSNorm`, else None.
      prologue: what to apply.
      rung: the instruction set to use, one of `available_rungs()`; None for the best.
      platform: whose kernel to call: the platform that the computation is compiled for.
    """
    m, k = x.shape[0], x.shape[1] // width(1, prologue)
    norm = jnp.zeros((0,), jnp.float32) if norm is None else norm
    attributes = {"rung": _rung_index(rung, platform), **_prologue_attributes(prologue)}
    results = (jax.ShapeDtypeStruct((m, k), x.dtype),)
    return _call("jaxint8_prologue", results, (x, norm), (m, k, 0), attributes, platform)[0]


def linear(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    prologue: Prologue | None = None,
    rule: OutlierRule | None = None,
    arithmetic: Arithmetic = "int15",
    rung: str | None = None,
    platform: Platform = "cpu",
) -> jax.Array:
    """The whole layer in one call: row scales, outliers, codes, integer product, scales, bias, one rounding.

    And, where asked for, what stands before and behind it: ``residual + linear(prologue(x))``, with the roundings that
    separate operations would have.

    Args:
      x: float32, bfloat16 or float16[m, k], or [m, 2 * k] for a `SiluGate`.
      codes: int8[n, k]; -128 is legal.
      scale: float32[n].
      bias: float32[n] or None.
      norm: float32[k], the weight of an `RMSNorm`, else None.
      residual: x.dtype[m, n] or None.
      prologue: what x goes through first, or None.
      rule: an outlier rule or None.
      arithmetic: "int15", or "float" (not on CUDA).
      rung: the instruction set to use, one of `available_rungs()`, or on CUDA one of `paths()`; None for the best.
      platform: whose kernel to call: the platform that the computation is compiled for.

    Returns:
      x.dtype[m, n], to the bit as `reference.int8_linear` gives it ("float": up to the order of the outlier sum).
    """
    if bias is None:
        bias = jnp.zeros((0,), jnp.float32)
    if norm is None:
        norm = jnp.zeros((0,), jnp.float32)
    if residual is None:
        residual = jnp.zeros((0, 0), x.dtype)
    m, (n, k) = x.shape[0], codes.shape
    results = (jax.ShapeDtypeStruct((m, n), x.dtype),)
    attributes = _attributes(rule, arithmetic, rung, platform) | _prologue_attributes(prologue)
    operands = (x, codes, scale, bias, norm, residual)
    return _call("jaxint8_linear", results, operands, (m, k, n), attributes, platform)[0]


def largest(x: jax.Array, count: int) -> jax.Array:
    """The columns of the largest values of each row, in falling order, of equal ones the lower first; on CUDA only.

    Zeros are equal whatever their signs, NaNs are equal and above all numbers: as NumPy and JAX sort them.

    Of float32[m, n] these are int32[m, count], for a count from 1 to n and `LARGEST_MOST`.
    """
    if x.ndim != 2 or x.dtype != jnp.float32:
        raise ValueError(f"x: expected float32[m, n], got {x.dtype}{list(x.shape)}")
    m, n = x.shape
    if not 1 <= count <= min(n, LARGEST_MOST):
        raise ValueError(f"count: expected 1 to {min(n, LARGEST_MOST)}, got {count}")
    results = (jax.ShapeDtypeStruct((m, count), jnp.int32),)
    return _call("jaxint8_largest", results, (x,), (m, n, count), {}, "cuda")[0]


def mlp_block(
    x: jax.Array,
    residual: jax.Array,
    norm: jax.Array,
    out: Sequence[jax.Array | None],
    up: Sequence[jax.Array | None],
    down: Sequence[jax.Array | None],
    *,
    prologue: Prologue,
    rule: OutlierRule | None = None,
    arithmetic: Arithmetic = "int15",
    rung: str | None = None,
    platform: Platform = "cpu",
) -> jax.Array:
    """Three layers in one call; see `jaxint8.block.Block` for the function.

    Args:
      x: float32, bfloat16 or float16[m, k].
      residual: x.dtype[m, h].
      norm: float32[h].
      out: codes int8[h, k], scale float32[h], bias float32[h] or None.
      up: likewise for int8[2 * f, h].
      down: likewise for int8[h, f].
      prologue: the `RMSNorm` before ``up``.
      rule: an outlier rule or None.
      arithmetic: "int15", or "float" (not on CUDA).
      rung: as for `linear`.
      platform: whose kernel to call: the platform that the computation is compiled for.

    Returns:
      x.dtype[m, h], to the bit what three calls of `linear` give.
    """
    operands = [x, residual, norm]
    for codes, scale, bias in (out, up, down):
        assert codes is not None and scale is not None
        operands += [codes, scale, jnp.zeros((0,), jnp.float32) if bias is None else bias]
    (m, k), h, wide = x.shape, residual.shape[1], operands[6].shape[0]
    stream = jax.ShapeDtypeStruct((m, h), x.dtype)
    results: list[jax.ShapeDtypeStruct] = [stream, stream, jax.ShapeDtypeStruct((m, wide), x.dtype)]
    attributes = _attributes(rule, arithmetic, rung, platform)
    if platform == "cuda":
        sizes = [
            _workspace_bytes("jaxint8_linear", shape, {**attributes, "prologue": number}, x.dtype)
            for number, shape in enumerate([(m, k, h), (m, h, wide), (m, wide // 2, h)])
        ]
        results.append(jax.ShapeDtypeStruct((max(sizes),), jnp.uint8))
    attributes["epsilon"] = _prologue_attributes(prologue)["epsilon"]
    return call_target("jaxint8_mlp_block", results, operands, attributes)[0]
