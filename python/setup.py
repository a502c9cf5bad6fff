# SPDX-License-Identifier: Apache-2.0
"""Puts a copy of a freshly built libsebp into the package, where there is one.

The library is looked for in ``../.libs`` and in the folder that ``SEBP_BUILD`` names. Without
one the package is pure Python, and finds libsebp when it is imported.
"""

import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NAME = "libsebp.so.0"


def built_library() -> Path | None:
    """Find the library in the build tree.

    Returns
    -------
    Path or None
        The shared library; None if it has not been built.
    """
    here = Path(__file__).resolve().parent
    folders = [here.parent]
    if os.environ.get("SEBP_BUILD"):
        folders.insert(0, Path(os.environ["SEBP_BUILD"]))
    for folder in folders:
        library = folder / ".libs" / NAME
        if library.is_file():
            return library
    return None


class BuildWithLibrary(build_py):
    """Copies the library beside the modules; an editable install uses it where it was built."""

    def run(self) -> None:
        """Build, into an empty folder, then copy."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        library = built_library()
        if library is not None and not self.editable_mode:
            target = Path(self.build_lib) / "sebp" / "lib"
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, target / NAME)


class AnyPython(bdist_wheel):
    """Tags a wheel that carries the library for any Python 3: ctypes loads it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Give the wheel's tag: Python, ABI, platform."""
        return ("py3", "none", super().get_tag()[2])


class WithLibrary(Distribution):
    """Tags the wheel for this platform if it carries the library."""

    def has_ext_modules(self) -> bool:
        """Tell whether the wheel holds compiled code.

        Returns
        -------
        bool
            Whether the library has been built.
        """
        return built_library() is not None


setup(
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": AnyPython},
    distclass=WithLibrary,
)
