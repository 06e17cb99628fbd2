"""Peers' memory: devices of one host read and write each other's buffers, over NVLink between GPUs.

A rank tells the others where its buffers are, they read them or write to them, and nobody's buffers go before all have:

1. `expose`: a custom call writes down the addresses of the buffers, and `gather` shows them to all ranks. Buffers are
   of three kinds. What is *shown* is read only, by others as by the rank itself. *Rooms* are new, for others to write
   to. The third kind is changed, by others or by the rank itself, but not all of it: the rest keeps what it held, and
   may be read.
2. A custom call reads and writes at the places that the addresses name: `add_rows` for weights and their gradients, and
   those of `_peer_tokens` for tokens.
3. `release`: ranks that have read and written join another `gather`, and a custom call takes the buffers, what the call
   before has made of them, and what the `gather` brought.

This is right because of four things that XLA guarantees:

- **A value is there before what is computed from it.** The addresses come from a call that has what is shown as an
  operand, so that is written before its address exists; and a `gather` gives no rank a result before every rank has
  joined. So all that is shown is written, and all rooms are there, before anyone reads or writes. No rank gets the
  result of the second `gather` before every rank has joined it, with a marker that its reading and writing makes. So
  all have read and written when `release` runs.
- **A value is in one place, and a result that must alias an operand is in the place of that.** What is shown is not
  written by these calls: it is an operand of the first and of the last, the same value in the same memory. What others
  write to goes through the calls as operands with results in their places, each with a single use: a chain that is one
  piece of memory, from the call that tells its address to the one that releases it. `release` makes sure of both: on
  CPUs it is an error if the memory is another, on GPUs a trap.
- **A buffer is kept until its last use**, as an operand of `release`. What the program makes of its results, or of the
  memory of what was shown, such as writing over it, comes after that.
- **A call that has an effect runs once, where it stands.** Merged with its like, repeated or moved out of a loop, a
  call would tell of one buffer while another is read, or read what is gone. One thing breaks this and the guarantee
  before: XLA for GPUs lets a call read slices of larger arrays in place, and write its results into one. Some calls
  then see slices and others copies of them, results are elsewhere than operands, and jaxlib 0.11 runs the call again
  besides. It does so across no `optimization_barrier`: there is one around all calls that belong together.

No byte is written and read at once, nor written by two: what is shown is written by nobody; of what others write to,
each byte is written by one rank, and read by its owner after `release`; and of a buffer that its rank changes itself,
others read only what it does not change.

Step 2 may be two calls, `begin_rows` and `finish_rows`, for rows that are read beside whatever is between: on GPUs the
first launches it on another stream, and the second waits for that. What the first one gives is then not there yet,
against the first of these guarantees: only the second may take it, which finds by its address what has begun, and is an
error where XLA has moved it. `with_what_is_coming` makes one operation for JAX of all that is between.

JAX's transformations keep to this too, as they meet each function that is `one_operation` as one: a policy of
`jax.checkpoint` saves or repeats all of it, and so never keeps addresses for later. Under `jax.vmap` all calls are
mapped together, and addresses are those of the elements: so `expose` has to be mapped where the call after it is.

The table of addresses is the one place that knows how memory is reached. Where all devices belong to one process,
addresses are as they are. Where each GPU of a host has a process of its own, what `expose` shows means the same in all
processes, and a further call after the `all_gather` makes addresses of it, of memory that `_handover` has mapped.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from jax_lplb import _ffi, _handlers, _handover
from jax_lplb._mesh import AxisName

SUMMED = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))  # dtypes that `add_up` takes and gives


def why_out_of_reach(axis_name: AxisName, dtypes: Sequence[Any], summed: Sequence[Any], *, asked: bool) -> str:
    """Why ranks cannot read each other's memory here, or do not unless asked to; empty where they can.

    `dtypes` are those of what is read, `summed` those that are added up, and of sums.
    """
    axes = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    mesh = jax.sharding.get_abstract_mesh()
    left = [
        name
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind != AxisType.Manual and size > 1
    ]
    if why_not := _ffi.why_no_handlers(platform):
        return why_not
    if jax.process_count() > 1 and platform != "cuda":
        return (
            f"there are {jax.process_count()} processes, and on platform {platform} each reaches the memory of its own "
            "devices only"
        )
    if jax.process_count() > 1 and not asked:
        return f"there are {jax.process_count()} processes, which reach each other's memory only if asked to ('peer')"
    if not axes <= set(mesh.manual_axes):
        return f"axis_name = {axis_name!r} is not of a mesh that jax.shard_map maps over"
    if left:
        return f"the mesh's axes {left} are not manual here, and may cut each array in a way of its own"
    if jax.config.jax_disable_jit:
        return "jax.disable_jit runs operations one by one, and frees what they read"
    for dtype in dtypes:
        if _bits(dtype) < 8:
            return f"a row of {dtype} may begin within a byte"
    for dtype in summed:
        if dtype not in SUMMED:
            return f"gradients are added up in float32, to or from {', '.join(map(str, SUMMED))}, not {dtype}"
    # Whatever the default platform is: the mesh may be another's.
    own = (
        "" if _handlers.peers_reachable() else "some GPUs cannot access the memory of others (cudaDeviceCanAccessPeer)"
    )
    # Last, for all processes must come to it. What is before is the same on all.
    return _handover.why_out_of_reach(own) if jax.process_count() > 1 else own


def platforms() -> frozenset[str]:
    """Platforms on which ranks can read each other's memory; those of several processes on GPUs alone."""
    return _ffi.handlers() & {"cuda"} if jax.process_count() > 1 else _ffi.handlers()


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)
    return int(jnp.finfo(dtype).bits) if jnp.issubdtype(dtype, jnp.floating) else 8 * dtype.itemsize


def gather(words: jax.Array, axis_name: AxisName) -> jax.Array:
    """The words of all ranks [ranks, ...], elements of 32 bits; no rank has them before every rank has given its own.

    Between GPUs of a process they go through mailboxes in their memory (`ffi/gather.h`), by one custom call: an
    `all_gather` of a few words is mostly the launch of a collective. With several processes it is an `all_gather`, and
    on CPUs, where a handler that waits might hold the thread that it waits for. All ranks must call it equally often.
    """

    def by_collective(words: jax.Array, _: Any) -> jax.Array:
        return lax.all_gather(words, axis_name, to="invarying")

    # Without GPUs here, the program is for those of other machines (`jax.export`), which have numbers of their own.
    if "cuda" not in _ffi.handlers() or jax.process_count() > 1 or not _ffi.gpus():
        return by_collective(words, None)
    mesh, ranks = jax.sharding.get_abstract_mesh(), lax.axis_size(axis_name)
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    others = tuple(name for name in mesh.axis_names if name in mesh.manual_axes and name not in axes)

    def through_mailboxes(words: jax.Array, place: jax.Array) -> jax.Array:
        (result,) = _ffi.call(
            "lplb_gather",
            [_ffi.Result((ranks, *words.shape), words.dtype, [words], same_over=frozenset(axes))],
            lax.optimization_barrier(words),
            place,
            aliases={},
            devices=_ffi.gpus(),
            num_groups=np.int64(math.prod(mesh.shape[name] for name in others)),
        )
        return lax.optimization_barrier(result)

    # Among all devices of the mesh: each writes into the mailboxes of all, and so need not know which are in its group.
    place = lax.axis_index((*axes, *others))
    return lax.platform_dependent(words, place, cuda=through_mailboxes, default=by_collective)


class Exposed(NamedTuple):
    """What other ranks read from or write to, [rows, ...] each."""

    shown: list[jax.Array]  # read only, by others as by this rank, wherever else it is used
    buffers: list[jax.Array]  # changed, rooms last; they go through the calls in place
    table: jax.Array  # uint32 [ranks, shown and buffers, 2], the address of each, the lower half first


def expose(
    buffers: Sequence[jax.Array],
    mapped_with: jax.Array,
    axis_name: AxisName,
    *,
    shown: Sequence[jax.Array] = (),
    rooms: Sequence[_ffi.Result] = (),
) -> Exposed:
    """Where every rank has its own of these.

    Args:
      buffers: what is changed, and what is there already: in the same memory from now on, or in a copy.
      mapped_with: of what the call takes that reads and writes. Where that is mapped by `jax.vmap`, there are addresses
        for each element, even if nothing else is mapped.
      axis_name: of the ranks.
      shown: what is read only.
      rooms: what further buffers are like, of which nothing is known before others have written to them.
    """
    results = [*_like(buffers), *rooms]
    addresses = _ffi.Result((len(shown) + len(results), 2), jnp.uint32, [mapped_with, *shown, *buffers])
    operands = (mapped_with, *shown, *buffers)
    aliases = {1 + len(shown) + i: 1 + i for i in range(len(buffers))}
    several = jax.process_count() > 1
    told, *exposed = _ffi.call(
        "lplb_share" if several else "lplb_expose",
        [addresses, *results],
        *operands,
        aliases=aliases,
        num_shown=np.int64(len(shown)),
    )
    table = gather(told, axis_name)
    if several:
        # Each process has addresses of its own.
        (table,) = _ffi.call("lplb_translate", [_ffi.Result(table.shape, table.dtype, [told])], table)
    return Exposed(list(shown), exposed, table)


def add_rows(exposed: Exposed, replicas: jax.Array, dtypes: Sequence[Any] | None) -> tuple[list[jax.Array], jax.Array]:
    """Sums of rows of what all ranks have exposed, in float32 and in the order in which they are listed.

    Args:
      exposed: what is shown, or where sums are to be in place, buffers. They are float32, bfloat16 or float16, of
        equally many rows; or of any dtype, which is that of the sums, where these are of one row each.
      replicas: int32 [n, r], for each sum the rows that it has: rank * rows + row, up to the first out of range. Zeros
        where there is none.
      dtypes: of the sums, for each of what is shown. None: each row of the buffers becomes its own sum, but for those
        that list no row, or only themselves, which stay as they are. A rank then lists no rows that others change.

    Returns:
      Sums [n, ...], and the marker for `release`.
    """
    in_place = dtypes is None
    leaves = exposed.buffers if in_place else exposed.shown
    operands = (exposed.table, replicas, *leaves)
    aliases = {2 + i: 1 + i for i in range(len(leaves))} if in_place else {}
    results = [_ffi.Result((), jnp.int32, operands), *sums_like(leaves, replicas, dtypes)]
    done, *added = _ffi.call("lplb_add_rows", results, *operands, aliases=aliases, in_place=in_place)
    return added, done


def sums_like(leaves: Sequence[jax.Array], replicas: jax.Array, dtypes: Sequence[Any] | None) -> list[_ffi.Result]:
    """What sums of rows of the leaves are like, in these dtypes; None: in their place."""
    if dtypes is None:
        return _like(leaves)
    return [
        _ffi.Result((len(replicas), *leaf.shape[1:]), dtype, [replicas, leaf])
        for leaf, dtype in zip(leaves, dtypes, strict=True)
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coming:
    """Sums of rows that are on their way: nothing but `finish_rows` may have to do with them."""

    table: jax.Array
    replicas: jax.Array
    sums: list[jax.Array]
    axis_name: AxisName = dataclasses.field(metadata={"static": True})
    dtypes: tuple[Any, ...] | None = dataclasses.field(metadata={"static": True})


def begin_rows(
    dtypes: tuple[Any, ...] | None, axis_name: AxisName, leaves: Sequence[jax.Array], replicas: jax.Array
) -> Coming:
    """Begins to add up, as `add_rows` does, beside all that comes before `finish_rows`; within one operation.

    At most `_handlers.max_begun` leaves. Under `jax.vmap` nothing is begun here: `finish_rows` does it all.
    """

    @jax.custom_batching.custom_vmap
    def begin(leaves: list[jax.Array], replicas: jax.Array) -> Coming:
        return _begun(dtypes, axis_name, leaves, replicas, replicas)

    def nothing(leaves: list[jax.Array], replicas: jax.Array) -> Coming:
        sums = leaves
        if dtypes is not None:
            sums = [
                _ffi.vary(jnp.zeros(like.shape, like.dtype), _ffi.varying(*like.varies_with))
                for like in sums_like(leaves, replicas, dtypes)
            ]
        return Coming(no_table(axis_name, leaves, replicas), replicas, sums, axis_name, dtypes)

    begin.def_vmap(_mapped(nothing))
    return begin(list(leaves), replicas)


def no_table(axis_name: AxisName, leaves: Sequence[jax.Array], replicas: jax.Array) -> jax.Array:
    """Of what `begin_rows` does not begin."""
    axes = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    zeros = jnp.zeros((lax.axis_size(axis_name), len(leaves), 2), jnp.uint32)
    return _ffi.vary(zeros, _ffi.varying(replicas, *leaves) - axes)


def _begun(
    dtypes: tuple[Any, ...] | None,
    axis_name: AxisName,
    leaves: Sequence[jax.Array],
    replicas: jax.Array,
    mapped_with: jax.Array,
) -> Coming:
    in_place = dtypes is None
    shown, buffers = ([], leaves) if in_place else (leaves, [])
    exposed = expose(buffers, mapped_with, axis_name, shown=shown)
    rows = exposed.buffers if in_place else exposed.shown
    sums = _ffi.call(
        "lplb_begin_rows",
        sums_like(rows, replicas, dtypes),
        exposed.table,
        replicas,
        *rows,
        aliases={2 + i: i for i in range(len(rows))} if in_place else {},
        in_place=in_place,
    )
    return Coming(exposed.table, replicas, sums, axis_name, dtypes)


def finish_rows(
    shown: Sequence[jax.Array], coming: Coming, done: jax.Array
) -> tuple[Exposed, list[jax.Array], jax.Array]:
    """What was exposed, what was made of it, and the marker for `kept`; all of it is there.

    Args:
      shown: the leaves that it began with; none where sums are in their place.
      coming: what has begun.
      done: the marker of another call, which is over then, too.
    """

    def wait(shown: list[jax.Array], coming: Coming, done: jax.Array) -> tuple[jax.Array, list[jax.Array], jax.Array]:
        given = (coming.table, coming.replicas, *shown)
        done = _ffi.vary(done, _ffi.varying(done, *given, *coming.sums))
        done, *sums = _ffi.call(
            "lplb_finish_rows",
            [_ffi.Result((), jnp.int32, [done]), *_like(coming.sums)],
            done,
            *given,
            *coming.sums,
            aliases={0: 0} | {1 + len(given) + i: 1 + i for i in range(len(coming.sums))},
        )
        return coming.table, sums, done

    finish = jax.custom_batching.custom_vmap(wait)

    def all_of_it(shown: list[jax.Array], coming: Coming, done: jax.Array) -> Any:
        leaves = shown or coming.sums
        mapped_with = zero_like(done, *mapped_alike(shown, coming))
        return wait(shown, _begun(coming.dtypes, coming.axis_name, leaves, coming.replicas, mapped_with), done)

    finish.def_vmap(_mapped(all_of_it))
    table, sums, done = finish(list(shown), coming, done)
    buffers, made = ([], sums) if shown else (sums, [])
    return Exposed(list(shown), buffers, table), made, done


def _mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a `custom_vmap`, to map another function in its place."""

    def rule(size: int, are_mapped: list[Any], *arguments: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, tuple(are_mapped))
        results = jax.vmap(function, in_axes=axes, axis_size=size)(*arguments)
        return results, jax.tree.map(lambda _: True, results)

    return rule


def mapped_alike(shown: Sequence[jax.Array], coming: Coming | None) -> list[jax.Array]:
    """What is mapped by `jax.vmap` where `finish_rows` is."""
    return [] if coming is None else [*shown, coming.replicas, *coming.sums]


def zero_like(*arrays: jax.Array) -> jax.Array:
    """Zero, mapped under `jax.vmap` where any of these is, so that addresses are; XLA waits for none of them."""
    zeros = [jnp.sum(array[None][:0], dtype=jnp.float32) for array in arrays]
    axes = _ffi.varying(*zeros)
    return sum((_ffi.vary(zero, axes) for zero in zeros), start=jnp.float32(0))


def release(exposed: Exposed, done: jax.Array, axis_name: AxisName, made: Sequence[jax.Array] = ()) -> list[jax.Array]:
    """The buffers, and what was `made` of all that was exposed, once all ranks have read and written."""
    return kept(exposed, gather(done, axis_name), made)


def kept(exposed: Exposed, all_done: jax.Array, made: Sequence[jax.Array] = ()) -> list[jax.Array]:
    """`release`, where ranks have gathered their markers already."""
    buffers = [*exposed.shown, *exposed.buffers]
    results = [*exposed.buffers, *made]
    aliases = {2 + len(exposed.shown) + i: i for i in range(len(results))}
    return _ffi.call(
        "lplb_release",
        _like(results),
        exposed.table,
        all_done,
        *buffers,
        *made,
        aliases=aliases,
        num_told=np.int64(len(buffers)),
    )


def _like(buffers: Sequence[jax.Array]) -> list[_ffi.Result]:
    return [_ffi.Result(buffer.shape, buffer.dtype, [buffer]) for buffer in buffers]


def apart(function: Callable[..., Any], static: int = 0) -> Callable[..., Any]:
    """The function, across whose ends XLA makes no call see a slice of an array; its first arguments are static."""

    def run(*arguments: Any) -> Any:
        return lax.optimization_barrier(function(*arguments[:static], *lax.optimization_barrier(arguments[static:])))

    return run


def one_operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one operation for JAX, which runs and repeats all of it or nothing; two arguments are static."""
    # Outside of jit, shard_map would otherwise run each call in it as a program of its own.
    operation = jax.custom_jvp(jax.jit(apart(function, 2), static_argnums=(0, 1)), nondiff_argnums=(0, 1))
    operation.defjvp(partial(_refuse, _NO_DERIVATIVE))
    return operation


def with_what_is_coming(function: Callable[..., Any], message: str) -> Callable[..., Any]:
    """Likewise, for what begins rows and waits for them; `message` says what to do in place of differentiating it.

    JAX may leave out what none of the results that are used needs: so all that need the rows have to wait for them.
    """
    operation = jax.custom_jvp(jax.jit(lambda *arguments: function(*lax.optimization_barrier(arguments))))
    operation.defjvp(partial(_refuse, message))
    return operation


_NO_DERIVATIVE = (
    "what is read from peers' memory can be differentiated once, in reverse mode; for more pass transport='collective'"
)


def _refuse(message: str, *_: Any) -> NoReturn:
    raise NotImplementedError(message)


@one_operation
def add_up(
    dtypes: tuple[Any, ...] | None, axis_name: AxisName, leaves: list[jax.Array], replicas: jax.Array
) -> list[jax.Array]:
    """Sums in these dtypes of rows of all ranks' leaves [rows, ...], added up in float32 and in the listed order.

    `replicas`: int32 [n, r], rank * rows + row of what is added, up to the first out of range. Sums of one row bring
    rows, cast on the way; for those, leaves of other dtypes than sums may have are cast before. Without dtypes, sums
    are in the place of the leaves' rows, as `add_rows` has it.
    """
    if dtypes is None:
        exposed = expose(leaves, replicas, axis_name)
        sums, done = add_rows(exposed, replicas, None)
        return release(exposed._replace(buffers=sums), done, axis_name)
    if replicas.shape[1] == 1:
        leaves = [
            leaf if {leaf.dtype, jnp.dtype(dtype)} <= set(SUMMED) else leaf.astype(dtype)
            for leaf, dtype in zip(leaves, dtypes, strict=True)
        ]
    exposed = expose([], replicas, axis_name, shown=leaves)
    sums, done = add_rows(exposed, replicas, dtypes)
    return release(exposed, done, axis_name, sums)
