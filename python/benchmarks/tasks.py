# SPDX-License-Identifier: Apache-2.0
"""Questions with short answers, made by a program from a seed, and plain text.

- arithmetic: "34 + 58 = ", whose answer is "92", or a difference;
- lookup: a table of names, ages and rooms, and "room of Teo: ", whose answer stands in the table.

An answer ends with a line break, which is part of it. The plain text shows what a model forgets
while it learns them.
"""

import random
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from common import Batch

IGNORED = -100  # the label of a token that the loss leaves out

_BEGINNINGS = ("Ba", "Do", "Fe", "Ka", "Li", "Mo", "Ni", "Ra", "Su", "Te")
_ENDS = ("da", "la", "mi", "no", "ra", "so", "ta", "vi")

PLAIN_TEXT = (
    "The kitchen is the warmest room of the house in winter. There is a large stove in the corner,"
    " and beside it a bench on which the cat sleeps all day. When my grandmother bakes bread, the"
    " smell of it reaches even the rooms under the roof.",
    "To change a tire you need a jack and a wrench. First make sure that the car stands on firm"
    " ground and cannot roll away. Loosen the nuts a little before you lift the car, because a"
    " wheel in the air turns when you pull on it.",
    "Rivers carry sand and small stones from the mountains to the sea. Where the water is fast,"
    " only large stones stay on the ground. Where it becomes slow, the sand sinks, and in the"
    " course of many years it forms islands.",
    "She had been looking forward to this trip for months. But when the train finally left the"
    " station, she felt sad, and she did not know why. Her brother was still standing on the"
    " platform and waving, and he became smaller and smaller.",
    "A library is more than a house full of books. People come there to read the newspaper, to do"
    " their homework, or simply because it is quiet. In many towns it is the only public room"
    " where nobody has to buy anything.",
)

Encode = Callable[[str], list[int]]


class Example(NamedTuple):
    """A question and its answer, as tokens."""

    prompt: list[int]
    answer: list[int]


def _arithmetic(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(10, 100), draw.randrange(10, 100)
    if draw.random() < 0.5:
        return f"{a} + {b} = ", f"{a + b}\n"
    return f"{max(a, b)} - {min(a, b)} = ", f"{abs(a - b)}\n"


def _lookup(draw: random.Random) -> tuple[str, str]:
    names = draw.sample([beginning + end for beginning in _BEGINNINGS for end in _ENDS], 4)
    table = {name: {word: draw.randrange(10, 100) for word in ("age", "room")} for name in names}
    lines = [f"{name}: age {row['age']}, room {row['room']}\n" for name, row in table.items()]
    name, word = draw.choice(names), draw.choice(("age", "room"))
    return f"{''.join(lines)}{word} of {name}: ", f"{table[name][word]}\n"


TASKS = {"arithmetic": _arithmetic, "lookup": _lookup}


def draw_questions(
    task: str, seed: int, without: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """Draw questions and answers without end, as words.

    Parameters
    ----------
    task : str
        Of `TASKS`.
    seed : int
        What they are drawn from.
    without : collection of str
        Questions that are left out, so that what judges is not trained on.
    """
    draw = random.Random(f"{task} {seed}")
    while True:
        question, answer = TASKS[task](draw)
        if question not in without:
            yield question, answer


def encode(pair: tuple[str, str], tokens_of: Encode) -> Example:
    """Turn a question and its answer into tokens, each by itself."""
    return Example(tokens_of(pair[0]), tokens_of(pair[1]))


def make_batch(examples: list[Example], length: int | None = None) -> Batch:
    """Make a batch whose loss is that of the answers alone.

    Parameters
    ----------
    examples : list of Example
        B of them.
    length : int, optional
        L, which they are padded to on the right; default: that of the longest.

    Returns
    -------
    dict of str to Tensor
        ids, mask and labels, B x L.

    Raises
    ------
    ValueError
        If one is longer.
    """
    longest = max(len(one.prompt) + len(one.answer) for one in examples)
    length = length or longest
    if longest > length:
        raise ValueError(f"an example has {longest} tokens, over {length}")
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, one in enumerate(examples):
        begin, end = len(one.prompt), len(one.prompt) + len(one.answer)
        ids[i, :end] = torch.tensor(one.prompt + one.answer)
        mask[i, :end] = 1
        labels[i, begin:end] = torch.tensor(one.answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
