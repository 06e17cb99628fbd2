"""Placements chosen by load: on the host by packing and by EPLB, on the device by `select`."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import optimum, topology
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_lplb as lplb
from jax_lplb import eplb

INT32 = np.iinfo(np.int32)


def along(topo, load, *, redundants, num_ranks=None, by_load=True, repeats=False) -> lplb.Placement:
    return lplb.Placement.from_topology(
        topo,
        num_experts=np.shape(load)[-1],
        num_ranks=num_ranks or topo.group_size,
        redundants_per_rank=redundants,
        load=load if by_load else None,
        repeats=repeats,
    )


def check(place: lplb.Placement) -> None:
    """Both leaves agree, and no rank holds an expert twice."""
    phy2log, log2phy = np.asarray(place.phy2log), np.asarray(place.log2phy)
    assert phy2log.dtype == log2phy.dtype == np.int32
    for expert, row in enumerate(log2phy.tolist()):
        slots = [slot for slot in row if slot >= 0]
        assert row == slots + [-1] * (len(row) - len(slots))
        assert sorted(slots) == np.flatnonzero(phy2log == expert).tolist()
        ranks = [slot // place.slots_per_rank for slot in slots]
        assert len(set(ranks)) == len(ranks) >= 1


def even_split(phy2log: np.ndarray, load: np.ndarray, num_ranks: int) -> float:
    """Largest rank load where each slot takes an even part of its expert's load."""
    part = load / np.bincount(phy2log, minlength=len(load))
    return part[phy2log].reshape(num_ranks, -1).sum(axis=1).max()


# ---- LPLB's way: packed, and copies of the heaviest ------------------------------------------------------------------


@pytest.mark.parametrize(("topo", "num_ranks"), [(topology.cube(), 8), (topology.ring(4), 8)])
def test_topology_by_load(rng, topo, num_ranks):
    load = rng.permutation(64)  # no ties
    place = along(topo, load, redundants=2, num_ranks=num_ranks)
    check(place)
    packed, _, _ = eplb.rebalance_experts(load[None], 64, 1, 1, num_ranks)
    by_rank = place.phy2log.reshape(num_ranks, -1)
    homes = by_rank[:, : 64 // num_ranks]
    np.testing.assert_array_equal(homes.ravel(), packed[0])
    np.testing.assert_array_equal(
        place.log2phy[homes, 0] // place.slots_per_rank, np.arange(num_ranks)[:, None] + 0 * homes
    )
    assert np.all(np.diff(load[homes], axis=1) < 0)
    size = topo.group_size
    for rank in range(num_ranks):
        for copy in range(2):
            owner = rank // size * size + topo.r2o[rank % size, copy % topo.num_columns]
            heaviest = homes[owner, copy]
            assert by_rank[rank, -2 + copy] == heaviest
            assert np.sum(load[homes[owner]] > load[heaviest]) == copy


def test_topology_by_load_in_layers_and_without_copies(rng):
    loads = rng.lognormal(0, 1, (2, 3, 64))
    for redundants in (0, 2):
        places = along(topology.cube(), loads, redundants=redundants)
        assert places.phy2log.shape == (2, 3, 64 + 8 * redundants)
        for index in np.ndindex(2, 3):
            one = along(topology.cube(), loads[index], redundants=redundants)
            check(one)
            np.testing.assert_array_equal(places.phy2log[index], one.phy2log)
            np.testing.assert_array_equal(places.log2phy[index], one.log2phy)


# ---- EPLB ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_eplb_optimum_is_no_worse_than_its_even_split(data):
    """Of any load: the one it was placed by, and others; with ties and several nodes. Zeros count as ones."""
    ranks, home = data.draw(st.sampled_from([(2, 3), (4, 2), (6, 4), (8, 8)]))
    nodes = data.draw(st.sampled_from([1, 2]))
    experts = ranks * home
    redundants = data.draw(st.integers(0, min(4, experts - home)))
    load = st.one_of(
        st.lists(st.integers(0, 10**6), min_size=experts, max_size=experts),
        st.lists(st.integers(0, 3), min_size=experts, max_size=experts),
        st.integers(0, 1).map(lambda each: np.full(experts, each)),
        st.lists(st.floats(-5, 5), min_size=experts, max_size=experts).map(lambda row: np.rint(np.exp(row) * 100)),
        st.integers(0, experts - 1).map(lambda hot: np.eye(experts)[hot] * 1000),
    )
    past = np.array(data.draw(load), np.float64)
    place = lplb.Placement.from_eplb(
        past, num_ranks=ranks, redundants_per_rank=redundants, num_groups=nodes, num_nodes=nodes
    )
    check(place)
    known = past if past.any() else np.ones(experts)
    raw = eplb.rebalance_experts(known[None], experts + ranks * redundants, nodes, nodes, ranks)[0][0]
    for now in (past, np.array(data.draw(load), np.float64)):
        assert optimum(now, place).max() <= even_split(raw, now, ranks) * (1 + 1e-9) + 1e-9


def test_second_replicas_give_way_in_place():
    """Expert 0 has three replicas on two ranks: the second on one becomes that with most a replica, absent from there.

    All the others have one.
    """
    load = np.array([100, 9, 8, 7])
    raw = eplb.rebalance_experts(load[None], 6, 1, 1, 2)[0][0]
    place = lplb.Placement.from_eplb(load, num_ranks=2, redundants_per_rank=1)
    changed = np.flatnonzero(raw != place.phy2log)
    assert raw[changed].tolist() == [0]
    rank = changed[0] // 3
    absent = sorted(set(range(4)) - set(raw.reshape(2, 3)[rank].tolist()), key=lambda e: -load[e])
    assert place.phy2log[changed[0]] == absent[0]


def imbalance(place: lplb.Placement, loads: np.ndarray) -> float:
    """The mean of the best that the copies allow."""
    return float(np.mean([optimum(load, place).max() / (load.sum() / place.num_ranks) for load in loads]))


SAYS_LITTLE = {
    "equal loads": (np.ones(64), {}, 1.12),
    "zeros": (np.zeros(64), {}, 1.12),
    "zeros, at most two replicas": (np.zeros(64), {"max_replicas": 2}, 1.1),
    "equal loads on two nodes": (np.ones(64), {"num_groups": 4, "num_nodes": 2}, 1.22),
    "zeros on two nodes": (np.zeros(64), {"num_groups": 4, "num_nodes": 2}, 1.22),
    "half three times the other": (np.repeat([3, 1], 32), {}, 1.6),
}


@pytest.mark.parametrize("case", SAYS_LITTLE)
def test_copies_spread_over_experts_where_loads_tie(rng, case):
    """64 experts, 4 copies on each of 16 ranks: not all of the lowest-numbered, and so of use to loads that come."""
    past, options, most = SAYS_LITTLE[case]
    place = lplb.Placement.from_eplb(past, num_ranks=16, redundants_per_rank=4, **options)
    check(place)
    loads = np.rint(rng.lognormal(0, 1, (40, 64)) * 100)
    assert imbalance(place, loads) < most
    if not options and past.all() and np.ptp(past) == 0:
        replicas = np.bincount(place.phy2log, minlength=64)
        assert replicas.max() <= 3
        assert np.sum(replicas == 1) <= 1


def test_as_many_replicas_as_ranks_always_have_room(rng):
    """As the error of a smaller number says."""
    for _ in range(100):
        ranks, home = rng.choice([2, 4, 6]), rng.integers(1, 4)
        experts = ranks * home
        redundants = rng.integers(0, experts - home + 1)
        load = rng.choice([rng.integers(0, 3, experts), np.zeros(experts), rng.lognormal(0, 2, experts)])
        numbers = {"num_ranks": ranks, "redundants_per_rank": redundants}
        check(lplb.Placement.from_eplb(load, **numbers, max_replicas=ranks))
    with pytest.raises(ValueError, match=r"max_replicas = 1 is too small.* num_ranks = 4 is enough"):
        lplb.Placement.from_eplb(np.arange(8), num_ranks=4, redundants_per_rank=1, max_replicas=1)


def test_room_that_is_just_enough(rng):
    """Every expert then has as many replicas as it may have, no two of them on one rank."""
    for most in (2, 3, 5):
        for load in (np.ones(32), np.zeros(32), rng.lognormal(0, 2, 32), rng.integers(0, 3, 32)):
            redundants = 4 * (most - 1)
            place = lplb.Placement.from_eplb(load, num_ranks=8, redundants_per_rank=redundants, max_replicas=most)
            check(place)
            np.testing.assert_array_equal(np.bincount(place.phy2log), most)


def test_replacements_stay_on_their_node():
    load = np.array([1000, 1, 1, 1, 900, 800, 700, 600.0])
    place = lplb.Placement.from_eplb(load, num_ranks=4, redundants_per_rank=1, num_groups=2, num_nodes=2)
    raw = eplb.rebalance_experts(load[None], 12, 2, 2, 4)[0][0]
    assert np.any(raw != place.phy2log)
    nodes = [set(node.tolist()) for node in place.phy2log.reshape(2, 6)]
    assert sorted(map(sorted, nodes)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    check(place)


@pytest.mark.parametrize("most", [2, 3, 8])
def test_room_for_replicas(rng, most):
    loads = rng.lognormal(0, 2, (5, 64))
    places = lplb.Placement.from_eplb(loads, num_ranks=8, redundants_per_rank=4, max_replicas=most)
    assert places.log2phy.shape == (5, 64, most)
    for layer in range(5):
        check(jax.tree.map(lambda leaf, layer=layer: leaf[layer], places))


def test_eplb_placements_replace_each_other_without_recompiling(rng):
    """As arguments of a jitted step that donates its state."""
    traces = 0

    @partial(jax.jit, donate_argnums=0)
    def step(total, ids, place):
        nonlocal traces
        traces += 1
        out = lplb.balance(ids, place)
        return total.at[out.physical_ids].add(1), out.rank_load

    ids = rng.integers(0, 64, (512, 4)).astype(np.int32)
    total = jnp.zeros(96, jnp.int32)
    for _ in range(4):
        load = rng.lognormal(0, 1.5, 64)
        place = lplb.Placement.from_eplb(load, num_ranks=8, redundants_per_rank=4, max_replicas=6)
        before = total
        total, rank_load = step(total, ids, jax.device_put(place))
        assert before.is_deleted()
        assert int(rank_load.sum()) == ids.size
    assert traces == step._cache_size() == 1
    assert int(total.sum()) == 4 * ids.size


# ---- Chosen on the device --------------------------------------------------------------------------------------------


def reselected(place: lplb.Placement, load: np.ndarray, repeats: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Slot by slot, as the documentation of `select` and `from_topology` says."""
    topo, slots = place.topology, place.slots_per_rank
    home, size = place.num_experts // place.num_ranks, topo.group_size
    phy2log, log2phy = np.array(place.phy2log).reshape(-1, slots), np.array(place.log2phy)
    copies: dict[int, list[int]] = {expert: [] for expert in range(place.num_experts)}
    load = [Fraction(max(float(tokens), 0)) for tokens in load]
    for copy in range(slots - home):
        for rank in range(place.num_ranks):
            owner = rank // size * size + topo.r2o[rank % size, copy % topo.num_columns]
            experts = phy2log[owner, :home].tolist()
            if repeats:
                free = [e for e in experts if rank not in [slot // slots for slot in copies[e]]]
                expert = min(free, key=lambda e: (-load[e] / (1 + len(copies[e])), len(copies[e]), e))
            else:
                expert = sorted(experts, key=lambda e: (-load[e], e))[copy]
            phy2log[rank, home + copy] = expert
            copies[expert].append(rank * slots + home + copy)
    log2phy[:, 1:] = -1
    for expert, of_expert in copies.items():
        log2phy[expert, 1 : 1 + len(of_expert)] = sorted(of_expert)
    return phy2log.ravel(), log2phy


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint8])
@pytest.mark.parametrize(
    ("topo", "num_ranks", "redundants"),
    [(topology.cube(), 8, 2), (topology.cube(), 16, 4), (topology.ring(4), 4, 16), (topology.ring(2), 2, 0)],
)
def test_select(platform, rng, topo, num_ranks, redundants, dtype):
    select = jax.jit(lplb.Placement.select)
    for by_load in (False, True):
        place = along(topo, rng.lognormal(0, 1, 64), redundants=redundants, num_ranks=num_ranks, by_load=by_load)
        for load in (rng.integers(0, 200, 64), rng.integers(0, 3, 64), np.zeros(64)):
            check_selected(select, place, load.astype(dtype))


def check_selected(select, place: lplb.Placement, load: np.ndarray, repeats: bool = False) -> None:
    """And chosen again, from what was chosen; home slots stay."""
    chosen, home = place, place.num_experts // place.num_ranks
    phy2log, log2phy = reselected(place, load, repeats)
    for _ in range(2):
        chosen = select(chosen, load)
        check(chosen)
        np.testing.assert_array_equal(chosen.phy2log, phy2log)
        np.testing.assert_array_equal(chosen.log2phy, log2phy)
        np.testing.assert_array_equal(chosen.home_order, place.home_order)
        np.testing.assert_array_equal(chosen.home_rank, place.home_rank)
        by_rank = [np.reshape(leaf, (place.num_ranks, -1))[:, :home] for leaf in (chosen.phy2log, place.phy2log)]
        np.testing.assert_array_equal(*by_rank)


# Rank i's copies go to ranks i - 1, twice, and i - 3: two columns, and further rounds of them, lead to one rank.
TWICE = topology.from_r2o((np.arange(8)[:, None] + [1, 1, 3]) % 8)
REPEATS = {
    "cube": (topology.cube(), 8, 2, 3),
    "two cubes, two rounds": (topology.cube(), 16, 4, 3),
    "a column twice, two rounds": (TWICE, 8, 6, 3),
    "hypercube": (topology.hypercube(), 16, 2, 3),
    "one home expert": (topology.torus(8, 8), 64, 2, 3),
    "ring": (topology.ring(4), 4, 3, 2),
    "no copies": (topology.cube(), 8, 0, 1),
}


@pytest.mark.parametrize("case", REPEATS)
def test_select_with_repeats(platform, rng, case):
    """A hot expert goes along several columns, never twice to one rank; by loads of all dtypes, with ties."""
    topo, num_ranks, redundants, room = REPEATS[case]
    select = jax.jit(lplb.Placement.select)
    options = {"redundants": redundants, "num_ranks": num_ranks, "repeats": True}
    place = along(topo, np.zeros(64), by_load=False, **options)
    assert place.max_replicas == room
    check(place)
    uneven = rng.lognormal(0, 1.5, 64)
    loads = [
        uneven.astype(np.float32),
        np.where(rng.random(64) < 0.5, np.nan, uneven).astype(np.float32),
        rng.integers(0, 7, 64).astype(np.int32),
        (rng.integers(1, 4, 64) * (2**29 - 1) // 12 * 4).astype(np.int32),  # thirds and halves of them are whole
        np.zeros(64, np.int32),
    ]
    for load in loads:
        check_selected(select, place, np.nan_to_num(load), repeats=True)
        np.testing.assert_array_equal(select(place, load).phy2log, select(place, np.nan_to_num(load)).phy2log)
    replicas = np.bincount(select(place, loads[0]).phy2log)
    assert replicas.max() == room
    if room > 2:
        assert replicas.min() == 1 or redundants == 64 // num_ranks * topo.num_columns
    by_past = along(topo, uneven, **options)
    check(by_past)
    np.testing.assert_array_equal(by_past.log2phy, reselected(by_past, uneven, repeats=True)[1])
    np.testing.assert_array_equal(by_past.home_order, along(topo, uneven, **options | {"redundants": 0}).home_order)


@pytest.mark.parametrize(
    ("first", "second", "sent"),
    [
        (2**29 + 2, 2**28, [0, 0, 1]),  # half of the first is more than the second by one, which float32 rounds off
        (2**29, 2**28, [0, 1, 0]),  # as much: to that with fewer replicas
        (2**29 - 2, 2**28, [0, 1, 0]),
        (3 * (2**27 + 1), 2**27 + 1, [0, 0, 1]),
        (3 * (2**27 + 1) + 1, 2**27 + 1, [0, 0, 0]),
    ],
)
def test_loads_of_replicas_are_compared_exactly(first, second, sent):
    """Of loads that float32 cannot tell apart, to three other ranks."""
    topo = topology.from_r2o((np.arange(8)[:, None] + [1, 2, 3]) % 8)
    place = along(topo, np.zeros(16), redundants=3, by_load=False, repeats=True)
    load = np.zeros(16, np.int32)
    load[:2] = first, second
    chosen = np.asarray(place.select(load).phy2log).reshape(8, 5)
    assert [chosen[-step, 1 + step] for step in (1, 2, 3)] == sent


def test_repeats_reach_what_single_copies_cannot(rng):
    """An expert that is hotter than two ranks can carry; and without repeats such a placement is the narrow one."""
    load = rng.integers(50, 100, 64).astype(np.int32)
    load[5] = load.sum() // 4
    for by_load in (False, True):
        narrow, wide = (
            along(topology.cube(), load, redundants=2, by_load=by_load, repeats=repeats).select(load)
            for repeats in (False, True)
        )
        assert optimum(load, wide)[0] < 0.85 * optimum(load, narrow)[0]
        for solver in ("auto", "ipm"):
            solution = lplb.solve(load, wide, solver=solver)
            assert solution.rank_load.max() <= optimum(load, wide)[0] * (1 + 2e-4)
        single = wide.select(load, repeats=False)
        np.testing.assert_array_equal(single.phy2log, narrow.phy2log)
        np.testing.assert_array_equal(single.log2phy[:, :2], narrow.log2phy)
        np.testing.assert_array_equal(single.log2phy[:, 2], -1)


def test_select_by_the_load_it_was_placed_by_changes_nothing(rng):
    load = rng.integers(0, 1000, 64).astype(np.int32)
    place = along(topology.cube(), load, redundants=2)
    chosen = place.select(load)
    # Ties aside, of which the packing knows nothing.
    np.testing.assert_array_equal(load[chosen.phy2log], load[place.phy2log])


@pytest.mark.parametrize("repeats", [False, True])
def test_select_in_a_jitted_loop_compiles_once(platform, rng, repeats):
    """1,000 steps, a moving average of the load, new copies in each, balanced by them."""
    place = along(topology.cube(), np.ones(32), redundants=2, by_load=False, repeats=repeats)
    traces = 0

    @jax.jit
    def run(place, ids):
        nonlocal traces
        traces += 1

        def step(carry, ids):
            place, average = carry
            place = place.select(average)
            out = lplb.balance(ids, place)
            average = 0.9 * average + 0.1 * out.load.astype(jnp.float32)
            return (place, average), (out.rank_load, place.phy2log)

        return jax.lax.scan(step, (place, jnp.zeros(32)), ids)

    popularity = rng.lognormal(0, 1.5, (10, 32)).repeat(100, axis=0)
    ids = np.argpartition(-np.log(popularity)[:, None] - rng.gumbel(size=(1000, 64, 32)), 4, axis=-1)[..., :4]
    (last, _), (rank_load, phy2log) = run(jax.device_put(place), ids.astype(np.int32))
    (_, _), _ = run(last, ids.astype(np.int32))
    assert traces == 1
    assert run._cache_size() == 1
    np.testing.assert_array_equal(rank_load.sum(axis=1), 64 * 4)
    assert len(np.unique(phy2log, axis=0)) > 10
    check(last)


@pytest.mark.parametrize("repeats", [False, True])
def test_select_layers_under_vmap_and_by_leading_axes(rng, repeats):
    loads = rng.integers(0, 100, (3, 64)).astype(np.int32)
    place = along(topology.cube(), loads[0], redundants=2, by_load=False, repeats=repeats)
    layers = along(topology.cube(), rng.permuted(loads, axis=1), redundants=2, repeats=repeats)
    batched = place.select(loads)
    for layer in range(3):
        np.testing.assert_array_equal(batched.phy2log[layer], place.select(loads[layer]).phy2log)
    by_axes, by_vmap = layers.select(loads), jax.vmap(lplb.Placement.select)(layers, loads)
    np.testing.assert_array_equal(by_axes.phy2log, by_vmap.phy2log)
    np.testing.assert_array_equal(by_axes.log2phy, by_vmap.log2phy)


@pytest.mark.parametrize("repeats", [False, True])
def test_select_whatever_the_contents(rng, repeats):
    """NaN comes last; contents that are no placement give no slot out of range."""
    place = along(topology.cube(), np.ones(64), redundants=2, by_load=False, repeats=repeats)
    load = rng.lognormal(0, 1, 64).astype(np.float32)
    some = np.where(rng.random(64) < 0.3, np.nan, load).astype(np.float32)
    instead = np.where(np.isnan(some), -1, some)
    np.testing.assert_array_equal(place.select(some).phy2log, place.select(instead).phy2log)
    garbage = rng.integers(INT32.min, INT32.max, (2, 96), np.int32, endpoint=True)
    wild = jax.jit(
        lambda phy2log, log2phy, load: lplb.Placement(phy2log, log2phy, 8, 1, place.topology).select(load),
    )(garbage[0, :80], np.resize(garbage[1], place.log2phy.shape), load)
    ids = rng.integers(0, 64, (100, 4)).astype(np.int32)
    out = lplb.balance(ids, wild)
    assert np.all((np.asarray(out.physical_ids) >= -1) & (np.asarray(out.physical_ids) < 80))


# ---- Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"load": -np.ones(8)}, ValueError, "load must be finite and not negative, got -1"),
        ({"load": np.array([np.inf] * 8)}, ValueError, "load must be finite and not negative, got inf"),
        ({"load": np.ones(())}, ValueError, r"load must have shape \[..., num_experts\]"),
        ({"load": np.ones(8, bool)}, TypeError, "load must hold numbers, got dtype bool"),
        ({"num_ranks": 4.0}, TypeError, "num_ranks must be an integer"),
        ({"redundants_per_rank": -1}, ValueError, "redundants_per_rank must be at least 0"),
        (
            {"redundants_per_rank": 7},
            ValueError,
            "redundants_per_rank = 7 gives a rank 9 slots, more than the 8 experts",
        ),
        ({"num_nodes": 3, "num_groups": 4}, ValueError, "num_nodes must divide num_gpus = 4"),
        ({"num_groups": 3}, ValueError, "num_groups must divide the 8 experts"),
        ({"max_replicas": 1}, ValueError, "max_replicas = 1 is too small"),
        ({"max_replicas": 0}, ValueError, "max_replicas must be at least 1"),
    ],
)
def test_from_eplb_refuses(changed, error, message):
    arguments = {"load": np.arange(8), "num_ranks": 4, "redundants_per_rank": 1}
    with pytest.raises(error, match=message):
        lplb.Placement.from_eplb(**(arguments | changed))


def test_traced_loads_are_refused_where_weights_move():
    with pytest.raises(TypeError, match=r"load must not be traced: .* Placement\.select"):
        jax.jit(lambda load: lplb.Placement.from_eplb(load, num_ranks=4, redundants_per_rank=1))(np.ones(8))
    with pytest.raises(TypeError, match=r"load must not be traced: .* Placement\.select"):
        jax.jit(lambda load: along(topology.ring(4), load, redundants=1))(np.ones(8))


def test_select_refuses():
    place = along(topology.ring(4), np.ones(8), redundants=1, by_load=False)
    with pytest.raises(ValueError, match=r"load must have shape .* \[..., 8\], got \(7,\)"):
        place.select(np.ones(7))
    with pytest.raises(TypeError, match="load must be an array of numbers, got bool"):
        place.select(np.ones(8, bool))
    with pytest.raises(TypeError, match="load must be an array of numbers, got list"):
        place.select([1.0] * 8)
    with pytest.raises(ValueError, match="select needs a placement along a topology"):
        lplb.Placement.from_eplb(np.ones(8), num_ranks=4, redundants_per_rank=1).select(np.ones(8))
    with pytest.raises(ValueError, match=r"repeats must be one of \(None, False, True\), got 1"):
        place.select(np.ones(8), repeats=1)


def test_cures_for_repeats_work():
    """A placement with room for them; and what has more copies than experts is chosen with repeats."""
    narrow = along(topology.cube(), np.ones(16), redundants=2, by_load=False)
    message = r"repeats = True needs max_replicas = 3, .* max_replicas = 2; make it by Placement\.from_topology"
    with pytest.raises(ValueError, match=message):
        narrow.select(np.arange(16), repeats=True)
    wide = along(topology.cube(), np.ones(16), redundants=2, by_load=False, repeats=True)
    check(wide.select(np.arange(16), repeats=True))
    with pytest.raises(ValueError, match=r"must be at most 0, got 2: .* with repeats=True only those on one rank are"):
        along(topology.cube(), np.ones(8), redundants=2)
    more = along(topology.cube(), np.ones(8), redundants=2, repeats=True)
    with pytest.raises(ValueError, match=r"repeats = False needs .* has 1 and 2; leave repeats out"):
        more.select(np.ones(8), repeats=False)
    check(more.select(np.ones(8)))
    with pytest.raises(ValueError, match=r"needs experts of at most two replicas, .* = 3; pass solver='ipm' or 'auto'"):
        lplb.solve(np.ones(16, np.int32), wide, solver="edge_balance")


def test_from_topology_refuses_loads_of_other_shapes():
    with pytest.raises(ValueError, match=r"load must have shape .* \[..., 8\], got \(7,\)"):
        lplb.Placement.from_topology(
            topology.ring(4), num_experts=8, num_ranks=4, redundants_per_rank=1, load=np.ones(7)
        )
