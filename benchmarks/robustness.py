"""What every answer of `solve` promises, on 10,000 loads: `python benchmarks/robustness.py`.

Loads are log-normal, from mild to absurd, and of the kinds that upset solvers; placements are of every kind. Each
answer is checked: feasible, certified, within tolerance where its status says so, never worse than the even split (or,
with copies chosen for the load, than no copies), and no better than the optimum by SciPy's HiGHS. With `--speeds` it is
all about load / speed, of ranks that are not equally fast, some of them of speed 0. Ends with exit code 1 where any
answer breaks a promise.
"""

import argparse
import dataclasses
import multiprocessing
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import helpers

import jax_lplb as lplb
from jax_lplb import Status, _plan

EPS = float(np.finfo(np.float32).eps)
ROUNDING = 1e-6  # relative: what float32 sums of a rank's slots may lose
SOLVERS = ("ipm", "edge_balance", "plan")
MOST_PLACEMENTS = 64  # distinct ones of a random kind


class Case(NamedTuple):
    placements: list[lplb.Placement]  # instance i has placements[i % len(placements)]; or its copies are chosen for it
    loads: np.ndarray  # int32 [instances, num_experts]
    speeds: np.ndarray | None = None  # float32 [instances, num_ranks]

    def placement(self, i: int) -> lplb.Placement:
        return self.placements[i % len(self.placements)]

    def speed(self, i: int) -> np.ndarray | None:
        return None if self.speeds is None else self.speeds[i]


def two_rings(size: int) -> lplb.topology.Topology:
    """Two halves that can do nothing for each other."""
    ring = np.roll(np.arange(size), -1)
    return lplb.topology.from_r2o(np.concatenate([ring, ring + size])[:, None])


def fixed(topology: lplb.topology.Topology, redundants: int, num_experts: int = 256) -> Callable:
    return lambda rng: [helpers.placement(topology, num_experts, topology.group_size, redundants)]


def random(ranks: int, home: int, redundants: int) -> Callable:
    def placements(rng: np.random.Generator) -> list[lplb.Placement]:
        sizes = {"num_experts": ranks * home, "num_ranks": ranks, "redundants": redundants}
        drawn = [helpers.many_replicas(rng, **sizes) for _ in range(MOST_PLACEMENTS)]
        room = max(place.max_replicas for place in drawn)
        return [lplb.Placement.from_phy2log(place.phy2log, ranks, max_replicas=room) for place in drawn]

    return placements


def per_batch(ranks: int, redundants: int, **options: Any) -> Callable:
    sizes = {"num_experts": 256, "num_ranks": ranks, "redundants_per_rank": redundants}
    return lambda rng: [lplb.Placement.per_batch(**sizes, **options)]


PLACEMENTS = {
    "ring 8x1": fixed(lplb.topology.ring(8), 1),
    "cube 8x2": fixed(lplb.topology.cube(), 2),
    "two rings of 4": fixed(two_rings(4), 4),
    "hypercube 16x2": fixed(lplb.topology.hypercube(), 2),
    "torus 8x4 x2": fixed(lplb.topology.torus(8, 4), 2),
    "ring 32x1": fixed(lplb.topology.ring(32), 1),
    "ring 64x1": fixed(lplb.topology.ring(64), 1),
    "many 6r2s": random(6, 4, 2),
    "many 16r2s": random(16, 16, 2),
    "many 36r2s": random(36, 4, 2),
    "many 72r4s": random(72, 4, 4),
    "per batch 8x2": per_batch(8, 2),
    "per batch 16x1": per_batch(16, 1),
    "per batch 32x2, pairs": per_batch(32, 2, num_groups=2, max_replicas=2, max_sends=4),
    "per batch 64x2": per_batch(64, 2),
}


def log_normal(rng: np.random.Generator, experts: int, sigma: float) -> np.ndarray:
    popularity = rng.lognormal(0, sigma, experts)
    return rng.multinomial(rng.choice([4096, 32768, 10**6, 10**9]), popularity / popularity.sum())


def one_expert(rng: np.random.Generator, experts: int) -> np.ndarray:
    return np.where(np.arange(experts) == rng.integers(experts), rng.integers(1, 2**31 - 1), 0)


def one_rank(rng: np.random.Generator, experts: int) -> np.ndarray:
    neighbours = (np.arange(experts) - rng.integers(experts)) % experts < experts // 8
    return np.where(neighbours, rng.integers(1, 10**6, experts), 0)


def one_half(rng: np.random.Generator, experts: int) -> np.ndarray:
    loads = rng.integers(0, 1000, experts) * (np.arange(experts) < experts // 2)
    return loads if rng.random() < 0.5 else loads[::-1]


def mostly_zero(rng: np.random.Generator, experts: int) -> np.ndarray:
    return np.where(rng.random(experts) < 0.1, rng.integers(1, 1000, experts), 0)


def equal(rng: np.random.Generator, experts: int) -> np.ndarray:
    return np.full(experts, rng.choice([0, 1, 1000, (2**31 - 1) // experts]))


def tiny(rng: np.random.Generator, experts: int) -> np.ndarray:
    return rng.integers(0, 4, experts)


def two_sizes(rng: np.random.Generator, experts: int) -> np.ndarray:
    """1 and 1e8 tokens, side by side."""
    return np.where(rng.permutation(experts) < rng.integers(1, 21), 10**8, 1)


def wide(rng: np.random.Generator, experts: int) -> np.ndarray:
    loads = np.exp(rng.uniform(0, np.log(1e8), experts))
    return loads * min(1, 2e9 / loads.sum())


ADVERSARIAL = (one_expert, one_rank, one_half, mostly_zero, equal, tiny, two_sizes, wide)


def draw_loads(rng: np.random.Generator, experts: int, number: int) -> np.ndarray:
    """By turns log-normal, sigma 0.1 to 4, and adversarial."""
    sigmas = np.linspace(0.1, 4, (number + 1) // 2)
    kinds = [
        partial(log_normal, sigma=sigmas[i // 2]) if i % 2 == 0 else ADVERSARIAL[i // 2 % 8] for i in range(number)
    ]
    return np.stack([kind(rng, experts).astype(np.int32) for kind in kinds])


@partial(jax.jit, static_argnames=("place", "tol"))
def plan(
    loads: jax.Array, speeds: jax.Array | None, *, place: lplb.Placement, tol: float
) -> tuple[lplb.Placement, lplb.Solution]:
    """The copies that are chosen for each load, and its split over them."""

    def one(load: jax.Array, speed: jax.Array | None) -> tuple[lplb.Placement, lplb.Solution]:
        if speed is not None:
            chosen = place.choose(load, rank_speed=speed, implementation="ffi")
            return chosen, lplb.solve(load, chosen, rank_speed=speed, tol=tol, implementation="ffi")
        planned = _plan.plan(load, jnp.int32(0), place, tol, 0, "ffi")
        split = planned.fraction * jnp.maximum(load, 0).astype(jnp.float32)[:, None]
        chosen = dataclasses.replace(place, phy2log=planned.phy2log, log2phy=planned.log2phy)
        return chosen, lplb.Solution(split, planned.rank_load, planned.gap, planned.iterations, planned.status)

    return jax.vmap(one)(loads, speeds)


def plan_case(case: Case, tol: float) -> tuple[Case, lplb.Solution]:
    """All instances in one call, and the case with the copies that each of them got."""
    chosen, solution = jax.tree.map(np.asarray, plan(case.loads, case.speeds, place=case.placements[0], tol=tol))
    placements = [jax.tree.map(lambda leaf, i=i: leaf[i], chosen) for i in range(len(case.loads))]
    return case._replace(placements=placements), solution


@partial(jax.jit, static_argnames=("solver", "tol", "mapped"))
def solve(
    loads: jax.Array, placement: lplb.Placement, speeds: jax.Array | None, *, solver: str, tol: float, mapped: bool
) -> lplb.Solution:
    def run(load: jax.Array, placement: lplb.Placement, speed: jax.Array | None) -> lplb.Solution:
        return lplb.solve(load, placement, rank_speed=speed, solver=solver, tol=tol, implementation="ffi")

    return jax.vmap(run, in_axes=(0, 0 if mapped else None, 0))(loads, placement, speeds)


def solve_case(case: Case, solver: str, tol: float) -> lplb.Solution:
    """All instances in one call; placements that differ come in stacked."""
    number = len(case.loads)
    if len(case.placements) == 1:
        placement = case.placements[0]
    else:
        placement = jax.tree.map(lambda *leaves: np.stack(leaves), *[case.placement(i) for i in range(number)])
    solution = solve(case.loads, placement, case.speeds, solver=solver, tol=tol, mapped=len(case.placements) > 1)
    return jax.tree.map(np.asarray, solution)


def solvers_for(placement: lplb.Placement) -> tuple[str, ...]:
    if placement.planning is not None:
        return ("plan",)
    if placement.topology is not None and placement.group_size <= 32 and placement.max_replicas <= 2:
        return ("ipm", "edge_balance")
    return ("ipm",)


def optima(case: Case, pool: ProcessPoolExecutor) -> list[Future]:
    return [pool.submit(helpers.optimum, load, case.placement(i), case.speed(i)) for i, load in enumerate(case.loads)]


class Checked(NamedTuple):
    violations: dict[str, list[int]]  # instances, by the promise they break
    true_gap: np.ndarray  # [instances, num_groups]


def check(case: Case, solution: lplb.Solution, best: np.ndarray, tol: float) -> Checked:
    """What `solve` promises of any answer, given the optima [instances, num_groups]."""
    instances = range(len(case.loads))
    groups = case.placements[0].num_groups
    present = np.stack([helpers.usable(case.placement(i), case.speed(i)) for i in instances])
    load = np.maximum(case.loads.astype(np.float64), 0)
    split = np.where(np.isfinite(solution.split), solution.split, -1).astype(np.float64)

    loads = np.stack([helpers.rank_loads(split[i], case.placement(i)) for i in instances])
    # What none is worse than: the even split, or of copies chosen for the load none of them.
    at_home = case.placements[0].planning is not None and case.speeds is None
    parts = present & (np.arange(present.shape[2]) == 0) if at_home else present
    even_split = np.where(parts, (load / parts.sum(axis=2))[:, :, None], 0)
    even_loads = np.stack([helpers.rank_loads(even_split[i], case.placement(i)) for i in instances])
    by_group = loads.reshape(len(loads), groups, -1)
    mean = np.repeat(by_group.mean(axis=2), by_group.shape[2], axis=1)
    largest, even = (
        np.stack([helpers.most(of_ranks[i], case.placement(i), case.speed(i)) for i in instances])
        for of_ranks in (loads, even_loads)
    )
    true_gap = np.where(largest > 0, 1 - best / np.where(largest > 0, largest, 1), 0)
    converged = solution.status == Status.CONVERGED
    subnormal = present.shape[2] * float(np.finfo(np.float32).tiny)  # what XLA takes for 0
    promises = {
        "finite": [np.isfinite(leaf) for leaf in solution],
        "no negative split": [split >= 0],
        "nothing in padding": [(split == 0) | present],
        "a zero load has a split of exactly 0": [(split == 0) | (load > 0)[:, :, None]],
        "splits sum to the load": [
            np.abs(split.sum(axis=2) - load) <= EPS * (present.shape[2] + 4) * load + subnormal,
        ],
        "rank_load is that of the split": [np.abs(solution.rank_load - loads) <= ROUNDING * np.maximum(loads, mean)],
        "no better than the optimum": [true_gap >= -ROUNDING],
        "certified": [solution.gap >= true_gap - ROUNDING],
        "within tolerance, or the status says otherwise": [
            ~converged | ((solution.gap <= tol) & (true_gap <= tol + ROUNDING))
        ],
        # Running ranks may have no expert in common.
        "a known status": [
            (solution.status != Status.SKIPPED)
            | bool(case.placements[0].planning)
            | ((case.speeds is not None) & (solution.gap == 0))
        ],
        "never worse than the even split": [largest <= even * (1 + ROUNDING)],
    }
    violations = {}
    for promise, kept in promises.items():
        broken = np.zeros(len(case.loads), bool)
        for mask in kept:
            broken |= ~mask.reshape(len(broken), -1).all(axis=1)
        if broken.any():
            violations[promise] = np.flatnonzero(broken).tolist()
    return Checked(violations, true_gap)


def row(name: str, solver: str, case: Case, solution: lplb.Solution, checked: Checked, tol: float) -> dict[str, Any]:
    statuses = Counter(solution.status.ravel().tolist())
    return {
        "bench": "robustness",
        "case": name,
        "solver": solver,
        "tol": tol,
        "instances": len(case.loads),
        **{status.name.lower(): statuses[status] for status in Status},
        "worst_gap": float(f"{checked.true_gap.max():.3g}"),
        "certified": float(f"{solution.gap.max():.3g}"),
        "iterations": f"{np.median(solution.iterations):g}/{solution.iterations.max()}",
        "violations": sum(len(instances) for instances in checked.violations.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=["cpu", "gpu"], help="by default what JAX finds")
    parser.add_argument("--instances", type=int, default=10_000, help="in all, shared out evenly over the placements")
    parser.add_argument("--cases", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--speeds", action="store_true", help="ranks are not equally fast")
    parser.add_argument("--tol", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="for HiGHS")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/robustness.json"))
    args = parser.parse_args()
    if args.platform:
        jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[args.platform])

    number = -(-args.instances // len(args.cases))
    cases = {}
    for name in args.cases:
        rng = np.random.default_rng([args.seed, list(PLACEMENTS).index(name)])
        placements = PLACEMENTS[name](rng)
        loads = draw_loads(rng, placements[0].num_experts, number)
        speeds = helpers.draw_speeds(rng, placements[0], number) if args.speeds else None
        cases[name] = Case(placements, loads, speeds)

    rows, failed = [], False
    # Spawned, because JAX has threads; HiGHS works on while the device solves.
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        planned = {name: plan_case(case, args.tol) for name, case in cases.items() if case.placements[0].planning}
        cases |= {name: case for name, (case, _) in planned.items()}
        pending = {name: optima(case, pool) for name, case in cases.items()}
        for name, case in cases.items():
            solutions = {
                solver: planned[name][1] if solver == "plan" else solve_case(case, solver, args.tol)
                for solver in solvers_for(case.placements[0])
                if solver in args.solvers
            }
            best = np.stack([future.result() for future in pending[name]])
            for solver, solution in solutions.items():
                checked = check(case, solution, best, args.tol)
                rows.append(row(name, solver, case, solution, checked, args.tol))
                print(f"{name}, {solver}: {number} instances, {rows[-1]['violations']} violations", flush=True)
                for promise, instances in checked.violations.items():
                    failed = True
                    print(f"  broken: {promise}: {len(instances)} instances, the first {instances[:5]}", flush=True)
    device = common.cpu_name() if jax.default_backend() == "cpu" else None
    common.write(args.out, rows, device)
    print(f"{number * len(cases)} loads, {number * len(rows)} answers")
    if failed:
        sys.exit("some answers break promises")


if __name__ == "__main__":
    main()
