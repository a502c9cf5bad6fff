# SPDX-License-Identifier: Apache-2.0
"""What the methods of methods.py cost: the time of a step, memory, and the basis phase."""

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter, process_time

import torch
from common import (
    Batch,
    Mode,
    Times,
    peak_memory,
    print_table,
    run_again,
    take_step,
    write_csv,
)
from methods import METHODS, NothingTrainsError, SparseGrad, Training
from texts import make_batch, read_texts, trim
from torch import nn

from sebp.sparse import Basis, BasisSums, Sums
from sebp.torch.apply.feed_forward import choose_layers, place_of

MakeModel = Callable[[], nn.Module]
MakeBatches = Callable[[int], list[Batch]]

_RATE = 1e-5
_PHASES = {
    "full": "full training",
    "collect": "the sums of the basis phase",
    "leading": "sums, and bases of the leading vectors",
    "all": "sums, and bases of all vectors",
}


def full_bytes(model: nn.Module) -> int:
    """Return the bytes of gradient and state when all feed-forward elements are trained."""
    return sum(3 * module.weight.nbytes for _, module in choose_layers(model, None))


def batches_of_texts(options: argparse.Namespace, count: int) -> list[Batch]:
    """Make batches of a corpus' training texts."""
    draw = random.Random(1)
    texts = draw.choices(read_texts(options.data, options.corpus[0]), k=count * options.batch)
    starts = range(0, len(texts), options.batch)
    return [make_batch(texts[i : i + options.batch], options.length) for i in starts]


def random_bases(model: nn.Module, leading: int | None) -> dict[str, Basis]:
    """Make bases of random directions, where it does not matter which."""
    shapes = {}
    for name, module in choose_layers(model, None):
        n, k = module.weight.shape
        shapes[f"{place_of(name)} {n}x{k}"] = (n, k)

    def vectors(size: int) -> object:
        rank = min(size, leading or size)
        return torch.linalg.qr(torch.randn(size, rank))[0].t().contiguous().numpy()

    return {name: Basis.from_vectors(vectors(n), vectors(k)) for name, (n, k) in shapes.items()}


# --------------------------------------------------------------------------------------------------
# Times


def time_steps(
    options: argparse.Namespace, make_model: MakeModel, make_batches: MakeBatches
) -> None:
    """Time steps of all methods in turn, each with its own model, after their warm-up.

    With ``options.cpu`` times are those of the processor. Methods that train nothing, or nothing
    more after their warm-up, are left out.
    """
    clock = process_time if options.cpu else perf_counter
    sizes = replace(options.sizes, basis_steps=3, fix_after=2)
    batches = make_batches(options.rounds)
    trainings, times = {}, {}
    for name in options.methods:
        try:
            training = Training(name, make_model(), _RATE, sizes)
        except NothingTrainsError as error:
            print(f"not timed: {error}")
            continue
        mode = Mode(name, "full", batches)
        if METHODS[name].trims:
            mode = replace(mode, loss=lambda model, batch: model(**trim(batch)).loss)
        for i in range(METHODS[name].warm_up(sizes) + 1):
            if training.goes_on():
                batch = batches[i % len(batches)]
                take_step(mode, training.model, training.optimizer, batch, Times())
        if not training.goes_on():
            print(f"not timed: {name} with {sizes.train} trains nothing after its warm-up")
            continue
        trainings[name], times[name] = (mode, training), Times(clock)
    if not trainings:
        raise SystemExit("no method to time")
    for batch in batches:
        for name, (mode, training) in trainings.items():
            take_step(mode, training.model, training.optimizer, batch, times[name])
    base = trainings.get("full", next(iter(trainings.values())))[0].name
    rows = []
    for name, (_, training) in trainings.items():
        t, share = times[name], training.share()
        medians = [statistics.median(part) for part in (t.forward, t.backward, t.optimizer, t.step)]
        ratios = [own / other for own, other in zip(t.step, times[base].step, strict=True)]
        quarters = ratios * 3  # one round has one
        if len(ratios) > 1:
            quarters = statistics.quantiles(ratios, n=4, method="inclusive")
        kept = share.gradient + share.state
        rows.append([name, *medians, *quarters, share.elements, kept, share.bases, share.scratch])
    whole = full_bytes(make_model())
    print(
        f"activity {mode.activity:.3f}; step / {base} is the median of the rounds' ratios, and half"
        f" of them lie in the range beside it{'; milliseconds of CPU time' * options.cpu}\n"
    )
    print_table(
        ["method", "forward ms", "backward ms", "optimizer ms", "step ms", f"step / {base}"]
        + ["elements", "gradient and state MiB", "of full", "bases and scratch MiB"],
        [
            [name, *(f"{ms:.1f}" for ms in medians), f"{mid:.3f}, {low:.3f} to {high:.3f}"]
            + [str(elements), f"{kept / 2**20:.2f}", f"{kept / whole:.1%}"]
            + [f"{(bases + scratch) / 2**20:.2f}"]
            for name, *medians, low, mid, high, elements, kept, bases, scratch in rows
        ],
    )
    if "pytorch" in times:
        backward = {name: statistics.median(t.backward) for name, t in times.items()}
        faster = ", ".join(
            f"{name} {backward['pytorch'] / ms:.2f}" for name, ms in backward.items()
        )
        print(f"\nbackward, times as fast as that of pytorch: {faster}")
    if options.csv:
        header = "method,forward_ms,backward_ms,optimizer_ms,step_ms,ratio_low,ratio,ratio_high"
        header += ",elements,gradient_and_state_bytes,bases_bytes,scratch_bytes"
        write_csv(options.csv, header.split(","), rows)


# --------------------------------------------------------------------------------------------------
# Memory


def measure_memory(
    options: argparse.Namespace, make_model: MakeModel, make_batches: MakeBatches
) -> None:
    """Train a few steps by --memory-of and print this process's peak in MiB.

    SparseGrad's steps are two of the basis phase and two that follow, or with --given-bases the
    latter alone.
    """
    name, model = options.memory_of, make_model()
    phase = name in _PHASES and name != "full"
    sizes = replace(options.sizes, basis_steps=3 if phase else 2, fix_after=1)
    bases = None
    if phase:
        # All end with the last step of the basis phase, or one before it where no basis is made.
        steps = 3
        sizes = replace(sizes, basis_steps=steps + (name == "collect"))
        name = "sparsegrad-leading" if name == "leading" else "sparsegrad"
    else:
        steps = 4
        method = METHODS[name]
        if options.given_bases and isinstance(method, SparseGrad):
            bases = random_bases(model, method.leading(sizes))
    batches = make_batches(steps)
    try:
        training = Training(name, model, _RATE, sizes, bases)
    except NothingTrainsError:
        batches = []
    for batch in batches:
        if training.goes_on():
            take_step(Mode(name, "full", []), model, training.optimizer, batch, Times())
    print(peak_memory())


def report_memory(options: argparse.Namespace) -> None:
    """Print each method's peak, in a process of its own."""
    rows = []
    for name in options.methods:
        peak = float(run_again("--memory-of", name))
        given = peak
        if isinstance(METHODS[name], SparseGrad):
            given = float(run_again("--memory-of", name, "--given-bases"))
        rows.append([name, peak, given])
    base = next((row for row in rows if row[0] == "full"), rows[0])
    print_table(
        ["method", "peak MiB", f"over {base[0]}", "bases given: peak MiB", f"over {base[0]}"],
        [
            [name, f"{p:.0f}", f"{p - base[1]:+.0f}", f"{g:.0f}", f"{g - base[1]:+.0f}"]
            for name, p, g in rows
        ],
    )
    if options.csv:
        write_csv(options.csv, ["method", "peak_mib", "peak_given_bases_mib"], rows)


# --------------------------------------------------------------------------------------------------
# The basis phase


def report_basis(
    options: argparse.Namespace, make_model: MakeModel, make_batches: MakeBatches
) -> None:
    """Print what the basis phase takes: time, and memory over that of full training."""
    sizes = replace(options.sizes, basis_steps=options.rounds + 2)  # it does not end here
    batches = make_batches(options.rounds)
    trainings = {
        name: Training(name, make_model(), _RATE, sizes) for name in ("full", "sparsegrad")
    }
    times = {name: Times() for name in trainings}
    for i in range(-1, options.rounds):
        for name, training in trainings.items():
            kept = times[name] if i >= 0 else Times()
            mode = Mode(name, "full", batches)
            take_step(mode, training.model, training.optimizer, batches[max(i, 0)], kept)
    collect = statistics.median(
        own - other
        for own, other in zip(times["sparsegrad"].optimizer, times["full"].optimizer, strict=True)
    )
    optimizer = trainings["sparsegrad"].optimizer
    sums_bytes = optimizer.bytes().bases
    saved = optimizer.state_dict()["sebp"]["sums"]
    sums = {}
    for kind in optimizer.kinds:
        sums[kind.name] = BasisSums(*kind.shape)
        arrays = saved[kind.name].items()
        arrays = {name: x.numpy() if torch.is_tensor(x) else x for name, x in arrays}
        sums[kind.name].set_sums(Sums(**arrays))
    print(
        f"a step of the basis phase takes {collect:.1f} ms more than the"
        f" {statistics.median(times['full'].step):.1f} ms of full training;"
        f" {options.basis_steps} of them {options.basis_steps * collect / 1e3:.1f} s;"
        f" the sums {sums_bytes / 1e6:.1f} MB\n"
    )
    rows = []
    for kind in optimizer.kinds:
        for rank in ((sizes.leading, sizes.leading), kind.shape):
            start = perf_counter()
            basis = sums[kind.name].solve(*rank)
            seconds = perf_counter() - start
            rows.append([kind.name, *rank, seconds, *basis.shares, basis.bytes])
    print_table(
        ["layers", "vectors", "solve s", "energy out", "energy in", "bases MB"],
        [
            [name, f"{p} x {q}", f"{s:.2f}", f"{out:.1%}", f"{into:.1%}", f"{size / 1e6:.1f}"]
            for name, p, q, s, out, into, size in rows
        ],
    )
    print()
    peaks = {name: float(run_again("--memory-of", name)) for name in _PHASES}
    print_table(
        ["process", "peak MiB", "over full"],
        [
            [_PHASES[name], f"{peak:.0f}", f"{peak - peaks['full']:+.0f}"]
            for name, peak in peaks.items()
        ],
    )
    if options.csv:
        header = "layers,rank_out,rank_in,solve_s,energy_out,energy_in,bases_bytes"
        header += ",collect_ms,sums_bytes,peak_over_full_mib"
        over = {"leading": peaks["leading"] - peaks["full"], "all": peaks["all"] - peaks["full"]}
        write_csv(
            options.csv,
            header.split(","),
            [
                [*row, collect, sums_bytes, over["leading" if row[1] == sizes.leading else "all"]]
                for row in rows
            ],
        )


def run(
    options: argparse.Namespace, title: str, make_model: MakeModel, make_batches: MakeBatches
) -> None:
    """Run what the options ask for.

    Parameters
    ----------
    title : str
        What is trained.
    make_model : callable
        Makes a model to be trained.
    make_batches : callable
        Makes a number of batches.
    """
    if options.memory_of:
        measure_memory(options, make_model, make_batches)
        return
    print(
        f"{title}, {options.batch} x {options.length};"
        f" rank {options.sizes.rank}, leading {options.sizes.leading}, trained:"
        f" {options.sizes.train};"
        f" PyTorch {torch.__version__}, {torch.get_num_threads()} threads\n",
        flush=True,
    )
    if options.time:
        time_steps(options, make_model, make_batches)
    elif options.memory:
        report_memory(options)
    else:
        report_basis(options, make_model, make_batches)
