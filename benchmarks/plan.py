"""Device time with copies chosen per batch: `python benchmarks/plan.py build/bench/lplb_bench`.

As benchmarks/kernels.py, which has the instances and the driver; beside the times, what the plans are worth: imbalance
of the split that was found, and the number of copies.
"""

import argparse
import pathlib
import tempfile

import common
import kernels
import numpy as np

import jax_lplb as lplb

CASES = [f"{ranks}x{redundants}" for redundants in (2, 1) for ranks in (8, 16, 32, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("driver", help="lplb_bench")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="tokens of a rank, top-8")
    parser.add_argument("--cases", nargs="+", default=CASES, help="ranks x slots for copies on each")
    parser.add_argument("--repeats", type=int, default=20, help="launches in a graph; 0: no times")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/plan.json"))
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            ranks, redundants = map(int, case.split("x"))
            placement = lplb.Placement.per_batch(
                num_experts=common.NUM_EXPERTS, num_ranks=ranks, redundants_per_rank=redundants
            )
            for tokens in args.tokens:
                loads, ids = common.instances(tokens, ranks, common.NUM_EXPERTS)
                problem = pathlib.Path(folder, "problem")
                kernels.write_problem(problem, placement, loads, ids)
                report, _ = kernels.run([args.driver], problem, placement, args.repeats)
                solved = report["solvers"]["plan"]
                where = {"case": case, "tokens": tokens}
                worth = {
                    "imbalance_median": round(float(np.median(solved["imbalance"])), 4),
                    "imbalance_p95": round(float(np.percentile(solved["imbalance"], 95)), 4),
                    "imbalance_worst": round(max(solved["imbalance"]), 4),
                    "copies_median": float(np.median(solved["copies"])),
                    "certified": float(f"{max(solved['gap']):.3g}"),
                    "by_plan_alone": sum(iterations == 0 for iterations in solved["iterations"]),
                    "converged": sum(
                        status in (lplb.Status.CONVERGED, lplb.Status.SKIPPED) for status in solved["status"]
                    ),
                }
                rows.append({"bench": "plan", **where, "kernel": "plan + solve", **times(solved["solve_us"]), **worth})
                rows.append({"bench": "plan", **where, "kernel": "plan", **times(solved["plan_us"])})
                for kernel in ("count", "shares", "assign", "shares_local", "assign_local"):
                    rows.append({"bench": kernel, **where, "kernel": kernel, **times(report[f"{kernel}_us"])})
                for kernel in ("all", "all_local"):
                    row = {"bench": "balance", **where, "mode": "per_batch", "kernel": kernel}
                    rows.append({**row, **times(solved[f"{kernel}_us"])})
                print(f"{case}, {tokens} tokens", flush=True)
    common.write(args.out, rows)


def times(times_us: list[float]) -> dict[str, float]:
    return common.statistics(times_us) if times_us else {}


if __name__ == "__main__":
    main()
