"""Recorded loads: what the trace holds, what is held meanwhile, and what is refused."""

import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lplb as lplb


def loads_of(rng, steps: int, *shape: int) -> np.ndarray:
    return rng.integers(0, 100, (steps, *shape), np.int32)


@pytest.mark.parametrize("shape", [(16,), (3, 16)])
@pytest.mark.parametrize("of", [jnp.asarray, np.asarray, np.ndarray.tolist])
def test_a_trace_holds_the_loads_of_all_steps(tmp_path, rng, shape, of):
    loads = loads_of(rng, 7, *shape)
    with lplb.Recorder(tmp_path / "new" / "trace", chunk_steps=3) as recorder:
        for load in loads:
            recorder.record(of(load))
    counts = lplb.load_trace(str(tmp_path / "new" / "trace"))
    np.testing.assert_array_equal(counts, loads.reshape(7, -1, 16))
    assert counts.dtype == np.asarray(of(loads[0])).dtype
    sizes = {file.name: len(lplb.load_trace(file)) for file in (tmp_path / "new" / "trace").iterdir()}
    assert sizes == {"0000000000.npz": 3, "0000000003.npz": 3, "0000000006.npz": 1}


def test_evaluate_takes_a_trace(tmp_path, rng):
    loads = loads_of(rng, 3, 2, 16)
    with lplb.Recorder(tmp_path) as recorder:
        for load in loads:
            recorder.record(jax.device_put(load))
    placement = lplb.Placement.from_phy2log(np.arange(16), 4)
    rank_loads = loads.reshape(3, 2, 4, 4).sum(axis=3)
    np.testing.assert_allclose(
        lplb.evaluate(placement, lplb.load_trace(tmp_path)).assigned, rank_loads.max(axis=2) / rank_loads.mean(axis=2)
    )


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"every": 3}, [0, 3, 6, 9]),
        ({"max_steps": 5}, [0, 1, 2, 3, 4]),
        ({"max_steps": 4, "every": 2}, [0, 2, 4, 6]),
        ({"max_steps": None}, list(range(10))),
    ],
)
def test_no_more_is_recorded_than_is_asked_for(tmp_path, rng, options, kept):
    loads = loads_of(rng, 10, 4)
    with lplb.Recorder(tmp_path, chunk_steps=2, **options) as recorder:
        for load in loads:
            recorder.record(load)
    np.testing.assert_array_equal(lplb.load_trace(tmp_path)[:, 0], loads[kept])


def test_no_more_is_held_than_a_chunk(tmp_path):
    kept: list[jax.Array] = []
    recorder = lplb.Recorder(tmp_path, chunk_steps=3, max_steps=7)
    for step in range(9):
        load = jnp.full(4, step, jnp.int32)
        recorder.record(load)
        kept = [*recorder._pending]
        assert len(kept) <= 3
    assert not kept  # with max_steps all is written, though nobody closed it
    assert lplb.load_trace(tmp_path)[:, 0, 0].tolist() == list(range(7))


def test_recording_does_not_wait_for_the_devices(tmp_path):
    go, waited = threading.Event(), []

    def hold(load):
        waited.append(go.wait(5))
        return load

    # JAX waits for callbacks on a single CPU device when it calls them; of programs on several it does not.
    mesh = jax.make_mesh((2,), ("ep",), devices=jax.devices("cpu")[:2])
    like = jax.ShapeDtypeStruct((2,), jnp.int32)
    step = jax.jit(jax.shard_map(lambda load: jax.pure_callback(hold, like, load), mesh=mesh, out_specs=jax.P("ep")))
    loads = [jax.device_put(np.full(4, n, np.int32), jax.NamedSharding(mesh, jax.P("ep"))) for n in range(2)]
    with lplb.Recorder(tmp_path, chunk_steps=2) as recorder:
        for load in loads:
            recorder.record(step(load))
        go.set()
    assert waited == [True] * 4
    assert lplb.load_trace(tmp_path)[:, 0].tolist() == [[0] * 4, [1] * 4]


def test_counts_that_the_caller_goes_on_with_are_copied(tmp_path):
    counts = np.zeros(4, np.int32)
    with lplb.Recorder(tmp_path) as recorder:
        for _ in range(3):
            counts += 1
            recorder.record(counts)
    assert lplb.load_trace(tmp_path)[:, 0, 0].tolist() == [1, 2, 3]


def test_a_trace_cut_short_is_read_up_to_its_last_chunk(tmp_path):
    recorder = lplb.Recorder(tmp_path, chunk_steps=2)
    for step in range(5):
        recorder.record(np.full(4, step, np.int32))
    (tmp_path / "0000000004.npz.0.part").write_bytes(b"PK")  # as of a process killed while it wrote
    assert lplb.load_trace(tmp_path)[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_what_was_recorded_before_an_error_is_kept(tmp_path):
    def run() -> None:
        with lplb.Recorder(tmp_path) as recorder:
            recorder.record(np.arange(4))
            raise RuntimeError("of the step")

    with pytest.raises(RuntimeError, match="of the step"):
        run()
    np.testing.assert_array_equal(lplb.load_trace(tmp_path), np.arange(4)[None, None])


def test_a_full_disk_loses_nothing_that_was_taken(tmp_path, monkeypatch):
    recorder = lplb.Recorder(tmp_path, chunk_steps=2)
    for step in (0, 1):
        recorder.record(np.full(4, step))

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as context:
        context.setattr(np, "savez", full)
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                recorder.record(np.full(4, 2))
        with pytest.raises(OSError, match="No space left"):
            recorder.close()
    recorder.record(np.full(4, 2))
    recorder.close()
    assert lplb.load_trace(tmp_path)[:, 0, 0].tolist() == [0, 1, 2]


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_a_recorder_overwrites_nothing(tmp_path):
    with lplb.Recorder(tmp_path / "trace") as recorder:
        recorder.record(np.arange(4))
    (tmp_path / "file").write_text("")
    for path in ("trace", "file"):
        with pytest.raises(FileExistsError, match=re.escape(repr(str(tmp_path / path)))):
            lplb.Recorder(tmp_path / path)
    np.testing.assert_array_equal(lplb.load_trace(tmp_path / "trace"), np.arange(4)[None, None])


def test_a_closed_recorder_takes_nothing(tmp_path):
    with lplb.Recorder(tmp_path) as recorder:
        pass
    recorder.close()
    with pytest.raises(ValueError, match="is closed"):
        recorder.record(np.arange(4))
    with pytest.raises(ValueError, match="without npz files"):
        lplb.load_trace(tmp_path)


@pytest.mark.parametrize("option", ["every", "max_steps", "chunk_steps"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError)])
def test_numbers_of_a_recorder_are_checked(tmp_path, option, value, error):
    with pytest.raises(error, match=f"{option} must be .*, got {value}"):
        lplb.Recorder(tmp_path / "trace", **{option: value})
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("load", "error", "what"),
    [
        (np.zeros(4, np.float32), TypeError, "must hold integers, .* got dtype float32"),
        (np.zeros(4, bool), TypeError, "got dtype bool"),
        (jnp.zeros(4, jnp.int4), TypeError, "got dtype int4"),
        (np.int32(4), ValueError, r"\[num_experts\] or \[layers, num_experts\], got \(\)"),
        (np.zeros((2, 3, 4), np.int32), ValueError, r"got \(2, 3, 4\)"),
        (np.zeros(0, np.int32), ValueError, r"got \(0,\)"),
        (np.zeros(5, np.int32), ValueError, r"must be int32\[4\] as in the first step, got int32\[5\]"),
        (np.zeros(4, np.int64), ValueError, r"got int64\[4\]"),
    ],
)
def test_a_load_that_does_not_fit_is_refused_and_leaves_the_trace_good(tmp_path, load, error, what):
    with lplb.Recorder(tmp_path) as recorder:
        recorder.record(np.zeros(4, np.int32))
        with pytest.raises(error, match=what):
            recorder.record(load)
        with pytest.raises(TypeError, match="must not be traced"):
            jax.jit(recorder.record)(jnp.zeros(4, jnp.int32))
        recorder.record(np.ones(4, np.int32))
    assert lplb.load_trace(tmp_path)[:, 0, 0].tolist() == [0, 1]


@pytest.fixture
def trace(tmp_path):
    """The folder of one with three files."""
    with lplb.Recorder(tmp_path, chunk_steps=2) as recorder:
        for step in range(6):
            recorder.record(np.full(4, step, np.int32))
    return tmp_path


def test_files_of_other_origin_are_read_and_none_is_an_error(tmp_path):
    np.savez_compressed(tmp_path / "counts.npz", counts=np.arange(24).reshape(2, 3, 4))
    np.testing.assert_array_equal(lplb.load_trace(tmp_path / "counts.npz"), np.arange(24).reshape(2, 3, 4))
    with pytest.raises(FileNotFoundError):
        lplb.load_trace(tmp_path / "none")


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        (None, "expected 0000000002.npz next, with the steps from 2 on"),
        (b"PK", "found a file that is no npz, or was cut short"),
        ({"loads": np.zeros((2, 1, 4), np.int32)}, "expected an npz file with counts, found loads"),
        ({"counts": np.zeros((2, 4), np.int32)}, r"\[steps, layers, num_experts\], found int32 \[2, 4\]"),
        ({"counts": np.zeros((2, 1, 4))}, r"found float64 \[2, 1, 4\]"),
        (
            {"counts": np.zeros((2, 1, 5), np.int32)},
            r"expected counts int32 \[steps, 1, 4\] as .* found int32 \[2, 1, 5\]",
        ),
        ({"counts": np.zeros((2, 1, 4), np.int64)}, r"found int64 \[2, 1, 4\]"),
        ({"counts": np.zeros((1, 1, 4), np.int32)}, "expected 0000000003.npz next"),
    ],
)
def test_a_bad_file_of_a_trace_is_named(trace, entries, what):
    file = trace / "0000000002.npz"
    file.unlink()
    if isinstance(entries, bytes):
        file.write_bytes(entries)
    elif entries:
        np.savez(file, **entries)
    with pytest.raises(ValueError, match=what) as caught:
        lplb.load_trace(trace)
    assert str(caught.value).startswith(str(trace))
    assert "\n" not in str(caught.value)
