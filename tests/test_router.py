"""The router against NumPy in float64: which experts, their gates and gradients, however small the scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lplb._router import Router, logits

TOKENS, EXPERTS = 40, 16
PLAIN = Router("softmax", 3, True, 1.0, 1, 1)


def log_scores(scores: str, logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    if scores == "sigmoid":
        return -np.logaddexp(0, -logits)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def reference(router: Router, logits: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Token by token, as DeepSeek's technical reports say it."""
    all_ids, all_gates = [], []
    for of_token in log_scores(router.scores, logits):
        choice = np.exp(of_token) + (0 if bias is None else bias)
        groups = choice.reshape(router.n_group, -1)
        best = np.sort(groups, axis=1)[:, -(2 if router.scores == "sigmoid" else 1) :].sum(axis=1)
        chosen = np.argsort(-best, kind="stable")[: router.topk_group]
        allowed = np.isin(np.arange(EXPERTS) // (EXPERTS // router.n_group), chosen)
        ids = np.argsort(np.where(allowed, -choice, np.inf), kind="stable")[: router.top_k]
        gates = np.exp(of_token[ids] - np.logaddexp.reduce(of_token[ids])) if router.norm_topk_prob else None
        all_ids.append(ids)
        all_gates.append(router.routed_scaling_factor * (np.exp(of_token[ids]) if gates is None else gates))
    return np.array(all_ids), np.array(all_gates)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_logits_and_their_gradients_lose_nothing_beyond_float32(rng, platform, dtype):
    """Whatever products they are made of. Errors are of float32 and its sums, of tokens' gradients of their dtype."""
    tokens = jnp.asarray(rng.normal(size=(TOKENS, 256)), dtype)
    weights = jnp.asarray(rng.lognormal(-4, 2, (256, EXPERTS)) * rng.choice([-1, 1], (256, EXPERTS)), jnp.float32)
    gradient = jnp.asarray(rng.lognormal(0, 1, (TOKENS, EXPERTS)), jnp.float32)
    with jax.default_matmul_precision("default"):
        pulled = jax.jit(lambda tokens, weights: jax.vjp(logits, tokens, weights)[1](gradient))
        result, (of_tokens, of_weights) = jax.jit(logits)(tokens, weights), pulled(tokens, weights)
    assert (result.dtype, of_tokens.dtype, of_weights.dtype) == (jnp.float32, dtype, jnp.float32)
    left, right, pull = (np.asarray(array, np.float64) for array in (tokens, weights, gradient))
    for actual, (a, b) in ((result, (left, right)), (of_weights, (left.T, pull))):
        assert np.all(np.abs(np.asarray(actual, np.float64) - a @ b) <= 2.0**-20 * (np.abs(a) @ np.abs(b)))
    error = np.abs(np.asarray(of_tokens, np.float64) - pull @ right.T)
    room = np.abs(pull @ right.T) * float(jnp.finfo(dtype).eps) + 2.0**-15 * (np.abs(pull) @ np.abs(right.T))
    assert np.all(error <= room)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "router",
    [
        PLAIN,
        Router("sigmoid", 3, True, 2.5, 1, 1),
        Router("softmax", 4, False, 16.0, 8, 3),  # as DeepSeek-V2
        Router("sigmoid", 4, True, 2.5, 8, 4),  # as DeepSeek-V3
        Router("sigmoid", 1, False, 1.0, 1, 1),
        Router("softmax", 2, True, 1.0, 16, 2),  # groups of one expert
    ],
)
def test_equals_the_published_rules(rng, router, with_bias):
    logits = rng.normal(0, 2, (TOKENS, EXPERTS)).astype(np.float32)
    bias = rng.normal(0, 0.3, EXPERTS).astype(np.float32) if with_bias else None
    ids, gates, probability = jax.jit(router.__call__)(logits, bias)
    expected_ids, expected_gates = reference(router, logits, bias)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(gates, expected_gates, rtol=1e-5)
    scores = np.exp(log_scores(router.scores, logits))
    np.testing.assert_allclose(probability, scores / scores.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_finite_for_every_finite_logit(rng, scores, with_bias, norm_topk_prob):
    """And right, where all scores underflow: gates are ratios of them, and their gradients those of a softmax."""
    router = Router(scores, 3, norm_topk_prob, 1.0, 1, 1)
    # Three experts that are always picked, in the first token for their bias alone.
    bias = jnp.zeros(EXPERTS).at[jnp.array([0, 2, 4])].set(10) if with_bias else None
    weight = jnp.asarray(rng.normal(size=3), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(logits):
        _, gates, probability = router(logits, bias)
        return jnp.sum(gates * weight[None, :]) + jnp.sum(probability[:, 0])

    @jax.jit
    def routed(logits):
        return router(logits, bias)

    for middle in (0.0, -50.0, -100.0, -3e4, -3e38, 100.0, 3e38):
        logits = (middle + rng.normal(size=(TOKENS, EXPERTS))).astype(np.float32)
        logits[0, ::2] = -middle  # of both kinds in one token
        value, grads = loss(logits)
        assert np.isfinite(value)
        assert np.isfinite(grads).all()
        ids, gates, _ = map(np.asarray, routed(logits))
        of_ids = np.take_along_axis(log_scores(scores, logits), ids, axis=1)
        if norm_topk_prob:
            of_ids -= of_ids.max(axis=1, keepdims=True)
            of_ids -= np.logaddexp.reduce(of_ids, axis=1, keepdims=True)
        tiny = np.finfo(np.float32).tiny
        np.testing.assert_allclose(gates, np.exp(of_ids), rtol=1e-4, atol=tiny)
        if not with_bias:  # the best of them, though their scores may all be 0
            best = -np.sort(-logits, axis=1)[:, :3]
            np.testing.assert_array_equal(np.take_along_axis(logits, ids, axis=1), best)


@pytest.mark.parametrize("middle", [0.0, -50.0, -110.0, -3e4, 20.0, 100.0])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_best_groups_where_scores_underflow_or_saturate(scores, middle):
    """The group of the highest logits, though all scores are 0 or 1 in float32."""
    logits = np.full((1, EXPERTS), middle, np.float32)
    logits[0, 12:] += np.array([0.5, 1.0, 2.0, 4.0], np.float32)
    logits[0, 3] += 3  # alone in its group: less than two that are high
    ids, _, _ = Router(scores, 2, True, 1.0, 4, 1)(jnp.asarray(logits), None)
    np.testing.assert_array_equal(ids, [[15, 14]])


def test_groups_of_a_softmax_go_by_their_best():
    logits = np.full((1, EXPERTS), -300, np.float32)
    logits[0, [0, 13, 14]] = 0, -200, -150  # all scores but the first are 0
    ids, _, _ = Router("softmax", 2, True, 1.0, 4, 2)(jnp.asarray(logits), None)
    np.testing.assert_array_equal(ids, [[0, 14]])


def test_no_number_stays_in_its_token(rng):
    logits = rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    clean = PLAIN(logits, None)
    logits[3, 5], logits[7, 0] = np.nan, np.inf
    others = ~np.isin(np.arange(TOKENS), [3, 7])
    ids, gates, _ = PLAIN(logits, None)
    np.testing.assert_array_equal(ids[others], clean[0][others])
    np.testing.assert_array_equal(gates[others], clean[1][others])
    assert np.all((ids >= 0) & (ids < EXPERTS))


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_single_expert_a_token_learns(rng, scores):
    """Its gate is its score; scaled to 1 it would have no gradient."""
    logits = rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    grads = [
        jax.grad(lambda logits, norm=norm: jnp.sum(Router(scores, 1, norm, 1.0, 1, 1)(logits, None)[1]))(logits)
        for norm in (False, True)
    ]
    score = np.exp(log_scores(scores, logits).max(axis=1))
    np.testing.assert_allclose(np.max(grads[0], axis=1), score * (1 - score), rtol=1e-4)
    assert not np.any(grads[1])
