"""What a device holds of a parameter, as runs of its rows or columns.

The surprising fact: padding is what no run covers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows (or columns) ``start`` to ``stop`` of a part of a `Source`; they stand at ``at`` on the device."""

    part: int
    start: int
    stop: int
    at: int


def merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Joins pieces that follow each other on both sides."""
    last = None
    for piece in pieces:
        if last is None:
            last = piece
        elif (last.part, last.stop, last.at - last.start) == (
            piece.part,
            piece.start,
            piece.at - piece.start,
        ):
            last = dataclasses.replace(last, stop=piece.stop)
        else:
            yield last
            last = piece
    if last is not None:
        yield last
