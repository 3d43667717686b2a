"""Evaluates a model under several methods on a text: quality, size and speed, as a table.

  jaxint8-eval                          the demo model on the demo text, every method
  jaxint8-eval --model=DIR --text=FILE --methods=float32,relative --output=DIR

Changes are against the method float32; without it they are not measured.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from jaxint8.cli import app, measure, methods
from jaxint8.cli.measure import Measured
from jaxint8.evaluation import datasets, report
from jaxint8.models import LanguageModel

SCREEN = Console(stderr=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    return app.launch(__doc__ or "", define_flags, run, argv)


def define_flags(values: flags.FlagValues) -> None:
    """Adds the command's flags to `values`."""
    known = ", ".join(methods.METHODS)
    flags.DEFINE_string("model", "demo", "A checkpoint, or demo.", flag_values=values)
    flags.DEFINE_list("methods", ["all"], f"Any of {known}, or all.", flag_values=values)
    flags.DEFINE_string(
        "text",
        "demo",
        "A .txt file, a .jsonl file of {text: ...}, demo (public-domain speeches) or pydoc (the "
        "topics of Python's own help; needs no network).",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_tokens", 8192, "Tokens read of the text.", lower_bound=2, flag_values=values
    )
    flags.DEFINE_integer(
        "window",
        512,
        "Tokens per window; the first is not scored.",
        lower_bound=2,
        flag_values=values,
    )
    flags.DEFINE_integer("batch_size", 1, "Windows per call.", lower_bound=1, flag_values=values)
    flags.DEFINE_string(
        "output", None, "Folder for report.json, report.md and plots.", flag_values=values
    )


def run(options: app.Options) -> None:
    """Evaluates as the flags say, prints the table, writes the report."""
    with app.input_errors():
        names = methods.parse_methods(options["methods"])
        text = datasets.load_text(options["text"])
        output = options["output"]
        if output is not None:  # now, rather than after minutes of work
            Path(output).mkdir(parents=True, exist_ok=True)
    # Work of others slows ours: a reader of the report should know how much there was.
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    measured = _measure(options, names, text.text)
    score = measured[names[0]].score
    result = report.Report(
        model=options["model"],
        text=text.name,
        tokens=score.tokens,
        rows=measure.rows(measured),
        environment=report.environment(
            command=options["command"],
            window=options["window"],
            batch_size=options["batch_size"],
            scored_tokens=score.scored,
            load_average_before=load,
        ),
    )
    Console(highlight=False).print(_table(result))
    if report.BASELINE not in names:
        SCREEN.print(f"no changes without {report.BASELINE} among --methods")
    if output is not None:
        written = report.write(result, output)
        SCREEN.print("wrote " + ", ".join(map(str, written)), soft_wrap=True)


def _measure(options: app.Options, names: list[str], text: str) -> dict[str, Measured]:
    """Measures every method, in the order that needs fewest loads; returned in the order asked."""
    measured: dict[str, Measured] = {}
    tokens = None
    with _Bar(len(names)) as bar:
        for group in methods.by_weights(names):
            bar.hide()  # loading has a bar of its own
            with app.input_errors():
                model = measure.load_group(options["model"], group)
                if tokens is None:
                    tokens = _tokens(model, text, options)
            for name in group:
                bar.begin(name, tokens.size)
                measured[name] = measure.measure(
                    measure.as_method(model, name),
                    tokens,
                    window=options["window"],
                    batch_size=options["batch_size"],
                    show=bar.show,
                )
                bar.end(f"{name}: perplexity {measured[name].score.perplexity:.4f}")
            del model  # before the next is loaded: only one set of parameters at a time
    return {name: measured[name] for name in names}


class _Bar:
    """One progress bar over all methods, on a terminal; its unit is a token of a pass."""

    def __init__(self, passes: int) -> None:
        self._passes, self._before = passes, 0
        self._name, self._tokens = "", 0
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(
            *columns,
            TextColumn("{task.description}"),
            console=SCREEN,
            transient=True,
            disable=not SCREEN.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.hide()

    def hide(self) -> None:
        """Makes room for other output, until the next pass begins."""
        self._progress.stop()

    def begin(self, name: str, tokens: int) -> None:
        """Begins the pass of a method over so many tokens."""
        self._name, self._tokens = name, tokens
        self._progress.update(self._task, total=self._passes * tokens)
        self._progress.start()

    def show(self, what: str, done: int) -> None:
        """Says what is going on, and how many tokens of this pass are done."""
        done += self._before
        self._progress.update(self._task, description=f"{self._name}: {what}", completed=done)

    def end(self, result: str) -> None:
        """Ends the pass; the line with its result stays on the screen."""
        self._before += self._tokens
        SCREEN.print(result)


def _table(result: report.Report) -> Table:
    # 80 columns are what a pipe or a log has.
    table = Table(title=report.heading(result), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, (header, _) in enumerate(report.COLUMNS):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in result.rows:
        table.add_row(*(show(row) for _, show in report.COLUMNS))
    return table


def _tokens(model: LanguageModel, text: str, options: app.Options) -> np.ndarray:
    """The text as the model's tokens, int32[n], without special ones."""
    if model.tokenizer is None:
        raise ValueError(f"model: {options['model']} comes without a tokenizer")
    window, positions = options["window"], model.config.max_positions
    if window > positions:
        raise ValueError(f"window: {window} exceeds the model's {positions} positions")
    ids = model.tokenizer.encode(text, add_special_tokens=False)[: options["max_tokens"]]
    if len(ids) < 2:
        raise ValueError(f"text: expected at least 2 tokens to have one to score, got {len(ids)}")
    return np.asarray(ids, np.int32)
