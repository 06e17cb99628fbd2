"""The router: its logits, which experts a token goes to, and the weights of their results.

Scores are normalised as logarithms, and compared as logits: in float32 they may all be 0.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_lplb import _ffi
from jax_lplb._checks import check_choice, check_count, check_positive


class Router(NamedTuple):
    """What is static of it; names as in the configurations of published checkpoints (DeepSeek-V2 and V3).

    Attributes:
      scores: "softmax" or "sigmoid" of the logits.
      top_k: experts of each token.
      norm_topk_prob: gates are the scores of a token's experts, scaled to sum 1; or, if False, the scores. None: True
        unless top_k is 1: then the gate would be 1 whatever the router says, and the router learn nothing.
      routed_scaling_factor: what gates are multiplied by.
      n_group: groups of neighbouring experts, of equal size.
      topk_group: groups in which a token's experts may be.
    """

    scores: Literal["softmax", "sigmoid"]
    top_k: int
    norm_topk_prob: bool | None
    routed_scaling_factor: float
    n_group: int
    topk_group: int

    def check(self, num_experts: int) -> None:
        """Raises TypeError or ValueError, with the name of what is wrong as `flax.MoE` calls it."""
        check_choice("router", self.scores, ("softmax", "sigmoid"))
        check_choice("norm_topk_prob", self.norm_topk_prob, (None, True, False))
        check_positive("routed_scaling_factor", self.routed_scaling_factor)
        for name, count in (("top_k", self.top_k), ("n_group", self.n_group), ("topk_group", self.topk_group)):
            check_count(name, count)
        if num_experts % self.n_group:
            raise ValueError(f"n_group must divide num_experts = {num_experts}, got {self.n_group}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group must be at most n_group = {self.n_group}, got {self.topk_group}")
        reachable = num_experts // self.n_group * self.topk_group
        if self.top_k > reachable:
            raise ValueError(f"top_k must be at most the {reachable} experts that a token can reach, got {self.top_k}")

    def __call__(self, logits: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Routes each token.

        Args:
          logits: float32 [tokens, num_experts].
          bias: float32 [num_experts], added to the scores when experts are picked; or None.

        Returns:
          expert_ids int32 [tokens, top_k]; gates float32 [tokens, top_k]; and probability float32
          [tokens, num_experts], the scores scaled to sum 1. Of a token whose logits are finite all are finite, and so
          are their gradients.
        """
        log_scores = jax.nn.log_softmax(logits) if self.scores == "softmax" else jax.nn.log_sigmoid(logits)
        log_scores = jnp.maximum(log_scores, jnp.finfo(jnp.float32).min)  # a softmax of -inf alone is no number
        expert_ids = self._pick(*lax.stop_gradient((logits, log_scores)), bias)
        log_gates = jnp.take_along_axis(log_scores, expert_ids, axis=1)
        scaled_to_1 = self.top_k > 1 if self.norm_topk_prob is None else self.norm_topk_prob
        gates = jax.nn.softmax(log_gates) if scaled_to_1 else jnp.exp(log_gates)
        return expert_ids, gates * self.routed_scaling_factor, jax.nn.softmax(log_scores)

    def _pick(self, logits: jax.Array, log_scores: jax.Array, bias: jax.Array | None) -> jax.Array:
        # Logits have the order of their scores, of which many may be 0 or 1 in float32.
        choice = logits if bias is None else jnp.exp(log_scores) + bias[None, :]
        if self.topk_group < self.n_group:
            choice = jnp.where(self._in_groups(choice, biased=bias is not None), choice, -jnp.inf)
        return lax.top_k(choice, self.top_k)[1]

    def _in_groups(self, choice: jax.Array, *, biased: bool) -> jax.Array:
        """Whether each expert [tokens, num_experts] is of the token's best groups.

        A group counts as much as its best expert with a softmax (DeepSeek-V2), as its two best with a sigmoid (V3).
        """
        tokens, num_experts = choice.shape
        by_group = choice.reshape(tokens, self.n_group, num_experts // self.n_group)
        best = lax.top_k(by_group, min(1 if self.scores == "softmax" else 2, by_group.shape[2]))[0]
        if biased or best.shape[2] == 1:
            of_group = jnp.sum(best, axis=2)
        else:  # the logit of the mean of both scores, which in float32 may be 0 or 1
            sums = (jnp.logaddexp(*jnp.moveaxis(jax.nn.log_sigmoid(logits), 2, 0)) for logits in (best, -best))
            of_group = jnp.subtract(*sums)
        groups = lax.top_k(of_group, self.topk_group)[1]
        chosen = jnp.any(groups[:, :, None] == jnp.arange(self.n_group, dtype=jnp.int32)[None, None, :], axis=1)
        return jnp.repeat(chosen, num_experts // self.n_group, axis=1)


def logits(tokens: jax.Array, weights: jax.Array, *, reverse_only: bool = True) -> jax.Array:
    """Tokens [tokens, d_model] times weights [d_model, num_experts] of the router, in float32.

    Of bfloat16 tokens as products of bfloat16, a fraction of the time on GPUs and TPUs: weights are sums of three such
    numbers, to their last bit, and the products of two such numbers are float32 numbers. So nothing is lost. They are
    differentiated in reverse mode, unless that is not enough (`reverse_only`).
    """
    weights = weights.astype(jnp.float32)
    if tokens.dtype == jnp.bfloat16 and reverse_only:
        axes = _ffi.varying(tokens, weights)
        return _of_bfloat16(_ffi.vary(tokens, axes), _ffi.vary(weights, axes))

    @jax.checkpoint  # else the tokens would be kept in float32
    def of_float32(tokens: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.dot(tokens.astype(jnp.float32), weights, precision=lax.Precision.HIGHEST)

    return of_float32(tokens, weights)


@jax.custom_vjp
def _of_bfloat16(tokens: jax.Array, weights: jax.Array) -> jax.Array:
    return _product(tokens, weights, (1, 0))


def _of_bfloat16_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens, weights = residuals
    # The products of the leading parts are as exact as bfloat16 needs, which the result is of.
    (g, more_g, _), (w, more_w, _) = _parts(gradient), _parts(weights)
    left, right = jnp.concatenate([g, g, more_g], axis=1), jnp.concatenate([w, more_w, w], axis=1)
    of_tokens = _dot(left, right, (1, 1)).astype(tokens.dtype)
    return of_tokens, _product(tokens, gradient, (0, 0))


_of_bfloat16.defvjp(lambda tokens, weights: (_of_bfloat16(tokens, weights), (tokens, weights)), _of_bfloat16_backward)


def _product(exact: jax.Array, other: jax.Array, contracting: tuple[int, int]) -> jax.Array:
    """Of a bfloat16 matrix and a float32 one [a, b], over these dimensions: float32 [n, b]."""
    of_parts = _dot(exact, jnp.concatenate(_parts(other), axis=1), contracting)
    first, second, third = jnp.split(of_parts, 3, axis=1)
    return first + (second + third)


def _parts(array: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is the float32 one, but for what is below 2**-133."""
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(array, 8, 7)  # XLA may leave casts there and back out
        parts.append(part.astype(jnp.bfloat16))
        array = array - part
    return parts


def _dot(left: jax.Array, right: jax.Array, contracting: tuple[int, int]) -> jax.Array:
    dimensions = (((contracting[0],), (contracting[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
