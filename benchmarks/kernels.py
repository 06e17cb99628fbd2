"""Device time of each kernel alone, in CUDA graphs: `python benchmarks/kernels.py build/bench/lplb_bench`.

Runs the framework-free driver (`make bench-build`) on 64 log-normal instances of each case. The driver first compares
every kernel's results with the CPU's; the true gap of every solve is checked here, against SciPy's HiGHS.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import common
import numpy as np
from common import helpers

import jax_lplb as lplb
from jax_lplb import _edge_balance, _plan
from jax_lplb._count import chunking

TOL = 1e-4


def write_problem(
    path: pathlib.Path, placement: lplb.Placement, loads: np.ndarray, ids: np.ndarray, tol: float = TOL
) -> None:
    """The file that ffi/bench.cu reads."""
    ids = ids.reshape(len(loads), -1)
    partners = [] if _edge_balance.why_not(placement) else _edge_balance.colouring(placement.topology)
    header = [
        len(loads),
        ids.shape[1],
        placement.num_experts,
        placement.num_physical,
        placement.max_replicas,
        placement.num_ranks,
        placement.num_groups,
        *chunking(ids.shape[1], placement.num_experts),
        len(partners),
        0 if placement.planning is None else len(_plan.candidates(placement.planning.slack)[0]),
    ]
    plan = []
    if placement.planning is not None:
        slacks, rules = _plan.candidates(placement.planning.slack)
        plan = [([placement.planning.slack], np.float32), (slacks, np.float32), (rules, np.int32)]
    with path.open("wb") as file:
        for part, dtype in (
            (header, np.int32),
            ([tol], np.float32),
            (partners, np.int32),
            *plan,
            (placement.log2phy, np.int32),
            (loads, np.int32),
            (ids, np.int32),
        ):
            file.write(np.ascontiguousarray(part, dtype).tobytes())


def run(
    driver: list[str], problem: pathlib.Path, placement: lplb.Placement, repeats: int
) -> tuple[dict, dict[str, np.ndarray]]:
    """The driver's report, and the fractions of its solves, [instances, num_experts, max_replicas] for each solver."""
    fractions = problem.with_suffix(".fractions")
    output = subprocess.run([*driver, problem, fractions, str(repeats)], stdout=subprocess.PIPE, text=True, check=True)
    lines = [line for line in output.stdout.splitlines() if line.startswith("{")]
    report = json.loads(lines[-1])
    shape = (-1, len(report["solvers"]), placement.num_experts, placement.max_replicas)
    of_solvers = np.fromfile(fractions, np.float32).reshape(shape).swapaxes(0, 1)
    return report, dict(zip(report["solvers"], of_solvers, strict=True))


def worst_gap(placement: lplb.Placement, loads: np.ndarray, fractions: np.ndarray) -> float:
    """Largest relative distance of a group's largest rank load to its optimum."""
    worst = 0.0
    for load, fraction in zip(loads, fractions, strict=True):
        ranks = helpers.rank_loads(fraction * load[:, None].astype(np.float64), placement)
        largest = ranks.reshape(placement.num_groups, -1).max(axis=1)
        worst = max(worst, float(np.max((largest - helpers.optimum(load, placement)) / largest)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("driver", help="lplb_bench")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="tokens of a rank, top-8")
    parser.add_argument("--cases", nargs="+", choices=common.CASES, default=list(common.CASES))
    parser.add_argument("--repeats", type=int, default=20, help="launches in a graph")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/kernels.json"))
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            placement = common.CASES[case]()
            for tokens in args.tokens:
                loads, ids = common.instances(tokens, placement.num_ranks, placement.num_experts)
                problem = pathlib.Path(folder, "problem")
                write_problem(problem, placement, loads, ids)
                report, fractions = run([args.driver], problem, placement, args.repeats)
                where = {"case": case, "tokens": tokens}
                for kernel in ("empty", "count", "shares", "assign", "shares_local", "assign_local"):
                    rows.append(
                        {"bench": kernel, **where, "kernel": kernel, **common.statistics(report[f"{kernel}_us"])}
                    )
                for solver, solved in report["solvers"].items():
                    rows.append(
                        {
                            "bench": "solve",
                            **where,
                            "kernel": solver,
                            **common.statistics(solved["solve_us"]),
                            "tol": TOL,
                            "worst_gap": float(f"{worst_gap(placement, loads, fractions[solver]):.3g}"),
                            "certified": float(f"{max(solved['gap']):.3g}"),
                            "iterations": f"{np.median(solved['iterations']):g}/{max(solved['iterations'])}",
                            "converged": solved["status"].count(lplb.Status.CONVERGED),
                        }
                    )
                    for name in ("all", "all_local"):
                        all_three = common.statistics(solved[f"{name}_us"])
                        rows.append({"bench": "balance", **where, "kernel": f"{name}, {solver}", **all_three})
                print(f"{case}, {tokens} tokens", flush=True)
    common.write(args.out, rows)


if __name__ == "__main__":
    main()
