"""Tokens to the ranks of their physical experts, through the experts, and back; within `shard_map`.

Buffers have a static size, a factor over what an even load needs. A batch that needs more goes through them in several
rounds, as many on all ranks: no token is dropped, and memory does not grow. The single round that balanced batches need
is differentiated as any other code; the backward pass of several runs each of them once more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_lplb import _all_to_all, _dispatch, _ffi
from jax_lplb._dispatch import Handle, Queues
from jax_lplb._mesh import AxisName
from jax_lplb._placement import Placement
from jax_lplb._replicate import Copies, Transfer, Transport, bring_now, copies_of, replicate

Dispatch = Literal["peer", "all_to_all", "ring"]
# (weights of slots, rows [n, d_model] sorted by slot, group_sizes int32 [slots]) -> [n, d_model]; rows beyond those of
# the groups are padding, for which anything may be returned.
Experts = Callable[[Any, jax.Array, jax.Array], jax.Array]


class Home(NamedTuple):
    """Weights and options as `replicate` takes them."""

    weights: Any
    dtype: Any
    transport: Transport


def expert_parallel(
    tokens: jax.Array,
    physical_ids: jax.Array,
    gates: jax.Array,
    slots: Any,
    experts: Experts,
    placement: Placement,
    *,
    axis_name: AxisName,
    dispatch: Dispatch | None,
    buffer_factor: float,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """For each token the sum of its experts' results, weighted by the gates.

    Args:
      tokens: [num_tokens, d_model], of this rank.
      physical_ids: int32 [num_tokens, k]; negative ids are padding.
      gates: float32 [num_tokens, k].
      slots: a pytree, the weights of this rank's slots; or `Home` ones, to be brought, with tokens where that can be.
      experts: what runs on sorted rows.
      placement: the ranks' slots.
      axis_name: mesh axis, or axes, of the ranks.
      dispatch: "peer": each rank reads the tokens for its experts from the others' memory, and writes the results
        there. "all_to_all": each rank sends its tokens to those that have their experts, a buffer of equal size to
        each. "ring": all ranks get all tokens, and add up their parts of the results. None: "peer" where that can be,
        else "all_to_all".
      buffer_factor: size of the buffers, over what they would hold if all ranks got the same, and with "all_to_all"
        each the same from each.
      dtype: of the result; sums are float32.

    Returns:
      [num_tokens, d_model], and the number of rounds, int32 [].
    """
    ranks, most = placement.num_ranks, physical_ids.size
    axes = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    given = jax.tree.leaves(slots.weights if isinstance(slots, Home) else slots)
    others = tuple(sorted(_ffi.varying(tokens, physical_ids, *given) - axes))
    implementation: _ffi.Implementation = "xla"
    if dispatch in (None, "peer"):
        implementation = _dispatch.implementation_of(
            dispatch, axis_name, tokens, physical_ids.shape[1], "dispatch", "all_to_all"
        )
        dispatch = dispatch or ("all_to_all" if implementation == "xla" else "peer")
    copies: Copies | None = None
    if isinstance(slots, Home):
        home = slots
        if dispatch == "peer":
            copies = copies_of(home.weights, placement, axis_name, home.dtype, home.transport)
        if copies is not None:
            slots = copies.leaves
        else:
            slots = replicate(home.weights, placement, axis_name, home.dtype, home.transport)
    queues = _dispatch.queue(physical_ids, placement, axis_name, implementation)
    if dispatch == "all_to_all":
        capacity = _dispatch.capacity_of(buffer_factor * most / ranks, most, ranks)
        num_rounds = _all_to_all.num_rounds(queues, capacity)
        way = _Way(
            lambda queues, number: _all_to_all.prepare(queues, number, capacity),
            partial(_all_to_all.dispatch, axis_name),
            partial(_all_to_all.combine, axis_name),
            experts,
            None,
            None,
        )
    else:
        most = most * ranks
        capacity = _dispatch.capacity_of(buffer_factor * most / ranks, most)
        num_rounds = queues.num_rounds(capacity)
        way = _Way(
            lambda queues, number: queues.handle(number, capacity, axis_name, implementation),
            lambda handle, tokens: (_dispatch.bring(tokens, handle), handle.group_sizes),
            lambda handle, rows, gates: _dispatch.add_up(rows, gates, handle),
            experts,
            None if copies is None else copies.transfer,
            None if copies is None else copies.tree,
        )
    if others and capacity < most:  # as many rounds for all devices that have copies of anything
        num_rounds = lax.pmax(_ffi.vary(num_rounds, frozenset(others)), others)
    batch = _Batch(queues, None if copies is None else copies.rows)
    first = way.prepare(queues, jnp.int32(0))
    if dispatch == "all_to_all":
        first = _all_to_all.gather_first(first, tokens)
    if capacity >= most:
        return way.run_once(first, batch, slots, tokens, gates).astype(dtype), jnp.int32(1)
    return _all_rounds(way, dtype, num_rounds, batch, first, slots, tokens, gates), num_rounds


Round = Handle | _all_to_all.Round  # where tokens go in a round


class _Batch(NamedTuple):
    """What is known of a batch."""

    queues: Queues
    rows: Any  # where rows of weights are that are brought with tokens


class _Way(NamedTuple):
    """Of tokens: how a round is prepared, how they get to their experts, and back."""

    prepare: Callable[[Queues, jax.Array], Any]
    dispatch: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    combine: Callable[[Any, jax.Array, jax.Array], jax.Array]
    experts: Experts
    transfer: Transfer | None  # of weights that are brought with tokens
    tree: Any

    def run(self, round_: Round, slots: Any, tokens: jax.Array, gates: jax.Array) -> jax.Array:
        rows, group_sizes = self.dispatch(round_, tokens)
        return self.combine(round_, self.experts(slots, rows, group_sizes), gates)

    def run_once(self, round_: Any, batch: _Batch, weights: Any, tokens: jax.Array, gates: jax.Array) -> jax.Array:
        """The only round of a batch, which brings weights with its tokens."""
        if self.transfer is None:
            return self.run(round_, weights, tokens, gates)
        rows, slots = _dispatch.bring_beside(tokens, round_, weights, batch.rows, self.transfer)
        done = self.experts(jax.tree.unflatten(self.tree, slots), rows, round_.group_sizes)
        return self.combine(round_, done, gates)

    def slots(self, batch: _Batch, weights: Any) -> Any:
        """The weights, brought before all rounds."""
        if self.transfer is None:
            return weights
        return jax.tree.unflatten(self.tree, bring_now(self.transfer, weights, batch.rows))


# GPUs wait for the host to learn of a condition: so there is one, before tokens travel, and then either the usual
# single round or a loop. Then the host has to catch up, so that few launches come before what takes long.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_rounds(way: _Way, dtype: Any, rounds: jax.Array, batch: _Batch, first: Round, *operands: Any) -> jax.Array:
    """The sum of all rounds' results.

    `first`: the first round. `operands`: weights, tokens and gates, by which it is differentiated.
    """
    return lax.cond(
        rounds > 1,
        lambda: _several_rounds(way, rounds, batch, *operands).astype(dtype),
        lambda: way.run_once(first, batch, *operands).astype(dtype),
    )


def _several_rounds(way: _Way, rounds: jax.Array, batch: _Batch, weights: Any, *operands: Any) -> jax.Array:
    slots = way.slots(batch, weights)
    return _sum_of(rounds, lambda number: way.run(way.prepare(batch.queues, number), slots, *operands))


def _all_rounds_forward(way: _Way, dtype: Any, rounds: jax.Array, batch: _Batch, first: Round, *operands: Any) -> Any:
    given = jax.tree.leaves((batch, first, operands))
    structure, places = None, []  # of what the backward pass needs; among `given`, which need not be copied

    def once() -> tuple[jax.Array, list[jax.Array]]:
        nonlocal structure, places
        result, pull = jax.vjp(lambda *operands: way.run_once(first, batch, *operands).astype(dtype), *operands)
        kept, structure = jax.tree.flatten(pull)
        places = [next((i for i, leaf in enumerate(given) if leaf is one), None) for one in kept]
        return result, [one for one, i in zip(kept, places, strict=True) if i is None]

    def several() -> tuple[jax.Array, list[jax.Array]]:
        kept = [_zeros_like(leaf) for leaf in jax.eval_shape(once)[1]]  # rounds are run again in the backward pass
        return _several_rounds(way, rounds, batch, *operands).astype(dtype), kept

    result, kept = lax.cond(rounds > 1, several, once)
    rest = iter(kept)
    pull = jax.tree.unflatten(structure, [next(rest) if i is None else given[i] for i in places])
    return result, (rounds, batch, operands, pull)  # batch and operands: for the backward pass of several rounds


def _all_rounds_backward(way: _Way, dtype: Any, residuals: Any, gradient: jax.Array) -> Any:
    rounds, batch, (weights, *operands), pull = residuals

    def of_rounds() -> Any:
        slots, pull_slots = jax.vjp(partial(way.slots, batch), weights)

        def of_round(number: jax.Array) -> Any:
            round_ = way.prepare(batch.queues, number)
            result, pull_round = jax.vjp(partial(way.run, round_), slots, *operands)
            return pull_round(gradient.astype(result.dtype))

        of_slots, *rest = _sum_of(rounds, of_round)
        return *pull_slots(of_slots), *rest

    return None, None, None, *lax.cond(rounds > 1, of_rounds, lambda: pull(gradient))


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
