"""The law: a NumPy oracle of every public operation, written to be read and to be compared with ``==``.

Integers (codes and int32 sums) and, with int15 outliers, the float results of every implementation must equal these
to the bit. The surprising fact is that this needs no tolerance: row statistics are maxima, counts and integer sums,
so nothing depends on an order of summation. Imports NumPy (and its bfloat16 extension) only; duck-types the rules.
"""

from typing import Any, Literal

import numpy as np

CODE_MAX = 127
OUTLIER_CODE_MAX = 127 * 128  # hi <= 127, see quantize_rows
# 127 * sum(abs(codes of a row)) must stay below 2**31 for the int32 sum to be exact.
SUM_OF_CODES_MAX = (2**31 - 1) // CODE_MAX
SMALLEST_SCALE = np.float32(2.0**-125)
RMS_LEVELS = 4095
# Of RMSNorm: magnitudes are rounded to integers of 22 bits, and below 2**-40 they count as zero.
NORM_EXPONENT = 21
SMALLEST_NORM = np.float32(2.0**-40)
SMALLEST_NORM_EPSILON = 2.0**-40
# Of exp: log2(e); ln(2) as a part with 9 bits, so that its products are exact, and the rest; the polynomial of
# (exp(r) - 1 - r) / r**2 for abs(r) <= ln(2) / 2, highest power first (Cephes, expf).
EXP_LOG2E = np.float32(1.44269504088896341)
EXP_LN2 = (np.float32(0.693359375), np.float32(-2.12194440e-4))
EXP_POLYNOMIAL = tuple(
    np.float32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
EXP_RANGE = (np.float32(-87), np.float32(88))


def quantize(
    kernel: np.ndarray, per: Literal["channel", "tensor"] = "channel"
) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a kernel float[k, n] to (codes int8[n, k], scale float32[n]) by absmax (paper, section 2.1).

    The scale is absmax / 127 per output channel, or over the whole kernel with ``per="tensor"``. A channel whose scale
    would be below the smallest normal float32 counts as zero: scale 1, codes 0. A non-finite channel has scale NaN.
    """
    rows = np.ascontiguousarray(np.asarray(kernel).astype(np.float32).T)
    with np.errstate(invalid="ignore"):
        absmax = np.max(np.abs(rows), axis=1, initial=np.float32(0))
        if per == "tensor":
            absmax = np.full_like(absmax, np.max(absmax, initial=np.float32(0)))
    scale, usable = _scale(absmax / np.float32(CODE_MAX))
    safe = np.where(usable[:, None], rows, np.float32(0))
    codes = np.clip(np.rint(safe / np.where(usable, scale, 1)[:, None]), -CODE_MAX, CODE_MAX)
    scale = np.where(np.isfinite(absmax), scale, np.float32(np.nan))
    return codes.astype(np.int8), scale


def dequantize(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns float32[k, n]: codes * scale, transposed to the shape of the original kernel."""
    return (codes.astype(np.float32) * scale[:, None]).T


def outlier_mask(x: np.ndarray, rule: Any) -> np.ndarray:
    """Returns bool[m, k], the outliers of float[m, k] ``x``; see jaxint8.outliers for the rules."""
    values = x.astype(np.float32)
    finite = np.all(np.isfinite(values), axis=1, keepdims=True)
    magnitude = np.abs(np.where(finite, values, np.float32(0)))
    m, k = magnitude.shape
    name = type(rule).__name__
    if rule is None:
        return np.zeros((m, k), bool)
    if name == "TopK":
        order = np.argsort(-magnitude, axis=1, kind="stable")[:, : rule.k]
        mask = np.zeros((m, k), bool)
        np.put_along_axis(mask, order, True, axis=1)
        return mask & finite
    if name == "Threshold":
        mask = magnitude >= np.float32(rule.value)
    elif name == "RelativeThreshold":
        mask = _relative_mask(magnitude, np.float32(rule.value))
    else:
        raise TypeError(f"rule: expected Threshold, RelativeThreshold, TopK or None, got {name}")
    mask &= finite
    if rule.scope == "column":
        mask = mask.any(axis=0, keepdims=True) & finite
    return mask


def quantize_rows(
    x: np.ndarray,
    rule: Any,
    arithmetic: Literal["int15", "float"] = "int15",
    per: Literal["row", "tensor"] = "row",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantises activations float[m, k] row by row (paper, section 3.1: "vector-wise"), or all with one scale.

    Returns:
      lo: int8[m, k] codes; for an outlier, with "int15", the low part of 128 * hi + lo; with "float", 0.
      hi: int8[m, k] high parts of the outliers, 0 elsewhere.
      scale: float32[m]; NaN where the row holds a non-finite value (its codes are 0).
    """
    values = x.astype(np.float32)
    m, k = values.shape
    finite = np.all(np.isfinite(values), axis=1)
    values = np.where(finite[:, None], values, np.float32(0))
    mask = outlier_mask(x, rule)
    magnitude = np.abs(values)
    rest = np.max(np.where(mask, 0, magnitude), axis=1, initial=np.float32(0)).astype(np.float32)
    raw = rest / np.float32(CODE_MAX)
    limit = np.full(m, OUTLIER_CODE_MAX, np.int64)
    if arithmetic == "int15":
        count = mask.sum(axis=1).astype(np.int64)
        outlier = np.max(np.where(mask, magnitude, 0), axis=1, initial=np.float32(0))
        room = (SUM_OF_CODES_MAX - CODE_MAX * (k - count)) // np.maximum(count, 1)
        limit = np.minimum(limit, room)
        with_outliers = np.maximum(raw, outlier.astype(np.float32) / limit.astype(np.float32))
        raw = np.where(count > 0, with_outliers, raw)
    else:
        values = np.where(mask, np.float32(0), values)
        mask = np.zeros_like(mask)
    if per == "tensor":
        raw = np.full_like(raw, np.max(raw, initial=np.float32(0)))
    scale, usable = _scale(raw)
    values = np.where(usable[:, None], values, np.float32(0))
    bound = np.where(mask, limit[:, None], CODE_MAX)
    codes = np.clip(np.rint(values / scale[:, None]), -bound, bound).astype(np.int32)
    hi = np.where(mask, (codes + 64) >> 7, 0)
    lo = codes - 128 * hi
    scale = np.where(finite, scale, np.float32(np.nan))
    return lo.astype(np.int8), hi.astype(np.int8), scale


def product(a: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Returns the exact int32[m, n] product of int8[m, k] and int8[n, k] (both K-major)."""
    # Chunks of 2**9 products of 2**14 are exact in float32, so BLAS may do the work; the chunks are summed in int64.
    total = np.zeros((a.shape[0], codes.shape[0]), np.int64)
    for start in range(0, a.shape[1], 512):
        part = slice(start, start + 512)
        total += (a[:, part].astype(np.float32) @ codes[:, part].T.astype(np.float32)).astype(
            np.int64
        )
    return total.astype(np.int32)


def int8_linear(
    x: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray | None = None,
    rule: Any = None,
    arithmetic: Literal["int15", "float"] = "int15",
) -> np.ndarray:
    """Returns x.dtype[m, n]: the LLM.int8() product of float[m, k] and a quantised kernel (paper, equation 8).

    Every float32 operation is rounded on its own; with "float" the outlier terms are added in float64 (an
    implementation may add them in float32: that path is compared with a derived tolerance).
    """
    lo, hi, row_scale = quantize_rows(x, rule, arithmetic)
    acc = (product(hi, codes).astype(np.int64) * 128 + product(lo, codes)).astype(np.int32)
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # a result may overflow to inf, as in any floating product
        y = (acc.astype(np.float32) * row_scale[:, None]) * scale[None, :].astype(np.float32)
        if arithmetic == "float":
            outliers = np.where(outlier_mask(x, rule), x.astype(np.float64), 0.0)
            weights = codes.astype(np.float32) * scale[:, None].astype(np.float32)
            y = (y.astype(np.float64) + outliers @ weights.T.astype(np.float64)).astype(np.float32)
        if bias is not None:
            y = y + bias.astype(np.float32)[None, :]
        return y.astype(x.dtype)


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Returns x.dtype[m, k]: x / sqrt(mean(x**2) + epsilon) * weight, the rows that a layer behind an RMSNorm takes.

    Every float32 operation is rounded on its own. The sum of squares is one of integers, the values rounded to 2**-21
    of the power of two at or below the row's absmax, so that its bits depend on no order; it errs by less than
    sqrt(k) * 2**-21 of itself. A row that holds a non-finite value is NaN throughout.
    """
    values = x.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        absmax = np.max(np.abs(values), axis=1, initial=np.float32(0))
        finite = np.isfinite(absmax)
        usable = finite & (absmax >= SMALLEST_NORM)
        exponent = np.frexp(np.where(usable, absmax, np.float32(1)))[1] - 1
        unit = np.ldexp(np.float32(1), exponent - NORM_EXPONENT).astype(np.float32)
        inverse = np.ldexp(np.float32(1), NORM_EXPONENT - exponent).astype(np.float32)
        steps = np.rint(np.where(usable[:, None], values, 0) * inverse[:, None]).astype(np.int64)
        mean = np.sum(steps * steps, axis=1).astype(np.float32) / np.float32(max(x.shape[1], 1))
        root = np.sqrt((mean * unit) * unit + np.float32(epsilon))
        scale = np.where(finite, np.float32(1) / root, np.float32(np.nan))
        return ((values * scale[:, None]) * weight.astype(np.float32)[None, :]).astype(x.dtype)


def exp(x: np.ndarray) -> np.ndarray:
    """Exponentiates float32 within EXP_RANGE, to one unit in the last place, each operation rounded on its own."""
    power = np.rint(x * EXP_LOG2E)
    r = (x - power * EXP_LN2[0]) - power * EXP_LN2[1]
    p = np.full_like(r, EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = p * r + coefficient
    y = (p * (r * r) + r) + np.float32(1)
    return (y.view(np.int32) + (power.astype(np.int32) << 23)).view(np.float32)


def silu_gate(x: np.ndarray) -> np.ndarray:
    """Returns x.dtype[m, k] of x[m, 2 * k]: silu(gate) * up, the first half of the columns being the gate.

    silu(g) = g / (1 + exp(-g)), every float32 operation rounded on its own; see `exp`.
    """
    gate, up = np.split(x.astype(np.float32), 2, axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        bounded = np.clip(np.where(np.isnan(gate), 0, -gate).astype(np.float32), *EXP_RANGE)
        share = np.float32(1) / (np.float32(1) + exp(bounded))
        return ((gate * share) * up).astype(x.dtype)


def quantize_zeropoint(
    x: np.ndarray, per: Literal["row", "tensor"] = "row"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantises rows float[m, k] over [min, max] widened to contain 0 (paper, section 2.1, corrected).

    Returns:
      codes int8[m, k], scale float32[m] and zero int32[m]: x is about scale * (codes + zero). A row that holds a
      non-finite value has codes 0 and the scale NaN, and takes no part in a range over all rows.
    """
    values = x.astype(np.float32)
    finite = np.all(np.isfinite(values), axis=1)
    values = np.where(finite[:, None], values, np.float32(0))
    high = np.max(values, axis=1, initial=np.float32(0))
    low = np.min(values, axis=1, initial=np.float32(0))
    if per == "tensor":
        high = np.full_like(high, np.max(high, initial=np.float32(0)))
        low = np.full_like(low, np.min(low, initial=np.float32(0)))
    levels = np.float32(2 * CODE_MAX)
    scale, usable = _scale(high / levels - low / levels)
    usable &= finite
    zero = np.where(usable, np.rint(low / scale).astype(np.int32) + CODE_MAX, 0)
    zero = np.clip(zero, -CODE_MAX, CODE_MAX).astype(np.int32)
    steps = np.rint(np.where(usable[:, None], values, np.float32(0)) / scale[:, None])
    codes = np.clip(steps.astype(np.int64) - zero[:, None], -CODE_MAX, CODE_MAX)
    return codes.astype(np.int8), np.where(finite, scale, np.float32(np.nan)), zero


def zeropoint_product(
    a: np.ndarray, a_zero: np.ndarray, codes: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    """Returns int32[m, n], the sum of (a + a_zero) * (codes + zero) as it stands in the paper's equation (4)."""
    left = a.astype(np.int64) + a_zero[:, None]
    return (left @ (codes.astype(np.int64) + zero[:, None]).T).astype(np.int32)


def scheme_linear(x: np.ndarray, w: Any, bias: np.ndarray | None, scheme: Any) -> np.ndarray:
    """Returns x.dtype[m, n]: a linear layer by any scheme of `jaxint8.schemes`, sums of floats in float64.

    Args:
      x: float[m, k].
      w: arrays ``codes`` int8[n, k] and ``scale`` float32[n], perhaps ``zero`` int32[n] and ``kernel`` float[n, k].
      bias: float[n] or None.
      scheme: which one.
    """
    codes, scale = np.asarray(w.codes), np.asarray(w.scale)
    zero = np.asarray(getattr(w, "zero", np.zeros(len(codes), np.int32)))
    if scheme.activations == "row" and scheme.numbers == "absmax" and not hasattr(w, "kernel"):
        arithmetic = scheme.outlier_arithmetic or "int15"
        return int8_linear(x, codes, scale, bias, scheme.outliers, arithmetic)
    weights = (codes.astype(np.float32) + zero[:, None].astype(np.float32)) * scale[:, None]
    kernel = getattr(w, "kernel", None)
    wide = weights if kernel is None else np.asarray(kernel).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if scheme.activations == "float":
            weights = weights.astype(x.dtype).astype(np.float64)
            y = (x.astype(np.float64) @ weights.T).astype(np.float32)
        else:
            mask = outlier_mask(x, scheme.outliers)
            rest = np.where(mask, 0, x)
            if scheme.numbers == "zeropoint":
                a, row_scale, a_zero = quantize_zeropoint(rest, scheme.activations)
                acc = zeropoint_product(a, a_zero, codes, zero)
            else:
                a, _, row_scale = quantize_rows(rest, None, per=scheme.activations)
                acc = product(a, codes)
            y = (acc.astype(np.float32) * row_scale[:, None]) * scale[None, :]
            outliers = np.where(mask, x.astype(np.float64), 0.0) @ wide.T.astype(np.float64)
            y = (y.astype(np.float64) + outliers).astype(np.float32)
        if bias is not None:
            y = y + bias.astype(np.float32)[None, :]
        return y.astype(x.dtype)


def spread(x: np.ndarray) -> np.ndarray:
    """Sums and differences of the dimensions of vectors float[..., d], by turns, neighbours first (Hadamard, unscaled).

    Over blocks as long as the largest power of two that divides d. Float32, one addition at a time.
    """
    shape, span = x.shape, 1
    x = x.astype(np.float32)
    while span < (shape[-1] & -shape[-1]):
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * span), 2, span)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        with np.errstate(invalid="ignore"):
            x = np.stack([first + second, first - second], axis=-2).reshape(shape)
        span *= 2
    return x


def attend(
    query: np.ndarray,
    keys: tuple[np.ndarray, np.ndarray],
    values: tuple[np.ndarray, np.ndarray],
    seen: np.ndarray,
) -> np.ndarray:
    """Attention of one token per row to a cache of int8 vectors, in float64 but for the codes.

    Args:
      query: float[b, heads, d].
      keys: codes int8[b, kv_heads, slots, d] of keys that have been spread, scale float32[b, kv_heads, slots].
      values: codes int8[b, kv_heads, d, slots], scale float32[b, kv_heads, slots].
      seen: bool[b, slots].

    Returns:
      float64[b, heads, d].
    """
    return attend_spread(spread(query), keys, values, seen)


def attend_spread(
    query: np.ndarray,
    keys: tuple[np.ndarray, np.ndarray],
    values: tuple[np.ndarray, np.ndarray],
    seen: np.ndarray,
) -> np.ndarray:
    """`attend` for queries float[b, heads, d] that have been spread, and rounded since as kernels do."""
    b, heads, d = query.shape
    kv_heads = keys[0].shape[1]
    grouped = query.astype(np.float64).reshape(b, kv_heads, heads // kv_heads, d)
    size = d & -d
    scores = np.einsum("bkgd,bksd->bkgs", grouped, keys[0].astype(np.float64))
    with np.errstate(invalid="ignore"):
        scores = scores * keys[1].astype(np.float64)[:, :, None] / size / np.sqrt(d)
        scores = np.where(seen[:, None, None], scores, -np.inf)
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        share = share * np.where(seen[:, None], values[1], 0).astype(np.float64)[:, :, None]
    return np.einsum("bkgs,bkds->bkgd", share, values[0].astype(np.float64)).reshape(query.shape)


def _scale(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scale, usable): below the smallest normal, or not finite, a row counts as zero and has scale 1."""
    usable = np.isfinite(raw) & (raw >= SMALLEST_SCALE)
    return np.where(usable, raw, np.float32(1)).astype(np.float32), usable


def _relative_mask(magnitude: np.ndarray, value: np.float32) -> np.ndarray:
    m, k = magnitude.shape
    if k == 0:
        return np.zeros((m, k), bool)
    unit = np.max(magnitude, axis=1, keepdims=True) / np.float32(RMS_LEVELS)
    usable = unit >= SMALLEST_SCALE
    steps = np.rint(magnitude / np.where(usable, unit, np.float32(1)))
    steps = np.minimum(steps, RMS_LEVELS).astype(np.int64)
    mean = (np.sum(steps * steps, axis=1, keepdims=True) >> 12).astype(np.float32) / np.float32(k)
    with np.errstate(invalid="ignore", over="ignore"):
        threshold = value * (unit * (np.float32(64) * np.sqrt(mean)))
        return (magnitude >= threshold) & usable
