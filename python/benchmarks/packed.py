# SPDX-License-Identifier: Apache-2.0
"""Training steps of a small decoder on texts of different lengths, laid end to end or padded.

    python packed.py

The model is a LlamaForCausalLM of random weights. Each batch holds texts of random lengths. All
modes train on the same texts and have the same loss, which is checked. The modes:

- padded: texts padded to the longest, PyTorch's attention ("sdpa");
- padded-sebp: the same with attn_implementation="sebp";
- packed: texts laid end to end by DataCollatorWithFlattening, "sdpa", for which transformers makes
  a mask of all tokens by all tokens;
- packed-sebp: the same with attn_implementation="sebp";
- packed-prepared: that, and all that sebp.prepare() puts in.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from common import Batch, Mode, make_parser, prepared, run_benchmark
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

import sebp


@contextmanager
def attention(model: nn.Module, name: str) -> Iterator[None]:
    """Train with an attention function of transformers."""
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


@contextmanager
def attention_and_all(model: nn.Module) -> Iterator[None]:
    """Train with this package's attention, and with all that sebp.prepare() puts in."""
    with attention(model, "sebp"), prepared(model):
        yield


def pad(texts: list[Tensor]) -> Batch:
    """Pad texts on the right to the longest."""
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def flatten(texts: list[Tensor]) -> Batch:
    """Lay texts end to end."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return collator([{"input_ids": text.tolist()} for text in texts])


def make_modes(batches: list[list[Tensor]]) -> list[Mode]:
    """Make the modes, all on the same texts."""
    padded = [pad(texts) for texts in batches]
    packed = [flatten(texts) for texts in batches]
    with_sebp = partial(attention, name="sebp")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        # With a cache transformers' mask would not part the texts.
        return model(**batch, use_cache=False).loss

    return [
        Mode("padded", "padded", padded, loss),
        Mode("padded-sebp", "padded", padded, loss, with_sebp),
        Mode("packed", "padded", packed, loss),
        Mode("packed-sebp", "padded", packed, loss, with_sebp),
        Mode("packed-prepared", "padded", packed, loss, attention_and_all),
    ]


def check_losses(modes: list[Mode], model: nn.Module) -> None:
    """Raise unless all modes have the same loss."""
    losses = []
    for mode in modes:
        with torch.no_grad(), mode.change(model):
            losses.append(float(mode.loss(model, mode.batches[0])))
    if max(losses) - min(losses) > 1e-4 * max(losses):
        raise SystemExit(f"losses differ: {losses}")


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=512, help="a multiple of 64, the size of a head")
    add("--texts", type=int, default=16, help="texts of a batch")
    add("--shortest", type=int, default=16, help="least number of tokens")
    add("--longest", type=int, default=256, help="largest number of tokens")
    add("--vocabulary", type=int, default=4096)
    options = parser.parse_args()
    random.seed(1)
    torch.manual_seed(1)
    sebp.register_attention()
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
    )
    batches = [
        [
            torch.randint(
                1, options.vocabulary, (random.randint(options.shortest, options.longest),)
            )
            for _ in range(options.texts)
        ]
        for _ in range(options.rounds)
    ]
    model = LlamaForCausalLM(config)
    modes = make_modes(batches)
    check_losses(modes, model)
    title = (
        f"LLaMA, {options.layers} layers, hidden {options.hidden}, {options.texts} texts of"
        f" {options.shortest} to {options.longest} tokens"
    )
    run_benchmark(options, title, modes, model)


if __name__ == "__main__":
    main()
