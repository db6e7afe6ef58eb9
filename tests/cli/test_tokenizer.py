"""`gpt2 tokenizer`: from files to a folder with a tokenizer, and its tokens."""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from gpt2.cli import main
from gpt2.data import tokenizer, tokenizer_files


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2", "tokenizer", *arguments])
    return main.main()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "topics.jsonl"
    lines = [json.dumps({"body": topics[name]}) + "\n" for name in sorted(topics)]
    path.write_text("".join(lines))
    return path


def test_training_reports_its_efficiency_beside_that_of_gpt2(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "tok"
    flags = ("train", str(texts), "--vocab_size", "1000", "--out", str(out), "--special_tokens")
    assert call(monkeypatch, *flags, "<|pad|>", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    loaded = tokenizer_files.load(out)
    assert (found["vocab_size"], found["digest"]) == (loaded.vocab_size, loaded.identity)
    assert found["special_tokens"] == ["<|endoftext|>", "<|pad|>"]
    assert (found["documents"], found["bad_lines"]) == (len(topics), 0)
    assert found["text_bytes"] == sum(len(text.encode()) for text in topics.values())
    assert 0 < found["held_out_bytes"] < found["text_bytes"] / 50
    for name, vocab_size in (("trained", 1000), ("gpt2", tokenizer.VOCAB_SIZE)):
        measured = found[name]
        assert measured["vocab_size"] == vocab_size
        assert measured["tokens"] * measured["bytes_per_token"] == pytest.approx(
            found["held_out_bytes"]
        )
        assert 0 < measured["tokens_used"] < vocab_size
        assert 0 < measured["single_byte_share"] < 0.5
    assert call(monkeypatch, *flags, "<|pad|>") == 2
    assert capsys.readouterr().err.startswith(f"error: {out}/tokenizer.json exists")
    assert call(monkeypatch, *flags, "<|end|>", "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "kept apart: every 100th piece of text" in printed
    assert f"{found['gpt2']['bytes_per_token']:.3f}" in printed
    assert f"The tokenizer is in {out}" in printed
    assert tokenizer_files.load(out).token_bytes(999) == b"<|end|>"


def test_the_tokens_of_a_text(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out, text = tmp_path / "tok", " é<|endoftext|>"
    assert call(monkeypatch, "train", str(texts), "--vocab_size", "300", "--out", str(out)) == 0
    capsys.readouterr()
    assert call(monkeypatch, "show", str(out), text, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ids"] == tokenizer_files.load(out).encode(text)
    assert shown["tokens"][:3] == [" ", "\\xc3", "\\xa9"]
    assert call(monkeypatch, "show", str(out), text) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(shown["ids"])
    assert [line.split(maxsplit=1)[1] for line in lines[:3]] == ["' '", r"b'\xc3'", r"b'\xa9'"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["trian"], "unknown action trian; did you mean train"),
        (["train", "--vocab_size", "300", "--out", "tok"], "no files given"),
        (["train", "nowhere.txt", "--vocab_size", "300", "--out", "tok"], "no file matches"),
        (["train", "x.txt", "--vocab_size", "3", "--out", "tok"], "expected 257 or more"),
        (
            ["show", "nowhere", "text"],
            "no tokenizer nowhere; expected gpt2, tiktoken:NAME, a folder",
        ),
    ],
)
def test_wrong_commands_are_one_line(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
