"""The report of an evaluation: report.json for programs, report.md for people, and plots.

The surprising fact: report.json gives every change and share as a fraction (`"relative_change":
0.0217`), the tables and plots as percent (+2.17 %). A value that was not measured, or is not
finite, is null in JSON.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxint8.evaluation.files import write_atomically

BASELINE = "float32"
"""The method whose log-probabilities the others are compared with."""


@dataclass(frozen=True)
class Row:
    """One method. Shares and changes are fractions; None means not measured."""

    method: str
    perplexity: float
    relative_change: float | None
    """Perplexity over that of the float32 row, minus 1."""
    mean_abs_logprob_change: float | None
    """Mean of abs(log p - log p of the float32 row), in nats."""
    model_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    outlier_fraction: float | None
    """Share of the activation values entering the int8 layers that are carried as outliers."""


@dataclass(frozen=True)
class TaskRow:
    """One method on one zero-shot task; accuracies are fractions, with their standard errors."""

    task: str
    method: str
    documents: int
    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    """With log-probabilities divided by characters; None where lm-evaluation-harness has none."""
    acc_norm_stderr: float | None
    change: float | None
    """The main figure (acc_norm if there is one) minus that of float32, on the same documents."""
    change_stderr: float | None
    """Of the paired difference: far below that of either accuracy."""
    perplexity: float | None
    """Per document; of LAMBADA only."""


@dataclass(frozen=True)
class Report:
    """What one run measured: model, text, how many tokens of it, where, and a row per method."""

    model: str
    text: str
    tokens: int
    rows: Sequence[Row]
    tasks: Sequence[TaskRow] = ()
    environment: dict[str, Any] = field(default_factory=dict)


def environment(**extra: Any) -> dict[str, Any]:
    """The versions and the machine a report was measured with, then `extra`."""
    device = jax.devices()[0]
    versions = {name: _version(name) for name in ("jaxint8", "jax", "jaxlib", "numpy")}
    return {
        **versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_cores": os.cpu_count(),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        **extra,
    }


def write(report: Report, directory: str | Path) -> list[Path]:
    """Writes report.json, report.md and, if matplotlib is there, quality.png and speed.png.

    Each file appears whole or not at all.

    Returns:
      The files written, report.json first.

    Raises:
      OSError: the directory cannot be made or written to.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "report.json", directory / "report.md"]
    plots = _figures(report)
    write_atomically(written[0], lambda path: path.write_text(to_json(report)))
    write_atomically(written[1], lambda path: path.write_text(to_markdown(report, list(plots))))
    for name, figure in plots.items():
        target = directory / name
        write_atomically(target, lambda path, figure=figure: figure.savefig(path, format="png"))
        written.append(target)
    return written


def to_json(report: Report) -> str:
    """The report as JSON: model, text, tokens, environment, rows, and tasks if there are any."""
    content = {
        "model": report.model,
        "text": report.text,
        "tokens": report.tokens,
        "environment": report.environment,
        "rows": [_record(row) for row in report.rows],
        **({"tasks": [_record(row) for row in report.tasks]} if report.tasks else {}),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("method", lambda row: row.method),
    ("perplexity", lambda row: f"{row.perplexity:.4f}"),
    ("change", lambda row: _show(row.relative_change, lambda x: f"{100 * x:+.2f} %")),
    ("mean abs\nΔ log p", lambda row: _show(row.mean_abs_logprob_change, lambda x: f"{x:.4f}")),
    ("model\nMB", lambda row: f"{row.model_bytes / 1e6:.1f}"),
    ("prefill\ntok/s", lambda row: f"{row.prefill_tokens_per_s:,.0f}"),
    ("decode\ntok/s", lambda row: _show(row.decode_tokens_per_s, lambda x: f"{x:,.1f}")),
    ("outliers", lambda row: _show(row.outlier_fraction, lambda x: f"{100 * x:.3f} %")),
)
"""Header (may be two lines) and text of each column, in the report and on the terminal."""


def _accuracy(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}" + ("" if stderr is None else f" ± {100 * stderr:.2f}")


def _change(row: TaskRow) -> str:
    if row.change is None:
        return "-"
    return f"{100 * row.change:+.2f} ± {100 * (row.change_stderr or 0.0):.2f}"


TASK_COLUMNS: tuple[tuple[str, Callable[[TaskRow], str]], ...] = (
    ("task", lambda row: row.task),
    ("method", lambda row: row.method),
    ("documents", lambda row: f"{row.documents:,}"),
    ("acc, %", lambda row: _accuracy(row.acc, row.acc_stderr)),
    ("acc_norm, %", lambda row: _accuracy(row.acc_norm, row.acc_norm_stderr)),
    ("against\nfloat32", _change),
    ("perplexity", lambda row: _show(row.perplexity, lambda x: f"{x:.3f}")),
)


def to_markdown(report: Report, plots: Sequence[str] = ()) -> str:
    """The report as Markdown; `plots` are file names to show below the table."""
    facts = [
        f"- {name}: {value}" for name, value in report.environment.items() if name != "command"
    ]
    command = report.environment.get("command")
    return "\n".join(
        [
            f"# {heading(report)}",
            "",
            *([f"    {command}", ""] if command else []),
            *(markdown_table(COLUMNS, report.rows) if report.rows else []),
            *(markdown_table(TASK_COLUMNS, report.tasks) if report.tasks else []),
            *(f"![{name.removesuffix('.png')}]({name})\n" for name in plots),
            *(_TASK_NOTES if report.tasks else []),
            "- change: perplexity against the float32 row. report.json gives it as a fraction.",
            "- mean abs Δ log p: mean of abs(log p - log p of the float32 row), nats.",
            "- prefill: the perplexity pass, without compilation. decode: greedy, one sequence.",
            "- outliers: share of the inputs of int8 layers carried at higher precision.",
            "",
            "## Environment",
            "",
            *facts,
            "",
        ]
    )


_TASK_NOTES = (
    "- acc, acc_norm: zero-shot accuracy by the rules of lm-evaluation-harness, ± standard error.",
    "- against float32: of acc_norm where there is one, ± standard error of the paired difference.",
)


def markdown_table[R](
    columns: Sequence[tuple[str, Callable[[R], str]]], rows: Sequence[R]
) -> list[str]:
    """The lines of a Markdown table and an empty one; its first column is on the left, the others on the right."""
    table = [[header.replace("\n", " ") for header, _ in columns]]
    table += [[show(row) for _, show in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = [_table_line(line, widths) for line in table]
    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return [lines[0], _table_line(rule, widths), *lines[1:], ""]


def heading(report: Report) -> str:
    """One line that says what the figures are of."""
    if not report.rows:
        tasks = ", ".join(dict.fromkeys(row.task for row in report.tasks))
        return f"model {report.model}, zero-shot {tasks}"
    return f"model {report.model}, text {report.text}, {report.tokens:,} tokens"


def _figures(report: Report) -> dict[str, Any]:
    """File name -> matplotlib figure; empty without matplotlib."""
    try:
        from jaxint8.evaluation import plots
    except ImportError:  # the extra `plot` is not installed
        return {}
    return plots.figures(report)


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(aligned)} |"


def _show(value: float | None, how: Callable[[float], str]) -> str:
    return "-" if value is None else how(value)


def _record(row: Row | TaskRow) -> dict[str, Any]:
    return {name: _finite_or_none(value) for name, value in dataclasses.asdict(row).items()}


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; Linux keeps it out of the `platform` module's reach."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
