import fcntl
import io
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gpt2 import model
from gpt2.base import log
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import metadata, store
from gpt2.cli import generate_output, loading
from gpt2.cli.model_source import ModelSource
from gpt2.config import presets
from gpt2.config.model import ModelConfig
from gpt2.config.options import overlay
from gpt2.data import tokenizer
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.inference.generate import generate_text
from gpt2.inference.sampling import Sampling
from gpt2.model.gpt2 import GPT2
from support import HANG_S

SHAPE = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)
ONE = Sampling(max_new_tokens=6, top_p=0.9)
THREE = replace(ONE, num_samples=3)


@pytest.fixture
def net() -> GPT2:
    torch.manual_seed(0)
    return model.build(SHAPE)


def typed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("give", [generate_output.print_texts, generate_output.stream_texts])
def test_a_single_text_stands_alone_and_several_have_headings(net: GPT2, capsys, give):
    give(net, GPT2_TOKENIZER, "def", ONE, 5)
    assert capsys.readouterr() == (generate_text(net, "def", ONE, seed=5)[0] + "\n", "")
    give(net, GPT2_TOKENIZER, "def", THREE, 5)
    first, second, third = generate_text(net, "def", THREE, seed=5)
    assert capsys.readouterr().out == (
        f"--- sample 1\n{first}\n--- sample 2\n{second}\n--- sample 3\n{third}\n"
    )


def test_a_stream_shows_each_piece_at_once(net: GPT2, monkeypatch):
    shown: list[str] = []

    class Flushed(io.StringIO):
        def flush(self) -> None:
            shown.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Flushed())
    generate_output.stream_texts(net, GPT2_TOKENIZER, "def", ONE, 5)
    (text,) = generate_text(net, "def", ONE, seed=5)
    assert shown[0] == "def"
    assert shown[-1] == text
    assert len(set(shown)) >= 5
    assert all(text.startswith(part) for part in shown)


def test_notes_go_to_standard_error(net: GPT2, capsys):
    log.setup()
    generate_output.stream_texts(net, GPT2_TOKENIZER, "x " * 40, replace(ONE, max_new_tokens=30), 1)
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in said] == [["WARNING:", "the"], ["WARNING:", "past"]]


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"two\nlines\n", "two\nlines"),
        (b"kept \n\n", "kept \n"),
        (b"", ""),
        ("日本".encode() + b"\xff", "日本\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_a_prompt_from_standard_input_loses_its_last_newline_only(
    monkeypatch, data: bytes, prompt: str
):
    typed(monkeypatch, data)
    assert generate_output.read_prompt("-") == prompt


def test_a_prompt_of_foreign_bytes_can_be_printed():
    assert generate_output.read_prompt(os.fsdecode(b"a\xff")) == "a\N{REPLACEMENT CHARACTER}"
    assert generate_output.read_prompt("🦜 ") == "🦜 "


def test_lines_of_a_pipe_are_continued_one_by_one(net: GPT2, monkeypatch, capsys):
    """An empty one takes the prompt before it again; each has the next seed."""
    typed(monkeypatch, b"\none\n\n\xff")
    generate_output.converse(net, GPT2_TOKENIZER, "def", ONE, 5)
    prompts = ["def", "one", "one", "\N{REPLACEMENT CHARACTER}"]
    texts = [generate_text(net, text, ONE, seed=5 + turn)[0] for turn, text in enumerate(prompts)]
    assert capsys.readouterr() == ("".join(f"{text}\n" for text in texts), "")
    assert texts[1] != texts[2]


def test_ctrl_c_ends_a_loop_that_reads_a_pipe(net: GPT2, monkeypatch):
    def interrupted(*_: object, **__: object) -> Iterator[list[str]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_output.generate, "stream_text", interrupted)
    typed(monkeypatch, b"one\n")
    with pytest.raises(KeyboardInterrupt):
        generate_output.converse(net, GPT2_TOKENIZER, "def", ONE, 5)


class Terminal:
    """A command with a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        self.seen = ""

        def take_the_terminal() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_the_terminal,
            env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read_until(self, wanted: str) -> str:
        """What is shown up to `wanted`."""
        while wanted not in self.seen:
            ready, _, _ = select.select([self.master], [], [], HANG_S)
            assert ready, f"no {wanted!r} in {self.seen!r}"
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(wanted)
        return before


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(net: GPT2, tmp_path: Path):
    with torch.no_grad():  # says "a" for ever
        net.final_norm.weight.zero_()
        net.final_norm.bias.fill_(1)
        net.token_embedding.weight[tokenizer.encode("a")] = 10
    run = overlay(presets.preset("demo"), asdict(SHAPE))
    state = {"model": net.state_dict(), "config": run.to_dict(), "progress": {"step": 1}}
    facts = metadata.TrainingMetadata(1, 0, 0, 3.0, None, 1, "test", "0")
    store.save(tmp_path, {**state, "rng": []}, facts, keep_last=2)
    options = ("--checkpoint_dir", str(tmp_path), "--max_new_tokens", "1000000", "--device", "cpu")
    terminal = Terminal(sys.executable, "-m", "gpt2", "generate", "--interactive", *options)
    try:
        assert "step_000001.pt (step 1)" in terminal.read_until("Ctrl+D exits.")
        for prompt in ("once", ""):
            terminal.read_until("> ")
            terminal.type(f"{prompt}\n")
            terminal.read_until("WARNING: past the context of 16 tokens")
            terminal.read_until("onceaaaa")
            terminal.type("\x03")
        terminal.read_until("> ")
        time.sleep(0.5)  # Python's readline does not wake for a signal that is quicker than it
        terminal.type("half a line\x03")
        terminal.read_until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=HANG_S) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_best_of_an_empty_folder_names_where_there_are_checkpoints(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*none; train a model first"):
        loading.load_model(ModelSource(checkpoint="best", checkpoint_dir=tmp_path / "none"))
    training = metadata.TrainingMetadata(1, 0, 0, 3.0, None, 1, "test", "0")
    (tmp_path / "demo").mkdir()
    store.save(tmp_path / "demo", {"rng": []}, training, keep_last=2)
    with pytest.raises(CheckpointError, match=r"use --checkpoint_dir .*demo"):
        loading.load_model(ModelSource(checkpoint="best", checkpoint_dir=tmp_path))


def test_the_name_of_a_model_is_shown_without_control_characters():
    loaded = loading.LoadedModel("a\x1b[31m\n.pt", model.build(SHAPE), None, None)
    assert str(loaded) == "a\\x1b[31m\n.pt"
