"""What a model family is to the package: a translation of configs and tensor names, no more.

A loader walks ``weight_map(config)``: for every parameter of our tree it says which tensors of the
checkpoint make it up. The surprising fact is that one parameter can have several sources: q, k and
v (and gate and up) are one matrix here, their rows one below the other, which for int8 codes per
output channel changes no bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from jaxint8.models.config import DecoderConfig

# What sizes and ids become is int32.
_LARGEST = 2**31 - 1

# Where a parameter lives in the tree: ("layers", 3, "qkv", "weight") is
# params["layers"][3]["qkv"]["weight"].
Path = tuple[str | int, ...]


def deinterleave_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of each head from (pair, half) order into (half, pair) order.

    GGUF files of the llama architecture hold q and k with the two rows that one rotary angle turns
    next to each other; Hugging Face checkpoints, and this package, hold the first halves of all
    pairs and then the second.

    Args:
        rows: any dtype, ``[heads * head_dim, ...]``; also a bias of one axis.
        heads: number of heads the rows belong to.

    Returns:
        The same rows in the other order, same shape and dtype.

    """
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.swapaxes(split, 1, 2).reshape(rows.shape)


def fuse_rows(rows: np.ndarray, heads: int, count: int) -> np.ndarray:
    """Puts the rows of ``count`` parts, one part below the other, into the order of `Fused`."""
    split = rows.reshape(count, heads, rows.shape[0] // (count * heads), *rows.shape[1:])
    return np.swapaxes(split, 0, 1).reshape(rows.shape)


@dataclasses.dataclass(frozen=True)
class Fused:
    """Which rows of a tensor are a part's, where it holds ``count`` parts head by head.

    Of the rows of each of ``heads`` heads, the part's are those of turn ``index``.
    """

    heads: int
    count: int
    index: int


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint: its name, the shape it must have, the order of its rows.

    Or those rows of a fused tensor that are the parameter's.
    """

    name: str
    # As the decoder wants it, outermost axis first: [n, k] for a matrix.
    shape: tuple[int, ...]
    # Nonzero: rows are interleaved for rotary positions, in this many heads (see
    # deinterleave_rows).
    interleaved_heads: int = 0
    fused: Fused | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the checkpoint."""
        return (self.shape[0] * (self.fused.count if self.fused else 1), *self.shape[1:])

    def runs(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Yields what ``rows`` of the part are in the tensor, run by run: (tensor rows, part rows).

        Both are in the order of the checkpoint, which `arrange` changes where heads are
        interleaved.
        """
        if self.fused is None:
            yield rows, rows
            return
        size = self.shape[0] // self.fused.heads
        start = rows.start
        while start < rows.stop:
            head, place = divmod(start, size)
            stop = min(rows.stop, (head + 1) * size)
            first = (head * self.fused.count + self.fused.index) * size + place
            yield slice(first, first + stop - start), slice(start, stop)
            start = stop

    def take(self, stored: np.ndarray) -> np.ndarray:
        """Returns the part's rows of a whole tensor, of ``stored_shape`` (or its leading axis)."""
        if self.fused is None:
            return stored
        return np.concatenate([stored[run] for run, _ in self.runs(slice(0, self.shape[0]))])

    def store(self, rows: np.ndarray) -> np.ndarray:
        """Returns the whole tensor, from the rows of all its parts, one part below the other."""
        return fuse_rows(rows, self.fused.heads, self.fused.count) if self.fused else rows

    def arrange(self, stored: np.ndarray) -> np.ndarray:
        """Returns the rows in the decoder's order; ``stored`` holds whole heads, perhaps not all."""
        if not self.interleaved_heads:
            return stored
        return deinterleave_rows(stored, stored.shape[0] // self.unit)

    @property
    def unit(self) -> int:
        """Rows that `arrange` needs together: those of a head where they are interleaved."""
        return self.shape[0] // self.interleaved_heads if self.interleaved_heads else 1


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one parameter comes from: its parts are concatenated along axis 0, in order.

    Parts of one fused tensor are all of it, in the order of their turns.

    ``kind`` is its role: a "linear" matrix becomes int8 when quantising; "head" is the matrix that
    makes logits, which has a switch of its own; an "embedding" table and a "vector" (norm, bias)
    stay float.
    """

    parts: tuple[Part, ...]
    kind: Literal["linear", "head", "embedding", "vector"]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts, in order."""
        return tuple(part.name for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])


WeightMap = dict[Path, Source]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: which checkpoints are its, and how to read them."""

    name: str
    # Entries of "architectures" in a Hugging Face config.json, and its "model_type".
    architectures: tuple[str, ...]
    model_type: str
    # Hugging Face config.json -> ours. Raises ValueError for what the decoder cannot do.
    config_from_hf: Callable[[Mapping[str, Any]], DecoderConfig]
    # The way back, for saving: a config.json that config_from_hf reads as the same config.
    config_to_hf: Callable[[DecoderConfig], dict[str, Any]]
    # Tensor names of the Hugging Face checkpoint.
    weight_map: Callable[[DecoderConfig], WeightMap]
    # Some checkpoints were saved from the bare decoder: this prefix is missing from every name, or
    # from none.
    optional_prefix: str = ""
    # The same for GGUF: value of "general.architecture", metadata and names of the tensors ->
    # config, and names.
    gguf_architecture: str | None = None
    config_from_gguf: Callable[[Mapping[str, Any], Collection[str]], DecoderConfig] | None = None
    gguf_weight_map: Callable[[DecoderConfig], WeightMap] | None = None


def layer_sources(
    config: DecoderConfig,
    index: int,
    names: Mapping[str, tuple[str, ...]],
    interleaved: bool = False,
) -> WeightMap:
    """Sources of one layer.

    Args:
        config: the decoder.
        index: the layer's number.
        names: for every module of the layer, the checkpoint's module names (without ".weight" and
            ".bias") in the order in which their rows are stacked: "attention_norm", "qkv" (three),
            "out", "mlp_norm", "up" (gate and up when gated, else one), "down". Where q, k and v
            have one name, the tensor holds them head by head (`Fused`).
        interleaved: whether q and k are stored interleaved.

    Returns:
        Map from parameter path to source.

    """
    q, kv = config.query_size, config.key_value_size
    hidden, mlp = config.hidden_size, config.mlp_size
    turned = (config.heads, config.kv_heads, 0) if interleaved else (0, 0, 0)
    linears = {
        # module: (rows of each part, k, has bias, interleaved heads of each part)
        "qkv": ((q, kv, kv), hidden, config.qkv_bias, turned),
        "out": ((hidden,), q, config.out_bias, (0,)),
        "up": ((mlp,) * (1 + config.gated), hidden, config.mlp_bias, (0,) * (1 + config.gated)),
        "down": ((hidden,), mlp, config.mlp_bias, (0,)),
    }
    sources: WeightMap = {}
    for module, (rows, k, bias, heads) in linears.items():
        stems = names[module]
        whole = len(stems) > 1 == len(set(stems))
        order = [
            (stem, n, turns, Fused(config.heads, len(stems), i) if whole else None)
            for i, (stem, n, turns) in enumerate(zip(stems, rows, heads, strict=True))
        ]
        path = ("layers", index, module)
        sources[(*path, "weight")] = Source(
            tuple(Part(f"{s}.weight", (n, k), h, f) for s, n, h, f in order), "linear"
        )
        if bias:
            sources[(*path, "bias")] = Source(
                tuple(Part(f"{s}.bias", (n,), h, f) for s, n, h, f in order), "vector"
            )
    for module in ("attention_norm", "mlp_norm"):
        sources |= norm_sources(config, ("layers", index, module), names[module][0])
    return sources


def norm_sources(config: DecoderConfig, path: Path, stem: str) -> WeightMap:
    """Sources of one norm: a weight, for a layer norm also a bias; none when not affine."""
    if not config.norm_affine:
        return {}
    leaves = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return {
        (*path, leaf): Source((Part(f"{stem}.{leaf}", (config.hidden_size,)),), "vector")
        for leaf in leaves
    }


def table_source(
    name: str, rows: int, columns: int, kind: Literal["linear", "head", "embedding"]
) -> Source:
    """A source of one unfused matrix ``[rows, columns]``."""
    return Source((Part(name, (rows, columns)),), kind)


def required(config: Mapping[str, Any], *keys: str) -> Any:
    """Returns the value of the first key that has one, or raises a ValueError that names them."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise ValueError(f"model config: {' or '.join(map(repr, keys))} is missing")


def size(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """Returns a size, under the first key that has a value; the default if there is one, and no key.

    Raises:
        ValueError: there is none, or it is no integer (2.0 is none, and neither is true) of at
            least 1 that int32 holds; the message names the key.

    """
    if default is not None and not any(key in config for key in keys):
        return default
    value = required(config, *keys)
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(
            f"model config: {' or '.join(map(repr, keys))}: expected an integer from 1 to "
            f"{_LARGEST}, got {value!r}"
        )
    return value


def size_or_null(config: Mapping[str, Any], key: str, default: int) -> int:
    """Returns what `size` does where null, too, means the default."""
    return default if config.get(key) is None else size(config, key)


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Returns a number; the default if there is one, and no such key.

    Raises:
        ValueError: there is none, or it is no number (text is none); the message names the key.

    """
    if default is not None and key not in config:
        return default
    value = required(config, key)
    if type(value) not in (int, float):
        raise ValueError(f"model config: {key!r}: expected a number, got {value!r}")
    return float(value)


def token_ids(config: DecoderConfig) -> dict[str, Any]:
    """Returns "bos_token_id" and "eos_token_id" as a config.json has them; see `end_tokens`."""
    end = config.end_tokens
    return {
        "bos_token_id": config.start_token,
        "eos_token_id": list(end) if len(end) > 1 else end[0] if end else None,
    }


def start_token(value: Any) -> int | None:
    """Reads "bos_token_id", which is absent or an id.

    Raises:
        ValueError: it is something else.

    """
    if value is not None and not _is_token_id(value):
        raise ValueError(f"'bos_token_id': expected an id, which int32 holds, got {value!r}")
    return value


def end_tokens(value: Any) -> tuple[int, ...]:
    """Reads "eos_token_id", which is absent, an id or a list of ids.

    Raises:
        ValueError: it is something else.

    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(_is_token_id, ids)):
        raise ValueError(
            f"'eos_token_id': expected an id or a list of ids, which int32 holds, got {value!r}"
        )
    return tuple(ids)


def _is_token_id(value: Any) -> bool:
    # Some files say -1 for none.
    return type(value) is int and -_LARGEST <= value <= _LARGEST
