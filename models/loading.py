"""Loads a model: checkpoint in, `LanguageModel` out, converted to int8 while it is read.

First everything but the weights is read and held against what the architecture needs, so that a
checkpoint that does not fit is refused in milliseconds, with a list of all that is wrong. The
surprising fact is how little a tensor's name can be trusted: the same model is saved with and
without a prefix, with its tied head once or twice, with buffers that nobody reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxint8 import QuantizedMatrix, download
from jaxint8.checkpoint import CheckpointError, TensorReader, bitsandbytes, open_checkpoint
from jaxint8.models import families, reading
from jaxint8.models.config import DecoderConfig, QuantizationConfig, as_quantization
from jaxint8.models.families import Family, Part, Source, WeightMap
from jaxint8.models.families.base import end_tokens
from jaxint8.models.language_model import LanguageModel
from jaxint8.models.placement import Placement
from jaxint8.models.tokenizer import TOKENIZER_FILES, Tokenizer, read_json
from jaxint8.schemes import Scheme

# Methods of the evaluation that leave the weights float, in that precision.
FLOAT_METHODS = ("float32", "bfloat16")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_HEAD = "lm_head.weight"
_HUB_FILES = ("*.json", "*.safetensors", "merges.txt")
# Buffers that some versions of transformers saved beside the weights.
_IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)")


def load(
    source: str | os.PathLike[str],
    *,
    quantization: QuantizationConfig | str | None = "llm_int8",
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> LanguageModel:
    """Loads a decoder, and converts its linear layers to int8 on the way.

    Args:
        source: a directory as Hugging Face lays it out (config.json, model.safetensors or shards
            with an index, tokenizer.json), a ``.gguf`` file, "demo" for SmolLM2-135M-Instruct
            (downloaded once), or the id of a model on the Hugging Face hub, "owner/name" or
            "owner/name@revision", if huggingface_hub is installed (the extra ``hub``). Linear
            layers that bitsandbytes has saved as int8 keep their codes.
        quantization: a QuantizationConfig, the name of one ("llm_int8", "relative", "topk" and all
            of `jaxint8.schemes.SCHEMES`, with options: "topk:16", "topk:kv_int8"), or None for float weights;
            "float32" and "bfloat16" mean None in that dtype, unless ``dtype`` says another.
        dtype: of the float weights and of activations: float32 or bfloat16. None is bfloat16 on
            accelerators and float32 on a CPU, where bfloat16 is slower. Norms and biases are always
            float32.
        mesh: the devices to put it on, with axes "data" and "model" (or one of them); None is the
            default device. Sequences are split over "data", weights over "model"; each process reads
            and converts what its own devices hold, tensor by tensor (of layers split along their
            inputs it reads whole rows, whose scales it needs).

    Raises:
        CheckpointError: the files are missing, broken or do not fit together; a weight is not
            finite; the tokenizer is of an unknown kind. One line that names the file.
        ValueError, TypeError: an argument cannot be (a scheme whose weights are not int8 by rows, of a checkpoint that
            is int8, too), or the architecture is not known.
        DownloadError: the demo model is not cached and cannot be fetched.

    """
    if isinstance(quantization, str) and quantization in FLOAT_METHODS:
        quantization, dtype = None, dtype or quantization
    method = as_quantization(quantization)
    chosen = _dtype(dtype)
    checkpoint = describe(source)
    placement = None if mesh is None else Placement.of(checkpoint.config, mesh, method)
    if placement is not None and method is not None and not method.native:
        raise ValueError(
            "quantization: what no kernel carries out (zeropoint, activations of one scale or in floats, float weights "
            "of outliers) runs on one device only, without a mesh"
        )
    check(checkpoint)
    if method is not None and method.stored != Scheme().stored:
        _refuse_codes(checkpoint, method)
    params = _read(checkpoint, method, chosen, placement)
    checkpoint.reader.close()
    return LanguageModel(
        checkpoint.config,
        params,
        tokenizer=checkpoint.tokenizer,
        quantization=method,
        placement=placement,
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself; no weight has been read yet.

    Attributes:
        reader: its tensors.
        family: the architecture.
        config: its sizes.
        sources: where every parameter comes from.
        tokenizer: None when the checkpoint has no tokenizer files at all.

    """

    reader: TensorReader
    family: Family
    config: DecoderConfig
    sources: WeightMap
    tokenizer: Tokenizer | None


def describe(source: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint and reads all but its weights; see `load` for ``source`` and errors."""
    reader = open_checkpoint(_resolve(source))
    try:
        if reader.path.suffix == ".gguf":
            return _describe_gguf(reader)
        return _describe_hf(reader)
    except BaseException:
        reader.close()
        raise


def _resolve(source: str | os.PathLike[str]) -> Path:
    """Returns the file or directory that ``source`` means, downloading if needed."""
    if source == "":
        raise ValueError("source: expected a path or a name, got an empty string")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source: expected a path or a name, got {type(source).__name__}")
    path = Path(source)
    if path.exists():
        return path
    if str(source) == "demo":
        return download.demo_model_path()
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source}: no such file or directory, and neither 'demo' nor the id of a model "
            "on the hub ('owner/name')"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{source}: no such file or directory; to fetch it from the Hugging Face hub, "
            "install huggingface_hub (pip install 'jaxint8[hub]')"
        ) from None
    name, _, revision = source.partition("@")
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(_HUB_FILES)
        )
    except Exception as error:  # the library has a dozen kinds, of requests and of its own
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source}: cannot be fetched from the hub: {reason}") from None
    if not any(Path(found).glob("*.safetensors")):
        raise CheckpointError(
            f"{source}: this revision holds no safetensors, and pickled weights are not read; "
            f"name one that does, often the conversion bot's pull request: {name}@refs/pr/NUMBER"
        )
    return Path(found)


def _describe_gguf(reader: TensorReader) -> Checkpoint:
    with config_errors(reader.path):
        family = families.family_from_gguf(reader.metadata)
        assert family.config_from_gguf is not None
        assert family.gguf_weight_map is not None
        config = family.config_from_gguf(reader.metadata, reader.names())
    tokenizer = None
    if "tokenizer.ggml.model" in reader.metadata:
        tokenizer = Tokenizer.from_gguf(reader.metadata, reader.path)
        config = _with_end_tokens(config, tokenizer.end_tokens)
    return Checkpoint(reader, family, config, family.gguf_weight_map(config), tokenizer)


def _describe_hf(reader: TensorReader) -> Checkpoint:
    directory = reader.path.parent
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; it says what the tensors are")
    described = read_json(path)
    kept = described.get("quantization_config") or {}
    if not isinstance(kept, dict):
        raise CheckpointError(f"{path}: 'quantization_config': expected an object, got {kept!r}")
    if kept and not kept.get("load_in_8bit"):
        kind = kept.get("quant_method", "an unknown method")
        raise CheckpointError(
            f"{path}: the weights are quantised with {kind}; "
            "float weights and bitsandbytes int8 can be read"
        )
    with config_errors(path):
        family = families.family_from_hf(described)
        config = family.config_from_hf(described)
    path = directory / "generation_config.json"
    with config_errors(path):
        more = end_tokens(read_json(path).get("eos_token_id"))
    config = _with_end_tokens(config, more)
    sources = family.weight_map(config)
    prefix = family.optional_prefix
    if prefix and not any(name.startswith(prefix) for name in reader.names()):
        sources = {
            path: _renamed(source, lambda name: name.removeprefix(prefix))
            for path, source in sources.items()
        }
    if config.tied_embeddings:
        sources = _with_tied_head(sources, reader)
    has_tokenizer = any((directory / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = Tokenizer.from_directory(directory) if has_tokenizer else None
    return Checkpoint(reader, family, config, sources, tokenizer)


@contextlib.contextmanager
def config_errors(path: Path) -> Iterator[None]:
    """Within, what a config holds makes CheckpointErrors only, which name the file.

    Families check what they read, by key. What they missed is the file's fault all the same, for
    nothing but its values goes in.
    """
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: not a config as expected ({type(error).__name__}: {error})"
        ) from None


def _with_end_tokens(config: DecoderConfig, more: tuple[int, ...]) -> DecoderConfig:
    return dataclasses.replace(config, end_tokens=tuple(dict.fromkeys(config.end_tokens + more)))


def _with_tied_head(sources: WeightMap, reader: TensorReader) -> WeightMap:
    """Of a matrix with two names, some converters keep the head's instead of the embedding's."""
    names = set(reader.names())
    embedding = sources["embedding",]
    if _HEAD in names and not names.issuperset(embedding.names):
        return {**sources, ("embedding",): _renamed(embedding, lambda _: _HEAD)}
    return sources


def _renamed(source: Source, rename: Callable[[str], str]) -> Source:
    parts = tuple(dataclasses.replace(part, name=rename(part.name)) for part in source.parts)
    return dataclasses.replace(source, parts=parts)


def _dtype(dtype: DTypeLike | None) -> np.dtype[Any]:
    if dtype is None:
        return np.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    known = [np.dtype(np.float32), np.dtype(jnp.bfloat16)]
    try:
        return known[known.index(np.dtype(jnp.dtype(dtype)))]
    except (TypeError, ValueError):
        raise ValueError(f"dtype: expected float32 or bfloat16, got {dtype!r}") from None


# Checking


def check(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError, listing what is wrong, unless the tensors are just those expected."""
    reader, config = checkpoint.reader, checkpoint.config
    names = set(reader.names())
    problems: dict[str, list[str]] = {"missing": [], "of a wrong shape or dtype": []}
    used: set[str] = set()
    for source in checkpoint.sources.values():
        for part in source.parts:
            used.add(part.name)
            if part.name not in names:
                problems["missing"].append(part.name)
            elif not _fits(reader, part, source):
                problems["of a wrong shape or dtype"].append(
                    f"{part.name} (expected {list(part.stored_shape)}, "
                    f"got {reader.dtype(part.name)}{list(reader.shape(part.name))})"
                )
    used |= {bitsandbytes.companion(name, x) for name in used for x in bitsandbytes.SUFFIXES}
    if config.tied_embeddings:
        used.add(_HEAD)  # the same as the embedding, saved once more
    problems["not known"] = sorted(n for n in names - used if not _IGNORED.fullmatch(n))
    found = [f"{what}: {_some(which)}" for what, which in problems.items() if which]
    if found:
        raise CheckpointError(
            f"{reader.path}: the tensors are not those of a {config.family} model of "
            f"{config.layers} layers; {'; '.join(found)}"
        )


def _refuse_codes(checkpoint: Checkpoint, method: QuantizationConfig) -> None:
    """Raises ValueError where a layer is int8 already and not as the method wants it: codes are not made again."""
    reader = checkpoint.reader
    one_scale = (method.numbers, method.outlier_weights) == ("absmax", "int8")
    for source in checkpoint.sources.values():
        for part in source.parts:
            if source.kind == "linear" and bitsandbytes.is_int8(reader, part.name):
                # What was saved by such a method has one scale in all rows.
                if one_scale and len(np.unique(bitsandbytes.read_scale(reader, part.name))) <= 1:
                    continue
                reader.close()
                raise ValueError(
                    f"quantization: this scheme is made of float weights, and {part.name} of {reader.path} is int8"
                )


def _fits(reader: TensorReader, part: Part, source: Source) -> bool:
    if reader.shape(part.name) != part.stored_shape:
        return False
    if source.kind in ("linear", "head") and bitsandbytes.is_int8(reader, part.name):
        return True
    return jnp.issubdtype(reader.dtype(part.name), jnp.floating)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# Reading


def _read(
    checkpoint: Checkpoint,
    method: QuantizationConfig | None,
    dtype: np.dtype[Any],
    placement: Placement | None,
) -> dict[str, Any]:
    """Returns the tree of parameters."""
    sources = checkpoint.sources
    if method is not None and method.lm_head == "int8":
        sources = _with_int8_head(sources, checkpoint.config)
    params: dict[str, Any] = {"layers": [{} for _ in range(checkpoint.config.layers)]}
    with reading.Pool(sum(math.prod(source.shape) for source in sources.values())) as pool:
        for path, source in sources.items():
            targets = _targets(path, source, placement)
            held, pick = list(targets.values()), functools.partial(zip, targets, strict=True)
            if method is not None and source.kind == "linear":
                if (method.numbers, method.outlier_weights) == ("absmax", "int8"):
                    per_tensor = method.weights == "tensor"
                    made = reading.int8_matrices(checkpoint.reader, source, held, pool, per_tensor)
                    matrices, scales = zip(*made, strict=True)
                    value: Any = QuantizedMatrix(
                        _put((*path, "codes"), dict(pick(matrices)), placement),
                        _put((*path, "scale"), dict(pick(scales)), placement),
                    )
                else:
                    value = reading.scheme_matrix(checkpoint.reader, source, pool, method)
            else:
                kept = np.dtype(np.float32) if source.kind == "vector" else dtype
                arrays = reading.float_arrays(checkpoint.reader, source, held, pool, kept)
                value = _put(path, dict(pick(arrays)), placement)
            node: Any = params
            for key in path[:-1]:
                node = node[key] if isinstance(key, int) else node.setdefault(key, {})
            # Waiting keeps at most one host copy alive beside what a device has.
            node[path[-1]] = jax.block_until_ready(value)
    return params


def _targets(
    path: families.Path, source: Source, placement: Placement | None
) -> dict[int, reading.Target]:
    """What is to be made of a parameter, by place along "model"; one target if all hold the same."""
    axis = None if placement is None else placement.axis(path)
    if placement is None or axis is None:
        return {0: reading.whole(source)}
    shape = placement.size(path, source.shape)
    return {at: reading.Target(shape, placement.pieces(path, at), axis) for at in placement.held}


def _put(
    path: families.Path, shards: dict[int, np.ndarray], placement: Placement | None
) -> jax.Array:
    return jax.device_put(shards[0]) if placement is None else placement.put(path, shards)


def _with_int8_head(sources: WeightMap, config: DecoderConfig) -> WeightMap:
    """Reads the head, or the embedding that is the head too, a second time, as codes."""
    head = sources["embedding",] if config.tied_embeddings else sources["lm_head", "weight"]
    return {**sources, ("int8_head", "weight"): dataclasses.replace(head, kind="linear")}
