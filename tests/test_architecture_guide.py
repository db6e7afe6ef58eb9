"""`docs/ARCHITECTURE.md`: what it names exists, what it draws is true, its examples run."""

import ast
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2.checkpoint import store
from source_tree import FLOORS, NAMES, SOURCE, own_imports, tree_of
from support import ROOT, run_command

TEXT = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
BLOCKS: list[str] = re.findall(r"^```python\n(.+?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.+?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
TRAINING = """
architecture = "bigram"
optimizer = "sgd"
data_root = "data/python_topics"
n_embd = 16
block_size = 32
total_batch_size = 128
mini_batch_size = 4
max_steps = 2
eval_batches = 2
device = "cpu"
"""


def path_of(text: str) -> Path:
    """A path on the page: below `src/gpt2`, or below the repository."""
    return next((base / text for base in (SOURCE, ROOT) if (base / text).exists()), SOURCE / text)


def is_defined(path: Path, dotted: str) -> bool:
    """Whether a file defines a function, class or constant, or a class in it a method."""
    body: list[ast.stmt] = tree_of(path).body
    for name in dotted.split("."):
        found = [node for node in body if name in names_of(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_files_and_names_exist():
    named = re.findall(r"`([\w./]+/[\w.]+\.py)(?:: ([\w.]+))?`", PROSE)
    assert len(named) > 60
    for file, name in named:
        assert path_of(file).is_file(), file
        assert not name or is_defined(path_of(file), name), f"{file}: {name}"
    for link in re.findall(r"\]\((\S+?)\)", PROSE):
        assert (ROOT / "docs" / link).exists(), link


def test_the_table_has_the_floors():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|.*\| `(\S+)` \|$", TEXT, flags=re.MULTILINE)
    floors = [{name for floor, name, _ in rows if int(floor) == level} for level in range(1, 12)]
    assert floors == [set(floor) for floor in FLOORS]
    for _, folder, first in rows:
        assert first.startswith(f"{folder}/")


def test_the_drawing_has_the_imports():
    """An arrow for every import of a folder that does not follow from the other arrows."""
    drawn: set[tuple[str, str]] = set()
    for line in TEXT.partition("flowchart TD\n")[2].partition("```")[0].splitlines():
        groups = [part.split(" & ") for part in line.strip().split(" --> ")]
        for upper, lower in itertools.pairwise(groups):
            drawn |= {(one, other) for one in upper for other in lower}
    imported = {
        (name.split(".")[0], other.split(".")[0])
        for name, path in NAMES.items()
        for other in own_imports(path)
        if name.split(".")[0] != other.split(".")[0]
    }
    assert drawn <= imported
    assert closure(drawn) >= imported
    for arrow in drawn:
        assert arrow not in closure(drawn - {arrow}), f"{arrow} follows from the other arrows"


def closure(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """All pairs that a path of arrows connects."""
    found = set(arrows)
    while more := {(a, d) for a, b in found for c, d in found if b == c} - found:
        found |= more
    return found


def test_the_page_is_short():
    assert TEXT.count("\n") <= 400


def new_files() -> Iterator[tuple[str, str]]:
    for block in BLOCKS:
        heading, _, code = block.partition("\n")
        if found := re.fullmatch(r"# (src/gpt2/\w+/\w+\.py)", heading):
            yield found[1], code


def entries() -> Iterator[tuple[str, str, str]]:
    """The file, the table, and the lines to add: imports first."""
    for block in BLOCKS:
        heading, _, lines = block.partition("\n")
        if found := re.fullmatch(r"# entry in (src/gpt2/\w+/\w+\.py): ([A-Z]+)", heading):
            yield found[1], found[2], lines


def with_entry(source: str, table: str, added: str) -> str:
    """`source` with an entry at the end of a table, and its imports before the other ones."""
    imports = [line for line in added.splitlines() if line.startswith(("from ", "import "))]
    entry = [line for line in added.splitlines() if line not in imports]
    lines, tree = source.splitlines(), ast.parse(source)
    value = next(node.value for node in tree.body if table in names_of(node))  # type: ignore[attr-defined]
    if isinstance(value, ast.DictComp):
        value = value.generators[0].iter
    lines[value.end_lineno - 1 : value.end_lineno - 1] = entry
    first = next(number for number, line in enumerate(lines) if line.startswith("from gpt2"))
    lines[first:first] = imports
    return "\n".join(lines) + "\n"


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A folder with a copy of the package in `src`, to which the examples are added."""
    folder = tmp_path / "extended"
    shutil.copytree(SOURCE, folder / "src/gpt2", ignore=shutil.ignore_patterns("__pycache__"))
    for name, code in new_files():
        assert not (folder / name).exists()
        (folder / name).write_text(code)
    for name, table, added in entries():
        path = folder / name
        path.write_text(with_entry(path.read_text(), table, added))
    return folder


RUN = f"""
import sys

if __name__ == "__main__":
    import pytest

    from gpt2.cli import main

    folder = "checkpoints/series/small"
    tests = sys.argv[1:]
    for command in ("series --slots 1", f"evaluate --tasks agreement --checkpoint_dir {{folder}}"):
        sys.argv = ["gpt2", *command.split()]
        assert main.main() == 0, command
    sys.exit(pytest.main(["--rootdir", "{ROOT}", "-c", "{ROOT}/pyproject.toml", *tests]))
"""
"""Both commands and the tests in one process: torch takes seconds to import."""
WITHOUT_REWRITE = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""the commands have imported a plugin before pytest could look at it"""


def test_the_examples_work(extended: Path):
    """A training of the new job source has the new architecture, optimiser, corpus and sink; the
    new task measures its model; the tests of every entry pass for the new ones."""
    assert len(list(new_files())) == len(list(entries())) == 6
    (extended / "configs").mkdir()
    (extended / "configs" / "small.toml").write_text(TRAINING)
    (extended / "run.py").write_text(RUN)
    tests = [*(ROOT / "tests/model").glob("test_*.py"), *(ROOT / "tests/optim").glob("test_*.py")]
    of_entries = [path for path in tests if re.search("ARCHITECTURES|OPTIMIZERS", path.read_text())]
    chosen = [*map(str, of_entries), "-k", "bigram or sgd", "-vv", "-p", "no:cacheprovider"]
    chosen += WITHOUT_REWRITE
    search = os.pathsep.join([str(extended / "src"), str(ROOT / "tests")])
    done = run_command(
        [sys.executable, "run.py", *chosen], extended, PYTHONPATH=search, CUDA_VISIBLE_DEVICES=""
    )

    assert done.stdout.startswith("small finished {'step': 2"), done.stderr
    run = extended / "checkpoints/series/small"
    steps = [line.partition(",")[0] for line in (run / "losses.csv").read_text().splitlines()]
    assert steps == ["1", "2"]
    config = store.load(run / "step_000002.pt")["config"]
    assert config["model"]["architecture"] == "bigram"
    assert config["optim"]["optimizer"] == "sgd"
    assert "sample 3" in (run / "log.txt").read_text()
    manifest = json.loads((extended / "data/python_topics/manifest.json").read_text())
    assert manifest["corpus"] == "python_topics"

    results = json.loads((extended / "results.json").read_text())["results"]
    assert results["agreement"]["of"] == "2 texts" and "agreement" in done.stdout
    assert results["agreement"]["acc"] in (0, 0.5, 1)

    assert "test_dropout[bigram] PASSED" in done.stdout and "sgd" in done.stdout
