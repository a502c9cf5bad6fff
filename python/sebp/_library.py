# SPDX-License-Identifier: Apache-2.0
"""Finds libsebp, loads it once, and makes it share PyTorch's OpenMP runtime."""

import ctypes
import functools
import importlib.util
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

from ._structs import (
    ActivationOptions,
    AdamWOptions,
    AttentionOptionsStruct,
    ContextOptions,
    CrossEntropyOptions,
    DropoutOptions,
    Dropped,
    EmbeddingOptions,
    EmbeddingStruct,
    Info,
    LinearOptions,
    Matrix,
    NormOptions,
    RotaryOptions,
    RuleStruct,
    SparseStruct,
    StochasticOptions,
)
from ._version import __version__

NAME = "libsebp.so.0"
_OWN, _BUILT = "the package's own copy", "the source tree"

_HOW_TO_BUILD = """\
In a checkout or release of libsebp, this builds the library and puts it into the package:
    pip install ./python
Or build it there (./bootstrap && make), or install it (make install; ldconfig), or set
SEBP_LIBRARY to the path of libsebp.so."""


def _is_fork_server() -> bool:
    """Return whether this process is the server of multiprocessing, and not a child of it.

    It imports the main module, and so this one, but does no work: its children may use threads.
    """
    is_of_server = any("multiprocessing.forkserver" in argument for argument in sys.orig_argv)
    return is_of_server and multiprocessing.current_process().name == "MainProcess"


# Whether this process was forked from one that had imported this module. It had threads, as NumPy
# alone has some. A library that was loaded there knows, but not one that is loaded here.
_is_forked = False
_server = os.getpid() if _is_fork_server() else None


def _note_fork() -> None:
    global _is_forked
    _is_forked = _is_forked or os.getppid() != _server


os.register_at_fork(after_in_child=_note_fork)

TWO_POOLS = """\
libsebp was compiled by clang and brings LLVM's OpenMP runtime, PyTorch brings GNU's: two pools of
threads, which fight for the cores. Build libsebp with gcc, for one pool:
    CC=gcc pip install ./python    or    ./configure CC=gcc && make clean && make"""

_view = POINTER(Matrix)
_kept = POINTER(SparseStruct)
_linear_options = POINTER(LinearOptions)
_adamw_options = POINTER(AdamWOptions)
_attention_options = POINTER(AttentionOptionsStruct)

# Each function that is used: what it returns, and its arguments.
_FUNCTIONS = {
    "sebp_version": (c_char_p, []),
    "sebp_isa": (c_char_p, []),
    "sebp_status_string": (c_char_p, [c_int]),
    "sebp_info_get": (c_int, [c_void_p, POINTER(Info)]),
    "sebp_context_create": (c_int, [POINTER(ContextOptions), POINTER(c_void_p)]),
    "sebp_after_fork": (None, []),
    "sebp_context_destroy": (None, [c_void_p]),
    "sebp_context_threads": (c_int, [c_void_p]),
    "sebp_context_scratch_bytes": (c_int64, [c_void_p]),
    "sebp_context_message": (c_char_p, [c_void_p]),
    "sebp_rows_all": (c_int, [c_int64, POINTER(c_void_p)]),
    "sebp_rows_from_mask": (c_int, [c_void_p, c_int64, POINTER(c_void_p)]),
    "sebp_rows_from_lengths": (c_int, [c_void_p, c_int64, c_int64, POINTER(c_void_p)]),
    "sebp_rows_from_indices": (c_int, [c_void_p, c_int64, c_int64, POINTER(c_void_p)]),
    "sebp_rows_find": (c_int, [c_void_p, _view, POINTER(RuleStruct), POINTER(c_void_p)]),
    "sebp_rows_sample": (c_int, [c_void_p, _view, _view, POINTER(RuleStruct), POINTER(c_void_p)]),
    "sebp_rows_destroy": (None, [c_void_p]),
    "sebp_rows_count": (c_int64, [c_void_p]),
    "sebp_rows_total": (c_int64, [c_void_p]),
    "sebp_rows_activity": (c_double, [c_void_p]),
    "sebp_rows_indices": (c_void_p, [c_void_p]),
    "sebp_rows_weights": (c_void_p, [c_void_p]),
    "sebp_rows_variance": (c_double, [c_void_p]),
    "sebp_rows_dropped": (c_int, [c_void_p, _view, c_void_p, POINTER(Dropped)]),
    "sebp_sequences_from_lengths": (c_int, [c_void_p, c_int64, POINTER(c_void_p)]),
    "sebp_sequences_from_padded": (c_int, [c_void_p, c_int64, c_int64, POINTER(c_void_p)]),
    "sebp_sequences_from_mask": (c_int, [c_void_p, c_int64, c_int64, POINTER(c_void_p)]),
    "sebp_sequences_from_offsets": (c_int, [c_void_p, c_int64, POINTER(c_void_p)]),
    "sebp_sequences_destroy": (None, [c_void_p]),
    "sebp_sequences_count": (c_int64, [c_void_p]),
    "sebp_sequences_total": (c_int64, [c_void_p]),
    "sebp_sequences_max_length": (c_int64, [c_void_p]),
    "sebp_sequences_offsets": (c_void_p, [c_void_p]),
    "sebp_attention_forward": (
        c_int,
        [c_void_p, *[_view] * 4, c_void_p, c_void_p, _attention_options, _view, _view],
    ),
    "sebp_attention_backward": (
        c_int,
        [c_void_p, *[_view] * 7, c_void_p, c_void_p, _attention_options, *[_view] * 4],
    ),
    "sebp_packed_weight_create": (c_int, [c_void_p, _view, c_int64, POINTER(c_void_p)]),
    "sebp_packed_weight_changed": (None, [c_void_p]),
    "sebp_packed_weight_bytes": (c_int64, [c_void_p]),
    "sebp_packed_weight_destroy": (None, [c_void_p]),
    "sebp_linear_forward": (
        c_int,
        [c_void_p, _view, _view, _view, c_void_p, _linear_options, _view],
    ),
    "sebp_linear_backward": (
        c_int,
        [c_void_p, _view, _view, _view, c_void_p, _linear_options, _view, _view, _view],
    ),
    "sebp_norm_forward": (
        c_int,
        [c_void_p, _view, _view, _view, _view, c_void_p, POINTER(NormOptions), _view, _view, _view],
    ),
    "sebp_norm_backward": (
        c_int,
        [
            c_void_p,
            _view,
            _view,
            _view,
            _view,
            c_void_p,
            POINTER(NormOptions),
            _view,
            _view,
            _view,
            _view,
        ],
    ),
    "sebp_activation_forward": (
        c_int,
        [c_void_p, c_int, _view, _view, c_void_p, POINTER(ActivationOptions), _view],
    ),
    "sebp_activation_backward": (
        c_int,
        [c_void_p, c_int, _view, _view, _view, c_void_p, POINTER(ActivationOptions), _view, _view],
    ),
    "sebp_dropout_apply": (c_int, [c_void_p, _view, c_void_p, POINTER(DropoutOptions), _view]),
    "sebp_rotary_table": (c_int, [c_void_p, POINTER(RotaryOptions), _view]),
    "sebp_rotary_forward": (
        c_int,
        [c_void_p, _view, c_void_p, _view, c_void_p, POINTER(RotaryOptions), _view],
    ),
    "sebp_rotary_backward": (
        c_int,
        [c_void_p, _view, c_void_p, _view, c_void_p, POINTER(RotaryOptions), _view],
    ),
    "sebp_cross_entropy": (
        c_int,
        [c_void_p, _view, c_void_p, POINTER(CrossEntropyOptions), POINTER(c_double), _view],
    ),
    "sebp_linear_cross_entropy": (
        c_int,
        [
            c_void_p,
            _view,
            _view,
            _view,
            c_void_p,
            POINTER(CrossEntropyOptions),
            POINTER(c_double),
            _view,
            _view,
            _view,
        ],
    ),
    "sebp_embedding_forward": (
        c_int,
        [c_void_p, POINTER(EmbeddingStruct), c_int, c_void_p, POINTER(EmbeddingOptions), _view],
    ),
    "sebp_embedding_backward": (
        c_int,
        [c_void_p, _view, c_void_p, c_void_p, POINTER(EmbeddingOptions), _view],
    ),
    "sebp_gradient_norm": (c_int, [c_void_p, _view, c_int64, POINTER(c_double)]),
    "sebp_scale": (c_int, [c_void_p, _view, c_int64, c_double]),
    "sebp_sparse_top": (c_int, [c_void_p, _view, _kept]),
    "sebp_sparse_take": (c_int, [c_void_p, _view, _kept]),
    "sebp_sparse_add": (c_int, [c_void_p, _kept, _view]),
    "sebp_basis_sums_create": (c_int, [c_int64, c_int64, POINTER(c_void_p)]),
    "sebp_basis_sums_add": (c_int, [c_void_p, c_void_p, _view]),
    "sebp_basis_sums_count": (c_int64, [c_void_p]),
    "sebp_basis_sums_export": (c_int, [c_void_p, POINTER(c_double), _view, _view]),
    "sebp_basis_sums_import": (c_int, [c_void_p, c_int64, c_double, _view, _view]),
    "sebp_basis_sums_destroy": (None, [c_void_p]),
    "sebp_basis_solve": (c_int, [c_void_p, c_void_p, c_int64, c_int64, POINTER(c_void_p)]),
    "sebp_basis_from_vectors": (c_int, [_view, _view, POINTER(c_void_p)]),
    "sebp_basis_destroy": (None, [c_void_p]),
    "sebp_basis_out": (Matrix, [c_void_p]),
    "sebp_basis_in": (Matrix, [c_void_p]),
    "sebp_basis_share_out": (c_double, [c_void_p]),
    "sebp_basis_share_in": (c_double, [c_void_p]),
    "sebp_basis_save": (c_int, [c_void_p, c_void_p, c_char_p]),
    "sebp_basis_load": (c_int, [c_void_p, c_char_p, POINTER(c_void_p)]),
    "sebp_sparsegrad_gradient": (
        c_int,
        [c_void_p, c_void_p, _view, _view, c_void_p, _linear_options, c_int, _view],
    ),
    "sebp_sparsegrad_kept": (
        c_int,
        [c_void_p, c_void_p, _view, _view, c_void_p, _linear_options, c_int, _kept],
    ),
    "sebp_sparsegrad_update": (c_int, [c_void_p, c_void_p, _kept, _view]),
    "sebp_meprop_gradient": (c_int, [c_void_p, _view, _view, c_void_p, _linear_options, _kept]),
    "sebp_sampled_product": (c_int, [c_void_p, _view, _view, c_void_p, _linear_options, _kept]),
    "sebp_adamw_step": (
        c_int,
        [c_void_p, _view, c_int64, _adamw_options, _view, _view, _view],
    ),
    "sebp_weight_decay": (c_int, [c_void_p, _adamw_options, _view]),
    "sebp_stochastic_add": (c_int, [c_void_p, _view, POINTER(StochasticOptions), _view]),
    "sebp_sparse_adamw_create": (c_int, [c_int64, c_int64, c_void_p, c_int64, POINTER(c_void_p)]),
    "sebp_sparse_adamw_destroy": (None, [c_void_p]),
    "sebp_sparse_adamw_step": (c_int, [c_void_p, c_void_p, _adamw_options, _kept]),
    "sebp_sparse_adamw_count": (c_int64, [c_void_p]),
    "sebp_sparse_adamw_steps": (c_int64, [c_void_p]),
    "sebp_sparse_adamw_support": (c_void_p, [c_void_p]),
    "sebp_sparse_adamw_bytes": (c_int64, [c_void_p]),
    "sebp_sparse_adamw_export": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p]),
    "sebp_sparse_adamw_import": (
        c_int,
        [c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64],
    ),
    "sebp_sparse_adamw_drop_unused": (c_int, [c_void_p]),
    "sebp_sparse_adamw_export_used": (c_int, [c_void_p, c_void_p]),
    "sebp_sparse_adamw_import_used": (c_int, [c_void_p, c_void_p, c_int64]),
    "sebp_lora_merge": (c_int, [c_void_p, _view, _view, c_double, _view]),
}


class LibraryNotFoundError(ImportError):
    """libsebp is nowhere that it was looked for, or does not load."""


class LibraryMismatchError(ImportError):
    """The libsebp found is not the one this package was written for."""


def _source_tree() -> Path | None:
    """Find the C sources around the package, which it has in a checkout, a release or an sdist.

    Where it is installed, what happens to lie in the folders around it is none of its business.
    """
    project = Path(__file__).resolve().parent.parent
    for tree in (project.parent, project / "libsebp"):
        if (tree / "configure.ac").is_file() and (tree / "include/sebp/sebp.h").is_file():
            return tree
    return None


def _builds(tree: Path) -> list[Path]:
    """List the libraries built in the source tree and its folders build*, the newest first."""
    found = [folder / ".libs" / NAME for folder in (tree, *tree.glob("build*"))]
    return sorted((file for file in found if file.is_file()), key=_time, reverse=True)


def _time(file: Path) -> int:
    return file.stat().st_mtime_ns


def _newer_source(tree: Path, library: Path) -> Path | None:
    """Find a source of the library that was changed after the library was built."""
    built = _time(library)
    sources = (
        file for part in ("include", "lib", "simd") for file in (tree / part).rglob("*.[ch]")
    )
    return next((file for file in sources if _time(file) > built), None)


def _places() -> Iterator[tuple[str, str]]:
    """Name the files to try, best first, each with where that is."""
    chosen = os.environ.get("SEBP_LIBRARY")
    if chosen:
        yield chosen, "SEBP_LIBRARY"
        return
    yield str(Path(__file__).resolve().parent / "lib" / NAME), _OWN
    tree = _source_tree()
    if tree is not None:
        builds = _builds(tree)
        yield from ((str(file), _BUILT) for file in builds)
        if not builds:
            yield str(tree / ".libs" / NAME), "the source tree, or a folder build* in it"
    yield NAME, "the system's loader"


def share_openmp() -> bool:
    """Load the OpenMP runtime that PyTorch brings along, before anything asks for another.

    PyTorch's wheels carry a libgomp of their own, some under a name of its own. Loaded first, and
    with its symbols visible to all, it is the one that libsebp and its oneDNN are bound to, so that
    one pool of threads serves both, whichever is imported first.

    Returns
    -------
    bool
        Whether PyTorch brings one.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    package = Path(spec.origin).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for runtime in sorted(folder.glob("libgomp*.so*")):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
            return True
    return False


def brings_llvm_openmp(library: ctypes.CDLL) -> bool:
    """Return whether the library is linked with LLVM's OpenMP runtime, which is also Intel's.

    Its code then calls what GNU's does not have, and cannot share PyTorch's pool of threads.

    Returns
    -------
    bool
        Whether the library's dependencies have such a function.
    """
    return hasattr(library, "__kmpc_fork_call")


def _check_version(library: ctypes.CDLL, path: str) -> None:
    """Raise unless the library's version goes with this package's: same major and minor."""
    try:
        for name, (restype, argtypes) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype = restype
            function.argtypes = argtypes
    except AttributeError as error:
        raise LibraryMismatchError(f"{path} is no libsebp {__version__}: {error}") from None
    version = library.sebp_version().decode()
    if version.split(".")[:2] != __version__.split(".")[:2]:
        raise LibraryMismatchError(
            f"{path} is libsebp {version}, but this package needs {__version__}.\n{_HOW_TO_BUILD}"
        )


def _warn_if_stale(path: str) -> None:
    """Warn if a library of the source tree was built before its sources were changed."""
    tree = _source_tree()
    newer = _newer_source(tree, Path(path))
    if newer is not None:
        warnings.warn(
            f"{path} is older than {newer.relative_to(tree)}: build it again (make, or "
            "pip install --editable ./python).",
            RuntimeWarning,
            stacklevel=3,
        )


@functools.cache
def load() -> ctypes.CDLL:
    """Load libsebp; once, then the same again.

    Warns (RuntimeWarning) where it will not share PyTorch's pool of threads, and where a source
    tree's library is older than its sources.

    Returns
    -------
    ctypes.CDLL
        The library, its functions declared.

    Raises
    ------
    LibraryNotFoundError
        If no place has it, or if the package's own copy does not load: another one is not taken in
        its place. The message lists the places and how to build it.
    LibraryMismatchError
        If its version or its functions are not those of this package.
    """
    tried = []
    for path, where in _places():
        if "/" in path and not Path(path).exists():
            tried.append(f"{path} ({where}): no such file")
            continue
        torch_is_gnu = share_openmp()
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            tried.append(f"{path} ({where}): {error}")
            if where == _OWN:
                break
            continue
        _check_version(library, path)
        if _is_forked:
            library.sebp_after_fork()
        if torch_is_gnu and brings_llvm_openmp(library):
            warnings.warn(TWO_POOLS, RuntimeWarning, stacklevel=2)
        if where == _BUILT:
            _warn_if_stale(path)
        return library
    places = "".join(f"\n    {line}" for line in tried)
    raise LibraryNotFoundError(f"libsebp was not found. Looked at:{places}\n{_HOW_TO_BUILD}")


def mapped_files(*names: str) -> list[str]:
    """List the files that this process has mapped whose names begin like one of `names`.

    Returns
    -------
    list of str
        Their paths, sorted; empty where ``/proc`` does not tell.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    return sorted(file for file in files if Path(file).name.startswith(names))


def openmp_runtimes() -> list[str]:
    """List the OpenMP runtimes that this process has loaded.

    A second one, the system's libgomp, does no harm beside a copy of PyTorch's that has a name of
    its own: the loader brings it along as libsebp names it, and nothing calls it.
    ``python3 -m sebp`` tells how many pools of threads there are.

    Returns
    -------
    list of str
        Paths of libgomp, libomp and libiomp5; empty where ``/proc`` does not tell.
    """
    return mapped_files("libgomp", "libomp", "libiomp")
