"""Tokens to the ranks of their experts and back, by XLA's collectives: all ranks get all tokens."""

import jax
import jax.numpy as jnp
from jax import lax

from jax_lplb._gather import inverse, tokens_to_cells, weighted_sum
from jax_lplb._mesh import AxisName


def dispatch(capacity: int, axis_name: AxisName, tokens: jax.Array, place: jax.Array) -> jax.Array:
    """Rows [capacity, d_model]: the tokens whose places are this rank's, zeros where there is none.

    `place`: int32 [num_tokens, k], rank * capacity + row; negative: none.
    """
    everyones = lax.all_gather(tokens, axis_name, tiled=True)
    row_of_choice, choice_of_row = _rows_here(capacity, axis_name, place)
    return tokens_to_cells(everyones, choice_of_row, row_of_choice)


def combine(capacity: int, axis_name: AxisName, rows: jax.Array, place: jax.Array, gates: jax.Array) -> jax.Array:
    """float32 [num_tokens, d_model]: for each token the sum of its rows, times gates."""
    everyones = lax.all_gather(gates, axis_name, tiled=True)
    row_of_choice, choice_of_row = _rows_here(capacity, axis_name, place)
    parts = weighted_sum(everyones, rows, row_of_choice, choice_of_row)
    return lax.psum_scatter(parts, axis_name, tiled=True)


def _rows_here(capacity: int, axis_name: AxisName, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of all ranks' choices the row here that each is, and for each row its choice; out of range: none."""
    places = lax.all_gather(place.reshape(-1), axis_name, tiled=True)
    row = places - lax.axis_index(axis_name) * capacity
    row = jnp.where((places >= 0) & (row >= 0) & (row < capacity), row, capacity)
    return row, inverse(row, capacity)
