"""Tokens to the ranks of their experts and back: the values, by each transport, whatever ranks wait for."""

import logging
import re
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_same_bits,
    late,
    saves_collectives,
    turns,
    without_waiting,
)
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType

import jax_lplb as lplb
from jax_lplb import _dispatch, _ffi, _handlers, _peer, _replicate

P = jax.sharding.PartitionSpec
EXPERTS = 16


def placed(ranks: int) -> lplb.Placement:
    return lplb.Placement.per_batch(num_experts=EXPERTS, num_ranks=ranks, redundants_per_rank=2)


def mesh_of(*axes: str, shape: tuple[int, ...] = (8,), kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, axes or ("ep",), axis_types=(kind,) * len(shape))


# ---- The reference ---------------------------------------------------------------------------------------------------


def places(ids: np.ndarray, slots: int, capacity: int, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Of ids [ranks, tokens, k] in a round: places, group_sizes [ranks, slots], and how many rounds there are."""
    ranks = len(ids)
    place, sizes, most = np.full(ids.size, -1), np.zeros((ranks, slots), int), 1
    for rank in range(ranks):
        own = [np.flatnonzero(ids.ravel() == rank * slots + slot) for slot in range(slots)]
        queue = np.concatenate(own)  # by slot, then by source rank, then in the order of choices
        most = max(most, len(queue))
        part = slice(number * capacity, (number + 1) * capacity)
        place[queue[part]] = rank * capacity + np.arange(len(queue[part]))
        sizes[rank] = np.bincount(np.repeat(np.arange(slots), [*map(len, own)])[part], minlength=slots)
    return place.reshape(ids.shape), sizes, -(-most // capacity)


def unit(dtype) -> float:
    """What is lost, relatively, as a number is rounded."""
    return float(jnp.finfo(dtype).eps) / 2


def assert_sums(got, terms: np.ndarray, dtype) -> None:
    """Of float64 terms [..., n, elements]: parts of the sum are rounded to the dtype, and once more the whole."""
    size = np.abs(terms).sum(axis=-2)
    bound = (2 * unit(dtype) + (terms.shape[-2] + 2) * unit(np.float32)) * size
    assert np.all(np.abs(np.asarray(got, np.float64) - terms.sum(axis=-2)) <= bound)


def steps(mesh, transport="peer", *, buffer_factor=1.0, axes="ep", token_axes=None, check_vma=True, wrap=lambda f: f):
    """A jitted round: what dispatch returns, what experts make of it, the sums, and all gradients.

    An expert multiplies rows by its weights. `wrap`: of the function of a rank.
    """
    by_rank = P(token_axes or axes)

    def on_rank(tokens, ids, gates, weights, factor, number):
        place = placed(jax.lax.axis_size(axes))

        def there(tokens):
            out = lplb.dispatch(
                tokens, ids, place, axes, buffer_factor=buffer_factor, round=number, transport=transport
            )
            return out.rows, out

        rows, back_there, out = jax.vjp(there, tokens, has_aux=True)
        slot = jnp.repeat(jnp.arange(len(weights)), out.group_sizes, total_repeat_length=len(rows))
        made = jax.lax.optimization_barrier(rows * weights[slot])  # or XLA may go on with what is not yet rounded
        sums, back = jax.vjp(lambda made, gates: lplb.combine(made, gates, out.handle), made, gates)
        of_made, of_gates = jax.lax.optimization_barrier(back(factor.astype(sums.dtype)))
        (of_tokens,) = back_there(of_made)
        return {
            "rows": rows,
            "group_sizes": out.group_sizes,
            "num_rounds": out.num_rounds[None],
            "place": out.handle.place,
            "made": made,
            "sums": sums,
            "of_made": of_made,
            "of_gates": of_gates,
            "of_tokens": of_tokens,
        }

    return jax.jit(
        jax.shard_map(wrap(on_rank), mesh=mesh, in_specs=(*[by_rank] * 5, P()), out_specs=by_rank, check_vma=check_vma)
    )


def check(got: dict, operands: list[np.ndarray], ranks: int, number: int) -> int:
    """A round of a group of ranks against NumPy; returns how many rounds the batch takes."""
    tokens, ids, gates, _, factor = operands
    dtype, capacity, slots = tokens.dtype, len(got["rows"]) // ranks, placed(ranks).slots_per_rank
    got = {name: np.asarray(value) for name, value in got.items()}
    place, group_sizes, num_rounds = places(ids.reshape(ranks, -1, ids.shape[1]), slots, capacity, number)
    place = place.reshape(ids.shape)
    np.testing.assert_array_equal(got["place"], place)
    np.testing.assert_array_equal(got["group_sizes"].reshape(ranks, slots), group_sizes)
    np.testing.assert_array_equal(got["num_rounds"], np.full(ranks, num_rounds))
    token, choice = np.nonzero(place >= 0)
    row = place[token, choice]

    def rows_of(values) -> np.ndarray:
        rows = np.zeros((ranks * capacity, tokens.shape[1]), dtype)
        rows[row] = values
        return rows

    assert_same_bits(got["rows"], rows_of(tokens[token]))
    of_made = gates[token, choice][:, None] * factor[token].astype(np.float32)
    assert_same_bits(got["of_made"], rows_of(of_made.astype(dtype)))

    def of_choices(rows: np.ndarray) -> np.ndarray:
        return np.where((place >= 0)[..., None], rows.astype(np.float64)[place], 0)

    made = of_choices(got["made"])
    assert got["sums"].dtype == got["of_gates"].dtype == np.float32
    assert got["of_tokens"].dtype == dtype
    assert_sums(got["sums"], made * gates.astype(np.float64)[..., None], dtype)
    assert_sums(got["of_tokens"], of_choices(got["of_made"]), dtype)
    products = made * factor.astype(np.float64)[:, None]
    assert_sums(got["of_gates"][..., None], products[..., None], np.float32)
    return num_rounds


def drawn(rng: np.random.Generator, ranks: int, tokens: int, k: int, width: int, dtype=np.float32) -> list[np.ndarray]:
    """Operands of a round, whose ids are any slot's, or padding of any kind."""
    slots = placed(ranks).num_physical
    ids = rng.integers(-slots // 4, slots + slots // 4, (ranks * tokens, k)).astype(np.int32)
    numbers = [rng.normal(size=(rows, width)).astype(dtype) for rows in (ranks * tokens, slots, ranks * tokens)]
    gates = rng.uniform(-1, 1, ids.shape).astype(np.float32)
    return [numbers[0], ids, gates, *numbers[1:]]


def batches(rng: np.random.Generator, ids: np.ndarray, ranks: int) -> dict[str, np.ndarray]:
    """Others in place of these ids."""
    slots = placed(ranks).slots_per_rank
    none_on_a_rank = ids.copy()
    none_on_a_rank[: len(ids) // ranks] = rng.choice([-1, -(2**31), ranks * slots, 2**31 - 1], (len(ids) // ranks, 1))
    one_rank_each = rng.integers(0, slots, ids.shape) + rng.integers(0, ranks, (len(ids), 1)) * slots
    batches = {
        "any": ids,
        "none on a rank": none_on_a_rank,
        "none": np.full_like(ids, -1),
        "a token's on one rank": one_rank_each,
        "all on one slot": np.full_like(ids, ranks * slots - 2),
        "all on one rank": rng.integers(slots, 2 * slots, ids.shape),
    }
    return {name: of.astype(np.int32) for name, of in batches.items()}


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "dtype", "width", "k", "tokens"),
    [
        ("peer", np.float32, 4, 3, 24),  # rows of 16 bytes
        ("peer", jnp.bfloat16, 8 * 129, 6, 16),  # of an odd number of words, more than a warp has in flight
        ("peer", np.float16, 8 * 3, 32, 5),
        ("peer", jnp.bfloat16, 8, 1, 70),
        ("collective", np.float32, 5, 3, 24),
        ("collective", jnp.bfloat16, 8, 33, 5),
    ],
)
def test_rows_sums_and_gradients_are_those_of_numpy(rng, mesh, transport, dtype, width, k, tokens):
    """Whatever the ids, in as many rounds as they take and beyond; equal inputs give equal bits."""
    step = steps(mesh, transport)
    operands = drawn(rng, mesh.size, tokens, k, width, dtype)
    for name, ids in batches(rng, operands[1], mesh.size).items():
        operands[1] = ids
        number, rounds, total = 0, 1, 0
        while number < rounds:
            got = step(*operands, number)
            rounds = check(got, operands, mesh.size, number)
            total, number = total + np.asarray(got["sums"], np.float64), number + 1
        assert rounds > 1 or name not in ("all on one slot", "all on one rank")
        for beyond in (rounds, 2**31 - 1):
            got = step(*operands, beyond)
            assert not any(np.any(got[name]) for name in ("rows", "group_sizes", "sums", "of_tokens", "of_gates"))
            assert np.all(np.asarray(got["place"]) == -1)
    again, got = step(*operands, 0), step(*operands, 0)
    jax.tree.map(assert_same_bits, got, again)
    assert step._cache_size() == 1


def test_rounds_add_up_to_one(rng, mesh):
    """Sums and gradients of all rounds are those of a single one."""
    operands = drawn(rng, mesh.size, 24, 3, 4)
    operands[1] = batches(rng, operands[1], mesh.size)["all on one slot"]
    one = steps(mesh, buffer_factor=float(mesh.size))(*operands, 0)
    assert check(one, operands, mesh.size, 0) == 1
    step = steps(mesh)
    parts = [step(*operands, number) for number in range(int(step(*operands, 0)["num_rounds"][0]))]
    assert len(parts) > 1
    for name in ("sums", "of_tokens", "of_gates"):
        total = sum(np.asarray(part[name], np.float64) for part in parts)
        np.testing.assert_allclose(total, one[name], rtol=1e-5, atol=1e-6)


def test_rounds_out_of_range_have_no_rows(rng, mesh):
    tokens, ids, *_ = drawn(rng, mesh.size, 6, 3, 4)

    def on_rank(tokens, ids, number):
        numbers = (number, number.astype(jnp.uint32), -number, 2**40)
        of_each = [lplb.dispatch(tokens, ids, placed(mesh.size), "ep", round=one) for one in numbers]
        return [(out.rows, out.group_sizes, out.handle.place[None]) for out in of_each]

    run = jax.shard_map(on_rank, mesh=mesh, in_specs=(P("ep"), P("ep"), P()), out_specs=P("ep"))
    for rows, group_sizes, place in jax.jit(run)(tokens, ids, jnp.int32(-(2**31) + 1)):
        assert not np.any(rows)
        assert not np.any(group_sizes)
        assert np.all(np.asarray(place) == -1)


@pytest.mark.parametrize(
    ("shape", "names", "axes", "kind", "check_vma"),
    [
        ((2, 4), ("data", "ep"), "ep", AxisType.Auto, True),
        ((2, 4), ("data", "ep"), "ep", AxisType.Explicit, False),
        ((2, 4), ("a", "b"), ("b", "a"), AxisType.Explicit, True),
    ],
)
def test_meshes(rng, shape, names, axes, kind, check_vma):
    """Ranks are those of the axes, in their order; each row of a larger mesh is alone."""
    mesh = mesh_of(*names, shape=shape, kind=kind)
    token_axes = ("data", "ep") if axes == "ep" else axes
    step = steps(mesh, axes=axes, token_axes=token_axes, check_vma=check_vma)
    rows, ranks = (2, 4) if axes == "ep" else (1, 8)
    of_rows = [drawn(rng, ranks, 6, 3, 8) for _ in range(rows)]
    operands = [np.concatenate(of_each) for of_each in zip(*of_rows, strict=True)]
    got = step(*jax.device_put(operands, jax.NamedSharding(mesh, P(token_axes))), 0)
    for row, of_row in enumerate(of_rows):
        check({name: np.split(np.asarray(value), rows)[row] for name, value in got.items()}, of_row, ranks, 0)


# ---- Transforms ------------------------------------------------------------------------------------------------------


MAPPED = {  # of tokens, ids, gates, weights and factor
    "all": (0, 1, 2, 3, 4),
    "tokens": (0,),
    "ids": (1,),
    "gates": (2,),
    "rows": (3,),
    "gradient": (4,),
}


@pytest.mark.parametrize("names", [("all", "tokens", "ids"), ("gates", "rows", "gradient")])
def test_vmap(rng, mesh, names):
    """Each element has memory of its own, whichever operands are mapped: values are those of calls one by one."""
    of_elements = [drawn(rng, mesh.size, 6, 3, 4) for _ in range(2)]

    def wrap(on_rank):
        def run(*operands):
            # The mapped axis comes second: the first is that of the ranks.
            stacked = [jnp.moveaxis(operand, 1, 0) for operand in operands[:5]]
            results = {}
            for name in names:
                axes = [0 if i in MAPPED[name] else None for i in range(5)]
                given = [one if axis == 0 else one[0] for one, axis in zip(stacked, axes, strict=True)]
                results[name] = jax.vmap(on_rank, (*axes, None), 1)(*given, operands[5])
            return results

        return run

    stacked = [np.stack(operands, axis=1) for operands in zip(*of_elements, strict=True)]
    got, step = steps(mesh, wrap=wrap)(*stacked, 0), steps(mesh)
    for name in names:
        for i, operands in enumerate(of_elements):
            given = [
                one if j in MAPPED[name] else other
                for j, (one, other) in enumerate(zip(operands, of_elements[0], strict=True))
            ]
            expected = step(*given, 0)
            for result, value in expected.items():
                of_element = np.take(np.asarray(got[name][result]), i, axis=1)
                if result in ("sums", "of_tokens"):  # XLA adds up the parts, in an order of its own
                    np.testing.assert_allclose(of_element, value, rtol=1e-6, atol=1e-6)
                else:
                    assert_same_bits(of_element, value)


def layers_by_scan(rng, mesh, policy):
    """Three layers with gradients: a jitted step, a dense reference of it, and what both take."""
    ranks, layers, width = mesh.size, 3, 4
    place = placed(ranks)
    x, _, _, _, factor = drawn(rng, ranks, 6, 3, width)
    ids, gates, weights = (
        np.stack(leaves) for leaves in zip(*(drawn(rng, ranks, 6, 3, width)[1:4] for _ in range(layers)), strict=True)
    )
    policies = {"nothing": jax.checkpoint_policies.nothing_saveable, "collectives": saves_collectives}

    def by_ranks(x, layer):
        ids, gates, weights = layer
        out = lplb.dispatch(x, ids, place, "ep", buffer_factor=float(ranks), transport="peer")
        slot = jnp.repeat(jnp.arange(len(weights)), out.group_sizes, total_repeat_length=len(out.rows))
        return x + lplb.combine(jnp.sin(out.rows * weights[slot]), gates, out.handle), None

    def dense(x, layer):
        ids, gates, weights = layer
        gates = jnp.where((ids >= 0) & (ids < len(weights)), gates, 0)
        return x + jnp.sum(gates[..., None] * jnp.sin(x[:, None] * weights[ids % len(weights)]), axis=1), None

    def gradients(layer, x, ids, gates, weights, factor):
        def result(x, gates, weights):
            return jax.lax.scan(layer, x, (ids, gates, weights))[0]

        value, pull = jax.vjp(result, x, gates, weights)
        return value, *pull(factor)

    body = by_ranks if policy is None else jax.checkpoint(by_ranks, policy=policies[policy])
    layered = P(None, "ep")
    step = jax.shard_map(
        partial(gradients, body),
        mesh=mesh,
        in_specs=(P("ep"), layered, layered, layered, P("ep")),
        out_specs=(P("ep"), P("ep"), layered, layered),
    )
    return jax.jit(step), jax.jit(partial(gradients, dense)), (x, ids, gates, weights, factor)


@pytest.mark.parametrize("policy", [None, "nothing", "collectives"])
def test_layers_by_scan_and_remat(rng, mesh, policy):
    """No checkpoint policy keeps addresses for later; gradients are those of a dense reference."""
    step, dense, operands = layers_by_scan(rng, mesh, policy)
    for one, other in zip(step(*operands), dense(*operands), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_ranks_of_a_mapped_axis(rng):
    """`jax.vmap` with an axis name: the ranks are elements, and have no memory of their own."""
    tokens, ids, gates, _, _ = drawn(rng, 8, 6, 3, 4)

    def run(transport):
        def on_rank(tokens, ids, gates):
            out = lplb.dispatch(tokens, ids, placed(8), "ep", buffer_factor=8.0, transport=transport)
            return lplb.combine(out.rows, gates, out.handle)

        mapped = jax.jit(jax.vmap(on_rank, axis_name="ep"))
        return mapped(*(operand.reshape(8, 6, -1) for operand in (tokens, ids, gates)))

    valid = (ids >= 0) & (ids < placed(8).num_physical)
    expected = np.sum(gates * valid, axis=1)[:, None] * tokens
    np.testing.assert_allclose(run(None).reshape(tokens.shape), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"axis_name = 'ep' is not of a mesh .* pass transport='collective'"):
        run("peer")


def on_ranks(function, mesh=None, names=("ep",)):
    """The function of a rank's operands, on all ranks."""
    mesh = mesh or mesh_of()
    return jax.shard_map(function, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), axis_names=set(names))


def there_and_back(tokens, ids, gates, transport=None):
    out = lplb.dispatch(tokens, ids, placed(jax.lax.axis_size("ep")), "ep", buffer_factor=8.0, transport=transport)
    return lplb.combine(out.rows, gates, out.handle)


@pytest.mark.parametrize("transport", ["peer", "collective"])
def test_other_derivatives_are_refused(transport):
    """Forward mode, and derivatives of derivatives, by tokens and by gates: in a sentence that says what to do."""
    tokens, ids, gates = np.ones((8, 4), np.float32), np.zeros((8, 1), np.int32), np.ones((8, 1), np.float32)
    run = jax.jit(on_ranks(partial(there_and_back, transport=transport)))
    for derivative in (
        lambda: jax.jvp(lambda tokens: run(tokens, ids, gates), (tokens,), (tokens,)),
        lambda: jax.jvp(lambda gates: run(tokens, ids, gates), (gates,), (gates,)),
        lambda: jax.hessian(lambda tokens: jnp.sum(run(tokens, ids, gates) ** 2))(tokens),
        lambda: jax.hessian(lambda gates: jnp.sum(run(tokens, ids, gates) ** 2))(gates),
    ):
        with pytest.raises(NotImplementedError, match=r"once, in reverse mode .*MoE\(dispatch='dense'\)"):
            derivative()


def test_64_bit_types_enabled():
    """Places and counts stay int32, and sums float32; gradients are of the dtypes of what they are by."""
    operands = [jax.ShapeDtypeStruct((16, n), dtype) for n, dtype in ((4, np.float32), (3, np.int32), (3, np.float64))]

    def run(tokens, ids, gates):
        out = lplb.dispatch(tokens, ids, placed(8), "ep", round=np.int64(1))
        sums, pull = jax.vjp(lambda tokens, gates: there_and_back(tokens, ids, gates), tokens, gates)
        return out.handle.place, out.group_sizes, out.num_rounds[None], sums, *pull(sums)

    with jax.enable_x64(True):
        kinds = [leaf.dtype for leaf in jax.eval_shape(on_ranks(run), *operands)]
    assert kinds == [np.int32, np.int32, np.int32, np.float32, np.float32, np.float64]


# ---- Counting --------------------------------------------------------------------------------------------------------


count_and_number = jax.jit(_dispatch.count_and_number, static_argnums=1)


@hypothesis.settings(deadline=None)
@hypothesis.given(data=st.data(), kinds=st.sampled_from([1, 5, _ffi.MAX_EXPERTS, _ffi.MAX_EXPERTS + 1]))
def test_count_and_number(data, kinds):
    """By the custom call, and beyond what that holds by pure JAX."""
    values = st.sampled_from([-(2**31), -1, 0, 1, kinds - 1, kinds, 2**31 - 1])
    ids = data.draw(arrays(np.int32, st.sampled_from([1, 40]), elements=values))
    counts, number = count_and_number(ids, kinds)
    valid = (ids >= 0) & (ids < kinds)
    np.testing.assert_array_equal(counts, np.bincount(ids[valid], minlength=kinds))
    before = np.tril(ids[:, None] == ids, -1).sum(axis=1)
    np.testing.assert_array_equal(number, np.where(valid, before, 0))


@pytest.mark.parametrize("kinds", [7, _ffi.MAX_EXPERTS + 1])
def test_count_and_number_of_many(rng, kinds):
    """Of more ids than a chunk, and mapped."""
    ids = rng.integers(-1, 8, (2, 20_000)).astype(np.int32)
    counts, numbers = jax.jit(jax.vmap(partial(_dispatch.count_and_number, kinds=kinds)))(ids)
    for of_layer, count, number in zip(ids, counts, numbers, strict=True):
        valid = (of_layer >= 0) & (of_layer < kinds)
        np.testing.assert_array_equal(count, np.bincount(of_layer[valid], minlength=kinds))
        expected = np.zeros(len(of_layer), int)
        for kind in range(min(kinds, 8)):
            expected[of_layer == kind] = np.arange(np.sum(of_layer == kind))
        np.testing.assert_array_equal(number, expected)


# ---- Where it can be -------------------------------------------------------------------------------------------------


def many_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    return "there are 2 processes, and on platform cpu each reaches", {}


def axes_that_are_not_manual(_):
    return r"axes \['tp'\] are not manual", {"mesh": mesh_of("ep", "tp", shape=(4, 2))}


def other_dtypes(_):
    return "tokens travel as float32, bfloat16, float16, not float8_e4m3fn", {"dtype": jnp.float8_e4m3fn, "width": 16}


def parts_of_words(_):
    return "a token of 20 bytes is not of whole 16-byte words", {"width": 5}


def many_choices(_):
    return "a token has 33 choices, and custom calls at most 32", {"k": 33}


def no_access(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_ffi, "_PLATFORMS", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_handlers, "peers_reachable", lambda: False)
    return "some GPUs cannot access the memory of others", {}


def lowered(transport, *, mesh=None, width=4, k=3, dtype=np.float32) -> str:
    run = on_ranks(partial(there_and_back, transport=transport), mesh)
    kinds = [((16, width), dtype), ((16, k), np.int32), ((16, k), np.float32)]
    return jax.jit(run).lower(*(jax.ShapeDtypeStruct(*kind) for kind in kinds)).as_text()


CASES = [
    many_processes,
    axes_that_are_not_manual,
    other_dtypes,
    parts_of_words,
    many_choices,
    no_access,
]


@pytest.mark.parametrize("case", CASES)
def test_out_of_reach(monkeypatch, caplog, case):
    """Asked for, it is refused with the reason; else collectives take over, and the log says so once."""
    _replicate.say_once.cache_clear()
    why_not, options = case(monkeypatch)
    with pytest.raises(ValueError, match=f"transport = 'peer': .*{why_not}.*; pass transport='collective', or None"):
        lowered("peer", **options)
    with caplog.at_level(logging.INFO, "jax_lplb"):
        for _ in range(2):
            text = lowered(None, **options)
    assert "@lplb_expose" not in text
    assert lowered("collective", **options) == text
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(f"tokens travel by collectives: .*{why_not}", said)


def test_within_reach(caplog):
    _replicate.say_once.cache_clear()
    with caplog.at_level(logging.INFO, "jax_lplb"):
        texts = [lowered(transport) for transport in (None, "peer", "collective")]
    assert ["@lplb_dispatch" in text and "@lplb_combine" in text for text in texts] == [True, True, False]
    assert [record.getMessage() for record in caplog.records] == ["tokens: peers' memory"]


@pytest.mark.parametrize("transport", ["peer", None])
def test_rows_of_another_dtype_and_width_than_the_tokens(rng, transport):
    """They go back through peers' memory where they can, and else by collectives or, asked for, not at all."""
    tokens, ids, gates, _, _ = drawn(rng, 8, 6, 3, 8)

    def run(made):
        def on_rank(tokens, ids, gates):
            out = lplb.dispatch(tokens, ids, placed(8), "ep", buffer_factor=8.0, transport=transport)
            return lplb.combine(made(out.rows), gates, out.handle)

        return jax.jit(on_ranks(on_rank))(tokens, ids, gates)

    valid = (ids >= 0) & (ids < placed(8).num_physical)
    weights = (gates * valid).astype(np.float64)[..., None]
    terms = weights * tokens.astype(jnp.bfloat16).astype(np.float64)[:, None]
    assert_sums(run(lambda rows: rows.astype(jnp.bfloat16)), terms, jnp.bfloat16)
    assert_sums(run(lambda rows: rows[:, :4]), weights * tokens.astype(np.float64)[:, None, :4], np.float32)
    of_some = weights * tokens.astype(np.float64)[:, None, :5]
    if transport is None:
        assert_sums(run(lambda rows: rows[:, :5]), of_some, np.float32)
        assert run(lambda rows: rows[:, :0]).shape == (48, 0)
    else:
        with pytest.raises(ValueError, match=r"transport = 'peer': .* a token of 20 bytes .* or None"):
            run(lambda rows: rows[:, :5])


NO_TOKENS = {"tokens": np.zeros((0, 4), np.float32), "physical_ids": np.zeros((0, 3), np.int32)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"tokens": np.ones((2, 4), np.int32)}, TypeError, "tokens must be a floating-point array, got int32"),
        ({"tokens": [1.0]}, TypeError, "tokens must be a floating-point array, got list"),
        ({"tokens": np.ones((3, 4), np.float32)}, ValueError, r"tokens and physical_ids .* got \(3, 4\) and \(2, 3\)"),
        ({"tokens": np.ones((2, 2, 2), np.float32)}, ValueError, r"tokens and physical_ids must .* got \(2, 2, 2\)"),
        (NO_TOKENS, ValueError, r"with one token and one choice at least \(ids of -1 are padding\), got \(0, 4\)"),
        ({"physical_ids": [1]}, TypeError, "physical_ids must be an int32 array, got list"),
        ({"physical_ids": np.ones((2, 3))}, TypeError, r"physical_ids must have dtype int32, got float64; convert"),
        ({"placement": 2}, TypeError, r"placement must be a jax_lplb\.Placement, got int"),
        ({"placement": placed(4)}, ValueError, "axis_name = 'ep' spans 8 devices, but placement has num_ranks = 4"),
        ({"axis_name": "tp"}, ValueError, "axis_name = 'tp' is not bound here"),
        ({"buffer_factor": 0.0}, ValueError, "buffer_factor must be positive and finite, got 0.0"),
        ({"buffer_factor": "1"}, TypeError, "buffer_factor must be a number, got '1'"),
        ({"round": -1}, ValueError, "round must be at least 0, got -1"),
        ({"round": 0.5}, TypeError, "round must be an integer, got 0.5"),
        ({"round": np.ones(2, np.int32)}, TypeError, r"round must be an integer, got an array of shape \(2,\)"),
        ({"transport": "mail"}, ValueError, r"transport must be one of \(None, 'peer', 'collective'\), got 'mail'"),
        ({"rows": np.ones((63, 4), np.float32)}, ValueError, r"rows and gates must have shapes \[64, .* \(63, 4\)"),
        ({"rows": 1.0}, TypeError, "rows must be a floating-point array, got float"),
        ({"gates": np.ones((2, 2), np.float32)}, ValueError, r"rows and gates must .* \(2, 3\), got .* and \(2, 2\)"),
        ({"gates": np.ones((2, 3), np.int32)}, TypeError, "gates must be a floating-point array, got int32"),
        (
            {"handle": None},
            TypeError,
            r"handle must be that of a dispatch, lplb\.dispatch\(\.\.\.\)\.handle, got NoneType",
        ),
    ],
)
def test_refuses(changed, error, message):
    def run():
        given = {"tokens": np.ones((2, 4), np.float32), "physical_ids": np.ones((2, 3), np.int32)}
        given |= {"placement": placed(8), "axis_name": "ep"} | changed
        to_combine = {name: given.pop(name) for name in ("rows", "gates", "handle") if name in given}
        out = lplb.dispatch(**given)
        lplb.combine(**{"rows": out.rows, "gates": np.ones((2, 3), np.float32), "handle": out.handle} | to_combine)
        return out.num_rounds[None]

    with pytest.raises(error, match=message):
        jax.eval_shape(jax.shard_map(run, mesh=mesh_of(), in_specs=(), out_specs=P("ep")))


def test_buffers_beyond_int32_are_refused():
    """Places number the rows of all ranks; with a smaller factor the same batch has places."""
    kinds = [jax.ShapeDtypeStruct((8 * 2**23, n), dtype) for n, dtype in ((4, np.float32), (8, np.int32))]

    def trace(buffer_factor):
        def on_rank(tokens, ids):
            return lplb.dispatch(tokens, ids, placed(8), "ep", buffer_factor=buffer_factor).rows

        return jax.eval_shape(on_ranks(on_rank), *kinds)

    with pytest.raises(ValueError, match=r"buffer_factor: 8 buffers of 301989888 rows are .* choose a smaller one"):
        trace(4.5)
    assert trace(3.5).shape == (8 * 234881024, 4)


# ---- The rules -------------------------------------------------------------------------------------------------------


def delayed(monkeypatch, before, after) -> None:
    """Ranks wait before they read and write, and after; both are functions of the rank and of places, to turns."""
    expose, release = _peer.expose, _peer.release

    def turns_of(of_rank, shown):
        (place,) = (one for one in shown if one.dtype == jnp.int32)
        return of_rank(jax.lax.axis_index("ep"), place)

    def slow_expose(*args, **options):
        exposed = expose(*args, **options)
        return exposed._replace(table=late(exposed.table, turns_of(before, exposed.shown)))

    def slow_release(exposed, done, *args):
        return release(exposed, late(done, turns_of(after, exposed.shown)), *args)

    monkeypatch.setattr(_peer, "expose", slow_expose)
    monkeypatch.setattr(_peer, "release", slow_release)


def test_any_delays_and_memory_that_is_used_again_at_once(monkeypatch, fresh, rng, mesh):
    """Steps in a loop, donated tokens and gates written over in place: each step's values are right."""

    def before(rank, place):
        return jnp.maximum((jnp.sum(place) * 7 + rank * 5) % 8 - 4, 0) * turns(mesh)

    delayed(monkeypatch, before, lambda rank, place: before(rank + 3, place))
    ranks, count, k, width = mesh.size, 6, 3, 4
    place = placed(ranks)
    many = [drawn(rng, ranks, count, k, width)[1] for _ in range(5)]
    whole = partial(rng.integers, -2, 3)
    tokens, factor = (whole(size=(ranks * count, width)).astype(np.float32) for _ in range(2))
    gates, weights = (whole(size=size).astype(np.float32) for size in (many[0].shape, (place.num_physical, width)))

    @partial(jax.jit, donate_argnums=(0, 1))
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("ep"), P("ep"), P(None, "ep"), P("ep"), P("ep")),
        out_specs=(P("ep"), P("ep"), P(None, "ep")),
        check_vma=False,
    )
    def run(tokens, gates, many, weights, factor):
        def step(carry, ids):
            tokens, gates = carry
            rows, back_there, out = jax.vjp(lambda tokens: dispatched(tokens, ids), tokens, has_aux=True)
            slot = jnp.repeat(jnp.arange(len(weights)), out.group_sizes, total_repeat_length=len(rows))
            made = rows * weights[slot]
            sums, back = jax.vjp(lambda made, gates: lplb.combine(made, gates, out.handle), made, gates)
            of_made, of_gates = back(factor)
            tokens = (tokens + sums + back_there(of_made)[0]) % 8 - 4
            return (tokens, (gates + of_gates) % 4 - 2), sums

        (tokens, gates), sums = jax.lax.scan(step, (tokens, gates), many)
        return tokens, gates, sums

    def dispatched(tokens, ids):
        out = lplb.dispatch(tokens, ids, place, "ep", transport="peer")
        return out.rows, out

    sharding = jax.NamedSharding(mesh, P("ep"))
    given = [jax.device_put(one, sharding) for one in (tokens, gates)]
    capacity = _dispatch.capacity_of(1.25 * count * k, ranks * count * k)
    for _ in range(2):
        *given, got = run(*given, np.stack(many), weights, factor)
        for ids, sums in zip(many, np.asarray(got), strict=True):
            is_row = places(ids.reshape(ranks, count, k), place.slots_per_rank, capacity, 0)[0].reshape(ids.shape) >= 0
            made = tokens[:, None] * weights[ids % len(weights)] * is_row[..., None]
            expected = np.sum(gates[..., None] * made, axis=1)
            np.testing.assert_array_equal(sums, expected)
            of_tokens = np.sum(gates * is_row, axis=1)[:, None] * factor
            of_gates = np.sum(made * factor[:, None], axis=2)
            tokens, gates = (tokens + expected + of_tokens) % 8 - 4, (gates + of_gates) % 4 - 2
        np.testing.assert_array_equal(given[0], tokens)
        np.testing.assert_array_equal(given[1], gates)


@pytest.mark.parametrize("broken", [None, "gather", "release"])
def test_release_is_what_waits_until_all_have_read_and_written(monkeypatch, fresh, rng, mesh, broken):
    """Rank 0 reads tokens late, which the others write over, and writes sums and gradients late into their memory."""
    if broken and mesh.devices.flat[0].platform != "cpu":
        pytest.skip("it would read places that are none any more, and write wherever those are")
    delayed(monkeypatch, lambda rank, _: jnp.where(rank == 0, 30 * turns(mesh), 0), lambda *_: 0)
    if broken == "gather":
        monkeypatch.setattr(_peer, "gather", without_waiting(_peer.gather))
    if broken == "release":
        monkeypatch.setattr(_peer, "release", lambda exposed, done, axis_name, made=(): [*exposed.buffers, *made])
    ranks, count, k, width = mesh.size, 8, 3, 4
    ids = drawn(rng, ranks, count, k, width)[1]
    ids[:, 0] = 0  # a choice of each token is on rank 0

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), P("ep"), P()), out_specs=P("ep"), check_vma=False)
    def run(tokens, ids, by):
        tokens = jax.lax.optimization_barrier(tokens * by)  # or XLA computes them anew
        out = lplb.dispatch(tokens, ids, placed(ranks), "ep", buffer_factor=float(ranks), transport="peer")
        overwritten = jax.lax.dynamic_update_slice(tokens, out.rows[: count - 1] * 0 - 1, (0, 0))
        gates = 1 + 0 * overwritten[:, :1].repeat(k, axis=1)  # so that tokens are written over before sums are made
        made = out.rows * 0 + by  # whatever came
        sums, back = jax.vjp(lambda gates: lplb.combine(made, gates, out.handle), gates)
        (of_gates,) = back(jnp.ones_like(sums))
        return {"rows": out.rows, "sums": sums, "of_gates": of_gates}, overwritten

    valid = (ids >= 0) & (ids < placed(ranks).num_physical)
    right = {"rows": True, "sums": True, "of_gates": True}
    for turn in range(1, 6):
        got, _ = jax.tree.map(np.asarray, run(np.ones((len(ids), width), np.float32), ids, np.float32(turn)))
        on_rank_0 = np.sum((ids >= 0) & (ids < placed(ranks).slots_per_rank))
        right["rows"] &= bool((got["rows"][:on_rank_0] == turn).all())
        right["sums"] &= bool((got["sums"] == turn * valid.sum(axis=1)[:, None]).all())
        right["of_gates"] &= bool((got["of_gates"] == turn * width * valid).all())
        # Where the others are held up longer than rank 0, it is in time: not every time.
        if broken is None or not any(right.values()):
            break
    assert right == dict.fromkeys(right, broken is None)
