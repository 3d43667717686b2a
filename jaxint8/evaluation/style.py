"""How the plots of evaluation look. Importing the modules that draw needs matplotlib (the extra `plot`).

Figures are made without pyplot: no global state, no display, nothing to close. The surprising fact: the colours are
chosen for the colour-blind, and the markers for those who print in black.
"""

from typing import Any

INK, MUTED, GRID, ACCENT = "#1f2933", "#9aa5b1", "#e4e7eb", "#0b6e99"
# Okabe and Ito's colours, told apart by the colour-blind; the markers tell them apart in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")


def decimals(axis: Any) -> None:
    """Plain decimals on a logarithmic axis with its data, between powers of ten too if it has hardly one."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}" if high < 10 * low else "")


def plain(axes: Any, grid: str = "both") -> None:
    """A grid below the data, and no frame above and to the right of it."""
    axes.grid(axis=grid, color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
