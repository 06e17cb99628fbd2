"""What placements are worth on recorded routing: `python benchmarks/placements.py --traces FOLDER`.

Each batch of two traces is judged by placements that were made of the 8 batches before it: largest / mean rank load
with no copies (experts in logical order), with EPLB's copies and even splits, and with those of `_simulate.SOLVED`,
split by `solve`. All but the first have equally many slots. Runs on a CPU. The folder holds
deepseek_v2_lite_topk_ids.npz and gpt_oss_20b_decode_counts.npz. Ends with exit code 1 where a split is worse than it
may be. Also times `rebalance_experts`.
"""

import argparse
import pathlib
import sys
import time
from typing import Any

import common
import numpy as np

from jax_lplb import _simulate, eplb
from jax_lplb._cli import trace

PAST = 8
TOL = 1e-4  # of `solve`
CONFIGS = ((8, 1), (8, 2), (16, 1), (16, 2), (32, 1), (32, 2))


def deepseek(folder: pathlib.Path) -> list[np.ndarray]:
    """Loads [batches, layers, 64] of batches of 512 tokens, top-6, for each task."""
    return [loads[:16] for loads in trace.read(folder / "deepseek_v2_lite_topk_ids.npz", batch_tokens=512)]


def gpt_oss(folder: pathlib.Path, steps: int = 24) -> list[np.ndarray]:
    """Loads [batches, layers, 32] of decode steps of 256 tokens, top-4, in runs of 24 steps."""
    (counts,) = trace.read(folder / "gpt_oss_20b_decode_counts.npz")
    runs = len(counts) // steps
    return list(counts[: runs * steps].reshape(runs, steps, *counts.shape[1:])[::5])


def judge(name: str, sequences: list[np.ndarray], ranks: int, redundants: int) -> dict[str, Any]:
    loads = _simulate.windows(sequences, PAST, 1)
    along = _simulate.topologies_for(ranks, redundants)[0]

    def judged(kind: _simulate.Kind) -> _simulate.Judged:
        return _simulate.judge(_simulate.Candidate(kind, ranks, redundants, along), loads)

    result = {kind: judged(kind).imbalance for kind in _simulate.EVEN}
    solved = []
    for kind in _simulate.SOLVED:
        try:
            one = judged(kind).evaluation
        except ValueError:  # more copies of a rank than it has experts
            continue
        assert one is not None
        solved.append(one.optimum / (1 - one.gap))  # at most this: the split that was certified by the gap
        result[f"{kind}_lp"], result[f"{kind}_lp_assigned"] = solved[-1], one.assigned
        if np.any(solved[-1] > one.even * (1 + TOL)):
            sys.exit(f"{name} {ranks}x{redundants} {kind}: worse than the even split of the same placement")
        copies = int(np.median(one.copies))
    result["best"] = np.min(solved, axis=0)
    of_even = result["best"] / result["eplb_even"]
    if np.any(of_even > 1 + TOL):
        sys.exit(f"{name} {ranks}x{redundants}: worse than EPLB's even split")
    row: dict[str, Any] = {
        "bench": "placement",
        "case": f"{name} {ranks}x{redundants}",
        "loads": loads.now[..., 0].size,
    }
    for kind, values in result.items():
        row[kind] = f"{np.median(values):.3f} / {np.percentile(values, 95):.3f}"
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
    for name, sequences in (("deepseek-v2-lite", deepseek(args.traces)), ("gpt-oss-20b", gpt_oss(args.traces))):
        rows += [judge(name, sequences, *config) for config in CONFIGS]
    common.write(args.out, rows)


if __name__ == "__main__":
    main()
