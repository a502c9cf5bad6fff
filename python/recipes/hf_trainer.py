# SPDX-License-Identifier: Apache-2.0
"""Classify texts by BERT with Hugging Face's Trainer, evaluating on the way."""

import argparse
import tempfile

from texts import make_tokenizer, reviews
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import sebp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--plain", action="store_true", help="leave SEBP out")
options = parser.parse_args()
set_seed(0)

# Your own: tokenizer = AutoTokenizer.from_pretrained(name), and a Dataset of text and label.
tokenizer = make_tokenizer()


def encode(texts: list[dict]) -> list[dict]:
    """Tokenize; the collator pads each batch to its longest text."""
    return [{**tokenizer(one["text"]), "labels": one["label"]} for one in texts]


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
    prepared = sebp.prepare(model)  # this line and the import are all that SEBP needs

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        eval_strategy="steps",
        eval_steps=max(options.steps // 2, 1),
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=encode(reviews(640)),
        eval_dataset=encode(reviews(64, seed=1)),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    trainer.save_model()  # an ordinary checkpoint, with SEBP or without
    BertForSequenceClassification.from_pretrained(folder)

history = trainer.state.log_history
print("losses", *(f"{log['loss']:.4f}" for log in history if "loss" in log))
print("eval", *(f"{log['eval_loss']:.4f}" for log in history if "eval_loss" in log))
if not options.plain:
    print(prepared.report())
