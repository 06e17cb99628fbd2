"""How a solve ends."""

import enum


class Status(enum.IntEnum):
    """How a group's solve ended.

    Every split is feasible and, unless `threshold` left all load at home, no worse than the even one.
    """

    CONVERGED = 0
    """The certified gap is at most `tol`."""
    MAX_ITERATIONS = 1
    """The iteration limit, or float32, was reached first; the best split found is used, with its certified gap."""
    EVEN_SPLIT = 2
    """Likewise, and the best split found is the even one."""
    SKIPPED = 3
    """All load is at home: nothing in the group is replicated, or no rank is above `threshold`. The gap is that of home
    loads."""
