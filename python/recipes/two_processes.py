# SPDX-License-Identifier: Apache-2.0
"""Classify texts by BERT in two processes: DistributedDataParallel over gloo.

By itself this program starts both. ``torchrun --nproc-per-node 2 two_processes.py`` works too.
"""

import argparse
import os
import socket

import torch
from texts import make_tokenizer, reviews
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

import sebp

PROCESSES = 2


def train(options: argparse.Namespace) -> None:
    """Train in one of the processes."""
    torch.manual_seed(0)

    # Your own: tokenizer = AutoTokenizer.from_pretrained(name), and a Dataset of text and label.
    tokenizer = make_tokenizer()
    texts = reviews(16 * options.steps)
    texts = [{**tokenizer(one["text"]), "labels": one["label"]} for one in texts]
    collate = DataCollatorWithPadding(tokenizer)
    sampler = DistributedSampler(texts)
    data = DataLoader(texts, batch_size=16 // PROCESSES, sampler=sampler, collate_fn=collate)

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

    is_first = distributed.get_rank() == 0
    if not options.plain:
        # This line and the import are all that SEBP needs. It comes before DDP.
        prepared = sebp.prepare(model, quiet=not is_first)

    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=2e-3)
    losses = []
    parallel.train()
    for batch in data:
        loss = parallel(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / PROCESSES
        distributed.all_reduce(mean)
        losses.append(mean.item())

    if is_first:
        print("losses", *(f"{loss:.4f}" for loss in losses))
        if not options.plain:
            print(prepared.report())


def join(options: argparse.Namespace) -> None:
    """Train as one of the processes that RANK, WORLD_SIZE and MASTER_ADDR tell of."""
    torch.set_num_threads(max(1, os.cpu_count() // PROCESSES))
    distributed.init_process_group("gloo")
    train(options)
    # DistributedDataParallel is gone by now. If it kept the group, PyTorch could wait forever.
    distributed.destroy_process_group()


def start(rank: int, port: int, options: argparse.Namespace) -> None:
    """Begin a process as torchrun would."""
    place = dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank))
    os.environ.update(place, WORLD_SIZE=str(PROCESSES))
    join(options)


def free_port() -> int:
    """Find a port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--plain", action="store_true", help="leave SEBP out")
    options = parser.parse_args()
    if "RANK" in os.environ:
        join(options)
    else:
        multiprocessing.spawn(start, (free_port(), options), PROCESSES)
