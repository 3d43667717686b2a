"""The plots of a benchmark. Importing this needs matplotlib (the extra `plot`).

The surprising fact: the plot of layers is a roofline, operations per second over the rows m. While
reading the weights is the bound, it rises with m; where multiplying is, it is flat.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from jaxint8.evaluation.benchmark.layers import OFF, OURS
from jaxint8.evaluation.benchmark.results import Group, Line
from jaxint8.evaluation.style import COLOURS, GRID, INK, MARKERS, MUTED


def figures(groups: Sequence[Group]) -> dict[str, Figure]:
    """The plots by file name; only those of suites that were measured."""
    made = {}
    layer = [group for group in groups if group.suite == "layer"]
    models = [group for group in groups if group.suite in ("prefill", "decode", "load")]
    growth = [group for group in groups if group.suite == "growth"]
    if layer:
        made["layer.png"] = roofline(layer)
    if models:
        made["model.png"] = bars(models)
    if growth:
        made["growth.png"] = axes_of_growth(growth)
    return made


def roofline(groups: Sequence[Group]) -> Figure:
    """GOP/s over m for each shape, every engine a line, what bounds them in grey."""
    shapes = list(dict.fromkeys((group.what["k"], group.what["n"]) for group in groups))
    figure, panels = _panels(len(shapes), height=3.8)
    names = list(dict.fromkeys(name for group in groups for name in group.engines()))
    shown = [name for name in names if not name.endswith(", called")]
    for axes, (k, n) in zip(panels, shapes, strict=True):
        members = [group for group in groups if (group.what["k"], group.what["n"]) == (k, n)]
        for name in shown:
            points = [(g.what["m"], line.rate) for g in members if (line := g.line(name))]
            _line(axes, name, points, shown.index(name))
        bound = [
            (g.what["m"], 2e-9 * g.what["m"] * k * n / line.bound)
            for g in members
            if (line := g.line(OURS)) and line.bound
        ]
        if bound:
            axes.plot(*zip(*bound, strict=True), color=MUTED, linewidth=6, alpha=0.45, zorder=1)
            axes.plot([], [], color=MUTED, linewidth=6, alpha=0.45, label="bound")
        _both_logarithmic(axes, [group.what["m"] for group in members])
        axes.set_title(f"{k} x {n}", color=INK, fontsize=10)
        axes.set_xlabel("rows m", color=INK)
    panels[0].set_ylabel("GOP/s", color=INK)
    _legend(figure, panels)
    return figure


def bars(groups: Sequence[Group]) -> Figure:
    """One panel of bars for each suite: tokens per second, or seconds to load."""
    longest = max(len(group.lines) for group in groups)
    figure, panels = _panels(len(groups), height=1.4 + 0.4 * longest, width=5.2)
    for axes, group in zip(panels, groups, strict=True):
        names = [line.name for line in group.lines]
        load = group.suite == "load"
        values = [line.seconds.median if load else line.rate or 0.0 for line in group.lines]
        places = list(range(len(names)))[::-1]
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
        axes.barh(places, values, color=colours, height=0.62)
        for place, value, line in zip(places, values, group.lines, strict=True):
            text = f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
            if line.share is not None:
                text += f"  ({100 * line.share.median:.0f} % of bound)"
            axes.annotate(
                text, (value, place), xytext=(4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(places, names)
        axes.margins(x=0.55)
        axes.set_title(group.suite, color=INK, fontsize=11)
        axes.set_xlabel("seconds" if load else "tokens/s", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure


def axes_of_growth(groups: Sequence[Group]) -> Figure:
    """Time over the axis, a panel for each, cliffs ringed; for threads the times faster."""
    figure, panels = _panels(len(groups), height=3.8)
    for axes, group in zip(panels, groups, strict=True):
        axis = group.what["axis"]
        if axis == "threads":
            _speedup(axes, group)
        else:
            _growth(axes, group, axis)
        what = f"{group.what['k']} x {group.what['n']}" if axis == "m" else ""
        axes.set_title(f"{axis} {what}".strip(), color=INK, fontsize=10)
        axes.set_xlabel("rows m" if axis == "m" else axis, color=INK)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _growth(axes: Any, group: Group, axis: str) -> None:
    for index, name in enumerate(group.engines()):
        lines = [line for line in group.lines if line.name == name]
        points = [(line.at[axis], 1e3 * line.seconds.median) for line in lines]
        _line(axes, name, points, index, small=len(points) > 12)
        for step in group.steps:
            if step.name == name and step.cliff:
                place = (step.after, dict(points)[step.after])
                axes.plot(*place, "o", markersize=11, fillstyle="none", color="#d00000")
    _bounds(axes, axis, group.lines)
    _both_logarithmic(axes, [line.at[axis] for line in group.lines])
    axes.set_ylabel("ms" if axis == "m" else "ms a step", color=INK)


def _speedup(axes: Any, group: Group) -> None:
    """How many times faster than with the fewest threads, which every line begins with."""
    places = sorted({line.at["threads"] for line in group.lines})
    for index, name in enumerate(group.engines()):
        reached = [1.0]
        for step in group.steps:
            if step.name == name:
                reached.append(reached[-1] / step.growth.median)
        _line(axes, name, zip(places, reached, strict=True), index)
    ideal = [place / places[0] for place in places]
    axes.plot(places, ideal, color=MUTED, linewidth=6, alpha=0.45, zorder=1, label="ideal")
    axes.set_xticks(places)
    axes.set_ylim(0, 1.15 * max(ideal))
    axes.set_ylabel("times faster", color=INK)
    _plain(axes)


def _bounds(axes: Any, axis: str, lines: Sequence[Line]) -> None:
    """What bounds the first engine that has a bound (no other than OFF stands before it)."""
    first = next((line.name for line in lines if line.bound and line.name != OFF), None)
    points = [
        (line.at[axis], 1e3 * line.bound) for line in lines if line.name == first and line.bound
    ]
    if points:
        label = f"bound of {first}"
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color=MUTED, linewidth=6, alpha=0.45, zorder=1, label=label)


def _panels(count: int, height: float, width: float = 4.4) -> tuple[Figure, list[Any]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    size = (width * columns + 1.6, height * rows)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _line(axes: Any, name: str, points: Any, index: int, *, small: bool = False) -> None:
    places = sorted(points)
    if not places:
        return
    axes.plot(
        *zip(*places, strict=True),
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=3 if small else 5,
        linewidth=1.3,
        linestyle="-" if index < len(COLOURS) else "--",
        label=name,
    )


def _both_logarithmic(axes: Any, places: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted(set(places))
    if len(ticks) > 8:
        ticks = [place for place in ticks if place & (place - 1) == 0][::2]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panels: Sequence[Any]) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
