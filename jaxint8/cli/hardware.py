"""The paper's table of hardware: the largest model that each class of machines holds, in 8 and in 16 bits.

Counted twice: weights alone in decimal gigabytes, as the paper evidently does, and everything that a
sequence of 2,048 tokens takes, in what the cards really have. The surprising fact is the last line:
the paper's models leave gaps, and a larger OPT fits where it names a smaller model.
"""

import dataclasses
import json

import jax.numpy as jnp
from rich import box
from rich.table import Table

from jaxint8.cli import screen
from jaxint8.models import planning
from jaxint8.models.config import QUANTIZATIONS, DecoderConfig
from jaxint8.models.families import family_from_hf
from jaxint8.models.families.presets import preset

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Class:
    """A row of the table: devices, the memory of each in GB, and the models named for 8 and 16 bits."""

    name: str
    devices: int
    memory: int
    int8: str
    half: str


# Dettmers et al. 2022, Table 2.
CLASSES = (
    Class("Enterprise, A100", 8, 80, "BLOOM-176B", "BLOOM-176B"),
    Class("Enterprise, A100", 8, 40, "BLOOM-176B", "OPT-66B"),
    Class("Academic server, RTX 3090", 8, 24, "BLOOM-176B", "OPT-66B"),
    Class("Academic desktop, RTX 3090", 4, 24, "OPT-66B", "OPT-30B"),
    Class("Paid cloud, Colab Pro", 1, 15, "OPT-13B", "GPT-J-6B"),
    Class("Free cloud, Colab", 1, 12, "T5-11B", "GPT-2 1.3B"),
)


def _like_opt(hidden: int, layers: int, heads: int, vocabulary: int, **more: int) -> DecoderConfig:
    """The sizes of a model of another family: an OPT with as many elements in its matrices."""
    described = preset("opt-13b") | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "ffn_dim": 4 * hidden,
        **more,
    }
    return family_from_hf(described).config_from_hf(described)


def _opt(name: str) -> DecoderConfig:
    described = preset(name)
    return family_from_hf(described).config_from_hf(described)


# Smallest first. T5-11B has 24 layers in its encoder and 24 in its decoder, which have a second attention: with
# attention 16,384 wide and an MLP of 65,536 that is as much as 56 layers with one.
NAMED: dict[str, DecoderConfig] = {
    "GPT-2 1.3B": _like_opt(2048, 24, 16, 50257),
    "GPT-J-6B": dataclasses.replace(_like_opt(4096, 28, 16, 50400), tied_embeddings=False),
    "T5-11B": dataclasses.replace(_like_opt(1024, 56, 128, 32128, ffn_dim=65536), head_dim=128),
    "OPT-13B": _opt("opt-13b"),
    "OPT-30B": _opt("opt-30b"),
    "OPT-66B": _opt("opt-66b"),
    "OPT-175B": _opt("opt-175b"),
    "BLOOM-176B": _opt("bloom"),
}
LADDER = {
    f"OPT-{size.upper()}": _opt(f"opt-{size}")
    for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")
}


def largest(
    of: Class, models: dict[str, DecoderConfig], bits: int, whole: bool, reserve: int
) -> str:
    """Returns the last of ``models``, smallest first, that a class of machines holds.

    Args:
      of: the class.
      models: by name.
      bits: 8 or 16.
      whole: whether to count all that 2,048 tokens take, and GiB, instead of weights alone in GB.
      reserve: bytes of each device for the runtime, where all is counted.
    """
    method = QUANTIZATIONS["llm_int8"] if bits == 8 else None
    found = "none"
    for name, config in models.items():
        mesh = (1, of.devices)
        plan = planning.plan(
            config, quantization=method, dtype=jnp.bfloat16, mesh=mesh, reserve=reserve
        )
        fits = plan.total <= of.memory * GIB if whole else plan.weights <= of.memory * GB
        found = name if fits else found
    return found


def rows(reserve: int) -> list[dict[str, str | int]]:
    """Returns the table."""
    made: list[dict[str, str | int]] = []
    for of in CLASSES:
        row: dict[str, str | int] = {
            "class": of.name,
            "devices": of.devices,
            "memory_gb": of.memory,
        }
        for bits, named in ((8, of.int8), (16, of.half)):
            row |= {
                f"{bits}_bit_paper": named,
                f"{bits}_bit_weights": largest(of, NAMED, bits, False, reserve),
                f"{bits}_bit_all": largest(of, NAMED, bits, True, reserve),
                f"{bits}_bit_all_opt": largest(of, LADDER, bits, True, reserve),
            }
        made.append(row)
    return made


def show(reserve: int, as_json: bool) -> None:
    """Prints the table."""
    made = rows(reserve)
    if as_json:
        print(json.dumps(made, indent=2))
        return
    table = Table(
        title="Largest model: the paper's; by weights alone, GB; with all of 2,048 tokens, GiB: of its models, of OPT",
        title_justify="left",
        box=box.SIMPLE,
    )
    for name in (
        "class",
        "devices",
        "GB",
        *(f"{b} bit: {c}" for b in (8, 16) for c in ("paper", "weights", "all", "all, OPT")),
    ):
        table.add_column(name)
    for row in made:
        table.add_row(*map(str, row.values()))
    screen.show(table)
