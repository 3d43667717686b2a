"""A token's attention to an int8 cache as a CPU kernel: what it stores and what it gives, to the bit.

`by_chunks` is what the kernel promises (ffi/cpu/attend.h) in NumPy, one rounding after the other; how far that may be
from `reference.attend` is derived at `bound`. Every other instruction set is compared in ffi/cpu/battery.cc.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxint8 import TopK, kernels, reference
from jaxint8.attend import Token, attend, kernel_platforms
from jaxint8.vectors import Vectors

pytestmark = pytest.mark.skipif("cpu" not in kernels.platforms(), reason="no compiled CPU kernels")

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
CHUNK, MOST = 256, 65535
F = np.float32


@dataclasses.dataclass
class Case:
    """What goes into a call, as NumPy arrays."""

    qkv: np.ndarray
    rope: tuple[np.ndarray, np.ndarray] | None
    start: np.ndarray
    slot: int
    keys: tuple[np.ndarray, np.ndarray]
    values: tuple[np.ndarray, np.ndarray]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Rows, heads, key-value heads, dimensions of a head, slots."""
        b, kv_heads, d, slots = self.values[0].shape
        return b, self.qkv.shape[1] // d - 2 * kv_heads, kv_heads, d, slots

    @property
    def seen(self) -> np.ndarray:
        """bool[b, slots]."""
        slots = np.arange(self.sizes[-1])
        return (slots >= self.start[:, None]) & (slots <= self.slot)

    def rows(self, rows: slice | list[int]) -> "Case":
        """Some rows of the batch."""
        return Case(
            self.qkv[rows],
            None if self.rope is None else (self.rope[0][rows], self.rope[1][rows]),
            self.start[rows],
            self.slot,
            (self.keys[0][rows], self.keys[1][rows]),
            (self.values[0][rows], self.values[1][rows]),
        )

    def run(self) -> tuple[np.ndarray, tuple, tuple]:
        """The kernel's results."""
        token = Token(
            jnp.asarray(self.qkv),
            None if self.rope is None else (jnp.asarray(self.rope[0]), jnp.asarray(self.rope[1])),
            jnp.asarray(self.start),
            jnp.asarray(self.slot, jnp.int32),
        )
        keys, values = (
            Vectors(*(jnp.asarray(a) for a in held)) for held in (self.keys, self.values)
        )
        y, keys, values = jax.jit(attend)(token, keys, values)
        keys, values = ((np.asarray(v.codes), np.asarray(v.scale)) for v in (keys, values))
        return np.asarray(y), keys, values


def make(
    seed: int,
    *,
    b: int = 3,
    kv_heads: int = 2,
    group: int = 3,
    d: int = 64,
    slots: int = 608,
    slot: int = 550,
    dtype: type = np.float32,
    rope: bool = True,
    steep: float = 1.0,
) -> Case:
    """A cache whose hidden slots hold NaN scales, and rows that begin at 0, in the middle, near the slot and at it."""
    rng = np.random.default_rng(seed)
    qkv = rng.normal(size=(b, kv_heads * (group + 2), d))
    qkv[..., rng.integers(d, size=2)] *= 12
    start = np.resize([0, slot // 2, max(0, slot - 9), slot], b).astype(np.int32)
    angle = rng.uniform(0, 6, (b, d // 2)).astype(np.float32)
    shape = (b, kv_heads, slots, d)
    keys = rng.integers(-127, 128, shape).astype(np.int8)
    values = rng.integers(-127, 128, (b, kv_heads, d, slots)).astype(np.int8)
    key_scale, value_scale = (
        rng.uniform(0.2, 1, (2, *shape[:3])) * np.array([steep * 8 / d, 0.02]).reshape(2, 1, 1, 1)
    ).astype(np.float32)
    case = Case(
        qkv.reshape(b, -1).astype(dtype),
        (np.cos(angle), np.sin(angle)) if rope else None,
        start,
        slot,
        (keys, key_scale),
        (values, value_scale),
    )
    for scale in (key_scale, value_scale):
        scale[np.broadcast_to(~case.seen[:, None], scale.shape)] = np.nan
    return case


def stored(case: Case) -> tuple[np.ndarray, tuple, tuple]:
    """The query [b, heads, d], turned, and keys and values with the token's."""
    b, heads, kv_heads, d, _ = case.sizes
    x = case.qkv.reshape(b, -1, d)
    turned, value = x[:, : heads + kv_heads], x[:, heads + kv_heads :]
    if case.rope is not None:
        cosine, sine = (a[:, None] for a in case.rope)
        first, second = np.split(turned.astype(np.float32), 2, axis=-1)
        with np.errstate(invalid="ignore"):
            both = (first * cosine - second * sine, second * cosine + first * sine)
            turned = np.concatenate(both, axis=-1).astype(x.dtype)
    keys, values = (tuple(a.copy() for a in held) for held in (case.keys, case.values))
    with np.errstate(invalid="ignore"):
        key = reference.spread(turned[:, heads:])
    for held, vectors, at in (
        (keys, key, np.s_[:, :, case.slot]),
        (values, value, np.s_[..., case.slot]),
    ):
        codes, _, scale = reference.quantize_rows(vectors.reshape(-1, d), None)
        held[0][at] = codes.reshape(b, kv_heads, d)
        held[1][:, :, case.slot] = scale.reshape(b, kv_heads)
    return turned[:, :heads], keys, values


def exponential(x: np.ndarray) -> np.ndarray:
    """`Exp` of ffi/cpu/prologue.h for x <= 0, 0 below -87: Cephes' expf."""
    x = x.astype(np.float32)
    inside = np.where(x >= F(-87), x, F(0))
    power = np.rint(inside * F(1.44269504088896341))
    r = (inside - power * F(0.693359375)) - power * F(-2.12194440e-4)
    p = np.full_like(r, F(1.9875691500e-4))
    for coefficient in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        p = p * r + F(coefficient)
    y = (p * (r * r) + r) + F(1)
    bits = y.view(np.int32) + (power.astype(np.int32) << 23)
    return np.where(x >= F(-87), bits.view(np.float32), F(0))


def query_codes(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers of 15 bits int64[b, heads, d] of a spread query, and their scale: a row that is all outliers."""
    d = query.shape[-1]
    with np.errstate(invalid="ignore"):
        lo, hi, scale = reference.quantize_rows(reference.spread(query).reshape(-1, d), TopK(d))
    codes = lo + 128 * hi.astype(np.int64)
    return codes.reshape(query.shape), scale.reshape(query.shape[:-1])


def by_chunks(case: Case, query: np.ndarray, keys: tuple, values: tuple) -> np.ndarray:
    """What the kernel gives, to the bit but for what bits a NaN has: qkv.dtype[b, heads * d]."""
    b, heads, kv_heads, d, slots = case.sizes
    codes, scale = query_codes(query)
    unit = F(d**-0.5 / d)
    y = np.zeros((b, heads, d), np.float32)
    for row, head in np.ndindex(b, heads):
        kv = head // (heads // kv_heads)
        factor = scale[row, head] * unit
        shares = []
        for first in range(0, slots, CHUNK):
            part = np.s_[first : first + CHUNK]
            seen = case.seen[row, part]
            if not seen.any():
                continue
            sums = keys[0][row, kv, part].astype(np.int64) @ codes[row, head]
            with np.errstate(all="ignore"):
                score = (sums.astype(np.float32) * factor) * keys[1][row, kv, part]
                most = np.max(score[seen])
                e = np.where(seen, exponential(score - most), F(0))
                weight = np.where(seen, e * values[1][row, kv, part], F(0))
            if not (np.isfinite(score[seen]).all() and np.isfinite(weight).all()):
                shares.append((F(-np.inf), F(np.nan), np.zeros(d, np.float32)))
                continue
            lanes = np.zeros(16, np.float32)
            for sixteen in e.reshape(-1, 16):
                lanes = lanes + sixteen
            while lanes.size > 1:
                lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
            largest = weight.max()
            inverse, back = F(0), F(0)
            if largest >= F(2.0**-100):
                inverse, back = F(MOST) / largest, largest / F(MOST)
            shares_of = np.minimum(np.rint(weight * inverse), MOST).astype(np.int64)
            sums = values[0][row, kv][:, part].astype(np.int64) @ shares_of
            shares.append((most, lanes[0], sums.astype(np.float32) * back))
        most = max(share[0] for share in shares)
        total, sums = F(0), np.zeros(d, np.float32)
        with np.errstate(invalid="ignore"):
            for own, total_of, sums_of in shares:
                factor = exponential(np.array([own - most]))[0]
                total = total + factor * total_of
                sums = sums + factor * sums_of
            y[row, head] = sums / total
    return y.reshape(b, -1).astype(case.qkv.dtype)


def bound(case: Case, query: np.ndarray, keys: tuple, values: tuple) -> np.ndarray:
    """How far the kernel may be from `reference.attend`, before y is rounded to its dtype: float64[b, heads, d].

    With u = 2^-24. A query is off by half a step of 15 bits (and what the rounding of x / scale adds, below 0.001 of
    a step), so the score of slot s by at most 0.501 * query_scale * d^-1.5 * key_scale[s] * sum |key codes|, and five
    roundings more of itself. Its distance to the largest score is rounded on the way into an exponential, twice, in
    the chunk and where chunks are joined: u times that distance in all. Each of the two exponentials is within 2^-22
    (held by a test below) or nothing below exp(-87). Sums of exponentials are 20 additions deep in a chunk, and one for
    each chunk; some products more. Let eta be the sum of all that, relatively: then what each slot contributes is right
    up to exp(2 * eta), numerator and denominator, and so y up to (exp(2 * eta) - 1) * sum of share * |value|. What is
    lost by 16 bits for weights is half a step, the largest weight of the chunk over 65535, for each |value code|.
    """
    _, heads, kv_heads, d, slots = case.sizes
    u, group = 2.0**-24, heads // kv_heads
    _, scale = query_codes(query)
    repeat = lambda a: np.repeat(a.astype(np.float64), group, axis=1)  # noqa: E731
    seen = case.seen[:, None]
    key_scale, value_scale = (np.where(seen, repeat(a), 0) for a in (keys[1], values[1]))
    key, value = repeat(keys[0]), repeat(values[0])
    score = np.einsum("bhd,bhsd->bhs", reference.spread(query).astype(np.float64), key)
    score = np.where(seen, score * key_scale * d**-1.5, -np.inf)
    most = score.max(axis=-1, keepdims=True)
    share = np.exp(score - most)
    share /= share.sum(axis=-1, keepdims=True)
    chunks = -(-slots // CHUNK)
    off = 0.501 * scale[..., None] * d**-1.5 * key_scale * np.abs(key).sum(axis=-1)
    off += 5.01 * u * np.abs(np.where(seen, score, 0)) + u * np.where(seen, most - score, 0)
    # Slots whose exponentials vanish in both, whatever their scores.
    off = np.where(score - most > -80, off, 0)
    eta = off.max(axis=-1, keepdims=True) + 2 * 2.0**-22 + (30 + chunks) * u
    weight = share * value_scale
    total = np.expm1(2 * eta) * np.einsum("bhs,bhds->bhd", weight, np.abs(value))
    for first in range(0, slots, CHUNK):
        part = np.s_[..., first : first + CHUNK]
        step = weight[part].max(axis=-1, keepdims=True) / MOST
        total += np.exp(2 * eta) * 0.51 * step * np.abs(value[part]).sum(axis=-1)
    return total + slots * 127 * (np.exp(-80) * value_scale.max() + 2.0**-100)


def check(case: Case) -> np.ndarray:
    """Compares a call with the oracles; returns y[b, heads, d]."""
    query, keys, values = stored(case)
    y, new_keys, new_values = case.run()
    for found, wanted in zip((*new_keys, *new_values), (*keys, *values), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert y.dtype == case.qkv.dtype
    # NumPy knows no NaN of bfloat16.
    wanted = by_chunks(case, query, keys, values).astype(np.float32)
    np.testing.assert_array_equal(y.astype(np.float32), wanted)
    return y.reshape(query.shape)


def check_bound(case: Case) -> None:
    """The same, and y against the law."""
    y = check(case).astype(np.float64)
    query, keys, values = stored(case)
    wanted = reference.attend(query, keys, values, case.seen)
    assert np.isfinite(wanted).all()
    finfo = ml_dtypes.finfo(case.qkv.dtype)
    most = bound(case, query, keys, values)
    rounding = (np.abs(wanted) + most) * float(finfo.eps) / 2 + float(finfo.smallest_subnormal)
    assert (np.abs(y - wanted) <= most + rounding).all()
    # A bound that says something: far below what is there.
    assert np.mean(most) < 0.05 * np.mean(np.abs(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("d", [64, 128])
def test_stores_and_attends(d: int, group: int, dtype: type) -> None:
    check_bound(make(d + group, d=d, group=group, dtype=dtype, rope=group != 4))


@pytest.mark.parametrize(
    ("slots", "slot"),
    [(32, 0), (32, 31), (64, 15), (96, 95), (256, 255), (288, 256), (544, 511), (1056, 1055)],
)
@pytest.mark.parametrize("d", [64, 128])
def test_first_and_last_slots(d: int, slots: int, slot: int) -> None:
    check_bound(make(slot, b=5, d=d, slots=slots, slot=slot))


@pytest.mark.parametrize("steep", [0.01, 30.0])
def test_shares_that_are_equal_and_that_vanish(steep: float) -> None:
    check(make(7, steep=steep))


def test_exponentials_are_as_close_as_the_bound_takes_them() -> None:
    x = -np.linspace(0, 87, 2_000_003).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(exponential(x) - exact) / exact) < 2.0**-22
    assert exponential(np.zeros(1, np.float32))[0] == 1


def test_a_row_depends_on_itself_alone() -> None:
    case = make(3, b=6)
    y, _, _ = case.run()
    for rows in ([0], [3, 1], [5, 4, 3, 2]):
        np.testing.assert_array_equal(case.rows(rows).run()[0], y[rows])


def test_hidden_slots_do_not_matter() -> None:
    case = make(4)
    y, _, _ = case.run()
    hidden = np.broadcast_to(~case.seen[:, None], case.keys[1].shape)
    rng = np.random.default_rng(0)
    for codes, scale in (case.keys, case.values):
        at = hidden[..., None] if codes.shape[-1] == case.sizes[3] else hidden[:, :, None]
        codes[np.broadcast_to(at, codes.shape)] = -128
        scale[hidden] = rng.choice([np.inf, -1.0, 0.0, 3e38], hidden.sum())
    np.testing.assert_array_equal(case.run()[0], y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows_where_it_is_seen(dtype: type) -> None:
    case = make(5, b=4, kv_heads=2, group=2, dtype=dtype)
    case.start[:] = [0, 0, 0, 300]
    d = case.sizes[3]
    x = case.qkv.reshape(4, -1, d)  # four heads of q, two of k, two of v
    for scale in (case.keys[1], case.values[1]):
        scale[np.isnan(scale)] = 1e-3
    x[0, 1, 3] = np.nan
    x[1, 4, 9] = np.inf
    x[2, 7, 0] = -np.inf
    case.values[1][3, 0, 299] = np.nan
    case.keys[1][3, 1, 300] = np.nan
    lost = np.isnan(check(case)).all(axis=-1)
    assert np.isnan(check(case)).any(axis=-1).tolist() == lost.tolist()
    wanted = np.zeros((4, 4), bool)
    wanted[0, 1] = wanted[1, :2] = wanted[2, 2:] = wanted[3, 2:] = True
    assert lost.tolist() == wanted.tolist()


def test_zeros_and_the_smallest_numbers() -> None:
    case = make(6, b=3, slot=0, slots=32)
    case.qkv[0] = 0
    case.qkv[1] *= 1e-38
    y = check(case)
    assert not y[0].any()


def test_slot_and_start_out_of_range_are_the_nearest() -> None:
    case = make(8, b=2, slots=64, slot=63)
    y, keys, _ = case.run()
    beyond = dataclasses.replace(case, slot=70, start=case.start.copy())
    np.testing.assert_array_equal(beyond.run()[0], y)
    np.testing.assert_array_equal(beyond.run()[1][0], keys[0])
    beyond.start[:] = [-5, 900]
    case.start[:] = [0, 63]
    np.testing.assert_array_equal(beyond.run()[0], case.run()[0])


def test_one_thread_gives_the_same_bits() -> None:
    case = make(9, b=4, group=8, d=128, slots=1056, slot=1040)
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import sys; sys.path.insert(0, sys.argv[1]); import test_attend\n"
        "case = test_attend.make(9, b=4, group=8, d=128, slots=1056, slot=1040)\n"
        "sys.stdout.buffer.write(case.run()[0].tobytes())"
    )
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("threads cannot be bound here")
    here = str(pathlib.Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", script, here], capture_output=True, check=True)
    assert done.stdout == case.run()[0].tobytes()


def vectors_of(case: Case) -> tuple[Vectors, Vectors]:
    """The cache as arrays of JAX's own, as large as ones that it does not share with NumPy."""
    keys, values = (
        Vectors(*(jnp.array(a, copy=True) for a in h)) for h in (case.keys, case.values)
    )
    return keys, values


def test_a_cache_that_is_still_needed_is_left_alone() -> None:
    case = make(10)
    keys, values = vectors_of(case)
    token = Token(jnp.asarray(case.qkv), None, jnp.asarray(case.start), jnp.asarray(case.slot))
    _, new_keys, _ = jax.jit(attend)(token, keys, values)
    held = (keys.codes, keys.scale, values.codes, values.scale)
    for found, wanted in zip(held, (*case.keys, *case.values), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert (np.asarray(new_keys.codes) != case.keys[0]).any()


def test_a_cache_that_is_given_away_is_updated_in_place() -> None:
    case = make(11, b=2, slots=320, slot=250)
    case.start[:] = 0
    keys, values = vectors_of(case)
    qkv = jnp.asarray(case.qkv)

    def steps(qkv: jax.Array, keys: Vectors, values: Vectors) -> tuple:
        def step(i: jax.Array, carry: tuple) -> tuple:
            _, keys, values = carry
            token = Token(qkv * (1 + i), None, jnp.asarray(case.start), case.slot + i)
            return attend(token, keys, values)

        y = jnp.zeros((2, case.sizes[1] * case.sizes[3]), qkv.dtype)
        return jax.lax.fori_loop(0, 8, step, (y, keys, values))

    run = jax.jit(steps, donate_argnums=(1, 2))
    before = [a.unsafe_buffer_pointer() for a in jax.tree.leaves((keys, values))]
    y, keys, values = run(qkv, keys, values)
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves((keys, values))] == before
    program = run.lower(qkv, keys, values).compile().as_text() or ""
    big = f"s8[2,2,{case.sizes[4]},{case.sizes[3]}]"
    assert not [line for line in program.splitlines() if " copy(" in line and big in line]
    wanted = np.zeros(0)
    for i in range(8):
        at = dataclasses.replace(case, qkv=case.qkv * F(1 + i), slot=case.slot + i, rope=None)
        wanted, case.keys, case.values = at.run()
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(keys.codes, case.keys[0])
    np.testing.assert_array_equal(values.codes, case.values[0])


def test_shapes_without_a_kernel() -> None:
    def platforms(d: int, group: int, slots: int) -> tuple[str, ...]:
        codes = jnp.zeros((1, 2, d, slots), jnp.int8)
        return kernel_platforms(2 * (group + 2) * d, Vectors(codes, jnp.zeros((1, 2, slots))))

    assert "cpu" in platforms(64, 8, 96)
    assert platforms(96, 1, 96) == platforms(64, 9, 96) == platforms(64, 1, 80) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (2, 65)}, "qkv: expected"),
        ({0: (2, 11 * 2 * 64)}, "qkv: expected"),
        ({0: (2, 2 * 2 * 64)}, "qkv: expected"),
        ({1: (2, 64)}, "cosine, sine: expected"),
        ({2: (0, 0)}, "cosine, sine: expected"),
        ({3: (3,)}, "start, slot: expected"),
        ({4: (2,)}, "start, slot: expected"),
        ({5: (2, 2, 64, 96)}, "cache: expected int8"),
        ({6: (2, 2, 95)}, "cache: expected int8"),
        ({7: (2, 2, 32, 96)}, "value_codes: expected"),
        ({7: (2, 2, 64, 80)}, "value_codes: expected"),
        ({8: (2, 1, 96)}, "cache: expected int8"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[int, tuple], message: str) -> None:
    shapes = [(2, 2 * 5 * 64), (2, 32), (2, 32), (2,), (1,), (2, 2, 96, 64), (2, 2, 96)]
    shapes += [(2, 2, 64, 96), (2, 2, 96)]
    types = [F, F, F, np.int32, np.int32, np.int8, F, np.int8, F]
    for index, shape in change.items():
        shapes[index] = shape
    operands = [jnp.zeros(s, t) for s, t in zip(shapes, types, strict=True)]
    results = [jax.ShapeDtypeStruct((2, 2 * 3 * 64), jnp.float32)]
    results += [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands[5:]]

    def call(*operands: jax.Array) -> object:
        aliases = {5 + i: 1 + i for i in range(4)}
        return kernels.call_target("jaxint8_attend", results, operands, {}, aliases)

    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(call)(*operands))
