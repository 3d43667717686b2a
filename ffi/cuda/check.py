"""Checks the machine code of the CUDA kernels, where there need be no GPU: resources, spills, tensor-core instructions.

    python ffi/cuda/check.py build/cuda/.../*.cu.o

Prints one line per kernel and exits with status 1 if a kernel spills, uses the stack, wants more shared memory than a
block may have, lacks the matrix instructions that it is made of, or waits for each of them: the assembler serialises
wgmma where the registers of one are touched before it has been waited for, and only mentions it (C7510 to C7519). Or if
sparse products of two steps share a register of places, or one is copied: it may still be read when it is written.
Needs cuobjdump and nvdisasm (CUDA toolkit, or the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm).
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

# What must be in the code of a kernel, by the start of its name: the matrix instruction of its path.
REQUIRED = {
    "StreamKernel": r"IMMA\.16832\.S8\.S8",
    "TiledKernel": r"IMMA\.16832\.S8\.S8",
    "WgmmaKernel": r"IGMMA",
    "SparseKernel": r"IGMMA\.SP",
    "SwappedKernel": r"IGMMA",
    "NarrowKernel": r"IGMMA",
    "PairedKernel": r"IGMMA",
    "SkinnyKernel": r"IMMA\.16832\.S8\.S8",
    "GemvKernel": r"IDP\.4A\.S8\.S8",
}
# Empty on other architectures than sm_90a.
HOPPER = (
    "WgmmaKernel",
    "SparseKernel",
    "SwappedKernel",
    "NarrowKernel",
    "PairedKernel",
    "SkinnyKernel",
    "GemvKernel",
)
FORBIDDEN = {"": r"\b(LDL|STL)\b"}  # local memory: registers that did not fit
TYPES = {"0": "f32", "1": "bf16", "2": "f16"}
PLACES = {  # RowPlace
    "0": "memory",
    "1": "shared",
    "2": "registers",
    "3": "many registers",
    "4": "cluster",
}


def find_tool(name: str) -> str:
    """Returns the path of a CUDA binary tool; exits with status 2 if there is none."""
    places = [pathlib.Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13", "bin")]
    places += [
        pathlib.Path(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ
    ]
    places.append(pathlib.Path("/usr/local/cuda/bin"))
    found = shutil.which(name) or next(
        (str(p / name) for p in places if (p / name).is_file()), None
    )
    if found is None:
        sys.exit(
            f"check.py: {name} not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    return found


def dump(path: str, option: str) -> str:
    """Returns the output of cuobjdump."""
    tool = find_tool("cuobjdump")
    folders = {str(pathlib.Path(find_tool(name)).parent) for name in ("cuobjdump", "nvdisasm")}
    path_variable = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    done = subprocess.run(
        [tool, option, path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path_variable},
    )
    if done.returncode != 0:
        sys.exit(f"check.py: cuobjdump {option} {path}: {done.stderr.strip()}")
    return done.stdout


def readable(symbol: str) -> str:
    """Returns a kernel's name with its template arguments, from its mangled name."""
    match = re.search(r"\d([A-Z][A-Za-z]*Kernel)(.*)EEvN?T", symbol)
    if match is None:
        return symbol
    pattern = r"L(?:NS0_4TypeE(\d)|NS0_8RowPlaceE(\d)|[ilb](n?\d+))E"
    arguments = [
        TYPES.get(kind) or PLACES.get(place) or value.replace("n", "-")
        for kind, place, value in re.findall(pattern, match[2])
    ]
    return f"{match[1]}<{', '.join(arguments)}>"


def resources(path: str) -> dict[tuple[str, str], dict[str, int]]:
    """Returns {(architecture, symbol): {"REG": ..., "STACK": ..., "SHARED": ..., "LOCAL": ...}}."""
    found = {}
    architecture = symbol = ""
    for line in dump(path, "-res-usage").split("\n"):
        if match := re.search(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            symbol = match[1]
        elif "REG:" in line:
            found[architecture, symbol] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


def code(path: str) -> dict[tuple[str, str], str]:
    """Returns {(architecture, symbol): machine code}."""
    found: dict[tuple[str, str], list[str]] = {}
    architecture = ""
    lines: list[str] = []
    for line in dump(path, "-sass").split("\n"):
        if match := re.search(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            lines = found.setdefault((architecture, match[1]), [])
        else:
            lines.append(line)
    return {key: "\n".join(text) for key, text in found.items()}


def shares_places(text: str) -> bool:
    """Whether sparse products of two steps, two each, read places from one register, or one of these is copied."""
    read = re.findall(r"\bIGMMA\.SP\.\S+ R\d+, gdesc\[UR\d+\], R\d+, (R\d+)\b", text)
    copied = (
        re.search(rf"\b(?:IMAD\.)?MOV\S* R\d+, (?:RZ, RZ, )?(?:{'|'.join(read)})\b", text)
        if read
        else None
    )
    return bool(read) and (len(set(read)) < max(4, len(read)) or copied is not None)


def main() -> int:
    """Checks the object files named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("objects", nargs="+")
    faults = []
    count = 0
    print(
        f"{'architecture':12s} {'kernel':38s} {'registers':>9s} {'stack':>6s} {'IMMA':>6s} {'IGMMA':>6s} {'bytes':>7s}"
    )
    for path in parser.parse_args().objects:
        texts = code(path)
        for (architecture, symbol), usage in resources(path).items():
            name, text = readable(symbol), texts.get((architecture, symbol), "")
            count += 1
            matrix = [len(re.findall(rf"\b{word}\b", text)) for word in ("IMMA", "IGMMA")]
            size = 16 * len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", text, re.MULTILINE))
            print(
                f"{architecture:12s} {name:38s} {usage['REG']:9d} {usage['STACK']:6d} {matrix[0]:6d} {matrix[1]:6d} "
                f"{size:7d}"
            )
            where = f"{architecture} {name}"
            if not text:
                faults.append(f"{where}: no machine code found")
            if usage["STACK"] or usage["LOCAL"]:
                faults.append(
                    f"{where}: {usage['STACK']} bytes of stack, {usage['LOCAL']} of local memory"
                )
            faults += [
                f"{where}: no {p}"
                for k, p in REQUIRED.items()
                if name.startswith(k)
                and not re.search(p, text)
                and not (name.startswith(HOPPER) and architecture != "sm_90a")
            ]
            waits = len(re.findall(r"\bWARPGROUP\.DEPBAR\b", text))
            if 0 < matrix[1] <= waits:
                faults.append(f"{where}: {waits} waits for {matrix[1]} IGMMA: serialised")
            if shares_places(text):
                faults.append(f"{where}: sparse products share registers of their places")
            faults += [
                f"{where}: has {p}"
                for k, p in FORBIDDEN.items()
                if name.startswith(k) and re.search(p, text)
            ]
    if count == 0:
        faults.append("no kernels found")
    for fault in faults:
        print("FAULT", fault)
    print(f"{count} kernels, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
