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

from jax_lplb import _all_to_all, _dispatch, _ffi, _peer, _replicate
from jax_lplb._dispatch import Handle, Queues
from jax_lplb._mesh import AxisName
from jax_lplb._placement import Placement
from jax_lplb._replicate import Copies, Transfer, Transport, add_up_at_home, copies_of, replicate

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
) -> tuple[jax.Array, jax.Array, Any]:
    """For each token the sum of its experts' results, weighted by the gates.

    Args:
      tokens: [num_tokens, d_model], of this rank.
      physical_ids: int32 [num_tokens, k]; negative ids are padding, whose tokens and gates may hold anything.
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
      [num_tokens, d_model], the number of rounds, int32 [], and the slots; None where they are not kept.
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
        (rows, brought), group_sizes = way.begin(first, batch, None, slots, tokens)
        result, num_rounds = way.finish(first, group_sizes, rows, brought, gates).astype(dtype), jnp.int32(1)
        kept = way.kept(brought)
    else:
        result, kept = _all_rounds(way, dtype, num_rounds, batch, first, slots, tokens, gates)
    return result, num_rounds, slots if copies is None else kept


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
    transfer: Transfer | None = None  # of weights that are brought with tokens
    tree: Any = None  # that their slots are leaves of

    def whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, in which weights are on their way."""
        return function if self.transfer is None else _peer.with_what_is_coming(function, _dispatch.ONCE)

    def coming(self, batch: _Batch, weights: Any) -> _peer.Coming | None:
        """Weights that are on their way from now on; None: they are there."""
        return None if self.transfer is None else _replicate.begin(self.transfer, weights, batch.rows)

    def begin(
        self, round_: Any, batch: _Batch, coming: _peer.Coming | None, weights: Any, tokens: jax.Array
    ) -> tuple[Any, jax.Array]:
        """The only round of a batch, which brings weights with its tokens: rows and slots, and group sizes."""
        if self.transfer is None:
            rows, group_sizes = self.dispatch(round_, tokens)
            return (rows, weights), group_sizes
        rows, slots = _dispatch.bring_beside(tokens, round_, weights, batch.rows, self.transfer, coming)
        return (rows, jax.tree.unflatten(self.tree, slots)), round_.group_sizes

    def finish(self, round_: Any, group_sizes: jax.Array, rows: jax.Array, slots: Any, gates: jax.Array) -> jax.Array:
        return self.combine(round_, self.experts(slots, rows, group_sizes), gates)

    def run(self, round_: Round, slots: Any, tokens: jax.Array, gates: jax.Array) -> jax.Array:
        """One of several rounds, for which the weights are there."""
        rows, group_sizes = self.dispatch(round_, tokens)
        return self.finish(round_, group_sizes, rows, slots, gates)

    def kept(self, slots: Any) -> Any:
        """The slots that were brought, where they are the caller's to keep: in the place of what was given.

        Elsewhere they would take memory for nothing, if there is no backward pass.
        """
        return slots if self.transfer is not None and self.transfer.has_room else None

    def slots(self, coming: _peer.Coming | None, weights: Any) -> Any:
        """The weights, there before all rounds."""
        if self.transfer is None or coming is None:
            return weights
        return jax.tree.unflatten(self.tree, _replicate.finish(self.transfer, weights, coming))

    def of_weights(self, batch: _Batch, of_slots: Any) -> Any:
        """The gradients of the weights."""
        if self.transfer is None:
            return of_slots
        return add_up_at_home(self.transfer, batch.rows, jax.tree.leaves(of_slots))


# GPUs wait for the host to learn of a condition: so there is one, before tokens travel, and then either the usual
# single round or a loop. Then the host has to catch up, so that few launches come before what takes long. Meanwhile
# weights are on their way already.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_rounds(way: _Way, dtype: Any, rounds: jax.Array, batch: _Batch, first: Round, *operands: Any) -> Any:
    """The sum of all rounds' results, and the slots that are kept.

    `first`: the first round. `operands`: weights, tokens and gates, by which it is differentiated.
    """

    def run(rounds: jax.Array, batch: _Batch, first: Round, weights: Any, tokens: jax.Array, gates: jax.Array) -> Any:
        coming = way.coming(batch, weights)

        def once() -> Any:
            (rows, slots), group_sizes = way.begin(first, batch, coming, weights, tokens)
            return way.finish(first, group_sizes, rows, slots, gates).astype(dtype), way.kept(slots)

        def several() -> Any:
            result, slots = _several_rounds(way, rounds, batch, coming, weights, tokens, gates)
            return result.astype(dtype), way.kept(slots)

        return lax.cond(rounds > 1, several, once)

    return way.whole(run)(rounds, batch, first, *operands)


def _several_rounds(
    way: _Way, rounds: jax.Array, batch: _Batch, coming: _peer.Coming | None, weights: Any, *operands: Any
) -> tuple[jax.Array, Any]:
    slots = way.slots(coming, weights)
    return _sum_of(rounds, lambda number: way.run(way.prepare(batch.queues, number), slots, *operands)), slots


def _all_rounds_forward(way: _Way, dtype: Any, rounds: jax.Array, batch: _Batch, first: Round, *operands: Any) -> Any:
    structure, tree, places = None, None, []  # of what the backward pass needs; among what need not be copied

    def run(rounds: jax.Array, batch: _Batch, first: Round, weights: Any, tokens: jax.Array, gates: jax.Array) -> Any:
        given = jax.tree.leaves((batch, first, weights, tokens, gates))
        coming = way.coming(batch, weights)

        def once() -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
            nonlocal structure, tree, places
            (rows, slots), pull_begin, group_sizes = jax.vjp(
                partial(way.begin, first, batch, coming), weights, tokens, has_aux=True
            )
            result, pull_finish = jax.vjp(
                lambda *operands: way.finish(first, group_sizes, *operands).astype(dtype), rows, slots, gates
            )
            kept, structure = jax.tree.flatten((pull_begin, pull_finish))
            brought, tree = jax.tree.flatten(slots)
            there = [*given, *brought]
            places = [next((i for i, leaf in enumerate(there) if leaf is one), None) for one in kept]
            kept = [one for one, i in zip(kept, places, strict=True) if i is None]
            return result, *_together([] if way.transfer is None else brought, kept)

        def several() -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
            _, _, kept = jax.eval_shape(once)
            result, slots = _several_rounds(way, rounds, batch, coming, weights, tokens, gates)
            brought = [] if way.transfer is None else jax.tree.leaves(slots)
            # Rounds are run again in the backward pass.
            return result.astype(dtype), *_together(brought, [_zeros_like(leaf) for leaf in kept])

        return lax.cond(rounds > 1, several, once)

    result, brought, kept = way.whole(run)(rounds, batch, first, *operands)
    weights, tokens, gates = operands
    slots = weights if way.transfer is None else jax.tree.unflatten(tree, brought)
    there = [*jax.tree.leaves((batch, first, operands)), *jax.tree.leaves(slots)]
    rest = iter(kept)
    pulls = jax.tree.unflatten(structure, [next(rest) if i is None else there[i] for i in places])
    return (result, way.kept(slots)), (rounds, batch, slots, tokens, gates, pulls)


def _together(brought: list[jax.Array], kept: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Both: where JAX needs any of it again, it also waits for the weights that it has begun to bring."""
    return lax.optimization_barrier((brought, kept)) if brought else (brought, kept)


def _all_rounds_backward(way: _Way, dtype: Any, residuals: Any, gradients: Any) -> Any:
    gradient, _ = gradients  # the slots that are kept have none
    rounds, batch, slots, tokens, gates, (pull_begin, pull_finish) = residuals

    def once() -> Any:
        of_rows, of_slots, of_gates = pull_finish(gradient)
        return *pull_begin((of_rows, of_slots)), of_gates

    def several() -> Any:
        def of_round(number: jax.Array) -> Any:
            round_ = way.prepare(batch.queues, number)
            result, pull_round = jax.vjp(partial(way.run, round_), slots, tokens, gates)
            return pull_round(gradient.astype(result.dtype))

        of_slots, *rest = _sum_of(rounds, of_round)
        return way.of_weights(batch, of_slots), *rest

    return None, None, None, *lax.cond(rounds > 1, several, once)


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
