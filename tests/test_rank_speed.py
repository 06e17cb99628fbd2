"""Ranks of different speeds: the largest load / speed against SciPy's HiGHS, and what speed 0 and wrong speeds mean."""

import dataclasses
from functools import cache, partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROUNDING, TOL, draw_speeds, most, usable
from jax.sharding import PartitionSpec as P

import jax_lplb as lplb
from jax_lplb import Status

NUMBER = 48  # instances of a case
CASES = {
    "ring": helpers.placement(lplb.topology.ring(8), 24, 8, 1),
    "two cubes": helpers.placement(lplb.topology.cube(), 64, 16, 2),
    "random": helpers.many_replicas(np.random.default_rng(0), num_experts=36, num_ranks=6, redundants=3),
}
PER_BATCH = {
    "one group": lplb.Placement.per_batch(num_experts=24, num_ranks=8, redundants_per_rank=2),
    "two groups, pairs": lplb.Placement.per_batch(
        num_experts=24, num_ranks=8, redundants_per_rank=2, num_groups=2, max_replicas=2, target=1.2
    ),
    "ranks do not divide the experts": lplb.Placement.per_batch(num_experts=22, num_ranks=8, redundants_per_rank=1),
}
SOLVED = [*((name, "ipm") for name in CASES), ("ring", "edge_balance"), ("two cubes", "edge_balance")]
by_case = pytest.mark.parametrize(("name", "solver"), SOLVED)


@cache
def instances(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads, speeds, and the optima of each group."""
    place, rng = CASES[name], np.random.default_rng(list(CASES).index(name))
    loads, speeds = helpers.random_loads(rng, place.num_experts, NUMBER), draw_speeds(rng, place, NUMBER)
    return loads, speeds, np.stack([helpers.optimum(*one) for one in zip(loads, [place] * NUMBER, speeds, strict=True)])


@cache
def solved(name: str, solver: str, implementation: str, platform: str) -> lplb.Solution:
    del platform  # the default device; keeps the results of several apart

    @jax.jit
    @jax.vmap
    def solve(load: jax.Array, speed: jax.Array) -> lplb.Solution:
        return lplb.solve(load, CASES[name], rank_speed=speed, solver=solver, implementation=implementation)

    return jax.tree.map(np.asarray, solve(*instances(name)[:2]))


@by_case
def test_the_largest_load_over_speed_is_certified_and_within_tolerance(name, solver, implementation, platform):
    place = CASES[name]
    solutions = solved(name, solver, implementation, platform)
    assert np.mean(solutions.iterations > 0) > 0.1
    for i, (load, speed, best) in enumerate(zip(*instances(name), strict=True)):
        solution = jax.tree.map(lambda leaf, i=i: leaf[i], solutions)
        there = usable(place, speed)
        assert all(np.isfinite(values).all() for values in solution)
        assert (solution.split >= 0).all()
        assert (solution.split[~there] == 0).all()
        np.testing.assert_allclose(solution.split.sum(axis=1), load, rtol=helpers.EPS * (place.max_replicas + 4))
        loads = helpers.rank_loads(solution.split, place)
        np.testing.assert_allclose(solution.rank_load, loads, rtol=ROUNDING, atol=ROUNDING * loads.mean())
        largest = most(loads, place, speed)
        true_gap = np.where(largest > 0, 1 - best / np.where(largest > 0, largest, 1), 0)
        assert (true_gap >= -ROUNDING).all()
        assert (solution.gap >= true_gap - ROUNDING).all()
        assert (solution.status == Status.CONVERGED).all()
        assert (solution.gap <= TOL).all()
        even = helpers.rank_loads(np.where(there, (load / there.sum(axis=1))[:, None], 0), place)
        assert (largest <= most(even, place, speed) * (1 + ROUNDING)).all()


@pytest.mark.parametrize("name", ["ring", "two cubes"])
def test_edge_balance_by_speed_gives_the_same_bits(name):
    for leaf, other in zip(*(solved(name, "edge_balance", how, "cpu") for how in ("ffi", "xla")), strict=True):
        helpers.assert_same_bits(leaf, other)


@pytest.mark.parametrize("solver", ["ipm", "edge_balance"])
def test_equal_speeds_are_as_none(solver, implementation, platform):
    """Within the tolerance."""
    place, load = CASES["ring"], instances("ring")[0][1]
    solve = jax.jit(partial(lplb.solve, load, place, solver=solver, implementation=implementation))
    equal, none = solve(rank_speed=np.full(place.num_ranks, 1e30, np.float32)), solve()
    np.testing.assert_array_equal(equal.status, none.status)
    np.testing.assert_allclose(most(equal.rank_load, place), most(none.rank_load, place), rtol=2 * TOL)


def test_the_unit_of_speeds_does_not_matter():
    load, speed = (values[1] for values in instances("ring")[:2])
    units = (1, 2.0**100, 2.0**-100, 2.0 ** (127 - np.ceil(np.log2(speed.max()))))  # the last as large as float32 holds
    results = [lplb.solve(load, CASES["ring"], rank_speed=speed * np.float32(unit)) for unit in units]
    for other in results[1:]:
        jax.tree.map(helpers.assert_same_bits, results[0], other)


@pytest.mark.parametrize("solver", ["ipm", "edge_balance"])
def test_what_is_only_on_ranks_of_speed_0_stays_and_counts_for_nothing(solver, implementation):
    """Of four experts, each at home on its rank and copied to the next, expert 3 is on ranks of speed 0 only."""
    place, load = helpers.placement(lplb.topology.ring(4), 4, 4, 1), np.array([20, 20, 20, 1000], np.int32)
    there = np.isin(np.arange(4), place.log2phy[3] // place.slots_per_rank)
    speed = np.where(there, 0, 3).astype(np.float32)
    solve = jax.jit(partial(lplb.solve, placement=place, solver=solver, implementation=implementation))
    result = solve(load, rank_speed=speed)
    np.testing.assert_array_equal(result.split[3], [1000, 0])
    np.testing.assert_allclose(result.rank_load, helpers.rank_loads(result.split, place), rtol=ROUNDING)
    np.testing.assert_allclose(result.rank_load[~there], 30, rtol=TOL)
    assert result.gap[0] <= TOL


@pytest.mark.parametrize("solver", ["ipm", "edge_balance"])
def test_what_is_too_little_to_count_is_not_on_ranks_of_speed_0(solver, implementation):
    """Of float loads; expert 3 has so little, and is at home on rank 3, which stands still."""
    place, load = helpers.placement(lplb.topology.ring(4), 4, 4, 1), np.array([1e10, 1e10, 1e10, 1e-3], np.float32)
    speed = np.array([1, 1, 1, 0], np.float32)
    result = lplb.solve(load, place, rank_speed=speed, solver=solver, implementation=implementation)
    np.testing.assert_array_equal(result.split[3], np.array([0, 1e-3], np.float32))
    np.testing.assert_array_equal(result.split[:3].sum(axis=1), load[:3])


def test_edge_balance_moves_the_right_way_beside_the_largest_loads(implementation):
    """Weighed by the speed of the rank next to it, what the slow rank has is more than an int32 holds."""
    place, load = helpers.placement(lplb.topology.ring(2), 4, 2, 1), np.array([60, 19 * 10**8, 0, 0], np.int32)
    options = {"solver": "edge_balance", "tol": 0.0, "implementation": implementation}
    result = lplb.solve(load, place, rank_speed=np.array([1, 256], np.float32), **options)
    np.testing.assert_array_equal(result.split[0], [0, 60])
    assert result.status[0] == Status.CONVERGED


@pytest.mark.parametrize("solver", ["ipm", "edge_balance"])
def test_threshold_is_of_load_over_speed(solver, implementation):
    options = {"threshold": 1.01, "solver": solver, "implementation": implementation}
    solve = jax.jit(lambda load, speed: lplb.solve(load, CASES["ring"], rank_speed=speed, **options))
    rising, level = np.repeat(np.arange(1, 9), 3).astype(np.int32), np.full(24, 5, np.int32)
    by_rank, equal = np.arange(1, 9).astype(np.float32), np.ones(8, np.float32)
    for load, fits, does_not in ((rising, by_rank, equal), (level, equal, by_rank)):
        at_home = solve(load, fits)
        assert at_home.status[0] == Status.SKIPPED
        assert 0 <= at_home.gap[0] <= ROUNDING
        np.testing.assert_array_equal(at_home.split[:, 0], load)
        assert solve(load, does_not).status[0] == Status.CONVERGED


# ---- Copies chosen by the batch --------------------------------------------------------------------------------------


@cache
def chosen(name: str, implementation: str) -> tuple[np.ndarray, np.ndarray, lplb.Placement]:
    place, rng = PER_BATCH[name], np.random.default_rng(0)
    loads, speeds = helpers.random_loads(rng, place.num_experts, NUMBER), draw_speeds(rng, place, NUMBER)
    choose = jax.jit(jax.vmap(lambda load, speed: place.choose(load, rank_speed=speed, implementation=implementation)))
    return loads, speeds, jax.tree.map(np.asarray, choose(loads, speeds))


@pytest.mark.parametrize("name", PER_BATCH)
def test_pure_jax_plans_the_same_copies_for_speeds(name):
    jax.tree.map(np.testing.assert_array_equal, chosen(name, "ffi")[2], chosen(name, "xla")[2])


@pytest.mark.gpu
@pytest.mark.parametrize("name", PER_BATCH)
def test_gpus_plan_the_same_copies_for_speeds(name):
    with jax.default_device(jax.devices("gpu")[0]):
        on_gpu = chosen.__wrapped__(name, "ffi")[2]
    jax.tree.map(np.testing.assert_array_equal, on_gpu, chosen(name, "ffi")[2])


def test_copies_bring_the_largest_load_over_speed_to_the_target():
    load = np.random.default_rng(0).integers(80, 120, 24).astype(np.int32)
    speed = np.array([1, 1, 1, 1, 1, 1, 0.5, 1.5], np.float32)
    place = jax.tree.map(np.asarray, PER_BATCH["one group"].choose(load, rank_speed=speed))
    assert helpers.optimum(load, place, speed) <= 1.0101 * load.sum() / 8


def test_copies_empty_a_rank_of_speed_0():
    load = np.random.default_rng(0).integers(80, 120, 24).astype(np.int32)
    speed = np.array([1, 1, 0, 1, 1, 1, 1, 1], np.float32)
    place = jax.tree.map(np.asarray, PER_BATCH["one group"].choose(load, rank_speed=speed))
    assert (place.phy2log.reshape(8, -1)[2, 3:] == -1).all()
    assert (place.log2phy[6:9, 1] >= 0).all()


# ---- End to end ------------------------------------------------------------------------------------------------------


def check_balanced(ids: np.ndarray, out: lplb.Balanced, speed: np.ndarray) -> None:
    """No token is lost, what `out` says of them is so, and none is on a rank of speed 0 but where it must be."""
    out = jax.tree.map(np.asarray, out)
    place, physical = out.placement, out.physical_ids
    np.testing.assert_array_equal(place.phy2log[physical], ids)
    np.testing.assert_array_equal(
        out.rank_load, np.bincount(physical.ravel() // place.slots_per_rank, minlength=place.num_ranks)
    )
    there = {int(slot) for slot in place.log2phy[usable(place, speed)]}
    assert set(physical.ravel().tolist()) <= there
    best = helpers.optimum(out.load, place, speed)
    assert (out.lower_bound <= best * (1 + ROUNDING)).all()
    assert (out.gap <= TOL).all()
    scaled = helpers.scaled_speed(speed, place)
    whole = place.slots_per_rank / scaled[scaled > 0].min()  # tokens are
    assert (most(out.rank_load, place, speed) <= best * (1 + 2 * TOL) + whole).all()


SPEED = np.array([1, 0.5, 1, 0, 1.25, 1, 0, 0.75], np.float32)
BALANCED = {
    "ring": helpers.placement(lplb.topology.ring(8), 24, 8, 1),
    "per batch": PER_BATCH["one group"],
    "per batch, ranks do not divide the experts": PER_BATCH["ranks do not divide the experts"],
    "no copies": helpers.placement(lplb.topology.ring(8), 24, 8, 0),
}


@pytest.mark.parametrize("name", BALANCED)
def test_balance_loses_no_token(name, implementation, platform, rng):
    place = BALANCED[name]
    ids = helpers.skewed_ids(rng, 500, 4, place.num_experts)
    balance = jax.jit(lambda ids, speed: lplb.balance(ids, place, rank_speed=speed, implementation=implementation))
    check_balanced(ids, balance(ids, SPEED), SPEED)


@pytest.mark.parametrize("name", ["ring", "per batch"])
def test_unpredicted_tokens_avoid_ranks_of_speed_0(name, rng):
    place = BALANCED[name]
    ids = helpers.skewed_ids(rng, 200, 4, 24)
    load = np.zeros(24, np.float32)
    out = lplb.balance(ids, place, load=load, rank_speed=SPEED)
    there = np.asarray(out.placement.log2phy)[usable(jax.tree.map(np.asarray, out.placement), SPEED)]
    assert np.isin(out.physical_ids, there).all()
    np.testing.assert_array_equal(np.asarray(out.placement.phy2log)[out.physical_ids], ids)


def sharded(place: lplb.Placement, mesh: jax.sharding.Mesh, implementation: str | None):
    """Physical ids, and each rank's view of the rank loads, by speeds of which each rank knows its own."""

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    def balance(ids, speed):
        speed = jax.lax.all_gather(speed, "ep", tiled=True)
        out = lplb.balance(ids, place, axis_name="ep", rank_speed=speed, implementation=implementation)
        return out.physical_ids, out.rank_load[None]

    return balance


@pytest.mark.parametrize("name", ["ring", "per batch"])
def test_shards_balance_by_speeds_that_they_gather_as_one_does(name, mesh, rng):
    place = BALANCED[name]
    if mesh.size != place.num_ranks:
        pytest.skip("needs as many devices as ranks")
    ids = helpers.skewed_ids(rng, 512, 4, 24)
    (physical_ids, rank_load), alone = (
        sharded(place, mesh, None)(ids, SPEED),
        lplb.balance(ids, place, rank_speed=SPEED),
    )
    np.testing.assert_array_equal(physical_ids, alone.physical_ids)
    np.testing.assert_array_equal(rank_load, np.tile(alone.rank_load, (8, 1)))


@pytest.mark.parametrize("name", ["ring", "per batch"])
def test_pure_jax_takes_speeds_whose_type_varies(name, rng):
    mesh, ids = jax.sharding.Mesh(jax.devices("cpu")[:8], ("ep",)), helpers.skewed_ids(rng, 512, 4, 24)
    assert jax.eval_shape(sharded(BALANCED[name], mesh, "xla"), ids, SPEED)[0].shape == ids.shape


@pytest.mark.parametrize("name", ["ring", "per batch"])
def test_speeds_work_with_64_bit_types(name, implementation, rng):
    ids = helpers.skewed_ids(rng, 100, 4, 24)
    with jax.enable_x64(True):
        solution = lplb.solve(
            np.bincount(ids.ravel(), minlength=24).astype(np.int32), BALANCED["ring"], rank_speed=SPEED
        )
        out = jax.jit(partial(lplb.balance, placement=BALANCED[name], implementation=implementation))(
            ids, rank_speed=SPEED
        )
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((solution, out))} == {"int32", "float32"}


# ---- Wrong speeds ----------------------------------------------------------------------------------------------------

TRACED = {
    "wrong ones are 0": ([1, np.nan, 2, -3, np.inf, 1, -np.inf, 1], [1, 0, 2, 0, 0, 1, 0, 1]),
    "none is left": ([np.nan, -1, 0, -np.inf, np.inf, 0, 0, 0], [1] * 8),
    "all are 0": ([0] * 8, [1] * 8),
    "less than 1/256 of the fastest": ([256.5, 1, 2, 256, 100, 100, 100, 100], [256.5, 0, 2, 256, 100, 100, 100, 100]),
}


@pytest.mark.parametrize("name", ["ring", "per batch"])
def test_traced_speeds_that_are_wrong_are_safe(name, rng):
    place = BALANCED[name]
    ids = helpers.skewed_ids(rng, 300, 4, 24)
    balance = jax.jit(jax.vmap(lambda speed: lplb.balance(jnp.asarray(ids), place, rank_speed=speed)))
    wrong, right = (np.array(speeds, np.float32) for speeds in zip(*TRACED.values(), strict=True))
    out, expected = balance(wrong), balance(right)
    jax.tree.map(np.testing.assert_array_equal, out, expected)
    for i, speed in enumerate(right):
        check_balanced(ids, jax.tree.map(lambda leaf, i=i: leaf[i], out), speed)


def test_speeds_carry_no_gradient():
    place = CASES["ring"]
    load, speed = (values[0] for values in instances("ring")[:2])
    gradient = jax.grad(lambda speed: lplb.solve(load, place, rank_speed=speed).rank_load[0])(jnp.asarray(speed))
    np.testing.assert_array_equal(gradient, 0)


ONES = np.ones(8, np.float32)
WRONG = {
    "list": ([1.0] * 8, TypeError, r"rank_speed must be None or a float32 array, got list; pass np\.array"),
    "float64": (np.ones(8), TypeError, "rank_speed must have dtype float32, got float64"),
    "shape": (ONES[:7], ValueError, r"rank_speed must have shape \[num_ranks\] = \[8\], got shape \(7,\)"),
    "negative": (ONES * -1, ValueError, "rank_speed must be finite and not negative, got -1.0 for rank 0; pass 0"),
    "NaN": (ONES * np.nan, ValueError, "rank_speed must be finite and not negative, got nan"),
    "infinite": (ONES * np.inf, ValueError, "rank_speed must be finite and not negative, got inf"),
    "all 0": (ONES * 0, ValueError, "must not be 0 for all ranks of a group, got 0 for ranks 0 to 7; pass a positive"),
}


@pytest.mark.parametrize("function", ["solve", "balance", "choose"])
@pytest.mark.parametrize("wrong", WRONG)
def test_refuses_wrong_speeds(function, wrong):
    speed, error, message = WRONG[wrong]
    load, ids = np.ones(24, np.int32), np.zeros((8, 2), np.int32)
    call = {
        "solve": partial(lplb.solve, load, CASES["ring"]),
        "balance": partial(lplb.balance, ids, PER_BATCH["one group"]),
        "choose": partial(PER_BATCH["one group"].choose, load),
    }[function]
    with pytest.raises(error, match=message):
        jax.jit(lambda: call(rank_speed=speed))()


def test_the_cures_that_errors_name_work():
    solve = partial(lplb.solve, np.ones(24, np.int32), CASES["ring"])
    for speed in (np.array([1.0] * 8, np.float32), np.ones(8).astype("float32"), ONES * (np.arange(8) > 0), None):
        assert np.isfinite(solve(rank_speed=speed).rank_load).all()


def test_only_leading_entries_of_a_row_are_replicas(implementation, platform):
    """With speeds as without: an expert whose first entry is no slot has none, whatever comes after."""
    place = helpers.placement(lplb.topology.ring(4), 8, 4, 1)
    log2phy = np.array(place.log2phy)
    log2phy[0, 0] = -1
    place = dataclasses.replace(place, log2phy=log2phy)
    ids = np.arange(64, dtype=np.int32).reshape(16, 4) % 8
    balance = jax.jit(partial(lplb.balance, placement=place, implementation=implementation))
    for speed in (None, np.array([1, 2, 0, 1], np.float32)):
        out = balance(ids, rank_speed=speed)
        np.testing.assert_array_equal(np.asarray(out.physical_ids) < 0, ids == 0)
