"""Edge balance, for pairs of replicas along a topology: the colouring of its edges, and the sweeps in pure JAX.

Ranks that share experts are joined by an edge; a step moves load along it until both ends carry equally much, as far
as the load of those experts allows. Edges that meet no common rank step at once: those of one colour of an edge
colouring. Proposed by Lyu for DeepSeek's LPLB (Aug 2026); over-relaxed here, as in projected successive
over-relaxation. All in integers, so that the custom call (ffi/edge_balance.h) and the text below, two texts of one
algorithm, give the same bits; the comments on why each step is as it is are in the former.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb import _ffi
from jax_lplb._load import power_of_two
from jax_lplb._placement import Placement
from jax_lplb._status import Status
from jax_lplb.topology import Topology

MAX_SWEEPS = 1000


def why_not(placement: Placement) -> str:
    """What keeps edge balance from solving a placement, as the rest of a sentence; empty where nothing does."""
    if placement.topology is None:
        return "needs a placement along a topology, but placement.topology is None"
    if placement.group_size > _ffi.MAX_EDGE_RANKS:
        return f"needs groups of at most {_ffi.MAX_EDGE_RANKS} ranks, but placement has {placement.group_size} a group"
    if placement.max_replicas > 2:
        return f"needs experts of at most two replicas, but placement has max_replicas = {placement.max_replicas}"
    colours = len(colouring(placement.topology))
    if colours > _ffi.MAX_COLOURS:
        return f"needs a topology of at most {_ffi.MAX_COLOURS} edge colours, but placement.topology takes {colours}"
    return ""


@lru_cache
def colouring(topology: Topology) -> np.ndarray:
    """An edge colouring, int32 [colours, group_size]: the rank at the other end of each rank's edge of each colour.

    A rank without an edge of a colour is its own partner. Takes as many colours as a rank has neighbours at most where
    the graph is bipartite (even rings, the cube, the hypercube, even tori), and seldom more elsewhere: an edge both of
    whose ends lack no common colour gets one by swapping two colours along an alternating path, as in König's theorem.
    """
    ranks = np.arange(topology.group_size, dtype=np.int32)
    pairs = {(min(i, j), max(i, j)) for i, owners in enumerate(topology.r2o.tolist()) for j in owners}
    partner = np.empty((0, ranks.size), np.int32)
    for i, j in sorted(pairs):
        colour = _make_free(partner, i, j)
        if colour is None:
            colour, partner = len(partner), np.vstack([partner, ranks])
        partner[colour, [i, j]] = j, i
    partner.setflags(write=False)
    return partner


def _make_free(partner: np.ndarray, i: int, j: int) -> int | None:
    """A colour that neither rank has an edge of, after recolouring other edges where need be; None where that fails."""
    free_at_i, free_at_j = (np.flatnonzero(partner[:, rank] == rank).tolist() for rank in (i, j))
    for colour in free_at_i:
        if colour in free_at_j:
            return colour
    for colour in free_at_i:
        for other in free_at_j:
            path = [j]  # of edges that alternate between the two colours
            while (following := partner[(colour, other)[(len(path) - 1) % 2], path[-1]]) != path[-1]:
                path.append(following)
            if path[-1] != i:
                partner[np.ix_([colour, other], path)] = partner[np.ix_([other, colour], path)]
                return colour
    return None


def solve_groups(
    load: jax.Array,
    log2phy: jax.Array,
    slots: int,
    num_ranks: int,
    num_groups: int,
    partner: np.ndarray,
    tol: float,
    threshold: float,
    speed: jax.Array | None = None,
) -> list[jax.Array]:
    """All groups; `slots` a rank. Results as of the custom call, see `_solve.solve_fractions`."""
    (colours, size), num_slots = partner.shape, num_ranks * slots
    ranks = np.arange(size)
    colour_of = np.full((size, size), -1, np.int32)
    for c, others in enumerate(partner):
        colour_of[ranks, others] = np.where(others == ranks, -1, c)

    load = jnp.maximum(load, 0)
    known = (log2phy >= 0) & (log2phy < num_slots)
    home_slot, copy_slot = jnp.where(known, log2phy, 0).T
    home, copy = home_slot // slots, copy_slot // slots
    group, on_home = home // size, home % size
    colour = jnp.asarray(colour_of)[on_home, copy % size]
    moves = known[:, 0] & known[:, 1] & (group == copy // size) & (colour >= 0)
    stays = known[:, 0] & ~moves

    def add_up(where: jax.Array, shape: tuple[int, ...], *index: jax.Array) -> jax.Array:
        first = jnp.where(where, index[0], shape[0])  # beyond the end: dropped
        return jnp.zeros_like(load, shape=shape).at[first, *index[1:]].add(load, mode="drop")

    fixed = add_up(stays, (num_groups, size), group, on_home)
    at_home = add_up(moves, (num_groups, colours, size), group, colour, on_home)
    replicated = jnp.zeros_like(fixed, shape=num_groups).at[group].max(moves.astype(jnp.int32)) > 0
    by_group = None if speed is None else jnp.moveaxis(speed.reshape(2, num_groups, size), 0, 1)
    moved, shift, rank_load, gap, sweeps, status = jax.vmap(
        partial(_solve_group, partner=partner, tol=tol, threshold=threshold)
    )(fixed, at_home, replicated, by_group)

    # An edge's experts send what it moves in the order of their copies' slots.
    slot = jnp.where(moves, copy_slot, num_slots)
    by_rank = (num_ranks, slots)
    sent = jnp.zeros_like(load, shape=num_slots).at[slot].add(load, mode="drop").reshape(by_rank)
    owner = jnp.full_like(load, -1, shape=num_slots).at[slot].max(home, mode="drop").reshape(by_rank)
    earlier = (owner[:, :, None] == owner[:, None, :]) & np.tri(slots, k=-1, dtype=bool)[None]
    before = jnp.sum(jnp.where(earlier, sent[:, None, :], 0), axis=2, dtype=jnp.int32).reshape(num_slots)[copy_slot]
    idle = load == 0
    load, before = load << shift[group], before << shift[group]
    part = jnp.clip(moved[group, jnp.maximum(colour, 0), on_home] - before, 0, load)

    # One column at a time: XLA turns a division by something broadcast into a product with its reciprocal.
    whole = jnp.maximum(load, 1).astype(jnp.float32)
    # On GPUs XLA divides approximately; whole experts stay whole there, too.
    on_copy = jnp.where(part == load, 1, part.astype(jnp.float32) / whole)
    fraction = jnp.stack([jnp.maximum(1 - on_copy, 0), on_copy], axis=1)
    skipped = (status == Status.SKIPPED)[group]
    at_home_only = known[:, 0] & (skipped | ~moves)
    fraction = jnp.where(at_home_only[:, None], jnp.array([[1, 0]], jnp.float32), fraction)
    fraction = jnp.where((known[:, 0] & ~idle)[:, None], fraction, 0)
    return [fraction, rank_load.reshape(num_ranks), gap, sweeps, status]


class _Search(NamedTuple):
    """Loads [ranks] and shares [colours, ranks], and the certified gap as missing / whole."""

    load: jax.Array
    share: jax.Array
    sweeps: jax.Array
    converged: jax.Array
    missing: jax.Array
    whole: jax.Array


def _solve_group(
    fixed: jax.Array,
    at_home: jax.Array,
    replicated: jax.Array,
    speed: jax.Array | None,
    *,
    partner: np.ndarray,
    tol: float,
    threshold: float,
) -> tuple[jax.Array, ...]:
    """One group: int32 tokens fixed [ranks] and, by edge, at home [colours, ranks]; whether any of them may move.

    `speed`: float32 [2, ranks], of ranks, and the inverse.
    """
    size = partner.shape[1]
    lower = np.arange(size) < partner
    sign = np.where(lower, 1, -1).astype(np.int32)
    widths = [np.float32(np.clip(factor * np.float32(tol), 2.0**-20, 2.0**-4)) for factor in (2, 1)]

    weight = None if speed is None else 2 * speed[0][partner] / (speed[:1] + speed[0][partner])

    def level(load: jax.Array) -> jax.Array:
        """Load / speed; float32 where there are speeds."""
        return load if speed is None else load.astype(jnp.float32) * speed[1]

    def less(level: jax.Array, share: jax.Array) -> jax.Array:
        if speed is None:
            return level - (level.astype(jnp.float32) * share).astype(jnp.int32)
        return level * (1 - share)

    def load_at(level: jax.Array) -> jax.Array:
        """What a rank carries at a level."""
        return level if speed is None else _whole(level * speed[0])

    home_load = fixed + jnp.sum(at_home, axis=0, dtype=jnp.int32)
    total = jnp.sum(home_load, dtype=jnp.int32)
    solvable = replicated & (total != 0)
    shift = jnp.where(solvable, jnp.maximum(lax.clz(total) - 2, 0), 0)
    home_load, at_home, total = home_load << shift, at_home << shift, total << shift
    most_at_home = jnp.max(level(home_load)).astype(jnp.float32) * size
    below = solvable & (threshold > 0) & (most_at_home <= threshold * total.astype(jnp.float32))
    solvable &= ~below

    capacity = at_home + jnp.take_along_axis(at_home, partner, axis=1)
    even_share = lax.shift_right_logical(capacity + (~lower).astype(np.int32), jnp.ones_like(capacity))
    even_load = home_load + jnp.sum(even_share - at_home, axis=0, dtype=jnp.int32)

    def certify(search: _Search) -> _Search:
        load, share = search.load, search.share
        most = jnp.max(level(load))
        width = jnp.where(search.sweeps % 4 == 0, widths[0], widths[1])
        inside = level(load) >= less(most, width)
        full = load_at(most)
        leaving = jnp.sum(jnp.where(inside[partner], 0, share), axis=0, dtype=jnp.int32)
        over = full - load if speed is None else jnp.maximum(full - load, 0)  # negative only by rounding
        short = jnp.sum(jnp.where(inside, over + leaving, 0), dtype=jnp.int32)
        missing = short.astype(jnp.uint32).astype(jnp.float32)
        if speed is None:
            whole = most.astype(jnp.float32) * jnp.sum(inside, dtype=jnp.int32).astype(jnp.float32)
        else:
            whole = jnp.sum(jnp.where(inside, full, 0), dtype=jnp.int32).astype(jnp.uint32).astype(jnp.float32)
        converged = missing <= tol * whole
        better = converged | (speed is not None) | (missing * search.whole < search.missing * whole)
        return search._replace(
            converged=converged,
            missing=jnp.where(better, missing, search.missing),
            whole=jnp.where(better, whole, search.whole),
        )

    def sweep(load: jax.Array, share: jax.Array, sweeps: jax.Array) -> tuple[jax.Array, jax.Array]:
        shift = _relaxation_shift(sweeps)

        def of_colour(load: jax.Array, edges: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
            others, signs, weight, capacity, share = edges
            here = load if weight is None else _whole(load.astype(jnp.float32) * weight)
            difference = (here - here[others]) * signs
            step = (difference - (difference >> shift)) * signs
            following = jnp.maximum(jnp.minimum(share - step, capacity), 0)
            return load + following - share, following

        return lax.scan(of_colour, load, (jnp.asarray(partner), jnp.asarray(sign), weight, capacity, share))

    def two_sweeps(search: _Search) -> _Search:
        load, share = sweep(search.load, search.share, search.sweeps)
        load, share = sweep(load, share, search.sweeps + 1)
        return certify(search._replace(load=load, share=share, sweeps=search.sweeps + 2))

    one = jnp.ones_like(total, jnp.float32)
    search = certify(_Search(even_load, even_share, jnp.zeros_like(total), total != total, one, one))
    search = lax.while_loop(lambda s: solvable & ~s.converged & (s.sweeps < MAX_SWEEPS), two_sweeps, search)

    gap = search.missing / jnp.maximum(search.whole, 1)
    gap = jnp.where(search.converged, jnp.minimum(gap, tol), gap)
    over_mean = jnp.maximum(most_at_home - total.astype(jnp.float32), 0)
    gap_at_home = over_mean / jnp.maximum(most_at_home, 1)
    gap = jnp.where(solvable, gap, jnp.where(below, gap_at_home, 0))
    improved = search.converged | (jnp.max(level(search.load)) < jnp.max(level(even_load)))
    load = jnp.where(solvable, jnp.where(improved, search.load, even_load), home_load)
    share = jnp.where(solvable, jnp.where(improved, search.share, even_share), at_home)
    status = jnp.where(
        search.converged, Status.CONVERGED, jnp.where(improved, Status.MAX_ITERATIONS, Status.EVEN_SPLIT)
    )
    status = jnp.where(solvable, status, jnp.where(below | ~replicated, Status.SKIPPED, Status.CONVERGED))
    return (
        at_home - share,
        shift,
        load.astype(jnp.float32) * power_of_two(-shift),
        gap,
        search.sweeps,
        status.astype(jnp.int32),
    )


def _whole(tokens: jax.Array) -> jax.Array:
    return jnp.minimum(tokens, 2.0**31 - 128).astype(jnp.int32)


def _relaxation_shift(sweep: jax.Array) -> jax.Array:
    late = jnp.where(sweep < 16, 2, jnp.where(sweep < 40, 3, 4))
    return jnp.where(sweep < 2, 1, jnp.where(sweep < 6, 2 - sweep % 2, late)).astype(jnp.int32)
