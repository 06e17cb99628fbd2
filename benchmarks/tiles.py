"""Times of the grouped matmuls of `MoE` beside libraries' kernels, on one Hopper GPU: `python benchmarks/tiles.py`.

The products of benchmarks/layer.py on the busiest of four ranks: `in` is 2048 -> 2 * 1408, `out` 1408 -> 2048, of 16
experts and two more slots for copies. `forward` is rows times weights, `transposed` and `outer` are the gradients of
rows and of weights. Libraries' are tokamax's kernel for the first and JAX's for the others, with the tiles and stages
that were the fastest of those tried. Loads: even, in 16 slots and with two empty ones more, and log-normal ones,
balanced. Times are taken as that benchmark takes its own. Needs tokamax and jax-triton.
"""

import argparse
import importlib
import itertools
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
from jax_lplb import _dispatch, _hopper_matmul

RANKS, TOKENS, D_MODEL, D_EXPERT = 4, 8192, 2048, 1408
KERNELS = ("forward", "transposed", "outer")
TILES = {"block_m": 128, "block_n": 128, "block_k": 64}


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


def ours(kernel: str) -> Callable[..., jax.Array]:
    """Of rows, weights or other rows, and group sizes."""
    if kernel == "outer":
        return _hopper_matmul.grouped_outer
    return partial(_hopper_matmul.grouped_matmul, is_transposed=kernel == "transposed")


def libraries(kernel: str) -> Callable[..., jax.Array]:
    """Likewise."""
    if kernel == "forward":
        gpu = importlib.import_module("tokamax.ops.gpu")
        tiles = gpu.PallasMosaicRaggedDotConfig(num_stages=3, split_k=1, persistent=False, grid_minor_dim=0, **TILES)
        choice = (gpu.PallasMosaicRaggedDot(config=tiles),)
        return partial(importlib.import_module("tokamax").ragged_dot, implementation=choice)
    name, options = {
        "transposed": ("ragged_dot", {"transpose_rhs": True, "max_concurrent_steps": 4, "grid_block_n": 8}),
        "outer": ("transposed_ragged_dot", {"max_concurrent_steps": 5, "grid_block_n": 4}),
    }[kernel]
    function = getattr(importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}_mgpu"), name)
    return lambda rows, other, sizes: function(rows, other, group_sizes=sizes, **options, **TILES)


def passes() -> list[tuple[dict[str, Any], layer.Pass, float]]:
    """Row, what runs, and its floating-point operations."""
    found, mean = [], TOKENS * layer.TOP_K
    for load, sizes in group_sizes().items():
        room = mean if len(sizes) * RANKS == layer.EXPERTS else _dispatch.capacity_of(1.01 * mean, mean * RANKS)
        rows, gate_and_up, hidden, result, w_in, w_out = layer.product_operands(room, len(sizes), D_MODEL, D_EXPERT)
        for name, (left, right, weights) in {"in": (rows, gate_and_up, w_in), "out": (hidden, result, w_out)}.items():
            operands = {"forward": (left, weights), "transposed": (right, weights), "outer": (left, right)}
            for kernel, by in itertools.product(KERNELS, (libraries, ours)):
                key = (kernel, name, len(sizes), by.__name__)
                one = layer.Pass(key, jax.jit(by(kernel)), [*operands[kernel], jnp.asarray(sizes)])
                row = {"bench": "tiles", "kernel": kernel, "product": name, "load": load, "by": by.__name__}
                found.append((row, one, 2.0 * weights[0].size * int(sizes.sum())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
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
