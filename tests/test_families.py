"""Families: configs, names of tensors, the row order of GGUF, and errors that say what is known."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import CASES, GOLDENS, build, load_case, run

from jaxint8.checkpoint import open_checkpoint
from jaxint8.models.config import RopeScaling
from jaxint8.models.families import FAMILIES, family_from_gguf, family_from_hf
from jaxint8.models.families.base import Fused, Part, deinterleave_rows

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 96,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BLOOM = {"model_type": "bloom", "vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config_of(described: dict):
    return family_from_hf(described).config_from_hf(described)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_used_once_in_its_shape(case: str) -> None:
    config, _, _ = load_case(case)
    family = family_from_hf(json.loads((GOLDENS / case / "config.json").read_text()))
    reader = open_checkpoint(GOLDENS / case)
    parts = [part for source in family.weight_map(config).values() for part in source.parts]
    rows = {name: np.zeros(reader.shape(name)[0], np.int64) for name in reader.names()}
    for part in parts:
        assert part.stored_shape == reader.shape(part.name)
        for stored, _ in part.runs(slice(0, part.shape[0])):
            rows[part.name][stored] += 1
    assert all((count == 1).all() for count in rows.values())


def test_roles() -> None:
    config = config_of(LLAMA)
    kinds = {path: source.kind for path, source in FAMILIES[0].weight_map(config).items()}
    assert kinds["embedding",] == "embedding"
    assert kinds["layers", 1, "qkv", "weight"] == "linear"
    assert kinds["layers", 1, "mlp_norm", "weight"] == "vector"
    assert kinds["lm_head", "weight"] == "head"
    assert sum(kind == "linear" for kind in kinds.values()) == 8


def test_defaults_are_those_of_hugging_face() -> None:
    llama = config_of(LLAMA)
    assert (llama.kv_heads, llama.head_dim, llama.rope_theta) == (4, 8, 10000.0)
    assert (llama.norm_epsilon, llama.max_positions, llama.tied_embeddings) == (1e-6, 2048, False)
    opt = config_of(OPT)
    assert (opt.norm_first, opt.final_norm, opt.qkv_bias, opt.tied_embeddings) == (True,) * 4
    assert (opt.embedding_size, opt.max_positions, opt.position_offset) == (32, 2048, 2)
    assert (opt.start_token, opt.end_tokens) == (2, (2,))
    bloom = config_of(BLOOM)
    assert (bloom.norm_epsilon, bloom.max_positions, bloom.mlp_size) == (1e-5, 2048, 128)
    assert (bloom.start_token, bloom.end_tokens, bloom.tied_embeddings) == (1, (2,), True)
    older = {**BLOOM, "n_embed": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    kept = ("hidden_size", "n_layer", "n_head")
    assert config_of({key: older[key] for key in older if key not in kept}) == bloom


@pytest.mark.parametrize("case", CASES)
def test_configs_survive_writing(case: str) -> None:
    config = dataclasses.replace(load_case(case)[0], end_tokens=(3, 5), start_token=1)
    for there in (config, dataclasses.replace(config, end_tokens=(7,))):
        family = family_from_hf({"model_type": config.family})
        written = json.loads(json.dumps(family.config_to_hf(there)))
        assert family_from_hf(written) is family
        assert family.config_from_hf(written) == there


def test_rotary_divisors_cannot_be_written() -> None:
    config = dataclasses.replace(config_of(LLAMA), rope_factors=True)
    with pytest.raises(ValueError, match="no place in config.json"):
        FAMILIES[0].config_to_hf(config)


def test_rope_as_written_before_transformers_5() -> None:
    case = "llama_rope_llama3"
    new = json.loads((GOLDENS / case / "config.json").read_text())
    rope = new.pop("rope_parameters")
    old = {**new, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert config_of(old) == load_case(case)[0]
    older = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}
    scaling = config_of(older).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


def test_several_end_tokens() -> None:
    assert config_of({**LLAMA, "eos_token_id": [5, 7]}).end_tokens == (5, 7)
    assert config_of({**LLAMA, "eos_token_id": 5}).end_tokens == (5,)
    assert config_of(LLAMA).end_tokens == ()


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; known: LlamaForCausalLM"),
        ({"model_type": "mpt"}, "mpt; known: .*OPTForCausalLM, .*BloomForCausalLM"),
        ({}, "none given"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({**LLAMA, "hidden_act": "mish"}, "hidden_act 'mish'"),
        ({**OPT, "activation_function": "mish"}, "activation_function 'mish'"),
        ({**BLOOM, "apply_residual_connection_post_layernorm": True}, "post_layernorm=true is not"),
        ({**BLOOM, "n_head": None}, "'n_head' or 'num_attention_heads' is missing"),
        ({**LLAMA, "num_key_value_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({**LLAMA, "num_hidden_layers": 0}, "'num_hidden_layers': expected an integer .*, got 0"),
        ({**LLAMA, "num_hidden_layers": 2.0}, "'num_hidden_layers': expected .*, got 2.0"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "layers must be at most 10000, got 1000000000"),
        ({**LLAMA, "num_attention_heads": 0}, "'num_attention_heads': expected an integer"),
        ({**LLAMA, "num_attention_heads": True}, "'num_attention_heads': expected .*, got True"),
        ({**LLAMA, "num_key_value_heads": 2.0}, "'num_key_value_heads': expected .*, got 2.0"),
        ({**LLAMA, "num_key_value_heads": 0}, "'num_key_value_heads': expected .*, got 0"),
        ({**LLAMA, "vocab_size": 10**12}, "'vocab_size': expected an integer from 1 to 2147483647"),
        ({**LLAMA, "max_position_embeddings": None}, "'max_position_embeddings' is missing"),
        ({**LLAMA, "max_position_embeddings": "abc"}, "'max_position_embeddings': expected"),
        ({**LLAMA, "max_position_embeddings": []}, "'max_position_embeddings': expected"),
        ({**OPT, "max_position_embeddings": 0}, "'max_position_embeddings': expected"),
        ({**OPT, "word_embed_proj_dim": 0}, "'word_embed_proj_dim': expected"),
        ({**BLOOM, "n_head": 0}, "'n_head' or 'num_attention_heads': expected an integer"),
        ({**BLOOM, "seq_length": 2.0}, "'seq_length': expected .*, got 2.0"),
        ({**LLAMA, "rms_norm_eps": "abc"}, "'rms_norm_eps': expected a number, got 'abc'"),
        ({**LLAMA, "rms_norm_eps": -1}, "norm_epsilon must be at least 0 and finite, got -1"),
        ({**LLAMA, "bos_token_id": []}, r"'bos_token_id': expected an id, .* got \[\]"),
        ({**LLAMA, "eos_token_id": ["</s>"]}, "'eos_token_id': expected an id or a list of ids"),
        ({**OPT, "eos_token_id": [[2]]}, "'eos_token_id': expected an id or a list of ids"),
        ({**BLOOM, "eos_token_id": 10**12}, "'eos_token_id': expected .*, got 1000000000000"),
        (
            {"architectures": "LlamaForCausalLM"},
            "'architectures': expected a list of names, got 'L",
        ),
        ({**LLAMA, "head_dim": 7}, "even head_dim, got 7"),
        ({key: LLAMA[key] for key in LLAMA if key != "hidden_size"}, "'hidden_size' is missing"),
    ],
)
def test_errors_name_what_is_wrong(described: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        config_of(described)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"rope_scaling": "yarn"}, "'rope_scaling': expected an object, got 'yarn'"),
        ({"rope_scaling": {"factor": 8.0}}, "factor 8.0 without a rope_type"),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, "'default' and type 'yarn'"),
        ({"rope_scaling": {"rope_type": None, "type": "yarn"}}, "'yarn' is not supported"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "yarn"}},
            "'yarn' is not supported",
        ),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            "rope_parameters and rope_scaling differ in 'factor': 2.0 and 4.0",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 .*, got 0.5"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor .*, got 0.25",
        ),
        ({"rope_theta": -1}, "rope_theta must be more than 0 and finite, got -1"),
        ({"rope_theta": 0}, "rope_theta must be more than 0"),
        ({"rope_theta": float("inf")}, "rope_theta must be more than 0 and finite, got inf"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be more than 0"),
        (
            {"rope_scaling": {"type": "linear", "factor": float("nan")}},
            "factor must be .*, got nan",
        ),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, r"\(4.0\) must be more than low_.*4.0"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, "expected an integer"),
    ],
)
def test_rotary_positions_that_are_not_carried_out_are_refused(
    described: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of({**LLAMA, **described})


def test_rotary_positions_may_be_written_twice() -> None:
    linear = {"rope_type": "linear", "type": "linear", "factor": 2.0}
    one = config_of({**LLAMA, "rope_theta": 5e5, "rope_scaling": linear})
    assert one.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    for rope in ({"rope_theta": 5e5}, {"rope_theta": 5e5, **linear}):
        both = {"rope_parameters": rope, "rope_scaling": linear, "partial_rotary_factor": 1.0}
        assert config_of({**LLAMA, **both}) == one


def interleave_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k, in the plainest way."""
    head_dim = rows.shape[0] // heads
    order = []
    for head in range(heads):
        for pair in range(head_dim // 2):
            order += [head * head_dim + pair, head * head_dim + head_dim // 2 + pair]
    return rows[np.array(order)]


def test_deinterleave_undoes_interleave() -> None:
    rows = np.arange(48 * 3).reshape(48, 3)
    assert not (interleave_rows(rows, 4) == rows).all()
    assert (deinterleave_rows(interleave_rows(rows, 4), 4) == rows).all()
    assert (deinterleave_rows(interleave_rows(rows[:, 0], 3), 3) == rows[:, 0]).all()


def test_fused_rows_are_found_run_by_run() -> None:
    # Three heads of four rows, twice: the tensor holds 0 to 3 for the first part, 4 to 7 for the
    # second, 8 to 11 for the first again.
    first, second = (Part("w", (12, 2), fused=Fused(3, 2, index)) for index in (0, 1))
    stored = np.arange(48).reshape(24, 2)
    assert first.stored_shape == stored.shape
    assert first.take(stored)[:, 0].tolist() == [0, 2, 4, 6, 16, 18, 20, 22, 32, 34, 36, 38]
    assert list(second.runs(slice(2, 9))) == [
        (slice(6, 8), slice(2, 4)),
        (slice(12, 16), slice(4, 8)),
        (slice(20, 21), slice(8, 9)),
    ]
    together = np.concatenate([first.take(stored), second.take(stored)])
    assert (first.store(together) == stored).all()


@pytest.mark.parametrize("case", ["llama_gqa_tied", "llama_biases", "llama_rope_llama3"])
def test_gguf_names_and_row_order(case: str) -> None:
    config, _, golden = load_case(case)
    family = FAMILIES[0]
    assert family.config_from_gguf is not None
    assert family.gguf_weight_map is not None
    hugging_face = family.weight_map(config)
    gguf = family.gguf_weight_map(config)
    assert gguf.keys() == hugging_face.keys()
    reader = open_checkpoint(GOLDENS / case)
    tensors = {}
    for path, source in gguf.items():
        for part, original in zip(source.parts, hugging_face[path].parts, strict=True):
            value = reader.read(original.name)
            if part.name.split(".")[2:3] in (["attn_q"], ["attn_k"]):
                heads = config.heads if "attn_q" in part.name else config.kv_heads
                value = interleave_rows(value, heads)
            tensors[part.name] = value
    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": config.hidden_size,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.block_count": config.layers,
        "llama.feed_forward_length": config.mlp_size,
        "llama.context_length": config.max_positions,
        "llama.attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.tokens": ["x"] * config.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
    }
    assert family_from_gguf(metadata) is family
    read = family.config_from_gguf(metadata, tensors.keys())
    # Llama 3's scaling comes as a tensor of divisors (see the decoder's tests).
    assert read == dataclasses.replace(config, rope_scaling=None)
    logits, _ = run(config, build(gguf, tensors), jnp.asarray(golden["tokens"]))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)


# Of a GGUF file, as little as can be.
GGUF_METADATA = {
    "llama.embedding_length": 32,
    "llama.attention.head_count": 4,
    "llama.block_count": 1,
    "llama.feed_forward_length": 48,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 96,
}


def test_gguf_linear_scaling_and_divisors() -> None:
    family = FAMILIES[0]
    assert family.config_from_gguf is not None
    assert family.gguf_weight_map is not None
    metadata = {
        **GGUF_METADATA,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.ggml.eos_token_id": 2,
    }
    config = family.config_from_gguf(metadata, ["output.weight", "rope_freqs.weight"])
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 4.0
    assert config.end_tokens == (2,)
    assert not config.tied_embeddings
    sources = family.gguf_weight_map(config)
    assert sources["rope_factors",].shape == (4,)
    assert sources["lm_head", "weight"].names == ("output.weight",)
    for changed, message in (
        ({"scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"scaling.factor": -1.0}, "factor must be more than 0"),
        ({"freq_base": 0.0}, "rope_theta must be more than 0"),
        ({"dimension_count": 4}, r"rope.dimension_count other than the head size \(8\)"),
    ):
        named = {f"llama.rope.{key}": value for key, value in changed.items()}
        with pytest.raises(ValueError, match=message):
            family.config_from_gguf({**metadata, **named}, [])
    for name, value, message in (
        ("llama.block_count", "2", "'llama.block_count': expected an integer .*, got '2'"),
        ("llama.block_count", 2.0, "'llama.block_count': expected an integer .*, got 2.0"),
        ("llama.attention.head_count", 0, "'llama.attention.head_count': expected an integer"),
        ("llama.attention.head_count", [4, 4], "'llama.attention.head_count': expected .*4, 4"),
        ("llama.attention.head_count_kv", [2, 2], "'llama.attention.head_count_kv': expected"),
        ("llama.feed_forward_length", [96, 96], "'llama.feed_forward_length': expected"),
        ("tokenizer.ggml.eos_token_id", "2", "'eos_token_id': expected an id"),
    ):
        with pytest.raises(ValueError, match=message):
            family.config_from_gguf({**metadata, name: value}, [])
    untold = {**metadata, "llama.vocab_size": 0, "tokenizer.ggml.tokens": "abc"}
    with pytest.raises(ValueError, match="'tokenizer.ggml.tokens': expected an array, got 'abc'"):
        family.config_from_gguf(untold, [])
    with pytest.raises(ValueError, match="unknown GGUF architecture gemma; known: llama"):
        family_from_gguf({"general.architecture": "gemma"})


@pytest.mark.parametrize(
    ("named", "factor"),
    [
        ({"scaling.factor": 4.0}, 4.0),
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.type": "linear", "scale_linear": 4.0, "scaling.factor": 2.0}, 2.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, None),
        ({"scaling.type": "linear"}, None),
        ({"dimension_count": 8}, None),
    ],
)
def test_gguf_scaling_is_that_of_llama_cpp(named: dict, factor: float | None) -> None:
    metadata = {
        **GGUF_METADATA,
        **{f"llama.rope.{key}": value for key, value in named.items()},
    }
    read = FAMILIES[0].config_from_gguf
    assert read is not None
    expected = None if factor is None else RopeScaling(kind="linear", factor=factor)
    assert read(metadata, []).rope_scaling == expected


def test_only_the_registry_knows_families() -> None:
    root = pathlib.Path(__file__).parents[1] / "models"
    for path in root.glob("*.py"):
        assert "families.llama" not in path.read_text()
        assert "families.opt" not in path.read_text()
        assert "families.bloom" not in path.read_text()
