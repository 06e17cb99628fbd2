"""`balance` under jit, vmap, scan, remat and grad, alone and together."""

import operator
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_lplb as lplb

NUM_EXPERTS = 64
PLACEMENT = helpers.placement(helpers.topology.cube(), NUM_EXPERTS, 8, 2)


# The custom calls with the oldest JAX too; pure JAX takes long to compile, and is the same to all of these.
both_ways = pytest.mark.parametrize("implementation", [pytest.param("ffi", marks=pytest.mark.smoke), "xla"])


def make_stack(rng, layers: int = 3) -> np.ndarray:
    return np.stack([helpers.skewed_ids(rng, 200, 6, NUM_EXPERTS, sigma) for sigma in np.linspace(0.5, 1.5, layers)])


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.smoke
def test_jit_equals_eager(platform, rng):
    """The custom calls; XLA may round pure JAX otherwise in another executable."""
    ids = make_stack(rng)[0]
    run = partial(lplb.balance, placement=PLACEMENT, implementation="ffi")
    equal(jax.jit(run)(ids).physical_ids, run(jnp.asarray(ids)).physical_ids)


@both_ways
def test_a_stack_of_layers_under_vmap_and_scan(platform, implementation, rng):
    """One call for all layers, or one for each: the same ids."""
    stack = make_stack(rng)
    run = partial(lplb.balance, placement=PLACEMENT, implementation=implementation)
    single = [jax.jit(run)(ids) for ids in stack]
    mapped = jax.jit(jax.vmap(run))(stack)
    _, scanned = jax.jit(lambda x: jax.lax.scan(lambda carry, ids: (carry, run(ids)), 0, x))(stack)
    for layer, alone in enumerate(single):
        equal(scanned.physical_ids[layer], alone.physical_ids)
        if implementation == "ffi":
            equal(jax.tree.map(operator.itemgetter(layer), mapped), alone)
    # In pure JAX a batched factorisation may round differently; loads still agree to the solver's tolerance.
    best = [np.max(alone.rank_load) for alone in single]
    np.testing.assert_allclose(np.max(mapped.rank_load, axis=1), best, rtol=2e-4, atol=2)


def test_nested_vmap_with_placements_of_each_layer(platform, rng):
    """Placements with leading layer axes, each layer of each replica of the model with its own ids."""
    stack = np.stack([make_stack(rng), make_stack(rng)])
    shifted = helpers.placement(helpers.topology.ring(8), NUM_EXPERTS, 8, 2)
    layers = [PLACEMENT, lplb.Placement.from_phy2log(shifted.phy2log, 8, max_replicas=2), PLACEMENT]
    layers = [lplb.Placement(p.phy2log, p.log2phy, 8, 1, None) for p in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    balance = partial(lplb.balance, implementation="ffi")
    out = jax.jit(jax.vmap(jax.vmap(balance), in_axes=(0, None)))(stack, stacked)
    for model in range(2):
        for layer, placement in enumerate(layers):
            alone = jax.jit(balance)(stack[model, layer], placement)
            equal(jax.tree.map(operator.itemgetter((model, layer)), out), alone)


@pytest.mark.smoke
@pytest.mark.parametrize("sync", ["all_gather", "psum"])
def test_ranks_under_vmap(sync, rng):
    """An axis of vmap's as `axis_name`: what the ranks of a mesh would do, on one device."""
    ids = make_stack(rng, layers=8)
    whole = jax.jit(partial(lplb.balance, placement=PLACEMENT))(ids)
    run = partial(lplb.balance, placement=PLACEMENT, axis_name="ep", sync=sync)
    out = jax.jit(jax.vmap(run, axis_name="ep"))(ids)
    for value, expected in zip(jax.tree.leaves(out[1:]), jax.tree.leaves(whole[1:]), strict=True):
        equal(value, np.broadcast_to(expected, (8, *expected.shape)))
    equal(PLACEMENT.phy2log[out.physical_ids], ids)
    if sync == "all_gather":
        equal(out.physical_ids, whole.physical_ids)


def test_contents_change_without_recompiling(platform, implementation, rng):
    ids = make_stack(rng)[0]
    traces = []

    @jax.jit
    def run(ids, placement):
        traces.append(1)
        return lplb.balance(ids, placement, implementation=implementation)

    other = helpers.placement(helpers.topology.torus(2, 4), NUM_EXPERTS, 8, 2)
    for p in (PLACEMENT, other):
        placement = lplb.Placement(p.phy2log, p.log2phy, 8, 1, None)
        out = run(ids, placement)
        np.testing.assert_array_equal(p.phy2log[out.physical_ids], ids)
    assert len(traces) == 1


def moe(implementation, axis_name=None):
    """A layer whose output and gradient depend on where tokens go; returns those and the ids."""

    def layer(x, w):
        gates, ids = jax.lax.top_k(jax.nn.softmax(x @ w), 4)
        out = lplb.balance(ids, PLACEMENT, axis_name=axis_name, implementation=implementation)
        # An elementwise stand-in for experts: differs between the replicas of an expert.
        scale = 1 + out.physical_ids.astype(jnp.float32) / PLACEMENT.num_physical
        return jnp.tanh(x * jnp.sum(gates * scale, axis=1, keepdims=True)), out.physical_ids

    return layer


def test_gradient_through_scan_and_remat(platform, implementation, rng):
    """Ids carry no gradient and do not block it; a rematerialised forward pass makes the same choices."""
    weights = rng.normal(size=(3, 16, NUM_EXPERTS)).astype(np.float32)
    x = rng.normal(size=(128, 16)).astype(np.float32)

    def gradient(wrap):
        def loss(weights):
            y, _ = jax.lax.scan(wrap(moe(implementation)), x, weights)
            return jnp.sum(y**2)

        return jax.jit(jax.grad(loss))(weights)

    plain = gradient(lambda layer: layer)
    assert np.all(np.isfinite(plain))
    assert np.any(plain != 0)
    for policy in (jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.dots_saveable):
        remat = gradient(partial(jax.checkpoint, policy=policy))
        np.testing.assert_allclose(remat, plain, rtol=1e-5, atol=1e-6 * np.max(np.abs(plain)))


def test_gradient_against_fixed_ids(platform, implementation, rng):
    """The gradient is that of the same layers with the ids as constants."""
    weights = rng.normal(size=(16, NUM_EXPERTS)).astype(np.float32)
    x = rng.normal(size=(64, 16)).astype(np.float32)

    def loss(weights):
        y, ids = moe(implementation)(x, weights)
        return jnp.sum(y**2), ids

    balanced, ids = jax.jit(jax.grad(loss, has_aux=True))(weights)

    def fixed(weights):
        gates, _ = jax.lax.top_k(jax.nn.softmax(x @ weights), 4)
        scale = 1 + ids.astype(jnp.float32) / PLACEMENT.num_physical
        return jnp.sum(jnp.tanh(x * jnp.sum(gates * scale, axis=1, keepdims=True)) ** 2)

    expected = jax.jit(jax.grad(fixed))(weights)
    np.testing.assert_allclose(balanced, expected, rtol=1e-4, atol=1e-5 * np.max(np.abs(expected)))


@both_ways
@pytest.mark.parametrize("check_vma", [True, False])
def test_everything_at_once(implementation, check_vma, rng):
    """Grad of remat of scan inside shard_map inside jit."""
    weights = rng.normal(size=(2, 16, NUM_EXPERTS)).astype(np.float32)
    x = rng.normal(size=(256, 16)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))

    def run(wrap):
        def loss(weights, x):
            y, ids = jax.lax.scan(wrap(moe(implementation, "ep")), x, weights)
            return jnp.sum(y**2), ids

        def step(weights, x):
            (_, ids), gradient = jax.value_and_grad(loss, has_aux=True)(weights, x)
            return ids, gradient[None]

        return jax.jit(
            jax.shard_map(
                lambda w, x: step(jax.lax.pcast(w, "ep", to="varying") if check_vma else w, x),
                mesh=mesh,
                in_specs=(P(), P("ep")),
                out_specs=(P(None, "ep"), P("ep")),
                check_vma=check_vma,
            )
        )(weights, x)

    plain_ids, plain = run(lambda f: f)
    remat_ids, remat = run(jax.checkpoint)
    equal(plain_ids, remat_ids)
    np.testing.assert_allclose(remat, plain, rtol=1e-5, atol=1e-6 * np.max(np.abs(plain)))
    assert np.any(plain != 0)


def test_load_given_as_a_differentiated_value(platform, implementation, rng):
    """A load that depends on parameters carries no gradient, and does not fail."""
    ids = jnp.asarray(make_stack(rng)[0])

    def loss(scale):
        load = scale * jnp.arange(1, NUM_EXPERTS + 1, dtype=jnp.float32)
        out = lplb.balance(ids, PLACEMENT, load=load, implementation=implementation)
        return scale * jnp.sum(out.physical_ids).astype(jnp.float32) + jnp.sum(out.gap)

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.float32(2))
    assert gradient == pytest.approx(float(value) / 2, rel=1e-3)
