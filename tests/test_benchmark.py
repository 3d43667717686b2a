"""Tests of what measures layers: the arithmetic of rounds, the groups, and that peers are optional."""

import itertools
import os
import sys

import numpy as np
import pytest

from jaxint8 import int8_linear
from jaxint8.evaluation.benchmark import growth as layer_growth
from jaxint8.evaluation.benchmark import layers, machine, peers, results, tables
from jaxint8.evaluation.benchmark.layers import Effort
from jaxint8.evaluation.benchmark.machine import Ceiling, Work
from jaxint8.evaluation.benchmark.timing import Statistic, Timed, interleave, ratios, settle

TINY = Effort(rounds=3, seconds=0.0005)
needs_kernels = pytest.mark.skipif(not machine.has_ceilings(), reason="no compiled kernels")


class Clock:
    """Seconds that pass only when something says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


# Rounds


def test_statistic_is_median_and_quartiles():
    assert Statistic.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Statistic(3.0, 2.0, 4.0)
    assert Statistic.of([1.0, 2.0]) == Statistic(1.5, 1.25, 1.75)
    assert Statistic.of([7.0]) == Statistic(7.0, 7.0, 7.0)


def test_ratio_is_the_median_of_ratios_not_the_ratio_of_medians():
    slow, fast = [2.0, 30.0, 4.0], [1.0, 10.0, 4.0]
    assert ratios(slow, fast).median == 2.0
    assert np.median(slow) / np.median(fast) == 1.0
    (pair,) = results.pairs({"a": fast, "b": slow}, [("a", "b"), ("a", "absent"), ("absent", "b")])
    assert (pair.name, pair.against, pair.times.median) == ("a", "b", 2.0)
    with pytest.raises(ValueError):
        ratios([1.0, 2.0], [1.0])


def test_timed_fills_the_stretch_and_does_not_count_the_first_call():
    clock, calls = Clock(), []

    def run(count):
        clock.pass_(0.001 * count + (5.0 if not calls else 0.0))  # the first compiles
        calls.append(count)

    timed = Timed(run, seconds=0.02, clock=clock)
    assert timed() == pytest.approx(0.001)
    assert calls[0] == 1 and calls[-1] == 20
    calls.clear()
    calls.append(0)
    assert timed() == pytest.approx(0.001)
    assert calls == [0, 5, 20]  # some to warm the caches


def test_timed_calls_a_slow_function_once():
    clock, calls = Clock(), []

    def run(count):
        calls.append(count)
        clock.pass_(3.0 * count)

    timed = Timed(run, seconds=0.02, clock=clock)
    assert [timed(), timed()] == [3.0, 3.0]
    assert calls == [1, 1, 1, 1]  # compile, calibrate, and one for each sample


def test_interleave_takes_every_round_of_everything_and_rotates():
    order, counters = [], {name: itertools.count() for name in "abc"}

    def sample(name):
        order.append(name)
        return name, next(counters[name])

    pauses = []
    samples = {name: lambda name=name: sample(name) for name in "abc"}
    taken = interleave(samples, 4, before=lambda: pauses.append(len(order)))
    assert taken == {name: [(name, i) for i in range(1, 5)] for name in "abc"}  # 0 is thrown away
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert pauses == list(range(3, 15))
    assert interleave({}, 3) == {}


@pytest.mark.parametrize(("spinning", "expected"), [(0.0, 1), (0.05, 3), (9.0, 12)])
def test_settle_waits_for_spinning_threads_but_not_for_ever(spinning, expected):
    clock, sleeps = Clock(), []

    def sleep(seconds):
        sleeps.append(seconds)
        clock.pass_(seconds)

    def used(tick=0.01):  # as the system counts the time of threads on other cores
        return min(clock.now, spinning) // tick * tick

    settle(sleep, used, clock)
    assert abs(len(sleeps) - expected) <= 1


# The machine


def test_ceiling_takes_the_longer_of_reading_and_multiplying():
    ceiling = Ceiling(bytes_per_s=10.0, multiplies_per_s=100.0)
    assert ceiling.seconds(Work(20, 100)) == 2.0 and ceiling.reading(Work(20, 100))
    assert ceiling.seconds(Work(20, 900)) == 9.0 and not ceiling.reading(Work(20, 900))


def test_a_line_is_held_against_the_best_ceiling():
    ceilings = [Ceiling(10.0, 5.0), Ceiling(2.0, 20.0)]
    line = results.line("a", [4.0, 8.0], per_call=3, unit="x", work=Work(20, 60), ceilings=ceilings)
    assert (line.bound, line.seconds.median, line.rate) == (3.0, 6.0, 0.5)
    assert line.share == Statistic.of([3 / 4, 3 / 8])
    assert results.line("a", [1.0], work=Work(1, 1)).share is None


@needs_kernels
def test_ceilings_are_measured():
    data = np.ones(1 << 20, np.int8)
    measured = machine.ceiling(data, threads=1, seconds=0.002)
    # Slower than any machine of this century, and faster than any there is.
    assert 1e8 < measured.bytes_per_s < 1e13 and 1e8 < measured.multiplies_per_s < 1e15
    assert machine.instruction()
    for threads, match in ((0, "threads: expected >= 1, got 0"), (-1, "got -1")):
        with pytest.raises(ValueError, match=match):
            machine._EXTENSION.measure_peak(threads, 0.0)
        with pytest.raises(ValueError, match=match):
            machine._EXTENSION.measure_bandwidth(data, threads, 0.0)
    with pytest.raises(ValueError, match="data: expected a contiguous buffer"):
        machine._EXTENSION.measure_bandwidth(data[::2], 1, 0.0)
    assert machine._EXTENSION.measure_bandwidth(data[:0], 2, 0.0) == 0.0


def test_ceilings_and_peers_are_optional(monkeypatch):
    monkeypatch.setattr(machine, "_EXTENSION", None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert not machine.has_ceilings() and machine.instruction() is None
    with pytest.raises(RuntimeError, match="compiled kernels"):
        machine.ceiling(np.ones(8, np.int8))
    assert peers.layers(np.ones((4, 8), np.int8), 0.1, 1) == {}
    assert peers.versions() == {}
    (group,) = layers.layer_groups((96, 40), [2], TINY)
    assert not set(group.engines()) & set(layers.OTHERS)
    assert group.times(layers.OURS, layers.OTHERS[0]) is None
    assert group.bound is None and group.machine == {}
    assert all(line.share is None for line in group.lines)
    table = tables.layer_table([group])
    bound = [table.header.index(name) for name in ("of\nbound", "bound\nby")]
    assert [table.rows[0][i] for i in bound] == [tables.NONE] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what others do")
def test_others_are_told_from_ourselves():
    others = machine.Others()
    first = others._read()
    sum(i * i for i in range(1_000_000))
    assert others._read()[2] >= first[2]
    assert 0.0 <= others.cores() <= os.cpu_count() + 0.5
    assert machine.Others(ours=[os.getpid()]).cores() is not None
    assert machine.Others(ours=[2**22 + 1]).cores() is None  # no such process


# Layers


def test_activations_have_outliers_as_real_ones_do():
    x = layers.activations(512, 4096)
    assert x.dtype == np.float32 and x.shape == (512, 4096)
    shares = layers.outlier_shares(x)
    assert shares["off"] == {"values": 0.0, "columns": 0.0}
    assert 3e-4 < shares["relative"]["values"] < 2e-3
    assert 0.02 < shares["relative"]["columns"] < 0.2
    assert 0.02 < shares["column"]["values"] < 0.2
    assert shares["topk"]["values"] == 8 / 4096


@pytest.fixture(scope="module")
def weights():
    return layers.Weights((96, 40))


@pytest.mark.parametrize("name", ["ours", "xla_int8", "float32", "bfloat16"])
def test_a_program_computes_the_layer_as_often_as_asked(weights, name):
    """An element of the state that is zero takes up a trace of every result."""
    x = layers.activations(3, 96)
    x[0, 0] = 0
    rule = layers.RULES["relative"]
    if name == "ours":
        program = layers.ours(weights, x, rule)
        y = int8_linear(x, weights.quantized, outliers=rule)
    elif name == "xla_int8":
        program = layers.xla_int8(weights, x, rule)
        y = int8_linear(x, weights.quantized, outliers=rule)
    else:
        program = layers.xla_float(weights, x, name)
        y = x @ weights.quantized.dequantize()
    program(3)
    program(1)
    kept = program._state[0] if isinstance(program._state, tuple) else program._state
    kept = np.asarray(kept, np.float32).ravel()
    tolerance = 0.05 if name == "bfloat16" else 1e-4
    assert 1e30 * kept[0] == pytest.approx(4 * float(y[0, 0]), rel=tolerance)
    given = np.zeros(40) if name == "ours" else x.astype(name if "16" in name else x.dtype)
    np.testing.assert_array_equal(kept[1:], given.ravel()[1:])
    if name == "xla_int8":
        np.testing.assert_array_equal(program._state[1].codes, weights.codes)
    layers.called(weights, x, rule)(2)


@pytest.fixture(scope="module")
def layer_group():
    (group,) = layers.layer_groups((96, 40), [2], TINY, with_peers=False)
    return group


def test_layer_group_has_every_engine_and_comparison(layer_group):
    ours = [f"jaxint8 {rule}" for rule in layers.RULES]
    assert layer_group.engines() == [*ours, layers.CALLED, *layers.XLA]
    assert {key: layer_group.what[key] for key in "knm"} == {"k": 96, "n": 40, "m": 2}
    for line in layer_group.lines:
        assert len(line.samples) == TINY.rounds and all(s > 0 for s in line.samples)
        assert line.rate == pytest.approx(2e-9 * 2 * 96 * 40 / line.seconds.median)
    pairs = {(pair.name, pair.against): pair.times for pair in layer_group.pairs}
    assert set(pairs) == {
        *((f"jaxint8 {rule}", layers.OFF) for rule in ("relative", "topk", "column")),
        *((layers.OURS, name) for name in layers.XLA),
    }
    off, topk = layer_group.line(layers.OFF), layer_group.line("jaxint8 topk")
    by_round = [a / b for a, b in zip(off.samples, topk.samples, strict=True)]
    assert pairs["jaxint8 topk", layers.OFF].median == pytest.approx(sorted(by_round)[1])


@needs_kernels
def test_layer_group_stands_beside_its_bound(layer_group):
    assert layer_group.bound in ("read", "multiply")
    assert layer_group.machine["instruction"] == machine.instruction()
    for line in layer_group.lines:
        shares = [line.bound / seconds for seconds in line.samples]
        assert line.share == Statistic.of(shares)


def test_rows_axis_is_dense_where_tiles_end():
    axis = layer_growth.rows_axis(4096)
    assert axis == sorted(set(axis)) and axis[0] == 1 and axis[-1] == 4096
    assert {1, 2, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129} <= set(axis)
    assert layer_growth.rows_axis(3) == [1, 2, 3]


def test_growth_of_rows_has_a_step_between_neighbours():
    group = layer_growth.rows_group((64, 32), [1, 2, 4], TINY, with_peers=False)
    assert [line.at for line in group.lines if line.name == layers.OFF] == [
        {"m": 1},
        {"m": 2},
        {"m": 4},
    ]
    steps = [step for step in group.steps if step.name == layers.OURS]
    assert [(step.before, step.after) for step in steps] == [(1, 2), (2, 4)]
    one, two = (group.line(layers.OURS, m=m).samples for m in (1, 2))
    assert steps[0].growth == ratios(two, one)


@pytest.mark.parametrize(
    ("growth", "cliff"), [(2.0, False), (2.4, False), (2.6, True), (1.0, False), (0.7, True)]
)
def test_a_cliff_is_a_jump_or_a_fall_beyond_noise(growth, cliff):
    (step,) = results.steps("a", {8: [1.0] * 3, 16: [growth] * 3})
    assert step.cliff == cliff
    unsure = results.steps("a", {8: [1.0] * 4, 16: [growth, growth, 2.0, 2.0]})
    assert not unsure[0].cliff
    text = tables.cliffs([step])
    assert text.startswith(f"cliffs: {int(cliff)} of 1 steps") and ("8 -> 16" in text) == cliff


# Other engines


@pytest.mark.parametrize("name", layers.OTHERS)
def test_peers_compute_the_layer(name):
    random = np.random.default_rng(0)
    codes = random.integers(-127, 128, (48, 64), np.int8)
    x = random.standard_normal((5, 64), np.float32)
    layer = peers.layers(codes, 0.01, 1).get(name)
    if layer is None:
        pytest.skip(f"{name} is not installed")
    # Half a step of the uint8 activations in each of k terms, at most.
    step = (x.max() - x.min()) / 255
    bound = 1e-4 if "float" in name else step * 0.01 * np.abs(codes.astype(np.int32)).sum(1).max()
    run = layer(x)
    for _ in range(2):
        np.testing.assert_allclose(np.asarray(run()), 0.01 * x @ codes.T, atol=bound)
