"""What an evaluation has measured so far, in files: an interrupted run with the same --output goes on where it was.

Each file names what its content depends on, by a hash; one of another run is refused rather than mixed in. The
surprising fact: the path of a checkpoint is not enough for that, so the sizes and times of its files are part of it.
"""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

import jaxint8
from jaxint8.cli.measure import Measured
from jaxint8.evaluation.files import damaged, write_atomically
from jaxint8.evaluation.perplexity import Score

FOLDER = "measured"
# What NumPy, its zip files and JSON raise where a file is not what was written.
_DAMAGE = (
    *(EOFError, zipfile.BadZipFile, RuntimeError),
    *(ValueError, KeyError, TypeError, AttributeError),
)


def identity(source: str, method: Any, *rest: Any) -> str:
    """What results depend on, as text: the checkpoint, the method (a frozen dataclass) and the rest."""
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return repr((jaxint8.__version__, source, stamps, method, *rest))


def file_of(output: str | None, what: str, method: str, suffix: str) -> Path | None:
    """The file of a method's results on a text or a task; None without an output folder."""
    if output is None:
        return None
    return Path(output) / FOLDER / f"{what}-{method.replace(':', '-')}{suffix}"


def read(path: Path | None, identity: str) -> Measured | None:
    """What was measured, or None if nothing was.

    Raises:
      ValueError: the file is of another run, or damaged.
    """
    if path is None or not path.exists():
        return None
    try:
        # Opened here, as NumPy leaves a file open that is no whole zip file.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            told, logprobs = json.loads(str(content["told"])), content["logprobs"]
        fingerprint = told.pop("fingerprint")
    except _DAMAGE:
        raise ValueError(damaged(path)) from None
    if fingerprint != _hash(identity):
        raise ValueError(
            f"output: {path} is of another model, method or text; remove it or choose another folder"
        )
    score = Score(logprobs, told.pop("tokens"), told.pop("tokens_per_s"))
    return Measured(score=score, **told)


def write(path: Path | None, measured: Measured, identity: str) -> None:
    """Keeps what was measured; the file appears whole or not at all."""
    if path is None:
        return
    told = {
        field.name: getattr(measured, field.name)
        for field in dataclasses.fields(measured)
        if field.name != "score"
    }
    score = measured.score
    told |= {"tokens": score.tokens, "tokens_per_s": score.tokens_per_s}
    told |= {"fingerprint": _hash(identity)}

    def fill(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, told=np.array(json.dumps(told)), logprobs=score.logprobs)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, fill)


def _hash(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()
