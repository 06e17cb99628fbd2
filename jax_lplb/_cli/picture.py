"""Pictures of what was judged: one of matplotlib's formats, or a page that needs nothing but itself."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from jax_lplb import __version__, _simulate
from jax_lplb._cli import study
from jax_lplb._cli.study import Row, Study, stop

# Of each kind, the colour and the dashes: those tell them apart in grey.
STYLES: dict[_simulate.Kind, tuple[str, Any]] = {
    "none": ("#777777", "solid"),
    "eplb_even": ("#e08214", "dashed"),
    "topology": ("#2166ac", "dotted"),
    "topology_repeats": ("#01665e", "dashdot"),
    "eplb": ("#1b7837", (0, (6, 2, 1, 2, 1, 2))),
    "per_batch": ("#542788", (0, (9, 2))),
}
IN_NODES = ("#b2182b", (0, (1, 3)))
MOST_BATCHES = 256  # of a heat map
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 1100px; margin: 2em auto; padding: 0 1em; font: 16px/1.45 sans-serif; color: #111; }}
h1 {{ font-size: 1.5em; }}
h2 {{ font-size: 1.15em; margin-top: 2em; }}
h1, p, dd {{ overflow-wrap: anywhere; }}
figure, table {{ margin: 1em 0; }}
img {{ width: 100%; height: auto; }}
figcaption, caption {{ text-align: left; color: #444; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.2em 0.8em 0.2em 0; text-align: right; border-bottom: 1px solid #ccc; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
.best td {{ font-weight: bold; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0 1em; }}
dd {{ margin: 0; }}
pre {{ background: #f2f2f2; padding: 1em; white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def formats() -> list[str]:
    """Suffixes of what `write` can write."""
    return sorted({*_figure(1, 1).canvas.get_supported_filetypes(), "html"})


def write(
    path: Path,
    judged: Study,
    panels: Mapping[str, Sequence[Row]],
    chosen: Row | None,
    columns: Sequence[str],
    advice: tuple[str, str] | None = None,
) -> None:
    """Draws the imbalances of each panel; on a page also rank loads, before and with the chosen placement, and tables.

    Args:
      path: its suffix says what is written.
      judged: what was judged.
      panels: rows by title.
      chosen: of them, the one whose rank loads are shown, if any fits.
      columns: of the tables.
      advice: what to take and why, and the Python that does.
    """
    figure = _distributions(panels, chosen)
    if path.suffix != ".html":
        figure.savefig(path, dpi=150)
        return
    title = f"Expert load balance of {judged.recording.trace.name}"
    size = decimal(round(judged.expert_bytes)) if judged.expert_bytes else "not given"
    settings = {
        "recording": f"{judged.recording.trace}: {judged.experts} experts, {judged.layers} layers",
        "judged on": f"{judged.steps} batches of {judged.choices:,.0f} expert choices a layer, in the mean",
        "placed by": f"the {judged.recording.window} batches before, for {judged.recording.window}; per batch: by the "
        "batch itself",
        "weights of an expert": size,
        "jax_lplb": __version__,
    }
    body = [f"<h1>{escape(title)}</h1>", "<dl>"]
    body += [f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in settings.items()]
    body.append("</dl>")
    if advice is not None:
        said, code = advice
        body += ["<h2>Advice</h2>", *(f"<p>{escape(line)}</p>" for line in said.splitlines())]
        body.append(f"<pre>{escape(code)}</pre>")
    if chosen is not None:
        body += ["<h2>Rank loads</h2>", _embedded(*_rank_loads(judged, chosen))]
    body += [
        "<h2>Imbalance</h2>",
        _embedded(
            figure,
            "Largest rank load over mean rank load, over the percentage of batches and layers that are no worse: the "
            "further to the right a line stays at 1, the better."
            + " Of each kind of placement, the best."
            * (advice is not None),
        ),
    ]
    for name, rows in panels.items():
        body += _table(name, rows, chosen, columns)
    notes = study.notes(columns)
    if chosen is not None:
        notes["in bold"] = "the placement whose rank loads are shown."
    body += ["<dl>", *(f"<dt>{name}</dt><dd>{escape(note)}</dd>" for name, note in notes.items())]
    path.write_text(PAGE.format(title=escape(title), body="\n".join([*body, "</dl>"])), encoding="utf-8")


def _table(name: str, rows: Sequence[Row], chosen: Row | None, columns: Sequence[str]) -> list[str]:
    html = [f'<div class="wide"><table><caption>{escape(name)}</caption><tr><th>placement</th>']
    html += [f"<th>{escape(column)}</th>" for column in columns]
    for row in rows:
        html.append('</tr><tr class="best">' if row is chosen else "</tr><tr>")
        html += [f"<td>{escape(cell)}</td>" for cell in study.cells(row, columns)]
    return [*html, "</tr></table></div>", *(f"<p>{escape(reason)}</p>" for reason in study.reasons(rows))]


def _embedded(figure: Any, caption: str) -> str:
    """As an image within the page, where its ids meet no other figure's."""
    svg = io.BytesIO()
    figure.savefig(svg, format="svg")
    data = base64.b64encode(svg.getvalue()).decode()
    said = escape(caption)
    return f'<figure><img alt="{said}" src="data:image/svg+xml;base64,{data}"><figcaption>{said}</figcaption></figure>'


def _distributions(panels: Mapping[str, Sequence[Row]], chosen: Row | None) -> Any:
    """The imbalance over the share of batches and layers that are no worse, for each placement."""
    per_line = min(len(panels), 2)
    lines = -(-len(panels) // per_line)
    figure = _figure(11 if per_line > 1 else 9, 4 * lines)
    axes = figure.subplots(lines, per_line, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        # Of each kind one: the chosen, or else the best.
        fitting = [row for row in rows if row.imbalance is not None]
        worst_first = sorted(fitting, key=lambda row: (row is not chosen, row.order), reverse=True)
        drawn = {(row.candidate.kind, row.candidate.groups): row for row in worst_first}
        of_kinds = sorted(drawn.values(), key=lambda row: list(STYLES).index(row.candidate.kind))
        for label, row in zip(study.labels(of_kinds), of_kinds, strict=True):
            assert row.imbalance is not None
            kind, groups = row.candidate.kind, row.candidate.groups
            colour, dashes = STYLES[kind] if groups == 1 else IN_NODES
            values = np.sort(row.imbalance, axis=None)
            share = np.arange(1, values.size + 1) / values.size * 100
            axis.plot(share, values, color=colour, linestyle=dashes, label=label)
        axis.set_title(title, fontsize="medium")
        axis.set(xlabel="% of batches and layers", ylabel="imbalance (max / mean rank load)")
        axis.label_outer()
        if of_kinds:
            axis.legend(frameon=False, fontsize="small", loc="upper left")
    return figure


def _rank_loads(judged: Study, chosen: Row) -> tuple[Any, str]:
    """Heat maps of one layer's rank loads by batch, without copies and as chosen; and what they show."""
    ranks = chosen.candidate.ranks
    by_layer = judged.without_copies(ranks).reshape(-1, judged.layers)
    layer = int(np.percentile(by_layer, 95, axis=0).argmax())
    loads = judged.layer(layer, MOST_BATCHES)
    tried = {"without copies": _simulate.Candidate("none", ranks, 0), chosen.title: chosen.candidate}
    shares = {}
    for title, candidate in tried.items():
        tokens = _simulate.rank_loads(candidate, loads)
        shares[title] = tokens / np.maximum(tokens.mean(axis=1, keepdims=True), 1e-9)
    every = np.stack(list(shares.values()))
    figure = _figure(11, 2.6 * len(shares))
    axes = figure.subplots(len(shares), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, share) in zip(axes, shares.items(), strict=True):
        first = judged.steps - len(share)
        image = axis.imshow(
            share.T,
            aspect="auto",
            interpolation="nearest",
            cmap="cividis",
            vmin=every.min(),
            vmax=every.max(),
            extent=(first + 0.5, judged.steps + 0.5, ranks - 0.5, -0.5),
        )
        axis.set(title=title, ylabel="rank")
        axis.yaxis.get_major_locator().set_params(integer=True)
    axes[-1].set(xlabel="batch")
    figure.colorbar(image, ax=list(axes), label="rank load / mean")
    shown = f"the last {len(share)} of {judged.steps}" if len(share) < judged.steps else f"{len(share)}"
    return figure, (
        f"Tokens of each of {ranks} ranks over the mean, in {shown} batches of layer {layer} (from 0), the least even "
        f"without copies. Above: experts in logical order, no copies. Below: {chosen.named}. Bright is busy; an even "
        "load is of one shade."
    )


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        stop("--plot needs matplotlib: pip install matplotlib")
    return Figure(figsize=(width, height), layout="constrained")
