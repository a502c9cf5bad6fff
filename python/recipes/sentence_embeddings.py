# SPDX-License-Identifier: Apache-2.0
"""Train embeddings of sentences by sentence-transformers: questions near to their answers."""

import argparse
import tempfile

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from texts import make_tokenizer, questions
from transformers import BertConfig, BertModel, set_seed

import sebp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--plain", action="store_true", help="leave SEBP out")
options = parser.parse_args()
set_seed(0)

# Your own: model = SentenceTransformer(name). A folder without settings gets a mean over the text.
# Dropout is off here, so that the losses are those of --plain.
with tempfile.TemporaryDirectory() as folder:
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = SentenceTransformer(folder, device="cpu")

if not options.plain:
    # This and the import are all that SEBP needs. The mean is made by multiplying with the mask, so
    # padded tokens may as well be zeros: check=False leaves them out in evaluation too.
    prepared = sebp.prepare(model, check=False)

with tempfile.TemporaryDirectory() as folder:
    # Your own: a Dataset with a column of questions and one of answers.
    data = Dataset.from_list(questions(16 * options.steps))
    arguments = SentenceTransformerTrainingArguments(
        folder,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    model.save(folder)
    again = SentenceTransformer(folder, device="cpu")

# What was saved is an ordinary model, which has never seen SEBP.
texts = data["answer"][:32]
torch.testing.assert_close(
    model.encode(texts, convert_to_tensor=True), again.encode(texts, convert_to_tensor=True)
)
print("losses", *(f"{log['loss']:.4f}" for log in trainer.state.log_history if "loss" in log))
if not options.plain:
    print(prepared.report())
