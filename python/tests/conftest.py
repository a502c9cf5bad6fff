# SPDX-License-Identifier: Apache-2.0
"""What the tests share: the seed, and comparison within rounding."""

import os
import random

import numpy as np
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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
