"""Zero-shot accuracy of a language model by the scoring rules of lm-evaluation-harness (EleutherAI).

A document is a few continuations of a few contexts, of which one is right; the model answers with the most likely.
"acc" compares summed log-probabilities, "acc_norm" divides them by the characters of the choice; LAMBADA's one
continuation counts as right if every token of it is the most likely one. The surprising fact: a context is never
encoded alone and joined with a continuation, for their tokens may merge across the border; the pair is encoded as one
text and cut where the context's own tokens end, as the harness does.

Rows of a batch are padded on the left. The model is told where each row starts, so that padding can be kept out of
column-scope outlier rules; all rows end together, and so do the few logits that are needed.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8.checkpoint.base import naming
from jaxint8.evaluation.files import damaged
from jaxint8.evaluation.tasks import Document
from jaxint8.partition import to_host

Encode = Callable[[str], list[int]]
"""Text -> token ids, without special tokens."""

PaddedLogits = Callable[[np.ndarray, np.ndarray], jax.Array]
"""(tokens int32[b, t], starts int32[b]) -> float[b, t, vocab]; row i is padding before starts[i]."""

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""

# Lengths are rounded up to a multiple of this: each length is a program to compile.
LENGTH_STEP = 32


@dataclass(frozen=True)
class Request:
    """A context and a continuation as token ids; the continuation is scored."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token, which is only predicted."""
        return (self.context + self.continuation)[:-1]


@dataclass(frozen=True)
class Answer:
    """The sum of the continuation's log-probabilities, and whether all its tokens are the most likely ones."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Metric:
    """A mean over documents and its standard error, which is None for a single document."""

    value: float
    stderr: float | None


def request(encode: Encode, context: str, continuation: str, longest: int) -> Request:
    """Encodes a pair as the harness does; spaces at the end of the context belong to the continuation.

    Args:
      encode: the tokenizer.
      context: what the model reads.
      continuation: what it is asked about.
      longest: most tokens that the model reads; of a longer pair the front is cut off.

    Raises:
      ValueError: the context is empty, or the continuation is not at least one token after it.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole, before = encode(stripped + continuation), encode(stripped)
    if not before or len(whole) <= len(before):
        raise ValueError(
            "document: expected a context and a continuation of at least one token each, got "
            f"{context!r} and {continuation!r}"
        )
    context_ids, ids = whole[: len(before)], whole[len(before) :]
    if len(ids) >= longest:
        raise ValueError(
            f"document: a continuation of {len(ids)} tokens exceeds the {longest} that the model reads"
        )
    kept = longest + 1 - len(ids)
    return Request(tuple(context_ids[-kept:]), tuple(ids))


def score(
    logits: PaddedLogits,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 1024,
    journal: Path | None = None,
    identity: str = "",
    progress: Progress | None = None,
) -> list[Answer]:
    """Scores requests in batches of similar length, longest first.

    Args:
      logits: the model.
      requests: what to score.
      batch_tokens: most tokens of a batch, padding included (one row is always allowed).
      journal: a JSON-lines file; finished batches are added to it, and what it holds is not computed again.
      identity: what the answers depend on besides the requests (model, method); a journal made for another is refused.
      progress: told after each batch.

    Returns:
      An answer to each request, in their order.

    Raises:
      ValueError: the journal belongs to another run, or is damaged.
    """
    groups = batches([len(request.inputs) for request in requests], batch_tokens)
    done = {} if journal is None else _read_journal(journal, _fingerprint(requests, identity))
    total = sum(len(request.inputs) for request in requests)
    finished = 0
    for length, members in groups:
        if any(i not in done for i in members):
            found = _answers(logits, [requests[i] for i in members], length, batch_tokens)
            done.update(zip(members, found, strict=True))
            if journal is not None:
                _append(journal, {i: done[i] for i in members})
        finished += sum(len(requests[i].inputs) for i in members)
        if progress is not None:
            progress(finished, total)
    return [done[i] for i in range(len(requests))]


def batches(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, list[int]]]:
    """Cuts rows into batches (padded length, rows); the same whatever has been computed before."""
    padded = [-(-length // LENGTH_STEP) * LENGTH_STEP for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-padded[i], i))
    found: list[tuple[int, list[int]]] = []
    for i in order:
        room = max(1, batch_tokens // padded[i])
        if not found or found[-1][0] != padded[i] or len(found[-1][1]) >= room:
            found.append((padded[i], []))
        found[-1][1].append(i)
    return found


def accuracy(documents: Sequence[Document], answers: Sequence[Answer]) -> dict[str, list[float]]:
    """The figures of each document, by name: "acc", "acc_norm" and "logprob" of the right choice.

    Args:
      documents: the documents.
      answers: an answer to each choice of each document, one document after the other.
    """
    found: dict[str, list[float]] = {"acc": [], "acc_norm": [], "logprob": []}
    rest = iter(answers)
    for document in documents:
        own = [next(rest) for _ in document.choices]
        logprobs = np.array([answer.logprob for answer in own])
        found["logprob"].append(float(logprobs[document.gold]))
        if len(own) == 1:
            found["acc"].append(float(own[0].greedy))
            continue
        lengths = np.array([float(len(choice)) for choice in document.labels])
        found["acc"].append(float(np.argmax(logprobs) == document.gold))
        found["acc_norm"].append(float(np.argmax(logprobs / lengths) == document.gold))
    return {name: values for name, values in found.items() if len(values) == len(documents)}


def mean(values: Sequence[float]) -> Metric:
    """The mean and its standard error (sample deviation over the root of the count, as the harness)."""
    n = len(values)
    array = np.asarray(values, np.float64)
    stderr = float(np.std(array, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Metric(float(array.mean()), stderr)


def perplexity(logprobs: Sequence[float]) -> float:
    """The exponential of the negative mean log-probability of a document (the harness's perplexity of LAMBADA)."""
    return math.exp(-float(np.mean(np.asarray(logprobs, np.float64))))


def _answers(
    logits: PaddedLogits, requests: Sequence[Request], length: int, batch_tokens: int
) -> Iterator[Answer]:
    # Always as many rows as a whole batch of this length, for one program; the rows added are empty of tokens.
    rows = max(len(requests), batch_tokens // length, 1)
    tokens = np.zeros((rows, length), np.int32)
    starts = np.full(rows, length - 1, np.int32)
    targets = np.zeros((rows, length), np.int32)
    for row, request in enumerate(requests):
        inputs = request.inputs
        starts[row] = length - len(inputs)
        tokens[row, starts[row] :] = inputs
        targets[row, length - len(request.continuation) :] = request.continuation
    logprobs, best = _score_targets(logits(tokens, starts), targets)
    logprobs, best = to_host(logprobs).astype(np.float64), to_host(best)
    for row, request in enumerate(requests):
        scored = slice(length - len(request.continuation), length)
        yield Answer(float(logprobs[row, scored].sum()), bool(best[row, scored].all()))


@jax.jit
def _score_targets(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log p float32[b, t], whether it is the largest bool[b, t]) of each target."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # Of equal logits the lowest index is the most likely token, as argmax has it.
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


def _fingerprint(requests: Sequence[Request], identity: str) -> str:
    text = json.dumps([identity, [[r.context, r.continuation] for r in requests]])
    return hashlib.sha256(text.encode()).hexdigest()


def _read_journal(path: Path, fingerprint: str) -> dict[int, Answer]:
    """The answers that a journal holds; makes one that does not exist. An unfinished last line is cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
        return {}
    try:
        content = path.read_text()
        whole = content[: content.rfind("\n") + 1]
        header, *lines = whole.splitlines()
        held = json.loads(header)["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(damaged(path)) from None
    if held != fingerprint:
        raise ValueError(
            f"output: {path} holds answers of another model, method or set of documents; "
            "remove it or choose another folder"
        )
    found: dict[int, Answer] = {}
    try:
        for line in lines:
            batch: Mapping[str, list] = json.loads(line)
            found.update({int(i): Answer(*answer) for i, answer in batch.items()})
    except (ValueError, TypeError, AttributeError):
        raise ValueError(damaged(path)) from None
    if whole != content:
        with naming(path):
            path.write_text(whole)
    return found


def _append(path: Path, batch: Mapping[int, Answer]) -> None:
    line = json.dumps({i: [answer.logprob, answer.greedy] for i, answer in batch.items()})
    with naming(path), path.open("a") as file:
        file.write(line + "\n")
