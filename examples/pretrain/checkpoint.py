"""Checkpoints by Orbax. What belongs to experts is in logical order: any number of ranks can load it."""

import dataclasses
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import jax_lplb as lplb
from config import Config
from placement import place
from step import State, Trainer, past_load


class Checkpoints:
    """Those of a run, in its folder; written while training goes on."""

    def __init__(self, config: Config, ranks: int, trainer: Trainer) -> None:
        """Opens or makes the folder."""
        self._config, self._ranks, self._trainer = config, ranks, trainer
        self._manager = ocp.CheckpointManager(
            (config.out / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=config.keep)
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Updates that the newest checkpoint has, if there is one."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, placement: lplb.Placement) -> None:
        """Copies the state; its files are written in the background."""
        if step == self.latest:
            return
        # Found out while writing, a full disk would be reported in hundreds of lines.
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        free = int(multihost_utils.broadcast_one_to_all(np.float64(shutil.disk_usage(self._config.out).free)))
        if free < needed:
            raise SystemExit(
                f"train: {self._config.out}: no space left: a checkpoint takes {needed / 1e9:.3f} GB, and there are "
                f"{free / 1e9:.3f} GB"
            )
        about = self._about() | {"phy2log": placement.phy2log, "log2phy": placement.log2phy}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(self._trainer.to_logical(state, placement)._asdict()),
                about=ocp.args.JsonSave(jax.tree.map(lambda x: x.tolist() if hasattr(x, "tolist") else x, about)),
            ),
        )

    def restore(self) -> tuple[State, lplb.Placement]:
        """The newest; with its placement, or one by its average of loads where ranks or settings are others now."""
        step = self.latest
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        now = self._about()
        if about["model"] != now["model"]:
            differ = ", ".join(
                f"{key} {about['model'].get(key)}"
                for key in now["model"]
                if now["model"][key] != about["model"].get(key)
            )
            raise SystemExit(
                f"train: {self._config.out} holds a checkpoint of another model, with {differ}; choose the same or "
                "another --out"
            )
        abstract: Any = self._trainer.abstract._asdict()
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        state = State(**restored.state)
        placement = place(self._config, self._ranks, past_load(state))
        if about["placing"] == now["placing"]:
            placement = dataclasses.replace(
                placement,
                phy2log=np.asarray(about["phy2log"], np.int32),
                log2phy=np.asarray(about["log2phy"], np.int32),
            )
        placement = self._trainer.put(placement)
        return self._trainer.from_logical(state, placement), placement

    def _about(self) -> dict[str, Any]:
        placing = self._config.placing
        shape = {
            "ranks": self._ranks,
            **{name: getattr(placing, name) for name in ("balance", "placement", "redundants")},
        }
        return {"model": dataclasses.asdict(self._config.model), "placing": shape}
