"""Verification reads every byte, names each wrong file, and remembers what was read."""

import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import foreign_shards
from gpt2.base.errors import DataError
from gpt2.data import digests, shard_content, verification, verifier
from gpt2.data.manifest import MANIFEST
from gpt2.data.remote import Storage
from gpt2.data.shards import load_index
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.data.verification import Verification
from support import HANG_S, wait_until

AGAIN_S = 5
"""after which an interrupt that was lost is sent again"""

VOCAB_SIZE = 50257
VAL, FIRST, SECOND, THIRD = (
    "small_val_000000.npy",
    *(f"small_train_{number:06d}.npy" for number in (1, 2, 3)),
)


@pytest.fixture
def folder(data_root: Path, tmp_path: Path) -> Path:
    """The small corpus, an hour old, of which nothing is remembered."""
    folder = tmp_path / "small"
    shutil.copytree(data_root, folder, ignore=shutil.ignore_patterns(digests.NAME))
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    return folder


def wrong(root: Path | str) -> dict[str, str]:
    """What is found wrong, by file; everything that was to be read is counted as read."""
    verified, read = Verification(Storage(str(root))), list[int]()
    reports = verified.run(read.append)
    assert sum(read) == verified.bytes
    assert [report.file for report in reports] == sorted(report.file for report in reports)
    return {report.file: report.wrong for report in reports if report.wrong}


def remembered(folder: Path) -> set[str]:
    lines = (folder / digests.NAME).read_text().splitlines()
    return {json.loads(line)["file"] for line in lines}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_entry(folder: Path, name: str, **values: object) -> None:
    """Changes what the manifest says about a shard."""
    manifest = json.loads((folder / MANIFEST).read_text())
    entry = next(item for item in manifest["shards"] if item["file"] == name)
    entry.update(values)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_sound_shards_need_not_be_hashed_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    reports = Verification(Storage(str(folder))).run(lambda _: None)
    listed = load_index(Storage(str(folder))).shards
    found = {(item.file, item.split, item.tokens, item.bytes, item.sha256) for item in reports}
    assert found == {
        (item.file, item.split, item.tokens, item.bytes, item.sha256) for item in listed
    }
    assert {item.text_bytes for item in reports} == {item.text_bytes for item in listed} != {None}
    assert [item.wrong for item in reports] == [None] * len(listed)
    monkeypatch.setattr(digests, "hash_file", lambda *_: pytest.fail("hashed again"))
    index = verifier.checked(load_index(Storage(str(folder))))
    assert verifier.never_verified(index) == []
    assert wrong(folder) == {}  # the memory does not grow
    assert len((folder / digests.NAME).read_text().splitlines()) == len(listed)


def test_each_wrong_file_is_named_and_the_rest_is_verified(folder: Path):
    flip(folder / VAL)
    with (folder / FIRST).open("ab") as file:
        file.write(b"x")
    (folder / SECOND).unlink()
    (folder / THIRD).unlink()
    (folder / THIRD).mkdir()
    shutil.copy(folder / FIRST, folder / "small_train_000999.npy")
    shutil.copy(folder / FIRST, folder / "other_train_000001.npy")  # of another corpus
    size = (folder / FIRST).stat().st_size
    found = wrong(folder)
    assert found.pop(THIRD)
    assert found == {
        FIRST: f"expected {size - 1} bytes, got {size}",
        SECOND: "the file is missing",
        "small_train_000999.npy": "it is not in the manifest",
        VAL: "its SHA-256 differs from the manifest's",
    }
    rest = {shard.file for shard in load_index(Storage(str(folder))).shards}
    assert remembered(folder) == rest - {FIRST, SECOND, THIRD} != set()
    with pytest.raises(DataError, match=rf"{VAL}: its SHA-256 differs"):  # known without reading it
        verifier.checked(load_index(Storage(str(folder))), remember=False)


def test_a_manifest_that_contradicts_its_shards(folder: Path):
    entries = {shard.file: shard for shard in load_index(Storage(str(folder))).shards}
    edit_entry(folder, FIRST, tokens=7)
    edit_entry(folder, SECOND, text_bytes=8)
    assert wrong(folder) == {
        FIRST: f"expected 7 tokens as in the manifest, got {entries[FIRST].tokens}",
        SECOND: f"expected 8 bytes of text as in the manifest, got {entries[SECOND].text_bytes}",
    }
    edit_entry(folder, FIRST, tokens=entries[FIRST].tokens)
    edit_entry(folder, SECOND, text_bytes=None)  # by an earlier version
    assert wrong(folder) == {}


def test_a_header_that_is_none(folder: Path):
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(b"\0" * 8 + content[8:])
    assert "is truncated, damaged or not a shard" in wrong(folder)[FIRST]


def test_a_file_that_cannot_be_read_is_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    read = shard_content.read

    def failing(file, name, *rest):
        if name.endswith(SECOND):
            raise OSError(5, "Input/output error")
        return read(file, name, *rest)

    monkeypatch.setattr(shard_content, "read", failing)
    assert wrong(folder) == {SECOND: "cannot be read: Input/output error"}


def test_a_file_that_changes_meanwhile_is_not_remembered(folder: Path):
    reports = Verification(Storage(str(folder))).run(lambda _: os.utime(folder / VAL))
    found = {report.file: report.wrong for report in reports if report.wrong}
    assert found == {VAL: "it has changed while it was read; verify it again"}
    assert VAL not in remembered(folder)


# Without a manifest


def test_without_a_manifest_digests_are_remembered(folder: Path):
    with_manifest = load_index(Storage(str(folder))).fingerprint()
    (folder / MANIFEST).unlink()
    assert wrong(folder) == {}
    assert verifier.checked(load_index(Storage(str(folder)))).fingerprint() == with_manifest


def test_without_a_manifest_a_file_that_is_no_shard_is_named(folder: Path):
    (folder / MANIFEST).unlink()
    (folder / "x_train_0.bin").write_bytes(b"odd")
    np.arange(1000, dtype=np.uint32).tofile(folder / "x_train_1.bin")
    found = wrong(folder)
    assert "3 bytes are not a whole number of uint16 tokens" in found.pop("x_train_0.bin")
    assert "got 32-bit numbers; write them as " in found.pop("x_train_1.bin")
    assert found == {}
    assert remembered(folder) == {path.name for path in folder.glob("*.npy")}


def test_ids_are_compared_with_the_vocabulary_of_the_data_set(tmp_path: Path):
    foreign_shards.nanogpt_characters(tmp_path)
    assert wrong(tmp_path) == {}
    size = len(load_index(Storage(str(tmp_path))).vocabulary)
    np.array([3, size, 5, size + 1], dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert wrong(tmp_path) == {
        "val.bin": f"2 token ids outside the vocabulary of {size}, first {size} at token 1"
    }


def test_decay_is_found_where_nothing_else_says_what_a_shard_holds(folder: Path):
    (folder / MANIFEST).unlink()
    assert wrong(folder) == {}
    status = (folder / FIRST).stat()
    flip(folder / FIRST)
    os.utime(folder / FIRST, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert wrong(folder) == {FIRST: verification.DECAYED}
    assert wrong(folder) == {}  # it is known as it is now, so that a resume is refused


# Every byte


def as_npy(tokens: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, tokens)
    return file.getvalue()


def as_llmc(tokens: np.ndarray) -> bytes:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.tobytes()


@pytest.mark.parametrize(
    ("name", "write", "dtype"),
    [
        ("x.npy", as_npy, np.uint16),
        ("x.npy", as_npy, np.uint32),
        ("x.bin", as_llmc, np.uint16),
        ("x.bin", lambda tokens: tokens.tobytes(), np.uint16),
    ],
)
@pytest.mark.parametrize("place", [None, 0, 1, 1983, 1984, 2047, 2048, 4096, 9998])
def test_every_token_id_of_every_format_is_looked_at(
    name: str, write: Callable[[np.ndarray], bytes], dtype: type, place: int | None, monkeypatch
):
    monkeypatch.setattr(shard_content, "CHUNK_BYTES", 4096)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 9999).astype(dtype)
    if place is not None:
        tokens[place] = VOCAB_SIZE
    content, read = write(tokens), list[int]()
    file = io.BufferedReader(io.BytesIO(content))
    found = shard_content.read(file, name, len(content), GPT2_TOKENIZER, True, read.append)
    assert found.sha256 == digests.hashlib.sha256(content).hexdigest()
    assert found.bytes == len(content)
    expected = None
    if place is not None:
        expected = f"1 token id outside the vocabulary of 50257, first 50257 at token {place:,}"
    assert found.fault(None) == expected
    assert len(read) > 3


def test_the_bytes_of_text_are_those_of_the_texts(data_root: Path):
    shard = load_index(Storage(str(data_root))).shards[0]
    text = (data_root / shard.file).read_bytes()
    found = shard_content.read(
        io.BytesIO(text), shard.file, len(text), GPT2_TOKENIZER, True, lambda _: None
    )
    assert found.text_bytes == shard.text_bytes


# Stopped, and far away


def test_what_was_verified_before_an_interrupt_stays_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    verified, before = Verification(Storage(str(folder))), threading.active_count()
    unsent = threading.Semaphore(1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def interrupt_after_two_files(_: int) -> None:
        if (folder / digests.NAME).exists() and len(remembered(folder)) > 1:
            if unsent.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGINT)
                # Python loses one that comes just before its main thread begins to wait for a lock.
                while not verified._is_stopped.wait(AGAIN_S):
                    os.kill(os.getpid(), signal.SIGINT)
            assert verified._is_stopped.wait(HANG_S)

    with pytest.raises(KeyboardInterrupt):
        verified.run(interrupt_after_two_files)
    wait_until(lambda: threading.active_count() == before)
    assert 2 <= len(remembered(folder)) < len(list(folder.glob("*.npy"))) - 1
    assert wrong(folder) == {}


def test_a_remote_storage_is_read_and_nothing_remembered(folder: Path):
    url = f"file://{folder}"
    assert wrong(url) == {}
    flip(folder / VAL)
    (folder / SECOND).unlink()
    shutil.copy(folder / FIRST, folder / "small_train_000999.npy")
    assert wrong(url) == {
        SECOND: "the file is missing",
        "small_train_000999.npy": "it is not in the manifest",
        VAL: "its SHA-256 differs from the manifest's",
    }
    assert not (folder / digests.NAME).exists()
