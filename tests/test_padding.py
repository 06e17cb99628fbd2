"""Padding among tokens: all is as if it were not there, whatever it holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_moe import (
    D_MODEL,
    EXPERTS,
    RANKS,
    TOP_K,
    P,
    arrays_of,
    assert_close,
    dense,
    inputs,
    logical,
    make,
    mesh_of,
    params_of,
    placements,
)

import jax_lplb as lplb

TOKENS, REAL = 704, 512  # of all ranks; the latter without padding


@partial(nnx.jit, static_argnames=("prepared", "remat"))
def value_and_grads(layer, x, weight, mask=None, prepared=False, remat=False):
    """Result, metrics, and the gradients of a weighted sum and the balancing loss, by parameters and input."""

    def call(layer, x, mask):
        return layer(x, layer.prepare() if prepared else None, mask=mask)

    def loss(layer, x):
        result, metrics = (nnx.remat(call) if remat else call)(layer, x, mask)
        return jnp.sum(result * weight) + metrics.aux_loss, (result, metrics)

    (_, aux), grads = nnx.value_and_grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1), has_aux=True)(layer, x)
    return aux, grads


@jax.jit
def dense_value_and_grads(params, x, weight):
    def loss(params, x):
        result = dense(params, x)
        scores = jax.nn.softmax(x @ params["router"])
        picked = jnp.sum(jax.nn.one_hot(jax.lax.top_k(scores, TOP_K)[1], EXPERTS), axis=(0, 1))
        return jnp.sum(result * weight) + EXPERTS * jnp.sum(picked / (len(x) * TOP_K) * scores.mean(axis=0)), result

    (_, result), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return result, grads


def padded(rng, *shape: int, tokens: int = REAL) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Inputs and weights [*shape, D_MODEL] of so many tokens; elsewhere they hold no numbers. And the mask."""
    mask = (rng.permutation(np.prod(shape)) < tokens).reshape(shape)
    x, weight = (np.where(mask[..., None], rng.normal(size=(*shape, D_MODEL)), np.nan) for _ in range(2))
    return jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), mask


def check_values(got, wanted, mask) -> None:
    """Result, and gradients by the input and by parameters in logical order."""
    (result, x_grad, grads), (expected, (expected_grads, expected_x)) = got, wanted
    for actual, want in ((result, expected), (x_grad, expected_x)):
        assert_close(np.asarray(actual)[mask], want)
        np.testing.assert_array_equal(np.asarray(actual)[~mask], 0)
    assert grads.keys() == expected_grads.keys()
    for name, value in expected_grads.items():
        assert_close(grads[name], value)


def check(layer, x, weight, mask, got) -> None:
    """Against the dense reference, and the layer itself, of the tokens alone."""
    (result, metrics), (grads, x_grad) = got
    place, alone = layer.placement.get_value(), x[mask]
    wanted = dense_value_and_grads(logical(params_of(layer), place), alone, weight[mask])
    check_values((result, x_grad, logical(arrays_of(grads), place)), wanted, mask)
    metrics_alone = nnx.jit(lambda layer, x: layer(x)[1])(layer, alone)
    for name, value in metrics_alone._asdict().items():
        if name != "rounds":  # of buffers whose size goes by the shape
            np.testing.assert_allclose(getattr(metrics, name), value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("name", "dispatch", "buffer_factor"),
    [
        (None, "peer", 8.0),
        ("cube", "peer", 0.2),
        (None, "all_to_all", 0.2),
        ("cube", "ring", 0.2),
        ("cube", "dense", 8.0),
    ],
)
def test_masked_tokens_are_as_if_they_were_not_there(rng, name, dispatch, buffer_factor):
    """Results, metrics and all gradients, in one round and several; of the shared experts too."""
    place = placements()[name] if name else None
    options = {"dispatch": dispatch, "buffer_factor": buffer_factor, "n_shared_experts": 1}
    layer = make(place, mesh_of((RANKS, "ep")), **options)
    x, weight, mask = padded(rng, TOKENS)
    got = value_and_grads(layer, x, weight, mask)
    check(layer, x, weight, mask, got)
    assert (got[0][1].rounds > 1) == (buffer_factor < 1)
    assert int(got[0][1].load.sum()) == REAL * TOP_K
    if buffer_factor > 1:  # the same program, of tokens on two ranks alone
        mask = np.arange(TOKENS) < 128
        x, weight = (jnp.where(mask[:, None], leaf, jnp.nan) for leaf in inputs(rng, TOKENS))
        check(layer, x, weight, mask, value_and_grads(layer, x, weight, mask))


def test_masks_of_batches_that_are_padded_within(rng):
    """Devices share out the tokens of all axes, and the layer adds padding of its own."""
    layer = make(None, mesh_of((RANKS, "ep")))
    x, weight, mask = padded(rng, 3, 29, tokens=64)
    check(layer, x, weight, mask, value_and_grads(layer, x, weight, mask))


def test_masks_on_a_data_axis_with_prepared_slots_and_remat(rng):
    """On Explicit axes, of sequences; one row of the mesh has padding alone."""
    mesh = jax.make_mesh((2, 4), ("data", "ep"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    place = lplb.Placement.from_eplb(rng.lognormal(0, 1, EXPERTS), num_ranks=4, redundants_per_rank=2)
    layer = make(place, mesh, token_axes=("data", "ep"))
    x, weight, mask = padded(rng, RANKS, 11)
    mask[:4] = False
    operands = jax.device_put((x, weight, mask), jax.NamedSharding(mesh, P(("data", "ep"))))
    (result, metrics), (grads, x_grad) = value_and_grads(layer, *operands, prepared=True, remat=True)
    assert result.sharding.is_equivalent_to(operands[0].sharding, 3)
    params = {name: np.asarray(leaf) for name, leaf in params_of(layer).items()}
    wanted = dense_value_and_grads(params, x[mask], weight[mask])
    check_values((result, x_grad, arrays_of(grads)), wanted, mask)
    assert int(metrics.load.sum()) == mask.sum() * TOP_K


@pytest.mark.parametrize("dispatch", ["peer", "dense"])
def test_padding_alone(rng, dispatch):
    """Metrics are those of a batch without tokens, results and gradients are 0, and no bias moves."""
    layer = make(None, mesh_of((RANKS, "ep")), dispatch=dispatch, n_shared_experts=1, router_bias=True)
    x, weight, mask = padded(rng, TOKENS, tokens=0)
    (result, metrics), grads = value_and_grads(layer, x, weight, mask)
    for leaf in (result, *jax.tree.leaves(grads)):
        np.testing.assert_array_equal(leaf, 0)
    for got, expected in zip(metrics, layer(x[:0], mask=mask[:0])[1], strict=True):
        np.testing.assert_array_equal(got, expected)
    layer.update_bias(metrics.load)
    np.testing.assert_array_equal(layer.bias[...], 0)


def test_a_mask_goes_through_scanned_layers_and_vmap(rng):
    """Rematerialised layers in turn, each of the same mask; and batches, each of a mask of its own."""
    mesh, place = mesh_of((RANKS, "ep")), placements()["rings by load"]
    layers = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: make(place, mesh, rngs=rngs)))(nnx.Rngs(0))

    @nnx.jit
    def through(layers, x, mask):
        @nnx.scan(in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
        @nnx.remat
        def step(layer, x, mask):
            return x + layer(x, mask=mask)[0]

        return step(layers, x, mask)

    (x, _, mask), (other_x, _, other) = (padded(rng, 88, tokens=64) for _ in range(2))
    x, other_x = map(jnp.nan_to_num, (x, other_x))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], params_of(layers)) for i in range(2)]
    expected = x[mask]
    for params in each:
        expected = expected + dense(logical(params, place), expected)
    result = through(layers, x, mask)
    assert_close(result[mask], expected)
    np.testing.assert_array_equal(result[~mask], x[~mask])

    layer = make(place, mesh)
    batches = jax.jit(jax.vmap(lambda x, mask: layer(x, mask=mask)[0]))(
        jnp.stack([x, other_x]), jnp.stack([mask, other])
    )
    for got, tokens, is_token in zip(batches, (x, other_x), (mask, other), strict=True):
        assert_close(got[is_token], dense(logical(params_of(layer), place), tokens[is_token]))
        np.testing.assert_array_equal(got[~is_token], 0)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ones((16, 3), np.int32), TypeError, "mask must be a bool array, True for a token .*, got int32"),
        ([[True] * 3] * 16, TypeError, "mask must be a bool array, .*, got list"),
        (np.ones((16, 3, D_MODEL), bool), ValueError, r"mask must have the shape of .*, \(16, 3\), got \(16, 3, 12\)"),
        (np.ones(16, bool), ValueError, r"mask must have the shape of x without d_model, \(16, 3\), got \(16,\)"),
    ],
)
def test_refuses_other_masks(mask, error, message):
    layer = make(None, mesh_of((RANKS, "ep")))
    with pytest.raises(error, match=message):
        layer(np.zeros((16, 3, D_MODEL), np.float32), mask=mask)


@pytest.mark.parametrize("transport", ["peer", "collective"])
def test_ids_of_padding_in_the_functional_steps(rng, transport):
    """From balance to combine: tokens, gates and gradients of padding do not show, and their own gradients are 0."""
    place = lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2)
    (x, weight, mask), scale = padded(rng, TOKENS), rng.uniform(1, 2, EXPERTS).astype(np.float32)
    ids = np.argpartition(rng.gumbel(size=(TOKENS, EXPERTS)), TOP_K)[:, :TOP_K].astype(np.int32)
    ids[rng.random(ids.shape) < 0.2] = EXPERTS  # a choice alone
    ids[~mask] = -1
    there = (ids >= 0) & (ids < EXPERTS)
    gates = np.where(there, rng.uniform(size=ids.shape), np.nan).astype(np.float32)

    def on_rank(x, ids, gates, weight, scale):
        out = lplb.balance(ids, place, axis_name="ep")
        options = {"buffer_factor": 0.2, "transport": transport}
        slot = jax.lax.axis_index("ep") * place.slots_per_rank + jnp.arange(place.slots_per_rank)
        of_slots = scale.at[out.placement.phy2log[slot]].get(mode="fill", fill_value=0, wrap_negative_indices=False)

        def loss(x, gates, of_slots):
            total, sizes = 0.0, 0
            for number in range(4):
                rows, group_sizes, rounds, handle = lplb.dispatch(
                    x, out.physical_ids, out.placement, "ep", round=number, **options
                )
                of_rows = jnp.repeat(of_slots, group_sizes, total_repeat_length=len(rows))
                total += lplb.combine(rows * of_rows[:, None], gates, handle)
                sizes += jnp.sum(group_sizes)
            return jnp.sum(total * weight), (total, sizes[None], rounds)

        grads, (total, sizes, rounds) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gates, of_slots)
        return total, sizes, rounds, grads, out.load, out.rank_load

    specs = (P("ep"), P("ep"), P(), P("ep"), P(), P())
    run = jax.jit(jax.shard_map(on_rank, mesh=mesh_of((RANKS, "ep")), in_specs=(*[P("ep")] * 4, P()), out_specs=specs))
    total, sizes, rounds, grads, load, rank_load = run(x, ids, gates, weight, scale)
    assert 1 < rounds <= 4
    np.testing.assert_array_equal(load, np.bincount(ids[there], minlength=EXPERTS))
    np.testing.assert_array_equal(sizes, rank_load)

    def reference(x, gates):
        of_choices = jnp.where(there, gates, 0) * scale[np.where(there, ids, 0)]
        return jnp.where(mask[:, None], x, 0) * jnp.sum(of_choices, axis=1, keepdims=True)

    np.testing.assert_allclose(total, reference(x, gates), rtol=1e-5, atol=1e-6)
    weight = jnp.nan_to_num(weight)
    expected = jax.grad(lambda *operands: jnp.sum(reference(*operands) * weight), argnums=(0, 1))(x, gates)
    for got, want in zip(grads[:2], expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.isfinite(grads[2]).all()
