import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from gpt2.cli import data_verify, main
from gpt2.data.verification import Verification
from small_tokenizers import trained


def data(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2", "data", *arguments])
    return main.main()


def test_data_is_verified(tmp_path: Path, data_root: Path, monkeypatch, capsys):
    assert data(monkeypatch, "verify", str(data_root)) == 0
    assert "shards match the manifest" in capsys.readouterr().out


@pytest.mark.parametrize("weight", ["", ":0.7"])
def test_a_corpus_of_a_mixture_is_verified_as_it_is_typed_for_a_run(
    weight: str, data_root: Path, monkeypatch, capsys
):
    assert data(monkeypatch, "verify", f"web={data_root}{weight}") == 0
    assert f"{data_root}: all " in capsys.readouterr().out
    assert data(monkeypatch, "verify", "web=") == 2
    assert "expected a corpus as NAME=FOLDER:WEIGHT" in capsys.readouterr().err


def test_every_wrong_file_has_a_line(tmp_path: Path, data_root: Path, monkeypatch, capsys):
    broken = Path(shutil.copytree(data_root, tmp_path / "small"))
    for number in (2, 1):
        with (broken / f"small_train_{number:06d}.npy").open("ab") as file:
            file.write(b"x")
    assert data(monkeypatch, "verify", str(broken)) == 2
    printed = capsys.readouterr()
    head, *lines = printed.err.splitlines()
    assert head.startswith("error: 2 of ")
    assert head.endswith("prepare it again with the command that made it and --overwrite")
    assert lines == [
        f"  {broken}/small_train_{number:06d}.npy: expected 16128 bytes, got 16129"
        for number in (1, 2)
    ]
    assert "val: 1 shard, 8,000 tokens, 16,128 bytes\n" in printed.out
    assert data(monkeypatch, "verify", str(broken), "--json") == 2
    printed = capsys.readouterr()
    assert printed.err == ""
    result = json.loads(printed.out)
    assert (result["manifest"], result["sound"]) == (True, False)
    assert result["val"]["shards"] == 1
    assert [item["file"] for item in result["files"] if item["wrong"]] == [
        "small_train_000001.npy",
        "small_train_000002.npy",
    ]
    assert data(monkeypatch, "verify", str(data_root), "--json") == 0
    assert json.loads(capsys.readouterr().out)["sound"]


def test_without_a_manifest_verify_says_that_nothing_is_compared(
    tmp_path: Path, data_root: Path, monkeypatch, capsys
):
    copy = Path(shutil.copytree(data_root, tmp_path / "small"))
    (copy / "manifest.json").unlink()
    assert data(monkeypatch, "verify", str(copy / "*.npy")) == 0
    assert f"{copy}: no manifest to compare " in capsys.readouterr().out
    (copy / "progress.json").write_text('{"command": "gpt2 data files x.txt"}')
    assert data(monkeypatch, "verify", str(copy)) == 2
    assert capsys.readouterr().err.endswith("continue with: gpt2 data files x.txt\n")


def test_an_interrupted_verification(data_root: Path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Verification, "run", interrupted)
    assert data(monkeypatch, "verify", str(data_root)) == 130
    assert capsys.readouterr().err == f"{data_verify.ON_INTERRUPT}\n"


def test_files_become_a_corpus(tmp_path: Path, monkeypatch, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 500)
    out = tmp_path / "data" / "mine"
    pattern = str(tmp_path / "*.txt")
    flags = ("files", pattern, "--out", str(out), "--shard_tokens", "400", "--workers", "1")
    assert data(monkeypatch, *flags) == 0
    printed = capsys.readouterr().out
    assert "2 documents of 2 files; " in printed
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
    assert "100 documents" in printed
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


def test_many_replaced_letters_are_a_warning(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "a.csv").write_bytes(b"text\n" + "für Öl\n".encode("cp1252") * 50)
    flags = ("files", str(tmp_path / "a.csv"), "--out", str(tmp_path / "out"), "--workers", "1")
    assert data(monkeypatch, *flags) == 0
    printed = capsys.readouterr()
    assert "50 documents of 1 file, 50 with bytes that are not UTF-8 (now U+FFFD)" in printed.out
    assert "convert them, as with iconv -f cp1252 -t utf-8" in printed.err


def test_the_other_splits_of_a_folder_are_named(tmp_path: Path, monkeypatch, capsys):
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"{split} {number}"}) + "\n" for number in range(50)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    flags = ("--out", str(tmp_path / "out"), "--workers", "1")
    assert data(monkeypatch, "hf", str(tmp_path), *flags) == 0
    printed = capsys.readouterr()
    assert "1 file (train.jsonl), not 1 file (validation.jsonl): --split chooses" in printed.err
    assert "50 documents of 1 file" in printed.out
    assert data(monkeypatch, "hf", str(tmp_path), "--split", "test", *flags) == 2
    assert "no file of the split test; choose one of train, validation" in capsys.readouterr().err
    assert data(monkeypatch, "hf", str(tmp_path / "train.jsonl"), *flags) == 2
    assert "is a file; type gpt2 data files" in capsys.readouterr().err


def test_shards_of_a_tokenizer_of_one_s_own(tmp_path: Path, monkeypatch, capsys):
    """From its folder to the report beside GPT-2's, the table of shards, and a refused change."""
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text(trained("cl100k"))
    (tmp_path / "a.txt").write_text("The quick brown fox. " * 500)
    out, tok = str(tmp_path / "data"), str(tmp_path / "tok")
    flags = ("files", str(tmp_path / "a.txt"), "--out", out, "--workers", "1")
    assert data(monkeypatch, *flags, "--tokenizer", tok) == 0
    printed = capsys.readouterr().out
    found = re.search(
        r"Bytes per token: (\S+) in all shards, with tok/tokenizer.json \(1,500 entries\); in the "
        r"first 0.01 MB to train on, (\S+) with it and (\S+) with GPT-2's tokenizer\n",
        printed,
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(float(found[2]), rel=0.01)
    assert float(found[3]) == pytest.approx(21 / 5, rel=0.01)
    assert data(monkeypatch, "show", out) == 0
    printed = capsys.readouterr().out
    assert "Tokens of tok/tokenizer.json, 1,500 entries\n" in printed
    assert "The quick brown fox. The quick" in printed
    assert data(monkeypatch, "show", out, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["tokenizer"], shown["vocab_size"]) == ("tok/tokenizer.json", 1500)
    assert data(monkeypatch, "show", out, "--stats", "--json") == 0
    assert json.loads(capsys.readouterr().out)["statistics"]["text_bytes"] == 21 * 500
    assert data(monkeypatch, *flags) == 2
    assert "is finished with another tokenizer (tok/tokenizer.json " in capsys.readouterr().err
    (tmp_path / "data/tokenizer.json").write_text(trained("gpt2"))
    for action in (("verify", out), ("show", out), (*flags, "--tokenizer", tok)):
        assert data(monkeypatch, *action) == 2
        assert "data/tokenizer.json has changed" in capsys.readouterr().err
