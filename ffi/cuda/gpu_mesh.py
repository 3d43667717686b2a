"""A layer and a model on a mesh of GPUs beside one of them, for gpu_check.py: equal bits, equal text, and the speed."""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import gpu_decode
import jax
import ml_dtypes
import numpy as np
from gpu_check import ROOT, STAGES
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxint8 import (
    Partition,
    QuantizedMatrix,
    RelativeThreshold,
    Threshold,
    TopK,
    int8_linear,
    linear,
    reference,
)
from jaxint8.models.generate import generate_tokens
from jaxint8.models.loading import load
from jaxint8.models.placement import Placement

RULES = (None, Threshold(6.0, "column"), Threshold(4.0, "token"), RelativeThreshold(4.0), TopK(8))
# (m, k, n) and type of x: a fused kernel for few rows, and kernels for some and for many. Every shape is compiled for
# every mesh and split, which takes longer than all that is computed.
CASES = (
    ((2, 512, 768), ml_dtypes.bfloat16),
    ((32, 1024, 512), np.float32),
    ((600, 768, 1024), ml_dtypes.bfloat16),
)
MODELS = (("llama_gqa_tied", "topk:kv_int8"), ("bloom", "relative"))
# A layer whose inputs are split, as a decoder's `down`; rows on both sides of what `linear` gathers.
SPLIT_K, SPLIT_N, SPLIT_ROWS, SPLIT_LAYERS = 14336, 4096, (1, 32, 1024), 8
_INT8 = gpu_decode.METHODS["int8 relative 6, int8 head and cache"]
METHODS = {
    "int8": _INT8,
    "bf16": None,
    "int8, fast": dataclasses.replace(_INT8, reduction="fast"),
}
BATCHES = (1, 32)
DECODING_SECONDS = 80  # what a method may take on a mesh, nearly all of it compilation


def mesh_of(data: int, model: int) -> Mesh:
    """Returns a mesh of so many GPUs."""
    kinds = (AxisType.Auto,) * 2
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=kinds, devices=devices)


def _meshes() -> list[tuple[int, int]]:
    count = jax.device_count()
    return [(1, count), (count, 1)]


@functools.partial(jax.jit, static_argnames="partition")
def _every_rule(x: Any, codes: Any, scale: Any, partition: Any) -> list[jax.Array]:
    w = QuantizedMatrix(codes, scale)
    return [int8_linear(x, w, outliers=rule, partition=partition) for rule in RULES]


def _check_layers() -> dict[str, Any]:
    """Compares outputs of every split with those of the oracle."""
    found: dict[str, Any] = {"cases": 0, "failed": []}
    rng = np.random.default_rng(5)
    for (m, k, n), dtype in CASES:
        values = rng.standard_normal((m, k))
        values[:, rng.choice(k, 6, replace=False)] *= 12
        codes = rng.integers(-127, 128, (n, k), np.int8)
        scale = rng.uniform(1e-4, 2e-4, n).astype(np.float32)
        x = values.astype(dtype)
        wanted = [reference.int8_linear(x, codes, scale, None, rule) for rule in RULES]
        for shape, split in itertools.product(_meshes(), ("n", "k")):
            partition = Partition(mesh_of(*shape), rows="data", **{split: "model"})
            specs = partition.x_spec(2), partition.codes_spec, partition.n_spec
            arrays = [
                jax.device_put(a, NamedSharding(partition.mesh, spec))
                for a, spec in zip((x, codes, scale), specs, strict=True)
            ]
            made = _every_rule(*arrays, partition)
            for rule, y, right in zip(RULES, made, wanted, strict=True):
                found["cases"] += 1
                if np.asarray(y).tobytes() != np.asarray(right).tobytes():
                    case = (m, k, n), np.dtype(dtype).name, shape, split, repr(rule)
                    found["failed"].append(str(case))
    return found


def _check_models() -> list[dict[str, Any]]:
    """Compares logits and text of small models on a mesh with those of one GPU.

    Float products of other shapes are rounded differently, which now and then turns a code, and one code of models as
    small as these counts. So logits must be as near to those of float weights as one GPU's are, within a factor of
    two; a part that is left out or counted twice is an error of the size of the logits.
    """
    rows = []
    goldens = pathlib.Path(ROOT) / "tests" / "goldens"
    for case, method in MODELS:
        one = load(goldens / case, quantization=method)
        tokens = np.random.default_rng(1).integers(0, one.config.vocab_size, (4, 11))
        exact = np.asarray(load(goldens / case, quantization=None).logits(tokens))
        logits = np.asarray(one.logits(tokens))
        moved = float(np.abs(logits - exact).max())
        prompts = [list(map(int, row)) for row in tokens]

        def text(model: Any, prompts: Any = prompts) -> Any:
            how = {"quantization": model.quantization, "placement": model.placement}
            return generate_tokens(model.config, model.params, prompts, 8, **how)

        for shape in _meshes():
            model = load(goldens / case, quantization=method, mesh=mesh_of(*shape))
            found = np.asarray(model.logits(tokens))
            equal = sum(a == b for a, b in zip(text(model), text(one), strict=True))
            row: dict[str, Any] = {"case": case, "method": method, "mesh": shape}
            row |= {"moved_by_int8": moved, "on_the_mesh": float(np.abs(found - exact).max())}
            row |= {"difference": float(np.abs(found - logits).max())}
            row |= {"equal_texts": equal, "of": len(prompts)}
            row["passed"] = bool(row["on_the_mesh"] <= 2 * moved)
            rows.append(row)
            print(row, flush=True)
    return rows


@functools.partial(jax.jit, static_argnames=("way", "partition"))
def _chain(x: jax.Array, weights: Any, way: Any, partition: Partition) -> jax.Array:
    """Layers one after the other, each with weights of its own."""
    for w in weights:
        if way == "bf16":
            y = jax.lax.with_sharding_constraint(x @ w, NamedSharding(partition.mesh, P()))
        else:
            y = int8_linear(x, w, outliers=way, partition=partition)
        x = x + y[:, :1]
    return x


def _time_split_layers() -> list[dict[str, Any]]:
    """Microseconds of a layer whose inputs are split over all GPUs: gathered and quantised whole, or by statistics."""
    partition = Partition(mesh_of(1, jax.device_count()), k="model")

    def place(a: Any, *spec: Any) -> jax.Array:
        return jax.device_put(a, NamedSharding(partition.mesh, P(*spec)))

    rng = np.random.default_rng(7)
    codes = rng.integers(-127, 128, (SPLIT_N, SPLIT_K), np.int8)
    scale = place(np.full(SPLIT_N, 1e-4, np.float32))
    int8 = [QuantizedMatrix(place(codes, None, "model"), scale) for _ in range(SPLIT_LAYERS)]
    table = codes.T.astype(ml_dtypes.bfloat16)
    floats = [place(table, "model", None) for _ in range(SPLIT_LAYERS)]
    rows = []
    for m in SPLIT_ROWS:
        values = rng.standard_normal((m, SPLIT_K))
        values[:, rng.choice(SPLIT_K, 12, replace=False)] *= 12
        x = place(values.astype(ml_dtypes.bfloat16), None, "model")
        row: dict[str, Any] = {"k": SPLIT_K, "n": SPLIT_N, "m": m}
        ways = {"bf16": ("bf16", 0)}
        for name, rule in (("none", None), ("relative 6", RelativeThreshold(6.0))):
            ways |= {f"{name}, gathered": (rule, 1 << 40), f"{name}, statistics": (rule, 0)}
        for name, (way, gathered) in ways.items():
            limits = linear.GATHERED_VALUES, linear.GATHERED_VALUES_WITHOUT_RULE
            linear.GATHERED_VALUES = linear.GATHERED_VALUES_WITHOUT_RULE = gathered
            jax.clear_caches()  # what was traced with another limit
            weights = floats if way == "bf16" else int8
            call = functools.partial(_chain, x, weights, way, partition)
            row[name] = 1e6 / SPLIT_LAYERS * _several(call)
            linear.GATHERED_VALUES, linear.GATHERED_VALUES_WITHOUT_RULE = limits
        rows.append(row)
        print(row, flush=True)
    return rows


def _several(call: Callable[[], Any], calls: int = 20) -> float:
    """Returns seconds of a call, the median of several times many that are queued at once."""

    def queue() -> list[Any]:
        return [call() for _ in range(calls)]

    return gpu_decode.median(queue) / calls


def _on_mesh(make: Callable[..., Any], placement: Placement) -> Any:
    """Makes parameters where the mesh holds them."""
    specs = placement.param_specs(jax.eval_shape(make))
    shardings = jax.tree.map(lambda spec: NamedSharding(placement.mesh, spec), specs)
    return jax.jit(make, out_shardings=shardings)()


def time_decoding(method: str, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Tokens per second of the shape of `gpu_decode`, on a mesh of so many GPUs."""
    quantization = METHODS[method]
    placement = None
    if shape != (1, 1):
        placement = Placement.of(gpu_decode.CONFIG, mesh_of(*shape), quantization)

    def make() -> Any:
        params = gpu_decode.make_params(quantization is not None)
        return gpu_decode.with_head(params, quantization)

    params = jax.jit(make)() if placement is None else _on_mesh(make, placement)
    rows = []
    for batch in BATCHES:
        decoding = gpu_decode.Decoding(params, quantization, batch, placement=placement)
        rate = gpu_decode.STEPS * batch / gpu_decode.median(decoding)
        rows.append({"method": method, "mesh": shape, "batch": batch, "decode_tokens_per_s": rate})
        print(rows[-1], flush=True)
    return rows


def stage_mesh() -> dict[str, Any]:
    """Everything above; needs at least two GPUs."""
    begin = time.monotonic()
    if jax.device_count() < 2:
        raise RuntimeError(f"mesh: expected at least two GPUs, found {jax.device_count()}")
    layers = _check_layers()
    print(layers, f"after {time.monotonic() - begin:.0f} s", flush=True)
    models = _check_models()
    found: dict[str, Any] = {
        "gpus": jax.device_count(),
        "cases": layers["cases"],
        "failures": layers["failed"] + [str(row) for row in models if not row["passed"]],
        "models": models,
        "checked_after_s": time.monotonic() - begin,
        "split_layers": _time_split_layers(),
        "layers_timed_after_s": time.monotonic() - begin,
        "rows": [],
        "unit": "tokens per second",
    }
    for shape in ((1, jax.device_count()), (1, 1)):
        for method in METHODS:
            if time.monotonic() - begin < 0.9 * STAGES["mesh"] - DECODING_SECONDS:
                found["rows"] += time_decoding(method, shape)
    return found
