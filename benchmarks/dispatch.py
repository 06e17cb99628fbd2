"""Wall time of tokens' ways to their experts and back, on all GPUs of one host: `python benchmarks/dispatch.py`.

Each rank has `--tokens` tokens of `--width` bfloat16 numbers, each with `--choices` different experts of 64, drawn with
log-normal popularity; copies are chosen by the batch. Through peers' memory and by `all_to_all`, both from ids that are
known: exchanged counts and index arrays are made before, and buffers are as large as the batch needs. `forward`: to the
experts, and back with gates; `backward`: the gradients of both. `link_mb`: what the busiest rank has to get over its
links for that, a row for each rank that a token has choices on; `gb_per_s`: that over the time.
"""

import argparse
import pathlib
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
from replicate import median_us

import jax_lplb as lplb
from jax_lplb import _all_to_all, _dispatch, _peer_tokens

P = jax.sharding.PartitionSpec
EXPERTS = 64


def link_mb(place: np.ndarray, capacity: int, row_bytes: int) -> tuple[float, float]:
    """Of the busiest rank: rows that come from others, and sums that come back."""
    ranks = len(place)
    to = np.where(place >= 0, place // capacity, -1)  # [ranks, tokens, choices]
    has = np.stack([(to == rank).any(axis=2).sum(axis=1) for rank in range(ranks)], axis=1)
    np.fill_diagonal(has, 0)
    return float(has.sum(axis=0).max() * row_bytes / 1e6), float(has.sum(axis=1).max() * row_bytes / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--choices", type=int, default=6)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--sigma", type=float, default=0.6)
    parser.add_argument("--blocks", type=int, nargs="+", default=[_peer_tokens._NUM_BLOCKS])
    parser.add_argument("--repeats", type=int, default=20, help="calls in a group")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/dispatch.json"))
    args = parser.parse_args()

    ranks = jax.device_count()
    mesh = jax.make_mesh((ranks,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, P("ep"))
    placement = lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=ranks, redundants_per_rank=2)
    rng = np.random.default_rng(0)
    picks = common.picks(rng, rng.normal(0, args.sigma, EXPERTS), ranks * args.tokens, args.choices)
    smap = partial(jax.shard_map, mesh=mesh, out_specs=P("ep"))

    def balanced(ids: jax.Array) -> jax.Array:
        return lplb.balance(ids, placement, axis_name="ep").physical_ids

    ids = jax.jit(smap(balanced, in_specs=P("ep")))(jax.device_put(picks, sharding))
    owner = np.asarray(ids).reshape(ranks, -1) // placement.slots_per_rank
    pairs = np.stack([np.bincount(of_rank, minlength=ranks) for of_rank in owner])
    of_rank = _dispatch.capacity_of(int(pairs.sum(axis=0).max()), picks.size)
    of_pair = _dispatch.capacity_of(int(pairs.max()), picks.size, ranks)

    def by_peers(ids: jax.Array) -> _dispatch.Handle:
        return _dispatch.queue(ids, placement, "ep", "ffi").handle(jnp.int32(0), of_rank, "ep", "ffi")

    def by_all_to_all(ids: jax.Array) -> _all_to_all.Round:
        return _all_to_all.prepare(_dispatch.queue(ids, placement, "ep", "xla"), jnp.int32(0), of_pair)

    ways = {
        "peer": (by_peers, _dispatch.bring, lambda rows, gates, handle: _dispatch.add_up(rows, gates, handle)),
        "all_to_all": (
            by_all_to_all,
            lambda tokens, round_: _all_to_all.dispatch("ep", round_, tokens)[0],
            lambda rows, gates, round_: _all_to_all.combine("ep", round_, rows, gates),
        ),
    }

    def draw() -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(0))
        shape = (ranks * args.tokens, args.width)
        return jax.random.normal(keys[0], shape, jnp.bfloat16), jax.random.uniform(keys[1], picks.shape)

    tokens, gates = jax.jit(draw, out_shardings=(sharding, sharding))()
    rows, results = [], {}
    for way, (prepare, dispatch, combine) in ways.items():
        where = jax.jit(smap(prepare, in_specs=P("ep")))(ids)
        brought = jax.jit(smap(dispatch, in_specs=(P("ep"), P("ep"))))(tokens, where)
        passes = {
            "dispatch": {
                "forward": (dispatch, (tokens, where)),
                "backward": (
                    lambda rows, tokens, where, dispatch=dispatch: jax.vjp(lambda x: dispatch(x, where), tokens)[1](
                        rows
                    )[0],
                    (brought, tokens, where),
                ),
            },
            "combine": {
                "forward": (
                    lambda rows, gates, where, combine=combine: combine(rows, gates, where).astype(jnp.bfloat16),
                    (brought, gates, where),
                ),
                "backward": (
                    lambda x, rows, gates, where, combine=combine: jax.vjp(
                        lambda rows, gates: combine(rows, gates, where), rows, gates
                    )[1](x.astype(jnp.float32)),
                    (tokens, brought, gates, where),
                ),
            },
        }
        if way == "peer":
            place = np.asarray(where.place).reshape(ranks, args.tokens, -1)
            there, back = link_mb(place, of_rank, args.width * 2)
        for blocks in args.blocks if way == "peer" else [0]:
            _peer_tokens._NUM_BLOCKS = blocks
            jax.clear_caches()
            for step, of_step in passes.items():
                for which, (function, operands) in of_step.items():
                    run = jax.jit(smap(function, in_specs=(P("ep"),) * len(operands)))
                    results[way, step, which] = run(*operands)
                    us = median_us(partial(run, *operands), args.repeats)
                    mb = there if (step == "dispatch") == (which == "forward") else back
                    row = {"bench": "dispatch", "case": f"{ranks}x2", "tokens_per_rank": args.tokens, "step": step}
                    row |= {"pass": which, "dispatch": way, "median_us": us, "link_mb": round(mb, 1)}
                    if way == "peer":
                        row |= {"blocks": blocks, "gb_per_s": round(mb / us * 1e3, 1)}
                    rows.append(row)
                    print(row, flush=True)
    for step, which in (("dispatch", "backward"), ("combine", "forward"), ("combine", "backward")):
        pair = [jax.tree.leaves(results[way, step, which]) for way in ways]
        # Of the gradients by rows, whose order differs, that of the gates.
        left, right = (np.asarray(leaves[-1].astype(jnp.float32)) for leaves in pair)
        off = np.max(np.abs(left - right)) / np.max(np.abs(right))
        assert off < 0.02, f"{step} {which}: off by {off}"
    common.write(args.out, rows)


if __name__ == "__main__":
    main()
