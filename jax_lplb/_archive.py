"""Files of arrays (npz, without pickle) that are whole or not there, and what is said of those that are not good."""

import os
import secrets
import zipfile
from pathlib import Path

import numpy as np


def write(path: str | os.PathLike[str], **arrays: np.ndarray) -> None:
    """Writes a file of just this name, in place of any that is there, by way of a temporary one beside it."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:  # to a file, as NumPy gives names a suffix of its own
            np.savez(file, **arrays)  # type: ignore[arg-type]  # of its option allow_pickle, which no name here is
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], *names: str) -> tuple[np.ndarray, ...]:
    """The arrays of these names; ValueError where the file is no npz, is damaged, or has not got them all."""
    expected = f"expected an npz file with {', '.join(names)}"
    with Path(path).open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: {expected}, found a file that is no npz, or was cut short")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                there = archive.files
                arrays = tuple(archive[name] for name in names if name in there)
        except Exception as error:  # of NumPy, zipfile or zlib, by what is damaged
            raise ValueError(
                f"{path}: {expected}, found one that cannot be read: {str(error).partition(chr(10))[0]}"
            ) from error
    if len(arrays) < len(names):
        raise ValueError(f"{path}: {expected}, found {', '.join(there) or 'no arrays'}")
    return arrays
