# SPDX-License-Identifier: Apache-2.0
"""What the tests share: the seed, and comparison within rounding."""

import csv
import importlib
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SEED = int(os.environ.get("SEBP_TEST_SEED") or random.SystemRandom().randrange(2**31))


def pytest_report_header() -> str:
    return f"SEBP_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def seeded():
    """Seed all generators alike for each test."""
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def forget_compiled():
    """Let the next test compile anew: a function may be compiled for few models in one process."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def gnu_openmp():
    """Skip where the library cannot share PyTorch's pool of threads; test_main tells of that."""
    from sebp import _library

    if _library.brings_llvm_openmp(_library.load()):
        pytest.skip("the library is built with LLVM's OpenMP")


@pytest.fixture
def lapack():
    """Skip where the library was built without LAPACK."""
    from sebp import SebpError
    from sebp.sparse import BasisSums

    sums = BasisSums(1, 1)
    sums.add(np.ones((1, 1), np.float32))
    try:
        sums.solve(1, 1)
    except SebpError as error:
        pytest.skip(str(error))


@pytest.fixture
def counting(monkeypatch):
    """Count what the library computes of blocks."""
    from block_models import Counting

    return Counting(monkeypatch)


@pytest.fixture
def benchmarks(monkeypatch):
    """Import benchmarks, which are no package, for one test alone: their names are common words."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield BENCHMARKS
    for name in [path.stem for path in BENCHMARKS.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.fixture
def call(benchmarks, monkeypatch, tmp_path):
    """Give a function that runs a benchmark and returns what it wrote to its CSV file."""

    def run(name, options):
        path = tmp_path / f"{name}.csv"
        words = [str(BENCHMARKS / f"{name}.py"), *options.split(), "--csv", str(path)]
        monkeypatch.setattr(sys, "argv", words)
        importlib.import_module(name).main()
        with path.open() as file:
            return list(csv.DictReader(file))

    return run


@pytest.fixture
def data(tmp_path):
    """Give a folder with a vocabulary and a few sentences, each of them once."""
    words = ["a", "good", "bad", "film", "plot", "very", "not"]
    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    (tmp_path / "sst2").mkdir()
    draw = random.Random(1)
    sentences = {" ".join(draw.choices(words, k=2 + i % 4)): i % 2 for i in range(120)}
    lines = [f"{sentence}\t{label}" for sentence, label in sentences.items()]
    for part, first in (("train", 0), ("dev", 40), ("test", 60)):
        (tmp_path / "sst2" / f"{part}.tsv").write_text("\n".join(lines[first : first + 40]))
    return tmp_path


@pytest.fixture
def tables(capsys):
    """Give a function that returns the tables printed since, each a list of lines of cells."""

    def read():
        found = [[]]
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("|"):
                found[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
            elif found[-1]:
                found.append([])
        return [table for table in found if table]

    return read
