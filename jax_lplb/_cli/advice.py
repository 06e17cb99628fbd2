"""Which placement to take, and the Python that does."""

from collections.abc import Sequence

from jax_lplb import _simulate, load_trace
from jax_lplb._cli import study
from jax_lplb._cli.study import Row, Study


def rule(percent: float) -> str:
    """How `choose` chooses, in words."""
    return (
        f"of the placements whose imbalance at 95 % is within {percent:g} % of the best, that with the fewest slots "
        "for copies; of these one whose copies stay within a node, if nodes are given; then that with the least moved"
    )


def choose(rows: Sequence[Row], percent: float) -> Row:
    """By the rule, of rows that were judged."""
    best = min(row.numbers["imbalance"]["p95"] for row in rows)
    near = [row for row in rows if row.numbers["imbalance"]["p95"] <= best * (1 + percent / 100)]
    return min(
        near, key=lambda row: (row.candidate.redundants, row.candidate.groups == 1, row.numbers["experts_moved"])
    )


def words(chosen: Row, rows: Sequence[Row], percent: float, without: float) -> str:
    """What to take, and why; `without`: the imbalance at 95 % without copies."""
    best = min(rows, key=lambda row: row.order)
    imbalance = chosen.numbers["imbalance"]
    said = (
        f"Take {chosen.named}. The busiest rank has at most {imbalance['p95']:.3f} times the mean in 95 % of batches "
        f"and layers, {imbalance['p50']:.3f} times in the median"
    )
    if chosen.candidate.kind != "none":
        said += f"; without copies {without:.3f} in 95 %"
    if chosen is best:
        why = "It is the best at 95 %, and"
    else:
        why = f"The best at 95 % is {best.named}: {best.numbers['imbalance']['p95']:.3f};"
    return (
        f"{said}.\n{why} the rule is: {rule(percent)}. On each rank its slots hold "
        f"{study.weights(chosen, 'slots', 0)} over all layers; {study.weights(chosen, 'moved', 1)} are moved a batch."
    )


def code(candidate: _simulate.Candidate, judged: Study) -> str:
    """A layer with this placement: lines that run as they are, on as many devices as there are ranks."""
    recording, experts = judged.recording, judged.experts
    d_model, d_expert = recording.widths or (64, 128)
    lines = [
        "import jax",
        "import jax_lplb as lplb",
        "from flax import nnx",
        "from jax_lplb.flax import MoE",
        "",
    ]
    if candidate.by_past:
        lately = f"[-{recording.window}:, 0].mean(axis=0)"
        try:
            load_trace(recording.trace)
        except (OSError, ValueError):
            lines[0] += "\nimport numpy as np"
            lines += [
                f"# Put here what each expert of a layer had lately: lplb.load_trace(folder of a Recorder){lately}",
                f"past = np.ones({experts})",
            ]
        else:
            lines += [
                "# What each expert had lately, of the first layer: each layer has a placement of its own.",
                f"past = lplb.load_trace({str(recording.trace)!r}){lately}",
            ]
    lines.append(f"placement = {candidate.source(experts)}")
    if candidate.kind.startswith("topology"):
        lines.append("# Weights that are there already follow once: params = lplb.from_logical(params, placement)")
    lines += [
        f'mesh = jax.make_mesh(({candidate.ranks},), ("ep",))',
        f"d_model, d_expert, top_k = {d_model}, {d_expert}, {min(8, experts)}  # put here those of your model",
        f'layer = MoE(d_model, {experts}, d_expert, top_k, mesh=mesh, axis_name="ep", placement=placement, '
        "rngs=nnx.Rngs(0))",
        "",
        "# Or in a layer of your own:",
        "@jax.jit",
        '@jax.shard_map(mesh=mesh, in_specs=jax.P("ep"), out_specs=jax.P("ep"))',
        "def slots_of(expert_ids):  # [tokens, top_k] of this rank",
        '    return lplb.balance(expert_ids, placement, axis_name="ep").physical_ids',
    ]
    return "\n".join(lines)
