"""Outlier rules against the oracle and against their definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from battery import DTYPES, FEW_RULES, FEW_SHAPES, FLOAT32_ONLY, KINDS, RULES, make
from jaxint8 import RelativeThreshold, Threshold, TopK, reference
from jaxint8.outliers import as_rule, outlier_mask


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_masks_equal_the_oracle(rule):
    cases = [make(shape) for shape in FEW_SHAPES] if rule in FEW_RULES else []
    cases += [
        make((9, 331, 1), dtype, kind)
        for kind in KINDS
        for dtype in ([np.float32] if kind in FLOAT32_ONLY or rule not in FEW_RULES else DTYPES)
    ]
    for case in cases:
        mask = jax.jit(outlier_mask, static_argnums=1)(jnp.asarray(case.x), rule)
        np.testing.assert_array_equal(mask, reference.outlier_mask(case.x, rule))


def test_threshold_is_inclusive():
    x = np.array([[6.0, np.nextafter(np.float32(6), np.float32(0)), -6.0, 0.0]], np.float32)
    np.testing.assert_array_equal(
        reference.outlier_mask(x, Threshold(6.0)), [[True, False, True, False]]
    )


def test_column_scope_takes_whole_columns_token_scope_does_not():
    x = np.array([[7.0, 1.0], [1.0, 1.0]], np.float32)
    np.testing.assert_array_equal(
        reference.outlier_mask(x, Threshold(6.0, "column")), [[True, False], [True, False]]
    )
    np.testing.assert_array_equal(
        reference.outlier_mask(x, Threshold(6.0, "token")), [[True, False], [False, False]]
    )


def test_top_k_ties_go_to_the_lower_index():
    x = np.array([[1.0, -2.0, 2.0, 2.0, 0.0]], np.float32)
    for mask in (reference.outlier_mask(x, TopK(2)), outlier_mask(jnp.asarray(x), TopK(2))):
        np.testing.assert_array_equal(mask, [[False, True, True, False, False]])


def test_relative_threshold_is_the_definition():
    """Masks equal abs(x) >= value * rms in float64, but within 4e-4 of the threshold.

    The rms is taken from magnitudes u in steps of absmax / 4095. Rounding moves each by at most half a step, so the
    root of the sum of squares by at most sqrt(k) / 2 steps, while it is itself at least sqrt(k) * rms / step; here the
    absmax is below 64 rms, so the relative error is below 64 / 4095 / 2 in the worst case, and as the errors of k >= 64
    values are independent of their signs it averages to step**2 / 12 per value: below 64**2 / 4095**2 / 24 = 1e-5.
    Dropping the low 12 bits of the sum, at least 4095**2, costs at most 2.5e-4 / 2 more.
    """
    rng = np.random.default_rng(0)
    for k in (64, 577, 2048):
        x = (rng.normal(size=(50, k)) * np.exp(3 * rng.normal(size=(50, 1)))).astype(np.float32)
        x[:, 5] *= 30
        rms = np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True))
        for value in (2.0, 6.0):
            ratio = np.abs(x) / (value * rms)
            mask = reference.outlier_mask(x, RelativeThreshold(value))
            clear = np.abs(ratio - 1) > 4e-4
            np.testing.assert_array_equal(mask[clear], (ratio >= 1)[clear])


def test_relative_threshold_is_scale_free_and_permutation_free():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 300)).astype(np.float32)
    x[:, 7] = 40
    mask = reference.outlier_mask(x, RelativeThreshold(6.0))
    np.testing.assert_array_equal(
        mask, reference.outlier_mask(x * np.float32(2.0**-20), RelativeThreshold(6.0))
    )
    order = rng.permutation(300)
    np.testing.assert_array_equal(
        mask[:, order], reference.outlier_mask(x[:, order], RelativeThreshold(6.0))
    )


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ValueError, lambda: Threshold(-1.0)),
        (ValueError, lambda: Threshold(float("nan"))),
        (ValueError, lambda: Threshold(10**400)),
        (ValueError, lambda: RelativeThreshold(1e300)),
        (ValueError, lambda: TopK(2**31)),
        (ValueError, lambda: Threshold(6.0, "row")),
        (TypeError, lambda: RelativeThreshold("6")),
        (ValueError, lambda: TopK(0)),
        (TypeError, lambda: TopK(1.5)),
        (TypeError, lambda: TopK(True)),
        (TypeError, lambda: as_rule("6")),
        (ValueError, lambda: as_rule(10**400)),
        (TypeError, lambda: as_rule(True)),
    ],
)
def test_bad_rules_are_refused(error, call):
    with pytest.raises(error):
        call()


def test_a_number_means_the_papers_rule():
    assert as_rule(6) == Threshold(6.0, "column")
    assert as_rule(None) is None
    assert hash(TopK(8)) == hash(TopK(8))
