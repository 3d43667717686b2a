"""Tests of the command lines, on a small random checkpoint that is loaded from disk like any other."""

import dataclasses
import json
import math
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from rich.table import Table

from jaxint8.cli import eval as eval_cli
from jaxint8.cli import generate as generate_cli
from jaxint8.cli import harness, measure, methods, screen, zeroshot
from jaxint8.evaluation import datasets, perplexity
from jaxint8.models import load
from jaxint8.models.config import QUANTIZATIONS
from jaxint8.models.observe import linear_inputs

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "llama_gqa_tied"
EVALUATED = ("bfloat16", "absmax", "llm_int8", "topk", "float32")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = "the quick brown fox jumps over the lazy dog " * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LLaMA of two layers whose tokens are letters, with room for 256 positions."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(GOLDEN / "model.safetensors", folder)
    config = json.loads((GOLDEN / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    vocab = {letter: i for i, letter in enumerate(["Ġ", *LETTERS])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def outcome(command, capsys, *arguments):
    """(exit status, stdout, stderr) of a command line."""
    status = command.main(["prog", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("command", [eval_cli, generate_cli])
def test_help_names_every_flag_and_method(command, capsys):
    status, out, err = outcome(command, capsys, "--help")
    assert (status, err) == (0, "")
    assert command.__doc__.splitlines()[0] in out
    assert all(name in out for name in methods.METHODS)
    assert "--model" in out and "--[no]help" in out
    assert "--kv_cache: <float|int8>" in out and ":kv_int8" in out
    assert ("or sweep" in " ".join(out.split())) == (command is eval_cli)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=llm_int8,int4"], "methods: expected any of float32, bfloat16, absmax,"),
        (["--methods=llm_int8,int4"], "or all, got 'int4'"),
        (["--methods="], "got nothing"),
        (["--tasks=foo=a.jsonl"], "or NAME=FILE with NAME one of these, got 'foo=a.jsonl'"),
        (["--kv_cache=int4"], "flag --kv_cache=int4"),
        (["--methods=float32,bfloat16", "--kv_cache=int8"], "kv_cache: int8 goes with the int8"),
        (["--methods=float32:kv_int8"], "or all, got 'float32:kv_int8'"),
        (["--methods=topk:x:kv_int8"], "'topk:x': option 'x' does not go with topk"),
        (["--methods=topk:x"], "methods: quantization: 'topk:x': option 'x' does not go with topk"),
        (["--window=1"], "flag --window=1: 1 is not integer >= 2"),
        (["--window=257"], "window: 257 exceeds the model's 256 positions"),
        (["--window=many"], "flag --window=many: invalid literal"),
        (["--max_tokens=0"], "flag --max_tokens=0"),
        (["--batch_size=0"], "flag --batch_size=0"),
        (["--tokens=3"], "Unknown command line flag 'tokens'"),
        (["demo"], "unexpected argument 'demo'"),
        (["--text=nothing.txt"], "text: nothing.txt cannot be read: No such file"),
        (["--model=nothing"], "nothing"),
    ],
)
def test_eval_refuses_bad_input_in_one_line(checkpoint, text, capsys, arguments, message):
    defaults = [f"--model={checkpoint}", f"--text={text}", "--methods=float32", "--window=32"]
    status, out, err = outcome(eval_cli, capsys, *defaults, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("prog: ") and err.count("\n") == 1


def test_eval_refuses_a_text_without_tokens_and_an_output_that_is_a_file(
    checkpoint, text, tmp_path, capsys
):
    short = tmp_path / "short.txt"
    short.write_text("a")
    arguments = [f"--model={checkpoint}", "--methods=float32", "--window=32"]
    status, _, err = outcome(eval_cli, capsys, *arguments, f"--text={short}")
    assert status == 2
    assert "text: expected at least 2 tokens to have one to score, got 1" in err
    status, _, err = outcome(eval_cli, capsys, *arguments, f"--text={text}", f"--output={text}")
    assert (status, err.count("\n")) == (2, 1)
    assert f"output: {text} cannot be made a folder: File exists" in err


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    """(report.json, folder, sources loaded) of one method of each kind, float32 last."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "text.txt").write_text(TEXT)
    loads = []
    with pytest.MonkeyPatch.context() as patch:
        load = measure.load
        patch.setattr(measure, "load", lambda *a, **k: (loads.append(k), load(*a, **k))[1])
        status = eval_cli.main(
            [
                "jaxint8-eval",
                f"--model={checkpoint}",
                f"--text={folder / 'text.txt'}",
                f"--methods={','.join(EVALUATED)}",
                "--max_tokens=144",
                "--window=48",
                f"--output={folder / 'report'}",
            ]
        )
    assert status == 0
    return json.loads((folder / "report" / "report.json").read_text()), folder / "report", loads


def test_eval_reports_every_method_in_the_order_asked(evaluated, checkpoint):
    report, folder, _ = evaluated
    assert (report["model"], report["text"], report["tokens"]) == (str(checkpoint), "text.txt", 144)
    assert report["environment"]["scored_tokens"] == 144 - 3
    assert report["environment"]["command"].startswith("jaxint8-eval --model=")
    rows = {row["method"]: row for row in report["rows"]}
    assert tuple(rows) == EVALUATED
    assert rows["float32"]["relative_change"] == 0.0
    assert rows["float32"]["mean_abs_logprob_change"] == 0.0
    base = rows["float32"]["perplexity"]
    for name, row in rows.items():
        assert row["relative_change"] == pytest.approx(row["perplexity"] / base - 1, abs=1e-12)
        assert (row["mean_abs_logprob_change"] > 0) == (name != "float32")
        assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0
    assert {path.name for path in folder.iterdir()} >= {"report.json", "report.md"}


def test_eval_float32_is_the_perplexity_of_the_model(evaluated, checkpoint):
    report, _, _ = evaluated
    row = next(row for row in report["rows"] if row["method"] == "float32")
    model = load(checkpoint, quantization=None, dtype=np.float32)
    ids = np.asarray(model.tokenizer.encode(TEXT, add_special_tokens=False)[:144])
    logprobs = []
    for start in range(0, 144, 48):
        piece = ids[start : start + 48]
        logits = np.asarray(model.logits(piece[None]), np.float64)[0]
        logs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        logprobs += [logs[i, piece[i + 1]] for i in range(len(piece) - 1)]
    assert row["perplexity"] == pytest.approx(math.exp(-np.mean(logprobs)), rel=1e-5)


def test_eval_measures_the_share_of_outliers(evaluated, checkpoint):
    report, _, _ = evaluated
    shares = {row["method"]: row["outlier_fraction"] for row in report["rows"]}
    assert shares["float32"] == shares["bfloat16"] == shares["absmax"] == 0.0
    # 8 of each row of qkv, out and up (32 wide) and of down (48 wide).
    assert shares["topk"] == pytest.approx(4 * 8 / (3 * 32 + 48))
    model = load(checkpoint, quantization="llm_int8")
    ids = model.tokenizer.encode(TEXT, add_special_tokens=False)[:144]
    found = values = 0
    for window in np.asarray(ids).reshape(3, 1, 48):
        inputs = linear_inputs(model.config, model.params, window, quantization=model.quantization)
        for x in inputs.values():
            found += 48 * np.sum(np.any(np.abs(x) >= 6.0, axis=(0, 1)))
            values += x.size
    assert shares["llm_int8"] == pytest.approx(found / values) and found > 0


def test_eval_loads_each_set_of_weights_once(evaluated):
    _, _, loads = evaluated
    kinds = [
        (call["quantization"] and call["quantization"].stored, call["dtype"]) for call in loads
    ]
    assert len(kinds) == len(set(kinds)) == 4  # bfloat16, int8 per tensor, int8 per row, float32


def test_eval_without_the_baseline_says_so(checkpoint, text, capsys):
    status, out, err = outcome(
        eval_cli, capsys, f"--model={checkpoint}", f"--text={text}", "--methods=topk", "--window=32"
    )
    assert status == 0
    assert "topk" in out
    assert "no changes without float32 among --methods" in err


def test_methods_expand_all_and_drop_repetitions():
    assert methods.parse_methods(["topk", "all"]) == [
        "topk",
        *(name for name in methods.METHODS if name != "topk"),
    ]
    groups = methods.by_weights(
        ["llm_int8", "float32", "topk:4", "absmax", "llm_int8:float_weights"]
    )
    assert groups == [["llm_int8", "topk:4"], ["float32"], ["absmax"], ["llm_int8:float_weights"]]
    assert methods.by_weights(["topk", "topk:kv_int8"]) == [["topk", "topk:kv_int8"]]
    # On a mesh they lie otherwise.
    assert methods.by_weights(["topk", "topk:fast"]) == [["topk"], ["topk:fast"]]
    assert methods.method("topk:16:fast").quantization.reduction == "fast"
    swept = methods.parse_methods(["float32", "sweep"])
    assert {"float32", "weights_only", "relative:6", "topk:8"} <= set(swept)


def test_methods_with_an_int8_cache_say_so_in_their_names():
    names = ["float32", "topk", "llm_int8:4:token", "topk:kv_int8", "absmax"]
    assert methods.with_kv_cache(names, "float") == names
    changed = methods.with_kv_cache(names, "int8")
    assert changed == ["float32", "topk:kv_int8", "llm_int8:4:token:kv_int8", "absmax:kv_int8"]
    for name in ("topk:16", "llm_int8:4:token"):
        plain = methods.method(name).quantization
        for with_cache in (f"{name}:kv_int8", name.replace(":", ":kv_int8:", 1)):
            quantization = methods.method(with_cache).quantization
            assert quantization == dataclasses.replace(plain, kv_cache="int8") != plain
    with pytest.raises(ValueError, match="kv_cache: int8 goes with the int8 methods only"):
        methods.with_kv_cache(["float32"], "int8")


def test_eval_with_an_int8_cache_is_another_method(checkpoint, text, tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = [f"--model={checkpoint}", f"--text={text}", "--window=48", "--nodecode"]
    arguments += [f"--output={folder}"]
    reports = []
    for flags in (["--methods=float32,topk"], ["--methods=float32,topk", "--kv_cache=int8"]):
        status, out, _ = outcome(eval_cli, capsys, *arguments, *flags)
        assert status == 0 and ("topk:kv_int8" in out) == (len(flags) > 1)
        reports.append(json.loads((folder / "report.json").read_text())["rows"])
    (base, plain), (same, found) = reports
    # What does not depend on the cache was not measured again.
    assert same == base and base["method"] == "float32"
    assert (plain["method"], found["method"]) == ("topk", "topk:kv_int8")
    assert found["model_bytes"] == plain["model_bytes"]
    assert found["outlier_fraction"] == plain["outlier_fraction"]
    model = load(checkpoint, quantization="topk:kv_int8")
    ids = model.tokenizer.encode(TEXT, add_special_tokens=False)
    expected = perplexity.score(model.logits, ids, window=48).perplexity
    assert found["perplexity"] == expected != plain["perplexity"]
    assert found["mean_abs_logprob_change"] != plain["mean_abs_logprob_change"]
    # Nor is a result of the one taken for one of the other.
    measured = folder / "measured"
    shutil.copy(measured / "text-topk.npz", measured / "text-topk-kv_int8.npz")
    status, _, err = outcome(
        eval_cli, capsys, *arguments, "--methods=float32,topk", "--kv_cache=int8"
    )
    assert status == 2 and "is of another model, method or text" in err


def test_decode_speed_needs_positions(checkpoint):
    model = measure.load_group(str(checkpoint), ["float32"])
    assert measure.decode_speed(model, range(10)) > 0
    few = measure.LanguageModel(
        measure.dataclasses.replace(model.config, max_positions=64), model.params
    )
    assert measure.decode_speed(few, range(10)) is None


def test_generate_prints_what_the_model_makes(checkpoint, capsys):
    model = load(checkpoint, quantization="topk")
    prompts = ["the quick", "brown fox jumps"]
    expected = model.generate(prompts, max_new_tokens=20)
    arguments = [f"--model={checkpoint}", "--max_new_tokens=20"]
    arguments += [f"--prompt={prompt}" for prompt in prompts]
    status, out, err = outcome(generate_cli, capsys, *arguments)
    assert status == 0
    assert out == "".join(f"{a}{b}\n\n" for a, b in zip(prompts, expected, strict=True))
    assert "40 tokens in" in err and "tokens/s" in err
    # The largest logits of an int8 head are exact, so the most likely tokens are the same.
    status, same, _ = outcome(generate_cli, capsys, *arguments, "--lm_head=int8")
    assert (status, same) == (0, out)


def test_generate_with_an_int8_cache(checkpoint, capsys, monkeypatch):
    prompt = "the quick brown fox"
    model = load(checkpoint, quantization="topk:kv_int8")
    (expected,) = model.generate([prompt], max_new_tokens=100)
    loads = []
    monkeypatch.setattr(
        generate_cli, "load", lambda *a, **k: (loads.append(k["quantization"]), load(*a, **k))[1]
    )
    arguments = [f"--model={checkpoint}", "--max_new_tokens=100", f"--prompt={prompt}"]
    for flags in (["--kv_cache=int8"], ["--method=topk:kv_int8"], ["--kv_cache=float"]):
        status, out, _ = outcome(generate_cli, capsys, *arguments, *flags)
        assert status == 0 and out.startswith(prompt)
        assert flags == ["--kv_cache=float"] or out == f"{prompt}{expected}\n\n"
    assert loads == [model.quantization, model.quantization, QUANTIZATIONS["topk"]]


def test_generate_streams_the_same_text(checkpoint, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("lazy dog\n\n")
    arguments = [f"--model={checkpoint}", f"--prompt_file={prompts}", "--temperature=1.5"]
    arguments += ["--top_k=20", "--top_p=0.9", "--seed=3", "--method=float32"]
    status, whole, _ = outcome(generate_cli, capsys, *arguments)
    assert status == 0
    status, streamed, _ = outcome(generate_cli, capsys, *arguments, "--stream")
    assert status == 0
    assert streamed.rstrip("\n") == whole.rstrip("\n")
    assert streamed.startswith("lazy dog") and len(streamed) > len("lazy dog\n")
    _, other, _ = outcome(generate_cli, capsys, *arguments, "--seed=4")
    assert other != whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompt: expected at least one"),
        (["--prompt="], "prompt: expected at least one, none of them empty"),
        (["--prompt=a", "--method=int4"], "method: expected one of float32,"),
        (["--prompt=a", "--method=all"], "relative, topk, got 'all'"),
        (["--prompt=a", "--method=float32", "--lm_head=int8"], "lm_head: int8 goes with"),
        (["--prompt=a", "--lm_head=int4"], "flag --lm_head=int4"),
        (["--prompt=a", "--method=float32", "--kv_cache=int8"], "kv_cache: int8 goes with"),
        (["--prompt=a", "--kv_cache=int4"], "flag --kv_cache=int4"),
        (["--prompt=a", "--prompt=b", "--stream"], "stream: expected one prompt, got 2"),
        (["--prompt=a", "--temperature=-1"], "temperature must be"),
        (["--prompt=a", "--top_p=2"], "top_p must be"),
        (["--prompt=a", "--max_new_tokens=0"], "flag --max_new_tokens=0"),
        (["--prompt=a", "--max_new_tokens=256"], "exceeds the model's 256 positions"),
        (["--prompt=a", "--model=nothing"], "nothing"),
        (["--prompt_file=nothing"], "prompt_file: nothing cannot be read"),
        (["--prompt=a\udcff"], "text: not Unicode (a lone surrogate at 1)"),
        (["--prompt=a", "--seed=-1"], "seed must be in 0 to 2**64 - 1, got -1"),
        (["--prompt=a", "--seed=99999999999999999999"], "seed must be in 0 to 2**64 - 1"),
    ],
)
def test_generate_refuses_bad_input_in_one_line(checkpoint, capsys, arguments, message):
    status, out, err = outcome(generate_cli, capsys, f"--model={checkpoint}", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("prog: ") and err.count("\n") == 1


def test_lines_of_a_prompt_file_end_where_lines_do(checkpoint, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_bytes("the\x0bquick\u2028fox\r\nlazy\n\r\n".encode())
    arguments = [f"--model={checkpoint}", f"--prompt_file={path}", "--max_new_tokens=1"]
    status, out, _ = outcome(generate_cli, capsys, *arguments)
    first, second, *rest = out.split("\n\n")
    assert (status, rest) == (0, [""])
    assert first.startswith("the\x0bquick\u2028fox") and second.startswith("lazy")


@pytest.mark.parametrize("stream", ["--stream", "--nostream"])
def test_a_reader_that_goes_ends_the_command_in_silence(checkpoint, stream):
    script = f"""
import os, sys
from jaxint8.cli import generate
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
arguments = ["--model={checkpoint}", "--prompt=the quick", "--max_new_tokens=4", "{stream}"]
sys.exit(generate.main(["prog", *arguments]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    "at", ["measured/text-float32.npz", "report.json", "measured/piqa-float32.jsonl"]
)
def test_a_full_disk_is_told_in_one_line(checkpoint, text, tmp_path, capsys, monkeypatch, at):
    out, tasks = tmp_path / "out", tmp_path / "piqa.jsonl"
    tasks.write_text(json.dumps({"goal": "the dog", "sol1": "jumps", "sol2": "fox", "label": 0}))
    opened = pathlib.Path.open

    def full(path, mode="r", *rest, **more):
        file = opened(path, mode, *rest, **more)
        if "r" in mode or pathlib.Path(at).name not in path.name:
            return file
        file.close()
        return opened(pathlib.Path("/dev/full"), mode, *rest, **more)

    monkeypatch.setattr(pathlib.Path, "open", full)
    arguments = [f"--model={checkpoint}", f"--text={text}", "--window=64", "--methods=float32"]
    arguments += ["--nodecode", f"--tasks=piqa={tasks}", f"--output={out}"]
    status, _, err = outcome(eval_cli, capsys, *arguments)
    assert status == 2
    assert f"No space left on device: '{out / at}'" in err.splitlines()[-1]


@pytest.mark.demo
def test_the_demo_text_under_the_protocol():
    """8,176 of 8,192 tokens in windows of 512; 37.4648 is PyTorch's float32 perplexity."""
    model = measure.load_group("demo", ["float32"])
    text = datasets.load_text("demo").text
    ids = model.tokenizer.encode(text, add_special_tokens=False)[:8192]
    score = perplexity.score(model.logits, ids)
    assert (score.tokens, score.scored) == (8192, 8176)
    assert score.perplexity == pytest.approx(37.4648, rel=1e-3)


def test_eval_of_tasks_is_reported_and_taken_up_again(checkpoint, tmp_path, capsys, monkeypatch):
    path = tmp_path / "piqa.jsonl"
    docs = [
        {"goal": "the dog", "sol1": "jumps", "sol2": "fox over", "label": i % 2} for i in (0, 1)
    ]
    path.write_text("\n".join(map(json.dumps, docs)))
    arguments = [f"--model={checkpoint}", "--text=", f"--tasks=piqa={path}", "--window=64"]
    arguments += ["--methods=float32,llm_int8,topk:kv_int8", f"--output={tmp_path / 'out'}"]
    status, out, err = outcome(eval_cli, capsys, *arguments)
    assert status == 0 and "zero-shot piqa" in out and "50.00 ± 50.00" in out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["rows"] == [] and [row["method"] for row in found["tasks"]] == [
        "float32",
        "llm_int8",
        "topk:kv_int8",
    ]
    # The same question with either answer right: one of two, whatever the model says.
    assert all(row["acc"] == row["acc_norm"] == 0.5 for row in found["tasks"])
    assert found["tasks"][0]["change"] == 0.0 and found["tasks"][0]["perplexity"] is None

    def again(*arguments):
        raise AssertionError("asked again")

    monkeypatch.setattr(zeroshot, "padded_logits", again)
    assert outcome(eval_cli, capsys, *arguments)[1] == out
    status, _, err = outcome(eval_cli, capsys, *arguments, f"--tasks=piqa,piqa={path}")
    assert status == 2 and err.count("\n") == 1


def test_eval_takes_up_a_text_again(checkpoint, text, tmp_path, capsys, monkeypatch):
    arguments = [f"--model={checkpoint}", f"--text={text}", "--window=32", "--methods=float32"]
    arguments += ["--nodecode", f"--output={tmp_path / 'out'}"]
    status, out, _ = outcome(eval_cli, capsys, *arguments)
    assert status == 0
    monkeypatch.setattr(measure, "measure", None)
    assert outcome(eval_cli, capsys, *arguments)[:2] == (0, out)
    status, _, err = outcome(eval_cli, capsys, *arguments, "--window=48")
    assert status == 2 and "is of another model, method or text" in err
    held = tmp_path / "out" / "measured" / "text-float32.npz"
    held.write_bytes(held.read_bytes()[:100])
    status, _, err = outcome(eval_cli, capsys, *arguments)
    assert status == 2 and f"output: {held} is damaged: remove it" in err.splitlines()[-1]


def test_eval_says_why_there_are_no_plots(checkpoint, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(screen.importlib.util, "find_spec", lambda name: None)
    arguments = [f"--model={checkpoint}", f"--text={text}", "--window=64", "--methods=float32"]
    status, _, err = outcome(
        eval_cli, capsys, *arguments, "--nodecode", f"--output={tmp_path / 'o'}"
    )
    assert status == 0
    assert err.splitlines()[-1] == "no plots without matplotlib: pip install 'jaxint8[plot]'"


def test_a_table_in_a_pipe_is_not_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table = Table("a", "b", title="a title")
    table.add_row("x" * 90, "y" * 90)
    screen.show(table)
    shown = capsys.readouterr().out
    assert "x" * 90 in shown and "y" * 90 in shown


def test_the_harness_that_is_missing_is_told_in_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert harness.main() == 2
    assert capsys.readouterr().err == (
        "jaxint8-lm-eval: needs lm-eval: pip install 'jaxint8[eval]'\n"
    )
