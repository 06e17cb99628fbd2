"""Tokens to the ranks of their physical experts, sorted by slot, and back; within `shard_map`.

Each rank has a buffer of a static size. A batch that needs more goes through it in several rounds, as many on all
ranks: no token is dropped, and memory does not grow.
"""

import dataclasses
import logging
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb import _collective_tokens, _ffi, _peer, _peer_tokens, _replicate
from jax_lplb._balance import axis_size
from jax_lplb._checks import check_choice, check_count, check_positive
from jax_lplb._count import check_expert_ids, chunking, count
from jax_lplb._gather import inverse
from jax_lplb._mesh import AxisName
from jax_lplb._placement import Placement, check_one_layer
from jax_lplb._replicate import TRANSPORTS, Transport, say_once
from jax_lplb._reverse_only import reverse_only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Handle:
    """Where a round's tokens went, for `combine`.

    Attributes:
      place: int32 [num_tokens, k], for each choice of this rank's tokens the row that is its, rank * capacity + row;
        -1 where it is of another round, or padding.
      group_sizes: int32 [slots_per_rank], rows of this rank's slots.
      capacity: rows of each rank's buffer.
      axis_name: mesh axis, or axes, of the ranks.
      implementation: "ffi": peers' memory; "xla": collectives; None: by platform.
    """

    place: jax.Array
    group_sizes: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})
    axis_name: AxisName = dataclasses.field(metadata={"static": True})
    implementation: _ffi.Implementation = dataclasses.field(metadata={"static": True})


class Dispatched(NamedTuple):
    """What `dispatch` returns.

    Attributes:
      rows: [capacity, d_model], tokens for this rank's slots, sorted by slot; zeros beyond those.
      group_sizes: int32 [slots_per_rank], rows of each slot.
      num_rounds: int32 [], rounds that the batch needs, the same on all ranks.
      handle: for `combine`.
    """

    rows: jax.Array
    group_sizes: jax.Array
    num_rounds: jax.Array
    handle: Handle


def dispatch(
    tokens: jax.Array,
    physical_ids: jax.Array,
    placement: Placement,
    axis_name: AxisName,
    *,
    buffer_factor: float = 1.25,
    round: int | jax.Array = 0,
    transport: Transport = None,
) -> Dispatched:
    """Brings tokens to the ranks of their physical experts, sorted by slot, for a grouped matmul; within `shard_map`.

    A token goes over a link once for each rank that it has experts on. Differentiable, once and in reverse mode:
    tokens' gradients are sums over their rows. Deterministic.

    Args:
      tokens: [num_tokens, d_model], of this rank; equally many on all ranks.
      physical_ids: int32 [num_tokens, k], as `balance` returns them; ids outside of 0 .. num_physical - 1 are padding,
        whose tokens, gates and gradients may hold anything; those that they get are 0.
      placement: whose slots the ids refer to.
      axis_name: mesh axis, or axes, of the ranks.
      buffer_factor: rows of a rank's buffer, over the mean that ranks get. With the copies of `Placement.per_batch`
        1.03 holds nearly every batch in one round.
      round: which part of the batch, from 0 on: rows `round * capacity` and following of what each rank gets in all.
        Below 0, as a traced number may be, and from `num_rounds` on there are none.
      transport: "peer": ranks read each other's memory, as `replicate` has it, and besides takes tokens of float32,
        bfloat16 or float16 in whole 16-byte words, and at most 32 choices of each. "collective": all ranks get all
        tokens by `all_gather`, and take what they need. None: "peer" where that can be.

    Returns:
      A `Dispatched`.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value, or `transport` is "peer" and ranks cannot
        read each other's memory.
      NotImplementedError: it is differentiated in forward mode or twice.
    """
    check_one_layer("placement", placement)
    check_choice("transport", transport, TRANSPORTS)
    check_positive("buffer_factor", buffer_factor)
    axis_size(axis_name, placement.num_ranks)
    check_expert_ids(physical_ids, "physical_ids")
    _check_floats("tokens", tokens)
    if tokens.ndim != 2 or physical_ids.ndim != 2 or len(tokens) != len(physical_ids) or not physical_ids.size:
        raise ValueError(
            "tokens and physical_ids must have shapes [num_tokens, d_model] and [num_tokens, k], with one token and "
            f"one choice at least (ids of -1 are padding), got {tokens.shape} and {physical_ids.shape}"
        )
    if not isinstance(round, (jax.Array, np.ndarray)):
        check_count("round", round, least=0)
    elif round.shape != () or not jnp.issubdtype(round.dtype, jnp.integer):
        raise TypeError(f"round must be an integer, got an array of shape {round.shape} and dtype {round.dtype}")
    implementation = implementation_of(transport, axis_name, tokens, physical_ids.shape[1])
    queues = queue(physical_ids, placement, axis_name, implementation)
    capacity = capacity_of(buffer_factor * physical_ids.size, physical_ids.size * placement.num_ranks)
    num_rounds = queues.num_rounds(capacity)
    number = round if isinstance(round, (jax.Array, np.ndarray)) else min(round, 2**31 - 1)
    number = jnp.asarray(number).astype(jnp.int32)  # negative where a uint32 is too large for it
    # Any number times the capacity may be too large.
    round_ = jnp.where(number >= 0, jnp.minimum(number, num_rounds), num_rounds)
    handle = queues.handle(round_, capacity, axis_name, implementation)
    return Dispatched(bring(tokens, handle), handle.group_sizes, num_rounds, handle)


def combine(rows: jax.Array, gates: jax.Array, handle: Handle) -> jax.Array:
    """For each token the sum of its rows, times its gates: the way back from `dispatch`; within `shard_map`.

    What a rank has for a token is added up there, in float32. Through peers' memory this part of the sum goes over the
    link in the dtype of the rows, and so is rounded once; by collectives it stays float32. Which choices make a part
    depends on where their experts are: bits may differ with the placement. Differentiable as `dispatch` is.
    Deterministic.

    Args:
      rows: [capacity, d_model], what the experts made of `dispatch`'s rows. Of those beyond the groups nothing is read.
      gates: float32 [num_tokens, k].
      handle: of the dispatch.

    Returns:
      float32 [num_tokens, d_model]; zeros for tokens without rows in this round.

    Raises:
      TypeError, ValueError: an argument has the wrong type or shape, or the transport of the dispatch is "peer", and
        these rows cannot go through peers' memory.
      NotImplementedError: it is differentiated in forward mode or twice.
    """
    if not isinstance(handle, Handle):
        raise TypeError(f"handle must be that of a dispatch, lplb.dispatch(...).handle, got {type(handle).__name__}")
    _check_floats("rows", rows)
    _check_floats("gates", gates)
    if rows.ndim != 2 or len(rows) != handle.capacity or gates.shape != handle.place.shape:
        raise ValueError(
            f"rows and gates must have shapes [{handle.capacity}, d_model] and {handle.place.shape}, got {rows.shape} "
            f"and {gates.shape}"
        )
    # Rows may be of another dtype or width than the tokens.
    transport: Transport = {"ffi": "peer", "xla": "collective", None: None}[handle.implementation]
    implementation = implementation_of(transport, handle.axis_name, rows, gates.shape[1])
    return add_up(rows, gates.astype(jnp.float32), dataclasses.replace(handle, implementation=implementation))


def _check_floats(name: str, array: Any) -> None:
    if not isinstance(array, (jax.Array, np.ndarray)) or not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got {getattr(array, 'dtype', type(array).__name__)}")


class Queues(NamedTuple):
    """What each rank gets: its slots' choices, sorted by slot, then by the rank that they come from."""

    slot: jax.Array  # int32 [num_tokens, k], physical expert of each choice; num_physical: none
    number: jax.Array  # int32 [num_tokens, k], how many choices of this rank for the slot come before
    counts: jax.Array  # int32 [ranks, num_physical], choices that each rank has for each slot; the same on all ranks
    rank: jax.Array  # int32 [], this one

    @property
    def of_ranks(self) -> jax.Array:
        """int32 [ranks to, slots_per_rank, ranks from], choices."""
        ranks = len(self.counts)
        return self.counts.reshape(ranks, ranks, -1).transpose(1, 2, 0)

    def num_rounds(self, capacity: int) -> jax.Array:
        return rounds_for(jnp.sum(self.of_ranks, axis=(1, 2), dtype=jnp.int32), capacity)

    def handle(
        self, round_: jax.Array, capacity: int, axis_name: AxisName, implementation: _ffi.Implementation
    ) -> Handle:
        """Where the choices of a round are among the rows of ranks' buffers."""
        of_ranks, ranks = self.of_ranks, len(self.counts)
        if ranks * capacity > 2**31 - 1:
            raise ValueError(
                f"buffer_factor: {ranks} buffers of {capacity} rows are more than {2**31 - 1} rows; choose a smaller "
                "one, and the batch takes more rounds"
            )
        end = jnp.cumsum(of_ranks.reshape(ranks, -1), axis=1, dtype=jnp.int32).reshape(of_ranks.shape)
        start = (end - of_ranks)[:, :, self.rank].reshape(-1)  # of this rank's choices for each physical expert
        row = start.at[self.slot].get(mode="clip") + self.number - round_ * capacity
        is_row = (self.slot < len(start)) & (row >= 0) & (row < capacity)
        place = jnp.where(is_row, self.slot // of_ranks.shape[1] * capacity + row, -1)
        ends = jnp.clip(end[self.rank, :, -1] - round_ * capacity, 0, capacity)
        group_sizes = jnp.diff(ends, prepend=jnp.zeros_like(ends[:1]))
        return Handle(place, group_sizes, capacity, axis_name, implementation)


def queue(
    physical_ids: jax.Array, placement: Placement, axis_name: AxisName, implementation: _ffi.Implementation
) -> Queues:
    """All that ranks have to know of each other. `implementation`: "xla": by a collective."""
    kinds = placement.num_physical
    counts, number = count_and_number(physical_ids.reshape(-1), kinds)
    slot = jnp.where((physical_ids >= 0) & (physical_ids < kinds), physical_ids, kinds)
    by_collective = partial(lax.all_gather, to="invarying")
    gathered = (by_collective if implementation == "xla" else _peer.gather)(counts, axis_name)
    return Queues(slot, number.reshape(slot.shape), gathered, lax.axis_index(axis_name))


def count_and_number(ids: jax.Array, kinds: int) -> tuple[jax.Array, jax.Array]:
    """How often each of 0 to kinds - 1 occurs, and for each id how many equal ones come before it."""
    implementation: _ffi.Implementation = "xla" if kinds > _ffi.MAX_EXPERTS else None
    counts, starts = count(ids, kinds, None, implementation)

    def ffi(ids: jax.Array, starts: jax.Array) -> jax.Array:
        (number,) = _ffi.call(
            "lplb_number",
            [_ffi.Result(ids.shape, jnp.int32, [ids])],
            ids,
            starts,
            chunk_size=np.int64(chunking(len(ids), kinds)[1]),
        )
        return number

    def xla(ids: jax.Array, _: jax.Array) -> jax.Array:
        kind = jnp.where((ids >= 0) & (ids < kinds), ids, kinds)
        order = jnp.argsort(kind, stable=True).astype(jnp.int32)
        ends = jnp.cumsum(counts, dtype=jnp.int32)
        number = inverse(order, len(order)) - (ends - counts).at[kind].get(mode="clip")
        return jnp.where(kind < kinds, number, 0)

    return counts, _ffi.choose("number", implementation, ffi, xla, ids, starts)


def rounds_for(counts: jax.Array, capacity: int) -> jax.Array:
    """Through buffers of so many rows, into which these counts go."""
    return jnp.maximum(-(-jnp.max(counts) // capacity), 1)


def capacity_of(wanted: float, most: int, num_buffers: int = 1) -> int:
    """Rows of each buffer; those of all are a multiple of 64, as tokamax's kernels need."""
    unit = 64 // math.gcd(64, num_buffers)
    return max(math.ceil(min(wanted, most) / unit), 1) * unit


def implementation_of(
    asked: str | None,
    axis_name: AxisName,
    tokens: jax.Array,
    num_choices: int,
    argument: str = "transport",
    instead: str = "collective",
) -> _ffi.Implementation:
    """How tokens travel. `asked`: "peer", `instead`, or None for whichever can be; the value of the argument named."""
    if asked == instead:
        return "xla"
    why_not = _peer_tokens.why_out_of_reach(axis_name, tokens, num_choices, asked=asked == "peer")
    if why_not and asked == "peer":
        raise ValueError(
            f"{argument} = 'peer': tokens cannot go through peers' memory here: {why_not}; pass "
            f"{argument}={instead!r}, or None for whichever can be"
        )
    say_once(logging.INFO, f"tokens travel by collectives: {why_not}" if why_not else "tokens: peers' memory")
    return "xla" if why_not else "ffi" if asked == "peer" else None


def bring(tokens: jax.Array, handle: Handle) -> jax.Array:
    """The tokens' rows [capacity, d_model]."""
    return bring_beside(tokens, handle, [], None, None, None)[0]


def bring_beside(
    tokens: jax.Array,
    handle: Handle,
    leaves: list[jax.Array],
    rows: _replicate.Rows | None,
    transfer: _replicate.Transfer | None,
    coming: _peer.Coming | None,
) -> tuple[jax.Array, list[jax.Array]]:
    """The tokens' rows, and the slots of `_replicate.Copies`: those that `_replicate.begin` began, or that begin here.

    Casting weights keeps the memory busy, and tokens the links: together both take little longer than one of them. In
    the backward pass likewise, where gradients of weights are added up.
    """
    tokens, place, group_sizes = _alike(tokens, handle.place, handle.group_sizes)
    handle = dataclasses.replace(handle, place=place, group_sizes=group_sizes)
    return _bring(transfer, _once(tokens), _once(leaves), handle, rows, coming)


def add_up(rows: jax.Array, gates: jax.Array, handle: Handle) -> jax.Array:
    """float32 [num_tokens, d_model]: for each token the sum of its rows, times gates."""
    rows, gates, place, group_sizes = _alike(rows, gates, handle.place, handle.group_sizes)
    handle = dataclasses.replace(handle, place=place, group_sizes=group_sizes)
    return _add_up(_once(rows), _once(gates), handle)


def _alike(*arrays: jax.Array) -> list[jax.Array]:
    """Varying over the same axes."""
    axes = _ffi.varying(*arrays)
    return [_ffi.vary(array, axes) for array in arrays]


ONCE = (
    "dispatch and combine can be differentiated once, in reverse mode (jax.grad, jax.vjp); for forward mode and "
    "derivatives of derivatives compute every expert on every token, as jax_lplb.flax.MoE(dispatch='dense') does"
)


def _once(tree: Any) -> Any:
    return reverse_only(tree, ONCE)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bring(
    transfer: _replicate.Transfer | None,
    tokens: jax.Array,
    leaves: list[jax.Array],
    handle: Handle,
    rows: Any,
    coming: _peer.Coming | None,
) -> tuple[jax.Array, list[jax.Array]]:
    def by_peers(tokens: jax.Array, leaves: list[jax.Array], handle: Handle, rows: Any, coming: Any) -> Any:
        dtypes, source = ((), None) if transfer is None else _replicate.to_bring(transfer, rows)
        operands = handle.axis_name, tokens, handle.place, handle.group_sizes
        if coming is None:
            return _peer_tokens.dispatch_beside((handle.capacity, dtypes), *operands, leaves, source)
        shown = [] if dtypes is None else leaves
        return _peer.apart(_peer_tokens.dispatch, 2)(handle.capacity, *operands, shown, coming)

    def by_collectives(tokens: jax.Array, leaves: list[jax.Array], handle: Handle, rows: Any, coming: Any) -> Any:
        slots: list[jax.Array] = []
        if transfer is not None:
            slots = _replicate.by_collectives(transfer, leaves, rows) if coming is None else coming.sums
        return _collective_tokens.dispatch(handle.capacity, handle.axis_name, tokens, handle.place), slots

    return _choose("dispatch", by_peers, by_collectives, handle, tokens, leaves, handle, rows, coming)


def _bring_backward(transfer: _replicate.Transfer | None, residuals: Any, gradients: Any) -> Any:
    handle, rows = residuals

    def by_peers(of_rows: jax.Array, of_slots: list[jax.Array], handle: Handle, rows: Any) -> Any:
        if transfer is None:
            return _sum_by_peers(handle, of_rows, None, (), None, [])
        of_tokens, sums = _sum_by_peers(handle, of_rows, None, *_replicate.to_add_up(transfer, rows), of_slots)
        return of_tokens, _replicate.cleared(transfer, sums, rows)

    def by_collectives(of_rows: jax.Array, of_slots: list[jax.Array], handle: Handle, rows: Any) -> Any:
        ones = _ffi.vary(jnp.ones(handle.place.shape, jnp.float32), _ffi.varying(of_rows, handle.place))
        sums = _collective_tokens.combine(handle.capacity, handle.axis_name, of_rows, handle.place, ones)
        return sums, [] if transfer is None else _replicate.add_by_collectives(transfer, of_slots, rows)

    of_tokens, of_leaves = _choose("dispatch", by_peers, by_collectives, handle, *gradients, handle, rows)
    return of_tokens.astype(gradients[0].dtype), of_leaves, None, None, None


_bring.defvjp(
    lambda transfer, tokens, leaves, handle, rows, coming: (
        _bring(transfer, tokens, leaves, handle, rows, coming),
        (handle, rows),
    ),
    _bring_backward,
)


@jax.custom_vjp
def _add_up(rows: jax.Array, gates: jax.Array, handle: Handle) -> jax.Array:
    def by_peers(rows: jax.Array, gates: jax.Array, handle: Handle) -> jax.Array:
        return _sum_by_peers(handle, rows, gates, (), None, [])[0]

    def by_collectives(rows: jax.Array, gates: jax.Array, handle: Handle) -> jax.Array:
        return _collective_tokens.combine(handle.capacity, handle.axis_name, rows, handle.place, gates)

    return _choose("combine", by_peers, by_collectives, handle, rows, gates, handle)


def _add_up_backward(residuals: Any, gradient: jax.Array) -> Any:
    rows, gates, handle = residuals

    def by_peers(of_sums: jax.Array, rows: jax.Array, gates: jax.Array, handle: Handle) -> Any:
        operands = (of_sums.astype(rows.dtype), handle.place, gates, handle.group_sizes, rows)
        return _peer_tokens.combine_gradient(handle.capacity, handle.axis_name, *operands)

    def by_collectives(of_sums: jax.Array, rows: jax.Array, gates: jax.Array, handle: Handle) -> Any:
        sums = partial(_collective_tokens.combine, handle.capacity, handle.axis_name)
        return jax.vjp(lambda rows, gates: sums(rows, handle.place, gates), rows, gates)[1](of_sums)

    return *_choose("combine", by_peers, by_collectives, handle, gradient, rows, gates, handle), None


_add_up.defvjp(lambda rows, gates, handle: (_add_up(rows, gates, handle), (rows, gates, handle)), _add_up_backward)


def _choose(step: str, by_peers: Any, by_collectives: Any, handle: Handle, *operands: Any) -> Any:
    with jax.named_scope(f"lplb_{step}"):
        return _ffi.choose(
            step, handle.implementation, by_peers, by_collectives, *operands, platforms=_peer.platforms()
        )


def _sum_by_peers(
    handle: Handle,
    rows: jax.Array,
    gates: jax.Array | None,
    dtypes: tuple[Any, ...] | None,
    replicas: jax.Array | None,
    leaves: list[jax.Array],
) -> tuple[jax.Array, list[jax.Array]]:
    """float32 [num_tokens, d_model]: for each token the sum of its rows, times gates; and beside it sums of leaves."""
    place, k = handle.place, handle.place.shape[1]
    num_parts = min(k, lax.axis_size(handle.axis_name))
    parts, sums = _peer_tokens.combine((num_parts, dtypes), handle.axis_name, rows, place, gates, leaves, replicas)
    # A part for each rank that has any of the token's rows.
    rank = jnp.where(place >= 0, place // handle.capacity, -1)
    earlier = jnp.arange(k)[None, :] < jnp.arange(k)[:, None]
    is_first = (rank >= 0) & ~jnp.any(earlier[None] & (rank[:, None, :] == rank[:, :, None]), axis=2)
    is_part = jnp.arange(num_parts, dtype=jnp.int32)[None] < jnp.sum(is_first, axis=1, dtype=jnp.int32)[:, None]
    return jnp.sum(jnp.where(is_part[..., None], parts, 0).astype(jnp.float32), axis=1), sums
