import os
from pathlib import Path

import pytest
import torch

import forked_ranks
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import integrity, store, verification
from gpt2.checkpoint.metadata import TrainingMetadata

TRAINING = TrainingMetadata(1, 0, 0, 1.0, None, 1, "run", "0")
LOADING = """
import os, sys, time
machines, log, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if machines == 2:  # as torchrun tells the first rank of the second machine
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
import torch
from pathlib import Path
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import integrity, store, verification
from gpt2.config.run import MachineConfig
from gpt2.distributed import rendezvous
def note(text):
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"rank {world.rank} {text}\\n".encode())
    os.close(file)
def slow(*arguments, is_intact=integrity.is_intact):
    note("verifies")
    time.sleep(0.5)
    found = is_intact(*arguments)
    note("has verified")
    return found
def spy(*arguments, load=torch.load, **options):
    note("unpickles")
    return load(*arguments, **options)
integrity.is_intact, torch.load, verification.SETTLED_S = slow, spy, -1
with rendezvous.join(MachineConfig()) as world:
    try:
        found = Path(path)
        if found.is_dir():
            found = world.run_on_rank0(lambda: store.find(found, "latest"))
        assert store.load(found, world=world)["step"] == 1
    except CheckpointError as error:
        note(error)
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return store.save(tmp_path, {"step": 1, "x": torch.ones(9000)}, TRAINING, keep_last=2)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows at each verification that reads a file."""
    found: list[int] = []
    is_intact = integrity.is_intact

    def spy(handle: int, *arguments: object) -> bool:
        found.append(handle)
        return is_intact(handle, *arguments)

    monkeypatch.setattr(integrity, "is_intact", spy)
    monkeypatch.setattr(verification, "SETTLED_S", -1)
    return found


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def on_two_ranks(path: Path, tmp_path: Path, machines: int) -> list[str]:
    """What two ranks note while they load `path`."""
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(LOADING)
    forked_ranks.run([str(machines), str(log), str(path)], 2, tmp_path, script)
    return log.read_text().splitlines()


@pytest.mark.parametrize("by_name", [True, False])
def test_the_first_rank_of_a_machine_verifies_before_any_unpickles(
    saved: Path, tmp_path: Path, by_name: bool
):
    notes = on_two_ranks(saved.parent if by_name else saved, tmp_path, machines=1)
    assert notes[:2] == ["rank 0 verifies", "rank 0 has verified"]
    assert sorted(notes[2:]) == ["rank 0 unpickles", "rank 1 unpickles"]


def test_each_machine_verifies_and_all_wait_for_all(saved: Path, tmp_path: Path):
    notes = on_two_ranks(saved, tmp_path, machines=2)
    assert sorted(notes[:4]) == [
        f"rank {rank} {what}" for rank in (0, 1) for what in ("has verified", "verifies")
    ]
    assert sorted(notes[4:]) == ["rank 0 unpickles", "rank 1 unpickles"]


def test_no_rank_unpickles_a_damaged_file(saved: Path, tmp_path: Path):
    flip_a_bit(saved)
    notes = on_two_ranks(saved, tmp_path, machines=1)
    reason = f"{saved} is damaged: its SHA-256 is not that of its metadata"
    assert notes[:2] == ["rank 0 verifies", "rank 0 has verified"]
    assert sorted(notes[2:]) == [f"rank 0 {reason}", f"rank 1 {reason}"]


def test_a_file_is_verified_once_by_a_process(saved: Path, verified: list[int]):
    assert store.find(saved.parent, "latest") == saved
    store.load(saved)
    assert len(verified) == 1
    flip_a_bit(saved)
    with pytest.raises(CheckpointError, match="SHA-256"):
        store.load(saved)
    assert len(verified) == 2


def test_a_file_that_changed_just_now_is_verified_again(
    saved: Path, verified: list[int], monkeypatch
):
    monkeypatch.setattr(verification, "SETTLED_S", 60)
    store.load(saved)
    store.load(saved)
    assert len(verified) == 2


def test_a_file_that_is_replaced_after_it_was_verified_is_verified_again(saved: Path):
    found = verification.verify(saved)
    other = saved.with_name("other.pt")
    other.write_bytes(saved.read_bytes())
    os.replace(other, saved)
    assert store.unpickle(saved, verified=found)["step"] == 1
    flip_a_bit(saved)
    with pytest.raises(CheckpointError, match="SHA-256"):
        store.unpickle(saved, verified=found)


@pytest.mark.parametrize("failures", [2, 3])
def test_a_read_error_is_no_damage_and_is_tried_again(saved: Path, monkeypatch, failures: int):
    preadv, errors = os.preadv, [OSError(5, "Input/output error") for _ in range(failures)]

    def flaky(*arguments: object) -> int:
        if errors:
            raise errors.pop()
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    monkeypatch.setattr(verification, "PAUSES_S", (0, 0))
    if failures == 2:
        assert store.find(saved.parent, "latest", set_aside=True) == saved
        return
    with pytest.raises(CheckpointError, match=r"cannot read .*: Input/output error; .* intact"):
        store.find(saved.parent, "latest", set_aside=True)
    assert saved.exists()


def test_it_says_what_is_loaded_before_it_is_read(saved: Path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(integrity, "is_intact", lambda *_: False)
    with pytest.raises(CheckpointError):
        store.load(saved)
    assert caplog.messages == [f"Loading checkpoint from: {saved}"]
