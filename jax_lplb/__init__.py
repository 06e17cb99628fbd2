"""Mixture-of-Experts load balancing by linear programming, for JAX.

`balance` redirects the tokens of each batch to redundant copies of their experts, so that the busiest rank of an
expert-parallel axis carries as little as possible.
"""

from jax_lplb import eplb as eplb
from jax_lplb import topology as topology
from jax_lplb._assign import assign as assign
from jax_lplb._balance import Balanced as Balanced
from jax_lplb._balance import balance as balance
from jax_lplb._count import count_load as count_load
from jax_lplb._evaluate import Evaluation as Evaluation
from jax_lplb._evaluate import evaluate as evaluate
from jax_lplb._placement import Placement as Placement
from jax_lplb._solve import Solution as Solution
from jax_lplb._solve import solve as solve
from jax_lplb._status import Status as Status
from jax_lplb._weights import from_logical as from_logical
from jax_lplb._weights import permute_experts as permute_experts
from jax_lplb._weights import replicate as replicate
from jax_lplb._weights import to_logical as to_logical
