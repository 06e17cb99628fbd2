"""The build option LPLB_MATHDX: its sizes, and solves of groups that fill one, just, not quite and hardly."""

import importlib.util
import pathlib

import numpy as np
import pytest
from helpers import many_replicas, optimum, placement, rank_loads, topology

import jax_lplb as lplb
from jax_lplb import _handlers

SCRIPT = pathlib.Path(__file__).parents[1] / "cmake" / "mathdx.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("mathdx", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sizes_and_threads(script):
    assert script.parse_sizes("128;8,32x256 6") == [(6, 64), (8, 64), (32, 256), (128, 512)]
    assert [script.general_threads(size) for size in (6, 32, 64, 72)] == [128, 128, 256, 512]


@pytest.mark.parametrize("sizes", ["", "eight", "1", "129", "64x32", "8x100", "8x2048"])
def test_sizes_out_of_range(script, sizes):
    with pytest.raises(script.Failure):
        script.parse_sizes(sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("fill", ["all", "but one", "half and one"])
@pytest.mark.parametrize("replicas", ["two", "many"])
def test_solves_of_built_in_sizes(fill, replicas, rng):
    if not _handlers.mathdx_sizes:
        pytest.skip("built without LPLB_MATHDX")
    for size in _handlers.mathdx_sizes:
        ranks = {"all": size, "but one": size - 1, "half and one": size // 2 + 1}[fill]
        if replicas == "two":
            place = placement(topology.ring(ranks), 2 * ranks, ranks, 1)
        else:
            place = many_replicas(rng, num_experts=2 * ranks, num_ranks=ranks, redundants=2)
        for sigma in (0.3, 1.0, 2.5):
            popularity = rng.lognormal(0, sigma, place.num_experts)
            load = rng.multinomial(32768, popularity / popularity.sum()).astype(np.int32)
            solution = lplb.solve(load, place, implementation="ffi")
            assert np.asarray(solution.status).tolist() == [lplb.Status.CONVERGED]
            largest = rank_loads(np.asarray(solution.split), place).max()
            assert largest <= optimum(load, place).item() * (1 + 1.1e-4)
