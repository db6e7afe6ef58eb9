from dataclasses import dataclass, field

import pytest

from gpt2.base.errors import ConfigError, UserError
from gpt2.cli.parse import USER_ERROR, guarded, parse, parse_known


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


def test_unknown_arguments_are_returned():
    assert parse_known(Command, ["--fast", "True", "--else", "1"]) == (
        Command(fast=True),
        ["--else", "1"],
    )
