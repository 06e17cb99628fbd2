"""Step 1 of `balance`: tokens per logical expert."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lplb import _ffi
from jax_lplb._mesh import with_auto_axes

# Thread blocks count and assign chunks of ids: enough chunks to fill a GPU, few enough to add up fast.
_LEAST_CHUNK = 512


def count_load(
    expert_ids: jax.Array,
    num_experts: int,
    *,
    num_sms: int | None = None,
    implementation: _ffi.Implementation = None,
) -> jax.Array:
    """Counts the tokens that picked each expert.

    Args:
      expert_ids: int32 [..., k], logical experts; an id that is negative or >= num_experts is padding.
      num_experts: logical experts.
      num_sms: most thread blocks that run at once, to leave the rest of a GPU to what runs beside this; None: no limit.
        Results do not depend on it. Of no effect on CPU and in pure JAX.
      implementation: "ffi" (custom call), "xla" (pure JAX), or None: the custom call on platforms that have one.

    Returns:
      int32 [num_experts].

    Raises:
      TypeError, ValueError: an argument has the wrong dtype, rank or value, named in the message.
    """
    check_expert_ids(expert_ids)
    check_num_experts(num_experts, implementation)
    check_num_sms(num_sms)
    with jax.named_scope("lplb_count"):
        return with_auto_axes(
            lambda ids: count(flat_ids(ids), num_experts, num_sms, implementation)[0], jax.P(), expert_ids
        )


def flat_ids(expert_ids: jax.Array) -> jax.Array:
    """The ids in a row; for a batch without any, one of padding, which counts as none.

    For GPUs, jax 0.11.2 crashes as it compiles a shard_map over empty ids.
    """
    flat = jnp.asarray(expert_ids).reshape(-1)
    return flat if flat.size else _ffi.vary(jnp.full((1,), -1, jnp.int32), _ffi.varying(flat))


def count(
    expert_ids: jax.Array, num_experts: int, num_sms: int | None, implementation: _ffi.Implementation
) -> tuple[jax.Array, jax.Array]:
    """Load [num_experts], and [num_chunks, num_experts]: the load of the chunks of ids before each chunk."""
    num_ids = expert_ids.shape[0]
    num_chunks, chunk_size = chunking(num_ids, num_experts)

    def ffi(ids: jax.Array) -> list[jax.Array]:
        return _ffi.call(
            "lplb_count",
            [
                _ffi.Result((num_experts,), jnp.int32, [ids]),
                _ffi.Result((num_chunks, num_experts), jnp.int32, [ids]),
            ],
            ids,
            chunk_size=np.int64(chunk_size),
            num_sms=np.int64(num_sms or 0),
        )

    def xla(ids: jax.Array) -> list[jax.Array]:
        valid = (ids >= 0) & (ids < num_experts)
        chunk = jnp.arange(num_ids, dtype=jnp.int32) // chunk_size
        histograms = jnp.zeros((num_chunks, num_experts), jnp.int32)
        histograms = histograms.at[chunk, jnp.where(valid, ids, num_experts)].add(1, mode="drop")
        load = jnp.sum(histograms, axis=0, dtype=jnp.int32)
        return [load, jnp.cumsum(histograms, axis=0, dtype=jnp.int32) - histograms]

    load, starts = _ffi.choose("count", implementation, ffi, xla, expert_ids)
    return load, starts


def chunking(num_ids: int, num_experts: int) -> tuple[int, int]:
    """Number and size of the chunks that ids, one at least, are cut into; the last chunk may be shorter."""
    most_chunks = 256 if num_ids <= 2**20 else 1024
    chunk_size = _LEAST_CHUNK
    # Each chunk costs a row of `num_experts` counts, so it has that many ids, or half as many.
    while chunk_size < num_experts // 2 or chunk_size * most_chunks < num_ids:
        chunk_size *= 2
    return -(-num_ids // chunk_size), chunk_size


def check_expert_ids(ids: Any, name: str = "expert_ids") -> None:
    if not isinstance(ids, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be an int32 array, got {type(ids).__name__}")
    if ids.dtype != jnp.int32:
        raise TypeError(f"{name} must have dtype int32, got {ids.dtype}; convert with .astype(jnp.int32)")
    if ids.ndim < 1:
        raise ValueError(f"{name} must have shape [..., k] with at least one axis, got shape {ids.shape}")
    if ids.size > 2**31 - 1:
        raise ValueError(f"{name}: {ids.size} ids are more than {2**31 - 1}, the largest count")


def check_num_experts(num_experts: int, implementation: _ffi.Implementation) -> None:
    if not isinstance(num_experts, (int, np.integer)) or isinstance(num_experts, bool):
        raise TypeError(f"num_experts must be an integer, got {num_experts!r}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if num_experts > _ffi.MAX_EXPERTS and implementation != "xla":
        raise ValueError(
            f"num_experts = {num_experts} is more than the {_ffi.MAX_EXPERTS} that the custom calls hold in shared "
            "memory; pass implementation='xla'"
        )


def check_num_sms(num_sms: int | None) -> None:
    if num_sms is None:
        return
    if not isinstance(num_sms, (int, np.integer)) or isinstance(num_sms, bool):
        raise TypeError(f"num_sms must be an integer or None, got {num_sms!r}")
    if num_sms < 1:
        raise ValueError(f"num_sms must be at least 1, got {num_sms}; pass None for no limit")
