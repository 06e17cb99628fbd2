"""Whole arrays that are sharded over meshes of any kind of axes, without shard_map: the values of unsharded ones."""

import contextlib
from functools import partial

import jax
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


def cases(rng: np.random.Generator):
    """Of each public function, what it is called with, and how."""
    place = placement(topology.cube(), EXPERTS, RANKS, 2)
    other = lplb.Placement.from_topology(
        topology.cube(), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2, load=rng.lognormal(0, 1, EXPERTS)
    )
    eplb = lplb.Placement.from_eplb(rng.lognormal(0, 1, EXPERTS), num_ranks=RANKS, redundants_per_rank=2)
    ids = skewed_ids(rng, 160, 4, EXPERTS)
    load = np.bincount(ids.ravel(), minlength=EXPERTS).astype(np.int32)
    weights = rng.normal(size=(EXPERTS, 4)).astype(np.float32)
    split = rng.uniform(size=(EXPERTS, 2)).astype(np.float32)
    return {
        "count_load": (lambda ids: lplb.count_load(ids, EXPERTS), ids),
        "solve": (lambda load: lplb.solve(load, place), load),
        "assign": (lambda ids, load, split: lplb.assign(ids, split, place, load=load), ids, load, split),
        "balance": (lambda ids: lplb.balance(ids, place), ids),
        "balance by load": (lambda ids, load: lplb.balance(ids, eplb, load=load), ids, load),
        "select": (lambda load: place.select(load), load),
        "permute_experts": (lambda weights: lplb.permute_experts(weights, place, other), weights),
    }


@pytest.mark.parametrize(
    ("mesh", "in_context"),
    [
        ("explicit", False),
        ("explicit", True),
        ("auto", False),
        ("explicit x explicit", True),
        ("explicit x auto", False),
        ("auto x explicit", False),
    ],
)
def test_equals_unsharded(rng, mesh, in_context):
    mesh = mesh_of(mesh)
    sharding = jax.NamedSharding(mesh, jax.P("ep"))
    for name, (function, *arguments) in cases(rng).items():
        expected = jax.jit(function)(*arguments)
        sharded = jax.device_put(arguments, sharding)
        with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
            results = [jax.jit(function)(*sharded), function(*sharded)]
        for result in results:
            for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(got, want, err_msg=name)
        if mesh.axis_types[0] == AxisType.Explicit and name in ("assign", "balance", "permute_experts"):
            first = jax.tree.leaves(results[0])[0]  # of the tokens, or the rows: as they came
            assert first.sharding.is_equivalent_to(sharding, first.ndim)


def test_pure_jax_equals_unsharded(rng):
    place, ids = placement(topology.cube(), EXPERTS, RANKS, 2), skewed_ids(rng, 160, 4, EXPERTS)
    run = jax.jit(partial(lplb.balance, placement=place, implementation="xla"))
    sharded = jax.device_put(ids, jax.NamedSharding(mesh_of("explicit"), jax.P("ep")))
    for got, want in zip(run(sharded), run(ids), strict=True):
        np.testing.assert_array_equal(got, want)
