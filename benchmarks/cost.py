"""What grouped matmuls cost beyond their tokens, on one GPU: `python benchmarks/cost.py --traces FOLDER`.

Rows of a group are computed in tiles, each group with rows costs a fixed part, and so the time of a rank is not in
proportion to its tokens. The grouped matmuls of the layer alone (bfloat16, gate, up and down; with the backward pass,
six) are timed for random group sizes: up to all of the buffer, some groups without rows, even to very uneven. Of each
shape and pass three quarters of the points are fitted by non-negative least squares:

  tokens   constant + per_token * tokens: what balancing token counts takes for granted
  model    constant + per_token * tokens + per_tile * tiles + per_expert * groups with rows; the best of a few tiles

and the errors are those of the other quarter, relative. `break_even` is how many tokens cost as much as a group more
does, with half a tile: what a copy should at least take.

Rows of "cost gain": a batch on the ranks of the layer's benchmark, copies chosen by it, with and without
`min_tokens=break_even`: copies used, and the time of the rank that takes longest, each measured alone.
"""

import argparse
import pathlib
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import layer
import numpy as np
from scipy.optimize import nnls

import jax_lplb as lplb

SHAPES = ((2048, 1408, 18), (2048, 1408, 34), (1024, 512, 18), (4096, 1536, 10))  # d_model, d_expert, slots
TILES = (64, 128, 256)
RANKS = 4
layer.BATCH_MS = 5.0  # of calls in a row: there are many points


def random_sizes(rng: np.random.Generator, slots: int, rows: int) -> np.ndarray:
    """int32 [slots], of a batch that fills a tenth of the rows up to all."""
    share = np.exp(rng.normal(0, rng.choice([0.0, 0.3, 1.0, 2.0]), slots))
    share[rng.permutation(slots)[: rng.integers(0, slots // 2)]] = 0
    return np.floor(share / share.sum() * rows * rng.uniform(0.1, 1)).astype(np.int32)


def terms(sizes: np.ndarray, tile: int | None) -> np.ndarray:
    """float64 [points, terms], of group sizes [points, slots]."""
    columns = [np.ones(len(sizes)), sizes.sum(axis=1)]
    if tile is not None:
        columns += [np.sum(-(-sizes // tile), axis=1), np.count_nonzero(sizes, axis=1)]
    return np.stack(columns, axis=1).astype(float)


def fit(sizes: np.ndarray, times: np.ndarray, tile: int | None) -> tuple[np.ndarray, float]:
    """Costs of the terms, for the least relative errors; and their root mean square."""
    costs, residual = nnls(terms(sizes, tile) / times[:, None], np.ones(len(times)))
    return costs, float(residual / np.sqrt(len(times)))


def errors(name: str, costs: np.ndarray, sizes: np.ndarray, times: np.ndarray, tile: int | None) -> dict[str, float]:
    error = np.abs(terms(sizes, tile) @ costs / times - 1)
    return {f"{name}_{key}": round(float(np.quantile(error, q)), 4) for key, q in (("median", 0.5), ("p95", 0.95))}


def timed(runner: layer.Runner, points: list[np.ndarray], rows: int, repeats: int) -> dict[str, np.ndarray]:
    """Microseconds of each pass, [points]."""
    passes = [runner.products(sizes, rows) for sizes in points]
    runner.compile([one for of_point in passes[:1] for one in of_point.values()])
    runs = {(i, name): partial(runner.run, one) for i, of_point in enumerate(passes) for name, one in of_point.items()}
    times = layer.times_us(runs, repeats)
    return {name: np.asarray([np.median(times[i, name]) for i in range(len(points))]) for name in layer.PASSES}


def costs_of(runner: layer.Runner, slots: int, rows: int, number: int, repeats: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    points = [random_sizes(rng, slots, rows) for _ in range(number)]
    result = []
    for name, times in timed(runner, points, rows, repeats).items():
        held_out = np.arange(number) % 4 == 0
        known, other = (np.asarray(points)[which] for which in (~held_out, held_out))
        tile = min(TILES, key=lambda tile: fit(known, times[~held_out], tile)[1])
        of_tokens, of_model = (fit(known, times[~held_out], kind)[0] for kind in (None, tile))
        constant, per_token, per_tile, per_expert = of_model
        row = {"bench": "cost", "case": f"{runner.d_model} x {runner.d_expert}, {slots} slots", "pass": name}
        row |= {"points": number, "rows": rows, "tile": tile, "constant_us": round(constant, 2)}
        row |= {"per_1000_tokens_us": round(1e3 * per_token, 3), "per_tile_us": round(per_tile, 4)}
        row |= {"per_expert_us": round(per_expert, 3)}
        of_row = per_token + per_tile / tile  # 0 where the fit is of noise
        row["break_even"] = int((per_expert + per_tile / 2) / of_row) if of_row > 0 else 0
        row |= errors("tokens", of_tokens, other, times[held_out], None)
        row |= errors("model", of_model, other, times[held_out], tile)
        result.append(row)
    return result


def gains_of(runner: layer.Runner, loads: list[layer.Load], least: int, repeats: int) -> list[dict[str, Any]]:
    cases, points, rows = [], [], 0
    for load in loads:
        for min_tokens in (0, least):
            placement = lplb.Placement.per_batch(
                num_experts=layer.EXPERTS,
                num_ranks=RANKS,
                redundants_per_rank=layer.REDUNDANTS,
                min_tokens=min_tokens,
            )
            out = jax.jit(lplb.balance)(jnp.asarray(load.ids), placement)
            slots = RANKS * placement.slots_per_rank
            sizes = np.bincount(np.asarray(out.physical_ids).ravel(), minlength=slots).reshape(RANKS, -1)
            copies = np.count_nonzero(np.asarray(out.placement.phy2log) >= 0) - layer.EXPERTS
            of_ranks = np.asarray(out.rank_load)
            case = {"bench": "cost gain", "case": load.name, "min_tokens": min_tokens, "copies": int(copies)}
            cases.append(case | {"imbalance": round(float(of_ranks.max() / of_ranks.mean()), 4)})
            points += list(sizes.astype(np.int32))
            rows = max(rows, int(of_ranks.max()))
    times = timed(runner, points, -(-rows // 256) * 256, repeats)
    return [
        case | {"pass": name, "longest_us": round(float(of_pass.reshape(-1, RANKS)[i].max()), 1)}
        for name, of_pass in times.items()
        for i, case in enumerate(cases)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=pathlib.Path, help="folder of deepseek_v2_lite_topk_ids.npz")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a rank")
    parser.add_argument("--points", type=int, default=64, help="of each shape")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--grouped-matmul", choices=["tokamax", "ragged_dot"], help="by default: by platform")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/cost.json"))
    args = parser.parse_args()
    options = {"grouped_matmul": layer.grouped_matmul_here(args.grouped_matmul)}
    mesh = jax.make_mesh((1,), ("ep",), devices=jax.devices()[:1])
    results, runners = [], []
    for d_model, d_expert, slots in SHAPES[: args.shapes]:
        runners.append(layer.Runner(mesh, d_model, d_expert, options))
        results += costs_of(runners[-1], slots, 2 * args.tokens, args.points, args.repeats)
    loads = [layer.lognormal(RANKS * args.tokens, sigma) for sigma in (0.3, 0.6, 1.0)]
    if args.traces is not None:
        loads.append(layer.deepseek(RANKS * args.tokens, args.traces, 15))
    least = results[1]["break_even"]  # of the first shape, with the backward pass
    common.write(args.out, results + gains_of(runners[0], loads, least, 3 * args.repeats))


if __name__ == "__main__":
    main()
