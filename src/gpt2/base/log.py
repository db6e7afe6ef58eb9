"""Program messages: every module logs to `logging.getLogger(__name__)`, one handler prints them.

Metrics are records (see `gpt2.metrics`), never log messages. `setup` is called once per process, by
the command line or by a worker; a program that uses the package as a library and does not call it
gets what Python prints by default, which is warnings.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Literal, get_args

from gpt2.base import addresses
from gpt2.base.control_characters import visible
from gpt2.base.validation import require

Level = Literal["debug", "info", "warning", "error"]
Stream = Literal["stdout", "stderr"]
ROOT = "gpt2"
LEVEL_VARIABLE = "GPT2_LOG_LEVEL"
"""environment variable that hands the level to worker processes and the ranks of their trainings"""


class RankHandler(logging.Handler):
    """Prints the messages of this process, one write per line.

    Rank 0 prints all. Other ranks print what they alone know (errors), with their rank in front, so
    that a message that every rank logs appears once; at level `debug` they print everything.
    Warnings and errors go to standard error, the rest to `info_stream`.
    """

    def __init__(self, rank: int, info_stream: Stream) -> None:
        super().__init__()
        self.rank, self._info_stream = rank, info_stream

    def emit(self, record: logging.LogRecord) -> None:
        is_debugging = logging.getLogger(ROOT).isEnabledFor(logging.DEBUG)
        if self.rank > 0 and record.levelno < logging.ERROR and not is_debugging:
            return
        is_info = record.levelno < logging.WARNING and self._info_stream == "stdout"
        stream = sys.stdout if is_info else sys.stderr
        try:
            line = line_of(record, self.rank)
        except Exception:  # the arguments do not match the text: a bug, but never the end of a run
            self.handleError(record)  # prints the traceback
            return
        # A closed stream (ValueError), a terminal that is gone, or a full disk never ends a run.
        with contextlib.suppress(OSError, ValueError):
            stream.write(line + "\n")
            stream.flush()


def line_of(record: logging.LogRecord, rank: int = 0) -> str:
    """A message as people read it: `WARNING: …`, `rank 2: ERROR: …`, an info message as it is.

    Control characters are escaped, as a message may quote any file, and addresses have no
    passwords. An exception's traceback follows on the next lines.
    """
    text = record.getMessage()
    if record.levelno != logging.INFO:
        text = f"{record.levelname}: {text}"
    if rank > 0:
        text = f"rank {rank}: {text}"
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    return visible(addresses.without_secrets(text))


def setup(level: Level | None = None, *, rank: int = 0, info_stream: Stream = "stderr") -> None:
    """Prints the package's messages of `level` and above from now on; a second call replaces the
    first.

    Without `level`, it is what the parent process set up, else `info`. `info_stream` takes the
    messages below a warning: standard error for commands whose output is a result. Raises
    ConfigError for a value of GPT2_LOG_LEVEL that is not a level.
    """
    chosen = (level or os.environ.get(LEVEL_VARIABLE) or "info").upper()
    levels = get_args(Level)
    require(
        chosen.lower() in levels,
        f"{LEVEL_VARIABLE}={chosen.lower()} is unknown; expected {', '.join(levels)}",
    )
    os.environ[LEVEL_VARIABLE] = chosen.lower()
    handler = RankHandler(rank, info_stream)
    handler.setLevel(chosen)
    logger = logging.getLogger(ROOT)
    logger.setLevel(min(handler.level, logging.INFO))  # a run's log has info messages in any case
    logger.propagate = False
    for earlier in _rank_handlers():
        logger.removeHandler(earlier)
    logger.addHandler(handler)


def is_set_up() -> bool:
    """Whether this process prints the package's messages, because it called `setup`."""
    return bool(_rank_handlers())


def _rank_handlers() -> list[RankHandler]:
    return [item for item in logging.getLogger(ROOT).handlers if isinstance(item, RankHandler)]


@contextlib.contextmanager
def collecting_warnings() -> Iterator[list[str]]:
    """The texts of the warnings and errors that the package logs in the block; nothing is printed
    in it."""
    logger, found = logging.getLogger(ROOT), list[str]()
    handlers, propagates = logger.handlers[:], logger.propagate
    collector = logging.Handler(logging.WARNING)
    collector.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.handlers, logger.propagate = [collector], False
    try:
        yield found
    finally:
        logger.handlers, logger.propagate = handlers, propagates
