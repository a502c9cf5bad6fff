# SPDX-License-Identifier: Apache-2.0
"""The forward that skips padded tokens."""

import gc

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import sebp  # noqa: E402

functional = torch.nn.functional


def case(transposed=False):
    """Make a layer, an input B x L x K, and a mask with rows of both kinds."""
    from sebp.torch.layers import SebpLinear

    layer = nn.Linear(6, 5)
    if transposed:
        pytest.importorskip("transformers")
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(5, 6)
    sebp.apply_sebp_to_model(layer)
    assert isinstance(layer, SebpLinear) or transposed
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]])
    return layer, torch.randn(3, 4, 6, requires_grad=True), mask


def plain(layer, x):
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
    return functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("keep_inputs", [False, True])
def test_layer(transposed, keep_inputs):
    layer, x, mask = case(transposed)
    inputs = (x, *layer.parameters())
    with sebp.padding(mask, keep_inputs=keep_inputs):
        y = layer(x)
    want = plain(layer, x)
    inside = mask.bool()
    torch.testing.assert_close(y[inside], want[inside])
    assert not y[~inside].any()
    dy = torch.randn(3, 4, 5) * mask[..., None]
    dy[0, 0] = 0
    got = torch.autograd.grad(y, inputs, dy)
    torch.testing.assert_close(got, torch.autograd.grad(want, inputs, dy))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("keep_inputs", [False, True])
def test_hook_makes_padded_rows_nonzero(transposed, keep_inputs):
    layer, x, mask = case(transposed)
    inputs = (x, *layer.parameters())
    with sebp.padding(mask, keep_inputs=keep_inputs):
        y = layer(x)
    y.register_hook(lambda dy: dy + 1)
    dy = torch.randn(3, 4, 5) * mask[..., None]
    got = torch.autograd.grad(y, inputs, dy)
    torch.testing.assert_close(got, torch.autograd.grad(plain(layer, x), inputs, dy + 1))


def test_hook_where_inputs_are_gone():
    layer, x, mask = case()

    def run(keep_inputs):
        with sebp.padding(mask, keep_inputs=keep_inputs):
            y = layer(torch.tanh(x))
        gc.collect()
        return torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))

    with pytest.raises(RuntimeError, match="6 rows that the mask leaves out .* row 3"):
        run(False)
    want = plain(layer, torch.tanh(x))
    want = torch.autograd.grad(want, (x, *layer.parameters()), torch.ones_like(want))
    torch.testing.assert_close(run(True), want)


def test_input_changed_in_place():
    """An input that is no longer what it was is not used."""
    layer, x, mask = case()
    middle = x * 1
    with sebp.padding(mask):
        y = layer(middle)
    with torch.no_grad():
        middle += 1
    with pytest.raises(RuntimeError, match="not kept"):
        y.sum().backward()


def test_only_active_rows_are_kept():
    layer, x, mask = case()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        sebp.padding(mask),
    ):
        layer(x)
        layer(x)
    shapes = [tuple(t.shape) for t in saved]
    assert shapes.count((6, 6)) == 2
    assert not any(t.numel() >= x.numel() for t in saved)
    kept = [t.data_ptr() for t in saved if t.shape == (6, 6)]
    assert kept[0] == kept[1], "layers with the same input share what is kept"


def test_inference_skips_too():
    layer, x, mask = case()
    with torch.no_grad(), sebp.padding(mask):
        y = layer(x)
    torch.testing.assert_close(y, plain(layer, x) * mask[..., None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    layer, x, mask = case()
    layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()
    inputs = (x, *layer.parameters())
    with sebp.padding(mask):
        y = layer(x)
    dy = torch.randn(3, 4, 5).to(dtype) * mask[..., None]
    want = plain(layer, x)
    torch.testing.assert_close(y[mask.bool()], want[mask.bool()])
    got = torch.autograd.grad(y, inputs, dy)
    torch.testing.assert_close(got, torch.autograd.grad(want, inputs, dy))


def test_other_shapes_are_left_alone():
    layer, x, mask = case()
    with sebp.padding(mask):
        torch.testing.assert_close(layer(x[:, 0]), plain(layer, x[:, 0]))
        torch.testing.assert_close(layer(x.reshape(12, 6)), plain(layer, x.reshape(12, 6)))


def test_full_and_empty_masks():
    layer, x, mask = case()
    with sebp.padding(torch.ones_like(mask)):
        torch.testing.assert_close(layer(x), plain(layer, x))
    with sebp.padding(torch.zeros_like(mask)):
        y = layer(x)
    assert not y.any()
    y.backward(torch.zeros_like(y))
    assert not layer.weight.grad.any()


def test_nested_and_after_errors():
    layer, x, mask = case()
    with sebp.padding(mask):
        with sebp.padding(torch.ones_like(mask)):
            assert layer(x).all()
        assert not layer(x)[0, 3].any()
    with pytest.raises(KeyError), sebp.padding(mask):
        raise KeyError
    torch.testing.assert_close(layer(x), plain(layer, x))


def test_wrong_masks():
    layer, x, mask = case()
    with pytest.raises(TypeError, match="list"):
        sebp.padding([[1, 0]])
    for shape in ((4,), (3, 1, 4), (3, 1, 4, 4)):
        with pytest.raises(ValueError, match="not \\(batch, sequence length\\)"):
            sebp.padding(torch.ones(shape))
    misfit = r"\(3, 5\), but the layers' inputs \(3, 4, 6\)"
    with pytest.raises(ValueError, match=misfit), sebp.padding(torch.ones(3, 5)):
        layer(x)


def test_encoder_decoder():
    """The mask is the encoder's: where source and target have one length, too."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    mask = (torch.arange(8) < torch.tensor([[3], [8]])).long()
    batch = {"input_ids": torch.full((2, 8), 7), "attention_mask": mask}
    batch["labels"] = torch.full((2, 8), 5)
    want = model(**batch).loss
    with pytest.warns(UserWarning, match="encoder-decoder"):
        report = sebp.apply_sebp_to_model(model, padding=True)
    assert not report.padding
    got = model(**batch).loss
    torch.testing.assert_close(got, want)
    got.backward()


def test_interrupted_forward():
    """A KeyboardInterrupt within a model leaves its mask to no later call."""
    pytest.importorskip("transformers")
    from models import make_batch, make_model

    from sebp.torch.padding import current_padding

    model, batch = make_model("bert").eval(), make_batch("bert", 1)
    with torch.no_grad():
        want = model(batch["input_ids"]).logits
        sebp.apply_sebp_to_model(model, padding=True)

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = model.bert.encoder.layer[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        handle.remove()
        torch.testing.assert_close(model(batch["input_ids"]).logits, want)
    assert current_padding() is None
