"""The adapter under the real lm-evaluation-harness, where it is installed (the extra `eval`)."""

import json

import numpy as np
import pytest
from test_cli import checkpoint as checkpoint

from jaxint8.models import load

# Its dependencies warn of one another.
pytestmark = pytest.mark.filterwarnings("default")
lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def adapter(checkpoint):
    from jaxint8.cli import harness_model

    return harness_model.JaxInt8LM(
        str(checkpoint), quantization="topk:4", batch_size=3, device=None
    )


def instance(*arguments):
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


def expected(checkpoint, context, continuation):
    model = load(checkpoint, quantization="topk:4")
    ids = [*context, *continuation]
    logits = np.asarray(model.logits([ids[:-1]]), np.float64)[0]
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    at = np.arange(len(context) - 1, len(ids) - 1)
    return logs[at, continuation].sum()


def test_it_is_found_by_name(adapter):
    from lm_eval.api.registry import get_model

    assert get_model("jaxint8") is type(adapter)


def test_likelihoods(adapter, checkpoint):
    pairs = [("the quick", " brown"), ("the ", "lazy dog"), ("", "fox")]
    found = adapter.loglikelihood([instance(*pair) for pair in pairs])
    encode = adapter.tok_encode
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        stripped = context.rstrip()
        before = encode(stripped) if stripped else [adapter.prefix_token_id]
        after = encode(context[len(stripped) :] + continuation)
        assert logprob == pytest.approx(expected(checkpoint, before, after), abs=2e-3)
        assert isinstance(greedy, bool)


def test_texts_longer_than_the_model(adapter, checkpoint):
    text = "thequickbrownfox" * 20  # 320 tokens for 256 positions
    (found,) = adapter.loglikelihood_rolling([instance(text)])
    ids, start = adapter.tok_encode(text), adapter.prefix_token_id
    first = expected(checkpoint, [start], ids[:256])
    rest = expected(checkpoint, ids[63:256], ids[256:])
    assert found == pytest.approx(first + rest, abs=0.05)


def test_generation_ends_before_a_stop(adapter, checkpoint):
    model = load(checkpoint, quantization="topk:4")
    (whole,) = model.generate(["the quick"], max_new_tokens=12)
    options = {"max_gen_toks": 12, "until": [whole[3:5]]}
    assert adapter.generate_until([instance("the quick", options)]) == [
        whole[: whole.find(whole[3:5])]
    ]


def test_a_task_of_the_harness(adapter, tmp_path):
    """A task from a file, scored by the harness with our answers."""
    docs = [{"q": "the quick", "c": [" fox", " dog"], "a": i % 2} for i in range(4)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    task = {
        "task": "two",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "a",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    result = lm_eval.simple_evaluate(model=adapter, tasks=[task], bootstrap_iters=0)
    assert result is not None
    assert (
        result["results"]["two"]["acc,none"] == 0.5
    )  # the same answer to all, right every second time
