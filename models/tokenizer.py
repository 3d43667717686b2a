"""Text to token ids and back: one class over the `tokenizers` library, from any checkpoint's files.

Hugging Face directories bring a ``tokenizer.json`` (or ``vocab.json`` with ``merges.txt``); a GGUF
file holds a vocabulary and the *name* of how text is cut before it is merged, so the cutting rules
are written down here. The surprising fact is how much that name matters: SmolLM2 splits numbers
into single digits before the byte-level rule, and a conversion that forgets it gives other tokens.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jaxint8.checkpoint import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")

# GGUF's token types.
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_META = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"

# How Llama 3 cuts text: contractions, words, up to three digits, punctuation, line ends, spaces.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Between text and token ids.

    Attributes:
        vocab_size: number of ids, added tokens included.
        start_token: id that a text starts with, if the model knows one.
        end_tokens: ids that end a text.

    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        start_token: int | None = None,
        end_tokens: Iterable[int] = (),
    ) -> None:
        """Takes a tokenizer of the library; truncation and padding that it may carry are removed."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.start_token = start_token
        self.end_tokens = tuple(end_tokens)
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Reads ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``, of a checkpoint.

        Raises:
            CheckpointError: there are no such files, or they are broken.

        """
        return _from_directory(Path(directory))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: str | Path = "GGUF") -> Tokenizer:
        """Builds the tokenizer that the ``tokenizer.ggml.*`` metadata of a GGUF file describe.

        Args:
            metadata: keys and values of the file.
            path: the file, for messages.

        Raises:
            CheckpointError: metadata are missing, or name a kind that is not supported.

        """
        return _from_gguf(metadata, path)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of ``text``.

        Args:
            text: any string; names of special tokens in it become those tokens.
            add_special_tokens: whether to add what the model wants around a text, such as a start
                token. False for measuring perplexity.

        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Returns the ids of each text, see `encode`."""
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"text: expected a string, got {type(text).__name__}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text: not Unicode (a lone surrogate at {error.start})") from None
        found = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def decode(self, tokens: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(t) for t in tokens], skip_special_tokens)

    def decode_batch(
        self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """Returns the text of each row, see `decode`."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yields text while tokens come; put together it is `decode` of all of them.

        A character whose bytes are spread over several tokens is held back until it is whole. Cost
        per token does not grow with the length of the text.
        """
        context: list[int] = []  # shown last; what follows may depend on it (a leading space)
        pending: list[int] = []
        shown = ""  # the text of the context
        for token in map(int, tokens):
            if token in self._special:
                continue
            pending.append(token)
            text = self.decode(context + pending)
            if len(text) > len(shown) and not text.endswith(_INCOMPLETE):
                yield text[len(shown) :]
                context, pending = pending, []
                shown = self.decode(context)
        rest = self.decode(context + pending)[len(shown) :]
        if rest:
            yield rest

    def save(self, directory: str | Path) -> None:
        """Writes ``tokenizer.json`` and a ``tokenizer_config.json`` with the special tokens."""
        directory = Path(directory)
        names = {"bos_token": self.start_token, "eos_token": next(iter(self.end_tokens), None)}
        config = {k: self._backend.id_to_token(v) for k, v in names.items() if v is not None}
        for name, text in (
            ("tokenizer.json", self._backend.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(config, indent=2)),
        ):
            partial = directory / f".partial-{name}"
            partial.write_text(text, encoding="utf-8")
            partial.replace(directory / name)


# Hugging Face directories


def _from_directory(directory: Path) -> Tokenizer:
    path = directory / "tokenizer_config.json"
    config = read_json(path)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: _content(config, name, path) for name in names}
    if (directory / "tokenizer.json").is_file():
        path = directory / "tokenizer.json"
        with _library_errors(f"{path}: not a tokenizer"):
            backend = tokenizers.Tokenizer.from_file(str(path))
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        backend = _gpt2_files(directory, config, special)
    else:
        held = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
        raise CheckpointError(
            f"{directory}: holds no tokenizer.json, and no vocab.json with merges.txt"
            + (f" ({held[0]} alone is not enough)" if held else "")
        )
    ids = {}
    for key in ("bos_token", "eos_token"):
        content = special[key]
        ids[key] = None if content is None else backend.token_to_id(content)
    end = () if ids["eos_token"] is None else (ids["eos_token"],)
    return Tokenizer(backend, ids["bos_token"], end)


def _gpt2_files(
    directory: Path, config: Mapping[str, Any], special: Mapping[str, str | None]
) -> tokenizers.Tokenizer:
    """GPT-2's two files, as OPT has them."""
    with _library_errors(f"{directory}: vocab.json and merges.txt"):
        vocab, merges = models.BPE.read_file(
            str(directory / "vocab.json"), str(directory / "merges.txt")
        )
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    prefix = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    for content in special.values():
        if content is not None and content in vocab:
            backend.add_special_tokens([content])
    start = special["bos_token"]
    if config.get("add_bos_token") and start is not None:
        backend.post_processor = _template(backend, start, None)
    return backend


def _content(config: Mapping[str, Any], name: str, path: Path) -> str | None:
    """A special token in a tokenizer_config.json is null, a string, or an object that holds it."""
    token = config.get(name)
    content = token.get("content") if isinstance(token, Mapping) else token
    if content is not None and not isinstance(content, str):
        raise CheckpointError(f"{path}: {name!r}: expected a token's text, got {token!r}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, empty if there is no such file.

    Raises:
        CheckpointError: it is not a JSON object.

    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Within, whatever the tokenizers library raises becomes a CheckpointError that starts with ``what``."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        # Bare Exceptions, and the panics of its Rust, which are none and whose class has no public name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what} ({_one_line(error)})") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# GGUF


def _from_gguf(metadata: Mapping[str, Any], path: str | Path) -> Tokenizer:
    def need(key: str) -> Any:
        if f"tokenizer.ggml.{key}" not in metadata:
            raise CheckpointError(f"{path}: metadata 'tokenizer.ggml.{key}' is missing")
        return metadata[f"tokenizer.ggml.{key}"]

    def listed(key: str, *types: type, default: list[Any] | None = None) -> list[Any]:
        """An array whose items have one of the types."""
        values = need(key) if default is None else metadata.get(f"tokenizer.ggml.{key}") or default
        if not isinstance(values, list) or not all(type(value) in types for value in values):
            names = " or ".join(known.__name__ for known in types)
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{key}: expected an array of {names}, got {repr(values)[:80]}"
            )
        return values

    kind, tokens = need("model"), listed("tokens", str)
    types = listed("token_type", int, default=[1] * len(tokens))
    scores = listed("scores", float, int, default=[0.0] * len(tokens))
    for name, values in (("token types", types), ("scores", scores)):
        if len(values) != len(tokens):
            raise CheckpointError(f"{path}: {len(tokens)} tokens but {len(values)} {name}")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens holds a token twice")
    with _library_errors(f"{path}: tokenizer"):
        if kind == "gpt2":
            backend, starts = _byte_level(tokens, listed("merges", str), need("pre"), path)
        elif kind == "llama":
            space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
            backend, starts = _sentencepiece(tokens, scores, types, space), True
        else:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.model {kind!r} is not supported; known: gpt2, llama"
            )
        for token, what in zip(tokens, types, strict=True):
            if what in (_CONTROL, _USER_DEFINED):
                added = AddedToken(token, special=what == _CONTROL, normalized=False)
                backend.add_tokens([added]) if what == _USER_DEFINED else (
                    backend.add_special_tokens([added])
                )
    ids: dict[str, Any] = {
        x: metadata.get(f"tokenizer.ggml.{x}_token_id") for x in ("bos", "eos", "eot")
    }
    for name, value in ids.items():
        if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
            raise CheckpointError(f"{path}: {name}_token_id {value!r} of {len(tokens)} tokens")
    around = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", starts),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    first, last = (
        tokens[ids[x]] if wanted and ids[x] is not None else None for x, wanted in around.items()
    )
    if first is not None or last is not None:
        backend.post_processor = _template(backend, first, last)
    end = [i for i in (ids["eos"], ids["eot"]) if i is not None]
    return Tokenizer(backend, ids["bos"], dict.fromkeys(end))


def _byte_level(
    tokens: list[str], merges: list[str], pre: str, path: str | Path
) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE; ``pre`` names how text is cut first. Also says whether a start is usual."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    cut = {
        "gpt-2": [whole],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), whole],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if not isinstance(pre, str) or pre not in cut:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre {pre!r} is not supported; known: {', '.join(cut)}"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left or not right or not vocab.keys() >= {left, right, left + right}:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.merges: {merge!r} is not a pair of tokens that make one"
            )
        pairs.append((left, right))
    model = models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(cut[pre])
    backend.decoder = decoders.ByteLevel()
    return backend, pre == "llama-bpe"


def _sentencepiece(
    tokens: list[str], scores: list[float], types: list[int], space_prefix: bool
) -> tokenizers.Tokenizer:
    """SentencePiece BPE: a pair may be merged if the result is a token; the best score goes first.

    Characters that are no token fall back to bytes (``<0xE2>``).
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    found = []
    for i, token in enumerate(tokens):
        if types[i] in (_CONTROL, _USER_DEFINED, _BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[i], vocab[left], vocab[right]))
    found.sort()
    merges = [(tokens[left], tokens[right]) for _, left, right in found]
    unknown = next((tokens[i] for i, what in enumerate(types) if what == 2), None)
    model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    # SentencePiece puts a space before every text, also one that starts with a space.
    prefix = [normalizers.Prepend(_META)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _META)])
    steps: list[Any] = [decoders.Replace(_META, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _template(backend: tokenizers.Tokenizer, first: str | None, last: str | None) -> Any:
    """What puts a start token before, or an end token behind, every text."""
    parts = [*([first] if first else []), "$A", *([last] if last else [])]
    special = [(t, backend.token_to_id(t)) for t in dict.fromkeys((first, last)) if t is not None]
    return processors.TemplateProcessing(single=parts, special_tokens=special)
