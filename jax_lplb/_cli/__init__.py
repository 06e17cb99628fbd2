"""The command line, `jax-lplb`."""

import sys

import jax


def main() -> None:
    """Runs `jax-lplb`."""
    try:
        from jax_lplb._cli import commands
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("rich", "tyro"):
            raise
        raise SystemExit(f"jax-lplb needs rich and tyro, and there is no {missing}: pip install rich tyro") from None
    if sys.argv[1:2] in (["simulate"], ["advise"]):
        # On the CPU alone: a GPU may be in use, and JAX would take most of its memory.
        jax.config.update("jax_platforms", "cpu")
    commands.run(sys.argv[1:])
