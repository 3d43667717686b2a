"""Evaluates a model under several methods on a text: quality, size and speed, as a table.

  jaxint8-eval                          the demo model on the demo text, every method
  jaxint8-eval --model=DIR --text=FILE --methods=float32,relative --output=DIR
  jaxint8-eval --text= --tasks=lambada,piqa --limit=300 --output=DIR

With --tasks, zero-shot accuracy by the rules of lm-evaluation-harness as well (--text= for that
alone); with --output an interrupted run goes on where it was. Changes are against the
method float32; without it they are not measured. With --kv_cache=int8 the int8 methods attend to
int8 keys and values, in prompts too, and are reported as NAME:kv_int8.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
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

from jaxint8.cli import app, devices, measure, methods, resume, screen, zeroshot
from jaxint8.cli.measure import Measured
from jaxint8.evaluation import datasets, report
from jaxint8.evaluation import zeroshot as evaluation
from jaxint8.evaluation.tasks import TASKS, Document
from jaxint8.models import LanguageModel

SCREEN = Console(stderr=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    return app.launch(__doc__ or "", define_flags, run, argv)


def define_flags(values: flags.FlagValues) -> None:
    """Adds the command's flags to `values`."""
    flags.DEFINE_string("model", "demo", "A checkpoint, or demo.", flag_values=values)
    flags.DEFINE_list("methods", ["all"], methods.HELP, flag_values=values)
    methods.define_kv_cache(values)
    flags.DEFINE_string(
        "text",
        "demo",
        "A .txt file, a .jsonl file of {text: ...}, demo (public-domain speeches) or pydoc (the "
        "topics of Python's own help; needs no network).",
        flag_values=values,
    )
    flags.DEFINE_list(
        "tasks",
        [],
        f"Zero-shot tasks, any of {', '.join(TASKS)}, or NAME=FILE with JSON lines.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "limit",
        None,
        "At most so many documents of each task, spread evenly.",
        lower_bound=1,
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
    flags.DEFINE_bool("decode", True, "Whether to time decoding too.", flag_values=values)
    flags.DEFINE_string(
        "output", None, "Folder for report.json, report.md and plots.", flag_values=values
    )
    devices.define_flags(values)


def run(options: app.Options) -> None:
    """Evaluates as the flags say, prints the table, writes the report."""
    with devices.session(options) as mesh:
        _evaluate(options, mesh)


def _evaluate(options: app.Options, mesh: Mesh | None) -> None:
    with app.input_errors():
        names = methods.parse_methods(options["methods"])
        names = methods.with_kv_cache(names, options["kv_cache"])
        documents = zeroshot.load(options["tasks"], options["limit"])
        # Without a text there must be tasks, else the empty name is a file that does not exist.
        text = None if documents and not options["text"] else datasets.load_text(options["text"])
        output = options["output"]
        if output is not None:  # now, rather than after minutes of work
            app.make_folder("output", output)
    if (
        jax.process_count() > 1
    ):  # nothing is taken up again: all processes would have to see the same
        options = {**options, "output": None}
    # Work of others slows ours: a reader of the report should know how much there was.
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    measured, tasks, answers = _measure(options, names, text and text.text, documents, mesh)
    score = next(iter(measured.values())).score if measured else None
    result = report.Report(
        model=options["model"],
        text="" if text is None else text.name,
        tokens=score.tokens if score else 0,
        rows=measure.rows(measured),
        tasks=zeroshot.rows(tasks, answers),
        environment=report.environment(
            command=options["command"],
            window=options["window"],
            batch_size=options["batch_size"],
            mesh=options["mesh"],
            scored_tokens=score.scored if score else 0,
            load_average_before=load,
        ),
    )
    tables = ((report.COLUMNS, result.rows, 1), (report.TASK_COLUMNS, result.tasks, 2))
    for columns, rows, names_first in tables:
        if rows:
            screen.show(_table(report.heading(result), columns, rows, names_first))
    if report.BASELINE not in names:
        SCREEN.print(f"no changes without {report.BASELINE} among --methods")
    if output is not None and devices.is_first():
        with app.input_errors():
            written = report.write(result, output)
        SCREEN.print("wrote " + ", ".join(map(str, written)), soft_wrap=True)
        screen.say_if_no_plots(SCREEN)


def _measure(
    options: app.Options,
    names: list[str],
    text: str | None,
    documents: list[tuple[str, list[Document]]],
    mesh: Mesh | None,
) -> tuple[
    dict[str, Measured], list[zeroshot.Loaded], dict[str, dict[str, list[evaluation.Answer]]]
]:
    """Measures every method, in the order that needs fewest loads; returned in the order asked."""
    measured: dict[str, Measured] = {}
    answers: dict[str, dict[str, list[evaluation.Answer]]] = {}
    tokens, tasks = None, None
    with _Bar(len(names)) as bar:
        for group in methods.by_weights(names):
            bar.hide()  # loading has a bar of its own
            with app.input_errors():
                model = measure.load_group(options["model"], group, mesh)
                if tasks is None:
                    tasks = zeroshot.encode(model, documents)
                    tokens = None if text is None else measure.text_tokens(model, text, options)
            method = model
            for name in group:
                method = measure.as_method(model, name)
                if tokens is not None:
                    measured[name] = _text(options, name, method, tokens, bar)
                answers[name] = {
                    task.name: _task(options, name, method, task, bar) for task in tasks
                }
            del model, method  # before the next is loaded: one set of parameters at a time
    return (
        {name: measured[name] for name in names if name in measured},
        tasks or [],
        {name: answers[name] for name in names},
    )


def _text(
    options: app.Options, name: str, method: LanguageModel, tokens: np.ndarray, bar: "_Bar"
) -> Measured:
    """Measures one method on the text, unless the output folder has it already."""
    cut = options["window"], options["batch_size"], options["decode"], options["mesh"]
    key = resume.identity(options["model"], methods.method(name), *cut, tokens.tobytes())
    path = resume.file_of(options["output"], "text", name, ".npz")
    with app.input_errors():
        found = resume.read(path, key)
    if found is None:
        bar.begin(name, tokens.size)
        found = measure.measure(
            method,
            tokens,
            window=options["window"],
            batch_size=options["batch_size"],
            show=bar.show,
            decode=options["decode"],
        )
        with app.input_errors():  # a full disk
            resume.write(path, found, key)
    bar.end(f"{name}: perplexity {found.score.perplexity:.4f}")
    return found


def _task(
    options: app.Options, name: str, method: LanguageModel, task: zeroshot.Loaded, bar: "_Bar"
) -> list[evaluation.Answer]:
    """Asks one method one task; batches that the output folder has already are not asked again."""
    batch_tokens = options["window"] * options["batch_size"]
    bar.begin(name, task.tokens)
    with app.input_errors():
        answers = zeroshot.answer(
            method,
            task,
            batch_tokens=batch_tokens,
            journal=resume.file_of(options["output"], task.name, name, ".jsonl"),
            identity=resume.identity(options["model"], methods.method(name), batch_tokens),
            progress=lambda done, total: bar.show(task.name, done),
        )
    (row,) = zeroshot.rows([task], {name: {task.name: answers}})
    bar.end(f"{name}: {task.name} acc {100 * row.acc:.2f}")
    return answers


class _Bar:
    """One progress bar, on a terminal; its unit is a token of the pass at hand."""

    def __init__(self, methods: int) -> None:
        self._methods, self._name = methods, ""
        self._seen: dict[str, None] = {}
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
        """Begins a pass of a method over so many tokens."""
        self._name, self._seen = name, {**self._seen, name: None}
        self._progress.reset(self._task, total=tokens)
        self._progress.start()

    def show(self, what: str, done: int) -> None:
        """Says what is going on, and how many tokens of this pass are done."""
        of = f"{len(self._seen)} of {self._methods}"
        self._progress.update(
            self._task, description=f"{self._name} ({of}): {what}", completed=done
        )

    def end(self, result: str) -> None:
        """Ends the pass; the line with its result stays on the screen."""
        SCREEN.print(result)


def _table(
    title: str, columns: Sequence[tuple[str, Callable]], rows: Sequence[Any], names: int
) -> Table:
    """A table whose first columns, `names` of them, stand on the left."""
    # Narrow, so that it fits a terminal of 80 columns.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, (header, _) in enumerate(columns):
        table.add_column(header, justify="left" if i < names else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(show(row) for _, show in columns))
    return table
