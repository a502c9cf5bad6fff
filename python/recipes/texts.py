# SPDX-License-Identifier: Apache-2.0
"""A small made-up corpus that can be learnt, and a tokenizer of its words."""

import random

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_THINGS = ["film", "book", "song", "meal", "hotel", "garden", "lecture", "market", "ship", "museum"]
_GOOD = ["good", "lovely", "warm"]
_BAD = ["bad", "noisy", "cold"]
_FILLERS = ["we", "went", "there", "on", "monday", "with", "friends", "and", "stayed"]
_WORDS = ["the", "was", "how", "?"]


def reviews(count: int, seed: int = 0) -> list[dict]:
    """Make texts of 5 to 36 words, each with a label: 1 where it speaks well of something."""
    draw = random.Random(seed)
    result = []
    for _ in range(count):
        label = draw.randrange(2)
        words = ["the", draw.choice(_THINGS), "was"]
        words += draw.choices(_GOOD if label else _BAD, k=draw.randrange(2, 7))
        words += _FILLERS * 3 if draw.random() < 0.1 else _FILLERS[: draw.randrange(len(_FILLERS))]
        result.append({"text": " ".join(words), "label": label})
    return result


def questions(count: int, seed: int = 0) -> list[dict]:
    """Make questions of 4 or more words, and answers that name what the question is about."""
    draw = random.Random(seed)
    result = []
    for review in reviews(count, seed):
        thing = review["text"].split()[1]
        words = ["how", "was", "the", thing, "?", *_FILLERS[: draw.randrange(len(_FILLERS))]]
        result.append({"question": " ".join(words), "answer": review["text"]})
    return result


def make_tokenizer(decoder: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer of words: [CLS] text [SEP] for encoders, the text alone for decoders."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, *_WORDS, *_THINGS, *_GOOD, *_BAD, *_FILLERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not decoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_max_length=64,
    )
