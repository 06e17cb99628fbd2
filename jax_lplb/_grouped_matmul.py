"""Matrix products of rows with the weights of their groups: by which kernels.

They are not differentiated: kernels' results lose the types by which shard_map tells what varies over the mesh, and a
choice by platform that is differentiated keeps what each of the platforms needs.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
from jax import lax

from jax_lplb import _ffi

GroupedMatmul = Literal["tokamax", "ragged_dot"] | Callable[..., jax.Array]


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
    if implementation == "ragged_dot":
        return run(lax.ragged_dot_general, rows, other, group_sizes)
    if implementation == "tokamax":
        return run(_tokamax, rows, other, group_sizes)
    return lax.platform_dependent(
        rows, other, group_sizes, default=partial(run, lax.ragged_dot_general), cuda=partial(run, _on_gpus)
    )


def _on_gpus(rows: jax.Array, other: jax.Array, group_sizes: jax.Array, numbers: Any) -> jax.Array:
    """By what is fastest there of what can take these."""
    if has_hopper():
        kernels = importlib.import_module("jax_lplb._hopper_matmul")
        if kernels.fit(rows, other):
            if not numbers.rhs_group_dimensions:
                return kernels.grouped_outer(rows, other, group_sizes)
            is_transposed = numbers.dot_dimension_numbers[0][1] == (2,)
            return kernels.grouped_matmul(rows, other, group_sizes, is_transposed)
    if has_tokamax():
        return _tokamax(rows, other, group_sizes, numbers)
    return lax.ragged_dot_general(rows, other, group_sizes, numbers)


def _tokamax(rows: jax.Array, other: jax.Array, group_sizes: jax.Array, numbers: Any) -> jax.Array:
    # tokamax 0.0.17's kernel for sums over groups' rows is wrong on Hopper with jax 0.11: it overtakes its loads.
    if has_hopper() and not numbers.rhs_group_dimensions:
        return lax.ragged_dot_general(rows, other, group_sizes, numbers)
    return importlib.import_module("tokamax").ragged_dot_general(rows, other, group_sizes, numbers)


def has_hopper() -> bool:
    """Whether the GPUs of this process are of that generation."""
    try:
        return jax.local_devices(backend="cuda")[0].compute_capability.startswith("9.")
    except RuntimeError:  # no such platform here
        return False


def has_tokamax() -> bool:
    """Whether it is installed; it is imported where it is used."""
    return importlib.util.find_spec("tokamax") is not None
