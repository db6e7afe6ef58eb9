import errno
import hashlib
import hmac
import json
import os
import pickle
import random
import shutil
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.base import folder_lock
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import integrity, metadata, random_state, store

CPU = torch.device("cpu")


def training(step: int, val_loss: float | None = None) -> metadata.TrainingMetadata:
    return metadata.TrainingMetadata(
        step=step,
        epoch=0,
        tokens=step * 10,
        train_loss=2.0,
        val_loss=val_loss,
        world_size=1,
        run_name="run",
        config_digest="0",
    )


def save(folder: Path, step: int, val_loss: float | None = None, keep_last: int = 10, **options):
    state = {"model": {"weight": torch.full((300,), float(step))}, "step": step}
    return store.save(folder, state, training(step, val_loss), keep_last=keep_last, **options)


class Malicious:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_round_trip(tmp_path: Path, caplog):
    path = save(tmp_path, 250)
    assert path == tmp_path / "step_000250.pt"
    state = store.load(path)
    assert state["step"] == 250
    assert torch.equal(state["model"]["weight"], torch.full((300,), 250.0))
    assert not caplog.messages
    assert {item.name for item in tmp_path.iterdir()} == {
        "step_000250.pt",
        "step_000250.json",
        "latest.pt",
    }


def test_metadata_describes_the_file(tmp_path: Path):
    path = save(tmp_path, 3, val_loss=1.5)
    values = json.loads(path.with_suffix(".json").read_text())
    assert values["sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest()]
    assert values["bytes"] == path.stat().st_size
    assert (values["step"], values["val_loss"], values["world_size"]) == (3, 1.5, 1)
    assert values["torch_version"] == torch.__version__


def test_latest_and_best_are_relative_links(tmp_path: Path):
    for step, val_loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, float("nan"))]:
        save(tmp_path, step, val_loss)
    assert os.readlink(tmp_path / "latest.pt") == "step_000005.pt"
    assert os.readlink(tmp_path / "best.pt") == "step_000002.pt"


def test_a_file_system_without_symlinks_has_text_files(tmp_path: Path, monkeypatch, caplog):
    def no_symlinks(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", no_symlinks)
    for step, val_loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None)]:
        save(tmp_path, step, val_loss, keep_last=2)
    assert [item.training.step for item in store.list_checkpoints(tmp_path)] == [2, 3, 4]
    assert (tmp_path / "latest.pt").read_text() == "link: step_000004.pt\n"
    for name, step in (("latest", 4), ("best", 2)):
        path = store.find(tmp_path, str(tmp_path / f"{name}.pt"))
        assert path == tmp_path / f"step_{step:06d}.pt" == store.find(tmp_path, name)
        assert store.load(path)["step"] == step
    assert not caplog.records[2:]  # "Loading checkpoint from", twice
    (tmp_path / "step_000004.pt").unlink()
    store.find(tmp_path, "latest")
    assert "latest.pt points to step_000004.pt, which does not exist" in caplog.text
    monkeypatch.undo()  # the folder moves to another file system
    save(tmp_path, 5)
    assert os.readlink(tmp_path / "latest.pt") == "step_000005.pt"


def test_a_link_that_cannot_be_written_fails_no_save(tmp_path: Path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "symlink_to", full)
    for step in range(1, 5):
        save(tmp_path, step, keep_last=2)
    assert [item.training.step for item in store.list_checkpoints(tmp_path)] == [3, 4]
    assert "cannot point latest.pt and best.pt" in caplog.text


def test_the_metadata_is_written_after_the_file_and_before_the_links(tmp_path, monkeypatch):
    names = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda *paths: (names.append(paths[1].name), replace(*paths))
    )
    save(tmp_path, 1, val_loss=1.0)
    assert [name for name in names if name != "key"] == [
        "step_000001.pt",
        "step_000001.json",
        "latest.pt",
        "best.pt",
    ]


def test_rolling_keeps_the_newest_the_best_and_the_one_resumed_from(tmp_path: Path):
    first = save(tmp_path, 1)
    for step in range(2, 9):
        save(tmp_path, step, val_loss=1.0 if step == 3 else 2.0, keep_last=2, resumed_from=first)
    kept = sorted(path.name for path in tmp_path.glob("step_*"))
    expected = [f"step_00000{step}.{kind}" for step in (1, 3, 7, 8) for kind in ("json", "pt")]
    assert kept == expected


def save_validated(folder: Path, step: int, val_loss: float, val_rows: int | None) -> None:
    facts = replace(training(step, val_loss), val_rows=val_rows)
    store.save(folder, {"step": step}, facts, keep_last=2)


def test_the_best_of_each_number_of_validation_rows_is_kept(tmp_path: Path):
    """A resume with another number, and one that takes it back."""
    for step, val_loss in [(1, 1.0), (2, 3.0)]:
        save_validated(tmp_path, step, val_loss, 2)
    for step, val_loss in [(3, 5.0), (4, 6.0), (5, 7.0), (6, 8.0)]:
        save_validated(tmp_path, step, val_loss, 5)
    assert [item.training.step for item in store.list_checkpoints(tmp_path)] == [1, 3, 5, 6]
    assert store.find(tmp_path, "best") == tmp_path / "step_000003.pt"
    save_validated(tmp_path, 7, 2.0, 2)
    assert [item.training.step for item in store.list_checkpoints(tmp_path)] == [1, 3, 6, 7]
    assert store.find(tmp_path, "best") == tmp_path / "step_000001.pt"


def test_a_loss_of_an_earlier_version_compares_with_one_of_any_number_of_rows(tmp_path: Path):
    for step, val_loss, val_rows in [(1, 1.0, None), (2, 2.0, 2), (3, 3.0, 5)]:
        save_validated(tmp_path, step, val_loss, val_rows)
        assert store.find(tmp_path, "best") == tmp_path / "step_000001.pt"


def test_the_newest_two_are_always_kept(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=1)
    assert [item.training.step for item in store.list_checkpoints(tmp_path)] == [2, 3]


def test_newest_is_what_was_saved_last_not_the_highest_step(tmp_path: Path):
    """After resuming an older step, the abandoned future must not win."""
    for step in (100, 200, 150):
        save(tmp_path, step)
    assert [item.training.step for item in store.list_checkpoints(tmp_path)] == [100, 200, 150]
    assert store.find(tmp_path, "latest") == tmp_path / "step_000150.pt"


def test_a_clock_that_jumps_back_costs_nothing(tmp_path: Path, monkeypatch):
    for step in range(1, 4):
        save(tmp_path, step, keep_last=3)
    monkeypatch.setattr(time, "time", lambda: 5.0)
    save(tmp_path, 4, keep_last=3)
    assert [item.training.step for item in store.list_checkpoints(tmp_path)] == [2, 3, 4]
    assert store.find(tmp_path, "latest").name == "step_000004.pt"


def change_metadata(path: Path, **changes: object) -> None:
    metadata_path = path.with_suffix(".json")
    metadata_path.write_text(json.dumps(json.loads(metadata_path.read_text()) | changes))


def test_a_field_of_a_later_version_is_kept(tmp_path: Path, caplog):
    path = save(tmp_path, 1)
    change_metadata(path, invented_later=[1])
    assert store.find(tmp_path, "latest") == path
    assert store.load(path)["step"] == 1
    [warning] = caplog.messages
    assert warning.endswith("unknown fields, of a later version, are kept: invented_later")
    found = metadata.read_metadata(path.with_suffix(".json"))
    assert json.loads(metadata.metadata_to_json(found))["invented_later"] == [1]


def test_metadata_is_written_as_it_was_read(tmp_path: Path):
    metadata_path = save(tmp_path, 1, val_loss=2.5).with_suffix(".json")
    found = metadata.read_metadata(metadata_path)
    assert metadata.metadata_to_json(found) == metadata_path.read_text()


def test_metadata_of_versions_without_bits_per_byte(tmp_path: Path):
    metadata_path = save(tmp_path, 1, val_loss=2.5).with_suffix(".json")
    values = json.loads(metadata_path.read_text())
    del values["bits_per_byte"]
    metadata_path.write_text(json.dumps(values))
    (found,) = store.list_checkpoints(tmp_path)
    assert (found.training.val_loss, found.training.bits_per_byte) == (2.5, None)


def test_one_digest_of_the_whole_file_as_the_first_version_wrote_it(tmp_path: Path):
    path = save(tmp_path, 1)
    values = json.loads(path.with_suffix(".json").read_text())
    del values["piece_bytes"]
    (values["sha256"],) = values["sha256"]
    path.with_suffix(".json").write_text(json.dumps(values))
    (found,) = store.list_checkpoints(tmp_path)
    assert found.metadata.piece_bytes == path.stat().st_size
    flip_a_bit(path)
    with pytest.raises(CheckpointError, match="SHA-256"):
        store.load(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"step": 1'])
def test_something_else_is_no_metadata(tmp_path: Path, content: bytes):
    path = tmp_path / "step_000001.json"
    assert metadata.read_metadata(path) is None
    path.write_bytes(content)
    assert metadata.read_metadata(path) is None


def test_metadata_that_cannot_be_read_is_not_damaged(tmp_path: Path):
    (tmp_path / "step_000001.json").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*step_000001\.json: Is a directory"):
        store.find(tmp_path, "latest", set_aside=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"time": "x"},
        {"val_loss": "x"},
        {"val_loss": 10**400},
        {"sha256": 1},
        {"step": None},
        {"piece_bytes": 0},
    ],
)
def test_damaged_metadata_is_no_fresh_start(tmp_path: Path, changes):
    change_metadata(save(tmp_path, 1), **changes)
    assert store.list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"\(1 file damaged or of another version\)"):
        store.find(tmp_path, "latest")


def test_find(tmp_path: Path):
    assert store.find(tmp_path, "latest") is None
    for step, val_loss in [(10, 1.0), (20, 2.0)]:
        save(tmp_path, step, val_loss)
    assert store.find(tmp_path, "latest").name == "step_000020.pt"
    assert store.find(tmp_path, "best").name == "step_000010.pt"
    assert store.find(tmp_path, "10").name == "step_000010.pt"
    link = str(tmp_path / "latest.pt")
    assert store.find(Path("elsewhere"), link) == tmp_path / "step_000020.pt"


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("best", "no checkpoint in .* has a validation loss"),
        ("30", r"no checkpoint of step 30; steps: 10"),
        ("nowhere.pt", "no checkpoint at nowhere.pt; use latest, best, a step or a path"),
    ],
)
def test_what_is_not_there(tmp_path: Path, which: str, message: str):
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match=message):
        store.find(tmp_path, which)


def test_metadata_and_folders_name_a_checkpoint(tmp_path: Path):
    folder = tmp_path / "out" / "checkpoints"
    folder.mkdir(parents=True)
    first, newest = save(folder, 4), save(folder, 8)
    elsewhere = tmp_path / "elsewhere"
    assert store.find(elsewhere, str(first.with_suffix(".json"))) == first
    assert store.find(elsewhere, str(folder)) == store.find(elsewhere, str(folder.parent)) == newest
    newest.write_bytes(b"")
    assert store.find(folder, str(folder), set_aside=True) == first
    assert newest.exists(), "the folder may be that of another run"
    for which in (str(tmp_path), "4.json"):
        with pytest.raises(CheckpointError, match=f"no checkpoint at {which}; use latest"):
            store.find(elsewhere, which)


def test_a_file_without_metadata_does_not_count(tmp_path: Path):
    save(tmp_path, 10)
    save(tmp_path, 20).with_suffix(".json").unlink()
    assert store.find(tmp_path, "latest").name == "step_000010.pt"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(("damage", "reason"), [(flip_a_bit, "SHA-256"), (truncate, "bytes, its")])
def test_latest_falls_back_to_the_newest_good_one(tmp_path, caplog, damage, reason):
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    assert store.find(tmp_path, "latest").name == "step_000010.pt"
    [warning] = caplog.messages
    assert "step_000020.pt" in warning
    assert reason in warning
    with pytest.raises(CheckpointError, match=reason):
        store.load(tmp_path / "step_000020.pt")


def test_all_damaged_is_no_fresh_start(tmp_path: Path):
    flip_a_bit(save(tmp_path, 10))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used \(1 file "):
        store.find(tmp_path, "latest")


def test_a_failed_save_leaves_the_earlier_ones(tmp_path: Path, monkeypatch):
    save(tmp_path, 10)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(CheckpointError, match=r"No space left.*earlier checkpoints are intact"):
            save(tmp_path, 20)
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "latest.pt",
        "step_000010.json",
        "step_000010.pt",
    ]
    assert store.load(store.find(tmp_path, "latest"))["step"] == 10


# Trust


def write_malicious(path: Path, trace: Path) -> None:
    torch.save({"schema": 1, "evil": Malicious(trace)}, path)


def write_metadata_by_hand(path: Path, signature: str | None) -> None:
    """All that another user, who has not this user's key, can put beside a file."""
    values = json.loads(save(path.parent / "other", 5).with_suffix(".json").read_text())
    values["bytes"] = path.stat().st_size
    values["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    values["hmac"] = signature or values["hmac"]
    path.with_suffix(".json").write_text(json.dumps(values))


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """(malicious checkpoint, the trace that it leaves when it is unpickled)."""
    (tmp_path / "other").mkdir()
    path, trace = tmp_path / "step_000005.pt", tmp_path / "trace"
    write_malicious(path, trace)
    return path, trace


def assert_refused(path: Path, trace: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is refused: .*--trust_checkpoint"):
        store.load(path)
    assert not trace.exists()


def test_malicious_pickle_alone_does_not_run(planted, caplog):
    path, trace = planted
    assert store.find(path.parent, "latest") is None
    assert_refused(store.find(path.parent, str(path)), trace)
    assert "without its .json, which is skipped" in caplog.messages[0]
    assert "loaded unverified" in caplog.messages[1]


@pytest.mark.parametrize("signature", [None, "", "0" * 64])
def test_malicious_pickle_with_metadata_made_by_hand_does_not_run(planted, signature):
    path, trace = planted
    write_metadata_by_hand(path, signature)
    assert_refused(store.find(path.parent, "latest"), trace)


@pytest.mark.parametrize("signature", [5, "é"])
def test_odd_signatures_are_no_signatures(tmp_path: Path, signature):
    path = save(tmp_path, 1)
    change_metadata(path, hmac=signature)
    assert store.load(path)["step"] == 1


def test_an_empty_key_proves_nothing(planted, tmp_path: Path, monkeypatch):
    """As a power cut may leave it: anybody can sign with it."""
    path, trace = planted
    write_metadata_by_hand(path, None)
    digest = json.loads(path.with_suffix(".json").read_text())["sha256"]
    change_metadata(path, hmac=hmac.new(b"", digest.encode(), "sha256").hexdigest())
    key = tmp_path / "home" / "gpt2-from-scratch" / "key"
    key.parent.mkdir(parents=True)
    key.touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    assert_refused(path, trace)


@pytest.mark.parametrize(
    ("of_key", "of_folder"),
    [(0o602, 0o700), (0o620, 0o700), (0o604, 0o700), (0o600, 0o702), (0o600, 0o770)],
)
def test_a_key_that_others_can_know_or_replace_proves_nothing(
    planted, tmp_path: Path, monkeypatch, caplog, of_key: int, of_folder: int
):
    path, trace = planted
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "my home"))
    write_metadata_by_hand(path, None)
    digests = metadata.read_metadata(path.with_suffix(".json")).sha256
    change_metadata(path, hmac=integrity.sign(digests))
    key = tmp_path / "my home" / "gpt2-from-scratch" / "key"
    key.chmod(of_key)
    key.parent.chmod(of_folder)
    assert_refused(path, trace)
    command = caplog.messages[-1].rpartition("use: ")[2]
    assert integrity.sign(["a"]) is None
    assert store.load(save(tmp_path, 6))["step"] == 6  # nothing is lost
    subprocess.run(command, shell=True, check=True)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    store.load(path)
    assert trace.exists()  # with the key as it should be, it is this user's own file


def test_a_key_of_another_user_proves_nothing(planted, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    assert integrity.sign(["a"])
    if os.getuid() == 0:
        os.chown(tmp_path / "home" / "gpt2-from-scratch" / "key", 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert integrity.sign(["a"]) is None
    assert "belongs to another user" in caplog.text


def test_trust_unpickles_it(planted):
    path, trace = planted
    store.load(path, trust=True)
    assert trace.exists()


def test_own_file_loads_with_full_unpickling_and_a_foreign_one_without(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    requested = []
    load = torch.load

    def spy(*arguments, **options):
        requested.append(options["weights_only"])
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", spy)
    store.load(path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another_user"))
    assert store.load(path)["step"] == 1
    assert requested == [False, True]


def test_no_home_to_keep_a_key_in(tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert store.load(save(tmp_path, 1))["step"] == 1


def test_key_is_this_users_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    save(tmp_path, 1)
    key = tmp_path / "home" / "gpt2-from-scratch" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    save(tmp_path, 2)
    assert key.read_bytes() == before
    assert os.listdir(key.parent) == ["key"]


def test_something_else_is_no_checkpoint(tmp_path: Path):
    noise = store.ZIP + random.Random(2).randbytes(5000)
    for name, content in [("text.pt", b"no archive"), ("empty.pt", b""), ("noise.pt", noise)]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}: it is damaged or not a checkpoint"):
            store.load(tmp_path / name)
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError, match=r"other\.pt is not a checkpoint of gpt2-from-scratch"
    ):
        store.load(tmp_path / "other.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"schema": 1}))
    with pytest.raises(CheckpointError, match=r"plain\.pt"):
        store.load(tmp_path / "plain.pt")


def test_the_old_format_of_torch_runs_no_code_either(planted):
    path, trace = planted
    torch.save({"evil": Malicious(trace)}, path, _use_new_zipfile_serialization=False)
    assert_refused(path, trace)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(5, "Input/output error"), "cannot read .*: Input/output error; .* may be intact"),
        (MemoryError(), "not enough memory to load .*; stop other processes"),
        (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (RuntimeError("PytorchStreamReader failed"), "it is damaged or not a checkpoint"),
    ],
)
def test_each_failure_is_called_what_it_is(tmp_path: Path, monkeypatch, error, message: str):
    def fail(*_: object, **__: object) -> None:
        raise error

    path = save(tmp_path, 1)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=message):
        store.load(path)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert"), torch.OutOfMemoryError("CUDA out of memory")],
)
def test_an_error_of_cuda_is_raised_as_it_is(tmp_path: Path, monkeypatch, error: RuntimeError):
    def fail(*_: object, **__: object) -> None:
        raise error

    path = save(tmp_path, 1)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RuntimeError) as caught:
        store.load(path)
    assert caught.value is error


def test_the_folder_is_made_and_unfinished_files_are_removed(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    folder_lock.require_writable(folder)
    assert os.listdir(folder) == []
    (folder / "step_000001.pt.tmp").touch()
    store.remove_unfinished(folder)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("name", ["file/checkpoints", "/proc/checkpoints"])
def test_folder_that_cannot_be_written(tmp_path: Path, name: str):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write to the checkpoint folder"):
        folder_lock.require_writable(tmp_path / name)


def test_random_streams_continue(tmp_path: Path):
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(1).item()]

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    draw()  # leaves a half-used pair of Gaussians behind
    state = {"rng": random_state.rng_state(CPU)}
    path = store.save(tmp_path, state, training(1), keep_last=2)
    expected = [draw() for _ in range(3)]
    for moved in (path, Path(shutil.copy(path, tmp_path / "moved.pt"))):  # trusted, and not
        random_state.set_rng_state(store.load(moved)["rng"], CPU)
        assert [draw() for _ in range(3)] == expected
