"""A Mixture-of-Experts layer for Flax NNX: expert parallel, balanced by `jax_lplb.balance`."""

import inspect
import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jax_lplb import _ffi, _speed
from jax_lplb._balance import Balanced, balance, check_balance_options
from jax_lplb._checks import check_choice, check_count, check_positive
from jax_lplb._expert_parallel import Home, expert_parallel
from jax_lplb._grouped_matmul import GroupedMatmul, has_tokamax
from jax_lplb._mesh import shard, spec_of, with_auto_axes
from jax_lplb._permute_experts import from_logical
from jax_lplb._placement import Placement
from jax_lplb._plan import to_rows
from jax_lplb._replicate import TRANSPORTS, Transport, replicate, with_room
from jax_lplb._reverse_only import reverse_only
from jax_lplb._router import Router, logits
from jax_lplb._rows import has_padding, rows_of_experts
from jax_lplb._status import Status
from jax_lplb._swiglu import dense_swiglu, swiglu

Dispatch = Literal["peer", "all_to_all", "ring", "dense"]
__all__ = ["Metrics", "MoE", "PlacementState", "RouterBias"]

_log = logging.getLogger(__name__)


def __dir__() -> list[str]:
    return __all__


class Metrics(NamedTuple):
    """What a layer's step was like; the same on all ranks.

    Imbalances are the largest rank load over the mean, 1 where there is no load; on a mesh with other token axes those
    of the worst row. With `rank_speed` loads are taken over speeds of mean 1, those of ranks of speed 0 as nothing.

    Attributes:
      contiguous: float32 [], imbalance without any placement: experts in logical order, as many on each rank, or one
        fewer on some where ranks do not divide them.
      home: float32 [], imbalance without copies: each expert where its weights are, `placement.home_rank`.
      optimum: float32 [], a certified lower bound on the imbalance that the copies allow.
      balanced: float32 [], imbalance as it was.
      moved: float32 [], share of the tokens' choices that did not go to their expert's first slot.
      gap: float32 [], certified relative gap of the split to the optimum, of the worst group.
      status: int32 [], the largest `jax_lplb.Status` of the groups.
      rounds: int32 [], rounds through the dispatch's buffers; 1 unless they were too small.
      load: int32 [num_experts], tokens of each logical expert.
      aux_loss: float32 [], num_experts * sum over experts of the share of choices times the mean router probability:
        the classic balancing loss, 1 where all is even. Differentiable; adding it to the loss is the caller's choice.
    """

    contiguous: jax.Array
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
    """A layer's placement; replace its value by one of equal shapes without recompiling.

    Its arrays are copies: layers with equal placements share none, and so may all be donated to one function.
    """

    def __init__(self, value: Any, **metadata: Any) -> None:
        """Copies the placement."""
        super().__init__(_copied(value), **metadata)

    def set_value(self, value: Any, **options: Any) -> None:
        """Copies the placement."""
        super().set_value(_copied(value), **options)


class MoE(nnx.Module):
    """Router, balance, dispatch, SwiGLU experts, combine.

    Each token's results are those of its top-k experts, whatever copy computes them: balancing changes where, not what.
    Parameters are float32: `router` [d_model, num_experts], `w_in` [num_experts, d_model, 2 * d_expert] (gate and up)
    and `w_out` [num_experts, d_expert, d_model], the latter two in the order of `placement.home_order`, each expert
    once, their first axis sharded over the expert axis. Where ranks do not divide the experts, that axis has rows of
    padding besides, as `home_order` says: zeros, which are not used and have no gradients. Shared experts are one wide
    expert that all tokens go to, on every device: `shared_in` [d_model, 2 * n_shared_experts * d_expert] and
    `shared_out`. The router is computed in float32, experts in `dtype`.

    Stacks of layers, made by `nnx.vmap` or `nnx.scan`, have these axes behind the layers'.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        d_expert: int,
        top_k: int,
        *,
        mesh: jax.sharding.Mesh,
        axis_name: str | tuple[str, ...],
        redundants_per_rank: int | None = None,
        placement: Placement | None = None,
        token_axes: tuple[str, ...] | None = None,
        router: Literal["softmax", "sigmoid"] = "softmax",
        norm_topk_prob: bool | None = None,
        routed_scaling_factor: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        router_bias: bool = False,
        n_shared_experts: int = 0,
        dispatch: Dispatch | None = None,
        buffer_factor: float = 1.25,
        transport: Transport = None,
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
          mesh: the mesh. Its axes may be Auto or Explicit ones.
          axis_name: its axis, or axes, of the experts.
          redundants_per_rank: slots of each rank for copies, which each call chooses for its own tokens
            (`Placement.per_batch`). 0: no copies, and so no balancing. By default 2, or as many as there are experts of
            other ranks to copy: none on a single rank. On 8 to 64 ranks two slots bring the busiest rank within about
            1 % of the mean, where with one it may be 4 % above it; a slot takes the memory of an expert's weights.
          placement: slots of the experts, over the ranks of `axis_name`, where copies are to be chosen otherwise; in
            place of `redundants_per_rank`.
          token_axes: its axes that shard the first axis of the layer's input, those of `axis_name` among them; by
            default just those. On a data x expert mesh: both.
          router: scores are the softmax of the logits, or their sigmoid; a token's gates are the scores of its experts.
          norm_topk_prob: whether a token's gates are scaled to sum 1. None: unless `top_k` is 1, where the one gate
            would be 1 whatever the router says, and the router would learn nothing.
          routed_scaling_factor: what gates are multiplied by.
          n_group: groups of neighbouring experts, of equal size, for routing limited to groups (DeepSeek-V2 and V3).
          topk_group: how many groups a token's experts may be in: those whose best expert scores highest, or with a
            sigmoid the sum of the two best.
          router_bias: balancing without a loss (DeepSeek-V3): a bias, changed by `update_bias`, added to the scores
            when experts are picked.
          n_shared_experts: experts that all tokens go to beside their routed ones, as one of that many times the width.
          dispatch: how tokens get to their experts and back. "peer": through the ranks' memory, as `jax_lplb.dispatch`
            has it. "all_to_all": each rank sends every other a buffer of equal size.
            "ring": all ranks get all tokens (all_gather and psum_scatter). None: "peer" where that can be, else
            "all_to_all". Or "dense": all ranks gather the weights, and compute every expert on each of their tokens;
            slow, and the only one with forward-mode derivatives and derivatives of derivatives.
          buffer_factor: size of the dispatch's buffers over what they would hold if all ranks received the same, and
            with "all_to_all" each the same from each; with "peer" and copies chosen for each batch 1.03 is enough.
            Where a batch needs more, it takes several rounds; no token is dropped.
          transport: how weights of copies travel: "peer", "collective" or None, as `jax_lplb.replicate` has it. "peer"
            cannot be on a mesh with axes beyond `token_axes`: those are left to XLA.
          grouped_matmul: None: on Hopper GPUs by kernels of this package, for bfloat16 and float16 and widths that are
            multiples of 128; for other widths and dtypes, and on other NVIDIA GPUs, by "tokamax"
            (https://github.com/openxla/tokamax) where it is installed; else by "ragged_dot" (jax.lax). "tokamax" leaves
            the choice of kernels and tiles to it, but for the gradients of weights on Hopper, which are wrong there
            (tokamax 0.0.17): these are then "ragged_dot", which is slow. Or a function that is called as
            `jax.lax.ragged_dot_general`, with four arguments, for three products: rows by the weights of their groups,
            by those transposed, and sums of outer products. It is not differentiated, and what it returns beyond the
            groups' rows is not looked at.
          balance_options: further arguments of `jax_lplb.balance`: sync, locality, ranks_per_node, solver, tol,
            threshold, num_sms, implementation.
          dtype: in which experts compute.
          param_dtype: of the parameters.
          rngs: randomness for the parameters, `rngs.params()`.

        Raises:
          TypeError, ValueError: an argument has the wrong type, sizes do not fit together, or a choice is unknown;
            named in the message.
        """
        for name, count in (("d_model", d_model), ("num_experts", num_experts), ("d_expert", d_expert)):
            check_count(name, count)
        check_count("n_shared_experts", n_shared_experts, least=0)
        check_choice("dispatch", dispatch, (None, "peer", "all_to_all", "ring", "dense"))
        check_choice("transport", transport, TRANSPORTS)
        if not callable(grouped_matmul):
            check_choice("grouped_matmul", grouped_matmul, (None, "tokamax", "ragged_dot"))
        if grouped_matmul == "tokamax" and not has_tokamax():
            raise ValueError(
                "grouped_matmul = 'tokamax' needs tokamax: pip install 'jax_lplb[moe]' (Python 3.12 or newer)"
            )
        check_positive("buffer_factor", buffer_factor)
        expert_axes, token_axes = _check_axes(mesh, axis_name, token_axes)
        ranks = math.prod(mesh.shape[axis] for axis in expert_axes)
        if placement is None:
            if redundants_per_rank is None:
                redundants_per_rank = min(2, num_experts - math.ceil(num_experts / ranks))
            placement = Placement.per_batch(
                num_experts=num_experts, num_ranks=ranks, redundants_per_rank=redundants_per_rank
            )
        elif redundants_per_rank is not None:
            raise ValueError(
                f"redundants_per_rank = {redundants_per_rank!r} is for a layer without a placement, and the placement "
                "given has slots of its own: leave out one of the two"
            )
        options = _check_balance_options(balance_options, placement)
        _check_ranks(placement, num_experts, axis_name, ranks)
        for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
            if not jnp.issubdtype(value, jnp.floating):
                raise TypeError(f"{name} must be a floating-point dtype, got {value!r}")
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be flax.nnx.Rngs, such as nnx.Rngs(0), got {type(rngs).__name__}")
        self.dtype = dtype
        self.route = Router(router, top_k, norm_topk_prob, routed_scaling_factor, n_group, topk_group)
        self.route.check(num_experts)
        self.mesh, self.axis_name, self.token_axes = mesh, axis_name, token_axes
        self.other_axes = tuple(axis for axis in token_axes if axis not in expert_axes)
        self.slot_axes = (*self.other_axes, *expert_axes)
        self.dispatch, self.buffer_factor, self.grouped_matmul = dispatch, buffer_factor, grouped_matmul
        self.transport, self.balance_options = transport, options
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
        scale = nnx.initializers.lecun_normal()

        def experts(*shape: int) -> nnx.Param:
            # Drawn in logical order: an expert starts out the same in every placement. Where that is the order of the
            # rows, too, each device draws its own under jit: a permutation needs them all.
            drawn = from_logical(init(rngs.params(), (num_experts, *shape), param_dtype), placement)
            return nnx.Param(shard(drawn, mesh, jax.P(axis_name)))

        def everywhere(tree: Any) -> Any:
            return jax.device_put(tree, jax.NamedSharding(mesh, jax.P()))

        def dense(*shape: int) -> nnx.Param:
            return nnx.Param(everywhere(scale(rngs.params(), shape, param_dtype)))

        self.placement = PlacementState(everywhere(placement))
        self.router = dense(d_model, num_experts)
        self.w_in = experts(d_model, 2 * d_expert)
        self.w_out = experts(d_expert, d_model)
        width = n_shared_experts * d_expert
        self.shared_in = dense(d_model, 2 * width) if width else None
        self.shared_out = dense(width, d_model) if width else None
        self.bias = RouterBias(everywhere(jnp.zeros(num_experts, jnp.float32))) if router_bias else None
        _log.info("MoE: dispatch %s, grouped matmul %s", dispatch or "by reach", grouped_matmul or "by platform")

    def prepare(self) -> dict[str, jax.Array]:
        """The weights in `dtype` for several calls, such as of micro-batches between two updates: `layer(x, slots)`.

        Those of all slots, copies included, which then travel once; with a per-batch placement, whose copies no one
        knows before the batch, those that are at home, and room for copies, which each call brings for its own batch.
        Differentiable, once and in reverse mode. Each device has its own rows; the first axis of the arrays counts
        those of all, [devices * slots_per_rank, ...].
        """
        message = (
            "MoE.prepare can be differentiated once, in reverse mode (jax.grad, jax.vjp); for more make the layer with "
            "dispatch='dense', and call it without slots"
        )

        def on_rank(home: dict[str, jax.Array], placement: Placement) -> Any:
            home = self._varying(home)
            if placement.planning is not None:
                return with_room(home, placement, self.axis_name, self.dtype)
            return replicate(home, placement, self.axis_name, self.dtype, self.transport)

        run = self._on_each_device(on_rank, (jax.P(self.axis_name), jax.P()), jax.P(self.slot_axes))
        run = partial(with_auto_axes, run, jax.P(self.slot_axes))
        return run(reverse_only(self._home_weights(), message), self.placement.get_value())

    @overload
    def __call__(
        self,
        x: jax.Array,
        slots: dict[str, jax.Array] | None = None,
        *,
        mask: jax.Array | None = None,
        rank_speed: jax.Array | np.ndarray | None = None,
        return_slots: Literal[False] = False,
    ) -> tuple[jax.Array, Metrics]: ...

    @overload
    def __call__(
        self,
        x: jax.Array,
        slots: dict[str, jax.Array],
        *,
        mask: jax.Array | None = None,
        rank_speed: jax.Array | np.ndarray | None = None,
        return_slots: Literal[True],
    ) -> tuple[jax.Array, Metrics, dict[str, jax.Array]]: ...

    def __call__(
        self,
        x: jax.Array,
        slots: dict[str, jax.Array] | None = None,
        *,
        mask: jax.Array | None = None,
        rank_speed: jax.Array | np.ndarray | None = None,
        return_slots: bool = False,
    ) -> Any:
        """Runs the layer.

        Args:
          x: float [tokens, ..., d_model], its first axis sharded over `token_axes`. Where their devices do not divide
            it, they share out the tokens of all axes; what is then missing is padded within, and counts as no tokens.
          slots: what `prepare` returned; by default weights are cast, and copies travel, within the call.
          mask: bool [tokens, ...], the shape of `x` without its last axis: True for a token, False for padding. Padding
            goes to no expert and counts in no metric, whatever `x` holds there; its results and gradients are 0. By
            default all are tokens.
          rank_speed: float32 [num_ranks], how fast the ranks of `axis_name` are, constant or traced, as `balance` has
            it. A rank that is faster than the mean gets more rows by as much: where all are to fit in one round, so
            much larger a `buffer_factor` is needed. By default all are equally fast.
          return_slots: whether to return slots, too. With copies chosen for each batch, the call brings them in the
            place of those that it finds there. Where the next call takes the slots that this one returns, as the carry
            of a loop over micro-batches or donated, through peers' memory nothing but copies is moved; else, as under
            `jax.checkpoint`, XLA copies all of them first. A function that donates them should return them before
            gradients, whose shapes and dtypes are theirs: a donated array makes room for the first result like it.

        Returns:
          The result, of the shape and dtype of `x`, `Metrics`, and with `return_slots` the slots, which have no
          gradient.

        Raises:
          TypeError, ValueError: `x`, `slots`, `mask` or `rank_speed` has another dtype or shape, a speed is wrong, or
            there are no slots to return.
          NotImplementedError: it is differentiated in forward mode or twice, and dispatch is not "dense".
        """
        self._check_call(x, slots, mask, rank_speed, return_slots)
        if x.size == 0:  # for GPUs, jax 0.11.2 crashes as it compiles a shard_map over empty arrays
            return x, self._metrics_of_nothing(), *([lax.stop_gradient(slots)] if return_slots else [])
        is_prepared = slots is not None
        weights, axes = (slots, self.slot_axes) if is_prepared else (self._home_weights(), self.axis_name)
        dense = {"router": self.router[...]}
        if self.shared_in is not None and self.shared_out is not None:
            dense |= {"shared_in": self.shared_in[...], "shared_out": self.shared_out[...]}
        bias = None if self.bias is None else self.bias[...]
        shards = self._num_shards
        # Where the devices do not divide the first axis, they share out the tokens of all axes.
        row_axes = 1 if len(x) % shards else x.ndim - 1
        num_rows = math.prod(x.shape[: x.ndim - row_axes])
        run = self._on_each_device(
            partial(self._on_rank, is_prepared),
            (jax.P(self.token_axes), jax.P(self.token_axes), jax.P(axes), jax.P(), jax.P(), jax.P(), jax.P()),
            (jax.P(self.token_axes), jax.P(), jax.P(axes)),
        )

        def padded(x: jax.Array, mask: jax.Array | None, *rest: Any) -> tuple[jax.Array, Metrics, Any]:
            extra = -num_rows % shards
            if extra and mask is None:
                mask = jnp.ones(x.shape[:-1], bool)

            def rows(array: jax.Array) -> jax.Array:
                array = array.reshape(num_rows, *array.shape[x.ndim - row_axes :])
                return jnp.pad(array, [(0, extra), *[(0, 0)] * (array.ndim - 1)]) if extra else array

            y, metrics, slots = run(rows(x), None if mask is None else rows(mask), *rest)
            return y[:num_rows].reshape(x.shape), metrics, slots

        layer = partial(with_auto_axes, padded, (spec_of(x), jax.P(), jax.P(axes)))
        mask = None if mask is None else jnp.asarray(mask)
        operands = (x, mask, weights, dense, bias, self.placement.get_value(), rank_speed)
        if self.dispatch != "dense":
            operands = reverse_only(
                operands,
                f"a MoE layer with dispatch = {self.dispatch!r} can be differentiated once, in reverse mode (jax.grad, "
                "jax.vjp); for forward mode and derivatives of derivatives make it with dispatch='dense'",
            )
        y, metrics, slots = layer(*operands)
        return (y, metrics, lax.stop_gradient(slots)) if return_slots else (y, metrics)

    def set_experts(self, w_in: jax.typing.ArrayLike, w_out: jax.typing.ArrayLike) -> None:
        """Replaces the experts' weights by others in logical order, as checkpoints hold them.

        Args:
          w_in: [num_experts, d_model, 2 * d_expert], gate and up.
          w_out: [num_experts, d_expert, d_model].

        Raises:
          ValueError: a shape is another.
        """
        placement = self.placement.get_value()
        params: Any = {"w_in": (self.w_in, w_in), "w_out": (self.w_out, w_out)}
        for name, (param, rows) in params.items():
            shape = (placement.num_experts, *param.shape[1:])
            if jnp.shape(rows) != shape:
                raise ValueError(f"{name} must have shape {shape}, in logical order, got {jnp.shape(rows)}")
            in_order = from_logical(jnp.asarray(rows, param.dtype), placement)
            param.set_value(shard(in_order, self.mesh, jax.P(self.axis_name)))

    def update_bias(self, load: jax.Array, rate: float = 1e-3) -> None:
        """Moves the bias of each expert by `rate`, up where it had fewer tokens than the mean, down where more.

        `load` is [num_experts], or [layers, num_experts] for layers that `nnx.scan` or `nnx.vmap` stacked.
        """
        if self.bias is None:
            raise ValueError("update_bias needs a layer made with router_bias=True")
        if load.shape != self.bias.shape:
            raise ValueError(f"load must have the shape of the bias, {self.bias.shape}, got {load.shape}")
        load = load.astype(jnp.float32)
        self.bias[...] = self.bias[...] + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)

    @property
    def _num_shards(self) -> int:
        """Devices over which tokens are sharded."""
        return math.prod(self.mesh.shape[axis] for axis in self.token_axes)

    def _home_weights(self) -> dict[str, jax.Array]:
        return {"w_in": self.w_in[...], "w_out": self.w_out[...]}

    def _varying(self, weights: Any) -> Any:
        """Over the other axes too, so that gradients are added up over those in the parameters' dtype."""
        return jax.tree.map(lambda leaf: _ffi.vary(leaf, frozenset(self.other_axes)), weights)

    def _check_call(self, x: Any, slots: Any, mask: Any, rank_speed: Any, return_slots: bool) -> None:
        if self.router.ndim != 2:
            raise ValueError(
                f"the layer is a stack of layers, with a router of shape {self.router.shape}: run them one by one, "
                "with nnx.scan or nnx.vmap"
            )
        d_model = self.router.shape[0]
        if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be a floating-point array, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim < 2 or x.shape[-1] != d_model:
            raise ValueError(f"x must have shape [tokens, ..., d_model] = [..., {d_model}], got {x.shape}")
        if mask is not None:
            if not isinstance(mask, (jax.Array, np.ndarray)) or mask.dtype != bool:
                kind = getattr(mask, "dtype", type(mask).__name__)
                raise TypeError(f"mask must be a bool array, True for a token and False for padding, got {kind}")
            if mask.shape != x.shape[:-1]:
                raise ValueError(f"mask must have the shape of x without d_model, {x.shape[:-1]}, got {mask.shape}")
        placement = self.placement.get_value()
        _speed.check_rank_speed(rank_speed, placement)
        if slots is None:
            if return_slots:
                raise ValueError("return_slots = True: there are no slots to return; give those of prepare() as slots")
            return
        if self.dispatch == "dense":
            raise ValueError("slots: a layer with dispatch = 'dense' uses no copies; leave slots out")
        home = self._home_weights()
        rows = self._num_shards * placement.slots_per_rank
        expected = {name: (rows, *leaf.shape[1:]) for name, leaf in home.items()}
        got = jax.tree.map(jnp.shape, slots)
        if got != expected:
            raise ValueError(f"slots must be what prepare() returns, of shapes {expected}, got {got}")

    def _on_each_device(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        """The function within shard_map. Axes of the mesh that do not shard tokens are left to XLA there."""

        def run(*operands: Any) -> Any:
            mesh = self.mesh if jax.sharding.get_abstract_mesh().empty else None  # None: that of the context
            axes = set(self.token_axes)
            mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes)
            return mapped(*operands)

        return run

    def _on_rank(
        self,
        is_prepared: bool,
        x: jax.Array,
        mask: jax.Array | None,
        weights: dict[str, jax.Array],
        dense: dict[str, jax.Array],
        bias: jax.Array | None,
        placement: Placement,
        rank_speed: jax.Array | None,
    ) -> tuple[jax.Array, Metrics, dict[str, jax.Array] | None]:
        def of_tokens(array: jax.Array, padding: int = 0) -> jax.Array:
            return array if mask is None else jnp.where(mask.reshape(-1, 1), array, padding)

        weights = self._varying(weights)
        # Padding, and the gradient of its result, may hold anything: both are 0 before anything is made of them, as 0
        # times NaN is NaN.
        tokens = of_tokens(x.reshape(-1, x.shape[-1]))
        expert_ids, gates, probability = self.route(
            logits(tokens, dense["router"], reverse_only=self.dispatch != "dense"), bias
        )
        expert_ids, probability = of_tokens(expert_ids, -1), of_tokens(probability)

        options = dict(self.balance_options)
        out = balance(expert_ids, placement, axis_name=self.axis_name, rank_speed=rank_speed, **options)
        placement = out.placement
        metrics = self._metrics(out, expert_ids, probability, mask, placement, _speed.scale(rank_speed, placement))
        tokens, slots = tokens.astype(self.dtype), None
        if self.dispatch == "dense":
            result, rounds = self._every_expert(tokens, expert_ids, gates, weights, placement), jnp.int32(1)
        else:
            has_copies = is_prepared and placement.planning is None
            given = weights if has_copies else Home(weights, self.dtype, self.transport)
            result, rounds, slots = self._dispatch(tokens, out, gates, given, placement, x.dtype)
        if "shared_in" in dense:
            axes = _ffi.varying(tokens)  # first: gradients are added up over these in the parameters' dtype
            shared_in, shared_out = (
                _ffi.vary(dense[name], axes).astype(self.dtype) for name in ("shared_in", "shared_out")
            )
            shared = dense_swiglu(shared_in, shared_out, tokens)
            result = result.astype(jnp.float32) + shared.astype(jnp.float32)
        kept = slots if is_prepared else None
        return of_tokens(result).astype(x.dtype).reshape(x.shape), metrics._replace(rounds=rounds), kept

    def _dispatch(
        self,
        tokens: jax.Array,
        out: Balanced,
        gates: jax.Array,
        slots: dict[str, jax.Array] | Home,
        placement: Placement,
        dtype: Any,
    ) -> tuple[jax.Array, jax.Array, Any]:
        return expert_parallel(
            tokens,
            out.physical_ids,
            gates,
            slots,
            partial(swiglu, implementation=self.grouped_matmul),
            placement,
            axis_name=self.axis_name,
            dispatch=None if self.dispatch == "dense" else self.dispatch,
            buffer_factor=self.buffer_factor,
            dtype=dtype,
        )

    def _every_expert(
        self,
        tokens: jax.Array,
        expert_ids: jax.Array,
        gates: jax.Array,
        weights: dict[str, jax.Array],
        placement: Placement,
    ) -> jax.Array:
        """All experts on all tokens of this rank, weighted by the gates, in plain JAX; float32 sums."""
        experts = jax.tree.map(
            lambda leaf: lax.all_gather(leaf, self.axis_name, tiled=True).astype(self.dtype), weights
        )
        order = jnp.asarray(placement.home_order)
        if has_padding(placement.num_experts, placement.num_ranks):  # rows that nobody computes or picks
            rows = rows_of_experts(placement.num_experts, placement.num_ranks)
            order, experts = order[rows], jax.tree.map(lambda leaf: leaf.at[rows].get(unique_indices=True), experts)
        picked = expert_ids[:, :, None] == order[None, None, :]
        of_experts = jnp.sum(jnp.where(picked, gates[:, :, None], 0), axis=1).T  # [rows of weights, tokens]

        def add(total: jax.Array, expert: Any) -> tuple[jax.Array, None]:
            # Not 0 times what an expert makes of tokens that are not its own: that may be no number.
            is_picked, gate, one = expert
            rows = jnp.where(is_picked[:, None], tokens, 0)
            part = gate[:, None] * dense_swiglu(one["w_in"], one["w_out"], rows).astype(jnp.float32)
            return total + jnp.where(is_picked[:, None], part, 0), None

        zeros = _ffi.vary(jnp.zeros(tokens.shape, jnp.float32), _ffi.varying(tokens, of_experts, *experts.values()))
        return lax.scan(add, zeros, (jnp.any(picked, axis=1).T, of_experts, experts))[0]

    def _metrics_of_nothing(self) -> Metrics:
        load = jnp.zeros(self.router.shape[1], jnp.int32)
        kinds = {"status": jnp.int32(Status.SKIPPED), "rounds": jnp.int32(1), "load": load}
        kinds |= dict.fromkeys(("contiguous", "home", "optimum", "balanced"), jnp.float32(1))
        return Metrics(**{name: kinds.get(name, jnp.float32(0)) for name in Metrics._fields})

    def _metrics(
        self,
        out: Balanced,
        expert_ids: jax.Array,
        probability: jax.Array,
        mask: jax.Array | None,
        placement: Placement,
        speed: jax.Array | None,
    ) -> Metrics:
        """Over all ranks, and the worst or the mean over other token axes; `rounds` is left to the caller."""
        others, ranks = self.other_axes, placement.num_ranks
        load = out.load.astype(jnp.float32)
        mean = jnp.maximum(jnp.sum(out.load, dtype=jnp.int32).astype(jnp.float32) / ranks, 1e-9)
        contiguous = jnp.sum(to_rows(load, placement).reshape(ranks, -1), axis=1)
        home = jnp.zeros_like(load, shape=(ranks,)).at[placement.home_rank].add(load)
        first_slot = jnp.asarray(placement.log2phy)[:, 0].at[expert_ids].get(mode="fill", fill_value=-1)
        moved = jnp.sum((out.physical_ids >= 0) & (out.physical_ids != first_slot), dtype=jnp.int32)
        total = lax.psum(out.load, others) if others else out.load
        chosen = total.astype(jnp.float32) / jnp.maximum(jnp.sum(total.astype(jnp.float32)), 1)
        moved, probability = lax.psum((moved.astype(jnp.float32), jnp.sum(probability, axis=0)), self.token_axes)
        num_tokens: Any = len(expert_ids) * self._num_shards
        if mask is not None:
            num_tokens = jnp.maximum(lax.psum(jnp.sum(mask, dtype=jnp.float32), self.token_axes), 1)

        def worst(value: jax.Array) -> jax.Array:
            return lax.pmax(value, others) if others else value

        def imbalance(largest: jax.Array) -> jax.Array:
            return worst(jnp.where(largest > 0, largest / mean, 1))

        def of_ranks(rank_load: jax.Array) -> jax.Array:
            return imbalance(jnp.max(_speed.in_time(rank_load.astype(jnp.float32), speed)))

        balanced = of_ranks(out.rank_load)
        return Metrics(
            contiguous=of_ranks(contiguous),
            home=of_ranks(home),
            optimum=jnp.clip(imbalance(jnp.max(out.lower_bound)), 1, balanced),  # no largest is below the mean
            balanced=balanced,
            moved=moved / (num_tokens * self.route.top_k),
            gap=worst(jnp.max(out.gap)),
            status=worst(jnp.max(out.status)),
            rounds=jnp.int32(1),
            load=total,
            aux_loss=len(chosen) * jnp.sum(lax.stop_gradient(chosen) * probability / num_tokens),
        )


def _copied(placement: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, placement)


def _check_axes(mesh: Any, axis_name: Any, token_axes: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh's axes of experts, and those of tokens, as tuples."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as jax.make_mesh returns, got {type(mesh).__name__}")
    named = []
    for name, axes in (("axis_name", axis_name), ("token_axes", axis_name if token_axes is None else token_axes)):
        one = (axes,) if isinstance(axes, str) else axes
        if not isinstance(one, tuple) or not one or not all(isinstance(axis, str) for axis in one):
            raise TypeError(f"{name} must be the name of an axis of the mesh, or a tuple of names, got {axes!r}")
        if not set(one) <= set(mesh.axis_names) or len(set(one)) < len(one):
            raise ValueError(f"{name} must name axes of the mesh, which are {mesh.axis_names}, each once; got {axes!r}")
        named.append(one)
    expert_axes, token_axes = named
    if not set(expert_axes) <= set(token_axes):
        raise ValueError(f"token_axes must hold the axes of axis_name = {axis_name!r}, got {token_axes}")
    return expert_axes, token_axes


def _check_ranks(placement: Placement, num_experts: int, axis_name: Any, ranks: int) -> None:
    if placement.num_experts != num_experts:
        raise ValueError(f"placement is one of {placement.num_experts} experts, but num_experts = {num_experts}")
    if placement.num_ranks != ranks:
        raise ValueError(
            f"placement is one of {placement.num_ranks} ranks, but axis_name = {axis_name!r} spans {ranks} devices of "
            "the mesh"
        )


def _check_balance_options(options: Mapping[str, Any] | None, placement: Placement) -> tuple[tuple[str, Any], ...]:
    """The options, hashable, as static attributes of a layer must be."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"balance_options must be a mapping of names to values, got {options!r}")
    options = dict(options or {})
    known = list(inspect.signature(check_balance_options).parameters)[1:]
    for name in options:
        if name not in known:
            raise ValueError(f"balance_options: {name!r} is none of the options that a layer passes on, {known}")
    check_balance_options(placement, **options)
    return tuple(sorted(options.items()))
