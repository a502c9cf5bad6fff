# SPDX-License-Identifier: Apache-2.0
"""Training steps of two blocks of a LLaMA of 3B parameters, one padded text, in several modes.

    python llama.py

The model is a LlamaForCausalLM with the sizes of a 3B model's blocks (hidden 3072, MLP 8192, 24
heads of 128, 8 of them for keys and values), random weights, and a loss on every real token. Two
blocks stand for all, so the vocabulary is small by default: with the real one of 128256 the head
alone would take twice the time of both blocks. A text has 100 to 400 tokens, padded to 2048 on the
right. The modes:

- pytorch: the model as it is;
- sebp: SEBP in all linear layers; what the forward computes is as it was;
- trimmed: the model as it is, on the text without its padding;
- padding-free: padding taken out before the decoder, and SEBP in all linear layers;
- prepared: that, and norms, rotary positions and gated activations by the library, as
  sebp.prepare() has it;
- deferred: that, and logits that are not computed, by its defer_logits=True.
"""

import random

import torch
from common import (
    Batch,
    Mode,
    deferred,
    make_parser,
    padding_free,
    prepared,
    run_benchmark,
    with_sebp,
)
from texts import trim
from transformers import LlamaConfig, LlamaForCausalLM


def make_batch(tokens: int, length: int, vocabulary: int) -> Batch:
    """Make one text of random tokens, padded to `length`; labels of padding are left out."""
    ids = torch.zeros(1, length, dtype=torch.long)
    ids[0, :tokens] = torch.randint(1, vocabulary, (tokens,))
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill(ids == 0, -100),
    }


def make_modes(padded: list[Batch]) -> list[Mode]:
    """Make the modes, all on the same texts."""
    return [
        Mode("pytorch", "pytorch", padded),
        Mode("sebp", "pytorch", padded, change=with_sebp),
        Mode("trimmed", "pytorch", [trim(batch) for batch in padded]),
        Mode("padding-free", "pytorch", padded, change=padding_free, is_compared=True),
        Mode("prepared", "pytorch", padded, change=prepared, is_compared=True),
        Mode("deferred", "pytorch", padded, change=deferred, is_compared=True),
    ]


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=2)
    add("--hidden", type=int, default=3072, help="a multiple of 384; the MLP has 8/3 of it")
    add("--length", type=int, default=2048, help="tokens that a text is padded to")
    add("--shortest", type=int, default=100, help="least number of real tokens")
    add("--longest", type=int, default=400, help="largest number of real tokens")
    add("--vocabulary", type=int, default=4096)
    options = parser.parse_args()
    random.seed(1)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=options.hidden // 384,
        max_position_embeddings=options.length,
    )
    batches = []
    for _ in range(options.rounds):
        tokens = random.randint(options.shortest, options.longest)
        batches.append(make_batch(tokens, options.length, options.vocabulary))
    title = (
        f"LLaMA, {options.layers} layers, hidden {options.hidden}, 1 x {options.length},"
        f" {options.vocabulary} words"
    )
    run_benchmark(options, title, make_modes(batches), LlamaForCausalLM(config))


if __name__ == "__main__":
    main()
