"""The CUDA kernel for a token's attention to an int8 cache (ffi/cuda/attend.h) on the CPU."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from test_cuda_faults import unnoticed

from cuda_executor import SHIFT_INDEX, SKIP_BARRIER, Executor, Step
from jaxint8 import reference

TYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
# (rows, key-value heads, query heads of each, d, slots, slot, multiprocessors): a first token, the last slot, warps
# with nothing to do, one block of a head and clusters of two, four and eight.
SHAPES = [
    (1, 1, 1, 64, 32, 0, 1),
    (2, 1, 3, 64, 96, 95, 1),
    (3, 2, 4, 128, 64, 40, 3),
    (1, 2, 8, 128, 160, 150, 1),
    (2, 1, 4, 128, 256, 250, 3),
    (1, 1, 2, 64, 512, 300, 3),
    (1, 1, 5, 64, 1024, 1000, 8),
    (1, 2, 4, 128, 1024, 70, 20),
]


def make(
    shape: tuple[int, ...], dtype: type = np.float32, *, rope: bool = True, padded: bool = True
) -> Step:
    b, kv_heads, queries, d, slots, slot, _ = shape
    rng = np.random.default_rng(shape)
    # A few dimensions of keys are large, and scores are such that some slots count and others do not.
    qkv = rng.normal(size=(b, queries + 2, kv_heads, d)) * 2
    start = rng.integers(0, slot // 2 + 1, b).astype(np.int32) if padded else np.zeros(b, np.int32)
    past = rng.normal(size=(b, kv_heads, slots, d)).astype(np.float32)
    past[..., 3] *= 9
    keys, _, key_scale = reference.quantize_rows(reference.spread(past).reshape(-1, d), None)
    across = rng.normal(size=(b, kv_heads, slots, d)).astype(np.float32)
    values, _, value_scale = reference.quantize_rows(across.reshape(-1, d), None)
    value_codes = np.ascontiguousarray(values.reshape(past.shape).swapaxes(2, 3))
    scales = [scale.reshape(b, kv_heads, slots).copy() for scale in (key_scale, value_scale)]
    places = np.arange(slots)
    for scale in scales:  # what no token has stored, or is not seen, has no say
        hidden = (places >= slot) | (places < start[:, None, None])
        scale[np.broadcast_to(hidden, scale.shape)] = np.nan
    angles = rng.uniform(0, 7, size=(b, d // 2))
    tables = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    return Step(
        qkv.reshape(b, -1).astype(dtype),
        tables if rope else None,
        start,
        slot,
        (keys.reshape(past.shape), scales[0]),
        (value_codes, scales[1]),
    )


def rotated(x: np.ndarray, rope: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Turns pairs (i, i + d / 2) of x[b, h, d], each operation rounded, to the type of x."""
    if rope is None:
        return x
    cosine, sine = (a[:, None] for a in rope)
    first, second = np.split(x.astype(np.float32), 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return np.concatenate(turned, axis=-1).astype(x.dtype)


def integer_queries(query: np.ndarray, levels: int = 127 * 128) -> np.ndarray:
    """Spread queries [b, h, d] as integers up to so many levels, times their scale, in float64."""
    x = reference.spread(query)
    with np.errstate(invalid="ignore"):
        absmax = np.abs(x).max(axis=-1, keepdims=True)
        scale = np.where(absmax > 0, absmax / np.float32(levels), np.float32(1))
        return np.rint(x / scale).astype(np.float64) * scale


def wanted(step: Step, levels: int = 127 * 128) -> tuple[np.ndarray, ...]:
    """The result in float64, with how far off a kernel may be, and the cache by the oracle."""
    b, kv_heads, d, slots = step.values[0].shape
    heads = kv_heads * step.sizes["queries"]
    x = step.qkv.reshape(b, -1, d)
    query, key = (
        rotated(x[:, :heads], step.rope),
        rotated(x[:, heads : heads + kv_heads], step.rope),
    )
    cache = [a.copy() for a in (*step.keys, *step.values)]
    for at, vectors in ((0, reference.spread(key)), (2, x[:, heads + kv_heads :])):
        codes, _, scale = reference.quantize_rows(vectors.reshape(-1, d), None)
        place = (slice(None), slice(None), step.slot) if at == 0 else (..., step.slot)
        cache[at][place] = codes.reshape(b, kv_heads, d)
        cache[at + 1][:, :, step.slot] = scale.reshape(b, kv_heads)
    places = np.arange(slots)
    seen = (places <= step.slot) & (places >= step.start[:, None])
    integers = integer_queries(query, levels)
    y = reference.attend_spread(integers, (cache[0], cache[1]), (cache[2], cache[3]), seen)
    return y.reshape(b, -1), tolerance(integers, cache, seen, x.dtype, y), *cache


def tolerance(
    query: np.ndarray, cache: list[np.ndarray], seen: np.ndarray, dtype: np.dtype, y: np.ndarray
) -> np.ndarray:
    """How far off y may be: by codes of shares, of 15 bits, by float32, and by the last rounding.

    Scores have some 16 roundings of float32 of the largest of them, that of the power of two included, and so
    relatively have shares. A share is half a unit off, of which the largest of 32 has 16256, whatever the value, and
    values are 127 units of their scale at most. Sums of so many terms in float32 are off by as many roundings.
    """
    b, heads, d = query.shape
    kv_heads, slots = cache[1].shape[1:]
    group = (b, kv_heads, heads // kv_heads)
    spreaded = np.abs(query).max(axis=-1).reshape(group)
    unit = 1 / np.sqrt(d) / (d & -d)
    largest = np.abs(cache[0].astype(np.float64)).max(axis=-1) * np.where(
        seen[:, None], cache[1], 0
    )
    rounding = 2.0**-23 * (
        16 * spreaded * d * largest.max(axis=-1)[:, :, None] * unit + 2 * slots + 100
    )
    value = np.where(seen[:, None], np.abs(cache[3]), 0).max(axis=-1) * 127
    # Shares sum up to one, so do those of groups of 32, whose largest is at most the sum.
    share = 32 / 16256 / 2
    off = (2 * rounding + share) * value[:, :, None]
    each = np.repeat(off.reshape(b, heads, 1), d, axis=-1).reshape(b, -1)
    last = {4: 2.0**-24, 2: 2.0**-8 if dtype == ml_dtypes.bfloat16 else 2.0**-11}[dtype.itemsize]
    return each + last * np.abs(y.reshape(b, -1)) + (2.0**-24 if dtype == np.float16 else 0)


def expect(executor: Executor, step: Step) -> None:
    y, bound, *cache = wanted(step)
    found, *held = executor.attend(step)
    for mine, oracle in zip(held, cache, strict=True):
        np.testing.assert_array_equal(mine, oracle)
    nan = np.isnan(y)
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    assert (np.abs(found.astype(np.float64) - y)[~nan] <= bound[~nan]).all()


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(executor: Executor, shape: tuple[int, ...], order: int) -> None:
    executor.order, executor.multiprocessors = order, shape[-1]
    expect(executor, make(shape))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rope", [False, True])
def test_types(executor: Executor, dtype: type, rope: bool) -> None:
    for shape in (SHAPES[1], SHAPES[2], SHAPES[5]):
        executor.multiprocessors = shape[-1]
        expect(executor, make(shape, dtype, rope=rope, padded=rope))


def test_the_bound_is_a_tight_one() -> None:
    """A value that is forgotten, and a query of 8 bits, as its high parts alone would be, are beyond it."""
    step = make((2, 2, 4, 128, 128, 120, 3))
    y, bound, *_ = wanted(step)
    assert bound.max() < 0.01 * np.abs(y).max()
    short = wanted(dataclasses.replace(step, start=step.start + 1))[0]
    assert (np.abs(short - y) > bound).any()
    assert (np.abs(wanted(step, levels=127)[0] - y) > bound).any()


@pytest.mark.parametrize("where", ["q", "k", "v", "keys", "values"])
def test_what_is_no_number_shows(executor: Executor, where: str) -> None:
    step = make((2, 2, 2, 64, 96, 70, 3), padded=False)
    qkv = step.qkv.copy().reshape(2, 8, 64)
    for scale in (step.keys[1], step.values[1]):
        scale[...] = np.nan_to_num(scale, nan=0.5)
    if where in ("q", "k", "v"):
        qkv[1, {"q": 0, "k": 4, "v": 6}[where], 5] = np.inf if where == "k" else np.nan
    else:
        getattr(step, where)[1][1, 0, 33] = np.nan
    step = dataclasses.replace(step, qkv=qkv.reshape(2, -1))
    y = wanted(step)[0].reshape(2, 4, 64)
    assert np.isnan(y).any(axis=-1).tolist() == [[False] * 4, [True, where != "q", False, False]]
    expect(executor, step)


def test_zeros(executor: Executor) -> None:
    step = make((1, 1, 2, 64, 64, 33, 3))
    step = dataclasses.replace(step, qkv=np.zeros_like(step.qkv))
    expect(executor, step)
    step.values[1][:] = 0
    assert not executor.attend(step)[0].any()


def test_a_row_does_not_depend_on_others(executor: Executor) -> None:
    """To the bit, as long as as many blocks share a head."""
    executor.multiprocessors = 1
    step = make((3, 1, 4, 64, 96, 80, 1))
    together = executor.attend(step)[0]
    for row in range(3):
        part = slice(row, row + 1)
        alone = Step(
            step.qkv[part],
            (step.rope[0][part], step.rope[1][part]) if step.rope else None,
            step.start[part],
            step.slot,
            (step.keys[0][part], step.keys[1][part]),
            (step.values[0][part], step.values[1][part]),
        )
        np.testing.assert_array_equal(executor.attend(alone)[0], together[part])


def test_a_slot_beyond_the_end_is_the_last(executor: Executor) -> None:
    step = make((1, 1, 1, 64, 64, 63, 3))
    beyond = dataclasses.replace(step, slot=70)
    for mine, other in zip(executor.attend(beyond), executor.attend(step), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_no_rows(executor: Executor) -> None:
    step = make(SHAPES[0])
    cache = [(codes[:0], scale[:0]) for codes, scale in (step.keys, step.values)]
    empty = Step(step.qkv[:0], None, step.start[:0], 0, *cache)
    assert executor.attend(empty)[0].shape == (0, 64)


def test_planted_faults_are_noticed(executor: Executor) -> None:
    places: dict[tuple[str, int], list[tuple[int, Step]]] = {}
    for shape, dtype in ((SHAPES[3], np.float32), (SHAPES[4], np.float16), (SHAPES[5], TYPES[1])):
        executor.order, executor.multiprocessors = 0, shape[-1]
        step = make(shape, dtype)
        expect(executor, step)
        for place in executor.sites():
            places.setdefault(place, []).append((shape[-1], step))

    def again(call: tuple[int, Step]) -> None:
        executor.multiprocessors = call[0]
        expect(executor, call[1])

    missed = unnoticed(executor, places, again, lambda _: True)
    assert not missed, "\n".join(missed)
    kinds = [fault for _, fault in places]
    assert kinds.count(SKIP_BARRIER) > 1 and kinds.count(SHIFT_INDEX) > 10
