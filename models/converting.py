"""Converts a checkpoint to int8 on disk, without a model: tensors in, tensors out, block by block.

What is written is what `load` followed by `save` would write, but neither the float nor the int8
model is ever in memory, only blocks of a megabyte; so a laptop can convert 175B parameters. The
surprising fact is that fused and sharded tensors need no care here: codes are made per row, so rows
stay where the checkpoint has them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxint8.checkpoint import Piece, TensorReader, bitsandbytes, codes, write_checkpoint
from jaxint8.checkpoint.bitsandbytes import Keep
from jaxint8.checkpoint.writer import SHARD_BYTES, Put
from jaxint8.models import loading, saving
from jaxint8.models.families import Part
from jaxint8.models.reading import Pool
from jaxint8.models.tokenizer import read_json

# Of a Hugging Face directory, what is taken over as it is.
_KEPT = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, jnp.bfloat16))


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        files: the weight files, and the index if there are several.
        source_bytes: size of the files that were read.
        output_bytes: size of all tensors written.
        reused_bytes: of these, what an interrupted conversion had finished.

    """

    files: list[Path]
    source_bytes: int
    output_bytes: int
    reused_bytes: int


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> Conversion:
    """Writes a checkpoint with int8 linear layers, as bitsandbytes lays them out.

    Memory stays within a few megabytes per thread, whatever the model's size. A conversion that was
    interrupted, by a kill or a power failure as well, goes on after the last complete file when it
    is called again with the same arguments, and gives the same bytes.

    Args:
        source: as for `load`.
        directory: where; made if needed. It holds nothing that can be loaded before all is there.
        dtype: of embeddings and a float head: "float32", "bfloat16", "float16", or None for that
            of the source. Norms and biases keep theirs.
        shard_bytes: size at which a file ends and the next begins; what an interruption can cost.
        replace: whether another model in ``directory`` may be replaced.

    Raises:
        CheckpointError: the source is not as it should be (see `load`), a weight is not finite or
            not in ``dtype``, another model is in ``directory``, or it has too little room.
        ValueError: an argument cannot be, or the architecture has no form as a config.json.

    """
    if dtype is not None and dtype not in (known := [kind.name for kind in _FLOATS]):
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {dtype!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: expected at least 1, got {shard_bytes}")
    checkpoint = loading.describe(source)
    reader = checkpoint.reader
    try:
        loading.check(checkpoint)
        described = _config(checkpoint, dtype)
        parts = [
            (to.name, part, which.kind)
            for path, target in checkpoint.family.weight_map(checkpoint.config).items()
            for which in [checkpoint.sources[path]]
            for to, part in zip(target.parts, which.parts, strict=True)
        ]
        # Parts of one fused tensor are written as the tensor that they are.
        unique = {name: (part, kind) for name, part, kind in parts}
        total = sum(math.prod(part.stored_shape) for part, _ in unique.values())
        reused: list[Piece] = []
        with Pool(total, "converting") as pool:

            def skip(piece: Piece) -> None:
                reused.append(piece)
                pool.advance(max(math.prod(shape) for shape, _ in piece.tensors.values()))

            pieces = [
                _int8(reader, part, name, pool)
                if kind == "linear" or bitsandbytes.is_int8(reader, part.name)
                else _floats(reader, part, name, pool, dtype if kind != "vector" else None)
                for name, (part, kind) in unique.items()
            ]
            files = write_checkpoint(
                directory,
                pieces,
                saving.METADATA,
                shard_bytes,
                others=lambda folder: _write_others(checkpoint, described, folder),
                source=_identity(reader, described),
                replace=replace,
                reused=skip,
            )
        return Conversion(
            files,
            sum(path.stat().st_size for path in reader.files),
            sum(piece.nbytes for piece in pieces),
            sum(piece.nbytes for piece in reused),
        )
    finally:
        reader.close()


def _int8(reader: TensorReader, part: Part, name: str, pool: Pool) -> Piece:
    stored = bitsandbytes.is_int8(reader, part.name)
    scales = bitsandbytes.read_scale(reader, part.name) if stored else None

    def make(keep: Keep) -> None:
        def block(rows: slice) -> None:
            if scales is not None:
                matrix, scale = reader.read(part.name, rows), scales[rows]
            else:
                shape = (rows.stop - rows.start, *part.shape[1:])
                matrix, scale = np.empty(shape, np.int8), np.empty(shape[:1], np.float32)
                codes.quantize_rows(reader, part.name, rows, matrix, scale)
            keep(rows.start, part.arrange(matrix), part.arrange(scale))

        pool.run(part.stored_shape, block, part.unit)

    return bitsandbytes.piece(name, part.stored_shape, make)


def _floats(reader: TensorReader, part: Part, name: str, pool: Pool, dtype: str | None) -> Piece:
    found = reader.dtype(part.name)
    kind = jnp.dtype(dtype) if dtype else found if found in _FLOATS else np.dtype(np.float32)

    def fill(put: Put) -> None:
        def block(rows: slice) -> None:
            values = codes.read_floats(reader, part.name, rows, kind)
            put(name, rows.start, part.arrange(values))

        pool.run(part.stored_shape, block, part.unit)

    return Piece({name: (part.stored_shape, kind)}, fill)


def _config(checkpoint: loading.Checkpoint, dtype: str | None) -> dict[str, Any]:
    """What config.json will say: what it said, and what is int8."""
    described = checkpoint.family.config_to_hf(checkpoint.config)
    path = checkpoint.reader.path.parent / "config.json"
    if checkpoint.reader.path.suffix != ".gguf":
        described = read_json(path) | {"architectures": described["architectures"]}
        if dtype is not None:
            described |= {"dtype": dtype, "torch_dtype": dtype}
    kept = described.get("quantization_config") or {}
    head = checkpoint.sources.get(("lm_head", "weight"))
    quantization = saving.quantization_config(
        kept.get("llm_int8_threshold", 6.0),
        head is not None and bitsandbytes.is_int8(checkpoint.reader, head.names[0]),
    )
    return described | {"quantization_config": quantization}


def _write_others(checkpoint: loading.Checkpoint, described: dict[str, Any], folder: Path) -> None:
    saving.write_config(folder, described)
    if checkpoint.reader.path.suffix == ".gguf":
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save(folder)
        return
    for name in _KEPT:
        path = checkpoint.reader.path.parent / name
        if path.is_file():
            shutil.copyfile(path, folder / name)


def _identity(reader: TensorReader, described: dict[str, Any]) -> str:
    """What another source, or this one after a change, does not have in common with it."""
    stats = [(path.name, path.stat()) for path in reader.files]
    return json.dumps([described, [[name, s.st_size, s.st_mtime_ns] for name, s in stats]])
