"""Step 3 of `balance`: the linear program that minimises the largest rank load.

    minimise T   subject to   sum_{p in e} x_p = w_e,   b_g + sum_{p on g} x_p + s_g = T,   x, s >= 0

x_p is the load that replica p takes of its expert's load w_e, b_g the load of rank g's experts without copies; where
ranks have speeds, rank g may carry its own times T. After DeepSeek's LPLB, which posed the problem. Two algorithms
solve it: `_interior_point`, for any placement, and `_edge_balance`, for pairs of replicas along a topology.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb import _edge_balance, _ffi, _interior_point, _speed
from jax_lplb._load import in_tokens, to_integers
from jax_lplb._mesh import with_auto_axes
from jax_lplb._placement import Placement, check_limits
from jax_lplb._status import Status

Solver = Literal["auto", "ipm", "edge_balance"]


class Solution(NamedTuple):
    """What `solve` returns.

    Attributes:
      split: float32 [num_experts, max_replicas], tokens for each replica in the order of `placement.log2phy`; 0 in
        padding. Each row sums to the expert's load.
      rank_load: float32 [num_ranks], tokens.
      gap: float32 [num_groups], certified: the largest rank load of the group, or load / speed, is at most a fraction
        `gap` of itself above the optimum.
      iterations: int32 [num_groups].
      status: int32 [num_groups], values of `Status`.
    """

    split: jax.Array
    rank_load: jax.Array
    gap: jax.Array
    iterations: jax.Array
    status: jax.Array


def solve(
    load: jax.Array,
    placement: Placement,
    *,
    rank_speed: jax.Array | np.ndarray | None = None,
    solver: Solver = "auto",
    tol: float = 1e-4,
    threshold: float | None = None,
    implementation: _ffi.Implementation = None,
) -> Solution:
    """Splits each expert's load over its replicas so that the busiest rank of each group carries as little as it can.

    Args:
      load: int32 or float32 [num_experts], tokens per logical expert, with a sum below 2**31 where int32. Carries no
        gradient. What is negative or NaN counts as 0.
      placement: where the replicas are.
      rank_speed: float32 [num_ranks], how fast ranks are, in any unit: a slow GPU, or a rank that does other work
        besides. The largest load / speed of each group becomes as small as it can, and gap, status and threshold are
        about that, with speeds scaled to a mean of 1 within the group, so that it is in tokens of an average rank. A
        rank of speed 0, or less than 1/256 of the group's fastest, has no load but of experts that are on such ranks
        only, which counts for nothing. Carries no gradient. None: all are equally fast. A NumPy array with a negative
        or infinite speed, NaN, or a group of zeros is an error; in a JAX array such speeds are 0, and those of a group
        of zeros equal.
      solver: "ipm", the interior-point method; "edge_balance", the faster one for placements along a topology, which
        needs `placement.topology`, experts of at most two replicas, at most 32 ranks a group, and a topology whose
        edges take at most 16 colours (about as many as a rank has neighbours); or "auto": edge balance where it can
        run, else the interior-point method.
        Edge balance moves load between ranks that the topology joins; a copy elsewhere, which only replaced contents
        can hold, stays idle.
      tol: relative gap to the optimum at which to stop. Below about 1e-6 float32 may not get there; the status says.
      threshold: all load of a group stays at home, with status SKIPPED, where that leaves the busiest rank at most
        `threshold` times the mean rank load. At least 1. None: never.
      implementation: "ffi" (custom call), "xla" (pure JAX), or None: the custom call on platforms that have one.

    Returns:
      A `Solution`.

    Raises:
      TypeError, ValueError: an argument has the wrong dtype, shape or value, the solver cannot solve the placement, or
        the placement is beyond the custom call's limits (128 ranks and 2,048 physical experts a group, 4,096 experts),
        named in the message.
    """
    check_placement(placement, implementation)
    check_load(load, placement)
    _speed.check_rank_speed(rank_speed, placement)
    options = check_options(placement, solver, tol, threshold)
    load = lax.stop_gradient(jnp.asarray(load))

    def run(load: jax.Array, placement: Placement, rank_speed: jax.Array | None) -> Solution:
        return _solve(load, placement, options, implementation, _speed.scale(rank_speed, placement))

    with jax.named_scope("lplb_solve"):
        return with_auto_axes(run, jax.P(), load, placement, rank_speed)


def _solve(
    load: jax.Array,
    placement: Placement,
    options: "Options",
    implementation: _ffi.Implementation,
    speed: jax.Array | None,
) -> Solution:
    fraction, rank_load, gap, iterations, status = solve_fractions(load, placement, options, implementation, speed)
    if load.dtype == jnp.float32:
        # What is too little beside the other loads to count stays at home.
        home = (jnp.asarray(placement.log2phy) >= 0) & (jnp.arange(placement.max_replicas) == 0)[None, :]
        fraction = jnp.where(jnp.any(fraction > 0, axis=1, keepdims=True), fraction, home.astype(jnp.float32))
    split = fraction * jnp.where(load > 0, load.astype(jnp.float32), 0)[:, None]
    return Solution(split, rank_load, gap, iterations, status)


class Options(NamedTuple):
    """What `check_options` has checked."""

    solver: Literal["ipm", "edge_balance"]
    tol: float
    threshold: float
    """0: never."""


def solve_fractions(
    load: jax.Array,
    placement: Placement,
    options: Options,
    implementation: _ffi.Implementation,
    speed: jax.Array | None = None,
) -> list[jax.Array]:
    """As `solve`, with fractions of the load in place of tokens, and `_speed.scale`'s speeds.

    An expert without load, or with too little beside the others' to count, has a row of zeros, which `assign` reads as
    the even split; where no expert has a second replica, or ranks have speeds, it may have a one at its first replica.
    """
    log2phy = jnp.asarray(placement.log2phy)
    load, unit = to_integers(load)
    if placement.max_replicas == 1:
        fraction, rank_load, gap, iterations, status = _all_at_home(load, placement)
    else:

        def ffi(*operands: jax.Array) -> list[jax.Array]:
            results = ffi_results(placement, operands)
            return _ffi.call("lplb_solve", results, *operands, **ffi_attributes(placement, options))

        def xla(load: jax.Array, log2phy: jax.Array, *speed: jax.Array) -> list[jax.Array]:
            return solve_groups(load, log2phy, placement, options, *speed)

        running = None if speed is None else _speed.running(load, log2phy, speed, placement)
        operands = (load, log2phy) if running is None else (running.load, running.log2phy, running.speed)
        solved = _ffi.choose("solve", implementation, ffi, xla, *operands)
        fraction, rank_load, gap, iterations, status = solved
        if running is not None:
            fraction, rank_load = running.in_columns(fraction), rank_load + running.kept_load
    return [fraction, in_tokens(rank_load, unit), gap, iterations, status]


def ffi_results(placement: Placement, varies_with: tuple[jax.Array, ...]) -> list[_ffi.Result]:
    """Fraction, rank load, gap, iterations and status, as the custom calls return them."""
    ranks, groups = placement.num_ranks, placement.num_groups
    return [
        _ffi.Result((placement.num_experts, placement.max_replicas), jnp.float32, varies_with),
        _ffi.Result((ranks,), jnp.float32, varies_with),
        _ffi.Result((groups,), jnp.float32, varies_with),
        _ffi.Result((groups,), jnp.int32, varies_with),
        _ffi.Result((groups,), jnp.int32, varies_with),
    ]


def ffi_attributes(placement: Placement, options: Options) -> dict[str, Any]:
    """What the custom calls know of the solver. No partners: the interior-point method."""
    partners, limit = np.zeros(0, np.int32), _interior_point.MAX_ITERATIONS
    if options.solver == "edge_balance":
        assert placement.topology is not None
        partners, limit = _edge_balance.colouring(placement.topology).ravel(), _edge_balance.MAX_SWEEPS
    return {
        "num_physical": np.int64(placement.num_physical),
        "tol": np.float32(options.tol),
        "threshold": np.float32(options.threshold),
        "max_iterations": np.int64(limit),
        "partners": partners,
    }


def solve_groups(
    load: jax.Array, log2phy: jax.Array, placement: Placement, options: Options, speed: jax.Array | None = None
) -> list[jax.Array]:
    """The solve in pure JAX, of int32 loads; `speed` of `_speed.running`."""
    slots, ranks, groups = placement.slots_per_rank, placement.num_ranks, placement.num_groups
    limits = (options.tol, options.threshold)
    if options.solver == "ipm":
        return _interior_point.solve_groups(load, log2phy, slots, ranks, groups, *limits, speed)
    assert placement.topology is not None
    edges = _edge_balance.colouring(placement.topology)
    return _edge_balance.solve_groups(load, log2phy, slots, ranks, groups, edges, *limits, speed)


def certified_bound(
    rank_load: jax.Array, gap: jax.Array, placement: Placement, speed: jax.Array | None = None
) -> jax.Array:
    """float32 [num_groups]: what the busiest rank of each group has at the least, in any split over these replicas.

    Of the rank loads that the solver gave, which are not rounded to whole tokens, and their certified gap; of load /
    speed where there are speeds, `_speed.scale`'s.
    """
    busiest = jnp.max(_speed.in_time(rank_load, speed).reshape(placement.num_groups, -1), axis=1)
    # The certificate is made of float32 sums over experts, whose terms may each be off by half a unit in the last
    # place; some more for the operations before and after.
    rounded = (placement.num_experts + 16) * 2.0**-24
    return busiest * jnp.maximum(1 - gap - rounded, 0)


def _all_at_home(load: jax.Array, placement: Placement) -> list[jax.Array]:
    home = jnp.asarray(placement.log2phy)[:, 0]
    rank = jnp.where(
        (home >= 0) & (home < placement.num_physical), home // placement.slots_per_rank, placement.num_ranks
    )
    rank_load = jnp.zeros_like(load, shape=(placement.num_ranks,)).at[rank].add(jnp.maximum(load, 0), mode="drop")
    rank_load = rank_load.astype(jnp.float32)
    nothing = jnp.zeros_like(rank_load, shape=(placement.num_groups,))
    return [
        jnp.ones_like(load, jnp.float32)[:, None],
        rank_load,
        nothing,
        nothing.astype(jnp.int32),
        jnp.full_like(nothing, Status.SKIPPED, jnp.int32),
    ]


def check_load(load: Any, placement: Placement) -> None:
    if not isinstance(load, (jax.Array, np.ndarray)):
        raise TypeError(f"load must be an int32 or float32 array, got {type(load).__name__}")
    if load.dtype not in (jnp.int32, jnp.float32):
        raise TypeError(f"load must have dtype int32 or float32, got {load.dtype}")
    if load.shape != (placement.num_experts,):
        raise ValueError(f"load must have shape [num_experts] = [{placement.num_experts}], got shape {load.shape}")


def check_placement(placement: Placement, implementation: _ffi.Implementation) -> None:
    if not isinstance(placement, Placement):
        raise TypeError(f"placement must be a jax_lplb.Placement, got {type(placement).__name__}")
    if np.ndim(placement.phy2log) != 1 or np.ndim(placement.log2phy) != 2:
        raise ValueError(
            "placement must be of one layer, phy2log [num_physical] and log2phy [num_experts, max_replicas], got "
            f"{np.shape(placement.phy2log)} and {np.shape(placement.log2phy)}: use jax.vmap or jax.lax.scan over layers"
        )
    check_limits(placement, implementation)


def check_options(placement: Placement, solver: Solver, tol: float, threshold: float | None) -> Options:
    if not isinstance(tol, (float, int, np.floating)):
        raise TypeError(f"tol must be a Python float, got {tol!r}")
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be in [0, 1), got {tol}")
    if threshold is None:
        threshold = 0
    elif not isinstance(threshold, (float, int, np.floating)):
        raise TypeError(f"threshold must be None or a Python float, got {threshold!r}")
    elif not 1 <= threshold < np.inf:
        raise ValueError(f"threshold must be at least 1 and finite, got {threshold}: the busiest rank over the mean")
    if solver not in ("auto", "ipm", "edge_balance"):
        raise ValueError(f"solver must be 'auto', 'ipm' or 'edge_balance', got {solver!r}")
    if solver == "ipm":
        return Options("ipm", float(tol), float(threshold))
    why_not = _edge_balance.why_not(placement)
    if solver == "edge_balance" and why_not:
        raise ValueError(f"solver = 'edge_balance' {why_not}; pass solver='ipm' or 'auto'")
    return Options("ipm" if why_not else "edge_balance", float(tol), float(threshold))
