"""Where experts live: a placement of each layer, by the number of ranks and past load."""

from functools import partial

import jax
import numpy as np

import jax_lplb as lplb
from config import Config


def place(config: Config, ranks: int, load: np.ndarray) -> lplb.Placement:
    """Placements of all layers, stacked, for past load [layers, experts]; zeros where there is none yet.

    Of equal shapes whatever the load, so that one can replace the other without recompiling.
    """
    placing, (layers, experts) = config.placing, load.shape
    redundants = placing.redundants if placing.balance and ranks > 1 else 0
    try:
        if ranks == 1 or (placing.placement == "eplb" and redundants):
            return lplb.Placement.from_eplb(
                load, num_ranks=ranks, redundants_per_rank=redundants, max_replicas=min(ranks, 8)
            )
        along = partial(
            lplb.Placement.from_topology,
            _topology(ranks),
            num_experts=experts,
            num_ranks=ranks,
            redundants_per_rank=redundants,
        )
        if placing.balance and load.any():
            return along(load=load)
        return jax.tree.map(lambda leaf: np.tile(leaf, (layers, *[1] * leaf.ndim)), along())
    except ValueError as error:
        raise SystemExit(f"train: --redundants {placing.redundants} on {ranks} expert ranks: {error}") from error


def _topology(ranks: int) -> lplb.topology.Topology:
    if ranks == 4:
        return lplb.topology.torus(2, 2)
    if ranks == 8:
        return lplb.topology.cube()
    return lplb.topology.hypercube() if ranks == 16 else lplb.topology.ring(ranks)
