"""What placements are worth on recorded routing: `python benchmarks/placements.py --traces FOLDER`.

Each batch of two traces is judged by placements that were made of the 8 batches before it: largest / mean rank load
with no copies (experts in logical order), with EPLB's copies and even splits, and with those of `PLACEMENTS`, split by
`solve`. All but the first have equally many slots. Runs on a CPU. The folder holds deepseek_v2_lite_topk_ids.npz and
gpt_oss_20b_decode_counts.npz. Ends with exit code 1 where a split is worse than it may be. Also times
`rebalance_experts`.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np

import jax_lplb as lplb
from jax_lplb import eplb

PAST = 8
TOL = 1e-4  # of `solve`
TOPOLOGIES = {
    (8, 1): lplb.topology.ring(8),
    (8, 2): lplb.topology.cube(),
    (16, 1): lplb.topology.ring(16),
    (16, 2): lplb.topology.hypercube(),
    (32, 1): lplb.topology.ring(32),
    (32, 2): lplb.topology.torus(8, 4),
}


def along_topology(past: np.ndarray, ranks: int, redundants: int, **options: Any) -> lplb.Placement:
    return lplb.Placement.from_topology(
        TOPOLOGIES[ranks, redundants],
        num_experts=past.shape[-1],
        num_ranks=ranks,
        redundants_per_rank=redundants,
        load=past,
        **options,
    )


# Of past loads [layers, experts], ranks and redundant experts on each: a stacked placement. ValueError: there is none.
PLACEMENTS: dict[str, Callable[[np.ndarray, int, int], lplb.Placement]] = {
    "topology": along_topology,  # LPLB's way
    "topology_repeats": lambda past, ranks, redundants: along_topology(past, ranks, redundants, repeats=True),
    "eplb": lambda past, ranks, redundants: lplb.Placement.from_eplb(
        past, num_ranks=ranks, redundants_per_rank=redundants
    ),
    "per_batch": lambda past, ranks, redundants: lplb.Placement.per_batch(
        num_experts=past.shape[-1], num_ranks=ranks, redundants_per_rank=redundants
    ),  # which knows nothing of the past, but the batch
}


def deepseek(folder: pathlib.Path, tokens: int = 512) -> np.ndarray:
    """Loads [sequences, batches, 64] of batches of 512 tokens, top-6, for each task and layer."""
    sequences = []
    with np.load(folder / "deepseek_v2_lite_topk_ids.npz", allow_pickle=False) as archive:
        for task in ("intent", "law", "summary", "translation"):
            ids = archive[f"{task}_ids"].astype(np.int64)
            batches = len(ids) // tokens
            for layer in range(ids.shape[1]):
                of_layer = ids[: batches * tokens, layer].reshape(batches, -1)
                sequences.append(np.stack([np.bincount(batch, minlength=64) for batch in of_layer])[:16])
    return np.stack(sequences)


def gpt_oss(folder: pathlib.Path, steps: int = 24) -> np.ndarray:
    """Loads [sequences, batches, 32] of decode steps of 256 tokens, top-4, in runs of 24 steps for each layer."""
    with np.load(folder / "gpt_oss_20b_decode_counts.npz", allow_pickle=False) as archive:
        counts = archive["counts"].astype(np.int64)
    runs = len(counts) // steps
    runs = counts[: runs * steps].reshape(runs, steps, *counts.shape[1:])[::5]
    return runs.swapaxes(1, 2).reshape(-1, steps, counts.shape[2])


def judge(trace: str, sequences: np.ndarray, ranks: int, redundants: int) -> dict[str, Any]:
    steps, experts = sequences.shape[1:]
    past = np.stack([sequences[:, step - PAST : step].mean(axis=1) for step in range(PAST, steps)], axis=1)
    past, now = past.reshape(-1, experts), sequences[:, PAST:].reshape(-1, experts)
    raw, _, _ = eplb.rebalance_experts(past, experts + ranks * redundants, 1, 1, ranks)

    of_raw = lplb.evaluate(raw, now, num_ranks=ranks)
    result = {"none": of_raw.contiguous, "eplb_even": of_raw.even}
    solved = []
    for name, place in PLACEMENTS.items():
        try:
            places = place(past, ranks, redundants)
        except ValueError:  # more copies of a rank than it has experts
            continue
        one = lplb.evaluate(places, now, tol=TOL)
        solved.append(one.optimum / (1 - one.gap))  # at most this: the split that was certified by the gap
        result[f"{name}_lp"], result[f"{name}_lp_assigned"] = solved[-1], one.assigned
        if np.any(solved[-1] > one.even * (1 + TOL)):
            sys.exit(f"{trace} {ranks}x{redundants} {name}: worse than the even split of the same placement")
        copies = int(np.median(one.copies))
    result["best"] = np.min(solved, axis=0)
    of_even = result["best"] / result["eplb_even"]
    if np.any(of_even > 1 + TOL):
        sys.exit(f"{trace} {ranks}x{redundants}: worse than EPLB's even split")
    row: dict[str, Any] = {"bench": "placement", "case": f"{trace} {ranks}x{redundants}", "loads": len(now)}
    for name, values in result.items():
        row[name] = f"{np.median(values):.3f} / {np.percentile(values, 95):.3f}"
    return row | {"copies_per_batch": copies, "worst_of_even": round(float(of_even.max()), 6)}


def rebalancing(layers: int = 58, experts: int = 256, ranks: int = 64, slots: int = 320) -> list[dict[str, Any]]:
    weight = np.random.default_rng(0).lognormal(0, 1, (layers, experts))
    rows = []
    for policy, groups, nodes in (("global", 1, 1), ("hierarchical", 8, 8)):
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            eplb.rebalance_experts(weight, slots, groups, nodes, ranks)
            times.append((time.perf_counter() - begin) * 1e6)
        case = f"{layers} layers, {experts} experts, {slots} slots, {ranks} ranks"
        rows.append({"bench": "eplb", "case": case, "kernel": policy, **common.statistics(times)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/placements.json"))
    args = parser.parse_args()
    rows = rebalancing()
    for trace, sequences in (("deepseek-v2-lite", deepseek(args.traces)), ("gpt-oss-20b", gpt_oss(args.traces))):
        rows += [judge(trace, sequences, *config) for config in TOPOLOGIES]
    common.write(args.out, rows)


if __name__ == "__main__":
    main()
