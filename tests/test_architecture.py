"""The floors of the house: a module imports from its own floor or below, never from above."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "gpt2"
FLOORS = [
    (
        "pure",
        {
            "errors",
            "limits",
            "shape",
            "naming",
            "config",
            "tokenizer",
            "published",
            "schedule",
            "data.order",
            "estimate",
            "sampling",
            "experiments.plan",
            "experiments.space",
        },
    ),
    ("torch only", {"model", "optim"}),
    (
        "shell",
        {
            "atomic",
            "data.storage",
            "data.cache",
            "data.formats",
            "data.shards",
            "data.prepare",
            "data.corpora",
            "data.loader",
            "compiled",
            "distributed",
            "failures",
            "integrity",
            "lock",
            "checkpoint",
            "saving",
            "status",
            "metrics",
            "wandb_sink",
            "machine",
            "monitor",
            "plot",
            "tables",
            "evaluation",
            "generate",
            "interchange",
        },
    ),
    (
        "one run",
        {
            "doctor",
            "introduction",
            "judge",
            "learner",
            "named",
            "progress",
            "sinks",
            "start",
            "train",
        },
    ),
    ("many runs", {"experiments"}),
    (
        "entries",
        {
            "__main__",
            "cli",
            "cli_data",
            "cli_evaluate",
            "cli_experiments",
            "cli_generate",
            "cli_model",
            "cli_parse",
            "cli_search",
            "cli_train",
            "cli_watch",
        },
    ),
]
NEEDED_IN_SHELL = {
    "checkpoint": {"atomic", "integrity"},
    "distributed": {"failures"},
    "saving": {"checkpoint", "distributed"},
    "status": {"atomic"},
    "data.shards": {"atomic", "data.corpora", "data.storage", "data.cache", "data.formats"},
    "data.cache": {"data.storage"},
    "data.prepare": {"atomic", "data.shards", "data.corpora", "data.storage", "data.formats"},
    "data.loader": {"data.shards"},
    "evaluation": {"atomic", "distributed", "data.shards"},
    "interchange": {"atomic", "checkpoint"},
    "plot": {"metrics"},
    "wandb_sink": {"metrics"},
    "monitor": {"tables", "checkpoint", "lock", "status", "metrics", "data.shards", "data.storage"},
}
IMPURE = {"os", "time", "socket", "subprocess", "signal", "random", "torch", "sys"}


def room_of(module: str) -> str | None:
    """The room of `gpt2.…`, longest name first: `evaluation.loss` lies in `evaluation`."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if any(name in rooms for _, rooms in FLOORS):
            return name
    return None


def floor_of(room: str) -> int:
    return next(level for level, (_, rooms) in enumerate(FLOORS) if room in rooms)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


MODULES = sorted(SOURCE.rglob("*.py"))
MODULES = [
    path for path in MODULES if path not in (SOURCE / "__init__.py", SOURCE / "data/__init__.py")
]


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_keeps_to_its_floor(path: Path):
    room = room_of(name_of(path))
    assert room is not None, f"{path} has no floor: enter it in FLOORS"
    imported = imports_of(path)
    floor = floor_of(room)
    if floor == 0:
        assert not {name.split(".")[0] for name in imported} & IMPURE
    for name in imported:
        other = room_of(name.removeprefix("gpt2.")) if name.startswith("gpt2.") else None
        if other is None or other == room:
            continue
        assert floor_of(other) <= floor, f"{room} imports {other}, which is above it"
        if FLOORS[floor][0] == FLOORS[floor_of(other)][0] == "shell":
            assert other in NEEDED_IN_SHELL.get(room, set()), f"does {room} need {other}?"


def test_alarm_lengths():
    for path in MODULES:
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"


def test_only_distributed_reads_the_variables_of_torchrun():
    for path in MODULES:
        if name_of(path) != "distributed":
            strings = {
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant)
            }
            assert not strings & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
