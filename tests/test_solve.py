"""The interior-point method: feasible and certified; compared with the optimum of SciPy's HiGHS on over 2,000 cases."""

import dataclasses
from functools import lru_cache, partial
from typing import NamedTuple

import helpers
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ROUNDING,
    TOL,
    check_groups_are_independent,
    configurations,
    garbage,
    many_replicas,
    optimum,
    random_loads,
)

import jax_lplb as lplb
from jax_lplb import Status
from jax_lplb._interior_point import _cholesky_by_column

MAX_ITERATIONS = 50

# Topologies have a solver of their own, which has tests of its own.
interior_point = partial(lplb.solve, solver="ipm")
check = partial(helpers.check, max_iterations=MAX_ITERATIONS)


class Case(NamedTuple):
    """Instances of equal shapes: the placement and loads of each, and the optimum of each of its groups."""

    placements: list[lplb.Placement]
    loads: np.ndarray
    optima: np.ndarray


# Random placements: how many, of how many ranks, home experts a rank, redundant experts a rank.
RANDOM = {"6 ranks": (128, 6, 4, 2), "36 ranks": (96, 36, 4, 2), "72 ranks": (64, 72, 4, 3)}
NAMES = [*configurations(), *RANDOM]


@lru_cache
def case(name: str) -> Case:
    rng = np.random.default_rng(NAMES.index(name))
    if name in RANDOM:
        number, ranks, home, redundants = RANDOM[name]
        placements = []
        for _ in range(number):
            place = many_replicas(rng, num_experts=ranks * home, num_ranks=ranks, redundants=redundants)
            placements.append(lplb.Placement.from_phy2log(place.phy2log, ranks, max_replicas=ranks))
    else:
        placements = [configurations()[name]] * 152
    loads = random_loads(rng, placements[0].num_experts, len(placements))
    return Case(placements, loads, np.stack([optimum(*one) for one in zip(loads, placements, strict=True)]))


# Placements are arguments, so that instances of equal shapes share what is compiled.
compiled = jax.jit(interior_point, static_argnames=("tol", "implementation"))


@partial(jax.jit, static_argnames="implementation")
def compiled_for_loads(loads: jax.Array, place: lplb.Placement, implementation: str) -> lplb.Solution:
    return jax.vmap(partial(interior_point, placement=place, implementation=implementation))(loads)


@partial(jax.jit, static_argnames="implementation")
def compiled_for_stacks(loads: jax.Array, placements: lplb.Placement, implementation: str) -> lplb.Solution:
    return jax.vmap(partial(interior_point, implementation=implementation))(loads, placements)


@lru_cache
def solved(name: str, implementation: str, platform: str) -> lplb.Solution:
    """All instances of a case in one call; a placement of their own each comes in traced."""
    del platform  # the default device; keeps the results of several apart
    placements, loads, _ = case(name)
    if name in RANDOM:
        return solve_stack(loads, stack(placements), implementation)
    return jax.tree.map(np.asarray, compiled_for_loads(loads, placements[0], implementation))


def stack(placements: list[lplb.Placement]) -> lplb.Placement:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *placements)


def solve(load: np.ndarray, place: lplb.Placement, implementation: str, tol: float = TOL) -> lplb.Solution:
    return jax.tree.map(np.asarray, compiled(load, place, tol=tol, implementation=implementation))


def solve_stack(loads: np.ndarray, placements: lplb.Placement, implementation: str) -> lplb.Solution:
    return jax.tree.map(np.asarray, compiled_for_stacks(loads, placements, implementation))


@pytest.mark.parametrize("name", NAMES)
def test_feasible_and_certified(name, implementation, platform):
    for i, (place, load, best) in enumerate(zip(*case(name), strict=True)):
        solution = jax.tree.map(lambda leaf, i=i: leaf[i], solved(name, implementation, platform))
        true_gap = check(load, place, solution, best)
        assert (true_gap[solution.status == Status.CONVERGED] <= TOL + ROUNDING).all()


@pytest.mark.parametrize("name", NAMES)
def test_implementations_agree(name, platform):
    """Both are within the tolerance of one optimum."""
    size = case(name).placements[0].group_size
    ffi, xla = (solved(name, implementation, platform) for implementation in ("ffi", "xla"))
    largest = [solution.rank_load.reshape(*solution.gap.shape, size).max(axis=2) for solution in (ffi, xla)]
    converged = (ffi.status == Status.CONVERGED) & (xla.status == Status.CONVERGED)
    np.testing.assert_allclose(largest[0][converged], largest[1][converged], rtol=2 * TOL)


def test_all_converge_in_a_few_iterations(implementation, platform):
    solutions = [solved(name, implementation, platform) for name in NAMES]
    assert sum(len(solution.gap) for solution in solutions) > 2000
    for solution in solutions:
        assert (solution.status == Status.CONVERGED).all()
    iterations = np.concatenate([solution.iterations.ravel() for solution in solutions])
    assert np.median(iterations) <= 2
    assert iterations.max() <= 12


@pytest.mark.smoke
def test_groups_are_independent(platform, rng):
    check_groups_are_independent(solve, rng)


def test_stops_at_the_tolerance(implementation, platform, rng):
    """A looser tolerance takes no more iterations, and every tolerance is met."""
    place, load = configurations()["many 16 ranks"], random_loads(rng, 256, 8)[6]
    best, iterations = optimum(load, place), []
    for tol in (0.1, TOL, 1e-5):
        solution = solve(load, place, implementation, tol)
        true_gap = check(load, place, solution, best, tol)
        assert solution.status == Status.CONVERGED
        assert true_gap <= tol + ROUNDING
        iterations.append(solution.iterations[0])
    assert iterations == sorted(iterations)
    assert iterations[0] < iterations[-1]


@pytest.mark.parametrize("name", ["cube 8x2", "torus 8x4 x2", "many 16 ranks"])
def test_tolerance_zero(name, implementation, platform, rng):
    """Float32 may not get there; the answer is still certified, and better than at the default tolerance."""
    place = configurations()[name]
    for load in random_loads(rng, place.num_experts, 24):
        solution = solve(load, place, implementation, tol=0)
        true_gap = check(load, place, solution, optimum(load, place), tol=0)
        assert (true_gap <= TOL).all()
        assert (solution.status != Status.SKIPPED).all()


def test_no_load(implementation, platform):
    for dtype in (np.int32, np.float32):
        solution = solve(np.zeros(256, dtype), configurations()["cube 8x2"], implementation)
        assert solution.status == Status.CONVERGED
        for values in solution:
            assert not values.any()


def test_negative_loads_count_as_none(implementation, platform, rng):
    place, load = configurations()["cube 8x2"], random_loads(rng, 256, 1)[0]
    for dtype in (np.int32, np.float32):
        negative = np.where(np.arange(256) % 3 == 0, -load - 1, load).astype(dtype)
        got = solve(negative, place, implementation)
        expected = solve(np.maximum(negative, 0), place, implementation)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        check(np.maximum(negative, 0), place, got, optimum(negative, place))


def test_one_expert_holds_everything(implementation, platform):
    """Its load is spread equally, whether it is one token or all that an int32 counts."""
    place = configurations()["many 16 ranks"]
    hot = int(np.argmax((place.log2phy >= 0).sum(axis=1)))
    replicas = int((place.log2phy[hot] >= 0).sum())
    assert replicas > 3
    for tokens in (1, 1000, 2**31 - 1):
        load = np.where(np.arange(256) == hot, tokens, 0).astype(np.int32)
        solution = solve(load, place, implementation)
        check(load, place, solution, np.array([tokens / replicas]))
        assert solution.status == Status.CONVERGED
        np.testing.assert_allclose(solution.split[hot, :replicas], tokens / replicas, rtol=TOL * replicas)


@pytest.mark.parametrize("name", ["cube 8x2", "many 16 ranks"])
def test_largest_total(name, implementation, platform, rng):
    """Loads whose sum is the largest int32."""
    place = configurations()[name]
    load = np.sort(rng.lognormal(0, 1.5, place.num_experts))
    load = np.floor(load / load.sum() * (2**31 - 1)).astype(np.int64)
    load[-1] += 2**31 - 1 - load.sum()
    assert load.sum() == 2**31 - 1
    load = rng.permutation(load).astype(np.int32)
    solution = solve(load, place, implementation)
    true_gap = check(load, place, solution, optimum(load, place))
    assert solution.status == Status.CONVERGED
    assert true_gap <= TOL + ROUNDING


@pytest.mark.parametrize("scale", [1e-33, 1e-30, 1e-20, 1, 1e20, 1e28, 1e33])
def test_float_loads(scale, implementation, platform, rng):
    """Moving averages, in any unit."""
    place = configurations()["cube 8x2"]
    load = (rng.lognormal(0, 1, 256) * scale).astype(np.float32)
    load[::5] = 0
    solution = solve(load, place, implementation)
    true_gap = check(load, place, solution, optimum(load, place))
    assert solution.status == Status.CONVERGED
    assert true_gap <= TOL + ROUNDING


def test_float_loads_of_all_sizes_at_once(implementation, platform):
    place = configurations()["cube 8x2"]
    load = np.geomspace(1e-30, 1e25, 256).astype(np.float32)
    solution = solve(load, place, implementation)
    check(load, place, solution, optimum(load, place))
    assert solution.status == Status.CONVERGED


def test_nan_counts_as_none(implementation, platform, rng):
    place = configurations()["cube 8x2"]
    load = rng.lognormal(0, 1, 256).astype(np.float32)
    load[::7] = np.nan
    known = np.nan_to_num(load, nan=0)
    got, expected = solve(load, place, implementation), solve(known, place, implementation)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    nothing = solve(np.full(256, np.nan, np.float32), place, implementation)
    assert not nothing.split.any()
    assert not nothing.rank_load.any()
    assert nothing.status == Status.CONVERGED


@pytest.mark.parametrize(("room", "dtype"), [(1, np.int32), (1, np.float32), (2, np.float32)])
def test_nothing_replicated(room, dtype, implementation, platform, rng):
    place = lplb.Placement.from_phy2log(rng.permutation(64), 8, max_replicas=room)
    load = random_loads(rng, 64, 1)[0].astype(dtype)
    solution = solve(load, place, implementation)
    assert solution.status == Status.SKIPPED
    assert solution.gap == 0
    assert solution.iterations == 0
    np.testing.assert_array_equal(solution.split[:, 0], load.astype(np.float32))
    assert not solution.split[:, 1:].any()
    np.testing.assert_allclose(solution.rank_load, load[place.phy2log].reshape(8, 8).sum(axis=1), rtol=ROUNDING)


@pytest.mark.parametrize("tol", [TOL, 0])
@pytest.mark.parametrize("name", ["cube 8x2", "torus 8x4 x2"])
def test_even_split_already_optimal(name, tol, implementation, platform):
    """Equal loads on a topology: the even split stands."""
    place = configurations()[name]
    load = np.full(256, 1000, np.int32)
    solution = solve(load, place, implementation, tol)
    check(load, place, solution, np.array([256_000 / place.num_ranks]), tol)
    assert solution.gap <= ROUNDING
    np.testing.assert_allclose(solution.rank_load, 256_000 / place.num_ranks, rtol=ROUNDING)
    if tol > 0:
        assert solution.status == Status.CONVERGED
        assert solution.iterations == 0
        replicas = (place.log2phy >= 0).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(solution.split, np.where(place.log2phy >= 0, 1000 / replicas, 0), rtol=ROUNDING)


def test_threshold_of_many_replicas(implementation, platform, rng):
    """Up to the threshold, and no further, all load stays at home; experts without load are then of no account."""
    place = configurations()["many 16 ranks"]
    run = jax.jit(jax.vmap(partial(interior_point, placement=place, threshold=1.5, implementation=implementation)))
    home = place.log2phy[:, 0] // place.slots_per_rank
    at_the_threshold = np.zeros(256, np.int32)
    for rank, tokens in enumerate([480] + 8 * [300] + 7 * [320]):  # the first has 1.5 times the mean
        busy = rng.choice(np.flatnonzero(home == rank), 3, replace=False)
        at_the_threshold[busy] = [tokens // 2, tokens // 4, tokens // 4]
    beyond = at_the_threshold + np.where(np.arange(256) == np.argmax(at_the_threshold), 16, 0).astype(np.int32)
    below = np.full(256, 3, np.int32)
    solutions = jax.tree.map(np.asarray, run(np.stack([at_the_threshold, beyond, below])))
    np.testing.assert_array_equal(solutions.status.ravel(), [Status.SKIPPED, Status.CONVERGED, Status.SKIPPED])
    for i, one in enumerate([at_the_threshold, beyond, below]):
        solution = jax.tree.map(lambda leaf, i=i: leaf[i], solutions)
        if i == 1:
            check(one, place, solution, optimum(one, place))
            continue
        at_home = np.bincount(home, one)
        np.testing.assert_array_equal(solution.split[:, 0], one)
        assert not solution.split[:, 1:].any()
        np.testing.assert_array_equal(solution.rank_load, at_home)
        assert abs(solution.gap - (1 - at_home.mean() / at_home.max())) <= ROUNDING
        assert solution.iterations == 0


# Contents of placements are drawn; their shapes are few, because each is compiled: ranks, experts, slots a rank.
SHAPES = [(2, 3, 2), (4, 6, 3)]
ROOM = 4


@st.composite
def instances(draw) -> tuple[np.ndarray, lplb.Placement]:
    ranks, experts, slots = draw(st.sampled_from(SHAPES))
    homes = draw(st.permutations(range(experts)))
    held = [homes[rank::ranks] for rank in range(ranks)]
    replicas = np.ones(experts, int)
    for own in held:
        while len(own) < slots:
            own.append(draw(st.sampled_from([e for e in range(experts) if e not in own and replicas[e] < ROOM])))
            replicas[own[-1]] += 1
    phy2log = np.concatenate(held)
    sizes = st.one_of(st.integers(0, 3), st.integers(0, 1000), st.integers(0, (2**31 - 1) // experts))
    load = draw(st.lists(sizes, min_size=experts, max_size=experts))
    return np.array(load, np.int32), lplb.Placement.from_phy2log(phy2log, ranks, max_replicas=ROOM)


@hypothesis.settings(
    max_examples=150, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(instance=instances())
def test_any_placement_and_load(instance, implementation, platform):
    load, place = instance
    solution = solve(load, place, implementation)
    true_gap = check(load, place, solution, optimum(load, place))
    assert (true_gap[solution.status == Status.CONVERGED] <= TOL + ROUNDING).all()


@pytest.mark.smoke
def test_traced_placements(platform, rng):
    """A stack of placements under vmap, traced, gives what each gives alone as a constant, bit for bit."""
    places = []
    for _ in range(4):
        place = many_replicas(rng, num_experts=32, num_ranks=8, redundants=2)
        places.append(lplb.Placement.from_phy2log(place.phy2log, 8, max_replicas=8))
    loads = random_loads(rng, 32, len(places))
    stacked = solve_stack(loads, stack(places), "ffi")
    for i, (load, place) in enumerate(zip(loads, places, strict=True)):
        single = jax.tree.map(np.asarray, jax.jit(partial(interior_point, placement=place, implementation="ffi"))(load))
        jax.tree.map(lambda leaf, one, i=i: np.testing.assert_array_equal(leaf[i], one), stacked, single)


def test_two_replicas_on_one_rank(implementation, platform, rng):
    """As only replaced contents can have it: of two on a rank, the first is used."""
    place = many_replicas(rng, num_experts=32, num_ranks=8, redundants=2)
    place = lplb.Placement.from_phy2log(place.phy2log, 8, max_replicas=8)
    phy2log, log2phy = place.phy2log.copy(), place.log2phy.copy()
    replicas = (log2phy >= 0).sum(axis=1)
    hot = int(np.argmax(np.where(log2phy[:, 0] % 6 == 5, 0, replicas)))
    single = int(np.flatnonzero((replicas == 1) & (log2phy[:, 0] // 6 != log2phy[hot, 0] // 6))[0])
    for expert in (hot, single):
        # In place of the copy that its home's rank has in its last slot.
        slot = log2phy[expert, 0] // 6 * 6 + 5
        other = phy2log[slot]
        log2phy[other] = np.append(log2phy[other][log2phy[other] != slot], -1)[:8]
        log2phy[expert] = np.insert(log2phy[expert], 1, slot)[:8]
        phy2log[slot] = expert
    place = dataclasses.replace(place, phy2log=phy2log, log2phy=log2phy)
    for load in random_loads(rng, 32, 8):
        load[[hot, single]] += load.sum() // 8 + 1
        solution = solve(load, place, implementation)
        true_gap = check(load, place, solution, optimum(load, place))
        assert solution.status == Status.CONVERGED
        assert true_gap <= TOL + ROUNDING
        assert not solution.split[[hot, single], 1].any()
        assert solution.split[single, 0] == load[single]
        assert (solution.split[hot] > 0).sum() > 1


@pytest.mark.parametrize("name", ["cube EP32 x2", "many 16 ranks"])
def test_garbage_placements(name, implementation, platform, rng):
    """Contents that are no placement: the solve ends, with numbers, and their neighbours in the batch are intact."""
    place = configurations()[name]
    bad = garbage(place, rng)
    batch = [place]
    for one in bad.values():
        batch += [one, place]
    load = random_loads(rng, place.num_experts, 1)[0]
    loads = np.tile(load, (len(batch), 1))
    solutions = solve_stack(loads, stack(batch), implementation)
    for i in range(2, len(batch), 2):
        jax.tree.map(lambda leaf, i=i: np.testing.assert_array_equal(leaf[i], leaf[0]), solutions)
    check(load, place, jax.tree.map(lambda leaf: leaf[0], solutions), optimum(load, place))
    for i, kind in enumerate(bad):
        split, rank_load, gap, iterations, status = jax.tree.map(lambda leaf, i=i: leaf[2 * i + 1], solutions)
        assert np.isfinite(split).all(), kind
        assert (split >= 0).all(), kind
        assert (split <= load[:, None] * (1 + ROUNDING)).all(), kind
        assert np.isfinite(rank_load).all(), kind
        assert ((gap >= 0) & (gap <= 1)).all(), kind
        assert (iterations <= MAX_ITERATIONS).all(), kind
        assert np.isin(status, list(Status)).all(), kind


def test_no_gradient(implementation, platform, rng):
    """Loads carry none, as said; and asking for it is no error."""
    place = configurations()["cube 8x2"]
    load = rng.lognormal(0, 1, 256).astype(np.float32)

    def total(load: jax.Array) -> jax.Array:
        return (interior_point(load, place, implementation=implementation).split ** 2).sum()

    assert not np.asarray(jax.jit(jax.grad(total))(load)).any()


@pytest.mark.parametrize("size", [1, 5, 32])
def test_cholesky_by_column_is_that_of_numpy(rng, size):
    """In float64, also where it is mapped after float64 is off again."""
    matrices = rng.normal(size=(3, size, size + 2)).astype(np.float32)
    matrices = matrices @ matrices.swapaxes(1, 2)

    def factor(matrix):
        with jax.enable_x64(True):
            lower = _cholesky_by_column(matrix.astype(jnp.float64))
            high = lower.astype(jnp.float32)
            return high, (lower - high.astype(jnp.float64)).astype(jnp.float32)

    high, low = map(np.asarray, jax.jit(jax.vmap(factor))(matrices))
    expected = np.linalg.cholesky(matrices.astype(np.float64))
    np.testing.assert_allclose(high.astype(np.float64) + low, expected, rtol=1e-11, atol=1e-11)
