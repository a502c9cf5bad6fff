# SPDX-License-Identifier: Apache-2.0
"""What Accelerate and PEFT do to a model: before SEBP or after it, and back again."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models import make_batch, make_model  # noqa: E402

import sebp  # noqa: E402

STEPS = 3


def train(model, name, optimizer=None, backward=torch.Tensor.backward):
    """Take steps; give their losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    model.train()
    for step in range(STEPS):
        loss = model(**make_batch(name, step)).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.fixture
def accelerator():
    """Give a function that makes Accelerate's object, of which a process has one at a time."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    yield lambda precision: accelerate.Accelerator(cpu=True, mixed_precision=precision)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("is_first", [True, False])
def test_accelerate(accelerator, precision, is_first, tmp_path):
    """It wraps the forward of the model, and takes that off again."""
    from safetensors.torch import load_file

    tolerance = 3e-2 if precision == "bf16" else 1e-4
    want = train(make_model("bert"), "bert")
    model = make_model("bert")
    if is_first:
        prepared = sebp.prepare(model, quiet=True)
    accelerator = accelerator(precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    whole, optimizer = accelerator.prepare(model, optimizer)
    if not is_first:
        prepared = sebp.prepare(whole, quiet=True)
    got = train(whole, "bert", optimizer, accelerator.backward)
    assert got == pytest.approx(want, rel=tolerance, abs=tolerance)
    assert prepared.report().calls == {"": STEPS}

    accelerator.save_model(whole, tmp_path)
    fresh = make_model("bert")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    inner = accelerator.unwrap_model(whole, keep_fp32_wrapper=False)
    assert inner is model
    batch = make_batch("bert", 9)
    with torch.no_grad():
        want = fresh.eval()(**batch).logits
        for _ in range(2):
            got = inner.eval()(**batch).logits
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        prepared.undo()
        torch.testing.assert_close(inner(**batch).logits, want, rtol=tolerance, atol=tolerance)
    if is_first:
        assert not forwards(model)


def make_adapted(base, kind):
    """Give a model with PEFT's adapters of one kind, alike each time."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    options = {"dora": {"use_dora": True}, "head": {"modules_to_save": ["lm_head"]}}.get(kind, {})
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("kind", ["lora", "dora", "head"])
@pytest.mark.parametrize("is_first", [True, False])
def test_peft(kind, is_first, tmp_path):
    """It puts adapters around layers, copies some, merges them, and saves what trains."""
    peft = pytest.importorskip("peft")
    want = train(make_adapted(make_model("llama"), kind), "llama")
    base = make_model("llama")
    if is_first:
        prepared = sebp.prepare(base, quiet=True)
    model = make_adapted(base, kind)
    if not is_first:
        prepared = sebp.prepare(model, quiet=True)
    assert train(model, "llama") == pytest.approx(want, rel=1e-3, abs=1e-4)
    assert prepared.report().calls == {"": STEPS}
    assert not any("sebp" in name for name in model.state_dict())

    batch = make_batch("llama", 9)
    real = batch["attention_mask"] != 0

    def logits(one):
        with torch.no_grad():
            return one.eval()(**batch).logits[real]

    model.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path)
    want = logits(fresh)
    torch.testing.assert_close(logits(model), want)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=1e-3, atol=1e-4)
    prepared.undo()
    assert not forwards(merged)
    other = make_model("llama")
    other.load_state_dict(merged.state_dict())
    torch.testing.assert_close(logits(other), want, rtol=1e-3, atol=1e-4)
