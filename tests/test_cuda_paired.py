"""The CUDA kernel of one launch for small layers (ffi/cuda/paired.h) on the CPU, as those in test_cuda_executor.py."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_cuda_faults import unnoticed_in_layers

import battery
from cuda_executor import (
    AUTO,
    PAIRED,
    RMS_NORM,
    SILU_GATE,
    Executor,
    expect_linear,
    make_around,
    suits_paired,
)
from jaxint8 import RelativeThreshold, Threshold, TopK

RULES = (None, Threshold(0.5, "token"), RelativeThreshold(3.0))


def takes_paired(executor: Executor) -> bool:
    return any(place.startswith("paired.h") for place, _ in executor.sites())


# One step of k and several, rows that are one group of values a thread and several, tiles of rows that are not full, a
# block of a pair without outputs, outputs in fours and not, tiles of both widths (of rows of over 1,024
# columns too), fewer stages than steps.
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 1),
        (20, 64, 40),
        (16, 528, 130),
        (33, 1296, 70),
        (3, 2048, 129),
        (50, 144, 515),
        (130, 272, 1030),
        (130, 1040, 900),
    ],
    ids=str,
)
def test_paired(executor: Executor, shape: tuple[int, int, int], rule: Any, order: int) -> None:
    executor.order = order
    expect_linear(executor, battery.make(shape, battery.DTYPES[order]), rule, PAIRED)
    assert takes_paired(executor)


@pytest.mark.parametrize("kind", sorted(battery.KINDS))
def test_paired_kinds(executor: Executor, kind: str) -> None:
    dtype = np.float32 if kind in battery.FLOAT32_ONLY else ml_dtypes.bfloat16
    for rule in (None, Threshold(6.0, "token"), RelativeThreshold()):
        expect_linear(executor, battery.make((19, 528, 40), dtype, kind), rule, PAIRED)
        assert takes_paired(executor)


@pytest.mark.parametrize("prologue", [0, RMS_NORM, SILU_GATE])
@pytest.mark.parametrize("shape", [(20, 144, 136), (40, 272, 21), (17, 1056, 96)], ids=str)
def test_paired_around(executor: Executor, shape: tuple[int, int, int], prologue: int) -> None:
    for order, dtype in enumerate(battery.DTYPES):
        executor.order = order
        for rule in (None, RelativeThreshold(4.0)):
            case, around = make_around(shape, dtype, prologue)
            expect_linear(executor, case, rule, PAIRED, around)
            assert takes_paired(executor)


def test_what_it_cannot_do_is_done_by_others(executor: Executor) -> None:
    for shape, rule in (
        ((5, 2064, 10), None),
        ((5, 40, 10), None),
        ((5, 64, 10), TopK(3)),
        ((5, 64, 10), Threshold(1.0, "column")),
    ):
        assert not suits_paired(shape, rule)
        expect_linear(executor, battery.make(shape, np.float32), rule, PAIRED)
        assert not takes_paired(executor)


# Where it is chosen, by both widths of tiles, and where not.
@pytest.mark.parametrize(
    ("shape", "rule", "chosen"),
    [
        ((16, 64, 64), None, True),
        ((70, 64, 2000), None, True),
        ((3, 64, 64), None, False),
        ((40, 512, 768), RelativeThreshold(), True),
        ((40, 496, 768), RelativeThreshold(), False),
        ((20, 512, 768), RelativeThreshold(), False),
        ((33, 64, 6000), None, False),
    ],
    ids=str,
)
def test_chosen(executor: Executor, shape: tuple[int, int, int], rule: Any, chosen: bool) -> None:
    expect_linear(executor, battery.make(shape, ml_dtypes.bfloat16), rule, AUTO)
    assert takes_paired(executor) == chosen


def test_planted_faults_are_noticed_in_paired(executor: Executor) -> None:
    """Small calls that reach every line of the kernel where a fault can be planted."""
    calls: list[tuple[Any, ...]] = [
        (battery.make(shape, dtype), rule, PAIRED, None)
        for shape, dtype, rule in (
            ((20, 1296, 66), np.float32, Threshold(0.5, "token")),
            ((9, 144, 19), ml_dtypes.bfloat16, RelativeThreshold(2.0)),
            ((9, 2048, 64), ml_dtypes.bfloat16, None),
        )
    ]
    for shape, dtype in (((40, 144, 140), ml_dtypes.bfloat16), ((18, 32, 32), np.float32)):
        case, around = make_around(shape, dtype, RMS_NORM)
        calls.append((case, RelativeThreshold(2.0), PAIRED, around))
    missed, _ = unnoticed_in_layers(executor, calls)
    assert not missed, "\n".join(missed)
