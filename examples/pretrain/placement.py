"""Where experts live: a placement of each layer, by the number of ranks, and by past load with --copies past."""

from functools import partial

import jax
import numpy as np

import jax_lplb as lplb
from config import Config


def place(config: Config, ranks: int, load: np.ndarray | None = None) -> lplb.Placement:
    """Placements of all layers, stacked; with --copies past by a past load [layers, experts], where there is one.

    Of equal shapes whatever the load, so that one can replace the other without recompiling.
    """
    placing, layers = config.placing, config.model.layers
    experts, redundants = config.model.experts, placing.redundants
    if placing.copies == "none" or ranks == 1:
        redundants = 0
    try:
        if placing.copies != "past" or ranks == 1:
            one = lplb.Placement.per_batch(num_experts=experts, num_ranks=ranks, redundants_per_rank=redundants)
            return _repeated(one, layers)
        past = np.zeros((layers, experts)) if load is None else load
        if placing.placement == "eplb":
            return lplb.Placement.from_eplb(
                past, num_ranks=ranks, redundants_per_rank=redundants, max_replicas=min(ranks, 8)
            )
        along = partial(
            lplb.Placement.from_topology,
            _topology(ranks),
            num_experts=experts,
            num_ranks=ranks,
            redundants_per_rank=redundants,
        )
        return along(load=past) if past.any() else _repeated(along(), layers)
    except ValueError as error:
        raise SystemExit(f"train: --redundants {placing.redundants} on {ranks} expert ranks: {error}") from error


def _repeated(placement: lplb.Placement, layers: int) -> lplb.Placement:
    return jax.tree.map(lambda leaf: np.tile(leaf, (layers, *[1] * leaf.ndim)), placement)


def _topology(ranks: int) -> lplb.topology.Topology:
    if ranks == 4:
        return lplb.topology.torus(2, 2)
    if ranks == 8:
        return lplb.topology.cube()
    return lplb.topology.hypercube() if ranks == 16 else lplb.topology.ring(ranks)
