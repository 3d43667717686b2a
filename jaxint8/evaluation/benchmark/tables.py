"""Measured groups as tables for people, on the terminal and in bench.md.

The surprising fact: of a layer's dozen lines a table shows one row. Times are ours; of the others
only the ratio is shown, with the quartiles of the rounds below it, for that is what the rounds make
comparable. bench.json has everything.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from jaxint8.evaluation.benchmark.layers import CALLED, OFF, OTHERS, OURS, RULES, XLA
from jaxint8.evaluation.benchmark.machine import BUSY
from jaxint8.evaluation.benchmark.results import Group, Line, Step
from jaxint8.evaluation.benchmark.timing import Statistic

NONE = "-"
MOST_CLIFFS = 6


@dataclasses.dataclass(frozen=True)
class Table:
    """Text of a table; headers and cells may hold line breaks."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def tables(groups: Iterable[Group]) -> list[Table]:
    """A table for each suite, and for each axis of growth, in the order of the groups."""
    suites: dict[str, list[Group]] = {}
    for group in groups:
        suites.setdefault(group.suite, []).append(group)
    made = []
    for suite, members in suites.items():
        if suite == "layer":
            made += [layer_table(members), ratio_table(members)]
        elif suite == "growth":
            made += [growth_table(group) for group in members]
        else:
            make = load_table if suite == "load" else generation_table
            made += [make(group) for group in members]
    return made


def layer_table(groups: Sequence[Group]) -> Table:
    """One row for each shape and m: our time, what bounds it, and the price of outliers."""
    rules = [rule for rule in RULES if rule != "off"]
    rows = []
    for group in groups:
        ours = group.line(OURS)
        rate = NONE if ours is None or ours.rate is None else f"{ours.rate:,.0f}"
        price = [_price(group.times(f"jaxint8 {rule}", OFF)) for rule in rules]
        time, share = _time_and_share(ours)
        rows.append([*_layer(group), time, rate, share, group.bound or NONE, *price])
    header = ["k x n", "m", "ms", "GOP/s", "of\nbound", "bound\nby", *rules]
    notes = [
        f"ms, GOP/s, of bound: {OURS}, inside a compiled program.",
        f"{', '.join(rules)}: the price of outliers, time against the same layer without.",
    ]
    return Table("Layer", header, rows, [*notes, *busy(groups)])


def ratio_table(groups: Sequence[Group]) -> Table:
    """One row for each shape and m: how many times faster our layer is than each other."""
    ratios = {name.replace("loat", "").replace(" ", "\n"): (OURS, name) for name in XLA}
    for name in OTHERS:
        engine, kind = name.replace("onnxruntime", "ort").replace("loat", "").split(" ")
        header = f"{engine}\n{kind}"
        ratios |= {header: (OURS, name), f"{header}\ncalled": (CALLED, name)}
    ratios = {h: pair for h, pair in ratios.items() if any(g.times(*pair) for g in groups)}
    rows = [
        [*_layer(group), *(_times(group.times(*pair)) for pair in ratios.values())]
        for group in groups
    ]
    notes = [
        f"how many times faster {OURS} is, inside a compiled program; called: from Python, as the "
        "other is.",
    ]
    return Table("Layer: times faster than", ["k x n", "m", *ratios], rows, notes)


def _layer(group: Group) -> tuple[str, str]:
    return f"{group.what['k']} x {group.what['n']}", str(group.what["m"])


def generation_table(group: Group) -> Table:
    """One row for each engine: speed, share of its bound, and how many times faster ours are."""
    ours = list(dict.fromkeys(pair.name for pair in group.pairs))
    rows = []
    for line in group.lines:
        milliseconds, share = _time_and_share(line)
        times = (_times(group.times(name, line.name)) for name in ours)
        rows.append([line.name, f"{line.rate or 0:,.1f}", milliseconds, share, *times])
    per = "ms" if group.suite == "prefill" else "ms a\ntoken"
    header = ["engine", "tokens/s", per, "of\nbound", *(_slower_than(name) for name in ours)]
    what = f"{group.what['prompt']} tokens of prompt"
    if group.suite == "decode":
        what = f"{group.what['new']} tokens after {group.what['prompt']}"
    return Table(f"{group.suite.capitalize()}: {what}", header, rows, busy([group]))


def _slower_than(name: str) -> str:
    return "slower than\n" + name.replace(", ", ",\n")


def load_table(group: Group) -> Table:
    """One row for each way of loading: seconds and memory."""
    rows = []
    for line in group.lines:
        memory = (line.extra.get(name) for name in ("peak_bytes", "model_bytes", "allowed_bytes"))
        shown = (NONE if size is None else f"{size / 1e6:,.0f}" for size in memory)
        rows.append([line.name, f"{line.seconds.median:.2f}", *shown])
    header = ["", "s", "peak\nMB", "model\nMB", "allowed\nMB"]
    notes = ["allowed: the model, the largest float tensor and 300 MB.", *busy([group])]
    return Table(f"Load: a file of {group.what['file_bytes'] / 1e6:,.0f} MB", header, rows, notes)


def growth_table(group: Group) -> Table:
    """One row for each place on the axis, or (threads) for each thing that was measured."""
    axis = group.what["axis"]
    engines, places = group.engines(), sorted({line.at[axis] for line in group.lines})
    if axis == "threads":
        lines = {name: [group.line(name, threads=c) for c in places] for name in engines}
        faster = {step.name: f"x {1 / step.growth.median:.2f}" for step in group.steps}
        rows = [
            [name, *(_time_and_share(line)[0] for line in found), faster.get(name, NONE)]
            for name, found in lines.items()
        ]
        header = ["", *(f"{count} threads\nms" for count in places), "faster"]
        return Table("Growth: threads", header, rows, busy([group]))
    rows = []
    for place in places:
        row = [str(place)]
        for name in engines:
            row += _time_and_share(group.line(name, **{axis: place}))
        rows.append(row)
    header = [axis, *(h for name in engines for h in (f"{name}\nms", "of\nbound"))]
    notes = ["of bound: of reading and multiplying, whichever takes longer."]
    return Table(f"Growth: {axis}", header, rows, [*notes, cliffs(group.steps), *busy([group])])


def cliffs(steps: Sequence[Step]) -> str:
    """One line that names neighbours between which time jumps or falls, the worst of many."""
    found = sorted((step for step in steps if step.cliff), key=_height, reverse=True)
    shown = [
        f"{step.name} {step.before} -> {step.after}: time x {step.growth.median:.2f}"
        for step in found[:MOST_CLIFFS]
    ]
    more = ["..."] if len(found) > MOST_CLIFFS else []
    return f"cliffs: {len(found)} of {len(steps)} steps" + "".join(f"; {s}" for s in shown + more)


def _height(step: Step) -> float:
    return max(step.growth.median * step.before / step.after, 1 / step.growth.median)


def busy(groups: Sequence[Group]) -> list[str]:
    """One line if other processes used the machine meanwhile, else none."""
    known = [group.others for group in groups if group.others is not None]
    if not known or max(known) < BUSY:
        return []
    return [
        f"NOT QUIET: others used up to {max(known):.2f} cores meanwhile; times are too long, and "
        "only large ratios mean something."
    ]


def to_markdown(table: Table) -> str:
    """A table as Markdown."""
    cells = [[cell.replace("\n", " ") for cell in row] for row in (table.header, *table.rows)]
    # At least two, for "-:" is the shortest rule.
    widths = [max(2, *(len(row[i]) for row in cells)) for i in range(len(table.header))]
    lines = [
        "| " + " | ".join(_align(cell, widths[i], i) for i, cell in enumerate(row)) + " |"
        for row in cells
    ]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([f"## {table.title}", "", *lines, "", *notes, ""])


def _align(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def _time_and_share(line: Line | None) -> tuple[str, str]:
    """Milliseconds, and the share of the bound."""
    if line is None:
        return NONE, NONE
    share = NONE if line.share is None else f"{100 * line.share.median:.0f} %"
    milliseconds = 1e3 * line.seconds.median
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}", share


def _price(times: Statistic | None) -> str:
    """What outliers add to the time, and its quartiles, from how many times faster that is."""
    if times is None:
        return NONE
    low, median, high = (100 / t - 100 for t in (times.high, times.median, times.low))
    return f"{median:+.0f} %\n({low:+.0f} {high:+.0f})"


def _times(times: Statistic | None) -> str:
    """A ratio and its quartiles."""
    if times is None:
        return NONE
    return f"{_short(times.median)}\n({_short(times.low)}-{_short(times.high)})"


def _short(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
