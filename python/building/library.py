# SPDX-License-Identifier: Apache-2.0
"""Builds libsebp, or takes one that is there, as the environment says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .plain import build_plainly
from .programs import BuildError, require_compiler_and_make, run
from .sources import bootstrap, copy_sources, find_tree, has_configure

NAME = "libsebp.so.0"

# Loads what is named, by a process of its own, and prints its version.
_LOAD = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.sebp_version.restype = ctypes.c_char_p
missing = [name for name in sys.argv[2:] if not hasattr(library, name)]
print(library.sebp_version().decode(), *missing)
"""
_USER = Path(__file__).resolve().parent.parent / "sebp" / "_library.py"


def wants_system_library(environment: Mapping[str, str]) -> bool:
    """Tell whether the package is to use a libsebp that is installed already.

    Returns
    -------
    bool
        Whether ``SEBP_SYSTEM_LIBRARY`` says so.

    Raises
    ------
    BuildError
        If it is neither empty nor 0 nor 1.
    """
    value = environment.get("SEBP_SYSTEM_LIBRARY", "")
    if value not in ("", "0", "1"):
        raise BuildError(f"SEBP_SYSTEM_LIBRARY={value!r} is neither 0 nor 1")
    if value == "1" and environment.get("SEBP_BUILD"):
        raise BuildError("SEBP_SYSTEM_LIBRARY=1 and SEBP_BUILD exclude each other")
    return value == "1"


def check_library(library: str, version: str, advice: str) -> None:
    """See that a library loads, and is what the package needs.

    That is its version, the same major and minor, with all the functions that it calls.

    Raises
    ------
    BuildError
        If not; `advice` ends the message.
    """
    names = re.findall(r'^    "(sebp_\w+)": \(', _USER.read_text(), re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, library, *names], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1]
        raise BuildError(f"{library} does not load: {reason}\n{advice}")
    found, *missing = done.stdout.split()
    if missing:
        raise BuildError(f"{library} is of an older state: it has no {missing[0]}.\n{advice}")
    if found.split(".")[:2] != version.split(".")[:2]:
        raise BuildError(f"{library} is libsebp {found}, but this is sebp {version}.\n{advice}")
    print(f"sebp: {library} is libsebp {found}", flush=True)


def _jobs(environment: Mapping[str, str]) -> list[str]:
    """Return make's option for as many processes as there are CPUs, unless the builder has one."""
    if environment.get("MAKEFLAGS"):
        return []
    return [f"-j{len(os.sched_getaffinity(0))}"]


def _configure_and_make(
    sources: Path,
    folder: Path,
    commands: tuple[list[str], list[str]],
    flags: list[str],
    environment: Mapping[str, str],
) -> list[str]:
    """Build by configure and make; return configure's summary."""
    compiler, make = commands
    environment = {
        "CFLAGS": "-O3",
        **environment,
        "CC": shlex.join(compiler),
        # The library calls itself, whatever libsebp the process has beside it.
        "LDFLAGS": f"-Wl,-Bsymbolic {environment.get('LDFLAGS', '')}".strip(),
    }
    own = ["--disable-static", "--disable-dependency-tracking", "--without-check"]
    lines = run("configure", [str(sources / "configure"), *own, *flags], folder, environment)
    run("make", [*make, *_jobs(environment), "libsebp.la"], folder, environment)
    parts = ("compiler ", "kernels ", "OpenMP ", "oneDNN ", "hwloc ", "LAPACK ")
    return [line.strip() for line in lines if line.strip().startswith(parts)]


def _make_configure(sources: Path, environment: Mapping[str, str]) -> str | None:
    """Make configure in a copy of the sources; return why it cannot be made, else None."""
    try:
        bootstrap(sources, environment)
    except BuildError as error:
        return str(error)
    return None


def build(project: Path, work: Path, version: str, environment: Mapping[str, str]) -> Path:
    """Get the library that the package is to carry.

    By default it is built from the C sources, in `work`: by configure and make, after autoreconf
    where there is no configure; where the programs for that are missing, by the compiler and make
    alone, without oneDNN, hwloc and LAPACK.

    Parameters
    ----------
    project : Path
        The folder of setup.py.
    work : Path
        An empty folder, in which all is built.
    version : str
        The package's version.
    environment : mapping of str to str
        ``SEBP_BUILD`` names a folder in which make has built the library: it is taken from there.
        ``SEBP_CONFIGURE_FLAGS`` are handed to configure. ``CC``, ``CFLAGS`` and the like serve as
        they do for configure.

    Returns
    -------
    Path
        The shared library.

    Raises
    ------
    BuildError
        If it cannot be built, does not load, or is of another version.
    """
    flags = shlex.split(environment.get("SEBP_CONFIGURE_FLAGS", ""))
    made = environment.get("SEBP_BUILD")
    if made:
        library = Path(made).resolve() / ".libs" / NAME
        if not library.is_file():
            raise BuildError(f"SEBP_BUILD={made}, but there is no {library}: run make there first")
        check_library(str(library), version, "Run make in that folder again.")
        return library

    tree = find_tree(project)
    folder = work / "build"
    folder.mkdir()
    commands = require_compiler_and_make(folder, environment)
    sources = work / "sources"
    copy_sources(tree, sources)
    obstacle = None if has_configure(tree) else _make_configure(sources, environment)
    if obstacle is None:
        summary = _configure_and_make(sources, folder, commands, flags, environment)
    elif flags:
        raise BuildError(
            f"SEBP_CONFIGURE_FLAGS is set, but there is no configure: {obstacle}\n"
            "Install what is missing and try again, or do without these flags."
        )
    else:
        summary = build_plainly(sources, folder, NAME, commands, _jobs(environment), environment)
        summary += ["To have these used where they are installed:", *obstacle.splitlines()]
    library = folder / ".libs" / NAME
    if not library.is_file():
        raise BuildError(f"The build has made no {NAME}; see its output above")
    check_library(str(library), version, "It was built just now; see the output above.")
    print("sebp: libsebp was built\n" + "\n".join(f"    {line}" for line in summary), flush=True)
    return library


def keep(library: Path, target: Path) -> None:
    """Copy the library, following links, into a folder that is made."""
    target.mkdir(parents=True, exist_ok=True)
    new = target / f"{NAME}.new"
    shutil.copyfile(library, new)
    # A process that has the old one mapped keeps it.
    new.replace(target / NAME)
