"""Copies chosen from the batch itself: what a plan promises, by both implementations and in every transformation."""

import dataclasses
import itertools
import operator
from functools import cache, partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_lplb as lplb
from jax_lplb import _plan

RANKS, EXPERTS, HOMES = 8, 24, 3
per_batch = partial(lplb.Placement.per_batch, num_experts=EXPERTS, num_ranks=RANKS)
CASES = {
    "one slot": per_batch(redundants_per_rank=1),
    "two slots": per_batch(redundants_per_rank=2, target=1.0),
    "two groups, pairs": per_batch(redundants_per_rank=2, num_groups=2, max_replicas=2, target=1.2),
    "few sends, three replicas": per_batch(redundants_per_rank=2, max_replicas=3, max_sends=2),
    "many tokens a copy": per_batch(redundants_per_rank=2, num_groups=2, min_tokens=100),
}
PLACE = CASES["two slots"]
by_case = pytest.mark.parametrize("case", CASES)
both = pytest.mark.parametrize("implementation", [pytest.param("ffi", marks=pytest.mark.smoke), "xla"])


@cache
def loads() -> np.ndarray:
    """int32 [number, EXPERTS]: log-normal ones, and those that upset."""
    rng, expert = np.random.default_rng(0), np.arange(EXPERTS)
    upsetting = [
        0 * expert,
        np.where(expert == 7, 2**31 - 1, 0),
        np.where(expert == 7, 2**31 - 1 - EXPERTS, 1),
        np.where(expert % 4 == 0, 10**8, 1),
        np.where(expert < 22, 1000, 1),  # more hot experts than any rank's slots
        np.where(expert < HOMES, 1000, 0),  # one hot rank
        np.where(expert % HOMES == 0, 1000, 0),  # even already
        rng.integers(-50, 50, EXPERTS),
        np.full(EXPERTS, -(2**31)),
    ]
    return np.concatenate([helpers.random_loads(rng, EXPERTS, 40), np.stack(upsetting).astype(np.int32)])


@cache
def planned(case: str, implementation: str, threshold: float = 0) -> _plan.Planned:
    """Each load's plan, with no solve after it."""
    place = CASES[case]

    def one(load: jax.Array) -> _plan.Planned:
        least = jnp.int32(place.planning.min_tokens)
        return _plan.plan(load, least, place, helpers.TOL, threshold, implementation, solve=False)

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(loads()))


def on_ranks(load: np.ndarray, place: lplb.Placement) -> np.ndarray:
    """float64 [num_groups, group_size], all load at home."""
    return np.maximum(load, 0).astype(np.float64).reshape(place.num_groups, place.group_size, -1).sum(axis=2)


def contents(place: lplb.Placement, index: int | None = None) -> lplb.Placement:
    """On the host, of one entry."""
    return jax.tree.map(lambda leaf: np.asarray(leaf if index is None else leaf[index]), place)


def check_contents(place: lplb.Placement) -> None:
    """Homes are where they were, a rank's copies are of its group's experts, each once, and both leaves agree."""
    by_rank = place.phy2log.reshape(place.num_ranks, place.slots_per_rank)
    homes = place.num_experts // place.num_ranks
    np.testing.assert_array_equal(by_rank[:, :homes].ravel(), np.arange(place.num_experts))
    sends = np.zeros(place.num_ranks, int)
    for rank, slots in enumerate(by_rank):
        held = slots[slots >= 0]
        assert np.all(held // homes // place.group_size == rank // place.group_size)
        assert len(set(held)) == len(held)
        np.add.at(sends, held[homes:] // homes, 1)
    for expert, row in enumerate(place.log2phy.tolist()):
        slots = np.flatnonzero(place.phy2log == expert).tolist()
        home = expert // homes * place.slots_per_rank + expert % homes
        slots.remove(home)
        assert row == [home, *slots, *[-1] * (place.max_replicas - 1 - len(slots))]
    assert sends.max() <= (place.planning.max_sends or place.num_physical)


# ---- The plan --------------------------------------------------------------------------------------------------------


def test_a_plan_by_hand():
    """Rank 3 is filled first; rank 2 too, with more than rank 0 has in excess, which then has room for expert 2."""
    place = lplb.Placement.per_batch(num_experts=8, num_ranks=4, redundants_per_rank=1)
    load = np.array([90, 10, 30, 20, 5, 5, 0, 0], np.int32)
    chosen = place.choose(load)
    np.testing.assert_array_equal(chosen.phy2log.reshape(4, 3), [[0, 1, 2], [2, 3, -1], [4, 5, 0], [6, 7, 0]])
    np.testing.assert_array_equal(contents(chosen).log2phy[[0, 2]], [[0, 8, 11, -1], [3, 2, -1, -1]])
    np.testing.assert_allclose(lplb.solve(load, chosen).rank_load, 40, rtol=2e-4)


@by_case
def test_pure_jax_plans_the_same_bits(case):
    for name, value, other in zip(_plan.Planned._fields, planned(case, "ffi"), planned(case, "xla"), strict=True):
        np.testing.assert_array_equal(value, other, err_msg=name)


@pytest.mark.gpu
@by_case
def test_gpus_plan_the_same_bits(case):
    with jax.default_device(jax.devices("gpu")[0]):
        on_gpu = planned.__wrapped__(case, "ffi")
    jax.tree.map(np.testing.assert_array_equal, on_gpu, planned(case, "ffi"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 256, "num_ranks": 8, "redundants_per_rank": 1},
        {"num_experts": 512, "num_ranks": 32, "redundants_per_rank": 3, "max_replicas": 4, "num_groups": 2},
        {"num_experts": 256, "num_ranks": 64, "redundants_per_rank": 2},
        {"num_experts": 384, "num_ranks": 96, "redundants_per_rank": 1, "max_sends": 3},
        {"num_experts": 1536, "num_ranks": 128, "redundants_per_rank": 4, "min_tokens": 100},
    ],
    ids=lambda sizes: str(sizes["num_ranks"]),
)
def test_gpus_balance_as_cpus_do(sizes, rng):
    place = lplb.Placement.per_batch(**sizes)
    ranks, experts = place.num_ranks, place.num_experts
    sigma = rng.uniform(0.3, 1.5, (16, 1))
    noisy = rng.normal(0, sigma, (16, experts))[:, None] + rng.gumbel(size=(16, 32 * ranks, experts))
    ids = np.argpartition(-noisy, 8, axis=2)[..., :8].astype(np.int32)
    results = []
    for platform in ("gpu", "cpu"):
        with jax.default_device(jax.devices(platform)[0]):
            run = jax.jit(jax.vmap(partial(lplb.balance, placement=place, implementation="ffi")))
            results.append(jax.tree.map(np.asarray, run(ids)))
    on_gpu, on_cpu = results
    np.testing.assert_array_equal(on_gpu.placement.phy2log, on_cpu.placement.phy2log)
    np.testing.assert_array_equal(on_gpu.placement.log2phy, on_cpu.placement.log2phy)
    for of_batch, physical, phy2log in zip(ids, on_gpu.physical_ids, on_gpu.placement.phy2log, strict=True):
        np.testing.assert_array_equal(phy2log[physical], of_batch)
    assert np.all(on_gpu.gap <= helpers.TOL)
    # Where the plan's own split stands all bits are equal; the interior-point method finds others, as good.
    with jax.default_device(jax.devices("cpu")[0]):
        least = jnp.int32(place.planning.min_tokens)
        plan = jax.vmap(lambda load: _plan.plan(load, least, place, helpers.TOL, 0, "ffi", solve=False))
        status = np.asarray(plan(on_cpu.load).status)
    same = np.all(status != lplb.Status.MAX_ITERATIONS, axis=1)
    assert same.any()
    np.testing.assert_array_equal(on_gpu.physical_ids[same], on_cpu.physical_ids[same])


@by_case
def test_contents_of_a_plan(case):
    out = planned(case, "ffi")
    some = False
    for phy2log, log2phy in zip(out.phy2log, out.log2phy, strict=True):
        check_contents(dataclasses.replace(CASES[case], phy2log=phy2log, log2phy=log2phy))
        some |= np.sum(phy2log >= 0) > EXPERTS
    assert some


@by_case
def test_split_of_a_plan(case):
    """It is whole, of the load that it says, no worse than home, and each copy has a part."""
    place, out = CASES[case], planned(case, "ffi")
    for index, load in enumerate(loads()):
        one = jax.tree.map(operator.itemgetter(index), out)
        load = np.maximum(load, 0)
        np.testing.assert_allclose(
            one.fraction.sum(axis=1), load > 0, rtol=helpers.EPS * (place.max_replicas + 1), err_msg=str(load)
        )
        copied = one.log2phy[:, 1:] >= 0
        np.testing.assert_array_equal(one.fraction[:, 1:] > 0, copied)
        split = one.fraction.astype(np.float64) * load[:, None]
        expected = helpers.rank_loads(split, dataclasses.replace(place, phy2log=one.phy2log, log2phy=one.log2phy))
        np.testing.assert_allclose(one.rank_load, expected, atol=helpers.ROUNDING * load.sum())
        home = on_ranks(load, place)
        largest = one.rank_load.reshape(home.shape).max(axis=1)
        assert np.all(largest <= home.max(axis=1) * (1 + helpers.EPS))
        some = np.any(copied.reshape(place.num_groups, -1), axis=1)
        np.testing.assert_array_equal(one.status == lplb.Status.SKIPPED, ~some)


@by_case
def test_no_copies_where_home_is_within_the_target(case):
    place, out = CASES[case], planned(case, "ffi")
    within = beyond = 0
    for load, phy2log in zip(loads(), out.phy2log, strict=True):
        home = on_ranks(load, place)
        even = home.max(axis=1) <= place.planning.target * home.mean(axis=1) * (1 - 1e-6)
        even |= home.max(axis=1) == home.mean(axis=1)
        copies = np.sum(phy2log.reshape(place.num_groups, -1) >= 0, axis=1) - EXPERTS // place.num_groups
        assert np.all(copies[even] == 0)
        within, beyond = within + even.sum(), beyond + np.any(copies > 0)
    assert within > 5
    assert beyond > 10


def test_a_copy_takes_at_least_min_tokens():
    """Of the plan, before ranks are evened out further: from an expert that has them, on a rank with room for them."""
    case = "many tokens a copy"
    copies = 0
    for load, log2phy in zip(loads(), planned(case, "ffi").log2phy, strict=True):
        of_expert = np.sum(log2phy[:, 1:] >= 0, axis=1)
        assert np.all(of_expert * 100 <= np.maximum(load, 0))
        copies += of_expert.sum()
    assert copies > 100
    # The others have room for less than 200 under any limit that the busiest rank is above.
    load = np.repeat(np.array([2000, 1800, 1800, 1800] * 2, np.int32), HOMES) * (np.arange(EXPERTS) % HOMES == 0)
    for least, some in ((20, True), (200, False)):
        chosen = per_batch(redundants_per_rank=2, num_groups=2, min_tokens=least).choose(load.astype(np.int32))
        assert np.any(chosen.phy2log.reshape(RANKS, -1)[:, HOMES:] >= 0) == some


def test_a_float_load_has_its_own_unit():
    """Halves of tokens: min_tokens then are twice as many of them. And as exact as whole numbers."""

    def choose(load, least):
        return contents(per_batch(redundants_per_rank=2, min_tokens=least).choose(load))

    load = loads()[np.all(np.abs(loads()) < 2**24, axis=1)]
    as_floats = choose(load.astype(np.float32), 300)
    assert as_floats == choose(load, 300)
    for scale, least in ((0.5, 150), (2.0, 600), (2.0**-100, 0), (2.0**90, 300 * 2**90)):
        for value, other in zip(
            jax.tree.leaves(choose(load.astype(np.float32) * np.float32(scale), least)),
            jax.tree.leaves(as_floats if least else choose(load, 0)),
            strict=True,
        ):
            np.testing.assert_array_equal(value, other)


@cache
def of_all_contents(ranks: int, homes: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of the ranks that hold an expert [contents, experts], for all that one slot a rank can hold, and copies."""
    own = np.arange(ranks * homes).reshape(ranks, homes)
    held_by = np.array(list(itertools.product(*([-1, *np.setdiff1d(own, rank)] for rank in own))))
    bits = np.broadcast_to(1 << np.arange(ranks * homes) // homes, (len(held_by), ranks * homes)).copy()
    for rank, expert in enumerate(held_by.T):
        some = np.flatnonzero(expert >= 0)
        bits[some, expert[some]] |= 1 << rank
    return bits, np.sum(held_by >= 0, axis=1)


def best_split(load: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Least largest rank load [loads, contents]: the most that must be on any set of ranks, over its size."""
    most = np.zeros((len(load), len(bits)))
    for ranks in range(1, bits.max() + 1):
        within = (bits & ~ranks == 0).astype(np.float64)
        most = np.maximum(most, load @ within.T / ranks.bit_count())
    return most


@pytest.mark.parametrize("target", [1.0, 1.01, 1.1])
@pytest.mark.parametrize(("ranks", "homes"), [(4, 2), (4, 3), (3, 3)])
def test_plans_against_all_there_are(ranks, homes, target):
    """Nearly always as even as the best, never far from it, and nearly always with as few copies as that takes."""
    rng, experts = np.random.default_rng(1), ranks * homes
    popularity = rng.lognormal(0, np.tile([0.3, 0.7, 1.0, 1.5, 2.0], 20)[:, None], (100, experts))
    load = np.stack([rng.multinomial(4096, p / p.sum()) for p in popularity]).astype(np.int32)
    place = lplb.Placement.per_batch(num_experts=experts, num_ranks=ranks, redundants_per_rank=1, target=target)
    chosen = place.choose(load)
    bits, copies_of = of_all_contents(ranks, homes)
    best_of = best_split(load, bits)
    got = np.array([helpers.optimum(one, contents(chosen, index)).item() for index, one in enumerate(load)])
    possible = np.maximum(best_of.min(axis=1), target * load.mean(axis=1) * homes)
    assert np.all(got <= 1.1 * possible)
    assert np.mean(got <= possible * (1 + 1e-4)) >= 0.98
    copies = np.sum(np.asarray(chosen.phy2log) >= 0, axis=1) - experts
    fewest = [copies_of[of_one <= reached * (1 + 1e-6)].min() for of_one, reached in zip(best_of, got, strict=True)]
    assert np.max(copies - fewest) <= 1
    assert np.mean(copies == fewest) >= 0.98


# ---- Certificates ----------------------------------------------------------------------------------------------------


@cache
def balanced(case: str) -> lplb.Balanced:
    """What `balance` says of each load."""
    ids = jnp.zeros((1, 1), jnp.int32)
    run = jax.vmap(lambda load: lplb.balance(ids, CASES[case], load=load, implementation="ffi"))
    return jax.tree.map(np.asarray, jax.jit(run)(loads()))


@by_case
def test_certificates_against_highs(case):
    """Of the copies chosen: no split over them is better than the bound, and what was found is as near as gap says."""
    place, out = CASES[case], balanced(case)
    moved = 0
    for index, load in enumerate(loads()):
        chosen = contents(out.placement, index)
        best = helpers.optimum(load, chosen)
        most = helpers.most(out.rank_load[index].astype(np.float64), place)
        true_gap = 1 - best / np.maximum(most, 1)
        assert np.all(out.lower_bound[index] <= best)
        assert np.all(out.lower_bound[index] >= best * (1 - 2e-4))
        rounding = 1 / np.maximum(most, 1)  # rank loads are rounded to whole tokens
        assert np.all(out.gap[index] >= true_gap - helpers.ROUNDING - rounding)
        assert np.all(out.gap[index] <= helpers.TOL)
        assert np.isin(out.status[index], [lplb.Status.CONVERGED, lplb.Status.SKIPPED]).all()
        home = on_ranks(load, place).max(axis=1)
        assert np.all(most <= home + 1)
        moved += np.sum(best < home * (1 - 1e-3))
    assert moved > 20


@by_case
def test_the_plan_that_choose_makes_is_that_of_balance(case):
    """Whatever the placement held before."""
    used = balanced(case).placement
    np.testing.assert_array_equal(planned(case, "ffi").phy2log, used.phy2log)
    rng = np.random.default_rng(0)
    before = dataclasses.replace(CASES[case], phy2log=rng.permutation(CASES[case].phy2log))
    for place in (CASES[case], before, contents(used, 0)):
        chosen = place.choose(loads())
        np.testing.assert_array_equal(chosen.phy2log, used.phy2log)
        np.testing.assert_array_equal(chosen.log2phy, used.log2phy)


@both
def test_threshold(implementation):
    """Groups within it stay at home, with the gap that home has; the others are as without one."""
    case, threshold = "two groups, pairs", 1.5
    out, plain = planned(case, implementation, threshold), planned(case, "ffi")
    stays = 0
    for index, load in enumerate(loads()):
        for group, home in enumerate(on_ranks(load, CASES[case])):
            slots, others = (np.split(some.phy2log[index], 2)[group] for some in (out, plain))
            if 0 < home.max() <= threshold * home.mean():
                assert np.sum(slots >= 0) == EXPERTS // 2
                assert out.status[index, group] == lplb.Status.SKIPPED
                assert out.gap[index, group] == pytest.approx(1 - home.mean() / home.max(), abs=1e-6)
                stays += np.any(others != slots)
            else:
                np.testing.assert_array_equal(slots, others)
                assert out.status[index, group] == plain.status[index, group]
                assert out.gap[index, group] == plain.gap[index, group]
    assert stays > 5


# ---- In balance ------------------------------------------------------------------------------------------------------

TOKENS, TOP_K = 64, 4  # of each rank


def make_ids(layers: int = 1) -> np.ndarray:
    """int32 [layers, RANKS * TOKENS, TOP_K], with padding, each layer of other popularity."""
    rng = np.random.default_rng(1)
    ids = np.stack([helpers.skewed_ids(rng, RANKS * TOKENS, TOP_K, EXPERTS, 1.5) for _ in range(layers)])
    ids[:, ::7, 0] = -1
    ids[:, 1::7, 1] = EXPERTS
    return ids


def load_of(ids: np.ndarray) -> np.ndarray:
    return np.bincount(ids[(ids >= 0) & (ids < EXPERTS)], minlength=EXPERTS).astype(np.int32)


def check(out: lplb.Balanced, ids: np.ndarray, place: lplb.Placement, *, exact: bool = True) -> None:
    """Of a batch: no token is lost, and the loads are what the ids give, evened out as the copies allow."""
    out = jax.tree.map(np.asarray, out)
    valid = (ids >= 0) & (ids < EXPERTS)
    assert np.all(out.physical_ids[~valid] == -1)
    np.testing.assert_array_equal(out.placement.phy2log[out.physical_ids[valid]], ids[valid])
    np.testing.assert_array_equal(out.load, load_of(ids))
    ranks = np.bincount(out.physical_ids[valid] // place.slots_per_rank, minlength=RANKS)
    if exact:
        np.testing.assert_array_equal(out.rank_load, ranks)
    best = helpers.optimum(out.load, out.placement)
    assert np.all(helpers.most(ranks, place) <= best * (1 + 1e-4) + place.slots_per_rank)
    assert np.all((best * (1 - 2e-4) <= out.lower_bound) & (out.lower_bound <= best))
    check_contents(out.placement)
    assert out.placement == contents(place.choose(out.load))


@pytest.mark.parametrize(
    ("implementation", "sync", "check_vma", "axis_type"),
    [
        pytest.param("ffi", "all_gather", True, AxisType.Auto, marks=pytest.mark.smoke),
        ("ffi", "all_gather", False, AxisType.Explicit),
        ("ffi", "psum", True, AxisType.Explicit),
        ("xla", "all_gather", True, AxisType.Explicit),
    ],
)
def test_sharded(implementation, sync, check_vma, axis_type):
    """All ranks choose the same copies, those that one device would; with all_gather the same ids, too."""
    (ids,) = make_ids()
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(axis_type,), devices=jax.devices("cpu"))
    run = jax.shard_map(
        partial(lplb.balance, placement=PLACE, axis_name="ep", sync=sync, implementation=implementation),
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=lplb.Balanced(P("ep"), *[P()] * 6),
        check_vma=check_vma,
    )
    out = jax.jit(run)(jax.device_put(ids, jax.NamedSharding(mesh, P("ep"))))
    check(out, ids, PLACE, exact=sync == "all_gather")
    alone = jax.jit(partial(lplb.balance, placement=PLACE, implementation="ffi"))(ids)
    if sync == "psum":
        out, alone = (some._replace(physical_ids=0, rank_load=0) for some in (out, alone))
    jax.tree.map(np.testing.assert_array_equal, out, alone)


@by_case
def test_batches_of_tokens(case):
    """None is lost, rank loads are those of the ids, and copies those of the load that the batch makes."""
    stack = make_ids(layers=4)
    out = jax.jit(jax.vmap(partial(lplb.balance, placement=CASES[case], implementation="ffi")))(stack)
    for layer, ids in enumerate(stack):
        check(jax.tree.map(operator.itemgetter(layer), out), ids, CASES[case])
    assert np.sum(out.placement.phy2log >= 0) > len(stack) * EXPERTS


@pytest.mark.parametrize("tokens", [0, 64])
def test_batches_of_nothing(tokens):
    """No tokens, or all padding."""
    ids = np.full((tokens, TOP_K), -1, np.int32)
    out = lplb.balance(jnp.asarray(ids), PLACE, implementation="ffi")
    np.testing.assert_array_equal(out.physical_ids, ids)
    assert contents(out.placement) == PLACE
    for values in (out.load, out.rank_load, out.gap, out.lower_bound):
        assert not np.any(values)
    assert out.status == lplb.Status.SKIPPED


@pytest.mark.parametrize(("implementation", "dtype"), [("ffi", np.int32), ("ffi", np.float32), ("xla", np.float32)])
def test_a_load_given_in_place_of_the_batchs(implementation, dtype):
    """Copies are chosen by it, and ids are split over them; where shards are given different ones, by each its own."""
    (ids,), load = make_ids(), loads()[:RANKS].astype(dtype)
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))

    def on_rank(ids: jax.Array, load: jax.Array) -> lplb.Balanced:
        out = lplb.balance(ids, PLACE, axis_name="ep", load=load[0], implementation=implementation)
        return jax.tree.map(lambda leaf: leaf[None], out)

    out = jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))(ids, load)
    out = jax.tree.map(np.asarray, out)
    for rank, own in enumerate(ids.reshape(RANKS, TOKENS, TOP_K)):
        one = jax.tree.map(operator.itemgetter(rank), out)
        valid = (own >= 0) & (own < EXPERTS)
        assert np.all(one.physical_ids[~valid] == -1)
        np.testing.assert_array_equal(one.placement.phy2log[one.physical_ids[valid]], own[valid])
        assert one.placement == contents(PLACE.choose(load[rank]))
        assert helpers.most(one.rank_load, PLACE) <= helpers.optimum(load[rank], one.placement) * (1 + 1e-4) + 1
        np.testing.assert_array_equal(one.load, load[rank])


@both
def test_layers_are_mapped_and_scanned_over(implementation):
    """With the placement as what a scan carries: each layer's copies are its own, whatever those before it were."""
    stack = make_ids(layers=3)
    run = partial(lplb.balance, implementation=implementation)

    def layer(place: lplb.Placement, ids: jax.Array) -> tuple[lplb.Placement, lplb.Balanced]:
        out = run(ids, place)
        return out.placement, out

    last, scanned = jax.jit(lambda stack: jax.lax.scan(layer, jax.tree.map(jnp.asarray, PLACE), stack))(stack)
    for index, ids in enumerate(stack):
        check(jax.tree.map(operator.itemgetter(index), scanned), ids, PLACE)
    assert contents(last) == contents(scanned.placement, 2)
    if implementation == "ffi":  # pure JAX takes long to compile, and is mapped over elsewhere
        mapped = jax.jit(jax.vmap(run, in_axes=(0, None)))(stack, PLACE)
        jax.tree.map(np.testing.assert_array_equal, mapped, scanned)


def test_gradient_through_scan_and_remat():
    """Ids and placements carry none and block none, and a rematerialised forward pass chooses the same copies."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 16, EXPERTS)).astype(np.float32)
    x = rng.normal(size=(128, 16)).astype(np.float32)

    def layer(x: jax.Array, w: jax.Array, placed=None) -> tuple[jax.Array, lplb.Balanced]:
        gates, ids = jax.lax.top_k(jax.nn.softmax(x @ w), TOP_K)
        out = lplb.balance(ids, PLACE) if placed is None else placed
        # An elementwise stand-in for experts: it differs between slots, and with what they hold.
        held = jnp.asarray(out.placement.phy2log)[out.physical_ids] + out.physical_ids
        scale = 1 + held.astype(jnp.float32) / EXPERTS
        return jnp.tanh(x * jnp.sum(gates * scale, axis=1, keepdims=True)), out

    def gradient(step, *placed):
        def loss(weights):
            y, out = jax.lax.scan(lambda x, inputs: step(x, *inputs), x, (weights, *placed))
            return jnp.sum(y**2), out

        return jax.jit(jax.grad(loss, has_aux=True))(weights)

    plain, out = gradient(layer)
    remat, again = gradient(jax.checkpoint(layer))
    constant, _ = gradient(layer, out)
    jax.tree.map(np.testing.assert_array_equal, again, out)
    assert np.any(plain != 0)
    for other in (remat, constant):
        np.testing.assert_allclose(other, plain, rtol=1e-5, atol=1e-6 * np.max(np.abs(plain)))


def test_choose_and_balance_carry_no_gradient():
    def total(load: jax.Array) -> jax.Array:
        chosen = PLACE.choose(load)
        out = lplb.balance(make_ids()[0], PLACE, load=load, implementation="ffi")
        return sum(jnp.sum(leaf).astype(jnp.float32) for leaf in jax.tree.leaves((chosen, out.gap, out.rank_load)))

    assert not np.any(jax.jit(jax.grad(total))(loads()[0].astype(np.float32)))


def test_choose_under_transformations():
    """Traced, mapped, with leading axes and in a shard_map: as one by one."""
    stack = loads()[:6]
    alone = [contents(PLACE.choose(load)) for load in stack]
    layers = jax.tree.map(lambda leaf: np.stack([leaf] * 3), PLACE)
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    results = {
        "jit and vmap": jax.jit(jax.vmap(PLACE.choose))(stack),
        "leading axes": PLACE.choose(stack),
        "sharded": jax.jit(jax.shard_map(PLACE.choose, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))(stack),
    }
    by_layer = layers.choose(stack.reshape(2, 3, -1))
    results["of layers"] = jax.tree.map(lambda leaf: leaf.reshape(6, *leaf.shape[2:]), by_layer)
    for name, chosen in results.items():
        for index, expected in enumerate(alone):
            assert contents(chosen, index) == expected, name


def test_chosen_copies_are_kept():
    """By further batches, where nothing is planned any more; and by solve and assign, which plan nothing."""
    first, second = make_ids(layers=2)
    chosen = jax.jit(partial(lplb.balance, placement=PLACE, implementation="ffi"))(first).placement
    kept = dataclasses.replace(chosen, planning=None)
    assert kept != chosen
    out = jax.jit(partial(lplb.balance, implementation="ffi"))(second, kept)
    assert contents(out.placement) == contents(kept)
    valid = (second >= 0) & (second < EXPERTS)
    np.testing.assert_array_equal(kept.phy2log[out.physical_ids[valid]], second[valid])
    assert not np.array_equal(PLACE.choose(load_of(second)).phy2log, kept.phy2log)

    solution = lplb.solve(load_of(second), chosen)
    assert solution.rank_load.max() == pytest.approx(
        helpers.optimum(load_of(second), contents(chosen)).item(), rel=2e-4
    )
    ids = lplb.assign(second, solution.split, chosen, load=load_of(second))
    np.testing.assert_array_equal(ids, out.physical_ids)
    # Before any copies are chosen, all is at home.
    np.testing.assert_array_equal(lplb.solve(load_of(second), PLACE).rank_load, on_ranks(load_of(second), PLACE)[0])


def test_without_free_slots_nothing_is_planned():
    place = per_batch(redundants_per_rank=0, max_replicas=3)
    assert place.planning is None
    (ids,) = make_ids()
    out = lplb.balance(jnp.asarray(ids), place)
    assert out.placement == place
    np.testing.assert_array_equal(out.rank_load, on_ranks(load_of(ids), place)[0])


def test_weights_of_chosen_copies():
    """Slots get their experts' weights and empty ones zeros; gradients of copies come home, and of empty slots none."""
    rng = np.random.default_rng(0)
    rows, probe = rng.normal(size=(EXPERTS, 5)).astype(np.float32), rng.normal(size=(PLACE.num_physical, 5))
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    place = contents(PLACE.choose(load_of(make_ids()[0])))
    replicate = jax.shard_map(
        lambda rows, place: lplb.replicate(rows, place, "ep"), mesh=mesh, in_specs=(P("ep"), P()), out_specs=P("ep")
    )
    slots, pull = jax.vjp(jax.jit(lambda rows: replicate(rows, place)), rows)
    held = place.phy2log[:, None] >= 0
    assert 0 < np.sum(~held) < PLACE.num_physical - EXPERTS
    np.testing.assert_array_equal(slots, np.where(held, rows[place.phy2log], 0))
    expected = np.zeros(rows.shape)
    np.add.at(expected, place.phy2log[held[:, 0]], probe[held[:, 0]])
    np.testing.assert_allclose(pull(jnp.asarray(probe, jnp.float32))[0], expected, rtol=1e-5, atol=1e-6)


def test_select_names_the_cure():
    with pytest.raises(ValueError, match=r"select needs a placement along a topology .* use Placement\.choose instead"):
        PLACE.select(np.ones(EXPERTS, np.int32))
