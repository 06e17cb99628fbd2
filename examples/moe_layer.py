"""A balanced Mixture-of-Experts layer in Flax NNX, trained for a few steps over all devices."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_lplb.flax import Metrics, MoE

D_MODEL, EXPERTS, D_EXPERT, TOP_K, TOKENS = 64, 64, 32, 4, 256  # tokens of each rank and step
STEPS = 60

# Without several accelerators, eight virtual CPU devices stand in for them.
jax.config.update("jax_num_cpu_devices", 8)
devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
ranks = len(devices)
print(f"{ranks} ranks, {EXPERTS} experts; making the layer and compiling its step, half a minute or so", flush=True)
mesh = jax.make_mesh((ranks,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
jax.set_mesh(mesh)  # all that is made from here on is on its devices, as what a step returns: it compiles once

# Each rank has two slots for copies, which each step chooses for its own tokens: nothing is kept from step to step.
layer = MoE(D_MODEL, EXPERTS, D_EXPERT, TOP_K, mesh=mesh, axis_name="expert", rngs=nnx.Rngs(params=0))
# Weights from elsewhere, in logical order, go through one line: layer.set_experts(w_in, w_out)
optimiser = nnx.Optimizer(layer, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def step(layer: MoE, optimiser: nnx.Optimizer, x: jax.Array) -> tuple[jax.Array, Metrics]:
    """One update, towards a layer that reverses its input."""

    def loss(layer: MoE) -> tuple[jax.Array, Metrics]:
        y, metrics = layer(x)
        return jnp.mean((y - x[:, ::-1]) ** 2), metrics

    (value, metrics), grads = nnx.value_and_grad(loss, has_aux=True)(layer)
    optimiser.update(layer, grads)
    return value, metrics


by_rank = jax.NamedSharding(mesh, jax.P("expert"))
centres = jax.random.normal(jax.random.key(1), (16, D_MODEL))  # tokens come in kinds, some of them frequent
frequency = -jnp.arange(16) / 3.0
for number in range(STEPS):
    kind_key, noise_key = jax.random.split(jax.random.key(number + 2))
    kind = jax.random.categorical(kind_key, frequency, shape=(ranks * TOKENS,))
    x = jax.device_put(centres[kind] + 0.5 * jax.random.normal(noise_key, (len(kind), D_MODEL)), by_rank)
    value, metrics = step(layer, optimiser, x)
    if number % 10 == 0 or number == STEPS - 1:
        print(
            f"step {number:2}  loss {value:.3f}  largest / mean rank load: {metrics.home:.2f} without copies, "
            f"{metrics.balanced:.2f} balanced, {metrics.optimum:.2f} at best  {metrics.moved:.0%} moved",
            flush=True,
        )
