"""Where a decoder lies on a mesh ("data", "model"): what each device holds, and what it says to the others.

Heads, the MLP and the vocabulary are split over "model", sequences over "data"; norms are everywhere. Each device runs
the decoder on a configuration of its own, smaller one. Layers whose inputs the devices made (``out`` and ``down``) are
split along these inputs, and their results are added up; or, where int8 rows are to have one scale, along their
outputs, and the inputs are gathered. The surprising fact is what makes any number of devices fit: what they cannot
share evenly is padded with zeros (whole heads, columns of the MLP, rows of the vocabulary), which changes no bit of any
result, and key-value heads that are fewer than the devices are held by several.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxint8.models.cache import KVCache
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.families import Path
from jaxint8.models.pieces import Piece, merged
from jaxint8.models.split import HIDDEN, Split

DATA, MODEL = "data", "model"
# The axis along which a parameter is split over "model": rows (output channels) or columns (inputs). Others are whole
# on every device.
_SPLIT_AXIS = {"embedding": 0, "lm_head": 0, "int8_head": 0, "qkv": 0, "up": 0, "out": 1, "down": 1}


@dataclasses.dataclass(frozen=True)
class Placement:
    """A decoder on a mesh; hashable, so that it can be a static argument of jit.

    Attributes:
        config: the decoder as it is.
        mesh: the devices; axes are "data", "model" or both. Its axes are automatic here, whatever they
            were: only the decoder's own maps are explicit.
        gathered: whether ``out`` and ``down`` are split along their outputs and take whole rows, gathered from all
            devices, in the place of being split along their inputs. So is what is added from layer to layer.

    Raises:
        TypeError: the mesh is none.
        ValueError: it has other axes.

    """

    config: DecoderConfig
    mesh: Mesh | AbstractMesh
    gathered: bool = False

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        mesh: Mesh | AbstractMesh,
        quantization: QuantizationConfig | None,
    ) -> Placement:
        """Returns the placement for a way to carry out linear layers.

        Exact int8 layers gather: whoever holds a whole row can quantise it in the kernel that multiplies it, while
        parts of a row need the others' statistics first, and sums of int32 behind them. On two H200s a layer of an 8B
        shape takes 0.72 of the time so. Float layers, and int8 ones that may scale parts of rows, need one sum only.
        """
        exact = quantization is not None and quantization.reduction == "exact"
        return cls(config, mesh, gathered=exact)

    def __post_init__(self) -> None:
        """Checks the axes."""
        if not isinstance(self.mesh, Mesh | AbstractMesh):
            raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {self.mesh!r}")
        names = tuple(self.mesh.axis_names)
        if not names or not {DATA, MODEL}.issuperset(names):
            raise ValueError(f"mesh: expected axes ('data', 'model'), got {names}")
        if isinstance(self.mesh, Mesh):  # else there are no devices yet: it is only a plan
            automatic = Mesh(self.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
            object.__setattr__(self, "mesh", automatic)

    @property
    def data(self) -> int:
        """Devices over which sequences are split."""
        return self.mesh.shape.get(DATA, 1)

    @property
    def model(self) -> int:
        """Devices over which weights are split."""
        return self.mesh.shape.get(MODEL, 1)

    # Sizes

    @functools.cached_property
    def local(self) -> DecoderConfig:
        """What one device runs."""
        slots = len(self._slots) // self.model
        return dataclasses.replace(
            self.config,
            heads=slots * self._queries_per_slot,
            kv_heads=slots,
            mlp_size=-(-self.config.mlp_size // self.model),
            vocab_size=-(-self.config.vocab_size // self.model),
        )

    @property
    def cache_config(self) -> DecoderConfig:
        """What the cache of all devices together is made for."""
        kv_heads = self.local.kv_heads * self.model
        return dataclasses.replace(self.config, heads=kv_heads, kv_heads=kv_heads)

    @property
    def _copies(self) -> int:
        """Devices that hold one key-value head, each with some of its queries."""
        group = self.config.heads // self.config.kv_heads
        return min(max(1, self.model // self.config.kv_heads), group)

    @property
    def _queries_per_slot(self) -> int:
        return -(-(self.config.heads // self.config.kv_heads) // self._copies)

    @functools.cached_property
    def _slots(self) -> list[tuple[int, range]]:
        """(key-value head, its query heads) for every slot of all devices; padding slots have none."""
        group, most = self.config.heads // self.config.kv_heads, self._queries_per_slot
        slots = [
            (head, range(head * group + first, head * group + min(first + most, group)))
            for head in range(self.config.kv_heads)
            for first in range(0, group, most)
        ]
        return slots + [(-1, range(0))] * (-len(slots) % self.model)

    # Parameters

    def axis(self, path: Path) -> int | None:
        """The axis along which a parameter is split; None if it is whole on every device."""
        names = [name for name in path if isinstance(name, str)]
        module = next((name for name in reversed(names) if name in _SPLIT_AXIS), None)
        if module is None or self.model == 1:
            return None
        axis = 0 if self.gathered else _SPLIT_AXIS[module]
        one_axis = names[-1] in ("bias", "scale")
        return None if one_axis and axis == 1 else axis

    def spec(self, path: Path) -> P:
        """How a parameter (or the codes or scale of one) is split."""
        axis = self.axis(path)
        return P() if axis is None else P(*[None] * axis, MODEL)

    def pieces(self, path: Path, device: int) -> list[Piece]:
        """What device ``device`` of the axis "model" holds of a parameter that is split, along that axis."""
        module = _module(path)
        if self.gathered and module in ("out", "down"):
            found = [self._even(self._hidden, self.config.hidden_size, device, 0)]
        elif module in ("qkv", "out"):
            found = self._attention_pieces(device, inputs=module == "out")
        elif module in ("up", "down"):
            parts = 1 + (self.config.gated and module == "up")
            size = self.local.mlp_size
            found = [self._even(size, self.config.mlp_size, device, p) for p in range(parts)]
        else:
            found = [self._even(self.local.vocab_size, self.config.vocab_size, device, 0)]
        return list(merged(piece for piece in found if piece.start < piece.stop))

    def size(self, path: Path, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what one device holds of a parameter of shape ``whole``."""
        axis = self.axis(path)
        if axis is None:
            return whole
        return (*whole[:axis], sum(self._part_sizes(self.local, path)), *whole[axis + 1 :])

    @property
    def _hidden(self) -> int:
        """Columns that a device holds of what is gathered between the layers."""
        return -(-self.config.hidden_size // self.model)

    def _part_sizes(self, config: DecoderConfig, path: Path) -> list[int]:
        """Sizes of the parts of a parameter, along the axis that is split: whole, or (``local``) on a device."""
        module = _module(path)
        if module == "qkv":
            return [config.query_size, config.key_value_size, config.key_value_size]
        if module == "up":
            return [config.mlp_size] * (1 + config.gated)
        if self.gathered and module in ("out", "down"):
            return [self._hidden if config is self.local else config.hidden_size]
        inputs = {"out": config.query_size, "down": config.mlp_size}
        return [inputs.get(module, config.vocab_size)]

    def _attention_pieces(self, device: int, inputs: bool) -> list[Piece]:
        width, most, count = self.config.head_dim, self._queries_per_slot, self.local.kv_heads
        keys, values = self.local.query_size, self.local.query_size + self.local.key_value_size
        found = []
        for slot, (head, queries) in enumerate(self._slots[device * count : (device + 1) * count]):
            first, last = queries.start * width, queries.stop * width
            found.append(Piece(0, first, last, slot * most * width))
            if head >= 0 and not inputs:
                rows = head * width, (head + 1) * width
                found.append(Piece(1, *rows, keys + slot * width))
                found.append(Piece(2, *rows, values + slot * width))
        return sorted(found, key=lambda piece: piece.at)

    @staticmethod
    def _even(held: int, whole: int, device: int, part: int) -> Piece:
        first = min(device * held, whole)
        return Piece(part, first, min(first + held, whole), part * held)

    def put(self, path: Path, shards: dict[int, np.ndarray]) -> jax.Array:
        """Makes one array of what each device of "model" is to hold; only this process's devices are asked for.

        Args:
            path: of the parameter, or of its codes or scale.
            shards: device of "model" -> its part, on the host.

        """
        sharding = NamedSharding(self.mesh, self.spec(path))
        axis = self.axis(path)
        shape = list(next(iter(shards.values())).shape)
        if axis is not None:
            shape[axis] *= self.model
        # What is whole everywhere, every device takes from the only entry.
        of = self.of_model if axis is not None else dict.fromkeys(self.of_model, next(iter(shards)))
        placed = [jax.device_put(shards[of[d]], d) for d in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, placed)

    def on_host(self, params: Any) -> Any:
        """Returns a tree of parameters as one device would hold them, padding dropped, as NumPy arrays.

        Raises:
            ValueError: another process holds some of them.

        """
        if jax.process_count() > 1:
            raise ValueError("mesh: the parameters are spread over several processes")

        def whole(path: tuple[Any, ...], array: jax.Array) -> np.ndarray:
            where = _keys(path)
            axis = self.axis(where)
            if axis is None:
                return np.asarray(array)
            starts = [0, *itertools.accumulate(self._part_sizes(self.config, where))]
            found = np.empty(
                (*array.shape[:axis], starts[-1], *array.shape[axis + 1 :]), array.dtype
            )
            lead = (slice(None),) * axis
            for shard in array.addressable_shards:
                data = np.asarray(shard.data)
                for piece in self.pieces(where, self.of_model[shard.device]):
                    first, count = starts[piece.part] + piece.start, piece.stop - piece.start
                    held = (*lead, slice(piece.at, piece.at + count))
                    found[(*lead, slice(first, first + count))] = data[held]
            return found

        return jax.tree_util.tree_map_with_path(whole, params)

    def spread(self, params: Any) -> Any:
        """Puts a tree of parameters, as one device would hold them, onto the mesh; the inverse of `on_host`."""

        def place(path: tuple[Any, ...], array: Any) -> jax.Array:
            where = _keys(path)
            axis, found = self.axis(where), np.asarray(array)
            if axis is None:
                return self.put(where, {0: found})
            starts = [0, *itertools.accumulate(self._part_sizes(self.config, where))]
            lead, shards = (slice(None),) * axis, {}
            for device in self.held:
                # Padding: rows of zeros, whose scale is 1.
                shard = np.full(self.size(where, found.shape), where[-1] == "scale", found.dtype)
                for piece in self.pieces(where, device):
                    first, count = starts[piece.part] + piece.start, piece.stop - piece.start
                    held = (*lead, slice(piece.at, piece.at + count))
                    shard[held] = found[(*lead, slice(first, first + count))]
                shards[device] = shard
            return self.put(where, shards)

        return jax.tree_util.tree_map_with_path(place, params)

    @functools.cached_property
    def of_model(self) -> dict[Any, int]:
        """The place of each device along "model"."""
        names = list(self.mesh.axis_names)
        at = names.index(MODEL) if MODEL in names else None
        return {
            device: 0 if at is None else place[at]
            for place, device in np.ndenumerate(self.mesh.devices)
        }

    @property
    def held(self) -> list[int]:
        """The places along "model" that devices of this process have."""
        here = jax.process_index()
        return sorted({at for d, at in self.of_model.items() if d.process_index == here})

    # Inputs and results

    @property
    def rows_spec(self) -> P:
        """Of arrays whose first axis is the sequences."""
        return P(DATA) if self.data > 1 else P()

    @property
    def logits_spec(self) -> P:
        """Of logits[b, t, vocab], padded."""
        rows = DATA if self.data > 1 else None
        return P(rows, None, MODEL) if self.model > 1 else self.rows_spec

    @property
    def input_specs(self) -> dict[str, P]:
        """Of what enters the linear layers of one layer, [b, t, k]."""
        inner = self.rows_spec if self.gathered else self.logits_spec
        return {"qkv": self.rows_spec, "up": self.rows_spec, "out": inner, "down": inner}

    @property
    def _query_columns(self) -> tuple[tuple[int, int], ...]:
        """Runs of columns that are no padding, of what attention gives on all devices side by side."""
        width, most = self.config.head_dim, self._queries_per_slot
        pieces = (
            Piece(0, queries.start * width, queries.stop * width, slot * most * width)
            for slot, (_, queries) in enumerate(self._slots)
            if queries
        )
        return tuple((p.at, p.at + p.stop - p.start) for p in merged(pieces))

    def without_padding(self, module: str, x: jax.Array) -> jax.Array:
        """Drops the columns of padding from what enters a layer (under jit)."""
        axis = self.axis((module, "weight"))
        if axis != 1:
            return x
        held = x.shape[-1] // self.model
        pieces = [(d, p) for d in range(self.model) for p in self.pieces((module, "weight"), d)]
        columns = [np.arange(p.at, p.at + p.stop - p.start) + d * held for d, p in pieces]
        return jnp.take(x, np.concatenate(columns), axis=-1)

    def cache_specs(self, cache: KVCache) -> KVCache:
        """Specs of a cache: sequences over "data", heads over "model"."""
        heads = P(DATA if self.data > 1 else None, MODEL if self.model > 1 else None)
        keys, values = jax.tree.map(lambda _: heads, (cache.keys, cache.values))
        return KVCache(keys, values, self.rows_spec, P())

    def param_specs(self, params: Any) -> Any:
        """Specs of a tree of parameters."""
        return jax.tree_util.tree_map_with_path(lambda path, _: self.spec(_keys(path)), params)

    def fill_rows(self, rows: np.ndarray) -> np.ndarray:
        """Repeats the last of some sequences [b, ...] until the devices can share them evenly.

        A repetition, unlike a row of zeros, is sure to change nothing for the others: it adds no outlier column, and
        no maximum, that was not there.
        """
        missing = -len(rows) % self.data
        return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows

    def everywhere(self, x: jax.Array) -> jax.Array:
        """Asks for x to be whole on every device (under jit)."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P()))

    def whole_logits(self, logits: jax.Array) -> jax.Array:
        """Drops the columns of padding (under jit), which all devices must see for that."""
        if logits.shape[-1] == self.config.vocab_size:
            return logits
        spec = NamedSharding(self.mesh, self.rows_spec)
        whole = jax.lax.with_sharding_constraint(logits, spec)[..., : self.config.vocab_size]
        return jax.lax.with_sharding_constraint(whole, spec)

    @property
    def split(self) -> Split:
        """What the decoder needs to know inside the map over devices."""
        query_size, mlp_size = self.config.query_size, self.config.mlp_size
        whole = ((0, mlp_size),), ((0, self.config.hidden_size),)
        gathered = tuple(zip(("out", "down", HIDDEN), (self._query_columns, *whole), strict=True))
        return Split(
            rows=(DATA,) if self.data > 1 else (),
            model=(MODEL,) if self.model > 1 else (),
            vocab_size=self.config.vocab_size,
            inputs=() if self.gathered else (("out", query_size), ("down", mlp_size)),
            gathered=gathered if self.gathered else (),
            heads=tuple(
                head
                for _, queries in self._slots
                for head in (*queries, *[-1] * (self._queries_per_slot - len(queries)))
            ),
        )


def check(params: Any, placement: Placement | None) -> None:
    """Raises ValueError where parameters are split over devices and nothing says how."""
    sharding = getattr(params["embedding"], "sharding", None)
    if placement is None and MODEL in tuple(getattr(sharding, "spec", ())):
        raise ValueError("placement: expected that of the model, whose parameters are on a mesh")


def _keys(path: tuple[Any, ...]) -> Path:
    """The path of a leaf of a tree, as the weight maps have it."""
    return tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", ""))) for k in path)


def _module(path: Path) -> str:
    """The name of the split module that a parameter belongs to."""
    return str(next(name for name in reversed(path) if name in _SPLIT_AXIS))
