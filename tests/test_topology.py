"""Topologies: their exact arrays, and what `from_r2o` refuses."""

import dataclasses

import numpy as np
import pytest

from jax_lplb import topology

CUBE = [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]
HYPERCUBE = [
    [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14],
    [12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("built", "columns"),
    [
        (topology.ring(2), [[1, 0]]),
        (topology.ring(3), [[1, 2, 0]]),
        (topology.ring(8), [[1, 2, 3, 4, 5, 6, 7, 0]]),
        (topology.cube(), CUBE),
        (topology.hypercube(), HYPERCUBE),
        (topology.torus(2, 2), [[2, 3, 0, 1], [1, 0, 3, 2]]),
        (topology.torus(2, 3), [[3, 4, 5, 0, 1, 2], [1, 2, 0, 4, 5, 3]]),
        (topology.torus(3, 2), [[2, 3, 4, 5, 0, 1], [1, 0, 3, 2, 5, 4]]),
    ],
    ids=["ring 2", "ring 3", "ring 8", "cube", "hypercube", "torus 2x2", "torus 2x3", "torus 3x2"],
)
def test_arrays(built, columns):
    np.testing.assert_array_equal(built.r2o, np.array(columns).T, strict=False)
    assert built.r2o.dtype == np.int32
    assert (built.group_size, built.num_columns) == (len(columns[0]), len(columns))


@pytest.mark.parametrize(("rows", "columns"), [(8, 4), (4, 8), (2, 7), (5, 5)])
def test_torus_copies_from_the_next_row_and_the_next_column(rows, columns):
    r2o = topology.torus(rows, columns).r2o
    assert r2o.shape == (rows * columns, 2)
    for i in range(rows):
        for j in range(columns):
            down, right = (i + 1) % rows * columns + j, i * columns + (j + 1) % columns
            assert r2o[i * columns + j].tolist() == [down, right]


@pytest.mark.parametrize("size", [2, 5, 64, 130])
def test_ring_copies_from_the_next_rank(size):
    assert topology.ring(size).r2o[:, 0].tolist() == [*range(1, size), 0]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_from_r2o_takes_any_integers(dtype):
    built = topology.from_r2o(np.array(CUBE, dtype).T)
    assert built == topology.cube()
    assert built.r2o.dtype == np.int32


def test_from_r2o_takes_lists():
    assert topology.from_r2o([[1], [2], [0]]) == topology.ring(3)
    assert topology.from_r2o([[1, 2], [2, 0], [0, 1]]).num_columns == 2


def test_equal_arrays_are_equal_topologies():
    same = topology.from_r2o(np.array(CUBE).T)
    assert same == topology.cube()
    assert hash(same) == hash(topology.cube())
    assert len({same, topology.cube(), topology.ring(8)}) == 2


@pytest.mark.parametrize(
    "other", [topology.ring(8), topology.from_r2o(np.array(CUBE[::-1]).T), topology.hypercube(), "cube", None]
)
def test_other_arrays_are_other_topologies(other):
    assert topology.cube() != other


def test_immutable():
    built = topology.cube()
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.r2o = np.zeros((8, 2), np.int32)
    with pytest.raises(ValueError, match="read-only"):
        built.r2o[0, 0] = 1
    assert built == topology.cube()


def test_keeps_its_own_copy():
    r2o = np.array(CUBE, np.int32).T
    built = topology.from_r2o(r2o)
    r2o[:] = 0
    assert built == topology.cube()


def test_repr_shows_the_columns():
    assert "3 ranks" in repr(topology.ring(3))
    assert "[[1, 2, 0]]" in repr(topology.ring(3))
    assert len(repr(topology.torus(16, 8))) < 200  # the first of each


@pytest.mark.parametrize(
    ("r2o", "error", "message"),
    [
        ([[1, 1], [2, 2], [0, 2]], ValueError, r"r2o column 1: rank 2 copies from itself"),
        ([[1], [0], [0]], ValueError, r"r2o column 0: ranks \[1, 2\] all copy from rank 0.*not a permutation"),
        ([[1, 2], [2, 2], [0, 1]], ValueError, r"r2o column 1: ranks \[0, 1\] all copy from rank 2"),
        ([[1], [3], [0]], ValueError, r"r2o column 0: rank 1 copies from rank 3, but .* 0 to 2"),
        ([[1, 1], [2, -1], [0, 0]], ValueError, r"r2o column 1: rank 1 copies from rank -1"),
        ([[0]], ValueError, r"r2o column 0: rank 0 copies from itself"),
        ([1, 0], ValueError, r"r2o must have shape \[group_size, num_columns\], got shape \(2,\)"),
        ([[[1], [0]]], ValueError, r"r2o must have shape .* got shape \(1, 2, 1\)"),
        (np.zeros((0, 1), int), ValueError, r"r2o must have shape .* got shape \(0, 1\)"),
        (np.zeros((4, 0), int), ValueError, r"r2o must have shape .* got shape \(4, 0\)"),
        ([[1.0], [0.0]], TypeError, r"r2o must hold integer ranks, got dtype float64"),
        ([[True], [False]], TypeError, r"r2o must hold integer ranks, got dtype bool"),
    ],
)
def test_from_r2o_refuses(r2o, error, message):
    with pytest.raises(error, match=message):
        topology.from_r2o(r2o)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: topology.ring(1), ValueError, "num_ranks must be at least 2, got 1"),
        (lambda: topology.ring(-8), ValueError, "num_ranks must be at least 2, got -8"),
        (lambda: topology.ring(8.0), TypeError, r"num_ranks must be an integer, got 8\.0"),
        (lambda: topology.ring(True), TypeError, "num_ranks must be an integer, got True"),
        (lambda: topology.torus(1, 4), ValueError, "num_rows must be at least 2, got 1"),
        (lambda: topology.torus(4, 1), ValueError, "num_columns must be at least 2, got 1"),
        (lambda: topology.torus(4, "4"), TypeError, "num_columns must be an integer, got '4'"),
    ],
)
def test_sizes_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
