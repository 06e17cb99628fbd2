"""Grouped matmuls of Hopper GPUs: by the interpreter of Pallas' Mosaic GPU, and on such a GPU where there is one."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_lplb import _grouped_matmul, _hopper_matmul
from jax_lplb._grouped_matmul import grouped_matmul, grouped_matmul_transposed, grouped_outer

# Groups that end within a tile's first and second half, on their edges and on those of steps; empty ones, rows of none.
SIZES = [[100, 0, 200, 64], [1, 129, 63, 191], [384, 0, 0, 0], [0, 3, 100, 0], [0, 0, 0, 0], [8, 120, 128, 127]]
WHERE = [pytest.param(False, id="interpreted"), pytest.param(True, marks=pytest.mark.gpu, id="gpu")]
ROWS, A, B = 384, 256, 384


@pytest.fixture(params=WHERE)
def kernels(request, monkeypatch):
    """Runs what follows as on Hopper."""
    if request.param and not _grouped_matmul.has_hopper():
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(_grouped_matmul, "has_hopper", lambda: True)
    # What is for GPUs runs on any platform.
    monkeypatch.setattr(lax, "platform_dependent", lambda *operands, default, cuda: cuda(*operands))
    with nullcontext() if request.param else plgpu.force_gpu_interpret_mode():
        yield


def drawn(rng, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


def in_float32(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(array).astype(np.float32) for array in arrays]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_times_the_weights_of_their_groups(rng, kernels, is_transposed, sizes):
    """Those beyond the groups are no numbers, and touch nothing."""
    dtype = jnp.float16 if sizes == SIZES[1] else jnp.bfloat16
    depth = 128 if sizes == SIZES[2] else A  # fewer steps than there are stages, or more
    rows, weights = drawn(rng, ROWS, depth, dtype=dtype), drawn(rng, len(sizes), depth, B, dtype=dtype)
    total, (left, right) = sum(sizes), in_float32(rows, weights)
    expected = np.einsum("na,nab->nb", left[:total], right[np.repeat(np.arange(len(sizes)), sizes)])
    function, weights = (
        (grouped_matmul_transposed, weights.swapaxes(1, 2)) if is_transposed else (grouped_matmul, weights)
    )
    got = function(rows.at[total:].set(jnp.nan), weights, jnp.asarray(sizes, jnp.int32), None)
    assert got.dtype == dtype
    np.testing.assert_allclose(in_float32(got)[0][:total], expected, rtol=1e-2, atol=0.05)


@pytest.mark.parametrize("sizes", SIZES)
def test_sums_of_outer_products(rng, kernels, sizes):
    """Of empty groups they are zero; rows beyond the groups count nowhere."""
    dtype = jnp.float16 if sizes == SIZES[1] else jnp.bfloat16
    rows, others = drawn(rng, ROWS, A, dtype=dtype), drawn(rng, ROWS, B, dtype=dtype)
    left, right = in_float32(rows, others)
    ends = np.cumsum(sizes)
    expected = [left[end - size : end].T @ right[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    got = grouped_outer(rows.at[ends[-1] :].set(jnp.nan), others, jnp.asarray(sizes, jnp.int32), None)
    assert got.dtype == dtype
    np.testing.assert_allclose(in_float32(got)[0], np.stack(expected), rtol=1e-2, atol=0.05)


def test_tiles_hold_all_rows_once(rng):
    """As many as there may be at most, whatever the sizes."""
    for _ in range(200):
        sizes = rng.multinomial(rng.integers(0, 1024), rng.dirichlet(np.full(7, 0.3))).astype(np.int32)
        group, start, first, count = np.asarray(_hopper_matmul._tiles(jnp.asarray(sizes), 1024 // 128 + 6))
        held = [
            (of, row)
            for of, begin, length in zip(group, start + first, count, strict=True)
            for row in range(begin, begin + length)
        ]
        assert held == list(zip(np.repeat(np.arange(7), sizes), range(sizes.sum()), strict=True))
        assert (start[count > 0] % 8 == 0).all()
        assert ((first + count)[count > 0] <= 128).all()


@pytest.mark.smoke
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("kernel", ["grouped_matmul", "transposed", "grouped_outer"])
def test_compiles_for_gpus_as_far_as_jax_does_here(kernel, x64):
    """All that Python does of it, layouts of what threads hold included."""
    rows, sizes = jax.ShapeDtypeStruct((ROWS, A), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)
    shape = {"grouped_matmul": (4, A, B), "transposed": (4, B, A), "grouped_outer": (ROWS, B)}[kernel]

    def run(rows, other, sizes):
        if kernel == "grouped_outer":
            return _hopper_matmul.grouped_outer(rows, other, sizes)
        return _hopper_matmul.grouped_matmul(rows, other, sizes, kernel == "transposed")

    with jax.enable_x64(x64):
        traced = jax.jit(run).trace(rows, jax.ShapeDtypeStruct(shape, jnp.bfloat16), sizes)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("rows", "other", "dtype", "fits"),
    [
        ((128, 256), (4, 256, 128), jnp.bfloat16, True),
        ((128, 256), (128, 128), jnp.float16, True),
        ((128, 256), (4, 256, 128), jnp.float32, False),
        ((128, 192), (4, 192, 128), jnp.bfloat16, False),
        ((128, 256), (4, 256, 192), jnp.bfloat16, False),
        ((64, 256), (4, 256, 128), jnp.bfloat16, False),
        ((132, 256), (4, 256, 128), jnp.bfloat16, False),
    ],
)
def test_what_the_kernels_take(rows, other, dtype, fits):
    assert _hopper_matmul.fit(jnp.zeros(rows, dtype), jnp.zeros(other, dtype)) == fits
