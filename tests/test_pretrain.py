"""The pretraining example, in small: it learns, stops and goes on, and loads on other ranks."""

import dataclasses
import errno
import functools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("tyro")
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples" / "pretrain"))

import compare
import report
import train
from checkpoint import Checkpoints
from config import PRESETS, Compute, Config, Data, Model, Optimiser, Placing, check, parse
from data import Corpus, on_devices, read, unigram_entropy
from placement import place
from step import Trainer, mesh_of

STEPS, LAYERS, EXPERTS = 12, 2, 16


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
    return Config(
        steps=STEPS,
        checkpoint_every=100,
        validate_every=100,
        model=Model(d_model=16, layers=LAYERS, heads=2, experts=EXPERTS, top_k=2, d_expert=8),
        data=Data(data=(text,), seq_len=32, batch=16, validation_batches=2),
        optimiser=Optimiser(learning_rate=2e-2, warmup_steps=2),
        placing=Placing(placement_every=5, load_decay=0.5),
        compute=Compute(dtype="float32", remat=False),
    )


@functools.cache
def trainer_of(config: Config, ranks: int) -> Trainer:
    return Trainer(config, mesh_of(ranks), place(config, ranks, np.zeros((LAYERS, EXPERTS))))


def compiled(config: Config, ranks: int) -> Trainer:
    """Once for all folders."""
    return trainer_of(dataclasses.replace(config, out=pathlib.Path()), ranks)


def opened(config: Config, ranks: int) -> tuple[Trainer, Checkpoints]:
    trainer = compiled(config, ranks)
    return trainer, Checkpoints(config, ranks, trainer)


def run(config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Trainer", lambda config, mesh, placement: compiled(config, mesh.shape["expert"]))
        train.train(config)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Config:
    """A run from the first step to the last."""
    config = dataclasses.replace(config, out=tmp_path_factory.mktemp("runs") / "whole")
    run(config)
    return config


def rows_of(config: Config) -> list[dict]:
    """What metrics.jsonl says, without what depends on the clock."""
    rows = compare.read_lines(config.out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in ("seconds", "tokens_per_s")} for row in rows]


def loads_of(config: Config) -> np.ndarray:
    with np.load(config.out / "loads.npz", allow_pickle=False) as archive:
        return archive["loads"]


def test_learns_and_reports(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["loss"] > 5
    assert rows[-1]["loss"] < 3.5
    assert all(row["optimum_mean"] - 1e-3 <= row["balanced_mean"] <= row["home_mean"] for row in rows)
    summary = json.loads((whole.out / "summary.json").read_text())
    assert summary["finished"]
    assert summary["validation_loss"] == pytest.approx(rows[-1]["loss"], rel=0.1)
    assert summary["unigram_entropy"] == unigram_entropy(read(whole.data))
    loads = loads_of(whole)
    assert loads.shape == (STEPS, LAYERS, EXPERTS)
    assert loads.dtype == np.int32
    assert np.all(loads.sum(axis=2) == whole.data.batch * whole.data.seq_len * whole.model.top_k)
    assert (whole.out / "training.png").stat().st_size > 10_000
    assert list((whole.out / "tensorboard").iterdir())


def test_goes_on_as_if_never_interrupted(whole, monkeypatch, tmp_path, capsys):
    """By SIGTERM, after one placement by load and before the next."""
    config = dataclasses.replace(whole, out=tmp_path / "resumed")
    push = report.Recorder.push

    def interrupted(self, step, *rest):
        push(self, step, *rest)
        if step == 7:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(report.Recorder, "push", interrupted)
    run(config)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [row["step"] for row in rows_of(config)] == list(range(1, 8))
    assert not json.loads((config.out / "summary.json").read_text())["finished"]
    monkeypatch.undo()

    run(config)
    assert "going on after step 7" in capsys.readouterr().err
    assert rows_of(config) == rows_of(whole)
    np.testing.assert_array_equal(loads_of(config), loads_of(whole))
    states = []
    for each in (config, whole):
        trainer, checkpoints = opened(each, 8)
        with checkpoints:
            states.append(checkpoints.restore())
    assert not np.array_equal(states[0][1].phy2log[0], states[0][1].phy2log[1])  # each layer has its own
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert trainer.step._cache_size() == 1  # compiled once, for all placements and both runs

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(whole.out), str(config.out)])
    compare.main()
    assert re.search(r"resumed.* 0\.00%", capsys.readouterr().out)
    assert (tmp_path / "compare.png").stat().st_size > 10_000


@pytest.mark.gpu
def test_stops_and_goes_on_as_a_program(text, tmp_path):
    """On GPUs, with sizes for which the layer imports kernels of other libraries while the run goes on."""
    steps, log = 60, tmp_path / "metrics.jsonl"
    options = {"data": text, "out": tmp_path, "steps": steps, "d-model": 128, "d-expert": 128, "dtype": "bfloat16"}
    command = [sys.executable, train.__file__, "tiny", "--heads", "4", "--placement-every", "20"]
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
    """On the 8 that wrote it, and on 2 x 4, where experts get a placement by EPLB."""
    losses, params = [], []
    for ranks, placing in ((8, whole.placing), (4, dataclasses.replace(whole.placing, placement="eplb"))):
        trainer, checkpoints = opened(dataclasses.replace(whole, placing=placing), ranks)
        with checkpoints:
            state, placement = checkpoints.restore()
        batches = Corpus(read(whole.data), whole).validation(1, 0)
        losses.append([float(trainer.validate(state, placement, on_devices(b, trainer.mesh))) for b in batches])
        params.append(trainer.to_logical(state, placement).params)
        assert state.load.sum() > 0
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_other_model_in_the_folder(whole):
    other = dataclasses.replace(whole, model=dataclasses.replace(whole.model, d_expert=16))
    _, checkpoints = opened(other, 8)
    with checkpoints, pytest.raises(SystemExit, match="holds a checkpoint of another model, with d_expert 8; choose"):
        checkpoints.restore()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "30"], "--experts 30 cannot be divided over 8 expert ranks evenly"),
        (["--expert-ranks", "3"], "--expert-ranks 3 does not divide the 8 devices"),
        (["--batch", "12"], "--batch 12 cannot be divided over 8 devices evenly"),
        (["--heads", "5"], "--d-model 64 must be an even multiple of --heads 5"),
        (["--top-k", "33"], "--top-k 33 is more than --experts 32"),
        (["--buffer-factor", "0"], "--buffer-factor cannot be 0"),
        (["--load-decay", "1"], "--load-decay cannot be 1"),
        (["--processes", "2"], "--coordinator, --processes and --process go with --distributed"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--redundants", "3"], "--redundants 3 on 8 expert ranks: redundants_per_rank must be a multiple of"),
        (["--data", "/nowhere"], "--data: no such file or folder: /nowhere"),
        (["--data", "."], "too little data: 5 bytes of text, but --batch 16 and --validation-batches 16 need"),
    ],
)
def test_says_what_is_wrong_in_a_line(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(SystemExit) as error:
        train.main(["tiny", *arguments])
    assert re.match(f"train: {re.escape(message)}", str(error.value.code))
    assert "\n" not in str(error.value.code)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "loads.npz"),
            "train: .* No space left on device: 'loads.npz'",
        ),
        (ValueError("RESOURCE_EXHAUSTED: [write] No space left on device"), "train: full: No space left on device$"),
    ],
)
def test_full_disk(monkeypatch, error, message):
    def fail(config):
        raise error

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(SystemExit, match=message):
        train.main(["tiny", "--out", "full"])


def test_no_space_for_a_checkpoint(config, monkeypatch, tmp_path):
    config = dataclasses.replace(config, out=tmp_path)
    trainer, checkpoints = opened(config, 8)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=123_000))
    with checkpoints, pytest.raises(SystemExit, match=r"no space left: a checkpoint takes 0\.000 GB, and there are"):
        checkpoints.save(1, trainer.abstract, None)


@pytest.mark.parametrize(
    ("loss", "norm", "message"), [(np.nan, 1, "loss of step 3 is nan"), (1, np.inf, "norm of the gradients .* is inf")]
)
def test_what_is_no_number_ends_the_run(config, tmp_path, loss, norm, message):
    with report.Recorder(dataclasses.replace(config, out=tmp_path), 0) as recorder:
        recorder.push(3, {"loss": jax.numpy.float32(loss), "grad_norm": jax.numpy.float32(norm)}, 0.0)
        with pytest.raises(SystemExit, match=f"train: the {message}; run again, from the last checkpoint"):
            recorder.flush()


def test_batches_follow_from_seed_and_step(config):
    corpus = Corpus(read(config.data), config)

    def take(corpus, step, count, processes=1, process=0):
        batches = corpus.training(step, processes, process)
        return np.stack([next(batches) for _ in range(count)])

    first = take(corpus, 0, 6)
    assert first.shape == (6, 16, 33)
    np.testing.assert_array_equal(take(corpus, 4, 2), first[4:])
    parts = [take(corpus, 0, 6, 2, process) for process in range(2)]
    np.testing.assert_array_equal(np.stack(parts, axis=2).reshape(first.shape), first)
    other = Corpus(read(config.data), dataclasses.replace(config, seed=1))
    assert not np.array_equal(take(other, 0, 1)[0], first[0])
    # An epoch holds every window once, and none that is held out.
    epochs = take(corpus, 0, 2 * len(corpus) // 16).reshape(-1, 33)[: len(corpus)]
    windows = {bytes(window) for window in corpus.windows}
    held_out = {bytes(window) for batch in corpus.validation(1, 0) for window in batch}
    assert {bytes(window) for window in epochs} == windows - held_out
    assert len(held_out) == 32


def test_default_text():
    text = read(Data())
    assert len(text) > 5_000_000
    assert 3 < unigram_entropy(text) < 3.6


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["topology", "eplb", "none"])
def test_placements_have_equal_shapes(rng, ranks, kind):
    placing = Placing(balance=kind != "none", placement="topology" if kind == "none" else kind)
    config = Config(placing=placing)
    shapes = set()
    for load in (np.zeros((3, 64)), rng.lognormal(0, 1, (3, 64)), rng.lognormal(0, 3, (3, 64))):
        placement = place(config, ranks, load)
        shapes.add((placement.phy2log.shape, placement.log2phy.shape, placement.topology))
        if kind == "none":
            np.testing.assert_array_equal(placement.home_order, np.tile(np.arange(64), (3, 1)))
    (shape,) = shapes
    assert shape[0] == (3, 64 + 2 * ranks * (kind != "none" and ranks > 1))


def test_presets_fit_their_devices():
    for name, devices in (("tiny", 8), ("small", 4), ("base", 8)):
        assert check(parse([name]), devices) == devices
        assert parse([name]) == PRESETS[name][1]
    assert not parse(["small", "--no-balance"]).placing.balance
