"""Step 4 of `balance`: each token goes to a replica of its expert."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_lplb import _ffi
from jax_lplb._count import check_expert_ids, check_num_sms, chunking, count, flat_ids
from jax_lplb._load import exponent_of, power_of_two, present
from jax_lplb._mesh import spec_of, with_auto_axes
from jax_lplb._placement import Placement
from jax_lplb._solve import check_load, check_placement

_ONE = 1 << 30  # a fraction of 1 in the quotas' fixed point


@partial(jax.tree_util.register_dataclass, data_fields=["loads", "rank"], meta_fields=["ranks_per_node"])
@dataclasses.dataclass(frozen=True)
class Nearby:
    """Where tokens are that are to stay near.

    Attributes:
      loads: int32 [num_ranks, num_experts], tokens of each expert on each rank.
      rank: int32 [], that of the tokens to assign.
      ranks_per_node: so many ranks next to each other are a node.
    """

    loads: jax.Array
    rank: jax.Array
    ranks_per_node: int


def assign(
    expert_ids: jax.Array,
    split: jax.Array,
    placement: Placement,
    *,
    load: jax.Array,
    offset: jax.Array | int = 0,
    num_sms: int | None = None,
    implementation: _ffi.Implementation = None,
) -> jax.Array:
    """Sends each token to a replica of its expert, so that replicas share the load as the split says.

    The tokens of an expert are numbered from 0 to m - 1, m its load, in token order over all shards; this shard's begin
    at `offset`. The split becomes integer quotas q that sum to m. With tokens interleaved, token o goes to the first
    replica if floor((o + 1) q / m) > floor(o q / m); the rest, renumbered, go on to the next replica. Quotas come out
    exact over the whole axis, and any run of tokens spreads as the whole does, to within a few. No atomics, no
    sampling: equal inputs give equal ids.

    Args:
      expert_ids: int32 [..., k], logical experts; an id that is negative or >= num_experts is padding.
      split: float32 [num_experts, max_replicas], tokens (or any unit: rows are normalised) for each replica. A row of
        zeros means the even split.
      placement: where the replicas are.
      load: int32 [num_experts], tokens of each expert over all shards.
      offset: int32 [num_experts] (or one number), tokens of each expert on the shards before this one.
      num_sms: most thread blocks that run at once, to leave the rest of a GPU to what runs beside this; None: no limit.
        Results do not depend on it. Of no effect on CPU and in pure JAX.
      implementation: "ffi" (custom call), "xla" (pure JAX), or None: the custom call on platforms that have one.

    Returns:
      int32, of the shape of `expert_ids`: physical experts, -1 for padding.

    Raises:
      TypeError, ValueError: an argument has the wrong dtype, shape or value, named in the message.
    """
    check_expert_ids(expert_ids)
    check_placement(placement, implementation)
    check_load(load, placement)
    check_num_sms(num_sms)
    if load.dtype != jnp.int32:
        raise TypeError(f"load must have dtype int32 to number tokens, got {load.dtype}")
    shape = (placement.num_experts, placement.max_replicas)
    if not isinstance(split, (jax.Array, np.ndarray)):
        raise TypeError(f"split must be a float32 array, got {type(split).__name__}")
    if np.shape(split) != shape:
        raise ValueError(f"split must have shape [num_experts, max_replicas] = {list(shape)}, got {np.shape(split)}")
    if split.dtype != jnp.float32:
        raise TypeError(f"split must have dtype float32, got {split.dtype}")
    if isinstance(offset, (int, np.integer)):
        if not 0 <= offset < 2**31:
            raise ValueError(f"offset must be from 0 to {2**31 - 1}, got {offset}")
        offset = jnp.int32(offset)
    if not isinstance(offset, (jax.Array, np.ndarray)):
        raise TypeError(f"offset must be an int32 array or an integer, got {offset!r}")
    offset = jnp.asarray(offset)
    if offset.dtype != jnp.int32:
        raise TypeError(f"offset must have dtype int32, got {offset.dtype}")
    if offset.shape not in ((), (placement.num_experts,)):
        raise ValueError(f"offset must have shape [num_experts] = [{placement.num_experts}], got {offset.shape}")

    def run(
        expert_ids: jax.Array, split: jax.Array, placement: Placement, load: jax.Array, offset: jax.Array
    ) -> jax.Array:
        flat = flat_ids(expert_ids)
        _, starts = count(flat, placement.num_experts, num_sms, implementation)
        offset = jnp.broadcast_to(offset, (placement.num_experts,))
        physical_ids, _ = assign_with_starts(
            flat, starts, lax.stop_gradient(split), placement, load, offset, num_sms, implementation
        )
        return physical_ids[: expert_ids.size].reshape(expert_ids.shape)

    with jax.named_scope("lplb_assign"):
        return with_auto_axes(run, spec_of(expert_ids), expert_ids, split, placement, load, offset)


def assign_with_starts(
    expert_ids: jax.Array,
    starts: jax.Array,
    split: jax.Array,
    placement: Placement,
    load: jax.Array,
    offset: jax.Array,
    num_sms: int | None,
    implementation: _ffi.Implementation,
) -> tuple[jax.Array, jax.Array]:
    """Physical ids of flat expert ids, given `count`'s starts; and the rank load that the quotas give."""
    num_ids = expert_ids.shape[0]
    num_physical = placement.num_physical
    log2phy = jnp.asarray(placement.log2phy)
    if placement.max_replicas == 1:
        valid = (expert_ids >= 0) & (expert_ids < placement.num_experts)
        home = (
            log2phy[:, 0]
            .at[jnp.where(valid, expert_ids, -1)]
            .get(mode="fill", fill_value=-1, wrap_negative_indices=False)
        )
        home = jnp.where((home >= 0) & (home < num_physical), home, -1)
        return home, quota_rank_load(split, load, placement)

    def ffi(*operands: jax.Array) -> list[jax.Array]:
        _, _, split, load, _, log2phy = operands
        results = ffi_results(num_ids, placement, operands, (split, load, log2phy))
        attributes = ffi_attributes(num_ids, placement, num_sms)
        return _ffi.call("lplb_assign", results, *operands, num_physical=np.int64(num_physical), **attributes)[:2]

    def xla(ids: jax.Array, starts: jax.Array, *operands: Any) -> list[jax.Array]:
        del starts  # the sort numbers all tokens at once
        return assign_tokens(ids, placement, *operands)

    physical_ids, rank_load = _ffi.choose(
        "assign", implementation, ffi, xla, expert_ids, starts, split, load, offset, log2phy
    )
    return physical_ids, rank_load


def ffi_results(
    num_ids: int, placement: Placement, ids_vary_with: Iterable[jax.Array], loads_vary_with: Iterable[jax.Array]
) -> list[_ffi.Result]:
    """Physical ids and rank load, as the custom calls return them, and memory for shares to work in."""
    loads_vary_with = tuple(loads_vary_with)
    shares = (_ffi.shares_rows(placement.num_experts, placement.num_physical), 4)
    return [
        _ffi.Result((num_ids,), jnp.int32, ids_vary_with),
        _ffi.Result((placement.num_ranks,), jnp.int32, loads_vary_with),
        _ffi.Result(shares, jnp.int32, loads_vary_with),
    ]


def ffi_attributes(num_ids: int, placement: Placement, num_sms: int | None) -> dict[str, Any]:
    """What the custom calls know of the assignment, beside num_physical."""
    chunk_size = chunking(num_ids, placement.num_experts)[1]
    return {"chunk_size": np.int64(chunk_size), "num_sms": np.int64(num_sms or 0)}


def near_attributes(nearby: Nearby | None) -> dict[str, Any]:
    """And what those know that `balance` makes."""
    return {"ranks_per_node": np.int64(0 if nearby is None else nearby.ranks_per_node)}


def assign_tokens(
    ids: jax.Array,
    placement: Placement,
    split: jax.Array,
    load: jax.Array,
    offset: jax.Array,
    log2phy: jax.Array,
    nearby: Nearby | None = None,
) -> list[jax.Array]:
    """The assignment in pure JAX: physical ids, and the rank load that the quotas give."""
    quotas = _quotas(split, load, log2phy, placement.num_physical)
    steps = [_Step(jnp.maximum(offset, 0).astype(jnp.uint32), jnp.maximum(load, 0).astype(jnp.uint32), quotas)]
    if nearby is not None:
        steps = _near_steps(quotas, log2phy, placement, nearby)
    return [
        _choose_slots(ids, steps, log2phy, placement.num_physical),
        _sum_by_rank(quotas, log2phy, placement),
    ]


def _quotas(split: jax.Array, load: jax.Array, log2phy: jax.Array, num_physical: int) -> jax.Array:
    """uint32 [num_experts, max_replicas], integers near load * split / sum(split) that sum to the load."""
    is_present = present(log2phy, num_physical)
    if is_present.shape[1] == 1:
        return jnp.where(is_present, jnp.maximum(load, 0)[:, None], 0).astype(jnp.uint32)
    replicas = jnp.sum(is_present, axis=1, keepdims=True, dtype=jnp.int32)
    part = jnp.where(is_present & (split > 0), split, 0)
    # As integers, the largest of a row of 24 bits, unless it is tiny, or of fewer, so that 32 bits hold the sum of all:
    # these add up exactly, in any order.
    bits = 24 - max(0, (part.shape[1] - 1).bit_length() - 8)
    largest = jnp.max(part, axis=1, keepdims=True)
    scaled = part * power_of_two(jnp.minimum(bits - 1 - exponent_of(largest), 127))
    weight = jnp.minimum(scaled, 2.0**bits - 1).astype(jnp.uint32)
    # Evenly where there is nothing for any of them.
    weight = jnp.where(jnp.any(weight > 0, axis=1, keepdims=True), weight, is_present.astype(jnp.uint32))
    sums = jnp.cumsum(weight, axis=1, dtype=jnp.uint32)
    unroll = min(part.shape[1], 4)  # no loop where rows are narrow, and no program as long as rows where they are wide
    # Column by column: XLA divides by a broadcast as it multiplies by the reciprocal, and rounds otherwise. (On GPUs it
    # divides approximately anyway; there quotas may differ from the handlers' by a token.)
    whole = jnp.maximum(sums[:, -1], 1).astype(jnp.float32)
    share = lax.scan(lambda _, upto: (None, upto / whole), None, sums.T.astype(jnp.float32), unroll=unroll)[1].T
    index = jnp.arange(1, part.shape[1] + 1, dtype=jnp.int32)[None, :]
    fraction = jnp.where(share < 1, share * _ONE, _ONE).astype(jnp.uint32)
    fraction = jnp.where(index >= replicas, jnp.uint32(_ONE), fraction)
    bound, remainder = _mul_div(fraction, jnp.maximum(load, 0)[:, None], _ONE)
    bound = bound + (remainder >= _ONE // 2).astype(jnp.uint32)
    quotas = bound - jnp.concatenate([jnp.zeros_like(bound[:, :1]), bound[:, :-1]], axis=1)
    return jnp.where(is_present, quotas, jnp.uint32(0))


def quota_rank_load(split: jax.Array, load: jax.Array, placement: Placement) -> jax.Array:
    """int32 [num_ranks], the sum of the quotas of each rank's slots."""
    log2phy = jnp.asarray(placement.log2phy)
    return _sum_by_rank(_quotas(split, load, log2phy, placement.num_physical), log2phy, placement)


def _sum_by_rank(quotas: jax.Array, log2phy: jax.Array, placement: Placement) -> jax.Array:
    quotas, rank = quotas.astype(jnp.int32), log2phy // placement.slots_per_rank
    sums = jnp.zeros_like(quotas, shape=(placement.num_ranks,))
    return sums.at[jnp.where(rank >= 0, rank, placement.num_ranks)].add(quotas, mode="drop")


class _Step(NamedTuple):
    """Replicas that the tokens of an expert go through.

    Attributes:
      skip: uint32 [num_experts], how much higher tokens are numbered than in the step before.
      tokens: uint32 [num_experts], how many are numbered.
      quotas: uint32 [num_experts, max_replicas], how many of them each replica takes.
    """

    skip: jax.Array
    tokens: jax.Array
    quotas: jax.Array


def _near_steps(quotas: jax.Array, log2phy: jax.Array, placement: Placement, nearby: Nearby) -> list[_Step]:
    """Steps for tokens that stay near where they are: on their rank, on their node, anywhere.

    In each, the tokens that are left in a group of ranks go to what is left of the quotas of its replicas, one replica
    after the other.
    """
    ranks = placement.num_ranks
    rank_of = jnp.where(present(log2phy, placement.num_physical), log2phy // placement.slots_per_rank, ranks)
    left, smaller = nearby.loads.astype(jnp.uint32), 1  # tokens of each group of so many ranks, and of each expert
    steps = []
    for size in dict.fromkeys((1, nearby.ranks_per_node, ranks)):
        # Tokens of the groups before, in the larger group, come first.
        rank = jnp.arange(0, ranks, smaller, dtype=jnp.int32)
        first = (rank // size == nearby.rank // size) & (rank // smaller < nearby.rank // smaller)
        skip = jnp.sum(jnp.where(first[:, None], left, 0), axis=0, dtype=jnp.uint32)
        left = jnp.sum(left.reshape(ranks // size, size // smaller, -1), axis=1, dtype=jnp.uint32)
        group_of, groups = rank_of // size, jnp.arange(ranks // size, dtype=jnp.int32)[:, None]
        own = groups == nearby.rank // size

        def fill(left: jax.Array, of_replica: Any, groups: jax.Array = groups) -> tuple[jax.Array, jax.Array]:
            quota, group = of_replica
            here = group[None, :] == groups
            taken = jnp.minimum(quota, jnp.sum(jnp.where(here, left, 0), axis=0, dtype=jnp.uint32))
            return left - jnp.where(here, taken[None, :], 0), taken

        tokens = jnp.sum(jnp.where(own, left, 0), axis=0, dtype=jnp.uint32)
        left = _ffi.vary(left, _ffi.varying(left, quotas, group_of))
        left, taken = lax.scan(fill, left, (quotas.T, group_of.T))
        quotas, smaller = quotas - taken.T, size
        steps.append(_Step(skip, tokens, jnp.where(group_of == nearby.rank // size, taken.T, 0)))
    return steps


def _choose_slots(expert_ids: jax.Array, steps: list[_Step], log2phy: jax.Array, num_physical: int) -> jax.Array:
    num_experts, max_replicas = log2phy.shape
    valid = (expert_ids >= 0) & (expert_ids < num_experts)
    ids = jnp.where(valid, expert_ids, 0)
    # Number of each token among those of its expert: its place in a stable sort, less the expert's first place.
    by_expert = jnp.where(valid, expert_ids, num_experts)
    order = jnp.argsort(by_expert, stable=True)
    counts = jnp.zeros_like(ids, jnp.uint32, shape=(num_experts + 1,)).at[by_expert].add(1)
    first = jnp.cumsum(counts, dtype=jnp.uint32) - counts
    place = jnp.zeros_like(first, shape=ids.shape).at[order].set(jnp.arange(ids.shape[0], dtype=jnp.uint32))
    number = place - first[by_expert]

    replicas = jnp.sum(present(log2phy, num_physical), axis=1, dtype=jnp.int32)
    unknown = steps[0].tokens[ids] == 0  # a token the load does not know of goes home

    def try_replica(state: Any, of_replica: Any, is_last: bool) -> tuple[Any, None]:
        number, left, slot = state
        replica, quotas, slots = of_replica
        quota = quotas[ids]
        taken, remainder = _mul_div(number, quota, jnp.maximum(left, 1))
        here = (remainder + quota >= left) | unknown
        if is_last:
            here |= replicas[ids] == replica + 1
        slot = jnp.where((slot < 0) & here & (replicas[ids] > replica), slots[ids], slot)
        return (number - taken, left - quota, slot), None

    slot = jnp.full_like(ids, -1)
    for step in steps:
        left = step.tokens[ids]
        number = number + step.skip[ids]
        if step is steps[0]:
            number = number % jnp.where(unknown, jnp.uint32(1), left)
        axes = _ffi.varying(number, left, slot, step.quotas, log2phy)
        state = tuple(_ffi.vary(v, axes) for v in (number, left, slot))
        of_replicas = jnp.arange(max_replicas, dtype=jnp.int32), step.quotas.T, log2phy.T
        (number, _, slot), _ = lax.scan(partial(try_replica, is_last=step is steps[-1]), state, of_replicas)
    return jnp.where(valid, slot, -1)


def _mul_div(a: Any, b: Any, c: Any) -> tuple[jax.Array, jax.Array]:
    """floor(a * b / c) and the remainder, exact in uint32 for a <= c < 2**31 and b < 2**31.

    By long division, a bit of b at a time, because JAX has no 64-bit integers by default.
    """
    a, b, c = (jnp.asarray(v).astype(jnp.uint32) for v in (a, b, c))
    a, b, c = jnp.broadcast_arrays(a, b, c)

    def reduce(quotient: jax.Array, remainder: jax.Array) -> tuple[jax.Array, jax.Array]:
        over = remainder >= c
        return quotient + over.astype(jnp.uint32), jnp.where(over, remainder - c, remainder)

    def add_bit(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        quotient, remainder = reduce(2 * state[0], 2 * state[1])
        bit = (b >> (jnp.uint32(30) - i.astype(jnp.uint32))) & 1
        return reduce(quotient, remainder + bit * a)

    zero = 0 * a + 0 * b + 0 * c  # varies over the mesh as the operands do
    return lax.fori_loop(0, 31, add_bit, (zero, zero))
