"""Recorded routing, read from files: tokens of each expert, batch by batch. Nothing is unpickled."""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jax_lplb._recorder import load_trace

# How the names of arrays end.
COUNTS, IDS = ("counts", "logical_count"), ("ids",)
WINDOW, MAP = "expert_load_window", "physical_to_logical_map"  # vLLM's
EXPECTED = (
    "expected the folder of a Recorder, or an .npz, .npy or .json file with an array counts or logical_count [steps, "
    f"layers, experts], topk_ids [tokens, layers, k], or {WINDOW} [steps, layers, slots] beside {MAP} [layers, slots]"
)


class BadTraceError(ValueError):
    """A file that holds no trace: what was found in it, and what was expected."""


def read(path: Path, batch_tokens: int = 512, experts: int | None = None) -> list[np.ndarray]:
    """Sequences of batches, int64 [steps, layers, experts] each, of equally many layers and experts.

    Batches without tokens are left out: buffers that are not full yet hold such.

    Args:
      path: the folder of a `Recorder`, an .npz archive, an .npy array or JSON. Of an .npy, the name of the file says
        what it holds.
      batch_tokens: tokens of a batch, where the file has the ids of tokens. Tokens at the end that fill no batch are
        left out.
      experts: how many there are; by default one more than the highest id.

    Raises:
      BadTraceError: in one line.
    """
    arrays = _load(path)
    counts = {name: array for name, array in arrays.items() if name.endswith(COUNTS)}
    for name in arrays:
        if name.endswith(WINDOW):
            counts[name] = _of_experts(path, name, arrays)
    ids = {name: array for name, array in arrays.items() if name.endswith(IDS)}
    if not counts and not ids:
        raise BadTraceError(f"{path} has {', '.join(map(repr, arrays)) or 'nothing'}; {EXPECTED}")
    if counts:
        sequences = [_check_counts(f"{path}: {name}", array) for name, array in counts.items()]
    else:
        checked = {f"{path}: {name}": _check(f"{path}: {name}", array) for name, array in ids.items()}
        highest = max(int(array.max()) for array in checked.values())
        if highest < 0:
            raise BadTraceError(f"{path} has topk_ids of padding alone, all below 0; expected ids of experts")
        experts = experts or 1 + highest
        sequences = [_count(name, array, batch_tokens, experts) for name, array in checked.items()]
    sequences = [sequence[sequence.any(axis=(1, 2))] for sequence in sequences]
    if not any(map(len, sequences)):
        raise BadTraceError(f"{path} has no tokens at all; {EXPECTED}")
    shapes = {sequence.shape[1:] for sequence in sequences}
    if len(shapes) > 1:
        raise BadTraceError(f"{path} has arrays of [layers, experts] {sorted(shapes)}; expected equally many in all")
    if experts not in (None, sequences[0].shape[2]):
        raise BadTraceError(f"{path} has counts of {sequences[0].shape[2]} experts, and --experts is {experts}")
    return sequences


def _load(path: Path) -> dict[str, Any]:
    """Arrays by their names, or what JSON has in their place. Of an archive, what has another name is not read."""
    if path.is_dir():
        try:
            return {"counts": load_trace(path)}
        except (OSError, ValueError) as error:
            raise BadTraceError(str(error).splitlines()[0]) from error
    try:
        if path.suffix in (".npz", ".npy"):
            with path.open("rb") as file:
                loaded = np.load(file, allow_pickle=False)
                if isinstance(loaded, np.ndarray):
                    return {path.stem: loaded}
                return {
                    name: loaded[name] if name.endswith((*COUNTS, *IDS, WINDOW, MAP)) else None for name in loaded.files
                }
        if path.suffix == ".json":
            contents = json.loads(path.read_text())
            if not isinstance(contents, dict):
                raise BadTraceError(f"{path} has a JSON {type(contents).__name__}; {EXPECTED}")
            return contents
    except BadTraceError:
        raise
    except OSError as error:
        raise BadTraceError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        raise BadTraceError(f"{path} is no {path.suffix} file without pickles: {str(error).splitlines()[0]}") from error
    if path.suffix == ".pt":
        converted = str(path.with_suffix(".npz"))
        raise BadTraceError(
            f"{path} would have to be unpickled; convert SGLang's dump: python -c \"import numpy, torch; dump = "
            f"torch.load({str(path)!r}, 'cpu', weights_only=True); numpy.savez({converted!r}, "
            "logical_count=dump['logical_count'].numpy())\""
        )
    raise BadTraceError(f"{path} has the suffix {path.suffix!r}, and nothing is unpickled; {EXPECTED}")


def _of_experts(path: Path, name: str, arrays: dict[str, Any]) -> np.ndarray:
    """Tokens of each expert [steps, layers, experts], of vLLM's load window, which has those of slots."""
    window = _check_counts(f"{path}: {name}", arrays[name])
    of_slots = name.removesuffix(WINDOW) + MAP
    if of_slots not in arrays:
        raise BadTraceError(
            f"{path} has {name!r} of slots; expected {of_slots!r} [layers, slots] beside it, in an .npz"
        )
    experts = _check(f"{path}: {of_slots}", arrays[of_slots], 2)
    if experts.shape != window.shape[1:] or experts.min() < 0:
        raise BadTraceError(
            f"{path}: {of_slots} has shape {experts.shape} and experts from {experts.min()}; expected "
            f"{window.shape[1:]} as {name} has, and none below 0"
        )
    counts = np.zeros((*window.shape[:2], 1 + experts.max()), np.int64)
    for slot, expert in enumerate(experts.T):  # of each layer
        counts[:, np.arange(len(expert)), expert] += window[..., slot]
    return counts


def _check(name: str, array: Any, axes: int = 3) -> np.ndarray:
    """Of so many axes and not empty, of whole numbers, as int64."""
    try:
        array = np.asarray(array)
    except ValueError as error:
        raise BadTraceError(f"{name} is ragged; {EXPECTED}") from error
    if array.ndim != axes or array.size == 0:
        raise BadTraceError(f"{name} has shape {array.shape}; {EXPECTED}")
    if np.issubdtype(array.dtype, np.integer):
        whole = array.max() < 2**31
    else:
        whole = np.issubdtype(array.dtype, np.floating) and np.all((np.abs(array) < 2**31) & (array == np.rint(array)))
    if not whole:
        raise BadTraceError(f"{name} has dtype {array.dtype}; expected whole numbers below 2**31")
    return array.astype(np.int64)


def _check_counts(name: str, array: Any) -> np.ndarray:
    counts = _check(name, array)
    most = counts.sum(axis=2).max()
    if counts.min() < 0 or most >= 2**31:
        raise BadTraceError(
            f"{name} has counts from {counts.min()}, and up to {most} tokens in a batch; expected none below 0, and "
            "fewer than 2**31 tokens"
        )
    return counts


def _count(name: str, ids: np.ndarray, batch_tokens: int, experts: int) -> np.ndarray:
    """Tokens of each expert [steps, layers, experts], of ids [tokens, layers, k]; negative ones are padding."""
    if ids.max() >= experts:
        raise BadTraceError(f"{name} has an id {ids.max()}; expected ids below --experts, {experts}")
    steps, layers = len(ids) // batch_tokens, ids.shape[1]
    if steps == 0:
        raise BadTraceError(f"{name} has {len(ids)} tokens; expected at least --batch-tokens, {batch_tokens}")
    ids = ids[: steps * batch_tokens].reshape(steps, batch_tokens, layers, -1)
    row = np.arange(steps)[:, None, None, None] * layers + np.arange(layers)[:, None]
    flat = (row * experts + ids)[ids >= 0]
    return np.bincount(flat, minlength=steps * layers * experts).reshape(steps, layers, experts)
