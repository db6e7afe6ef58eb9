import io
import logging
import os
import sys

import pytest

from gpt2.base import log
from gpt2.base.errors import ConfigError

logger = logging.getLogger("gpt2.somewhere.module")


def log_all() -> None:
    logger.debug("a detail of %d", 1)
    logger.info("an event")
    logger.warning("a warning")
    logger.error("an error")


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        ("debug", ["DEBUG: a detail of 1", "an event", "WARNING: a warning", "ERROR: an error"]),
        ("info", ["an event", "WARNING: a warning", "ERROR: an error"]),
        ("warning", ["WARNING: a warning", "ERROR: an error"]),
        ("error", ["ERROR: an error"]),
    ],
)
def test_messages_of_the_level_and_above_are_printed(level: log.Level, lines: list[str], capsys):
    log.setup(level)
    log_all()
    printed = capsys.readouterr()
    assert printed.err.splitlines() == lines and not printed.out


def test_warnings_go_to_standard_error_and_the_rest_to_the_info_stream(capsys):
    log.setup("debug", info_stream="stdout")
    log_all()
    printed = capsys.readouterr()
    assert printed.out == "DEBUG: a detail of 1\nan event\n"
    assert printed.err == "WARNING: a warning\nERROR: an error\n"


def test_other_ranks_print_errors_only(capsys):
    log.setup("info", rank=2)
    log_all()
    assert capsys.readouterr().err == "rank 2: ERROR: an error\n"


def test_other_ranks_print_everything_at_debug(capsys):
    log.setup("debug", rank=2)
    log_all()
    assert capsys.readouterr().err.splitlines() == [
        "rank 2: DEBUG: a detail of 1",
        "rank 2: an event",
        "rank 2: WARNING: a warning",
        "rank 2: ERROR: an error",
    ]


def test_a_second_setup_replaces_the_first(capsys):
    log.setup("debug", rank=1)
    log.setup("info")
    log_all()
    assert capsys.readouterr().err == "an event\nWARNING: a warning\nERROR: an error\n"


def test_messages_are_not_printed_again_by_handlers_of_the_program(capsys):
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        log.setup("info")
        logger.warning("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "WARNING: once\n"


def test_a_traceback_follows_on_the_next_lines(capsys):
    log.setup("info", rank=1)
    try:
        raise KeyError("lost")
    except KeyError:
        logger.exception("step %d failed", 7)
    first, second, *_, last = capsys.readouterr().err.splitlines()
    assert first == "rank 1: ERROR: step 7 failed"
    assert second == "Traceback (most recent call last):"
    assert last == "KeyError: 'lost'"


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_stream_that_cannot_be_written_to_does_not_raise(monkeypatch: pytest.MonkeyPatch):
    closed = io.StringIO()
    closed.close()
    log.setup("info", info_stream="stdout")
    for stream in (closed, FullDisk(), good := io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        logger.info("an event")
    assert good.getvalue() == "an event\n"


def test_arguments_that_do_not_match_the_text_are_reported_and_do_not_raise(capsys, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", True)
    log.setup("info")
    logger.info("step %d", "seven")
    assert "TypeError: %d format" in capsys.readouterr().err


def test_the_level_is_handed_to_child_processes(capsys):
    log.setup("warning")
    assert os.environ[log.LEVEL_VARIABLE] == "warning"
    log.setup()  # as a worker process does
    log_all()
    assert capsys.readouterr().err == "WARNING: a warning\nERROR: an error\n"


def test_an_unknown_level_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(log.LEVEL_VARIABLE, "loud")
    with pytest.raises(ConfigError, match="GPT2_LOG_LEVEL=loud is unknown; expected debug, info"):
        log.setup()


def test_info_is_the_default_level(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(log.LEVEL_VARIABLE)
    log.setup()
    assert logging.getLogger(log.ROOT).getEffectiveLevel() == logging.INFO
    assert os.environ[log.LEVEL_VARIABLE] == "info"


def test_without_setup_a_program_receives_the_messages(caplog: pytest.LogCaptureFixture):
    log_all()
    assert [record.getMessage() for record in caplog.records] == ["a warning", "an error"]
