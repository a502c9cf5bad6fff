# SPDX-License-Identifier: Apache-2.0
"""Tensors as the library's matrices: their own memory where it can be read row by row."""

import ctypes
import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sebp import SebpError, sparse  # noqa: E402
from sebp._structs import F32  # noqa: E402
from sebp.torch.common.tensors import matrix_of  # noqa: E402

# Layouts of 6 x 5 elements or of more dimensions, and the stride between rows; None: a copy.
LAYOUTS = {
    "contiguous": (lambda t: t, 5),
    "a vector": (lambda t: t[0], 5),
    "one row of many": (lambda t: t[2:3, :3], 3),
    "one column": (lambda t: t[:, 1:2], 5),
    "gaps between rows": (lambda t: t[:, 1:4], 5),
    "every other row": (lambda t: t[::2], 10),
    "3-D": (lambda t: t.view(2, 3, 5), 5),
    "3-D with gaps": (lambda t: t.view(2, 3, 5)[..., :4], 5),
    "4-D, some of size 1": (lambda t: t.view(2, 1, 3, 1, 5)[..., 1:].transpose(1, 3), 5),
    "3-D that is not 2-D": (lambda t: t.view(2, 3, 5)[:, :2], None),
    "3-D transposed": (lambda t: t.view(2, 3, 5).transpose(0, 1), None),
    "transposed": (lambda t: t.t(), None),
    "every other column": (lambda t: t[:, ::2], None),
    "a vector with gaps": (lambda t: t[:, 0], None),
    "broadcast rows": (lambda t: t[:1].expand(4, 5), None),
    "broadcast columns": (lambda t: t[:, :1].expand(6, 3), None),
    "overlapping rows": (lambda t: t.as_strided((4, 5), (2, 1)), None),
    "no rows": (lambda t: t[:0], 5),
    "no columns": (lambda t: t[:, :0], 0),
}


def elements(matrix):
    """Read a matrix as the library does."""
    size = 4 if matrix.dtype == F32 else 2
    rows = [
        ctypes.string_at(matrix.data + size * r * matrix.stride, size * matrix.cols)
        for r in range(matrix.rows if matrix.cols else 0)
    ]
    return b"".join(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    view, stride = LAYOUTS[layout]
    tensor = view(torch.arange(1, 31).view(6, 5).to(dtype))
    matrix = matrix_of(tensor)
    assert (matrix.rows, matrix.cols) == (tensor[..., :1].numel() or len(tensor), tensor.shape[-1])
    assert matrix.is_copy == (stride is None)
    assert matrix.is_copy or matrix.data in (tensor.data_ptr(), None)
    assert matrix.stride == (matrix.cols if stride is None else stride)
    assert elements(matrix) == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_gradients_and_signs():
    """A tensor with a gradient is taken as it is, one that is stored negated by its values."""
    tensor = torch.ones(2, 3, requires_grad=True)
    assert matrix_of(tensor).data == tensor.data_ptr()
    negated = torch.complex(torch.ones(2, 3), torch.ones(2, 3)).conj().imag
    assert negated.is_neg()
    matrix = matrix_of(negated)
    assert matrix.is_copy
    assert elements(matrix) == np.full((2, 3), -1, np.float32).tobytes()


@pytest.mark.parametrize("is_copied", [False, True])
def test_memory_is_kept(is_copied):
    tensor = torch.ones(4, 3)
    matrix = matrix_of(tensor.t() if is_copied else tensor)
    memory = weakref.ref(matrix.memory)
    del tensor
    gc.collect()
    assert elements(matrix) == np.ones((4, 3), np.float32).tobytes()
    del matrix
    gc.collect()
    assert memory() is None


class Wrapper(torch.Tensor):
    """A tensor whose elements are somewhere else."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3, 4))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, 4, dtype=torch.float64),
        lambda: torch.ones(3, 4, dtype=torch.float16),
        lambda: torch.ones(3, 4, dtype=torch.int32),
        lambda: torch.ones(3, 4, device="meta"),
        lambda: torch.ones(3, 4).to_sparse(),
        lambda: torch.ones(3, 4).to_sparse_csr(),
        lambda: torch.ones(3, 4).to_mkldnn(),
        lambda: torch._subclasses.FakeTensorMode().from_tensor(torch.ones(3, 4)),
        Wrapper,
    ],
)
def test_what_has_no_matrix(make):
    with pytest.raises(TypeError, match="tensor is of|no memory"):
        matrix_of(make())


def test_a_copy_is_not_written_to():
    """What would be written to it is lost, so it is refused; the tensor's own memory is not."""
    kept = sparse.Sparse(np.array([1]), np.ones(1, np.float32), (4, 3))
    weight = torch.zeros(4, 3)
    sparse.add_elements(kept, matrix_of(weight))
    assert weight.flatten().tolist() == [0, 1, *[0] * 10]
    other = torch.zeros(3, 4).t()
    updates = {
        "add_elements": lambda w: sparse.add_elements(kept, w),
        "weight_decay": lambda w: sparse.weight_decay(w, sparse.AdamW()),
        "lora_merge": lambda w: sparse.lora_merge(
            matrix_of(torch.ones(3, 1)), matrix_of(torch.ones(1, 4)), 1.0, w
        ),
    }
    for name, update in updates.items():
        update(matrix_of(weight))
        with pytest.raises(ValueError, match="not an array that can be written"):
            update(matrix_of(other))
        assert not other.any(), name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("which", ["rows of x", "columns of x", "weight", "bias"])
def test_sizes_that_do_not_go_together(which, transposed):
    """The operators look at each tensor's own size, and read nothing past its end."""
    dy, x, w, bias = (torch.randn(*s) for s in ((3, 6), (3, 4), (6, 4), (6,)))
    w = w.t().contiguous() if transposed else w
    if which == "rows of x":
        x = torch.randn(2, 4)
    elif which == "columns of x":
        x = torch.randn(3, 5)
    elif which == "weight":
        w = torch.randn(3, 6) if transposed else torch.randn(6, 3)
    else:
        bias = torch.randn(5)
    errors = (SebpError, RuntimeError)
    if which != "rows of x":
        with pytest.raises(errors, match="should be|must match"):
            torch.ops.sebp.linear(x, w, bias, None, transposed)
    if which != "bias":
        with pytest.raises(errors, match="should be|row set is for"):
            dtypes = [torch.float32] * 3
            torch.ops.sebp.linear_backward(dy, x, w, 3, transposed, 0, 0.0, *dtypes)
