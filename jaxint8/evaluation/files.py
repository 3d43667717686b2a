"""Files that appear whole or not at all.

The surprising fact: the temporary file stands beside the target, not in the system's own folder,
for a rename is atomic only within one file system.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxint8.checkpoint.base import naming


def write_atomically(target: Path, fill: Callable[[Path], Any]) -> None:
    """Fills a temporary file beside the target, then renames it: readers never see half a file."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with naming(target):
            fill(temporary)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def damaged(path: Path) -> str:
    """What to say of a file of results that cannot be read."""
    return f"output: {path} is damaged: remove it to have it measured again"
