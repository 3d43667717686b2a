"""How loading and compiling behave at size: random LLaMAs of a few gigabytes, and of more and more layers.

The surprising fact: nothing here needs good weights, so a checkpoint of any size is made on the spot from one block of
random numbers, and it is the readers' worst case (no value can be skipped, every row has its own scale).
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AxisType

from jaxint8.checkpoint import Piece, write_checkpoint
from jaxint8.cli.benchmarks.load import load_group
from jaxint8.evaluation.benchmark import machine, results
from jaxint8.evaluation.benchmark.results import Group
from jaxint8.models import families, load
from jaxint8.models.config import DecoderConfig
from jaxint8.models.generate import generate_tokens

DEVICES = 8
# Rows that are written at a time.
_ROWS = 256


def config_of(layers: int, hidden: int = 2048) -> DecoderConfig:
    """A LLaMA of so many layers, with the proportions of one of a billion parameters."""
    width = 128 if hidden >= 1024 else 32
    return DecoderConfig(
        family="llama",
        vocab_size=32000 if hidden >= 1024 else 1000,
        hidden_size=hidden,
        layers=layers,
        heads=hidden // width,
        kv_heads=hidden // width // 2,
        head_dim=width,
        mlp_size=hidden * 11 // 4,
        max_positions=2048,
        embedding_size=hidden,
        norm="rms",
        norm_epsilon=1e-5,
        positions="rope",
        activation="silu",
        gated=True,
        tied_embeddings=True,
        end_tokens=(2,),
    )


def config_for(file_bytes: float) -> DecoderConfig:
    """The LLaMA whose checkpoint in bfloat16 comes nearest to a size."""
    one, two = (_parameters(config_of(layers)) for layers in (1, 2))
    layers = round(1 + (file_bytes / 2 - one) / (two - one))
    return config_of(max(1, layers))


def _parameters(config: DecoderConfig) -> int:
    sources = families.FAMILIES[0].weight_map(config).values()
    return sum(int(np.prod(source.shape)) for source in sources)


def write_random(config: DecoderConfig, directory: Path) -> None:
    """Writes a checkpoint of random weights in bfloat16, a few rows at a time.

    Args:
      config: a LLaMA.
      directory: made if needed.
    """
    family = next(family for family in families.FAMILIES if family.name == config.family)
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(ml_dtypes.bfloat16)
    pieces = [
        _random_piece(part.name, part.shape, block)
        for source in family.weight_map(config).values()
        for part in source.parts
    ]
    write_checkpoint(directory, pieces)
    (directory / "config.json").write_text(json.dumps(family.config_to_hf(config)))


def _random_piece(name: str, shape: tuple[int, ...], block: np.ndarray) -> Piece:
    def fill(put) -> None:
        width = int(np.prod(shape[1:]))
        for first in range(0, shape[0], _ROWS):
            rows = min(_ROWS, shape[0] - first)
            start = (zlib.crc32(name.encode()) + 977 * first) % (len(block) - rows * width)
            put(name, first, block[start : start + rows * width].reshape(rows, *shape[1:]))

    return Piece({name: (shape, block.dtype)}, fill)


def scale_groups(file_bytes: float, layers: Sequence[int], rounds: int) -> Iterator[Group]:
    """Measures loading of a checkpoint of a size, and how compiling grows with layers.

    Args:
      file_bytes: of the checkpoint, about.
      layers: places on the axis of layers.
      rounds: of everything.

    Yields:
      A group of the suite "load" (on one device and on several), and one of "growth".
    """
    with tempfile.TemporaryDirectory() as folder:
        write_random(config_for(file_bytes), Path(folder))
        yield load_group(folder, rounds, [("llm_int8", 1), ("llm_int8", DEVICES)])
    yield layers_group(layers, rounds)


def layers_group(layers: Sequence[int], rounds: int) -> Group:
    """Measures the time to the first two tokens, nearly all of it compilation, by number of layers."""
    others = machine.Others()
    lines, steps = [], []
    context = multiprocessing.get_context("spawn")
    for devices in (1, DEVICES):
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.submit(_compile_times, tuple(layers), devices, rounds).result()
        name = f"first tokens, {devices} devices"
        for count, compiled in found.items():
            extra = {"model_bytes": compiled.model_bytes, "temporary_bytes": compiled.temporary}
            at = {"layers": count}
            lines.append(results.line(name, compiled.seconds, at=at, extra=extra))
        steps += results.steps(name, {count: c.seconds for count, c in found.items()})
    what = {"axis": "layers", "hidden": 256}
    return Group(suite="growth", what=what, lines=lines, steps=steps, others=others.cores())


@dataclasses.dataclass(frozen=True)
class _Compiled:
    seconds: list[float]
    model_bytes: int
    temporary: int  # bytes on one device, while logits of 128 tokens are computed


def _compile_times(layers: tuple[int, ...], devices: int, rounds: int) -> dict[int, _Compiled]:
    """Runs in a process of its own."""
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = None
    if devices > 1:
        kinds = (AxisType.Auto, AxisType.Auto)
        mesh = jax.make_mesh((1, devices), ("data", "model"), kinds)
    found = {}
    for count in layers:
        with tempfile.TemporaryDirectory() as folder:
            write_random(config_of(count, hidden=256), Path(folder))
            model = load(folder, quantization="llm_int8", mesh=mesh)
        seconds = []
        for _ in range(rounds):
            jax.clear_caches()
            start = time.perf_counter()
            how = {"quantization": model.quantization, "placement": model.placement}
            generate_tokens(model.config, model.params, [[1] * 32], 2, **how)
            seconds.append(time.perf_counter() - start)
        found[count] = _Compiled(seconds, model.nbytes, model.temporary_bytes(1, 128))
    return found
