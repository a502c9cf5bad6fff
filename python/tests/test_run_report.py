# SPDX-License-Identifier: Apache-2.0
"""What a run has computed and left out."""

from xml.etree import ElementTree

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

from models import make_batch, make_model  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.torch.report import savings  # noqa: E402
from sebp.torch.report.bars import Bar, draw_bars  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


def rectangles(svg):
    return list(ElementTree.fromstring(svg).iter(f"{SVG}rect"))


def test_counts_of_a_run(monkeypatch):
    monkeypatch.setattr(savings, "dense_seconds_per_row", lambda kind: 0.25)
    model = make_model("bert").train()
    batches = [make_batch("bert", seed) for seed in range(3)]
    with sebp.prepare(model, quiet=True):
        model(**batches[0]).loss.backward()  # of an earlier run
    prepared = sebp.prepare(model, quiet=True)
    assert str(prepared.report()) == "nothing has run since the model was prepared"
    for batch in batches:
        model(**batch).loss.backward()
    full = {**batches[0], "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    model(**full).loss.backward()
    report = prepared.report()
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = 3 * 64 - real
    assert report.calls == {"": 3, "no padding": 1}
    assert report.tokens == {"real": real + 64, "left out": padded}
    # 12 layers see tokens in each of the four steps, pooler and head see texts.
    assert report.rows == 4 * (12 * 64 + 2 * 4)
    assert 4 * 2 * 4 < report.active < report.rows
    assert report.seconds > 0
    assert report.dense_seconds == pytest.approx(0.25 * report.rows)
    text = str(report)
    share = f"{(real + 64) / 256:.1%}"
    assert f"tokens     {real + 64} real ({share}), {padded} padded left out, 0 padded" in text
    assert "calls      4, of which 3 left padding out\n           1 did not: no padding" in text
    assert "measured" in text
    assert "an estimate" in text
    assert report.forward_seconds > 0
    assert report.dense_forward_seconds == report.dense_seconds  # rows left out are in both
    times = report.times
    assert times.steps == 4
    assert times.products == pytest.approx(report.seconds + report.forward_seconds)
    assert times.attention > 0
    assert times.total > times.products + times.attention
    assert times.rest == pytest.approx(times.total - times.products - times.attention)
    assert f"time       {times.total:.2f} s in 4 steps" in text
    # The background, the tokens that there are (no padded computed), the parts of steps, forward
    # and backward in both ways, and ten names.
    assert len(rectangles(report.to_svg())) == 1 + 2 + 3 + 4 + 10


def test_padding_that_is_computed():
    model = nn.Sequential(nn.Linear(4, 3))
    prepared = sebp.prepare(model, quiet=True)
    y = model(torch.randn(10, 4))
    y[:4].sum().backward()
    report = prepared.report()
    assert (report.rows, report.active) == (10, 4)
    assert not report.tokens
    assert "tokens" not in str(report)
    assert "attention" in str(report)


@pytest.mark.filterwarnings("ignore:sebp.compare. no time is gained")
def test_with_a_batch(tmp_path):
    model, batch = make_model("bert").train(), make_batch("bert", 1)
    prepared = sebp.prepare(model, quiet=True)
    model(**batch).loss.backward()
    plain = prepared.report()
    prepared.undo()
    report = prepared.report(batch)
    assert report.rows == plain.rows  # the comparison's own are not among them
    assert report.calls == plain.calls
    again = prepared.report()  # nor among those of a later report
    assert (again.rows, again.active, again.calls) == (plain.rows, plain.active, plain.calls)
    assert (again.times, again.forward_seconds) == (plain.times, plain.forward_seconds)
    assert report.comparison.difference < 1e-4
    assert str(report).endswith(str(report.comparison))
    report.save_svg(tmp_path / "run.svg")
    svg = (tmp_path / "run.svg").read_text(encoding="utf-8")
    assert len(rectangles(svg)) > len(rectangles(plain.to_svg()))
    for part in ("products", "attention", "rest", "steps", "a step as it is"):
        assert part in svg
    assert "forward" not in vars(model)


def test_bars():
    bars = [Bar("a<b", [("x", 1.0), ("y", 3.0)], "4"), Bar("c", [("x", 2.0), ("y", 0.0)], "2")]
    svg = draw_bars("t & t", [bars, []])
    assert "a&lt;b" in svg
    assert "t &amp; t" in svg
    widths = [float(one.get("width")) for one in rectangles(svg)[1:] if one.get("height") == "24"]
    assert widths == [130, 390, 260]
    assert rectangles(draw_bars("", [])) != []
    assert draw_bars("", [[Bar("nothing", [("x", 0.0)], "0")]])
