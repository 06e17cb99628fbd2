"""Loss by step and time, throughput and imbalance of runs, and a table: `python compare.py RUN... --out PNG`."""

import contextlib
import json
from collections.abc import Iterable, Sequence
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

COLOURS = ("#542788", "#e08214", "#1b7837", "#2166ac", "#b2182b", "#777777", "#01665e")
SMOOTHED = 20  # steps
SETTLED = 20  # steps before which the throughput is not counted
# Of the metrics, by their names: experts in logical order, experts where they are but without copies, a certified lower
# bound of what the copies allow, and what it was.
IMBALANCES = {"contiguous": "contiguous", "home": "at home", "optimum": "optimum", "balanced": "balanced"}


@dataclass(frozen=True)
class Arguments:
    """What to compare."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs; the others are compared with the first."""
    out: Path = Path("compare.png")
    """The figure."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; none where it does not exist. Lines that were cut are left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """One number of each row, float64 [rows]; NaN where it is null."""
    return np.array([row[name] for row in rows], np.float64)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the SMOOTHED values around each, fewer at the ends and where some are NaN."""
    known = np.isfinite(values)
    index = np.arange(len(values))
    first, last = np.maximum(index - SMOOTHED // 2, 0), np.minimum(index + SMOOTHED // 2, len(values))

    def total(x: np.ndarray) -> np.ndarray:
        running = np.concatenate([[0], np.cumsum(x)])
        return running[last] - running[first]

    with np.errstate(invalid="ignore"):  # NaN where all are
        return total(np.where(known, values, 0)) / total(known)


def differences(run: Path, other: Path) -> np.ndarray:
    """Of the smoothed losses of two runs, relative to the latter's, at the steps that both did."""
    one, two = (smooth(column(read_lines(folder / "metrics.jsonl"), "loss")) for folder in (run, other))
    both = min(len(one), len(two))
    return np.abs(one[:both] / two[:both] - 1)


def copies(summary: dict[str, Any]) -> str:
    """What a run has of copies, and how it routes where it does not learn that."""
    placing = summary["config"]["placing"]
    said = {
        "batch": f"{placing['redundants']} slots a rank for copies by batch",
        "past": f"{placing['placement']}, {placing['redundants']} copies a rank by the past",
        "none": "no copies",
    }[placing["copies"]]
    return said + ", even routing" * (summary["config"]["model"]["route"] == "even")


def names(runs: Sequence[Path]) -> list[str]:
    """What to call runs: their folders, with their whole paths where folders are called the same."""
    short = [run.resolve().name for run in runs]
    return [name if short.count(name) == 1 else str(run) for name, run in zip(short, runs, strict=True)]


def draw(runs: Sequence[Path], path: Path) -> None:
    """The figure; of a single run with what its imbalance would be without copies and could be at best."""
    figure, (loss, in_time, speed, imbalance) = plt.subplots(4, 1, figsize=(9, 13), layout="constrained")
    for each in (loss, speed):
        each.sharex(imbalance)
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    for number, (run, name, summary) in enumerate(zip(runs, names(runs), summaries, strict=True)):
        rows, held_out = read_lines(run / "metrics.jsonl"), read_lines(run / "validation.jsonl")
        colour, step = COLOURS[number % len(COLOURS)], column(rows, "step")
        chosen = summary["config"]["placing"]["copies"]
        label = f"{name} ({copies(summary)})"
        loss.plot(step, column(rows, "loss"), color=colour, lw=0.5, alpha=0.4)
        dash = "-" if number == 0 else "--"  # losses of balanced and unbalanced runs lie on each other
        loss.plot(step, smooth(column(rows, "loss")), color=colour, ls=dash, label=label)
        passed = np.nancumsum(column(rows, "seconds"))
        in_time.plot(passed, smooth(column(rows, "loss")), color=colour, ls=dash, label=label)
        loss.plot(column(held_out, "step"), column(held_out, "validation_loss"), "o", color=colour, ms=4)
        # What the host does between steps shortens one and lengthens the next: the mean is that of their seconds.
        speed.plot(step, 1 / smooth(1 / column(rows, "tokens_per_s")), color=colour, label=label)
        prefix = "" if len(runs) == 1 else f"{name}: "
        if len(runs) == 1 and chosen == "past":  # else the same as at home
            imbalance.plot(step, column(rows, "contiguous_mean"), color="#777777", ls="-.", label="contiguous")
        if len(runs) == 1:
            imbalance.plot(step, column(rows, "optimum_mean"), color="#b2abd2", lw=6, label="optimum (lower bound)")
        if chosen != "none":
            imbalance.plot(step, column(rows, "home_mean"), color=colour, ls=":", label=f"{prefix}at home")
        imbalance.plot(
            step,
            column(rows, "balanced_mean"),
            color=colour,
            label=f"{prefix}{'no copies' if chosen == 'none' else 'balanced'}",
        )
    versions = ", ".join(f"{name} {version}" for name, version in summaries[0]["versions"].items())
    figure.suptitle(f"{summaries[0]['parameters']:,} parameters, {summaries[0]['device']}, {versions}", fontsize=10)
    loss.axhline(summaries[0]["unigram_entropy"], color="#999999", lw=1, ls=":", zorder=0, label="unigram entropy")
    around = f"mean of the {SMOOTHED} steps around each"
    loss.set(ylabel="loss (nats a byte)", title=f"Loss; thin: each step, thick: {around}, dots: validation")
    in_time.set(ylabel="loss (nats a byte)", xlabel="seconds of steps", title=f"Loss, {around}, by time")
    speed.set(ylabel="tokens / s", title=f"Throughput, {around}", ylim=(0, None))
    imbalance.set(ylabel="max / mean rank load", xlabel="step", title="Imbalance of each step, mean over layers")
    for each in (loss, in_time, speed, imbalance):
        each.spines[["top", "right"]].set_visible(False)
        each.legend(frameon=False, ncols=2 if each is imbalance else 1)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


def table(runs: Sequence[Path]) -> Table:
    """Final numbers, a column a run, and how far the smoothed loss of each strays from that of the first."""
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]

    def row(title: str, form: str, values: Iterable[float | None]) -> None:
        result.add_row(title, *("-" if value is None else format(value, form) for value in values))

    result = Table("", *names(runs))
    row("loss", ".4f", (summary["loss"] for summary in summaries))
    row("validation", ".4f", (summary["validation_loss"] for summary in summaries))
    row("largest loss difference", ".2%", [None, *(differences(run, runs[0]).max() for run in runs[1:])])
    row("tokens/s", ",.0f", (summary["median"]["tokens_per_s"] for summary in summaries))
    if any(summary["mfu"] for summary in summaries):
        row("MFU", ".1%", (summary["mfu"] for summary in summaries))
    for name, title in IMBALANCES.items():
        row(f"imbalance, {title}", ".3f", (summary["median"][f"{name}_mean"] for summary in summaries))
    return result


def main() -> None:
    """Reads the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    for run in arguments.runs:
        try:
            copies(json.loads((run / "summary.json").read_text()))
        except (OSError, ValueError, KeyError):
            raise SystemExit(
                f"compare: {run} has no summary.json that can be read: not a run, one that has not ended yet, or one "
                "of an earlier trainer"
            ) from None
    try:
        draw(arguments.runs, arguments.out)
    except OSError as error:
        raise SystemExit(f"compare: --out: cannot write {arguments.out}: {error.strerror}") from None
    Console(soft_wrap=True).print(table(arguments.runs))


if __name__ == "__main__":
    main()
