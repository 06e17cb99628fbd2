"""`jax-lplb doctor`: whether jax_lplb works here."""

import platform
import re
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

import jax_lplb as lplb
from jax_lplb import _ffi, _peer

CALLS = 16  # of which the time of one is the mean


class Finding(NamedTuple):
    """A line of what `doctor` says."""

    what: str
    found: str
    wrong: bool = False


def main(console: Console) -> int:
    """Prints all findings; 1 if one of them is wrong, else 0."""
    wrong = []
    for finding in findings():
        mark = "[red]wrong[/]" if finding.wrong else "     "
        console.print(f"{mark} [bold]{finding.what:16}[/] ", end="")
        console.print(finding.found, markup=False)
        wrong += [finding.what] * finding.wrong
    console.print("Wrong: " + ", ".join(wrong) if wrong else "All is well.")
    return 1 if wrong else 0


def findings() -> Iterator[Finding]:
    """One after the other; the last ones compile and run."""
    yield Finding("platform", f"{platform.platform()}, Python {platform.python_version()}")
    yield Finding("jax_lplb", f"{lplb.__version__}, {Path(lplb.__file__).parent}")
    yield Finding("jax", f"jax {version('jax')}, jaxlib {version('jaxlib')}, numpy {version('numpy')}")
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        yield Finding("devices", f"JAX finds none: {str(error).splitlines()[0]}", wrong=True)
        return
    # Platforms are called gpu where devices are asked for, and cuda where handlers are.
    name = {"gpu": "cuda"}.get(devices[0].platform, devices[0].platform)
    kinds = sorted({device.device_kind for device in devices})
    yield Finding("devices", f"{len(devices)} of {name}: {', '.join(kinds)}")
    if name == "cuda":
        yield Finding("driver", f"{_driver()}; {' '.join(devices[0].client.platform_version.split())}")
    for each in sorted({"cpu", "cuda", name}):
        why_not = _ffi.why_no_handlers(each)
        # Platforms without handlers run pure JAX; so does CUDA where nobody has a GPU.
        expected = each == name and each in ("cpu", "cuda")
        yield Finding(f"handlers {each}", why_not or "registered", wrong=bool(why_not) and expected)
    yield Finding("peers' memory", _reach(devices))
    for what, check in (("solve", partial(_solves, name)), ("balance", _time)):
        try:
            yield from check()
        except RuntimeError as error:  # as JAX's own are
            yield Finding(what, str(error).splitlines()[0], wrong=True)


def _driver() -> str:
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError as error:
        return f"the driver does not say its version: {error.strerror}"
    return f"driver {found[1]}" if found else "the driver does not say its version"


def _reach(devices: list[jax.Device]) -> str:
    """Whether tokens and weights can be read from other devices' memory; what the layer would find when tracing."""
    if len(devices) == 1:
        return "there is one device"
    why_not = []

    def ask(x: jax.Array) -> jax.Array:
        why_not.append(_peer.why_out_of_reach("ep", (), (), asked=False))
        return x

    mesh = jax.sharding.Mesh(np.array(devices), ("ep",))
    jax.eval_shape(jax.shard_map(ask, mesh=mesh, in_specs=jax.P("ep"), out_specs=jax.P("ep")), np.zeros(len(devices)))
    if why_not[0]:
        return f"out of reach, so that tokens and weights go by XLA's collectives: {why_not[0]}"
    return f"all {len(devices)} devices reach each other's"


def _solves(name: str) -> Iterator[Finding]:
    """The custom calls beside the same algorithms in pure JAX, on one load."""
    if name not in _ffi.handlers():
        yield Finding("solve", f"no custom call on {name} to compare with pure JAX")
        return
    load = np.random.default_rng(0).lognormal(0, 1, 64) * 100
    load = np.rint(load).astype(np.int32)
    place = lplb.Placement.from_topology(lplb.topology.cube(), num_experts=64, num_ranks=8, redundants_per_rank=2)
    for solver in ("edge_balance", "ipm"):
        by_call, by_jax = (jax.tree.map(np.asarray, _solve(load, place, solver, way)) for way in ("ffi", "xla"))
        busiest, other = by_call.rank_load.max(), by_jax.rank_load.max()
        # Both are within a certified gap of the same optimum; edge balance gives the same bits.
        slack = 0 if solver == "edge_balance" else max(by_call.gap.max(), by_jax.gap.max()) + 1e-6
        wrong = (
            not abs(busiest - other) <= slack * max(busiest, other)
            or not np.allclose(by_call.split.sum(axis=1), load, rtol=1e-5)
            or by_call.status.max() != lplb.Status.CONVERGED
        )
        found = f"busiest rank {busiest:.3f} by custom call, {other:.3f} in pure JAX, gap {by_call.gap.max():.1e}"
        yield Finding(solver, found, bool(wrong))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _solve(load: jax.Array, placement: lplb.Placement, solver: Any, implementation: Any) -> lplb.Solution:
    return lplb.solve(load, placement, solver=solver, implementation=implementation)


def _time() -> Iterator[Finding]:
    """A call's time on the device: many are in one program, which the host launches once."""
    place = lplb.Placement.per_batch(num_experts=256, num_ranks=8, redundants_per_rank=2)
    rng = np.random.default_rng(0)
    liked = rng.standard_normal(256, np.float32) + rng.standard_normal((CALLS, 4096, 256), np.float32)
    ids = jax.device_put(np.argpartition(liked, -8, axis=-1)[..., -8:].astype(np.int32))
    run = jax.jit(lambda ids: jax.lax.map(lambda one: lplb.balance(one, place).physical_ids, ids))
    jax.block_until_ready(run(ids))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run(ids))
        seconds.append(time.perf_counter() - start)
    yield Finding(
        "time of balance",
        f"{min(seconds) / CALLS * 1e6:.0f} us a call: 4,096 tokens, top-8 of 256 experts, 8 ranks with 2 slots each, "
        "copies by batch",
    )
