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
    required,
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


def rope_scaling_from_hf(parameters: Mapping[str, Any]) -> RopeScaling | None:
    """Reads a ``rope_scaling`` (or, newer, ``rope_parameters``) object of a config.json.

    Raises:
        ValueError: a kind of scaling other than none, linear and llama3.

    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(parameters["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(parameters["factor"]),
            low_frequency_factor=float(parameters["low_freq_factor"]),
            high_frequency_factor=float(parameters["high_freq_factor"]),
            original_positions=int(parameters["original_max_position_embeddings"]),
        )
    raise ValueError(
        f"llama config: rope_scaling type {kind!r} is not supported; known: default, linear, llama3"
    )


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Translates a Hugging Face ``config.json``, with the defaults of its LlamaConfig."""
    hidden, heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    # Written as "rope_scaling" plus "rope_theta" up to transformers 4, as one object since.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"llama config: hidden_act {activation!r} is not supported; "
            f"known: {', '.join(_ACTIVATIONS)}"
        )
    bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        family="llama",
        vocab_size=required(config, "vocab_size"),
        hidden_size=hidden,
        layers=required(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        mlp_size=required(config, "intermediate_size"),
        max_positions=config.get("max_position_embeddings", 2048),
        embedding_size=hidden,
        norm="rms",
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        positions="rope",
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=rope_scaling_from_hf(rope),
        activation=_ACTIVATIONS[activation],
        gated=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        start_token=config.get("bos_token_id"),
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

    """
    key = "llama."
    hidden, heads = (
        required(metadata, key + "embedding_length"),
        required(metadata, key + "attention.head_count"),
    )
    scaling = metadata.get(key + "rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(
            f"GGUF metadata: rope scaling {scaling!r} is not supported; known: none, linear"
        )
    factor = float(metadata.get(key + "rope.scaling.factor", 1.0))
    end = metadata.get("tokenizer.ggml.eos_token_id")
    vocabulary = metadata.get(key + "vocab_size") or len(
        required(metadata, "tokenizer.ggml.tokens")
    )
    return DecoderConfig(
        family="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        layers=required(metadata, key + "block_count"),
        heads=heads,
        kv_heads=metadata.get(key + "attention.head_count_kv", heads),
        head_dim=metadata.get(key + "attention.key_length", hidden // heads),
        mlp_size=required(metadata, key + "feed_forward_length"),
        max_positions=required(metadata, key + "context_length"),
        embedding_size=hidden,
        norm="rms",
        norm_epsilon=float(required(metadata, key + "attention.layer_norm_rms_epsilon")),
        positions="rope",
        rope_theta=float(metadata.get(key + "rope.freq_base", 10000.0)),
        rope_scaling=RopeScaling(kind="linear", factor=factor) if scaling == "linear" else None,
        rope_factors="rope_freqs.weight" in tensors,
        activation="silu",
        gated=True,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        tied_embeddings="output.weight" not in tensors,
        start_token=metadata.get("tokenizer.ggml.bos_token_id"),
        end_tokens=end_tokens(end),
    )


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
