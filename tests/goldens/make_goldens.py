"""Makes the golden files of this folder: small random models and what Hugging Face computes.

Not run by the tests. Needs torch and transformers, which the package does not depend on; run it
with any Python that has them: ``python tests/goldens/make_goldens.py [CASE ...]``. Last run with torch 2.13.0
(CPU) and transformers 5.23.0. For every case it writes a folder with config.json and
model.safetensors exactly as transformers saves them, and golden.npz: tokens int32[2, 24], logits
float32[2, 24, vocab] and greedy int32[2, 8], the tokens generated greedily after the first 16 of
each row.
"""

import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
VOCABULARY, ROWS, LENGTH, PROMPT, NEW = 96, 2, 24, 16, 8

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
}
# Original length 64 and head_dim 16 put rotary wavelengths in all three ranges of the llama3 rule.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}

CASES = {
    "llama_mha": transformers.LlamaConfig(**LLAMA),
    "llama_gqa_tied": transformers.LlamaConfig(
        **LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True}
    ),
    "llama_biases": transformers.LlamaConfig(
        **LLAMA
        | {
            "num_key_value_heads": 1,
            "head_dim": 12,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-5,
        }
    ),
    "llama_rope_llama3": transformers.LlamaConfig(
        **LLAMA | {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512},
        rope_parameters=LLAMA3_ROPE,
    ),
    "llama_rope_linear": transformers.LlamaConfig(**LLAMA, rope_parameters=LINEAR_ROPE),
    "opt_pre_norm": transformers.OPTConfig(**OPT),
    "opt_post_norm": transformers.OPTConfig(
        **OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}
    ),
    "opt_bare_gelu": transformers.OPTConfig(
        **OPT
        | {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        }
    ),
    # Heads that are no power of two have slopes of two series.
    "bloom": transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=36, n_layer=2, n_head=6, layer_norm_epsilon=1e-4
    ),
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter anew: norms about 1, all else large enough that each of them shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and name.endswith("weight")
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.copy_(1 + 0.3 * noise if norm else noise * 1.5 / fan_in**0.5)


def make(name: str, config: transformers.PretrainedConfig) -> None:
    """Writes the folder of one case."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    # No end of sequence, so that greedy generation always has its full length.
    config.eos_token_id, config.bos_token_id, config.pad_token_id = None, 1, 0
    model = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        .eval()
        .float()
    )
    randomise(model, generator)
    model.tie_weights()
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    with torch.no_grad():
        logits = model(tokens).logits
        prompt = tokens[:, :PROMPT]
        greedy = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
        )
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy().astype(np.float32),
        greedy=greedy[:, PROMPT:].numpy().astype(np.int32),
    )
    print(name, f"logits {logits.std():.3f}", sorted(p.name for p in folder.iterdir()))


if __name__ == "__main__":
    print("torch", torch.__version__, "transformers", transformers.__version__)
    for case in sys.argv[1:] or CASES:
        make(case, CASES[case])
