"""Weights carried from one home order to another: rows arrive, bits stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import topology

import jax_lplb as lplb

P = jax.sharding.PartitionSpec
EXPERTS, RANKS = 32, 8


def by_load(rng: np.random.Generator) -> lplb.Placement:
    load = rng.lognormal(0, 1, EXPERTS)
    return lplb.Placement.from_topology(
        topology.cube(), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2, load=load
    )


def tree(rng: np.random.Generator) -> dict:
    """Leaves of several dtypes; every bit pattern, NaN included."""
    bits = rng.integers(0, 2**32, (EXPERTS, 3, 5), np.uint32)
    return {
        "w": jnp.asarray(bits.view(np.float32)),
        "opt": [jnp.asarray(bits[:, 0].astype(np.uint16)).view(jnp.bfloat16), jnp.arange(EXPERTS)],
    }


def assert_same_bits(one, two) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_rows_are_those_of_the_home_experts(rng):
    place = by_load(rng)
    homes = place.phy2log.reshape(RANKS, -1)[:, : EXPERTS // RANKS].ravel()
    np.testing.assert_array_equal(place.home_order, homes)
    moved = lplb.from_logical({"w": np.arange(EXPERTS) * 10}, place)
    np.testing.assert_array_equal(moved["w"], homes * 10)
    np.testing.assert_array_equal(lplb.Placement.from_phy2log(homes, RANKS).home_order, np.arange(EXPERTS))


def test_round_trips_are_bitwise(rng):
    old, new, weights = by_load(rng), by_load(rng), tree(rng)
    at_old = lplb.from_logical(weights, old)
    assert_same_bits(lplb.to_logical(at_old, old), weights)
    at_new = lplb.permute_experts(at_old, old, new)
    assert_same_bits(at_new, lplb.from_logical(weights, new))
    assert_same_bits(lplb.permute_experts(at_new, new, old), at_old)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharded_under_jit(rng, axis_type):
    """Placements as arguments: one compilation; the donated buffers are reused, and the sharding stays."""
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(getattr(jax.sharding.AxisType, axis_type),))
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, P("ep"))
        old, weights = by_load(rng), jax.device_put(tree(rng), sharding)
        placements = [by_load(rng) for _ in range(3)]
        expected = [lplb.from_logical(tree_of_numpy(weights), new) for new in placements]
        step = jax.jit(lplb.permute_experts, donate_argnums=0, out_shardings=sharding)
        state = step(weights, lplb.Placement.from_phy2log(np.arange(EXPERTS), RANKS), old)
        for new, want in zip(placements, expected, strict=True):
            before = state
            state = step(before, old, new)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
            assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in jax.tree.leaves(state))
            assert_same_bits(state, want)
            old = new
        assert step._cache_size() == 2  # from no topology, and from one


def tree_of_numpy(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("axes", ["ep", ("a", "b"), ("b", "a")])
def test_within_shard_map(rng, axes):
    shape, names = ((RANKS,), ("ep",)) if axes == "ep" else ((2, 4), ("a", "b"))
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    old, new, weights = by_load(rng), by_load(rng), tree(rng)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(axes), P(), P()), out_specs=(P(axes), P(axes)))
    def step(weights, old, new):
        at_old = lplb.from_logical(weights, old, axis_name=axes)
        return at_old, lplb.permute_experts(at_old, old, new, axis_name=axes)

    at_old, at_new = step(weights, old, new)
    assert_same_bits(at_old, lplb.from_logical(weights, old))
    assert_same_bits(at_new, lplb.from_logical(weights, new))


def test_layers_by_vmap(rng):
    load = rng.lognormal(0, 1, (3, EXPERTS))
    places = lplb.Placement.from_topology(
        topology.cube(), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2, load=load
    )
    weights = jnp.tile(jnp.arange(EXPERTS), (3, 1))
    moved = jax.jit(jax.vmap(lplb.from_logical))(weights, places)
    np.testing.assert_array_equal(moved, places.home_order)
    with pytest.raises(ValueError, match="placement has leading axes"):
        lplb.from_logical(weights[0], places)


def test_wrong_arguments(rng):
    place = by_load(rng)
    with pytest.raises(ValueError, match=r"tree\['w'\] must have 32 rows, one for each expert, got shape \(31, 2\)"):
        lplb.to_logical({"w": np.zeros((31, 2))}, place)
    with pytest.raises(ValueError, match=r"tree must have 32 rows.*\(\)"):
        lplb.to_logical(np.float32(1), place)
    other = lplb.Placement.from_phy2log(np.arange(16), 8)
    with pytest.raises(ValueError, match="old and new must have equally many experts, got 32 and 16"):
        lplb.permute_experts({}, place, other)
    with pytest.raises(TypeError, match=r"new must be a jax_lplb\.Placement, got list"):
        lplb.permute_experts({}, place, [])
    with pytest.raises(ValueError, match="axis_name = 'ep' is not bound here"):
        lplb.to_logical({}, place, axis_name="ep")
