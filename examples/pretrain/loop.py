"""The training loop: from the newest checkpoint to the last step, a signal, or what ends it before."""

import os
import signal
import tempfile
import time
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from checkpoint import Checkpoints, require_space
from config import Config, check
from data import Corpus, on_devices, read, unigram_entropy
from placement import place
from report import ROUTING, Recorder
from step import Trainer, mesh_of, past_load
from terminal import Terminal


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


def train(config: Config, terminal: Terminal, trainer: Trainer | None = None) -> None:
    """Runs until the last step or an interruption; goes on from the folder's newest checkpoint.

    `trainer`: one of this configuration that is there already.
    """
    ranks = check(config, jax.device_count())
    placement = place(config, ranks)
    terminal.stage("reading the text")
    text = read(config.data, terminal.say)
    corpus, entropy = Corpus(text, config), unigram_entropy(text)
    terminal.stage("tracing the model")
    trainer = trainer or Trainer(config, mesh_of(ranks), placement)
    mesh = trainer.mesh
    # Nothing is left behind by what was refused up to here.
    require_space(config, trainer)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.out).close()
    except OSError as error:
        raise SystemExit(f"train: --out: cannot write to the folder {config.out}: {error.strerror}") from None
    terminal.say(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, experts over {ranks}; "
        f"{trainer.num_parameters:,} parameters; {len(text):,} bytes of text, unigram entropy {entropy:.4f} nats a byte"
    )
    with Checkpoints(config, ranks, trainer) as checkpoints:
        terminal.stage("making the parameters, or reading a checkpoint")
        start, state, placement = checkpoints.restore(terminal.say) or (0, trainer.create(), trainer.put(placement))
        if 0 < start < config.steps:
            terminal.say(f"going on after step {start}")
        if config.model.route == "even":
            terminal.say(f"routing is {ROUTING['even']}")
        about = {"parameters": trainer.num_parameters, "unigram_entropy": entropy}
        with Recorder(config, terminal, start, about) as recorder, Stop(start) as stop:
            step, stopped, processes, process = start, False, jax.process_count(), jax.process_index()
            place_every = config.placing.placement_every if trainer.past else 0
            if start < config.steps:
                terminal.stage("compiling")
                ways = trainer.compile(placement, start)
                recorder.about(ways)
                terminal.say("tokens travel by {dispatch}, copies by {transport}".format(**ways))
                batches = corpus.training(start, processes, process)
                terminal.count(start, config.steps)
            while step < config.steps and not stopped:
                begun = time.perf_counter()
                state, metrics = trainer.step(state, placement, on_devices(next(batches), mesh))
                step += 1
                recorder.push(step, metrics, begun)
                stopped, last = stop.at(step), step == config.steps
                if _due(step, place_every) and not last:
                    new = trainer.put(place(config, ranks, past_load(state)))
                    state, placement = trainer.move(state, placement, new), new  # weights and moments go along
                if _due(step, config.validate_every, last):
                    recorder.flush()
                    terminal.stage("validating after step")
                    losses = [
                        trainer.validate(state, placement, on_devices(batch, mesh))
                        for batch in corpus.validation(processes, process)
                    ]
                    recorder.validated(step, float(np.mean(jax.device_get(losses))))
                if _due(step, config.checkpoint_every, stopped or last):
                    recorder.flush()  # ends a run whose loss or gradients are no numbers, before it is kept
                    terminal.stage("writing a checkpoint after step")
                    checkpoints.save(step, state, placement)
                    recorder.saved(step)
            recorder.flush()
    if start >= config.steps:
        terminal.say(
            f"nothing to do: {config.out} has {start} steps already; go on with a larger --steps, or start again with "
            "another --out"
        )
    elif step < config.steps:
        goes_on = "; the same command goes on from there" if config.checkpoint_every else ""
        terminal.say(f"stopped after step {step}{goes_on}")


def _due(step: int, every: int, end: bool = False) -> bool:
    return every > 0 and (end or step % every == 0)
