"""One process of test_distributed.py, with one GPU: it reads weights of copies from the memory of the others' GPUs.

`python peer_process.py PROCESS PROCESSES PORT` ends with an error where a value is wrong.
"""

import os
import sys
from functools import partial


def main(process: int, processes: int, port: int) -> None:
    import jax

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    local = [0 if len(visible) == 1 and visible != [""] else process]
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process, local_device_ids=local)
    jax.config.update("jax_default_matmul_precision", "highest")

    import jax_lplb as lplb

    mesh = jax.sharding.Mesh(jax.devices(), ("ep",))
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "cuda_async":
        check_refused(mesh)
        check_weights(mesh, None)
        return
    for elements in (3, 1 << 14, 1 << 20):  # where memory grows, in regions of their own
        check_weights(mesh, "peer", elements)
    check_layer(mesh, None, redundants_per_rank=2)
    check_layer(mesh, None, redundants_per_rank=2, dispatch="peer")
    ring = lplb.topology.ring(processes)
    along = lplb.Placement.from_topology(ring, num_experts=16, num_ranks=processes, redundants_per_rank=2)
    check_layer(mesh, along)
    check_layer(mesh, None, redundants_per_rank=2, prepared=True)
    check_steps(mesh)


def check_weights(mesh, transport: str | None, elements: int = 3) -> None:
    """Slots, and the sums of their gradients, against NumPy."""
    import jax
    import numpy as np
    from test_peer import EXPERTS, P, assert_shards, held, placements, slots_and_gradient, summed

    import jax_lplb as lplb

    rng = np.random.default_rng(elements)
    put = partial(jax.device_put, device=jax.NamedSharding(mesh, P("ep")))
    for place in placements(rng, mesh.size).values():
        logical = rng.integers(-9, 9, (EXPERTS, elements)).astype(np.float32)
        gradient = rng.integers(-9, 9, (place.num_physical, elements)).astype(np.float32)
        home, expected = (
            np.asarray(lplb.from_logical(rows, place)) for rows in (logical, summed(place, gradient, np.float32))
        )
        step = slots_and_gradient(mesh=mesh, transport=transport)
        for _ in range(3):
            slots, sums = step(put(home), place, put(gradient))
            assert_shards(slots, held(place, logical))
            assert_shards(sums, expected)


def check_layer(mesh, place, prepared: bool = False, **options) -> None:
    """Results and gradients of the layer against a dense one."""
    import jax
    import numpy as np
    from test_moe import P, check_against_dense, inputs, make

    by_rank = jax.NamedSharding(mesh, P("ep"))
    x, weight = jax.device_put([np.asarray(v) for v in inputs(np.random.default_rng(0))], by_rank)
    options |= {"transport": "peer", "buffer_factor": 0.7, "grouped_matmul": "ragged_dot"}
    check_against_dense(make(place, mesh, **options), x, weight, prepared)


def check_steps(mesh) -> None:
    """Any delays, of weights and gradients in new memory and in place; and rows that are begun."""
    import jax
    import numpy as np
    import pytest
    from test_peer import begun_rows_are_right, check_any_delays, right_in_rooms

    rng = np.random.default_rng
    jax.clear_caches()  # what was traced has no delays
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_any_delays(monkeypatch, rng(0), mesh, 1 << 12)
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as monkeypatch:
        right = right_in_rooms(monkeypatch, rng(0), mesh, 1 << 12)
        assert all(right() for _ in range(2))
    for in_place in (False, True):
        assert begun_rows_are_right(mesh, in_place, 1 << 20)


def check_refused(mesh) -> None:
    import pytest
    from test_peer import brought

    with pytest.raises(ValueError, match=r"transport = 'peer': .* a pool of CUDA .*; pass transport='collective'"):
        brought("peer", mesh)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
