"""The mesh around a computation: that of the placement for the decoder, the caller's own for what it returns.

A caller may have set a mesh of its own (`jax.set_mesh`), and one with explicit axes is what JAX makes by default. The
surprising fact is that such a mesh and the same devices with automatic axes cannot meet in one operation.
"""

from __future__ import annotations

import contextlib

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxint8.models.placement import Placement


def around(placement: Placement | None) -> contextlib.AbstractContextManager[object]:
    """Sets the mesh of a placement where the caller has set another one; for calls outside of jit."""
    there = jax.sharding.get_abstract_mesh()
    if placement is None or not isinstance(placement.mesh, Mesh) or there.empty:
        return contextlib.nullcontext()
    if there == placement.mesh.abstract_mesh:
        return contextlib.nullcontext()
    return jax.set_mesh(placement.mesh)


def for_caller(x: jax.Array, placement: Placement | None) -> jax.Array:
    """Returns x on the mesh that the caller has set, if that has the same devices and explicit axes; copies nothing."""
    there = jax.sharding.get_abstract_mesh()
    if placement is None or AxisType.Explicit not in there.axis_types:
        return x
    mesh, own = jax.sharding.get_mesh(), placement.mesh
    same = there.axis_names == own.axis_names and list(mesh.devices.flat) == list(own.devices.flat)
    if not same or not isinstance(x.sharding, NamedSharding):
        return x
    return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))
