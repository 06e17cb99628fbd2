"""`evaluate` against counts of its own, HiGHS, and the tokens that `balance` sends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import many_replicas, optimum, placement, random_loads, skewed_ids, topology

import jax_lplb as lplb
from jax_lplb import _evaluate, eplb


def cube(load=None, **options) -> lplb.Placement:
    return lplb.Placement.from_topology(
        topology.cube(), num_experts=64, num_ranks=8, redundants_per_rank=2, load=load, **options
    )


@pytest.fixture
def loads(rng) -> np.ndarray:
    rows = rng.lognormal(0, rng.uniform(0, 2, (300, 1)), (300, 64)) * 50
    rows[0] = 0
    return np.rint(rows).astype(np.int64)


@pytest.mark.parametrize("kind", ["cube", "repeats", "eplb", "many"])
def test_each_number(rng, loads, kind):
    """Several parts, the last not full; a load of zeros."""
    if kind == "cube":
        place = cube(loads.mean(axis=0))
    elif kind == "repeats":
        past = loads.mean(axis=0)
        past[:8] *= 20
        place = cube(past, repeats=True)
        assert np.any(place.log2phy[:, 2] >= 0)
    elif kind == "eplb":
        place = lplb.Placement.from_eplb(loads.mean(axis=0), num_ranks=8, redundants_per_rank=2)
    else:
        place = many_replicas(rng, num_experts=64, num_ranks=8, redundants=3)
    result = lplb.evaluate(place, loads)
    assert all(isinstance(array, np.ndarray) and array.shape == (300,) for array in result)
    assert [array[0] for array in result[:5]] == [1.0] * 5
    rank = np.arange(place.num_physical) // place.slots_per_rank
    for step in range(1, 300, 13):
        load, mean = loads[step], loads[step].sum() / 8
        contiguous = load.reshape(8, 8).sum(axis=1).max() / mean
        home = load[place.home_order].reshape(8, 8).sum(axis=1).max() / mean
        even = np.bincount(rank, (load / np.bincount(place.phy2log))[place.phy2log], 8).max() / mean
        best = optimum(load, place).max() / mean
        got = [result.contiguous[step], result.home[step], result.even[step]]
        np.testing.assert_allclose(got, [contiguous, home, even], rtol=1e-12)
        assert best * (1 - 1.1e-4) <= result.optimum[step] <= best * (1 + 1e-9)
        assert result.gap[step] <= 1e-4
        # Whole tokens: a replica takes about one more or less.
        assert result.optimum[step] <= result.assigned[step] <= result.optimum[step] * (1 + 2e-4) + 20 / mean
    if kind in ("cube", "repeats"):
        assert np.any(result.home != result.contiguous)
    else:  # without a topology rows of weights are in logical order
        np.testing.assert_array_equal(result.home, result.contiguous)


@pytest.mark.parametrize("kind", ["cube", "per batch"])
def test_ranks_of_different_speeds(loads, kind):
    """Loads are taken over speeds; copies are chosen by speed, and a rank of speed 0 counts for nothing."""
    place = cube() if kind == "cube" else lplb.Placement.per_batch(num_experts=64, num_ranks=8, redundants_per_rank=2)
    speed = np.array([2, 1, 1, 0, 1, 1, 0.5, 1], np.float32)
    loads = loads[1:30]
    inverse = np.where(speed > 0, np.mean(speed) / np.where(speed > 0, speed, 1), 0)
    result = lplb.evaluate(place, loads, rank_speed=jax.numpy.asarray(speed))
    for step in range(0, 29, 4):
        load, mean = loads[step], loads[step].sum() / 8
        chosen = place
        if kind == "per batch":
            chosen = jax.tree.map(np.asarray, place.choose(load.astype(np.int32), rank_speed=speed))
        rank = np.arange(chosen.num_physical) // chosen.slots_per_rank
        held = chosen.phy2log >= 0
        home = np.bincount(chosen.home_rank, load, 8)
        even = np.bincount(rank[held], (load / np.bincount(chosen.phy2log[held]))[chosen.phy2log[held]], 8)
        got = [result.home[step], result.even[step], result.copies[step]]
        expected = [(home * inverse).max() / mean, (even * inverse).max() / mean, held.sum() - 64]
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        best = optimum(load, chosen, speed).max() / mean
        assert best * (1 - 2e-4) <= result.optimum[step] <= max(best * (1 + 1e-9), 1)
        assert result.gap[step] <= 1e-4
        assert result.optimum[step] <= result.assigned[step] <= result.optimum[step] * (1 + 2e-4) + 40 / mean


@pytest.mark.parametrize("solver", ["ipm", "auto"])
@pytest.mark.parametrize("kind", ["cube", "two groups", "eplb", "many"])
def test_optimum_is_a_lower_bound(rng, kind, solver):
    """Whatever rounding did: of few tokens, of many, of loads that upset solvers."""
    place = {
        "cube": cube,
        "two groups": lambda: placement(topology.cube(), 64, 16, 2),
        "eplb": lambda: lplb.Placement.from_eplb(rng.lognormal(0, 1, 64), num_ranks=8, redundants_per_rank=2),
        "many": lambda: many_replicas(rng, num_experts=64, num_ranks=8, redundants=3),
    }[kind]()
    few = [rng.multinomial(tokens, rng.dirichlet(np.full(64, 0.3))) for tokens in [1, 8, 64, 512] * 10]
    loads = np.concatenate([random_loads(rng, 64, 40), few]).astype(np.int64)
    loads = loads[loads.sum(axis=1) > 0]
    result = lplb.evaluate(place, loads, solver=solver)
    best = np.array([optimum(load, place).max() for load in loads]) / (loads.sum(axis=1) / place.num_ranks)
    assert np.all(result.optimum <= best * (1 + 1e-9))
    assert np.all(result.optimum >= best * (1 - result.gap - 1e-5))
    for reached in (result.assigned, result.even):
        assert np.all(result.optimum <= reached * (1 + 1e-12))


@pytest.mark.parametrize("solver", ["ipm", "edge_balance"])
def test_assigned_is_what_balance_sends(rng, solver):
    place = cube()
    ids = skewed_ids(rng, 2048, 4, 64)
    load = np.bincount(ids.ravel(), minlength=64)
    out = lplb.balance(ids, place, solver=solver)
    assigned = lplb.evaluate(place, load, solver=solver).assigned
    assert assigned.shape == ()
    np.testing.assert_allclose(assigned, np.asarray(out.rank_load).max() / (load.sum() / 8), rtol=1e-12)


def test_never_worse_than_the_even_split(loads):
    for place in (cube(), lplb.Placement.from_eplb(loads[3], num_ranks=8, redundants_per_rank=4)):
        result = lplb.evaluate(place, loads)
        found = result.optimum / (1 - result.gap)  # by `solve`: its certificate read the other way round
        assert np.all(found <= result.even * (1 + 1e-4))


def test_raw_eplb_with_two_replicas_on_a_rank(loads):
    """The even split uses both; and no load is worse off with the placement that replaces one of them."""
    load = np.array([5000, *[10] * 31])
    phy2log = eplb.rebalance_experts(load[None], 40, 1, 1, 4)[0][0]
    by_rank = phy2log.reshape(4, 10)
    assert any(len(set(row)) < 10 for row in by_rank.tolist())
    trace = np.concatenate([loads[:50, :32], load[None]])
    raw = lplb.evaluate(phy2log, trace, num_ranks=4)
    part = trace / np.bincount(phy2log)
    rank_load = part[:, by_rank].sum(axis=2)
    np.testing.assert_allclose(raw.even[1:], rank_load.max(axis=1)[1:] / (trace.sum(axis=1)[1:] / 4), rtol=1e-12)
    ours = lplb.evaluate(lplb.Placement.from_eplb(load, num_ranks=4, redundants_per_rank=2), trace)
    assert np.all(ours.optimum <= raw.even * (1 + 1e-4))
    assert np.all(raw.optimum <= raw.even * (1 + 1e-4))


@pytest.mark.parametrize("kind", ["placement", "array"])
def test_one_placement_for_all_layers(loads, kind):
    """Of a trace [steps, layers, experts], and of any shape."""
    place, options = (cube(), {}) if kind == "placement" else (cube().phy2log, {"num_ranks": 8})
    flat = lplb.evaluate(place, loads, **options)
    boxed = lplb.evaluate(place, loads.reshape(50, 6, 64).astype(np.int16), **options)
    for one, other in zip(flat, boxed, strict=True):
        np.testing.assert_array_equal(one.reshape(50, 6), other)
    assert lplb.evaluate(place, loads[:0], **options).even.shape == (0,)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16])
def test_counts_as_floats(loads, dtype):
    """Whole numbers in whatever dtype they were recorded."""
    loads = loads[:20].astype(dtype)
    for got, expected in zip(lplb.evaluate(cube(), loads), lplb.evaluate(cube(), loads.astype(int)), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_averages_are_refused_and_rounded_as_the_error_says(loads):
    averages = loads[:20] / 8
    with pytest.raises(ValueError, match=r"loads must be whole numbers of tokens, got \d+\.\d+; .* np\.rint\(loads\)"):
        lplb.evaluate(cube(), averages)
    assert lplb.evaluate(cube(), np.rint(averages)).gap.max() <= 1e-4


@pytest.mark.parametrize("kind", ["cube", "eplb", "array"])
def test_stacked_layers_are_judged_each_by_its_own_placement(rng, loads, kind):
    """Of a trace [steps, layers, experts]: over several parts, whose length the number of layers does not divide."""
    trace = rng.permutation(np.concatenate([loads, loads])).reshape(100, 2, 3, 64)
    past, options = trace[:20].mean(axis=0), {}
    stacked = cube(past) if kind == "cube" else lplb.Placement.from_eplb(past, num_ranks=8, redundants_per_rank=2)
    if kind == "array":
        stacked = eplb.rebalance_experts(past.reshape(6, 64), 80, 1, 1, 8)[0].reshape(2, 3, 80)
        options = {"num_ranks": 8}
    together = lplb.evaluate(stacked, trace, **options)
    for layer in np.ndindex(2, 3):
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
        for got, alone in zip(together, lplb.evaluate(one, trace[:, *layer], **options), strict=True):
            assert got.shape == (100, 2, 3)
            np.testing.assert_allclose(got[:, *layer], alone, rtol=1e-12)
    np.testing.assert_array_equal(lplb.evaluate(stacked, trace[7], **options).assigned, together.assigned[7])


BEYOND = {
    "4104 experts": lambda: placement(topology.ring(2), 4104, 8, 2),
    "144 ranks a group": lambda: many_replicas(np.random.default_rng(0), num_experts=288, num_ranks=144, redundants=2),
}


@pytest.mark.parametrize("beyond", BEYOND)
def test_placements_beyond_the_custom_calls(rng, beyond):
    """By pure JAX, without being asked; the custom calls, asked for, refuse."""
    place = BEYOND[beyond]()
    loads = rng.integers(0, 100, (2, place.num_experts))
    with pytest.raises(ValueError, match=f"{beyond}.* pass implementation='xla'"):
        lplb.evaluate(place, loads, implementation="ffi")
    result = lplb.evaluate(place, loads)
    best = [optimum(load, place).max() / (load.sum() / place.num_ranks) for load in loads]
    np.testing.assert_allclose(result.optimum, best, rtol=4e-4)


def test_large_placements_are_evaluated_in_small_parts(monkeypatch, loads):
    """Of as many loads as have room; with the same results."""
    expected = lplb.evaluate(cube(), loads[:20])
    monkeypatch.setattr("jax_lplb._evaluate._ELEMENTS", 3 * 64 * 2 * 8)
    sizes = []
    balance_all = _evaluate._balance_all
    monkeypatch.setattr(
        _evaluate, "_balance_all", lambda part, *rest: sizes.append(len(part)) or balance_all(part, *rest)
    )
    for got, want in zip(lplb.evaluate(cube(), loads[:20]), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert sizes == [3] * 7


def test_traced_arguments_are_refused():
    for kind, call in (
        ("loads", lambda place, loads: lplb.evaluate(cube(), loads)),
        ("placement", lambda place, loads: lplb.evaluate(place, np.ones((2, 64), int))),
    ):
        with pytest.raises(TypeError, match=f"{kind} must not be traced: evaluate runs on the host"):
            jax.jit(call)(cube(), np.ones((2, 64), np.int32))


def test_a_placement_of_device_arrays(loads):
    np.testing.assert_array_equal(
        lplb.evaluate(jax.device_put(cube()), loads[:5]).optimum, lplb.evaluate(cube(), loads[:5]).optimum
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loads": np.ones((2, 64), bool)}, TypeError, "loads must hold numbers, .* bool"),
        ({"loads": np.full((2, 64), np.nan)}, ValueError, "loads must be whole numbers of tokens, got nan"),
        ({"loads": np.full((2, 64), np.inf)}, ValueError, "loads must be whole numbers of tokens, got inf"),
        ({"loads": np.full((2, 64), 1e300)}, ValueError, "loads must have sums below 2"),
        ({"loads": np.full((2, 64), -3.0)}, ValueError, "loads must not be negative, got -3"),
        ({"loads": np.ones((2, 63), int)}, ValueError, r"loads must have shape \[..., num_experts\] = \[..., 64\]"),
        ({"loads": np.array(3)}, ValueError, r"loads must have shape \[..., num_experts\], got shape \(\)"),
        (
            {"placement": cube(np.ones((3, 64)))},
            ValueError,
            r"loads must have shape \[..., layers, num_experts\] = \[..., 3, 64\], got \(2, 64\)",
        ),
        ({"rank_speed": np.ones(7, np.float32)}, ValueError, r"rank_speed must have shape \[num_ranks\] = \[8\]"),
        ({"rank_speed": jax.numpy.ones(8) * -1}, ValueError, "rank_speed must be finite and not negative, got -1.0"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None, 'ffi' or 'xla', got 'cuda'"),
        ({"loads": -np.ones((2, 64), int)}, ValueError, "loads must not be negative, got -1"),
        ({"loads": np.full((2, 64), 2**26)}, ValueError, "loads must have sums below 2"),
        ({"num_ranks": 8}, ValueError, "num_ranks must not be given beside a Placement"),
        ({"solver": "simplex"}, ValueError, "solver"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"placement": np.arange(64)}, ValueError, "num_ranks must be given where placement is an array"),
        ({"placement": np.arange(64), "num_ranks": 5}, ValueError, "a multiple of num_ranks = 5"),
        ({"placement": np.arange(64.0), "num_ranks": 8}, TypeError, "placement must hold integers"),
        ({"placement": np.zeros(64, int), "num_ranks": 8}, ValueError, "phy2log: expert 1 has no slot"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        lplb.evaluate(**({"placement": cube(), "loads": np.ones((2, 64), int)} | arguments))
