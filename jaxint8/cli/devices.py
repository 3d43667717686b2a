"""The devices of a command: a mesh of them, on one machine or under several processes.

Every process of a run is the same command line but for its number. The surprising fact is what a dead process does to
the others: left alone they would wait for it, in a sum over all devices or at the end of the run; so an error ends a
process of several at once, and the one line that says why is the last thing it does.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator

import jax
from absl import flags
from jax.sharding import AxisType, Mesh

from jaxint8.cli import app

# Seconds without a sign of life after which a process counts as dead.
HEARTBEAT = 20
# Seconds in which all processes must have come.
START = 120


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of all commands that run on several devices to `values`."""
    flags.DEFINE_string(
        "mesh",
        None,
        "DATAxMODEL devices, such as 2x4: sequences are split over the first number, weights over the second. (For "
        "several devices of a CPU set JAX_NUM_CPU_DEVICES.)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0, in a run of several processes; or JAX_COORDINATOR_ADDRESS. Under Slurm (srun) none of "
        "the three is needed.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "Processes of the run; or JAX_NUM_PROCESSES.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "Number of this process, from 0; or JAX_PROCESS_ID, or (Kubernetes) JOB_COMPLETION_INDEX.",
        lower_bound=0,
        flag_values=values,
    )


@contextlib.contextmanager
def session(options: app.Options) -> Iterator[Mesh | None]:
    """Joins the processes and makes the mesh, both if asked for; only process 0 writes to the screen.

    Raises:
      InputError: the flags do not fit each other, the devices or the other processes.
    """
    with app.input_errors():
        shape = parse_mesh(options["mesh"])
        joined = _join(options)
        mesh = _mesh(shape)
    if not joined:
        yield mesh
        return
    try:
        with _screen(is_first()):
            yield mesh
    except BaseException as error:
        _leave(error)
    # Without this the end of the run would wait for minutes for a process that has died since.
    try:
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:
        _leave(error)


@contextlib.contextmanager
def _screen(first: bool) -> Iterator[None]:
    """Lets Python write to the screen in the first process only, and libraries to stderr only (gloo uses stdout)."""
    with contextlib.ExitStack() as stack:
        sys.stdout.flush()
        screen = os.dup(1)
        os.dup2(2, 1)
        stack.callback(os.close, screen)
        stack.callback(os.dup2, screen, 1)
        file = os.dup(screen) if first else os.open(os.devnull, os.O_WRONLY)
        out = stack.enter_context(os.fdopen(file, "w"))
        stack.enter_context(contextlib.redirect_stdout(out))
        if not first:
            stack.enter_context(contextlib.redirect_stderr(out))
        yield


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def parse_mesh(text: str | None) -> tuple[int, int] | None:
    """Returns (data, model) of "2x4", None of None.

    Raises:
      ValueError: it is neither.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ValueError(f"mesh: expected DATAxMODEL such as 2x4, got {text!r}")
    return int(found[1]), int(found[2])


def _join(options: app.Options) -> bool:
    """Joins the other processes if there are any to join."""
    given = {
        "coordinator_address": _choice(options, "coordinator_address", "JAX_COORDINATOR_ADDRESS"),
        "num_processes": _choice(options, "num_processes", "JAX_NUM_PROCESSES"),
        "process_id": _choice(options, "process_id", "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"),
    }
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1
    if given["coordinator_address"] is None and given["num_processes"] is None and not slurm:
        if options["process_id"] is not None:
            raise ValueError("process_id: expected coordinator_address and num_processes with it")
        return False
    missing = [name for name, value in given.items() if value is None]
    if missing and not slurm:
        raise ValueError(
            f"{missing[0]}: expected with the other two, in a run of several processes"
        )
    numbers = {
        name: None if (value := given[name]) is None else int(value)
        for name in ("num_processes", "process_id")
    }
    count, own = numbers.values()
    if count is not None and own is not None and own >= count:
        raise ValueError(f"process_id: expected less than num_processes = {count}, got {own}")
    address = given["coordinator_address"]
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        raise ValueError(f"coordinator_address: expected host:port, got {address!r}")
    if options["mesh"] is None:
        raise ValueError("mesh: expected for a run of several processes")
    try:
        jax.distributed.initialize(
            given["coordinator_address"],
            count,
            own,
            cluster_detection_method="slurm" if slurm and missing else None,
            initialization_timeout=START,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"coordinator_address: the processes did not meet: {error}") from None
    return True


def _choice(options: app.Options, flag: str, *variables: str) -> str | None:
    """The value of a flag, or of the first of some environment variables that is set."""
    if options[flag] is not None:
        return str(options[flag])
    return next((os.environ[name] for name in variables if os.environ.get(name)), None)


def _mesh(shape: tuple[int, int] | None) -> Mesh | None:
    if shape is None:
        return None
    needed, there = shape[0] * shape[1], jax.device_count()
    if needed > there or (jax.process_count() > 1 and needed != there):
        raise ValueError(
            f"mesh: {shape[0]}x{shape[1]} needs {needed} devices, and there are {there} ({jax.default_backend()})"
        )
    kinds = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, ("data", "model"), kinds, devices=jax.devices()[:needed])


def _leave(error: BaseException) -> None:
    """Says why and ends this process without waiting for the others."""
    screen, name = sys.__stderr__ or sys.stderr, f"process {jax.process_index()}"
    status = 1
    if isinstance(error, app.InputError | flags.Error):
        print(f"{name}: {' '.join(str(error).split())}", file=screen)
        status = 2
    elif isinstance(error, KeyboardInterrupt):
        print(f"{name}: interrupted", file=screen)
        status = 130
    elif isinstance(error, BrokenPipeError):
        app.drop_output()
        status = app.BROKEN_PIPE
    elif isinstance(error, jax.errors.JaxRuntimeError):
        reason = " ".join(str(error).split())[:300]
        print(
            f"{name}: another process of this run has died or cannot be reached: {reason}",
            file=screen,
        )
    else:
        traceback.print_exception(error, file=screen)
    screen.flush()
    sys.stdout.flush()
    os._exit(status)
