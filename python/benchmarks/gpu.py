# SPDX-License-Identifier: Apache-2.0
"""A linear layer's backward and attention on a GPU, beside PyTorch's own.

The backward of a linear layer Y = X W^T + b, M rows of which a share alpha is active (drawn at
random; the other rows of dY are zero):

- *dense*: PyTorch's three products and sums on all rows, ``dy @ w``, ``dy.t() @ x``, ``dy.sum(0)``
- *by hand*: the active rows gathered by ``index_select``, the products, dX copied into zeros
- *ours*: ``sebp_linear_backward`` with the row set given
- *found*: the same with the rows found in dY first, which waits for the GPU

Attention is a forward and a backward of texts that lie end to end: by the library, by PyTorch on
the batch padded to its longest text, with a mask, and by PyTorch on texts end to end where it can.

Each mode is timed by events on the stream, call after call ("calls"), and as a CUDA graph of
several calls ("graph"), in which the CPU has no part; "-" where a mode cannot be captured. Calls go
round a few sets of inputs, so that none finds its own in the L2 cache. Modes take turns; a time is
the median of the rounds, in microseconds. Products of float32 are in float32, or with
``--precision high`` of TF32 in all modes.
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sebp._rules import Rule
from sebp.attention import AttentionOptions
from sebp.core import Rows
from sebp.torch.attention.products import attention_backward, attention_forward
from sebp.torch.attention.texts import Texts
from sebp.torch.common.tensors import matrix_of
from sebp.torch.linear_layers.products import library_backward, linear_backward

Mode = Callable[[int], object]  # of the number of a set of inputs

_SHAPES = ((4096, 768, 3072), (2048, 3072, 8192), (16384, 3072, 8192))
_ALPHAS = (0.1, 0.25, 1.0)
_DTYPES = (torch.bfloat16, torch.float32)
_ROUND_BYTES = 256 << 20  # of inputs in a round, several times the L2 cache
_MAX_SETS = 8
_SECONDS = 0.4  # that a mode may take in all its rounds
_MAX_ROUNDS = 30


# --------------------------------------------------------------------------------------------------
# Times


def _elapsed(run: Callable[[], None], calls: int) -> float:
    """Return the microseconds of a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / calls


def _as_graph(mode: Mode, sets: int) -> Callable[[], None] | None:
    """Capture a call for each set of inputs, or return None where that is not possible."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            # Row sets get their copies, and contexts their scratch memory, for this stream.
            for number in range(sets):
                mode(number)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for number in range(sets):
                mode(number)
    except Exception as error:
        print(f"    no graph: {type(error).__name__}: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return None
    return graph.replay


def measure(modes: dict[str, Mode], sets: int) -> dict[str, tuple[float, float | None]]:
    """Time modes in turn.

    Parameters
    ----------
    modes : dict of str to callable
    sets : int
        Of inputs.

    Returns
    -------
    dict of str to (float, float or None)
        The microseconds of a call, one after the other, and in a graph.
    """

    def one_by_one(mode: Mode) -> Callable[[], None]:
        def run() -> None:
            for number in range(sets):
                mode(number)

        return run

    runs = {(name, "calls"): one_by_one(mode) for name, mode in modes.items()}
    for name, mode in modes.items():
        runs[name, "graph"] = _as_graph(mode, sets)
    ready = {key: run for key, run in runs.items() if run is not None}
    longest = 0.0
    for run in ready.values():
        run()
        longest = max(longest, _elapsed(run, 1))
    rounds = int(min(max(_SECONDS * 1e6 / longest, 3), _MAX_ROUNDS))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in ready}
    for _ in range(rounds):
        for key, run in ready.items():
            times[key].append(_elapsed(run, sets))
    median = {key: statistics.median(found) for key, found in times.items()}
    return {name: (median[name, "calls"], median.get((name, "graph"))) for name in modes}


def _print_line(label: str, times: dict[str, tuple[float, float | None]], names: list[str]) -> None:
    """Print the times of modes, and how many times as long as ours the others take."""
    cells = []
    for name in names:
        calls, graph = times.get(name, (None, None))
        cells.append("-" if calls is None else f"{calls:.0f}")
        cells.append("-" if graph is None else f"{graph:.0f}")
    ours = times["ours"][1] or times["ours"][0]
    for name in names:
        if name not in ("ours", "found"):
            calls, graph = times.get(name, (None, None))
            other = calls if graph is None else graph
            cells.append("-" if other is None else f"{other / ours:.2f}")
    print(f"{label:34}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def _print_head(what: str, names: list[str]) -> None:
    heads = [f"{name} {way}" for name in names for way in ("calls", "graph")]
    heads += [f"{name} / ours" for name in names if name not in ("ours", "found")]
    print(f"\n{what}; columns, in microseconds: {', '.join(heads)}")


# --------------------------------------------------------------------------------------------------
# The linear layer


class _Layer:
    """Inputs of a backward: dY: M x N, X: M x K, W: N x K, and the active rows."""

    def __init__(self, m: int, k: int, n: int, alpha: float, dtype: torch.dtype) -> None:
        device = torch.device("cuda")
        self.dy = torch.randn(m, n, device=device, dtype=dtype)
        self.x = torch.randn(m, k, device=device, dtype=dtype)
        self.w = torch.randn(n, k, device=device, dtype=dtype)
        active = torch.randperm(m)[: round(alpha * m)].sort().values
        self.rows = Rows.from_indices(active.numpy(), m)
        self.indices = active.to(device)
        idle = torch.ones(m, dtype=torch.bool, device=device)
        idle[self.indices] = False
        self.dy[idle] = 0
        self.matrices = [matrix_of(one) for one in (self.dy, self.x, self.w)]

    def dense(self) -> tuple[Tensor, ...]:
        """Compute dX, dW and db on all rows."""
        return self.dy @ self.w, self.dy.t() @ self.x, self.dy.sum(0)

    def by_hand(self) -> tuple[Tensor, ...]:
        """Compute them on the active rows, gathered by PyTorch."""
        dy, x = (one.index_select(0, self.indices) for one in (self.dy, self.x))
        dx = torch.zeros_like(self.x).index_copy_(0, self.indices, dy @ self.w)
        return dx, dy.t() @ x, dy.sum(0)

    def ours(self) -> tuple[Tensor, ...]:
        """Compute them by the library, on the rows given."""
        dx, dw = torch.empty_like(self.x), torch.empty_like(self.w)
        db = self.dy.new_empty(1, self.dy.shape[1])
        dy, x, w = self.matrices
        library_backward(dy, x, w, self.rows, matrix_of(dx), matrix_of(dw), matrix_of(db))
        return dx, dw, db[0]

    def found(self) -> tuple[Tensor | None, ...]:
        """Compute them by the library, on the rows that it finds."""
        dtypes = (self.dy.dtype,) * 3
        return linear_backward(self.dy, self.x, self.w, len(self.dy), False, Rule(), *dtypes)


def _largest_difference(layer: _Layer) -> float:
    """Return how far our gradients are from the dense ones, by the largest element."""
    pairs = zip(layer.ours(), layer.dense(), strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def time_layers(shapes: tuple, alphas: tuple, dtypes: tuple) -> None:
    """Print the table of linear layers."""
    names = ["dense", "by hand", "ours", "found"]
    _print_head("backward of a linear layer, M x K -> N", names)
    for dtype in dtypes:
        for m, k, n in shapes:
            for alpha in alphas:
                layer_bytes = dtype.itemsize * (m * n + m * k + n * k)
                sets = min(max(-(-_ROUND_BYTES // layer_bytes), 2), _MAX_SETS)
                layers = [_Layer(m, k, n, alpha, dtype) for _ in range(sets)]
                difference = _largest_difference(layers[0])
                if not difference < (3e-2 if dtype == torch.bfloat16 else 1e-3):
                    print(f"    WRONG: gradients differ by {difference:.1e}")
                modes = {
                    "dense": lambda i, of=layers: of[i].dense(),
                    "by hand": lambda i, of=layers: of[i].by_hand(),
                    "ours": lambda i, of=layers: of[i].ours(),
                }
                times = measure(modes, sets)
                found = _without_a_graph(lambda i, of=layers: of[i].found(), sets)
                times["found"] = found, None
                name = str(dtype).removeprefix("torch.")
                _print_line(f"{name} {m}x{k}->{n} {alpha:g}", times, names)
                del layers, modes


def _without_a_graph(mode: Mode, sets: int) -> float:
    """Time calls that wait for the GPU and so cannot be captured."""

    def run() -> None:
        for number in range(sets):
            mode(number)

    run()
    return statistics.median(_elapsed(run, sets) for _ in range(5))


# --------------------------------------------------------------------------------------------------
# Attention


class _Attention:
    """Texts end to end and padded: q, k, v and the gradient of what is attended to."""

    def __init__(self, lengths: list[int], heads: int, size: int, causal: bool) -> None:
        self.lengths, self.heads, self.causal = lengths, heads, causal
        total, longest = sum(lengths), max(lengths)
        shape = (4, total, heads, size)
        self.packed = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.texts = Texts.of_lengths(np.array(lengths, np.int64))
        self.options = AttentionOptions(heads=heads, scale=size**-0.5, causal=causal)
        self.mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None].cuda()
        self.has_padding = total < len(lengths) * longest
        padded = self.packed.new_zeros(4, len(lengths), longest, heads, size)
        padded[:, self.mask[:, 0, 0]] = self.packed
        self.padded = padded.transpose(2, 3)
        self.offsets = torch.tensor([0, *np.cumsum(lengths)], device="cuda", dtype=torch.int32)

    def ours(self) -> tuple[Tensor | None, ...]:
        """Compute it by the library."""
        q, k, v, dout = (one.flatten(1)[None] for one in self.packed)
        out, lse = attention_forward(q, k, v, None, self.texts, self.options, True)
        needs = (True, True, True, False)
        return attention_backward(
            dout, q, k, v, None, out, lse, self.texts, self.options, needs
        )  # fmt: skip

    def on_padded(self, *backends: SDPBackend) -> tuple[Tensor, ...]:
        """Compute it by PyTorch on the padded batch."""
        q, k, v = (one.detach().requires_grad_() for one in self.padded[:3])
        mask = self.mask if self.has_padding else None
        with sdpa_kernel(list(backends)):
            out = scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return torch.autograd.grad(out, (q, k, v), self.padded[3])

    def varlen(self) -> tuple[Tensor, ...]:
        """Compute it by PyTorch's attention of texts end to end."""
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (one.detach().requires_grad_() for one in self.packed[:3])
        longest = max(self.lengths)
        window = {"window_size": (-1, 0)} if self.causal else {}
        out = varlen_attn(q, k, v, self.offsets, self.offsets, longest, longest, **window)
        return torch.autograd.grad(out, (q, k, v), self.packed[3])

    def nested(self) -> tuple[Tensor, ...]:
        """Compute it by PyTorch on nested tensors."""
        leaves = [one.detach().requires_grad_() for one in self.packed[:3]]
        bounds = {"min_seqlen": min(self.lengths), "max_seqlen": max(self.lengths)}
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(one, self.offsets.long(), **bounds)
            for one in leaves
        )
        heads_first = (one.transpose(1, 2) for one in (q, k, v))
        out = scaled_dot_product_attention(*heads_first, is_causal=self.causal)
        return torch.autograd.grad(out.transpose(1, 2).values(), leaves, self.packed[3])


def sst2_like_lengths(texts: int, seed: int) -> list[int]:
    """Draw lengths from 5 to 60 tokens, some 25 on average."""
    drawn = np.random.default_rng(seed).gamma(5.0, 5.0, texts)
    return [int(length) for length in drawn.round().clip(5, 60)]


def time_attention(label: str, lengths: list[int], causal: bool) -> None:
    """Print a line of the table of attention: 12 heads of 64, bfloat16."""
    names = ["masked", "flash", "cudnn", "varlen", "nested", "ours"]
    attentions = [_Attention(lengths, 12, 64, causal) for _ in range(2)]
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    usual = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    modes: dict[str, Mode] = {
        "ours": lambda i: attentions[i].ours(),
        "flash": lambda i: attentions[i].on_padded(flash),
        "cudnn": lambda i: attentions[i].on_padded(cudnn),
        "varlen": lambda i: attentions[i].varlen(),
        "nested": lambda i: attentions[i].nested(),
    }
    if attentions[0].has_padding:
        del modes["flash"]  # which takes no mask
        modes["masked"] = lambda i: attentions[i].on_padded(cudnn, *usual)
    for name, mode in list(modes.items()):
        try:
            mode(0)
            torch.cuda.synchronize()
        except Exception as error:
            if name == "ours":
                raise
            print(f"    no {name}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            del modes[name]
    _print_line(label, measure(modes, len(attentions)), names)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("linear", "attention"))
    parser.add_argument("--quick", action="store_true", help="the first shape, and alpha 0.25")
    parser.add_argument("--precision", choices=("highest", "high"), default="highest")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision(arguments.precision)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    if arguments.only != "attention":
        if arguments.quick:
            time_layers(_SHAPES[:1], (0.25,), _DTYPES)
        else:
            time_layers(_SHAPES, _ALPHAS, _DTYPES)
    if arguments.only != "linear":
        names = ["masked", "flash", "cudnn", "varlen", "nested", "ours"]
        _print_head("attention, forward and backward, 12 heads of 64, bfloat16", names)
        lengths = sst2_like_lengths(256, arguments.seed)
        time_attention(f"256 texts of 5 to 60, mean {np.mean(lengths):.0f}", lengths, False)
        for causal in (False, True):
            label = f"8 texts of 2048, {'causal' if causal else 'full'}"
            time_attention(label, [2048] * 8, causal)


if __name__ == "__main__":
    main()
