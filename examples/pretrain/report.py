"""What a run tells: the terminal, metrics.jsonl, TensorBoard, recorded loads, a figure and a summary."""

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

import flax
import jax
import numpy as np
from tensorboardX import SummaryWriter

from compare import IMBALANCES, SETTLED, column, draw, read_lines
from config import Config
from flops import per_token, utilisation
from terminal import Terminal

ROUTING = {
    "learned": "learned",
    "even": "even, each expert equally often and at random, whatever the router says: the throughput is a ceiling, and "
    "nothing of use is trained",
}


class Recorder:
    """Takes each step's metrics from the devices one step late, so that these never wait for the host.

    Writes summary.json and training.png at the end, whatever it is that ends the run.
    """

    def __init__(self, config: Config, terminal: Terminal, start: int, about: dict[str, Any]) -> None:
        """Steps after `start`, left by a run that ended without a checkpoint of them, are forgotten.

        `about` goes into the summary.
        """
        self._config, self._terminal, self._about = config, terminal, about
        self._writes = jax.process_index() == 0
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._start, self._kept, self._since = start, start, 0.0
        self.validation_loss = math.nan
        if not self._writes:
            return
        self._loads = self._earlier_loads(start)
        self._metrics = _reopen(config.out / "metrics.jsonl", start)
        self._validation = _reopen(config.out / "validation.jsonl", start)
        for line in read_lines(config.out / "validation.jsonl"):
            self.validation_loss = line["validation_loss"]
        self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not self._writes:
            return
        for file in (self._metrics, self._validation, self._board):
            file.close()
        if error is None:
            self._finish("stopped")
        elif not isinstance(error, KeyboardInterrupt):
            with contextlib.suppress(OSError):  # as on a full disk; the run's own error is to be told
                self._finish(str(error).removeprefix("train: "))

    def about(self, more: dict[str, Any]) -> None:
        """What else goes into the summary."""
        self._about |= more

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
        self._terminal.say(f"step {step}: validation loss {loss:.4f}")
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
                again = f"go on from the checkpoint of step {self._kept}" if self._kept else "start again"
                raise SystemExit(
                    f"train: the {name} of step {step} is {value}; {again} with a lower --learning-rate or --clip-norm"
                )
        if not self._writes:
            return
        data = self._config.data
        timed = step > self._start + 1  # the first step after a start is slow, and says nothing of the others
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "lr": float(values["lr"]),
            "grad_norm": float(values["grad_norm"]),
            "tokens_per_s": data.batch * data.seq_len / seconds if timed else None,
            "seconds": seconds if timed else None,
            **{f"{name}_mean": float(np.mean(values[name])) for name in IMBALANCES},
            **{f"{name}_max": float(np.max(values[name])) for name in IMBALANCES},
            "rounds": int(np.max(values["rounds"])),
            "moved": float(np.mean(values["moved"])),
        }
        self._loads[step] = values["load"]
        self._metrics.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, step)
        speed, mfu = f"{row['tokens_per_s']:,.0f}" if timed else "-", self._mfu(row["tokens_per_s"])
        imbalance = ", ".join(f"{title} {row[f'{name}_mean']:.2f}" for name, title in IMBALANCES.items())
        self._terminal.step(
            step,
            [
                f"loss {loss:.4f}  {speed} tokens/s{'' if mfu is None else f'  MFU {mfu:.1%}'}  rounds {row['rounds']}",
                f"imbalance: {imbalance}",
            ],
            log=step % self._config.log_every == 0,
        )

    def _mfu(self, tokens_per_s: float | None) -> float | None:
        return utilisation(self._config, tokens_per_s, jax.device_count(), jax.devices()[0].device_kind)

    def saved(self, step: int) -> None:
        """There is a checkpoint of this step; the recorded loads go with it."""
        self._kept = step
        self._save_loads()

    def _save_loads(self) -> None:
        """Writes loads.npz: `loads`, int32 [steps, layers, experts], and `steps`, int32 [steps], which these are."""
        if self._writes and self._loads:
            part = self._config.out / "loads.part.npz"
            np.savez_compressed(
                part, loads=np.stack(list(self._loads.values())), steps=np.array(list(self._loads), np.int32)
            )
            part.replace(self._config.out / "loads.npz")

    def _finish(self, ended: str) -> None:
        self._save_loads()
        out = self._config.out
        rows = read_lines(out / "metrics.jsonl")
        if not rows:
            return

        def median(name: str) -> float | None:
            values = column(rows[SETTLED if len(rows) > SETTLED else 0 :], name)
            known = values[np.isfinite(values)]
            return float(np.median(known)) if known.size else None

        device, step = jax.devices()[0], rows[-1]["step"]
        finished = step >= self._config.steps
        medians = {name: median(name) for name in rows[-1] if name != "step"}
        summary = {
            "finished": finished,
            "ended": "finished" if finished else ended,
            "steps": step,
            "device": f"{jax.device_count()} x {device.device_kind}",
            "processes": jax.process_count(),
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
            **self._about,
            "loss": float(np.mean(column(rows[-SETTLED:], "loss"))),
            "validation_loss": None if math.isnan(self.validation_loss) else self.validation_loss,
            "routing": ROUTING[self._config.model.route],
            "flops_per_token": per_token(self._config),
            "mfu": self._mfu(medians["tokens_per_s"]),
            "median": medians,
            "config": dataclasses.asdict(self._config),
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
        draw([out], out / "training.png")
        self._terminal.say(f"results are in {out}: training.png, summary.json, metrics.jsonl, loads.npz, tensorboard")

    def _earlier_loads(self, start: int) -> dict[int, np.ndarray]:
        path = self._config.out / "loads.npz"
        if not path.exists():
            return {}
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                earlier = zip(archive["steps"].tolist(), archive["loads"], strict=True)
                return {step: load for step, load in earlier if step <= start}
        except Exception:  # of NumPy, zipfile or zlib, by where it was cut
            self._terminal.say(f"{path} cannot be read; the recording of loads begins anew after step {start}")
            return {}


def _reopen(path: Path, start: int) -> TextIO:
    kept = [line for line in read_lines(path) if line["step"] <= start]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return path.open("a", buffering=1)
