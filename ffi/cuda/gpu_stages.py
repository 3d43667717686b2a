"""Correctness on a GPU, for gpu_check.py: the battery without XLA, under the sanitizer, and through jit."""

import collections
import ctypes
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import test_cuda_block
import test_cuda_largest
from gpu_check import BUILD, ROOT, SITE

import battery
import cuda_executor as tests
import jaxint8
from jaxint8 import RelativeThreshold, Threshold, TopK, kernels, reference
from jaxint8.block import Block, Weights, mlp_block
from jaxint8.dispatch import Layer, row_codes
from jaxint8.models.head import CANDIDATES, largest
from jaxint8.prologue import RMSNorm

PATHS = ("stream", "tiled", "wgmma", "sparse", "narrow", "paired")  # by their numbers in int8.h


def gpu_executor() -> tests.Executor:
    """Returns the library that runs calls on the GPU without XLA."""
    library = next(BUILD.rglob("libjaxint8_gpu_executor.so"))
    executor = tests.Executor(library)
    executor.library.executor_time.restype = ctypes.c_double
    executor.library.executor_error.restype = ctypes.c_char_p
    return executor


def _cases(quick: bool) -> Iterator[tuple[tuple[int, int, int], type, str, Any]]:
    """Yields (shape, dtype, kind, rule)."""
    shapes = battery.SHAPES[-4:] if quick else battery.SHAPES
    for shape in [*shapes, (130, 528, 132), (4, 1040, 150), (3, 8208, 18)]:
        for number, rule in enumerate(battery.RULES):
            for dtype in [battery.DTYPES[number % 3]] if quick else battery.DTYPES:
                yield shape, dtype, "outliers", rule
    if quick:
        return
    for kind in battery.KINDS:
        for rule in (Threshold(6.0, "column"), RelativeThreshold(), TopK(8), TopK(40)):
            for shape in ((5, 528, 37), (40, 1029, 130)):
                dtype = np.float32 if kind in battery.FLOAT32_ONLY else ml_dtypes.bfloat16
                yield shape, dtype, kind, rule
    # Three, five and thirteen groups of gathered columns.
    for columns, threshold in ((2048, 3.3), (4096, 3.3), (8192, 3.2)):
        for scope in ("token", "column"):
            yield (160, columns, 136), ml_dtypes.bfloat16, "no_bias", Threshold(threshold, scope)
    large = [(1, 4096, 4096), (3, 4096, 1000), (8, 14336, 512), (16, 4096, 4096), (17, 4096, 1024)]
    large += [
        (32, 8328, 130),
        (16, 16384, 64),
        (64, 768, 3072),
        (40, 1536, 1000),
        (16, 1024, 8192),
        (60, 2048, 2046),
        (65, 4096, 4096),
        (256, 4096, 4090),
        (300, 5140, 1030),
        (1000, 2048, 2050),
        (2048, 4096, 1024),
        (512, 12288, 768),
    ]
    for shape in large:
        for rule in (
            None,
            Threshold(6.0, "column"),
            RelativeThreshold(),
            TopK(8),
            Threshold(1.0, "token"),
        ):
            if shape[0] * shape[1] * shape[2] > 1 << 31 and rule in (RelativeThreshold(), TopK(8)):
                continue  # the oracle takes seconds for these
            yield shape, ml_dtypes.bfloat16, "outliers", rule


def _around_cases(quick: bool) -> Iterator[tuple[tuple[int, int, int], type, str, Any, int]]:
    """Yields (shape, dtype, kind, rule, prologue)."""
    shapes = [
        (1, 272, 34),
        (2, 528, 35),
        (5, 333, 18),
        (20, 144, 132),
        (140, 64, 70),
        (130, 528, 232),
    ]
    for number, shape in enumerate(shapes):
        for prologue in range(3):
            rule, dtype = battery.FEW_RULES[(number + prologue) % 4], battery.DTYPES[number % 3]
            yield shape, dtype, "outliers", rule, prologue
    if quick:
        return
    large = [(1, 4096, 4096), (1, 14336, 512), (2, 4096, 512), (8, 4096, 1024), (16, 14336, 64)]
    large += [(32, 14336, 256), (32, 4096, 512), (64, 768, 3072), (130, 4104, 1030)]
    large += [(100, 4096, 1024), (200, 4096, 1024), (300, 5140, 1032)]
    for shape in large:
        for prologue in range(3):
            for rule in (None, RelativeThreshold(), TopK(8)):
                yield shape, ml_dtypes.bfloat16, "outliers", rule, prologue
    for kind in battery.KINDS:
        for prologue in (1, 2):
            for shape in ((1, 528, 37), (5, 528, 37), (40, 1029, 130)):
                dtype = np.float32 if kind in battery.FLOAT32_ONLY else ml_dtypes.bfloat16
                yield shape, dtype, kind, RelativeThreshold(), prologue


def stage_native(quick: bool = False) -> dict[str, Any]:
    """The battery and real sizes without XLA, every path, against the oracle, to the bit."""
    executor = gpu_executor()
    failures: list[str] = []
    count = 0
    cases = [
        (shape, dtype, kind, rule, battery.make(shape, dtype, kind), tests.Around())
        for shape, dtype, kind, rule in _cases(quick)
    ]
    cases += [
        (shape, dtype, f"{kind}, prologue {prologue}", rule, *made)
        for shape, dtype, kind, rule, prologue in _around_cases(quick)
        for made in [tests.make_around(shape, dtype, prologue, kind)]
    ]
    for shape, dtype, kind, rule, case, around in cases:
        wanted = tests.wanted_linear(case, rule, around).astype(np.float32)
        for index, path in enumerate(PATHS):
            if (path == "stream" and shape[0] > 16) or (path == "sparse" and rule is None):
                continue
            if path == "paired" and not tests.suits_paired(shape, rule):
                continue
            count += 1
            try:
                got = executor.linear(case, rule, index, around).astype(np.float32)
            except tests.ExecutorError as error:
                failures.append(f"{shape} {dtype.__name__} {kind} {rule} {path}: {error}")
                return {
                    "cases": count,
                    "failures": failures,
                }  # the device is unusable after an error
            wrong = ~((got == wanted) | (np.isnan(got) & np.isnan(wanted)))
            if wrong.any():
                first = tuple(int(i) for i in np.argwhere(wrong)[0])
                failures.append(
                    f"{shape} {dtype.__name__} {kind} {rule} {path}: {int(wrong.sum())} of {wrong.size} differ, "
                    f"first at {first}: {got[first]} for {wanted[first]}"
                )
    rng = np.random.default_rng(0)
    for shape in ((3, 130, 17), (16, 512, 33), (70, 333, 65), (256, 1024, 512)):
        a, codes = (
            rng.integers(-128, 128, (rows, shape[1])).astype(np.int8)
            for rows in (shape[0], shape[2])
        )
        count += 1
        if not np.array_equal(executor.product(a, codes), reference.product(a, codes)):
            failures.append(f"product {shape}")
    for prologue in (1, 2):
        for shape in ((3, 130, 1), (70, 4096, 1), (9, 14336, 1)):
            x, around = tests.make_around(shape, ml_dtypes.bfloat16, prologue)
            count += 1
            got = executor.prologue(x.x, shape[1], around).astype(np.float32)
            if not np.array_equal(got, around.rows(x.x).astype(np.float32), equal_nan=True):
                failures.append(f"prologue {prologue} {shape}")
    from gpu_attend import native_attend  # which needs this module

    for native in (native_many_tiles, native_blocks, native_largest, native_attend):
        of_it, wrong = native(executor, quick)
        count, failures = count + of_it, failures + wrong
    return {"cases": count, "failures": failures}


def native_many_tiles(executor: Any, quick: bool) -> tuple[int, list[str]]:
    """Layers too large for the oracle, of several tiles a block, several times, against the plain kernel (tiled.h)."""
    failures, count = [], 0
    shapes = [(2048, 4096, 4096), (2048, 768, 3072), (700, 1536, 6144), (1500, 2048, 8192)]
    for shape in shapes[:0] if quick else shapes:
        case = battery.make(shape, ml_dtypes.bfloat16)
        for rule in (TopK(8), RelativeThreshold(), Threshold(6.0, "column"), None):
            wanted = executor.linear(case, rule, tests.TILED).view(np.uint16)
            for path in (tests.AUTO, tests.WGMMA, tests.SPARSE):
                if path == tests.SPARSE and rule is None:
                    continue
                for attempt in range(4):
                    count += 1
                    wrong = int((executor.linear(case, rule, path).view(np.uint16) != wanted).sum())
                    if wrong:
                        failures.append(f"{shape} {rule} path {path} run {attempt}: {wrong} differ")
    return count, failures


def native_blocks(executor: Any, quick: bool) -> tuple[int, list[str]]:
    """Runs blocks of many shapes; returns how many and which differ from the oracle in some bit."""
    failures, count = [], 0
    shapes = [(1, 64, 96, 48), (1, 1296, 272, 400), (5, 272, 208, 224), (8, 144, 80, 1200)]
    if not quick:
        shapes += [(1, 4096, 4096, 14336), (8, 4096, 4096, 14336), (3, 576, 576, 1536)]
        shapes += [(2, 2048, 2048, 5632), (7, 4096, 2064, 4112), (17, 256, 512, 640)]
        shapes += [(20, 64, 2576, 200), (60, 64, 2576, 336)]
    for shape in shapes:
        for number, rule in enumerate(test_cuda_block.RULES):
            dtype = (ml_dtypes.bfloat16, np.float16)[number % 2]
            block = test_cuda_block.make(shape, dtype, biases=number % 2 == 0)
            wanted = test_cuda_block.wanted(block, rule).astype(np.float32)
            for attempt in range(1 if quick else 3):
                count += 1
                got = test_cuda_block.run(executor, block, rule).astype(np.float32)
                wrong = int((got != wanted).sum())
                if wrong:
                    failures.append(f"block {shape} {rule} run {attempt}: {wrong} differ")
    return count, failures


def native_largest(executor: Any, quick: bool) -> tuple[int, list[str]]:
    """Chooses the largest of rows of many shapes and kinds; returns how many and which differ from NumPy's."""
    made = [
        (f"{shape}", test_cuda_largest.random(shape), count)
        for shape, count in test_cuda_largest.SHAPES
    ]
    made += [
        (f"{kind} {n}", test_cuda_largest.special(kind, n), count)
        for kind in test_cuda_largest.KINDS
        for n in ((5003,) if quick else (999, 5003, 128256, 128257))
        for count in (1, 64)
    ]
    if not quick:
        shapes = [(1, 128256), (8, 128256), (32, 128256), (256, 128256), (3, 262147), (1, 5000011)]
        made += [(f"{shape}", test_cuda_largest.random(shape), 64) for shape in shapes]
    failures, count = [], 0
    for label, x, wanted in made:
        for attempt in range(1 if quick else 3):
            count += 1
            got = executor.largest(x, wanted)
            wrong = int((got != tests.wanted_largest(x, wanted)).sum())
            if wrong:
                failures.append(f"largest {wanted} of {label} run {attempt}: {wrong} differ")
    return count, failures


def _sanitized(tool: str, extra: list[str]) -> dict[str, Any]:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not pathlib.Path(sanitizer).exists():
        return {"skipped": "compute-sanitizer not found"}
    command = [
        sanitizer,
        "--tool",
        tool,
        *extra,
        "--error-exitcode",
        "9",
        sys.executable,
        str(pathlib.Path(__file__).with_name("gpu_check.py")),
        "--stage=quick",
    ]
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    output = done.stdout
    if done.returncode != 0:
        # All kernels it names: a report is long, and only its end is kept.
        named = collections.Counter(re.findall(r"\bat .*?(\w+Kernel)\b", output))
        raise RuntimeError(
            f"{tool}: status {done.returncode}, names {dict(named)}\n{output[-4000:]}"
        )
    summary = [
        line
        for line in output.split("\n")
        if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line
    ]
    return {
        "summary": summary,
        "result": json.loads(output.split("RESULT ", 1)[1].split("\n", 1)[0]),
    }


def stage_memcheck() -> dict[str, Any]:
    """A part of the battery under compute-sanitizer: accesses out of bounds and leaks of no kind."""
    return _sanitized("memcheck", [])


def stage_racecheck() -> dict[str, Any]:
    """The same under the race checker of shared memory."""
    return _sanitized("racecheck", ["--racecheck-report", "analysis"])


def stage_quick() -> dict[str, Any]:
    """What runs under the sanitizer."""
    return stage_native(quick=True)


def stage_jax() -> dict[str, Any]:
    """int8_linear through jit on the GPU: against the oracle, repeatedly (CUDA graphs), under vmap and grad."""
    failures: list[str] = []
    count = 0
    for shape in (
        (0, 5, 3),
        (1, 64, 16),
        (3, 499, 65),
        (16, 128, 48),
        (64, 1029, 70),
        (512, 1024, 512),
    ):
        case = battery.make(shape, ml_dtypes.bfloat16)
        weights = jaxint8.QuantizedMatrix(jnp.asarray(case.codes), jnp.asarray(case.scale))

        @jax.jit
        def layers(x: jax.Array, weights: Any, bias: jax.Array) -> list[jax.Array]:
            return [
                jaxint8.int8_linear(x, weights, bias, outliers=rule, implementation="cuda")
                for rule in battery.RULES
            ]

        x, bias = jnp.asarray(case.x), jnp.asarray(case.bias)
        for attempt in range(4):  # from the second or third run on XLA replays a CUDA graph
            for rule, y in zip(battery.RULES, layers(x, weights, bias), strict=True):
                wanted = reference.int8_linear(case.x, case.codes, case.scale, case.bias, rule)
                count += 1
                if not np.array_equal(
                    np.asarray(y, np.float32), wanted.astype(np.float32), equal_nan=True
                ):
                    failures.append(f"{shape} {rule} run {attempt}")
    x = jax.random.normal(jax.random.key(0), (3, 5, 64))
    matrix = jaxint8.quantize(jax.random.normal(jax.random.key(1), (64, 32)))
    linear = lambda x: jaxint8.int8_linear(x, matrix, outliers=jaxint8.TopK(2))  # noqa: E731
    if not np.array_equal(jax.vmap(linear)(x), linear(x)):
        failures.append("vmap")
    gradient = jax.grad(lambda x: jnp.sum(linear(x)))(x)
    wanted = np.broadcast_to(np.asarray(matrix.dequantize()).sum(axis=1), x.shape)
    if not np.allclose(gradient, wanted, rtol=1e-4, atol=1e-4):
        failures.append("grad")
    text = jax.jit(linear).lower(x).compile().as_text()
    from gpu_attend import check_attend  # which needs this module

    for check in (check_portable(), check_blocks(), check_largest(), check_attend()):
        count, failures = count + check["cases"], failures + check["failures"]
    return {
        "cases": count,
        "failures": failures,
        "chosen": "cuda" if "jaxint8_linear" in text else "not the kernel",
        "available": list(kernels.available()),
    }


def check_portable() -> dict[str, Any]:
    """The implementation in pure JAX, and codes of weights, with XLA's own arithmetic for GPUs, to the bit.

    Codes of rows too, which a device multiplies where others hold a part of the columns.
    """
    failures: list[str] = []
    count = 0
    for shape, dtype, kind in (
        ((64, 499, 65), np.float32, "outliers"),
        ((300, 1029, 70), ml_dtypes.bfloat16, "no_bias"),
        ((17, 130, 31), np.float16, "ties"),
    ):
        case = battery.make(shape, dtype, kind)
        weights = jaxint8.QuantizedMatrix(jnp.asarray(case.codes), jnp.asarray(case.scale))

        @jax.jit
        def layers(x: jax.Array, weights: Any, bias: jax.Array | None) -> list[jax.Array]:
            return [
                jaxint8.int8_linear(x, weights, bias, outliers=rule, implementation="xla")
                for rule in battery.RULES
            ]

        bias = None if case.bias is None else jnp.asarray(case.bias)
        made = layers(jnp.asarray(case.x), weights, bias)
        for rule, y in zip(battery.RULES, made, strict=True):
            wanted = reference.int8_linear(case.x, case.codes, case.scale, case.bias, rule)
            count += 1
            if not np.array_equal(
                np.asarray(y, np.float32), wanted.astype(np.float32), equal_nan=True
            ):
                failures.append(f"pure JAX, {shape} {kind} {rule}")
        rules = [rule for rule in battery.RULES if rule is not None]
        coded = jax.jit(
            lambda x, rules=rules: [row_codes(x, Layer(r, "int15", None)) for r in rules]
        )
        for rule, made in zip(rules, coded(jnp.asarray(case.x)), strict=True):
            lo, hi, scale = reference.quantize_rows(case.x, rule)
            count += 1
            found = made.lo, made.hi, made.scale[:, 0]
            if not all(
                np.array_equal(a, b, equal_nan=True)
                for a, b in zip(found, (lo, hi, scale), strict=True)
            ):
                failures.append(f"codes of rows, {shape} {kind} {rule}")
    kernel = np.random.default_rng(7).standard_normal((2048, 3000), np.float32)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        count += 1
        found = jaxint8.quantize(jnp.asarray(kernel.astype(dtype)))
        codes, scale = reference.quantize(kernel.astype(dtype))
        if not (np.array_equal(found.codes, codes) and np.array_equal(found.scale, scale)):
            failures.append(f"codes of weights in {np.dtype(dtype).name}")
    return {"cases": count, "failures": failures}


def check_largest() -> dict[str, Any]:
    """The choice of an int8 head through jit, of runs that XLA replays as a CUDA graph too, and under vmap."""
    failures: list[str] = []
    count = 0
    choose = functools.partial(largest, count=CANDIDATES)
    for m, n in ((1, 128256), (8, 5003), (33, 128256)):
        for jitted in (jax.jit(choose), jax.jit(jax.vmap(choose))):
            for attempt in range(4):
                x = np.random.default_rng([m, n, attempt]).standard_normal((m, n), np.float32)
                found = np.asarray(jitted(jnp.asarray(x[:, None])))[:, 0]
                count += 1
                if not np.array_equal(found, tests.wanted_largest(x, CANDIDATES)):
                    failures.append(f"largest of {(m, n)} run {attempt}")
        text = jax.jit(choose).lower(jnp.zeros((m, 1, n))).compile().as_text()
        if "jaxint8_largest" not in text:
            failures.append(f"largest of {(m, n)}: not the kernel")
    return {"cases": count, "failures": failures}


def check_blocks() -> dict[str, Any]:
    """The half of a decoder layer behind its attention, one call, against three layers of the oracle, to the bit."""
    failures: list[str] = []
    count = 0
    norm = RMSNorm(1e-5)
    for m, k, h, f in (
        (1, 576, 576, 1536),
        (2, 512, 1024, 2816),
        (16, 256, 512, 640),
        (70, 512, 384, 512),
    ):
        made = [
            battery.make(shape, ml_dtypes.bfloat16, "no_bias")
            for shape in ((m, k, h), (m, h, 2 * f), (m, f, h))
        ]
        rng = np.random.default_rng(m)
        x, residual = made[0].x, rng.standard_normal((m, h)).astype(ml_dtypes.bfloat16)
        scale = rng.standard_normal(h).astype(np.float32)
        block = Block(x, residual, scale, *(Weights(case.codes, case.scale) for case in made))
        block = jax.tree.map(jnp.asarray, block)
        for rule in (None, Threshold(6.0, "column"), RelativeThreshold(), TopK(8)):
            layer = Layer(rule, "int15", "cuda", norm)
            linear = lambda x, case, rule=rule: reference.int8_linear(  # noqa: E731
                x, case.codes, case.scale, None, rule
            )
            attended = residual + linear(x, made[0])
            gated = linear(reference.rms_norm(attended, scale, norm.epsilon), made[1])
            wanted = attended + linear(reference.silu_gate(gated), made[2])
            run = jax.jit(mlp_block, static_argnums=1)
            for attempt in range(3):
                count += 1
                y = np.asarray(run(block, layer), np.float32)
                if not np.array_equal(y, wanted.astype(np.float32), equal_nan=True):
                    failures.append(f"block {(m, k, h, f)} {rule} run {attempt}")
    return {"cases": count, "failures": failures}


def stage_model() -> dict[str, Any]:
    """The decoder's tests on the GPU: logits of Hugging Face's models, with and without a cache, padding, int8."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-n6", "-p", "no:cacheprovider"]
    # What the tests' own set-up makes strict are habits of the code, and it would choose the CPU.
    command += ["-o", "addopts=", "-o", "filterwarnings=ignore", "-rf", "--tb=line"]
    environment = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "test_decoder.py")],
        text=True,
        capture_output=True,
        check=False,
        cwd=SITE,  # python -m looks there first; the root has a jaxint8 without models
        env={**os.environ, **environment},
    )
    lines = done.stdout.strip().split("\n")
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not failures:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-1000:])
    return {"summary": lines[-1], "failures": failures}
