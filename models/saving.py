"""Saves a model as a Hugging Face directory; int8 layers in the layout of bitsandbytes.

So what was converted once loads here again without the float weights, to the bit, and elsewhere as
any checkpoint that bitsandbytes has quantised. The surprising fact is what is not in it: outlier
rules belong to the run, not to the weights, so a saved model can be loaded with another method.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxint8 import QuantizedMatrix, Threshold
from jaxint8.checkpoint import bitsandbytes, write_checkpoint
from jaxint8.models.families import FAMILIES, Part

if TYPE_CHECKING:
    from jaxint8.models.language_model import LanguageModel


class _Later:
    """A tensor that comes to the host when the writer gets to it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, make: Callable[[], Any]) -> None:
        self.shape, self.dtype, self._make = shape, dtype, make

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._make())


def save(
    model: LanguageModel, directory: str | os.PathLike[str], shard_bytes: int = 5_000_000_000
) -> None:
    """Writes config.json, model.safetensors (or shards with an index) and the tokenizer.

    Weights are written tensor by tensor under the names that Hugging Face has for them, codes as
    bitsandbytes has them. An older model in ``directory`` is replaced.

    Args:
        model: what to save.
        directory: where; made if needed.
        shard_bytes: size at which a file ends and the next begins.

    Raises:
        ValueError: the architecture has no form as a config.json (see its family).

    """
    directory = Path(directory)
    family = next(f for f in FAMILIES if f.name == model.config.family)
    described = family.config_to_hf(model.config)
    if model.quantization is not None:
        described["quantization_config"] = _quantization(model)
    tensors: dict[str, _Later] = {}
    for path, source in family.weight_map(model.config).items():
        leaf: Any = model.params
        for key in path:
            leaf = leaf[key]
        start = 0
        for part in {part.name: part for part in source.parts}.values():
            rows = slice(start, start + part.stored_shape[0])
            tensors |= _tensors(leaf, part, rows)
            start = rows.stop
    write_checkpoint(directory, tensors, {"format": "pt"}, shard_bytes)
    if model.tokenizer is not None:
        model.tokenizer.save(directory)
    partial = directory / ".partial-config.json"
    partial.write_text(json.dumps(described, indent=2) + "\n")
    partial.replace(directory / "config.json")


def _tensors(leaf: QuantizedMatrix | jax.Array, part: Part, rows: slice) -> dict[str, _Later]:
    shape = part.stored_shape

    def stored(array: jax.Array) -> np.ndarray:
        return part.store(np.asarray(array[rows]))

    if not isinstance(leaf, QuantizedMatrix):
        return {part.name: _Later(shape, leaf.dtype, lambda: stored(leaf))}
    scale, layout = (bitsandbytes.companion(part.name, x) for x in bitsandbytes.SUFFIXES)
    return {
        part.name: _Later(shape, np.int8, lambda: stored(leaf.codes)),
        scale: _Later(shape[:1], np.float32, lambda: bitsandbytes.absmax_of(stored(leaf.scale))),
        layout: _Later((), np.uint8, lambda: np.array(bitsandbytes.ROW_MAJOR, np.uint8)),
    }


def _quantization(model: LanguageModel) -> dict[str, Any]:
    """What transformers reads; its threshold is the paper's rule, which others have no word for."""
    rule = model.quantization.outliers if model.quantization is not None else None
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": float(rule.value) if isinstance(rule, Threshold) else 0.0,
        "llm_int8_skip_modules": ["lm_head"],
    }
