"""Tokens to the ranks of their physical experts, through the experts, and back; within `shard_map`.

Buffers have a static size, a factor over what an even load needs. A batch that needs more goes through them in several
rounds, as many on all ranks: no token is dropped, and memory does not grow. The single round that balanced batches need
is differentiated as any other code; the backward pass of several runs each of them once more.

Rows of tokens are only ever gathered, by index arrays that are each other's inverses, in the backward pass too: no
scatter, whose order of additions would show on GPUs.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb import _ffi
from jax_lplb._count import count
from jax_lplb._mesh import AxisName
from jax_lplb._placement import Placement

Dispatch = Literal["all_to_all", "ring"]
# (weights of slots, rows [n, d_model] sorted by slot, group_sizes int32 [slots]) -> [n, d_model]; rows beyond those of
# the groups are padding, for which anything may be returned.
Experts = Callable[[Any, jax.Array, jax.Array], jax.Array]


def expert_parallel(
    tokens: jax.Array,
    physical_ids: jax.Array,
    gates: jax.Array,
    slots: Any,
    experts: Experts,
    placement: Placement,
    *,
    axis_name: AxisName,
    dispatch: Dispatch,
    buffer_factor: float,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """For each token the sum of its experts' results, weighted by the gates.

    Args:
      tokens: [num_tokens, d_model], of this rank.
      physical_ids: int32 [num_tokens, k]; negative ids are padding.
      gates: float32 [num_tokens, k].
      slots: a pytree, the weights of this rank's slots.
      experts: what runs on sorted rows.
      placement: the ranks' slots.
      axis_name: mesh axis, or axes, of the ranks.
      dispatch: "all_to_all": each rank sends its tokens to those that have their experts, a buffer of equal size to
        each. "ring": all ranks get all tokens, and add up their parts of the results.
      buffer_factor: size of the buffers, over what they would hold if all ranks sent and received the same.
      dtype: of the result; sums are float32.

    Returns:
      [num_tokens, d_model], and the number of rounds, int32 [].
    """
    ranks, slots_per_rank = placement.num_ranks, placement.slots_per_rank
    num_ids = physical_ids.size
    axes = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    others = tuple(sorted(_ffi.varying(tokens, physical_ids, *jax.tree.leaves(slots)) - axes))
    ids, rank = physical_ids.reshape(-1), lax.axis_index(axis_name)
    peers, most_ids = (ranks, num_ids) if dispatch == "all_to_all" else (1, num_ids * ranks)
    capacity = _capacity(buffer_factor * most_ids / ranks, most_ids, peers)
    layout = _Layout(experts, axis_name, slots_per_rank, capacity)
    # First all that ranks have to know of each other: what everyone sends to each slot, or everyone's ids.
    if dispatch == "all_to_all":
        own = _count(ids, placement.num_physical).reshape(ranks, slots_per_rank)
        gathered = lax.all_gather(own, axis_name, to="invarying")
        most = jnp.max(jnp.sum(gathered, axis=2, dtype=jnp.int32))
    else:
        gathered = lax.all_gather(ids, axis_name, tiled=True)
        most = lax.pmax(jnp.sum(gathered // slots_per_rank == rank, dtype=jnp.int32), axis_name)
    if others and capacity < most_ids:  # as many rounds for all devices that have copies of anything
        most = lax.pmax(_ffi.vary(most, frozenset(others)), others)
    num_rounds = jnp.maximum(-(-most // capacity), 1)
    if dispatch == "all_to_all":
        coming = lax.dynamic_index_in_dim(gathered, rank, axis=1, keepdims=False)
        length = jnp.sum(lax.dynamic_index_in_dim(gathered, rank, axis=0, keepdims=False), axis=1, dtype=jnp.int32)
        plan = _plan(ids, ids // slots_per_rank, length, placement)._replace(coming=coming)
        way = _Way(partial(_all_to_all_prepare, layout), partial(_all_to_all, layout))
    else:
        here = gathered // slots_per_rank == rank
        plan = _plan(gathered, jnp.where(here, 0, -1), jnp.sum(here, keepdims=True, dtype=jnp.int32), placement)
        way = _Way(partial(_ring_prepare, layout), partial(_ring, layout))
    first = way.prepare(plan, jnp.int32(0))
    if dispatch == "all_to_all":
        first = first._replace(cells=_tokens_to_cells(lax.stop_gradient(tokens), first))
    if capacity >= most_ids:
        return way.run(first, slots, tokens, gates).astype(dtype), jnp.int32(1)
    return _all_rounds(way, dtype, num_rounds, plan, first, slots, tokens, gates), num_rounds


def _capacity(wanted: float, most: int, peers: int) -> int:
    """Buffer cells for each peer; those for all are a multiple of 64, as tokamax's kernels need."""
    unit = 64 // math.gcd(64, peers)
    return max(math.ceil(min(wanted, most) / unit), 1) * unit


class _Layout(NamedTuple):
    """What is static of a round."""

    experts: Experts
    axis_name: AxisName
    slots_per_rank: int
    capacity: int  # buffer cells for each peer


class _Way(NamedTuple):
    """Of dispatching: of a plan and the number of a round, the round; and what is then done with tokens."""

    prepare: Callable[[Any, jax.Array], "_Round"]
    run: Callable[..., jax.Array]


class _Round(NamedTuple):
    """Index arrays, small and many, of a round; of the first, the tokens too."""

    pair_of_cell: jax.Array  # int32 [cells], out of range for an empty one
    cell_of_pair: jax.Array  # int32 [pairs], out of range where the pair is not of the round
    group_sizes: jax.Array  # int32 [slots], rows that come for each
    back: Any = None  # of all_to_all: int32 [cells], the place of each cell that comes among rows sorted by slot
    order: Any = None  # its inverse
    cells: Any = None  # of all_to_all's first: the tokens in its cells, gathered before the branch


class _Plan(NamedTuple):
    """Tokens' choices ("pairs" of token and expert) in the queues for each peer, sorted by slot."""

    slot: jax.Array  # int32 [pairs], physical expert
    peer: jax.Array  # int32 [pairs]; the number of peers where there is none
    number: jax.Array  # int32 [pairs], place in the peer's queue
    order: jax.Array  # int32 [pairs], pairs by slot: the queues, one after the other
    start: jax.Array  # int32 [peers], first of each queue
    length: jax.Array  # int32 [peers], of each queue
    coming: Any = None  # int32 [peers, slots], pairs that each peer has for each slot of this rank; of all_to_all


def _plan(slot: jax.Array, peer: jax.Array, length: jax.Array, placement: Placement) -> _Plan:
    peers = len(length)
    peer = jnp.where((slot >= 0) & (peer >= 0) & (peer < peers), peer, peers)
    key = jnp.uint16 if placement.num_physical < np.iinfo(np.uint16).max else jnp.int32  # the sort's time is by bits
    by_slot = jnp.where(peer < peers, slot, np.iinfo(key).max).astype(key)
    order = jnp.argsort(by_slot, stable=True).astype(jnp.int32)
    start = jnp.cumsum(length, dtype=jnp.int32) - length
    number = _inverse(order) - _gather(start, peer)
    return _Plan(slot, peer, number, order, start, length)


def _window(plan: _Plan, round_: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The pair of each buffer cell [peers * capacity] in a round, and the cell of each pair; out of range: none."""
    peers, pairs = len(plan.length), len(plan.slot)
    number = round_ * capacity + jnp.arange(capacity, dtype=jnp.int32)[None, :]
    place = jnp.where(number < plan.length[:, None], plan.start[:, None] + number, pairs)
    pair_of_cell = plan.order.at[place.reshape(-1)].get(mode="fill", fill_value=pairs)
    cell = plan.number - round_ * capacity
    within = (cell >= 0) & (cell < capacity) & (plan.peer < peers)
    return pair_of_cell, jnp.where(within, plan.peer * capacity + cell, peers * capacity)


def _all_to_all_prepare(layout: _Layout, plan: _Plan, number: jax.Array) -> _Round:
    back, group_sizes = _by_slot(plan.coming, number * layout.capacity, layout.capacity)
    return _Round(*_window(plan, number, layout.capacity), group_sizes, back, _inverse(back))


def _all_to_all(layout: _Layout, round_: _Round, slots: Any, tokens: jax.Array, gates: jax.Array) -> jax.Array:
    exchange = partial(lax.all_to_all, axis_name=layout.axis_name, split_axis=0, concat_axis=0, tiled=True)
    received = exchange(_tokens_to_cells(tokens, round_))
    # What the products make of these sizes comes late: nothing shall be launched before the exchange after a branch.
    received, group_sizes = lax.optimization_barrier((received, round_.group_sizes))
    done = layout.experts(slots, _permute(received, round_.order, round_.back), group_sizes)
    returned = exchange(_permute(done, round_.back, round_.order))
    return _weighted_sum(gates, returned, round_.cell_of_pair, round_.pair_of_cell)


def _by_slot(coming: jax.Array, first: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Where each of the cells that come belongs among rows sorted by slot, and the number of rows of each slot.

    The cells of each peer, [peers * capacity] in all, are the places `first` and following of its queue, which is
    sorted by slot; those beyond its end are empty and come last.
    """
    peers, slots = coming.shape
    end = jnp.clip(jnp.cumsum(coming, axis=1, dtype=jnp.int32) - first, 0, capacity)  # of each slot, among the cells
    end = jnp.concatenate([end, jnp.full_like(end[:, :1], capacity)], axis=1)  # empty cells, like one more slot
    begin = jnp.concatenate([jnp.zeros_like(end[:, :1]), end[:, :-1]], axis=1)
    number = end - begin
    upto = jnp.cumsum(number.T.reshape(-1), dtype=jnp.int32).reshape(slots + 1, peers).T  # slot by slot, peer by peer
    cell = jnp.arange(capacity, dtype=jnp.int32)
    slot = jnp.sum(cell[None, :, None] >= end[:, None, :-1], axis=2, dtype=jnp.int32)  # of each cell
    back = jnp.take_along_axis(upto - number - begin, slot, axis=1) + cell[None, :]
    return back.reshape(-1), jnp.sum(number[:, :-1], axis=0, dtype=jnp.int32)


def _ring_prepare(layout: _Layout, plan: _Plan, number: jax.Array) -> _Round:
    pair_of_cell, cell_of_pair = _window(plan, number, layout.capacity)
    slot = _gather(plan.slot, pair_of_cell) - lax.axis_index(layout.axis_name) * layout.slots_per_rank
    slot = jnp.where(pair_of_cell < len(plan.slot), slot, layout.slots_per_rank)
    return _Round(pair_of_cell, cell_of_pair, _count(slot, layout.slots_per_rank))


def _ring(layout: _Layout, round_: _Round, slots: Any, tokens: jax.Array, gates: jax.Array) -> jax.Array:
    tokens, gates = (lax.all_gather(array, layout.axis_name, tiled=True) for array in (tokens, gates))
    done = layout.experts(slots, _tokens_to_cells(tokens, round_), round_.group_sizes)
    parts = _weighted_sum(gates, done, round_.cell_of_pair, round_.pair_of_cell)
    return lax.psum_scatter(parts, layout.axis_name, tiled=True)


def _count(slots: jax.Array, number: int) -> jax.Array:
    """How often each of the slots 0 to number - 1 occurs."""
    return count(slots, number, None, "xla" if number > _ffi.MAX_EXPERTS else None)[0]


def _inverse(order: jax.Array) -> jax.Array:
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32), unique_indices=True)


def _gather(rows: jax.Array, source: jax.Array) -> jax.Array:
    """rows[source], with zeros where that is out of range."""
    return rows.at[source].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _weighted_sum(gates: jax.Array, cells: jax.Array, cell_of_pair: jax.Array, pair_of_cell: jax.Array) -> jax.Array:
    """float32: for each token the sum of its pairs' cells times its gates; a pair without a cell adds nothing."""
    of_pairs = _gather(cells, cell_of_pair).reshape(*gates.shape, -1).astype(jnp.float32)
    return jnp.sum(gates[..., None] * of_pairs, axis=1)


def _weighted_sum_forward(*operands: jax.Array) -> Any:
    return _weighted_sum(*operands), operands


def _weighted_sum_backward(residuals: Any, gradient: jax.Array) -> Any:
    gates, cells, cell_of_pair, pair_of_cell = residuals
    # All by cells, so that one kernel can do it: their rows are neither gathered by pairs again nor kept in float32.
    of_token = _gather(gradient, pair_of_cell // gates.shape[1])
    gate = _gather(gates.reshape(-1), pair_of_cell)
    of_gate = jnp.sum(cells.astype(jnp.float32) * of_token, axis=1)
    of_gates = _gather(of_gate, cell_of_pair).reshape(gates.shape)
    return of_gates, (gate[:, None] * of_token).astype(cells.dtype), None, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


@jax.custom_vjp
def _permute(rows: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """`_gather(rows, source)`, where `target` is the inverse of `source`."""
    return _gather(rows, source)


_permute.defvjp(
    lambda rows, source, target: (_permute(rows, source, target), target),
    lambda target, gradient: (_gather(gradient, target), None, None),
)


@jax.custom_vjp
def _tokens_to_cells(tokens: jax.Array, round_: _Round) -> jax.Array:
    """The token of each cell, zeros where there is none; gathered already, it is the tokens' gradient that matters."""
    if round_.cells is not None:
        return round_.cells
    k = len(round_.cell_of_pair) // len(tokens)
    return _gather(tokens, round_.pair_of_cell // k)


def _tokens_to_cells_forward(tokens: jax.Array, round_: _Round) -> Any:
    return _tokens_to_cells(tokens, round_), (round_.cell_of_pair, tokens)


def _tokens_to_cells_backward(residuals: Any, gradient: jax.Array) -> Any:
    cell_of_pair, tokens = residuals
    of_pairs = _gather(gradient, cell_of_pair)
    of_tokens = jnp.sum(of_pairs.reshape(len(tokens), -1, tokens.shape[1]), axis=1, dtype=jnp.float32)
    return of_tokens.astype(tokens.dtype), None


_tokens_to_cells.defvjp(_tokens_to_cells_forward, _tokens_to_cells_backward)


# GPUs wait for the host to learn of a condition: so there is one, before tokens travel, and then either the usual
# single round or a loop. Then the host has to catch up, so that few launches come before what takes long.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_rounds(way: _Way, dtype: Any, rounds: jax.Array, plan: _Plan, first: _Round, *operands: Any) -> jax.Array:
    """The sum of all rounds' results.

    `first`: the first round. `operands`: weights of slots, tokens and gates, by which it is differentiated.
    """
    return lax.cond(
        rounds > 1,
        lambda: _several_rounds(way, rounds, plan, *operands).astype(dtype),
        lambda: way.run(first, *operands).astype(dtype),
    )


def _several_rounds(way: _Way, rounds: jax.Array, plan: _Plan, *operands: Any) -> jax.Array:
    return _sum_of(rounds, lambda number: way.run(way.prepare(plan, number), *operands))


def _all_rounds_forward(way: _Way, dtype: Any, rounds: jax.Array, plan: _Plan, first: _Round, *operands: Any) -> Any:
    given = jax.tree.leaves((plan, first, operands))
    structure, places = None, []  # of what the backward pass needs; among `given`, which need not be copied

    def once() -> tuple[jax.Array, list[jax.Array]]:
        nonlocal structure, places
        result, pull = jax.vjp(lambda *operands: way.run(first, *operands).astype(dtype), *operands)
        kept, structure = jax.tree.flatten(pull)
        places = [next((i for i, leaf in enumerate(given) if leaf is one), None) for one in kept]
        return result, [one for one, i in zip(kept, places, strict=True) if i is None]

    def several() -> tuple[jax.Array, list[jax.Array]]:
        kept = [_zeros_like(leaf) for leaf in jax.eval_shape(once)[1]]  # rounds are run again in the backward pass
        return _several_rounds(way, rounds, plan, *operands).astype(dtype), kept

    result, kept = lax.cond(rounds > 1, several, once)
    rest = iter(kept)
    pull = jax.tree.unflatten(structure, [next(rest) if i is None else given[i] for i in places])
    return result, (rounds, plan, operands, pull)  # plan and operands: for the backward pass of several rounds


def _all_rounds_backward(way: _Way, dtype: Any, residuals: Any, gradient: jax.Array) -> Any:
    rounds, plan, operands, pull = residuals

    def of_round(number: jax.Array) -> Any:
        result, pull_round = jax.vjp(partial(way.run, way.prepare(plan, number)), *operands)
        return pull_round(gradient.astype(result.dtype))

    return None, None, None, *lax.cond(rounds > 1, lambda: _sum_of(rounds, of_round), lambda: pull(gradient))


_all_rounds.defvjp(_all_rounds_forward, _all_rounds_backward)


def _sum_of(rounds: jax.Array, of_round: Callable[[jax.Array], Any]) -> Any:
    def add(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        round_, sums = state
        return round_ + 1, jax.tree.map(jnp.add, sums, of_round(round_))

    first = _ffi.vary(jnp.int32(0), _ffi.varying(rounds))
    zeros = jax.tree.map(_zeros_like, jax.eval_shape(of_round, first))
    return lax.while_loop(lambda state: state[0] < rounds, add, (first, zeros))[1]


def _zeros_like(array: jax.ShapeDtypeStruct) -> jax.Array:
    # Not `jax.typeof(array)`: on a mesh with axes that are not manual that wants a sharding too.
    kind = array.manual_axis_type
    return _ffi.vary(jnp.zeros(array.shape, array.dtype), kind.varying if kind else frozenset())
