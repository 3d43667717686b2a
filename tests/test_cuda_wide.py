"""Long rows quantised by clusters of blocks (ffi/cuda/cluster.h), on the CPU with every access checked."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import test_cuda_block as blocks
from test_cuda_faults import unnoticed

import battery
from cuda_executor import (
    AUTO,
    RMS_NORM,
    SHIFT_INDEX,
    SILU_GATE,
    SKIP_BARRIER,
    SKIP_WAIT,
    TILED,
    Executor,
    expect_linear,
    make_around,
)
from jaxint8 import RelativeThreshold, Threshold, TopK, reference

RULES = [None, Threshold(6.0, "token"), RelativeThreshold(6.0), TopK(8)]


def takes_cluster(executor: Executor) -> bool:
    return any(place.startswith("cluster.h") for place, _ in executor.sites())


def expect_codes(executor: Executor, x: np.ndarray, rule: Any, wide: bool = True) -> None:
    got, wanted = executor.quantize(x, rule), reference.quantize_rows(x, rule)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert takes_cluster(executor) == wide


# From the shortest to the longest, of which the last block has a part, nothing but a few warps, or all that it may.
@pytest.mark.parametrize(
    "shape", [(1, 8200), (2, 9000), (3, 12352), (2, 14336), (1, 16384)], ids=str
)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_quantize(executor: Executor, rule: Any, shape: tuple[int, int]) -> None:
    for number, dtype in enumerate(battery.DTYPES):
        executor.order = (number + shape[0]) % 3
        expect_codes(executor, battery.make((*shape, 1), dtype).x, rule)


@pytest.mark.parametrize(
    "shape", [(2, 8192), (1, 8201), (2, 9003), (1, 14340), (1, 16392)], ids=str
)
def test_rows_that_a_block_quantises(executor: Executor, shape: tuple[int, int]) -> None:
    """Shorter ones, longer ones, of columns that are no multiple of eight; and where columns are marked."""
    for number, rule in enumerate(RULES):
        expect_codes(
            executor, battery.make((*shape, 1), battery.DTYPES[number % 3]).x, rule, wide=False
        )
    x = battery.make((2, 8200, 1), np.float16).x
    expect_codes(executor, x, Threshold(2.0, "column"), wide=False)


def test_as_many_rows_as_clusters_quantise(executor: Executor) -> None:
    for rule, rows, wide in (
        (None, 16, True),
        (None, 17, False),
        (RULES[2], 32, True),
        (RULES[2], 33, False),
    ):
        expect_codes(executor, battery.make((rows, 8200, 1), ml_dtypes.bfloat16).x, rule, wide)


@pytest.mark.parametrize("kind", sorted(battery.KINDS))
@pytest.mark.parametrize("rule", [*RULES, RelativeThreshold(2.0), TopK(30), TopK(10_000)], ids=str)
def test_kinds(executor: Executor, rule: Any, kind: str) -> None:
    for executor.order in range(3) if rule in RULES else [len(kind) % 3]:
        dtype = np.float32 if kind in battery.FLOAT32_ONLY else battery.DTYPES[executor.order]
        expect_codes(executor, battery.make((4, 8208, 1), dtype, kind).x, rule)


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite(executor: Executor, value: float, block: int) -> None:
    """In the part of the row that one block has; the others must know."""
    x = battery.make((2, 9216, 1), ml_dtypes.bfloat16).x
    x[0, 2304 * block + 1100] = value
    for rule in RULES:
        expect_codes(executor, x, rule)


@pytest.mark.parametrize("k", [1, 2, 7, 24, 25, 40, 8199])
def test_topk_ties(executor: Executor, k: int) -> None:
    """Ties go to the lower column on the quick way, by digits, and where candidates overflow: in one block or all."""
    rng, columns = np.random.default_rng(k), 8200
    some = rng.normal(size=columns)
    across = some.copy()
    across[np.linspace(0, columns - 1, 30).astype(int)] = 5.0  # ties in all blocks
    rows = [
        rng.integers(-3, 4, columns),
        np.zeros(columns),
        np.ones(columns),
        some,
        across,
        np.where(np.arange(columns) >= columns - 30, -5.0, some),  # in the last one
        np.where(abs(np.arange(columns) - 2304) < 7, 5.0, some),  # where the second block begins
        np.where(np.arange(columns) == 4100, 5.0, 0),
    ]
    expect_codes(executor, np.stack(rows).astype(np.float32), TopK(k))


@pytest.mark.parametrize("columns", [slice(0, 1500), slice(6000, None), slice(None)], ids=str)
def test_many_outliers(executor: Executor, columns: slice) -> None:
    """Over a thousand in a row, in few blocks and in all: the code bound gives way, and the int32 sum stays exact."""
    case = battery.make((3, 8208, 3), np.float32, "extreme")
    case.x[0, columns] = 1e4
    case.x[1, columns] = np.where(np.arange(8208)[columns] % 5 == 0, 1e4, 1e-3)
    for rule in (Threshold(6.0, "token"), RelativeThreshold(0.5)):
        expect_codes(executor, case.x, rule)
        expect_linear(executor, case, rule)
        assert takes_cluster(executor)


# By the kernels for up to 16 and 64 rows, and by the tiled one, whose rows are a block's each.
@pytest.mark.parametrize("prologue", [0, RMS_NORM, SILU_GATE])
@pytest.mark.parametrize("m", [2, 8, 9, 32])
def test_layers(executor: Executor, m: int, prologue: int) -> None:
    for number, rule in enumerate(RULES):
        executor.order = number % 3
        dtype = ml_dtypes.bfloat16 if m != 9 else battery.DTYPES[number % 3]
        case, around = make_around((m, 8320, 18), dtype, prologue)
        expect_linear(executor, case, rule, AUTO, around)
        if m in (8, 9) or rule is not None:
            assert takes_cluster(executor)
    expect_linear(executor, case, RULES[2], TILED, around)
    assert not takes_cluster(executor)


def test_a_long_row(executor: Executor) -> None:
    for number, rule in enumerate(RULES):
        case, around = make_around((3, 14336, 20), battery.DTYPES[number % 3], 0)
        expect_linear(executor, case, rule, AUTO, around)
        assert takes_cluster(executor)


@pytest.mark.parametrize(
    ("m", "rule"), [(2, RULES[1]), (2, RULES[3]), (8, RULES[0]), (8, RULES[2]), (10, RULES[2])]
)
def test_blocks(executor: Executor, m: int, rule: Any) -> None:
    """Three layers of a decoder, of which the last has long rows, behind a gate of outputs or of rows."""
    blocks.expect(executor, blocks.make((m, 16, 16, 8208), ml_dtypes.bfloat16), rule)
    assert takes_cluster(executor)


def test_planted_faults_are_noticed(executor: Executor) -> None:
    """A missing barrier, words sent elsewhere, words not waited for: at every place of the cluster's team."""
    x = battery.make((2, 8208, 1), ml_dtypes.bfloat16).x
    places: dict[tuple[str, int], list[Any]] = {}
    for rule in [*RULES, TopK(30)]:
        executor.order = 1
        expect_codes(executor, x, rule)
        for place, fault in executor.sites():
            if place.startswith("cluster.h"):
                places.setdefault((place, fault), []).append(rule)
    assert not unnoticed(
        executor, places, lambda rule: expect_codes(executor, x, rule), lambda _: True
    )
    kinds = [fault for _, fault in places]
    assert {SKIP_BARRIER, SHIFT_INDEX, SKIP_WAIT} <= set(kinds)
