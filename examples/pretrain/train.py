"""Pretrains a Mixture-of-Experts transformer: `python train.py tiny`. See ../README.md."""

import errno
import os
import signal
import time
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from checkpoint import Checkpoints
from config import Config, check, parse
from data import Corpus, on_devices, read, unigram_entropy
from placement import place
from report import Recorder
from step import Trainer, mesh_of, past_load

# XLA's flags, one for each reason. What the caller's XLA_FLAGS say stands.
FLAGS = {
    # Eight virtual devices stand in for GPUs where there are none.
    "xla_force_host_platform_device_count": "8",
    # Runs collectives (dispatch, copies of experts, gradients) beside the computation that does not need them.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
}


class Stop:
    """Ctrl-C or SIGTERM asks for the end after the current step; a second Ctrl-C ends at once."""

    def __init__(self, step: int) -> None:
        """Signals are handled from `with` on; `step` is what the run starts from."""
        self._asked, self._processes = False, jax.process_count()
        # Asked once before the first step: JAX counts from the last step it was asked for, and else from 0.
        self._agreed = self._processes > 1 and multihost_utils.reached_preemption_sync_point(step)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        # Of several processes JAX handles SIGTERM, so that all of them stop at the same step.
        signals = (signal.SIGINT, signal.SIGTERM) if self._processes == 1 else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, self._before[number])
        if self._processes > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def at(self, step: int) -> bool:
        """Whether to end after this step; every process has to ask after each."""
        if self._processes == 1:
            return self._asked
        self._agreed |= multihost_utils.reached_preemption_sync_point(step)
        return self._agreed


def train(config: Config) -> None:
    """Runs until the last step or an interruption; goes on from the folder's newest checkpoint."""
    ranks = check(config, jax.device_count())
    processes, process = jax.process_count(), jax.process_index()
    text = read(config.data)
    corpus, entropy = Corpus(text, config), unigram_entropy(text)
    config.out.mkdir(parents=True, exist_ok=True)
    mesh = mesh_of(ranks)
    placement = place(config, ranks, np.zeros((config.model.layers, config.model.experts)))
    trainer = Trainer(config, mesh, placement)
    with Checkpoints(config, ranks, trainer) as checkpoints, Stop(start := checkpoints.latest or 0) as stop:
        if start:
            state, placement = checkpoints.restore()
        else:
            state, placement = trainer.create(), trainer.put(placement)
        with Recorder(config, start) as recorder:
            recorder.say(
                f"{jax.device_count()} x {jax.devices()[0].device_kind}, experts over {ranks}; "
                f"{trainer.num_parameters:,} parameters; {len(text):,} bytes of text, unigram entropy {entropy:.4f} "
                f"nats a byte" + (f"; going on after step {start}" if start else "")
            )
            batches = corpus.training(start, processes, process)
            step, stopped = start, False
            while step < config.steps and not stopped:
                begun = time.perf_counter()
                state, metrics = trainer.step(state, placement, on_devices(next(batches), mesh))
                step += 1
                recorder.push(step, metrics, begun)
                stopped, last = stop.at(step), step == config.steps
                if config.placing.balance and _due(step, config.placing.placement_every) and not last:
                    new = trainer.put(place(config, ranks, past_load(state)))
                    state, placement = trainer.move(state, placement, new), new
                if _due(step, config.validate_every) or last:
                    recorder.flush()
                    losses = [
                        trainer.validate(state, placement, on_devices(batch, mesh))
                        for batch in corpus.validation(processes, process)
                    ]
                    recorder.validated(step, float(np.mean(jax.device_get(losses))))
                if _due(step, config.checkpoint_every) or stopped or last:
                    recorder.flush()  # ends a run whose loss or gradients are no numbers, before it is kept
                    recorder.save_loads()
                    checkpoints.save(step, state, placement)
            recorder.finish(step, trainer.num_parameters, entropy)
            if stopped and step < config.steps:
                recorder.say(f"stopped after step {step}; the same command goes on from there")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line, and says in a line what the user can mend."""
    config = parse(arguments)
    compute, given = config.compute, os.environ.get("XLA_FLAGS", "")
    # Read when JAX first looks for its devices, not when it is imported.
    os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{key}={FLAGS[key]}" for key in FLAGS if key not in given)])
    if not compute.distributed and (compute.coordinator, compute.processes, compute.process) != (None, None, None):
        raise SystemExit("train: --coordinator, --processes and --process go with --distributed")
    if compute.distributed:
        try:
            jax.distributed.initialize(compute.coordinator, compute.processes, compute.process)
        except ValueError as error:
            raise SystemExit(
                f"train: --distributed: no cluster manager found; give --coordinator, --processes, --process: {error}"
            ) from None
    try:
        train(config)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        raise SystemExit(f"train: {error}") from None
    except Exception as error:
        # Orbax writes in the background and reports a full disk in its own way.
        if os.strerror(errno.ENOSPC) in str(error):
            raise SystemExit(f"train: {config.out}: {os.strerror(errno.ENOSPC)}") from None
        raise


if __name__ == "__main__":
    main()
