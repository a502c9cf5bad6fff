# SPDX-License-Identifier: Apache-2.0
"""Runs of the encoder comparison: one method, one rate, one seed on one corpus."""

import argparse
import hashlib
import math
import random
import statistics
from pathlib import Path
from time import process_time

import torch
from common import run_again
from encoder import PACKAGE, accuracy, judge, load_model, matthews, order_texts
from methods import METHODS, Training
from runs import Row, RunFile, best_rate, choice_seeds, climb, describe_choice, is_choice
from texts import make_batch, read_texts

METRICS = {"sst2": ("accuracy", accuracy), "cola": ("Matthews correlation", matthews)}
PROTOCOL = ["model", "steps", "batch", "validation", "held_out", "train", "rank", "leading"]
PROTOCOL += ["basis_steps", "fix_after", "threads", "data"]
KEY = ["corpus", "method", "seed", "rate", "basis_rate", *PROTOCOL]
FOUND = ["metric", "loss", "step_ms", "cpu_s", "peak_mib", "energy", "elements"]
FOUND += ["gradient_bytes", "state_bytes", "bases_bytes", "scratch_bytes"]


class Corpus:
    """The texts of a corpus: to train on, to choose the rate by, and held out.

    Held out are the texts of dev.tsv, and those of test.tsv. Where there is no test.tsv, as CoLA's
    has no labels, `held_out` texts of train.tsv that no run trains on are in its place.

    Attributes
    ----------
    train, validation, held_out : list of pairs of list of int and int
        Texts.
    """

    def __init__(self, data: Path, name: str, validation: int, held_out: int) -> None:
        texts = read_texts(data, name)
        random.Random(0).shuffle(texts)
        has_test = (data / name / "test.tsv").exists()
        taken = validation + (0 if has_test else held_out)
        if taken >= len(texts):
            raise SystemExit(f"{name} has {len(texts)} training texts, not over {taken}")
        more = read_texts(data, name, "test") if has_test else texts[validation:taken]
        self.validation, self.held_out = texts[:validation], read_texts(data, name, "dev") + more
        # Some texts are there more than once. What judges is not to be learnt by heart.
        judging = {tuple(tokens) for tokens, _ in self.validation + self.held_out}
        self.train = [text for text in texts[taken:] if tuple(text[0]) not in judging]
        if not self.train:
            raise SystemExit(f"{name}: each training text is one of those that judge, too")


def name_data(data: Path, corpus: str) -> str:
    """Give a short name to what a corpus and its vocabulary hold, wherever they lie."""
    paths = [data / corpus / f"{part}.tsv" for part in ("train", "dev", "test")]
    paths.append(data / "bert-base-uncased" / "vocab.txt")
    digests = "".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.exists())
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


class EncoderRuns:
    """The runs of a comparison, those of a file among them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._corpora: dict[str, Corpus] = {}
        self._data = {name: name_data(options.data, name) for name in options.corpus}
        self._file = RunFile(options.csv, KEY, FOUND)

    def get(
        self, corpus: str, method: str, rate: float, seed: int, basis_rate: float | None = None
    ) -> Row:
        """Return a run's row, after the run if there is none.

        Parameters
        ----------
        basis_rate : float, optional
            As :class:`methods.Training` takes it; it does not matter to methods without that phase.
        """
        key = self._key(corpus, method, rate, seed, basis_rate)
        if row := self._file.find(key):
            return row
        row = self._file.add(key, self._run(key))
        print(
            f"{corpus} {method} rate {rate:g} seed {seed}: {float(row['metric']):.4f},"
            f" loss {float(row['loss']):.4f}, {float(row['step_ms']):.0f} ms a step",
            flush=True,
        )
        return row

    def choose_rate(self, corpus: str, method: str, basis_rate: float | None) -> float:
        """Choose the rate whose runs are best on the validation texts, by their mean."""

        def run(rate: float) -> float:
            seeds = choice_seeds(self._options.choices)
            runs = [self.get(corpus, method, rate, seed, basis_rate) for seed in seeds]
            return statistics.mean(float(one["metric"]) for one in runs)

        found = climb(self._options.rates, run)
        best = best_rate(found)
        print(describe_choice(f"{corpus} {method}", found, best), flush=True)
        return best

    def _key(
        self, corpus: str, method: str, rate: float, seed: int, basis_rate: float | None
    ) -> Row:
        options = self._options
        has_basis_rate = METHODS[method].has_basis_phase and basis_rate is not None
        key = {
            "corpus": corpus,
            "method": method,
            "seed": seed,
            "rate": f"{rate:g}",
            "basis_rate": f"{basis_rate:g}" if has_basis_rate else "",
            "model": str(options.model or PACKAGE),
            "steps": options.steps[corpus],
            "batch": options.batches[corpus],
            "validation": options.validation,
            "held_out": options.held_out,
            **vars(options.sizes),
            "threads": torch.get_num_threads(),
            "data": self._data[corpus],
        }
        return {name: str(key[name]) for name in KEY}

    def _run(self, key: Row) -> dict[str, object]:
        options, name, seed = self._options, key["corpus"], int(key["seed"])
        peak = self._peak(key)
        if name not in self._corpora:
            self._corpora[name] = Corpus(options.data, name, options.validation, options.held_out)
        corpus = self._corpora[name]
        model = load_model(options.model, seed)
        basis_rate = float(key["basis_rate"]) if key["basis_rate"] else None
        training = Training(
            key["method"],
            model,
            float(key["rate"]),
            options.sizes,
            basis_rate=basis_rate,
            seed=seed,
        )
        size = options.batches[name]
        order = order_texts(corpus.train, options.steps[name] * size, seed)
        batches = (make_batch(order[i : i + size], 128) for i in range(0, len(order), size))
        start = process_time()
        losses, times = training.train(batches)
        cpu_s = process_time() - start
        share = training.share()
        metric = loss = math.nan
        if math.isfinite(losses[-1]) and training.is_finite():
            texts = corpus.validation if is_choice(seed) else corpus.held_out
            guesses = judge(training.finish(), texts)
            metric = METRICS[name][1](guesses, torch.tensor([label for _, label in texts]))
            loss = statistics.mean(losses[-50:])
        return {
            "metric": metric,
            "loss": loss,
            "step_ms": statistics.median(times.step or [math.nan]),
            "cpu_s": f"{cpu_s:.2f}",
            "peak_mib": peak,
            "energy": " ".join(f"{x:.4f}" for pair in share.energy for x in pair),
            "elements": share.elements,
            "gradient_bytes": share.gradient,
            "state_bytes": share.state,
            "bases_bytes": share.bases,
            "scratch_bytes": share.scratch,
        }

    def _peak(self, key: Row) -> str:
        """Measure the peak memory of a process that trains so, unless a run like it has it."""
        other = ("seed", "rate", "basis_rate", "steps", "validation", "held_out")
        like = {name: value for name, value in key.items() if name not in other}
        if row := self._file.find(like):
            return row["peak_mib"]
        # One corpus alone, so one count of steps and texts, of which it has its own.
        words = ["--memory-of", key["method"], "--corpus", key["corpus"], "--steps", "1"]
        return run_again(*words, "--batch", key["batch"])
