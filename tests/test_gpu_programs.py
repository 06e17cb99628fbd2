"""Programs for four H100, compiled where there is none: what XLA makes of the calls on peers' memory.

Needs JAX's plugin for CUDA 13 and the CUDA handlers, no GPU:
`JAX_PLATFORMS=cpu make test JAX="jax[cuda13]" VENV=.venv-cuda PYTEST_ARGS=tests/test_gpu_programs.py`.
"""

import collections
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_dispatch import layers_by_scan
from test_peer import EXPERTS, chosen

import jax_lplb as lplb
from jax_lplb import _ffi

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or "cuda" not in _ffi.handlers(),
    reason="needs jax[cuda13] and the CUDA handlers",
)


@pytest.fixture(scope="module")
def h100s():
    """A mesh of four H100 that are not here."""
    _ffi.register_gather()
    target = pathlib.Path(__file__).with_name("h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x4", target_config=target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ffi, "gpus", lambda: (0, 1, 2, 3))
        yield jax.sharding.Mesh(np.array(topology.devices), ("ep",), axis_types=(AxisType.Auto,))


def calls(text: str) -> collections.Counter:
    """How often a program of StableHLO or HLO calls each of the handlers."""
    names = re.findall(r"@(lplb_\w+)\(|custom_call_target=\"(lplb_\w+)\"", text)
    return collections.Counter(filter(None, (name for pair in names for name in pair)))


def check_calls(step, operands) -> None:
    """Each call is there once, and none of them reads or writes slices in place."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), operands)
    lowered = step.trace(*shapes).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile().as_text()
    on_memory = [name for name in calls(compiled) if name not in ("lplb_count", "lplb_number")]
    assert {"lplb_expose", "lplb_gather", "lplb_release"} <= set(on_memory)
    assert all(calls(compiled)[name] <= calls(lowered.as_text())[name] for name in on_memory)
    for computation in re.split(r"\n(?=%|ENTRY)", compiled):
        if computation.startswith("%dynamic-slice-fusion"):
            assert not any(name in computation for name in on_memory), computation


@pytest.mark.parametrize("policy", [None, "nothing", "collectives"])
def test_tokens_of_layers_by_scan(rng, h100s, policy):
    step, _, operands = layers_by_scan(rng, h100s, policy)
    check_calls(step, operands)


def test_weights_of_layers_by_scan(rng, h100s):
    """Rows of which a slice is aligned, as what XLA reads in place has to be."""
    placement, layers = chosen(rng, h100s.size), 3

    def bring(home, gradient):
        def layer(_, given):
            weights, of_slots = given
            slots, pull = jax.vjp(lambda home: lplb.replicate(home, placement, "ep", transport="peer"), weights)
            return None, (slots, pull(of_slots)[0])

        return jax.lax.scan(layer, None, (home, gradient))[1]

    layered = P(None, "ep")
    step = jax.jit(jax.shard_map(bring, mesh=h100s, in_specs=(layered, layered), out_specs=layered))
    check_calls(step, [jnp.zeros((layers, rows, 128)) for rows in (EXPERTS, placement.num_physical)])
