# SPDX-License-Identifier: Apache-2.0
"""The time of the steps of prepared models, and what of it are products and attention."""

import copy
import pickle
import threading
import time

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import sebp  # noqa: E402
from sebp.torch.attention.attend import Pattern, attend  # noqa: E402
from sebp.torch.attention.texts import Texts  # noqa: E402
from sebp.torch.common.step_times import Times, times_done  # noqa: E402
from sebp.torch.common.work import all_work_done  # noqa: E402

PAUSE = 0.03


class Clock(threading.local):
    """A thread's time, which a pause moves by its length, and each look at it by a microsecond."""

    def __init__(self):
        self.now = 0.0

    def read(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """How long these tests take on a busy machine must not matter."""
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made.read)
    monkeypatch.setattr(time, "sleep", made.sleep)


class Slow(torch.autograd.Function):
    """Takes a known time in its backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        time.sleep(PAUSE)
        return dy


class Net(nn.Module):
    """Linear layers with attention between them, and what is slow before and behind."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.fails = False

    def forward(self, x):
        x = Slow.apply(x)  # the last that a backward does, behind all that the library computes
        x = self.first(x).view(1, 8, 2, 8).transpose(1, 2)
        x = attend(x, x, x, Texts.of_lengths(np.array([3, 5])), Pattern(True)).flatten(2)[0]
        time.sleep(PAUSE)
        if self.fails:
            raise ValueError("as it happens")
        return self.second(x)


def make():
    model = Net()
    return model, sebp.prepare(model, quiet=True)


def draw():
    return torch.randn(8, 16, requires_grad=True)


def products_since(before):
    now = all_work_done()
    return sum(w.seconds - (before[k].seconds if k in before else 0) for k, w in now.items())


def since(before):
    return times_done().since(before)


def test_a_step_goes_to_the_end_of_its_backward():
    model, _ = make()
    before, work = times_done(), all_work_done()
    start = time.perf_counter()
    loss = model(draw()).square().sum()
    time.sleep(PAUSE)  # as a loss of the user's own
    loss.backward()
    total = time.perf_counter() - start
    time.sleep(PAUSE)  # of no step
    found = since(before)
    assert found.steps == 1
    assert 3 * PAUSE < found.total < total
    assert 0 < found.attention < total
    assert found.products == pytest.approx(products_since(work))
    assert found.rest == pytest.approx(found.total - found.products - found.attention)
    assert found.rest > 3 * PAUSE


def test_what_comes_between_steps_is_none_of_them():
    model, prepared = make()
    for _ in range(3):
        model(draw()).sum().backward()
        time.sleep(PAUSE)
    report = prepared.report()
    assert report.times.steps == 3
    assert 6 * PAUSE < report.times.total < 9 * PAUSE
    assert "in 3 steps" in str(report)


@pytest.mark.parametrize("grad", [False, True])
def test_an_evaluation_is_its_forward(grad):
    """Also where gradients are on, but no backward comes."""
    model, _ = make()
    before = times_done()
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            model(draw())
        time.sleep(2 * PAUSE)
    found = since(before)
    assert found.steps == 2
    assert 2 * PAUSE < found.total < 4 * PAUSE
    assert (found.products > 0) == grad  # without gradients PyTorch computes them
    assert found.attention > 0


def test_two_forwards_and_one_backward():
    model, _ = make()
    before, work = times_done(), all_work_done()
    y = model(draw())
    time.sleep(PAUSE)
    (y.sum() + model(draw()).sum()).backward()
    found = since(before)
    assert found.steps == 2
    assert found.total > 4 * PAUSE
    assert found.products == pytest.approx(products_since(work))


class Checkpointed(nn.Module):
    """Two nets, the second of which is computed again."""

    def __init__(self, reentrant):
        super().__init__()
        self.nets, self.reentrant = nn.ModuleList([Net(), Net()]), reentrant

    def forward(self, x):
        return checkpoint(self.nets[1], self.nets[0](x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_is_of_the_same_step(reentrant):
    """A reentrant checkpoint has a backward within the backward, whose end is not the step's."""
    model = Checkpointed(reentrant)
    sebp.prepare(model, quiet=True)
    before, work = times_done(), all_work_done()
    (model(draw()) * 2).sum().backward()
    found = since(before)
    assert found.steps == 1
    assert found.total > 5 * PAUSE  # two forwards, one of them again, and two backwards
    assert found.products == pytest.approx(products_since(work))


def test_models_within_models():
    inner, _ = make()
    outer = nn.Sequential(nn.Linear(16, 16), inner)
    sebp.prepare(outer, quiet=True)
    before = times_done()
    outer(draw()).sum().backward()
    found = since(before)
    assert found.steps == 1
    assert 2 * PAUSE < found.total < 4 * PAUSE


def test_errors_end_a_step():
    model, _ = make()
    before = times_done()
    model.fails = True
    with pytest.raises(ValueError, match="as it happens"):
        model(draw())
    time.sleep(2 * PAUSE)
    found = since(before)
    assert found.steps == 1
    assert PAUSE < found.total < 2 * PAUSE
    model.fails = False

    def fail(gradient):
        raise ValueError("in a backward")

    before, x = times_done(), draw()
    y = model(x)
    x.register_hook(fail)
    with pytest.raises(ValueError, match="in a backward"):
        y.sum().backward()
    time.sleep(2 * PAUSE)
    model(draw()).sum().backward()
    found = since(before)
    assert found.steps == 2
    assert found.total < 5 * PAUSE  # without what was between


def test_threads_have_steps_of_their_own():
    """PyTorch runs a backward on CPUs in the thread that calls it."""
    models = [make()[0] for _ in range(2)]
    before, work = times_done(), all_work_done()
    ends = threading.Barrier(2, timeout=60)
    ids = []

    def train(model):
        for _ in range(3):
            ends.wait()
            y = model(draw())
            y.register_hook(lambda _: ids.append(threading.get_ident()))
            y.sum().backward()

    threads = [threading.Thread(target=train, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(ids) == {thread.ident for thread in threads}
    found = since(before)
    assert found.steps == 6
    assert found.total > 12 * PAUSE
    assert found.products == pytest.approx(products_since(work))


def test_models_that_are_not_prepared_are_not_timed():
    model = Net()
    sebp.apply_sebp_to_model(model)
    before = times_done()
    model(draw()).sum().backward()
    assert since(before) == Times()


def test_a_compiled_model_is_not_timed():
    model = nn.Sequential(nn.Linear(16, 16))
    sebp.prepare(model, quiet=True)
    before = times_done()
    torch.compile(model, backend="aot_eager", fullgraph=True)(draw()).sum().backward()
    assert since(before) == Times()
    torch._dynamo.reset()


def test_undo_and_what_it_leaves():
    model, prepared = make()
    again = sebp.prepare(model, quiet=True)
    again.undo()
    assert "forward" in vars(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    before = times_done()
    copied(draw()).sum().backward()
    assert since(before).steps == 1
    prepared.undo()
    assert not {"forward", "__prepare_scriptable__", "_sebp_forwards"} & vars(model).keys()
    sebp.remove_sebp_from_model(copied)
    assert not {"forward", "__prepare_scriptable__", "_sebp_forwards"} & vars(copied).keys()


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_scripted_models_are_pytorchs(single):
    model = nn.Linear(16, 16) if single else nn.Sequential(nn.Linear(16, 16))
    prepared = sebp.prepare(model, quiet=True)
    x = draw()
    want = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), want)
    prepared.undo()
    assert not {"forward", "__prepare_scriptable__", "sebp_rule"} & vars(model).keys()
