# SPDX-License-Identifier: Apache-2.0
"""SparseGrad, MeProp and the sparse AdamW on NumPy arrays, against NumPy in double precision."""

import numpy as np
import pytest

import sebp
from sebp import sparse
from sebp.sparse import AdamW, Basis, BasisSums, Sparse, SparseAdamW


def orthonormal(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.randn(size, size))[0].astype(np.float32)


def dense(kept: Sparse) -> np.ndarray:
    whole = np.zeros(kept.shape)
    whole.flat[kept.indices] = kept.values
    return whole


def top(r: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.argsort(-np.abs(r).ravel(), kind="stable")[:k])


@pytest.mark.parametrize("rotation", ["auto", "factors", "dy", "x", "out_in", "in_out"])
def test_step(rotation):
    n, k, m = 17, 11, 23
    basis = Basis.from_vectors(orthonormal(n)[:9], orthonormal(k)[:7])
    assert (basis.shape, basis.rank, basis.bytes) == ((n, k), (9, 7), 4 * (9 * n + 7 * k))
    assert all(np.isnan(basis.shares))
    u_out, u_in = basis.u_out.astype(float), basis.u_in.astype(float)
    dy, x = (np.random.randn(m, size).astype(np.float32) for size in (n, k))
    dy[np.random.rand(m) < 0.5] = 0
    dy[0, 0] = 1
    r = sparse.sparsegrad_gradient(basis, dy, x, rotation=rotation)
    want = u_out @ dy.T.astype(float) @ x @ u_in.T
    np.testing.assert_allclose(r, want, atol=1e-4)
    rows = sebp.Rows.find(dy)
    again = sparse.sparsegrad_gradient(
        basis, dy, x[rows.indices], rows, x_is_compact=True, out=r.copy(), accumulate=True
    )
    np.testing.assert_allclose(again, 2 * want, atol=2e-4)
    kept = sparse.top_elements(r, 10)
    np.testing.assert_array_equal(kept.indices, top(r, 10))
    np.testing.assert_array_equal(kept.values, r.flat[kept.indices])
    np.testing.assert_array_equal(sparse.take_elements(r, kept.indices).values, kept.values)
    fixed = sparse.sparsegrad_kept(basis, dy, x, kept.indices, rotation=rotation)
    np.testing.assert_allclose(fixed.values, kept.values, atol=1e-4)
    sparse.sparsegrad_kept(
        basis,
        dy,
        x[rows.indices],
        kept.indices,
        rows,
        x_is_compact=True,
        rotation=rotation,
        out=fixed.values,
        accumulate=True,
    )
    np.testing.assert_allclose(fixed.values, 2 * kept.values, atol=2e-4)
    w = np.random.randn(n, k).astype(np.float32)
    want = w + u_out.T @ dense(kept) @ u_in
    sparse.sparsegrad_update(basis, kept, w)
    np.testing.assert_allclose(w, want, atol=1e-4)


def test_meprop():
    dy, x = (np.random.randint(-9, 10, (12, size)).astype(np.float32) for size in (5, 7))
    dw = dy.T @ x
    kept = sparse.meprop_gradient(dy, x, 8)
    np.testing.assert_array_equal(kept.indices, top(dw, 8))
    np.testing.assert_array_equal(kept.values, dw.flat[kept.indices])
    w = np.ones_like(dw)
    sparse.add_elements(kept, w)
    np.testing.assert_array_equal(w, 1 + dense(kept))
    sparse.weight_decay(w, AdamW(lr=0.5, weight_decay=0.5))
    np.testing.assert_array_equal(w, 0.75 * (1 + dense(kept)))


def test_sampled_product():
    dy, x = (np.random.randint(-9, 10, (12, size)).astype(np.float32) for size in (5, 7))
    dy[::3] = 0
    dw = dy.T @ x
    indices = np.array([0, 3, 4, 17, 34])
    kept = sparse.sampled_product(dy, x, indices)
    assert kept.indices is indices and kept.shape == (5, 7)
    np.testing.assert_array_equal(kept.values, dw.flat[indices])
    out, rows = np.ones(5, np.float32), sebp.Rows.find(dy)
    again = sparse.sampled_product(
        dy, x[rows.indices], indices, rows, x_is_compact=True, out=out, accumulate=True
    )
    assert again.values is out
    np.testing.assert_array_equal(out, 1 + dw.flat[indices])
    none = sparse.sampled_product(dy, x, np.empty(0, np.int64))
    assert none.values.shape == (0,)
    for bad in ([3, 2], [3, 3], [-1], [35], range(36)):
        with pytest.raises(sebp.SebpError, match="kept"):
            sparse.sampled_product(dy, x, np.array(bad))
    with pytest.raises(sebp.SebpError, match="overlap"):
        sparse.sampled_product(dy, x, indices, out=x[0, :5])
    with pytest.raises(TypeError, match="float64"):
        sparse.sampled_product(dy, x, indices, out=np.ones(5))
    with pytest.raises(ValueError, match="but values"):
        sparse.sampled_product(dy, x, indices, out=np.ones(4, np.float32))
    dy[1, 0] = np.inf
    with pytest.raises(sebp.SebpError) as error:
        sparse.sampled_product(dy, x, indices, out=out)
    assert error.value.status == sparse.NONFINITE
    np.testing.assert_array_equal(out, 1 + dw.flat[indices])


@pytest.mark.usefixtures("lapack")
def test_basis_phase(tmp_path):
    """Gradients of planted bases: their energy lies in as many vectors as were planted."""
    n, k = 12, 9
    left, right = orthonormal(n)[:3], orthonormal(k)[:2]
    sums = BasisSums(n, k)
    for count in range(1, 6):
        sums.add((left.T @ np.random.randn(3, 2) @ right).astype(np.float32))
        assert sums.count == count
    twin = BasisSums(n, k)
    twin.set_sums(sums.sums())
    assert twin.count == 5
    np.testing.assert_array_equal(twin.solve(3, 2).u_in, sums.solve(3, 2).u_in)
    basis = sums.solve(3, 2)
    np.testing.assert_allclose(basis.shares, 1, atol=1e-5)
    np.testing.assert_allclose(basis.u_out.T @ basis.u_out, left.T @ left, atol=1e-4)
    np.testing.assert_allclose(basis.u_in.T @ basis.u_in, right.T @ right, atol=1e-4)
    basis.save(tmp_path / "basis")
    again = Basis.load(tmp_path / "basis")
    np.testing.assert_array_equal(again.u_out, basis.u_out)
    np.testing.assert_array_equal(again.u_in, basis.u_in)
    assert again.shares == basis.shares
    damaged = bytearray((tmp_path / "basis").read_bytes())
    damaged[100] ^= 1
    (tmp_path / "basis").write_bytes(damaged)
    with pytest.raises(sebp.SebpError, match="checksum"):
        Basis.load(tmp_path / "basis")


@pytest.mark.parametrize("is_fixed", [True, False])
def test_adamw(is_fixed):
    """Ten lazy steps on changing elements; a copy of the state goes on bit for bit."""
    shape, numbers = (6, 5), AdamW(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3)
    support = np.array([1, 4, 9, 17, 29])
    state = SparseAdamW(shape, support if is_fixed else None)
    np.testing.assert_array_equal(state.support, support if is_fixed else [])
    m, v = np.zeros(30), np.zeros(30)
    for t in range(1, 11):
        indices = support if is_fixed else np.sort(np.random.choice(30, 5, replace=False))
        gradient = Sparse(indices, np.random.randn(5).astype(np.float32), shape)
        m[indices] = 0.8 * m[indices] + 0.2 * gradient.values
        v[indices] = 0.9 * v[indices] + 0.1 * gradient.values.astype(float) ** 2
        want = -0.1 / (1 - 0.8**t) * m / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        twin = SparseAdamW(shape, support if is_fixed else None)
        twin.set_moments(state.moments())
        twins = gradient._replace(values=gradient.values.copy())
        state.step(gradient, numbers)
        twin.step(twins, numbers)
        np.testing.assert_allclose(gradient.values, want[indices], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(gradient.values, twins.values)
    assert (state.steps, state.count) == (10, np.count_nonzero(v))
    for one, other in zip(state.moments(), twin.moments(), strict=True):
        np.testing.assert_array_equal(one, other)
    if is_fixed:
        assert state.bytes <= 16 * 5 + 256


def test_lora_merge():
    a, b = np.random.randn(4, 2).astype(np.float32), np.random.randn(2, 5).astype(np.float32)
    w = np.zeros((5, 4), np.float32)
    sparse.lora_merge(a, b, 0.5, w)
    np.testing.assert_allclose(w, 0.5 * (a @ b).T, atol=1e-6)


def test_refusals():
    r = np.ones((3, 4), np.float32)
    for k in (0, -1, 13, 10**12):
        with pytest.raises(sebp.SebpError):
            sparse.top_elements(r, k)
        with pytest.raises(sebp.SebpError):
            sparse.meprop_gradient(np.ones((2, 3), np.float32), np.ones((2, 4), np.float32), k)
    with pytest.raises(sebp.SebpError) as error:
        sparse.top_elements(np.full((3, 4), np.nan, np.float32), 2)
    assert error.value.status == sparse.NONFINITE
    with pytest.raises(sebp.SebpError, match="indices"):
        sparse.take_elements(r, np.array([3, 2]))
    with pytest.raises(sebp.SebpError):
        unit = np.eye(3, dtype=np.float32)
        sparse.sparsegrad_gradient(Basis.from_vectors(unit, unit), r, r)
    sums = BasisSums(3, 4)
    sums.add(r)
    for ranks in ((0, 1), (4, 1), (1, 5)):
        with pytest.raises(sebp.SebpError, match="rank"):
            sums.solve(*ranks)
    with pytest.raises(sebp.SebpError):
        sums.add(np.full((3, 4), np.inf, np.float32))
    assert sums.count == 1
    with pytest.raises(sebp.SebpError, match="do not span"):
        BasisSums(3, 4).solve(3, 4)
    kept = Sparse(np.array([1]), np.ones(1, np.float32), (3, 4))
    with pytest.raises(ValueError, match="w is not"):
        sparse.add_elements(kept, np.ones((4, 3), np.float32).T)
    with pytest.raises(TypeError, match="int32"):
        sparse.add_elements(kept._replace(indices=np.array([1], np.int32)), r)
    with pytest.raises(ValueError, match="shape"):
        sparse.add_elements(kept._replace(indices=np.array([1, 2])), r)
    np.testing.assert_array_equal(r, 1)
    state = SparseAdamW((3, 4), [0, 2])
    with pytest.raises(sebp.SebpError):
        state.step(kept, AdamW())
    # Memory that is not to be written to, as that of bytes: read from, but for the step.
    constant = Sparse(np.array([0, 2]), np.frombuffer(bytes(8), np.float32), (3, 4))
    sparse.add_elements(constant, r)
    with pytest.raises(ValueError, match="values are not an array that can be written to"):
        state.step(constant, AdamW())
    with pytest.raises(sebp.SebpError):
        SparseAdamW((3, 4), [5, 1])
    with pytest.raises(sebp.SebpError):
        Basis.load("/no/such/file")
    for count in (2**53 + 1, 2**63 - 1, 2**64, 2**64 + 1, -1, -(2**64)):
        with pytest.raises(sebp.SebpError):
            state.set_moments(state.moments()._replace(steps=count))
    for count in (2**30, 2**63 - 1, 2**64 + 1, -1, 1 - 2**64):
        with pytest.raises(sebp.SebpError):
            sums.set_sums(sums.sums()._replace(count=count))
    assert sums.count == 1
    with pytest.raises(ValueError, match="moments"):
        state.set_moments(state.moments()._replace(moment1=np.zeros(3, np.float32)))
    assert state.steps == 0


def test_no_whole_numbers():
    for support in ([1.5, 2.0], np.array([False, True])):
        with pytest.raises(TypeError, match="indices are .*, not integers"):
            SparseAdamW((3, 4), support)
    state = SparseAdamW((3, 4), [1, 2])
    one = np.zeros(2, np.float32)
    with pytest.raises(TypeError, match="not integers"):
        state.set_moments(sparse.Moments(np.array([1.0, 2.0]), one, one, 3))
    assert state.steps == 0
