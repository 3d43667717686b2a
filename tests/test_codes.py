"""The host quantiser that loading uses: the same bits as the oracle and as `quantize`."""

from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxint8 import quantize, reference
from jaxint8.checkpoint import CheckpointError, codes, open_checkpoint, write_safetensors


class Held:
    """A reader of one matrix that is in memory."""

    path, metadata = Path("held"), {}

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    def names(self) -> list[str]:
        return ["w"]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.matrix.shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.matrix.dtype

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.matrix[rows].copy()

    def close(self) -> None: ...


def quantized(matrix: np.ndarray, absmax: Any = None) -> tuple[np.ndarray, np.ndarray]:
    made, scale = np.empty(matrix.shape, np.int8), np.empty(matrix.shape[:1], np.float32)
    for rows in codes.row_blocks(matrix.shape, elements=3 * matrix.shape[1]):
        codes.quantize_rows(Held(matrix), "w", rows, made[rows], scale[rows], absmax)
    return made, scale


EDGES = np.array(
    [
        [0, 0, 0, 0],
        [1e-44, -1e-44, 0, 0],  # subnormal: counts as zero
        [127 * 2.0**-125, 0, 0, 2.0**-125],  # the smallest usable scale
        [126 * 2.0**-125, 0, 0, 1],
        [127, 0.5, 1.5, -2.5],  # ties go to even
        [-127, 126.5, -126.5, 63.5],
        [3.4e38, -3.4e38, 1, 0],
        [-0.0, 1e-30, -1e-30, 1e-31],
        [1, 1, 1, 1],
    ],
    np.float32,
)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_codes_are_those_of_the_oracle(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore", under="ignore"):
        edges = EDGES.astype(dtype)
    edges = np.where(np.isfinite(edges), edges, dtype(7))
    for matrix in (edges, rng.normal(size=(37, 130)).astype(dtype), np.zeros((0, 4), dtype)):
        made, scale = quantized(matrix)
        expected = reference.quantize(matrix.T)
        np.testing.assert_array_equal(made, expected[0])
        np.testing.assert_array_equal(scale, expected[1])
        if dtype is not np.float64:
            ours = quantize(jnp.asarray(matrix.T))
            np.testing.assert_array_equal(made, ours.codes)
            np.testing.assert_array_equal(scale, ours.scale)


@hypothesis.given(
    hnp.arrays(
        np.float32, (4, 5), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_any_finite_matrix(matrix: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        expected = reference.quantize(matrix.T)
        made, scale = quantized(matrix)
    np.testing.assert_array_equal(made, expected[0])
    np.testing.assert_array_equal(scale, expected[1])


def test_one_scale_for_a_matrix() -> None:
    matrix = np.random.default_rng(1).normal(size=(7, 9)).astype(np.float32)
    blocks = list(codes.row_blocks(matrix.shape, elements=20))
    assert blocks == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    absmax = max(codes.absmax_of_rows(Held(matrix), "w", rows).max() for rows in blocks)
    made, scale = quantized(matrix, np.array([absmax]))
    expected = reference.quantize(matrix.T, per="tensor")
    np.testing.assert_array_equal(made, expected[0])
    np.testing.assert_array_equal(scale, expected[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_named(tmp_path: Path, value: float) -> None:
    matrix = np.ones((8, 4), np.float32)
    matrix[5, 1] = value
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a.b": matrix, "v": matrix[5], "big": np.full((2, 2), 1e300)})
    reader = open_checkpoint(path)
    message = r"m.safetensors: tensor 'a.b': row 5 holds a non-finite value$"
    made, scale = np.empty((4, 4), np.int8), np.empty(4, np.float32)
    with pytest.raises(CheckpointError, match=message):
        codes.quantize_rows(reader, "a.b", slice(4, 8), made, scale)
    with pytest.raises(CheckpointError, match=message):
        codes.absmax_of_rows(reader, "a.b", slice(4, 8))
    with pytest.raises(CheckpointError, match=message):
        codes.read_floats(reader, "a.b", slice(0, 8), np.float16)
    with pytest.raises(CheckpointError, match="tensor 'v': row 1 holds"):
        codes.read_floats(reader, "v", slice(0, 4), ml_dtypes.bfloat16)
    with pytest.raises(CheckpointError, match="tensor 'big': row 0 holds"):
        codes.quantize_rows(reader, "big", slice(0, 2), made[:2, :2], scale[:2])
    with pytest.raises(CheckpointError, match="tensor 'big': row 0 holds"):
        codes.read_floats(reader, "big", slice(0, 2), np.float32)


def test_floats_are_rounded_to_nearest() -> None:
    matrix = np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-140]], np.float32)
    got = codes.read_floats(Held(matrix), "w", slice(0, 1), ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32)[0, :2], [1, 1 + 2.0**-6])
    assert got.dtype == ml_dtypes.bfloat16
