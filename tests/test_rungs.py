"""The CPU rungs that Python cannot choose on this machine, and what their machine code holds: ffi/cpu/check.py."""

import fcntl
import pathlib
import platform
import shutil
import subprocess
import sys

import pytest

from jaxint8 import kernels

ROOT = pathlib.Path(__file__).parents[1]
BUILD = ROOT / "build" / "check"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_battery_and_machine_code():
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:  # of two runs of the tests, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, ROOT / "ffi" / "cpu" / "check.py", BUILD],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    ran = done.stdout.splitlines()[0].partition(": ")[2].split(", ")
    assert set(kernels.available_rungs()) <= set(ran)
    if "avx512_vnni" in ran:
        assert {"avx_vnni as EVEX", "amx_int8 emulated"} <= set(ran)
        assert "a planted fault is noticed" in done.stdout
    if shutil.which("objdump") and platform.machine() == "x86_64":
        assert "machine code of x86_64: scalar" in done.stdout
