"""Measures speed: layers, decoding, prefill and loading, beside XLA, other engines and the bounds.

  jaxint8-bench --output=DIR                 everything; half an hour on two cores
  jaxint8-bench --quick --suites=layer       two shapes, three rounds

Other engines are measured if they are installed: onnxruntime with onnx, torch, llama-cpp-python and
ctranslate2. Everything is measured in interleaved rounds; figures are medians, ratios the medians
of the ratios of each round. Keep the machine quiet meanwhile: the report says if it was not.
"""

import dataclasses
import re
from collections.abc import Sequence

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from jaxint8.cli import app, screen
from jaxint8.cli.benchmarks import suites
from jaxint8.cli.benchmarks.suites import Plan
from jaxint8.evaluation import report as evaluation_report
from jaxint8.evaluation.benchmark import machine, peers, report, tables
from jaxint8.evaluation.benchmark.layers import Shape
from jaxint8.evaluation.benchmark.results import Group

SCREEN = Console(stderr=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    return app.launch(__doc__ or "", define_flags, run, argv)


def define_flags(values: flags.FlagValues) -> None:
    """Adds the command's flags to `values`."""
    known = ", ".join(suites.SUITES)
    flags.DEFINE_list("suites", ["all"], f"Any of {known}, or all.", flag_values=values)
    flags.DEFINE_bool("quick", False, "Fewer sizes and rounds.", flag_values=values)
    flags.DEFINE_string("model", "demo", "A checkpoint, or demo.", flag_values=values)
    flags.DEFINE_list("shapes", None, "Layers, as 4096x11008: in x out.", flag_values=values)
    flags.DEFINE_list("m", None, "Rows of the layers.", flag_values=values)
    flags.DEFINE_integer(
        "rounds", None, "Samples of everything.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool("peers", True, "Measure other engines too.", flag_values=values)
    flags.DEFINE_float(
        "wait_quiet",
        0.0,
        "Seconds to wait at most, before each measurement, until others leave the machine alone.",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "Folder for bench.json, bench.md and plots.", flag_values=values
    )


def run(options: app.Options) -> None:
    """Measures as the flags say, prints the tables, writes the report."""
    with app.input_errors():
        chosen = parse_suites(options["suites"])
        plan = make_plan(options)
        output = options["output"]
        if output is not None:  # now, rather than after minutes of work
            app.make_folder("output", output)
    environment = evaluation_report.environment(
        command=options["command"],
        threads=machine.cores(),
        instruction=machine.instruction(),
        peers=peers.versions() if plan.peers else {},
        rounds=plan.rounds,
    )
    groups: list[Group] = []
    measuring = suites.run(chosen, options["model"], plan)
    while True:
        machine.wait_until_quiet(options["wait_quiet"])
        with app.input_errors():
            group = next(measuring, None)
        if group is None:
            break
        groups.append(group)
        if output is not None:
            with app.input_errors():  # a full disk
                report.write(groups, environment, output)
        SCREEN.print(_progress(group))
    for table in tables.tables(groups):
        screen.show(_table(table))
        for note in table.notes:
            screen.show(f"  {note}")
        screen.show("")
    if output is not None:
        with app.input_errors():
            written = report.write(groups, environment, output)
        SCREEN.print("wrote " + ", ".join(map(str, written)), soft_wrap=True)
        screen.say_if_no_plots(SCREEN)


def parse_suites(names: Sequence[str]) -> list[str]:
    """Expands "all" and drops repetitions.

    Raises:
      ValueError: a name that is not known, or no name at all.
    """
    expanded: dict[str, None] = {}
    for name in names:
        expanded.update(dict.fromkeys(suites.SUITES if name == "all" else [name]))
    unknown = [name for name in expanded if name not in suites.SUITES]
    if unknown or not expanded:
        got = ", ".join(map(repr, unknown)) or "nothing"
        raise ValueError(f"suites: expected any of {', '.join(suites.SUITES)} or all, got {got}")
    return list(expanded)


def make_plan(options: app.Options) -> Plan:
    """The plan that the flags describe.

    Raises:
      ValueError: a shape or a number of rows that cannot be.
    """
    plan = suites.QUICK if options["quick"] else Plan()
    if options["rounds"] is not None:
        effort = dataclasses.replace(plan.effort, rounds=options["rounds"])
        plan = dataclasses.replace(plan, rounds=options["rounds"], effort=effort)
    if options["shapes"] is not None:
        plan = dataclasses.replace(plan, shapes=[_shape(text) for text in options["shapes"]])
    if options["m"] is not None:
        plan = dataclasses.replace(plan, ms=[_rows(text) for text in options["m"]])
    return dataclasses.replace(plan, peers=options["peers"])


def _shape(text: str) -> Shape:
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if found is None:
        raise ValueError(f"shapes: expected some like 4096x11008, got {text!r}")
    return int(found[1]), int(found[2])


def _rows(text: str) -> int:
    if re.fullmatch(r"[1-9]\d{0,5}", text) is None:
        raise ValueError(f"m: expected whole numbers from 1, got {text!r}")
    return int(text)


def _progress(group: Group) -> str:
    """One line that says what has been measured."""
    shown = [f"{name} {value}" for name, value in group.what.items() if name != "outliers"]
    busy = group.others is not None and group.others > machine.BUSY
    warning = f" (NOT QUIET: others used {group.others:.1f} cores)" if busy else ""
    return f"{group.suite}: {', '.join(shown)}{warning}"


def _table(table: tables.Table) -> Table:
    made = Table(
        title=table.title,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
    )
    for i, header in enumerate(table.header):
        made.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in table.rows:
        made.add_row(*row)
    return made
