"""Pretraining in several modes, compared: `python benchmarks/pretrain.py small --steps 200 --out FOLDER`.

Each mode is a run of examples/pretrain with its own folder, from one seed and on the same batches:

  even              each expert equally often, no copies: as fast as the trainer can be
  batch-peer        copies chosen by each batch, tokens through peers' memory
  batch-all_to_all  copies chosen by each batch, tokens by all_to_all
  past              experts and copies placed by past load
  none              no copies
  aux-loss          no copies, and the classic balancing loss with weight 0.01
  router-bias       no copies, and a router balanced by a bias

Options that are not listed below are the trainer's, for all modes, such as `--batch 32` or `--remat`. There are no
checkpoints, and no validation unless `--validate-every` asks for it. All modes are compiled at once, then run one after
the other in one process; where one fails, its row says so, and another process goes on with those that follow.

Rows count all steps after the 20th, with what the host does between them: `tokens_per_s` is their tokens over their
seconds, `share_of_even` this over that of `even`, `mfu` what it is of the devices' peak. `imbalance` is the median of
the steps' means over layers, `imbalance_p95` the 95th percentile of the steps' worst layers, `rounds_max` the most
rounds through the dispatch's buffers, `final_loss` the mean of the last 20 steps, and `loss_difference` the largest
relative difference of the losses, means of 20 steps, from those of the first mode that is not `even`.
`seconds_to_loss` is how long a mode took, in its steps, to the lowest loss, a mean of 20 steps, that all modes but
`even` came to, `common_loss`. FOLDER gets `pretrain.json` and `pretrain.png`.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples" / "pretrain"))
from compare import SETTLED, column, differences, draw, read_lines, smooth
from config import PRESETS, Config, check, parse
from flops import utilisation
from train import set_flags

MODES = {
    "even": ["--copies", "none", "--route", "even"],
    "batch-peer": ["--copies", "batch", "--dispatch", "peer"],
    "batch-all_to_all": ["--copies", "batch", "--dispatch", "all_to_all"],
    "past": ["--copies", "past"],
    "none": ["--copies", "none"],
    "aux-loss": ["--copies", "none", "--aux-loss-weight", "0.01"],
    "router-bias": ["--copies", "none", "--router-bias"],
}
COMMON = ["--checkpoint-every", "0", "--validate-every", "0"]


def summary_of(run: pathlib.Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def row_of(run: pathlib.Path, config: Config, baseline: pathlib.Path | None) -> dict[str, Any]:
    """Of a run that has ended, however it did; `baseline`: that whose losses it is compared with."""
    summary, rows = summary_of(run), read_lines(run / "metrics.jsonl")
    counted = rows[SETTLED:] or rows
    tokens = config.data.batch * config.data.seq_len
    devices, kind = summary["device"].split(" x ")
    tokens_per_s = tokens / np.nanmean(column(counted, "seconds"))
    difference = differences(run, baseline).max() if baseline and config.model.route == "learned" else None
    mfu = utilisation(config, tokens_per_s, int(devices), kind)
    return {
        "copies": config.placing.copies,
        "dispatch": summary["dispatch"],
        "transport": summary["transport"],
        "buffer_factor": config.compute.buffer_factor,
        "gpus": int(devices),
        "parameters": summary["parameters"],
        "tokens_per_step": tokens,
        "steps": summary["steps"],
        "ended": summary["ended"],
        "tokens_per_s": round(tokens_per_s),
        "median_tokens_per_s": round(float(np.nanmedian(column(counted, "tokens_per_s")))),
        "mfu": None if mfu is None else round(mfu, 4),
        "imbalance_home": round(float(np.median(column(counted, "home_mean"))), 4),
        "imbalance": round(float(np.median(column(counted, "balanced_mean"))), 4),
        "imbalance_p95": round(float(np.percentile(column(counted, "balanced_max"), 95)), 4),
        "rounds_max": int(column(counted, "rounds").max()),
        "final_loss": round(summary["loss"], 5),
        "validation_loss": summary["validation_loss"],
        "loss_difference": None if difference is None else round(float(difference), 6),
    }


def seconds_to_common_loss(runs: dict[str, pathlib.Path]) -> dict[str, dict[str, float]]:
    """To the lowest loss, of means of some steps, that all of the runs came to."""
    rows = {mode: lines for mode, run in runs.items() if (lines := read_lines(run / "metrics.jsonl"))}
    losses = {mode: smooth(column(of_run, "loss")) for mode, of_run in rows.items()}
    common_loss = max((loss.min() for loss in losses.values()), default=0.0)
    result = {}
    for mode, loss in losses.items():
        passed = np.nancumsum(column(rows[mode], "seconds"))
        seconds = float(passed[np.argmax(loss <= common_loss)])
        result[mode] = {"common_loss": round(float(common_loss), 5), "seconds_to_loss": round(seconds, 1)}
    return result


def write(out: pathlib.Path, configs: dict[str, Config], failed: dict[str, str]) -> None:
    """The rows of all runs that have ended so far."""
    import common

    ended = {mode: config for mode, config in configs.items() if (config.out / "summary.json").exists()}
    baseline = next((config.out for config in ended.values() if config.model.route == "learned"), None)
    rows = []
    for mode in configs:
        row = {"bench": "pretrain", "mode": mode}
        if mode in ended:
            with contextlib.suppress(ValueError):  # ended before there was anything to count
                row |= row_of(ended[mode].out, ended[mode], baseline)
        if mode in failed:
            row["ended"] = ": ".join(filter(None, (failed[mode], row.get("ended"))))
        if len(row) > 2:
            rows.append(row)
    even = next((row.get("tokens_per_s") for row in rows if row["mode"] == "even"), None)
    for row in rows:
        known = even and "tokens_per_s" in row
        row["share_of_even"] = round(row["tokens_per_s"] / even, 4) if known else None
    trained = {mode: config.out for mode, config in ended.items() if config.model.route == "learned"}
    times = seconds_to_common_loss(trained)
    rows = [row | times.get(row["mode"], {}) for row in rows]
    common.write(out / "pretrain.json", rows)


def run(out: pathlib.Path, configs: dict[str, Config], failed: dict[str, str], modes: list[str]) -> None:
    """Runs the modes one after the other, up to one that fails or is stopped."""
    set_flags()
    import jax

    from loop import train
    from placement import place
    from step import Trainer, mesh_of
    from terminal import Terminal

    trainers = {}
    for mode in modes:
        ranks = check(configs[mode], jax.device_count())
        trainers[mode] = Trainer(configs[mode], mesh_of(ranks), place(configs[mode], ranks))

    def compile_ahead(trainer: Trainer) -> None:
        with contextlib.suppress(Exception):  # told when it is its turn
            trainer.compile(trainer.put(place(trainer.config, trainer.mesh.shape["expert"])))

    with Terminal() as terminal, ThreadPoolExecutor(max_workers=min(len(modes), os.cpu_count() or 1)) as pool:
        terminal.stage(f"compiling {len(modes)} modes")
        list(pool.map(compile_ahead, trainers.values()))
    for mode in modes:
        with Terminal() as terminal:
            terminal.say(f"mode {mode}")
            train(configs[mode], terminal, trainers.pop(mode))
        if not summary_of(configs[mode].out)["finished"]:
            raise SystemExit(1)
        write(out, configs, failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs and the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # JSON: modes still to run, and why others failed
    args, options = parser.parse_known_args()
    given = [*COMMON, "--steps", str(args.steps), *options]
    configs = {mode: parse([args.preset, *MODES[mode], *given, "--out", str(args.out / mode)]) for mode in args.modes}
    if args.child:
        run(args.out, configs, **json.loads(args.child))
        return
    if any(config.out.exists() for config in configs.values()):
        parser.error(f"--out: {args.out} has runs already; name another folder")
    left, failed = list(args.modes), {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ
        while left:
            child = json.dumps({"failed": failed, "modes": left})
            code = subprocess.run(
                [sys.executable, *sys.argv, "--child", child], env=environment, check=False
            ).returncode
            while left and finished(configs[left[0]].out):
                left.pop(0)
            if left:
                failed[left.pop(0)] = f"failed, exit code {code}"
    write(args.out, configs, failed)
    if runs := [config.out for config in configs.values() if (config.out / "summary.json").exists()]:
        draw(runs, args.out / "pretrain.png")
    sys.exit(bool(failed))


def finished(run: pathlib.Path) -> bool:
    return (run / "summary.json").exists() and summary_of(run)["finished"]


if __name__ == "__main__":
    main()
