"""Topologies: which rank keeps copies of which other rank's experts.

After DeepSeek's LPLB (https://github.com/deepseek-ai/LPLB), whose `r2o` arrays these are.
"""

import dataclasses
import reprlib

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Topology", "cube", "from_r2o", "hypercube", "ring", "torus"]


def __dir__() -> list[str]:
    return __all__


_columns = reprlib.Repr()
_columns.maxlist = 16


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Topology:
    """The copies that a group of ranks keeps of each other's experts.

    Frozen and hashable, held on the host. Groups of more ranks repeat it; see `jax_lplb.Placement.from_topology`.

    Attributes:
      r2o: int32 [group_size, num_columns]. `r2o[i, d]` is the rank whose d-th replicated expert rank i keeps a copy
        of. Every column is a permutation of the ranks without fixed points.

    Raises:
      TypeError: `r2o` does not hold integers.
      ValueError: `r2o` is not two-dimensional, or a column is not such a permutation.
    """

    r2o: np.ndarray

    def __post_init__(self) -> None:
        r2o = np.asarray(self.r2o)
        if r2o.ndim != 2 or 0 in r2o.shape:
            raise ValueError(f"r2o must have shape [group_size, num_columns], got shape {r2o.shape}")
        if not np.issubdtype(r2o.dtype, np.integer):
            raise TypeError(f"r2o must hold integer ranks, got dtype {r2o.dtype}")
        group_size = r2o.shape[0]
        for column, owners in enumerate(r2o.T):
            for rank, owner in enumerate(owners):
                if not 0 <= owner < group_size:
                    raise ValueError(
                        f"r2o column {column}: rank {rank} copies from rank {owner}, but the group's ranks are "
                        f"0 to {group_size - 1}"
                    )
                if owner == rank:
                    raise ValueError(
                        f"r2o column {column}: rank {rank} copies from itself; a copy must be on another rank"
                    )
            repeated = np.flatnonzero(np.bincount(owners, minlength=group_size) > 1)
            if repeated.size:
                copiers = np.flatnonzero(owners == repeated[0]).tolist()
                raise ValueError(
                    f"r2o column {column}: ranks {copiers} all copy from rank {repeated[0]}; every rank must be copied "
                    "by exactly one rank in a column (the column is not a permutation)"
                )
        r2o = r2o.astype(np.int32)
        r2o.setflags(write=False)
        object.__setattr__(self, "r2o", r2o)

    @property
    def group_size(self) -> int:
        """Number of ranks that the topology joins."""
        return self.r2o.shape[0]

    @property
    def num_columns(self) -> int:
        """Number of copies each rank keeps, and of its experts that are copied, for each round of columns."""
        return self.r2o.shape[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Topology) and np.array_equal(self.r2o, other.r2o)

    def __hash__(self) -> int:
        return hash((self.r2o.shape, self.r2o.tobytes()))

    def __repr__(self) -> str:
        return f"Topology({self.group_size} ranks, r2o columns {_columns.repr(self.r2o.T.tolist())})"


def from_r2o(r2o: ArrayLike) -> Topology:
    """A topology of one's own; see `Topology` for the meaning and the checks of `r2o` [group_size, num_columns]."""
    return Topology(np.asarray(r2o))


def ring(num_ranks: int) -> Topology:
    """Rank i keeps a copy of an expert of rank i + 1, the last of rank 0. `num_ranks` >= 2."""
    _check_size("num_ranks", num_ranks)
    return Topology((np.arange(num_ranks)[:, None] + 1) % num_ranks)


def cube() -> Topology:
    """LPLB's cube of 8 ranks: two rings of four (its faces), joined by diagonals."""
    return Topology(np.array([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]).T)


def hypercube() -> Topology:
    """LPLB's hypercube of 16 ranks: four rings of four, joined in rings of four."""
    ranks = np.arange(16)
    return Topology(np.stack([ranks // 4 * 4 + (ranks - 1) % 4, (ranks - 4) % 16], axis=1))


def torus(num_rows: int, num_columns: int) -> Topology:
    """A torus of num_rows x num_columns ranks, both >= 2.

    Rank (i, j), numbered i * num_columns + j, keeps copies of an expert of (i + 1, j) and of one of (i, j + 1).
    """
    _check_size("num_rows", num_rows)
    _check_size("num_columns", num_columns)
    ranks = np.arange(num_rows * num_columns).reshape(num_rows, num_columns)
    return Topology(np.stack([np.roll(ranks, -1, 0).ravel(), np.roll(ranks, -1, 1).ravel()], axis=1))


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 2:
        raise ValueError(f"{name} must be at least 2, got {value}: a rank cannot copy from itself")
