# SPDX-License-Identifier: Apache-2.0
"""Private names do not cross files.

A name that begins with an underscore is used in the file that defines it and in no other: not
imported, not read as an attribute, not named in a string for ``getattr`` or ``monkeypatch``. Files
of the package whose names begin with one (``_library.py``) are another matter: all files here may
import them, users do not.

Names that no file here defines are other packages' own (``torch._C``).
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STRING = re.compile(r"(?:\w+\.)*(_\w+)")


def is_private(name):
    """Not so are names with underscores at both ends: Python's own, and ``ctypes``'s."""
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("_")


class Definitions(ast.NodeVisitor):
    """Collects the private names that a file defines, and those of them that others could reach."""

    def __init__(self):
        self.names = set()
        self.reachable = set()
        self.functions = 0

    def add(self, name, reachable):
        if is_private(name):
            self.names.add(name)
            if reachable:
                self.reachable.add(name)

    def visit_FunctionDef(self, node):
        self.add(node.name, not self.functions)
        self.functions += 1
        self.generic_visit(node)
        self.functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node):
        self.add(node.name, not self.functions)
        self.generic_visit(node)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.add(node.id, not self.functions)

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Store) and is_self(node.value):
            self.add(node.attr, True)
        self.generic_visit(node)

    def visit_arg(self, node):
        self.add(node.arg, False)


class Uses(ast.NodeVisitor):
    """Collects the uses of private names that others have defined."""

    def __init__(self, file, definitions, modules):
        self.file = file
        self.own = definitions[file].names
        self.modules = modules
        self.elsewhere = set()
        for other, found in definitions.items():
            if other != file:
                self.elsewhere |= found.reachable
        self.crossings = []

    def cross(self, node, name):
        self.crossings.append(f"{self.file}:{node.lineno}: {name}")

    def visit_ImportFrom(self, node):
        is_ours = node.level > 0 or (node.module or "").split(".")[0] in self.modules
        for alias in node.names:
            if is_ours and is_private(alias.name) and alias.name not in self.modules:
                self.cross(node, alias.name)

    def visit_Attribute(self, node):
        name = node.attr
        # Of another object than self it may be the other file's, even if this one has the same.
        is_own = name in self.own and is_self(node.value)
        if name in self.elsewhere and name not in self.modules and not is_own:
            self.cross(node, name)
        self.generic_visit(node)

    def visit_Constant(self, node):
        if not isinstance(node.value, str):
            return
        match = STRING.fullmatch(node.value)
        if match and match[1] in self.elsewhere - self.own - self.modules:
            self.cross(node, match[1])
        if "import " in node.value:  # a program for another process
            try:
                program = ast.parse(node.value)
            except SyntaxError:
                return
            for inner in ast.walk(program):
                if hasattr(inner, "lineno"):
                    inner.lineno += node.lineno - 1
            self.visit(program)


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def crossings(sources):
    """List the private names that cross files.

    Parameters
    ----------
    sources : dict of str to str
        The text of each file, by its path.
    """
    trees = {file: ast.parse(text) for file, text in sources.items()}
    modules = {part for file in sources for part in Path(file).with_suffix("").parts}
    definitions = defaultdict(Definitions)
    for file, tree in trees.items():
        definitions[file].visit(tree)
    found = []
    for file, tree in trees.items():
        uses = Uses(file, definitions, modules)
        uses.visit(tree)
        found += uses.crossings
    return found


def test_no_private_name_crosses_files():
    files = [ROOT / "setup.py"]
    for folder in ("sebp", "tests", "benchmarks"):
        files += sorted((ROOT / folder).rglob("*.py"))
    files += sorted((ROOT.parent / "tests").glob("*.py"))
    files.remove(Path(__file__).resolve())  # which quotes what it looks for
    sources = {str(file.relative_to(ROOT.parent)): file.read_text() for file in files}
    assert len([file for file in sources if file.startswith("python/sebp/torch/")]) > 10
    assert crossings(sources) == []


OWNER = """
_limit = 3
def _find(): pass
class Rows:
    def __init__(self): self._handle = 1
    def _read(self): return self._handle
"""


@pytest.mark.parametrize(
    "use, name",
    [
        ("from .rows import _limit", "_limit"),
        ("from sebp.rows import Rows, _find", "_find"),
        ("from . import rows\nrows._find()", "_find"),
        ("def f(rows): return rows._handle", "_handle"),
        ("def f(rows): del rows._handle", "_handle"),
        ("class C:\n def __init__(self, rows): self._handle = rows._handle", "_handle"),
        ("class Mine(Rows):\n def f(self): return self._read()", "_read"),
        ("getattr(rows, '_handle')", "_handle"),
        ("patch.setattr('sebp.rows._find', None)", "_find"),
        ("run('from sebp.rows import _find')", "_find"),
        ("run('import sebp\\nsebp.rows._find()')", "_find"),
    ],
)
def test_crossings_are_found(use, name):
    found = crossings({"sebp/rows.py": OWNER, "sebp/user.py": use})
    assert [one.split(": ")[1] for one in found] == [name]
    assert found[0].startswith("sebp/user.py:")


@pytest.mark.parametrize(
    "use",
    [
        "from . import _library\n_library.load()",
        "from ._library import load",
        "import torch\ntorch._C._functorch",
        "from torch import _dynamo",
        "class C:\n def __init__(self): self._handle = 1\n def f(self): return self._handle",
        "def _find(): pass\n_find()",
        "x.__dict__, x._as_parameter_",
        "def f(y, _limit): return _limit",
    ],
)
def test_what_is_no_crossing(use):
    sources = {"sebp/rows.py": OWNER, "sebp/_library.py": "def load(): pass", "sebp/user.py": use}
    assert crossings(sources) == []
