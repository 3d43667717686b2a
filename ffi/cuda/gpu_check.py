"""Builds the CUDA kernels on a machine with a GPU, checks them against the oracle, and times them beside XLA.

    python ffi/cuda/gpu_check.py --output=DIR [--seconds=540] [--stages=build,native,...]

Each stage runs in its own process with a limit, so that one that hangs or crashes leaves the others their time; results
are written to DIR after every stage (result.json, log.txt) and summed up in small tables at the end. Needs jax with
CUDA, nvcc, cmake, ninja and pybind11; nothing is fetched and nothing outside DIR and build/ is written.
"""

import argparse
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu-check"
SITE = BUILD / "site"
# Stage -> seconds it may take at most.
STAGES = {
    "build": 420,
    "native": 180,
    "probe": 60,
    "jax": 120,
    "model": 120,
    "sizes": 90,
    "sweep": 90,
    "block": 90,
    "layers": 170,
    "peers": 120,
    "xla": 240,
    "decode": 280,
    "profile": 100,
    "largest": 60,
    "attend": 60,
    "mesh": 560,
    "memcheck": 100,
    "racecheck": 100,
}
# Stages that run only where they are named, and their modules.
EXTRA = {
    "peers": "gpu_peers",
    "xla": "gpu_peers",
    "decode": "gpu_decode",
    "profile": "gpu_profile",
    "largest": "gpu_profile",
    "attend": "gpu_attend",
    "mesh": "gpu_mesh",
}


def run(command: list[str], **options: Any) -> str:
    """Runs a command, returns what it printed; raises with its output if it fails."""
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


# --- Stages. Each returns what goes into the report.


def find_nvcc() -> str:
    """Returns the path of nvcc."""
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not pathlib.Path(found).is_file():
        raise RuntimeError("nvcc not found: put the CUDA toolkit's bin on the PATH")
    return found


def stage_build() -> dict[str, Any]:
    """Compiles both extensions for this machine's GPU, and lays the package out in build/gpu-check/site."""
    pybind = run([sys.executable, "-m", "pybind11", "--cmakedir"]).strip()
    configure = [
        "cmake",
        "-S",
        str(ROOT / "ffi"),
        "-B",
        str(BUILD),
        "-G",
        "Ninja",
        f"-Dpybind11_DIR={pybind}",
    ]
    configure += [
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DJAXINT8_CUDA=auto",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    begin = time.monotonic()
    output = run(configure, env={**os.environ, "CUDACXX": find_nvcc()})
    if "CUDA kernels for" not in output:
        raise RuntimeError(f"no GPU found by cmake:\n{output[-2000:]}")
    run(["ninja", "-C", str(BUILD), "_cpu", "_cuda", "jaxint8_gpu_executor"])
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(
        ROOT / "jaxint8", SITE / "jaxint8", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(
        ROOT / "models", SITE / "jaxint8" / "models", ignore=shutil.ignore_patterns("__pycache__")
    )
    for library in BUILD.rglob("_c*.so"):
        if SITE not in library.parents:
            shutil.copy(library, SITE / "jaxint8")
    seconds = time.monotonic() - begin
    objects = [str(path) for path in BUILD.rglob("*.cu.o") if "gpu_executor" not in str(path)]
    check = subprocess.run(
        [sys.executable, str(ROOT / "ffi" / "cuda" / "check.py"), *objects],
        text=True,
        capture_output=True,
        check=False,
    )
    return {
        "seconds": seconds,
        "machine_code": check.stdout + check.stderr,
        "machine_code_ok": check.returncode == 0,
    }


# --- The driver.


def spawn(stage: str, limit: float) -> dict[str, Any]:
    """Runs one stage in a process of its own; returns its result, or what became of it."""
    paths = os.pathsep.join([str(SITE), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, __file__, f"--stage={stage}", f"--limit={limit}"]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            timeout=limit,
            check=False,
        )
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        status = -1
    entry: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1), "status": status}
    if status == 0 and "RESULT " in output:
        entry.update(json.loads(output.rsplit("RESULT ", 1)[1].split("\n", 1)[0]))
    else:
        entry["error"] = f"ran past {limit:.0f} s" if status == -1 else f"status {status}"
        entry["output"] = output[-6000:]
    return entry


def summarise(report: dict[str, Any]) -> str:
    """Returns the small tables."""
    lines = []
    for stage, entry in report.items():
        keys = [key for key in entry if key not in ("rows", "output", "machine_code", "unit")]
        lines.append(f"{stage:10s} " + ", ".join(f"{key}={_short(entry[key])}" for key in keys))
        if "error" in entry:
            lines.append("    " + entry.get("output", "")[-1500:].replace("\n", "\n    "))
    sweep = report.get("sweep", {}).get("rows", [])
    if sweep:
        lines.append(
            "\nkernels in CUDA graphs: us (TOP/s, TB/s of weights), PyTorch in the same dtype / this"
        )
        for row in sweep:
            ratio = f" {row['bf16'] / row['us']:.2f}" if row["bf16"] else ""
            lines.append(
                f"{row['k']:6d}->{row['n']:<6d} m={row['m']:<5d} {row['rule']:19s} {row['us']:8.1f} "
                f"({row['tera_ops']:6.0f}, {row['tb_per_s']:5.2f}){ratio}"
            )
    for stage in ("decode", "mesh"):
        for row in report.get(stage, {}).get("rows", []):
            lines.append("8B  " + ", ".join(f"{key}={_short(value)}" for key, value in row.items()))
    for row in report.get("profile", {}).get("rows", []):
        lines.append(
            f"{row['method']}, batch {row['batch']}: {row['us']:.0f} us a step of {row['layers']} layers"
        )
        lines += [
            f"    {kernel['us']:8.1f} us in {kernel['calls']:5.1f} x {kernel['name']}"
            for kernel in row["kernels"]
        ]
    titles = {
        "sizes": "kernels in CUDA graphs",
        "block": "behind attention, in CUDA graphs",
        "layers": "layer through JAX",
        "peers": "bitsandbytes",
        "xla": "XLA under jit",
        "largest": "64 largest of each row",
        "attend": "a token's attention to an int8 cache",
    }
    for stage, title in titles.items():
        rows = report.get(stage, {}).get("rows", [])
        if not rows:
            continue
        names = [name for row in rows for name in row if name not in ("size", "m", "k", "n")]
        names = list(dict.fromkeys(names))
        lines.append(f"\n{title}, us; in brackets bf16 / this")
        lines.append(f"{'size':16s}{'m':>6s}" + "".join(f"{name:>18s}" for name in names))
        for row in rows:
            cells = []
            for name in names:
                value = row.get(name)
                ratio = f" ({row['bf16'] / value:.2f})" if value and row.get("bf16") else ""
                cells.append(f"{'-' if value is None else f'{value:.1f}{ratio}':>18s}")
            lines.append(f"{row['size']:16s}{row['m']:6d}" + "".join(cells))
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) < 300 else text[:300] + "..."


def main() -> int:
    """Runs the stages, or one of them (in a process of its own)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=str(BUILD / "report"))
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--stages", default=",".join(s for s in STAGES if s not in EXTRA))
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        # An editable install of the package would come before the one built here.
        sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
        timing = arguments.stage in ("probe", "sizes", "sweep", "layers")
        modules = {"build": "gpu_check", "block": "gpu_block", **EXTRA}
        name = modules.get(arguments.stage, "gpu_timing" if timing else "gpu_stages")
        if arguments.limit:
            importlib.import_module("gpu_check").STAGES[arguments.stage] = arguments.limit
        result = getattr(importlib.import_module(name), f"stage_{arguments.stage}")()
        print("RESULT " + json.dumps(result), flush=True)
        return 0
    output = pathlib.Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    report: dict[str, Any] = {}
    for stage in arguments.stages.split(","):
        left = end - time.monotonic()
        if left < 5:
            report[stage] = {"error": "no time left"}
            continue
        report[stage] = spawn(stage, min(STAGES[stage], left))
        print(
            f"{stage}: {report[stage]['seconds']} s, {report[stage].get('error', 'done')}",
            flush=True,
        )
        (output / "result.json").write_text(json.dumps(report, indent=1))
        if stage == "build" and "error" in report[stage]:
            break
    text = summarise(report)
    (output / "summary.txt").write_text(text + "\n")
    print(text)
    return int(any("error" in entry or entry.get("failures") for entry in report.values()))


if __name__ == "__main__":
    sys.exit(main())
