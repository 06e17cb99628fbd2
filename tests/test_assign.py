"""`assign`: which replica each token goes to, against a reference in plain Python and what the split promises."""

import contextlib
import itertools
import math
from fractions import Fraction
from functools import cache, partial

import helpers
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_lplb as lplb
from jax_lplb._assign import assign_with_starts
from jax_lplb._count import count

topology = lplb.topology
ONE = 2**30
MOST = 2**31 - 1
INT32 = np.iinfo(np.int32)
SHAPE = (1500, 2)  # of ids wherever no other is called for: pure JAX takes seconds to compile for 72 replicas


def quotas(split: np.ndarray, num_replicas: int, load: int) -> list[int]:
    """Whole tokens for each replica, near load * split / sum(split): the bounds between replicas, as fractions of the
    load in units of 2**-30, rounded to whole tokens. Negative and NaN entries count as nothing, nothing as even. Parts
    count as integers, the largest of which has 24 bits, or fewer, so that 32 bits hold their sum.
    """
    bits = min(24, 32 - (len(split) - 1).bit_length())
    parts = [v.item() if v > 0 else 0.0 for v in split[:num_replicas]]
    largest = max(parts, default=0.0)
    exponent = bits - math.frexp(largest)[1] if math.isfinite(largest) else bits - 129
    weights = [int(min(math.ldexp(part, min(exponent, 127)), 2**bits - 1)) for part in parts]
    weights = weights if any(weights) else [1] * num_replicas
    sums = np.float32(list(itertools.accumulate(weights)))
    shares = [v / sums[-1] for v in sums]
    bounds = [0]
    for share in shares[:-1]:
        fraction = int(share * np.float32(ONE)) if share < 1 else ONE
        bounds.append((fraction * load + ONE // 2) // ONE)
    return np.diff([*bounds, load]).tolist()


def choose(number: int, quotas: list[int], load: int) -> int:
    """The replica of token `number` of `load`: each takes its quota, evenly spread over what the ones before left."""
    for replica, quota in enumerate(quotas):
        taken = number * quota // load
        if (number + 1) * quota // load > taken:
            return replica
        number, load = number - taken, load - quota
    raise AssertionError("quotas do not sum to the load")


def reference(ids, split, log2phy, load, offset) -> np.ndarray:
    """Physical ids, token after token."""
    slots = [[slot for slot in row if slot >= 0] for row in log2phy.tolist()]
    each = [quotas(*args) for args in zip(split, map(len, slots), load.tolist(), strict=True)]
    numbers = np.maximum(offset, 0).tolist()
    physical_ids = []
    for expert in ids.ravel().tolist():
        if not 0 <= expert < len(slots):
            physical_ids.append(-1)
            continue
        number, total = numbers[expert], load[expert].item()
        numbers[expert] += 1
        # More tokens than the load knows of begin anew; where it knows of none, they go home.
        replica = choose(number % total, each[expert], total) if total > 0 else 0
        physical_ids.append(slots[expert][replica])
    return np.array(physical_ids, np.int32).reshape(ids.shape)


@cache
def assigner(implementation: str):
    def assign(ids, split, place, load, offset):
        return lplb.assign(ids, split, place, load=load, offset=offset, implementation=implementation)

    return jax.jit(assign)


def run(implementation: str, ids, split, place, load, offset=None) -> np.ndarray:
    offset = np.zeros(place.num_experts, np.int32) if offset is None else offset
    physical_ids = assigner(implementation)(ids, split, place, load, offset)
    assert physical_ids.dtype == np.int32
    assert physical_ids.shape == ids.shape
    return np.asarray(physical_ids)


def bincount(ids: np.ndarray, num_experts: int) -> np.ndarray:
    return np.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts).astype(np.int32)


def random_split(rng: np.random.Generator, place: lplb.Placement) -> np.ndarray:
    """Shares of any size, some of them 0, and some rows all 0."""
    split = rng.lognormal(0, 2, place.log2phy.shape) * (rng.random(place.log2phy.shape) < 0.8)
    return (split * (rng.random((place.num_experts, 1)) < 0.9) * (place.log2phy >= 0)).astype(np.float32)


@cache
def placements() -> dict[str, lplb.Placement]:
    rng = np.random.default_rng(1)
    return {
        "ring": helpers.placement(topology.ring(8), 16, 8, 1),
        "cube, 2 groups": helpers.placement(topology.cube(), 64, 16, 2),
        "no copies": helpers.placement(topology.ring(4), 16, 4, 0),
        "many": helpers.many_replicas(rng, num_experts=36, num_ranks=12, redundants=3),
        "72 replicas": helpers.everywhere(72),
        # Experts with 5, 4, 3, 2 and 1 replicas.
        "5 to 1": lplb.Placement.from_phy2log([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 3, 0, 3, 4], 5),
    }


@pytest.fixture(params=["ring", "cube, 2 groups", "no copies", "many", "72 replicas"])
def place(request) -> lplb.Placement:
    return placements()[request.param]


@pytest.mark.smoke
def test_equals_the_reference(platform, implementation, rng, place):
    """One shard of several: its tokens begin at an offset, and others follow; some ids are padding."""
    ids = rng.integers(-2, place.num_experts + 2, SHAPE, np.int32)
    split = random_split(rng, place)
    offset = rng.integers(0, 300, place.num_experts, np.int32)
    load = bincount(ids, place.num_experts) + offset + rng.integers(0, 300, place.num_experts, np.int32)
    physical_ids = run(implementation, ids, split, place, load, offset)
    np.testing.assert_array_equal(physical_ids, reference(ids, split, place.log2phy, load, offset))


@pytest.mark.parametrize("padding", [-1, 16, INT32.min, INT32.max], ids=["-1", "num_experts", "smallest", "largest"])
def test_padding(platform, implementation, rng, padding):
    """It comes back as -1, and does not number among the tokens."""
    place = placements()["ring"]
    ids = rng.integers(0, 16, (300, 4), np.int32)
    padded = np.where(rng.random(ids.shape) < 0.5, ids, padding)
    split, load = random_split(rng, place), bincount(padded, 16)
    physical_ids = run(implementation, padded, split, place, load)
    assert np.all(physical_ids[padded == padding] == -1)
    unpadded = run(implementation, padded[padded != padding], split, place, load)
    np.testing.assert_array_equal(physical_ids[padded != padding], unpadded)


@pytest.mark.parametrize("shape", [(60,), (60, 1), (12, 5), (3, 4, 5), (2, 3, 2, 5), (0,), (0, 8)], ids=str)
def test_keeps_the_shape(platform, implementation, rng, shape):
    place = placements()["ring"]
    ids = rng.integers(0, 16, shape, np.int32)
    split, load = random_split(rng, place), bincount(ids, 16)
    expected = reference(ids, split, place.log2phy, load, np.zeros(16, np.int32))
    np.testing.assert_array_equal(run(implementation, ids, split, place, load), expected)


def test_quotas_are_exact(platform, implementation, rng, place):
    """All tokens of the axis: each replica gets the share that the split names to within a token, and none of 0."""
    ids = rng.integers(0, place.num_experts, SHAPE, np.int32)
    ids[rng.random(ids.shape) < 0.3] = 0
    load, split = bincount(ids, place.num_experts), random_split(rng, place)
    physical_ids = run(implementation, ids, split, place, load)
    np.testing.assert_array_equal(place.phy2log[physical_ids], ids)
    got = np.bincount(physical_ids.ravel(), minlength=place.num_physical)[place.log2phy] * (place.log2phy >= 0)
    np.testing.assert_array_equal(got.sum(axis=1), load)
    parts = np.where(split.sum(axis=1, keepdims=True) > 0, split, place.log2phy >= 0).astype(np.float64)
    share = parts / parts.sum(axis=1, keepdims=True) * load[:, None]
    # Both bounds of a replica's share are rounded, by half a token; and float32 rounds the split.
    assert np.max(np.abs(got - share)) <= 1 + 1e-6 * load.max()
    assert np.all(got[parts == 0] == 0)


@pytest.fixture(params=["cpu ffi", "cpu xla", pytest.param("gpu ffi", marks=pytest.mark.gpu)])
def exact(request):
    """Implementations that divide as IEEE says. XLA does not on GPUs, where its quotas may be a token off."""
    platform, implementation = request.param.split()
    with jax.default_device(jax.devices(platform)[0]):
        yield implementation


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_contents(exact, data):
    """Any finite split; loads and offsets up to 2**31 - 1, whether or not the tokens fit into them."""
    place = placements()["5 to 1"]
    number = st.one_of(st.integers(0, 200), st.integers(0, MOST), st.integers(MOST - 100, MOST))
    part = st.one_of(
        st.just(0.0),
        st.floats(0, 1000, width=32, allow_subnormal=False),
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
    )
    draw = data.draw
    ids = np.array(draw(st.lists(st.integers(-1, 5), min_size=64, max_size=64)), np.int32)
    split = np.array(draw(st.lists(part, min_size=25, max_size=25)), np.float32).reshape(5, 5)
    load = np.array(draw(st.lists(number, min_size=5, max_size=5)), np.int32)
    offset = np.array(draw(st.lists(number, min_size=5, max_size=5)), np.int32)
    physical_ids = run(exact, ids, split, place, load, offset)
    np.testing.assert_array_equal(physical_ids, reference(ids, split, place.log2phy, load, offset))


def test_large_loads(exact, rng):
    """Products of numbers near 2**31, and float32 shares of which each bit is worth tokens."""
    place = helpers.many_replicas(rng, num_experts=320, num_ranks=16, redundants=8)
    ids = rng.integers(0, 320, SHAPE, np.int32)
    split = rng.random(place.log2phy.shape, np.float32)
    load = rng.integers(2**30, MOST, 320, np.int32, endpoint=True)
    offset = rng.integers(load // 2, load - 50, dtype=np.int32)
    physical_ids = run(exact, ids, split, place, load, offset)
    np.testing.assert_array_equal(physical_ids, reference(ids, split, place.log2phy, load, offset))


def test_the_last_tokens_of_the_largest_load(platform, implementation):
    place = placements()["5 to 1"]
    ids = np.tile(np.arange(5, dtype=np.int32), 20)
    load = np.array([MOST, MOST - 1, MOST, 2**30 + 1, MOST], np.int32)
    split = np.array([[1, 1e-9, 3, 1e9, 0.1]] * 5, np.float32)
    physical_ids = run(implementation, ids, split, place, load, load - 20)
    np.testing.assert_array_equal(physical_ids, reference(ids, split, place.log2phy, load, load - 20))


@pytest.mark.smoke
@pytest.mark.parametrize("cuts", [[1500], [0, 1, 1024, 2049, 2049, 3000]], ids=str)
def test_shards_give_what_the_whole_gives(platform, implementation, rng, cuts):
    """Shards of any sizes, none or one token too, each with the tokens before it as offset."""
    place = placements()["5 to 1"]
    ids = rng.integers(-1, place.num_experts, 3000, np.int32)
    load, split = bincount(ids, place.num_experts), random_split(rng, place)
    offset, parts = np.zeros_like(load), []
    for shard in np.split(ids, cuts):
        parts.append(run(implementation, shard, split, place, load, offset))
        offset = offset + bincount(shard, place.num_experts)
    np.testing.assert_array_equal(offset, load)
    np.testing.assert_array_equal(np.concatenate(parts), run(implementation, ids, split, place, load))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), num_shards=st.integers(1, 9))
def test_shards_cut_anywhere(platform, implementation, seed, num_shards):
    rng = np.random.default_rng(seed)
    place = placements()["5 to 1"]
    ids = rng.integers(-1, 5, 256, np.int32)
    load, split = bincount(ids, 5), random_split(rng, place)
    whole = run(implementation, ids, split, place, load)
    shard_of = np.sort(rng.integers(0, num_shards, 256))
    offset = np.zeros(5, np.int32)
    for shard in range(num_shards):
        # The other shards' tokens as padding: one shape for all cuts.
        own = np.where(shard_of == shard, ids, -1).astype(np.int32)
        physical_ids = run(implementation, own, split, place, load, offset)
        np.testing.assert_array_equal(physical_ids, np.where(shard_of == shard, whole, -1))
        offset = offset + bincount(own, 5)


def most_off(slots: np.ndarray, quota: dict[int, int]) -> dict[int, Fraction]:
    """For each slot, the most by which any run of tokens misses its share of the run."""
    load = len(slots)
    result = {}
    for slot, q in quota.items():
        ahead = np.concatenate([[0], np.cumsum(slots == slot)]) * load - np.arange(load + 1) * q
        result[slot] = Fraction(int(np.ptp(ahead)), load)
    return result


@pytest.mark.parametrize("share", [0.5, 0.01, 0.3, 0.999, 1 / 3])
def test_any_run_of_two_replicas_is_within_a_token_of_its_share(platform, implementation, share):
    place = placements()["ring"]
    ids = np.full(SHAPE, 4, np.int32)  # a replicated expert
    split = np.tile(np.array([share, 1 - share], np.float32), (16, 1))
    physical_ids = run(implementation, ids, split, place, bincount(ids, 16)).ravel()
    slots = place.log2phy[4].tolist()
    quota = np.bincount(physical_ids, minlength=place.num_physical)[slots].tolist()
    assert quota == [round(share * ids.size), ids.size - round(share * ids.size)]
    assert max(most_off(physical_ids, dict(zip(slots, quota, strict=True))).values()) < 1


@pytest.mark.parametrize("split", ["even", "skewed"])
def test_any_run_of_many_replicas_is_near_its_share(platform, implementation, rng, split):
    """Each replica takes from what those before it left, and inherits what they are off in proportion."""
    place = placements()["72 replicas"]
    ids = np.zeros(SHAPE, np.int32)
    shares = np.zeros(place.log2phy.shape, np.float32)
    if split == "skewed":
        shares[0] = rng.lognormal(0, 1, 72)
    physical_ids = run(implementation, ids, shares, place, bincount(ids, 73)).ravel()
    slots = place.log2phy[0]
    quota = np.bincount(physical_ids, minlength=place.num_physical)[slots].tolist()
    off = most_off(physical_ids, dict(zip(slots.tolist(), quota, strict=True)))
    left = ids.size
    after = []  # tokens left after each replica
    for replica, (slot, q) in enumerate(zip(slots.tolist(), quota, strict=True)):
        assert off[slot] <= 1 + sum(Fraction(q, v) for v in after if v), replica
        left -= q
        after.append(left)
    if split == "even":
        assert max(off.values()) < 6


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0, 0, 0], [40, 40, 40]),
        ([np.nan, np.nan, np.nan], [40, 40, 40]),
        ([-1, -2, -3], [40, 40, 40]),
        ([-np.inf, 0, -0.0], [40, 40, 40]),
        ([np.nan, 1, 2], [0, 40, 80]),
        ([1, np.nan, 2], [40, 0, 80]),
        ([2, 1, np.nan], [80, 40, 0]),
        ([-5, 1, 2], [0, 40, 80]),
        ([1, -5, 2], [40, 0, 80]),
        ([2, 1, -5], [80, 40, 0]),
        ([np.inf, 1, 1], [120, 0, 0]),
        ([1, np.inf, 1], [0, 120, 0]),
        ([1, 1, np.inf], [0, 0, 120]),
        ([3e38, 1e30, 0], [120, 0, 0]),
        ([1e-37, 2e-37, 0], [40, 80, 0]),
        ([1e38, 1e38, 0], [60, 60, 0]),
    ],
    ids=str,
)
def test_split_of_any_entries(platform, implementation, row, expected):
    place = placements()["5 to 1"]
    ids = np.full(120, 2, np.int32)  # the expert with three replicas
    split = np.full((5, 5), np.nan, np.float32)
    split[2, :3] = row
    physical_ids = run(implementation, ids, split, place, bincount(ids, 5))
    assert np.bincount(physical_ids, minlength=15)[place.log2phy[2, :3]].tolist() == expected


@pytest.mark.parametrize("row", [[np.inf, np.inf, 1], [3e38, 3e38, 3e38], [np.nan, np.inf, -np.inf]], ids=str)
def test_split_that_overflows(platform, implementation, row):
    """No sensible share is left to go by; tokens go to replicas all the same, as everywhere else."""
    place = placements()["5 to 1"]
    ids = np.full(120, 2, np.int32)
    split = np.zeros((5, 5), np.float32)
    split[2, :3] = row
    load = bincount(ids, 5)
    physical_ids = run(implementation, ids, split, place, load)
    np.testing.assert_array_equal(place.phy2log[physical_ids], ids)
    np.testing.assert_array_equal(physical_ids, reference(ids, split, place.log2phy, load, np.zeros(5, np.int32)))


@pytest.mark.parametrize("unit", [1e-20, 1.0, 3.0, 1e20])
def test_unit_of_the_split_does_not_matter(platform, implementation, unit):
    """Rows are normalised: fractions and tokens give the same ids."""
    place = placements()["5 to 1"]
    ids = np.tile(np.arange(5, dtype=np.int32), 64)
    load = bincount(ids, 5)
    split = np.float32(unit) * np.array([[8, 16, 32, 4, 4]] * 5, np.float32)
    got = run(implementation, ids, split, place, load)[ids == 0]
    assert np.bincount(got, minlength=15)[place.log2phy[0]].tolist() == [8, 16, 32, 4, 4]


def test_tokens_that_the_load_does_not_know_of_go_home(platform, implementation, rng, place):
    ids = rng.integers(0, place.num_experts, SHAPE, np.int32)
    for load in (np.zeros(place.num_experts, np.int32), np.full(place.num_experts, INT32.min)):
        physical_ids = run(implementation, ids, random_split(rng, place), place, load)
        np.testing.assert_array_equal(physical_ids, place.log2phy[ids, 0])


@pytest.mark.parametrize("load", [1, 2, 7, 50])
def test_more_tokens_than_the_load_begin_anew(platform, implementation, rng, load):
    place = placements()["many"]
    ids = np.repeat(np.arange(36, dtype=np.int32), 60)
    loads, split = np.full(36, load, np.int32), random_split(rng, place)
    physical_ids = run(implementation, ids, split, place, loads)
    np.testing.assert_array_equal(place.phy2log[physical_ids], ids)
    np.testing.assert_array_equal(physical_ids, reference(ids, split, place.log2phy, loads, np.zeros_like(loads)))
    rows = physical_ids.reshape(36, 60)
    np.testing.assert_array_equal(rows[:, load:], rows[:, :-load])


def test_negative_offset_is_none(platform, implementation, rng):
    place = placements()["5 to 1"]
    ids = rng.integers(0, 5, 100, np.int32)
    split, load = random_split(rng, place), bincount(ids, 5)
    expected = run(implementation, ids, split, place, load)
    for offset in (-1, INT32.min):
        got = run(implementation, ids, split, place, load, np.full(5, offset, np.int32))
        np.testing.assert_array_equal(got, expected)


def test_one_number_as_offset(platform, implementation, rng):
    place = placements()["ring"]
    ids = rng.integers(0, 16, 100, np.int32)
    split, load = random_split(rng, place), np.full(16, 400, np.int32)
    for offset in ({"offset": 17}, {"offset": np.int32(17)}, {}):
        assign = jax.jit(partial(lplb.assign, load=load, implementation=implementation, **offset))
        expected = reference(ids, split, place.log2phy, load, np.full(16, offset.get("offset", 0)))
        np.testing.assert_array_equal(assign(ids, split, place), expected)


@cache
def million():
    """Many chunks of ids: the reference for 2**20 + 5 of them, two replicas an expert and more."""
    rng = np.random.default_rng(2)
    place = placements()["many"]
    ids = rng.integers(-1, place.num_experts, 2**20 + 5, np.int32)
    ids[rng.random(ids.shape) < 0.5] = 3
    load, split = bincount(ids, place.num_experts), random_split(rng, place)
    return ids, split, place, load, reference(ids, split, place.log2phy, load, np.zeros_like(load))


def test_a_million_ids(platform, implementation):
    *arguments, expected = million()
    np.testing.assert_array_equal(run(implementation, *arguments), expected)


@pytest.mark.parametrize("num_sms", [1, 2, 5, 300])
@pytest.mark.parametrize("name", ["ring", "many"])
def test_number_of_thread_blocks_does_not_matter(platform, implementation, rng, name, num_sms):
    """Few blocks go through many chunks and batch elements."""
    place = placements()[name]
    ids = rng.integers(-1, place.num_experts + 1, (2, 5003), np.int32)
    load, split = bincount(ids[0], place.num_experts), random_split(rng, place)
    offset = rng.integers(0, 9, place.num_experts, np.int32)
    assign = partial(lplb.assign, implementation=implementation, num_sms=num_sms)
    physical_ids = jax.jit(jax.vmap(lambda i: assign(i, split, place, load=load, offset=offset)))(ids)
    expected = [reference(row, split, place.log2phy, load, offset) for row in ids]
    np.testing.assert_array_equal(physical_ids, expected)


@pytest.mark.parametrize("num_ids", [40_000, 140_000, 270_000])
def test_chunks_of_every_size(platform, implementation, rng, num_ids):
    """One id a thread and several; also where ids and experts make several passes over a chunk."""
    for place in (placements()["ring"], helpers.placement(topology.cube(), 1024, 32, 2)):
        ids = rng.integers(-1, place.num_experts, num_ids, np.int32)
        ids[rng.random(ids.shape) < 0.3] = 1
        load, split = bincount(ids, place.num_experts), random_split(rng, place)
        expected = reference(ids, split, place.log2phy, load, np.zeros_like(load))
        np.testing.assert_array_equal(run(implementation, ids, split, place, load), expected)


@pytest.mark.parametrize("num_experts", [2048, 4096])
def test_many_experts(platform, implementation, rng, num_experts):
    """Counters of so many experts leave little shared memory for a thread block's warps."""
    place = helpers.placement(topology.cube(), num_experts, 32, 2)
    ids = rng.integers(-1, num_experts + 1, (2500, 8), np.int32)
    ids[rng.random(ids.shape) < 0.2] = num_experts - 1
    split = random_split(rng, place)
    offset = rng.integers(0, 5, num_experts, np.int32)
    load = bincount(ids, num_experts) + 2 * offset
    physical_ids = run(implementation, ids, split, place, load, offset)
    np.testing.assert_array_equal(physical_ids, reference(ids, split, place.log2phy, load, offset))


def test_vmapped(platform, implementation, rng):
    """Twice, over layers with placements, splits and loads of their own; and over some of these only."""
    base = placements()["5 to 1"]
    layers = [lplb.Placement.from_phy2log(np.roll(base.phy2log.reshape(5, 3), i, axis=0).ravel(), 5) for i in range(4)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    ids = rng.integers(-1, 5, (4, 333), np.int32)
    load = np.stack([bincount(i, 5) for i in ids])
    split = np.stack([random_split(rng, place) for place in layers])
    offset = rng.integers(0, 50, (4, 5), np.int32)
    load += 2 * offset
    assign = assigner(implementation)

    expected = [reference(*layer) for layer in zip(ids, split, stacked.log2phy, load, offset, strict=True)]
    twice = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), (ids, split, stacked, load, offset))
    np.testing.assert_array_equal(jax.vmap(jax.vmap(assign))(*twice), np.reshape(expected, (2, 2, 333)))

    one_placement = jax.vmap(assign, in_axes=(0, None, None, 0, None))(ids, split[0], layers[0], load, offset[0])
    expected = [reference(i, split[0], layers[0].log2phy, m, offset[0]) for i, m in zip(ids, load, strict=True)]
    np.testing.assert_array_equal(one_placement, expected)


@pytest.mark.smoke
@pytest.mark.parametrize("width", [3, 4, 22, 64, 128, 600])
def test_rows_of_any_width(exact, rng, width):
    """A batch of placements, most rows much shorter than the widest: an entry that is no slot ends a row, whatever
    follows; parts may be anything; loads, nothing or the largest. Ids, and the rank load of the quotas.
    """
    experts, ranks, slots = 40, 6, 120
    ids = rng.integers(-1, experts + 1, (3, 700), np.int32)
    log2phy = rng.integers(0, slots, (3, experts, width), np.int32)
    lengths = np.where(rng.random((3, experts)) < 0.6, rng.integers(1, 4, (3, experts)), width)
    lengths[:, ::7] = rng.integers(1, width, lengths[:, ::7].shape, endpoint=True)
    lengths[2] = max(1, width // 2)  # may end just where a thread block stops reading a row for the first time
    nothing = rng.choice(np.array([-1, slots, INT32.min, INT32.max], np.int32), (3, experts))
    log2phy = np.where(np.arange(width) == lengths[..., None], nothing[..., None], log2phy)
    split = rng.lognormal(0, 2, log2phy.shape).astype(np.float32)
    kind = rng.random(split.shape)
    for chance, part in ((0.3, 0), (0.2, np.nan), (0.1, -3)):
        split[kind < chance] = part
    split[:, ::5] = 0
    load = rng.choice([0, 1, 7, 300, MOST - 1, MOST, -9], (3, experts)).astype(np.int32)
    offset = rng.integers(-5, 40, (3, experts), np.int32)

    def call(ids, split, log2phy, load, offset, num_sms):
        place = lplb.Placement(np.zeros(slots, np.int32), log2phy, num_ranks=ranks, num_groups=1, topology=None)
        starts = count(ids, experts, num_sms, exact)[1]
        return assign_with_starts(ids, starts, split, place, load, offset, num_sms, exact)

    expected = []
    for i in range(3):
        table = np.where(np.arange(width) < lengths[i][:, None], log2phy[i], -1)
        rank_load = np.zeros(ranks, np.int64)
        for row, parts, n, m in zip(table, split[i], lengths[i], load[i].tolist(), strict=True):
            np.add.at(rank_load, row[:n] // (slots // ranks), quotas(parts, n, max(0, m)))
        known = np.maximum(load[i], 0)
        expected.append((reference(ids[i], split[i], table, known, offset[i]), rank_load.astype(np.int32)))
    for num_sms in (None, 4) if exact == "ffi" else (None,):
        run = jax.jit(jax.vmap(partial(call, num_sms=num_sms)))
        for got, want in zip(run(ids, split, log2phy, load, offset), zip(*expected, strict=True), strict=True):
            np.testing.assert_array_equal(got, want)


def garbage_tables() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "none": np.full((6, 3), -1),
        "largest": np.full((6, 3), INT32.max),
        "smallest": np.full((6, 3), INT32.min),
        "one past the end": np.full((6, 3), 12),
        "all the same": np.zeros((6, 3)),
        "gaps": np.array([[-1, 0, 1], [0, -1, 1], [12, 1, 2], [1, 12, 2], [11, 11, -5], [3, 4, 99]]),
        "anything": rng.integers(INT32.min, INT32.max, (6, 3)),
        "near": rng.integers(-3, 15, (6, 3)),
    }


@pytest.mark.parametrize("table", garbage_tables())
@pytest.mark.parametrize("max_replicas", [1, 3, 6])
def test_garbage_stays_in_bounds(platform, implementation, table, max_replicas):
    """Contents that no constructor gives: an expert's slots end at the first entry that is none."""
    log2phy = np.tile(garbage_tables()[table].astype(np.int32), 2)[:, :max_replicas]
    valid = np.cumprod((log2phy >= 0) & (log2phy < 12), axis=1).astype(bool)
    ids = np.tile(np.arange(-1, 7, dtype=np.int32), 30)
    place = lplb.Placement(np.zeros(12, np.int32), log2phy, num_ranks=4, num_groups=1, topology=None)
    for load in (np.full(6, 30, np.int32), np.zeros(6, np.int32)):
        for row in ([1, 1, 1], [0, 2, 1], [0, 0, 5]):
            split = np.tile(np.array((2 * row)[:max_replicas], np.float32), (6, 1))
            physical_ids = run(implementation, ids, split, place, load)
            for expert in range(-1, 7):
                slots = log2phy[expert][valid[expert]].tolist() if 0 <= expert < 6 else []
                assert set(physical_ids[ids == expert].tolist()) <= set(slots or [-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"physical_ids": 11}, "physical_ids: expected size 12, got 11"),
        ({"offset": 4}, "offset: expected num_experts 5, got 4"),
        ({"batch": 2}, "load: expected batch 1, got 2"),
        ({"rank_load": 4}, "ranks that divide num_physical 15, got 4"),
        ({"shares": 21}, "shares: expected rows 22, got 21"),
        ({"chunk_size": 6}, "chunk_size must be a multiple of 4 up to 1073741824, got 6"),
        ({"chunk_size": 4}, "1 chunks of 4 do not hold 12 ids"),
        ({"num_sms": -1}, "num_sms -1 is negative"),
    ],
    ids=str,
)
def test_the_custom_call_says_what_is_wrong(change, message):
    """Called as no function of the library calls it."""
    place = placements()["5 to 1"]
    sizes = {"physical_ids": 12, "rank_load": 5, "shares": 22, "offset": 5, "batch": 1} | change
    attributes = {"num_physical": 15, "chunk_size": 256, "num_sms": 0}
    attributes = {name: np.int64(change.get(name, value)) for name, value in attributes.items()}
    shapes = [(sizes["physical_ids"],), (sizes["rank_load"],), (sizes["shares"], 4)]
    call = jax.ffi.ffi_call("lplb_assign", [jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes])
    ids, starts, split = np.zeros(12, np.int32), np.zeros((1, 5), np.int32), np.ones((5, 5), np.float32)
    load = np.zeros((5,) if sizes["batch"] == 1 else (sizes["batch"], 5), np.int32)
    wrong = pytest.raises(Exception, match=message) if message else contextlib.nullcontext()
    with wrong, jax.default_device(jax.devices("cpu")[0]):
        jax.block_until_ready(
            call(ids, starts, split, load, np.zeros(sizes["offset"], np.int32), place.log2phy, **attributes)
        )


def test_same_bits_every_time(platform, implementation, rng):
    """Run after run, and inside a remat, a scan and a conditional."""
    place = placements()["5 to 1"]
    ids = rng.integers(-1, 5, SHAPE, np.int32)
    load, split = bincount(ids, 5), random_split(rng, place)
    assign = partial(lplb.assign, load=load, implementation=implementation)
    expected = run(implementation, ids, split, place, load)
    for _ in range(3):
        np.testing.assert_array_equal(run(implementation, ids, split, place, load), expected)
    remat = jax.jit(jax.checkpoint(lambda i: assign(i, split, place)))
    np.testing.assert_array_equal(remat(ids), expected)
    scan = jax.jit(lambda i: jax.lax.scan(lambda _, x: (None, assign(x, split, place)), None, i)[1])
    np.testing.assert_array_equal(scan(np.stack([ids, ids])), [expected, expected])


def test_default_implementation(platform, rng):
    place = placements()["many"]
    ids = rng.integers(-1, 36, (500, 2), np.int32)
    load, split = bincount(ids, 36), random_split(rng, place)
    expected = reference(ids, split, place.log2phy, load, np.zeros_like(load))
    np.testing.assert_array_equal(lplb.assign(ids, split, place, load=load), expected)
    np.testing.assert_array_equal(jax.jit(lambda i: lplb.assign(i, split, place, load=load))(ids), expected)
