"""The interior-point method, for any placement, in pure JAX.

A feasible primal-dual method with Mehrotra's predictor-corrector (S. Mehrotra, "On the implementation of a primal-dual
interior point method", 1992). The custom call (ffi/interior_point.h) and the text below are two texts of one algorithm;
the comments on why each step is as it is are in the former.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_lplb._status import Status

MAX_ITERATIONS = 50
_FLOOR = 1e-8  # of a scaled expert load: keeps idle experts strictly inside
_TINY = 1e-12


def solve_groups(
    load: jax.Array, log2phy: jax.Array, slots: int, num_ranks: int, num_groups: int, tol: float, threshold: float
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
    present = jnp.cumprod((table >= first_slot) & (table < first_slot + size * slots), axis=2, dtype=jnp.int32) > 0
    loads = jnp.maximum(load[order], 0).reshape(num_groups, -1)
    fraction, rank_load, gap, iterations, status = jax.vmap(
        lambda w, rank, present: _solve_group(w, jnp.where(present, rank, 0), present, size, tol, threshold)
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
    tokens: jax.Array, rank: jax.Array, present: jax.Array, num_ranks: int, tol: float, threshold: float
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
    at_home = jnp.sum(jnp.where(on[:, 0, :] > 0, tokens[:, None], 0), axis=0, dtype=jnp.int32)
    most_at_home = jnp.max(at_home).astype(jnp.float32) * num_ranks
    below = (total > 0) & jnp.any(active) & (threshold > 0) & (most_at_home <= threshold * total)
    solvable = (total > 0) & jnp.any(active) & ~below
    search = lax.while_loop(
        lambda s: solvable & s.sound & (gap(s) > tol) & (s.iterations < MAX_ITERATIONS), newton_step, search
    )
    reached = gap(search)
    status = jnp.where(
        reached <= tol, Status.CONVERGED, jnp.where(search.improved, Status.MAX_ITERATIONS, Status.EVEN_SPLIT)
    )
    status = jnp.where(jnp.any(active), jnp.where(total > 0, status, Status.CONVERGED), Status.SKIPPED)
    status = jnp.where(below, Status.SKIPPED, status)
    reached = jnp.where(solvable, reached, 0)
    reached = jnp.where(below, jnp.maximum(1 - total / jnp.maximum(most_at_home, 1), 0), reached)
    home = ((below & present) | ~replicated[:, None]) & (jnp.arange(even.shape[1]) == 0)[None, :]
    fraction = jnp.where(active & ~below, search.best_x / w[:, None], home.astype(jnp.float32))
    rank_load = jnp.where(total > 0, search.best_rank_load / scale, 0)
    return (
        fraction,
        jnp.where(below, at_home.astype(jnp.float32), rank_load),
        reached,
        search.iterations,
        status.astype(jnp.int32),
    )
