"""Time of `balance` inside jit: `python benchmarks/balance.py`.

On one GPU: device time of each kernel, from JAX's profiler, one call for each of 64 log-normal instances; and wall
time of a call in a chain of 16, unrolled and scanned, each call depending on the one before. On several GPUs: the same
chains inside shard_map over all of them, beside chains of the collective alone. The baseline is a chain of lookups of
the home expert, which is what runs without balancing.
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_lplb as lplb

CHAIN = 16
KERNELS = {
    "count": ("histogram_kernel", "scan_kernel"),
    "solve": ("solve_kernel",),
    "assign": ("assign_kernel",),
}


def wall_us(run: Callable[[Any], Any], arguments: Any, calls: int, repeats: int = 30) -> dict[str, float]:
    """Microseconds a call, of `calls` inside `run`: median and p99 over repetitions."""
    jax.block_until_ready(run(arguments))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run(arguments))
        times.append((time.perf_counter() - begin) / calls * 1e6)
    return common.statistics(times)


def chains(call: Callable[[jax.Array], tuple[jax.Array, jax.Array]]) -> dict[str, Callable]:
    """Unrolled and scanned chains of `call`, which returns ids and a value that is never negative."""

    def step(ids: jax.Array) -> jax.Array:
        physical_ids, value = call(ids)
        return jnp.where(value < 0, physical_ids, ids)  # the compiler cannot know that it is always ids

    def unrolled(ids: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            ids = step(ids)
        return ids

    def scanned(ids: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (step(x), None), ids, length=CHAIN)[0]

    return {"unrolled": unrolled, "scanned": scanned}


def balanced(placement: lplb.Placement, ids: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    out = lplb.balance(ids, placement, **options)
    return out.physical_ids, out.rank_load[0]


def home(placement: lplb.Placement, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    physical_ids = jnp.asarray(placement.log2phy)[ids, 0]
    return physical_ids, physical_ids[0, 0]


def profile(run: Callable, inputs: Iterator[jax.Array]) -> list[tuple[str, float]]:
    """Names and microseconds of all kernels that the calls launch on the first GPU, in order."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for ids in inputs:
                jax.block_until_ready(run(ids))
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = [
            (event.start_ns, event.name, event.duration_ns / 1e3)
            for plane in data.planes
            if plane.name == "/device:GPU:0"
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return [(name, duration) for _, name, duration in sorted(events)]


def one_gpu(case: str, tokens: int) -> list[dict[str, Any]]:
    placement = common.CASES[case]()
    _, ids = common.instances(tokens, placement.num_ranks)
    on_device = [jax.device_put(x) for x in ids]
    run = jax.jit(partial(lplb.balance, placement=placement, implementation="ffi"))
    jax.block_until_ready([run(x) for x in on_device[:3]])
    events = profile(run, on_device)
    assert len(events) % len(ids) == 0, "every call launches the same kernels"
    per_call = np.array([duration for _, duration in events]).reshape(len(ids), -1)
    names = [name for name, _ in events[: per_call.shape[1]]]
    where = {"bench": "balance", "case": case, "tokens": tokens, "gpus": 1}
    rows = []
    for kernel, parts in KERNELS.items():
        columns = [i for i, name in enumerate(names) if any(part in name for part in parts)]
        rows.append({**where, "kernel": kernel, **common.statistics(per_call[:, columns].sum(axis=1))})
    rows.append({**where, "kernel": f"all {len(names)}", **common.statistics(per_call.sum(axis=1))})
    for name, call in (("lookup", home), ("balance", partial(balanced, implementation="ffi"))):
        for mode, chain in chains(partial(call, placement)).items():
            rows.append({**where, "kernel": name, "mode": mode, **wall_us(jax.jit(chain), on_device[32], CHAIN)})
    return rows


def several_gpus(tokens: int) -> list[dict[str, Any]]:
    ranks = jax.device_count()
    topology = {8: lplb.topology.cube, 4: partial(lplb.topology.torus, 2, 2)}.get(
        ranks, partial(lplb.topology.ring, ranks)
    )()
    placement = lplb.Placement.from_topology(
        topology, num_experts=common.NUM_EXPERTS, num_ranks=ranks, redundants_per_rank=2
    )
    _, ids = common.instances(tokens * ranks, ranks)
    mesh = jax.make_mesh((ranks,), ("ep",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(ids[32], jax.NamedSharding(mesh, P("ep")))

    def collective(sync: str, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        load = ids[:32].reshape(-1)
        total = jax.lax.psum(load, "ep") if sync == "psum" else jnp.sum(jax.lax.all_gather(load, "ep"), axis=0)
        return ids + total[0], total[0]

    where = {"bench": "balance", "case": f"{ranks}x2", "tokens": tokens, "gpus": ranks}
    rows = []
    for name, call in (
        ("lookup", partial(home, placement)),
        *((f"{sync} alone", partial(collective, sync)) for sync in ("all_gather", "psum")),
        *(
            (f"balance {sync}", partial(balanced, placement, axis_name="ep", sync=sync, implementation="ffi"))
            for sync in ("all_gather", "psum")
        ),
    ):
        for mode, chain in chains(call).items():
            run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False))
            rows.append({**where, "kernel": name, "mode": mode, **wall_us(run, sharded, CHAIN)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="tokens of a rank, top-8")
    parser.add_argument("--cases", nargs="+", choices=common.CASES, default=["8x1", "8x2", "16x2", "32x2"])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/balance.json"))
    args = parser.parse_args()
    rows = []
    for tokens in args.tokens:
        if jax.device_count() > 1:
            rows += several_gpus(tokens)
        else:
            for case in args.cases:
                rows += one_gpu(case, tokens)
    flags = os.environ.get("XLA_FLAGS", "")
    common.write(args.out, [{**row, "xla_flags": flags} if flags else row for row in rows])


if __name__ == "__main__":
    main()
