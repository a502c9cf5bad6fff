# SPDX-License-Identifier: Apache-2.0
"""The recipes, run as a user runs them: they learn, as without SEBP, and without padding."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

FOLDER = Path(__file__).parent.parent / "recipes"
SECONDS = 240
# By their names, what they import beside PyTorch and transformers.
RECIPES = {
    "accelerate_loop": ["accelerate"],
    "hf_trainer": ["accelerate"],
    "lightning_module": ["lightning"],
    "peft_lora": ["accelerate", "peft"],
    "plain_loop": [],
    "sentence_embeddings": ["accelerate", "datasets", "sentence_transformers"],
    "trl_sft": ["accelerate", "datasets", "trl"],
    "two_processes": [],
}
# How a recipe is run with SEBP, if not by itself as without it.
BY = {"two_processes": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
# How far losses may be off. Where products are rounded to bfloat16, other sums round otherwise.
TOLERANCE = {"plain_loop": 3e-2}


def need(name):
    """Skip where a recipe's packages are not installed."""
    for package in RECIPES[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def start(name, *options, by=()):
    """Start a recipe, in a group of processes of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *by, str(FOLDER / f"{name}.py"), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    )


def end(process):
    """Leave none of a recipe's processes behind."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process):
    """Wait for a recipe; give what it printed."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        end(process)
    assert process.returncode == 0, err
    assert "such calls" not in err, err  # in which padding was not left out
    return out


def numbers_of(word, out):
    """Read a line of numbers that begins with a word."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"{word} "))
    return [float(number) for number in line.split()[1:]]


def check_learning(losses):
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def check_padding_is_out(out):
    real, left, computed = re.search(
        r"tokens +(\d+) real \(.*\), (\d+) padded left out, (\d+) padded computed", out
    ).groups()
    assert int(real) > 0
    assert int(left) > 0
    assert int(computed) == 0
    assert re.search(r"calls +\d+, of which [1-9]\d* left padding out", out)
    reasons = re.findall(r"^ +\d+ did not: (.*)", out, re.MULTILINE)
    assert set(reasons) <= {"no padding"}


def test_each_recipe_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*RECIPES, "texts"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    need(name)
    # Both at a time: most of a run is spent on imports, on one core.
    processes = [start(name, by=BY.get(name, ())), start(name, "--plain")]
    try:
        ours, plain = (finish(process) for process in processes)
    finally:
        for process in processes:
            end(process)
    losses = numbers_of("losses", ours)
    tolerance = TOLERANCE.get(name, 2e-3)
    assert losses == pytest.approx(numbers_of("losses", plain), rel=tolerance, abs=tolerance)
    check_learning(losses)
    if "eval" in ours:
        evaluated = numbers_of("eval", ours)
        assert evaluated == pytest.approx(numbers_of("eval", plain), rel=2e-3, abs=2e-3)
    assert "sebp" not in plain
    if name == "trl_sft":
        assert "did not: no padding: texts lie end to end" in ours
        assert "padded" not in ours.split("losses")[1]
    else:
        check_padding_is_out(ours)


def test_packed_rows():
    """TRL's packing lays texts end to end in rows of one length."""
    need("trl_sft")
    out = finish(start("trl_sft", "--packing"))
    check_learning(numbers_of("losses", out))
    assert "did not: no padding: texts lie end to end" in out
