"""EPLB: copies of the heaviest experts, packed onto ranks by past load.

The algorithm of DeepSeek's Expert Parallelism Load Balancer (https://github.com/deepseek-ai/EPLB), on the host, in
NumPy, for all layers at once.
"""

import numpy as np
from numpy.typing import ArrayLike

from jax_lplb._checks import check_count

__all__ = ["rebalance_experts"]


def __dir__() -> list[str]:
    return __all__


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places the replicas of each layer's experts on ranks.

    Where `num_nodes` divides `num_groups`, hierarchically: groups of experts are packed onto nodes, experts are
    replicated within their node, and replicas are packed onto the node's ranks; so that a router that picks few groups
    talks to few nodes. Else globally, as if there were one group and one node. Replicas go one by one to the expert
    with the most load a replica, and packing takes the heaviest first to the lightest pack with room; ties go to the
    lower number. Two replicas of an expert may meet on one rank; `jax_lplb.Placement.from_eplb` replaces such.

    Args:
      weight: [num_layers, num_experts], the load of each logical expert, past or predicted, in any unit; not negative.
      num_replicas: slots over all ranks; a multiple of `num_gpus`, and at least `num_experts`.
      num_groups: groups of neighbouring experts, of equal size.
      num_nodes: nodes; divides `num_gpus`.
      num_gpus: ranks.

    Returns:
      phy2log [num_layers, num_replicas], the logical expert of each slot; log2phy [num_layers, num_experts, X], the
      slots of each logical expert in the order of its replicas, padded with -1, X = num_replicas - num_experts + 1; and
      logcnt [num_layers, num_experts], the number of its replicas. All int64.

    Raises:
      TypeError: a number is not an integer.
      ValueError: numbers do not divide as said, or a weight is negative or not finite.
    """
    # In float32, as the original, so that near ties fall as they do there.
    weight = np.asarray(weight, np.float32)
    _check(weight, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    num_layers, num_experts = weight.shape
    of_node, ranks_of_node = num_experts // num_nodes, num_gpus // num_nodes

    # Groups to nodes. From here on an expert has a local number on its node.
    group_size = num_experts // num_groups
    node, place = _pack(weight.reshape(num_layers, num_groups, group_size).sum(axis=-1), num_nodes)
    first = node * of_node + place * group_size
    local = (first[:, :, None] + np.arange(group_size)).reshape(num_layers, num_experts)
    expert = np.argsort(local, axis=1).reshape(-1, of_node)  # of a node's local number
    load = np.take_along_axis(weight, expert.reshape(num_layers, -1), axis=1).reshape(-1, of_node)

    # Replicas within nodes, and those to the node's ranks.
    replica_of, number, count = _replicate(load, num_replicas // num_nodes)
    rank, place = _pack(np.take_along_axis(load / count.astype(load.dtype), replica_of, axis=1), ranks_of_node)
    order = np.argsort(rank * (num_replicas // num_gpus) + place, axis=1)  # of slots
    phy2log = np.take_along_axis(expert, np.take_along_axis(replica_of, order, axis=1), axis=1)
    phy2log = phy2log.reshape(num_layers, num_replicas)
    number = np.take_along_axis(number, order, axis=1).reshape(num_layers, num_replicas)

    layer = np.arange(num_layers)[:, None]
    log2phy = np.full((num_layers, num_experts, num_replicas - num_experts + 1), -1)
    log2phy[layer, phy2log, number] = np.arange(num_replicas)
    logcnt = np.zeros((num_layers, num_experts), np.int64)
    logcnt[layer, expert.reshape(num_layers, -1)] = count.reshape(num_layers, -1)
    return phy2log, log2phy, logcnt


def _pack(weight: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """The pack of each item and its place there, for weights [rows, items]; as many items in each pack.

    Items go by weight, the heaviest first, to the lightest pack with room.
    """
    rows, items = weight.shape
    capacity = items // num_packs
    if capacity == 1:
        return np.broadcast_to(np.arange(items), weight.shape), np.zeros(weight.shape, np.int64)
    row = np.arange(rows)
    sums = np.zeros((rows, num_packs), weight.dtype)
    sizes = np.zeros((rows, num_packs), np.int64)
    pack, place = np.empty((2, rows, items), np.int64)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        chosen = np.argmin(np.where(sizes < capacity, sums, np.inf), axis=1)
        pack[row, item] = chosen
        place[row, item] = sizes[row, chosen]
        sums[row, chosen] += weight[row, item]
        sizes[row, chosen] += 1
    return pack, place


def _replicate(load: np.ndarray, num_replicas: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For loads [rows, experts] the expert of each replica, its number among those of its expert, and their counts.

    One replica for each expert, and then one by one for that with the most load a replica.
    """
    rows, experts = load.shape
    row = np.arange(rows)
    count = np.ones((rows, experts), np.int64)
    replica_of = np.tile(np.arange(num_replicas), (rows, 1))
    number = np.zeros((rows, num_replicas), np.int64)
    each = load.copy()
    for replica in range(experts, num_replicas):
        chosen = np.argmax(each, axis=1)
        replica_of[:, replica] = chosen
        number[:, replica] = count[row, chosen]
        count[row, chosen] += 1
        each[row, chosen] = load[row, chosen] / count[row, chosen].astype(load.dtype)
    return replica_of, number, count


def _check(weight: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    numbers = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, value in numbers.items():
        check_count(name, value)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape [num_layers, num_experts], got shape {weight.shape}")
    if not np.all((weight >= 0) & (weight < np.inf)):
        layer, expert = np.argwhere(~((weight >= 0) & (weight < np.inf)))[0]
        raise ValueError(
            f"weight must be finite and not negative, got {weight[layer, expert]} for expert {expert} of layer {layer}"
        )
    num_experts = weight.shape[1]
    if num_replicas < num_experts:
        raise ValueError(f"num_replicas must be at least the {num_experts} experts of weight, got {num_replicas}")
    if num_replicas % num_gpus:
        raise ValueError(f"num_replicas must be a multiple of num_gpus = {num_gpus}, got {num_replicas}")
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide the {num_experts} experts of weight, got {num_groups}")
    if num_gpus % num_nodes:
        raise ValueError(f"num_nodes must divide num_gpus = {num_gpus}, got {num_nodes}")
