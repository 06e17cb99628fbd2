"""Recorded routing of two models, balanced batch by batch: what tokens meet in use, and not only on average."""

import pathlib
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import many_replicas, optimum, placement, rank_loads, topology

import jax_lplb as lplb
from jax_lplb import Status

P = jax.sharding.PartitionSpec
TOL = 1e-4  # of `solve`, by default
ROUNDING = 1e-6
TASKS = ("intent", "law", "summary", "translation")
LAYERS = (1, 9, 17, 25)
TOKENS = 512  # a batch
NUM_EXPERTS = 64

PLACEMENTS = {
    "ring": placement(topology.ring(4), NUM_EXPERTS, 4, 4),
    "cube": placement(topology.cube(), NUM_EXPERTS, 8, 2),
    "hypercube": placement(topology.hypercube(), NUM_EXPERTS, 16, 2),
    "many": many_replicas(np.random.default_rng(0), num_experts=NUM_EXPERTS, num_ranks=16, redundants=3),
}
ON_A_MESH = ("ring", "cube")
DECODE = {
    "cube": placement(topology.cube(), 32, 8, 2),
    "hypercube": placement(topology.hypercube(), 32, 16, 2),  # copies of all experts
}


@lru_cache
def sequences(folder: pathlib.Path) -> list[np.ndarray]:
    """int32 [batches, TOKENS, 6]: DeepSeek-V2-Lite's experts, in file order, of each task and layer."""
    with np.load(folder / "deepseek_v2_lite_topk_ids.npz") as archive:
        ids = [archive[f"{task}_ids"][:, layer].astype(np.int32) for task in TASKS for layer in LAYERS]
    return [one[: len(one) // TOKENS * TOKENS].reshape(-1, TOKENS, 6) for one in ids]


def batches(folder: pathlib.Path) -> np.ndarray:
    return np.concatenate(sequences(folder))


@lru_cache
def optima(folder: pathlib.Path, name: str) -> np.ndarray:
    return np.array([optimum(load, PLACEMENTS[name]) for load in counts(batches(folder), NUM_EXPERTS)])


def some(batched: np.ndarray, implementation: str) -> np.ndarray:
    """All batches for the custom calls, every eighth for pure JAX, which is slower on a CPU."""
    return batched if implementation == "ffi" else batched[::8]


def mesh(platform: str, num_ranks: int) -> jax.sharding.Mesh:
    devices = jax.devices(platform)
    if len(devices) < num_ranks:
        pytest.skip(f"needs {num_ranks} devices, and there are {len(devices)}")
    return jax.sharding.Mesh(devices[:num_ranks], ("ep",))


def balance_on_mesh(mesh, ids: np.ndarray, place: lplb.Placement, load: np.ndarray | None = None, **options):
    """`balance` of each batch, its tokens in equal shards over the ranks; and of each rank's loads if given."""

    def step(inputs: tuple) -> lplb.Balanced:
        return lplb.balance(inputs[0], place, axis_name="ep", load=inputs[1] if len(inputs) > 1 else None, **options)

    inputs = (ids,) if load is None else (ids, load)
    run = jax.shard_map(
        partial(jax.lax.map, step),
        mesh=mesh,
        in_specs=((P(None, "ep"), P())[: len(inputs)],),
        out_specs=lplb.Balanced(P(None, "ep"), *[P()] * 6),
    )
    return jax.tree.map(np.asarray, jax.jit(run)(inputs))


@partial(jax.jit, static_argnames="implementation")
def balance_by_hand(ids: jax.Array, place: lplb.Placement, implementation: str):
    """The steps of `balance`, for ids [batches, ranks, tokens, k]: as many ranks as one likes on one device."""

    def one(ids: jax.Array):
        loads = jax.vmap(partial(lplb.count_load, num_experts=NUM_EXPERTS, implementation=implementation))(ids)
        total, upto = loads.sum(axis=0), jnp.cumsum(loads, axis=0)
        solution = lplb.solve(total, place, implementation=implementation)
        assign = partial(lplb.assign, split=solution.split, placement=place, load=total, implementation=implementation)
        by_shard = jax.vmap(lambda ids, offset: assign(ids, offset=offset))(ids, upto - loads)
        return by_shard, assign(ids), loads, solution

    return jax.lax.map(one, ids)


@partial(jax.jit, static_argnames="implementation")
def solve_all(loads: jax.Array, place: lplb.Placement, implementation: str) -> lplb.Solution:
    return jax.vmap(partial(lplb.solve, placement=place, implementation=implementation))(loads)


def shards(ids: np.ndarray, num_ranks: int) -> np.ndarray:
    return ids.reshape(-1, num_ranks, TOKENS // num_ranks, 6)


def counts(ids: np.ndarray, number: int) -> np.ndarray:
    """Occurrences of 0 .. number - 1 in each ids[i]: int [len(ids), number]."""
    return np.stack([np.bincount(one.ravel(), minlength=number) for one in ids])


def replicas_of_slot(place: lplb.Placement) -> np.ndarray:
    return (place.log2phy >= 0).sum(axis=1)[place.phy2log]


def check_exact(ids: np.ndarray, physical_ids: np.ndarray, place: lplb.Placement, best: float) -> np.ndarray:
    """What all ranks' ids [ranks, tokens, k] promise where each knows the others' counts; returns the rank loads."""
    np.testing.assert_array_equal(place.phy2log[physical_ids], ids)  # a replica of its expert
    rank_load = np.bincount(physical_ids.ravel() // place.slots_per_rank, minlength=place.num_ranks)

    # As good as the optimum, but for the rounding of a split to whole tokens: by half a token for a slot of two
    # replicas, by one for those between two others.
    rounded = np.where(replicas_of_slot(place) == 2, 0.5, 1) * (replicas_of_slot(place) > 1) * (1 + 1e-3)
    rounded = rounded.reshape(place.num_ranks, -1).sum(axis=1)
    assert (rank_load <= best / (1 - TOL) + rounded).all()
    assert rank_load.max() >= best * (1 - ROUNDING)

    # Each rank's tokens spread as all do.
    on_slot = counts(physical_ids, place.num_physical)
    quota = on_slot.sum(axis=0)
    own = counts(ids, NUM_EXPERTS)[:, place.phy2log]
    check_proportional(on_slot, own, quota / np.maximum(own.sum(axis=0), 1), place)
    return rank_load


def check_proportional(
    on_slot: np.ndarray, own: np.ndarray, fraction: np.ndarray, place: lplb.Placement, slack: np.ndarray | float = 0
) -> None:
    """Tokens on_slot [ranks, slots] that each rank sends, of its `own` tokens of the slot's expert.

    Of any run of an expert's tokens, a replica gets its share to within fewer tokens than the expert has other
    replicas. The first misses it by less than one, a difference of two floors. Those left over for the others are then
    as many as they should be to within less than one, and so is each further replica's part of them: misses add up.
    """
    off = np.abs(on_slot - own * fraction)
    assert (off < np.maximum(replicas_of_slot(place) - 1, 1e-9) + slack).all()


@pytest.mark.parametrize("name", ON_A_MESH)
def test_all_gather(name, traces, implementation, platform):
    place = PLACEMENTS[name]
    ids = some(batches(traces), implementation)
    out = balance_on_mesh(mesh(platform, place.num_ranks), ids, place, implementation=implementation)
    assert (out.status == Status.CONVERGED).all()
    np.testing.assert_array_equal(out.load, counts(ids, NUM_EXPERTS))
    for i, best in enumerate(some(optima(traces, name), implementation)):
        rank_load = check_exact(*(shards(one[i], place.num_ranks)[0] for one in (ids, out.physical_ids)), place, best)
        np.testing.assert_array_equal(rank_load, out.rank_load[i])


@pytest.mark.parametrize("name", PLACEMENTS)
def test_step_by_step(name, traces, implementation, platform):
    """With any number of ranks; one call for all tokens gives the same ids as one for each shard."""
    place = PLACEMENTS[name]
    ids = shards(some(batches(traces), implementation), place.num_ranks)
    physical_ids, at_once, loads, solution = jax.tree.map(np.asarray, balance_by_hand(ids, place, implementation))
    np.testing.assert_array_equal(physical_ids, at_once)
    assert (solution.status == Status.CONVERGED).all()
    for i, best in enumerate(some(optima(traces, name), implementation)):
        np.testing.assert_array_equal(loads[i], counts(ids[i], NUM_EXPERTS))
        rank_load = check_exact(ids[i], physical_ids[i], place, best)
        # The quotas are the split, to within a token for each of a rank's slots.
        np.testing.assert_allclose(rank_load, solution.rank_load[i], rtol=ROUNDING, atol=place.slots_per_rank)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ON_A_MESH)
def test_mesh_gives_what_one_device_gives(name, traces, platform):
    place = PLACEMENTS[name]
    ids = batches(traces)[::8]
    sharded = balance_on_mesh(mesh(platform, place.num_ranks), ids, place, implementation="ffi")
    whole = jax.jit(partial(jax.lax.map, partial(lplb.balance, placement=place, implementation="ffi")))(ids)
    jax.tree.map(np.testing.assert_array_equal, sharded, jax.tree.map(np.asarray, whole))


@pytest.mark.parametrize("name", ON_A_MESH)
def test_psum(name, traces, implementation, platform):
    """Each rank spreads its own tokens as the whole should be: within a token for each replica of two."""
    place = PLACEMENTS[name]
    ids = some(batches(traces), implementation)
    out = balance_on_mesh(mesh(platform, place.num_ranks), ids, place, sync="psum", implementation=implementation)
    np.testing.assert_array_equal(out.load, counts(ids, NUM_EXPERTS))
    np.testing.assert_array_equal(place.phy2log[out.physical_ids], ids)
    slots = (replicas_of_slot(place) > 1).reshape(place.num_ranks, -1).sum(axis=1)
    rank_load = counts(out.physical_ids // place.slots_per_rank, place.num_ranks)
    off = rank_load - out.rank_load
    assert (np.abs(off) < slots * place.num_ranks).all()
    # Ranks round one slot differently, so that misses mostly cancel. They are differences of two fractions, of variance
    # 1 / 6 where independent; were they all alike, their sum would be twice as large as it is.
    assert np.sqrt((off**2).mean()) < 1.25 * np.sqrt((slots * place.num_ranks / 6).mean())
    if implementation == "ffi":  # whose splits are the same bits in a call of their own
        split, fraction = fractions(out.load, place)
        for i, load in enumerate(out.load):
            on_slot, own = by_rank(ids[i], out.physical_ids[i], place)
            # Quotas are rounded by half a token of all `load`, of which this rank has `own`.
            slack = 0.501 * own / np.maximum(load, 1)[place.phy2log]
            check_proportional(on_slot, own, fraction[i], place, slack)
            predicted = rank_loads(split[i], place)
            assert (np.abs(out.rank_load[i] - predicted) <= 0.501 * slots).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("name", ON_A_MESH)
def test_load_of_the_previous_batch(name, dtype, traces, platform):
    place = PLACEMENTS[name]
    ids = batches(traces)
    # As an average over batches of another size would be, where it may be.
    load = (counts(ids, NUM_EXPERTS)[:-1] * (1 if dtype == np.int32 else 0.3)).astype(dtype)
    ids = ids[1:]
    out = balance_on_mesh(mesh(platform, place.num_ranks), ids, place, load, implementation="ffi")
    np.testing.assert_array_equal(place.phy2log[out.physical_ids], ids)
    np.testing.assert_array_equal(out.load, np.rint(load))
    split, fraction = fractions(load, place)
    for i in range(len(ids)):
        on_slot, own = by_rank(ids[i], out.physical_ids[i], place)
        check_proportional(on_slot, own, fraction[i], place, 0.501 / place.num_ranks)
        np.testing.assert_allclose(out.rank_load[i], rank_loads(split[i], place), atol=0.501)
    # It is of use: the busiest ranks carry less than with copies that share evenly, or without copies.
    present = place.log2phy >= 0
    shares = [present / present.sum(axis=1, keepdims=True), np.arange(place.max_replicas) == 0]
    actual = counts(out.physical_ids // place.slots_per_rank, place.num_ranks).max(axis=1)
    for share in shares:
        without = [rank_loads(load[:, None] * share, place).max() for load in counts(ids, NUM_EXPERTS)]
        assert actual.mean() < 0.95 * np.mean(without)


def fractions(loads: np.ndarray, place: lplb.Placement) -> tuple[np.ndarray, np.ndarray]:
    """The split of each batch's load, and each slot's fraction [batches, slots] of its expert: even if it has none."""
    split = np.asarray(solve_all(loads, place, "ffi").split, np.float64)
    present = place.log2phy >= 0
    even = present / present.sum(axis=1, keepdims=True)
    part = np.where(loads[..., None] > 0, split / np.maximum(loads, 1e-9)[..., None], even)
    by_slot = np.zeros((len(loads), place.num_physical))
    by_slot[:, place.log2phy[present]] = part[:, present]
    return split, by_slot


def by_rank(ids: np.ndarray, physical_ids: np.ndarray, place: lplb.Placement) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [ranks, slots] that each rank sends to each slot, and that it has of the slot's expert."""
    on_slot = counts(shards(physical_ids, place.num_ranks)[0], place.num_physical)
    return on_slot, counts(shards(ids, place.num_ranks)[0], NUM_EXPERTS)[:, place.phy2log]


@pytest.mark.parametrize("name", DECODE)
def test_decode_steps(name, traces, implementation, platform):
    """gpt-oss-20b: counts of 256 sequences' decode steps in every layer."""
    place = DECODE[name]
    with np.load(traces / "gpt_oss_20b_decode_counts.npz") as archive:
        load = archive["counts"].reshape(-1, 32)
    load = load[:: 1 if implementation == "ffi" else 40]
    solution = jax.tree.map(np.asarray, solve_all(load, place, implementation))
    assert (solution.status == Status.CONVERGED).all()
    assert (solution.gap <= TOL).all()
    np.testing.assert_allclose(solution.split.sum(axis=2), load, rtol=ROUNDING)
    for i in range(0, len(load), max(1, len(load) // 600)):
        loads = rank_loads(solution.split[i], place)
        np.testing.assert_allclose(solution.rank_load[i], loads, rtol=ROUNDING)
        assert loads.max() <= optimum(load[i], place)[0] / (1 - solution.gap[i]) * (1 + ROUNDING)


def test_decode_steps_to_ids(traces, implementation, platform, rng):
    """gpt-oss-20b: as ids in any order, whose loads per rank are those that `balance` says."""
    place = DECODE["cube"]
    with np.load(traces / "gpt_oss_20b_decode_counts.npz") as archive:
        loads = archive["counts"][::50].reshape(-1, 32)
    ids = np.stack([rng.permutation(np.repeat(np.arange(32, dtype=np.int32), load)) for load in loads])
    run = partial(lplb.balance, placement=place, implementation=implementation)
    out = jax.tree.map(np.asarray, jax.jit(partial(jax.lax.map, run))(ids[..., None]))
    np.testing.assert_array_equal(out.load, loads)
    np.testing.assert_array_equal(place.phy2log[out.physical_ids[..., 0]], ids)
    np.testing.assert_array_equal(counts(out.physical_ids // place.slots_per_rank, 8), out.rank_load)
    for i, load in enumerate(loads):
        assert out.rank_load[i].max() <= optimum(load, place)[0] / (1 - TOL) + 0.501 * place.slots_per_rank


@pytest.mark.parametrize(("num_ranks", "redundants"), [(8, 1), (16, 2)])
@pytest.mark.parametrize("trace", ["deepseek", "gpt-oss"])
def test_placed_by_the_past(trace, num_ranks, redundants, traces):
    """By the 8 batches before: never worse than the even split, nor with EPLB's copies than EPLB itself."""
    if trace == "deepseek":
        loads = counts(batches(traces), NUM_EXPERTS)
    else:
        with np.load(traces / "gpt_oss_20b_decode_counts.npz") as archive:
            loads = archive["counts"][:, 5]
    experts = loads.shape[1]
    topo = topology.ring(num_ranks) if redundants == 1 else topology.hypercube()
    for step in range(8, len(loads), 29):
        past, now = loads[step - 8 : step].mean(axis=0), loads[step : step + 3]
        slots = experts + num_ranks * redundants
        raw = lplb.eplb.rebalance_experts(past[None], slots, 1, 1, num_ranks)[0][0]
        eplb_even = lplb.evaluate(raw, now, num_ranks=num_ranks).even
        copies = {"num_ranks": num_ranks, "redundants_per_rank": redundants}
        along = lplb.Placement.from_topology(topo, num_experts=experts, load=past, **copies)
        many = lplb.Placement.from_eplb(past, max_replicas=num_ranks, **copies)
        wide = lplb.Placement.from_topology(topo, num_experts=experts, load=past, repeats=True, **copies)
        for place in (along, wide, many):
            result = lplb.evaluate(place, now)
            assert np.all(result.optimum <= result.even * (1 + ROUNDING))
        assert np.all(result.optimum <= eplb_even * (1 + TOL))


def test_hot_experts_along_several_columns(traces):
    """What one copy of each cannot even out, on 16 ranks with two redundant experts each, is even with repeats."""
    loads = [counts(ids, NUM_EXPERTS) for ids in sequences(traces)]
    now = np.concatenate([of_one[8:] for of_one in loads])
    past = np.stack([of_one[step - 8 : step].mean(axis=0) for of_one in loads for step in range(8, len(of_one))])
    most = {}
    for repeats in (False, True):
        place = lplb.Placement.from_topology(
            topology.hypercube(), num_experts=64, num_ranks=16, redundants_per_rank=2, load=past, repeats=repeats
        )
        most[repeats] = np.percentile(lplb.evaluate(place, now).optimum, 95)
    assert most[False] > 1.2
    assert most[True] < 1.02
