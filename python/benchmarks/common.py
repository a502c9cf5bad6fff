# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: modes, timing them in turn, peak memory, profiles, tables.

A *mode* is a way to take the same training step. All modes of a benchmark train one model, in one
process, in turn: each round takes one step in each mode, on the same texts. So whatever changes the
machine's speed on the way changes all of them. What is reported is the median over the rounds.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import sebp

Batch = dict[str, Tensor]


# --------------------------------------------------------------------------------------------------
# Modes


def take_padding_out(model: nn.Module) -> None:
    """Put SEBP into all linear layers, and let the encoder work on real tokens alone."""
    report = sebp.apply_sebp_to_model(model, padding=True)
    if not report.padding.changed:
        raise SystemExit(f"padding-free: {report}")


@contextmanager
def with_sebp(model: nn.Module) -> Iterator[None]:
    """Train with SEBP in all linear layers."""
    sebp.apply_sebp_to_model(model)
    try:
        yield
    finally:
        sebp.remove_sebp_from_model(model)


@contextmanager
def padding_free(model: nn.Module) -> Iterator[None]:
    """Train with SEBP on real tokens alone."""
    take_padding_out(model)
    try:
        yield
    finally:
        sebp.remove_sebp_from_model(model)


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Train with all that sebp.prepare() puts in by itself."""
    with sebp.prepare(model, quiet=True):
        yield


@contextmanager
def deferred(model: nn.Module) -> Iterator[None]:
    """Train with all that sebp.prepare() has, and no logits."""
    with sebp.prepare(model, defer_logits=True, quiet=True):
        yield


@dataclass
class Mode:
    """A way to take a training step.

    Attributes
    ----------
    name : str
        Of the mode, in tables.
    baseline : str
        The mode whose times its speedups refer to.
    batches : list of dict
        The batch of each round.
    loss : callable
        Computes the loss from a model and a batch.
    change : callable
        Gives the context manager in which a model trains in this mode.
    is_compared : bool
        Whether the first forward after the change compares results with the model as it is. Here it
        comes anew with each step, in a run once: so it is taken before, and not timed.
    """

    name: str
    baseline: str
    batches: list[Batch]
    loss: Callable[[nn.Module, Batch], Tensor] = lambda model, batch: model(**batch).loss
    change: Callable[[nn.Module], AbstractContextManager] = nullcontext
    is_compared: bool = False

    @property
    def activity(self) -> float:
        """The share of real tokens among those of all batches; 1 for batches without a mask."""
        ids = [batch["input_ids"] for batch in self.batches]
        masks = [
            batch.get("attention_mask", torch.ones_like(x))
            for x, batch in zip(ids, self.batches, strict=True)
        ]
        return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


@dataclass
class Times:
    """Milliseconds of a mode's steps, one of each kind a round, by a clock in seconds."""

    clock: Callable[[], float] = perf_counter
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    @property
    def step(self) -> list[float]:
        """Of whole steps."""
        return [sum(t) for t in zip(self.forward, self.backward, self.optimizer, strict=True)]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Make AdamW as the Trainer of transformers has it by default: fused."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def take_step(
    mode: Mode, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, times: Times
) -> float:
    """Take one training step and note how long each part took.

    Returns
    -------
    float
        The loss.
    """
    with mode.change(model):
        if mode.is_compared:
            mode.loss(model, batch)
        t0 = times.clock()
        loss = mode.loss(model, batch)
        t1 = times.clock()
        loss.backward()
        t2 = times.clock()
        optimizer.step()
        optimizer.zero_grad()
        t3 = times.clock()
    times.forward.append(1e3 * (t1 - t0))
    times.backward.append(1e3 * (t2 - t1))
    times.optimizer.append(1e3 * (t3 - t2))
    return float(loss.detach())


def run_modes(modes: list[Mode], model: nn.Module) -> dict[str, Times]:
    """Time all modes in turn.

    Returns
    -------
    dict of str to Times
        By the name of the mode. The first round is a warm-up and left out.
    """
    optimizer = make_optimizer(model)
    times = {mode.name: Times() for mode in modes}
    rounds = len(modes[0].batches)
    for i in range(-1, rounds):
        for mode in modes:
            kept = times[mode.name] if i >= 0 else Times()
            take_step(mode, model, optimizer, mode.batches[max(i, 0)], kept)
    return times


# --------------------------------------------------------------------------------------------------
# Tables


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table, its first column on the left and the others on the right."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for n, row in enumerate(table):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("| " + " | ".join(cells) + " |")
        if n == 0:
            rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
            print("| " + " | ".join(rule) + " |")


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    """Write a table for programs."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def report_times(modes: list[Mode], times: dict[str, Times], path: Path | None) -> None:
    """Print the medians and the speedups they make, and write them to `path`."""
    medians = {
        name: [statistics.median(part) for part in (t.forward, t.backward, t.optimizer, t.step)]
        for name, t in times.items()
    }
    rows = []
    for mode in modes:
        own, base = medians[mode.name], medians[mode.baseline]
        rows.append([mode.name, mode.activity, *own, base[1] / own[1], base[3] / own[3]])
    print_table(
        ["mode", "activity", "forward ms", "backward ms", "optimizer ms", "step ms"]
        + ["backward speedup", "step speedup"],
        [
            [
                name,
                f"{activity:.3f}",
                *(f"{t:.0f}" for t in row[:4]),
                *(f"{s:.2f}" for s in row[4:]),
            ]
            for name, activity, *row in rows
        ],
    )
    for ours in ("padding-free", "prepared"):
        if "trimmed" in medians and ours in medians:
            ratio = medians["trimmed"][3] / medians[ours][3]
            print(f"\nA step of {ours} against trimmed: {ratio:.2f} times as fast.")
    if path is not None:
        header = "mode,activity,forward_ms,backward_ms,optimizer_ms,step_ms"
        write_csv(path, (header + ",backward_speedup,step_speedup").split(","), rows)


# --------------------------------------------------------------------------------------------------
# Memory


def peak_memory() -> float:
    """Return the most memory this process has held so far, in MiB.

    That is not ``getrusage``'s: there a process begins with the peak of the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def run_again(*words: str) -> str:
    """Run this program again, with more words on its command line, and give what it prints last."""
    command = [sys.executable, *sys.argv, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout.splitlines()[-1]


def report_memory(modes: list[Mode], path: Path | None) -> None:
    """Run this program again for each mode, with --memory-of, and print the peaks."""
    peaks = {mode.name: float(run_again("--memory-of", mode.name)) for mode in modes}
    rows = [[m.name, peaks[m.name], peaks[m.name] - peaks[m.baseline]] for m in modes]
    print_table(
        ["mode", "peak MiB", "against baseline"],
        [[name, f"{peak:.0f}", f"{more:+.0f}"] for name, peak, more in rows],
    )
    if path is not None:
        write_csv(path, ["mode", "peak_mib", "against_baseline_mib"], rows)


# --------------------------------------------------------------------------------------------------
# Profiles


def report_profile(modes: list[Mode], model: nn.Module, path: Path | None) -> None:
    """Print for each mode the operators that take a hundredth or more of each part of a step."""
    optimizer = make_optimizer(model)
    rows = []
    for mode in modes:
        batch = mode.batches[0]
        take_step(mode, model, optimizer, batch, Times())
        with mode.change(model):
            with profile(activities=[ProfilerActivity.CPU]) as forward:
                loss = mode.loss(model, batch)
            with profile(activities=[ProfilerActivity.CPU]) as backward:
                loss.backward()
            with profile(activities=[ProfilerActivity.CPU]) as update:
                optimizer.step()
                optimizer.zero_grad()
        for part, run in (("forward", forward), ("backward", backward), ("optimizer", update)):
            events = sorted(run.key_averages(), key=lambda e: -e.self_cpu_time_total)
            total = sum(e.self_cpu_time_total for e in events)
            for e in events:
                if e.self_cpu_time_total >= 0.01 * total:
                    ms = e.self_cpu_time_total / 1e3
                    rows.append([mode.name, part, e.key, e.count, ms, ms * 1e3 / total])
    print_table(
        ["mode", "part", "operator", "calls", "ms", "share"],
        [[m, part, op, str(n), f"{ms:.1f}", f"{share:.0%}"] for m, part, op, n, ms, share in rows],
    )
    if path is not None:
        write_csv(path, ["mode", "part", "operator", "calls", "ms", "share"], rows)


# --------------------------------------------------------------------------------------------------
# Programs


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make the parser of the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--modes", metavar="NAME,...", help="these modes alone (baselines are added)")
    add("--rounds", type=int, default=5, help="steps in each mode, after one to warm up")
    add("--threads", type=int, help="PyTorch's and libsebp's threads; default: PyTorch's choice")
    add("--autocast", action="store_true", help="compute losses under autocast to bfloat16")
    add("--precision", choices=("high", "medium"), help="of products of float32; default: highest")
    add("--csv", type=Path, metavar="FILE", help="write the table to this file too")
    add("--memory", action="store_true", help="peak memory of each mode instead of times")
    add("--profile", action="store_true", help="time of each operator instead of each part")
    add("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    return parser


def under_autocast(loss: Callable[[nn.Module, Batch], Tensor]) -> Callable:
    """Make a function that computes a loss under autocast to bfloat16."""

    def compute(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    return compute


def choose_modes(modes: list[Mode], names: str | None) -> list[Mode]:
    """Take the modes that --modes names, and their baselines."""
    if names is None:
        return modes
    wanted = set(names.split(","))
    unknown = wanted - {mode.name for mode in modes}
    if unknown:
        known = ", ".join(mode.name for mode in modes)
        raise SystemExit(f"no mode {', '.join(sorted(unknown))}; there are: {known}")
    wanted |= {mode.baseline for mode in modes if mode.name in wanted}
    return [mode for mode in modes if mode.name in wanted]


def run_benchmark(
    options: argparse.Namespace, title: str, modes: list[Mode], model: nn.Module
) -> None:
    """Run what the options ask for."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.precision:
        torch.set_float32_matmul_precision(options.precision)
    if options.autocast:
        modes = [replace(mode, loss=under_autocast(mode.loss)) for mode in modes]
    kind = "autocast to bfloat16, " * options.autocast
    kind += f"precision {options.precision}, " * bool(options.precision)
    model.train()
    if options.memory_of:
        (mode,) = (mode for mode in modes if mode.name == options.memory_of)
        optimizer = make_optimizer(model)
        for batch in mode.batches[:3]:
            take_step(mode, model, optimizer, batch, Times())
        print(peak_memory())
        return
    modes = choose_modes(modes, options.modes)
    threads = torch.get_num_threads()
    print(f"{title}; {kind}PyTorch {torch.__version__}, {threads} threads\n", flush=True)
    if options.memory:
        report_memory(modes, options.csv)
    elif options.profile:
        report_profile(modes, model, options.csv)
    else:
        report_times(modes, run_modes(modes, model), options.csv)
