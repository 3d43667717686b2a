"""Generation: a prompt is run once, then a loop inside one jitted call makes token after token.

The surprising fact is what is *not* compiled anew: prompts are padded on the left to a few lengths,
caches have few capacities, and temperature, k, p, seed and the number of steps are
run-time values. So a new prompt rarely costs a compilation, and a step never.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8.models.cache import KVCache, capacity_for, grow_cache, init_cache, rounded_length
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.context import around
from jaxint8.models.decoder import Params, forward, with_wide_norms
from jaxint8.models.placement import Placement, check
from jaxint8.models.sampling import Draw, Sampling, next_tokens, row_keys

# Steps that one call of the jitted loop makes at most: enough that calling it costs nothing beside
# them, and a bound on what is computed after the last row ended.
CHUNK = 256
# Steps between two hand-outs of a stream where nothing else is asked for: a fifth of a second at forty tokens a second.
# On an accelerator a call costs as much as a step or more (4 ms, an 8B model in int8 on an H200), and steps are fast.
PIECE, PIECE_ON_ACCELERATOR = 8, 32
SMALLEST_PADDED_PROMPT = 32
# An accelerator waits while the host is asked whether the loop goes on, 5 % of a step of an 8B model. So it is asked
# after so many steps; those of a turn that are not wanted any more change nothing. Divides CHUNK and every capacity.
BURST = 4
# Kernels of a CUDA graph that do not need each other may run side by side: rotating queries and storing keys and
# values, which take 1 to 2 % of an int8 step of an 8B model one by one.
ACCELERATOR_OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What one step hands to the next."""

    cache: KVCache
    # int32[b]: last token of each row, not yet in the cache.
    token: jax.Array
    # bool[b]: rows that have ended.
    done: jax.Array
    # int32[]: tokens drawn so far.
    step: jax.Array
    # key[b]
    keys: jax.Array


_STATIC = ("config", "quantization", "placement")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _prefill(
    params: Params,
    tokens: jax.Array,
    start: jax.Array,
    draw: Draw,
    keys: jax.Array,
    *,
    config: DecoderConfig,
    quantization: QuantizationConfig | None,
    placement: Placement | None = None,
) -> _State:
    """Runs left-padded prompts int32[b, t] and draws the first token of each row.

    The cache holds t slots, all of them in use, so that this program serves any number of new tokens.
    With a placement, keys are the data of keys: arrays of plain numbers go from host to any mesh.
    """
    keys = keys if placement is None else jax.random.wrap_key_data(keys)
    held = config if placement is None else placement.cache_config
    cache = init_cache(held, tokens.shape[1], start, params["embedding"].dtype, quantization)
    how = {"config": config, "quantization": quantization, "placement": placement}
    step = jnp.zeros((), jnp.int32)
    token, cache = _next(params, tokens, cache, draw, keys, step, **how)
    return _State(cache, token, _is_end(token, config), step + jnp.int32(1), keys)


def _decode(params: Params, *args: Any, **how: Any) -> tuple[_State, jax.Array]:
    """`_steps` compiled for where the parameters lie, which takes the state over."""
    return _compiled_steps(_platform(params) != "cpu")(params, *args, **how)


@functools.cache
def _compiled_steps(on_accelerator: bool) -> Any:
    """`_steps` under jit, on accelerators with `ACCELERATOR_OPTIONS` if this version of XLA knows them."""
    options = ACCELERATOR_OPTIONS
    if on_accelerator:
        try:
            jax.jit(lambda: jnp.int32(0), compiler_options=options).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            on_accelerator = False
    return jax.jit(
        _steps,
        static_argnames=(*_STATIC, "burst"),
        donate_argnames="state",
        compiler_options=options if on_accelerator else None,
    )


def _steps(
    params: Params,
    state: _State,
    steps: jax.Array,
    draw: Draw,
    *,
    config: DecoderConfig,
    quantization: QuantizationConfig | None,
    placement: Placement | None = None,
    burst: int = 1,
) -> tuple[_State, jax.Array]:
    """Makes up to ``steps`` (at most CHUNK) tokens more; stops early once every row has ended.

    With a burst that does not divide ``steps`` the cache must have room for one token more, or never
    be used again.

    Returns:
        The state after them, and the tokens int32[b, CHUNK or a few more]; the first ``state.step``
        minus its old value columns are filled. What follows a row's end token has no meaning.

    """
    first = state.step
    how = {"config": config, "quantization": quantization, "placement": placement}

    def going(state: _State) -> jax.Array:
        return (state.step - first < steps) & ~jnp.all(state.done)

    def one(carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
        state, made = carry
        token, cache = _next(
            params, state.token[:, None], state.cache, draw, state.keys, state.step, **how
        )
        made = jax.lax.dynamic_update_slice_in_dim(made, token[:, None], state.step - first, 1)
        done = state.done | _is_end(token, config)
        step = state.step + jnp.int32(1)
        return _State(cache, token, done, step, state.keys), made

    def one_if_going(_: int, carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
        before = carry[0]
        after, made = one(carry)
        goes = going(before)
        # What was written beyond the end, into the cache and here, is written over or never read.
        length = jnp.where(goes, after.cache.length, before.cache.length)
        return dataclasses.replace(
            after,
            cache=dataclasses.replace(after.cache, length=length),
            token=jnp.where(goes, after.token, before.token),
            done=jnp.where(goes, after.done, before.done),
            step=jnp.where(goes, after.step, before.step),
        ), made

    def turn(carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
        return one(carry) if burst == 1 else jax.lax.fori_loop(0, burst, one_if_going, carry)

    params = with_wide_norms(params)
    made = jnp.zeros((state.token.shape[0], CHUNK + burst - 1), jnp.int32)
    return jax.lax.while_loop(lambda carry: going(carry[0]), turn, (state, made))


def _next(
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    draw: Draw,
    keys: jax.Array,
    step: jax.Array,
    *,
    config: DecoderConfig,
    quantization: QuantizationConfig | None,
    placement: Placement | None,
) -> tuple[jax.Array, KVCache]:
    """The token int32[b] that follows int32[b, t], and the cache that holds those."""
    greedy = draw.temperature is None
    made, cache = forward(
        config,
        params,
        tokens,
        cache,
        quantization=quantization,
        placement=placement,
        last_only=True,
        greedy=greedy,
    )
    token = made if greedy else next_tokens(made[:, 0], draw, keys, step)
    return token if placement is None else placement.everywhere(token), cache


def steps_of_a_turn(params: Params, chunk: int) -> int:
    """Returns the ``burst`` of `_steps` for parameters where they lie, making ``chunk`` steps a call."""
    return 1 if _platform(params) == "cpu" or chunk % BURST else BURST


def steps_of_a_piece(params: Params) -> int:
    """Returns the ``chunk`` of `stream_tokens` where nobody asks for one."""
    return PIECE if _platform(params) == "cpu" else PIECE_ON_ACCELERATOR


def _platform(params: Params) -> str:
    table = params["embedding"]
    on_device = isinstance(table, jax.Array)
    return next(iter(table.devices())).platform if on_device else jax.default_backend()


@functools.partial(jax.jit, static_argnames="capacity")
def _grow(state: _State, *, capacity: int) -> _State:
    return dataclasses.replace(state, cache=grow_cache(state.cache, capacity))


def _is_end(token: jax.Array, config: DecoderConfig) -> jax.Array:
    end = jnp.asarray(config.end_tokens, jnp.int32)
    return jnp.any(token[:, None] == end[None, :], axis=-1)


def padded_length(length: int) -> int:
    """Returns the length that a prompt is padded to."""
    return rounded_length(length, SMALLEST_PADDED_PROMPT)


def stream_tokens(
    config: DecoderConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    quantization: QuantizationConfig | None = None,
    placement: Placement | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    chunk: int | None = None,
) -> Iterator[list[list[int]]]:
    """Generates, handing out what each row has gained every few steps.

    Args:
        config: the architecture.
        params: its parameters, float or int8.
        prompts: token ids of each row; lengths may differ.
        max_new_tokens: most tokens to add to a row.
        quantization: how int8 weights are carried out.
        placement: where the parameters lie on a mesh; None on one device.
        sampling: greedy by default.
        seed: of the rows' keys, 0 to 2**64 - 1.
        chunk: steps between two hand-outs, 1 to CHUNK; None: PIECE on a CPU, PIECE_ON_ACCELERATOR elsewhere.

    Yields:
        For each row the tokens since the last time; its end token is not among them, and after it
        the lists are empty.

    Raises:
        ValueError, TypeError: an argument, or a prompt, that cannot be; one line that names it.

    """
    prompts = [list(prompt) for prompt in prompts]
    chunk = _integer("chunk", steps_of_a_piece(params) if chunk is None else chunk)
    max_new_tokens, seed = _integer("max_new_tokens", max_new_tokens), _integer("seed", seed)
    _check(config, prompts, max_new_tokens, chunk, seed)
    check(params, placement)
    if not prompts or max_new_tokens == 0:
        return
    tokens, start = _left_pad(prompts)
    total = tokens.shape[1] + max_new_tokens
    how: dict[str, Any] = {
        "config": config,
        "quantization": quantization,
        "placement": placement,
    }
    with around(placement):
        draw, keys = Draw.of(sampling), row_keys(prompts, seed)
    if placement is not None:
        tokens, start = placement.fill_rows(tokens), placement.fill_rows(start)
        keys = placement.fill_rows(np.asarray(jax.random.key_data(keys)))
    with around(placement):
        state = _prefill(params, tokens, start, draw, keys, **how)
    burst = steps_of_a_turn(params, chunk)
    ended = [False] * len(prompts)
    yield _until_end(config, ended, np.asarray(state.token)[: len(prompts), None])
    made, capacity = 1, tokens.shape[1]
    while made < max_new_tokens and not all(ended):
        # The cache holds all but the last token drawn.
        used = tokens.shape[1] + made - 1
        if used == capacity:
            # By a half, for rows may end at any token; no further than the last but one, since the
            # last is never stored.
            capacity = min(capacity_for(capacity * 3 // 2), capacity_for(total - 1))
            with around(placement):
                state = _grow(state, capacity=capacity)
        steps = min(chunk, max_new_tokens - made, capacity - used)
        with around(placement):
            state, new = _decode(params, state, jnp.int32(steps), draw, burst=burst, **how)
        count = int(state.step) - made
        made += count
        yield _until_end(config, ended, np.asarray(new)[: len(prompts), :count])


def generate_tokens(
    config: DecoderConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    quantization: QuantizationConfig | None = None,
    placement: Placement | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> list[list[int]]:
    """Generates for each prompt; arguments and errors are those of `stream_tokens`.

    Returns:
        The new tokens of each row, without its end token.

    """
    rows: list[list[int]] = [[] for _ in prompts]
    for gained in stream_tokens(
        config,
        params,
        prompts,
        max_new_tokens,
        quantization=quantization,
        placement=placement,
        sampling=sampling,
        seed=seed,
        chunk=CHUNK,
    ):
        for row, new in zip(rows, gained, strict=True):
            row.extend(new)
    return rows


def _integer(name: str, value: Any) -> int:
    """Returns the int that any integer, NumPy's too, is; 2.0 is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def _check(
    config: DecoderConfig, prompts: list[list[int]], max_new_tokens: int, chunk: int, seed: int
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    if not 1 <= chunk <= CHUNK:
        raise ValueError(f"chunk must be in 1 to {CHUNK}, got {chunk}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0 to 2**64 - 1, got {seed}")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: at least one token is needed")
        if len(prompt) + max_new_tokens > config.max_positions:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, which with "
                f"max_new_tokens={max_new_tokens} exceeds the model's {config.max_positions} positions"
            )
        check_tokens(config, np.asarray(prompt), f"prompt {index}")


def check_tokens(config: DecoderConfig, tokens: np.ndarray, name: str) -> None:
    """Raises TypeError or ValueError, naming the argument, unless all ids are in the vocabulary."""
    if not np.issubdtype(tokens.dtype, np.integer):
        empty = "" if tokens.size else ", which NumPy makes of an empty list"
        raise TypeError(f"{name}: token ids must be integers, got {tokens.dtype}{empty}")
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if wrong.size:
        raise ValueError(
            f"{name}: token id {wrong.flat[0]} is outside the vocabulary of {config.vocab_size}"
        )


def _left_pad(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32[b, t] with the prompts at the right, and int32[b], the padding of each."""
    length = padded_length(max(map(len, prompts)))
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    start = np.array([length - len(prompt) for prompt in prompts], np.int32)
    return tokens, start


def _until_end(config: DecoderConfig, ended: list[bool], new: np.ndarray) -> list[list[int]]:
    """Cuts each row of int[b, t] before its end token; remembers in ``ended`` which had one."""
    rows = []
    for index, row in enumerate(new.tolist()):
        cut = next((i for i, t in enumerate(row) if t in config.end_tokens), len(row))
        rows.append([] if ended[index] else row[:cut])
        ended[index] |= cut < len(row)
    return rows
