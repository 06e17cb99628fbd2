"""The smallest complete use: one batch of a skewed router, balanced over all devices."""

import jax

import jax_lplb as lplb

# Without several accelerators, eight virtual CPU devices stand in for them.
jax.config.update("jax_num_cpu_devices", 8)
devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
ranks, home = len(devices), 32  # experts at home on each rank
mesh = jax.make_mesh((ranks,), ("ep",), devices=devices)
placement = lplb.Placement.per_batch(num_experts=ranks * home, num_ranks=ranks, redundants_per_rank=2)


@jax.jit
@jax.shard_map(mesh=mesh, in_specs=jax.P("ep"), out_specs=lplb.Balanced(jax.P("ep"), *[jax.P()] * 6))
def layer(logits):
    _, expert_ids = jax.lax.top_k(logits, 8)
    # From here on: weights of the copies by out.placement (lplb.replicate), and the dispatch by out.physical_ids, to
    # `placement.num_physical` experts, as before by expert_ids.
    return lplb.balance(expert_ids, placement, axis_name="ep")


key, popularity = jax.random.split(jax.random.key(0))
popular = jax.random.normal(popularity, ranks * home)  # some experts are
logits = popular + jax.random.normal(key, (ranks * 512, ranks * home))

out = layer(jax.device_put(logits, jax.NamedSharding(mesh, jax.P("ep"))))
before, after = out.load.reshape(ranks, home).sum(axis=1), out.rank_load
copies = (out.placement.phy2log >= 0).sum() - ranks * home
print(f"tokens of each rank without copies  {before}  largest / mean {before.max() / before.mean():.3f}")
print(f"tokens of each rank, balanced       {after}  largest / mean {after.max() / after.mean():.3f}")
print(f"no split over these {copies} copies can do better than {out.lower_bound.max() / after.mean():.3f} (certified)")
