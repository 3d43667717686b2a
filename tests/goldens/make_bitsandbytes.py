"""Makes bitsandbytes/: a small model in int8 as bitsandbytes itself saves it.

Not run by the tests. Needs torch, transformers, accelerate and bitsandbytes: ``python
tests/goldens/make_bitsandbytes.py``, after make_goldens.py. Last run with bitsandbytes 0.50.2,
torch 2.13.0 (CPU) and transformers 5.23.0. Writes config.json, model.safetensors and logits.npz:
the logits of the model whose weights are the dequantised codes, in float32, for the tokens of
llama_gqa_tied.
"""

import pathlib

import numpy as np
import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SOURCE, TARGET = HERE / "llama_gqa_tied", HERE / "bitsandbytes"


def main() -> None:
    int8 = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        SOURCE, quantization_config=int8, device_map="cpu"
    )
    model.save_pretrained(TARGET)
    (TARGET / "generation_config.json").unlink()
    saved = safetensors.torch.load_file(TARGET / "model.safetensors")
    plain = transformers.AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    for name, weight in plain.state_dict().items():
        scale = saved.get(name.removesuffix("weight") + "SCB")
        if scale is not None:
            weight.copy_(saved[name].float() * scale.float()[:, None] / 127)
    tokens = np.load(SOURCE / "golden.npz")["tokens"]
    with torch.no_grad():
        logits = plain(torch.tensor(tokens).long()).logits
    np.savez_compressed(TARGET / "logits.npz", tokens=tokens, logits=logits.numpy())


if __name__ == "__main__":
    main()
