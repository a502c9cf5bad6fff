# SPDX-License-Identifier: Apache-2.0
"""The folders of ``sebp/torch/`` are layers: each imports from those below it and from no other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "sebp" / "torch"
# From the lowest on, as HACKING.md has them; those in one place do not import from each other.
ORDER = (
    {"common"},
    {"linear_layers"},
    {"blocks"},
    {"attention"},
    {"padding"},
    {"apply"},
    {"sparse", "report"},
    {"masks"},
)
FOLDERS = set().union(*ORDER)


def imported(path, text):
    """List what a file imports of ``sebp.torch``, within functions too, without that prefix."""
    package = path.relative_to(ROOT).parts[:-1]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [name[len("sebp.torch.") :] for name in names if name.startswith("sebp.torch.")]
    return found


def wrong_imports(folder, path, text):
    """List the imports of a file in a folder that are not from the folder itself or from below."""
    place = next(place for place, folders in enumerate(ORDER) if folder in folders)
    allowed = {folder}.union(*ORDER[:place])
    return [name for name in imported(path, text) if name.split(".")[0] not in allowed]


def test_folders_import_from_those_below():
    assert {path.parent.name for path in FOLDER.glob("*/*.py")} == FOLDERS
    count = 0
    for folder in sorted(FOLDERS):
        for path in sorted((FOLDER / folder).glob("*.py")):
            text = path.read_text()
            assert wrong_imports(folder, path, text) == [], path
            count += len(imported(path, text))
    assert count > 100


@pytest.mark.parametrize(
    "text",
    [
        "from ..report import svg",
        "from ..report.svg import Drawing",
        "from .. import prepare",
        "from ..prepare import prepare",
        "from .. import linear",
        "import sebp.torch.report.svg",
        "def f():\n    from sebp.torch.report import svg",
    ],
)
def test_imports_from_above_are_found(text):
    assert len(wrong_imports("sparse", FOLDER / "sparse" / "layer.py", text)) == 1


def test_folders_have_no_name_of_a_function():
    torch = pytest.importorskip("sebp.torch")
    assert not FOLDERS & {*torch.__all__}
