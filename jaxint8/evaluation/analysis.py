"""The report of an outlier analysis: analysis.json for programs, analysis.md for people, and plots.

The surprising fact: a model may have no outlier feature by the paper's criteria and still lose quality in plain int8;
the report says then how the most common dimensions behave.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxint8.evaluation.features import Feature, State
from jaxint8.evaluation.files import write_atomically
from jaxint8.evaluation.report import markdown_table


@dataclass(frozen=True)
class Summary:
    """A row of the paper's Table 4, for all sites that it takes or for one; shares are fractions."""

    sites: str
    count: int
    """Dimensions that are outlier features."""
    one_sided: int
    layers: float
    """Of the most common dimension: share of the hidden states."""
    positions: float
    """Of the most common dimension: share of the positions."""
    dimension: int | None
    quartiles: tuple[float, float, float] | None


@dataclass(frozen=True)
class Ablation:
    """What zeroing some dimensions does; `perplexity` when the zeros propagate, in one kind of place."""

    what: str
    dimensions: Sequence[int]
    top1_probability: float
    """Mean over layers, heads and positions of the largest attention probability, layers independent."""
    perplexity: float
    perplexity_all: float
    """With the dimensions zeroed before the MLP as well."""


@dataclass(frozen=True)
class Analysis:
    """What one run found."""

    model: str
    text: str
    tokens: int
    threshold: float
    summaries: Sequence[Summary]
    features: Sequence[Feature]
    ablations: Sequence[Ablation]
    states: Sequence[State]
    magnitudes: Mapping[str, tuple[float, float, float] | None]
    """Quartiles of the magnitude of the most common dimension, by hidden state."""
    snr: Mapping[str, Mapping[str, float]]
    environment: Mapping[str, Any] = field(default_factory=dict)


def write(analysis: Analysis, directory: str | Path) -> list[Path]:
    """Writes analysis.json, analysis.md and, with matplotlib, features.png, magnitude.png and snr.png.

    Raises:
      OSError: the directory cannot be made or written to.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plots = _figures(analysis)
    texts = {"analysis.json": to_json(analysis), "analysis.md": to_markdown(analysis, list(plots))}
    for name, text in texts.items():
        write_atomically(directory / name, lambda path, text=text: path.write_text(text))
    for name, figure in plots.items():
        write_atomically(
            directory / name, lambda path, figure=figure: figure.savefig(path, format="png")
        )
    return [directory / name for name in (*texts, *plots)]


def to_json(analysis: Analysis) -> str:
    """The analysis as JSON; of each hidden state the counts that the plots show."""
    content = {
        field.name: getattr(analysis, field.name)
        for field in dataclasses.fields(analysis)
        if field.name not in ("states", "summaries", "features", "ablations")
    }
    for name in ("summaries", "features", "ablations"):
        content[name] = [dataclasses.asdict(row) for row in getattr(analysis, name)]
    content["states"] = [
        {
            "layer": state.layer,
            "site": state.site,
            "positions": state.positions,
            "affected": state.affected,
            "dimensions": int(np.count_nonzero(state.above)),
            "common_dimensions": common(state),
            "absmax": float(state.absmax.max()),
        }
        for state in analysis.states
    ]
    return json.dumps(content, indent=2) + "\n"


def common(state: State) -> int:
    """Dimensions of one hidden state that are outliers at 6 % of its positions or more."""
    return int(np.count_nonzero(state.above >= 0.06 * state.positions))


_SUMMARY = (
    ("sites", lambda row: row.sites),
    ("features", lambda row: str(row.count)),
    ("one-sided", lambda row: str(row.one_sided)),
    ("dimension", lambda row: "-" if row.dimension is None else str(row.dimension)),
    ("layers", lambda row: f"{100 * row.layers:.0f} %"),
    ("positions", lambda row: f"{100 * row.positions:.1f} %"),
    ("quartiles", lambda row: "-" if row.quartiles is None else _quartiles(row.quartiles)),
)
_ABLATION = (
    ("zeroed", lambda row: row.what),
    ("dimensions", lambda row: str(len(row.dimensions))),
    ("top-1 softmax p", lambda row: f"{100 * row.top1_probability:.1f} %"),
    ("perplexity, before attention", lambda row: f"{row.perplexity:.2f}"),
    ("before attention and MLP", lambda row: f"{row.perplexity_all:.2f}"),
)


def _quartiles(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.1f}' for value in values)})"


def to_markdown(analysis: Analysis, plots: Sequence[str] = ()) -> str:
    """The analysis as Markdown."""
    sites = sorted({state.site for state in analysis.states})
    snr = [
        (scheme, [_mean_snr(by_layer, site) for site in sites])
        for scheme, by_layer in analysis.snr.items()
    ]
    columns = [("method", lambda row: row[0])]
    for i, site in enumerate(sites):
        columns.append((f"{site}, dB", lambda row, i=i: f"{row[1][i]:.1f}"))
    command = analysis.environment.get("command")
    return "\n".join(
        [
            f"# {heading(analysis)}",
            "",
            *([f"    {command}", ""] if command else []),
            f"Outlier features (abs(x) >= {analysis.threshold:g} in 25 % of the hidden states and at "
            "6 % of the positions; the other columns are of the most common dimension, the quartiles "
            "of its outliers):",
            "",
            *markdown_table(_SUMMARY, analysis.summaries),
            "Dimensions set to zero (top-1: each layer by itself; perplexity: the zeros propagate):",
            "",
            *markdown_table(_ABLATION, analysis.ablations),
            "Signal over noise of the int8 product, mean over the layers:",
            "",
            *markdown_table(columns, snr),
            *(f"![{name.removesuffix('.png')}]({name})\n" for name in plots),
            "## Environment",
            "",
            *(f"- {k}: {v}" for k, v in analysis.environment.items() if k != "command"),
            "",
        ]
    )


def heading(analysis: Analysis) -> str:
    """One line that says what was looked at."""
    return f"outliers of {analysis.model}, text {analysis.text}, {analysis.tokens:,} tokens"


def _mean_snr(by_layer: Mapping[str, float], site: str) -> float:
    return float(np.mean([v for name, v in by_layer.items() if name.endswith(f".{site}")]))


def _figures(analysis: Analysis) -> dict[str, Any]:
    """File name -> matplotlib figure; empty without matplotlib."""
    try:
        from jaxint8.evaluation import analysis_plots
    except ImportError:  # the extra `plot` is not installed
        return {}
    return analysis_plots.figures(analysis)
