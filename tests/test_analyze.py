"""Outlier features and noise on synthetic activations against plain NumPy, and the command line on a small model."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import TEXT, outcome
from test_cli import checkpoint as checkpoint

from jaxint8 import reference
from jaxint8.cli import analyze
from jaxint8.evaluation import features, snr
from jaxint8.schemes import SCHEMES

LAYERS, WIDTH = 4, 12


def activations(tokens):
    """Dimension 3 is a one-sided outlier everywhere, 5 in one layer, 7 at few positions, 8 of both signs."""
    ids = np.asarray(tokens)
    found = {"head": jnp.ones((*ids.shape, WIDTH)) * 99}
    for layer in range(LAYERS):
        for site in ("qkv", "up"):
            rng = np.random.default_rng([layer, len(site), *ids.ravel()[:4]])
            x = rng.normal(size=(*ids.shape, WIDTH)).astype(np.float32).clip(-3, 3)
            x[..., 3] = -7 - layer
            x[..., 5] = 9 if layer == 2 and site == "up" else 0
            x[..., 7] = np.where(ids == 0, 20, 0)
            x[..., 8] = np.where(ids % 2, 6.0, -6.0)
            found[f"layers.{layer}.{site}"] = jnp.asarray(x)
        found[f"layers.{layer}.down"] = jnp.ones((*ids.shape, WIDTH * 2))
    return found


CALLS = [np.arange(1, 41)[None] % 40, np.arange(41, 91)[None] % 50]


def test_features_are_those_of_the_papers_criteria():
    states = features.count(activations, CALLS)
    assert "head" not in states and len(states) == 3 * LAYERS
    state = states["layers.2.up"]
    whole = np.concatenate(
        [np.asarray(activations(c)["layers.2.up"]).reshape(-1, WIDTH) for c in CALLS]
    )
    np.testing.assert_array_equal(state.above, (np.abs(whole) >= 6).sum(axis=0))
    np.testing.assert_array_equal(state.positive, (whole >= 6).sum(axis=0))
    np.testing.assert_array_equal(state.absmax, np.abs(whole).max(axis=0))
    assert (state.positions, state.affected) == (90, 90)
    chosen = features.select(states, ["qkv", "up", "down"])  # down is wider: left out
    found = {f.dimension: f for f in features.features(chosen)}
    assert set(found) == {3, 5, 7, 8}
    assert (found[3].layers, found[3].positions, found[3].one_sided) == (1.0, 1.0, True)
    assert (found[5].layers, found[5].positions) == (1 / 8, 1 / 8)
    assert found[7].layers == 1.0 and found[7].positions == pytest.approx(2 / 90)
    assert not found[8].one_sided
    assert [f.dimension for f in features.features(chosen) if features.is_feature(f)] == [3, 8]
    with pytest.raises(ValueError, match="sites: expected any of down, qkv, up, got out"):
        features.select(states, ["out"])


def test_a_long_text_leaves_as_much_as_a_short_one(monkeypatch):
    monkeypatch.setattr(features, "SAMPLED_POSITIONS", 32)
    found = features.values(activations, CALLS, ["layers.1.up"], [3, 8])
    assert found["layers.1.up"].shape == (31, 2)
    assert np.all(found["layers.1.up"][:, 0] == -8)
    assert features.quartiles(found["layers.1.up"][:, 0], 6.0) == (-8.0, -8.0, -8.0)
    assert features.quartiles(np.ones(3), 6.0) is None


def test_noise_is_the_difference_from_the_float_product():
    rng = np.random.default_rng(0)
    weights = {
        f"layers.{i}.up": rng.normal(size=(9, WIDTH)).astype(np.float32) for i in range(LAYERS)
    }
    schemes = {name: SCHEMES[name] for name in ("absmax", "vectorwise", "llm_int8", "topk")}
    arrays = {name: jnp.asarray(w) for name, w in weights.items()}
    found = snr.signal_to_noise(activations, CALLS, arrays, schemes)
    signal = noise = 0.0
    for call in CALLS:
        x = np.asarray(activations(call)["layers.1.up"])[0]
        exact = x.astype(np.float64) @ weights["layers.1.up"].T
        codes, scale = reference.quantize(weights["layers.1.up"].T)
        y = reference.int8_linear(x, codes, scale, None, SCHEMES["topk"].outliers)
        signal, noise = signal + np.sum(exact**2), noise + np.sum((y - exact) ** 2)
    assert found["topk"]["layers.1.up"] == pytest.approx(10 * np.log10(signal / noise), abs=0.05)
    # Outliers of 7 to 20 over values below 3; the noise of the weights is the same for all of them.
    for name in weights:
        assert found["absmax"][name] < found["vectorwise"][name] < found["llm_int8"][name]


def test_the_command_writes_tables_and_plots(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = [f"--model={checkpoint}", f"--text={text}", "--window=48", "--max_tokens=144"]
    arguments += ["--threshold=2", "--methods=vectorwise,topk"]
    out = tmp_path / "out"
    status, shown, _ = outcome(analyze, capsys, *arguments, f"--output={out}")
    assert status == 0
    assert "| qkv, out, up" in shown and "| random dimensions" in shown
    found = json.loads((out / "analysis.json").read_text())
    assert {s["sites"] for s in found["summaries"]} == {"qkv, out, up", "qkv", "out", "up", "down"}
    nothing, without, random = found["ablations"]
    assert nothing["dimensions"] == []
    assert len(without["dimensions"]) == len(random["dimensions"]) > 0
    assert not set(without["dimensions"]) & set(random["dimensions"])
    assert nothing["perplexity"] == nothing["perplexity_all"] != without["perplexity_all"]
    assert set(found["snr"]) == {"vectorwise", "topk"} and len(found["snr"]["topk"]) == 8
    assert {path.name for path in out.iterdir()} >= {"features.png", "magnitude.png", "snr.png"}


def test_the_command_injects_into_a_model_that_says_so(checkpoint, tmp_path, capsys):
    out = tmp_path / "injected"
    arguments = [f"--model={checkpoint}", "--inject=16", "--inject_dimensions=2"]
    status, _, err = outcome(analyze, capsys, *arguments, f"--output={out}")
    assert status == 0 and "scaled by 16" in err
    note = json.loads((out / "injected.json").read_text())
    assert note["injected"] and note["factor"] == 16 and len(note["dimensions"]) == 2
    before, after = (analyze.load(source, quantization=None) for source in (checkpoint, out))
    tokens = np.arange(20)[None] % 27
    np.testing.assert_array_equal(after.logits(tokens), before.logits(tokens))
    assert np.any(
        after.params["layers"][0]["qkv"]["weight"] != before.params["layers"][0]["qkv"]["weight"]
    )


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "a.gguf"])
def test_injecting_replaces_no_model(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(analyze, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / name).write_text("kept")
    arguments = [f"--model={tmp_path}", "--inject=16", f"--output={tmp_path}"]
    status, _, err = outcome(analyze, capsys, *arguments)
    assert status == 2 and err.count("\n") == 1
    assert f"output: {tmp_path}: there is a model already ({name})" in err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "kept"


def test_without_outliers_nothing_is_zeroed(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = [f"--model={checkpoint}", f"--text={text}", "--window=48", "--max_tokens=48"]
    arguments += ["--threshold=1e6", "--methods=topk"]
    status, shown, _ = outcome(analyze, capsys, *arguments)
    assert status == 0 and "| nothing " in shown
    assert "random dimensions" not in shown and "most common outliers" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inject=16"], "output: expected a folder"),
        (["--inject=3", "--output=x"], "inject: expected a power of two, got 3"),
        (["--inject=nan", "--output=x"], "inject: expected a power of two, got nan"),
        (["--inject=-2", "--output=x"], "inject: expected a power of two, got -2"),
        (["--inject=1e300", "--output=x"], "inject: expected a power of two, got 1e+300"),
        (["--methods=topk,float32"], "methods: expected int8 methods, got 'float32'"),
        (
            ["--methods=llm_int8,topk:kv_int8"],
            "methods: expected no kv_int8, as a cache changes no",
        ),
        (["--methods=topk:kv_int8"], "layer's product, got 'topk:kv_int8'"),
        (["--sites=head"], "sites: expected any of down, out, qkv, up, got head"),
        (["--threshold=nan"], "threshold: expected a positive number, got nan"),
        (["--threshold=0"], "threshold: expected a positive number, got 0.0"),
        (["--output=text.txt"], "output: text.txt cannot be made a folder: File exists"),
        (["--text=none.txt"], "text: none.txt cannot be read"),
        (["--window=257"], "window: 257 exceeds the model's 256 positions"),
    ],
)
def test_bad_input_is_told_in_one_line(
    checkpoint, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    defaults = [f"--model={checkpoint}", "--text=text.txt", "--window=48"]
    status, _, err = outcome(analyze, capsys, *defaults, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1
