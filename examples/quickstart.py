"""The smallest complete use: one batch of a skewed router, balanced over all devices."""

import jax
import jax.numpy as jnp

import jax_lplb as lplb

# Without several accelerators, eight virtual CPU devices stand in for them.
jax.config.update("jax_num_cpu_devices", 8)
devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
ranks, home = len(devices), 32  # experts at home on each rank
mesh = jax.make_mesh((ranks,), ("ep",), devices=devices)
placement = lplb.Placement.from_topology(
    lplb.topology.ring(ranks), num_experts=ranks * home, num_ranks=ranks, redundants_per_rank=4
)


@jax.jit
@jax.shard_map(mesh=mesh, in_specs=(jax.P("ep"), jax.P()), out_specs=(jax.P("ep"), jax.P(), jax.P(), jax.P()))
def layer(logits, placement):
    _, expert_ids = jax.lax.top_k(logits, 8)
    out = lplb.balance(expert_ids, placement, axis_name="ep")
    # From here on: dispatch to `placement.num_physical` experts by out.physical_ids, as before by expert_ids.
    return out.physical_ids, out.load, out.rank_load, out.lower_bound


key, popularity = jax.random.split(jax.random.key(0))
# Some experts are popular. Each rank's most popular come first, since these are the ones that a topology copies.
popular = -jnp.sort(-jax.random.normal(popularity, (ranks, home)), axis=1).ravel()
logits = popular + jax.random.normal(key, (ranks * 512, ranks * home))

logits = jax.device_put(logits, jax.NamedSharding(mesh, jax.P("ep")))
physical_ids, load, after, lower_bound = layer(logits, placement)
before = load.reshape(ranks, home).sum(axis=1)
print(f"tokens of each rank without copies  {before}  largest / mean {before.max() / before.mean():.3f}")
print(f"tokens of each rank, balanced       {after}  largest / mean {after.max() / after.mean():.3f}")
print(f"no split over these copies can do better than {lower_bound.max() / after.mean():.3f} (certified)")
