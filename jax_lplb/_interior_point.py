"""The interior-point method, for any placement, in pure JAX.

A feasible primal-dual method with Mehrotra's predictor-corrector (S. Mehrotra, "On the implementation of a primal-dual
interior point method", 1992). The custom call (ffi/interior_point.h) and the text below are two texts of one algorithm,
step for step; the comments on why each step is as it is are in the former.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb._status import Status

MAX_ITERATIONS = 50
_BALANCING_ROUNDS = 8
_FLOOR = 1e-8  # of a scaled expert load: keeps idle experts strictly inside
_TINY = 1e-12  # of x, lambda and z
_TINY_SLACK = 1e-9
_STEP_SHARE = 0.999  # of the way to the boundary


def solve_groups(
    load: jax.Array,
    log2phy: jax.Array,
    slots: int,
    num_ranks: int,
    num_groups: int,
    tol: float,
    threshold: float,
    speed: jax.Array | None = None,
) -> list[jax.Array]:
    """All groups; `slots` a rank. Results as of the custom call, see `_solve.solve_fractions`."""
    num_experts, max_replicas = log2phy.shape
    size = num_ranks // num_groups
    # Experts group by group; each group has equally many.
    group = jnp.clip(log2phy[:, 0] // (slots * size), 0, num_groups - 1)
    order = jnp.argsort(group, stable=True)
    table = log2phy[order].reshape(num_groups, num_experts // num_groups, max_replicas)
    first_slot = (jnp.arange(num_groups, dtype=jnp.int32) * size * slots)[:, None, None]
    rank = (table - first_slot) // slots
    # Replicas are the leading slots of the group, less those on a rank that has one already.
    present = jnp.cumprod((table >= first_slot) & (table < first_slot + size * slots), axis=2, dtype=jnp.int32) > 0
    same_rank = (rank[:, :, :, None] == rank[:, :, None, :]) & np.tri(max_replicas, k=-1, dtype=bool)[None, None]
    present &= ~jnp.any(same_rank, axis=3)
    loads = jnp.maximum(load[order], 0).reshape(num_groups, -1)
    by_group = None if speed is None else speed[0].reshape(num_groups, size)
    fraction, rank_load, gap, iterations, status = jax.vmap(
        lambda tokens, rank, present, speed: _solve_group(tokens, rank, present, speed, size, tol, threshold)
    )(loads, jnp.where(present, rank, 0), present, by_group)
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
    complementarity: jax.Array


class _Best(NamedTuple):
    """The best split so far, with its largest rank load, or load / speed, and the best lower bound on any split's."""

    x: jax.Array
    rank_load: jax.Array
    most: jax.Array
    bound: jax.Array
    is_even: jax.Array


class _Search(NamedTuple):
    iterate: _Iterate
    best: _Best
    iterations: jax.Array
    sound: jax.Array


def _solve_group(
    tokens: jax.Array,
    rank: jax.Array,
    present: jax.Array,
    speed: jax.Array | None,
    num_ranks: int,
    tol: float,
    threshold: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """One group: int32 tokens [experts], rank and present [experts, replicas], ranks counted within the group."""

    def level(rank_load: jax.Array) -> jax.Array:
        return rank_load if speed is None else rank_load.astype(jnp.float32) / speed

    def by_speed(value: jax.Array) -> jax.Array:
        """Of a value that all ranks would have, if they were equally fast, those of the ranks."""
        return value if speed is None else value * speed.astype(value.dtype)

    num_replicas = jnp.sum(present, axis=1, dtype=jnp.int32)
    replicated = num_replicas > 1
    active = present & replicated[:, None]
    num_variables = jnp.sum(active).astype(jnp.float32)

    # Sums over ranks as products, which GPUs add up in a fixed order; scatters use atomics there.
    on = jax.nn.one_hot(rank, num_ranks, dtype=jnp.float32) * present.astype(jnp.float32)[:, :, None]

    def on_rank(v: jax.Array) -> jax.Array:
        return jnp.einsum("er,erg->g", v, on, precision=lax.Precision.HIGHEST)

    def of_expert(v: jax.Array) -> jax.Array:
        return jnp.sum(v, axis=1)

    def at_home(counts: jax.Array) -> jax.Array:
        where = (on[:, 0, :] > 0) & counts[:, None]
        return jnp.sum(jnp.where(where, tokens[:, None], 0), axis=0, dtype=jnp.int32)

    home_load, fixed_load = at_home(num_replicas > 0), at_home(num_replicas == 1)
    total = jnp.sum(home_load).astype(jnp.float32)
    scale = num_ranks / jnp.maximum(total, 1)
    w = jnp.maximum(tokens.astype(jnp.float32) * scale, _FLOOR)
    fixed = fixed_load.astype(jnp.float32) * scale

    def normalise(x: jax.Array) -> jax.Array:
        return x * (w / jnp.where(replicated, of_expert(x), 1))[:, None]

    def lowest(lam: jax.Array) -> jax.Array:
        return jnp.where(replicated, jnp.min(jnp.where(active, lam[rank], jnp.inf), axis=1), 0)

    def settle(
        best: _Best, x: jax.Array, y: jax.Array, lam: jax.Array, top: jax.Array, rank_load: jax.Array
    ) -> tuple[_Best, _Iterate]:
        """Slacks, duals with sum(lam) = 1 and z, complementarity, and the best split and bound so far."""
        in_set = 0.5 * jnp.max(lam)
        y_of_lam, sum_lam = lowest(lam), jnp.sum(by_speed(lam))
        bound = (jnp.sum(y_of_lam * w) + jnp.sum(lam * fixed)) / sum_lam
        inside = lam >= in_set
        load_of_set = jnp.sum(jnp.where(replicated & (y_of_lam >= in_set), w, 0)) + jnp.sum(jnp.where(inside, fixed, 0))
        bound = jnp.maximum(bound, load_of_set / jnp.sum(by_speed(inside.astype(jnp.float32))))
        most = jnp.max(level(rank_load))
        top = jnp.maximum(top, most * (1 + 1e-6))
        dual = jnp.sum(jnp.where(replicated, y * w, 0)) + jnp.sum(lam * fixed)
        z = jnp.maximum((lam[rank] - y[:, None]) / sum_lam, _TINY)
        iterate = _Iterate(
            x=x,
            y=y / sum_lam,
            z=jnp.where(active, z, 1),
            lam=lam / sum_lam,
            slack=jnp.maximum(by_speed(top) - rank_load, _TINY_SLACK),
            top=top,
            complementarity=jnp.maximum(top - dual / sum_lam, _TINY),
        )
        better = most < best.most
        best = _Best(
            x=jnp.where(better, x, best.x),
            rank_load=jnp.where(better, rank_load, best.rank_load),
            most=jnp.minimum(most, best.most),
            bound=jnp.maximum(bound, best.bound),
            is_even=best.is_even & ~better,
        )
        return best, iterate

    def start() -> _Search:
        even = jnp.where(active, (w / jnp.maximum(num_replicas, 1).astype(jnp.float32))[:, None], 0)
        even_load = fixed + on_rank(even)

        def balance(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, rank_load = state
            pull = 1 / jnp.maximum(level(rank_load), 1e-3)
            x = normalise(jnp.where(active, jnp.maximum(x * (pull * pull)[rank], _TINY), 0))
            return x, fixed + on_rank(x)

        x, rank_load = lax.fori_loop(0, _BALANCING_ROUNDS, balance, (even, even_load))
        top = jnp.max(level(rank_load)) * 1.02 + 0.005
        lam = 1 / (by_speed(top) - rank_load)
        y = lowest(lam) - jnp.mean(by_speed(lam))
        most = jnp.max(level(even_load))
        best = _Best(even, even_load, most, jnp.zeros_like(most), most >= 0)
        best, iterate = settle(best, x, y, lam, top, rank_load)
        return _Search(iterate, best, jnp.zeros_like(most, jnp.int32), most >= 0)

    def newton_step(search: _Search) -> _Search:
        x, y, z, lam, slack, top, complementarity = search.iterate
        d = jnp.where(active, x / z, 0)
        h = jnp.where(replicated, of_expert(d), 1)
        v = jnp.einsum("er,erg->eg", d / jnp.sqrt(h)[:, None], on, precision=lax.Precision.HIGHEST)
        weights = jnp.matmul(v.T, v, precision=lax.Precision.HIGHEST)
        with jax.enable_x64(True):
            weights = weights.astype(jnp.float64) * (1 - jnp.eye(num_ranks, dtype=jnp.float64))
            diagonal = jnp.sum(weights, axis=1) + (slack / lam).astype(jnp.float64)
            system = jnp.diag(diagonal) - weights
            factor = _cholesky(system), True
            border = by_speed(jnp.ones_like(diagonal))
            solved = jax.scipy.linalg.cho_solve(factor, border)

        def direction(q: jax.Array, q_slack: jax.Array) -> tuple[jax.Array, ...]:
            """With q = (target of x z) / z - x, and likewise for the slacks."""
            sum_q = of_expert(q)
            right_side = q_slack + on_rank(q - d * (sum_q / h)[:, None])
            with jax.enable_x64(True):
                a = jax.scipy.linalg.cho_solve(factor, right_side.astype(jnp.float64))
                step_top = jnp.sum(by_speed(a)) / jnp.sum(by_speed(solved))
                step_lam = (a - step_top * solved).astype(jnp.float32)
                step_top = step_top.astype(jnp.float32)
            step_y = (of_expert(d * step_lam[rank]) - sum_q) / h
            step_z = jnp.where(active, step_lam[rank] - step_y[:, None], 0)
            step_x = q - d * step_z
            return step_x, step_y, step_z, step_lam, by_speed(step_top) - on_rank(step_x), step_top

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
        left = (
            complementarity
            + primal * inner(step_x, z, step_slack, lam)
            + dual * inner(x, step_z, slack, step_lam)
            + primal * dual * inner(step_x, step_z, step_slack, step_lam)
        )
        ratio = jnp.maximum(left, 0) / complementarity
        target = ratio**3 * complementarity / (num_variables + num_ranks)
        step_x, step_y, step_z, step_lam, step_slack, step_top = direction(
            jnp.where(active, (target - step_x * step_z) / z - x, 0), (target - step_slack * step_lam) / lam - slack
        )
        primal = jnp.minimum(1.0, _STEP_SHARE * longest((x, step_x), (slack, step_slack)))
        dual = jnp.minimum(1.0, _STEP_SHARE * longest((z, step_z), (lam, step_lam)))

        x = normalise(jnp.where(active, jnp.maximum(x + primal * step_x, _TINY), 0))
        lam = jnp.maximum(lam + dual * step_lam, _TINY)
        best, iterate = settle(search.best, x, y + dual * step_y, lam, top + primal * step_top, fixed + on_rank(x))
        # Where rounding broke the Newton system, the best iterate stands.
        sound = jnp.isfinite(left) & jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(lam))
        stepped = _Search(iterate, best, search.iterations + 1, sound)
        return jax.tree.map(lambda a, b: jnp.where(sound, a, b), stepped, search._replace(sound=sound))

    some_move = (total > 0) & (num_variables > 0)
    most_at_home = jnp.max(level(home_load)).astype(jnp.float32)
    even_enough = some_move & (threshold > 0) & (most_at_home * num_ranks <= threshold * total)
    solvable = some_move & ~even_enough
    search = lax.while_loop(
        lambda s: (
            solvable & s.sound & (s.best.most - s.best.bound > tol * s.best.most) & (s.iterations < MAX_ITERATIONS)
        ),
        newton_step,
        start(),
    )

    best, idle = search.best, (tokens == 0)[:, None]
    home = present & (jnp.arange(present.shape[1]) == 0)[None, :]
    stays = even_enough | ~replicated[:, None]
    fraction = jnp.where(idle, 0, jnp.where(stays, home.astype(jnp.float32), best.x / w[:, None]))
    unmoved = jnp.where(even_enough, home_load, fixed_load).astype(jnp.float32)
    rank_load = jnp.where(solvable, best.rank_load * (total / num_ranks), unmoved)
    gap = jnp.maximum((best.most - best.bound) / jnp.maximum(best.most, _TINY), 0)
    gap_at_home = jnp.maximum((most_at_home - total / num_ranks) / jnp.maximum(most_at_home, 1), 0)
    status = jnp.where(gap <= tol, Status.CONVERGED, jnp.where(best.is_even, Status.EVEN_SPLIT, Status.MAX_ITERATIONS))
    skipped = even_enough | (num_variables == 0)
    status = jnp.where(solvable, status, jnp.where(skipped, Status.SKIPPED, Status.CONVERGED))
    gap = jnp.where(solvable, gap, jnp.where(even_enough, gap_at_home, 0))
    return fraction, rank_load, gap, search.iterations, status.astype(jnp.int32)


def _cholesky(matrix: jax.Array) -> jax.Array:
    """The lower factor, in float64. For TPUs XLA does not compile its own."""
    return lax.platform_dependent(matrix, tpu=_cholesky_by_column, default=lax.linalg.cholesky)


def _cholesky_by_column(matrix: jax.Array) -> jax.Array:
    rows = jnp.arange(len(matrix))

    def add(k: jax.Array, lower: jax.Array) -> jax.Array:
        # No product: under vmap, which may come when float64 is off again, its result would be float32.
        column = matrix[:, k] - jnp.sum(lower * lower[k][None, :], axis=1)
        return lower.at[:, k].set(jnp.where(rows >= k, column / jnp.sqrt(column[k]), 0))

    return lax.fori_loop(0, len(matrix), add, jnp.zeros_like(matrix))
