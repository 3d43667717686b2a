"""Makes quality.md and its plots: every table of quality that this project shows, with the command of each.

    python docs/results/make_quality.py --wikitext=wiki.test.raw.txt --c4=c4.jsonl

Runs what build/results does not hold yet (about an hour on two cores), and can be interrupted: each command takes up
what it had measured. WikiText-2 and C4 are files that you have; without them their tables are left out.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from jaxint8.evaluation import report

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "results"
FEW = "--methods=float32,weights_only,vectorwise,llm_int8,relative,topk"
INJECTED = "--methods=float32,absmax,vectorwise,llm_int8,llm_int8:float_weights,relative,topk"
SWEEP = (
    "--methods=float32,weights_only,vectorwise,"
    "llm_int8:2,llm_int8:4,llm_int8:6,llm_int8:10,llm_int8:4:token,llm_int8:6:token,llm_int8:10:token,"
    "relative:4,relative:6,relative:8,relative:12,topk:2,topk:8,topk:32,"
    "relative:6:column,relative:6:float,topk:8:float,llm_int8:6:float,llm_int8:6:float_weights"
)


CACHE = "--methods=float32,llm_int8,llm_int8:kv_int8,relative,relative:kv_int8,topk,topk:kv_int8 --nodecode"


@dataclass(frozen=True)
class Run:
    """A section: what is run (the last command writes the report), and what a reader should know."""

    name: str
    title: str
    commands: tuple[str, ...]
    note: str = ""
    plots: tuple[str, ...] = ()
    speeds: bool = True


RUNS = (
    Run(
        "demo",
        "Every method of Table 1, demo text",
        ("jaxint8-eval --methods=all --max_tokens=4096 --nodecode",),
        "Outliers: share of the values entering int8 layers that are carried at higher precision.",
        ("quality.png",),
    ),
    Run(
        "sweep",
        "Thresholds, scopes, arithmetics, weights of outliers",
        (f"jaxint8-eval {SWEEP} --max_tokens=2048 --nodecode",),
        "`:token` takes single values and not columns; `:float` adds outliers in floating point and not as 15-bit "
        "integers; `:float_weights` multiplies them with the weights before quantisation (the paper's equation 8) and "
        "not with dequantised codes (its released code).",
        ("sweep.png",),
    ),
    Run(
        "cache",
        "Int8 keys and values",
        (f"jaxint8-eval {CACHE}",),
        "`:kv_int8` (or `--kv_cache=int8` for all int8 methods): attention sees keys and values as int8 vectors of one "
        "scale each, keys spread by a Hadamard transform, in prompts too, so these are the keys and values that "
        "generation sees. All 8,192 tokens of `make demo`.",
        speeds=False,
    ),
    Run(
        "wikitext",
        "WikiText-2, raw test split",
        (f"jaxint8-eval --text={{wikitext}} {FEW} --max_tokens=2048 --nodecode",),
    ),
    Run(
        "c4",
        "C4 (en), a sample of documents",
        (f"jaxint8-eval --text={{c4}} {FEW} --max_tokens=2048 --nodecode",),
    ),
    Run(
        "zeroshot",
        "Zero-shot tasks",
        (
            "jaxint8-eval --text= --tasks=lambada,hellaswag,piqa,winogrande --limit=200 "
            "--methods=float32,topk,llm_int8,relative,absmax",
        ),
        "200 documents of each, spread evenly. Against float32: the same documents, so its error is the paired one.",
    ),
    Run(
        "analysis",
        "Outlier features",
        ("jaxint8-analyze --max_tokens=4096",),
        "",
        ("features.png", "magnitude.png", "snr.png"),
    ),
    *(
        Run(
            f"injected_x{factor}",
            f"Injected outliers: six dimensions times {factor}",
            (
                f"jaxint8-analyze --inject={factor} --output=build/injected_x{factor}",
                f"jaxint8-eval --model=build/injected_x{factor} {INJECTED} --max_tokens=2048 --nodecode",
            ),
            "**Injected**, not learned: the float function is that of the demo model to the bit.",
        )
        for factor in (16, 256)
    ),
)


def main() -> None:
    """Runs what is missing and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wikitext", type=Path, help="the raw test split as a text file")
    parser.add_argument("--c4", type=Path, help="JSON lines with a field text")
    parser.add_argument("--collect", action="store_true", help="run nothing, show what there is")
    options = parser.parse_args()
    files = {"wikitext": options.wikitext, "c4": options.c4}
    lines = [
        "# Quality",
        "",
        "SmolLM2-135M-Instruct (the demo model), weights of its Q4_1 file read as the 16-bit checkpoint. Made by",
        "`python docs/results/make_quality.py`; the change of log p is the mean over tokens of its absolute difference",
        "from float32. Speeds were taken beside other work and only order methods roughly.",
        "",
    ]
    for run in RUNS:
        done = any((BUILD / run.name / name).exists() for name in ("report.json", "analysis.json"))
        missing = run.name in files and files[run.name] is None
        if not done and not missing and not options.collect:
            for i, command in enumerate(run.commands):
                arguments = shlex.split(command.format(**files))
                if i == len(run.commands) - 1:
                    arguments.append(f"--output={BUILD / run.name}")
                program = Path(sys.executable).with_name(arguments[0])
                subprocess.run([program, *arguments[1:]], check=True, cwd=HERE.parents[1])
            done = True
        if done:
            lines += section(run)
    (HERE / "quality.md").write_text("\n".join(lines))


def section(run: Run) -> list[str]:
    """The lines of a section; its plots are copied beside the document."""
    folder = BUILD / run.name
    shown = {name: f"quality/{run.name}_{name}" for name in run.plots if (folder / name).exists()}
    for name, target in shown.items():
        (HERE / "quality").mkdir(exist_ok=True)
        shutil.copyfile(folder / name, HERE / target)
    commands = [command.format(wikitext="FILE.txt", c4="FILE.jsonl") for command in run.commands]
    return [
        f"## {run.title}",
        "",
        *(f"    {command}" for command in commands),
        "",
        *([run.note, ""] if run.note else []),
        *(analysis(folder) if (folder / "analysis.md").exists() else tables(folder, run.speeds)),
        *(f"![{name}]({target})\n" for name, target in shown.items()),
    ]


def tables(folder: Path, speeds: bool) -> list[str]:
    """The tables of an evaluation, with or without its speeds."""
    content = json.loads((folder / "report.json").read_text())
    rows = [report.Row(**row) for row in content["rows"]]
    tasks = [report.TaskRow(**row) for row in content.get("tasks", [])]
    columns = [(name, show) for name, show in report.COLUMNS if speeds or "tok/s" not in name]
    return [
        *(report.markdown_table(columns, rows) if rows else []),
        *(report.markdown_table(report.TASK_COLUMNS, tasks) if tasks else []),
    ]


def analysis(folder: Path) -> list[str]:
    """The tables of an analysis, without its heading, plots and environment."""
    body = (folder / "analysis.md").read_text().split("\n\n", 2)[2]
    lines = [line for line in body.split("## Environment")[0].splitlines() if line[:2] != "!["]
    return [*"\n".join(lines).strip().splitlines(), ""]


if __name__ == "__main__":
    main()
