"""Faults planted in the CUDA kernels, one at each place where there can be one, and whether they are noticed."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import battery
from cuda_executor import (
    FOLDER,
    RMS_NORM,
    SHIFT_INDEX,
    SILU_GATE,
    SKIP_BARRIER,
    SKIP_WAIT,
    SPARSE,
    STREAM,
    SWAP_FRAGMENT,
    TILED,
    WGMMA,
    Executor,
    ExecutorError,
    expect_linear,
    make_around,
)
from jaxint8 import RelativeThreshold, Threshold, TopK

# Small calls that between them reach every line of the kernels where a fault can be planted.
PLANTED = [
    ((3, 272, 19), np.float32, TopK(3), STREAM),
    ((3, 272, 19), np.float32, Threshold(2.0, "column"), STREAM),
    ((4, 4112, 17), np.float32, RelativeThreshold(3.0), STREAM),
    ((3, 240, 9), np.float32, Threshold(1.0, "token"), STREAM),
    ((4, 1040, 9), np.float32, RelativeThreshold(2.0, "column"), WGMMA),
    ((35, 200, 70), np.float32, Threshold(2.0, "column"), TILED),
    ((20, 328, 66), ml_dtypes.bfloat16, TopK(30), TILED),
    ((18, 168, 9), np.float32, TopK(1), TILED),
    ((130, 330, 4), ml_dtypes.bfloat16, Threshold(0.5, "token"), TILED),
    ((2, 2320, 530), np.float32, Threshold(2.0, "column"), WGMMA),
    ((9, 2192, 100), np.float32, Threshold(0.5, "token"), WGMMA),
    ((5, 272, 250), ml_dtypes.bfloat16, None, WGMMA),
    ((20, 1320, 66), np.float32, Threshold(0.5, "token"), WGMMA),
    ((40, 130, 19), ml_dtypes.bfloat16, None, WGMMA),
    ((60, 3600, 19), ml_dtypes.bfloat16, TopK(3), WGMMA),
    ((260, 1290, 24), ml_dtypes.bfloat16, Threshold(1.5, "token"), WGMMA),
    ((257, 640, 19), np.float32, None, WGMMA),
    ((130, 600, 264), ml_dtypes.bfloat16, Threshold(3.0, "token"), WGMMA),
    ((130, 64, 520), np.float32, None, WGMMA),
    ((133, 260, 400), ml_dtypes.bfloat16, TopK(6), SPARSE),
    ((67, 900, 19), np.float32, Threshold(1.5, "token"), SPARSE),
    ((65, 656, 600), ml_dtypes.bfloat16, Threshold(3.0, "token"), WGMMA),
]
# The same, with something before the layer and a residual.
PLANTED_AROUND = [
    ((1, 272, 34), ml_dtypes.bfloat16, None, WGMMA, RMS_NORM),
    ((2, 272, 530), ml_dtypes.bfloat16, None, WGMMA, SILU_GATE),
    ((2, 144, 34), ml_dtypes.bfloat16, None, WGMMA, RMS_NORM),
    ((3, 520, 17), ml_dtypes.bfloat16, RelativeThreshold(3.0), WGMMA, RMS_NORM),
    ((3, 1048, 12), np.float32, None, WGMMA, RMS_NORM),
    ((18, 24, 32), ml_dtypes.bfloat16, TopK(2), WGMMA, SILU_GATE),
    ((18, 24, 16), np.float32, None, WGMMA, SILU_GATE),
    ((130, 24, 40), ml_dtypes.bfloat16, None, WGMMA, RMS_NORM),
    ((67, 272, 168), ml_dtypes.bfloat16, TopK(6), SPARSE, RMS_NORM),
    ((20, 136, 104), np.float32, Threshold(1.0, "column"), SPARSE, SILU_GATE),
    ((5, 37, 9), np.float16, TopK(2), STREAM, RMS_NORM),
    ((2, 32, 8), np.float32, TopK(2), STREAM, SILU_GATE),
    ((17, 40, 8), np.float32, TopK(2), TILED, RMS_NORM),
    ((17, 48, 8), ml_dtypes.bfloat16, TopK(2), TILED, RMS_NORM),
]

# Lanes that have parted come together again by themselves here; copies arrive only when no thread can go on.
HARMLESS = {
    ("all lanes together again", SKIP_BARRIER),
    ("in the executor it is anyway before any copy arrives", SKIP_BARRIER),
    ("for memory checkers", SKIP_BARRIER),
    ("its lanes have met", SKIP_BARRIER),
}


def unnoticed(
    executor: Executor,
    places: dict[tuple[str, int], list[Any]],
    expect: Callable[[Any], None],
    waits: Callable[[Any], bool] = lambda call: call[2] >= WGMMA,
) -> list[str]:
    """Plants each fault at its place, where calls reach it; returns those that none of them notices.

    Args:
      executor: the executor.
      places: (place in the source, fault) -> calls.
      expect: makes a call, and fails where its result is wrong.
      waits: whether threads of a call wait for each other beyond barriers of a block.
    """
    missed = []
    for (place, fault), reaching in places.items():
        executor.fault, executor.site = fault, place.encode()
        # Where warps wait for copies of their own, only lanes that run early can overtake the others, and where one
        # warp waits for several, only lanes of these that run late.
        early = [(call, order) for order in (0, 2) for call in reaching if waits(call)]
        for call, executor.order in [(call, int(waits(call))) for call in reaching] + early:
            try:
                expect(call)
            except (ExecutorError, AssertionError):
                break
        else:
            file, line = place.split(":")
            text = (FOLDER / file).read_text().split("\n")[int(line) - 1]
            if not any(harmless in text and fault == kind for harmless, kind in HARMLESS):
                missed.append(f"{place}: fault {fault}: {text.strip()}")
    return missed


def unnoticed_in_layers(
    executor: Executor, calls: list[tuple[Any, ...]]
) -> tuple[list[str], list[int]]:
    """Plants every fault that calls of `expect_linear` reach; returns what is not noticed, and the kinds of all."""
    places: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    for call in calls:
        executor.order = int(call[2] >= WGMMA)  # those that wait before those that they wait for
        expect_linear(executor, *call)
        for place in executor.sites():
            places.setdefault(place, []).append(call)
    missed = unnoticed(executor, places, lambda call: expect_linear(executor, *call))
    return missed, [fault for _, fault in places]


def test_planted_faults_are_noticed(executor: Executor) -> None:
    """A missing barrier, a wrong index, a swapped fragment, a copy not waited for: at every place of every kernel."""
    calls: list[tuple[Any, ...]] = [
        (battery.make(shape, dtype), rule, path, None) for shape, dtype, rule, path in PLANTED
    ]
    # A row that is not finite has no say in the column of another's largest value: marks of columns are made twice.
    case = battery.make((3, 272, 9), np.float32)
    case.x[:] = np.clip(case.x, -1.5, 1.5)
    case.x[0, 5], case.x[1, 5], case.x[2, 40] = np.nan, 1.9, 3
    calls.append((case, Threshold(2.0, "column"), WGMMA, None))
    for shape, dtype, rule, path, prologue in PLANTED_AROUND:
        case, around = make_around(shape, dtype, prologue)
        calls.append((case, rule, path, around))
    missed, kinds = unnoticed_in_layers(executor, calls)
    assert not missed, "\n".join(missed)
    assert all(
        kinds.count(fault) > 1 for fault in (SKIP_BARRIER, SHIFT_INDEX, SWAP_FRAGMENT, SKIP_WAIT)
    )


@pytest.mark.parametrize("order", range(3))
def test_a_barrier_orders_only_those_who_wait(executor: Executor, order: int) -> None:
    """Of all who read a byte before one writes it, not only of the last: halves, warps and blocks."""
    halves, half, blocks, warp = range(4)
    of_half, of_block, of_warp = range(3)
    ordered = {(halves, of_block), (half, of_half), (half, of_block)}
    ordered |= {(warp, of_half), (warp, of_block), (warp, of_warp)}
    for readers in (halves, half, blocks, warp):
        for barrier in (of_half, of_block, of_warp):
            said = executor.race(readers, barrier, order)
            if (readers, barrier) in ordered:
                assert said is None, (readers, barrier)
            else:
                assert said and "races with a read" in said, (readers, barrier)
