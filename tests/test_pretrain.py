"""The pretraining example, in small: it learns, stops and goes on, and loads on other ranks."""

import dataclasses
import errno
import functools
import io
import json
import math
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("grain")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("tyro")
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples" / "pretrain"))

import compare
import flops
import loop
import report
import train
from checkpoint import Checkpoints, require_space
from config import PRESETS, Compute, Config, Data, Model, Optimiser, Placing, check, parse, settle
from data import Corpus, on_devices, read, unigram_entropy
from jax_lplb import _ffi
from jax_lplb._router import Router
from jax_lplb.flax import Metrics, MoE
from model import Block, EvenRouter, Transformer, even_choices, look_up
from placement import place
from step import METRICS, Trainer, mesh_of, past_load
from terminal import Terminal

STEPS, LAYERS, EXPERTS = 12, 2, 16
BY_PAST = Placing(copies="past", placement_every=5)
ABOUT = {"parameters": 1, "unigram_entropy": 3.0}


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """Optax promotes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    """A file of sentences of few words."""
    rng = np.random.default_rng(0)
    words = np.array(["load", "expert", "rank", "token", "copy", "is", "the", "of", "a", "home"])
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.choice(words, 8000)))
    return path


@pytest.fixture(scope="module")
def config(text) -> Config:
    run = Config(
        steps=STEPS,
        checkpoint_every=8,
        validate_every=100,
        model=Model(d_model=16, layers=LAYERS, heads=2, experts=EXPERTS, top_k=2, d_expert=8),
        data=Data(data=(text,), seq_len=32, batch=16, validation_batches=2),
        optimiser=Optimiser(learning_rate=2e-2, warmup_steps=2),
        compute=Compute(dtype="float32", remat=False),
    )
    return settle(run)


class Elementwise(Trainer):
    """With a loss of each parameter by itself, and loads that the batch says: compiles in a fifth of the time.

    Wherever an expert is, its weights take the same course, to the bit.
    """

    def _loss(self, params, state, placement, batch):
        numbers = {name: jnp.ones(LAYERS) for name in Metrics._fields}
        load = jnp.bincount(batch.reshape(-1).astype(jnp.int32) % EXPERTS, length=EXPERTS)
        numbers["load"] = jnp.stack([jnp.roll(load, layer) for layer in range(LAYERS)])
        loss = sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(params))
        return loss, (loss, Metrics(**numbers))


@functools.cache
def trainer_of(config: Config, ranks: int) -> Trainer:
    kind = Elementwise if config.placing == BY_PAST else Trainer
    return kind(config, mesh_of(ranks), place(config, ranks))


def compiled(config: Config, ranks: int) -> Trainer:
    """Once for all folders, and for what is done between steps."""
    return trainer_of(dataclasses.replace(config, out=pathlib.Path(), checkpoint_every=8, validate_every=100), ranks)


def opened(config: Config, ranks: int) -> tuple[Trainer, Checkpoints]:
    trainer = compiled(config, ranks)
    return trainer, Checkpoints(config, ranks, trainer)


def run(config: Config, interrupted_at: int = 0) -> None:
    """By SIGTERM."""
    push = report.Recorder.push

    def interrupted(self, step, *rest):
        push(self, step, *rest)
        if step == interrupted_at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.Recorder, "push", interrupted)
        patch.setattr(loop, "Trainer", lambda config, mesh, placement: compiled(config, mesh.shape["expert"]))
        with Terminal() as terminal:
            loop.train(config, terminal)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Config:
    """A run from the first step to the last."""
    config = dataclasses.replace(config, out=tmp_path_factory.mktemp("runs") / "whole")
    run(config)
    return config


@pytest.fixture(scope="module")
def by_past(config, tmp_path_factory) -> Config:
    """Likewise, with placements by past load after steps 5 and 10, interrupted between; and the elementwise loss."""
    optimiser = dataclasses.replace(config.optimiser, clip_norm=1e9)  # the norm of all depends on their order
    out = tmp_path_factory.mktemp("runs") / "past"
    config = dataclasses.replace(config, placing=BY_PAST, optimiser=optimiser, out=out)
    run(config, interrupted_at=7)
    run(config)
    return config


def rows_of(config: Config) -> list[dict]:
    """What metrics.jsonl says, without what depends on the clock."""
    rows = compare.read_lines(config.out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in ("seconds", "tokens_per_s")} for row in rows]


def loads_of(config: Config, steps: range = range(1, STEPS + 1)) -> np.ndarray:
    with np.load(config.out / "loads.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["steps"], steps)
        return archive["loads"]


def said(capsys) -> str:
    """What a run told, as one line."""
    return " ".join(capsys.readouterr().err.split())


def test_learns_and_reports(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["loss"] > 5
    assert rows[-1]["loss"] < 3.5
    assert all(row["optimum_mean"] - 1e-3 <= row["balanced_mean"] < row["home_mean"] for row in rows)
    assert all(row["contiguous_mean"] == row["home_mean"] for row in rows)  # experts stay where they are
    summary = json.loads((whole.out / "summary.json").read_text())
    assert summary["finished"]
    assert summary["ended"] == "finished"
    assert summary["validation_loss"] == pytest.approx(rows[-1]["loss"], rel=0.1)
    assert summary["routing"] == "learned"
    assert summary["mfu"] is None  # of a CPU
    ways = ("peer", "peer") if "cpu" in _ffi.handlers() else ("all_to_all", "collective")
    assert (summary["dispatch"], summary["transport"]) == ways
    assert summary["unigram_entropy"] == unigram_entropy(read(whole.data, print))
    loads = loads_of(whole)
    assert loads.shape == (STEPS, LAYERS, EXPERTS)
    assert loads.dtype == np.int32
    assert np.all(loads.sum(axis=2) == whole.data.batch * whole.data.seq_len * whole.model.top_k)
    assert (whole.out / "training.png").stat().st_size > 10_000
    assert list((whole.out / "tensorboard").iterdir())


def test_experts_are_placed_by_the_past(by_past):
    """By a moving average of the loads recorded, and weights and moments with them: all else is as if none had moved.

    Nor does an interruption show.
    """
    trainer, checkpoints = opened(by_past, 8)
    with checkpoints:
        _, state, placement = checkpoints.restore(print)
    average = np.zeros((LAYERS, EXPERTS))
    for step, load in enumerate(loads_of(by_past), 1):
        average += (load - average) * 2 / (5 + 1)
        if step == 10:
            expected = place(by_past, 8, average)
    np.testing.assert_array_equal(placement.phy2log, expected.phy2log)
    assert not np.array_equal(placement.home_order[0], placement.home_order[1])
    np.testing.assert_allclose(state.load, average, rtol=1e-5)

    unmoved, logical = trainer.create(), trainer.put(place(by_past, 8))
    batches = Corpus(read(by_past.data, print), by_past).training(0, 1, 0)
    for _ in range(STEPS):
        unmoved, _ = trainer.step(unmoved, logical, on_devices(next(batches), trainer.mesh))
    jax.tree.map(np.testing.assert_array_equal, trainer.to_logical(state, placement), unmoved)
    # Compiled once, for all placements and both runs, and ahead of the first step.
    assert trainer.step._cache_size() == trainer.move._cache_size() == 1


def test_goes_on_as_if_never_interrupted(whole, tmp_path, capsys):
    config = dataclasses.replace(whole, out=tmp_path / "resumed")
    before = signal.getsignal(signal.SIGTERM)
    run(config, interrupted_at=7)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [row["step"] for row in rows_of(config)] == list(range(1, 8))
    assert json.loads((config.out / "summary.json").read_text())["ended"] == "stopped"
    assert "stopped after step 7; the same command goes on from there" in said(capsys)

    run(config)
    assert "going on after step 7" in said(capsys)
    timed = [row["seconds"] is not None for row in compare.read_lines(config.out / "metrics.jsonl")]
    assert timed == [step not in (1, 8) for step in range(1, STEPS + 1)]  # what is slow at a start is not counted
    assert rows_of(config) == rows_of(whole)
    np.testing.assert_array_equal(loads_of(config), loads_of(whole))
    states = []
    for each in (config, whole):
        trainer, checkpoints = opened(each, 8)
        with checkpoints:
            states.append(checkpoints.restore(print)[1:])
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert trainer.step._cache_size() == 1  # compiled once, for both runs, and ahead of the first step
    assert states[0][0].load is None  # no past that nobody asks for


def test_runs_without_checkpoints_and_validation(whole, tmp_path, capsys):
    """Which has all of its steps, begins anew, and promises nothing else."""
    config = dataclasses.replace(whole, out=tmp_path, checkpoint_every=0, validate_every=0)
    run(config, interrupted_at=7)
    assert "stopped after step 7" in (told := said(capsys))
    assert "the same command goes on" not in told
    assert [row["step"] for row in rows_of(config)] == list(range(1, 8))
    assert not any((tmp_path / "checkpoints").iterdir())
    run(config)
    assert rows_of(config) == rows_of(whole)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"]
    assert summary["validation_loss"] is None


def test_peers_out_of_reach_end_with_a_line(config, tmp_path):
    """As those of tokens of 72 bytes, where 16 go at a time."""
    model = dataclasses.replace(config.model, d_model=18, heads=1)
    compute = dataclasses.replace(config.compute, dispatch="peer")
    with pytest.raises(SystemExit) as error:
        run(dataclasses.replace(config, out=tmp_path, model=model, compute=compute))
    assert re.match("train: --dispatch peer cannot be here, leave it out: .*memory", str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dispatch", "transport"), [(None, None), ("all_to_all", None), ("peer", "peer")])
def test_peers_that_are_asked_for_bring_copies_too(config, dispatch, transport):
    """Processes share memory only for what asks for it, and the summary takes the one for the other."""
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dispatch=dispatch))
    placement = jax.tree.map(lambda leaf: leaf[0], place(config, 8))
    block = nnx.eval_shape(lambda: Block(config, placement, mesh_of(8), rngs=nnx.Rngs(0)))
    assert (block.moe.dispatch, block.moe.transport) == (dispatch, transport)


def test_steps_run_what_was_compiled_ahead(config, caplog):
    trainer = Elementwise(config, mesh_of(8), place(config, 8))
    placement = trainer.put(place(config, 8))
    batch = on_devices(next(Corpus(read(config.data, print), config).training(0, 1, 0)), trainer.mesh)
    with jax.log_compiles():
        trainer.compile(placement)
        state = trainer.create()
        for _ in range(2):
            state, _ = trainer.step(state, placement, batch)
    compilations = [text for text in caplog.messages if "Finished XLA compilation of jit(_step)" in text]
    assert len(compilations) == 1


def test_finished_run_says_so(whole, capsys):
    before = rows_of(whole), loads_of(whole)
    run(whole)
    assert f"nothing to do: {whole.out} has {STEPS} steps already; go on with a larger --steps" in said(capsys)
    assert rows_of(whole) == before[0]
    np.testing.assert_array_equal(loads_of(whole), before[1])


def empty(checkpoint: pathlib.Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def cut_arrays(checkpoint: pathlib.Path) -> None:
    for file in (checkpoint / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:100])


def cut_about(checkpoint: pathlib.Path) -> None:
    file = checkpoint / "about" / "metadata"
    file.write_text(file.read_text()[:50])


@pytest.mark.parametrize(
    "damage",
    [
        empty,
        lambda checkpoint: shutil.rmtree(checkpoint / "state"),
        lambda checkpoint: shutil.rmtree(checkpoint / "about"),
        lambda checkpoint: (checkpoint / "state" / "_METADATA").unlink(),
        cut_arrays,
        cut_about,
    ],
    ids=["empty", "no-state", "no-about", "no-metadata", "cut-arrays", "cut-about"],
)
def test_goes_on_from_the_checkpoint_before_a_damaged_one(whole, tmp_path, capsys, damage):
    config = dataclasses.replace(whole, out=tmp_path)
    shutil.copytree(whole.out / "checkpoints", tmp_path / "checkpoints")
    _, checkpoints = opened(whole, 8)
    with checkpoints:
        before = checkpoints._restore(8)
    damage(tmp_path / "checkpoints" / str(STEPS))
    _, checkpoints = opened(config, 8)
    with checkpoints:
        step, *state = checkpoints.restore(print)
        away = tmp_path / "damaged" / str(STEPS)
        assert re.search(
            rf"step {STEPS} cannot be read \(.+\), and is now {away}; taking that of 8", capsys.readouterr().out
        )
        assert away.is_dir()
        assert step == 8
        jax.tree.map(np.testing.assert_array_equal, tuple(state), before)
        checkpoints.save(STEPS, *state)  # in place of the damaged one
    _, checkpoints = opened(config, 8)
    with checkpoints:
        assert checkpoints.restore(print)[0] == STEPS


def test_no_whole_checkpoint_ends_with_a_line(whole, tmp_path):
    shutil.copytree(whole.out / "checkpoints", tmp_path / "checkpoints")
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        empty(checkpoint)
    _, checkpoints = opened(dataclasses.replace(whole, out=tmp_path), 8)
    with checkpoints, pytest.raises(SystemExit) as error:
        checkpoints.restore(print)
    assert re.match(rf"train: {tmp_path}/checkpoints: no checkpoint can be read", str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 100, -100])
def test_goes_on_without_a_recording_that_was_cut(whole, tmp_path, capsys, size):
    path = tmp_path / "loads.npz"
    path.write_bytes((whole.out / "loads.npz").read_bytes()[:size])
    config = dataclasses.replace(whole, out=tmp_path)
    with Terminal() as terminal, report.Recorder(config, terminal, 8, {}) as recorder:
        assert f"{path} cannot be read; the recording of loads begins anew after step 8" in said(capsys)
        recorder._loads[9] = np.ones((LAYERS, EXPERTS), np.int32)
        recorder.saved(9)
    np.testing.assert_array_equal(loads_of(config, range(9, 10)), 1)


def test_lines_that_were_cut_are_left_out(tmp_path):
    (tmp_path / "lines").write_text('{"step": 1}\n{"st\n{"step": 3}\n{"step"')
    assert compare.read_lines(tmp_path / "lines") == [{"step": 1}, {"step": 3}]


@pytest.mark.gpu
def test_stops_and_goes_on_as_a_program(text, tmp_path):
    """On GPUs, with sizes for which the layer imports kernels of other libraries while the run goes on."""
    steps, log = 60, tmp_path / "metrics.jsonl"
    options = {"data": text, "out": tmp_path, "steps": steps, "d-model": 128, "d-expert": 128, "dtype": "bfloat16"}
    command = [sys.executable, train.__file__, "tiny", "--heads", "4"]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and len(compare.read_lines(log)) < steps // 3:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 0, said
    stopped = int(re.search(r"stopped after step (\d+); the same command goes on from there", said)[1])
    assert steps // 3 <= stopped < steps

    said = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr
    assert f"going on after step {stopped}" in said
    rows = compare.read_lines(log)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert rows[stopped]["loss"] < (rows[0]["loss"] + rows[stopped - 1]["loss"]) / 2  # not from the start again


def test_loads_on_other_ranks(whole):
    """On the 8 that wrote it, and on 2 x 4, where experts get a placement by EPLB: the same model."""
    losses, params = [], []
    for ranks, placing in ((8, whole.placing), (4, Placing(copies="past", placement="eplb"))):
        trainer, checkpoints = opened(dataclasses.replace(whole, placing=placing), ranks)
        with checkpoints:
            _, state, placement = checkpoints.restore(print)
        batches = Corpus(read(whole.data, print), whole).validation(1, 0)
        losses.append([float(trainer.validate(state, placement, on_devices(b, trainer.mesh))) for b in batches])
        params.append(trainer.to_logical(state, placement).params)
    np.testing.assert_array_equal(state.load, np.zeros((LAYERS, EXPERTS)))  # no past yet
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.parametrize(("copies", "old"), [("batch", False), ("batch", True), ("past", True)])
def test_loads_with_other_copies(request, by_past, tmp_path, copies, old):
    """Checkpoints by the past, and those from before there was a choice, which do not know how they routed."""
    shutil.copytree(by_past.out / "checkpoints", tmp_path / "checkpoints")
    about = tmp_path / "checkpoints" / str(STEPS) / "about" / "metadata"
    written = json.loads(about.read_text())
    if old:
        del written["placing"]["copies"], written["model"]["route"]
        written["placing"]["balance"] = True
    about.write_text(json.dumps(written))
    states = []
    for config in (by_past, request.getfixturevalue({"batch": "config", "past": "by_past"}[copies])):
        trainer, checkpoints = opened(dataclasses.replace(config, out=tmp_path if states else by_past.out), 8)
        with checkpoints:
            step, state, placement = checkpoints.restore(print)
        assert step == STEPS
        states.append(trainer.to_logical(state, placement))
    assert (state.load is None) == (copies == "batch")
    np.testing.assert_array_equal(placement.phy2log, place(config, 8, past_load(state)).phy2log)
    jax.tree.map(np.testing.assert_array_equal, *(state._replace(load=None) for state in states))


def test_other_model_in_the_folder(whole):
    other = dataclasses.replace(whole, model=dataclasses.replace(whole.model, d_expert=16))
    _, checkpoints = opened(other, 8)
    with checkpoints, pytest.raises(SystemExit, match="holds a checkpoint of another model, with d_expert 8; choose"):
        checkpoints.restore(print)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "30"], "--experts 30 cannot be divided over 8 expert ranks evenly"),
        (["--expert-ranks", "3"], "--expert-ranks 3 does not divide the 8 devices"),
        (["--batch", "12"], "--batch 12 cannot be divided over 8 devices evenly"),
        (["--heads", "5"], "--d-model 64 must be an even multiple of --heads 5"),
        (["--top-k", "33"], "--top-k 33 is more than --experts 32"),
        (["--buffer-factor", "0"], "--buffer-factor cannot be 0"),
        (["--placement-every", "0"], "--placement-every must be at least 1, got 0"),
        (["--processes", "2"], "--coordinator, --processes and --process go with --distributed"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--redundants", "29"], "--redundants 29 on 8 expert ranks: redundants_per_rank = 29 gives a rank 33 slots"),
        (
            ["--redundants", "3", "--copies", "past"],
            "--redundants 3 on 8 expert ranks: redundants_per_rank must be a multiple of",
        ),
        (["--data", "/nowhere"], "--data: no such file or folder: /nowhere"),
        (["--data", "."], "too little data: 5 bytes of text, but --batch 16 and --validation-batches 16 need"),
        (["--data", "binary.txt"], "--data: binary.txt is no UTF-8 text"),
        (["--data", "zeros.txt"], "--data: zeros.txt is no UTF-8 text"),
        (["--data", "empty"], "--data: no file that ends in .txt, .md, .rst, .py in empty (--suffixes)"),
        (["--out", "short.txt/run"], "--out: cannot write to the folder short.txt/run: Not a directory"),
        (["--out", "short.txt"], "--out: cannot write to the folder short.txt: File exists"),
    ],
)
def test_says_what_is_wrong_in_a_line(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "zeros.txt").write_bytes(bytes(100))
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(SystemExit) as error:
        train.main(["tiny", *arguments])
    assert re.match(f"train: {re.escape(message)}", str(error.value.code))
    assert "\n" not in str(error.value.code)
    if arguments[1] == ".":
        assert "left out, no UTF-8 text: binary.txt and 1 more" in capsys.readouterr().err
    assert not (tmp_path / "pretrain-run").exists()  # nothing is left behind


@pytest.mark.parametrize(("given", "meant"), [("--stesp", "--steps"), ("--topk", "--top-k")])
def test_unknown_options_get_a_hint(capsys, given, meant):
    with pytest.raises(SystemExit):
        parse(["tiny", given, "3"])
    assert re.search(rf"Perhaps you meant:\W+{meant}", capsys.readouterr().err)


def test_common_names_of_options():
    config = parse(["tiny", "--lr", "0.5", "--batch-size", "24", "--output", "there"])
    assert (config.optimiser.learning_rate, config.data.batch, config.out) == (0.5, 24, pathlib.Path("there"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "loads.npz"),
            "train: loads.npz: No space left on device$",
        ),
        (ValueError("RESOURCE_EXHAUSTED: [write] No space left on device"), "train: full: No space left on device$"),
    ],
)
def test_full_disk(monkeypatch, error, message):
    def fail(config, terminal):
        raise error

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(SystemExit, match=message):
        train.main(["tiny", "--out", "full"])


@pytest.mark.parametrize(("existing", "room"), [([], 3), ([5, 10], 1), ([STEPS], 0)], ids=["none", "two", "finished"])
def test_full_disk_is_met_before_the_first_step(config, monkeypatch, tmp_path, existing, room):
    """Room for `keep` checkpoints and the one being written, as far as they are not there and are still to come."""
    config = dataclasses.replace(config, out=tmp_path / "out")
    trainer = compiled(config, 8)
    config = dataclasses.replace(config, checkpoint_every=2)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract))
    for step in existing:
        (config.out / "checkpoints" / str(step)).mkdir(parents=True)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=room * size))
    require_space(config, trainer)
    if room:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=room * size - 1))
        with pytest.raises(SystemExit, match=rf"no space left: a checkpoint takes .*B, room for {room} is needed"):
            require_space(config, trainer)
    assert config.out.exists() == bool(existing)  # nothing is left behind


def test_no_space_for_a_checkpoint(config, monkeypatch, tmp_path):
    config = dataclasses.replace(config, out=tmp_path)
    trainer, checkpoints = opened(config, 8)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=12_300))
    with checkpoints, pytest.raises(SystemExit, match=r"no space left: a checkpoint takes .*, and 12\.3 kB are free"):
        checkpoints.save(1, trainer.abstract, None)


@pytest.mark.parametrize(
    ("loss", "norm", "message", "kept"),
    [(np.nan, 1, "loss of step 5 is nan", False), (1, np.inf, "norm of the gradients .* is inf", True)],
)
def test_what_is_no_number_ends_the_run(whole, tmp_path, capsys, loss, norm, message, kept):
    """With a summary and a picture of the steps before it; a checkpoint is spoken of only where there is one."""
    config = dataclasses.replace(whole, out=tmp_path)
    numbers = dict.fromkeys(("lr", *METRICS), np.float32(1)) | {"load": np.ones((LAYERS, EXPERTS), np.int32)}
    again = "go on from the checkpoint of step 2" if kept else "start again"

    def steps() -> None:
        with Terminal() as terminal, report.Recorder(config, terminal, 0, ABOUT) as recorder:
            terminal.count(0, STEPS)
            for step in range(1, 6):
                values = (loss, norm) if step == 5 else (2, 1)
                recorder.push(step, numbers | dict(zip(("loss", "grad_norm"), values, strict=True)), 0.0)
                if kept and step == 3:
                    recorder.saved(2)
            recorder.flush()

    with pytest.raises(
        SystemExit, match=f"train: the {message}.*; {again} with a lower --learning-rate or --clip-norm"
    ):
        steps()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not summary["finished"]
    assert re.match(f"the {message}", summary["ended"])
    assert summary["steps"] == 4
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert f"results are in {tmp_path}" in said(capsys)


def test_smoothed_curves_neither_lag_nor_count_what_is_not_known():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50)
    values[[0, 17, 30]] = np.nan
    expected = [np.nanmean(values[max(i - 10, 0) : i + 10]) for i in range(50)]
    np.testing.assert_allclose(compare.smooth(values), expected)
    np.testing.assert_allclose(compare.smooth(np.arange(100.0))[10:-10], np.arange(100.0)[10:-10] - 0.5)
    assert np.isnan(compare.smooth(np.full(1, np.nan))).all()


def test_runs_are_told_apart(tmp_path):
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert compare.names(runs) == [str(runs[0]), str(runs[1]), "c"]


def test_compare(whole, by_past, monkeypatch, tmp_path, capsys):
    """A column a run, and how far its loss is from the first's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(whole.out), str(by_past.out)])
    compare.main()
    printed = capsys.readouterr().out
    assert re.search(r"whole *. past", printed)
    assert re.search(
        rf"largest loss difference *. - *. {compare.differences(by_past.out, whole.out).max():.2%}", printed
    )
    assert "MFU" not in printed
    medians = [json.loads((run.out / "summary.json").read_text())["median"] for run in (whole, by_past)]
    for name, title in (("contiguous", "contiguous"), ("home", "at home"), ("balanced", "balanced")):
        one, other = (f"{median[f'{name}_mean']:.3f}" for median in medians)
        assert re.search(rf"imbalance, {title} *. {one} *. {other} ", printed)
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_compare_says_what_is_wrong_in_a_line(whole, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "summary.json").write_text("{")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text('{"config": {"placing": {"redundants": 2, "balance": true}}}')
    for arguments, message in (
        (["cut"], "compare: cut has no summary.json that can be read"),
        (["old"], "compare: old has no summary.json that can be read: .* of an earlier trainer"),
        ([str(whole.out), "--out", "no/x.png"], "compare: --out: cannot write no/x.png: No such file or directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        with pytest.raises(SystemExit, match=message):
            compare.main()


def test_terminal_fits_80_columns(monkeypatch):
    """The stage with its seconds, then a bar with its counter and the time left, and all numbers."""
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    for name, value in (("COLUMNS", "80"), ("LINES", "24"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    parts = ["loss 2.2604  1,006,071 tokens/s  rounds 2", "imbalance: contiguous 2.31, at home 2.09, optimum 1.46"]
    with Terminal() as terminal:
        terminal.stage("compiling")
        assert re.search(r"compiling.*0:00:0\d", screen.getvalue())
        terminal.count(0, 20000)
        terminal.step(19999, parts, log=False)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    assert all(part in [line.rstrip() for line in lines] for part in parts)
    (bar,) = {line for line in lines if line.startswith("step")}
    assert re.fullmatch(r"step 19999/20000 ━+╸? 0:00:\d\d passed, .* left", bar.rstrip())
    assert max(map(len, lines)) <= 80


def test_batches_follow_from_seed_and_step(config):
    corpus = Corpus(read(config.data, print), config)

    def take(corpus, step, count, processes=1, process=0):
        batches = corpus.training(step, processes, process)
        return np.stack([next(batches) for _ in range(count)])

    first = take(corpus, 0, 6)
    assert first.shape == (6, 16, 33)
    np.testing.assert_array_equal(take(corpus, 4, 2), first[4:])
    parts = [take(corpus, 0, 6, 2, process) for process in range(2)]
    np.testing.assert_array_equal(np.stack(parts, axis=2).reshape(first.shape), first)
    other = Corpus(read(config.data, print), dataclasses.replace(config, seed=1))
    assert not np.array_equal(take(other, 0, 1)[0], first[0])
    # An epoch holds every window once, and none that is held out.
    epochs = take(corpus, 0, 2 * len(corpus) // 16).reshape(-1, 33)[: len(corpus)]
    windows = {bytes(window) for window in corpus.windows}
    held_out = {bytes(window) for batch in corpus.validation(1, 0) for window in batch}
    assert {bytes(window) for window in epochs} == windows - held_out
    assert len(held_out) == 32


def test_default_text():
    text = read(Data(), print)
    assert len(text) > 5_000_000
    assert 3 < unigram_entropy(text) < 3.6


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["topology", "eplb", "batch", "none"])
def test_placements_have_equal_shapes(rng, ranks, kind):
    by_load = kind in ("topology", "eplb")
    config = Config(
        model=Model(layers=3),
        placing=Placing(**({"copies": "past", "placement": kind} if by_load else {"copies": kind})),
    )
    shapes = set()
    for load in (None, np.zeros((3, 64)), rng.lognormal(0, 1, (3, 64)), rng.lognormal(0, 3, (3, 64))):
        placement = place(config, ranks, load)
        shapes.add((placement.phy2log.shape, placement.log2phy.shape, placement.topology, placement.planning))
        if kind != "topology" or load is None:
            np.testing.assert_array_equal(placement.home_order, np.tile(np.arange(64), (3, 1)))
    (shape,) = shapes
    assert shape[0] == (3, 64 + 2 * ranks * (kind != "none" and ranks > 1))
    assert (placement.planning is not None) == (kind == "batch" and ranks > 1)


def test_presets_fit_their_devices():
    for name, devices in (("tiny", 8), ("tiny-gpu", 1), ("small", 4), ("base", 8)):
        assert check(parse([name]), devices) == devices
        assert parse([name]) == settle(PRESETS[name][1])
    assert parse(["small"]).placing.copies == "batch"
    assert parse(["small", "--distributed"]).placing.copies == "past"
    assert parse(["small", "--distributed", "--copies", "none"]).placing.copies == "none"


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ("", 1.05),
        ("--dispatch ring", 1.05),
        ("--dispatch all_to_all", 1.25),
        ("--copies past", 1.25),
        ("--copies none", 1.25),
        ("--copies none --route even", 1.05),
        ("--distributed", 1.25),
        ("--distributed --copies batch", 1.25),  # where processes cannot reach each other, buffers are of pairs
        ("--distributed --copies batch --dispatch peer", 1.05),
        ("--buffer-factor 2", 2.0),
    ],
)
def test_room_of_buffers(options, factor):
    """Little where copies even out what the buffers are for."""
    assert parse(["small", *options.split()]).compute.buffer_factor == factor


# ---- Embedding, even routing, and model FLOPs ------------------------------------------------------------------------


def test_gradient_of_the_embedding_is_added_up_in_float32(rng):
    """Of which bfloat16 has no more than 256 ones."""
    table, tokens = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32), jnp.asarray([3] * 1000 + [1] * 30)
    rows, pull = jax.vjp(lambda table: look_up(table, tokens, jnp.dtype(jnp.bfloat16)), table)
    np.testing.assert_array_equal(rows, table.astype(jnp.bfloat16)[tokens])
    np.testing.assert_array_equal(pull(jnp.ones_like(rows))[0], np.outer([0, 30, 0, 1000], np.ones(8)))


def test_even_choices_are_spread_at_random():
    """Over the experts: a token's are on as many ranks as those of a random choice, 3.33 of 4 in the mean."""
    chosen = even_choices(4096 + 10, 64, 6)
    np.testing.assert_array_equal(chosen.sum(axis=1), 6)
    np.testing.assert_array_equal(chosen[:4096].reshape(64, 64, 64).sum(axis=1), 6)  # of each 64 tokens
    ranks = chosen.reshape(-1, 4, 16).any(axis=2).sum(axis=1).mean()
    assert ranks == pytest.approx(4 * (1 - math.comb(48, 6) / math.comb(64, 6)), rel=0.01)


def test_even_routing(rng, config):
    """As many tokens to each expert, and gates that are still the router's."""
    logits, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((32, EXPERTS), EXPERTS))
    ids, gates, _ = map(np.asarray, EvenRouter(Router("softmax", 3, None, 1.0, 1, 1), 3)(jnp.asarray(logits), bias))
    np.testing.assert_array_equal(np.bincount(ids.ravel()), 32 * 3 / EXPERTS)
    assert all(len(set(row)) == 3 for row in ids)
    chosen = np.exp(np.take_along_axis(logits, ids, axis=1))
    np.testing.assert_allclose(gates, chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-5)
    one_device = jax.make_mesh((1,), ("ep",), devices=jax.devices()[:1])
    layer = MoE(8, EXPERTS, 8, 3, mesh=one_device, axis_name="ep", dispatch="dense", rngs=nnx.Rngs(0))
    layer.route = EvenRouter(layer.route, 3)
    _, metrics = nnx.jit(lambda layer, x: layer(x))(layer, jnp.asarray(logits[:, :8]))
    np.testing.assert_array_equal(metrics.load, 32 * 3 / EXPERTS)
    for route, kind in (("learned", Router), ("even", EvenRouter)):
        routed = dataclasses.replace(config, model=dataclasses.replace(config.model, route=route))
        one, mesh = jax.tree.map(lambda leaf: leaf[0], place(routed, 8)), mesh_of(8)
        model = nnx.eval_shape(
            lambda one=one, routed=routed, mesh=mesh: Transformer(routed, one, mesh, rngs=nnx.Rngs(0))
        )
        assert isinstance(model.blocks.moe.route, kind)


def test_model_flops(config):
    """Six for each parameter of a matrix that a token meets, and what attention takes of the sequence."""
    active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(compiled(config, 8).abstract.params):
        name = jax.tree_util.keystr(path)
        share = config.model.top_k / EXPERTS if "w_in" in name or "w_out" in name else 1
        active += leaf.size * share * ("norm" not in name and "embed" not in name)
    attention = 2 * LAYERS * config.model.d_model * config.data.seq_len / 2  # multiplications and additions: twice
    assert flops.per_token(config) == 6 * active + 3 * 2 * attention


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind, expected):
    assert flops.peak(kind) == expected


def test_says_how_it_routes_and_the_utilisation(config, monkeypatch, tmp_path, capsys):
    """In the log and in the summary, where the device's peak is known."""
    model = dataclasses.replace(config.model, route="even")
    config = dataclasses.replace(config, model=model, out=tmp_path, log_every=1)
    monkeypatch.setitem(flops.PEAKS, "cpu", 1e9)
    load = np.ones((LAYERS, EXPERTS), np.int32)
    metrics = dict.fromkeys(("loss", "grad_norm", "lr", *METRICS), np.float32(1)) | {"load": load}
    with Terminal() as terminal, report.Recorder(config, terminal, 0, ABOUT) as recorder:
        terminal.count(0, STEPS)
        for step in range(1, 4):
            recorder.push(step, metrics, 0.0)
        recorder.flush()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["routing"].startswith("even, each expert equally often and at random, whatever the router says: the")
    speed = summary["median"]["tokens_per_s"]
    assert summary["mfu"] == pytest.approx(speed * flops.per_token(config) / (8 * 1e9))
    assert len(re.findall(r"tokens/s MFU \d+\.\d% rounds", said(capsys))) == 2  # of the first step no speed is known
    assert "even routing" in compare.copies(summary)
