"""How every command line starts and ends: absl flags in, an exit status out.

Status 0: done. 2: bad input, told in one line. 130: interrupted. 141: whoever read our output has
gone. Anything else is our bug and keeps its traceback. The surprising fact: the flags live in a
registry of their own and not in absl's global one, so `--help` shows the command's flags and no
other library's, and several commands can be imported into one process.
"""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

Options = Mapping[str, Any]
"""What a command is given: flag name -> value, and under "command" the command line itself."""


BROKEN_PIPE = 141
"""The exit status that a shell shows for a program that ended by SIGPIPE, as most do whose reader has gone."""


def drop_output() -> None:
    """Lets what is still to be written go nowhere: Python writes it when it ends, into the closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # not a file of the system's
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class InputError(Exception):
    """What the user gave cannot be used; the message is shown as one line."""


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Within, a ValueError or an OSError is the input's fault: no such file, a broken checkpoint.

    Keep it around the reading of input only: elsewhere the same errors are bugs, and need their
    traceback.
    """
    try:
        yield
    except BrokenPipeError:  # nobody's input: see `launch`
        raise
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def make_folder(name: str, path: str) -> None:
    """Makes a folder if it is not there; a run that cannot write should end before it starts.

    Raises:
      OSError: it cannot be made; the message names the flag.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{name}: {path} cannot be made a folder: {error.strerror}") from None


_MODELS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")


def refuse_model(name: str, path: str) -> None:
    """Refuses a folder that holds a model, before one is written there.

    Raises:
      ValueError: it holds one; the message names the flag.
    """
    held = sorted(file.name for pattern in _MODELS for file in Path(path).glob(pattern))
    if held:
        raise ValueError(f"{name}: {path}: there is a model already ({held[0]})")


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("KMGT", start=1)}


def parse_bytes(name: str, text: str, *, least: int = 1) -> int:
    """Reads a size such as 24GiB, 5GB or 1000000.

    Raises:
      ValueError: it is none, less than `least` or more than 64 bits can say; the message names the flag.
    """
    found = re.fullmatch(r"([0-9.]+) *(|[KMGT]i?)B?", text.strip())
    with contextlib.suppress(ValueError, OverflowError):
        size = int(float(found[1]) * _UNITS[found[2]]) if found else -1
        if least <= size < 2**63:
            return size
    raise ValueError(f"{name}: expected a size such as 24GiB or 5GB, got {text!r}")


def launch(
    usage: str,
    define_flags: Callable[[flags.FlagValues], None],
    run: Callable[[Options], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the command line and runs the command.

    Args:
      usage: shown by --help above the flags.
      define_flags: adds the command's flags to a registry.
      run: the command; raises InputError for bad input.
      argv: program name and arguments; None means sys.argv.

    Returns:
      The exit status.
    """
    arguments = list(sys.argv if argv is None else argv)
    program = Path(arguments[0]).name
    values = flags.FlagValues()
    define_flags(values)
    flags.DEFINE_bool("help", False, "Shows this help.", flag_values=values)
    try:
        positional = values(arguments)[1:]
        if values["help"].value:
            print(f"{usage.strip()}\n\nFlags:\n{values.get_help(prefix='  ')}", flush=True)
            return 0
        if positional:
            raise InputError(f"unexpected argument {positional[0]!r}: options are --name=value")
        run({**values.flag_values_dict(), "command": shlex.join([program, *arguments[1:]])})
        sys.stdout.flush()  # while a closed pipe can still be caught
        return 0
    except (flags.Error, InputError) as error:
        message = " ".join(str(error).split())
        print(f"{program}: {message} (see {program} --help)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        drop_output()
        return BROKEN_PIPE
