# SPDX-License-Identifier: Apache-2.0
"""Builds the library with a compiler and make alone, where no configure can be made.

All kernels and OpenMP are in; oneDNN, hwloc and LAPACK are left to configure, which finds them.
What is compiled, and for which instructions, is read from Makefile.am and m4/sebp_isa.m4.
"""

import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .programs import BuildError, compiles, run

_OPENMP = """
#include <omp.h>
#ifndef _OPENMP
#error not OpenMP
#endif
int main(void) { return omp_get_max_threads() < 1; }
"""


@dataclass(frozen=True)
class Tier:
    """A tier of kernels, as m4/sebp_isa.m4 describes it: see SEBP_ISA_TIER there."""

    name: str
    host: str
    flags: list[str]
    header: str
    expression: str


def list_tiers(sources: Path) -> list[Tier]:
    """Read the tiers of kernels from m4/sebp_isa.m4.

    Returns
    -------
    list of Tier
        All but the scalar one, in ascending order.
    """
    text = (sources / "m4/sebp_isa.m4").read_text()
    pattern = (
        r"^SEBP_ISA_TIER\(\[(\w+)\], \[([^\]]*)\],\s*\[([^\]]*)\],\s*\[([^\]]*)\], \[(.*)\]\)$"
    )
    tiers = [
        Tier(name, host, flags.split(), header, expression)
        for name, host, flags, header, expression in re.findall(pattern, text, re.MULTILINE)
    ]
    if len(tiers) != len(re.findall(r"^SEBP_ISA_TIER\(", text, re.MULTILINE)) or not tiers:
        raise BuildError("m4/sebp_isa.m4 is not written as python/building/plain.py reads it")
    return tiers


def list_sources(sources: Path, variable: str) -> list[str]:
    """Read from Makefile.am the C files that a variable lists.

    Returns
    -------
    list of str
        Their paths, from the top of the sources.
    """
    text = (sources / "Makefile.am").read_text()
    found = re.search(rf"^{variable} = ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    files = found[1].replace("\\\n", " ").split() if found else []
    files = [file for file in files if file.endswith(".c")]
    if not files:
        raise BuildError(f"Makefile.am has no list {variable}")
    return files


def read_version(sources: Path) -> list[str]:
    """Read the version from configure.ac.

    Returns
    -------
    list of str
        Major, minor and patch.
    """
    text = (sources / "configure.ac").read_text()
    return [
        re.search(rf"^m4_define\(\[sebp_{part}\], \[(\d+)\]\)$", text, re.MULTILINE)[1]
        for part in ("major", "minor", "patch")
    ]


def _write_headers(sources: Path, folder: Path, tiers: list[Tier]) -> None:
    """Write what configure makes of config.h.in and version.h.in."""
    lines = ["#define _GNU_SOURCE 1"]
    lines += [f"#define SEBP_HAVE_{tier.name.upper()} 1" for tier in tiers]
    (folder / "config.h").write_text("\n".join(lines) + "\n")
    version = read_version(sources)
    text = (sources / "include/sebp/version.h.in").read_text()
    for part, number in zip(("MAJOR", "MINOR", "PATCH"), version, strict=True):
        text = text.replace(f"@SEBP_VERSION_{part}@", number)
    target = folder / "include/sebp/version.h"
    target.parent.mkdir(parents=True)
    target.write_text(text.replace("@PACKAGE_VERSION@", ".".join(version)))


def build_plainly(
    sources: Path,
    folder: Path,
    library: str,
    commands: tuple[list[str], list[str]],
    jobs: list[str],
    environment: Mapping[str, str],
) -> list[str]:
    """Build the shared library.

    Parameters
    ----------
    sources : Path
        The C sources.
    folder : Path
        An empty folder to build in. The library will be in its ``.libs``.
    library : str
        Its name, which is its soname too.
    commands : tuple of two lists of str
        The compiler's and make's.
    jobs : list of str
        Options of make.
    environment : mapping of str to str
        ``CFLAGS``, ``CPPFLAGS`` and ``LDFLAGS`` are read.

    Returns
    -------
    list of str
        A summary, a part a line.

    Raises
    ------
    BuildError
        If it cannot be built.
    """
    compiler, make = commands
    given = {
        name: shlex.split(environment.get(name, "")) for name in ("CFLAGS", "CPPFLAGS", "LDFLAGS")
    }
    optimize = given["CFLAGS"] or ["-O3"]

    def takes(flags: list[str], program: str = "int main(void) { return 0; }\n") -> bool:
        return compiles(compiler, [*flags, *given["CPPFLAGS"]], program, folder, environment)[0]

    def can_compile(tier: Tier) -> bool:
        body = f"(void)({tier.expression}); return 0;"
        program = f"#include <{tier.header}>\nint main(void) {{ {body} }}\n"
        hosts = tier.host.split("|")
        is_host = any(fnmatchcase(platform.machine(), host) for host in hosts)
        return is_host and takes([*tier.flags, *optimize], program)

    if not takes(["-ffp-contract=off"]):
        raise BuildError(
            f"{shlex.join(compiler)} does not take -ffp-contract=off; gcc and clang do"
        )
    tiers = [tier for tier in list_tiers(sources) if can_compile(tier)]
    wide = [flag for flag in ["-mprefer-vector-width=512"] if takes(["-Werror", flag])]
    openmp = ["-fopenmp"] if takes(["-fopenmp"], _OPENMP) else []
    _write_headers(sources, folder, tiers)

    common = [
        "-DHAVE_CONFIG_H",
        *("-I.", f"-I{sources}", f"-I{sources}/include", "-Iinclude"),
        *("-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    ]
    kernels, core = list_sources(sources, "simd_sources"), "libsebp_core_la_SOURCES"
    objects = {f"scalar/{file}": ["-DSEBP_ISA_SCALAR=1"] for file in kernels}
    for tier in tiers:
        own = [f"-DSEBP_ISA_{tier.name.upper()}=1", *tier.flags]
        own += wide if any("avx512" in flag for flag in tier.flags) else []
        objects |= {f"{tier.name}/{file}": own for file in kernels}
    objects |= {f"core/{file}": openmp for file in list_sources(sources, core)}

    rules, names = [], []
    for path, own in objects.items():
        part, file = path.split("/", 1)
        name = f"{part}/{file.replace('/', '_')[:-2]}.o"
        flags = [*common, *own, *given["CPPFLAGS"], *optimize]
        names.append(name)
        rules.append(
            f"{name}:\n\t@echo {name}\n\t@{shlex.join([*compiler, *flags])}"
            f" -c -o $@ {shlex.quote(f'{sources}/{file}')}\n"
        )
        (folder / part).mkdir(exist_ok=True)
    (folder / ".libs").mkdir()
    link = [
        *compiler,
        *("-shared", f"-Wl,-soname,{library}", "-Wl,-Bsymbolic"),
        f"-Wl,--version-script={sources}/lib/libsebp.map",
        *(*optimize, *openmp, *given["LDFLAGS"], "-o", f".libs/{library}"),
    ]
    target = f".libs/{library}: {' '.join(names)}\n\t@echo $@\n"
    target += f"\t@{shlex.join(link)} $^ -lm -lpthread -ldl\n"
    (folder / "Makefile").write_text("\n".join([target, *rules]).replace("$ORIGIN", "$$ORIGIN"))
    run("make", [*make, *jobs], folder, environment)
    return [
        f"compiler        {shlex.join([*compiler, *optimize])}",
        f"kernels         {' '.join(['scalar', *(tier.name for tier in tiers)])}",
        f"OpenMP          {'yes' if openmp else 'no: the compiler has none'}",
        "oneDNN, hwloc, LAPACK   no: there is no configure to find them",
    ]
