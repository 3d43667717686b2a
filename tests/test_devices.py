"""Runs of several processes: flags, the same results as one process, and the end of a run that loses one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_cli import TEXT, checkpoint  # noqa: F401 (a fixture)

from jaxint8.cli import app, devices

WAIT = 120
MAIN = "import sys; from jaxint8.cli import {0}; sys.exit({0}.main(['jaxint8-{0}', *sys.argv[1:]]))"


def run(command, *arguments, local_devices):
    """Starts a command line in a process of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(local_devices)}
    return subprocess.Popen(
        [sys.executable, "-c", MAIN.format(command), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pair(command, *arguments):
    """Two processes of four devices each."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    common = [*arguments, f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    return [run(command, *common, f"--process_id={i}", local_devices=4) for i in range(2)]


def outcome(process):
    out, err = process.communicate(timeout=WAIT)
    return process.returncode, out, err


def test_two_processes_give_the_perplexity_of_one(checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text(TEXT)
    common = [
        f"--model={checkpoint}",
        f"--text={tmp_path / 'text.txt'}",
        "--methods=relative",
        "--window=32",
        "--batch_size=2",
        # In one process too: with other numbers of heads a device's float attention is rounded otherwise (by 1e-6),
        # which may turn a code and then moves a perplexity by 1e-4. test_placement.py compares with one device.
        "--mesh=2x4",
    ]
    single = run("eval", *common, f"--output={tmp_path / 'one'}", local_devices=8)
    both = pair("eval", *common, f"--output={tmp_path / 'two'}")
    assert outcome(single)[0] == 0
    first, second = map(outcome, both)
    assert (first[0], *second[:2]) == (0, 0, ""), (first, second)
    one, two = (json.loads((tmp_path / x / "report.json").read_text()) for x in ("one", "two"))
    assert two["environment"]["mesh"] == "2x4" and two["environment"]["devices"] == 8
    (one,), (two,) = one["rows"], two["rows"]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
    assert two["outlier_fraction"] == one["outlier_fraction"]


def test_two_processes_give_the_text_of_one(checkpoint):  # noqa: F811
    common = [f"--model={checkpoint}", "--prompt=the quick", "--prompt=a", "--max_new_tokens=8"]
    single, both = (
        run("generate", *common, local_devices=1),
        pair("generate", *common, "--mesh=1x8"),
    )
    expected = outcome(single)
    first, second = map(outcome, both)
    assert (expected[0], first[0], *second[:2]) == (0, 0, 0, ""), (first, second)
    assert first[1] == expected[1] and "the quick" in first[1]


@pytest.mark.parametrize("victim", [1, 0])
def test_a_dead_process_ends_the_run_with_a_message(checkpoint, victim):  # noqa: F811
    """Killed while both sum over all devices, step after step."""
    common = [f"--model={checkpoint}", "--max_new_tokens=200", "--mesh=2x4", "--temperature=1"]
    both = pair("generate", *common, *[f"--prompt={c}" for c in "abcdefgh"])
    time.sleep(8)  # in the middle of compiling or of a step, at any rate after they have met
    both[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    status, _, err = outcome(both[1 - victim])
    both[victim].communicate()
    assert status not in (0, None)
    assert time.monotonic() - start < 2 * devices.HEARTBEAT + 20
    # Ours; or, where the coordinator itself died, that of JAX's service.
    assert "has died" in err or "coordination service" in err or "distributed service" in err, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mesh": "8"}, "mesh: expected DATAxMODEL such as 2x4, got '8'"),
        ({"mesh": "0x8"}, "mesh: expected DATAxMODEL"),
        ({"mesh": "4x4"}, "mesh: 4x4 needs 16 devices, and there are 8"),
        ({"process_id": 1}, "process_id: expected coordinator_address and num_processes with it"),
        (
            {"coordinator_address": "nonsense", "num_processes": 2, "process_id": 0},
            "coordinator_address: expected host:port, got 'nonsense'",
        ),
        ({"num_processes": 2, "process_id": 0}, "coordinator_address: expected with the other two"),
        (
            {"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 2},
            "process_id: expected less than num_processes = 2, got 2",
        ),
        (
            {"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 0},
            "mesh: expected for a run of several processes",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
    options = dict.fromkeys(("mesh", "coordinator_address", "num_processes", "process_id")) | flags
    with pytest.raises(app.InputError, match=message), devices.session(options):
        pass


def test_the_environment_of_a_scheduler_is_read(monkeypatch):
    """Kubernetes numbers the pods of an indexed job; Slurm needs nothing but srun."""
    calls = []
    monkeypatch.setattr(devices.jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    options = dict.fromkeys(("coordinator_address", "num_processes", "process_id"))
    options["mesh"] = "1x8"
    assert not devices._join(options)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "job-0.job:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert devices._join(options)
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert devices._join(options)
    assert [a for a, _ in calls] == [("job-0.job:1234", 4, 3), (None, None, None)]
    assert [k["cluster_detection_method"] for _, k in calls] == [None, "slurm"]


def test_meshes_are_read():
    assert devices.parse_mesh("2x4") == (2, 4) and devices.parse_mesh(None) is None
