"""`jax.export`: a program is written in one process, and another, which imports jax_lplb alone, runs it."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_lplb as lplb
from jax_lplb import _ffi
from jax_lplb.flax import MoE

pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers")

RANKS = 8
LOAD = """
import pathlib, sys
import jax, jax.export
import jax_lplb
import numpy as np

folder = pathlib.Path(sys.argv[1])
exported = jax.export.deserialize((folder / "program").read_bytes())
mesh = jax.make_mesh((exported.nr_devices,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
with np.load(folder / "given.npz", allow_pickle=False) as given:
    operands = [given[f"arr_{i}"] for i in range(len(given.files))]
shardings = exported.in_shardings_jax(mesh)
flat = [jax.device_put(operand, sharding) for operand, sharding in zip(operands, shardings, strict=True)]
results = exported.call(*flat)
np.savez(folder / "results.npz", *[np.asarray(leaf) for leaf in jax.tree.leaves(results)])
"""


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((RANKS,), ("ep",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def placement():
    return lplb.Placement.per_batch(num_experts=16, num_ranks=RANKS, redundants_per_rank=1)


def balanced(mesh, placement):
    def on_rank(ids):
        out = lplb.balance(ids, placement, axis_name="ep")
        return out.physical_ids, out.placement.phy2log[None]

    return jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))


def layer(mesh, placement):
    """The layer and its weights, flat; with collectives."""
    moe = MoE(
        8,
        16,
        4,
        2,
        placement=placement,
        mesh=mesh,
        axis_name="ep",
        transport="collective",
        dispatch="all_to_all",
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(moe)
    leaves, tree = jax.tree.flatten(state)

    def run(x, *leaves):
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(x)[0]

    return jax.jit(run), leaves


def exported(function, operands, platforms):
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in lplb.CUSTOM_CALLS]
    return export.export(function, platforms=platforms, disabled_checks=checks)(*operands)


@pytest.mark.parametrize("what", ["balance", "layer"])
def test_runs_in_another_process(tmp_path: pathlib.Path, rng, mesh, placement, what):
    by_rank = jax.NamedSharding(mesh, P("ep"))
    if what == "balance":
        function = balanced(mesh, placement)
        operands = [jax.device_put(rng.integers(0, 16, (RANKS * 8, 2)).astype(np.int32), by_rank)]
    else:
        function, leaves = layer(mesh, placement)
        operands = [jax.device_put(rng.normal(size=(RANKS * 8, 8)).astype(np.float32), by_rank), *leaves]
    (tmp_path / "program").write_bytes(exported(function, operands, ("cpu",)).serialize())
    np.savez(tmp_path / "given.npz", *map(np.asarray, operands))
    subprocess.run([sys.executable, "-c", LOAD, tmp_path], check=True)
    with np.load(tmp_path / "results.npz", allow_pickle=False) as results:
        for name, expected in zip(results.files, jax.tree.leaves(function(*operands)), strict=True):
            np.testing.assert_array_equal(results[name], expected)


@pytest.mark.parametrize("implementation", ["ffi", "xla"])
def test_any_number_of_tokens(rng, placement, implementation):
    """On one device; within `shard_map` JAX's own shapes are known numbers."""
    split = jax.jit(lambda ids: lplb.balance(ids, placement, implementation=implementation).physical_ids)
    (n,) = export.symbolic_shape("n", constraints=["n >= 1", "n <= 4096"])
    program = exported(split, [jax.ShapeDtypeStruct((n, 2), np.int32)], ("cpu",))
    for tokens in (1, 700) if implementation == "ffi" else (700,):
        ids = rng.integers(0, 16, (tokens, 2)).astype(np.int32)
        np.testing.assert_array_equal(program.call(ids), split(ids))


def test_for_gpus_that_are_not_here(monkeypatch, mesh, placement):
    """Nothing in the program numbers devices of the machine that wrote it."""
    monkeypatch.setattr(_ffi, "_PLATFORMS", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_ffi, "gpus", tuple)
    ids = jax.ShapeDtypeStruct((RANKS * 8, 2), np.int32)
    text = exported(balanced(mesh, placement), [ids], ("cuda",)).mlir_module()
    assert "lplb_plan_assign" in text
    assert "lplb_gather" not in text
