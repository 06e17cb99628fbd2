"""A decoder-only transformer whose MLPs are `jax_lplb.flax.MoE`, its layers stacked."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_lplb as lplb
from config import VOCABULARY, Config
from jax_lplb.flax import Metrics, MoE


def look_up(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a small table, as a product: its gradient is added up in float32, by a matrix multiplication.

    That of an indexed look-up adds up in `dtype`, one token after the other of the many that are the same byte.
    """
    return jax.nn.one_hot(tokens, len(table), dtype=dtype) @ table.astype(dtype)


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary positions (RoPE) for [batch, tokens, heads, width], in float32."""
    half = x.shape[-1] // 2
    position, wave = jnp.arange(x.shape[1], dtype=jnp.float32), jnp.arange(half, dtype=jnp.float32)
    angle = position[:, None] * base ** -(wave / half)[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        """Makes the parameters."""
        model, compute = config.model, config.compute
        linear = partial(nnx.Linear, use_bias=False, dtype=jnp.dtype(compute.dtype), rngs=rngs)
        self.heads = model.heads
        self.qkv = linear(model.d_model, 3 * model.d_model)
        self.out = linear(model.d_model, model.d_model)
        # cuDNN's takes half-precision only, and these widths of a head.
        width = model.d_model // model.heads
        cudnn = jax.default_backend() == "gpu" and compute.dtype == "bfloat16" and width % 8 == 0 and width <= 128
        self.implementation = compute.attention or ("cudnn" if cudnn else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, tokens, d_model] to the same."""
        q, k, v = jnp.split(self.qkv(x).reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2)
        mixed: Any = jax.nn.dot_product_attention(
            rotate(q), rotate(k), v, is_causal=True, implementation=self.implementation
        )
        return self.out(mixed.reshape(x.shape))


def even_choices(tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Of each `experts` tokens each has `top_k` different experts, at random, and each expert `top_k` of the tokens.

    bool [tokens, experts], the same for every call.
    """
    rng = np.random.default_rng(0)
    blocks = -(-tokens // experts)
    order, shifts = (rng.permuted(np.tile(np.arange(experts), (blocks, 1)), axis=1) for _ in range(2))
    places = (np.arange(experts)[None, :, None] + shifts[:, None, :top_k]) % experts
    ids = np.take_along_axis(order[:, None, :], places, axis=2).reshape(-1, top_k)[:tokens]
    chosen = np.zeros((tokens, experts), bool)
    np.put_along_axis(chosen, ids, True, axis=1)
    return chosen


class EvenRouter(NamedTuple):
    """A layer's router (`MoE.route`) that chooses each expert equally often, on every rank, by a constant table.

    Attributes:
      router: the layer's own, which still picks and weighs experts, of those of the table. It takes as long.
      top_k: experts of each token.
    """

    router: Any
    top_k: int

    def __call__(self, logits: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As the layer's own, but for the bias, which could say otherwise."""
        tokens, experts = logits.shape
        return self.router(jnp.where(even_choices(tokens, experts, self.top_k), logits, -1e9), None)


@nnx.remat
def _recomputed(norm: nnx.RMSNorm, x: jax.Array) -> jax.Array:
    """A norm, which the backward pass computes again: it would keep several copies of the stream, in float32."""
    return norm(x)


class Block(nnx.Module):
    """Attention, then experts, each after an RMSNorm and added to the stream."""

    def __init__(self, config: Config, placement: lplb.Placement, mesh: jax.sharding.Mesh, *, rngs: nnx.Rngs) -> None:
        """Makes the parameters; the placement is that of one layer."""
        model, compute = config.model, config.compute
        assert compute.buffer_factor is not None, "config.settle decides it"
        norm = partial(nnx.RMSNorm, model.d_model, dtype=jnp.dtype(compute.dtype), rngs=rngs)
        self.attention_norm, self.moe_norm = norm(), norm()
        self.attention = Attention(config, rngs=rngs)
        self.moe = MoE(
            model.d_model,
            model.experts,
            model.d_expert,
            model.top_k,
            placement=placement,
            mesh=mesh,
            axis_name="expert",
            token_axes=mesh.axis_names,
            router_bias=model.router_bias,
            dispatch=compute.dispatch,
            transport="peer" if compute.dispatch == "peer" else None,
            buffer_factor=compute.buffer_factor,
            dtype=jnp.dtype(compute.dtype),
            rngs=rngs,
        )
        if model.route == "even":
            even: Any = EvenRouter(self.moe.route, model.top_k)
            self.moe.route = even

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Metrics]:
        """[batch, tokens, d_model] to the same, and the layer's metrics."""
        # Before the attention, so that copies travel while it is computed; those of a batch are not chosen yet.
        slots = self.moe.prepare() if self.moe.placement.get_value().planning is None else None
        x = x + self.attention(_recomputed(self.attention_norm, x))
        mixed, metrics = self.moe(_recomputed(self.moe_norm, x), slots)
        return x + mixed, metrics


class Transformer(nnx.Module):
    """Bytes to the logits of the next ones."""

    def __init__(self, config: Config, placement: lplb.Placement, mesh: jax.sharding.Mesh, *, rngs: nnx.Rngs) -> None:
        """Makes the parameters, those of blocks with a leading layer axis; every layer starts with `placement`."""
        model, dtype = config.model, jnp.dtype(config.compute.dtype)

        @nnx.split_rngs(splits=model.layers)
        @nnx.scan(in_axes=0, out_axes=0)  # one after the other: what drawing a layer takes, all would take at once
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, placement, mesh, rngs=rngs)

        self.remat, self.batch = config.compute.remat, jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        self.dtype, self.embed = dtype, nnx.Embed(VOCABULARY, model.d_model, rngs=rngs)
        self.blocks = blocks(rngs)
        self.norm = nnx.RMSNorm(model.d_model, dtype=dtype, rngs=rngs)
        small = nnx.initializers.normal(0.02)  # the first loss is that of a guess among all bytes
        self.head = nnx.Linear(model.d_model, VOCABULARY, use_bias=False, kernel_init=small, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, Metrics]:
        """int32 [batch, tokens] to float32 [batch, tokens, VOCABULARY] and metrics with a leading layer axis."""
        x = jax.lax.with_sharding_constraint(look_up(self.embed.embedding[...], tokens, self.dtype), self.batch)

        # One block is compiled, however many there are.
        def run(block: Block, x: jax.Array) -> tuple[jax.Array, Metrics]:
            return block(x)

        body = nnx.remat(run) if self.remat else run
        x, metrics = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))(self.blocks, x)
        return self.head(self.norm(x)).astype(jnp.float32), metrics
