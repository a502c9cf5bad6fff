# SPDX-License-Identifier: Apache-2.0
"""Classify texts by BERT with Lightning, validating on the way."""

import argparse
import tempfile

import lightning
import torch
from texts import make_tokenizer, reviews
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

import sebp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--plain", action="store_true", help="leave SEBP out")
options = parser.parse_args()
lightning.seed_everything(0)


class Classifier(lightning.LightningModule):
    """A model of transformers, its loss and its optimizer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # Your own: AutoModelForSequenceClassification.from_pretrained(name, num_labels=2).
        self.model = BertForSequenceClassification(config)
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute the loss of a batch."""
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        """Log the loss of a batch held out."""
        self.log("eval_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


# Your own: tokenizer = AutoTokenizer.from_pretrained(name), and a Dataset of text and label.
tokenizer = make_tokenizer()
collate = DataCollatorWithPadding(tokenizer)


def load(texts: list[dict], shuffle: bool) -> DataLoader:
    """Tokenize texts, and make batches of them, padded to the longest text of each."""
    encoded = [{**tokenizer(one["text"]), "labels": one["label"]} for one in texts]
    return DataLoader(encoded, batch_size=16, shuffle=shuffle, collate_fn=collate)


# Dropout is off here, so that the losses are those of --plain.
config = BertConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
classifier = Classifier(config)

if not options.plain:
    prepared = sebp.prepare(classifier.model)  # the model that is called, not what is around it

with tempfile.TemporaryDirectory() as folder:
    trainer = lightning.Trainer(
        accelerator="cpu",  # precision="bf16-mixed" works too
        max_steps=options.steps,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
    )
    data, held_out = load(reviews(16 * options.steps), True), load(reviews(64, seed=1), False)
    trainer.fit(classifier, data, held_out)
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path)

Classifier(config).load_state_dict(checkpoint["state_dict"])  # an ordinary checkpoint
print("losses", *(f"{loss:.4f}" for loss in classifier.losses))
print("eval", f"{trainer.callback_metrics['eval_loss']:.4f}")
if not options.plain:
    print(prepared.report())
