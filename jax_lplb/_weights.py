"""Experts' weights as the ranks hold them, and in logical order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb._balance import AxisName, axis_size
from jax_lplb._placement import Placement


def permute_experts(tree: Any, old: Placement, new: Placement, *, axis_name: AxisName | None = None) -> Any:
    """Carries weights from the order of one placement's home slots to that of another.

    For all that belongs to experts: parameters, optimiser state, averages of them. Exact: rows are moved, not computed
    with. Placements may be traced, so that a jitted step may take the new one as an argument.

    Args:
      tree: a pytree of arrays [num_experts, ...], whose row i belongs to expert `old.home_order[i]`. Sharded as you
        like: XLA gathers a leaf of which it has to move rows between devices, one leaf after the other. Give the
        jitted function `out_shardings`, and donate the tree.
      old: the placement whose order the tree has.
      new: that whose order it shall have; of as many experts.
      axis_name: within `shard_map`, the axis or axes of the ranks. Leaves are then the rows of this rank,
        [num_experts / num_ranks, ...], and no rank ever holds more than one row of each rank beside its own rows.

    Returns:
      The tree, with row i of its leaves belonging to expert `new.home_order[i]`.

    Raises:
      TypeError: `old` or `new` is not a Placement.
      ValueError: numbers of experts differ, or a leaf has another number of rows.
    """
    _check("old", old)
    _check("new", new)
    if old.num_experts != new.num_experts:
        raise ValueError(f"old and new must have equally many experts, got {old.num_experts} and {new.num_experts}")
    return _take_rows(tree, _inverse(old.home_order)[new.home_order], axis_name, new.num_ranks)


def to_logical(tree: Any, placement: Placement, *, axis_name: AxisName | None = None) -> Any:
    """Carries weights to logical order, as checkpoints hold them; arguments and errors as of `permute_experts`."""
    _check("placement", placement)
    return _take_rows(tree, _inverse(placement.home_order), axis_name, placement.num_ranks)


def from_logical(tree: Any, placement: Placement, *, axis_name: AxisName | None = None) -> Any:
    """Carries weights from logical order to that of home slots; arguments and errors as of `permute_experts`."""
    _check("placement", placement)
    return _take_rows(tree, placement.home_order, axis_name, placement.num_ranks)


def _inverse(order: Any) -> Any:
    xp: Any = np if isinstance(order, np.ndarray) else jnp
    return xp.argsort(order).astype(np.int32)


def _take_rows(tree: Any, source: Any, axis_name: AxisName | None, num_ranks: int) -> Any:
    """Row i of each leaf becomes its row source[i]; rows are numbered over all ranks."""
    ranks = 1 if axis_name is None else axis_size(axis_name, num_ranks)
    rows, rest = divmod(len(source), ranks)
    if rest:
        raise ValueError(f"axis_name = {axis_name!r}: its {ranks} ranks do not divide the {len(source)} experts evenly")

    def take(path: Any, leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] != rows:
            where = f"tree{jax.tree_util.keystr(path)}"
            raise ValueError(f"{where} must have {rows} rows, one for each expert, got shape {leaf.shape}")
        # Floats as integers: what moves bfloat16 by way of float32 may change the bits of a NaN.
        width = jnp.finfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
        bits = lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")) if width >= 8 else leaf
        if axis_name is not None:
            bits = _exchange(bits, source, axis_name)
        else:
            sharding = jax.typeof(leaf).sharding
            explicit = any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types)
            bits = bits.at[source].get(
                mode="promise_in_bounds", unique_indices=True, out_sharding=sharding if explicit else None
            )
        return lax.bitcast_convert_type(bits, leaf.dtype) if width >= 8 else bits

    with jax.named_scope("lplb_permute"):
        return jax.tree_util.tree_map_with_path(take, tree)


def _exchange(leaf: jax.Array, source: Any, axis_name: AxisName) -> jax.Array:
    """All ranks show one of their rows at a time, and each takes those that it needs."""
    rows = leaf.shape[0]
    mine = lax.dynamic_slice_in_dim(jnp.asarray(source), lax.axis_index(axis_name) * rows, rows)

    def show(row: jax.Array, result: jax.Array) -> jax.Array:
        shown = lax.all_gather(lax.dynamic_index_in_dim(leaf, row, keepdims=False), axis_name)
        taken = (mine % rows == row).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(taken, shown[mine // rows], result)

    return lax.fori_loop(0, rows, show, leaf)


def _check(name: str, placement: Placement) -> None:
    if not isinstance(placement, Placement):
        raise TypeError(f"{name} must be a jax_lplb.Placement, got {type(placement).__name__}")
    if placement.phy2log.ndim != 1:
        raise ValueError(
            f"{name} has leading axes {placement.phy2log.shape[:-1]}: map over them, with jax.vmap or jax.lax.scan"
        )
