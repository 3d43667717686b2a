"""Texts to evaluate on: the demo text, CPython's own documentation, or a file that the user names.

A text is one string; cutting it into tokens is the model's affair. The surprising fact: documents
of a JSON-lines file are joined by a blank line, as the demo text's files are, so a window may
span two documents.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxint8 import download

SEPARATOR = "\n\n"
"""What stands between two documents of one text."""


@dataclass(frozen=True)
class Text:
    """A text and the name it goes by in a report."""

    name: str
    text: str


def load_text(source: str) -> Text:
    """Reads a text.

    Args:
      source: "demo" (public-domain speeches, downloaded once), "pydoc" (the topics of CPython's
        `pydoc`, no network needed), or the path of a file: `.jsonl` holds one {"text": ...}
        object a line, anything else is plain text. UTF-8 in both cases.

    Raises:
      ValueError: the name is empty, or the file is not UTF-8, not JSON lines with "text", or holds no text.
      OSError: the file cannot be read, or the demo text cannot be downloaded.
    """
    if not source:
        raise ValueError("text: expected a file, demo or pydoc, got an empty name")
    if source == "demo":
        try:
            files = download.demo_text_files()
        except download.DownloadError as error:
            raise download.DownloadError(f"{error}; the text pydoc needs no network") from None
        return Text("demo", SEPARATOR.join(map(read, files)))
    if source == "pydoc":
        return Text("pydoc", _pydoc_topics())
    path = Path(source)
    content = read(path)
    if path.suffix == ".jsonl":
        content = SEPARATOR.join(_json_lines(path, content))
    if not content.strip():
        raise ValueError(f"text: {path} holds no text")
    return Text(path.name, content)


def read(path: Path, name: str = "text") -> str:
    """The file as it stands: no newline is translated, for that would change the tokens.

    Args:
      path: a UTF-8 file; a byte order mark is left out.
      name: what errors call it.

    Raises:
      ValueError: it is not UTF-8.
      OSError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{name}: {path} is not UTF-8: {where}") from None
    except OSError as error:
        raise OSError(f"{name}: {path} cannot be read: {error.strerror}") from None


def _json_lines(path: Path, content: str) -> Iterator[str]:
    # Not str.splitlines: that also splits at U+2028 and its kin, which JSON strings may hold.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"text: {path} line {number} is not JSON: {error.msg}") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f'text: {path} line {number}: expected an object with "text", a string'
            )
        yield text


def _pydoc_topics() -> str:
    try:
        from pydoc_data import topics  # optional: some distributions of CPython leave it out
    except ImportError:
        raise FileNotFoundError("text: this Python comes without pydoc_data.topics") from None
    return SEPARATOR.join(topics.topics[name] for name in sorted(topics.topics))
