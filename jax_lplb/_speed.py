"""Speeds of ranks: what becomes as small as it can is then the largest load / speed of a group.

Speeds are scaled to a mean of 1 within each group, so that load / speed is in tokens: those of an average rank. A rank
of speed 0 takes part in the solve without load. An expert that is elsewhere, too, loses its replica there, before the
solve and the assignment; one that is not stays, since nothing can be done about it, and counts for nothing.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb._load import exponent_of, power_of_two, present

if TYPE_CHECKING:
    from jax_lplb._placement import Placement

# Of the fastest rank's speed in the group: what is less counts as 0. The solvers' float32 is good for that much.
SLOWEST = 2.0**-8
_IDLE_INVERSE = 2.0**12  # of speed 0, for the plan: far above that of any other speed


def check_rank_speed(rank_speed: Any, placement: "Placement") -> None:
    if rank_speed is None:
        return
    if not isinstance(rank_speed, (jax.Array, np.ndarray)):
        raise TypeError(
            f"rank_speed must be None or a float32 array, got {type(rank_speed).__name__}; pass np.array(rank_speed, "
            "np.float32)"
        )
    if rank_speed.dtype != jnp.float32:
        raise TypeError(f"rank_speed must have dtype float32, got {rank_speed.dtype}; use rank_speed.astype('float32')")
    if rank_speed.shape != (placement.num_ranks,):
        raise ValueError(
            f"rank_speed must have shape [num_ranks] = [{placement.num_ranks}], got shape {rank_speed.shape}"
        )
    if not isinstance(rank_speed, np.ndarray):
        return
    wrong = ~(np.isfinite(rank_speed) & (rank_speed >= 0))
    if wrong.any():
        raise ValueError(
            f"rank_speed must be finite and not negative, got {rank_speed[wrong][0]} for rank {np.argmax(wrong)}; "
            "pass 0 for a rank that is to have no load"
        )
    stopped = np.all(rank_speed.reshape(placement.num_groups, -1) == 0, axis=1)
    if stopped.any():
        group, size = np.argmax(stopped), placement.group_size
        raise ValueError(
            f"rank_speed must not be 0 for all ranks of a group, got 0 for ranks {group * size} to "
            f"{(group + 1) * size - 1}; pass a positive speed for one of them, or None"
        )


def scale(rank_speed: jax.Array | np.ndarray | None, placement: "Placement") -> jax.Array | None:
    """float32 [num_ranks], of mean 1 within each group. What is negative, infinite or NaN is 0, or 1 if all are."""
    if rank_speed is None:
        return None
    speed = lax.stop_gradient(jnp.asarray(rank_speed)).reshape(placement.num_groups, -1)
    speed = jnp.where((speed > 0) & (speed < jnp.inf), speed, 0)
    # First by a power of two, exactly: XLA divides by a broadcast as it multiplies by the reciprocal, which is 0 where
    # speeds are as large as float32 holds.
    exponent = jnp.clip(exponent_of(jnp.max(speed, axis=1, keepdims=True)), -126, 126)
    speed = speed * power_of_two(-exponent)
    fastest = jnp.max(speed, axis=1, keepdims=True)
    speed = jnp.where(fastest > 0, speed / jnp.where(fastest > 0, fastest, 1), 1)
    speed = jnp.where(speed < SLOWEST, 0, speed)
    return (speed * (placement.group_size / jnp.sum(speed, axis=1, keepdims=True))).reshape(-1)


def with_inverse(speed: jax.Array) -> jax.Array:
    """float32 [2, num_ranks], for the plan and, without speeds of 0, for the solvers."""
    return jnp.stack([speed, jnp.where(speed > 0, 1 / jnp.where(speed > 0, speed, 1), _IDLE_INVERSE)])


def in_time(rank_load: jax.Array, speed: jax.Array | None) -> jax.Array:
    """Load / speed of each rank, 0 where the speed is 0."""
    if speed is None:
        return rank_load
    return jnp.where(speed > 0, rank_load / jnp.where(speed > 0, speed, 1), 0)


class Running(NamedTuple):
    """What is left to solve where ranks of speed 0 have only what is nowhere else.

    Attributes:
      load: int32 [num_experts], 0 for an expert that is on ranks of speed 0 only.
      log2phy: int32 [num_experts, max_replicas], the replicas on running ranks first and no others; if there are none,
        the first.
      column: int32 [num_experts, max_replicas], where these were in the placement's.
      speed: of `with_inverse`, all positive.
      kept_load: float32 [num_ranks], the load of experts that are on ranks of speed 0 only.
    """

    load: jax.Array
    log2phy: jax.Array
    column: jax.Array
    speed: jax.Array
    kept_load: jax.Array

    def in_columns(self, fraction: jax.Array) -> jax.Array:
        """Fractions by `log2phy` as those by the placement's. Experts without any are whole in the first."""
        first = (self.log2phy >= 0) & (jnp.arange(self.log2phy.shape[1]) == 0)[None, :]
        fraction = jnp.where(jnp.any(fraction > 0, axis=1, keepdims=True), fraction, first.astype(jnp.float32))
        return jnp.take_along_axis(fraction, jnp.argsort(self.column, axis=1), axis=1)


def running(load: jax.Array, log2phy: jax.Array, speed: jax.Array, placement: "Placement") -> Running:
    known = present(log2phy, placement.num_physical)
    rank = jnp.where(known, log2phy // placement.slots_per_rank, placement.num_ranks)
    runs = jnp.append(speed > 0, False)[rank]
    kept = ~jnp.any(runs, axis=1)
    stays = runs.at[:, 0].set(runs[:, 0] | kept)
    column = jnp.argsort(~stays, axis=1, stable=True).astype(jnp.int32)
    log2phy = jnp.take_along_axis(jnp.where(stays, log2phy, -1), column, axis=1)
    kept_load = jnp.zeros_like(load, shape=placement.num_ranks)
    kept_load = kept_load.at[rank[:, 0]].add(jnp.where(kept, jnp.maximum(load, 0), 0), mode="drop")
    return Running(
        jnp.where(kept, 0, load),
        log2phy,
        column,
        with_inverse(jnp.where(speed > 0, speed, 1)),
        kept_load.astype(jnp.float32),
    )
