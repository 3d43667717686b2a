"""The plot of a sweep: how quality, share of 16-bit values and speed depend on a rule's number.

A sweep is a report whose methods are named "rule:number" and "rule:number:choice". The surprising fact: with the share
of 16-bit values as the axis, rules whose numbers mean different things can be compared, and the order changes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxint8.evaluation.report import Row
from jaxint8.evaluation.style import COLOURS, INK, MARKERS, MUTED, plain

_NAME = re.compile(r"(?P<base>\w+):(?P<number>[\d.]+)(?P<choices>(:\w+)*)")
# Methods without a number that frame the others: the floor of int8 weights, and no outliers at all.
FRAMES = ("weights_only", "vectorwise")


@dataclass(frozen=True)
class Curve:
    """One rule: its rows in ascending order of its number."""

    name: str
    numbers: Sequence[float]
    rows: Sequence[Row]


def curves(rows: Sequence[Row]) -> list[Curve]:
    """The rules of which the rows hold three numbers or more."""
    found: dict[str, dict[float, Row]] = {}
    for row in rows:
        name = _NAME.fullmatch(row.method)
        if name and row.mean_abs_logprob_change is not None and row.relative_change is not None:
            of_rule = found.setdefault(name["base"] + name["choices"], {})
            of_rule[float(name["number"])] = row
    return [
        Curve(name, sorted(by_number), [by_number[x] for x in sorted(by_number)])
        for name, by_number in found.items()
        if len(by_number) >= 3
    ]


def figure(rows: Sequence[Row], title: str) -> Figure | None:
    """Four panels: change by number (log p, perplexity), by share of 16-bit values, and by speed."""
    drawn = curves(rows)
    if not drawn:
        return None
    figure = Figure(figsize=(11.5, 8), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    logp = "mean abs(Δ log p) against float32, nats"
    for axes, x, y in zip(
        panels,
        ("the rule's number (threshold, or values per row)",) * 2
        + ("share of values in 16 bits, percent", "prefill, tokens/s"),
        (logp, "change of perplexity, percent", logp, logp),
        strict=True,
    ):
        axes.set_xlabel(x, color=INK)
        axes.set_ylabel(y, color=INK)
        plain(axes)
    for i, curve in enumerate(drawn):
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "label": curve.name,
        }
        change = [row.mean_abs_logprob_change or 0.0 for row in curve.rows]
        percent = [100 * (row.relative_change or 0.0) for row in curve.rows]
        share = [100 * (row.outlier_fraction or 0.0) for row in curve.rows]
        panels[0].plot(curve.numbers, change, **style)
        panels[1].plot(curve.numbers, percent, **style)
        panels[2].plot(share, change, **style)
        panels[3].plot(
            [row.prefill_tokens_per_s for row in curve.rows], change, linestyle="", **style
        )
        for x, y, number in zip(share, change, curve.numbers, strict=True):
            panels[2].annotate(
                f"{number:g}", (x, y), (3, 4), textcoords="offset points", fontsize=7, color=INK
            )
    for row in rows:
        if row.method in FRAMES:
            _frame(panels, row)
    panels[0].set_xscale("log")
    panels[1].set_xscale("log")
    panels[2].set_xscale("log")
    for axes in panels[:2]:
        axes.set_xticks([1, 2, 4, 8, 16, 32], minor=False)
    for axes in panels[:3]:
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    panels[3].set_xlim(left=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, color=INK, fontsize=11)
    return figure


def _frame(panels: Sequence[Axes], row: Row) -> None:
    """A dashed line at a row that has no number, named at its right end."""
    for i, axes in enumerate(panels):
        value = 100 * (row.relative_change or 0.0) if i == 1 else row.mean_abs_logprob_change
        if value is None:
            continue
        axes.axhline(value, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(
            row.method,
            (1, value),
            (-2, 3),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=INK,
        )
