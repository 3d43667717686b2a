"""Saves a model as a Hugging Face directory; int8 layers in the layout of bitsandbytes.

So what was converted once loads here again without the float weights, to the bit, and elsewhere as
any checkpoint that bitsandbytes has quantised. The surprising fact is what is not in it: outlier
rules, and whether logits or the cache are int8, belong to the run, not to the weights, so a saved
model can be loaded with another method.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxint8 import QuantizedMatrix, Threshold
from jaxint8.checkpoint import Piece, bitsandbytes, write_checkpoint
from jaxint8.checkpoint.writer import SHARD_BYTES
from jaxint8.models.families import FAMILIES, Part
from jaxint8.scheme_linear import SchemeMatrix

if TYPE_CHECKING:
    from jaxint8.models.language_model import LanguageModel

# What transformers wants to find in the header of every file.
METADATA = {"format": "pt"}


def save(
    model: LanguageModel, directory: str | os.PathLike[str], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes config.json, model.safetensors (or shards with an index) and the tokenizer.

    Weights are written tensor by tensor under the names that Hugging Face has for them, codes as
    bitsandbytes has them. An older model in ``directory`` is replaced.

    Args:
        model: what to save.
        directory: where; made if needed.
        shard_bytes: size at which a file ends and the next begins.

    Raises:
        ValueError: the architecture has no form as a config.json (see its family), or the weights
            are those of a scheme for comparisons.

    """
    family = next(f for f in FAMILIES if f.name == model.config.family)
    described = family.config_to_hf(model.config)
    if model.quantization is not None:
        rule = model.quantization.outliers
        described["quantization_config"] = quantization_config(
            float(rule.value) if isinstance(rule, Threshold) else 0.0
        )
    pieces: list[Piece] = []
    for path, source in family.weight_map(model.config).items():
        leaf: Any = model.params
        for key in path:
            leaf = leaf[key]
        if isinstance(leaf, SchemeMatrix):
            raise ValueError(
                f"save: the weights of {model.quantization} have no form in a checkpoint; "
                "save the float model, or one quantised by absmax"
            )
        start = 0
        for part in {part.name: part for part in source.parts}.values():
            rows = slice(start, start + part.stored_shape[0])
            pieces.append(_piece(leaf, part, rows))
            start = rows.stop

    def others(folder: Path) -> None:
        write_config(folder, described)
        if model.tokenizer is not None:
            model.tokenizer.save(folder)

    write_checkpoint(directory, pieces, METADATA, shard_bytes, others=others)


def _piece(leaf: QuantizedMatrix | jax.Array, part: Part, rows: slice) -> Piece:
    def stored(array: jax.Array) -> np.ndarray:
        return part.store(np.asarray(array[rows]))

    if isinstance(leaf, QuantizedMatrix):
        return bitsandbytes.piece(
            part.name,
            part.stored_shape,
            lambda keep: keep(0, stored(leaf.codes), stored(leaf.scale)),
        )
    return Piece(
        {part.name: (part.stored_shape, np.dtype(leaf.dtype))},
        lambda put: put(part.name, 0, stored(leaf)),
    )


def write_config(folder: Path, described: dict[str, Any]) -> None:
    """Writes config.json."""
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def quantization_config(threshold: float, int8_head: bool = False) -> dict[str, Any]:
    """What transformers reads; its threshold is the paper's rule, which others have no word for."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": threshold,
        "llm_int8_skip_modules": [] if int8_head else ["lm_head"],
    }
