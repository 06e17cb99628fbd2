"""The commands of `jax-lplb`, their options and what they print."""

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import tyro
from rich.console import Console

from jax_lplb import _simulate
from jax_lplb._cli import advice, picture, study
from jax_lplb._cli import doctor as checks
from jax_lplb._cli.study import TITLES, Recording, Row, Study, check, check_positive, stop

Recorded = Annotated[Recording, tyro.conf.arg(name="")]
COLUMNS = ("median", "95 %", "99 %", "worst", "copies", "moved", "time saved")


def run(arguments: Sequence[str]) -> None:
    """Runs the command that the arguments name."""
    tyro.extras.subcommand_cli_from_dict(
        {"simulate": simulate, "advise": advise, "doctor": doctor},
        prog="jax-lplb",
        description="Expert load balancing for JAX: what it would bring, and whether it works here.",
        args=arguments,
    )


def doctor() -> None:
    """Checks that jax_lplb works here, in this process, on JAX's default devices. Exit code 1 where it does not."""
    raise SystemExit(checks.main(_console()))


def simulate(
    recording: Recorded,
    ranks: tuple[int, ...] = (8, 16),
    redundants: tuple[int, ...] = (1, 2),
    placements: tuple[_simulate.Kind, ...] = _simulate.KINDS,
) -> None:
    """Says what balancing would bring on recorded routing.

    Placements are made by the last batches of a window, judged on the batches of the next, and then replaced. Copies
    per batch are chosen for the batch itself. Runs on the CPU.

    Args:
      recording: What is judged, and where the results go.
      ranks: Numbers of expert-parallel ranks.
      redundants: Redundant experts on each rank.
      placements: Where the copies are, and how tokens are split over them.
    """
    check("--ranks", ranks, 1)
    check("--redundants", redundants, 0)
    if not placements:
        stop(f"--placements needs one or more of {', '.join(_simulate.KINDS)}")
    judged = Study(recording)
    _check_writable(recording)
    configs = [(size, copies) for size in dict.fromkeys(ranks) for copies in dict.fromkeys(redundants)]
    rows = judged.judge(
        {
            _simulate.Candidate(kind, *config, _simulate.topologies_for(*config)[0]): TITLES[kind]
            for config in configs
            for kind in _simulate.KINDS
            if kind in placements
        }
    )
    console = _console()
    console.print(judged.header, markup=False)
    panels = {}
    for size, copies in configs:
        of_config = [row for row in rows if (row.candidate.ranks, row.candidate.redundants) == (size, copies)]
        title = (
            f"{size} ranks, {copies} redundant expert{'s' * (copies != 1)} each; topology: "
            f"{of_config[0].candidate.topology}"
        )
        panels[title] = of_config
        console.print(study.table(of_config, title, COLUMNS))
    _print_notes(console, COLUMNS)
    _write(judged, rows, {})
    if recording.plot is not None:
        fitting = [row for row in rows if row.imbalance is not None]
        best = min(fitting, key=lambda row: row.order, default=None)
        picture.write(recording.plot, judged, panels, best, COLUMNS)


def advise(
    recording: Recorded,
    ranks: int,
    ranks_per_node: int | None = None,
    redundants: tuple[int, ...] = (1, 2, 4),
    within: float = 2,
    max_copies_mb: float | None = None,
) -> None:
    """Says which placement to take for recorded routing, why, and how in Python.

    Tries no copies, all topologies that fit, EPLB, and copies per batch, judged as `simulate` judges. Runs on the CPU.

    Args:
      recording: What is judged, and where the results go.
      ranks: Expert-parallel ranks.
      ranks_per_node: Ranks of a node: copies per batch within nodes are tried, too.
      redundants: Redundant experts on each rank, to try.
      within: Percent that the imbalance may be above the best, to save memory for copies, and then traffic.
      max_copies_mb: Most memory that a rank's slots for copies may take, over all layers, in megabytes. Needs
        --expert-mb or --widths.
    """
    nodes = 1
    check("--ranks", (ranks,), 1)
    check("--redundants", redundants, 1)
    if ranks_per_node is not None:
        check("--ranks-per-node", (ranks_per_node,), 1)
        if ranks % ranks_per_node:
            stop(f"--ranks-per-node must divide --ranks, {ranks}, got {ranks_per_node}")
        nodes = ranks // ranks_per_node
    if not 0 <= within < float("inf"):
        stop(f"--within must be a percentage from 0 on, got {within}")
    judged = Study(recording)
    most_bytes = float("inf")
    if max_copies_mb is not None:
        check_positive("--max-copies-mb", max_copies_mb)
        if judged.expert_bytes is None:
            stop("--max-copies-mb needs to know what an expert takes: pass --expert-mb or --widths")
        most_bytes = max_copies_mb * 1e6
    _check_writable(recording)
    tried = {}
    for one in _simulate.candidates(ranks, sorted(set(redundants)), nodes):
        title = TITLES[one.kind].replace("topology", str(one.topology))
        tried[one] = title + f" in nodes of {ranks // one.groups}" * (one.groups > 1)
    rows = judged.judge(tried, most_bytes)
    fitting = sorted((row for row in rows if row.imbalance is not None), key=lambda row: row.order)
    chosen = advice.choose(fitting, within)
    without = next(row for row in fitting if row.candidate.kind == "none").numbers["imbalance"]["p95"]
    said, code = advice.words(chosen, fitting, within, without), advice.code(chosen.candidate, judged)

    console = _console()
    console.print(judged.header, markup=False)
    columns = ("slots", "median", "95 %", "99 %", "worst", "memory", "moved", "time saved")
    console.print(study.table(fitting, f"{ranks} ranks, the best first", columns))
    for reason in study.reasons(rows):
        console.print(reason, markup=False)
    _print_notes(console, columns)
    console.print(f"\n{said}\n\n{code}", markup=False)
    rows = fitting + [row for row in rows if row.imbalance is None]
    _write(judged, rows, {"chosen": fitting.index(chosen), "rule": advice.rule(within), "why": said, "code": code})
    if recording.plot is not None:
        picture.write(recording.plot, judged, {f"{ranks} ranks": rows}, chosen, columns, (said, code))


def _print_notes(console: Console, columns: Sequence[str]) -> None:
    for name, note in study.notes(columns).items():
        console.print(fill(f"{name}: {note}", 110), markup=False)


def _write(judged: Study, rows: list[Row], advised: dict[str, Any]) -> None:
    if (path := judged.recording.json) is not None:
        report = judged.report | advised | {"rows": [row.numbers for row in rows]}
        path.write_text(json_format.dumps(report, indent=1) + "\n")


def _check_writable(recording: Recording) -> None:
    if recording.plot is not None:
        formats = picture.formats()
        if recording.plot.suffix[1:] not in formats:
            stop(f"--plot must end in one of {', '.join('.' + name for name in formats)}, got {recording.plot}")
    for option, path in (("--json", recording.json), ("--plot", recording.plot)):
        _try(option, path)


def _try(option: str, path: Path | None) -> None:
    try:
        if path is not None:
            path.open("ab").close()
    except OSError as error:
        stop(f"{option}: cannot write {path}: {error.strerror}")


def _console() -> Console:
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = 120  # rich assumes 80 columns of a log file, and cuts tables
    return console
