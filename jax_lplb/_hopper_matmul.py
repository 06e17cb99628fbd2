"""Grouped matmuls on Hopper GPUs: kernels for Pallas' Mosaic GPU.

A block computes one tile, as in tokamax's kernel (https://github.com/openxla/tokamax), and leaves room for a second one
on its multiprocessor, which computes while the first one stores. Where the groups' sizes are no multiples of a tile's,
the ends of groups are what costs: see `grouped_matmul` and `grouped_outer` for what these do about it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 128  # rows and columns of a tile
_STEP = 64  # of the dimension that is added up, at once
_STAGES = 3  # steps whose operands are in shared memory; with more there is no room for a second block
_ALIGNED = 8  # what is loaded begins at a multiple of so many rows
_SWIZZLE = 128  # bytes


def fit(rows: jax.Array, other: jax.Array) -> bool:
    """Whether the kernels can take these, as `grouped_matmul` or `grouped_outer` does."""
    is_half = rows.dtype == other.dtype and rows.dtype in (jnp.bfloat16, jnp.float16)
    has_rows = rows.shape[0] >= TILE and rows.shape[0] % _ALIGNED == 0
    return is_half and has_rows and all(n % TILE == 0 for n in (rows.shape[1], *other.shape[1:]))


def grouped_matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, is_transposed: bool) -> jax.Array:
    """Rows [n, a], sorted by group, times the weights [groups, a, b] of their groups, or transposed [groups, b, a].

    In a tile that reaches beyond its group, all other rows are computed for nothing. So where a group has at most half
    a tile left, a tile of half the rows computes them; not with transposed weights, where that made the kernel slower
    by more.

    Args:
      rows: bfloat16 or float16; n a multiple of 8, at least 128, and a and b multiples of 128.
      weights: of the same dtype.
      group_sizes: int32 [groups].
      is_transposed: whether the weights are.

    Returns:
      [n, b], added up in float32. Rows beyond those of the groups are not written.
    """
    (num_rows, depth), groups = rows.shape, len(group_sizes)
    columns = weights.shape[1 if is_transposed else 2]
    num_tiles = (pl.cdiv(num_rows, TILE) + groups - 1, columns // TILE)

    def kernel(all_rows: Any, all_weights: Any, tiles: Any, results: Any) -> None:
        tile, column = plgpu.planar_snake(lax.axis_index("tile"), num_tiles, 0, 1)
        group, start, first, size = (tiles[i, tile] for i in range(4))
        start = pl.multiple_of(start, _ALIGNED)

        def multiply(acc: Any, _: Any, of_rows: Any, of_weights: Any) -> None:
            plgpu.wgmma(acc, of_rows, of_weights.transpose((1, 0)) if is_transposed else of_weights)

        def compute(height: int) -> None:
            blocks = [_block((pl.Element(height), _STEP), lambda k: (start, k), rows.dtype)]
            if is_transposed:
                blocks.append(_block((TILE, _STEP), lambda k: (column, k), rows.dtype))
            else:
                blocks.append(_block((_STEP, TILE), lambda k: (k, column), rows.dtype))
            result = _added_up(height, depth // _STEP, blocks, [all_rows, all_weights.at[group]], multiply)

            def copy(tile: Any) -> None:
                # A copy has a fixed number of rows: there is one for each power of two in what is to be copied.
                row, length = first, height
                while length:

                    @pl.when(size & length != 0)
                    def _(row: Any = row, length: int = length) -> None:
                        to = results.at[pl.ds(start + row, length), pl.ds(column * TILE, TILE)]
                        plgpu.copy_smem_to_gmem(tile.at[pl.ds(row, length)], to, commit_group=False)

                    row, length = row + (size & length), length // 2

            _store(result.astype(rows.dtype), 1, copy)

        end = first + size
        if is_transposed:
            pl.when(size > 0)(partial(compute, TILE))
        else:
            pl.when(end > TILE // 2)(partial(compute, TILE))
            pl.when((size > 0) & (end <= TILE // 2))(partial(compute, TILE // 2))

    result = jax.ShapeDtypeStruct((num_rows, columns), rows.dtype)
    return _call(kernel, result, math.prod(num_tiles), rows, weights, _tiles(group_sizes, num_tiles[0]))


def _tiles(group_sizes: jax.Array, num_tiles: int) -> jax.Array:
    """Of each tile: its group, the row where it starts, the first row from there that its group has, and how many.

    int32 [4, tiles]; those that no group needs have no rows.
    """
    starts, aligned, ends = _bounds(group_sizes)
    of_group = jnp.where(group_sizes > 0, (ends - aligned + TILE - 1) // TILE, 0)
    last = jnp.cumulative_sum(of_group, dtype=jnp.int32)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    group = jnp.searchsorted(last[:-1], tile, side="right", method="compare_all")
    start = aligned[group] + TILE * (tile - (last - of_group)[group])
    first, end = jnp.maximum(start, starts[group]), jnp.minimum(start + TILE, ends[group])
    return jnp.stack([group.astype(jnp.int32), start, first - start, jnp.maximum(end - first, 0)])


def _bounds(group_sizes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each group: its first row, the one from which on it is loaded, and the row behind its last one."""
    ends = jnp.cumulative_sum(group_sizes, dtype=jnp.int32)
    starts = ends - group_sizes
    return starts, starts // _ALIGNED * _ALIGNED, ends


def grouped_outer(rows: jax.Array, others: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """For each group the sum, over its rows [n, a] and others [n, b], of their outer products.

    What a step loads begins at a multiple of 8 rows, not of its own length, so that fewer rows of other groups come
    with those of a group; they are set to zero. The largest groups come first, so that none is left at the end.

    Args:
      rows: bfloat16 or float16, sorted by group; n a multiple of 8, at least 128, and a and b multiples of 128.
      others: of the same dtype; numbers, beyond the groups as well.
      group_sizes: int32 [groups].

    Returns:
      [groups, a, b], added up in float32.
    """
    groups, num_tiles = len(group_sizes), (rows.shape[1] // TILE, others.shape[1] // TILE)

    def kernel(all_rows: Any, all_others: Any, of_groups: Any, results: Any) -> None:
        block, of_a_group = lax.axis_index("tile"), math.prod(num_tiles)
        group, start, first, end = (of_groups[i, lax.div(block, of_a_group)] for i in range(4))
        row, column = plgpu.planar_snake(lax.rem(block, of_a_group), num_tiles, 0, 1)
        start = pl.multiple_of(start, _ALIGNED)

        def multiply(acc: Any, step: Any, of_rows: Any, of_others: Any) -> None:
            @pl.when((step * _STEP < first) | ((step + 1) * _STEP > end))
            def _() -> None:
                row_of_step = plgpu.broadcasted_iota(jnp.int32, (_STEP, TILE), 0, layout=plgpu.Layout.WGMMA)
                at = step * _STEP + row_of_step
                values = of_rows[...]
                of_rows[...] = jnp.where((at >= first) & (at < end), values, jnp.zeros_like(values))
                plgpu.commit_smem()

            plgpu.wgmma(acc, of_rows.transpose((1, 0)), of_others)

        blocks = [
            _block((pl.Element(_STEP), TILE), lambda k: (start + k * _STEP, row), rows.dtype),
            _block((pl.Element(_STEP), TILE), lambda k: (start + k * _STEP, column), rows.dtype),
        ]
        result = _added_up(TILE, pl.cdiv(end, _STEP), blocks, [all_rows, all_others], multiply)
        to = results.at[group, pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)]
        _store(result.astype(rows.dtype), 8, lambda tile: plgpu.copy_smem_to_gmem(tile, to, commit_group=False))

    starts, aligned, ends = _bounds(group_sizes)
    ends_in_steps = jnp.where(group_sizes > 0, ends - aligned, 0)
    of_groups = jnp.stack([jnp.arange(groups, dtype=jnp.int32), aligned, starts - aligned, ends_in_steps])
    of_groups = of_groups[:, jnp.argsort(group_sizes, descending=True)]
    result = jax.ShapeDtypeStruct((groups, rows.shape[1], others.shape[1]), rows.dtype)
    return _call(kernel, result, groups * math.prod(num_tiles), rows, others, of_groups)


def _call(kernel: Callable[..., None], result: jax.ShapeDtypeStruct, num_blocks: int, *operands: jax.Array) -> Any:
    # Barriers are where `plgpu.commit_smem` is; with those that are put everywhere kernels take longer. What a thread
    # writes to shared memory no other one has read or written before that barrier.
    options = plgpu.CompilerParams(unsafe_no_auto_barriers=True)
    with jax.enable_x64(False):  # JAX's pipelines count in 32 bits
        return plgpu.kernel(kernel, out_type=result, grid=(num_blocks,), grid_names=("tile",), compiler_params=options)(
            *operands
        )


def _added_up(
    height: int, steps: Any, blocks: list[plgpu.BlockSpec], operands: list[Any], multiply: Callable[..., None]
) -> jax.Array:
    """The tile [height, TILE], float32, to which `multiply` adds the blocks of each step; zeros where there is none."""

    def add_up(acc: Any) -> jax.Array:
        def add(indices: tuple[Any], *of_step: Any) -> None:
            multiply(acc, indices[0], *of_step)
            plgpu.wgmma_wait(1)  # the step before is over, and its memory free for the next load

        @pl.when(steps > 0)
        def _() -> None:
            plgpu.emit_pipeline(add, grid=(steps,), in_specs=blocks, max_concurrent_steps=_STAGES)(*operands)

        return acc[...]

    return pl.run_scoped(add_up, plgpu.ACC((height, TILE)))


def _store(tile: jax.Array, tiled_rows: int, copy: Callable[[Any], None]) -> None:
    """Lets `copy` begin copies from shared memory, where the tile then is; any of its rows, with `tiled_rows` 1."""

    @partial(pl.run_scoped, shared=plgpu.SMEM(tile.shape, tile.dtype, transforms=_transforms(tile.dtype, tiled_rows)))
    def _(shared: Any) -> None:
        shared[...] = tile
        plgpu.commit_smem()
        copy(shared)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _block(shape: tuple[Any, ...], index_map: Callable[..., Any], dtype: Any) -> plgpu.BlockSpec:
    return plgpu.BlockSpec(shape, index_map, transforms=_transforms(dtype, 8), delay_release=1)


def _transforms(dtype: Any, tiled_rows: int) -> tuple[Any, ...]:
    """How a block lies in shared memory, so that what is accessed at once is in different banks."""
    tiling: Any = plgpu.TilingTransform  # abstract, as mypy sees them
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((tiled_rows, _SWIZZLE // dtype.itemsize)), swizzle(_SWIZZLE)
