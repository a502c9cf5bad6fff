# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, on models and texts too small to say anything."""

import csv
import importlib
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parent.parent / "benchmarks"
BERT = "--layers 1 --hidden 64 --batch 2 --length 80 --rounds 2"
LLAMA = "--layers 1 --hidden 384 --length 32 --shortest 4 --longest 8 --vocabulary 99 --rounds 2"


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Give a function that runs a benchmark and returns what it wrote to its CSV file."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, options):
        path = tmp_path / f"{name}.csv"
        words = [str(FOLDER / f"{name}.py"), *options.split(), "--csv", str(path)]
        monkeypatch.setattr(sys, "argv", words)
        importlib.import_module(name).main()
        with path.open() as file:
            return list(csv.DictReader(file))

    return run


@pytest.fixture
def data(tmp_path):
    """Give a folder with a vocabulary and a few sentences."""
    words = ["a", "good", "bad", "film", "plot", "very", "not"]
    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    (tmp_path / "sst2").mkdir()
    for part in ("train", "dev"):
        lines = [f"{' '.join(words[i % 5 :])}\t{i % 2}" for i in range(40)]
        (tmp_path / "sst2" / f"{part}.tsv").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize(("name", "options"), [("bert", BERT), ("llama", LLAMA)])
def test_times(call, name, options):
    rows = {row["mode"]: row for row in call(name, options)}
    assert {"pytorch", "sebp", "sebp-padding", "trimmed", "padding-free"} <= set(rows)
    for row in rows.values():
        parts = [float(row[f"{part}_ms"]) for part in ("forward", "backward", "optimizer")]
        assert 0 < max(parts) < float(row["step_ms"])
        assert 0 < float(row["activity"]) <= 1
    assert float(rows["pytorch"]["activity"]) < float(rows["trimmed"]["activity"])
    assert float(rows["pytorch"]["step_speedup"]) == 1


def test_real_texts(call, data):
    (row,) = call("bert", f"{BERT} --data {data} --modes pytorch")
    lengths = [7 - i % 5 + 2 for i in range(40)]
    assert min(lengths) / 80 <= float(row["activity"]) <= max(lengths) / 80


def test_profile(call):
    rows = call("bert", f"{BERT} --profile --modes sebp")
    assert {"forward", "backward", "optimizer"} == {row["part"] for row in rows}
    assert "sebp::linear_backward" in {row["operator"] for row in rows if row["mode"] == "sebp"}
    assert "aten::mm" in {row["operator"] for row in rows if row["mode"] == "pytorch"}


def test_memory(call):
    (row,) = call("bert", f"{BERT} --memory --modes pytorch")
    assert row["mode"] == "pytorch"
    assert 100 < float(row["peak_mib"]) < 5000


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
        losses = [float(row[mode]) for mode in ("pytorch", "sebp-padding", "padding-free")]
        assert max(losses) - min(losses) < 1e-5
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
