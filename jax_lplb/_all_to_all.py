"""Tokens to the ranks of their experts and back by `all_to_all`, through a buffer for each pair of ranks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_lplb._dispatch import Queues, rounds_for
from jax_lplb._gather import inverse, permute, tokens_to_cells, weighted_sum
from jax_lplb._mesh import AxisName


class Round(NamedTuple):
    """Index arrays, small and many, of a round; of the first, the tokens too.

    Pairs are tokens' choices; cells are the places of buffers, those for one peer after those for the other.
    """

    pair_of_cell: jax.Array  # int32 [cells], out of range for an empty one
    cell_of_pair: jax.Array  # int32 [pairs], out of range where the pair is not of the round
    group_sizes: jax.Array  # int32 [slots], rows that come for each
    back: jax.Array  # int32 [cells], the place of each cell that comes among rows sorted by slot
    order: jax.Array  # int32 [cells], its inverse
    cells: jax.Array | None = None  # of the first round: the tokens in its cells, gathered before


def num_rounds(queues: Queues, capacity: int) -> jax.Array:
    return rounds_for(jnp.sum(queues.of_ranks, axis=1, dtype=jnp.int32), capacity)


def prepare(queues: Queues, round_: jax.Array, capacity: int) -> Round:
    """The round of buffers of `capacity` cells for each peer, whose queue is sorted by slot."""
    ranks = len(queues.counts)
    own = queues.counts[queues.rank].reshape(ranks, -1)
    start = (jnp.cumsum(own, axis=1, dtype=jnp.int32) - own).reshape(-1)  # of each slot in the queue for its peer
    slot = queues.slot.reshape(-1)
    cell = start.at[slot].get(mode="clip") + queues.number.reshape(-1) - round_ * capacity
    is_cell = (slot < len(start)) & (cell >= 0) & (cell < capacity)
    cell_of_pair = jnp.where(is_cell, slot // own.shape[1] * capacity + cell, ranks * capacity)
    back, group_sizes = _by_slot(queues.of_ranks[queues.rank].T, round_ * capacity, capacity)
    return Round(inverse(cell_of_pair, ranks * capacity), cell_of_pair, group_sizes, back, inverse(back, len(back)))


def gather_first(round_: Round, tokens: jax.Array) -> Round:
    """The first round, with its tokens."""
    cells = tokens_to_cells(lax.stop_gradient(tokens), round_.pair_of_cell, round_.cell_of_pair)
    return round_._replace(cells=cells)


def dispatch(axis_name: AxisName, round_: Round, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows sorted by slot, and the sizes of slots' groups."""
    cells = tokens_to_cells(tokens, round_.pair_of_cell, round_.cell_of_pair, round_.cells)
    received = _exchange(axis_name, cells)
    # What the products make of these sizes comes late: nothing shall be launched before the exchange after a branch.
    received, group_sizes = lax.optimization_barrier((received, round_.group_sizes))
    return permute(received, round_.order, round_.back), group_sizes


def combine(axis_name: AxisName, round_: Round, rows: jax.Array, gates: jax.Array) -> jax.Array:
    """float32 [num_tokens, d_model]: for each token the sum of its rows, times gates."""
    returned = _exchange(axis_name, permute(rows, round_.back, round_.order))
    return weighted_sum(gates, returned, round_.cell_of_pair, round_.pair_of_cell)


def _exchange(axis_name: AxisName, cells: jax.Array) -> jax.Array:
    return lax.all_to_all(cells, axis_name, split_axis=0, concat_axis=0, tiled=True)


def _by_slot(coming: jax.Array, first: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Where each of the cells that come belongs among rows sorted by slot, and the number of rows of each slot.

    Of `coming` [peers, slots] pairs, the cells of each peer, [peers * capacity] in all, are the places `first` and
    following of its queue, which is sorted by slot; those beyond its end are empty and come last.
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
