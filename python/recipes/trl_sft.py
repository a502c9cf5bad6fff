# SPDX-License-Identifier: Apache-2.0
"""Tune a language model on questions and answers by TRL's SFTTrainer, texts laid end to end."""

import argparse
import tempfile

from datasets import Dataset
from texts import make_tokenizer, questions
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

import sebp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--plain", action="store_true", help="leave SEBP out: pad each batch")
parser.add_argument("--packing", action="store_true", help="fill rows of one length with texts")
options = parser.parse_args()
set_seed(0)

# Your own: tokenizer = AutoTokenizer.from_pretrained(name), and a Dataset of prompts and
# completions, or of messages, or of texts.
tokenizer = make_tokenizer(decoder=True)
data = Dataset.from_list(
    [
        {"prompt": one["question"], "completion": " " + one["answer"]}
        for one in questions(16 * options.steps)
    ]
)

# Your own: model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sebp").
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
)

if not options.plain:
    # Attention that knows texts which lie end to end, and linear layers that skip rows of zeros.
    model.set_attn_implementation(sebp.register_attention())
    prepared = sebp.prepare(model)

with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(
        folder,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        packing=options.packing,
        padding_free=not options.plain,
        max_length=64 if options.packing else None,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    LlamaForCausalLM.from_pretrained(folder)

print("losses", *(f"{log['loss']:.4f}" for log in trainer.state.log_history if "loss" in log))
if not options.plain:
    print(prepared.report())
