"""EPLB: its published example, and its rules, applied one by one."""

import numpy as np
import pytest

from jax_lplb import eplb

WEIGHT = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]


def test_published_example():
    """https://github.com/deepseek-ai/EPLB: two layers of 12 experts in 4 groups, on 2 nodes of 4 GPUs each."""
    phy2log, log2phy, logcnt = eplb.rebalance_experts(np.array(WEIGHT), 16, 4, 2, 8)
    assert phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert logcnt.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert log2phy.shape == (2, 12, 5)
    assert log2phy[0, 5].tolist() == [0, 2, -1, -1, -1]


def pack(weights: list, num_packs: int) -> list[list[int]]:
    """Items of each pack: the heaviest item first, to the lightest pack that has room."""
    if len(weights) == num_packs:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    sums = [np.float32(0)] * num_packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        pack = min((p for p in range(num_packs) if len(packs[p]) < len(weights) // num_packs), key=lambda p: sums[p])
        packs[pack].append(item)
        sums[pack] += weights[item]
    return packs


def place_layer(weights: list, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> list[tuple]:
    """(expert, number of its replica) of each slot of a layer."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(weights) // num_groups
    groups = [list(range(group * size, (group + 1) * size)) for group in range(num_groups)]
    slots = []
    for node in pack([np.sum([weights[e] for e in group], dtype=np.float32) for group in groups], num_nodes):
        experts = [expert for group in node for expert in groups[group]]
        replicas = [(expert, 0) for expert in experts]
        count = dict.fromkeys(experts, 1)
        while len(replicas) < num_replicas // num_nodes:
            heaviest = max(experts, key=lambda expert: weights[expert] / np.float32(count[expert]))
            replicas.append((heaviest, count[heaviest]))
            count[heaviest] += 1
        each = [weights[expert] / np.float32(count[expert]) for expert, _ in replicas]
        slots += [replicas[item] for rank in pack(each, num_gpus // num_nodes) for item in rank]
    return slots


def test_rules(rng):
    """1,000 random cases; integer weights below 2**24 / 256, so that sums are exact in any order, and ties occur."""
    for _ in range(1000):
        num_nodes, ranks_of_node, groups_of_node = rng.integers(1, 4, 3).tolist()
        num_gpus, num_groups = num_nodes * ranks_of_node, num_nodes * groups_of_node
        if rng.random() < 0.2:
            num_groups += 1  # mostly no multiple of the nodes: the global policy
        num_experts = num_groups * int(rng.integers(1, 5))
        num_replicas = -(-num_experts // num_gpus) * num_gpus + num_gpus * int(rng.integers(0, 4))
        weight = np.rint(rng.lognormal(0, rng.uniform(0, 3), (2, num_experts)) * 20).clip(0, 60_000)
        phy2log, log2phy, logcnt = eplb.rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus)
        for layer in range(2):
            slots = place_layer(list(weight[layer].astype(np.float32)), num_replicas, num_groups, num_nodes, num_gpus)
            assert phy2log[layer].tolist() == [expert for expert, _ in slots]
            expected = np.full((num_experts, num_replicas - num_experts + 1), -1)
            for slot, (expert, number) in enumerate(slots):
                expected[expert, number] = slot
            np.testing.assert_array_equal(log2phy[layer], expected)
            np.testing.assert_array_equal(logcnt[layer], np.bincount(phy2log[layer], minlength=num_experts))


def test_nodes_keep_their_groups(rng):
    weight = rng.lognormal(0, 1, (3, 64))
    phy2log, _, _ = eplb.rebalance_experts(weight, 96, 8, 4, 16)
    for layer in phy2log.reshape(3, 4, 24):
        groups = [set((node // 8).tolist()) for node in layer]
        assert [len(of_node) for of_node in groups] == [2] * 4
        assert set.union(*groups) == set(range(8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_replicas": 10}, ValueError, "num_replicas must be at least the 12 experts"),
        ({"num_replicas": 20}, ValueError, "num_replicas must be a multiple of num_gpus = 8, got 20"),
        ({"num_replicas": 16.0}, TypeError, "num_replicas must be an integer"),
        ({"num_groups": 5}, ValueError, "num_groups must divide the 12 experts"),
        ({"num_nodes": 3}, ValueError, "num_nodes must divide num_gpus = 8, got 3"),
        ({"num_gpus": 0}, ValueError, "num_gpus must be at least 1"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \[num_layers, num_experts\], got shape \(12,\)"),
        ({"weight": np.full((1, 12), np.nan)}, ValueError, "weight must be finite and not negative, got nan"),
        ({"weight": -np.ones((1, 12))}, ValueError, "got -1.0 for expert 0 of layer 0"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"weight": WEIGHT, "num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8}
    with pytest.raises(error, match=message):
        eplb.rebalance_experts(**(arguments | change))
