"""Pretrains a Mixture-of-Experts transformer: `python train.py tiny`. See ../README.md."""

import errno
import os
import signal

from config import parse
from terminal import Terminal

# XLA's flags, one for each reason. What the caller's XLA_FLAGS say stands.
FLAGS = {
    # Eight virtual devices stand in for GPUs where there are none.
    "xla_force_host_platform_device_count": "8",
    # Runs collectives (dispatch, copies of experts, gradients) beside the computation that does not need them.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
}


def set_flags() -> None:
    """Before JAX first looks for its devices, which is when it reads them, and not when it is imported."""
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{key}={FLAGS[key]}" for key in FLAGS if key not in given)])


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line, and says in a line what the user can mend."""
    config = parse(arguments)
    compute = config.compute
    set_flags()
    if not compute.distributed and (compute.coordinator, compute.processes, compute.process) != (None, None, None):
        raise SystemExit("train: --coordinator, --processes and --process go with --distributed")
    try:
        # Of several processes the first one tells; which that is, JAX may have to find out.
        with Terminal(shown=not compute.distributed) as terminal:
            terminal.stage("importing JAX, Flax and Orbax")
            import jax

            from loop import train

            if compute.distributed:
                try:
                    jax.distributed.initialize(compute.coordinator, compute.processes, compute.process)
                except ValueError as error:
                    raise SystemExit(
                        "train: --distributed: no cluster manager found; give --coordinator, --processes, --process: "
                        f"{error}"
                    ) from None
                terminal.shown = jax.process_index() == 0
            train(config, terminal)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        raise SystemExit(f"train: {error.filename or config.out}: {error.strerror or error}") from None
    except Exception as error:
        # Orbax writes in the background and reports a full disk in its own way.
        if os.strerror(errno.ENOSPC) in str(error):
            raise SystemExit(f"train: {config.out}: {os.strerror(errno.ENOSPC)}") from None
        raise


if __name__ == "__main__":
    main()
