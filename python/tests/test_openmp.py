# SPDX-License-Identifier: Apache-2.0
"""The benchmark of thread pools makes one and two, as it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_pools(gnu_openmp):
    pytest.importorskip("torch")
    program = Path(__file__).parent.parent / "benchmarks" / "openmp.py"
    done = subprocess.run(
        [sys.executable, program, "--rows", "8", "--runs", "2", "--repetitions", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    rows = [line.split("|")[1:3] for line in done.stdout.splitlines()[2:]]
    added = {layer.strip(): int(threads) for layer, threads in rows}
    assert added == {"pytorch": 0, "one pool": 0, "two pools": 1}
