"""The command line: what it reads, predicts and advises, and what it says where it cannot."""

import base64
import json
import re
import shlex
import sys
import types
from html.parser import HTMLParser

import jax
import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("rich")

import jax_lplb as lplb
from jax_lplb import _cli, _simulate
from jax_lplb._cli import advice, commands, study, trace

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


def report(command: str, path, *options: str) -> dict:
    """What the command writes as JSON."""
    out = path.with_name("out.json")
    commands.run([command, str(path), "--window", str(WINDOW), "--json", str(out), *options])
    return json.loads(out.read_text())


def simulate(path, *options: str) -> list[dict]:
    return report("simulate", path, *options)["rows"]


def advise(path, *options: str) -> dict:
    return report("advise", path, *options)


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
        title = study.TITLES[row["placement"]]
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
    "kind", ["ids", "task ids", "counts", "counts.npy", "topk_ids.npy", "float counts", "sglang", "vllm", "folder"]
)
def test_all_formats_give_the_same_loads(kind, ids, tmp_path, rng):
    counts = counts_of(ids)
    path = tmp_path / {"sglang": "dump.json"}.get(kind, kind if kind.endswith("npy") else "trace.npz")
    if kind == "sglang":
        path.write_text(json.dumps({"rank": 0, "logical_count": counts.tolist()}))
    elif kind == "vllm":
        slots = np.stack([rng.permutation([*range(EXPERTS), *range(4)]) for _ in range(LAYERS)])
        window = np.zeros((len(counts) + 3, *slots.shape), np.int32)  # which is not full yet
        for layer, experts in enumerate(slots):
            for expert in range(EXPERTS):
                tokens = counts[:, layer, expert]
                first, *second = np.flatnonzero(experts == expert)
                window[: len(counts), layer, first] = tokens // 3 if second else tokens
                window[: len(counts), layer, second] = (tokens - tokens // 3)[:, None]
        np.savez(path, expert_load_window=window, physical_to_logical_map=slots)
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


def load_window(slots: np.ndarray) -> dict:
    return {"expert_load_window": np.ones((4, 2, 8), int), "physical_to_logical_map": slots}


@pytest.mark.parametrize(
    ("name", "contents", "found"),
    [
        ("a.npz", None, "cannot read .*a.npz: No such file"),
        ("a.pkl", b"PK", "suffix '.pkl', and nothing is unpickled; expected .* an .npz"),
        ("a.pt", b"PK", "a.pt would have to be unpickled; convert SGLang's dump: python -c"),
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
        ("a.json", '{"records": []}', "has 'records'; expected .* logical_count"),
        ("a.npz", {"counts": np.zeros((4, 2, 8), int)}, "has no tokens at all"),
        (
            "expert_load_window.npy",
            np.ones((4, 2, 8), int),
            "of slots; expected 'physical_to_logical_map' .* beside it",
        ),
        ("a.npz", load_window(np.ones((2, 9), int)), r"map has shape \(2, 9\) .* expected \(2, 8\) as .*window has"),
        ("a.npz", load_window(np.full((2, 8), -1)), "experts from -1; expected .* none below 0"),
        ("a.npz", load_window(np.ones((1, 2, 8), int)), r"map has shape \(1, 2, 8\)"),
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
            assert f"{study.TITLES[kind]} does not fit: {reason}"[:60] in said
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("ranks", [2, 4, 6, 7, 8, 16, 32, 64])
@pytest.mark.parametrize("redundants", [0, 1, 2, 3, 4])
def test_there_is_a_topology_for_any_ranks(ranks, redundants):
    topologies = [getattr(lplb.topology, name)(*sizes) for name, sizes in _simulate.topologies_for(ranks, redundants)]
    for topology in topologies:
        assert topology.group_size == ranks
        assert redundants % topology.num_columns == 0
    assert len(set(topologies)) == len(topologies)
    best = {(8, 2): lplb.topology.cube(), (16, 2): lplb.topology.hypercube(), (32, 2): lplb.topology.torus(8, 4)}
    assert topologies[0] == best.get((ranks, redundants), topologies[0])


def test_a_conversion_that_an_error_names_works(ids, tmp_path, monkeypatch):
    counts = counts_of(ids)
    (tmp_path / "a.pt").write_bytes(b"PK")
    with pytest.raises(trace.BadTraceError) as raised:
        trace.read(tmp_path / "a.pt")

    def load(path, device, *, weights_only):
        assert (path, device, weights_only) == (str(tmp_path / "a.pt"), "cpu", True)
        return {"rank": 0, "logical_count": types.SimpleNamespace(numpy=lambda: counts)}

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    command = shlex.split(str(raised.value).partition("dump: ")[2])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    (loads,) = trace.read(tmp_path / "a.npz")
    np.testing.assert_array_equal(loads, counts)


@pytest.fixture
def recorded(ids, tmp_path):
    """The folder of a Recorder."""
    with lplb.Recorder(tmp_path / "recorded") as recorder:
        for step in counts_of(ids):
            recorder.record(step)
    return tmp_path / "recorded"


@pytest.mark.parametrize("within", ["0", "5", "1000"])
def test_advice_is_the_best_by_its_own_rule(within, recorded, capsys):
    """All that fits was tried, each as `simulate` judges it."""
    said = advise(recorded, "--ranks", "8", "--redundants", "2", "1", "--ranks-per-node", "4", "--within", within)
    rows, chosen = said["rows"], said["rows"][said["chosen"]]
    tried = [(row["placement"], row["redundants"], row["topology"], row["num_groups"]) for row in rows]
    assert len(set(tried)) == len(tried) == 1 + 4 + 8
    assert {one[2] for one in tried} == {None, "ring(8)", "cube()", "torus(4, 2)"}
    assert ("per_batch", 2, None, 2) in tried
    order = [(row["imbalance"]["p95"], row["imbalance"]["p50"], row["redundants"]) for row in rows]
    assert order == sorted(order)
    for row in rows:
        near = row["imbalance"]["p95"] <= order[0][0] * (1 + float(within) / 100)
        cost, least = ((one["redundants"], one["num_groups"] == 1, one["experts_moved"]) for one in (row, chosen))
        assert not near or cost >= least
    assert chosen["imbalance"]["p95"] <= order[0][0] * (1 + float(within) / 100)
    assert (chosen["placement"] == "none") == (within == "1000")
    printed = capsys.readouterr().out
    assert said["why"] in printed
    assert said["rule"] in said["why"]
    assert f"within {within} %" in said["rule"]
    if within == "0":
        simulated = simulate(recorded, "--ranks", "8", "--redundants", "1", "2")
        for row in simulated:
            key = row["placement"], row["redundants"], row["topology"]
            for other in rows:
                if key == (other["placement"], other["redundants"], other["topology"]):
                    assert row["imbalance"] == other["imbalance"]


def test_ties_go_to_copies_within_a_node_then_to_the_least_moved():
    def row(kind, p95, slots, groups=1, moved=0.0):
        numbers = {"imbalance": {"p95": p95}, "experts_moved": moved}
        return study.Row(_simulate.Candidate(kind, 8, slots, None, groups), "", numbers, None)

    far, best, costly = row("none", 1.5, 0), row("eplb", 1.0, 4), row("eplb", 1.01, 2, moved=9.0)
    cheap, inside = row("per_batch", 1.02, 2, moved=8.0), row("per_batch", 1.015, 2, 2, 9.0)
    assert advice.choose([far, best, costly, cheap, inside], 2) is inside
    assert advice.choose([far, best, costly, cheap], 2) is cheap
    assert advice.choose([far, best, costly, cheap], 1) is costly
    assert advice.choose([far, best, costly, cheap], 0.5) is best
    assert advice.choose([far, best, costly, cheap], 50) is far


def test_what_is_beyond_the_memory_for_copies_does_not_fit(recorded, capsys):
    """Of two layers, an expert of 3 MB: one slot takes 6 MB of a rank, two take 12."""
    options = ("--ranks", "8", "--redundants", "1", "2", "3", "--widths", "500", "1000")
    rows = advise(recorded, *options, "--max-copies-mb", "6")["rows"]
    reasons = {row["redundants"]: row.get("does_not_fit") for row in rows}
    assert reasons[0] is None
    assert reasons[1] is None
    assert reasons[2] == "its slots take 12.0 MB of a rank, more than 6.0 MB"
    assert f"per batch, 3 slots of each rank does not fit: {reasons[3]}" in capsys.readouterr().out
    assert [row["bytes_slots"] for row in rows if row["redundants"] == 1] == [6e6] * 3


ON_8 = {"num_experts": EXPERTS, "num_ranks": 8}


@pytest.mark.parametrize(
    ("candidate", "make"),
    [
        (
            _simulate.Candidate("none", 8, 0),
            lambda _: lplb.Placement.per_batch(**ON_8, redundants_per_rank=0),
        ),
        (
            _simulate.Candidate("per_batch", 8, 2, groups=2),
            lambda _: lplb.Placement.per_batch(**ON_8, redundants_per_rank=2, num_groups=2),
        ),
        (
            _simulate.Candidate("topology", 8, 2, ("torus", (4, 2))),
            lambda past: lplb.Placement.from_topology(
                lplb.topology.torus(4, 2), **ON_8, redundants_per_rank=2, load=past
            ),
        ),
        (
            _simulate.Candidate("topology_repeats", 8, 2, ("cube", ())),
            lambda past: lplb.Placement.from_topology(
                lplb.topology.cube(), **ON_8, redundants_per_rank=2, load=past, repeats=True
            ),
        ),
        (
            _simulate.Candidate("eplb", 8, 1),
            lambda past: lplb.Placement.from_eplb(past, num_ranks=8, redundants_per_rank=1),
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_code_of_the_advice_runs_and_makes_what_was_judged(candidate, make, recorded, ids):
    pytest.importorskip("flax")
    judged = study.Study(study.Recording(recorded, window=WINDOW))
    names: dict = {}
    exec(advice.code(candidate, judged), names)
    past = counts_of(ids)[-WINDOW:].mean(axis=0)
    assert names["placement"] == make(past[0])
    assert candidate.place(past) == make(past)
    batch = jax.device_put(ids[:32, 0].astype(np.int32), jax.NamedSharding(names["mesh"], jax.P("ep")))
    slots = np.asarray(names["slots_of"](batch))
    if candidate.kind == "per_batch":
        filled = names["placement"].choose(np.bincount(ids[:32, 0].ravel(), minlength=EXPERTS).astype(np.int32))
        np.testing.assert_array_equal(np.asarray(filled.phy2log)[slots], batch)
    else:
        np.testing.assert_array_equal(names["placement"].phy2log[slots], batch)
    assert names["layer"].route.top_k == 8


def test_code_of_the_advice_runs_where_no_recorder_wrote_the_trace(ids, tmp_path):
    pytest.importorskip("flax")
    np.savez(tmp_path / "trace.npz", topk_ids=ids)
    said = advise(tmp_path / "trace.npz", "--ranks", "8", "--redundants", "1", "--batch-tokens", str(TOKENS))
    names: dict = {}
    exec(said["code"], names)
    assert names["placement"].num_experts == EXPERTS
    judged = study.Study(study.Recording(tmp_path / "trace.npz", window=WINDOW, batch_tokens=TOKENS))
    exec(advice.code(_simulate.Candidate("eplb", 8, 1), judged), names)
    assert names["placement"].slots_per_rank == 3


def test_advice_for_ranks_that_do_not_divide_the_experts(ids, tmp_path):
    """All but topologies fit, and are as `evaluate` says of the same placements."""
    loads = counts_of(ids)
    np.savez(tmp_path / "trace.npz", counts=loads)
    said = advise(tmp_path / "trace.npz", "--ranks", "3", "--redundants", "1")
    rows = {row["placement"]: row for row in said["rows"]}
    assert "divisible by num_ranks = 3" in rows["topology"]["does_not_fit"]
    assert "does_not_fit" not in rows["eplb"]
    place = lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=3, redundants_per_rank=1)
    judged = lplb.evaluate(place, loads[WINDOW : len(loads) // WINDOW * WINDOW], progress=False)
    assert rows["per_batch"]["imbalance"]["worst"] == pytest.approx(judged.assigned.max(), rel=1e-6)
    assert rows["none"]["imbalance"]["worst"] == pytest.approx(judged.contiguous.max(), rel=1e-6)


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("command", ["simulate", "advise"])
def test_a_page_needs_nothing_but_itself(command, recorded):
    pytest.importorskip("matplotlib")
    page = recorded.with_name("out.html")
    said = report(command, recorded, "--ranks", "8", "--redundants", "1", "--plot", str(page))
    html = page.read_text()
    assert "http" not in html
    parsed = Page(html)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in parsed.tags}
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == 2  # rank loads, and imbalances
    for image in images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data).decode()
        assert all(link[0] == "#" or link.startswith("data:") for link in re.findall(r'href="([^"]+)"', svg))
        assert "@import" not in svg
        assert "mean" in image["alt"]
    for row in said["rows"]:
        assert f"{row['imbalance']['p95']:.3f}" in parsed.text
    if command == "advise":
        assert said["code"] in parsed.text
        assert all(line in parsed.text for line in said["why"].splitlines())


def test_a_page_is_written_where_nothing_fits(recorded):
    pytest.importorskip("matplotlib")
    page = recorded.with_name("out.html")
    options = ("--ranks", "3", "--redundants", "1", "--placements", "topology", "--plot", str(page))
    (row,) = simulate(recorded, *options)
    parsed = Page(page.read_text())
    assert row["does_not_fit"] in parsed.text
    assert [tag for tag, _ in parsed.tags].count("img") == 1  # and no rank loads


@pytest.mark.parametrize("kind", ["none", "eplb_even", "eplb", "per_batch"])
def test_rank_loads_of_a_picture_are_those_judged(kind, recorded):
    judged = study.Study(study.Recording(recorded, window=WINDOW))
    candidate = _simulate.Candidate(kind, 8, 1)
    imbalance = _simulate.judge(candidate, judged.loads).imbalance  # [window, windows * layers]
    for layer in range(LAYERS):
        tokens = _simulate.rank_loads(candidate, judged.layer(layer, 256))
        np.testing.assert_allclose(tokens.sum(axis=1), TOKENS * K)
        by_batch = imbalance[:, layer::LAYERS].T.ravel()
        np.testing.assert_allclose(tokens.max(axis=1) / (TOKENS * K / 8), by_batch, rtol=1e-12)
        last = _simulate.rank_loads(candidate, judged.layer(layer, WINDOW))
        np.testing.assert_array_equal(last, tokens[-WINDOW:])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--ranks", "4", "--ranks-per-node", "3"], "--ranks-per-node must divide --ranks, 4, got 3"),
        (["--ranks", "4", "--redundants", "0"], "--redundants must be at least 1, got 0"),
        (["--ranks", "4", "--within", "-1"], "--within must be a percentage from 0 on, got -1"),
        (["--ranks", "4", "--max-copies-mb", "6"], "needs to know what an expert takes: pass --expert-mb or --widths"),
        (["--ranks", "4", "--max-copies-mb", "nan", "--expert-mb", "1"], "--max-copies-mb must be positive and finite"),
    ],
)
def test_bad_options_of_advise_are_one_line(options, said, tmp_path):
    np.savez(tmp_path / "trace.npz", counts=np.ones((4, 2, 8), int))
    with pytest.raises(SystemExit, match=said) as raised:
        commands.run(["advise", str(tmp_path / "trace.npz"), "--window", "2", *options])
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["deepseek_v2_lite_topk_ids", "gpt_oss_20b_decode_counts"])
def test_advice_on_recorded_traces_brings_the_busiest_rank_near_the_mean(name, traces, tmp_path):
    """On a few batches: with one slot for copies of each rank, where there is nearly twice the mean without."""
    np.savez(tmp_path / "trace.npz", counts=trace.read(traces / f"{name}.npz")[-1][-8:])
    said = advise(tmp_path / "trace.npz", "--ranks", "8", "--redundants", "1")
    assert said["rows"][said["chosen"]]["imbalance"]["p95"] < 1.03
    assert next(row for row in said["rows"] if row["placement"] == "none")["imbalance"]["p95"] > 1.5


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
