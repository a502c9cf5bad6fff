# SPDX-License-Identifier: Apache-2.0
"""The C sources: where they are, what of them a build takes, and their configure."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from .programs import AUTOTOOLS, BuildError, has_autotools, how_to_install, run

# What the package's own sdist has them in, beside setup.py. In a checkout they are around python/.
FOLDER = "libsebp"

_FOLDERS = ("build-aux", "include", "lib", "m4", "simd")
_FILES = (
    "LICENSE",
    "Makefile.am",
    "Makefile.in",
    "aclocal.m4",
    "bootstrap",
    "config.h.in",
    "configure",
    "configure.ac",
    "sebp.pc.in",
)
_GENERATED = ("Makefile.in", "aclocal.m4", "config.h.in", "configure")
# What a build in the source tree leaves there.
_BUILT = shutil.ignore_patterns(
    "*.o", "*.lo", "*.la", ".libs", ".deps", ".dirstamp", "version.h", "__pycache__", "*~"
)


def find_tree(project: Path) -> Path:
    """Find the C sources of a project: its own copy of them, or the checkout that it is part of.

    Parameters
    ----------
    project : Path
        The folder of setup.py.

    Returns
    -------
    Path
        The folder of configure.ac.

    Raises
    ------
    BuildError
        If there are none.
    """
    for tree in (project / FOLDER, project.parent):
        if (tree / "configure.ac").is_file() and (tree / "include/sebp/sebp.h").is_file():
            return tree
    raise BuildError(
        f"The C sources of libsebp are neither in {project / FOLDER} nor in {project.parent}.\n"
        "Install from a whole checkout, release or sdist; or install libsebp first and set "
        "SEBP_SYSTEM_LIBRARY=1."
    )


def copy_sources(tree: Path, target: Path) -> None:
    """Copy what a build of the library takes, all of one time.

    pip unpacks files without their times, or in any order. With one time for all of them make never
    thinks that configure is older than what it is made of.
    """
    target.mkdir(parents=True)
    for name in _FOLDERS:
        if (tree / name).is_dir():
            shutil.copytree(tree / name, target / name, ignore=_BUILT)
    for name in _FILES:
        if (tree / name).is_file():
            shutil.copy2(tree / name, target / name)
    set_times(target)


def set_times(folder: Path) -> None:
    """Give all files of a folder the time that configure.ac has."""
    time = (folder / "configure.ac").stat().st_mtime_ns
    for file in folder.rglob("*"):
        if file.is_file():
            os.utime(file, ns=(time, time))


def has_configure(tree: Path) -> bool:
    """Tell whether configure is there, and not older than what it is made of.

    Of an sdist's own copy all files came at once, and their times say nothing.

    Returns
    -------
    bool
        Whether it can be used as it is.
    """
    if not all((tree / name).is_file() for name in _GENERATED) or not (tree / "build-aux").is_dir():
        return False
    if tree.name == FOLDER and (tree.parent / "PKG-INFO").is_file():
        return True
    made = min((tree / name).stat().st_mtime_ns for name in ("configure", "Makefile.in"))
    inputs = [tree / "configure.ac", tree / "Makefile.am", *tree.glob("m4/sebp_*.m4")]
    return all(file.stat().st_mtime_ns <= made for file in inputs)


def bootstrap(sources: Path, environment: Mapping[str, str]) -> None:
    """Make configure in a copy of the sources.

    Raises
    ------
    BuildError
        If the programs that make it are missing, or fail.
    """
    if not has_autotools(environment):
        raise BuildError(
            f"{AUTOTOOLS}, which make configure, are not all installed. Install\n"
            f"{how_to_install([AUTOTOOLS])}\nand try again."
        )
    run("autoreconf", ["sh", "./bootstrap", "--no-configure"], sources, environment)
    shutil.rmtree(sources / "autom4te.cache", ignore_errors=True)
    set_times(sources)


def add_to_sdist(tree: Path, release: Path, environment: Mapping[str, str]) -> None:
    """Put the C sources into an sdist's folder, with a configure, so that gcc and make do.

    Raises
    ------
    BuildError
        If there is no configure and none can be made.
    """
    target = release / FOLDER
    fresh = has_configure(tree)
    copy_sources(tree, target)
    if not fresh:
        bootstrap(target, environment)
