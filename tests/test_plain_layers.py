"""The layers that the benchmark compares with: the Flax layer's results and gradients, but for what they drop."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_lplb.flax import MoE

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import plain_layers

RANKS, EXPERTS, D_MODEL, D_EXPERT, TOP_K, TOKENS = 4, 8, 12, 20, 3, 24


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    axis = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((RANKS,), ("ep",), axis_types=axis, devices=jax.devices()[:RANKS])


@pytest.fixture
def layer(mesh) -> MoE:
    options = {"redundants_per_rank": 0, "dispatch": "dense", "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    return MoE(D_MODEL, EXPERTS, D_EXPERT, TOP_K, mesh=mesh, axis_name="ep", **options)


def params_of(layer: MoE) -> dict[str, jax.Array]:
    return {name: getattr(layer, name)[...] for name in ("router", "w_in", "w_out")}


@pytest.mark.parametrize("mode", plain_layers.LAYERS)
def test_equals_the_dense_layer_where_nothing_is_dropped(rng, mesh, layer, mode):
    x, weight = (jnp.asarray(rng.normal(size=(RANKS * TOKENS, D_MODEL)), jnp.float32) for _ in range(2))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    plain = plain_layers.make(mode, mesh, TOP_K, RANKS, None)

    def loss_of(function):
        def loss(params, x):
            result, other = function(params, x)
            return jnp.sum(result * weight), (result, other)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    of_layer = loss_of(lambda params, x: nnx.merge(graph, params, rest)(x))
    (of_params, of_x), (expected, _) = of_layer(params, x)
    gradients, (result, dropped) = loss_of(plain)(params_of(layer), x)
    assert dropped == 0
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[1], of_x, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradient, of_params[name][...], rtol=1e-5, atol=1e-5, err_msg=name)


def test_capacity_drops_what_comes_last(rng, mesh, layer):
    """Each rank's choices of an expert beyond its room count for nothing, and are reported."""
    x = jnp.asarray(rng.normal(size=(RANKS * TOKENS, D_MODEL)), jnp.float32)
    params = params_of(layer)
    result, dropped = jax.jit(plain_layers.make("capacity", mesh, TOP_K, 1.0, None))(params, x)
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"], np.float64)
    room, lost, expected = TOKENS * TOP_K // EXPERTS, 0, np.zeros(x.shape)
    for rank in range(RANKS):
        load = np.zeros(EXPERTS, int)
        for token in range(rank * TOKENS, (rank + 1) * TOKENS):
            ids = np.argsort(-logits[token])[:TOP_K]
            gates = np.exp(logits[token][ids])
            for expert, share in zip(ids, gates / gates.sum(), strict=True):
                load[expert] += 1
                if load[expert] > room:
                    lost += 1
                    continue
                gate, up = np.split(np.asarray(x[token]) @ np.asarray(params["w_in"][expert]), 2)
                expected[token] += share * (gate / (1 + np.exp(-gate)) * up) @ np.asarray(params["w_out"][expert])
    assert lost > 0
    np.testing.assert_allclose(dropped, lost / (RANKS * TOKENS * TOP_K), rtol=1e-6)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
