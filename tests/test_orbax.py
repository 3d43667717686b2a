"""Orbax: the int8 tree is saved from one mesh and restored onto another, to the bit."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxint8.models.language_model import LanguageModel
from jaxint8.models.loading import load
from jaxint8.models.placement import Placement

GOLDENS = Path(__file__).parent / "goldens"


def mesh_of(data: int, model: int) -> Mesh:
    kinds = (AxisType.Auto,) * 2
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), kinds, devices=devices)


def spread(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Shapes of a tree on a mesh: matrices split along an axis where they can be, all else whole."""

    def of(leaf: Any) -> jax.ShapeDtypeStruct:
        fits = leaf.ndim == 2 and leaf.shape[axis] % mesh.shape["model"] == 0
        spec = P(*[None] * axis, "model") if fits else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(of, tree)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("case", ["llama_gqa_tied", "bloom"])
def test_from_one_mesh_to_another(tmp_path: Path, case: str) -> None:
    # Saved as one device would hold it, split by rows over four; restored split by columns over two.
    first = load(GOLDENS / case, mesh=mesh_of(2, 4))
    assert first.placement is not None
    tree = first.placement.on_host(first.params)
    by_rows = spread(tree, mesh_of(1, 4), 0)
    saved = jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), tree, by_rows)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "int8", saved)
        checkpointer.wait_until_finished()
        by_columns = spread(tree, mesh_of(4, 2), 1)
        restored = checkpointer.restore(tmp_path / "int8", by_columns)
    for leaf, at in zip(jax.tree.leaves(restored), jax.tree.leaves(by_columns), strict=True):
        assert leaf.sharding == at.sharding
    assert_same(restored, load(GOLDENS / case).params)
    # And from there into a model on the other mesh, as if it had been loaded there.
    placement = Placement.of(first.config, mesh_of(4, 2), first.quantization)
    model = LanguageModel(
        first.config,
        placement.spread(restored),
        quantization=first.quantization,
        placement=placement,
    )
    expected = load(GOLDENS / case, mesh=mesh_of(4, 2))
    assert_same(model.params, expected.params)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected.params), strict=True):
        assert a.sharding == b.sharding
