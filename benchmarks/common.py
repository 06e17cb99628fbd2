"""What the benchmarks share: cases, instances, statistics, and results with the device they were measured on."""

import datetime
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import numpy as np

import jax_lplb as lplb

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
import helpers

NUM_EXPERTS = 256
TOP_K = 8
NUM_INSTANCES = 64

# Ranks x redundant experts a rank; and 72 ranks of 4 home and 4 redundant slots, with up to 22 replicas of an expert.
CASES = {
    "8x1": lambda: _placement(lplb.topology.ring(8), 1),
    "8x2": lambda: _placement(lplb.topology.cube(), 2),
    "16x2": lambda: _placement(lplb.topology.hypercube(), 2),
    "32x2": lambda: _placement(lplb.topology.torus(8, 4), 2),
    "64x1": lambda: _placement(lplb.topology.ring(64), 1),
    "128x1": lambda: _placement(lplb.topology.ring(128), 1),
    "72r4s": lambda: helpers.many_replicas(np.random.default_rng(72), num_experts=288, num_ranks=72, redundants=4),
}


def topology_of(num_ranks: int) -> lplb.topology.Topology:
    """Of all GPUs of one host."""
    special = {8: lplb.topology.cube, 4: partial(lplb.topology.torus, 2, 2)}
    return special.get(num_ranks, partial(lplb.topology.ring, num_ranks))()


def picks(rng: np.random.Generator, logits: np.ndarray, num_tokens: int, k: int) -> np.ndarray:
    """int32 [num_tokens, k]: different experts for each token, by their popularity exp(logits)."""
    noisy = logits + rng.gumbel(size=(num_tokens, len(logits)))
    return np.argpartition(-noisy, k, axis=1)[:, :k].astype(np.int32)


def _placement(topology: lplb.topology.Topology, redundants: int) -> lplb.Placement:
    return lplb.Placement.from_topology(
        topology, num_experts=NUM_EXPERTS, num_ranks=topology.group_size, redundants_per_rank=redundants
    )


def instances(
    num_tokens: int, num_ranks: int, num_experts: int = NUM_EXPERTS, number: int = NUM_INSTANCES
) -> tuple[np.ndarray, np.ndarray]:
    """Loads of all ranks, int32 [number, num_experts], and one rank's ids, int32 [number, num_tokens, 8].

    Experts have log-normal popularity, sigma 0.3 to 1.5 over the instances; a token picks 8 different ones.
    """
    rng = np.random.default_rng(0)
    loads, ids = [], []
    for sigma in np.linspace(0.3, 1.5, number):
        logits = rng.normal(0, sigma, num_experts)
        popularity = np.exp(logits)
        total = num_tokens * TOP_K * num_ranks
        loads.append(np.rint(popularity / popularity.sum() * total))
        ids.append(picks(rng, logits, num_tokens, TOP_K))
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
    table = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


def cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def _machine(device: str | None) -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):  # no GPU
        return {"device": device or cpu_name(), "driver": "", "cuda": ""}
    name, driver = gpus[0].split(", ")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "device": device or name,
        "driver": driver,
        "cuda": version.split("release ")[1].split(",")[0],
    }
