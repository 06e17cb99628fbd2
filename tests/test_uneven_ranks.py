"""Ranks that do not divide the experts: some have one fewer, and rows of padding in their weights."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import optimum, skewed_ids
from test_moe import (
    D_EXPERT,
    D_MODEL,
    TOP_K,
    P,
    arrays_of,
    check_against_dense,
    inputs,
    mesh_of,
    params_of,
    value_and_grads,
)
from test_padding import value_and_grads as of_masked

import jax_lplb as lplb
from jax_lplb.flax import MoE

EXPERTS, RANKS = 10, 4
ORDER = np.array([0, 1, -1, 2, 3, 4, 5, 6, -1, 7, 8, 9])  # two, three, two and three experts
per_batch = partial(lplb.Placement.per_batch, num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2)


def by_past(rng, num_slots: int = 16) -> lplb.Placement:
    return lplb.Placement.from_eplb(rng.lognormal(0, 1, EXPERTS), num_ranks=RANKS, num_slots=num_slots)


def make(placement=None, num_experts: int = EXPERTS, **options) -> MoE:
    options = {"mesh": mesh_of((RANKS, "ep")), "axis_name": "ep", "dtype": jnp.float32} | options
    layer = MoE(D_MODEL, num_experts, D_EXPERT, TOP_K, placement=placement, rngs=nnx.Rngs(0), **options)
    layer.router[...] = layer.router[...] * 4  # an uneven router
    return layer


# ---- Placements ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "ranks"), [(10, 4), (256, 72), (384, 144), (3, 8)])
def test_experts_are_spread_evenly(experts, ranks):
    """Rank i has those from i * experts // ranks on; all placements without a topology keep weights so."""
    rows = -(-experts // ranks)
    expected = np.full((ranks, rows), -1)
    for rank in range(ranks):
        own = np.arange(rank * experts // ranks, (rank + 1) * experts // ranks)
        assert rows - 1 <= len(own) <= rows
        expected[rank, : len(own)] = own
    planned = lplb.Placement.per_batch(num_experts=experts, num_ranks=ranks, redundants_per_rank=1)
    packed = lplb.Placement.from_eplb(np.ones((2, experts)), num_ranks=ranks, redundants_per_rank=1)
    np.testing.assert_array_equal(planned.phy2log.reshape(ranks, -1)[:, :rows], expected)
    np.testing.assert_array_equal(planned.phy2log.reshape(ranks, -1)[:, rows], -1)
    for place, leading in ((planned, ()), (packed, (2,))):
        assert place.rows_per_rank == rows
        assert place.slots_per_rank == rows + 1
        np.testing.assert_array_equal(place.home_order, np.broadcast_to(expected.ravel(), (*leading, expected.size)))
        home_rank = np.nonzero(expected >= 0)[0]
        np.testing.assert_array_equal(place.home_rank, np.broadcast_to(home_rank, (*leading, experts)))
        on_device = jax.tree.map(jnp.asarray, place)
        np.testing.assert_array_equal(jax.jit(lambda place: place.home_order)(on_device), place.home_order)
        np.testing.assert_array_equal(on_device.home_rank, place.home_rank)


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(256, 72, 288), (256, 144, 288), (384, 144, 432), (10, 4, 12)])
def test_eplb_fills_any_number_of_slots(rng, experts, ranks, slots):
    """Each expert somewhere, none twice on a rank, and as even as EPLB's own placement where loads are split evenly."""
    load = rng.lognormal(0, 1, experts)
    place = lplb.Placement.from_eplb(load, num_ranks=ranks, num_slots=slots)
    by_rank = np.sort(place.phy2log.reshape(ranks, -1), axis=1)
    assert np.all(by_rank[:, 1:] != by_rank[:, :-1])
    assert np.all(np.bincount(place.phy2log, minlength=experts) >= 1)
    assert place == lplb.Placement.from_eplb(
        load, num_ranks=ranks, redundants_per_rank=slots // ranks - place.rows_per_rank
    )
    original, _, count = lplb.eplb.rebalance_experts(load[None], slots, 1, 1, ranks)
    even = (load / count[0])[original[0]].reshape(ranks, -1).sum(axis=1).max()
    assert optimum(load, place).item() <= even * (1 + 1e-6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({}, ValueError, "give either .*, got redundants_per_rank = None and num_slots = None"),
        ({"num_slots": 12, "redundants_per_rank": 0}, ValueError, "give either .* = 0 and num_slots = 12"),
        ({"num_slots": 14}, ValueError, "num_slots must be a multiple of num_ranks = 4, .* 10 experts of load, got 14"),
        ({"num_slots": 8}, ValueError, "num_slots must be .*, and at least the 10 experts of load, got 8"),
        ({"num_slots": 12.0}, TypeError, "num_slots must be an integer, got 12.0"),
        ({"num_slots": 44}, ValueError, "num_slots = 44 gives a rank 11 slots, more than the 10 experts"),
        ({"redundants_per_rank": 8}, ValueError, "redundants_per_rank = 8 gives a rank 11 slots, more than the 10"),
    ],
)
def test_from_eplb_refuses(changed, error, message):
    with pytest.raises(error, match=message):
        lplb.Placement.from_eplb(np.ones(10), num_ranks=4, **changed)


def test_refuses_more_copies_than_the_smallest_group_has_experts():
    """Whose cures work; and experts that topologies cannot spread."""
    groups = partial(per_batch, num_groups=4)
    with pytest.raises(ValueError, match="gives a rank 4 slots, more than the 2 experts of its group: at most 0"):
        groups(redundants_per_rank=1)
    assert groups(redundants_per_rank=0).slots_per_rank == 3
    with pytest.raises(
        ValueError, match=r"redundants_per_rank = 8 .* more than the 10 experts of its group: at most 7"
    ):
        per_batch(redundants_per_rank=8)
    assert per_batch(redundants_per_rank=7).slots_per_rank == 10
    with pytest.raises(ValueError, match=r"num_experts must be divisible by .*; per_batch, from_eplb and from_phy2log"):
        lplb.Placement.from_topology(lplb.topology.ring(4), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=1)


@pytest.mark.parametrize("chosen", [False, True])
def test_what_is_loaded_equals_what_was_saved(rng, tmp_path, chosen):
    place = per_batch(num_groups=2, redundants_per_rank=1)
    if chosen:
        place = place.choose(rng.integers(0, 99, EXPERTS).astype(np.int32))
    for one in (place, by_past(rng)):
        one.save(tmp_path / "placement")
        assert lplb.Placement.load(tmp_path / "placement") == one


# ---- Balance ---------------------------------------------------------------------------------------------------------


def check_balanced(out: lplb.Balanced, ids: np.ndarray, place: lplb.Placement, tol: float = 1e-4) -> None:
    """Every token goes to a slot of its expert, and the busiest rank has no more than the best split and rounding."""
    used = jax.tree.map(np.asarray, out.placement)
    valid = (ids >= 0) & (ids < place.num_experts)
    physical = np.asarray(out.physical_ids)
    np.testing.assert_array_equal(physical >= 0, valid)
    np.testing.assert_array_equal(used.phy2log[physical[valid]], ids[valid])
    load = np.bincount(ids[valid], minlength=place.num_experts)
    np.testing.assert_array_equal(out.load, load)
    rank_load = np.bincount(physical[valid] // place.slots_per_rank, minlength=place.num_ranks)
    np.testing.assert_array_equal(out.rank_load, rank_load)
    best = optimum(load, used)
    largest = rank_load.reshape(place.num_groups, -1).max(axis=1)
    assert np.all(best <= largest)
    assert np.all(largest <= best * (1 + 2 * tol) + place.slots_per_rank)  # a token more or less in each slot
    assert np.all(out.lower_bound <= best * (1 + 1e-5))
    assert np.all(out.gap <= tol)
    for expert in range(place.num_experts):
        slots = np.flatnonzero(used.phy2log == expert)
        of_expert = used.log2phy[expert]
        np.testing.assert_array_equal(np.sort(of_expert[of_expert >= 0]), slots)


@pytest.mark.parametrize(
    ("experts", "ranks", "make"),
    [
        (256, 72, partial(lplb.Placement.per_batch, redundants_per_rank=2)),
        (384, 144, partial(lplb.Placement.per_batch, redundants_per_rank=2, num_groups=2)),
        (256, 72, lambda num_experts, num_ranks: None),
    ],
)
def test_balance(rng, experts, ranks, make):
    """With copies chosen for the batch, in groups too, and with those of 288 slots by past load."""
    ids = skewed_ids(rng, 8192, 8, experts, sigma=0.6)
    ids[::7] = experts
    past = np.bincount(skewed_ids(rng, 2048, 8, experts, sigma=0.6).ravel(), minlength=experts)
    place = make(num_experts=experts, num_ranks=ranks)
    place = place or lplb.Placement.from_eplb(past, num_ranks=ranks, num_slots=288)
    out = jax.tree.map(np.asarray, jax.jit(lplb.balance)(ids, place))
    check_balanced(out, ids, place)
    if place.planning is not None:
        homes = place.phy2log.reshape(ranks, -1)[:, : place.rows_per_rank]
        np.testing.assert_array_equal(out.placement.phy2log.reshape(ranks, -1)[:, :-2], homes)
        if place.num_groups == 1:
            assert out.rank_load.max() <= 1.015 * ids[ids < experts].size / ranks
        assert jax.tree.map(np.asarray, place.choose(out.load)) == out.placement
        evaluation = lplb.evaluate(place, out.load[None], progress=False)
        np.testing.assert_allclose(evaluation.assigned * out.load.sum() / ranks, np.max(out.rank_load), rtol=1e-6)
        np.testing.assert_array_equal(evaluation.home, evaluation.contiguous)


def test_loads_that_are_given(rng):
    """The plan is that of the load, to the bit by custom calls and in pure JAX; of groups, and of layers at once."""
    place, ids = per_batch(num_groups=2, redundants_per_rank=1, min_tokens=20), skewed_ids(rng, 500, 3, EXPERTS)
    loads = rng.lognormal(5, 1, (2, EXPERTS)).astype(np.float32)
    chosen, other = (
        jax.tree.map(np.asarray, jax.jit(partial(place.choose, implementation=how))(loads)) for how in ("ffi", "xla")
    )
    assert other == chosen
    out = jax.jit(lplb.balance)(ids, place, load=loads[1])
    np.testing.assert_array_equal(out.load, np.rint(loads[1]))
    np.testing.assert_array_equal(out.placement.phy2log, chosen.phy2log[1])
    np.testing.assert_array_equal(out.placement.log2phy, chosen.log2phy[1])
    np.testing.assert_array_equal(chosen.phy2log[1][np.asarray(out.physical_ids)], ids)
    assert np.any(np.asarray(chosen.phy2log)[:, 3::4] >= 0)


@pytest.mark.parametrize("experts", [EXPERTS, 3])
def test_balance_over_ranks(rng, experts):
    """Within shard_map, with ids of padding; of fewer experts than ranks, too."""
    place = per_batch(num_experts=experts, redundants_per_rank=1)
    ids = skewed_ids(rng, 64, 2, experts)
    ids[3::5] = -1
    specs = lplb.Balanced(P("ep"), *[P()] * 6)
    run = partial(lplb.balance, placement=place, axis_name="ep")
    check_balanced(
        jax.jit(jax.shard_map(run, mesh=mesh_of((RANKS, "ep")), in_specs=P("ep"), out_specs=specs))(ids), ids, place
    )


# ---- Weights ---------------------------------------------------------------------------------------------------------


def test_weights_go_to_logical_order_and_back(rng):
    """Exactly, with zeros for padding; to placements of other ranks, and within shard_map."""
    logical = {"w": rng.normal(size=(EXPERTS, 3)).astype(np.float32), "n": np.arange(EXPERTS)}
    place, mesh = by_past(rng), mesh_of((RANKS, "ep"))
    home = lplb.from_logical(logical, place)
    for name, leaf in logical.items():
        np.testing.assert_array_equal(home[name][ORDER < 0], 0)
        np.testing.assert_array_equal(home[name][ORDER >= 0], leaf)
        np.testing.assert_array_equal(lplb.to_logical(home, place)[name], leaf)
    # To eight ranks and back, and to an order by load, of two ranks.
    other = lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=8, redundants_per_rank=1)
    load = rng.lognormal(0, 1, EXPERTS)
    sorted_ = lplb.Placement.from_topology(
        lplb.topology.ring(2), num_experts=EXPERTS, num_ranks=2, redundants_per_rank=1, load=load
    )
    for new in (other, sorted_, jax.tree.map(jnp.asarray, sorted_)):
        moved = lplb.permute_experts(home, place, new)
        np.testing.assert_array_equal(moved["n"], lplb.from_logical(logical["n"], new))
        np.testing.assert_array_equal(lplb.permute_experts(moved, new, place)["w"], home["w"])
    rows = jnp.arange(1, 13).at[jnp.array([2, 8])].set(0)
    stay = jax.shard_map(
        lambda w: lplb.permute_experts(w, place, per_batch(), axis_name="ep"),
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    np.testing.assert_array_equal(stay(rows), rows)
    inside = jax.shard_map(
        lambda w: lplb.to_logical(w, place, axis_name="ep"), mesh=mesh, in_specs=P("ep"), out_specs=P("ep")
    )
    with pytest.raises(ValueError, match="its 4 ranks do not divide 10 rows evenly; leave axis_name out"):
        inside(rows)


@pytest.mark.parametrize("transport", ["peer", "collective"])
@pytest.mark.parametrize("name", ["chosen", "kept", "by past"])
def test_replicate(rng, transport, name):
    """Each slot has its expert's weights, or zeros, whatever padding holds, and no slot's gradient is padding's."""
    place = by_past(rng)
    if name != "by past":
        place = jax.tree.map(np.asarray, per_batch().choose(rng.integers(0, 999, EXPERTS).astype(np.int32)))
    if name == "kept":
        place = dataclasses.replace(place, planning=None)
    logical = rng.normal(size=(EXPERTS, 3, 2)).astype(np.float32)
    home = np.full((len(ORDER), 3, 2), np.nan, np.float32)
    home[ORDER >= 0] = logical
    weight = rng.normal(size=(place.num_physical, 3, 2)).astype(np.float32)

    def on_rank(home, weight):
        slots, pull = jax.vjp(lambda home: lplb.replicate(home, place, "ep", transport=transport), home)
        return slots, pull(weight)[0]

    mesh = mesh_of((RANKS, "ep"))
    slots, grads = jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))(home, weight)
    holds = (place.phy2log >= 0)[:, None, None]
    np.testing.assert_array_equal(slots, np.where(holds, logical[place.phy2log], 0))
    expected = np.zeros_like(home)
    rows = np.flatnonzero(ORDER >= 0)
    np.add.at(expected, rows[place.phy2log[place.phy2log >= 0]], weight[place.phy2log >= 0])
    np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-6)


# ---- The layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dispatch", "transport", "buffer_factor"),
    [
        ("per batch", "peer", "peer", 4.0),
        ("per batch", "all_to_all", "collective", 0.2),
        ("slots", "peer", "collective", 0.2),
        ("no copies", "ring", None, 4.0),
        ("per batch", "dense", None, 4.0),
        ("fewer experts", "peer", "peer", 4.0),
    ],
)
def test_the_layer_equals_the_dense_one(rng, name, dispatch, transport, buffer_factor):
    """Results and gradients; parameters of padding are 0, and so are their gradients."""
    experts = 3 if name == "fewer experts" else EXPERTS
    place = {"slots": by_past(rng), "no copies": per_batch(redundants_per_rank=0)}.get(name)
    layer = make(place, experts, dispatch=dispatch, transport=transport, buffer_factor=buffer_factor)
    x, weight = inputs(rng, 352)
    metrics = check_against_dense(layer, x, weight)
    assert (metrics.rounds > 1) == (buffer_factor < 1)
    order = layer.placement.get_value().home_order
    assert layer.w_in.shape == (len(order), D_MODEL, 2 * D_EXPERT)
    assert layer.w_in.sharding.shard_shape(layer.w_in.shape)[0] == -(-experts // RANKS)
    _, (grads, _) = value_and_grads(layer, x, weight)
    for leaves in (params_of(layer), arrays_of(grads)):
        for leaf in (leaves["w_in"], leaves["w_out"]):
            np.testing.assert_array_equal(np.any(leaf, axis=(1, 2)), np.asarray(order) >= 0)
    load = np.asarray(metrics.load)
    evaluation = lplb.evaluate(jax.tree.map(np.asarray, layer.placement.get_value()), load[None], progress=False)
    np.testing.assert_allclose(metrics.contiguous, evaluation.contiguous.item(), rtol=1e-6)
    np.testing.assert_allclose(metrics.home, evaluation.home.item(), rtol=1e-6)
    np.testing.assert_allclose(metrics.balanced, evaluation.assigned.item(), rtol=1e-6)


@pytest.mark.parametrize(
    ("dispatch", "transport", "prepared"), [("peer", "peer", False), ("peer", "peer", True), ("dense", None, False)]
)
def test_what_rows_of_padding_hold_does_not_show(rng, dispatch, transport, prepared):
    """Nor is it what tokens that are masked pick: results and gradients are as with zeros."""
    layer, (x, weight) = make(dispatch=dispatch, transport=transport), inputs(rng, 64)
    mask, got = np.arange(len(x)) % 3 > 0, []
    for value in (0, jnp.nan):
        for param in (layer.w_in, layer.w_out):
            param[...] = jnp.where((ORDER < 0)[:, None, None], value, param[...])
        (result, _), grads = of_masked(layer, x, weight, mask, prepared)
        got.append((result, *jax.tree.leaves(grads)))
    for leaf, other in zip(*got, strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_checkpoints_are_logical(rng):
    """A layer takes them whatever its ranks, and stacks of layers are made with rows of padding each."""
    weights = rng.normal(size=(EXPERTS, D_MODEL, 2 * D_EXPERT)), rng.normal(size=(EXPERTS, D_EXPERT, D_MODEL))
    four, two = make(), make(mesh=mesh_of((2, "ep")))
    for layer in (four, two):
        layer.set_experts(*weights)
        for name, rows in zip(("w_in", "w_out"), weights, strict=True):
            got = lplb.to_logical(getattr(layer, name)[...], layer.placement.get_value())
            np.testing.assert_array_equal(got, rows.astype(np.float32))
    with pytest.raises(ValueError, match=r"w_in must have shape \(10, 12, 40\), in logical order, got \(12, 12, 40\)"):
        four.set_experts(four.w_in[...], weights[1])
    create = partial(MoE, D_MODEL, EXPERTS, D_EXPERT, TOP_K, mesh=mesh_of((RANKS, "ep")), axis_name="ep")
    stack = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: create(rngs=rngs)))(nnx.Rngs(0))
    assert stack.w_in.shape == (2, len(ORDER), D_MODEL, 2 * D_EXPERT)
    np.testing.assert_array_equal(np.any(stack.w_in[...], axis=(2, 3)), np.tile(ORDER >= 0, (2, 1)))
