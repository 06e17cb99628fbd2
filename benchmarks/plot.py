"""Draws docs/scaling.png from the results of benchmarks/scaling.py: `python benchmarks/plot.py`."""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "ranks": "ranks of a group (torus)",
    "experts": "experts",
    "tokens": "tokens of a rank, top-8",
    "groups": "groups of 8 ranks (1,024 experts)",
}
LINES = {
    "all, ipm": ("all three, interior point", "black", "o"),
    "all, edge_balance": ("all three, edge balance", "tab:gray", "P"),
    "ipm": ("solve: interior point", "tab:blue", "s"),
    "edge_balance": ("solve: edge balance", "tab:cyan", "D"),
    "count": ("count", "tab:orange", "^"),
    "assign": ("assign", "tab:green", "v"),
}


def label(size: int) -> str:
    if size < 1024 or size % 1024:
        return str(size)
    return f"{size // 2**20}M" if size % 2**20 == 0 else f"{size // 1024}k"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="?", default="benchmarks/results/scaling.json")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/scaling.png"))
    args = parser.parse_args()
    results = json.loads(args.results.read_text())

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharey=True, layout="constrained")
    for panel, (axis, title) in zip(axes.flat, PANELS.items(), strict=True):
        rows = [row for row in results["rows"] if row["axis"] == axis]
        for kernel, (name, colour, marker) in LINES.items():
            points = sorted((row["size"], row["median_us"], row["p99_us"]) for row in rows if row["kernel"] == kernel)
            if points:
                sizes, medians, p99s = zip(*points, strict=True)
                panel.plot(sizes, medians, color=colour, marker=marker, markersize=5, label=name)
                panel.fill_between(sizes, medians, p99s, color=colour, alpha=0.15, linewidth=0)
        sizes = sorted({row["size"] for row in rows})
        panel.set(xscale="log", yscale="log", xlabel=title)
        panel.set_xticks(sizes, [label(size) for size in sizes])
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.grid(alpha=0.3)
    for panel in axes[:, 0]:
        panel.set_ylabel("microseconds")
    axes.flat[0].legend(fontsize=9)
    figure.suptitle(
        f"Device time against size, median and 99th percentile. {results['device']}, {results['date']}\n"
        "Base: 8 ranks, 2 redundant experts a rank, 256 experts, 4,096 tokens a rank",
        fontsize=11,
    )
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
