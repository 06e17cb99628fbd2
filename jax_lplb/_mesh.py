"""Axes of meshes, and those that are Explicit, as `jax.make_mesh` makes them."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType

AxisName = str | tuple[str, ...]


def with_auto_axes(function: Callable[..., Any], out_specs: Any, *operands: Any) -> Any:
    """`function(*operands)`, with the mesh's Explicit axes as Auto ones: within, XLA chooses shardings.

    An Explicit axis asks of each operation how its result is sharded. What the library computes of whole arrays leaves
    no choice to the caller but for its results: those have `out_specs`, a prefix of their tree, on such a mesh.
    """
    mesh = _explicit_mesh(operands)
    if mesh is None:
        return function(*operands)
    shardings = jax.tree.map(
        lambda spec: jax.NamedSharding(mesh, _part_of(spec, mesh, AxisType.Explicit)),
        out_specs,
        is_leaf=lambda spec: isinstance(spec, jax.P),
    )
    return jax.sharding.auto_axes(function, axes=_axes_of(mesh, AxisType.Explicit), out_sharding=shardings)(*operands)


def shard(array: jax.Array, mesh: jax.sharding.Mesh, spec: jax.P) -> jax.Array:
    """The array, sharded so over Auto and Explicit axes; under jit and vmap too, behind the mapped axes."""
    # Outside of jit the second constraint of a mixed mesh would undo the first.
    run = jax.jit(_shard, static_argnums=(1, 2)) if len(set(mesh.axis_types)) > 1 else _shard
    return run(array, mesh, spec)


def _shard(array: jax.Array, mesh: jax.sharding.Mesh, spec: jax.P) -> jax.Array:
    explicit, auto = (_part_of(spec, mesh, kind) for kind in (AxisType.Explicit, AxisType.Auto))
    if has_explicit_axes(mesh):
        array = jax.sharding.reshard(array, jax.NamedSharding(mesh, explicit))
    if _axes_of(mesh, AxisType.Auto):
        array = jax.lax.with_sharding_constraint(array, jax.NamedSharding(mesh, auto))
    return array


def spec_of(array: Any) -> jax.P:
    """How an array is sharded over the Explicit axes of its mesh; over none, where there are none."""
    return jax.typeof(array).sharding.spec


def has_explicit_axes(mesh: Any) -> bool:
    return bool(_axes_of(mesh, AxisType.Explicit))


def _axes_of(mesh: Any, kind: AxisType) -> tuple[str, ...]:
    return tuple(name for name, of_axis in zip(mesh.axis_names, mesh.axis_types, strict=True) if of_axis == kind)


def _part_of(spec: jax.P, mesh: Any, kind: AxisType) -> jax.P:
    """What a spec says of the axes of a kind."""
    axes = _axes_of(mesh, kind)

    def of_dimension(names: Any) -> Any:
        if isinstance(names, tuple):
            return tuple(name for name in names if name in axes) or None
        return names if names in axes else None

    return jax.P(*map(of_dimension, spec))


def _explicit_mesh(operands: Any) -> Any:
    """The mesh with Explicit axes that is in use here, or that an operand brings along; None: there is none."""
    meshes = [jax.sharding.get_abstract_mesh()]
    if meshes[0].empty:
        meshes += [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands)]
    return next((mesh for mesh in meshes if has_explicit_axes(mesh)), None)
