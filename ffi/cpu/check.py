"""Checks the CPU kernels beyond what tests in Python reach: the battery of every rung, and the machine code.

    python ffi/cpu/check.py build/check [--cross] [--sanitize=address,undefined] [--sanitize=thread]

Builds the battery (battery.cc) with CMake, runs it, and looks at the machine code: each rung must hold the instruction
that it is made of and none that its processors lack, and share no function with other rungs (the linker would keep one
copy, which might be too new for this machine). With --cross also, where the tools exist: the battery on older emulated
x86-64 processors, and built for aarch64 on three emulated ones; every processor must choose the rungs that it has, and
the checksum of the results must be the same everywhere. A missing tool is named in a line and skipped. With --sanitize
also the battery of this machine's rungs, built with the compiler's sanitizers: accesses beyond a buffer, undefined
behaviour and races end it.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

# What must be in the machine code of a file, and what must not.
NEWER = r"%zmm|%[xy]mm(1[6-9]|[23]\d)|%k[1-7]"  # AVX-512
AVX512_VNNI = (
    "avx512_vnni",
    "fours_avx512",
    "lanes_avx512",
    "picking_lanes_avx512",
    "streams_avx512",
    "strips_avx512",
    "tiles_avx512",
)
# Compiled for any machine, so that they may share functions.
PLAIN = ("job", "job_rows", "job_high", "job_products", "attend", "dispatch")
CODE = {
    "x86_64": {
        "scalar": (r"mulps", r"%[yz]mm"),
        **dict.fromkeys(PLAIN, (r"ret", r"%[yz]mm")),
        "processor": (r"cpuid|__cpu_model", r"%[yz]mm"),
        "avx2": (r"vpmaddwd .*%ymm", rf"vpdp|{NEWER}"),
        "avx_vnni": (r"\{vex\} vpdpbusd .*%ymm", NEWER),
        **dict.fromkeys(AVX512_VNNI, (r"vpdpbusd .*%zmm", r"vpdpbusd .*\{vex\}")),
        "amx_int8": (r"tdpbssd\s+%tmm", r"tdpbu|tdpbsu|tdpbf|tdpfp"),
    },
    "aarch64": {
        "scalar": (r"fmul", r"\b(sdot|smmla)\b"),
        "neon_dotprod": (r"\bsdot\b", r"\bsmmla\b"),
        "neon_i8mm": (r"\bsmmla\b", r"\bz\d+\."),
    },
}
# Rungs of x86-64 that a machine may lack.
RUNGS = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8")
# Emulated processors, and the rungs that they have, of those that the emulator knows.
OLDER = {"Nehalem": (), "Haswell": ("avx2",)}
ARM = {
    "cortex-a72": (),
    "neoverse-n1": ("neon_dotprod",),
    "max": ("neon_i8mm", "neon_dotprod"),
}
CROSS = "aarch64-linux-gnu"


class CheckError(Exception):
    """What is wrong with the kernels."""


def find(tool: str) -> str | None:
    """Returns the path of a tool: beside this interpreter, or on the PATH."""
    beside = pathlib.Path(sys.executable).parent / tool
    return str(beside) if beside.is_file() else shutil.which(tool)


def build(folder: pathlib.Path, *options: str) -> pathlib.Path:
    """Builds the battery in a folder, as far as it is out of date, and returns the path of the program."""
    source = pathlib.Path(__file__).parents[1]
    cmake, ninja = find("cmake"), find("ninja")
    if cmake is None or ninja is None:
        raise CheckError("cmake and ninja are needed to build the battery: run `make setup`")
    configure = [cmake, "-S", str(source), "-B", str(folder), "-G", "Ninja", *options]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DJAXINT8_PYTHON=OFF", "-DJAXINT8_TOOLS=ON"]
    for command in (
        [*configure, "-DJAXINT8_CUDA=off"],
        [ninja, "-C", str(folder), "jaxint8_battery"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CheckError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return folder / "jaxint8_battery"


def run_battery(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[dict[str, str], str]:
    """Runs the battery; returns what it says of each rung, and the checksum. Raises CheckError if a rung differs."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    rungs = dict(re.findall(r"^(\w[\w ]*?) +(ok|FAILED|not supported here)$", done.stdout, re.M))
    summary = re.search(r"^(\d+) cases, checksum (\w+)$", done.stdout, re.M)
    if done.returncode != 0 or summary is None or "scalar" not in rungs:
        raise CheckError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    good = [name for name, state in rungs.items() if state == "ok"]
    print(f"{summary[1]} cases, checksum {summary[2]}: {', '.join(good)}")
    return rungs, summary[2]


def check_code(folder: pathlib.Path, machine: str, prefix: str = "") -> None:
    """Checks the machine code of the objects in a build folder."""
    objdump, nm = find(f"{prefix}objdump"), find(f"{prefix}nm")
    if objdump is None or nm is None:
        print(
            f"skipped: machine code of {machine}: {prefix}objdump and {prefix}nm (binutils) not found"
        )
        return
    checked = []
    for name, (required, forbidden) in CODE.get(machine, {}).items():
        places = [
            folder / "CMakeFiles" / f"jaxint8_{target}.dir" / "cpu" / f"{name}.cc.o"
            for target in (name, "cpu", "avx512_vnni")
        ]
        path = next((place for place in places if place.is_file()), None)
        if path is None:  # this compiler does not know the instruction set
            continue
        code = subprocess.run(
            [objdump, "-d", "--no-show-raw-insn", "-r", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if not re.search(required, code):
            raise CheckError(f"{path}: expected an instruction that matches {required!r}")
        if match := re.search(f".*({forbidden}).*", code):
            raise CheckError(f"{path}: too new for its processors: {match[0].strip()}")
        symbols = subprocess.run([nm, "-C", str(path)], capture_output=True, text=True, check=True)
        shared = re.findall(r"^\w+ [WVu] (.*)$", symbols.stdout, re.M)
        if shared and name not in (*PLAIN, "processor"):
            raise CheckError(f"{path}: shares {shared[0]} with files for other processors")
        checked.append(name)
    print(f"machine code of {machine}: {', '.join(checked)}")


def check_native(folder: pathlib.Path) -> tuple[dict[str, str], str]:
    """Checks this machine's battery and machine code; returns what `run_battery` does."""
    battery = build(folder)
    rungs, checksum = run_battery([str(battery)])
    check_code(folder, os.uname().machine)
    if rungs.get("amx_int8 emulated") == "ok":
        try:
            run_battery([str(battery)], {"JAXINT8_PLANTED_FAULT": "1"})
        except CheckError:
            print("a planted fault is noticed")
        else:
            raise CheckError("a planted fault was not noticed")
    return rungs, checksum


def check_emulated(
    battery: pathlib.Path,
    emulator: Sequence[str],
    processors: Mapping[str, Sequence[str]],
    checksum: str,
) -> None:
    """Runs the battery on emulated processors: they must use their rungs, no other, and give the same results."""
    for processor, expected in processors.items():
        print(f"{processor}: ", end="", flush=True)
        rungs, found = run_battery([emulator[0], "-cpu", processor, *emulator[1:], str(battery)])
        good = {name for name, state in rungs.items() if state == "ok"} - {"scalar"}
        if good != set(expected) & set(rungs):
            raise CheckError(f"{processor}: expected {sorted(expected)}, it ran {sorted(good)}")
        if found != checksum:
            raise CheckError(f"{processor}: results differ: checksum {found}, expected {checksum}")


def check_cross(folder: pathlib.Path, checksum: str) -> None:
    """Checks other processors, as far as there are tools."""
    emulator = find("qemu-x86_64")
    if os.uname().machine != "x86_64" or emulator is None:
        print("skipped: older x86-64 processors: qemu-x86_64 (qemu-user) not found")
    else:
        check_emulated(folder / "jaxint8_battery", [emulator], OLDER, checksum)
    compiler, emulator = find(f"{CROSS}-g++"), find("qemu-aarch64")
    if compiler is None or emulator is None:
        print(f"skipped: aarch64: {CROSS}-g++ (g++-{CROSS}) or qemu-aarch64 (qemu-user) not found")
        return
    target = folder / "aarch64"
    battery = build(
        target,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    )
    check_code(target, "aarch64", f"{CROSS}-")
    check_emulated(battery, [emulator, "-L", f"/usr/{CROSS}"], ARM, checksum)


def check_sanitized(
    folder: pathlib.Path, sanitizers: str, rungs: Mapping[str, str], checksum: str
) -> None:
    """Runs the battery with sanitizers, of the rungs that run here: others would take minutes to compile."""
    left_out = [name for name in RUNGS if rungs.get(name) == "not supported here"]
    if rungs.get("amx_int8 emulated") == "ok":  # stand-ins for them are made of the same files
        left_out = []
    battery = build(
        folder / sanitizers.replace(",", "-"),
        f"-DJAXINT8_SANITIZE={sanitizers}",
        *(f"-DJAXINT8_COMPILES_{name.upper()}=OFF" for name in left_out),
    )
    print(f"{sanitizers}: ", end="", flush=True)
    _, found = run_battery([str(battery)], {"UBSAN_OPTIONS": "print_stacktrace=1"})
    if found != checksum:
        raise CheckError(f"{sanitizers}: results differ: checksum {found}, expected {checksum}")


def main() -> int:
    """Returns the exit status: 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="where to build")
    parser.add_argument("--cross", action="store_true", help="also other processors, emulated")
    parser.add_argument(
        "--sanitize",
        action="append",
        default=[],
        choices=("address,undefined", "thread"),
        help="also with these sanitizers of the compiler",
    )
    arguments = parser.parse_args()
    try:
        rungs, checksum = check_native(arguments.folder)
        if arguments.cross:
            check_cross(arguments.folder, checksum)
        for sanitizers in arguments.sanitize:
            check_sanitized(arguments.folder, sanitizers, rungs, checksum)
    except CheckError as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
