# SPDX-License-Identifier: Apache-2.0
"""Train PEFT's LoRA of a language model, merge it and save it."""

import argparse
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from texts import make_tokenizer, reviews
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
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

# Your own: tokenizer = AutoTokenizer.from_pretrained(name), and a Dataset of texts.
tokenizer = make_tokenizer(decoder=True)
data = [tokenizer(one["text"]) for one in reviews(16 * options.steps)]

# Your own: base = AutoModelForCausalLM.from_pretrained(name).
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    max_position_embeddings=128,
    pad_token_id=tokenizer.pad_token_id,
)
base = LlamaForCausalLM(config)
weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}

lora = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules="all-linear",
    modules_to_save=["lm_head"],  # as its weights are random here
    task_type="CAUSAL_LM",
)
model = get_peft_model(base, lora)

if not options.plain:
    prepared = sebp.prepare(model)  # after get_peft_model(), so that the adapters have it too

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    if not options.plain:
        print(prepared.report())

    # The adapter goes into a model that has never seen SEBP, and so do the merged weights.
    model.save_pretrained(folder)
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(weights)
    fresh = PeftModel.from_pretrained(fresh, folder)
    merged = model.merge_and_unload()
    if not options.plain:
        prepared.undo()  # done with training
    merged.save_pretrained(f"{folder}/merged")
    whole = LlamaForCausalLM.from_pretrained(f"{folder}/merged")

batch = tokenizer([one["text"] for one in reviews(4, seed=1)], padding=True, return_tensors="pt")
real = batch["attention_mask"] != 0
with torch.no_grad():
    want = fresh.eval()(**batch).logits[real]
    for one in (merged, whole):
        torch.testing.assert_close(one.eval()(**batch).logits[real], want, rtol=1e-3, atol=1e-4)
print("losses", *(f"{log['loss']:.4f}" for log in trainer.state.log_history if "loss" in log))
