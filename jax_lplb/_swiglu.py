"""SwiGLU experts: two products of rows with the weights of their experts, and a gate between them.

Differentiated by hand, for the order of what takes long. XLA's scheduler takes the kernels of these products for free,
and would not know what to do beside a collective and what not.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lplb import _ffi
from jax_lplb._grouped_matmul import GroupedMatmul, grouped_matmul, grouped_matmul_transposed, grouped_outer


def swiglu(
    weights: dict[str, jax.Array], rows: jax.Array, group_sizes: jax.Array, implementation: GroupedMatmul | None
) -> jax.Array:
    """Rows [n, d_model], sorted by expert, through their experts: down(silu(gate) * up).

    Args:
      weights: `w_in` [experts, d_model, 2 * d_expert], gate and up side by side; `w_out` [experts, d_expert, d_model].
      rows: those beyond the experts' may give anything, and have any gradient.
      group_sizes: int32 [experts], rows of each.
      implementation: as of `grouped_matmul`.

    Returns:
      [n, d_model], in the dtype of the rows.
    """
    axes = _ffi.varying(rows, group_sizes, *jax.tree.leaves(weights))
    return _swiglu(*jax.tree.map(lambda x: _ffi.vary(x, axes), (weights, rows, group_sizes)), implementation)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _swiglu(
    weights: dict[str, jax.Array], rows: jax.Array, group_sizes: jax.Array, implementation: GroupedMatmul | None
) -> jax.Array:
    return _swiglu_forward(weights, rows, group_sizes, implementation)[0]


def _swiglu_forward(
    weights: dict[str, jax.Array], rows: jax.Array, group_sizes: jax.Array, implementation: GroupedMatmul | None
) -> Any:
    # Or XLA would do once more, for the backward pass, what made the rows, and slower: gathers within transpositions.
    rows = lax.optimization_barrier(rows)
    gate_and_up = grouped_matmul(rows, weights["w_in"], group_sizes, implementation)
    hidden = lax.optimization_barrier(_gated(_of_groups(gate_and_up, group_sizes)))
    result = grouped_matmul(hidden, weights["w_out"], group_sizes, implementation)
    return result, (weights, rows, group_sizes, gate_and_up, hidden)


def _swiglu_backward(implementation: GroupedMatmul | None, residuals: Any, gradient: jax.Array) -> Any:
    weights, rows, group_sizes, gate_and_up, hidden = residuals

    def products(left: jax.Array, of_result: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_weights = grouped_outer(left, of_result, group_sizes, implementation)
        of_left = grouped_matmul_transposed(of_result, right, group_sizes, implementation)
        # Copies' gradients then travel beside what comes next, not beside the second of these products: kernels that
        # keep every multiprocessor would have to wait for a collective that holds some of them.
        of_weights, of_left = lax.optimization_barrier((of_weights, of_left))
        return of_weights, of_left

    of_out, of_hidden = products(hidden, gradient, weights["w_out"])
    (of_gate_and_up,) = jax.vjp(_gated, _of_groups(gate_and_up, group_sizes))[1](_of_groups(of_hidden, group_sizes))
    of_in, of_rows = products(rows, of_gate_and_up, weights["w_in"])
    return {"w_in": of_in, "w_out": of_out}, of_rows, None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def dense_swiglu(w_in: jax.Array, w_out: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows [n, d_model] through one expert, in plain JAX: w_in [d_model, 2 * d_expert], w_out [d_expert, d_model]."""
    return jnp.dot(_gated(jnp.dot(rows, w_in)), w_out)


def _gated(gate_and_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_and_up, 2, axis=1)
    return jax.nn.silu(gate) * up


def _of_groups(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Zeros for what is beyond the groups: it may be no numbers, and 0 times that is not 0."""
    within = jnp.arange(len(rows), dtype=jnp.int32)[:, None] < jnp.sum(group_sizes, dtype=jnp.int32)
    return jnp.where(within, rows, 0)
