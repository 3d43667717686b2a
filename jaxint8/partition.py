"""How the arrays of one linear layer lie on a mesh of devices, and the map that runs a part of it on each.

Column-parallel splits the output channels (n), row-parallel the inputs (k), batch-parallel the rows of x; all can be
combined. The surprising fact is why this exists at all: to the compiler a kernel is opaque, so left to itself it would
gather every operand, weights included, on every device.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxint8.shards import Shards

Axes = str | tuple[str, ...] | None
"""Mesh axes over which one axis of an array is split, the major one first."""


@dataclasses.dataclass(frozen=True)
class Partition:
    """Where the arrays of an int8_linear are split; hashable, so that it can be a static argument of jit.

    Attributes:
      mesh: the devices, with "data" and "model" as the usual names of its axes.
      rows: mesh axes over which the leading axes of x are split: one entry for each axis, as in a PartitionSpec; a
        name alone stands for the first axis (batch-parallel).
      k: mesh axes over which inputs are split (row-parallel): the last axis of x, and of the codes.
      n: mesh axes over which output channels are split (column-parallel).

    Raises:
      TypeError: the mesh is none, or axes are no names.
      ValueError: an axis is not in the mesh, or is used twice.
    """

    mesh: Mesh | AbstractMesh
    rows: Axes | P = None
    k: Axes = None
    n: Axes = None

    def __post_init__(self) -> None:
        """Brings the attributes into one form and checks them."""
        if not isinstance(self.mesh, Mesh | AbstractMesh):
            raise TypeError(f"partition: mesh must be a Mesh, got {type(self.mesh).__name__}")
        for what, axes in (("rows", self.rows), ("k", self.k), ("n", self.n)):
            if not (axes is None or isinstance(axes, str | tuple | P)):
                raise TypeError(
                    f"partition: {what} must be a name, a tuple of names or None, got {axes!r}"
                )
        rows = (self.rows,) if isinstance(self.rows, str) else tuple(self.rows or ())
        object.__setattr__(self, "rows", tuple(map(_names, rows)))
        object.__setattr__(self, "k", _names(self.k))
        object.__setattr__(self, "n", _names(self.n))
        used = [*self.row_axes, *self.k_axes, *self.n_axes]
        for name in used:
            if name not in self.mesh.axis_names:
                raise ValueError(
                    f"partition: expected axes of the mesh {self.mesh.axis_names}, got {name!r}"
                )
            if used.count(name) > 1:
                raise ValueError(f"partition: axis {name!r} is used more than once")
        # Where the arrays' types do not name them, axes of one device need no collectives either.
        if not self._is_explicit:
            object.__setattr__(self, "rows", tuple(map(self._shared, self._rows)))
            object.__setattr__(self, "k", self._shared(self.k_axes))
            object.__setattr__(self, "n", self._shared(self.n_axes))

    @property
    def k_axes(self) -> tuple[str, ...]:
        """Mesh axes over which inputs are split."""
        return _names(self.k)

    @property
    def n_axes(self) -> tuple[str, ...]:
        """Mesh axes over which output channels are split."""
        return _names(self.n)

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Mesh axes over which rows of x are split."""
        return tuple(name for names in self._rows for name in names)

    @property
    def shards(self) -> Shards:
        """What a device holds of x."""
        return Shards(rows=self._shared(self.row_axes), columns=self._shared(self.k_axes))

    def same_everywhere(self, y: jax.Array) -> jax.Array:
        """Marks a result as equal on all devices of those k axes that have one device only."""
        alone = tuple(name for name in self.k_axes if name not in self.shards.columns)
        return jax.lax.psum(y, alone) if alone else y

    @property
    def codes_spec(self) -> P:
        """Of codes[n, k]."""
        return P(self.n_axes or None, self.k_axes or None)

    @property
    def n_spec(self) -> P:
        """Of scale[n] and bias[n]."""
        return P(self.n_axes or None)

    def x_spec(self, ndim: int) -> P:
        """Of x[..., k] with so many axes."""
        return self._spec(ndim, self.k_axes)

    def y_spec(self, ndim: int) -> P:
        """Of the result [..., n] with so many axes."""
        return self._spec(ndim, self.n_axes)

    def check(self, shape: tuple[int, ...], n: int) -> None:
        """Raises ValueError unless x of this shape, and n, can be split evenly."""
        if len(self._rows) >= len(shape):
            raise ValueError(
                f"partition: rows has {len(self._rows)} entries for the {len(shape) - 1} leading axes of x"
            )
        sizes = [(f"axis {i} of x", shape[i], names) for i, names in enumerate(self._rows)]
        for what, size, names in [*sizes, ("k", shape[-1], self.k_axes), ("n", n, self.n_axes)]:
            parts = math.prod(self.mesh.shape[name] for name in names)
            if size % parts:
                raise ValueError(
                    f"partition: {what} is {size}, which {parts} devices ({', '.join(names)}) cannot share evenly"
                )

    def place(self, array: jax.Array, spec: P) -> jax.Array:
        """Moves an array to where it must be on a mesh with explicit axes; along others the compiler does."""
        if not self._is_explicit:
            return array
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        told = [tuple(a for a in _names(e) if kinds[a] == AxisType.Explicit) for e in spec]
        spec = P(*(names or None for names in told))
        return jax.sharding.reshard(array, NamedSharding(self.mesh, spec))

    def map(self, part: Callable[..., Any], specs: tuple[P, ...], out: Any) -> Callable[..., Any]:
        """Returns `jax.shard_map` of ``part``; arguments that are None stay None."""

        def call(*arguments: jax.Array | None) -> Any:
            given = tuple(s for s, a in zip(specs, arguments, strict=True) if a is not None)

            def fill(*parts: jax.Array) -> Any:
                rest = iter(parts)
                return part(*(None if a is None else next(rest) for a in arguments))

            mapped = jax.shard_map(fill, mesh=self.mesh, in_specs=given, out_specs=out)
            return mapped(*(a for a in arguments if a is not None))

        return call

    @property
    def _is_explicit(self) -> bool:
        return AxisType.Explicit in self.mesh.axis_types

    def _shared(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if self.mesh.shape[name] > 1)

    @property
    def _rows(self) -> tuple[tuple[str, ...], ...]:
        return tuple(map(_names, self.rows or ()))

    def _spec(self, ndim: int, last: tuple[str, ...]) -> P:
        rows = [names or None for names in self._rows]
        return P(*rows, *[None] * (ndim - 1 - len(rows)), last or None)


def partition_of(x: jax.Array, codes: jax.Array) -> Partition | None:
    """Reads from arrays how they are split; None where they are not, or cannot know.

    Arrays outside of jit know, and so do the types of a mesh with explicit axes. Weights never move: where x is split
    otherwise along k, it is x that will be moved.

    Args:
      x: float[..., k].
      codes: int8[n, k].

    Raises:
      ValueError: they lie on meshes of different axes.
    """
    x_at, codes_at = _sharding(x), _sharding(codes)
    at = codes_at or x_at
    if at is None:
        return None
    n, k = _entries(codes_at, 2)
    taken = {*n, *k}
    *leading, columns = _entries(x_at, x.ndim)
    for name in (name for entry in (*leading, columns) for name in entry):
        if name not in at.mesh.axis_names:
            raise ValueError(
                f"x: expected on the mesh of w, with axes {at.mesh.axis_names}, got it split over {name!r} of another"
            )
    rows = [tuple(name for name in e if name not in taken) for e in leading]
    if not (taken or any(rows) or columns):
        return None
    return Partition(at.mesh, P(*(names or None for names in rows)), k or None, n or None)


def mapped_names(mapped: Any, arrays: Any) -> tuple[str, ...]:
    """Mesh axes over which an axis that vmap has put first is split, on a mesh with explicit axes.

    Args:
      mapped: a tree of bools: which arrays have that axis.
      arrays: the same tree of arrays.
    """
    for with_it, array in zip(jax.tree.leaves(mapped), jax.tree.leaves(arrays), strict=True):
        found = jax.typeof(array).sharding
        if with_it and not found.mesh.empty and (names := _names(found.spec[0])):
            return names
    return ()


def on_parts(call: Callable[[Any], Any], mapped: Any, arrays: Any, names: Axes) -> Any:
    """`jax.vmap` of a kernel, each device mapping over its own part of an axis that is split over these mesh axes.

    Args:
      call: takes `arrays` without that axis.
      mapped: a tree of bools: which arrays have that axis, as their first.
      arrays: the same tree of arrays. What else of them is split is gathered.
      names: see `mapped_names`.
    """
    mesh = jax.typeof(jax.tree.leaves(arrays)[0]).sharding.mesh
    specs = jax.tree.map(lambda with_it: P(names) if with_it else P(), mapped)
    arrays = jax.tree.map(
        lambda a, spec: jax.sharding.reshard(a, NamedSharding(mesh, spec)), arrays, specs
    )
    axes = jax.tree.map(lambda with_it: 0 if with_it else None, mapped)
    part = jax.vmap(call, (axes,))
    return jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=P(names))(arrays)


def to_host(array: jax.Array) -> np.ndarray:
    """Returns all of an array; of one that other processes hold parts of, every process must ask."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _sharding(array: Any) -> NamedSharding | None:
    if isinstance(array, jax.core.Tracer):
        found = jax.typeof(array).sharding
        kinds = found.mesh.axis_types
        return found if AxisType.Explicit in kinds and AxisType.Manual not in kinds else None
    found = getattr(array, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def _entries(sharding: NamedSharding | None, ndim: int) -> list[tuple[str, ...]]:
    spec = () if sharding is None else tuple(sharding.spec)
    return [_names(entry) for entry in (*spec, *[None] * (ndim - len(spec)))]


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
