"""Time of bringing the weights of copies, on all GPUs of one host: `python benchmarks/replicate.py`.

Each rank keeps `--rows` experts of 3 x 2048 x 1408 parameters in float32, and brings its slots in bfloat16, by every
transport. Placements: along a topology (`spread`: each rank reads from others, and is read); copies chosen by a load,
of which all are of one rank's experts (`of one rank`), as they are of a log-normal load (`per batch`), or none is
needed (`none used`); and EPLB's. `no slots` is what the cast of the weights takes, and that of their gradients. Rows
with `room` are of weights in bfloat16 with room for copies, which each call takes from the one before: nothing is cast,
and nothing but copies moves; a program makes ROOM_CALLS of those, as its launch would take longer than CALLS.

`forward`: the weights of the slots; `gradient`: those, and gradients of all slots added up at home. Time of a call, of
`CALLS` in one program, one after the other, so that the host is ahead of the devices. `link_mb` is what the last rank
reads over its links, and `of_link` the time that takes at `--link-gb-per-s`, over that of `forward` beyond the cast's.
"""

import argparse
import pathlib
import time
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

import jax_lplb as lplb

P = jax.sharding.PartitionSpec
CALLS, ROOM_CALLS = 8, 64


def placements(ranks: int, rows: int) -> dict[str, lplb.Placement]:
    experts = ranks * rows
    load = np.random.default_rng(0).lognormal(0, 1, experts).astype(np.float32)
    of_one = np.where(np.arange(experts) < rows, 5, 1).astype(np.float32)
    even = np.ones(experts, np.float32)
    sizes: dict[str, Any] = {"num_experts": experts, "num_ranks": ranks}
    along = partial(lplb.Placement.from_topology, common.topology_of(ranks), **sizes)
    per_batch = lplb.Placement.per_batch(**sizes, redundants_per_rank=2)
    choose = {"none used": even, "of one rank": of_one, "per batch": load}
    return {
        "no slots": along(redundants_per_rank=0),
        "spread": along(redundants_per_rank=2),
        **{name: per_batch.choose(jnp.asarray(of_case)) for name, of_case in choose.items()},
        "eplb": lplb.Placement.from_eplb(load, num_ranks=ranks, redundants_per_rank=2),
    }


def link_mb(place: lplb.Placement, rank: int, expert_bytes: int) -> float:
    """What a rank reads over its links: the weights of its slots whose home is another."""
    held = np.asarray(place.phy2log).reshape(place.num_ranks, -1)[rank]
    held = held[held >= 0]
    return float(np.sum(np.asarray(place.home_rank)[held] != rank) * expert_bytes / 1e6)


def after(result: Any, tree: Any) -> Any:
    """The tree as it is, once the whole result is there."""
    last = jax.tree.leaves(jax.lax.optimization_barrier(result))[0].ravel()[-1]
    nothing = jnp.where(last == last, 0, 1)  # XLA cannot know that nothing here is NaN, and waits
    return jax.tree.map(lambda leaf: leaf + nothing.astype(leaf.dtype), tree)


def median_us(run, repeats: int, calls: int = CALLS) -> float:
    """Of a call of a program that makes so many, in five groups."""
    jax.block_until_ready(run())
    times, programs = [], max(1, repeats // calls)
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(programs):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / (programs * calls) * 1e6)
    return round(float(np.median(times)), 1)


def handing_on(mesh: Any, place: lplb.Placement, backward: bool, full: Any) -> Any:
    """A program of ROOM_CALLS, each of which takes slots and gradients from the one before, and changes them."""

    @partial(jax.jit, donate_argnums=(0, 2))
    @partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), P(), P("ep")), out_specs=P("ep"))
    def calls(slots, place, gradient):
        for _ in range(ROOM_CALLS):
            slots, pull = jax.vjp(lambda slots: lplb.replicate(slots, place, "ep", transport="peer"), slots)
            if backward:
                (gradient,) = pull(gradient)
        return slots, gradient

    arrays = [full(place.num_physical, jnp.bfloat16) for _ in range(2)]

    def run() -> list[Any]:
        arrays[:] = calls(arrays[0], place, arrays[1])
        return arrays

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="experts of each rank")
    parser.add_argument("--transports", nargs="+", default=["peer", "collective"])
    parser.add_argument("--repeats", type=int, default=20, help="calls in a group")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1408)
    parser.add_argument("--link-gb-per-s", type=float, default=300.0, help="that a rank gets over its links")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/replicate.json"))
    args = parser.parse_args()

    ranks = jax.device_count()
    mesh = jax.make_mesh((ranks,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding, experts = jax.NamedSharding(mesh, P("ep")), ranks * args.rows
    shapes = {"w_in": (args.width, 2 * args.hidden), "w_out": (args.hidden, args.width)}

    def full(rows: int, dtype) -> dict[str, jax.Array]:
        make = jax.jit(
            lambda: {name: jnp.ones((rows, *shape), dtype) for name, shape in shapes.items()}, out_shardings=sharding
        )
        return make()

    home, rows = full(experts, jnp.float32), []
    expert_bytes = sum(leaf.nbytes for leaf in home.values()) // experts
    cast_us = None
    for case, place in placements(ranks, args.rows).items():
        gradient = full(place.num_physical, jnp.bfloat16)
        used = int(np.sum(np.asarray(place.phy2log) >= 0)) - experts
        for transport in args.transports if case != "no slots" else [None]:
            bring = partial(lplb.replicate, axis_name="ep", dtype=jnp.bfloat16, transport=transport)

            def slots(home, place, gradient, bring=bring):
                return bring(home, place)

            def slots_and_gradient(home, place, gradient, bring=bring):
                slots, pull = jax.vjp(lambda home: bring(home, place), home)
                return slots, pull(gradient)[0]

            def calls(one, home, place, gradient, cast_only=case == "no slots"):
                result = one(home, place, gradient)
                for _ in range(CALLS - 1):
                    # What a call reads hangs on the result of the one before, which then makes room for the next.
                    if cast_only:
                        home, gradient = after(result, (home, gradient))
                    else:
                        place = after(result, place)
                    result = one(home, place, gradient)
                return result

            row = {"bench": "replicate", "case": case, "transport": transport or "", "ranks": ranks}
            row["used"] = used
            for name, one in (("forward_us", slots), ("gradient_us", slots_and_gradient)):
                in_specs = (P("ep"), P(), P("ep"))
                run = jax.jit(jax.shard_map(partial(calls, one), mesh=mesh, in_specs=in_specs, out_specs=P("ep")))
                row[name] = median_us(partial(run, home, place, gradient), args.repeats)
            cast_us = cast_us or row["forward_us"]
            if transport == "peer":
                row["link_mb"] = round(link_mb(place, ranks - 1, expert_bytes), 1)
                if row["link_mb"] > 0:
                    link_us = row["link_mb"] / args.link_gb_per_s * 1e3
                    row["of_link"] = round(link_us / (row["forward_us"] - cast_us), 3)
            rows.append(row)
            print(rows[-1], flush=True)
        if "peer" in args.transports and place.planning is not None:
            row = {"bench": "replicate", "case": case, "transport": "peer", "room": True, "ranks": ranks, "used": used}
            row["link_mb"] = round(link_mb(place, ranks - 1, expert_bytes // 2), 1)  # of bfloat16
            for name, backward in (("forward_us", False), ("gradient_us", True)):
                row[name] = median_us(handing_on(mesh, place, backward, full), args.repeats, ROOM_CALLS)
            if row["link_mb"] > 0:
                row["of_link"] = round(row["link_mb"] / args.link_gb_per_s * 1e3 / row["forward_us"], 3)
            rows.append(row)
            print(rows[-1], flush=True)
    common.write(args.out, rows)


if __name__ == "__main__":
    main()
