"""Time and memory of the Flax MoE layer on several GPUs: `python benchmarks/layer.py --traces FOLDER`.

The layer (bfloat16, d_model 2048, 64 experts of hidden width 1408, top-6) over all devices, two redundant experts a
rank along a torus, the cube or a ring, is fed tokens whose router picks what was recorded of DeepSeek-V2-Lite (wrapped
around), or drawn with log-normal popularity of the experts, or even. Recorded tokens are dealt to the ranks in
turn, as shuffled data would be. Experts are in logical order, equally many a rank, and the copies are of the heaviest
in the long run: of the whole recording, or by the popularity that the batch was drawn from. Modes:

  even        all experts equally often, each token's at random, no copies, no balance: as fast as the layer can be
  unbalanced  no copies, no balance
  balanced    copies travel in the layer, at each call
  batch       copies are chosen by the batch itself, nothing is known of the past
  prepared    copies (and weights in bfloat16) are there before: what further micro-batches of a step cost. Beside it
              `even prepared`, `unbalanced prepared` and `batch prepared`, likewise without the cast to bfloat16; each
              call takes the slots that the one before returns

With `--baselines` also `capacity` and `gather`, layers in plain JAX on the same loads, see plain_layers.py; `dropped`
is the share of choices that they drop.

Each runs with each of `--dispatch`, and with the smallest of a few buffer factors that needs no second round, and for
`batch` none below the target of its copies; the smallest of all is in the column `smallest_factor`. Times are of calls
in a row, as training makes them, up to 50 or some 80 ms: a call alone takes 0.5 to 1 ms more, until the host has
launched it. Modes take turns, in another order each time, since GPUs lower their clocks after what takes much power.
`share_of_even` is throughput over that of `even`, or `even prepared`, of the same dispatch, and of baselines over that
of the fastest `even`; `temp_mb` is what XLA allocates beside arguments and results.

`limit_share`, of `even` and `batch`, is the time of what no such layer is spared over the time of the layer: grouped
matmuls of the busiest rank's slots alone, on rows that are there (`products_us`), and after them what the busiest rank
gets over its links (`link_mb`: tokens, and sums that come back; with the backward pass twice that) at
`--link-gb-per-s`.
"""

import argparse
import os
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import plain_layers
from dispatch import link_mb
from flax import nnx
from rich.progress import Progress

import jax_lplb as lplb
from jax_lplb import _dispatch
from jax_lplb._grouped_matmul import grouped_matmul, grouped_matmul_transposed, grouped_outer, has_hopper
from jax_lplb.flax import Metrics, MoE

EXPERTS, TOP_K, REDUNDANTS = 64, 6, 2
FACTORS = (1.0, 1.01, 1.02, 1.03, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
OF_PREPARED = {  # the same with prepared slots
    "even": "even prepared",
    "unbalanced": "unbalanced prepared",
    "balanced": "prepared",
    "batch": "batch prepared",
}
MODES = (*OF_PREPARED, *OF_PREPARED.values())
PASSES = ("forward", "forward+backward")
BATCH_MS = 80.0


class Load(NamedTuple):
    """Ids of a batch, and the load that placements know."""

    name: str
    ids: np.ndarray  # int32 [tokens, TOP_K]
    past: np.ndarray  # float32 [EXPERTS]


def even(tokens: int) -> Load:
    """Of each EXPERTS tokens each takes TOP_K different experts, and each expert as many tokens."""
    rng = np.random.default_rng(0)
    ids = []
    for first in range(0, tokens, EXPERTS):
        shifts = rng.permutation(EXPERTS)[:TOP_K]
        ids.append(rng.permutation(EXPERTS)[(np.arange(min(EXPERTS, tokens - first))[:, None] + shifts) % EXPERTS])
    return Load("even", np.concatenate(ids).astype(np.int32), np.ones(EXPERTS, np.float32))


def lognormal(tokens: int, sigma: float) -> Load:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, sigma, EXPERTS)
    ids = common.picks(rng, logits, tokens, TOP_K)
    return Load(f"sigma {sigma}", ids, np.exp(logits).astype(np.float32))


@cache
def recorded(folder: pathlib.Path, layer: int) -> np.ndarray:
    with np.load(folder / "deepseek_v2_lite_topk_ids.npz", allow_pickle=False) as archive:
        tasks = ("intent", "law", "summary", "translation")
        return np.concatenate([archive[f"{task}_ids"][:, layer] for task in tasks]).astype(np.int32)


def deepseek(tokens: int, folder: pathlib.Path, layer: int) -> Load:
    ids = recorded(folder, layer)
    past = np.bincount(ids.ravel(), minlength=EXPERTS).astype(np.float32)
    dealt = np.resize(ids, (tokens, TOP_K)).reshape(-1, jax.device_count(), TOP_K).swapaxes(0, 1)
    return Load(f"deepseek layer {layer}", dealt.reshape(tokens, TOP_K), past)


def placement_for(past: np.ndarray, redundants: int) -> lplb.Placement:
    ranks = jax.device_count()
    placement = lplb.Placement.from_topology(
        common.topology_of(ranks), num_experts=EXPERTS, num_ranks=ranks, redundants_per_rank=redundants
    )
    return jax.tree.map(np.asarray, placement.select(past))  # whose order is known within a jit


def inputs(ids: np.ndarray, d_model: int, sharding: jax.NamedSharding) -> jax.Array:
    """bfloat16 [tokens, d_model]: random, but for the columns that the router reads."""

    def draw() -> jax.Array:
        x = jax.random.normal(jax.random.key(0), (len(ids), d_model), jnp.bfloat16)
        chosen = jnp.zeros((len(ids), EXPERTS), jnp.bfloat16).at[jnp.arange(len(ids))[:, None], ids].set(4)
        return x.at[:, :EXPERTS].set(chosen)

    return jax.jit(draw, out_shardings=sharding)()


def slots_of(ids: jax.Array, placement: lplb.Placement, mesh: jax.sharding.Mesh) -> np.ndarray:
    """int32 [ranks, tokens, TOP_K]: the slot of all ranks that each choice of each rank's tokens goes to."""
    balance = jax.shard_map(
        lambda ids: lplb.balance(ids, placement, axis_name="ep").physical_ids,
        mesh=mesh,
        in_specs=jax.P("ep"),
        out_specs=jax.P("ep"),
    )
    return np.asarray(jax.jit(balance)(ids)).reshape(placement.num_ranks, -1, TOP_K)


def smallest_factor(slots: np.ndarray, slots_per_rank: int, dispatch: str) -> float:
    """Of the most choices of a rank over their mean; with all_to_all of those of each pair of ranks."""
    ranks = len(slots)
    owner = slots.reshape(ranks, -1) // slots_per_rank
    of_pairs = np.stack([np.bincount(of_source, minlength=ranks) for of_source in owner])
    if dispatch == "all_to_all":
        return of_pairs.max() * ranks / owner.shape[1]
    return of_pairs.sum(axis=0).max() / owner.shape[1]


def factor_of(smallest: float, placement: lplb.Placement) -> float:
    """Who does not know the batch makes room for what its copies are chosen to reach: one factor for most loads."""
    target = 1.0 if placement.planning is None else placement.planning.target
    return next((factor for factor in FACTORS if factor >= max(smallest, target)), float(jax.device_count()))


@cache
def product_operands(rows: int, slots: int, d_model: int, d_expert: int) -> tuple[jax.Array, ...]:
    """Of all grouped matmuls, random, on one device."""

    def draw() -> tuple[jax.Array, ...]:
        widths = {"rows": d_model, "gate and up": 2 * d_expert, "hidden": d_expert, "result": d_model}
        shapes = [(rows, width) for width in widths.values()]
        shapes += [(slots, d_model, 2 * d_expert), (slots, d_expert, d_model)]
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))

    return jax.jit(draw)()


def grouped_matmul_here(choice: str | None) -> str | None:
    """The choice, or that of `MoE`; but where that might be jax.lax.ragged_dot, which is no measure on GPUs, tokamax.

    `MoE` raises where it is missing.
    """
    return "tokamax" if choice is None and jax.default_backend() == "gpu" and not has_hopper() else choice


class Pass(NamedTuple):
    """A jitted pass of the layer with what it takes; `key` says what it is compiled for."""

    key: tuple
    function: Any
    arguments: list[Any]
    hands_on: int | None = None  # the argument in whose place the first result is, for the call after it


def forward_and_backward(
    key: tuple, forward: Any, backward: Any, arguments: list[Any], hands_on: int | None = None
) -> dict[str, Pass]:
    functions = zip(PASSES, (forward, backward), strict=True)
    return {
        name: Pass((name, *key), jax.jit(function, donate_argnums=hands_on), arguments, hands_on)
        for name, function in functions
    }


def loss_of(forward: Any) -> Any:
    """The loss that is differentiated, of a function of ..., tokens; beside it what else the function returns."""

    def loss(*operands: Any) -> tuple[jax.Array, Any]:
        result, other = forward(*operands)
        return jnp.sum(result.astype(jnp.float32) * operands[-1]), other

    return loss


class Runner:
    """The layer, and its compiled passes: one for all loads that take equally large buffers."""

    def __init__(self, mesh: jax.sharding.Mesh, d_model: int, d_expert: int, options: dict[str, Any]) -> None:
        self.mesh, self.d_model, self.d_expert, self.options = mesh, d_model, d_expert, options
        self.compiled: dict[Any, Any] = {}
        self.layers: dict[Any, MoE] = {}  # by what of a placement is static

    def layer(self, placement: lplb.Placement) -> MoE:
        """The layer, which is made once."""
        key = (placement.slots_per_rank, placement.planning)
        if key not in self.layers:
            make = partial(MoE, placement=placement, mesh=self.mesh, axis_name="ep", **self.options)
            # Within a jit each device draws its own experts.
            sizes = self.d_model, EXPERTS, self.d_expert, TOP_K
            layer = nnx.jit(lambda: make(*sizes, rngs=nnx.Rngs(0)))()
            router = layer.router[...]  # reads the first columns of its tokens
            layer.router[...] = jax.device_put(jnp.eye(*router.shape, dtype=router.dtype), router.sharding)
            self.layers[key] = layer
        return self.layers[key]

    def split(self, placement: lplb.Placement, factor: float, dispatch: str) -> tuple[Any, Any]:
        """Graph and state of the layer."""
        layer = self.layer(placement)
        layer.placement.set_value(jax.device_put(placement, jax.NamedSharding(self.mesh, jax.P())))
        layer.buffer_factor, layer.dispatch = factor, dispatch
        graph, state = nnx.split(layer)
        return graph, jax.tree.map(lambda leaf: leaf, state)  # not the layer's own variables

    def passes(
        self, placement: lplb.Placement, factor: float, dispatch: str, x: jax.Array, prepared: bool
    ) -> dict[str, Pass]:
        graph, state = self.split(placement, factor, dispatch)
        sizes = (placement.slots_per_rank, placement.planning, factor, dispatch, prepared, x.shape)
        slots = None
        if prepared:
            prepare = Pass(("prepare", *sizes[:2]), jax.jit(lambda state: nnx.merge(graph, state).prepare()), [state])
            self.compile([prepare])
            slots = self.run(prepare)

        def call(state: Any, slots: Any, x: jax.Array) -> tuple[jax.Array, tuple[Metrics, Any]]:
            layer = nnx.merge(graph, state)
            if prepared:
                y, metrics, slots = layer(x, slots, return_slots=True)
            else:
                y, metrics = layer(x)
            return y, (metrics, slots)

        def forward(state: Any, slots: Any, x: jax.Array) -> Any:
            y, (metrics, slots) = call(state, slots, x)
            return slots, y, metrics

        def backward(state: Any, slots: Any, x: jax.Array) -> Any:
            params, rest = state.filter(nnx.Param), state.filter(nnx.Not(nnx.Param))
            loss = loss_of(lambda params, slots, x: call(nnx.merge_state(params, rest), slots, x))
            # With prepared slots, gradients stay with them until the last micro-batch.
            gradient = jax.grad(loss, argnums=(1, 2) if prepared else (0, 2), has_aux=True)
            gradients, (metrics, slots) = gradient(params, slots, x)
            return slots, gradients, metrics  # the first result of an argument's shape takes its place

        return forward_and_backward(sizes, forward, backward, [state, slots, x], 1)

    def plain_passes(self, mode: str, placement: lplb.Placement, factor: float, x: jax.Array) -> dict[str, Pass]:
        """Of a baseline, with the weights of the layer, whose placement has each expert in logical order and once."""
        layer = self.layer(placement)
        params = {name: getattr(layer, name)[...] for name in ("router", "w_in", "w_out")}
        forward = plain_layers.make(mode, self.mesh, TOP_K, factor, self.options["grouped_matmul"])
        backward = jax.grad(loss_of(forward), argnums=(0, 1), has_aux=True)
        return forward_and_backward((mode, factor, x.shape), forward, backward, [params, x])

    def products(self, group_sizes: np.ndarray, rows: int) -> dict[str, Pass]:
        """The grouped matmuls of the passes, for slots with so many rows each, in a buffer of `rows`."""
        matmul, transposed, outer = (
            partial(function, implementation=self.options["grouped_matmul"])
            for function in (grouped_matmul, grouped_matmul_transposed, grouped_outer)
        )

        def forward(rows: Any, gate_and_up: Any, hidden: Any, result: Any, w_in: Any, w_out: Any, sizes: Any) -> Any:
            return matmul(rows, w_in, sizes), matmul(hidden, w_out, sizes)

        def backward(rows: Any, gate_and_up: Any, hidden: Any, result: Any, w_in: Any, w_out: Any, sizes: Any) -> Any:
            of_out = outer(hidden, result, sizes), transposed(result, w_out, sizes)
            of_in = outer(rows, gate_and_up, sizes), transposed(gate_and_up, w_in, sizes)
            return forward(rows, gate_and_up, hidden, result, w_in, w_out, sizes), of_out, of_in

        operands = product_operands(rows, len(group_sizes), self.d_model, self.d_expert)
        arguments = [*operands, jnp.asarray(group_sizes, jnp.int32)]
        return forward_and_backward(("products", rows, len(group_sizes)), forward, backward, arguments)

    def compile(self, passes: list[Pass]) -> None:
        """Several at a time: it takes minutes otherwise."""
        begin = time.perf_counter()
        new = {one.key: one for one in passes if one.key not in self.compiled}
        lowered = [one.function.lower(*one.arguments) for one in new.values()]
        with ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1)) as pool:
            self.compiled |= zip(new, pool.map(lambda one: one.compile(), lowered), strict=True)
        if new:
            print(f"compiled {len(new)} passes in {time.perf_counter() - begin:.0f} s", flush=True)

    def run(self, one: Pass) -> Any:
        results = self.compiled[one.key](*one.arguments)
        if one.hands_on is None:
            return results
        one.arguments[one.hands_on] = results[0]
        return results[1:]


def limit(runner: Runner, slots: np.ndarray, placement: lplb.Placement) -> tuple[dict[str, Pass], float]:
    """The products of the busiest rank, and megabytes over links of the busiest one, of a forward pass."""
    ranks, slots_per_rank = placement.num_ranks, placement.slots_per_rank
    sizes = np.bincount(slots.reshape(-1), minlength=ranks * slots_per_rank).reshape(ranks, -1)
    factor = factor_of(smallest_factor(slots, slots_per_rank, "peer"), placement)
    rows = _dispatch.capacity_of(factor * slots[0].size, slots.size)
    row_bytes = runner.d_model * jnp.dtype(jnp.bfloat16).itemsize
    return runner.products(sizes[sizes.sum(axis=1).argmax()], rows), sum(link_mb(slots, slots_per_rank, row_bytes))


def times_us(runs: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, np.ndarray]:
    """Microseconds of a call, of several in a row; all take turns, in another order each time."""
    calls = {}
    for key, run in runs.items():
        jax.block_until_ready([run() for _ in range(2)])
        begin = time.perf_counter()
        jax.block_until_ready(run())
        calls[key] = int(np.clip(BATCH_MS / 1e3 / (time.perf_counter() - begin), 1, 50))
    times = {key: np.zeros(repeats) for key in runs}
    order, rng = list(runs), np.random.default_rng(0)
    for repeat in range(repeats):
        rng.shuffle(order)  # the clock depends on what ran before
        for key in order:
            run = runs[key]
            begin = time.perf_counter()
            for _ in range(calls[key]):
                result = run()
            jax.block_until_ready(result)
            times[key][repeat] = (time.perf_counter() - begin) * 1e6 / calls[key]
            del result
    return times


def measure(
    runner: Runner,
    loads: list[Load],
    tokens: int,
    repeats: int,
    modes: list[str],
    dispatches: list[str],
    passes: list[str],
    baseline_only: bool,
    baselines: bool,
    link_gb_per_s: float,
) -> list[dict[str, Any]]:
    sharding = jax.NamedSharding(runner.mesh, jax.P("ep"))
    cases = []  # row, passes
    limits: dict[Any, Any] = {}  # by load and mode: products, and megabytes over links
    for load in loads:
        x = inputs(load.ids, runner.d_model, sharding)
        ids = jax.device_put(load.ids, sharding)
        of_load = {"bench": "layer", "case": f"{jax.device_count()}x{REDUNDANTS}", "load": load.name}
        of_load["tokens_per_rank"] = tokens
        for mode, dispatch in (("capacity", "all_to_all"), ("gather", "all_gather")) if baselines else ():
            placement = placement_for(load.past, 0)
            row = {**of_load, "mode": mode, "dispatch": dispatch, "factor": plain_layers.CAPACITY_FACTOR}
            if mode == "gather":
                smallest = smallest_factor(slots_of(ids, placement, runner.mesh), placement.slots_per_rank, dispatch)
                row |= {"smallest_factor": round(smallest, 4), "factor": factor_of(smallest, placement)}
            every = runner.plain_passes(mode, placement, row["factor"], x)
            cases.append((row, {key: every[key] for key in passes}))
        balanced = () if load.name == "even" and baseline_only else ("balanced", "batch")
        for mode in ("even" if load.name == "even" else "unbalanced", *balanced):
            if not {mode, OF_PREPARED[mode]} & set(modes):
                continue
            placement = placement_for(load.past, REDUNDANTS if mode == "balanced" else 0)
            if mode == "batch":
                placement = lplb.Placement.per_batch(
                    num_experts=EXPERTS, num_ranks=jax.device_count(), redundants_per_rank=REDUNDANTS
                )
            slots = slots_of(ids, placement, runner.mesh)
            if mode in ("even", "batch"):
                limits[load.name, mode] = limit(runner, slots, placement)
            for dispatch in dispatches:
                smallest = smallest_factor(slots, placement.slots_per_rank, dispatch)
                factor = factor_of(smallest, placement)
                for prepared in (False, True):
                    name = OF_PREPARED[mode] if prepared else mode
                    if name not in modes:
                        continue
                    row = {**of_load, "mode": name, "dispatch": dispatch}
                    row |= {"smallest_factor": round(smallest, 4), "factor": factor}
                    every = runner.passes(placement, factor, dispatch, x, prepared)
                    cases.append((row, {key: every[key] for key in passes}))
    products = {(*key, name): of_limit[name] for key, (of_limit, _) in limits.items() for name in passes}
    runner.compile([one for _, of_case in cases for one in of_case.values()] + list(products.values()))

    rows, runs = [], {}
    for row, of_case in cases:
        _, metrics = runner.run(of_case[passes[0]])
        if row["mode"] in plain_layers.LAYERS:
            of_batch = {"dropped": round(float(metrics), 4)}
            assert row["mode"] == "capacity" or metrics == 0, "the buffer is as large as the batch needs"
        else:
            assert metrics.rounds == 1, "the smallest factor needs no second round"
            assert metrics.load.sum() == tokens * jax.device_count() * TOP_K
            imbalances = ("contiguous", "home", "optimum", "balanced")
            of_batch = {key: round(float(getattr(metrics, key)), 4) for key in imbalances}
        for name in passes:
            one = of_case[name]
            temp = runner.compiled[one.key].memory_analysis().temp_size_in_bytes
            runs[len(rows)] = partial(runner.run, one)
            rows.append({**row, "pass": name, **of_batch, "temp_mb": round(temp / 2**20)})
    times = times_us(runs | {key: partial(runner.run, one) for key, one in products.items()}, repeats)
    for i, row in enumerate(rows):
        row |= common.statistics(times[i])
    for row in rows:
        fastest = "even prepared" if "prepared" in row["mode"] and "even prepared" in modes else "even"
        even = [one for one in rows if one["mode"] == fastest and one["pass"] == row["pass"]]
        if row["mode"] not in plain_layers.LAYERS:
            even = [one for one in even if one["dispatch"] == row["dispatch"]]
        row["share_of_even"] = round(min(one["median_us"] for one in even) / row["median_us"], 4)
        if (row["load"], row["mode"]) in limits:
            row["products_us"] = common.statistics(times[row["load"], row["mode"], row["pass"]])["median_us"]
            megabytes = limits[row["load"], row["mode"]][1] * (1 if row["pass"] == "forward" else 2)
            row["link_mb"] = round(megabytes, 1)
            limit_us = row["products_us"] + megabytes / link_gb_per_s * 1e3
            row["limit_share"] = round(limit_us / row["median_us"], 4)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=pathlib.Path, help="folder of deepseek_v2_lite_topk_ids.npz")
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 15], help="of the trace, 0 to 25")
    parser.add_argument("--sigmas", type=float, nargs="*", default=[0.3, 0.6, 1.0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="tokens of a rank")
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--d-expert", type=int, default=1408)
    parser.add_argument("--dispatch", nargs="+", choices=["all_to_all", "peer", "ring"], default=["all_to_all", "peer"])
    parser.add_argument("--grouped-matmul", choices=["tokamax", "ragged_dot"], help="by default: by platform")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="those beside even")
    parser.add_argument("--baseline-only", action="store_true", help="no balancing of the even load")
    parser.add_argument("--baselines", action="store_true", help="layers in plain JAX, too")
    parser.add_argument("--link-gb-per-s", type=float, default=300.0, help="that a rank gets over its links")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/layer.json"))
    args = parser.parse_args()
    mesh = jax.make_mesh((jax.device_count(),), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"grouped_matmul": grouped_matmul_here(args.grouped_matmul)}
    runner = Runner(mesh, args.d_model, args.d_expert, options)
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        for tokens in progress.track(args.tokens, description="batch sizes"):
            total = tokens * jax.device_count()
            loads = [even(total)] + [lognormal(total, sigma) for sigma in args.sigmas]
            if args.traces is not None:
                loads += [deepseek(total, args.traces, layer) for layer in args.layers]
            rows += measure(
                runner,
                loads,
                tokens,
                args.repeats,
                ["even", *args.modes],
                args.dispatch,
                args.passes,
                args.baseline_only,
                args.baselines,
                args.link_gb_per_s,
            )
            flags = os.environ.get("XLA_FLAGS", "")
            common.write(args.out, [{**row, "xla_flags": flags} if flags else row for row in rows])


if __name__ == "__main__":
    main()
