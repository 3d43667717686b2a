"""int8_linear on meshes of devices: the bits of one device, and the collectives that it takes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx import Rngs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_linear import bits

from battery import KINDS, make
from jaxint8 import (
    Dense8bit,
    Partition,
    QuantizedMatrix,
    RelativeThreshold,
    Threshold,
    TopK,
    int8_linear,
    nnx,
    quantize,
    reference,
)
from jaxint8.dispatch import Layer, Operands
from jaxint8.linear import local_linear
from jaxint8.shards import Shards

MESHES = [(1, 1), (1, 2), (2, 2), (1, 8), (8, 1), (4, 2)]
RULES = [
    None,
    Threshold(6.0, "column"),
    Threshold(4.0, "token"),
    RelativeThreshold(2.0, "column"),
    RelativeThreshold(3.0, "token"),
    TopK(8),
]
# Ways of splitting the weights; rows are split over "data" in all of them.
COLUMN, ROW = {"n": "model"}, {"k": "model"}
M, K, N = 24, 80, 24


def mesh_of(shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))


@functools.cache
def case():
    """Rows of every kind of trouble in one x, so that one compilation tries them all."""
    kinds = [kind for kind in KINDS if kind not in ("huge", "no_bias")]
    found = [make((M, K, N), np.float32, kind) for kind in kinds]
    x = np.stack([found[i % len(found)].x[i] for i in range(M)])
    return found[0], x


def place(partition, x, codes, scale, bias):
    """The arrays, where the partition wants them."""
    specs = partition.x_spec(x.ndim), partition.codes_spec, partition.n_spec, partition.n_spec
    pairs = zip((x, codes, scale, bias), specs, strict=True)
    return [jax.device_put(a, NamedSharding(partition.mesh, spec)) for a, spec in pairs]


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def every_rule(x, codes, scale, bias, partition, rules, implementation=None, arithmetic="int15"):
    return [
        int8_linear(
            x,
            QuantizedMatrix(codes, scale),
            bias,
            outliers=rule,
            partition=partition,
            implementation=implementation,
            outlier_arithmetic=arithmetic,
        )
        for rule in rules
    ]


def collectives(function, *args, **kwargs) -> list[tuple[str, str]]:
    """(shape, operation) of every collective in the compiled program."""
    text = function.lower(*args, **kwargs).compile().as_text()
    name = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    return re.findall(rf"= (\S+) ({name})(?:-start)?\(", text)


@pytest.mark.parametrize("split", [COLUMN, ROW], ids=["column", "row"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_has_the_bits_of_one_device(shape, split):
    one, x = case()
    partition = Partition(mesh_of(shape), rows="data", **split)
    args = place(partition, x, one.codes, one.scale, one.bias)
    for rule, y in zip(RULES, every_rule(*args, partition, tuple(RULES)), strict=True):
        expected = reference.int8_linear(x, one.codes, one.scale, one.bias, rule)
        np.testing.assert_array_equal(bits(y), bits(expected), err_msg=repr(rule))
        assert y.sharding.is_equivalent_to(NamedSharding(partition.mesh, partition.y_spec(2)), 2)


def test_both_splits_at_once_portably_and_with_float_outliers():
    one, x = case()
    mesh = jax.make_mesh((2, 2, 2), ("data", "k", "n"), axis_types=(AxisType.Auto,) * 3)
    partition = Partition(mesh, rows=P(None, "data"), k="k", n="n")
    args = place(partition, x.reshape(3, 8, K), one.codes, one.scale, one.bias)
    rules = (Threshold(6.0, "column"), TopK(3))
    single = map(jnp.asarray, (x, one.codes, one.scale, one.bias))
    for arithmetic in ("int15", "float"):
        found = every_rule(*args, partition, rules, "xla", arithmetic)
        expected = (
            every_rule(*single, None, rules, "xla", arithmetic)
            if arithmetic == "float"
            else [reference.int8_linear(x, one.codes, one.scale, one.bias, rule) for rule in rules]
        )
        for y, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(bits(y).reshape(M, N), bits(wanted))


@pytest.mark.parametrize("split", [COLUMN, ROW], ids=["column", "row"])
def test_explicit_axes_and_arrays_outside_of_jit_tell_where_they_are(split):
    one, x = case()
    rule = Threshold(6.0, "column")
    expected = reference.int8_linear(x, one.codes, one.scale, one.bias, rule)
    for kind in (AxisType.Explicit, AxisType.Auto):
        partition = Partition(mesh_of((2, 2), kind), rows="data", **split)
        args = place(partition, x, one.codes, one.scale, one.bias)

        def call(x, codes, scale, bias):
            return int8_linear(x, QuantizedMatrix(codes, scale), bias, outliers=rule)

        y = call(*args)
        np.testing.assert_array_equal(bits(y), bits(expected))
        if kind == AxisType.Explicit:
            y = jax.jit(call)(*args)
            assert jax.typeof(y).sharding.spec == partition.y_spec(2)
            np.testing.assert_array_equal(bits(y), bits(expected))
            # What only x has to give up for: the weights stay.
            np.testing.assert_array_equal(
                bits(jax.jit(call)(jnp.asarray(x), *args[1:])), bits(expected)
            )


def test_the_collectives_are_one_gather_of_rows_and_one_sum():
    one, x = case()

    def found(split, rule, shape=(2, 2), **how):
        partition = Partition(mesh_of(shape), rows="data", **split)
        args = place(partition, x, one.codes, one.scale, one.bias)
        return collectives(every_rule, *args, partition, (rule,), **how)

    half = M // 2
    for rule in (None, Threshold(4.0, "token"), RelativeThreshold(3.0), TopK(8)):
        assert found(COLUMN, rule) == []
        (gather, kind), (total, other) = sorted(found(ROW, rule))
        assert (kind, other) == ("all-gather", "all-reduce")
        # Rows as they are, of one group of devices; sums of integers.
        assert f"f32[{half},{K}]" in gather and f"s32[{half},{N}]" in total
    shared = found(COLUMN, Threshold(6.0, "column"))
    assert [kind for _, kind in shared] == ["all-reduce"] and f"[1,{K}]" in shared[0][0]
    assert found(COLUMN, Threshold(6.0, "column"), (1, 2)) == []
    assert len(found(ROW, Threshold(6.0, "column"), (1, 2))) == 2
    # Where rows have to be gathered too, statistics are all that is.
    plain = found(ROW, Threshold(6.0, "column"))
    assert {kind for _, kind in plain} == {"all-reduce"}
    assert sum(f"s32[{half},{N}]" in shape for shape, _ in plain) == 1


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_columns_of_padding_do_not_count(rule):
    """By the statistics of all devices, since a row with padding is not the row of one device."""
    one, x = case()
    true = K - 3
    shards = Shards(rows=("data",), columns=("model",), k=true)
    x, codes = x.copy(), one.codes.copy()
    x[:, true:], codes[:, true:] = 0, 0
    partition = Partition(mesh_of((2, 2)), rows="data", k="model")

    def part(x, codes, scale, bias):
        operands = Operands(x, codes, scale, bias)
        return local_linear(operands, Layer(rule, "int15", None), shards=shards)

    args = place(partition, x, codes, one.scale, one.bias)
    specs = partition.x_spec(2), partition.codes_spec, partition.n_spec, partition.n_spec
    y = jax.jit(partition.map(part, specs, partition.y_spec(2)))(*args)
    expected = reference.int8_linear(x[:, :true], codes[:, :true], one.scale, one.bias, rule)
    np.testing.assert_array_equal(bits(y), bits(expected))


def test_fast_reduction_stays_within_its_bound():
    one, x = case()
    x = x[np.isfinite(x).all(axis=1)][:8]
    w = QuantizedMatrix(jnp.asarray(one.codes), jnp.asarray(one.scale))
    for dtype in (jnp.float32, jnp.bfloat16):
        partition = Partition(mesh_of((2, 4)), rows="data", k="model")
        args = place(partition, jnp.asarray(x, dtype), one.codes, one.scale, one.bias)

        @jax.jit
        def fast(x, codes, scale, bias, partition=partition):
            w = QuantizedMatrix(codes, scale)
            return int8_linear(x, w, bias, outliers=None, partition=partition, reduction="fast")

        y = np.asarray(fast(*args), np.float64)
        values = np.asarray(args[0], np.float64)
        kernel = np.asarray(w.dequantize(), np.float64)
        parts = [slice(i, i + K // 4) for i in range(0, K, K // 4)]
        partial = [values[:, p] @ kernel[p] for p in parts]
        # Each code errs by at most half a step of its part's scale; then d roundings of partial results and d - 1 of
        # their sums, one more with the bias, and the float32 scalings (3 operations).
        codes = sum(
            np.abs(values[:, p]).max(axis=1, keepdims=True) / 254 * np.abs(kernel[p]).sum(axis=0)
            for p in parts
        )
        flow = sum(np.abs(p) for p in partial) + codes + np.abs(one.bias)
        bound = codes + (len(parts) + 4) * float(jnp.finfo(dtype).eps) * flow
        assert np.all(np.abs(y - (sum(partial) + one.bias)) <= bound)
        sums = [s for s, kind in collectives(fast, *args) if kind == "all-reduce"]
        assert len(sums) == 1


@pytest.mark.parametrize("split", [COLUMN, ROW], ids=["column", "row"])
def test_gradients_vmap_scan_and_remat(split):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3, 8, 32)).astype(np.float32)
    w = quantize(jnp.asarray(rng.normal(size=(32, 32)), jnp.float32))
    bias = jnp.asarray(rng.normal(size=32), jnp.float32)
    partition = Partition(mesh_of((2, 2)), rows="data", **split)

    def layer(x, bias, partition):
        y = int8_linear(x, w, bias, outliers=RelativeThreshold(2.0), partition=partition)
        return jnp.tanh(y)

    @functools.partial(jax.jit, static_argnums=2)
    def everything(x, bias, partition):
        mapped = jax.vmap(lambda x: layer(x, bias, partition))(x)

        def loss(x, bias):
            step = jax.checkpoint(lambda x, _: (layer(x, bias, partition), None))
            return jnp.sum(jax.lax.scan(step, x, None, length=2)[0] ** 2)

        return mapped, *jax.vmap(jax.grad(loss, (0, 1)), (0, None))(x, bias)

    found = everything(x, bias, partition)
    expected = everything(x, bias, None)
    np.testing.assert_array_equal(found[0], expected[0])
    # Sums of 32 products in another order, through two layers whose gradients are of order 30.
    for y, wanted in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("split", [None, "model"])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_gradients_inside_a_users_shard_map(implementation, split):
    """Cotangents of what all devices share are added up, of what is split they are not."""
    w, bias = (
        quantize(jnp.asarray(np.random.default_rng(0).normal(size=(K, N)), jnp.float32)),
        jnp.ones(N),
    )
    x = jnp.asarray(case()[1])[:8]
    x = jnp.where(jnp.isfinite(x), jnp.clip(x, -9, 9), 1.0)

    def layer(x, codes, scale, bias):
        w = QuantizedMatrix(codes, scale)
        return int8_linear(x, w, bias, outliers=TopK(4), implementation=implementation)

    weights = (P(split), P(split), P(split))
    rows, out = (P("data"), P("data")) if split is None else (P(), P(None, split))
    spread = jax.shard_map(layer, mesh=mesh_of((2, 4)), in_specs=(rows, *weights), out_specs=out)

    def gradients(layer):
        def loss(x, bias):
            return jnp.sum(jnp.sin(layer(x, w.codes, w.scale, bias)))

        return jax.jit(jax.grad(loss, (0, 1)))(x, bias)

    for actual, expected in zip(gradients(spread), gradients(layer), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_explicit_axes_take_scales_and_biases_from_wherever_they_are(per):
    mesh = mesh_of((2, 4), AxisType.Explicit)
    found, x = case()
    kernel = QuantizedMatrix(jnp.asarray(found.codes), jnp.asarray(found.scale)).dequantize()
    bias = jnp.asarray(found.bias)
    expected = bits(int8_linear(jnp.asarray(x), quantize(kernel, per), bias))
    w = quantize(jax.device_put(kernel, NamedSharding(mesh, P(None, "model"))), per)
    for held in (bias, jax.device_put(bias, NamedSharding(mesh, P()))):
        for call in (int8_linear, jax.jit(int8_linear)):
            np.testing.assert_array_equal(bits(call(jnp.asarray(x), w, held)), expected)


@pytest.mark.parametrize("rule", [Threshold(4.0), TopK(8)], ids=repr)
def test_vmap_over_an_axis_that_is_split_explicitly(rule):
    """Each device maps over its own part, of rows and of stacked weights."""
    mesh = mesh_of((2, 4), AxisType.Explicit)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0, 3, (8, 3, K)), jnp.float32)
    stack = jax.vmap(quantize)(jnp.asarray(rng.normal(size=(8, K, N)), jnp.float32))
    one = jax.tree.map(lambda leaf: leaf[0], stack)
    layer = functools.partial(int8_linear, outliers=rule)

    with jax.set_mesh(mesh):
        for axes, arrays in [((0, None), (x, one)), ((None, 0), (x[0], stack)), (0, (x, stack))]:
            expected = jax.vmap(layer, axes)(*arrays)
            both = axes if isinstance(axes, tuple) else (0, 0)
            split = [
                jax.device_put(a, NamedSharding(mesh, P(None if axis is None else "model")))
                for a, axis in zip(arrays, both, strict=True)
            ]
            for call in (jax.vmap(layer, axes), jax.jit(jax.vmap(layer, axes))):
                y = call(*split)
                np.testing.assert_array_equal(bits(y), bits(expected))
                assert jax.typeof(y).sharding.spec[0] == "model"


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_columns_that_are_split_explicitly_are_gathered_for_weights_that_are_not(rule):
    """As after a layer whose output channels are split, with nobody telling a partition."""
    mesh = mesh_of((1, 8), AxisType.Explicit)
    found, x = case()
    w = QuantizedMatrix(jnp.asarray(found.codes), jnp.asarray(found.scale))

    def both(x):
        y, pull = jax.vjp(functools.partial(int8_linear, w=w, outliers=rule), x)
        return y, pull(jnp.ones_like(y))[0]

    y, gradient = both(jnp.asarray(x))
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P(None, "model")))
        for run in (both, jax.jit(both)):
            other, other_gradient = run(split)
            np.testing.assert_array_equal(bits(other), bits(y))
            np.testing.assert_allclose(other_gradient, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_vmap_of_rows_that_are_split_explicitly_with_columns(rule):
    mesh = mesh_of((2, 4), AxisType.Explicit)
    found, x = case()
    x = x.reshape(4, M // 4, K)
    w = QuantizedMatrix(jnp.asarray(found.codes), jnp.asarray(found.scale))
    layer = functools.partial(int8_linear, outliers=rule)
    expected = jax.vmap(layer, (0, None))(jnp.asarray(x), w)
    with jax.set_mesh(mesh):
        codes = jax.device_put(w.codes, NamedSharding(mesh, P(None, "model")))
        held = QuantizedMatrix(codes, jax.device_put(w.scale, NamedSharding(mesh, P())))
        for spec in (P("data"), P("data", None, "model")):
            split = jax.device_put(x, NamedSharding(mesh, spec))
            for call in (jax.vmap(layer, (0, None)), jax.jit(jax.vmap(layer, (0, None)))):
                np.testing.assert_array_equal(bits(call(split, held)), bits(expected))


def test_a_given_partition_moves_weights_that_lie_elsewhere_on_explicit_axes():
    mesh = mesh_of((2, 4), AxisType.Explicit)
    found, x = case()
    w = QuantizedMatrix(jnp.asarray(found.codes), jnp.asarray(found.scale))
    expected = bits(int8_linear(jnp.asarray(x), w))
    for partition in (Partition(mesh, rows="data", n="model"), Partition(mesh, k="model")):
        y = int8_linear(jnp.asarray(x), w, partition=partition)
        np.testing.assert_array_equal(bits(y), expected)


def test_meshes_of_other_axes_are_refused():
    found, x = case()
    there = NamedSharding(mesh_of((2, 4)), P(None, "model"))
    other = NamedSharding(jax.make_mesh((8,), ("x",)), P(None, "x"))
    codes = jax.device_put(found.codes, there)
    w = QuantizedMatrix(codes, jnp.asarray(found.scale))
    with pytest.raises(ValueError, match="x: expected on the mesh of w, .* split over 'x'"):
        int8_linear(jax.device_put(x, other), w)


def test_a_mesh_of_explicit_and_automatic_axes():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    found, x = case()
    w = QuantizedMatrix(jnp.asarray(found.codes), jnp.asarray(found.scale))
    expected = bits(int8_linear(jnp.asarray(x), w))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        for codes, scale in [(P(), P()), (P("model"), P("model"))]:
            codes = jax.device_put(w.codes, NamedSharding(mesh, codes))
            held = QuantizedMatrix(codes, jax.device_put(w.scale, NamedSharding(mesh, scale)))
            for call in (int8_linear, jax.jit(int8_linear)):
                np.testing.assert_array_equal(bits(call(x, held)), expected)


def test_flax_layers_take_a_partition():
    one, x = case()
    partition = Partition(mesh_of((2, 2)), rows="data", k="model")
    x, codes, scale, bias = place(partition, x, one.codes, one.scale, one.bias)
    variables = {"params": {"bias": bias}, "quant": {"codes": codes, "scale": scale}}
    layer = Dense8bit(N, partition=partition)
    expected = reference.int8_linear(*map(np.asarray, (x, codes, scale, bias)), Threshold(6.0))
    np.testing.assert_array_equal(bits(jax.jit(layer.apply)(variables, x)), bits(expected))
    other = nnx.Dense8bit(K, N, partition=partition, rngs=Rngs(0))
    other.codes[...], other.scale[...], other.bias[...] = codes, scale, bias
    np.testing.assert_array_equal(bits(other(x)), bits(expected))


def test_bad_partitions_are_refused_in_one_line():
    mesh = mesh_of((2, 2))
    w = quantize(jnp.ones((6, 9)))
    with pytest.raises(ValueError, match=r"axes of the mesh \('data', 'model'\), got 'tensor'"):
        Partition(mesh, n="tensor")
    with pytest.raises(ValueError, match="'model' is used more than once"):
        Partition(mesh, k="model", n="model")
    with pytest.raises(TypeError, match="mesh must be a Mesh, got str"):
        Partition("model", n="model")
    with pytest.raises(TypeError, match="rows must be a name"):
        Partition(mesh, rows=0)
    with pytest.raises(ValueError, match=r"n is 9, which 2 devices \(model\)"):
        int8_linear(jnp.ones((4, 6)), w, partition=Partition(mesh, n="model"))
    with pytest.raises(ValueError, match="axis 0 of x is 3"):
        int8_linear(jnp.ones((3, 6)), w, partition=Partition(mesh, rows="data"))
    with pytest.raises(ValueError, match="rows has 1 entries for the 0 leading axes"):
        int8_linear(jnp.ones(6), w, partition=Partition(mesh, rows="data"))
    with pytest.raises(ValueError, match="reduction: expected 'exact' or 'fast'"):
        int8_linear(jnp.ones((4, 6)), w, reduction="sum")
    with pytest.raises(ValueError, match="'reference' runs on one device"):
        int8_linear(
            jnp.ones((4, 6)), w, implementation="reference", partition=Partition(mesh, rows="data")
        )
