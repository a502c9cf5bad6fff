# SPDX-License-Identifier: Apache-2.0
"""All that suits a model by one call, and out of it by another."""

import copy
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from families import ENCODERS  # noqa: E402
from families import make_batch as make_task_batch  # noqa: E402
from families import make_model as make_task  # noqa: E402
from models import make_batch, make_model  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402


def make_plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def make_mpnet() -> nn.Module:
    return transformers.AutoModel.from_config(ENCODERS["mpnet"].make_config())


MODELS = {
    "bert": lambda: make_model("bert"),
    "gpt2": lambda: make_model("gpt2"),
    "llama": lambda: make_model("llama"),
    "mpnet": make_mpnet,
    "plain": make_plain,
    "double": lambda: make_plain().double(),
    "linear": lambda: nn.Linear(3, 2),
    "none": nn.ReLU,
}


def insides(model):
    """Collect all that a module holds, itself included, by identity; buffers and weights by value.

    Dicts are looked into, as hooks are in them.
    """
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[name, key] = dict(value) if isinstance(value, dict) else value
        found[name, "class"] = type(module)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    return found, values


def same_insides(before, after):
    (found, values), (now, new_values) = before, after
    assert found.keys() == now.keys()
    for key, value in found.items():
        if isinstance(value, dict):
            assert value.keys() == now[key].keys()
            assert all(part is now[key][k] for k, part in value.items()), key
        else:
            assert value is now[key] or value == now[key], key
    assert values.keys() == new_values.keys()
    assert all(torch.equal(value, new_values[key]) for key, value in values.items())


def forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, capsys):
    model = MODELS[name]()
    before = insides(model)
    prepared = sebp.prepare(model)
    assert capsys.readouterr().out == f"{prepared}\n"
    assert bool(forwards(model)) == (name not in ("double", "none"))
    assert prepared.is_in
    prepared.undo()
    same_insides(before, insides(model))
    assert not prepared.is_in
    assert str(prepared).endswith("undone")
    prepared.undo()
    same_insides(before, insides(model))


@pytest.mark.parametrize("name", ["bert", "plain"])
def test_twice_is_once(name):
    model = MODELS[name]()
    before = insides(model)
    first = sebp.prepare(model, quiet=True)
    between = insides(model)
    with sebp.prepare(model, quiet=True) as second:
        same_insides(between, insides(model))
        assert not second.layers.replaced
        assert not second.padding.changed
        assert second.layers.already == first.layers.replaced
        assert "had it" in str(second)
        assert second.padding.already == first.padding.changed
    same_insides(between, insides(model))
    first.undo()
    same_insides(before, insides(model))


def test_what_was_there_stays():
    """Rows of another rule, and padding left out without a comparison."""
    model = make_model("bert")
    with pytest.warns(UserWarning, match="no layer"):
        sebp.apply_sebp_to_model(model, layers="absent")
    sebp.apply_sebp_to_model(model, rows=5, layers="*.0.*", padding=True, check=False)
    before = insides(model)
    with sebp.prepare(model, quiet=True) as prepared:
        assert prepared.layers.already
        assert prepared.layers.replaced
        assert prepared.padding.already == ["bert"]
        assert model(**make_batch("bert", 1)).loss.isfinite()
        assert not before[0]["", "_sebp_proofs"].check
    proofs = before[0]["", "_sebp_proofs"]
    assert proofs.owners == {"apply_sebp_to_model"}
    same_insides(before, insides(model))
    sebp.remove_sebp_from_model(model)
    assert not forwards(model)


def test_what_came_since_stays():
    """undo() takes out what prepare() put in, not what has been put in its place."""
    model = make_plain()
    prepared = sebp.prepare(model, quiet=True)
    sebp.remove_sebp_from_model(model)
    sebp.apply_sebp_to_model(model, layers="0")
    prepared.undo()
    assert "sebp_rule" in vars(model[0])
    assert "sebp_rule" not in vars(model[2])


def test_undo_finds_copies():
    """A layer copied within the model, as PEFT does with one that is to train as a whole."""
    model = make_plain()
    prepared = sebp.prepare(model, quiet=True)
    model[2] = copy.deepcopy(model[2])
    other = copy.deepcopy(model)
    prepared.undo()
    assert not forwards(model)
    assert forwards(other)


def test_ends_with_its_block():
    model = make_plain()
    with pytest.raises(ZeroDivisionError), sebp.prepare(model, quiet=True):
        assert forwards(model) == ["", "0", "2"]
        raise ZeroDivisionError
    assert not forwards(model)


def test_quiet(capsys):
    sebp.prepare(make_plain(), quiet=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "plain"])
def test_same_step(name):
    """Losses and gradients are the model's, and are computed on real tokens."""
    plain = MODELS[name]().train()
    ours = copy.deepcopy(plain)
    prepared = sebp.prepare(ours, quiet=True)
    results = []
    for model in (plain, ours):
        if name == "plain":
            loss = model(torch.linspace(-1, 1, 40).view(10, 4))[:3].square().sum()
        else:
            loss = model(**make_batch(name, 1)).loss
        loss.backward()
        results.append((loss, {key: p.grad for key, p in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    assert any(bool(g.any()) for g in results[1][1].values())
    if name != "plain":
        mask = make_batch(name, 1)["attention_mask"]
        assert prepared.padding.calls == {"": 1}
        assert prepared.padding.tokens == {
            "real": int(mask.sum()),
            "left out": int((1 - mask).sum()),
        }


@pytest.mark.filterwarnings("ignore:sebp. ")
@pytest.mark.parametrize(
    ("name", "head", "training", "evaluation"),
    [
        ("bert", "seq", "", ""),
        ("bert", "tok", "", "logits depends on padded tokens"),
        ("bert", "mlm", "", "logits depends on padded tokens"),
        ("bert", "qa", "loss came out as", "start_logits depends on padded tokens"),
        ("llama", "seq", "", "a cache"),
        ("llama", "lm", "", "a cache"),
        ("t5", "s2s", "", "loss depends on padded tokens"),
        ("bart", "s2s", "", "loss depends on padded tokens"),
        ("t5_encoder", "tok", "", "logits depends on padded tokens"),
        ("clip", "base", "", "text_model_output.last_hidden_state depends on padded tokens"),
        ("siglip", "base", "logits_per_image came out", "logits_per_image depends"),
        ("layoutlm", "tok", "the argument bbox", "the argument bbox"),
    ],
)
def test_tasks(name, head, training, evaluation):
    """The table in README.md: what runs without padding, and why the others do not."""
    model = make_task(name, head).train()
    calls = sebp.prepare(model, quiet=True).padding.calls
    for reason in (training, evaluation):
        batch = make_task_batch(name, head, "right", 1)
        if not model.training and head == "qa":
            del batch["start_positions"], batch["end_positions"]
        elif not model.training and head != "s2s":
            batch.pop("labels", None)
        calls.clear()
        with torch.set_grad_enabled(model.training):
            model(**batch)
        assert len(calls) == 1
        assert list(calls)[0].startswith(reason)
        assert (list(calls)[0] == "") == (reason == "")
        model.eval()


def test_mean_over_the_text():
    """Without a check padded tokens are zeros, which a mean by the mask leaves out."""
    model = make_task("bert", "base").eval()
    batch = make_task_batch("bert", "base", "right", 1)
    is_real = batch["attention_mask"].bool()
    with torch.no_grad():
        want = model(**batch).last_hidden_state[is_real]
        prepared = sebp.prepare(model, check=False, quiet=True)
        got = model(**batch).last_hidden_state
    assert prepared.padding.calls == {"": 1}
    torch.testing.assert_close(got[is_real], want, rtol=1e-4, atol=1e-5)
    assert not got[~is_real].any()


def test_counts_padding_that_is_computed():
    model = make_model("bert").train()
    model.bert.encoder.layer[0].register_forward_hook(lambda *a: None)
    prepared = sebp.prepare(model, quiet=True)
    batch = make_batch("bert", 1)
    with pytest.warns(UserWarning, match="a hook on"):
        model(**batch)
    real = int(batch["attention_mask"].sum())
    assert prepared.padding.tokens == {
        "real": real,
        "computed": batch["attention_mask"].numel() - real,
    }


def test_says_what_is_left():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(3, 3), Special(3, 3), nn.Linear(3, 3), nn.Linear(3, 3).double())
    text = str(sebp.prepare(model, quiet=True))
    assert "changed  1 linear layer: rows of zeros are skipped" in text
    assert "left     0 and 1 more: its class is Special" in text
    assert "left     3: its weight is of torch.float64" in text
    assert "no base model of transformers" in text
    assert "the forward computes all tokens" in text


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.ReLU(), "no gain: libsebp finds no linear layer in"),
        (nn.Linear(2, 2).half(), "no gain: libsebp finds no linear layer that it computes"),
        (nn.Linear(2, 2, device="meta"), "its weight is on meta"),
        (nn.Linear(2, 2, device="meta"), "no gain on meta"),
    ],
)
def test_models_where_nothing_can_be_done(model, why):
    text = str(sebp.prepare(model, quiet=True))
    assert why in text
    assert "changed" not in text
    assert not forwards(model)


def test_model_on_another_device():
    text = str(sebp.prepare(make_model("bert").to("meta"), quiet=True))
    assert "no gain on meta" in text
    assert "a step whose time" not in text


def test_wrapped_models():
    """What a compiler put around the model is left where it is."""
    model = make_plain()
    with sebp.prepare(torch.compile(model), quiet=True) as prepared:
        assert prepared.model is model
        assert forwards(model) == ["", "0", "2"]
    assert not forwards(model)


def test_bad_arguments():
    with pytest.raises(TypeError, match="model is a str, not an nn.Module"):
        sebp.prepare("bert")


def test_without_the_library(tmp_path, monkeypatch):
    code = (
        "import sebp, torch\n"
        "model = torch.nn.Linear(2, 2)\n"
        "try:\n"
        "    sebp.prepare(model)\n"
        "except sebp.LibraryNotFoundError:\n"
        "    assert 'forward' not in vars(model)\n"
        "    print('refused')\n"
    )
    monkeypatch.setenv("SEBP_LIBRARY", str(tmp_path / "libsebp.so"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", done.stderr


def test_without_pytorch():
    """The package is there without PyTorch, and says what is missing."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import sebp\n"
        "try:\n"
        "    sebp.prepare\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("sebp.prepare needs PyTorch"), done.stderr


def test_pytorch_is_not_imported():
    code = (
        "import sys, sebp\n"
        "assert 'torch' not in sys.modules\n"
        "sebp.prepare\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("copied", [False, True])
def test_removed_where_the_result_is_gone(copied):
    model = make_model("bert")
    before = insides(model)
    sebp.prepare(model, quiet=True)
    if copied:
        model = copy.deepcopy(model)
    sebp.remove_sebp_from_model(model)
    assert not any("forward" in vars(module) for module in model.modules())
    if not copied:
        same_insides(before, insides(model))
