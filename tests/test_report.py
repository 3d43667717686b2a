"""Tests of jaxint8.evaluation.report."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax
import pytest

from jaxint8.evaluation import report, sweep

ROW = report.Row(
    method="llm_int8",
    perplexity=38.2778,
    relative_change=0.0217,
    mean_abs_logprob_change=0.126,
    model_bytes=167_890_000,
    prefill_tokens_per_s=1234.56,
    decode_tokens_per_s=45.67,
    outlier_fraction=0.0123,
)
FLOAT = dataclasses.replace(
    ROW,
    method="float32",
    perplexity=37.4648,
    relative_change=0.0,
    mean_abs_logprob_change=0.0,
    outlier_fraction=0.0,
)
REPORT = report.Report(
    model="demo",
    text="demo",
    tokens=8192,
    rows=[FLOAT, ROW],
    environment={"command": "run this", "window": 512},
)


def table(content):
    """The cells of the Markdown table, line by line."""
    lines = [line for line in report.to_markdown(content).splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "the columns are aligned"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_json_has_exactly_the_fields_of_the_contract():
    content = json.loads(report.to_json(REPORT))
    assert list(content) == ["model", "text", "tokens", "environment", "rows"]
    assert list(content["rows"][0]) == [
        "method",
        "perplexity",
        "relative_change",
        "mean_abs_logprob_change",
        "model_bytes",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "outlier_fraction",
    ]
    assert content["rows"][1] == dataclasses.asdict(ROW)  # fractions, at full precision
    assert content["tokens"] == 8192


def test_what_is_not_finite_or_not_measured_is_null():
    row = dataclasses.replace(
        ROW, perplexity=math.nan, relative_change=math.inf, decode_tokens_per_s=None
    )
    got = json.loads(report.to_json(dataclasses.replace(REPORT, rows=[row])))["rows"][0]
    assert got["perplexity"] is got["relative_change"] is got["decode_tokens_per_s"] is None
    assert table(dataclasses.replace(REPORT, rows=[row]))[2][1:7:5] == ["nan", "-"]


def test_markdown_table_is_aligned_in_percent_and_names_the_command():
    lines = report.to_markdown(REPORT).splitlines()
    assert lines[0] == "# model demo, text demo, 8,192 tokens"
    assert lines[2] == "    run this"
    assert table(REPORT)[3] == [
        *("llm_int8", "38.2778", "+2.17 %", "0.1260"),
        *("167.9", "1,235", "45.7", "1.230 %"),
    ]
    assert "- window: 512" in lines


def test_write_makes_json_markdown_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    written = report.write(REPORT, tmp_path / "new" / "folder")
    names = ["report.json", "report.md", "quality.png", "speed.png"]
    assert [path.name for path in written] == names
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[2:])
    assert "![quality](quality.png)" in written[1].read_text()


def test_without_matplotlib_there_are_no_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "jaxint8.evaluation.plots", raising=False)
    monkeypatch.delattr("jaxint8.evaluation.plots", raising=False)
    written = report.write(REPORT, tmp_path)
    assert [path.name for path in written] == ["report.json", "report.md"]
    assert "png" not in written[1].read_text()


@pytest.mark.parametrize(
    "rows",
    [
        [FLOAT],
        [dataclasses.replace(ROW, relative_change=None, mean_abs_logprob_change=None)],
        [FLOAT, dataclasses.replace(ROW, relative_change=math.nan)],
    ],
)
def test_nothing_to_compare_means_no_plots(tmp_path, rows):
    written = report.write(dataclasses.replace(REPORT, rows=rows), tmp_path)
    assert len(written) == 2


@pytest.mark.parametrize(
    "row",
    [
        dataclasses.replace(ROW, relative_change=0.0, mean_abs_logprob_change=0.0),
        dataclasses.replace(ROW, relative_change=90.0, mean_abs_logprob_change=9.0),
        dataclasses.replace(ROW, relative_change=-0.001, decode_tokens_per_s=None),
    ],
)
def test_plots_of_extreme_rows(tmp_path, row):
    pytest.importorskip("matplotlib")
    assert len(report.write(dataclasses.replace(REPORT, rows=[FLOAT, row]), tmp_path)) == 4


def test_changes_have_plain_decimals():
    plots = pytest.importorskip("jaxint8.evaluation.plots")
    rows = [dataclasses.replace(ROW, mean_abs_logprob_change=x) for x in (0.115, 0.12, 0.18)]
    for kept in (rows, rows[:1]):
        figure = plots.figures(dataclasses.replace(REPORT, rows=[FLOAT, *kept]))["speed.png"]
        figure.canvas.draw()
        shown = [label.get_text() for label in figure.axes[0].get_yticklabels(which="both")]
        assert any(shown)
        assert all(float(label) > 0 for label in shown if label)


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    report.write(REPORT, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        report.write(dataclasses.replace(REPORT, model="other"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_environment_names_the_versions():
    environment = report.environment(window=512)
    assert environment["jax"] == jax.__version__
    assert environment["window"] == 512
    assert environment["device"].startswith("cpu")
    json.dumps(environment)


def test_a_sweep_is_drawn_and_tasks_are_tabled(tmp_path):
    pytest.importorskip("matplotlib")
    swept = [
        dataclasses.replace(ROW, method=f"{rule}:{n}{more}", mean_abs_logprob_change=0.1 + n / 100)
        for rule, more in (("llm_int8", ""), ("relative", ":column"))
        for n in (8, 2, 4)
    ]
    task = report.TaskRow("piqa", "topk", 200, 0.61, 0.03, 0.6, 0.03, -0.005, 0.007, None)
    both = dataclasses.replace(REPORT, rows=[FLOAT, *swept, ROW], tasks=[task])
    assert {path.name for path in report.write(both, tmp_path)} >= {"sweep.png"}
    found = {curve.name: list(curve.numbers) for curve in sweep.curves(both.rows)}
    assert found == {"llm_int8": [2, 4, 8], "relative:column": [2, 4, 8]}
    line = next(x for x in (tmp_path / "report.md").read_text().splitlines() if x[:6] == "| piqa")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["piqa", "topk", "200", "61.00 ± 3.00", "60.00 ± 3.00", "-0.50 ± 0.70", "-"]
    assert json.loads((tmp_path / "report.json").read_text())["tasks"][0]["acc"] == 0.61
