# SPDX-License-Identifier: Apache-2.0
"""SEBP in Hugging Face's Trainer."""

import json
import os
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from models import make_batch, make_model  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

import sebp  # noqa: E402
from sebp.torch.common.work import LayerKind, Work, work_done  # noqa: E402
from sebp.torch.report import savings as ours  # noqa: E402

KEYS = {"sebp_activity", "sebp_seconds_saved"}
SAMPLES = 16


def make_data(name="bert"):
    batch = make_batch(name, 0, batch=SAMPLES)
    return [{key: value[i] for key, value in batch.items()} for i in range(SAMPLES)]


def make_trainer(folder, callbacks=(), model=None, **arguments):
    defaults = dict(
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-3,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(
        model or make_model("bert"),
        TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=make_data(),
        eval_dataset=make_data()[:5],
        callbacks=list(callbacks),
    )


def losses(trainer):
    return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])


def layers_with_sebp(model):
    return [name for name, module in model.named_modules() if "sebp_rule" in vars(module)]


class Watch(TrainerCallback):
    """Notes which layers had SEBP at each step, and what was logged; may interrupt."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.layers = []
        self.logged = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.layers.append(layers_with_sebp(model))
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged.append(dict(logs))


@pytest.mark.parametrize("padding", [False, True])
def test_trains_alike(tmp_path, padding):
    """Same losses, predictions and checkpoints as without; evaluation and saving in between."""
    between = dict(eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3)
    plain = make_trainer(tmp_path / "plain", load_best_model_at_end=True, **between)
    plain.train()
    watch = Watch()
    callback = sebp.SebpCallback(padding=padding)
    trainer = make_trainer(
        tmp_path / "ours", [callback, watch], load_best_model_at_end=True, **between
    )
    trainer.train()
    assert len(callback.report.replaced) == 14
    assert watch.layers == [callback.report.replaced] * 6
    assert layers_with_sebp(trainer.model) == []
    assert "forward" not in vars(trainer.model)
    assert len(losses(plain)) == 3
    torch.testing.assert_close(losses(trainer), losses(plain), rtol=1e-3, atol=1e-4)
    want, got = (t.predict(make_data()).predictions for t in (plain, trainer))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-2, atol=1e-3)
    for name in ("model.safetensors", "trainer_state.json", "optimizer.pt"):
        assert (tmp_path / "ours" / "checkpoint-3" / name).exists()
    assert list(trainer.model.state_dict()) == list(plain.model.state_dict())


def test_logs(tmp_path):
    """The activity is what the profile of the same batches says."""
    watch = Watch()
    arguments = dict(per_device_train_batch_size=SAMPLES, save_strategy="steps", save_steps=6)
    arguments.update(eval_strategy="steps", eval_steps=2)
    trainer = make_trainer(tmp_path, [sebp.SebpCallback(), watch], **arguments)
    batch = make_batch("bert", 0, batch=SAMPLES)
    activity = sebp.profile(trainer.model, batch).activity
    assert 0.1 < activity < 0.5
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    for history in (trainer.state.log_history, state["log_history"], watch.logged):
        training = [log for log in history if "loss" in log or "train_runtime" in log]
        assert len(training) >= 3
        for log in training:
            assert log["sebp_activity"] == pytest.approx(activity, abs=1e-4)
            assert log["sebp_seconds_saved"] != 0
        assert not any(KEYS & log.keys() for log in history if "eval_loss" in log)
    *steps, total = [log["sebp_seconds_saved"] for log in watch.logged if log.keys() >= KEYS]
    assert sum(steps) == pytest.approx(total, abs=2e-3)


def test_resume(tmp_path):
    whole = make_trainer(tmp_path, [sebp.SebpCallback()], save_strategy="steps", save_steps=4)
    whole.train()
    watch = Watch()
    again = make_trainer(tmp_path, [sebp.SebpCallback(), watch])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [len(layers) for layers in watch.layers] == [14, 14]
    torch.testing.assert_close(losses(again), losses(whole), rtol=1e-4, atol=1e-5)
    for log in again.state.log_history:
        assert log.keys() >= KEYS


def test_interrupted_and_again(tmp_path, recwarn):
    callback = sebp.SebpCallback(rows=3, layers="*.query")
    trainer = make_trainer(tmp_path, [callback, Watch(stop_at=2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(layers_with_sebp(trainer.model)) == 2
    trainer.remove_callback(Watch)
    trainer.train()
    assert layers_with_sebp(trainer.model) == []
    assert not [w for w in recwarn if "SEBP" in str(w.message)]
    assert trainer.state.log_history[-1]["sebp_activity"] == pytest.approx(3 / 64, abs=1e-4)
    trainer.train()
    assert layers_with_sebp(trainer.model) == []


def test_interrupted_and_taken_out(tmp_path):
    """A run after an interrupted one has SEBP, too, if it was taken out by hand in between."""
    watch = Watch(stop_at=2)
    trainer = make_trainer(tmp_path, [sebp.SebpCallback(padding=True), watch])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    count = len(sebp.remove_sebp_from_model(trainer.model))
    assert count > 0
    watch.stop_at, watch.layers = None, []
    trainer.train()
    assert {len(layers) for layers in watch.layers} == {count}
    assert layers_with_sebp(trainer.model) == []


@pytest.mark.parametrize(("layers", "count"), [(None, 14), ("*.query", 2)])
def test_applied_before(tmp_path, layers, count):
    model = make_model("bert")
    sebp.apply_sebp_to_model(model, layers=layers)
    trainer = make_trainer(tmp_path, [sebp.SebpCallback(padding=True)], model)
    with pytest.warns(UserWarning, match=f"{count} layers had SEBP already"):
        trainer.train()
    assert len(layers_with_sebp(model)) == count
    assert "forward" not in vars(model)
    assert trainer.state.log_history[-1].keys() >= KEYS


def test_no_layers(tmp_path):
    """Where nothing is replaced, a warning, and nothing is logged."""
    trainer = make_trainer(tmp_path, [sebp.SebpCallback(layers="nowhere")])
    with pytest.warns(UserWarning, match="no layer was replaced"):
        trainer.train()
    assert losses(trainer).numel() == 3
    assert not any(KEYS & log.keys() for log in trainer.state.log_history)


def test_progress_bar(tmp_path, capsys):
    trainer = make_trainer(tmp_path, [sebp.SebpCallback()], disable_tqdm=False)
    trainer.train()
    shown = capsys.readouterr()
    assert "activity " in shown.err
    assert shown.err.count(" s]") >= 3
    assert "sebp_activity" in shown.out + shown.err


def test_reporters_that_come_before(tmp_path):
    """The callback put first, as its documentation says."""
    watch = Watch()
    trainer = make_trainer(tmp_path, [watch, sebp.SebpCallback()])
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, trainer.pop_callback(sebp.SebpCallback))
    trainer.train()
    assert [log.keys() >= KEYS for log in watch.logged] == [True] * 4


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "arguments",
    [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"gradient_checkpointing": True}],
)
def test_other_ways_to_train(tmp_path, arguments):
    plain = make_trainer(tmp_path, **arguments)
    trainer = make_trainer(tmp_path, [sebp.SebpCallback(padding=True)], **arguments)
    plain.train()
    trainer.train()
    within = 2e-2 if "bf16" in arguments else 1e-3
    torch.testing.assert_close(losses(trainer), losses(plain), rtol=within, atol=within)
    assert 0.1 < trainer.state.log_history[-1]["sebp_activity"] < 0.5


def test_estimate(monkeypatch):
    """Time saved is PyTorch's time for all rows, less the time taken."""
    first = LayerKind(5, 4, torch.float32, True, True)
    other = first._replace(need_dx=False)
    new = first._replace(in_features=7)
    done = {first: Work(100, 30, 2.0), other: Work(10, 1, 0.5), new: Work(50, 50, 4.0)}
    monkeypatch.setattr(ours, "work_done", lambda: done)
    monkeypatch.setattr(
        ours, "dense_seconds_per_row", lambda kind: {4: 0.1, 7: 0.02}[kind.in_features]
    )
    activity, saved = ours.Savings().since({first: Work(60, 20, 1.5), other: done[other]})
    assert activity == pytest.approx((10 + 50) / (40 + 50))
    assert saved == pytest.approx(40 * 0.1 - 0.5 + 50 * 0.02 - 4.0)
    assert ours.Savings().since(done) == (None, 0.0)


def test_estimate_is_near(monkeypatch):
    """The estimate against a dense backward, in the CPU time of one thread."""
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, dy = torch.randn(2048, 640, requires_grad=True), torch.randn(2048, 640)
        weight = torch.randn(640, 640, requires_grad=True)
        dy[400:] = 0
        savings, taken = ours.Savings(), {}
        for function in (torch.nn.functional.linear, sebp.torch.linear):
            function(x, weight).backward(dy)
            ys = [function(x, weight) for _ in range(4)]
            before, start = work_done(), time.thread_time()
            for y in ys:
                y.backward(dy)
            taken[function] = time.thread_time() - start
        activity, saved = savings.since(before)
    finally:
        torch.set_num_threads(threads)
    dense, sparse = taken.values()
    assert activity == pytest.approx(400 / 2048)
    assert 0.5 < saved / (dense - sparse) < 2


def test_rate_of_pytorch(monkeypatch):
    """The products timed are those of the layer, scaled from the part to the whole."""
    clock = iter(range(100))
    monkeypatch.setattr(ours.time, "perf_counter", lambda: next(clock))
    state = torch.get_rng_state()
    kind = LayerKind(2048, 3, torch.bfloat16, True, False)
    assert ours.dense_seconds_per_row(kind) == pytest.approx(1 / 512 * 4)
    assert ours.dense_seconds_per_row(kind._replace(out_features=8)) == pytest.approx(1 / 512)
    assert torch.equal(torch.get_rng_state(), state)


def test_interrupted_and_another(tmp_path):
    """A callback that goes on with another model leaves none with SEBP behind."""
    callback = sebp.SebpCallback(padding=True)
    first = make_trainer(tmp_path, [callback, Watch(stop_at=2)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert layers_with_sebp(first.model)
    second = make_trainer(tmp_path, [callback])
    second.train()
    for trainer in (first, second):
        assert not layers_with_sebp(trainer.model)
        assert not trainer.model._forward_pre_hooks


class Joins(TrainerCallback):
    """Adds another callback while training is under way."""

    def __init__(self, other):
        self.other = other

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.trainer.add_callback(self.other)


def test_added_too_late(tmp_path):
    """There is nothing to log or to take out, and what the model had it keeps."""
    joins = Joins(sebp.SebpCallback())
    joins.trainer = make_trainer(tmp_path, [joins])
    sebp.apply_sebp_to_model(joins.trainer.model)
    before = layers_with_sebp(joins.trainer.model)
    joins.trainer.train()
    assert not any(KEYS & log.keys() for log in joins.trainer.state.log_history)
    assert layers_with_sebp(joins.trainer.model) == before


def test_bad_rows():
    with pytest.raises(ValueError, match="at least 1 row"):
        sebp.SebpCallback(rows=0)


def test_transformers_is_imported_late():
    code = "import sys, sebp; sebp.profile; assert 'transformers' not in sys.modules"
    code += "; sebp.SebpCallback; assert 'transformers' in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=os.environ, check=True, timeout=120)
