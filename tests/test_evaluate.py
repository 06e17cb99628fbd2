"""`evaluate` against counts of its own, HiGHS, and the tokens that `balance` sends."""

import jax
import numpy as np
import pytest
from helpers import many_replicas, optimum, skewed_ids, topology

import jax_lplb as lplb
from jax_lplb import eplb


def cube(load=None) -> lplb.Placement:
    return lplb.Placement.from_topology(topology.cube(), num_experts=64, num_ranks=8, redundants_per_rank=2, load=load)


@pytest.fixture
def loads(rng) -> np.ndarray:
    rows = rng.lognormal(0, rng.uniform(0, 2, (300, 1)), (300, 64)) * 50
    rows[0] = 0
    return np.rint(rows).astype(np.int64)


@pytest.mark.parametrize("kind", ["cube", "eplb", "many"])
def test_each_number(rng, loads, kind):
    """Several parts, the last not full; a load of zeros."""
    if kind == "cube":
        place = cube(loads.mean(axis=0))
    elif kind == "eplb":
        place = lplb.Placement.from_eplb(loads.mean(axis=0), num_ranks=8, redundants_per_rank=2)
    else:
        place = many_replicas(rng, num_experts=64, num_ranks=8, redundants=3)
    result = lplb.evaluate(place, loads)
    assert all(isinstance(array, np.ndarray) and array.shape == (300,) for array in result)
    assert [array[0] for array in result[:4]] == [1.0] * 4
    rank = np.arange(place.num_physical) // place.slots_per_rank
    for step in range(1, 300, 13):
        load, mean = loads[step], loads[step].sum() / 8
        home = np.bincount(rank[place.log2phy[:, 0]], load, 8).max() / mean
        even = np.bincount(rank, (load / np.bincount(place.phy2log))[place.phy2log], 8).max() / mean
        best = optimum(load, place).max() / mean
        np.testing.assert_allclose([result.home[step], result.even[step]], [home, even], rtol=1e-12)
        assert best * (1 - 1e-6) <= result.optimum[step] <= best * (1 + 1.1e-4)
        assert result.gap[step] <= 1e-4
        # Whole tokens: a replica takes about one more or less.
        assert result.optimum[step] - 1 / mean <= result.assigned[step] <= result.optimum[step] + 20 / mean


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
        assert np.all(result.optimum <= result.even * (1 + 1e-6))


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


def test_leading_axes(loads):
    place = cube()
    flat = lplb.evaluate(place, loads)
    boxed = lplb.evaluate(place, loads.reshape(50, 6, 64).astype(np.int16))
    for one, other in zip(flat, boxed, strict=True):
        np.testing.assert_array_equal(one.reshape(50, 6), other)
    assert lplb.evaluate(place, loads[:0]).even.shape == (0,)


def test_a_placement_of_device_arrays(loads):
    np.testing.assert_array_equal(
        lplb.evaluate(jax.device_put(cube()), loads[:5]).optimum, lplb.evaluate(cube(), loads[:5]).optimum
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loads": np.ones((2, 64))}, TypeError, "loads must hold integers, .* float64"),
        ({"loads": np.ones((2, 63), int)}, ValueError, r"loads must have shape \[..., num_experts\] = \[..., 64\]"),
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
