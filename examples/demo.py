"""Balances real text over the experts of a Mixture-of-Experts layer, on 8 virtual CPU devices.

Python's own documentation is routed top-8 to 256 experts on 8 ranks. For each batch jax_lplb.balance chooses which
experts get a copy on another rank, by the batch itself, and sends tokens to the copies. Nothing is downloaded.
"""

import argparse
import ast
import os
import platform
import re
import statistics
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

# Read when JAX first looks for its devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.console import Console

import jax_lplb as lplb

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import CenteredNorm
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

RANKS, EXPERTS, TOP_K, REDUNDANTS, TARGET = 8, 256, 8, 2, 1.01
LETTERS, GRAMS, BUCKETS, WIDTH = 16, 3, 4096, 64


class Report(NamedTuple):
    """One batch: rank loads relative to their mean, and how the call went."""

    home: np.ndarray
    after: np.ndarray
    optimum: float
    copies: int
    moved: float
    gap: float
    milliseconds: float

    @property
    def numbers(self) -> tuple[float, ...]:
        """Those of a row, in its order."""
        imbalances = self.home.max(), self.optimum, self.after.max()
        return *imbalances, self.copies, self.moved, self.gap, self.milliseconds


def read_tokens(rng: np.random.Generator) -> np.ndarray:
    """Words, spaces and signs of the language reference and of the library's docstrings, uint8 [tokens, LETTERS]."""
    documents = list(topics.values())
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        documented = (node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        documents.append("\n\n".join(filter(None, map(ast.get_docstring, documented))))
    text = "\n\n".join(documents[i] for i in rng.permutation(len(documents)))
    tokens = np.array(re.findall(rb" ?\w+|\s+| ?[^\w\s]+", text.encode()), f"S{LETTERS}")
    return tokens.view(np.uint8).reshape(-1, LETTERS)


def route(letters: jax.Array, grams: jax.Array, router: jax.Array) -> jax.Array:
    """Top-k experts of each token, int32 [..., tokens, k].

    A token is the sum of its byte n-grams, hashed into a table, plus the mean of its rank's tokens so far: as in a
    trained model, word and topic decide. Nothing steers the loads; some experts are hot because text repeats itself.
    """
    letters = letters.astype(jnp.uint32)
    code = jnp.zeros_like(letters)
    token = jnp.zeros((*letters.shape[:-1], WIDTH), jnp.float32)
    for n in range(GRAMS):
        last = jnp.pad(letters[..., n:], ((0, 0), (0, 0), (0, n)))
        code = (code ^ last) * jnp.uint32(16777619)
        bucket = (code * jnp.uint32(2654435769) >> 16) % BUCKETS
        token += jnp.sum(jnp.where(last[..., None] > 0, grams[n, bucket], 0), axis=-2)
    token /= jnp.linalg.norm(token, axis=-1, keepdims=True)
    token += jnp.cumsum(token, axis=-2) / jnp.arange(1, token.shape[-2] + 1)[:, None]
    return jax.lax.top_k(token @ router, TOP_K)[1]


def check(out: lplb.Balanced, expert_ids: np.ndarray) -> np.ndarray:
    """Compares what `balance` says with the physical ids it gave, on the host, and returns each token's new rank."""
    physical_ids, phy2log = np.asarray(out.physical_ids), np.asarray(out.placement.phy2log)
    if physical_ids.shape != expert_ids.shape or physical_ids.min() < 0 or physical_ids.max() >= len(phy2log):
        raise RuntimeError("a token was lost")
    if (phy2log[physical_ids] != expert_ids).any():
        raise RuntimeError("a token went to a slot that holds another expert")
    owner = physical_ids // (len(phy2log) // RANKS)
    if (np.bincount(owner.ravel(), minlength=RANKS) != out.rank_load).any():
        raise RuntimeError(f"rank_load is {out.rank_load}, but the ids give {np.bincount(owner.ravel())}")
    return owner


def balance_batches(batches: np.ndarray, rng: np.random.Generator) -> Iterator[Report]:
    """Routes and balances batches [batches, ranks, tokens, LETTERS]; the first compiles, and is not reported."""
    mesh = jax.make_mesh((RANKS,), ("ep",))
    grams = rng.standard_normal((GRAMS, BUCKETS, WIDTH), np.float32)
    router = rng.standard_normal((WIDTH, EXPERTS), np.float32)
    placement = lplb.Placement.per_batch(
        num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=REDUNDANTS, target=TARGET
    )

    sharded, same = jax.P("ep"), jax.P()
    route_ranks = jax.jit(jax.shard_map(route, mesh=mesh, in_specs=(sharded, same, same), out_specs=sharded))
    balance = jax.jit(
        jax.shard_map(
            lambda expert_ids: lplb.balance(expert_ids, placement, axis_name="ep"),
            mesh=mesh,
            in_specs=sharded,
            out_specs=lplb.Balanced(sharded, *[same] * 6),  # only the ids differ between ranks
        )
    )

    for number, letters in enumerate(batches):
        routed = route_ranks(jax.device_put(letters, jax.NamedSharding(mesh, sharded)), grams, router)
        routed.block_until_ready()
        start = time.perf_counter()
        out = jax.block_until_ready(balance(routed))
        seconds = time.perf_counter() - start
        if number == 0:
            continue
        expert_ids = np.asarray(routed)
        home, owner = expert_ids // (EXPERTS // RANKS), check(out, expert_ids)
        mean = expert_ids.size / RANKS

        def relative(rank: np.ndarray, mean: float = mean) -> np.ndarray:
            return np.bincount(rank.ravel(), minlength=RANKS) / mean

        yield Report(
            home=relative(home),
            after=relative(owner),
            optimum=float(out.lower_bound.max()) / mean,
            copies=int((out.placement.phy2log >= 0).sum()) - EXPERTS,
            moved=float(np.mean(home != owner)),
            gap=float(out.gap[0]),
            milliseconds=1e3 * seconds,
        )


def print_row(console: Console, label: object, numbers: Iterable[float], loads: str = "") -> None:
    home, optimum, after, copies, moved, gap, milliseconds = numbers
    console.print(
        f"{label:>6}  {loads:18}  [yellow]{home:7.3f}[/]  {optimum:7.3f}  [bold cyan]{after:8.3f}[/]"
        f"  {copies:6.0f}  {moved:6.1%}  {gap:7.1e}  {milliseconds:6.2f}"
    )


def bars(console: Console, report: Report) -> str:
    """Rank loads before and after, a letter for each rank."""
    levels = "▁▂▃▄▅▆▇█" if console.encoding.startswith("utf") else "12345678"
    scale = len(levels) / report.home.max()
    home, after = ("".join(levels[max(round(x * scale) - 1, 0)] for x in load) for load in (report.home, report.after))
    return f"[yellow]{home}[/]  [cyan]{after}[/]"


def plot(reports: list[Report], path: Path) -> None:
    """Rank loads before and after as two heat maps, the imbalance over the batches below; colour-blind safe."""
    plt.rcParams.update({"axes.titlesize": 11, "axes.titlelocation": "left", "axes.titlepad": 8})
    figure, axes = plt.subplot_mosaic(
        [["home", "after"], ["line", "line"]],
        figsize=(10, 6.4),
        height_ratios=(1, 1.1),
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1),
    )
    norm = CenteredNorm(1, max(np.abs(report.home - 1).max() for report in reports))
    for name, title in (("home", "At home: every token to its expert's home"), ("after", "After jax_lplb.balance")):
        load = np.stack([getattr(report, name) for report in reports], axis=1)
        image = axes[name].imshow(load, cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
        axes[name].set(title=title, ylabel="rank", yticks=range(RANKS))
        axes[name].tick_params(length=0)
        axes[name].spines[:].set_visible(False)
    figure.colorbar(image, ax=[axes["home"], axes["after"]], label="rank load / mean", aspect=14)

    line = axes["line"]
    line.plot([report.home.max() for report in reports], "o-", color="#e08214", ms=5, label="at home")
    line.plot([report.optimum for report in reports], color="#b2abd2", lw=7, label="optimum (lower bound)")
    line.plot([report.after.max() for report in reports], "o-", color="#542788", ms=5, label="after balancing")
    line.axhline(1, color="#999999", lw=1, ls=":", zorder=0)
    line.set(title="The rank that all others wait for", ylabel="imbalance (max / mean rank load)")
    line.margins(x=0.01)
    line.spines[["top", "right"]].set_visible(False)
    line.legend(frameon=False, ncols=2, loc="upper right")
    for each in axes.values():
        each.set_xlabel("batch")
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, format="png", dpi=150)


def main() -> None:
    # Without a usage, so that an error is one line.
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=24, help="batches to balance (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per rank and batch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the router and the documents' order (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args()
    for name, least in (("batches", 1), ("tokens", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    rng = np.random.default_rng(args.seed)
    tokens = read_tokens(rng)
    needed = (1 + args.batches) * RANKS * args.tokens
    if needed > len(tokens):
        parser.error(
            f"the text has {len(tokens):,} tokens, but 1 + {args.batches} batches of {RANKS} x {args.tokens} "
            f"tokens need {needed:,}; take fewer --batches or --tokens"
        )
    try:
        args.out.open("ab").close()
    except OSError as error:
        parser.error(f"--out: cannot write {args.out}: {error.strerror}")

    # No wrapping at the 80 columns that rich assumes of a log file.
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"[bold]jax_lplb[/]: {RANKS} ranks on virtual CPU devices, {RANKS} x {args.tokens} tokens a batch of "
        f"Python {platform.python_version()}'s documentation,\n"
        f"top-{TOP_K} of {EXPERTS} experts, {EXPERTS // RANKS} to a rank. Each rank has {REDUNDANTS} more slots, for "
        "copies of other ranks' experts,\nchosen for each batch by its own load: no more than bring the busiest rank "
        f"within {TARGET} times the mean.\n\n"
        "[bold]        rank loads          imbalance (max / mean)      copies\n"
        f" batch  at home   balanced  at home  optimum  balanced  {f'of {RANKS * REDUNDANTS}':>6}   moved      gap"
        "      ms[/]"
    )
    reports: list[Report] = []
    for report in balance_batches(tokens[:needed].reshape(-1, RANKS, args.tokens, LETTERS), rng):
        print_row(console, len(reports), report.numbers, bars(console, report))
        reports.append(report)
    for label, summary in (("median", statistics.median), ("worst", max)):
        print_row(console, label, map(summary, zip(*(report.numbers for report in reports), strict=True)))
    plot(reports, args.out)
    choices = len(reports) * RANKS * args.tokens * TOP_K
    console.print(
        f"\nChecked on the host: {choices:,} expert choices, none lost, each sent to a slot of its expert;\n"
        "rank loads recounted from the physical ids equal those that balance returned."
    )
    console.print(f"Wrote {args.out}", markup=False)


if __name__ == "__main__":
    main()
