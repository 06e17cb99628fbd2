"""Whole arrays that are sharded over meshes of any kind of axes, without shard_map: the values of unsharded ones."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import placement, skewed_ids, topology
from jax.sharding import AxisType

import jax_lplb as lplb

EXPERTS, RANKS = 32, 8
MESHES = {
    "explicit": ((RANKS, "ep", AxisType.Explicit),),
    "auto": ((RANKS, "ep", AxisType.Auto),),
    "explicit x explicit": ((4, "ep", AxisType.Explicit), (2, "tp", AxisType.Explicit)),
    "explicit x auto": ((4, "ep", AxisType.Explicit), (2, "tp", AxisType.Auto)),
    "auto x explicit": ((4, "ep", AxisType.Auto), (2, "tp", AxisType.Explicit)),
}


def mesh_of(name: str) -> jax.sharding.Mesh:
    sizes, names, kinds = zip(*MESHES[name], strict=True)
    return jax.make_mesh(sizes, names, axis_types=kinds)


@pytest.fixture(scope="module")
def cases() -> dict:
    """Of each public function how it is called, with what, and what comes of it unsharded."""
    rng = np.random.default_rng(0)
    place = placement(topology.cube(), EXPERTS, RANKS, 2)
    other = lplb.Placement.from_topology(
        topology.cube(), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2, load=rng.lognormal(0, 1, EXPERTS)
    )
    wide = lplb.Placement.from_topology(
        topology.cube(), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2, repeats=True
    )
    eplb = lplb.Placement.from_eplb(rng.lognormal(0, 1, EXPERTS), num_ranks=RANKS, redundants_per_rank=2)
    planned = lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2)
    ids = skewed_ids(rng, 160, 4, EXPERTS)
    load = np.bincount(ids.ravel(), minlength=EXPERTS).astype(np.int32)
    weights = rng.normal(size=(EXPERTS, 4)).astype(np.float32)
    split = rng.uniform(size=(EXPERTS, 2)).astype(np.float32)
    calls = {
        "count_load": (lambda ids: lplb.count_load(ids, EXPERTS), ids),
        "solve": (lambda load: lplb.solve(load, place), load),
        "assign": (lambda ids, load, split: lplb.assign(ids, split, place, load=load), ids, load, split),
        "balance": (lambda ids: lplb.balance(ids, place), ids),
        "balance per batch": (lambda ids: lplb.balance(ids, planned), ids),
        "choose": (lambda load: planned.choose(load), load),
        "balance by load": (lambda ids, load: lplb.balance(ids, eplb, load=load), ids, load),
        "select": (lambda load: place.select(load), load),
        "select with repeats": (lambda load: wide.select(load), load),
        "permute_experts": (lambda weights: lplb.permute_experts(weights, place, other), weights),
    }
    return {
        name: (function, arguments, jax.jit(function)(*arguments)) for name, (function, *arguments) in calls.items()
    }


@pytest.mark.parametrize(
    ("mesh", "in_context"),
    [
        ("explicit", True),
        ("auto", False),
        ("explicit x explicit", False),
        ("explicit x auto", False),
        ("auto x explicit", False),
    ],
)
def test_equals_unsharded(cases, mesh, in_context):
    """Under jit and, on one of the meshes, without."""
    eager, mesh = mesh == "explicit", mesh_of(mesh)
    sharding = jax.NamedSharding(mesh, jax.P("ep"))
    for name, (function, arguments, expected) in cases.items():
        sharded = jax.device_put(arguments, sharding)
        with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
            results = [jax.jit(function)(*sharded), *([function(*sharded)] if eager else [])]
        for result in results:
            for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(got, want, err_msg=name)
        if mesh.axis_types[0] == AxisType.Explicit and name in (
            "assign",
            "balance",
            "balance per batch",
            "permute_experts",
        ):
            first = jax.tree.leaves(results[0])[0]  # of the tokens, or the rows: as they came
            assert first.sharding.is_equivalent_to(sharding, first.ndim)


def test_pure_jax_equals_unsharded(rng):
    place, ids = placement(topology.cube(), EXPERTS, RANKS, 2), skewed_ids(rng, 160, 4, EXPERTS)
    run = jax.jit(partial(lplb.balance, placement=place, implementation="xla"))
    sharded = jax.device_put(ids, jax.NamedSharding(mesh_of("explicit"), jax.P("ep")))
    for got, want in zip(run(sharded), run(ids), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("cut", [jax.P("ep"), jax.P("ep", None, "tp")])
@pytest.mark.parametrize("axes", ["explicit x explicit", "auto x explicit"])
def test_within_a_partly_manual_shard_map(rng, axes, cut):
    """Where an Explicit axis is left to JAX: rows, copies and their gradients, cut over it or not."""
    mesh = mesh_of(axes)
    load = rng.lognormal(0, 1, 16)
    along = lplb.Placement.from_topology(
        topology.ring(4), num_experts=16, num_ranks=4, redundants_per_rank=2, load=load
    )
    logical = rng.normal(size=(16, 3, 4)).astype(np.float32)
    ids = skewed_ids(rng, 64, 2, 16)
    for place in (along, lplb.Placement.from_eplb(load, num_ranks=4, redundants_per_rank=2)):

        @jax.jit
        @partial(jax.shard_map, mesh=mesh, in_specs=jax.P("ep"), out_specs=jax.P("ep"), axis_names={"ep"})
        def step(home, ids, place=place):
            def loss(home):
                rows, slots = lplb.to_logical(home, place, axis_name="ep"), lplb.replicate(home, place, "ep")
                return jnp.sum(rows) + jnp.sum(slots), (rows, slots)

            gradient, (rows, slots) = jax.grad(loss, has_aux=True)(home)
            return rows, slots, gradient, lplb.balance(ids, place, axis_name="ep").physical_ids

        home = jax.device_put(logical[place.home_order], jax.NamedSharding(mesh, cut))
        with jax.set_mesh(mesh):
            rows, slots, gradient, physical_ids = step(home, jax.device_put(ids, jax.NamedSharding(mesh, jax.P("ep"))))
        np.testing.assert_array_equal(rows, logical)
        np.testing.assert_array_equal(slots, logical[place.phy2log])
        copies = np.bincount(place.phy2log, minlength=16)[place.home_order]
        np.testing.assert_array_equal(gradient, np.broadcast_to(1 + copies[:, None, None], logical.shape))
        np.testing.assert_array_equal(physical_ids, lplb.balance(ids, place).physical_ids)
