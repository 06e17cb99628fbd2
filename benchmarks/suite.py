"""All that is measured on several devices, one after the other: `python benchmarks/suite.py --out FOLDER`.

On all GPUs, two, four, eight or more: the GPU tests, `balance` beside no-op kernels, the Flax layer, and 200 steps of
the pretraining example in each mode of benchmarks/pretrain.py. What fails does not keep the rest from running; exit
code 1 says that something did. `--small` takes sizes for the 8 virtual devices of a CPU, and leaves out the tests.
"""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).parents[1]
EIGHT = "--xla_force_host_platform_device_count=8"


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """The commands, by name, run in the repository's root."""
    python, out = sys.executable, args.out.resolve()
    traces = ["--traces", str(args.traces.resolve())] if args.traces else []
    noop = ["--noop", str(args.noop.resolve())] if args.noop else []
    tokens, sizes, preset, steps = ["4096", "16384"], ["8192"], "small", 200
    smaller: list[str] = []
    if args.small:
        tokens, sizes, preset, steps = ["64"], ["64"], "tiny", 20
        smaller = ["--d-model", "64", "--d-expert", "64", "--repeats", "3", "--sigmas", "0.6"]
    tests = [python, "-P", "-m", "pytest", "tests", "-m", "gpu", "-n", "auto", "--maxprocesses", "16", "-q", *traces]
    return {
        **({} if args.small else {"tests": tests}),
        "balance": [python, "benchmarks/balance.py", "--tokens", *tokens, *noop, "--out", f"{out}/balance.json"],
        "dispatch": [python, "benchmarks/dispatch.py", "--out", f"{out}/dispatch.json"],
        "layer": [python, "benchmarks/layer.py", "--tokens", *sizes, *traces, *smaller, "--out", f"{out}/layer.json"],
        "pretrain": [python, "benchmarks/pretrain.py", preset, "--steps", str(steps), "--out", f"{out}/pretrain"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of results and of what commands print")
    parser.add_argument("--traces", type=pathlib.Path, help="folder of the recorded traces")
    parser.add_argument("--noop", type=pathlib.Path, help="liblplb_noop.so (make bench-build)")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="+", help="names of commands")
    args = parser.parse_args()
    every = commands(args)
    if unknown := set(args.only or ()) - set(every):
        parser.error(f"--only: no such command: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    if (args.out / "pretrain").exists() and "pretrain" in (args.only or every):
        parser.error(f"--out: {args.out} has pretraining runs already; name another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if args.small:
        environment["XLA_FLAGS"] = f"{EIGHT} {environment.get('XLA_FLAGS', '')}".strip()
    console, table, failed = Console(), Table("command", "seconds", "exit code"), False
    for name, command in every.items():
        if args.only and name not in args.only:
            continue
        log, begin = args.out / f"{name.replace(' ', '_')}.txt", time.perf_counter()
        console.print(f"{name}: {shlex.join(command)}", style="bold", highlight=False)
        with log.open("w") as file, console.status(f"{name}, see {log}"):
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        console.print(
            "\n".join(log.read_text(errors="replace").splitlines()[-12:]), highlight=False, markup=False, soft_wrap=True
        )
        table.add_row(name, f"{time.perf_counter() - begin:.0f}", str(code))
        failed |= code != 0
    console.print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
