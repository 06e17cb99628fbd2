"""Edge balance: optimal within the tolerance on over a thousand instances; the same bits from both implementations."""

import dataclasses
from functools import lru_cache, partial

import helpers
import jax
import numpy as np
import pytest
from helpers import (
    ROUNDING,
    TOL,
    check_groups_are_independent,
    configurations,
    garbage,
    most,
    optimum,
    placement,
    random_loads,
    rank_loads,
    topology,
)

import jax_lplb as lplb
from jax_lplb import Status
from jax_lplb._edge_balance import MAX_SWEEPS, colouring

P = jax.sharding.PartitionSpec
check = partial(helpers.check, max_iterations=MAX_SWEEPS)


@lru_cache
def topologies() -> dict[str, lplb.Placement]:
    """The shared placements along topologies, and some with merged edges, odd cycles, and more to move."""
    shared = {
        name: place for name, place in configurations().items() if place.topology is not None and place.group_size <= 32
    }
    return shared | {
        "ring 2x4": placement(topology.ring(2), 32, 2, 4),
        "ring 3x2": placement(topology.ring(3), 24, 3, 2),
        "ring 32x8": placement(topology.ring(32), 256, 32, 8),
        "torus 2x2 x4": placement(topology.torus(2, 2), 32, 4, 4),
        "torus 3x3 x4": placement(topology.torus(3, 3), 72, 9, 4),
        "torus 8x4 x8": placement(topology.torus(8, 4), 256, 32, 8),
    }


NAMES = list(topologies())
SOLVERS = ["edge_balance", "ipm"]
NUMBER = 96


@lru_cache
def loads(name: str) -> np.ndarray:
    """int32 [instances, num_experts]: of all kinds, half of them with each rank's heaviest experts first."""
    rng, place = np.random.default_rng(NAMES.index(name)), topologies()[name]
    loads = random_loads(rng, place.num_experts, max(NUMBER // place.num_groups, 16))
    by_rank = loads[::2].reshape(-1, place.num_ranks, place.num_experts // place.num_ranks)
    loads[::2] = -np.sort(-by_rank, axis=2).reshape(-1, place.num_experts)
    loads[1] = np.repeat([1000, 0], [place.num_experts // 2, place.num_experts - place.num_experts // 2])
    return loads


@partial(jax.jit, static_argnames=("tol", "threshold", "implementation", "solver"))
def compiled(load, place, tol, threshold, implementation, solver):
    run = partial(
        lplb.solve, placement=place, tol=tol, threshold=threshold, implementation=implementation, solver=solver
    )
    return jax.vmap(run)(load) if load.ndim == 2 else run(load)


def solve(
    load: np.ndarray,
    place: lplb.Placement,
    implementation: str,
    *,
    tol: float = TOL,
    threshold: float | None = None,
    solver: str = "edge_balance",
) -> lplb.Solution:
    return jax.tree.map(np.asarray, compiled(load, place, tol, threshold, implementation, solver))


@lru_cache
def solved(name: str, implementation: str, platform: str) -> lplb.Solution:
    del platform  # the default device; keeps the results of several apart
    return solve(loads(name), topologies()[name], implementation)


def assert_same(got: lplb.Solution, expected: lplb.Solution) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_optimal_within_the_tolerance(name, platform):
    place, solutions = topologies()[name], solved(name, "ffi", platform)
    for i, load in enumerate(loads(name)):
        solution = jax.tree.map(lambda leaf, i=i: leaf[i], solutions)
        true_gap = check(load, place, solution, optimum(load, place))
        assert (solution.status == Status.CONVERGED).all()
        assert (true_gap <= TOL + ROUNDING).all()


# Each is compiled anew: of one, of several groups; merged edges, odd cycles, load that travels far.
@pytest.mark.parametrize(
    "name", ["cube EP32 x4", "hypercube 16x2", "ring 2x4", "ring 3x2", "ring 32x8", "torus 3x3 x4", "torus 8x4 x2"]
)
def test_same_bits_from_both_implementations(name):
    with jax.default_device(jax.devices("cpu")[0]):
        assert_same(solved(name, "xla", "cpu"), solved(name, "ffi", "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_cpu_and_gpu(name):
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = solved(name, "ffi", "cpu")
    with jax.default_device(jax.devices("gpu")[0]):
        assert_same(solved(name, "ffi", "gpu"), on_cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_pure_jax_agrees_on_gpu(name):
    """XLA divides approximately there: fractions of the load agree to within float32's rounding of 1."""
    with jax.default_device(jax.devices("gpu")[0]):
        got, expected = solved(name, "xla", "gpu"), solved(name, "ffi", "gpu")
    load = expected.split.sum(axis=-1, keepdims=True)
    assert (np.abs(got.split - expected.split) <= ROUNDING * load).all()
    np.testing.assert_array_equal(got.iterations, expected.iterations)
    np.testing.assert_array_equal(got.status, expected.status)
    for field in ("rank_load", "gap"):
        np.testing.assert_allclose(getattr(got, field), getattr(expected, field), rtol=ROUNDING)


def test_few_sweeps(platform):
    """What the growing relaxation is for: without it, rings of 32 ranks take hundreds."""
    sweeps = {name: solved(name, "ffi", platform).iterations for name in NAMES}
    assert np.median(np.concatenate([values.ravel() for values in sweeps.values()])) <= 4
    for name in ("ring 8x1", "cube 8x2", "hypercube 16x2"):
        assert sweeps[name].max() <= 40
    assert max(values.max() for values in sweeps.values()) <= 100


def test_most_experts_stay_whole(platform, rng):
    """Of an edge's experts, at most one is split."""
    place = topologies()["torus 8x4 x8"]
    load = random_loads(rng, 256, 1)[0] + 1
    split = solve(load, place, "ffi").split
    slots = place.slots_per_rank
    replicated = place.log2phy[:, 1] >= 0
    edges = np.sort(place.log2phy[replicated] // slots, axis=1)
    both = (split[replicated] > 0).all(axis=1)
    assert both.any()
    _, number = np.unique(edges[both], axis=0, return_counts=True)
    assert number.max() == 1


@pytest.mark.smoke
def test_groups_are_independent(platform, rng):
    check_groups_are_independent(solve, rng)


@pytest.mark.parametrize("name", ["cube 8x2", "ring 32x1", "torus 8x4 x2"])
def test_adversarial_loads(name, implementation, platform):
    place = topologies()[name]
    home, top = 256 // place.num_ranks, 2**31 - 1
    ranks = np.arange(256) // home
    first, replicated = np.arange(256) % home == 0, place.log2phy[:, 1] >= 0
    instances = {
        "everything on one expert": np.where(np.arange(256) == 0, top, 0),
        "everything on an expert without copies": np.where(np.arange(256) == home - 1, top, 0),
        "one token": np.where(np.arange(256) == 0, 1, 0),
        "one token each": np.ones(256),
        "replicated only": np.where(replicated, 1000, 0),
        "one rank only": np.where(ranks == 0, 1000, 0),
        "two halves": np.where(ranks < place.num_ranks // 2, 1000 * first, 3 * first),
        "every other rank": np.where(ranks % 2 == 0, 1000, 1),
        "far apart": np.where(np.arange(256) % 7 == 0, 10**7, 0) + (np.arange(256) % 5 == 0),
        "largest total": np.full(256, top // 256),
    }
    for kind, load in instances.items():
        load = load.astype(np.int32)
        solution = solve(load, place, implementation)
        true_gap = check(load, place, solution, optimum(load, place))
        assert solution.status == Status.CONVERGED, kind
        assert (true_gap <= TOL + ROUNDING).all(), kind


@pytest.mark.parametrize("tol", [0, 1e-6, 0.9])
def test_tolerances(tol, platform):
    """Each is met, or the status says that it is not."""
    name = "torus 8x4 x2"
    place = topologies()[name]
    solutions = solve(loads(name)[:24], place, "ffi", tol=tol)
    for i, load in enumerate(loads(name)[:24]):
        solution = jax.tree.map(lambda leaf, i=i: leaf[i], solutions)
        true_gap = check(load, place, solution, optimum(load, place), tol)
        assert (solution.gap <= max(tol, 4e-6)).all()
        assert (true_gap <= max(tol, 4e-6) + ROUNDING).all()
        if tol > 1e-5:
            assert (solution.status == Status.CONVERGED).all()


def test_tolerance_zero_has_the_same_bits():
    name = "torus 8x4 x2"
    with jax.default_device(jax.devices("cpu")[0]):
        ffi, xla = (solve(loads(name)[:24], topologies()[name], which, tol=0) for which in ("ffi", "xla"))
    assert_same(xla, ffi)


def test_no_load(implementation, platform):
    solution = solve(np.zeros(256, np.int32), configurations()["cube 8x2"], implementation)
    assert solution.status == Status.CONVERGED
    for values in solution:
        assert not values.any()


def test_negative_loads_count_as_none(implementation, platform, rng):
    place, load = configurations()["cube 8x2"], random_loads(rng, 256, 1)[0]
    negative = np.where(np.arange(256) % 3 == 0, -load - 1, load).astype(np.int32)
    assert_same(solve(negative, place, implementation), solve(np.maximum(negative, 0), place, implementation))


@pytest.mark.parametrize("scale", [1e-30, 1, 1e28])
def test_float_loads(scale, implementation, platform, rng):
    place = configurations()["hypercube 16x2"]
    load = (rng.lognormal(0, 1, 256) * scale).astype(np.float32)
    load[::5] = 0
    load[::7] = np.nan
    solution = solve(load, place, implementation)
    load = np.nan_to_num(load, nan=0)
    true_gap = check(load, place, solution, optimum(load, place))
    assert true_gap <= TOL + ROUNDING


def test_loads_beyond_the_limit_end(implementation, platform, rng):
    """A sum that an int32 does not hold: some answer, and all of it finite."""
    load = rng.integers(2**30, 2**31 - 1, 256).astype(np.int32)
    solution = solve(load, configurations()["cube 8x2"], implementation)
    for values in solution:
        assert np.isfinite(values).all()
    assert (solution.split >= 0).all()
    assert (solution.iterations <= MAX_SWEEPS).all()


@pytest.mark.parametrize("name", ["cube EP32 x2", "torus 3x3 x4"])
def test_garbage_placements(name, implementation, platform, rng):
    """Contents that are no placement: experts with a home keep their load, and neighbours in the batch are intact."""
    place = topologies()[name]
    bad = garbage(place, rng)
    batch = [place]
    for one in bad.values():
        batch += [one, place]
    load = random_loads(rng, place.num_experts, 1)[0]
    placements = jax.tree.map(lambda *leaves: np.stack(leaves), *batch)
    run = jax.jit(jax.vmap(partial(lplb.solve, load, solver="edge_balance", implementation=implementation)))
    solutions = jax.tree.map(np.asarray, run(placements))
    for i in range(2, len(batch), 2):
        jax.tree.map(lambda leaf, i=i: np.testing.assert_array_equal(leaf[i], leaf[0]), solutions)
    check(load, place, jax.tree.map(lambda leaf: leaf[0], solutions), optimum(load, place))
    for i, (kind, one) in enumerate(bad.items()):
        split, rank_load, gap, iterations, status = jax.tree.map(lambda leaf, i=i: leaf[2 * i + 1], solutions)
        assert (split >= 0).all(), kind
        home = (one.log2phy[:, 0] >= 0) & (one.log2phy[:, 0] < place.num_physical)
        np.testing.assert_allclose(split.sum(axis=1), np.where(home, load, 0), rtol=ROUNDING, err_msg=kind)
        np.testing.assert_allclose(rank_load.sum(), load[home].sum(), rtol=ROUNDING, err_msg=kind)
        assert ((gap >= 0) & (gap <= 1)).all(), kind
        assert (iterations <= MAX_SWEEPS).all(), kind
        assert np.isin(status, list(Status)).all(), kind


def test_a_copy_off_the_topology_stays_idle(implementation, platform):
    """Between ranks that no edge joins nothing moves."""
    place = placement(topology.ring(8), 64, 8, 1)
    log2phy = place.log2phy.copy()
    log2phy[0, 1] = 4 * place.slots_per_rank + 8  # expert 0 of rank 0 on rank 4
    load = np.where(np.arange(64) == 0, 1000, 1).astype(np.int32)
    solution = solve(load, dataclasses.replace(place, log2phy=log2phy), implementation)
    np.testing.assert_array_equal(solution.split[0], [1000, 0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_inside_shard_map_and_scan(solver, implementation):
    """Loads that are equal on all ranks give results that are, for `check_vma`; scanned over layers."""
    place = configurations()["cube 8x2"]
    layers = loads("cube 8x2")[:4]
    expected = solve(layers, place, implementation, solver=solver)

    def all_layers(layers: jax.Array) -> lplb.Solution:
        run = partial(lplb.solve, placement=place, solver=solver, implementation=implementation)
        return jax.lax.scan(lambda carry, load: (carry, run(load)), 0, layers)[1]

    mesh = jax.make_mesh((8,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu"))
    run = jax.jit(jax.shard_map(all_layers, mesh=mesh, in_specs=P(), out_specs=P()))
    got = jax.tree.map(np.asarray, run(layers))
    if (solver, implementation) == ("ipm", "xla"):  # rounds otherwise in another executable
        largest = [one.rank_load.max(axis=1) for one in (got, expected)]
        np.testing.assert_allclose(*largest, rtol=TOL)
        np.testing.assert_array_equal(got.status, expected.status)
    else:
        assert_same(got, expected)


# The most neighbours of a rank, which no colouring can do with fewer than, and one more on odd rings.
COLOURS = {
    "ring(2)": 1,
    "ring(3)": 3,
    "ring(8)": 2,
    "ring(9)": 3,
    "ring(32)": 2,
    "cube()": 4,
    "hypercube()": 4,
    "torus(2, 2)": 2,
    "torus(2, 4)": 3,
    "torus(8, 4)": 4,
}


@pytest.mark.parametrize("name", COLOURS)
def test_minimal_colourings(name):
    partner = colouring(eval(name, vars(topology)))
    assert len(partner) == COLOURS[name]


@pytest.mark.parametrize("size", [4, 7, 12, 32])
def test_valid_colourings(size, rng):
    for columns in (1, 2, 3, 8):
        r2o = []
        while len(r2o) < columns:
            column = rng.permutation(size)
            if (column != np.arange(size)).all():
                r2o.append(column)
        topo = topology.from_r2o(np.stack(r2o, axis=1))
        partner = colouring(topo)
        ranks = np.arange(size)
        for others in partner:
            np.testing.assert_array_equal(others[others], ranks)
        coloured = [(i, j) for others in partner for i, j in enumerate(others) if i < j]
        edges = {tuple(sorted((i, int(j)))) for i in ranks for j in topo.r2o[i]}
        assert len(coloured) == len(set(coloured))
        assert {(int(i), int(j)) for i, j in coloured} == {(int(i), int(j)) for i, j in edges}
        degree = np.bincount(np.array(sorted(edges)).ravel()).max()
        assert len(partner) <= degree + 2
        np.testing.assert_array_equal(colouring(topology.from_r2o(topo.r2o.copy())), partner)


@pytest.mark.parametrize("solver", SOLVERS)
def test_threshold(solver, implementation, platform, rng):
    """Up to it all load of a group stays at home; the other groups' answers are as without one."""
    place = topologies()["cube EP32 x2"]
    popularity = rng.lognormal(0, 0.2, 256) * np.where(np.arange(256) < 8, 1.5, 1)
    load = rng.multinomial(10**5, popularity / popularity.sum()).astype(np.int32)
    at_home = load.reshape(place.num_groups, place.group_size, -1).sum(axis=2)
    imbalance = at_home.max(axis=1) / at_home.mean(axis=1)
    threshold = float(np.sort(imbalance)[1:3].mean())
    without = solve(load, place, implementation, solver=solver)
    solution = solve(load, place, implementation, threshold=threshold, solver=solver)
    np.testing.assert_array_equal(solution.status == Status.SKIPPED, imbalance <= threshold)
    experts = load.size // place.num_groups
    for group in range(place.num_groups):
        of_group = slice(group * experts, (group + 1) * experts)
        ranks = slice(group * place.group_size, (group + 1) * place.group_size)
        if imbalance[group] <= threshold:
            np.testing.assert_array_equal(solution.split[of_group, 0], load[of_group].astype(np.float32))
            assert not solution.split[of_group, 1].any()
            np.testing.assert_array_equal(solution.rank_load[ranks], at_home[group].astype(np.float32))
            assert abs(solution.gap[group] - (1 - 1 / imbalance[group])) <= ROUNDING
            assert solution.iterations[group] == 0
        else:
            np.testing.assert_array_equal(solution.split[of_group], without.split[of_group])
            assert solution.gap[group] == without.gap[group]
    equal = solve(np.full(256, 7, np.int32), place, implementation, threshold=threshold, solver=solver)
    assert (equal.status == Status.SKIPPED).all()
    assert not equal.gap.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_threshold_of_balance(solver, platform, rng):
    place = configurations()["cube 8x2"]
    ids = rng.integers(0, 256, (1024, 4)).astype(np.int32)
    run = jax.jit(partial(lplb.balance, placement=place, threshold=2.0, solver=solver, implementation="ffi"))
    out = run(ids)
    assert out.status == Status.SKIPPED
    np.testing.assert_array_equal(out.physical_ids, place.log2phy[ids, 0])
    np.testing.assert_array_equal(out.rank_load, np.bincount(ids.ravel() // 32, minlength=8))


@pytest.mark.parametrize("solver", SOLVERS)
def test_lowest_threshold(solver, platform):
    place = configurations()["cube 8x2"]
    solution = solve(np.full(256, 7, np.int32), place, "ffi", threshold=1.0, solver=solver)
    assert solution.status == Status.SKIPPED
    assert solution.gap == 0


def test_auto(rng):
    """Edge balance where it can run, and the interior-point method elsewhere: which of them shows in the bits."""
    cases = {
        "cube 8x2": "edge_balance",
        "ring 32x1": "edge_balance",
        "ring 64x1": "ipm",
        "many 16 ranks": "ipm",
    }
    for name, solver in cases.items():
        place = configurations()[name]
        load = random_loads(rng, place.num_experts, 1)[0]
        assert_same(solve(load, place, "ffi", solver="auto"), solve(load, place, "ffi", solver=solver))
    crowded = topology.from_r2o((np.arange(32)[:, None] + np.arange(1, 12)) % 32)
    place = placement(crowded, 32 * 11, 32, 11)
    assert len(colouring(crowded)) > 16
    load = random_loads(rng, place.num_experts, 1)[0]
    assert_same(solve(load, place, "ffi", solver="auto"), solve(load, place, "ffi", solver="ipm"))
    with pytest.raises(ValueError, match="at most 16 edge colours"):
        lplb.solve(load, place, solver="edge_balance")


def test_never_worse_than_the_even_split_at_any_sweep_limit(platform):
    """Even where a tolerance cannot be met."""
    for name in ("ring 32x8", "torus 8x4 x2"):
        place = topologies()[name]
        solutions = solve(loads(name)[:16], place, "ffi", tol=0)
        for i, load in enumerate(loads(name)[:16]):
            even = np.where(place.log2phy >= 0, (load / (place.log2phy >= 0).sum(axis=1))[:, None], 0)
            largest = most(rank_loads(solutions.split[i], place), place)
            assert (largest <= most(rank_loads(even, place), place) * (1 + ROUNDING)).all()


LOAD = np.ones(256, np.int32)
CUBE = configurations()["cube 8x2"]


@pytest.mark.parametrize(
    ("place", "options", "error", "message"),
    [
        (CUBE, {"solver": "simplex"}, ValueError, "solver must be 'auto', 'ipm' or 'edge_balance', got 'simplex'"),
        (CUBE, {"threshold": 0.9}, ValueError, "threshold must be at least 1 and finite, got 0.9"),
        (CUBE, {"threshold": float("inf")}, ValueError, "threshold must be at least 1 and finite, got inf"),
        (CUBE, {"threshold": float("nan")}, ValueError, "threshold must be at least 1 and finite, got nan"),
        (CUBE, {"threshold": "1.1"}, TypeError, "threshold must be None or a Python float, got '1.1'"),
        (
            configurations()["many 16 ranks"],
            {"solver": "edge_balance"},
            ValueError,
            "solver = 'edge_balance' needs a placement along a topology.*pass solver='ipm'",
        ),
        (
            configurations()["ring 64x1"],
            {"solver": "edge_balance"},
            ValueError,
            "solver = 'edge_balance' needs groups of at most 32 ranks, but placement has 64",
        ),
    ],
)
@pytest.mark.parametrize("function", [lplb.solve, lplb.balance])
def test_errors(function, place, options, error, message):
    first = LOAD if function is lplb.solve else np.zeros((4, 2), np.int32)
    with pytest.raises(error, match=message):
        jax.eval_shape(partial(function, placement=place, **options), first)


def test_errors_of_the_handler():
    """Partners that are no edge colouring, from callers who go past Python's checks."""
    log2phy = CUBE.log2phy
    results = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            (log2phy.shape, np.float32),
            ((8,), np.float32),
            ((1,), np.float32),
            ((1,), np.int32),
            ((1,), np.int32),
        ]
    ]
    call = jax.ffi.ffi_call("lplb_solve", results)
    pair = np.array([[1, 0, 3, 2, 5, 4, 7, 6]], np.int32)
    for partners, message in {
        "beyond": (pair + 1, "pairs of ranks"),
        "one-sided": (np.roll(pair, 1), "pairs of ranks"),
        "twice": (np.vstack([pair, pair]), "one colour"),
        "ragged": (pair[:, :7], r"\[colours, group_size\]"),
        "many": (np.tile(np.arange(8, dtype=np.int32), (17, 1)), r"\[colours, group_size\]"),
    }.values():
        with pytest.raises(Exception, match=message), jax.default_device(jax.devices("cpu")[0]):
            jax.block_until_ready(
                call(
                    LOAD,
                    log2phy,
                    num_physical=np.int64(CUBE.num_physical),
                    tol=np.float32(TOL),
                    threshold=np.float32(0),
                    max_iterations=np.int64(MAX_SWEEPS),
                    partners=partners.ravel(),
                )
            )
