"""What balancing would bring on recorded loads: placements made by the past, judged on the batches after it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_lplb import eplb, topology
from jax_lplb._evaluate import Evaluation, evaluate, even_imbalance
from jax_lplb._placement import Placement
from jax_lplb._rows import logical_order


class Windows(NamedTuple):
    """Loads as a run meets them: a placement by the last batches is used for the next ones, then replaced.

    Attributes:
      past: float64 [placements, experts], the mean of the batches that a placement is made by, for each layer and time.
      now: int64 [batches, placements, experts], the batches that it is used for.
      before: int64 [placements], the one that each replaces; -1 for the first of a layer.
    """

    past: np.ndarray
    now: np.ndarray
    before: np.ndarray


def windows(sequences: Sequence[np.ndarray], window: int, every: int) -> Windows:
    """Cuts sequences of batches, [steps, layers, experts] each: `window` batches of past, replaced after `every`.

    Batches at the end of a sequence that are fewer than `every` are left out. One sequence has window + every at least.
    """
    past, now, before, number = [], [], [], 0
    for loads in sequences:
        starts = range(window, len(loads) - every + 1, every)
        if not starts:
            continue
        past.append(np.concatenate([loads[start - window : start].mean(axis=0) for start in starts]))
        now.append(np.concatenate([loads[start : start + every] for start in starts], axis=1))
        layers = loads.shape[1]
        replaced = np.arange(number - layers, number + len(past[-1]) - layers)
        before.append(np.where(replaced < number, -1, replaced))
        number += len(past[-1])
    return Windows(np.concatenate(past), np.concatenate(now, axis=1), np.concatenate(before))


def topology_for(num_ranks: int, redundants_per_rank: int) -> tuple[str, tuple[int, ...]]:
    """A function of `jax_lplb.topology` and its arguments: LPLB's cube or hypercube, a torus, or else a ring."""
    if redundants_per_rank % 2 == 0:
        if num_ranks in (8, 16):
            return {8: "cube", 16: "hypercube"}[num_ranks], ()
        columns = max((n for n in range(2, num_ranks) if n * n <= num_ranks and num_ranks % n == 0), default=1)
        if columns > 1:
            return "torus", (num_ranks // columns, columns)
    return "ring", (num_ranks,)


def _along_topology(past: np.ndarray, ranks: int, redundants: int, **options: Any) -> Placement:
    name, sizes = topology_for(ranks, redundants)
    return Placement.from_topology(
        getattr(topology, name)(*sizes),
        num_experts=past.shape[-1],
        num_ranks=ranks,
        redundants_per_rank=redundants,
        load=past,
        **options,
    )


def _without_copies(past: np.ndarray, ranks: int, _: int) -> np.ndarray:
    return logical_order(past.shape[-1], ranks)[None]


def _eplb(past: np.ndarray, ranks: int, redundants: int) -> np.ndarray:
    return eplb.rebalance_experts(past, ranks * (-(-past.shape[-1] // ranks) + redundants), 1, 1, ranks)[0]


# Of past loads [placements, experts], ranks and redundant experts on each: the slots of each placement, or of one for
# all, whose loads are split evenly. ValueError: there is none.
EVEN: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {"none": _without_copies, "eplb_even": _eplb}

# Likewise: a stacked placement, or one for all, whose loads are split as `balance` does.
SOLVED: dict[str, Callable[[np.ndarray, int, int], Placement]] = {
    "topology": _along_topology,  # LPLB's way
    "topology_repeats": lambda past, ranks, redundants: _along_topology(past, ranks, redundants, repeats=True),
    "eplb": lambda past, ranks, redundants: Placement.from_eplb(past, num_ranks=ranks, redundants_per_rank=redundants),
    "per_batch": lambda past, ranks, redundants: Placement.per_batch(
        num_experts=past.shape[-1], num_ranks=ranks, redundants_per_rank=redundants
    ),  # which knows nothing of the past, but the batch
}


class Judged(NamedTuple):
    """What one kind of placement does to the batches of `Windows`.

    Attributes:
      imbalance: float64 [batches, placements], largest rank load / mean rank load.
      copies: of a layer, in the mean.
      moved: experts whose weights a rank has to receive before a batch, of a layer, in the mean. Placements by the past
        stay for all batches of a window: these are the experts that a rank holds and did not hold before, the first
        time in logical order. Copies that each batch chooses are all brought for each batch.
      evaluation: all that `evaluate` says; None with an even split.
    """

    imbalance: np.ndarray
    copies: float
    moved: float
    evaluation: Evaluation | None


def judge(kind: str, loads: Windows, ranks: int, redundants: int) -> Judged:
    """Raises ValueError, with the reason, where there is no placement of that kind."""
    past, now, before = loads
    experts = past.shape[-1]
    if kind in EVEN:
        phy2log = EVEN[kind](past, ranks, redundants)
        imbalance = np.stack([even_imbalance(batch, phy2log, ranks) for batch in now])
        copies = float(np.sum(phy2log[0] >= 0) - experts)
        return Judged(imbalance, copies, _newly_held(phy2log, before, experts, ranks) / len(now), None)
    placement = SOLVED[kind](past, ranks, redundants)
    evaluation = evaluate(placement, now, progress=False)
    copies = float(evaluation.copies.mean())
    moved = copies
    if placement.planning is None:
        moved = _newly_held(placement.phy2log, before, experts, ranks) / len(now)
    return Judged(evaluation.assigned, copies, moved, evaluation)


def _newly_held(phy2log: np.ndarray, before: np.ndarray, experts: int, ranks: int) -> float:
    """How many experts of placements [placements, slots] are on ranks that did not hold them before, in the mean."""

    def held(phy2log: np.ndarray) -> np.ndarray:  # [placements, ranks, experts]
        by_rank = phy2log.reshape(len(phy2log), ranks, -1)
        holds = np.zeros((len(phy2log), ranks, experts + 1), bool)
        np.put_along_axis(holds, by_rank, True, axis=2)  # slots that hold nothing, -1, go to the last
        return holds[..., :experts]

    # The last row, which -1 names, is what ranks hold at the beginning.
    at_first = held(logical_order(experts, ranks)[None])
    holds = held(np.broadcast_to(phy2log, (len(before), phy2log.shape[1])))
    previous = np.concatenate([holds, at_first])[before]
    return float(np.sum(holds & ~previous, dtype=np.int64) / len(before))
