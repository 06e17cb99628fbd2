"""What happens on the devices: the first state, a step, validation, and experts that move."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_lplb as lplb
from config import Config
from jax_lplb.flax import PlacementState, RouterBias
from model import Transformer

METRICS = ("contiguous", "home", "optimum", "balanced", "moved", "rounds", "load")  # of the layers, recorded


class State(NamedTuple):
    """All that a step changes; leaves named `w_in` and `w_out` are [layers, experts, ...] in the placement's order.

    Attributes:
      step: int32 [], updates so far.
      params: the parameters, float32.
      bias: the routers' biases, if any.
      opt_state: optax's.
      load: float32 [layers, experts], moving average of the tokens of each logical expert; None but with --copies past.
    """

    step: jax.Array
    params: Any
    bias: Any
    opt_state: Any
    load: jax.Array | None


class Trainer:
    """Compiled functions of one configuration on one mesh, whose axes are "data" and "expert"."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, placement: lplb.Placement) -> None:
        """`placement` is any of those that the run will use: all have equal shapes."""
        self.config, self.mesh, self.past = config, mesh, config.placing.copies == "past"
        one_layer = jax.tree.map(lambda leaf: leaf[0], placement)
        self.schedule = _schedule(config)
        self.optimiser = _optimiser(config, self.schedule)

        def create() -> State:
            model = Transformer(config, one_layer, mesh, rngs=nnx.Rngs(config.seed))
            parts: Any = nnx.split(model, nnx.Param, RouterBias, PlacementState)
            _, params, bias, _ = parts
            return State(jnp.int32(0), params, bias, self.optimiser.init(params), self.first_load())

        abstract = nnx.eval_shape(lambda: Transformer(config, one_layer, mesh, rngs=nnx.Rngs(config.seed)))
        split: Any = nnx.split(abstract, nnx.Param, RouterBias, PlacementState)
        self.graph, _, _, self._placement_state = split
        self.everywhere = jax.NamedSharding(mesh, jax.P())
        self.by_expert = jax.NamedSharding(mesh, jax.P(None, "expert"))
        shapes = jax.eval_shape(create)
        self.shardings = self._map_experts(lambda _: self.by_expert, lambda _: self.everywhere, shapes)
        self.abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.shardings,
        )
        self.create = jax.jit(create, out_shardings=self.shardings)
        # Donated: the new state takes the old one's memory. Results have fixed shardings: nothing compiles twice.
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, self.everywhere))
        self.validate = jax.jit(lambda state, placement, batch: self._loss(state.params, state, placement, batch)[1][0])
        self.move = self._mover(lplb.permute_experts, placements=2, donate=True)
        self.from_logical = self._mover(lplb.from_logical, placements=1, donate=True)
        self.to_logical = self._mover(lplb.to_logical, placements=1, donate=False)
        if not self.past:  # experts are in logical order, and stay there
            self.from_logical = self.to_logical = lambda state, placement: state

    def first_load(self) -> Any:
        """The average of loads before there are any."""
        model = self.config.model
        return np.zeros((model.layers, model.experts), np.float32) if self.past else None

    def compile(self, placement: lplb.Placement, start: int = 0) -> dict[str, str]:
        """Compiles what steps after `start` run, so that none of them waits for it.

        Returns how tokens and copies travel, `dispatch` and `transport`, where that was left to what can be reached.
        """
        data, steps, every = self.config.data, self.config.steps, self.config.placing.placement_every
        batch = jax.ShapeDtypeStruct(
            (data.batch, data.seq_len + 1), np.uint8, sharding=jax.NamedSharding(self.mesh, jax.P(self.mesh.axis_names))
        )
        lowered = self.step.lower(self.abstract, placement, batch)
        lowered.compile()
        if self.past and (steps - 1) // every > start // every:
            self.move.lower(self.abstract, placement, placement).compile()
        text = lowered.as_text()
        dispatch = "peer" if "lplb_dispatch" in text else self.config.compute.dispatch or "all_to_all"
        # Whatever is read from peers' memory has been exposed, or shared with other processes, before.
        transport = "peer" if "lplb_expose" in text or "lplb_share" in text else "collective"
        has_copies = placement.num_physical > placement.num_experts
        return {"dispatch": dispatch, "transport": transport if has_copies else "none"}

    @property
    def num_parameters(self) -> int:
        """Of the model, each expert once."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))

    def put(self, placement: lplb.Placement) -> lplb.Placement:
        """The placement on all devices."""
        return jax.device_put(placement, self.everywhere)

    def _loss(self, params: Any, state: State, placement: lplb.Placement, batch: jax.Array) -> tuple[jax.Array, Any]:
        model = self._model(params, state, placement)
        batch = batch.astype(jnp.int32)
        logits, metrics = model(batch[:, :-1])
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]))
        return loss + self.config.optimiser.aux_loss_weight * jnp.mean(metrics.aux_loss), (loss, metrics)

    def _model(self, params: Any, state: State, placement: lplb.Placement) -> Transformer:
        bias = jax.tree.map(lambda leaf: leaf, state.bias)  # variables of this trace, as nnx.scan asks for
        placed = jax.tree.unflatten(jax.tree.structure(self._placement_state), jax.tree.leaves(placement))
        return nnx.merge(self.graph, params, bias, placed)

    def _step(self, state: State, placement: lplb.Placement, batch: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        grads, (loss, metrics) = jax.grad(self._loss, has_aux=True)(state.params, state, placement, batch)
        updates, opt_state = self.optimiser.update(grads, state.opt_state, state.params)
        model = self._model(state.params, state, placement)
        if self.config.model.router_bias:
            model.blocks.moe.update_bias(metrics.load, self.config.optimiser.router_bias_rate)
        load = state.load
        if load is not None:
            weight = 2 / (self.config.placing.placement_every + 1)
            load = (1 - weight) * load + weight * metrics.load.astype(jnp.float32)
        recorded = {
            "loss": loss,
            "lr": self.schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            **{name: getattr(metrics, name) for name in METRICS},
        }
        new = State(
            state.step + 1,
            optax.apply_updates(state.params, updates),
            nnx.state(model, RouterBias),
            opt_state,
            load,
        )
        return new, recorded

    def _mover(self, function: Callable[..., Any], *, placements: int, donate: bool) -> Any:
        """Parameters and both of Adam's moments of experts through a function of jax_lplb, layer by layer."""

        def run(state: State, *given: lplb.Placement) -> State:
            # Within shard_map: otherwise each device would hold all experts for a while.
            moved = jax.shard_map(
                jax.vmap(partial(function, axis_name="expert")),
                mesh=self.mesh,
                in_specs=(jax.P(None, "expert"), *[jax.P()] * placements),
                out_specs=jax.P(None, "expert"),
            )
            rows: list[jax.Array] = []
            self._map_experts(rows.append, lambda leaf: None, state)
            rows = list(reversed(moved(rows, *given)))
            return self._map_experts(lambda _: rows.pop(), lambda leaf: leaf, state)

        return jax.jit(run, donate_argnums=0 if donate else (), out_shardings=self.shardings)

    @staticmethod
    def _map_experts(experts: Callable[[Any], Any], others: Callable[[Any], Any], tree: Any) -> Any:
        """Leaves through one function if they belong to experts, through the other if not."""

        def choose(path: Any, leaf: Any) -> Any:
            names = {getattr(key, "key", None) for key in path}
            return (experts if names & {"w_in", "w_out"} else others)(leaf)

        return jax.tree_util.tree_map_with_path(choose, tree)


def _schedule(config: Config) -> optax.Schedule:
    settings = config.optimiser
    return optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        settings.warmup_steps,
        max(config.steps, settings.warmup_steps + 1),
        settings.final_fraction * settings.learning_rate,
    )


def _optimiser(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    settings = config.optimiser

    def matrices(params: Any) -> Any:
        # Norms, which decay is not for, have one axis, and in the stacked blocks one more.
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(schedule, b2=0.95, weight_decay=settings.weight_decay, mask=matrices),
    )


def mesh_of(ranks: int) -> jax.sharding.Mesh:
    """All devices of all processes: experts over "expert", its neighbours; what is left over "data"."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((jax.device_count() // ranks, ranks), ("data", "expert"), axis_types=auto)


def past_load(state: State) -> np.ndarray | None:
    """The moving average on the host, float32 [layers, experts], if there is one; waits for the devices."""
    return None if state.load is None else np.asarray(state.load)
