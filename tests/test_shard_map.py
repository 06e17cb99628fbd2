"""`balance` inside shard_map, over every kind of mesh, on CPU devices and on GPUs."""

import operator
from functools import partial

import helpers
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_lplb as lplb

NUM_EXPERTS = 64
TOP_K = 6


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def devices(request) -> list[jax.Device]:
    """The eight virtual CPU devices, or all GPUs, of which there must be an even number."""
    found = jax.devices(request.param)
    if len(found) < 2:
        pytest.skip(f"needs two {request.param} devices, found {len(found)}")
    return found


def ring_placement(num_ranks: int) -> lplb.Placement:
    return helpers.placement(helpers.topology.ring(num_ranks), NUM_EXPERTS, num_ranks, 2)


def mesh_of(devices: list, shape: dict[str, int], axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(axis_type,) * len(shape), devices=devices)


def specs(ids: P, *rest: str) -> lplb.Balanced:
    return lplb.Balanced(ids, *[P(*rest)] * 6)


def make_ids(num_ranks: int) -> np.ndarray:
    ids = helpers.skewed_ids(np.random.default_rng(0), 96 * num_ranks, TOP_K, NUM_EXPERTS)
    ids[::7, 0] = -1
    ids[1::7, 1] = NUM_EXPERTS
    return ids


@partial(jax.jit, static_argnames="implementation")
def alone(ids: np.ndarray, placement: lplb.Placement, implementation: str) -> lplb.Balanced:
    """On one device."""
    return lplb.balance(ids, placement, implementation=implementation)


def check(
    out: lplb.Balanced,
    ids: np.ndarray,
    placement: lplb.Placement,
    *,
    exact: bool = True,
    predicted: np.ndarray | None = None,
) -> None:
    """Nothing is lost, every id is a replica of its expert, and the loads are what the ids say, or as predicted."""
    physical = np.asarray(out.physical_ids)
    valid = (ids >= 0) & (ids < NUM_EXPERTS)
    assert physical.shape == ids.shape
    np.testing.assert_array_equal(physical[~valid], -1)
    np.testing.assert_array_equal(placement.phy2log[physical[valid]], ids[valid])
    load = np.bincount(ids[valid], minlength=NUM_EXPERTS)
    np.testing.assert_array_equal(out.load, load)
    ranks = np.bincount(physical[valid] // placement.slots_per_rank, minlength=placement.num_ranks)
    if predicted is not None:
        np.testing.assert_array_equal(out.rank_load, predicted)
    else:
        assert np.sum(out.rank_load) == np.sum(load)
        if exact:
            np.testing.assert_array_equal(out.rank_load, ranks)
        best = helpers.optimum(load, placement)
        assert np.all((best * (1 - 2e-4) <= out.lower_bound) & (out.lower_bound <= best))
    assert ranks.max() <= helpers.optimum(load, placement)[0] * (1 + 1e-4) + placement.slots_per_rank
    np.testing.assert_array_equal(out.status, lplb.Status.CONVERGED)


@pytest.mark.parametrize("sync", ["all_gather", "peer", "psum"])
@pytest.mark.smoke
def test_no_tokens(devices, sync):
    place = ring_placement(len(devices))
    step = jax.shard_map(
        partial(lplb.balance, placement=place, axis_name="ep", sync=sync),
        mesh=mesh_of(devices, {"ep": len(devices)}),
        in_specs=P("ep"),
        out_specs=specs(P("ep")),
    )
    out = jax.jit(step)(np.zeros((0, TOP_K), np.int32))
    assert out.physical_ids.shape == (0, TOP_K)
    assert not np.any(out.load)
    assert not np.any(out.rank_load)


@pytest.mark.parametrize(
    ("sync", "check_vma", "axis_type"),
    [
        ("all_gather", True, AxisType.Auto),
        ("all_gather", False, AxisType.Explicit),
        ("psum", True, AxisType.Explicit),
        ("psum", False, AxisType.Auto),
    ],
)
@pytest.mark.smoke
def test_one_axis(devices, implementation, sync, check_vma, axis_type):
    ranks = len(devices)
    placement, ids = ring_placement(ranks), make_ids(ranks)
    mesh = mesh_of(devices, {"ep": ranks}, axis_type)
    run = jax.jit(
        jax.shard_map(
            partial(lplb.balance, placement=placement, axis_name="ep", sync=sync, implementation=implementation),
            mesh=mesh,
            in_specs=P("ep"),
            out_specs=specs(P("ep")),
            check_vma=check_vma,
        )
    )
    with jax.set_mesh(mesh):
        out = run(jax.device_put(ids, NamedSharding(mesh, P("ep"))))
    check(out, ids, placement, exact=sync == "all_gather")
    if sync == "all_gather":
        # Shards number tokens as one device does.
        np.testing.assert_array_equal(out.physical_ids, alone(ids, placement, implementation).physical_ids)


@pytest.mark.parametrize(("order", "sync"), [(("a", "b"), "psum"), (("b", "a"), "all_gather"), (("b", "a"), "psum")])
def test_tuple_of_axes_in_both_orders(devices, implementation, order, sync):
    ranks = len(devices)
    placement, ids = ring_placement(ranks), make_ids(ranks)
    mesh = mesh_of(devices, {"a": 2, "b": ranks // 2})
    run = jax.jit(
        jax.shard_map(
            partial(lplb.balance, placement=placement, axis_name=order, sync=sync, implementation=implementation),
            mesh=mesh,
            in_specs=P(order),
            out_specs=specs(P(order)),
        )
    )
    out = run(ids)
    check(out, ids, placement, exact=sync == "all_gather")
    if sync == "all_gather":
        np.testing.assert_array_equal(out.physical_ids, alone(ids, placement, implementation).physical_ids)


@pytest.mark.parametrize("check_vma", [True, False])
def test_expert_axis_of_a_larger_mesh(devices, implementation, check_vma):
    """Each row of a data x expert mesh balances its own tokens."""
    if len(devices) < 4:
        pytest.skip(f"needs four devices, found {len(devices)}")
    ranks = len(devices) // 2
    placement = ring_placement(ranks)
    ids = make_ids(2 * ranks).reshape(2, -1, TOP_K)
    run = jax.jit(
        jax.shard_map(
            lambda i: jax.tree.map(
                lambda x: x[None], lplb.balance(i[0], placement, axis_name="ep", implementation=implementation)
            ),
            mesh=mesh_of(devices, {"data": 2, "ep": ranks}),
            in_specs=P("data", "ep"),
            out_specs=specs(P("data", "ep"), "data"),
            check_vma=check_vma,
        )
    )
    out = run(ids)
    for row in range(2):
        check(jax.tree.map(operator.itemgetter(row), out), ids[row], placement)


def test_partly_manual_mesh(devices, implementation):
    if len(devices) < 4:
        pytest.skip(f"needs four devices, found {len(devices)}")
    ranks = len(devices) // 2
    placement, ids = ring_placement(ranks), make_ids(ranks)
    run = jax.jit(
        jax.shard_map(
            partial(lplb.balance, placement=placement, axis_name="ep", implementation=implementation),
            mesh=mesh_of(devices, {"data": 2, "ep": ranks}),
            in_specs=P("ep"),
            out_specs=specs(P("ep")),
            axis_names={"ep"},
        )
    )
    check(run(ids), ids, placement)


def test_results_are_typed_invariant_over_the_axis_but_ids_are_not(implementation):
    """Under check_vma, out_specs that would hide a difference between devices are refused."""
    devices = jax.devices("cpu")
    placement, ids = ring_placement(8), make_ids(8)
    wrong = jax.shard_map(
        partial(lplb.balance, placement=placement, axis_name="ep", implementation=implementation),
        mesh=mesh_of(devices, {"ep": 8}),
        in_specs=P("ep"),
        out_specs=specs(P()),
    )
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(wrong, ids)


@pytest.mark.parametrize("check_vma", [True, False])
def test_ids_that_are_equal_on_all_ranks(implementation, check_vma):
    """Replicated ids count once for each rank that holds them."""
    placement, ids = ring_placement(8), make_ids(1)
    run = jax.jit(
        jax.shard_map(
            lambda i: jax.tree.map(
                lambda x: x[None],
                lplb.balance(i, placement, axis_name="ep", implementation=implementation).physical_ids,
            ),
            mesh=mesh_of(jax.devices("cpu"), {"ep": 8}),
            in_specs=P(),
            out_specs=P("ep"),
            check_vma=check_vma,
        )
    )
    physical = run(ids)
    whole = alone(np.tile(ids, (8, 1)), placement, implementation)
    np.testing.assert_array_equal(np.reshape(physical, (-1, TOP_K)), whole.physical_ids)


@pytest.mark.parametrize(("dtype", "check_vma"), [(np.int32, True), (np.float32, False)])
def test_given_load_spares_the_collective(devices, implementation, dtype, check_vma):
    ranks = len(devices)
    placement, ids = ring_placement(ranks), make_ids(ranks)
    valid = (ids >= 0) & (ids < NUM_EXPERTS)
    load = np.bincount(ids[valid], minlength=NUM_EXPERTS).astype(dtype)
    run = jax.jit(
        jax.shard_map(
            lambda i, w: lplb.balance(i, placement, axis_name="ep", load=w, implementation=implementation),
            mesh=mesh_of(devices, {"ep": ranks}),
            in_specs=(P("ep"), P()),
            out_specs=specs(P("ep")),
            check_vma=check_vma,
        )
    )
    text = run.lower(ids, load).as_text()
    assert not any(name in text for name in ("all_gather", "all_reduce", "collective_permute", "all_to_all"))
    out = run(ids, load)
    solution = lplb.solve(load, placement, implementation=implementation)
    check(out, ids, placement, predicted=np.rint(solution.rank_load))
    # Each shard spreads its own tokens as the whole should: to within one token for each of an expert's two replicas.
    share = np.asarray(solution.split) / np.maximum(load, 1)[:, None]
    for mine, physical in zip(np.split(ids, ranks), np.split(np.asarray(out.physical_ids), ranks), strict=True):
        count = np.bincount(mine[(mine >= 0) & (mine < NUM_EXPERTS)], minlength=NUM_EXPERTS)
        got = np.bincount(physical[physical >= 0], minlength=placement.num_physical)
        of_replica = np.where(placement.log2phy >= 0, got[placement.log2phy], 0)
        assert np.max(np.abs(of_replica - share * count[:, None])) <= 1 + 1e-3


@pytest.mark.parametrize(
    ("dtype", "solver", "threshold"),
    [(np.int32, "auto", None), (np.float32, "ipm", None), (np.int32, "ipm", 4.0), (np.float32, "auto", 4.0)],
)
def test_given_loads_of_zero_split_evenly(implementation, dtype, solver, threshold):
    """Though all else stay at home; and what is returned as the load is what was given, to the token."""
    placement = ring_placement(4)
    load = np.where(np.arange(NUM_EXPERTS) % 3 == 0, 0, 2**20 + np.arange(NUM_EXPERTS)).astype(dtype)
    load[1] = 2**24 + 1
    load[3] = -5
    ids = np.repeat(np.arange(0, NUM_EXPERTS, 3, dtype=np.int32), 100)[:, None]
    options = {"solver": solver, "threshold": threshold, "implementation": implementation}
    out = jax.jit(partial(lplb.balance, placement=placement, **options))(ids, load=load)
    assert (out.status == (lplb.Status.CONVERGED if threshold is None else lplb.Status.SKIPPED)).all()
    physical = np.asarray(out.physical_ids)
    for expert in range(0, NUM_EXPERTS, 3):
        slots = placement.log2phy[expert][placement.log2phy[expert] >= 0]
        counts = [np.sum(physical == slot) for slot in slots]
        assert sum(counts) == 100
        assert max(counts) - min(counts) <= 1
    np.testing.assert_array_equal(out.load, np.maximum(load, 0).astype(np.int32))
