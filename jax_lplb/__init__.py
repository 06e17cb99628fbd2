"""Mixture-of-Experts load balancing by linear programming, for JAX.

`balance` redirects the tokens of each batch to redundant copies of their experts, so that the busiest rank of an
expert-parallel axis carries as little as possible.
"""

from jax_lplb import eplb, topology
from jax_lplb._assign import assign
from jax_lplb._balance import Balanced, balance
from jax_lplb._count import count_load
from jax_lplb._dispatch import Dispatched, Handle, combine, dispatch
from jax_lplb._evaluate import Evaluation, evaluate
from jax_lplb._ffi import CUSTOM_CALLS
from jax_lplb._permute_experts import from_logical, permute_experts, to_logical
from jax_lplb._placement import Placement
from jax_lplb._recorder import Recorder, load_trace
from jax_lplb._replicate import replicate
from jax_lplb._solve import Solution, solve
from jax_lplb._status import Status

__version__ = "0.1.0"  # the one place: pyproject.toml reads it here

__all__ = [
    "CUSTOM_CALLS",
    "Balanced",
    "Dispatched",
    "Evaluation",
    "Handle",
    "Placement",
    "Recorder",
    "Solution",
    "Status",
    "assign",
    "balance",
    "combine",
    "count_load",
    "dispatch",
    "eplb",
    "evaluate",
    "from_logical",
    "load_trace",
    "permute_experts",
    "replicate",
    "solve",
    "to_logical",
    "topology",
]
