"""The command line: what it reads, what it predicts, and what it says where it cannot."""

import json
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("rich")

import jax_lplb as lplb
from jax_lplb import _cli, _simulate
from jax_lplb._cli import commands, trace

EXPERTS, TOKENS, LAYERS, K = 16, 40, 2, 3
WINDOW = 2


@pytest.fixture
def ids(rng) -> np.ndarray:
    """int64 [tokens, layers, k], of six batches and a rest; experts of a token differ, and some are liked."""
    liked = rng.normal(0, 1.5, (LAYERS, EXPERTS)) + rng.gumbel(size=(6 * TOKENS + 7, LAYERS, EXPERTS))
    liked[0, 0, EXPERTS - 1] = 100  # or nothing says how many there are
    return np.argsort(liked, axis=-1)[..., -K:]


def counts_of(ids: np.ndarray) -> np.ndarray:
    batches = ids[: len(ids) // TOKENS * TOKENS].reshape(-1, TOKENS, LAYERS, K)
    return np.stack([[np.bincount(b[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)] for b in batches])


def simulate(path, *options: str) -> list[dict]:
    """The rows that the command writes as JSON."""
    out = path.with_name("out.json")
    commands.run(["simulate", str(path), "--window", str(WINDOW), "--json", str(out), *options])
    return json.loads(out.read_text())["rows"]


def test_prediction_is_what_balance_does(ids, tmp_path, capsys):
    """To the bit: placed by two batches, used for the next two, twice, in each of two layers."""
    np.savez(tmp_path / "trace.npz", topk_ids=ids)
    rows = simulate(
        tmp_path / "trace.npz", "--ranks", "8", "--redundants", "2", "--batch-tokens", str(TOKENS), "--expert-mb", "1.5"
    )
    batches = ids[: 6 * TOKENS].reshape(6, TOKENS, LAYERS, K).swapaxes(1, 2).astype(np.int32)
    loads = counts_of(ids)
    common = {"num_ranks": 8, "redundants_per_rank": 2}
    along = {"num_experts": EXPERTS, **common}
    cube = lplb.topology.cube()
    place = {
        "topology": lambda past: lplb.Placement.from_topology(cube, load=past, **along),
        "topology_repeats": lambda past: lplb.Placement.from_topology(cube, load=past, repeats=True, **along),
        "eplb": lambda past: lplb.Placement.from_eplb(past, max_replicas=8, **common),
        "per_batch": lambda _: lplb.Placement.per_batch(**along),
    }
    balance = jax.jit(lplb.balance)
    home = np.array([[loads[s, layer].reshape(8, 2).sum(axis=1).max() for layer in range(LAYERS)] for s in range(2, 6)])
    assert [row["placement"] for row in rows] == ["none", "eplb_even", *place]
    for row in rows:
        if row["placement"] == "none":
            largest, copies = home, np.zeros(1)
        elif row["placement"] == "eplb_even":
            largest, copies = np.zeros((4, LAYERS)), np.full(1, 16)
            for step in range(4):
                for layer in range(LAYERS):
                    past = loads[step // 2 * 2 : step // 2 * 2 + 2, layer].mean(axis=0)
                    phy2log, _, count = lplb.eplb.rebalance_experts(past[None], EXPERTS + 16, 1, 1, 8)
                    each = (loads[step + 2, layer] / count[0])[phy2log[0]]
                    largest[step, layer] = each.reshape(8, 4).sum(axis=1).max()
        else:
            outs = [
                [
                    balance(batches[step, layer], place[row["placement"]](loads[first : first + 2, layer].mean(axis=0)))
                    for layer in range(LAYERS)
                ]
                for first in (0, 2)
                for step in (first + 2, first + 3)
            ]
            largest = np.array([[out.rank_load.max() for out in of_step] for of_step in outs])
            copies = np.array([(out.placement.phy2log >= 0).sum() - EXPERTS for of_step in outs for out in of_step])
        imbalance = largest / (TOKENS * K / 8)
        expected = [*(np.percentile(imbalance, percent) for percent in (50, 95, 99)), imbalance.max()]
        assert list(row["imbalance"].values()) == expected
        assert row["copies"] == copies.mean()
        np.testing.assert_allclose(row["time_saved"], 1 - largest.sum() / home.sum(), rtol=0, atol=1e-12)
        assert row["bytes_moved"] == row["experts_moved"] * 1.5e6
        if row["placement"] == "per_batch":
            assert row["experts_moved"] == copies.mean() * LAYERS
            assert copies.min() > 0
    said = capsys.readouterr().out
    assert f"{EXPERTS} experts, {LAYERS} layers, 4 batches judged" in said
    for row in rows:
        title = commands.TITLES[row["placement"]]
        (line,) = (line for line in said.splitlines() if line.startswith(title + "  "))
        assert line.split()[-1] == f"{row['time_saved']:.1%}"
        assert f"{row['imbalance']['p95']:.3f}" in line


def test_moved_experts_are_those_that_a_rank_did_not_hold():
    """In logical order at first, then by the placement before in the same layer; slots of a rank may change places."""
    phy2log = np.array([[0, 1, 2, 2, 3, 0], [2, 3, 0, 0, 1, 2], [1, 0, 3, 2, 3, 1]])  # of 2 ranks
    before = np.array([-1, -1, 0])
    # Of the first, rank 0 gets 2 and rank 1 gets 0; of the second 2 and 3, and 0 and 1; of the third 3, and 1.
    assert _simulate._newly_held(phy2log, before, 4, 2) == pytest.approx((2 + 4 + 2) / 3)


def test_windows_keep_to_their_sequence_and_layer(rng):
    loads = [rng.integers(0, 9, (steps, 3, 4)) for steps in (8, 2, 7)]
    past, now, before = _simulate.windows(loads, 2, 2)
    firsts = [(0, 2), (0, 4), (0, 6), (2, 2), (2, 4)]  # sequence, first batch that is judged
    for number, (sequence, first) in enumerate(firsts):
        for layer in range(3):
            place = 3 * number + layer
            np.testing.assert_array_equal(past[place], loads[sequence][first - 2 : first, layer].mean(axis=0))
            np.testing.assert_array_equal(now[:, place], loads[sequence][first : first + 2, layer])
            assert before[place] == (-1 if first == 2 else place - 3)
    assert len(past) == len(before) == now.shape[1] == 15


@pytest.mark.parametrize(
    "kind", ["ids", "task ids", "counts", "counts.npy", "topk_ids.npy", "float counts", "sglang", "folder"]
)
def test_all_formats_give_the_same_loads(kind, ids, tmp_path):
    counts = counts_of(ids)
    path = tmp_path / {"sglang": "dump.json"}.get(kind, kind if kind.endswith("npy") else "trace.npz")
    if kind == "sglang":
        path.write_text(json.dumps({"rank": 0, "logical_count": counts.tolist()}))
    elif kind == "folder":
        path = tmp_path / "recorded"
        with lplb.Recorder(path, chunk_steps=4) as recorder:
            for step in counts:
                recorder.record(step)
    elif kind.endswith("npy"):
        np.save(path, counts if kind == "counts.npy" else ids)
    elif kind == "task ids":
        np.savez(path, law_ids=ids.astype(np.uint8), law_doc_offsets=np.arange(3))
    elif kind == "ids":
        padded = np.concatenate([ids, np.full_like(ids[..., :1], -1)], axis=-1)
        np.savez(path, topk_ids=padded, notes=np.array([{}], object))  # pickled, and not read
    else:
        np.savez(path, counts=counts.astype(np.float32 if "float" in kind else np.int32))
    (loads,) = trace.read(path, TOKENS)
    np.testing.assert_array_equal(loads, counts)


def test_each_array_of_ids_is_a_sequence(ids, tmp_path):
    np.savez(tmp_path / "trace.npz", a_ids=ids, b_ids=ids[: 3 * TOKENS] % 7)
    first, second = trace.read(tmp_path / "trace.npz", TOKENS)
    assert first.shape == (6, LAYERS, EXPERTS)
    assert second.shape == (3, LAYERS, EXPERTS)


def write(path, contents) -> None:
    if isinstance(contents, dict) and path.suffix == ".npz":
        np.savez(path, **contents)
    elif isinstance(contents, np.ndarray):
        np.save(path, contents)
    elif isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents is not None:
        path.write_text(contents)


@pytest.mark.parametrize(
    ("name", "contents", "found"),
    [
        ("a.npz", None, "cannot read .*a.npz: No such file"),
        ("a.pt", b"PK", "suffix '.pt', and nothing is unpickled; expected .* an .npz"),
        ("a.npz", b"", "is no .npz file"),
        ("a.npz", b"PK\x03\x04 and then nothing", "is no .npz file"),
        ("a.npz", {"loads": np.ones((4, 2, 8))}, "has 'loads'; expected .* counts"),
        ("a.npz", {"counts": np.ones((4, 8), int)}, r"counts has shape \(4, 8\); expected .*steps, layers, experts"),
        ("a.npz", {"counts": np.ones((0, 2, 8), int)}, r"shape \(0, 2, 8\)"),
        ("a.npz", {"counts": np.full((4, 2, 8), 0.5)}, "dtype float64; expected whole numbers"),
        ("a.npz", {"counts": np.full((4, 2, 8), np.nan)}, "dtype float64; expected whole numbers"),
        ("a.npz", {"counts": np.full((4, 2, 8), -1)}, "counts from -1, .* expected none below 0"),
        ("a.npz", {"counts": np.full((4, 2, 8), 2**30)}, "up to 8589934592 tokens"),
        ("a.npz", {"a_counts": np.ones((4, 2, 8), int), "b_counts": np.ones((4, 2, 4), int)}, "expected equally many"),
        ("a.npz", {"counts": np.ones((4, 2, 8), bool)}, "dtype bool; expected whole numbers"),
        ("a.npz", {"counts": np.ones((4, 2, 8), int)}, "has counts of 8 experts, and --experts is 16"),
        ("a.npz", {"topk_ids": np.full((90, 2, 4), 16)}, "an id 16; expected ids below --experts, 16"),
        ("a.npz", {"topk_ids": np.full((90, 2, 4), -1)}, "padding alone, all below 0; expected ids of experts"),
        ("a.npz", {"topk_ids": np.ones((9, 2, 4), int)}, "has 9 tokens; expected at least --batch-tokens, 30"),
        (
            "a.npz",
            {"topk_ids": np.ones((90, 2, 4), int)},
            "has 3 batches .* takes 4: pass --window 1 or less",
        ),
        ("a.npz", {"counts": np.ones((1, 2, 16), int)}, "has 1 batches .* takes 4: record more of them"),
        (".", None, "expected a folder that a Recorder wrote, found one without npz files"),
        ("counts.npy", np.array([{}], object), "no .npy file without pickles: Object arrays"),
        ("x.npy", np.ones((4, 2, 8), int), "has 'x'; expected"),
        ("a.json", "[1]", "has a JSON list; expected"),
        ("a.json", "{", "is no .json file"),
        ("a.json", '{"logical_count": [[[1, 2]], [[1]]]}', "logical_count is ragged; expected"),
        ("a.json", '{"logical_count": null}', r"logical_count has shape \(\); expected"),
        ("a.json", '{"logical_count": [[["a"]]]}', "expected whole numbers"),
    ],
)
def test_bad_files_are_one_line(name, contents, found, tmp_path):
    write(tmp_path / name, contents)
    with pytest.raises(SystemExit, match=found) as raised:
        simulate(tmp_path / name, "--batch-tokens", "30", "--experts", "16")
    assert len(str(raised.value).splitlines()) == 1
    assert not list(tmp_path.rglob("out.json"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks"], "--ranks needs a number or more"),
        (["--placements"], "--placements needs one or more of none, "),
        (["--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--redundants", "-1"], "--redundants must be at least 0, got -1"),
        (["--window", "0"], "--window must be at least 1, got 0"),
        (["--experts", "0"], "--experts must be at least 1, got 0"),
        (["--expert-mb", "0"], "--expert-mb must be positive and finite, got 0.0"),
        (["--expert-mb", "1", "--widths", "2", "2"], "pass one of them"),
        (["--json", "/nowhere/out.json"], "--json: cannot write /nowhere/out.json: No such file"),
        (["--plot", "out.xyz"], "--plot must end in one of .*.png.*, got out.xyz"),
    ],
)
def test_bad_options_are_one_line(options, said, tmp_path):
    np.savez(tmp_path / "trace.npz", counts=np.ones((4, 2, 8), int))
    with pytest.raises(SystemExit, match=said) as raised:
        commands.run(["simulate", str(tmp_path / "trace.npz"), "--window", "2", *options])
    assert len(str(raised.value).splitlines()) == 1


def test_what_does_not_fit_is_said(ids, tmp_path, capsys):
    """And the rest is judged; without time for solves, and with a picture."""
    pytest.importorskip("matplotlib")
    np.savez(tmp_path / "trace.npz", counts=counts_of(ids))
    kinds = ("none", "eplb_even", "topology", "topology_repeats")
    options = ("--ranks", "5", "--redundants", "1", "2", "--plot", str(tmp_path / "out.png"))
    rows = simulate(tmp_path / "trace.npz", *options, "--placements", *kinds)
    reasons = {(row["redundants"], row["placement"]): row.get("does_not_fit") for row in rows}
    assert len(reasons) == 8
    said = capsys.readouterr().out
    for (_, kind), reason in reasons.items():
        if kind in ("none", "eplb_even"):
            assert reason is None
        else:
            assert "divi" in reason or "multiple" in reason
            assert f"{commands.TITLES[kind]} does not fit: {reason}"[:60] in said
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("ranks", [2, 4, 6, 7, 8, 16, 32, 64])
@pytest.mark.parametrize("redundants", [0, 1, 2, 3, 4])
def test_there_is_a_topology_for_any_ranks(ranks, redundants):
    name, sizes = _simulate.topology_for(ranks, redundants)
    topology = getattr(lplb.topology, name)(*sizes)
    assert topology.group_size == ranks
    assert redundants % topology.num_columns == 0
    best = {(8, 2): lplb.topology.cube(), (16, 2): lplb.topology.hypercube(), (32, 2): lplb.topology.torus(8, 4)}
    assert topology == best.get((ranks, redundants), topology)


@pytest.mark.parametrize("wrong", [False, True])
def test_doctor_compares_custom_calls_with_pure_jax(wrong, monkeypatch, capsys, fresh):
    def solve(*args, solve=lplb.solve, implementation, **options):
        solution = solve(*args, implementation=implementation, **options)
        factor = 1.01 if wrong and implementation == "ffi" else 1
        return solution._replace(rank_load=solution.rank_load * factor)

    monkeypatch.setattr(lplb, "solve", solve)
    with pytest.raises(SystemExit) as raised:
        commands.run(["doctor"])
    said = capsys.readouterr().out
    assert raised.value.code == wrong
    assert ("Wrong: edge_balance, ipm" if wrong else "All is well.") in said
    assert "peers' memory" in said


@pytest.mark.parametrize("missing", ["tyro", "rich"])
def test_a_missing_library_is_one_line(missing, monkeypatch):
    monkeypatch.delitem(sys.modules, "jax_lplb._cli.commands")
    monkeypatch.delattr(_cli, "commands")
    for name in list(sys.modules):
        if name.split(".")[0] == missing:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"there is no {missing}.*: pip install rich tyro") as raised:
        _cli.main()
    assert len(str(raised.value).splitlines()) == 1
