"""Models on meshes: each device holds its part, text and logits are those of one device."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from test_loading import assert_same

from jaxint8.cli.zeroshot import padded_logits
from jaxint8.models import generate, loading
from jaxint8.models.config import QUANTIZATIONS, QuantizationConfig
from jaxint8.models.decoder import forward
from jaxint8.models.generate import generate_tokens
from jaxint8.models.loading import load
from jaxint8.models.observe import linear_inputs
from jaxint8.models.placement import Placement

GOLDENS = Path(__file__).parent / "goldens"
# Heads, key-value heads, the MLP or the vocabulary are not multiples of some of these.
MESHES = [(1, 2), (1, 5), (2, 3), (1, 8), (8, 1)]


def mesh_of(shape, kind=AxisType.Auto):
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind), devices=devices)


# How layers behind attention and gate are split: along their outputs, or along their inputs.
GATHERED = QUANTIZATIONS["relative"]
ADDED = dataclasses.replace(GATHERED, reduction="fast")


@pytest.mark.parametrize("method", [GATHERED, ADDED], ids=["gathered", "added"])
@pytest.mark.parametrize("case", ["llama_gqa_tied", "bloom", "opt_post_norm", "bitsandbytes"])
def test_what_the_devices_hold_is_the_model(case, method, tmp_path):
    one = load(GOLDENS / case, quantization=method)
    for shape in MESHES:
        model = load(GOLDENS / case, quantization=method, mesh=mesh_of(shape))
        assert model.placement is not None
        assert model.placement.gathered == (method is GATHERED)
        assert_same(one.params, model.placement.on_host(model.params))
        for weight in jax.tree.leaves(model.params["layers"]):
            if weight.ndim == 2 and shape[1] > 1:  # no device holds a whole one
                assert weight.addressable_shards[0].data.nbytes * shape[1] == weight.nbytes
    model.save(tmp_path)
    assert_same(one.params, load(tmp_path, quantization=method).params)


@pytest.mark.parametrize(
    ("case", "method", "shape"),
    [
        ("llama_gqa_tied", "topk", (2, 2)),
        ("bloom", "relative", (1, 5)),
        ("llama_biases", "llm_int8", (2, 4)),
        ("llama_gqa_tied", "topk:kv_int8", (2, 4)),
        ("bloom", "relative:kv_int8", (1, 5)),
        ("opt_post_norm", "vectorwise:kv_int8", (8, 1)),
        ("opt_post_norm", "llm_int8", (2, 3)),
    ],
)
def test_logits_and_text_are_those_of_one_device(case, method, shape):
    one = load(GOLDENS / case, quantization=method)
    model = load(GOLDENS / case, quantization=method, mesh=mesh_of(shape, AxisType.Explicit))
    tokens = np.random.default_rng(1).integers(0, one.config.vocab_size, (3, 11))
    # What enters the head is the same to the bit; its float product is one of another shape.
    np.testing.assert_allclose(model.logits(tokens), one.logits(tokens), rtol=2e-6, atol=2e-6)
    prompts = [[int(t) for t in row[:n]] for row, n in zip(tokens, (3, 7, 11), strict=True)]

    def text(model, placement):
        return generate_tokens(
            model.config,
            model.params,
            prompts,
            5,
            quantization=model.quantization,
            placement=placement,
        )

    assert text(model, model.placement) == text(one, None)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_model_runs_within_the_mesh_that_it_was_loaded_on(kind):
    mesh = mesh_of((2, 2), kind)
    tokens = np.random.default_rng(1).integers(0, 64, (3, 11))
    sampling = generate.Sampling(temperature=1.0)

    def results(model):
        how = {"quantization": model.quantization, "placement": model.placement}
        made = generate_tokens(
            model.config, model.params, tokens.tolist(), 40, sampling=sampling, **how
        )
        found = linear_inputs(model.config, model.params, tokens, **how)
        logits = model.logits(tokens)
        # What comes back can be gone on with in the caller's mesh.
        return made, np.asarray(logits[:, -1]), np.asarray(found["layers.1.down"][:, -1])

    expected = results(load(GOLDENS / "llama_mha", quantization="topk", mesh=mesh))
    with jax.set_mesh(mesh):
        model = load(GOLDENS / "llama_mha", quantization="topk", mesh=mesh)
        made, logits, inputs = results(model)
        assert jax.typeof(model.logits(tokens)).sharding.mesh == jax.sharding.get_abstract_mesh()
        assert model.temporary_bytes(2, 8) > 0
    assert made == expected[0]
    np.testing.assert_array_equal(logits, expected[1])
    np.testing.assert_array_equal(inputs, expected[2])


def test_int8_head_and_sampling_are_those_of_one_device():
    method = QuantizationConfig(outliers=6.0, lm_head="int8")
    prompts = [[5, 6, 7], [9], [1, 2]]
    rows = []
    for mesh in (None, mesh_of((2, 3))):
        model = load(GOLDENS / "llama_mha", quantization=method, mesh=mesh)
        rows.append(
            generate_tokens(
                model.config,
                model.params,
                prompts,
                6,
                quantization=method,
                placement=model.placement,
                sampling=generate.Sampling(temperature=1.0, top_p=0.9),
                seed=3,
            )
        )
    assert rows[0] == rows[1]


def test_what_evaluation_looks_at_is_that_of_one_device():
    """Inputs of the layers without their padding, and logits of left-padded rows."""
    tokens = np.random.default_rng(2).integers(0, 96, (3, 9)).astype(np.int32)
    starts = np.array([0, 4, 8], np.int32)
    seen, logits = [], []
    for mesh in (None, mesh_of((2, 3))):
        model = load(GOLDENS / "llama_gqa_tied", quantization="relative", mesh=mesh)
        how = {"quantization": model.quantization, "placement": model.placement}
        seen.append(linear_inputs(model.config, model.params, tokens, **how))
        logits.append(np.asarray(padded_logits(model, tokens, starts)))
    assert seen[0].keys() == seen[1].keys()
    for name, x in seen[0].items():
        np.testing.assert_array_equal(seen[1][name], x, err_msg=name)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(
            logits[1][row, start:], logits[0][row, start:], rtol=2e-5, atol=2e-5
        )


def test_a_norm_in_front_of_the_layers_is_rounded_as_on_one_device():
    """BLOOM's, behind which a device takes its own columns, and not more of the norm."""
    one = load(GOLDENS / "bloom", quantization="relative")
    tokens = np.random.default_rng(2).integers(0, one.config.vocab_size, (3, 9)).astype(np.int32)

    def inputs(params):
        return linear_inputs(one.config, params, tokens, quantization=one.quantization)

    name = "layers.0.qkv"
    expected = jax.jit(inputs)(one.params)[name]
    for shape in ((1, 2), (1, 5), (2, 3)):
        model = load(GOLDENS / "bloom", quantization="relative", mesh=mesh_of(shape))
        how = {"quantization": model.quantization, "placement": model.placement}
        seen = linear_inputs(model.config, model.params, tokens, **how)
        np.testing.assert_array_equal(seen[name], expected)


def test_a_step_moves_activations_only():
    """Per layer: what enters its four linear layers; for the token: embedding and logits."""
    model = load(GOLDENS / "llama_gqa_tied", quantization="relative", mesh=mesh_of((2, 2)))
    placement, config = model.placement, model.config
    assert placement is not None
    draw = generate.Draw.of(generate.Sampling())
    how = {"config": config, "quantization": model.quantization, "placement": placement}
    keys = np.zeros((2, 2), np.uint32)
    args = model.params, np.ones((2, 32), np.int32), np.zeros(2, np.int32), draw, keys
    state = generate._prefill(*args, **how)
    assert state.cache.keys[0].addressable_shards[0].data.shape[:2] == (1, config.kv_heads // 2)
    steps = generate._compiled_steps(False)
    text = steps.lower(model.params, state, 4, draw, burst=1, **how).compile().as_text()
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    # One row's inputs, also of the head, and logits over "model", the chosen tokens over "data".
    inputs = [("f32", f"1,1,{k}") for k in (config.query_size, config.mlp_size)] * config.layers
    inputs += [("f32", f"1,1,{config.hidden_size}")] * (2 * config.layers + 1)
    logits = ("f32", f"1,1,{config.vocab_size}")
    assert sorted(gathered) == sorted([*inputs, logits, ("s32", "2")])
    added = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-reduce\(", text)
    assert [found for found in added if found[1]] == [("f32", f"1,1,{config.hidden_size}")]
    assert not re.search(r"(all-to-all|collective-permute)\(", text)


@pytest.mark.parametrize("method", [None, ADDED], ids=["float", "fast"])
def test_results_of_split_inputs_are_added_up(method):
    """No input is gathered; a sum for each of two layers, in the dtype of the activations."""
    one = load(GOLDENS / "llama_gqa_tied", quantization=method)
    model = load(GOLDENS / "llama_gqa_tied", quantization=method, mesh=mesh_of((1, 2)))
    config, placement = model.config, model.placement
    assert placement is not None and not placement.gathered
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 11))
    exact, found = np.asarray(one.logits(tokens)), np.asarray(model.logits(tokens))
    if (
        method is None
    ):  # the same sums in another order: a rounding for each term of each, of the size of logits
        terms = config.layers * (config.query_size + config.mlp_size)
        most = terms * np.finfo(np.float32).eps * np.abs(exact).max()
        assert np.abs(found - exact).max() <= most
    else:  # codes that err no more, each partial result rounded once: as near to float weights, within a factor of two
        plain = np.asarray(load(GOLDENS / "llama_gqa_tied", quantization=None).logits(tokens))
        assert 0 < np.abs(found - plain).max() <= 2 * np.abs(exact - plain).max()
    how = {"config": config, "quantization": model.quantization, "placement": placement}
    run = jax.jit(forward, static_argnames=tuple(how))
    text = run.lower(params=model.params, tokens=jnp.asarray(tokens), **how).compile().as_text()
    assert not re.search(r"(all-gather|all-to-all|collective-permute)\(", text)
    added = re.findall(r"= \(?f32\[([\d,]*)\].* all-reduce\(", text)
    assert {math.prod(map(int, shape.split(","))) for shape in added} == {33 * config.hidden_size}
    assert len(added) == 2 * config.layers + 1  # the embedding's


@pytest.mark.parametrize("method", [GATHERED, ADDED], ids=["gathered", "added"])
def test_a_process_reads_what_its_devices_hold(monkeypatch, method):
    """Of rows split over four processes, each reads a quarter."""
    checkpoint = loading.describe(GOLDENS / "llama_mha")
    read: dict[str, int] = {}
    original = type(checkpoint.reader).read

    def counting(self, name, rows=None):
        values = original(self, name, rows)
        read[name] = read.get(name, 0) + len(values)
        return values

    monkeypatch.setattr(type(checkpoint.reader), "read", counting)
    monkeypatch.setattr(Placement, "held", [2])
    monkeypatch.setattr(Placement, "put", lambda self, path, shards: shards[min(shards)])
    placement = Placement.of(checkpoint.config, mesh_of((1, 4)), method)
    loading._read(checkpoint, method, np.dtype(np.float32), placement)
    rows = {name: checkpoint.reader.shape(name)[0] for name in read}
    for name, count in read.items():
        along_inputs = () if placement.gathered else ("o_proj.weight", "down_proj.weight")
        whole = name.endswith(("norm.weight", *along_inputs))
        assert count == rows[name] // (1 if whole else 4), name


def test_other_axes_are_refused():
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"mesh: expected axes \('data', 'model'\), got"):
        load(GOLDENS / "llama_mha", mesh=mesh)
    for wrong in ("2x4", (2, 4)):
        with pytest.raises(TypeError, match="mesh: expected a jax.sharding.Mesh, got "):
            load(GOLDENS / "llama_mha", mesh=wrong)
    with pytest.raises(ValueError, match="quantization: what no kernel .* runs on one device only"):
        load(GOLDENS / "llama_mha", quantization="absmax", mesh=mesh_of((1, 2)))
    model = load(GOLDENS / "llama_mha", mesh=mesh_of((1, 2)))
    with pytest.raises(ValueError, match="placement: expected that of the model"):
        generate_tokens(model.config, model.params, [[1]], 1)
