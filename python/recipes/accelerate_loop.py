# SPDX-License-Identifier: Apache-2.0
"""Classify texts by BERT in a loop of Accelerate's."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from texts import make_tokenizer, reviews
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

import sebp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--plain", action="store_true", help="leave SEBP out")
options = parser.parse_args()
set_seed(0)

# Your own: tokenizer = AutoTokenizer.from_pretrained(name), and a Dataset of text and label.
tokenizer = make_tokenizer()
texts = [{**tokenizer(one["text"]), "labels": one["label"]} for one in reviews(16 * options.steps)]
data = DataLoader(texts, batch_size=16, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))

# Your own: model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2).
# Dropout is off here, so that the losses are those of --plain.
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
)

if not options.plain:
    # This line and the import are all that SEBP needs. It comes before accelerator.prepare(), which
    # may wrap the model.
    prepared = sebp.prepare(model)

accelerator = Accelerator(cpu=True)  # mixed_precision="bf16" works too
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, optimizer, data = accelerator.prepare(model, optimizer, data)

losses = []
model.train()
for batch in data:
    loss = model(**batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

accelerator.print("losses", *(f"{loss:.4f}" for loss in losses))
if not options.plain:
    accelerator.print(prepared.report())
