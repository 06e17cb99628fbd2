"""Tokens to the ranks of their experts and back, through peers' memory; see `_peer` for why this is right.

A row goes over a link once for each rank that a token has choices on. On the way there the rank of the experts reads
it, and puts it where each of those choices belongs. On the way back it adds up what its experts made of the token, and
writes the sum to where the token's rank adds up the ranks' parts.
"""

from typing import Any, NamedTuple

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


@_peer.one_operation
def dispatch(
    sizes: tuple[int, tuple[Any, ...] | None],
    axis_name: AxisName,
    tokens: jax.Array,
    place: jax.Array,
    group_sizes: jax.Array,
    leaves: list[jax.Array],
    source: jax.Array | None,
) -> tuple[jax.Array, list[jax.Array]]:
    """Tokens' rows, and beside them rows of weights.

    Args:
      sizes: capacity, and the dtypes of what is made of the leaves; None: in their place.
      axis_name: of the ranks.
      tokens: [num_tokens, d_model].
      place: int32 [num_tokens, k], rank * capacity + row; negative: none.
      group_sizes: int32 [slots].
      leaves: as `_peer.add_up` takes them, to bring the rows `source`; or none, and no dtypes.
      source: int32 [slots, 1], or None.

    Returns:
      Rows [capacity, d_model]: the tokens whose places are this rank's, and zeros beyond those of the groups. And
      [slots, ...] of each leaf.
    """
    capacity, dtypes = sizes
    beside = _Beside(leaves, source, dtypes)
    exposed = _peer.expose(
        beside.buffers, _zero_like(group_sizes, source), axis_name, shown=[tokens, place, *beside.shown]
    )
    operands = [exposed.table, tokens, place, group_sizes]
    results = [_ffi.Result((capacity, *tokens.shape[1:]), tokens.dtype, (tokens, place, group_sizes))]
    done, rows, *slots = beside.call("lplb_dispatch", exposed.buffers, operands, results, {})
    if dtypes is None:
        *slots, rows = _peer.release(exposed._replace(buffers=slots), done, axis_name, [rows])
    else:
        rows, *slots = _peer.release(exposed, done, axis_name, [rows, *slots])
    return rows, slots


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
    of_rows = (rows, place, *given)
    room = _ffi.Result((len(place), num_parts, *rows.shape[1:]), rows.dtype, of_rows)
    beside = _Beside(leaves, replicas, dtypes)
    shown = [place, *given, *beside.shown]
    exposed = _peer.expose(beside.buffers, _zero_like(rows, replicas), axis_name, shown=shown, rooms=[room])
    *buffers, parts = exposed.buffers
    operands, number = [exposed.table, place, rows, parts, *given], np.int64(len(given))
    done, parts, *sums = beside.call("lplb_combine", buffers, operands, [room], {3: 1}, num_gates=number)
    if dtypes is None:
        *sums, parts = _peer.release(exposed._replace(buffers=[*sums, parts]), done, axis_name)
    else:
        parts, *sums = _peer.release(exposed._replace(buffers=[parts]), done, axis_name, sums)
    return parts, sums


class _Beside(NamedTuple):
    """What is added up beside tokens."""

    leaves: list[jax.Array]
    replicas: jax.Array | None
    dtypes: tuple[Any, ...] | None  # of sums; None: in the leaves' place

    @property
    def shown(self) -> list[jax.Array]:
        return [] if self.dtypes is None else self.leaves

    @property
    def buffers(self) -> list[jax.Array]:
        return self.leaves if self.dtypes is None else []

    def call(
        self,
        target: str,
        buffers: list[jax.Array],
        operands: list[jax.Array],
        results: list[_ffi.Result],
        aliases: dict[int, int],
        **attributes: Any,
    ) -> list[jax.Array]:
        """The marker for `_peer.release`, the results, and the sums; `buffers`: those here, as they are exposed."""
        in_place = self.dtypes is None
        if self.replicas is not None:
            leaves = buffers if in_place else self.leaves
            first, number = len(operands) + 1, len(results) + 1
            sums = _peer.sums_like(leaves, self.replicas, self.dtypes)
            operands, results = [*operands, self.replicas, *leaves], [*results, *sums]
            if in_place:
                aliases = aliases | {first + i: number + i for i in range(len(leaves))}
        done = _ffi.Result((), jnp.int32, operands)
        fixed = {"num_blocks": np.int64(_NUM_BLOCKS), "in_place": in_place}
        return _ffi.call(target, [done, *results], *operands, aliases=aliases, **fixed, **attributes)


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
    exposed = _peer.expose([zeros], _zero_like(rows, group_sizes), axis_name, shown=[of_sums, place, gates])
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


def _zero_like(*arrays: jax.Array | None) -> jax.Array:
    """Zero, mapped under `jax.vmap` where any of these is, so that addresses are; XLA waits for none of them."""
    zeros = [jnp.sum(array[:0], dtype=jnp.float32) for array in arrays if array is not None]
    axes = _ffi.varying(*zeros)
    return sum((_ffi.vary(zero, axes) for zero in zeros), start=jnp.float32(0))
