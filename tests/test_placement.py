"""Placements: which slot holds which expert, as pytrees too, and what their constructors refuse."""

import dataclasses
import textwrap
from functools import cache, lru_cache, partial

import helpers
import jax
import numpy as np
import pytest

import jax_lplb as lplb

topology = lplb.topology
INT32 = np.iinfo(np.int32)


def reference_phy2log(topo, num_experts: int, num_ranks: int, redundants: int) -> list[int]:
    """Slot by slot, as the documentation of `from_topology` says."""
    home, columns, size = num_experts // num_ranks, topo.num_columns, topo.group_size
    slots = []
    for rank in range(num_ranks):
        slots += [rank * home + i for i in range(home)]
        for c in range(redundants // columns):
            for d in range(columns):
                owner = rank // size * size + int(topo.r2o[rank % size, d])
                slots.append(owner * home + c * columns + d)
    return slots


def reference_log2phy(phy2log, num_experts: int, max_replicas: int) -> list[list[int]]:
    table = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(phy2log):
        table[expert].append(slot)
    return [row + [-1] * (max_replicas - len(row)) for row in table]


def home_first(place: lplb.Placement, phy2log: list[int]) -> list[list[int]]:
    """As `reference_log2phy`, but the home slot first, whichever number it has."""
    home = place.num_experts // place.num_ranks
    return [
        sorted(row, key=lambda slot: (slot < 0, slot // place.slots_per_rank != expert // home))
        for expert, row in enumerate(reference_log2phy(phy2log, place.num_experts, place.max_replicas))
    ]


def check_leaves(place: lplb.Placement) -> None:
    """Leaves on the host, of the documented dtypes and shapes."""
    for leaf in (place.phy2log, place.log2phy):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == np.int32
    assert place.phy2log.shape == (place.num_physical,)
    assert place.log2phy.shape == (place.num_experts, place.max_replicas)
    assert place.num_physical == place.num_ranks * place.slots_per_rank


def check_slots(place: lplb.Placement) -> None:
    """The slots of an expert hold it, on different ranks; home slots come first."""
    for expert, row in enumerate(place.log2phy.tolist()):
        slots = [slot for slot in row if slot >= 0]
        assert slots
        assert row == slots + [-1] * (len(row) - len(slots))
        assert {int(place.phy2log[slot]) for slot in slots} == {expert}
        assert len({slot // place.slots_per_rank for slot in slots}) == len(slots)
    assert np.sum(place.log2phy >= 0) == place.num_physical


TOPOLOGIES = [
    pytest.param(topology.ring(8), 64, 8, 1, id="ring"),
    pytest.param(topology.ring(8), 64, 8, 3, id="ring, C = 3"),
    pytest.param(topology.ring(2), 6, 2, 3, id="all experts copied"),
    pytest.param(topology.cube(), 256, 8, 2, id="cube"),
    pytest.param(topology.cube(), 256, 32, 4, id="cube, 4 groups, C = 2"),
    pytest.param(topology.hypercube(), 256, 16, 2, id="hypercube"),
    pytest.param(topology.hypercube(), 192, 32, 6, id="hypercube, 2 groups, C = 3"),
    pytest.param(topology.torus(4, 3), 48, 12, 2, id="torus"),
    pytest.param(topology.torus(4, 3), 96, 24, 4, id="torus, 2 groups, C = 2"),
    pytest.param(topology.from_r2o([[1, 2], [2, 0], [0, 1]]), 12, 6, 2, id="from_r2o, 2 groups"),
    pytest.param(topology.cube(), 32, 16, 0, id="no copies"),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("topo", "num_experts", "num_ranks", "redundants"), TOPOLOGIES)
def test_from_topology(topo, num_experts, num_ranks, redundants):
    place = helpers.placement(topo, num_experts, num_ranks, redundants)
    check_leaves(place)
    phy2log = reference_phy2log(topo, num_experts, num_ranks, redundants)
    assert place.phy2log.tolist() == phy2log
    assert place.log2phy.tolist() == home_first(place, phy2log)
    assert (place.num_experts, place.num_ranks) == (num_experts, num_ranks)
    assert place.slots_per_rank == num_experts // num_ranks + redundants
    assert place.max_replicas == (2 if redundants else 1)
    assert (place.num_groups, place.group_size) == (num_ranks // topo.group_size, topo.group_size)
    assert place.topology == topo


@pytest.mark.parametrize(("topo", "num_experts", "num_ranks", "redundants"), TOPOLOGIES)
def test_topology_copies_stay_in_their_group(topo, num_experts, num_ranks, redundants):
    place = helpers.placement(topo, num_experts, num_ranks, redundants)
    check_slots(place)
    group = np.where(place.log2phy >= 0, place.log2phy // (place.slots_per_rank * place.group_size), -1)
    assert np.all((group == group[:, :1]) | (place.log2phy < 0))


def test_cube_by_hand():
    """Rank 0 keeps a copy of rank 3's first expert and of rank 6's second one, then of their third and fourth."""
    place = helpers.placement(topology.cube(), 32, 8, 4)
    assert place.phy2log[:8].tolist() == [0, 1, 2, 3, 12, 25, 14, 27]
    assert place.log2phy[12].tolist() == [24, 4]
    assert place.log2phy[25].tolist() == [49, 5]


PHY2LOGS = [
    pytest.param([0, 1, 2, 3], 2, id="no copies"),
    pytest.param([0, 1, 2, 0, 3, 2], 2, id="two replicas"),
    pytest.param([3, 0, 3, 1, 3, 2, 0, 3], 4, id="one everywhere"),
    pytest.param([0], 1, id="one slot"),
    pytest.param([1, 0, 0, 1], 2, id="all of two ranks"),
]


@pytest.mark.parametrize(("phy2log", "num_ranks"), PHY2LOGS)
@pytest.mark.parametrize("room", [0, 2])
def test_from_phy2log(phy2log, num_ranks, room):
    most = max(phy2log.count(expert) for expert in phy2log)
    place = lplb.Placement.from_phy2log(phy2log, num_ranks, max_replicas=most + room if room else None)
    check_leaves(place)
    check_slots(place)
    assert place.phy2log.tolist() == phy2log
    assert place.log2phy.tolist() == reference_log2phy(phy2log, max(phy2log) + 1, most + room)
    assert (place.num_ranks, place.num_groups, place.group_size) == (num_ranks, 1, num_ranks)
    assert place.topology is None


def test_from_phy2log_of_many_replicas(rng):
    for num_experts, num_ranks, redundants in [(64, 8, 3), (288, 72, 4), (32, 16, 6)]:
        place = helpers.many_replicas(rng, num_experts=num_experts, num_ranks=num_ranks, redundants=redundants)
        check_leaves(place)
        check_slots(place)
        assert place.max_replicas > 2
        assert place.log2phy.tolist() == reference_log2phy(place.phy2log, num_experts, place.max_replicas)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_from_phy2log_takes_any_integers(dtype):
    expected = lplb.Placement.from_phy2log([0, 1, 2, 0, 3, 2], 2)
    place = lplb.Placement.from_phy2log(np.array([0, 1, 2, 0, 3, 2], dtype), 2)
    check_leaves(place)
    jax.tree.map(np.testing.assert_array_equal, place, expected)


def test_from_phy2log_of_small_integers_that_hold_every_value():
    """256 experts in uint8: their number itself is beyond the dtype."""
    place = lplb.Placement.from_phy2log(np.arange(256, dtype=np.uint8), 8)
    check_leaves(place)
    np.testing.assert_array_equal(place.log2phy[:, 0], np.arange(256))


def test_from_phy2log_takes_jax_arrays():
    place = lplb.Placement.from_phy2log(jax.numpy.array([0, 1, 2, 0]), 2)
    check_leaves(place)
    check_slots(place)


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["two replicas", "many"])
def test_traced_contents_equal_concrete_ones(platform, rng, case):
    place = {
        "two replicas": lambda: helpers.placement(topology.cube(), 64, 8, 2),
        "many": lambda: helpers.many_replicas(rng, num_experts=72, num_ranks=24, redundants=5),
    }[case]()
    concrete = lplb.Placement.from_phy2log(place.phy2log, place.num_ranks, max_replicas=place.max_replicas + 1)
    build = partial(
        lplb.Placement.from_phy2log,
        num_ranks=place.num_ranks,
        num_experts=place.num_experts,
        max_replicas=concrete.max_replicas,
    )
    traced = jax.jit(build)(place.phy2log)
    assert jax.tree.structure(traced) == jax.tree.structure(concrete)
    for leaf, expected in zip(jax.tree.leaves(traced), jax.tree.leaves(concrete), strict=True):
        assert leaf.dtype == np.int32
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_traced_contents_of_any_integers(dtype):
    """Of small integers too, though 100 experts with 3 replicas are more than they can number."""
    phy2log = np.r_[:100, 1:100, 0, 2:100, :2].astype(dtype)
    concrete = lplb.Placement.from_phy2log(phy2log, 3)
    traced = jax.jit(lambda v: lplb.Placement.from_phy2log(v, 3, num_experts=100, max_replicas=3))(phy2log)
    for leaf, expected in zip(jax.tree.leaves(traced), jax.tree.leaves(concrete), strict=True):
        assert leaf.dtype == np.int32
        np.testing.assert_array_equal(leaf, expected)


@cache
def balance_over(implementation):
    """The table, ids and rank loads that traced contents of 24 slots give, for 8 experts and 4 ranks."""

    @jax.jit
    def run(phy2log, ids):
        place = lplb.Placement.from_phy2log(phy2log, 4, num_experts=8, max_replicas=3)
        out = lplb.balance(ids, place, implementation=implementation)
        return place.log2phy, out.physical_ids, out.rank_load

    return run


@pytest.mark.parametrize(
    "garbage",
    [
        np.full(24, INT32.max),
        np.full(24, INT32.min),
        np.full(24, -1),
        np.zeros(24),
        np.full(24, 8),
        np.tile([0, -7, 8, INT32.max, 3, INT32.min], 4),
        np.random.default_rng(0).integers(INT32.min, INT32.max, 24),
        np.random.default_rng(0).integers(-3, 12, 24),
    ],
    ids=["largest", "smallest", "-1", "one expert", "past the end", "mixed", "anything", "near"],
)
def test_traced_garbage_stays_in_bounds(platform, implementation, garbage):
    """Slots that hold no expert, and experts with too many slots or none: only what has no place is left out."""
    ids = np.arange(-1, 9, dtype=np.int32)
    log2phy, physical_ids, rank_load = balance_over(implementation)(garbage.astype(np.int32), ids)
    expected = [(np.flatnonzero(garbage == expert).tolist() + [-1] * 3)[:3] for expert in range(8)]
    assert log2phy.tolist() == expected
    assert rank_load.shape == (4,)
    for expert, slot in zip(ids.tolist(), physical_ids.tolist(), strict=True):
        slots = [s for s in expected[expert] if s >= 0] if 0 <= expert < 8 else []
        assert slot in (slots or [-1])


def test_static_fields():
    place = helpers.placement(topology.cube(), 64, 8, 2)
    assert [leaf.shape for leaf in jax.tree.leaves(place)] == [(80,), (64, 2)]
    other = lplb.Placement.from_phy2log(place.phy2log, 8)
    twice = helpers.placement(topology.cube(), 128, 16, 2)
    again = helpers.placement(topology.from_r2o(topology.cube().r2o), 64, 8, 2)
    assert jax.tree.structure(place) == jax.tree.structure(again)
    assert len({jax.tree.structure(p) for p in (place, other, twice)}) == 3
    doubled = jax.tree.map(lambda leaf: 2 * leaf, place)
    assert (doubled.num_ranks, doubled.num_groups, doubled.topology) == (8, 1, topology.cube())


# ---- A placement is a value ------------------------------------------------------------------------------------------

PLACE = helpers.placement(topology.cube(), 64, 8, 2)
LEAVES = {
    "None": None,
    "object": object(),
    "bool": True,
    "int": 3,
    "list": [1],
    "shape": jax.ShapeDtypeStruct((4,), np.int32),
    "other array": np.zeros(2),
}


def test_equal_by_contents_whatever_holds_them():
    again = helpers.placement(topology.from_r2o(topology.cube().r2o), 64, 8, 2)
    on_device = jax.device_put(again)
    mixed = dataclasses.replace(again, phy2log=on_device.phy2log)
    for other in (again, on_device, mixed, jax.tree.map(np.copy, again)):
        assert other == PLACE
        assert not (other != PLACE)  # noqa: SIM202
        assert hash(PLACE) == hash(other)
        assert other in [PLACE]
    assert len({PLACE, again, on_device, mixed}) == 1

    @lru_cache
    def cached(place):
        return object()

    assert cached(PLACE) is cached(on_device)


def test_other_contents_are_other_placements():
    swapped = PLACE.phy2log.copy()
    swapped[[8, 9]] = swapped[[9, 8]]
    others = [
        dataclasses.replace(PLACE, phy2log=swapped),
        dataclasses.replace(PLACE, log2phy=PLACE.log2phy[:, ::-1]),
        dataclasses.replace(PLACE, log2phy=np.pad(PLACE.log2phy, ((0, 0), (0, 1)), constant_values=-1)),
        dataclasses.replace(PLACE, num_groups=2),
        dataclasses.replace(PLACE, topology=None),
        dataclasses.replace(PLACE, phy2log=PLACE.phy2log.reshape(2, 40)),
        jax.tree.map(lambda leaf: leaf[None], PLACE),
    ]
    for other in others:
        assert other != PLACE
        assert not (other == PLACE)  # noqa: SIM201
        assert other not in [PLACE]
    assert len({PLACE, *others}) == 1 + len(others)
    for other in (None, "placement", 3, topology.cube(), PLACE.phy2log.tolist()):
        assert other != PLACE
        assert PLACE.__eq__(other) is NotImplemented


def test_a_placement_may_be_a_static_argument():
    """Compiled once for equal contents, and anew for others."""
    traces = []

    @partial(jax.jit, static_argnames="place")
    def homes(load, place):
        traces.append(place)
        return load[place.phy2log]

    load = np.arange(64)
    for place in (PLACE, helpers.placement(topology.cube(), 64, 8, 2), jax.device_put(PLACE)):
        np.testing.assert_array_equal(homes(load, place=place), load[PLACE.phy2log])
    assert len(traces) == 1
    other = lplb.Placement.from_phy2log(np.roll(PLACE.phy2log, 10), 8)
    np.testing.assert_array_equal(homes(load, place=other), load[other.phy2log])
    assert len(traces) == 2


def test_traced_placements_have_no_contents_to_compare():
    """Each says so; and what the error names instead works."""
    message = r"traced leaves has no contents .* got traced int32\[80\].* jnp\.array_equal"

    @jax.jit
    def compare(place):
        for ask in (hash, lambda traced: traced == PLACE, lambda traced: PLACE.__ne__(traced), lambda t: t in [PLACE]):
            with pytest.raises(TypeError, match=message):
                ask(place)
        assert place in [place]
        assert place != helpers.placement(topology.ring(8), 64, 8, 2)  # of another topology, whatever they hold
        return jax.numpy.array_equal(place.phy2log, PLACE.phy2log)

    assert compare(PLACE)
    assert not compare(jax.tree.map(lambda leaf: leaf + 1, PLACE))


@pytest.mark.parametrize("kind", LEAVES)
def test_trees_of_anything_in_place_of_leaves_compare(kind):
    """As transformations make: trees of axes, of shapes, of nothing."""
    leaf = LEAVES[kind]
    tree = jax.tree.map(lambda _: leaf, PLACE)
    assert tree == jax.tree.map(lambda _: leaf, PLACE)
    assert tree != PLACE
    assert PLACE.__ne__(tree)
    assert sum(tree == jax.tree.map(lambda _, other=other: other, PLACE) for other in LEAVES.values()) == 1
    assert "Placement(" in repr(tree)


def test_comparing_changes_no_transformation():
    """Trees of axes, scans, donation, and a variable of Flax take placements as before."""
    nnx = pytest.importorskip("flax.nnx")
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf[::-1]]), PLACE)
    axes = jax.tree.map(lambda _: 0, PLACE)
    summed = jax.vmap(lambda place: place.phy2log.sum(), in_axes=(axes,))(stacked)
    np.testing.assert_array_equal(summed, stacked.phy2log.sum(axis=1))
    last, _ = jax.lax.scan(lambda place, _: (jax.tree.map(lambda leaf: leaf + 1, place), None), PLACE, None, 3)
    assert last == jax.tree.map(lambda leaf: leaf + np.int32(3), PLACE)
    given = jax.tree.map(lambda leaf: jax.numpy.array(leaf), PLACE)
    back = jax.jit(lambda place: jax.tree.map(lambda leaf: leaf + 1, place), donate_argnums=0)(given)
    assert back == jax.tree.map(lambda leaf: leaf + np.int32(1), PLACE)
    assert given.phy2log.is_deleted()
    variable = nnx.Variable(PLACE)
    assert variable == nnx.Variable(jax.device_put(PLACE))
    assert variable != nnx.Variable(stacked)


def test_repr_is_short_and_tells_kinds_apart():
    assert repr(PLACE) == (
        f"Placement(phy2log=int32[80], log2phy=int32[64, 2], num_ranks=8, num_groups=1, topology={topology.cube()})"
    )
    assert "topology=None" in repr(lplb.Placement.from_phy2log(PLACE.phy2log, 8))
    assert len(repr(helpers.placement(topology.ring(128), 128, 128, 1))) < 300
    seen = []
    jax.make_jaxpr(lambda place: seen.append(repr(place)))(PLACE)
    assert "phy2log=traced int32[80]" in seen[0]


# ---- Where weights are -----------------------------------------------------------------------------------------------


def by_load(rng, *shape) -> lplb.Placement:
    return lplb.Placement.from_topology(
        topology.cube(), num_experts=64, num_ranks=8, redundants_per_rank=2, load=rng.lognormal(0, 1, (*shape, 64))
    )


def test_home_rank_is_that_of_the_row_of_weights(rng):
    """Of every kind; also where ranks do not divide the experts."""
    places = [
        PLACE,
        by_load(rng),
        helpers.placement(topology.ring(4), 64, 8, 0),
        helpers.many_replicas(rng, num_experts=64, num_ranks=8, redundants=3),
        lplb.Placement.from_eplb(rng.lognormal(0, 1, 64), num_ranks=8, redundants_per_rank=2),
        lplb.Placement.from_phy2log([0, 1, 2, 4, 1, 3, 4, 2], 2),
    ]
    for place in places:
        rows = -(-place.num_experts // place.num_ranks)
        expected = np.empty(place.num_experts, int)
        for row, expert in enumerate(place.home_order):
            expected[expert] = row // rows
        for got in (place.home_rank, jax.jit(lambda place: place.home_rank)(place)):
            assert got.dtype == np.int32
            assert got.tolist() == expected.tolist()


def test_home_rank_of_layers(rng):
    stacked = by_load(rng, 2, 3)
    eplb = lplb.Placement.from_eplb(rng.lognormal(0, 1, (2, 3, 64)), num_ranks=8, redundants_per_rank=2)
    for places in (stacked, eplb):
        assert places.home_rank.shape == (2, 3, 64)
        for index in np.ndindex(2, 3):
            one = jax.tree.map(lambda leaf, index=index: leaf[index], places)
            np.testing.assert_array_equal(places.home_rank[index], one.home_rank)


def test_phy2log_alone_makes_another_placement(rng):
    """It has no topology, and so its rows are in logical order; `==` and `repr` tell; both leaves make it again."""
    place = by_load(rng)
    assert not np.array_equal(place.home_order, np.arange(64))
    other = lplb.Placement.from_phy2log(place.phy2log, 8)
    assert other != place
    assert repr(other) != repr(place)
    np.testing.assert_array_equal(other.home_order, np.arange(64))
    fresh = helpers.placement(topology.cube(), 64, 8, 2)
    again = dataclasses.replace(fresh, phy2log=place.phy2log, log2phy=place.log2phy)
    assert again == place
    np.testing.assert_array_equal(again.home_order, place.home_order)


def test_weights_of_a_placement_by_load_come_into_its_order_in_one_line(rng):
    """Once; then every slot has its own expert's row, which rows left in logical order would not give."""
    place = by_load(rng)
    logical = np.arange(64, dtype=np.float32)[:, None]
    params = lplb.from_logical({"w": logical}, place)
    np.testing.assert_array_equal(params["w"][:, 0], place.home_order)
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]), ("ep",))
    bring = jax.jit(
        jax.shard_map(
            lambda rows: lplb.replicate(rows, place, "ep"), mesh=mesh, in_specs=jax.P("ep"), out_specs=jax.P("ep")
        )
    )
    np.testing.assert_array_equal(bring(params)["w"][:, 0], place.phy2log)
    assert not np.array_equal(bring({"w": logical})["w"][:, 0], place.phy2log)


def test_layers_stack(platform, implementation, rng):
    """Layers of placements under vmap and scan, with the ids that each layer gives alone."""
    home = np.arange(16).reshape(4, 4)
    layers = []
    for _ in range(3):
        slots = [np.r_[own, rng.choice(np.setdiff1d(home, own), 2, replace=False)] for own in home]
        layers.append(lplb.Placement.from_phy2log(np.concatenate(slots), 4, num_experts=16, max_replicas=4))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    assert (stacked.num_experts, stacked.num_physical, stacked.max_replicas) == (16, 24, 4)
    assert (stacked.slots_per_rank, stacked.num_ranks) == (6, 4)
    ids = rng.integers(0, 16, (3, 200, 2), np.int32)
    even = np.zeros((16, 4), np.float32)

    @jax.jit
    def assign(ids, place):
        load = lplb.count_load(ids, 16, implementation=implementation)
        return lplb.assign(ids, even, place, load=load, implementation=implementation)

    alone = np.stack([assign(i, place) for i, place in zip(ids, layers, strict=True)])
    for place, physical_ids, logical_ids in zip(layers, alone, ids, strict=True):
        np.testing.assert_array_equal(place.phy2log[physical_ids], logical_ids)
    np.testing.assert_array_equal(jax.jit(jax.vmap(assign))(ids, stacked), alone)
    scanned = jax.jit(lambda *xs: jax.lax.scan(lambda _, x: (None, assign(*x)), None, xs)[1])(ids, stacked)
    np.testing.assert_array_equal(scanned, alone)


def test_new_contents_do_not_recompile():
    traces = []

    @jax.jit
    def homes(place):
        traces.append(place)
        return place.log2phy[:, 0] + place.slots_per_rank

    def build(phy2log, max_replicas=3):
        return lplb.Placement.from_phy2log(phy2log, 2, num_experts=4, max_replicas=max_replicas)

    for phy2log in ([0, 1, 2, 0, 3, 2], [3, 1, 2, 0, 1, 2], [1, 2, 0, 3, 0, 1]):
        place = build(phy2log)
        np.testing.assert_array_equal(homes(place), place.log2phy[:, 0] + 3)
    assert len(traces) == 1
    homes(build([0, 1, 2, 0, 3, 2], max_replicas=2))
    assert len(traces) == 2

    for _ in range(2):
        homes(helpers.placement(topology.cube(), 64, 8, 2))
        homes(helpers.placement(topology.from_r2o(topology.cube().r2o), 64, 8, 2))
    assert len(traces) == 3


def test_building_one_initialises_no_backend():
    """So that it may happen before `jax.distributed.initialize()`, and needs no device."""
    script = """
        import jax_lplb as lplb
        from jax._src import xla_bridge

        assert not xla_bridge.backends_are_initialized(), "by the import"
        lplb.Placement.from_topology(lplb.topology.cube(), num_experts=64, num_ranks=8, redundants_per_rank=2)
        lplb.Placement.from_phy2log([0, 1, 1, 0], 2, max_replicas=3)
        assert not xla_bridge.backends_are_initialized(), "by a constructor"
        print(lplb.count_load(lplb.topology.ring(2).r2o, 2))
        assert xla_bridge.backends_are_initialized()
        """
    assert helpers.new_python(textwrap.dedent(script)) == "[1 1]\n"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"topology": "cube"}, TypeError, r"topology must be a jax_lplb\.topology\.Topology, got str"),
        ({"num_experts": 64.0}, TypeError, r"num_experts must be an integer, got 64\.0"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"num_experts": 60}, ValueError, "num_experts must be divisible by num_ranks = 8, got 60"),
        ({"num_ranks": True}, TypeError, "num_ranks must be an integer, got True"),
        ({"num_ranks": 0}, ValueError, "num_ranks must be at least 1, got 0"),
        ({"num_ranks": 4}, ValueError, "num_ranks must be a multiple of the topology's 8 ranks, got 4"),
        ({"num_ranks": 12}, ValueError, "num_ranks must be a multiple of the topology's 8 ranks, got 12"),
        ({"redundants_per_rank": "2"}, TypeError, "redundants_per_rank must be an integer, got '2'"),
        ({"redundants_per_rank": -2}, ValueError, "redundants_per_rank must be at least 0, got -2"),
        ({"redundants_per_rank": 3}, ValueError, "redundants_per_rank must be a multiple of .* 2 columns, got 3"),
        ({"redundants_per_rank": 10}, ValueError, "must be at most 8, got 10: .* with repeats=True only"),
        ({"redundants_per_rank": 18, "repeats": True}, ValueError, "must be at most 16, got 18: .* copies on one rank"),
        ({"topology": topology.ring(8), "redundants_per_rank": 9}, ValueError, "must be at most 8, .* different ones$"),
        ({"repeats": 1}, ValueError, r"repeats must be one of \(False, True\), got 1"),
    ],
)
def test_from_topology_refuses(changed, error, message):
    arguments = {"topology": topology.cube(), "num_experts": 64, "num_ranks": 8, "redundants_per_rank": 2} | changed
    with pytest.raises(error, match=message):
        lplb.Placement.from_topology(arguments.pop("topology"), **arguments)


@pytest.mark.parametrize(
    ("phy2log", "changed", "error", "message"),
    [
        ([0, 1, 2, 3, 1, 3], {}, ValueError, r"phy2log: rank 1 holds expert 3 twice, in slots \[3, 5\]"),
        ([0, 1, 0, 1, 2, 3], {}, ValueError, r"phy2log: rank 0 holds expert 0 twice, in slots \[0, 2\]"),
        ([0, 1, 3, 0, 1, 4], {}, ValueError, "phy2log: expert 2 has no slot; every expert needs at least one"),
        ([0, 1, 0, 1], {"num_experts": 3}, ValueError, "phy2log: expert 2 has no slot"),
        ([0, 1, 2, 0], {"num_experts": 2}, ValueError, "phy2log: slot 2 holds expert 2, but experts are 0 to 1"),
        ([0, -1, 1, 0], {}, ValueError, "phy2log: slot 1 holds expert -1, but experts are 0 to 1"),
        ([0, 1, 2], {}, ValueError, "phy2log must have a multiple of num_ranks = 2 slots, got 3"),
        (np.zeros(0, int), {}, ValueError, "phy2log must have a multiple of num_ranks = 2 slots, got 0"),
        ([[0, 1], [1, 0]], {}, ValueError, r"phy2log must have shape \[num_physical\], got shape \(2, 2\)"),
        (3, {}, ValueError, r"phy2log must have shape \[num_physical\], got shape \(\)"),
        ([0.0, 1.0], {}, TypeError, "phy2log must hold integers, got dtype float64"),
        ([True, False], {}, TypeError, "phy2log must hold integers, got dtype bool"),
        ([0, 1, 1, 0], {"num_ranks": 0}, ValueError, "num_ranks must be at least 1, got 0"),
        ([0, 1, 1, 0], {"num_ranks": 2.0}, TypeError, r"num_ranks must be an integer, got 2\.0"),
        ([0, 1, 1, 0], {"num_experts": "2"}, TypeError, "num_experts must be an integer, got '2'"),
        ([0, 1, 1, 0], {"max_replicas": 1}, ValueError, "max_replicas = 1 is too small: expert 0 has 2 replicas"),
        ([0, 1, 2, 1], {"max_replicas": 1}, ValueError, "max_replicas = 1 is too small: expert 1 has 2 replicas"),
        ([0, 1, 1, 0], {"max_replicas": 0}, ValueError, "max_replicas must be at least 1, got 0"),
        ([0, 1, 1, 0], {"max_replicas": 2.5}, TypeError, r"max_replicas must be an integer, got 2\.5"),
    ],
)
def test_from_phy2log_refuses(phy2log, changed, error, message):
    arguments = {"num_ranks": 2} | changed
    with pytest.raises(error, match=message):
        lplb.Placement.from_phy2log(phy2log, **arguments)


@pytest.mark.parametrize(
    ("phy2log", "changed", "error", "message"),
    [
        ([0, 1, 1, 0], {"num_experts": None}, ValueError, "num_experts and max_replicas must be given"),
        ([0, 1, 1, 0], {"max_replicas": None}, ValueError, "num_experts and max_replicas must be given"),
        ([0, 1, 1, 0], {"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ([0, 1, 1, 0], {"max_replicas": 2.0}, TypeError, r"max_replicas must be an integer, got 2\.0"),
        ([0, 1, 1], {}, ValueError, "phy2log must have a multiple of num_ranks = 2 slots, got 3"),
        ([[0, 1]], {}, ValueError, r"phy2log must have shape \[num_physical\], got shape \(1, 2\)"),
        ([0.0, 1.0], {}, TypeError, "phy2log must hold integers, got dtype float32"),
    ],
)
def test_from_phy2log_refuses_when_traced(phy2log, changed, error, message):
    arguments = {"num_ranks": 2, "num_experts": 2, "max_replicas": 2} | changed
    with pytest.raises(error, match=message):
        jax.jit(lambda v: lplb.Placement.from_phy2log(v, **arguments))(jax.numpy.asarray(phy2log))


def test_from_phy2log_refuses_a_traced_number():
    with pytest.raises(TypeError, match="num_ranks must be an integer, got"):
        jax.jit(lambda ranks: lplb.Placement.from_phy2log([0, 1, 1, 0], ranks))(2)
