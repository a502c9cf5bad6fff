# SPDX-License-Identifier: Apache-2.0
"""Training steps of BERT-base as a classifier of padded texts, in several modes.

    python bert.py --data DIR

The model has BERT-base's configuration, dropout included, and random weights; the optimizer is
AdamW. The modes:

- pytorch: the model as it is, every text padded to one length;
- sebp: SEBP in all linear layers; what the forward computes is as it was;
- trimmed: the model as it is, each batch trimmed to its longest text;
- padding-free: padding taken out before the encoder, and SEBP in all linear layers;
- prepared: that, and norms, activations and dropout by the library, as sebp.prepare() has it;
- pytorch-full, sebp-full, prepared-full: texts without padding and a loss on every token, so that
  all rows are active.

Without --data the tokens are random, and the lengths are drawn as texts.draw_texts() says.
"""

import random
from pathlib import Path

import torch
from common import Batch, Mode, make_parser, padding_free, prepared, run_benchmark, with_sebp
from texts import draw_texts, fill, make_batch, read_texts, trim
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification


def loss_of_tokens(model: nn.Module, batch: Batch) -> Tensor:
    """Classify every token, so that every row of every layer has a gradient."""
    hidden = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    logits = model.classifier(hidden).flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch["labels"].repeat_interleave(hidden.shape[1]))


def make_modes(padded: list[Batch]) -> list[Mode]:
    """Make the modes, all on the same texts."""
    trimmed = [trim(batch) for batch in padded]
    full = [fill(batch) for batch in padded]
    return [
        Mode("pytorch", "pytorch", padded),
        Mode("sebp", "pytorch", padded, change=with_sebp),
        Mode("trimmed", "pytorch", trimmed),
        Mode("padding-free", "pytorch", padded, change=padding_free, is_compared=True),
        Mode("prepared", "pytorch", padded, change=prepared, is_compared=True),
        Mode("pytorch-full", "pytorch-full", full, loss_of_tokens),
        Mode("sebp-full", "pytorch-full", full, loss_of_tokens, with_sebp),
        Mode("prepared-full", "pytorch-full", full, loss_of_tokens, prepared, is_compared=True),
    ]


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="real texts; default: random ones")
    add("--corpus", choices=("sst2", "cola"), default="sst2")
    add("--layers", type=int, default=12)
    add("--hidden", type=int, default=768, help="a multiple of 64")
    add("--batch", type=int, default=16, help="texts in a batch")
    add("--length", type=int, default=128, help="tokens that texts are padded to")
    options = parser.parse_args()
    random.seed(1)
    torch.manual_seed(1)
    count = options.rounds * options.batch
    if options.data:
        texts = random.choices(read_texts(options.data, options.corpus), k=count)
    else:
        texts = draw_texts(count)
    batches = [
        make_batch(texts[i : i + options.batch], options.length)
        for i in range(0, count, options.batch)
    ]
    config = BertConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden,
    )
    title = (
        f"BERT, {options.layers} layers, hidden {options.hidden},"
        f" {options.corpus if options.data else 'random texts'},"
        f" {options.batch} x {options.length}"
    )
    run_benchmark(options, title, make_modes(batches), BertForSequenceClassification(config))


if __name__ == "__main__":
    main()
