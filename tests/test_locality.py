"""`balance(locality=True)`: tokens stay on their rank, then on their node, as far as the quotas allow."""

import dataclasses
import itertools
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

RANKS, EXPERTS, TOKENS, TOP_K = 8, 16, 40, 3
NODES = [None, 2, 4]  # ranks_per_node


def ids_of(rng: np.random.Generator, ranks: int = RANKS, experts: int = EXPERTS) -> np.ndarray:
    """int32 [ranks, tokens, k]: each rank has its own hot experts. Some is padding, and an expert has no tokens."""
    ids = np.stack([helpers.skewed_ids(rng, TOKENS, TOP_K, experts) for _ in range(ranks)])
    ids[rng.random(ids.shape) < 0.1] = -1
    ids[ids == 5] = experts
    return ids


def random_placement(rng: np.random.Generator, ranks: int = RANKS, experts: int = EXPERTS) -> lplb.Placement:
    """Copies of hot experts, and none at home in order, of one shape."""
    slots = np.asarray(helpers.many_replicas(rng, num_experts=experts, num_ranks=ranks, redundants=3).phy2log)
    return lplb.Placement.from_phy2log(rng.permutation(slots.reshape(ranks, -1)).ravel(), ranks, max_replicas=ranks)


@cache
def balancer(**options):
    """Of ids [ranks, tokens, k] on one device: the ranks are an axis of vmap's. All but the ids are the same on all."""

    def run(ids: jax.Array, placement: lplb.Placement, rank_speed: jax.Array | None = None) -> lplb.Balanced:
        balance = partial(lplb.balance, axis_name="ep", rank_speed=rank_speed, **options)
        out = jax.vmap(balance, (0, None), axis_name="ep")(ids, placement)
        return jax.tree.map(lambda leaf: leaf[0], out)._replace(physical_ids=out.physical_ids)

    return jax.jit(run)


def sent(out: lplb.Balanced, ids: np.ndarray) -> np.ndarray:
    """Choices, int [experts, ranks, slots]: all of those of the batch, each at a slot of its expert."""
    physical, phy2log = np.asarray(out.physical_ids), np.asarray(out.placement.phy2log)
    experts = len(out.load)
    rank = np.broadcast_to(np.arange(len(ids))[:, None, None], ids.shape)
    valid = (ids >= 0) & (ids < experts)
    np.testing.assert_array_equal(physical[~valid], -1)
    np.testing.assert_array_equal(phy2log[physical[valid]], ids[valid])
    result = np.zeros((experts, len(ids), len(phy2log)), int)
    np.add.at(result, (ids[valid], rank[valid], physical[valid]), 1)
    return result


def stay(choices: np.ndarray, size: int) -> int:
    """How many choices stay within groups of so many ranks."""
    _, ranks, slots = choices.shape
    return int(choices.reshape(-1, ranks // size, size, ranks // size, slots // ranks * size).trace(0, 1, 3).sum())


def most_that_could_stay(choices: np.ndarray, size: int) -> int:
    """With the same quotas. Each group keeps all tokens that it has of an expert, or all that its slots take of it."""
    experts, ranks, _ = choices.shape
    has = choices.sum(axis=2).reshape(experts, ranks // size, size).sum(axis=2)
    takes = choices.sum(axis=1).reshape(experts, ranks // size, -1).sum(axis=2)
    return int(np.minimum(has, takes).sum())


def reference(ids: np.ndarray, out: lplb.Balanced, ranks_per_node: int | None) -> np.ndarray:
    """Physical ids, token after token, given what each slot takes.

    In steps, for groups of 1, ranks_per_node and all ranks: tokens that are left, rank after rank, go to quotas that
    are left, replica after replica. A token is numbered among those of its group, and goes to the first replica there
    whose part of them it is in; parts are evenly spread over what the ones before left.
    """
    ranks, per_rank = len(ids), len(out.placement.phy2log) // len(ids)
    by_rank = ids.reshape(ranks, -1)
    quotas = sent(out, ids).sum(axis=(0, 1)).tolist()
    result = np.full_like(by_rank, -1)

    def place(queue: list[tuple[int, int]], takes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those that none takes."""
        over = []
        for index, token in enumerate(queue):
            number, left = index, len(queue)
            for slot, quota in takes:
                before = number * quota // left
                if (number + 1) * quota // left > before:
                    result[token] = slot
                    break
                number, left = number - before, left - quota
            else:
                over.append(token)
        return over

    for expert, row in enumerate(np.asarray(out.placement.log2phy)):
        slots = [slot for slot in row.tolist() if slot >= 0]
        groups = [[(rank, token) for token in np.flatnonzero(by_rank[rank] == expert)] for rank in range(ranks)]
        for size in (1, ranks_per_node or 1, ranks):
            merged = len(groups) * size // ranks  # so many smaller groups are one
            groups = [list(itertools.chain(*groups[n : n + merged])) for n in range(0, len(groups), merged)]
            for n, queue in enumerate(groups):
                takes, left = [], len(queue)
                for slot in slots:
                    if slot // (per_rank * size) == n:
                        takes.append((slot, min(quotas[slot], left)))
                        left -= takes[-1][1]
                        quotas[slot] -= takes[-1][1]
                groups[n] = place(queue, takes)
    return result.reshape(ids.shape)


def check(near: lplb.Balanced, far: lplb.Balanced, ids: np.ndarray, ranks_per_node: int | None) -> None:
    """Only where tokens of which rank go is another than without locality; and no more of them could stay."""
    for name in ("load", "rank_load", "gap", "status", "lower_bound", "placement"):
        jax.tree.map(np.testing.assert_array_equal, getattr(near, name), getattr(far, name))
    of_near, of_far = sent(near, ids), sent(far, ids)
    np.testing.assert_array_equal(of_near.sum(axis=1), of_far.sum(axis=1), err_msg="quotas")
    ranks = of_near.sum(axis=(0, 1)).reshape(len(ids), -1).sum(axis=1)
    np.testing.assert_array_equal(near.rank_load, ranks)
    for size in (1, ranks_per_node or 1):
        assert stay(of_near, size) == most_that_could_stay(of_near, size) > stay(of_far, size)
    np.testing.assert_array_equal(near.physical_ids, reference(ids, near, ranks_per_node))


@pytest.mark.parametrize(("implementation", "ranks_per_node"), [("ffi", None), ("ffi", 2), ("ffi", 4), ("xla", 2)])
@pytest.mark.smoke
def test_as_many_tokens_stay_as_the_quotas_allow(platform, implementation, rng, ranks_per_node):
    for _ in range(3):
        ids, place = ids_of(rng), random_placement(rng)
        far = balancer(implementation=implementation)(ids, place)
        near = balancer(implementation=implementation, locality=True, ranks_per_node=ranks_per_node)(ids, place)
        check(near, far, ids, ranks_per_node)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), skew=st.floats(0, 3), empty=st.integers(0, RANKS))
@pytest.mark.parametrize("ranks_per_node", NODES)
def test_any_loads_and_placements(platform, ranks_per_node, seed, skew, empty):
    """Tokens of few experts, ranks without tokens, and copies anywhere: the custom call against the rule."""
    rng = np.random.default_rng(seed)
    ids, place = rng.geometric(1 / (1 + skew), (RANKS, TOKENS, TOP_K)).astype(np.int32) - 1, random_placement(rng)
    ids[rng.permutation(RANKS)[:empty]] = -1
    near = balancer(implementation="ffi", locality=True, ranks_per_node=ranks_per_node)(ids, place)
    far = balancer(implementation="ffi")(ids, place)
    np.testing.assert_array_equal(near.rank_load, far.rank_load)
    np.testing.assert_array_equal(near.physical_ids, reference(ids, near, ranks_per_node))


def test_a_node_of_all_ranks_or_of_one_is_as_none(platform, rng):
    """One that there is nothing beyond, or within."""
    ids, place = ids_of(rng), random_placement(rng)
    for nodes in (1, RANKS):
        near = balancer(implementation="ffi", locality=True, ranks_per_node=nodes)(ids, place)
        np.testing.assert_array_equal(near.physical_ids, reference(ids, near, None))


def kinds_of_placements() -> dict[str, lplb.Placement]:
    rng = np.random.default_rng(2)
    many = helpers.many_replicas(rng, num_experts=144, num_ranks=24, redundants=6)
    return {
        "copies chosen by the batch": lplb.Placement.per_batch(num_experts=16, num_ranks=8, redundants_per_rank=2),
        "experts that ranks do not divide": lplb.Placement.per_batch(
            num_experts=19, num_ranks=8, redundants_per_rank=2
        ),
        "two replicas, by edge balance": helpers.placement(helpers.topology.cube(), 16, 8, 2),
        "groups": helpers.placement(helpers.topology.ring(4), 16, 8, 1),
        "no copies": helpers.placement(helpers.topology.ring(8), 16, 8, 0),
        "many replicas": many,
        "one everywhere": helpers.everywhere(12),
    }


@pytest.mark.parametrize("kind", kinds_of_placements())
def test_kinds_of_placements(platform, kind, rng):
    place = kinds_of_placements()[kind]
    nodes = place.num_ranks // 2
    ids = ids_of(rng, place.num_ranks, place.num_experts)
    near = balancer(implementation="ffi", locality=True, ranks_per_node=nodes)(ids, place)
    far = balancer(implementation="ffi")(ids, place)
    np.testing.assert_array_equal(near.rank_load, far.rank_load)
    np.testing.assert_array_equal(near.physical_ids, reference(ids, near, nodes))
    assert kind == "no copies" or stay(sent(near, ids), 1) > stay(sent(far, ids), 1)


@pytest.mark.parametrize("kind", ["copies chosen by the batch", "two replicas, by edge balance", "many replicas"])
def test_ranks_of_different_speeds(platform, kind, rng):
    place = kinds_of_placements()[kind]
    ids, speed = ids_of(rng, place.num_ranks, place.num_experts), np.linspace(1, 2, place.num_ranks, dtype=np.float32)
    speed[3] = 0
    far, near = (balancer(implementation="ffi", locality=locality)(ids, place, speed) for locality in (False, True))
    np.testing.assert_array_equal(near.rank_load, far.rank_load)
    np.testing.assert_array_equal(near.physical_ids, reference(ids, near, None))
    assert not np.array_equal(near.rank_load, balancer(implementation="ffi")(ids, place).rank_load)


def test_several_replicas_on_a_rank(platform, implementation, rng):
    """As no constructor makes them: they are filled one after the other."""
    place, ids = random_placement(rng), ids_of(rng)
    log2phy, phy2log = np.array(place.log2phy), np.array(place.phy2log)
    phy2log[:3], phy2log[-2:] = 3, 3
    log2phy[3] = [39, 1, 20, 0, 2, 38, -1, -1]
    phy2log[20] = 3
    place = dataclasses.replace(place, log2phy=log2phy, phy2log=phy2log)
    only = np.where(ids % 3 == 0, 3, -1).astype(np.int32)
    near = balancer(implementation=implementation, locality=True, ranks_per_node=2)(only, place)
    np.testing.assert_array_equal(near.physical_ids, reference(only, near, 2))


def test_garbage_stays_in_bounds(platform, implementation, rng):
    """Contents that no constructor gives: tokens go to slots, or nowhere."""
    place, ids = random_placement(rng), ids_of(rng)
    for bad in helpers.garbage(place, rng).values():
        near = balancer(implementation=implementation, locality=True, ranks_per_node=2)(ids, bad)
        physical = np.asarray(near.physical_ids)
        assert physical.min() >= -1
        assert physical.max() < place.num_physical


def test_num_sms_changes_nothing(platform, rng):
    ids, place = ids_of(rng), random_placement(rng)
    options = {"implementation": "ffi", "locality": True, "ranks_per_node": 4}
    few, all_of_them = balancer(num_sms=1, **options)(ids, place), balancer(**options)(ids, place)
    np.testing.assert_array_equal(few.physical_ids, all_of_them.physical_ids)


@pytest.mark.parametrize(("sync", "axis_type"), [("all_gather", AxisType.Explicit), ("peer", AxisType.Auto)])
def test_ranks_of_a_mesh_do_what_ranks_under_vmap_do(mesh, sync, axis_type, rng):
    """A stack of layers, each with copies of its own, under scan; and by each kind of sync."""
    ranks = mesh.size
    mesh = jax.make_mesh((ranks,), ("ep",), axis_types=(axis_type,), devices=mesh.devices.ravel())
    options = {"locality": True, "ranks_per_node": ranks // 2, "implementation": "ffi"}
    layers = [(ids_of(rng, ranks), random_placement(rng, ranks)) for _ in range(3)]
    ids = np.stack([ids.reshape(ranks * TOKENS, TOP_K) for ids, _ in layers])
    placements = jax.tree.map(lambda *leaves: np.stack(leaves), *[place for _, place in layers])

    def balance(_, layer):
        return None, lplb.balance(*layer, axis_name="ep", sync=sync, **options).physical_ids

    def run(ids, placements):
        return jax.lax.scan(balance, None, (ids, placements))[1]

    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(None, "ep"), P()), out_specs=P(None, "ep")))
    place = partial(jax.device_put, ids, jax.NamedSharding(mesh, P(None, "ep")))
    physical = run(place(), jax.device_put(placements, jax.NamedSharding(mesh, P())))
    for got, (of_ranks, placement) in zip(physical, layers, strict=True):
        expected = balancer(**options)(of_ranks, placement).physical_ids
        np.testing.assert_array_equal(np.asarray(got).reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"locality": 1}, TypeError, "locality must be True or False, got 1"),
        ({"axis_name": None}, ValueError, "locality = True needs .*axis_name is None.*name the mesh axis"),
        ({"load": np.ones(EXPERTS, np.float32)}, ValueError, "locality = True needs .*load is given.*leave out load"),
        ({"sync": "psum"}, ValueError, "locality = True needs .*'psum' .*pass sync='all_gather'"),
        ({"ranks_per_node": 3}, ValueError, "ranks_per_node must divide the 8 ranks of placement, got 3"),
        ({"ranks_per_node": 0}, ValueError, "ranks_per_node must be at least 1, got 0"),
        ({"ranks_per_node": 2.0}, TypeError, r"ranks_per_node must be an integer, got 2\.0"),
        ({"ranks_per_node": 2, "locality": False}, ValueError, "ranks_per_node = 2 is for locality=True; pass that"),
    ],
)
def test_refuses(changed, error, message, rng):
    ids, place = ids_of(rng), random_placement(rng)
    options = {"axis_name": "ep", "locality": True} | changed
    run = partial(lplb.balance, placement=place, **options)
    with pytest.raises(error, match=message):
        jax.eval_shape(jax.vmap(run, axis_name="ep"), ids)


def test_many_slots_are_for_pure_jax(rng):
    """Those that the custom calls take without locality, in groups, and not with it."""
    place = helpers.placement(helpers.topology.ring(8), 2048, 16, 8)
    ids = np.zeros((16, 4, 1), np.int32)

    def run(**options):
        return jax.eval_shape(jax.vmap(partial(lplb.balance, placement=place, **options), axis_name="ep"), ids)

    with pytest.raises(ValueError, match=r"has 2176 physical experts, .* at most 2048 .*implementation='xla'"):
        run(axis_name="ep", locality=True)
    run(axis_name="ep", locality=True, implementation="xla")
    run(axis_name="ep")
