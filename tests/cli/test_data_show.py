"""`gpt2 data show`: what it prints of shards, rows, steps and documents."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gpt2.cli import main
from gpt2.data import tokenizer
from gpt2.data.loader import MicroBatch
from gpt2.train import trainer
from gpt2.train.state import Update
from support import small_config

MARK = tokenizer.END_OF_TEXT
LINE = "--- <|endoftext|> ---"


def show(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2", "data", "show", *map(str, arguments)])
    return main.main()


def shown(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: object) -> str:
    assert show(monkeypatch, *arguments) == 0
    printed: str = capsys.readouterr().out
    return printed


def shown_json(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: object) -> Any:
    return json.loads(shown(monkeypatch, capsys, *arguments, "--json"))


def write_shards(folder: Path, *texts: str) -> Path:
    """A shard of each text, without a manifest; the first one is for validation."""
    folder.mkdir()
    for number, text in enumerate(texts):
        tokens = np.array([MARK, *tokenizer.encode(text)], np.uint16)
        np.save(folder / f"mine_{'train' if number else 'val'}_{number}.npy", tokens)
    return folder


def test_the_table_and_the_beginning_of_a_shard(data_root: Path, monkeypatch, capsys):
    printed = shown(monkeypatch, capsys, data_root, "--shard", 0)
    manifest = json.loads((data_root / "manifest.json").read_text())
    first = manifest["shards"][0]
    ratio = f"{first['text_bytes'] / first['tokens']:.2f}"
    line = next(line for line in printed.splitlines() if first["file"] in line)
    assert line.split() == ["0", "val", "8,000", "0.0", "MB", ratio, first["file"]]
    assert f"Shard 0 begins with:\n{LINE}" in printed
    assert "\n# Copyright 2007 Google" in printed

    found = shown_json(monkeypatch, capsys, data_root, "--tokens", 7)
    assert [item["file"] for item in found["shards"]] == [s["file"] for s in manifest["shards"]]
    assert found["shards"][0]["text_bytes"] == first["text_bytes"]
    tokens = np.load(data_root / "small_train_000001.npy")[:7].tolist()
    assert found["excerpt"] == {
        "shard": 1,
        "file": "small_train_000001.npy",
        "first_token": 0,
        "tokens": 7,
        "pieces": [{"is_beginning": False, "text": tokenizer.decode(tokens)}],
    }


def test_a_row_is_that_of_training(data_root: Path, monkeypatch, capsys):
    flags = (data_root, "--shard", 2, "--row", 5, "--block_size", 30)
    found = shown_json(monkeypatch, capsys, *flags)
    tokens = np.load(data_root / "small_train_000002.npy")[150:180].tolist()
    assert "".join(piece["text"] for piece in found["excerpt"]["pieces"]) == tokenizer.decode(
        tokens
    )
    assert (found["row"], found["excerpt"]["first_token"]) == (5, 150)
    printed = shown(monkeypatch, capsys, *flags)
    assert printed.startswith("=== row 5 of shard 2, small_train_000002.npy\n")


@pytest.fixture
def batches_of_run(monkeypatch: pytest.MonkeyPatch):
    """Runs a training whose updates compute nothing; returns the inputs that its loader gave."""

    def run(*arguments: Any, **changes: object) -> list[list[list[int]]]:
        inputs: list[list[list[int]]] = []

        def train_step(_: object, micros: Sequence[MicroBatch], *__: object) -> Update:
            inputs.append([row for tokens, _ in micros for row in tokens.tolist()])
            return Update(1.0, 1.0, True, False, None, 1.0, [1.0], [{}])

        monkeypatch.setattr(trainer, "train_step", train_step)
        trainer.run(small_config(*arguments, **changes))
        return inputs

    return run


@pytest.mark.parametrize("shuffle", ["shards", "rows", "global", "none"])
def test_a_step_shows_the_rows_that_a_run_trains_on(
    shuffle: str, data_root: Path, tmp_path: Path, batches_of_run, monkeypatch, capsys
):
    """In the first epoch, in later ones, and where two meet."""
    order = {"block_size": 64, "total_batch_size": 64 * 70, "seed": 7, "shuffle": shuffle}
    off = dict.fromkeys(["eval_interval", "checkpoint_interval"])
    batches = batches_of_run(data_root, tmp_path, **order, **off, max_steps=24, window=8)
    assert len(batches) == 24
    capsys.readouterr()
    config = tmp_path / "run.toml"
    config.write_text("[data]\nshuffle = '{shuffle}'\ntotal_batch_size = 4480\n".format(**order))
    flags = ("--preset", "demo", "--config", config, "--block_size", 64, "--seed", 7)

    rows_of = [(np.load(path).size - 1) // 64 for path in data_root.glob("*train*.npy")]
    first, second = (epoch * sum(rows_of) // 70 for epoch in (1, 2))  # steps in which one ends
    epochs = []
    for step in (0, first, first + 1, second, second + 1):
        rows = batches[step]
        found = shown_json(monkeypatch, capsys, data_root, "--step", step, "--rows", 99, *flags)
        assert {name: found[name] for name in order} == order
        texts = [
            "".join("<|endoftext|>" * piece["is_beginning"] + piece["text"] for piece in pieces)
            for pieces in (excerpt["pieces"] for excerpt in found["excerpts"])
        ]
        assert texts == [tokenizer.decode(row) for row in rows]
        files = [np.load(data_root / excerpt["file"]) for excerpt in found["excerpts"]]
        for place, file, row in zip(found["rows"], files, rows, strict=True):
            assert file[place["row"] * 64 :][:64].tolist() == row
        assert [excerpt["shard"] for excerpt in found["excerpts"]] == [
            place["shard"] for place in found["rows"]
        ]
        epochs.append(found["epochs"])
    assert epochs == [[0], [0, 1], [1], [1, 2], [2]]


def test_a_step_is_printed_as_runs_of_rows(data_root: Path, monkeypatch, capsys):
    flags = ("--block_size", 64, "--total_batch_size", 64 * 130, "--step", 0, "--rows", 1)
    printed = shown(monkeypatch, capsys, data_root, *flags)
    assert printed.startswith("After 0 updates, a run with --block_size 64 --total_batch_size 8320")
    assert "--seed 1337 --shuffle shards trains on 130 rows of epoch 0." in printed
    assert [line.split() for line in printed.splitlines()[5:7]] == [
        ["1", "0", "123", "124"],
        ["2", "0", "5", "6"],
    ]
    assert printed.count("\n=== row ") == 1


def test_a_step_of_a_ramp_is_shown_with_its_rows(data_root: Path, monkeypatch, capsys):
    flags = ("--block_size", 64, "--total_batch_size", 64 * 130, "--rows", 0)
    ramp = ("--batch_ramp", f"2:{64 * 10}", f"4:{64 * 100}")
    printed = shown(monkeypatch, capsys, data_root, *flags, "--step", 2, *ramp)
    assert "--total_batch_size 8320 --batch_ramp 2:640 4:6400 --seed 1337" in printed
    first = shown_json(monkeypatch, capsys, data_root, *flags, "--step", 0)["rows"]
    second = shown_json(monkeypatch, capsys, data_root, *flags, "--step", 2, *ramp)["rows"]
    assert second == first[20:120]


def test_statistics(tmp_path: Path, monkeypatch, capsys):
    folder = write_shards(
        tmp_path / "mine", "A title\n\x1b[2Jtext", "A title\nwords", "A title\nwords"
    )
    picture = tmp_path / "lengths.png"
    flags = (folder, "--stats", "--block_size", 4, "--plot", picture)
    found = shown_json(monkeypatch, capsys, *flags)
    assert found["splits"] == ["val", "train"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    numbers = found["statistics"]
    assert numbers["lengths"]["documents"] == 3
    assert numbers["lengths"]["block_size"] == 4
    assert numbers["duplicate_documents"] == pytest.approx(1 / 3)
    assert numbers["first_lines"] == [{"line": "A title", "documents": 3}]

    printed = shown(monkeypatch, capsys, *flags)
    rows = [line.split() for line in printed.splitlines()]
    assert ["documents", "3"] in rows
    same = next(row for row in rows if row[:1] == ["equal"])
    assert same[4:] == ["document", "33.33%", "of", "documents,", "25.00%", "of", "tokens"]
    assert ["4", "to", "7", "2", "█" * 40] in rows
    assert ["3", "A", "title"] in rows

    of_one_token = write_shards(tmp_path / "short", "a", "a", "b")
    printed = shown(monkeypatch, capsys, of_one_token, "--stats", "--block_size", 1)
    assert ["shortest", "document", "1", "token"] in map(str.split, printed.splitlines())

    train = shown_json(monkeypatch, capsys, folder, "--stats", "--split", "train")
    assert train["splits"] == ["train"]
    assert train["statistics"]["lengths"]["documents"] == 2


def test_control_characters_of_a_text_are_visible(tmp_path: Path, monkeypatch, capsys):
    text = "a\x1b[31mred\x07\x9b\r\n\tb\xa0日本\n"
    folder = write_shards(tmp_path / "mine", "val", text)
    printed = shown(monkeypatch, capsys, folder)
    assert "\na\\x1b[31mred\\x07\\x9b\\x0d\n\tb\xa0日本\n" in printed
    found = shown_json(monkeypatch, capsys, folder)
    assert found["excerpt"]["pieces"] == [{"is_beginning": True, "text": text}]


@pytest.mark.parametrize("root", ["{}", "{}/*.npy", "memory://{}"])
def test_a_folder_a_glob_and_a_url_show_the_same(root: str, tmp_path: Path, monkeypatch, capsys):
    folder = write_shards(tmp_path / "mine", "a text for validation", "a text to train on " * 9)
    for path in folder.iterdir():
        MemoryFileSystem().pipe(f"{path}", path.read_bytes())
    order = ("--block_size", 8, "--total_batch_size", 16)
    views = [(), ("--row", 2, *order), ("--step", 3, *order), ("--stats", *order)]
    for view in views:
        here, found = (
            shown_json(monkeypatch, capsys, place, *view) for place in (folder, root.format(folder))
        )
        assert found.pop("root") == root.format(folder)
        assert here.items() >= found.items()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--shard 2", "shard=2 is not in the table; expected 0 to 1"),
        ("--shard -1", "shard=-1 is too small; expected 0 or more"),
        ("--row 4 --block_size 8", "row=4 is not in shard 0; expected 0 to 3 with block_size=8"),
        (
            "--row 0",
            "shard 0 has 39 tokens, too few for one row of block_size=1024 and its target;",
        ),
        ("--row -1", "row=-1 is too small; expected 0 or more"),
        ("--step 0", "mine_train_1.npy has 39 tokens, too few for one row of block_size=1024"),
        ("--step -1", "step=-1 is too small; expected 0 or more"),
        (
            "--step 1000000000000 --block_size 1 --total_batch_size 1000000000000",
            "step=1000000000000 is too large; expected 0 to 4611686",
        ),
        ("--step 0 --block_size 7", "total_batch_size=524288 is not a multiple of block_size=7"),
        ("--step 0 --config nowhere.toml", "cannot read --config nowhere.toml: No such file"),
        ("--block_size 0 --row 1", "block_size=0 is too small; expected 1 or more"),
        ("--stats --step 1", "use either --step or --stats"),
        ("--stats --shard 1", "use either --shard or --stats"),
        ("--plot a.png", "--plot is for statistics; add --stats"),
        ("--split val", "--split is for statistics; add --stats"),
        (
            "--stats --plot a.gif",
            "expected a .png, .svg, .pdf file, got a.gif; use --plot NAME.png",
        ),
        ("--stats --plot no/a.png", "cannot write no/a.png: No such file or directory; choose"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    flags: str, message: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = write_shards(tmp_path / "mine", "val", "a text " * 18 + "\n")
    assert show(monkeypatch, folder, *flags.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


def test_a_data_set_without_training_shards(tmp_path: Path, monkeypatch, capsys):
    folder = write_shards(tmp_path / "mine", "a text")
    assert "a text" in shown(monkeypatch, capsys, folder)
    assert show(monkeypatch, folder, "--step", 0) == 2
    assert "has no train shard" in capsys.readouterr().err
