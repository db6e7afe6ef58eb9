"""Digests of shards: computed once, remembered by version, compared with what is expected."""

import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2.base.errors import DataError
from gpt2.data import digests, verifier
from gpt2.data.digests import DigestMemory
from gpt2.data.manifest import MANIFEST
from gpt2.data.remote import Storage
from gpt2.data.shards import DatasetIndex, TokenDataset, load_index
from gpt2.data.verifier import Verifier
from support import HANG_S


@pytest.fixture
def folder(data_root: Path, tmp_path: Path) -> Path:
    """The small corpus, an hour old, of which nothing is remembered."""
    folder = tmp_path / "corpus"
    shutil.copytree(data_root, folder, ignore=shutil.ignore_patterns(digests.NAME))
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed."""
    names: list[str] = []
    hash_file = digests.hash_file

    def counted(file, *rest):
        names.append(Path(file.name).name)
        return hash_file(file, *rest)

    monkeypatch.setattr(digests, "hash_file", counted)
    return names


def local(folder: Path) -> DatasetIndex:
    return load_index(Storage(str(folder)))


def verify(folder: Path) -> DatasetIndex:
    """As a run does it, to the end."""
    index = verifier.checked(local(folder))
    thread = Verifier(index)
    thread.start(lambda: False)
    assert thread.wait_for({shard.file for shard in index.shards}, HANG_S)
    thread.close()
    return index


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_each_shard_is_hashed_once(folder: Path, hashed: list[str]):
    assert verify(folder).content.fault is None
    assert sorted(hashed) == sorted(path.name for path in folder.glob("*.npy"))
    assert hashed[0] == "small_val_000000.npy"  # which is used first
    del hashed[:]
    verify(folder)
    assert hashed == []
    os.utime(folder / "small_train_000002.npy")
    verifier.checked(local(folder))
    assert hashed == ["small_train_000002.npy"]


def test_a_mismatch_is_remembered(folder: Path, hashed: list[str]):
    flip(folder / "small_train_000002.npy")
    os.utime(folder / "small_train_000002.npy", (1, 1))
    index = verify(folder)
    assert index.content.fault is not None
    assert index.content.fault.unverified == "small_train_000002.npy"
    assert "its SHA-256 differs from the manifest's; prepare" in index.content.fault.reason
    del hashed[:]
    with pytest.raises(DataError, match=r"000002\.npy: its SHA-256 differs from the manifest's"):
        verifier.checked(local(folder))
    assert hashed == []


def test_a_file_that_was_hashed_right_after_a_change_is_hashed_again(folder: Path, hashed):
    """It may have changed again within the resolution of its time stamp."""
    os.utime(folder / "small_train_000001.npy")
    verify(folder)
    del hashed[:]
    verifier.checked(local(folder))
    assert hashed == ["small_train_000001.npy"]


def test_shards_without_a_manifest_get_digests_at_first_reading(folder: Path):
    with_manifest = local(folder).fingerprint()
    (folder / MANIFEST).unlink()
    unverified = local(folder)
    assert unverified.fingerprint()["train"] == [
        unverified.ends_of(shard) for shard in unverified.of("train")
    ]
    assert verify(folder).fingerprint() == with_manifest
    assert verifier.checked(local(folder)).fingerprint() == with_manifest  # remembered
    flip(folder / "small_val_000000.npy")
    known = verifier.checked(local(folder)).fingerprint()
    assert known["train"] == with_manifest["train"]
    assert known["val"] != with_manifest["val"]


def test_a_shard_without_a_digest_that_changes_before_it_is_hashed(folder: Path):
    """Rows of two contents may have been read: no digest holds for both."""
    (folder / MANIFEST).unlink()
    index = local(folder)
    thread = Verifier(index)
    flip(folder / "small_train_000001.npy")
    thread.start(lambda: False)
    assert thread.wait_for({"small_train_000001.npy"}, HANG_S)
    thread.close()
    assert index.content.fault is not None
    assert "small_train_000001.npy" in index.content.fault.reason


def test_a_changed_shard_is_hashed_before_its_rows_are_used(
    folder: Path, hashed: list[str], caplog
):
    index, rows = local(folder), np.array([[0, 3], [0, 4], [1, 0]])
    dataset = TokenDataset(index, "train", 32)
    before = dataset.read(rows)
    assert hashed == []
    path = folder / "small_train_000001.npy"
    os.utime(path)
    assert np.array_equal(dataset.read(rows), before)
    assert hashed == [path.name]
    shutil.copyfile(path, folder / "copy")
    os.replace(folder / "copy", path)
    assert np.array_equal(dataset.read(rows), before)
    path.unlink()  # the open file is as it was
    assert np.array_equal(dataset.read(rows), before)
    assert np.array_equal(dataset.read(rows), before)
    assert [item.getMessage().partition(":")[0] for item in caplog.records] == [
        f"{path} has been removed"  # once
    ]
    np.save(path, np.arange(8000, dtype=np.uint16))
    with pytest.raises(DataError, match=rf"{path.name} has changed since the run opened it; prep"):
        dataset.read(rows)
    assert index.content.fault is not None


def test_a_truncated_shard_is_an_error_that_can_be_handled(folder: Path):
    """Through a memory map it would end the process (SIGBUS)."""
    dataset = TokenDataset(local(folder), "train", 32)
    os.truncate(folder / "small_train_000001.npy", 200)
    with pytest.raises(DataError, match=r"000001\.npy has changed since the run opened it"):
        dataset.read(np.array([[0, 200]]))


def test_digests_of_a_folder_that_cannot_be_written_are_in_the_users_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: folder not in (path, Path(path).parent))
    verify(folder)
    assert not (folder / digests.NAME).exists()
    assert len(list((tmp_path / "home").rglob("*.jsonl"))) == 1
    del hashed[:]
    verify(folder)
    assert hashed == []


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"file": 1}', "\0\udcff"])
def test_a_damaged_memory_is_no_more_than_forgotten(folder: Path, damage: str, hashed: list[str]):
    verify(folder)
    path = folder / digests.NAME
    path.write_text(damage + "\n" + path.read_text() + damage, errors="surrogateescape")
    del hashed[:]
    verify(folder)
    assert hashed == []


def test_processes_of_a_machine_share_the_work(folder: Path, hashed: list[str]):
    indexes = [verifier.checked(local(folder)) for _ in range(3)]
    threads = [Verifier(index) for index in indexes]
    for thread in threads:
        thread.start(lambda: False)
    for thread, index in zip(threads, indexes, strict=True):
        assert thread.wait_for({shard.file for shard in index.shards}, HANG_S)
        thread.close()
    assert len(hashed) == len(set(hashed)) == len(indexes[0].shards)


def test_it_ends_within_a_shard(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digests, "CHUNK_BYTES", 16)
    monkeypatch.setattr(verifier, "WAIT_FACTOR", 10**6)  # it waits until it is closed
    before = threading.active_count()
    thread = Verifier(local(folder))
    thread.start(lambda: True)
    thread.close()
    assert threading.active_count() == before


def test_inodes_of_64_bits_are_remembered(tmp_path: Path):
    """Some file systems number files with the highest bit, which no signed integer has."""
    status = SimpleNamespace(st_size=9, st_mtime_ns=1, st_ino=2**64 - 5)
    version = digests.version_of(status)
    DigestMemory(tmp_path).add("a", version, "0" * 64)
    assert DigestMemory(tmp_path).get("a", version) == "0" * 64


def test_the_newest_digest_of_a_file_counts(tmp_path: Path):
    memory = DigestMemory(tmp_path)
    memory.add("x.npy", (1, 2, 3), "a")
    memory.add("x.npy", (4, 5, 6), "b")
    again = DigestMemory(tmp_path)
    assert again.has("x.npy")
    assert again.get("x.npy", (4, 5, 6)) == "b"
    assert again.get("x.npy", (1, 2, 3)) is None
    memory.add("y.npy", (7, 8, 9), "c")
    again.refresh()
    assert again.get("y.npy", (7, 8, 9)) == "c"
