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


def why_out_of_reach(axis_name: AxisName, tokens: jax.Array, num_choices: int, *, asked: bool) -> str:
    """Why tokens, or rows of theirs, cannot go through peers' memory; empty where they can."""
    if tokens.dtype not in _peer.SUMMED:
        return f"tokens travel as {', '.join(map(str, _peer.SUMMED))}, not {tokens.dtype}"
    row_bytes = int(np.prod(tokens.shape[1:])) * tokens.dtype.itemsize
    if row_bytes % 16 or row_bytes == 0:
        return f"a token of {row_bytes} bytes is not of whole 16-byte words"
    if num_choices > _handlers.max_choices:
        return f"a token has {num_choices} choices, and custom calls at most {_handlers.max_choices}"
    return _peer.why_out_of_reach(axis_name, [tokens.dtype], [tokens.dtype], asked=asked)


def dispatch(
    capacity: int,
    axis_name: AxisName,
    tokens: jax.Array,
    place: jax.Array,
    group_sizes: jax.Array,
    shown: list[jax.Array],
    coming: _peer.Coming | None,
) -> tuple[jax.Array, list[jax.Array]]:
    """Tokens' rows, and beside them rows of weights that `_peer.begin_rows` has begun to bring.

    Args:
      capacity: rows of each rank.
      axis_name: of the ranks.
      tokens: [num_tokens, d_model].
      place: int32 [num_tokens, k], rank * capacity + row; negative: none.
      group_sizes: int32 [slots].
      shown: the leaves that rows of weights began with, as `_peer.finish_rows` takes them.
      coming: these rows; None: there are none.

    Returns:
      Rows [capacity, d_model]: the tokens whose places are this rank's, and zeros beyond those of the groups. And
      [slots, ...] of each leaf.
    """
    mapped_with = _peer.zero_like(group_sizes, *_peer.mapped_alike(shown, coming))
    exposed = _peer.expose([], mapped_with, axis_name, shown=[tokens, place])
    operands = (exposed.table, tokens, place, group_sizes)
    done, rows = _ffi.call(
        "lplb_dispatch",
        [
            _ffi.Result((), jnp.int32, operands),
            _ffi.Result((capacity, *tokens.shape[1:]), tokens.dtype, (tokens, place, group_sizes)),
        ],
        *operands,
        aliases={},
        num_blocks=np.int64(_NUM_BLOCKS),
    )
    (rows,), slots = _released(axis_name, exposed, done, [rows], shown, coming)
    return rows, slots


@_peer.one_operation
def dispatch_beside(
    sizes: tuple[int, tuple[Any, ...] | None],
    axis_name: AxisName,
    tokens: jax.Array,
    place: jax.Array,
    group_sizes: jax.Array,
    leaves: list[jax.Array],
    source: jax.Array | None,
) -> tuple[jax.Array, list[jax.Array]]:
    """`dispatch`, with rows of weights begun here: of leaves as `_peer.add_up` takes them, the rows `source`.

    These are int32 [slots, 1], or None where there are no leaves. `sizes` are the capacity, and the dtypes of what is
    made of the leaves; None: in their place.
    """
    capacity, dtypes = sizes
    coming = None if source is None else _peer.begin_rows(dtypes, axis_name, leaves, source)
    return dispatch(capacity, axis_name, tokens, place, group_sizes, [] if dtypes is None else leaves, coming)


@_peer.one_operation
def combine(
    sizes: tuple[int, tuple[Any, ...] | None],
    axis_name: AxisName,
    rows: jax.Array,
    place: jax.Array,
    gates: jax.Array | None,
    leaves: list[jax.Array],
    replicas: jax.Array | None,
) -> tuple[jax.Array, list[jax.Array]]:
    """Of each token the sum of its rows, times gates, on each rank that has any, and beside them sums of other rows.

    Args:
      sizes: the number of parts that there is room for, and the dtypes of what is made of the leaves; None: in their
        place.
      axis_name: of the ranks.
      rows: [capacity, d_model].
      place: int32 [num_tokens, k].
      gates: float32 [num_tokens, k], or None.
      leaves: as `_peer.add_up` takes them, or none.
      replicas: int32 [n, r], or None.

    Returns:
      [num_tokens, num_parts, d_model], in the order of the token's choices; of parts beyond the last nothing is known.
      And sums [n, ...] for each leaf.
    """
    num_parts, dtypes = sizes
    given = [] if gates is None else [gates]
    coming = None if replicas is None else _peer.begin_rows(dtypes, axis_name, leaves, replicas)
    room = _ffi.Result((len(place), num_parts, *rows.shape[1:]), rows.dtype, (rows, place, *given))
    shown = [] if dtypes is None else leaves
    mapped_with = _peer.zero_like(rows, *_peer.mapped_alike(shown, coming))
    exposed = _peer.expose([], mapped_with, axis_name, shown=[place, *given], rooms=[room])
    operands = (exposed.table, place, rows, *exposed.buffers, *given)
    results = [_ffi.Result((), jnp.int32, operands), room]
    done, parts = _ffi.call("lplb_combine", results, *operands, aliases={3: 1}, num_blocks=np.int64(_NUM_BLOCKS))
    (parts,), sums = _released(axis_name, exposed._replace(buffers=[parts]), done, [], shown, coming)
    return parts, sums


def _released(
    axis_name: AxisName,
    exposed: _peer.Exposed,
    done: jax.Array,
    made: list[jax.Array],
    shown: list[jax.Array],
    coming: _peer.Coming | None,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What was exposed and made of tokens, and what was coming beside them, once all ranks have all of it."""
    if coming is None:
        return _peer.release(exposed, done, axis_name, made), []
    beside, sums, done = _peer.finish_rows(shown, coming, done)
    all_done = _peer.gather(done, axis_name)
    return _peer.kept(exposed, all_done, made), _peer.kept(beside, all_done, sums)


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
    exposed = _peer.expose([zeros], _peer.zero_like(rows, group_sizes), axis_name, shown=[of_sums, place, gates])
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
