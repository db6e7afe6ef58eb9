"""`--log_level` of every command: it is in the help, and sets what is printed."""

import logging
import sys
from pathlib import Path

import pytest

from gpt2.base import log
from gpt2.base.errors import DataError, ReportedByOtherRank
from gpt2.cli import main
from gpt2.cli.train import train_main
from gpt2.data import prepare
from gpt2.distributed import rendezvous
from gpt2.train import trainer

# Each command with flags that end it soon in an empty folder.
COMMANDS = {
    "train": ["--list_checkpoints"],
    "seeds": ["--list_checkpoints"],
    "models": ["--list_checkpoints"],
    "search": ["--list_checkpoints"],
    "data python-stdlib": [],
    "data hf": ["nowhere"],
    "data files": ["nowhere/*.txt"],
    "data verify": ["nowhere"],
    "data show": ["nowhere"],
    "tokenizer train": ["nowhere/*.txt", "--vocab_size", "300", "--out", "tok"],
    "tokenizer show": ["nowhere", "a text"],
    "generate": [],
    "evaluate": [],
    "export": ["exported"],
    "estimate": [],
    "doctor": ["--preset", "demo", "--device", "cpu"],
    "plot": ["nowhere"],
    "experiments list": [],
    "experiments show": ["nowhere"],
    "status": [],
    "watch": [],
}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2", *arguments])
    return main.main()


def test_the_list_is_complete():
    assert {command.split()[0] for command in COMMANDS} == set(main.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_it(command: str, monkeypatch, capsys, tmp_path: Path):
    def refuse(*_: object, **__: object) -> None:
        raise DataError("not in this test")

    monkeypatch.setattr(prepare, "prepare", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, *command.split(), "--help")
    assert caught.value.code == 0
    assert "--log_level {None,debug,info,warning,error}" in capsys.readouterr().out
    code = call(monkeypatch, *command.split(), *COMMANDS[command], "--log_level", "debug")
    assert code in (0, 1, 2)
    assert logging.getLogger(log.ROOT).level == logging.DEBUG


@pytest.mark.parametrize(("level", "events"), [("info", "an event\n"), ("warning", "")])
def test_a_training_prints_events_to_standard_output(
    level: str, events: str, monkeypatch, capsys, tmp_path: Path
):
    logger = logging.getLogger("gpt2.train.trainer")

    def run(_: object, **__: object) -> None:
        logger.info("an event")
        logger.warning("a warning")
        raise DataError("no data")

    monkeypatch.setattr(trainer, "run", run)
    assert call(monkeypatch, "train", "--log_level", level) == 2
    assert capsys.readouterr() == (events, "WARNING: a warning\nerror: no data\n")


def test_other_ranks_print_errors_only(monkeypatch, capsys):
    logger = logging.getLogger("gpt2.train.trainer")

    def run(_: object, **__: object) -> None:
        logger.warning("a warning")
        logger.error("an error")
        raise ReportedByOtherRank("no data")

    monkeypatch.setattr(trainer, "run", run)
    for name, value in rendezvous.rank_variables(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_improved.py"])
    assert train_main() == 2
    assert capsys.readouterr() == ("", "rank 1: ERROR: an error\n")


def test_an_unknown_level_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "status", "--log_level", "loud")
    assert caught.value.code == 2
    assert "--log_level" in capsys.readouterr().err
