"""`balance(locality=True)`: tokens stay on their rank, then on their node, as far as the quotas allow."""

from functools import cache, partial

import helpers
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_lplb as lplb

NUM_RANKS, NUM_EXPERTS, TOKENS, TOP_K = 8, 16, 40, 3
NODES = [None, 2, 4, 8]  # ranks_per_node


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def mesh(request) -> jax.sharding.Mesh:
    devices = jax.devices(request.param)
    if len(devices) < 2:
        pytest.skip(f"needs two {request.param} devices, found {len(devices)}")
    ranks = min(len(devices), NUM_RANKS)
    return jax.make_mesh((ranks,), ("ep",), axis_types=(AxisType.Auto,), devices=devices[:ranks])


def ids_of(rng: np.random.Generator, num_ranks: int = NUM_RANKS) -> np.ndarray:
    """Each rank likes experts of its own; some ids are padding, and one expert has no tokens."""
    parts = [helpers.skewed_ids(rng, TOKENS, TOP_K, NUM_EXPERTS) for _ in range(num_ranks)]
    ids = np.concatenate(parts)
    ids[rng.random(ids.shape) < 0.1] = -1
    ids[ids == 5] = NUM_EXPERTS
    return ids


def random_placement(rng: np.random.Generator, num_ranks: int = NUM_RANKS) -> lplb.Placement:
    """Copies of hot experts, in any order of ranks."""
    place = helpers.many_replicas(rng, num_experts=NUM_EXPERTS, num_ranks=num_ranks, redundants=3)
    slots = rng.permutation(np.asarray(place.phy2log).reshape(num_ranks, -1)).ravel()
    return lplb.Placement.from_phy2log(slots, num_ranks, max_replicas=num_ranks)


@cache
def balancer(mesh, **options):
    run = partial(lplb.balance, axis_name="ep", **options)
    specs = lplb.Balanced(P("ep"), *[P()] * 6)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P("ep"), P()), out_specs=specs))


def traffic(out: lplb.Balanced, ids: np.ndarray, place: lplb.Placement) -> np.ndarray:
    """int [num_experts, ranks of tokens, num_physical], checked to be all choices, each at a replica of its expert."""
    physical = np.asarray(out.physical_ids)
    ranks = place.num_ranks
    rank = np.broadcast_to(np.repeat(np.arange(ranks), len(ids) // ranks)[:, None], ids.shape)
    valid = (ids >= 0) & (ids < place.num_experts)
    np.testing.assert_array_equal(physical >= 0, valid)
    np.testing.assert_array_equal(np.asarray(out.placement.phy2log)[physical[valid]], ids[valid])
    result = np.zeros((place.num_experts, ranks, place.num_physical), int)
    np.add.at(result, (ids[valid], rank[valid], physical[valid]), 1)
    return result


def most_within(sent: np.ndarray, slots_per_rank: int, size: int) -> int:
    """Choices that could stay within groups of so many ranks, given what each slot gets, by the bounds of a flow.

    Experts and groups are on their own: a group keeps what it has of an expert, or what its slots take of it.
    """
    experts, ranks, _ = sent.shape
    has = sent.sum(axis=2).reshape(experts, ranks // size, size).sum(axis=2)
    takes = sent.sum(axis=1).reshape(experts, ranks // size, size * slots_per_rank).sum(axis=2)
    return int(np.minimum(has, takes).sum())


def within(sent: np.ndarray, slots_per_rank: int, size: int) -> int:
    """Choices that did."""
    ranks, slots = np.arange(sent.shape[1]), np.arange(sent.shape[2])
    return int(sent[:, ranks[:, None] // size == slots[None, :] // (slots_per_rank * size)].sum())


def check(near, far, ids, place, ranks_per_node) -> None:
    """Everything but where tokens of which rank go is as without locality; and no more could stay."""
    for name in ("load", "rank_load", "gap", "status", "lower_bound"):
        np.testing.assert_array_equal(getattr(near, name), getattr(far, name), err_msg=name)
    sent, without = (traffic(out, ids, place) for out in (near, far))
    np.testing.assert_array_equal(sent.sum(axis=1), without.sum(axis=1), err_msg="quotas")
    per_rank = place.slots_per_rank
    for size in (1, ranks_per_node or 1):
        assert within(sent, per_rank, size) == most_within(sent, per_rank, size) >= within(without, per_rank, size)


def reference(ids: np.ndarray, placement: lplb.Placement, quotas: np.ndarray, ranks_per_node: int | None) -> np.ndarray:
    """Physical ids, token after token, given what each slot takes.

    In steps, for groups of 1, ranks_per_node and all ranks: tokens that are left, rank after rank, to quotas that are
    left, replica after replica. A token is numbered among those of its group, and goes to the first replica, of its
    group too, whose part of them, evenly spread over what the ones before left, it is in.
    """
    ranks = placement.num_ranks
    by_rank = ids.reshape(ranks, -1)
    result = np.full_like(by_rank, -1)
    for expert, row in enumerate(np.asarray(placement.log2phy)):
        slots = [slot for slot in row.tolist() if slot >= 0]
        open_quota = {slot: int(quotas[slot]) for slot in slots}
        waiting = [np.flatnonzero(tokens == expert).tolist() for tokens in by_rank]
        for size in (1, ranks_per_node or 1, ranks):
            for first in range(0, ranks, size):
                group = range(first, first + size)
                queue = [(rank, token) for rank in group for token in waiting[rank]]
                takes, left = [], len(queue)
                for slot in slots:
                    if slot // placement.slots_per_rank in group:
                        takes.append((slot, min(open_quota[slot], left)))
                        left -= takes[-1][1]
                        open_quota[slot] -= takes[-1][1]
                for number, (rank, token) in enumerate(queue):
                    left = len(queue)
                    for slot, quota in takes:
                        before = number * quota // left
                        if (number + 1) * quota // left > before:
                            result[rank, token] = slot
                            waiting[rank].remove(token)
                            break
                        number, left = number - before, left - quota  # noqa: PLW2901
    return result.reshape(ids.shape)


@pytest.mark.parametrize("ranks_per_node", NODES)
def test_first(mesh, ranks_per_node, rng):
    for _ in range(20):
        ids, place = ids_of(rng), random_placement(rng)
        far = balancer(mesh, implementation="ffi")(ids, place)
        for implementation in ("ffi", "xla"):
            near = balancer(mesh, locality=True, ranks_per_node=ranks_per_node, implementation=implementation)(ids, place)
            quotas = np.bincount(np.asarray(near.physical_ids)[near.physical_ids >= 0], minlength=place.num_physical)
            np.testing.assert_array_equal(near.physical_ids, reference(ids, place, quotas, ranks_per_node))
            if implementation == "ffi":
                check(near, far, ids, place, ranks_per_node)
