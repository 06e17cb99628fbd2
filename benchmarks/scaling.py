"""Device time against size: `python benchmarks/scaling.py build/bench/lplb_bench`, drawn by benchmarks/plot.py.

From a base of 8 ranks (the cube), 256 experts, 2 redundant experts a rank and 4,096 tokens a rank, top-8, one axis at a
time: ranks of one group (tori), experts, tokens, and groups (cubes side by side; 1,024 experts, so that 256 ranks have
4 each). Times are those of CUDA graphs of the framework-free driver (`make bench-build`).
"""

import argparse
import pathlib
import tempfile
import time
from typing import Any

import common
import kernels
import numpy as np

import jax_lplb as lplb

TORI = {4: (2, 2), 8: (4, 2), 16: (4, 4), 32: (8, 4), 64: (8, 8), 128: (16, 8)}
AXES = {
    "ranks": list(TORI),
    "experts": [64, 128, 256, 512, 1024],
    "tokens": [2**10, 2**12, 2**14, 2**16, 2**18, 2**20],
    "groups": [1, 2, 4, 8, 16, 32],
}
# Of the driver's report; a solver that does not apply to a placement reports no times.
MOST_IDS = 2**25  # of all instances of a problem: 128 MiB


def point(axis: str, size: int) -> tuple[lplb.Placement, int]:
    """Placement, and tokens of a rank."""
    cube, tokens, ranks, experts = lplb.topology.cube(), 4096, 8, common.NUM_EXPERTS
    topology = lplb.topology.torus(*TORI[size]) if axis == "ranks" else cube
    if axis == "ranks":
        ranks = size
    elif axis == "experts":
        experts = size
    elif axis == "tokens":
        tokens = size
    elif axis == "groups":
        ranks, experts = 8 * size, 1024
    placement = lplb.Placement.from_topology(
        topology, num_experts=experts, num_ranks=ranks, redundants_per_rank=topology.num_columns
    )
    return placement, tokens


def instances(number: int, num_tokens: int, num_ranks: int, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """As common.instances, but ids are drawn one by one: a million tokens would take minutes otherwise."""
    rng = np.random.default_rng(0)
    loads, ids = [], []
    for sigma in np.linspace(0.3, 1.5, number):
        popularity = np.exp(rng.normal(0, sigma, num_experts))
        popularity /= popularity.sum()
        loads.append(np.rint(popularity * num_tokens * common.TOP_K * num_ranks))
        ids.append(np.searchsorted(np.cumsum(popularity)[:-1], rng.random(num_tokens * common.TOP_K, np.float32)))
    return np.asarray(loads, np.int32), np.asarray(ids, np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("driver", help="lplb_bench")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--instances", type=int, default=32, help="at most, of a point")
    parser.add_argument("--repeats", type=int, default=20, help="launches in a graph")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/scaling.json"))
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        problem = pathlib.Path(folder, "problem")
        for axis in args.axes:
            for size in AXES[axis]:
                begin = time.perf_counter()
                placement, tokens = point(axis, size)
                number = min(args.instances, MOST_IDS // (tokens * common.TOP_K))
                loads, ids = instances(number, tokens, placement.num_ranks, placement.num_experts)
                kernels.write_problem(problem, placement, loads, ids)
                report, _ = kernels.run([args.driver], problem, placement, args.repeats)
                where = {
                    "bench": "scaling",
                    "axis": axis,
                    "size": size,
                    "ranks": placement.num_ranks,
                    "groups": placement.num_groups,
                    "experts": placement.num_experts,
                    "tokens": tokens,
                    "instances": number,
                }
                times = {kernel: report[f"{kernel}_us"] for kernel in ("count", "assign")}
                for solver, solved in report["solvers"].items():
                    times |= {solver: solved["solve_us"], f"all, {solver}": solved["all_us"]}
                rows += [{**where, "kernel": kernel, **common.statistics(us)} for kernel, us in times.items()]
                print(f"{axis} {size}: {time.perf_counter() - begin:.1f} s", flush=True)
    common.write(args.out, rows)


if __name__ == "__main__":
    main()
