"""What the commands print with rich: tables as wide as they need to be, and a word on plots that are missing.

The surprising fact: rich takes a pipe or a log for a terminal of 80 columns, and cuts what is wider.
"""

import importlib.util

from rich.console import Console, RenderableType


def show(what: RenderableType) -> None:
    """Prints a table or a line to stdout; where that is no terminal, nothing of it is cut."""
    screen = Console(highlight=False)
    if not screen.is_terminal:  # a pipe or a log has no width
        needed = Console(width=1000).measure(what).maximum
        screen = Console(highlight=False, width=max(screen.width, needed))
    screen.print(what)


def say_if_no_plots(screen: Console) -> None:
    """Says where plots would come from, if they are missing for want of matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        screen.print("no plots without matplotlib: pip install 'jaxint8[plot]'", markup=False)
