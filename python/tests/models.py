# SPDX-License-Identifier: Apache-2.0
"""Tiny models of transformers with random weights, and padded batches for them."""

import torch
import transformers
from torch import nn

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def make_model(name: str) -> nn.Module:
    """Make a tiny classifier or language model, the same at each call."""
    torch.manual_seed(0)
    t = transformers
    if name == "bert":
        return t.BertForSequenceClassification(t.BertConfig(vocab_size=99, **SIZES, **NO_DROPOUT))
    if name == "roberta":
        config = t.RobertaConfig(
            vocab_size=99, pad_token_id=1, max_position_embeddings=64, **SIZES, **NO_DROPOUT
        )
        return t.RobertaForSequenceClassification(config)
    if name == "distilbert":
        config = t.DistilBertConfig(
            vocab_size=99,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
        return t.DistilBertForSequenceClassification(config)
    if name == "gpt2":
        config = t.GPT2Config(
            vocab_size=99,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            pad_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return t.GPT2LMHeadModel(config)
    configs = {"llama": t.LlamaConfig, "mistral": t.MistralConfig, "qwen2": t.Qwen2Config}
    config = configs[name](vocab_size=99, num_key_value_heads=2, pad_token_id=0, **SIZES)
    return t.AutoModelForCausalLM.from_config(config)


def make_batch(name: str, seed: int, left: bool = False, batch: int = 4, length: int = 16) -> dict:
    """Draw texts of random lengths, padded to `length`.

    A language model's loss leaves out the first token of a text, which after padding on the left
    would be predicted from a padded one.
    """
    numbers = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length // 2, (batch, 1), generator=numbers)
    mask = (torch.arange(length) < lengths).long()
    mask = mask.flip(1) if left else mask
    pad = 1 if name == "roberta" else 0
    ids = torch.randint(5, 99, (batch, length), generator=numbers) * mask + pad * (1 - mask)
    if name in ("bert", "distilbert", "roberta"):
        labels = torch.randint(0, 2, (batch,), generator=numbers)
    else:
        labels = ids.masked_fill(mask.cumsum(1) * mask <= 1, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
