# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="sebp"`` against eager attention, in each family that goes through it."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5")
import families  # noqa: E402

import sebp  # noqa: E402

# Their attention is their own; transformers then leaves "eager" or "sdpa" as it was.
OWN = {
    *("mpnet", "deberta", "deberta_v2", "convbert", "longformer", "big_bird", "funnel"),
    *("squeezebert", "roformer", "nystromformer", "xlnet", "xlm", "flaubert", "megatron_bert"),
    *("rembert", "ibert", "splinter", "luke", "yoso", "canine", "falcon", "falcon_alibi", "bloom"),
    *("mpt", "gpt_neo", "xglm", "openai", "mamba", "blip_text", "bros", "led", "lilt", "lxmert"),
    *("prophetnet", "tapas", "vilt", "visual_bert", "groupvit_text"),
}
# They read a padded token's state, which with "sebp" as with flash attention is another.
READ_PADDING = {("siglip", "right"), ("chinese_clip", "left")}
REFUSED = {"gpt_oss": "s_aux"}
# They read the mask themselves, for their experts, and fail where it is none of "sdpa" or "eager".
READ_MASK = {"nllb_moe"}


def loss_of(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    """Give a model's loss, or a sum of squares of what real tokens get."""
    result = model(**batch)
    if result.get("loss") is not None:
        return result.loss.double()
    real = families.real_tokens(name, batch)
    states = [result[key][mask] for key, mask in real.items() if result.get(key) is not None]
    return sum(s.double().square().sum() for s in states or [result[0]])


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", sorted(set(families.FAMILIES) - OWN - set(REFUSED) - READ_MASK))
def test_a_family_is_as_with_eager_attention(name: str, padding: str) -> None:
    if (name, padding) in READ_PADDING:
        padding = "left" if padding == "right" else "right"
    # With padding on the left, heads read padded tokens or predict from them.
    head = (families.FAMILIES[name].heads or "base").split()[0] if padding == "right" else "base"
    sebp.register_attention()
    model = families.make_model(name, head).eval()
    model.set_attn_implementation("sebp")
    assert model.config._attn_implementation == "sebp"
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    batch = families.make_batch(name, head, padding, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*a mask of four dimensions")
        loss = loss_of(model, name, batch)
    want = loss_of(reference, name, batch)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-6)
    for one in (loss, want):
        one.backward()
    pairs = [
        (a.grad, b.grad)
        for a, b in zip(model.parameters(), reference.parameters(), strict=True)
        if b.grad is not None
    ]
    largest = max(float(b.abs().max()) for _, b in pairs)
    assert largest > 0 and len(pairs) > 5
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_family_needs_and_attention_lacks_is_named(name: str) -> None:
    model = families.make_model(name, "base")
    model.set_attn_implementation("sebp")
    with pytest.raises(ValueError, match=REFUSED[name]):
        model(**families.make_batch(name, "base", "right", 1))


@pytest.mark.parametrize("name", READ_MASK)
def test_a_family_that_reads_the_mask_fails(name: str) -> None:
    model = families.make_model(name, "base")
    model.set_attn_implementation("sebp")
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        model(**families.make_batch(name, "base", "right", 1))


def test_the_list_of_families_with_attention_of_their_own_is_no_longer_than_it_is() -> None:
    sebp.register_attention()
    for name in sorted(OWN - {"funnel", "splinter", "mamba"}):
        model = families.make_model(name, "base")
        model.set_attn_implementation("sebp")
        assert model.config._attn_implementation != "sebp", name
