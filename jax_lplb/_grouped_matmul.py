"""Matrix products of rows with the weights of their groups, by libraries' kernels.

They are not differentiated: tokamax's results lose the types by which shard_map tells what varies over the mesh, and a
choice by platform that is differentiated keeps what each of the platforms needs.
"""

import importlib
import importlib.util
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from jax_lplb import _ffi

GroupedMatmul = Literal["tokamax", "ragged_dot"] | Callable[..., jax.Array]
_log = logging.getLogger(__name__)
_importing = threading.Lock()
_TILES = {"block_m": 128, "block_n": 128, "block_k": 64}


def grouped_matmul(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, implementation: GroupedMatmul | None
) -> jax.Array:
    """Rows [n, a], sorted by group, times the weights [groups, a, b] of their groups.

    Rows beyond those of the groups (int32 [groups], their sizes) may give anything, even no numbers.
    """
    return _ragged_dot(rows, weights, group_sizes, ((1,), (1,)), [0], implementation)


def grouped_matmul_transposed(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, implementation: GroupedMatmul | None
) -> jax.Array:
    """Rows [n, b], sorted by group, times the transposed weights [groups, a, b] of their groups; like the former."""
    return _ragged_dot(rows, weights, group_sizes, ((1,), (2,)), [0], implementation)


def grouped_outer(
    rows: jax.Array, others: jax.Array, group_sizes: jax.Array, implementation: GroupedMatmul | None
) -> jax.Array:
    """For each group the sum, over its rows [n, a] and others [n, b], of their outer products: [groups, a, b]."""
    return _ragged_dot(rows, others, group_sizes, ((0,), (0,)), [], implementation)


def _ragged_dot(
    rows: jax.Array,
    other: jax.Array,
    group_sizes: jax.Array,
    contracting: tuple[tuple[int, ...], tuple[int, ...]],
    group_dimensions: list[int],
    implementation: GroupedMatmul | None,
) -> jax.Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracting, ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group_dimensions,
    )

    # Under vmap one after the other: of some axes JAX's own has no batches, nor have others' kernels.
    @jax.custom_batching.sequential_vmap
    def product(rows: jax.Array, other: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return _choose(rows, other, group_sizes, numbers, implementation)

    return product(rows, other, group_sizes)


def _choose(
    rows: jax.Array, other: jax.Array, group_sizes: jax.Array, numbers: Any, implementation: GroupedMatmul | None
) -> jax.Array:
    def run(function: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
        return _ffi.vary(function(*operands, numbers), _ffi.varying(rows))

    if callable(implementation):
        return run(implementation, rows, other, group_sizes)
    if implementation == "ragged_dot" or (implementation is None and not has_tokamax()):
        return run(lax.ragged_dot_general, rows, other, group_sizes)
    if implementation == "tokamax":
        return run(_tokamax, rows, other, group_sizes)
    return lax.platform_dependent(
        rows, other, group_sizes, default=partial(run, lax.ragged_dot_general), cuda=partial(run, _tokamax)
    )


def _tokamax(rows: jax.Array, other: jax.Array, group_sizes: jax.Array, numbers: Any) -> jax.Array:
    """Tokamax's `ragged_dot_general`, but on Hopper with choices of our own, for what training takes: bfloat16."""
    tokamax = importlib.import_module("tokamax")
    if not getattr(jax.devices()[0], "compute_capability", "").startswith("9."):
        return tokamax.ragged_dot_general(rows, other, group_sizes, numbers)
    tileable = rows.dtype == jnp.bfloat16 and all(size % 128 == 0 for size in (rows.shape[1], *other.shape[1:]))
    if not numbers.rhs_group_dimensions:
        # tokamax 0.0.17's kernel for sums over groups' rows is wrong on Hopper with jax 0.11: it overtakes its loads.
        if not tileable:
            return lax.ragged_dot_general(rows, other, group_sizes, numbers)
        kernel = _kernels("transposed_ragged_dot_mgpu").transposed_ragged_dot
        return kernel(rows, other, group_sizes=group_sizes, grid_block_n=4, max_concurrent_steps=5, **_TILES)
    if tileable and numbers.dot_dimension_numbers[0][1] == (2,):
        # tokamax would transpose the weights in memory first.
        kernel = _kernels("ragged_dot_mgpu").ragged_dot
        pipeline = {"grid_block_n": 8, "max_concurrent_steps": 4}
        return kernel(rows, other, group_sizes=group_sizes, transpose_rhs=True, **pipeline, **_TILES)
    choice: Any = None
    if tileable and rows.shape[0] >= 128 * len(group_sizes):
        try:
            gpu = importlib.import_module("tokamax.ops.gpu")
        except ImportError:
            _log.info("MoE: without jax-triton, tokamax does not offer a choice of tiles: matmuls take twice as long")
        else:  # twice as fast as the tiles that it takes where it was not tuned
            # With more stages, a multiprocessor has no room for a second block, to compute while the first one stores.
            tiles = gpu.PallasMosaicRaggedDotConfig(
                num_stages=3, split_k=1, persistent=False, grid_minor_dim=0, **_TILES
            )
            choice = (gpu.PallasMosaicRaggedDot(config=tiles), "mosaic", "xla")
    return tokamax.ragged_dot_general(rows, other, group_sizes, numbers, implementation=choice)


def _kernels(name: str) -> Any:
    # They import JAX's test utilities, which would take SIGTERM from the program, and abort it 3 s after one.
    with _importing, mock.patch("jax._src.util.install_failure_signal_handler", create=True):
        return importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}")


def has_tokamax() -> bool:
    """Whether it is installed; it is imported where it is used."""
    return importlib.util.find_spec("tokamax") is not None
