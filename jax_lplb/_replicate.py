"""The weights of a rank's slots, copies included, and the gradients of copies added up at home."""

import dataclasses
import functools
import logging
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb import _collective, _ffi, _handlers, _peer
from jax_lplb._balance import axis_size
from jax_lplb._checks import check_choice
from jax_lplb._mesh import AxisName
from jax_lplb._placement import Placement, check_one_layer, owners_and_receivers
from jax_lplb._reverse_only import reverse_only
from jax_lplb._rows import has_padding, rows_of_experts

Transport = Literal["peer", "collective"] | None
TRANSPORTS = (None, "peer", "collective")

_log = logging.getLogger("jax_lplb")


def replicate(
    home_weights: Any, placement: Placement, axis_name: AxisName, dtype: Any = None, transport: Transport = None
) -> Any:
    """Brings the weights of this rank's slots to it, copies included; within `shard_map`.

    Differentiable: the gradients of all copies are added up at home, so that an optimiser sees each expert once. All
    leaves of a call travel, with their gradients: leave out those that you do not use.

    Args:
      home_weights: a pytree of this rank's rows [rows_per_rank, ...], in the order of `placement.home_order`; rows
        of padding are not used, and their gradients are 0. Or with room for copies, [slots_per_rank, ...], where a
        rank's own experts come first, as with `per_batch` placements and along topologies; gradients of room are 0.
        Then through peers' memory nothing but copies is moved, in place, and nothing but their gradients. XLA copies
        these arrays first where something else needs them: so donate them, or carry them through a loop.
      placement: where the copies are; may be traced.
      axis_name: mesh axis, or axes, of the ranks.
      dtype: of the slots, by default that of each leaf. Copies and their gradients travel in it, and leaves with room
        for copies are cast to it first: so their gradients are rounded to it once they are added up.
      transport: how copies travel. "peer": ranks read them from each other's memory, those that there are and no more,
        whatever the placement; gradients are added up in float32, in the order of `placement.log2phy`. It takes
        devices of one process, CPUs or GPUs that can access each other's memory, or GPUs of several processes on one
        host. "collective": by `ppermute` along the columns of a topology; without one, slot by slot, each rank sends
        every other a row of weights, or of zeros where that wants none of its. None: "peer" where that can be in one
        process, "collective" elsewhere.

    Returns:
      The tree, with leaves [slots_per_rank, ...]: the rank's slots. Zeros in slots that hold nothing; or where weights
      came with room for copies, what was there: begin with zeros, since some matmuls spread what is no number.

    Raises:
      TypeError: `placement` is not a Placement.
      ValueError: `axis_name` is not bound or has another size than `num_ranks`, a leaf has another number of rows, or
        ranks cannot read each other's memory and `transport` is "peer".
      NotImplementedError: it is differentiated in forward mode or twice, unless `transport` is "collective" and the
        placement has no topology.
    """
    leaves, dtypes, tree, has_room = _checked(home_weights, placement, axis_name, dtype, transport)
    if not _has_copies(placement):
        varying = _ffi.varying(*jax.tree.leaves(placement))
        slots = [_ffi.vary(leaf, varying).astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        return jax.tree.unflatten(tree, slots)
    rows = _rows(placement, axis_name, has_room)
    leaves = [_ffi.vary(leaf, _ffi.varying(leaf, rows.replicas)) for leaf in leaves]
    full = [i for i, leaf in enumerate(leaves) if leaf.size > 0]
    brought = {}
    if full:
        of_leaves, of_slots = [leaves[i].dtype for i in full], [dtypes[i] for i in full]
        transfer = _transfer(transport, placement, axis_name, of_leaves, of_slots, has_room)
        brought = dict(zip(full, bring_now(transfer, [leaves[i] for i in full], rows), strict=True))

    def empty(i: int) -> jax.Array:
        zeros = jnp.zeros((placement.slots_per_rank, *leaves[i].shape[1:]), dtypes[i])
        return _ffi.vary(zeros, _ffi.varying(leaves[i]))

    return jax.tree.unflatten(tree, [brought[i] if i in brought else empty(i) for i in range(len(leaves))])


class Copies(NamedTuple):
    """Weights that `_dispatch.bring_beside` is to bring beside tokens, through peers' memory."""

    leaves: list[jax.Array]
    rows: "Rows"
    transfer: "Transfer"
    tree: Any  # that the slots are leaves of


def copies_of(
    home_weights: Any, placement: Placement, axis_name: AxisName, dtype: Any, transport: Transport
) -> Copies | None:
    """As `replicate` takes them; None where that has to bring them, or nothing needs to be brought."""
    leaves, dtypes, tree, has_room = _checked(home_weights, placement, axis_name, dtype, transport)
    summed = {leaf.dtype for leaf in leaves} | set(dtypes) <= set(_peer.SUMMED)
    if not summed or not 0 < len(leaves) <= _handlers.max_begun or any(leaf.size == 0 for leaf in leaves):
        return None
    if not _has_copies(placement) and all(leaf.dtype == dtype for leaf, dtype in zip(leaves, dtypes, strict=True)):
        return None
    transfer = _transfer(transport, placement, axis_name, [leaf.dtype for leaf in leaves], list(dtypes), has_room)
    if transfer.implementation == "xla":
        return None
    rows = _rows(placement, axis_name, has_room)
    return Copies([_ffi.vary(leaf, _ffi.varying(leaf, rows.replicas)) for leaf in leaves], rows, transfer, tree)


def with_room(home_weights: Any, placement: Placement, axis_name: AxisName, dtype: Any) -> Any:
    """The weights in a dtype, with room for copies, as `replicate` takes them. Zeros in room and padding."""
    home, room = placement.rows_per_rank, placement.slots_per_rank - placement.rows_per_rank
    own = jnp.asarray(placement.home_order).reshape(-1, home)[lax.axis_index(axis_name)]

    def of_leaf(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(dtype)
        if has_padding(placement.num_experts, placement.num_ranks):
            leaf = _where(own >= 0, leaf)
        return jnp.pad(leaf, [(0, room), *[(0, 0)] * (leaf.ndim - 1)])

    return jax.tree.map(of_leaf, home_weights)


def _checked(
    home_weights: Any, placement: Placement, axis_name: AxisName, dtype: Any, transport: Transport
) -> tuple[list[jax.Array], tuple[Any, ...], Any, bool]:
    """The leaves, the dtypes of their slots, the tree that they are of, and whether they have room for copies."""
    check_one_layer("placement", placement)
    check_choice("transport", transport, TRANSPORTS)
    axis_size(axis_name, placement.num_ranks)
    leaves, tree = jax.tree.flatten(home_weights)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(home_weights)]
    rows, slots = placement.rows_per_rank, placement.slots_per_rank
    has_room = _homes_first(placement) and slots > rows and bool(leaves) and jnp.shape(leaves[0])[:1] == (slots,)
    leaves = [
        with_rows(leaf, *((slots, "slot") if has_room else (rows, "expert")), f"home_weights{path}")
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    dtypes = tuple(leaf.dtype if dtype is None else jnp.dtype(dtype) for leaf in leaves)
    if has_room:
        leaves = [leaf.astype(of_slots) for leaf, of_slots in zip(leaves, dtypes, strict=True)]
    return leaves, dtypes, tree, has_room


def _has_copies(placement: Placement) -> bool:
    """Whether a rank's slots are not just its own experts, in their order."""
    return not _homes_first(placement) or placement.num_physical > placement.num_experts


def _homes_first(placement: Placement) -> bool:
    """Whether a rank's first slots are those of its rows of weights, whatever the contents of the others."""
    return placement.topology is not None or placement.planning is not None


class Rows(NamedTuple):
    """Which rows go where, for this rank. Rows of buffers are numbered over all ranks, rank * rows + row."""

    source: jax.Array  # int32 [slots], the home row of each of this rank's slots; none, or in place: negative
    replicas: jax.Array  # int32 [home rows, max_replicas], the slots of each row's expert; none: out of range
    wanted: jax.Array  # int32 [ranks, n], the home rows of what collectives bring to each rank; none: negative
    sent: Any  # along a topology: int32 [redundant experts], this rank's rows that others have copies of


def _rows(placement: Placement, axis_name: AxisName, has_room: bool) -> Rows:
    ranks, slots, topology = placement.num_ranks, placement.slots_per_rank, placement.topology
    home = placement.rows_per_rank
    of_slots, log2phy = jnp.asarray(placement.phy2log).reshape(ranks, slots), jnp.asarray(placement.log2phy)
    rank = lax.axis_index(axis_name)
    experts = jnp.minimum(of_slots, placement.num_experts - 1)
    if has_padding(placement.num_experts, ranks):  # else, but for topologies, experts have their numbers as rows
        rows = jnp.asarray(rows_of_experts(placement.num_experts, ranks))
        experts = rows.at[experts].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
    source, sent = experts[rank], None
    if topology is not None and slots > home:
        _, receiver = owners_and_receivers(topology, ranks, slots - home)
        copies = of_slots[receiver, home + np.arange(slots - home)]
        sent = (log2phy[copies, 0] % slots)[rank]
        first = log2phy[source, 0]  # its home
        source = first // slots * home + first % slots
    own = jnp.asarray(placement.home_order).reshape(ranks, home)[rank]
    replicas = log2phy.at[own].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
    if has_room:  # buffers have a row for each slot
        source = log2phy[jnp.minimum(of_slots[rank], placement.num_experts - 1), 0]
        # Whatever the contents say: rooms take rows of homes, and homes their own and those of rooms. So no rank reads
        # what another changes.
        row = np.arange(slots)
        source = jnp.where((row >= home) & (source % slots < home), source, -1)
        is_own = replicas == rank * slots + row[:home, None]
        replicas = jnp.where(is_own | (replicas % slots >= home), replicas, -1)
    brought = experts[:, home:] if _homes_first(placement) else experts
    return Rows(jnp.where(of_slots[rank] < 0, -1, source), replicas, brought, sent)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """How copies travel; static."""

    implementation: _ffi.Implementation  # "ffi": peers' memory; "xla": collectives; None: by platform
    axis_name: AxisName
    homes_first: bool
    has_padding: bool  # among rows of weights
    has_room: bool  # for copies, below the rows of weights
    dtypes: tuple[Any, ...]  # of the leaves
    slot_dtypes: tuple[Any, ...]
    # For collectives along a topology.
    axes: AxisName
    routes: tuple[_collective.Route, ...] | None

    @property
    def is_reverse_only(self) -> bool:
        return self.implementation != "xla" or self.routes is not None


def _transfer(
    transport: Transport,
    placement: Placement,
    axis_name: AxisName,
    dtypes: list[Any],
    slot_dtypes: list[Any],
    has_room: bool,
) -> Transfer:
    implementation: _ffi.Implementation = "xla"
    if transport != "collective":
        summed = [
            dtype
            for of_leaf in zip(dtypes, slot_dtypes, strict=True)
            if all(jnp.issubdtype(dtype, jnp.inexact) for dtype in of_leaf)
            for dtype in of_leaf
        ]
        why_not = _peer.why_out_of_reach(axis_name, slot_dtypes, summed, asked=transport == "peer")
        if why_not and transport == "peer":
            raise ValueError(
                f"transport = 'peer': ranks cannot read each other's memory here: {why_not}; pass "
                "transport='collective', or None for whichever can be"
            )
        implementation = "xla" if why_not else "ffi" if transport == "peer" else None
        if not why_not:
            say_once(logging.INFO, "weights of copies: peers' memory")
        elif placement.topology is not None or placement.num_ranks == 1:
            say_once(logging.INFO, f"weights of copies travel by collectives: {why_not}")
        else:
            slow = "weights of copies travel by slow collectives, for each slot a row from each rank to each"
            say_once(logging.WARNING, f"{slow}: {why_not}")
    axes, routes = axis_name, None
    if placement.topology is not None:
        axes, routes = _collective.routes_of(placement.topology, axis_name, placement.num_ranks)
    return Transfer(
        implementation,
        axis_name,
        _homes_first(placement),
        has_padding(placement.num_experts, placement.num_ranks),
        has_room,
        tuple(dtypes),
        tuple(slot_dtypes),
        axes,
        routes,
    )


@functools.cache
def say_once(level: int, message: str) -> None:
    """In the log."""
    _log.log(level, message)


def bring_now(transfer: Transfer, leaves: list[jax.Array], rows: Rows) -> list[jax.Array]:
    if not transfer.is_reverse_only:
        return by_collectives(transfer, leaves, rows)
    cure = "transport='collective'"
    if transfer.routes is not None:
        cure += (
            ", and Placement.from_phy2log(placement.phy2log, placement.num_ranks) with weights in its home_order, "
            "which is the logical one"
        )
    leaves = reverse_only(
        leaves,
        "replicate can be differentiated once, in reverse mode (jax.grad, jax.vjp), where ranks read each other's "
        f"memory or copies go along a topology; for forward mode and derivatives of derivatives pass {cure}",
    )
    return _differentiated_once(transfer, leaves, rows)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiated_once(transfer: Transfer, leaves: list[jax.Array], rows: Rows) -> list[jax.Array]:
    with jax.named_scope("lplb_replicate"):
        peers, collectives = partial(_by_peers, transfer), partial(by_collectives, transfer)
        operands, platforms = (leaves, rows), _peer.platforms()
        return _ffi.choose("add_rows", transfer.implementation, peers, collectives, *operands, platforms=platforms)


def begin(transfer: Transfer, leaves: list[jax.Array], rows: Rows) -> _peer.Coming:
    """Begins what `bring_now` does, which then goes on beside what is done until `finish`; within one operation."""

    def peers(leaves: list[jax.Array], rows: Rows) -> _peer.Coming:
        dtypes, source = to_bring(transfer, rows)
        return _peer.begin_rows(dtypes, transfer.axis_name, leaves, source)

    def collectives(leaves: list[jax.Array], rows: Rows) -> _peer.Coming:
        dtypes, source = to_bring(transfer, rows)
        table, slots = _peer.no_table(transfer.axis_name, leaves, source), by_collectives(transfer, leaves, rows)
        return _peer.Coming(table, source, slots, transfer.axis_name, dtypes)

    with jax.named_scope("lplb_replicate"):
        return _ffi.choose(
            "begin_rows", transfer.implementation, peers, collectives, leaves, rows, platforms=_peer.platforms()
        )


def finish(transfer: Transfer, leaves: list[jax.Array], coming: _peer.Coming) -> list[jax.Array]:
    """The slots, once all ranks have theirs."""

    @_peer.apart
    def peers(shown: list[jax.Array], coming: _peer.Coming) -> list[jax.Array]:
        exposed, slots, done = _peer.finish_rows(shown, coming, jnp.int32(0))
        return _peer.release(exposed, done, transfer.axis_name, slots)

    with jax.named_scope("lplb_replicate"):
        return _ffi.choose(
            "finish_rows",
            transfer.implementation,
            peers,
            lambda _, coming: coming.sums,
            [] if transfer.has_room else leaves,
            coming,
            platforms=_peer.platforms(),
        )


def add_up_at_home(transfer: Transfer, rows: Rows, gradients: list[Any]) -> list[Any]:
    """The gradients of the leaves of those of their slots; None where there is none."""
    places = [
        i
        for i, (gradient, dtype) in enumerate(zip(gradients, transfer.dtypes, strict=True))
        if gradient.dtype != jax.dtypes.float0 and jnp.issubdtype(dtype, jnp.inexact)
    ]
    sums: list[Any] = [None] * len(gradients)
    if places:
        part = dataclasses.replace(
            transfer,
            dtypes=tuple(transfer.dtypes[i] for i in places),
            slot_dtypes=tuple(transfer.slot_dtypes[i] for i in places),
        )
        with jax.named_scope("lplb_replicate"):
            peers, collectives = partial(_add_by_peers, part), partial(add_by_collectives, part)
            operands, platforms = ([gradients[i] for i in places], rows), _peer.platforms()
            totals = _ffi.choose(
                "add_rows", transfer.implementation, peers, collectives, *operands, platforms=platforms
            )
        for i, total in zip(places, totals, strict=True):
            sums[i] = total
    return sums


_differentiated_once.defvjp(
    lambda transfer, leaves, rows: (_differentiated_once(transfer, leaves, rows), rows),
    lambda transfer, rows, gradients: (add_up_at_home(transfer, rows, gradients), None),
)


def _by_peers(transfer: Transfer, leaves: list[jax.Array], rows: Rows) -> list[jax.Array]:
    dtypes, source = to_bring(transfer, rows)
    return _peer.add_up(dtypes, transfer.axis_name, leaves, source)


def _add_by_peers(transfer: Transfer, gradients: list[jax.Array], rows: Rows) -> list[jax.Array]:
    dtypes, replicas = to_add_up(transfer, rows)
    return cleared(transfer, _peer.add_up(dtypes, transfer.axis_name, gradients, replicas), rows)


def to_bring(transfer: Transfer, rows: Rows) -> tuple[tuple[Any, ...] | None, jax.Array]:
    """Dtypes and replicas, as `_peer.add_up` takes them, of the slots."""
    return None if transfer.has_room else transfer.slot_dtypes, rows.source[:, None]


def to_add_up(transfer: Transfer, rows: Rows) -> tuple[tuple[Any, ...] | None, jax.Array]:
    """Dtypes and replicas, as `_peer.add_up` takes them, of the sums of gradients."""
    if not transfer.has_room:
        return transfer.dtypes, rows.replicas
    room = len(rows.source) - len(rows.replicas)
    return None, jnp.pad(rows.replicas, [(0, room), (0, 0)], constant_values=-1)


def cleared(transfer: Transfer, sums: list[jax.Array], rows: Rows) -> list[jax.Array]:
    """The sums of gradients, with zeros in room and padding, where sums in place leave what was there."""
    if not transfer.has_room:
        return sums
    home = len(rows.replicas)
    if not transfer.has_padding:
        return [leaf.at[home:].set(0) for leaf in sums]
    below = np.arange(home - 1, len(rows.source))  # a rank's last row may be padding
    holds = jnp.asarray(below < home) & (rows.replicas[-1, 0] >= 0)
    return [leaf.at[home - 1 :].set(_where(holds, leaf[home - 1 :])) for leaf in sums]


def _where(holds: jax.Array, leaf: jax.Array) -> jax.Array:
    """Zeros in rows that hold nothing."""
    return jnp.where(holds.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))


def by_collectives(transfer: Transfer, leaves: list[jax.Array], rows: Rows) -> list[jax.Array]:
    if transfer.has_room:
        leaves = [leaf[: len(rows.replicas)] for leaf in leaves]
    casted = [leaf.astype(dtype) for leaf, dtype in zip(leaves, transfer.slot_dtypes, strict=True)]
    if rows.wanted.shape[1] == 0:
        return casted
    if transfer.routes is not None:
        return _collective.bring_along(transfer.slot_dtypes, transfer.axes, transfer.routes, leaves, rows.sent)
    brought = [_collective.rows_by_slot(leaf, rows.wanted, transfer.axis_name) for leaf in casted]
    if not transfer.homes_first:
        return brought
    if transfer.has_padding:
        casted = [_where(rows.replicas[:, 0] >= 0, leaf) for leaf in casted]
    return [jnp.concatenate([leaf, below]) for leaf, below in zip(casted, brought, strict=True)]


def add_by_collectives(transfer: Transfer, gradients: list[jax.Array], rows: Rows) -> list[jax.Array]:
    sums = _added_by_collectives(transfer, gradients, rows)
    if not transfer.has_room:
        return sums
    return [jnp.pad(leaf, [(0, len(rows.source) - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)]) for leaf in sums]


def _added_by_collectives(transfer: Transfer, gradients: list[jax.Array], rows: Rows) -> list[jax.Array]:
    if rows.wanted.shape[1] == 0:
        return [gradient.astype(dtype) for gradient, dtype in zip(gradients, transfer.dtypes, strict=True)]
    if transfer.routes is not None:
        return _collective.add_up_along(transfer.dtypes, transfer.axes, transfer.routes, gradients, rows.sent)
    home = len(rows.replicas)
    leaves = [
        _ffi.vary(jnp.zeros((home, *gradient.shape[1:]), dtype), _ffi.varying(gradient))
        for gradient, dtype in zip(gradients, transfer.dtypes, strict=True)
    ]
    (sums,) = jax.vjp(lambda leaves: by_collectives(transfer, leaves, rows), leaves)[1](gradients)
    return sums


def with_rows(leaf: Any, rows: int, of: str, where: str) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if leaf.ndim == 0 or leaf.shape[0] != rows:
        raise ValueError(f"{where} must have {rows} rows, one for each {of}, got shape {leaf.shape}")
    return leaf
