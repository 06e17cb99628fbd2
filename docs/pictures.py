"""Draws docs/pictures/*.svg from what the library computes, on the CPU: `python docs/pictures.py`."""

import argparse
import pathlib

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import jax_lplb as lplb

# A file has the same bytes whenever it is drawn by the same matplotlib, and text is text: it can be searched.
matplotlib.rcParams.update({"svg.hashsalt": "jax_lplb", "svg.fonttype": "none", "font.size": 9})
HOME, COPY, FREE, MEAN = "#4c72b0", "#dd8452", "#eeeeee", "#333333"


def loads() -> plt.Figure:
    """Loads of ranks before and after, of the first batch of README's quickstart."""
    ranks, home, redundants = 8, 32, 2
    placement = lplb.Placement.per_batch(num_experts=256, num_ranks=ranks, redundants_per_rank=redundants)
    liking, drift, tokens = (jax.random.key(seed) for seed in (0, 1, 101))
    liked = jax.random.normal(liking, 256) + 0.5 * jax.random.normal(drift, 256)
    expert_ids = jax.lax.top_k(liked + jax.random.normal(tokens, (ranks * 512, 256)), 8)[1]
    out = jax.tree.map(np.asarray, jax.jit(lplb.balance)(expert_ids, placement))
    of_slots = np.bincount(out.physical_ids.ravel(), minlength=placement.num_physical).reshape(ranks, -1)
    mean = out.load.sum() / ranks

    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
    at_home = out.load.reshape(ranks, home).sum(axis=1)
    bars = (
        (f"at home: busiest / mean {at_home.max() / mean:.3f}", at_home, 0 * at_home),
        (
            f"balanced: busiest / mean {out.rank_load.max() / mean:.3f}",
            of_slots[:, :home].sum(axis=1),
            of_slots[:, home:].sum(axis=1),
        ),
    )
    for axis, (title, own, copies) in zip(axes, bars, strict=True):
        axis.bar(range(ranks), own, color=HOME, label="home experts")
        axis.bar(range(ranks), copies, bottom=own, color=COPY, hatch="//", edgecolor="white", label="copies")
        axis.axhline(mean, color=MEAN, linestyle="--", linewidth=1, label="mean")
        axis.set(title=title, xlabel="rank", xticks=range(ranks))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("expert choices")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def slots() -> plt.Figure:
    """Which slots hold what, and how many tokens they get: the example of how_it_works.md."""
    load = np.array([90, 10, 30, 20, 5, 5, 0, 0], np.int32)
    placement = lplb.Placement.per_batch(num_experts=8, num_ranks=4, redundants_per_rank=1)
    expert_ids = np.repeat(np.arange(8, dtype=np.int32), load)[:, None]
    out = jax.tree.map(np.asarray, lplb.balance(expert_ids, placement))
    of_slots = np.bincount(out.physical_ids.ravel(), minlength=placement.num_physical)

    figure, axis = plt.subplots(figsize=(8.6, 1.9), layout="constrained")
    slots_per_rank = placement.slots_per_rank
    for slot, (expert, tokens) in enumerate(zip(out.placement.phy2log, of_slots, strict=True)):
        rank, number = divmod(slot, slots_per_rank)
        is_copy = number == slots_per_rank - 1
        colour = FREE if expert < 0 else COPY if is_copy else HOME
        left = rank * (slots_per_rank + 0.5) + number
        axis.add_patch(plt.Rectangle((left, 0), 0.94, 1, facecolor=colour, hatch="//" * is_copy, edgecolor="white"))
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1}
        says, ink = ("free", "black") if expert < 0 else (f"expert {expert}\n{tokens} tokens", "white")
        axis.text(left + 0.47, 0.5, says, ha="center", va="center", color=ink, fontsize=7, bbox=box)
        axis.text(left + 0.47, -0.08, f"slot {slot}", ha="center", va="top", fontsize=8)
    for rank, tokens in enumerate(out.rank_load):
        at_home = load.reshape(4, 2).sum(axis=1)[rank]
        middle = rank * (slots_per_rank + 0.5) + slots_per_rank / 2 - 0.03
        axis.text(
            middle, 1.08, f"rank {rank}: {tokens} tokens\n({at_home} at home)", ha="center", va="bottom", fontsize=8
        )
    axis.set(xlim=(-0.1, 4 * slots_per_rank + 1.5), ylim=(-0.3, 1.5))
    axis.axis("off")
    return figure


def drift() -> plt.Figure:
    """What copies are worth from batch to batch: those chosen by the batch, and those that the past chose."""
    rng, ranks, experts = np.random.default_rng(0), 8, 64
    trend = np.cumsum(rng.normal(0, 0.35, (40, experts)), axis=0) + rng.normal(0, 0.6, experts)
    popularity = np.exp(trend) / np.exp(trend).sum(axis=1, keepdims=True)
    counts = np.stack([rng.multinomial(16384, row) for row in popularity])
    sizes = {"num_ranks": ranks, "redundants_per_rank": 2}
    per_batch = lplb.evaluate(lplb.Placement.per_batch(num_experts=experts, **sizes), counts)
    by_past = lplb.evaluate(lplb.Placement.from_eplb(counts[:8].mean(axis=0), **sizes), counts)

    figure, axis = plt.subplots(figsize=(8, 3.1), layout="constrained")
    axis.plot(per_batch.home, color=MEAN, linestyle=":", label="no copies")
    axis.plot(
        by_past.assigned, color=COPY, linestyle="--", label="EPLB's copies for batches 0 to 7, split by the program"
    )
    axis.plot(per_batch.assigned, color=HOME, label="copies chosen by each batch")
    axis.axvspan(0, 7, color=FREE)
    axis.set(xlabel="batch", ylabel="busiest / mean rank load", xlim=(0, 39), ylim=(0.95, None))
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


PICTURES = {"loads": loads, "slots": slots, "drift": drift}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "pictures")
    folder = parser.parse_args().out
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
