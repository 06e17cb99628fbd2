"""Tracing keeps nothing: `jax.checking_leaks` finds no tracer that outlives its trace."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import many_replicas, placement, topology

import jax_lplb as lplb
from jax_lplb import _expert_parallel

P = jax.sharding.PartitionSpec
RANKS, EXPERTS, WIDTH = 8, 16, 4


@pytest.fixture(autouse=True)
def _earlier_objects():
    """JAX collects garbage after each trace: not among what other tests have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def placement_of(name: str) -> lplb.Placement:
    if name == "topology":
        return placement(topology.cube(), EXPERTS, RANKS, 2)
    return many_replicas(np.random.default_rng(0), num_experts=EXPERTS, num_ranks=RANKS, redundants=2)


def trace(function, *shapes) -> None:
    """On a mesh of all ranks; differentiated within, for JAX itself keeps what is differentiated from outside.

    (An equation with a collective, in the tangents' trace, holds its operands, and they the trace: any such gradient is
    reported, of a program without jax_lplb too.)
    """
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    with jax.checking_leaks():
        run.trace(*shapes)


@pytest.mark.parametrize(
    ("name", "dispatch", "buffer_factor"), [("topology", "all_to_all", 0.2), ("any ranks", "peer", float(RANKS))]
)
def test_balanced_experts_and_their_gradient(name, dispatch, buffer_factor):
    """In as many rounds as it takes, which all ways go alike; and in buffers that always hold everything."""
    place = placement_of(name)

    def loss(home, tokens, gates, expert_ids):
        out = lplb.balance(expert_ids, place, axis_name="ep")
        result, *_ = _expert_parallel.expert_parallel(
            tokens,
            out.physical_ids,
            gates,
            lplb.replicate(home, place, "ep", jnp.bfloat16).astype(jnp.float32),
            lambda slots, rows, sizes: jax.lax.ragged_dot(rows, slots, sizes),
            place,
            axis_name="ep",
            dispatch=dispatch,
            buffer_factor=buffer_factor,
            dtype=jnp.float32,
        )
        return jnp.sum(result**2)

    tokens = RANKS * 88
    trace(
        jax.grad(loss, argnums=(0, 1, 2)),
        jax.ShapeDtypeStruct((EXPERTS, WIDTH, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((tokens, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((tokens, 3), jnp.float32),
        jax.ShapeDtypeStruct((tokens, 3), np.int32),
    )
