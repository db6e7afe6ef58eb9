import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import store
from gpt2.checkpoint.store import Checkpoint
from gpt2.train import run_identity, trainer
from support import small_config


@pytest.fixture(scope="module")
def first(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints, of steps 2 and 4, of a finished run."""
    out = tmp_path_factory.mktemp("first")
    trainer.run(small_config(data_root, out, **FLAGS))
    return out / "checkpoints"


FLAGS: dict[str, Any] = {"max_steps": 4, "checkpoint_interval": 2, "eval_interval": None}


@pytest.fixture
def copied(first: Path, tmp_path: Path) -> Path:
    """That run in a folder of its own."""
    return Path(shutil.copytree(first, tmp_path / "copied/checkpoints"))


def resume(data_root: Path, folder: Path, path: object, **changes: object) -> list[Checkpoint]:
    flags = {**FLAGS, "max_steps": 6, "resume": str(path), **changes}
    trainer.run(small_config(data_root, folder.parent, **flags))
    return store.list_checkpoints(folder)


def runs(checkpoints: list[Checkpoint]) -> set[tuple[str, str | None]]:
    return {(item.training.run_id, item.training.parent_run) for item in checkpoints}


def without_ids(folder: Path) -> None:
    """As earlier versions wrote the metadata. (The state in the files keeps its ids.)"""
    for path in folder.glob("step_*.json"):
        values = json.loads(path.read_text())
        del values["run_id"], values["parent_run"]
        path.write_text(json.dumps(values))


def test_a_run_keeps_its_id(data_root: Path, copied: Path):
    ((before, parent),) = runs(store.list_checkpoints(copied))
    assert len(before) == 32 and parent is None
    for which in ("latest", "2", copied / "step_000004.pt"):
        assert runs(resume(data_root, copied, which)) == {(before, None)}


def test_a_run_keeps_its_name_in_wandb(copied: Path, tmp_path: Path):
    """Runs of earlier versions, which have no mark, are known there by their names alone."""
    path = copied / "step_000004.pt"
    state = store.load(path)
    identity = run_identity.find(copied, path, state)
    assert identity.unique_name("a") == f"a-{identity.id[:8]}"
    assert run_identity.find(copied, path, state) == identity
    fork = run_identity.find(tmp_path / "empty", path, state)
    assert fork.unique_name("a") != identity.unique_name("a")
    del state["run"]["mark"]
    assert run_identity.find(copied, path, state).unique_name("a") == "a"
    del state["run"]
    without_ids(copied)
    assert run_identity.find(copied, path, state).unique_name("a") == "a"
    new = [run_identity.find(tmp_path / "empty", None, None).unique_name("a") for _ in range(2)]
    assert len({*new}) == 2, "two that begin in the same second"


def test_another_folder_is_another_run_that_names_its_parent(
    data_root: Path, first: Path, tmp_path: Path
):
    ((parent, _),) = runs(store.list_checkpoints(first))
    folder = tmp_path / "other/checkpoints"
    ((own, named),) = runs(resume(data_root, folder, first / "step_000002.pt"))
    assert named == parent != own
    assert runs(resume(data_root, folder, "latest", max_steps=8)) == {(own, parent)}


def test_another_folder_is_another_run_in_logs_and_tensorboard(
    data_root: Path, copied: Path, tmp_path: Path
):
    """Under the same name, TensorBoard would purge the steps of the run that it goes on from."""
    flags = {"runs_dir": tmp_path / "runs", "use_tensorboard": True}
    resume(data_root, copied, "latest", max_steps=5, **flags)
    (own,) = (tmp_path / "runs").iterdir()
    forked = tmp_path / "other/checkpoints"
    for which in (copied / "step_000004.pt", "latest"):
        resume(data_root, forked, which, **flags)
    names = {item.training.run_name for item in store.list_checkpoints(forked)}
    assert len(names) == 1
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {own.name} | names
    assert own.name not in names


def test_a_folder_of_another_run_is_refused_and_left_alone(
    data_root: Path, first: Path, tmp_path: Path
):
    folder = tmp_path / "checkpoints"
    trainer.run(small_config(data_root, tmp_path, **FLAGS | {"max_steps": 2}), run_name="theirs")
    before = {path.name: path.read_bytes() for path in folder.glob("step_*")}
    expected = r"holds 1 checkpoint of another run \(theirs\), up to step_000002; keep this run"
    with pytest.raises(CheckpointError, match=expected):
        resume(data_root, folder, first / "step_000004.pt")
    without_ids(folder)
    with pytest.raises(CheckpointError, match=expected):
        resume(data_root, folder, first / "step_000004.pt")
    assert {path.name: path.read_bytes() for path in folder.glob("step_*.pt")} == {
        name: content for name, content in before.items() if name.endswith(".pt")
    }


def test_a_checkpoint_of_another_run_among_its_own_is_noticed(
    data_root: Path, copied: Path, tmp_path: Path
):
    """It would be resumed instead, or removed."""
    trainer.run(small_config(data_root, tmp_path, **FLAGS | {"max_steps": 3}))
    for name in ("step_000003.pt", "step_000003.json"):
        shutil.copy(tmp_path / "checkpoints" / name, copied)
    with pytest.raises(CheckpointError, match="of another run"):
        resume(data_root, copied, "4")


def test_checkpoints_without_an_id_belong_to_the_run_of_their_folder(data_root: Path, copied: Path):
    without_ids(copied)
    ids = [item.training.run_id for item in resume(data_root, copied, "2", max_steps=3)]
    assert sorted(map(bool, ids)) == [False, False, True]


def test_a_run_that_is_given_the_same_path_again_is_refused(
    data_root: Path, first: Path, tmp_path: Path
):
    """It would begin again at that step, and overwrite what it has trained since."""
    folder = tmp_path / "checkpoints"
    resume(data_root, folder, first / "step_000002.pt")
    with pytest.raises(CheckpointError, match="continue that one with --resume latest"):
        resume(data_root, folder, first / "step_000002.pt")
