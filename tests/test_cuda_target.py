"""int8_linear compiled by XLA for H200s on a machine that has none: the calls, the collectives and the memory.

This is all of XLA's GPU compiler, from partitioning to machine code and the assignment of buffers, given the properties
of a device instead of a device. It does not show that anything runs, or how fast. `make cuda-check` builds the kernels,
puts JAX's CUDA plugin beside them, and runs it.
"""

import collections
import dataclasses
import functools
import importlib.util
import math
import pathlib
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxint8 import (
    Partition,
    QuantizedMatrix,
    RelativeThreshold,
    Threshold,
    TopK,
    int8_linear,
    kernels,
)
from jaxint8.attend import Token, attend
from jaxint8.models import generate
from jaxint8.models.cache import init_cache
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.head import CANDIDATES, _of_blocks, largest
from jaxint8.models.placement import Placement
from jaxint8.models.sampling import Draw, Sampling
from jaxint8.models.step import attend_one, store
from jaxint8.vectors import Vectors

BUILD = pathlib.Path(__file__).parents[1] / "build" / "cuda" / "cuda"
# An H200 by its data sheet and the limits of compute capability 9.0; the compiler asks for no more.
H200 = """
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H200" cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 141000000000
}
"""
COLUMN, ROW = {"n": "model"}, {"k": "model"}
RULES = [None, Threshold(6.0, "column"), RelativeThreshold(6.0), TopK(8)]
COLLECTIVES = r"all-gather|all-reduce|reduce-scatter|[\w-]*all-to-all|collective-\w+"


@pytest.fixture(scope="module")
def devices() -> Iterator[np.ndarray]:
    """Four H200s to compile for, with the kernels of the build registered for them."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="no CUDA plugin of JAX: make cuda-check")
    with pytest.MonkeyPatch.context() as patch:
        if kernels._cuda is None:
            path = next(BUILD.glob("_cuda*.so"), None)
            if path is None:
                pytest.skip("no CUDA kernels have been built: make cuda-check")
            spec = importlib.util.spec_from_file_location("jaxint8._cuda", path)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            kernels.check_version(module)
            kernels._register(module, "CUDA")
            patch.setattr(kernels, "_cuda", module)
            jax.clear_caches()  # traces from when there were no such kernels
        shape = "1x1x4"
        how = {"platform": "cuda", "target_config": H200, "topology": shape}
        yield np.array(topologies.get_topology_desc(shape, **how).devices)
    jax.clear_caches()


def program(partition: Partition, shape: tuple[int, int, int], rule: Any, told: bool = True) -> Any:
    """The compiled layer of ``shape`` (m, k, n) with bias, bfloat16 activations and arrays that lie as they should."""
    m, k, n = shape
    arrays = [
        ((m, k), jnp.bfloat16, partition.x_spec(2)),
        ((n, k), jnp.int8, partition.codes_spec),
        ((n,), jnp.float32, partition.n_spec),
        ((n,), jnp.float32, partition.n_spec),
    ]
    mesh = partition.mesh
    structs = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, p)) for s, d, p in arrays]

    def layer(x: jax.Array, codes: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        w = QuantizedMatrix(codes, scale)
        return int8_linear(x, w, bias, outliers=rule, partition=partition if told else None)

    return jax.jit(layer).lower(*structs).compile()


def results(text: str, operation: str) -> list[tuple[str, list[tuple[str, int]]]]:
    """For each such operation of a compiled program: its text, and (dtype, elements) of every array of its result."""
    found = []
    for line in re.findall(rf"^.* = .* (?:{operation})(?:-start)?\(.*$", text, re.MULTILINE):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", re.split(rf" (?:{operation})", line)[0])
        arrays = [(d, math.prod(map(int, filter(None, s.split(","))))) for d, s in shapes]
        found.append((line, arrays))
    return found


def targets(text: str) -> list[str]:
    """The targets of all foreign calls of a compiled program."""
    return re.findall(r'custom_call_target="([^"]+)"', text)


def product_call(text: str) -> tuple[str, list[tuple[str, int]]]:
    """(target, result) of the call of our kernel, beside which nothing may multiply."""
    calls = {
        target: result
        for line, result in results(text, "custom-call")
        for target in targets(line)
        if target != "__gpu$TopK"
    }
    assert len(calls) == 1 and not results(text, "dot")
    return calls.popitem()


@pytest.mark.parametrize("name", ["_cuda*.so", "libjaxint8_gpu_executor.so"])
def test_what_a_library_knows_of_its_kernels_is_its_own(name: str) -> None:
    """Exported, a template's static variable is one for all libraries of a process, though each has its kernels."""
    path = next(BUILD.glob(name), None)
    if path is None:
        pytest.skip("no CUDA kernels have been built: make cuda-check")
    exported = subprocess.run(
        ["nm", "--dynamic", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert any(re.search("T (PyInit__cuda|executor_run)$", line) for line in exported)
    assert not [line for line in exported if re.search("u .*jaxint8", line)]


def mesh_of(devices: np.ndarray, shape: tuple[int, int]) -> Mesh:
    chosen = devices[: math.prod(shape)].reshape(shape)
    return Mesh(chosen, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def expect_fused(compiled: Any, shape: tuple[int, int, int], rule: Any) -> None:
    """One call of the fused kernel for the local ``shape``, nothing from elsewhere, and no memory but its workspace."""
    m, k, n = shape
    text, memory = compiled.as_text(), compiled.memory_analysis()
    target, result = product_call(text)
    assert target == "jaxint8_linear" and result[0] == ("bf16", m * n)
    assert not results(text, COLLECTIVES)
    assert memory.argument_size_in_bytes == 2 * m * k + n * k + 8 * n
    assert memory.output_size_in_bytes == 2 * m * n
    # The workspace, beside a table of pointers; buffers start at multiples of 256.
    assert result[1][1] <= memory.temp_size_in_bytes <= result[1][1] + 2 * 256
    options = kernels._attributes(rule, "int15", None, "cuda")
    options = {name: int(options[name]) for name in ("rule", "column_scope", "rung")}
    assert kernels._cuda is not None
    assert result[1][1] == kernels._cuda.workspace_bytes(
        "jaxint8_linear", m, k, n, itemsize=2, **options
    )


def expect_shared(
    compiled: Any, local: tuple[int, int, int], mesh: tuple[int, int], rule: Any, sums: int
) -> None:
    """One product by our kernel of the local codes, one sum of int32 if any, and only statistics moved beside it.

    Of many rows, or where rows have to be asked too.
    """
    m, k, n = local
    parts = 1 if rule is None else 2  # lo and hi, one below the other
    text, memory = compiled.as_text(), compiled.memory_analysis()
    target, result = product_call(text)
    assert target == "jaxint8_product" and result[0] == ("s32", parts * m * n)
    moved = [("all-gather" in line, arrays) for line, arrays in results(text, COLLECTIVES)]
    assert len([1 for _, arrays in moved if ("s32", m * n) in arrays]) == sums
    for gathers, arrays in moved:
        if gathers:  # the candidates of every device for the largest k of a row
            assert isinstance(rule, TopK)
            assert all(count <= mesh[1] * m * rule.k for _, count in arrays)
        elif (
            "s32",
            m * n,
        ) not in arrays:  # numbers of each row; over other rows, flags of the columns
            flags = k if rule == Threshold(6.0, "column") and mesh[0] > 1 else 0
            assert all(count <= max(2 * m, flags) for _, count in arrays)
    assert memory.argument_size_in_bytes == 2 * m * k + n * k + 8 * n
    assert memory.output_size_in_bytes == 2 * m * n
    # The int32 product and the sum made of it; beside them at most codes, statistics and the kernel's workspace.
    wanted = 4 * parts * m * n + 4 * m * n
    assert wanted <= memory.temp_size_in_bytes <= wanted + 2 * m * k + result[1][1] + 4096


def expect_gathered(
    compiled: Any, local: tuple[int, int, int], mesh: tuple[int, int], rule: Any
) -> None:
    """Few rows: gathered, quantised and multiplied by our kernels, then one sum of int32."""
    m, k, n = local
    parts, width = 1 if rule is None else 2, k * mesh[1]
    text, memory = compiled.as_text(), compiled.memory_analysis()
    calls = {
        target: result for line, result in results(text, "custom-call") for target in targets(line)
    }
    assert sorted(calls) == ["jaxint8_product", "jaxint8_quantize"] and not results(text, "dot")
    assert calls["jaxint8_product"][0] == ("s32", parts * m * n)
    assert calls["jaxint8_quantize"][0] == ("s8", m * width)
    moved = sorted(
        ("all-gather" in line, arrays[-1]) for line, arrays in results(text, COLLECTIVES)
    )
    assert moved == [(False, ("s32", m * n)), (True, ("bf16", m * width))]
    assert memory.argument_size_in_bytes == 2 * m * k + n * k + 8 * n
    assert memory.output_size_in_bytes == 2 * m * n
    # Whole rows, twice where they are put in order, their codes, those held, and sums.
    workspaces = sum(result[-1][1] for result in calls.values())
    most = 6 * m * width + 2 * m * k + 8 * (parts + 1) * m * n + workspaces + 4096
    assert memory.temp_size_in_bytes <= most


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_device_has_one_call_and_its_workspace(devices: np.ndarray, rule: Any) -> None:
    partition = Partition(mesh_of(devices, (1, 1)))
    for m in (1, 512):
        expect_fused(program(partition, (m, 4096, 14336), rule), (m, 4096, 14336), rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_column_parallel_layers_move_nothing(devices: np.ndarray, rule: Any) -> None:
    for shape, m in (((1, 4), 2), ((2, 2), 512)):
        partition = Partition(mesh_of(devices, shape), rows="data", **COLUMN)
        local = (m // shape[0], 4096, 14336 // shape[1])
        compiled = program(partition, (m, 4096, 14336), rule)
        if shape[0] == 1 or rule != Threshold(6.0, "column"):
            expect_fused(compiled, local, rule)
        else:  # the columns' flags come from all rows
            expect_shared(compiled, local, shape, rule, sums=0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_row_parallel_layers_add_once(devices: np.ndarray, rule: Any) -> None:
    for shape, m in (((1, 4), 2), ((2, 2), 4096)):
        partition = Partition(mesh_of(devices, shape), rows="data", **ROW)
        compiled = program(partition, (m, 14336, 4096), rule)
        local = (m // shape[0], 14336 // shape[1], 4096)
        if m == 2:
            expect_gathered(compiled, local, shape, rule)
        else:
            expect_shared(compiled, local, shape, rule, sums=1)


def test_without_a_partition_the_weights_would_be_gathered(devices: np.ndarray) -> None:
    """What the tests above look for is there where nobody says how the arrays lie."""
    partition = Partition(mesh_of(devices, (1, 4)), **COLUMN)
    compiled = program(partition, (512, 4096, 14336), None, told=False)
    gathered = [a for line, a in results(compiled.as_text(), COLLECTIVES) if "all-gather" in line]
    assert any(("s8", 4096 * 14336) in arrays for arrays in gathered)
    with pytest.raises(AssertionError):
        expect_fused(compiled, (512, 4096, 14336 // 4), None)


def test_attention_to_a_cache_copies_none_of_it(devices: np.ndarray) -> None:
    """A step that stores a token and attends to all: beside the cache, in its place, there are scores and no more."""
    b, heads, kv_heads, width, slots = 4, 8, 2, 128, 1024
    where = SingleDeviceSharding(devices[0])
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=where)
    query = struct((b, 1, heads, width))
    cache = struct((b, kv_heads, width, slots)), struct((b, kv_heads, slots, width))
    length = jax.ShapeDtypeStruct((), jnp.int32, sharding=where)

    def steps(query: jax.Array, cache: Any, length: jax.Array) -> Any:
        def step(_: int, carry: Any) -> Any:
            query, cache, length = carry
            token = query[:, :, :kv_heads]
            cache = store(cache, token, token, length)
            mask = jnp.arange(slots)[None, None, None] <= length
            query = attend_one(query, *cache, jnp.broadcast_to(mask, (b, 1, 1, slots)))
            return query, cache, length + 1

        return jax.lax.fori_loop(0, 3, step, (query, cache, length))

    jitted = jax.jit(steps, donate_argnums=(0, 1, 2))
    memory = jitted.lower(query, cache, length).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= 2 * 2 * b * kv_heads * width * slots
    assert memory.temp_size_in_bytes <= 3 * 4 * b * heads * slots


def test_attention_to_an_int8_cache_is_one_call_in_its_place(devices: np.ndarray) -> None:
    """A loop of steps: the kernel that stores and attends, and beside the cache nothing that grows with it."""
    b, heads, kv_heads, d, slots = 4, 8, 2, 128, 1024
    where = SingleDeviceSharding(devices[0])

    def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    scale = struct((b, kv_heads, slots), jnp.float32)
    cache = (
        Vectors(struct((b, kv_heads, slots, d), jnp.int8), scale),  # type: ignore[arg-type]
        Vectors(struct((b, kv_heads, d, slots), jnp.int8), scale),  # type: ignore[arg-type]
    )
    qkv = struct((b, (heads + 2 * kv_heads) * d), jnp.bfloat16)

    def steps(qkv: jax.Array, cache: tuple[Vectors, Vectors], slot: jax.Array) -> Any:
        def step(_: int, carry: Any) -> Any:
            qkv, cache, slot = carry
            y, *cache = attend(Token(qkv, None, jnp.zeros((b,), jnp.int32), slot), *cache)
            return jnp.concatenate([y, y[:, : 2 * kv_heads * d]], axis=1), tuple(cache), slot + 1

        return jax.lax.fori_loop(0, 3, step, (qkv, cache, slot))

    jitted = jax.jit(steps, donate_argnums=(0, 1, 2))
    compiled = jitted.lower(qkv, cache, struct((), jnp.int32)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    assert targets(text).count("jaxint8_attend") == 1
    assert memory.alias_size_in_bytes >= 2 * b * kv_heads * d * slots
    assert memory.temp_size_in_bytes <= 1 << 16


@pytest.mark.parametrize("n", [2000, 128256])
def test_without_a_kernel_the_largest_logits_are_selected_without_sorting(
    devices: np.ndarray, n: int
) -> None:
    sharding = SingleDeviceSharding(devices[0])
    logits = jax.ShapeDtypeStruct((8, 1, n), jnp.float32, sharding=sharding)
    text = jax.jit(_of_blocks, static_argnums=1).lower(logits, CANDIDATES).compile().as_text()
    assert text is not None
    assert " sort(" not in text
    assert targets(text).count("__gpu$TopK") == (1 if n == 2000 else 2)


@pytest.mark.parametrize("n", [2000, 128256])
def test_the_largest_logits_are_one_call_of_a_kernel(devices: np.ndarray, n: int) -> None:
    sharding = SingleDeviceSharding(devices[0])
    choose = functools.partial(largest, count=CANDIDATES)
    for m, function in ((8, choose), (33, choose), (8, jax.vmap(choose)), (8, jax.grad(of_least))):
        logits = jax.ShapeDtypeStruct((m, 1, n), jnp.float32, sharding=sharding)
        compiled = jax.jit(function).lower(logits).compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert targets(text) == ["jaxint8_largest"] and " sort(" not in text
        assert kernels._cuda is not None
        workspace = kernels._cuda.workspace_bytes("jaxint8_largest", m, n, CANDIDATES)
        assert ("u8", workspace) in results(text, "custom-call")[0][1]
        if function is choose:
            assert memory.temp_size_in_bytes <= workspace + 2 * 256


def of_least(logits: jax.Array) -> jax.Array:
    """A number of the largest logits alone, which has a gradient."""
    chosen = jnp.take_along_axis(logits, largest(logits, CANDIDATES)[..., -1:], axis=-1)
    return jnp.sum(chosen)


def test_each_device_chooses_among_its_own_rows(devices: np.ndarray) -> None:
    mesh = mesh_of(devices, (2, 2))
    spec = PartitionSpec("data")
    logits = jax.ShapeDtypeStruct(
        (8, 1, 5000), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    choose = functools.partial(largest, count=CANDIDATES)
    function = jax.shard_map(choose, mesh=mesh, in_specs=spec, out_specs=spec)
    text = jax.jit(function).lower(logits).compile().as_text()
    assert text is not None
    assert targets(text) == ["jaxint8_largest"] and not results(text, COLLECTIVES)
    assert ("s32", 4 * CANDIDATES) in results(text, "custom-call")[0][1]


@pytest.mark.parametrize("batch", [1, 8])
def test_a_greedy_step_with_an_int8_head_selects_by_our_kernel(
    devices: np.ndarray, batch: int
) -> None:
    """The whole loop of generation: no call but ours, so that nothing of a step stands outside of a CUDA graph."""
    quantization = QuantizationConfig(outliers=RelativeThreshold(6.0), lm_head="int8")
    where = SingleDeviceSharding(devices[0])
    arguments = jax.eval_shape(lambda: step_arguments(batch))
    params, state, steps = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), arguments
    )
    text = (
        jax.jit(
            generate._steps,
            static_argnames=("config", "quantization", "burst"),
            donate_argnames="state",
            compiler_options=generate.ACCELERATOR_OPTIONS,
        )
        .lower(
            params,
            state,
            steps,
            Draw.of(Sampling()),
            config=SMALL,
            quantization=quantization,
            burst=generate.BURST,
        )
        .compile()
        .as_text()
    )
    assert text is not None
    found = targets(text)
    assert found.count("jaxint8_largest") == 1
    assert not [target for target in found if "TopK" in target or "sort" in target.lower()]
    assert " sort(" not in text


def test_a_step_on_two_devices_is_fused_layers_and_gathers(devices: np.ndarray) -> None:
    """No statistics, no codes and no sums of integers: of sums, those of the embedding and the head."""
    quantization = QuantizationConfig(
        outliers=RelativeThreshold(6.0), lm_head="int8", kv_cache="int8"
    )
    placement = Placement.of(SMALL, mesh_of(devices, (1, 2)), quantization)
    params, state, steps = jax.eval_shape(lambda: step_arguments(2, quantization))
    whole = jax.tree.map(lambda _: PartitionSpec(), state)
    cache = placement.cache_specs(state.cache)
    specs = placement.param_specs(params), dataclasses.replace(whole, cache=cache), PartitionSpec()
    arguments = jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(placement.mesh, spec)
        ),
        (params, state, steps),
        specs,
    )
    how = {"config": SMALL, "quantization": quantization, "placement": placement}
    compiled = jax.jit(
        generate._steps,
        static_argnames=(*how, "burst"),
        donate_argnames="state",
        compiler_options=generate.ACCELERATOR_OPTIONS,
    ).lower(*arguments, Draw.of(Sampling()), burst=generate.BURST, **how)
    text = compiled.compile().as_text()
    layers = SMALL.layers
    expected = {"jaxint8_linear": 4 * layers + 1, "jaxint8_prologue": layers}  # the gate
    expected |= {"jaxint8_attend": layers, "jaxint8_largest": 1}
    assert collections.Counter(targets(text)) == expected
    sizes = [SMALL.hidden_size] * (2 * layers + 1)
    sizes += [SMALL.query_size, SMALL.mlp_size] * layers
    wanted = [("bf16", 2 * size) for size in sizes] + [("f32", 2 * SMALL.vocab_size)]
    gathered = [arrays[-1] for _, arrays in results(text, "all-gather")]
    assert sorted(gathered) == sorted(wanted)
    added = [arrays[-1][1] for _, arrays in results(text, "all-reduce")]
    assert sorted(added) == [2 * SMALL.hidden_size, 2 * CANDIDATES * SMALL.hidden_size]


SMALL = DecoderConfig(
    family="llama",
    vocab_size=20000,
    hidden_size=512,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=128,
    mlp_size=1024,
    max_positions=512,
    embedding_size=512,
    norm="rms",
    norm_epsilon=1e-5,
    positions="rope",
    rope_theta=500000.0,
    activation="silu",
    gated=True,
)


def step_arguments(
    batch: int, quantization: QuantizationConfig | None = None
) -> tuple[Any, generate._State, jax.Array]:
    """Parameters with an int8 head beside the float one, and the state of a generation, for shapes alone."""

    def matrix(n: int, k: int) -> dict[str, Any]:
        codes, scale = jnp.zeros((n, k), jnp.int8), jnp.zeros((n,), jnp.float32)
        return {"weight": QuantizedMatrix(codes, scale)}

    hidden, mlp = SMALL.hidden_size, SMALL.mlp_size
    norm = {"weight": jnp.zeros((hidden,), jnp.bfloat16)}
    table = jnp.zeros((SMALL.vocab_size, hidden), jnp.bfloat16)
    layer = {
        "attention_norm": norm,
        "mlp_norm": norm,
        "qkv": matrix(SMALL.query_size + 2 * SMALL.key_value_size, hidden),
        "out": matrix(hidden, SMALL.query_size),
        "up": matrix(2 * mlp, hidden),
        "down": matrix(hidden, mlp),
    }
    params = {
        "embedding": table,
        "lm_head": {"weight": table},
        "int8_head": matrix(SMALL.vocab_size, hidden),
        "final_norm": norm,
        "layers": [layer] * SMALL.layers,
    }
    state = generate._State(
        cache=init_cache(SMALL, 256, jnp.zeros((batch,), jnp.int32), jnp.bfloat16, quantization),
        token=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
        step=jnp.int32(1),
        keys=jax.random.split(jax.random.key(0), batch),
    )
    return params, state, jnp.int32(16)
