import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpt2.base.errors import ConfigError, ReportedByOtherRank, UserError
from gpt2.cli import main
from gpt2.cli.parse import BROKEN_PIPE, SEE_FRAME, USER_ERROR, guarded, parse, parse_known
from support import HANG_S


@dataclass(frozen=True)
class Part:
    width: int = 1

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width={self.width} is too small")


@dataclass(frozen=True)
class Command:
    part: Part = field(default_factory=Part)
    fast: bool = False


def run(*arguments: str, quiet: bool = False) -> int:
    return guarded(lambda: parse(Command, arguments, quiet=quiet).part.width * 0)


def test_a_refused_value_is_one_line_and_exit_code_2(capsys):
    assert run("--width", "0") == USER_ERROR
    assert capsys.readouterr().err == "error: width=0 is too small\n"


def test_the_refusal_is_the_error_that_the_configuration_raised():
    with pytest.raises(ConfigError, match="width=0"):
        parse(Command, ["--width", "0"])
    with pytest.raises(ConfigError, match="width=0"):
        parse_known(Command, ["--width", "0", "--else", "1"])


def test_a_user_error_is_not_a_value_error():
    assert not issubclass(UserError, ValueError)


@pytest.mark.parametrize("arguments", [["--wide", "1"], ["--width", "much"]])
def test_wrong_usage_exits_with_2_and_is_printed_by_one_process(arguments, capsys):
    for quiet in (True, False):
        with pytest.raises(SystemExit, match="2"):
            run(*arguments, quiet=quiet)
        printed = capsys.readouterr()
        assert bool(printed.err) != quiet and not printed.out


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("no"), ("error: no", True)),
        (ReportedByOtherRank("no"), ("error: no", False)),
        (SystemExit(USER_ERROR), (SEE_FRAME, True)),
    ],
)
def test_what_torchrun_reports_of_a_user_error(error: BaseException, expected: tuple[str, bool]):
    """And whether this rank prints it: all ranks end with it."""
    reported: list[tuple[str, bool]] = []

    def fail() -> int:
        raise error

    with contextlib.suppress(SystemExit):
        guarded(fail, report=lambda line, is_printed: reported.append((line, is_printed)))
    assert reported == [expected]


def test_unknown_arguments_are_returned():
    assert parse_known(Command, ["--fast", "True", "--else", "1"]) == (
        Command(fast=True),
        ["--else", "1"],
    )


PRINTS = """
import os, sys
from gpt2.base.errors import UserError
from gpt2.cli.parse import BROKEN_PIPE, guarded

def body():
    print("a result " * 4000)
    with open(sys.argv[1], "w") as file:
        os.write(1, b"what a library prints")
        file.write("kept")
    return 0

def refused():
    raise UserError("the reason")

sys.exit(guarded(refused if len(sys.argv) > 2 else body))
"""


def run_in_shell(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-c", PRINTS]
        + [str(item) for item in arguments],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_runs_with_closed_standard_streams(closed: str, tmp_path: Path):
    done = run_in_shell(closed, tmp_path / "file")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_result_that_cannot_be_written_is_one_line_and_exit_code_2(tmp_path: Path):
    done = run_in_shell(">/dev/full", tmp_path / "file")
    assert done.returncode == USER_ERROR
    assert done.stderr == (
        "error: cannot write to standard output: No space left on device; send it elsewhere\n"
    )


def test_a_closed_pipe_has_one_exit_code(tmp_path: Path):
    """Also where rich prints, which exits with 1 by itself: a code that commands use."""
    script = "from gpt2.base.text import console\nfrom gpt2.cli.parse import guarded\nimport sys\n"
    script += "sys.exit(guarded(lambda: [console().print('x' * 80) for _ in range(9000)] and 0))"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as command:
        command.stdout.readline()
        command.stdout.close()
        assert (command.wait(), command.stderr.read()) == (BROKEN_PIPE, b"")


@pytest.mark.parametrize("command", ["--help", "--version", "data --help", "experiments --help"])
def test_help_and_version_end_with_the_exit_code_of_a_closed_pipe(
    tmp_path: Path, monkeypatch, command: str
):
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        monkeypatch.setattr(sys, "argv", ["gpt2", *command.split()])
        assert main.main() == BROKEN_PIPE


def test_an_error_that_cannot_be_printed_keeps_its_exit_code(tmp_path: Path):
    assert run_in_shell("2>/dev/full", tmp_path / "file", "refused").returncode == USER_ERROR
    assert run_in_shell("2>&-", tmp_path / "file", "refused").returncode == USER_ERROR


def test_an_error_of_another_file_is_not_taken_for_one_of_the_output(capsys):
    def body() -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        guarded(body)


def test_ctrl_c_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch):
    def interrupted(_name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["gpt2", "generate"])
    monkeypatch.setattr(main.importlib, "import_module", interrupted)
    assert main.main() == 130


def test_a_missing_file_may_be_a_defect_and_keeps_its_traceback(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        guarded(lambda: len(os.listdir(tmp_path / "missing")))


@pytest.mark.parametrize("name", ["x" * 300, "loop", "file\n"])
def test_a_file_that_no_part_expected_to_be_unusable_is_a_line(tmp_path: Path, capsys, name: str):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file\n").touch()
    reports: list[tuple[str, bool]] = []

    def body() -> int:
        return len(os.listdir(tmp_path / name))

    assert guarded(body, report=lambda *report: reports.append(report)) == USER_ERROR
    line = capsys.readouterr().err
    assert line.startswith("error: cannot use ") and line.count("\n") == 1 and len(line) < 500
    assert reports == [(line.rstrip("\n"), True)]
