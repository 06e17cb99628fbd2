"""Placements as files: both leaves as arrays, and the static parts as JSON, whose numbers are of any size."""

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jax_lplb import _archive
from jax_lplb._checks import check_count
from jax_lplb.topology import Topology

if TYPE_CHECKING:
    from jax_lplb._placement import Placement

_VERSION = 1
_STATIC = ("num_groups", "num_ranks", "planning", "r2o")


def save(placement: "Placement", path: str | os.PathLike[str]) -> None:
    leaves = placement.phy2log, placement.log2phy
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError(
            "a placement with traced leaves has no contents to save yet; return it from the jitted function, and save "
            "it outside"
        )
    phy2log, log2phy = map(np.asarray, leaves)
    static = {
        "num_ranks": placement.num_ranks,
        "num_groups": placement.num_groups,
        "r2o": None if placement.topology is None else placement.topology.r2o.tolist(),
        "planning": None if placement.planning is None else dataclasses.asdict(placement.planning),
    }
    text = json.dumps(static, default=int)  # NumPy's integers as Python's
    try:
        _placement(type(placement), phy2log, log2phy, json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"this placement cannot be saved, as load would refuse it: {error}") from error
    _archive.write(path, version=np.array(_VERSION), phy2log=phy2log, log2phy=log2phy, static=np.array(text))


def load(cls: type["Placement"], path: str | os.PathLike[str]) -> "Placement":
    (version,) = _archive.read(path, "version")
    if version.tolist() != _VERSION:
        raise ValueError(
            f"{path}: expected a placement of version {_VERSION}, found version {version.tolist()!r}; load it by the "
            "release of jax_lplb that saved it, or a newer one"
        )
    phy2log, log2phy, text = _archive.read(path, "phy2log", "log2phy", "static")
    try:
        return _placement(cls, phy2log, log2phy, json.loads(str(text)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a placement: {error}") from error


def _placement(cls: type["Placement"], phy2log: np.ndarray, log2phy: np.ndarray, static: Any) -> "Placement":
    """The placement of these parts, on the host; TypeError or ValueError where they contradict each other."""
    if not isinstance(static, dict) or sorted(static) != list(_STATIC):
        raise ValueError(f"expected the static parts {', '.join(_STATIC)}, found {static}")
    ranks, groups, r2o, planning = (static[name] for name in ("num_ranks", "num_groups", "r2o", "planning"))
    check_count("num_ranks", ranks)
    check_count("num_groups", groups)
    for name, leaf in (("phy2log", phy2log), ("log2phy", log2phy)):
        if leaf.dtype != np.int32:
            raise TypeError(f"{name}: expected int32, found {leaf.dtype}")
    if not (phy2log.ndim and log2phy.ndim == phy2log.ndim + 1 and phy2log.shape[:-1] == log2phy.shape[:-2]):
        raise ValueError(
            "expected phy2log [..., num_physical] and log2phy [..., num_experts, max_replicas], found shapes "
            f"{phy2log.shape} and {log2phy.shape}"
        )
    physical, (experts, replicas) = phy2log.shape[-1], log2phy.shape[-2:]
    if 0 in (physical, experts, replicas) or physical % ranks or ranks % groups:
        raise ValueError(
            f"expected slots of {ranks} ranks in {groups} equal groups, found {physical} slots, {experts} experts and "
            f"room for {replicas} replicas"
        )
    _check_tables(phy2log, log2phy, groups)
    topology = None if r2o is None else Topology(np.asarray(r2o))
    placement = cls(phy2log, log2phy, ranks, groups, topology)
    home, odd = log2phy[..., 0], experts % ranks
    homes, slots = placement.rows_per_rank, placement.slots_per_rank
    if topology is not None and planning is not None:
        raise ValueError("expected a topology or planning, found both")
    if topology is not None and (odd or topology.group_size != placement.group_size or np.any(home % slots >= homes)):
        raise ValueError(
            f"expected the first {homes} slots of each rank to be the homes of experts along the topology, in groups "
            f"of {topology.group_size} ranks, found groups of {placement.group_size} and homes in slots {_few(home)}"
        )
    if planning is None:
        return placement
    of_batch = cls.per_batch(
        num_experts=experts,
        num_ranks=ranks,
        redundants_per_rank=slots - homes,
        num_groups=groups,
        max_replicas=replicas,
        **planning,
    )
    if not np.array_equal(home, np.broadcast_to(of_batch.log2phy[:, 0], home.shape)):
        raise ValueError(f"expected homes in logical order, as planning leaves them, found them in slots {_few(home)}")
    return dataclasses.replace(placement, planning=of_batch.planning)


def _check_tables(phy2log: np.ndarray, log2phy: np.ndarray, num_groups: int) -> None:
    """That both say the same: each slot that holds an expert is in its row, once, home first and padding last."""
    physical, (experts, replicas) = phy2log.shape[-1], log2phy.shape[-2:]
    for name, table, largest in (("phy2log", phy2log, experts - 1), ("log2phy", log2phy, physical - 1)):
        wrong = table[(table < -1) | (table > largest)]
        if wrong.size:
            raise ValueError(f"{name}: expected numbers from -1 to {largest}, found {wrong[0]}")
    there = log2phy >= 0
    if not there[..., 0].all() or np.any(there[..., 1:] & ~there[..., :-1]):
        raise ValueError("log2phy: expected the home of each expert, then its copies, then -1; found -1 before a slot")
    group = log2phy // (physical // num_groups)
    if np.any(there & (group != group[..., :1])):
        raise ValueError(f"log2phy: expected copies within each of {num_groups} groups, found one in another group")
    held = np.full((*phy2log.shape[:-1], physical + 1), -1, np.int32)  # the last is where padding, -1, goes
    expert = np.repeat(np.arange(experts, dtype=np.int32), replicas)
    listed = log2phy.reshape(*phy2log.shape[:-1], -1)
    np.put_along_axis(held, listed, np.broadcast_to(expert, listed.shape), axis=-1)
    slot = np.argwhere(held[..., :-1] != phy2log)
    if slot.size:
        where = tuple(slot[0])
        raise ValueError(
            f"phy2log and log2phy contradict each other: slot {', '.join(map(str, where))} holds expert "
            f"{phy2log[where]} by the former, and {held[where]} by the latter"
        )
    if np.any(np.sum(there, axis=(-2, -1)) != np.sum(phy2log >= 0, axis=-1)):
        raise ValueError("log2phy: expected each slot once, found one twice")


def _few(home: np.ndarray) -> str:
    return f"{home.ravel()[:8].tolist()}{', ...' * (home.size > 8)}"
