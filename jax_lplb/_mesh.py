"""Meshes whose axes are Explicit, as `jax.make_mesh` makes them."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType


def with_auto_axes(function: Callable[..., Any], out_specs: Any, *operands: Any) -> Any:
    """`function(*operands)`, with the mesh's Explicit axes as Auto ones: within, XLA chooses shardings.

    An Explicit axis asks of each operation how its result is sharded. What the library computes of whole arrays leaves
    no choice to the caller but for its results: those have `out_specs`, a prefix of their tree, on such a mesh.
    """
    mesh = _explicit_mesh(operands)
    if mesh is None:
        return function(*operands)
    shardings = jax.tree.map(
        lambda spec: jax.NamedSharding(mesh, spec), out_specs, is_leaf=lambda spec: isinstance(spec, jax.P)
    )
    explicit = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if is_explicit(kind))
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)(*operands)


def spec_of(array: Any) -> jax.P:
    """How an array is sharded over the Explicit axes of its mesh; over none, where there are none."""
    return jax.typeof(array).sharding.spec


def is_explicit(kind: AxisType) -> bool:
    return kind == AxisType.Explicit


def _explicit_mesh(operands: Any) -> Any:
    """The mesh with Explicit axes that is in use here, or that an operand brings along; None: there is none."""
    meshes = [jax.sharding.get_abstract_mesh()]
    if meshes[0].empty:
        meshes += [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands)]
    return next((mesh for mesh in meshes if any(map(is_explicit, mesh.axis_types))), None)
