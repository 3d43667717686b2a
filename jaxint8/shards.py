"""Statistics of a matrix of which each device holds a part: maxima, counts and integer sums over the whole of it.

Inside a `jax.shard_map` a device sees its own rows and columns only. The surprising fact is that nothing here is a sum
of floats: so a statistic of a split matrix equals that of the whole one to the bit, however it is split.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a matrix x[m, k] is split; by default not at all, and every method does nothing.

    Attributes:
      rows: mesh axes over which rows are split.
      columns: mesh axes over which columns are split, the major one first.
      k: columns of the whole matrix, where some of those held are padding (zeros) and not to be counted; None counts
        all that are held.
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    k: int | None = None

    def width(self, held: int) -> int:
        """Returns k of the whole matrix, of which each device holds so many columns."""
        if self.k is not None:
            return self.k
        return held * (jax.lax.axis_size(self.columns) if self.columns else 1)

    def first_column(self, held: int) -> jax.Array | int:
        """Returns the position of this device's first column among those held by all."""
        return held * jax.lax.axis_index(self.columns) if self.columns else 0

    def max_of_rows(self, x: jax.Array) -> jax.Array:
        """The maximum over the whole row, from that over this device's columns."""
        return jax.lax.pmax(x, self.columns) if self.columns else x

    def sum_of_rows(self, x: jax.Array) -> jax.Array:
        """The sum over the whole row of integers, from that over this device's columns."""
        return jax.lax.psum(x, self.columns) if self.columns else x

    def all_of_rows(self, x: jax.Array) -> jax.Array:
        """Whether all of the row is true, from whether this device's part is."""
        return jax.lax.pmin(x.astype(jnp.int32), self.columns) > 0 if self.columns else x

    def any_of_columns(self, x: jax.Array) -> jax.Array:
        """Whether any of the column is true, from whether any of this device's rows is."""
        return jax.lax.pmax(x.astype(jnp.int32), self.rows) > 0 if self.rows else x

    def max_of_columns(self, x: jax.Array) -> jax.Array:
        """The maximum over the whole column, from that over this device's rows."""
        return jax.lax.pmax(x, self.rows) if self.rows else x

    def candidates(self, x: jax.Array) -> jax.Array:
        """The columns [m, c] of every device side by side, in the order of the devices."""
        if not self.columns:
            return x
        return jax.lax.all_gather(x, self.columns, axis=1, tiled=True)

    def whole_rows(self, x: jax.Array) -> jax.Array:
        """The rows [m, k] of which each device holds some columns, the same on all of them."""
        if not self.columns:
            return x
        return jax.lax.all_gather(x, self.columns, axis=1, tiled=True, to="invarying")

    def own_columns(self, x: jax.Array, held: int) -> jax.Array:
        """This device's columns of whole rows; the inverse of `whole_rows`."""
        if not self.columns:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.first_column(held), held, axis=1)

    def in_turn(self, step: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
        """Applies ``step`` on the device with the first columns, then to its result on the next, and so on.

        The order of float operations is then that of the columns, as on one device; all devices get the last result.

        Args:
          step: what a device does with its columns.
          y: float32 of any shape, the same on all devices that share a row.
        """
        if not self.columns:
            return step(y)
        for turn in range(jax.lax.axis_size(self.columns)):
            made = step(jax.lax.pcast(y, self.columns, to="varying"))
            mine = jax.lax.axis_index(self.columns) == turn
            # The sum of one device's bits and of zeros is exact for every float, -0 and NaN too.
            bits = jnp.where(mine, jax.lax.bitcast_convert_type(made, jnp.int32), 0)
            y = jax.lax.bitcast_convert_type(jax.lax.psum(bits, self.columns), jnp.float32)
        return y


WHOLE = Shards()
"""Of a matrix that is not split."""


def vary_like(y: jax.Array, *inputs: jax.Array) -> jax.Array:
    """Marks y as differing between the devices between which any of the inputs differs.

    Inside a `jax.shard_map` the result of a foreign call passes as equal on all devices, so that a forgotten sum over
    the devices would not be noticed; marked like this it is an error. Elsewhere it does nothing.
    """
    axes = frozenset[str]().union(*map(_varying, inputs))
    missing = tuple(sorted(axes - _varying(y)))
    return jax.lax.pcast(y, missing, to="varying") if missing else y


def add_where_same(cotangent: jax.Array | None, primal: jax.Array | None) -> jax.Array | None:
    """Adds up a cotangent over the devices that hold one and the same primal, inside a `jax.shard_map`."""
    if cotangent is None or primal is None:
        return cotangent
    axes = tuple(sorted(_varying(cotangent) - _varying(primal)))
    return jax.lax.psum(cotangent, axes) if axes else cotangent


def _varying(a: jax.Array) -> frozenset[str]:
    return jax.typeof(a).manual_axis_type.varying
