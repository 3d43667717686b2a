"""OPT: layer norms, learned positions, biases everywhere, ReLU.

Two surprises of the checkpoints: row 0 of the position table belongs to position -2 (an offset left
over from its padding token), and the 350M model alone is post-norm, has no final norm, and embeds
tokens in another width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxint8.models.config import DecoderConfig
from jaxint8.models.families.base import (
    Family,
    WeightMap,
    end_tokens,
    layer_sources,
    norm_sources,
    size,
    size_or_null,
    start_token,
    table_source,
    token_ids,
)

_POSITION_OFFSET = 2
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Translates a Hugging Face ``config.json``, with the defaults of its OPTConfig."""
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    activation = config.get("activation_function", "relu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"opt config: activation_function {activation!r} is not supported; "
            f"known: {', '.join(_ACTIVATIONS)}"
        )
    pre_norm = bool(config.get("do_layer_norm_before", True))
    bias = bool(config.get("enable_bias", True))
    return DecoderConfig(
        family="opt",
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        layers=size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mlp_size=size(config, "ffn_dim"),
        max_positions=size(config, "max_position_embeddings", default=2048),
        embedding_size=size_or_null(config, "word_embed_proj_dim", hidden),
        norm="layer",
        norm_epsilon=1e-5,  # PyTorch's default; the config has no key for it
        norm_affine=bool(config.get("layer_norm_elementwise_affine", True)),
        norm_first=pre_norm,
        final_norm=pre_norm and not config.get("_remove_final_layer_norm", False),
        positions="learned",
        position_offset=_POSITION_OFFSET,
        activation=_ACTIVATIONS[activation],
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        start_token=start_token(config.get("bos_token_id", 2)),
        end_tokens=end_tokens(config.get("eos_token_id", 2)),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Writes what `config_from_hf` reads."""
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation)
    return {
        "architectures": [FAMILY.architectures[0]],
        "model_type": FAMILY.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "ffn_dim": config.mlp_size,
        "max_position_embeddings": config.max_positions,
        "word_embed_proj_dim": config.embedding_size,
        "activation_function": activation,
        "do_layer_norm_before": config.norm_first,
        "_remove_final_layer_norm": config.norm_first and not config.final_norm,
        "layer_norm_elementwise_affine": config.norm_affine,
        "enable_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied_embeddings,
        **token_ids(config),
    }


def weight_map(config: DecoderConfig) -> WeightMap:
    """Names in a Hugging Face checkpoint."""
    decoder, hidden, embedding = "model.decoder", config.hidden_size, config.embedding_size
    positions = config.max_positions + config.position_offset
    sources: WeightMap = {
        ("embedding",): table_source(
            f"{decoder}.embed_tokens.weight", config.vocab_size, embedding, "embedding"
        ),
        ("positions",): table_source(
            f"{decoder}.embed_positions.weight", positions, hidden, "embedding"
        ),
    }
    if embedding != hidden:
        sources[("project_in", "weight")] = table_source(
            f"{decoder}.project_in.weight", hidden, embedding, "linear"
        )
        sources[("project_out", "weight")] = table_source(
            f"{decoder}.project_out.weight", embedding, hidden, "linear"
        )
    for index in range(config.layers):
        stem = f"{decoder}.layers.{index}"
        names = {
            "attention_norm": (f"{stem}.self_attn_layer_norm",),
            "qkv": tuple(f"{stem}.self_attn.{x}_proj" for x in "qkv"),
            "out": (f"{stem}.self_attn.out_proj",),
            "mlp_norm": (f"{stem}.final_layer_norm",),
            "up": (f"{stem}.fc1",),
            "down": (f"{stem}.fc2",),
        }
        sources |= layer_sources(config, index, names)
    if config.final_norm:
        sources |= norm_sources(config, ("final_norm",), f"{decoder}.final_layer_norm")
    if not config.tied_embeddings:
        sources[("lm_head", "weight")] = table_source(
            "lm_head.weight", config.vocab_size, embedding, "head"
        )
    return sources


FAMILY = Family(
    name="opt",
    architectures=("OPTForCausalLM", "OPTModel"),
    model_type="opt",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weight_map=weight_map,
    optional_prefix="model.",
)
