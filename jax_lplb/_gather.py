"""Rows gathered by index arrays that are each other's inverses: in the backward pass rows are gathered too.

No scatter of rows, whose order of additions would show on GPUs.
"""

from typing import Any

import jax
import jax.numpy as jnp


def gather(rows: jax.Array, source: jax.Array) -> jax.Array:
    """rows[source], with zeros where that is out of range."""
    return rows.at[source].get(mode="fill", fill_value=0)


def inverse(target: jax.Array, size: int) -> jax.Array:
    """int32 [size]: what has each target; that is len(target) where nothing has. Targets from `size` on are none."""
    numbers = jnp.arange(len(target), dtype=jnp.int32)
    target = jnp.where(target < size, target, size + numbers)
    nobody = jnp.full((size,), len(target), jnp.int32)
    return nobody.at[target].set(numbers, mode="drop", unique_indices=True)


@jax.custom_vjp
def permute(rows: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """`gather(rows, source)`, where `target` is the inverse of `source`."""
    return gather(rows, source)


permute.defvjp(
    lambda rows, source, target: (permute(rows, source, target), target),
    lambda target, gradient: (gather(gradient, target), None, None),
)


@jax.custom_vjp
def tokens_to_cells(
    tokens: jax.Array, pair_of_cell: jax.Array, cell_of_pair: jax.Array, gathered: jax.Array | None = None
) -> jax.Array:
    """The token of each cell, zeros where there is none.

    Pairs are tokens' choices, equally many of each token. `gathered`: the result, where it is there already.
    """
    if gathered is not None:
        return gathered
    return gather(tokens, pair_of_cell // (len(cell_of_pair) // len(tokens)))


def _tokens_to_cells_forward(tokens: jax.Array, pair_of_cell: jax.Array, cell_of_pair: jax.Array, gathered: Any) -> Any:
    return tokens_to_cells(tokens, pair_of_cell, cell_of_pair, gathered), (cell_of_pair, tokens)


def _tokens_to_cells_backward(residuals: Any, gradient: jax.Array) -> Any:
    cell_of_pair, tokens = residuals
    of_pairs = gather(gradient, cell_of_pair)
    of_tokens = jnp.sum(of_pairs.reshape(len(tokens), -1, tokens.shape[1]), axis=1, dtype=jnp.float32)
    return of_tokens.astype(tokens.dtype), None, None, None


tokens_to_cells.defvjp(_tokens_to_cells_forward, _tokens_to_cells_backward)


@jax.custom_vjp
def weighted_sum(gates: jax.Array, cells: jax.Array, cell_of_pair: jax.Array, pair_of_cell: jax.Array) -> jax.Array:
    """float32: for each token the sum of its pairs' cells times its gates; a pair without a cell adds nothing."""
    of_pairs = gather(cells, cell_of_pair).reshape(*gates.shape, -1).astype(jnp.float32)
    has_cell = (cell_of_pair < len(cells)).reshape(gates.shape)  # the gate of padding may be no number
    return jnp.sum(jnp.where(has_cell, gates, 0)[..., None] * of_pairs, axis=1)


def _weighted_sum_forward(*operands: jax.Array) -> Any:
    return weighted_sum(*operands), operands


def _weighted_sum_backward(residuals: Any, gradient: jax.Array) -> Any:
    gates, cells, cell_of_pair, pair_of_cell = residuals
    # All by cells, so that one kernel can do it: their rows are neither gathered by pairs again nor kept in float32.
    of_token = gather(gradient, pair_of_cell // gates.shape[1])
    gate = gather(gates.reshape(-1), pair_of_cell)
    of_gate = jnp.sum(cells.astype(jnp.float32) * of_token, axis=1)
    of_gates = gather(of_gate, cell_of_pair).reshape(gates.shape)
    return of_gates, (gate[:, None] * of_token).astype(cells.dtype), None, None


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)
