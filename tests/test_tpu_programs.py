"""Programs for a TPU, compiled where there is none: `balance` and the layer are pure JAX there.

Needs libtpu, no TPU:
`JAX_PLATFORMS=cpu make test JAX="jax[tpu]" VENV=.venv-tpu PYTEST_ARGS=tests/test_tpu_programs.py`.
"""

import importlib.util
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_lplb as lplb
from jax_lplb.flax import MoE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]")

EXPERTS = 16


@pytest.fixture(scope="module")
def tpus():
    """A mesh of four TPUs that are not here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")  # nobody on the network is asked what there is
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return jax.sharding.Mesh(np.array(devices), ("ep",), axis_types=(AxisType.Auto,))


def placements(ranks):
    ring = lplb.topology.ring(ranks)
    return {
        "topology": lplb.Placement.from_topology(ring, num_experts=EXPERTS, num_ranks=ranks, redundants_per_rank=1),
        "per batch": lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=ranks, redundants_per_rank=1),
    }


def compiled(function, *shapes) -> str:
    """A program for TPUs, which has no call of ours."""
    text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert 'custom_call_target="lplb_' not in text
    return text


@pytest.mark.parametrize("solver", ["auto", "ipm"])
@pytest.mark.parametrize("which", ["topology", "per batch"])
def test_balance(tpus, which, solver):
    run = jax.shard_map(
        lambda ids: lplb.balance(ids, placements(4)[which], axis_name="ep", solver=solver).physical_ids,
        mesh=tpus,
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    ids = jax.ShapeDtypeStruct((4 * 64, 2), jnp.int32, sharding=jax.NamedSharding(tpus, P("ep")))
    assert re.search("all-gather|all-reduce", compiled(run, ids))


@pytest.mark.parametrize("dispatch", ["all_to_all", "ring"])
def test_layer(tpus, dispatch):
    """Forward and backward."""
    make = partial(
        MoE,
        128,
        EXPERTS,
        128,
        2,
        placement=placements(4)["per batch"],
        mesh=tpus,
        axis_name="ep",
        dispatch=dispatch,
        grouped_matmul="ragged_dot",
    )
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param, ...)
    by_rank = jax.NamedSharding(tpus, P("ep"))

    def loss(params, rest, x):
        return jnp.sum(nnx.merge(graph, params, rest)(x)[0])

    x = jax.ShapeDtypeStruct((4 * 64, 128), jnp.float32, sharding=by_rank)
    collective = {"all_to_all": "all-to-all", "ring": "all-gather|all-reduce"}[dispatch]
    with jax.default_matmul_precision("default"):  # XLA's grouped matmul of bfloat16 has no other there
        assert re.search(collective, compiled(jax.grad(loss), params, rest, x))
