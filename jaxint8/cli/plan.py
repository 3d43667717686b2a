"""Says what a model takes of each device, and whether it fits: from shapes, without weights or network.

jaxint8-plan --model=facebook/opt-175b --devices=8 --device_memory=24GiB
jaxint8-plan --model=DIR --devices=4 --device_memory=80GiB --batch=32 --context=4096 --methods=llm_int8
jaxint8-plan --model=DIR --batch=32 --context=4096 --methods=topk --kv_cache=int8
jaxint8-plan --table=paper
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich import box
from rich.table import Table

from jaxint8.cli import app, hardware, methods, screen
from jaxint8.cli.devices import parse_mesh
from jaxint8.models import planning
from jaxint8.models.config import DecoderConfig
from jaxint8.models.families import family_from_hf
from jaxint8.models.families.presets import PRESETS, preset
from jaxint8.models.loading import config_errors, describe
from jaxint8.models.planning import Plan
from jaxint8.models.tokenizer import read_json

MIB, GIB = 2**20, 2**30
# Beyond these no search looks.
_MOST_DEVICES, _MOST_BATCH = 1024, 2**20
# What a plan lists piece by piece takes time and memory with their number.
_DEVICES = 2**16


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    return app.launch(f"{__doc__}\nNames known: {', '.join(PRESETS)}", define_flags, run, argv)


def define_flags(values: flags.FlagValues) -> None:
    """Adds the command's flags to `values`."""
    flags.DEFINE_string(
        "model",
        None,
        "A folder with a config.json, a .gguf file, demo, or a name (above).",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "devices",
        1,
        "How many there are.",
        lower_bound=1,
        upper_bound=_DEVICES,
        flag_values=values,
    )
    flags.DEFINE_string(
        "device_memory", "80GiB", "Memory of each, such as 24GiB.", flag_values=values
    )
    flags.DEFINE_string(
        "mesh",
        None,
        "DATAxMODEL, such as 2x4; without it weights are split over all devices.",
        flag_values=values,
    )
    flags.DEFINE_list("methods", ["llm_int8", "bfloat16"], methods.HELP, flag_values=values)
    flags.DEFINE_enum(
        "dtype",
        "bfloat16",
        ["bfloat16", "float32"],
        "Of activations, cache and what stays float, for int8 methods.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "lm_head", "float", ["float", "int8"], "Precision of the logits.", flag_values=values
    )
    methods.define_kv_cache(values)
    flags.DEFINE_integer(
        "batch",
        1,
        "Sequences at once.",
        lower_bound=1,
        upper_bound=_MOST_BATCH,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "context",
        None,
        "Tokens of a sequence; default: what the model was made for, at most 2048.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "portable", False, "Plan for pure JAX instead of the kernels.", flag_values=values
    )
    flags.DEFINE_string(
        "reserve", "512MiB", "Left of each device for the runtime.", flag_values=values
    )
    flags.DEFINE_enum(
        "table",
        None,
        ["paper"],
        "paper: the largest model of each class of hardware, as in the paper's table.",
        flag_values=values,
    )
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)


def run(options: app.Options) -> None:
    """Plans as the flags say."""
    with app.input_errors():
        memory = app.parse_bytes("device_memory", options["device_memory"])
        if memory < MIB:  # a number whose unit was forgotten
            raise ValueError(
                f"device_memory: expected at least 1MiB, as in 24GiB, got {options['device_memory']!r}"
            )
        reserve = app.parse_bytes("reserve", options["reserve"], least=0)
        if options["table"] == "paper":
            hardware.show(reserve, options["json"])
            return
        if not options["model"]:
            raise ValueError("model: is needed")
        config = read_config(options["model"])
        mesh = _mesh(options["mesh"], options["devices"])
        names = _planned(options["methods"])
        names = methods.with_kv_cache(names, options["kv_cache"])
        if options["lm_head"] == "int8" and not any(methods.method(n).quantization for n in names):
            raise ValueError("lm_head: int8 goes with the int8 methods only")
        planned = {name: _planner(config, name, options, reserve) for name in names}
        plans = {name: of(mesh, options["batch"]) for name, of in planned.items()}
    found = [
        {
            "model": options["model"],
            "method": name,
            "mesh": list(mesh),
            "device_memory": memory,
            **dataclasses.asdict(plan),
            "total": plan.total,
            "fits": plan.total <= memory,
            "fewest_devices": _fewest(planned[name], options["batch"], memory),
            "largest_batch": _largest(planned[name], mesh, memory),
        }
        for name, plan in plans.items()
    ]
    if options["json"]:
        print(json.dumps(found, indent=2))
        return
    context = planning.default_context(config) if not options["context"] else options["context"]
    title = (
        f"{options['model']}: {mesh[0]}x{mesh[1]} devices of {memory / GIB:,.1f} GiB, "
        f"batch {options['batch']}, context {context}; GiB on each device"
    )
    parts = [field.name for field in dataclasses.fields(Plan)]
    columns = ["method", *parts, "total", "", "fewest devices", "largest batch"]
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE)
    for row in found:
        fits = "fits" if row["fits"] else f"{(row['total'] - memory) / GIB:,.2f} too much"
        counts = [str(row[key] or "-") for key in ("fewest_devices", "largest_batch")]
        sizes = [f"{row[part] / GIB:,.2f}" for part in (*parts, "total")]
        table.add_row(row["method"], *sizes, fits, *counts)
    screen.show(table)


def read_config(model: str) -> DecoderConfig:
    """Returns the decoder that a folder's config.json, a GGUF file or a name describes.

    Raises:
      ValueError: neither, or not a decoder that is known here.
    """
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix == ".gguf":
        checkpoint = describe(path)
        checkpoint.reader.close()
        return checkpoint.config
    try:
        if not path.is_file():
            described = preset("SmolLM2-135M-Instruct" if model == "demo" else model)
            return family_from_hf(described).config_from_hf(described)
        with config_errors(path):
            described = read_json(path)
            return family_from_hf(described).config_from_hf(described)
    except ValueError as error:
        raise ValueError(f"model: {error}") from None


def _planned(given: Sequence[str]) -> list[str]:
    """The methods that are meant; of a group such as all, those that can be planned."""
    names = methods.parse_methods(given)
    planned = [n for n in names if planning.is_planned(methods.method(n).quantization)]
    others = [name for name in names if name not in planned]
    for name in others:
        if name in given:
            raise ValueError(
                f"methods: {name} cannot be planned for: expected float, or symmetric codes without "
                "float copies"
            )
    if others:
        print(f"left out, as they cannot be planned for: {', '.join(others)}", file=sys.stderr)
    return planned


def _mesh(text: str | None, devices: int) -> tuple[int, int]:
    mesh = parse_mesh(text) or (1, devices)
    if mesh[0] * mesh[1] > _DEVICES:
        raise ValueError(f"mesh: expected at most {_DEVICES} devices, got {text}")
    if text is not None and devices not in (1, mesh[0] * mesh[1]):
        raise ValueError(f"mesh: {text} is not {devices} devices")
    return mesh


def _planner(
    config: DecoderConfig, name: str, options: app.Options, reserve: int
) -> Callable[[tuple[int, int], int], Plan]:
    """Returns a function of mesh and batch."""
    method = methods.method(name)
    how: dict[str, Any] = {
        "quantization": method.quantization,
        "dtype": method.dtype or options["dtype"],
        "context": options["context"],
        "portable": options["portable"],
        "reserve": reserve,
    }
    if method.quantization is not None:
        how["quantization"] = dataclasses.replace(method.quantization, lm_head=options["lm_head"])
    return lambda mesh, batch: planning.plan(config, mesh=mesh, batch=batch, **how)


def _fewest(plan: Callable[[tuple[int, int], int], Plan], batch: int, memory: int) -> int | None:
    """The fewest devices, a power of two, over which weights can be split so that all fits."""
    devices = 1
    while devices <= _MOST_DEVICES:
        if plan((1, devices), batch).total <= memory:
            return devices
        devices *= 2
    return None


def _largest(
    plan: Callable[[tuple[int, int], int], Plan], mesh: tuple[int, int], memory: int
) -> int:
    """The largest batch that fits; 0 if none does."""
    fits, much = 0, 1
    while much <= _MOST_BATCH and plan(mesh, much).total <= memory:
        fits, much = much, 2 * much
    while much - fits > 1:
        middle = (fits + much) // 2
        fits, much = (middle, much) if plan(mesh, middle).total <= memory else (fits, middle)
    return fits
