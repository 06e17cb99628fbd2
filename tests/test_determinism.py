"""Equal inputs give equal bits: in every run, on every rank, however the call is transformed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import configurations, new_python, placement, skewed_ids, topology

import jax_lplb as lplb

P = jax.sharding.PartitionSpec
BATCHES, TOKENS, TOP_K, NUM_EXPERTS = 6, 640, 4, 256
NAMES = ("cube 8x2", "cube EP32 x4", "many 16 ranks")
LOADS = (None, np.int32, np.float32)  # this batch's own, or the caller's


def drawn(rng: np.random.Generator, load: type | None) -> tuple[np.ndarray, ...]:
    """Ids of some batches, each of another skew; and loads, if they are to be the caller's."""
    ids = [skewed_ids(rng, TOKENS, TOP_K, NUM_EXPERTS, sigma) for sigma in np.linspace(0.3, 2.5, BATCHES)]
    if load is None:
        return (np.stack(ids),)
    return np.stack(ids), (1000 * rng.lognormal(0, 1, (BATCHES, NUM_EXPERTS))).astype(load)


def balance(place: lplb.Placement, implementation: str = "ffi", **options) -> Callable[..., lplb.Balanced]:
    def call(ids: jax.Array, load: jax.Array | None = None) -> lplb.Balanced:
        return lplb.balance(ids, place, load=load, implementation=implementation, **options)

    return call


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def assert_same(got, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_runs(name, implementation, platform, rng):
    run = jax.jit(balance(configurations()[name], implementation))
    ids = skewed_ids(rng, TOKENS, TOP_K, NUM_EXPERTS)
    expected = on_host(run(ids))
    for _ in range(20):
        assert_same(on_host(run(ids)), expected)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", NAMES)
def test_transformations(name, load, platform, rng):
    """Alone, compiled alone, mapped and scanned over."""
    call, inputs = balance(configurations()[name]), drawn(rng, load)
    alone = [on_host(call(*one)) for one in zip(*inputs, strict=True)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    compiled = jax.jit(lambda *one: call(*one))
    for i, one in enumerate(zip(*inputs, strict=True)):
        assert_same(on_host(compiled(*one)), alone[i])
    assert_same(on_host(jax.jit(jax.vmap(call))(*inputs)), expected)
    scanned = jax.jit(lambda *inputs: jax.lax.scan(lambda carry, one: (carry, call(*one)), 0, inputs)[1])
    assert_same(on_host(scanned(*inputs)), expected)


@pytest.mark.parametrize("options", [{}, {"sync": "psum"}, {"load": np.int32}, {"load": np.float32}], ids=str)
def test_ranks(options, implementation, platform, rng):
    """Every device's own copy of what they all should know."""
    devices = jax.devices(platform)[:8]
    if len(devices) < 2:
        pytest.skip("needs two devices")
    options = dict(options)
    load = options.pop("load", None)
    place = placement(topology.ring(len(devices)), NUM_EXPERTS, len(devices), 2)
    inputs = [one[-1] for one in drawn(rng, load)]
    run = jax.shard_map(
        balance(place, implementation, axis_name="ep", **options),
        mesh=jax.sharding.Mesh(devices, ("ep",)),
        in_specs=(P("ep"), P())[: len(inputs)],
        out_specs=lplb.Balanced(P("ep"), *[P()] * 6),
    )
    out = jax.jit(run)(*inputs)
    for values in jax.tree.leaves(out[1:]):
        copies = [np.asarray(shard.data) for shard in values.addressable_shards]
        assert len(copies) == len(devices)
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])


def probe(call: Callable[..., lplb.Balanced]) -> Callable:
    """The gradient of a function of probes, one for each value that `call` gives of further inputs; and these values.

    The function is the sum of probes times values; so its gradient is the values, as the backward pass has them:
    computed again, because each layer of the scan is under `jax.checkpoint`. (Without a scan the compiler may see that
    both passes compute the same, and do it once.)
    """

    @jax.checkpoint
    def layer(carry: None, inputs: tuple) -> tuple[None, tuple[jax.Array, lplb.Balanced]]:
        probes, *inputs = inputs
        out = call(*inputs)
        products = jax.tree.map(lambda p, value: (p * value.astype(jnp.float32)).sum(), probes, out)
        return carry, (sum(jax.tree.leaves(products)), out)

    def total(probes: lplb.Balanced, *inputs: jax.Array) -> tuple[jax.Array, lplb.Balanced]:
        _, (sums, out) = jax.lax.scan(layer, None, (probes, *inputs))
        return sums.sum(), out

    return jax.grad(total, has_aux=True)


def probes_for(call: Callable[..., lplb.Balanced], *inputs) -> lplb.Balanced:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(jax.vmap(call), *inputs))


def assert_computed_twice(compiled: jax.stages.Compiled, platform: str = "cpu") -> None:
    for target in ("lplb_count", "lplb_solve_assign"):
        calls = compiled.as_text().count(f'custom_call_target="{target}"')
        # Compiled for GPUs, the text may name one call more often.
        assert calls == 2 if platform == "cpu" else calls >= 2


@pytest.mark.smoke
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", NAMES)
def test_remat(name, load, platform, rng):
    """What the backward pass computes again is what the forward pass used."""
    call, inputs = balance(configurations()[name]), drawn(rng, load)
    probes = probes_for(call, *inputs)
    compiled = jax.jit(probe(call)).lower(probes, *inputs).compile()
    assert_computed_twice(compiled, platform)
    again, first = on_host(compiled(probes, *inputs))
    assert len(np.unique(first.physical_ids)) > 100
    assert_same(again, jax.tree.map(np.float32, first))


@pytest.mark.parametrize("sync", ["all_gather", "peer", "psum"])
def test_remat_under_shard_map(sync, rng):
    """Each device's own values, collectives computed again included."""
    place = placement(topology.cube(), NUM_EXPERTS, 8, 2)
    (ids,) = drawn(rng, None)
    # A probe for each device's copy of what they all know.
    mine = probes_for(balance(place), ids[:, : TOKENS // 8])
    probes = jax.tree.map(lambda leaf: np.zeros((8, *leaf.shape), np.float32), mine)

    def on_rank(probes: lplb.Balanced, ids: jax.Array) -> tuple[lplb.Balanced, lplb.Balanced]:
        probes = jax.tree.map(lambda leaf: leaf[0], probes)
        again, first = probe(balance(place, axis_name="ep", sync=sync))(probes, ids)
        return jax.tree.map(lambda leaf: leaf[None], again), first

    tokens = P(None, "ep")
    run = jax.shard_map(
        on_rank,
        mesh=jax.sharding.Mesh(jax.devices("cpu")[:8], ("ep",)),
        in_specs=(P("ep"), tokens),
        out_specs=(P("ep"), lplb.Balanced(tokens, *[P()] * 6)),
    )
    compiled = jax.jit(run).lower(probes, ids).compile()
    assert_computed_twice(compiled)
    again, first = on_host(compiled(probes, ids))
    np.testing.assert_array_equal(np.concatenate(again.physical_ids, axis=1), first.physical_ids)
    for values, expected in zip(jax.tree.leaves(again[1:]), jax.tree.leaves(first[1:]), strict=True):
        np.testing.assert_array_equal(values, np.broadcast_to(expected, values.shape))


HASH = """
import hashlib, os, sys
if {one_cpu} and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
import jax, numpy as np
import jax_lplb as lplb
rng = np.random.default_rng(0)
digest = hashlib.sha256()
places = [
    lplb.Placement.from_topology(topology, num_experts=256, num_ranks=ranks, redundants_per_rank=2)
    for topology, ranks in ((lplb.topology.cube(), 8), (lplb.topology.torus(8, 4), 32))
]
for place in (*places, lplb.Placement.per_batch(num_experts=256, num_ranks=16, redundants_per_rank=2)):
    weight = rng.lognormal(0, 1.5, 256)
    ids = rng.choice(256, (6, 1500, 4), p=weight / weight.sum()).astype(np.int32)
    out = jax.jit(jax.vmap(lambda ids: lplb.balance(ids, place, implementation="ffi")))(ids)
    for leaf in jax.tree.leaves(out):
        digest.update(np.asarray(leaf).tobytes())
print(jax.device_count(), digest.hexdigest())
"""


def test_processes_and_threads():
    """In processes of their own, with different numbers of devices, threads and processors."""
    runs = [
        new_python(HASH.format(one_cpu=False), XLA_FLAGS="--xla_force_host_platform_device_count=8"),
        new_python(HASH.format(one_cpu=False), XLA_FLAGS="--xla_cpu_multi_thread_eigen=false", NPROC="1"),
        new_python(HASH.format(one_cpu=True), XLA_FLAGS="", NPROC="7"),
    ]
    devices, digests = zip(*(run.split() for run in runs), strict=True)
    assert devices == ("8", "1", "1")
    assert len(set(digests)) == 1
