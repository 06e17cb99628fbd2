"""Checkpoints by Orbax. What belongs to experts is in logical order: any number of ranks can load it."""

import contextlib
import dataclasses
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from rich.filesize import decimal

import jax_lplb as lplb
from config import Config, Model
from placement import place
from step import State, Trainer, past_load


class Checkpoints:
    """Those of a run, in its folder; written while training goes on."""

    def __init__(self, config: Config, ranks: int, trainer: Trainer) -> None:
        """Opens or makes the folder."""
        self._config, self._ranks, self._trainer = config, ranks, trainer
        self._folder = _folder(config)
        self._manager = ocp.CheckpointManager(
            self._folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=config.keep)
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, step: int, state: State, placement: lplb.Placement) -> None:
        """Copies the state; its files are written in the background."""
        if step == self._manager.latest_step():
            return
        # Found out while writing, a full disk would be reported in hundreds of lines.
        _require(self._config, self._trainer, 1)
        about = self._about() | {"phy2log": placement.phy2log, "log2phy": placement.log2phy}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_stored(self._trainer.to_logical(state, placement))),
                about=ocp.args.JsonSave(jax.tree.map(lambda x: x.tolist() if hasattr(x, "tolist") else x, about)),
            ),
        )

    def restore(self, say: Callable[[str], None]) -> tuple[int, State, lplb.Placement] | None:
        """The newest that is whole, with its step; those after it are moved away. None where there are none at all.

        With its placement, or where ranks or settings are others now with a new one, by its average of loads if any.
        """
        with _no_stragglers():
            return self._restore_newest(say)

    def _restore_newest(self, say: Callable[[str], None]) -> tuple[int, State, lplb.Placement] | None:
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            result, reason = None, ""
            try:
                result = self._restore(step)
            except jax.errors.JaxRuntimeError:
                raise  # such as too little memory, for which files are not to blame
            except Exception as error:  # of all kinds, by what is missing or cut
                reason = str(error.args[0] if error.args else error).partition("\n")[0][:100]
            if np.all(multihost_utils.process_allgather(result is not None)) and result is not None:
                self._move_away(damaged, step, say)
                return step, *result
            damaged[step] = reason
        if damaged:
            newest = max(damaged)
            raise SystemExit(
                f"train: {self._folder}: no checkpoint can be read (the newest, of step {newest}: {damaged[newest]}); "
                "choose another --out, or remove that folder to start again"
            )
        return None

    def _move_away(self, damaged: dict[int, str], whole: int, say: Callable[[str], None]) -> None:
        for step, reason in damaged.items():
            away = self._config.out / "damaged" / str(step)
            if jax.process_index() == 0:
                shutil.rmtree(away, ignore_errors=True)
                away.parent.mkdir(exist_ok=True)
                (self._folder / str(step)).rename(away)
            say(f"the checkpoint of step {step} cannot be read ({reason}), and is now {away}; taking that of {whole}")
        multihost_utils.sync_global_devices("damaged checkpoints are away")
        self._manager.reload()

    def _restore(self, step: int) -> tuple[State, lplb.Placement]:
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        now = self._about()
        model = dataclasses.asdict(Model()) | about["model"]  # defaults of settings that are newer than the checkpoint
        if model != now["model"]:
            differ = ", ".join(f"{key} {model[key]}" for key in now["model"] if now["model"][key] != model[key])
            raise SystemExit(
                f"train: {self._config.out} holds a checkpoint of another model, with {differ}; choose the same or "
                "another --out"
            )
        load: Any = None
        # One that does not say what copies it was with is older than the choice, and has an average of loads.
        if about["placing"].get("copies", "past") == "past":
            shape = (self._config.model.layers, self._config.model.experts)
            load = jax.ShapeDtypeStruct(shape, np.float32, sharding=self._trainer.everywhere)
        stored: Any = _stored(self._trainer.abstract._replace(load=load))
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(stored)))
        state = State(**{"load": None} | restored.state)
        if state.load is None or not self._trainer.past:
            state = state._replace(load=self._trainer.first_load())
        placement = place(self._config, self._ranks, past_load(state))
        if about["placing"] == now["placing"]:
            placement = dataclasses.replace(
                placement,
                phy2log=np.asarray(about["phy2log"], np.int32),
                log2phy=np.asarray(about["log2phy"], np.int32),
            )
        placement = self._trainer.put(placement)
        # Checkpoints are in logical order: weights and moments are brought to where the placement has their experts.
        return self._trainer.from_logical(state, placement), placement

    def _about(self) -> dict[str, Any]:
        placing = self._config.placing
        shape = {
            "ranks": self._ranks,
            **{name: getattr(placing, name) for name in ("copies", "placement", "redundants")},
        }
        return {"model": dataclasses.asdict(self._config.model), "placing": shape}


def require_space(config: Config, trainer: Trainer) -> None:
    """Ends with one line, before the first step, where the disk has no room for the checkpoints that are to come."""
    if config.checkpoint_every == 0:
        return
    done = [int(path.name) for path in _folder(config).glob("[0-9]*")]
    to_come = math.ceil((config.steps - max(done, default=0)) / config.checkpoint_every)
    _require(config, trainer, min(to_come, max(config.keep + 1 - len(done), 1)))  # the oldest goes after the newest


def _stored(state: State) -> dict[str, Any]:
    """What a checkpoint has of it."""
    return {name: value for name, value in state._asdict().items() if value is not None}


def _require(config: Config, trainer: Trainer, number: int) -> None:
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract))
    disk = next(path for path in (config.out, *config.out.absolute().parents) if path.is_dir())
    free = int(multihost_utils.broadcast_one_to_all(np.float64(shutil.disk_usage(disk).free)))
    if free < number * size:
        raise SystemExit(
            f"train: {config.out}: no space left: a checkpoint takes {decimal(size)}, room for {number} is needed "
            f"(--keep {config.keep}), and {decimal(free)} are free"
        )


def _folder(config: Config) -> Path:
    return config.out / "checkpoints"


@contextlib.contextmanager
def _no_stragglers() -> Iterator[None]:
    """Without the tracebacks of reads that end after Orbax gave up on a checkpoint and closed their event loop."""
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        if "Event loop is closed" not in str(raised.exc_value):
            before(raised)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
