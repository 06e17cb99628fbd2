"""Rows brought by XLA's collectives: where ranks cannot read each other's memory."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb import _ffi
from jax_lplb._mesh import AxisName, spec_of, with_auto_axes
from jax_lplb._placement import owners_and_receivers
from jax_lplb.topology import Topology

Route = tuple[tuple[int, int], ...]  # (sender, receiver), as `ppermute` takes them


def bring_along(
    dtypes: Sequence[Any], axes: AxisName, routes: Sequence[Route], leaves: Sequence[jax.Array], sent: jax.Array
) -> list[jax.Array]:
    """The leaves [rows, ...] in these dtypes, and below them what other ranks send.

    `sent`: int32 [n], the rows that this rank sends; number k takes route k % len(routes).
    """
    casted = [leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    copies = [_along(axes, routes, leaf.at[sent].get(mode="clip")) for leaf in casted]
    return [jnp.concatenate([leaf, rows]) for leaf, rows in zip(casted, copies, strict=True)]


def add_up_along(
    dtypes: Sequence[Any], axes: AxisName, routes: Sequence[Route], gradients: Sequence[jax.Array], sent: jax.Array
) -> list[jax.Array]:
    """The gradients of leaves that `bring_along` sent, added up in these dtypes: own rows first, then those sent."""
    back = [tuple((receiver, sender) for sender, receiver in route) for route in routes]
    sums = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        own, copies = jnp.split(gradient, [len(gradient) - len(sent)])
        total = own.astype(dtype)
        for row, of_copy in zip(sent, _along(axes, back, copies), strict=True):
            # In place, row by row: a scatter, which is what JAX would make of it, adds up whole leaves.
            of_row = lax.dynamic_index_in_dim(total, row, keepdims=False) + of_copy.astype(dtype)
            total = lax.dynamic_update_index_in_dim(total, of_row, row, 0)
        sums.append(total)
    return sums


def _along(axes: AxisName, routes: Sequence[Route], rows: jax.Array) -> jax.Array:
    """Rows [n, ...] as they arrive, number k having taken route k % len(routes), and keeping its number."""
    columns = [lax.ppermute(rows[i :: len(routes)], axes, route) for i, route in enumerate(routes)]
    return jnp.stack(columns, axis=1).reshape(rows.shape)


def routes_of(topology: Topology, axis_name: AxisName, num_ranks: int) -> tuple[AxisName, tuple[Route, ...]]:
    """The axes in the mesh's order, in which alone `ppermute` takes them, and the route of each column."""
    number_of = np.arange(num_ranks)  # of each rank, in the mesh's order
    axes = axis_name
    if not isinstance(axis_name, str):
        axes = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in axis_name)
        by_place = number_of.reshape([lax.axis_size(axis) for axis in axis_name])
        number_of = np.argsort(by_place.transpose([axis_name.index(axis) for axis in axes]).ravel())
    _, receiver = owners_and_receivers(topology, num_ranks, topology.num_columns)
    return axes, tuple(tuple(zip(number_of.tolist(), number_of[to].tolist(), strict=True)) for to in receiver.T)


def rows_by_slot(leaf: jax.Array, wanted: jax.Array, axis_name: AxisName) -> jax.Array:
    """The rows that this rank wants of all ranks' rows [rows, ...]: for one slot after the other an `all_to_all`.

    `wanted`: int32 [ranks, slots], what each rank wants for each slot, rank * rows + row; negative: zeros, which have
    no gradient. Where there are gradients no row is gathered by an index: that of a gather is a scatter, whose order
    shows on GPUs.
    """

    def run(leaf: jax.Array, wanted: jax.Array) -> jax.Array:
        rows, rank = leaf.shape[0], lax.axis_index(axis_name)

        def chosen(choices: jax.Array, choice: jax.Array) -> jax.Array:
            """[n, ...], choices[choice] for each of n, or zeros."""
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                return choices.at[choice].get(mode="fill", fill_value=0, wrap_negative_indices=False)
            is_it = choice[:, None] == jnp.arange(len(choices), dtype=jnp.int32)[None]
            is_it = is_it.reshape(*is_it.shape, *[1] * (leaf.ndim - 1))
            return jnp.sum(jnp.where(is_it, choices[None], 0), axis=1, dtype=leaf.dtype)

        def bring(of_ranks: jax.Array) -> jax.Array:
            sent = chosen(leaf, of_ranks - rank * rows)
            came = lax.all_to_all(sent, axis_name, split_axis=0, concat_axis=0, tiled=True)
            own = of_ranks[rank]
            return chosen(came, jnp.where(own < 0, -1, own // rows)[None])[0]

        return lax.map(bring, wanted.T)

    return with_auto_axes(run, spec_of(leaf), leaf, wanted)


def rows_of_all(leaf: jax.Array, source: jax.Array, axis_name: AxisName) -> jax.Array:
    """The rows `source` of all ranks' rows, zeros beyond them.

    All ranks show one of theirs at a time, and each takes what it needs.
    """

    def run(leaf: jax.Array, source: jax.Array) -> jax.Array:
        rows = leaf.shape[0]
        result = jnp.zeros((len(source), *leaf.shape[1:]), leaf.dtype)

        @jax.checkpoint  # else the backward pass would keep a mask of the result's size for each row
        def show(row: jax.Array, result: jax.Array) -> jax.Array:
            shown = lax.all_gather(lax.dynamic_index_in_dim(leaf, row, keepdims=False), axis_name)
            taken = ((source % rows == row) & (source < shown.shape[0] * rows)).reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.where(taken, shown[source // rows], result)

        return lax.fori_loop(0, rows, show, _ffi.vary(result, _ffi.varying(leaf, source)))

    return with_auto_axes(run, spec_of(leaf), leaf, source)
