# SPDX-License-Identifier: Apache-2.0
"""Weighted samples of rows: dW and db are those of the sample, dX is exact."""

import numpy as np
import pytest

import sebp

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

M, N, K, SHARE = 40, 6, 5, 0.4


@pytest.fixture
def data() -> tuple[np.ndarray, ...]:
    """Make dY, whose rows have norms that differ a lot, a third of them zero, X and W."""
    dy, x, w = (np.random.randn(*shape) for shape in ((M, N), (M, K), (N, K)))
    dy *= np.exp(np.random.randn(M, 1)) * (np.random.permutation(M) % 3 != 0)[:, None]
    return tuple(one.astype(np.float32) for one in (dy, x, w))


def sampled_gradients(dy: np.ndarray, x: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute dW and db of a sample in double precision."""
    rows = sebp.Rows.sample(dy, SHARE, seed, x)
    weighted = dy[rows.indices].astype(np.float64) * rows.weights[:, None]
    return weighted.T @ x[rows.indices], weighted.sum(0)


def next_seed() -> int:
    """Return the seed that a backward draws next, and leave the generator as it was."""
    state = torch.get_rng_state()
    seed = int(torch.randint(2**63 - 1, (1,)))
    torch.set_rng_state(state)
    return seed


def test_sample(data):
    dy, x, _ = data
    active = np.flatnonzero(dy.any(1))
    rows = sebp.Rows.sample(dy, SHARE, 1, x)
    assert rows.total == M
    assert 0 < len(rows) <= np.ceil(SHARE * len(active))
    assert set(rows.indices) <= set(active)
    assert rows.weights.dtype == np.float32
    assert rows.weights.min() >= 1
    assert rows.weights.max() > 1
    assert 0 < rows.variance < np.inf
    again, other = sebp.Rows.sample(dy, SHARE, 1, x), sebp.Rows.sample(dy, SHARE, 2, x)
    np.testing.assert_array_equal(rows.indices, again.indices)
    np.testing.assert_array_equal(rows.weights, again.weights)
    assert rows.indices.tolist() != other.indices.tolist()
    whole = sebp.Rows.sample(dy, 1, 1, x)
    np.testing.assert_array_equal(whole.indices, active)
    assert whole.weights is None
    assert whole.variance == 0


def test_average_is_exact(data):
    """Over seeds the average is dW; the error goes down as the root of their number."""
    dy, x, _ = data
    exact = dy.astype(np.float64).T @ x
    found = [sebp.linear_backward(dy, x, rows=("sampled", SHARE), seed=s)[1] for s in range(2000)]
    errors = np.linalg.norm(np.array(found, np.float64) - exact, axis=(1, 2))
    off = np.linalg.norm(np.mean(found, axis=0, dtype=np.float64) - exact)
    assert errors.mean() > 0.05 * np.linalg.norm(exact)
    assert off < 6 * np.sqrt(np.mean(errors**2) / len(found))
    rows = sebp.Rows.sample(dy, SHARE, 1, x)
    squares = np.square(dy).sum(1, dtype=np.float64) * (1 + np.square(x).sum(1, dtype=np.float64))
    assert np.mean(errors**2) <= 1.5 * rows.variance * squares.sum()


def test_numpy_gradients(data):
    dy, x, w = data
    dx, dw, db = sebp.linear_backward(dy, x, w, ("sampled", SHARE), seed=7)
    np.testing.assert_array_equal(dx, sebp.linear_backward(dy, None, w)[0])
    want_dw, want_db = sampled_gradients(dy, x, 7)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(db, want_db, rtol=1e-4, atol=1e-4)
    given = sebp.linear_backward(dy, x, rows=sebp.Rows.sample(dy, SHARE, 7, x))
    np.testing.assert_array_equal(given[1], dw)
    np.testing.assert_array_equal(given[2], db)


def test_refused(data):
    dy, x, w = data
    rows = sebp.Rows.sample(dy, SHARE, 1)
    for call in (
        lambda: sebp.linear_backward(dy, x, w, rows),
        lambda: sebp.linear_forward(x, w, rows=rows),
        lambda: sebp.sparse.meprop_gradient(dy, x, 3, rows),
    ):
        with pytest.raises(sebp.SebpError, match="weights"):
            call()
    with pytest.raises(sebp.SebpError, match="SEBP_RULE_SAMPLED"):
        sebp.sparse.meprop_gradient(dy, x, 3, ("sampled", SHARE))
    with pytest.raises(sebp.SebpError, match="x is"):
        sebp.Rows.sample(dy, SHARE, 1, x[1:])
    with pytest.raises(ValueError, match="Rows.sample"):
        sebp.Rows.find(dy, ("sampled", SHARE))
    for share in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="share"):
            sebp.Rows.sample(dy, share, 1)
        with pytest.raises(ValueError, match="share"):
            sebp.apply_sebp_to_model(nn.Linear(2, 2), rows=("sampled", share))


# ---- PyTorch ----


class Transposed(nn.Module):
    """Conv1D's product: Y = X W + b."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(N, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer(data, transposed, dtype):
    model = (Transposed() if transposed else nn.Sequential(nn.Linear(K, N))).to(dtype)
    dy, x = (torch.from_numpy(one).to(dtype) for one in data[:2])
    x.requires_grad_()
    model(x).backward(dy)
    exact_dx, x.grad = x.grad, None
    model.zero_grad()
    assert sebp.apply_sebp_to_model(model, rows=("sampled", SHARE)).replaced
    torch.manual_seed(5)
    y = model(x)
    seed = next_seed()
    y.backward(dy, retain_graph=True)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(x.grad, exact_dx, **tolerance)
    weight, bias = model.parameters() if not transposed else (model.layer.weight, model.layer.bias)
    dw, db = sampled_gradients(dy.float().numpy(), x.detach().float().numpy(), seed)
    want = torch.from_numpy(dw.T if transposed else dw).to(dtype)
    bounds = {"rtol": 2e-2, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(weight.grad, want, **bounds)
    torch.testing.assert_close(bias.grad, torch.from_numpy(db).to(dtype), **bounds)
    # Each backward is a sample of its own.
    first, weight.grad = weight.grad, None
    y.backward(dy)
    assert not torch.equal(first, weight.grad)


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(K, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, N))


@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant", "compiled"])
def test_seed_repeats_a_run(data, how):
    """Nothing that runs a forward again changes what is drawn, or which elements are dropped."""
    dy, x = (torch.from_numpy(one) for one in data[:2])
    gradients = []
    for way in ("plain", how):
        model = make_model()
        sebp.apply_sebp_to_model(model, rows=("sampled", SHARE))
        inputs = x.clone().requires_grad_()
        run = model
        if way == "compiled":
            # One graph drops by other numbers than eager does.
            model[1].p = 0.0
            run = torch.compile(model, backend="aot_eager")
        elif how == "compiled":
            model[1].p = 0.0
        torch.manual_seed(2)
        if "reentrant" in way:
            y = checkpoint(run, inputs, use_reentrant=way == "reentrant")
        else:
            y = run(inputs)
        y.backward(dy)
        gradients.append([inputs.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_only_what_trains(data):
    """A frozen weight has an exact dX, and draws nothing."""
    dy, x = (torch.from_numpy(one) for one in data[:2])
    model = nn.Sequential(nn.Linear(K, N)).requires_grad_(False)
    sebp.apply_sebp_to_model(model, rows=("sampled", SHARE))
    inputs = x.clone().requires_grad_()
    torch.manual_seed(2)
    model(inputs).backward(dy)
    torch.testing.assert_close(inputs.grad, dy @ model[0].weight)
    assert torch.initial_seed() == 2
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range(data, seed):
    dy, x = data[:2]
    with pytest.raises(ValueError, match="seed"):
        sebp.Rows.sample(dy, SHARE, seed)
    with pytest.raises(ValueError, match="seed"):
        sebp.linear_backward(dy, x, rows=("sampled", SHARE), seed=seed)


def test_no_second_derivatives(data):
    dy, x = (torch.from_numpy(one) for one in data[:2])
    model = nn.Sequential(nn.Linear(K, N))
    sebp.apply_sebp_to_model(model, rows=("sampled", SHARE))
    inputs = x.clone().requires_grad_()
    dy = dy.requires_grad_()
    (dx,) = torch.autograd.grad(model(inputs), inputs, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dx.sum().backward()


def test_not_for_kept_elements(data):
    dy, x = (torch.from_numpy(one) for one in data[:2])
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, 3))
    sebp.apply_sebp_to_model(model, rows=("sampled", SHARE))
    optimizer = torch.optim.AdamW(model.parameters())
    sebp.apply_meprop_to_model(model, optimizer, k=4, layers=["0"])
    with pytest.raises(ValueError, match="Rows.sample"):
        model(x).sum().backward()
