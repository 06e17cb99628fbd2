"""`count_load` against NumPy's bincount."""

from functools import partial

import jax
import numpy as np
import pytest

import jax_lplb as lplb

INT32 = np.iinfo(np.int32)


def reference(ids: np.ndarray, num_experts: int) -> np.ndarray:
    return np.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts)


def check(ids: np.ndarray, num_experts: int, implementation: str) -> None:
    load = jax.jit(partial(lplb.count_load, num_experts=num_experts, implementation=implementation))(ids)
    assert load.dtype == np.int32
    np.testing.assert_array_equal(load, reference(ids, num_experts))


# Around the sizes of chunks; for one thread block, a cluster of them and two kernels; for chunks of several sizes.
@pytest.mark.parametrize("num_ids", [0, 1, 255, 256, 257, 2048, 5001, 32_768, 131_073, 300_000])
@pytest.mark.parametrize("num_experts", [1, 7, 256, 1024, 1025, 4096])
def test_every_size(platform, implementation, rng, num_ids, num_experts):
    check(rng.integers(0, num_experts, num_ids, np.int32), num_experts, implementation)


@pytest.mark.smoke
@pytest.mark.parametrize("topk", range(1, 9))
def test_every_topk(platform, implementation, rng, topk):
    check(rng.integers(-1, 60, (515, topk), np.int32), 60, implementation)


@pytest.mark.parametrize("shape", [(13,), (13, 4), (3, 5, 4), (2, 3, 5, 4), (0, 8), (4, 0, 8)])
def test_every_rank_of_ids(platform, implementation, rng, shape):
    check(rng.integers(0, 11, shape, np.int32), 11, implementation)


@pytest.mark.parametrize("padding", [-1, 9, INT32.min, INT32.max, -9, 10], ids="id{}".format)
def test_padding_is_not_counted(platform, implementation, rng, padding):
    ids = rng.integers(0, 9, (700, 3), np.int32)
    ids[rng.random(ids.shape) < 0.4] = padding
    check(ids, 9, implementation)


@pytest.mark.parametrize("padding", [-1, 9, INT32.min, INT32.max], ids="id{}".format)
def test_nothing_but_padding(platform, implementation, padding):
    check(np.full((2000, 2), padding, np.int32), 9, implementation)


@pytest.mark.parametrize("expert", [0, 100, 255])
def test_all_tokens_on_one_expert(platform, implementation, expert):
    check(np.full((9000, 8), expert, np.int32), 256, implementation)


@pytest.mark.parametrize("num_ids", [5, 1023, 3001])
def test_vmapped(platform, implementation, rng, num_ids):
    """An odd number of ids: all batch elements but the first begin at odd addresses."""
    ids = rng.integers(-2, 40, (3, 2, num_ids), np.int32)

    def count(ids):
        return lplb.count_load(ids, 37, implementation=implementation)

    expected = [[reference(element, 37) for element in row] for row in ids]
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(count)))(ids), expected)
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(count, in_axes=1))(ids), [reference(ids[:, i], 37) for i in range(2)]
    )


@pytest.mark.parametrize("num_sms", [1, 2, 3, 7, 8, 100, np.int32(5), 2**40])
def test_number_of_thread_blocks_does_not_matter(platform, implementation, rng, num_sms):
    """Few blocks go through many chunks and batch elements; smaller clusters and two kernels count."""
    for num_ids in (0, 300, 8192, 150_001):
        ids = rng.integers(-1, 257, (3, num_ids), np.int32)
        count = partial(lplb.count_load, num_experts=256, num_sms=num_sms, implementation=implementation)
        np.testing.assert_array_equal(jax.jit(jax.vmap(count))(ids), [reference(row, 256) for row in ids])


def test_default_implementation(platform, rng):
    """Called eagerly and under jit."""
    ids = rng.integers(-1, 300, (2000, 8), np.int32)
    np.testing.assert_array_equal(lplb.count_load(ids, 256), reference(ids, 256))
    np.testing.assert_array_equal(jax.jit(lplb.count_load, static_argnums=1)(ids, 256), reference(ids, 256))
