# SPDX-License-Identifier: Apache-2.0
"""The programs that a build needs: finding them, running them, and what to install without them."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

COMPILER = "a C compiler"
MAKE = "make"
AUTOTOOLS = "autoconf, automake, libtool and pkg-config"

# For each package manager: whose it is, the names in os-release, the command, and its packages.
_MANAGERS = {
    "Debian, Ubuntu": (
        {"debian", "ubuntu"},
        "sudo apt-get install",
        {
            COMPILER: "gcc libc6-dev",
            MAKE: "make",
            AUTOTOOLS: "autoconf automake libtool pkg-config",
        },
    ),
    "Fedora, RHEL": (
        {"fedora", "rhel", "centos"},
        "sudo dnf install",
        {
            COMPILER: "gcc glibc-devel",
            MAKE: "make",
            AUTOTOOLS: "autoconf automake libtool pkgconf-pkg-config",
        },
    ),
    "openSUSE": (
        {"suse", "opensuse"},
        "sudo zypper install",
        {COMPILER: "gcc", MAKE: "make", AUTOTOOLS: "autoconf automake libtool pkg-config"},
    ),
    "Arch": (
        {"arch"},
        "sudo pacman -S",
        {COMPILER: "gcc", MAKE: "make", AUTOTOOLS: "autoconf automake libtool pkgconf"},
    ),
    "Alpine": (
        {"alpine"},
        "sudo apk add",
        {
            COMPILER: "gcc musl-dev linux-headers",
            MAKE: "make",
            AUTOTOOLS: "autoconf automake libtool pkgconf",
        },
    ),
}


class BuildError(Exception):
    """The library cannot be built; the message is for the one who installs."""


def _distribution(release: Path) -> set[str]:
    """Return the names that os-release gives this system: its own, then those it is like."""
    if not release.is_file():
        return set()
    fields = dict(line.split("=", 1) for line in release.read_text().splitlines() if "=" in line)
    names = " ".join(fields.get(key, "").strip("\"'") for key in ("ID", "ID_LIKE"))
    return {name.split("-")[0] for name in names.split()}


def how_to_install(needs: Iterable[str], release: Path = Path("/etc/os-release")) -> str:
    """Say which packages hold what is missing.

    Parameters
    ----------
    needs : iterable of str
        Of `COMPILER`, `MAKE` and `AUTOTOOLS`.
    release : Path
        The file that tells the distribution.

    Returns
    -------
    str
        A command for this distribution; where it is not known, one for each that is.
    """
    needs = list(needs)
    names = _distribution(release)
    lines = {
        title: f"{command} {' '.join(packages[need] for need in needs)}"
        for title, (_, command, packages) in _MANAGERS.items()
    }
    here = [title for title, (ids, _, _) in _MANAGERS.items() if ids & names]
    if here:
        return f"    {lines[here[0]]}"
    return "\n".join(f"    {line}    # {title}" for title, line in lines.items())


def excerpt(lines: list[str]) -> str:
    """Pick from a program's output what tells why it failed: its errors, and how it ended.

    Returns
    -------
    str
        At most 32 lines, indented.
    """
    last = max(0, len(lines) - 20)
    errors = [line for line in lines[:last] if re.search(r"\berror\b", line, re.IGNORECASE)]
    chosen = [*errors[:12], *lines[last:]]
    return "\n".join(f"    {line}" for line in chosen)


def run(what: str, command: list[str], folder: Path, environment: Mapping[str, str]) -> list[str]:
    """Run a program, and show its output as it comes; ``pip install -v`` lets it be seen.

    Parameters
    ----------
    what : str
        What the program does, for the message: "configure".
    command : list of str
        The program and its arguments.
    folder : Path
        Where it runs.
    environment : mapping of str to str
        Its environment.

    Returns
    -------
    list of str
        The lines of its output and errors.

    Raises
    ------
    BuildError
        If it cannot be run or fails.
    """
    print(f"sebp: {shlex.join(command)}", flush=True)
    lines = []
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{what} failed: {error}") from None
    with process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    if process.returncode != 0:
        raise BuildError(
            f"{what} failed with exit status {process.returncode}:\n{excerpt(lines)}\n"
            f"The command was: {shlex.join(command)}"
        )
    return lines


def _which(name: str, environment: Mapping[str, str]) -> str | None:
    return shutil.which(name, path=environment.get("PATH", os.defpath))


def _find(
    variable: str, usual: tuple[str, ...], environment: Mapping[str, str]
) -> list[str] | None:
    """Find the command that a variable names, or else the first of the usual ones that is there."""
    chosen = shlex.split(environment.get(variable, ""))
    names = chosen[:1] or usual
    found = [name for name in names if _which(name, environment) is not None]
    return [found[0], *chosen[1:]] if found else None


def find_make(environment: Mapping[str, str]) -> list[str] | None:
    """Find make: what ``MAKE`` names, or one on ``PATH``.

    Returns
    -------
    list of str or None
        The command.
    """
    return _find("MAKE", ("make", "gmake"), environment)


def find_compiler(environment: Mapping[str, str]) -> list[str] | None:
    """Find the C compiler: what ``CC`` names, or gcc, cc or clang.

    Returns
    -------
    list of str or None
        The command.
    """
    return _find("CC", ("gcc", "cc", "clang"), environment)


def has_autotools(environment: Mapping[str, str]) -> bool:
    """Tell whether the programs that make configure are installed.

    Returns
    -------
    bool
        Whether all of them are on ``PATH``.
    """
    tools = ("autoreconf", "aclocal", "automake", "libtoolize", "pkg-config")
    return all(_which(tool, environment) is not None for tool in tools)


def compiles(
    compiler: list[str],
    flags: list[str],
    program: str,
    folder: Path,
    environment: Mapping[str, str],
    last: Iterable[str] = (),
) -> tuple[bool, str]:
    """Compile and link a program with some flags, which is not run.

    Returns
    -------
    tuple of bool and str
        Whether that succeeds, and all that the compiler says.
    """
    source = folder / "try.c"
    source.write_text(program)
    done = subprocess.run(
        [*compiler, *flags, "-o", str(folder / "try.out"), str(source), *last],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode == 0, done.stdout


def require_compiler_and_make(
    folder: Path, environment: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Find the compiler and make, and see that the compiler makes a program.

    Parameters
    ----------
    folder : Path
        A folder to write to.
    environment : mapping of str to str
        ``PATH``, ``CC``, ``CFLAGS``, ``CPPFLAGS``, ``LDFLAGS`` and ``MAKE`` are read.

    Returns
    -------
    tuple of two lists of str
        The commands: the compiler's and make's.

    Raises
    ------
    BuildError
        If one of them is missing, or the compiler does not work. The message names packages.
    """
    compiler, make = find_compiler(environment), find_make(environment)
    missing = [need for need, found in ((COMPILER, compiler), (MAKE, make)) if found is None]
    if missing:
        named = "".join(
            f"\n{name}={environment[name]!r} names a program that is not there."
            for name, found in (("CC", compiler), ("MAKE", make))
            if found is None and environment.get(name)
        )
        raise BuildError(
            f"libsebp is built from its C sources, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing.{named} Install\n"
            f"{how_to_install(missing)}\nand try again."
        )
    names = ("CPPFLAGS", "CFLAGS", "LDFLAGS")
    flags = [flag for name in names for flag in shlex.split(environment.get(name, ""))]
    program = '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n'
    works, said = compiles(compiler, flags, program, folder, environment)
    if not works:
        raise BuildError(
            f"{shlex.join([*compiler, *flags])} does not make a program:\n"
            f"{excerpt(said.splitlines())}\n"
            "If the headers of the C library are missing, install\n"
            f"{how_to_install([COMPILER])}\n"
            "If CC, CPPFLAGS, CFLAGS or LDFLAGS are set, see that the compiler takes them."
        )
    return compiler, make
