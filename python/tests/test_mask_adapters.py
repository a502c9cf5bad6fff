# SPDX-License-Identifier: Apache-2.0
"""Adapters of fixed masks: saved, loaded, switched, merged, and PEFT's SHiRA."""

import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp import AdapterSwitch, SparseAdapter  # noqa: E402

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make_net(dtype=torch.float32) -> nn.Sequential:
    """Two layers whose N + K is 32, so that PEFT's r of 1 is 32 elements of each."""
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12)).to(dtype)


def train(net, name, k=32, layers="*", lr=0.5, **options) -> SparseAdapter:
    """Train a model; steps are as large as weights, so that differences are not exact."""
    base = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    optimizer = sebp.apply_sparse_mask_to_model(net, base, k, layers=layers, **options)
    net.requires_grad_(False)  # all else
    x = torch.randn(40, 12, dtype=next(net.parameters()).dtype)
    for _ in range(3):
        net(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = optimizer.adapter(name)
    optimizer.release()
    return adapter


def trained(base, name, **options) -> tuple[nn.Module, SparseAdapter]:
    net = copy.deepcopy(base)
    return net, train(net, name, **options)


def are_same(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(
        n == m and p.view(torch.uint8).equal(q.view(torch.uint8)) for (n, p), (m, q) in pairs
    )


# --------------------------------------------------------------------------------------------------
# Bit for bit


@pytest.mark.parametrize("from_files", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switch(dtype, from_files, tmp_path):
    """A, B, the base and A again, each as it was trained; merged it stays."""
    base = make_net(dtype)
    one, a = trained(base, "a", seed=1)
    two, b = trained(base, "b", seed=2, layers="2", k=17)
    assert not are_same(one, base) and not are_same(two, base) and not are_same(one, two)
    if from_files:
        assert a.save(tmp_path / "a") and not b.save(tmp_path / "b")
        a, b = (SparseAdapter.load(tmp_path / name) for name in "ab")
        assert (a.name, a.mask, a.is_proved) == ("a", "random", True)
    model = copy.deepcopy(base)
    switch = AdapterSwitch(model)
    version = model[2].weight._version
    for adapter, want in ((a, one), (b, two), (None, base), (a, one), (a, one), (b, two)):
        switch.switch(adapter)
        assert are_same(model, want) and switch.active is adapter
    assert model[2].weight._version > version
    assert switch.merge() == ["2"]
    assert switch.active is None and switch.merge() == []
    switch.switch(None)
    assert are_same(model, two)


def test_switch_after_training():
    """The model that was trained is switched itself; its base comes back bit for bit."""
    base = make_net()
    two, b = trained(base, "b", seed=2)
    model, a = trained(base, "a", seed=1)
    one = copy.deepcopy(model)
    switch = AdapterSwitch(model, a)
    for adapter, want in ((b, two), (None, base), (a, one)):
        switch.switch(adapter)
        assert are_same(model, want)


def test_training_goes_on_from_an_adapter():
    """What is trained on a model with an adapter has that for its base."""
    base = make_net()
    _, a = trained(base, "a", seed=1)
    model = copy.deepcopy(base)
    switch = AdapterSwitch(model)
    switch.switch(a)
    switch.merge()
    merged = copy.deepcopy(model)
    two, b = trained(merged, "b", seed=5)
    with pytest.raises(ValueError, match="b is of another base: the weight of 0"):
        AdapterSwitch(base).switch(b)
    AdapterSwitch(model).switch(b)
    assert are_same(model, two)


# --------------------------------------------------------------------------------------------------
# PEFT's SHiRA


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_peft_loads_ours(mask, tmp_path, recwarn):
    """PEFT adds our differences to the base: ours within the rounding of that sum."""
    peft = pytest.importorskip("peft")
    base = make_net()
    net, adapter = trained(base, "a", mask=mask)
    assert adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not [w for w in recwarn if "adapter" in str(w.message).lower()]
    for name in ("0", "2"):
        layer = theirs.base_model.model.get_submodule(name)
        assert torch.equal(layer.shira_weight["default"], adapter.layers[name].delta)
        rows = layer.shira_indices["default"].numpy()
        np.testing.assert_array_equal(rows, adapter.layers[name].indices)
    x = torch.randn(9, 12)
    torch.testing.assert_close(theirs(x), net(x))
    merged = theirs.merge_and_unload()
    for at in (0, 2):
        new, want, old = (model[at].weight.detach().numpy() for model in (merged, net, base))
        unit = np.spacing(np.maximum(abs(want), abs(want - old)))
        assert (abs(new - want) <= unit).all()
        assert ((want != old) == (new != old)).all()
    assert not all(torch.equal(merged[at].weight, base[at].weight) for at in (0, 2))


def test_we_load_peft(tmp_path):
    """A file of PEFT's gives the weights that PEFT merges; it cannot prove its base."""
    peft = pytest.importorskip("peft")
    base = make_net()
    config = peft.ShiraConfig(r=2, target_modules=["0", "2"], init_weights=False, random_seed=1)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    adapter = SparseAdapter.load(tmp_path, "theirs")
    assert not adapter.is_proved
    model = copy.deepcopy(base)
    switch = AdapterSwitch(model)
    with pytest.raises(ValueError, match="theirs does not tell which base it is for"):
        switch.switch(adapter)
    assert are_same(model, base)
    switch.switch(adapter, unproved=True)
    assert are_same(model, theirs.merge_and_unload())
    assert (model[0].weight != base[0].weight).sum() == 64
    switch.switch(None)
    assert are_same(model, base)
    # Saved again it is the same.
    assert not adapter.save(tmp_path / "again")  # the file does not tell N and K
    again = SparseAdapter.load(tmp_path / "again")
    for name, layer in adapter.layers.items():
        assert torch.equal(layer.delta, again.layers[name].delta)


def test_peft_refuses_what_does_not_fit(tmp_path):
    """33 elements are not r (N + K): the files say another kind, which is ours alone."""
    peft = pytest.importorskip("peft")
    base = make_net()
    net, adapter = trained(base, "a", k=33)
    assert not adapter.save(tmp_path)
    with pytest.raises((ValueError, KeyError), match="SEBP_SPARSE_MASK"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model = copy.deepcopy(base)
    AdapterSwitch(model).switch(SparseAdapter.load(tmp_path))
    assert are_same(model, net)


def test_conv1d(tmp_path):
    """GPT-2's layers, whose weights are K x N; PEFT's SHiRA has none of them."""
    pytest.importorskip("transformers")
    from models import make_batch, make_model

    base = make_model("gpt2")
    net = copy.deepcopy(base)
    optimizer = sebp.apply_sparse_mask_to_model(
        net, torch.optim.AdamW(net.parameters(), lr=0.1), 32 + 128, "magnitude"
    )
    net.requires_grad_(False)  # all else
    net(**make_batch("gpt2", 1)).loss.backward()
    optimizer.step()
    assert not optimizer.adapter().save(tmp_path)
    optimizer.release()
    model = copy.deepcopy(base)
    AdapterSwitch(model).switch(SparseAdapter.load(tmp_path))
    assert are_same(model, net) and not are_same(model, base)


# --------------------------------------------------------------------------------------------------
# Bad input


def flip(weight, at) -> None:
    """Change the last bit of an element."""
    weight.detach().view(torch.int32).view(-1)[at] ^= 1


def test_another_base():
    """One bit of one element that the adapter does not touch is another base."""
    base = make_net()
    _, adapter = trained(base, "mine")
    rows, cols = adapter.layers["2"].indices
    untouched = np.setdiff1d(np.arange(240), rows * 20 + cols)[100]
    model = copy.deepcopy(base)
    flip(model[2].weight, untouched)
    before = copy.deepcopy(model)
    switch = AdapterSwitch(model)
    with pytest.raises(ValueError, match="mine is of another base: the weight of 2 is not"):
        switch.switch(adapter)
    assert are_same(model, before) and switch.active is None
    flip(model[2].weight, untouched)
    switch.switch(adapter)


def with_conv(net):
    net[2] = nn.Conv1d(3, 4, 5)


def with_other_shape(net):
    net[2] = nn.Linear(20, 13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.__delitem__(2), "mine: the model has no layer 2"),
        (with_conv, "mine: 2 of the model is no linear layer"),
        (with_other_shape, r"mine: the weight of 2 is of \(13, 20\), but the adapter's of \(12, 2"),
        (lambda net: net.bfloat16(), "mine is of another base: the weight of 0"),
        (lambda net: net[2].double(), "mine: the weight of 2 is of torch.float64"),
        (lambda net: net.to("meta"), "mine: the weight of 0 is on meta"),
        (lambda net: net[0].weight.data.fill_(0), "mine is of another base: the weight of 0"),
    ],
)
def test_models_that_do_not_suit(change, message):
    base = make_net()
    _, adapter = trained(base, "mine")
    model = copy.deepcopy(base)
    _, other = trained(base, "other", layers="0", seed=3)
    switch = AdapterSwitch(model)
    change(model)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        switch.switch(adapter)
    if not next(model.parameters()).is_meta:
        assert are_same(model, before)


def test_elements_that_have_changed():
    """What was put in is not there any more: neither taken out nor replaced."""
    base = make_net()
    _, a = trained(base, "a", seed=1)
    _, b = trained(base, "b", seed=2)
    model = copy.deepcopy(base)
    switch = AdapterSwitch(model)
    switch.switch(a)
    rows, cols = a.layers["0"].indices
    flip(model[0].weight, rows[5] * 12 + cols[5])
    before = copy.deepcopy(model)
    for other in (b, None):
        with pytest.raises(ValueError, match="elements of 0 have been changed since a was put in"):
            switch.switch(other)
        assert are_same(model, before) and switch.active is a


def test_layers_in_training():
    base = make_net()
    _, adapter = trained(base, "mine")
    model = copy.deepcopy(base)
    optimizer = sebp.apply_sparse_mask_to_model(
        model, torch.optim.AdamW(model.parameters(), lr=0.1), 5, layers="*"
    )
    with pytest.raises(ValueError, match="mine: 0 is trained by a SparseOptimizer"):
        AdapterSwitch(model).switch(adapter)
    optimizer.release()
    AdapterSwitch(model).switch(adapter)


def test_weights_of_other_modules():
    """What is put into one layer would be in another one as well."""

    def make(tied):
        net = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
        net[2].weight = net[0].weight if tied else nn.Parameter(net[0].weight.detach().clone())
        return net

    base = make(tied=False)
    tied = make(tied=True)
    tied.load_state_dict(base.state_dict())
    before = copy.deepcopy(tied)
    switch = AdapterSwitch(tied)
    for layers in ("*", "0", "2"):
        _, adapter = trained(base, "mine", layers=layers)
        with pytest.raises(ValueError, match="mine: .: its weight is that of [02]"):
            switch.switch(adapter)
        assert are_same(tied, before) and switch.active is None


def test_weight_that_is_no_more_row_by_row():
    net = make_net()
    base = torch.optim.AdamW(net.parameters(), lr=0.1)
    optimizer = sebp.apply_sparse_mask_to_model(net, base, 5, layers="*")
    net[0].weight.data = net[0].weight.data.t().contiguous().t()
    with pytest.raises(ValueError, match="0: its weight is not row by row in memory"):
        optimizer.adapter()


def test_differences_that_overflow(tmp_path):
    """Files that could not be read again are not written."""
    net = make_net()
    layer = train(net, "mine", layers="0").layers["0"]
    values = layer.values.clone()
    values[0], layer.originals[0] = 3e38, -3e38
    adapter = SparseAdapter({"0": _with_values(layer, values)}, "mine", "random")
    with pytest.raises(ValueError, match="0 holds a NaN or Inf"):
        adapter.save(tmp_path)
    assert not list(tmp_path.iterdir())


def _with_values(layer, values):
    support = layer.support(layer.shape)
    return type(layer).of_values(
        support, values, layer.originals, layer.shape, layer.digest, layer.is_linear
    )


def test_active_that_is_not():
    base = make_net()
    net, adapter = trained(base, "mine")
    with pytest.raises(ValueError, match="mine is not in the model: 0 has other elements"):
        AdapterSwitch(base, adapter)
    rows, cols = adapter.layers["2"].indices
    untouched = np.setdiff1d(np.arange(240), rows * 20 + cols)[0]
    flip(net[2].weight, untouched)
    with pytest.raises(ValueError, match="mine is of another base: the weight of 2"):
        AdapterSwitch(net, adapter)


def test_active_from_a_file(tmp_path):
    base = make_net()
    net, adapter = trained(base, "mine")
    adapter.save(tmp_path)
    with pytest.raises(ValueError, match="read from a file"):
        AdapterSwitch(net, SparseAdapter.load(tmp_path))


def test_sums_that_are_not_finite(tmp_path):
    """A difference of PEFT's that takes an element out of range."""
    base = make_net()
    with torch.no_grad():
        base[0].weight[3, 4] = 3e38
    model = copy.deepcopy(base)
    indices = torch.tensor([[3], [4]], dtype=torch.int32)
    save_file(
        {
            "base_model.model.0.shira_weight": torch.tensor([3e38]),
            "base_model.model.0.shira_indices": indices,
        },
        tmp_path / TENSORS,
    )
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "SHIRA"}))
    adapter = SparseAdapter.load(tmp_path, "large")
    with pytest.raises(ValueError, match="large: the weight of 0 would hold a NaN or Inf"):
        AdapterSwitch(model).switch(adapter, unproved=True)
    assert are_same(model, base)


def rewrite(folder, change, header=lambda header: header) -> None:
    """Change the tensors of a file, or what its header tells."""
    with safetensors.safe_open(folder / TENSORS, framework="pt") as file:
        about = json.loads(file.metadata()["sebp"])
    tensors = load_file(folder / TENSORS)
    change(tensors)
    about = header(about)
    metadata = {} if about is None else {"sebp": json.dumps(about)}
    save_file(tensors, folder / TENSORS, metadata)


PREFIX = "base_model.model.2."


def swapped(tensors):
    tensors[PREFIX + "shira_indices"] = tensors[PREFIX + "shira_indices"].flip(1).contiguous()


def repeated(tensors):
    tensors[PREFIX + "shira_indices"][:, 1] = tensors[PREFIX + "shira_indices"][:, 0]


def negative(tensors):
    tensors[PREFIX + "shira_indices"][1, 0] = -1


def out_of_range(tensors):
    tensors[PREFIX + "shira_indices"][0, -1] = 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "2 has indices that are unsorted or repeated"),
        (repeated, "2 has indices that are unsorted or repeated"),
        (negative, "2 has an index below 0"),
        (out_of_range, "2 has a weight that .* elements beyond that"),
        (lambda t: t.update({PREFIX + "shira_indices": torch.zeros(2, 32)}), "not integers"),
        (lambda t: t.update({PREFIX + "shira_indices": torch.zeros(32).int()}), "not integers"),
        (lambda t: t.update({PREFIX + "shira_indices": torch.zeros(3, 32).int()}), "in 3 rows"),
        (lambda t: t.update({PREFIX + "shira_weight": torch.zeros(31)}), "32 indices, but"),
        (lambda t: t.update({PREFIX + "shira_weight": torch.full((32,), torch.nan)}), "NaN"),
        (lambda t: t.update({PREFIX + "shira_weight": torch.zeros(32).double()}), "of torch.float"),
        (lambda t: t.update({PREFIX + "sebp_values": torch.full((32,), torch.inf)}), "Inf"),
        (lambda t: t.pop(PREFIX + "sebp_values"), "a base without values"),
        (lambda t: t.pop(PREFIX + "shira_weight"), "2 lacks its values or indices"),
        (lambda t: [t.pop(key) for key in list(t) if ".2." in key], "other layers than it holds"),
        (lambda t: t.update({"base_model.model.classifier.weight": torch.ones(3)}), "no part of a"),
        (lambda t: t.update({"2.shira_weight": torch.ones(3)}), "no part of a mask"),
        (lambda t: t.clear(), "holds no layers"),
    ],
)
def test_damaged_tensors(change, message, tmp_path):
    _, adapter = trained(make_net(), "a")
    adapter.save(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        SparseAdapter.load(tmp_path)
    assert TENSORS in str(error.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (lambda about: None, "values without a base"),
        (lambda about: about | {"version": 2}, "header is of version 2, not 1"),
        (lambda about: 7, "header is not valid"),
        (lambda about: about | {"layers": {"2": about["layers"]["2"]}}, "other layers"),
        (lambda about: about | {"layers": {n: {} for n in about["layers"]}}, "is not valid"),
        (
            lambda about: (
                about
                | {"layers": {n: one | {"shape": [0, 5]} for n, one in about["layers"].items()}}
            ),
            "is not valid",
        ),
    ],
)
def test_damaged_headers(header, message, tmp_path):
    _, adapter = trained(make_net(), "a")
    adapter.save(tmp_path)
    rewrite(tmp_path, lambda tensors: None, header)
    with pytest.raises(ValueError, match=message):
        SparseAdapter.load(tmp_path)


def test_other_files(tmp_path):
    _, adapter = trained(make_net(), "a")
    with pytest.raises(FileNotFoundError):
        SparseAdapter.load(tmp_path / "nowhere")
    adapter.save(tmp_path)
    config = (tmp_path / CONFIG).read_text()
    for text, message in (("{", "not the configuration"), ("[1]", "not the configuration")):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=message):
            SparseAdapter.load(tmp_path)
    (tmp_path / CONFIG).write_text(config.replace("SHIRA", "LORA"))
    with pytest.raises(ValueError, match="of kind LORA, not SHIRA"):
        SparseAdapter.load(tmp_path)
    (tmp_path / CONFIG).write_text(config)
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="is damaged"):
        SparseAdapter.load(tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        SparseAdapter.load(tmp_path)


def test_a_save_that_fails_leaves_the_files(tmp_path, monkeypatch):
    _, a = trained(make_net(), "a", seed=1)
    _, b = trained(make_net(), "b", seed=2)
    a.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {TENSORS, CONFIG}

    def fail(*args):
        raise OSError("no space")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(OSError, match="no space"):
        b.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
