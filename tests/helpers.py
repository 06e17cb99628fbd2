"""References in NumPy and SciPy, and inputs, that several tests share."""

import os
import subprocess
import sys
from functools import lru_cache

import numpy as np
import scipy.optimize
import scipy.sparse

import jax_lplb as lplb

topology = lplb.topology


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


def optimum(load: np.ndarray, place: lplb.Placement) -> np.ndarray:
    """Smallest possible largest rank load of each group, float64 [num_groups], by SciPy's HiGHS."""
    slots, size = place.slots_per_rank, place.group_size
    phy2log, log2phy = np.asarray(place.phy2log), np.asarray(place.log2phy)
    load = np.maximum(np.asarray(load, np.float64), 0)
    result = []
    for group in range(place.num_groups):
        own = np.unique(phy2log[group * size * slots : (group + 1) * size * slots])
        total = load[own].sum()
        if total == 0:
            result.append(0.0)
            continue
        # One variable for each replica, in units in which the mean rank load is 1, and the largest rank load last.
        scale = size / total
        expert, replica = np.nonzero(log2phy[own] >= 0)
        rank = log2phy[own][expert, replica] // slots - group * size
        count = len(expert)
        on_rank = scipy.sparse.csr_array((np.ones(count), (rank, np.arange(count))), shape=(size, count + 1))
        largest = scipy.sparse.csr_array((np.full(size, -1.0), (np.arange(size), np.full(size, count))))
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
