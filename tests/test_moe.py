"""The Flax layer against a dense one on a single device: results and gradients, whatever happens on the way."""

import contextlib
import dataclasses
import re
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import optimum, scaled_speed, topology
from hypothesis.extra.numpy import arrays
from jax.experimental import multihost_utils

import jax_lplb as lplb
from jax_lplb import _all_to_all, _expert_parallel
from jax_lplb.flax import MoE

P = jax.sharding.PartitionSpec
RANKS, EXPERTS, D_MODEL, D_EXPERT, TOP_K, TOKENS = 8, 16, 12, 20, 3, 88  # tokens of each rank


def placements() -> dict[str, lplb.Placement]:
    load = np.random.default_rng(1).lognormal(0, 1.5, EXPERTS)
    along = partial(lplb.Placement.from_topology, num_experts=EXPERTS, num_ranks=RANKS)
    return {
        "none": along(topology.ring(8), redundants_per_rank=0),
        "cube": along(topology.cube(), redundants_per_rank=2),
        "rings by load": along(topology.ring(4), redundants_per_rank=2, load=load),
        "repeats": along(topology.cube(), redundants_per_rank=4, load=load, repeats=True),
        "eplb": lplb.Placement.from_eplb(load, num_ranks=RANKS, redundants_per_rank=2),
    }


def make(placement: lplb.Placement | None, mesh: jax.sharding.Mesh, seed: int = 0, **options) -> MoE:
    options = {"axis_name": "ep", "dtype": jnp.float32, "rngs": nnx.Rngs(seed), "top_k": TOP_K} | options
    layer = MoE(D_MODEL, EXPERTS, D_EXPERT, placement=placement, mesh=mesh, **options)
    layer.router[...] = layer.router[...] * 4  # an uneven router
    return layer


def mesh_of(*sizes_and_names) -> jax.sharding.Mesh:
    sizes, names = zip(*sizes_and_names, strict=True)
    return jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def dense(
    params: dict,
    x: jax.Array,
    *,
    router: str = "softmax",
    bias: jax.Array | None = None,
    top_k: int = TOP_K,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
) -> jax.Array:
    """Every expert on every token, in logical order."""
    logits = x @ params["router"]
    scores = jax.nn.softmax(logits) if router == "softmax" else jax.nn.sigmoid(logits)
    _, ids = jax.lax.top_k(scores if bias is None else scores + bias[None, :], top_k)
    gates = jnp.take_along_axis(scores, ids, axis=-1)
    if norm_topk_prob:
        gates = gates / gates.sum(axis=-1, keepdims=True)
    hidden = jnp.einsum("td,edh->teh", x, params["w_in"])
    out = jnp.einsum("teh,ehd->ted", gated(hidden), params["w_out"])
    routed = jnp.einsum("tk,tkd->td", gates * routed_scaling_factor, jnp.take_along_axis(out, ids[..., None], axis=1))
    return routed + (gated(x @ params["shared_in"]) @ params["shared_out"] if "shared_in" in params else 0)


def gated(hidden: jax.Array) -> jax.Array:
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


def logical(state: dict, placement: lplb.Placement) -> dict:
    """Parameters or gradients of a layer, with experts in logical order."""
    return state | lplb.to_logical({name: state[name] for name in ("w_in", "w_out")}, placement)


def params_of(layer: MoE) -> dict:
    return arrays_of(nnx.state(layer, nnx.Param))


def arrays_of(state: nnx.State) -> dict:
    return {name: variable[...] for name, variable in state.items()}


@nnx.jit
def run(layer: MoE, x: jax.Array):
    return layer(x)


def value_and_grads(layer: MoE, x: jax.Array, weight: jax.Array, prepared: bool = False, rank_speed=None):
    """Result, metrics, and the gradients of a weighted sum by parameters and input."""
    return _value_and_grads(layer, x, weight, prepared, rank_speed)  # compiled once, with defaults given or not


@partial(nnx.jit, static_argnums=3)
def _value_and_grads(layer: MoE, x: jax.Array, weight: jax.Array, prepared: bool, rank_speed):
    def loss(layer, x):
        result, metrics = layer(x, layer.prepare() if prepared else None, rank_speed=rank_speed)
        return jnp.sum(result * weight), (result, metrics)

    (_, aux), grads = nnx.value_and_grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1), has_aux=True)(layer, x)
    return aux, grads


def inputs(rng: np.random.Generator, tokens: int = RANKS * TOKENS) -> tuple[jax.Array, jax.Array]:
    draw = partial(rng.normal, size=(tokens, D_MODEL))
    return jnp.asarray(draw(), jnp.float32), jnp.asarray(draw(), jnp.float32)


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """To a fraction of the tensor's largest value."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) <= tolerance * np.max(np.abs(expected))


def whole(tree):
    """The arrays, all of them in this process."""
    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def check_against_dense(
    layer: MoE, x, weight, prepared: bool = False, rank_speed: jax.Array | None = None, **options
) -> lplb.flax.Metrics:
    (result, metrics), (grads, x_grad) = whole(value_and_grads(layer, x, weight, prepared, rank_speed))
    x, weight, params = whole((x, weight, params_of(layer)))
    place = layer.placement.get_value()

    def reference_loss(params, x):
        result = dense(params, x, **options)
        return jnp.sum(result * weight), result

    reference = jax.jit(jax.value_and_grad(reference_loss, argnums=(0, 1), has_aux=True))
    (_, expected), (expected_grads, expected_x) = reference(logical(params, place), x)
    assert_close(result, expected)
    assert_close(x_grad, expected_x)
    got = logical(arrays_of(grads), place)
    for name, value in expected_grads.items():
        assert_close(got[name], value)
    return metrics


@pytest.mark.parametrize("buffer_factor", [0.2, 8.0])
@pytest.mark.parametrize("dispatch", ["peer", "all_to_all", "ring"])
def test_padding(rng, dispatch, buffer_factor):
    """Negative ids are nobody's: anywhere, and all that a rank has."""
    place, mesh = placements()["cube"], mesh_of((RANKS, "ep"))
    tokens = rng.normal(size=(RANKS * TOKENS, D_MODEL)).astype(np.float32)
    gates = rng.uniform(size=(RANKS * TOKENS, TOP_K)).astype(np.float32)
    ids = rng.integers(-place.num_physical // 4, place.num_physical, (RANKS * TOKENS, TOP_K)).astype(np.int32)
    ids[:TOKENS] = -1
    weights = rng.normal(size=(place.num_physical, D_MODEL, D_MODEL)).astype(np.float32)

    def on_rank(tokens, ids, gates, weights):
        result, rounds, _ = _expert_parallel.expert_parallel(
            tokens,
            ids,
            gates,
            weights,
            lambda slots, rows, sizes: jax.lax.ragged_dot(rows, slots, sizes),
            place,
            axis_name="ep",
            dispatch=dispatch,
            buffer_factor=buffer_factor,
            dtype=np.float32,
        )
        return result, rounds

    run = jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=P("ep"), out_specs=(P("ep"), P())))
    result, rounds = run(tokens, ids, gates, weights)
    assert (rounds > 1) == (buffer_factor < 1)
    shares = np.einsum("td,tkde->tke", tokens, weights[ids]) * (gates * (ids >= 0))[:, :, None]
    np.testing.assert_allclose(result, shares.sum(axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("buffer_factor", [1.0, 1e9])
@pytest.mark.parametrize("axes", [(None, 0, None), (0, None, None), (None, None, 0)])
def test_mapped(rng, axes, buffer_factor):
    """Weights, tokens or ids alone, with gradients: what is brought beside tokens is mapped with them."""
    experts = 16
    place = lplb.Placement.per_batch(num_experts=experts, num_ranks=RANKS, redundants_per_rank=1)
    weights = rng.normal(size=(experts, 4, 4)).astype(np.float32)
    tokens = rng.normal(size=(RANKS * TOKENS, 4)).astype(np.float32)
    ids = rng.integers(0, experts, (RANKS * TOKENS, TOP_K)).astype(np.int32)
    given = [
        np.stack([one, np.flip(one, 0)]) if axis == 0 else one
        for one, axis in zip((weights, tokens, ids), axes, strict=True)
    ]

    def on_rank(weights, tokens, ids):
        out = lplb.balance(ids, place, axis_name="ep")
        result, *_ = _expert_parallel.expert_parallel(
            tokens,
            out.physical_ids,
            jnp.ones(ids.shape, jnp.float32),
            _expert_parallel.Home(weights, None, "peer"),
            lambda slots, rows, sizes: rows * jnp.mean(slots),
            out.placement,
            axis_name="ep",
            dispatch="peer",
            buffer_factor=buffer_factor,
            dtype=np.float32,
        )
        return result

    def on_ranks(function, axes):
        specs = tuple(P("ep") if axis is None else P(None, "ep") for axis in axes)
        out_specs = P(None, "ep") if 0 in axes else P("ep")
        return jax.shard_map(function, mesh=mesh_of((RANKS, "ep")), in_specs=specs, out_specs=out_specs)

    @partial(jax.jit, static_argnums=0)
    def run(axes, *given):
        mapped = jax.vmap(on_rank, axes) if 0 in axes else on_rank

        def loss(*given):
            result = on_ranks(mapped, axes)(*given, given_ids)
            return jnp.sum(jnp.sin(result)), result

        *given, given_ids = given
        (_, result), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*given)
        return result, gradients

    result, gradients = run(axes, *given)
    one_by_one = [
        run((None,) * 3, *(leaf[i] if axis == 0 else leaf for leaf, axis in zip(given, axes, strict=True)))
        for i in range(2)
    ]
    for i, (expected, _) in enumerate(one_by_one):
        np.testing.assert_array_equal(result[i], expected)
    for k in range(2):
        parts = np.stack([of_one[k] for _, of_one in one_by_one])
        np.testing.assert_allclose(gradients[k], parts if axes[k] == 0 else parts.sum(axis=0), rtol=1e-5, atol=1e-6)


def test_remat_does_not_bring_results_back_again(rng):
    """What the backward pass needs are tokens at their experts: nothing is combined for it."""
    layer = make(None, mesh_of((RANKS, "ep")), dispatch="peer", buffer_factor=1.1)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def calls(is_remat):
        def loss(params, x):
            def run(params, x):
                return nnx.merge(graph, params, rest)(x)[0]

            return jnp.sum((jax.checkpoint(run) if is_remat else run)(params, x) ** 2)

        text = jax.jit(jax.grad(loss, (0, 1))).lower(params, inputs(rng)[0]).as_text()
        return {target: text.count(f"@lplb_{target}(") for target in ("combine", "dispatch", "begin_rows")}

    plain, remat = calls(False), calls(True)
    assert remat["combine"] == plain["combine"]
    assert remat["dispatch"] == plain["dispatch"] + 1
    assert remat["begin_rows"] == plain["begin_rows"] + 1


by_slot = jax.jit(_all_to_all._by_slot, static_argnums=2)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    coming=arrays(np.int32, st.sampled_from([(1, 1), (3, 4)]), elements=st.integers(0, 9)),
    first=st.integers(0, 30),
    capacity=st.sampled_from([1, 7, 40]),
)
def test_cells_by_slot(coming, first, capacity):
    """As a stable sort of the cells' slots has it."""
    slots = coming.shape[1]
    queues = [np.repeat(np.arange(slots), numbers)[first : first + capacity] for numbers in coming]
    slot = np.concatenate([np.pad(queue, (0, capacity - len(queue)), constant_values=slots) for queue in queues])
    back, group_sizes = by_slot(coming, jnp.int32(first), capacity)
    np.testing.assert_array_equal(back, np.argsort(np.argsort(slot, kind="stable")))
    np.testing.assert_array_equal(group_sizes, np.bincount(slot, minlength=slots + 1)[:slots])


@pytest.mark.parametrize(
    ("name", "buffer_factor", "dispatch", "transport"),
    [
        ("none", 8.0, "peer", "peer"),
        ("none", 8.0, "ring", "collective"),
        ("repeats", 8.0, "peer", "peer"),
        ("repeats", 8.0, "all_to_all", "peer"),
        pytest.param("rings by load", 0.2, "peer", "peer", marks=pytest.mark.smoke),
        pytest.param("rings by load", 0.2, "ring", "collective", marks=pytest.mark.smoke),
        ("eplb", 0.2, "peer", "collective"),
        ("eplb", 0.2, "all_to_all", "collective"),
    ],
)
def test_equals_dense(rng, name, dispatch, transport, buffer_factor):
    """With room for all, and far too little: several rounds."""
    place = placements()[name]
    options = {"dispatch": dispatch, "transport": transport, "buffer_factor": buffer_factor}
    layer = make(place, mesh_of((RANKS, "ep")), **options)
    x, weight = inputs(rng)
    metrics = check_against_dense(layer, x, weight)
    rounds = int(metrics.rounds)
    assert rounds == 1 if buffer_factor == 8 else rounds >= 5
    assert int(metrics.load.sum()) == x.shape[0] * TOP_K
    assert metrics.optimum <= metrics.balanced + 1e-6
    if name == "repeats":
        assert place.max_replicas == 3
    if name == "none":
        assert metrics.balanced == metrics.home
        assert metrics.moved == 0
    else:
        assert metrics.balanced < metrics.home
        assert metrics.moved > 0


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_factor", [8.0, 0.2])
@pytest.mark.parametrize("dispatch", ["peer", "all_to_all", "ring"])
@pytest.mark.parametrize("name", ["none", "ring", "eplb"])
def test_equals_dense_on_gpus(rng, name, dispatch, buffer_factor):
    devices = jax.devices("gpu")
    ranks = next((size for size in (8, 4, 2) if size <= len(devices)), None)
    if ranks is None:
        pytest.skip("needs two GPUs")
    if name == "eplb":
        place = lplb.Placement.from_eplb(rng.lognormal(0, 1, EXPERTS), num_ranks=ranks, redundants_per_rank=2)
    else:
        redundants = 0 if name == "none" else 2
        place = lplb.Placement.from_topology(
            topology.ring(ranks), num_experts=EXPERTS, num_ranks=ranks, redundants_per_rank=redundants
        )
    mesh = jax.sharding.Mesh(devices[:ranks], ("ep",))
    layer = make(place, mesh, dispatch=dispatch, buffer_factor=buffer_factor, grouped_matmul="ragged_dot")
    metrics = check_against_dense(layer, *inputs(rng))
    assert (int(metrics.rounds) == 1) == (buffer_factor == 8)


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_factor", [4.0, 0.4])
@pytest.mark.parametrize("d_expert", [128, 192])
def test_grouped_matmuls_on_gpus(rng, d_expert, buffer_factor):
    """In bfloat16, with room to spare and in several rounds; one width is a multiple of the kernels' tiles."""
    devices = jax.devices("gpu")
    load = rng.lognormal(0, 1, EXPERTS)
    place = lplb.Placement.from_eplb(load, num_ranks=len(devices), redundants_per_rank=0)
    mesh = jax.sharding.Mesh(devices, ("ep",))
    x, weight = (jnp.asarray(rng.normal(size=(256 * len(devices), 256)), jnp.bfloat16) for _ in range(2))
    got = {}
    for name in (None, "ragged_dot"):
        options = {"placement": place, "mesh": mesh, "axis_name": "ep", "rngs": nnx.Rngs(0)}
        layer = MoE(256, EXPERTS, d_expert, TOP_K, buffer_factor=buffer_factor, grouped_matmul=name, **options)
        (result, metrics), grads = value_and_grads(layer, x, weight)
        assert (int(metrics.rounds) == 1) == (buffer_factor == 4 or len(devices) == 1)
        got[name] = [result, *jax.tree.leaves(grads)]
    for actual, expected in zip(got[None], got["ragged_dot"], strict=True):
        assert_close(actual, expected, 1e-2)


@pytest.mark.parametrize(
    ("dispatch", "buffer_factor", "balance_options"),
    [("peer", 8.0, {}), ("all_to_all", 0.4, {"locality": True, "ranks_per_node": 4})],
)
def test_copies_chosen_for_each_batch(rng, dispatch, buffer_factor, balance_options):
    """Other experts' in each batch, and none in some slots: results and gradients stay those of the dense layer."""
    options = {"dispatch": dispatch, "buffer_factor": buffer_factor, "balance_options": balance_options}
    layer = make(None, mesh_of((RANKS, "ep")), **options)
    place, chosen = layer.placement.get_value(), []
    for _ in range(2):
        x, weight = inputs(rng)
        metrics = check_against_dense(layer, x + 2 * rng.normal(size=(1, D_MODEL)).astype(np.float32), weight)
        assert metrics.home == metrics.contiguous
        assert 1 <= metrics.optimum <= metrics.balanced + 1e-6 < metrics.home
        assert metrics.moved > 0
        chosen.append(jax.tree.map(np.asarray, place.choose(metrics.load)))
        assert 0 < np.sum(chosen[-1].phy2log < 0) < 2 * RANKS
        best = optimum(metrics.load, chosen[-1]).item() * RANKS / np.sum(np.asarray(metrics.load))
        assert float(metrics.optimum) == pytest.approx(max(best, 1), rel=3e-4)
    assert chosen[0] != chosen[1]
    assert layer.placement.get_value() == place  # nothing is kept


@pytest.mark.parametrize(
    ("dispatch", "axis_type", "buffer_factor", "remat"),
    [("peer", "Auto", 1.1, False), ("peer", "Auto", 0.4, True), ("all_to_all", "Explicit", 8.0, False)],
)
def test_micro_batches_hand_prepared_slots_on(rng, dispatch, axis_type, buffer_factor, remat):
    """Each brings its own copies where those of the one before are; together they make the step of one large batch."""
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(getattr(jax.sharding.AxisType, axis_type),))
    layer = make(None, mesh, dispatch=dispatch, buffer_factor=buffer_factor)
    batches = [inputs(rng) for _ in range(3)]
    x, weight = (jnp.stack(arrays) for arrays in zip(*batches, strict=True))
    x = x + 2 * jnp.asarray(rng.normal(size=(3, 1, D_MODEL)), jnp.float32)

    @nnx.jit
    def step(layer, x, weight):
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def loss(slots, x, weight):
            result, metrics, slots = nnx.merge(graph, params, rest)(x, slots, return_slots=True)
            return jnp.sum(result * weight), (slots, metrics.balanced)

        def prepare(params):
            return nnx.merge(graph, params, rest).prepare()

        def micro_batch(carry, batch):
            slots, total = carry
            run = jax.checkpoint(loss) if remat else loss
            gradient, (slots, balanced) = jax.grad(run, has_aux=True)(slots, *batch)
            return (slots, jax.tree.map(jnp.add, total, gradient)), balanced

        slots, pull = jax.vjp(prepare, params)
        (slots, total), balanced = jax.lax.scan(micro_batch, (slots, jax.tree.map(jnp.zeros_like, slots)), (x, weight))
        return pull(total)[0], total, balanced

    gradient, total, balanced = step(layer, x, weight)
    expected: dict = {}
    for one in zip(x, weight, strict=True):
        (_, metrics), (grads, _) = value_and_grads(layer, *one)
        expected = {name: expected.get(name, 0) + leaf for name, leaf in arrays_of(grads).items()}
        assert metrics.balanced in balanced
    for name in ("w_in", "w_out"):
        assert_close(arrays_of(gradient)[name], expected[name])
        room = np.asarray(total[name]).reshape(RANKS, -1, *total[name].shape[1:])[:, EXPERTS // RANKS :]
        assert room.shape[1] == 2
        assert not room.any()


@pytest.mark.parametrize(("prepared", "buffer_factor"), [(True, 1.1), (True, 8.0), (False, 1.1)])
def test_slots_are_not_moved(rng, prepared, buffer_factor):
    """With a branch on several rounds, and without: XLA copies no array of their shape, nor of their gradients'.

    Prepared ones are changed in place; others are on their way while the branch is taken.
    """
    layer = make(None, mesh_of((RANKS, "ep")), dispatch="peer", buffer_factor=buffer_factor)
    graph, state = nnx.split(layer)

    def step(slots, state, x):
        def loss(slots, x):
            result, _, slots = nnx.merge(graph, state)(x, slots, return_slots=True)
            return jnp.sum(result**2), slots

        if not prepared:
            return jax.grad(lambda x: jnp.sum(nnx.merge(graph, state)(x)[0] ** 2))(x)
        gradient, slots = jax.grad(loss, has_aux=True)(slots, x)
        return slots, gradient

    slots = jax.eval_shape(layer.prepare)
    compiled = jax.jit(step, donate_argnums=0).lower(slots, state, inputs(rng)[0]).compile().as_text()
    assert "lplb_begin_rows" in compiled
    for leaf in slots.values():
        shape = ",".join(map(str, (leaf.shape[0] // RANKS, *leaf.shape[1:])))
        assert f"f32[{shape}]" in compiled
        assert not re.findall(rf"= f32\[{shape}\]\S* (copy|copy-start|select|concatenate|pad)\(", compiled)


@pytest.mark.parametrize("name", ["cube", None])
def test_slots_that_are_returned(rng, name):
    """With copies that stay they are those given, and so for no tokens; they have no gradient."""
    layer = make(placements()[name] if name else None, mesh_of((RANKS, "ep")), dispatch="peer")
    x, _ = inputs(rng)

    @nnx.jit
    def run(layer, tokens):
        given = layer.prepare()
        returned, pull = jax.vjp(lambda slots: layer(tokens, slots, return_slots=True)[2], given)
        return given, returned, pull(given)[0]

    for tokens in (x, x[:0]):
        given, slots, gradient = run(layer, tokens)
        of_home = layer.placement.get_value().rows_per_rank
        for one, other, of_leaf in zip(*map(jax.tree.leaves, (given, slots, gradient)), strict=True):
            one, other = (np.asarray(leaf).reshape(RANKS, -1, *leaf.shape[1:]) for leaf in (one, other))
            np.testing.assert_array_equal(one[:, :of_home], other[:, :of_home])
            assert np.any(one[:, of_home:] != other[:, of_home:]) == (name is None and len(tokens) > 0)
            assert not np.any(of_leaf)


def test_copies_of_a_batch_are_kept_where_they_are_no_longer_planned(rng):
    layer = make(None, mesh_of((RANKS, "ep")))
    x, weight = inputs(rng)
    chosen = layer.placement.get_value().choose(run(layer, x)[1].load)
    layer.placement.set_value(dataclasses.replace(chosen, planning=None))
    metrics = check_against_dense(layer, x, weight, prepared=True)
    assert metrics.balanced < metrics.home


@pytest.mark.parametrize("name", ["cube", None])
def test_ranks_of_different_speeds(rng, name):
    """Metrics are of load / speed; other speeds, another balance, and results stay those of the dense layer."""
    place = None if name is None else placements()[name]
    layer = make(place, mesh_of((RANKS, "ep")), dispatch="all_to_all" if name else "peer", buffer_factor=4.0)
    x, weight = inputs(rng)
    for speed in ([2, 1, 1, 1, 1, 1, 1, 0.5], [1, 1, 1, 0, 1, 1, 1, 1]):
        speed = np.array(speed, np.float32)
        metrics = check_against_dense(layer, x, weight, rank_speed=jnp.asarray(speed))
        chosen = jax.tree.map(np.asarray, layer.placement.get_value())
        if name is None:
            chosen = jax.tree.map(np.asarray, chosen.choose(metrics.load, rank_speed=speed))
        load, scaled = np.asarray(metrics.load), scaled_speed(speed, chosen)
        mean = load.sum() / RANKS
        at_home = np.bincount(chosen.home_rank, load, minlength=RANKS)
        assert metrics.home == pytest.approx(np.max(at_home[scaled > 0] / scaled[scaled > 0]) / mean)
        best = optimum(load, chosen, speed).item() / mean
        assert metrics.optimum == pytest.approx(max(best, 1), rel=3e-4)
        whole_tokens = chosen.slots_per_rank / scaled[scaled > 0].min() / mean
        assert metrics.optimum <= metrics.balanced <= max(best, 1.01) + whole_tokens


@pytest.mark.parametrize("dispatch", ["peer", "all_to_all"])
def test_experts_over_two_axes(rng, dispatch):
    """Named in another order than the mesh's."""
    layer = make(placements()["cube"], mesh_of((2, "a"), (4, "b")), axis_name=("b", "a"), dispatch=dispatch)
    check_against_dense(layer, *inputs(rng))


def test_grouped_matmul_of_the_callers_own(rng):
    """It may leave anything beyond the groups' rows, forward and backward."""
    asked = []

    def own(rows, other, group_sizes, numbers):
        asked.append(rows.shape)
        result = jax.lax.ragged_dot_general(rows, other, group_sizes, numbers)
        if not numbers.rhs_group_dimensions:  # a sum over rows
            return result
        return jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes), result, jnp.nan)

    mesh, (x, weight) = mesh_of((RANKS, "ep")), inputs(rng)
    layers = [make(placements()["cube"], mesh, grouped_matmul=choice) for choice in (own, "ragged_dot")]
    got, expected = (value_and_grads(layer, x, weight) for layer in layers)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert asked
    assert all(hash(nnx.graphdef(layer)) for layer in layers)  # nnx.cached_partial and static arguments need it


@pytest.mark.parametrize(("dispatch", "buffer_factor"), [("all_to_all", 0.4), ("dense", 4.0)])
def test_tokens_of_another_dtype(rng, dispatch, buffer_factor):
    """The result has that of the tokens, and is rounded once: bfloat16 from float32 sums."""
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), dispatch=dispatch, buffer_factor=buffer_factor)
    x, weight = (leaf.astype(jnp.bfloat16) for leaf in inputs(rng))
    (result, metrics), grads = value_and_grads(layer, x, weight)
    (expected, _), expected_grads = value_and_grads(layer, *(leaf.astype(jnp.float32) for leaf in (x, weight)))
    assert (int(metrics.rounds) == 1) == (buffer_factor == 4)
    assert result.dtype == jnp.bfloat16
    # Half of the last bit, and errors of float32 in sums of what is below 1.
    half = 2.0 ** (np.frexp(expected)[1] - 9)
    assert np.all(np.abs(np.asarray(result, np.float32) - expected) <= half + 2.0**-22)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert_close(got, want, 2**-7)  # of the input: two parts and their sum are rounded, to 2**-9 each


def test_no_tokens():
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")))
    x = jnp.zeros((0, D_MODEL))
    (result, metrics), grads = value_and_grads(layer, x, x)
    assert result.shape == x.shape
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))
    assert int(metrics.load.sum()) == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in metrics)


@pytest.mark.parametrize(
    ("dispatch", "buffer_factor", "per_batch", "prepared"),
    [("all_to_all", 0.2, False, True), ("peer", 0.2, True, True), ("peer", 4.0, False, False)],
)
def test_data_and_expert_axes(rng, dispatch, buffer_factor, per_batch, prepared):
    """Each row of the mesh balances its own tokens; rows may need different numbers of rounds."""
    place = lplb.Placement.from_topology(topology.ring(4), num_experts=EXPERTS, num_ranks=4, redundants_per_rank=2)
    mesh = mesh_of((2, "data"), (4, "ep"))
    options = {"token_axes": ("data", "ep"), "dispatch": dispatch, "buffer_factor": buffer_factor}
    layer = make(None if per_batch else place, mesh, **options)
    slots = jax.eval_shape(lambda layer: layer.prepare(), layer)
    assert {leaf.shape[0] for leaf in slots.values()} == {RANKS * place.slots_per_rank}
    x, weight = inputs(rng)
    x = x.at[: len(x) // 2].set(x[0])  # all tokens of one row pick the same experts
    metrics = check_against_dense(layer, x, weight, prepared)
    assert int(metrics.load.sum()) == len(x) * TOP_K


@pytest.mark.parametrize("buffer_factor", [0.3, 4.0])
def test_partly_manual_mesh(rng, buffer_factor):
    """Weights cut along another axis too: by XLA, which makes the layer's other axes of it."""
    mesh = mesh_of((4, "ep"), (2, "tp"))
    place = lplb.Placement.from_topology(
        topology.ring(4), num_experts=EXPERTS, num_ranks=4, redundants_per_rank=2, load=rng.lognormal(0, 1, EXPERTS)
    )
    layer = make(place, mesh, buffer_factor=buffer_factor)
    layer.w_in[...] = jax.device_put(layer.w_in[...], jax.NamedSharding(mesh, P("ep", None, "tp")))
    layer.w_out[...] = jax.device_put(layer.w_out[...], jax.NamedSharding(mesh, P("ep", "tp")))
    metrics = check_against_dense(layer, *inputs(rng))
    assert (metrics.rounds > 1) == (buffer_factor < 1)


def test_peer_dispatch_out_of_reach_is_refused():
    """With the reason; and what is named in its stead works."""
    mesh = mesh_of((4, "ep"), (2, "tp"))

    def trace(dispatch):
        layer = make(None, mesh, dispatch=dispatch)
        return jax.eval_shape(lambda x: layer(x)[0], jax.ShapeDtypeStruct((8, D_MODEL), jnp.float32))

    why_not = r"axes \['tp'\] are not manual"
    with pytest.raises(ValueError, match=f"dispatch = 'peer': .*{why_not}.*; pass dispatch='all_to_all', or None"):
        trace("peer")
    for dispatch in ("all_to_all", None):
        assert trace(dispatch).shape == (8, D_MODEL)


def test_sigmoid_router_with_bias_and_prepared_slots(rng):
    place = placements()["eplb"]
    layer = make(place, mesh_of((RANKS, "ep")), router="sigmoid", router_bias=True)
    x, weight = inputs(rng)
    x = jnp.abs(x)  # or all experts would be about as popular
    before = check_against_dense(layer, x, weight, prepared=True, router="sigmoid", bias=layer.bias[...])
    for _ in range(30):
        layer.update_bias(run(layer, x)[1].load, rate=0.02)
    after = check_against_dense(layer, x, weight, prepared=True, router="sigmoid", bias=layer.bias[...])
    assert np.ptp(np.asarray(layer.bias[...])) > 0.1
    assert int(after.load.max()) < 0.8 * int(before.load.max())


def test_aux_loss(rng):
    """One where all is even; its gradient reaches the router."""
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")))
    x, _ = inputs(rng)
    grads = nnx.jit(nnx.grad(lambda layer: layer(x)[1].aux_loss))(layer)
    assert np.any(np.asarray(grads["router"][...]) != 0)
    scores = np.asarray(jax.nn.softmax(x @ layer.router[...]), np.float64)
    ids = np.argsort(-scores, axis=1)[:, :TOP_K]
    share = np.bincount(ids.ravel(), minlength=EXPERTS) / ids.size
    np.testing.assert_allclose(run(layer, x)[1].aux_loss, EXPERTS * np.sum(share * scores.mean(axis=0)), rtol=1e-5)
    layer.router[...] = layer.router[...] * 0
    assert run(layer, x)[1].aux_loss == pytest.approx(1)


def test_remat_gives_the_same_gradients(rng):
    """Of several rounds."""
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), buffer_factor=0.3)
    x, weight = inputs(rng)

    @partial(nnx.jit, static_argnames="remat")
    def grads(layer, x, remat):
        run = nnx.remat(lambda layer, x: layer(x)[0]) if remat else lambda layer, x: layer(x)[0]
        return nnx.grad(lambda layer, x: jnp.sum(run(layer, x) * weight), argnums=(nnx.DiffState(0, nnx.Param), 1))(
            layer, x
        )

    for plain, rematerialised in zip(
        jax.tree.leaves(grads(layer, x, False)), jax.tree.leaves(grads(layer, x, True)), strict=True
    ):
        np.testing.assert_array_equal(plain, rematerialised)


@pytest.mark.smoke
def test_scan_over_layers(rng):
    """Stacked layers, rematerialised, each with a placement of its own, against the dense ones in turn."""
    mesh = mesh_of((RANKS, "ep"))
    loads = rng.lognormal(0, 1, (3, EXPERTS))
    place = partial(
        lplb.Placement.from_topology, topology.cube(), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2
    )
    layers = [make(place(load=load), mesh, seed) for seed, load in enumerate(loads)]
    graph, *states = [*nnx.split(layers[0])[:1], *(nnx.split(layer)[1] for layer in layers)]
    stacked = nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    x, _ = inputs(rng)

    @nnx.jit
    def through(stacked, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
        @nnx.remat
        def step(layer, x):
            result, metrics = layer(x)
            return x + result, metrics

        return step(stacked, x)

    result, metrics = through(stacked, x)
    expected = x
    for layer in layers:
        expected = expected + dense(logical(params_of(layer), layer.placement.get_value()), expected)
    assert_close(result, expected)
    assert metrics.load.shape == (3, EXPERTS)


def test_bfloat16_is_as_close_as_without_balancing(rng):
    mesh = mesh_of((RANKS, "ep"))
    x, weight = inputs(rng)
    errors = {}
    for name in ("none", "cube"):
        layer = make(placements()[name], mesh, dtype=jnp.bfloat16)
        (result, _), (grads, _) = value_and_grads(layer, x, weight)
        params = logical(params_of(layer), layer.placement.get_value())
        expected = jax.jit(dense)(params, x)
        wanted = jax.jit(jax.grad(lambda params: jnp.sum(dense(params, x) * weight)))(params)
        got = logical({key: grads[key][...] for key in params}, layer.placement.get_value())
        errors[name] = [np.max(np.abs(result - expected)) / np.max(np.abs(expected))] + [
            np.max(np.abs(got[key] - wanted[key])) / np.max(np.abs(wanted[key])) for key in params
        ]
    assert np.all(np.array(errors["cube"]) <= 1.5 * np.array(errors["none"]) + 1e-3)
    assert np.max(errors["none"]) < 0.05


def test_training_takes_the_same_course(rng):
    """100 steps of SGD from one seed, balanced and not: losses, and gradients of what both have."""
    mesh = mesh_of((4, "ep"))
    load = rng.lognormal(0, 1.5, EXPERTS)
    place = partial(lplb.Placement.from_topology, topology.ring(4), num_experts=EXPERTS, num_ranks=4)
    none = place(redundants_per_rank=0)
    layers = {"none": make(none, mesh), "ring": make(place(redundants_per_rank=2, load=load), mesh)}
    target = jax.jit(dense)(logical(params_of(make(none, mesh, seed=7)), none), jnp.eye(D_MODEL))

    @nnx.jit
    def step(layer, x):
        def loss(layer):
            return jnp.mean((layer(x)[0] - x @ target) ** 2)

        value, grads = nnx.value_and_grad(loss)(layer)
        params = nnx.state(layer, nnx.Param)
        nnx.update(layer, jax.tree.map(lambda param, grad: param - 0.5 * grad, params, grads))
        return value, grads

    losses = {name: [] for name in layers}
    for number in range(101):
        x, _ = inputs(rng)
        grads = {}
        for name, layer in layers.items():
            value, grads[name] = step(layer, x)
            losses[name].append(float(value))
        if number % 50 == 0:
            ring, none = (
                logical({key: leaf[...] for key, leaf in grads[name].items()}, layers[name].placement.get_value())
                for name in ("ring", "none")
            )
            for key, value in none.items():
                assert_close(ring[key], value, 1e-3)
    np.testing.assert_allclose(losses["ring"], losses["none"], rtol=1e-3)
    assert losses["none"][-1] < 0.7 * losses["none"][0]


def test_new_placements_do_not_recompile(rng):
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")))
    x, _ = inputs(rng)
    graph = nnx.graphdef(layer)
    step = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    for _ in range(3):
        new = layer.placement.get_value().select(rng.lognormal(0, 1, EXPERTS).astype(np.float32))
        layer.placement.set_value(jax.tree.map(np.asarray, new))
        result, _ = step(nnx.state(layer), x)
        assert_close(result, dense(logical(params_of(layer), new), x))
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"top_k": 17}, ValueError, "top_k must be at most the 16 experts that a token can reach, got 17"),
        ({"top_k": 4.0}, TypeError, "top_k must be an integer, got 4.0"),
        ({"d_model": 8.0}, TypeError, "d_model must be an integer, got 8.0"),
        ({"d_expert": 0}, ValueError, "d_expert must be at least 1, got 0"),
        ({"num_experts": 32}, ValueError, "placement is one of 16 experts, but num_experts = 32"),
        ({"placement": 2}, TypeError, r"placement must be a jax_lplb\.Placement, got int"),
        ({"redundants_per_rank": 2}, ValueError, "redundants_per_rank = 2 is for a layer without .* leave out one of"),
        ({"mesh": None}, TypeError, r"mesh must be a jax\.sharding\.Mesh, .*, got NoneType"),
        ({"axis_name": ["ep"]}, TypeError, r"axis_name must be the name of an axis .*, got \['ep'\]"),
        ({"axis_name": "expert"}, ValueError, r"axis_name must name axes of the mesh, which are \('ep',\), .*'expert'"),
        ({"token_axes": ("data",)}, ValueError, r"token_axes must name axes of the mesh, .* got \('data',\)"),
        ({"router": "linear"}, ValueError, "router must be one of .*, got 'linear'"),
        ({"norm_topk_prob": 2}, ValueError, "norm_topk_prob must be one of .*, got 2"),
        ({"routed_scaling_factor": "1"}, TypeError, "routed_scaling_factor must be a number, got '1'"),
        ({"n_group": 3}, ValueError, "n_group must divide num_experts = 16, got 3"),
        ({"n_group": 4, "topk_group": 5}, ValueError, "topk_group must be at most n_group = 4, got 5"),
        (
            {"n_group": 16, "topk_group": 1},
            ValueError,
            "top_k must be at most the 1 experts that a .* got 2",
        ),
        ({"n_shared_experts": -1}, ValueError, "n_shared_experts must be at least 0, got -1"),
        ({"dispatch": "mail"}, ValueError, "dispatch must be one of .*, got 'mail'"),
        ({"transport": "mail"}, ValueError, "transport must be one of .*, got 'mail'"),
        ({"grouped_matmul": "loop"}, ValueError, "grouped_matmul must be one of .*, got 'loop'"),
        ({"buffer_factor": 0.0}, ValueError, "buffer_factor must be positive and finite, got 0.0"),
        (
            {"balance_options": {"solve": "ipm"}},
            ValueError,
            "balance_options: 'solve' is none of the options .*'solver'",
        ),
        ({"balance_options": {"solver": "best"}}, ValueError, "solver must be .*, got 'best'"),
        ({"balance_options": {"tol": "fine"}}, TypeError, "tol must be a Python float, got 'fine'"),
        ({"balance_options": "ipm"}, TypeError, "balance_options must be a mapping of names to values, got 'ipm'"),
        ({"dtype": jnp.int8}, TypeError, "dtype must be a floating-point dtype, got .*int8"),
        ({"rngs": 0}, TypeError, r"rngs must be flax\.nnx\.Rngs, .*, got int"),
    ],
)
def test_refuses(changed, error, message):
    arguments = {"d_model": 8, "num_experts": EXPERTS, "d_expert": 8, "top_k": 2, "placement": placements()["cube"]}
    arguments |= {"mesh": mesh_of((8, "ep")), "axis_name": "ep", "rngs": nnx.Rngs(0)}
    with pytest.raises(error, match=message):
        MoE(**(arguments | changed))


@pytest.mark.parametrize(
    ("axes", "num_experts", "asked", "redundants"),
    [
        ([(8, "ep")], 16, None, 2),
        ([(8, "ep")], 16, 14, 14),
        ([(8, "ep")], 16, 0, 0),
        ([(4, "data"), (2, "ep")], 2, None, 1),  # of the other rank's only expert
        ([(8, "data"), (1, "ep")], 16, None, 0),
    ],
)
def test_slots_for_copies_without_a_placement(axes, num_experts, asked, redundants):
    """Two on each rank of the experts' axis, as far as there are experts to copy, or as many as are asked for."""
    mesh = mesh_of(*axes)
    layer = MoE(8, num_experts, 8, 2, redundants_per_rank=asked, mesh=mesh, axis_name="ep", rngs=nnx.Rngs(0))
    assert layer.placement.get_value() == lplb.Placement.per_batch(
        num_experts=num_experts, num_ranks=mesh.shape["ep"], redundants_per_rank=redundants
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"redundants_per_rank": 15}, ValueError, "redundants_per_rank = 15 gives .* experts of its group: at most 14"),
        ({"redundants_per_rank": 1.5}, TypeError, "redundants_per_rank must be an integer, got 1.5"),
        ({"balance_options": {"solver": "edge_balance"}}, ValueError, "edge_balance"),
    ],
)
def test_refuses_without_a_placement(changed, error, message):
    arguments = {"d_model": 8, "num_experts": EXPERTS, "d_expert": 8, "top_k": 2, "rngs": nnx.Rngs(0)}
    with pytest.raises(error, match=message):
        MoE(**(arguments | changed), mesh=mesh_of((8, "ep")), axis_name="ep")


def test_refuses_a_placement_of_other_ranks():
    with pytest.raises(ValueError, match="placement is one of 8 ranks, but axis_name = 'ep' spans 4 devices"):
        make(placements()["cube"], mesh_of((4, "ep")))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((16, D_MODEL), np.int32), TypeError, "x must be a floating-point array, got int32"),
        ([[0.0] * D_MODEL], TypeError, "x must be a floating-point array, got list"),
        (np.zeros((16, 8), np.float32), ValueError, r"x must have shape .* = \[\.\.\., 12\], got \(16, 8\)"),
        (np.zeros(D_MODEL, np.float32), ValueError, r"x must have shape .*, got \(12,\)"),
    ],
)
def test_refuses_inputs(x, error, message):
    layer = make(placements()["cube"], mesh_of((8, "ep")))
    with pytest.raises(error, match=message):
        layer(x)


def test_refuses_slots():
    layer = make(placements()["cube"], mesh_of((8, "ep")))
    x = np.zeros((16, D_MODEL), np.float32)
    with pytest.raises(ValueError, match=r"slots must be what prepare\(\) returns, of shapes .*32.*, got .*16"):
        layer(x, layer._home_weights())
    with pytest.raises(
        ValueError, match=r"return_slots = True: there are no slots to return; give those of prepare\(\)"
    ):
        layer(x, return_slots=True)
    with pytest.raises(ValueError, match="dispatch = 'dense' uses no copies; leave slots out"):
        make(placements()["cube"], mesh_of((8, "ep")), dispatch="dense")(x, {})


def test_refuses_speeds():
    layer, x = make(placements()["cube"], mesh_of((8, "ep"))), np.zeros((16, D_MODEL), np.float32)
    with pytest.raises(ValueError, match=r"rank_speed must have shape \[num_ranks\] = \[8\], got shape \(4,\)"):
        layer(x, rank_speed=np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"rank_speed must be finite and not negative, got -1\.0 for rank 0"):
        layer(x, rank_speed=-np.ones(8, np.float32))


def test_update_bias_needs_one():
    with pytest.raises(ValueError, match="update_bias needs a layer made with router_bias=True"):
        make(placements()["none"], mesh_of((8, "ep"))).update_bias(jnp.ones(EXPERTS))
    layer = make(placements()["none"], mesh_of((8, "ep")), router_bias=True)
    with pytest.raises(ValueError, match=r"load must have the shape of the bias, \(16,\), got \(8,\)"):
        layer.update_bias(jnp.ones(8))


# ---- Routers and shared experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_a_single_expert_a_token(rng, router):
    """By default its gate is its score, so that the router learns."""
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), top_k=1, router=router)
    x, weight = inputs(rng)
    check_against_dense(layer, x, weight, router=router, top_k=1, norm_topk_prob=False)
    (_, _), (grads, _) = value_and_grads(layer, x, weight)
    assert np.any(grads["router"][...])


def test_shared_experts_and_scaled_gates(rng):
    """Beside the routed ones, on a mesh with a data axis; in several rounds."""
    place = lplb.Placement.from_topology(topology.ring(4), num_experts=EXPERTS, num_ranks=4, redundants_per_rank=2)
    layer = make(
        place,
        mesh_of((2, "data"), (4, "ep")),
        token_axes=("data", "ep"),
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=False,
        buffer_factor=0.4,
    )
    assert layer.shared_in.shape == (D_MODEL, 4 * D_EXPERT)
    check_against_dense(layer, *inputs(rng), norm_topk_prob=False, routed_scaling_factor=2.5)


def test_experts_of_the_best_groups(rng):
    """Group-limited routing picks no expert of other groups; with all groups it picks as without any."""
    limited, whole, plain = (
        make(placements()["cube"], mesh_of((RANKS, "ep")), router="sigmoid", n_group=4, topk_group=groups)
        if groups
        else make(placements()["cube"], mesh_of((RANKS, "ep")), router="sigmoid")
        for groups in (1, 4, 0)
    )
    x, _ = inputs(rng, 64)
    np.testing.assert_array_equal(run(whole, x)[0], run(plain, x)[0])
    one = run(limited, x[:1])[1].load.reshape(4, -1).sum(axis=1)  # all of one token's experts are of one group
    assert sorted(np.asarray(one)) == [0, 0, 0, TOP_K]


@pytest.mark.parametrize(("router", "dtype"), [("softmax", jnp.bfloat16), ("sigmoid", jnp.float32)])
def test_scores_that_underflow(rng, router, dtype):
    """Logits of -100 and less: results, aux_loss and gradients are finite, and a NaN stays in its token."""
    # By "peer" a token's sum is one of ranks' sums, whose bits may differ where the balance is another.
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), router=router, dispatch="all_to_all")
    layer.router[...] = jnp.full((D_MODEL, EXPERTS), -10.0) + 0.1 * layer.router[...]
    x = jnp.asarray(rng.uniform(0.5, 1.5, (64, D_MODEL)), dtype)

    def loss(layer, x):
        result, metrics = layer(x)
        return jnp.sum(result.astype(jnp.float32)) + metrics.aux_loss, (result, metrics)

    both = nnx.jit(nnx.value_and_grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1), has_aux=True))
    (value, (result, _)), grads = both(layer, x)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(grads))
    assert np.any(result)
    (_, (of_wrong, _)), _ = both(layer, x.at[5, 0].set(jnp.nan))
    np.testing.assert_array_equal(np.delete(of_wrong, 5, axis=0), np.delete(result, 5, axis=0))


# ---- Batches, meshes and stacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dispatch"), [((12, D_MODEL), "peer"), ((3, 5, D_MODEL), "peer"), ((3, 5, D_MODEL), "dense")]
)
def test_uneven_batches(rng, shape, dispatch):
    """Padded within: results and gradients are the dense layer's, and padding counts as no tokens."""
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), dispatch=dispatch)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    (result, metrics), (grads, x_grad) = value_and_grads(layer, x, weight)
    params = logical(params_of(layer), layer.placement.get_value())
    flat, flat_weight = x.reshape(-1, D_MODEL), weight.reshape(-1, D_MODEL)
    reference = jax.value_and_grad(lambda params, x: jnp.sum(dense(params, x) * flat_weight), argnums=(0, 1))
    _, (expected, expected_x) = jax.jit(reference)(params, flat)
    assert_close(result, dense(params, flat).reshape(shape))
    assert_close(x_grad, expected_x.reshape(shape))
    for name, value in logical(arrays_of(grads), layer.placement.get_value()).items():
        assert_close(value, expected[name])
    assert int(metrics.load.sum()) == len(flat) * TOP_K
    even = run(make(placements()["cube"], mesh_of((RANKS, "ep"))), jnp.concatenate([flat] * RANKS))[1]
    np.testing.assert_allclose(metrics.aux_loss, even.aux_loss, rtol=1e-5)


def test_one_sequence_is_shared_out(rng):
    """Of fewer sequences than devices each device has as many tokens, and not one of them all."""
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), buffer_factor=1.0)
    x = jnp.asarray(rng.normal(size=(1, 64, D_MODEL)), jnp.float32)
    program = jax.jit(lambda x: layer(x)[0]).trace(x).jaxpr.pretty_print(use_color=False)
    assert f"f32[{64 // RANKS},{D_MODEL}]" in program  # a rank's tokens
    assert f"f32[64,{EXPERTS}]" not in program  # nobody's logits
    assert_close(run(layer, x)[0], dense(logical(params_of(layer), placements()["cube"]), x[0])[None])


@pytest.mark.parametrize("token_axes", [("data", "ep"), ("ep", "data")])
def test_aux_loss_of_uneven_batches_on_a_data_axis(rng, token_axes):
    """Each token counts as much, in whichever row of the mesh it is; rows may be all padding."""
    place = lplb.Placement.from_topology(topology.ring(4), num_experts=EXPERTS, num_ranks=4, redundants_per_rank=2)
    layer = make(place, mesh_of((2, "data"), (4, "ep")), token_axes=token_axes)
    for tokens in (3, 12):
        x, _ = inputs(rng, tokens)
        scores = np.asarray(jax.nn.softmax(x @ layer.router[...]), np.float64)
        share = np.bincount(np.argsort(-scores, axis=1)[:, :TOP_K].ravel(), minlength=EXPERTS) / (tokens * TOP_K)
        expected = EXPERTS * np.sum(share * scores.mean(axis=0))
        np.testing.assert_allclose(run(layer, x)[1].aux_loss, expected, rtol=1e-5)


EXPLICIT, AUTO = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto


@pytest.mark.parametrize(
    ("axes", "token_axes", "cut", "in_context"),
    [
        ([("ep", 8, EXPLICIT)], ("ep",), P("ep"), False),
        ([("data", 2, EXPLICIT), ("ep", 4, EXPLICIT)], ("data", "ep"), P("ep", "data"), True),  # FSDP
        ([("ep", 4, EXPLICIT), ("tp", 2, EXPLICIT)], ("ep",), P("ep", None, "tp"), True),
        ([("ep", 4, EXPLICIT), ("tp", 2, AUTO)], ("ep",), P("ep"), False),
        ([("data", 2, AUTO), ("ep", 4, EXPLICIT)], ("data", "ep"), P("ep"), False),
    ],
)
def test_explicit_axes(rng, axes, token_axes, cut, in_context):
    """As `jax.make_mesh` makes them, some or all of the axes: results and gradients, sharded as what they are of."""
    names, sizes, kinds = zip(*axes, strict=True)
    ranks = dict(zip(names, sizes, strict=True))["ep"]
    place = lplb.Placement.from_topology(
        topology.ring(ranks), num_experts=EXPERTS, num_ranks=ranks, redundants_per_rank=2
    )
    mesh = jax.make_mesh(sizes, names, axis_types=kinds)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        layer = make(place, mesh, token_axes=token_axes)
        layer.w_in.set_value(jax.device_put(layer.w_in[...], jax.NamedSharding(mesh, cut)))
        x, weight = jax.device_put(inputs(rng, 64), jax.NamedSharding(mesh, P(token_axes)))
        (result, _), (grads, x_grad) = value_and_grads(layer, x, weight, prepared=in_context)
    host = jax.tree.map(np.asarray, (params_of(layer), x, weight))  # sharded over nothing
    reference = jax.value_and_grad(lambda params, x: jnp.sum(dense(params, x) * host[2]), argnums=(0, 1))
    _, (expected, expected_x) = jax.jit(reference)(*host[:2])
    assert_close(result, dense(*host[:2]))
    assert_close(x_grad, expected_x)
    for name, value in expected.items():
        assert_close(grads[name][...], value)
    if AUTO not in kinds:
        for got, want in ((result, x), (grads["w_in"][...], layer.w_in[...])):
            assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


@pytest.mark.parametrize("kinds", [(AUTO, AUTO), (EXPLICIT, EXPLICIT), (EXPLICIT, AUTO), (AUTO, EXPLICIT)])
@pytest.mark.parametrize("axes", ["ep", ("ep", "tp")])
def test_weights_in_logical_order(rng, axes, kinds):
    """Of a checkpoint: the layer puts them where its placement has the experts."""
    mesh = jax.make_mesh((4, 2), ("ep", "tp"), axis_types=kinds)
    load, ranks = rng.lognormal(0, 1, EXPERTS), 4 if axes == "ep" else RANKS
    place = lplb.Placement.from_topology(
        topology.ring(ranks), num_experts=EXPERTS, num_ranks=ranks, redundants_per_rank=2, load=load
    )
    layer, before = make(place, mesh, axis_name=axes), make(place, mesh, axis_name=axes)
    shapes = {"w_in": (EXPERTS, D_MODEL, 2 * D_EXPERT), "w_out": (EXPERTS, D_EXPERT, D_MODEL)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    layer.set_experts(**weights)
    for name, rows in weights.items():
        np.testing.assert_array_equal(lplb.to_logical(getattr(layer, name)[...], place), rows)
        for leaf in (getattr(layer, name), getattr(before, name)):
            assert leaf.sharding.shard_shape(leaf.shape) == (EXPERTS // ranks, *leaf.shape[1:])
    with pytest.raises(ValueError, match=r"w_out must have shape \(16, 20, 12\), in logical order, got \(16, 12, 20\)"):
        layer.set_experts(weights["w_in"], weights["w_out"].swapaxes(1, 2))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize(
    ("how", "layers"),
    [
        ("constructor", 0),
        ("nnx.jit", 0),
        ("nnx.vmap", 3),
        ("nnx.vmap", RANKS),
        ("nnx.scan", RANKS),
        ("nnx.jit of nnx.vmap", RANKS),
    ],
)
def test_experts_are_sharded_however_layers_are_made(how, layers, kind):
    """Behind the layer axis, if there is one."""
    mesh, place = jax.make_mesh((RANKS,), ("ep",), axis_types=(kind,)), placements()["rings by load"]

    def one(rngs: nnx.Rngs) -> MoE:
        return MoE(
            D_MODEL, EXPERTS, D_EXPERT, TOP_K, placement=place, mesh=mesh, axis_name="ep", router_bias=True, rngs=rngs
        )

    each = nnx.split_rngs(splits=layers)
    create = {
        "constructor": lambda: one,
        "nnx.jit": lambda: nnx.jit(one),
        "nnx.vmap": lambda: each(nnx.vmap(one)),
        "nnx.scan": lambda: each(nnx.scan(one, in_axes=0, out_axes=0)),
        "nnx.jit of nnx.vmap": lambda: nnx.jit(each(nnx.vmap(one))),
    }[how]()
    stacked = (layers,) if layers else ()
    layer = create(nnx.Rngs(0))
    for leaf, shape in ((layer.w_in, (D_MODEL, 2 * D_EXPERT)), (layer.w_out, (D_EXPERT, D_MODEL))):
        assert leaf.shape == (*stacked, EXPERTS, *shape)
        assert leaf.sharding.shard_shape(leaf.shape) == (*stacked, EXPERTS // RANKS, *shape)
    for leaf in (layer.router, layer.placement.get_value().phy2log):
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(mesh.devices.flat)


def test_each_device_draws_its_own_experts():
    """Under jit: not even one device holds all of the weights while they are drawn."""
    mesh = mesh_of((RANKS, "ep"))

    def parameters():
        return nnx.state(MoE(128, 64, 128, 2, mesh=mesh, axis_name="ep", rngs=nnx.Rngs(0)), nnx.Param)

    memory = jax.jit(parameters).lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 128 * 2 * 128 * 4


def test_a_stack_runs_as_its_layers(rng):
    """Made by nnx.vmap, run by nnx.scan and nnx.vmap, on a mesh of default axes: against the dense layers."""
    mesh, place = jax.make_mesh((RANKS,), ("ep",)), placements()["rings by load"]

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return make(place, mesh, rngs=rngs)

    layers = stack(nnx.Rngs(0))
    x, _ = inputs(rng, 64)
    with pytest.raises(ValueError, match="the layer is a stack of layers"):
        layers(x)

    @nnx.jit
    def through(layers, x):
        return nnx.scan(lambda layer, x: x + layer(x)[0], in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layers, x)

    side_by_side = nnx.jit(nnx.vmap(lambda layer, x: layer(x)[0], in_axes=(0, None)))(layers, x)
    expected = x
    for number in range(3):
        params = jax.tree.map(lambda leaf, number=number: jnp.asarray(np.asarray(leaf)[number]), params_of(layers))
        assert_close(side_by_side[number], dense(logical(params, place), x))
        expected = expected + dense(logical(params, place), expected)
    assert_close(through(layers, x), expected)


def test_layers_of_one_placement_are_donated_together(rng):
    """Each has arrays of its own, from the start and after a new placement."""
    mesh, place = mesh_of((RANKS, "ep")), placements()["cube"]
    on_device = jax.device_put(place, jax.NamedSharding(mesh, P()))
    layers = nnx.List([make(on_device, mesh, seed) for seed in range(2)])
    step = nnx.jit(lambda layers, x: layers[1](layers[0](x)[0])[0], donate_argnums=0)
    x, _ = inputs(rng, 64)
    first = step(layers, x)
    for layer in layers:
        layer.placement.set_value(on_device)
    np.testing.assert_array_equal(step(layers, x), first)
    np.testing.assert_array_equal(on_device.phy2log, place.phy2log)  # and the caller's are not donated


# ---- Derivatives beyond the first ------------------------------------------------------------------------------------


def test_derivatives_of_any_order_by_the_dense_dispatch(rng):
    """Hessian-vector products, forward over reverse and reverse over reverse, and a gradient penalty."""
    layer = make(placements()["rings by load"], mesh_of((RANKS, "ep")), dispatch="dense")
    x, weight = inputs(rng, 32)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    place = layer.placement.get_value()

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params, rest)(x)[0] * weight)

    def reference(params, x):
        return jnp.sum(dense(logical(arrays_of(params), place), x) * weight)

    def derivatives(loss):
        def penalty(params):
            return jnp.sum(jax.grad(loss, argnums=1)(params, x) ** 2)

        def forward(x):
            return jax.jvp(jax.grad(loss, argnums=1), (params, x), (params, weight))[1]

        def backward(x):
            return jax.grad(lambda x: jnp.sum(jax.grad(loss, argnums=1)(params, x) * weight))(x)

        return jax.jit(lambda: (forward(x), backward(x), jax.grad(penalty)(params)))()

    for got, want in zip(*(jax.tree.leaves(derivatives(one)) for one in (loss, reference)), strict=True):
        assert_close(got, want, 1e-4)
    check_against_dense(layer, x, weight)
    narrow = [leaf.astype(jnp.bfloat16) for leaf in (x, weight)]
    tangent = jax.jit(lambda x, tangent: jax.jvp(lambda x: layer(x)[0], (x,), (tangent,))[1])
    assert_close(tangent(*narrow), tangent(*(leaf.astype(jnp.float32) for leaf in narrow)), 2**-7)


def test_experts_that_no_token_picked_do_not_show(rng):
    """Though what they would make of it is no number."""
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), dispatch="dense")
    x, weight = inputs(rng, 8)
    (expected, metrics), expected_grads = value_and_grads(layer, x, weight)
    unused = np.flatnonzero(np.asarray(metrics.load) == 0)[0]
    layer.w_out[...] = layer.w_out[...].at[unused].set(jnp.inf)
    (result, _), grads = value_and_grads(layer, x, weight)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(grads[1], expected_grads[1])


@pytest.mark.parametrize("dispatch", ["peer", "all_to_all"])
def test_batches_of_inputs(rng, dispatch):
    """By jax.vmap, of gradients too, and by jax.jacrev: in one round and in several."""
    place = placements()["cube"]
    layer = make(place, mesh_of((RANKS, "ep")), dispatch=dispatch, buffer_factor=0.6)
    params, x = logical(params_of(layer), place), jnp.asarray(rng.normal(size=(2, 32, D_MODEL)), jnp.float32)

    def derivatives(run):
        each = jax.vmap(jax.value_and_grad(lambda x: jnp.sum(run(x) ** 2)))(x)
        return *each, jax.jacrev(lambda x: run(x)[:2, 0])(x[0])

    got = jax.jit(lambda: derivatives(lambda x: layer(x)[0]))()
    for one, other in zip(got, jax.jit(lambda: derivatives(partial(dense, params)))(), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dispatch", ["peer", "all_to_all"])
def test_64_bit_types_enabled(rng, dispatch):
    """What the layer counts stays int32."""
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), dispatch=dispatch, buffer_factor=0.6)
    x, weight = inputs(rng, 64)
    expected = dense(logical(params_of(layer), layer.placement.get_value()), x)
    with jax.enable_x64(True):
        (result, metrics), _ = value_and_grads(layer, x, weight)
    assert_close(result, expected)
    assert metrics.rounds.dtype == metrics.load.dtype == jnp.int32


def test_other_dispatches_refuse_derivatives_that_they_lack(rng):
    """In a sentence that says what to do, eager and under jit."""
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), dispatch="peer")
    x, weight = inputs(rng, 64)
    result = jax.jit(lambda x: layer(x)[0])

    def loss(x):
        return jnp.sum(layer(x)[0] * weight)

    for derivative in (
        lambda: jax.jvp(result, (x,), (x,)),
        lambda: jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2)))(x),
        lambda: jax.jit(jax.hessian(loss))(x),
    ):
        with pytest.raises(NotImplementedError, match=r"dispatch = 'peer' can be .*make it with dispatch='dense'"):
            derivative()


# ---- Metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["repeats", "rings by load", "eplb"])
def test_imbalances(rng, name):
    """Without a placement, without copies, and the bound, which no split in whole tokens goes below."""
    place = placements()[name]
    layer = make(place, mesh_of((RANKS, "ep")))
    for tokens in (8, 512):
        for _ in range(10):
            x, _ = inputs(rng, tokens)
            metrics = run(layer, x)[1]
            load, mean = np.asarray(metrics.load, np.int64), tokens * TOP_K / RANKS
            home = np.bincount(place.home_order.argsort() // (EXPERTS // RANKS), load, minlength=RANKS)
            np.testing.assert_allclose(metrics.contiguous, load.reshape(RANKS, -1).sum(axis=1).max() / mean, rtol=1e-6)
            np.testing.assert_allclose(metrics.home, home.max() / mean, rtol=1e-6)
            best = optimum(load, place).max() / mean
            assert best * (1 - 2e-4) <= metrics.optimum <= best
            assert metrics.optimum <= metrics.balanced
