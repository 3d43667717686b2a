"""Conversion on disk: the bytes of load and save, whatever interrupts it, and memory that stays small."""

import functools
import hashlib
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from test_loading import write_gguf

from jaxint8.checkpoint import CheckpointError, codes, open_checkpoint, writer
from jaxint8.cli import quantize
from jaxint8.models import saving
from jaxint8.models.converting import convert
from jaxint8.models.families import family_from_hf
from jaxint8.models.loading import load
from jaxint8.models.tokenizer import Tokenizer

GOLDENS = Path(__file__).parent / "goldens"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tensors(directory: Path) -> dict[str, tuple[Any, bytes]]:
    reader = open_checkpoint(directory)
    read = {name: reader.read(name) for name in reader.names()}
    return {name: (array.dtype, array.tobytes()) for name, array in read.items()}


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    "case", ["llama_gqa_tied", "llama_biases", "opt_post_norm", "bloom", "bitsandbytes"]
)
def test_it_is_what_load_and_save_write(tmp_path: Path, case: str) -> None:
    model = load(GOLDENS / case)
    saving.save(model, tmp_path / "saved")
    done = convert(GOLDENS / case, tmp_path / "new", dtype="float32", shard_bytes=20_000)
    assert len(done.files) > 2
    assert done.reused_bytes == 0
    assert done.output_bytes == sum(len(data) for _, data in tensors(tmp_path / "saved").values())
    found, expected = tensors(tmp_path / "new"), tensors(tmp_path / "saved")
    if case == "bitsandbytes":  # whose vectors are float16: kept here, float32 in a loaded model
        found = {
            name: found[name] if found[name][0] != np.float16 else value
            for name, value in expected.items()
        }
    assert found == expected
    assert_same(load(tmp_path / "new").params, model.params)
    # What else the configuration said is still there.
    described = json.loads((tmp_path / "new" / "config.json").read_text())
    assert described["quantization_config"]["load_in_8bit"]
    assert (
        described.items()
        >= {
            key: value
            for key, value in json.loads((GOLDENS / case / "config.json").read_text()).items()
            if key not in ("quantization_config", "dtype", "architectures")
        }.items()
    )
    lines = (tmp_path / "new" / "SHA256SUMS").read_text().splitlines()[1:]
    assert dict(line.split("  ")[::-1] for line in lines) == {
        name: hashlib.sha256(data).hexdigest()
        for name, data in contents(tmp_path / "new").items()
        if name != "SHA256SUMS"
    }


def test_floats_keep_their_dtype_or_take_the_one_asked_for(tmp_path: Path) -> None:
    convert(GOLDENS / "bitsandbytes", tmp_path / "kept")
    source, kept = (open_checkpoint(d) for d in (GOLDENS / "bitsandbytes", tmp_path / "kept"))
    name = "model.embed_tokens.weight"
    assert source.read(name).tobytes() == kept.read(name).tobytes()
    convert(GOLDENS / "llama_mha", tmp_path / "half", dtype="bfloat16")
    half = open_checkpoint(tmp_path / "half")
    assert (half.dtype(name), half.dtype("lm_head.weight")) == ("bfloat16", "bfloat16")
    assert half.dtype("model.norm.weight") == np.float32
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_from_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "m.gguf"
    tokens = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [chr(ord("!") + i) for i in range(94)] + ["</s>", "Ġ"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1] * 94 + [3, 1],
        "tokenizer.ggml.eos_token_id": 94,
    }
    tokens["tokenizer.ggml.tokens"][0] = "ab"
    write_gguf(source, GOLDENS / "llama_gqa_tied", gguf.GGMLQuantizationType.F32, **tokens)
    first = load(source)
    # Blocks so small that each holds one head, whose rows a GGUF file has in another order.
    monkeypatch.setattr(codes, "row_blocks", functools.partial(codes.row_blocks, elements=100))
    convert(source, tmp_path / "new")
    monkeypatch.undo()
    again = load(tmp_path / "new")
    assert_same(again.params, first.params)
    assert again.config == first.config
    assert isinstance(again.tokenizer, Tokenizer)
    assert again.tokenizer.encode("ab") == [0]


# Interruptions

KILLER = """
import os, pathlib, shutil, signal, sys
from jaxint8.models.converting import convert

source, folder = map(pathlib.Path, sys.argv[1:])
REAL = {name: getattr(os, name) for name in ("pwrite", "fsync", "replace", "unlink", "rmdir")}

def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}

def child(target, deadly):
    # Converts in a process of its own that is killed before its call number `deadly`.
    pid = os.fork()
    if pid == 0:
        calls = 0
        def wrap(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call
        for name, real in REAL.items():
            setattr(os, name, wrap(real))
        try:
            convert(source, target, shard_bytes=20_000)
        finally:
            pathlib.Path(folder, "calls").write_text(str(calls))
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)

assert not child(folder / "clean", 0)
expected = contents(folder / "clean")
calls = int((folder / "calls").read_text())
tried = 0
# Every step of the end, where files are moved, and every seventh before it.
for deadly in [*range(1, calls - 40, 7), *range(max(1, calls - 40), calls + 1)]:
    target = folder / "target"
    assert child(target, deadly), deadly
    found = contents(target)
    if "config.json" in found:  # whoever finds one finds all of the model
        assert {name: found.get(name) for name in expected} == expected, deadly
    assert not child(target, 0)
    assert contents(target) == expected, deadly
    assert sorted(p.name for p in target.iterdir()) == sorted(expected), deadly
    shutil.rmtree(target)
    tried += 1
# Ten in a row in the same folder.
for kill in range(10):
    assert child(folder / "target", 10 + 2 * (kill % 3)), kill
assert not child(folder / "target", 0)
assert contents(folder / "target") == expected
print(calls, tried)
"""


def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(GOLDENS / "llama_biases"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    calls, tried = map(int, done.stdout.split())
    assert calls > 80
    assert tried > 40


def test_what_was_finished_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = GOLDENS / "llama_biases"
    done = convert(source, tmp_path / "clean", shard_bytes=20_000)
    first, second = (path.name for path in done.files[:2])
    sha256 = writer._sha256

    def interrupted(path: Path) -> str:
        if path.name == f"{second}.tmp":
            raise KeyboardInterrupt
        return sha256(path)

    target = tmp_path / "target"
    monkeypatch.setattr(writer, "_sha256", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, shard_bytes=20_000)
    monkeypatch.undo()
    assert not any(target.glob("*.safetensors"))
    again = convert(source, target, shard_bytes=20_000)
    assert 0 < again.reused_bytes < 20_000
    assert contents(target) == contents(tmp_path / "clean")
    # Called once more it only looks at the checksums, and mends what they do not fit.
    broken = bytearray((target / first).read_bytes())
    broken[-1] ^= 1
    (target / first).write_bytes(broken)
    mended = convert(source, target, shard_bytes=20_000)
    assert mended.reused_bytes == done.output_bytes - again.reused_bytes
    assert contents(target) == contents(tmp_path / "clean")
    # Another source, or other arguments, begin anew.
    shutil.copytree(source, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").touch()
    assert convert(tmp_path / "other", target, replace=True, shard_bytes=20_000).reused_bytes == 0


def refused(message: str, source: Path, target: Path, **arguments: Any) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(source, target, **arguments)
    assert "\n" not in str(caught.value)


def test_errors_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(GOLDENS / "llama_mha", source)
    held = {n: r.read(n).copy() for r in [open_checkpoint(source)] for n in r.names()}
    held["model.layers.1.mlp.down_proj.weight"][5, 3] = np.nan
    writer.write_safetensors(source / "model.safetensors", held)
    refused(r"'model.layers.1.mlp.down_proj.weight': row 5 holds a non-finite", source, target)
    assert not target.exists()
    source = GOLDENS / "llama_mha"
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        refused(r"target: \d+ bytes are needed, 1000 are free", source, target)
    assert not target.exists()
    convert(source, target)
    before = contents(target)
    refused("target: there is a model already", GOLDENS / "opt_bare_gelu", target)
    with writer._only_writer(target):
        refused("target: another process is writing there", source, target)
    assert contents(target) == before
    refused("nowhere: no such file", tmp_path / "nowhere", target)
    with pytest.raises(ValueError, match="dtype: expected one of float32, float16, bfloat16"):
        convert(source, target, dtype="int4")
    with pytest.raises(ValueError, match="shard_bytes: expected at least 1"):
        convert(source, target, shard_bytes=0)


CHILD = """
import sys
import jax.numpy as jnp
from jaxint8.models.converting import convert

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

before = status("VmRSS")
convert(*sys.argv[1:])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    config = {
        "model_type": "bloom",
        "vocab_size": 8192,
        "hidden_size": 1024,
        "n_layer": 1,
        "n_head": 16,
    }
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    family = family_from_hf(config)
    row = np.random.default_rng(0).normal(size=8192 * 1024).astype(np.float32)
    shapes = {
        part.name: part.stored_shape
        for found in family.weight_map(family.config_from_hf(config)).values()
        for part in found.parts
    }
    held = {name: row[: np.prod(shape)].reshape(shape) for name, shape in shapes.items()}
    writer.write_checkpoint(source, held)
    total = sum(tensor.nbytes for tensor in held.values())
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(tmp_path / "new")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    # Per thread a block of a megabyte, what its arithmetic makes of it, and nothing that is kept: less than the
    # smallest of the large tensors.
    assert int(done.stdout) < 30e6 < row.nbytes < total


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(**given: object) -> int:
        return quantize.main(["jaxint8-quantize", *(f"--{k}={v}" for k, v in given.items())])

    model, output = GOLDENS / "opt_pre_norm", tmp_path / "new"
    assert command(model=model, output=output, shard_size="20KB") == 0
    assert "new: 0." in capsys.readouterr().out
    assert len(list(output.glob("model-*.safetensors"))) > 2
    assert command(model=model, output=output, shard_size="20KB") == 0
    assert "converted before" in capsys.readouterr().out
    for given, message in (
        ({"model": model}, "output: is needed"),
        ({"model": model, "output": output, "shard_size": "2 pounds"}, "shard_size: expected a "),
        ({"model": GOLDENS / "bloom", "output": output}, "there is a model already"),
        (
            {"model": output, "output": f"{output}/.", "overwrite": "true"},
            "is the folder of --model, expected another one",
        ),
        (
            {
                "model": output / "model.safetensors.index.json",
                "output": output,
                "overwrite": "true",
            },
            "is the folder of --model, expected another one",
        ),
        ({"model": model, "output": output, "shard_size": "9" * 400}, "shard_size: expected a "),
        (
            {"model": model, "output": model / "config.json"},
            "config.json is a file, expected a fold",
        ),
    ):
        assert command(**given) == 2
        assert message in capsys.readouterr().err
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        status = command(model=model, output=tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err
    assert (status, told.count("\n")) == (2, 1)
    assert f"File too large: '{tmp_path / 'full'}/.partial/model.safetensors.tmp'" in told
