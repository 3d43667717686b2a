"""Three layers in one call of the CUDA kernels, on the CPU with every access checked (see test_cuda_executor).

What is special about them: the second one's outputs have been through the MLP's gate.
"""

import ctypes
import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_cuda_faults import unnoticed

import battery
from cuda_executor import (
    LINEAR,
    RMS_NORM,
    SHIFT_INDEX,
    SILU_GATE,
    SWAP_FRAGMENT,
    TYPES,
    Call,
    Executor,
    ExecutorError,
    aligned,
    copy,
)
from jaxint8 import RelativeThreshold, Threshold, TopK, reference

EPSILON = 1e-5
RULES = [None, Threshold(2.0, "token"), RelativeThreshold(3.0), TopK(8)]


@dataclasses.dataclass(frozen=True)
class Block:
    """Activations of the first layer, its residual, the weight of the norm, and three layers."""

    x: np.ndarray
    residual: np.ndarray
    norm: np.ndarray
    layers: list[battery.Case]  # their x is not used


def make(
    shape: tuple[int, int, int, int], dtype: Any, kind: str = "outliers", biases: bool = True
) -> Block:
    """Returns a block of m rows: out (h, k), up (2 * f, h), down (h, f)."""
    m, k, h, f = shape
    shapes = (m, k, h), (m, h, 2 * f), (m, f, h)
    layers = [battery.make(s, dtype, kind) for s in shapes]
    # Outputs of about the size of the inputs, so that rules find outliers in all layers.
    layers = [
        dataclasses.replace(
            case,
            scale=case.scale / np.float32(8 * np.sqrt(case.codes.shape[1])),
            bias=case.bias if biases else None,
        )
        for case in layers
    ]
    rng = np.random.default_rng(shape)
    residual = rng.standard_normal((m, h)).astype(dtype)
    return Block(layers[0].x, residual, rng.normal(1, 0.5, h).astype(np.float32), layers)


def wanted(block: Block, rule: Any) -> np.ndarray:
    """Returns the block by the oracle."""

    def linear(x: np.ndarray, case: battery.Case) -> np.ndarray:
        return reference.int8_linear(x, case.codes, case.scale, case.bias, rule)

    def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype)

    out, up, down = block.layers
    attended = add(block.residual, linear(block.x, out))
    gated = linear(reference.rms_norm(attended, block.norm, EPSILON), up)
    return add(attended, linear(reference.silu_gate(gated), down))


def calls(block: Block, rule: Any) -> tuple[Any, np.ndarray, list[np.ndarray | None]]:
    """Returns the calls of the three layers, the result's array, and all arrays, which must outlive the call."""
    x, dtype = block.x, block.x.dtype
    kept: list[np.ndarray | None] = []

    def keep(array: np.ndarray | None) -> int | None:
        kept.append(array)
        return array.ctypes.data if array is not None and array.size else None

    residual = keep(copy(block.residual))
    x_at = keep(copy(x))
    made = (Call * 3)()
    y = None
    for i, case in enumerate(block.layers):
        n, k = case.codes.shape
        y = aligned((len(x), n), dtype)
        made[i] = Call(
            kind=LINEAR,
            type=TYPES[dtype],
            path=-1,
            prologue=(0, RMS_NORM, SILU_GATE)[i],
            epsilon=EPSILON,
            m=len(x),
            k=k,
            n=n,
            x=x_at,
            w=keep(copy(case.codes)),
            w_scale=keep(copy(case.scale)),
            bias=None if case.bias is None else keep(copy(case.bias)),
            norm=keep(copy(block.norm)) if i == 1 else None,
            residual=None if i == 1 else residual,
            y=keep(y),
            **Executor._options(rule),
        )
        x_at = made[i].y
        residual = made[i].y if i == 0 else residual
    assert y is not None
    return made, y, kept


def run(executor: Executor, block: Block, rule: Any) -> np.ndarray:
    """Returns the block's output."""
    return run_all(executor, block, rule)[0]


def run_all(executor: Executor, block: Block, rule: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the block's output, and what the second layer has written."""
    library = executor.library
    made, y, kept = calls(block, rule)
    library.executor_run_block.restype = ctypes.c_char_p
    bytes_ = max(library.executor_workspace_bytes(ctypes.byref(call)) for call in made)
    workspace = aligned((bytes_,), np.uint8)
    for call in made:
        call.planted_fault, call.planted_site = executor.fault, executor.site
        call.order, call.multiprocessors = executor.order, 3
        call.workspace, call.workspace_bytes = workspace.ctypes.data, bytes_
    error = library.executor_run_block(made)
    if error is not None:
        raise ExecutorError(error.decode())
    arrays = [array for array in kept if array is not None and array.size]
    return y, next(array for array in arrays if array.ctypes.data == made[1].y)


def expect(executor: Executor, block: Block, rule: Any) -> None:
    y = run(executor, block, rule)
    np.testing.assert_array_equal(y.astype(np.float32), wanted(block, rule).astype(np.float32))


# One row or two, up to 8 and 16, up to 32 and 64 (of weights that are not narrow, as swapped.h does the gate), more;
# widths off the boundaries of groups and tiles; layers that are behind a gate of rows, as no kernel does it to the
# outputs before them.
SHAPES = [
    (1, 64, 96, 48),
    (1, 1296, 272, 1700),
    (2, 16, 32, 16),
    (2, 48, 64, 37),
    (5, 272, 208, 224),
    (8, 144, 80, 1206),
    (11, 48, 64, 337),
    (20, 144, 80, 205),
    (60, 144, 96, 300),
    (30, 64, 1040, 66),
    (20, 16, 2576, 37),
    (60, 16, 2576, 70),
    (70, 48, 64, 48),
    (3, 40, 56, 24),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_three_layers(
    executor: Executor, shape: tuple[int, int, int, int]
) -> None:
    for number, rule in enumerate(RULES):
        executor.order = number % 3
        dtype = battery.DTYPES[(number + shape[0]) % 3]
        expect(executor, make(shape, dtype, biases=number % 2 == 0), rule)


@pytest.mark.parametrize(
    ("shape", "rule", "does"),
    [
        ((1, 64, 96, 48), TopK(8), True),
        ((2, 48, 64, 37), None, True),
        ((2, 48, 64, 37), RelativeThreshold(3.0), True),
        ((11, 48, 64, 337), None, True),
        ((8, 48, 64, 337), RelativeThreshold(3.0), True),
        ((11, 48, 64, 337), RelativeThreshold(3.0), False),  # no room for its groups
        ((20, 16, 2576, 37), None, True),
        ((60, 16, 2576, 70), TopK(8), True),
        ((20, 144, 80, 205), None, False),  # narrow weights
        ((70, 48, 64, 48), None, False),
    ],
    ids=str,
)
def test_the_second_layer_does_the_gate(
    executor: Executor, shape: tuple[int, int, int, int], rule: Any, does: bool
) -> None:
    block = make(shape, ml_dtypes.bfloat16)
    m, f = shape[0], shape[3]
    out, up, _ = block.layers
    attended = reference.int8_linear(block.x, out.codes, out.scale, out.bias, rule)
    attended = (block.residual.astype(np.float32) + attended.astype(np.float32)).astype(
        attended.dtype
    )
    rows = reference.rms_norm(attended, block.norm, EPSILON)
    plain = reference.int8_linear(rows, up.codes, up.scale, up.bias, rule)
    written = run_all(executor, block, rule)[1].reshape(-1)
    wanted = reference.silu_gate(plain) if does else plain
    np.testing.assert_array_equal(written[: wanted.size].reshape(wanted.shape), wanted)
    assert wanted.shape == (m, f if does else 2 * f)


@pytest.mark.parametrize("kind", ["nan", "zero_rows", "ties", "minus_128"])
def test_rows_that_are_not_ordinary(executor: Executor, kind: str) -> None:
    for m in (1, 2, 5, 20):
        expect(executor, make((m, 48, 64, 48), ml_dtypes.bfloat16, kind), RelativeThreshold())


def test_planted_faults_are_noticed(executor: Executor) -> None:
    """In the kernels that do the gate, as in test_cuda_executor."""
    calls = [
        ((1, 32, 32, 560), np.float32, None),
        ((2, 16, 16, 830), ml_dtypes.bfloat16, None),
        ((3, 16, 32, 330), ml_dtypes.bfloat16, None),
        ((9, 32, 16, 40), np.float32, Threshold(1.0, "token")),
        ((20, 16, 1552, 70), ml_dtypes.bfloat16, Threshold(1.0, "token")),
        ((34, 16, 2576, 17), np.float32, None),
    ]
    places: dict[tuple[str, int], list[Any]] = {}
    for shape, dtype, rule in calls:
        call = make(shape, dtype), rule
        executor.order = 1
        expect(executor, *call)
        for place, fault in executor.sites():
            if place.startswith(("gemv.h", "skinny.h", "swapped.h", "epilogue.h")):
                places.setdefault((place, fault), []).append(call)
    assert not unnoticed(executor, places, lambda call: expect(executor, *call), lambda _: True)
    kinds = [fault for _, fault in places]
    assert all(kinds.count(fault) > 1 for fault in (SHIFT_INDEX, SWAP_FRAGMENT))
