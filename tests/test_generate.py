"""Generation: greedy as Hugging Face, sampling by the book, rows apart, and no compilation per step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from test_decoder import CASES, GOLDENS, load_case, quantized, run
from tokenizers import decoders, models

from jaxint8 import RelativeThreshold, TopK
from jaxint8.models import generate
from jaxint8.models.cache import SMALLEST_CAPACITY, capacity_for
from jaxint8.models.config import QuantizationConfig
from jaxint8.models.generate import generate_tokens, padded_length, stream_tokens
from jaxint8.models.language_model import LanguageModel
from jaxint8.models.loading import load
from jaxint8.models.sampling import Draw, Sampling, next_tokens, row_keys
from jaxint8.models.tokenizer import Tokenizer

SAMPLED = Sampling(temperature=1.3, top_k=40, top_p=0.95)
# Most tests share its programs: one row or two, a prompt of at most 32 tokens.
CASE = "llama_gqa_tied"


def prompts_of(case: str, *lengths: int) -> list[list[int]]:
    _, _, golden = load_case(case)
    return [golden["tokens"][i % 2, :n].tolist() for i, n in enumerate(lengths)]


@pytest.mark.parametrize("case", CASES)
def test_greedy_as_hugging_face(case: str) -> None:
    config, params, golden = load_case(case)
    made = generate_tokens(config, params, prompts_of(case, 16, 16), 8)
    assert made == golden["greedy"].tolist()


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
def test_a_row_is_the_same_alone_and_in_any_batch(sampling: Sampling) -> None:
    config, params, _ = load_case(CASE)
    prompts = prompts_of(CASE, 3, 24, 1, 11)

    def make(*rows: int) -> list[list[int]]:
        chosen = [prompts[row] for row in rows]
        return generate_tokens(config, params, chosen, 10, sampling=sampling, seed=4)

    alone = [make(row)[0] for row in range(4)]
    assert make(0, 1) == alone[:2]
    assert make(2, 0) == [alone[2], alone[0]]
    assert make(3, 2) == [alone[3], alone[2]]
    assert len({tuple(row) for row in alone}) == 4


@pytest.mark.parametrize("rule", [TopK(4), RelativeThreshold(2.0)])
def test_a_row_is_the_same_in_int8(rule: TopK | RelativeThreshold) -> None:
    config, params, _ = load_case(CASE)
    prompts = prompts_of(CASE, 3, 11)
    how = QuantizationConfig(outliers=rule)
    int8 = quantized(params)
    together = generate_tokens(config, int8, prompts, 6, quantization=how)
    alone = [generate_tokens(config, int8, [p], 6, quantization=how)[0] for p in prompts]
    assert together == alone
    # And they are what the whole forward pass says, not only the same.
    whole = jnp.asarray([prompts[1] + alone[1][:-1]])
    logits, _ = run(config, int8, whole, quantization=how)
    assert jnp.argmax(logits[0, 10:], axis=-1).tolist() == alone[1]


def test_an_int8_cache_grows_and_rows_stay_apart() -> None:
    config, params, _ = load_case("llama_rope_llama3")
    prompts = prompts_of("llama_rope_llama3", 20, 7)
    how = QuantizationConfig(outliers=TopK(4), kv_cache="int8")
    int8, count = quantized(params), SMALLEST_CAPACITY
    together = generate_tokens(config, int8, prompts, count, quantization=how)
    for prompt, made in zip(prompts, together, strict=True):
        assert generate_tokens(config, int8, [prompt], count, quantization=how) == [made]
        logits, _ = run(config, int8, jnp.asarray([prompt + made[:-1]]), quantization=how)
        chosen = logits[0, len(prompt) - 1 :][jnp.arange(count), jnp.asarray(made)]
        # A code that float rounding has moved moves a logit by a few thousandths.
        worst = jnp.max(jnp.max(logits[0, len(prompt) - 1 :], axis=-1) - chosen)
        assert float(worst) < 0.05


def test_generation_past_the_first_cache_equals_plain_forward() -> None:
    config, params, _ = load_case("llama_rope_llama3")
    (prompt,) = prompts_of("llama_rope_llama3", 20)
    count = SMALLEST_CAPACITY
    (made,) = generate_tokens(config, params, [prompt], count)
    assert len(made) == count
    whole = prompt + made
    logits, _ = run(config, params, jnp.asarray([whole[:-1]]))
    # Not the argmax itself: a near tie may fall either way when sums are taken in another order.
    chosen = logits[0, len(prompt) - 1 :][jnp.arange(count), jnp.asarray(made)]
    assert float(jnp.max(jnp.max(logits[0, len(prompt) - 1 :], axis=-1) - chosen)) < 1e-4


def test_stops_at_the_end_token() -> None:
    config, params, golden = load_case("llama_mha")
    prompts = prompts_of("llama_mha", 16, 16)
    greedy = golden["greedy"].tolist()
    end = greedy[0][3]
    stopping = dataclasses.replace(config, end_tokens=(end, 95))
    expected = [row[: row.index(end)] if end in row else row for row in greedy]
    assert generate_tokens(stopping, params, prompts, 8) == expected
    # When all rows have ended, the loop does too.
    first = dataclasses.replace(config, end_tokens=tuple({row[2] for row in greedy}))
    gained = list(stream_tokens(first, params, prompts, 8, chunk=256))
    assert len(gained) == 2
    assert [len(row) for row in generate_tokens(first, params, prompts, 8)] <= [2, 2]


@pytest.mark.parametrize("chunk", [1, 3, 256, None])
def test_streaming_gives_the_same_tokens(chunk: int | None) -> None:
    config, params, _ = load_case(CASE)
    prompts = prompts_of(CASE, 5, 9)
    whole = generate_tokens(config, params, prompts, 12, sampling=SAMPLED, seed=1)
    rows: list[list[int]] = [[], []]
    pieces = 0
    for gained in stream_tokens(config, params, prompts, 12, sampling=SAMPLED, seed=1, chunk=chunk):
        pieces += 1
        for row, new in zip(rows, gained, strict=True):
            row.extend(new)
    assert rows == whole
    assert pieces == 1 + -(-11 // (chunk or generate.PIECE))


def test_seeds() -> None:
    config, params, _ = load_case(CASE)
    prompts = prompts_of(CASE, 6) * 2
    make = [
        generate_tokens(config, params, prompts, 12, sampling=SAMPLED, seed=s) for s in (0, 0, 1)
    ]
    assert make[0] == make[1]
    assert make[0] != make[2]
    # Equal prompts in one batch are drawn apart, the first of them as if it were alone.
    assert make[0][0] != make[0][1]
    assert generate_tokens(config, params, prompts[:1], 12, sampling=SAMPLED)[0] == make[0][0]


def test_seeds_have_64_bits() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1, np.uint64(2**33)]
    keys = [jax.random.key_data(row_keys([[1]], seed)) for seed in seeds]
    assert len({np.asarray(key).tobytes() for key in keys}) == len(seeds)
    # Those of 32 bits are what they are everywhere in JAX.
    for seed, key in zip(seeds[:3], keys, strict=False):
        expected = jax.random.fold_in(jax.random.key(seed), 0)
        np.testing.assert_array_equal(key[0], jax.random.key_data(expected))


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-45, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(0, 20, 1000).astype(np.float32)
    counts = draw_many(logits, Sampling(temperature), 20)
    assert counts[logits.argmax()] == 20


def test_limits_of_float32_are_no_limits_of_options() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.3], np.float32))
    for p in (1e-30, 1e-40, 1e-45):
        assert draw_many(logits, Sampling(1.0, top_p=p), 50).tolist() == [50, 0, 0]
    with_hole = np.append(logits, -np.inf).astype(np.float32)
    assert (draw_many(with_hole, Sampling(1e300), 200) > 0).tolist() == [True] * 3 + [False]


def test_greedy_is_the_first_of_the_largest() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 1000)).round(1).astype(np.float32)
    rows[1] = -np.inf
    rows[2, 40:] = np.inf
    rows[3, 7] = np.nan
    found = jax.jit(next_tokens)(
        jnp.asarray(rows), Draw.of(Sampling()), row_keys([[1]] * 6, 0), jnp.int32(0)
    )
    assert found.dtype == jnp.int32
    assert found.tolist() == rows.argmax(axis=-1).tolist()


def draw_many(logits: np.ndarray, sampling: Sampling, count: int) -> np.ndarray:
    keys = row_keys([[i] for i in range(1)] * count, seed=3)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (count, len(logits)))
    draw = jax.jit(next_tokens)
    return np.bincount(draw(rows, Draw.of(sampling), keys, jnp.int32(0)), minlength=len(logits))


def test_temperature_draws_from_the_softmax() -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0])
    count, temperature = 20_000, 1.7
    expected = np.exp(logits / temperature)
    expected /= expected.sum()
    found = draw_many(logits, Sampling(temperature), count) / count
    # Five standard deviations of a binomial share.
    assert (abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count)).all()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, top_k=1), {3}),
        (Sampling(1.0, top_k=2), {3, 0, 5}),  # 0 and 5 are equally likely
        (Sampling(1.0, top_k=4), {3, 0, 5, 1}),
        (Sampling(1.0, top_k=99), {0, 1, 2, 3, 4, 5}),
        (Sampling(1.0, top_p=1e-6), {3}),
        (Sampling(1.0, top_p=0.5), {3}),  # the first alone has 0.547
        (Sampling(1.0, top_p=0.6), {3, 0, 5}),
        (Sampling(1.0, top_p=0.97), {3, 0, 5, 1, 2}),
        (Sampling(1.0, top_p=1.0), {0, 1, 2, 3, 4, 5}),
        # Within the top 3 the first has 0.576, so 0.56 is the first alone, but 0.56 of all is not.
        (Sampling(1.0, top_k=3, top_p=0.56), {3}),
        (Sampling(1.0, top_p=0.56), {3, 0, 5}),
    ],
)
def test_cuts(sampling: Sampling, kept: set[int]) -> None:
    logits = np.array([1.0, -0.5, -1.0, 2.0, -1.5, 1.0])
    drawn = draw_many(logits, sampling, 4000)
    assert set(np.flatnonzero(drawn)) == kept


def test_cuts_agree_with_sorting() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(5, 1000)) * 4, jnp.float32)
    keys = row_keys([[i] for i in range(5)], seed=0)
    order = np.argsort(-np.asarray(logits), axis=-1)
    for k in (1, 7, 500):
        for step in range(20):
            draw = Draw.of(Sampling(8.0, top_k=k))
            tokens = np.asarray(jax.jit(next_tokens)(logits, draw, keys, jnp.int32(step)))
            assert all(token in order[row, :k] for row, token in enumerate(tokens))


def test_greedy_is_the_limit_of_every_cut() -> None:
    config, params, golden = load_case(CASE)
    prompts = prompts_of(CASE, 16, 16)
    for sampling in (Sampling(2.0, 1, 0.9), Sampling(2.0, 40, 1e-9), Sampling(1e-4, 40, 0.9)):
        made = generate_tokens(config, params, prompts, 8, sampling=sampling, seed=9)
        assert made == golden["greedy"].tolist()


def test_no_compilation_per_step_option_or_prompt() -> None:
    config, params, _ = load_case("llama_mha")
    config = dataclasses.replace(config, max_positions=63)  # its own programs, whatever ran before

    def sizes() -> tuple[int, int]:
        return generate._prefill._cache_size(), generate._compiled_steps(False)._cache_size()

    before = sizes()
    for length in (1, 2, 31, 32):
        for new in (2, 9, 30):
            generate_tokens(config, params, [[3] * length], new)
    after = sizes()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)
    for sampling in (SAMPLED, Sampling(0.2, 1, 0.1), Sampling(5.0, 90, 0.5)):
        for seed in (0, 7):
            generate_tokens(config, params, [[3, 4]], 9, sampling=sampling, seed=seed)
    final = sizes()
    assert (final[0] - after[0], final[1] - after[1]) == (1, 1)


@pytest.mark.parametrize("chunk", [4, 8, generate.CHUNK])
def test_steps_of_a_turn_that_nobody_wants_change_nothing(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, params, golden = load_case(CASE)
    plain = dataclasses.replace(plain, max_positions=256)
    greedy = golden["greedy"].tolist()[0]
    end = next(t for i, t in enumerate(greedy) if greedy.index(t) == i and i % generate.BURST)
    ending = dataclasses.replace(plain, end_tokens=(end,))
    both, one = prompts_of(CASE, 16, 16), prompts_of(CASE, 16)
    how = {"sampling": SAMPLED, "seed": 3, "chunk": chunk}

    def made(*call: Any, **how: Any) -> list[list[list[int]]]:
        return list(stream_tokens(call[0], params, *call[1:], **how))

    # Ends by the number of tokens, through two longer caches, and by an end token within a turn.
    calls = [((plain, both, new), how) for new in (1, 2, 6, 45, 200)]
    calls += [((ending, rows, 45), {"chunk": chunk}) for rows in (one, both)]
    expected = [made(*call, **how) for call, how in calls]
    steps = sum(len(row) for (row,) in expected[5])
    assert steps == greedy.index(end)
    monkeypatch.setattr(generate, "steps_of_a_turn", lambda *_: generate.BURST)
    assert [made(*call, **how) for call, how in calls] == expected


def test_an_accelerator_takes_whole_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    _, params, _ = load_case(CASE)
    assert generate.steps_of_a_turn(params, generate.CHUNK) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elsewhere = {"embedding": np.asarray(params["embedding"])}
    assert [generate.steps_of_a_turn(elsewhere, n) for n in (1, 8, generate.CHUNK)] == [1, 4, 4]
    piece = generate.steps_of_a_piece(elsewhere)
    assert piece > generate.steps_of_a_piece(params)
    assert generate.steps_of_a_turn(elsewhere, piece) == generate.BURST


@pytest.mark.parametrize("known", [True, False])
def test_options_for_accelerators_are_those_that_xla_knows(
    monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Of an unknown option XLA says so; it is left out, not the generation."""
    if not known:
        monkeypatch.setattr(generate, "ACCELERATOR_OPTIONS", {"xla_gpu_no_such_option": "1"})
    taken = []
    compile_steps = generate.jax.jit

    def jit(function: Any, **how: Any) -> Any:
        if function is generate._steps:
            taken.append(how["compiler_options"])
        return compile_steps(function, **how)

    generate._compiled_steps.cache_clear()
    monkeypatch.setattr(generate.jax, "jit", jit)
    try:
        for on_accelerator in (False, True):
            generate._compiled_steps(on_accelerator)
    finally:
        generate._compiled_steps.cache_clear()
    assert taken == [None, generate.ACCELERATOR_OPTIONS if known else None]


@pytest.mark.parametrize("burst", [1, generate.BURST])
def test_the_cache_is_updated_in_place(burst: int) -> None:
    config, params, _ = load_case("llama_mha")
    how = {"config": config, "quantization": None}
    draw, keys = Draw.of(Sampling()), row_keys([[1]], 0)
    start = jnp.zeros((1,), jnp.int32)
    state = generate._prefill(params, jnp.ones((1, 32), jnp.int32), start, draw, keys, **how)
    state = generate._grow(state, capacity=128)
    how |= {"placement": None, "burst": burst}
    compiled = generate._compiled_steps(False)
    pointers = [k.unsafe_buffer_pointer() for k in state.cache.keys + state.cache.values]
    for _ in range(3):
        state, _ = compiled(params, state, jnp.int32(5), draw, **how)
    after = [k.unsafe_buffer_pointer() for k in state.cache.keys + state.cache.values]
    assert after == pointers
    # And the loop's body does not copy a layer's keys or values either.
    lowered = compiled.lower(params, state, jnp.int32(5), draw, **how)
    text = lowered.compile().as_text()
    shape = f"f32[1,{config.kv_heads},128,{config.head_dim}]"
    assert shape in text
    assert not [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line]


def test_lengths() -> None:
    lengths = [padded_length(n) for n in range(1, 2049)]
    assert all(n <= p < max(33, 1.5 * n) for n, p in enumerate(lengths, 1))
    assert sorted(set(lengths)) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert [capacity_for(n) for n in (1, 128, 129, 192, 193, 256)] == [128, 128, 192, 192, 256, 256]
    assert [capacity_for(n) for n in (257, 513, 641, 1024, 1025)] == [320, 640, 768, 1024, 1280]


def test_nothing_to_do() -> None:
    config, params, _ = load_case("llama_mha")
    assert generate_tokens(config, params, [], 5) == []
    assert generate_tokens(config, params, [[1], [2, 3]], 0) == [[], []]
    assert [len(row) for row in generate_tokens(config, params, [[1], [2, 3]], 1)] == [1, 1]


def test_integers_of_numpy_are_integers() -> None:
    config, params, _ = load_case("llama_mha")
    expected = generate_tokens(config, params, [[1]], 3)
    new, chunk = np.int64(3), np.int32(1)
    given = stream_tokens(config, params, [[1]], new, seed=np.uint64(0), chunk=chunk)  # pyright: ignore[reportArgumentType]
    assert [[token for (row,) in given for token in row]] == expected


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens: expected an integer, got 2.0"),
        ({"max_new_tokens": "3"}, TypeError, "max_new_tokens: expected an integer, got '3'"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
        ({"seed": -1}, ValueError, r"seed must be in 0 to 2\*\*64 - 1, got -1"),
        (
            {"seed": 2**64},
            ValueError,
            r"seed must be in 0 to 2\*\*64 - 1, got 18446744073709551616",
        ),
    ],
)
def test_numbers_are_checked(options: dict, kind: type[Exception], message: str) -> None:
    config, params, _ = load_case("llama_mha")
    with pytest.raises(kind, match=message):
        generate_tokens(config, params, [[1]], **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1], []], 5, "prompt 1 is empty"),
        ([[1]], -1, "max_new_tokens must be >= 0, got -1"),
        ([[1] * 60], 5, "prompt 0 has 60 tokens, .*max_new_tokens=5 exceeds the model's 64"),
        ([[1], [96]], 5, "prompt 1: token id 96 is outside the vocabulary of 96"),
        ([[-1]], 5, "token id -1"),
    ],
)
def test_bad_prompts(prompts: list[list[int]], new: int, message: str) -> None:
    config, params, _ = load_case("llama_mha")
    with pytest.raises(ValueError, match=message) as error:
        generate_tokens(config, params, prompts, new)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and >= 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k must be an integer >= 1 or None, got 0"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": float("inf")}, "top_k must be an integer >= 1 or None, got inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\] or None, got 0.0"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("quantization", [None, "topk", "topk:kv_int8"])
def test_the_same_tokens_where_integers_have_64_bits(quantization: str | None) -> None:
    model = load(GOLDENS / "llama_gqa_tied", quantization=quantization)
    sampling = Sampling(temperature=1.0, top_k=5, top_p=0.9)

    def made() -> list[list[int]]:
        how = {"quantization": model.quantization, "sampling": sampling}
        return generate_tokens(model.config, model.params, [[1, 2, 3], [4]], 40, **how)

    expected = made()
    with jax.enable_x64(True):
        assert made() == expected


@pytest.mark.parametrize("option", ["temperature", "top_k", "top_p"])
def test_options_are_numbers(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option}: expected a number, got '1'"):
        Sampling(**{option: "1"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=f"{option}: expected a number, got array"):
        Sampling(**{option: np.ones(2)})  # pyright: ignore[reportArgumentType]
    Sampling(**{option: jnp.float32(1)})  # pyright: ignore[reportArgumentType]


@functools.cache
def letters() -> Tokenizer:
    """One id for each printable character, but the last six are bytes of longer characters."""
    vocabulary = {chr(32 + i): i for i in range(90)}
    vocabulary |= {f"<0x{byte:02X}>": 90 + i for i, byte in enumerate(b"\xc3\xa9\xe2\x82\xac\xf0")}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(backend)


def model_of(case: str) -> LanguageModel:
    config, params, _ = load_case(case)
    return LanguageModel(config, params, tokenizer=letters())


def test_language_model() -> None:
    model = model_of("llama_mha")
    prompts = ["Hello", "int8"]
    texts = model.generate(prompts, 10)
    rows = generate_tokens(model.config, model.params, [letters().encode(p) for p in prompts], 10)
    assert texts == [letters().decode(row) for row in rows]
    assert model.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert "llama" in repr(model)
    _, _, golden = load_case("llama_mha")
    logits = model.logits(golden["tokens"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_streamed_text_is_the_generated_text(seed: int) -> None:
    model = model_of(CASE)
    options = {"temperature": 3.0, "top_k": 90, "top_p": 0.99, "seed": seed}
    (whole,) = model.generate(["Hello"], 40, **options)
    pieces = list(model.stream("Hello", 40, chunk=1, **options))
    assert "".join(pieces) == whole
    assert all(pieces)
    assert len(pieces) > 10


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
def test_logits_of_nothing(shape: tuple[int, int]) -> None:
    model = model_of("llama_mha")
    logits = model.logits(np.zeros(shape, int))
    assert (logits.shape, logits.dtype) == ((*shape, model.config.vocab_size), jnp.float32)


def test_language_model_refuses() -> None:
    model = model_of("llama_mha")
    with pytest.raises(TypeError, match="prompts: expected a sequence of strings, got one string"):
        model.generate("Hello", 3)
    for wrong, message in (
        (None, "prompts: expected a sequence"),
        ([1], "prompt 0: expected a str"),
    ):
        with pytest.raises(TypeError, match=message):
            model.generate(wrong, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="stream: got an unexpected option 'temprature'"):
        next(model.stream("a", 3, temprature=1.0))
    with pytest.raises(TypeError, match="directory: expected a path, got NoneType"):
        model.save(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotADirectoryError, match="directory: .*test_generate.py is a file"):
        model.save(__file__)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        model.generate([""], 3)
    with pytest.raises(ValueError, match="temperature"):
        model.generate(["a"], 3, temperature=-1.0)
    with pytest.raises(TypeError, match="tokens: expected values, got an array traced"):
        jax.jit(model.logits)(np.zeros((1, 3), int))
    with pytest.raises(TypeError, match="token ids must be integers, got float64$"):
        model.logits(np.zeros((1, 3)))
    with pytest.raises(
        TypeError, match="must be integers, got float64, which NumPy makes of an emp"
    ):
        model.logits([[]])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tokens: expected int.b, t., got rows of different leng"):
        model.logits([[1, 2], [3]])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"tokens: expected int\[b, t\], got shape \[3\]"):
        model.logits([1, 2, 3])
    with pytest.raises(ValueError, match="65 per row exceed the model's 64 positions"):
        model.logits(np.zeros((1, 65), np.int32))
    with pytest.raises(ValueError, match="token id 96 is outside the vocabulary"):
        model.logits([[96]])
    silent = LanguageModel(model.config, model.params)
    with pytest.raises(ValueError, match="without a tokenizer"):
        silent.generate(["a"], 3)
