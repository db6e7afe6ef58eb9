import json
import shutil
import sys
from pathlib import Path

import pytest

from gpt2.cli import main


def data(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2", "data", *arguments])
    return main.main()


def test_data_is_verified(tmp_path: Path, data_root: Path, monkeypatch, capsys):
    assert data(monkeypatch, "verify", str(data_root)) == 0
    assert "shards match the manifest" in capsys.readouterr().out

    broken = Path(shutil.copytree(data_root, tmp_path / "small"))
    with (broken / "small_train_000001.npy").open("ab") as file:
        file.write(b"x")
    assert data(monkeypatch, "verify", str(broken)) == 2
    error = capsys.readouterr().err
    assert "error: 1 of " in error
    assert "small_train_000001.npy: expected 16128 bytes, got 16129" in error


def test_files_become_a_corpus(tmp_path: Path, monkeypatch, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 500)
    out = tmp_path / "data" / "mine"
    pattern = str(tmp_path / "*.txt")
    flags = ("files", pattern, "--out", str(out), "--shard_tokens", "400", "--workers", "1")
    assert data(monkeypatch, *flags) == 0
    printed = capsys.readouterr().out
    assert "2 documents of 2 files, 0 of them empty, 0 with bytes that are not UTF-8" in printed
    assert f"Train on it with --data_root {out}" in printed
    assert (out / "mine_val_000000.npy").exists()
    assert data(monkeypatch, "show", str(out), "--shard", "0") == 0
    assert "one one one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["fineweb-ed"], "unknown corpus fineweb-ed; did you mean fineweb-edu"),
        (["python-stdlib", "--shard_tokens", "1"], "shard_tokens=1 is too small"),
        (["files", "nowhere/*.txt"], "no file matches nowhere/*.txt"),
        (["files"], "no files given"),
        (["verify", "nowhere"], "no training data in nowhere"),
    ],
)
def test_wrong_data_commands_are_one_line(monkeypatch, capsys, flags, message):
    assert data(monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("how", ["--streaming", "--no_streaming"])
def test_a_local_data_set_through_the_hub_command(monkeypatch, capsys, tmp_path: Path, how: str):
    """The loading code of the hub, on a folder; a tenth of a small corpus is for validation."""
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"body": f"text number {number}"}) + "\n" for number in range(100)]
    (tmp_path / "set" / "train.jsonl").write_text("".join(lines))
    flags = ("--text_field", "body", how, "--out", str(tmp_path / "out"), "--workers", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert data(monkeypatch, "hf", str(tmp_path / "set"), *flags) == 0
    printed = capsys.readouterr().out
    assert "100 documents, 0 of them empty" in printed
    train, val = (
        next(int(line.split()[2]) for line in printed.splitlines() if line.split()[:1] == [split])
        for split in ("train", "val")
    )
    assert val == (train + val) // 10


def test_bad_lines_up_to_a_limit(tmp_path: Path, monkeypatch, capsys):
    """The shards that were written before the refusal are used by the command that it names."""
    lines = [json.dumps({"text": f"text number {number}"}) for number in range(400)]
    lines[300:302] = ["broken", "[]"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    out = tmp_path / "out"
    flags = ("files", str(path), "--out", str(out), "--workers", "1", "--shard_tokens", "500")
    assert data(monkeypatch, *flags) == 2
    printed = capsys.readouterr()
    assert f"{path}:301: invalid JSON" in printed.err
    assert f"{path}:302: expected a JSON object, got an array: left out" in printed.err
    assert "2 of 400 lines cannot be read, such as" in printed.err
    assert "--max_bad_lines 0.005 (now 0.001)" in printed.err
    assert not (out / "manifest.json").exists()
    assert data(monkeypatch, *flags, "--max_bad_lines", "0.005") == 0
    assert "398 documents of 1 file" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["bad_lines"] == 2


def test_a_clearly_wrong_corpus_is_refused_before_its_end(tmp_path: Path, monkeypatch, capsys):
    good, bad = json.dumps({"text": "x " * 100}), json.dumps({"body": "x " * 100})
    (tmp_path / "a.jsonl").write_text("\n".join([good] + [bad] * 5000 + ['{"text": 1}']))
    flags = ("files", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1")
    assert data(monkeypatch, *flags) == 2
    assert "lines cannot be read" in capsys.readouterr().err  # not the number at the end
