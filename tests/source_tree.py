"""The files of the package, the floors of its folders, and who imports whom."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "gpt2"
# From the ground up. Folders on one floor do not import from each other.
FLOORS = (
    ("base",),
    ("data",),
    ("config",),
    ("model", "distributed", "metrics"),
    ("optim",),
    ("checkpoint", "evaluation"),
    ("inference",),
    ("train",),
    ("inspection",),
    ("experiments",),
    ("cli",),
)

FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE)
NAMES = {
    ".".join(
        part for part in path.relative_to(SOURCE).with_suffix("").parts if part != "__init__"
    ): path
    for path in FILES
}


def name_of(path: Path) -> str:
    return next(name for name, other in NAMES.items() if other == path)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def modules_imported_by(path: Path) -> set[str]:
    """Every module that a file names in an import, as `os` or as `gpt2.folder.file`."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                found.add(dotted if dotted.removeprefix("gpt2.") in NAMES else node.module)
    return found


def own_imports(path: Path) -> Iterator[str]:
    """The files of this package that a file imports: `folder.file`."""
    for module in modules_imported_by(path):
        if module.startswith("gpt2."):
            yield module.removeprefix("gpt2.")
