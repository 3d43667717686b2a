"""Columns that are taken out whole (ffi/cuda/marks.h) on the CPU, as the other kernels in test_cuda_executor.py."""

from typing import Any

import numpy as np
import pytest
from test_cuda_faults import unnoticed

import battery
from cuda_executor import (
    RMS_NORM,
    SILU_GATE,
    SPARSE,
    STREAM,
    TILED,
    WGMMA,
    Executor,
    expect_linear,
    make_around,
)
from jaxint8 import RelativeThreshold, Threshold, reference

COLUMN = Threshold(2.5, "column")
# Each block looks at all rows, several threads for a column, one, or one for several columns; so do the blocks of
# clusters, some without a column; marks of each row put together: fewer rows and more than a cluster is sooner
# done with, a rule that takes whole rows, rows that are not staged; many rows, which set bits of the same marks.
WAYS = [
    ((3, 24), COLUMN),
    ((7, 136), COLUMN),
    ((32, 256), COLUMN),
    ((70, 24), COLUMN),
    ((2, 4104), COLUMN),
    ((19, 1032), COLUMN),
    ((61, 280), COLUMN),
    ((9, 4104), COLUMN),
    ((257, 24), COLUMN),
    ((9, 520), RelativeThreshold(3.0, "column")),
    ((4, 333), COLUMN),
    ((2, 33000), COLUMN),
    ((1500, 24), COLUMN),
]


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(("shape", "rule"), WAYS, ids=str)
def test_every_way(executor: Executor, shape: tuple[int, int], rule: Any, order: int) -> None:
    executor.order = order
    x = battery.make((*shape, 1), battery.DTYPES[order]).x
    expect_rows(executor, x, rule)


@pytest.mark.parametrize(("shape", "rule"), WAYS, ids=str)
def test_rows_that_are_not_finite_have_no_say(
    executor: Executor, shape: tuple[int, int], rule: Any
) -> None:
    """Each in columns of its own, where no other row has an outlier; at last in all rows."""
    m, k = shape
    x = np.random.default_rng(k).uniform(-1, 1, (m, k)).astype(np.float32)
    x[:, k // 2] = 40
    for row, value in ((0, np.nan), (m - 1, -np.inf), (m // 2, np.inf)):
        x[row, (5 * row + 3) % k] = value
        x[row, row % k :: 7] = 50
        expect_rows(executor, x, rule)
    x[:, -1] = np.nan
    expect_rows(executor, x, rule)


def expect_rows(executor: Executor, x: np.ndarray, rule: Any) -> None:
    for got, wanted in zip(
        executor.quantize(x, rule), reference.quantize_rows(x, rule), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("path", [STREAM, TILED, WGMMA, SPARSE])
@pytest.mark.parametrize("prologue", [0, RMS_NORM, SILU_GATE])
def test_codes_that_fit_into_a_byte(executor: Executor, prologue: int, path: int) -> None:
    """Marked columns of codes around 64, 127 and 128, where a code has a high part or need not have one."""
    m, k = (16, 160) if path == STREAM else (37, 160)
    case, around = make_around((m, k, 24), np.float32, prologue)
    if prologue == 0:
        steps = np.resize(np.arange(-200, 201), (m, 40)).astype(np.float32)
        case.x[:] = np.clip(case.x, -2, 2)
        case.x[:, 0] = 127 / 64
        case.x[:, 40:80] = steps / 64
    expect_linear(executor, case, COLUMN, path, around)


def test_planted_faults_are_noticed_in_marks(executor: Executor) -> None:
    """With rows that are not finite, for which the marks are made twice."""
    places: dict[tuple[str, int], list[np.ndarray]] = {}
    for shape, dtype, kind in (
        ((3, 272, 1), np.float32, "nan"),
        ((6, 136, 1), np.float32, "outliers"),
        ((33, 264, 1), np.float32, "nan"),
        ((17, 520, 1), np.float32, "outliers"),
        ((17, 520, 1), np.float32, "nan"),
        ((9, 1032, 1), np.float32, "nan"),
        ((5, 37, 1), np.float32, "nan"),
    ):
        x = battery.make(shape, dtype, kind).x
        expect_rows(executor, x, COLUMN)
        for place in executor.sites():
            places.setdefault(place, []).append(x)
    missed = unnoticed(
        executor, places, lambda x: expect_rows(executor, x, COLUMN), lambda _: False
    )
    assert not missed, "\n".join(missed)
    assert sum(place.startswith("marks.h") for place, _ in places) > 5
