# SPDX-License-Identifier: Apache-2.0
"""What lies between the products of a block, forward and backward, by PyTorch and by the library.

    python blocks.py

Each row is one of the modules that sebp.prepare() knows, as it is and with the library's forward,
on M tokens of N features. Both take turns; a time is the shortest of all rounds. With --cpu it is
CPU time of the thread, for a machine that others use too; then there is one thread.
"""

import argparse
import copy
from collections.abc import Callable
from time import perf_counter, thread_time

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.bert.modeling_bert import BertConfig, BertSelfOutput
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from sebp.torch.blocks.put import give_blocks

Step = Callable[[], Tensor]


class Same(nn.Module):
    """A linear layer that gives what it gets, so that the rest of a block is timed alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


def bert_output(n: int) -> nn.Module:
    """Make dropout, residual and LayerNorm, as BERT has them."""
    block = BertSelfOutput(BertConfig(hidden_size=n))
    block.dense = Same()
    return block


def gated(n: int) -> nn.Module:
    """Make a gated SiLU, as Llama has it."""
    block = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=64))
    block.gate_proj = block.up_proj = block.down_proj = Same()
    return block


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "dropout": lambda n: nn.Dropout(0.1),
    "dropout, residual, LayerNorm": bert_output,
    "GELU": lambda n: nn.GELU(),
    "gated SiLU": gated,
    "RMSNorm, as Llama writes it": LlamaRMSNorm,
    "nn.RMSNorm": lambda n: nn.RMSNorm(n, 1e-6),
}


def make_steps(name: str, m: int, n: int, dtype: torch.dtype) -> list[Step]:
    """Give a forward and backward by PyTorch, and by the library."""
    plain = BLOCKS[name](n).to(dtype).train()
    inputs = [torch.randn(m, n).to(dtype).requires_grad_()]
    if name.startswith("dropout,"):
        inputs.append(torch.randn(m, n).to(dtype).requires_grad_())
    dy = torch.randn(m, n).to(dtype)
    ours = copy.deepcopy(plain)
    # A parameter beside it, as without any nothing is changed.
    if not give_blocks(nn.ModuleList([ours, nn.Linear(1, 1)])):
        raise SystemExit(f"{name} is not known in this version of transformers")
    return [lambda block=block: block(*inputs).backward(dy) for block in (plain, ours)]


def measure(steps: list[Step], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Return the shortest time of each, in milliseconds; the first round is a warm-up."""
    best = [float("inf")] * len(steps)
    for number in range(rounds + 1):
        for i, step in enumerate(steps):
            start = clock()
            step()
            if number > 0:
                best[i] = min(best[i], 1e3 * (clock() - start))
    return best


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tokens", type=int, default=350, help="M")
    add("--features", type=int, nargs="+", default=[768, 3072], help="N")
    add("--threads", type=int, help="default: PyTorch's choice")
    add("--rounds", type=int, default=50)
    add("--cpu", action="store_true", help="CPU time, with one thread")
    options = parser.parse_args()
    if options.threads or options.cpu:
        torch.set_num_threads(1 if options.cpu else options.threads)
    torch.manual_seed(0)
    clock = thread_time if options.cpu else perf_counter
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| block | M x N | dtype | PyTorch ms | library ms | times as fast |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for name in BLOCKS:
        for n in options.features:
            for dtype in (torch.float32, torch.bfloat16):
                steps = make_steps(name, options.tokens, n, dtype)
                own, ours = measure(steps, options.rounds, clock)
                kind = str(dtype).removeprefix("torch.")
                print(
                    f"| {name} | {options.tokens} x {n} | {kind} | {own:.3f} | {ours:.3f} |"
                    f" {own / ours:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
