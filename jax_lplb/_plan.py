"""Copies chosen from one batch's load: the plan in pure JAX, and the calls that choose between it and the handlers.

The algorithm and the comments on why each step is as it is are in ffi/plan.h. Both texts are in integers and give the
same bits.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb import _ffi, _interior_point, _speed
from jax_lplb._load import in_units, power_of_two, to_integers
from jax_lplb._rows import has_padding, logical_order, rows_of_experts
from jax_lplb._status import Status

if TYPE_CHECKING:
    from jax_lplb._placement import Placement

# Rules for who receives how much, by their number in ffi/plan.h; plus 4 where the busiest rank gives last.
_FILL, _FIT, _MOST, _LAST = 0, 1, 2, 4
# What is tried side by side: limits on the rank loads, as shares of what the target allows, and then beyond it. These
# were the best of those tried over traces and log-normal loads for 8 to 64 ranks, with one or two slots each.
_WITHIN = (
    *((_MOST, 1), (_MOST, 0.5), (_MOST + _LAST, 1), (_MOST + _LAST, 0.5)),
    *((_FIT, 1), (_FIT + _LAST, 1), (_FILL, 1), (_FILL + _LAST, 1)),
)
_BEYOND = (
    *((_FILL, 0.005), (_FILL + _LAST, 0.005), (_FILL, 0.01), (_FILL + _LAST, 0.015)),
    *((_FILL, 0.03), (_FILL + _LAST, 0.04), (_FILL, 0.07), (_FILL, 0.15)),
)
_CERTIFIED = 1e-4  # gap at which a candidate counts as certified, whatever the tolerance asked for


def candidates(slack: float) -> tuple[np.ndarray, np.ndarray]:
    """Slacks, float32 [candidates], and rules, int32 [candidates], for a target that is so much above the mean."""
    tried = [(rule, share * slack) for rule, share in _WITHIN] + [(rule, slack + beyond) for rule, beyond in _BEYOND]
    rules, slacks = zip(*tried, strict=True)
    return np.array(slacks, np.float32), np.array(rules, np.int32)


class Planned(NamedTuple):
    """Contents of a placement, and the split of the load that it was planned for, as of `_solve.solve_fractions`."""

    phy2log: jax.Array
    log2phy: jax.Array
    fraction: jax.Array
    rank_load: jax.Array
    gap: jax.Array
    iterations: jax.Array
    status: jax.Array


def fill_up(placement: "Placement") -> "Placement":
    """With an expert for each row of weights, those of padding without tokens: plans are for equally many a rank.

    Only the shape of its `log2phy` is right, until it is planned.
    """
    rows = placement.num_ranks * placement.rows_per_rank
    return dataclasses.replace(placement, log2phy=np.full((rows, placement.max_replicas), -1, np.int32))


def to_rows(load: jax.Array, placement: "Placement") -> jax.Array:
    """A load [num_experts] of the placement as one of `fill_up`'s."""
    if not has_padding(placement.num_experts, placement.num_ranks):
        return load
    order = logical_order(placement.num_experts, placement.num_ranks)
    return load.at[order].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def of_experts(phy2log: jax.Array, placement: "Placement") -> jax.Array:
    """`phy2log` of `fill_up`'s placement as one of the placement's experts."""
    order = jnp.asarray(logical_order(placement.num_experts, placement.num_ranks))
    return order.at[phy2log].get(mode="fill", fill_value=-1, wrap_negative_indices=False)


def ffi_results(placement: "Placement", varies_with: tuple[jax.Array, ...]) -> list[_ffi.Result]:
    """`Planned`, as the custom calls return it."""
    groups = (placement.num_groups,)
    table = (placement.num_experts, placement.max_replicas)
    return [
        _ffi.Result(shape, dtype, varies_with)
        for shape, dtype in (
            ((placement.num_physical,), jnp.int32),
            (table, jnp.int32),
            (table, jnp.float32),
            ((placement.num_ranks,), jnp.float32),
            (groups, jnp.float32),
            (groups, jnp.int32),
            (groups, jnp.int32),
        )
    ]


def ffi_attributes(placement: "Placement", tol: float, threshold: float, *, solve: bool = True) -> dict[str, Any]:
    """What the custom calls know of the plan; `solve`: whether what it does not certify is solved."""
    planning = placement.planning
    assert planning is not None
    slacks, rules = candidates(planning.slack)
    return {
        "tol": np.float32(tol),
        "threshold": np.float32(threshold),
        "max_iterations": np.int64(_interior_point.MAX_ITERATIONS if solve else 0),
        "slack": np.float32(planning.slack),
        "max_sends": np.int64(planning.most_sends),
        "slacks": slacks,
        "rules": rules,
    }


def choose(
    load: jax.Array, placement: "Placement", implementation: _ffi.Implementation, speed: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Contents of a placement planned for a load, int32 or float32 [num_experts], and `_speed.scale`'s speeds."""
    assert placement.planning is not None
    load, unit = to_integers(load)
    least = in_units(placement.planning.min_tokens, unit)
    planned = plan(load, least, placement, _CERTIFIED, 0, implementation, solve=False, speed=speed)
    return planned.phy2log, planned.log2phy


def plan(
    load: jax.Array,
    least: jax.Array,
    placement: "Placement",
    tol: float,
    threshold: float,
    implementation: _ffi.Implementation,
    *,
    solve: bool = True,
    speed: jax.Array | None = None,
) -> Planned:
    """The plan for an int32 load, in which a copy takes at least `least`, int32 [], of the load's units.

    Where ranks have `_speed.scale`'s speeds, it is of the contents only: the split is to be solved for.
    """
    assert speed is None or not solve
    if has_padding(placement.num_experts, placement.num_ranks):
        rows, filled = rows_of_experts(placement.num_experts, placement.num_ranks), fill_up(placement)
        load = to_rows(load, placement)
        planned = plan(load, least, filled, tol, threshold, implementation, solve=solve, speed=speed)
        return planned._replace(
            phy2log=of_experts(planned.phy2log, placement),
            log2phy=planned.log2phy[rows],
            fraction=planned.fraction[rows],
        )

    def ffi(*operands: jax.Array) -> list[jax.Array]:
        results = ffi_results(placement, operands)
        return _ffi.call("lplb_plan", results, *operands, **ffi_attributes(placement, tol, threshold, solve=solve))

    def xla(load: jax.Array, least: jax.Array, speed: jax.Array | None = None) -> list[jax.Array]:
        return list(plan_groups(load, least, placement, tol, threshold, solve=solve, speed=speed))

    operands = (load, least) if speed is None else (load, least, _speed.with_inverse(speed))
    return Planned(*_ffi.choose("plan", implementation, ffi, xla, *operands))


def plan_groups(
    load: jax.Array,
    least: jax.Array,
    placement: "Placement",
    tol: float,
    threshold: float,
    *,
    solve: bool = True,
    speed: jax.Array | None = None,
) -> Planned:
    """The plan in pure JAX, and the solve of groups whose split it does not certify; speeds with their inverses."""
    planning = placement.planning
    assert planning is not None
    groups, ranks, slots = placement.num_groups, placement.group_size, placement.slots_per_rank
    homes = placement.num_experts // placement.num_ranks
    limits = _Limits(planning.slack, planning.most_sends, placement.max_replicas, slots - homes)
    by_group = jnp.maximum(load, 0).reshape(groups, ranks, homes)
    slacks, rules = candidates(planning.slack)
    speeds = None if speed is None else jnp.moveaxis(speed.reshape(2, groups, ranks), 0, 1)
    by_slot, taken, left, rank_load, missing, largest, shift = jax.vmap(
        lambda loads, speed: _plan_group(loads, speed, least, limits, slacks, rules, threshold)
    )(by_group, speeds)

    # Tables: homes in the first slots of each rank, then what its free slots hold.
    home = jnp.arange(placement.num_experts, dtype=jnp.int32).reshape(groups, ranks, homes)
    first_expert = (jnp.arange(groups, dtype=jnp.int32) * ranks * homes)[:, None, None]
    copies = jnp.where(by_slot >= 0, by_slot + first_expert, -1)
    phy2log = jnp.concatenate([home, copies], axis=2).reshape(-1)
    shape = (placement.num_experts, placement.max_replicas)
    slot = np.arange(placement.num_physical, dtype=np.int32).reshape(placement.num_ranks, slots)
    home_slot, copy_slot = slot[:, :homes].reshape(-1), slot[:, homes:].reshape(-1)
    copied = copies.reshape(-1)
    # An expert's copies are on ranks of their own, and so in the order of their slots.
    earlier = (copied[:, None] == copied[None, :]) & (copy_slot[:, None] > copy_slot[None, :])
    column = 1 + jnp.sum(earlier, axis=1, dtype=jnp.int32)
    row = jnp.where(copied >= 0, copied, placement.num_experts)  # beyond the end: dropped
    log2phy = jnp.full_like(load, -1, shape=shape).at[:, 0].set(home_slot).at[row, column].set(copy_slot, mode="drop")
    whole = (by_group << shift[:, None, None]).reshape(-1)
    fraction = jnp.zeros_like(load, jnp.float32, shape=shape)
    fraction = fraction.at[:, 0].set(_share(left.reshape(-1), whole))
    fraction = fraction.at[row, column].set(
        _share(taken.reshape(-1), whole.at[jnp.maximum(copied, 0)].get()), mode="drop"
    )

    unit = power_of_two(-shift)
    in_tokens = (rank_load.astype(jnp.float32) * unit[:, None]).reshape(-1)
    some = jnp.any(by_slot >= 0, axis=(1, 2))
    home_load = (jnp.sum(by_group, axis=2, dtype=jnp.int32) << shift[:, None]).astype(jnp.uint32)
    at_home = _stays_at_home(home_load, home_load, threshold)
    most = jnp.max(home_load, axis=1).astype(jnp.float32) * ranks
    more = most - jnp.sum(home_load, axis=1, dtype=jnp.uint32).astype(jnp.float32)
    gap_at_home = jnp.where(at_home & (more > 0), more / jnp.maximum(most, 1), 0)
    gap = jnp.where(some, _gap(missing, largest), gap_at_home)
    status = jnp.where(some, jnp.where(gap <= tol, Status.CONVERGED, Status.MAX_ITERATIONS), Status.SKIPPED)
    planned = Planned(
        phy2log, log2phy, fraction, in_tokens, gap, jnp.zeros_like(gap, jnp.int32), status.astype(jnp.int32)
    )
    return _solve_open(load, planned, placement, tol) if solve else planned


def _solve_open(load: jax.Array, planned: Planned, placement: "Placement", tol: float) -> Planned:
    """Solves groups without a certificate by the interior-point method; the plan's split stays where it is as good."""
    groups = placement.num_groups
    fraction, rank_load, gap, iterations, status = _interior_point.solve_groups(
        load, planned.log2phy, placement.slots_per_rank, placement.num_ranks, groups, tol, 0.0
    )

    def largest(rank_load: jax.Array) -> jax.Array:
        return jnp.max(rank_load.reshape(groups, -1), axis=1)

    bound = jnp.maximum(largest(rank_load) * (1 - gap), largest(planned.rank_load) * (1 - planned.gap))
    better = (planned.status == Status.MAX_ITERATIONS) & (largest(rank_load) < largest(planned.rank_load))
    best = jnp.where(better, largest(rank_load), largest(planned.rank_load))
    open_ = planned.status == Status.MAX_ITERATIONS
    gap = jnp.where(open_, jnp.clip((best - bound) / jnp.where(best > 0, best, 1), 0), planned.gap)
    status = jnp.where(open_, jnp.where(gap <= tol, Status.CONVERGED, Status.MAX_ITERATIONS), planned.status)

    def choose(solved: jax.Array, planned: jax.Array) -> jax.Array:
        chosen = jnp.repeat(better, solved.shape[0] // groups, total_repeat_length=solved.shape[0])
        return jnp.where(chosen.reshape(-1, *[1] * (solved.ndim - 1)), solved, planned)

    return planned._replace(
        fraction=choose(fraction, planned.fraction),
        rank_load=choose(rank_load, planned.rank_load),
        gap=gap,
        iterations=jnp.where(open_, iterations, 0),
        status=status.astype(jnp.int32),
    )


class _Limits(NamedTuple):
    slack: float
    max_sends: int
    max_replicas: int
    redundants: int


class _Copies(NamedTuple):
    """A list of copies, each field [max_copies]; experts and ranks are of the group."""

    expert: jax.Array
    receiver: jax.Array
    tokens: jax.Array
    settles: jax.Array


_RECEIVER, _GIVER, _NEITHER = 0, 1, 2
_MOST_ROOM, _MOST_FILLED, _ENOUGH = 1, 2, 3  # of keys, see ffi/plan.h


class _State(NamedTuple):
    """A candidate at work: [ranks] or [], but for at_home and replicas [ranks, homes]."""

    load: jax.Array
    waiting: jax.Array  # number of ranks that have yet to give
    giver: jax.Array
    excess: jax.Array
    sends: jax.Array
    at_home: jax.Array
    replicas: jax.Array
    used: jax.Array
    parent: jax.Array
    copies: _Copies
    num_copies: jax.Array
    stuck: jax.Array


def _plan_group(
    loads: jax.Array,
    speed: jax.Array | None,
    least: jax.Array,
    limits: _Limits,
    slacks: np.ndarray,
    rules: np.ndarray,
    threshold: float,
) -> tuple[jax.Array, ...]:
    """One group, int32 loads [ranks, homes]: what free slots hold and take, what stays, rank loads, the certificate."""
    ranks, homes = loads.shape
    total = jnp.sum(loads, dtype=jnp.int32).astype(jnp.uint32)
    shift = jnp.where(total != 0, jnp.maximum(lax.clz(total).astype(jnp.int32) - 2, 0), 0)
    up = shift.astype(jnp.uint32)
    scaled = loads.astype(jnp.uint32) << up
    most = jnp.uint32(2**31 - 1)
    floor = jnp.maximum(least, 0).astype(jnp.uint32)
    floor = jnp.where(least < 1, 1, jnp.where(floor < most >> up, floor << up, most)).astype(jnp.uint32)
    home_load = jnp.sum(scaled, axis=1, dtype=jnp.uint32)
    mean = (total << up) // jnp.uint32(ranks)
    even_enough = _limit(mean, jnp.float32(limits.slack)) | (2 * _rank_bits(ranks) + 1)  # as far as keys tell

    def attempt(slack: jax.Array, rule: jax.Array) -> tuple[_Copies, jax.Array, jax.Array, jax.Array, jax.Array]:
        state = _give(scaled, speed, floor, _limit(mean, slack), rule, limits)
        given = jnp.max(_in_time(state.load, speed))
        tokens, levelled, bound = state.copies.tokens, given, jnp.zeros_like(given)
        if speed is None:
            tokens, levelled, bound = _level(scaled, state, mean)
        tokens = jnp.where(levelled <= given, tokens, state.copies.tokens)
        largest = jnp.minimum(levelled, given)
        missing = jnp.where(largest > bound, largest - bound, 0)
        return (
            state.copies._replace(tokens=tokens),
            jnp.maximum(largest, even_enough),
            state.num_copies,
            largest,
            missing,
        )

    copies, rated, num_copies, largest, missing = jax.vmap(attempt)(jnp.asarray(slacks), jnp.asarray(rules))
    # The first of the best, criterion by criterion.
    left = jnp.ones_like(rated, bool)
    for criterion in (
        rated,
        num_copies.astype(jnp.uint32),
        (_gap(missing, largest) > jnp.float32(_CERTIFIED)).astype(jnp.uint32),
        largest,
    ):
        left &= criterion == jnp.min(jnp.where(left, criterion, jnp.uint32(2**32 - 1)))
    best = jnp.argmax(left)
    copies, largest, missing = jax.tree.map(lambda leaf: leaf[best], (copies, largest, missing))
    at_home = _stays_at_home(home_load, _in_time(home_load, speed), threshold)
    tokens = jnp.where(at_home, jnp.zeros_like(copies.tokens), copies.tokens)

    # Slots in the order of the list, less copies without tokens.
    used = tokens != 0
    index = np.arange(len(tokens))
    before = (index[None, :] < index[:, None]) & used[None, :] & (copies.receiver[None, :] == copies.receiver[:, None])
    number = jnp.sum(before, axis=1, dtype=jnp.int32)
    receiver = jnp.where(used, copies.receiver, ranks)  # beyond the end: dropped
    by_slot = jnp.full_like(copies.expert, -1, shape=(ranks, limits.redundants))
    by_slot = by_slot.at[receiver, number].set(copies.expert, mode="drop")
    taken = jnp.zeros_like(tokens, shape=by_slot.shape).at[receiver, number].set(tokens, mode="drop")
    out = jnp.zeros_like(scaled.reshape(-1)).at[copies.expert].add(tokens, mode="drop")
    left_at_home = scaled - out.reshape(ranks, homes)
    rank_load = jnp.sum(left_at_home, axis=1, dtype=jnp.uint32) + jnp.sum(taken, axis=1, dtype=jnp.uint32)
    return by_slot, taken, left_at_home, rank_load, missing, largest, shift


def _give(
    scaled: jax.Array,
    speed: jax.Array | None,
    least: jax.Array,
    limit_of_all: jax.Array,
    rule: jax.Array,
    limits: _Limits,
) -> _State:
    ranks, homes = scaled.shape
    rank = jnp.arange(ranks, dtype=jnp.int32)
    capacity = ranks * limits.redundants
    none = jnp.zeros_like(scaled[:, 0], jnp.int32)
    nothing = jnp.zeros_like(none, shape=(capacity,))
    home_load = jnp.sum(scaled, axis=1, dtype=jnp.uint32)
    level = _in_time(home_load, speed)
    limit = jnp.broadcast_to(limit_of_all, (ranks,))
    if speed is not None:
        limit = jnp.minimum(limit.astype(jnp.float32) * speed[0], 2.0**31 - 128).astype(jnp.uint32)
        limit = jnp.where((limit >= home_load) & (level > limit_of_all), home_load - 1, limit)
    axes = _ffi.varying(scaled, least, limit, rule)
    num_givers = jnp.sum(level > limit_of_all, dtype=jnp.int32)
    busiest = jnp.argsort(~level, stable=True).astype(jnp.int32)  # first
    start = _State(
        load=home_load,
        waiting=num_givers,
        giver=none[0],
        excess=none[0],
        sends=none[0],
        at_home=scaled,
        replicas=jnp.ones_like(scaled, jnp.int32),
        used=none,
        parent=rank + none,
        copies=_Copies(nothing, nothing, nothing.astype(jnp.uint32), nothing),
        num_copies=none[0],
        stuck=none[0] != 0,
    )

    bits = _rank_bits(ranks)

    def keys_of(order: int, values: jax.Array) -> jax.Array:
        return (
            jnp.uint32(order << 30)
            | (values >> 1 & jnp.uint32((1 << 30) - 1 - bits))
            | (bits - rank).astype(jnp.uint32)
        )

    receives = rule % _LAST

    def step(state: _State) -> _State:
        """One copy; of the next giver where the one before has given enough."""
        done = state.excess <= 0
        giver = jnp.where(
            done, busiest[jnp.where(rule >= _LAST, state.waiting - 1, num_givers - state.waiting)], state.giver
        )
        excess = (state.load[giver] - limit[giver]).astype(jnp.int32)
        wanted = excess.astype(jnp.uint32)
        sends = jnp.where(done, 0, state.sends)
        there = jnp.where(state.replicas[giver] < limits.max_replicas, state.at_home[giver], 0)
        chosen = jnp.argmax(there).astype(jnp.int32)
        expert, has = giver * homes + chosen, there[chosen]
        room = jnp.where((state.used < limits.redundants) & (state.load < limit), limit - state.load, 0)
        room = jnp.where(room < least, 0, room)

        # The least room that is enough; else the most that the expert can fill; else the most.
        enough = (room >= jnp.minimum(wanted, has)) & (receives != _MOST) & ((receives == _FILL) | (wanted <= has))
        fits = (room <= has) & (receives == _FIT)
        most = jnp.where(fits, keys_of(_MOST_FILLED, room), keys_of(_MOST_ROOM, room))
        keys = jnp.where(room == 0, 0, jnp.where(enough, keys_of(_ENOUGH, ~room), most))
        key = jnp.max(keys)
        receiver = bits - (key & bits).astype(jnp.int32)
        space = jnp.where(key != 0, room[receiver], 0)
        only_excess = (receives != _FILL) & (has < space) & (wanted < has) & (wanted >= least)
        tokens = jnp.where(only_excess, wanted, jnp.minimum(space, has))
        settles = jnp.where(tokens == space, _RECEIVER, jnp.where(tokens == wanted, _GIVER, _NEITHER))
        copy = _Copies(expert, receiver, tokens, settles)
        given, received = rank == giver, rank == receiver
        gives, gets = jnp.where(given, tokens, 0), jnp.where(received, tokens, 0)
        hangs = jnp.where(received & (settles == _RECEIVER), giver, state.parent)
        following = _State(
            load=state.load - gives + gets,
            waiting=state.waiting - done.astype(jnp.int32),
            giver=giver,
            excess=excess - tokens.astype(jnp.int32),
            sends=sends + 1,
            at_home=state.at_home.at[giver, chosen].add(jnp.uint32(0) - tokens),
            replicas=state.replicas.at[giver, chosen].add(1),
            used=state.used + received.astype(jnp.int32),
            parent=jnp.where(given & (settles == _GIVER), receiver, hangs),
            copies=jax.tree.map(lambda field, value: field.at[state.num_copies].set(value), state.copies, copy),
            num_copies=state.num_copies + 1,
            stuck=state.stuck,
        )
        stuck = (sends >= limits.max_sends) | (has < least) | (space == 0)
        return jax.tree.map(lambda a, b: jnp.where(stuck, a, b), state._replace(stuck=stuck | state.stuck), following)

    def goes_on(state: _State) -> jax.Array:
        some = (state.excess > 0) | (state.waiting > 0)
        return ~state.stuck & some & (state.num_copies < capacity)

    return lax.while_loop(goes_on, step, jax.tree.map(lambda leaf: _ffi.vary(leaf, axes), start))


def _level(scaled: jax.Array, state: _State, mean_of_all: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The copies' tokens where all ranks of each tree are equal, the largest rank load then, and a bound on it."""
    ranks, homes = scaled.shape
    copies = state.copies
    giver = copies.expert // homes
    in_list = jnp.arange(len(copies.expert), dtype=jnp.int32) < state.num_copies
    neither = in_list & (copies.settles == _NEITHER)
    kept = jnp.where(neither, copies.tokens, 0)
    sums = jnp.sum(scaled, axis=1, dtype=jnp.uint32)
    sums = sums.at[giver].add(jnp.uint32(0) - kept).at[copies.receiver].add(kept)
    # Sums over each rank and those that hang on it, by doubling the distance; `above` is the rank itself where none is.
    rank = jnp.arange(ranks, dtype=jnp.int32)
    sizes, above, root = jnp.ones_like(sums), state.parent, state.parent
    for _ in range((ranks - 1).bit_length()):
        target = jnp.where(above == rank, ranks, above)  # beyond the end: dropped
        sums, sizes = sums.at[target].add(sums, mode="drop"), sizes.at[target].add(sizes, mode="drop")
        following = above[above]
        above = jnp.where(following == above, rank, following)
        root = root[root]
    of_tree, size = sums[root], sizes[root]
    level = (of_tree + size - 1) // size
    largest = jnp.max(level)
    fullest = level == largest
    comes = level * sizes - sums
    takes = jnp.where(
        copies.settles == _RECEIVER,
        comes[copies.receiver],
        jnp.where(copies.settles == _GIVER, jnp.uint32(0) - comes[giver], copies.tokens),
    )
    takes = jnp.where(in_list, takes, 0)
    left = scaled.reshape(-1).at[copies.expert].add(jnp.uint32(0) - takes)
    lacks = jnp.any(takes.astype(jnp.int32) < 0) | jnp.any(left.astype(jnp.int32) < 0)
    leaves, enters = fullest[giver], fullest[copies.receiver]
    some_left = copies.tokens != scaled.reshape(-1)[copies.expert]
    joined = jnp.any(neither & ((enters & ~leaves) | (leaves & ~enters & some_left)))
    bound = jnp.where(jnp.any(neither) & (lacks | joined), mean_of_all, jnp.where(largest > 0, largest - 1, 0))
    return takes, jnp.where(lacks, jnp.uint32(2**32 - 1), largest), bound


def _rank_bits(ranks: int) -> int:
    """Those of a key that tell its rank; as many as the custom calls have, or more where these are more ranks."""
    return max(127, (1 << (ranks - 1).bit_length()) - 1)


def _in_time(rank_load: jax.Array, speed: jax.Array | None) -> jax.Array:
    """Load / speed, uint32 [ranks]."""
    if speed is None:
        return rank_load
    return jnp.minimum(rank_load.astype(jnp.float32) * speed[1], 2.0**31).astype(jnp.uint32)


def _limit(mean: jax.Array, slack: jax.Array) -> jax.Array:
    more = jnp.minimum(mean.astype(jnp.float32) * slack, 2.0**31).astype(jnp.uint32)
    return jnp.minimum(mean + more, jnp.uint32(2**31 - 1))  # no load is more


def _gap(missing: jax.Array, largest: jax.Array) -> jax.Array:
    return missing.astype(jnp.float32) / jnp.maximum(largest, 1).astype(jnp.float32)


def _share(tokens: jax.Array, whole: jax.Array) -> jax.Array:
    """Of an expert's tokens; 0 where it has none."""
    share = tokens.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)
    # On GPUs XLA divides approximately; whole experts stay whole there, too.
    return jnp.where(tokens == 0, 0, jnp.where(tokens == whole.astype(tokens.dtype), 1, share))


def _stays_at_home(home_load: jax.Array, level: jax.Array, threshold: float) -> jax.Array:
    """Whether the largest load / speed of [..., ranks] is within `threshold` of the mean load."""
    if threshold == 0:
        return jnp.zeros_like(home_load[..., 0], bool)
    ranks = home_load.shape[-1]
    total = jnp.sum(home_load, axis=-1, dtype=jnp.uint32).astype(jnp.float32)
    return jnp.max(level, axis=-1).astype(jnp.float32) * ranks <= jnp.float32(threshold) * total
