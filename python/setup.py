# SPDX-License-Identifier: Apache-2.0
"""Builds libsebp from its C sources and puts it into the package.

README.md says how to steer that.
"""

import os
import runpy
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import SetupError

HERE = Path(__file__).resolve().parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(HERE))

from building.library import (  # noqa: E402
    NAME,
    build,
    check_library,
    keep,
    wants_system_library,
)
from building.programs import BuildError  # noqa: E402
from building.sources import add_to_sdist, find_tree  # noqa: E402

VERSION = runpy.run_path(str(HERE / "sebp" / "_version.py"))["__version__"]
# What setuptools writes goes there, so that the sources stay as they are. An sdist takes the list
# of its files from where they are.
WORK = tempfile.TemporaryDirectory(prefix="sebp-")
OPTIONS = {"build": {"build_base": WORK.name}}
if "sdist" not in sys.argv:
    OPTIONS["egg_info"] = {"egg_base": WORK.name}


class BuildWithLibrary(build_py):
    """Builds the library and puts it beside the modules.

    An editable install has the modules where they are, and so nothing beside them. The library is
    then put into a folder of the sources that git ignores, where the package looks for builds.
    """

    def run(self) -> None:
        """Copy the modules, then build the library, unless one is installed."""
        super().run()
        try:
            self._add_library()
        except BuildError as error:
            raise SetupError(f"sebp was not installed.\n\n{error}\n") from None

    def _add_library(self) -> None:
        if wants_system_library(os.environ):
            check_library(
                NAME,
                VERSION,
                "SEBP_SYSTEM_LIBRARY=1 takes a libsebp that the loader finds. Install one (make "
                "install; ldconfig), or leave the variable out to have one built.",
            )
            return
        with tempfile.TemporaryDirectory(prefix="sebp-build-") as work:
            library = build(HERE, Path(work), VERSION, os.environ)
            if self.editable_mode:
                keep(library, find_tree(HERE) / "build-editable" / ".libs")
            else:
                keep(library, Path(self.build_lib) / "sebp" / "lib")


class SourcesWithLibrary(sdist):
    """Adds the C sources, and a configure made of them, so that gcc and make suffice."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the package's files, then the C sources."""
        super().make_release_tree(base_dir, files)
        try:
            add_to_sdist(find_tree(HERE), Path(base_dir), os.environ)
        except BuildError as error:
            raise SetupError(f"There is no sdist.\n\n{error}\n") from None


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
            Whether it carries the library.
        """
        return os.environ.get("SEBP_SYSTEM_LIBRARY") != "1"


setup(
    cmdclass={
        "bdist_wheel": AnyPython,
        "build_py": BuildWithLibrary,
        "sdist": SourcesWithLibrary,
    },
    distclass=WithLibrary,
    options=OPTIONS,
)
