"""What a run tells: the terminal, metrics.jsonl, TensorBoard, recorded loads, a figure and a summary."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import TextIO

import flax
import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from compare import draw, read_lines
from config import Config

IMBALANCES = ("home", "optimum", "balanced")
SETTLED = 20  # steps before which the throughput is not counted


class Recorder:
    """Takes each step's metrics from the devices one step late, so that these never wait for the host."""

    def __init__(self, config: Config, start: int) -> None:
        """Steps after `start`, left by a run that ended without a checkpoint of them, are forgotten."""
        self._config, self._writes = config, jax.process_index() == 0
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._since = 0.0
        self.validation_loss = math.nan
        if not self._writes:
            return
        self._loads = _earlier_loads(config.out / "loads.npz", start)
        self._metrics = _reopen(config.out / "metrics.jsonl", start)
        self._validation = _reopen(config.out / "validation.jsonl", start)
        for line in read_lines(config.out / "validation.jsonl"):
            self.validation_loss = line["validation_loss"]
        self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=start + 1)
        self._console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("compiling", total=config.steps, completed=start)

    def __enter__(self) -> "Recorder":
        if self._writes:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._progress.stop()
            for file in (self._metrics, self._validation, self._board):
                file.close()

    def say(self, text: str) -> None:
        """A line on standard error, of process 0."""
        if self._writes:
            self._console.print(text, markup=False)

    def push(self, step: int, metrics: dict[str, jax.Array], begun: float) -> None:
        """Keeps what step number `step`, called at time `begun`, will have computed, and records the one before it."""
        before, self._pending = self._pending, (step, metrics)
        if before is None:
            self._since = begun
        else:
            self._record(*before)

    def flush(self) -> None:
        """Records the last step, once the devices have done it."""
        if self._pending is not None:
            before, self._pending = self._pending, None
            self._record(*before)

    def validated(self, step: int, loss: float) -> None:
        """Records a validation."""
        self.validation_loss = loss
        self.say(f"step {step}: validation loss {loss:.4f}")
        if self._writes:
            self._validation.write(json.dumps({"step": step, "validation_loss": loss}) + "\n")
            self._board.add_scalar("validation_loss", loss, step)

    def _record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        loss = float(values["loss"])
        for name, value in (("loss", loss), ("norm of the gradients", float(values["grad_norm"]))):
            if not math.isfinite(value):
                raise SystemExit(
                    f"train: the {name} of step {step} is {value}; run again, from the last checkpoint, with a lower "
                    "--learning-rate or --clip-norm"
                )
        if not self._writes:
            return
        data = self._config.data
        row = {
            "step": step,
            "loss": loss,
            "lr": float(values["lr"]),
            "grad_norm": float(values["grad_norm"]),
            "tokens_per_s": data.batch * data.seq_len / seconds,
            "seconds": seconds,
            **{f"{name}_mean": float(np.mean(values[name])) for name in IMBALANCES},
            **{f"{name}_max": float(np.max(values[name])) for name in IMBALANCES},
            "rounds": int(np.max(values["rounds"])),
            "moved": float(np.mean(values["moved"])),
        }
        self._loads.append(values["load"])
        self._metrics.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        line = (
            f"loss {loss:.4f}  {row['tokens_per_s']:,.0f} tokens/s  imbalance {row['home_mean']:.2f} at home, "
            f"{row['optimum_mean']:.2f} optimum, {row['balanced_mean']:.2f} balanced  rounds {row['rounds']}"
        )
        self._progress.update(self._task, completed=step, description=line)
        if self._progress.disable and step % self._config.log_every == 0:
            self.say(f"step {step}/{self._config.steps}  {line}")

    def save_loads(self) -> None:
        """Writes loads.npz: `loads`, int32 [steps, layers, experts], tokens of each logical expert."""
        if self._writes and self._loads:
            part = self._config.out / "loads.part.npz"
            np.savez_compressed(part, loads=np.stack(self._loads))
            part.replace(self._config.out / "loads.npz")

    def finish(self, step: int, parameters: int, entropy: float) -> None:
        """Writes the loads, summary.json and training.png."""
        self.save_loads()
        rows = read_lines(self._config.out / "metrics.jsonl") if self._writes else []
        if not rows:
            return

        def median(name: str) -> float:
            return float(np.median([row[name] for row in rows[SETTLED if len(rows) > SETTLED else 0 :]]))

        device = jax.devices()[0]
        summary = {
            "finished": step == self._config.steps,
            "steps": step,
            "device": f"{jax.device_count()} x {device.device_kind}",
            "processes": jax.process_count(),
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
            "parameters": parameters,
            "unigram_entropy": entropy,
            "loss": float(np.mean([row["loss"] for row in rows[-SETTLED:]])),
            "validation_loss": None if math.isnan(self.validation_loss) else self.validation_loss,
            "median": {name: median(name) for name in rows[-1] if name != "step"},
            "config": dataclasses.asdict(self._config),
        }
        (self._config.out / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
        draw([self._config.out], self._config.out / "training.png")


def _reopen(path: Path, start: int) -> TextIO:
    kept = [line for line in read_lines(path) if line["step"] <= start]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return path.open("a", buffering=1)


def _earlier_loads(path: Path, start: int) -> list[np.ndarray]:
    if not path.exists():
        return []
    with np.load(path, allow_pickle=False) as archive:
        return list(archive["loads"][:start])
