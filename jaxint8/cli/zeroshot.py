"""Zero-shot tasks for our models: documents become requests, a model's answers become rows of the report.

The surprising fact: rows of a batch go through the decoder as a prompt does, left-padded into a cache, since only there
does the model know which rows are padding and keep them out of column-scope outlier rules.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxint8.evaluation import tasks, zeroshot
from jaxint8.evaluation.report import BASELINE, TaskRow
from jaxint8.models import DecoderConfig, LanguageModel, QuantizationConfig
from jaxint8.models.cache import init_cache
from jaxint8.models.decoder import Params, forward
from jaxint8.models.placement import Placement


@dataclass(frozen=True)
class Loaded:
    """A task with its documents, and their choices as requests to the model."""

    name: str
    documents: Sequence[tasks.Document]
    requests: Sequence[zeroshot.Request]

    @property
    def tokens(self) -> int:
        """Tokens that a method reads."""
        return sum(len(request.inputs) for request in self.requests)


def load(sources: Sequence[str], limit: int | None) -> list[tuple[str, list[tasks.Document]]]:
    """Reads tasks, each once; see `jaxint8.evaluation.tasks.load_task`."""
    once = dict.fromkeys(sources)
    names = [tasks.name_of(source) for source in once]  # all, before any is downloaded
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: expected each task once, got {', '.join(names)}")
    return [tasks.load_task(source, limit) for source in once]


def encode(
    model: LanguageModel, loaded: Sequence[tuple[str, list[tasks.Document]]]
) -> list[Loaded]:
    """Encodes the documents with the model's tokenizer.

    Raises:
      ValueError: the model has none, or a document cannot be asked.
    """
    return [
        Loaded(
            name,
            documents,
            [request(model, *choice) for document in documents for choice in document.choices],
        )
        for name, documents in loaded
    ]


def request(model: LanguageModel, context: str, continuation: str) -> zeroshot.Request:
    """Encodes one pair; see `jaxint8.evaluation.zeroshot.request`."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("model: comes without a tokenizer")
    plain = functools.partial(tokenizer.encode, add_special_tokens=False)
    return zeroshot.request(plain, context, continuation, model.config.max_positions)


def answer(
    model: LanguageModel,
    task: Loaded,
    *,
    batch_tokens: int,
    journal: Path | None,
    identity: str,
    progress: zeroshot.Progress,
) -> list[zeroshot.Answer]:
    """Asks a model all of a task; see `jaxint8.evaluation.zeroshot.score`."""
    return zeroshot.score(
        functools.partial(padded_logits, model),
        task.requests,
        batch_tokens=batch_tokens,
        journal=journal,
        identity=identity,
        progress=progress,
    )


def padded_logits(model: LanguageModel, tokens: np.ndarray, starts: np.ndarray) -> jax.Array:
    """The logits float32[b, t, vocab] of left-padded rows int32[b, t] that begin at starts int32[b]."""
    placement = model.placement
    filled = (tokens, starts) if placement is None else map(placement.fill_rows, (tokens, starts))
    how = {"config": model.config, "quantization": model.quantization, "placement": placement}
    return _padded_logits(model.params, *filled, len(tokens), **how)


@functools.partial(
    jax.jit, static_argnums=3, static_argnames=("config", "quantization", "placement")
)
def _padded_logits(
    params: Params,
    tokens: jax.Array,
    starts: jax.Array,
    count: int,
    *,
    config: DecoderConfig,
    quantization: QuantizationConfig | None,
    placement: Placement | None,
) -> jax.Array:
    held = config if placement is None else placement.cache_config
    dtype = params["embedding"].dtype
    cache = init_cache(held, tokens.shape[1], starts, dtype, quantization)
    logits, _ = forward(
        config, params, tokens, cache, quantization=quantization, placement=placement
    )
    return logits if placement is None else placement.whole_logits(logits)[:count]


def rows(
    loaded: Sequence[Loaded], answers: dict[str, dict[str, list[zeroshot.Answer]]]
) -> list[TaskRow]:
    """The rows of the report, by task and then by method.

    Args:
      loaded: the tasks.
      answers: method -> task -> answers.
    """
    return [
        _row(task, method, zeroshot.accuracy(task.documents, own[task.name]), answers)
        for task in loaded
        for method, own in answers.items()
    ]


def _row(
    task: Loaded,
    method: str,
    found: dict[str, list[float]],
    answers: dict[str, dict[str, list[zeroshot.Answer]]],
) -> TaskRow:
    metrics = tasks.TASKS[task.name].metrics
    main = metrics[-1]
    means = {name: zeroshot.mean(found[name]) for name in metrics}
    norm = means.get("acc_norm")
    change = None
    if BASELINE in answers:
        base = zeroshot.accuracy(task.documents, answers[BASELINE][task.name])[main]
        change = zeroshot.mean([a - b for a, b in zip(found[main], base, strict=True)])
    return TaskRow(
        task=task.name,
        method=method,
        documents=len(task.documents),
        acc=means["acc"].value,
        acc_stderr=means["acc"].stderr,
        acc_norm=norm and norm.value,
        acc_norm_stderr=norm and norm.stderr,
        change=change and change.value,
        change_stderr=change and change.stderr,
        perplexity=zeroshot.perplexity(found["logprob"]) if task.name == "lambada" else None,
    )
