"""Takes results of gpu_check.py up into h200.json, and writes the tables of h200.md anew from it.

    python docs/results/make_h200.py --commit=HASH DIR/result.json

Every table stands between ``<!-- NAME -->`` and ``<!-- end -->`` in h200.md; what is around them is written by hand.
Without a result only the tables are written. Stages that failed are refused.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STAGES = (
    *("probe", "native", "jax", "model", "memcheck", "racecheck"),
    *("sizes", "sweep", "block", "peers", "xla", "decode", "profile", "largest", "attend"),
)
RULES = {"none": "none", "column 6": "paper's rule", "relative 6": "relative 6", "top 8": "top 8"}
PEERS = ("none", "relative 6", "bitsandbytes 0", "bitsandbytes 6")
Row = dict[str, Any]


def take_up(results: Row, report: Row, commit: str) -> None:
    """Puts the stages of a report into results; raises ValueError for one that failed."""
    for name, stage in report.items():
        if name == "build":
            continue
        if name not in STAGES:
            raise ValueError(f"{name}: expected one of {', '.join(STAGES)}")
        failures = stage.get("failures") or stage.get("result", {}).get("failures")
        if stage.get("status") != 0 or failures or "skipped" in stage:
            raise ValueError(f"{name}: expected a stage that ran without failures, got {stage}")
        results[name] = {"commit": commit, **stage}


def beside(row: Row, name: str) -> str:
    """Microseconds, in brackets bf16 over this."""
    return f"{row[name]:.1f} ({row['bf16'] / row[name]:.2f})" if name in row else ""


def place(row: Row) -> str:
    """The shape of a row, by its name where it has one."""
    shape = f"{row['k']} -> {row['n']}"
    return shape if "->" in row.get("size", "->") else f"{row['size']} ({shape})"


def table(head: tuple[str, ...], rows: Iterator[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines).replace(" --- ", "---")


def by_shape(rows: list[Row]) -> dict[tuple[int, int, int], dict[str, Row]]:
    """The rows of the sweep, by (k, n, m) and rule."""
    shapes: dict[tuple[int, int, int], dict[str, Row]] = {}
    for row in rows:
        shapes.setdefault((row["k"], row["n"], row["m"]), {})[row["rule"]] = row
    return shapes


def sizes(results: Row) -> str:
    """First FFN layers of the GPT-3 sizes."""
    head = (
        "size (k -> n)",
        "m",
        "bf16",
        "int8, no outliers",
        "paper's rule",
        "relative 6",
        "top 8",
    )
    return table(
        head,
        (
            (place(row), row["m"], f"{row['bf16']:.1f}", *(beside(row, rule) for rule in RULES))
            for row in results["sizes"]["rows"]
        ),
    )


def sweep(results: Row) -> str:
    """How a layer's time grows with m."""

    def rows() -> Iterator[tuple[Any, ...]]:
        for (k, n, m), rules in sorted(by_shape(results["sweep"]["rows"]).items()):
            if "none" not in rules:
                continue
            none = rules["none"]
            times = [
                beside({"bf16": none["bf16"], rule: rules[rule]["us"]}, rule)
                if rule in rules
                else ""
                for rule in ("none", "relative 6", "top 8")
            ]
            rates = f"{none['tera_ops']:.0f}", f"{none['tb_per_s']:.2f}"
            yield (f"{k} -> {n}", m, *times, *rates)

    head = ("k -> n", "m", "none", "relative 6", "top 8", "TOP/s, none", "TB/s of weights, none")
    return table(head, rows())


def types(results: Row) -> str:
    """Activations in other types."""
    cells = [
        (dtype, m, rules)
        for (_, _, m), rules in sorted(by_shape(results["sweep"]["rows"]).items())
        for dtype in ("float16", "float32")
        if f"none {dtype}" in rules
    ]
    return table(
        ("m", "type", "none", "relative 6"),
        (
            (
                m,
                dtype,
                *(
                    beside({**rules[f"{rule} {dtype}"], rule: rules[f"{rule} {dtype}"]["us"]}, rule)
                    for rule in ("none", "relative 6")
                ),
            )
            for dtype, m, rules in cells
        ),
    )


def block(results: Row) -> str:
    """Three layers behind attention."""
    return table(
        ("width", "rule", "m", "bf16", "gate with rows", "gate with outputs"),
        (
            (
                *row["size"].split(" ", 1),
                row["m"],
                f"{row['bf16']:.1f}",
                *(beside(row, name) for name in ("three layers", "block")),
            )
            for row in sorted(
                results["block"]["rows"], key=lambda row: -int(row["size"].split()[0])
            )
        ),
    )


def ours(results: Row) -> dict[tuple[int, int, int], Row]:
    """Microseconds of each rule by (k, n, m), of both tables."""
    times = {(row["k"], row["n"], row["m"]): row for row in results["sizes"]["rows"]}
    for shape, rules in by_shape(results["sweep"]["rows"]).items():
        times.setdefault(shape, {rule: row["us"] for rule, row in rules.items()})
    return times


def peers(results: Row) -> str:
    """Beside bitsandbytes, with our times of the tables before."""
    mine = ours(results)
    head = ("size (k -> n)", "m", "bf16", "ours, none", "ours, relative 6")
    return table(
        (*head, "bitsandbytes, no outliers", "bitsandbytes, 6.0"),
        (
            (
                place(row),
                row["m"],
                f"{row['bf16']:.1f}",
                *(beside({**mine[row["k"], row["n"], row["m"]], **row}, name) for name in PEERS),
            )
            for row in results["peers"]["rows"]
        ),
    )


def xla(results: Row) -> str:
    """Beside XLA's own products, with our times of the tables before."""
    mine = ours(results)

    def rows() -> Iterator[tuple[Any, ...]]:
        for row in results["xla"]["rows"]:
            my = mine.get((row["k"], row["n"], row["m"]), {})
            times = (
                row["bf16"],
                row["none"],
                my.get("none"),
                row["relative 6"],
                my.get("relative 6"),
            )
            if None in times:
                continue
            yield (place(row), row["m"], *(f"{us:.1f}" for us in times))

    head = ("size (k -> n)", "m", "XLA, bf16", "XLA, none", "ours, none")
    return table((*head, "XLA, relative 6", "ours, relative 6"), rows())


def decode(results: Row) -> str:
    """A whole model's tokens per second."""
    rows = results["decode"]["rows"]
    bf16 = {row["batch"]: row for row in rows if row["method"] == "bf16"}

    def rate(row: Row, name: str) -> str:
        if name not in row:
            return ""
        return f"{row[name]:.0f} ({row[name] / bf16[row['batch']][name]:.2f})"

    names = ("decode_tokens_per_s", "prefill_tokens_per_s")
    return table(
        ("method", "batch", "decode", "prefill"),
        ((row["method"], row["batch"], *(rate(row, name) for name in names)) for row in rows),
    )


def attend(results: Row) -> str:
    """A token's attention to an int8 cache."""
    return table(
        ("query heads / key-value heads x d", "sequences", "slots", "us", "TB/s of the cache"),
        (
            (row["size"], row["m"], row["slots"], f"{row['us']:.1f}", f"{row['TB/s']:.2f}")
            for row in results["attend"]["rows"]
        ),
    )


TABLES = {
    "sizes": sizes,
    "sweep": sweep,
    "types": types,
    "block": block,
    "peers": peers,
    "xla": xla,
    "decode": decode,
    "attend": attend,
}


def rounded(value: Any) -> Any:
    """Numbers to four decimals: more is noise."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def as_text(value: Any, depth: int = 1) -> str:
    """JSON with a line for each row of a table."""
    pad = " " * depth
    if isinstance(value, dict) and value:
        items = [
            f"{pad}{json.dumps(key)}: {as_text(item, depth + 1)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(items) + f"\n{pad[1:]}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(pad + json.dumps(item) for item in value) + f"\n{pad[1:]}]"
    return json.dumps(value)


def main() -> None:
    """Takes up the results named, and writes h200.json and h200.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--commit", help="what was measured")
    parser.add_argument("results", nargs="*", type=Path, help="result.json of gpu_check.py")
    arguments = parser.parse_args()
    if arguments.results and not arguments.commit:
        parser.error("--commit: expected with results")
    path, page = HERE / "h200.json", HERE / "h200.md"
    results, text = json.loads(path.read_text()), page.read_text()
    for result in arguments.results:
        take_up(results, json.loads(result.read_text()), arguments.commit)
    for name, make in TABLES.items():
        marked = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        if not re.search(marked, text, re.DOTALL):
            raise ValueError(f"{page}: expected <!-- {name} --> and <!-- end -->")
        made = f"\n{make(results)}\n"
        text = re.sub(marked, lambda m, made=made: m[1] + made + m[2], text, flags=re.DOTALL)
    path.write_text(as_text(rounded(results)) + "\n")
    page.write_text(text)


if __name__ == "__main__":
    main()
