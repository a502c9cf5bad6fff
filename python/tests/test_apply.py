# SPDX-License-Identifier: Apache-2.0
"""Putting SEBP into a model and taking it out."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import sebp  # noqa: E402


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 3, bias=False)))


def test_there_and_back():
    model = make_model()
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    text = repr(model)
    report = sebp.apply_sebp_to_model(model)
    assert report.replaced == ["0", "2.0"]
    assert "2 linear layers replaced, rows=nonzero" in str(report)
    assert "sebp_rule" in vars(model[0])
    for again in (False, True):
        assert all(parameters[name] is p for name, p in model.named_parameters())
        assert all(modules[name] is m for name, m in model.named_modules())
        assert type(model[0]) is nn.Linear
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        if not again:
            assert sebp.remove_sebp_from_model(model) == ["0", "2.0"]
    assert repr(model) == text
    assert not {"sebp_rule", "forward", "__prepare_scriptable__"} & vars(model[0]).keys()
    assert sebp.remove_sebp_from_model(model) == []


def test_twice_says_so():
    model = make_model()
    sebp.apply_sebp_to_model(model, rows=5)
    with pytest.warns(UserWarning, match="2 layers had SEBP already"):
        report = sebp.apply_sebp_to_model(model, rows=9)
    assert report.replaced == []
    assert report.already == ["0", "2.0"]
    assert str(model[0].sebp_rule) == "5"


@pytest.mark.parametrize(
    ("layers", "replaced"),
    [
        ("2.*", ["2.0"]),
        (["0", "none"], ["0"]),
        (lambda name, module: module.bias is not None, ["0"]),
    ],
)
def test_layers(layers, replaced):
    assert sebp.apply_sebp_to_model(make_model(), layers=layers).replaced == replaced


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("3.*", r"layers='3\.\*' matches none of 2, such as '0'"),
        (["linear", "lin"], r"layers=\['linear', 'lin'\] matches none of 2"),
        ([], r"layers=\[\] matches none of 2"),
        (lambda name, module: False, "layers=<function .* matches none of 2"),
    ],
)
def test_layers_that_match_nothing(layers, message):
    model = make_model()
    with pytest.warns(UserWarning, match=f"no layer was replaced: {message}"):
        report = sebp.apply_sebp_to_model(model, layers=layers)
    assert report.replaced == []
    assert type(model[0]) is nn.Linear


def test_model_without_linear_layers():
    with pytest.warns(UserWarning, match="no layer was replaced: the model has no linear layers"):
        report = sebp.apply_sebp_to_model(nn.ReLU())
    assert report.replaced == []


def test_layers_that_fail():
    """What a function of the user raises leaves the model as it was."""
    model = make_model()
    with pytest.raises(ZeroDivisionError):
        sebp.apply_sebp_to_model(model, layers=lambda name, module: name == "0" or 1 / 0)
    assert type(model[0]) is nn.Linear


def test_layers_that_are_no_names():
    model = make_model()
    with pytest.raises(TypeError, match="layers holds a Linear, not a name or pattern"):
        sebp.apply_sebp_to_model(model, layers=["1", model[0]])
    assert type(model[0]) is nn.Linear


def test_left_alone():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(3, 3), nn.Linear(3, 3), nn.MultiheadAttention(4, 2))
    model[1].forward = model[1].forward
    report = sebp.apply_sebp_to_model(model)
    assert report.replaced == []
    assert report.skipped == {
        "0": "its class is Special",
        "1": "its forward has been replaced",
        "2.out_proj": "its class is NonDynamicallyQuantizableLinear",
    }
    assert "0 left alone: its class is Special" in str(report)


@pytest.mark.parametrize(
    ("rows", "error"), [(0, ValueError), (-3, ValueError), ("top", ValueError), (2.5, TypeError)]
)
def test_bad_rows(rows, error):
    model = make_model()
    with pytest.raises(error):
        sebp.apply_sebp_to_model(model, rows=rows)
    assert type(model[0]) is nn.Linear


def test_tied_weights_and_conv1d():
    transformers = pytest.importorskip("transformers")
    from models import make_model as make_gpt2

    model = make_gpt2("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    keys = list(model.state_dict())
    report = sebp.apply_sebp_to_model(model)
    assert len(report.replaced) == 2 * 4 + 1
    assert isinstance(model.transformer.h[0].mlp.c_fc, transformers.pytorch_utils.Conv1D)
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (32, 128)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert list(model.state_dict()) == keys
    sebp.remove_sebp_from_model(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_copies_and_checkpoints():
    model = make_model()
    sebp.apply_sebp_to_model(model, rows=3)
    x = torch.randn(5, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert str(twin[0].sebp_rule) == "3"
        assert "linear_op" in str(twin(x).grad_fn.name()) or "sebp" in twin(x).grad_fn.name()
        with torch.no_grad():
            twin[0].weight.zero_()
        assert not torch.equal(twin(x), model(x))  # it has a forward of its own
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain = make_model()
    plain.load_state_dict(torch.load(file))
    torch.testing.assert_close(plain(x), model(x))


def test_hooks_still_run():
    model = make_model()
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *a: calls.append("backward"))
    sebp.apply_sebp_to_model(model)
    model(torch.randn(5, 4)).sum().backward()
    assert calls == ["forward", "backward"]


def test_inference_is_pytorch():
    """Without gradients the layer is PyTorch's own, to the bit."""
    model = make_model()
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        want = model(x)
        sebp.apply_sebp_to_model(model)
        assert torch.equal(model(x), want)


def test_a_class_that_is_patched_runs_as_patched(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 3))
    sebp.apply_sebp_to_model(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x * 0)
    assert not model(torch.randn(2, 4, requires_grad=True)).any()
    report = sebp.apply_sebp_to_model(nn.Sequential(nn.Linear(4, 3)))
    assert report.replaced == [] and report.skipped == {"0": "its forward has been replaced"}


def test_the_argument_may_have_its_name():
    from transformers.pytorch_utils import Conv1D

    for layer, name in ((nn.Linear(4, 3), "input"), (Conv1D(3, 4), "x")):
        x = torch.randn(2, 4, requires_grad=True)
        right = layer(x)
        sebp.apply_sebp_to_model(nn.Sequential(layer))
        y = layer(**{name: x})
        assert "sebp" in y.grad_fn.name().lower() and torch.allclose(y, right, atol=1e-6)
        for wrong in ({"nonsense": x}, {}, {name: x, "nonsense": x}):
            with pytest.raises(TypeError):
                layer(**wrong)


def test_a_weight_that_is_computed_is_computed_once_a_forward():
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return 2 * weight

    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    sebp.apply_sebp_to_model(layer)
    nn.utils.parametrize.register_parametrization(layer, "weight", Counted())
    for with_gradients in (True, False):
        Counted.calls = 0
        with torch.set_grad_enabled(with_gradients):
            layer(x)
        assert Counted.calls == 1
