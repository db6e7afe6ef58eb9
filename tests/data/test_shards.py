import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt2.base.errors import DataError
from gpt2.data.manifest import Manifest, Shard
from gpt2.data.remote import Storage
from gpt2.data.sampler import Sampler, Shuffle, micro_batches
from gpt2.data.shards import DatasetIndex, TokenDataset, load_index


@pytest.fixture
def copy(data_root: Path, tmp_path: Path) -> Path:
    """The small corpus, to be damaged."""
    return Path(shutil.copytree(data_root, tmp_path / "small"))


def local(folder: Path) -> DatasetIndex:
    return load_index(Storage(str(folder)))


def open_train(folder: Path, block_size: int = 32) -> TokenDataset:
    return TokenDataset(local(folder), "train", block_size)


def plain_loop(folder: Path, block_size: int, shard_order: list[int]) -> list[list[int]]:
    """All rows of the training shards in this order, each block_size + 1 tokens."""
    files = sorted(folder.glob("*_train_*.npy"))
    rows = []
    for shard in shard_order:
        tokens = np.load(files[shard]).tolist()
        start = 0
        while start + block_size + 1 <= len(tokens):
            rows.append(tokens[start : start + block_size + 1])
            start += block_size
    return rows


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_two_epochs_of_tokens_are_those_of_a_plain_loop(data_root: Path, world_size: int):
    dataset = open_train(data_root)
    sampler = Sampler(dataset.rows_per_shard, rows_per_step=7, seed=3)
    expected = [
        row
        for epoch in range(3)
        for row in plain_loop(data_root, 32, sampler.corpora[0].shards_of(epoch).tolist())
    ]
    steps = -(-2 * sampler.rows_per_epoch // sampler.rows_per_step)
    seen: list[list[int]] = []
    for step in range(steps):
        for rank in range(world_size):
            for micro in micro_batches(sampler.rows(step, rank, world_size), 2):
                inputs, targets = dataset.read(micro)
                assert inputs.shape == targets.shape == (len(micro), 32)
                assert np.array_equal(inputs[:, 1:], targets[:, :-1])
                joined = np.concatenate([inputs, targets[:, -1:]], axis=1)
                seen += joined.tolist()
    assert len(dataset.shards) > 1
    assert seen == expected[: len(seen)]
    assert len(seen) >= 2 * sampler.rows_per_epoch


@pytest.mark.parametrize("shuffle", ["shards", "rows", "global"])
def test_rows_are_read_in_whatever_order_they_are_asked_for(data_root: Path, shuffle: Shuffle):
    dataset = TokenDataset(local(data_root), "train", 32, shuffle)
    rows = Sampler(dataset.rows_per_shard, 60, seed=3, shuffle="global").rows(0)
    shards = [plain_loop(data_root, 32, [shard]) for shard in range(len(dataset.shards))]
    inputs, targets = dataset.read(rows)
    assert np.count_nonzero(np.diff(rows[:, 0])) > 30
    for (shard, row), input_tokens, target_tokens in zip(rows, inputs, targets, strict=True):
        assert [*input_tokens, target_tokens[-1]] == shards[shard][row]


def test_a_disk_that_takes_no_advice_is_read(data_root: Path, monkeypatch: pytest.MonkeyPatch):
    dataset, rows = TokenDataset(local(data_root), "train", 32, "rows"), np.array([[1, 2], [0, 3]])
    expected = open_train(data_root).read(rows)
    asked = []

    def refused(handle: int, *_: int) -> None:
        asked.append(handle)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refused)
    assert np.array_equal(dataset.read(rows), expected)
    assert len(asked) == 2


def test_a_change_of_world_size_does_not_change_the_tokens(data_root: Path):
    dataset = open_train(data_root)
    sampler = Sampler(dataset.rows_per_shard, rows_per_step=7, seed=3)

    def tokens(step: int, world_size: int) -> list[list[int]]:
        parts = [
            dataset.read(sampler.rows(step, rank, world_size))[0] for rank in range(world_size)
        ]
        return np.concatenate(parts).tolist()

    alone = [tokens(step, 1) for step in range(9)]
    changing = [
        tokens(step, world_size) for step, world_size in enumerate((1, 1, 2, 2, 4, 3, 3, 1, 1))
    ]
    assert changing == alone


@pytest.mark.parametrize("shard", [0, -1])
def test_fingerprint_is_that_of_the_content_of_both_splits(data_root: Path, copy: Path, shard: int):
    values = json.loads((copy / "manifest.json").read_text())
    for number, entry in enumerate(values["shards"]):  # names do not matter
        renamed = f"other_{entry['split']}_{number:06d}.npy"
        (copy / entry["file"]).rename(copy / renamed)
        entry["file"] = renamed
    (copy / "manifest.json").write_text(json.dumps(values))
    assert local(data_root).fingerprint() == local(copy).fingerprint()
    values["shards"][shard]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(values))
    assert local(data_root).fingerprint() != local(copy).fingerprint()


def test_missing_folder_names_the_command_that_makes_it():
    with pytest.raises(DataError, match=r"make it with: gpt2 data fineweb-edu$"):
        local(Path("data/fineweb_edu"))
    with pytest.raises(DataError, match="gpt2 data python-stdlib --out /nowhere/python_stdlib"):
        local(Path("/nowhere/python_stdlib"))
    with pytest.raises(DataError, match="gpt2 data NAME --out /nowhere/mine"):
        local(Path("/nowhere/mine"))


def test_an_unfinished_folder_names_the_command_that_continues(copy: Path):
    (copy / "manifest.json").unlink()
    (copy / "progress.json").write_text('{"command": "gpt2 data files x.txt --out there"}')
    with pytest.raises(
        DataError, match=r"unfinished: .* continue with: gpt2 data files x.txt --out"
    ):
        local(copy)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"shards": [{"file": 1}]}'])
def test_damaged_manifest(copy: Path, text: str):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json cannot be read.*--overwrite"):
        Manifest.read(Storage(str(copy)))


def test_another_tokeniser_is_refused(copy: Path):
    values = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(values | {"tokenizer": "cl100k"}))
    with pytest.raises(
        DataError, match=r"expected tokens of gpt2, got tokens of cl100k; .*--overwrite"
    ):
        local(copy)


def test_truncated_shard_is_named(copy: Path):
    victim = sorted(copy.glob("*_train_*.npy"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(
        DataError, match=rf"{victim.name} is truncated, damaged or not a shard .*--overwrite"
    ):
        open_train(copy)


def test_shard_of_another_length_or_type_is_named(copy: Path):
    victim = sorted(copy.glob("*_train_*.npy"))[0]
    tokens = np.load(victim)
    np.save(victim, tokens[:-1])
    with pytest.raises(
        DataError, match=rf"{victim.name}: expected .* as in the manifest, got .*--overwrite"
    ):
        open_train(copy)
    np.save(victim, tokens.astype(np.int32))
    with pytest.raises(
        DataError,
        match=rf"{victim.name} is .*expected a 1-dimensional .* got 1 dimensions of int32",
    ):
        open_train(copy)


def test_missing_shard_is_named(copy: Path):
    victim = sorted(copy.glob("*_train_*.npy"))[0]
    victim.unlink()
    with pytest.raises(
        DataError, match=rf"{victim.name} is in the manifest, but the file is missing"
    ):
        open_train(copy)


def test_context_longer_than_a_shard(data_root: Path):
    with pytest.raises(
        DataError, match=r"000001.npy has 8,000 tokens, too few for one row of block_size=9000"
    ):
        open_train(data_root, block_size=9000)


OUTSIDE = ("../secret.npy", "/secret.npy", "a/../../secret.npy", "..", "%2e%2e/secret.npy")


@pytest.mark.parametrize("file", OUTSIDE)
def test_names_in_a_manifest_do_not_leave_its_folder(copy: Path, file: str):
    shutil.copy(copy / "small_train_000001.npy", copy.parent / "secret.npy")
    values = json.loads((copy / "manifest.json").read_text())
    values["shards"][1]["file"] = file.replace("/secret", f"{copy.parent}/secret", file[0] == "/")
    (copy / "manifest.json").write_text(json.dumps(values))
    expected = r"manifest\.json lists \S*, which is outside its folder; put it back"
    with pytest.raises(DataError, match=expected):
        local(copy)
    with pytest.raises(DataError, match=r"lists .* outside its folder"):
        Shard(**values["shards"][1]).require_inside(None, "s3://bucket/manifest.json")


@pytest.mark.parametrize("file", ["a\0b.npy", "\ud800.npy"])
def test_names_in_a_manifest_that_no_file_has(tmp_path: Path, file: str):
    with pytest.raises(DataError, match=r"lists '.*', which no file can be called") as caught:
        Shard(file, "train", 1, 1, None).require_inside(tmp_path, "manifest.json")
    assert str(caught.value).isprintable()


def test_links_of_a_manifest_do_not_leave_its_folder(copy: Path):
    victim, secret = copy / "small_train_000002.npy", copy.parent / "secret.npy"
    victim.rename(secret)
    victim.symlink_to(secret)
    with pytest.raises(DataError, match=rf"{victim.name}, which is a link out .*, to {secret}; "):
        local(copy)
    victim.unlink()
    (copy / "elsewhere").symlink_to(copy.parent)
    values = json.loads((copy / "manifest.json").read_text())
    values["shards"][2]["file"] = "elsewhere/secret.npy"
    (copy / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"elsewhere/secret\.npy, which is a link out"):
        local(copy)
    secret.rename(copy / "inside.npy")
    victim.symlink_to("inside.npy")
    values["shards"][2]["file"] = victim.name
    (copy / "manifest.json").write_text(json.dumps(values))
    (copy.parent / "link").symlink_to(copy)  # the folder itself may be a link
    assert open_train(copy.parent / "link").rows_per_shard == open_train(copy).rows_per_shard


# Shards without a manifest

TOKENS = np.arange(1000, dtype=np.uint16) * 7


def write_llmc(path: Path, tokens: np.ndarray, **changes: int) -> None:
    """As llm.c's data scripts and modded-nanogpt write it."""
    header = np.zeros(256, dtype=np.int32)
    header[0] = changes.get("magic", 20240520)
    header[1] = changes.get("version", 1)
    header[2] = changes.get("count", len(tokens))
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(np.uint16).tobytes())


def write_raw(path: Path, tokens: np.ndarray) -> None:
    """As nanoGPT's prepare.py writes it."""
    tokens.astype(np.uint16).tofile(path)


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (write_llmc, ("corpus_val_000000.bin", "corpus_train_000001.bin")),
        (write_raw, ("val.bin", "train.bin")),
        (lambda path, tokens: np.save(path, tokens), ("a-val.npy", "a-train.npy")),
        (
            lambda path, tokens: np.save(path, tokens.astype(np.uint32)),
            ("val/0.npy", "train/0.npy"),
        ),
    ],
)
def test_formats_of_other_programs(tmp_path: Path, write, names):
    root = tmp_path / "my_train_data"  # a split's name in the folder must not count
    for name, tokens in zip(names, (TOKENS[:100], TOKENS), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write(root / name, tokens)
    (root / "training_notes.bin").write_bytes(b"neither")
    found = local(root)
    assert (found.tokens("train"), found.tokens("val")) == (1000, 100)
    inputs, targets = TokenDataset(found, "train", 10).read(np.array([[0, 0], [0, 98]]))
    assert inputs.tolist() == [TOKENS[:10].tolist(), TOKENS[980:990].tolist()]
    assert targets.tolist() == [TOKENS[1:11].tolist(), TOKENS[981:991].tolist()]
    by_glob = local(root / "**" / f"*{Path(names[0]).suffix}")
    assert by_glob.ends == found.ends


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: write_llmc(path, TOKENS, count=999),
            "header says 999 tokens, the file has 1000",
        ),
        (
            lambda path: write_llmc(path, TOKENS, version=2),
            "expected version 1 of llm.c's format, got 2",
        ),
        (lambda path: path.write_bytes(np.int32(20240520).tobytes()), "its header is incomplete"),
        (lambda path: path.write_bytes(np.int32([20240520, 1]).tobytes()[:6]), "its header is inc"),
        (lambda path: path.write_bytes(b"odd"), "3 bytes are not a whole number of uint16"),
        (lambda path: path.write_bytes(b""), "0 bytes are not a whole number"),
    ],
)
def test_damaged_bin_is_named(tmp_path: Path, write, message: str):
    write(tmp_path / "x_train_0.bin")
    with pytest.raises(DataError, match=rf"x_train_0\.bin is truncated, damaged .*{message}"):
        local(tmp_path)


def test_ids_outside_the_vocabulary_are_named(tmp_path: Path):
    write_raw(tmp_path / "train.bin", np.full(100, 60000))
    with pytest.raises(DataError, match=r"train\.bin holds the token id 60000, outside"):
        TokenDataset(local(tmp_path), "train", 10)


def test_a_folder_without_one_split_says_how_files_are_named(tmp_path: Path):
    write_raw(tmp_path / "train.bin", TOKENS)
    with pytest.raises(
        DataError, match="has no val shard; its file names must have 'val' as a word"
    ):
        TokenDataset(local(tmp_path), "val", 10)


def test_only_a_last_shard_may_be_too_short_for_a_row(tmp_path: Path):
    for number, count in enumerate((50, 5)):
        write_raw(tmp_path / f"train_{number}.bin", TOKENS[:count])
    assert TokenDataset(local(tmp_path), "train", 10).rows_per_shard == (4, 0)
    write_raw(tmp_path / "train_2.bin", TOKENS[:50])
    with pytest.raises(DataError, match=r"train_1\.bin has 5 tokens, too few for one row"):
        TokenDataset(local(tmp_path), "train", 10)


def test_unknown_fields_of_a_later_version_are_ignored_with_a_warning(copy: Path, caplog):
    expected = local(copy)
    values = json.loads((copy / "manifest.json").read_text()) | {"language": "en"}
    values["shards"] = [shard | {"crc": 1} for shard in values["shards"]]
    (copy / "manifest.json").write_text(json.dumps(values))
    assert local(copy) == expected
    assert [message.rpartition("ignored")[2] for message in caplog.messages] == [
        " unknown fields of Shard: crc",
        " unknown fields of Manifest: language",
    ]
