"""BLOOM: layer norms, ALiBi instead of positions, a norm right after the embedding, tanh GELU.

The surprise of the checkpoints is ``query_key_value``: one matrix, whose rows are q, k and v of the
first head, then those of the second, and so on.
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
    number,
    size,
    start_token,
    table_source,
    token_ids,
)


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Translates a Hugging Face ``config.json``, with the defaults of its BloomConfig.

    ALiBi is defined at any distance; ``max_positions`` is the length of training (``seq_length``,
    where the file has it).
    """
    hidden = size(config, "hidden_size", "n_embed")
    heads = size(config, "n_head", "num_attention_heads")
    if config.get("apply_residual_connection_post_layernorm", False):
        raise ValueError(
            "bloom config: apply_residual_connection_post_layernorm=true is not supported"
        )
    return DecoderConfig(
        family="bloom",
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        layers=size(config, "n_layer", "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mlp_size=4 * hidden,
        max_positions=size(config, "seq_length", default=2048),
        embedding_size=hidden,
        norm="layer",
        norm_epsilon=number(config, "layer_norm_epsilon", 1e-5),
        embedding_norm=True,
        positions="alibi",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        start_token=start_token(config.get("bos_token_id", 1)),
        end_tokens=end_tokens(config.get("eos_token_id", 2)),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Writes what `config_from_hf` reads."""
    return {
        "architectures": [FAMILY.architectures[0]],
        "model_type": FAMILY.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "seq_length": config.max_positions,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        **token_ids(config),
    }


def weight_map(config: DecoderConfig) -> WeightMap:
    """Names in a Hugging Face checkpoint."""
    sources: WeightMap = {
        ("embedding",): table_source(
            "transformer.word_embeddings.weight",
            config.vocab_size,
            config.embedding_size,
            "embedding",
        )
    }
    sources |= norm_sources(config, ("embedding_norm",), "transformer.word_embeddings_layernorm")
    for index in range(config.layers):
        stem = f"transformer.h.{index}"
        names = {
            "attention_norm": (f"{stem}.input_layernorm",),
            "qkv": (f"{stem}.self_attention.query_key_value",) * 3,
            "out": (f"{stem}.self_attention.dense",),
            "mlp_norm": (f"{stem}.post_attention_layernorm",),
            "up": (f"{stem}.mlp.dense_h_to_4h",),
            "down": (f"{stem}.mlp.dense_4h_to_h",),
        }
        sources |= layer_sources(config, index, names)
    sources |= norm_sources(config, ("final_norm",), "transformer.ln_f")
    if not config.tied_embeddings:
        sources[("lm_head", "weight")] = table_source(
            "lm_head.weight", config.vocab_size, config.embedding_size, "head"
        )
    return sources


FAMILY = Family(
    name="bloom",
    architectures=("BloomForCausalLM", "BloomModel"),
    model_type="bloom",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weight_map=weight_map,
    optional_prefix="transformer.",
)
