"""The balancer beside large matrix products on one GPU: `python benchmarks/coexistence.py build/bench/lplb_coexist`.

Two streams of equal priority, without Python or JAX (`make bench-build`): a chain of bf16 products by cuBLAS in one;
count, solve and assign in the other.

1. Room for others: the time of a product alone and beside the balancer, and that of a call of the balancer alone and
   beside products, for several limits of its thread blocks (`num_sms`), with products planned for the whole GPU and for
   the multiprocessors that the limit leaves. The balancer runs back to back, as the worst neighbour, or once for each
   product. Baselines take turns with what they are compared with.
2. Determinism: 1,000 repetitions of several problems while products keep the GPU busy; all results
   are compared with those of the first, on an idle GPU. Ends with exit code 1 where a bit differs.
"""

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import common
import kernels
import numpy as np


def find_cublas() -> str:
    """The one of NVIDIA's wheels, which JAX brings, or the system's."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for part in ("cu13/lib", "cublas/lib"):
            for path in sorted(pathlib.Path(folder, part).glob("libcublas.so.1?")):
                return str(path)
    return "libcublas.so.13"


def run(command: list[Any]) -> Iterator[dict[str, Any]]:
    """Reports of the driver, as they come."""
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        sys.exit(f"{command[0]} {command[1]} failed")


def prefixed(prefix: str, times_us: list[float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in common.statistics(times_us).items()} if times_us else {}


def room(command: list[Any], case: str, tokens: int) -> Iterator[dict[str, Any]]:
    for report in run(command):
        alone, beside = np.median(report["matmul_alone_us"]), np.median(report["matmul_beside_us"])
        row = {
            "bench": "coexistence",
            "case": case,
            "tokens": tokens,
            "num_sms": report["num_sms"] or "none",
            "matmul_sms": report["matmul_sms"],
            "pace": report["pace"],
            "slowdown": round(float(beside / alone), 4),
        }
        for name in ("matmul_alone", "matmul_beside", "balance_alone", "balance_beside"):
            row |= prefixed(name, report[f"{name}_us"])
        limit = f"num_sms {row['num_sms']}, matmul on {row['matmul_sms']}, {row['pace']}"
        print(f"{limit}: matmul {alone:.0f} -> {beside:.0f} us", flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("driver", help="lplb_coexist")
    parser.add_argument("--cublas", default=find_cublas(), help="libcublas.so (default: %(default)s)")
    parser.add_argument("--matmul", type=int, default=8192, help="order of the products beside which room is measured")
    parser.add_argument("--num-sms", type=int, nargs="+", default=[0, 8, 16, 32, 64], help="0: none given")
    parser.add_argument("--case", choices=common.CASES, default="8x2", help="of room")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="of room, of a rank, top-8")
    parser.add_argument("--cases", nargs="*", choices=common.CASES, default=list(common.CASES), help="of determinism")
    parser.add_argument("--busy-matmul", type=int, default=2048, help="order of the products during determinism")
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/coexistence.json"))
    args = parser.parse_args()

    rows, different = [], 0
    with tempfile.TemporaryDirectory() as folder:
        problem = pathlib.Path(folder, "problem")

        def write(case: str, tokens: int, number: int) -> None:
            placement = common.CASES[case]()
            loads, ids = common.instances(tokens, placement.num_ranks, placement.num_experts, number)
            kernels.write_problem(problem, placement, loads, ids)

        for tokens in args.tokens:
            write(args.case, tokens, 3)  # the driver takes the middle one
            rows += room([args.driver, "room", problem, args.cublas, args.matmul, *args.num_sms], args.case, tokens)
        for case in args.cases:
            write(case, 4096, 2)  # the mildest and the most skewed loads
            for report in run([args.driver, "same", problem, args.cublas, args.busy_matmul, args.repetitions]):
                rows.append({"bench": "determinism", "case": case, "tokens": 4096, **report})
                different += report["different_words"]
                print(
                    f"{case}: {report['repetitions']} repetitions of {report['solves']} solves beside "
                    f"{report['matmuls']} products: {report['different_words']} words differ",
                    flush=True,
                )
    common.write(args.out, rows)
    if different:
        sys.exit("repetitions differ")


if __name__ == "__main__":
    main()
