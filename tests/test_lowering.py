"""What `balance` becomes: for CUDA too, on machines without one."""

import re
from functools import partial

import helpers
import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_lplb as lplb
from jax_lplb import _ffi

PLACEMENT = helpers.placement(helpers.topology.cube(), 64, 8, 2)
IDS = np.zeros((512, 6), np.int32)
CALLS = ["lplb_count", "lplb_solve_assign"]
COLLECTIVES = {"all_gather": "stablehlo.all_gather", "psum": "stablehlo.all_reduce"}


def lowered(function, *arguments, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def custom_calls(text: str) -> list[str]:
    """Targets of all custom calls but the markers that shard_map leaves."""
    return sorted(
        set(re.findall(r"custom_call @(\w+)", text)) - {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
    )


def count_calls(text: str) -> int:
    return len(re.findall(r"custom_call @lplb_", text))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("solver", ["auto", "edge_balance", "ipm"])
@pytest.mark.smoke
def test_two_custom_calls_and_no_callbacks(platform, solver):
    run = partial(lplb.balance, placement=PLACEMENT, solver=solver, implementation="ffi")
    text = lowered(run, IDS, platform=platform)
    assert custom_calls(text) == CALLS
    assert count_calls(text) == 2
    assert "callback" not in text
    assert ("partners = dense<>" in text) == (solver == "ipm")  # the interior-point method needs none


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.smoke
def test_copies_chosen_by_the_batch_take_no_more_calls(platform):
    place = lplb.Placement.per_batch(num_experts=64, num_ranks=8, redundants_per_rank=2)
    text = lowered(partial(lplb.balance, placement=place, implementation="ffi"), IDS, platform=platform)
    assert custom_calls(text) == ["lplb_count", "lplb_plan_assign"]
    assert count_calls(text) == 2
    assert "callback" not in text


@pytest.mark.parametrize("copies", ["along a topology", "chosen by the batch"])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_locality_takes_no_more_calls_and_collectives(platform, copies):
    place = PLACEMENT
    if copies == "chosen by the batch":
        place = lplb.Placement.per_batch(num_experts=64, num_ranks=8, redundants_per_rank=2)
    texts = []
    for locality in (False, True):
        run = jax.shard_map(
            partial(
                lplb.balance,
                placement=place,
                axis_name="ep",
                sync="all_gather",
                locality=locality,
                implementation="ffi",
            ),
            mesh=jax.make_mesh((8,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")),
            in_specs=P("ep"),
            out_specs=lplb.Balanced(P("ep"), *[P()] * 6),
        )
        texts.append(lowered(run, IDS, platform=platform))
    far, near = texts
    assert custom_calls(near) == custom_calls(far)
    assert count_calls(near) == count_calls(far) == 2
    assert near.count("stablehlo.all_gather") == far.count("stablehlo.all_gather") == 1


@pytest.mark.parametrize("sync", COLLECTIVES)
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_one_collective_inside_shard_map(platform, sync, wrap):
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    run = jax.shard_map(
        wrap(partial(lplb.balance, placement=PLACEMENT, axis_name="ep", sync=sync, implementation="ffi")),
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=lplb.Balanced(P("ep"), *[P()] * 6),
    )
    text = lowered(run, IDS, platform=platform)
    assert custom_calls(text) == CALLS
    assert count_calls(text) == 2
    assert "callback" not in text
    for name, operation in COLLECTIVES.items():
        assert text.count(f'"{operation}"') == (name == sync)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_peers_take_one_more_call_and_no_collective_on_gpus(monkeypatch, platform):
    """On CPUs it is the all_gather."""
    monkeypatch.setattr(_ffi, "_PLATFORMS", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_ffi, "gpus", lambda: tuple(range(8)))
    run = jax.shard_map(
        partial(lplb.balance, placement=PLACEMENT, axis_name="ep", sync="peer", implementation="ffi"),
        mesh=jax.make_mesh((8,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")),
        in_specs=P("ep"),
        out_specs=lplb.Balanced(P("ep"), *[P()] * 6),
    )
    text = lowered(run, IDS, platform=platform)
    on_gpus = platform == "cuda"
    assert custom_calls(text) == sorted([*CALLS, *["lplb_gather"] * on_gpus])
    assert count_calls(text) == 2 + on_gpus
    counts = [text.count(f'"{operation}"') for operation in COLLECTIVES.values()]
    assert counts == [int(not on_gpus), 0]


def test_vmap_is_one_call_for_all_layers():
    text = lowered(jax.vmap(partial(lplb.balance, placement=PLACEMENT, implementation="ffi")), np.stack([IDS] * 3))
    assert count_calls(text) == 2


def test_platforms_without_handlers_run_pure_jax():
    """None chooses by the platform that is lowered for, not by the one at hand."""
    text = lowered(partial(lplb.balance, placement=PLACEMENT), IDS, platform="tpu")
    assert count_calls(text) == 0
    assert count_calls(lowered(partial(lplb.balance, placement=PLACEMENT), IDS, platform="cpu")) == 2


@pytest.mark.parametrize("implementation", [None, "ffi", "xla"])
def test_nothing_replicated_is_a_lookup(implementation):
    """Ids alone need no solve and no collective; XLA drops the counting when the loads go unused."""
    placement = helpers.placement(helpers.topology.cube(), 64, 8, 0)
    run = jax.jit(lambda ids: lplb.balance(ids, placement, implementation=implementation).physical_ids)
    compiled = run.lower(IDS).compile().as_text()
    assert "custom-call" not in compiled
    ids = np.array([[0, 5, -1], [63, 64, 2]], np.int32)
    np.testing.assert_array_equal(run(ids), [[0, 5, -1], [63, -1, 2]])
    out = lplb.balance(jax.numpy.asarray(ids), placement, implementation=implementation)
    np.testing.assert_array_equal(out.rank_load, [3, 0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(out.status, lplb.Status.SKIPPED)
    np.testing.assert_array_equal(out.gap, 0)


def test_profiles_name_each_step():
    text = jax.jit(partial(lplb.balance, placement=PLACEMENT)).lower(IDS).compile().as_text()
    for step in ("lplb_count", "lplb_solve_assign"):
        assert step in text
