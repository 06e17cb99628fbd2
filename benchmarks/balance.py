"""Time of `balance` inside jit: `python benchmarks/balance.py`.

On one GPU: device time of each kernel, from JAX's profiler, one call for each of 64 log-normal instances; and wall
time of a call in a chain of 16, unrolled and scanned, each call depending on the one before. On several GPUs: the same
chains inside shard_map over all of them, and a single call, with each `sync`. Baselines: lookups of the home expert,
which is what runs without balancing; what brings the ranks' counts to all, alone; and, with
`--noop build/bench/liblplb_noop.so`, the same step with all other custom calls replaced by ones that launch as many
empty kernels, which is what any implementation of such calls costs. Steps take turns within each repetition, so that
what drifts, drifts for all.
"""

import argparse
import contextlib
import ctypes
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_lplb as lplb
from jax_lplb import _ffi, _peer

CHAIN = 16
KERNELS = {
    "count": ("histogram_kernel", "scan_kernel", "count_kernel"),
    "solve": ("solve_kernel", "edge_balance_kernel"),
    "assign": ("shares_kernel", "assign_kernel"),
}
LAUNCHES = {"lplb_count": 1, "lplb_solve_assign": 2}  # kernels of each custom call


def wall_us(runs: list[Callable[[Any], Any]], arguments: Any, repeats: int) -> np.ndarray:
    """Microseconds of each, [runs, repeats]. They take turns."""
    times = np.zeros((len(runs), repeats))
    for repeat in range(-3, repeats):  # the first ones warm up
        for i, run in enumerate(runs):
            begin = time.perf_counter()
            jax.block_until_ready(run(arguments))
            if repeat >= 0:
                times[i, repeat] = (time.perf_counter() - begin) * 1e6
    return times


def steps(call: Callable[[jax.Array], tuple[jax.Array, jax.Array]]) -> dict[str, tuple[Callable, int]]:
    """A single `call`, and unrolled and scanned chains of it, with the number of calls.

    `call` returns ids and a value that is never negative.
    """

    def step(ids: jax.Array) -> jax.Array:
        physical_ids, value = call(ids)
        return jnp.where(value < 0, physical_ids, ids)  # the compiler cannot know that it is always ids

    def unrolled(ids: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            ids = step(ids)
        return ids

    def scanned(ids: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (step(x), None), ids, length=CHAIN)[0]

    return {"single": (step, 1), "unrolled": (unrolled, CHAIN), "scanned": (scanned, CHAIN)}


def compiled(step: Callable, ids: jax.Array, name: str) -> Callable:
    """With progress, because several GPUs' steps take seconds each."""
    begin = time.perf_counter()
    run = jax.jit(step)
    jax.block_until_ready(run(ids))
    print(f"compiled {name} in {time.perf_counter() - begin:.1f} s", flush=True)
    return run


def register_noop(library: pathlib.Path | None) -> bool:
    """Whether there are no-op custom calls to compare with."""
    if library is None or jax.default_backend() != "gpu":
        print("no comparison with no-op custom calls: it takes --noop (make bench-build) and GPUs", flush=True)
        return False
    handler = jax.ffi.pycapsule(ctypes.CDLL(str(library.resolve())).LplbNoop)
    jax.ffi.register_ffi_target("lplb_noop", handler, platform="CUDA")
    return True


def noops() -> contextlib.AbstractContextManager:
    """Within it, what is traced calls no-ops of as many launches in place of the custom calls."""
    real = _ffi.call

    def call(target: str, *arguments: Any, **attributes: Any) -> list[jax.Array]:
        if target not in LAUNCHES:  # what ranks send each other stays, as a collective does
            return real(target, *arguments, **attributes)
        return real("lplb_noop", *arguments, launches=np.int64(LAUNCHES[target]), **attributes)

    return mock.patch.object(_ffi, "call", call)


def balanced(placement: lplb.Placement, ids: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    out = lplb.balance(ids, placement, **options)
    return out.physical_ids, out.rank_load[0]


def home(placement: lplb.Placement, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    physical_ids = jnp.asarray(placement.log2phy)[ids, 0]
    return physical_ids, physical_ids[0, 0]


def profile(run: Callable, inputs: Iterator[Any], gpu: int = 0) -> list[tuple[str, float]]:
    """Names and microseconds of all kernels that the calls launch on a GPU, in order."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for ids in inputs:
                jax.block_until_ready(run(ids))
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = [
            (event.start_ns, event.name, event.duration_ns / 1e3)
            for plane in data.planes
            if plane.name == f"/device:GPU:{gpu}"
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return [(name, duration) for _, name, duration in sorted(events)]


def one_gpu(case: str, tokens: int, solver: str, repeats: int) -> list[dict[str, Any]]:
    placement = common.CASES[case]()
    _, ids = common.instances(tokens, placement.num_ranks, placement.num_experts)
    on_device = [jax.device_put(x) for x in ids]
    call = partial(balanced, solver=solver, implementation="ffi")
    where = {"bench": "balance", "case": case, "tokens": tokens, "gpus": 1, "solver": solver}
    rows = []
    if jax.default_backend() == "gpu":
        run = jax.jit(partial(lplb.balance, placement=placement, solver=solver, implementation="ffi"))
        jax.block_until_ready([run(x) for x in on_device[:3]])
        events = profile(run, on_device)
        assert len(events) % len(ids) == 0, "every call launches the same kernels"
        per_call = np.array([duration for _, duration in events]).reshape(len(ids), -1)
        names = [name for name, _ in events[: per_call.shape[1]]]
        for kernel, parts in KERNELS.items():
            columns = [i for i, name in enumerate(names) if any(part in name for part in parts)]
            rows.append({**where, "kernel": kernel, **common.statistics(per_call[:, columns].sum(axis=1))})
        rows.append({**where, "kernel": f"all {len(names)}", **common.statistics(per_call.sum(axis=1))})
        rows.append({**where, **of_select(placement, common.instances(tokens, placement.num_ranks)[0])})
    for mode in ("single", "unrolled", "scanned"):
        names, runs = ("lookup", "balance"), []
        for name, one in zip(names, (home, call), strict=True):
            step, calls = steps(partial(one, placement))[mode]
            runs.append(compiled(step, on_device[32], f"{case} {name} {mode}"))
        for name, times in zip(names, wall_us(runs, on_device[32], repeats), strict=True):
            rows.append({**where, "kernel": name, "mode": mode, **common.statistics(times / calls)})
    return rows


def of_select(placement: lplb.Placement, loads: np.ndarray) -> dict[str, Any]:
    """Device time of all kernels of `Placement.select`, a call for each load."""
    on_device = [jax.device_put(load) for load in loads]
    select = jax.jit(lplb.Placement.select)
    placement = jax.device_put(placement)
    run = partial(select, placement)
    jax.block_until_ready([run(load) for load in on_device[:3]])
    per_call = np.array([duration for _, duration in profile(run, iter(on_device))]).reshape(len(on_device), -1)
    statistics = common.statistics(per_call.sum(axis=1))
    return {"bench": "select", "kernel": f"select, {per_call.shape[1]} kernels", **statistics}


def several_gpus(
    tokens: int, solver: str, with_noops: bool, repeats: int
) -> tuple[list[dict[str, Any]], list[Callable[[], int]]]:
    """Rows, and for each what counts the launches of its run on one GPU (later: profiling slows what comes after)."""
    ranks = jax.device_count()
    placement = lplb.Placement.from_topology(
        common.topology_of(ranks), num_experts=common.NUM_EXPERTS, num_ranks=ranks, redundants_per_rank=2
    )
    _, ids = common.instances(tokens * ranks, ranks, number=3)
    mesh = jax.make_mesh((ranks,), ("ep",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(ids[1], jax.NamedSharding(mesh, P("ep")))

    gathers = {"all_gather": jax.lax.all_gather, "peer": _peer.gather}

    def sync_alone(ids: jax.Array, sync: str) -> tuple[jax.Array, jax.Array]:
        load = ids[:32].reshape(-1)
        total = jax.lax.psum(load, "ep") if sync == "psum" else jnp.sum(gathers[sync](load, "ep"), axis=0)
        return ids + total[0], total[0]

    def balance(ids: jax.Array, sync: str) -> tuple[jax.Array, jax.Array]:
        return balanced(placement, ids, axis_name="ep", sync=sync, solver=solver, implementation="ffi")

    def noop(ids: jax.Array, sync: str) -> tuple[jax.Array, jax.Array]:
        with noops():
            return balance(ids, sync)

    calls, sync_of = {"lookup": partial(home, placement)}, {}
    for sync in ("all_gather", "peer", "psum"):
        of_sync = {f"{sync} alone": partial(sync_alone, sync=sync)}
        if with_noops:
            of_sync[f"no-op {sync}"] = partial(noop, sync=sync)
        of_sync[f"balance {sync}"] = partial(balance, sync=sync)
        calls, sync_of = calls | of_sync, sync_of | dict.fromkeys(of_sync, sync)

    rows, launches = [], []
    for mode in ("single", "unrolled", "scanned"):
        runs = []
        for name, call in calls.items():
            step, number = steps(call)[mode]
            on_ranks = jax.shard_map(step, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
            runs.append(compiled(on_ranks, sharded, f"{name} {mode}"))
        times = dict(zip(calls, wall_us(runs, sharded, repeats) / number, strict=True))
        for (name, of_name), run in zip(times.items(), runs, strict=True):
            row = {"bench": "balance", "case": f"{ranks}x2", "tokens": tokens, "gpus": ranks, "solver": solver}
            row |= {"kernel": name, "mode": mode, **common.statistics(of_name)}
            if name in sync_of:
                over = np.median(of_name) - np.median(times["lookup"])
                row |= {"sync": sync_of[name], "over_lookup": round(float(over), 1)}
            floor = times.get(name.replace("balance", "no-op"))
            if name.startswith("balance") and floor is not None:
                row["of_noop"] = round(float(np.median(of_name) / np.median(floor)), 3)
            rows.append(row)
            launches.append(lambda run=run: len(profile(run, iter([sharded]))))
    return rows, launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="tokens of a rank, top-8")
    parser.add_argument("--cases", nargs="+", choices=common.CASES, default=["8x1", "8x2", "16x2", "32x2"])
    parser.add_argument("--solver", choices=["auto", "ipm", "edge_balance"], default="auto")
    parser.add_argument("--noop", type=pathlib.Path, help="liblplb_noop.so, for several GPUs")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/balance.json"))
    args = parser.parse_args()
    several = jax.device_count() > 1
    with_noops = several and register_noop(args.noop)
    rows, launches = [], []
    for tokens in args.tokens:
        if several:
            new_rows, new_launches = several_gpus(tokens, args.solver, with_noops, args.repeats)
            rows, launches = rows + new_rows, launches + new_launches
        else:
            for case in args.cases:
                rows += one_gpu(case, tokens, args.solver, args.repeats)
    if jax.default_backend() == "gpu":
        for row, count in zip(rows, launches, strict=False):  # one GPU's rows have none
            row["launches"] = count()
    flags = os.environ.get("XLA_FLAGS", "")
    common.write(args.out, [{**row, "xla_flags": flags} if flags else row for row in rows])
    of_single = {(row["tokens"], row["kernel"]): row.get("launches") for row in rows if row.get("mode") == "single"}
    for (tokens, kernel), count in of_single.items():
        if count != of_single.get((tokens, kernel.replace("balance", "no-op")), count):
            sys.exit("no-ops launch more or fewer kernels than the custom calls: LAUNCHES is out of date")


if __name__ == "__main__":
    main()
