"""The plots of an evaluation report. Importing this needs matplotlib (the extra `plot`).

The surprising fact: the axis of the perplexity change is linear up to 1 % and logarithmic above, for a collapsed
method may be a hundred times worse than a good one.
"""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from jaxint8.evaluation import sweep
from jaxint8.evaluation.report import BASELINE, Report, Row, heading
from jaxint8.evaluation.style import ACCENT, COLOURS, INK, MARKERS, MUTED, decimals, plain


def figures(report: Report) -> dict[str, Figure]:
    """The plots of a report by file name; none if no row can be compared with the baseline."""
    rows = [row for row in report.rows if row.method != BASELINE and _comparable(row)]
    baseline = next((row for row in report.rows if row.method == BASELINE), None)
    if not rows or baseline is None:
        return {}
    title = heading(report)
    drawn = {"quality.png": quality(rows, title), "speed.png": speed(rows, baseline, title)}
    swept = sweep.figure(rows, title)
    return drawn if swept is None else {**drawn, "sweep.png": swept}


def _comparable(row: Row) -> bool:
    changes = (row.relative_change, row.mean_abs_logprob_change)
    return all(change is not None and math.isfinite(change) for change in changes)


def quality(rows: Sequence[Row], title: str) -> Figure:
    """Two dot plots side by side: change of perplexity, and of the log-probabilities."""
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(rows)), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = list(range(len(rows)))[::-1]
    percents = [100 * (row.relative_change or 0.0) for row in rows]
    changes = [row.mean_abs_logprob_change or 0.0 for row in rows]
    left.set_xscale("symlog", linthresh=1.0)
    left.set_xlabel("change of perplexity against float32, percent", color=INK)
    right.set_xlabel("mean abs(Δ log p) against float32, nats", color=INK)
    for axes, values in ((left, percents), (right, changes)):
        axes.hlines(places, 0, values, color=MUTED, linewidth=1.5)
        axes.plot(values, places, "o", color=ACCENT, markersize=7)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.margins(x=0.25, y=0.1)
        plain(axes, "x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    left.set_yticks(places, [row.method for row in rows])
    left.xaxis.set_major_formatter("{x:g}")
    right.set_xlim(0, 1.2 * max(changes) or 1.0)
    for place, percent, change in zip(places, percents, changes, strict=True):
        _label(left, f"{percent:+.2f} %", percent, place, before=percent < 0)
        _label(right, f"{change:.3f}", change, place)
    figure.suptitle(title, color=INK, fontsize=11)
    return figure


def speed(rows: Sequence[Row], baseline: Row, title: str) -> Figure:
    """Quality against speed, prefill and decode side by side: better is down and to the right.

    The speed of the baseline, whose change is zero by definition, is a dashed line.
    """
    panels = {"prefill": "prefill_tokens_per_s", "decode, one sequence": "decode_tokens_per_s"}
    everyone = [*rows, baseline]
    shown = {
        name: attribute
        for name, attribute in panels.items()
        if all(getattr(row, attribute) is not None for row in everyone)
    }
    changes = [row.mean_abs_logprob_change or 0.0 for row in rows]
    # The legend has a line a method, and long names want their width.
    size = (1.6 + 4.6 * len(shown), max(4.4, 1.0 + 0.26 * len(everyone)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (name, attribute) in zip(all_axes, shown.items(), strict=True):
        for i, row in enumerate(rows):
            place = getattr(row, attribute), changes[i]
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(*place, linestyle="", markersize=8, label=row.method, **style)
        line = getattr(baseline, attribute)
        axes.axvline(line, color=MUTED, linestyle="--", label=baseline.method)
        axes.set_xlim(0, 1.1 * max(getattr(row, attribute) for row in everyone))
        axes.margins(y=0.15)
        axes.set_xlabel(f"{name}, tokens/s", color=INK)
        plain(axes)
    if min(changes) > 0:
        all_axes[0].set_yscale("log")  # and so those of all, which share it
        decimals(all_axes[0].yaxis)
    all_axes[0].set_ylabel("mean abs(Δ log p) against float32, nats", color=INK)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(f"{title}: better is down and right", color=INK, fontsize=11)
    return figure


def _label(axes: Any, text: str, x: float, y: float, *, before: bool = False) -> None:
    offset, align = ((-7, 0), "right") if before else ((7, 0), "left")
    style = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": INK}
    axes.annotate(text, (x, y), xytext=offset, ha=align, **style)
