"""Times of the grouped matmuls of `MoE` by their tiles, on one Hopper GPU: `python benchmarks/tiles.py`.

The products of benchmarks/layer.py on the busiest of four ranks: `in` is 2048 -> 2 * 1408, `out` 1408 -> 2048, of 16
experts and two more slots for copies. `forward` is tokamax's kernel, of `stages` in its pipeline and of grid order
`order` (minor dimension, width of its tiles); `transposed` and `outer`, the gradients of rows and of weights, are
JAX's, whose `order` is `grid_block_n`. Loads: even, in 16 slots and with two empty ones more, and log-normal ones,
balanced. All take turns for `--seconds`, in another order each time.
"""

import argparse
import importlib
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import layer
import numpy as np
from rich.progress import Progress

import jax_lplb as lplb
from jax_lplb import _dispatch, _grouped_matmul

RANKS, TOKENS, D_MODEL, D_EXPERT = 4, 8192, 2048, 1408
SHAPES = {"in": (D_MODEL, 2 * D_EXPERT), "out": (D_EXPERT, D_MODEL)}
CHOICES = {  # stages and order; the first are those of before, the second those that `MoE` takes
    "forward": [(4, (0, 1)), (3, (0, 1)), (2, (0, 1)), (3, (1, 4))],
    "transposed": [(4, 8), (6, 8), (5, 4)],
    "outer": [(4, 4), (5, 4), (6, 4)],
}
TILES = {"block_m": 128, "block_n": 128, "block_k": 64}


class Case(NamedTuple):
    row: dict[str, Any]
    function: Any
    arguments: tuple[jax.Array, ...]
    operations: float

    def run(self) -> jax.Array:
        return self.function(*self.arguments)


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
            num_stages=stages, split_k=1, persistent=False, grid_minor_dim=minor, grid_tile_width=width, **TILES
        )
        tokamax = importlib.import_module("tokamax")
        choice = (gpu.PallasMosaicRaggedDot(config=tiles),)
        return lambda rows, weights, sizes: tokamax.ragged_dot(rows, weights, sizes, implementation=choice)
    options = {**TILES, "max_concurrent_steps": stages, "grid_block_n": order}
    if kernel == "transposed":
        ragged_dot = _grouped_matmul._kernels("ragged_dot_mgpu").ragged_dot
        return lambda rows, weights, sizes: ragged_dot(rows, weights, group_sizes=sizes, transpose_rhs=True, **options)
    outer = _grouped_matmul._kernels("transposed_ragged_dot_mgpu").transposed_ragged_dot
    return lambda rows, others, sizes: outer(rows, others, group_sizes=sizes, **options)


def random(*shape: int) -> jax.Array:
    return jax.jit(lambda: jax.random.normal(jax.random.key(sum(shape)), shape, jnp.bfloat16))()


def cases() -> list[Case]:
    found, mean = [], TOKENS * layer.TOP_K
    for load, sizes in group_sizes().items():
        room = mean if len(sizes) * RANKS == layer.EXPERTS else _dispatch.capacity_of(1.01 * mean, mean * RANKS)
        for name, (a, b) in SHAPES.items():
            rows, others, weights = random(room, a), random(room, b), random(len(sizes), a, b)
            operands = {"forward": (rows, weights), "transposed": (others, weights), "outer": (rows, others)}
            for kernel, choices in CHOICES.items():
                arguments = (*operands[kernel], jnp.asarray(sizes))
                for stages, order in choices:
                    row = {"bench": "tiles", "kernel": kernel, "product": name, "load": load}
                    row |= {"stages": stages, "order": str(order)}
                    lowered = jax.jit(product(kernel, stages, order)).lower(*arguments)
                    found.append(Case(row, lowered, arguments, 2.0 * a * b * int(sizes.sum())))
    with ThreadPoolExecutor(16) as pool:
        compiled = pool.map(lambda case: case.function.compile(), found)
        return [case._replace(function=one) for case, one in zip(found, compiled, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--calls", type=int, default=10, help="in a row")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/tiles.json"))
    args = parser.parse_args()
    all_cases = cases()
    times: list[list[float]] = [[] for _ in all_cases]
    rng, end, turn = np.random.default_rng(0), time.monotonic() + args.seconds, 0
    with Progress() as progress:
        task = progress.add_task("turns", total=args.seconds)
        while turn < 3 or time.monotonic() < end:
            for i in rng.permutation(len(all_cases)):
                run = all_cases[i].run
                jax.block_until_ready(run())  # what is still running ends
                begin = time.perf_counter()
                for _ in range(args.calls):
                    result = run()
                jax.block_until_ready(result)
                if turn > 0:  # the clock settles in the first
                    times[i].append((time.perf_counter() - begin) / args.calls * 1e6)
            turn += 1
            progress.update(task, completed=args.seconds - max(0, end - time.monotonic()))
    rows = []
    for case, of_case in zip(all_cases, times, strict=True):
        statistics = common.statistics(of_case)
        rows.append({**case.row, **statistics, "tflops": round(case.operations / statistics["median_us"] / 1e6)})
    common.write(args.out, rows)


if __name__ == "__main__":
    main()
