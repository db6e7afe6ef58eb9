"""`gpt2 status`: the state of a run, also as an exit code."""

from dataclasses import dataclass
from pathlib import Path

from gpt2.base.errors import CheckpointError
from gpt2.base.text import console
from gpt2.cli import watch
from gpt2.cli.parse import CommandOptions, run_command
from gpt2.cli.watch import WatchCommand
from gpt2.inspection import run_status

STATUS_CODES = {"running": 0, "finished": 0, "stopped": 3, "failed": 4, "dead": 4}


@dataclass(frozen=True)
class StatusCommand(CommandOptions):
    """Show the state of a run. Exit code: 0 running or finished, 3 stopped, 4 failed or dead."""

    checkpoint_dir: Path = Path("checkpoints")
    """folder of the run, or a parent of several runs: the newest is shown"""
    follow: bool = False
    """watch it, as `gpt2 watch` does"""


def status_main() -> int:
    """`gpt2 status`."""
    return run_command(StatusCommand, _run)


def _run(command: StatusCommand) -> int:
    if command.follow:
        return watch.run(WatchCommand(checkpoint_dir=command.checkpoint_dir))
    run = run_status.newest_run(command.checkpoint_dir)
    if run is None:
        raise CheckpointError(f"no run in {command.checkpoint_dir}; use --checkpoint_dir FOLDER")
    run_status.print_state(run, console())
    return STATUS_CODES[run.state]
