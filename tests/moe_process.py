"""One of the processes of test_distributed.py: a layer's results and gradients over all their devices.

`python moe_process.py PROCESS PROCESSES PORT OUT` writes OUT from process 0.
"""

import os
import sys
from functools import partial


def main(process: int, processes: int, port: int, out: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={8 // processes}"
    import jax

    jax.config.update("jax_platforms", "cpu")
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
        check_handover(process, processes)

    import numpy as np
    from jax.experimental import multihost_utils
    from test_moe import inputs, make, mesh_of, placements, value_and_grads

    mesh = mesh_of((8, "ep"))
    by_rank = jax.NamedSharding(mesh, jax.P("ep"))
    results = {}
    for name, dispatch in (("cube", "ring"), ("eplb", "all_to_all")):
        layer = make(placements()[name], mesh, dispatch=dispatch, buffer_factor=0.7)
        x, weight = jax.device_put([np.asarray(v) for v in inputs(np.random.default_rng(0))], by_rank)
        leaves = jax.tree.leaves(value_and_grads(layer, x, weight))
        for i, leaf in enumerate(multihost_utils.process_allgather(leaves, tiled=True)):
            results[f"{name} {dispatch} {i}"] = np.asarray(leaf)
    if process == 0:
        np.savez(out, **results)


def check_handover(process: int, processes: int) -> None:
    """Processes find each other through JAX's store; files in memory stand for regions of GPUs."""
    from jax._src import distributed
    from test_handover import Handover, agree, file_of, reader

    regions, own = {}, b"of process %d" % process
    handover = Handover(process, reader(regions))
    trial = partial(handover.hand_over, 7, len(own), file_of(own))
    assert agree(distributed.global_state.client, processes, handover, trial) == ""
    assert regions == {(p, 7): b"of process %d" % p for p in range(processes) if p != process}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
