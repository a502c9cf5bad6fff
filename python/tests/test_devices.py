# SPDX-License-Identifier: Apache-2.0
"""Which context a call on a GPU gets, without a GPU: what PyTorch says of one is made up here.

test_cuda.py is for machines that have one.
"""

import threading
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.core import Context, SebpError  # noqa: E402
from sebp.torch.common import context  # noqa: E402
from sebp.torch.common.context import context_of, thread_context  # noqa: E402
from sebp.torch.common.devices import are_together, cuda_version, reason_against  # noqa: E402
from sebp.torch.common.work import work_done  # noqa: E402


def tensor_on(gpu):
    """Make what looks like a tensor; on the CPU for None."""
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    return SimpleNamespace(
        is_cpu=gpu is None,
        is_cuda=gpu is not None,
        device=device,
        get_device=lambda: -1 if gpu is None else gpu,
    )


@pytest.fixture
def cuda(monkeypatch):
    """Make up PyTorch's GPUs and the library's contexts on them, and note what is asked for."""
    state = SimpleNamespace(
        current=0, streams={0: 0, 1: 0}, capturing=False, made=[], calls=[], guards=0
    )

    class Device:
        """``torch.cuda.device``."""

        def __init__(self, gpu):
            self.gpu = gpu

        def __enter__(self):
            self.before, state.current = state.current, self.gpu
            state.guards += 1

        def __exit__(self, *_):
            state.current = self.before

    def make(self, **options):
        state.made.append((options, state.current))

    def call(self, function, *arguments):
        state.calls.append((function, arguments, state.current))

    monkeypatch.setattr(context, "stream_of", lambda gpu: state.streams[gpu])
    monkeypatch.setattr(context, "reason_against", lambda device: "")
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(Context, "__init__", make)
    monkeypatch.setattr(Context, "call", call)
    return state


def in_a_thread(function):
    """Call a function in a thread of its own, which has no contexts yet."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def test_a_context_for_each_gpu_stream_precision_and_thread(cuda):
    def contexts():
        found = {}
        for gpu in (0, 1):
            for stream in (0, 77):
                for precision in ("highest", "high"):
                    cuda.streams[gpu] = stream
                    torch.set_float32_matmul_precision(precision)
                    made = context_of(tensor_on(gpu))
                    assert context_of(None, tensor_on(gpu), None) is made
                    found[gpu, stream, precision] = made
        return found

    try:
        first, second = in_a_thread(contexts), in_a_thread(contexts)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len({id(one) for one in (*first.values(), *second.values())}) == 16
    assert len(cuda.made) == 16
    for (gpu, stream, precision), (options, current) in zip(first, cuda.made[:8], strict=True):
        assert options["device"] == "cuda"
        assert (options["gpu"], options["stream"]) == (gpu, stream)
        assert options["precision"] == precision
        assert current == gpu


def test_calls_are_made_on_the_tensors_gpu(cuda):
    def calls():
        for gpu in (0, 1):
            context_of(tensor_on(gpu)).call("sebp_something", gpu)

    in_a_thread(calls)
    assert cuda.calls == [("sebp_something", (0,), 0), ("sebp_something", (1,), 1)]
    assert cuda.current == 0
    assert cuda.guards == 3  # two for what is made, and one for a call: 0 is current already


def test_tensors_of_several_devices(cuda):
    for others in ((0, 1), (0, None), (None, 0)):
        tensors = [tensor_on(gpu) for gpu in others]
        with pytest.raises(RuntimeError, match="at least two devices"):
            context_of(None, *tensors)
        assert not are_together(*tensors)


def test_the_first_call_is_not_captured(cuda):
    cuda.capturing = True
    cuda.streams[0] = 5
    with pytest.raises(RuntimeError, match="cannot be captured"):
        in_a_thread(lambda: context_of(tensor_on(0)))
    assert not cuda.made


def test_on_the_cpu_nothing_is_asked_of_cuda(monkeypatch):
    def refuse(*_):
        raise AssertionError("torch.cuda was asked")

    for name in ("current_device", "current_stream", "device", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(context, "stream_of", refuse)
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 4))
    sebp.prepare(model, quiet=True)
    before = sum(work.rows for work in work_done().values())
    model(torch.randn(3, 8)).sum().backward()
    assert sum(work.rows for work in work_done().values()) == before + 6
    assert context_of(torch.ones(1), None) is thread_context()


def test_gpus_without_cuda_in_the_library():
    if cuda_version():
        pytest.skip("the library was built with CUDA")
    device = torch.device("cuda", 0)
    assert "configure --with-cuda" in reason_against(device)
    assert not are_together(tensor_on(0))
    with pytest.raises(SebpError) as raised:
        Context(device="cuda")
    assert raised.value.status == 11
    assert reason_against(torch.device("meta")) == "libsebp works on the CPU"
    assert reason_against(torch.device("cpu")) == ""


def test_tensors_where_the_library_cannot_work(monkeypatch):
    with pytest.raises(TypeError, match="is on meta, and libsebp works on the CPU"):
        context_of(torch.ones(1, device="meta"))
    if not cuda_version():
        monkeypatch.setattr(context, "stream_of", lambda gpu: 0)
        with pytest.raises(TypeError, match="configure --with-cuda"):
            context_of(tensor_on(0))


def test_options_of_a_context():
    with pytest.raises(ValueError, match="device is 'tpu'"):
        Context(device="tpu")
    with Context() as own:
        assert own.gpu_name == ""
