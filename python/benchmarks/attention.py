# SPDX-License-Identifier: Apache-2.0
"""Attention's forward and backward against PyTorch's, text by text and on a padded batch.

Every line is one batch. Modes take turns, round by round; times are medians. The texts of a batch
have lengths from half of the longest to the longest; PyTorch's padded batch gets the mask that says
so, as models give it, and its text by text gets slices that are ready.
"""

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from sebp.attention import AttentionOptions, Sequences, attention_backward, attention_forward
from sebp.core import Context


def make_modes(
    lengths: list[int], heads: int, d: int, context: Context
) -> dict[str, Callable[[], object]]:
    """Give the three ways, each a forward and a backward of the same texts."""
    texts, total, longest = Sequences.from_lengths(lengths), sum(lengths), max(lengths)
    q, k, v, dout = (torch.randn(total, heads * d) for _ in range(4))
    arrays = [x.numpy() for x in (q, k, v)]
    options = AttentionOptions(heads=heads)

    def ours() -> object:
        out, lse = attention_forward(*arrays, texts, options=options, context=context)
        return attention_backward(
            dout.numpy(), *arrays, out, lse, texts, options=options, context=context
        )

    def split(x: torch.Tensor) -> list[torch.Tensor]:
        parts = x.split(lengths)
        return [part.view(1, len(part), heads, d).transpose(1, 2) for part in parts]

    slices = [split(x) for x in (q, k, v, dout)]

    def text_by_text() -> None:
        for q_i, k_i, v_i, dout_i in zip(*slices, strict=True):
            leaves = [x.detach().requires_grad_() for x in (q_i, k_i, v_i)]
            scaled_dot_product_attention(*leaves).backward(dout_i)

    def pad(x: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True)
        return padded.view(len(lengths), longest, heads, d).transpose(1, 2)

    padded = [pad(x) for x in (q, k, v, dout)]
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None, :]

    def batch() -> None:
        leaves = [x.detach().requires_grad_() for x in padded[:3]]
        scaled_dot_product_attention(*leaves, attn_mask=mask).backward(padded[3])

    return {"sebp": ours, "text by text": text_by_text, "padded": batch}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8, 16, 32, 64, 128, 512])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    context = Context(threads=arguments.threads)
    print(f"{'longest':>8} {'texts':>6} {'sebp ms':>9} {'text by text':>13} {'padded':>9}")
    for longest in arguments.lengths:
        count = max(1, arguments.tokens * 4 // (longest * 3))
        lengths = [int(n) for n in rng.integers((longest + 1) // 2, longest + 1, size=count)]
        modes = make_modes(lengths, arguments.heads, arguments.head_size, context)
        times: dict[str, list[float]] = {name: [] for name in modes}
        for round_ in range(arguments.rounds + 1):
            for name, run in modes.items():
                start = perf_counter()
                run()
                if round_ > 0:
                    times[name].append((perf_counter() - start) * 1e3)
        ours, single, padded = (statistics.median(times[name]) for name in modes)
        print(
            f"{longest:8} {count:6} {ours:9.2f} {single:9.2f} {single / ours:3.1f}x "
            f"{padded:9.2f} {padded / ours:3.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
