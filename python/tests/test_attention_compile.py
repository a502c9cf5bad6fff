# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="sebp"`` under ``torch.compile``, against the same model as it is."""

import itertools

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5")
import families  # noqa: E402
from attention_models import draw_texts, flat, hidden, make, padded  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402


@pytest.fixture(autouse=True)
def without_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, fullgraph: bool = True) -> nn.Module:
    return torch.compile(model, backend="aot_eager" if fullgraph else "eager", fullgraph=fullgraph)


def run(model: nn.Module, batch: dict, **options: object) -> list[Tensor]:
    """Return the states of real tokens, and the gradients of all parameters that have one."""
    model.zero_grad()
    states = hidden(model, batch, **options)
    if "attention_mask" in batch:
        states = states[batch["attention_mask"].bool()]
    states.square().sum().backward()
    # In a graph what is not used has a gradient of zeros.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [states.detach(), *(g.clone() for g in gradients if g.any())]


def same(found: list[Tensor], want: list[Tensor]) -> None:
    assert len(found) == len(want) > 5
    assert want[0].abs().max() > 0.1
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(b.abs().max())))


def batch_of(name: str, way: str, lengths: tuple[int, ...] = (5, 3, 8)) -> dict[str, Tensor]:
    texts = draw_texts(lengths)
    if way == "flat":
        return flat(name, texts)
    if way == "whole":
        return {"input_ids": torch.stack(draw_texts((8, 8)))}
    return padded(name, texts, left=way == "left")


@pytest.mark.parametrize(
    "name, way",
    [
        *itertools.product(["bert", "llama"], ["flat", "whole", "right", "left"]),
        *itertools.product(["roberta", "qwen3", "gpt2"], ["flat"]),
    ],
)
def test_one_graph(name: str, way: str) -> None:
    model = make(name)
    graph = compiled(model)
    for lengths in ((5, 3, 8), (8, 6, 2)):  # told by other numbers of the same shapes
        batch = batch_of(name, way, lengths)
        same(run(graph, batch), run(model, batch))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "name, way, options",
    [
        ("llama", "flat", {"use_cache": False}),
        ("mistral", "right", {}),
        ("gemma2", "left", {}),
        ("modernbert", "right", {}),
    ],
)
def test_masks_that_break_the_graph(name: str, way: str, options: dict) -> None:
    """A window, and texts by positions, are read before the layers. These are in one graph."""
    model, batch = make(name), batch_of(name, way)
    graph = compiled(model, fullgraph=False)
    same(run(graph, batch, **options), run(model, batch, **options))
    layers = model.config.num_hidden_layers
    assert layers >= 2
    assert counters["stats"]["unique_graphs"] <= 4
    assert not any("attention_interface" in reason for reason in counters["graph_break"])


def test_positions_are_read_in_a_graph() -> None:
    model, batch = make("llama"), batch_of("llama", "flat")
    both = {key: batch[key] for key in ("input_ids", "position_ids")}
    graph = compiled(model)
    same(run(graph, both), run(model, batch))
    torch.testing.assert_close(hidden(graph, both), hidden(model, batch))
    wrong = {**both, "position_ids": both["position_ids"] * 2}
    with pytest.raises(ValueError, match="do not say where texts begin"):
        hidden(graph, wrong)


def test_contradictions_are_found_in_a_graph() -> None:
    model, batch = make("bert"), batch_of("bert", "flat")
    mask = torch.ones_like(batch["input_ids"])
    graph = compiled(model)
    same(
        run(graph, {**batch, "attention_mask": mask}), run(model, {**batch, "attention_mask": mask})
    )
    mask = mask.clone()
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="attention_mask has padding"):
        hidden(graph, {**batch, "attention_mask": mask})
    wrong = {**batch, "cu_seq_lens_q": batch["cu_seq_lens_q"] + 1}
    with pytest.raises(ValueError, match="cu_seq_lens_q goes from 1 to 17"):
        hidden(graph, wrong)
    right = batch_of("bert", "right")
    with pytest.raises(ValueError, match="leaves out all tokens"):
        hidden(graph, {**right, "attention_mask": torch.zeros_like(right["attention_mask"])})


def test_dropout_in_a_graph() -> None:
    config = families.FAMILIES["llama"].make_config()
    config.attention_dropout = 0.5
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="sebp").train()
    batch, graph = batch_of("llama", "flat"), compiled(model)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(run(graph, batch))
    again = run(graph, batch)
    torch.manual_seed(1)
    same(found[0], run(model, batch))
    assert torch.equal(found[0][0], found[1][0])
    for other in (found[2], again):
        assert (other[0] - found[0][0]).abs().max() > 1e-2
    assert (again[0] - found[2][0]).abs().max() > 1e-2


def test_autocast_in_a_graph() -> None:
    model, batch = make("llama"), batch_of("llama", "right")
    with torch.autocast("cpu", torch.bfloat16):
        want, found = hidden(model, batch), hidden(compiled(model), batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], want[real], rtol=0.05, atol=0.05)


def test_a_bias_breaks_the_graph() -> None:
    model = transformers.T5EncoderModel(families.FAMILIES["t5"].make_config()).eval()
    model.set_attn_implementation("sebp")
    batch = batch_of("t5", "flat")
    del batch["position_ids"]
    same(run(compiled(model, fullgraph=False), batch), run(model, batch))


def test_a_mask_of_four_dimensions_breaks_the_graph() -> None:
    model, batch = make("bert"), batch_of("bert", "whole")
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    batch["attention_mask"] = mask
    with pytest.warns(UserWarning, match="a mask of four dimensions"):
        want = hidden(model, batch)
        found = hidden(compiled(model, fullgraph=False), batch)
    torch.testing.assert_close(found, want)


@pytest.mark.filterwarnings("ignore")
def test_export_is_pytorchs() -> None:
    model, batch = make("bert"), batch_of("bert", "whole")
    program = torch.export.export(model, (), batch)
    assert "sebp" not in str(program.graph)
    torch.testing.assert_close(
        program.module()(**batch).last_hidden_state, hidden(model, batch), rtol=1e-4, atol=1e-4
    )
