"""The Flax layer against a dense one on a single device: results and gradients, whatever happens on the way."""

import subprocess
import sys
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import topology
from hypothesis.extra.numpy import arrays

import jax_lplb as lplb
from jax_lplb import _expert_parallel
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
        "eplb": lplb.Placement.from_eplb(load, num_ranks=RANKS, redundants_per_rank=2),
    }


def make(placement: lplb.Placement, mesh: jax.sharding.Mesh, seed: int = 0, **options) -> MoE:
    options = {"axis_name": "ep", "dtype": jnp.float32} | options
    layer = MoE(D_MODEL, EXPERTS, D_EXPERT, TOP_K, placement=placement, mesh=mesh, rngs=nnx.Rngs(seed), **options)
    layer.router[...] = layer.router[...] * 4  # an uneven router
    return layer


def mesh_of(*sizes_and_names) -> jax.sharding.Mesh:
    sizes, names = zip(*sizes_and_names, strict=True)
    return jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def dense(params: dict, x: jax.Array, *, router: str = "softmax", bias: jax.Array | None = None) -> jax.Array:
    """Every expert on every token, in logical order."""
    logits = x @ params["router"]
    scores = jax.nn.softmax(logits) if router == "softmax" else jax.nn.sigmoid(logits)
    _, ids = jax.lax.top_k(scores if bias is None else scores + bias[None, :], TOP_K)
    gates = jnp.take_along_axis(scores, ids, axis=-1)
    gates = gates / gates.sum(axis=-1, keepdims=True)
    hidden = jnp.einsum("td,edh->teh", x, params["w_in"])
    gate, up = jnp.split(hidden, 2, axis=-1)
    out = jnp.einsum("teh,ehd->ted", jax.nn.silu(gate) * up, params["w_out"])
    return jnp.einsum("tk,tkd->td", gates, jnp.take_along_axis(out, ids[..., None], axis=1))


def logical(state: dict, placement: lplb.Placement) -> dict:
    """Parameters or gradients of a layer, with experts in logical order."""
    moved = lplb.to_logical({name: state[name] for name in ("w_in", "w_out")}, placement)
    return {"router": jnp.asarray(state["router"]), **moved}


def params_of(layer: MoE) -> dict:
    return {"router": layer.router[...], "w_in": layer.w_in[...], "w_out": layer.w_out[...]}


@nnx.jit
def run(layer: MoE, x: jax.Array):
    return layer(x)


@partial(nnx.jit, static_argnames="prepared")
def value_and_grads(layer: MoE, x: jax.Array, weight: jax.Array, prepared: bool = False):
    """Result, metrics, and the gradients of a weighted sum by parameters and input."""

    def loss(layer, x):
        result, metrics = layer(x, layer.prepare() if prepared else None)
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


def check_against_dense(layer: MoE, x, weight, prepared: bool = False, **options) -> lplb.flax.Metrics:
    (result, metrics), (grads, x_grad) = value_and_grads(layer, x, weight, prepared)
    place = layer.placement.get_value()

    def reference_loss(params, x):
        result = dense(params, x, **options)
        return jnp.sum(result * weight), result

    reference = jax.jit(jax.value_and_grad(reference_loss, argnums=(0, 1), has_aux=True))
    (_, expected), (expected_grads, expected_x) = reference(logical(params_of(layer), place), x)
    assert_close(result, expected)
    assert_close(x_grad, expected_x)
    got = logical({name: grads[name][...] for name in ("router", "w_in", "w_out")}, place)
    for name, value in expected_grads.items():
        assert_close(got[name], value)
    return metrics


@pytest.mark.parametrize("buffer_factor", [0.2, 8.0])
@pytest.mark.parametrize("dispatch", ["all_to_all", "ring"])
def test_padding(rng, dispatch, buffer_factor):
    """Negative ids are nobody's: anywhere, and all that a rank has."""
    place, mesh = placements()["cube"], mesh_of((RANKS, "ep"))
    tokens = rng.normal(size=(RANKS * TOKENS, D_MODEL)).astype(np.float32)
    gates = rng.uniform(size=(RANKS * TOKENS, TOP_K)).astype(np.float32)
    ids = rng.integers(-place.num_physical // 4, place.num_physical, (RANKS * TOKENS, TOP_K)).astype(np.int32)
    ids[:TOKENS] = -1
    weights = rng.normal(size=(place.num_physical, D_MODEL, D_MODEL)).astype(np.float32)

    def on_rank(tokens, ids, gates, weights):
        return _expert_parallel.expert_parallel(
            tokens,
            ids,
            gates,
            weights,
            _expert_parallel.as_they_are,
            lambda slots, rows, sizes: jax.lax.ragged_dot(rows, slots, sizes),
            place,
            axis_name="ep",
            dispatch=dispatch,
            buffer_factor=buffer_factor,
            dtype=np.float32,
        )

    run = jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=P("ep"), out_specs=(P("ep"), P())))
    result, rounds = run(tokens, ids, gates, weights)
    assert (rounds > 1) == (buffer_factor < 1)
    shares = np.einsum("td,tkde->tke", tokens, weights[ids]) * (gates * (ids >= 0))[:, :, None]
    np.testing.assert_allclose(result, shares.sum(axis=1), rtol=1e-5, atol=1e-5)


by_slot = jax.jit(_expert_parallel._by_slot, static_argnums=2)


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


SIGTERM = """
import os, signal
from jax_lplb import _grouped_matmul
signal.signal(signal.SIGTERM, lambda *_: print("the program's own handler"))
for name in ("ragged_dot_mgpu", "transposed_ragged_dot_mgpu"):
    _grouped_matmul._kernels(name)
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_kernels_leave_sigterm_to_the_program():
    """JAX's handler, which the import would install, prints a stack and aborts the program seconds later."""
    ended = subprocess.run([sys.executable, "-c", SIGTERM], capture_output=True, text=True, check=True)
    assert ended.stdout == "the program's own handler\n"
    assert "SIGTERM received" not in ended.stderr


@pytest.mark.parametrize("dispatch", ["all_to_all", "ring"])
@pytest.mark.parametrize(
    ("name", "buffer_factor"), [("none", 8.0), ("cube", 8.0), ("rings by load", 0.2), ("eplb", 0.2)]
)
def test_equals_dense(rng, name, dispatch, buffer_factor):
    """With room for all, and far too little: several rounds."""
    place = placements()[name]
    layer = make(place, mesh_of((RANKS, "ep")), dispatch=dispatch, buffer_factor=buffer_factor)
    x, weight = inputs(rng)
    metrics = check_against_dense(layer, x, weight)
    rounds = int(metrics.rounds)
    assert rounds == 1 if buffer_factor == 8 else rounds >= 5
    assert int(metrics.load.sum()) == x.shape[0] * TOP_K
    assert metrics.optimum <= metrics.balanced + 1e-6
    if name == "none":
        assert metrics.balanced == metrics.home
        assert metrics.moved == 0
    else:
        assert metrics.balanced < metrics.home
        assert metrics.moved > 0


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_factor", [8.0, 0.2])
@pytest.mark.parametrize("dispatch", ["all_to_all", "ring"])
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
def test_tokamax_equals_ragged_dot_on_gpus(rng, d_expert, buffer_factor):
    """In bfloat16, with room to spare and in several rounds; one width is a multiple of the kernels' tiles."""
    devices = jax.devices("gpu")
    load = rng.lognormal(0, 1, EXPERTS)
    place = lplb.Placement.from_eplb(load, num_ranks=len(devices), redundants_per_rank=0)
    mesh = jax.sharding.Mesh(devices, ("ep",))
    x, weight = (jnp.asarray(rng.normal(size=(256 * len(devices), 256)), jnp.bfloat16) for _ in range(2))
    got = {}
    for name in ("tokamax", "ragged_dot"):
        options = {"placement": place, "mesh": mesh, "axis_name": "ep", "rngs": nnx.Rngs(0)}
        layer = MoE(256, EXPERTS, d_expert, TOP_K, buffer_factor=buffer_factor, grouped_matmul=name, **options)
        (result, metrics), grads = value_and_grads(layer, x, weight)
        assert (int(metrics.rounds) == 1) == (buffer_factor == 4 or len(devices) == 1)
        got[name] = [result, *jax.tree.leaves(grads)]
    for actual, expected in zip(got["tokamax"], got["ragged_dot"], strict=True):
        assert_close(actual, expected, 1e-2)


@pytest.mark.parametrize("dispatch", ["all_to_all", "ring"])
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


@pytest.mark.parametrize("buffer_factor", [0.4, 4.0])
def test_tokens_of_another_dtype(rng, buffer_factor):
    """The result has that of the tokens, and is rounded once: bfloat16 from float32 sums."""
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), buffer_factor=buffer_factor)
    x, weight = (leaf.astype(jnp.bfloat16) for leaf in inputs(rng))
    (result, metrics), grads = value_and_grads(layer, x, weight)
    (expected, _), expected_grads = value_and_grads(layer, *(leaf.astype(jnp.float32) for leaf in (x, weight)))
    assert (int(metrics.rounds) == 1) == (buffer_factor == 4)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, expected.astype(jnp.bfloat16))
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert_close(got, want, 2**-7)  # of the input: two parts and their sum are rounded, to 2**-9 each


@pytest.mark.parametrize("dispatch", ["all_to_all", "ring"])
def test_no_tokens(dispatch):
    layer = make(placements()["cube"], mesh_of((RANKS, "ep")), dispatch=dispatch)
    x = jnp.zeros((0, D_MODEL))
    (result, metrics), grads = value_and_grads(layer, x, x)
    assert result.shape == x.shape
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))
    assert int(metrics.load.sum()) == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in metrics)


@pytest.mark.parametrize(
    ("dispatch", "buffer_factor", "prepared"), [("all_to_all", 0.2, False), ("ring", 4.0, False), ("ring", 0.4, True)]
)
def test_data_and_expert_axes(rng, dispatch, buffer_factor, prepared):
    """Each row of the mesh balances its own tokens; rows may need different numbers of rounds."""
    place = lplb.Placement.from_topology(topology.ring(4), num_experts=EXPERTS, num_ranks=4, redundants_per_rank=2)
    mesh = mesh_of((2, "data"), (4, "ep"))
    layer = make(place, mesh, token_axes=("data", "ep"), dispatch=dispatch, buffer_factor=buffer_factor)
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


def test_sigmoid_router_with_bias_and_prepared_slots(rng):
    place = placements()["eplb"]
    layer = make(place, mesh_of((RANKS, "ep")), router="sigmoid", router_bias=True)
    x, weight = inputs(rng)
    x = jnp.abs(x)  # or all experts would be about as popular
    before = check_against_dense(layer, x, weight, prepared=True, router="sigmoid", bias=layer.bias[...])
    for _ in range(60):
        layer.update_bias(run(layer, x)[1].load, rate=0.01)
    after = check_against_dense(layer, x, weight, router="sigmoid", bias=layer.bias[...])
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
    """200 steps of SGD from one seed, balanced and not: losses, and gradients of what both have."""
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
    for number in range(201):
        x, _ = inputs(rng)
        grads = {}
        for name, layer in layers.items():
            value, grad = step(layer, x)
            losses[name].append(float(value))
            grads[name] = logical(
                {key: grad[key][...] for key in ("router", "w_in", "w_out")}, layer.placement.get_value()
            )
        if number % 100 == 0:
            for key, value in grads["none"].items():
                assert_close(grads["ring"][key], value, 1e-3)
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
    ("changed", "message"),
    [
        ({"top_k": 17}, "top_k must be from 1 to num_experts = 16, got 17"),
        ({"num_experts": 32}, "placement is one of 16 experts, but num_experts = 32"),
        ({"router": "linear"}, "router must be one of .*, got 'linear'"),
        ({"dispatch": "mail"}, "dispatch must be one of .*, got 'mail'"),
        ({"grouped_matmul": "loop"}, "grouped_matmul must be one of .*, got 'loop'"),
        ({"buffer_factor": 0.0}, "buffer_factor must be positive, got 0.0"),
        ({"token_axes": ("data",)}, r"token_axes must hold the axes of axis_name = 'ep' .* got \('data',\)"),
    ],
)
def test_refuses(changed, message):
    arguments = {"d_model": 8, "num_experts": EXPERTS, "d_expert": 8, "top_k": 2, "placement": placements()["cube"]}
    arguments |= {"mesh": mesh_of((8, "ep")), "axis_name": "ep", "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=message):
        MoE(**(arguments | changed))


def test_update_bias_needs_one():
    with pytest.raises(ValueError, match="update_bias needs a layer made with router_bias=True"):
        make(placements()["none"], mesh_of((8, "ep"))).update_bias(jnp.ones(EXPERTS))
