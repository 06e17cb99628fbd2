"""Placements saved and loaded: what comes back, and what is said of files that are not good."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lplb as lplb

Placement, topology = lplb.Placement, lplb.topology
PAST = np.random.default_rng(0).permutation(64).reshape(2, 32)  # of two layers


def along(topo=None, **options) -> lplb.Placement:
    options = {"num_experts": 32, "num_ranks": 8, "redundants_per_rank": 2, **options}
    return Placement.from_topology(topo or topology.cube(), **options)


def per_batch(**options) -> lplb.Placement:
    return Placement.per_batch(num_experts=32, num_ranks=8, redundants_per_rank=2, **options)


PLACEMENTS = {
    "topology": lambda: along(),
    "topology, two groups, no copies": lambda: along(topology.ring(4), redundants_per_rank=0),
    "topology, repeats, stacked": lambda: along(load=PAST, repeats=True),
    "eplb, stacked": lambda: Placement.from_eplb(PAST, num_ranks=8, redundants_per_rank=2, max_replicas=7),
    "phy2log, experts not a multiple of ranks": lambda: Placement.from_phy2log([0, 1, 2, 0], 2, max_replicas=2),
    "per batch": lambda: per_batch(),
    "per batch, numbers beyond int64 and of NumPy": lambda: per_batch(
        num_groups=2, max_replicas=3, target=1 + 1e-15, min_tokens=10**30, max_sends=np.int64(3)
    ),
    "per batch, chosen, stacked": lambda: per_batch(num_groups=2).choose(jnp.asarray(PAST**2, jnp.int32)),
    "per batch, kept": lambda: dataclasses.replace(per_batch().choose(jnp.asarray(PAST[0], jnp.int32)), planning=None),
    "on a device": lambda: jax.tree.map(jnp.asarray, along()),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_what_is_loaded_equals_what_was_saved(tmp_path, name):
    placement = PLACEMENTS[name]()
    placement.save(tmp_path / "placement")
    loaded = Placement.load(str(tmp_path / "placement"))
    assert loaded == placement
    assert hash(loaded) == hash(placement)
    assert jax.tree.structure(loaded) == jax.tree.structure(placement)
    assert (loaded.topology, loaded.planning) == (placement.topology, placement.planning)
    for leaf, saved in zip(jax.tree.leaves(loaded), jax.tree.leaves(placement), strict=True):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == np.int32
        np.testing.assert_array_equal(leaf, saved)
    np.testing.assert_array_equal(loaded.home_order, placement.home_order)
    assert [file.name for file in tmp_path.iterdir()] == ["placement"]  # no suffix added, nothing left beside it


@pytest.mark.parametrize("how", ["on the host", "static", "on devices"])
def test_a_loaded_placement_does_not_recompile(tmp_path, how):
    run = jax.jit(lambda placement: placement.log2phy + 1, static_argnums=0 if how == "static" else None)
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("ep",), devices=jax.devices("cpu")), jax.P())
    for name in ("topology", "per batch, numbers beyond int64 and of NumPy"):
        run.clear_cache()
        placement = PLACEMENTS[name]()
        if how == "on devices":
            placement = jax.device_put(placement, everywhere)
        placement.save(tmp_path / "placement.npz")
        loaded = Placement.load(tmp_path / "placement.npz")
        if how == "on devices":
            loaded = jax.device_put(loaded, everywhere)
        expected, got = run(placement), run(loaded)
        np.testing.assert_array_equal(got, expected)
        assert run._cache_size() == 1


def test_saving_replaces_a_file_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "placement.npz"
    along().save(path)
    per_batch().save(path)
    assert Placement.load(path) == per_batch()

    def full(file, **_):
        file.write(b"PK")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        along().save(path)
    assert Placement.load(path) == per_batch()
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved_is_refused_and_nothing_written(tmp_path):
    placement, path = along(), tmp_path / "placement.npz"
    with pytest.raises(TypeError, match="traced leaves has no contents to save yet"):
        jax.jit(lambda placement: placement.save(path))(placement)
    wrong = dataclasses.replace(placement, phy2log=placement.phy2log[::-1])
    with pytest.raises(ValueError, match="cannot be saved, as load would refuse it: phy2log and log2phy contradict"):
        wrong.save(path)
    assert not list(tmp_path.iterdir())


# ---- Files that are not good -----------------------------------------------------------------------------------------


def refused(path, what: str) -> None:
    """One line, which names the file."""
    with pytest.raises(ValueError, match=what) as caught:
        Placement.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.fixture
def saved(tmp_path):
    """Saves one of `PLACEMENTS` with some entries, or static parts, changed; None takes an entry away."""

    def save(placement="topology", *, parts=None, **entries):
        path = tmp_path / "changed.npz"
        PLACEMENTS[placement]().save(path)
        with np.load(path, allow_pickle=False) as archive:
            there = dict(archive) | entries
        if parts:
            there["static"] = np.array(json.dumps(json.loads(str(there["static"])) | parts))
        np.savez(path, **{name: entry for name, entry in there.items() if entry is not None})
        return path

    return save


def test_no_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.npz"))):
        Placement.load(tmp_path / "none.npz")


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04", b"text", "npy", "cut", "flipped"])
def test_files_that_are_no_npz_are_refused(saved, contents):
    path = saved()
    whole = path.read_bytes()
    if contents == "npy":
        np.save(path.with_suffix(".npy"), np.arange(3))
        whole = path.with_suffix(".npy").read_bytes()
    elif contents == "cut":
        whole = whole[: len(whole) // 2]
    elif contents == "flipped":
        at = whole.index(along().phy2log.tobytes())
        whole = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    else:
        whole = contents
    path.write_bytes(whole)
    reason = "cannot be read: Bad CRC-32" if contents == "flipped" else "no npz, or was cut short"
    refused(path, f"expected an npz file with .*, found .*{reason}")


def test_pickled_entries_are_not_loaded(saved):
    refused(saved(phy2log=np.array([{}])), "cannot be read: Object arrays cannot be loaded")


@pytest.mark.parametrize("entry", ["version", "phy2log", "log2phy", "static"])
def test_a_missing_entry_is_named(saved, entry):
    there = [name for name in ("version", "phy2log", "log2phy", "static") if name != entry]
    refused(saved(**{entry: None}), f"expected an npz file with .*{entry}.*, found {', '.join(there)}$")


@pytest.mark.parametrize("version", [2, 0, "two", [1]])
def test_another_version_is_refused(saved, version):
    refused(saved(version=np.array(version), phy2log=None), re.escape(f"of version 1, found version {version!r}; load"))


def edited(placement: str, leaf: str, *edits) -> dict[str, np.ndarray]:
    array = np.array(getattr(PLACEMENTS[placement](), leaf))
    for where, value in edits:
        array[where] = value
    return {leaf: array}


KEPT = "eplb, stacked"


@pytest.mark.parametrize(
    ("placement", "changes", "what"),
    [
        ("topology", {"static": np.array("{")}, "not a placement: Expecting property name"),
        (
            "topology",
            {"static": np.array("{}")},
            "expected the static parts num_groups, num_ranks, planning, r2o, found",
        ),
        ("topology", {"parts": {"num_ranks": 8.0}}, "num_ranks must be an integer, got 8.0"),
        ("topology", {"parts": {"num_ranks": 5}}, "expected slots of 5 ranks in 1 equal groups, found 48 slots"),
        ("topology", {"parts": {"num_groups": 3}}, "expected slots of 8 ranks in 3 equal groups"),
        ("topology", {"parts": {"num_groups": 2}}, "within each of 2 groups, found one in another"),
        ("topology", {"parts": {"r2o": [[1], [0]]}}, "in groups of 2 ranks, found groups of 8"),
        ("topology", {"parts": {"r2o": [[0], [1]]}}, "rank 0 copies from itself"),
        ("topology", {"parts": {"r2o": [[1], []]}}, "not a placement"),
        ("topology", {"parts": {"planning": {}}}, "expected a topology or planning, found both"),
        (KEPT, {"parts": {"r2o": topology.cube().r2o.tolist()}}, "homes of experts along the topology, .* in slots"),
        ("per batch", {"parts": {"planning": {"target": 0.5}}}, "target must be at least 1"),
        ("per batch", {"parts": {"planning": {"other": 1}}}, "unexpected keyword argument 'other'"),
        (KEPT, {"parts": {"planning": {"target": 2.0}}}, "expected homes in logical order"),
        ("topology", {"phy2log": np.arange(48)}, "phy2log: expected int32, found int64"),
        ("topology", {"phy2log": np.zeros((1, 48), np.int32)}, r"found shapes \(1, 48\) and \(32, 2\)"),
        ("topology", {"phy2log": np.zeros(0, np.int32)}, "found 0 slots"),
        ("topology", edited("topology", "phy2log", (3, 32)), "phy2log: expected numbers from -1 to 31, found 32"),
        ("topology", edited("topology", "log2phy", ((0, 0), -2)), "log2phy: expected numbers from -1 to 47, found -2"),
        ("topology", edited("topology", "log2phy", ((0, 0), -1)), "found -1 before a slot"),
        (
            KEPT,
            edited(KEPT, "phy2log", ((1, 47), -1)),
            r"contradict each other: slot 1, 47 holds expert -1 by the former",
        ),
        (KEPT, edited(KEPT, "log2phy", ((1, 5, 0), 0)), "contradict each other: slot 1, "),
        ("per batch", edited("per batch", "log2phy", ((0, 1), 0)), "expected each slot once, found one twice"),
    ],
)
def test_contradictory_files_are_refused(saved, placement, changes, what):
    refused(saved(placement, **changes), what)
