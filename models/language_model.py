"""LanguageModel: a decoder with its parameters and tokenizer, from text to logits and to text.

It only ties together what the modules beside it do with arrays; everything it does can be had
without it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxint8.models import saving
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.context import around, for_caller
from jaxint8.models.decoder import Params, forward
from jaxint8.models.generate import check_tokens, generate_tokens, stream_tokens
from jaxint8.models.placement import Placement
from jaxint8.models.sampling import Sampling
from jaxint8.models.tokenizer import Tokenizer


class LanguageModel:
    """A decoder ready to use.

    Attributes:
        config: the architecture.
        params: the tree of parameters (see ``decoder.py``).
        quantization: how int8 weights are carried out; None when all are float.
        tokenizer: between text and token ids; None when the checkpoint had none.
        placement: where the parameters lie on a mesh; None on one device.

    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Params,
        *,
        tokenizer: Tokenizer | None = None,
        quantization: QuantizationConfig | None = None,
        placement: Placement | None = None,
    ) -> None:
        """Takes the parts as they are; nothing is copied or moved."""
        self.config = config
        self.params = params
        self.quantization = quantization
        self.tokenizer = tokenizer
        self.placement = placement

    def __repr__(self) -> str:
        """Returns family, size and method."""
        method = "float" if self.quantization is None else f"int8, {self.quantization.outliers}"
        return f"LanguageModel({self.config.family}, {self.nbytes / 1e6:.1f} MB, {method})"

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, wherever they lie (replicas counted once; on a mesh with what pads them)."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    def logits(self, tokens: ArrayLike) -> jax.Array:
        """Returns float32[b, t, vocab], the scores of the token that follows each prefix.

        Args:
            tokens: int[b, t] ids, every row from its start; t at most ``config.max_positions``.

        Raises:
            TypeError, ValueError: not integers, not two axes, rows of different lengths, too long, an id not in the
            vocabulary, or traced: this is one compiled call, and around it a jit would take all weights as constants.

        """
        if isinstance(tokens, Tracer):
            raise TypeError(
                "tokens: expected values, got an array traced by a jit around this call, which is compiled itself; "
                "in a jit of your own use jaxint8.models.decoder.forward, with params as an argument"
            )
        try:
            array = np.asarray(tokens)
        except ValueError:
            raise ValueError("tokens: expected int[b, t], got rows of different lengths") from None
        check_tokens(self.config, array, "tokens")
        if array.ndim != 2:
            raise ValueError(f"tokens: expected int[b, t], got shape {list(array.shape)}")
        if array.shape[1] > self.config.max_positions:
            raise ValueError(
                f"tokens: {array.shape[1]} per row exceed the model's {self.config.max_positions} "
                "positions"
            )
        if not array.size:
            return jnp.zeros((*array.shape, self.config.vocab_size), jnp.float32)
        count = len(array)
        if self.placement is not None:
            array = self.placement.fill_rows(array)
        with around(self.placement):
            logits = _logits(
                self.params,
                array.astype(np.int32),
                config=self.config,
                quantization=self.quantization,
                placement=self.placement,
            )
            logits = logits if len(array) == count else logits[:count]
        return for_caller(logits, self.placement)

    def temporary_bytes(self, b: int, t: int) -> int:
        """Returns the bytes that one device needs beside parameters and logits, to compute `logits` of [b, t]."""
        if min(b, t) < 1:
            raise ValueError(f"b and t: expected at least 1 of each, got {b} and {t}")
        how = {"config": self.config, "quantization": self.quantization}
        tokens = np.zeros((b, t), np.int32)
        if self.placement is not None:
            tokens = self.placement.fill_rows(tokens)
        with around(self.placement):
            lowered = _logits.lower(self.params, tokens, **how, placement=self.placement)
            analysis = lowered.compile().memory_analysis()
        return analysis.temp_size_in_bytes if analysis is not None else 0

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Continues each prompt until its end token or ``max_new_tokens``; all in one batch.

        What a row gets depends on its prompt, the options and the seed, and by rounding on the shape
        of the batch: int8 layers give the same bits in any, but what is float around them may be
        rounded otherwise in another shape, which can turn an int8 code and so, at a near tie, a
        token. Column-scope outlier rules by definition look at the whole batch.

        Args:
            prompts: texts, none of them empty.
            max_new_tokens: most tokens to add to a prompt.
            temperature: 0 for the most likely token each time, else what divides the logits.
            top_k: draw from the k most likely tokens only.
            top_p: draw from the most likely tokens that make up this share only.
            seed: the same seed, 0 to 2**64 - 1, gives the same texts.

        Returns:
            The continuations, without the prompts.

        Raises:
            ValueError: an option out of range, or a prompt that is empty or too long.
            TypeError: prompts are no strings, or one in the place of several; a number that is no integer.

        """
        if isinstance(prompts, str):
            raise TypeError("prompts: expected a sequence of strings, got one string")
        if not isinstance(prompts, Iterable):
            raise TypeError(f"prompts: expected a sequence of strings, got {prompts!r}")
        prompts = list(prompts)
        for index, prompt in enumerate(prompts):
            _check_text(f"prompt {index}", prompt)
        tokenizer = self._tokenizer()
        rows = generate_tokens(
            self.config,
            self.params,
            [tokenizer.encode(prompt) for prompt in prompts],
            max_new_tokens,
            quantization=self.quantization,
            placement=self.placement,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
        )
        return [tokenizer.decode(row) for row in rows]

    def stream(self, prompt: str, max_new_tokens: int, **options: Any) -> Iterator[str]:
        """Yields the continuation of one prompt in pieces, as it is made; arguments are checked when that begins.

        Args:
            prompt: a text.
            max_new_tokens: most tokens to add.
            **options: ``temperature``, ``top_k``, ``top_p`` and ``seed`` as for `generate`, and
                ``chunk``, the steps between two pieces (see `stream_tokens`).

        """
        _check_text("prompt", prompt)
        tokenizer = self._tokenizer()
        names = ("temperature", "top_k", "top_p")
        for name in options:
            if name not in (*names, "seed", "chunk"):
                raise TypeError(f"stream: got an unexpected option {name!r}")
        sampling = Sampling(**{name: options.pop(name) for name in names if name in options})
        gained = stream_tokens(
            self.config,
            self.params,
            [tokenizer.encode(prompt)],
            max_new_tokens,
            quantization=self.quantization,
            placement=self.placement,
            sampling=sampling,
            **options,
        )
        yield from tokenizer.decode_stream(token for (new,) in gained for token in new)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the model as a Hugging Face directory; see ``saving.py``.

        `load` gives the same parameters back, and so can read what was int8 without its float
        weights. From a mesh, all parameters come to the host on the way.

        Raises:
            ValueError: the architecture has no form as a config.json, or parameters are with other
                processes.
            TypeError: ``directory`` is no path.
            OSError: it cannot be written, or is a file.

        """
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(f"directory: expected a path, got {type(directory).__name__}")
        if Path(directory).is_file():
            raise NotADirectoryError(f"directory: {directory} is a file")
        model = self
        if self.placement is not None:
            model = LanguageModel(
                self.config,
                self.placement.on_host(self.params),
                tokenizer=self.tokenizer,
                quantization=self.quantization,
            )
        saving.save(model, directory)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "this model was loaded without a tokenizer: use jaxint8.models.generate.generate_tokens"
            )
        return self.tokenizer


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a string, got {text!r}")


@functools.partial(jax.jit, static_argnames=("config", "quantization", "placement"))
def _logits(
    params: Params,
    tokens: ArrayLike,
    *,
    config: DecoderConfig,
    quantization: QuantizationConfig | None,
    placement: Placement | None,
) -> jax.Array:
    tokens = jnp.asarray(tokens)
    logits, _ = forward(config, params, tokens, quantization=quantization, placement=placement)
    return logits if placement is None else placement.whole_logits(logits)
