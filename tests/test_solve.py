"""Every split is feasible and certified; compared with the optimum of SciPy's HiGHS on over 2,000 instances."""

import dataclasses
from functools import lru_cache, partial
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from helpers import configurations, many_replicas, optimum, placement, rank_loads, topology

import jax_lplb as lplb
from jax_lplb import Status

EPS = float(np.finfo(np.float32).eps)
ROUNDING = 1e-6  # relative: what float32 sums of a rank's slots may lose
TOL = 1e-4  # of `solve`, by default
MAX_ITERATIONS = 50


class Case(NamedTuple):
    """Instances of equal shapes: the placement and loads of each, and the optimum of each of its groups."""

    placements: list[lplb.Placement]
    loads: np.ndarray
    optima: np.ndarray


def random_loads(rng: np.random.Generator, num_experts: int, number: int) -> np.ndarray:
    """int32 [number, num_experts]: three in eight log-normal, the others of the kinds that upset solvers."""

    def log_normal() -> np.ndarray:
        popularity = rng.lognormal(0, rng.uniform(0.3, 2.5), num_experts)
        return rng.multinomial(32768, popularity / popularity.sum())

    def one_expert() -> np.ndarray:
        return np.where(np.arange(num_experts) == rng.integers(num_experts), rng.integers(1, 10**6), 0)

    def mostly_zero() -> np.ndarray:
        return np.where(rng.random(num_experts) < 0.1, rng.integers(1, 1000, num_experts), 0)

    def equal() -> np.ndarray:
        return np.full(num_experts, rng.integers(1, 10**4))

    def tiny() -> np.ndarray:
        return rng.integers(0, 4, num_experts)

    def wide() -> np.ndarray:
        loads = np.exp(rng.uniform(0, np.log(1e8), num_experts))
        return loads * min(1, 2e9 / loads.sum())

    kinds = [log_normal, log_normal, log_normal, one_expert, mostly_zero, equal, tiny, wide]
    return np.stack([kinds[i % len(kinds)]().astype(np.int32) for i in range(number)])


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
compiled = jax.jit(lplb.solve, static_argnames=("tol", "implementation"))


@partial(jax.jit, static_argnames="implementation")
def compiled_for_loads(loads: jax.Array, place: lplb.Placement, implementation: str) -> lplb.Solution:
    return jax.vmap(partial(lplb.solve, placement=place, implementation=implementation))(loads)


@partial(jax.jit, static_argnames="implementation")
def compiled_for_stacks(loads: jax.Array, placements: lplb.Placement, implementation: str) -> lplb.Solution:
    return jax.vmap(partial(lplb.solve, implementation=implementation))(loads, placements)


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


def most(loads: np.ndarray, place: lplb.Placement) -> np.ndarray:
    """Largest rank load of each group."""
    return loads.reshape(place.num_groups, -1).max(axis=1)


def check(
    load: np.ndarray, place: lplb.Placement, solution: lplb.Solution, best: np.ndarray, tol: float = TOL
) -> np.ndarray:
    """What `solve` promises of any answer, given the optima; returns the true gap of each group."""
    load = np.asarray(load, np.float64)
    split, present = np.asarray(solution.split, np.float64), place.log2phy >= 0
    for values in solution:
        assert np.isfinite(values).all()

    # Feasible.
    assert (split >= 0).all()
    assert (split[~present] == 0).all()
    assert (split[load == 0] == 0).all()
    subnormal = place.max_replicas * float(np.finfo(np.float32).tiny)  # what XLA takes for 0
    np.testing.assert_allclose(split.sum(axis=1), load, rtol=EPS * (place.max_replicas + 4), atol=subnormal)

    # The loads it reports are those it gives.
    loads = rank_loads(split, place)
    mean = np.repeat(loads.reshape(place.num_groups, -1).mean(axis=1), place.group_size)
    assert (np.abs(solution.rank_load - loads) <= ROUNDING * np.maximum(loads, mean)).all()

    # Certified, within tolerance where it says so, and never worse than the even split.
    true_gap = 1 - best / np.maximum(most(loads, place), np.finfo(np.float64).tiny)
    true_gap[most(loads, place) == 0] = 0
    assert (true_gap >= -ROUNDING).all()
    assert (solution.gap >= true_gap - ROUNDING).all()
    assert (solution.gap[solution.status == Status.CONVERGED] <= tol).all()
    assert (solution.iterations >= 0).all()
    assert (solution.iterations <= MAX_ITERATIONS).all()
    even = np.where(present, (load / present.sum(axis=1))[:, None], 0)
    assert (most(loads, place) <= most(rank_loads(even, place), place) * (1 + ROUNDING)).all()
    return true_gap


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
    assert np.median(iterations) <= 4
    assert iterations.max() <= 12


@pytest.mark.smoke
def test_groups_are_independent(platform, rng):
    """A group's answer is that of its ranks alone, bit for bit."""
    place, alone = configurations()["cube EP32 x2"], placement(topology.cube(), 64, 8, 2)
    load = random_loads(rng, 256, 1)[0]
    together = solve(load, place, "ffi")
    for group in range(4):
        single = solve(load[group * 64 : (group + 1) * 64], alone, "ffi")
        np.testing.assert_array_equal(together.split[group * 64 : (group + 1) * 64], single.split)
        np.testing.assert_array_equal(together.rank_load[group * 8 : (group + 1) * 8], single.rank_load)
        assert together.gap[group] == single.gap[0]
        assert together.iterations[group] == single.iterations[0]


def test_stops_at_the_tolerance(implementation, platform, rng):
    """A looser tolerance takes no more iterations, and every tolerance is met."""
    place, load = configurations()["cube 8x2"], random_loads(rng, 256, 1)[0]
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
        single = jax.tree.map(np.asarray, jax.jit(partial(lplb.solve, placement=place, implementation="ffi"))(load))
        jax.tree.map(lambda leaf, one, i=i: np.testing.assert_array_equal(leaf[i], one), stacked, single)


def garbage(place: lplb.Placement, rng: np.random.Generator) -> dict[str, lplb.Placement]:
    slots, (experts, room) = place.num_physical, place.log2phy.shape

    def made(phy2log: np.ndarray, log2phy: np.ndarray) -> lplb.Placement:
        return dataclasses.replace(place, phy2log=phy2log.astype(np.int32), log2phy=log2phy.astype(np.int32))

    def full(value: int) -> lplb.Placement:
        return made(np.full(slots, value), np.full((experts, room), value))

    far = [-(2**31), -5, -1, 0, slots - 1, slots, 10**6, 2**31 - 1]
    return {f"all {value}": full(value) for value in far} | {
        "random": made(rng.integers(-5, 2 * slots, slots), rng.integers(-5, 2 * slots, (experts, room))),
        "far": made(rng.choice(far, slots), rng.choice(far, (experts, room))),
        "slots moved": made(rng.permutation(place.phy2log), place.log2phy),
        "replicas moved": made(place.phy2log, rng.permutation(place.log2phy.ravel()).reshape(experts, room)),
        "one slot twice": made(place.phy2log, np.repeat(place.log2phy[:, :1], room, axis=1)),
        "one expert everywhere": made(np.full(slots, 3), np.tile(np.arange(room), (experts, 1))),
        "one slot for all": made(place.phy2log, np.zeros((experts, room))),
        "an expert without a slot": made(np.where(place.phy2log == 5, 6, place.phy2log), place.log2phy),
    }


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
        return (lplb.solve(load, place, implementation=implementation).split ** 2).sum()

    assert not np.asarray(jax.jit(jax.grad(total))(load)).any()
