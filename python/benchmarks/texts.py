# SPDX-License-Identifier: Apache-2.0
"""Texts for the benchmarks, real or drawn, and batches of them."""

import random
from pathlib import Path

import torch
from common import Batch

_FIRST, _END = 1000, 30000  # the words of BERT's vocabulary, by and large

Texts = list[tuple[list[int], int]]  # tokens with [CLS] and [SEP], label


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Read a vocabulary of a piece a line, the first line's id being 0."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        return {line.rstrip(): i for i, line in enumerate(file)}


def read_texts(data: Path, corpus: str, part: str = "train") -> Texts:
    """Read a corpus. Files are in UTF-8; a byte order mark is skipped.

    Parameters
    ----------
    data : Path
        A folder that holds ``bert-base-uncased/vocab.txt``, ``sst2/<part>.tsv`` (sentence, label)
        and ``cola/<part>.tsv`` (source, label, mark, sentence).
    corpus : {"sst2", "cola"}
        Which.
    part : str
        Which part of it.

    Returns
    -------
    list of pairs of list of int and int
        The tokens and the label of each sentence.
    """
    from tokenizers import BertWordPieceTokenizer

    column = {"sst2": 0, "cola": 3}[corpus]
    lines = (data / corpus / f"{part}.tsv").read_text(encoding="utf-8-sig").splitlines()
    fields = [line.split("\t") for line in lines]
    tokenizer = BertWordPieceTokenizer(_read_vocabulary(data / "bert-base-uncased" / "vocab.txt"))
    encoded = tokenizer.encode_batch([f[column] for f in fields])
    return [(e.ids, int(f[1])) for e, f in zip(encoded, fields, strict=True)]


def draw_texts(count: int) -> Texts:
    """Draw texts of random tokens whose lengths are distributed like SST-2's.

    That is exp(3.03 + 0.53 z) for a normal z, and 3 at least.
    """
    texts = []
    for _ in range(count):
        length = max(3, round(random.lognormvariate(3.03, 0.53)))
        tokens = [random.randrange(_FIRST, _END) for _ in range(length)]
        texts.append((tokens, random.randrange(2)))
    return texts


def make_batch(texts: Texts, length: int) -> Batch:
    """Pad texts to `length` tokens; longer ones are cut."""
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (tokens, _) in enumerate(texts):
        n = min(len(tokens), length)
        ids[i, :n] = torch.tensor(tokens[:n])
        mask[i, :n] = 1
    labels = torch.tensor([label for _, label in texts])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trim(batch: Batch) -> Batch:
    """Trim a batch to its longest text."""
    longest = int(batch["attention_mask"].sum(1).max())
    return {key: t[:, :longest] if t.dim() == 2 else t for key, t in batch.items()}


def fill(batch: Batch) -> Batch:
    """Put random tokens in the place of padding."""
    mask = batch["attention_mask"]
    ids = torch.where(mask != 0, batch["input_ids"], torch.randint(_FIRST, _END, mask.shape))
    return {**batch, "input_ids": ids, "attention_mask": torch.ones_like(mask)}
