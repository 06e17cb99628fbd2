"""What ranks read from each other's memory, and write there: the values, whatever they wait for; what is refused."""

import dataclasses
import itertools
import logging
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_same_bits,
    garbage,
    late,
    many_replicas,
    placement,
    saves_collectives,
    several_processes,
    skewed_ids,
    topology,
    turns,
    without_waiting,
)
from jax.sharding import AxisType

import jax_lplb as lplb
from jax_lplb import _ffi, _handlers, _peer, _replicate

P = jax.sharding.PartitionSpec
RANKS, EXPERTS = 8, 16
PER_BATCH = lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2)


def mesh_of(*axes: str, shape: tuple[int, ...] = (RANKS,)) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, axes or ("ep",), axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def chosen(rng: np.random.Generator, ranks: int = RANKS) -> lplb.Placement:
    """Copies chosen for a batch, some slots unused."""
    place = lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=ranks, redundants_per_rank=2)
    place = jax.tree.map(np.asarray, place.choose(jnp.asarray(rng.lognormal(0, 1, EXPERTS), jnp.float32)))
    assert 0 < np.sum(place.phy2log < 0) < ranks * 2
    return place


def placements(rng: np.random.Generator, ranks: int = RANKS) -> dict[str, lplb.Placement]:
    along = topology.cube() if ranks == RANKS else topology.ring(ranks)
    return {
        "topology": placement(along, EXPERTS, ranks, 2),
        "any": many_replicas(rng, num_experts=EXPERTS, num_ranks=ranks, redundants=2),
        "per batch": chosen(rng, ranks),
    }


def summed(place: lplb.Placement, gradient: np.ndarray, dtype) -> np.ndarray:
    """Gradients of slots, in logical order: added up in float32, in the order of `log2phy`."""
    total = np.zeros((place.num_experts, *gradient.shape[1:]), np.float32)
    for expert, slots in enumerate(np.asarray(place.log2phy)):
        first, *rest = slots[slots >= 0]
        total[expert] = gradient[first].astype(np.float32)
        for slot in rest:
            total[expert] += gradient[slot].astype(np.float32)
    return total.astype(dtype)


def held(place: lplb.Placement, logical: np.ndarray) -> np.ndarray:
    """What slots hold, zeros in unused ones."""
    phy2log = np.asarray(place.phy2log)
    return np.where(
        (phy2log >= 0).reshape(-1, *[1] * (logical.ndim - 1)), logical[phy2log], np.zeros((), logical.dtype)
    )


def assert_shards(array: jax.Array, expected: np.ndarray) -> None:
    """On this process's devices."""
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])


def slots_and_gradient(dtype=None, transport="peer", mesh=None, axes="ep", check_vma=True):
    """A jitted (home weights, placement, gradient of slots) -> slots, gradient of home weights."""

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh or mesh_of(),
        in_specs=(P(axes), P(), P(axes)),
        out_specs=P(axes),
        check_vma=check_vma,
    )
    def step(home, place, gradient):
        slots, pull = jax.vjp(lambda home: lplb.replicate(home, place, axes, dtype, transport), home)
        return slots, pull(gradient)[0]

    return step


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["topology", "any", "per batch"])
def test_sums_are_those_of_numpy_bit_by_bit(rng, mesh, name, dtype):
    """In float32 and one order, from and to each dtype, for rows of whole words and of single elements."""
    place = placements(rng, mesh.size)[name]
    shapes = {"a": (3,), "b": (4, 8), "c": ()}
    if mesh.devices.flat[0].platform != "cpu":  # rows of several chunks
        shapes |= {"d": (3, 8192), "e": (16391,), "f": (16398,)}
    logical = {
        f"{leaf} {of}": rng.normal(size=(EXPERTS, *shape)).astype(of)
        for leaf, shape in shapes.items()
        for of in (jnp.float32, jnp.bfloat16, jnp.float16)
    }
    gradient = {
        leaf: (rng.normal(size=(place.num_physical, *rows.shape[1:])) * 300).astype(dtype or rows.dtype)
        for leaf, rows in logical.items()
    }
    slots, sums = slots_and_gradient(dtype, mesh=mesh)(lplb.from_logical(logical, place), place, gradient)
    sums = lplb.to_logical(sums, place)
    for leaf, rows in logical.items():
        assert_same_bits(slots[leaf], held(place, rows.astype(dtype or rows.dtype)))
        assert_same_bits(sums[leaf], summed(place, gradient[leaf], rows.dtype))


def test_float16_and_bfloat16_round_like_numpy(rng):
    """Every float16 there is, and float32 of all magnitudes: ties, subnormals, infinities, beyond the largest."""
    place = lplb.Placement.from_phy2log(np.r_[0, 1, 1, 0], 2)
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    every = np.arange(2**16, dtype=np.uint16)
    bits = rng.integers(0, 2**32, 2**16, np.uint32)
    bits[: 2**15] = (every[: 2**15].astype(np.uint32) << 16) | rng.choice([0, 0x8000, 0x1000, 0xFFFF], 2**15)
    single = bits.view(np.float32)
    tiny = np.float32(2) ** rng.integers(-27, -13, 2**16).astype(np.float32) * rng.choice([1, 1.5, 1.25, 1.0001], 2**16)
    for of, to, values in (
        (np.float16, np.float32, every.view(np.float16)),
        (jnp.bfloat16, np.float32, every.view(jnp.bfloat16)),
        (np.float32, np.float16, single),
        (np.float32, np.float16, tiny.astype(np.float32)),
        (np.float32, jnp.bfloat16, single),
    ):
        gradient = np.zeros((4, 2**16), of)
        gradient[0] = values
        home = np.zeros((2, 2**16), to)
        _, total = slots_and_gradient(of, mesh=mesh)(home, place, gradient)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = (values.astype(np.float32) + np.float32(0)).astype(to)
        normal = ~np.isnan(expected) & (np.abs(values.astype(np.float32)) >= np.finfo(np.float32).tiny)
        assert normal.sum() > 2**15
        assert_same_bits(np.asarray(total)[0][normal], expected[normal])
        assert np.isnan(np.asarray(total)[0][np.isnan(values.astype(np.float32))]).all()


def test_any_contents_of_a_placement(rng):
    """One executable for many contents: unused slots anywhere are zeros, and nothing else is read."""
    step = slots_and_gradient()
    logical = rng.normal(size=(EXPERTS, 4)).astype(np.float32)
    for seed in range(20):
        place = chosen(np.random.default_rng(seed))
        gradient = rng.normal(size=(place.num_physical, 4)).astype(np.float32)
        slots, total = step(logical, place, gradient)
        assert_same_bits(slots, held(place, logical))
        assert_same_bits(total, summed(place, gradient, np.float32))
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", ["topology", "any", "per batch"])
def test_contents_out_of_range_read_nothing(rng, name):
    place = placements(rng)[name]
    step = slots_and_gradient()
    home = rng.normal(size=(EXPERTS, 4)).astype(np.float32)
    for contents in garbage(place, rng).values():
        jax.block_until_ready(step(home, contents, np.ones((place.num_physical, 4), np.float32)))


def test_any_row_numbers(rng):
    """Rows are read that there are, where they are; of sums all up to the first that there is not."""
    rows, mesh = 7, mesh_of()
    leaf = rng.integers(-9, 9, (RANKS, rows, 5)).astype(np.float32)
    numbers = partial(rng.integers, -9, RANKS * rows + 9, dtype=np.int32)
    source, replicas = numbers((RANKS, 4, 1)), numbers((RANKS, 2, 6))
    replicas[:, :, :3] %= RANKS * rows
    source[0, :, 0], replicas[0, 0] = [-(2**31), 2**31 - 1, 0, rows], [5, -(2**31), 5, 5, 5, 5]

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    def run(leaf, *replicas):
        return [_peer.add_up((jnp.dtype("float32"),), "ep", [leaf[0]], one[0])[0][None] for one in replicas]

    flat = leaf.reshape(-1, 5)
    for numbers, sums in zip((source, replicas), run(leaf, source, replicas), strict=True):
        for rank, number in np.ndindex(numbers.shape[:2]):
            there = list(itertools.takewhile(lambda row: 0 <= row < len(flat), numbers[rank, number].tolist()))
            np.testing.assert_array_equal(sums[rank, number], flat[there].sum(axis=0))


def test_empty_leaves_and_one_rank(rng):
    """Leaves without elements have slots without elements; a rank alone reads its own rows."""
    mesh = jax.make_mesh((1,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lplb.Placement.from_phy2log([2, 0, 1], 1)
    home = {"w": rng.normal(size=(3, 2)).astype(np.float32), "none": np.zeros((3, 0), np.float32)}
    slots, total = slots_and_gradient(mesh=mesh)(home, place, home)
    np.testing.assert_array_equal(slots["w"], home["w"][[2, 0, 1]])
    np.testing.assert_array_equal(total["w"], home["w"][[1, 2, 0]])
    assert slots["none"].shape == total["none"].shape == (3, 0)


# ---- Transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", ["weights", "placement", "both"])
@pytest.mark.parametrize("name", ["topology", "any"])
def test_layers_by_vmap(rng, name, mapped):
    """Each layer's rows are read from its own memory, also where layers share weights or a placement."""
    places = [placements(rng)[name]] * 2
    if mapped != "weights":
        places = [placements(rng)[name], placements(np.random.default_rng(3))[name]]
        if name == "topology":
            places = [place.select(rng.permutation(EXPERTS).astype(np.float32)) for place in places]
        room = max(place.max_replicas for place in places)
        places = [
            jax.tree.map(np.asarray, lplb.Placement.from_phy2log(p.phy2log, RANKS, max_replicas=room))
            if name == "any"
            else p
            for p in places
        ]
    logical = rng.normal(size=(2, EXPERTS, 4)).astype(np.float32)
    logical = logical if mapped != "placement" else np.broadcast_to(logical[:1], logical.shape)
    gradient = rng.normal(size=(2, places[0].num_physical, 4)).astype(np.float32)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *places)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(), in_specs=(P(None, "ep"), P(), P(None, "ep")), out_specs=P(None, "ep"))
    def step(home, stacked, gradient):
        def one(home, place, gradient):
            slots, pull = jax.vjp(lambda home: lplb.replicate(home, place, "ep", transport="peer"), home)
            return slots, pull(gradient)[0]

        axes = (None if mapped == "placement" else 0, None if mapped == "weights" else 0, 0)
        given = (home[0] if axes[0] is None else home, stacked, gradient)
        if axes[1] is None:
            given = (given[0], jax.tree.map(lambda leaf: leaf[0], stacked), gradient)
        return jax.vmap(one, axes)(*given)

    home = np.stack([lplb.from_logical(rows, place) for rows, place in zip(logical, places, strict=True)])
    slots, total = step(home, stacked, gradient)
    for layer, place in enumerate(places):
        assert_same_bits(slots[layer], held(place, logical[layer]))
        assert_same_bits(lplb.to_logical(total[layer], place), summed(place, gradient[layer], np.float32))


@pytest.mark.parametrize("policy", ["none", "nothing", "everything", "collectives"])
@pytest.mark.parametrize("shared", [False, True])
def test_layers_by_scan_and_remat(rng, policy, shared):
    """No checkpoint policy keeps addresses for later, nor does a loop over layers that share their weights."""
    places = [chosen(np.random.default_rng(seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *places)
    logical = rng.normal(size=(3, EXPERTS, 4)).astype(np.float32)
    factor = rng.integers(1, 9, (3, PER_BATCH.num_physical, 4)).astype(np.float32)
    policies = {
        "nothing": jax.checkpoint_policies.nothing_saveable,
        "everything": jax.checkpoint_policies.everything_saveable,
        "collectives": saves_collectives,
    }

    @jax.jit
    @partial(
        jax.shard_map, mesh=mesh_of(), in_specs=(P(None, "ep"), P(), P(None, "ep")), out_specs=(P(), P(None, "ep"))
    )
    def step(home, stacked, factor):
        def layer(total, inputs):
            weights, place, of_slots = inputs
            slots = lplb.replicate(home[0] if shared else weights, place, "ep", transport="peer")
            return total + jnp.sum(jnp.sin(slots) * of_slots), None

        def loss(weights):
            nonlocal home
            home = weights
            body = layer if policy == "none" else jax.checkpoint(layer, policy=policies[policy])
            zero = jax.lax.pcast(jnp.float32(0), ("ep",), to="varying")
            return jax.lax.scan(body, zero, (weights, stacked, factor))[0]

        value, gradient = jax.value_and_grad(loss)(home)
        return jax.lax.psum(value, "ep"), gradient

    value, gradient = step(logical, stacked, factor)
    expected = np.zeros_like(logical)
    total = 0.0
    for layer, place in enumerate(places):
        rows = logical[0 if shared else layer]
        used = factor[layer] * (np.asarray(place.phy2log) >= 0)[:, None]
        total += np.sum(np.sin(held(place, rows)) * used)
        expected[0 if shared else layer] += summed(place, used * np.cos(held(place, rows)), np.float32)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_checkpoint_keeps_no_addresses():
    """A policy saves or repeats all of a gradient that is not differentiated further: never the table alone."""

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(), in_specs=P("ep"), out_specs=P("ep"))
    def step(home, factor):
        @partial(jax.checkpoint, policy=saves_collectives)
        def loss(factor):
            bring = partial(lplb.replicate, placement=PER_BATCH, axis_name="ep", transport="peer")
            slots, pull = jax.vjp(bring, home)
            return jnp.sum(jnp.sin(pull(slots)[0] * factor))

        return jax.grad(loss)(factor)

    text = step.lower(*[np.ones((EXPERTS, 3), np.float32)] * 2).as_text()
    calls = [text.count(f"@{target}(") for target in ("lplb_expose", "lplb_release")]
    assert calls[0] == calls[1] == text.count('"stablehlo.all_gather"') / 2 > 0


def test_the_same_copies_twice(rng):
    """XLA merges nothing: each time the ranks read from buffers of their own, which both are written over."""
    place, logical = chosen(rng), rng.normal(size=(EXPERTS, 3)).astype(np.float32)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(), in_specs=P("ep"), out_specs=P("ep"))
    def step(home):
        slots = [lplb.replicate(home, place, "ep", transport="peer") for _ in range(2)]
        return [jax.lax.dynamic_update_slice(one, home * i, (0, 0)) for i, one in enumerate(slots)]

    compiled = step.lower(logical).compile()
    assert compiled.as_text().count('custom_call_target="lplb_expose"') == 2
    for i, slots in enumerate(compiled(jax.device_put(logical, jax.NamedSharding(mesh_of(), P("ep"))))):
        slots, expected = (np.asarray(one).reshape(RANKS, -1, 3) for one in (slots, held(place, logical)))
        np.testing.assert_array_equal(slots[:, 2:], expected[:, 2:])
        np.testing.assert_array_equal(slots[:, :2], expected[:, :2] * i)


@pytest.mark.parametrize("axes", ["ep", ("a", "b"), ("b", "a")])
@pytest.mark.parametrize("check_vma", [True, False])
def test_axes_in_any_order(rng, axes, check_vma):
    mesh = mesh_of() if axes == "ep" else mesh_of("a", "b", shape=(2, 4))
    place, logical = chosen(rng), rng.normal(size=(EXPERTS, 4)).astype(np.float32)
    gradient = rng.normal(size=(place.num_physical, 4)).astype(np.float32)
    step = slots_and_gradient(mesh=mesh, axes=axes, check_vma=check_vma)
    slots, total = step(logical, place, gradient)
    assert_same_bits(slots, held(place, logical))
    assert_same_bits(total, summed(place, gradient, np.float32))


def test_without_jit(rng):
    """Within shard_map outside of jit too, where operations are programs of their own, this is one."""
    place, logical = chosen(rng), rng.normal(size=(EXPERTS, 4)).astype(np.float32)
    bring = jax.shard_map(
        lambda home: lplb.replicate(home, place, "ep", transport="peer"),
        mesh=mesh_of(),
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    slots, pull = jax.vjp(bring, logical)
    assert_same_bits(slots, held(place, logical))
    gradient = rng.normal(size=(place.num_physical, 4)).astype(np.float32)
    assert_same_bits(pull(jnp.asarray(gradient))[0], summed(place, gradient, np.float32))


def test_ranks_of_a_mapped_axis(rng):
    """`jax.vmap` with an axis name: the ranks are elements, wherever they are, and have no memory of their own."""
    place, logical = chosen(rng), rng.normal(size=(EXPERTS, 4)).astype(np.float32)
    home = jax.device_put(logical.reshape(RANKS, -1, 4), jax.NamedSharding(mesh_of(), P("ep")))

    def run(transport):
        bring = partial(lplb.replicate, placement=place, axis_name="ep", transport=transport)
        return jax.jit(jax.vmap(bring, axis_name="ep"))(home)

    assert_same_bits(run(None).reshape(-1, 4), held(place, logical))
    with pytest.raises(ValueError, match=r"axis_name = 'ep' is not of a mesh .* pass transport='collective'"):
        run("peer")


def test_data_axis_with_placements_of_its_own(rng):
    """Ranks read within their row of the mesh; gradients of all rows are added up."""
    mesh = mesh_of("data", "ep", shape=(2, 4))
    place = lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=4, redundants_per_rank=2)
    loads = rng.lognormal(0, 1, (2, EXPERTS)).astype(np.float32)
    places = [jax.tree.map(np.asarray, place.choose(jnp.asarray(load))) for load in loads]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *places)
    logical = rng.normal(size=(EXPERTS, 3)).astype(np.float32)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), P("data")), out_specs=(P(("data", "ep")), P("ep")))
    def step(home, stacked):
        mine = jax.tree.map(lambda leaf: leaf[0], stacked)
        slots, pull = jax.vjp(lambda home: lplb.replicate(home, mine, "ep", transport="peer"), home)
        return slots, pull(jnp.ones_like(slots))[0]

    slots, gradient = step(logical, stacked)
    np.testing.assert_array_equal(slots, np.concatenate([held(place, logical) for place in places]))
    replicas = sum(np.sum(np.asarray(place.log2phy) >= 0, axis=1) for place in places)
    np.testing.assert_array_equal(gradient, np.broadcast_to(replicas[:, None], logical.shape))


# ---- Where it can be -------------------------------------------------------------------------------------------------


def brought(transport, mesh, leaf=np.float32, names=("ep",)):
    """The compiled text of a program on this mesh."""
    place = placement(topology.ring(mesh.shape["ep"]), EXPERTS, mesh.shape["ep"], 2)
    run = jax.shard_map(
        lambda home: lplb.replicate(home, place, "ep", transport=transport),
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=P("ep"),
        axis_names=set(names),
    )
    return jax.jit(run).lower(jnp.zeros((EXPERTS, 4), leaf)).as_text()


def many_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    return "there are 2 processes, and on platform cpu each reaches", mesh_of(), np.float32


def axes_that_are_not_manual(_):
    return r"axes \['tp'\] are not manual", mesh_of("ep", "tp", shape=(4, 2)), np.float32


def gradients_of_other_dtypes(_):
    return "gradients are added up in float32, .* not float8_e4m3fn", mesh_of(), jnp.float8_e4m3fn


def parts_of_bytes(_):
    return "a row of int4 may begin within a byte", mesh_of(), jnp.int4


def no_access(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_ffi, "_PLATFORMS", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_handlers, "peers_reachable", lambda: False)
    return "some GPUs cannot access the memory of others", mesh_of(), np.float32


@pytest.mark.parametrize(
    "case",
    [
        many_processes,
        axes_that_are_not_manual,
        gradients_of_other_dtypes,
        parts_of_bytes,
        no_access,
    ],
)
def test_out_of_reach(monkeypatch, caplog, case):
    """Asked for, it is refused with the reason; else collectives take over, and the log says so once."""
    _replicate.say_once.cache_clear()
    why_not, mesh, leaf = case(monkeypatch)
    with pytest.raises(ValueError, match=f"transport = 'peer': .*{why_not}.*; pass transport='collective'"):
        brought("peer", mesh, leaf)
    with caplog.at_level(logging.INFO, "jax_lplb"):
        for _ in range(2):
            text = brought(None, mesh, leaf)
    assert "lplb_add_rows" not in text
    assert "collective_permute" in text
    assert brought("collective", mesh, leaf) == text
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(f"by collectives: .*{why_not}", said)


def test_within_reach(caplog):
    _replicate.say_once.cache_clear()
    with caplog.at_level(logging.INFO, "jax_lplb"):
        texts = [brought(transport, mesh_of()) for transport in (None, "peer", "collective")]
    assert [("lplb_add_rows" in text, "collective_permute" in text) for text in texts] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    assert [record.getMessage() for record in caplog.records] == ["weights of copies: peers' memory"]
    with pytest.raises(ValueError, match=r"transport must be one of \(None, 'peer', 'collective'\), got 'nvlink'"):
        brought("nvlink", mesh_of())


def test_processes_that_cannot_reach_each_other(monkeypatch, caplog):
    """Asked for, it is refused with the reason; processes that are not asked do not try."""
    _replicate.say_once.cache_clear()
    several_processes(monkeypatch, lambda own: "process 1 cannot be reached" + own)
    with pytest.raises(ValueError, match=r"transport = 'peer': .*process 1 cannot be reached"):
        brought("peer", mesh_of())
    with caplog.at_level(logging.INFO, "jax_lplb"):
        assert "lplb_add_rows" not in brought(None, mesh_of())
    (said,) = caplog.records
    assert re.search("there are 2 processes, .* only if asked to", said.getMessage())


def test_several_processes_translate_what_they_share(monkeypatch, fresh, rng):
    """On GPUs: addresses are made of what the all_gather brings, and nothing tells of plain ones."""
    several_processes(monkeypatch, lambda own: own)
    step = slots_and_gradient(transport="peer")
    place = chosen(rng)
    traced = step.trace(np.zeros((EXPERTS, 4), np.float32), place, np.zeros((place.num_physical, 4), np.float32))
    calls = re.findall(r"stablehlo\.all_gather|@lplb_\w+", traced.lower(lowering_platforms=("cuda",)).as_text())
    shared = ["@lplb_share", "stablehlo.all_gather", "@lplb_translate"]
    released = ["stablehlo.all_gather", "@lplb_release"]
    assert calls == [*shared, "@lplb_add_rows", *released, *shared, "@lplb_add_rows", *released]


def test_without_jit_at_all(rng):
    """What disable_jit runs one by one travels by collectives."""
    place, logical = chosen(rng, 2), rng.normal(size=(EXPERTS, 4)).astype(np.float32)
    bring = jax.shard_map(
        lambda home: lplb.replicate(home, place, "ep"), mesh=mesh_of(shape=(2,)), in_specs=P("ep"), out_specs=P("ep")
    )
    with jax.disable_jit():
        np.testing.assert_array_equal(bring(jnp.asarray(logical)), held(place, logical))


# ---- The rules -------------------------------------------------------------------------------------------------------


def delayed(monkeypatch, before, after) -> None:
    """Readers wait before they read, and after; both are functions of the rank and of the rows, that give turns."""

    def slow(read):
        def run(exposed, rows, *rest):
            rank = jax.lax.axis_index("ep")
            exposed = exposed._replace(table=late(exposed.table, before(rank, rows)))
            made, done = read(exposed, rows, *rest)
            return made, late(done, after(rank, rows))

        return run

    monkeypatch.setattr(_peer, "add_rows", slow(_peer.add_rows))


def delayed_by_chance(monkeypatch, mesh: jax.sharding.Mesh) -> None:
    """Before and after, half of the time, by what is read and who reads."""

    def before(rank, rows):
        return jnp.maximum((jnp.sum(rows) * 7 + rank * 5) % 8 - 4, 0) * turns(mesh)

    delayed(monkeypatch, before, lambda rank, rows: before(rank + 3, rows))


def check_any_delays(monkeypatch, rng, mesh, elements: int = 5) -> None:
    """Steps in a loop, donated weights, slots and gradients written over in place: each step's values are right."""
    delayed_by_chance(monkeypatch, mesh)
    places = [chosen(np.random.default_rng(seed), mesh.size) for seed in range(6)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *places)
    factor = rng.integers(-2, 3, (places[0].num_physical, elements)).astype(np.float32)

    @partial(jax.jit, donate_argnums=0)
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("ep"), P(), P("ep")),
        out_specs=(P("ep"), P(None, "ep")),
        check_vma=False,
    )
    def steps(home, stacked, factor):
        def one(home, place):
            slots, pull = jax.vjp(lambda home: lplb.replicate(home, place, "ep", transport="peer"), home)
            overwritten = jax.lax.dynamic_update_slice(slots, factor, (0, 0))
            return home + pull(overwritten)[0], slots

        return jax.lax.scan(one, home, stacked)

    home = rng.integers(-9, 9, (EXPERTS, elements)).astype(np.float32)
    got = jax.device_put(home, jax.NamedSharding(mesh, P("ep")))
    for _ in range(2):
        got, slots = steps(got, stacked, factor)
        expected = []
        for place in places:
            expected.append(held(place, home))
            home = home + summed(place, factor, np.float32)
        assert_shards(slots, np.stack(expected))
        assert_shards(got, home)


def test_any_delays_and_memory_that_is_used_again_at_once(monkeypatch, fresh, rng, mesh):
    check_any_delays(monkeypatch, rng, mesh)


@pytest.mark.parametrize("broken", [None, "gather", "release"])
def test_release_is_what_keeps_buffers_until_all_have_read(monkeypatch, fresh, mesh, broken):
    """Rank 0 reads late, and the others double their rows in place no sooner. They do without the end of reading."""
    delayed(monkeypatch, lambda rank, _: jnp.where(rank == 0, 100 * turns(mesh), 0), lambda *_: 0)
    if broken == "gather":
        monkeypatch.setattr(_peer, "gather", without_waiting(_peer.gather))
    if broken == "release":
        monkeypatch.setattr(_peer, "release", lambda exposed, done, axis_name, made=None: made or exposed.buffers)
    place = placement(topology.ring(mesh.size), EXPERTS, mesh.size, 2)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("ep"), out_specs=P(None, "ep"), check_vma=False)
    def run(home):
        def step(home, _):
            return 2 * home, lplb.replicate(home, place, "ep", transport="peer")

        return jax.lax.scan(step, home, None, 4)[1]

    def right():
        slots = np.asarray(run(np.ones((EXPERTS, 6), np.float32)))
        return (slots == 2.0 ** np.arange(4)[:, None, None]).all()

    # Where the others are held up longer than rank 0, they write late without being told to: not every time.
    assert all(right() for _ in range(20 if broken else 1)) == (broken is None)


# ---- In place --------------------------------------------------------------------------------------------------------


def with_room(place: lplb.Placement, home: np.ndarray) -> np.ndarray:
    """Home rows of all ranks, and below each rank's those for copies, which hold no numbers."""
    rows = home.reshape(place.num_ranks, -1, *home.shape[1:])
    below = np.full_like(rows, np.nan if np.issubdtype(home.dtype, np.floating) else 99, shape=())
    room = place.slots_per_rank - place.rows_per_rank
    filled = np.broadcast_to(below, (place.num_ranks, room, *home.shape[1:]))
    return np.concatenate([rows, filled], axis=1).reshape(-1, *home.shape[1:])


@pytest.mark.parametrize("transport", ["peer", "collective"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["topology", "per batch"])
def test_rooms_are_filled_for_one_batch_after_another(rng, mesh, name, dtype, transport):
    """In the carry of a loop: slots and gradients are bit by bit those in new memory, whatever rooms held before."""
    options = {"num_experts": EXPERTS, "num_ranks": mesh.size, "redundants_per_rank": 2}
    if name == "topology":
        along = topology.cube() if mesh.size == RANKS else topology.ring(mesh.size)
        places = [lplb.Placement.from_topology(along, **options)] * 4
    else:
        places = [chosen(np.random.default_rng(seed), mesh.size) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *places)
    home = lplb.from_logical({"a": rng.normal(size=(EXPERTS, 3, 8)), "b": rng.normal(size=(EXPERTS, 5))}, places[0])
    home = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), home)
    home["b"] = rng.integers(-9, 9, (EXPERTS, 5)).astype(np.int32)  # travels, and has no gradient
    gradient = rng.normal(size=(4, places[0].num_physical, 3, 8)).astype(dtype)
    if name == "per batch":  # nobody needs the gradients of empty slots
        gradient[np.asarray(stacked.phy2log) < 0] = np.nan

    @partial(jax.jit, static_argnames="in_place")
    def run(home, stacked, gradient, in_place):
        def one(home, inputs):
            place, of_slots = inputs

            def bring(leaf):
                slots = lplb.replicate({**home, "a": leaf}, place, "ep", transport=transport)
                return slots["a"], slots

            _, pull, slots = jax.vjp(bring, home["a"], has_aux=True)
            return slots if in_place else home, (slots, pull(of_slots)[0])

        return jax.lax.scan(one, home, (stacked, gradient))[1]

    def mapped(home, in_place):
        specs = (P("ep"), P(), P(None, "ep"))
        step = jax.shard_map(partial(run, in_place=in_place), mesh=mesh, in_specs=specs, out_specs=P(None, "ep"))
        return jax.jit(step)(home, stacked, gradient)

    slots, sums = mapped(jax.tree.map(partial(with_room, places[0]), home), True)
    expected_slots, expected_sums = mapped(home, False)
    is_held = np.asarray(stacked.phy2log) >= 0
    for leaf in ("a", "b"):
        assert_same_bits(np.asarray(slots[leaf])[is_held], np.asarray(expected_slots[leaf])[is_held])
    shape = (4, mesh.size, places[0].slots_per_rank, 3, 8)
    of_home, of_room = np.split(np.asarray(sums).reshape(shape), [places[0].rows_per_rank], axis=2)
    assert_same_bits(of_home.reshape(4, -1, 3, 8), np.asarray(expected_sums))
    assert_same_bits(of_room, np.zeros_like(of_room))


@pytest.mark.parametrize("how", ["mapped", "two axes", "another dtype", "padding"])
def test_rooms_are_filled_as_new_memory_is(rng, how):
    """Slots and gradients are those of weights without room."""
    experts = EXPERTS + 2 if how == "padding" else EXPERTS
    place = lplb.Placement.per_batch(num_experts=experts, num_ranks=RANKS, redundants_per_rank=2)
    place = jax.tree.map(np.asarray, place.choose(jnp.asarray(rng.lognormal(0, 1, experts), jnp.float32)))
    dtype = jnp.bfloat16 if how == "another dtype" else jnp.float32
    layers = 2 if how == "mapped" else 1
    mesh, axes = (mesh_of("a", "b", shape=(2, 4)), ("b", "a")) if how == "two axes" else (mesh_of(), "ep")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(None, axes), P(), P(None, axes)), out_specs=P(None, axes))
    def step(home, place, gradient):
        def one(home, gradient):
            slots, pull = jax.vjp(lambda home: lplb.replicate(home, place, axes, dtype, "peer"), home)
            return slots, pull(gradient)[0]

        if layers == 1:
            return jax.tree.map(lambda leaf: leaf[None], one(home[0], gradient[0]))
        return jax.vmap(one)(home, gradient)

    home = np.stack([lplb.from_logical(rng.normal(size=(experts, 3)).astype(np.float32), place) for _ in range(layers)])
    home[:, np.asarray(place.home_order) < 0] = np.nan
    gradient = rng.normal(size=(layers, place.num_physical, 3)).astype(dtype)
    is_held = np.asarray(place.phy2log) >= 0
    gradient[:, ~is_held] = np.nan
    expected_slots, expected_sums = step(home, place, gradient)
    slots, sums = step(np.stack([with_room(place, rows) for rows in home]), place, gradient)
    assert_same_bits(np.asarray(slots)[:, is_held], np.asarray(expected_slots)[:, is_held])
    of_home, of_room = np.split(np.asarray(sums).reshape(layers, RANKS, -1, 3), [place.rows_per_rank], axis=2)
    expected = np.asarray(expected_sums).astype(dtype).astype(np.float32)
    assert_same_bits(of_home.reshape(expected.shape), expected)
    assert_same_bits(of_room, np.zeros_like(of_room))


def test_rooms_whatever_the_contents_say(rng):
    """Rows at home are never those of another expert, and nothing is read from a room but by its expert's home."""
    leaf = np.arange(PER_BATCH.num_physical, dtype=np.float32)[:, None] * np.ones((1, 6), np.float32)
    step = slots_and_gradient()
    rows = PER_BATCH.rows_per_rank
    for _ in range(20):
        place = dataclasses.replace(
            chosen(rng),
            phy2log=rng.integers(-3, EXPERTS, PER_BATCH.num_physical).astype(np.int32),
            log2phy=rng.integers(-3, PER_BATCH.num_physical + 9, PER_BATCH.log2phy.shape).astype(np.int32),
        )
        slots, gradient = (np.asarray(one).reshape(RANKS, -1, 6) for one in step(leaf, place, leaf))
        np.testing.assert_array_equal(slots[:, :rows], leaf.reshape(RANKS, -1, 6)[:, :rows])
        is_home = np.arange(len(leaf)) % PER_BATCH.slots_per_rank < rows
        for rank, filled in enumerate(slots[:, rows:]):
            own = rank * PER_BATCH.slots_per_rank + rows + np.arange(len(filled))
            assert np.all(is_home[filled[:, 0].astype(int)] | (filled[:, 0] == own))
        assert not gradient[:, rows:].any()


@pytest.mark.parametrize("kept", [False, True])
def test_rooms_are_filled_in_place(rng, mesh, kept):
    """XLA copies the arrays only where something else needs what they held; else neither they nor gradients move."""
    place = chosen(rng, mesh.size)
    leaf = np.zeros((place.num_physical, 3, 8), np.float32)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), P(), P("ep")), out_specs=P("ep"), check_vma=False)
    def step(slots, place, gradient):
        brought, pull = jax.vjp(lambda slots: lplb.replicate(slots, place, "ep", transport="peer"), slots)
        return brought, pull(gradient)[0], slots + 1 if kept else None

    compiled = jax.jit(step, donate_argnums=(0, 2)).lower(leaf, place, leaf).compile().as_text()
    moved = rf"= f32\[{place.slots_per_rank},3,8\]\S* (copy|copy-start|select|concatenate|pad)\("
    assert bool(re.findall(moved, compiled)) == kept


def right_in_rooms(monkeypatch, rng, mesh, elements: int = 6) -> Callable[[], bool]:
    """Whether a loop of steps gives right slots: each rank changes its own rows, and clears its rooms, as it may."""
    delayed_by_chance(monkeypatch, mesh)
    places = [chosen(np.random.default_rng(seed), mesh.size) for seed in range(6)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *places)
    is_held = np.stack([place.phy2log for place in places]) >= 0
    factor = rng.integers(-2, 3, (places[0].num_physical, elements)).astype(np.float32)

    @partial(jax.jit, donate_argnums=0)
    @partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), P(), P("ep")), out_specs=(P("ep"), P(None, "ep")))
    def steps(slots, stacked, factor):
        def one(slots, place):
            slots, pull = jax.vjp(lambda slots: lplb.replicate(slots, place, "ep", transport="peer"), slots)
            of_slots = jnp.where(slots == slots, factor, 0)  # new memory in each step
            return slots + pull(of_slots)[0], slots

        return jax.lax.scan(one, slots, stacked)

    def right():
        home = rng.integers(-9, 9, (EXPERTS, elements)).astype(np.float32)
        rooms = np.nan_to_num(with_room(places[0], home))
        _, slots = steps(jax.device_put(rooms, jax.NamedSharding(mesh, P("ep"))), stacked, factor)
        expected = []
        for place in places:
            expected.append(held(place, home))
            home = home + summed(place, factor, np.float32)
        return all(
            ((np.asarray(shard.data) == np.stack(expected)[shard.index]) | ~is_held[shard.index[:2]][..., None]).all()
            for shard in slots.addressable_shards
        )

    return right


@pytest.mark.parametrize("broken", [False, True])
def test_delays_while_rooms_are_filled(monkeypatch, fresh, rng, mesh, broken):
    """All others have to have read what a rank changes."""
    if broken:
        monkeypatch.setattr(_peer, "release", lambda exposed, *_: exposed.buffers)
    right = right_in_rooms(monkeypatch, rng, mesh)
    assert all(right() for _ in range(20 if broken else 2)) == (not broken)


# ---- Begun, and waited for -------------------------------------------------------------------------------------------


def begun_rows_are_right(mesh, in_place: bool, elements: int, wait: bool = True) -> bool:
    """In a loop of steps that change the rows at home, all that is there once they have been waited for; or before."""
    place = chosen(np.random.default_rng(0), mesh.size)
    logical = np.arange(1, EXPERTS + 1, dtype=np.float32)[:, None]
    home = with_room(place, logical) if in_place else logical
    is_held = np.asarray(place.phy2log) >= 0

    def extremes(slots):
        return jnp.min(slots, axis=1), jnp.max(slots, axis=1)

    def bring(home, source):
        dtypes = None if in_place else (jnp.float32,)
        coming = _peer.begin_rows(dtypes, "ep", [home], source)
        early, coming = jax.lax.optimization_barrier((None if wait else extremes(*coming.sums), coming))
        exposed, made, done = _peer.finish_rows([] if in_place else [home], coming, jnp.int32(0))
        (slots,) = _peer.release(exposed, done, "ep", made)
        return slots, extremes(slots) if wait else early

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), P()), out_specs=(P(None, "ep"), P(None, "ep")))
    def run(home, place):
        source = _replicate._rows(place, "ep", in_place).source[:, None]

        def step(home, _):
            slots, found = _peer.with_what_is_coming(bring, "")(home, source)
            return (slots if in_place else home) * 2, found

        return jax.lax.scan(step, jnp.broadcast_to(home, (len(home), elements)), None, 4)[1]

    # Of several processes `jax.device_put` demands equal arrays, which those with NaNs never are.
    home = jax.make_array_from_callback(home.shape, jax.NamedSharding(mesh, P("ep")), lambda index: home[index])
    expected = held(place, logical)[:, 0] * 2.0 ** np.arange(4)[:, None]
    return all(
        ((np.asarray(shard.data) == expected[shard.index]) | ~is_held[shard.index[1]]).all()
        for found in run(home, place)
        for shard in found.addressable_shards
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_that_are_begun_are_waited_for(mesh, in_place):
    """On GPUs they are long enough not to be there at once."""
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    for elements in (6, 1 << (12 if is_cpu else 22)):
        assert begun_rows_are_right(mesh, in_place, elements)
    if not is_cpu:
        assert not all(begun_rows_are_right(mesh, in_place, 1 << 22, wait=False) for _ in range(5))


# ---- A few words of each rank ----------------------------------------------------------------------------------------


def words_of(step, place, number):
    """Words that tell steps, places and words apart; of NumPy or JAX, in uint32."""
    return step * np.uint32(2654435761) ^ place * np.uint32(40503) ^ number * np.uint32(2246822519)


def rows_of(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The devices in two rows."""
    if mesh.size < 4:
        pytest.skip("needs four devices")
    return jax.sharding.Mesh(mesh.devices.reshape(2, -1), ("data", "ep"))


@pytest.mark.parametrize("axes", ["ep", "data", ("data", "ep"), ("ep", "data")])
@pytest.mark.parametrize("check_vma", [True, False])
def test_gather_brings_the_words_of_the_group(mesh, axes, check_vma):
    """In the order of the axes; of any type of 32 bits, and mapped."""
    mesh = rows_of(mesh)
    devices = P(("data", "ep"))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=devices, out_specs=devices, check_vma=check_vma)
    def run(words):
        gather, mine = partial(_peer.gather, axis_name=axes), words[0]
        plain, signed, real = (gather(mine.astype(dtype)) for dtype in (np.uint32, np.int32, np.float32))
        mapped = jnp.moveaxis(jax.vmap(gather, in_axes=1)(mine), 0, 2)
        single = jnp.moveaxis(jax.vmap(jax.vmap(gather))(mine), 2, 0)
        return [one[None] for one in (plain, signed, real, mapped, single)]

    words = np.arange(mesh.size * 3 * 5, dtype=np.uint32).reshape(mesh.size, 3, 5)
    rows = words.reshape(2, -1, 3, 5)
    columns = rows.swapaxes(0, 1)
    expected = {
        "ep": np.repeat(rows, len(columns), axis=0),
        "data": np.tile(columns, (2, 1, 1, 1)),
        ("data", "ep"): np.broadcast_to(words, (mesh.size, *words.shape)),
        ("ep", "data"): np.broadcast_to(columns.reshape(words.shape), (mesh.size, *words.shape)),
    }[axes]
    for got in run(words):
        np.testing.assert_array_equal(np.asarray(got).reshape(expected.shape), expected.astype(got.dtype))


@pytest.mark.parametrize("axes", ["ep", ("data", "ep")])
def test_gather_in_many_steps_with_any_delays(mesh, axes):
    """Ranks are late in turn, before and after, and each step's words are those of that step."""
    mesh = rows_of(mesh)
    steps = 150 if mesh.devices.flat[0].platform == "cpu" else 10_000
    columns = mesh.shape["ep"]

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(("data", "ep")), check_vma=False)
    def run(seed):
        row, column = jax.lax.axis_index("data"), jax.lax.axis_index("ep")
        places = (jnp.arange(columns) + row * columns if axes == "ep" else jnp.arange(mesh.size)).astype(jnp.uint32)
        place, number = (row * columns + column).astype(jnp.uint32), jnp.arange(7, dtype=jnp.uint32)

        def one(carry, step):
            wrong, seed = carry
            seed = words_of(seed, place, np.uint32(1)) * np.uint32(1664525) + np.uint32(1013904223)
            before, after = (jnp.where(seed >> bits & 15 == 0, turns(mesh) // 8, 0) for bits in (20, 25))
            got = _peer.gather(late(words_of(step, place, number), before), axes)
            expected = words_of(step, places[:, None], number[None])
            return (late(wrong + jnp.sum(got != expected, dtype=jnp.uint32), after), seed), None

        return jax.lax.scan(one, (jnp.uint32(0), seed), jnp.arange(steps, dtype=jnp.uint32))[0][0][None]

    for seed in range(2):
        np.testing.assert_array_equal(run(jnp.uint32(seed)), np.zeros(mesh.size))


def test_rows_of_a_mesh_gather_as_often_as_each_likes(mesh):
    """A loop whose turns differ between the rows; and then all ranks together."""
    mesh = rows_of(mesh)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P(("data", "ep")), check_vma=False)
    def run(times):
        def one(step, total):
            return total + jnp.sum(_peer.gather(step + jax.lax.axis_index("ep"), "ep"))

        total = jax.lax.fori_loop(0, times[0], one, jnp.int32(0))
        return _peer.gather(total, ("data", "ep"))[None]

    ranks = mesh.shape["ep"]
    for times in ([3, 40], [25, 1], [0, 7]):
        totals = [sum(ranks * step + ranks * (ranks - 1) // 2 for step in range(one)) for one in times]
        np.testing.assert_array_equal(run(np.int32(times)), np.tile(np.repeat(totals, ranks), (mesh.size, 1)))


def test_gathers_of_programs_that_come_and_go(mesh):
    """Mailboxes go from one to the next, of other sizes and meshes too."""
    for turn in range(4):
        size, backwards = (6, 300)[turn % 2], turn >= 2
        of = jax.sharding.Mesh(mesh.devices[:: -1 if backwards else 1], ("ep",))
        run = jax.jit(
            jax.shard_map(
                lambda words: [_peer.gather(words[0] + step, "ep") for step in range(3)],
                mesh=of,
                in_specs=P("ep"),
                out_specs=P(),
            )
        )
        words = np.arange(mesh.size * size, dtype=np.int32).reshape(mesh.size, size)
        for _ in range(turn + 1):
            for step, got in enumerate(run(words)):
                np.testing.assert_array_equal(got, words + step)
        run.clear_cache()


# ---- balance(sync="peer") --------------------------------------------------------------------------------------------


def as_it_is(balance, ids):
    return balance(ids[0])


def by_scan(balance, ids):
    return jax.lax.scan(lambda carry, ids: (carry, balance(ids)), 0, ids)[1]


def by_vmap(balance, ids):
    return jax.vmap(balance)(ids)


def by_remat(balance, ids):
    """What the backward pass computes again."""

    def loss(scale, ids):
        out = balance(ids)
        return jnp.sum(jnp.sin(scale) * (out.physical_ids + out.rank_load[0]).astype(jnp.float32))

    return jax.grad(jax.checkpoint(loss))(jnp.float32(0.5), ids[0])


@pytest.mark.parametrize(
    ("wrap", "copies", "axis_type", "check_vma"),
    [
        (as_it_is, "chosen", AxisType.Explicit, True),
        (by_scan, "topology", AxisType.Auto, True),
        (by_vmap, "chosen", AxisType.Auto, False),
        (by_remat, "topology", AxisType.Explicit, False),
    ],
)
def test_sync_by_peers_is_all_gather_to_the_bit(rng, mesh, wrap, copies, axis_type, check_vma):
    """Also within the rows of a larger mesh."""
    two_rows = mesh.size >= 4
    shape = (2, mesh.size // 2) if two_rows else (1, mesh.size)
    mesh = jax.sharding.Mesh(mesh.devices.reshape(shape), ("data", "ep"), axis_types=(axis_type,) * 2)
    ranks = shape[1]
    place = (
        lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=ranks, redundants_per_rank=1)
        if copies == "chosen"
        else placement(topology.ring(ranks), EXPERTS, ranks, 1)
    )

    def run(sync, ids):
        balance = partial(lplb.balance, placement=place, axis_name="ep", sync=sync, implementation="ffi")
        return jax.tree.map(lambda leaf: leaf[None], wrap(balance, ids[:, 0]))

    both = jax.jit(
        jax.shard_map(
            lambda ids: [run(sync, ids) for sync in ("peer", "all_gather")],
            mesh=mesh,
            in_specs=P(None, ("data", "ep")),
            out_specs=P(("data", "ep")),
            check_vma=check_vma,
        )
    )
    ids = np.stack([skewed_ids(rng, mesh.size * 48, 3, EXPERTS).reshape(mesh.size, 48, 3) for _ in range(3)])
    peer, all_gather = both(jax.device_put(ids, jax.NamedSharding(mesh, P(None, ("data", "ep")))))
    jax.tree.map(assert_same_bits, peer, all_gather)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(peer))


def in_pure_jax(_):
    return "implementation='xla' makes no custom calls", mesh_of(), {"implementation": "xla"}


def sync_of_several_processes(monkeypatch):
    several_processes(monkeypatch, lambda _: "")  # which can read each other's memory
    return "there are 2 processes", mesh_of(), {}


def sync_on_a_partly_manual_mesh(_):
    return r"axes \['tp'\] are not manual", mesh_of("ep", "tp", shape=(4, 2)), {}


@pytest.mark.parametrize("case", [in_pure_jax, sync_of_several_processes, sync_on_a_partly_manual_mesh])
def test_sync_out_of_reach(monkeypatch, case):
    """It is refused, with the reason, and what is named in its stead works."""
    why_not, mesh, options = case(monkeypatch)
    place = placement(topology.ring(mesh.shape["ep"]), EXPERTS, mesh.shape["ep"], 1)

    def trace(sync):
        run = jax.shard_map(
            lambda ids: lplb.balance(ids, place, axis_name="ep", sync=sync, **options).rank_load,
            mesh=mesh,
            in_specs=P("ep"),
            out_specs=P(),
            axis_names={"ep"},
        )
        return jax.eval_shape(run, jax.ShapeDtypeStruct((16, 2), jnp.int32))

    with pytest.raises(ValueError, match=f"sync = 'peer': .*{why_not}.*; pass sync='all_gather'"):
        trace("peer")
    assert trace("all_gather").shape == (mesh.shape["ep"],)
