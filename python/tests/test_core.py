# SPDX-License-Identifier: Apache-2.0
"""The layer and the row sets on NumPy arrays."""

import numpy as np
import pytest

import sebp


def to_bf16(array: np.ndarray) -> np.ndarray:
    """Cut small integers, which bfloat16 holds exactly."""
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32)


def integers(*shape: int) -> np.ndarray:
    """Small integers, whose sums are exact in float32, none of them zero."""
    return np.random.choice([-3, -2, -1, 1, 2, 3], shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", ["plain", "padded rows", "transposed"])
def test_exact(dtype, layout):
    m, n, k = np.random.randint(1, 40, 3)
    x, w, bias, dy = integers(m, k), integers(n, k), integers(n), integers(m, n)
    dy[np.random.rand(m) < 0.5] = 0

    def lay(array):
        array = to_bf16(array) if dtype == "bf16" else array
        if layout == "transposed":
            return array.T.copy().T
        if layout == "padded rows" and array.ndim == 2:
            wide = np.ones((array.shape[0], array.shape[1] + 3), array.dtype)
            wide[:, : array.shape[1]] = array
            return wide[:, : array.shape[1]]
        return array

    def check(got, want):
        if dtype == "bf16":
            got, want = from_bf16(got), want.astype(np.float32)
            np.testing.assert_allclose(got, want, rtol=2**-8)
        else:
            np.testing.assert_array_equal(got, want)

    y = sebp.linear_forward(lay(x), lay(w), lay(bias))
    check(y, x @ w.T + bias)
    dx, dw, db = sebp.linear_backward(lay(dy), lay(x), lay(w))
    check(dx, dy @ w)
    check(dw, dy.T @ x)
    check(db, dy.sum(0))


def test_given_rows():
    x, w, dy = integers(9, 4), integers(5, 4), integers(9, 5)
    rows = sebp.Rows.from_indices([1, 4, 8], 9)
    mask = np.isin(np.arange(9), rows.indices)[:, None]
    y = sebp.linear_forward(x, w, rows=rows)
    np.testing.assert_array_equal(y, (x @ w.T) * mask)
    compact = sebp.linear_forward(x[rows.indices], w, rows=rows, x_is_compact=True)
    np.testing.assert_array_equal(compact, y)
    dx, dw, db = sebp.linear_backward(dy, x[rows.indices], w, rows, x_is_compact=True)
    np.testing.assert_array_equal(dx, (dy * mask) @ w)
    np.testing.assert_array_equal(dw, (dy * mask).T @ x)
    np.testing.assert_array_equal(db, (dy * mask).sum(0))


def test_absent_outputs():
    dy, x, w = integers(6, 3), integers(6, 4), integers(3, 4)
    assert [out is None for out in sebp.linear_backward(dy)] == [True, True, False]
    assert [out is None for out in sebp.linear_backward(dy, x=x)] == [True, False, False]
    assert [out is None for out in sebp.linear_backward(dy, w=w, bias=False)] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (1, 1, 1)])
def test_empty(shape):
    m, n, k = shape
    x, w, dy = np.ones((m, k), np.float32), np.ones((n, k), np.float32), np.ones((m, n), np.float32)
    np.testing.assert_array_equal(sebp.linear_forward(x, w), x @ w.T)
    dx, dw, db = sebp.linear_backward(dy, x, w)
    np.testing.assert_array_equal(dx, dy @ w)
    np.testing.assert_array_equal(dw, dy.T @ x)
    np.testing.assert_array_equal(db, dy.sum(0))


def test_rules():
    dy = np.zeros((6, 2), np.float32)
    dy[1] = [1, -1]
    dy[3] = [0.1, 0]
    dy[4] = [np.nan, 0]
    dy[5] = [3, 3]
    assert sebp.Rows.find(dy).indices.tolist() == [1, 3, 4, 5]
    assert sebp.Rows.find(dy, ("threshold", 0.5)).indices.tolist() == [1, 4, 5]
    assert sebp.Rows.find(dy, 2).indices.tolist() == [4, 5]
    assert sebp.Rows.find(dy, ("energy", 0.2)).indices.tolist() == [4, 5]
    finite = np.nan_to_num(dy)
    rows = sebp.Rows.find(finite, 1)
    dropped, energy = rows.dropped(finite)
    assert dropped == 2
    assert energy == pytest.approx(2.01 / 20.01)


def test_row_sets():
    assert len(sebp.Rows.all(4)) == 4
    assert sebp.Rows.from_mask([[1, 0], [0, 2]]).indices.tolist() == [0, 3]
    lengths = sebp.Rows.from_lengths([2, 0, 1], 3)
    assert lengths.indices.tolist() == [0, 1, 6]
    assert lengths.total == 9
    assert lengths.activity == pytest.approx(1 / 3)
    assert sebp.Rows.from_indices([], 3).indices.tolist() == []
    assert repr(lengths) == "Rows(3 of 9)"


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (True, TypeError),
        (1.5, TypeError),
        (None, TypeError),
        ("all", ValueError),
        (("threshold", -1.0), ValueError),
        (("threshold", float("nan")), ValueError),
        (("energy", 1.0), ValueError),
        (("noise", 1.0), ValueError),
    ],
)
def test_bad_rules(rows, error):
    with pytest.raises(error):
        sebp.Rows.find(np.ones((2, 2), np.float32), rows)


def test_bad_arguments():
    x, w = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    with pytest.raises(TypeError, match="float64"):
        sebp.linear_forward(x.astype(np.float64), w)
    with pytest.raises(ValueError, match="3 dimensions"):
        sebp.linear_forward(x[None], w)
    with pytest.raises(sebp.SebpError, match="w is 3x4") as caught:
        sebp.linear_forward(x, np.ones((3, 4), np.float32))
    assert caught.value.status == 6
    with pytest.raises(sebp.SebpError, match="row set"):
        sebp.linear_forward(x, w, rows=sebp.Rows.from_indices([0], 3))
    with pytest.raises(sebp.SebpError):
        sebp.Rows.from_indices([2, 1], 3)
    with pytest.raises(sebp.SebpError):
        sebp.Rows.from_lengths([4], 3)


def test_context():
    with sebp.Context(threads=1, gemm="native") as context:
        assert context.threads == 1 or "SEBP_NUM_THREADS" in __import__("os").environ
        a = integers(64, 64)
        np.testing.assert_array_equal(sebp.linear_forward(a, a, context=context), a @ a.T)
        assert context.scratch_bytes >= 0
    context.close()
    with pytest.raises(sebp.SebpError, match="NULL"):
        sebp.linear_forward(a, a, context=context)
    with pytest.raises(sebp.SebpError, match="threads is -1"):
        sebp.Context(threads=-1)
    with pytest.raises(ValueError):
        sebp.Context(gemm="blas")
    with pytest.raises(ValueError):
        sebp.Context(precision="exact")


@pytest.mark.parametrize(
    "make", [lambda v: sebp.Rows.from_indices(v, 9), lambda v: sebp.Rows.from_lengths(v, 9)]
)
def test_no_whole_numbers(make):
    """What is no list of integers is not made one: a mask, fractions, a table."""
    for values in ([1.0, 2.5], [False, True], ["1"], np.array([1, 2], float)):
        with pytest.raises(TypeError, match="not integers"):
            make(values)
    for values in (np.array([[1, 2]]), 3):
        with pytest.raises(ValueError, match="dimensions, not 1"):
            make(values)
    assert len(make([])) == 0
    assert len(make(np.array([1, 2], np.uint8))) == len(make([1, 2])) > 0
