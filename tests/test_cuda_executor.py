"""The CUDA kernels on the CPU, thread by thread, with every access checked (ffi/cuda/executor), against the oracle.

That faults in the kernels are noticed is shown by test_cuda_faults.py.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import battery
from cuda_executor import (
    AUTO,
    RMS_NORM,
    SILU_GATE,
    SPARSE,
    STREAM,
    TILED,
    WGMMA,
    Around,
    Executor,
    expect_linear,
    make_around,
)
from jaxint8 import RelativeThreshold, Threshold, TopK, reference


@pytest.mark.parametrize("rule", battery.RULES, ids=str)
@pytest.mark.parametrize("dtype", battery.DTYPES, ids=lambda d: np.dtype(d).name)
def test_quantize(executor: Executor, rule: Any, dtype: type) -> None:
    for number, shape in enumerate(
        [(0, 5), (3, 0), (1, 1), (3, 3), (5, 130), (4, 256), (2, 1029), (3, 1504)]
    ):
        executor.order = number % 3
        x = battery.make((*shape, 1), dtype).x
        for got, wanted in zip(
            executor.quantize(x, rule), reference.quantize_rows(x, rule), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("kind", sorted(battery.KINDS))
@pytest.mark.parametrize("rule", battery.RULES, ids=str)
def test_quantize_kinds(executor: Executor, rule: Any, kind: str) -> None:
    for shape in [(3, 499), (4, 576)]:
        x = battery.make((*shape, 1), np.float32, kind).x
        for got, wanted in zip(
            executor.quantize(x, rule), reference.quantize_rows(x, rule), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rule", battery.RULES, ids=str)
@pytest.mark.parametrize("shape", battery.SHAPES, ids=str)
def test_linear(executor: Executor, shape: tuple[int, int, int], rule: Any) -> None:
    for number, dtype in enumerate(battery.DTYPES):
        executor.order = number
        expect_linear(executor, battery.make(shape, dtype), rule)


@pytest.mark.parametrize("path", [STREAM, TILED, WGMMA, SPARSE])
@pytest.mark.parametrize("kind", sorted(battery.KINDS))
def test_linear_kinds(executor: Executor, kind: str, path: int) -> None:
    dtype = np.float32 if kind in battery.FLOAT32_ONLY else ml_dtypes.bfloat16
    for rule in (Threshold(6.0, "column"), RelativeThreshold(), TopK(8)):
        expect_linear(executor, battery.make((5, 528, 37), dtype, kind), rule, path)


# Fused and not, both tile counts of the stream, every split of k, blocks that take several groups of outputs.
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 16),
        (1, 256, 200),
        (2, 512, 130),
        (4, 1040, 150),
        (9, 1040, 40),
        (16, 2064, 33),
        (8, 2100, 20),
    ],
    ids=str,
)
def test_stream(executor: Executor, shape: tuple[int, int, int]) -> None:
    for rule in (None, Threshold(2.0, "column"), RelativeThreshold(3.0), TopK(8)):
        expect_linear(executor, battery.make(shape, np.float32), rule, STREAM)


# Fewer pieces of weights than may be on their way and more, several in a row, more than 32 rows for a warp, a group of
# lanes without any.
@pytest.mark.parametrize(
    "shape",
    [(1, 16, 5), (1, 768, 60), (2, 528, 130), (1, 4112, 490), (2, 2064, 100), (1, 32, 1700)],
    ids=str,
)
def test_gemv(executor: Executor, shape: tuple[int, int, int]) -> None:
    rules = (
        None,
        Threshold(2.0, "column"),
        RelativeThreshold(3.0),
        TopK(8),
        Threshold(1.0, "token"),
        TopK(30),
    )
    for number, rule in enumerate(rules):
        # Without a rule two rows are done by a kernel that no other call reaches.
        for turn in range(3) if rule is None else (number,):
            executor.order = turn % 3
            expect_linear(executor, battery.make(shape, battery.DTYPES[turn % 3]), rule, WGMMA)
            assert takes_gemv(executor) == (shape[0] == 1 or rule is None)


def takes_gemv(executor: Executor) -> bool:
    return any(place.startswith("gemv.h") for place, _ in executor.sites())


# Rows side by side, each by half of a block, of which one may be sooner done than the other.
@pytest.mark.parametrize("prologue", [0, RMS_NORM, SILU_GATE])
@pytest.mark.parametrize("kind", sorted(battery.KINDS))
def test_two_rows_of_all_kinds(executor: Executor, kind: str, prologue: int) -> None:
    for dtype in [np.float32] if kind in battery.FLOAT32_ONLY else battery.DTYPES:
        for executor.order in range(3):
            case, around = make_around((2, 272, 10), dtype, prologue, kind)
            expect_linear(executor, case, None, WGMMA, around)
            assert takes_gemv(executor)


# Rows longer than what the threads of half a block take at once.
@pytest.mark.parametrize("prologue", [0, RMS_NORM, SILU_GATE])
@pytest.mark.parametrize("order", range(3))
def test_two_long_rows(executor: Executor, order: int, prologue: int) -> None:
    executor.order = order
    case, around = make_around((2, 2064, 34), battery.DTYPES[order], prologue)
    expect_linear(executor, case, None, WGMMA, around)
    assert takes_gemv(executor)


# One group of outputs for a block and several turns of them, boxes of k for some warps and several for each.
@pytest.mark.parametrize(
    "shape", [(3, 16, 5), (5, 1296, 33), (8, 144, 250), (9, 2192, 130), (16, 272, 300)], ids=str
)
def test_skinny(executor: Executor, shape: tuple[int, int, int]) -> None:
    for number, rule in enumerate(
        (None, Threshold(2.0, "column"), RelativeThreshold(3.0), TopK(8))
    ):
        executor.order = number % 3
        expect_linear(executor, battery.make(shape, battery.DTYPES[number % 3]), rule, WGMMA)
    assert executor.library.executor_worst_bank_conflict() == 1


# No outlier at all, few gathered columns, a list that overflows (all columns), k and n off every boundary.
@pytest.mark.parametrize(
    "shape", [(17, 64, 64), (33, 144, 70), (70, 320, 66), (130, 528, 132), (20, 333, 9)], ids=str
)
def test_tiled(executor: Executor, shape: tuple[int, int, int]) -> None:
    for rule in (
        None,
        Threshold(1e9, "token"),
        Threshold(6.0, "column"),
        Threshold(0.5, "token"),
        TopK(2),
    ):
        expect_linear(executor, battery.make(shape, ml_dtypes.bfloat16), rule, TILED)
    # ldmatrix without bank conflicts.
    assert executor.library.executor_worst_bank_conflict() == 1


# Every height of the tile of activations, k shared by the blocks of a cluster, more tiles than multiprocessors; pairs
# of blocks that copy to each other, one of them beyond the rows; gathered tiles filled never, once, and within a step.
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((20, 1040, 70), None),
        ((17, 333, 130), RelativeThreshold(3.0)),
        ((5, 640, 20), Threshold(0.5, "token")),
        ((40, 640, 400), TopK(8)),
        ((70, 200, 132), Threshold(2.0, "column")),
        ((130, 260, 129), TopK(4)),
        ((300, 400, 260), TopK(3)),
        ((260, 130, 270), Threshold(0.3, "token")),
        ((257, 64, 520), None),
    ],
    ids=str,
)
def test_wgmma(executor: Executor, shape: tuple[int, int, int], rule: Any, order: int) -> None:
    executor.order = order
    expect_linear(executor, battery.make(shape, battery.DTYPES[order]), rule, WGMMA)


# Warpgroups that take turns, each a tile at a time, in clusters of one and two, with tiles for one of them only;
# columns gathered by chunks, of which there are more than fit at once, and where weights are too many for that.
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(
    ("multiprocessors", "shape", "rule"),
    [
        (1, (130, 64, 136), None),
        (1, (300, 400, 136), RelativeThreshold(3.0)),
        (1, (300, 400, 520), RelativeThreshold(3.0)),
        (2, (257, 64, 136), Threshold(0.5, "token")),
        (2, (520, 72, 74), None),
        (3, (130, 600, 264), Threshold(3.0, "token")),
    ],
    ids=str,
)
def test_turns(
    executor: Executor, multiprocessors: int, shape: tuple[int, int, int], rule: Any, order: int
) -> None:
    executor.order, executor.multiprocessors = order, multiprocessors
    case, around = make_around(shape, battery.DTYPES[order], 0)
    expect_linear(executor, case, rule, WGMMA, around)


# More rows than 64 of long rows of weights, which are one block's or shared by two, four and eight: without high parts
# in half tiles, with them in tiles of 64 rows of activations, the last of them with 2 to 64 rows.
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(
    ("shape", "multiprocessors", "rule"),
    [
        ((66, 4096, 70), 3, None),
        ((100, 4100, 9), 16, None),
        ((128, 4112, 9), 16, TopK(8)),
        ((66, 4100, 130), 3, RelativeThreshold(3.0)),
        ((66, 4100, 130), 16, TopK(8)),
        ((200, 4096, 9), 64, RelativeThreshold(3.0)),
        ((150, 4096, 9), 32, Threshold(2.0, "column")),
    ],
    ids=str,
)
def test_long_rows(
    executor: Executor, shape: tuple[int, int, int], multiprocessors: int, rule: Any, order: int
) -> None:
    executor.order, executor.multiprocessors = order, multiprocessors
    expect_linear(executor, battery.make(shape, battery.DTYPES[order]), rule)


def test_long_rows_around(executor: Executor) -> None:
    """Outputs in fours with a residual behind the layer, and products alone."""
    executor.multiprocessors = 8
    case, around = make_around((66, 4096, 68), ml_dtypes.bfloat16, RMS_NORM)
    expect_linear(executor, case, RelativeThreshold(3.0), around=around)
    rng = np.random.default_rng(5)
    a, codes = (rng.integers(-127, 128, (rows, 4096)).astype(np.int8) for rows in (70, 20))
    wanted = a.astype(np.int32) @ codes.astype(np.int32).T
    np.testing.assert_array_equal(executor.product(a, codes), wanted)


# Both halves of a tile's rows and of a step's columns, with and without high parts; blocks multiplied in full; tiles of
# every width, more of them than multiprocessors; rows and columns off every boundary.
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((5, 130, 20), TopK(3)),
        ((70, 200, 132), Threshold(2.0, "column")),
        ((130, 333, 70), Threshold(0.5, "token")),
        ((260, 390, 200), TopK(2)),
        ((200, 100, 448), TopK(1)),
        ((70, 140, 470), RelativeThreshold(2.0)),
        ((20, 260, 320), Threshold(1.0, "token")),
        ((20, 130, 380), TopK(5)),
        ((20, 130, 570), TopK(4)),
        ((257, 128, 132), RelativeThreshold(1.0)),
        ((3, 8208, 40), RelativeThreshold(3.0)),
        ((300, 64, 400), Threshold(1e9, "token")),
    ],
    ids=str,
)
def test_sparse(executor: Executor, shape: tuple[int, int, int], rule: Any, order: int) -> None:
    executor.order = order
    expect_linear(executor, battery.make(shape, battery.DTYPES[order]), rule, SPARSE)


# Groups of 128 gathered columns: some, of which each has rows of its own, and some warps nothing to do; and more than
# there are warps. By the kernel for Hopper and by the plain one.
@pytest.mark.parametrize("path", [WGMMA, TILED])
@pytest.mark.parametrize(
    ("shape", "threshold", "groups"), [((70, 1304, 20), 2.9, 3), ((66, 4104, 9), 2.83, 9)], ids=str
)
def test_gathered_groups(
    executor: Executor, shape: tuple[int, int, int], threshold: float, groups: int, path: int
) -> None:
    case = battery.make(shape, ml_dtypes.bfloat16, "no_bias")
    columns = int((np.abs(case.x.astype(np.float32)) >= threshold).any(axis=0).sum())
    assert -(-columns // 128) == groups
    assert columns <= -(-shape[1] // 4 // 128) * 128  # more are not gathered
    expect_linear(executor, case, Threshold(threshold, "token"), path)


@pytest.mark.parametrize("rows", [1, 66, 130])
def test_sparse_groups(executor: Executor, rows: int) -> None:
    """Every set of outliers that four neighbours can be, rows whose outliers are all in one group, and rows without."""
    case = battery.make((rows, 300, 20), np.float32, "no_bias")
    sets = np.arange(64) % 16
    for row in range(rows):
        case.x[row] = np.clip(case.x[row], -3, 3)
        groups = case.x[row, : 4 * len(sets)].reshape(len(sets), 4)
        if row % 3 == 0:
            groups[(sets[:, None] >> np.arange(4) & 1) == 1] *= 40
        elif row % 3 == 1:
            groups[row % len(sets)] = [50, -60, 70, -80]
    expect_linear(executor, case, Threshold(6.0, "token"), SPARSE)


def test_sparse_before_full(executor: Executor) -> None:
    """A last step of sparse products, and behind it a block that is multiplied in full: both add to the same sums."""
    case = battery.make((70, 300, 20), np.float32, "no_bias")
    case.x[:] = np.clip(case.x, -3, 3)
    case.x[::5, 8:12] = [50, -60, 70, -80]
    case.x[1::5, 270] = 90
    expect_linear(executor, case, Threshold(6.0, "token"), SPARSE)


def expect_prologue(executor: Executor, x: np.ndarray, k: int, around: Around) -> None:
    wanted = around.rows(x)
    got = executor.prologue(x, k, around)
    np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))


@pytest.mark.parametrize("prologue", [RMS_NORM, SILU_GATE])
@pytest.mark.parametrize("dtype", battery.DTYPES, ids=lambda d: np.dtype(d).name)
def test_prologue_alone(executor: Executor, dtype: type, prologue: int) -> None:
    for number, (m, k) in enumerate(
        [(0, 5), (2, 0), (1, 1), (3, 3), (5, 130), (3, 1024), (2, 4104)]
    ):
        executor.order = number % 3
        case, around = make_around((m, k, 1), dtype, prologue)
        expect_prologue(executor, case.x, k, around)
    for kind in sorted(battery.KINDS):
        if np.dtype(dtype) == np.float32 or kind not in battery.FLOAT32_ONLY:
            case, around = make_around((4, 264, 1), dtype, prologue, kind)
            expect_prologue(executor, case.x, 264, around)


def test_norm_of_extremes(executor: Executor) -> None:
    """Rows at the ends of float32 and around the smallest that counts, steps that round up to a power of two."""
    rng = np.random.default_rng(3)
    scales = 2.0 ** np.array([-149, -127, -60, -41, -40, -39, 0, 60, 100, 120])
    x = (rng.uniform(-1, 1, (len(scales), 96)) * scales[:, None]).astype(np.float32)
    x[:, 5] = scales  # absmax is a power of two, or just below the next
    x[::2, 7] = np.nextafter(2 * scales[::2].astype(np.float32), np.float32(0))
    for epsilon in (1e-5, 2.0**-40, 1.0):
        norm = rng.normal(size=96).astype(np.float32)
        expect_prologue(executor, x, 96, Around(RMS_NORM, epsilon, norm))


def test_gate_of_extremes(executor: Executor) -> None:
    """Where exp is bounded, at zeros of both signs, at infinities and NaN, and at the ends of float32."""
    edges = [0.0, -0.0, 86.9, 87.0, 87.1, 88.0, 89.0, 1e30, 3e38, np.inf, np.nan, 1e-30, 1e-45]
    gate = np.array(edges + [-e for e in edges], np.float32)
    gate = np.concatenate([gate, np.random.default_rng(1).normal(0, 30, 262 - len(gate))])
    up = np.random.default_rng(2).normal(size=(3, 262)) * np.array([[1], [1e-38], [1e38]])
    x = np.concatenate([np.broadcast_to(gate, up.shape), up], axis=1).astype(np.float32)
    expect_prologue(executor, x, 262, Around(SILU_GATE))


# Rows staged, and done apart (k no multiple of 8); the gemv, skinny, swapped, wgmma and sparse kernels, the stream,
# fused and not, and the tiled product, each with a residual in another buffer and in its own.
@pytest.mark.parametrize("prologue", [0, RMS_NORM, SILU_GATE])
@pytest.mark.parametrize(
    ("shape", "path"),
    [
        ((1, 272, 34), WGMMA),
        ((2, 528, 35), WGMMA),
        ((3, 272, 66), WGMMA),
        ((12, 144, 37), WGMMA),
        ((20, 144, 132), WGMMA),
        ((40, 130, 21), WGMMA),
        ((130, 72, 264), WGMMA),
        ((140, 64, 70), WGMMA),
        ((66, 272, 168), SPARSE),
        ((70, 130, 90), SPARSE),
        ((130, 528, 232), SPARSE),
        ((5, 136, 512), SPARSE),
        ((1, 256, 40), STREAM),
        ((2, 48, 17), STREAM),
        ((5, 333, 18), STREAM),
        ((1, 1, 1), STREAM),
        ((18, 96, 34), TILED),
        ((17, 37, 9), TILED),
        ((0, 16, 4), WGMMA),
        ((3, 16, 0), WGMMA),
        ((3, 0, 4), WGMMA),
    ],
    ids=str,
)
def test_around(executor: Executor, shape: tuple[int, int, int], path: int, prologue: int) -> None:
    rules = [None, Threshold(2.0, "column"), RelativeThreshold(3.0), TopK(4)]
    for number, rule in enumerate(rules):
        executor.order = number % 3
        case, around = make_around(shape, battery.DTYPES[number % 3], prologue)
        expect_linear(executor, case, rule, path, around)


@pytest.mark.parametrize("prologue", [0, RMS_NORM, SILU_GATE])
@pytest.mark.parametrize("kind", sorted(battery.KINDS))
def test_around_kinds(executor: Executor, kind: str, prologue: int) -> None:
    dtype = np.float32 if kind in battery.FLOAT32_ONLY else ml_dtypes.bfloat16
    for shape, rule, path in (
        ((1, 272, 10), RelativeThreshold(), WGMMA),
        ((3, 528, 10), TopK(8), WGMMA),
        ((20, 272, 18), Threshold(6.0, "column"), TILED),
        ((66, 528, 40), TopK(8), SPARSE),
    ):
        case, around = make_around(shape, dtype, prologue, kind)
        expect_linear(executor, case, rule, path, around)


@pytest.mark.parametrize("prologue", [RMS_NORM, SILU_GATE])
def test_around_long_rows(executor: Executor, prologue: int) -> None:
    """Rows that are staged, too long for registers; and float32 in registers."""
    for shape, dtype in [
        ((3, 4112, 3), ml_dtypes.bfloat16),
        ((3, 4104, 3), np.float32),
        ((17, 1040, 3), np.float32),
    ]:
        case, around = make_around(shape, dtype, prologue)
        expect_linear(executor, case, RelativeThreshold(3.0), WGMMA, around)
        expect_linear(executor, case, RelativeThreshold(3.0), SPARSE, around)


@pytest.mark.parametrize("path", [STREAM, TILED, WGMMA])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 130, 17), (16, 333, 20), (7, 512, 33), (0, 4, 4), (4, 0, 4)], ids=str
)
def test_product(executor: Executor, shape: tuple[int, int, int], path: int) -> None:
    m, k, n = shape
    rng = np.random.default_rng([m, k, n])
    a, codes = (rng.integers(-128, 128, (rows, k)).astype(np.int8) for rows in (m, n))
    np.testing.assert_array_equal(executor.product(a, codes, path), reference.product(a, codes))


# Columns of rows where they are, in registers and in shared memory.
@pytest.mark.parametrize("columns", [999, 1000, 4104])
@pytest.mark.parametrize("k", [1, 2, 7, 24, 25, 40, 499])
def test_topk_ties(executor: Executor, k: int, columns: int) -> None:
    """Ties go to the lower column on the quick way, on the way by digits, and where candidates overflow."""
    rng = np.random.default_rng(k)
    rows = [
        rng.integers(-3, 4, columns),
        np.zeros(columns),
        np.ones(columns),
        rng.normal(size=columns),
        np.where(np.arange(columns) < 30, 5.0, rng.normal(size=columns)),
    ]
    x = np.stack(rows).astype(np.float32)
    for got, wanted in zip(
        executor.quantize(x, TopK(k)), reference.quantize_rows(x, TopK(k)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rule", [None, Threshold(2.0, "column"), RelativeThreshold(3.0), TopK(30)])
def test_rows_in_registers_and_longer(executor: Executor, rule: Any) -> None:
    """Rows that registers hold, to the longest, rows that shared memory does, and longer ones; and many rows."""
    for shape in [(3, 8), (5, 2056), (2, 4096), (2, 4104), (1, 16392), (1, 33000), (260, 4096)]:
        x = battery.make((*shape, 1), ml_dtypes.bfloat16).x
        for got, wanted in zip(
            executor.quantize(x, rule), reference.quantize_rows(x, rule), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rule", [None, RelativeThreshold(3.0), TopK(8), TopK(30)], ids=str)
@pytest.mark.parametrize("dtype", battery.DTYPES, ids=lambda d: np.dtype(d).name)
def test_many_rows_in_registers(executor: Executor, dtype: type, rule: Any) -> None:
    """Several groups of values for each thread, some of them beyond the row; and compressed high parts."""
    for number, shape in enumerate([(129, 8192), (256, 4096), (511, 2056), (2000, 528)]):
        executor.order = number
        x = battery.make((*shape, 1), dtype).x
        for got, wanted in zip(
            executor.quantize(x, rule), reference.quantize_rows(x, rule), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)
    expect_linear(executor, battery.make((1030, 1024, 3), dtype), rule, SPARSE)


def test_row_of_many_outliers_cannot_overflow(executor: Executor) -> None:
    """Over a thousand outliers in a row: the code bound gives way, and the int32 sum stays exact."""
    case = battery.make((2, 4096, 3), np.float32, "extreme")
    case.x[:] = 1e4
    expect_linear(executor, case, Threshold(6.0, "token"), STREAM)
    expect_linear(executor, case, Threshold(6.0, "token"), TILED)


def test_a_long_gated_row(executor: Executor) -> None:
    """Nothing of the product fits beside the block that quantises a long row behind a gate."""
    case, around = make_around((16, 22016, 192), ml_dtypes.bfloat16, SILU_GATE)
    expect_linear(executor, case, TopK(8), AUTO, around)
