"""A Mixture-of-Experts layer for Flax NNX: expert parallel, balanced by `jax_lplb.balance`."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jax_lplb import _ffi
from jax_lplb._balance import balance
from jax_lplb._expert_parallel import Bring, Dispatch, as_they_are, expert_parallel
from jax_lplb._grouped_matmul import GroupedMatmul, has_tokamax
from jax_lplb._placement import Placement
from jax_lplb._status import Status
from jax_lplb._swiglu import swiglu
from jax_lplb._weights import from_logical, receive, replicate, send_early, send_late

_log = logging.getLogger(__name__)


class Metrics(NamedTuple):
    """What a layer's step was like; the same on all ranks.

    Attributes:
      home: float32 [], imbalance (largest / mean rank load) with all tokens at home.
      optimum: float32 [], a certified lower bound on the imbalance that the copies allow.
      balanced: float32 [], imbalance as it was.
      moved: float32 [], share of the tokens' choices that went to copies.
      gap: float32 [], certified relative gap of the split to the optimum, of the worst group.
      status: int32 [], the largest `jax_lplb.Status` of the groups.
      rounds: int32 [], rounds through the dispatch's buffers; 1 unless they were too small.
      load: int32 [num_experts], tokens of each logical expert.
      aux_loss: float32 [], num_experts * sum over experts of the share of choices times the mean router probability:
        the classic balancing loss, 1 where all is even. Differentiable; adding it to the loss is the caller's choice.
    """

    home: jax.Array
    optimum: jax.Array
    balanced: jax.Array
    moved: jax.Array
    gap: jax.Array
    status: jax.Array
    rounds: jax.Array
    load: jax.Array
    aux_loss: jax.Array


class RouterBias(nnx.Variable):
    """What `MoE.update_bias` changes: added to the scores when experts are picked, and to nothing else."""


class PlacementState(nnx.Variable):
    """A layer's placement; replace its value by one of equal shapes without recompiling."""


class MoE(nnx.Module):
    """Router, balance, dispatch, SwiGLU experts, combine.

    Each token's results are those of its top-k experts, whatever copy computes them: balancing changes where, not what.
    Parameters are float32: `router` [d_model, num_experts], `w_in` [num_experts, d_model, 2 * d_expert] (gate and up)
    and `w_out` [num_experts, d_expert, d_model], the latter two in the order of `placement.home_order`, each expert
    once, their first axis sharded over the expert axis. The router is computed in float32, experts in `dtype`.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        d_expert: int,
        top_k: int,
        *,
        placement: Placement,
        mesh: jax.sharding.Mesh,
        axis_name: str | tuple[str, ...],
        token_axes: tuple[str, ...] | None = None,
        router: Literal["softmax", "sigmoid"] = "softmax",
        router_bias: bool = False,
        dispatch: Dispatch = "all_to_all",
        buffer_factor: float = 1.25,
        grouped_matmul: GroupedMatmul | None = None,
        balance_options: Mapping[str, Any] | None = None,
        dtype: Any = jnp.bfloat16,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the parameters.

        Args:
          d_model: width of tokens.
          num_experts: logical experts.
          d_expert: hidden width of an expert.
          top_k: experts of each token.
          placement: slots of the experts, over the ranks of `axis_name`. One without copies: no balancing.
          mesh: the mesh.
          axis_name: its axis, or axes, of the experts.
          token_axes: its axes that shard the first axis of the layer's input, those of `axis_name` among them; by
            default just those. On a data x expert mesh: both.
          router: scores are the softmax of the logits, or their sigmoid; a token's gates are the scores of its experts,
            scaled to sum 1.
          router_bias: balancing without a loss (DeepSeek-V3): a bias, changed by `update_bias`, added to the scores
            when experts are picked.
          dispatch: "all_to_all" or "ring" (all_gather and psum_scatter).
          buffer_factor: size of the dispatch's buffers over what they would hold if all ranks sent and received the
            same. Where a batch needs more, it takes several rounds; no token is dropped.
          grouped_matmul: "tokamax" (https://github.com/openxla/tokamax), "ragged_dot" (jax.lax), or None: the former
            on NVIDIA GPUs, where it is installed. Or a function that is called as `jax.lax.ragged_dot_general`, with
            four arguments, for three products: rows by the weights of their groups, by those transposed, and sums of
            outer products. It is not differentiated, and what it returns beyond the groups' rows is not looked at.
          balance_options: further arguments of `jax_lplb.balance`, such as solver, tol, sync.
          dtype: in which experts compute.
          param_dtype: of the parameters.
          rngs: randomness for the parameters, `rngs.params()`.

        Raises:
          ValueError: sizes do not fit together, or a choice is unknown.
        """
        if placement.num_experts != num_experts:
            raise ValueError(f"placement is one of {placement.num_experts} experts, but num_experts = {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be from 1 to num_experts = {num_experts}, got {top_k}")
        _check_choice("router", router, ("softmax", "sigmoid"))
        _check_choice("dispatch", dispatch, ("all_to_all", "ring"))
        if not callable(grouped_matmul):
            _check_choice("grouped_matmul", grouped_matmul, (None, "tokamax", "ragged_dot"))
        if not buffer_factor > 0:
            raise ValueError(f"buffer_factor must be positive, got {buffer_factor}")
        if grouped_matmul == "tokamax" and not has_tokamax():
            raise ValueError(
                "grouped_matmul = 'tokamax' needs tokamax: pip install 'jax_lplb[moe]' (Python 3.12 or newer)"
            )
        expert_axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        token_axes = expert_axes if token_axes is None else tuple(token_axes)
        if not set(expert_axes) <= set(token_axes) <= set(mesh.axis_names):
            raise ValueError(
                f"token_axes must hold the axes of axis_name = {axis_name!r} and be axes of the mesh "
                f"{mesh.axis_names}, got {token_axes}"
            )
        self.top_k, self.scores, self.dtype = top_k, router, dtype
        self.mesh, self.axis_name, self.token_axes = mesh, axis_name, token_axes
        self.other_axes = tuple(axis for axis in token_axes if axis not in expert_axes)
        self.slot_axes = (*self.other_axes, *expert_axes)
        self.dispatch, self.buffer_factor, self.grouped_matmul = dispatch, buffer_factor, grouped_matmul
        self.balance_options = tuple(sorted((balance_options or {}).items()))  # hashable, as static attributes must be
        self.placement = PlacementState(placement)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)

        def experts(*shape: int) -> jax.Array:
            # Drawn in logical order: an expert starts out the same in every placement.
            drawn = from_logical(init(rngs.params(), (num_experts, *shape), param_dtype), placement)
            return jax.device_put(drawn, jax.NamedSharding(mesh, jax.P(axis_name)))

        scale = nnx.initializers.lecun_normal()
        everywhere = jax.NamedSharding(mesh, jax.P())
        self.router = nnx.Param(jax.device_put(scale(rngs.params(), (d_model, num_experts), param_dtype), everywhere))
        self.w_in = nnx.Param(experts(d_model, 2 * d_expert))
        self.w_out = nnx.Param(experts(d_expert, d_model))
        self.bias = RouterBias(jax.device_put(jnp.zeros(num_experts, jnp.float32), everywhere)) if router_bias else None
        _log.info("MoE: dispatch %s, grouped matmul %s", dispatch, grouped_matmul or "by platform")

    def prepare(self) -> dict[str, jax.Array]:
        """The weights of all slots in `dtype`, copies included, for several calls: `layer(x, slots)`.

        For micro-batches between two updates of the parameters: copies then travel once. Differentiable. Each device
        has its slots; the first axis of the arrays counts those of all, [devices * slots_per_rank, ...].
        """
        run = jax.shard_map(
            lambda home, placement: replicate(self._varying(home), placement, self.axis_name, self.dtype),
            mesh=self.mesh,
            in_specs=(jax.P(self.axis_name), jax.P()),
            out_specs=jax.P(self.slot_axes),
            axis_names=set(self.token_axes),
        )
        return run(self._home_weights(), self.placement.get_value())

    def __call__(self, x: jax.Array, slots: dict[str, jax.Array] | None = None) -> tuple[jax.Array, Metrics]:
        """Runs the layer.

        Args:
          x: [tokens, ..., d_model], its first axis sharded over `token_axes`.
          slots: what `prepare` returned; by default copies travel within the call.

        Returns:
          The result, of the shape and dtype of `x`, and `Metrics`.
        """
        if x.size == 0:  # for GPUs, jax 0.11.2 crashes as it compiles a shard_map over empty arrays
            return x, self._metrics_of_nothing()
        if slots is None:
            weights, axes = self._home_weights(), self.axis_name
        else:
            weights, axes = slots, self.slot_axes
        run = jax.shard_map(
            partial(self._on_rank, slots is not None),
            mesh=self.mesh,
            in_specs=(jax.P(self.token_axes), jax.P(axes), jax.P(), jax.P(), jax.P()),
            out_specs=(jax.P(self.token_axes), jax.P()),
            axis_names=set(self.token_axes),
        )
        bias = None if self.bias is None else self.bias[...]
        return run(x, weights, self.router[...], bias, self.placement.get_value())

    def update_bias(self, load: jax.Array, rate: float = 1e-3) -> None:
        """Moves the bias of each expert by `rate`, up where it had fewer tokens than the mean, down where more.

        `load` is [num_experts], or [layers, num_experts] for layers that `nnx.scan` or `nnx.vmap` stacked.
        """
        if self.bias is None:
            raise ValueError("update_bias needs a layer made with router_bias=True")
        load = load.astype(jnp.float32)
        self.bias[...] = self.bias[...] + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)

    def _home_weights(self) -> dict[str, jax.Array]:
        return {"w_in": self.w_in[...], "w_out": self.w_out[...]}

    def _varying(self, weights: Any) -> Any:
        """Over the other axes too, so that gradients are added up over those in the parameters' dtype."""
        return jax.tree.map(lambda leaf: _ffi.vary(leaf, frozenset(self.other_axes)), weights)

    def _on_rank(
        self,
        prepared: bool,
        x: jax.Array,
        weights: dict[str, jax.Array],
        router: jax.Array,
        bias: jax.Array | None,
        placement: Placement,
    ) -> tuple[jax.Array, Metrics]:
        weights = self._varying(weights)
        tokens = x.reshape(-1, x.shape[-1])
        logits = jnp.dot(tokens.astype(jnp.float32), router.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        scores = jax.nn.softmax(logits) if self.scores == "softmax" else jax.nn.sigmoid(logits)
        _, expert_ids = lax.top_k(lax.stop_gradient(scores if bias is None else scores + bias[None, :]), self.top_k)
        gates = jnp.take_along_axis(scores, expert_ids, axis=1)
        gates = gates / jnp.sum(gates, axis=1, keepdims=True)

        out = balance(expert_ids, placement, axis_name=self.axis_name, **dict(self.balance_options))
        metrics = self._metrics(out, expert_ids, scores, placement)

        early = partial(send_early, placement=placement, axis_name=self.axis_name, dtype=self.dtype)
        bring = as_they_are if prepared else Bring(early, send_late, receive)

        def after_metrics(weights: Any, value: Any) -> tuple[Any, Any]:
            # Their means, of which XLA makes one collective, come before what is sent: not last, and exposed.
            return bring.send_early(weights, lax.optimization_barrier((value, metrics.moved))[0])

        result, rounds = expert_parallel(
            tokens.astype(self.dtype),
            out.physical_ids,
            gates,
            weights,
            bring._replace(send_early=after_metrics),
            partial(swiglu, implementation=self.grouped_matmul),
            placement,
            axis_name=self.axis_name,
            dispatch=self.dispatch,
            buffer_factor=self.buffer_factor,
            dtype=x.dtype,
        )
        return result.reshape(x.shape), metrics._replace(rounds=rounds)

    def _metrics_of_nothing(self) -> Metrics:
        load = jnp.zeros(self.router.shape[1], jnp.int32)
        kinds = {"status": jnp.int32(Status.SKIPPED), "rounds": jnp.int32(1), "load": load}
        return Metrics(**{name: kinds.get(name, jnp.float32(0)) for name in Metrics._fields})

    def _metrics(self, out: Any, expert_ids: jax.Array, scores: jax.Array, placement: Placement) -> Metrics:
        """Over all ranks, and the worst or the mean over other token axes; `rounds` is left to the caller."""
        others = self.other_axes
        ranks, groups = placement.num_ranks, placement.num_groups
        home_slot = jnp.asarray(placement.log2phy)[:, 0]
        load = out.load.astype(jnp.float32)
        mean = jnp.maximum(jnp.sum(load) / ranks, 1e-9)
        at_home = jnp.zeros_like(load, shape=(ranks,)).at[home_slot // placement.slots_per_rank].add(load)
        by_group = out.rank_load.reshape(groups, -1).max(axis=1).astype(jnp.float32)
        moved = jnp.mean(out.physical_ids != home_slot[expert_ids], dtype=jnp.float32)
        chosen = load / jnp.maximum(jnp.sum(load), 1)
        probability = lax.pmean(jnp.mean(scores / jnp.sum(scores, axis=1, keepdims=True), axis=0), self.token_axes)
        total = out.load
        if others:
            chosen, total = lax.pmean(chosen, others), lax.psum(total, others)

        def worst(value: jax.Array) -> jax.Array:
            return lax.pmax(value, others) if others else value

        return Metrics(
            home=worst(jnp.max(at_home) / mean),
            optimum=worst(jnp.max(by_group * (1 - out.gap)) / mean),
            balanced=worst(jnp.max(by_group) / mean),
            moved=lax.pmean(moved, self.token_axes),
            gap=worst(jnp.max(out.gap)),
            status=worst(jnp.max(out.status)),
            rounds=jnp.int32(1),
            load=total,
            aux_loss=len(chosen) * jnp.sum(lax.stop_gradient(chosen) * probability),
        )


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
