"""What balancing would bring on recorded loads: placements made by the past, judged on the batches after it."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from jax_lplb import eplb, topology
from jax_lplb._balance import balance
from jax_lplb._evaluate import Evaluation, evaluate, even_imbalance, even_loads
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


def topologies_for(num_ranks: int, redundants_per_rank: int) -> list[tuple[str, tuple[int, ...]]]:
    """Functions of `jax_lplb.topology` and their arguments: LPLB's cube or hypercube, a torus, and last a ring."""
    found: list[tuple[str, tuple[int, ...]]] = []
    if redundants_per_rank % 2 == 0:
        found += [(name, ()) for ranks, name in ((8, "cube"), (16, "hypercube")) if ranks == num_ranks]
        columns = max((n for n in range(2, num_ranks) if n * n <= num_ranks and num_ranks % n == 0), default=1)
        if columns > 1:
            found.append(("torus", (num_ranks // columns, columns)))
    return [*found, ("ring", (num_ranks,))]


Kind = Literal[
    "none",  # experts in logical order
    "eplb_even",  # copies of EPLB, and even splits
    # The others are split as `balance` does.
    "topology",  # LPLB's way
    "topology_repeats",
    "eplb",
    "per_batch",  # which knows nothing of the past, but the batch
]
KINDS: tuple[Kind, ...] = get_args(Kind)
EVEN, SOLVED = KINDS[:2], KINDS[2:]


class Candidate(NamedTuple):
    """A placement to try.

    Attributes:
      kind: of `KINDS`.
      ranks: of the expert-parallel axis.
      redundants: redundant experts on each rank; none of them for "none".
      along: of the kinds along a topology, a function of `jax_lplb.topology` and its arguments.
      groups: of ranks that copy experts among themselves only, for "per_batch".
    """

    kind: Kind
    ranks: int
    redundants: int
    along: tuple[str, tuple[int, ...]] | None = None
    groups: int = 1

    @property
    def topology(self) -> str | None:
        """As in Python."""
        if self.along is None:
            return None
        name, sizes = self.along
        return f"{name}({', '.join(map(str, sizes))})"

    @property
    def by_past(self) -> bool:
        """Whether past loads make the placement."""
        return self.kind not in ("none", "per_batch")

    def place(self, past: np.ndarray) -> Placement:
        """A placement by past loads [..., experts]: stacked where it depends on them. ValueError: there is none."""
        constructor, arguments = self._call(past.shape[-1])
        if self.along is not None and "topology" in arguments:
            name, sizes = self.along
            arguments["topology"] = getattr(topology, name)(*sizes)
        if "load" in arguments:
            arguments["load"] = past
        placement: Placement = getattr(Placement, constructor)(**arguments)
        return placement

    def source(self, experts: int) -> str:
        """What `place` calls, in Python, where `past` are the past loads."""
        constructor, arguments = self._call(experts)
        written = [f"{name}={value}" for name, value in arguments.items()]
        return f"lplb.Placement.{constructor}({', '.join(written)})"

    def _call(self, experts: int) -> tuple[str, dict[str, Any]]:
        """A constructor of `Placement`, and its arguments as they are written in Python."""
        numbers = {"num_ranks": self.ranks, "redundants_per_rank": self.redundants}
        if self.kind == "eplb":
            return "from_eplb", {"load": "past", **numbers}
        numbers = {"num_experts": experts, **numbers}
        if self.kind == "none":
            return "per_batch", numbers | {"redundants_per_rank": 0}
        if self.kind == "per_batch":
            return "per_batch", numbers | ({"num_groups": self.groups} if self.groups > 1 else {})
        repeats = {"repeats": True} if self.kind == "topology_repeats" else {}
        return "from_topology", {"topology": f"lplb.topology.{self.topology}", **numbers, "load": "past", **repeats}


def candidates(ranks: int, redundants: Sequence[int], nodes: int = 1) -> list[Candidate]:
    """What may be advised: all that `balance` can use, each once."""
    found = [Candidate("none", ranks, 0)]
    for copies in redundants:
        for along in topologies_for(ranks, copies):
            found.append(Candidate("topology", ranks, copies, along))
            if along[0] != "ring":  # where there is one column, nothing can repeat
                found.append(Candidate("topology_repeats", ranks, copies, along))
        found += [Candidate("eplb", ranks, copies), Candidate("per_batch", ranks, copies)]
        if nodes > 1:
            found.append(Candidate("per_batch", ranks, copies, groups=nodes))
    return found


def _even_slots(candidate: Candidate, past: np.ndarray) -> np.ndarray:
    """The slots [placements, slots] of past loads [placements, experts], or [1, slots] for all: split evenly."""
    experts, ranks = past.shape[-1], candidate.ranks
    if candidate.kind == "none":
        return logical_order(experts, ranks)[None]
    slots = -(-experts // ranks) + candidate.redundants
    return eplb.rebalance_experts(past, ranks * slots, 1, 1, ranks)[0]


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


def judge(candidate: Candidate, loads: Windows) -> Judged:
    """Raises ValueError, with the reason, where there is no such placement."""
    past, now, before = loads
    experts, ranks = past.shape[-1], candidate.ranks
    if candidate.kind in EVEN:
        phy2log = _even_slots(candidate, past)
        imbalance = np.stack([even_imbalance(batch, phy2log, ranks) for batch in now])
        copies = float(np.sum(phy2log[0] >= 0) - experts)
        return Judged(imbalance, copies, _newly_held(phy2log, before, experts, ranks) / len(now), None)
    placement = candidate.place(past)
    evaluation = evaluate(placement, now, progress=False)
    copies = float(evaluation.copies.mean())
    moved = copies
    if placement.planning is None:
        moved = _newly_held(placement.phy2log, before, experts, ranks) / len(now)
    return Judged(evaluation.assigned, copies, moved, evaluation)


def rank_loads(candidate: Candidate, loads: Windows) -> np.ndarray:
    """Tokens of each rank [batches, ranks] in the windows of one layer, batch by batch, where there is a placement."""
    past, now, _ = loads
    if candidate.kind in EVEN:
        phy2log = _even_slots(candidate, past)
        return np.stack([even_loads(batch, phy2log, candidate.ranks) for batch in now], axis=1).reshape(
            -1, candidate.ranks
        )
    placement = candidate.place(past)
    stacked = placement.phy2log.ndim > 1
    run = jax.jit(lambda ids, placement: balance(ids, placement).rank_load)
    most = int(now.sum(axis=-1).max())
    found = []
    for number, batches in enumerate(now.swapaxes(0, 1)):
        one = jax.tree.map(lambda leaf, number=number: leaf[number], placement) if stacked else placement
        for batch in batches:
            ids = np.full((most, 1), -1, np.int32)  # what is left over is padding
            ids[: batch.sum(), 0] = np.repeat(np.arange(len(batch)), batch)
            found.append(np.asarray(run(ids, one)))
    return np.stack(found)


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
