"""The benchmark of the pretraining example: its rows say what the runs did, and a mode that fails stops no other."""

import importlib.util
import json
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tyro")
ROOT = pathlib.Path(__file__).parents[1]
STEPS, SECONDS = 30, {"even": 0.5, "none": 1.0, "batch-peer": 0.625}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    spec = importlib.util.spec_from_file_location("pretrain_benchmark", ROOT / "benchmarks" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder: pathlib.Path, mode: str, *, finished: bool = True) -> None:
    """What a run of a mode writes; the first 20 steps are slow, and one later has a pause."""
    folder.mkdir(parents=True)
    steps = np.arange(1, STEPS + 1)
    seconds = np.where(steps <= 20, 60.0, SECONDS[mode])
    seconds[24] += 10 * SECONDS[mode]
    rows = [
        {
            "step": int(step),
            "loss": (3.0 if mode == "none" else 3.3) - 0.01 * step,
            "seconds": None if step == 1 else second,
            "tokens_per_s": None if step == 1 else 2048 / second,
            "rounds": 3 if step == 30 else 1,
            **dict.fromkeys(("contiguous_mean", "home_mean"), 2.0),
            **dict.fromkeys(("optimum_mean", "balanced_mean"), 1.25),
            "balanced_max": 9.0 if step <= 20 else step / 20,
        }
        for step, second in zip(steps, seconds, strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    copies = {"batch-peer": "batch"}.get(mode, "none")
    summary = {
        "finished": finished,
        "ended": "finished" if finished else "stopped",
        "steps": STEPS,
        "device": "4 x NVIDIA H200",
        "versions": {"jax": "1"},
        "parameters": 5,
        "unigram_entropy": 3.0,
        "dispatch": "peer",
        "transport": "none",
        "loss": rows[-1]["loss"],
        "validation_loss": None,
        "config": {
            "placing": {"copies": copies, "redundants": 2, "placement": "topology"},
            "model": {"route": "learned"},
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_mode_that_fails_stops_no_other(benchmark, monkeypatch, tmp_path, capsys):
    """Rows count steps after the 20th with their pauses; all but the failed mode's are there."""
    started = []

    def run(command, env, check):
        """A process: `past` fails in it, and what follows is for another one."""
        modes = json.loads(command[command.index("--child") + 1])["modes"]
        started.append((modes, env["JAX_COMPILATION_CACHE_DIR"]))
        for mode in modes:
            if mode == "past":
                return SimpleNamespace(returncode=7)
            write_run(tmp_path / "out" / mode, mode)
        return SimpleNamespace(returncode=0)

    modes = ["even", "past", "none", "batch-peer"]
    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=run))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    arguments = ["tiny", "--modes", *modes, "--batch", "16", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 1
    (first, cache), (second, same) = started
    assert (first, second) == (modes, ["none", "batch-peer"])
    assert cache == same

    rows = {row["mode"]: row for row in json.loads((tmp_path / "out" / "pretrain.json").read_text())["rows"]}
    assert list(rows) == modes
    assert rows["past"]["ended"] == "failed, exit code 7"
    for mode, seconds in SECONDS.items():
        row = rows[mode]
        speed = 10 * 16 * 128 / (20 * seconds)  # ten steps in the time of twenty
        assert row["tokens_per_s"] == pytest.approx(speed, abs=1)
        assert row["median_tokens_per_s"] == pytest.approx(16 * 128 / seconds, abs=1)
        assert row["share_of_even"] == pytest.approx(0.5 / seconds, rel=1e-3)
        assert row["imbalance"] == 1.25
        assert row["imbalance_p95"] == pytest.approx(np.percentile(np.arange(21, 31) / 20, 95), abs=1e-4)
        assert (row["rounds_max"], row["gpus"], row["bench"]) == (3, 4, "pretrain")
    assert rows["none"]["loss_difference"] == 0
    assert rows["batch-peer"]["loss_difference"] == pytest.approx(0.3 / 2.75, rel=0.02)  # at the end
    # A mean of the last 11 steps of the one that learns less; the other begins below it.
    assert rows["none"]["common_loss"] == rows["batch-peer"]["common_loss"] == pytest.approx(3.05)
    assert rows["none"]["seconds_to_loss"] == 0
    assert rows["batch-peer"]["seconds_to_loss"] == pytest.approx(19 * 60 + 20 * SECONDS["batch-peer"], abs=0.1)
    assert "common_loss" not in rows["even"]
    assert (tmp_path / "out" / "pretrain.png").stat().st_size > 10_000

    with pytest.raises(SystemExit):
        benchmark.main()
    assert f"--out: {tmp_path}/out has runs already; name another folder" in capsys.readouterr().err


def test_every_mode_is_one_of_the_trainer(benchmark):
    """With the options that its name promises, and no checkpoints."""
    for options in benchmark.MODES.values():
        config = benchmark.parse(["small", *options, *benchmark.COMMON])
        assert benchmark.check(config, 4) == 4
        assert config.checkpoint_every == config.validate_every == 0
