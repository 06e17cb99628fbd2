"""The commands of `jax-lplb`, their options and what they print."""

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table

from jax_lplb import _simulate
from jax_lplb._cli import doctor as checks
from jax_lplb._cli import trace as traces

Kind = Literal["none", "eplb_even", "topology", "topology_repeats", "eplb", "per_batch"]
KINDS: tuple[Kind, ...] = ("none", "eplb_even", "topology", "topology_repeats", "eplb", "per_batch")
TITLES: dict[Kind, str] = {
    "none": "no copies",
    "eplb_even": "EPLB, even split",
    "topology": "topology, LP",
    "topology_repeats": "topology, repeats, LP",
    "eplb": "EPLB, LP",
    "per_batch": "per batch",
}
COLOURS = ("#777777", "#e08214", "#2166ac", "#01665e", "#1b7837", "#542788")
TIME_MODEL = "the experts of a layer take time in proportion to the tokens of the busiest rank"


def run(arguments: Sequence[str]) -> None:
    """Runs the command that the arguments name."""
    tyro.extras.subcommand_cli_from_dict(
        {"simulate": simulate, "doctor": doctor},
        prog="jax-lplb",
        description="Expert load balancing for JAX: what it would bring, and whether it works here.",
        args=arguments,
    )


def doctor() -> None:
    """Checks that jax_lplb works here, in this process, on JAX's default devices. Exit code 1 where it does not."""
    raise SystemExit(checks.main(_console()))


def simulate(
    trace: tyro.conf.Positional[Path],
    ranks: tuple[int, ...] = (8, 16),
    redundants: tuple[int, ...] = (1, 2),
    placements: tuple[Kind, ...] = KINDS,
    window: int = 8,
    batch_tokens: int = 512,
    experts: int | None = None,
    expert_mb: float | None = None,
    widths: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="D_MODEL D_EXPERT")] = None,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Says what balancing would bring on recorded routing.

    Placements are made by the last batches of a window, judged on the batches of the next, and then replaced. Copies
    per batch are chosen for the batch itself. Runs on the CPU.

    Args:
      trace: The folder of a Recorder, or .npz, .npy or .json with counts or logical_count [steps, layers, experts] or
        topk_ids [tokens, layers, k]. The name of an .npy says which.
      ranks: Numbers of expert-parallel ranks.
      redundants: Redundant experts on each rank.
      placements: Where the copies are, and how tokens are split over them.
      window: Batches to place by, and as many to judge on.
      batch_tokens: Tokens of a batch, where the trace has topk_ids.
      experts: How many there are, where the trace has topk_ids; by default one more than the highest.
      expert_mb: Weights of one expert, in megabytes.
      widths: The same by widths, of a SwiGLU expert in 16 bits: 3 x d_model x d_expert x 2 bytes.
      json: Writes all numbers to this file.
      plot: Draws the imbalances to this file.
    """
    for name, numbers in (("ranks", ranks), ("window", (window,)), ("batch-tokens", (batch_tokens,))):
        _check("--" + name, numbers, 1)
    _check("--redundants", redundants, 0)
    _check("--experts", (1 if experts is None else experts,), 1)
    if not placements:
        _stop(f"--placements needs one or more of {', '.join(KINDS)}")
    expert_bytes = _expert_bytes(expert_mb, widths)
    try:
        sequences = traces.read(trace, batch_tokens, experts)
    except traces.BadTraceError as error:
        _stop(str(error))
    longest = max(map(len, sequences))
    if longest < 2 * window:
        cure = f"pass --window {longest // 2} or less" if longest > 1 else "record more of them"
        _stop(f"{trace} has {longest} batches in sequence, and --window {window} takes {2 * window}: {cure}")
    loads = _simulate.windows(sequences, window, window)
    for option, path in (("--json", json), ("--plot", plot)):
        _check_writable(option, path)

    layers, num_experts = sequences[0].shape[1:]
    rows, judged = [], {}
    configs = [(size, copies) for size in dict.fromkeys(ranks) for copies in dict.fromkeys(redundants)]
    kinds = [kind for kind in KINDS if kind in placements]
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("Judging", total=len(configs) * len(kinds))
        for config in configs:
            base = _simulate.judge("none", loads, *config).imbalance
            name, sizes = _simulate.topology_for(*config)
            along = f"{name}({', '.join(map(str, sizes))})"
            for kind in kinds:
                row: dict[str, Any] = dict(zip(("ranks", "redundants"), config, strict=True))
                row |= {"topology": along, "placement": kind}
                try:
                    one = _simulate.judge(kind, loads, *config)
                except ValueError as error:
                    row["does_not_fit"] = str(error)
                else:
                    row |= _numbers(one, base, loads, layers, expert_bytes)
                    judged[*config, kind] = one.imbalance
                rows.append(row)
                progress.advance(task)

    steps = loads.now[..., 0].size // layers
    console = _console()
    console.print(
        f"{trace}: {num_experts} experts, {layers} layers, {steps} batches judged, of "
        f"{loads.now.sum() / (steps * layers):,.0f} expert choices a layer in the mean; placed by the {window} batches "
        f"before, for {window}",
        markup=False,
    )
    for size, copies in configs:
        of_config = [row for row in rows if (row["ranks"], row["redundants"]) == (size, copies)]
        title = (
            f"{size} ranks, {copies} redundant expert{'s' * (copies != 1)} each; topology: {of_config[0]['topology']}"
        )
        console.print(_table(of_config, title, expert_bytes is not None))
    console.print(
        "imbalance: tokens of the busiest rank / mean, over batches and layers. copies: of a layer.\n"
        "moved: weights that ranks receive, over all layers, a batch in the mean: of experts that they did not hold\n"
        "for the batch before, and of all copies that a batch chooses. In training, all copies travel in every step.\n"
        f"time saved: if {TIME_MODEL}."
    )
    report = {
        "trace": str(trace),
        "experts": num_experts,
        "layers": layers,
        "batches": steps,
        "window": window,
        "expert_bytes": expert_bytes,
        "time_model": TIME_MODEL,
        "rows": rows,
    }
    if json is not None:
        json.write_text(json_format.dumps(report, indent=1) + "\n")
    if plot is not None:
        _draw(judged, configs, plot)


def _numbers(
    one: _simulate.Judged, base: np.ndarray, loads: _simulate.Windows, layers: int, expert_bytes: float | None
) -> dict[str, Any]:
    """What the table and the JSON say of a placement; `base`: the imbalances without copies."""
    tokens = loads.now.sum(axis=-1)
    percentiles = {f"p{percent}": float(np.percentile(one.imbalance, percent)) for percent in (50, 95, 99)}
    moved = one.moved * layers
    return {
        "imbalance": percentiles | {"worst": float(one.imbalance.max())},
        "copies": one.copies,
        "experts_moved": moved,
        "bytes_moved": None if expert_bytes is None else moved * expert_bytes,
        "time_saved": 1 - float(np.sum(one.imbalance * tokens) / max(np.sum(base * tokens), 1)),
    }


def _table(rows: list[dict[str, Any]], title: str, in_bytes: bool) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("placement", no_wrap=True)
    for name in ("median", "95 %", "99 %", "worst", "copies", "moved", "time saved"):
        table.add_column(name, justify="right", no_wrap=True)
    reasons = []
    for row in rows:
        if "does_not_fit" in row:
            reasons.append(f"{TITLES[row['placement']]} does not fit: {row['does_not_fit']}")
            table.add_row(TITLES[row["placement"]], *["-"] * 7)
            continue
        moved = decimal(round(row["bytes_moved"])) if in_bytes else f"{row['experts_moved']:.1f} experts"
        imbalances = (f"{value:.3f}" for value in row["imbalance"].values())
        saved = f"{row['time_saved']:.1%}"
        table.add_row(TITLES[row["placement"]], *imbalances, f"{row['copies']:.1f}", moved, saved)
    if reasons:
        table.caption, table.caption_justify = "\n".join(reasons), "left"
    return table


def _draw(judged: dict[tuple[int, int, Kind], np.ndarray], configs: list[tuple[int, int]], path: Path) -> None:
    """The imbalance over the share of batches and layers that are no worse, for each placement; a panel a config."""
    figure = _figure()
    figure.set(figwidth=4 * len(configs), figheight=3.6, layout_engine="constrained")
    axes = figure.subplots(1, len(configs), sharey=True, squeeze=False)
    for axis, config in zip(axes[0], configs, strict=True):
        for kind, colour in zip(KINDS, COLOURS, strict=True):
            if (imbalance := judged.get((*config, kind))) is not None:
                values = np.sort(imbalance, axis=None)
                axis.plot(np.arange(1, values.size + 1) / values.size * 100, values, color=colour, label=TITLES[kind])
        axis.set(title="{} ranks, {} redundant each".format(*config), xlabel="% of batches and layers")
    axes[0, 0].set(ylabel="imbalance (max / mean rank load)")
    axes[0, -1].legend(frameon=False, fontsize="small", loc="upper left")
    figure.savefig(path, dpi=150)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        _stop("--plot needs matplotlib: pip install matplotlib")
    return Figure()


def _expert_bytes(expert_mb: float | None, widths: tuple[int, int] | None) -> float | None:
    if expert_mb is not None and widths is not None:
        _stop("--expert-mb and --widths say the same; pass one of them")
    if widths is not None:
        _check("--widths", widths, 1)
        return 3 * widths[0] * widths[1] * 2
    if expert_mb is None:
        return None
    if not 0 < expert_mb < np.inf:
        _stop(f"--expert-mb must be positive and finite, got {expert_mb}")
    return expert_mb * 1e6


def _check(option: str, numbers: tuple[int, ...], least: int) -> None:
    if not numbers:
        _stop(f"{option} needs a number or more")
    for number in numbers:
        if number < least:
            _stop(f"{option} must be at least {least}, got {number}")


def _check_writable(option: str, path: Path | None) -> None:
    if path is None:
        return
    if option == "--plot":
        formats = _figure().canvas.get_supported_filetypes()
        if path.suffix[1:] not in formats:
            _stop(f"--plot must end in one of {', '.join('.' + name for name in formats)}, got {path}")
    try:
        path.open("ab").close()
    except OSError as error:
        _stop(f"{option}: cannot write {path}: {error.strerror}")


def _stop(message: str) -> NoReturn:
    raise SystemExit(f"jax-lplb: {message}")


def _console() -> Console:
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = 120  # rich assumes 80 columns of a log file, and cuts tables
    return console
