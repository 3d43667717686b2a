"""Zero-shot scoring against plain NumPy, the harness's rules on pairs, the readers of the four tasks, resuming."""

import functools
import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxint8 import download
from jaxint8.cli import resume
from jaxint8.cli.measure import Measured
from jaxint8.evaluation import tasks, zeroshot
from jaxint8.evaluation.perplexity import Score
from jaxint8.evaluation.tasks import Document
from jaxint8.evaluation.zeroshot import Answer, Request

VOCAB = 13
TABLE = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 3


def encode(text):
    """Letters are tokens, but "th" is one, also where a context ends between the two."""
    ids, i = [], 0
    while i < len(text):
        two = text[i : i + 2] == "th"
        ids.append(12 if two else ord(text[i]) % 12)
        i += 1 + two
    return ids


def bigram(tokens, starts):
    """A model that would notice padding: every row's sum of its own tokens is added to one logit."""
    places = np.arange(tokens.shape[1])[None] >= starts[:, None]
    seen = np.cumsum(np.where(places, tokens, 0), axis=1)
    logits = TABLE[tokens].copy()
    logits[..., 0] += 0.01 * seen
    return jnp.asarray(logits)


def expected(request):
    ids = np.array(request.inputs)
    logits = np.asarray(bigram(ids[None], np.zeros(1)), np.float64)[0]
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    at = np.arange(len(ids) - len(request.continuation), len(ids))
    targets = np.array(request.continuation)
    return logs[at, targets].sum(), bool((logits[at].argmax(axis=-1) == targets).all())


def requests(n=25):
    rng = np.random.default_rng(n)
    lengths = rng.integers(1, 90, n)
    return [
        Request(
            tuple(rng.integers(0, VOCAB, a).tolist()), tuple(rng.integers(0, VOCAB, b).tolist())
        )
        for a, b in zip(lengths, rng.integers(1, 4, n), strict=True)
    ]


def test_answers_equal_a_plain_loop():
    asked = requests()
    # One that is greedy: the most likely token after its context.
    asked.append(Request((5,), (int(np.argmax(np.asarray(bigram(np.array([[5]]), np.zeros(1))))),)))
    found = zeroshot.score(bigram, asked, batch_tokens=128)
    for request, answer in zip(asked, found, strict=True):
        logprob, greedy = expected(request)
        assert answer.logprob == pytest.approx(logprob, abs=1e-4)
        assert answer.greedy == greedy
    assert found[-1].greedy


def test_batches_hold_rows_of_one_length_and_every_row_once():
    lengths = [len(r.inputs) for r in requests(60)]
    found = zeroshot.batches(lengths, 256)
    assert sorted(i for _, rows in found for i in rows) == list(range(60))
    for length, rows in found:
        assert all(length - zeroshot.LENGTH_STEP < lengths[i] <= length for i in rows)
        assert len(rows) * length <= 256
    assert [length for length, _ in found] == sorted((n for n, _ in found), reverse=True)
    assert zeroshot.batches([500], 64) == [(512, [0])]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    journal, asked, calls = tmp_path / "a" / "j.jsonl", requests(), []

    def counted(tokens, starts):
        calls.append(tokens.shape)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return bigram(tokens, starts)

    options = {"batch_tokens": 128, "journal": journal, "identity": "m"}
    with pytest.raises(KeyboardInterrupt):
        zeroshot.score(counted, asked, **options)
    journal.write_text(journal.read_text() + '{"1": [-3')  # a line cut by the interruption
    whole = zeroshot.score(counted, asked, **options)
    assert whole == zeroshot.score(bigram, asked, batch_tokens=128)
    batches = len(zeroshot.batches([len(r.inputs) for r in asked], 128))
    assert len(calls) == batches + 1  # only the one that was interrupted twice
    assert zeroshot.score(lambda *_: pytest.fail("asked again"), asked, **options) == whole
    with pytest.raises(ValueError, match="output: .*j.jsonl holds answers of another model"):
        zeroshot.score(bigram, asked, **{**options, "identity": "n"})
    with pytest.raises(ValueError, match="another model, method or set of documents"):
        zeroshot.score(bigram, asked[1:], **options)
    content = journal.read_text()
    header = content.partition("\n")[0]
    for broken in ("", "x\n", "[]\n", "{}\n", "\ud800", f"{header}\nx\n", f"{header}\n[1]\n"):
        journal.write_bytes(broken.encode(errors="surrogatepass"))
        with pytest.raises(ValueError, match="output: .*j.jsonl is damaged: remove it to have it"):
            zeroshot.score(bigram, asked, **options)


def test_pairs_are_encoded_as_the_harness_does():
    # The border is where the context's own tokens end, even if the whole text has other tokens there.
    pair = zeroshot.request(encode, "at", "hat", 100)
    assert len(pair.context) == len(encode("at")) and pair.context + pair.continuation == tuple(
        encode("athat")
    )
    # Spaces at the end of a context are the continuation's.
    pair = zeroshot.request(encode, "ab ", "c", 100)
    assert (list(pair.context), list(pair.continuation)) == (encode("ab"), encode(" c"))
    # What is too long loses its front: the model reads the last 4 of "abcdef" + "g" but for "g".
    pair = zeroshot.request(encode, "abcdef", "g", 4)
    assert list(pair.inputs) == encode("cdef")
    with pytest.raises(ValueError, match="expected a context and a continuation"):
        zeroshot.request(encode, "", "a", 9)
    with pytest.raises(ValueError, match="exceeds the 2 that the model reads"):
        zeroshot.request(encode, "a", "bcd", 2)


def test_accuracies_and_standard_errors():
    several = Document((("a", " b"), ("a", " cccc")), ("b", "cccc"), 1)
    one = Document((("a", " b"),), ("b",), 0)
    answers = [Answer(-1.0, False), Answer(-2.0, False), Answer(-3.0, False), Answer(-9.0, False)]
    found = zeroshot.accuracy([several, several], answers)
    # -1 beats -2, but -2 / 4 characters beats -1; -3 beats -9, and -9 / 4 beats -3.
    assert found == {"acc": [0.0, 0.0], "acc_norm": [1.0, 1.0], "logprob": [-2.0, -9.0]}
    found = zeroshot.accuracy([one, one], [Answer(-1.0, True), Answer(-3.0, False)])
    assert found == {"acc": [1.0, 0.0], "logprob": [-1.0, -3.0]}
    assert zeroshot.perplexity(found["logprob"]) == pytest.approx(np.exp(2.0))
    metric = zeroshot.mean([1.0, 0.0, 1.0, 1.0])
    # Sample variance 0.25, over 4.
    assert (metric.value, metric.stderr) == (0.75, pytest.approx(0.25))
    assert zeroshot.mean([1.0]).stderr is None


RECORDS = {
    "lambada": {"text": "He said no to the signs"},
    "hellaswag": {
        "activity_label": "Roof",
        "ctx_a": "A man [step] sits.",
        "ctx_b": "he",
        "endings": ["runs [title] fast", "waits.", "x", "y"],
        "label": "1",
    },
    "piqa": {"goal": "Open it", "sol1": "push", "sol2": "pull hard", "label": 1},
    "winogrande": {
        "sentence": "Ann met Eve because _ was late. ",
        "option1": "Ann",
        "option2": "Eve",
        "answer": "2",
    },
}
DOCUMENTS = {
    "lambada": Document((("He said no to the", " signs"),), ("signs",), 0),
    "hellaswag": Document(
        tuple(("Roof: A man sits. He", f" {x}") for x in ("runs. fast", "waits.", "x", "y")),
        ("runs. fast", "waits.", "x", "y"),
        1,
    ),
    "piqa": Document(
        tuple(("Question: Open it\nAnswer:", f" {x}") for x in ("push", "pull hard")),
        ("push", "pull hard"),
        1,
    ),
    "winogrande": Document(
        (("Ann met Eve because Ann", " was late."), ("Ann met Eve because Eve", " was late.")),
        ("Ann", "Eve"),
        1,
    ),
}


@pytest.mark.parametrize("name", tasks.TASKS)
def test_documents_of_files(tmp_path, name):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(RECORDS[name])}\n\n{json.dumps(RECORDS[name])}\n")
    assert tasks.load_task(f"{name}={path}") == (name, [DOCUMENTS[name]] * 2)
    path.write_text('{"no": 1}')
    with pytest.raises(ValueError, match=rf"tasks: {path} line 1 is not a document of {name}: Key"):
        tasks.load_task(f"{name}={path}")
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        tasks.load_task(f"{name}={path}")


def test_documents_of_the_wheel_come_once_and_a_limit_takes_from_everywhere(tmp_path, monkeypatch):
    path = tmp_path / "requests.jsonl.gz"
    docs = [{**RECORDS["piqa"], "goal": str(i)} for i in range(10)]
    lines = [
        json.dumps({"doc_id": i + j, "doc": docs[i]}) for i in range(10) for j in (0, 1_000_000)
    ]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.setattr(download, "zero_shot_files", lambda: {"piqa": path})
    _, found = tasks.load_task("piqa")
    assert len(found) == 10
    _, some = tasks.load_task("piqa", limit=4)
    assert some == [found[0], found[2], found[5], found[7]]
    with pytest.raises(ValueError, match="tasks: expected any of lambada, .* got 'arc'"):
        tasks.load_task("arc")


def test_what_was_measured_comes_back(tmp_path):
    path = resume.file_of(str(tmp_path), "text", "topk:4", ".npz")
    assert path is not None and path.name == "text-topk-4.npz"
    score = Score(np.array([-1.5, -2.0], np.float32), 3, 7.5)
    measured = Measured(score, model_bytes=4, decode_tokens_per_s=None, outlier_fraction=0.25)
    (tmp_path / "model").write_text("a")
    key = functools.partial(resume.identity, str(tmp_path / "model"))
    assert resume.read(path, key("m")) is None
    resume.write(path, measured, key("m"))
    again = resume.read(path, key("m"))
    assert again is not None
    np.testing.assert_array_equal(again.score.logprobs, score.logprobs)
    assert (again.score.tokens, again.score.tokens_per_s) == (3, 7.5)
    assert (again.model_bytes, again.decode_tokens_per_s, again.outlier_fraction) == (4, None, 0.25)
    (tmp_path / "model").write_text("ab")
    with pytest.raises(ValueError, match="output: .* is of another model, method or text"):
        resume.read(path, key("m"))
    content = path.read_bytes()
    for broken in (
        b"",
        content[:100],
        content[:-30],
        b"x",
        content.replace("fingerprint".encode("utf-32-le"), b"x" * 44),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="output: .*text-topk-4.npz is damaged: remove it to"):
            resume.read(path, key("m"))
