"""Tokens to the ranks of their experts and back, through peers' memory; see `_peer` for why this is right.

A row goes over a link once for each rank that a token has choices on. On the way there the rank of the experts reads
it, and puts it where each of those choices belongs. On the way back it adds up what its experts made of the token, and
writes the sum to where the token's rank adds up the ranks' parts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lplb import _ffi, _handlers, _peer
from jax_lplb._mesh import AxisName

_NUM_BLOCKS = 132  # of a kernel, at once


def why_out_of_reach(axis_name: AxisName, tokens: jax.Array, num_choices: int) -> str:
    """Why tokens, or rows of theirs, cannot go through peers' memory; empty where they can."""
    if tokens.dtype not in _peer.SUMMED:
        return f"tokens travel as {', '.join(map(str, _peer.SUMMED))}, not {tokens.dtype}"
    row_bytes = int(np.prod(tokens.shape[1:])) * tokens.dtype.itemsize
    if row_bytes % 16:
        return f"a token of {row_bytes} bytes is not of whole 16-byte words"
    if num_choices > _handlers.max_choices:
        return f"a token has {num_choices} choices, and custom calls at most {_handlers.max_choices}"
    return _peer.why_out_of_reach(axis_name, 1, [tokens.dtype], [tokens.dtype])


@_peer.one_operation
def dispatch(
    capacity: int, axis_name: AxisName, tokens: jax.Array, place: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """Rows [capacity, d_model]: the tokens whose places are this rank's, and zeros beyond those of the groups.

    `place`: int32 [num_tokens, k], rank * capacity + row; negative: none.
    """
    exposed = _peer.expose([], place, axis_name, shown=[tokens, place])
    operands = (exposed.table, tokens, place, group_sizes)
    results = [
        _ffi.Result((), jnp.int32, operands),
        _ffi.Result((capacity, *tokens.shape[1:]), tokens.dtype, operands),
    ]
    done, rows = _ffi.call("lplb_dispatch", results, *operands, aliases={}, num_blocks=np.int64(_NUM_BLOCKS))
    return _peer.release(exposed, done, axis_name, [rows])[0]


@_peer.one_operation
def combine(
    num_parts: int, axis_name: AxisName, rows: jax.Array, place: jax.Array, gates: jax.Array | None
) -> jax.Array:
    """[num_tokens, num_parts, d_model]: of each token the sum of its rows, times gates, on each rank that has any.

    Parts are in the order of the token's choices; of those beyond the last nothing is known.
    """
    given = [] if gates is None else [gates]
    room = _ffi.Result((len(place), num_parts, *rows.shape[1:]), rows.dtype, [rows, place, *given])
    exposed = _peer.expose([], _nothing_of(rows), axis_name, shown=[place, *given], rooms=[room])
    operands = (exposed.table, place, rows, *exposed.buffers, *given)
    done, parts = _ffi.call(
        "lplb_combine",
        [_ffi.Result((), jnp.int32, operands), room._replace(varies_with=operands)],
        *operands,
        aliases={3: 1},
        num_blocks=np.int64(_NUM_BLOCKS),
    )
    return _peer.release(exposed._replace(buffers=[parts]), done, axis_name)[0]


@_peer.one_operation
def combine_gradient(
    capacity: int,
    axis_name: AxisName,
    of_sums: jax.Array,
    place: jax.Array,
    gates: jax.Array,
    group_sizes: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Of the gradients [num_tokens, d_model] of the tokens' sums: those of the rows and of the gates."""
    zeros = _ffi.vary(jnp.zeros_like(gates), _ffi.varying(of_sums, place, gates, rows))
    exposed = _peer.expose([zeros], _nothing_of(rows), axis_name, shown=[of_sums, place, gates])
    operands: Any = (exposed.table, of_sums, place, gates, group_sizes, rows, *exposed.buffers)
    results = [
        _ffi.Result((), jnp.int32, operands),
        _ffi.Result(rows.shape, rows.dtype, operands),
        _ffi.Result(gates.shape, gates.dtype, operands),
    ]
    done, of_rows, of_gates = _ffi.call(
        "lplb_combine_gradient", results, *operands, aliases={6: 2}, num_blocks=np.int64(_NUM_BLOCKS)
    )
    of_gates, of_rows = _peer.release(exposed._replace(buffers=[of_gates]), done, axis_name, [of_rows])
    return of_rows, of_gates


def _nothing_of(rows: jax.Array) -> jax.Array:
    """Zero, mapped under `jax.vmap` as the rows are, which nobody has to wait for."""
    return jnp.sum(rows[:0], dtype=jnp.float32)
