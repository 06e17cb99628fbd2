"""References in NumPy and SciPy, and inputs, that several tests share."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse

import jax_lplb as lplb
from jax_lplb import _ffi, _handover

topology = lplb.topology
EPS = float(np.finfo(np.float32).eps)
ROUNDING = 1e-6  # relative: what float32 sums of a rank's slots may lose
TOL = 1e-4  # of `solve`, by default


def placement(topo: lplb.topology.Topology, num_experts: int, num_ranks: int, redundants: int) -> lplb.Placement:
    return lplb.Placement.from_topology(
        topo, num_experts=num_experts, num_ranks=num_ranks, redundants_per_rank=redundants
    )


@lru_cache
def configurations() -> dict[str, lplb.Placement]:
    """LPLB's own configurations, and one placement of each other kind."""
    rng = np.random.default_rng(0)
    return {
        "ring 8x1": placement(topology.ring(8), 256, 8, 1),
        "cube 8x2": placement(topology.cube(), 256, 8, 2),
        "cube EP32 x2": placement(topology.cube(), 256, 32, 2),
        "cube EP32 x4": placement(topology.cube(), 256, 32, 4),
        "cube EP64 x2": placement(topology.cube(), 256, 64, 2),
        "cube EP64 x4": placement(topology.cube(), 256, 64, 4),
        "ring 32x1": placement(topology.ring(32), 256, 32, 1),
        "hypercube 16x2": placement(topology.hypercube(), 256, 16, 2),
        "torus 8x4 x2": placement(topology.torus(8, 4), 256, 32, 2),
        "ring 64x1": placement(topology.ring(64), 256, 64, 1),
        "many 16 ranks": many_replicas(rng, num_experts=256, num_ranks=16, redundants=2),
        "many 72 ranks": many_replicas(rng, num_experts=288, num_ranks=72, redundants=4),
    }


def many_replicas(rng: np.random.Generator, *, num_experts: int, num_ranks: int, redundants: int) -> lplb.Placement:
    """A random placement: experts at home in order, and copies of hot ones wherever they are not yet."""
    home = np.arange(num_experts).reshape(num_ranks, -1)
    popularity = rng.lognormal(0, 1.5, num_experts)
    slots = []
    for own in home:
        others = np.setdiff1d(np.arange(num_experts), own)
        weight = popularity[others] / popularity[others].sum()
        slots.append(np.concatenate([own, rng.choice(others, redundants, replace=False, p=weight)]))
    return lplb.Placement.from_phy2log(np.concatenate(slots), num_ranks, num_experts=num_experts)


def everywhere(num_ranks: int) -> lplb.Placement:
    """Expert 0 on every rank, each beside one expert that is at home there."""
    slots = np.stack([np.arange(1, num_ranks + 1), np.zeros(num_ranks, int)], axis=1)
    return lplb.Placement.from_phy2log(slots.ravel(), num_ranks)


def optimum(load: np.ndarray, place: lplb.Placement, speed: np.ndarray | None = None) -> np.ndarray:
    """Smallest possible largest rank load of each group, or load / speed, float64 [num_groups], by SciPy's HiGHS."""
    slots, size = place.slots_per_rank, place.group_size
    there, speed = usable(place, speed), scaled_speed(speed, place)
    phy2log, log2phy = np.asarray(place.phy2log), np.asarray(place.log2phy)
    load = np.maximum(np.asarray(load, np.float64), 0)
    result = []
    for group in range(place.num_groups):
        own = np.unique(phy2log[group * size * slots : (group + 1) * size * slots])
        own = own[own >= 0]  # a slot may hold nothing
        of_rank = speed[group * size : (group + 1) * size]
        own = own[np.any(there[own] & (speed[log2phy[own] // slots] > 0), axis=1)]  # others count for nothing
        total = load[own].sum()
        if total == 0:
            result.append(0.0)
            continue
        # One variable for each replica, in units in which the mean rank load is 1, and the largest rank load last.
        scale = size / total
        expert, replica = np.nonzero(there[own])
        rank = log2phy[own][expert, replica] // slots - group * size
        count = len(expert)
        on_rank = scipy.sparse.csr_array((np.ones(count), (rank, np.arange(count))), shape=(size, count + 1))
        largest = scipy.sparse.csr_array((-of_rank, (np.arange(size), np.full(size, count))))
        of_expert = scipy.sparse.csr_array((np.ones(count), (expert, np.arange(count))), shape=(len(own), count + 1))
        solution = scipy.optimize.linprog(
            np.r_[np.zeros(count), 1.0],
            A_ub=on_rank + largest,
            b_ub=np.zeros(size),
            A_eq=of_expert,
            b_eq=load[own] * scale,
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        assert solution.status == 0, solution.message
        result.append(solution.fun / scale)
    return np.array(result)


def scaled_speed(speed: np.ndarray | None, place: lplb.Placement) -> np.ndarray:
    """Speeds of mean 1 within each group; what is less than 1/256 of the group's fastest is 0. None: all equal."""
    speed = np.ones(place.num_ranks) if speed is None else speed
    speed = np.asarray(speed, np.float64).reshape(place.num_groups, -1)
    speed = np.where(speed < speed.max(axis=1, keepdims=True) / 256, 0, speed)
    return (speed / speed.mean(axis=1, keepdims=True)).ravel()


def usable(place: lplb.Placement, speed: np.ndarray | None) -> np.ndarray:
    """Mask [num_experts, max_replicas] of replicas on ranks that are not of speed 0; all where there are no such."""
    log2phy = np.asarray(place.log2phy)
    there = log2phy >= 0
    runs = there & (scaled_speed(speed, place)[log2phy // place.slots_per_rank] > 0)
    return np.where(runs.any(axis=1, keepdims=True), runs, there)


def draw_speeds(rng: np.random.Generator, place: lplb.Placement, number: int) -> np.ndarray:
    """float32 [number, num_ranks]: from nearly equal to 1 : 15; in every other row ranks of speed 0, or nearly so."""
    spread = rng.choice([0.1, 0.4, 1.35], (number, 1))
    speed = 1000 * np.exp(rng.uniform(-spread, spread, (number, place.num_ranks)))
    stopped = (rng.random(speed.shape) < 0.25) & (np.arange(number)[:, None] % 2 == 1)
    stopped[:, :: place.group_size] = False  # not all of a group
    return np.where(stopped, speed * rng.choice([0, 1e-4], speed.shape), speed).astype(np.float32)


def rank_loads(split: np.ndarray, place: lplb.Placement) -> np.ndarray:
    """Load of each rank, float64 [num_ranks], of a split [num_experts, max_replicas]."""
    present = place.log2phy >= 0
    return np.bincount(
        place.log2phy[present] // place.slots_per_rank,
        np.asarray(split, np.float64)[present],
        minlength=place.num_ranks,
    )


def skewed_ids(
    rng: np.random.Generator, num_tokens: int, top_k: int, num_experts: int, sigma: float = 1.0
) -> np.ndarray:
    """int32 [num_tokens, top_k], k different experts a token, of log-normal popularity (Gumbel's top-k trick)."""
    popularity = rng.normal(0, sigma, num_experts) + rng.gumbel(size=(num_tokens, num_experts))
    return np.argpartition(-popularity, top_k, axis=1)[:, :top_k].astype(np.int32)


def new_python(script: str, **environment: str) -> str:
    """What a script prints in a Python of its own, where JAX sees a CPU only."""
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def check_groups_are_independent(solve: Callable[..., lplb.Solution], rng: np.random.Generator) -> None:
    """A group's answer is that of its ranks alone, bit for bit; solve(load, placement, implementation)."""
    place, alone = configurations()["cube EP32 x2"], placement(topology.cube(), 64, 8, 2)
    load = random_loads(rng, 256, 1)[0]
    together = solve(load, place, "ffi")
    for group in range(4):
        single = solve(load[group * 64 : (group + 1) * 64], alone, "ffi")
        np.testing.assert_array_equal(together.split[group * 64 : (group + 1) * 64], single.split)
        np.testing.assert_array_equal(together.rank_load[group * 8 : (group + 1) * 8], single.rank_load)
        assert together.gap[group] == single.gap[0]
        assert together.iterations[group] == single.iterations[0]


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


def most(loads: np.ndarray, place: lplb.Placement, speed: np.ndarray | None = None) -> np.ndarray:
    """Largest rank load of each group, or load / speed, of ranks that are not of speed 0."""
    speed = scaled_speed(speed, place)
    return np.where(speed > 0, loads / np.where(speed > 0, speed, 1), 0).reshape(place.num_groups, -1).max(axis=1)


def check(
    load: np.ndarray,
    place: lplb.Placement,
    solution: lplb.Solution,
    best: np.ndarray,
    tol: float = TOL,
    *,
    max_iterations: int,
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
    assert (solution.gap[solution.status == lplb.Status.CONVERGED] <= tol).all()
    assert (solution.iterations >= 0).all()
    assert (solution.iterations <= max_iterations).all()
    even = np.where(present, (load / present.sum(axis=1))[:, None], 0)
    assert (most(loads, place) <= most(rank_loads(even, place), place) * (1 + ROUNDING)).all()
    return true_gap


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


def assert_same_bits(one, two) -> None:
    one, two = np.asarray(one), np.asarray(two)
    assert one.dtype == two.dtype
    np.testing.assert_array_equal(one.view(np.uint8), two.view(np.uint8))


def saves_collectives(primitive, *_, **__):
    return "all_gather" in primitive.name or "psum" in primitive.name


def several_processes(monkeypatch, why_not):
    """As if a GPU of each of two processes came to this verdict."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(_ffi, "_PLATFORMS", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_handover, "why_out_of_reach", why_not)


def late(value: jax.Array, turns: jax.Array) -> jax.Array:
    """The integers, once a loop has turned as often, after they were there."""
    turns, value = jax.lax.optimization_barrier((turns, value))
    last = jax.lax.fori_loop(0, turns, lambda _, x: x * jnp.uint32(1664525) + jnp.uint32(1013904223), jnp.uint32(1))
    return value + (last == 0).astype(value.dtype)


def turns(mesh: jax.sharding.Mesh) -> int:
    """Of a loop, in about a hundredth of a second."""
    return 8000 if mesh.devices.flat[0].platform == "cpu" else 500


def without_waiting(real):
    """`gather` of markers that waits for nobody."""

    def run(words, axis_name):
        if words.shape:  # addresses, or counts
            return real(words, axis_name)
        return jnp.broadcast_to(words, (jax.lax.axis_size(axis_name), *words.shape))

    return run
