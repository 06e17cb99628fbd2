"""Placement: which physical expert (slot) holds which logical expert."""

import dataclasses
import operator
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike

from jax_lplb import _ffi, _placement_file, _plan, _speed, eplb
from jax_lplb._checks import check_choice, check_count, check_positive
from jax_lplb._mesh import with_auto_axes
from jax_lplb._rows import logical_order, rows_of_experts
from jax_lplb.topology import Topology


@dataclasses.dataclass(frozen=True)
class Planning:
    """How `balance` and `Placement.choose` choose copies by a batch's load; see `Placement.per_batch`."""

    target: float
    min_tokens: int
    max_sends: int | None

    @property
    def slack(self) -> float:
        """What the target allows beyond the mean, over the mean; at most what no load of a rank exceeds."""
        return min(self.target - 1, 2.0**31)

    @property
    def most_sends(self) -> int:
        """The same limit as an int32."""
        return 2**31 - 1 if self.max_sends is None else min(self.max_sends, 2**31 - 1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["phy2log", "log2phy"],
    meta_fields=["num_ranks", "num_groups", "topology", "planning"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Placement:
    """Where each logical expert lives, and where its copies are.

    Rank g owns the slots g * slots_per_rank to (g + 1) * slots_per_rank - 1. Build one with `per_batch`,
    `from_topology`, `from_eplb` or `from_phy2log`, which check it; `save` and `load` keep it in a file. A pytree of two
    int32 leaves: their contents may be traced, and so change within a jitted step without recompiling; shapes, ranks,
    groups, topology and planning are static. Leaves may have leading axes (one entry for each layer) to be mapped or
    scanned over.

    Equal, and of one hash, where contents, ranks, groups, topology and planning are, whether leaves are NumPy's or
    JAX's; so it may be a key, or a static argument of `jax.jit` (which recompiles for other contents). Of leaves that
    are traced neither can be told: TypeError.

    Attributes:
      phy2log: int32 [num_physical], the logical expert that each slot holds, -1 for none. It alone does not make a
        placement: made again of it by `from_phy2log`, one along a topology has no topology, and so another
        `home_order`.
      log2phy: int32 [num_experts, max_replicas], the slots of each logical expert, its home first, padded with -1.
      num_ranks: ranks of the expert-parallel axis.
      num_groups: groups of num_ranks / num_groups neighbouring ranks that copy experts among themselves only.
      topology: the topology of each group, or None.
      planning: how `balance` chooses copies anew for each batch, or None: it uses those that are there. A plan is kept
        for further batches by `dataclasses.replace(placement, planning=None)`.
    """

    phy2log: Any
    log2phy: Any
    num_ranks: int
    num_groups: int
    topology: Topology | None
    planning: Planning | None = None

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

    @property
    def rows_per_rank(self) -> int:
        """Rows of weights on each rank: num_experts / num_ranks, rounded up."""
        return -(-self.num_experts // self.num_ranks)

    @property
    def home_order(self) -> Any:
        """int32 [num_ranks * rows_per_rank], the logical expert of each row of weights as the ranks hold them.

        Rank after rank. Where ranks do not divide the experts, some have one fewer than others, and a last row of
        padding in its place: -1 here, and zeros in the weights.

        Along a topology these are the home slots; they are in logical order, unless `from_topology` was given a load.
        Without a topology (`from_eplb`, `from_phy2log`) rows are in logical order, whatever the slots hold.

        Weights and optimiser state have to be in this order, and nothing checks it: rows in another give each expert
        another's weights. Bring them into it once, by `from_logical`, or by `permute_experts` where a placement of
        another home order replaces this one; never within a step.
        """
        xp: Any = np if isinstance(self.phy2log, np.ndarray) else jnp
        leading = self.phy2log.shape[:-1]
        if self.topology is None:
            order = logical_order(self.num_experts, self.num_ranks)
            return xp.broadcast_to(xp.asarray(order), (*leading, *order.shape))
        by_rank = self.phy2log.reshape(*leading, self.num_ranks, self.slots_per_rank)
        return by_rank[..., : self.rows_per_rank].reshape(*leading, self.num_experts)

    @property
    def home_rank(self) -> Any:
        """int32 [num_experts], the rank that keeps each logical expert's weights: that of its row in `home_order`."""
        if self.topology is not None:
            return self.log2phy[..., 0] // self.slots_per_rank
        xp: Any = np if isinstance(self.phy2log, np.ndarray) else jnp
        rank = rows_of_experts(self.num_experts, self.num_ranks) // self.rows_per_rank
        return xp.broadcast_to(xp.asarray(rank), (*self.phy2log.shape[:-1], self.num_experts))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self is other or (self._static == other._static and all(map(_same, self._leaves, other._leaves)))

    def __hash__(self) -> int:
        return hash((self._static, *map(_contents, self._leaves)))

    def __repr__(self) -> str:
        phy2log, log2phy = map(_short, self._leaves)
        return (
            f"Placement(phy2log={phy2log}, log2phy={log2phy}, num_ranks={self.num_ranks}, "
            f"num_groups={self.num_groups}, topology={self.topology}"
            f"{f', planning={self.planning}' * (self.planning is not None)})"
        )

    @property
    def _leaves(self) -> tuple[Any, Any]:
        return self.phy2log, self.log2phy

    @property
    def _static(self) -> tuple[int, int, Topology | None, Planning | None]:
        return self.num_ranks, self.num_groups, self.topology, self.planning

    @classmethod
    def from_topology(
        cls,
        topology: Topology,
        *,
        num_experts: int,
        num_ranks: int,
        redundants_per_rank: int,
        load: ArrayLike | None = None,
        repeats: bool = False,
    ) -> "Placement":
        """Home experts on each rank, and copies of the heaviest along a topology.

        With n = num_experts / num_ranks home experts a rank and D columns in the topology, slot n + c * D + d of rank
        i holds a copy of home expert c * D + d of rank r2o[i, d]. Ranks beyond one group repeat the topology, group
        after group.

        Home experts are in logical order, n to a rank. With `load` they are packed onto ranks by past load (EPLB's
        packing, no replicas yet) and each rank has its heaviest first: LPLB's way. Weights then have to follow, once,
        before the first step: `params = jax_lplb.from_logical(params, placement)`, and optimiser state likewise; see
        `home_order`. (`jax_lplb.flax.MoE` makes its parameters in the right order.)

        With `repeats` a rank may send a hot expert along several columns, so that it has a copy on each of the ranks
        that these lead to: the copies' slots n, n + 1, ... are filled in this order, by the home expert with the
        most load a replica of those that have no copy on the slot's rank yet; ties go to the fewest replicas, then to
        the lower expert. `log2phy` has room for as many replicas, and `select` then chooses so, too.

        Args:
          topology: for groups of `topology.group_size` ranks.
          num_experts: logical experts, a multiple of `num_ranks`.
          num_ranks: ranks of the expert-parallel axis, a multiple of the topology's group size.
          redundants_per_rank: redundant experts on each rank, a multiple of the topology's columns and at most the
            rank's home experts. 0 for no copies at all.
          load: [..., num_experts], past tokens of each logical expert, in any unit. Leading axes, one entry for each
            layer, are those of the leaves.
          repeats: whether an expert may have several copies. Without `load` no expert is known to need them, and this
            makes room for what `select` will choose.

        Raises:
          TypeError: `topology` is not a Topology, a number is not an integer, or `load` is traced.
          ValueError: the numbers do not fit together, as said above, or a load is negative or not finite.
        """
        if not isinstance(topology, Topology):
            raise TypeError(f"topology must be a jax_lplb.topology.Topology, got {type(topology).__name__}")
        check_count("num_experts", num_experts)
        check_count("num_ranks", num_ranks)
        check_count("redundants_per_rank", redundants_per_rank, least=0)
        check_choice("repeats", repeats, (False, True))
        size, columns = topology.group_size, topology.num_columns
        if num_ranks % size:
            raise ValueError(f"num_ranks must be a multiple of the topology's {size} ranks, got {num_ranks}")
        if num_experts % num_ranks:
            raise ValueError(
                f"num_experts must be divisible by num_ranks = {num_ranks}, got {num_experts}: along a topology ranks "
                "have equally many; per_batch, from_eplb and from_phy2log take any number"
            )
        home = num_experts // num_ranks
        if redundants_per_rank % columns:
            raise ValueError(
                f"redundants_per_rank must be a multiple of the topology's {columns} columns, got {redundants_per_rank}"
            )
        replicas, most = _limits(topology, home, repeats)
        if redundants_per_rank > most:
            cured = not repeats and redundants_per_rank <= _limits(topology, home, True)[1]
            raise ValueError(
                f"redundants_per_rank must be at most {most}, got {redundants_per_rank}: a rank has {home} home "
                f"experts, and copies{' on one rank' * repeats} are of different ones"
                f"{'; with repeats=True only those on one rank are' * cured}"
            )
        leading: tuple[int, ...] = ()
        order = np.arange(num_experts)
        if load is not None:
            load = _past_load(load)
            if load.shape[-1] != num_experts:
                raise ValueError(f"load must have shape [..., num_experts] = [..., {num_experts}], got {load.shape}")
            leading = load.shape[:-1]
            order, _, _ = eplb.rebalance_experts(load.reshape(-1, num_experts), num_experts, 1, 1, num_ranks)
        slots = home + redundants_per_rank
        slot = np.arange(num_ranks * slots).reshape(num_ranks, slots)
        order = order.reshape(*leading, num_ranks, home)
        owner, _ = owners_and_receivers(topology, num_ranks, redundants_per_rank)
        copies = order[..., owner, np.arange(redundants_per_rank) % home]
        phy2log = np.concatenate([order, copies], axis=-1).reshape(*leading, -1).astype(np.int32)
        log2phy = np.full((*leading, num_experts, replicas if redundants_per_rank else 1), -1, np.int32)
        for column, (experts, slots_of) in enumerate([(order, slot[:, :home]), (copies, slot[:, home:])]):
            if experts.size:
                flat = experts.reshape(*leading, -1)
                np.put_along_axis(log2phy[..., column], flat, np.broadcast_to(slots_of.ravel(), flat.shape), axis=-1)
        placement = cls(phy2log, log2phy, num_ranks, num_ranks // size, topology)
        if placement.max_replicas <= 2:  # repeats or not, no expert has two copies
            return placement
        known = np.zeros(num_experts) if load is None else load
        phy2log, log2phy = placement._select_all(np, repeats, phy2log, log2phy, known)
        return dataclasses.replace(placement, phy2log=phy2log, log2phy=log2phy)

    @classmethod
    def from_eplb(
        cls,
        load: ArrayLike,
        *,
        num_ranks: int,
        redundants_per_rank: int | None = None,
        num_slots: int | None = None,
        num_groups: int = 1,
        num_nodes: int = 1,
        max_replicas: int | None = None,
    ) -> "Placement":
        """EPLB's placement for past load: any number of replicas, in one group of all ranks.

        Where EPLB puts two replicas of an expert on one rank, the second gives way, in its slot, to the expert with the
        most load a replica of those that the rank does not hold (of the node's experts, where there are several nodes);
        ties go to experts with few replicas, from ranks that have many such. So the optimal split of any load is at
        least as even as EPLB's own placement with even splits: it can send to the first replica what the second would
        have had. Weights stay in logical order. See `jax_lplb.eplb.rebalance_experts`.

        Args:
          load: [..., num_experts], past tokens of each logical expert, in any unit. Leading axes, one entry for each
            layer, are those of the leaves. A layer of zeros has no past: as if its experts had had equally many.
          num_ranks: ranks of the expert-parallel axis.
          redundants_per_rank: slots of each rank beyond num_experts / num_ranks, rounded up.
          num_slots: slots of all ranks, in place of `redundants_per_rank`: a multiple of `num_ranks`, and at least as
            many as there are experts.
          num_groups: groups of experts that the router picks from, for EPLB's hierarchical policy.
          num_nodes: machines that the ranks are spread over, for the same.
          max_replicas: room for that many replicas of an expert, so that placements for other loads can replace this
            one without recompiling; by default the most that an expert has. Replicas beyond it give way, too.

        Raises:
          TypeError: a number is not an integer, or `load` is traced.
          ValueError: the numbers do not fit together, as said above, a rank would have more slots than there are
            experts, both or neither of `redundants_per_rank` and `num_slots` are given, or a load is negative or not
            finite.
        """
        load = _past_load(load)
        num_experts = load.shape[-1]
        check_count("num_ranks", num_ranks)
        if max_replicas is not None:
            check_count("max_replicas", max_replicas)
        if (redundants_per_rank is None) == (num_slots is None):
            raise ValueError(
                "give either redundants_per_rank or num_slots, got redundants_per_rank = "
                f"{redundants_per_rank!r} and num_slots = {num_slots!r}"
            )
        if redundants_per_rank is not None:
            check_count("redundants_per_rank", redundants_per_rank, least=0)
            slots = -(-num_experts // num_ranks) + redundants_per_rank
            asked = f"redundants_per_rank = {redundants_per_rank}"
        else:
            assert num_slots is not None
            check_count("num_slots", num_slots)
            if num_slots % num_ranks or num_slots < num_experts:
                raise ValueError(
                    f"num_slots must be a multiple of num_ranks = {num_ranks}, and at least the {num_experts} experts "
                    f"of load, got {num_slots}"
                )
            slots = num_slots // num_ranks
            asked = f"num_slots = {num_slots}"
        if slots > num_experts:
            raise ValueError(f"{asked} gives a rank {slots} slots, more than the {num_experts} experts it could hold")
        layers = load.reshape(-1, num_experts)
        # Zeros say that nothing is known yet, and to EPLB that one expert may have all the copies.
        layers = np.where(layers.any(axis=1, keepdims=True), layers, 1)
        phy2log, _, _ = eplb.rebalance_experts(layers, num_ranks * slots, num_groups, num_nodes, num_ranks)
        if num_groups % num_nodes:
            num_nodes = 1  # as EPLB does
        phy2log = phy2log.astype(np.int32)
        for of_layer, row in zip(layers, phy2log, strict=True):
            _give_way(row.reshape(num_ranks, slots), of_layer, num_nodes, max_replicas or num_ranks)
        counts = np.apply_along_axis(np.bincount, 1, phy2log, minlength=num_experts)
        replicas = max_replicas or int(counts.max())
        log2phy = np.stack([slots_of_experts(row, num_experts, replicas) for row in phy2log])
        leading = load.shape[:-1]
        return cls(
            phy2log.reshape(*leading, -1),
            log2phy.reshape(*leading, num_experts, replicas),
            num_ranks,
            num_groups=1,
            topology=None,
        )

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

        Without a topology, and so with weights in logical order (`home_order`), wherever `phy2log` is from: that of a
        placement along a topology does not make that placement again. Make it by `from_topology`, or keep both leaves:
        `dataclasses.replace(placement, phy2log=phy2log, log2phy=log2phy)`.

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
        check_count("num_ranks", num_ranks)
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
            num_experts, max_replicas = check_contents(phy2log, num_ranks, num_experts, max_replicas)
        elif num_experts is None or max_replicas is None:
            raise ValueError("num_experts and max_replicas must be given where phy2log is traced")
        check_count("num_experts", num_experts)
        check_count("max_replicas", max_replicas)
        phy2log = phy2log.astype(np.int32)
        return cls(
            phy2log,
            slots_of_experts(phy2log, num_experts, max_replicas),
            num_ranks,
            num_groups=1,
            topology=None,
        )

    @classmethod
    def per_batch(
        cls,
        *,
        num_experts: int,
        num_ranks: int,
        redundants_per_rank: int,
        num_groups: int = 1,
        max_replicas: int | None = None,
        target: float = 1.01,
        min_tokens: int = 0,
        max_sends: int | None = None,
    ) -> "Placement":
        """Contiguous homes, and free slots whose copies `balance` chooses for each batch, by its own load.

        Needs no past, no topology and no moving of experts. Rank i has the experts i * num_experts // num_ranks to
        (i + 1) * num_experts // num_ranks - 1 in its first slots, and then `redundants_per_rank` slots that hold
        nothing (-1). Where ranks do not divide the experts, those that have one fewer have a slot besides that always
        stays empty: that of their row of padding, see `home_order`.
        `balance` returns the placement that it filled as `Balanced.placement`; `choose` fills one by itself. `solve`
        and `assign` take a placement as it is.

        Of the plans that it tries, it takes the one with the fewest copies that brings the busiest rank within the
        target, or else the one whose busiest rank carries the least; see ffi/plan.h. Much as UltraEP and MoonEP do:
        copies by the batch itself.

        Args:
          num_experts: logical experts.
          num_ranks: ranks of the expert-parallel axis.
          redundants_per_rank: slots of each rank for copies.
          num_groups: groups of neighbouring ranks, nodes say, that copy experts among themselves only; divides
            `num_ranks`.
          max_replicas: most replicas that an expert may have, its home included; at least 2. By default as many as a
            group has ranks.
          target: no more copies are made once the busiest rank of a group has at most this times the mean (with
            `rank_speed` in load / speed). At least 1.
          min_tokens: a copy is made only where it can take at least that many tokens, in whose time its weights are
            brought. (It may get fewer in the end, as ranks are then evened out further.)
          max_sends: most copies of one rank's experts, whose weights all leave through its link. None: no limit.

        Raises:
          TypeError: a number is not one.
          ValueError: the numbers do not fit together, as said above, or a rank would have more slots than its group has
            experts.
        """
        check_count("num_experts", num_experts)
        check_count("num_ranks", num_ranks)
        check_count("redundants_per_rank", redundants_per_rank, least=0)
        check_count("num_groups", num_groups)
        check_count("min_tokens", min_tokens, least=0)
        if max_sends is not None:
            check_count("max_sends", max_sends)
        check_positive("target", target)
        if target < 1:
            raise ValueError(f"target must be at least 1, the busiest rank over the mean; got {target}")
        if num_ranks % num_groups:
            raise ValueError(f"num_groups must divide num_ranks = {num_ranks}, got {num_groups}")
        order = logical_order(num_experts, num_ranks)
        size, homes = num_ranks // num_groups, len(order) // num_ranks
        slots = homes + redundants_per_rank
        of_group = int(np.min(np.sum(order.reshape(num_groups, -1) >= 0, axis=1)))
        if redundants_per_rank and slots > of_group:
            raise ValueError(
                f"redundants_per_rank = {redundants_per_rank} gives a rank {slots} slots, more than the {of_group} "
                f"experts of its group: at most {max(of_group - homes, 0)}"
            )
        if max_replicas is None:
            max_replicas = size if redundants_per_rank else 1
        else:
            check_count("max_replicas", max_replicas, least=2 if redundants_per_rank else 1)
            if max_replicas > size:
                raise ValueError(f"max_replicas must be at most the {size} ranks of a group, got {max_replicas}")
        by_rank = np.full((num_ranks, slots), -1, np.int32)
        by_rank[:, :homes] = order.reshape(num_ranks, homes)
        phy2log = by_rank.reshape(-1)
        log2phy = np.full((num_experts, max_replicas), -1, np.int32)
        log2phy[:, 0] = np.flatnonzero(phy2log >= 0)
        planning = Planning(float(target), int(min_tokens), max_sends) if redundants_per_rank else None
        return cls(phy2log, log2phy, num_ranks, num_groups, topology=None, planning=planning)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the placement, all that makes it, to an npz file of just this name, for `load`.

        The file is replaced as a whole: one that is there stays until the new one is written.

        Raises:
          TypeError: leaves are traced.
          ValueError: leaves contradict each other, as contents that were put in by hand may.
          OSError: the file cannot be written.
        """
        _placement_file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Placement":
        """The placement that `save` wrote: equal to that one, with leaves on the host.

        It replaces that one without recompiling; where leaves were on devices, once `jax.device_put` has put them there
        likewise. Weights that were saved in `home_order` go with this placement and no other.

        Raises:
          OSError: the file cannot be opened.
          ValueError: it is no such file, is damaged or of a newer version, or its arrays contradict each other; says
            what was found and what was expected.
        """
        return _placement_file.load(cls, path)

    def choose(
        self,
        load: jax.Array,
        *,
        rank_speed: jax.Array | np.ndarray | None = None,
        implementation: _ffi.Implementation = None,
    ) -> "Placement":
        """Plans copies for a load, on the device, as `balance` does for that of a batch.

        Args:
          load: int32 or float32 [..., num_experts], tokens of each logical expert over all ranks. Leading axes, one
            entry for each layer, go with those of the leaves.
          rank_speed: float32 [num_ranks], as of `solve`: of all layers.
          implementation: "ffi" (custom call), "xla" (pure JAX), or None: the custom call on platforms that have one.
            All give the same bits.

        Returns:
          A placement of the same shapes, whose leaves are traced where `load` is.

        Raises:
          TypeError: `load` or `rank_speed` has another dtype.
          ValueError: one of them has the wrong shape, `rank_speed` a wrong value, or the placement is not one of
            `per_batch`, or beyond the custom call's limits.
        """
        if self.planning is None:
            raise ValueError(
                "choose needs a placement with free slots to plan for (Placement.per_batch); of a placement along a "
                "topology, select chooses the copies"
            )
        if not isinstance(load, (jax.Array, np.ndarray)) or load.dtype not in (jnp.int32, jnp.float32):
            raise TypeError(
                f"load must be an int32 or float32 array, got {getattr(load, 'dtype', type(load).__name__)}"
            )
        if load.ndim == 0 or load.shape[-1] != self.num_experts:
            raise ValueError(f"load must have shape [..., num_experts] = [..., {self.num_experts}], got {load.shape}")
        _speed.check_rank_speed(rank_speed, self)
        check_limits(self, implementation)
        leading = np.broadcast_shapes(load.shape[:-1], self.phy2log.shape[:-1])

        def run(load: jax.Array, rank_speed: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            speed = _speed.scale(rank_speed, self)
            one = jnp.vectorize(
                lambda load: _plan.choose(load, self, implementation, speed), signature="(e)->(p),(e,r)"
            )
            return one(jnp.broadcast_to(load, (*leading, self.num_experts)))

        with jax.named_scope("lplb_choose"):
            phy2log, log2phy = with_auto_axes(run, jax.P(), lax.stop_gradient(jnp.asarray(load)), rank_speed)
        return dataclasses.replace(self, phy2log=phy2log, log2phy=log2phy)

    def select(self, load: jax.Array, *, repeats: bool | None = None) -> "Placement":
        """Chooses anew, on the device, which experts fill the copies' slots, by a load that may be traced.

        The same placement, but with copies of each rank's heaviest home experts, the heaviest in the first of the slots
        that copy from the rank; ties go to the lower expert. With `repeats` a hot one may have several, as
        `from_topology` says. Home slots stay. For a moving average of past load: the weights of copies have to follow.

        Args:
          load: int32 or float32 [..., num_experts], in any unit. Leading axes, one entry for each layer, go with those
            of the leaves.
          repeats: whether an expert may have several copies. None: as the placement was made.

        Returns:
          A placement of the same shapes, whose leaves are traced where `load` is.

        Raises:
          TypeError: `load` is no array of numbers.
          ValueError: it has the wrong shape, or the placement has no topology, or no room for repeats.
        """
        if self.topology is None:
            cure = "make a new Placement.from_eplb" if self.planning is None else "use Placement.choose"
            raise ValueError(
                "select needs a placement along a topology (Placement.from_topology), in which copies have slots of "
                f"their own; {cure} instead"
            )
        if not isinstance(load, (jax.Array, np.ndarray)) or not (
            jnp.issubdtype(load.dtype, jnp.integer) or jnp.issubdtype(load.dtype, jnp.floating)
        ):
            raise TypeError(f"load must be an array of numbers, got {getattr(load, 'dtype', type(load).__name__)}")
        if load.ndim == 0 or load.shape[-1] != self.num_experts:
            raise ValueError(f"load must have shape [..., num_experts] = [..., {self.num_experts}], got {load.shape}")
        check_choice("repeats", repeats, (None, False, True))
        home = self.num_experts // self.num_ranks
        redundants = self.slots_per_rank - home
        room = _limits(self.topology, home, True)[0] if redundants else 1
        if repeats and self.max_replicas < room:
            raise ValueError(
                f"repeats = True needs max_replicas = {room}, but the placement has max_replicas = "
                f"{self.max_replicas}; make it by Placement.from_topology(..., repeats=True)"
            )
        if repeats is False and redundants > home:
            raise ValueError(
                f"repeats = False needs as many home experts on a rank as redundant ones, but the placement has {home} "
                f"and {redundants}; leave repeats out"
            )
        if repeats is None:
            repeats = self.max_replicas >= room
        with jax.named_scope("lplb_select"):
            run = partial(self._select_all, jnp, repeats)
            phy2log, log2phy = with_auto_axes(run, jax.P(), self.phy2log, self.log2phy, load)
        return dataclasses.replace(self, phy2log=phy2log, log2phy=log2phy)

    def _select_all(self, xp: Any, repeats: bool, phy2log: Any, log2phy: Any, load: Any) -> tuple[Any, Any]:
        """Of arrays of `xp`, NumPy or JAX's, with leading axes."""
        choose = xp.vectorize(partial(self._select, xp, repeats), signature="(p),(e,r),(e)->(p),(e,r)")
        leading = np.broadcast_shapes(load.shape[:-1], phy2log.shape[:-1])
        return choose(
            *(
                xp.broadcast_to(x, (*leading, *x.shape[x.ndim - n :]))
                for x, n in ((phy2log, 1), (log2phy, 2), (load, 1))
            )
        )

    def _select(self, xp: Any, repeats: bool, phy2log: Any, log2phy: Any, load: Any) -> tuple[Any, Any]:
        if self.max_replicas == 1:
            return phy2log, log2phy
        assert self.topology is not None
        ranks, slots = self.num_ranks, self.slots_per_rank
        home = self.num_experts // ranks
        number = np.arange(slots - home, dtype=np.int32)
        owner, receiver = owners_and_receivers(self.topology, ranks, slots - home)
        owned = phy2log.reshape(ranks, slots)[:, :home]
        weight = _clipped(load, owned)
        if jnp.issubdtype(weight.dtype, jnp.floating):
            weight = xp.where(xp.isnan(weight), -np.inf, weight)  # or no order would be one
        if repeats and self.max_replicas > 2:
            chosen = _with_repeats(xp, weight, owned, receiver)
        else:
            order = xp.sum(_ahead(weight, owned), axis=2, dtype=np.int32)
            chosen = order[:, :, None] == number[None, None, :]
        # Here chosen [ranks, home, redundants]: which of its experts a rank sends to which of its copies' slots.
        experts = xp.max(xp.where(chosen, owned[:, :, None], 0), axis=1)
        slot = (receiver * slots + home + number).astype(np.int32)
        column = np.arange(self.max_replicas - 1, dtype=np.int32)
        in_column = chosen[:, :, None, :]
        if len(column) > 1:  # in ascending order
            earlier = slot[:, None, :] < slot[:, :, None]
            place = xp.sum(in_column & earlier[:, None], axis=3, dtype=np.int32)
            in_column = in_column & (place[:, :, None, :] == column[None, None, :, None])
        copies = xp.max(xp.where(in_column, slot[:, None, None, :], np.int32(-1)), axis=3)
        home_slot = log2phy[:, 0]
        row = home_slot // slots * home + home_slot % slots
        return (
            xp.concatenate([owned, experts[owner, number]], axis=1).reshape(-1),
            xp.concatenate([home_slot[:, None], _clipped(copies.reshape(-1, len(column)), row)], axis=1),
        )


def _with_repeats(xp: Any, weight: Any, owned: Any, receiver: np.ndarray) -> Any:
    """Which of its experts each rank sends to each of its copies' slots, bool [ranks, home, redundants].

    Slot by slot, that with the most load a replica of those that the slot's rank was not sent yet.
    """
    picks: list[Any] = []
    with jax.enable_x64(True):  # float64 rounds no two quotients of int32 or float32 by so small numbers to one
        weight = xp.where(weight > 0, weight, 0).astype(np.float64)
        replicas = xp.ones_like(weight)
        for number in range(receiver.shape[1]):
            there = xp.zeros_like(weight, dtype=bool)
            for earlier, picked in enumerate(picks):
                there |= picked & (receiver[:, earlier] == receiver[:, number])[:, None]
            each = xp.where(there, -1, weight / replicas)
            picks.append(~xp.any(_ahead(each, replicas, owned), axis=2))
            replicas += picks[-1].astype(np.float64)
        return xp.stack(picks, axis=2)


def _ahead(most: Any, *least: Any) -> Any:
    """[ranks, experts, others]: whether the other has more of the first; or as much, and less of the next, and so on.

    All pairs: few enough, and no sort, which takes several kernels.
    """
    ahead = None
    for value in reversed(least):
        less, equal = (compare(value[:, None, :], value[:, :, None]) for compare in (operator.lt, operator.eq))
        ahead = less if ahead is None else less | equal & ahead
    return (most[:, None, :] > most[:, :, None]) | (most[:, None, :] == most[:, :, None]) & ahead


def _clipped(array: Any, index: Any) -> Any:
    """array[index]; what is traced may hold any index."""
    return array[index] if isinstance(array, np.ndarray) else array.at[index].get(mode="clip")


def _same(leaf: Any, other: Any) -> bool:
    """Leaves by contents; trees that JAX makes may hold anything in their place."""
    if leaf is other:
        return True
    contents, others = _contents(leaf), _contents(other)
    return type(contents) is type(others) and bool(contents == others)


def _contents(leaf: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(
            f"a placement with traced leaves has no contents to compare or hash yet, got {_short(leaf)}; compare its "
            "leaves by jnp.array_equal, or pass it as an argument that is not static"
        )
    if not isinstance(leaf, (np.ndarray, jax.Array)):
        return leaf
    return leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes()


def _short(leaf: Any) -> str:
    if isinstance(leaf, (np.ndarray, jax.Array)):
        return f"{'traced ' * isinstance(leaf, jax.core.Tracer)}{leaf.dtype}{list(leaf.shape)}"
    return repr(leaf)


def owners_and_receivers(topology: Topology, num_ranks: int, redundants_per_rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each rank's redundant slots [num_ranks, redundants_per_rank] the ranks that they copy from.

    And those that its own copies go to: to the slots of the same numbers.
    """
    ranks, size = np.arange(num_ranks), topology.group_size
    column = np.arange(redundants_per_rank) % topology.num_columns
    owner = ranks[:, None] // size * size + topology.r2o[ranks % size][:, column]
    return owner, np.argsort(owner, axis=0)


def _limits(topology: Topology, home: int, repeats: bool) -> tuple[int, int]:
    """The most replicas of an expert, and redundant experts on each rank, where it has as many home experts.

    A rank's copies are of different experts; with repeats only those that go to one rank.
    """
    columns = topology.num_columns
    if not repeats:
        return 2, home // columns * columns
    to_each = [np.unique(receivers, return_counts=True)[1] for receivers in np.argsort(topology.r2o, axis=0)]
    return 1 + max(map(len, to_each)), home // int(max(map(max, to_each))) * columns


def _give_way(by_rank: np.ndarray, load: np.ndarray, num_nodes: int, max_replicas: int) -> None:
    """Replaces, in [num_ranks, slots_per_rank], second replicas on a rank and those of an expert beyond max_replicas.

    By an expert that the rank does not hold and that has not got max_replicas either; of those of the node, where there
    are any. Of these the one with the most load a replica, as EPLB chooses. A load that says little ties most of them:
    then one with the fewest replicas, from the ranks that hold the most experts of so few, so that neither one expert
    nor one rank gets all the copies; then the lowest.
    """
    num_ranks, slots = by_rank.shape
    count = np.zeros(len(load), np.int64)
    holds = np.zeros((num_ranks, len(load)), np.int64)
    vacant = np.zeros(by_rank.shape, bool)
    for rank, slot in np.ndindex(*by_rank.shape):
        expert = by_rank[rank, slot]
        vacant[rank, slot] = holds[rank, expert] or count[expert] == max_replicas
        count[expert] += not vacant[rank, slot]
        holds[rank, expert] |= not vacant[rank, slot]
    of_node = np.zeros((num_nodes, len(load)), bool)
    of_node[np.repeat(np.arange(num_nodes), num_ranks // num_nodes)[:, None], by_rank] = True
    for rank, slot in np.argwhere(vacant):
        free = (count < max_replicas) & (holds[rank] == 0)
        on_node = free & of_node[rank * num_nodes // num_ranks]
        candidates = np.flatnonzero(on_node if on_node.any() else free)
        if not candidates.size:
            # Another rank gives one of its experts to this one, and takes one of which there may be more.
            others, experts = np.nonzero(holds & (holds[rank] == 0))
            exchanges = (holds[others] == 0) & (count < max_replicas)
            possible = np.flatnonzero(exchanges.any(axis=1))
            if not possible.size:
                raise ValueError(
                    f"max_replicas = {max_replicas} is too small: every expert that rank {rank} does not hold has that "
                    f"many already, and {num_ranks * slots} slots are to be filled; num_ranks = {num_ranks} is enough"
                )
            same_node = others[possible] * num_nodes // num_ranks == rank * num_nodes // num_ranks
            number = possible[np.argmax(same_node)]
            other, given, taken = others[number], experts[number], np.argmax(exchanges[number])
            by_rank[other, by_rank[other] == given] = taken
            by_rank[rank, slot] = given
            holds[other, given], holds[other, taken], holds[rank, given] = 0, 1, 1
            count[taken] += 1
            continue
        each = load[candidates] / count[candidates]
        candidates = candidates[each == each.max()]
        fewest = count[candidates].min()
        candidates = candidates[count[candidates] == fewest]
        crowd = holds @ (count == fewest)
        expert = candidates[np.argmax(crowd @ holds[:, candidates])]
        by_rank[rank, slot] = expert
        holds[rank, expert] = 1
        count[expert] += 1


def _past_load(load: ArrayLike) -> np.ndarray:
    if isinstance(load, jax.core.Tracer):
        raise TypeError(
            "load must not be traced: it decides where weights live, on the host. Inside jit, Placement.select of a "
            "placement along a topology chooses the copies alone"
        )
    load = np.asarray(load)
    if not (np.issubdtype(load.dtype, np.integer) or np.issubdtype(load.dtype, np.floating)):
        raise TypeError(f"load must hold numbers, got dtype {load.dtype}")
    if load.ndim == 0 or 0 in load.shape:
        raise ValueError(f"load must have shape [..., num_experts], got {load.shape}")
    if not np.all((load >= 0) & (load < np.inf)):
        raise ValueError(f"load must be finite and not negative, got {load[~((load >= 0) & (load < np.inf))][0]}")
    return load


def slots_of_experts(phy2log: Any, num_experts: int, max_replicas: int) -> Any:
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


def check_limits(placement: Placement, implementation: _ffi.Implementation) -> None:
    """Checks the implementation, and that it can hold the placement."""
    if implementation not in (None, "ffi", "xla"):
        raise ValueError(f"implementation must be None, 'ffi' or 'xla', got {implementation!r}")
    beyond = beyond_custom_calls(placement)
    if beyond and implementation != "xla":
        raise ValueError(f"{beyond}; pass implementation='xla'")


def beyond_custom_calls(placement: Placement) -> str:
    """What of a placement the custom calls cannot hold, as a sentence; empty where there is nothing."""
    experts = placement.num_experts
    if placement.planning is not None:
        experts = placement.num_ranks * placement.rows_per_rank  # of `_plan.fill_up`
    for what, value, limit in (
        ("ranks a group", placement.group_size, _ffi.MAX_GROUP_RANKS),
        ("physical experts a group", placement.num_physical // placement.num_groups, _ffi.MAX_GROUP_SLOTS),
        ("experts", experts, _ffi.MAX_EXPERTS),
    ):
        if value > limit:
            return f"placement has {value} {what}, and the custom calls hold at most {limit} in shared memory"
    return ""


def check_contents(
    phy2log: np.ndarray, num_ranks: int, num_experts: int | None, max_replicas: int | None, *, twice: bool = False
) -> tuple[int, int]:
    """Checks an array of any origin and returns both numbers; `twice`: a rank may hold an expert twice."""
    if num_experts is None:
        num_experts = int(phy2log.max()) + 1
    check_count("num_experts", num_experts)
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
    if rank.size and not twice:
        expert = ordered[rank[0], place[0]]
        slots = (np.flatnonzero(by_rank[rank[0]] == expert) + rank[0] * slots_per_rank).tolist()
        raise ValueError(
            f"phy2log: rank {rank[0]} holds expert {expert} twice, in slots {slots}; a second copy on a rank cannot "
            "take load off it"
        )
    most = int(replicas.max())
    if max_replicas is None:
        max_replicas = most
    check_count("max_replicas", max_replicas)
    if most > max_replicas:
        raise ValueError(
            f"max_replicas = {max_replicas} is too small: expert {replicas.argmax()} has {most} replicas in phy2log"
        )
    return num_experts, max_replicas


def check_one_layer(name: str, placement: Any) -> None:
    if not isinstance(placement, Placement):
        raise TypeError(f"{name} must be a jax_lplb.Placement, got {type(placement).__name__}")
    if placement.phy2log.ndim != 1:
        raise ValueError(
            f"{name} has leading axes {placement.phy2log.shape[:-1]}: map over them, with jax.vmap or jax.lax.scan"
        )
