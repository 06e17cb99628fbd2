"""Loss, throughput and imbalance of runs in one figure, and a table: `python compare.py RUN... --out PNG`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#542788", "#e08214", "#1b7837", "#2166ac", "#b2182b", "#777777")
SMOOTHED = 20  # steps


@dataclass(frozen=True)
class Arguments:
    """What to compare."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs; the others are compared with the first."""
    out: Path = Path("compare.png")
    """The figure."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; none where it does not exist. A last line that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """One number of each row, float64 [rows]."""
    return np.array([row[name] for row in rows], np.float64)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean of each value and those before it, SMOOTHED at most."""
    total = np.concatenate([[0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - SMOOTHED + 1, 0)
    return (total[1:] - total[first]) / (np.arange(len(values)) + 1 - first)


def differences(run: Path, other: Path) -> np.ndarray:
    """Of the smoothed losses of two runs, relative to the latter's, at the steps that both did."""
    one, two = (smooth(column(read_lines(folder / "metrics.jsonl"), "loss")) for folder in (run, other))
    both = min(len(one), len(two))
    return np.abs(one[:both] / two[:both] - 1)


def draw(runs: Sequence[Path], path: Path) -> None:
    """The figure; of a single run with what its imbalance would be at home and could be at best."""
    figure, (loss, speed, imbalance) = plt.subplots(3, 1, figsize=(9, 9), sharex=True, layout="constrained")
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    for number, (run, summary) in enumerate(zip(runs, summaries, strict=True)):
        rows, colour, label = read_lines(run / "metrics.jsonl"), COLOURS[number % len(COLOURS)], run.name
        step, held_out = column(rows, "step"), read_lines(run / "validation.jsonl")
        loss.plot(step, column(rows, "loss"), color=colour, lw=0.5, alpha=0.4)
        dash = "-" if number == 0 else "--"  # losses of balanced and unbalanced runs lie on each other
        loss.plot(step, smooth(column(rows, "loss")), color=colour, ls=dash, label=label)
        loss.plot(column(held_out, "step"), column(held_out, "validation_loss"), "o", color=colour, ms=4)
        # The first step compiles. What the host does between steps shortens one and lengthens the next.
        speed.plot(step[1:], 1 / smooth(1 / column(rows[1:], "tokens_per_s")), color=colour, label=label)
        if summary["config"]["placing"]["balance"]:
            imbalance.plot(step, column(rows, "home_mean"), color=colour, ls=":", label=f"{label}: at home")
            if len(runs) == 1:
                imbalance.plot(step, column(rows, "optimum_mean"), color="#b2abd2", lw=6, label="optimum")
        imbalance.plot(step, column(rows, "balanced_mean"), color=colour, label=label)
    versions = ", ".join(f"{name} {version}" for name, version in summaries[0]["versions"].items())
    figure.suptitle(f"{summaries[0]['parameters']:,} parameters, {summaries[0]['device']}, {versions}", fontsize=10)
    loss.axhline(summaries[0]["unigram_entropy"], color="#999999", lw=1, ls=":", zorder=0, label="unigram entropy")
    loss.set(ylabel="loss (nats a byte)", title="Loss; dots: validation")
    speed.set(ylabel="tokens / s", title=f"Throughput, mean of {SMOOTHED} steps", ylim=(0, None))
    imbalance.set(ylabel="max / mean rank load", xlabel="step", title="Imbalance, mean over layers")
    for each in (loss, speed, imbalance):
        each.spines[["top", "right"]].set_visible(False)
        each.legend(frameon=False)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


def table(runs: Sequence[Path]) -> Table:
    """Final numbers, and how far the smoothed loss of each run strays from that of the first."""
    result = Table("run", "loss", "validation", "tokens/s", "at home", "balanced", "largest loss difference")
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        median = summary["median"]
        validation = summary["validation_loss"]
        result.add_row(
            run.name,
            f"{summary['loss']:.4f}",
            "-" if validation is None else f"{validation:.4f}",
            f"{median['tokens_per_s']:,.0f}",
            f"{median['home_mean']:.3f}",
            f"{median['balanced_mean']:.3f}",
            "-" if run == runs[0] else f"{differences(run, runs[0]).max():.2%}",
        )
    return result


def main() -> None:
    """Reads the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    for run in arguments.runs:
        if not (run / "summary.json").exists():
            raise SystemExit(f"compare: {run} has no summary.json: not a run, or one that has not ended yet")
    draw(arguments.runs, arguments.out)
    Console(soft_wrap=True).print(table(arguments.runs))


if __name__ == "__main__":
    main()
