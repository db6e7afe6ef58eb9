"""What a file holds reaches a terminal, and log.txt, without control characters."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.text import Text

from gpt2.base import log
from gpt2.base.control_characters import CONTROL_CHARACTERS, visible
from gpt2.base.errors import ConfigError
from gpt2.base.text import PlainConsole, table
from gpt2.cli import parse
from gpt2.data import manifest
from gpt2.data.remote import Storage
from gpt2.inspection import estimate, run_status
from gpt2.inspection.run_status import Run
from gpt2.metrics.log_file import LogFile
from gpt2.metrics.records import EventRecord, SamplesRecord
from gpt2.train import status

ATTACK = "a\x1b]0;title\x07\x1b[2J\r\x08\x7f\x9b31mb\x00\x0c"


def test_line_breaks_and_tabs_stay():
    assert visible("a\n\tb\x1b[2J\x9b\r") == "a\n\tb\\x1b[2J\\x9b\\x0d"


def print_log() -> None:
    log.setup()
    logging.getLogger("gpt2.test").warning("of a file: %s", ATTACK)


def print_traceback() -> None:
    log.setup()
    try:
        raise ValueError(ATTACK)
    except ValueError:
        logging.getLogger("gpt2.test").exception("failed")


def print_error() -> None:
    def body() -> int:
        raise ConfigError(ATTACK)

    assert parse.guarded(body) == 2


def print_table() -> None:
    shown = table(ATTACK, "file")
    shown.add_row(ATTACK)
    shown.add_row(Text(ATTACK, "red"))
    PlainConsole().print(shown)


@pytest.mark.parametrize(
    "shown",
    [
        print_log,
        print_traceback,
        print_error,
        print_table,
        lambda: PlainConsole().print(ATTACK),
        lambda: PlainConsole().print(Text.assemble((ATTACK, "bold"), ATTACK), soft_wrap=True),
    ],
)
def test_no_way_to_the_terminal_lets_them_through(shown: Callable[[], None], capsys):
    shown()
    out, err = capsys.readouterr()
    assert "2J" in out + err and not CONTROL_CHARACTERS.search(out + err)


def test_styles_of_a_terminal_stay(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    PlainConsole(width=80).print(Text("good", "bold"), Text(ATTACK))
    printed = capsys.readouterr().out
    assert printed.startswith("\x1b[1mgood\x1b[0m") and "\x1b]0" not in printed


def test_log_txt_can_be_shown(tmp_path: Path):
    file = LogFile(tmp_path / "log.txt", "run", 0)
    file.write(EventRecord("WARNING", ATTACK))
    file.write(SamplesRecord(1, [ATTACK]))
    file.close()
    content = (tmp_path / "log.txt").read_bytes().decode()
    assert content.count("2J") == 2 and not CONTROL_CHARACTERS.search(content)


def test_status_is_shown_in_lines_of_its_own(tmp_path: Path, capsys):
    plan = status.Plan(
        f"run{ATTACK}\nfake: finished", "demo", 9, 1, 1, 8, None, 1, "cpu", "log.txt"
    )
    status.write(tmp_path, plan, "failed", 3, f"no\nfake: running{ATTACK}")
    run = Run(tmp_path, status.read(tmp_path))
    for show in (run_status.print_state, estimate.print_run_forecast):
        show(run, PlainConsole(width=400))
        printed = capsys.readouterr().out
        assert not CONTROL_CHARACTERS.search(printed) and "\nfake" not in printed


def test_the_command_of_an_unfinished_preparation(tmp_path: Path):
    begun = {"command": f"gpt2 data x\n{ATTACK}"}
    (tmp_path / "progress.json").write_text(json.dumps(begun))
    message = manifest.missing(Storage(str(tmp_path)))
    assert "continue with: gpt2 data x" in message and message.isprintable()
