# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, on models and texts too small to say anything."""

import importlib
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parent.parent / "benchmarks"
BERT = "--layers 1 --hidden 64 --batch 2 --length 80 --rounds 2"
LLAMA = "--layers 1 --hidden 384 --length 32 --shortest 4 --longest 8 --vocabulary 99 --rounds 2"


pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.mark.parametrize(("name", "options"), [("bert", BERT), ("llama", LLAMA), ("t5", BERT)])
def test_times(call, name, options):
    rows = {row["mode"]: row for row in call(name, options)}
    assert {"pytorch", "sebp", "trimmed", "padding-free", "prepared"} <= set(rows)
    for row in rows.values():
        parts = [float(row[f"{part}_ms"]) for part in ("forward", "backward", "optimizer")]
        assert 0 < max(parts) < float(row["step_ms"])
        assert 0 < float(row["activity"]) <= 1
    assert float(rows["pytorch"]["activity"]) < float(rows["trimmed"]["activity"])
    assert float(rows["pytorch"]["step_speedup"]) == 1


def test_packed_texts(call):
    options = (
        "--layers 1 --hidden 128 --texts 3 --shortest 2 --longest 9 --vocabulary 99 --rounds 2"
    )
    rows = {row["mode"]: row for row in call("packed", options)}
    assert list(rows) == ["padded", "padded-sebp", "packed", "packed-sebp", "packed-prepared"]
    assert float(rows["padded"]["activity"]) < 1 == float(rows["packed-sebp"]["activity"])
    for row in rows.values():
        assert 0 < float(row["backward_ms"]) < float(row["step_ms"])


def test_packed_texts_have_one_loss():
    packed = importlib.import_module("packed")
    torch = pytest.importorskip("torch")
    modes = packed.make_modes([[torch.arange(1, 6), torch.arange(2, 5)]])
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=64, num_attention_heads=1, num_hidden_layers=1
    )
    model = transformers.LlamaForCausalLM(config)
    packed.sebp.register_attention()
    packed.check_losses(modes, model)
    modes[3].batches[0]["cu_seq_lens_q"][1] += 1
    with pytest.raises(SystemExit, match="losses differ"):
        packed.check_losses(modes, model)


def test_real_texts(call, data):
    (row,) = call("bert", f"{BERT} --data {data} --modes pytorch")
    lengths = [7 - i % 5 + 2 for i in range(40)]
    assert min(lengths) / 80 <= float(row["activity"]) <= max(lengths) / 80


def test_profile(call):
    rows = call("bert", f"{BERT} --profile --modes sebp")
    assert {"forward", "backward", "optimizer"} == {row["part"] for row in rows}
    assert "sebp::linear_backward" in {row["operator"] for row in rows if row["mode"] == "sebp"}
    assert "aten::mm" in {row["operator"] for row in rows if row["mode"] == "pytorch"}


def test_autocast_and_precision(call, capfd, monkeypatch):
    torch = pytest.importorskip("torch")
    common = importlib.import_module("common")
    square = common.under_autocast(lambda model, batch: model @ batch)
    assert square(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    seen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    monkeypatch.setattr(common, "under_autocast", lambda loss: seen.append(loss) or loss)
    (plain,) = call("bert", f"{BERT} --modes pytorch")
    assert seen == [] and "autocast" not in capfd.readouterr().out
    (row,) = call("bert", f"{BERT} --modes pytorch --autocast --precision medium")
    assert "autocast to bfloat16, precision medium, PyTorch" in capfd.readouterr().out
    assert seen[0] == "medium" and len(seen) > 1
    assert row["mode"] == plain["mode"]


def test_memory(call):
    (row,) = call("bert", f"{BERT} --memory --modes pytorch")
    assert row["mode"] == "pytorch"
    assert 100 < float(row["peak_mib"]) < 5000


def test_peak_memory_is_the_process_own():
    held = b"x" * 2**30
    own = importlib.import_module("common").peak_memory()
    words = [sys.executable, "-c", "import common; print(common.peak_memory())"]
    done = subprocess.run(words, cwd=FOLDER, check=True, stdout=subprocess.PIPE)
    assert 10 < float(done.stdout) < own - len(held) / 2**21


def test_unknown_mode(call):
    with pytest.raises(SystemExit, match="no mode fast; there are: pytorch, "):
        call("bert", f"{BERT} --modes pytorch,fast")


def test_minilm(call, data):
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertModel(config).save_pretrained(data / "model")
    plot = data / "plot.svg"
    rows = call("minilm", f"--data {data} --model {data / 'model'} --steps 3 --plot {plot}")
    assert len(rows) == 3
    for row in rows:
        losses = [float(row[mode]) for mode in ("pytorch", "trimmed", "prepared")]
        assert max(losses) - min(losses) < 1e-5
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


@pytest.mark.parametrize("is_real", [True, False])
def test_rows_by_rule(call, data, is_real, capsys):
    config = transformers.BertConfig(
        vocab_size=12 if is_real else 30000,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertModel(config).save_pretrained(data / "model")
    options = "--steps 2 --batch 4 --warm-up 1 --draws 5 --seeds 2 --share 0.25"
    where = f"--data {data}" if is_real else ""
    rows = call("rows_by_rule", f"--model {data / 'model'} {options} {where}")
    gradients = {row["rule"]: row for row in rows if row["bias"]}
    assert list(gradients) == ["top", "energy", "sampled by dY alone", "sampled"]
    for name, row in gradients.items():
        is_sampled = name.startswith("sampled")
        # Of few rows a share is rounded, and samples have at least one row.
        assert 0.1 < float(row["rows"]) < 0.5
        assert 0 < float(row["bias"]) <= float(row["error"]) * (1 + 1e-9)
        assert (float(row["chance"]) > 0) == is_sampled
        assert (float(row["bound"]) > 0) == is_sampled
        assert is_sampled or float(row["bias"]) == pytest.approx(float(row["error"]))
    training = [row for row in rows if row["loss"]]
    assert len(training) == 2 * 5
    assert {row["seed"] for row in training} == {"1", "2"}
    for row in training:
        assert 0 < float(row["loss"]) < 5
        assert 0 < float(row["held_out_loss"]) < 5
        assert 0 <= float(row["accuracy"]) <= 1
    printed = capsys.readouterr().out
    assert call("rows_by_rule", "--report") == rows
    report = capsys.readouterr().out
    assert report.startswith("| training by rule") and printed.endswith(report)
    assert report.count("less each other one:") == 2
    with pytest.raises(SystemExit):
        call("rows_by_rule", "--share 1")


def test_byte_order_marks_are_skipped(data):
    """The first text and the first piece are what they are without one."""
    texts = importlib.import_module("texts")
    vocabulary = data / "bert-base-uncased" / "vocab.txt"
    pieces = vocabulary.read_text().split("\n")
    vocabulary.write_text("\n".join(pieces[::-1]))
    plain = texts.read_texts(data, "sst2")
    assert any(0 in tokens for tokens, _ in plain)  # the first piece is a word
    for name in ("bert-base-uncased/vocab.txt", "sst2/train.tsv"):
        path = data / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert texts.read_texts(data, "sst2") == plain


def test_blocks():
    words = [sys.executable, str(FOLDER / "blocks.py"), "--rounds", "1", "--tokens", "3"]
    words += ["--features", "64", "--cpu"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 6 * 2
    assert all(float(row[4]) > 0 and float(row[5]) > 0 for row in rows[2:])


def test_call_cost():
    words = [sys.executable, str(FOLDER / "call_cost.py"), "--rounds", "1", "--shapes", "2x3x4:5"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    _, *lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["2x3x4:5", d] for d in ("float32", "bfloat16")]
    assert all(0 < float(time) < 1e5 for line in lines for time in line.split()[2:5])
