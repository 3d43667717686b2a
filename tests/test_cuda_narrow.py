"""The CUDA kernel for some tens of rows (ffi/cuda/narrow.h) on the CPU, as the others in test_cuda_executor.py."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_cuda_faults import unnoticed_in_layers

import battery
from cuda_executor import (
    NARROW,
    RMS_NORM,
    SILU_GATE,
    Executor,
    expect_linear,
    make_around,
)
from jaxint8 import RelativeThreshold, Threshold, TopK, reference


# One step of k and several, fewer stages than steps, tiles of every width and more of them than multiprocessors, some
# tiles of rows; rows and columns off every boundary.
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((20, 64, 40), None),
        ((64, 1300, 96), None),
        ((65, 200, 130), RelativeThreshold(3.0)),
        ((5, 333, 70), Threshold(0.5, "token")),
        ((130, 260, 240), TopK(8)),
        ((17, 144, 288), Threshold(2.0, "column")),
        ((33, 1333, 338), TopK(2)),
        ((70, 130, 390), None),
        ((200, 64, 450), Threshold(0.3, "token")),
    ],
    ids=str,
)
def test_narrow(executor: Executor, shape: tuple[int, int, int], rule: Any, order: int) -> None:
    executor.order = order
    expect_linear(executor, battery.make(shape, battery.DTYPES[order]), rule, NARROW)


@pytest.mark.parametrize("kind", sorted(battery.KINDS))
def test_narrow_kinds(executor: Executor, kind: str) -> None:
    dtype = np.float32 if kind in battery.FLOAT32_ONLY else ml_dtypes.bfloat16
    for rule in (None, Threshold(6.0, "column"), RelativeThreshold(), TopK(8)):
        expect_linear(executor, battery.make((67, 528, 40), dtype, kind), rule, NARROW)


@pytest.mark.parametrize("prologue", [0, RMS_NORM, SILU_GATE])
@pytest.mark.parametrize("shape", [(20, 144, 136), (40, 130, 21), (70, 272, 104)], ids=str)
def test_narrow_around(executor: Executor, shape: tuple[int, int, int], prologue: int) -> None:
    for order, dtype in enumerate(battery.DTYPES):
        executor.order = order
        for rule in (None, TopK(4)):
            case, around = make_around(shape, dtype, prologue)
            expect_linear(executor, case, rule, NARROW, around)


@pytest.mark.parametrize("shape", [(3, 130, 17), (70, 512, 33), (7, 1, 1)], ids=str)
def test_narrow_product(executor: Executor, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    rng = np.random.default_rng([m, k, n])
    a, codes = (rng.integers(-128, 128, (rows, k)).astype(np.int8) for rows in (m, n))
    np.testing.assert_array_equal(executor.product(a, codes, NARROW), reference.product(a, codes))


def test_planted_faults_are_noticed_in_narrow(executor: Executor) -> None:
    """Small calls that reach every line of the kernel where a fault can be planted, and more tiles than one a block."""
    calls: list[tuple[Any, ...]] = [
        (battery.make(shape, dtype), rule, NARROW, None)
        for shape, dtype, rule in (
            ((20, 1800, 66), np.float32, Threshold(0.5, "token")),
            ((70, 1300, 264), ml_dtypes.bfloat16, None),
            ((9, 130, 19), ml_dtypes.bfloat16, TopK(3)),
        )
    ]
    for shape, dtype in (((70, 136, 520), ml_dtypes.bfloat16), ((18, 24, 32), np.float32)):
        case, around = make_around(shape, dtype, RMS_NORM)
        calls.append((case, TopK(2), NARROW, around))
    missed, _ = unnoticed_in_layers(executor, calls)
    assert not missed, "\n".join(missed)
