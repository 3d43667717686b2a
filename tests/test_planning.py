"""Planning: against the arrays that loading makes, the compiler's own account, and the paper's table."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxint8.cli import hardware
from jaxint8.cli import plan as command
from jaxint8.models import generate, planning
from jaxint8.models.cache import capacity_for, init_cache
from jaxint8.models.config import QUANTIZATIONS, DecoderConfig, QuantizationConfig
from jaxint8.models.families import family_from_hf
from jaxint8.models.families.presets import PRESETS, preset
from jaxint8.models.loading import load
from jaxint8.models.placement import Placement
from jaxint8.models.sampling import Draw, Sampling, row_keys

GOLDENS = Path(__file__).parent / "goldens"
INT8 = QUANTIZATIONS["llm_int8"]
INT8_CACHE = dataclasses.replace(INT8, kv_cache="int8")


def config_of(described: dict[str, Any]) -> DecoderConfig:
    return family_from_hf(described).config_from_hf(described)


@pytest.mark.parametrize("case", ["llama_biases", "llama_gqa_tied", "opt_post_norm", "bloom"])
@pytest.mark.parametrize(
    "method",
    [None, INT8, dataclasses.replace(INT8, lm_head="int8"), INT8_CACHE],
    ids=["float", "int8", "head", "cache"],
)
def test_weights_and_cache_are_those_of_a_loaded_model(
    case: str, method: QuantizationConfig | None
) -> None:
    model = load(GOLDENS / case, quantization=method, dtype="bfloat16")
    shapes = planning.abstract_params(model.config, method, "bfloat16")
    made, planned = (
        [(path, x.shape, x.dtype) for path, x in jax.tree.leaves_with_path(tree)]
        for tree in (model.params, shapes)
    )
    assert made == planned
    found = planning.plan(model.config, quantization=method, batch=3, context=40)
    assert found.weights == model.nbytes
    start = jnp.zeros((3,), jnp.int32)
    cache = init_cache(model.config, capacity_for(40), start, jnp.bfloat16, method)
    assert found.cache == sum(a.nbytes for a in jax.tree.leaves((cache.keys, cache.values)))


@pytest.mark.parametrize("case", ["llama_gqa_tied", "bloom"])
def test_weights_are_those_that_each_device_of_a_mesh_holds(case: str) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    model = load(GOLDENS / case, mesh=mesh)
    found = planning.plan(model.config, quantization=INT8, dtype="float32", mesh=(2, 4), context=40)
    for device in mesh.devices.flat:
        shards = [s for x in jax.tree.leaves(model.params) for s in x.addressable_shards]
        assert sum(s.data.nbytes for s in shards if s.device == device) == found.weights


def compiled_prompt(
    config: DecoderConfig,
    method: QuantizationConfig | None,
    dtype: Any,
    batch: int,
    tokens: int,
    placement: Placement | None = None,
) -> Any:
    """The compiler's account of running a prompt; nothing is allocated."""
    params = planning.abstract_params(config, method, dtype, placement)
    rows: Any = None
    if placement is not None:
        specs = placement.param_specs(params)

        def spread(leaf: ShapeDtypeStruct, spec: P) -> ShapeDtypeStruct:
            sizes = [placement.model if name else 1 for name in (*spec, *[None] * leaf.ndim)]
            shape = tuple(n * size for n, size in zip(leaf.shape, sizes, strict=False))
            at = NamedSharding(placement.mesh, spec)
            return ShapeDtypeStruct(shape, leaf.dtype, sharding=at)

        params = jax.tree.map(spread, params, specs)
        rows = NamedSharding(placement.mesh, placement.rows_spec)
    keys = row_keys([[1]] * batch, 0)
    lowered = generate._prefill.lower(
        params,
        ShapeDtypeStruct((batch, tokens), jnp.int32, sharding=rows),
        ShapeDtypeStruct((batch,), jnp.int32, sharding=rows),
        Draw.of(Sampling()),
        keys if placement is None else np.asarray(jax.random.key_data(keys)),
        config=config,
        quantization=method,
        placement=placement,
    )
    return lowered.compile().memory_analysis()


SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "bloom": {
        "model_type": "bloom",
        "vocab_size": 4096,
        "hidden_size": 512,
        "n_layer": 3,
        "n_head": 8,
    },
}


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
@pytest.mark.parametrize(
    ("family", "portable", "batch", "tokens"),
    [("llama", False, 1, 512), ("bloom", True, 4, 256)],
)
def test_the_compiler_takes_what_was_planned(
    family: str, portable: bool, batch: int, tokens: int, kv_cache: Literal["float", "int8"]
) -> None:
    config = config_of(SMALL[family])
    implementation = "xla" if portable else "cpu"
    method = dataclasses.replace(INT8, implementation=implementation, kv_cache=kv_cache)
    planned = planning.plan(
        config,
        quantization=method,
        dtype="float32",
        batch=batch,
        context=tokens,
        portable=portable,
    )
    found = compiled_prompt(config, method, jnp.float32, batch, tokens)
    # Tokens and keys are next to nothing.
    assert 0 <= found.argument_size_in_bytes - planned.weights < 10_000
    assert 0 <= found.output_size_in_bytes - planned.cache < 10_000
    # A kernel's scratch on a CPU is its own and not in the compiler's account.
    most = planned.activations + (planned.workspace if portable else 0)
    assert 0.5 * most < found.temp_size_in_bytes <= most


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1024), (2, 2048)])
def test_a_prompt_whose_attention_takes_most_takes_what_was_planned(
    batch: int, tokens: int, kv_cache: Literal["float", "int8"]
) -> None:
    """The scores of one block of queries, and not of all that the compiler could run side by side."""
    described = {"num_key_value_heads": 8, "intermediate_size": 512, "vocab_size": 512}
    config = config_of({**SMALL["llama"], **described})
    method = dataclasses.replace(INT8, implementation="cpu", kv_cache=kv_cache)
    how = {"quantization": method, "dtype": "float32", "batch": batch, "context": tokens}
    most = planning.plan(config, **how).activations
    found = compiled_prompt(config, method, jnp.float32, batch, tokens)
    assert 0.5 * most < found.temp_size_in_bytes <= most


@pytest.mark.parametrize(
    ("mesh", "batch", "tokens", "implementation"),
    [((2, 4), 4, 128, "cpu"), ((1, 8), 1, 512, "xla")],
)
def test_a_mesh_takes_what_was_planned_where_pure_jax_runs(
    mesh: tuple[int, int], batch: int, tokens: int, implementation: str
) -> None:
    """Also where a kernel is there, but other rows have a say in outliers."""
    config = config_of({**SMALL["llama"], "intermediate_size": 4096})
    method = dataclasses.replace(INT8, implementation=implementation)
    how = {"dtype": "float32", "mesh": mesh, "batch": batch, "context": tokens}
    portable = implementation == "xla"
    planned = planning.plan(config, quantization=method, portable=portable, **how)
    devices = jax.make_mesh(mesh, ("data", "model"), (AxisType.Auto,) * 2)
    placement = Placement.of(config, devices, method)
    found = compiled_prompt(config, method, jnp.float32, batch, tokens, placement)
    assert found.temp_size_in_bytes <= planned.activations + planned.workspace


@pytest.mark.parametrize("name", ["facebook/opt-175b", "bigscience/bloom"])
def test_the_largest_fit_eight_devices(name: str) -> None:
    """One layer of the real width on a mesh of eight; the layers are alike, and so share temporaries."""
    whole = config_of(preset(name))
    planned = planning.plan(whole, quantization=INT8, mesh=(1, 8))
    assert planned.total < 24 * 2**30 < planning.plan(whole, quantization=INT8, mesh=(1, 4)).total
    config = dataclasses.replace(whole, layers=1)
    method = dataclasses.replace(INT8, implementation="cpu")
    mesh = jax.make_mesh((1, 8), ("data", "model"), (AxisType.Auto,) * 2)
    placement = Placement.of(config, mesh, method)
    one = planning.plan(config, quantization=method, dtype="float32", mesh=(1, 8), context=512)
    found = compiled_prompt(config, method, jnp.float32, 1, 512, placement)
    assert 0 <= found.argument_size_in_bytes - one.weights < 10_000
    assert 0 <= found.output_size_in_bytes - one.cache < 10_000
    assert found.temp_size_in_bytes <= one.activations + one.workspace


def test_presets_are_as_large_as_their_names_say() -> None:
    for name, described in PRESETS.items():
        config = config_of(described)
        params = planning.abstract_params(dataclasses.replace(config, layers=1), None, "float32")
        layer = sum(x.size for x in jax.tree.leaves(params.pop("layers")))
        count = config.layers * layer + sum(x.size for x in jax.tree.leaves(params))
        assert preset(name.upper()) == preset(name.split("/")[1]) == described
        if name == "bigscience/bloom":
            assert math.isclose(count, 176.2e9, rel_tol=0.001)
            continue
        size = name.lower().replace("llama-3.1", "").replace("1b1", "1.1b").replace("1b7", "1.7b")
        size = size.replace("7b1", "7.1b").split("-")
        number = next(part for part in reversed(size) if part[-1] in "bm" and part[0].isdigit())
        named = float(number[:-1]) * (1e9 if number[-1] == "b" else 1e6)
        # Names are rounded, downwards as well: "30b" has 32.5 billion.
        assert math.isclose(count, named, rel_tol=0.09), (name, count)


def test_more_of_anything_takes_more() -> None:
    config = config_of(preset("llama-2-70b-hf"))
    how: dict[str, Any] = {"quantization": INT8, "mesh": (1, 8)}
    base = planning.plan(config, batch=2, context=1024, **how)
    assert planning.plan(config, batch=4, context=1024, **how).cache == 2 * base.cache
    assert planning.plan(config, batch=2, context=2048, **how).activations > base.activations
    assert planning.plan(config, batch=2, context=1024, portable=True, **how).workspace > (
        base.workspace
    )
    spread = planning.plan(config, quantization=INT8, mesh=(2, 4), batch=2, context=1024)
    assert spread.weights > base.weights
    assert spread.cache == base.cache  # half the sequences, twice the heads
    assert planning.plan(config, quantization=None, mesh=(1, 8)).weights > 1.9 * base.weights
    for given, message in (
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"context": 5000}, "context: 5000 exceeds the model's 4096 positions"),
        ({"mesh": (0, 1)}, "devices: expected at least 1"),
        ({"quantization": QUANTIZATIONS["zeropoint"]}, "quantization: only symmetric codes"),
    ):
        with pytest.raises(ValueError, match=message):
            planning.plan(config, **{**how, **given})


def test_the_table_of_the_paper() -> None:
    rows = hardware.rows(planning.RESERVE)
    for row, of in zip(rows, hardware.CLASSES, strict=True):
        assert (row["8_bit_weights"], row["16_bit_weights"]) == (of.int8, of.half)
        # With the cache of 2,048 tokens, T5-11B, whose attention is 16 times as wide as the model, is too much.
        expected = "GPT-J-6B" if of.int8 == "T5-11B" else of.int8
        assert (row["8_bit_all"], row["16_bit_all"]) == (expected, of.half)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(**given: object) -> int:
        return command.main(["jaxint8-plan", *(f"--{k}={v}" for k, v in given.items())])

    (tmp_path / "config.json").write_text(json.dumps(SMALL["llama"]))
    assert run(model=tmp_path, device_memory="512MiB", reserve="1MiB", json="true") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found] == ["llm_int8", "bfloat16"]
    for row in found:
        parts = ("weights", "cache", "activations", "workspace", "reserve")
        assert row["total"] == sum(row[part] for part in parts)
        assert row["fits"] == (row["total"] <= 512 * 2**20)
        most = {"quantization": INT8 if row["method"] == "llm_int8" else None}
        config, batch = config_of(SMALL["llama"]), row["largest_batch"]
        totals = [
            planning.plan(config, batch=b, reserve=2**20, **most).total for b in (batch, batch + 1)
        ]
        assert totals[0] <= 512 * 2**20 < totals[1]
        assert row["fewest_devices"] == 1
    assert run(model=tmp_path, reserve="1MiB", json="true", kv_cache="int8") == 0
    coded, half = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in (coded, half)] == ["llm_int8:kv_int8", "bfloat16"]
    # Heads have 64 dimensions: 64 codes and a scale of 4 bytes, where bfloat16 has 128 bytes.
    assert coded["cache"] / half["cache"] == (64 + 4) / 128
    assert (half["cache"], coded["weights"]) == (found[1]["cache"], found[0]["weights"])

    def odd(**changes: object) -> Path:
        folder = tmp_path / "-".join(changes)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**SMALL["llama"], **changes}))
        return folder

    name = "facebook/opt-175b"
    assert run(model=name, devices=8, device_memory="24GiB", methods="llm_int8,bfloat16") == 0
    text = capsys.readouterr().out
    assert "1x8 devices of 24.0 GiB" in text
    assert " fits " in text
    assert " too much " in text
    # SmolLM2: 134.5 million parameters, 106.2 million of them in int8, with 4 bytes for each of 155,520 rows.
    assert run(model="demo", methods="llm_int8", json="true") == 0
    (demo,) = json.loads(capsys.readouterr().out)
    assert 0 < demo["weights"] - (106_168_320 + 2 * 28_311_552 + 4 * 30 * 5184) < 200_000
    assert run(model="demo", methods="all", json="true") == 0
    told = capsys.readouterr()
    planned = [row["method"] for row in json.loads(told.out)]
    assert {"float32", "topk"} <= set(planned) and "zeropoint" not in planned
    assert "left out, as they cannot be planned for: zeropoint, " in told.err
    assert run(model="demo", reserve=0, json="true", methods="llm_int8", lm_head="int8") == 0
    (demo,) = json.loads(capsys.readouterr().out)
    assert demo["reserve"] == 0
    assert run(table="paper") == 0
    assert "GPT-2 1.3B" in capsys.readouterr().out
    for given, message in (
        ({}, "model: is needed"),
        ({"model": "nonsense"}, "model: 'nonsense' is neither a folder with a config.json nor"),
        ({"model": "bloom", "device_memory": "many"}, "device_memory: expected a size"),
        ({"model": "bloom", "mesh": "2x4", "devices": 4}, "mesh: 2x4 is not 4 devices"),
        ({"model": "bloom", "methods": "int3"}, "methods: "),
        ({"model": "bloom", "methods": "topk,zeropoint"}, "methods: zeropoint cannot be planned"),
        ({"model": "bloom", "methods": "bfloat16", "kv_cache": "int8"}, "kv_cache: int8 goes with"),
        (
            {"model": "bloom", "device_memory": 24},
            "device_memory: expected at least 1MiB, as in 24GiB, got '24'",
        ),
        ({"model": "bloom", "device_memory": "9" * 400}, "device_memory: expected a size"),
        ({"model": "bloom", "reserve": "-1"}, "reserve: expected a size"),
        ({"model": "bloom", "devices": "9" * 30}, "flag --devices=999"),
        ({"model": "bloom", "batch": "9" * 400}, "flag --batch=999"),
        ({"model": "bloom", "mesh": f"1x{'9' * 30}"}, "mesh: expected at most 65536 devices, got"),
        ({"model": "bloom", "methods": "bfloat16", "lm_head": "int8"}, "lm_head: int8 goes with"),
        ({"model": "bloom", "kv_cache": "int4"}, "flag --kv_cache=int4"),
        ({"model": odd(num_attention_heads=0)}, "config.json: model config: 'num_attention_heads'"),
        (
            {"model": odd(rope_scaling="yarn")},
            "config.json: llama config: 'rope_scaling': expected",
        ),
        ({"model": odd(num_hidden_layers=10**9)}, "config.json: llama config: layers must be at"),
        ({"model": odd(hidden_act={})}, "config.json: not a config as expected (TypeError: "),
    ):
        assert run(**given) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
