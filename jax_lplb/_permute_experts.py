"""Rows that belong to experts, carried from the order of one placement to that of another."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb._balance import axis_size
from jax_lplb._collective import rows_of_all
from jax_lplb._mesh import AxisName, spec_of, with_auto_axes
from jax_lplb._placement import Placement, check_one_layer
from jax_lplb._replicate import with_rows


def permute_experts(tree: Any, old: Placement, new: Placement, *, axis_name: AxisName | None = None) -> Any:
    """Carries weights from the order of one placement's home slots to that of another.

    For all that belongs to experts: parameters, optimiser state, averages of them. Exact: rows are moved, not computed
    with. Placements may be traced, so that a jitted step may take the new one as an argument.

    Args:
      tree: a pytree of arrays [num_ranks * rows_per_rank, ...] (num_experts rows, where ranks divide the experts),
        whose row i belongs to expert `old.home_order[i]`; rows of padding are zeros in the result. Sharded as you
        like: XLA gathers a leaf of which it has to move rows between devices, one leaf after the other. Give the
        jitted function `out_shardings`, and donate the tree.
      old: the placement whose order the tree has.
      new: that whose order it shall have; of as many experts.
      axis_name: within `shard_map`, the axis or axes of the ranks. Leaves are then the rows of this rank,
        [rows_per_rank, ...], and no rank ever holds more than one row of each rank beside its own rows.

    Returns:
      The tree, with row i of its leaves belonging to expert `new.home_order[i]`; where all rows stay, and placements
      are of NumPy arrays, the leaves themselves.

    Raises:
      TypeError: `old` or `new` is not a Placement.
      ValueError: numbers of experts differ, or a leaf has another number of rows.
    """
    check_one_layer("old", old)
    check_one_layer("new", new)
    if old.num_experts != new.num_experts:
        raise ValueError(f"old and new must have equally many experts, got {old.num_experts} and {new.num_experts}")
    source = _rows_of(new.home_order, _inverse(old), len(old.home_order))
    return _take_rows(tree, source, len(old.home_order), axis_name, new.num_ranks)


def to_logical(tree: Any, placement: Placement, *, axis_name: AxisName | None = None) -> Any:
    """Carries weights to logical order, as checkpoints hold them; arguments and errors as of `permute_experts`.

    Without rows of padding: [num_experts, ...].
    """
    check_one_layer("placement", placement)
    return _take_rows(tree, _inverse(placement), len(placement.home_order), axis_name, placement.num_ranks)


def from_logical(tree: Any, placement: Placement, *, axis_name: AxisName | None = None) -> Any:
    """Carries weights from logical order to that of home slots; arguments and errors as of `permute_experts`."""
    check_one_layer("placement", placement)
    source = _rows_of(placement.home_order, np.arange(placement.num_experts, dtype=np.int32), placement.num_experts)
    return _take_rows(tree, source, placement.num_experts, axis_name, placement.num_ranks)


def _inverse(placement: Placement) -> Any:
    """int32 [num_experts], the row of each expert."""
    order = placement.home_order
    xp: Any = np if isinstance(order, np.ndarray) else jnp
    return xp.argsort(xp.where(order < 0, placement.num_experts, order))[: placement.num_experts].astype(np.int32)


def _rows_of(experts: Any, row_of: Any, num_rows: int) -> Any:
    """The row of each expert; for none a number beyond all rows, each of its own."""
    xp: Any = np if isinstance(experts, np.ndarray) and isinstance(row_of, np.ndarray) else jnp
    experts, row_of = xp.asarray(experts), xp.asarray(row_of)
    return xp.where(experts < 0, num_rows + xp.arange(len(experts), dtype=np.int32), row_of[experts])


def _take_rows(tree: Any, source: Any, num_rows: int, axis_name: AxisName | None, num_ranks: int) -> Any:
    """Row i of each leaf becomes its row source[i] of `num_rows`, zeros beyond; numbered over all ranks."""
    ranks = 1 if axis_name is None else axis_size(axis_name, num_ranks)
    for number in (num_rows, len(source)):
        if number % ranks:
            raise ValueError(
                f"axis_name = {axis_name!r}: its {ranks} ranks do not divide {number} rows evenly; leave axis_name "
                "out, and call this outside of shard_map, with whole arrays"
            )
    rows = num_rows // ranks
    # Where all rows stay, XLA is not asked to move them, which keeps it from sharding what comes before.
    all_stay = axis_name is None and isinstance(source, np.ndarray) and np.array_equal(source, np.arange(num_rows))
    source = jnp.asarray(source)
    if axis_name is not None:
        own = len(source) // ranks
        source = lax.dynamic_slice_in_dim(source, lax.axis_index(axis_name) * own, own)

    def take(path: Any, leaf: Any) -> jax.Array:
        leaf = with_rows(leaf, rows, "expert", f"tree{jax.tree_util.keystr(path)}")
        return leaf if all_stay else _take_bits(leaf, source, axis_name)

    with jax.named_scope("lplb_permute"):
        return jax.tree_util.tree_map_with_path(take, tree)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _take_bits(leaf: jax.Array, source: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """`_take`, with floats as integers: what moves bfloat16 by way of float32 may change the bits of a NaN."""
    width = jnp.finfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
    if width < 8:
        return _take(leaf, source, axis_name)
    bits = lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}"))
    return lax.bitcast_convert_type(_take(bits, source, axis_name), leaf.dtype)


@_take_bits.defjvp
def _take_bits_jvp(axis_name: AxisName | None, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # A bitcast has no derivative, and the rows' is their permutation.
    leaf, source = primals
    return _take_bits(leaf, source, axis_name), _take(tangents[0], source, axis_name)


def _take(leaf: jax.Array, source: jax.Array, axis_name: AxisName | None) -> jax.Array:
    if axis_name is not None:
        return rows_of_all(leaf, source, axis_name)
    return with_auto_axes(
        lambda leaf, source: leaf.at[source].get(mode="fill", fill_value=0, unique_indices=True),
        spec_of(leaf),
        leaf,
        source,
    )
