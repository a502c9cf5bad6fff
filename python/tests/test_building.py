# SPDX-License-Identifier: Apache-2.0
"""What installing does: with programs that are missing or fail, and which way of building it takes.

The programs are small scripts, so nothing is compiled here; tests/check-package.sh does that.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sebp import __version__, _library

PROJECT = Path(__file__).resolve().parent.parent
# After all else, so that an installed sebp stays the one that is tested.
sys.path.append(str(PROJECT))

from building import library, plain, programs, sources  # noqa: E402


class Machine:
    """A folder of programs, which is the whole PATH, and a tree of C sources."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.tree = folder / "checkout"
        self.project = self.tree / "python"
        self.work = folder / "work"
        for path in (self.bin, self.project, self.work, self.tree / "include/sebp"):
            path.mkdir(parents=True)
        for name in ("configure.ac", "Makefile.am"):
            (self.tree / name).touch()
        (self.tree / "include/sebp/sebp.h").touch()
        self.environment = {"PATH": str(self.bin)}

    def program(self, name: str, body: str) -> None:
        file = self.bin / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    def configure(self, body: str) -> None:
        (self.tree / "build-aux").mkdir()
        for name in ("Makefile.in", "aclocal.m4", "config.h.in", "configure"):
            (self.tree / name).write_text(f"#!/bin/sh\n{body}\n")
            (self.tree / name).chmod(0o755)

    def build(self, **environment: str) -> Path:
        return library.build(
            self.project, self.work, __version__, {**self.environment, **environment}
        )

    def message(self, **environment: str) -> str:
        with pytest.raises(programs.BuildError) as error:
            self.build(**environment)
        return str(error.value)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def debian(tmp_path):
    release = tmp_path / "debian"
    release.write_text('NAME="Raspbian"\nID=raspbian\nID_LIKE="debian"\n')
    return release


def built_library() -> Path:
    """Return the library that the tests run on."""
    return Path(next(iter(_library.mapped_files("libsebp.so")), _library.load()._name))


def test_a_missing_compiler(machine):
    machine.program("make", "exit 0")
    message = machine.message()
    assert "a C compiler is missing" in message
    assert re.search(r"(install|add|-S) .*gcc", message)


def test_a_missing_make(machine):
    machine.program("gcc", "exit 0")
    message = machine.message()
    assert "make is missing" in message
    assert re.search(r"(install|add|-S) make", message)


def test_both_are_missing(machine):
    message = machine.message()
    assert "a C compiler and make are missing" in message
    assert re.search(r"(install|add|-S) gcc.* make\b", message)


def test_a_compiler_that_is_not_there(machine):
    machine.program("gcc", "exit 0")
    machine.program("make", "exit 0")
    assert "CC='icc -m64' names a program" in machine.message(CC="icc -m64")


def test_a_compiler_without_headers(machine):
    machine.program("gcc", "echo 'try.c:1: fatal error: stdio.h: No such file'; exit 1")
    machine.program("make", "exit 0")
    message = machine.message(CFLAGS="-O7")
    assert "gcc -O7 does not make a program" in message
    assert "stdio.h: No such file" in message
    assert "headers of the C library" in message


def test_a_configure_that_fails(machine):
    machine.program("gcc", "exit 0")
    machine.program("make", "exit 0")
    machine.configure("echo 'checking for LAPACK... no'; echo 'error: no LAPACK' >&2; exit 3")
    message = machine.message()
    assert "configure failed with exit status 3" in message
    assert "checking for LAPACK... no\n    error: no LAPACK" in message


def test_a_make_that_fails(machine):
    """Its first error is told, however much comes after it, and how it ended."""
    machine.program("gcc", "exit 0")
    many = "i=0; while [ $i -lt 500 ]; do echo line $i; i=$((i + 1)); done"
    machine.program("make", f"echo 'gemm.c:7: error: no such thing'; {many}; exit 2")
    machine.configure("exit 0")
    message = machine.message()
    assert "make failed with exit status 2" in message
    assert "gemm.c:7: error: no such thing" in message
    assert "line 499" in message
    assert "line 100\n" not in message


def test_a_make_that_makes_nothing(machine):
    machine.program("gcc", "exit 0")
    machine.program("make", "exit 0")
    machine.configure("exit 0")
    assert "has made no libsebp.so.0" in machine.message()


def test_a_library_that_does_not_load(machine):
    machine.program("gcc", "exit 0")
    machine.program("make", "/bin/mkdir .libs; echo text >.libs/libsebp.so.0")
    machine.configure("exit 0")
    assert "does not load" in machine.message()


def test_what_configure_and_make_get(machine):
    machine.program("gcc", "exit 0")
    machine.program(
        "make", f'echo "$@" >made; /bin/mkdir .libs; /bin/cp {built_library()} .libs/libsebp.so.0'
    )
    machine.configure('printf "%s\\n" "$@" "$CC" "$CFLAGS" "$LDFLAGS" >configured')
    before = {file: file.stat().st_mtime_ns for file in machine.tree.rglob("*")}
    made = machine.build(
        SEBP_CONFIGURE_FLAGS="--without-onednn --with-lapack='/a b'", LDFLAGS="-Wl,-z,now"
    )
    assert made.read_bytes() == built_library().read_bytes()
    folder = machine.work / "build"
    lines = (folder / "configured").read_text().splitlines()
    assert lines[-5:] == [
        "--without-onednn",
        "--with-lapack=/a b",
        "gcc",
        "-O3",
        "-Wl,-Bsymbolic -Wl,-z,now",
    ]
    assert "--disable-static" in lines
    jobs = len(os.sched_getaffinity(0))
    assert (folder / "made").read_text() == f"-j{jobs} libsebp.la\n"
    assert {file: file.stat().st_mtime_ns for file in machine.tree.rglob("*")} == before


def test_make_has_flags_of_its_own(machine):
    machine.program("gcc", "exit 0")
    machine.program("make", 'echo "made $@"; exit 1')
    machine.configure("exit 0")
    assert "    made libsebp.la\n" in machine.message(MAKEFLAGS="-j1")


def test_flags_without_a_configure(machine):
    machine.program("gcc", "exit 0")
    machine.program("make", "exit 0")
    message = machine.message(SEBP_CONFIGURE_FLAGS="--without-onednn")
    assert "there is no configure" in message
    assert re.search(r"(install|add|-S) autoconf automake libtool pkg", message)


@pytest.mark.parametrize("autotools", ["none", "too old"])
def test_no_configure_can_be_made(machine, monkeypatch, capsys, autotools):
    """Then the compiler and make do, and what is left out is said."""
    machine.program("gcc", "exit 0")
    machine.program("make", "exit 0")
    if autotools == "too old":
        for name in ("autoreconf", "aclocal", "automake", "libtoolize", "pkg-config"):
            machine.program(name, "exit 0")
        machine.program("sh", "echo 'Autoconf 2.71 or higher is required'; exit 1")

    def build_plainly(sources: Path, folder: Path, name: str, *_: object) -> list[str]:
        (folder / ".libs").mkdir()
        shutil.copyfile(built_library(), folder / ".libs" / name)
        return ["oneDNN, hwloc, LAPACK   no"]

    monkeypatch.setattr(library, "build_plainly", build_plainly)
    machine.build()
    said = capsys.readouterr().out
    assert "oneDNN, hwloc, LAPACK   no" in said
    wanted = "Autoconf 2.71" if autotools == "too old" else "autoconf automake libtool"
    assert wanted in said.split("libsebp was built")[1]


def test_the_plain_build_compiles_what_makefile_am_lists(tmp_path):
    """Every C file of the library once, every kernel once for each tier that the compiler takes."""
    tree = sources.find_tree(PROJECT)
    (tmp_path / "bin").mkdir()
    machine = Machine(tmp_path / "machine")
    machine.program("gcc", "exit 0")
    machine.program("make", "exit 0")
    folder = tmp_path / "build"
    folder.mkdir()
    summary = plain.build_plainly(
        tree, folder, "libsebp.so.0", (["gcc"], ["make"]), [], machine.environment
    )
    text = (folder / "Makefile").read_text()
    compiled = re.findall(r"-c -o \$@ '?(.*?)'?\n", text)
    folders = ("lib", "lib/cpu", "simd")  # the plain build has no CUDA
    listed = {str(file) for part in folders for file in (tree / part).glob("*.c")}
    assert set(compiled) == listed - {str(tree / "lib/cpu/onednn.c")}
    here = summary[1].split()[1:]
    assert here[0] == "scalar"
    for file in compiled:
        assert compiled.count(file) == (len(here) if "/simd/" in file else 1)
    for tier in here:
        assert f"-DSEBP_ISA_{tier.upper()}=1" in text


def test_every_tier_is_read(tmp_path):
    tree = sources.find_tree(PROJECT)
    made = re.findall(r"^if ISA_(\w+)\n", (tree / "Makefile.am").read_text(), re.MULTILINE)
    names = [tier.name for tier in plain.list_tiers(tree)]
    assert names == [name.lower() for name in dict.fromkeys(made)]
    assert ".".join(plain.read_version(tree)) == __version__


def test_a_compiler_that_takes_no_flag(machine, tmp_path):
    """A tier that the compiler does not take is left out; a library without OpenMP is one."""
    tree = sources.find_tree(PROJECT)
    machine.program("make", "exit 0")
    machine.program("gcc", 'case "$*" in *-mavx*|*-mamx*|*-fopenmp*) exit 1 ;; esac')
    folder = tmp_path / "build"
    folder.mkdir()
    summary = plain.build_plainly(
        tree, folder, "libsebp.so.0", (["gcc"], ["make"]), [], machine.environment
    )
    assert summary[1].split()[1:] in (["scalar"], ["scalar", "neon"])
    assert summary[2].split()[1] == "no:"
    assert "-fopenmp" not in (folder / "Makefile").read_text()


def test_configure_is_used_only_if_it_is_newer(machine):
    assert not sources.has_configure(machine.tree)
    machine.configure("exit 0")
    assert sources.has_configure(machine.tree)
    made = (machine.tree / "configure").stat().st_mtime
    os.utime(machine.tree / "configure.ac", (made + 10, made + 10))
    assert not sources.has_configure(machine.tree)
    (machine.tree / "configure").unlink()
    assert not sources.has_configure(machine.tree)


def test_what_is_copied(machine):
    """No file of a build in the tree, and one time for all, as pip keeps none."""
    for name in ("lib/a.c", "lib/a.o", "lib/.libs/a.o", "include/sebp/version.h", "config.status"):
        (machine.tree / name).parent.mkdir(parents=True, exist_ok=True)
        (machine.tree / name).touch()
    os.utime(machine.tree / "lib/a.c", (1, 1))
    target = machine.work / "sources"
    sources.copy_sources(machine.tree, target)
    files = {file for file in target.rglob("*") if file.is_file()}
    names = {str(file.relative_to(target)) for file in files}
    assert names == {"Makefile.am", "configure.ac", "include/sebp/sebp.h", "lib/a.c"}
    assert len({file.stat().st_mtime_ns for file in files}) == 1


def test_no_sources(tmp_path):
    with pytest.raises(programs.BuildError, match="C sources of libsebp are neither in"):
        library.build(tmp_path / "python", tmp_path, __version__, {})


def test_an_sdist_needs_configure(machine, tmp_path):
    with pytest.raises(programs.BuildError, match="make configure, are not all installed"):
        sources.add_to_sdist(machine.tree, tmp_path / "sdist", machine.environment)


def test_sebp_build(machine, tmp_path):
    made = tmp_path / "made"
    assert "run make there first" in machine.message(SEBP_BUILD=str(made))
    (made / ".libs").mkdir(parents=True)
    shutil.copyfile(built_library(), made / ".libs/libsebp.so.0")
    assert machine.build(SEBP_BUILD=str(made)) == made / ".libs/libsebp.so.0"


def test_system_library():
    assert library.wants_system_library({"SEBP_SYSTEM_LIBRARY": "1"})
    for value in ("", "0"):
        assert not library.wants_system_library({"SEBP_SYSTEM_LIBRARY": value})
    with pytest.raises(programs.BuildError, match="neither 0 nor 1"):
        library.wants_system_library({"SEBP_SYSTEM_LIBRARY": "yes"})
    with pytest.raises(programs.BuildError, match="exclude each other"):
        library.wants_system_library({"SEBP_SYSTEM_LIBRARY": "1", "SEBP_BUILD": "."})


def test_versions_are_compared():
    path = str(built_library())
    library.check_library(path, __version__, "")
    with pytest.raises(programs.BuildError, match=f"{__version__}, but this is sebp 9.0.0"):
        library.check_library(path, "9.0.0", "")
    with pytest.raises(programs.BuildError, match="(?s)absent.so.0 does not load.*Install it"):
        library.check_library("absent.so.0", __version__, "Install it")


def test_functions_are_looked_for(tmp_path):
    """A library of an older state has the version, but not all that is called."""
    source = tmp_path / "old.c"
    source.write_text(f'const char *sebp_version(void) {{ return "{__version__}"; }}')
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "old.so", source], check=True)
    with pytest.raises(programs.BuildError, match="(?s)older state: it has no sebp_.*Again"):
        library.check_library(str(tmp_path / "old.so"), __version__, "Again")


def test_packages_of_a_distribution(debian, tmp_path):
    said = programs.how_to_install([programs.COMPILER, programs.MAKE], debian)
    assert said == "    sudo apt-get install gcc libc6-dev make"
    said = programs.how_to_install([programs.MAKE], tmp_path / "absent")
    for command in ("apt-get install", "dnf install", "zypper install", "pacman -S", "apk add"):
        assert f"sudo {command} make    # " in said
