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
              `even prepared` and `unbalanced prepared`, likewise without the cast to bfloat16

Each runs with each of `--dispatch`, and with the smallest of a few buffer factors that needs no second round; the
smallest of all is in the column `smallest_factor`. Times are of calls in a row, as training makes them, up to 50 or
some 80 ms: a call alone takes 0.5 to 1 ms more, until the host has launched it. Modes take turns. `share_of_even` is
throughput over that of `even`, or `even prepared`, of the same dispatch; `temp_mb` is what XLA allocates beside
arguments and results.
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
from flax import nnx
from rich.progress import Progress

import jax_lplb as lplb
from jax_lplb.flax import Metrics, MoE

EXPERTS, TOP_K, REDUNDANTS = 64, 6, 2
FACTORS = (1.0, 1.01, 1.02, 1.03, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
MODES = ("even", "unbalanced", "balanced", "batch", "even prepared", "unbalanced prepared", "prepared")
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
    return placement.select(past)


def inputs(ids: np.ndarray, d_model: int, sharding: jax.NamedSharding) -> jax.Array:
    """bfloat16 [tokens, d_model]: random, but for the columns that the router reads."""

    def draw() -> jax.Array:
        x = jax.random.normal(jax.random.key(0), (len(ids), d_model), jnp.bfloat16)
        chosen = jnp.zeros((len(ids), EXPERTS), jnp.bfloat16).at[jnp.arange(len(ids))[:, None], ids].set(4)
        return x.at[:, :EXPERTS].set(chosen)

    return jax.jit(draw, out_shardings=sharding)()


def smallest_factor(ids: np.ndarray, placement: lplb.Placement, mesh: jax.sharding.Mesh, dispatch: str) -> float:
    """Of the most ids of a rank over their mean; with all_to_all of those of each pair of ranks."""
    ranks = placement.num_ranks
    balance = jax.shard_map(
        lambda ids: lplb.balance(ids, placement, axis_name="ep").physical_ids,
        mesh=mesh,
        in_specs=jax.P("ep"),
        out_specs=jax.P("ep"),
    )
    owner = np.asarray(jax.jit(balance)(ids)).reshape(ranks, -1) // placement.slots_per_rank
    of_pairs = np.stack([np.bincount(of_source, minlength=ranks) for of_source in owner])
    if dispatch == "all_to_all":
        return of_pairs.max() * ranks / owner.shape[1]
    return of_pairs.sum(axis=0).max() / owner.shape[1]


class Pass(NamedTuple):
    """A jitted pass of the layer with what it takes; `key` says what it is compiled for."""

    key: tuple
    function: Any
    arguments: tuple


class Runner:
    """The layer, and its compiled passes: one for all loads that take equally large buffers."""

    def __init__(self, mesh: jax.sharding.Mesh, d_model: int, d_expert: int, options: dict[str, Any]) -> None:
        self.mesh, self.d_model, self.d_expert, self.options = mesh, d_model, d_expert, options
        self.compiled: dict[Any, Any] = {}
        self.layers: dict[Any, MoE] = {}  # by what of a placement is static

    def split(self, placement: lplb.Placement, factor: float, dispatch: str) -> tuple[Any, Any]:
        """Graph and state of the layer, which is made once."""
        key = (placement.slots_per_rank, placement.planning)
        if key not in self.layers:
            layer = MoE(
                self.d_model,
                EXPERTS,
                self.d_expert,
                TOP_K,
                placement=placement,
                mesh=self.mesh,
                axis_name="ep",
                rngs=nnx.Rngs(0),
                **self.options,
            )
            router = layer.router[...]  # reads the first columns of its tokens
            layer.router[...] = jax.device_put(jnp.eye(*router.shape, dtype=router.dtype), router.sharding)
            self.layers[key] = layer
        layer = self.layers[key]
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
            prepare = Pass(("prepare", *sizes[:1]), jax.jit(lambda state: nnx.merge(graph, state).prepare()), (state,))
            self.compile([prepare])
            slots = self.run(prepare)

        def forward(state: Any, slots: Any, x: jax.Array) -> tuple[jax.Array, Metrics]:
            return nnx.merge(graph, state)(x, slots)

        def backward(state: Any, slots: Any, x: jax.Array) -> Any:
            params, rest = state.filter(nnx.Param), state.filter(nnx.Not(nnx.Param))

            def loss(params: Any, slots: Any, x: jax.Array) -> tuple[jax.Array, Metrics]:
                result, metrics = forward(nnx.merge_state(params, rest), slots, x)
                return jnp.sum(result.astype(jnp.float32) * x), metrics

            # With prepared slots, gradients stay with them until the last micro-batch.
            return jax.grad(loss, argnums=(1, 2) if prepared else (0, 2), has_aux=True)(params, slots, x)

        return {
            name: Pass((name, *sizes), jax.jit(function), (state, slots, x))
            for name, function in zip(PASSES, (forward, backward), strict=True)
        }

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
        return self.compiled[one.key](*one.arguments)


def times_us(runs: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, np.ndarray]:
    """Microseconds of a call, of several in a row; all take turns."""
    calls = {}
    for key, run in runs.items():
        jax.block_until_ready([run() for _ in range(2)])
        begin = time.perf_counter()
        jax.block_until_ready(run())
        calls[key] = int(np.clip(BATCH_MS / 1e3 / (time.perf_counter() - begin), 1, 50))
    times = {key: np.zeros(repeats) for key in runs}
    for repeat in range(repeats):
        for key, run in runs.items():
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
) -> list[dict[str, Any]]:
    sharding = jax.NamedSharding(runner.mesh, jax.P("ep"))
    cases = []  # row, passes
    for load in loads:
        x = inputs(load.ids, runner.d_model, sharding)
        ids = jax.device_put(load.ids, sharding)
        balanced = () if load.name == "even" and baseline_only else ("balanced", "batch")
        for mode in ("even" if load.name == "even" else "unbalanced", *balanced):
            if not {mode, {"balanced": "prepared"}.get(mode, f"{mode} prepared")} & set(modes):
                continue
            placement = placement_for(load.past, REDUNDANTS if mode == "balanced" else 0)
            if mode == "batch":
                placement = lplb.Placement.per_batch(
                    num_experts=EXPERTS, num_ranks=jax.device_count(), redundants_per_rank=REDUNDANTS
                )
            for dispatch in dispatches:
                smallest = smallest_factor(ids, placement, runner.mesh, dispatch)
                factor = next((factor for factor in FACTORS if factor >= smallest), float(placement.num_ranks))
                for prepared in (False,) if mode == "batch" else (False, True):
                    name = {"balanced": "prepared"}.get(mode, f"{mode} prepared") if prepared else mode
                    if name not in modes:
                        continue
                    row = {"bench": "layer", "case": f"{jax.device_count()}x{REDUNDANTS}", "load": load.name}
                    row |= {"tokens_per_rank": tokens, "mode": name, "dispatch": dispatch}
                    row |= {"smallest_factor": round(smallest, 4), "factor": factor}
                    every = runner.passes(placement, factor, dispatch, x, prepared)
                    cases.append((row, {key: every[key] for key in passes}))
    runner.compile([one for _, of_case in cases for one in of_case.values()])

    rows, runs = [], {}
    for row, of_case in cases:
        _, metrics = runner.run(of_case[passes[0]])
        assert metrics.rounds == 1, "the smallest factor needs no second round"
        assert metrics.load.sum() == tokens * jax.device_count() * TOP_K
        imbalance = {
            key: round(float(getattr(metrics, key)), 4) for key in ("contiguous", "home", "optimum", "balanced")
        }
        for name in passes:
            one = of_case[name]
            temp = runner.compiled[one.key].memory_analysis().temp_size_in_bytes
            runs[len(rows)] = partial(runner.run, one)
            rows.append({**row, "pass": name, **imbalance, "temp_mb": round(temp / 2**20)})
    for i, of_run in times_us(runs, repeats).items():
        rows[i] |= common.statistics(of_run)
    for row in rows:
        fastest = "even prepared" if "prepared" in row["mode"] and "even prepared" in modes else "even"
        alike = [one for one in rows if all(one[key] == row[key] for key in ("pass", "dispatch"))]
        (even,) = (one for one in alike if one["mode"] == fastest)
        row["share_of_even"] = round(even["median_us"] / row["median_us"], 4)
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
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/layer.json"))
    args = parser.parse_args()
    if jax.default_backend() == "gpu" and args.grouped_matmul is None:
        args.grouped_matmul = "tokamax"  # raises where it is missing: jax.lax.ragged_dot is no measure on GPUs
    mesh = jax.make_mesh((jax.device_count(),), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"grouped_matmul": args.grouped_matmul}
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
            )
            flags = os.environ.get("XLA_FLAGS", "")
            common.write(args.out, [{**row, "xla_flags": flags} if flags else row for row in rows])


if __name__ == "__main__":
    main()
