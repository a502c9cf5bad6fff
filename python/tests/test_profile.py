# SPDX-License-Identifier: Apache-2.0
"""The profile of a model on a batch: what it says, and that it leaves no trace."""

import random
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import sebp  # noqa: E402

functional = torch.nn.functional


class Texts(nn.Module):
    """Embeds texts, with a layer that is used twice, and a loss on the first token."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.norm = nn.BatchNorm1d(4)
        self.twice = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 5).requires_grad_(False)
        self.head = nn.Linear(5, 2)
        self.idle = nn.Linear(5, 2)

    def forward(self, ids, weights):
        x = functional.dropout(self.norm(self.embedding(ids)), 0.1)
        x = self.twice(input=torch.tanh(self.twice(x)))
        y = self.head(self.frozen(x * weights[..., None])[:, 0])
        return y.square().mean()


def case():
    model = Texts()
    weights = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]])
    return model, {"ids": torch.randint(0, 9, (3, 4)), "weights": weights}


def states(model):
    """Note all that a profile must not change."""
    modules = dict(model.named_modules())
    return {
        "parameters": [id(p) for p in model.parameters()],
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "grads": [
            (id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()
        ],
        "needs": [p.requires_grad for p in model.parameters()],
        "modes": {name: module.training for name, module in modules.items()},
        "classes": {name: id(type(module)) for name, module in modules.items()},
        "hooks": {
            name: [len(value) for key, value in vars(module).items() if key.endswith("_hooks")]
            for name, module in modules.items()
        },
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
    }


def test_numbers():
    model, batch = case()
    profile = sebp.profile(model, batch)
    assert profile.without_gradient == ["idle"]
    layers = {layer.name: layer for layer in profile.layers}
    assert list(layers) == ["twice", "frozen", "head"]
    first = batch["weights"].bool().numpy() & (np.arange(4) == 0)
    frozen, head, twice = layers["frozen"], layers["head"], layers["twice"]
    # The loss reads the first token alone.
    np.testing.assert_array_equal(frozen.is_active, np.ones((3, 1), bool) & (np.arange(4) == 0))
    np.testing.assert_array_equal(twice.is_active, np.concatenate([first, first]))
    assert head.is_active.shape == (3,)
    assert (twice.rows, twice.active, twice.activity) == (24, 4, pytest.approx(1 / 6))
    assert (frozen.in_features, frozen.out_features) == (6, 5)
    assert frozen.flops == 2 * 12 * 5 * 6
    assert twice.flops == 2 * 2 * 24 * 6 * 6
    assert head.flops == 2 * 2 * 3 * 2 * 5
    assert profile.activity == pytest.approx((4 + 3 + 3) / (24 + 12 + 3))
    total = frozen.flops + twice.flops + head.flops
    saved = frozen.flops * 9 / 12 + twice.flops * 20 / 24
    assert profile.saved == pytest.approx(saved / total)
    assert profile.shape == (3, 4)


def test_table():
    model, batch = case()
    lines = str(sebp.profile(model, batch)).splitlines()
    assert len(lines) == 1 + 3 + 1 + 1
    assert lines[1].split() == ["twice", "6", "6", "24", "4", "16.7%", "3.46e-06"]
    assert lines[4] == "idle: no gradient"
    assert "25.6% of the rows are active, SEBP would save 79.6% of the flops" in lines[5]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("with_sebp", [False, True])
def test_leaves_no_trace(with_sebp, fails):
    model, batch = case()
    model.twice.eval()
    model(**batch).backward()
    model.head.weight.grad = None
    if with_sebp:
        sebp.apply_sebp_to_model(model)
    calls = []
    model.twice.register_forward_hook(lambda *a: calls.append("forward"))
    model.head.bias.register_hook(lambda g: calls.append("gradient"))
    model.head.bias.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    before = states(model)
    if fails:
        with pytest.raises(KeyError):
            sebp.profile(model, batch, loss=lambda output: {}["loss"])
    else:
        sebp.profile(model, batch)
    after = states(model)
    assert calls == ["forward", "forward"]
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
    assert any(grad is not None and grad.any() for _, grad in after["grads"])


def test_same_step_after_as_without():
    """A step with dropout gives the same bits whether the model was profiled or not."""
    results = []
    for profiled in (False, True):
        torch.manual_seed(5)
        model, batch = case()
        if profiled:
            sebp.profile(model, batch)
        model(**batch).backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("rows", ["nonzero", 5, ("threshold", 1e-3), ("energy", 0.2)])
def test_rules(rows):
    model = nn.Sequential(nn.Linear(4, 3))
    scale = torch.rand(20, 1) * (torch.arange(20) % 3 > 0)[:, None]
    seen = []

    def loss(y):
        y.register_hook(seen.append)
        return (y * scale).square().sum()

    (layer,) = sebp.profile(model, torch.randn(20, 4), rows, loss).layers
    want = sebp.Rows.find(seen[0].numpy(), rows).indices
    assert 0 < len(want) < 20
    assert np.flatnonzero(layer.is_active).tolist() == want.tolist()
    # The input needs no gradient, so dW is all there is to compute.
    assert layer.flops == 2 * 20 * 3 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    x = torch.randn(2, 5, 4).to(dtype)
    (layer,) = sebp.profile(model, (x,), loss=lambda y: y[0, 1:3].float().sum()).layers
    assert np.argwhere(layer.is_active).tolist() == [[0, 1], [0, 2]]


def test_one_dimension_and_other_shapes():
    model = nn.Linear(4, 3)
    x = torch.randn(4)
    profile = sebp.profile(model, x, loss=lambda y: y.sum() + model(x[None].expand(2, 4)).sum())
    assert profile.layers[0].is_active.tolist() == [True] * 3
    assert profile.shape is None
    ElementTree.fromstring(profile.to_svg())


class Twice(nn.Module):
    """Two calls of a layer, of which the first needs no gradient of its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x)).square().sum()


def test_flops_of_each_call():
    """A layer whose calls need other products takes the sum of them."""
    (layer,) = sebp.profile(Twice(), torch.randn(2, 5, 6)).layers
    assert layer.flops == (1 + 2) * 2 * 10 * 6 * 6


class Tables(nn.Module):
    """A layer on tokens, and one on a table of another kind, as of relative positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.flat, self.table = (nn.Linear(6, 6) for _ in range(3))
        self.positions = nn.Parameter(torch.randn(24, 6))

    def forward(self, x):
        flat = self.flat(self.tokens(x).reshape(-1, 6))
        return flat.square().sum() + self.table(self.positions)[0].square().sum()


def test_heat_map_of_other_rows(monkeypatch):
    """Rows that are no tokens, though their number would do, are drawn as one share."""
    profile = sebp.profile(Tables(), torch.randn(3, 4, 6))
    assert profile.shape == (3, 4)
    # Of the table one row in 24 is active: by tokens, the first column would be darker than others.
    shares = {}

    def draw(summary, names, rows, notes, length):
        shares.update(zip(names, rows, strict=True))
        return ""

    monkeypatch.setattr(sys.modules["sebp.torch.report.profile"], "draw", draw)
    profile.to_svg()
    assert shares["tokens"].shape == shares["flat"].shape == (4,)
    np.testing.assert_allclose(shares["table"], [1 / 24])


def test_no_layers():
    profile = sebp.profile(nn.LayerNorm(3), torch.randn(2, 3), loss=torch.sum)
    assert profile.layers == []
    assert profile.activity == profile.saved == 0
    assert "0.0%" in str(profile)
    ElementTree.fromstring(profile.to_svg())


def test_bad_arguments():
    model, batch = case()
    with pytest.raises(ValueError, match="at least 1 row"):
        sebp.profile(model, batch, rows=0)
    with pytest.raises(ValueError, match="no loss. .* loss=lambda"):
        sebp.profile(nn.Linear(3, 2), torch.randn(4, 3))
    with pytest.raises(ValueError, match="no loss"):
        sebp.profile(nn.Identity(), [{"logits": torch.ones(3)}])


def test_compiled_models():
    model, batch = case()
    want = str(sebp.profile(model, batch))
    assert str(sebp.profile(torch.compile(model, backend="aot_eager"), batch)) == want
    model._orig_mod = "a name that others may use"
    assert str(sebp.profile(model, batch)) == want
    model.compile(backend="aot_eager", fullgraph=True)
    assert str(sebp.profile(model, batch)) == want


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_transformers(name, reentrant):
    """Rows as the mask and the loss say, without SEBP, with it, and with checkpointing."""
    pytest.importorskip("transformers")
    from models import make_batch, make_model

    model = make_model(name).train()
    batch = make_batch(name, 0)
    if reentrant is not None:
        kwargs = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    mask = batch["attention_mask"].numpy()
    last = batch["labels"][:, 1:] >= 0 if name != "bert" else None
    before = states(model)
    plain = sebp.profile(model, batch)
    sebp.apply_sebp_to_model(model)
    ours = sebp.profile(model, batch)
    sebp.remove_sebp_from_model(model)
    torch.testing.assert_close(states(model), before, rtol=0, atol=0)
    assert str(ours) == str(plain)
    assert len(plain.layers) >= 9
    assert plain.shape == mask.shape
    for layer in plain.layers:
        if layer.is_active.ndim == 2:
            assert not layer.is_active[mask == 0].any()
    if name == "bert":
        mlp = next(one for one in plain.layers if "layer.1.output" in one.name)
        np.testing.assert_array_equal(np.flatnonzero(mlp.is_active.any(0)), [0])
    else:
        head = next(one for one in plain.layers if one.name == "lm_head")
        np.testing.assert_array_equal(head.is_active[:, :-1], last.numpy())


def test_padding_free():
    """What ran without padding is said to be tokens, not one text; the table is the model's own."""
    pytest.importorskip("transformers")
    from models import make_batch, make_model

    model, batch = make_model("bert").train(), make_batch("bert", 0)
    plain = sebp.profile(model, batch)
    assert not plain.is_padding_free
    assert "4 texts of 16 tokens, rows=" in str(plain)
    sebp.padding_free(model)
    tokens = int(batch["attention_mask"].sum())
    ours = sebp.profile(model, batch)
    assert (ours.shape, ours.is_padding_free) == ((1, tokens), True)
    assert f"{tokens} tokens without padding, rows=" in str(ours)
    assert "text" not in str(ours)
    batch["attention_mask"][:] = 1
    full = sebp.profile(model, batch)
    assert (full.shape, full.is_padding_free) == ((4, 16), False)


def boxes(svg):
    """Give the coloured cells of a picture: their colour, corner, width and height."""
    cell = re.compile(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z")
    found = []
    for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        if path.get("pointer-events") == "none":
            for box in cell.findall(path.get("d")):
                found.append((path.get("fill"), *map(int, box)))
    return found


@pytest.mark.parametrize("length", [1, 7, 128, 3000])
def test_heat_map(length, tmp_path):
    """For one text the coloured cells of a layer are as long as its activity."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    active = -(-length // 4)
    profile = sebp.profile(model, torch.randn(1, length, 3), loss=lambda y: y[:, :active].sum())
    profile.save_svg(tmp_path / "profile.svg")
    svg = (tmp_path / "profile.svg").read_text()
    found = boxes(svg)
    assert len({y for _, _, y, _, _ in found}) == 2
    assert {x for _, x, *_ in found} >= {0}
    width = sum(box[3] for box in found) / 2
    assert abs(width - 640 * active / length) <= 2
    texts = [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"0", "1", "activity", f"{active} / {length}", "100%", "token of the text"} <= {*texts}


@pytest.mark.parametrize("layers", [3, 100, 300])
def test_heat_map_of_many_layers(layers):
    """No label lies on another, and all lie within the picture."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(layers)))
    model.append(nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.eye_(parameter) if parameter.dim() == 2 else nn.init.zeros_(parameter)
    profile = sebp.profile(model, torch.randn(2, 4, 2), loss=torch.sum)
    root = ElementTree.fromstring(profile.to_svg())
    height = int(root.get("height"))
    labels = {}
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        place = (text.get("x"), text.get("text-anchor"))
        labels.setdefault(place, []).append(float(text.get("y")))
        assert 0 <= float(text.get("y")) + 92 <= height
    assert max(len(ys) for ys in labels.values()) >= min(layers, 100)
    for ys in labels.values():
        assert all(
            below - above >= 10
            for above, below in zip(ys[:-1], ys[1:], strict=True)
            if below != above
        )
    assert len(boxes(profile.to_svg())) == layers + 1
