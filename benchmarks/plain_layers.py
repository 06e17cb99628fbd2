"""Expert-parallel layers in plain JAX, without balancing: baselines for `benchmarks/layer.py`.

  capacity  all_to_all, with room for 1.25 times the mean load of an expert from each rank (GShard, Switch Transformer).
            Choices beyond it are dropped, later tokens' first; what stays empty is computed as zeros.
  gather    all ranks get all tokens (all_gather) and compute those of their experts, in a buffer as large as the batch
            needs; parts of the results are added up by psum_scatter

Both compute what `jax_lplb.flax.MoE` does with a softmax router, from the same parameters with experts in logical
order, but for what is dropped. Their products are the layer's, so that only what is around them differs. Rows are
gathered both ways, also in the backward pass, where a gather's own derivative would add rows up one by one.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lplb._swiglu import swiglu

AXIS = "ep"
CAPACITY_FACTOR = 1.25
Params = dict[str, jax.Array]


def make(
    mode: str, mesh: jax.sharding.Mesh, top_k: int, factor: float, grouped_matmul: Any
) -> Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]:
    """The layer of a mode: from parameters and tokens to the result and the share of choices that are dropped.

    `factor`: of `capacity` its capacity factor, of `gather` the size of the buffer over the mean load of a rank.
    """
    function = partial(LAYERS[mode], top_k, factor, partial(swiglu, implementation=grouped_matmul))
    params = {"router": jax.P(), "w_in": jax.P(AXIS), "w_out": jax.P(AXIS)}
    return jax.shard_map(function, mesh=mesh, in_specs=(params, jax.P(AXIS)), out_specs=(jax.P(AXIS), jax.P()))


def _capacity(
    top_k: int, factor: float, experts: Callable[..., jax.Array], params: Params, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    ids, gates = _route(params["router"], tokens, top_k)
    num_experts, width, ranks = params["router"].shape[1], tokens.shape[1], lax.axis_size(AXIS)
    size = math.ceil(factor * ids.size / num_experts)
    expert = ids.reshape(-1)
    place, load = _sorted_place(expert, num_experts)
    place = place - (jnp.cumsum(load) - load)[expert]  # among the choices of its expert
    cell = jnp.where(place < size, expert * size + place, num_experts * size)
    rows, choice = _to_cells(tokens, cell, num_experts * size)
    rows = lax.all_to_all(rows.reshape(num_experts, size, width), AXIS, 0, 1, tiled=True)
    group_sizes = jnp.full(len(rows), ranks * size, jnp.int32)
    done = experts(_weights(params, tokens.dtype), rows.reshape(-1, width), group_sizes)
    done = lax.all_to_all(done.reshape(rows.shape), AXIS, 1, 0, tiled=True)
    result = _weighted_sum(gates, done.reshape(-1, width), cell, choice)
    return result.astype(tokens.dtype), lax.pmean(jnp.mean(place >= size), AXIS)


def _gather(
    top_k: int, factor: float, experts: Callable[..., jax.Array], params: Params, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    routed = _route(params["router"], tokens, top_k)
    size = math.ceil(factor * routed[0].size / 64) * 64  # tokamax's kernels need a multiple
    everyones, ids, gates = lax.all_gather((tokens, *routed), AXIS, tiled=True)
    num_home = len(params["w_in"])
    expert = ids.reshape(-1) - lax.axis_index(AXIS) * num_home
    expert = jnp.where((expert >= 0) & (expert < num_home), expert, num_home)  # others' come last
    place, group_sizes = _sorted_place(expert, num_home)
    cell = jnp.where(expert < num_home, place, size)
    rows, choice = _to_cells(everyones, cell, size)
    done = experts(_weights(params, tokens.dtype), rows, group_sizes)
    part = _weighted_sum(gates, done, cell, choice).astype(tokens.dtype)
    dropped = jnp.maximum(jnp.sum(group_sizes) - size, 0) / routed[0].size
    return lax.psum_scatter(part, AXIS, tiled=True), lax.pmean(dropped, AXIS)


LAYERS = {"capacity": _capacity, "gather": _gather}


def _route(router: jax.Array, tokens: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Ids and gates of each token's choices, [tokens, top_k]."""
    logits = jnp.dot(tokens.astype(jnp.float32), router, precision=lax.Precision.HIGHEST)
    chosen, ids = lax.top_k(logits, top_k)
    return ids, jax.nn.softmax(chosen)


def _weights(params: Params, dtype: Any) -> Params:
    return {name: params[name].astype(dtype) for name in ("w_in", "w_out")}


def _sorted_place(group: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """The place of each choice among all, sorted by group, and the sizes of the first groups."""
    numbers = jnp.arange(len(group), dtype=jnp.int32)
    place = jnp.zeros_like(group).at[jnp.argsort(group)].set(numbers, unique_indices=True)
    of_group = group[:, None] == jnp.arange(num_groups, dtype=jnp.int32)[None, :]
    return place, jnp.sum(of_group, axis=0, dtype=jnp.int32)


def _to_cells(tokens: jax.Array, cell: jax.Array, num_cells: int) -> tuple[jax.Array, jax.Array]:
    """The token of each cell, zeros where there is none, and the choice of each cell. `cell`: of each choice."""
    nobody = jnp.full(num_cells, len(cell), jnp.int32)
    choice = nobody.at[cell].set(jnp.arange(len(cell), dtype=jnp.int32), mode="drop")
    return _take(jnp.repeat(tokens, len(cell) // len(tokens), axis=0), choice, cell), choice


def _weighted_sum(gates: jax.Array, rows: jax.Array, cell: jax.Array, choice: jax.Array) -> jax.Array:
    """float32: for each token the sum of its cells' rows, times gates."""
    of_choices = _take(rows, cell, choice).reshape(*gates.shape, -1).astype(jnp.float32)
    return jnp.sum(gates[:, :, None] * of_choices, axis=1)


@jax.custom_vjp
def _take(rows: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """rows[source], with zeros where that is out of range; `target` is the inverse of `source`."""
    return rows.at[source].get(mode="fill", fill_value=0)


_take.defvjp(
    lambda rows, source, target: (_take(rows, source, target), (source, target)),
    lambda residuals, gradient: (_take(gradient, *reversed(residuals)), None, None),
)
