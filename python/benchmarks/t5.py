# SPDX-License-Identifier: Apache-2.0
"""Training steps of T5's encoder on padded texts, with a label for each token, in several modes.

    python t5.py

The model is a T5ForTokenClassification with T5-small's sizes (6 blocks, 8 heads of 64), dropout
included, and random weights; the optimizer is AdamW. Tokens are random, and lengths are drawn as
texts.draw_texts() says. The modes:

- pytorch: the model as it is, every text padded to one length;
- sebp: SEBP in all linear layers; what the forward computes is as it was;
- trimmed: the model as it is, each batch trimmed to its longest text;
- padding-free: padding taken out before the encoder, and SEBP in all linear layers;
- prepared: that, and norms, activations and dropout by the library, as sebp.prepare() has it.
"""

import random

import torch
from common import Batch, Mode, make_parser, padding_free, prepared, run_benchmark, with_sebp
from texts import draw_texts, make_batch, trim
from transformers import T5Config, T5ForTokenClassification


def label_tokens(batch: Batch) -> Batch:
    """Give each real token a label, and padding none."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {**batch, "labels": (ids % 2).masked_fill(mask == 0, -100)}


def make_modes(texts: list[Batch]) -> list[Mode]:
    """Make the modes, all on the same texts."""
    padded = [label_tokens(batch) for batch in texts]
    return [
        Mode("pytorch", "pytorch", padded),
        Mode("sebp", "pytorch", padded, change=with_sebp),
        Mode("trimmed", "pytorch", [label_tokens(trim(batch)) for batch in texts]),
        Mode("padding-free", "pytorch", padded, change=padding_free, is_compared=True),
        Mode("prepared", "pytorch", padded, change=prepared, is_compared=True),
    ]


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=6)
    add("--hidden", type=int, default=512, help="a multiple of 64; the MLP has 4 times of it")
    add("--batch", type=int, default=16, help="texts in a batch")
    add("--length", type=int, default=128, help="tokens that texts are padded to")
    options = parser.parse_args()
    random.seed(1)
    torch.manual_seed(1)
    texts = draw_texts(options.rounds * options.batch)
    batches = [
        make_batch(texts[i : i + options.batch], options.length)
        for i in range(0, len(texts), options.batch)
    ]
    config = T5Config(
        d_model=options.hidden,
        d_ff=4 * options.hidden,
        d_kv=64,
        num_heads=options.hidden // 64,
        num_layers=options.layers,
    )
    title = (
        f"T5's encoder, {options.layers} layers, hidden {options.hidden},"
        f" {options.batch} x {options.length}"
    )
    run_benchmark(options, title, make_modes(batches), T5ForTokenClassification(config))


if __name__ == "__main__":
    main()
