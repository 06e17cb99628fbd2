"""Bytes of text as shuffled windows, the same for every step whoever asks."""

import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import jax
import numpy as np

from config import VOCABULARY, Config, Data

Array = np.ndarray


def read(data: Data, say: Callable[[str], None]) -> Array:
    """All documents, one after the other with a zero byte between, uint8 [bytes].

    What is no UTF-8 text is left out of folders, with a line about it, and refused where it was named itself.
    """
    documents, left_out = [], []
    for path in _files(data) if data.data else _standard_library():
        document = path.read_bytes()
        if _is_text(document):
            documents.append(document)
        elif path in data.data:
            raise SystemExit(f"train: --data: {path} is no UTF-8 text")
        else:
            left_out.append(path)
    if left_out:
        say(f"left out, no UTF-8 text: {left_out[0]}" + (f" and {len(left_out) - 1} more" if left_out[1:] else ""))
    if not data.data:
        documents += [text.encode() for text in pydoc_data.topics.topics.values()]
    return np.frombuffer(b"\0".join(documents), np.uint8)


def _files(data: Data) -> Iterator[Path]:
    for path in data.data:
        if not path.exists():
            raise SystemExit(f"train: --data: no such file or folder: {path}")
        files = [path] if path.is_file() else _in_folder(path, data.suffixes)
        if not files:
            raise SystemExit(f"train: --data: no file that ends in {', '.join(data.suffixes)} in {path} (--suffixes)")
        yield from files


def _standard_library() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _in_folder(root, (".py",)):
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(root).parts):
            yield path


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())


def _is_text(document: bytes) -> bool:
    try:
        document.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in document  # zero bytes, which are UTF-8, are what binary files are full of


def unigram_entropy(text: Array) -> float:
    """Nats a byte: the loss of a model that knows how frequent each byte is, and nothing else."""
    share = np.bincount(text.ravel(), minlength=VOCABULARY) / text.size
    return float(-np.sum(share[share > 0] * np.log(share[share > 0])))


class Corpus:
    """Text cut into windows of seq_len + 1 bytes, inputs and targets; those held out are spread over all of it."""

    def __init__(self, text: Array, config: Config) -> None:
        """Ends with one line where there is too little text."""
        length, self.batch = config.data.seq_len + 1, config.data.batch
        held_out = config.data.validation_batches * self.batch
        count = len(text) // length
        if count < held_out + self.batch:
            raise SystemExit(
                f"train: too little data: {len(text):,} bytes of text, but --batch {self.batch} and "
                f"--validation-batches {config.data.validation_batches} need {(held_out + self.batch) * length:,}"
            )
        windows = text[: count * length].reshape(count, length)
        chosen = np.zeros(count, bool)
        chosen[np.arange(held_out) * count // held_out] = True
        self.held_out, self.windows, self._index = windows[chosen], windows, np.flatnonzero(~chosen)
        self._seed = config.seed

    def __len__(self) -> int:
        """Windows to train on."""
        return len(self._index)

    def __getitem__(self, index: int) -> Array:
        """A window to train on, uint8 [seq_len + 1]."""
        return self.windows[self._index[index]]

    def training(self, step: int, processes: int, process: int) -> Iterator[Array]:
        """A process's part of the batches from `step` on, uint8 [batch / processes, seq_len + 1], without an end."""
        shuffled = grain.MapDataset.source(self).seed(self._seed).shuffle().repeat()
        batches = shuffled[process::processes].batch(self.batch // processes)[step:]
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))

    def validation(self, processes: int, process: int) -> Iterator[Array]:
        """The same, of what is held out, once."""
        yield from self.held_out[process::processes].reshape(-1, self.batch // processes, self.held_out.shape[1])


def on_devices(batch: Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """The whole batch of all processes, its sequences over all devices."""
    return jax.make_array_from_process_local_data(jax.NamedSharding(mesh, jax.P(mesh.axis_names)), batch)
