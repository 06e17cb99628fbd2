"""What users get wrong raises when tracing, and says what to do; what a batch holds never raises."""

import contextlib
import importlib
import pathlib
import re
import textwrap
from functools import cache, partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lplb as lplb
from jax_lplb import _ffi, _handlers

topology = lplb.topology
PLACE = helpers.placement(topology.cube(), 32, 8, 2)
NO_COPIES = helpers.placement(topology.cube(), 32, 8, 0)
STACKED = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), PLACE)
IDS = np.arange(64, dtype=np.int32).reshape(16, 4) % 32
LOAD = np.full(32, 2, np.int32)

GOOD = {
    "count_load": {"expert_ids": IDS, "num_experts": 32},
    "solve": {"load": LOAD, "placement": PLACE},
    "assign": {"expert_ids": IDS, "split": np.ones((32, 2), np.float32), "placement": PLACE, "load": LOAD},
    "balance": {"expert_ids": IDS, "placement": PLACE},
}
NOT_INT32 = r"expert_ids must have dtype int32, got {}; convert with \.astype\(jnp\.int32\)"


def all_of(functions: str, *cases):
    return [(function, *case) for function in functions.split() for case in cases]


CASES = [
    *all_of(
        "count_load assign balance",
        ({"expert_ids": IDS.astype(np.float32)}, TypeError, NOT_INT32.format("float32")),
        ({"expert_ids": IDS.astype(np.int64)}, TypeError, NOT_INT32.format("int64")),
        ({"expert_ids": IDS.astype(np.uint32)}, TypeError, NOT_INT32.format("uint32")),
        ({"expert_ids": IDS.astype(np.int8)}, TypeError, NOT_INT32.format("int8")),
        ({"expert_ids": IDS > 3}, TypeError, NOT_INT32.format("bool")),
        ({"expert_ids": [[0, 1]]}, TypeError, "expert_ids must be an int32 array, got list"),
        ({"expert_ids": 3}, TypeError, "expert_ids must be an int32 array, got int"),
        ({"expert_ids": None}, TypeError, "expert_ids must be an int32 array, got NoneType"),
        (
            {"expert_ids": np.array(3, np.int32)},
            ValueError,
            r"expert_ids must have shape \[\.\.\., k\].* got shape \(\)",
        ),
    ),
    *all_of(
        "count_load",
        ({"num_experts": 32.0}, TypeError, r"num_experts must be an integer, got 32\.0"),
        ({"num_experts": True}, TypeError, "num_experts must be an integer, got True"),
        ({"num_experts": np.array(32)}, TypeError, "num_experts must be an integer, got "),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"num_experts": -1}, ValueError, "num_experts must be at least 1, got -1"),
        ({"num_experts": 4097}, ValueError, "num_experts = 4097 is more than the 4096 .* pass implementation='xla'"),
    ),
    *all_of(
        "solve assign balance",
        ({"load": [2] * 32}, TypeError, "load must be an int32 or float32 array, got list"),
        ({"load": LOAD.astype(np.float16)}, TypeError, "load must have dtype int32 or float32, got float16"),
        ({"load": LOAD.astype(np.int64)}, TypeError, "load must have dtype int32 or float32, got int64"),
        ({"load": LOAD.astype(np.float64)}, TypeError, "load must have dtype int32 or float32, got float64"),
        ({"load": LOAD[:31]}, ValueError, r"load must have shape \[num_experts\] = \[32\], got shape \(31,\)"),
        ({"load": LOAD[None]}, ValueError, r"load must have shape \[num_experts\] = \[32\], got shape \(1, 32\)"),
        ({"load": LOAD[0, ...]}, ValueError, r"load must have shape \[num_experts\] = \[32\], got shape \(\)"),
        ({"placement": None}, TypeError, r"placement must be a jax_lplb\.Placement, got NoneType"),
        ({"placement": "cube"}, TypeError, r"placement must be a jax_lplb\.Placement, got str"),
        ({"placement": PLACE.phy2log}, TypeError, r"placement must be a jax_lplb\.Placement, got "),
        ({"placement": topology.cube()}, TypeError, r"placement must be a jax_lplb\.Placement, got Topology"),
        (
            {"placement": STACKED},
            ValueError,
            r"placement must be of one layer.* got .*\(2, 48\) and \(2, 32, 2\).* use jax\.vmap or jax\.lax\.scan",
        ),
    ),
    *all_of(
        "assign",
        ({"load": LOAD.astype(np.float32)}, TypeError, "load must have dtype int32 to number tokens, got float32"),
        ({"split": np.ones((32, 3), np.float32)}, ValueError, r"split must have shape .* \[32, 2\], got .*\(32, 3\)"),
        ({"split": np.ones((32,), np.float32)}, ValueError, r"split must have shape .* \[32, 2\], got .*\(32,\)"),
        ({"split": np.ones((2, 32), np.float32)}, ValueError, r"split must have shape .* \[32, 2\], got .*\(2, 32\)"),
        ({"split": np.ones((32, 2), np.int32)}, TypeError, "split must have dtype float32, got int32"),
        ({"split": np.ones((32, 2), np.float64)}, TypeError, "split must have dtype float32, got float64"),
        ({"split": [[1.0, 1.0]] * 32}, TypeError, "split must be a float32 array, got list"),
        ({"split": None}, TypeError, "split must be a float32 array, got NoneType"),
        ({"offset": 0.5}, TypeError, r"offset must .*int32.*, got (0\.5|float)"),
        ({"offset": LOAD.astype(np.float32)}, TypeError, "offset must have dtype int32, got float32"),
        ({"offset": LOAD.astype(np.int64)}, TypeError, "offset must have dtype int32, got int64"),
        ({"offset": LOAD[:31]}, ValueError, r"offset must have shape \[num_experts\] = \[32\], got .*\(31,\)"),
        ({"offset": LOAD[None]}, ValueError, r"offset must have shape \[num_experts\] = \[32\], got .*\(1, 32\)"),
        ({"offset": 2**31}, ValueError, "offset must be .*, got 2147483648"),
        ({"offset": "none"}, TypeError, "offset must be .*, got .*(str|none)"),
        ({"offset": None}, TypeError, "offset must be .*, got None"),
    ),
    *all_of(
        "solve balance",
        ({"tol": -1e-3}, ValueError, r"tol must be in \[0, 1\), got -0\.001"),
        ({"tol": 1.0}, ValueError, r"tol must be in \[0, 1\), got 1\.0"),
        ({"tol": float("nan")}, ValueError, r"tol must be in \[0, 1\), got nan"),
        ({"tol": np.full(3, 1e-4)}, TypeError, "tol must be a Python float, got "),
        ({"tol": np.float32(1e-4)[None]}, TypeError, "tol must be a Python float, got "),
        ({"tol": "1e-4"}, TypeError, "tol must be a Python float, got '1e-4'"),
        ({"tol": None}, TypeError, "tol must be a Python float, got None"),
    ),
    *all_of(
        "count_load assign balance",
        ({"num_sms": 0}, ValueError, "num_sms must be at least 1, got 0; pass None for no limit"),
        ({"num_sms": -8}, ValueError, "num_sms must be at least 1, got -8"),
        ({"num_sms": 8.0}, TypeError, r"num_sms must be an integer or None, got 8\.0"),
        ({"num_sms": True}, TypeError, "num_sms must be an integer or None, got True"),
        ({"num_sms": "all"}, TypeError, "num_sms must be an integer or None, got 'all'"),
        ({"num_sms": np.array(8)}, TypeError, r"num_sms must be an integer or None, got (array|.*Tracer)"),
    ),
    *all_of(
        "balance",
        (
            {"sync": "allgather"},
            ValueError,
            r"sync must be one of \(None, 'all_gather', 'peer', 'psum'\), got 'allgather'",
        ),
        ({"sync": 0}, ValueError, r"sync must be one of \(None, 'all_gather', 'peer', 'psum'\), got 0"),
        ({"axis_name": "ep"}, ValueError, r"axis_name = 'ep' is not bound here; call this inside jax\.shard_map"),
        ({"axis_name": ("dp", "ep")}, ValueError, r"axis_name = \('dp', 'ep'\) is not bound here"),
    ),
    *all_of(
        "count_load solve assign balance",
        ({"implementation": "cuda"}, ValueError, "implementation must be None, 'ffi' or 'xla', got 'cuda'"),
        ({"implementation": "FFI"}, ValueError, "implementation must be None, 'ffi' or 'xla', got 'FFI'"),
        ({"implementation": 1}, ValueError, "implementation must be None, 'ffi' or 'xla', got 1"),
    ),
    # Also where nothing is left to choose between.
    *all_of(
        "solve balance",
        (
            {"placement": NO_COPIES, "implementation": "cuda"},
            ValueError,
            "implementation must be None, 'ffi' or 'xla', got 'cuda'",
        ),
    ),
    (
        "assign",
        {"placement": NO_COPIES, "split": np.ones((32, 1), np.float32), "implementation": "cuda"},
        ValueError,
        "implementation must be None, 'ffi' or 'xla', got 'cuda'",
    ),
]


def is_wide(value) -> bool:
    """Whether only a JAX with 64-bit types traces the value as it is."""
    return isinstance(value, np.ndarray) and value.dtype.itemsize == 8 and value.dtype.kind in "if"


@pytest.mark.smoke
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("function", "changed", "error", "message"), CASES, ids=[f"{case[0]} {' '.join(case[1])}" for case in CASES]
)
def test_refuses(function, changed, error, message, traced):
    arguments = GOOD[function] | changed
    arrays = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, (np.ndarray, lplb.Placement)) and name not in ("tol", "num_experts")
    }
    static = {name: value for name, value in arguments.items() if name not in arrays}
    with contextlib.ExitStack() as stack:
        if any(map(is_wide, changed.values())):
            stack.enter_context(jax.enable_x64(True))
        stack.enter_context(pytest.raises(error, match=message))
        if traced:
            jax.eval_shape(lambda arrays: getattr(lplb, function)(**static, **arrays), arrays)
        else:
            getattr(lplb, function)(**arguments)


@pytest.mark.parametrize("function", ["solve", "balance"])
def test_refuses_a_traced_tolerance(function):
    with pytest.raises(TypeError, match=r"tol must be a Python float, got .*Tracer"):
        jax.jit(lambda tol: getattr(lplb, function)(**GOOD[function], tol=tol))(1e-4)


def test_refuses_a_traced_number_of_experts():
    with pytest.raises(TypeError, match=r"num_experts must be an integer, got .*Tracer"):
        jax.jit(lambda num_experts: lplb.count_load(IDS, num_experts))(32)


@pytest.mark.parametrize("function", ["count_load", "assign", "balance"])
def test_works_with_64_bit_types(platform, implementation, function):
    """With them enabled int32 arguments stay int32, and results are the same."""
    arrays = dict(GOOD[function])
    arguments = {"num_experts": arrays.pop("num_experts")} if "num_experts" in arrays else {}
    call = jax.jit(lambda arrays: getattr(lplb, function)(**arrays, **arguments, implementation=implementation))
    expected = call(arrays)
    with jax.enable_x64(True):
        got = call(arrays)
    check_same(got, expected)


def check_same(got, expected):
    for value, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert value.dtype == other.dtype
        np.testing.assert_array_equal(value, other)


@pytest.fixture(scope="module")
def mesh():
    """A mesh of 8 CPU devices, as 2 x 4."""
    return jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("dp", "ep"))


def sharded(mesh, place, ids=None, **options):
    """Traces a sharded `balance` whose ids are sharded over the whole mesh."""
    ids = jax.ShapeDtypeStruct((64, 4), jnp.int32) if ids is None else ids
    spec = jax.P(("dp", "ep"))
    run = jax.shard_map(
        lambda ids: lplb.balance(ids, place, **options).physical_ids, mesh=mesh, in_specs=spec, out_specs=spec
    )
    return jax.eval_shape(run, ids)


@pytest.mark.parametrize("load", [None, LOAD, LOAD.astype(np.float32)], ids=["own load", "int32 load", "float32 load"])
@pytest.mark.parametrize("sync", ["all_gather", "peer", "psum"])
def test_sharded_works_with_64_bit_types(mesh, sync, load):
    spec, everywhere = jax.P(("dp", "ep")), jax.P()
    run = jax.jit(
        jax.shard_map(
            lambda ids: lplb.balance(ids, PLACE, axis_name=("dp", "ep"), sync=sync, load=load),
            mesh=mesh,
            in_specs=spec,
            out_specs=lplb.Balanced(spec, *[everywhere] * 6),
        )
    )
    expected = run(IDS)
    with jax.enable_x64(True):
        got = run(IDS)
    check_same(got, expected)


@pytest.mark.parametrize("load", [None, LOAD], ids=["own load", "load given"])
@pytest.mark.parametrize("sync", ["all_gather", "peer", "psum"])
def test_axes_must_have_as_many_devices_as_ranks(mesh, sync, load):
    def check(axis_name, size, place):
        message = rf"axis_name = .* spans {size} devices, but placement has num_ranks = {place.num_ranks}"
        with pytest.raises(ValueError, match=message):
            sharded(mesh, place, axis_name=axis_name, sync=sync, load=load)

    check("dp", 2, PLACE)
    check("ep", 4, PLACE)
    check(("ep",), 4, PLACE)
    check(("dp", "ep"), 8, helpers.placement(topology.ring(4), 32, 4, 1))
    check(("dp", "ep"), 8, helpers.placement(topology.ring(8), 32, 16, 1))
    for axes in (("dp", "ep"), ("ep", "dp")):
        assert sharded(mesh, PLACE, axis_name=axes, sync=sync, load=load).shape == (64, 4)
    ring = helpers.placement(topology.ring(4), 32, 4, 1)
    assert sharded(mesh, ring, axis_name="ep", sync=sync, load=load).shape == (64, 4)


def test_axis_must_be_bound(mesh):
    for axis_name in ("expert", ("dp", "expert")):
        with pytest.raises(ValueError, match=r"axis_name = .* is not bound here; call this inside jax\.shard_map"):
            sharded(mesh, PLACE, axis_name=axis_name)


@pytest.mark.parametrize("shape", [(2**31,), (2**28, 8), (2**16, 2**15, 2), (2**31 + 5, 1)], ids=str)
@pytest.mark.parametrize("function", ["count_load", "assign", "balance"])
def test_too_many_tokens(function, shape):
    """Counts and token numbers are int32. Nothing is allocated: these are shapes only."""
    arguments = {name: value for name, value in GOOD[function].items() if name != "expert_ids"}
    with pytest.raises(ValueError, match=r"expert_ids.* 2147483647"):
        jax.eval_shape(lambda ids: getattr(lplb, function)(ids, **arguments), jax.ShapeDtypeStruct(shape, jnp.int32))


def test_as_many_tokens_as_can_be(implementation):
    ids = jax.ShapeDtypeStruct((2**31 - 1, 1), jnp.int32)
    out = jax.eval_shape(lambda ids: lplb.balance(ids, PLACE, implementation=implementation), ids)
    assert out.physical_ids.shape == ids.shape


def test_too_many_tokens_over_the_axis(mesh):
    ids = jax.ShapeDtypeStruct((2**28, 8), jnp.int32)
    with pytest.raises(ValueError, match="expert_ids: 268435456 ids on 8 shards are more than 2147483647"):
        sharded(mesh, PLACE, ids, axis_name=("dp", "ep"))


BEYOND = {
    "130 ranks a group": (lambda: helpers.placement(topology.ring(130), 130, 130, 1), "130 ranks a group", 128),
    "2052 slots a group": (
        lambda: helpers.placement(topology.ring(2), 2048, 2, 2),
        "2052 physical experts a group",
        2048,
    ),
    "4104 experts": (lambda: helpers.placement(topology.ring(2), 4104, 8, 2), "4104 experts", 4096),
}


@pytest.mark.parametrize("default", [None, "ffi"])
@pytest.mark.parametrize("case", BEYOND)
def test_beyond_the_limits_of_the_custom_calls(default, case):
    build, what, limit = BEYOND[case]
    place = build()
    split = np.ones(place.log2phy.shape, np.float32)
    load = np.ones(place.num_experts, np.int32)
    message = f"placement has {what}, .* at most {limit} .*pass implementation='xla'"
    for call in (
        lambda: lplb.balance(IDS, place, implementation=default),
        lambda: lplb.solve(load, place, implementation=default),
        lambda: lplb.assign(IDS, split, place, load=load, implementation=default),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call)


@pytest.mark.parametrize("case", ["130 ranks a group", "4104 experts"])
def test_beyond_the_limits_in_pure_jax(platform, rng, case):
    place = BEYOND[case][0]()
    ids = helpers.skewed_ids(rng, 3000, 2, place.num_experts)
    load = np.bincount(ids.ravel(), minlength=place.num_experts).astype(np.int32)

    @jax.jit
    def run(ids, load):
        solution = lplb.solve(load, place, implementation="xla")
        physical_ids = lplb.assign(ids, solution.split, place, load=load, implementation="xla")
        return lplb.count_load(ids, place.num_experts, implementation="xla"), solution, physical_ids

    counted, solution, physical_ids = run(ids, load)
    np.testing.assert_array_equal(counted, load)
    np.testing.assert_array_equal(place.phy2log[physical_ids], ids)
    assert np.all(solution.status == lplb.Status.CONVERGED)
    most = helpers.rank_loads(solution.split, place).reshape(place.num_groups, -1).max(axis=1)
    # Within the gap certified, and float32's rounding.
    assert np.all(most * (1 - np.asarray(solution.gap)) <= helpers.optimum(load, place) * (1 + 1e-6))
    assert np.all(solution.gap <= 1e-4)


PER_BATCH = {"num_experts": 32, "num_ranks": 8, "redundants_per_rank": 2}
PLANNED = lplb.Placement.per_batch(**PER_BATCH)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_experts": 32.0}, TypeError, r"num_experts must be an integer, got 32\.0"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"num_ranks": "8"}, TypeError, "num_ranks must be an integer, got '8'"),
        ({"num_ranks": 0}, ValueError, "num_ranks must be at least 1, got 0"),
        ({"redundants_per_rank": -1}, ValueError, "redundants_per_rank must be at least 0, got -1"),
        (
            {"redundants_per_rank": 29},
            ValueError,
            "redundants_per_rank = 29 gives a rank 33 slots, more than the 32 experts of its group: at most 28",
        ),
        ({"num_groups": 8}, ValueError, "redundants_per_rank = 2 gives a rank 6 slots, more than the 4 experts"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
        ({"num_groups": 3}, ValueError, "num_groups must divide num_ranks = 8, got 3"),
        ({"max_replicas": 2.0}, TypeError, r"max_replicas must be an integer, got 2\.0"),
        ({"max_replicas": 1}, ValueError, "max_replicas must be at least 2, got 1"),
        ({"max_replicas": 9}, ValueError, "max_replicas must be at most the 8 ranks of a group, got 9"),
        (
            {"max_replicas": 3, "num_groups": 4},
            ValueError,
            "max_replicas must be at most the 2 ranks of a group, got 3",
        ),
        ({"target": "1"}, TypeError, "target must be a number, got '1'"),
        ({"target": True}, TypeError, "target must be a number, got True"),
        ({"target": None}, TypeError, "target must be a number, got None"),
        ({"target": 0.99}, ValueError, r"target must be at least 1, the busiest rank over the mean; got 0\.99"),
        ({"target": float("nan")}, ValueError, "target must be .*finite, got nan"),
        ({"target": float("inf")}, ValueError, "target must be .*finite, got inf"),
        ({"min_tokens": 1.5}, TypeError, r"min_tokens must be an integer, got 1\.5"),
        ({"min_tokens": -1}, ValueError, "min_tokens must be at least 0, got -1"),
        ({"max_sends": 1.5}, TypeError, r"max_sends must be an integer, got 1\.5"),
        ({"max_sends": 0}, ValueError, "max_sends must be at least 1, got 0"),
    ],
)
def test_per_batch_refuses(changed, error, message):
    with pytest.raises(error, match=message):
        lplb.Placement.per_batch(**PER_BATCH | changed)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("place", "changed", "error", "message"),
    [
        (PLANNED, {"load": [2] * 32}, TypeError, "load must be an int32 or float32 array, got list"),
        (PLANNED, {"load": LOAD.astype(np.float16)}, TypeError, "load must be .*array, got float16"),
        (PLANNED, {"load": LOAD[:31]}, ValueError, r"load must have shape .* \[\.\.\., 32\], got \(31,\)"),
        (PLANNED, {"load": LOAD[0, ...]}, ValueError, r"load must have shape .* \[\.\.\., 32\], got \(\)"),
        (PLANNED, {"implementation": "cuda"}, ValueError, "implementation must be None, 'ffi' or 'xla', got 'cuda'"),
        (PLACE, {}, ValueError, r"choose needs a placement with free slots .*Placement\.per_batch.* select chooses"),
        (lplb.Placement.per_batch(**PER_BATCH | {"redundants_per_rank": 0}), {}, ValueError, "with free slots"),
    ],
)
def test_choose_refuses(place, changed, error, message, traced):
    arguments = {"load": LOAD} | changed
    choose = partial(place.choose, **arguments)
    if traced and isinstance(arguments["load"], np.ndarray):
        choose = partial(jax.eval_shape, lambda load: place.choose(**arguments | {"load": load}), arguments["load"])
    with pytest.raises(error, match=message):
        choose()


def test_the_limits_of_choose_are_those_of_balance():
    place = lplb.Placement.per_batch(num_experts=130, num_ranks=130, redundants_per_rank=1)
    load = np.arange(130, dtype=np.int32)
    for default in (None, "ffi"):
        with pytest.raises(ValueError, match=r"placement has 130 ranks a group, .* pass implementation='xla'"):
            place.choose(load, implementation=default)
    chosen = place.choose(load, implementation="xla")
    assert helpers.optimum(load, jax.tree.map(np.asarray, chosen)) < 1.1 * load.mean() < load.max() / 1.1


def test_plans_with_64_bit_types(implementation):
    """As without them: of a load's own, of loads given, and by choose."""
    place, ids = lplb.Placement.per_batch(**PER_BATCH | {"target": 1.0}), IDS % 13

    @jax.jit
    def run(ids, load):
        out = lplb.balance(ids, place, load=load, implementation=implementation)
        return out, place.choose(load, implementation=implementation)

    load = np.bincount(ids.ravel(), minlength=32).astype(np.float32)
    expected = run(ids, load)
    with jax.enable_x64(True):
        check_same(run(ids, load), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize(
    ("huge", "like"),
    [
        ({"max_sends": 2**40}, {}),
        ({"min_tokens": 2**40}, {"redundants_per_rank": 0}),
        ({"min_tokens": 2**200}, {"redundants_per_rank": 0}),
        ({"target": 1e300}, {"redundants_per_rank": 0}),
    ],
)
def test_numbers_beyond_those_of_the_device(implementation, huge, like, dtype):
    """Say the same as the largest ones that matter: any number of copies, or none."""
    load = np.arange(32, dtype=dtype)
    place = lplb.Placement.per_batch(**PER_BATCH | huge)
    held = np.asarray(jax.jit(partial(place.choose, implementation=implementation))(load).phy2log)
    expected = lplb.Placement.per_batch(**PER_BATCH | like)
    if expected.planning is not None:
        expected = expected.choose(load, implementation="ffi")
    np.testing.assert_array_equal(held[held >= 0], np.asarray(expected.phy2log)[np.asarray(expected.phy2log) >= 0])


def test_layers_are_mapped_or_scanned_over_as_the_error_says(rng):
    """All that refuse a stacked placement; each layer as alone."""
    ids = rng.integers(0, 32, (2, 16, 4)).astype(np.int32)
    rows = {"w": rng.normal(size=(2, 32, 3)).astype(np.float32)}
    layers = lplb.Placement.from_topology(
        topology.cube(), num_experts=32, num_ranks=8, redundants_per_rank=2, load=rng.lognormal(0, 1, (2, 32))
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]), ("ep",))
    split = np.ones((32, 2), np.float32)
    calls = {
        "solve": (lambda ids, rows, place: lplb.solve(jnp.bincount(ids.ravel(), length=32), place).split),
        "assign": (lambda ids, rows, place: lplb.assign(ids, split, place, load=jnp.bincount(ids.ravel(), length=32))),
        "balance": (lambda ids, rows, place: lplb.balance(ids, place).physical_ids),
        "from_logical": (lambda ids, rows, place: lplb.from_logical(rows, place)["w"]),
        "to_logical": (lambda ids, rows, place: lplb.to_logical(rows, place)["w"]),
        "permute_experts": (lambda ids, rows, place: lplb.permute_experts(rows, place, PLACE)["w"]),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"jax\.vmap or jax\.lax\.scan"):
            call(ids[0], jax.tree.map(lambda leaf: leaf[0], rows), layers)
        mapped = jax.jit(jax.vmap(call))(ids, rows, layers)
        scanned = jax.jit(lambda *xs, call=call: jax.lax.scan(lambda _, x: (None, call(*x)), None, xs)[1])(
            ids, rows, layers
        )
        for layer in range(2):
            alone = call(*jax.tree.map(lambda leaf, layer=layer: leaf[layer], (ids, rows, layers)))
            np.testing.assert_array_equal(mapped[layer], alone, err_msg=name)
            np.testing.assert_array_equal(scanned[layer], alone, err_msg=name)

    def replicate(rows, places):
        with pytest.raises(ValueError, match=r"jax\.vmap or jax\.lax\.scan"):
            lplb.replicate(rows, places, "ep")
        return jax.vmap(lambda rows, place: lplb.replicate(rows, place, "ep"))(rows, places)

    spec = jax.P(None, "ep")
    run = jax.jit(jax.shard_map(replicate, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec))
    home = jax.vmap(lplb.from_logical)(rows, layers)
    np.testing.assert_array_equal(
        run(home, layers)["w"], np.take_along_axis(rows["w"], layers.phy2log[:, :, None], axis=1)
    )


def test_other_cures_that_errors_name_work(mesh):
    """What to convert, to pass, or to use instead; the rest is tested beside the errors."""
    np.testing.assert_array_equal(lplb.count_load(jnp.asarray(IDS, jnp.int8).astype(jnp.int32), 32), LOAD)
    assert lplb.count_load(IDS, 5000, implementation="xla").shape == (5000,)
    lplb.count_load(IDS, 32, num_sms=None)
    plain = lplb.Placement.from_eplb(np.arange(32), num_ranks=8, redundants_per_rank=2)
    with pytest.raises(ValueError, match="pass solver='ipm' or 'auto'"):
        lplb.solve(LOAD, plain, solver="edge_balance")
    for solver in ("ipm", "auto"):
        assert lplb.solve(LOAD, plain, solver=solver).split.shape == plain.log2phy.shape
    with pytest.raises(ValueError, match=r"make a new Placement\.from_eplb instead"):
        plain.select(LOAD)
    with pytest.raises(TypeError, match=r"Inside jit, Placement\.select of a placement along a topology"):
        jax.jit(lambda load: lplb.Placement.from_eplb(load, num_ranks=8, redundants_per_rank=2))(LOAD)
    assert jax.jit(PLACE.select)(LOAD).phy2log.shape == PLACE.phy2log.shape
    assert jax.jit(PLANNED.choose)(LOAD).phy2log.shape == PLANNED.phy2log.shape
    with pytest.raises(ValueError, match="num_experts and max_replicas must be given where phy2log is traced"):
        jax.jit(lambda v: lplb.Placement.from_phy2log(v, 8))(PLACE.phy2log)
    with pytest.raises(ValueError, match=r"call this inside jax\.shard_map over a mesh with that axis"):
        lplb.balance(IDS, PLACE, axis_name=("dp", "ep"))
    assert sharded(mesh, PLACE, axis_name=("dp", "ep")).shape == (64, 4)


# ---- Names -----------------------------------------------------------------------------------------------------------


def test_public_names_are_those_documented():
    """What `dir` shows, what a star brings, and what docs/api.md lists."""
    for name in ("topology", "eplb", "flax"):
        if name == "flax":
            pytest.importorskip("flax")
        module = importlib.import_module(f"jax_lplb.{name}")
        assert dir(module) == sorted(module.__all__)
        assert all(getattr(module, public).__module__ == module.__name__ for public in module.__all__)
    star: dict[str, object] = {}
    exec("from jax_lplb import *", star)
    assert set(star) - {"__builtins__"} == set(lplb.__all__)
    assert {name for name in dir(lplb) if not name.startswith("_")} - {"flax"} == set(lplb.__all__)
    docs = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
    (listed,) = re.findall(r"^Public names: (.*?)\. Everything", docs.read_text(), re.MULTILINE)
    assert set(re.findall(r"`([\w.]+)`", listed)) == {*lplb.__all__, "flax.MoE", "__version__"}


def test_version_is_that_of_the_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", lplb.__version__)
    project = (pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project  # of one source: jax_lplb/__init__.py
    assert 'metadata.version.input = "jax_lplb/__init__.py"' in project


def batches() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    some = rng.integers(0, 32, (64, 8), np.int32)
    return {
        "all padding": np.full((64, 8), -1, np.int32),
        "padding past the end": np.full((64, 8), 32, np.int32),
        "padding of all kinds": rng.choice(np.array([-1, 32, 2**31 - 1, -(2**31), 5], np.int32), (64, 8)),
        "one token": np.array([[7]], np.int32),
        "no tokens": np.zeros((0, 8), np.int32),
        "one hot expert": np.full((64, 8), 4, np.int32),
        "one hot expert without copies": np.full((64, 8), 7, np.int32),
        "every token on one rank": 4 + some % 4,
        "a rank with no tokens": np.where(some // 4 == 3, 0, some),
        "half the ranks with no tokens": some % 16,
        "the same choice eight times": np.tile(some[:, :1], 8),
    }


@cache
def balancer(case: str, implementation: str):
    place = {"copies": PLACE, "no copies": NO_COPIES}[case]
    return place, jax.jit(lambda ids: lplb.balance(ids, place, implementation=implementation))


@pytest.mark.parametrize("batch", batches())
@pytest.mark.parametrize("case", ["copies", "no copies"])
def test_no_batch_raises_or_loses_a_token(platform, implementation, case, batch):
    place, balance = balancer(case, implementation)
    ids = batches()[batch]
    out = jax.tree.map(np.asarray, balance(ids))
    valid = (ids >= 0) & (ids < 32)
    load = np.bincount(ids[valid], minlength=32)

    assert out.physical_ids.shape == ids.shape
    assert np.all(out.physical_ids[~valid] == -1)
    np.testing.assert_array_equal(place.phy2log[out.physical_ids[valid]], ids[valid])
    np.testing.assert_array_equal(out.load, load)
    per_rank = np.bincount(out.physical_ids[valid] // place.slots_per_rank, minlength=8)
    np.testing.assert_array_equal(out.rank_load, per_rank)
    assert out.status.tolist() == [lplb.Status.CONVERGED if case == "copies" else lplb.Status.SKIPPED]
    assert 0 <= out.gap[0] <= 1e-4
    # A rank holds four replicas of replicated experts, whose shares are rounded to whole tokens.
    assert per_rank.max() <= helpers.optimum(load, place)[0] * (1 + 2e-4) + (2 if case == "copies" else 0)


BUILT_MAJOR, BUILT_MINOR = _handlers.ffi_api_version


def with_jaxlib_of(folder, version: tuple[int, int]) -> list[str]:
    """Lines that a new Python prints whose jaxlib has headers of another version of the FFI's API."""
    header = folder / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR {}\n#define XLA_FFI_API_MINOR {}\n".format(*version))
    script = f"""
        import jax
        import numpy as np

        jax.ffi.include_dir = lambda: {str(folder)!r}
        import jax_lplb as lplb
        from jax_lplb import _ffi

        print("cpu" in _ffi.handlers())
        ids = np.array([[0, 1], [2, 1]], np.int32)
        print(lplb.count_load(ids, 4))
        try:
            print(lplb.count_load(ids, 4, implementation="ffi"))
        except RuntimeError as error:
            print(error)
        """
    return helpers.new_python(textwrap.dedent(script)).splitlines()


@pytest.mark.parametrize("version", [(BUILT_MAJOR, BUILT_MINOR - 1), (BUILT_MAJOR + 1, 0)])
def test_handlers_that_jaxlib_would_refuse_are_not_registered(tmp_path, version):
    """XLA would fail the first JAX call of the process; pure JAX runs instead, and custom calls say why they do not."""
    registered, load, error = with_jaxlib_of(tmp_path, version)
    assert registered == "False"
    assert load == "[1 2 1 0]"
    assert "custom call lplb_count is not registered" in error
    assert f"built for XLA FFI API {BUILT_MAJOR}.{BUILT_MINOR}" in error
    assert "the installed jaxlib has {}.{}; rebuild jax_lplb, or install a newer jaxlib".format(*version) in error


@pytest.mark.parametrize("version", [(BUILT_MAJOR, BUILT_MINOR), (BUILT_MAJOR, BUILT_MINOR + 1)])
def test_handlers_that_jaxlib_accepts_are_registered(tmp_path, version):
    assert with_jaxlib_of(tmp_path, version) == ["True", "[1 2 1 0]", "[1 2 1 0]"]


@pytest.mark.parametrize("function", GOOD)
def test_unregistered_handlers_are_named(monkeypatch, function):
    monkeypatch.setattr(_ffi, "_PLATFORMS", frozenset())
    monkeypatch.setattr(_ffi, "_WHY_NOT", "because of the test")
    with pytest.raises(RuntimeError, match=r"custom call lplb_.* is not registered: because of the test"):
        getattr(lplb, function)(**GOOD[function], implementation="ffi")


def test_warns_where_gpus_run_pure_jax(monkeypatch):
    """Were there a CUDA plugin, and no handlers for it."""
    monkeypatch.setattr(_ffi, "_WHY_NOT", "because of the test")
    monkeypatch.setattr(_ffi, "_cuda_plugin_installed", lambda: True)
    with pytest.warns(RuntimeWarning, match="pure JAX on NVIDIA GPUs: because of the test"):
        lplb.count_load(IDS, 32)
