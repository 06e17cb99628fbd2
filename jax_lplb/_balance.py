"""`balance`: count, add up over the axis, choose copies where they are chosen for each batch, solve, assign."""

import dataclasses
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb import _ffi, _peer, _plan, _speed
from jax_lplb._assign import Nearby, assign_tokens, assign_with_starts, near_attributes
from jax_lplb._assign import ffi_attributes as assign_attributes
from jax_lplb._assign import ffi_results as assign_results
from jax_lplb._checks import check_choice, check_count
from jax_lplb._count import check_expert_ids, check_num_sms, count, flat_ids
from jax_lplb._load import in_tokens, in_units, to_integers
from jax_lplb._mesh import AxisName, spec_of, with_auto_axes
from jax_lplb._placement import Placement
from jax_lplb._rows import has_padding, rows_of_experts
from jax_lplb._solve import (
    Options,
    Solver,
    certified_bound,
    check_load,
    check_options,
    check_placement,
    solve_fractions,
    solve_groups,
)
from jax_lplb._solve import ffi_attributes as solve_attributes
from jax_lplb._solve import ffi_results as solve_results

Sync = Literal["all_gather", "peer", "psum"] | None
SYNCS = (None, "all_gather", "peer", "psum")
_MOST_TOKENS = 2**31 - 1


class Balanced(NamedTuple):
    """What `balance` returns.

    Attributes:
      physical_ids: int32, of the shape of `expert_ids`; -1 for padding. The owner of a slot is
        `physical_ids // placement.slots_per_rank`.
      load: int32 [num_experts], tokens per logical expert over the whole axis.
      rank_load: int32 [num_ranks], tokens per rank after balancing: a prediction with `sync="psum"` on several
        shards and with `load=`, exact otherwise.
      gap: float32 [num_groups], certified relative gap of each group's split to the optimum; see `Solution`.
      status: int32 [num_groups], values of `Status`.
      lower_bound: float32 [num_groups], certified: tokens that the busiest rank of each group has at the least, however
        the load is split over these replicas; with `rank_speed` of the largest load / speed, where the mean speed is 1.
        Of the solve, before rounding to whole tokens; a prediction with `load=`.
      placement: that which the ids refer to, for `replicate`: with the copies chosen for this batch where `placement`
        is one of `Placement.per_batch`, else as it was given.
    """

    physical_ids: jax.Array
    load: jax.Array
    rank_load: jax.Array
    gap: jax.Array
    status: jax.Array
    lower_bound: jax.Array
    placement: Placement


def balance(
    expert_ids: jax.Array,
    placement: Placement,
    *,
    axis_name: AxisName | None = None,
    load: jax.Array | None = None,
    rank_speed: jax.Array | np.ndarray | None = None,
    sync: Sync = None,
    locality: bool = False,
    ranks_per_node: int | None = None,
    solver: Solver = "auto",
    tol: float = 1e-4,
    threshold: float | None = None,
    num_sms: int | None = None,
    implementation: _ffi.Implementation = None,
) -> Balanced:
    """Redirects the tokens of one batch to replicas, so that the busiest rank carries as little as possible.

    Goes between a router's top-k and the dispatch to the experts, which then sees `placement.num_physical` experts.
    Works under jit, vmap, scan, remat and grad (ids carry no gradient), and inside `shard_map` where `axis_name` names
    the expert-parallel axis. Deterministic: equal inputs give equal bits, on every rank and run.

    Args:
      expert_ids: int32 [..., k], this shard's logical expert ids; one that is negative or >= num_experts is padding.
      placement: where the replicas are, over the ranks of the axis. In the free slots of one of `Placement.per_batch`,
        copies are chosen for this batch: by its load, or by `load` where that is given.
      axis_name: mesh axis, or axes, that shard the tokens over the ranks of `placement`; sizes multiply to `num_ranks`.
        Name no axis that holds other tokens' experts: with a data x expert mesh, only the expert axis. None: the ids
        are those of all ranks. The name may also be that of a `jax.vmap`.
      load: int32 or float32 [num_experts], loads to go by in place of this batch's: of a previous batch, or a moving
        average. Spares the collective; carries no gradient. Experts it shows as 0 are split evenly. `load` and
        `rank_load` of the result are then predictions.
      rank_speed: float32 [num_ranks], how fast ranks are, of the same value on all of them; see `solve`. None: all are
        equally fast.
      sync: how ranks learn of each other's tokens. "all_gather": each rank's counts; quotas are exact. "peer": the
        same, to the bit, but GPUs of one process write their counts into each other's memory, without XLA's
        collectives. None: "peer" where that can be, "all_gather" elsewhere. "psum": the sum only, cheaper on very
        large axes; each rank spreads its own tokens as the whole should, to within a few tokens for each rank and
        replica.
      locality: whether a token goes to a replica on its own rank, then on its own node, as far as the quotas allow, so
        that fewer travel. Quotas and rank loads are the same either way. Needs `axis_name` and each rank's counts: not
        with `load=` or `sync="psum"`.
      ranks_per_node: with `locality`, so many ranks next to each other are a node; must divide `num_ranks`. None: no
        rank is nearer than another.
      solver: "auto", "ipm" or "edge_balance"; see `solve`.
      tol: relative gap to the optimum at which the solver stops.
      threshold: all load of a group stays at home where that leaves the busiest rank at most `threshold` times the
        mean rank load. At least 1. None: never.
      num_sms: most thread blocks with which count and assign run at once, so that the balancer can run beside a matmul
        or a collective; None: no limit. Results do not depend on it. Of no effect on CPU and in pure JAX.
      implementation: "ffi" (custom calls), "xla" (pure JAX), or None: the custom calls on platforms that have them.

    Returns:
      A `Balanced`.

    Raises:
      TypeError, ValueError: an argument has the wrong dtype, shape or value, `axis_name` is not bound or its size is
        not `num_ranks`, ranks cannot reach each other's memory and `sync` is "peer", the solver cannot solve the
        placement, or the placement is beyond the custom calls' limits; named in the message, when tracing.
    """
    check_expert_ids(expert_ids)
    options = check_balance_options(
        placement,
        sync=sync,
        locality=locality,
        ranks_per_node=ranks_per_node,
        solver=solver,
        tol=tol,
        threshold=threshold,
        num_sms=num_sms,
        implementation=implementation,
    )
    if load is not None:
        check_load(load, placement)
        load = lax.stop_gradient(jnp.asarray(load))
    if locality and axis_name is None:
        raise ValueError(
            "locality = True needs the tokens of each rank, but axis_name is None, and so nothing says which rank has "
            "which; name the mesh axis of the ranks, or pass locality=False"
        )
    if locality and load is not None:
        raise ValueError(
            "locality = True needs the tokens of each rank, but load is given, which spares the collective that brings "
            "them; leave out load, or pass locality=False"
        )
    near = (ranks_per_node or 1) if locality else 0
    _speed.check_rank_speed(rank_speed, placement)
    num_shards = 1 if axis_name is None else axis_size(axis_name, placement.num_ranks)
    if expert_ids.size * num_shards > _MOST_TOKENS:
        raise ValueError(
            f"expert_ids: {expert_ids.size} ids on {num_shards} shards are more than {_MOST_TOKENS}, the largest count"
        )
    replicated: Any = jax.P()
    of_ids: Any = spec_of(expert_ids)
    out_specs = Balanced(of_ids, *[replicated] * (len(Balanced._fields) - 1))

    chosen, nothing = placement.planning is not None, cast(Placement, None)
    padded = chosen and has_padding(placement.num_experts, placement.num_ranks)
    steps = _balance_filled_up if padded else _balance

    def run(
        expert_ids: jax.Array, load: jax.Array | None, placement: Placement, rank_speed: jax.Array | None
    ) -> Balanced:
        speed = _speed.scale(rank_speed, placement)
        out = steps(
            expert_ids, load, placement, speed, axis_name, num_shards, sync, near, options, num_sms, implementation
        )
        return out if chosen else out._replace(placement=nothing)

    out = with_auto_axes(run, out_specs, expert_ids, load, placement, rank_speed)
    return out if chosen else out._replace(placement=placement)  # as it was given, on the host maybe


def _balance_filled_up(expert_ids: jax.Array, load: jax.Array | None, placement: Placement, *rest: Any) -> Balanced:
    """As `_balance`, where copies are to be planned, and ranks do not divide the experts."""
    rows = rows_of_experts(placement.num_experts, placement.num_ranks)
    ids = jnp.asarray(rows).at[expert_ids].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
    out = _balance(ids, None if load is None else _plan.to_rows(load, placement), _plan.fill_up(placement), *rest)
    phy2log, log2phy = _plan.of_experts(out.placement.phy2log, placement), out.placement.log2phy[rows]
    chosen = dataclasses.replace(placement, phy2log=phy2log, log2phy=log2phy)
    return out._replace(load=out.load[rows], placement=chosen)


def _balance(
    expert_ids: jax.Array,
    load: jax.Array | None,
    placement: Placement,
    speed: jax.Array | None,
    axis_name: AxisName | None,
    num_shards: int,
    sync: Sync,
    near: int,
    options: Options,
    num_sms: int | None,
    implementation: _ffi.Implementation,
) -> Balanced:
    shape, size, expert_ids = expert_ids.shape, expert_ids.size, flat_ids(expert_ids)

    with jax.named_scope("lplb_count"):
        local_load, starts = count(expert_ids, placement.num_experts, num_sms, implementation)
    nearby = None

    with jax.named_scope("lplb_sync"):
        if load is not None:
            # As if every shard had as many tokens as this one, and they came shard after shard.
            shards = min(num_shards, _MOST_TOKENS // expert_ids.size)
            index = 0 if axis_name is None else lax.axis_index(axis_name) % shards
            total, offset, predicted = local_load * shards, local_load * index, load
        elif axis_name is None:
            total, offset, predicted = local_load, jnp.zeros_like(local_load), local_load
        elif sync != "psum":
            by_peers = sync != "all_gather" and _has_reach(sync, axis_name, implementation)
            loads = (_peer.gather if by_peers else _of_all_shards)(local_load, axis_name)
            total = jnp.sum(loads, axis=0, dtype=jnp.int32)
            rank = lax.axis_index(axis_name)
            before = jnp.arange(num_shards, dtype=jnp.int32) < rank
            offset = jnp.sum(jnp.where(before[:, None], loads, 0), axis=0, dtype=jnp.int32)
            predicted = total
            nearby = Nearby(loads, rank, near) if near else None
        else:
            total = lax.psum(local_load, axis_name)
            # As if the shards had equal parts: total * index // num_shards, without overflow.
            index = lax.axis_index(axis_name)
            offset = total // num_shards * index + total % num_shards * index // num_shards
            predicted = total

    with jax.named_scope("lplb_solve_assign"):
        steps = _solve_assign if placement.planning is None else _plan_assign
        (physical_ids, rank_load, solved_rank_load, gap, status), placement = steps(
            expert_ids, starts, predicted, total, offset, nearby, placement, speed, options, num_sms, implementation
        )
        if load is not None:
            rank_load = jnp.rint(solved_rank_load).astype(jnp.int32)
            predicted = jnp.where(load > 0, load, 0)
            if load.dtype == jnp.float32:
                predicted = jnp.rint(predicted).astype(jnp.int32)
        lower_bound = certified_bound(solved_rank_load, gap, placement, speed)
    return Balanced(physical_ids[:size].reshape(shape), predicted, rank_load, gap, status, lower_bound, placement)


def check_balance_options(
    placement: Placement,
    *,
    sync: Sync = None,
    locality: bool = False,
    ranks_per_node: int | None = None,
    solver: Solver = "auto",
    tol: float = 1e-4,
    threshold: float | None = None,
    num_sms: int | None = None,
    implementation: _ffi.Implementation = None,
) -> Options:
    """Checks what `balance` takes beside a batch."""
    check_placement(placement, implementation)
    check_num_sms(num_sms)
    check_choice("sync", sync, SYNCS)
    _check_locality(placement, locality, ranks_per_node, sync, implementation)
    return check_options(placement, solver, tol, threshold)


def _check_locality(
    placement: Placement,
    locality: bool,
    ranks_per_node: int | None,
    sync: Sync,
    implementation: _ffi.Implementation,
) -> None:
    if not isinstance(locality, bool):
        raise TypeError(f"locality must be True or False, got {locality!r}")
    if ranks_per_node is not None:
        check_count("ranks_per_node", ranks_per_node)
        if placement.num_ranks % ranks_per_node:
            raise ValueError(
                f"ranks_per_node must divide the {placement.num_ranks} ranks of placement, got {ranks_per_node}"
            )
        if not locality:
            raise ValueError(f"ranks_per_node = {ranks_per_node} is for locality=True; pass that, or leave it out")
    if locality and sync == "psum":
        raise ValueError(
            "locality = True needs the tokens of each rank, and sync = 'psum' brings their sum only; pass "
            "sync='all_gather', or locality=False"
        )
    if locality and implementation != "xla" and placement.num_physical > _ffi.MAX_NEAR_SLOTS:
        raise ValueError(
            f"locality = True: placement has {placement.num_physical} physical experts, and the custom calls hold at "
            f"most {_ffi.MAX_NEAR_SLOTS} in shared memory; pass implementation='xla', or locality=False"
        )


def _solve_assign(
    expert_ids: jax.Array,
    starts: jax.Array,
    predicted: jax.Array,
    load: jax.Array,
    offset: jax.Array,
    nearby: Nearby | None,
    placement: Placement,
    speed: jax.Array | None,
    options: Options,
    num_sms: int | None,
    implementation: _ffi.Implementation,
) -> tuple[list[jax.Array], Placement]:
    """Steps 3 and 4: the split of the predicted load, by which the tokens that `load` counts are assigned.

    One custom call: on GPUs tokens are numbered while the solver runs. Returns the physical ids, the rank load that
    they give, the rank load of the split, gap and status; and the placement.
    """
    predicted, unit = to_integers(predicted)
    if placement.max_replicas == 1:  # lookups, no custom call
        fraction, rank_load, gap, _, status = solve_fractions(predicted, placement, options, implementation, speed)
        assigned = assign_with_starts(expert_ids, starts, fraction, placement, load, offset, num_sms, implementation)
        return [*assigned, in_tokens(rank_load, unit), gap, status], placement
    num_ids = expert_ids.shape[0]
    log2phy = jnp.asarray(placement.log2phy)
    running = None if speed is None else _speed.running(predicted, log2phy, speed, placement)

    def ffi(*operands: Any) -> list[jax.Array]:
        _, _, predicted, load, _, log2phy, speed, nearby = operands
        arrays, by_speed = jax.tree.leaves(operands), jax.tree.leaves(speed)
        physical_ids, rank_load, _, _, solved_rank_load, gap, _, status = _ffi.call(
            "lplb_solve_assign",
            [
                *assign_results(num_ids, placement, arrays, (predicted, load, log2phy, *by_speed)),
                *solve_results(placement, (predicted, log2phy, *by_speed)),
            ],
            *arrays,
            **solve_attributes(placement, options),
            **assign_attributes(num_ids, placement, num_sms),
            **near_attributes(nearby),
        )
        return [physical_ids, rank_load, solved_rank_load, gap, status]

    def xla(
        ids: jax.Array,
        starts: jax.Array,
        predicted: jax.Array,
        load: jax.Array,
        offset: jax.Array,
        log2phy: jax.Array,
        speed: jax.Array | None,
        nearby: Nearby | None,
    ) -> list[jax.Array]:
        del starts
        fraction, solved_rank_load, gap, _, status = solve_groups(predicted, log2phy, placement, options, speed)
        physical_ids, rank_load = assign_tokens(ids, placement, fraction, load, offset, log2phy, nearby)
        return [physical_ids, rank_load, solved_rank_load, gap, status]

    solved = (predicted, log2phy, None) if running is None else (running.load, running.log2phy, running.speed)
    operands = (expert_ids, starts, solved[0], load, offset, *solved[1:], nearby)
    physical_ids, rank_load, solved_rank_load, gap, status = _ffi.choose(
        "solve_assign", implementation, ffi, xla, *operands
    )
    if running is not None:
        solved_rank_load += running.kept_load
    return [physical_ids, rank_load, in_tokens(solved_rank_load, unit), gap, status], placement


def _plan_assign(
    expert_ids: jax.Array,
    starts: jax.Array,
    predicted: jax.Array,
    load: jax.Array,
    offset: jax.Array,
    nearby: Nearby | None,
    placement: Placement,
    speed: jax.Array | None,
    options: Options,
    num_sms: int | None,
    implementation: _ffi.Implementation,
) -> tuple[list[jax.Array], Placement]:
    """As `_solve_assign`, of the copies that are chosen for the predicted load, in one custom call likewise."""
    assert placement.planning is not None
    predicted, unit = to_integers(predicted)
    least = in_units(placement.planning.min_tokens, unit)
    if speed is not None:
        limits = (options.tol, options.threshold)
        planned = _plan.plan(predicted, least, placement, *limits, implementation, solve=False, speed=speed)
        chosen = dataclasses.replace(placement, phy2log=planned.phy2log, log2phy=planned.log2phy)
        (physical_ids, assigned, rank_load, gap, status), _ = _solve_assign(
            expert_ids, starts, predicted, load, offset, nearby, chosen, speed, options, num_sms, implementation
        )
        return [physical_ids, assigned, in_tokens(rank_load, unit), gap, status], chosen
    num_ids = expert_ids.shape[0]

    def ffi(*operands: Any) -> list[jax.Array]:
        _, _, load, _, predicted, least, nearby = operands
        arrays = jax.tree.leaves(operands)
        physical_ids, assigned, _, phy2log, log2phy, _, rank_load, gap, _, status = _ffi.call(
            "lplb_plan_assign",
            [
                *assign_results(num_ids, placement, arrays, (predicted, least, load)),
                *_plan.ffi_results(placement, (predicted, least)),
            ],
            *arrays,
            **_plan.ffi_attributes(placement, options.tol, options.threshold),
            **assign_attributes(num_ids, placement, num_sms),
            **near_attributes(nearby),
        )
        return [physical_ids, assigned, rank_load, gap, status, phy2log, log2phy]

    def xla(
        ids: jax.Array,
        starts: jax.Array,
        load: jax.Array,
        offset: jax.Array,
        predicted: jax.Array,
        least: jax.Array,
        nearby: Nearby | None,
    ) -> list[jax.Array]:
        del starts
        planned = _plan.plan_groups(predicted, least, placement, options.tol, options.threshold)
        physical_ids, assigned = assign_tokens(ids, placement, planned.fraction, load, offset, planned.log2phy, nearby)
        rank_load, gap, status = planned.rank_load, planned.gap, planned.status
        return [physical_ids, assigned, rank_load, gap, status, planned.phy2log, planned.log2phy]

    operands = (expert_ids, starts, load, offset, predicted, least, nearby)
    physical_ids, assigned, rank_load, gap, status, phy2log, log2phy = _ffi.choose(
        "plan_assign", implementation, ffi, xla, *operands
    )
    chosen = dataclasses.replace(placement, phy2log=phy2log, log2phy=log2phy)
    return [physical_ids, assigned, in_tokens(rank_load, unit), gap, status], chosen


def _has_reach(sync: Sync, axis_name: AxisName, implementation: _ffi.Implementation) -> bool:
    if implementation == "xla":
        why_not = "implementation='xla' makes no custom calls"
    elif jax.process_count() > 1:
        why_not = f"there are {jax.process_count()} processes, and mailboxes are in the memory of one"
    else:
        why_not = _peer.why_out_of_reach(axis_name, (), (), asked=sync == "peer")
    if why_not and sync == "peer":
        raise ValueError(
            f"sync = 'peer': ranks cannot reach each other's memory here: {why_not}; pass sync='all_gather', for the "
            "same result"
        )
    return not why_not


def _of_all_shards(local_load: jax.Array, axis_name: AxisName) -> jax.Array:
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    # Only types of shard_map's axes, not of vmap's, tell that all shards have the same.
    typed = names <= set(jax.sharding.get_abstract_mesh().manual_axes)
    return lax.all_gather(local_load, axis_name, to="invarying" if typed else "varying")


def axis_size(axis_name: Any, num_ranks: int) -> int:
    try:
        size = lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name = {axis_name!r} is not bound here; call this inside jax.shard_map over a mesh with that axis"
        ) from None
    if size != num_ranks:
        raise ValueError(
            f"axis_name = {axis_name!r} spans {size} devices, but placement has num_ranks = {num_ranks}; they must be "
            "equal"
        )
    return size
