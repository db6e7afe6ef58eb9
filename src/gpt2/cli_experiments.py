"""What the `gpt2` command does with many trainings: `seeds`, `models`, `experiments`."""

from collections.abc import Sequence
from typing import TypeVar

from gpt2 import cli
from gpt2.cli_parse import parse_known
from gpt2.config import RunConfig

T = TypeVar("T")


def parse_beside_run(kind: type[T], arguments: Sequence[str]) -> tuple[T, RunConfig]:
    """The command, and the training that the other arguments say; the command's flags come first,
    where both have one of the same name."""
    command, others = parse_known(kind, arguments)
    return command, cli.parse_train(others).run
