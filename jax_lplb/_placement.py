"""Placement: which physical expert (slot) holds which logical expert."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jax_lplb.topology import Topology


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["phy2log", "log2phy"],
    meta_fields=["num_ranks", "num_groups", "topology"],
)
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where each logical expert lives, and where its copies are.

    Rank g owns the slots g * slots_per_rank to (g + 1) * slots_per_rank - 1. Build one with `from_topology` or
    `from_phy2log`, which check it. A pytree of two int32 leaves: their contents may be traced, and so change within
    a jitted step without recompiling; shapes, ranks, groups and topology are static. Leaves may have leading axes
    (one entry for each layer) to be mapped or scanned over.

    Attributes:
      phy2log: int32 [num_physical], the logical expert that each slot holds.
      log2phy: int32 [num_experts, max_replicas], the slots of each logical expert, its home first, padded with -1.
      num_ranks: ranks of the expert-parallel axis.
      num_groups: groups of num_ranks / num_groups neighbouring ranks that copy experts among themselves only.
      topology: the topology of each group, or None.
    """

    phy2log: Any
    log2phy: Any
    num_ranks: int
    num_groups: int
    topology: Topology | None

    @property
    def num_experts(self) -> int:
        """Number of logical experts."""
        return self.log2phy.shape[-2]

    @property
    def num_physical(self) -> int:
        """Number of physical experts: slots over all ranks."""
        return self.phy2log.shape[-1]

    @property
    def max_replicas(self) -> int:
        """Most replicas that a logical expert may have."""
        return self.log2phy.shape[-1]

    @property
    def slots_per_rank(self) -> int:
        """Number of physical experts on each rank."""
        return self.num_physical // self.num_ranks

    @property
    def group_size(self) -> int:
        """Number of ranks of a group."""
        return self.num_ranks // self.num_groups

    @classmethod
    def from_topology(
        cls, topology: Topology, *, num_experts: int, num_ranks: int, redundants_per_rank: int
    ) -> "Placement":
        """Home experts in order, and copies along a topology.

        With n = num_experts / num_ranks home experts a rank and D columns in the topology, slot n + c * D + d of rank
        i holds a copy of home expert c * D + d of rank r2o[i, d]. Ranks beyond one group repeat the topology, group
        after group.

        Args:
          topology: for groups of `topology.group_size` ranks.
          num_experts: logical experts, a multiple of `num_ranks`.
          num_ranks: ranks of the expert-parallel axis, a multiple of the topology's group size.
          redundants_per_rank: redundant experts on each rank, a multiple of the topology's columns and at most the
            rank's home experts. 0 for no copies at all.

        Raises:
          TypeError: `topology` is not a Topology, or a number is not an integer.
          ValueError: the numbers do not fit together, as said above.
        """
        if not isinstance(topology, Topology):
            raise TypeError(f"topology must be a jax_lplb.topology.Topology, got {type(topology).__name__}")
        _check_count("num_experts", num_experts)
        _check_count("num_ranks", num_ranks)
        _check_count("redundants_per_rank", redundants_per_rank, least=0)
        size, columns = topology.group_size, topology.num_columns
        if num_ranks % size:
            raise ValueError(f"num_ranks must be a multiple of the topology's {size} ranks, got {num_ranks}")
        if num_experts % num_ranks:
            raise ValueError(f"num_experts must be divisible by num_ranks = {num_ranks}, got {num_experts}")
        home = num_experts // num_ranks
        if redundants_per_rank % columns:
            raise ValueError(
                f"redundants_per_rank must be a multiple of the topology's {columns} columns, got {redundants_per_rank}"
            )
        if redundants_per_rank > home:
            raise ValueError(
                f"redundants_per_rank must be at most the {home} home experts of a rank, got {redundants_per_rank}"
            )
        ranks = np.arange(num_ranks)
        copy = np.arange(redundants_per_rank)  # c * columns + d
        owner = ranks[:, None] // size * size + topology.r2o[ranks % size][:, copy % columns]
        phy2log = np.concatenate([np.arange(num_experts).reshape(num_ranks, home), owner * home + copy], axis=1)
        slots = home + redundants_per_rank
        log2phy = np.full((num_experts, 2 if redundants_per_rank else 1), -1, np.int32)
        log2phy[phy2log[:, :home], 0] = ranks[:, None] * slots + np.arange(home)
        if redundants_per_rank:
            log2phy[phy2log[:, home:], 1] = ranks[:, None] * slots + home + copy
        return cls(phy2log.astype(np.int32).ravel(), log2phy, num_ranks, num_ranks // size, topology)

    @classmethod
    def from_phy2log(
        cls,
        phy2log: ArrayLike,
        num_ranks: int,
        *,
        num_experts: int | None = None,
        max_replicas: int | None = None,
    ) -> "Placement":
        """Any placement, with any number of replicas, in one group of all ranks.

        Args:
          phy2log: integers [num_physical], the logical expert of each slot. An expert's home is its first slot. May be
            traced; then its contents go unchecked, and both numbers below must be given.
          num_ranks: ranks of the expert-parallel axis; divides num_physical.
          num_experts: logical experts; by default the largest entry + 1.
          max_replicas: room for that many replicas of an expert, so that placements of equal shapes can replace each
            other without recompiling; by default the most replicas that an expert has.

        Raises:
          TypeError: `phy2log` does not hold integers.
          ValueError: sizes do not divide, an entry is out of range, an expert has no slot, has two on one rank, or
            has more than `max_replicas`.
        """
        _check_count("num_ranks", num_ranks)
        traced = isinstance(phy2log, jax.core.Tracer)
        if not traced:
            phy2log = np.asarray(phy2log)
        assert isinstance(phy2log, (np.ndarray, jax.Array))
        if phy2log.ndim != 1:
            raise ValueError(f"phy2log must have shape [num_physical], got shape {phy2log.shape}")
        if not jnp.issubdtype(phy2log.dtype, jnp.integer):
            raise TypeError(f"phy2log must hold integers, got dtype {phy2log.dtype}")
        slots = phy2log.shape[0]
        if slots == 0 or slots % num_ranks:
            raise ValueError(f"phy2log must have a multiple of num_ranks = {num_ranks} slots, got {slots}")
        if isinstance(phy2log, np.ndarray):
            num_experts, max_replicas = _check_contents(phy2log, num_ranks, num_experts, max_replicas)
        elif num_experts is None or max_replicas is None:
            raise ValueError("num_experts and max_replicas must be given where phy2log is traced")
        _check_count("num_experts", num_experts)
        _check_count("max_replicas", max_replicas)
        phy2log = phy2log.astype(np.int32)
        return cls(
            phy2log,
            _log2phy(phy2log, num_experts, max_replicas),
            num_ranks,
            num_groups=1,
            topology=None,
        )


def _log2phy(phy2log: Any, num_experts: int, max_replicas: int) -> Any:
    """Slots of each expert in ascending order, int32 [num_experts, max_replicas], padded with -1."""
    xp: Any = np if isinstance(phy2log, np.ndarray) else jnp
    # Traced contents may hold anything: what is no expert goes last.
    phy2log = xp.where((phy2log >= 0) & (phy2log < num_experts), phy2log, num_experts)
    by_expert = xp.argsort(phy2log, stable=True).astype(np.int32)
    sorted_experts = phy2log[by_expert]
    counts = xp.sum(phy2log[None, :] == xp.arange(num_experts, dtype=phy2log.dtype)[:, None], axis=1)
    first = xp.cumsum(counts) - counts
    replica = xp.arange(len(by_expert)) - first[xp.clip(sorted_experts, 0, num_experts - 1)]
    if xp is np:
        log2phy = np.full((num_experts, max_replicas), -1, np.int32)
        log2phy[sorted_experts, replica] = by_expert
        return log2phy
    # Traced contents may hold anything: what has no place is dropped.
    known = (sorted_experts >= 0) & (sorted_experts < num_experts) & (replica < max_replicas)
    target = jnp.where(known, sorted_experts * max_replicas + replica, num_experts * max_replicas)
    flat = jnp.full(num_experts * max_replicas, -1, jnp.int32).at[target].set(by_expert, mode="drop")
    return flat.reshape(num_experts, max_replicas)


def _check_contents(
    phy2log: np.ndarray, num_ranks: int, num_experts: int | None, max_replicas: int | None
) -> tuple[int, int]:
    if num_experts is None:
        num_experts = int(phy2log.max()) + 1
    _check_count("num_experts", num_experts)
    wrong = np.flatnonzero((phy2log < 0) | (phy2log >= num_experts))
    if wrong.size:
        raise ValueError(
            f"phy2log: slot {wrong[0]} holds expert {phy2log[wrong[0]]}, but experts are 0 to {num_experts - 1}"
        )
    replicas = np.bincount(phy2log, minlength=num_experts)
    missing = np.flatnonzero(replicas == 0)
    if missing.size:
        raise ValueError(f"phy2log: expert {missing[0]} has no slot; every expert needs at least one")
    slots_per_rank = len(phy2log) // num_ranks
    by_rank = phy2log.reshape(num_ranks, slots_per_rank)
    ordered = np.sort(by_rank, axis=1)
    rank, place = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
    if rank.size:
        expert = ordered[rank[0], place[0]]
        slots = (np.flatnonzero(by_rank[rank[0]] == expert) + rank[0] * slots_per_rank).tolist()
        raise ValueError(
            f"phy2log: rank {rank[0]} holds expert {expert} twice, in slots {slots}; a second copy on a rank cannot "
            "take load off it"
        )
    most = int(replicas.max())
    if max_replicas is None:
        max_replicas = most
    _check_count("max_replicas", max_replicas)
    if most > max_replicas:
        raise ValueError(
            f"max_replicas = {max_replicas} is too small: expert {replicas.argmax()} has {most} replicas in phy2log"
        )
    return num_experts, max_replicas


def _check_count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
