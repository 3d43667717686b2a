"""Correctness on a GPU, for gpu_check.py: the battery without XLA, under the sanitizer, and through jit."""

import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import test_cuda_executor as tests
from gpu_check import BUILD, ROOT, SITE, run

import battery
import jaxint8
from jaxint8 import RelativeThreshold, Threshold, TopK, kernels, reference

PATHS = ("stream", "tiled", "wgmma", "sparse")  # by their numbers in int8.h


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
    for shape in [*shapes, (130, 528, 132), (4, 1040, 150)]:
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
    large = [(1, 4096, 4096), (3, 4096, 1000), (8, 14336, 512), (16, 4096, 4096), (17, 4096, 1024)]
    large += [
        (64, 768, 3072),
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


def stage_native(quick: bool = False) -> dict[str, Any]:
    """The battery and real sizes without XLA, every path, against the oracle, to the bit."""
    executor = gpu_executor()
    failures: list[str] = []
    count = 0
    for shape, dtype, kind, rule in _cases(quick):
        case = battery.make(shape, dtype, kind)
        wanted = reference.int8_linear(case.x, case.codes, case.scale, case.bias, rule).astype(
            np.float32
        )
        for index, path in enumerate(PATHS):
            if (path == "stream" and shape[0] > 16) or (path == "sparse" and rule is None):
                continue
            count += 1
            try:
                got = executor.linear(case, rule, index).astype(np.float32)
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
    return {"cases": count, "failures": failures}


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
    output = run(command)
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
    return {
        "cases": count,
        "failures": failures,
        "chosen": "cuda" if "jaxint8_linear" in text else "not the kernel",
        "available": list(kernels.available()),
    }


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
