"""A name is a name: training data in folders and files whose names hold wildcards and colons."""

import os
import shlex
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gpt2.base.errors import DataError
from gpt2.data import hints, verifier
from gpt2.data.cache import ShardCache
from gpt2.data.manifest import Manifest
from gpt2.data.remote import Storage
from gpt2.data.shards import TokenDataset, load_index
from gpt2.train import dataset

NAMES = (
    "w[1]",
    "[!x]",
    "a*",
    "a?",
    "**",
    "a::b",
    "zip::a",
    "s3:x",
    "file:x",
    "local:x",
    "~nobody",
    "100%20 #1",
    'it\'s "so"',
    "wörter",
    "w\udcff",  # a byte that is not UTF-8
)
DECOYS = ("w1", "y", "ax", "b", "x", "a", "100 ", "w[1]x")


def write(folder: Path, first: int) -> None:
    """A training shard of tokens from `first` on, and a validation shard."""
    folder.mkdir(parents=True, exist_ok=True)
    np.arange(first, first + 100, dtype="<u2").tofile(folder / "train.bin")
    np.arange(first, first + 20, dtype="<u2").tofile(folder / "val.bin")


def first_token(root: str, cache: Path | None = None) -> int:
    """The first training token of a run with this --data_root, after the checks of a run."""
    index = load_index(Storage(root), cache and ShardCache(cache))
    index = verifier.checked(index, remember=False)
    inputs, _ = TokenDataset(index, "train", 4).read(np.array([[0, 0]]))
    TokenDataset(index, "val", 4)
    return int(inputs[0, 0])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a data set in each folder that a pattern could mistake for one."""
    monkeypatch.chdir(tmp_path)
    for name in DECOYS:
        write(Path(name), 7)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_read_whatever_its_name(here: Path, name: str):
    write(Path(name, "part"), 1000)
    assert first_token(name) == 1000
    assert first_token(f"{name}/part/") == 1000
    assert first_token(f"{here}/{name}/part") == 1000
    assert first_token(f"{name}/*/[tv]*.bin") == 1000
    assert first_token(f"{here}/{name}/*/*.bin") == 1000
    os.chdir(name)
    assert first_token("part") == 1000
    assert first_token("p?rt/*.bin") == 1000
    assert first_token(".") == first_token("**/*.bin") == 1000
    write(Path(name), 2000)
    assert first_token(name) == 2000


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_whatever_its_name(here: Path, name: str):
    for split, shard in (("train", 1000), ("val", 1)):
        np.arange(shard, shard + 100, dtype="<u2").tofile(Path(f"{name}.{split}.bin"))
        Path("mine").mkdir(exist_ok=True)
        shutil.copy(f"{name}.{split}.bin", "mine")
    assert first_token("mine") == 1000
    assert first_token("./*.bin") == 1000
    [train] = load_index(Storage("mine")).of("train")
    assert train.file == f"{name}.train.bin"


@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_folder_is_used_whatever_its_name(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_root, name)
    storage = Storage(name)
    assert Manifest.read(storage) == Manifest.read(Storage(str(data_root)))
    assert load_index(storage).has_manifest
    assert first_token(name) == first_token(str(data_root))


def test_a_pattern_is_what_does_not_exist(here: Path):
    """Only from the first component on that does not exist as it is written."""
    assert first_token("w[1]/*.bin") == 7  # matches w1
    write(Path("w[1]"), 1000)
    assert first_token("w[1]/*.bin") == 1000
    shutil.rmtree("w[1]")
    with pytest.raises(DataError, match=r"^no file matches w\[1\]; for .* 'w\[1\]/\*'$"):
        load_index(Storage("w[1]"))


def test_the_root_folder_is_not_the_working_folder(here: Path):
    assert Storage("/").full("x") == "/x"
    assert Storage("/*.bin").folder == "/"
    assert Storage("/*.bin").files().keys() == {path.name for path in Path("/").glob("*.bin")}
    assert Storage("file:///*.bin").files() == Storage("/*.bin").files()


def test_two_dots_follow_a_link(here: Path):
    """The folder above a linked one is that of its target."""
    write(Path("far/above"), 1000)
    write(Path("above"), 7)
    Path("far/away").mkdir()
    Path("link").symlink_to("far/away")
    assert first_token("link/../above") == 1000


def test_a_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(here / "w1"))
    assert first_token("~") == 7
    write(Path("w1/mine"), 1000)
    assert first_token("~/mine") == first_token("~/m*/*.bin") == 1000


def test_what_is_no_shard_of_the_folder(here: Path):
    """What macOS and file managers leave behind, and what is not a file."""
    np.zeros(2048, dtype="<u2").tofile("w1/._train.bin")
    write(Path("w1/.Trash"), 50)
    os.mkfifo("w1/train")
    Path("w1/train_3.bin").mkdir()
    assert [shard.file for shard in load_index(Storage("w1")).shards] == ["train.bin", "val.bin"]
    Path("w1/train_4.bin").symlink_to(here / "ax" / "train.bin")
    assert len(load_index(Storage("w1")).of("train")) == 2
    os.mkfifo("w1/train_2.bin")
    with pytest.raises(
        DataError, match=r"w1/train_2\.bin cannot be read: it is not a regular file"
    ):
        load_index(Storage("w1"))


@pytest.mark.parametrize("name", ["w[1]", "a b?", "100%"])
def test_a_remote_folder_is_read_whatever_its_name(tmp_path: Path, name: str):
    bucket = fsspec.filesystem("memory")
    for folder, first in ((name, 1000), ("w1", 7), ("a bc", 7)):
        for split in ("train", "val"):
            tokens = np.arange(first, first + 100, dtype="<u2")
            bucket.pipe(f"/bucket/{folder}/x[1]_{split}.bin", tokens.tobytes())
    try:
        for place in (name, f"{name}/*.bin", f"{name}/**/*_*.bin"):
            assert first_token(f"memory://bucket/{place}", tmp_path) == 1000
    finally:
        bucket.store.clear()


@pytest.mark.parametrize("name", NAMES)
def test_a_corpus_is_prepared_in_a_folder_of_any_name(here: Path, name: str):
    Path(name).mkdir()
    storage = Storage(f"{name}/python_stdlib")
    assert dataset.to_prepare(storage)
    assert storage.path == Path(name, "python_stdlib")


def test_printed_commands_can_be_typed(here: Path):
    folder = Path("my data/it's [1]; rm -rf x/mine")
    with pytest.raises(DataError) as caught:
        load_index(Storage(str(folder)))
    assert str(caught.value).startswith("no file matches my data")
    command = hints.prepare_command(folder).partition(" (")[0]
    assert shlex.split(command) == ["gpt2", "data", "NAME", "--out", str(folder)]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("", "the name of the training data is empty"),
        ("w1/none", r"no training data in w1/none; make it with: gpt2 data NAME --out w1/none"),
        ("w[1]/none", r"no file matches w\[1\]/none"),
        ("mine::none", r"no training data in mine::none; make it with"),
        ("nowhere/**y", r"no file matches nowhere/\*\*y"),
        ("w1/**y", r"w1/\*\*y cannot be read: ValueError: Invalid pattern"),
        ("zip::[1]", r"no file matches zip::\[1\]"),
        ("zip://*.bin::none.zip", r"zip://\*\.bin::none\.zip cannot be (read|opened): "),
        ("a" * 5000, "File name too long|no training data in"),
    ],
)
def test_what_does_not_exist_is_one_line(here: Path, root: str, message: str):
    with pytest.raises(DataError, match=message) as caught:
        load_index(Storage(root))
    assert str(caught.value).isprintable()


def test_a_file_is_not_a_folder(here: Path):
    with pytest.raises(DataError, match=r"got the file w1/train\.bin; name its folder"):
        load_index(Storage("w1/train.bin"))
