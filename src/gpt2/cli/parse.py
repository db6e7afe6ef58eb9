"""What every command needs: its flags parsed, its errors as one line, its exit code."""

import contextlib
import dataclasses
import io
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import tyro

from gpt2.base.errors import ReportedByOtherRank, UserError, is_out_of_memory

T = TypeVar("T")
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


TRUTH = {"true": "", "false": "no_"}


def parse(
    kind: type[T], arguments: Sequence[str], default: T | None = None, speak: bool = True
) -> T:
    """The command that `arguments` describe.

    Raises UserError for values that the command refuses. For flags that it does not know, and for
    `--help`, tyro prints its own text if `speak`, and exits.
    """
    # tyro prints a wrong value even with console_outputs=False.
    with contextlib.nullcontext() if speak else contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            kind,
            args=_as_switches(kind, arguments),
            default=tyro.MISSING_NONPROP if default is None else default,
            use_underscores=True,
            console_outputs=speak,
            config=[tyro.conf.OmitArgPrefixes],
        )


def parse_known(kind: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """As `parse`; also returns the arguments that are not flags of this command."""
    return tyro.cli(
        kind,
        args=_as_switches(kind, arguments),
        return_unknown_args=True,
        use_underscores=True,
        config=[tyro.conf.OmitArgPrefixes],
    )


def _as_switches(kind: type[Any], arguments: Sequence[str]) -> list[str]:
    """`--fast False` as `--no_fast`: switches are typed with their value, too."""
    switches = _switches(kind)
    written: list[str] = []
    for before, argument in itertools.pairwise(("", *arguments)):
        if argument.lower() in TRUTH and _name(before) in switches:
            written[-1] = f"--{TRUTH[argument.lower()]}{_name(before)}"
            continue
        flag, _, value = argument.partition("=")
        if value.lower() in TRUTH and _name(flag) in switches:
            argument = f"--{TRUTH[value.lower()]}{_name(flag)}"
        written.append(argument)
    return written


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""


def _switches(kind: type[Any]) -> set[str]:
    """Names of the options that are on or off, in all parts of a command."""
    found: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        if hint is bool:
            found.add(name)
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= _switches(hint)
    return found


def guarded(
    body: Callable[[], int],
    tell: Callable[[str], None] | None = None,
    interrupted: str = "",
) -> int:
    """The exit code of `body`. A UserError is printed as one line, by one rank.

    `tell` receives it on every rank. `interrupted` is printed after Ctrl+C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know a character
    try:
        code = body()
        sys.stdout.flush()
        return code
    except UserError as error:
        if tell:
            tell(f"error: {error}")
        if not isinstance(error, ReportedByOtherRank):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({str(error).splitlines()[0]:.120}); use smaller batches",
            file=sys.stderr,
            flush=True,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `… | head` has seen enough; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
