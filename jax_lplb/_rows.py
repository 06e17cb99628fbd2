"""Which row of weights each expert has, where ranks keep them in logical order, equally many rows each.

Rank i has the experts from i * num_experts // num_ranks on, up to those of the next. Where ranks do not divide the
experts, some ranks have one fewer than others, and a last row of padding. These ranks are spread evenly, so that groups
of neighbours have about as many experts each, too.
"""

import numpy as np


def has_padding(num_experts: int, num_ranks: int) -> bool:
    """Whether there are rows of padding."""
    return num_experts % num_ranks > 0


def rows_of_experts(num_experts: int, num_ranks: int) -> np.ndarray:
    """int32 [num_experts], numbered over all ranks."""
    return np.flatnonzero(logical_order(num_experts, num_ranks) >= 0).astype(np.int32)


def logical_order(num_experts: int, num_ranks: int) -> np.ndarray:
    """The inverse: int32 [num_ranks * rows], the expert of each row, -1 for padding."""
    first = np.arange(num_ranks + 1) * num_experts // num_ranks
    order = first[:-1, None] + np.arange(-(-num_experts // num_ranks))
    return np.where(order < first[1:, None], order, -1).astype(np.int32).ravel()
