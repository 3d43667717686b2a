"""Checkpoints: streaming readers of safetensors, GGUF and bitsandbytes int8, and a writer.

`open_checkpoint` is the one way in: whatever the format, it returns named tensors that are read one
by one or by rows (`TensorReader`). The surprising fact is what it refuses: pickled weights
(``pytorch_model.bin``) can run any code when they are loaded, so they are never opened.
"""

import os
from pathlib import Path

from jaxint8.checkpoint.base import CheckpointError as CheckpointError
from jaxint8.checkpoint.base import TensorReader as TensorReader
from jaxint8.checkpoint.gguf import GGUFFile, merge, shard_paths
from jaxint8.checkpoint.safetensors import (
    INDEX_NAME,
    SafetensorsFile,
    ShardedCheckpoint,
    open_index,
)
from jaxint8.checkpoint.writer import CHECKSUMS as CHECKSUMS
from jaxint8.checkpoint.writer import FILE_NAME
from jaxint8.checkpoint.writer import LazyTensor as LazyTensor
from jaxint8.checkpoint.writer import Piece as Piece
from jaxint8.checkpoint.writer import write_checkpoint as write_checkpoint
from jaxint8.checkpoint.writer import write_safetensors as write_safetensors

PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def open_checkpoint(path: str | os.PathLike[str]) -> TensorReader:
    """Opens a safetensors file, a safetensors index, a GGUF file, or a directory with one of them.

    In a directory ``model.safetensors`` comes before its index, and a single file of another name
    is accepted.

    Raises:
      CheckpointError: nothing readable is there, or it is broken; one line that names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_directory(path)
    elif not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.name.endswith(".safetensors.index.json"):
        return open_index(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if path.suffix in PICKLED:
        raise CheckpointError(_pickled(path))
    raise CheckpointError(f"{path}: expected a .safetensors or .gguf file or a directory")


def _in_directory(directory: Path) -> Path:
    for name in (FILE_NAME, INDEX_NAME):
        if (directory / name).is_file():
            return directory / name
    files = sorted(p for p in directory.iterdir() if p.is_file())
    for suffix in (".safetensors", ".gguf"):
        found = [p for p in files if p.suffix == suffix]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(p.name for p in found)
            raise CheckpointError(
                f"{directory}: several {suffix} files and no {INDEX_NAME}; name one of {names}"
            )
    for p in files:
        if p.suffix in PICKLED:
            raise CheckpointError(_pickled(p))
    raise CheckpointError(f"{directory}: holds no {FILE_NAME}, {INDEX_NAME} or .gguf file")


def _pickled(path: Path) -> str:
    return (
        f"{path}: pickled weights can run code when loaded and are not read; convert them once, "
        "where you trust them, with transformers: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors"
    )


def _open_gguf(path: Path) -> TensorReader:
    first = GGUFFile(path)
    paths = shard_paths(path, first.metadata)
    if len(paths) == 1:
        return first
    first.close()
    return ShardedCheckpoint(path, *merge(path, [GGUFFile(p) for p in paths]))
