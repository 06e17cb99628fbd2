"""Fills the tables of docs/performance.md from benchmarks/results/*.json: `python docs/fill_tables.py`.

A table stands below the comment <!-- table: NAME -->, with NAME one of TABLES.
"""

import json
import pathlib
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
Row = dict[str, Any]


def rows_of(file: str, **where: Any) -> list[Row]:
    rows = json.loads((RESULTS / f"{file}.json").read_text())["rows"]
    return [row for row in rows if all(row.get(name) == value for name, value in where.items())]


def only(rows: list[Row], **where: Any) -> Row | None:
    """The one row that there is, if any."""
    found = [row for row in rows if all(row.get(name) == value for name, value in where.items())]
    assert len(found) <= 1, where
    return found[0] if found else None


def of_passes(rows: list[Row], **where: Any) -> tuple[Row, Row]:
    """A layer's forward pass, and its forward and backward one."""
    forward, both = (only(rows, **where, **{"pass": name}) for name in ("forward", "forward+backward"))
    assert forward
    assert both
    return forward, both


def unique(rows: Iterable[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def line(*cells: str) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def table(*header: str) -> list[str]:
    return [line(*header), "|" + "---|" * len(header)]


def times(row: Row | None, digits: int = 1) -> str:
    return f"{row['median_us']:.{digits}f} / {row['p99_us']:.{digits}f}" if row else "-"


def shared(row: Row) -> str:
    """A layer's time, and its throughput as a share of the even load's."""
    return f"{row['median_us'] / 1000:.2f} ms, {int(100 * row['share_of_even'] + 0.5)} %"


def pretraining(file: str) -> list[str]:
    titles = {
        "even": "even routing",
        "batch-peer": "copies per batch",
        "batch-all_to_all": "copies per batch, tokens by all_to_all",
        "past": "copies by past load",
        "none": "no copies",
        "aux-loss": "balancing loss 0.01, no copies",
        "router-bias": "router's bias, no copies",
    }
    rows = sorted(rows_of(file), key=lambda row: -row["tokens_per_s"])
    (loss,) = {row["common_loss"] for row in rows if "common_loss" in row}
    header = "tokens/s", "share of even", "MFU", "imbalance, median and p95 of the worst layer", "rounds, at most"
    lines = table("", *header, "loss, last 20 steps", f"seconds to a loss of {loss:.3f}")
    for row in rows:
        speed = f"{row['tokens_per_s']:,}", f"{row['share_of_even']:.1%}", f"{row['mfu']:.1%}"
        imbalance = f"{row['imbalance']:.3f}, {row['imbalance_p95']:.3f}"
        trained = (f"{row['final_loss']:.4f}", str(row["seconds_to_loss"])) if "common_loss" in row else ("-", "-")
        lines.append(line(titles[row["mode"]], *speed, imbalance, str(row["rounds_max"]), *trained))
    return lines


def solves() -> list[str]:
    header = "interior point", "iterations", "worst true gap", "edge balance", "sweeps", "worst true gap"
    rows, lines = rows_of("kernels_h200"), table("ranks x redundant", *header)
    for case in unique(rows, "case"):
        cells = []
        for kernel in ("ipm", "edge_balance"):
            row = only(rows, case=case, kernel=kernel)
            cells += [times(row), row["iterations"], f"{row['worst_gap']:.1e}"] if row else ["-", "", ""]
        lines.append(line(case, *cells))
    return lines


def steps() -> list[str]:
    header = "count", "assign", "all three, interior point", "all three, edge balance"
    rows, lines = rows_of("kernels_h200"), table("ranks x redundant", *header)
    for case in unique(rows, "case"):
        alone = (times(only(rows, case=case, kernel=kernel), 2) for kernel in ("count", "assign"))
        together = (times(only(rows, case=case, kernel=kernel)) for kernel in ("all, ipm", "all, edge_balance"))
        lines.append(line(case, *alone, *together))
    return lines


def mathdx() -> list[str]:
    rows, lines = rows_of("kernels_h200"), table("ranks x redundant", "own routine", "cuSolverDx")
    for case in unique(rows, "case"):
        lines.append(
            line(case, *(times(only(rows, case=case, kernel=kernel)) for kernel in ("ipm", "ipm (cuSolverDx)")))
        )
    return lines


def plans() -> list[str]:
    names = {
        "plan + solve": "plan + solve",
        "plan": "plan alone",
        "assign": "assign",
        "assign_local": "assign, with locality",
        "all": "count, plan, solve, assign",
        "all_local": "all, with locality",
    }
    rows = rows_of("plan_h200")
    lines = table("ranks x slots", *names.values(), "imbalance", "copies, median", "certified by the plan")
    for case in unique(rows, "case"):
        kernels = (times(only(rows, case=case, kernel=kernel)) for kernel in names)
        row = only(rows, case=case, kernel="plan + solve")
        assert row is not None
        ranks, slots = map(int, case.split("x"))
        imbalance = " / ".join(f"{row[f'imbalance_{what}']:.3f}" for what in ("median", "p95", "worst"))
        copies = f"{row['copies_median']:g} of {ranks * slots}"
        lines.append(line(case, *kernels, imbalance, copies, str(row["by_plan_alone"])))
    return lines


def chains(file: str) -> list[str]:
    """Of 4,096 tokens a rank."""
    rows, modes = rows_of(file, tokens=4096), ("single", "unrolled", "scanned")
    lines = table("wall time of a call", *modes)
    kernels = unique(rows, "kernel")
    for kernel in kernels:
        lines.append(line(kernel, *(times(only(rows, kernel=kernel, mode=mode)) for mode in modes)))
    for kernel in (kernel for kernel in kernels if kernel.startswith("balance")):
        here = (only(rows, kernel=kernel, mode=mode) for mode in modes)
        quotients = [f"{row['of_noop']:.2f}" for row in here if row]
        lines.append(line(f"{kernel} / {kernel.replace('balance', 'no-op')}", *quotients))
    return lines


def replicated() -> list[str]:
    names = {"spread": "topology", "none used": "per batch, none needed", "of one rank": "per batch, of one rank"}
    names |= {"per batch": "per batch", "eplb": "EPLB"}
    transports = {"peer": "peers' memory", "collective": "collectives"}
    lines = table("placement", "copies in use", "transport", "forward", "with gradients")
    for row in rows_of("replicate_h100x4"):
        if row["case"] in names:
            cells = (f"{row[name] / 1000:.2f} ms" for name in ("forward_us", "gradient_us"))
            lines.append(line(names[row["case"]], str(row["used"]), transports[row["transport"]], *cells))
    return lines


def costs() -> list[str]:
    header = "pass", "tile", "constant", "1,000 tokens", "tile", "expert", "error by tokens", "by the model"
    lines = table("widths, slots", *header, "break-even")
    for row in rows_of("cost_h100", bench="cost"):
        fitted = (f"{row[name]:.{digits}f} us" for name, digits in (("constant_us", 0), ("per_1000_tokens_us", 1)))
        others = (f"{row[name]:.1f} us" for name in ("per_tile_us", "per_expert_us"))
        errors = (f"{row[f'{by}_median']:.1%}, {row[f'{by}_p95']:.1%}" for by in ("tokens", "model"))
        cells = row["pass"], str(row["tile"]), *fitted, *others, *errors, f"{row['break_even']} tokens"
        lines.append(line(row["case"], *cells))
    return lines


def robustness() -> list[str]:
    header = "loads", "converged", "worst true gap", "iterations or sweeps, median/max"
    lines = table("placement", "solver", *header)
    for row in rows_of("robustness_h200"):
        cells = row["instances"], row["converged"], f"{row['worst_gap']:.1e}", row["iterations"]
        lines.append(line(row["case"], row["solver"], *map(str, cells)))
    return lines


def placements() -> list[str]:
    header = "none", "EPLB, even", "topology, LP", "topology, repeats, LP", "EPLB, LP", "per batch, LP"
    lines = table("trace, ranks x redundant", *header, "copies per batch")
    for row in rows_of("placements_cpu", bench="placement"):
        ranks, slots = map(int, row["case"].split()[-1].split("x"))
        names = "none", "eplb_even", "topology_lp", "topology_repeats_lp", "eplb_lp", "per_batch_lp"
        cells = (row.get(name, "-") for name in names)
        lines.append(line(row["case"], *cells, f"{row['copies_per_batch']} of {ranks * slots}"))
    return lines


def locality() -> list[str]:
    header = "stay on their rank", "stay on their node", "rows of the largest pair", "MB between nodes"
    lines = table("trace, ranks x redundant", *header)
    for row in rows_of("locality_cpu"):
        stay = (f"{row[f'on_{group}_far']:.1%}, {row[f'on_{group}_near']:.1%}" for group in ("rank", "node"))
        pair = ", ".join(row[f"largest_pair_{kind}"] for kind in ("far", "near"))
        sent = ", ".join(f"{row[f'between_nodes_mb_{kind}']:.2f}" for kind in ("far", "near"))
        lines.append(line(row["case"], *stay, pair, sent))
    return lines


def layer(file: str) -> list[str]:
    header = "imbalance, optimum", "factor", "", "unbalanced", "balanced, copies in the layer", "balanced, prepared"
    rows, lines = rows_of(file), table("load", *header)
    for load in unique(rows, "load"):
        for name in ("forward", "forward+backward"):
            here = [row for row in rows if row["load"] == load and row["pass"] == name]
            without = only(here, mode="even") or only(here, mode="unbalanced")
            balanced, prepared = only(here, mode="balanced"), only(here, mode="prepared")
            assert without
            assert balanced
            assert prepared
            cells = map(shared, (without, balanced, prepared))
            imbalance = f"{without['home']:.2f}, {balanced['optimum']:.2f}"
            factors = f"{without['smallest_factor']:.2f} -> {balanced['smallest_factor']:.2f}"
            lines.append(line(load, imbalance, factors, name, *cells))
    return lines


def layer_by_peers() -> list[str]:
    header = "imbalance, with copies", "dispatch", "factor", "forward", "forward+backward"
    names = {"even": "{}, without copies", "batch": "{}", "capacity": "{}, plain JAX", "gather": "{}, plain JAX"}
    rows, lines = rows_of("layer_peer_h200x4"), table("load", *header)
    for load, mode, dispatch in dict.fromkeys((row["load"], row["mode"], row["dispatch"]) for row in rows):
        forward, both = of_passes(rows, load=load, mode=mode, dispatch=dispatch)
        imbalance = f"{forward['home']:.2f}" if "home" in forward else ""
        imbalance += f", {forward['balanced']:.2f}" if mode == "batch" else ""
        dropped = f", drops {forward['dropped']:.0%}" if forward.get("dropped") else ""
        cells = (f"{forward['factor']:.2f}{dropped}", shared(forward), shared(both))
        lines.append(line(names[mode].format(load), imbalance, dispatch, *cells))
    return lines


def layer_loads() -> list[str]:
    modes = "batch", "batch prepared"
    rows = rows_of("layer_loads_h200x2")
    lines = table("load", *(f"{mode}, {name}" for mode in modes for name in ("forward", "forward+backward")))
    for load in unique(rows, "load"):
        here = [row for mode in modes for row in of_passes(rows, load=load, mode=mode)]
        lines.append(line(load, *(f"{row['median_us'] / 1000:.2f}, {row['share_of_even']:.1%}" for row in here)))
    return lines


def layer_sizes() -> list[str]:
    titles = {("even", "even"): "even, without copies", ("sigma 0.6", "batch"): "sigma 0.6"}
    columns = [(load, mode, dispatch) for load, mode in titles for dispatch in ("all_to_all", "peer")]
    rows = rows_of("layer_sizes_h200x4")
    lines = table("tokens a rank", *(f"{titles[load, mode]}, {dispatch}" for load, mode, dispatch in columns))
    for tokens in unique(rows, "tokens_per_rank"):
        cells = []
        for load, mode, dispatch in columns:
            forward, both = of_passes(rows, tokens_per_rank=tokens, load=load, mode=mode, dispatch=dispatch)
            share = f", {both['share_of_even']:.0%}" if mode == "batch" else ""
            cells.append(f"{both['median_us'] / 1000:.2f}{share} ({forward['median_us'] / 1000:.2f})")
        lines.append(line(f"{tokens:,}", *cells))
    return lines


def tokens() -> list[str]:
    names = {
        ("dispatch", "forward"): "dispatch",
        ("dispatch", "backward"): "its gradient",
        ("combine", "forward"): "combine",
        ("combine", "backward"): "its gradient, with that of the gates",
    }
    rows, lines = rows_of("dispatch_h100x4"), table("", "peer, 132 blocks", "peer, 264 blocks", "all_to_all")
    for (step, name), title in names.items():
        here = [row for row in rows if row["step"] == step and row["pass"] == name]
        peers = (only(here, dispatch="peer", blocks=blocks) for blocks in (132, 264))
        cells = [f"{row['median_us']:,.0f} us, {row['gb_per_s']:.0f} GB/s" for row in peers if row]
        others = [f"{row['median_us']:,.0f} us" for row in here if row["dispatch"] == "all_to_all"]
        lines.append(line(title, *cells, *others))
    return lines


TABLES = {
    "pretrain_h100x4": partial(pretraining, "pretrain_h100x4"),
    "pretrain_h200x2": partial(pretraining, "pretrain_h200x2"),
    "pretrain_32_experts_h200x2": partial(pretraining, "pretrain_32_experts_h200x2"),
    "solves": solves,
    "steps": steps,
    "mathdx": mathdx,
    "plans": plans,
    "chains_h200x2": partial(chains, "balance_h200x2"),
    "chains_h100x4": partial(chains, "balance_h100x4"),
    "chains_h200x8": partial(chains, "balance_h200x8"),
    "replicated": replicated,
    "costs": costs,
    "robustness": robustness,
    "placements": placements,
    "locality": locality,
    "layer_h200x2": partial(layer, "layer_h200x2"),
    "layer_h100x4": partial(layer, "layer_h100x4"),
    "layer_by_peers": layer_by_peers,
    "layer_loads": layer_loads,
    "layer_sizes": layer_sizes,
    "tokens": tokens,
}


def filled(page: str) -> str:
    """The page with its tables as the results have them."""

    def fill(place: re.Match[str]) -> str:
        return place[1] + "".join(f"{row}\n" for row in TABLES[place[2]]())

    return re.sub(r"(<!-- table: (\w+) -->\n\n)(?:\|.*\n)*", fill, page)


if __name__ == "__main__":
    page = pathlib.Path(__file__).parent / "performance.md"
    page.write_text(filled(page.read_text()))
