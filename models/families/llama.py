"""LLaMA and its likes: RMS norms, rotary positions, grouped queries, a gated SiLU.

GGUF files of this architecture store the rows of q and k in another order than Hugging Face
checkpoints; the map says so (``interleaved=True``) and the loader puts them right.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxint8.models.config import DecoderConfig, RopeScaling
from jaxint8.models.families.base import (
    Family,
    Part,
    Source,
    WeightMap,
    end_tokens,
    layer_sources,
    norm_sources,
    number,
    required,
    size,
    size_or_null,
    start_token,
    table_source,
    token_ids,
)

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a config.json says of rotary positions, in one object.

    It is written as "rope_scaling" beside "rope_theta" up to transformers 4, as "rope_parameters"
    since, and by some as both.

    Raises:
        ValueError: they are no objects, say different things, or want a part of each head turned.

    """
    found: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"llama config: {key!r}: expected an object, got {given!r}")
        for name, value in given.items():
            if name in found and found[name] != value:
                raise ValueError(
                    f"llama config: rope_parameters and rope_scaling differ in {name!r}: "
                    f"{found[name]!r} and {value!r}"
                )
            found[name] = value
    for key in ("rope_theta", "partial_rotary_factor"):
        if found.get(key) is None:
            found[key] = config.get(key)
    if found["partial_rotary_factor"] not in (None, 1):
        raise ValueError(
            "llama config: partial_rotary_factor other than 1 is not supported, got "
            f"{found['partial_rotary_factor']!r}"
        )
    return found


def rope_scaling_from_hf(parameters: Mapping[str, Any]) -> RopeScaling | None:
    """Reads the scaling of `rope_parameters`.

    Raises:
        ValueError: a kind of scaling other than none, linear and llama3, two kinds, a factor
            without a kind, or numbers that cannot be.

    """
    # "type" is the older name; some files have both.
    kinds = [parameters[key] for key in ("rope_type", "type") if parameters.get(key) is not None]
    if kinds and kinds[0] != kinds[-1]:
        raise ValueError(
            f"llama config: rope_scaling: rope_type {kinds[0]!r} and type {kinds[-1]!r} differ"
        )
    if not kinds and parameters.get("factor") is not None:
        raise ValueError(
            f"llama config: rope_scaling: factor {parameters['factor']!r} without a rope_type"
        )
    kind = kinds[0] if kinds else "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=number(parameters, "factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=number(parameters, "factor"),
            low_frequency_factor=number(parameters, "low_freq_factor"),
            high_frequency_factor=number(parameters, "high_freq_factor"),
            original_positions=size(parameters, "original_max_position_embeddings"),
        )
    raise ValueError(
        f"llama config: rope_scaling type {kind!r} is not supported; known: default, linear, llama3"
    )


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Translates a Hugging Face ``config.json``, with the defaults of its LlamaConfig."""
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    rope = rope_parameters(config)
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"llama config: hidden_act {activation!r} is not supported; "
            f"known: {', '.join(_ACTIVATIONS)}"
        )
    bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        family="llama",
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        layers=size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=size_or_null(config, "num_key_value_heads", heads),
        head_dim=size_or_null(config, "head_dim", hidden // heads),
        mlp_size=size(config, "intermediate_size"),
        max_positions=size(config, "max_position_embeddings", default=2048),
        embedding_size=hidden,
        norm="rms",
        norm_epsilon=number(config, "rms_norm_eps", 1e-6),
        positions="rope",
        rope_theta=10000.0 if rope["rope_theta"] is None else number(rope, "rope_theta"),
        rope_scaling=rope_scaling_from_hf(rope),
        activation=_ACTIVATIONS[activation],
        gated=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        start_token=start_token(config.get("bos_token_id")),
        end_tokens=end_tokens(config.get("eos_token_id")),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Writes what `config_from_hf` reads.

    Raises:
        ValueError: the rotary frequencies have divisors of their own (a GGUF file's), for which a
            config.json has no key.
    """
    if config.rope_factors:
        raise ValueError(
            "llama config: rotary divisors of a GGUF file have no place in config.json"
        )
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation)
    return {
        "architectures": [FAMILY.architectures[0]],
        "model_type": FAMILY.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        # Both spellings, for readers before and since transformers 5.
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config.rope_scaling),
        "rope_parameters": {
            "rope_type": "default",
            **(_rope_to_hf(config.rope_scaling) or {}),
            "rope_theta": config.rope_theta,
        },
        "hidden_act": activation,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied_embeddings,
        **token_ids(config),
    }


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        written |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    return written


def weight_map(config: DecoderConfig) -> WeightMap:
    """Names in a Hugging Face checkpoint."""
    sources: WeightMap = {
        ("embedding",): table_source(
            "model.embed_tokens.weight", config.vocab_size, config.embedding_size, "embedding"
        )
    }
    for index in range(config.layers):
        stem = f"model.layers.{index}"
        names = {
            "attention_norm": (f"{stem}.input_layernorm",),
            "qkv": tuple(f"{stem}.self_attn.{x}_proj" for x in "qkv"),
            "out": (f"{stem}.self_attn.o_proj",),
            "mlp_norm": (f"{stem}.post_attention_layernorm",),
            "up": (f"{stem}.mlp.gate_proj", f"{stem}.mlp.up_proj"),
            "down": (f"{stem}.mlp.down_proj",),
        }
        sources |= layer_sources(config, index, names)
    sources |= norm_sources(config, ("final_norm",), "model.norm")
    if not config.tied_embeddings:
        sources[("lm_head", "weight")] = table_source(
            "lm_head.weight", config.vocab_size, config.embedding_size, "head"
        )
    return sources


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> DecoderConfig:
    """Translates the ``llama.*`` metadata of a GGUF file.

    Args:
        metadata: the file's keys and values, as Python ints, floats, strings and lists.
        tensors: names of its tensors; absent ones say that the head is tied, or that there are no
            biases.

    Raises:
        ValueError: metadata are missing, cannot be, or ask for what the decoder cannot do.

    """
    key = "llama."
    hidden = size(metadata, key + "embedding_length")
    heads = size(metadata, key + "attention.head_count")
    head_dim = size(metadata, key + "attention.key_length", default=hidden // heads)
    turned = size(metadata, key + "rope.dimension_count", default=head_dim)
    if turned != head_dim:
        raise ValueError(
            f"GGUF metadata: rope.dimension_count other than the head size ({head_dim}) is not "
            f"supported, got {turned}"
        )
    return DecoderConfig(
        family="llama",
        vocab_size=_gguf_vocabulary(metadata),
        hidden_size=hidden,
        layers=size(metadata, key + "block_count"),
        heads=heads,
        kv_heads=size(metadata, key + "attention.head_count_kv", default=heads),
        head_dim=head_dim,
        mlp_size=size(metadata, key + "feed_forward_length"),
        max_positions=size(metadata, key + "context_length"),
        embedding_size=hidden,
        norm="rms",
        norm_epsilon=number(metadata, key + "attention.layer_norm_rms_epsilon"),
        positions="rope",
        rope_theta=number(metadata, key + "rope.freq_base", 10000.0),
        rope_scaling=_gguf_scaling(metadata),
        rope_factors="rope_freqs.weight" in tensors,
        activation="silu",
        gated=True,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        tied_embeddings="output.weight" not in tensors,
        start_token=start_token(metadata.get("tokenizer.ggml.bos_token_id")),
        end_tokens=end_tokens(metadata.get("tokenizer.ggml.eos_token_id")),
    )


def _gguf_vocabulary(metadata: Mapping[str, Any]) -> int:
    if metadata.get("llama.vocab_size"):
        return size(metadata, "llama.vocab_size")
    tokens = required(metadata, "tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise ValueError(
            f"GGUF metadata: 'tokenizer.ggml.tokens': expected an array, got {tokens!r}"
        )
    return len(tokens)


def _gguf_scaling(metadata: Mapping[str, Any]) -> RopeScaling | None:
    """As llama.cpp: no type means linear, a factor of 0 none, and the factor has an older name."""
    kind = metadata.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"GGUF metadata: rope scaling {kind!r} is not supported; known: none, linear"
        )
    older = number(metadata, "llama.rope.scale_linear", 0.0)
    factor = number(metadata, "llama.rope.scaling.factor", older)
    return RopeScaling(kind="linear", factor=factor) if kind == "linear" and factor else None


def gguf_weight_map(config: DecoderConfig) -> WeightMap:
    """Names in a GGUF file."""
    sources: WeightMap = {
        ("embedding",): table_source(
            "token_embd.weight", config.vocab_size, config.embedding_size, "embedding"
        )
    }
    for index in range(config.layers):
        stem = f"blk.{index}"
        names = {
            "attention_norm": (f"{stem}.attn_norm",),
            "qkv": tuple(f"{stem}.attn_{x}" for x in "qkv"),
            "out": (f"{stem}.attn_output",),
            "mlp_norm": (f"{stem}.ffn_norm",),
            "up": (f"{stem}.ffn_gate", f"{stem}.ffn_up"),
            "down": (f"{stem}.ffn_down",),
        }
        sources |= layer_sources(config, index, names, interleaved=True)
    sources |= norm_sources(config, ("final_norm",), "output_norm")
    if not config.tied_embeddings:
        sources[("lm_head", "weight")] = table_source(
            "output.weight", config.vocab_size, config.embedding_size, "head"
        )
    if config.rope_factors:
        sources[("rope_factors",)] = Source(
            (Part("rope_freqs.weight", (config.head_dim // 2,)),), "vector"
        )
    return sources


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    model_type="llama",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weight_map=weight_map,
    optional_prefix="model.",
    gguf_architecture="llama",
    config_from_gguf=config_from_gguf,
    gguf_weight_map=gguf_weight_map,
)
