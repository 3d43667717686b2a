"""The CUDA kernels that find the largest logits (ffi/cuda/largest.h) on the CPU, as in test_cuda_executor.py."""

import numpy as np
import pytest
from test_cuda_faults import unnoticed

from cuda_executor import (
    FOLDER,
    SHIFT_INDEX,
    SKIP_BARRIER,
    Executor,
    ExecutorError,
    wanted_largest,
)

# Rows shorter than a vector, than a part and than a block's threads; of several parts; and of so many rows that the
# parts are longer than what a block asks for at once.
SHAPES = [
    ((1, 1), 1),
    ((3, 5), 3),
    ((2, 64), 64),
    ((4, 129), 8),
    ((5, 131), 64),
    ((1, 4096), 64),
    ((3, 4097), 64),
    ((2, 5003), 1),
    ((3, 8190), 8),
    ((1, 20011), 64),
    ((2, 20032), 40),
    ((130, 17003), 2),
]


def expect_largest(executor: Executor, x: np.ndarray, count: int) -> None:
    np.testing.assert_array_equal(executor.largest(x, count), wanted_largest(x, count))


def random(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(("shape", "count"), SHAPES, ids=str)
def test_shapes(executor: Executor, shape: tuple[int, int], count: int, order: int) -> None:
    if order and shape[0] > 5:
        pytest.skip("many blocks: once is enough")
    executor.order = order
    expect_largest(executor, random(shape), count)


def test_no_rows(executor: Executor) -> None:
    assert executor.largest(np.zeros((0, 9), np.float32), 3).shape == (0, 3)


@pytest.mark.parametrize("m", [1, 20])
def test_usual_rows_need_no_histogram(executor: Executor, m: int) -> None:
    """Of logits in no order so few reach the bound that there is room for all: the slow way is for others."""
    lines = (FOLDER / "largest.h").read_text().split("\n")
    slow = f"largest.h:{1 + next(i for i, line in enumerate(lines) if 'Store(bins_' in line)}"
    rng = np.random.default_rng(m)
    x = rng.gumbel(scale=3, size=(m, 128256 if m == 1 else 30000)).astype(np.float32)
    expect_largest(executor, x, 64)
    assert slow not in {place for place, _ in executor.sites()}
    expect_largest(executor, np.zeros((1, 500), np.float32), 64)
    assert slow in {place for place, _ in executor.sites()}


def special(kind: str, n: int) -> np.ndarray:
    """Rows in which it is not plain which values are the largest, or where they stand."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((3, n)).astype(np.float32)
    places = rng.permutation(n)
    match kind:
        case "rising":
            return np.sort(x)
        case "falling":
            return -np.sort(-x)
        case "equal":
            x[:] = np.float32(-1.5)
            x[1], x[2] = np.inf, -np.inf
        case "few values":
            return np.round(x * 2) / 2
        case "ties at the boundary":
            x = np.minimum(x, np.float32(1.25))
            x[1, places[:60]] = 9
            x[2, places[:63]] = 9
        case "zeros":
            x = np.where(rng.random(x.shape) < 0.5, np.float32(0), np.float32(-0.0))
            x[1, places[: n // 2]] = -1e-45
            x[2, places[:10]] = 1e-45
        case "infinities":
            x[0, places[:70]] = np.inf
            x[1] = -np.inf
            x[1, places[:5]] = -np.finfo(np.float32).max
            x[2, places[: n - 30]] = -np.inf
        case "nan":
            x[0, places[:3]] = np.nan
            x[0, places[3:9]] = np.inf
            x[1, places[:200]] = np.nan
            x[2] = np.nan
            bits = x.view(np.uint32)
            bits[:, ::2] |= np.isnan(x)[:, ::2] * np.uint32(
                0x80000007
            )  # of either sign, and other payloads
        case "negative":
            return -np.abs(x) - 1
        case "giant":
            x[:, n // 2] = np.finfo(np.float32).max
            x[1, n - 1] = 3e38
        case "one part":  # all of the largest beside each other
            x[0, 100:170] += 40
            x[1, n - 64 :] += 40
            x[2, : n // 2] += 40
        case "close":  # equal in all but the lowest bits
            bits = np.float32(7).view(np.uint32) + rng.permutation(3 * n).reshape(3, n).astype(
                np.uint32
            )
            return bits.view(np.float32)
    return x


KINDS = (
    "rising",
    "falling",
    "equal",
    "few values",
    "ties at the boundary",
    "zeros",
    "infinities",
    "nan",
)
KINDS += ("negative", "giant", "one part", "close")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [999, 5003])
def test_special_values(executor: Executor, kind: str, n: int) -> None:
    x = special(kind, n)
    for executor.order, count in enumerate((64, 1, 8)):
        expect_largest(executor, x, count)


@pytest.mark.parametrize(("n", "count"), [(5, 6), (70, 65), (5, 0)])
def test_impossible_counts_are_refused(executor: Executor, n: int, count: int) -> None:
    with pytest.raises(ExecutorError, match="count"):
        executor.largest(np.zeros((1, n), np.float32), count)


def test_planted_faults_are_noticed(executor: Executor) -> None:
    """Calls that reach every line of the kernels where a fault can be planted."""
    calls = [(random((2, 203)), 7), (random((2, 9001)), 64), (special("equal", 4501), 64)]
    calls += [(special("few values", 302), 64), (special("one part", 9002), 64)]
    places: dict[tuple[str, int], list[tuple[np.ndarray, int]]] = {}
    for call in calls:
        executor.order = 0
        expect_largest(executor, *call)
        for place in executor.sites():
            places.setdefault(place, []).append(call)
    missed = unnoticed(
        executor, places, lambda call: expect_largest(executor, *call), lambda _: True
    )
    assert not missed, "\n".join(missed)
    kinds = [fault for _, fault in places]
    assert kinds.count(SKIP_BARRIER) > 5 and kinds.count(SHIFT_INDEX) > 10
