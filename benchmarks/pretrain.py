"""Rows of finished pretraining runs, on the machine that they ran on: `python benchmarks/pretrain.py RUN...`.

The first run is the baseline: `of_first` is throughput over its, `loss_difference` the largest relative difference of
the losses, means of 20 steps, and `mean_loss_difference` its mean. Other numbers are medians over the steps after the
20th, and `mean_tokens_per_s` is the throughput of all of these together.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import common
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples" / "pretrain"))
from compare import column, differences, read_lines


def row_of(run: pathlib.Path, first: pathlib.Path) -> dict[str, Any]:
    summary, of_first = (json.loads((folder / "summary.json").read_text()) for folder in (run, first))
    difference, seconds = differences(run, first), column(read_lines(run / "metrics.jsonl")[20:], "seconds")
    tokens = summary["config"]["data"]["batch"] * summary["config"]["data"]["seq_len"]
    median, placing = summary["median"], summary["config"]["placing"]
    return {
        "bench": "pretrain",
        "run": run.name,
        "copies": placing["copies"],
        "route": summary["config"]["model"]["route"],
        "gpus": int(summary["device"].split()[0]),
        "parameters": summary["parameters"],
        "tokens_per_step": tokens,
        "steps": summary["steps"],
        "tokens_per_s": round(median["tokens_per_s"]),
        "mean_tokens_per_s": round(tokens / np.nanmean(seconds)),
        "mfu": summary["mfu"],
        "of_first": round(median["tokens_per_s"] / of_first["median"]["tokens_per_s"], 4),
        **{
            key: round(median[key], 4)
            for key in ("contiguous_mean", "home_mean", "home_max", "optimum_mean", "balanced_mean", "rounds")
        },
        "loss": round(summary["loss"], 5),
        "validation_loss": summary["validation_loss"],
        "loss_difference": round(float(difference.max()), 6),
        "mean_loss_difference": round(float(difference.mean()), 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="folders that train.py wrote")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/pretrain.json"))
    args = parser.parse_args()
    common.write(args.out, [row_of(run, args.runs[0]) for run in args.runs])


if __name__ == "__main__":
    main()
