"""Readers and the writer: round trips to the bit, and one clear error for everything broken."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from jaxint8.checkpoint import (
    CHECKSUMS,
    CheckpointError,
    LazyTensor,
    bitsandbytes,
    open_checkpoint,
    write_checkpoint,
    write_safetensors,
)
from jaxint8.checkpoint.safetensors import DTYPES

Header = dict[str, Any]


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {
        name: rng.integers(0, 256, 5 * 3 * dtype.itemsize, np.uint8).view(dtype).reshape(5, 3)
        for name, dtype in DTYPES.items()
        if name != "BOOL"
    }
    made["BOOL"] = rng.integers(0, 2, (5, 3)).astype(bool)
    made["scalar"] = np.float32(3.5).reshape(())
    made["empty"] = np.zeros((0, 4), np.float16)
    return made


def write_raw(
    path: Path, header: Header | bytes, data: bytes = b"", length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> Header:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_safetensors_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = tensors()
    write_safetensors(path, written, {"format": "pt"})
    reader = open_checkpoint(path)
    assert sorted(reader.names()) == sorted(written)
    assert reader.metadata == {"format": "pt"}
    for name, array in written.items():
        assert reader.shape(name) == array.shape
        assert reader.dtype(name) == array.dtype
        assert reader.read(name).tobytes() == array.tobytes()
        if array.ndim:
            for rows in (slice(1, 4), slice(2, None), slice(0, 0), slice(4, 99)):
                got = reader.read(name, rows)
                assert got.shape == array[rows].shape
                assert got.tobytes() == array[rows].tobytes()
    reader.close()
    reader.close()
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_offsets_are_aligned_to_the_elements(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"odd": np.zeros(3, np.int8), "f": np.zeros(2, np.float32)})
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length])["f"]["data_offsets"] == [0, 8]


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    written = {f"layers.{i}.weight": np.full((4, 8), i, np.float32) for i in range(5)}
    (tmp_path / "model.safetensors").write_bytes(b"an older model")
    paths = write_checkpoint(tmp_path, written, {"format": "pt"}, shard_bytes=256)
    assert [p.name for p in paths] == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    assert sorted(tmp_path.iterdir()) == sorted([*paths, tmp_path / CHECKSUMS])
    reader = open_checkpoint(tmp_path)
    assert reader.metadata == {"format": "pt", "total_size": 640}
    for name, array in written.items():
        np.testing.assert_array_equal(reader.read(name), array)
        np.testing.assert_array_equal(reader.read(name, slice(1, 2)), array[1:2])
    # Copied tensor by tensor into one file, which replaces the shards.
    assert len(write_checkpoint(tmp_path, {n: LazyTensor(reader, n) for n in reader.names()})) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", CHECKSUMS}
    np.testing.assert_array_equal(
        open_checkpoint(tmp_path).read("layers.3.weight"), written["layers.3.weight"]
    )


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    class Fails:
        shape, dtype = (3,), np.dtype(np.float32)

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            raise RuntimeError("the device went away")

    write_checkpoint(tmp_path, {"a": np.ones(3, np.float32)})
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(RuntimeError, match="went away"):
        write_checkpoint(tmp_path, {"a": np.zeros(3, np.float32), "b": Fails()}, shard_bytes=12)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", CHECKSUMS}
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(TypeError, match="tensor 'c': safetensors has no dtype complex64"):
        write_safetensors(tmp_path / "c.safetensors", {"c": np.zeros(3, np.complex64)})


BROKEN: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header longer than the file": ({}, b"", 99, "claims 99 bytes, the file has 10"),
    "header longer than anything": ({}, b"", 2**63, "truncated"),
    "not JSON": (b"{'a': 1}", b"", None, "not JSON"),
    "not UTF-8": (b"\xff\xfe{}", b"", None, "not JSON"),
    "nested without end": (b"[" * 100_000, b"", None, "not JSON"),
    "not an object": (b"[]", b"", None, "expected a JSON object, got list"),
    "twice the same name": (
        b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
        None,
        "holds 'a' twice",
    ),
    "metadata not strings": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "entry not an object": ({"a": 3}, b"", None, "tensor 'a': expected an object"),
    "entry without offsets": (
        {"a": {"dtype": "F32", "shape": []}},
        b"",
        None,
        "tensor 'a': expected an object",
    ),
    "unknown dtype": ({"a": entry("F4")}, bytes(8), None, "tensor 'a': unknown dtype 'F4'"),
    "dtype not a string": ({"a": {**entry(), "dtype": [1]}}, bytes(8), None, "unknown dtype"),
    "negative size": ({"a": entry(shape=(-2,))}, bytes(8), None, "tensor 'a': expected a shape"),
    "size not an integer": (
        {"a": entry(shape=(True,))},
        bytes(8),
        None,
        "tensor 'a': expected a shape",
    ),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, bytes(8), None, "tensor 'a': expected two"),
    "offsets backwards": ({"a": entry(offsets=(8, 0))}, bytes(8), None, "tensor 'a': data_offsets"),
    "truncated data": (
        {"a": entry()},
        bytes(7),
        None,
        "tensor 'a': data_offsets .0, 8. do not fit the 7",
    ),
    "size and offsets differ": (
        {"a": entry(shape=(3,))},
        bytes(8),
        None,
        "takes 12 bytes, .* hold 8",
    ),
    "overlap": (
        {"a": entry(), "b": entry(offsets=(4, 12))},
        bytes(12),
        None,
        "'a' and 'b' overlap",
    ),
    "bytes left over": ({"a": entry()}, bytes(9), None, "cover 8 of 9"),
    "hole": ({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17), None, "cover 16 of 17"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors_are_named(tmp_path: Path, case: str) -> None:
    header, data, length, message = BROKEN[case]
    path = write_raw(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_files_and_pickles_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickled weights .* convert"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="pickled"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: np.zeros(1, np.float32)})
    with pytest.raises(
        CheckpointError, match=r"several .safetensors files .* a.safetensors, b.safetensors"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert open_checkpoint(tmp_path).names() == ["a"]
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"not a safetensors file .0 bytes"):
        open_checkpoint(tmp_path / "empty.safetensors")
    (tmp_path / "a.txt").touch()
    with pytest.raises(CheckpointError, match=r"expected a .safetensors or .gguf file"):
        open_checkpoint(tmp_path / "a.txt")


def test_broken_indexes_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {f"t{i}": np.zeros(4, np.float32) for i in range(3)}, shard_bytes=16)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def broken(weight_map: Any, message: str) -> None:
        index.write_text(json.dumps({**good, "weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)

    files = good["weight_map"]
    broken(
        {**files, "t9": files["t0"]}, "tensor 't9' should be in 'model-00001-of-00003.safetensors'"
    )
    broken({**files, "t0": "../secret.safetensors"}, "not a plain file name")
    broken({**files, "t0": 3}, "weight_map")
    broken(None, "weight_map")
    index.write_text(json.dumps(good))
    reader = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="has no tensor 'nope'"):
        reader.read("nope")
    (tmp_path / files["t1"]).unlink()
    with pytest.raises(
        CheckpointError, match=r"shard 'model-00002-of-00003.safetensors' .1 tensors. is missing"
    ):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.zeros(64, np.float32)})
    reader = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="tensor 'a': expected 256 bytes"):
        reader.read("a")


def test_rows_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.zeros((4, 2), np.float32), "s": np.float32(1).reshape(())})
    reader = open_checkpoint(path)
    with pytest.raises(ValueError, match="rows: expected a slice with step 1"):
        reader.read("a", slice(None, None, 2))
    with pytest.raises(CheckpointError, match="rows asked of a tensor without axes"):
        reader.read("s", slice(0, 1))


# GGUF

Q = gguf.GGMLQuantizationType
K_QUANTS = (Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K)


def write_gguf(path: Path, split: int = 1) -> dict[str, np.ndarray]:
    """Writes one tensor of each type; returns what the package's dequantiser makes of them."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("an.int", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "grüße")
    writer.add_array("some.ints", [3, -1, 2])
    writer.add_array("some.strings", ["a", "", "ü"])
    if split > 1:
        writer.add_uint16("split.count", split)
    expected = {}
    for kind in (Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0):
        values = rng.normal(size=(6, 64)).astype(np.float32)
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{path.stem}.{kind.name}", data, raw_dtype=kind)
        expected[f"{path.stem}.{kind.name}"] = gguf.quants.dequantize(data, kind)
    for kind in (
        K_QUANTS
    ):  # the package cannot make these: any bytes are a block, but for their float16 scales
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 64, (6, 512 // block * size), np.uint8)
        writer.add_tensor(f"{path.stem}.{kind.name}", data, raw_dtype=kind)
        expected[f"{path.stem}.{kind.name}"] = gguf.quants.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_gguf_reads_what_the_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    expected = write_gguf(path)
    reader = open_checkpoint(path)
    assert reader.names() == list(expected)
    for name, array in expected.items():
        got = reader.read(name)
        assert got.shape == reader.shape(name) == array.shape
        assert got.dtype == reader.dtype(name)
        np.testing.assert_array_equal(got.astype(np.float32), array)
        np.testing.assert_array_equal(reader.read(name, slice(1, 5)).astype(np.float32), array[1:5])
    assert reader.dtype("m.F16") == np.float16
    assert reader.dtype("m.BF16") == ml_dtypes.bfloat16
    assert reader.metadata == {
        "general.architecture": "llama",
        "an.int": 7,
        "a.float": 0.5,
        "a.bool": True,
        "a.string": "grüße",
        "some.ints": [3, -1, 2],
        "some.strings": ["a", "", "ü"],
    }


def test_split_gguf_is_one_checkpoint(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    expected = write_gguf(paths[0], split=2) | write_gguf(paths[1], split=2)
    reader = open_checkpoint(paths[0])
    assert reader.names() == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(reader.read(name).astype(np.float32), array)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002.gguf: is missing"):
        open_checkpoint(paths[0])
    paths[0].rename(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="split in 2, but its name"):
        open_checkpoint(tmp_path / "m.gguf")


def gguf_bytes(
    version: int = 3,
    tensors: int = 1,
    values: int = 0,
    head: bytes = b"",
    name: bytes = b"t",
    dims: tuple[int, ...] = (32,),
    kind: int = 0,
    offset: int = 0,
    data: int = 128,
) -> bytes:
    text = struct.pack("<4sIQQ", b"GGUF", version, tensors, values) + head
    info = struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    text += (info + struct.pack("<IQ", kind, offset)) * tensors
    return text + bytes(-len(text) % 32) + bytes(data)


def key(value: bytes, kind: int, name: bytes = b"k") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


HUGE = struct.pack("<Q", 2**62)
BROKEN_GGUF = {
    "short": (b"GGUF", "not a GGUF file"),
    "magic": (b"GGML" + gguf_bytes()[4:], "not a GGUF file .it starts with b'GGML'"),
    "version": (gguf_bytes(version=1), "GGUF version 1 is not supported"),
    "big-endian": (gguf_bytes(version=3 << 24), "little-endian"),
    "huge key": (
        gguf_bytes(values=1, head=HUGE),
        "metadata key 0 of 1 at byte 32 claims 4611686018427387904",
    ),
    "huge string": (gguf_bytes(values=1, head=key(HUGE, 8)), "metadata 'k' at byte .* claims"),
    "huge array": (
        gguf_bytes(values=1, head=key(struct.pack("<I", 5) + HUGE, 9)),
        "metadata 'k' at byte .* claims",
    ),
    "huge strings": (
        gguf_bytes(values=1, head=key(struct.pack("<I", 8) + HUGE, 9)),
        "metadata 'k' at byte .* claims",
    ),
    "nested arrays": (
        gguf_bytes(values=1, head=key(struct.pack("<IQ", 9, 1), 9)),
        "array of the unknown value type 9",
    ),
    "unknown value": (gguf_bytes(values=1, head=key(b"", 13)), "'k' has the unknown value type 13"),
    "key twice": (gguf_bytes(values=2, head=key(b"\1", 0) * 2), "holds 'k' twice"),
    "many values": (gguf_bytes(values=2**60), "holds '' twice|truncated, or a false header"),
    "many tensors": (gguf_bytes()[:8] + HUGE + gguf_bytes()[16:], "truncated, or a false header"),
    "alignment": (
        gguf_bytes(values=1, head=key(struct.pack("<I", 24), 4, b"general.alignment")),
        "general.alignment: expected a power of two, got 24",
    ),
    "split": (
        gguf_bytes(values=1, head=key(struct.pack("<Q", 1) + b"x", 8, b"split.count")),
        "split.count: expected an integer, got 'x'",
    ),
    "name not UTF-8": (gguf_bytes(name=b"\xff"), "name of tensor 0 of 1 is not UTF-8"),
    "tensor twice": (gguf_bytes(tensors=2), "tensor 't' twice"),
    "nine axes": (gguf_bytes(dims=(1,) * 9), "tensor 't' claims 9 axes"),
    "unknown type": (gguf_bytes(kind=999), "tensor 't': unknown type 999"),
    "part of a block": (
        gguf_bytes(dims=(33,), kind=8),
        "tensor 't': rows of .33,. are not whole Q8_0 blocks of 32",
    ),
    "truncated": (gguf_bytes(data=127), "tensor 't': F32.32. takes bytes .* truncated"),
    "offset": (gguf_bytes(offset=2**50), "tensor 't': F32.32. takes bytes .* truncated"),
    "overflowing shape": (gguf_bytes(dims=(2**33, 2**33)), "tensor 't': .* truncated"),
}


@pytest.mark.parametrize("case", BROKEN_GGUF)
def test_broken_gguf_are_named(tmp_path: Path, case: str) -> None:
    data, message = BROKEN_GGUF[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("valid")
    write_safetensors(
        directory / "m.safetensors", {"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.int8)}
    )
    write_gguf(directory / "m.gguf")
    return {path.suffix: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def damaged_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "m"


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_damage_is_an_error_or_harmless(
    valid_files: dict[str, bytes], damaged_file: Path, suffix: str, data: st.DataObject
) -> None:
    """A damaged header or a file cut short either still reads or is one CheckpointError."""
    raw = bytearray(valid_files[suffix])
    header = 700 if suffix == ".gguf" else len(raw) - 53
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, len(raw) // 2, header]))]
    path = damaged_file.with_suffix(suffix)
    path.write_bytes(raw)
    try:
        with np.errstate(all="ignore"):
            reader = open_checkpoint(path)
            for name in reader.names():
                assert reader.read(name).shape == reader.shape(name)
    except CheckpointError as error:
        assert "\n" not in str(error)


# bitsandbytes


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    codes = np.array([[-128, 127], [0, 0], [1, 2]], np.int8)
    absmax = np.array([2.54, 0.0, 1e-3], np.float32)
    good = {"a.weight": codes, "a.SCB": absmax, "a.weight_format": np.uint8(0).reshape(())}
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {**good, "b.weight": np.zeros((2, 2), np.float32)})
    reader = open_checkpoint(path)
    assert bitsandbytes.is_int8(reader, "a.weight")
    assert not bitsandbytes.is_int8(reader, "b.weight")
    scale = bitsandbytes.read_scale(reader, "a.weight")
    np.testing.assert_array_equal(
        scale, np.array([absmax[0] / np.float32(127), 1, absmax[2] / np.float32(127)])
    )
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(reader.read("a.weight"), codes)

    def broken(message: str, **changes: np.ndarray | None) -> None:
        parts = {
            n: t
            for n, t in {**good, **{f"a.{n}": t for n, t in changes.items()}}.items()
            if t is not None
        }
        write_safetensors(path, parts)
        broken_reader = open_checkpoint(path)
        with pytest.raises(CheckpointError, match=message):
            assert bitsandbytes.is_int8(broken_reader, "a.weight")
            bitsandbytes.read_scale(broken_reader, "a.weight")

    broken("int8 codes without their scales .'a.SCB'", SCB=None)
    broken(r"expected int8.n, k. with float32.n. scales", SCB=absmax[:2])
    broken(r"expected int8.n, k. with float32.n. scales", SCB=absmax.astype(np.float64))
    broken("weight_format 2 is not row-major", weight_format=np.uint8(2).reshape(()))
    broken("expected finite scales >= 0", SCB=np.array([1, np.nan, 1], np.float32))
    broken("expected finite scales >= 0", SCB=np.array([1, -1, 1], np.float32))


def test_absmax_gives_the_scale_back_to_the_bit() -> None:
    mantissas = (np.arange(2**23, dtype=np.uint32) | np.uint32(127 << 23)).view(np.float32)
    for absmax in (mantissas, np.array([3e-38, np.finfo(np.float32).max], np.float32)):
        scale = absmax / np.float32(127)
        found = bitsandbytes.absmax_of(scale)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found / np.float32(127), scale)
