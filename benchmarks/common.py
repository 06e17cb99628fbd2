"""What the benchmarks share: cases, instances, statistics, and results with the device they were measured on."""

import datetime
import json
import pathlib
import shlex
import subprocess
import sys
from typing import Any

import jax
import numpy as np

import jax_lplb as lplb

NUM_EXPERTS = 256
TOP_K = 8
NUM_INSTANCES = 64

# Ranks x redundant experts a rank.
CASES = {
    "8x1": lambda: _placement(lplb.topology.ring(8), 1),
    "8x2": lambda: _placement(lplb.topology.cube(), 2),
    "16x2": lambda: _placement(lplb.topology.hypercube(), 2),
    "32x2": lambda: _placement(lplb.topology.torus(8, 4), 2),
    "64x1": lambda: _placement(lplb.topology.ring(64), 1),
}


def _placement(topology: lplb.topology.Topology, redundants: int) -> lplb.Placement:
    return lplb.Placement.from_topology(
        topology, num_experts=NUM_EXPERTS, num_ranks=topology.group_size, redundants_per_rank=redundants
    )


def instances(num_tokens: int, num_ranks: int, num_experts: int = NUM_EXPERTS) -> tuple[np.ndarray, np.ndarray]:
    """Loads of all ranks, int32 [64, num_experts], and one rank's ids, int32 [64, num_tokens, 8].

    Experts have log-normal popularity, sigma 0.3 to 1.5 over the instances; a token picks 8 different ones.
    """
    rng = np.random.default_rng(0)
    loads, ids = [], []
    for sigma in np.linspace(0.3, 1.5, NUM_INSTANCES):
        logits = rng.normal(0, sigma, num_experts)
        popularity = np.exp(logits)
        total = num_tokens * TOP_K * num_ranks
        loads.append(np.rint(popularity / popularity.sum() * total))
        picks = logits + rng.gumbel(size=(num_tokens, num_experts))
        ids.append(np.argpartition(-picks, TOP_K, axis=1)[:, :TOP_K])
    return np.asarray(loads, np.int32), np.asarray(ids, np.int32)


def statistics(times_us: Any) -> dict[str, float]:
    return {
        "median_us": round(float(np.median(times_us)), 3),
        "p99_us": round(float(np.percentile(times_us, 99)), 3),
    }


def write(path: pathlib.Path, rows: list[dict[str, Any]], device: str | None = None) -> None:
    """Writes rows with what they were measured on, and prints them."""
    results = {
        **_machine(device),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"{results['device']}, driver {results['driver']}, CUDA {results['cuda']}, jax {results['jax']}")
    print("  ".join(f"{column:>12}" for column in columns))
    for row in rows:
        print("  ".join(f"{row.get(column, ''):>12}" for column in columns))


def _machine(device: str | None) -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    name, driver = gpus[0].split(", ")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "device": device or name,
        "driver": driver,
        "cuda": version.split("release ")[1].split(",")[0],
    }
