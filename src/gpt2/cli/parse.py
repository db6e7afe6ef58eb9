"""What every command shares: flags are parsed, messages set up, errors printed as one line.

A command's module holds a dataclass, whose fields are the flags, and a function that runs it.
Flags are parsed before modules that import torch, which takes 2 s, are imported: their imports
stand at the top of the function that runs the command, not of the module, so that `--help` and a
mistyped flag are answered at once. `train` and `evaluate` import torch first: under torchrun, one
rank alone prints what is wrong with the flags.
"""

import contextlib
import io
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar, get_type_hints

from gpt2.base import log, regular_file
from gpt2.base.control_characters import printable, visible
from gpt2.base.errors import (
    ConfigError,
    ReportedByOtherRank,
    UserError,
    is_of_a_name,
    is_out_of_memory,
)

logger = logging.getLogger(__name__)

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
SEE_FRAME = "error: invalid options; see the frame above the report of torchrun"
"""for the report of torchrun, far below what tyro printed"""
SWITCH_PREFIXES = {"true": "", "false": "no_"}


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options of every command."""

    log_level: log.Level | None = None
    """least severe messages to print; default is GPT2_LOG_LEVEL of the environment, else info"""


T = TypeVar("T")
Command = TypeVar("Command", bound=CommandOptions)


def run_command(
    kind: type[Command],
    run: Callable[[Command], int],
    arguments: Sequence[str] | None = None,
    *,
    on_interrupt: str = "",
) -> int:
    """Parses `arguments`, by default those of this process, and runs the command.

    Returns the exit code. Prints `on_interrupt` after Ctrl+C.
    """

    def body() -> int:
        command = parse(kind, sys.argv[1:] if arguments is None else arguments)
        log.setup(command.log_level)
        return run(command)

    return guarded(body, on_interrupt=on_interrupt)


def parse(
    kind: type[T], arguments: Sequence[str], default: T | None = None, quiet: bool = False
) -> T:
    """The command that `arguments` describe.

    Raises UserError for values that the command refuses. For flags that it does not know, and for
    `--help`, tyro prints its own text, unless `quiet`, and exits.
    """
    import tyro  # `gpt2 --help` and wrong names of commands are answered without it

    # tyro prints a wrong value even with console_outputs=False.
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        return tyro.cli(
            kind,
            args=_as_switches(kind, arguments),
            default=tyro.MISSING_NONPROP if default is None else default,
            use_underscores=True,
            console_outputs=not quiet,
            config=[tyro.conf.OmitArgPrefixes],
        )


def parse_known(kind: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """As `parse`; also returns the arguments that are not flags of this command."""
    import tyro

    return tyro.cli(
        kind,
        args=_as_switches(kind, arguments),
        return_unknown_args=True,
        use_underscores=True,
        config=[tyro.conf.OmitArgPrefixes],
    )


def _as_switches(kind: type[Any], arguments: Sequence[str]) -> list[str]:
    """`arguments` with `--bias False` as `--no_bias`, the only form that tyro knows."""
    switches = _switches(kind)
    rewritten: list[str] = []
    for before, argument in itertools.pairwise(("", *arguments)):
        if argument.lower() in SWITCH_PREFIXES and _name(before) in switches:
            rewritten[-1] = f"--{SWITCH_PREFIXES[argument.lower()]}{_name(before)}"
            continue
        flag, _, value = argument.partition("=")
        if value.lower() in SWITCH_PREFIXES and _name(flag) in switches:
            argument = f"--{SWITCH_PREFIXES[value.lower()]}{_name(flag)}"
        rewritten.append(argument)
    return rewritten


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""


def _switches(kind: type[Any]) -> set[str]:
    """Names of the boolean options of a command and of its nested parts."""
    found: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        if hint is bool:
            found.add(name)
        elif is_dataclass(hint) and isinstance(hint, type):
            found |= _switches(hint)
    return found


def text_of_file(path: Path, flag: str, hint: str = "") -> str:
    """The text of a file that `flag` names; raises ConfigError, with `hint` at its end, if it
    cannot be read."""
    try:
        return regular_file.read_text(path)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{flag} {path} is not text in UTF-8: {error}; save it in that encoding"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {flag} {path}: {error.strerror}{hint}") from error


def guarded(
    body: Callable[[], int],
    *,
    rank: int = 0,
    report: Callable[[str, bool], None] | None = None,
    on_interrupt: str = "",
) -> int:
    """Calls `body` and returns its exit code; a UserError becomes one line and exit code 2.

    Prints messages as those of `rank`. `report` receives the line of a UserError, and whether this
    rank prints it. `on_interrupt` is printed after Ctrl+C.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal may have no encoding for a character of a path or a generated text.
            stream.reconfigure(errors="backslashreplace")
    try:
        log.setup(rank=rank)
        code = body()
        sys.stdout.flush()
        return code
    except UserError as error:
        return _ended_by(error, report)
    except SystemExit as error:
        if report and error.code == USER_ERROR:
            report(SEE_FRAME, rank == 0)
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        _print_error(f"error: out of memory ({visible(reason):.120}); use a smaller batch or model")
        return USER_ERROR
    except KeyboardInterrupt:
        if on_interrupt:
            _print_error(on_interrupt)
        return INTERRUPTED
    except BrokenPipeError:  # `… | head` has read enough and closed standard output
        discard(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:
        if is_of_a_name(error):
            logger.debug("what follows was raised here", exc_info=True)
            return _ended_by(UserError(_about_file(error)), report)
        if _takes_text(sys.stdout):
            raise
        discard(sys.stdout)
        reason = error.strerror or str(error)
        _print_error(f"error: cannot write to standard output: {reason}; send it elsewhere")
        return USER_ERROR


def _ended_by(error: UserError, report: Callable[[str, bool], None] | None) -> int:
    """Prints the line of an error, unless another rank does, and returns the exit code."""
    line = visible(f"error: {error}")  # it may quote any file
    is_printed = not isinstance(error, ReportedByOtherRank)
    if is_printed:
        _print_error(line)
    if report:
        report(line, is_printed)
    return USER_ERROR


def _about_file(error: OSError) -> str:
    """What the system says about a file that no part of the program expected to be unusable."""
    name = error.filename
    shown = printable(os.fsdecode(name) if isinstance(name, bytes) else name)
    return (
        f"cannot use {shown:.300}: {error.strerror}; change it, or name another file "
        "(--log_level debug shows what needs it)"
    )


def show_text(text: str) -> int:
    """Prints a help text or a version; returns the exit code, as `guarded` does."""

    def body() -> int:
        print(text)
        return 0

    return guarded(body)


def _open_closed_streams() -> None:
    """Opens the null device in place of standard streams that are closed (`>&-`). Otherwise the
    next files would get their numbers, and what a library prints would go into these files."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _print_error(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # a full disk; the exit code still says it
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Sends a standard stream to the null device, with what it could not write so far."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _takes_text(stream: TextIO) -> bool:
    try:
        print(file=stream, flush=True)  # a failed write may leave nothing that a flush would write
    except OSError:
        return False
    return True
