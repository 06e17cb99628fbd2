"""Times of the grouped matmuls of `MoE` by their tiles, on one Hopper GPU: `python benchmarks/tiles.py`.

The products of benchmarks/layer.py on the busiest of four ranks: `in` is 2048 -> 2 * 1408, `out` 1408 -> 2048, of 16
experts and two more slots for copies. `forward` is tokamax's kernel, of `stages` in its pipeline and of grid order
`order` (minor dimension, width of its tiles); `transposed` and `outer`, the gradients of rows and of weights, are
JAX's, whose `order` is `grid_block_n`. Loads: even, in 16 slots and with two empty ones more, and log-normal ones,
balanced. Times are taken as that benchmark takes its own.
"""

import argparse
import importlib
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import layer
import numpy as np

import jax_lplb as lplb
from jax_lplb import _dispatch
from jax_lplb._grouped_matmul import _TILES, _kernels

RANKS, TOKENS, D_MODEL, D_EXPERT = 4, 8192, 2048, 1408
CHOICES = {  # stages and order; among them those that `MoE` takes
    "forward": [(4, (0, 1)), (3, (0, 1)), (2, (0, 1)), (3, (1, 4))],
    "transposed": [(4, 8), (6, 8), (5, 4)],
    "outer": [(4, 4), (5, 4), (6, 4)],
}


def group_sizes() -> dict[str, np.ndarray]:
    """int32 [slots], of the rank with most rows, for each load."""
    jax.config.update("jax_num_cpu_devices", RANKS)
    mesh = jax.make_mesh(
        (RANKS,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:RANKS]
    )
    placement = lplb.Placement.per_batch(
        num_experts=layer.EXPERTS, num_ranks=RANKS, redundants_per_rank=layer.REDUNDANTS
    )
    total, sizes = TOKENS * RANKS, {}
    for load in (layer.even(total), layer.lognormal(total, 0.6), layer.lognormal(total, 1.0)):
        slots = layer.slots_of(load.ids, placement, mesh)
        of_ranks = np.bincount(slots.ravel(), minlength=placement.num_physical).reshape(RANKS, -1)
        sizes[load.name] = of_ranks[of_ranks.sum(axis=1).argmax()].astype(np.int32)
    return {"even, no other slots": sizes["even"][: layer.EXPERTS // RANKS], **sizes}


def product(kernel: str, stages: int, order: Any) -> Callable[..., jax.Array]:
    """Of rows, weights or other rows, and group sizes."""
    if kernel == "forward":
        gpu = importlib.import_module("tokamax.ops.gpu")
        minor, width = order
        tiles = gpu.PallasMosaicRaggedDotConfig(
            num_stages=stages, split_k=1, persistent=False, grid_minor_dim=minor, grid_tile_width=width, **_TILES
        )
        tokamax = importlib.import_module("tokamax")
        choice = (gpu.PallasMosaicRaggedDot(config=tiles),)
        return lambda rows, weights, sizes: tokamax.ragged_dot(rows, weights, sizes, implementation=choice)
    options = {**_TILES, "max_concurrent_steps": stages, "grid_block_n": order}
    if kernel == "transposed":
        ragged_dot = _kernels("ragged_dot_mgpu").ragged_dot
        return lambda rows, weights, sizes: ragged_dot(rows, weights, group_sizes=sizes, transpose_rhs=True, **options)
    outer = _kernels("transposed_ragged_dot_mgpu").transposed_ragged_dot
    return lambda rows, others, sizes: outer(rows, others, group_sizes=sizes, **options)


def passes() -> list[tuple[dict[str, Any], layer.Pass, float]]:
    """Row, what runs, and its floating-point operations."""
    found, mean = [], TOKENS * layer.TOP_K
    for load, sizes in group_sizes().items():
        room = mean if len(sizes) * RANKS == layer.EXPERTS else _dispatch.capacity_of(1.01 * mean, mean * RANKS)
        rows, gate_and_up, hidden, result, w_in, w_out = layer.product_operands(room, len(sizes), D_MODEL, D_EXPERT)
        for name, (left, right, weights) in {"in": (rows, gate_and_up, w_in), "out": (hidden, result, w_out)}.items():
            operands = {"forward": (left, weights), "transposed": (right, weights), "outer": (left, right)}
            for kernel, choices in CHOICES.items():
                for stages, order in choices:
                    key = (kernel, name, len(sizes), stages, order)
                    one = layer.Pass(
                        key, jax.jit(product(kernel, stages, order)), [*operands[kernel], jnp.asarray(sizes)]
                    )
                    row = {"bench": "tiles", "kernel": kernel, "product": name, "load": load}
                    row |= {"stages": stages, "order": str(order)}
                    found.append((row, one, 2.0 * weights[0].size * int(sizes.sum())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/tiles.json"))
    args = parser.parse_args()
    found = passes()
    runner = layer.Runner(jax.make_mesh((1,), ("ep",)), D_MODEL, D_EXPERT, {})
    runner.compile([one for _, one, _ in found])
    times = layer.times_us({i: partial(runner.run, one) for i, (_, one, _) in enumerate(found)}, args.repeats)
    rows = []
    for i, (row, _, operations) in enumerate(found):
        statistics = common.statistics(times[i])
        rows.append({**row, **statistics, "tflops": round(operations / statistics["median_us"] / 1e6)})
    common.write(args.out, rows)


if __name__ == "__main__":
    main()
