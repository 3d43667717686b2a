"""Quotients as the CUDA kernels make them, without divisions, to the bit."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuda_executor import Executor
from jaxint8 import RelativeThreshold, Threshold, reference


@pytest.mark.parametrize("rule", [None, Threshold(200.0), RelativeThreshold(3.0)], ids=str)
def test_quotients_near_a_half(executor: Executor, rule: Any) -> None:
    """Quotients on a half and a few steps of float32 beside it, where a reciprocal alone would round wrongly."""
    rng = np.random.default_rng(5)
    halves = (rng.integers(-126, 126, (6, 2048)) + 0.5).astype(np.float32)
    halves *= np.array([[1], [1 / 3], [0.1], [1.7], [1e-30], [1e30]], np.float32)
    x = (halves.view(np.int32) + rng.integers(-3, 4, halves.shape, np.int32)).view(np.float32)
    x[:, 7] = np.array([127, 127 / 3, 12.7, 127 * 1.7, 127e-30, 127e30], np.float32)
    x[0, 9] = 16256.5 if rule else 3  # outlier codes around a half as well
    x[0, 11] = 4000.5 if rule else 3
    for got, wanted in zip(
        executor.quantize(x, rule), reference.quantize_rows(x, rule), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def near_turns(bits: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns all x with so many bits and float32 divisors whose quotients are nearest to where rounding turns.

    A quotient that is rounded to a float32 becomes n or n + 1 by which side of the middle between two
    floats beside n + 1/2 it is on: an odd number M of 25 bits, scaled. x = v 2^s for an integer v, and
    d D for one of 24 bits: v 2^s - M D is at least 1, and is small for few divisors, which are found.
    """
    halves = 2 * np.arange(most, dtype=np.int64) + 1
    exponents = np.frexp(halves.astype(np.float64))[1].astype(np.int64) - 1
    xs, divisors = [], []
    for side in (-1, 1):
        middles = (halves << (24 - exponents)) + side
        for v in range(1 << (bits - 1), 1 << bits):
            shifts = np.frexp(middles / v)[1].astype(np.int64) + 22
            for shift in (shifts, shifts + 1):
                scaled = np.int64(v) << shift
                for divisor in (scaled // middles, scaled // middles + 1):
                    near = np.abs(scaled - middles * divisor) <= 8
                    near &= (divisor >= 1 << 23) & (divisor < 1 << 24)
                    xs.append(np.ldexp(scaled[near].astype(np.float64), exponents[near] - 25))
                    divisors.append(divisor[near])
    return np.concatenate(xs).astype(np.float32), np.concatenate(divisors).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 11])
def test_a_reciprocal_in_two_parts_is_enough_for_few_bits(executor: Executor, bits: int) -> None:
    """bfloat16 and float16: every quotient up to the largest code that is near a turn, by any divisor."""
    x, divisors = near_turns(bits, 16260)
    assert x.size >= 3 and (x.view(np.int32) << (bits + 8) == 0).all()
    got = executor.round_quotients(x, divisors, bits)
    np.testing.assert_array_equal(got, np.rint(x / divisors))


@pytest.mark.parametrize("bits", [8, 11, 24])
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-61, 1.0, 2.0**100])
def test_quotients_by_numbers_of_all_ones(executor: Executor, bits: int, scale: float) -> None:
    """The divisors by which Markstein's corrections may fail, and their neighbours; and any others."""
    if bits == 11:
        scale = min(max(scale, 2.0**-38), 2.0**9)  # no row of float16 has another
    rng = np.random.default_rng(bits)
    mantissas = rng.integers(1 << (bits - 1), 1 << bits, 20000)
    divisors = 2.0 - 2.0**-23 * rng.integers(1, 4, mantissas.size)
    divisors[10000:] = rng.uniform(1, 2, 10000)
    divisors = (divisors * scale).astype(np.float32)
    x = np.ldexp(mantissas, rng.integers(-3, 15, mantissas.size) - bits).astype(np.float32)
    x *= np.float32(scale)
    got = executor.round_quotients(x, divisors, bits)
    np.testing.assert_array_equal(got, np.rint(x / divisors))


def mantissas(step: int, exponent: int) -> np.ndarray:
    """Returns every so manyth float32 of a binade."""
    return np.ldexp(np.arange(1 << 23, 1 << 24, step).astype(np.float32), exponent - 23)


@pytest.mark.parametrize("divisor", [127, 4095, 127 * 128])
def test_divisions_by_constants(executor: Executor, divisor: int) -> None:
    """Rounded correctly, for every mantissa; and from the smallest usable quotients to the largest."""
    for step, exponent in (
        (1, 0),
        (997, -125 + divisor.bit_length()),
        (997, 127),
        (997, -60),
        (997, 60),
    ):
        x = mantissas(step, exponent)
        np.testing.assert_array_equal(executor.divide(x, divisor, False), x / np.float32(divisor))
    assert executor.divide(np.zeros(1, np.float32), divisor, False)[0] == 0
    # Around the smallest scale, which decides whether a row counts as zero, and far below it.
    least = np.float32(divisor * 2.0**-125)
    around = np.array(
        [least, *(least + i * np.spacing(least) for i in range(-8, 9)), 2.0**-149, 2.0**-130],
        np.float32,
    )
    usable = executor.divide(around, divisor, False) >= 2.0**-125
    np.testing.assert_array_equal(usable, around / np.float32(divisor) >= 2.0**-125)


def test_divisions_by_integers(executor: Executor) -> None:
    """With an exact reciprocal: what a GPU makes of that is for ffi/cuda/gpu_check.py to see."""
    rng = np.random.default_rng(0)
    for divisor in [1, 2, 3, 576, 4095, 4096, 4097, 14336, *rng.integers(1, 133144, 200).tolist()]:
        x = rng.integers(0, 1 << 62, 20000) >> rng.integers(0, 62, 20000)
        x = x.astype(np.float32)
        np.testing.assert_array_equal(executor.divide(x, divisor, True), x / np.float32(divisor))


@pytest.mark.parametrize("rule", [None, Threshold(1.0)], ids=str)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=lambda d: np.dtype(d).name)
def test_codes_of_all_mantissas(executor: Executor, dtype: Any, rule: Any) -> None:
    """Every value of few bits by every scale of one, or by that of an outlier: quotients that are halves among them."""
    bits = ml_dtypes.finfo(dtype).nmant + 1
    mantissas = np.arange(1 << (bits - 1), 1 << bits, dtype=np.float32)
    exponents = np.arange(9 if bits == 8 else 2)
    values = np.ldexp(mantissas, -exponents[:, None] - bits).reshape(-1).astype(np.float32)
    largest = mantissas if bits == 8 else mantissas[::7]
    least = 2.0 ** (-110 if rule else -117)  # about the smallest that is not zero
    for scale in (least, 1.0, 2.0**127) if bits == 8 else (2.0**-6, 1.0, 2.0**9):
        x = np.concatenate(
            [np.ldexp(largest, -bits)[:, None], values * np.ones((len(largest), 1))], 1
        )
        x[:, 1:] = np.where(x[:, 1:] > x[:, :1], x[:, 1:] / 2, x[:, 1:])
        if rule is not None:  # an outlier, of which a 128th is larger than all others
            x[:, 1:] /= 256
        x = (x * np.float32(scale)).astype(dtype)
        limited = rule and Threshold(scale / 4)
        for got, wanted in zip(
            executor.quantize(x, limited), reference.quantize_rows(x, limited), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)
