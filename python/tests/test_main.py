# SPDX-License-Identifier: Apache-2.0
"""``python3 -m sebp``."""

import os
import re
import subprocess
import sys

import pytest

import sebp
from sebp import _library


def run_module(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "sebp"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_says_what_is_loaded(gnu_openmp):
    torch = pytest.importorskip("torch")
    done = run_module(OMP_NUM_THREADS="2", SEBP_NUM_THREADS="")
    assert done.returncode == 0, done.stderr
    lines = {line[:17].strip(): line[17:] for line in done.stdout.splitlines()}
    assert lines["libsebp"].startswith(f"{sebp.__version__} at /")
    assert lines["PyTorch"] == f"{torch.__version__}, 2 threads"
    assert lines["threads"].startswith("2 on ")
    assert lines["thread pools"] == "one"
    with sebp.Context() as context:
        assert (lines["OpenMP"] != "none") == (context.threads == 2)
    assert lines["LAPACK"] in ("yes", "none")
    for part, file in (("oneDNN", "libdnnl"), ("hwloc", "libhwloc")):
        mapped = bool(_library.mapped_files(file))
        assert bool(re.match(r"\d+\.\d+", lines[part])) == mapped, lines[part]
    assert int(lines["OpenMP runtimes"]) >= 1


def test_two_pools():
    """A library of clang's is loaded, with a word on what to do."""
    pytest.importorskip("torch")
    if not _library.brings_llvm_openmp(_library.load()):
        pytest.skip("the library is built with GNU's OpenMP")
    done = run_module(OMP_NUM_THREADS="2", SEBP_NUM_THREADS="")
    assert done.returncode == 1
    assert "thread pools     two\n" in done.stdout
    assert "RuntimeWarning: libsebp was compiled by clang" in done.stderr
    assert "./configure CC=gcc" in done.stderr


def test_no_library(tmp_path):
    done = run_module(SEBP_LIBRARY=str(tmp_path / "libsebp.so"))
    assert done.returncode == 1
    assert done.stderr.startswith("libsebp was not found")


def test_environment_that_allows_no_context():
    done = run_module(SEBP_NUM_THREADS="many")
    assert done.returncode == 1
    assert "SEBP_NUM_THREADS" in done.stderr
    assert "Traceback" not in done.stderr
