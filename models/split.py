"""What a device says to the others while it runs its part of a decoder, inside a `jax.shard_map`.

The surprising fact is how little it is: activations before or behind a layer, the embedding of a token, and the logits
of the token to choose from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxint8.shards import Shards

HIDDEN = "hidden"
"""What `Split.whole` calls the rows between the layers."""


@dataclasses.dataclass(frozen=True)
class Split:
    """What a device does together with others inside the map; by default it is alone, and does nothing.

    Attributes:
        rows: mesh axes over which sequences are split.
        model: mesh axes over which weights are split.
        vocab_size: tokens in all, padding not counted; 0 stands for as many as there are.
        inputs: for each layer that is split along its inputs their true number, padding not counted.
        gathered: what is gathered from all devices: for each layer whose devices take whole rows, and for HIDDEN, the
            runs of columns that are no padding. Empty where layers are split along their inputs.
        heads: the query heads of all devices in their order, -1 for padding; empty: in plain order.

    """

    rows: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    vocab_size: int = 0
    inputs: tuple[tuple[str, int], ...] = ()
    gathered: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = ()
    heads: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        """Whether there are other devices."""
        return bool(self.rows or self.model)

    def shards(self, module: str | None) -> Shards:
        """What of its whole input this device holds, at a linear layer."""
        size = dict(self.inputs).get(module or "")
        if not self.model or size is None:
            return Shards(rows=self.rows)
        return Shards(rows=self.rows, columns=self.model, k=size)

    def gathers(self, name: str | None) -> bool:
        """Whether `whole` gathers under this name."""
        return bool(self.model) and name in dict(self.gathered)

    def whole(self, x: jax.Array, name: str | None) -> jax.Array:
        """Gathers x[..., k] of all devices and drops padding, if ``name`` is one of those that are gathered."""
        if name is None or not self.gathers(name):
            return x
        runs = dict(self.gathered)[name]
        last = x.ndim - 1
        rows = jax.lax.all_gather(x, self.model, axis=last, tiled=True, to="invarying")
        if runs == ((0, rows.shape[-1]),):
            return rows
        return jnp.concatenate([rows[..., first:stop] for first, stop in runs], axis=-1)

    def own(self, x: jax.Array) -> jax.Array:
        """This device's columns of whole rows [..., hidden], with padding; the inverse of ``whole(x, HIDDEN)``."""
        if not self.model or not self.gathered:
            return x
        # Else a norm before would be computed for these columns alone, and rounded otherwise.
        x = jax.lax.optimization_barrier(x)
        held = -(-x.shape[-1] // jax.lax.axis_size(self.model))
        missing = held * jax.lax.axis_size(self.model) - x.shape[-1]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        first = held * jax.lax.axis_index(self.model)
        return jax.lax.dynamic_slice_in_dim(x, first, held, axis=x.ndim - 1)

    def sum(self, y: jax.Array, module: str | None) -> jax.Array:
        """Adds the parts of a float product of a layer that is split along its inputs."""
        return jax.lax.psum(y, self.shards(module).columns) if self.shards(module).columns else y

    def of_heads(self, of_all: Callable[[int], np.ndarray], held: int) -> jax.Array:
        """Picks this device's from a value for each query head, which ``of_all(heads)`` lists; 0 for padding."""
        if not self.model:
            return jnp.asarray(of_all(held))
        values = np.append(of_all(max(self.heads) + 1), np.float32(0))[list(self.heads)]
        return jnp.asarray(values.reshape(-1, held))[jax.lax.axis_index(self.model)]

    def take(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """Returns the rows of a table [vocab, k] for tokens int32[...]: each device adds what it holds."""
        if not self.model:
            return jnp.take(table, tokens, axis=0, mode="clip")
        # Ids are clipped to the vocabulary, as they are on one device.
        place = jnp.clip(tokens, 0, self.vocab_size - 1)
        place -= jax.lax.axis_index(self.model) * table.shape[0]
        held = (place >= 0) & (place < table.shape[0])
        rows = jnp.take(table, place, axis=0, mode="clip")
        return jax.lax.psum(jnp.where(held[..., None], rows, jnp.zeros((), rows.dtype)), self.model)

    def whole_vocabulary(self, logits: jax.Array) -> jax.Array:
        """Gathers logits[..., vocab] of all devices, and drops those of padding."""
        if not self.model:
            return logits
        axis = logits.ndim - 1
        gathered = jax.lax.all_gather(logits, self.model, axis=axis, tiled=True, to="invarying")
        return gathered[..., : self.vocab_size]


ALONE = Split()
