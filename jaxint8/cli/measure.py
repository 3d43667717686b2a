"""What is measured of a LanguageModel: quality on a text, speed of decoding, share of outliers.

Here our models become the functions that evaluation takes. The surprising fact: to time decoding
the end tokens are taken away, else a model that likes to stop would be timed on nothing.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from jaxint8.cli import methods
from jaxint8.cli.app import Options
from jaxint8.evaluation import perplexity
from jaxint8.evaluation.outliers import outlier_fractions
from jaxint8.evaluation.report import BASELINE, Row
from jaxint8.models import LanguageModel, load
from jaxint8.models.generate import stream_tokens
from jaxint8.models.observe import linear_inputs

# The prompt fills half of the smallest cache (128 slots) and the steps fit in the rest: a cache
# that has to grow compiles a second program.
DECODE_PROMPT = 64
DECODE_STEPS = 12
DECODE_REPEATS = 4
# Calls on which outliers are counted: 2,048 tokens at the usual window; the share hardly varies.
OUTLIER_CALLS = 4

Show = Callable[[str, int], None]
"""Called with what is being done, and how many tokens of the method's pass over the text are."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one method."""

    score: perplexity.Score
    model_bytes: int
    decode_tokens_per_s: float | None
    outlier_fraction: float


def text_tokens(model: LanguageModel, text: str, options: Options) -> np.ndarray:
    """The text as the model's tokens, int32[n], without special ones; the flags max_tokens and window bound it.

    Raises:
      ValueError: the model has no tokenizer or too few positions, or the text is too short.
    """
    if model.tokenizer is None:
        raise ValueError(f"model: {options['model']} comes without a tokenizer")
    window, positions = options["window"], model.config.max_positions
    if window > positions:
        raise ValueError(f"window: {window} exceeds the model's {positions} positions")
    ids = model.tokenizer.encode(text, add_special_tokens=False)[: options["max_tokens"]]
    if len(ids) < 2:
        raise ValueError(f"text: expected at least 2 tokens to have one to score, got {len(ids)}")
    return np.asarray(ids, np.int32)


def load_group(source: str, names: Sequence[str], mesh: Mesh | None = None) -> LanguageModel:
    """Loads the parameters that the methods `names` (a group of `methods.by_weights`) share."""
    found = [methods.method(name) for name in names]
    if mesh is not None:
        for name, method in zip(names, found, strict=True):
            if method.quantization is not None and not method.quantization.native:
                raise ValueError(f"methods: {name} runs on one device only, without a mesh")
    return load(source, quantization=found[0].quantization, dtype=found[0].dtype, mesh=mesh)


def as_method(model: LanguageModel, name: str) -> LanguageModel:
    """The same parameters under another method of their group; nothing is copied."""
    quantization = methods.method(name).quantization
    return LanguageModel(
        model.config,
        model.params,
        tokenizer=model.tokenizer,
        quantization=quantization,
        placement=model.placement,
    )


def measure(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    window: int,
    batch_size: int,
    show: Show,
    decode: bool = True,
) -> Measured:
    """Measures one method.

    Args:
      model: the model, its method included.
      tokens: the text, int[n].
      window: tokens per window.
      batch_size: windows per call.
      show: told what is going on.
      decode: whether to time decoding.

    Raises:
      ValueError: the text is too short, or does not fit the model.
    """
    show("compiling", 0)
    score = perplexity.score(
        model.logits,
        tokens,
        window=window,
        batch_size=batch_size,
        progress=lambda done, total: show("scoring" if done else "compiling", done),
    )
    speed = None
    if decode:
        show("decoding", score.tokens)
        speed = decode_speed(model, tokens)
    share = 0.0
    if model.quantization is not None and model.quantization.activations == "float":
        share = 1.0
    elif model.quantization is not None and model.quantization.outliers is not None:
        show("counting outliers", score.tokens)
        calls = perplexity.cut(tokens, window, batch_size)[:OUTLIER_CALLS]
        inputs = functools.partial(
            linear_inputs,
            model.config,
            model.params,
            quantization=model.quantization,
            placement=model.placement,
        )
        share = outlier_fractions(inputs, calls, model.quantization.outliers)[""]
    return Measured(score, model.nbytes, speed, share)


def decode_speed(model: LanguageModel, tokens: Sequence[int] | np.ndarray) -> float | None:
    """New tokens per second of greedy decoding, one sequence: the median over a few runs of steps.

    Args:
      model: the model.
      tokens: ids to start from; the first DECODE_PROMPT are used.

    Returns:
      Tokens per second, prompt and compilation left out, or None if the model has too few positions
      for it.
    """
    prompt = [int(token) for token in tokens[:DECODE_PROMPT]]
    # One token comes from the prompt, and the first run of steps compiles.
    new = 1 + DECODE_STEPS * (1 + DECODE_REPEATS)
    if len(prompt) + new > model.config.max_positions:
        return None
    seconds = []
    last = time.perf_counter()
    for _ in stream_tokens(
        dataclasses.replace(model.config, end_tokens=()),
        model.params,
        [prompt],
        new,
        quantization=model.quantization,
        placement=model.placement,
        chunk=DECODE_STEPS,
    ):
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    return DECODE_STEPS / statistics.median(seconds[2:])


def rows(measured: dict[str, Measured]) -> list[Row]:
    """The rows of the report, changes against the row float32 if it is among them."""
    baseline = measured[BASELINE].score if BASELINE in measured else None
    return [
        Row(
            method=name,
            perplexity=m.score.perplexity,
            relative_change=baseline and m.score.perplexity / baseline.perplexity - 1.0,
            mean_abs_logprob_change=baseline
            and perplexity.mean_abs_logprob_change(m.score, baseline),
            model_bytes=m.model_bytes,
            prefill_tokens_per_s=m.score.tokens_per_s,
            decode_tokens_per_s=m.decode_tokens_per_s,
            outlier_fraction=m.outlier_fraction,
        )
        for name, m in measured.items()
    ]
