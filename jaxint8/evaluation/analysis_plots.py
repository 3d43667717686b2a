"""The plots of an outlier analysis, in the spirit of the paper's Figures 3 and 4. Needs matplotlib (the extra `plot`).

The paper has a point per model; one model gives a point per layer. The surprising fact: magnitudes need a logarithmic
axis, since one dimension of one layer may be a hundred times the rest.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxint8.evaluation.analysis import Analysis, common, heading
from jaxint8.evaluation.features import State, name_of
from jaxint8.evaluation.style import ACCENT, COLOURS, INK, MARKERS, MUTED, decimals, plain


def figures(analysis: Analysis) -> dict[str, Figure]:
    """The plots by file name."""
    return {
        "features.png": _features(analysis),
        "magnitude.png": _magnitude(analysis),
        "snr.png": _snr(analysis),
    }


def _by_site(states: Sequence[State]) -> dict[str, list[State]]:
    found: dict[str, list[State]] = {}
    for state in sorted(states, key=lambda state: state.layer):
        found.setdefault(state.site, []).append(state)
    return found


def _style(i: int, label: str) -> dict[str, Any]:
    marker = MARKERS[i % len(MARKERS)]
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": marker,
        "markersize": 4,
        "linewidth": 1.3,
        "label": label,
    }


def _features(analysis: Analysis) -> Figure:
    """Left: dimensions that are outliers at 6 % of the positions; right: positions with an outlier."""
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (site, states) in enumerate(_by_site(analysis.states).items()):
        layers = [state.layer for state in states]
        left.plot(layers, [common(state) for state in states], **_style(i, site))
        share = [100 * state.affected / state.positions for state in states]
        right.plot(layers, share, **_style(i, site))
    left.set_ylabel("outlier dimensions (at 6 % of the positions)", color=INK)
    left.set_yscale("symlog", linthresh=10)
    left.yaxis.set_major_formatter("{x:g}")
    right.set_ylabel("positions with an outlier, percent", color=INK)
    right.set_ylim(-3, 103)
    for axes in (left, right):
        axes.set_xlabel("layer", color=INK)
        plain(axes)
    left.legend(frameon=False, title="input of")
    figure.suptitle(
        f"{heading(analysis)}: abs(x) >= {analysis.threshold:g}", color=INK, fontsize=11
    )
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    rows = -(-count // 2)
    figure = Figure(figsize=(11, 1 + 3.2 * rows), dpi=120, layout="constrained")
    panels = list(figure.subplots(rows, 2, squeeze=False, sharex=True).ravel())
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _magnitude(analysis: Analysis) -> Figure:
    """By layer: the most common dimension (median and quartiles), the largest value of it and of all others."""
    by_site = _by_site(analysis.states)
    figure, panels = _panels(len(by_site))
    dimension = {s.sites: s.dimension for s in analysis.summaries}
    for axes, (site, states) in zip(panels, by_site.items(), strict=True):
        common_one = dimension.get(site)
        layers = np.array([state.layer for state in states])
        if common_one is not None:
            found = [analysis.magnitudes.get(f"layers.{i}.{site}") for i in layers]
            known = [i for i, x in enumerate(found) if x is not None]
            low, middle, high = np.array([found[i] for i in known], np.float64).reshape(-1, 3).T
            axes.fill_between(layers[known], low, high, color=ACCENT, alpha=0.2, linewidth=0)
            label = "most common dimension: median, quartiles"
            axes.plot(layers[known], middle, color=ACCENT, marker="o", markersize=4, label=label)
        others = [
            np.delete(state.absmax, [] if common_one is None else common_one) for state in states
        ]
        axes.plot(
            layers, [o.max() for o in others], color=COLOURS[1], label="largest of all others"
        )
        middle = [np.median(state.absmax) for state in states]
        axes.plot(layers, middle, color=MUTED, label="largest of a dimension, median of them")
        axes.axhline(analysis.threshold, color=INK, linestyle="--", linewidth=0.8)
        axes.set_yscale("log")
        decimals(axes.yaxis)
        named = "" if common_one is None else f" (most common: {common_one})"
        axes.set_title(f"input of {site}{named}", color=INK, fontsize=10)
        axes.set_ylabel("magnitude", color=INK)
        plain(axes)
    for axes in panels[-2:]:
        axes.set_xlabel("layer", color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(heading(analysis), color=INK, fontsize=11)
    return figure


def _snr(analysis: Analysis) -> Figure:
    """A panel per linear layer of a block, a line per method."""
    sites = list(_by_site(analysis.states))
    figure, panels = _panels(len(sites))
    for axes, site in zip(panels, sites, strict=True):
        for i, (method, by_layer) in enumerate(analysis.snr.items()):
            places = {name_of(name): value for name, value in by_layer.items()}
            points = sorted((p[0], v) for p, v in places.items() if p is not None and p[1] == site)
            axes.plot([p[0] for p in points], [p[1] for p in points], **_style(i, method))
        axes.set_title(f"product {site}", color=INK, fontsize=10)
        axes.set_ylabel("signal over noise, dB", color=INK)
        plain(axes)
    for axes in panels[-2:]:
        axes.set_xlabel("layer", color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(heading(analysis), color=INK, fontsize=11)
    return figure
