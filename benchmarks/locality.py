"""What stays on its rank and node on recorded routing: `python benchmarks/locality.py --traces FOLDER`.

With `balance(locality=True)`, and without: batches of two traces, dealt to the ranks in contiguous parts, with copies
chosen by each batch, two slots a rank. There are two nodes of half the ranks each. A row is a choice of a token, sent
to the rank of its expert. The folder holds deepseek_v2_lite_topk_ids.npz and gpt_oss_20b_decode_counts.npz; the latter
has counts alone, and choices are dealt at random. Runs on a CPU. Ends with exit code 1 where rank loads differ.
"""

import argparse
import pathlib
import sys
from functools import partial
from typing import Any

import common
import jax
import numpy as np

import jax_lplb as lplb
from jax_lplb._cli import trace

RANKS, SLOTS = (8, 16), 2
BATCH, BATCHES = 512, 16  # tokens, and batches of each task of DeepSeek's
EVERY = 8  # decode steps of gpt-oss
D_MODEL = {"deepseek-v2-lite": 2048, "gpt-oss-20b": 2880}
EXPERTS = {"deepseek-v2-lite": 64, "gpt-oss-20b": 32}


def deepseek(folder: pathlib.Path) -> np.ndarray:
    """Ids [batches and layers, tokens, 6]."""
    with np.load(folder / "deepseek_v2_lite_topk_ids.npz", allow_pickle=False) as arrays:
        tasks = [arrays[name][: BATCHES * BATCH] for name in arrays if name.endswith("_ids")]
    batches = np.stack(tasks).reshape(len(tasks) * BATCHES, BATCH, *tasks[0].shape[1:])
    return batches.swapaxes(1, 2).reshape(-1, BATCH, batches.shape[-1]).astype(np.int32)


def gpt_oss(folder: pathlib.Path) -> np.ndarray:
    """Ids [batches and layers, tokens, 4]."""
    (steps,) = trace.read(folder / "gpt_oss_20b_decode_counts.npz")
    counts = steps[::EVERY].reshape(-1, steps.shape[-1])
    counts = counts[counts.sum(axis=1) == np.max(counts.sum(axis=1))]  # full batches
    rng = np.random.default_rng(0)
    choices = [rng.permutation(np.repeat(np.arange(len(count), dtype=np.int32), count)) for count in counts]
    return np.stack(choices).reshape(len(counts), -1, 4)


def sent(ids: np.ndarray, placement: lplb.Placement, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows [batches, from rank, to rank], and rank loads [batches, ranks]."""
    ranks = placement.num_ranks

    @jax.jit
    @jax.vmap
    @partial(jax.vmap, axis_name="ep")
    def run(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = lplb.balance(ids, placement, axis_name="ep", **options)
        return out.physical_ids, out.rank_load

    physical, rank_load = run(ids.reshape(len(ids), ranks, -1, ids.shape[-1]))
    to = np.asarray(physical).reshape(len(ids), ranks, -1) // placement.slots_per_rank
    return (to[..., None] == np.arange(ranks)).sum(axis=2), np.asarray(rank_load)[:, 0]


def judge(name: str, ids: np.ndarray, ranks: int) -> dict[str, Any]:
    placement = lplb.Placement.per_batch(num_experts=EXPERTS[name], num_ranks=ranks, redundants_per_rank=SLOTS)
    node = np.arange(ranks) // (ranks // 2)
    row: dict[str, Any] = {"bench": "locality", "case": f"{name} {ranks}x{SLOTS}", "batches": len(ids)}
    loads = []
    for kind, options in (("far", {}), ("near", {"locality": True, "ranks_per_node": ranks // 2})):
        rows, load = sent(ids, placement, **options)
        loads.append(load)
        total, own = rows.sum(), np.eye(ranks, dtype=bool)
        between = rows[:, node[:, None] != node].sum(axis=1)
        largest = rows[:, ~own].max(axis=1)
        row |= {
            f"on_rank_{kind}": round(float(rows[:, own].sum() / total), 4),
            f"on_node_{kind}": round(float(1 - between.sum() / total), 4),
            f"largest_pair_{kind}": f"{np.median(largest):g} / {np.percentile(largest, 95):g}",
            f"between_nodes_mb_{kind}": round(float(between.mean() * D_MODEL[name] * 2 / 1e6), 3),
        }
    if not np.array_equal(*loads):
        sys.exit(f"{row['case']}: rank loads differ")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/locality.json"))
    args = parser.parse_args()
    traces = {"deepseek-v2-lite": deepseek(args.traces), "gpt-oss-20b": gpt_oss(args.traces)}
    common.write(args.out, [judge(name, ids, ranks) for name, ids in traces.items() for ranks in RANKS])


if __name__ == "__main__":
    main()
