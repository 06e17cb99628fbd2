"""Step 3 of `balance`: the linear program that minimises the largest rank load.

    minimise T   subject to   sum_{p in e} x_p = w_e,   b_g + sum_{p on g} x_p + s_g = T,   x, s >= 0

x_p is the load that replica p takes of its expert's load w_e, b_g the load of rank g's experts without copies. A
feasible primal-dual interior-point method with Mehrotra's predictor-corrector solves it (S. Mehrotra, "On the
implementation of a primal-dual interior point method", 1992), after DeepSeek's LPLB, which posed the problem. The
custom call (ffi/interior_point.h) and the pure JAX below are two texts of one algorithm; the comments on why each step
is as it is are in the former.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb import _ffi
from jax_lplb._placement import Placement

_MAX_ITERATIONS = 50
_FLOOR = 1e-8  # of a scaled expert load: keeps idle experts strictly inside
_TINY = 1e-12


class Status(enum.IntEnum):
    """How a group's solve ended. Every split is feasible and no worse than the even one, whatever the status."""

    CONVERGED = 0
    """The certified gap is at most `tol`."""
    MAX_ITERATIONS = 1
    """The iteration limit, or float32, was reached first; the best split found is used, with its certified gap."""
    EVEN_SPLIT = 2
    """Likewise, and the best split found is the even one."""
    SKIPPED = 3
    """Nothing in the group is replicated: all load is at home, and the gap is 0."""


class Solution(NamedTuple):
    """What `solve` returns.

    Attributes:
      split: float32 [num_experts, max_replicas], tokens for each replica in the order of `placement.log2phy`; 0 in
        padding. Each row sums to the expert's load.
      rank_load: float32 [num_ranks], tokens.
      gap: float32 [num_groups], certified: the largest rank load of the group is at most a fraction `gap` of itself
        above the optimum.
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
    tol: float = 1e-4,
    implementation: _ffi.Implementation = None,
) -> Solution:
    """Splits each expert's load over its replicas so that the busiest rank of each group carries as little as it can.

    Args:
      load: int32 or float32 [num_experts], tokens per logical expert, with a sum below 2**31 where int32. Carries no
        gradient. What is negative or NaN counts as 0.
      placement: where the replicas are.
      tol: relative gap to the optimum at which to stop. Below about 1e-6 float32 may not get there; the status says.
      implementation: "ffi" (custom call), "xla" (pure JAX), or None: the custom call on platforms that have one.

    Returns:
      A `Solution`.

    Raises:
      TypeError, ValueError: an argument has the wrong dtype, shape or value, or the placement is beyond the custom
        call's limits (128 ranks and 2,048 physical experts a group, 4,096 experts), named in the message.
    """
    check_placement(placement, implementation)
    check_load(load, placement)
    tol = check_tol(tol)
    load = lax.stop_gradient(jnp.asarray(load))
    with jax.named_scope("lplb_solve"):
        fraction, rank_load, gap, iterations, status = solve_fractions(load, placement, tol, implementation)
        split = fraction * jnp.where(load > 0, load.astype(jnp.float32), 0)[:, None]
        return Solution(split, rank_load, gap, iterations, status)


def solve_fractions(
    load: jax.Array, placement: Placement, tol: float, implementation: _ffi.Implementation
) -> list[jax.Array]:
    """As `solve`, with fractions of the load in place of tokens; an expert without load has some split, too."""
    exponent = None
    if load.dtype == jnp.float32:
        load, exponent = _to_integers(load)
    ranks, groups = placement.num_ranks, placement.num_groups

    def ffi(load: jax.Array, log2phy: jax.Array) -> list[jax.Array]:
        operands = (load, log2phy)
        return _ffi.call(
            "lplb_solve",
            [
                _ffi.Result(log2phy.shape, jnp.float32, operands),
                _ffi.Result((ranks,), jnp.float32, operands),
                _ffi.Result((groups,), jnp.float32, operands),
                _ffi.Result((groups,), jnp.int32, operands),
                _ffi.Result((groups,), jnp.int32, operands),
            ],
            *operands,
            num_physical=np.int64(placement.num_physical),
            tol=np.float32(tol),
            max_iterations=np.int64(_MAX_ITERATIONS),
            threshold=np.float32(0),
        )

    def xla(load: jax.Array, log2phy: jax.Array) -> list[jax.Array]:
        return _solve_groups(load, log2phy, placement.slots_per_rank, ranks, groups, tol)

    log2phy = jnp.asarray(placement.log2phy)
    if placement.max_replicas == 1:
        fraction, rank_load, gap, iterations, status = _all_at_home(load, placement)
    else:
        fraction, rank_load, gap, iterations, status = _ffi.dispatch("solve", implementation, ffi, xla, load, log2phy)
    if exponent is not None:
        rank_load = rank_load * 2.0 ** -_integer_bits(placement.num_experts) * _power_of_two(exponent)
    return [fraction, rank_load, gap, iterations, status]


def _to_integers(load: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float loads as int32 in units of 2**(exponent - _integer_bits(num_experts)), and the exponent."""
    most = jnp.max(load, initial=0, where=load > 0)
    # Powers of two scale exactly, so that neither the order of a sum nor a division shows in the result. Beyond these
    # bounds they, or the ranks' loads, would leave float32's range.
    exponent = jnp.clip((lax.bitcast_convert_type(most, jnp.int32) >> 23) - 126, -125, 115)  # most < 2**exponent
    scaled = jnp.minimum(load * _power_of_two(-exponent), 1) * 2.0 ** _integer_bits(load.shape[0])
    return jnp.where(load > 0, jnp.rint(scaled), 0).astype(jnp.int32), exponent


def _integer_bits(num_experts: int) -> int:
    """Bits for each expert's load, so that all of them sum to at most 2**30."""
    return 30 - (num_experts - 1).bit_length()


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


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


def _solve_groups(
    load: jax.Array, log2phy: jax.Array, slots: int, num_ranks: int, num_groups: int, tol: float
) -> list[jax.Array]:
    """All groups; `slots` a rank."""
    num_experts, max_replicas = log2phy.shape
    size = num_ranks // num_groups
    # Experts group by group; each group has equally many.
    group = jnp.clip(log2phy[:, 0] // (slots * size), 0, num_groups - 1)
    order = jnp.argsort(group, stable=True)
    table = log2phy[order].reshape(num_groups, num_experts // num_groups, max_replicas)
    first_slot = (jnp.arange(num_groups, dtype=jnp.int32) * size * slots)[:, None, None]
    rank = (table - first_slot) // slots
    present = jnp.cumprod((table >= first_slot) & (table < first_slot + size * slots), axis=2, dtype=jnp.int32) > 0
    loads = jnp.maximum(load[order], 0).reshape(num_groups, -1)
    fraction, rank_load, gap, iterations, status = jax.vmap(
        lambda w, rank, present: _solve_group(w, jnp.where(present, rank, 0), present, size, tol)
    )(loads, rank, present)
    by_expert = jnp.zeros_like(fraction, shape=log2phy.shape).at[order].set(fraction.reshape(log2phy.shape))
    return [by_expert, rank_load.reshape(num_ranks), gap, iterations, status]


class _Iterate(NamedTuple):
    """Primal x, slack and top, dual y, z and lam, of shapes [experts, replicas] or [ranks] or []."""

    x: jax.Array
    y: jax.Array
    z: jax.Array
    lam: jax.Array
    slack: jax.Array
    top: jax.Array
    rank_load: jax.Array


class _Search(NamedTuple):
    iterate: _Iterate
    best_x: jax.Array
    best_rank_load: jax.Array
    best_most: jax.Array
    best_bound: jax.Array
    improved: jax.Array
    iterations: jax.Array
    sound: jax.Array


def _solve_group(
    tokens: jax.Array, rank: jax.Array, present: jax.Array, num_ranks: int, tol: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """One group: int32 tokens [experts], rank and present [experts, replicas], ranks counted within the group."""
    num_replicas = jnp.sum(present, axis=1, dtype=jnp.int32)
    replicated = num_replicas > 1
    active = present & replicated[:, None]
    num_pairs = jnp.sum(active).astype(jnp.float32) + num_ranks
    total = jnp.sum(tokens).astype(jnp.float32)
    scale = num_ranks / jnp.maximum(total, 1)

    # Sums over ranks as products, which GPUs add up in a fixed order; scatters use atomics there.
    on = jax.nn.one_hot(rank, num_ranks, dtype=jnp.float32) * present.astype(jnp.float32)[:, :, None]

    def on_rank(v: jax.Array) -> jax.Array:
        return jnp.einsum("er,erg->g", v, on, precision=lax.Precision.HIGHEST)

    def of_expert(v: jax.Array) -> jax.Array:
        return jnp.sum(v, axis=1)

    w = tokens.astype(jnp.float32) * scale
    fixed = on_rank(jnp.where(present & ~replicated[:, None], w[:, None], 0))
    w = jnp.maximum(w, _FLOOR)
    even = jnp.where(active, (w / jnp.maximum(num_replicas, 1).astype(jnp.float32))[:, None], 0)
    even_load = fixed + on_rank(even)

    def bound(lam: jax.Array) -> jax.Array:
        lowest = jnp.min(jnp.where(active, lam[rank], jnp.inf), axis=1)
        return (jnp.sum(jnp.where(replicated, lowest * w, 0)) + jnp.sum(lam * fixed)) / jnp.sum(lam)

    def certify(search: _Search, new: _Iterate) -> _Search:
        most = jnp.max(new.rank_load)
        better = most < search.best_most
        return search._replace(
            iterate=new,
            best_x=jnp.where(better, new.x, search.best_x),
            best_rank_load=jnp.where(better, new.rank_load, search.best_rank_load),
            best_most=jnp.minimum(most, search.best_most),
            best_bound=jnp.maximum(bound(new.lam), search.best_bound),
            improved=search.improved | better,
        )

    def gap(search: _Search) -> jax.Array:
        return jnp.maximum((search.best_most - search.best_bound) / jnp.maximum(search.best_most, _TINY), 0)

    def newton_step(search: _Search) -> _Search:
        x, y, z, lam, slack, top, _ = search.iterate
        d = jnp.where(active, x / z, 0)
        h = jnp.where(replicated, of_expert(d), 1)
        v = jnp.einsum("er,erg->eg", d / jnp.sqrt(h)[:, None], on, precision=lax.Precision.HIGHEST)
        weights = jnp.matmul(v.T, v, precision=lax.Precision.HIGHEST)
        with jax.enable_x64(True):
            weights = weights.astype(jnp.float64) * (1 - jnp.eye(num_ranks, dtype=jnp.float64))
            diagonal = jnp.sum(weights, axis=1) + (slack / lam).astype(jnp.float64)
            factor = jax.scipy.linalg.cho_factor(jnp.diag(diagonal) - weights, lower=True)
            ones = jax.scipy.linalg.cho_solve(factor, jnp.ones_like(diagonal))

        def direction(q: jax.Array, q_slack: jax.Array) -> tuple[jax.Array, ...]:
            """With q = (target of x z) / z - x, and likewise for the slacks."""
            sum_q = of_expert(q)
            right_side = q_slack + on_rank(q - d * (sum_q / h)[:, None])
            with jax.enable_x64(True):
                a = jax.scipy.linalg.cho_solve(factor, right_side.astype(jnp.float64))
                step_top = jnp.sum(a) / jnp.sum(ones)
                step_lam = (a - step_top * ones).astype(jnp.float32)
                step_top = step_top.astype(jnp.float32)
            step_y = (of_expert(d * step_lam[rank]) - sum_q) / h
            step_z = jnp.where(active, step_lam[rank] - step_y[:, None], 0)
            step_x = q - d * step_z
            return step_x, step_y, step_z, step_lam, step_top - on_rank(step_x), step_top

        def longest(*pairs: tuple[jax.Array, jax.Array]) -> jax.Array:
            return jnp.minimum(
                1.0,
                jnp.stack(
                    [jnp.min(jnp.where(step < 0, -v / jnp.where(step < 0, step, 1), 1)) for v, step in pairs]
                ).min(),
            )

        def inner(a: jax.Array, b: jax.Array, a_rank: jax.Array, b_rank: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(active, a * b, 0)) + jnp.sum(a_rank * b_rank)

        step_x, _, step_z, step_lam, step_slack, _ = direction(-x, -slack)
        primal = longest((x, step_x), (slack, step_slack))
        dual = longest((z, step_z), (lam, step_lam))
        now = inner(x, z, slack, lam)
        left = inner(x + primal * step_x, z + dual * step_z, slack + primal * step_slack, lam + dual * step_lam)
        target = jnp.maximum(left / now, 0) ** 3 * now / num_pairs
        step_x, step_y, step_z, step_lam, step_slack, step_top = direction(
            jnp.where(active, (target - step_x * step_z) / z - x, 0), (target - step_slack * step_lam) / lam - slack
        )
        primal = jnp.minimum(1.0, 0.99 * longest((x, step_x), (slack, step_slack)))
        dual = jnp.minimum(1.0, 0.99 * longest((z, step_z), (lam, step_lam)))

        x = jnp.where(active, jnp.maximum(x + primal * step_x, _TINY), 0)
        x = x * (w / jnp.where(replicated, of_expert(x), 1))[:, None]
        rank_load = fixed + on_rank(x)
        top = jnp.maximum(top + primal * step_top, jnp.max(rank_load) * (1 + 1e-6))
        lam = jnp.maximum(lam + dual * step_lam, _TINY)
        y = (y + dual * step_y) / jnp.sum(lam)
        lam = lam / jnp.sum(lam)
        z = jnp.where(active, jnp.maximum(lam[rank] - y[:, None], _TINY), 1)
        new = _Iterate(x, y, z, lam, jnp.maximum(top - rank_load, 1e-9), top, rank_load)
        # Where rounding broke the Newton system, the last iterate stands.
        sound = jnp.isfinite(left) & jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(lam))
        stepped = certify(search, new)._replace(iterations=search.iterations + 1)
        return jax.tree.map(lambda a, b: jnp.where(sound, a, b), stepped, search._replace(sound=sound))

    uniform = jnp.full_like(even_load, 1 / num_ranks)
    top = jnp.max(even_load) * 1.1 + 0.1
    start = _Iterate(
        x=even,
        y=jnp.full_like(w, -1 / num_ranks),
        z=jnp.where(active, jnp.full_like(even, 2 / num_ranks), 1),
        lam=uniform,
        slack=top - even_load,
        top=top,
        rank_load=even_load,
    )
    most = jnp.max(even_load)
    search = _Search(
        start, even, even_load, most, bound(uniform), most < 0, jnp.zeros_like(total, jnp.int32), most >= 0
    )
    solvable = (total > 0) & jnp.any(active)
    search = lax.while_loop(
        lambda s: solvable & s.sound & (gap(s) > tol) & (s.iterations < _MAX_ITERATIONS), newton_step, search
    )
    reached = gap(search)
    status = jnp.where(
        reached <= tol, Status.CONVERGED, jnp.where(search.improved, Status.MAX_ITERATIONS, Status.EVEN_SPLIT)
    )
    status = jnp.where(jnp.any(active), jnp.where(total > 0, status, Status.CONVERGED), Status.SKIPPED)
    idle = ~solvable
    home = ~replicated[:, None] & (jnp.arange(even.shape[1]) == 0)[None, :]
    fraction = jnp.where(active, search.best_x / w[:, None], home.astype(jnp.float32))
    rank_load = jnp.where(total > 0, search.best_rank_load / scale, 0)
    return (
        fraction,
        rank_load,
        jnp.where(idle, 0, reached),
        search.iterations,
        status.astype(jnp.int32),
    )


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
    if implementation not in (None, "ffi", "xla"):
        raise ValueError(f"implementation must be None, 'ffi' or 'xla', got {implementation!r}")
    if implementation == "xla":
        return
    for what, value, limit in (
        ("ranks a group", placement.group_size, _ffi.MAX_GROUP_RANKS),
        ("physical experts a group", placement.num_physical // placement.num_groups, _ffi.MAX_GROUP_SLOTS),
        ("experts", placement.num_experts, _ffi.MAX_EXPERTS),
    ):
        if value > limit:
            raise ValueError(
                f"placement has {value} {what}, and the custom calls hold at most {limit} in shared memory; "
                "pass implementation='xla'"
            )


def check_tol(tol: float) -> float:
    if not isinstance(tol, (float, int, np.floating)):
        raise TypeError(f"tol must be a Python float, got {tol!r}")
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be in [0, 1), got {tol}")
    return float(tol)
