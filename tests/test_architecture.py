"""The house: a folder imports from lower floors only, files never import each other in a circle.

`docs/ARCHITECTURE.md` draws it. Imports inside functions and under TYPE_CHECKING count.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from source_tree import (
    FILES,
    FLOORS,
    NAMES,
    SOURCE,
    modules_imported_by,
    name_of,
    own_imports,
    tree_of,
)

TESTS = Path(__file__).parent
# Inside experiments/: `grid`, `results`, `job_group` and `api` are files, the rest folders.
EXPERIMENT_FLOORS = (
    ("grid", "pool"),
    ("results",),
    ("progress", "training"),
    ("job_group",),
    ("sweep", "compare", "search", "named"),
    ("api",),
)
PURE_FOLDERS = ("config",)
IMPURE = {"os", "time", "socket", "subprocess", "signal", "random", "torch", "sys", "datetime"}
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"}


def floor_of(part: str, floors: tuple[tuple[str, ...], ...]) -> int:
    return next(level for level, parts in enumerate(floors) if part in parts)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_folder_imports_from_lower_floors_only(path: Path):
    folder, *inner = name_of(path).split(".")
    for imported in own_imports(path):
        other, *other_inner = imported.split(".")
        if other != folder:
            assert floor_of(other, FLOORS) < floor_of(folder, FLOORS), f"{path} imports {imported}"
        elif folder == "experiments" and inner and inner[0] != other_inner[0]:
            own_floor = floor_of(inner[0], EXPERIMENT_FLOORS)
            assert floor_of(other_inner[0], EXPERIMENT_FLOORS) < own_floor, (
                f"{path} imports {imported}"
            )


def test_every_folder_has_a_floor():
    folders = {path.relative_to(SOURCE).parts[0] for path in FILES}
    assert folders == {folder for floor in FLOORS for folder in floor}
    assert len(FLOORS) <= 12 and len(folders) + len(list(SOURCE.glob("*.py"))) <= 16


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter({name: set(own_imports(path)) for name, path in NAMES.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_pure_reads_no_clock_file_or_environment(path: Path):
    docstring = ast.get_docstring(tree_of(path)) or ""
    is_pure = name_of(path).split(".")[0] in PURE_FOLDERS
    if is_pure or "Pure." in docstring.split("\n\n")[0]:
        assert not {name.split(".")[0] for name in modules_imported_by(path)} & IMPURE


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_alarm_lengths(path: Path):
    assert path.read_text().count("\n") <= 500, f"{path} is too long"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{path}: {node.name} has {length} lines"


def test_a_module_is_imported_by_its_own_name():
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gpt2"):
                renamed = [alias.name for alias in node.names if alias.asname]
                assert not renamed, f"{path}: {renamed} under another name"


def test_one_file_reads_the_variables_of_torchrun():
    for name, path in NAMES.items():
        if name != "distributed.rendezvous":
            strings = {
                node.value
                for node in ast.walk(tree_of(path))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            assert not strings & TORCHRUN, f"{path} reads {strings & TORCHRUN}"


def test_nothing_imports_a_test_module():
    for path in TESTS.rglob("*.py"):
        for module in modules_imported_by(path):
            assert not module.rpartition(".")[2].startswith("test_"), f"{path} imports {module}"
