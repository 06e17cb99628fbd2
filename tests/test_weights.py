"""Weights carried from one home order to another: rows arrive, bits stay."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import placement, topology

import jax_lplb as lplb

P = jax.sharding.PartitionSpec
EXPERTS, RANKS = 32, 8


def by_load(rng: np.random.Generator) -> lplb.Placement:
    load = rng.lognormal(0, 1, EXPERTS)
    return lplb.Placement.from_topology(
        topology.cube(), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2, load=load
    )


def tree(rng: np.random.Generator) -> dict:
    """Leaves of several dtypes; every bit pattern, NaN included."""
    bits = rng.integers(0, 2**32, (EXPERTS, 3, 5), np.uint32)
    return {
        "w": jnp.asarray(bits.view(np.float32)),
        "opt": [jnp.asarray(bits[:, 0].astype(np.uint16)).view(jnp.bfloat16), jnp.arange(EXPERTS)],
    }


def assert_same_bits(one, two) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_rows_are_those_of_the_home_experts(rng):
    place = by_load(rng)
    homes = place.phy2log.reshape(RANKS, -1)[:, : EXPERTS // RANKS].ravel()
    np.testing.assert_array_equal(place.home_order, homes)
    moved = lplb.from_logical({"w": np.arange(EXPERTS) * 10}, place)
    np.testing.assert_array_equal(moved["w"], homes * 10)
    np.testing.assert_array_equal(lplb.Placement.from_phy2log(homes, RANKS).home_order, np.arange(EXPERTS))


def test_round_trips_are_bitwise(rng):
    old, new, weights = by_load(rng), by_load(rng), tree(rng)
    at_old = lplb.from_logical(weights, old)
    assert_same_bits(lplb.to_logical(at_old, old), weights)
    at_new = lplb.permute_experts(at_old, old, new)
    assert_same_bits(at_new, lplb.from_logical(weights, new))
    assert_same_bits(lplb.permute_experts(at_new, new, old), at_old)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharded_under_jit(rng, axis_type):
    """Placements as arguments: one compilation; the donated buffers are reused, and the sharding stays."""
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(getattr(jax.sharding.AxisType, axis_type),))
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, P("ep"))
        old, weights = by_load(rng), jax.device_put(tree(rng), sharding)
        placements = [by_load(rng) for _ in range(3)]
        expected = [lplb.from_logical(tree_of_numpy(weights), new) for new in placements]
        step = jax.jit(lplb.permute_experts, donate_argnums=0, out_shardings=sharding)
        state = step(weights, lplb.Placement.from_phy2log(np.arange(EXPERTS), RANKS), old)
        for new, want in zip(placements, expected, strict=True):
            before = state
            state = step(before, old, new)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
            assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in jax.tree.leaves(state))
            assert_same_bits(state, want)
            old = new
        assert step._cache_size() == 2  # from no topology, and from one


def tree_of_numpy(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("axes", ["ep", ("a", "b"), ("b", "a")])
def test_within_shard_map(rng, axes):
    shape, names = ((RANKS,), ("ep",)) if axes == "ep" else ((2, 4), ("a", "b"))
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    old, new, weights = by_load(rng), by_load(rng), tree(rng)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(axes), P(), P()), out_specs=(P(axes), P(axes)))
    def step(weights, old, new):
        at_old = lplb.from_logical(weights, old, axis_name=axes)
        return at_old, lplb.permute_experts(at_old, old, new, axis_name=axes)

    at_old, at_new = step(weights, old, new)
    assert_same_bits(at_old, lplb.from_logical(weights, old))
    assert_same_bits(at_new, lplb.from_logical(weights, new))


def test_layers_by_vmap(rng):
    load = rng.lognormal(0, 1, (3, EXPERTS))
    places = lplb.Placement.from_topology(
        topology.cube(), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2, load=load
    )
    weights = jnp.tile(jnp.arange(EXPERTS), (3, 1))
    moved = jax.jit(jax.vmap(lplb.from_logical))(weights, places)
    np.testing.assert_array_equal(moved, places.home_order)
    with pytest.raises(ValueError, match="placement has leading axes"):
        lplb.from_logical(weights[0], places)


def test_wrong_arguments(rng):
    place = by_load(rng)
    with pytest.raises(ValueError, match=r"tree\['w'\] must have 32 rows, one for each expert, got shape \(31, 2\)"):
        lplb.to_logical({"w": np.zeros((31, 2))}, place)
    with pytest.raises(ValueError, match=r"tree must have 32 rows.*\(\)"):
        lplb.to_logical(np.float32(1), place)
    other = lplb.Placement.from_phy2log(np.arange(16), 8)
    with pytest.raises(ValueError, match="old and new must have equally many experts, got 32 and 16"):
        lplb.permute_experts({}, place, other)
    with pytest.raises(TypeError, match=r"new must be a jax_lplb\.Placement, got list"):
        lplb.permute_experts({}, place, [])
    with pytest.raises(ValueError, match="axis_name = 'ep' is not bound here"):
        lplb.to_logical({}, place, axis_name="ep")


# ---- Copies ----------------------------------------------------------------------------------------------------------


def along_columns(*steps: int) -> lplb.Placement:
    """Rank i has a copy of an expert of each rank i + step."""
    columns = (np.arange(RANKS)[:, None] + steps) % RANKS
    return placement(topology.from_r2o(columns), EXPERTS, RANKS, len(steps))


def repeats() -> lplb.Placement:
    """Each rank's hottest expert goes to both ranks that copy from it, one of them along two columns."""
    columns = topology.from_r2o((np.arange(RANKS)[:, None] + [1, 1, 3]) % RANKS)
    load = np.where(np.arange(EXPERTS) % 4 == 2, 100, np.arange(EXPERTS) % 4)
    place = lplb.Placement.from_topology(
        columns, num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=6, load=load, repeats=True
    )
    np.testing.assert_array_equal(np.bincount(place.phy2log)[2::4], 3)
    return place


def placements(rng: np.random.Generator) -> dict[str, lplb.Placement]:
    load = rng.lognormal(0, 1, EXPERTS)
    return {
        "cube": lplb.Placement.from_topology(
            topology.cube(), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=4
        ),
        "three columns": along_columns(1, 3, 2),
        "a column twice": along_columns(1, 1, 3),
        "two rings by load": lplb.Placement.from_topology(
            topology.ring(4), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2, load=load
        ),
        "repeats": repeats(),
        "selected": by_load(rng).select(rng.permutation(load)),
        "no copies": lplb.Placement.from_topology(
            topology.ring(8), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=0, load=load
        ),
        "eplb": lplb.Placement.from_eplb(load, num_ranks=RANKS, redundants_per_rank=3),
    }


@pytest.mark.smoke
@pytest.mark.parametrize("transport", ["peer", "collective"])
@pytest.mark.parametrize(
    ("name", "axes"),
    [
        *((name, "ep") for name in ("cube", "three columns", "a column twice", "two rings by load", "repeats")),
        *((name, "ep") for name in ("selected", "no copies", "eplb")),
        *((name, axes) for name in ("a column twice", "repeats", "eplb") for axes in (("a", "b"), ("b", "a"))),
    ],
)
def test_copies_and_their_gradients(rng, name, axes, transport):
    """Each slot has its expert's weights; at home arrives the sum of the gradients of all its slots."""
    place = placements(rng)[name]
    shape, names = ((RANKS,), ("ep",)) if axes == "ep" else ((2, 4), ("a", "b"))
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    logical = rng.normal(size=(EXPERTS, 3, 2)).astype(np.float32)
    factor = rng.integers(1, 9, (place.num_physical, 3, 2)).astype(np.float32)  # sums of it are exact

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(axes), P(), P(axes)), out_specs=(P(axes), P(axes)))
    def step(home, place, factor):
        slots, pull = jax.vjp(lambda home: lplb.replicate(home, place, axes, transport=transport), home)
        return slots["w"], pull({"w": factor})[0]["w"]

    home = {"w": lplb.from_logical(logical, place)}
    slots, gradient = step(home, place, factor)
    np.testing.assert_array_equal(slots, logical[np.asarray(place.phy2log)])
    expected = np.zeros_like(logical)
    np.add.at(expected, np.asarray(place.phy2log), factor)
    np.testing.assert_array_equal(lplb.to_logical(gradient, place), expected)


@pytest.mark.parametrize(
    ("name", "transport"),
    [("cube", None), ("cube", "collective"), ("repeats", "collective"), ("no copies", None), ("eplb", None)],
)
def test_copies_in_another_dtype(rng, name, transport):
    """Slots are rounded, and gradients added up at home unrounded: 256 + 1 is no bfloat16."""
    place = placements(rng)[name]
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    home = rng.normal(size=(EXPERTS, 3)).astype(np.float32)
    gradient = np.ones((place.num_physical, 3), jnp.bfloat16)
    gradient[np.asarray(place.log2phy)[:, 0]] = 256

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P("ep"), P(), P("ep")), out_specs=(P("ep"), P("ep")))
    def step(home, place, gradient):
        slots, pull = jax.vjp(lambda home: lplb.replicate(home, place, "ep", jnp.bfloat16, transport), home)
        return slots, *pull(gradient)

    slots, of_home = step(home, place, gradient)
    by_expert = np.empty_like(home)
    by_expert[place.home_order] = home
    assert slots.dtype == jnp.bfloat16
    assert of_home.dtype == jnp.float32
    np.testing.assert_array_equal(slots, by_expert.astype(jnp.bfloat16)[np.asarray(place.phy2log)])
    copies = np.bincount(place.phy2log, minlength=EXPERTS)[place.home_order] - 1
    np.testing.assert_array_equal(of_home, np.broadcast_to(256 + copies[:, None], home.shape))


@pytest.mark.parametrize("transport", ["peer", "collective"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("cube", None), ("cube", jnp.bfloat16), ("cube", jnp.int8), ("no copies", None), ("eplb", None)]
)
def test_leaves_that_have_no_gradient(rng, name, dtype, transport):
    """Masks and integers travel like weights, and weights beside them, of a dtype or not, are differentiated."""
    place = placements(rng)[name]
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    logical = {
        "mask": rng.random((EXPERTS, 3)) < 0.5,
        "more": rng.normal(size=(EXPERTS, 2, 2)).astype(np.float32),
        "q": rng.integers(-9, 9, (EXPERTS, 2)).astype(np.int8),
        "w": rng.normal(size=(EXPERTS, 2)).astype(np.float32),
        "none": {},
    }

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P("ep"), P()), out_specs=(P("ep"), P("ep")))
    def step(home, place):
        def loss(w):
            slots = lplb.replicate({**home, "w": w}, place, "ep", dtype, transport)
            return jnp.sum(slots["w"].astype(jnp.float32) * slots["q"].astype(jnp.float32)), slots

        (_, slots), gradient = jax.value_and_grad(loss, has_aux=True)(home["w"])
        return slots, gradient

    slots, gradient = step(lplb.from_logical(logical, place), place)
    for name in ("mask", "more", "q", "w"):
        expected = jnp.asarray(logical[name], dtype)[np.asarray(place.phy2log)]
        np.testing.assert_array_equal(slots[name], expected, strict=True)
    copies = np.bincount(place.phy2log, minlength=EXPERTS)[:, None] * (dtype != jnp.int8)
    np.testing.assert_array_equal(lplb.to_logical(gradient, place), logical["q"] * copies.astype(np.float32))


def test_partly_manual_mesh(rng):
    """Copies of leaves that are cut along another axis, each in its own way, travel as they are."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("ep", "tp"), axis_types=kinds)
    place = placement(topology.ring(4), 16, 4, 2)
    shardings = {"in": jax.NamedSharding(mesh, P("ep", None, "tp")), "out": jax.NamedSharding(mesh, P("ep", "tp"))}
    weights = {"in": rng.normal(size=(16, 4, 6)).astype(np.float32), "out": rng.normal(size=(16, 2, 4)).astype("f4")}
    bring = jax.shard_map(
        lambda home: lplb.replicate(home, place, "ep"),
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=P("ep"),
        axis_names={"ep"},
    )

    @partial(jax.jit, in_shardings=(shardings,), out_shardings=(shardings, shardings))
    def step(weights):
        slots, pull = jax.vjp(bring, weights)
        return slots, *pull(jax.tree.map(jnp.ones_like, slots))

    step = step.lower(weights).compile()
    slots, gradient = step(jax.device_put(weights, shardings))
    copies = np.bincount(place.phy2log)[place.home_order, None, None]
    for name, leaf in weights.items():
        np.testing.assert_array_equal(slots[name], leaf[place.phy2log])
        np.testing.assert_array_equal(gradient[name], np.broadcast_to(copies, leaf.shape))
    assert "all-to-all" not in step.as_text()
    assert "all-gather" not in step.as_text()


def test_placements_of_their_own_along_a_data_axis(rng):
    """Each row of the mesh has copies of other experts; gradients of all are added up at home."""
    mesh = jax.make_mesh((2, 4), ("data", "ep"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = placement(topology.ring(4), 16, 4, 2)
    places = [place.select(rng.lognormal(0, 1, 16).astype(np.float32)) for _ in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *places)
    home = rng.normal(size=(16, 3)).astype(np.float32)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P("ep"), P("data")), out_specs=P("ep"))
    def gradient(home, stacked):
        mine = jax.tree.map(lambda leaf: leaf[0], stacked)
        return jax.grad(lambda home: jnp.sum(lplb.replicate(home, mine, "ep")))(home)

    copies = sum(np.bincount(of_row.phy2log, minlength=16)[of_row.home_order] for of_row in places)
    np.testing.assert_array_equal(gradient(home, stacked), np.broadcast_to(copies[:, None], home.shape))


def test_nothing_to_bring(rng):
    """Without copies and casts weights stay the arrays that they are: no residuals for the backward pass."""
    place = placements(rng)["no copies"]
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.shard_map(mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    def same(home):
        assert lplb.replicate(home, place, "ep") is home
        assert lplb.replicate({}, by_load(rng), "ep") == {}
        return home

    jax.eval_shape(same, np.zeros((EXPERTS, 2), np.float32))


def test_copies_under_remat_and_scan_over_layers(rng):
    """Stacked layers with placements of their own: gradients of a loss through all of them."""
    loads = rng.lognormal(0, 1, (3, EXPERTS))
    places = lplb.Placement.from_topology(
        topology.cube(), num_experts=EXPERTS, num_ranks=RANKS, redundants_per_rank=2, load=loads
    )
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = rng.normal(size=(3, EXPERTS, 4)).astype(np.float32)

    def loss(weights, places, remat):
        def layer(total, inputs):
            slots = lplb.replicate(*inputs, "ep")
            return total + jnp.sum(jnp.sin(slots)), None

        body = jax.checkpoint(layer) if remat else layer
        zero = jax.lax.pcast(jnp.float32(0), ("ep",), to="varying")
        total, _ = jax.lax.scan(body, zero, (weights, places))
        return jax.lax.psum(total, "ep")

    grads = [
        jax.jit(
            jax.grad(
                jax.shard_map(
                    lambda w, p, remat=remat: loss(w, p, remat),
                    mesh=mesh,
                    in_specs=(P(None, "ep"), P()),
                    out_specs=P(),
                )
            )
        )(weights, places)
        for remat in (False, True)
    ]
    np.testing.assert_array_equal(*grads)
    for layer in range(3):
        copies = np.bincount(places.phy2log[layer], minlength=EXPERTS)[places.home_order[layer]]
        np.testing.assert_allclose(grads[0][layer], np.cos(weights[layer]) * copies[:, None], rtol=1e-6)


def test_replicate_refuses(rng):
    place = by_load(rng)
    with pytest.raises(TypeError, match=r"placement must be a jax_lplb.Placement, got ndarray"):
        lplb.replicate(np.zeros((4, 2)), place.phy2log, "ep")
    with pytest.raises(ValueError, match="axis_name = 'ep' is not bound here"):
        lplb.replicate(np.zeros((4, 2)), place, "ep")
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(lambda w: lplb.replicate({"w": w}, place, "ep"), mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    with pytest.raises(ValueError, match=r"home_weights\['w'\] must have 4 rows, one for each expert, got shape \(5,"):
        run(np.zeros((40, 2)))


# ---- Derivatives -----------------------------------------------------------------------------------------------------

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn]


def loss_of_moved(weights, place, factor, axes):
    moved = lplb.from_logical(weights, place, axis_name=axes)
    there = lplb.permute_experts(moved, place, by_load(np.random.default_rng(7)), axis_name=axes)
    back = lplb.to_logical(moved, place, axis_name=axes)
    return sum(jnp.sum(leaf.astype(jnp.float32) * factor) for leaf in (moved, there, back))


@pytest.mark.parametrize("where", ["unsharded", "Auto", "Explicit", "shard_map"])
def test_gradients_of_moved_rows(rng, where):
    """Weights in logical order, moved inside the loss: the gradients are moved back, for every float dtype."""
    place, other = by_load(rng), by_load(np.random.default_rng(7))
    kind = jax.sharding.AxisType.Explicit if where == "Explicit" else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(kind,))
    factor = rng.integers(1, 5, (EXPERTS, 2)).astype(np.float32)
    loss = partial(loss_of_moved, axes=None)
    if where == "shard_map":

        @partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), P(), P("ep")), out_specs=P())
        def loss(weights, place, factor):
            return jax.lax.psum(loss_of_moved(weights, place, factor, "ep"), "ep")

    step = jax.jit(jax.grad(loss))
    expected = factor.copy()  # of to_logical(from_logical(w)), which is w
    expected[place.home_order] += factor
    expected[other.home_order] += factor
    for dtype in FLOATS:
        weights = jnp.asarray(rng.normal(size=(EXPERTS, 2)), dtype)
        if where != "unsharded":
            weights = jax.device_put(weights, jax.NamedSharding(mesh, P("ep")))
        with jax.set_mesh(mesh):  # JAX forgets the mesh of an argument that the gradient does not depend on
            gradient = step(weights, place, factor)
        assert gradient.dtype == dtype
        np.testing.assert_array_equal(gradient.astype(jnp.float32), expected)


def test_derivatives_of_replicate(rng):
    """Of any order by collectives without a topology; what is refused names that as the cure."""
    along = placements(rng)["cube"]
    free = lplb.Placement.from_phy2log(along.phy2log, along.num_ranks)
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = jnp.asarray(rng.normal(size=(EXPERTS, 2)), jnp.float32)

    def derivatives(slots_of):
        def loss(weights):
            return jnp.sum(jnp.sin(slots_of(weights)))

        penalty = jax.jit(jax.grad(lambda weights: jnp.sum(jax.grad(loss)(weights) ** 2)))
        return [lambda: penalty(weights), lambda: jax.jit(lambda w: jax.jvp(loss, (w,), (w,)))(weights)[1]]

    def by(place, transport):
        bring = partial(lplb.replicate, placement=place, axis_name="ep", transport=transport)
        return jax.shard_map(bring, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))

    for got, want in zip(derivatives(by(free, "collective")), derivatives(lambda w: w[along.phy2log]), strict=True):
        np.testing.assert_allclose(got(), want(), rtol=1e-5, atol=1e-5)
    cure = r"differentiated once, .* pass transport='collective'"
    whole = cure + r", and Placement\.from_phy2log"
    for place, transport in ((along, None), (along, "peer"), (along, "collective"), (free, None), (free, "peer")):
        for refused in derivatives(by(place, transport)):
            with pytest.raises(NotImplementedError, match=whole if place is along else cure + "(?!,)"):
                refused()
