"""What commands that judge placements share: the recording, rows of numbers, and tables."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import numpy as np
import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table

from jax_lplb import _simulate
from jax_lplb._cli import trace as traces

TITLES: dict[_simulate.Kind, str] = {
    "none": "no copies",
    "eplb_even": "EPLB, even split",
    "topology": "topology, LP",
    "topology_repeats": "topology, repeats, LP",
    "eplb": "EPLB, LP",
    "per_batch": "per batch",
}
TIME_MODEL = "the experts of a layer take time in proportion to the tokens of the busiest rank"
_NOTES = {
    "slots": "for copies, of each rank and layer.",
    "imbalance": "tokens of the busiest rank / mean, over batches and layers.",
    "copies": "of a layer, in the mean.",
    "memory": "what the slots of a rank hold, over all layers.",
    "moved": "weights that ranks receive, over all layers, a batch in the mean: of experts that they did not hold for "
    "the batch before, and of all copies that a batch chooses. In training, all copies travel in every step.",
    "time saved": f"if {TIME_MODEL}.",
}


def notes(columns: Sequence[str]) -> dict[str, str]:
    """What columns say."""
    return {name: note for name, note in _NOTES.items() if name in (*columns, "imbalance")}


@dataclasses.dataclass(frozen=True)
class Recording:
    """What is judged, and where the results go."""

    trace: tyro.conf.Positional[Path]
    """The folder of a Recorder, or an .npz, .npy or .json file, with one of these: counts or logical_count [steps,
    layers, experts]; topk_ids [tokens, layers, k]; expert_load_window [steps, layers, slots], beside
    physical_to_logical_map [layers, slots]. The name of an .npy says which it is."""
    window: int = 8
    """Batches to place by, and as many to judge on."""
    batch_tokens: int = 512
    """Tokens of a batch, where the trace has topk_ids."""
    experts: int | None = None
    """How many there are, where the trace has topk_ids; by default one more than the highest."""
    expert_mb: float | None = None
    """Weights of one expert, in megabytes."""
    widths: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="D_MODEL D_EXPERT")] = None
    """The same by widths, of a SwiGLU expert in 16 bits: 3 x d_model x d_expert x 2 bytes."""
    json: Path | None = None
    """Writes all numbers to this file."""
    plot: Path | None = None
    """Draws the imbalances to this picture; or a page, .html, which shows rank loads and all numbers, too."""


class Row(NamedTuple):
    """One placement, judged or not.

    Attributes:
      title: in tables and pictures.
      numbers: what JSON says of it; with `does_not_fit`, the reason, where it was not judged.
      imbalance: of all batches and layers; None likewise.
    """

    candidate: _simulate.Candidate
    title: str
    numbers: dict[str, Any]
    imbalance: np.ndarray | None

    @property
    def reason(self) -> str | None:
        """Why it was not judged."""
        return self.numbers.get("does_not_fit")

    @property
    def named(self) -> str:
        """The title, with the number of slots for copies."""
        slots = self.candidate.redundants
        return self.title + f", {slots} slot{'s' * (slots != 1)} of each rank" * (self.candidate.kind != "none")

    @property
    def order(self) -> tuple[float, ...]:
        """By imbalance, then memory, then traffic: the least is the best."""
        imbalance = self.numbers["imbalance"]
        return imbalance["p95"], imbalance["p50"], self.candidate.redundants, self.numbers["experts_moved"]


COLUMNS = {
    "slots": lambda row: str(row.candidate.redundants),
    "median": lambda row: f"{row.numbers['imbalance']['p50']:.3f}",
    "95 %": lambda row: f"{row.numbers['imbalance']['p95']:.3f}",
    "99 %": lambda row: f"{row.numbers['imbalance']['p99']:.3f}",
    "worst": lambda row: f"{row.numbers['imbalance']['worst']:.3f}",
    "copies": lambda row: f"{row.numbers['copies']:.1f}",
    "memory": lambda row: weights(row, "slots", 0),
    "moved": lambda row: weights(row, "moved", 1),
    "time saved": lambda row: f"{row.numbers['time_saved']:.1%}",
}


def weights(row: Row, what: str, digits: int) -> str:
    """How many experts, in bytes where it is known how many one has."""
    in_bytes = row.numbers[f"bytes_{what}"]
    return f"{row.numbers[f'experts_{what}']:.{digits}f} experts" if in_bytes is None else decimal(round(in_bytes))


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """The title and a cell for each column."""
    return [row.title, *("-" if row.reason else COLUMNS[name](row) for name in columns)]


def labels(rows: Sequence[Row]) -> list[str]:
    """Of each row its title; with the number of slots, where rows differ in it."""
    several = len({row.candidate.redundants for row in rows if row.candidate.kind != "none"}) > 1
    return [row.named if several else row.title for row in rows]


def reasons(rows: Sequence[Row]) -> list[str]:
    """A line for each that was not judged."""
    return [f"{label} does not fit: {row.reason}" for label, row in zip(labels(rows), rows, strict=True) if row.reason]


def table(rows: Sequence[Row], title: str | None, columns: Sequence[str]) -> Table:
    """For the console, with `reasons` below."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    made.add_column("placement", no_wrap=True)
    for name in columns:
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*cells(row, columns))
    if said := reasons(rows):
        made.caption, made.caption_justify = "\n".join(said), "left"
    return made


class Study:
    """Recorded loads, cut into windows, and placements judged on them."""

    def __init__(self, recording: Recording) -> None:
        """Reads the trace, and checks all options of the recording."""
        check("--window", (recording.window,), 1)
        check("--batch-tokens", (recording.batch_tokens,), 1)
        check("--experts", (1 if recording.experts is None else recording.experts,), 1)
        self.recording, window = recording, recording.window
        self.expert_bytes = _expert_bytes(recording.expert_mb, recording.widths)
        try:
            sequences = traces.read(recording.trace, recording.batch_tokens, recording.experts)
        except traces.BadTraceError as error:
            stop(str(error))
        longest = max(map(len, sequences))
        if longest < 2 * window:
            cure = f"pass --window {longest // 2} or less" if longest > 1 else "record more of them"
            stop(
                f"{recording.trace} has {longest} batches in sequence, and --window {window} takes {2 * window}: {cure}"
            )
        self.loads = _simulate.windows(sequences, window, window)
        self.layers, self.experts = sequences[0].shape[1:]
        self.steps = self.loads.now[..., 0].size // self.layers
        self.choices = self.loads.now.sum() / (self.steps * self.layers)
        self._without_copies: dict[int, np.ndarray] = {}

    @property
    def header(self) -> str:
        """What is judged, in a line."""
        return (
            f"{self.recording.trace}: {self.experts} experts, {self.layers} layers, {self.steps} batches judged, of "
            f"{self.choices:,.0f} expert choices a layer in the mean; placed by the {self.recording.window} batches "
            f"before, for {self.recording.window}"
        )

    @property
    def report(self) -> dict[str, Any]:
        """What JSON says of the recording."""
        return {
            "trace": str(self.recording.trace),
            "experts": self.experts,
            "layers": self.layers,
            "batches": self.steps,
            "window": self.recording.window,
            "expert_bytes": self.expert_bytes,
            "time_model": TIME_MODEL,
        }

    def without_copies(self, ranks: int) -> np.ndarray:
        """The imbalance of all batches and layers [batches, placements], of experts in logical order."""
        if ranks not in self._without_copies:
            self._without_copies[ranks] = _simulate.judge(_simulate.Candidate("none", ranks, 0), self.loads).imbalance
        return self._without_copies[ranks]

    def layer(self, number: int, most: int) -> _simulate.Windows:
        """The last windows of one layer, of up to `most` batches."""
        past, now, before = self.loads
        first = max(len(past) - max(most // len(now), 1) * self.layers, 0)
        last = slice(first + number, None, self.layers)
        return _simulate.Windows(past[last], now[:, last], before[last])

    def judge(self, tried: dict[_simulate.Candidate, str], most_bytes: float = np.inf) -> list[Row]:
        """Rows for candidates by their titles; those whose slots take more memory of a rank do not fit."""
        errors = Console(stderr=True)
        return [
            self._judge(candidate, title, most_bytes)
            for candidate, title in track(
                tried.items(), "Judging", console=errors, transient=True, disable=not errors.is_terminal
            )
        ]

    def _judge(self, candidate: _simulate.Candidate, title: str, most_bytes: float) -> Row:
        slots = 0 if candidate.kind == "none" else candidate.redundants * self.layers
        in_bytes = None if self.expert_bytes is None else slots * self.expert_bytes
        numbers: dict[str, Any] = {
            "ranks": candidate.ranks,
            "redundants": candidate.redundants,
            "topology": candidate.topology,
            "num_groups": candidate.groups,
            "placement": candidate.kind,
            "experts_slots": slots,
            "bytes_slots": in_bytes,
        }
        if in_bytes is not None and in_bytes > most_bytes:
            reason = f"its slots take {decimal(round(in_bytes))} of a rank, more than {decimal(round(most_bytes))}"
            return Row(candidate, title, numbers | {"does_not_fit": reason}, None)
        try:
            judged = _simulate.judge(candidate, self.loads)
        except ValueError as error:
            return Row(candidate, title, numbers | {"does_not_fit": str(error)}, None)
        tokens = self.loads.now.sum(axis=-1)
        before = np.sum(self.without_copies(candidate.ranks) * tokens)
        percentiles = {f"p{percent}": float(np.percentile(judged.imbalance, percent)) for percent in (50, 95, 99)}
        moved = judged.moved * self.layers
        numbers |= {
            "imbalance": percentiles | {"worst": float(judged.imbalance.max())},
            "copies": judged.copies,
            "experts_moved": moved,
            "bytes_moved": None if self.expert_bytes is None else moved * self.expert_bytes,
            "time_saved": 1 - float(np.sum(judged.imbalance * tokens) / max(before, 1)),
        }
        return Row(candidate, title, numbers, judged.imbalance)


def _expert_bytes(expert_mb: float | None, widths: tuple[int, int] | None) -> float | None:
    if expert_mb is not None and widths is not None:
        stop("--expert-mb and --widths say the same; pass one of them")
    if widths is not None:
        check("--widths", widths, 1)
        return 3 * widths[0] * widths[1] * 2
    if expert_mb is None:
        return None
    check_positive("--expert-mb", expert_mb)
    return expert_mb * 1e6


def check_positive(option: str, number: float) -> None:
    """Positive and finite."""
    if not 0 < number < np.inf:
        stop(f"{option} must be positive and finite, got {number}")


def check(option: str, numbers: tuple[int, ...], least: int) -> None:
    """One or more, none below `least`."""
    if not numbers:
        stop(f"{option} needs a number or more")
    for number in numbers:
        if number < least:
            stop(f"{option} must be at least {least}, got {number}")


def stop(message: str) -> NoReturn:
    """Ends the command, with one line."""
    raise SystemExit(f"jax-lplb: {message}")
