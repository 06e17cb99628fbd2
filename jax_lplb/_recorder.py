"""Loads of a running layer, recorded as a trace."""

import os
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from numpy.typing import ArrayLike

from jax_lplb import _archive
from jax_lplb._checks import check_count


class Recorder:
    """Records the loads of a running model as a trace, for `load_trace` and `evaluate`.

    The trace is a folder of npz files, each with the `counts` [steps, layers, num_experts] of up to `chunk_steps`
    steps, and named by the first of them. Each is whole or not there: what was written before a process was killed can
    be read. Close the recorder, or use it as a context manager: the last steps are written then.

    Loads are not waited for: the recorder holds what the devices will have computed, at most `chunk_steps` of them. A
    full chunk is fetched when the next load comes, whose step then keeps the devices busy meanwhile.

    With several processes, record in one of them.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, every: int = 1, max_steps: int | None = 4096, chunk_steps: int = 64
    ) -> None:
        """Makes the folder.

        Args:
          path: a folder that is not there yet, or is empty.
          every: of so many loads one is recorded, beginning with the first.
          max_steps: so many loads are recorded, and further ones ignored. None: no limit.
          chunk_steps: loads in a file, and the most that are held, on the devices and the host.

        Raises:
          TypeError, ValueError: a number is not one, or is not positive.
          FileExistsError: there is something at `path`.
        """
        check_count("every", every)
        check_count("chunk_steps", chunk_steps)
        if max_steps is not None:
            check_count("max_steps", max_steps)
        self._path = Path(path)
        self._every, self._max_steps, self._chunk_steps = every, max_steps, chunk_steps
        self._seen = self._written = 0
        self._pending: list[jax.Array | np.ndarray] = []
        self._like: tuple[tuple[int, ...], np.dtype] | None = None
        self._closed = False
        if self._path.exists() and (not self._path.is_dir() or any(self._path.iterdir())):
            raise FileExistsError(
                f"path must be a folder that is not there yet, or is empty, got {os.fspath(path)!r}; choose another, "
                "or remove it"
            )
        self._path.mkdir(parents=True, exist_ok=True)

    def record(self, step_load: jax.Array | ArrayLike) -> None:
        """Takes the load of a step, without waiting for it.

        Args:
          step_load: integers [num_experts] or [layers, num_experts], tokens of each logical expert, such as
            `Metrics.load`; of one shape and dtype in all steps. Not to be donated afterwards.

        Raises:
          TypeError: it does not hold integers, or is traced.
          ValueError: it has another shape or dtype than before or is not whole in this process, or the recorder is
            closed.
          OSError: a full chunk cannot be written. It is kept, and the next call tries again.
        """
        if self._closed:
            raise ValueError(f"the recorder of {self._path} is closed; make another, with another path")
        if self._seen % self._every == 0:
            load = self._checked(step_load)
            enough = self._written + len(self._pending) == self._max_steps
            if self._pending and (enough or len(self._pending) == self._chunk_steps):
                self._write()
            if not enough:
                self._pending.append(load)
        self._seen += 1

    def close(self) -> None:
        """Writes the steps that are still held. Nothing happens where the recorder is closed already."""
        if self._pending:
            self._write()
        self._closed = True

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, load: jax.Array | ArrayLike) -> jax.Array | np.ndarray:
        if isinstance(load, jax.core.Tracer):
            raise TypeError("step_load must not be traced: return it from the jitted function, and record it outside")
        if not isinstance(load, jax.Array):
            load = np.array(load)  # a copy, as the caller may go on counting in it
        if not np.issubdtype(load.dtype, np.integer):
            raise TypeError(f"step_load must hold integers, tokens of each expert; got dtype {load.dtype}")
        if load.ndim not in (1, 2) or 0 in load.shape:
            raise ValueError(f"step_load must have shape [num_experts] or [layers, num_experts], got {load.shape}")
        like = load.shape, load.dtype
        shape, dtype = self._like or like
        if like != (shape, dtype):
            raise ValueError(
                f"step_load must be {dtype}{list(shape)} as in the first step, got {load.dtype}{list(load.shape)}"
            )
        if isinstance(load, jax.Array):
            if not (load.is_fully_addressable or load.is_fully_replicated):
                raise ValueError(
                    "step_load must be whole in this process, got one that is sharded over several; replicate it, by "
                    "the out_shardings of the jitted function"
                )
            load.copy_to_host_async()
        self._like = like
        return load

    def _write(self) -> None:
        counts = np.stack(jax.device_get(self._pending))
        counts = counts.reshape(len(counts), -1, counts.shape[-1])
        _archive.write(_chunk(self._path, self._written), counts=counts)
        self._written += len(counts)
        self._pending = []  # only now: where nothing could be written, the next call tries again


def load_trace(path: str | os.PathLike[str]) -> np.ndarray:
    """The loads of a trace, integers [steps, layers, num_experts], for `evaluate`.

    Args:
      path: the folder that a `Recorder` wrote, closed or not; or an npz file with such `counts`.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: nothing was recorded, a file is missing or cannot be read, or files are of different traces.
    """
    folder = Path(path)
    if not folder.is_dir():
        return _counts(folder)
    chunks: list[np.ndarray] = []
    steps = 0
    for file in sorted(folder.glob("*.npz")):
        if file != _chunk(folder, steps):
            raise ValueError(f"{file}: expected {_chunk(folder, steps).name} next, with the steps from {steps} on")
        counts = _counts(file)
        if chunks and (counts.shape[1:], counts.dtype) != (chunks[0].shape[1:], chunks[0].dtype):
            raise ValueError(
                f"{file}: expected counts {chunks[0].dtype} [steps, {', '.join(map(str, chunks[0].shape[1:]))}] as in "
                f"the files before, found {counts.dtype} {list(counts.shape)}"
            )
        chunks.append(counts)
        steps += len(counts)
    if not chunks:
        raise ValueError(f"{path}: expected a folder that a Recorder wrote, found one without npz files")
    return np.concatenate(chunks)


def _chunk(folder: Path, first: int) -> Path:
    return folder / f"{first:010d}.npz"


def _counts(path: Path) -> np.ndarray:
    (counts,) = _archive.read(path, "counts")
    if counts.ndim != 3 or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(
            f"{path}: expected counts, integers [steps, layers, num_experts], found {counts.dtype} {list(counts.shape)}"
        )
    return counts
