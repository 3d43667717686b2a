"""Other engines that run language models on a CPU, each if it is installed: llama.cpp, CTranslate2.

Both are given the very weights that ours has, converted by their own tools: llama.cpp to Q8_0,
CTranslate2 to int8 with float32 activations. The surprising fact: both quantise the head and the
embedding too, which ours do only where their name says so.
"""

import contextlib
import ctypes
import importlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxint8 import kernels
from jaxint8.cli.benchmarks.engines import Engine, Times
from jaxint8.evaluation.benchmark.peers import installed
from jaxint8.models import DecoderConfig, LanguageModel

LLAMA, CTRANSLATE2 = "llama.cpp Q8_0", "ctranslate2 int8"


@contextlib.contextmanager
def peer_engines(
    model: LanguageModel, gguf: Path | None, threads: int, tokens: int
) -> Iterator[dict[str, Engine]]:
    """The engines that are installed and can run this model; converted files last as long.

    Args:
      model: in float32.
      gguf: the file that the model came from, if it was one; llama.cpp reads nothing else.
      threads: for each engine.
      tokens: most that a prompt and its continuation will have.
    """
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        if gguf is not None and installed("llama_cpp"):
            llama = LlamaCpp(gguf, Path(scratch) / "q8_0.gguf", threads, tokens)
            engines[LLAMA] = stack.enter_context(contextlib.closing(llama))
        if installed("ctranslate2") and CTranslate2.can_run(model.config):
            engines[CTRANSLATE2] = CTranslate2(model, Path(scratch) / "ctranslate2", threads)
        yield engines


class LlamaCpp:
    """llama.cpp through its C interface, as llama-cpp-python exposes it."""

    def __init__(self, gguf: Path, converted: Path, threads: int, tokens: int) -> None:
        """Converts the file to Q8_0 and loads it."""
        self._api: Any = importlib.import_module("llama_cpp")
        api = self._api
        # It reports every tensor on stderr; the callback must outlive the library's use of it.
        self._quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        how = api.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize, how.nthread = api.LLAMA_FTYPE_MOSTLY_Q8_0, True, threads
        source, target = str(gguf).encode(), str(converted).encode()
        if api.llama_model_quantize(source, target, ctypes.byref(how)) != 0:
            raise RuntimeError(f"llama.cpp could not convert {gguf}")
        self.step_bytes = converted.stat().st_size
        how = api.llama_model_default_params()
        # Its AMX kernels load a tile configuration that the processor refuses, which ends the process (0.3.36).
        how.use_extra_bufts = not kernels.cpu_features().get("amx_int8", False)
        self._model = api.llama_model_load_from_file(target, how)
        how = api.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = tokens
        how.n_threads = how.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, how)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp could not load {converted}")
        vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._vocabulary = vocabulary
        self._length = tokens

    def close(self) -> None:
        """Frees the model."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def __call__(self, prompts: Sequence[Sequence[int]], new: int) -> Times:
        """Continues one prompt; see `Engine`."""
        return self.greedy(prompts, new)[1]

    def greedy(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[int], Times]:
        """The tokens as well."""
        (prompt,) = prompts
        if len(prompt) + new > self._length:
            raise ValueError(f"expected at most {self._length} tokens, got {len(prompt) + new}")
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        start = time.perf_counter()
        made = [self._next(prompt)]
        first = time.perf_counter()
        while len(made) < new:
            made.append(self._next(made[-1:]))
        return made, Times(first - start, time.perf_counter() - first)

    def _next(self, tokens: Sequence[int]) -> int:
        array = (self._api.llama_token * len(tokens))(*tokens)
        batch = self._api.llama_batch_get_one(array, len(tokens))
        if self._api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama.cpp failed to decode")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._vocabulary,))))


class CTranslate2:
    """CTranslate2 with int8 weights and float32 activations, its fastest on a CPU."""

    COMPUTE = "int8_float32"

    def __init__(self, model: LanguageModel, folder: Path, threads: int) -> None:
        """Converts the model and loads it."""
        package: Any = importlib.import_module("ctranslate2")
        specification = ctranslate2_specification(model)
        specification.validate()
        specification.optimize(quantization=self.COMPUTE)
        folder.mkdir()
        specification.save(str(folder))
        self.step_bytes = (folder / "model.bin").stat().st_size
        self._generator = package.Generator(
            str(folder), compute_type=self.COMPUTE, inter_threads=1, intra_threads=threads
        )

    @staticmethod
    def can_run(config: DecoderConfig) -> bool:
        """Whether the model is a plain LLaMA, the one architecture that is converted here."""
        return (
            config.family == "llama"
            and config.rope_scaling is None
            and not config.rope_factors
            and not (config.qkv_bias or config.out_bias or config.mlp_bias)
        )

    def __call__(self, prompts: Sequence[Sequence[int]], new: int) -> Times:
        """Continues prompts; see `Engine`."""
        return self.greedy(prompts, new)[1]

    def greedy(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[list[int]], Times]:
        """The tokens as well."""
        seen: list[float] = []
        start = time.perf_counter()
        results = self._generator.generate_batch(
            [list(map(str, prompt)) for prompt in prompts],
            max_length=new,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            callback=lambda _: seen.append(time.perf_counter()),
        )
        end = time.perf_counter()
        return [r.sequences_ids[0] for r in results], Times(seen[0] - start, end - seen[0])


def ctranslate2_specification(model: LanguageModel) -> Any:
    """The model in the terms of CTranslate2; a token's name there is its id."""
    package: Any = importlib.import_module("ctranslate2")
    config, params = model.config, model.params
    one = config.kv_heads == config.heads
    specification = package.specs.TransformerDecoderModelSpec.from_config(
        config.layers,
        config.heads,
        activation=package.specs.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=config.rope_theta,
        num_heads_kv=None if one else config.kv_heads,
        head_dim=config.head_dim,
    )
    decoder = specification.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = _floats(params["embedding"])
    decoder.layer_norm.gamma = _floats(params["final_norm"]["weight"])
    head = params["embedding"] if config.tied_embeddings else params["lm_head"]["weight"]
    decoder.projection.weight = _floats(head)
    for theirs, layer in zip(decoder.layer, params["layers"], strict=True):
        theirs.self_attention.layer_norm.gamma = _floats(layer["attention_norm"]["weight"])
        theirs.self_attention.linear[0].weight = _floats(layer["qkv"]["weight"])
        theirs.self_attention.linear[1].weight = _floats(layer["out"]["weight"])
        theirs.ffn.layer_norm.gamma = _floats(layer["mlp_norm"]["weight"])
        up = _floats(layer["up"]["weight"])
        theirs.ffn.linear_0.weight = up[: config.mlp_size]
        theirs.ffn.linear_0_noact.weight = up[config.mlp_size :]
        theirs.ffn.linear_1.weight = _floats(layer["down"]["weight"])
    specification.register_vocabulary(list(map(str, range(config.vocab_size))))
    specification.config.bos_token = specification.config.eos_token = "0"
    specification.config.unk_token = "0"
    specification.config.layer_norm_epsilon = config.norm_epsilon
    return specification


def _floats(array: Any) -> np.ndarray:
    """A copy, for the conversion to int8 works in place."""
    return np.array(array, np.float32)
