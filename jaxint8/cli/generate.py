"""Continues prompts with a model under any method; text goes to stdout, its speed to stderr.

jaxint8-generate --prompt="The capital of France is"
jaxint8-generate --model=DIR --method=llm_int8 --prompt_file=FILE --temperature=0.8 --top_p=0.9
"""

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from absl import flags
from jax.sharding import Mesh

from jaxint8.cli import app, devices, methods
from jaxint8.evaluation import datasets
from jaxint8.models import LanguageModel, load
from jaxint8.models.generate import stream_tokens
from jaxint8.models.sampling import Sampling


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    return app.launch(__doc__ or "", define_flags, run, argv)


def define_flags(values: flags.FlagValues) -> None:
    """Adds the command's flags to `values`."""
    flags.DEFINE_string("model", "demo", "A checkpoint, or demo.", flag_values=values)
    flags.DEFINE_string("method", "topk", methods.HELP_ONE, flag_values=values)
    flags.DEFINE_enum(
        "lm_head",
        "float",
        ["float", "int8"],
        "Precision of the logits; int8 computes the largest ones once more in float.",
        flag_values=values,
    )
    methods.define_kv_cache(values)
    flags.DEFINE_multi_string(
        "prompt", [], "A text to continue; may be repeated.", flag_values=values
    )
    flags.DEFINE_string(
        "prompt_file", None, "A UTF-8 file with a prompt on each line.", flag_values=values
    )
    flags.DEFINE_integer(
        "max_new_tokens", 64, "Most tokens to add.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_float(
        "temperature", 0.0, "0: the most likely token each time.", flag_values=values
    )
    flags.DEFINE_integer(
        "top_k", None, "Draw from the k most likely tokens only.", flag_values=values
    )
    flags.DEFINE_float(
        "top_p", None, "Draw from the likeliest tokens of this share.", flag_values=values
    )
    flags.DEFINE_integer(
        "seed", 0, "The same seed (64 bits) gives the same text.", flag_values=values
    )
    flags.DEFINE_bool(
        "stream", False, "Show one prompt's text while it is made.", flag_values=values
    )
    devices.define_flags(values)


def run(options: app.Options) -> None:
    """Generates as the flags say."""
    with devices.session(options) as mesh:
        _generate(options, mesh)


def _generate(options: app.Options, mesh: Mesh | None) -> None:
    with app.input_errors():
        method = options["method"]
        try:
            how = methods.method(method)
        except ValueError as error:
            raise ValueError(f"method: {error}") from None
        prompts = _prompts(options["prompt"], options["prompt_file"])
        stream = options["stream"]
        if stream and len(prompts) > 1:
            raise ValueError(f"stream: expected one prompt, got {len(prompts)}")
        draw = {name: options[name] for name in ("temperature", "top_k", "top_p")}
        sampling = Sampling(**draw)
    with app.input_errors():
        model = _load(options, how, mesh)
        if model.tokenizer is None:
            raise ValueError(f"model: {options['model']} comes without a tokenizer")
        encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    clock = _Clock()
    steps = stream_tokens(
        model.config,
        model.params,
        encoded,
        options["max_new_tokens"],
        quantization=model.quantization,
        placement=model.placement,
        sampling=sampling,
        seed=options["seed"],
    )
    with app.input_errors():  # the prompts are checked at the first step
        first = next(steps)
    gained = clock.watch(itertools.chain([first], steps))
    if stream:
        print(prompts[0], end="", flush=True)
        for piece in model.tokenizer.decode_stream(token for (row,) in gained for token in row):
            print(piece, end="", flush=True)
        print()
    else:
        rows = [list(itertools.chain(*row)) for row in zip(*gained, strict=True)]
        for prompt, row in zip(prompts, rows, strict=True):
            print(f"{prompt}{model.tokenizer.decode(row)}\n")
    print(clock.summary(), file=sys.stderr)


def _load(options: app.Options, method: methods.Method, mesh: Mesh | None) -> LanguageModel:
    quantization = method.quantization
    for name in ("lm_head", "kv_cache"):
        if options[name] == "int8":
            if quantization is None:
                raise ValueError(f"{name}: int8 goes with the int8 methods only")
            quantization = dataclasses.replace(quantization, **{name: "int8"})
    return load(options["model"], quantization=quantization, dtype=method.dtype, mesh=mesh)


def _prompts(given: Sequence[str], file: str | None) -> list[str]:
    # Not str.splitlines: that also splits at U+2028 and its kin, which a prompt may hold.
    lines = datasets.read(Path(file), "prompt_file").split("\n") if file is not None else []
    prompts = [*given, *(line.removesuffix("\r") for line in lines if line.strip())]
    if not prompts or not all(prompts):
        raise ValueError("prompt: expected at least one, none of them empty (or a prompt_file)")
    return prompts


class _Clock:
    """Times generation step by step, so that compiling does not count as speed."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._steps: list[tuple[int, float]] = []

    def watch(self, steps: Iterable[list[list[int]]]) -> Iterator[list[list[int]]]:
        """Passes the steps on, counting their tokens and seconds."""
        for gained in steps:
            now = time.perf_counter()
            self._steps.append((sum(map(len, gained)), now - self._last))
            self._last = now
            yield gained

    def summary(self) -> str:
        """One line: tokens, seconds, and the median speed after the first steps, which compile."""
        tokens = sum(count for count, _ in self._steps)
        line = f"{tokens} tokens in {self._last - self._start:.1f} s, compilation included"
        rates = [count / seconds for count, seconds in self._steps[2:] if count]
        return f"{line}; decoding {statistics.median(rates):.1f} tokens/s" if rates else line
