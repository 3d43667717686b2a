"""Published models by name: what their config.json says of sizes, for planning without a network.

The surprising fact is what is not needed: no weight, no tokenizer, not even the whole file; what the
family leaves out has its default there.
"""

from __future__ import annotations

from typing import Any


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        **more,
    }


def _bloom(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "bloom",
        "vocab_size": 250880,
        "hidden_size": hidden,
        "n_layer": layers,
        "n_head": heads,
    }


def _llama(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, positions: int
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-30b": _opt(7168, 48, 56),
    "facebook/opt-66b": _opt(9216, 64, 72),
    "facebook/opt-175b": _opt(12288, 96, 96),
    "bigscience/bloom-560m": _bloom(1024, 24, 16),
    "bigscience/bloom-1b1": _bloom(1536, 24, 16),
    "bigscience/bloom-1b7": _bloom(2048, 24, 16),
    "bigscience/bloom-3b": _bloom(2560, 30, 32),
    "bigscience/bloom-7b1": _bloom(4096, 30, 32),
    "bigscience/bloom": _bloom(14336, 70, 112),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(576, 1536, 30, 9, 3, 49152, 8192)
    | {"tie_word_embeddings": True},
    "huggyllama/llama-7b": _llama(4096, 11008, 32, 32, 32, 32000, 2048),
    "huggyllama/llama-13b": _llama(5120, 13824, 40, 40, 40, 32000, 2048),
    "huggyllama/llama-30b": _llama(6656, 17920, 60, 52, 52, 32000, 2048),
    "huggyllama/llama-65b": _llama(8192, 22016, 80, 64, 64, 32000, 2048),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 28672, 80, 64, 8, 32000, 4096),
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "meta-llama/Meta-Llama-3-70B": _llama(8192, 28672, 80, 64, 8, 128256, 8192),
    "meta-llama/Llama-3.1-405B": _llama(16384, 53248, 126, 128, 8, 128256, 131072),
}


def preset(name: str) -> dict[str, Any]:
    """Returns the sizes of a published model, as its config.json has them.

    Args:
        name: "owner/name" or the name alone; case does not matter.

    Raises:
        ValueError: not known; the message lists those that are.

    """
    for known, described in PRESETS.items():
        if name.lower() in (known.lower(), known.lower().split("/")[1]):
            return described
    raise ValueError(
        f"{name!r} is neither a folder with a config.json nor one of {', '.join(PRESETS)}"
    )
