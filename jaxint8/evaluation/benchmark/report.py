"""The report of a benchmark: bench.json for programs, bench.md for people, and plots.

The surprising fact: it is written again after every suite, so that what was measured in the first
ten minutes is not lost in the twentieth.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxint8.evaluation.benchmark import results, tables
from jaxint8.evaluation.benchmark.results import Group
from jaxint8.evaluation.files import write_atomically


def write(
    groups: Sequence[Group], environment: dict[str, Any], directory: str | Path
) -> list[Path]:
    """Writes bench.json, bench.md and, if matplotlib is there, plots; each whole or not at all.

    Returns:
      The files written, bench.json first.

    Raises:
      OSError: the directory cannot be made or written to.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "groups": results.to_json(groups)}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    plots = _figures(groups)
    written = [directory / "bench.json", directory / "bench.md"]
    write_atomically(written[0], lambda path: path.write_text(text))
    markdown = to_markdown(groups, environment, list(plots))
    write_atomically(written[1], lambda path: path.write_text(markdown))
    for name, figure in plots.items():
        write_atomically(
            directory / name, lambda path, figure=figure: figure.savefig(path, format="png")
        )
        written.append(directory / name)
    return written


def to_markdown(
    groups: Sequence[Group], environment: dict[str, Any], plots: Sequence[str] = ()
) -> str:
    """The report as Markdown; `plots` are file names to show."""
    facts = [f"- {name}: {value}" for name, value in environment.items() if name != "command"]
    return "\n".join(
        [
            "# Benchmark",
            "",
            f"    {environment['command']}",
            "",
            *(tables.to_markdown(table) for table in tables.tables(groups)),
            *(f"![{name.removesuffix('.png')}]({name})\n" for name in plots),
            "## Environment",
            "",
            *facts,
            "",
        ]
    )


def _figures(groups: Sequence[Group]) -> dict[str, Any]:
    """File name -> matplotlib figure; empty without matplotlib."""
    try:
        from jaxint8.evaluation.benchmark import plots
    except ImportError:  # the extra `plot` is not installed
        return {}
    return plots.figures(groups)
