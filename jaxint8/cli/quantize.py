"""Converts a checkpoint to int8 on disk, in the layout of bitsandbytes.

jaxint8-quantize --model=DIR_OR_GGUF_OR_ID --output=DIR
jaxint8-quantize --model=bigscience/bloom --output=DIR --dtype=bfloat16 --shard_size=2GB

Streaming: memory does not grow with the model. Interrupted in whatever way, the same command goes
on after the last complete file. DIR/SHA256SUMS is for sha256sum --check.
"""

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxint8.cli import app
from jaxint8.models.converting import convert


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    return app.launch(__doc__ or "", define_flags, run, argv)


def define_flags(values: flags.FlagValues) -> None:
    """Adds the command's flags to `values`."""
    flags.DEFINE_string("model", None, "A checkpoint, or demo.", flag_values=values)
    flags.DEFINE_string("output", None, "The folder to write.", flag_values=values)
    flags.DEFINE_enum(
        "dtype",
        "source",
        ["source", "float32", "bfloat16", "float16"],
        "Of embeddings and head, which stay float; source: as they are.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "shard_size",
        "5GB",
        "Size of a file of weights; an interruption costs at most one of them.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace another model in the folder.", flag_values=values
    )


def run(options: app.Options) -> None:
    """Converts as the flags say."""
    start = time.perf_counter()
    with app.input_errors():
        for name in ("model", "output"):
            if not options[name]:
                raise ValueError(f"{name}: is needed")
        if Path(options["output"]).is_file():
            raise ValueError(f"output: {options['output']} is a file, expected a folder")
        _refuse_source(options["model"], options["output"])
        dtype = None if options["dtype"] == "source" else options["dtype"]
        done = convert(
            options["model"],
            options["output"],
            dtype=dtype,
            shard_bytes=app.parse_bytes("shard_size", options["shard_size"]),
            replace=options["overwrite"],
        )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KB, but on macOS in bytes
    peak *= 1 if sys.platform == "darwin" else 1024
    print(
        f"{options['output']}: {done.output_bytes / 1e6:,.1f} MB from "
        f"{done.source_bytes / 1e6:,.1f} MB in {seconds:.1f} s, peak memory {peak / 1e6:,.0f} MB"
    )
    if done.reused_bytes:
        print(f"{done.reused_bytes / 1e6:,.1f} MB of it had been converted before")


def _refuse_source(model: str, output: str) -> None:
    """Refuses to write over what is read, --overwrite or not: the float weights would be lost."""
    source, target = Path(model), Path(output)
    if source.is_file() and source.suffix != ".gguf":  # of which no file is replaced
        source = source.parent
    if source.exists() and target.exists() and source.samefile(target):
        raise ValueError(f"output: {output} is the folder of --model, expected another one")
