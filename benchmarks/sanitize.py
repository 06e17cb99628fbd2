"""Every kernel under compute-sanitizer: `python benchmarks/sanitize.py build/bench/lplb_bench`.

Memcheck and racecheck over placements that reach every instance of the kernels; the driver compares all results with
the CPU's at the same time. Ends with exit code 1 at the first finding.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import common
import kernels
import numpy as np
from common import helpers

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def problems() -> dict:
    rng = np.random.default_rng(0)
    topology = helpers.topology
    place, many, everywhere = helpers.placement, helpers.many_replicas, helpers.everywhere
    return {
        "ring 8x1": (place(topology.ring(8), 256, 8, 1), 500),
        "cube 8x2, eight groups": (place(topology.cube(), 256, 64, 4), 130),
        "hypercube 16x2": (place(topology.hypercube(), 64, 16, 2), 1),
        "torus 8x4 x2": (place(topology.torus(8, 4), 256, 32, 2), 400),
        "ring 64x1": (place(topology.ring(64), 64, 64, 1), 131),
        "ring 128x1": (place(topology.ring(128), 128, 128, 1), 10),
        "ring 128x8, full": (place(topology.ring(128), 1024, 128, 8), 10),
        "many 6 ranks": (many(rng, num_experts=12, num_ranks=6, redundants=2), 77),
        "many 16 ranks": (many(rng, num_experts=256, num_ranks=16, redundants=2), 33),
        "many 30 ranks": (many(rng, num_experts=60, num_ranks=30, redundants=3), 33),
        "many 60 ranks": (many(rng, num_experts=120, num_ranks=60, redundants=3), 33),
        "many 72 ranks": (many(rng, num_experts=288, num_ranks=72, redundants=4), 33),
        "an expert on 64 ranks": (everywhere(64), 33),
        # Two kernels that count; several passes over a chunk, with and without room for all shares in shared memory.
        "4096 experts": (place(topology.cube(), 4096, 64, 2), 700),
        "2048 experts": (place(topology.cube(), 2048, 32, 2), 700),
        # Too many ids for one cluster, and chunks of which a thread takes several ids.
        "many ids": (place(topology.ring(8), 64, 8, 1), 20_000),
        "many ids and replicas": (everywhere(8), 20_000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("driver", help="lplb_bench")
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=["memcheck", "racecheck"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problem = pathlib.Path(folder, "problem")
        for name, (placement, tokens) in problems().items():
            loads, ids = common.instances(tokens, placement.num_ranks, placement.num_experts)
            ids[-1, ::3] = -1
            kernels.write_problem(problem, placement, loads[::60], ids[::60])
            for tool in (None, *args.tools):
                prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] if tool else []
                try:
                    kernels.run([*prefix, args.driver], problem, placement, repeats=0)
                except subprocess.CalledProcessError as error:
                    print(error.stdout)
                    sys.exit(f"{name}: {tool or 'check'} failed")
            print(f"{name}: results equal the CPU's; clean under {', '.join(args.tools) or 'no tool'}", flush=True)


if __name__ == "__main__":
    main()
