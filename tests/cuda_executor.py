"""What tests of the CUDA kernels on the CPU share: the executor (ffi/cuda/executor), which checks every access."""

import concurrent.futures
import ctypes
import dataclasses
import os
import pathlib
import subprocess
from typing import Any

import ml_dtypes
import numpy as np

import battery
from jaxint8 import RelativeThreshold, Threshold, TopK, reference

FOLDER = pathlib.Path(__file__).parents[1] / "ffi" / "cuda"
SOURCES = (FOLDER / "executor" / "module.cc", *sorted(FOLDER.glob("*.cu")))
TYPES = {np.dtype(np.float32): 0, np.dtype(ml_dtypes.bfloat16): 1, np.dtype(np.float16): 2}
RULES = {type(None): 0, Threshold: 1, RelativeThreshold: 2, TopK: 3}
QUANTIZE, PRODUCT, LINEAR, PROLOGUE, LARGEST = range(5)
RMS_NORM, SILU_GATE = 1, 2
AUTO, STREAM, TILED, WGMMA, SPARSE, NARROW, PAIRED = -1, 0, 1, 2, 3, 4, 5
SKIP_BARRIER, SHIFT_INDEX, SWAP_FRAGMENT, SKIP_WAIT = range(1, 5)

COMPILER = os.environ.get("CXX", "c++")


class Call(ctypes.Structure):
    """Mirror of ExecutorCall in module.cc."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("kind", "rule", "column_scope", "path", "type", "planted_fault")
        ),
        ("value", ctypes.c_float),
        ("order", ctypes.c_int32),
        ("prologue", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("topk", "m", "k", "n", "multiprocessors")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("x", "w", "w_scale", "bias", "norm", "residual"),
                *("y", "lo", "hi", "row_scale", "workspace"),
            )
        ),
        ("workspace_bytes", ctypes.c_int64),
        ("planted_site", ctypes.c_char_p),
    )


class AttendCall(ctypes.Structure):
    """Mirror of ExecutorAttendCall in call.h."""

    BUFFERS = ("qkv", "cosine", "sine", "start", "slot")
    IN_PLACE = ("keys", "key_scale", "values", "value_scale", "y")
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "planted_fault", "order")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "kv_heads", "queries", "d", "slots", "multiprocessors")
        ),
        *((name, ctypes.c_void_p) for name in (*BUFFERS, *IN_PLACE)),
        ("planted_site", ctypes.c_char_p),
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """A token's attention to an int8 cache."""

    qkv: np.ndarray  # [b, (heads + 2 * kv_heads) * d]
    rope: tuple[np.ndarray, np.ndarray] | None  # float32[b, d / 2] each
    start: np.ndarray  # int32[b]
    slot: int
    keys: tuple[np.ndarray, np.ndarray]  # int8[b, kv_heads, slots, d], float32[b, kv_heads, slots]
    values: tuple[np.ndarray, np.ndarray]  # int8[b, kv_heads, d, slots], likewise

    @property
    def sizes(self) -> dict[str, int]:
        """Of a call: rows, key-value heads, query heads of one, dimensions and slots."""
        b, kv_heads, d, slots = self.values[0].shape
        queries = self.qkv.shape[1] // d // kv_heads - 2
        return {"rows": b, "kv_heads": kv_heads, "queries": queries, "d": d, "slots": slots}


@dataclasses.dataclass(frozen=True)
class Around:
    """What stands before a layer and is added behind it."""

    prologue: int = 0
    epsilon: float = 0.0
    norm: np.ndarray | None = None  # float32[k]; of RMS_NORM
    residual: np.ndarray | None = None  # x.dtype[m, n]
    in_place: bool = False  # the residual's buffer is that of the result

    def rows(self, x: np.ndarray) -> np.ndarray:
        """Returns the rows of the layer for its input, by the oracle."""
        if self.prologue == RMS_NORM:
            assert self.norm is not None
            return reference.rms_norm(x, self.norm, self.epsilon)
        return reference.silu_gate(x) if self.prologue == SILU_GATE else x


class ExecutorError(Exception):
    """What the executor found wrong."""


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an uninitialised array that starts at a multiple of 256 bytes, as device buffers do, poisoned."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.full(size + 256, 0xA5, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + size].view(dtype).reshape(shape)


def copy(array: np.ndarray) -> np.ndarray:
    """Returns an aligned copy."""
    out = aligned(array.shape, array.dtype)
    out[...] = array
    return out


class Executor:
    """The compiled executor, with one method per operation."""

    def __init__(self, library: pathlib.Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("executor_run", "executor_sites"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.executor_workspace_bytes.restype = ctypes.c_int64
        self.fault, self.site, self.order, self.cases = 0, b"", 0, 0
        self.multiprocessors = 3

    def _run(self, call: Call, **arrays: np.ndarray | None) -> None:
        for name, array in arrays.items():
            if array is not None and array.size:
                setattr(call, name, array.ctypes.data)
        call.planted_fault, call.planted_site, call.order = self.fault, self.site, self.order
        call.multiprocessors = self.multiprocessors
        call.workspace_bytes = self.library.executor_workspace_bytes(ctypes.byref(call))
        workspace = aligned((call.workspace_bytes,), np.uint8)
        call.workspace = workspace.ctypes.data if call.workspace_bytes else None
        self.cases += 1
        error = self.library.executor_run(ctypes.byref(call))
        if error is not None:
            raise ExecutorError(error.decode())

    def divide(self, x: np.ndarray, divisor: int, by_integer: bool) -> np.ndarray:
        """Returns float32 x over one of the kernels' own divisors, or any integer, as they divide."""
        y = np.empty_like(x)
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in (x, y))
        self.library.executor_divide(divisor, int(by_integer), *pointers, ctypes.c_int64(x.size))
        return y

    def round_quotients(self, x: np.ndarray, divisors: np.ndarray, bits: int) -> np.ndarray:
        """Returns the integers nearest to float32 x / divisors, for x with so many bits: 8, 11 or 24."""
        y = np.empty(x.shape, np.int32)
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in (divisors, x, y))
        self.library.executor_round(bits, *pointers, ctypes.c_int64(x.size))
        return y

    @staticmethod
    def _options(rule: Any) -> dict[str, Any]:
        return {
            "rule": RULES[type(rule)],
            "column_scope": int(getattr(rule, "scope", "token") == "column"),
            "value": float(getattr(rule, "value", 0)),
            "topk": int(getattr(rule, "k", 0)),
        }

    def quantize(self, x: np.ndarray, rule: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns lo, hi and row scales."""
        m, k = x.shape
        lo, hi, scale = (
            aligned((m, k), np.int8),
            aligned((m, k), np.int8),
            aligned((m,), np.float32),
        )
        call = Call(kind=QUANTIZE, type=TYPES[x.dtype], m=m, k=k, path=AUTO, **self._options(rule))
        self._run(call, x=copy(x), lo=lo, hi=hi, row_scale=scale)
        return lo, hi, scale

    def product(self, a: np.ndarray, codes: np.ndarray, path: int = AUTO) -> np.ndarray:
        """Returns int32[m, n]."""
        m, k = a.shape
        n = codes.shape[0]
        y = aligned((m, n), np.int32)
        self._run(Call(kind=PRODUCT, m=m, k=k, n=n, path=path), x=copy(a), w=copy(codes), y=y)
        return y

    def linear(
        self, case: battery.Case, rule: Any, path: int = AUTO, around: Around | None = None
    ) -> np.ndarray:
        """Returns the layer's output."""
        around = around or Around()
        m, (n, k) = len(case.x), case.codes.shape
        call = Call(kind=LINEAR, m=m, k=k, n=n, path=path, **self._options(rule))
        bias, norm, residual = (
            None if array is None else copy(array)
            for array in (case.bias, around.norm, around.residual)
        )
        in_place = around.in_place and residual is not None
        y = residual if in_place else aligned((m, n), case.x.dtype)
        arrays = {"w": copy(case.codes), "w_scale": copy(case.scale), "bias": bias}
        self._run_around(call, case.x, around, norm=norm, residual=residual, y=y, **arrays)
        assert y is not None
        return y

    def prologue(self, x: np.ndarray, k: int, around: Around) -> np.ndarray:
        """Returns the rows after what stands before a layer."""
        y = aligned((len(x), k), x.dtype)
        norm = None if around.norm is None else copy(around.norm)
        self._run_around(Call(kind=PROLOGUE, m=len(x), k=k, path=AUTO), x, around, norm=norm, y=y)
        return y

    def largest(self, x: np.ndarray, count: int) -> np.ndarray:
        """Returns the columns of the largest of each row of float32 x: int32[m, count]."""
        m, n = x.shape
        y = aligned((m, count), np.int32)
        self._run(Call(kind=LARGEST, m=m, k=n, n=count), x=copy(x), y=y)
        return y

    def attend(self, step: Step) -> tuple[np.ndarray, ...]:
        """Returns y[b, heads * d], and key codes and scales and value codes and scales with the token's."""
        call, arrays = self.attend_call(step)
        self.cases += 1
        self.library.executor_attend.restype = ctypes.c_char_p
        error = self.library.executor_attend(ctypes.byref(call))
        if error is not None:
            raise ExecutorError(error.decode())
        return arrays["y"], *(arrays[name] for name in AttendCall.IN_PLACE[:-1])

    def attend_call(self, step: Step) -> tuple[AttendCall, dict[str, np.ndarray]]:
        """Returns a call, and its buffers, copies by the names of its fields."""
        sizes = step.sizes
        heads = sizes["kv_heads"] * sizes["queries"]
        cosine, sine = step.rope or (None, None)
        cache = (*step.keys, *step.values, np.zeros((len(step.qkv), heads * sizes["d"])))
        given = (step.qkv, cosine, sine, step.start, np.asarray([step.slot], np.int32), *cache)
        names = (*AttendCall.BUFFERS, *AttendCall.IN_PLACE)
        arrays = {n: copy(a) for n, a in zip(names, given, strict=True) if a is not None}
        arrays["y"] = aligned(arrays["y"].shape, step.qkv.dtype)
        call = AttendCall(type=TYPES[step.qkv.dtype], **sizes)
        call.multiprocessors, call.order = self.multiprocessors, self.order
        call.planted_fault, call.planted_site = self.fault, self.site
        for name, array in arrays.items():
            if array.size:
                setattr(call, name, array.ctypes.data)
        return call, arrays

    def _run_around(
        self, call: Call, x: np.ndarray, around: Around, **arrays: np.ndarray | None
    ) -> None:
        call.type = TYPES[x.dtype]
        call.prologue, call.epsilon = around.prologue, around.epsilon
        self._run(call, x=copy(x), **arrays)

    def race(self, readers: int, barrier: int, order: int = 0) -> str | None:
        """Returns what is said of a byte that several threads read and one of them writes, see executor_race."""
        self.library.executor_race.restype = ctypes.c_char_p  # a GPU's library has none
        error = self.library.executor_race(readers, barrier, order)
        return None if error is None else error.decode()

    def sites(self) -> list[tuple[str, int]]:
        """Returns (place in the source, fault that can be planted there) of the last run."""
        lines = self.library.executor_sites().decode().split("\n")
        return [(place, int(fault)) for place, fault in (line.split() for line in lines if line)]


def build(folder: pathlib.Path) -> Executor:
    """Compiles the executor: every file of the kernels as C++."""
    library = folder / "executor.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fPIC"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]

    def run(*arguments: str) -> None:
        done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def compile_one(source: pathlib.Path) -> str:
        result = str(folder / f"{source.name}.o")
        run(*flags, *warnings, "-x", "c++", "-c", str(source), "-o", result)
        return result

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    run("-shared", *objects, "-o", str(library))
    return Executor(library)


def expect_linear(
    executor: Executor,
    case: battery.Case,
    rule: Any,
    path: int = AUTO,
    around: Around | None = None,
) -> None:
    y = executor.linear(case, rule, path, around)
    wanted = wanted_linear(case, rule, around or Around())
    np.testing.assert_array_equal(y.astype(np.float32), wanted.astype(np.float32))


def suits_paired(shape: tuple[int, int, int], rule: Any) -> bool:
    """Whether a layer can be done by paired.h, which otherwise another kernel does in its place."""
    m, k, _ = shape
    by_column = getattr(rule, "scope", "token") == "column" and m > 1
    return 0 < k <= 2048 and k % 16 == 0 and not by_column and not isinstance(rule, TopK)


def wanted_linear(case: battery.Case, rule: Any, around: Around) -> np.ndarray:
    """Returns the layer by the oracle, with what stands around it."""
    x = around.rows(case.x)
    wanted = reference.int8_linear(x, case.codes, case.scale, case.bias, rule)
    if around.residual is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            sums = around.residual.astype(np.float32) + wanted.astype(np.float32)
            wanted = sums.astype(case.x.dtype)
    return wanted


def wanted_largest(x: np.ndarray, count: int) -> np.ndarray:
    """Returns the columns of the largest of each row, falling: NaNs first, of equal values the lower column."""
    nan = np.isnan(x)
    # Stable: rows that are equal in both keys stay in order. A zero of either sign is equal to the other.
    order = np.lexsort((-np.where(nan, np.float32(0), x), ~nan), axis=-1)
    return order[:, :count].astype(np.int32)


def make_around(
    shape: tuple[int, int, int],
    dtype: type,
    prologue: int,
    kind: str = "outliers",
    residual: bool = True,
) -> tuple[battery.Case, Around]:
    """Returns a layer whose input is what its prologue takes, and what stands around it."""
    m, k, n = shape
    case = battery.make(shape, dtype, kind)
    rng = np.random.default_rng([m, k, n, prologue])
    if prologue == SILU_GATE:
        gate = battery.make((m, 2 * k, n), dtype, kind).x
        case = dataclasses.replace(case, x=gate)
    norm = rng.normal(1, 0.5, k).astype(np.float32) if prologue == RMS_NORM else None
    added = rng.normal(scale=4, size=(m, n)).astype(dtype) if residual else None
    if added is not None and kind == "nan" and added.size:
        added[0, 0], added[-1, -1] = np.nan, np.inf
    return case, Around(prologue, 1e-5, norm, added, in_place=n % 2 == 0)
