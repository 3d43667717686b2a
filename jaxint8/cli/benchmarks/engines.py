"""Language models that continue prompts under the clock: ours, under several methods.

An engine takes token ids and times two things: until the first new token is there (prefill), and
all the others (decoding). The surprising fact: end tokens are taken away, else a model that likes
to stop would be timed on nothing.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxint8.cli.methods import METHODS
from jaxint8.evaluation import datasets
from jaxint8.evaluation.benchmark.machine import Work
from jaxint8.models import LanguageModel, QuantizationConfig, load
from jaxint8.models.cache import is_coded
from jaxint8.models.generate import CHUNK, stream_tokens

INT8_HEAD = "relative, int8 head"
INT8_CACHE = "relative, int8 head and cache"
OURS = ("float32", "llm_int8", "relative", INT8_HEAD, INT8_CACHE)
"""Names of our engines: methods of the command lines, and one with its logits, and its cache, in int8 as well."""

_MORE: dict[str, dict[str, Any]] = {
    INT8_HEAD: {"lm_head": "int8"},
    INT8_CACHE: {"lm_head": "int8", "kv_cache": "int8"},
}


class Times(NamedTuple):
    """Seconds: until the first new token of each row, and from there to the last."""

    first: float
    rest: float


class Engine(Protocol):
    """What can be timed."""

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that the making of one token cannot but read."""
        ...

    def __call__(self, prompts: Sequence[Sequence[int]], new: int) -> Times:
        """Continues each prompt (all of the same length) by `new` tokens, greedily."""
        ...


@dataclasses.dataclass(frozen=True)
class Ours:
    """A model of ours as an engine."""

    model: LanguageModel

    @property
    def step_bytes(self) -> int:
        """Of the layers and the head; a table that tokens are only looked up in is hardly read."""
        params = self.model.params
        return _bytes(params["layers"]) + _bytes(_head(self.model))

    def work(self, tokens: int) -> Work:
        """What so many tokens of one prompt cannot avoid: products with weights, head once."""
        matrices = [leaf for leaf in jax.tree.leaves(self.model.params["layers"]) if leaf.ndim == 2]
        weights = sum(math.prod(matrix.shape) for matrix in matrices)
        head = self.model.config.vocab_size * self.model.config.embedding_size
        return Work(self.step_bytes, tokens * weights + head)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of so many tokens."""
        config = self.model.config
        vector = config.head_dim * self.model.params["embedding"].dtype.itemsize
        if is_coded(self.model.quantization):  # a byte each, and a scale
            vector = config.head_dim + 4
        return 2 * config.layers * config.kv_heads * tokens * vector

    def __call__(self, prompts: Sequence[Sequence[int]], new: int) -> Times:
        """Continues each prompt; see `Engine`."""
        steps = stream_tokens(
            dataclasses.replace(self.model.config, end_tokens=()),
            self.model.params,
            prompts,
            new,
            quantization=self.model.quantization,
            chunk=min(CHUNK, max(1, new - 1)),
        )
        start = time.perf_counter()
        next(steps)
        first = time.perf_counter()
        for _ in steps:
            pass
        return Times(first - start, time.perf_counter() - first)


def load_ours(source: str, names: Iterable[str] = OURS) -> dict[str, Ours]:
    """Loads a model once in float32 and once in int8, as far as the engines `names` need it.

    Raises:
      ValueError, OSError: the model cannot be loaded.
    """
    names = list(names)
    engines = {}
    if "float32" in names:
        engines["float32"] = Ours(load(source, quantization="float32"))
    methods = [name for name in names if name != "float32"]
    if methods:
        how = {name: _quantization(name) for name in methods}
        # Every int8 method has the same weights, but for the head.
        most = next((name for name in methods if name in _MORE), methods[0])
        model = load(source, quantization=how[most])
        plain = {name: value for name, value in model.params.items() if name != "int8_head"}
        for name in methods:
            params = model.params if name in _MORE else plain
            engines[name] = Ours(
                LanguageModel(
                    model.config, params, tokenizer=model.tokenizer, quantization=how[name]
                )
            )
    return {name: engines[name] for name in names}


def _quantization(name: str) -> QuantizationConfig:
    quantization = METHODS[name.partition(",")[0]].quantization
    assert quantization is not None
    return dataclasses.replace(quantization, **_MORE.get(name, {}))


def prompt_tokens(source: LanguageModel, count: int, rows: int = 1) -> list[list[int]]:
    """Prompts of real text (Python's own help), or of any tokens if there is no tokenizer."""
    if source.tokenizer is not None:
        text = datasets.load_text("pydoc").text[: 16 * count * rows]
        ids = source.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= count * rows:
            return [ids[row * count : (row + 1) * count] for row in range(rows)]
    random = np.random.default_rng(0)
    return random.integers(0, source.config.vocab_size, (rows, count)).tolist()


def _head(model: LanguageModel) -> Any:
    params = model.params
    if "int8_head" in params:
        return params["int8_head"]
    return params["embedding"] if model.config.tied_embeddings else params["lm_head"]


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
