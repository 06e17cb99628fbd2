"""Wall time of bringing the weights of copies, on all GPUs of one host: `python benchmarks/replicate.py`.

Each rank keeps `--rows` experts of 3 x 2048 x 1408 parameters in float32, and brings its slots in bfloat16. A placement
along a topology, one whose copies are chosen by a batch (log-normal loads; "used" slots of all), and EPLB's; each
by every transport, the cast to bfloat16 included. `forward`: the weights of the slots; `gradient`: those, and gradients
of all slots added up at home. `no copies` is what the cast alone takes, and that of the gradients.
"""

import argparse
import pathlib
import time
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np

import jax_lplb as lplb

P = jax.sharding.PartitionSpec


def placements(ranks: int, experts: int) -> dict[str, lplb.Placement]:
    load = np.random.default_rng(0).lognormal(0, 1, experts).astype(np.float32)
    per_batch = lplb.Placement.per_batch(num_experts=experts, num_ranks=ranks, redundants_per_rank=2)
    topology = common.topology_of(ranks)
    return {
        "no copies": lplb.Placement.from_topology(
            topology, num_experts=experts, num_ranks=ranks, redundants_per_rank=0
        ),
        "topology": lplb.Placement.from_topology(topology, num_experts=experts, num_ranks=ranks, redundants_per_rank=2),
        "per batch": per_batch.choose(jnp.asarray(load)),
        "eplb": lplb.Placement.from_eplb(load, num_ranks=ranks, redundants_per_rank=2),
    }


def median_us(run, repeats: int) -> float:
    """Of calls one after the other, in five groups."""
    jax.block_until_ready(run())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / repeats * 1e6)
    return round(float(np.median(times)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="experts of each rank")
    parser.add_argument("--transports", nargs="+", default=["peer", "collective"])
    parser.add_argument("--repeats", type=int, default=20, help="calls in a group")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1408)
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
    for case, place in placements(ranks, experts).items():
        gradient = full(place.num_physical, jnp.bfloat16)
        for transport in args.transports if case != "no copies" else [None]:
            bring = partial(lplb.replicate, axis_name="ep", dtype=jnp.bfloat16, transport=transport)
            mapped = partial(jax.shard_map, mesh=mesh, out_specs=P("ep"))

            def slots_and_gradient(home, place, gradient, bring=bring):
                slots, pull = jax.vjp(lambda home: bring(home, place), home)
                return slots, pull(gradient)[0]

            forward = jax.jit(mapped(bring, in_specs=(P("ep"), P())))
            both = jax.jit(mapped(slots_and_gradient, in_specs=(P("ep"), P(), P("ep"))))
            rows.append(
                {
                    "bench": "replicate",
                    "case": case,
                    "transport": transport or "",
                    "ranks": ranks,
                    "used": int(np.sum(np.asarray(place.phy2log) >= 0)) - experts,
                    "forward_us": median_us(partial(forward, home, place), args.repeats),
                    "gradient_us": median_us(partial(both, home, place, gradient), args.repeats),
                }
            )
            print(rows[-1], flush=True)
    common.write(args.out, rows)


if __name__ == "__main__":
    main()
