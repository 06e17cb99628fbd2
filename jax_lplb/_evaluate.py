"""What a placement is worth, by loads that were recorded."""

import sys
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_lplb._assign import quota_rank_load
from jax_lplb._placement import Placement, check_contents, check_count, slots_of_experts
from jax_lplb._solve import Solver, check_options, check_placement, solve_fractions

_AT_ONCE = 256  # loads of one call


class Evaluation(NamedTuple):
    """What `evaluate` returns: the imbalance of each load, largest rank load / mean rank load, float64 [...].

    Attributes:
      home: all tokens of an expert go to its home, its first slot.
      even: they are split evenly over its slots.
      optimum: they are split by `solve`, in fractions of a token.
      assigned: they are split as `balance` does, in whole tokens.
      gap: certified: `optimum` is at most a fraction `gap` of itself above the best there is.
    """

    home: np.ndarray
    even: np.ndarray
    optimum: np.ndarray
    assigned: np.ndarray
    gap: np.ndarray


def evaluate(
    placement: Placement | ArrayLike,
    loads: ArrayLike,
    *,
    num_ranks: int | None = None,
    solver: Solver = "auto",
    tol: float = 1e-4,
    progress: bool = True,
) -> Evaluation:
    """Tries a placement on recorded loads, before it is used.

    Args:
      placement: a placement; or integers [num_physical], the logical expert of each slot, such as a row of EPLB's
        phy2log. Two slots of one rank may then hold one expert: an even split uses both, `solve` the first.
      loads: integers [..., num_experts], the tokens of each logical expert; a trace is [steps, num_experts].
      num_ranks: ranks, where `placement` is an array.
      solver: as of `solve`.
      tol: as of `solve`.
      progress: shows a progress bar on long traces, if standard error is a terminal and `rich` is installed.

    Returns:
      An `Evaluation` of NumPy arrays [...]. A load of zeros has imbalance 1.

    Raises:
      TypeError: `loads` or the array do not hold integers, or they are traced.
      ValueError: shapes do not fit, a load is negative, loads sum to 2**31 or more, an expert has no slot, or the
        solver cannot solve the placement.
    """
    loads = np.asarray(loads)
    if not np.issubdtype(loads.dtype, np.integer):
        raise TypeError(f"loads must hold integers, tokens of each expert; got dtype {loads.dtype}")
    if loads.ndim == 0:
        raise ValueError("loads must have shape [..., num_experts], got shape ()")
    placement = _placement(placement, loads.shape[-1], num_ranks)
    if loads.shape[-1] != placement.num_experts:
        raise ValueError(
            f"loads must have shape [..., num_experts] = [..., {placement.num_experts}], got {loads.shape}"
        )
    if np.any(loads < 0):
        raise ValueError(f"loads must not be negative, got {loads.min()}")
    flat = loads.reshape(-1, placement.num_experts)
    totals = flat.sum(axis=1, dtype=np.int64)
    if np.any(totals >= 2**31):
        raise ValueError(f"loads must have sums below 2**31, got {totals.max()}")
    check_options(placement, solver, tol, None)

    ranks = placement.num_ranks
    mean = np.maximum(totals, 1) / ranks

    def imbalance(rank_load: np.ndarray) -> np.ndarray:
        return np.where(totals > 0, rank_load.max(axis=1) / mean, 1.0).reshape(loads.shape[:-1])

    rank = np.arange(placement.num_physical) // placement.slots_per_rank
    of_slot = np.zeros((placement.num_experts, ranks))
    np.add.at(of_slot, (placement.phy2log, rank), 1)
    homes = np.zeros_like(of_slot)
    homes[np.arange(placement.num_experts), rank[placement.log2phy[:, 0]]] = 1

    optimum = np.empty((len(flat), ranks))
    assigned = np.empty((len(flat), ranks), np.int64)
    gap = np.empty(len(flat))
    for first in _track(range(0, len(flat), _AT_ONCE), progress):
        part = flat[first : first + _AT_ONCE]
        # The last part is filled up: one shape, compiled once.
        padded = np.zeros((min(_AT_ONCE, len(flat)), placement.num_experts), np.int32)
        padded[: len(part)] = part
        here = slice(first, first + len(part))
        optimum[here], assigned[here], gap[here] = (
            np.asarray(result)[: len(part)] for result in _balance_all(padded, placement, solver, tol)
        )
    return Evaluation(
        imbalance(flat @ homes),
        imbalance(flat @ (of_slot / of_slot.sum(axis=1, keepdims=True))),
        imbalance(optimum),
        imbalance(assigned),
        gap.reshape(loads.shape[:-1]),
    )


@partial(jax.jit, static_argnames=("solver", "tol"))
def _balance_all(
    loads: jax.Array, placement: Placement, solver: Solver, tol: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    options = check_options(placement, solver, tol, None)

    def balance(load: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        fraction, rank_load, gap, _, _ = solve_fractions(load, placement, options, None)
        return rank_load, quota_rank_load(fraction, load, placement), jnp.max(gap)

    return jax.vmap(balance)(loads)


def _placement(placement: Placement | ArrayLike, num_experts: int, num_ranks: int | None) -> Placement:
    if isinstance(placement, Placement):
        if num_ranks is not None:
            raise ValueError("num_ranks must not be given beside a Placement, which knows it")
        if isinstance(placement.phy2log, jax.core.Tracer):
            raise TypeError("placement must not be traced: evaluate runs on the host")
        check_placement(placement, None)
        return jax.tree.map(np.asarray, placement)
    if num_ranks is None:
        raise ValueError("num_ranks must be given where placement is an array")
    check_count("num_ranks", num_ranks)
    phy2log = np.asarray(placement)
    if phy2log.ndim != 1 or phy2log.size == 0 or phy2log.size % num_ranks:
        raise ValueError(
            f"placement must have shape [num_physical], a multiple of num_ranks = {num_ranks}, got {phy2log.shape}"
        )
    if not np.issubdtype(phy2log.dtype, np.integer):
        raise TypeError(f"placement must hold integers, got dtype {phy2log.dtype}")
    _, max_replicas = check_contents(phy2log, num_ranks, num_experts, None, twice=True)
    phy2log = phy2log.astype(np.int32)
    placement = Placement(phy2log, slots_of_experts(phy2log, num_experts, max_replicas), num_ranks, 1, None)
    check_placement(placement, None)
    return placement


def _track(steps: range, progress: bool) -> Iterable[int]:
    if not progress or len(steps) < 4 or not sys.stderr.isatty():
        return steps
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return steps
    return track(steps, "Evaluating", console=Console(stderr=True), transient=True)
