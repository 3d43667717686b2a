"""Tests of jaxint8-bench: models under the clock, the report, and the command line."""

import contextlib
import dataclasses
import json
import math
import mmap
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxint8 import download
from jaxint8.cli import bench
from jaxint8.cli.benchmarks import engines, generation, growth, load, scale, suites
from jaxint8.cli.benchmarks import peers as model_peers
from jaxint8.evaluation.benchmark import growth as layer_growth
from jaxint8.evaluation.benchmark import layers, machine, plots, report, results, tables
from jaxint8.evaluation.benchmark.layers import Effort
from jaxint8.evaluation.benchmark.machine import Work
from jaxint8.evaluation.benchmark.timing import ratios
from jaxint8.models import load as load_model
from jaxint8.models.cache import init_cache
from jaxint8.models.generate import generate_tokens

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TINY = Effort(rounds=3, seconds=0.0005)


@pytest.fixture(scope="module")
def layer_group():
    (group,) = layers.layer_groups((96, 40), [2], TINY, with_peers=False)
    return group


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LLaMA of two layers without tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(GOLDENS / "llama_gqa_tied" / "model.safetensors", folder)
    config = json.loads((GOLDENS / "llama_gqa_tied" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    return folder


def test_ctranslate2_makes_the_same_tokens(checkpoint, tmp_path):
    pytest.importorskip("ctranslate2")
    model = load_model(checkpoint, quantization="float32")
    assert model_peers.CTranslate2.can_run(model.config)
    prompts = engines.prompt_tokens(model, 12)
    peer = model_peers.CTranslate2(model, tmp_path / "converted", 1)
    made, times = peer.greedy(prompts, 4)
    expected = generate_tokens(
        dataclasses.replace(model.config, end_tokens=()), model.params, prompts, 4
    )
    assert made[0][0] == expected[0][0] and len(made[0]) == 4
    assert times.first > 0 and times.rest > 0


@pytest.mark.demo
def test_llama_cpp_makes_the_same_tokens(tmp_path):
    pytest.importorskip("llama_cpp")
    gguf = download.demo_model_path()
    model = load_model(gguf, quantization="float32")
    prompts = engines.prompt_tokens(model, 32)
    peer = model_peers.LlamaCpp(gguf, tmp_path / "q8_0.gguf", 1, 40)
    with contextlib.closing(peer):
        made, _ = peer.greedy(prompts, 4)
        with pytest.raises(ValueError, match="expected at most 40 tokens, got 41"):
            peer(prompts, 9)
    assert made == generate_tokens(model.config, model.params, prompts, 4)[0]
    assert 1.0 < peer.step_bytes / (model.nbytes / 4) < 1.1


def test_model_peers_are_optional(checkpoint, monkeypatch):
    monkeypatch.setattr(model_peers, "installed", lambda *names: False)
    model = load_model(checkpoint, quantization="float32")
    with model_peers.peer_engines(model, None, 1, 64) as found:
        assert found == {}


# Models


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return engines.load_ours(str(checkpoint))


def test_our_engines_share_weights_and_know_what_they_read(loaded):
    assert tuple(loaded) == engines.OURS
    config = loaded["relative"].model.config
    layer = {name: engine.model.params["layers"][0]["qkv"] for name, engine in loaded.items()}
    assert layer["llm_int8"]["weight"] is layer["relative"]["weight"]
    assert layer["relative"]["weight"] is layer[engines.INT8_HEAD]["weight"]
    heads = [loaded[name].model for name in (engines.INT8_HEAD, engines.INT8_CACHE)]
    assert heads[0].params["int8_head"]["weight"] is heads[1].params["int8_head"]["weight"]
    chosen = [(m.quantization.lm_head, m.quantization.kv_cache) for m in heads]
    assert chosen == [("int8", "float"), ("int8", "int8")]
    for engine in loaded.values():
        how, start = engine.model.quantization, np.zeros(1, np.int32)
        cache = init_cache(config, 100, jnp.asarray(start), jnp.float32, how)
        held = sum(array.nbytes for array in jax.tree.leaves((cache.keys, cache.values)))
        assert engine.cache_bytes(100) == held
    head = config.vocab_size * config.embedding_size
    difference = loaded["relative"].step_bytes - loaded[engines.INT8_HEAD].step_bytes
    assert difference == 4 * head - (head + 4 * config.vocab_size)
    # float32: every parameter but the final norm, for the embedding is the head as well.
    assert loaded["float32"].step_bytes == loaded["float32"].model.nbytes - 4 * config.hidden_size
    width = config.query_size + 2 * config.key_value_size
    weights = config.layers * (
        width * config.hidden_size
        + config.query_size * config.hidden_size
        + 3 * config.mlp_size * config.hidden_size
    )
    for engine in loaded.values():
        assert engine.work(10).multiplies == 10 * weights + head


def test_generation_groups_share_their_rounds(loaded):
    chosen = {name: loaded[name] for name in ("float32", "relative")}
    found = generation.generation_groups(["decode", "prefill"], chosen, prompt=20, new=5, rounds=2)
    decode, prefill = found
    assert (decode.suite, prefill.suite) == ("decode", "prefill")
    for group, tokens in ((decode, 1), (prefill, 20)):
        assert group.engines() == ["float32", "relative"]
        for line in group.lines:
            assert line.rate == pytest.approx(tokens / line.seconds.median)
        a, b = (group.line(name).samples for name in ("float32", "relative"))
        assert group.times("relative", "float32") == ratios(a, b)
    work = generation.decode_work(loaded["relative"], 22)
    config = loaded["relative"].model.config
    cached = 2 * config.layers * config.kv_heads * config.head_dim * 22 * 4
    assert work == Work(loaded["relative"].step_bytes + cached, 0)


def test_growth_of_contexts_and_batches(loaded):
    ours = {"relative": loaded["relative"]}
    contexts = growth.context_group(ours, [8, 40], 1)
    assert [line.at for line in contexts.lines] == [{"context": 8}, {"context": 40}]
    assert [(step.before, step.after) for step in contexts.steps] == [(8, 40)]
    batches = growth.batch_group(ours, [3], 1)
    line = batches.line("relative", batch=3)
    assert line.rate == pytest.approx(3 / line.seconds.median)


def test_threads_are_asked_in_turn():
    if not growth.CAN_LIMIT or machine.cores() < 2:
        pytest.skip("needs two cores to choose from")
    before = os.sched_getaffinity(0)
    group = growth.threads_group(None, (64, 32), [1, 2], [1, 2], TINY, prompt=8)
    assert os.sched_getaffinity(0) == before
    assert group.engines() == ["layer, m = 1", "layer, m = 2"]
    assert [line.at["threads"] for line in group.lines] == [1, 2, 1, 2]
    assert [(step.before, step.after) for step in group.steps] == [(1, 2), (1, 2)]


def test_loading_is_measured_in_a_process_of_its_own(checkpoint):
    group = load.load_group(str(checkpoint), 1)
    reading, float32, int8 = group.lines
    assert (reading.name, float32.name, int8.name) == (load.READING, "float32", "llm_int8")
    assert group.what["file_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    model = load_model(checkpoint, quantization="llm_int8")
    assert int8.extra["model_bytes"] == model.nbytes < float32.extra["model_bytes"]
    assert 0 <= int8.extra["peak_bytes"] < 1e9
    largest = group.what["largest_float_tensor_bytes"]
    assert largest == model.params["embedding"].nbytes
    assert int8.extra["allowed_bytes"] == model.nbytes + largest + load.ALLOWANCE
    assert group.times("llm_int8", load.READING) == ratios(reading.samples, int8.samples)


def test_random_checkpoints_have_the_size_asked_for(tmp_path):
    assert abs(2 * scale._parameters(scale.config_for(3e9)) - 3e9) < 0.05 * 3e9
    config = scale.config_of(1, hidden=256)
    scale.write_random(config, tmp_path)
    model = load_model(tmp_path, quantization="llm_int8")
    assert (tmp_path / "model.safetensors").stat().st_size > 2 * scale._parameters(config)
    assert dataclasses.replace(model.config, start_token=None) == config
    codes = model.params["layers"][0]["up"]["weight"].codes
    assert len({row.tobytes() for row in np.asarray(codes)}) > 0.9 * len(codes)


def test_the_peak_counts_what_was_used_and_given_back():
    before = load._reset_peak()
    with mmap.mmap(-1, 50_000_000) as pages:  # from the system, not from what was used before
        pages.write(bytes(25_000_000))
        pages.write(bytes(25_000_000))
    assert 40e6 < load._peak() - before < 120e6


# The report


@pytest.fixture(scope="module")
def groups(layer_group, loaded):
    """One of each suite and axis, with figures made up where measuring takes long."""
    relative = {"relative": loaded["relative"]}
    generated = {name: loaded[name] for name in ("float32", "relative")}
    samples = {"llm_int8": [2.0, 2.0], load.READING: [1.0, 1.0]}
    extra = {"peak_bytes": 3e6, "model_bytes": 2e6, "allowed_bytes": 9e6}
    loading = results.Group(
        suite="load",
        what={"file_bytes": 5_000_000, "largest_float_tensor_bytes": 10},
        lines=[
            results.line(load.READING, samples[load.READING]),
            results.line("llm_int8", samples["llm_int8"], extra=extra),
        ],
        pairs=results.pairs(samples, [("llm_int8", load.READING)]),
        others=1.5,
    )
    threads = {1: [4.0, 4.0], 2: [2.0, 2.0]}
    scaling = results.Group(
        suite="growth",
        what={"axis": "threads", "k": 64, "n": 32, "prompt": 8},
        lines=[results.line("decode", s, at={"threads": c}) for c, s in threads.items()],
        steps=results.steps("decode", threads),
    )
    return [
        layer_group,
        *generation.generation_groups(["prefill", "decode"], generated, prompt=20, new=5, rounds=2),
        loading,
        layer_growth.rows_group((64, 32), [1, 2, 4], TINY, with_peers=False),
        growth.context_group(relative, [8, 40], 1),
        scaling,
    ]


def test_report_is_complete_and_whole(groups, tmp_path):
    written = report.write(groups, {"command": "run this", "threads": 2}, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        path.name for path in written
    )
    content = json.loads(written[0].read_text())
    assert content["environment"] == {"command": "run this", "threads": 2}
    assert [group["suite"] for group in content["groups"]] == [group.suite for group in groups]
    for group, plain in zip(groups, content["groups"], strict=True):
        for line, data in zip(group.lines, plain["lines"], strict=True):
            assert data["seconds"]["median"] == line.seconds.median
            assert data["samples"] == list(line.samples)
            assert set(data) >= {"name", "at", "rate", "unit", "bound", "share", "extra"}
        for pair in plain["pairs"]:
            assert set(pair) == {"name", "against", "times"}
            assert all(math.isfinite(value) for value in pair["times"].values())
    markdown = written[1].read_text()
    for text in ("# Benchmark", "run this", "## Layer", "## Prefill: 20 tokens", "## Growth: m"):
        assert text in markdown
    assert "NOT QUIET: others used up to 1.50 cores" in markdown


def test_tables_show_times_and_ratios(groups):
    found = {table.title: table for table in tables.tables(groups)}
    assert all(len(row) == len(t.header) for t in found.values() for row in t.rows)
    loading = found["Load: a file of 5 MB"]
    assert loading.rows[1] == ["llm_int8", "2.00", "3", "2", "9"]
    assert found["Growth: threads"].rows == [["decode", "4,000", "2,000", "x 2.00"]]
    decode = found["Decode: 5 tokens after 20"]
    times = groups[2].times("relative", "float32").median
    assert decode.rows[0][0] == "float32"
    assert decode.rows[0][-1].startswith(f"{times:.3g}\n(")
    assert decode.rows[1][-1] == tables.NONE
    layer, ratio = found["Layer"], found["Layer: times faster than"]
    price = 1 / groups[0].times("jaxint8 topk", layers.OFF).median - 1
    assert layer.rows[0][layer.header.index("topk")].startswith(f"{100 * price:+.0f} %\n(")
    assert ratio.header[2:] == ["xla\nf32", "xla\nbf16", "xla\nint8"]


def test_ratio_table_tells_calls_from_programs():
    samples = {name: [1.0, 3.0] for name in layers.OTHERS}
    samples |= {layers.OURS: [0.5, 1.0], layers.CALLED: [1.0, 2.0]}
    group = results.Group(
        suite="layer",
        what={"k": 8, "n": 4, "m": 2},
        lines=[results.line(name, values) for name, values in samples.items()],
        pairs=results.pairs(samples, layers.PAIRS),
    )
    table = tables.ratio_table([group])
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row == {
        "k x n": "8 x 4",
        "m": "2",
        **{f"{name}": "2.5\n(2.25-2.75)" for name in ("ort\nint8", "torch\nf32", "torch\nint8")},
        **{
            f"{name}\ncalled": "1.25\n(1.12-1.38)"
            for name in ("ort\nint8", "torch\nf32", "torch\nint8")
        },
    }
    assert "| 2.5 (2.25-2.75) |" in tables.to_markdown(table)


def test_plots_are_made_for_what_was_measured(groups, tmp_path):
    pytest.importorskip("matplotlib")
    figures = plots.figures(groups)
    assert set(figures) == {"layer.png", "model.png", "growth.png"}
    assert set(plots.figures(groups[:1])) == {"layer.png"}
    for name, figure in figures.items():
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


# The command line


def outcome(capsys, *arguments):
    status = bench.main(["prog", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suites=layer,speed"], "suites: expected any of layer, decode, prefill, load, growth"),
        (["--suites="], "or all, got nothing"),
        (["--shapes=4096"], "shapes: expected some like 4096x11008, got '4096'"),
        (["--shapes=0x8"], "got '0x8'"),
        (["--m=1,0"], "m: expected whole numbers from 1, got '0'"),
        (["--rounds=0"], "flag --rounds=0"),
        (["--wait_quiet=-1"], "flag --wait_quiet=-1"),
        (["--suites=decode", "--model=nothing"], "nothing: no such file"),
        (["--suites=load", "--model=nothing"], "nothing: no such file"),
        (["layer"], "unexpected argument 'layer'"),
    ],
)
def test_bench_refuses_bad_input_in_one_line(capsys, arguments, message):
    status, out, err = outcome(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("prog: ") and err.count("\n") == 1


def test_bench_refuses_an_output_that_is_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = outcome(capsys, "--suites=layer", f"--output={tmp_path / 'file'}")
    assert status == 2 and "File exists" in err


def test_bench_help_names_suites_and_flags(capsys):
    status, out, err = outcome(capsys, "--help")
    assert (status, err) == (0, "")
    assert all(suite in out for suite in suites.SUITES)
    assert bench.__doc__.splitlines()[0] in out and "--[no]quick" in out


def test_bench_measures_and_reports(capsys, tmp_path, monkeypatch):
    quick = dataclasses.replace(suites.QUICK, effort=TINY)
    monkeypatch.setattr(suites, "QUICK", quick)
    monkeypatch.setenv("COLUMNS", "40")  # of which a pipe has none
    folder = tmp_path / "report"
    status, out, err = outcome(
        capsys,
        "--quick",
        "--suites=layer",
        "--shapes=64x32",
        "--m=3",
        "--rounds=2",
        "--nopeers",
        f"--output={folder}",
    )
    assert status == 0
    assert "64 x 32" in out and "price of outliers" in out and "…" not in out
    assert "layer: k 64, n 32, m 3" in err and "bench.json" in err
    content = json.loads((folder / "bench.json").read_text())
    assert [group["what"]["m"] for group in content["groups"]] == [3]
    assert content["environment"]["command"].startswith("prog --quick --suites=layer")
    assert content["environment"]["peers"] == {}
    assert all(len(line["samples"]) == 2 for line in content["groups"][0]["lines"])


def test_suites_run_in_order_and_decode_with_prefill(checkpoint, monkeypatch):
    monkeypatch.setattr(suites, "OURS", suites.GROWING)
    plan = dataclasses.replace(
        suites.QUICK,
        rounds=1,
        effort=TINY,
        prompt=16,
        new=3,
        peers=False,
        shapes=[(64, 32)],
        ms=[1],
    )
    found = list(suites.run(["decode", "layer", "prefill"], str(checkpoint), plan))
    assert [group.suite for group in found] == ["decode", "prefill", "layer"]
    assert found[0].engines() == ["relative", "relative, int8 head and cache"]
    assert found[0].times("relative", "relative, int8 head and cache") is not None
    assert bench.parse_suites(["load", "all"])[:2] == ["load", "layer"]
