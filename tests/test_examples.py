"""README's snippets and the small examples: they run as they stand, and what they print is true."""

import os
import pathlib
import re
import runpy
import sys

import helpers
import jax
import numpy as np
import pytest

import jax_lplb as lplb

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("as_in_a_new_python")
ONCE = re.compile(r"Finished XLA compilation of jit\((step|<lambda>)\)")


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def imbalance(load: np.ndarray, rank: np.ndarray) -> float:
    on_rank = np.bincount(rank, load)
    return on_rank.max() / on_rank.mean()


def check_optimum(optimum: float, balanced: float, load: np.ndarray, placement: lplb.Placement, digits: int) -> None:
    """That of HiGHS, and what balancing reaches."""
    best = helpers.optimum(load, placement).max() / (load.sum() / placement.num_ranks)
    assert optimum == pytest.approx(best, abs=10.0**-digits)
    assert balanced == pytest.approx(best, abs=10.0**-digits)


def test_snippets_of_readme(capsys, caplog):
    text = (ROOT / "README.md").read_text()

    def blocks(title: str) -> list[str]:
        """Of a section: what is to be run, and what it prints."""
        return re.findall(r"```(?:python)?\n(.*?)```", text.partition(f"## {title}\n")[2].partition("\n## ")[0], re.S)

    (code, shown), (layer_code, layer_shown) = blocks("Quickstart"), blocks("In a Flax layer")
    names: dict = {}
    exec(code, names)
    printed = capsys.readouterr().out
    assert printed == shown
    out = jax.tree.map(np.asarray, names["out"])
    *_, last = printed.splitlines()
    home, balanced, optimum = numbers(last)
    assert home == pytest.approx(imbalance(out.load, np.arange(256) // 32), abs=1e-3)
    assert balanced < 1.02 < home
    check_optimum(optimum, balanced, out.load, out.placement, 3)
    assert last.endswith(f" {np.sum(out.placement.phy2log >= 0) - 256} copies")
    np.testing.assert_array_equal(out.placement.phy2log[out.physical_ids], names["expert_ids"])
    np.testing.assert_array_equal(np.bincount(names["owner"].ravel(), minlength=8), out.rank_load)

    with jax.log_compiles():
        exec(layer_code, names)
    assert [match[1] for match in map(ONCE.search, caplog.messages) if match] == ["<lambda>"]
    printed = capsys.readouterr().out
    assert printed == layer_shown
    moe, load = names["layer"], np.asarray(names["metrics"].load)
    *_, last = printed.splitlines()
    home, balanced, optimum = numbers(last)
    assert home == pytest.approx(imbalance(load, np.arange(256) // 32), abs=0.01)
    assert balanced < home
    check_optimum(optimum, balanced, load, jax.tree.map(np.asarray, names["placement"].choose(load)), 2)

    (own_code,) = blocks("In a layer of your own")
    exec(own_code, names)
    rng, ids = np.random.default_rng(0), np.asarray(names["expert_ids"])
    x, gates, weights = (rng.normal(size=shape) for shape in ((len(ids), 64), ids.shape, (256, 64, 48)))
    sharding = jax.NamedSharding(names["mesh"], jax.P("ep"))
    operands = [jax.device_put(operand.astype(np.float32), sharding) for operand in (x, gates, weights)]
    got = names["own_layer"](operands[0], names["expert_ids"], *operands[1:])
    expected = np.zeros(got.shape)
    for expert in range(256):
        token, choice = np.nonzero(ids == expert)
        np.add.at(expected, token, gates[token, choice][:, None] * (x[token] @ weights[expert]))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-3)

    (weights_code,) = blocks("Where the copies are")
    packed = lplb.Placement.from_topology(
        lplb.topology.cube(), num_experts=256, num_ranks=8, redundants_per_rank=2, load=load
    )
    logical = {"params": np.arange(256) + 1.0, "moments": -np.arange(256.0)}
    ordered = {"lplb": lplb, "placement": packed} | logical
    exec(weights_code, ordered)
    for name, rows in logical.items():
        np.testing.assert_array_equal(ordered[name], rows[packed.home_order])
    assert text.count("```python") == 4  # all of them were run

    # What its comment says of weights.
    (line,) = re.findall(r"layer\.set_experts\(.*\)", layer_code)
    rows = {name: -np.asarray(getattr(moe, name)[...]) for name in ("w_in", "w_out")}
    exec(line, names | rows)
    for name, of_experts in rows.items():
        np.testing.assert_array_equal(getattr(moe, name)[...], of_experts)


def test_quickstart(capsys):
    names = runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    before, after, bound = capsys.readouterr().out.splitlines()
    out = jax.tree.map(np.asarray, names["out"])
    assert numbers(before) == [pytest.approx(imbalance(out.load, np.arange(256) // 32), abs=1e-3)]
    check_optimum(*numbers(bound), *numbers(after), out.load, out.placement, 3)
    assert f" {np.sum(out.placement.phy2log >= 0) - 256} copies" in bound


def test_demo(capsys, monkeypatch, tmp_path):
    """Which checks on the host what each batch's ids and copies are; as many rows as batches, and a picture."""
    picture = tmp_path / "demo.png"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--batches", "3", "--tokens", "128", "--out", str(picture)])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    names = runpy.run_path(str(ROOT / "examples" / "demo.py"), run_name="__main__")
    printed = capsys.readouterr().out
    rows = [re.findall(r"\d\S*", line) for line in printed.splitlines() if re.match(r" +\d+  ", line)]
    assert [int(row[0]) for row in rows] == [0, 1, 2]
    for *_, home, optimum, after, copies, moved, _, _ in rows:
        assert 1 <= float(optimum) <= float(after) <= min(float(home), names["TARGET"] + 0.01)
        assert 0 < int(copies) < 16
        assert 0 < float(moved.rstrip("%")) < 50
    assert f"{3 * 8 * 128 * 8:,} expert choices, none lost" in printed
    assert picture.stat().st_size > 10_000


def test_layer_compiles_its_step_once_and_learns(capsys, caplog):
    with jax.log_compiles():
        exec((ROOT / "examples" / "moe_layer.py").read_text().replace("STEPS = 60", "STEPS = 12"), {})
    assert [match[1] for match in map(ONCE.search, caplog.messages) if match] == ["step"]
    said, *steps = capsys.readouterr().out.splitlines()
    assert "compiling" in said
    losses, home, balanced, optimum = np.transpose([numbers(line) for line in steps])
    assert losses[-1] < losses[0] / 2
    assert np.all(balanced < home)
    assert np.all(balanced <= optimum + 0.02)
