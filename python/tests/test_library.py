# SPDX-License-Identifier: Apache-2.0
"""Finding and loading the library, and the layout of its structs."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sebp
from sebp import _library
from sebp._structs import AdamWOptions, ContextOptions, Info, LinearOptions, Matrix


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_not_found_says_where_and_how(tmp_path):
    missing = str(tmp_path / "libsebp.so")
    done = run_python("import sebp; sebp.Rows.all(3)", SEBP_LIBRARY=missing)
    assert done.returncode != 0
    assert "LibraryNotFoundError" in done.stderr
    assert missing in done.stderr
    assert "pip install ./python" in done.stderr
    assert "./bootstrap" in done.stderr


def test_not_a_library(tmp_path):
    text = tmp_path / "libsebp.so"
    text.write_text("no library")
    done = run_python("import sebp; sebp.Rows.all(3)", SEBP_LIBRARY=str(text))
    assert "LibraryNotFoundError" in done.stderr
    assert str(text) in done.stderr


def test_another_library():
    done = run_python("import sebp; sebp.Rows.all(3)", SEBP_LIBRARY="libc.so.6")
    assert "LibraryMismatchError" in done.stderr


def test_another_version():
    code = (
        "import sebp, sebp._library as l; l.__version__ = '9.9.0'\n"
        "try: sebp.Rows.all(3)\n"
        "except sebp.LibraryMismatchError as error: print(error)"
    )
    done = run_python(code)
    assert "9.9.0" in done.stdout
    assert sebp.__version__ in done.stdout


LOADED = """
import sys
del sys.path[0]  # the folder in which the tests run
from sebp import _library
print(_library.load()._name)
"""


def built_library() -> Path:
    """Return the library that the tests run on."""
    return Path(next(iter(_library.mapped_files("libsebp.so")), _library.load()._name))


def copy_package(folder: Path) -> Path:
    """Copy the package, without a library, into a folder that PYTHONPATH is to name."""
    source = Path(sebp.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(source, folder / "sebp", ignore=ignored)
    return folder


def put_library(folder: Path, built: int) -> Path:
    """Put the library into a folder, as if it had been built at that time."""
    folder.mkdir(parents=True)
    target = folder / "libsebp.so.0"
    shutil.copyfile(built_library(), target)
    os.utime(target, (built, built))
    return target


def make_tree(tree: Path, changed: int) -> Path:
    """Make a source tree around a copy of the package; its C files have one time."""
    (tree / "include/sebp").mkdir(parents=True)
    (tree / "lib").mkdir()
    for name in ("configure.ac", "include/sebp/sebp.h", "lib/gemm.c"):
        (tree / name).touch()
        os.utime(tree / name, (changed, changed))
    return copy_package(tree / "python")


def test_own_copy_comes_first(tmp_path):
    package = make_tree(tmp_path, 1000)
    put_library(tmp_path / ".libs", 3000)
    own = put_library(package / "sebp/lib", 2000)
    done = run_python(LOADED, PYTHONPATH=str(package), SEBP_LIBRARY="")
    assert done.stdout == f"{own}\n", done.stderr


def test_own_copy_that_does_not_load(tmp_path):
    """Another library is not taken in its place."""
    package = make_tree(tmp_path, 1000)
    put_library(tmp_path / ".libs", 3000)
    own = put_library(package / "sebp/lib", 2000)
    own.write_text("no library")
    done = run_python(LOADED, PYTHONPATH=str(package), SEBP_LIBRARY="")
    assert "LibraryNotFoundError" in done.stderr
    assert str(own) in done.stderr


@pytest.mark.parametrize("newest", [".libs", "build/.libs", "build-editable/.libs"])
def test_newest_build_of_the_source_tree(tmp_path, newest):
    package = make_tree(tmp_path, 1000)
    for folder in (".libs", "build/.libs", "build-editable/.libs"):
        put_library(tmp_path / folder, 3000 if folder == newest else 2000)
    done = run_python(LOADED, PYTHONPATH=str(package), SEBP_LIBRARY="")
    assert done.stdout == f"{tmp_path / newest / 'libsebp.so.0'}\n"
    assert "is older than" not in done.stderr


def test_stale_build(tmp_path):
    """A library that is older than its sources is told of."""
    package = make_tree(tmp_path, 2000)
    put_library(tmp_path / ".libs", 1000)
    done = run_python(LOADED, PYTHONPATH=str(package), SEBP_LIBRARY="")
    assert done.stdout == f"{tmp_path / '.libs/libsebp.so.0'}\n"
    assert "RuntimeWarning" in done.stderr
    assert re.search("is older than (lib/gemm.c|include/sebp/sebp.h): build it again", done.stderr)


def test_folders_around_an_installed_package(tmp_path):
    """They are not searched: a library that happens to lie there is not this package's."""
    package = copy_package(tmp_path / "python")
    strange = [put_library(tmp_path / name, 1000) for name in (".libs", "build/.libs")]
    done = run_python(LOADED, PYTHONPATH=str(package), SEBP_LIBRARY="")
    for library in strange:
        assert str(library) not in done.stdout + done.stderr
    assert done.returncode == 0 or "LibraryNotFoundError" in done.stderr


def test_struct_sizes():
    """The library refuses a struct that is shorter than that of its first version."""
    library = _library.load()
    context = ctypes.c_void_p()
    # By the library's own product, which is what keeps packed weights.
    options = ContextOptions(size_bytes=ctypes.sizeof(ContextOptions), gemm=1)
    assert library.sebp_context_create(options, context) == 0
    options.precision = 9  # the last field
    assert library.sebp_context_create(options, ctypes.c_void_p()) == 8
    options.size_bytes = ContextOptions.device.offset - 8  # where version 0.1.0's ended
    assert library.sebp_context_create(options, ctypes.c_void_p()) == 2

    info = Info(size_bytes=ctypes.sizeof(Info))
    assert library.sebp_info_get(context, info) == 0
    assert info.cores >= 1
    assert info.logical_cpus >= info.cores
    info.size_bytes = Info.amx_refused.offset  # as version 0.1.0 had it
    assert library.sebp_info_get(context, info) == 0
    info.size_bytes -= 8
    assert library.sebp_info_get(context, info) == 2

    number = (ctypes.c_float * 1)(3.0)
    result = (ctypes.c_float * 1)(-1.0)
    view = Matrix(ctypes.addressof(number), 1, 1, 1, 0)
    out = Matrix(ctypes.addressof(result), 1, 1, 1, 0)
    linear = LinearOptions(ctypes.sizeof(LinearOptions))
    assert library.sebp_linear_forward(context, view, view, None, None, linear, out) == 0
    assert result[0] == 9.0
    packed = ctypes.c_void_p()
    assert library.sebp_packed_weight_create(context, view, 0, packed) == 0
    linear.packed_weight = packed  # the last field
    assert library.sebp_linear_forward(context, view, view, None, None, linear, out) == 0
    assert library.sebp_packed_weight_bytes(packed) > 0
    assert library.sebp_linear_forward(context, view, out, None, None, linear, view) == 8
    linear.packed_weight = None
    library.sebp_packed_weight_destroy(packed)
    linear.precision = 9
    assert library.sebp_linear_forward(context, view, view, None, None, linear, out) == 8
    linear.size_bytes = LinearOptions.residual.offset - 8  # where version 0.1.0's ended
    assert library.sebp_linear_forward(context, view, view, None, None, linear, out) == 2

    adamw = AdamWOptions(ctypes.sizeof(AdamWOptions), learning_rate=0.5, epsilon=1, weight_decay=1)
    assert library.sebp_weight_decay(context, adamw, out) == 0
    assert result[0] == 4.5
    adamw.size_bytes -= 8
    assert library.sebp_weight_decay(context, adamw, out) == 2
    library.sebp_context_destroy(context)


def test_numpy_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, sebp\n"
        "y = sebp.linear_forward(np.ones((2, 3), np.float32), np.ones((4, 3), np.float32))\n"
        "assert (y == 3).all()"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["attention", "core", "sparse", "torch"])
def test_modules_need_no_import(name):
    """The modules that the package's documentation names come with it, each on its own."""
    if name == "torch":
        pytest.importorskip("torch")
    code = (
        "import sys, sebp\n"
        f"assert {name!r} == 'core' or 'sebp.{name}' not in sys.modules\n"
        f"assert hasattr(sebp, {name!r})\n"
        f"assert sebp.{name} is sys.modules['sebp.{name}']\n"
        "assert not hasattr(sebp, 'absent')"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_torch_of_a_star_import_is_pytorch():
    torch = pytest.importorskip("torch")
    names = {"torch": torch}
    exec("import sebp\nsebp.torch\nfrom sebp import *", names)
    assert names["torch"] is torch


@pytest.mark.parametrize(("absent", "missing"), [("none", 0), ("transformers", 1), ("torch", 23)])
def test_dir(absent, missing):
    """dir() lists the public names, all of which can be had, and help() works on them."""
    pytest.importorskip("torch")
    if absent == "none":
        pytest.importorskip("transformers")
    code = f"""
import inspect, sys
sys.modules[{absent!r}] = None
import sebp
def can_be_had(name):
    try:
        getattr(sebp, name)
    except ImportError:
        return False
    return True
public = [*sebp.__all__, "attention", "core", "sparse", "torch"]
had = {{name for name in public if can_be_had(name)}}
assert len(public) - len(had) == {missing}, had
assert set(dir(sebp)) == had, had ^ set(dir(sebp))
assert {{name for name, _ in inspect.getmembers(sebp)}} == had
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("first", ["torch", "sebp"])
def test_one_openmp_runtime(first, gnu_openmp):
    """PyTorch and the library work with the same threads, whichever comes first."""
    pytest.importorskip("torch")
    code = f"""
import os
first = {first!r}
import numpy as np, sebp
a = np.ones((512, 512), np.float32)
if first == "sebp":
    sebp.linear_backward(a, a, a)
import torch, sebp.torch
torch.set_num_threads(3)
def threads():
    return len(os.listdir("/proc/self/task"))
t = torch.ones(2048, 512, requires_grad=True)
w = torch.ones(512, 512, requires_grad=True)
torch.nn.functional.gelu(t).sum()
alone = threads()
y = torch.ops.sebp.linear(t, w)
y.backward(torch.ones_like(y))
assert sebp.torch.common.context.thread_context().threads == 3
assert len(sebp.openmp_runtimes()) == 1, sebp.openmp_runtimes()
assert threads() == alone, (alone, threads())
"""
    done = run_python(code, OMP_NUM_THREADS="3", SEBP_NUM_THREADS="")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("torch_is_gnu", [False, True])
@pytest.mark.parametrize("is_llvm", [False, True])
def test_two_pools_are_told_of(monkeypatch, recwarn, torch_is_gnu, is_llvm):
    """Loading warns where the library's OpenMP is LLVM's and PyTorch's is GNU's, and only there."""
    monkeypatch.setattr(_library, "share_openmp", lambda: torch_is_gnu)
    monkeypatch.setattr(_library, "brings_llvm_openmp", lambda library: is_llvm)
    _library.load.__wrapped__()
    assert [warning.category for warning in recwarn] == [RuntimeWarning] * (
        torch_is_gnu and is_llvm
    )


_BEFORE = {
    "nothing": "",
    "the default context": "linear_forward(x, x)",
    "a context": """
with Context(threads=2) as closed:
    linear_forward(x, x, context=closed)""",
    "an open context": """
context = Context(threads=2)
linear_forward(x, x, context=context)""",
    "another thread": """
thread = threading.Thread(target=linear_forward, args=(x, x))
thread.start()
thread.join()""",
    "PyTorch": """
import torch
torch.set_num_threads(2)
torch.ones(2000, 2000).sigmoid_()""",
    "PyTorch and the library": """
import torch
torch.set_num_threads(2)
torch.ones(2000, 2000).sigmoid_()
linear_forward(x[:1], x)""",
}


@pytest.mark.parametrize("gemm", ["auto", "onednn"])
@pytest.mark.parametrize("before", _BEFORE)
def test_forked_child(before, gemm):
    """A child computes, whatever has used threads before, with contexts old and new."""
    if "PyTorch" in before:
        pytest.importorskip("torch")
    code = f"""
import os, signal, threading
import numpy as np
from sebp import Context, linear_forward
x = np.ones((512, 512), np.float32)
context = None
{_BEFORE[before]}
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    own = Context(threads=2)
    assert own.threads == 1
    for one in (None, own, context):
        assert (linear_forward(x, x, context=one) == 512).all()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = run_python(code, OMP_NUM_THREADS="2", SEBP_NUM_THREADS="2", SEBP_GEMM=gemm)
    if gemm == "onednn" and "this build has no oneDNN" in done.stderr:
        pytest.skip("this build has no oneDNN")
    assert done.returncode == 0, done.stderr


def test_child_of_a_fork_server(tmp_path):
    """The server has done nothing but imports: its child has threads, and the child's has not."""
    with sebp.Context(threads=2) as context:
        if context.threads == 1:
            pytest.skip("built without OpenMP")
    program = tmp_path / "program.py"
    program.write_text("""
import multiprocessing, os, signal
import numpy as np
import sebp

x = np.ones((512, 512), np.float32)


def work(threads):
    signal.alarm(60)
    with sebp.Context(threads=2) as context:
        assert context.threads == threads, context.threads
        assert (sebp.linear_forward(x, x, context=context) == 512).all()


def work_and_fork():
    assert multiprocessing.current_process().name != "MainProcess"
    if os.fork() == 0:
        work(1)  # before the library was loaded
        os._exit(0)
    assert os.wait()[1] == 0
    work(2)
    if os.fork() == 0:
        work(1)
        os._exit(0)
    assert os.wait()[1] == 0


if __name__ == "__main__":
    child = multiprocessing.get_context("forkserver").Process(target=work_and_fork)
    child.start()
    child.join(90)
    assert child.exitcode == 0, child.exitcode
""")
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "OMP_NUM_THREADS": "2", "SEBP_NUM_THREADS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["library", "PyTorch"])
def test_forked_child_solves(lapack, gnu_openmp, first):
    """LAPACK's threads are the parent's as well, where they are of the library's runtime."""
    if first == "PyTorch":
        pytest.importorskip("torch")
    code = f"""
import os, signal
import numpy as np
from sebp.sparse import BasisSums
def solve():
    sums = BasisSums(300, 200)
    sums.add(np.random.default_rng(1).standard_normal((300, 200), np.float32))
    return sums.solve(20, 200).shares
if {first!r} == "library":
    want = solve()
else:
    import torch
    torch.set_num_threads(2)
    torch.ones(2000, 2000).sigmoid_()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    shares = solve()
    assert {first!r} == "PyTorch" or np.allclose(shares, want, atol=1e-5)
    assert abs(shares[1] - 1) < 1e-5 and 0.1 < shares[0] < 0.9, shares
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = run_python(code, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr


def test_fork():
    """A forked child goes on alone, without waiting for threads that are gone."""
    pytest.importorskip("torch")
    code = """
import os, torch, sebp.torch
t = torch.ones(512, 256, requires_grad=True)
w = torch.ones(256, 256, requires_grad=True)
g = torch.ones(512, 256)
torch.ops.sebp.linear(t, w).backward(g)
w.grad = None
y = sebp.linear_backward(g.numpy(), t.detach().numpy(), w.detach().numpy())
pid = os.fork()
if pid == 0:
    dx, dw, db = torch.ops.sebp.linear_backward(
        g, t.detach(), w.detach(), 512, False, 0, 0.0, t.dtype, w.dtype, g.dtype)
    y = sebp.linear_backward(g.numpy(), t.detach().numpy(), w.detach().numpy())
    # Not with PyTorch's own sum, which would wait for its threads.
    os._exit(0 if dw.numpy().sum() == 512.0 * 256 * 256 == y[1].sum() else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = run_python(code, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
