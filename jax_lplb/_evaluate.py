"""What a placement is worth, by loads that were recorded."""

import dataclasses
import sys
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_lplb import _ffi, _plan, _speed
from jax_lplb._assign import quota_rank_load
from jax_lplb._checks import check_count
from jax_lplb._load import in_units
from jax_lplb._placement import Placement, beyond_custom_calls, check_contents, slots_of_experts
from jax_lplb._rows import logical_order
from jax_lplb._solve import Solver, certified_bound, check_options, check_placement, solve_fractions

_AT_ONCE = 256  # loads of one call, at most
_ELEMENTS = 2**28  # of the largest array, in pure JAX


class Evaluation(NamedTuple):
    """What `evaluate` returns: the imbalance of each load, largest rank load / mean rank load, float64 [...].

    With `rank_speed` rank loads are taken over speeds of mean 1 in each group, those of ranks of speed 0 as nothing.

    Attributes:
      contiguous: no placement: experts in logical order, as many on each rank, or one fewer on some where ranks do not
        divide them; no copies.
      home: no copies: all tokens of an expert go to the rank that keeps its weights, `placement.home_rank`.
      even: they are split evenly over the expert's slots.
      optimum: no split over the slots, even of fractions of a token, is better: a certified lower bound.
      assigned: they are split as `balance` does, in whole tokens.
      gap: certified, before rounding to whole tokens: the split that `solve` found is at most a fraction `gap` of
        itself above the best there is. That of the worst group, where there are several.
      copies: int64, slots that hold an expert beside another that does.
    """

    contiguous: np.ndarray
    home: np.ndarray
    even: np.ndarray
    optimum: np.ndarray
    assigned: np.ndarray
    gap: np.ndarray
    copies: np.ndarray


def evaluate(
    placement: Placement | ArrayLike,
    loads: ArrayLike,
    *,
    num_ranks: int | None = None,
    rank_speed: np.ndarray | jax.Array | None = None,
    solver: Solver = "auto",
    tol: float = 1e-4,
    implementation: _ffi.Implementation = None,
    progress: bool = True,
) -> Evaluation:
    """Tries a placement, or those of stacked layers, on recorded loads, before it is used.

    Args:
      placement: a placement, with copies chosen for each load where it is one of `Placement.per_batch`; or integers
        [num_physical], the logical expert of each slot, such as a row of EPLB's phy2log. Two slots of one rank may then
        hold one expert: an even split uses both, `solve` the first. Either may have leading axes, one entry for each
        layer.
      loads: whole numbers [..., num_experts], the tokens of each logical expert; a trace is [steps, num_experts], or
        [steps, layers, num_experts], all judged by the one placement. For stacked layers [..., layers, num_experts]:
        each is judged by the placement of its layer.
      num_ranks: ranks, where `placement` is an array.
      rank_speed: float32 [num_ranks], how fast ranks are, as of `solve`; of all loads and layers.
      solver: as of `solve`.
      tol: as of `solve`.
      implementation: as of `solve`; by default pure JAX, too, where a placement is beyond the custom calls' limits.
      progress: shows a progress bar on long traces, if standard error is a terminal and `rich` is installed.

    Returns:
      An `Evaluation` of NumPy arrays [...], of the shape of `loads` without its last axis. A load of zeros has
      imbalance 1.

    Raises:
      TypeError: `loads` does not hold numbers or the array no integers, they are traced, or `rank_speed` has another
        dtype.
      ValueError: shapes do not fit, a load is negative or not a whole number, loads sum to 2**31 or more, an expert has
        no slot, a speed is wrong, or the solver cannot solve the placement.
    """
    _check_concrete("loads", loads)
    loads = _whole(np.asarray(loads))
    if loads.ndim == 0:
        raise ValueError("loads must have shape [..., num_experts], got shape ()")
    placement = _placement(placement, loads.shape[-1], num_ranks)
    layers, experts, ranks = placement.phy2log.shape[:-1], placement.num_experts, placement.num_ranks
    if loads.shape[-1 - len(layers) :] != (*layers, experts):
        raise ValueError(
            f"loads must have shape [..., {'layers, ' * bool(layers)}num_experts] = "
            f"[{', '.join(map(str, ['...', *layers, experts]))}], got {loads.shape}"
        )
    if np.any(loads < 0):
        raise ValueError(f"loads must not be negative, got {loads.min()}")
    flat = loads.reshape(-1, experts)
    totals = flat.sum(axis=1, dtype=np.int64)
    if np.any(totals >= 2**31):
        raise ValueError(f"loads must have sums below 2**31, got {totals.max()}")
    stacked = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(layers) :]), placement)
    num_layers = len(stacked.phy2log)
    alone = jax.tree.map(lambda leaf: leaf[0], stacked)
    if implementation is None and beyond_custom_calls(alone):
        implementation = "xla"
    check_placement(alone, implementation)
    check_options(alone, solver, tol, None)
    _check_concrete("rank_speed", rank_speed)
    _speed.check_rank_speed(np.asarray(rank_speed) if isinstance(rank_speed, jax.Array) else rank_speed, alone)
    speed = _speed.scale(rank_speed, alone)
    inverse = np.asarray(_speed.in_time(jnp.ones(ranks, jnp.float32), speed))

    in_order, home = logical_order(experts, ranks)[None], stacked.home_order

    # Of each load the interior-point method in pure JAX holds which replica is on which rank.
    at_once = min(_AT_ONCE, max(_ELEMENTS // (experts * alone.max_replicas * alone.group_size), 1))
    contiguous, at_home, even, most, assigned, gap, copies = np.empty((7, len(flat)))
    for first in _track(range(0, len(flat), at_once), progress):
        part = flat[first : first + at_once]
        # The last part is filled up: one shape, compiled once.
        padded = np.zeros((min(at_once, len(flat)), experts), np.int32)
        padded[: len(part)] = part
        layer = (first + np.arange(len(padded))) % num_layers
        of_layer = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
        here = slice(first, first + len(part))
        most[here], rank_loads, gap[here], phy2log = (
            np.asarray(result)[: len(part)]
            for result in _balance_all(padded, of_layer, speed, solver, tol, implementation)
        )
        copies[here] = np.sum(phy2log >= 0, axis=1) - experts
        contiguous[here] = even_imbalance(part, in_order, ranks, inverse)
        at_home[here] = even_imbalance(part, home[layer[: len(part)]], ranks, inverse)
        even[here] = even_imbalance(part, phy2log, ranks, inverse)
        most[here] = _imbalance(most[here], part, ranks)
        assigned[here] = _imbalance((rank_loads * inverse).max(axis=1), part, ranks)
    optimum = np.clip(most, 1, assigned)  # no largest is below the mean, unless ranks of speed 0 keep some load
    results = (contiguous, at_home, even, optimum, assigned, gap, copies.astype(np.int64))
    return Evaluation(*(result.reshape(loads.shape[:-1]) for result in results))


def _imbalance(largest: np.ndarray, loads: np.ndarray, num_ranks: int) -> np.ndarray:
    """Largest rank load / mean rank load of each load [loads, experts], 1 for a load of zeros."""
    totals = loads.sum(axis=1, dtype=np.int64)
    return np.where(totals > 0, largest / (np.maximum(totals, 1) / num_ranks), 1.0)


def even_imbalance(
    loads: np.ndarray, phy2log: np.ndarray, num_ranks: int, inverse: np.ndarray | float = 1.0
) -> np.ndarray:
    """The imbalance of each load [loads, experts], split evenly over slots [loads, slots], or [1, slots] for all.

    `inverse`: 1 / speed of each rank.
    """
    return _imbalance((even_loads(loads, phy2log, num_ranks) * inverse).max(axis=1), loads, num_ranks)


def even_loads(loads: np.ndarray, phy2log: np.ndarray, num_ranks: int) -> np.ndarray:
    """The rank loads [loads, ranks] of the same."""
    phy2log = np.broadcast_to(phy2log, (len(loads), phy2log.shape[1]))
    holds = phy2log >= 0
    rows = np.arange(len(loads))[:, None]
    expert = np.where(holds, phy2log, 0)
    slots = np.zeros(loads.shape)
    np.add.at(slots, (np.broadcast_to(rows, expert.shape), expert), holds)
    of_slots = np.where(holds, (loads / np.maximum(slots, 1))[rows, expert], 0)
    return of_slots.reshape(len(loads), num_ranks, -1).sum(axis=2)


@partial(jax.jit, static_argnames=("solver", "tol", "implementation"))
def _balance_all(
    loads: jax.Array,
    placements: Placement,
    speed: jax.Array | None,
    solver: Solver,
    tol: float,
    implementation: _ffi.Implementation,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of each load, by its own placement: a bound on the largest rank load, those in whole tokens, the gap; phy2log."""

    def balance(load: jax.Array, placement: Placement) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        options = check_options(placement, solver, tol, None)
        if placement.planning is not None:
            least, limits = in_units(placement.planning.min_tokens, None), (options.tol, options.threshold)
            planned = _plan.plan(load, least, placement, *limits, implementation, solve=speed is None, speed=speed)
            fraction, rank_load, gap = planned.fraction, planned.rank_load, planned.gap
            placement = dataclasses.replace(placement, phy2log=planned.phy2log, log2phy=planned.log2phy)
        if placement.planning is None or speed is not None:  # with speeds the plan is of the contents only
            fraction, rank_load, gap, _, _ = solve_fractions(load, placement, options, implementation, speed)
        assigned = quota_rank_load(fraction, load, placement)
        bound = jnp.max(certified_bound(rank_load, gap, placement, speed))
        return bound, assigned, jnp.max(gap), placement.phy2log

    return jax.vmap(balance)(loads, placements)


def _whole(loads: np.ndarray) -> np.ndarray:
    """As integers."""
    if not jnp.issubdtype(loads.dtype, jnp.floating):
        if not np.issubdtype(loads.dtype, np.integer):
            raise TypeError(f"loads must hold numbers, tokens of each expert; got dtype {loads.dtype}")
        return loads
    loads = loads.astype(np.float64)
    wrong = ~(np.isfinite(loads) & (loads == np.rint(loads)))
    if wrong.any():
        raise ValueError(
            f"loads must be whole numbers of tokens, got {loads[wrong][0]}; round them, such as by np.rint(loads)"
        )
    return loads.clip(-(2**31), 2**31).astype(np.int64)


def _placement(placement: Placement | ArrayLike, num_experts: int, num_ranks: int | None) -> Placement:
    """On the host; checked, but for what a solver may need."""
    _check_concrete("placement", placement)
    if isinstance(placement, Placement):
        if num_ranks is not None:
            raise ValueError("num_ranks must not be given beside a Placement, which knows it")
        return jax.tree.map(np.asarray, placement)
    if num_ranks is None:
        raise ValueError("num_ranks must be given where placement is an array")
    check_count("num_ranks", num_ranks)
    phy2log = np.asarray(placement)
    if not np.issubdtype(phy2log.dtype, np.integer):
        raise TypeError(f"placement must hold integers, got dtype {phy2log.dtype}")
    if phy2log.ndim == 0 or phy2log.size == 0 or phy2log.shape[-1] % num_ranks:
        raise ValueError(
            f"placement must have shape [..., num_physical], a multiple of num_ranks = {num_ranks}, got {phy2log.shape}"
        )
    layers = phy2log.reshape(-1, phy2log.shape[-1])
    replicas = max(check_contents(row, num_ranks, num_experts, None, twice=True)[1] for row in layers)
    layers = layers.astype(np.int32)
    log2phy = np.stack([slots_of_experts(row, num_experts, replicas) for row in layers])
    return Placement(
        layers.reshape(phy2log.shape),
        log2phy.reshape(*phy2log.shape[:-1], num_experts, replicas),
        num_ranks,
        num_groups=1,
        topology=None,
    )


def _check_concrete(name: str, value: object) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{name} must not be traced: evaluate runs on the host; call it outside of jit and vmap")


def _track(steps: range, progress: bool) -> Iterable[int]:
    if not progress or len(steps) < 4 or not sys.stderr.isatty():
        return steps
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return steps
    return track(steps, "Evaluating", console=Console(stderr=True), transient=True)
