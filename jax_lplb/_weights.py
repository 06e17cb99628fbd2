"""Experts' weights: copies for the redundant slots, and rows carried from one order to another."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb._balance import AxisName, axis_size
from jax_lplb._collective import in_mesh_order, rows_of_all
from jax_lplb._mesh import spec_of, with_auto_axes
from jax_lplb._placement import Placement, check_one_layer, owners_and_receivers
from jax_lplb._replicate import with_rows

Route = tuple[tuple[int, int], ...]  # (sender, receiver), as `ppermute` takes them


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows"],
    meta_fields=["axis_name", "routes", "early", "late", "dtypes", "whole"],
)
@dataclass(frozen=True)
class Travel:
    """How copies travel, and their gradients back: in two halves."""

    rows: jax.Array  # int32, the rows that this rank sends; without a topology, the experts of its slots
    axis_name: AxisName  # with routes: in the mesh's order
    routes: tuple[Route, ...] | None  # of each column of the topology; copy k takes route k % len(routes)
    early: tuple[tuple[int, ...], ...]  # messages: the numbers of the copies that travel together
    late: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]  # of each leaf's slots
    whole: bool  # leaves of a dtype side by side; over axes that are not manual each may be cut in its own way

    @property
    def back(self) -> tuple[Route, ...]:
        return tuple(tuple((receiver, sender) for sender, receiver in route) for route in self.routes or ())


Arrays = list[list[Any]]  # what each message takes or brings: an array for leaves that go side by side


def send_early(
    home_weights: Any, value: Any, placement: Placement, axis_name: AxisName, dtype: Any
) -> tuple[tuple[Travel, Arrays, Arrays], Any]:
    """Sends half of the copies, if along a topology.

    What is sent waits for the value, which comes back for what shall not overtake the preparation of what is sent.

    Returns:
      What `send_late` takes: how copies travel, the arrays that came, and those that wait; and the value.
    """
    ranks = axis_size(axis_name, placement.num_ranks)
    home, rest = divmod(placement.num_experts, ranks)
    if rest:
        raise ValueError(f"placement: its {ranks} ranks do not divide the {placement.num_experts} experts evenly")
    leaves = [
        with_rows(leaf, home, f"home_weights{jax.tree_util.keystr(path)}")
        for path, leaf in jax.tree_util.tree_leaves_with_path(home_weights)
    ]
    dtypes = tuple(leaf.dtype if dtype is None else jnp.dtype(dtype) for leaf in leaves)
    whole = jax.sharding.get_abstract_mesh().are_all_axes_manual
    slots, topology, rank = placement.slots_per_rank, placement.topology, lax.axis_index(axis_name)
    of_slots = jnp.asarray(placement.phy2log).reshape(ranks, slots)
    if topology is None:
        rows = jnp.minimum(of_slots[rank], placement.num_experts - 1)
        return (Travel(rows, axis_name, None, (), (), dtypes, whole), [], []), value
    _, receiver = owners_and_receivers(topology, ranks, slots - home)
    experts = of_slots[receiver, home + np.arange(slots - home)]
    rows = (jnp.asarray(placement.log2phy)[experts, 0] % slots)[rank]
    axes, number_of = in_mesh_order(axis_name, ranks)
    half = -(-len(rows) // 2)
    columns = range(topology.num_columns if len(rows) else 0)
    routes = tuple(
        tuple(zip(number_of.tolist(), number_of[receiver[:, column]].tolist(), strict=True)) for column in columns
    )
    early, late = (
        tuple(numbers for column in columns if (numbers := tuple(k for k in some if k % len(routes) == column)))
        for some in (range(half), range(half, len(rows)))
    )
    travel = Travel(rows, axes, routes, early, late, dtypes, whole)

    def taken(numbers: tuple[int, ...]) -> list[Any]:
        of_leaves = [lax.stop_gradient(leaf).at[rows[np.array(numbers)]].get(mode="clip") for leaf in leaves]
        return _side_by_side(of_leaves, travel)

    with jax.named_scope("lplb_send"):
        arrays, waiting = [taken(numbers) for numbers in early], [taken(numbers) for numbers in late]
        arrays, value = lax.optimization_barrier((arrays, value))
        copies = _along(axes, routes, early, arrays)
    return (travel, copies, waiting), value


def send_late(
    home_weights: Any, sent: tuple[Travel, Arrays, Arrays], value: Any
) -> tuple[tuple[Any, Arrays], tuple[Travel, Arrays], Any]:
    """Sends the other half, once the first has come and the value is known, and before what follows from it.

    In the backward pass the gradients of this half travel where XLA finds time for them: from the end of that of
    `receive` until the sums are needed, the optimiser's step maybe.

    Returns:
      What `receive` takes: the home weights with what came, differentiable; what else was sent; and the value.
    """
    if not sent[0].late:
        return (home_weights, []), sent[:2], value
    (travel, copies, waiting), value = lax.optimization_barrier((sent, value))
    leaves, tree = jax.tree.flatten(home_weights)
    leaves, arrays = _send_late(leaves, waiting, travel)
    return (jax.tree.unflatten(tree, leaves), arrays), (travel, copies), value


# This and `_receive` are differentiated by hand, so that the gradients of copies are added to the rows' own in place;
# JAX would scatter them into zeros and add up whole leaves.
@jax.custom_vjp
def _send_late(leaves: list[jax.Array], waiting: Arrays, travel: Travel) -> tuple[list[jax.Array], Arrays]:
    """The leaves, from here on without the gradients of these copies, and what came."""
    return _send_late_forward(leaves, waiting, travel)[0]


def _send_late_forward(leaves: list[jax.Array], waiting: Arrays, travel: Travel) -> Any:
    with jax.named_scope("lplb_send"):
        return (leaves, _along(travel.axis_name, travel.routes or (), travel.late, waiting)), travel


def _send_late_backward(travel: Travel, gradients: Any) -> Any:
    sums, arrays = jax.tree.map(lambda one: None if one.dtype == jax.dtypes.float0 else one, gradients)
    with jax.named_scope("lplb_send"):
        arrays = _along(travel.axis_name, travel.back, travel.late, arrays)
    for numbers, of_message in zip(travel.late, arrays, strict=True):
        for i, of_rows in enumerate(_apart(of_message, gradients[0], travel)):
            if sums[i] is not None and of_rows is not None:
                sums[i] = _add_rows(_flat(sums[i], travel), travel.rows, numbers, of_rows).reshape(sums[i].shape)
    return sums, None, None


_send_late.defvjp(_send_late_forward, _send_late_backward)


def receive(
    weights: tuple[Any, Arrays], sent: tuple[Travel, Arrays], exchange: Callable[[Any], Any], tokens: Any
) -> tuple[Any, Any]:
    """The slots of this rank, copies included, and `exchange(tokens)`: along a topology tokens travel beside the cast.

    In the backward pass gradients of the early copies travel first, then those of tokens, beside the cast of the rows'
    own. That cast takes about as long as tokens travel, and needs no links; where the order is left to XLA, it does it
    while the few copies travel, and nothing while tokens do.
    """
    (home_weights, late), (travel, early) = weights, sent
    leaves, tree = jax.tree.flatten(home_weights)
    if travel.routes == () and all(leaf.dtype == dtype for leaf, dtype in zip(leaves, travel.dtypes, strict=True)):
        return home_weights, exchange(tokens)
    with jax.named_scope("lplb_receive"):
        if travel.routes is None:
            casted = [leaf.astype(dtype) for leaf, dtype in zip(leaves, travel.dtypes, strict=True)]
            slots, tokens = [rows_of_all(leaf, travel.rows, travel.axis_name) for leaf in casted], exchange(tokens)
        else:
            slots, tokens = _receive(exchange, leaves, late, early, travel, tokens)
    return jax.tree.unflatten(tree, slots), tokens


# The barriers make the order: what comes out of them waits for all that goes in.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _receive(
    exchange: Callable[[Any], Any], leaves: list[jax.Array], late: Arrays, early: Arrays, travel: Travel, tokens: Any
) -> tuple[list[jax.Array], Any]:
    """The leaves with the copies below, and exchange(tokens)."""
    return _receive_forward(exchange, leaves, late, early, travel, tokens)[0]


def _receive_forward(
    exchange: Callable[[Any], Any], leaves: list[jax.Array], late: Arrays, early: Arrays, travel: Travel, tokens: Any
) -> Any:
    copies, tokens = lax.optimization_barrier(([*early, *late], tokens))
    leaves, tokens = lax.optimization_barrier((leaves, tokens))
    tokens, pull = jax.vjp(exchange, tokens)
    slots = []
    for leaf, dtype in zip(leaves, travel.dtypes, strict=True):
        casted = _flat(leaf, travel).astype(dtype)
        slots.append(jnp.pad(casted, [(0, len(travel.rows)), *[(0, 0)] * (casted.ndim - 1)]))
    # The barrier, or one kernel would cast and put copies below, and take 1.7 times as long; the numbers with it, since
    # what goes to a constant place XLA copies asynchronously on GPUs, and then starts the exchange late.
    slots, first = lax.optimization_barrier((slots, [jnp.int32(len(leaf)) for leaf in leaves]))
    for numbers, arrays in zip(travel.early + travel.late, copies, strict=True):
        for i, rows in enumerate(_apart(arrays, leaves, travel)):
            for k, row in zip(numbers, rows, strict=True):
                slots[i] = lax.dynamic_update_index_in_dim(slots[i], row, first[i] + k, 0)
    slots = [of_leaf.reshape(len(of_leaf), *leaf.shape[1:]) for of_leaf, leaf in zip(slots, leaves, strict=True)]
    slots, tokens = lax.optimization_barrier((slots, tokens))
    return (slots, tokens), (travel, pull, [jnp.zeros(0, leaf.dtype) for leaf in leaves])


def _receive_backward(exchange: Callable[[Any], Any], residuals: Any, gradients: Any) -> Any:
    (travel, pull, like), (of_slots, of_tokens) = residuals, gradients
    of_slots = {i: of_leaf for i, of_leaf in enumerate(of_slots) if of_leaf.dtype != jax.dtypes.float0}

    def of_message(i: int, numbers: tuple[int, ...]) -> jax.Array:
        home = len(of_slots[i]) - len(travel.rows)
        return of_slots[i][home + numbers[0] : home + numbers[-1] + 1 : len(travel.back)]

    # Leaf by leaf, the last first: its gradient is known before the others' where leaves are used in their order, as
    # w_in and w_out are. But for the barrier XLA makes one message of several, which waits until all are known.
    of_early: dict[int, Arrays] = {}
    for i in sorted(of_slots, reverse=True):
        messages = [[of_message(i, numbers)] for numbers in travel.early]
        of_early, messages = lax.optimization_barrier((of_early, messages))
        of_early[i] = _along(travel.axis_name, travel.back, travel.early, messages)
    of_early, of_tokens = lax.optimization_barrier((of_early, of_tokens))
    of_slots, of_tokens = lax.optimization_barrier((of_slots, of_tokens))
    (of_tokens,) = pull(of_tokens)
    sums = {
        i: of_leaf[: len(of_leaf) - len(travel.rows)].astype(like[i].dtype)
        for i, of_leaf in of_slots.items()
        if jnp.issubdtype(like[i].dtype, jnp.inexact)
    }
    of_late = [
        _side_by_side([of_message(i, numbers) if i in of_slots else None for i in range(len(like))], travel)
        for numbers in travel.late
    ]
    sums = lax.optimization_barrier(sums)
    for i in sums:
        for numbers, (of_rows,) in zip(travel.early, of_early[i], strict=True):
            sums[i] = _add_rows(sums[i], travel.rows, numbers, of_rows)
    sums, of_late, of_tokens = lax.optimization_barrier((sums, of_late, of_tokens))
    return [sums.get(i) for i in range(len(like))], of_late, None, None, of_tokens


_receive.defvjp(_receive_forward, _receive_backward)


def _add_rows(leaf: jax.Array, rows: jax.Array, numbers: tuple[int, ...], values: jax.Array) -> jax.Array:
    """Adds the values, of copies of these numbers, to the leaf's rows that they are copies of."""
    for k, value in zip(numbers, values, strict=True):
        value = value.astype(leaf.dtype) + lax.dynamic_index_in_dim(leaf, rows[k], keepdims=False)
        leaf = lax.dynamic_update_index_in_dim(leaf, value, rows[k], 0)
    return leaf


def _along(axis_name: AxisName, routes: Sequence[Route], messages: Sequence[tuple[int, ...]], arrays: Arrays) -> Arrays:
    """What comes of each of the messages; of those of which nothing is sent, None."""
    return [
        [rows if rows is None else lax.ppermute(rows, axis_name, routes[numbers[0] % len(routes)]) for rows in of_one]
        for numbers, of_one in zip(messages, arrays, strict=True)
    ]


def _side_by_side(leaves: Sequence[Any], travel: Travel) -> list[Any]:
    """Leaves [rows, ...] as one array [rows, elements] for each dtype; of leaves that are None, None."""
    parts = [
        leaf if leaf is None else _flat(leaf, travel).astype(dtype)
        for leaf, dtype in zip(leaves, travel.dtypes, strict=True)
    ]
    if not travel.whole:
        return parts
    arrays: dict[Any, list[jax.Array]] = {dtype: [] for dtype in travel.dtypes}
    for part, dtype in zip(parts, travel.dtypes, strict=True):
        arrays[dtype] += [] if part is None else [part]
    return [jnp.concatenate(of_dtype, axis=1) if of_dtype else None for of_dtype in arrays.values()]


def _apart(arrays: list[Any], like: Sequence[Any], travel: Travel) -> list[Any]:
    """What `_side_by_side` made of leaves [rows, ...] like these: for each its rows, flat."""
    if not travel.whole:
        return arrays
    left = dict(zip(dict.fromkeys(travel.dtypes), arrays, strict=True))
    parts: list[Any] = []
    for leaf, dtype in zip(like, travel.dtypes, strict=True):
        part = None
        if left[dtype] is not None:
            part, left[dtype] = jnp.split(left[dtype], [math.prod(leaf.shape[1:])], axis=1)
        parts.append(part)
    return parts


def _flat(leaf: jax.Array, travel: Travel) -> jax.Array:
    """[rows, elements], where leaves are whole: laid out so, XLA copies rows as they are."""
    return leaf.reshape(len(leaf), math.prod(leaf.shape[1:])) if travel.whole else leaf


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
    check_one_layer("old", old)
    check_one_layer("new", new)
    if old.num_experts != new.num_experts:
        raise ValueError(f"old and new must have equally many experts, got {old.num_experts} and {new.num_experts}")
    return _take_rows(tree, _inverse(old.home_order)[new.home_order], axis_name, new.num_ranks)


def to_logical(tree: Any, placement: Placement, *, axis_name: AxisName | None = None) -> Any:
    """Carries weights to logical order, as checkpoints hold them; arguments and errors as of `permute_experts`."""
    check_one_layer("placement", placement)
    return _take_rows(tree, _inverse(placement.home_order), axis_name, placement.num_ranks)


def from_logical(tree: Any, placement: Placement, *, axis_name: AxisName | None = None) -> Any:
    """Carries weights from logical order to that of home slots; arguments and errors as of `permute_experts`."""
    check_one_layer("placement", placement)
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

    source = jnp.asarray(source)
    if axis_name is not None:
        source = lax.dynamic_slice_in_dim(source, lax.axis_index(axis_name) * rows, rows)

    def take(path: Any, leaf: Any) -> jax.Array:
        leaf = with_rows(leaf, rows, f"tree{jax.tree_util.keystr(path)}")
        return _take_bits(leaf, source, axis_name)

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
        lambda leaf, source: leaf.at[source].get(mode="promise_in_bounds", unique_indices=True),
        spec_of(leaf),
        leaf,
        source,
    )
